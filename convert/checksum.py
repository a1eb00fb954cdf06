"""CRC-32 of each tensor of an export, of each file of a native checkpoint, and of the small files beside them."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

from isal import isal_zlib

from umbrella_jax.errors import CheckpointError

KEY = "checksums"
"""Field that records the checksums of weights, in `umbrella_config.json` or the metadata of a safetensors file."""
FILES = "files"
"""Field of `umbrella_config.json` that records the checksums of the small files beside it: config.json, tokenizer."""
PIECE = 512 << 10
"""Bytes to read at once. They are summed while still in the CPU cache, which takes a twentieth of the reading time."""
Buffer = bytes | bytearray | memoryview


def crc32(data: Buffer, start: int = 0) -> int:
    """Return the CRC-32 of `data`, continued from `start`, the CRC-32 of the data before it.

    Several times as fast as zlib's.
    """
    return int(isal_zlib.crc32(data, start))


def read_checksums(value: Any, file: Path, key: str = KEY) -> dict[str, str]:
    """Return `value`, the checksums that `file` records under `key`.

    Raises CheckpointError if it is not an object of strings.
    """
    if not isinstance(value, dict) or not all(isinstance(checksum, str) for checksum in value.values()):
        raise CheckpointError(f"{file}: {key}: expected {{name: checksum}}; convert or export it again")
    return value


class TensorCheck:
    """Compare a tensor's bytes in a file with its recorded checksum, once, at the first read."""

    def __init__(self, path: Path, name: str, start: int, nbytes: int, expected: str, source: str):
        """Check `nbytes` bytes from `start` against the checksum `expected`; messages name its `source`."""
        self._path, self._name, self._start, self._nbytes = path, name, start, nbytes
        self._expected, self._source = expected, source
        self.done = False

    def compare(self, crc: int) -> None:
        """Raise CheckpointError if `crc`, the checksum of all the tensor's bytes, is not the recorded one."""
        if f"{crc:08x}" != self._expected:
            raise CheckpointError(
                f"{self._path}: {self._name}: other bytes than {self._source} records: damaged, or saved again by "
                f"another program; copy or export it again, or, if the change is on purpose, delete {KEY} there"
            )
        self.done = True

    def ensure(self) -> None:
        """Read and check the whole tensor, unless it was checked before."""
        if self.done:
            return
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start)
            self.compare(_crc_of(file, self._nbytes))


def _crc_of(file: FileIO, nbytes: int) -> int:
    """Return the CRC-32 of the next `nbytes` of a file, or of fewer at its end."""
    buffer, crc = memoryview(bytearray(PIECE)), 0
    while nbytes and (count := file.readinto(buffer[:nbytes])):
        crc, nbytes = crc32(buffer[:count], crc), nbytes - count
    return crc


def file_checksum(path: Path) -> str:
    """Return the CRC-32 of a file, in hex."""
    with path.open("rb", buffering=0) as file:
        return f"{_crc_of(file, os.fstat(file.fileno()).st_size):08x}"


def folder_checksums(folder: Path) -> dict[str, str]:
    """Return {path below `folder`: CRC-32 in hex} of all files."""
    files = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        checksums = pool.map(file_checksum, files)
        return {file.relative_to(folder).as_posix(): crc for file, crc in zip(files, checksums, strict=True)}


def check_folder(folder: Path, expected: Mapping[str, str], source: Path) -> None:
    """Read every file of `folder` and compare it with the checksums `expected`, which `source` records.

    Raises CheckpointError with every file that differs, is missing or is not recorded. Hidden files may be unrecorded.
    """
    found = folder_checksums(folder)
    faults = [f"{folder / name}: missing; copy it again, or convert again" for name in sorted(expected.keys() - found)]
    faults += [
        f"{folder / name}: other bytes than {source.name} records: damaged or changed; copy it again, or convert again"
        for name, crc in found.items()
        if expected.get(name, crc) != crc
    ]
    faults += [
        f"{folder / name}: {source.name} records no such file; remove it"
        for name in found.keys() - expected
        if not name.rpartition("/")[2].startswith(".")  # file managers and file systems write .DS_Store, ._name, .nfs
    ]
    if faults:
        raise CheckpointError(faults)
