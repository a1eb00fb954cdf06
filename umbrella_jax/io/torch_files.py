"""Read tensors from PyTorch's files. No other module of this package imports torch."""

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from umbrella_jax.errors import CheckpointError, is_out_of_memory
from umbrella_jax.io.reading import describe_pointer


def read_bin(path: Path) -> dict[str, np.ndarray]:
    """Return {name: array} of a `pytorch_model*.bin`; nothing in it is executed.

    Raises CheckpointError for a damaged file, and for one that holds anything but named tensors.
    """
    if pointer := describe_pointer(path):
        raise CheckpointError(f"{path}: {pointer}")
    try:
        _check_packing(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # its unpickler and zipfile raise whatever damaged bytes lead to
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
    except (TypeError, RuntimeError) as error:  # a type or layout that numpy does not have
        raise CheckpointError(f"{path}: {error}") from None


def read_tensor(path: Path) -> np.ndarray:
    """The one tensor that torch.save wrote, as numpy has it, bfloat16 as float32; nothing in the file is executed.

    Raises TypeError for another content or a type or layout that numpy lacks, ValueError for a file that unpacks to
    more than it is, and what torch raises for a damaged file.
    """
    _check_packing(path)
    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"holds {type(tensor).__name__}, not a tensor")
    tensor = _checked(tensor)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _check_packing(path: Path) -> None:
    """Raises ValueError for a file that unpacks to more than it is: torch.save compresses nothing, a bomb does."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"unpacks to {size} bytes, more than the file has")


def _checked(tensor: torch.Tensor) -> torch.Tensor:
    """Without its gradient. Raises TypeError where its numbers are not all there: repeated by strides of 0, 10¹² of
    them take four bytes of a file."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"a tensor of {tensor.layout}, which numpy has not")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise TypeError(f"shape {tuple(tensor.shape)} of {tensor.untyped_storage().nbytes()} bytes, which it repeats")
    return tensor.detach()


def _from_torch(tensor: torch.Tensor) -> np.ndarray:
    """The same bytes; numpy does not know torch's bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
