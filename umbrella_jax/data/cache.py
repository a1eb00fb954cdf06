"""The volumes of a run: `Sources` reads files and notices if they change; `VolumeCache` keeps preprocessed volumes on
disk, so that a file is decompressed, resampled and scaled once for all runs.

The methods `check` and `load` do the steps of `check_volume` and `load_volume` (`umbrella_jax.data.volume`), and
`check_all` those of `check_volumes`.

    DIR/volumes/ab/ab….safetensors   one volume, or one window of a run
    DIR/checked/….jsonl.gz           the sources that were checked (`umbrella_jax.data.checked`)
    DIR/tmp/                         files that are being written

An entry is a safetensors file with one tensor, `volume`. Its name is the SHA-256 of its key, which is stored in its
metadata. The key holds the digest of the source's content and of the files beside it that its voxels depend on
(`companion_files`), all parameters of the modality except the patch, the window, the type and PREPROCESSING_VERSION. A
changed source or parameter therefore makes another entry, and files with equal content share one. The metadata also
names the versions of NumPy and nibabel, which are not part of the key. Nothing is ever deleted: you may remove entries
that no run uses at any time.

Why one file per volume and not ArrayRecord or Zarr: each file is written under a temporary name and then renamed. So
any number of processes can fill one directory without locks, which network file systems do not honour; a crash or a
full disk leaves no half-written entry; and any program can read the files. Damage is noticed later: an entry that is
shorter than its voxels when a run begins, another wrong length or a flipped bit (CRC-32) when the entry is read. A
damaged entry is made again, with a warning.

A source is hashed, and checked to its end for damage, once. What the check established is remembered, with or without a
cache, as long as the source's path, size and times of change (`mtime`, `ctime`) stay the same. A change of the content
that leaves all of these is therefore not noticed, for example after the clock was set back, or on a file system that
does not keep them. A source that changes during a run is noticed when it is read.
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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from umbrella_jax.config.schema import DataConfig, ModalityConfig, RunConfig
from umbrella_jax.console import plural
from umbrella_jax.data.background import (
    Background,
    background_level,
    describe_mixed_windows,
    group_by_modality,
    summarize_backgrounds,
)
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.checked import ABANDONED, CheckedFiles, Established, describe_stat
from umbrella_jax.data.conversation import Image, read_with_config
from umbrella_jax.data.shares import Division, divide, exchange
from umbrella_jax.data.threads import map_in_threads
from umbrella_jax.data.volume import (
    PREPROCESSING_VERSION,
    axis_codes,
    check_opened,
    checked_to_end,
    companion_files,
    count_windows,
    open_volume,
    preprocess,
    reading_order,
)
from umbrella_jax.data.voxels import Voxels, readable, source_files
from umbrella_jax.distributed import raise_together
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.io.files import check_output
from umbrella_jax.io.reading import parse_json, regular_file, sha256

_log = logging.getLogger(__name__)
_SMALL_FILE = 64 << 20
"""Bytes of the largest file that is read as a whole to be checked, by each thread."""
CHECKS_VERSION = 1
"""Increase it when a check finds or reports more than before: volumes that were checked earlier are then read again."""
_CODES = {"float32": "F32", "float16": "F16"}
"""Names of the types in a safetensors header."""
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class _Source:
    """A source as it was when it was first read."""

    digest: str
    """SHA-256 of its content; empty until it was hashed."""
    stats: np.ndarray
    """int64 [files], a hash of the `stat` of each file; a directory of frames may have thousands."""
    stat: str
    """One hash of all `stat`s."""
    changed: float
    """Time of the last change, as `describe_stat` returns it."""
    companions: tuple[tuple[Path, str], ...] = ()
    """(file, SHA-256) of each of its `companion_files`."""
    remarks: tuple[str, ...] = ()
    """`Voxels.remarks`; complete after the source was checked."""

    @property
    def companion_digests(self) -> tuple[str, ...]:
        """SHA-256 of each of its `companion_files`."""
        return tuple(digest for _, digest in self.companions)


_Place = tuple[Path, ModalityConfig]


class Sources:
    """Checks and loads volumes from files that must not change during a run. Safe for threads.

    `load` rejects a file that has changed since `check` read it.

    Args:
        known: the files that were checked before, by any run; they are not read again. Default: every file is read.
    """

    def __init__(self, known: CheckedFiles | None = None) -> None:
        self.num_checked = 0
        """Number of files that were read, and not only looked up."""
        self._known = known
        self._lock = threading.Lock()
        self._sources: dict[_Place, _Source] = {}  # two modalities of one file may have different companions
        self._backgrounds: dict[tuple[Path, ModalityConfig, int], Background] = {}
        self._checked: dict[_Place, int] = {}  # number of windows
        self._faults: dict[_Place, tuple[str, ...]] = {}
        self._axes: dict[_Place, str | None] = {}

    def check(self, path: str | Path, config: ModalityConfig) -> int:
        """Do what `check_volume` does, unless the file is known. Also raise DataError if the file changes meanwhile."""
        path = Path(path)
        source = self._look(path, config)
        if (established := self._find(path, config, source)) is not None:
            self._accept(path, config, source, established)
        else:
            self._read_through(path, config, source)
            if self._known is not None:
                self._known.write()
        return self._checked[path, config]

    def check_all(
        self, images: Iterable[Image], modalities: Mapping[str, ModalityConfig], threads: int, *, share: bool = False
    ) -> dict[Image, int]:
        """Check each distinct image once, in threads, and show the progress on a terminal.

        A file that is known, or that an earlier call has checked, is not read.

        Args:
            share: divide the files between the processes of the run, if all processes see the same files. All must then
                call it at the same point; each gets the results, and the faults, of all.

        Returns:
            {image: number of its windows}, 1 in 3D, in the order of first appearance.

        Raises:
            DataError: with every fault of every file.
        """
        places = {image: (image.path, modalities[image.modality]) for image in images}
        todo = [place for place in dict.fromkeys(places.values()) if not self._is_checked(place)]
        if todo or share:
            with raise_together() if share else nullcontext():
                if self._known is not None:
                    self._known.read({self.name(*place) for place in todo})
                found = self._look_up_all(todo, threads)
            stats = [source.stat if source else "" for source, _ in found]
            files = [f"{self.name(*place)[1]} {stat}" for place, stat in zip(todo, stats, strict=True)]
            known = [established is not None for _, established in found]
            part = divide(files, known) if share else Division([i for i, is_known in enumerate(known) if not is_known])
            results: dict[int, Any] = {i: e.to_json() for i in part.sends if (e := found[i][1]) is not None}
            with raise_together() if share else nullcontext():
                results |= self._read_all([(i, *todo[i], found[i][0]) for i in part.checks], threads)
            results |= exchange(part, results)
            for i, (path, config) in enumerate(todo):
                source, established = found[i]
                if established is None and isinstance(results[i], list):
                    self._faults[path, config] = tuple(results[i])
                elif source is not None and (path, config) not in self._checked:
                    self._accept(path, config, source, established or Established.from_json(results[i]))
        if faults := [fault for place in dict.fromkeys(places.values()) for fault in self._faults.get(place, ())]:
            raise DataError(faults)
        return {image: self._checked[place] for image, place in places.items()}

    def name(self, path: Path, config: ModalityConfig) -> tuple[str, str]:
        """Return the names of a file and of its check in the index."""
        return os.path.abspath(path), _check_name(config, None, PREPROCESSING_VERSION)

    def _is_checked(self, place: _Place) -> bool:
        return place in self._checked or place in self._faults

    def _look_up(self, path: Path, config: ModalityConfig) -> tuple[_Source | None, Established | None]:
        """Return the source, and what is known about it; (None, None) if it cannot be found."""
        try:
            source = self._look(path, config)
        except DataError:  # the check reports it
            return None, None
        return source, self._find(path, config, source)

    def _look_up_all(self, places: Sequence[_Place], threads: int) -> list[tuple[_Source | None, Established | None]]:
        """Return what `_look_up` returns for each place."""
        return list(map_in_threads(lambda place: self._look_up(*place), places, threads, chunk=64))

    def _read_all(
        self, places: Sequence[tuple[int, Path, ModalityConfig, _Source | None]], threads: int
    ) -> dict[int, dict[str, Any] | list[str]]:
        """Check files. Return {index: what was established, or the faults}, as JSON."""

        def read(place: tuple[int, Path, ModalityConfig, _Source | None]) -> dict[str, Any] | list[str]:
            _, path, config, source = place
            try:
                return self._read_through(path, config, source or self._look(path, config)).to_json()
            except DataError as error:
                return list(error.faults)  # the error itself would keep its frames alive, and in them the opened file

        try:
            with one_blas_thread():
                progress = tqdm(map_in_threads(read, places, threads), "volumes", len(places), disable=None)
                return {i: result for (i, *_), result in zip(places, progress, strict=True)}
        finally:
            if self._known is not None:
                self._known.write(final=True)

    def _look(self, path: Path, config: ModalityConfig) -> _Source:
        """Return a source as it is now, without its content."""
        stats, stat, changed = _stat(path)
        return _Source("", stats, stat, changed, _companions(path, config))  # companions are small

    def _find(self, path: Path, config: ModalityConfig, source: _Source) -> Established | None:
        """Return what is known about a source; None if it must be read."""
        if self._known is None:
            return None
        fields = self._known.find(*self.name(path, config), source.stat)
        with suppress(KeyError, TypeError, ValueError):  # another program wrote it
            established = Established.from_json(fields) if fields else None
            return established if established and established.companions == source.companion_digests else None
        return None

    def _accept(self, path: Path, config: ModalityConfig, source: _Source, established: Established) -> None:
        """Keep what was established about a source, now or earlier."""
        self._sources[path, config] = replace(source, digest=established.sha256, remarks=established.remarks)
        self._checked[path, config], self._axes[path, config] = established.windows, established.axes
        for window, background in established.backgrounds:
            self._backgrounds[path, config, window] = background

    def _read_through(self, path: Path, config: ModalityConfig, source: _Source) -> Established:
        """Check a source to its end, and remember what that established."""
        content = _small_content(path, source)
        source = replace(source, digest=source_digest(path, content))
        established = self._establish(path, config, source, content)
        with self._lock:
            self.num_checked += 1
        self._accept(path, config, source, established)
        if self._known is not None and source.changed < math.inf:
            self._known.add(*self.name(path, config), source.stat, established.to_json())
        return established

    def _establish(
        self, path: Path, config: ModalityConfig, source: _Source, content: bytes | None = None
    ) -> Established:
        """Read and preprocess a source to its end, from its content if that was read before."""
        backgrounds: list[tuple[int, Background]] = []
        image = open_volume(path, config, content)
        count = check_opened(path, image, config, note=lambda *remark: backgrounds.append(remark[2:]))
        self._check_unchanged(path, config, image, source)
        return _established(image, config, source, count, backgrounds)

    def load(self, path: str | Path, config: ModalityConfig, window: int = 0) -> np.ndarray:
        """Do what `load_volume` does, for a file that `check` has read to its end. Raise DataError if it changed."""
        path = Path(path)
        source, image = self._source(path, config), open_volume(path, config)
        volume = preprocess(path, image, config, window)
        self._check_unchanged(path, config, image, source)
        return volume

    def axes(self, path: str | Path, config: ModalityConfig) -> str | None:
        """Return the `axis_codes` of a file."""
        path = Path(path)
        return (
            self._axes[path, config] if (path, config) in self._axes else axis_codes(open_volume(path, config), config)
        )

    def digest(self, path: Path, config: ModalityConfig) -> str:
        """Return the `source_digest` of a file as it was when it was first read."""
        source = self._sources.get((path, config))
        return source.digest if source else source_digest(path)

    def companions(self, path: Path, config: ModalityConfig) -> tuple[tuple[Path, str], ...]:
        """Return (file, SHA-256) of each of the `companion_files` of a checked file."""
        return self._sources[path, config].companions

    def background(self, path: Path, config: ModalityConfig, window: int) -> float | None:
        """Return the background's value in a checked, preprocessed volume; None means the lowest value."""
        return background_level(self._backgrounds.get((path, config, window)), config)

    def background_remarks(self, modalities: Mapping[str, ModalityConfig]) -> list[str]:
        """Return messages about the backgrounds of the checked volumes: unusual ones, and different ones within a
        modality or a run."""
        remarks = [(*place, background) for place, background in self._backgrounds.items()]
        lines = [f"{path}: {text}" for path, text in describe_mixed_windows(remarks, self._checked).items()]
        if len(lines) > 1:
            lines = [f"{lines[0]}; {plural(len(lines) - 1, 'more run')} like it"]
        for modality, backgrounds in group_by_modality(remarks, modalities).items():
            total = sum(config == modalities[modality] for _, config in self._checked)
            lines += summarize_backgrounds(modality, backgrounds, total)
        return lines

    def remarks(self) -> list[str]:
        """Return the contradictions in the headers of the checked files, one line for all files with the same one."""
        paths: dict[str, list[Path]] = {}
        for path, source in sorted({path: source for (path, _), source in self._sources.items()}.items()):
            for remark in source.remarks:
                paths.setdefault(remark, []).append(path)
        return [
            f"{first} and {plural(len(others), 'more file')}: {remark}" if others else f"{first}: {remark}"
            for remark, (first, *others) in paths.items()
        ]

    def _source(self, path: Path, config: ModalityConfig) -> _Source:
        """Return the source as it was when it was first read, or last checked."""
        if (path, config) not in self._sources:
            source = self._look(path, config)  # before hashing, so that a change in between is noticed when it is read
            known = self._find(path, config, source)
            self._sources[path, config] = replace(source, digest=known.sha256 if known else source_digest(path))
        return self._sources[path, config]

    def _check_unchanged(self, path: Path, config: ModalityConfig, image: Voxels, source: _Source) -> None:
        """Raise DataError if the content of the source has changed. Only times and inodes may change."""
        with readable(path):
            same = all(source.stats[i : i + 1].tolist() == [_stamp(image.files[i].stat())] for i in image.files_read)
            changed_files = [file for file, digest in source.companions if sha256(file) != digest]
        if not same:
            stats, stat, _ = _stat(path)
            if source_digest(path) != source.digest:
                changed_files.append(path)
            else:
                self._sources[path, config] = replace(source, stats=stats, stat=stat)
        if changed_files:
            raise DataError(
                f"{changed_files[-1]}: changed since the run began; leave volumes as they are, and start again"
            )


