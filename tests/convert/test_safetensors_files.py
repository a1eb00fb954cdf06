"""Test lazy reading of headers, every fault of a folder of weights, and writing."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.lazy_tensor import Tensor
from convert.safetensors_files import INDEX, open_checkpoint, weights_digest, write_checkpoint
from umbrella_jax.errors import CheckpointError

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(10, dtype=np.float16),
    "c": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
}


def write(directory, arrays=ARRAYS, **kwargs):
    write_checkpoint(directory, {name: Tensor.from_array(a) for name, a in arrays.items()}, **kwargs)


def refused(directory) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    return str(error.value)


@pytest.mark.parametrize("size", ["5GB", 50])
def test_round_trip(tmp_path, size):
    write(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == (size == 50)
    assert not list(tmp_path.glob(".*"))
    read = open_checkpoint(tmp_path)
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype.name)
        assert read[name].read().dtype == array.dtype
        assert read[name].read().tobytes() == array.tobytes()


def test_arrays_that_are_not_contiguous(tmp_path):
    """The safetensors library (0.8.0, not 0.5.0) writes the memory of a strided array as if it were contiguous."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {
        "transposed": base.T,
        "column": base[:, 1],
        "fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[0], (5, 4)),
    }
    write(tmp_path, arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(open_checkpoint(tmp_path)[name].read(), array)


def test_only_headers_are_read(tmp_path):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-60:] = b"\0" * 60  # numbers are gone, headers are not
    file.write_bytes(data)
    assert open_checkpoint(tmp_path)["a"].shape == (3, 4)


def test_folder_without_weights(tmp_path):
    assert str(tmp_path) in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin: cut short, damaged" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "consolidated.pth")
    assert "PyTorch files of another kind (consolidated.pth); save the model in PyTorch" in refused(tmp_path)


def test_single_file_beside_an_index(tmp_path):
    write(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    assert "holds both" in refused(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    assert str(tmp_path / INDEX) in refused(tmp_path)


def test_truncated_file(tmp_path):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: cut short" in refused(tmp_path)


def test_missing_and_truncated_shards_are_named_together(tmp_path):
    write(tmp_path, max_shard_size=50)
    first, second, *_ = sorted(tmp_path.glob("model-*"))
    first.unlink()
    second.write_bytes(b"nonsense")
    message = refused(tmp_path)
    assert f"{first}: missing" in message
    assert f"{second}: cut short" in message


def test_index_and_shards_that_disagree(tmp_path):
    write(tmp_path, max_shard_size=50)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    del index["weight_map"]["a"]
    index["weight_map"]["ghost"] = shards[0]
    index["weight_map"]["c"] = shards[0]
    (tmp_path / INDEX).write_text(json.dumps(index))
    save_file(ARRAYS, tmp_path / shards[1])  # doubles every name
    message = refused(tmp_path)
    assert f"a: not in {INDEX}" in message
    assert "ghost: expected in" in message
    assert "c: expected in" in message
    assert "also in" in message


def test_fingerprint(tmp_path):
    for folder, size in (("one", "5GB"), ("many", 50)):
        write(tmp_path / folder, max_shard_size=size)

    def fingerprint(folder):
        return weights_digest(open_checkpoint(folder))

    stamp = fingerprint(tmp_path / "one")
    assert len(stamp) == 64
    assert stamp == fingerprint(tmp_path / "many")
    file = tmp_path / "one" / "model.safetensors"
    original = file.read_bytes()
    file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert fingerprint(tmp_path / "one") != stamp
    for changed in (ARRAYS | {"a": ARRAYS["a"].reshape(4, 3)}, ARRAYS | {"b": ARRAYS["b"].view(ml_dtypes.bfloat16)}):
        write(tmp_path / "one", changed)
        assert fingerprint(tmp_path / "one") != stamp
