"""safetensors checkpoints: read tensor by tensor, written at one place.

Reader and writer speak of `Tensor`, which knows its shape and type and reads its numbers only when asked, so no more
than one shard is ever in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from umbrella_jax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory yet; `dtype` is numpy's name, or safetensors' own for a type without one here."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    file: str = ""

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        """A tensor that is in memory already."""
        return cls(array.shape, array.dtype.name, lambda: array)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def _open_shard(path: Path) -> dict[str, Tensor]:
    """Header of one file. Raises SafetensorError or OSError for one that is cut short, damaged or unreadable."""
    shard = safe_open(path, framework="np")

    def tensor(name: str) -> Tensor:
        header = shard.get_slice(name)
        code = header.get_dtype()
        dtype = np.dtype(_DTYPES[code]).name if code in _DTYPES else code
        return Tensor(tuple(header.get_shape()), dtype, lambda: shard.get_tensor(name), str(path))

    return {name: tensor(name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)


def open_checkpoint(directory: str | Path) -> dict[str, Tensor]:
    """{name in the file: tensor} of `model.safetensors` or of the shards that `model.safetensors.index.json` names.

    Only headers are read. Raises CheckpointError with every file that is missing or damaged and every tensor that is
    doubled, or that index and shards do not agree on.
    """
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory}: holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    weight_map = None
    if index.exists():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{index}: no index with a weight_map ({error!r}); copy it again") from None
    elif not single.exists():
        others = ", ".join(sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pth", ".gguf")))
        remedy = f"found {others}; save the model as safetensors" if others else "give the folder of the weights"
        raise CheckpointError(f"{directory}: neither {SINGLE} nor {INDEX}; {remedy}")

    faults: list[str] = []
    tensors: dict[str, Tensor] = {}
    whole = True
    for file in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        path = directory / file
        if not path.exists():
            faults.append(f"{path}: missing, but {INDEX} names it; download it again")
            whole = False
            continue
        try:
            shard = _open_shard(path)
        except (SafetensorError, OSError) as error:
            faults.append(f"{path}: cut short or damaged ({error}); download it again")
            whole = False
            continue
        for name, tensor in shard.items():
            if name in tensors:
                faults.append(f"{path}: {name}: also in {tensors[name].file}; expected in one shard only")
            elif weight_map is not None and name not in weight_map:
                faults.append(f"{path}: {name}: not in {INDEX}; the index belongs to other shards, copy it again")
            tensors.setdefault(name, tensor)
    if whole:  # else every tensor of a missing shard would be named once more
        for name, file in sorted((weight_map or {}).items()):
            where = tensors[name].file if name in tensors else None
            if where != str(directory / file):
                faults.append(f"{index}: {name}: expected in {file}, found in {where or 'none'}; copy all files again")
    if faults:
        raise CheckpointError(faults)
    return tensors


def write_checkpoint(directory: str | Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> None:
    """Writes `model.safetensors`, or shards and their index where one file would be larger than `max_shard_size`.

    Each file appears under its name only when it is complete; the index comes last.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda t: t.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        # save_file writes the wrong numbers for arrays that are not C-contiguous: no array goes to it but through here
        arrays = {name: np.ascontiguousarray(tensors[name].read()) for name in names}
        temporary = directory / f".{file}.tmp"
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(arrays, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # what umask says; safetensors lets nobody else read it
        os.replace(temporary, directory / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        temporary = directory / f".{INDEX}.tmp"
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, directory / INDEX)


def fingerprint(directory: str | Path) -> str:
    """SHA-256, in hex, of all names, shapes, types and bytes; the same however they are dealt to shards."""
    digest = hashlib.sha256()
    for name, tensor in sorted(open_checkpoint(directory).items()):
        digest.update(json.dumps([name, tensor.shape, tensor.dtype]).encode())
        digest.update(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
