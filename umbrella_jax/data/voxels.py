"""Voxels on disk, whatever holds them, behind one small interface: shape, affine, voxel sizes, and the frames that are
asked for.

- What nibabel knows: NIfTI-1 and 2 (`.nii`, `.nii.gz`, `.hdr`/`.img`), Analyze pairs, `.mgz`, `.mgh`; scaled values.
- A `.npy` array or `.pt` tensor: one volume (D, H, W), (1, D, H, W) or (D, H, W, 1).
- A directory of such volumes, `frame_0`, `frame_1`, … `.npy` or `.pt`: a run. Files of other names are not looked at,
  the `global_stats.pt` of the original system among them.

Nothing in a file is ever executed: arrays are read without pickles, tensors with `weights_only`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.affines import voxel_sizes
from nibabel.analyze import AnalyzeImage
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Pair
from nibabel.openers import ImageOpener
from nibabel.spatialimages import SpatialImage

from umbrella_jax.errors import DataError

_ARRAYS = (".npy", ".pt")
_MM = {"meter": 1000.0, "micron": 0.001}  # what NIfTI may measure in, beside mm
_SINGLE = (".nii", ".nii.gz", ".mgz", ".mgh", *_ARRAYS)
_FRAME = re.compile(r"frame_([0-9]+)\.(npy|pt)")


class Voxels(Protocol):
    """One opened file or directory; no more of it is read than `read` is asked for."""

    shape: tuple[int, ...]
    """As stored: (D, H, W), (D, H, W, T), or with more axes."""
    dtype: np.dtype
    """As stored; of a run of arrays, that of its first frame."""
    affine: np.ndarray | None
    """(4, 4), voxel indices to RAS+ coordinates; None where the file does not say how it is oriented."""
    zooms: np.ndarray | None
    """(3,), mm from voxel to voxel along each axis as stored; None where the file does not say."""

    def read(self, frames: slice | int) -> np.ndarray:
        """(D, H, W, n) of n frames, (D, H, W) of one; of axes behind them the first entry, of 3 axes all.

        Real numbers in the type of the file, or a float where it scales them.
        """


def open_voxels(path: str | Path) -> Voxels:
    """Opens what lies there, a file by its suffix.

    Raises DataError naming it: missing, unreadable, no real numbers, frames that do not follow one another.
    """
    path = Path(path)
    if path.is_dir():
        return _Arrays(_frames(path), run=True)
    return _Arrays([path]) if path.suffix in _ARRAYS else _Nibabel(path)


def source_files(path: Path) -> list[Path]:
    """All files that `open_voxels` may read there, in a fixed order: itself, both of a pair, a directory's frames.

    Opens none. Raises DataError as `open_voxels` does where the frames of a directory do not follow one another.
    """
    if path.is_dir():
        return _frames(path)
    files = {path}
    if not path.name.endswith(_SINGLE):
        for kind in nib.all_image_classes:
            with suppress(ImageFileError):  # not a name of this kind
                files |= {Path(part.filename) for part in kind.filespec_to_file_map(path).values()}
    return sorted(file for file in files if file == path or file.exists())


@contextmanager
def readable(path: Path, expected: str = "a whole volume, copy it again") -> Iterator[None]:
    """Whatever goes wrong inside becomes a DataError: a damaged file makes its readers raise nearly anything."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        missing = path if error.filename is None else error.filename  # of a pair, the half that is missing
        raise DataError(
            f"{path}: {'' if str(missing) == str(path) else f'{missing} '}not found; expected a volume or a directory "
            "of frames (relative paths start at the conversation file or image_root)"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {reason}; expected {expected}") from None


def _check_real(path: Path, dtype: np.dtype) -> None:
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {dtype}; expected real numbers")


class _Nibabel:
    def __init__(self, path: Path):
        self._path = path
        with readable(path):
            # Not memory-mapped: a file that is cut short while it is mapped kills the process with SIGBUS.
            self._image: Any = nib.load(path, mmap=False, keep_file_open=True)
        if not isinstance(self._image, SpatialImage):
            raise DataError(f"{path}: {type(self._image).__name__}; expected a volume of voxels")
        self.shape: tuple[int, ...] = self._image.shape
        header, data = self._image.header, self._image.dataobj
        self.dtype: np.dtype = self._image.get_data_dtype()
        _check_real(path, self.dtype)
        nifti = isinstance(self._image, Nifti1Pair)
        analyze = isinstance(self._image, AnalyzeImage) and not nifti  # NIfTI is derived from it
        # An Analyze header names no axes, nor does a NIfTI header without codes; nibabel would only assume them.
        assumed = analyze or (nifti and header["qform_code"] == 0 and header["sform_code"] == 0)
        affine = self._image.affine
        oriented = np.isfinite(affine).all() and not np.isnan(nib.io_orientation(affine)).any()
        self.affine: np.ndarray | None = affine if oriented and not assumed else None
        with readable(path):
            pixdim = analyze or (nifti and header["sform_code"] == 0)
            zooms = self._pixdim() if pixdim else voxel_sizes(affine)
            if nifti:
                zooms = zooms * _MM.get(header.get_xyzt_units()[0], 1.0)
            if type(data) is ArrayProxy and str(data.file_like).lower().endswith("gz"):
                data.file_like = igzip.open(data.file_like)  # takes two thirds of the time of nibabel's own
        self.zooms: np.ndarray | None = zooms if (np.isfinite(zooms) & (zooms > 0)).all() else None

    def _pixdim(self) -> np.ndarray:
        """As it is in the file: nibabel, which checks headers, has replaced zeros by ones."""
        files = self._image.file_map
        with ImageOpener(files.get("header", files["image"]).filename) as file:
            stored = type(self._image.header).from_fileobj(file, check=False)
        return np.abs(stored["pixdim"][1:4].astype(np.float64))

    def read(self, frames: slice | int) -> np.ndarray:
        behind = len(self.shape) - 4
        with readable(self._path):
            index = (*(slice(None),) * 3, frames, *(0,) * behind)[: len(self.shape)]
            return np.asarray(self._image.dataobj[index])


class _Arrays:
    affine: np.ndarray | None = None
    zooms: np.ndarray | None = None

    def __init__(self, files: list[Path], run: bool = False):
        self._files = files
        self._first = _array(files[0])  # says the shape, so it is read in any case
        self.shape: tuple[int, ...] = (*self._first.shape, len(files)) if run else self._first.shape
        self.dtype: np.dtype = self._first.dtype

    def read(self, frames: slice | int) -> np.ndarray:
        if isinstance(frames, int):
            return self._volume(self._files[frames])
        return np.stack([self._volume(file) for file in self._files[frames]], axis=-1)

    def _volume(self, file: Path) -> np.ndarray:
        volume = self._first if file == self._files[0] else _array(file)
        if volume.shape != self.shape[:3]:
            raise DataError(f"{file}: shape {volume.shape}; expected {self.shape[:3]}, as {self._files[0].name} has it")
        return volume


def _frames(directory: Path) -> list[Path]:
    """Its frames, in the order of their numbers, which start at 0 and leave none out."""
    numbers: dict[int, list[Path]] = {}
    faults = []
    with readable(directory):
        found = sorted(directory.iterdir())
    for file in found:
        if match := _FRAME.fullmatch(file.name):
            numbers.setdefault(int(match[1]), []).append(file)
        elif file.name.startswith("frame_"):
            faults.append(f"{file}: expected frame_N.pt or frame_N.npy with a number N")
    faults += [
        f"{directory}: {', '.join(file.name for file in files)} are all frame {n}; expected one file for each frame"
        for n, files in numbers.items()
        if len(files) > 1
    ]
    if not numbers:
        faults.append(f"{directory}: a directory without frames; expected frame_0.pt, frame_1.pt, … or .npy")
    elif missing := max(numbers) + 1 - len(numbers):
        gap = next(n for n in range(max(numbers)) if n not in numbers)
        faults.append(
            f"{directory}: no frame_{gap}; expected all from frame_0 to frame_{max(numbers)}, {missing} missing"
        )
    if faults:
        raise DataError(faults)
    return [numbers[n][0] for n in sorted(numbers)]


def _array(file: Path) -> np.ndarray:
    """One volume (D, H, W), as stored."""
    with readable(file, "one array of numbers, nothing pickled with it; save it again"):
        array = _tensor(file) if file.suffix == ".pt" else np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise DataError(f"{file}: holds {type(array).__name__}; expected one array of numbers")
    _check_real(file, array.dtype)
    one = [axis for axis in (0, 3) if array.ndim == 4 and array.shape[axis] == 1]
    if array.ndim != 3 and len(one) != 1:
        raise DataError(
            f"{file}: shape {array.shape}; expected one volume, (D, H, W), (1, D, H, W) or (D, H, W, 1); "
            "a run is a directory of frames"
        )
    return array.squeeze(tuple(one))


def _tensor(file: Path) -> np.ndarray:
    try:
        from convert.torch_model import read_tensor
    except ImportError:
        remedy = "pip install 'umbrella-jax[torch]', or save it as .npy"
        raise DataError(f"{file}: needs PyTorch to be read; {remedy}") from None
    return read_tensor(file)
