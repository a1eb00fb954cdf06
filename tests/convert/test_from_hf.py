"""Loading reports every mismatch at once and by name, and initialises only the parameters that it reports."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.config_json import read_config
from convert.from_hf import load_params, plan_loading
from convert.rules import EMBED, LM_HEAD
from convert.safetensors_files import open_checkpoint
from tests.helpers.checkpoints import MODALITIES, write_stock, write_umbrella
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.llava import abstract_params

LAYER = "language_model.model.layers.1.mlp.up_proj.weight"
EMBEDDINGS = "vision_tower.vision_model.embeddings."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write an UMBRELLA and a stock checkpoint, each tied and untied."""
    root = tmp_path_factory.mktemp("written")
    for tied in (True, False):
        write_umbrella(root / f"umbrella_{tied}", tied=tied)
        write_stock(root / f"stock_{tied}", tied=tied)
    return root


@pytest.fixture
def edit(written, tmp_path):
    """Return `edit(change)`, which copies a checkpoint, lets `change` alter its {name: array}, and reads its config."""

    def make(change=lambda tensors: None, source="umbrella_True"):
        directory = tmp_path / "edited"
        shutil.copytree(written / source, directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / "model.safetensors")
        return directory, read_config(directory, None if source.startswith("umbrella") else MODALITIES)

    return make


