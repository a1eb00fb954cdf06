"""Open volumes of every format through one small interface: shape, affine, voxel sizes and selected frames.

This is the first step from a file to an array. `open_voxels` knows formats and headers and nothing of the model;
`umbrella_jax.data.volume` calls it and makes the array that the model takes.

Formats:

- NIfTI-1 and 2 (`.nii`, `.nii.gz`, `.hdr`/`.img`), Analyze pairs, `.mgz` and `.mgh`, read by nibabel, with scaled
  values.
- A `.npy` array or `.pt` tensor with one volume: (D, H, W), (1, D, H, W) or (D, H, W, 1).
- A directory of such volumes named `frame_0`, `frame_1`, … `.npy` or `.pt`: a run. Other files in it are ignored, such
  as the `global_stats.pt` of the original system.

Nothing in a file is ever executed: arrays are read without pickles, tensors with `weights_only`. A header is checked
against the size of its file before memory is allocated. NIfTI extensions and the `.mat` file of an Analyze pair are not
read.

A header may contradict itself. A field that NIfTI does not allow is an error if the voxels depend on it. If another
field holds the same information, that field is used, and `Voxels.remarks` reports it.
"""

import gzip
import logging
import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from numpy.lib.format import MAGIC_PREFIX, read_array_header_1_0, read_array_header_2_0, read_magic

from umbrella_jax.config.schema import MAX_VOXELS, MM
from umbrella_jax.data.deadline import ReadingTimeoutError, check_deadline
from umbrella_jax.errors import DataError, is_out_of_memory
from umbrella_jax.io.reading import describe_pointer

