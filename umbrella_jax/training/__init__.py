"""Trainable parameters, optimiser, training step, checkpoints and the training loop, for any iterator of `Batch`."""
