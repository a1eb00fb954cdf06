"""Write HTML pages (`page.py`), and draw slices of volumes for them (`slices.py`)."""
