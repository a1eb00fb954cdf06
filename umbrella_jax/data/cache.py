"""Volumes of a run, from files that stay as they were when it began; and preprocessed ones on disk, so that a file is
decompressed, resized and scaled once for all runs.

    DIR/volumes/ab/ab….safetensors   one volume, or one window of a run
    DIR/sources/cd/cd….json          one source file: its digest, the contradictions of its header, and its `stat`
    DIR/tmp/                         files that are being written

An entry is a safetensors file with one tensor, `volume`. It is named by the SHA-256 of its key, which stands in its
metadata: digest of the source's content, every parameter of the modality but the patch, window, type, and
PREPROCESSING_VERSION. So a changed source or parameter is another entry, and equal content under several names is one.
Of the libraries behind it, the metadata name the versions; they are not in the key. Nothing is ever deleted: what no
run uses any more is yours to remove, at any time, whole or in part.

Why one file each and not ArrayRecord or Zarr: it is written aside and renamed, so that any number of processes fill
one directory without locks (which network file systems do not keep), and neither a crash nor a full disk can leave
half an entry; and any program reads it. Whatever happens to it later is noticed: a length that does not fit when a run
begins, a flipped bit (CRC-32) when it is read. Such an entry is made anew, with a warning.

A source is hashed, and checked to its end for damage, once: as long as its path, size, times of change (`mtime`,
`ctime`) and inode stay, so does its digest. What is not noticed, then: content that changed while all of these stayed,
as after the clock was set back, or on a file system that does not keep them. A source that changes during a run is
noticed when it is read.
"""

import hashlib
import json
import logging
import math
import os
import random
import threading
import time
import uuid
import zlib
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from safetensors.numpy import save

from umbrella_jax.config.schema import DataConfig, ModalityConfig, RunConfig
from umbrella_jax.console import plural
from umbrella_jax.data.background import Background, by_modality, level_of, summary, uneven
from umbrella_jax.data.conversation import Image, read_conversations
from umbrella_jax.data.volume import (
    PREPROCESSING_VERSION,
    axis_codes,
    check_opened,
    check_volumes,
    checked_to_end,
    count_windows,
    open_volume,
    preprocess,
    reading_order,
)
from umbrella_jax.data.voxels import Voxels, readable, source_files
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.io.files import check_output
from umbrella_jax.io.reading import parse_json, read_json, sha256

_log = logging.getLogger(__name__)
_SETTLED = 2.0
"""Seconds without a change after which a digest is remembered: within one tick of its file system's clock, a file can
change a second time and look the same."""
_ABANDONED = 3600.0
"""Seconds after which a file in tmp/ is what a crash has left."""
_CODES = {"float32": "F32", "float16": "F16"}
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class _Source:
    """A source as it was when it was first read."""

    digest: str
    """SHA-256 of its content."""
    stats: np.ndarray
    """int64, a hash of the `stat` of each file; a run may have thousands."""
    stat: str
    """One hash of all of these, as a record keeps it."""
    changed: float
    """Time of the last change, in seconds."""
    remarks: tuple[str, ...] | None = None
    """As of `Voxels`; None as long as it was not checked to its end."""


