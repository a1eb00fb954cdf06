"""Simple models on the same data, to compare a run with."""
