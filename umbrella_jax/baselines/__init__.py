"""Simple models trained on a run's data, for comparison."""
