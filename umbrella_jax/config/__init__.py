"""A run's configuration: its fields, its YAML, and the conversion from the original system's YAML."""

from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import ModalityConfig, RunConfig

__all__ = ["ModalityConfig", "RunConfig", "load_config"]
