"""Remember what the check of each volume established, so that the next start only calls `stat` on it.

    DIR/checked/TIME-ID.jsonl.gz    what one process checked; a line of JSON for each volume

The folder is in `data.cache`, or without a cache in `~/.cache/umbrella-jax` (`$XDG_CACHE_HOME/umbrella-jax`). `zcat`
and every library that reads JSON Lines show it:

    {"path": "/data/sub-01_T1w.nii.gz", "check": "5d0b…", "stat": "…", "sha256": "…", "windows": 1, "axes": "RAS", …}

An entry holds for a path, a modality and a version of our checks (`check`), as long as `stat` is the same: names,
targets of links, sizes and both times of the files (`mtime`, `ctime`). A change of the content that leaves all of these
is not noticed; `umbrella-jax data validate` reads every volume, and if you remove the folder, so does the next start.
Faults are never remembered, so a faulty volume is read, and reported, at every start.

Any number of processes and hosts write here without locks: each writes files of its own, under a temporary name that is
then renamed, so a killed process leaves whole files only. If there are many, the next start merges them. You may delete
the folder at any time.
"""

import gzip
import hashlib
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from isal import igzip, igzip_lib

from umbrella_jax.data.background import Background
from umbrella_jax.io.files import strict_json

_log = logging.getLogger(__name__)
_SECONDS = 30.0
"""Seconds of work after which it is written, so that a killed start loses no more."""
_MANY = 32
"""Number of files from which on they are merged."""
_DAMAGED = (
    gzip.BadGzipFile,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RecursionError,
    cast(type[Exception], igzip_lib.IsalError),
)
SETTLED = 2.0
"""Seconds without a change before a file is remembered."""
ABANDONED = 3600.0
"""Seconds after which a temporary file is assumed to be left over from a crash."""


@dataclass(frozen=True)
class Established:
    """What the check of a volume established; the same messages can be made from it as from the check."""

    sha256: str
    """`source_digest` of the volume."""
    windows: int
    axes: str | None
    """Its `axis_codes`."""
    remarks: tuple[str, ...] = ()
    """Contradictions in its header."""
    backgrounds: tuple[tuple[int, Background], ...] = ()
    """(window, background) of the windows with an unusual background."""
    companions: tuple[str, ...] = ()
    """SHA-256 of each of its `companion_files`."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, without empty ones."""
        fields = {name: value for name, value in vars(self).items() if value not in ((), None)}
        if self.backgrounds:
            fields["backgrounds"] = [[window, asdict(background)] for window, background in self.backgrounds]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Established":
        """Return what `to_json` wrote, among other fields. Raises KeyError, TypeError or ValueError for the rest."""
        sha256, windows, axes = fields["sha256"], fields["windows"], fields.get("axes")
        if not (isinstance(sha256, str) and isinstance(windows, int) and isinstance(axes, str | None) and windows > 0):
            raise TypeError
        return cls(
            sha256,
            windows,
            axes,
            tuple(fields.get("remarks", ())),
            tuple((window, Background(**background)) for window, background in fields.get("backgrounds", ())),
            tuple(fields.get("companions", ())),
        )


