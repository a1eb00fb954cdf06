"""Tasks, metrics and the rows they are computed from."""
