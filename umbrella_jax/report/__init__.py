"""A run as one page: what was run, how it went, how right its answers are, and what they are about."""

from umbrella_jax.report.facts import Facts, read_facts
from umbrella_jax.report.page import write_report

__all__ = ["Facts", "read_facts", "write_report"]