class Sources:
    """`check_volume` and `load_volume` of files that stay as they are. Safe for threads.

    `load` refuses a file that is not the one that `check` saw.
    """

    def __init__(self) -> None:
        self._sources: dict[Path, _Source] = {}
        self._backgrounds: dict[tuple[Path, ModalityConfig, int], Background] = {}
        self._checked: dict[tuple[Path, ModalityConfig], int] = {}  # number of windows

    def check(self, path: str | Path, config: ModalityConfig) -> int:
        """`check_volume`; raises DataError also if the file changes meanwhile."""
        path = Path(path)
        source, image = self._look(path), open_volume(path, config)
        self._checked[path, config] = count = check_opened(path, image, config, note=self._note)
        self._check_unchanged(path, image, source)
        self._remember(path, image, source)
        return count

    def load(self, path: str | Path, config: ModalityConfig, window: int = 0) -> np.ndarray:
        """`load_volume` of a file that `check` has read to its end; raises DataError also if it changed since."""
        path = Path(path)
        source, image = self._source(path), open_volume(path, config)
        volume = preprocess(path, image, config, window)
        self._check_unchanged(path, image, source)
        return volume

    def axes(self, path: str | Path, config: ModalityConfig) -> str | None:
        """`axis_codes` of a file."""
        return axis_codes(open_volume(path, config), config)

    def digest(self, path: str | Path) -> str:
        """`source_digest` of a file as it was when it was first read."""
        return self._source(Path(path)).digest

    def background(self, path: Path, config: ModalityConfig, window: int) -> float | None:
        """Return the value of the background in a checked and preprocessed volume; None if that is its lowest value."""
        return level_of(self._backgrounds.get((path, config, window)), config)

    def background_remarks(self, modalities: Mapping[str, ModalityConfig]) -> list[str]:
        """Return which backgrounds were taken of volumes with voxels below 0, and if those of a modality or of the
        windows of a run differ."""
        remarks = [(*place, background) for place, background in self._backgrounds.items()]
        lines = [f"{path}: {text}" for path, text in uneven(remarks, self._checked).items()]
        if len(lines) > 1:
            lines = [f"{lines[0]}; {plural(len(lines) - 1, 'more run')} like it"]
        for modality, backgrounds in by_modality(remarks, modalities).items():
            total = sum(config == modalities[modality] for _, config in self._checked)
            lines += summary(modality, backgrounds, total)
        return lines

    def _note(self, path: Path, config: ModalityConfig, window: int, background: Background) -> None:
        self._backgrounds[path, config, window] = background

    def remarks(self) -> list[str]:
        """Contradictions in the headers of the files that were checked, one line for all files with the same one."""
        paths: dict[str, list[Path]] = {}
        for path, source in sorted(self._sources.items()):
            for remark in source.remarks or ():
                paths.setdefault(remark, []).append(path)
        return [
            f"{first} and {plural(len(others), 'more file')}: {remark}" if others else f"{first}: {remark}"
            for remark, (first, *others) in paths.items()
        ]

    def _source(self, path: Path) -> _Source:
        """The source as it was when it was first read, or last checked."""
        if path not in self._sources:
            self._sources[path] = self._look(path)
        return self._sources[path]

    def _look(self, path: Path) -> _Source:
        """The source as it is now."""
        found = _stat(path)  # before it is hashed: a change in between shows when it is read
        return _Source(source_digest(path), *found)

    def _remember(self, path: Path, image: Voxels, source: _Source) -> None:
        """Keep what was found of a source that was checked to its end."""
        self._sources[path] = replace(source, remarks=tuple(image.remarks))

    def _check_unchanged(self, path: Path, image: Voxels, source: _Source) -> None:
        """Raise DataError if what was read is not the source as it was; times and inodes alone may change."""
        with readable(path):
            same = all(source.stats[i : i + 1].tolist() == [_stamp(image.files[i].stat())] for i in image.used)
        if not same:
            stats, stat, changed = _stat(path)
            if source_digest(path) != source.digest:
                raise DataError(f"{path}: changed since the run began; leave volumes as they are, and start again")
            self._sources[path] = replace(source, stats=stats, stat=stat, changed=changed)


def check_float16(path: Path, volume: np.ndarray) -> None:
    """Raises DataError, naming the file, where float16 does not reach to a preprocessed volume's values."""
    if (largest := max(volume.max(), -volume.min())) > _LARGEST:
        raise DataError(
            f"{path}: values up to {largest:.6g}, float16 ends at {_LARGEST:.0f}; "
            "expected data.cache_dtype: float32, or a scaling of the modality"
        )