UNPACKED = 256 << 20
"""Bytes that any compressed file may unpack to, whatever its own size: a volume of 320³ in float64."""
RATIO = 100
"""Largest compression ratio of a file that unpacks to more than `UNPACKED`. Noisy scans compress by 2 to 10, masks by
100, and a bomb of zeros by 1000, the most that gzip reaches."""
_NIFTI = (nib.Nifti1Pair, nib.Nifti1Image, nib.Nifti2Pair, nib.Nifti2Image)
_ANALYZE = (nib.Spm2AnalyzeImage, nib.Spm99AnalyzeImage, nib.AnalyzeImage)
_KINDS = (*_NIFTI, *_ANALYZE, nib.MGHImage)
_ARRAYS = (".npy", ".pt")
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Millimetres per unit of length, by NIfTI's codes: unknown (taken as mm), metre, mm, micron."""
_SECONDS = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}
"""Seconds per unit of time, by NIfTI's codes: unknown (taken as s), second, millisecond, microsecond."""
_SIZES_DIFFER = 0.01
"""Relative difference beyond which two voxel sizes of one header contradict each other."""
_SIDES = {"L": "left and right", "R": "left and right", "P": "front and back", "A": "front and back"}
_SIDES |= {"I": "top and bottom", "S": "top and bottom"}
_GEOMETRY: tuple[str, ...] = (
    "pixdim",
    "xyzt_units",
    "qform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
)
_GEOMETRY += ("qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z")
"""Fields of a NIfTI header with the position and size of its voxels and the time between frames."""
_PACKINGS = {".gz": "gzip", ".mgz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}
_MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
_CHUNK = 1 << 20
_SNIFFED = 1024
"""Bytes of a header by which nibabel tells formats apart."""
_SILENT = logging.Logger("nibabel", logging.CRITICAL + 1)
"""Replaces nibabel's logger, whose messages name no file. `Voxels.remarks` reports what matters."""
_RAS_FLAG = slice(28, 30)
"""Bytes of the `goodRASFlag` in an MGH header: 0 if its voxel sizes and axes are meaningless."""
_SINGLE = (".nii", ".nii.gz", ".mgz", ".mgh", *_ARRAYS)
_FRAME = re.compile(r"frame_([0-9]+)\.(npy|pt)")


class Voxels(Protocol):
    """An opened file or directory. Only the requested frames are read."""

    shape: tuple[int, ...]
    """As stored: (D, H, W), (D, H, W, T), or with more axes."""
    dtype: np.dtype
    """As stored; for a directory of frames, the type of the first one."""
    affine: np.ndarray | None
    """(4, 4), voxel indices to RAS+ coordinates; None if the orientation is unknown."""
    zooms: np.ndarray | None
    """(3,), mm from voxel to voxel along each stored axis; None if unknown."""
    why_no_affine: str
    """Reason for `affine` being None."""
    why_no_zooms: str
    """Reason for `zooms` being None."""
    remarks: list[str]
    """Contradictions in the header, each with the value that was used; complete after `check_end`."""
    files: Sequence[Path]
    """Its files, as `source_files` lists them."""
    files_read: set[int]
    """Indices of the files that were read so far."""
    has_time_unit: bool
    """Whether the file states the unit of `read_tr`."""

    def read(self, frames: slice | int) -> np.ndarray:
        """Read frames: (D, H, W, n) for a slice, (D, H, W) for one index.

        A volume without a frame axis is read whole. Of axes after the frames, the first entry is taken.

        Returns:
            Real numbers in the type of the file, or floats if the file scales its values.
        """

    def check_end(self) -> None:
        """Read the rest: each compressed file up to the checksum at its end, and frames that were not read.

        Raises DataError for a damaged file. Voxels that were read before may then be wrong.
        """

    def read_tr(self) -> float | None:
        """Return the seconds from frame to frame that the file states; None if it states none."""


def open_voxels(path: str | Path, content: bytes | None = None) -> Voxels:
    """Open a directory of frames, or a file by its suffix.

    Args:
        content: of a single file, if it was read before; the file is then not opened again. For formats that cannot use
            it, it is ignored.

    Raises DataError if the path is missing or unreadable, the voxels are not real numbers, the header promises more
    than the file can hold, or frames are missing.
    """
    path = Path(path)
    if _is_directory(path):
        return _Arrays(_frames(path), run=True)
    return _Arrays([path]) if path.suffix in _ARRAYS else _Nibabel(path, content)


def map_header(scan: Voxels) -> nib.Nifti1Header:
    """Return a NIfTI header with a scan's geometry, for a map over its voxels; version 2 for a NIfTI-2 scan.

    The fields of a NIfTI scan are copied even if they contradict each other, so that viewers place map and scan alike.
    """
    if isinstance(scan, _Nibabel) and scan.kind in _NIFTI:
        header = (nib.Nifti2Header if scan.kind in (nib.Nifti2Image, nib.Nifti2Pair) else nib.Nifti1Header)()
        for field in _GEOMETRY:
            header[field] = scan.stored[field]
        return header
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm", "sec")
    if scan.zooms is not None:
        header["pixdim"][1:4] = scan.zooms
    if scan.affine is not None:
        header.set_qform(scan.affine, "scanner")
        header.set_sform(scan.affine, "scanner")
    if isinstance(scan, _Nibabel) and scan.kind is nib.MGHImage:
        header["pixdim"][4] = scan.read_tr() or 0
    return header


def _is_directory(path: Path) -> bool:
    with readable(path):  # the name may be too long for a file system
        return path.is_dir()


def source_files(path: Path) -> list[Path]:
    """Return all files that `open_voxels` may read, in a fixed order: one file, both of a pair, or the frames of a run.

    Does not open any. Raises DataError, as `open_voxels` does, for a path that is not a file, and for missing frames.
    """
    if _is_directory(path):
        return _frames(path)
    files = {path}
    if not path.name.endswith(_SINGLE):
        for kind in _KINDS:
            with suppress(ImageFileError):  # not a name of this kind
                files |= _pair(kind, path)
    existing = sorted(file for file in files if file == path or file.exists())
    with readable(path):
        for file in existing:
            _size(file)
    return existing


def _pair(kind: Any, path: Path) -> set[Path]:
    """Return the files to read for an image of this class: one with header and voxels, or one for each."""
    parts = kind.filespec_to_file_map(path)
    return {Path(parts[part].filename) for part in ("header", "image") if part in parts}


@contextmanager
def readable(path: Path, expected: str = "a whole volume, copy it again") -> Iterator[None]:
    """Turn any error of the block into a DataError, because readers of damaged files raise nearly anything."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        if pointer := describe_pointer(path):
            raise DataError(f"{path}: {pointer}") from None
        missing = path if error.filename is None else error.filename  # of a pair, the half that is missing
        if os.path.islink(missing):
            raise DataError(f"{path}: a link to {os.readlink(missing)}, which does not exist; copy it there") from None
        raise DataError(
            f"{path}: {'' if str(missing) == str(path) else f'{missing} '}not found; expected a volume or a directory "
            "of frames (relative paths start at the conversation file, or at data.image_root: --image-root DIR)"
        ) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if pointer := describe_pointer(path):
            raise DataError(f"{path}: {pointer}") from None
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, OSError) and error.strerror:  # str(error) would name the file again
            reason = error.strerror
        if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in reason:  # the beginning of the file is gzip
            reason = "other bytes follow the end of its gzip data"
        if isinstance(error, HeaderDataError):
            expected = "another header: correct it, or copy the file again"
        raise DataError(f"{path}: cannot be read: {reason}; expected {expected}") from None


def _check_real(path: Path, dtype: np.dtype) -> None:
    """Raise DataError unless a type holds real numbers."""
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {dtype}; expected real numbers")


def _size(file: Path) -> int:
    """Return the bytes of a file. Raise FileNotFoundError, or DataError for a pipe, which would block, and the like."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file}: a directory, pipe or device; expected a file")
    return status.st_size


