"""What the demo runs on, made on the spot: a small random LLaVA-Qwen and a small brain data set."""

from umbrella_jax.demo.base import make_base
from umbrella_jax.demo.data import DemoData, make_data

__all__ = ["DemoData", "make_base", "make_data"]
