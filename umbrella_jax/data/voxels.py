"""Voxels on disk, whatever holds them, behind one small interface: shape, affine, voxel sizes, and the frames that are
asked for.

- What nibabel knows: NIfTI-1 and 2 (`.nii`, `.nii.gz`, `.hdr`/`.img`), Analyze pairs, `.mgz`, `.mgh`; scaled values.
- A `.npy` array or `.pt` tensor: one volume (D, H, W), (1, D, H, W) or (D, H, W, 1).
- A directory of such volumes, `frame_0`, `frame_1`, … `.npy` or `.pt`: a run. Files of other names are not looked at,
  the `global_stats.pt` of the original system among them.

Nothing in a file is ever executed: arrays are read without pickles, tensors with `weights_only`. What a header
promises is compared with the file before anything is allocated for it. Extensions of a NIfTI are not read, nor is the
`.mat` beside an Analyze pair.
"""

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from numpy.lib.format import MAGIC_PREFIX, read_array_header_1_0, read_array_header_2_0, read_magic

from umbrella_jax.config import MAX_VOXELS, MM
from umbrella_jax.errors import DataError

UNPACKED = 256 << 20
"""Bytes that any compressed file may hold: a volume of 320³ in float64, whatever is in it."""
RATIO = 100
"""Beyond those, bytes for each of a compressed file's. Scans come to half or a tenth of their size, for they are noisy;
masks to a hundredth; a bomb, of zeros alone, to a thousandth, which is the least that gzip can."""
_NIFTI = (nib.Nifti1Pair, nib.Nifti1Image, nib.Nifti2Pair, nib.Nifti2Image)
_ANALYZE = (nib.Spm2AnalyzeImage, nib.Spm99AnalyzeImage, nib.AnalyzeImage)
_KINDS = (*_NIFTI, *_ANALYZE, nib.MGHImage)
_ARRAYS = (".npy", ".pt")
_MM = {1: 1000.0, 3: 0.001}  # by NIfTI's codes of the metre and the micron: what it may measure in, beside mm
_RAS_FLAG = slice(28, 30)
"""Bytes of an MGH header: whether its voxel sizes and axes mean anything (`goodRASFlag`)."""
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

    Raises DataError naming it: missing, unreadable, no real numbers, a header that promises more than the file can
    hold, frames that do not follow one another.
    """
    path = Path(path)
    if _is_directory(path):
        return _Arrays(_frames(path), run=True)
    return _Arrays([path]) if path.suffix in _ARRAYS else _Nibabel(path)


def _is_directory(path: Path) -> bool:
    with readable(path):  # a name may be longer than any can be
        return path.is_dir()


def source_files(path: Path) -> list[Path]:
    """All files that `open_voxels` may read there, in a fixed order: itself, both of a pair, a directory's frames.

    Opens none. Raises DataError as `open_voxels` does for what is no file, and where the frames of a directory do not
    follow one another.
    """
    if _is_directory(path):
        return _frames(path)
    files = {path}
    if not path.name.endswith(_SINGLE):
        for kind in _KINDS:
            with suppress(ImageFileError):  # not a name of this kind
                files |= _pair(kind, path)
    found = sorted(file for file in files if file == path or file.exists())
    with readable(path):
        for file in found:
            _size(file)
    return found


def _pair(kind: Any, path: Path) -> set[Path]:
    """The files of a kind that are read: header and voxels, which may be one."""
    parts = kind.filespec_to_file_map(path)
    return {Path(parts[part].filename) for part in ("header", "image") if part in parts}


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
            "of frames (relative paths start at the conversation file, or at data.image_root: --image-root DIR)"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {reason}; expected {expected}") from None


def _check_real(path: Path, dtype: np.dtype) -> None:
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {dtype}; expected real numbers")


def _size(file: Path) -> int:
    """Bytes of a file. Raises FileNotFoundError, and DataError for what is none: a pipe would be waited for."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file}: a directory, pipe or device; expected a file")
    return status.st_size


def _check_promise(path: Path, file: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int = 0) -> None:
    """Raises DataError where `file` cannot hold the voxels that a header speaks of."""
    size, promised = _size(file), offset + math.prod(shape) * dtype.itemsize
    what = f"{path}: its header promises {' × '.join(map(str, shape))} voxels of {dtype}"
    if min(shape, default=0) < 0 or offset < 0:
        raise DataError(f"{what} from byte {offset}; expected a whole volume, copy it again")
    packed = file.suffix.lower() in ImageOpener.compress_ext_map
    if not packed and promised > size:
        raise DataError(f"{what}, {promised} bytes, but {file} has {size}; expected a whole volume, copy it again")
    if packed and promised > max(UNPACKED, RATIO * size):
        raise DataError(
            f"{what}, {promised} bytes, from {size} compressed ones; expected no more than {RATIO} times as many, as "
            "of any scan: copy it again, or if it is so empty, unpack it"
        )


def _check_count(path: Path, shape: tuple[int, ...], frames: slice | int) -> None:
    """Raises DataError where a reading is of more voxels than memory may hold."""
    length = shape[3] if len(shape) > 3 else 1
    count = math.prod(shape[:3]) * (1 if isinstance(frames, int) else len(range(length)[frames]))
    if count > MAX_VOXELS:
        raise DataError(f"{path}: {count} voxels to be read at once; expected at most {MAX_VOXELS}, resample it")


