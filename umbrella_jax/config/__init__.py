"""A run's configuration: its fields, its YAML, and the conversion from the original system's YAML."""
