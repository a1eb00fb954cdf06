"""Read and write files: text, JSON and YAML from outside (`reading.py`), PyTorch's tensors (`torch_files.py`), and
atomic writes and locks (`files.py`)."""