def check_float16(path: Path, volume: np.ndarray) -> None:
    """Raise DataError if a preprocessed volume has values beyond float16."""
    if (largest := max(volume.max(), -volume.min())) > _LARGEST_FLOAT16:
        raise DataError(
            f"{path}: values up to {largest:.6g}, float16 ends at {_LARGEST_FLOAT16:.0f}; "
            "expected data.cache_dtype: float32, or a scaling of the modality"
        )


class VolumeCache(Sources):
    """`Sources` that keeps preprocessed volumes on disk. Safe for threads, and for processes that share the directory.

    Args:
        dtype: float32 keeps exactly the numbers of `load_volume`. float16 rounds, whether the entry is read or just
            made, so both give the same numbers: relative error at most 2⁻¹¹ (4.9e-4); below 6.1e-5, absolute error at
            most 3e-8. Values beyond ±65504 are an error.
        strict: raise OSError if an entry cannot be written (a full disk, a read-only directory). Otherwise this is one
            warning, and no further entries are written.
        verify: let `check` read each entry completely, not only its header.
    """

    def __init__(self, directory: str | Path, dtype: str = "float32", *, strict: bool = False, verify: bool = False):
        super().__init__(CheckedFiles(directory))
        self.directory, self.dtype = Path(directory), np.dtype(dtype)
        self.num_made, self.num_found, self.nbytes = 0, 0, 0
        self._strict, self._verify, self._writes = strict, verify, True
        with suppress(OSError):  # the directory or the file may not exist
            for file in (self.directory / "tmp").iterdir():
                if time.time() - file.stat().st_mtime > ABANDONED:
                    file.unlink()

    @classmethod
    def from_config(cls, data: DataConfig) -> Sources:
        """Return the cache that a configuration names; if it names none, `Sources` with the index of this user."""
        return Sources(CheckedFiles.of_user()) if data.cache is None else cls(data.cache, data.cache_dtype)

    def _find(self, path: Path, config: ModalityConfig, source: _Source) -> Established | None:
        """Return what is known about a source that has all its entries; only their sizes are looked at."""
        established = super()._find(path, config, source)
        if established is None or self._verify:
            return None
        source, sizes = replace(source, digest=established.sha256), []
        smallest = math.prod(config.size) * self.dtype.itemsize
        for window in range(established.windows):
            try:
                sizes.append(self._file(self._key(source, config, window)).stat().st_size)
            except OSError:
                return None
            if sizes[-1] <= smallest:  # it is cut off
                return None
        self._count("num_found", *sizes)
        return established

    def _establish(
        self, path: Path, config: ModalityConfig, source: _Source, content: bytes | None = None
    ) -> Established:
        """Do what `Sources` does, and keep the volumes.

        With `verify`, a known source that has all its entries is not opened.

        Raises:
            DataError: as `load_volume`; also if the source changes meanwhile, or has values beyond float16.
            OSError: an entry cannot be written, if `strict`.
        """
        known = super()._find(path, config, source) if self._verify else None
        if known is not None and known.sha256 != source.digest:  # it changed, and its `stat` did not
            known = None
        image: Voxels | None = None
        if known is not None:
            count = known.windows
        else:
            image = open_volume(path, config, content)
            count = count_windows(image, config)
        backgrounds: list[tuple[int, Background]] = []
        with nullcontext() if image is None else checked_to_end(image):
            for window in reading_order(count, config):
                key = self._key(source, config, window)
                entry = self._read(key, config, header_only=not self._verify)
                if entry:
                    self._count("num_found", self._file(key).stat().st_size)
                    if background := entry[0]["background"]:
                        backgrounds.append((window, Background(**json.loads(background))))
                else:
                    image = image or open_volume(path, config)
                    backgrounds += self._make(path, image, config, window, source)[1]
        if image is None:
            assert known is not None
            return known
        self._check_unchanged(path, config, image, source)
        return _established(image, config, source, count, backgrounds)

    def name(self, path: Path, config: ModalityConfig) -> tuple[str, str]:
        return os.path.abspath(path), _check_name(config, self.dtype.name, PREPROCESSING_VERSION)

    def is_missing(self, images: Iterable[Image], modalities: Mapping[str, ModalityConfig], threads: int) -> list[bool]:
        """Return for each image whether `check` would read its file: new, changed, faulty, or without its entries."""
        places = [(image.path, modalities[image.modality]) for image in images]
        assert self._known is not None
        self._known.read({self.name(*place) for place in places})
        return [known is None for _, known in self._look_up_all(places, threads)]

    def load(self, path: str | Path, config: ModalityConfig, window: int = 0) -> np.ndarray:
        """Do what `load_volume` does, from the cache if possible. Return float32, C-contiguous.

        After `check`, this is the content that the source had then; the source itself is not looked at.
        """
        path = Path(path)
        source = self._source(path, config)
        entry = self._read(self._key(source, config, window), config)
        volume = entry[1] if entry else self._make(path, open_volume(path, config), config, window, source)[0]
        return _widen(volume) if volume.dtype == np.float16 else volume

    def axes(self, path: str | Path, config: ModalityConfig) -> str | None:
        """Return the `axis_codes` of a file, from its first entry if possible."""
        path = Path(path)
        if (path, config) in self._axes:
            return self._axes[path, config]
        entry = self._read(self._key(self._source(path, config), config, 0), config, header_only=True)
        return (entry[0]["axes"] or None) if entry else super().axes(path, config)

    # entries

    def _key(self, source: _Source, config: ModalityConfig, window: int) -> str:
        """Return the key of an entry: everything its numbers depend on."""
        key = {
            "source": source.digest,
            "modality": _parameters(config),
            "window": window,
            "dtype": self.dtype.name,
            "preprocessing": PREPROCESSING_VERSION,
        }
        if source.companions:
            key["companions"] = list(source.companion_digests)
        return json.dumps(key, sort_keys=True)

    def _file(self, key: str) -> Path:
        return self.directory / "volumes" / _spread(_sha256(key), ".safetensors")

    def _read(
        self, key: str, config: ModalityConfig, *, header_only: bool = False
    ) -> tuple[dict[str, str], np.ndarray] | None:
        """Read metadata and volume of an entry; with `header_only` the volume is empty.

        Return None if there is no entry, or, with a warning, if it is damaged.
        """
        file, volume = self._file(key), np.empty(0, self.dtype)
        nbytes = math.prod(config.size) * self.dtype.itemsize
        tensor = {"dtype": _CODES[self.dtype.name], "shape": list(config.size), "data_offsets": [0, nbytes]}
        try:
            # Not with safe_open, which maps the file: if a network file system replaces or loses a mapped file, SIGBUS
            # kills the process.
            with file.open("rb") as entry:
                length = int.from_bytes(entry.read(8), "little")
                if 8 + length + nbytes != os.fstat(entry.fileno()).st_size:
                    raise ValueError("wrong length")
                header = parse_json(entry.read(length).decode(), file, DataError, "remove it")
                metadata: dict[str, str] = header["__metadata__"]
                if (header["volume"], metadata["key"]) != (tensor, key):
                    raise ValueError("wrong key, type or shape")
                if not header_only:
                    volume = np.empty(config.size, self.dtype)
                    entry.readinto(volume.data.cast("B"))
                    if zlib.crc32(volume.data) != int(metadata["crc32"]):
                        raise ValueError("wrong checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s: a damaged volume (%s); made again", file, error)
            return None
        return metadata, volume

    def _make(
        self, path: Path, image: Voxels, config: ModalityConfig, window: int, source: _Source
    ) -> tuple[np.ndarray, list[tuple[int, Background]]]:
        """Preprocess a volume and write its entry. Return it in the type of the cache, with an unusual background."""
        backgrounds: list[tuple[int, Background]] = []
        volume = preprocess(path, image, config, window, note=lambda *remark: backgrounds.append(remark[2:]))
        self._check_unchanged(path, config, image, source)  # a changed volume would be kept under the old digest
        if self.dtype == np.float16:
            check_float16(path, volume)
        volume = np.ascontiguousarray(volume, self.dtype)  # safetensors writes other memory orders wrongly
        key = self._key(source, config, window)
        metadata = {
            "key": key,
            "path": os.path.abspath(path),
            "axes": axis_codes(image, config) or "",
            "background": "".join(json.dumps(asdict(background)) for _, background in backgrounds),
            "windows": str(count_windows(image, config)),
            "crc32": str(zlib.crc32(volume.data)),
            "versions": f"numpy {np.__version__}, nibabel {nib.__version__}",
        }
        content = save({"volume": volume}, metadata)
        if self._write(self._file(key), content):
            self._count("num_made", len(content))
        return volume, backgrounds

    def _write(self, file: Path, content: bytes) -> bool:
        """Write a file atomically. Return whether it was written."""
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
                    _log.warning("%s: no more volumes are kept: %s", self.directory, error)
                self._writes = False
            return False
        return True

    def _count(self, counter: str, *sizes: int) -> None:
        """Count entries and their sizes in bytes."""
        with self._lock:
            setattr(self, counter, getattr(self, counter) + len(sizes))
            self.nbytes += sum(sizes)


