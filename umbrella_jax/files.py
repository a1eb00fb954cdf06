"""Writing that is whole or not at all, and says where it fails; and a directory for one run alone."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from umbrella_jax.errors import ConfigError, RunError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within it names `path`: what a write raises, on a full disk say, does not say of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def new_folder(out: str | Path) -> Path:
    """The path, if nothing is there yet. Raises ConfigError otherwise."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: not an empty folder; nothing is overwritten, give a new one")
    return out


def write_whole(path: Path, text: str) -> None:
    """Puts a file there, or in the place of another one, as a whole: never half of it, whatever happens meanwhile."""
    aside = path.with_name(f".{path.name}.part")
    with naming(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def append(file: int, path: Path, line: bytes) -> None:
    """Writes a line behind the others of an open file, or takes away what of it was written.

    Raises OSError, and RunError where the file at `path` is no longer this one: deleted, moved or replaced.
    """
    with naming(path):
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file)):
            raise RunError(f"{path}: deleted, moved or replaced while the run was writing to it; the run ends")
        size = os.fstat(file).st_size
        try:
            while line:
                line = line[os.write(file, line) :]
        except OSError:
            os.ftruncate(file, size)
            raise


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A block that one process at a time is in, of all that name this directory; it holds `.lock` with `flock`.

    The kernel lets go when the process ends, however it ends. On NFS the lock holds between hosts and ends with the
    host's lease, some 90 s, where that is lost; on a file system without locks (Lustre with `noflock`) there is none.

    Raises ConfigError where another process is in it, naming that.
    """
    path = directory / ".lock"
    with naming(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        hold(file, directory, "name another output_dir (--out DIR)")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(file)


def is_locked(directory: Path) -> bool:
    """Whether a process is in a block that is `locked`. Takes the lock for an instant, to see whether it can."""
    try:
        file = os.open(directory / ".lock", os.O_RDONLY)
    except OSError:  # none, or not to be read: nobody of ours
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


def hold(file: int, path: Path, remedy: str) -> None:
    """Takes the lock of an open file, until it is closed. Raises ConfigError where another process has it."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # it may have been a look (`is_locked`)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        first = os.pread(file, 1000, 0).decode(errors="replace")
        holder = first if first.startswith("process ") else "another process"
        raise ConfigError(f"{path}: {holder} is writing to it; wait until that has ended, or {remedy}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
