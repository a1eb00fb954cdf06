"""Input that was made to harm: nothing of it runs, and what it promises is refused by name before it costs anything."""

import bz2
import gzip
import json
import logging
import os
import re
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.config_json import read_config
from convert.export_config import carried_files
from convert.from_hf import fingerprint
from convert.safetensors_files import open_checkpoint, open_safetensors
from tests.conftest import write_tokenizer
from tests.helpers.checkpoints import write_stock
from tests.helpers.commands import replace_command
from umbrella_jax.cli import main, setup
from umbrella_jax.config.load import load_config, load_original
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.console import table_lines
from umbrella_jax.data import conversation, tokenize, voxels
from umbrella_jax.data.conversation import read_conversations
from umbrella_jax.data.tokenize import encode, load_tokenizer
from umbrella_jax.data.volume import load_volume
from umbrella_jax.data.voxels import open_voxels, source_files
from umbrella_jax.errors import CheckpointError, ConfigError, DataError, UmbrellaError, known_cause, visible
from umbrella_jax.io import reading
from umbrella_jax.rundir import RunLog, how_it_ended
from umbrella_jax.scoring.metrics import read_predictions
from umbrella_jax.study.from_bids import from_bids
from umbrella_jax.training.checkpoint import param_shapes

MB = 1 << 20
DEEP = 100_000
SIZE = (6, 7, 5)
T1 = ModalityConfig(size=SIZE, patch=(3, 2, 4), orientation="as_stored")
FMRI = ModalityConfig(size=(*SIZE, 4), patch=(3, 2, 4, 2), orientation="as_stored")