def _check_promise(path: Path, file: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int = 0) -> None:
    """Raise DataError if `file` cannot hold the voxels that its header promises."""
    size, promised = _size(file), offset + math.prod(shape) * dtype.itemsize
    promise = f"{path}: its header promises {' × '.join(map(str, shape))} voxels of {dtype}"
    if min(shape, default=0) < 0 or offset < 0:
        raise DataError(f"{promise} from byte {offset}; expected a whole volume, copy it again")
    packed = file.suffix.lower() in ImageOpener.compress_ext_map
    if not packed and promised > size:
        raise DataError(f"{promise}, {promised} bytes, but {file} has {size}; expected a whole volume, copy it again")
    if packed and promised > max(UNPACKED, RATIO * size):
        raise DataError(
            f"{promise}, {promised} bytes, from {size} compressed ones; expected no more than {RATIO} times as many, "
            "as for any scan: copy it again, or if it is almost empty, decompress it"
        )


def _check_count(path: Path, shape: tuple[int, ...], frames: slice | int) -> None:
    """Raise DataError if `frames` hold more than MAX_VOXELS voxels."""
    length = shape[3] if len(shape) > 3 else 1
    count = math.prod(shape[:3]) * (1 if isinstance(frames, int) else len(range(length)[frames]))
    if count > MAX_VOXELS:
        raise DataError(f"{path}: {count} voxels to be read at once; expected at most {MAX_VOXELS}, resample it")


@dataclass(frozen=True)
class _Geometry:
    """Position and size of a header's voxels; fields as in `Voxels`."""

    affine: np.ndarray | None = None
    zooms: np.ndarray | None = None
    why_no_affine: str = ""
    why_no_zooms: str = ""
    remarks: tuple[str, ...] = ()


