"""Write files atomically, with the file's name in every error; check output paths; lock directories."""

import errno
import fcntl
import io
import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from umbrella_jax.errors import ConfigError, RunError, visible

SHARED, PRIVATE = 0o666, 0o600
"""Modes of new files, before the umask. Files with participant data are PRIVATE."""
LOCK = ".lock"
"""Name of the file in a directory that `locked` locks."""
_LONGEST = 240
"""Bytes of an output's name. File systems allow 255, and a file has a longer name while it is written."""
_DEEPEST = 3800
"""Bytes of an output's path. Linux allows 4096, and the files of a checkpoint have paths about 150 bytes longer."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full_errno(error: BaseException) -> int | None:
    """Return the errno if an error from the system or tensorstore means that the disk is full, else None."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return error.errno
    # tensorstore's errors are not OSErrors, but quote the system's
    return next((n for n in _FULL if errno.errorcode[n] in str(error) or os.strerror(n) in str(error)), None)


def open_private(path: str, flags: int) -> int:
    """Open a file, as an `opener` of `open`. A new file is readable only by its owner."""
    return os.open(path, flags, PRIVATE)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block, because a failed write, say on a full disk, does not name its file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_output(path: str | Path, remedy: str, *, folder: bool) -> None:
    """Check that a file, or with `folder` a directory, can be written at `path`. Leaves nothing there.

    Raises ConfigError, with the cause and the `remedy`, in four cases: there is a file in place of a directory, or the
    reverse; there is a device or a pipe, which a write would replace (even /dev/null, for all users); the directory
    takes no new files (it is read-only, under /proc or another user's); the name is too long.
    """
    absolute = Path(path).absolute()
    if any(len(os.fsencode(part)) > _LONGEST for part in absolute.parts) or len(os.fsencode(absolute)) > _DEEPEST:
        limits = f"{_LONGEST} bytes, and {_DEEPEST} with its folders"
        raise ConfigError(f"{path}: name too long, expected at most {limits}; {remedy}")
    if not folder and absolute.is_dir():
        raise ConfigError(f"{path}: a directory, not a file; {remedy}")
    if not folder and absolute.exists() and not absolute.is_file():
        raise ConfigError(f"{path}: a device or a pipe, not a regular file; {remedy}")
    folders = [absolute, *absolute.parents] if folder else absolute.parents
    nearest = next(parent for parent in folders if os.path.lexists(parent))
    if not nearest.is_dir():
        kind = "a broken link" if nearest.is_symlink() else "a file, not a directory"
        raise ConfigError(f"{path}: {kind if nearest == absolute else f'{nearest} is {kind}'}; {remedy}")
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # has no name on most file systems, so a kill leaves nothing
    except OSError as error:
        # a pseudo file system (/proc, /sys) reports that there is no such file
        cause = "it takes no new files" if error.errno in (errno.ENOENT, errno.EINVAL) else error.strerror
        raise ConfigError(f"{path}: {nearest} cannot be written to: {cause}; {remedy}") from None


def check_run_name(path: str | Path, remedy: str) -> None:
    """Raise ConfigError if orbax or tensorstore could not read back what they write at `path`."""
    absolute = os.path.abspath(path)
    if "\\" in absolute:
        raise ConfigError(f"{path}: checkpoints cannot be read from a path with a backslash ({absolute}); {remedy}")
    if schemes := {"gs:", "s3:", "az:", "hf:"}.intersection(absolute.split("/")):
        raise ConfigError(f"{path}: a folder named {min(schemes)} is taken for a cloud's address; {remedy}")
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{absolute!a}: checkpoints need a path in UTF-8; {remedy}") from None


def relative_path(path: Path, folder: Path) -> str:
    """Return the path from a folder to a file or folder; `..` is the parent of where a linked folder really is."""
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(folder))


def check_new_folder(out: str | Path) -> None:
    """Check that `new_folder` can make `out`. Raise ConfigError if it is not empty, and as `check_output` does."""
    out = Path(out)
    check_output(out, "choose another directory", folder=True)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out}: directory is not empty; choose another")
    if os.path.ismount(out):
        raise ConfigError(f"{out}: a mount point cannot be replaced; name a folder inside it")


