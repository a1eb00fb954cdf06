"""Read tensors from PyTorch files. No other module of this package imports torch."""

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from umbrella_jax.errors import CheckpointError, is_out_of_memory
from umbrella_jax.io.reading import describe_pointer


def read_bin(path: Path) -> dict[str, np.ndarray]:
    """Read {name: array} from a `pytorch_model*.bin`. Nothing in the file is executed.

    Raises CheckpointError for a damaged file, and for a file with anything but named tensors.
    """
    if pointer := describe_pointer(path):
        raise CheckpointError(f"{path}: {pointer}")
    try:
        _check_packing(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes make the unpickler and zipfile raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"{path}: cut short, damaged, or more than tensors ({reason}); copy it again") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        keys = f": it holds {', '.join(sorted(map(str, state))[:5])}" if isinstance(state, dict) else ""
        remedy = "save the model in PyTorch with save_pretrained"
        raise CheckpointError(f"{path}: expected a state_dict, names and tensors{keys}; {remedy}")
    try:
        return {name: _from_torch(_checked(tensor)) for name, tensor in state.items()}
    except (TypeError, RuntimeError) as error:  # a type or layout that NumPy lacks
        raise CheckpointError(f"{path}: {error}") from None


def read_tensor(path: Path) -> np.ndarray:
    """Read the one tensor that torch.save wrote, bfloat16 as float32. Nothing in the file is executed.

    Raises TypeError for other content, or a type or layout that NumPy lacks; ValueError for a file that unpacks to more
    than its size; whatever torch raises for a damaged file.
    """
    _check_packing(path)
    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"holds {type(tensor).__name__}, not a tensor")
    tensor = _checked(tensor)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _check_packing(path: Path) -> None:
    """Raise ValueError if a file unpacks to more than its size: torch.save does not compress, but a zip bomb does."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"unpacks to {size} bytes, more than the file has")


def _checked(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its gradient. Raise TypeError if the file does not hold all its numbers.

    With strides of 0, four bytes of a file could claim to be 10¹² numbers.
    """
    if tensor.layout is not torch.strided:
        raise TypeError(f"a tensor of {tensor.layout}, which numpy has not")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise TypeError(f"shape {tuple(tensor.shape)} of {tensor.untyped_storage().nbytes()} bytes, which it repeats")
    return tensor.detach()


def _from_torch(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array with the same bytes. bfloat16 goes through int16, since torch cannot convert it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
