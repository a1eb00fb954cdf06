"""The scans that a page or a request can name: those of `--data`, and uploads in a private folder.

A scan is named by a random id. Its name is only a label to show; no path is ever made from it. Uploads are in a folder
of the server's own that only its user can read, under random names. They are removed after an hour and at the end; what
a killed server left is removed by the next one.

Every limit (`UploadLimits`) applies before memory or disk is taken, on top of those that the readers have
(`umbrella_jax.data.voxels`).
"""

import asyncio
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from isal import igzip

from umbrella_jax.config.schema import MAX_VOXELS, ModalityConfig, aliases_of, modality_names, resolve_modality
from umbrella_jax.data.conversation import Conversations
from umbrella_jax.data.deadline import ReadingTimeoutError, check_deadline
from umbrella_jax.data.volume import MAX_AXIS, count_windows, load_volume, open_volume, reading_memory, voxel_affine
from umbrella_jax.data.voxels import Voxels, map_header, open_voxels, readable
from umbrella_jax.errors import DataError, visible
from umbrella_jax.html.slices import preprocessed_geometry
from umbrella_jax.io.files import is_locked, locked, open_private
from umbrella_jax.serve.readers import Readers
from umbrella_jax.serve.responses import ApiError, upload_too_large

T = TypeVar("T")

