"""Tensors that are read on demand: every reader returns them, and writers and devices take them.

A tensor knows its shape and type. Its numbers are read region by region, straight into the destination. Even when it is
stacked, cast or sharded, the whole tensor is never in memory beside the result.
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
"""Region of a tensor: one slice per axis, with start and stop."""
ShardingFor = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Function from a parameter's path and shape to its sharding."""

_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
BLOCK = 32 << 20
"""Bytes to read at once. The kernel counts pages of a mapped file as the process's memory until released."""
_THREADS = min(os.cpu_count() or 1, 8)  # reading, copying and casting release the GIL


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet.

    `dtype` is NumPy's name of the type, or safetensors' name of a type that NumPy lacks.
    """

    shape: tuple[int, ...]
    dtype: str
    fill: Callable[[np.ndarray, Index], None]
    """Write a region into an array of the region's shape and of any number type."""
    file: str = ""
    name: str = ""
    """Name in the file."""

    @classmethod
    def from_array(cls, array: Any, file: str = "", name: str = "") -> "Tensor":
        """Return the tensor of a NumPy or JAX array, which is in memory already."""

        def fill(out: np.ndarray, index: Index) -> None:
            copy_numbers(out, np.asarray(array)[index], file, name)

        return cls(array.shape, array.dtype.name, fill, file, name)

    @property
    def whole(self) -> Index:
        """Region that covers the whole tensor."""
        return tuple(slice(0, n) for n in self.shape)

    @property
    def _numpy(self) -> np.dtype:
        """NumPy's type. Raises CheckpointError if NumPy lacks it, which its name in capitals shows."""
        if self.dtype.isupper():
            raise CheckpointError(f"{self.file}: {self.name}: type {self.dtype} cannot be read; expected floats")
        return np.dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes. Raises CheckpointError if NumPy lacks its type."""
        return math.prod(self.shape) * self._numpy.itemsize

    def read(self, index: Index | None = None) -> np.ndarray:
        """Read a region, by default the whole tensor, into a new C-contiguous array.

        Raises CheckpointError if NumPy lacks the type, or if a number overflows.
        """
        index = self.whole if index is None else index
        out = _empty(tuple(i.stop - i.start for i in index), self._numpy)
        self.fill(out, index)
        return out

    def regions(self) -> Iterator[Index]:
        """Yield regions along axis 0 that cover the tensor in C order, of about `BLOCK` bytes each."""
        if not self.shape:
            yield ()
            return
        rows = max(1, BLOCK * self.shape[0] // max(self.nbytes, 1))
        for start in range(0, self.shape[0], rows):
            yield (slice(start, min(start + rows, self.shape[0])), *self.whole[1:])

    def blocks(self) -> Iterator[np.ndarray]:
        """Read the tensor region by region."""
        return map(self.read, self.regions())

    def astype(self, dtype: str) -> "Tensor":
        """Return the tensor as another type; `auto` keeps its own."""
        return self if dtype == "auto" else dataclasses.replace(self, dtype=dtype)

    def reshape(self, shape: tuple[int, ...]) -> "Tensor":
        """Return the tensor in another shape. Reading any region of the result reads the whole tensor."""
        if shape == self.shape:
            return self

        def fill(out: np.ndarray, index: Index) -> None:
            whole = np.empty(self.shape, out.dtype)
            self.fill(whole, self.whole)
            out[...] = whole.reshape(shape)[index]

        return dataclasses.replace(self, shape=shape, fill=fill)

    def layer(self, i: int) -> "Tensor":
        """Return the slice at index i of axis 0."""

        def fill(out: np.ndarray, index: Index) -> None:
            self.fill(out[None], (slice(i, i + 1), *index))

        return dataclasses.replace(self, shape=self.shape[1:], fill=fill)


def stack_tensors(layers: Sequence[Tensor]) -> Tensor:
    """Stack tensors of the same shape and type on a new axis 0."""

    def fill(out: np.ndarray, index: Index) -> None:
        for part, layer in zip(out, layers[index[0]], strict=True):
            layer.fill(part, index[1:])

    return Tensor((len(layers), *layers[0].shape), layers[0].dtype, fill, layers[0].file)


def grow(tensor: Tensor, rows: int) -> Tensor:
    """Append rows to a table [R, D]; each new row is the mean of the old ones."""

    def fill(out: np.ndarray, index: Index) -> None:
        own = slice(index[0].start, min(index[0].stop, tensor.shape[0]))
        count = max(own.stop - own.start, 0)
        if count:
            tensor.fill(out[:count], (own, index[1]))
        if count < len(out):
            # in float64, since a float32 sum over 150,000 rows loses digits
            total = sum(block.sum(0, dtype=np.float64) for block in tensor.blocks())
            copy_numbers(out[count:], (total / tensor.shape[0]).astype(np.float32)[index[1]], tensor.file, tensor.name)

    return dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]), fill=fill)


def add_product(tensor: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W + scale · B·A for W [..., O, I], A [..., r, I] and B [..., O, r], computed in float32, in W's type."""

    def fill(out: np.ndarray, index: Index) -> None:
        *layers, outputs, inputs = index
        if layers and len(out) > 1:  # layer by layer, since all layers in float32 are several times the result
            for i, layer in enumerate(range(layers[0].start, layers[0].stop)):
                fill(out[i : i + 1], (slice(layer, layer + 1), *index[1:]))
            return
        parts = ((tensor, index), (b, (*layers, outputs, b.whole[-1])), (a, (*layers, a.whole[-2], inputs)))
        w, left, right = (part.astype("float32").read(region) for part, region in parts)
        copy_numbers(out, w + np.float32(scale) * (left @ right), tensor.file, tensor.name)

    return dataclasses.replace(tensor, fill=fill)