class _Nibabel:
    """By nibabel's headers and its proxy of voxels, but not by its `load`, which reads more than those: extensions of a
    NIfTI of whatever length they say, a `.mat` beside an Analyze pair, what stands behind the voxels of an `.mgz`."""

    def __init__(self, path: Path):
        self._path = path
        with readable(path), np.errstate(over="ignore", invalid="ignore"):  # of headers that are nonsense
            kind = _kind(path)
            parts = kind.filespec_to_file_map(path)
            file = Path(parts["image"].filename)
            with ImageOpener(str(parts.get("header", parts["image"]).filename)) as opened:
                raw = opened.read(kind.header_class.template_dtype.itemsize)
            header = kind.header_class(raw)  # which is checked
            self.shape: tuple[int, ...] = tuple(int(n) for n in header.get_data_shape())
            self.dtype: np.dtype = header.get_data_dtype()
            _check_real(path, self.dtype)
            offset, (slope, inter) = header.get_data_offset(), header.get_slope_inter()
            _check_promise(path, file, self.shape, self.dtype, offset)
            # An Analyze header names no axes, nor does a NIfTI header without codes, or an MGH one without its flag;
            # nibabel would only assume them.
            nifti, analyze = kind in _NIFTI, kind in _ANALYZE
            flagless = kind is nib.MGHImage and not any(raw[_RAS_FLAG])
            assumed = analyze or flagless or (nifti and header["qform_code"] == 0 and header["sform_code"] == 0)
            affine = np.asarray(header.get_best_affine(), np.float64)
            oriented = np.isfinite(affine).all() and not np.isnan(nib.io_orientation(affine)).any()
            self.affine: np.ndarray | None = affine if oriented and not assumed else None
            if analyze or (nifti and header["sform_code"] == 0):
                # as it is in the file: nibabel, which checks headers, has replaced zeros by ones
                stored = kind.header_class(raw, check=False)
                zooms = np.abs(stored["pixdim"][1:4].astype(np.float64))
            else:
                zooms = voxel_sizes(affine) * (0 if flagless else 1)
            if nifti:
                zooms = zooms * _MM.get(int(header["xyzt_units"]) & 7, 1.0)  # above those three bits, the unit of time
            self.zooms: np.ndarray | None = zooms if ((zooms >= MM[0]) & (zooms <= MM[1])).all() else None
            # igzip takes two thirds of the time of nibabel's own. Not memory-mapped: a file that is cut short while it
            # is mapped kills the process with SIGBUS.
            content = igzip.open(file) if file.name.lower().endswith("gz") else str(file)
            scale = (1.0 if slope is None else slope, 0.0 if inter is None else inter)
            self._data = ArrayProxy(content, (self.shape, self.dtype, offset, *scale), mmap=False, keep_file_open=True)

    def read(self, frames: slice | int) -> np.ndarray:
        _check_count(self._path, self.shape, frames)
        behind = len(self.shape) - 4
        with readable(self._path):
            index = (*(slice(None),) * 3, frames, *(0,) * behind)[: len(self.shape)]
            return np.asarray(self._data[index])


def _kind(path: Path) -> Any:
    """nibabel's class for a file, going by its name and the beginning of its header."""
    source_files(path)  # which refuses a pipe, in either half of a pair
    sniffed = None
    for kind in nib.all_image_classes:
        found, sniffed = kind.path_maybe_image(path, sniffed)
        if found and kind in _KINDS:
            return kind
        if found:
            raise DataError(f"{path}: {kind.__name__}; expected a NIfTI, Analyze or MGH file")
    raise ImageFileError("no header of a NIfTI, Analyze or MGH file")


class _Arrays:
    affine: np.ndarray | None = None
    zooms: np.ndarray | None = None

    def __init__(self, files: list[Path], run: bool = False):
        self._files = files
        self._first = _array(files[0])  # says the shape, so it is read in any case
        self.shape: tuple[int, ...] = (*self._first.shape, len(files)) if run else self._first.shape
        self.dtype: np.dtype = self._first.dtype

    def read(self, frames: slice | int) -> np.ndarray:
        _check_count(self._files[0], self.shape, frames)
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
        _size(file)
        array = _tensor(file) if file.suffix == ".pt" else _load(file)
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


def _load(file: Path) -> Any:
    """As np.load, but for a header that promises more than the file holds."""
    with file.open("rb") as content:
        if content.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
            content.seek(0)
            read_header = read_array_header_1_0 if read_magic(content) == (1, 0) else read_array_header_2_0
            shape, _, dtype = read_header(content)
            _check_promise(file, file, shape, dtype, content.tell())
        content.seek(0)
        return np.load(content, allow_pickle=False)


def _tensor(file: Path) -> np.ndarray:
    try:
        from convert.torch_model import read_tensor
    except ImportError:
        remedy = "pip install 'umbrella-jax[torch]', or save it as .npy"
        raise DataError(f"{file}: needs PyTorch to be read; {remedy}") from None
    return read_tensor(file)