class VolumeCache(Sources):
    """`load_volume` with a memory. Safe for threads, and for processes that share the directory.

    `dtype` float32 gives the very numbers of `load_volume`. float16 rounds them, the same whether an entry was there
    or not: by at most 2⁻¹¹ of their size (4.9e-4), below 6.1e-5 by at most 3e-8; beyond ±65504 they are refused.

    An entry that cannot be written (a full disk, a directory that is only readable) is a warning, once, and nothing
    more is kept; with `strict` it is an OSError.
    """

    def __init__(self, directory: str | Path, dtype: str = "float32", *, strict: bool = False, verify: bool = False):
        # verify: `check` reads every entry, not its header alone
        super().__init__()
        self.directory, self.dtype = Path(directory), np.dtype(dtype)
        self.made, self.found, self.nbytes = 0, 0, 0
        self._strict, self._verify, self._writes = strict, verify, True
        self._lock = threading.Lock()
        with suppress(OSError):  # not there yet, or gone meanwhile
            for file in (self.directory / "tmp").iterdir():
                if time.time() - file.stat().st_mtime > _ABANDONED:
                    file.unlink()

    @classmethod
    def of(cls, data: DataConfig) -> Sources:
        """The cache that a run's config names; files without one if it names none."""
        return Sources() if data.cache is None else cls(data.cache, data.cache_dtype)

    def check(self, path: str | Path, config: ModalityConfig) -> int:
        """Do what `check_volume` does, and keep the result.

        A source that was checked before and has every entry is not opened.

        Raises:
            DataError: as `load_volume`; the source changes meanwhile; it holds more than float16 can.
            OSError: an entry cannot be written, where `strict`.
        """
        path = Path(path)
        self._sources[path] = source = self._look(path)
        first = self._read(self._key(source, config, 0), config, header_only=not self._verify)
        image: Voxels | None = None
        if first and source.remarks is not None:
            count = int(first[0]["windows"])
        else:
            image = open_volume(path, config)
            count = count_windows(image, config)
        with nullcontext() if image is None else checked_to_end(image):
            for window in reading_order(count, config):
                key = self._key(source, config, window)
                entry = first if window == 0 else self._read(key, config, header_only=not self._verify)
                if entry:
                    self._count("found", self._file(key).stat().st_size)
                    if background := entry[0]["background"]:
                        self._note(path, config, window, Background(**json.loads(background)))
                else:
                    image = image or open_volume(path, config)
                    self._make(path, image, config, window, source)
        if image is not None and source.remarks is None:
            self._check_unchanged(path, image, source)
            self._remember(path, image, source)
        self._checked[path, config] = count
        return count

    def load(self, path: str | Path, config: ModalityConfig, window: int = 0) -> np.ndarray:
        """`load_volume`, from the cache where it can be: float32, C-contiguous; and what it raises.

        After `check`, of the content that the source had then: the source is not looked at.
        """
        path = Path(path)
        source = self._source(path)
        entry = self._read(self._key(source, config, window), config)
        volume = entry[1] if entry else self._make(path, open_volume(path, config), config, window, source)
        return _widen(volume) if volume.dtype == np.float16 else volume

    def axes(self, path: str | Path, config: ModalityConfig) -> str | None:
        """`axis_codes` of a file, from its first entry where it can be."""
        path = Path(path)
        entry = self._read(self._key(self._source(path), config, 0), config, header_only=True)
        return (entry[0]["axes"] or None) if entry else super().axes(path, config)

    # sources

    def _record(self, path: Path) -> Path:
        return self.directory / "sources" / _spread(_sha256(os.path.abspath(path)), ".json")

    def _look(self, path: Path) -> _Source:
        """The source as it is now. Hashes it only if it has changed since it was last seen."""
        now, found = time.time(), _stat(path)
        with suppress(OSError, ValueError, KeyError, TypeError):  # no record, or a damaged one
            known = read_json(self._record(path), DataError, "remove it")
            if known["stat"] == found[1]:
                remarks = known.get("remarks")  # records of before have none: checked again
                return _Source(known["digest"], *found, remarks=None if remarks is None else tuple(remarks))
        # a change within a tick of the file system's clock would not show: as if it had changed now
        stats, stat, changed = found
        return _Source(source_digest(path), stats, stat, changed if now - changed > _SETTLED else math.inf)

    def _remember(self, path: Path, image: Voxels, source: _Source) -> None:
        super()._remember(path, image, source)
        if source.changed < math.inf:
            kept = {"path": os.path.abspath(path), "stat": source.stat, "digest": source.digest}
            self._write(self._record(path), json.dumps(kept | {"remarks": image.remarks}).encode())

    # entries

    def _key(self, source: _Source, config: ModalityConfig, window: int) -> str:
        """All that the numbers of an entry follow from."""
        key = {
            "source": source.digest,
            "modality": _parameters(config),
            "window": window,
            "dtype": self.dtype.name,
            "preprocessing": PREPROCESSING_VERSION,
        }
        return json.dumps(key, sort_keys=True)

    def _file(self, key: str) -> Path:
        return self.directory / "volumes" / _spread(_sha256(key), ".safetensors")

    def _read(
        self, key: str, config: ModalityConfig, *, header_only: bool = False
    ) -> tuple[dict[str, str], np.ndarray] | None:
        """Metadata and volume of an entry, the latter empty with `header_only`. None where there is none, and, with a
        warning, where it is damaged."""
        file, volume = self._file(key), np.empty(0, self.dtype)
        nbytes = math.prod(config.size) * self.dtype.itemsize
        tensor = {"dtype": _CODES[self.dtype.name], "shape": list(config.size), "data_offsets": [0, nbytes]}
        try:
            # Not by safe_open: it maps the file, and where a network file system replaces or loses one that is mapped,
            # the process is killed (SIGBUS).
            with file.open("rb") as entry:
                length = int.from_bytes(entry.read(8), "little")
                if 8 + length + nbytes != os.fstat(entry.fileno()).st_size:
                    raise ValueError("its length is another one")
                header = parse_json(entry.read(length).decode(), file, DataError, "remove it")
                metadata: dict[str, str] = header["__metadata__"]
                if (header["volume"], metadata["key"]) != (tensor, key):
                    raise ValueError("it is another one")
                if not header_only:
                    volume = np.empty(config.size, self.dtype)
                    entry.readinto(volume.data.cast("B"))
                    if zlib.crc32(volume.data) != int(metadata["crc32"]):
                        raise ValueError("its checksum is another one")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s: a damaged volume (%s); made anew", file, error)
            return None
        return metadata, volume

    def _make(self, path: Path, image: Voxels, config: ModalityConfig, window: int, source: _Source) -> np.ndarray:
        """Preprocess a volume, write its entry and return it as it is kept."""
        backgrounds: list[Background] = []
        volume = preprocess(path, image, config, window, note=lambda *found: backgrounds.append(found[-1]))
        for background in backgrounds:
            self._note(path, config, window, background)
        self._check_unchanged(path, image, source)  # it would be kept under the digest of what it was
        if self.dtype == np.float16:
            check_float16(path, volume)
        volume = np.ascontiguousarray(volume, self.dtype)  # safetensors writes others wrong
        key = self._key(source, config, window)
        metadata = {
            "key": key,
            "path": os.path.abspath(path),
            "axes": axis_codes(image, config) or "",
            "background": "".join(json.dumps(asdict(background)) for background in backgrounds),
            "windows": str(count_windows(image, config)),
            "crc32": str(zlib.crc32(volume.data)),
            "versions": f"numpy {np.__version__}, nibabel {nib.__version__}",
        }
        content = save({"volume": volume}, metadata)
        if self._write(self._file(key), content):
            self._count("made", len(content))
        return volume

    def _write(self, file: Path, content: bytes) -> bool:
        """Puts a file there whole, or not at all; whether it did."""
        if not self._writes:
            return False
        temporary = self.directory / "tmp" / uuid.uuid4().hex
        try:
            for directory in (temporary.parent, file.parent):
                directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(file)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if self._strict:
                raise OSError(error.errno, error.strerror, str(self.directory)) from None
            with self._lock:
                if self._writes:
                    _log.warning("%s: volumes are not kept from here on: %s", self.directory, error)
                self._writes = False
            return False
        return True

    def _count(self, what: str, nbytes: int) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)
            self.nbytes += nbytes