def fill_cache(config: RunConfig, *, verify: bool = False, shard: str | None = None) -> list[str]:
    """Put every volume of a run's training and evaluation data into its cache. Return lines with the counts.

    Several processes that fill one directory, on one machine or many, share the work: without `shard`, each takes the
    files in a random order.

    Args:
        verify: read every existing entry, and make damaged ones again.
        shard: "I/N": only the Ith of N parts of the files, I from 1. The lines then name the parts that are missing.

    Raises:
        ConfigError: the configuration names no cache or no data, or `shard` no part.
        DataError: with every fault of the conversation files; if these are good, with every fault of the volumes. Good
            volumes are kept.
        OSError: an entry cannot be written.
    """
    data, modalities = config.data, config.model.modalities
    paths = [path for path in (data.train, data.eval) if path is not None]
    faults = Faults()
    if not data.cache:
        faults.append("data.cache: expected a directory (--cache D)")
    if not paths:
        faults.append("data.train: expected a path (--train-data PATH), or data.eval (--eval-data PATH)")
    part = (1, 1) if shard is None else _parse_shard(shard)
    if part is None:
        faults.append(f"--shard {shard}: expected I/N, the Ith of N parts, such as 1/40 to 40/40")
    faults.raise_as(ConfigError)
    assert part is not None
    number, count = part
    check_output(Path(str(data.cache)), "choose another directory (--cache DIR)", folder=True)
    images: dict[Image, None] = {}
    for path in paths:
        with faults:
            conversations = read_with_config(path, modalities, data)
            images |= dict.fromkeys(conversations.images)
    faults.raise_as(DataError)
    cache, everything = VolumeCache(str(data.cache), data.cache_dtype, strict=True, verify=verify), list(images)
    own = everything[number - 1 :: count]
    cache.check_all(own if shard else random.Random().sample(own, len(own)), modalities, data.threads)
    lines = [
        f"{cache.directory}: {len(own)} files, {cache.num_made + cache.num_found} volumes in {data.cache_dtype}: "
        f"{cache.num_made} made, {cache.num_found} found; {cache.nbytes / 1e6:.1f} MB"
    ]
    if shard:
        is_missing = VolumeCache(str(data.cache), data.cache_dtype).is_missing(everything, modalities, data.threads)
        missing = _missing_shards(is_missing, number, count)
        lines.append(
            f"part {number} of {count} is complete; " + (f"missing: {missing}" if missing else "all are there")
        )
    return lines


