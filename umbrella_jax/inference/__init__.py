"""Answers of a model: processor, decoding, predictions, attribution."""
