"""Convert Hugging Face checkpoints to JAX parameters and back, without loss."""
