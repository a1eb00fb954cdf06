"""Voxels on disk, whatever holds them, behind one small interface: shape, affine, voxel sizes, and the frames that are
asked for.

- What nibabel knows: NIfTI-1 and 2 (`.nii`, `.nii.gz`, `.hdr`/`.img`), Analyze pairs, `.mgz`, `.mgh`; scaled values.
- A `.npy` array or `.pt` tensor: one volume (D, H, W), (1, D, H, W) or (D, H, W, 1).
- A directory of such volumes, `frame_0`, `frame_1`, … `.npy` or `.pt`: a run. Files of other names are not looked at,
  the `global_stats.pt` of the original system among them.

Nothing in a file is ever executed: arrays are read without pickles, tensors with `weights_only`. What a header
promises is compared with the file before anything is allocated for it. Extensions of a NIfTI are not read, nor is the
`.mat` beside an Analyze pair.

A header may contradict itself. A field that NIfTI does not allow is refused if the voxels depend on it. If another
field holds the same information, that one is used and `Voxels.remarks` says so.
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
from umbrella_jax.errors import DataError, is_out_of_memory
from umbrella_jax.io.reading import placeholder

UNPACKED = 256 << 20
"""Bytes that any compressed file may hold: a volume of 320³ in float64, whatever is in it."""
RATIO = 100
"""Beyond those, bytes for each of a compressed file's. Scans come to half or a tenth of their size, for they are noisy;
masks to a hundredth; a bomb, of zeros alone, to a thousandth, which is the least that gzip can."""
_NIFTI = (nib.Nifti1Pair, nib.Nifti1Image, nib.Nifti2Pair, nib.Nifti2Image)
_ANALYZE = (nib.Spm2AnalyzeImage, nib.Spm99AnalyzeImage, nib.AnalyzeImage)
_KINDS = (*_NIFTI, *_ANALYZE, nib.MGHImage)
_ARRAYS = (".npy", ".pt")
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Millimetres per unit of length, by NIfTI's codes: unknown (taken as mm), metre, mm, micron."""
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
"""Fields of a NIfTI header that say where its voxels are, how large, and how far apart in time."""
_PACKINGS = {".gz": "gzip", ".mgz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}
_MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
_CHUNK = 1 << 20
_SILENT = logging.Logger("nibabel", logging.CRITICAL + 1)
"""nibabel's own names no file; `Voxels.remarks` says what matters."""
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
    unoriented: str
    """Why `affine` is None."""
    unsized: str
    """Why `zooms` is None."""
    remarks: list[str]
    """Contradictions of its header, each with the reading that was taken; complete after `check_end`."""
    files: Sequence[Path]
    """Its files, as `source_files` lists them."""
    used: set[int]
    """Indices of the files that were read."""

    def read(self, frames: slice | int) -> np.ndarray:
        """(D, H, W, n) of n frames, (D, H, W) of one; of axes behind them the first entry, of 3 axes all.

        Real numbers in the type of the file, or a float where it scales them.
        """

    def check_end(self) -> None:
        """Read the rest of each compressed file, to the checksum at its end, and frames that were not read.

        Raises DataError for a damaged file: voxels that were read before may be wrong.
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


def map_header(scan: Voxels) -> nib.Nifti1Header:
    """Return a NIfTI header (of version 2 for a NIfTI-2 scan) with a scan's geometry, for a map over its voxels.

    A NIfTI scan's fields are copied as they are, even where they contradict each other: viewers then place both alike.
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
        header["pixdim"][4] = scan.read_mgh_tr() / 1000
    return header


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
        if pointer := placeholder(path):
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
        if pointer := placeholder(path):
            raise DataError(f"{path}: {pointer}") from None
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, OSError) and error.strerror:  # its text would name the file again
            reason = error.strerror
        if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in reason:  # its beginning is one
            reason = "other bytes follow the end of its gzip data"
        if isinstance(error, HeaderDataError):
            expected = "another header: correct it, or copy the file again"
        raise DataError(f"{path}: cannot be read: {reason}; expected {expected}") from None


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


