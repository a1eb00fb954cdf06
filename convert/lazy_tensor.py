"""A tensor that is not in memory yet: what every reader gives, and every writer and device takes.

It knows its shape and type and reads its numbers only when asked, region by region, straight to where they are wanted.
Stacked, cast or sharded, no tensor is ever in memory as a whole beside the result.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from umbrella_jax.errors import CheckpointError

Index = tuple[slice, ...]
"""A region: for each axis a slice with a start and a stop."""
Where = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""A parameter's path and shape → the devices that it lies on, and how."""

_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
BLOCK = 32 << 20
"""Bytes that are read at once; the kernel counts pages of a mapped file as the process's own until they are let go."""
_THREADS = min(os.cpu_count() or 1, 8)  # reading, copying and casting let go of the interpreter


@dataclass(frozen=True)
class Tensor:
    """A tensor somewhere; `dtype` is numpy's name of a type, or safetensors' own for one that numpy has not."""

    shape: tuple[int, ...]
    dtype: str
    fill: Callable[[np.ndarray, Index], None]
    """Writes a region into an array of the region's shape and any type of number."""
    file: str = ""
    name: str = ""
    """In the file."""

    @classmethod
    def of(cls, array: Any, file: str = "", name: str = "") -> "Tensor":
        """A tensor that is in memory already, numpy's or jax's."""

        def fill(out: np.ndarray, index: Index) -> None:
            copy(out, np.asarray(array)[index], file, name)

        return cls(array.shape, array.dtype.name, fill, file, name)

    @property
    def whole(self) -> Index:
        """The region that is all of it."""
        return tuple(slice(0, n) for n in self.shape)

    @property
    def _numpy(self) -> np.dtype:
        """Raises CheckpointError for a type that is none of numpy's: safetensors' names of those are large."""
        if self.dtype.isupper():
            raise CheckpointError(f"{self.file}: {self.name}: type {self.dtype} cannot be read; expected floats")
        return np.dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it. Raises as `read`."""
        return math.prod(self.shape) * self._numpy.itemsize

    def read(self, index: Index | None = None) -> np.ndarray:
        """A region, by default all; a new C-contiguous array. Raises CheckpointError for a type that is none of
        numpy's, and where a number overflows."""
        index = self.whole if index is None else index
        out = _empty(tuple(i.stop - i.start for i in index), self._numpy)
        self.fill(out, index)
        return out

    def regions(self) -> Iterator[Index]:
        """All of it in C order, in regions along axis 0 of no more than some MB."""
        if not self.shape:
            yield ()
            return
        rows = max(1, BLOCK * self.shape[0] // max(self.nbytes, 1))
        for start in range(0, self.shape[0], rows):
            yield (slice(start, min(start + rows, self.shape[0])), *self.whole[1:])

    def blocks(self) -> Iterator[np.ndarray]:
        """The numbers of `regions`, read one after the other."""
        return map(self.read, self.regions())

    def astype(self, dtype: str) -> "Tensor":
        """The same as another type; `auto` is its own."""
        return self if dtype == "auto" else dataclasses.replace(self, dtype=dtype)

    def reshape(self, shape: tuple[int, ...]) -> "Tensor":
        """The same numbers in another shape. Any region reads all of it."""
        if shape == self.shape:
            return self

        def fill(out: np.ndarray, index: Index) -> None:
            whole = np.empty(self.shape, out.dtype)
            self.fill(whole, self.whole)
            out[...] = whole.reshape(shape)[index]

        return dataclasses.replace(self, shape=shape, fill=fill)

    def layer(self, i: int) -> "Tensor":
        """What lies at i on axis 0."""

        def fill(out: np.ndarray, index: Index) -> None:
            self.fill(out[None], (slice(i, i + 1), *index))

        return dataclasses.replace(self, shape=self.shape[1:], fill=fill)


def stack(layers: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape and type on a new axis 0."""

    def fill(out: np.ndarray, index: Index) -> None:
        for part, layer in zip(out, layers[index[0]], strict=True):
            layer.fill(part, index[1:])

    return Tensor((len(layers), *layers[0].shape), layers[0].dtype, fill, layers[0].file)


def grow(tensor: Tensor, rows: int) -> Tensor:
    """A table [R, D] with new rows behind its own, each the mean of those."""

    def fill(out: np.ndarray, index: Index) -> None:
        own = slice(index[0].start, min(index[0].stop, tensor.shape[0]))
        count = max(own.stop - own.start, 0)
        if count:
            tensor.fill(out[:count], (own, index[1]))
        if count < len(out):
            # summed in float64: 150,000 rows one after the other lose digits in float32
            total = sum(block.sum(0, dtype=np.float64) for block in tensor.blocks())
            copy(out[count:], (total / tensor.shape[0]).astype(np.float32)[index[1]], tensor.file, tensor.name)

    return dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]), fill=fill)


def add_product(tensor: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale · B·A of W [..., O, I], A [..., r, I] and B [..., O, r]: computed in float32, in W's type."""

    def fill(out: np.ndarray, index: Index) -> None:
        *layers, outputs, inputs = index
        if layers and len(out) > 1:  # one by one: in float32 all of them are several times the result
            for i, layer in enumerate(range(layers[0].start, layers[0].stop)):
                fill(out[i : i + 1], (slice(layer, layer + 1), *index[1:]))
            return
        parts = ((tensor, index), (b, (*layers, outputs, b.whole[-1])), (a, (*layers, a.whole[-2], inputs)))
        w, left, right = (part.astype("float32").read(region) for part, region in parts)
        copy(out, w + np.float32(scale) * (left @ right), tensor.file, tensor.name)

    return dataclasses.replace(tensor, fill=fill)


def place(tensors: Mapping[str, Tensor], where: Where) -> dict[str, jax.Array]:
    """Each tensor on its devices; only what this process's devices hold is read, and every region once."""

    def put(item: tuple[str, Tensor]) -> jax.Array:
        path, tensor = item
        sharding = where(path, tensor.shape)
        regions: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        shards = []
        for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
            region = tuple(i.indices(n)[:2] for i, n in zip(index or (), tensor.shape, strict=True))
            if region not in regions:
                regions[region] = tensor.read(tuple(slice(*bounds) for bounds in region))
            shards.append(jax.device_put(regions[region], device))
        return jax.make_array_from_single_device_arrays(tensor.shape, sharding, shards)

    largest_first = sorted(tensors.items(), key=lambda item: -item[1].nbytes)  # else one thread ends long after others
    with ThreadPoolExecutor(_THREADS) as pool:
        placed = dict(zip((path for path, _ in largest_first), pool.map(put, largest_first), strict=True))
    return {path: placed[path] for path in tensors}


def host(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """As `where` of `place`: the host's memory, for what no accelerator has to do or has room for; the first device,
    where jax was told to leave its CPU backend out."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Reads every number. Raises CheckpointError naming each tensor that holds a NaN or an infinity."""

    def fault(tensor: Tensor) -> str | None:
        bad = sum(int(block.size - np.isfinite(block).sum()) for block in tensor.blocks())
        if not bad:
            return None
        return f"{tensor.file}: {tensor.name}: {bad} of {math.prod(tensor.shape)} numbers are NaN or infinite"

    with ThreadPoolExecutor(_THREADS) as pool:
        faults = [found for found in pool.map(fault, tensors) if found]
    if faults:
        raise CheckpointError(faults)


def copy(out: np.ndarray, array: np.ndarray, file: str, name: str) -> None:
    """Fills `out`, whatever its type. Raises CheckpointError, naming the tensor, where a number becomes infinite."""
    infinity = _INFINITY.get(out.dtype.name) if out.dtype != array.dtype else None
    if infinity is None:  # only a 16-bit type overflows
        np.copyto(out, array, casting="unsafe")
        return
    out, array = np.atleast_1d(out), np.atleast_1d(array)
    rows = max(1, (1 << 20) * len(out) // max(out.nbytes, 1))  # a piece stays in the cache until it is looked at
    for start in range(0, len(out), rows):
        piece, source = out[start : start + rows], array[start : start + rows]
        with np.errstate(over="ignore"):
            np.copyto(piece, source, casting="unsafe")
        # as integers, infinities of either sign are the largest but for NaNs; several times as fast as np.isinf
        found = piece.view(np.int16).max() >= infinity or piece.view(np.uint16).max() >= infinity + 0x8000
        if found and np.isinf(piece).sum() > np.isinf(source).sum():
            raise CheckpointError(f"{file}: {name}: a number is too large for {out.dtype}; choose a wider type")


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty at an address divisible by 64, where XLA's CPU backend uses an array in place; it copies all others."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
