"""Configuration: its fields, files, and the conversion from the original's."""
