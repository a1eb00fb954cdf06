"""`Checkpoint`, for scripts that look into a checkpoint without loading its model."""

from umbrella_jax.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
