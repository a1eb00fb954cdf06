"""Check a data set before training: the checks, their findings, and a page."""