class _Nibabel:
    """A file that is read through nibabel's headers and array proxy.

    `nibabel.load` would also read extensions of any length, the `.mat` of an Analyze pair and the tags of an `.mgz`.
    """

    def __init__(self, path: Path, content: bytes | None = None):
        self._path = path
        self._faults: tuple[str, ...] = ()
        with readable(path), np.errstate(over="ignore", invalid="ignore"):  # damaged headers overflow
            self.files: Sequence[Path] = source_files(path)
            self.files_read = set(range(len(self.files)))
            if len(self.files) > 1 or _packing(path) not in (None, "gzip"):
                content = None
            head = None if content is None else _head(path, content)
            content = None if head is None else content  # reading it again finds what is wrong
            self.kind = kind = _kind(path, self.files, content, head)
            parts = kind.filespec_to_file_map(path)
            self._file = file = Path(parts["image"].filename)
            self._header_file = Path(parts.get("header", parts["image"]).filename)
            raw = self._read_header(kind.header_class.template_dtype.itemsize, head)
            self.stored = stored = kind.header_class(raw, check=False)
            self.has_time_unit = kind not in _NIFTI or int(stored["xyzt_units"]) & 0x38 in (8, 16, 24)
            offset = _data_offset(path, kind, stored)
            header = kind.header_class(raw, check=False)
            header.check_fix(logger=_SILENT)  # replaces zero sizes by 1 and unknown codes by 0
            self.shape: tuple[int, ...] = tuple(int(n) for n in header.get_data_shape())
            self.dtype: np.dtype = header.get_data_dtype()
            _check_real(path, self.dtype)
            slope, inter = header.get_slope_inter()
            _check_promise(path, file, self.shape, self.dtype, offset)
            self._end = offset + math.prod(self.shape) * self.dtype.itemsize
            if kind in _NIFTI:
                geometry = _nifti_geometry(header, stored)
            elif kind in _ANALYZE:
                pixdim = np.abs(stored["pixdim"][1:4].astype(np.float64))
                geometry = _Geometry(None, pixdim, "Analyze headers do not hold one")
            elif any(raw[_RAS_FLAG]):
                geometry = _mgh_geometry(np.asarray(header.get_affine(), np.float64))
            else:
                geometry = _Geometry(None, None, "its goodRASFlag is 0", "its goodRASFlag is 0")
            self.affine, self.why_no_affine = geometry.affine, geometry.why_no_affine
            self.zooms, self.why_no_zooms = _plausible_zooms(geometry)
            self.remarks = [*_field_remarks(kind, stored, offset, self.dtype), *geometry.remarks]
            # igzip takes two thirds of the time of nibabel's own reader. The file is not memory-mapped, because a
            # mapped file that is cut short kills the process with SIGBUS.
            self._content: Any = _unpacked(file, content) if _packing(file) else str(file)
            if content is not None and not _packing(file):
                self._content = BytesIO(content)
            scale = (1.0 if slope is None else slope, 0.0 if inter is None else inter)
            spec = (self.shape, self.dtype, offset, *scale)
            self._data = ArrayProxy(self._content, spec, mmap=False, keep_file_open=True)

    def _read_header(self, size: int, head: bytes | None) -> bytes:
        """Return the first bytes of the header's file, decompressed, which `head` begins with."""
        if head is not None:
            return head[:size]
        with ImageOpener(str(self._header_file)) as opened:
            return bytes(opened.read(size))

    def read(self, frames: slice | int) -> np.ndarray:
        _check_count(self._path, self.shape, frames)
        further_axes = len(self.shape) - 4
        index = (*(slice(None),) * 3, frames, *(0,) * further_axes)[: len(self.shape)]
        try:
            with readable(self._path):
                check_deadline(self._path)
                return np.asarray(self._data[index])
        except ReadingTimeoutError:  # the file may be good
            raise
        except DataError as error:
            self._faults = error.faults
            raise

    def check_end(self) -> None:
        if self._faults:  # after an error, the rest of a stream is meaningless
            raise DataError(self._faults)
        with readable(self._path):
            if self._header_file != self._file and _packing(self._header_file):
                with _unpacked(self._header_file) as content:
                    _read_to_end(self._header_file, content)
            size = _read_to_end(self._file, self._content) if _packing(self._file) else _size(self._file)
        volume = math.prod(self.shape[:3]) * self.dtype.itemsize
        more = (size - self._end) // max(volume, 1)
        if self.kind is not nib.MGHImage and more > 0:  # in an MGH file, tags follow the voxels
            remark = (
                f"room for {more} more volumes follows its voxels: dim in its header may be wrong; it is used as it is"
            )
            if remark not in self.remarks:
                self.remarks.append(remark)

    def read_tr(self) -> float | None:
        if self.kind in _NIFTI:
            tr = float(self.stored["pixdim"][4]) * _SECONDS.get(int(self.stored["xyzt_units"]) & 0x38, 1.0)
        elif self.kind is nib.MGHImage:  # after the voxels, in milliseconds
            with readable(self._path), ImageOpener(str(self._file)) as content:
                content.seek(self._end)
                footer = content.read(4)
            tr = struct.unpack(">f", footer)[0] / 1000 if len(footer) == 4 else 0.0
        else:
            return None
        return tr if math.isfinite(tr) and tr > 0 else None


def _data_offset(path: Path, kind: Any, stored: Any) -> int:
    """Return the byte of the first voxel. Raise DataError if `vox_offset` is not an integer or is inside the header."""
    if kind not in _NIFTI:
        return int(stored.get_data_offset())
    _check_axes(path, kind, stored)
    offset, first = float(stored["vox_offset"]), kind.header_class.sizeof_hdr + 4
    single = kind in (nib.Nifti1Image, nib.Nifti2Image)
    if not offset.is_integer():
        raise DataError(f"{path}: vox_offset: expected a whole number, got {offset:g}; correct the header")
    if single and 0 != offset < first:
        raise DataError(
            f"{path}: vox_offset: {offset:.0f} is within the header, which ends at byte {first}; correct the header"
        )
    return int(offset) if offset or not single else first