@dataclass(frozen=True)
class _Geometry:
    """Places and sizes of a header's voxels; fields as in `Voxels`."""

    affine: np.ndarray | None = None
    zooms: np.ndarray | None = None
    unoriented: str = ""
    unsized: str = ""
    remarks: tuple[str, ...] = ()


class _Nibabel:
    """A file read through nibabel's headers and array proxy.

    `nibabel.load` would read more: extensions of any length, a `.mat` beside an Analyze pair, the tags of an `.mgz`."""

    def __init__(self, path: Path):
        self._path = path
        self._faults: tuple[str, ...] = ()
        with readable(path), np.errstate(over="ignore", invalid="ignore"):  # of headers that are nonsense
            self.files: Sequence[Path] = source_files(path)
            self.used = set(range(len(self.files)))
            self.kind = kind = _kind(path, self.files)
            parts = kind.filespec_to_file_map(path)
            self._file = file = Path(parts["image"].filename)
            self._header_file = Path(parts.get("header", parts["image"]).filename)
            with ImageOpener(str(self._header_file)) as opened:
                raw = opened.read(kind.header_class.template_dtype.itemsize)
            self.stored = stored = kind.header_class(raw, check=False)
            offset = _data_offset(path, kind, stored)
            header = kind.header_class(raw, check=False)
            header.check_fix(logger=_SILENT)  # zeros become ones, unknown codes 0
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
            self.affine, self.unoriented = geometry.affine, geometry.unoriented
            self.zooms, self.unsized = _possible(geometry)
            self.remarks = [*_field_remarks(kind, stored, offset, self.dtype), *geometry.remarks]
            # igzip takes two thirds of the time of nibabel's own. Not memory-mapped: a file that is cut short while it
            # is mapped kills the process with SIGBUS.
            self._content = _unpacked(file) if _packing(file) else str(file)
            scale = (1.0 if slope is None else slope, 0.0 if inter is None else inter)
            spec = (self.shape, self.dtype, offset, *scale)
            self._data = ArrayProxy(self._content, spec, mmap=False, keep_file_open=True)

    def read(self, frames: slice | int) -> np.ndarray:
        _check_count(self._path, self.shape, frames)
        behind = len(self.shape) - 4
        index = (*(slice(None),) * 3, frames, *(0,) * behind)[: len(self.shape)]
        try:
            with readable(self._path):
                return np.asarray(self._data[index])
        except DataError as error:
            self._faults = error.faults
            raise

    def check_end(self) -> None:
        if self._faults:  # of a stream that broke, the rest says nothing true
            raise DataError(self._faults)
        with readable(self._path):
            if self._header_file != self._file and _packing(self._header_file):
                with _unpacked(self._header_file) as content:
                    _read_to_end(self._header_file, content)
            size = _read_to_end(self._file, self._content) if _packing(self._file) else _size(self._file)
        volume = math.prod(self.shape[:3]) * self.dtype.itemsize
        more = (size - self._end) // max(volume, 1)
        if self.kind is not nib.MGHImage and more > 0:  # whose tags follow the voxels
            remark = (
                f"room for {more} more volumes follows its voxels: dim in its header may be wrong; it is used as it is"
            )
            if remark not in self.remarks:
                self.remarks.append(remark)

    def read_mgh_tr(self) -> float:
        """Return the milliseconds between frames, stored after the voxels of an MGH file; 0 if it has none."""
        with readable(self._path), ImageOpener(str(self._file)) as content:
            content.seek(self._end)
            footer = content.read(4)
        tr = struct.unpack(">f", footer)[0] if len(footer) == 4 else 0.0
        return tr if math.isfinite(tr) and tr > 0 else 0.0


