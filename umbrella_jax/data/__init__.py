"""From conversation files and NIfTI volumes to batches: numpy and threads, no accelerator."""