def _check_axes(path: Path, kind: Any, stored: Any) -> None:
    """Raise DataError for an impossible number of axes: nibabel then swaps the bytes and misreads every field."""
    axes = stored["dim"][0]
    if int(stored["sizeof_hdr"].byteswap()) == kind.header_class.sizeof_hdr:
        axes = axes.byteswap()
    if not 0 <= int(axes) <= 7:
        raise DataError(f"{path}: dim[0], its number of axes, is {axes}; NIfTI has 1 to 7: correct the header")


def _field_remarks(kind: Any, stored: Any, offset: int, dtype: np.dtype) -> Iterator[str]:
    """Yield a remark for each field, geometry aside, that contradicts another one or the standard."""
    if kind in _NIFTI and offset and not stored["vox_offset"]:
        yield f"vox_offset is 0; voxels are read from byte {offset}"
    if kind in (*_NIFTI, *_ANALYZE) and (bits := int(stored["bitpix"])) != dtype.itemsize * 8:
        yield f"bitpix is {bits}, but datatype is {dtype.name}; datatype is used"
    if kind in _NIFTI and np.isinf(stored["scl_slope"]):
        yield "scl_slope is infinite; voxels are read without scaling"


def _nifti_geometry(header: Any, stored: Any) -> _Geometry:
    """Return the geometry of a NIfTI header, from the sform if it is valid, else from the qform.

    Args:
        header: as nibabel repaired it.
        stored: as it is in the file.
    """
    forms, invalid = dict[str, np.ndarray](), dict[str, str]()
    names = {name: f"{name} (code {int(stored[f'{name}_code'])})" for name in ("sform", "qform")}
    for name in names:
        code = int(stored[f"{name}_code"])
        if code == 0:
            continue
        if code not in nib.nifti1.xform_codes.value_set():
            invalid[name] = f"{name}_code is {code}, which NIfTI does not define"
            continue
        try:
            form = np.asarray(header.get_sform() if name == "sform" else header.get_qform(), np.float64)
        except ValueError:  # the quaternion is longer than 1
            invalid[name] = f"the quaternion of its {names[name]} is not a rotation"
            continue
        if not np.isfinite(form).all():
            invalid[name] = f"its {names[name]} holds NaN or infinity"
        elif np.isnan(nib.io_orientation(form)).any():
            invalid[name] = f"its {names[name]} is singular"
        elif name == "qform" and stored["pixdim"][0] not in (-1, 0, 1):
            # nibabel replaces it by 1, NIfTI's own library by its sign, so left and right may be swapped
            invalid[name] = f"pixdim[0], which its {names[name]} needs, is {stored['pixdim'][0]:g}, neither 1 nor -1"
        else:
            forms[name] = form
    remarks = []
    pixdim = np.abs(stored["pixdim"][1:4].astype(np.float64))
    zooms = voxel_sizes(forms["sform"]) if "sform" in forms else pixdim
    used = next(iter(forms), None)
    if used is None:
        unoriented = "; ".join(invalid.values()) or "its qform_code and sform_code are 0"
        remarks += [f"{fault}; voxel sizes are those of pixdim" for fault in invalid.values()]
    else:
        codes = {name: "".join(nib.aff2axcodes(form)) for name, form in forms.items()}
        remarks += [f"{fault}; its {names[used]}, {codes[used]}, is used" for fault in invalid.values()]
        if len(set(codes.values())) > 1 and _point_apart(*forms.values()):
            remarks.append(
                f"its {names['qform']} says {codes['qform']}, its {names['sform']} says {codes['sform']}: they "
                f"disagree about {_disagreement(*codes.values())}; the sform is used"
            )
    if "sform" in forms and (pixdim > 0).all() and not np.allclose(pixdim, zooms, rtol=_SIZES_DIFFER, atol=0):
        remarks.append(f"pixdim says voxels of {_times(pixdim)}, its sform {_times(zooms)}; the sform is used")
    unit = int(stored["xyzt_units"]) & 7  # above those three bits, the unit of time
    if unit not in _MM:
        remarks.append(f"xyzt_units has the unit of length {unit}, which NIfTI does not define; mm is used")
    mm = zooms * _MM.get(unit, 1.0)
    if used is None:
        return _Geometry(None, mm, unoriented, remarks=tuple(remarks))
    return _Geometry(forms[used], mm, remarks=tuple(remarks))


