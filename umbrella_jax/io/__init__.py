"""Files: reading them safely and writing them atomically."""
