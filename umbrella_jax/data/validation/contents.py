"""Gather the contents of a file while a run's checks read it, so that every voxel is read once."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from umbrella_jax.data.validation.findings import VolumeContents
from umbrella_jax.data.voxels import Voxels


class ContentsReader:
    """An opened file whose frames pass through statistics on their way to whoever reads them.

    Statistics take each frame once and in order, so frames that a reader leaves out are read too. Frames before those
    are read from the file again, as overlapping windows need it.
    """

    def __init__(self, voxels: Voxels):
        self._voxels = voxels
        self.shape, self.dtype, self.affine, self.zooms = voxels.shape, voxels.dtype, voxels.affine, voxels.zooms
        self.why_no_affine, self.why_no_zooms = voxels.why_no_affine, voxels.why_no_zooms
        self.has_time_unit = voxels.has_time_unit
        self.files: Sequence[Path] = voxels.files
        self.files_read, self.remarks = voxels.files_read, voxels.remarks
        rank = max((axis for axis, length in enumerate(self.shape, 1) if axis <= 3 or length != 1), default=0)
        self._digest = hashlib.blake2b(repr(self.shape[:rank]).encode(), digest_size=16)
        self._frames = self.shape[3] if len(self.shape) > 3 else 1
        self._next = 0
        self._first: np.ndarray | None = None
        self._still = self._frames > 1
        self._low, self._high, self._total = np.inf, -np.inf, 0.0
        self._finite = self._nonzero = self._count = 0

    def read(self, frames: slice | int) -> np.ndarray:
        """Read frames as `Voxels.read` does."""
        indices = [frames] if isinstance(frames, int) else range(self._frames)[frames]
        if len(indices) == 0 or indices[0] < self._next or list(indices) != sorted(indices):
            return self._voxels.read(frames)
        arrays = []
        for index in indices:
            while self._next < index:
                self._read_next()
            arrays.append(self._read_next())
        if isinstance(frames, int):
            return arrays[0]
        data = np.empty((*self.shape[:3], len(arrays)), arrays[0].dtype, order="F")
        return np.stack(arrays, axis=-1, out=data)

    def check_end(self) -> None:
        """Read the rest, as `Voxels.check_end` does."""
        while self._next < self._frames:
            self._read_next()
        self._voxels.check_end()

    def read_tr(self) -> float | None:
        """Return the seconds between frames, as `Voxels.read_tr` does."""
        return self._voxels.read_tr()

    def contents(self) -> VolumeContents:
        """Return the contents, after reading what was not read before.

        Raises:
            DataError: the file cannot be read. Voxels that are not finite are no fault here.
        """
        self.check_end()
        low, high, mean = (self._low, self._high, self._total / self._finite) if self._finite else (None,) * 3
        return VolumeContents(
            shape=tuple(int(n) for n in self.shape),
            dtype=self.dtype.name,
            orientation=None if self.affine is None else "".join(nib.aff2axcodes(self.affine)),
            voxel_size=None if self.zooms is None else tuple(round(float(length), 3) for length in self.zooms),
            tr=self.read_tr() if self._frames > 1 else None,
            minimum=low,
            maximum=high,
            mean=mean,
            nonzero=self._nonzero / max(self._count, 1),
            still=self._still,
            digest=self._digest.hexdigest(),
            remarks=tuple(self.remarks),
        )

    def _read_next(self) -> np.ndarray:
        """Read one frame and count it."""
        frame = self._voxels.read(self._next)
        self._next += 1
        data = np.asarray(frame, np.float32)
        self._digest.update(np.ascontiguousarray(data.T).data)  # no copy: nibabel's arrays are in Fortran order
        self._still = self._still and (self._first is None or np.array_equal(data, self._first))
        self._first = data if self._still and self._first is None else self._first
        self._count += data.size
        self._nonzero += int(np.count_nonzero(data))
        if data.size and not np.isfinite([data.min(), data.max()]).all():
            data = data[np.isfinite(data)]
        if data.size:
            self._low, self._high = min(self._low, float(data.min())), max(self._high, float(data.max()))
            self._total += float(data.sum(dtype=np.float64))
            self._finite += data.size
        return frame