def _point_apart(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether some axis of two forms differs by more than 60°.

    Smaller angles can also change the axis codes: near 45°, rounding decides the code of an oblique axis.
    """
    cosines = (one * other)[:3, :3].sum(axis=0) / (voxel_sizes(one) * voxel_sizes(other))
    return bool(cosines.min() < 0.5)


def _disagreement(one: str, other: str) -> str:
    """Describe the difference between two orientations, such as LAS and RAS."""
    if any(_SIDES[a] != _SIDES[b] for a, b in zip(one, other, strict=True)):
        return "the order of axes"
    return " and about ".join(_SIDES[a] for a, b in zip(one, other, strict=True) if a != b)


def _mgh_geometry(affine: np.ndarray) -> _Geometry:
    if not np.isfinite(affine).all() or np.isnan(nib.io_orientation(affine)).any():
        return _Geometry(None, voxel_sizes(affine), "its direction cosines or voxel sizes are singular or not finite")
    return _Geometry(affine, voxel_sizes(affine))


def _plausible_zooms(geometry: _Geometry) -> tuple[np.ndarray | None, str]:
    """Return (voxel sizes, ""), or (None, reason) if they are unknown or implausible."""
    zooms = geometry.zooms
    if zooms is None or ((zooms >= MM[0]) & (zooms <= MM[1])).all():
        return zooms, geometry.why_no_zooms
    return None, f"its header says {_times(zooms)} mm, which is not from {MM[0]:g} to {MM[1]:g}"


def _times(numbers: np.ndarray) -> str:
    return " × ".join(f"{number:.4g}" for number in numbers)


def _packing(file: Path) -> str | None:
    """Return the compression that a file's name implies; None for none."""
    return _PACKINGS.get(file.suffix.lower())


def _unpacked(file: Path, content: bytes | None = None) -> Any:
    """Open a compressed file, or its content, as a stream of its decompressed content."""
    if _packing(file) == "gzip":
        return igzip.IGzipFile(str(file), "rb", fileobj=None if content is None else BytesIO(content))
    return ImageOpener(str(file))


def _head(file: Path, content: bytes) -> bytes | None:
    """Return the first bytes of a file's decompressed content, as many as nibabel looks at; None if it is damaged."""
    if _packing(file) is None:
        return content[:_SNIFFED]
    with suppress(Exception), _unpacked(file, content) as unpacked:
        return bytes(unpacked.read(_SNIFFED))
    return None


def _read_to_end(file: Path, content: Any) -> int:
    """Read the rest of a compressed file, whose checksum is at its end. Return its decompressed size in bytes."""
    limit, buffer = max(UNPACKED, RATIO * _size(file)), bytearray(_CHUNK)
    while content.readinto(buffer):
        check_deadline(file)
        if content.tell() > limit:
            raise DataError(
                f"{file}: unpacks to more than {limit} bytes; copy it again, or if it is almost empty, decompress it"
            )
    return int(content.tell())


def _check_name(file: Path, whole: bytes | None) -> None:
    """Raise DataError if a file's compression does not match its name, or if the file is not a scan at all.

    Args:
        whole: its bytes, if they were read before.
    """
    if whole is None:
        with file.open("rb") as opened:
            head = opened.read(600)
    else:
        head = whole[:600]
    named = _packing(file)
    content = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), None)
    if not head:
        raise DataError(f"{file}: cannot be read: it is empty; copy it again")
    if named == content and named:
        return
    if pointer := describe_pointer(file):
        raise DataError(f"{file}: {pointer}")
    if named == content:
        return
    known = content or any(kind.header_class.may_contain_header(head) for kind in (nib.Nifti1Image, nib.Nifti2Image))
    if not known and not head.startswith(b"\0\0\0\1"):  # MGH's version
        raise DataError(f"{file}: cannot be read: its name says {named}, its content is something else; copy it again")
    stem = file.name.removesuffix(file.suffix) if named else file.name
    plain = f"{stem}.mgh" if file.suffix.lower() == ".mgz" else stem
    suffix = next((suffix for suffix, name in _PACKINGS.items() if name == content), "")
    right = f"{stem.removesuffix('.mgh')}.mgz" if plain.endswith(".mgh") and content == "gzip" else plain + suffix
    says = f"{named}-compressed" if named else "not compressed"
    raise DataError(
        f"{file}: cannot be read: by its name it is {says}, by its content {content or 'not compressed'}; rename it to "
        f"{right}"
    )


