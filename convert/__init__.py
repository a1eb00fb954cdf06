"""Hugging Face checkpoints ⇄ JAX parameters, without loss."""
