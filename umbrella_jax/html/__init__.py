"""HTML pages and slices of volumes."""