def _kind(path: Path, files: Sequence[Path], content: bytes | None, head: bytes | None) -> Any:
    """Return nibabel's class for a file, by its name and the beginning of its header.

    Args:
        content: of the only file, if it was read before.
        head: its first bytes, decompressed.
    """
    for file in files:
        if not (file.suffix == ".img" and len(files) > 1):  # a file of voxels may begin with any bytes
            _check_name(file, content)
    sniffed = None if head is None else (head, str(path))
    for kind in nib.all_image_classes:
        matches, sniffed = kind.path_maybe_image(path, sniffed)
        if matches and kind in _KINDS:
            return kind
        if matches:
            raise DataError(f"{path}: {kind.__name__}; expected a NIfTI, Analyze or MGH file")
    raise _no_scan(path, files)


def _no_scan(path: Path, files: Sequence[Path]) -> Exception:
    """Return the error for files without a known header: another format, damage, or half of a pair."""
    for file in files:
        with file.open("rb") as opened:
            if opened.read(132).endswith(b"DICM"):
                return DataError(f"{path}: a DICOM file; convert its series to NIfTI, such as by dcm2niix")
        if _packing(file):
            with _unpacked(file) as content:  # raises if it is damaged
                _read_to_end(file, content)
    with suppress(ImageFileError):  # the name cannot belong to a pair
        if missing := sorted(_pair(nib.Nifti1Pair, path) - set(files)):
            return DataError(f"{path}: {missing[0]} not found; expected both files of the pair, copy it there")
    return ImageFileError("no header of a NIfTI, Analyze or MGH file")


class _Arrays:
    """One array file, or a directory of array files that are the frames of a run."""

    affine: np.ndarray | None = None
    zooms: np.ndarray | None = None
    why_no_affine = why_no_zooms = ".npy and .pt arrays do not hold one"
    has_time_unit = False

    def __init__(self, files: list[Path], run: bool = False):
        self.files: Sequence[Path] = files
        self.files_read = {0}
        self.remarks: list[str] = []
        self._first = _array(files[0])  # needed for the shape
        self.shape: tuple[int, ...] = (*self._first.shape, len(files)) if run else self._first.shape
        self.dtype: np.dtype = self._first.dtype

    def read(self, frames: slice | int) -> np.ndarray:
        _check_count(self.files[0], self.shape, frames)
        if isinstance(frames, int):
            return self._volume(frames)
        return np.stack([self._volume(frame) for frame in range(len(self.files))[frames]], axis=-1)

    def check_end(self) -> None:
        for frame, file in enumerate(self.files):
            if frame not in self.files_read:
                self._volume(frame)
            if file.suffix == ".pt":
                _check_zip(file)

    def read_tr(self) -> None:
        return None

    def _volume(self, frame: int) -> np.ndarray:
        file = self.files[frame]
        check_deadline(file)
        volume = _array(file) if frame else self._first
        self.files_read.add(frame)
        if volume.shape != self.shape[:3]:
            raise DataError(f"{file}: shape {volume.shape}; expected {self.shape[:3]}, as {self.files[0].name} has it")
        return volume


def _check_zip(file: Path) -> None:
    """Check the checksums of a PyTorch file, a zip archive, which PyTorch does not check itself."""
    with readable(file, "one array of numbers; save it again"):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise DataError(f"{file}: damaged: the checksum of {damaged} in it is wrong; copy it again")


def _frames(directory: Path) -> list[Path]:
    """Return the frames of a directory in order. Raise DataError unless their numbers are 0, 1, 2, …, each once."""
    numbers: dict[int, list[Path]] = {}
    faults = []
    with readable(directory):
        files = sorted(directory.iterdir())
    for file in files:
        if match := _FRAME.fullmatch(file.name):
            numbers.setdefault(int(match[1]), []).append(file)
        elif file.name.startswith("frame_"):
            faults.append(f"{file}: expected frame_N.pt or frame_N.npy with a number N")
    faults += [
        f"{directory}: {', '.join(file.name for file in same)} are all frame {n}; expected one file for each frame"
        for n, same in numbers.items()
        if len(same) > 1
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
    """Read one volume (D, H, W) from an array file, in its stored type."""
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
    """Do what np.load does, but first check that the file can hold what its header promises."""
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
        from umbrella_jax.io.torch_files import read_tensor
    except ImportError:
        remedy = "pip install 'umbrella-jax[torch]', or save it as .npy"
        raise DataError(f"{file}: needs PyTorch to be read; {remedy}") from None
    return read_tensor(file)