def _data_offset(path: Path, kind: Any, stored: Any) -> int:
    """Byte of the first voxel. Raises DataError for a `vox_offset` that is none, or is within the header."""
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
    """Raise DataError for a number of axes that is none. nibabel then takes the bytes for swapped, and every field for
    another."""
    axes = stored["dim"][0]
    if int(stored["sizeof_hdr"].byteswap()) == kind.header_class.sizeof_hdr:
        axes = axes.byteswap()
    if not 0 <= int(axes) <= 7:
        raise DataError(f"{path}: dim[0], its number of axes, is {axes}; NIfTI has 1 to 7: correct the header")


def _field_remarks(kind: Any, stored: Any, offset: int, dtype: np.dtype) -> Iterator[str]:
    """Fields beside its geometry that contradict others or the standard."""
    if kind in _NIFTI and offset and not stored["vox_offset"]:
        yield f"vox_offset is 0; voxels are read from byte {offset}"
    if kind in (*_NIFTI, *_ANALYZE) and (bits := int(stored["bitpix"])) != dtype.itemsize * 8:
        yield f"bitpix is {bits}, but datatype is {dtype.name}; datatype is used"
    if kind in _NIFTI and np.isinf(stored["scl_slope"]):
        yield "scl_slope is infinite; voxels are read without scaling"


def _nifti_geometry(header: Any, stored: Any) -> _Geometry:
    """Return the geometry of a NIfTI header: by the sform if it is valid, else by the qform.

    Args:
        header: as nibabel mended it.
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
        except ValueError:  # of a quaternion longer than 1
            invalid[name] = f"the quaternion of its {names[name]} is no rotation"
            continue
        if not np.isfinite(form).all():
            invalid[name] = f"its {names[name]} holds NaN or infinity"
        elif np.isnan(nib.io_orientation(form)).any():
            invalid[name] = f"its {names[name]} is singular"
        elif name == "qform" and stored["pixdim"][0] not in (-1, 0, 1):
            # nibabel takes 1 for it, NIfTI's own library the sign: left may be right
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
    """Return whether an axis points more than 60° away from the same axis of the other form. If not, their codes only
    differ since it is oblique: at 45°, rounding decides."""
    cosines = (one * other)[:3, :3].sum(axis=0) / (voxel_sizes(one) * voxel_sizes(other))
    return bool(cosines.min() < 0.5)


def _disagreement(one: str, other: str) -> str:
    """Name the difference between two orientations, such as LAS and RAS."""
    if any(_SIDES[a] != _SIDES[b] for a, b in zip(one, other, strict=True)):
        return "the order of axes"
    return " and about ".join(_SIDES[a] for a, b in zip(one, other, strict=True) if a != b)


def _mgh_geometry(affine: np.ndarray) -> _Geometry:
    if not np.isfinite(affine).all() or np.isnan(nib.io_orientation(affine)).any():
        return _Geometry(None, voxel_sizes(affine), "its direction cosines or voxel sizes are singular or not finite")
    return _Geometry(affine, voxel_sizes(affine))


def _possible(geometry: _Geometry) -> tuple[np.ndarray | None, str]:
    """Voxel sizes if they are possible ones, and if not, why."""
    zooms = geometry.zooms
    if zooms is None or ((zooms >= MM[0]) & (zooms <= MM[1])).all():
        return zooms, geometry.unsized
    return None, f"its header says {_times(zooms)} mm, which is not from {MM[0]:g} to {MM[1]:g}"


def _times(numbers: np.ndarray) -> str:
    return " × ".join(f"{number:.4g}" for number in numbers)


def _packing(file: Path) -> str | None:
    """How a file is compressed, by its name."""
    return _PACKINGS.get(file.suffix.lower())


def _unpacked(file: Path) -> Any:
    """The content of a compressed file, as a stream."""
    return igzip.open(file) if _packing(file) == "gzip" else ImageOpener(str(file))


def _read_to_end(file: Path, content: Any) -> int:
    """Read the rest of a compressed file, whose checksum is behind it. Returns how many bytes it unpacks to."""
    limit, buffer = max(UNPACKED, RATIO * _size(file)), bytearray(_CHUNK)
    while content.readinto(buffer):
        if content.tell() > limit:
            raise DataError(
                f"{file}: unpacks to more than {limit} bytes; copy it again, or if it is so empty, unpack it"
            )
    return int(content.tell())


def _check_name(file: Path) -> None:
    """Raises DataError for a file that is compressed otherwise than its name says, or is no scan at all."""
    with file.open("rb") as opened:
        head = opened.read(600)
    named = _packing(file)
    content = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), None)
    if not head:
        raise DataError(f"{file}: cannot be read: it is empty; copy it again")
    if pointer := placeholder(file):
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


def _kind(path: Path, files: Sequence[Path]) -> Any:
    """nibabel's class for a file, going by its name and the beginning of its header."""
    for file in files:
        if not (file.suffix == ".img" and len(files) > 1):  # voxels alone, which begin with any bytes
            _check_name(file)
    sniffed = None
    for kind in nib.all_image_classes:
        found, sniffed = kind.path_maybe_image(path, sniffed)
        if found and kind in _KINDS:
            return kind
        if found:
            raise DataError(f"{path}: {kind.__name__}; expected a NIfTI, Analyze or MGH file")
    raise _no_scan(path, files)


