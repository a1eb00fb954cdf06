"""What a model answers, and how right that is."""
