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
"""Where they are recorded: a field of `umbrella_config.json`, or of the metadata of one safetensors file."""
FILES = "files"
"""The field of `umbrella_config.json` with those of the small files beside it: config.json, the tokenizer."""
PIECE = 512 << 10
"""Bytes that are read, then summed while they are in the cache: the sum then takes a twentieth of the reading."""
Buffer = bytes | bytearray | memoryview


def crc32(data: Buffer, start: int = 0) -> int:
    """CRC-32 of `data` behind data whose CRC-32 is `start`; several times as fast as zlib's."""
    return int(isal_zlib.crc32(data, start))


def recorded(stated: Any, file: Path, key: str = KEY) -> dict[str, str]:
    """Return the checksums that `file` states under `key`.

    Raises CheckpointError for anything but an object of strings.
    """
    if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
        raise CheckpointError(f"{file}: {key}: expected {{name: checksum}}; convert or export it again")
    return stated


class TensorCheck:
    """Compares a tensor's bytes in a file with its recorded checksum, once, when they are first read."""

    def __init__(self, path: Path, name: str, start: int, nbytes: int, expected: str, source: str):
        """`start`, `nbytes`: its place in the file; `source`: what states the checksum, for messages."""
        self._path, self._name, self._start, self._nbytes = path, name, start, nbytes
        self._expected, self._source = expected, source
        self.done = False

    def compare(self, crc: int) -> None:
        """Raise CheckpointError if `crc`, of all its bytes, is not the recorded one."""
        if f"{crc:08x}" != self._expected:
            raise CheckpointError(
                f"{self._path}: {self._name}: other bytes than {self._source} records: damaged, or saved again by "
                f"another program; copy or export it again, or, if the change is on purpose, delete {KEY} there"
            )
        self.done = True

    def ensure(self) -> None:
        """Read all of it, unless that was done before."""
        if self.done:
            return
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start)
            self.compare(_crc_of(file, self._nbytes))


def _crc_of(file: FileIO, nbytes: int) -> int:
    """CRC-32 of the next `nbytes` of a file, or of what there is of them."""
    buffer, crc = memoryview(bytearray(PIECE)), 0
    while nbytes and (count := file.readinto(buffer[:nbytes])):
        crc, nbytes = crc32(buffer[:count], crc), nbytes - count
    return crc


def file_checksum(path: Path) -> str:
    """CRC-32 of a file, in hex."""
    with path.open("rb", buffering=0) as file:
        return f"{_crc_of(file, os.fstat(file.fileno()).st_size):08x}"


def folder_checksums(folder: Path) -> dict[str, str]:
    """{path below `folder`: CRC-32 in hex} of its files."""
    files = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        checksums = pool.map(file_checksum, files)
        return {file.relative_to(folder).as_posix(): crc for file, crc in zip(files, checksums, strict=True)}


def check_folder(folder: Path, expected: Mapping[str, str], source: Path) -> None:
    """Read every file of `folder`. Raises CheckpointError with each that `source` does not record like that; hidden
    files that it does not record are ignored."""
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
        if not name.rpartition("/")[2].startswith(".")  # of a file manager or a file system: .DS_Store, ._name, .nfs
    ]
    if faults:
        raise CheckpointError(faults)