class CheckedFiles:
    """The files that were checked before. Safe for threads, and for processes that share the directory.

    Args:
        directory: holds the folder.
        folder: its name.
        private: whether only this user may read the folder, since it names participants.
    """

    def __init__(self, directory: str | Path, folder: str = "checked", *, private: bool = False):
        self.directory = Path(directory) / folder
        self._private = private
        self._entries: dict[tuple[str, str], str] | None = None
        self._lock = threading.Lock()
        self._new: list[str] = []
        self._own: list[Path] = []
        self._written = time.monotonic()
        self._writes = True

    @classmethod
    def of_user(cls, folder: str = "checked") -> "CheckedFiles | None":
        """Return the index of this user; None if the user has no home."""
        root = Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            root = root if root.is_absolute() else Path.home() / ".cache"  # as the XDG specification says
        except RuntimeError:
            return None
        return cls(root / "umbrella-jax", folder, private=True)

    def read(self, wanted: Container[tuple[str, str]] | None = None) -> None:
        """Read the entries of (path, check) pairs, all by default, instead of those that are in memory.

        Damaged files are ignored, with a warning.
        """
        entries: dict[tuple[str, str], str] = {}
        for line, key in self._lines():
            if wanted is None or key in wanted:
                entries[key] = line
        with self._lock:
            self._entries = entries

    def find(self, path: str, check: str, stat: str) -> dict[str, Any] | None:
        """Return the fields of a file that is as it was; None if it must be checked."""
        if self._entries is None:
            self.read()
        assert self._entries is not None
        line = self._entries.get((path, check))
        fields: dict[str, Any] = {} if line is None else json.loads(line)
        return fields if fields.get("stat") == stat else None

    def add(self, path: str, check: str, stat: str, fields: Mapping[str, Any]) -> None:
        """Remember a file; it is on disk after `write`, or half a minute later."""
        line = strict_json({"path": path, "check": check, "stat": stat, **fields})
        with self._lock:
            self._new.append(line)
            if self._entries is not None:
                self._entries[path, check] = line
            is_due = time.monotonic() - self._written > _SECONDS
        if is_due:
            self.write()

    def write(self, *, final: bool = False) -> None:
        """Write what is new, into one file for this process if `final`; merge the files of all if they are many.

        A full disk or a read-only folder is a warning: later starts check these volumes again.
        """
        with self._lock:
            lines, self._new, self._written = self._new, [], time.monotonic()
            if not self._writes:
                return
            try:
                if lines:
                    self._own.append(self._put("\n".join(lines) + "\n"))
                if final and len(self._own) > 1:
                    self._merge(self._own)
                    self._own = []
                if final and len(files := self._files()) > _MANY:
                    self._merge(files)
            except OSError as error:
                self._writes = False
                _log.warning(
                    "%s: cannot remember which volumes were checked: %s; the next start checks them again",
                    self.directory,
                    error.strerror or error,
                )

    def _files(self) -> list[Path]:
        """Return the files, oldest first."""
        return sorted(self.directory.glob("*.jsonl.gz"))

    def _lines(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (line, (path, check)) of all entries, oldest first."""
        done: set[str] = set()
        for _ in range(3):  # while another process merges, files disappear after the merged one has appeared
            files, is_complete = [file for file in self._files() if file.name not in done], True
            for file in files:
                try:
                    yield from _parsed(file)
                    done.add(file.name)
                except FileNotFoundError:
                    is_complete = False
                except _DAMAGED as error:
                    _log.warning("%s: damaged (%s), removed; its volumes are checked again", file, error)
                    done.add(file.name)
                    with suppress(OSError):
                        file.unlink()
                except OSError as error:
                    _log.warning("%s: cannot be read (%s); its volumes are checked again", file, error.strerror)
                    done.add(file.name)
            if is_complete:
                return

    def _merge(self, files: list[Path]) -> None:
        """Write the newest entries of some files as one file, and remove these."""
        entries: dict[tuple[str, str], str] = {}
        for file in files:
            try:
                for line, key in _parsed(file):
                    entries.pop(key, None)
                    entries[key] = line
            except (OSError, *_DAMAGED):  # another process merges them, or the next start removes one
                return
        self._put("\n".join(entries.values()) + "\n")
        for file in files:
            with suppress(OSError):  # another process removed it, or it is another user's
                file.unlink()

    def _put(self, text: str) -> Path:
        """Write a file atomically."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700 if self._private else 0o777)
        for part in self.directory.glob("*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        part, file = self.directory / f"{name}.part", self.directory / f"{name}.jsonl.gz"

        def open_part(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600 if self._private else 0o666)

        try:
            with open(part, "xb", opener=open_part) as out:
                out.write(gzip.compress(text.encode("utf-8", "surrogateescape"), 6, mtime=0))
                out.flush()
                os.fsync(out.fileno())
            part.replace(file)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
        return file


def describe_stat(files: Iterable[tuple[Path, os.stat_result]]) -> tuple[str, float]:
    """Return a hash of the names, targets of links, sizes and times of files, and the time of the last change.

    The time, in seconds, is infinite if a file changed so recently that another change within a tick of the file
    system's clock would leave everything the same: it must not be remembered.
    """
    files = list(files)
    # Without inodes: file systems in user space, such as gcsfuse, number files anew on each host.
    identity = [[_name(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for file, s in files]
    changed = max(max(s.st_mtime, s.st_ctime) for _, s in files)
    text = strict_json(identity).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()[:32], changed if time.time() - changed > SETTLED else math.inf


def _name(file: Path) -> str:
    """Return the name of a file, with the target of a link.

    Two files may have the same size and times, since a clock ticks every few milliseconds.
    """
    try:
        return f"{file.name} -> {os.readlink(file)}"
    except OSError:
        return file.name


def _parsed(file: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (line, (path, check)) of each entry of a file."""
    with igzip.open(file, "rt", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = json.loads(line)
            path, check = fields["path"], fields["check"]
            if not (isinstance(path, str) and isinstance(check, str)):
                raise ValueError("an entry without a path")
            yield line.rstrip("\n"), (path, check)