def _parse_shard(shard: str) -> tuple[int, int] | None:
    number, _, count = shard.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    return None


def _missing_shards(is_missing: Sequence[bool], own: int, count: int) -> str:
    """Return the parts with missing files, such as "7/40 (12 of 1000 files)".

    The part that was just filled is not one of them: its files may be too new for the index.
    """
    missing = []
    for number in range(1, count + 1):
        part = is_missing[number - 1 :: count]
        if number != own and any(part):
            missing.append(f"{number}/{count} ({sum(part)} of {plural(len(part), 'file')})")
    return ", ".join(missing)


@lru_cache
def _parameters(config: ModalityConfig) -> dict[str, Any]:
    """Return the parameters that preprocessing depends on: all except the patch, and those that are off."""
    off = [
        name for name in ("tr", "confounds") if getattr(config, name) is None
    ]  # so the entries of older versions stay valid
    return {name: value for name, value in config.meaning.items() if name not in ("patch", *off)}


@lru_cache
def _check_name(config: ModalityConfig, dtype: str | None, version: int) -> str:
    """Return a hash of everything that the result of a check depends on, and of the type of a cache's entries."""
    check = {
        "modality": _parameters(config),
        "preprocessing": version,
        "checks": CHECKS_VERSION,
        "nibabel": nib.__version__,
    }
    check |= {} if dtype is None else {"dtype": dtype}
    return _sha256(json.dumps(check, sort_keys=True))[:16]