def refused(directory, config, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        load_params(directory, config, sharding_for=lambda *_: pytest.fail("a parameter was made"), **kwargs)
    if "differs" not in str(error.value):  # only that fault needs the numbers
        with pytest.raises(CheckpointError) as headers:
            plan_loading(directory, config, **kwargs)
        assert headers.value.faults == error.value.faults
    return str(error.value)


def assert_equal(params, expected):
    assert params.keys() == expected.keys()
    for path, array in expected.items():
        assert params[path].dtype == array.dtype
        np.testing.assert_array_equal(params[path], array)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_loaded(written, tied):
    directory = written / f"umbrella_{tied}"
    config = read_config(directory)
    placed = []

    def where(path, shape):
        placed.append((path, shape))
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    params, summary = load_params(directory, config, sharding_for=where)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in abstract_params(config)[1].items()}
    assert sorted(placed) == sorted((path, leaf.shape) for path, leaf in params.items())
    assert summary.lines() == []
    tensors = load_file(directory / "model.safetensors")
    np.testing.assert_array_equal(params["language_model.model.layers.mlp.up_proj.weight"][1], tensors[LAYER])
    kernel = tensors[EMBEDDINGS + "T1_proj.weight"]
    np.testing.assert_array_equal(params[EMBEDDINGS + "T1_proj.weight"], kernel.reshape(36, 5 * 3 * 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(written, dtype):
    directory = written / "umbrella_True"
    exact = load_params(directory, read_config(directory))[0]
    params = load_params(directory, read_config(directory), dtype=dtype)[0]
    for path, array in params.items():
        np.testing.assert_array_equal(array, exact[path].astype(dtype))
        assert array.dtype == dtype


def test_faults_are_refused_together(edit):
    def change(tensors):
        del tensors[LAYER]
        del tensors[EMBEDDINGS + "rsfMRI_proj.bias"]
        tensors["multi_modal_projector.linear_3.weight"] = np.zeros(3, np.float32)
        tensors["multi_modal_projector.linear_1.weight"] = tensors["multi_modal_projector.linear_1.weight"].T
        tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"]
        tensors["language_model.model.layers.3.mlp.up_proj.weight"] = np.zeros((104, 48), np.float32)
        name = "language_model.model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].astype(np.float16)
        tensors["multi_modal_projector.linear_2.bias"] = np.zeros(48, np.int32)

    directory, config = edit(change)
    message = refused(directory, config)
    file = str(directory / "model.safetensors")
    assert message.startswith("8 faults:")
    for part in (
        f"{LAYER}: missing, expected shape [104, 48]",
        f"{EMBEDDINGS}rsfMRI_proj.bias: missing",
        f"{file}: multi_modal_projector.linear_3.weight: not a part",
        f"{file}: multi_modal_projector.linear_1.weight: expected shape [48, 36], found [36, 48]",
        "norm.weight: the same tensor as",
        f"{file}: language_model.model.layers.3.mlp.up_proj.weight: not a part",
        "language_model.model.layers.mlp.down_proj.weight: 2 types",
        f"{file}: multi_modal_projector.linear_2.bias: type I32",
    ):
        assert part in message, part


def test_mixed_types_may_be_cast(edit):
    def change(tensors):
        tensors[LAYER] = tensors[LAYER].astype(np.float16)

    directory, config = edit(change)
    assert "1: 2 types" not in refused(directory, config)
    params = load_params(directory, config, dtype="float16")[0]
    assert params["language_model.model.layers.mlp.up_proj.weight"].dtype == np.float16


def test_other_layouts_names(edit, written):
    def change(tensors):  # transformers 5's names in memory
        for name in list(tensors):
            new = name.replace("language_model.model.", "model.language_model.")
            new = new.replace("language_model.lm_head", "lm_head").replace("vision_model.", "")
            new = new if new.startswith(("model.", "lm_head.")) else "model." + new
            tensors[new] = tensors.pop(name)

    directory, config = edit(change, "umbrella_False")
    assert_equal(load_params(directory, config)[0], load_params(written / "umbrella_False", config)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_reads_the_files_that_transformers_5_saves(tmp_path, tied):
    model = write_umbrella(tmp_path / "hub", tied=tied)
    model.save_pretrained(tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").keys() != open_checkpoint(tmp_path / "hub").keys()
    config = read_config(tmp_path / "hub")
    assert read_config(tmp_path / "saved", MODALITIES) == config
    assert_equal(load_params(tmp_path / "saved", config)[0], load_params(tmp_path / "hub", config)[0])


def test_head_of_a_tied_checkpoint(edit, written):
    directory, config = edit(lambda t: t.update({LM_HEAD: t[EMBED]}))
    assert LM_HEAD not in load_params(directory, config)[0]
    tensors = load_file(directory / "model.safetensors")
    tensors[LM_HEAD] = tensors[EMBED].copy()
    tensors[LM_HEAD][3, 4] = np.nextafter(tensors[LM_HEAD][3, 4], 9)
    save_file(tensors, directory / "model.safetensors")
    message = refused(directory, config)
    assert "differs from the tied embeddings" in message
    assert str(directory) in message


def test_modality_that_is_not_configured(edit):
    directory, config = edit()
    config = dataclasses.replace(config, modalities={"T1": MODALITIES["T1"]})
    message = refused(directory, config)
    assert "modality rsfMRI" in message
    assert "configuration" in message
    assert message.count("rsfMRI") == 1


def test_two_names_for_one_modality(edit):
    def change(tensors):
        for name in [n for n in tensors if "T1_" in n]:
            tensors[name.replace("T1_", "sMRI_")] = tensors[name]

    directory, config = edit(change)
    config = dataclasses.replace(config, modalities={"T1": MODALITIES["T1"], "rsfMRI": MODALITIES["rsfMRI"]})
    assert "modality sMRI: T1 is T1 already" in refused(directory, config)


def test_names_are_resolved_by_alias(written):
    directory = written / "umbrella_True"
    config = read_config(directory, {"sMRI": MODALITIES["T1"], "fMRI": MODALITIES["rsfMRI"]})
    params, summary = load_params(directory, config)
    assert summary.lines() == []
    theirs = load_params(directory, read_config(directory))[0]
    for a, b in (("sMRI", "T1"), ("fMRI", "rsfMRI")):
        for end in ("_proj.weight", "_proj.bias", "_positional_embeddings"):
            np.testing.assert_array_equal(params[EMBEDDINGS + a + end], theirs[EMBEDDINGS + b + end])


def test_new_modalities_of_a_stock_checkpoint(written):
    directory = written / "stock_True"
    config = read_config(directory, MODALITIES)
    params, summary = load_params(directory, config, dtype="bfloat16", seed=3)
    assert list(summary.initialised) == ["T1", "rsfMRI"]
    assert set(summary.replaced) == {
        EMBEDDINGS + name for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
    }
    assert summary == plan_loading(directory, config).summary
    *new, replaced = summary.lines()
    assert [line.partition(":")[0] for line in new] == ["T1", "rsfMRI"]
    assert replaced.split("\n  ")[1:] == list(summary.replaced)
    for name in MODALITIES:
        weight, bias = params[f"{EMBEDDINGS}{name}_proj.weight"], params[f"{EMBEDDINGS}{name}_proj.bias"]
        table = params[f"{EMBEDDINGS}{name}_positional_embeddings"]
        assert weight.dtype == bias.dtype == table.dtype == np.float32
        assert not bias.any()
        for array in (weight, table):
            assert 0.015 < float(array.std()) < 0.022
            assert float(abs(array).max()) < 0.05
    # other modalities and another order do not change it; another seed does
    alone = dataclasses.replace(config, modalities={"rsfMRI": MODALITIES["rsfMRI"]})
    path = EMBEDDINGS + "rsfMRI_proj.weight"
    np.testing.assert_array_equal(load_params(directory, alone, seed=3)[0][path], params[path])
    assert (load_params(directory, alone, seed=4)[0][path] != params[path]).any()


def test_vocabulary_grows(written):
    directory = written / "umbrella_False"
    config = read_config(directory)
    before = load_params(directory, config)[0]
    grown = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=334))
    params, summary = load_params(directory, grown)
    assert summary.grown == {EMBED: (331, 334), LM_HEAD: (331, 334)}
    for path in (EMBED, LM_HEAD):
        assert params[path].shape == (334, 48)
        np.testing.assert_array_equal(params[path][:331], before[path])
        mean = np.asarray(before[path]).mean(0, dtype=np.float64).astype(np.float32)
        np.testing.assert_array_equal(params[path][331:], np.tile(mean, (3, 1)))
    assert any("331 rows → 334" in line for line in summary.lines())


def test_vocabulary_never_shrinks(written):
    directory = written / "umbrella_True"
    config = read_config(directory)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=330))
    assert "331 rows cannot shrink to a vocabulary of 330" in refused(directory, config)


def test_embeddings_that_config_json_does_not_describe(edit):
    directory, config = edit(lambda t: t.update({EMBED: t[EMBED][:300]}))
    assert "expected shape [331, 48], found [300, 48]" in refused(directory, config)


def test_config_json_of_another_model(edit):
    directory, _ = edit()
    raw = json.loads((directory / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = 2
    (directory / "config.json").write_text(json.dumps(raw))
    message = refused(directory, read_config(directory))
    assert message.count("language_model.model.layers.2.") == 12