def place(tensors: Mapping[str, Tensor], sharding_for: ShardingFor) -> dict[str, jax.Array]:
    """Read each tensor onto its devices: only the regions that this process's devices hold, and each region once."""

    def put(item: tuple[str, Tensor]) -> jax.Array:
        path, tensor = item
        sharding = sharding_for(path, tensor.shape)
        regions: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        shards = []
        for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
            region = tuple(i.indices(n)[:2] for i, n in zip(index or (), tensor.shape, strict=True))
            if region not in regions:
                regions[region] = tensor.read(tuple(slice(*bounds) for bounds in region))
            shards.append(jax.device_put(regions[region], device))
        return jax.make_array_from_single_device_arrays(tensor.shape, sharding, shards)

    # largest first, or one thread would finish long after the others
    largest_first = sorted(tensors.items(), key=lambda item: -item[1].nbytes)
    with ThreadPoolExecutor(_THREADS) as pool:
        placed = dict(zip((path for path, _ in largest_first), pool.map(put, largest_first), strict=True))
    return {path: placed[path] for path in tensors}


def host_memory(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Return the sharding that puts a parameter into host memory, for use as `sharding_for` of `place`.

    If JAX runs without its CPU backend, it is the first device instead.
    """
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Read every number. Raises CheckpointError naming each tensor that contains a NaN or an infinity."""

    def fault(tensor: Tensor) -> str | None:
        bad = sum(int(block.size - np.isfinite(block).sum()) for block in tensor.blocks())
        if not bad:
            return None
        return f"{tensor.file}: {tensor.name}: {bad} of {math.prod(tensor.shape)} numbers are NaN or infinite"

    with ThreadPoolExecutor(_THREADS) as pool:
        faults = [found for found in pool.map(fault, tensors) if found]
    if faults:
        raise CheckpointError(faults)


def copy_numbers(out: np.ndarray, array: np.ndarray, file: str, name: str) -> None:
    """Copy an array into `out`, casting to its type.

    Raises CheckpointError naming the tensor if a number becomes infinite.
    """
    infinity = _INFINITY.get(out.dtype.name) if out.dtype != array.dtype else None
    if infinity is None:  # only 16-bit types overflow
        np.copyto(out, array, casting="unsafe")
        return
    out, array = np.atleast_1d(out), np.atleast_1d(array)
    rows = max(1, (1 << 20) * len(out) // max(out.nbytes, 1))  # a piece is still in the cache when it is checked
    for start in range(0, len(out), rows):
        piece, source = out[start : start + rows], array[start : start + rows]
        with np.errstate(over="ignore"):
            np.copyto(piece, source, casting="unsafe")
        # Bits read as integers: infinity exceeds every finite number of its sign; only NaNs are larger. Comparing
        # maxima is several times faster than np.isinf.
        found = piece.view(np.int16).max() >= infinity or piece.view(np.uint16).max() >= infinity + 0x8000
        if found and np.isinf(piece).sum() > np.isinf(source).sum():
            raise CheckpointError(f"{file}: {name}: a number is too large for {out.dtype}; choose a wider type")


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return np.empty at an address divisible by 64: XLA's CPU backend uses it in place and copies others."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
