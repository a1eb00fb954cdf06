"""Converting Hugging Face → JAX → Hugging Face keeps every bit."""

import dataclasses
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

from convert.config_json import read_config
from convert.from_hf import load_params
from convert.safetensors_files import open_checkpoint
from convert.to_hf import export
from tests.helpers.checkpoints import BASES, FAMILIES, MODALITIES, write_stock, write_umbrella
from umbrella_jax.errors import CheckpointError, ConfigError


def contents(directory):
    return {n: (t.shape, t.dtype, t.read().tobytes()) for n, t in open_checkpoint(directory).items()}


@pytest.mark.parametrize(
    ("dtype", "base", "names", "shards"),
    [
        (*case, FAMILIES[i % 2], 1 + 2 * (i // 2 % 2))
        for i, case in enumerate(product(("float32", "float16", "bfloat16"), BASES))
    ],
)
def test_bit_for_bit(tmp_path, dtype, base, names, shards):
    write_umbrella(tmp_path / "in", base, dtype=dtype, names=names, shards=shards)
    config = read_config(tmp_path / "in")
    params, summary = load_params(tmp_path / "in", config)
    assert summary.lines() == []
    export(tmp_path / "out", params, config, tmp_path / "in", max_shard_size="30KB" if shards == 1 else "5GB")
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) > 1 or shards > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    assert read_config(tmp_path / "out") == config


def test_other_family_of_names_and_back(tmp_path):
    write_umbrella(tmp_path / "in")
    config = read_config(tmp_path / "in")
    export(tmp_path / "new", load_params(tmp_path / "in", config)[0], config, tmp_path / "in", names=FAMILIES[1])
    assert {n for n in contents(tmp_path / "new") if "MRI" in n} == {
        f"vision_tower.vision_model.embeddings.{m}{end}"
        for m in FAMILIES[1]
        for end in ("_proj.weight", "_proj.bias", "_positional_embeddings")
    }
    config = read_config(tmp_path / "new")
    assert list(config.modalities) == list(FAMILIES[1])
    export(tmp_path / "back", load_params(tmp_path / "new", config)[0], config, tmp_path / "new", names=FAMILIES[0])
    assert contents(tmp_path / "back") == contents(tmp_path / "in")


@pytest.mark.parametrize("tied", [True, False])
def test_stock_with_a_new_patch_embedding_and_more_words(tmp_path, tied):
    write_stock(tmp_path / "in", dtype="bfloat16", tied=tied)
    config = read_config(tmp_path / "in", MODALITIES)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=335), image_token_id=333)
    params, _ = load_params(tmp_path / "in", config)
    export(tmp_path / "out", params, config, tmp_path / "in", fingerprint="f00")
    again = read_config(tmp_path / "out")
    assert again == config
    loaded, summary = load_params(tmp_path / "out", again)
    assert summary.lines() == []
    assert loaded.keys() == params.keys()
    for path, array in params.items():
        assert loaded[path].dtype == array.dtype  # float32 patch embedding, bfloat16 backbone
        np.testing.assert_array_equal(loaded[path], array)


def test_export_overwrites_nothing(tmp_path):
    write_umbrella(tmp_path / "in")
    config = read_config(tmp_path / "in")
    params, _ = load_params(tmp_path / "in", config)
    with pytest.raises(ConfigError, match="directory is not empty"):
        export(tmp_path / "in", params, config, tmp_path / "in")


def test_parameters_of_another_model(tmp_path):
    write_umbrella(tmp_path / "in")
    config = read_config(tmp_path / "in")
    params, _ = load_params(tmp_path / "in", config)
    params["extra"] = params.pop("multi_modal_projector.linear_1.bias")
    params["language_model.model.norm.weight"] = jnp.zeros(3)
    with pytest.raises(CheckpointError) as error:
        export(tmp_path / "out", params, config, tmp_path / "in")
    message = str(error.value)
    assert "3 faults" in message
    assert "extra: not a parameter" in message
    assert "linear_1.bias: missing" in message
    assert "norm.weight: expected shape [48], found [3]" in message
    assert not (tmp_path / "out").exists()
