"""Checkpoints on disk: Hugging Face, native and run."""