FOLDER = "umbrella-jax-serve-"
"""How the name of a server's private folder begins, in the system's folder for temporary files."""
_LISTED = 1000
"""Largest number of scans of --data that are listed."""
_QUESTIONS = 20
"""Largest number of questions that are listed for a scan of --data."""
_LABEL = 200
"""Characters of a name that are shown."""
_PIECE = 1 << 20
"""Bytes that are written, or decompressed, at once."""
_VIEWED_BYTES = 24
"""Memory per voxel of a file that is converted to NIfTI: as read, as float32 and as the content of a file."""
_BEGINNINGS = (b"\x1f\x8b", b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c")
"""How a NIfTI file can begin: gzip, or the size of a NIfTI-1 or 2 header in either order of bytes."""


@dataclass(frozen=True)
class UploadLimits:
    """Limits of uploads. Each is named in the message about what exceeds it."""

    file_bytes: int = 512 << 20
    """Bytes of one upload."""
    total_bytes: int = 4 << 30
    """Bytes of all uploads together, those under way included."""
    number: int = 200
    """Number of uploads, those under way included."""
    unpacked_bytes: int = 4 << 30
    """Bytes that one upload may unpack to: the voxels of any scan, and 1200 frames at 2 mm."""
    check_seconds: float = 60.0
    """Time to check one upload, or to prepare one volume."""
    kept_seconds: float = 3600.0
    """Time after which an upload is removed."""


@dataclass(frozen=True)
class ScanHeader:
    """What the header of a scan says."""

    shape: tuple[int, ...] | None = None
    """As stored; None if the file cannot be read."""
    zooms_mm: tuple[float, ...] | None = None
    """mm from voxel to voxel along each stored axis; None if unknown."""
    orientation: str | None = None
    """Where the stored axes point, such as "LAS"; None if unknown."""
    frames: int = 1
    """Number of frames of a run; 1 of a volume."""
    tr: float | None = None
    """Seconds from frame to frame; None of a volume, and if the header does not state them with their unit."""
    words: str = ""
    """The texts of the header that may name a modality."""
    warnings: tuple[str, ...] = ()
    """What is missing in the header or contradicts itself, or why the file cannot be read."""


@dataclass(frozen=True)
class ServedScan:
    """A scan of --data, or an upload."""

    id: str
    name: str
    """A label; never part of a path."""
    path: Path
    header: ScanHeader
    modality: str | None = None
    """The one that the data names; None for an upload."""
    guess: tuple[str, str] | None = None
    """(modality, reason) of `guess_modality`; never applied by itself."""
    task_questions: tuple[str, ...] = ()
    """Questions that the data asks about this scan only."""
    bytes: int = 0
    """Size of an upload."""
    uploaded: float | None = None
    """When it was uploaded, by `time.monotonic`; None for a scan of --data."""
    listed: bool = True
    """Whether `Scans.listed` contains it."""

    @property
    def is_nifti(self) -> bool:
        """Whether browsers read its file as it is."""
        return self.path.name.endswith((".nii", ".nii.gz")) and self.path.is_file()

    def to_json(self) -> dict[str, Any]:
        """Return the fields for a page."""
        header = self.header
        return {
            "id": self.id,
            "name": self.name,
            "uploaded": self.uploaded is not None,
            "modality": self.modality,
            "shape": header.shape,
            "zooms_mm": header.zooms_mm,
            "orientation": header.orientation,
            "frames": header.frames,
            "tr": header.tr,
            "guess": None if self.guess is None else {"modality": self.guess[0], "reason": self.guess[1]},
            "warnings": header.warnings,
            "task_questions": self.task_questions,
        }


def read_header(path: Path) -> ScanHeader:
    """Return what the header of a file says, without reading its voxels.

    Raises DataError as `open_voxels`, and for more voxels in a volume, or along an axis, than a model can be given.
    """
    image = open_voxels(path)
    shape = image.shape
    if len(shape) < 3 or 0 in shape or any(n != 1 for n in shape[4:]):
        raise DataError(f"{path}: shape {shape}; expected a volume (3 axes) or a run (4 axes)")
    if max(shape[:3]) > MAX_AXIS or math.prod(map(int, shape[:3])) > MAX_VOXELS:
        raise DataError(f"{path}: shape {shape}; expected at most {MAX_AXIS} voxels along an axis, {MAX_VOXELS} in all")
    frames = int(shape[3]) if len(shape) > 3 else 1
    warnings = [f"no orientation: {image.why_no_affine}"] if image.affine is None else []
    warnings += [f"no voxel sizes: {image.why_no_zooms}"] if image.zooms is None else []
    tr = image.read_tr() if frames > 1 and image.has_time_unit else None
    if frames > 1 and tr is None:
        warnings.append("its header states no time between frames, or no unit of it")
    return ScanHeader(
        shape=tuple(int(n) for n in shape),
        zooms_mm=None if image.zooms is None else tuple(round(float(zoom), 4) for zoom in image.zooms),
        orientation=None if image.affine is None else "".join(nib.aff2axcodes(image.affine)),
        frames=frames,
        tr=tr,
        words=_words(image),
        warnings=(*warnings, *image.remarks),
    )


def _words(image: Voxels) -> str:
    """Return the texts of a NIfTI header."""
    header: Any = getattr(image, "stored", {})
    fields = set(header.keys()) & {"descrip", "intent_name", "db_name"}
    texts = [bytes(header[name].item()) for name in sorted(fields)]
    return " ".join(text.decode("ascii", "ignore").strip("\0 ") for text in texts).strip()


def guess_modality(header: ScanHeader, modalities: Mapping[str, ModalityConfig]) -> tuple[str, str] | None:
    """Return (modality, reason) if rank and header of a scan allow only one of the model's modalities, else None."""
    if header.shape is None:
        return None
    kind = "run" if header.frames > 1 else "volume"
    rank = 4 if header.frames > 1 else 3
    what = f"a {kind} of {header.frames} frames" if rank == 4 else "a single volume"
    fitting = [name for name, config in modalities.items() if len(config.size) == rank]
    if len(fitting) == 1:
        return fitting[0], f"{what}, and {fitting[0]} is the model's only modality of {rank} axes"
    words = {word.lower() for word in re.findall(r"[A-Za-z0-9]+", header.words)}
    named = [name for name in fitting if words & {word.lower() for word in (name, *aliases_of(name, modalities))}]
    if len(named) == 1:
        return named[0], f"{what}, whose header names {named[0]}"
    return None


@dataclass
class Scans:
    """The scans that requests may name. Use `open_scans` to make one.

    Methods that are coroutines belong to the event loop; the others may be called in any thread.
    """

    folder: Path
    """Private folder of the uploads."""
    modalities: Mapping[str, ModalityConfig]
    limits: UploadLimits = field(default_factory=UploadLimits)
    data: Conversations | None = None
    """Conversations whose scans are listed."""
    readers: Readers = field(default_factory=Readers)
    """Threads that read them."""

    def __post_init__(self) -> None:
        self._scans = dict[str, ServedScan]()
        self.is_cut = False
        """Whether --data has more scans than are listed."""
        self._growing = dict[str, int]()  # {id of an upload under way: bytes so far}
        self._users = Counter[str]()  # {id: requests that need the file}
        self._leaving = dict[str, ServedScan]()  # removed, but needed until these requests end

    def __getitem__(self, id: str) -> ServedScan:
        """Return a scan. Raise ApiError (404) for an id that is unknown, or of an upload that was removed."""
        scan = self._scans.get(id)
        if scan is None or self._has_expired(scan):
            minutes = self.limits.kept_seconds / 60
            kept = f"uploads are removed after {minutes:g} minutes and when the server ends"
            message = f"no such scan; {kept}: upload it again"
            raise ApiError(404, message, code="no_such_scan")
        return scan

    def path(self, id: str) -> Path:
        """Return the file of a scan. Raise as `scans[id]`."""
        return self[id].path

    def modality(self, id: str) -> str | None:
        """Return the modality that --data names for a scan, None for an upload. Raise as `scans[id]`."""
        return self[id].modality

    def listed(self) -> list[ServedScan]:
        """Return the scans of --data, then the uploads."""
        return [scan for scan in self._scans.values() if scan.listed and not self._has_expired(scan)]

    def usage(self) -> tuple[int, int]:
        """Return the number of uploads and their bytes, those under way included."""
        kept = (*self._scans.values(), *self._leaving.values())
        sizes = [scan.bytes for scan in kept if scan.uploaded is not None]
        return len(sizes) + len(self._growing), sum(sizes) + sum(self._growing.values())

    def public(self, text: str) -> str:
        """Return a message with the name of a scan in place of each path, so that it says nothing about the server."""
        for scan in sorted(self._scans.values(), key=lambda scan: -len(str(scan.path))):
            text = text.replace(str(scan.path), scan.name)
        return text.replace(f"{self.folder}{os.sep}", "")

    async def add(self, name: str, pieces: AsyncIterator[bytes], *, listed: bool = True) -> ServedScan:
        """Store an upload and check it. Whatever goes wrong, nothing of it stays on the disk.

        Args:
            name: its label.
            pieces: its content.
            listed: whether `listed` contains it.

        Raises:
            ApiError: 413 for an upload that is too large, packed or not; 415 for one that is no NIfTI file or a damaged
                one; 507 if there are too many, or no room is left.
        """
        limits, label = self.limits, _label(name)
        self.remove_expired()
        if self.usage()[0] >= limits.number:
            raise ApiError(507, f"{limits.number} uploads are stored, the limit; delete some", code="too_many_uploads")
        id = secrets.token_urlsafe(16)
        part, kept = self.folder / f"{id}.part", list[Path]()
        self._growing[id] = 0
        try:
            with open(part, "wb", opener=open_private) as file:  # buffered: a raw one may write only a part
                head = await self._store(id, label, pieces, file.write)
                await asyncio.to_thread(file.flush)
            path = self.folder / (f"{id}.nii.gz" if head.startswith(_BEGINNINGS[0]) else f"{id}.nii")
            part.rename(path)
            kept.append(path)
            header = await self._run(partial(_check, path, limits), label)
            scan = ServedScan(
                id=id,
                name=label,
                path=path,
                header=header,
                guess=guess_modality(header, self.modalities),
                bytes=self._growing[id],
                uploaded=time.monotonic(),
                listed=listed,
            )
        except BaseException as error:
            for file_path in (part, *kept):
                file_path.unlink(missing_ok=True)
            if isinstance(error, DataError):
                message = "; ".join(error.faults).replace(str(kept[0]), label)
                raise ApiError(415, message, code="not_a_scan", param="file") from None
            if isinstance(error, OSError):
                raise ApiError(507, f"{label}: cannot be stored: {error.strerror}", code="no_room") from None
            raise
        finally:
            del self._growing[id]
        self._scans[id] = scan
        return scan

    async def _store(
        self, id: str, label: str, pieces: AsyncIterator[bytes], write: Callable[[bytes], object]
    ) -> bytes:
        """Write an upload. Return its first bytes."""
        limits, buffer, head = self.limits, bytearray(), b""
        async for piece in pieces:
            buffer += piece
            self._growing[id] += len(piece)
            if not head and len(buffer) >= 4:
                head = bytes(buffer[:4])
                if not head.startswith(_BEGINNINGS):
                    raise ApiError(
                        415, f"{label}: expected a NIfTI file (.nii or .nii.gz)", code="not_a_scan", param="file"
                    )
            if self._growing[id] > limits.file_bytes:
                raise upload_too_large(label, limits.file_bytes)
            if self.usage()[1] > limits.total_bytes:
                raise ApiError(
                    507,
                    f"{label}: with it, uploads take more than {limits.total_bytes >> 20} MB, the limit of all "
                    "together; delete some",
                    code="too_many_uploads",
                )
            if len(buffer) >= _PIECE:
                await asyncio.to_thread(write, bytes(buffer))
                buffer.clear()
        await asyncio.to_thread(write, bytes(buffer))
        if not head:
            raise ApiError(415, f"{label}: empty; expected a NIfTI file", code="not_a_scan", param="file")
        return head

    @asynccontextmanager
    async def temporary(self, name: str, content: bytes) -> AsyncIterator[ServedScan]:
        """Add a scan that came inside a request, not listed, and remove it at the end of the block.

        Raises ApiError as `add`.
        """

        async def pieces() -> AsyncIterator[bytes]:
            yield content

        scan = await self.add(name, pieces(), listed=False)
        try:
            yield scan
        finally:
            self._remove(scan)

    def remove(self, id: str) -> None:
        """Remove an upload. Raise ApiError, 404 as `scans[id]`, or 403 for a scan of --data."""
        scan = self[id]
        if scan.uploaded is None:
            raise ApiError(403, f"{scan.name}: a scan of --data; only uploads can be deleted", code="not_an_upload")
        self._remove(scan)

    def remove_expired(self) -> None:
        """Remove uploads older than the limit."""
        for scan in list(self._scans.values()):
            if self._has_expired(scan):
                self._remove(scan)

    def _remove(self, scan: ServedScan) -> None:
        self._scans.pop(scan.id, None)
        if self._users[scan.id]:
            self._leaving[scan.id] = scan
        else:
            scan.path.unlink(missing_ok=True)

    @contextmanager
    def in_use(self, id: str) -> Iterator[ServedScan]:
        """Keep the file of a scan during the block, even if it is deleted or its time ends. Raise as `scans[id]`."""
        scan = self[id]
        self._users[id] += 1
        try:
            yield scan
        finally:
            self._users[id] -= 1
            if not self._users[id]:
                del self._users[id]
                if self._leaving.pop(id, None):
                    scan.path.unlink(missing_ok=True)

    def _has_expired(self, scan: ServedScan) -> bool:
        return scan.uploaded is not None and time.monotonic() - scan.uploaded > self.limits.kept_seconds

    async def seen(self, scan: ServedScan, modality: str | None, window: int) -> bytes:
        """Return what the model sees of a scan: the preprocessed volume as NIfTI, in the space of the scan.

        Args:
            scan: one that is `in_use`.
            modality: the one to prepare it as; None takes that of --data.
            window: of a run.

        Raises ApiError: 400 for a modality or window that does not exist, 422 for a file that the modality cannot use,
            504 if it takes too long.
        """
        name = modality or scan.modality
        known = None if name is None else resolve_modality(name, self.modalities)
        if known is None:
            message = f"expected one of {modality_names(self.modalities)}"
            raise ApiError(400, f"modality: {message}", param="modality", code="unknown_modality")
        config = self.modalities[known]

        def memory() -> int:
            return reading_memory(open_volume(scan.path, config), config)

        prepare = partial(prepared_nifti, scan.path, config, window)
        try:
            return await self._run(prepare, scan.name, await self._run(memory, scan.name))
        except DataError as error:
            raise ApiError(422, self.public("; ".join(error.faults)), code="unusable_scan", param="modality") from None

    async def viewable(self, scan: ServedScan) -> bytes | Path:
        """Return the file of a scan if browsers read its format, or else its content as NIfTI.

        Raises ApiError: 422 for a file that cannot be read, 504 if it takes too long.
        """
        if scan.is_nifti:
            return scan.path
        try:
            memory = _VIEWED_BYTES * math.prod(scan.header.shape or ())
            return await self._run(partial(_as_nifti, scan.path), scan.name, memory)
        except DataError as error:
            raise ApiError(422, self.public("; ".join(error.faults)), code="unusable_scan") from None

    async def _run(self, function: Callable[[], T], name: str, memory: int = 0) -> T:
        """Run a function in a thread of the readers, for at most `check_seconds`. Raises as `Readers.run`.

        A function that takes too long is an ApiError, 504.
        """
        try:
            return await self.readers.run(function, seconds=self.limits.check_seconds, memory=memory, name=name)
        except ReadingTimeoutError as error:
            raise ApiError(504, self.public("; ".join(error.faults)), code="too_slow") from None

    def read_data(self) -> None:
        """Read the headers of the scans of --data. An unreadable one is listed with the reason among its warnings."""
        modality, questions = dict[Path, str](), dict[Path, dict[str, None]]()
        for conversation in self.data or ():
            images = {image.path: image.modality for image in conversation.images}
            modality |= images
            for path in images if len(images) == 1 else ():
                user = (m.text.strip() for m in conversation.messages if m.role == "user")
                if text := next(filter(None, user), ""):
                    questions.setdefault(path, {})[text] = None
            if len(modality) > _LISTED:
                self.is_cut = True
                break
        paths = list(modality)[:_LISTED]
        common = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
        for path in paths:
            name = os.path.relpath(path.absolute(), common)
            try:
                header = read_header(path)
            except DataError as error:
                header = ScanHeader(warnings=tuple(fault.replace(str(path), name) for fault in error.faults))
            asked = tuple(questions.get(path, ()))[:_QUESTIONS]
            id = secrets.token_urlsafe(16)
            label = visible(name, kept="")
            self._scans[id] = ServedScan(id, label, path, header, modality[path], task_questions=asked)


def _label(name: str) -> str:
    """Return the label of an upload: the last part of its name, its control characters escaped."""
    last = re.split(r"[/\\]", name)[-1]
    return visible(last, kept="").strip()[:_LABEL] or "scan"


def _check(path: Path, limits: UploadLimits) -> ScanHeader:
    """Return the header of an upload, after checking that it unpacks to no more than the limit and to its end."""
    header = read_header(path)
    if path.suffix == ".gz":
        with readable(path):
            size, buffer = 0, bytearray(_PIECE)
            with igzip.IGzipFile(str(path), "rb") as content:
                while count := content.readinto(buffer):
                    size += count
                    if size > limits.unpacked_bytes:
                        raise DataError(f"{path}: unpacks to more than {limits.unpacked_bytes >> 20} MB, the limit")
                    check_deadline(path)
    return header


def prepared_nifti(path: Path, config: ModalityConfig, window: int) -> bytes:
    """Return a preprocessed volume, or one window of a run, as a NIfTI file in the space of the scan.

    Raises DataError as `load_volume`.
    """
    image = open_volume(path, config)
    if not 0 <= window < count_windows(image, config):
        raise DataError(f"{path}: no window {window}; it has {count_windows(image, config)}, counted from 0")
    volume, affine = load_volume(path, config, window), voxel_affine(image, config)
    prepared, scan = nib.Nifti1Image(volume, affine), map_header(image)
    if affine is None:
        _, mm = preprocessed_geometry(None, None if image.zooms is None else tuple(image.zooms), image.shape, config)
        prepared.header["pixdim"][1:4] = mm or 1
    length = int(scan["xyzt_units"]) & 7 if affine is not None else 2
    prepared.header["xyzt_units"] = length | 8
    tr = config.tr or (image.read_tr() if image.has_time_unit else None)
    if volume.ndim == 4:
        prepared.header["pixdim"][4] = (tr or 0) * config.stride_within_seq
    return bytes(prepared.to_bytes())


def _as_nifti(path: Path) -> bytes:
    """Return a volume or run of any format as a NIfTI file of float32."""
    image = open_voxels(path)
    voxels = image.read(0 if len(image.shape) < 4 else slice(None))
    header = map_header(image)
    made = (nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image)(
        voxels.astype(np.float32), None, header
    )
    made.set_data_dtype(np.float32)
    return bytes(made.to_bytes())


@contextmanager
def open_scans(
    modalities: Mapping[str, ModalityConfig],
    limits: UploadLimits,
    data: Conversations | None = None,
    readers: Readers | None = None,
) -> Iterator[Scans]:
    """Make the private folder of the uploads, and remove it with everything in it at the end of the block.

    First, remove such folders of this user whose process has ended without doing so.

    Args:
        modalities: those of the model.
        limits: of the uploads.
        data: conversations whose scans are listed.
        readers: threads that read scans; by default, new ones.
    """
    parent = Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=parent))  # mode 0700
    try:
        with locked(folder):
            if is_locked(folder):  # otherwise this file system has no locks, and nothing says which servers still run
                remove_leftovers(parent)
            scans = Scans(folder, modalities, limits, data, readers or Readers())
            try:
                yield scans
            finally:
                scans.readers.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, *, age: float = 60.0) -> None:
    """Remove the private folders of this user's servers whose process has ended.

    Args:
        age: seconds that a folder must exist, because a new one is locked only after it was made.
    """
    for folder in parent.glob(f"{FOLDER}*"):
        try:
            status = folder.lstat()
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if is_own and time.time() - status.st_mtime > age and not is_locked(folder):
                shutil.rmtree(folder)
        except OSError:  # removed by another server at this moment, or not ours to remove
            continue