@contextmanager
def costs_at_most(nbytes: int) -> Iterator[None]:
    """Of memory that Python and numpy ask for."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < nbytes, f"{peak / MB:.1f} MB"


def refused(error: type[UmbrellaError], call: Callable[..., Any], *arguments: Any) -> str:
    """The message of the one fault."""
    with costs_at_most(20 * MB), pytest.raises(error) as caught:
        call(*arguments)
    assert len(caught.value.faults) == 1
    return str(caught.value)


# JSON


def conversations(path: Path) -> Any:
    return read_conversations(path, ("T1",))


def bids(path: Path) -> Any:
    return from_bids(path.parent, path.parent / "out", "sex")


def weights(path: Path) -> Any:
    return open_checkpoint(path.parent)


def config(path: Path) -> Any:
    return read_config(path.parent)


JSON: list[tuple[str, Callable[[Path], Any], type[UmbrellaError]]] = [
    ("a.json", conversations, DataError),
    ("a.jsonl", conversations, DataError),
    ("participants.json", bids, DataError),
    ("config.json", config, CheckpointError),
    ("model.safetensors.index.json", weights, CheckpointError),
]


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], Path]:
    """`place(name)`: where a file of that name is read, with what else its reader wants around it."""

    def make(name: str) -> Path:
        (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-1\tF\nsub-2\tM\n")
        for subject in "12":
            (folder := tmp_path / f"sub-{subject}/anat").mkdir(parents=True)
            (folder / f"sub-{subject}_T1w.nii.gz").write_bytes(b"scan")
        return tmp_path / name

    return make


@pytest.mark.parametrize(("name", "read", "error"), JSON)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * DEEP, "nests deeper than 200 levels"),
        ('{"task_id":' * DEEP, "nests deeper than 200 levels"),
        (
            "[" * 900 + "]" * 900,
            "nests deeper than 200",
        ),  # which Python's own reader takes, and whoever shows it may not
        ('{"task_id": "\\ud800"}', "surrogate"),  # which no UTF-8 could be written with
        ('{"task_id": 1' + "0" * 5000 + "}", "number out of range"),  # which Python would not write
        ('{"task_id": "\0"}', "control character"),
        ('{"a": [{"b": 1}, {"b": 1, "c": {}, "b": 1}]}', 'the key "b" is given twice in one object (column 36)'),
        ('[{"\\u0061": "\\"a\\": }", "a": 1}]', 'the key "a" is given twice in one object (column 25)'),
        ('{"a": -Infinity}', "-Infinity is not a JSON number; write null, or a finite number (column 7)"),
        ('{"a": "1e999", "b": 1e999}', "1e999 is not a JSON number; write null, or a finite number (column 21)"),
    ],
    ids=["lists", "objects", "deep", "surrogate", "number", "zero byte", "twice", "escaped", "infinity", "beyond"],
)
def test_json(place: Callable[[str], Path], name: str, read: Any, error: Any, text: str, expected: str) -> None:
    path = place(name)
    path.write_text(text)
    message = refused(error, read, path)
    if name.endswith(".jsonl") and text.startswith("["):
        expected = "a JSON list, not JSON Lines; rename the file to a.json"
        assert message == f"{path}:1: {expected}"
    else:
        assert message.startswith(f"{path}:1: not valid JSON: ")
        assert expected in message


@pytest.mark.parametrize(("name", "read", "error"), [row for row in JSON if not row[0].startswith("a.")])
def test_json_of_a_gigabyte_is_not_read(place: Callable[[str], Path], name: str, read: Any, error: Any) -> None:
    path = place(name)
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert f"{path}: larger than 16 MB; " in refused(error, read, path)


def test_a_list_of_conversations_has_any_length_but_not_its_items(
    place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place("a.json")
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert f"{path}:1: not valid JSON: Expecting value (column 1)" in refused(DataError, conversations, path)
    record = {"task_id": "é", "conversations": [{"role": "user", "content": "?\u2028"}]}
    path.write_text(json.dumps([record] * 12_000, indent=1, ensure_ascii=False))
    assert path.stat().st_size > MB
    with costs_at_most(10 * MB):  # 30 MB as one value
        assert sum(1 for _ in reading.read_items(path, DataError, "")) == 12_000
    monkeypatch.setattr(reading, "_PIECE", 100)
    assert [c.source for c in conversations(path)][-1] == f"{path}[11999]"
    monkeypatch.setattr(reading, "LINE", 1000)
    path.write_text(json.dumps([record, record | {"metadata": {"note": "x" * 3000}}], indent=1))
    assert f"{path}:11: not valid JSON: Longer than" in refused(DataError, conversations, path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_nan_of_pandas_is_read_as_null(place: Callable[[str], Path], name: str) -> None:
    path = place(name)
    path.write_text('{"task_id": "a", "metadata": {"age": NaN}, "conversations": [{"role": "user", "content": "?"}]}')
    assert conversations(path)[0].metadata == {"age": None}


@pytest.mark.parametrize("name", [row[0] for row in JSON if not row[0].startswith("a.")])
def test_nan_elsewhere_is_named(place: Callable[[str], Path], name: str) -> None:
    path = place(name)
    path.write_text('{\n"sex": NaN}')
    read, error = next((read, error) for known, read, error in JSON if known == name)
    assert f"{path}:2: not valid JSON: NaN is not a JSON number; write null" in refused(error, read, path)


@pytest.mark.parametrize(("name", "read", "error"), JSON)
def test_other_encodings_are_named(place: Callable[[str], Path], name: str, read: Any, error: Any) -> None:
    path = place(name)
    path.write_text('{"task_id": "é"}', encoding="utf-16")
    assert f"{path}: cannot be read: it is UTF-16; save it as UTF-8" in refused(error, read, path)
    path.write_text('{"task_id": "é"}', encoding="cp1252")
    expected = f"{path}: cannot be read: byte 0xe9 is not UTF-8, as in a Windows-1252 text; save it as UTF-8"
    assert expected in refused(error, read, path)


def test_a_jsonl_has_any_length_but_not_its_lines(
    place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LISTING", 1000)
    record = {"task_id": "é", "conversations": [{"role": "user", "content": "?\u2028"}]}
    path = place("a.jsonl")
    path.write_text("\r\n".join([json.dumps(record, ensure_ascii=False)] * 100), newline="")
    assert len(conversations(path)) == 100
    monkeypatch.setattr(reading, "LINE", 1000)
    path.write_text(json.dumps(record) + "\n" + json.dumps(record | {"metadata": {"note": "x" * 1000}}))
    assert f"{path}:2: a line of more than" in refused(DataError, conversations, path)


@pytest.mark.parametrize(("name", "read", "error"), [*JSON, ("run.yaml", load_config, ConfigError)])
def test_pipes_and_devices_do_not_block(place: Callable[[str], Path], name: str, read: Any, error: Any) -> None:
    """A pipe without a writer would never be opened, a device never end."""
    path = place(name)
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        message = refused(error, read, path)
        assert f"{path}: " in message
        assert "not found" not in message
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin"])
def test_devices_are_not_read(path: str) -> None:
    for read in (load_config, reading.sha256, open_voxels):
        with pytest.raises((ConfigError, DataError, OSError), match="directory, pipe or device"):
            read(path)


def test_no_more_faults_are_collected_than_anybody_mends(
    place: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MAX_FAULTS", 100)
    for path, text in ((place("a.json"), json.dumps([0] * 100_000)), (tmp_path / "a.jsonl", "{\n" * 100_000)):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            conversations(path)
        assert len(caught.value.faults) == 102
        assert caught.value.faults[-1].startswith(f"{path}: stopped here: too many errors")


# YAML


def bomb(line: str) -> str:
    """Ten levels of ten aliases each of the level below: ten thousand million values."""
    return "\n".join(["a0: &a0 {k: 1}", *(line.format(i, ", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 11))])


@pytest.mark.parametrize("read", [load_config, load_original])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: !!python/object/apply:os.system ['touch touched']", "line 1: a tag, "),
        ("model: {}\nseed: !!int 3", "line 2: a tag, "),
        ("model: !!binary aGk=", "line 1: a tag, "),
        ("[" * (DEEP // 5), "line 1: nests deeper than 20 levels"),
        ("{a: " * (DEEP // 10), "line 1: nests deeper than 20 levels"),
        (bomb("a{0}: &a{0} [{1}]"), "more than 10000 values"),
        (bomb("a{0}: &a{0} {{<<: [{1}]}}"), "more than 10000 values"),
        ("a: &a [*a]", "more than 10000 values"),
        ("seed: 2024-13-45", "month must be in 1..12"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: \0", "special characters are not allowed"),
    ],
    ids=["python", "int", "binary", "lists", "maps", "aliases", "merges", "itself", "date", "digits", "twice", "zero"],
)
def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, text: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    message = refused(ConfigError, read, "a.yaml")
    assert message.startswith("a.yaml: not valid YAML: ")
    assert expected in message
    assert not Path("touched").exists()


def test_yaml_that_is_plain_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a [1, 2e-3, no]\nb: {<<: {c: 3}, d: *a}\n'e': |\n  text\n")
    read = reading.read_yaml(tmp_path / "a.yaml")
    assert read == {"a": [1, 2e-3, "no"], "b": {"c": 3, "d": [1, 2e-3, "no"]}, "e": "text\n"}


# Volumes whose headers promise


def header(kind: Any, shape: tuple[int, ...], **fields: Any) -> bytes:
    """Bytes of a header of uint8 voxels, however many."""
    made = kind.header_class()
    made.set_data_dtype(np.uint8)
    if kind is nib.MGHImage:
        made["dims"] = (*shape, *[1] * (4 - len(shape)))
        return made.binaryblock.ljust(284, b"\0")
    made["dim"][: len(shape) + 1] = len(shape), *shape
    for key, value in fields.items():
        made[key] = value
    return made.binaryblock + bytes(4)


TERA = (10_000, 10_000, 10_000)  # voxels: 10¹²
VOLUMES = {
    "a.nii": header(nib.Nifti1Image, TERA, vox_offset=352),
    "b.nii": header(nib.Nifti2Image, (1 << 40, 1 << 40, 1 << 40), vox_offset=544),
    "offset.nii": header(nib.Nifti1Image, SIZE, vox_offset=1e12),
    "frames.nii": header(nib.Nifti1Image, (300, 300, 300, 30_000), vox_offset=352),
    "a.nii.gz": gzip.compress(header(nib.Nifti1Image, TERA, vox_offset=352)),
    "offset.nii.gz": gzip.compress(header(nib.Nifti1Image, SIZE, vox_offset=1e12)),
    "a.mgh": header(nib.MGHImage, TERA),
    "a.mgz": gzip.compress(header(nib.MGHImage, TERA)),
    "a.hdr": header(nib.AnalyzeImage, TERA),
    "less.nii": header(nib.Nifti2Image, (-6, -7, 5), vox_offset=544) + bytes(210),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_header_that_promises_more_than_the_file_holds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(VOLUMES[name])
    if path.suffix == ".hdr":
        path.with_suffix(".img").write_bytes(bytes(1000))
    message = refused(DataError, load_volume, path, T1)
    assert message.startswith(f"{path}: its header promises ")
    assert "copy it again" in message


@pytest.mark.parametrize("shape", [TERA, (1 << 62, 1 << 62, 2), (-1, 7, 5), (1 << 70, 0, 5)])
def test_array_that_promises_more_than_the_file_holds(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(bytes(1000))
    message = refused(DataError, load_volume, tmp_path / "a.npy", T1)
    assert message.startswith(f"{tmp_path / 'a.npy'}: ")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_gzip_bomb(tmp_path: Path, name: str) -> None:
    """Whose zeros are all there: 300 MB of them in 300 KB."""
    shape = (100, 300, 10_000)
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as file:
        kind = nib.MGHImage if name.endswith("mgz") else nib.Nifti1Image
        file.write(header(kind, shape, vox_offset=352))
        for _ in range(300):
            file.write(bytes(1_000_000))
    message = refused(DataError, load_volume, path, T1)
    assert message.startswith(f"{path}: its header promises 100 × 300 × 10000 voxels of uint8, 300000")
    assert "no more than 100 times as many" in message


def test_a_mask_that_compresses_well_is_no_bomb(tmp_path: Path) -> None:
    data = np.zeros((128, 128, 128), np.uint8)
    data[5:9, 60:70, 3] = 1
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    assert data.size > 200 * path.stat().st_size
    assert load_volume(path, T1).std() > 0.9


@pytest.mark.parametrize("length", [0, 8, -16, 2**31 - 16])
@pytest.mark.parametrize("offset", [352, 416])
def test_extensions_are_not_read(tmp_path: Path, length: int, offset: int) -> None:
    """nibabel would read to the end of the stream where one says that it is shorter than itself."""
    data = np.random.default_rng(0).integers(1, 200, SIZE, np.uint8)
    extension = b"\1\0\0\0" + length.to_bytes(4, "little", signed=True) + (4).to_bytes(4, "little")
    content = header(nib.Nifti1Image, SIZE, vox_offset=offset)[:-4] + extension
    path = tmp_path / "a.nii.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(content[:offset].ljust(offset, b"\0") + data.tobytes(order="F"))
        for _ in range(50):
            file.write(bytes(1_000_000))
    with costs_at_most(5 * MB):
        np.testing.assert_array_equal(open_voxels(path).read(0), data)


def test_mat_beside_an_analyze_pair_is_not_read(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(1, 200, SIZE, np.int16)
    nib.save(nib.Spm99AnalyzeImage(data, np.eye(4)), tmp_path / "a.img")
    (tmp_path / "a.mat").write_bytes(b"MATLAB" * 100)
    np.testing.assert_array_equal(open_voxels(tmp_path / "a.hdr").read(0), data)
    assert source_files(tmp_path / "a.hdr") == [tmp_path / "a.hdr", tmp_path / "a.img"]


# Damage within compressed files, whose checksum is behind the last voxel

LARGE = (16, 16, 16)  # int16: 8192 bytes, so that readers who stop with the last voxel never see the end
WHOLE = ModalityConfig(size=LARGE, patch=(4, 4, 4), scaling="none", orientation="as_stored")
SHORT = ModalityConfig(size=(*LARGE, 4), patch=(4, 4, 4, 2), scaling="none", orientation="as_stored")


def scan(path: Path, frames: int = 0) -> tuple[Path, np.ndarray]:
    """A volume or run of smooth voxels, compressed as its name says, and the frames of its first window."""
    grid = np.indices((*LARGE, frames) if frames else LARGE)
    data = (grid.sum(0) * 37 % 900 + 7 * grid[0]).astype(np.int16)
    kind = {"mgz": nib.MGHImage, "img": nib.Nifti1Pair}.get(path.name.split(".")[1], nib.Nifti1Image)
    nib.save(kind(data, np.eye(4)), path)
    return path, data[..., :4] if frames else data


def spoilt(content: bytes, start: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Copies with a flipped bit, evenly from a byte on, and copies that were cut off."""
    for number, at in enumerate(np.linspace(start, len(content) - 1, count).astype(int)):
        yield (
            f"bit {number % 8} of byte {at}",
            content[:at] + bytes([content[at] ^ 1 << number % 8]) + content[at + 1 :],
        )
    for cut in (1, 4, 8, 9, len(content) // 2):
        yield f"without the last {cut}", content[:-cut]


@pytest.mark.parametrize("frames", [0, 7])  # 7: the last 3 are in no window
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz", "a.nii.bz2", "a.img.gz", "a.img.bz2"])
def test_damage_is_never_read(tmp_path: Path, name: str, frames: int) -> None:
    """A bit that bzip2 does not need may be another one; all that is read is right."""
    path, expected = scan(tmp_path / name, frames)
    config = SHORT if frames else WHOLE
    content, refusals = path.read_bytes(), 0
    for what, other in spoilt(content, 10, 30):  # behind gzip's own header, whose time says nothing
        path.write_bytes(other)
        try:
            np.testing.assert_array_equal(load_volume(path, config), expected, what)
            assert path.suffix == ".bz2", what
        except DataError as error:
            (fault,) = error.faults
            assert fault.startswith(f"{path}: "), what
            refusals += 1
    assert refusals >= 33
    path.write_bytes(content)
    np.testing.assert_array_equal(load_volume(path, config), expected)


def test_a_damaged_block_is_no_other_format(tmp_path: Path) -> None:
    """bzip2 unpacks 900 KB at a time, header included: nibabel took damage anywhere in it for another kind of file."""
    path, _ = scan(tmp_path / "a.nii.bz2", 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "Invalid data stream" in refused(DataError, load_volume, path, WHOLE)


def test_names_files_that_are_no_scans(tmp_path: Path) -> None:
    path, _ = scan(tmp_path / "a.img", 0)
    (tmp_path / "a.hdr").unlink()
    assert f"{path}: {tmp_path / 'a.hdr'} not found" in refused(DataError, load_volume, path, WHOLE)
    (tmp_path / "b.nii").write_bytes(bytes(128) + b"DICM" + bytes(400))
    assert "b.nii: a DICOM file; convert its series" in refused(DataError, load_volume, tmp_path / "b.nii", WHOLE)


def test_nibabel_does_not_write_to_the_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It names no file: `pixdim[1,2,3] should be non-zero; setting 0 dims to 1`, for each of thousands."""
    path, _ = scan(tmp_path / "a.nii", 0)
    content = bytearray(path.read_bytes())
    content[0:4], content[80:92] = bytes(4), bytes(12)  # sizeof_hdr, pixdim[1:4]
    path.write_bytes(content)
    load_volume(path, WHOLE)
    assert not caplog.records


def test_damage_of_a_compressed_header_is_not_read(tmp_path: Path) -> None:
    path, _ = scan(tmp_path / "a.img.gz")
    header = tmp_path / "a.hdr.gz"
    content = header.read_bytes()
    for _, other in spoilt(content, len(content) - 8, 8):
        header.write_bytes(other)
        assert str(path) in refused(DataError, load_volume, path, WHOLE)


@pytest.mark.parametrize(
    ("pack", "expected"),
    [
        (lambda raw: b"".join(gzip.compress(raw[i : i + 300]) for i in range(0, len(raw), 300)), None),
        (lambda raw: gzip.compress(raw[:100]) + gzip.compress(b"") + gzip.compress(raw[100:]), None),
        (lambda raw: gzip.compress(raw) + bytes(512), None),
        (
            lambda raw: gzip.compress(raw) + b"garbage, of which there is some",
            "other bytes follow the end of its gzip data",
        ),
        (lambda raw: gzip.compress(raw) + gzip.compress(raw)[:50], "EOFError"),
        (lambda raw: gzip.compress(raw[:5000]), "Expected 8192 bytes"),
        (lambda raw: raw, "by its name it is gzip-compressed, by its content not compressed; rename it to a.nii"),
        (lambda raw: bz2.compress(raw), "gzip-compressed, by its content bzip2; rename it to a.nii.bz2"),
        (lambda raw: b"<!DOCTYPE html>", "its name says gzip, its content is something else; copy it again"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file itself"),
        (lambda raw: b"/annex/objects/SHA256E-s1--0.nii.gz\n", "a git-annex pointer, not the file itself"),
        (lambda raw: b"", "it is empty"),
    ],
    ids=[
        "members",
        "empty member",
        "zeros",
        "garbage",
        "half",
        "short",
        "plain",
        "bzip2",
        "page",
        "lfs",
        "annex",
        "no",
    ],
)
def test_reads_only_valid_gzip(tmp_path: Path, pack: Callable[[bytes], bytes], expected: str | None) -> None:
    path, data = scan(tmp_path / "a.nii")
    raw = path.read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(pack(raw))
    if expected is None:
        np.testing.assert_array_equal(load_volume(path, WHOLE), data)
    else:
        assert expected in refused(DataError, load_volume, path, WHOLE)


@pytest.mark.parametrize(("name", "right"), [("a.nii", "a.nii.gz"), ("a.mgh", "a.mgz"), ("a.hdr", "a.hdr.gz")])
def test_a_name_without_the_compression(tmp_path: Path, name: str, right: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(bytes(5000)))
    (tmp_path / "a.img").write_bytes(bytes(5000))
    assert f"by its content gzip; rename it to {right}" in refused(DataError, load_volume, tmp_path / name, WHOLE)


def test_a_bomb_after_the_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxels, "UNPACKED", 3 * MB)
    monkeypatch.setattr(voxels, "RATIO", 2)
    path, _ = scan(tmp_path / "a.nii")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes() + bytes(8 * MB), 1))
    message = refused(DataError, load_volume, tmp_path / "a.nii.gz", WHOLE)
    assert f"{tmp_path / 'a.nii.gz'}: unpacks to more than {3 * MB} bytes" in message


def test_a_damaged_tensor_is_not_read(tmp_path: Path) -> None:
    """PyTorch does not look at the checksums of its own files."""
    data = np.arange(np.prod(LARGE), dtype=np.int16).reshape(LARGE)
    torch.save(torch.from_numpy(data), tmp_path / "a.pt")
    np.testing.assert_array_equal(load_volume(tmp_path / "a.pt", WHOLE), data)
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(data[3].tobytes()) + 77] ^= 4
    (tmp_path / "a.pt").write_bytes(content)
    message = refused(DataError, load_volume, tmp_path / "a.pt", WHOLE)
    assert message.startswith(f"{tmp_path / 'a.pt'}: damaged: the checksum of ")


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_a_cut_frame_of_no_window_is_noticed(tmp_path: Path, suffix: str) -> None:
    for number in range(6):
        data = np.full(LARGE, number + 1, np.int16)
        file = tmp_path / f"frame_{number}{suffix}"
        np.save(file, data) if suffix == ".npy" else torch.save(torch.from_numpy(data), file)
    file.write_bytes(file.read_bytes()[:-2000])
    assert refused(DataError, load_volume, tmp_path, SHORT).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.npy", "a.pt", "a.img"])
@pytest.mark.parametrize("read", [open_voxels, source_files])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str, read: Any) -> None:
    os.mkfifo(tmp_path / name)
    assert f"{tmp_path / name}: a directory, pipe or device; expected a file" in refused(
        DataError, read, tmp_path / name
    )


def test_a_pipe_in_place_of_a_header_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.hdr")
    (tmp_path / "a.img").write_bytes(bytes(1000))
    assert f"{tmp_path / 'a.hdr'}: a directory, pipe or device" in refused(DataError, open_voxels, tmp_path / "a.img")


def test_other_classes_of_nibabel_are_not_read(tmp_path: Path) -> None:
    """Some of which parse XML, some of which open other files that they name."""
    nib.save(nib.GiftiImage(), tmp_path / "a.gii")
    assert f"{tmp_path / 'a.gii'}: GiftiImage; expected a NIfTI" in refused(DataError, open_voxels, tmp_path / "a.gii")


@pytest.mark.parametrize("name", ["x" * 300 + ".nii", "x\0.nii", "x\0.npy", "x" * 300 + ".npy", "x" * 300])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for read in (open_voxels, source_files):
        assert str(tmp_path / "x")[:-1] in refused(DataError, read, tmp_path / name)


@pytest.mark.parametrize("shape", [(100_000, 1, 1), (1, 9000, 1), (1, 1, 8193)])
def test_an_axis_of_any_length_is_no_matrix(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.ones(shape, np.uint8))
    assert "expected at most 8192 voxels along an axis" in refused(DataError, load_volume, tmp_path / "a.npy", T1)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("axis", [0, 2])
def test_voxels_of_no_size(tmp_path: Path, scale: float, axis: int) -> None:
    affine = np.eye(4)
    affine[axis, axis] = scale
    image = nib.Nifti2Image(np.ones(SIZE, np.float32), None)
    image.header["sform_code"], image.header["srow_x"] = 1, affine[0]
    image.header["srow_y"], image.header["srow_z"] = affine[1], affine[2]
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4) + image.dataobj.tobytes())
    pad = ModalityConfig(size=SIZE, patch=(3, 2, 4), mode="pad", orientation="as_stored")
    assert "no voxel sizes: its header says " in refused(DataError, load_volume, tmp_path / "a.nii", pad)


@pytest.mark.parametrize(
    ("values", "scaling"),
    [([3e38, -3e38], "znorm"), ([1e30, 2e30], "znorm"), ([-1e30, 1e-30], "minmax"), ([1e30, 2e30], "znorm_minback")],
)
def test_values_that_scaling_takes_out_of_range(tmp_path: Path, values: list[float], scaling: Any) -> None:
    axes = 4 if scaling == "znorm_minback" else 3
    size, patch = (*SIZE, 3)[:axes], (1, 1, 1, 1)[:axes]
    nib.save(nib.Nifti1Image(np.resize(np.float32(values), size), np.eye(4)), tmp_path / "a.nii")
    modality = ModalityConfig(size=size, patch=patch, scaling=scaling)
    assert f"scaling {scaling} takes it beyond float32" in refused(DataError, load_volume, tmp_path / "a.nii", modality)


# PyTorch's files


def deflated(path: Path) -> None:
    """A zip whose entries are compressed, as torch.save never does."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_tensor_that_repeats_itself(tmp_path: Path) -> None:
    tensor = torch.ones(1).expand(10_000, 10_000, 10_000)
    torch.save(tensor, tmp_path / "a.pt")
    message = refused(DataError, load_volume, tmp_path / "a.pt", T1)
    assert f"{tmp_path / 'a.pt'}: cannot be read: TypeError: shape (10000, 10000, 10000) of 4 bytes" in message
    torch.save({"a": tensor}, tmp_path / "pytorch_model.bin")
    assert f"{tmp_path / 'pytorch_model.bin'}: shape (10000," in refused(CheckpointError, open_checkpoint, tmp_path)


def test_torch_file_that_unpacks_to_more(tmp_path: Path) -> None:
    torch.save(torch.zeros(100, 100, 300), tmp_path / "a.pt")
    torch.save({"a": torch.zeros(3_000_000)}, tmp_path / "pytorch_model.bin")
    for name in ("a.pt", "pytorch_model.bin"):
        deflated(tmp_path / name)
    assert "unpacks to 12" in refused(DataError, load_volume, tmp_path / "a.pt", T1)
    assert "unpacks to 12" in refused(CheckpointError, open_checkpoint, tmp_path)


# Checkpoints


def test_safetensors_header_of_100_gb(tmp_path: Path) -> None:
    """Which the file, of holes, has."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((10**11).to_bytes(8, "little"))
        file.truncate(10**11 + 8)
    assert f"{path}: cut short or damaged" in refused(CheckpointError, open_checkpoint, tmp_path)


def write_header(path: Path, entries: dict[str, Any], data: bytes = b"") -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("shape", [[1 << 60, 0], [0, 1 << 63], [3, 0, 10_000]])
def test_tensor_of_no_numbers_and_endless_axes(tmp_path: Path, shape: list[int]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    path = write_header(tmp_path / "a", {"a": entry})
    assert f"{path}: a: an axis longer than the file" in refused(CheckpointError, open_safetensors, path)
    entry["shape"] = [3, 0]
    assert open_safetensors(write_header(tmp_path / "a", {"a": entry}))[0]["a"].read().shape == (3, 0)


@pytest.mark.parametrize("code", ["U8", "I64", "BOOL", "F8_E4M3"])
def test_types_that_are_not_read(tmp_path: Path, code: str) -> None:
    entry = {"dtype": code, "shape": [16 // (8 if code == "I64" else 1)], "data_offsets": [0, 16]}
    write_header(tmp_path / "model.safetensors", {"a": entry}, bytes(16))
    (tmp_path / "config.json").write_text("{}")
    assert f"a: type {code} cannot be read" in refused(CheckpointError, fingerprint, tmp_path)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a/../b", ".", "x" * 256]
)
def test_index_that_leads_out_of_its_folder(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", folder / "sub/a.safetensors", folder / "b"):
        save_file({"a": np.ones(3)}, place)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    assert f"{index}: a: in {file!r}; expected the name of a file beside it" in refused(
        CheckpointError, open_checkpoint, folder
    )


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_stock(tmp_path_factory.mktemp("stock"))
    return next(tmp_path_factory.getbasetemp().glob("stock*"))


@pytest.fixture
def base(stock: Path, tmp_path: Path) -> Path:
    """config.json of a stock LLaVA, and a tokenizer; no weights."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_bytes((stock / "config.json").read_bytes())
    return write_tokenizer(tmp_path / "base")


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    for key, value in values.items():
        *sections, last = key.split("__")
        section = content
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    file.write_text(json.dumps(content))


MODALITIES = {"T1": T1}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text_config__num_hidden_layers": 10**9}, "text_config.num_hidden_layers: 1000000000; expected at most 1000"),
        (
            {"vision_config__intermediate_size": 10**12},
            "vision_config.intermediate_size: 1000000000000; expected at most",
        ),
        ({"text_config__rms_norm_eps": float("nan")}, "config.json:1: not valid JSON: NaN is not a JSON number"),
        ({"text_config__rms_norm_eps": 10**400}, "text_config.rms_norm_eps: expected a positive float"),
        ({"text_config__rope_parameters": "linear"}, "text_config.rope_parameters: 'linear' is not supported"),
        (
            {"text_config__rope_parameters": {"rope_theta": []}},
            "text_config.rope_theta: expected a positive float, got",
        ),
        ({"text_config__layer_types": 3}, "text_config.layer_types: only 'full_attention' is supported"),
    ],
)
def test_config_json(base: Path, values: dict[str, Any], expected: str) -> None:
    read_config(base, MODALITIES)
    edit(base / "config.json", **values)
    assert expected in refused(CheckpointError, read_config, base, MODALITIES)