def _no_scan(path: Path, files: Sequence[Path]) -> Exception:
    """Return why files have no header that is known: of another format, damaged, or half of a pair."""
    for file in files:
        with file.open("rb") as opened:
            if opened.read(132).endswith(b"DICM"):
                return DataError(f"{path}: a DICOM file; convert its series to NIfTI, such as by dcm2niix")
        if _packing(file):
            with _unpacked(file) as content:  # raises if it is damaged
                _read_to_end(file, content)
    with suppress(ImageFileError):  # not a name of a pair
        if missing := sorted(_pair(nib.Nifti1Pair, path) - set(files)):
            return DataError(f"{path}: {missing[0]} not found; expected both files of the pair, copy it there")
    return ImageFileError("no header of a NIfTI, Analyze or MGH file")


class _Arrays:
    affine: np.ndarray | None = None
    zooms: np.ndarray | None = None
    unoriented = unsized = ".npy and .pt arrays do not hold one"

    def __init__(self, files: list[Path], run: bool = False):
        self.files: Sequence[Path] = files
        self.used = {0}
        self.remarks: list[str] = []
        self._first = _array(files[0])  # says the shape, so it is read in any case
        self.shape: tuple[int, ...] = (*self._first.shape, len(files)) if run else self._first.shape
        self.dtype: np.dtype = self._first.dtype

    def read(self, frames: slice | int) -> np.ndarray:
        _check_count(self.files[0], self.shape, frames)
        if isinstance(frames, int):
            return self._volume(frames)
        return np.stack([self._volume(frame) for frame in range(len(self.files))[frames]], axis=-1)

    def check_end(self) -> None:
        for frame, file in enumerate(self.files):
            if frame not in self.used:
                self._volume(frame)
            if file.suffix == ".pt":
                _check_zip(file)

    def _volume(self, frame: int) -> np.ndarray:
        file = self.files[frame]
        volume = _array(file) if frame else self._first
        self.used.add(frame)
        if volume.shape != self.shape[:3]:
            raise DataError(f"{file}: shape {volume.shape}; expected {self.shape[:3]}, as {self.files[0].name} has it")
        return volume


def _check_zip(file: Path) -> None:
    """Compare the checksums of a PyTorch file, which is a zip, since PyTorch does not."""
    with readable(file, "one array of numbers; save it again"):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise DataError(f"{file}: damaged: the checksum of {damaged} in it is another one; copy it again")


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
        from umbrella_jax.io.torch_files import read_tensor
    except ImportError:
        remedy = "pip install 'umbrella-jax[torch]', or save it as .npy"
        raise DataError(f"{file}: needs PyTorch to be read; {remedy}") from None
    return read_tensor(file)
