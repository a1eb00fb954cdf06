"""Every reader notices a changed bit in weights on disk, and names the file."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert.lazy_tensor import Tensor
from convert.safetensors_files import open_checkpoint, open_safetensors, write_safetensors
from tests.helpers.checkpoints import write_umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import write_hf, write_native
from umbrella_jax.errors import CheckpointError


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """Write an export in shards and a native checkpoint of the same weights."""
    root = tmp_path_factory.mktemp("written")
    write_umbrella(root / "hf")
    checkpoint = Checkpoint.open(root / "hf")
    write_hf(checkpoint, root / "export", max_shard_size="20KB")
    write_native(checkpoint, root / "native")
    return {"export": root / "export", "native": root / "native"}


def flipped(file: Path, position: int) -> bytes:
    """Flip one bit of a file; return its previous content."""
    content = file.read_bytes()
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    return content


def place_of(file: Path, name: str) -> int:
    """Return the position of a tensor's last byte."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return 8 + length + json.loads(opened.read(length))[name]["data_offsets"][1] - 1


def sharded(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    axis = next((i for i, n in enumerate(shape) if n % 2 == 0), None)
    spec = [None] * len(shape) if axis is None else [*[None] * axis, "x"]
    return NamedSharding(Mesh(np.array(jax.devices()[:2]), ("x",)), PartitionSpec(*spec))


def test_a_flipped_bit_of_an_export_is_named(written):
    """The bit is in any tensor, read whole, as another type, in the shards of a mesh, or in blocks."""
    export = written["export"]
    names = {name: Path(tensor.file) for name, tensor in open_checkpoint(export).items()}
    for name, file in names.items():
        content = flipped(file, place_of(file, name))
        try:
            with pytest.raises(CheckpointError, match=f"{name}: other bytes than .*umbrella_config.json records"):
                open_checkpoint(export)[name].read()
            for read in (lambda t: t.astype("float16").read(), lambda t: list(t.blocks()), lambda t: t.layer(0).read()):
                with pytest.raises(CheckpointError, match="other bytes"):
                    read(open_checkpoint(export)[name])
        finally:
            file.write_bytes(content)
    name, file = next((n, f) for n, f in names.items() if n.endswith("mlp.up_proj.weight"))
    content = flipped(file, place_of(file, name))
    try:
        for reading in ({}, {"sharding_for": sharded}, {"dtype": "bfloat16"}):
            with pytest.raises(CheckpointError, match=f"{name}: other bytes"):
                Checkpoint.open(export).params(**reading)
    finally:
        file.write_bytes(content)
    Checkpoint.open(export).params(sharding_for=sharded)


def test_an_export_saved_again(written, tmp_path):
    """The remedy in the message works: without the checksums, the folder loads."""
    checkpoint = Checkpoint.open(written["export"])
    write_hf(checkpoint, tmp_path / "export")
    file, record = tmp_path / "export" / "model.safetensors", tmp_path / "export" / "umbrella_config.json"
    tensors = load_file(file)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"saved again by another program; .* delete checksums there"):
        Checkpoint.open(tmp_path / "export").params()
    stated = json.loads(record.read_text())
    assert len(stated.pop("checksums")) == len(tensors)
    record.write_text(json.dumps(stated))
    Checkpoint.open(tmp_path / "export").params()
    record.write_text(json.dumps({**stated, "checksums": {"a": 1}}))
    with pytest.raises(CheckpointError, match=r"umbrella_config.json: checksums: expected \{name: checksum\}"):
        Checkpoint.open(tmp_path / "export").params()


def test_a_flipped_bit_of_a_native_checkpoint_is_named(written):
    """The bit is in any file, and the reader any one; a missing file and an extra one are named, too."""
    native = written["native"]
    files = [file for file in (native / "params").rglob("*") if file.is_file()]
    assert len(files) > 4
    for file in files:
        content = flipped(file, file.stat().st_size // 2)
        try:
            for read in (Checkpoint.params, lambda checkpoint: checkpoint.tensors(), Checkpoint.check_finite):
                with pytest.raises(CheckpointError) as error:
                    read(Checkpoint.open(native))
                assert f"{file}: other bytes than umbrella_config.json records" in str(error.value)
        finally:
            file.write_bytes(content)
    content = files[0].read_bytes()
    files[0].unlink()
    files[1].with_name("more").touch()
    files[1].with_name(".DS_Store").touch()  # macOS writes it: no fault
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(native).params()
    assert error.value.faults[0].startswith(f"{files[0]}: missing")
    more = files[1].with_name("more")
    assert error.value.faults[1:] == (f"{more}: umbrella_config.json records no such file; remove it",)
    files[1].with_name("more").unlink()
    files[0].write_bytes(content)
    record = native / "umbrella_config.json"
    stated = json.loads(record.read_text())
    record.write_text(json.dumps({key: value for key, value in stated.items() if key != "checksums"}))
    with pytest.raises(CheckpointError, match="no checksums of the parameters; convert it again"):
        Checkpoint.open(native).params()
    record.write_text(json.dumps(stated))
    Checkpoint.open(native).params()


@pytest.mark.parametrize("form", ["export", "native"])
def test_a_small_file_that_changed_is_named(written, form, caplog):
    """People edit these files, so a changed or missing one is a warning; an untouched folder has none."""
    folder = written[form]
    model = Checkpoint.open(folder)
    model.warn_doubtful()
    assert not caplog.records
    config = folder / "config.json"
    content = config.read_bytes()
    config.write_bytes(content.replace(b'rms_norm_eps": 1e-06', b'rms_norm_eps": 1e-05'))
    assert config.read_bytes() != content
    record = folder / "umbrella_config.json"
    stated = json.loads(record.read_text())
    record.write_text(json.dumps({**stated, "files": stated["files"] | {"merges.txt": "0" * 8}}))
    model.warn_doubtful()
    record.write_text(json.dumps(stated))
    config.write_bytes(content)
    changed, missing = caplog.messages
    assert changed.startswith(f"{config}: changed since umbrella_config.json recorded it; copy it again or, if")
    assert missing.startswith(f"{folder / 'merges.txt'}: missing, but umbrella_config.json recorded it")


def test_a_file_of_its_own_records_its_checksums(tmp_path):
    """The file is like those of `convert to-hf --trainable-only`."""
    arrays = {"a": np.arange(100_000, dtype=np.float32), "b": np.empty((0, 3), np.float16), "c": np.float32(3)}
    file = tmp_path / "trainable.safetensors"
    sums = write_safetensors(file, {name: Tensor.from_array(array) for name, array in arrays.items()}, record=True)
    with safe_open(file, framework="np") as opened:
        assert json.loads(opened.metadata()["checksums"]) == sums
        assert np.array_equal(opened.get_tensor("a"), arrays["a"])
    for name, tensor in open_safetensors(file)[0].items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])
    flipped(file, place_of(file, "a"))
    with pytest.raises(CheckpointError, match="a: other bytes than its header records"):
        open_safetensors(file)[0]["a"].read()