def _established(
    image: Voxels, config: ModalityConfig, source: _Source, windows: int, backgrounds: Iterable[tuple[int, Background]]
) -> Established:
    """Return what the check of an opened source to its end established."""
    found = axis_codes(image, config), tuple(image.remarks), tuple(sorted(backgrounds, key=lambda found: found[0]))
    return Established(source.digest, windows, *found, companions=source.companion_digests)


def _companions(path: Path, config: ModalityConfig) -> tuple[tuple[Path, str], ...]:
    """Return (file, SHA-256) of each of the `companion_files`."""
    with readable(path):
        return tuple((file, sha256(file)) for file in companion_files(path, config))


def _widen(volume: np.ndarray) -> np.ndarray:
    """Convert finite float16 to float32 exactly, in a third of the time of `astype`.

    Sign, exponent and fraction are shifted to their place in float32. The factor 2¹¹² corrects the bias of the
    exponent, 127 - 15, and is also right for subnormal numbers.
    """
    bits = volume.view(np.int16).astype(np.int32)  # sign extension fills the bits above the exponent, cleared below
    bits <<= 13
    bits &= ~0x70000000
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


def _stat(path: Path) -> tuple[np.ndarray, str, float]:
    """Return `stats`, `stat` and `changed` of a `_Source`."""
    with readable(path):
        files = [(file, file.stat()) for file in source_files(path)]
    stats = np.array([_stamp(s) for _, s in files], np.int64)
    return stats, *describe_stat(files)


def _stamp(s: os.stat_result) -> int:
    return hash((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino))


def source_digest(path: Path, content: bytes | None = None) -> str:
    """Return the SHA-256 of a source: of the suffix of each file, or the name of a frame, and its content's SHA-256.

    Args:
        content: of a single file, if it was read before.
    """
    parts = []
    with readable(path):
        if content is not None:
            parts.append([path.suffix, hashlib.sha256(content).hexdigest()])
        for file in source_files(path) if content is None else ():
            parts.append([file.name if path.is_dir() else file.suffix, sha256(file)])
    return _sha256(json.dumps(parts))


def _small_content(path: Path, source: _Source) -> bytes | None:
    """Return the bytes of a single, small file, so that it is opened once; None for anything else."""
    with readable(path):
        if len(source.stats) > 1 or path.is_dir() or path.stat().st_size > _SMALL_FILE:
            return None
        with open(path, "rb", opener=regular_file) as file:
            return file.read(_SMALL_FILE + 1)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _spread(name: str, suffix: str) -> Path:
    """Spread files over 256 directories, because some file systems are slow with many files in one."""
    return Path(name[:2], name + suffix)
