"""Write HTML pages (`page.py`, which lists what they share), and draw slices of volumes for them (`slices.py`)."""
