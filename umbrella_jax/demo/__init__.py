"""The whole workflow on small generated inputs, through the commands that a user types."""

from umbrella_jax.demo.base import make_base
from umbrella_jax.demo.data import DemoData, make_data
from umbrella_jax.demo.run import run_demo

__all__ = ["DemoData", "make_base", "make_data", "run_demo"]