def fill(config: RunConfig, *, verify: bool = False) -> str:
    """Puts every volume of a run's training and evaluation data into its cache; says how many, in one line.

    Several at once on one directory, on one machine or many, share the work: each takes the files in another order.

    Args:
        verify: read every entry that is there, and make the damaged ones anew.

    Raises:
        ConfigError: no cache or no data named.
        DataError: with every fault of conversation files, or, when they are good, of volumes. Good ones are kept.
        OSError: an entry cannot be written.
    """
    data, modalities = config.data, config.model.modalities
    paths = [path for path in (data.train, data.eval) if path is not None]
    faults = Faults()
    if not data.cache:
        faults.append("data.cache: expected a directory (--cache D)")
    if not paths:
        faults.append("data.train: expected a path (--train-data PATH), or data.eval (--eval-data PATH)")
    faults.raise_as(ConfigError)
    check_output(Path(str(data.cache)), "choose another directory (--cache DIR)", folder=True)
    images: dict[Image, None] = {}
    for path in paths:
        with faults:
            kept = read_conversations(
                path,
                modalities,
                data.image_root,
                modality=data.modality,
                task_filter=data.task_filter,
                allow_outside_root=data.allow_outside_root,
            )
            images |= dict.fromkeys(image for conversation in kept for image in conversation.images)
    faults.raise_as(DataError)
    cache = VolumeCache(str(data.cache), data.cache_dtype, strict=True, verify=verify)
    check_volumes(random.Random().sample(list(images), len(images)), modalities, data.threads, cache.check)
    return (
        f"{cache.directory}: {len(images)} files, {cache.made + cache.found} volumes in {data.cache_dtype}: "
        f"{cache.made} made, {cache.found} found; {cache.nbytes / 1e6:.1f} MB"
    )


