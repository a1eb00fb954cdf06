"""A run as one HTML page: settings, curves, metrics, and answers with their volumes."""

from umbrella_jax.report.facts import Facts, read_facts
from umbrella_jax.report.page import write_report

__all__ = ["Facts", "read_facts", "write_report"]