# Code


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "auto_map"),
        ("config.json", "text_config__auto_map"),
        ("tokenizer_config.json", "auto_map"),
        ("processor_config.json", "auto_map"),
        ("preprocessor_config.json", "auto_map"),
        ("generation_config.json", "auto_map"),
    ],
)
def test_files_that_name_code(base: Path, file: str, key: str) -> None:
    edit(base / file, **{key: {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil"}})
    message = refused(CheckpointError, read_config, base, MODALITIES)
    assert f"{base / file}: {key.replace('__', '.')}: names code to be run" in message


@pytest.mark.parametrize("known", [False, True])
def test_code_beside_a_tokenizer_is_not_run(base: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Nor is anybody asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    touched = base / "touched"
    (base / "evil.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(touched)!r}).touch()\nclass Evil(PreTrainedTokenizerFast): pass\n"
    )
    name = json.loads((base / "tokenizer_config.json").read_text())["tokenizer_class"] if known else "Evil"
    edit(base / "tokenizer_config.json", tokenizer_class=name, auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    (base / "config.json").unlink()
    if known:  # transformers' own is taken
        load_tokenizer(base, None)
    else:
        assert f"{base}: no readable tokenizer: " in refused(DataError, load_tokenizer, base, None)
    assert not touched.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch TOUCHED').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
    ],
    ids=["globals", "classes", "change", "endless", "file", "raise"],
)
def test_chat_template_is_in_a_sandbox(base: Path, tmp_path: Path, template: str) -> None:
    (base / "chat_template.jinja").write_text(template.replace("TOUCHED", str(tmp_path / "touched")))
    tokenizer = load_tokenizer(base, None)[0]
    path = tmp_path / "a.json"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    path.write_text(json.dumps({"task_id": "a", "conversations": turns}))
    (one,) = conversations(path)

    def chat() -> None:
        encode(one, tokenizer, MODALITIES, 100, template="chat")

    assert "the chat template cannot render it" in refused(DataError, chat)
    assert not (tmp_path / "touched").exists()
    encode(one, tokenizer, MODALITIES, 100)  # which does not look at it


def test_a_tokenizer_larger_than_any_is_not_read(base: Path) -> None:
    with (base / "vocab.json").open("wb") as file:
        file.truncate(1 << 30)
    assert f"{base / 'vocab.json'}: larger than 256 MB" in refused(DataError, load_tokenizer, base, None)


def test_tokenizer_of_another_folder_is_not_read(base: Path, tmp_path: Path) -> None:
    elsewhere = (base / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    edit(base / "tokenizer_config.json", tokenizer_file=str(elsewhere), vocab_file=str(elsewhere))
    assert f"{base}: no readable tokenizer" in refused(DataError, load_tokenizer, base, None)


# What goes with an export


def test_links_and_code_are_not_carried(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer_evil.py").write_text("1")
    (base / "notes.txt").write_text("1")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0a1b").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    (base / "added_tokens.json").symlink_to(tmp_path / "blobs/0a1b")  # as the hub's cache has it
    (base / "vocab.json").symlink_to(tmp_path / "vocab.json")
    (base / "merges.txt").symlink_to(base / "notes.txt")
    names = {"tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "merges.txt"}
    assert {file.name for file in carried_files(base)} == names
    (tmp_path / "id_rsa").write_text("secret")
    (base / "additional_chat_templates").mkdir()
    for name in ("tokenizer_x.json", "additional_chat_templates/x.jinja"):
        (base / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError) as caught:
        carried_files(base)
    assert caught.value.faults == tuple(
        f"{base / name}: a link that leads out of the folder, to {tmp_path / 'id_rsa'}; copy the file there if it "
        "belongs to the checkpoint"
        for name in ("tokenizer_x.json", "additional_chat_templates/x.jinja")
    )


# What is said


def test_messages_move_no_cursor_and_have_an_end() -> None:
    error = DataError(["\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e é", "x" * 5000])
    assert error.faults[0][0] == "\x1b"
    assert str(error).splitlines()[1] == r"  - \x1b[2J\x1b]0;title\x07\x9b31m\r\u202e é"
    assert len(str(error)) < 2200


def test_a_key_that_is_a_secret_is_refused_and_not_shown(tmp_path: Path) -> None:
    """Keys come from the environment (tests/run/test_train.py: they go nowhere)."""
    (tmp_path / "a.yaml").write_text("model: {modalities: {T1: {size: [3], patch: [3]}}}\ntrain: {api_key: s3cret}")
    with pytest.raises(ConfigError, match=r"train\.api_key: no such key") as caught:
        load_config(tmp_path / "a.yaml")
    assert "s3cret" not in str(caught.value)


SECRETS = """
dataset: {cohort: UKB, T1: {img_size: [96, 96, 96]}}
model: {hf_name: llava, T1: {patch_size: [10, 10, 10]}}
trainer: {max_epochs: {a: s3cret}, learning_rate: [[s3cret]], optim: {x: s3cret}}
wandb: {API_KEY: s3cret, token: s3cret}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SECRETS, "trainer.learning_rate: train.learning_rate: expected a number, got a list"),
        ("trainer: s3cret", "no modality has both dataset.NAME.img_size and model.NAME.patch_size"),
        (
            "services: {db: {password: s3cret}}\nkey: s3cret",
            "not a config of a run: it has the keys services, key; ",
        ),
        ("model: {token: s3cret, hf: {a: s3cret}}", "model.token: no such key"),
        ("model: {modalities: {T1: {size: {a: s3cret, b: s3cret}, patch: [1]}}}", "got a section of keys"),
        ("model: {base: [[s3cret]]}", "model.base: expected text, got a list"),
        ("seed: 1", "model: missing"),
        ("mesh: [s3cret]", "mesh: expected a section of keys, got a list"),
        ("seed: 1\na: s3cret\na: s3cret2", 'line 3: found duplicate key "a"'),
        ("a: s3cret\nb: [s3cret\nc: s3cret", "line 3: expected ',' or ']', but got ':'"),
        ("a: s3cret\nb: @s3cret", "line 2: found character '@' that cannot start any token"),
        ("a: 's3cret", "not valid YAML: line 1: "),
        ("a: !s3cret_tag x", "line 1: a tag, "),
        ("- s3cret", "no config; expected the keys of a run"),
    ],
)
def test_values_of_a_foreign_yaml_are_not_shown(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    for flag in ({}, {"train.seed": 1}):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "a.yaml", flag)
        assert expected in str(caught.value)
        assert "s3cret" not in str(caught.value).replace("!s3cret_tag", "")


def test_values_of_a_foreign_json_are_not_shown(place: Callable[[str], Path]) -> None:
    account = {"type": "service_account", "private_key": "s3cret", "scopes": ["s3cret"], "metadata": {"a": "s3cret"}}
    folder = place("a.json").parent
    for name in ("a.json", "participants.json", "config.json", "model.safetensors.index.json"):
        path = folder / name
        for text in (json.dumps(account), json.dumps(account)[:-1], json.dumps(account)[:-1] + ', "type": "s3cret"}'):
            path.write_text(text)
            read = next(read for known, read, _ in JSON if known == name)
            with pytest.raises(UmbrellaError) as caught:
                read(path)
            assert "s3cret" not in str(caught.value)
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(account) + "\n" + json.dumps([account]))
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert "s3cret" not in str(caught.value)


def test_values_of_the_original_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SECRETS)
    with pytest.raises(ConfigError) as caught:
        load_original(tmp_path / "a.yaml")
    assert "train.learning_rate" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_value_that_is_long_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"model: {{modalities: {{T1: {{size: [3], patch: [3]}}}}}}\nseed: {'x' * 5000}")
    with pytest.raises(ConfigError, match=r"seed: .* got 'xxx") as caught:
        load_config(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 600


# What is printed and logged

FORGED = "a\nfinished:\nended: \x1b[2J\x9b31m\u202e"


def test_a_name_forges_no_line_of_the_log(tmp_path: Path) -> None:
    for forged in (FORGED, FORGED.partition("\n")[2], "started: x", f"step 1\n{FORGED}"):
        log = RunLog(tmp_path / "log.txt", lambda line: None, FORGED)
        log.__enter__()
        log.say(forged)
        with pytest.warns(UserWarning, match=re.escape(forged)):
            log._warned(forged, UserWarning, "a.py", 1)
        logging.getLogger("x").warning(forged)
        assert how_it_ended(tmp_path / "log.txt") is None
        log.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert how_it_ended(tmp_path / "log.txt") == "SIGINT: stopped before there was anything to save"
    text = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in text
    assert "\u202e" not in text
    with pytest.raises(DataError), RunLog(tmp_path / "log.txt", lambda line: None, "x"):
        raise DataError(["x\nfinished:", "y"])
    assert how_it_ended(tmp_path / "log.txt") == "2 faults:"


def test_a_name_forges_no_line_of_an_error(place: Callable[[str], Path]) -> None:
    path = place("a.json")
    path.write_text(json.dumps({"task_id": FORGED, "conversations": [{"role": FORGED, "content": FORGED}]}))
    with pytest.raises(DataError) as caught:
        conversations(path)
    message = str(DataError([*caught.value.faults, f"task {FORGED}: odd"]))
    assert not any(line.startswith(("finished:", "ended:")) for line in message.splitlines())
    assert message == visible(message)
    assert "a\\nfinished:\\nended: \\x1b[2J" in message
    path.write_text(json.dumps({"task_id": FORGED, "conversations": [{"role": "user", "content": "?"}]}))
    assert "\n" not in conversations(path)[0].label


def test_output_moves_no_cursor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def show(arguments: Any) -> int:
        print(FORGED, end="")
        print("answer é", FORGED, file=sys.stderr)
        assert sys.stdout.isatty() in (True, False)
        return 3

    replace_command(monkeypatch, setup, "_doctor", show)
    assert main(["doctor"]) == 3
    out, err = capsys.readouterr()
    assert out == visible(FORGED)
    assert err.startswith(f"answer é {visible(FORGED)}\n")
    assert err == visible(err)
    print("\x1b[0m", end="")
    assert capsys.readouterr().out == "\x1b[0m", "the streams are those of before"


def test_names_stay_in_their_cell() -> None:
    assert table_lines([["task", "n"], [FORGED, "1"]])[1].startswith("a\\nfinished:\\nended: \\x1b")


# Errors of others


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")])
def test_running_out_of_memory_is_reported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever was being read when it ran out."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    assert str(known_cause(error)).startswith("out of memory")
    np.save(tmp_path / "a.npy", np.ones(SIZE, np.uint8))
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    save_file({"a": np.ones(3)}, tmp_path / "b.safetensors")
    (tmp_path / "a.yaml").write_text("a: 1")
    (tmp_path / "a.json").write_text("{}")
    tokenizer = load_tokenizer(base, None)[0]
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("transformers.AutoTokenizer.from_pretrained", lambda: load_tokenizer(base, None)),
        ("umbrella_jax.data.voxels.np.load", lambda: load_volume(tmp_path / "a.npy", T1)),
        ("umbrella_jax.io.torch_files.torch.load", lambda: open_checkpoint(tmp_path)),
        ("convert.safetensors_files.safe_open", lambda: open_safetensors(tmp_path / "b.safetensors")),
        ("umbrella_jax.io.reading._check_plain", lambda: reading.read_yaml(tmp_path / "a.yaml")),
        ("umbrella_jax.io.reading._check_strict", lambda: reading.read_json(tmp_path / "a.json", DataError, "")),
        ("umbrella_jax.training.checkpoint.ocp.PyTreeCheckpointer", lambda: param_shapes(tmp_path)),
        ("umbrella_jax.data.tokenize._joined", lambda: tokenize._render(tokenizer, [])),
    ]
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", fail)
    for name, call in calls:
        with monkeypatch.context() as patched:
            patched.setattr(name, fail)
            with pytest.raises(type(error)):
                call()