@contextmanager
def new_folder(out: str | Path, mode: int = 0o777) -> Iterator[Path]:
    """Write a directory atomically: the block fills a temporary one, which becomes `out` at the end.

    The temporary directory is `.NAME.part` next to `out`, locked by this process. If a killed process left one there,
    its content is removed first. If the block fails, the temporary directory is removed.

    Raises ConfigError as `check_new_folder` does, or if another process is writing `out`; OSError naming `out`.
    """
    check_new_folder(out)
    final = Path(os.path.realpath(out))
    part = final.with_name(f".{final.name}.part")
    with naming(Path(out)):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir(mode, exist_ok=True)
    with locked(part, "wait until that has ended, or choose another directory", named=Path(out)):
        try:
            for path in part.iterdir():
                if path.name != LOCK:
                    _remove(path)
            yield part
            with naming(Path(out)):
                sync(part)
                part.rename(final)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, OSError) and Path(error.filename or part).is_relative_to(part):
                inner = Path(error.filename or part).relative_to(part)
                raise OSError(error.errno, error.strerror, str(Path(out) / inner)) from None
            raise
        (final / LOCK).unlink(missing_ok=True)


def rewrite_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the directory at `path` by one that `write` fills. Keep it if its content is the same.

    A kill in between leaves the old directory or none, never half of one.
    """
    part, old = (path.with_name(f".{path.name}.{end}") for end in ("part", "old"))
    with naming(path):
        _remove(old)
        _remove(part)
        try:
            part.mkdir()
            write(part)
            if _contents(part) != _contents(path):
                sync(part)
                if os.path.lexists(path):
                    path.rename(old)
                part.rename(path)
        finally:
            _remove(part)
        _remove(old)


def _contents(folder: Path) -> dict[str, bytes]:
    """Return {relative path: content} of all files in a directory."""
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Flush a directory and all its files to the disk, so that no file is empty if the power fails after a rename."""
    for root, _, files in os.walk(folder):
        for name in files:
            _fsync(os.path.join(root, name))
        with suppress(OSError):  # a file system that cannot flush directories does not need it
            _fsync(root)


def _fsync(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_whole(path: Path, content: str | bytes, mode: int = SHARED) -> None:
    """Write a file atomically. Replace an existing one."""
    aside = path.with_name(f".{path.name}.part")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with naming(path):
        try:
            aside.unlink(missing_ok=True)  # a killed process may have left one, with another mode
            with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def append_line(file: int, path: Path, line: bytes) -> None:
    """Append a line to an open file. If that fails, remove the incomplete line.

    Raises OSError; RunError if the file was deleted, moved or replaced, so that `path` is another file now.
    """
    with naming(path):
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file)):
            raise RunError(f"{path}: deleted, moved or replaced while it was being written; start again")
        size = os.fstat(file).st_size
        try:
            while line:
                line = line[os.write(file, line) :]
        except OSError:
            os.ftruncate(file, size)
            raise


@contextmanager
def locked(
    directory: Path,
    remedy: str = "wait until that has ended, or choose another output_dir (--out DIR)",
    named: Path | None = None,
) -> Iterator[None]:
    """Lock a directory for the block: only one process at a time holds the `flock` of its file `.lock`.

    The kernel releases the lock when the process ends, however it ends. On NFS, the lock works between hosts; if a host
    is lost, it ends with the host's lease, after about 90 s. On a file system without locks (Lustre with `noflock`)
    nothing is locked.

    Raises ConfigError if another process holds the lock. The message names that process and `named`, by default the
    directory.
    """
    path = directory / LOCK
    with naming(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, SHARED)
    try:
        take_lock(file, named or directory, remedy)
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(file)


def is_locked(directory: Path) -> bool:
    """Return whether a process holds the lock of a directory (`locked`). Takes the lock for an instant to find out."""
    try:
        file = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:  # no lock file, or an unreadable one: not one of our processes
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False


def take_lock(file: int, path: Path, remedy: str) -> None:
    """Lock an open file until it is closed. Raise ConfigError if another process holds the lock."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # `is_locked` may have held it for an instant
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        first = os.pread(file, 1000, 0).decode(errors="replace")
        holder = first if first.startswith("process ") else "another process"
        raise ConfigError(f"{path}: {holder} is writing to it; {remedy}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def strict_json(value: Any, **options: Any) -> str:
    """Return `value` as JSON that every reader accepts: NaN and infinity become null.

    Args:
        options: those of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def yaml_text(mapping: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in the mapping's order; characters that a terminal hides are escaped."""
    from ruamel.yaml import YAML

    def dump(*, allow_unicode: bool) -> str:
        out, yaml = io.StringIO(), YAML(typ="safe", pure=True)
        yaml.default_flow_style, yaml.allow_unicode = None, allow_unicode
        yaml.sort_base_mapping_type_on_output = False
        yaml.dump(mapping, out)
        return out.getvalue()

    text = dump(allow_unicode=True)
    return text if visible(text) == text else dump(allow_unicode=False)


def _finite(value: Any) -> Any:
    """Return a copy of a JSON value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