@lru_cache
def _parameters(config: ModalityConfig) -> dict[str, Any]:
    """Return what preprocessing depends on: not the patch, which comes after it."""
    return {name: value for name, value in config.meaning.items() if name != "patch"}


def _widen(volume: np.ndarray) -> np.ndarray:
    """Finite float16 as float32, exactly, in a third of `astype`'s time.

    Sign, exponent and fraction are moved to where float32 has them; 2¹¹² makes up for the other bias of the exponent,
    127 - 15, also of numbers that have none (subnormal ones).
    """
    bits = volume.view(np.int16).astype(np.int32)  # sign in the highest bit, and in those that the exponent leaves
    bits <<= 13
    bits &= ~0x70000000
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


def _stat(path: Path) -> tuple[np.ndarray, str, float]:
    """Return `stats`, `stat` and `changed` of a `_Source`."""
    with readable(path):
        found = [(file, file.stat()) for file in source_files(path)]
    said = [[file.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for file, s in found]
    stats = np.array([_stamp(s) for _, s in found], np.int64)
    return stats, _sha256(json.dumps(said)), max(max(s.st_mtime, s.st_ctime) for _, s in found)


def _stamp(s: os.stat_result) -> int:
    return hash((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino))


def source_digest(path: Path) -> str:
    """SHA-256 of a source's content: of each file, in order, its suffix or, of a frame, its name, and its SHA-256."""
    parts = []
    with readable(path):
        for file in source_files(path):
            parts.append([file.name if path.is_dir() else file.suffix, sha256(file)])
    return _sha256(json.dumps(parts))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _spread(name: str, suffix: str) -> Path:
    """Over 256 directories: some file systems are slow with many files in one."""
    return Path(name[:2], name + suffix)
