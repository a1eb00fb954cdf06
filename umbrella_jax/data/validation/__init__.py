"""Check a data set before training: findings and a page of them."""
