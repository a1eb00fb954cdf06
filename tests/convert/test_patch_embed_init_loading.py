"""Loading a checkpoint with `model.patch_embed_init`; all other parameters stay."""

import dataclasses
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import umbrella_jax
from convert import patch_embed_init
from convert.config_json import read_config
from convert.from_hf import load_params, plan_loading
from convert.torch_model import load_umbrella
from tests.helpers import small_run
from tests.helpers.checkpoints import MODALITIES, write_stock, write_umbrella
from tests.helpers.small_run import World, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import write_native
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.models import split

EMBEDDINGS = "vision_tower.vision_model.embeddings."
IMAGE = ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
KEYS = ("proj.weight", "proj.bias", "positional_embeddings")
OTHER: dict[str, ModalityConfig] = {
    "T1": ModalityConfig(size=(12, 10, 9), patch=(3, 5, 2)),
    "rsfMRI": ModalityConfig(size=(7, 6, 5, 9), patch=(2, 4, 5, 2)),
}
Arrays = dict[str, np.ndarray]


def inflated(tensors: Arrays, modalities: dict[str, ModalityConfig]) -> Arrays:
    """Return {path: array}, inflated from SigLIP's tensors in a file."""
    image = [tensors[EMBEDDINGS + name] for name in IMAGE]
    return {
        f"{EMBEDDINGS}{m}_{k}": a
        for m, c in modalities.items()
        for k, a in patch_embed_init.inflate_patch_embed(*image, c).items()
    }


def resampled(
    tensors: Arrays, old: dict[str, ModalityConfig], new: dict[str, ModalityConfig], names: dict[str, str] | None = None
) -> Arrays:
    """Return {path: array}, resampled from the patch embeddings that a file has under `names`."""
    found: Arrays = {}
    for m, config in new.items():
        stored = (names or {}).get(m, m)
        weight, bias, table = (tensors[f"{EMBEDDINGS}{stored}_{key}"] for key in KEYS)
        weight = weight.reshape(len(weight), -1)  # a Conv3d's kernel; a Linear's is 2D already
        start = patch_embed_init.resample_patch_embed(weight, bias, table, old[stored], config)
        found |= {f"{EMBEDDINGS}{m}_{key}": array for key, array in start.items()}
    return found


def same(ours: Any, expected: Arrays) -> None:
    for path, array in expected.items():
        assert ours[path].dtype == array.dtype, path
        np.testing.assert_array_equal(np.asarray(ours[path]), array, err_msg=path)


def check(ours: Any, before: Any, expected: Arrays) -> None:
    """Parameters are as in `expected`, and all others as in `before`."""
    assert ours.keys() == before.keys()
    same(ours, expected)
    same(ours, {path: np.asarray(leaf) for path, leaf in before.items() if path not in expected})


def parameters(path: Path) -> Arrays:
    return {name: np.asarray(leaf) for name, leaf in split(umbrella_jax.load(path, allow_untrained=True))[1].items()}


def yaml(path: Path, modalities: dict[str, ModalityConfig], init: str) -> Path:
    sizes = {m: {"size": list(c.size), "patch": list(c.patch)} for m, c in modalities.items()}
    return small_run.write_config(path, {"model": {"modalities": sizes, "patch_embed_init": init}})


# In Python, on checkpoints with random parameters.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inflate(tmp_path: Path, dtype: str) -> None:
    write_stock(tmp_path, dtype=dtype, shards=2)
    tensors: Arrays = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
    config = read_config(tmp_path, MODALITIES, init="inflate")
    params, summary = load_params(tmp_path, config, init="inflate", seed=3)
    before, _ = load_params(tmp_path, config, seed=3)
    expected = inflated(tensors, MODALITIES)
    assert len(expected) == 6
    check(params, before, expected)
    assert summary.lines()[:2] == [f"{m}: patch embedding inflated from SigLIP's own" for m in MODALITIES]
    checkpoint = Checkpoint.open(tmp_path, MODALITIES, init="inflate")
    check(dataclasses.replace(checkpoint, seed=8).params(), before, expected)  # the seed does not matter
    assert checkpoint.check() == summary.lines()
    plan = plan_loading(tmp_path, config, init="inflate")
    check({path: t.read() for path, t in plan.params().items()}, before, expected)
    same(
        Checkpoint.open(tmp_path, MODALITIES, init="inflate").params("float16"),
        {p: a.astype(np.float32) for p, a in expected.items()},
    )


def test_inflate_leaves_a_patch_embedding_that_is_there(tmp_path: Path) -> None:
    write_umbrella(tmp_path / "own")
    write_stock(tmp_path / "stock", seed=5)
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    tensors |= {EMBEDDINGS + name: stock[EMBEDDINGS + name] for name in IMAGE}
    save_file({n: t for n, t in tensors.items() if "rsfMRI" not in n}, tmp_path / "own" / "model.safetensors")
    description = {"modalities": {"T1": {"size": MODALITIES["T1"].size, "patch": MODALITIES["T1"].patch}}}
    small_run.write_json(tmp_path / "own" / "umbrella_config.json", description)
    config = read_config(tmp_path / "own", MODALITIES, init="inflate")
    params, summary = load_params(tmp_path / "own", config, init="inflate")
    before, _ = load_params(tmp_path / "own", config)
    check(params, before, inflated(stock, {"rsfMRI": MODALITIES["rsfMRI"]}))
    assert summary.initialised == {"rsfMRI": "inflated from SigLIP's own"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("names", [("T1", "rsfMRI"), ("sMRI", "fMRI")])
def test_resample(tmp_path: Path, names: tuple[str, str], dtype: str) -> None:
    write_umbrella(tmp_path, names=names, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = dict(zip(names, MODALITIES.values(), strict=True))
    config = read_config(tmp_path, OTHER, init="resample")
    assert config.modalities == OTHER
    params, summary = load_params(tmp_path, config, init="resample")
    expected = resampled(tensors, stored, OTHER, dict(zip(OTHER, names, strict=True)))
    assert len(expected) == 6
    before = {
        **{
            path: leaf
            for path, leaf in load_params(tmp_path, read_config(tmp_path))[0].items()
            if "MRI_" not in path and "T1_" not in path
        },
        **expected,
    }
    check(params, before, expected)
    assert summary.lines() == [
        "T1: patch embedding resampled from size 11×9×7, patch 5×3×2",
        "rsfMRI: patch embedding resampled from size 8×6×5×7, patch 4×3×5×3",
    ]
    checkpoint = Checkpoint.open(tmp_path, OTHER, init="resample")
    check(checkpoint.params(), before, expected)
    assert checkpoint.check() == summary.lines()


def test_resample_of_one_modality_leaves_the_other_bit_for_bit(tmp_path: Path) -> None:
    write_umbrella(tmp_path, dtype="float16")
    new = MODALITIES | {"T1": OTHER["T1"]}
    params, summary = load_params(tmp_path, read_config(tmp_path, new, init="resample"), init="resample")
    before, _ = load_params(tmp_path, read_config(tmp_path))
    expected = resampled(load_file(tmp_path / "model.safetensors"), dict(MODALITIES), {"T1": OTHER["T1"]})
    check(params, before, expected)
    assert [*summary.initialised] == ["T1"]


def test_resample_to_the_same_sizes_is_loading(tmp_path: Path) -> None:
    write_umbrella(tmp_path, dtype="bfloat16")
    params, summary = load_params(tmp_path, read_config(tmp_path, MODALITIES, init="resample"), init="resample")
    assert summary.lines() == []
    check(params, load_params(tmp_path, read_config(tmp_path))[0], {})


def test_resample_and_a_modality_that_is_new(tmp_path: Path) -> None:
    write_umbrella(tmp_path, modalities={"T1": MODALITIES["T1"]})
    config = read_config(tmp_path, OTHER, init="resample")
    params, summary = load_params(tmp_path, config, init="resample", seed=4)
    alone = replace(config, modalities=MODALITIES | {"rsfMRI": OTHER["rsfMRI"]})
    random, _ = load_params(tmp_path, alone, seed=4)
    tensors = load_file(tmp_path / "model.safetensors")
    check(params, random, resampled(tensors, dict(MODALITIES), {"T1": OTHER["T1"]}))
    assert summary.initialised["rsfMRI"] == "not in the checkpoint, newly initialised"


def test_other_sizes_are_refused_but_for_resample(tmp_path: Path) -> None:
    write_umbrella(tmp_path)
    for init in ("random", "inflate"):
        with pytest.raises(ConfigError) as error:
            Checkpoint.open(tmp_path, OTHER, init=init)
        assert len(error.value.faults) == 4
        assert all("or model.patch_embed_init: resample" in fault for fault in error.value.faults)


@pytest.mark.parametrize("field", ["orientation", "scaling"])
def test_resample_takes_no_other_preprocessing(tmp_path: Path, field: str) -> None:
    write_umbrella(tmp_path)
    value: Any = {"orientation": "as_stored", "scaling": "minmax"}[field]
    with pytest.raises(ConfigError, match=rf"umbrella_config.json: T1.{field}: .*, which these weights were trained"):
        Checkpoint.open(tmp_path, OTHER | {"T1": replace(OTHER["T1"], **{field: value})}, init="resample")


def test_resample_needs_the_sizes_before(tmp_path: Path) -> None:
    write_umbrella(tmp_path / "base", umbrella_config=False)
    checkpoint = Checkpoint.open(tmp_path / "base", OTHER, init="resample")
    with pytest.raises(CheckpointError) as error:
        checkpoint.check()
    file = tmp_path / "base" / "umbrella_config.json"
    assert {fault.partition(": missing")[0] for fault in error.value.faults} == {
        f"{file}: modality T1",
        f"{file}: modality rsfMRI",
    }
    config = yaml(tmp_path / "run.yaml", OTHER, "resample")
    message = umbrella("convert", "from-hf", tmp_path / "base", tmp_path / "native", "--config", config, code=2)
    assert f"{tmp_path / 'base' / 'umbrella_config.json'}: modality T1: missing" in message
    assert not (tmp_path / "native").exists()


def test_resample_between_3d_and_4d(tmp_path: Path) -> None:
    """Headers show it, so it is rejected before anything is read."""
    old, new = (replace(config, scaling="minmax") for config in (MODALITIES["T1"], OTHER["rsfMRI"]))
    write_umbrella(tmp_path / "base", modalities={"T1": old})
    checkpoint = Checkpoint.open(tmp_path / "base", {"T1": new}, init="resample")
    with pytest.raises(CheckpointError, match=r"modality T1: size .* expected as many axes"):
        checkpoint.params()
    with pytest.raises(CheckpointError, match=r"modality T1: size .* expected as many axes"):
        checkpoint.check()


def test_inflate_of_a_table_that_is_no_square(tmp_path: Path) -> None:
    """Headers show it, too."""
    write_stock(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = EMBEDDINGS + IMAGE[2]
    save_file(tensors | {name: tensors[name][:15].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"expected floats \[side², E\]"):
        Checkpoint.open(tmp_path, MODALITIES, init="inflate").check()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (IMAGE[0], lambda t: t.astype(np.int8)),
        (IMAGE[0], lambda t: t.reshape(36, -1)),
        (IMAGE[1], lambda t: t[:35]),
        (IMAGE[2], lambda t: t.reshape(-1)),
        (IMAGE[2], lambda t: t[:, :35]),
    ],
    ids=["type", "rank", "bias", "rank of the table", "width of the table"],
)
def test_inflate_of_tensors_that_do_not_fit(tmp_path: Path, name: str, change: Any) -> None:
    write_stock(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = tensors | {EMBEDDINGS + name: np.array(change(tensors[EMBEDDINGS + name]), order="C")}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path, MODALITIES, init="inflate").check()
    assert f"{tmp_path / 'model.safetensors'}: {EMBEDDINGS}{name}: " in str(error.value)


# On the command line.


@pytest.mark.parametrize("init", ["inflate", "resample"])
def test_from_hf(tmp_path: Path, init: str) -> None:
    (write_stock if init == "inflate" else write_umbrella)(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    expected = inflated(tensors, OTHER) if init == "inflate" else resampled(tensors, dict(MODALITIES), OTHER)
    config = yaml(tmp_path / "run.yaml", OTHER, init)
    printed = umbrella("convert", "from-hf", tmp_path / "base", tmp_path / "native", "--config", config)
    how = "inflated from SigLIP's own" if init == "inflate" else "resampled from size 11×9×7, patch 5×3×2"
    inspected = umbrella("inspect", "--config", config, "--base", tmp_path / "base")
    for text in (printed, inspected):
        assert f"T1: patch embedding {how}\n" in text
    before = {p: np.asarray(a) for p, a in Checkpoint.open(tmp_path / "base", OTHER, init=init).params().items()}
    check(parameters(tmp_path / "native"), before, expected)
    umbrella("convert", "to-hf", tmp_path / "native", tmp_path / "export")
    stored = json.loads((tmp_path / "export" / "umbrella_config.json").read_text())["modalities"]
    for name, modality in OTHER.items():
        assert (stored[name]["size"], stored[name]["patch"]) == (list(modality.size), list(modality.patch))
    check(parameters(tmp_path / "export"), before, expected)
    state = load_umbrella(tmp_path / "export").state_dict()
    (kernel,) = (tensor.numpy() for name, tensor in state.items() if name.endswith("T1_proj.weight"))
    # SigLIP's kernel of images was never trained on volumes; a resampled one was
    for folder in ("native", "export"):
        assert [*Checkpoint.open(tmp_path / folder).untrained] == (list(OTHER) if init == "inflate" else [])
    np.testing.assert_array_equal(kernel.reshape(36, -1), expected[EMBEDDINGS + "T1_proj.weight"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = small_run.make_world(tmp_path_factory.mktemp("world"), train={"warmup_steps": 0})
    anatomical = [record for record in json.loads(world.train.read_text()) if record["task_id"].startswith("one")]
    small_run.write_json(world.train, anatomical)
    return world


@pytest.mark.slow
def test_train_from_inflated_and_then_from_resampled(world: World, tmp_path: Path) -> None:
    """Only the projector trains, so that the patch embedding keeps its initial weights.

    The second run starts from the export of the first, at other sizes.
    """
    flags = ["--set", "train.groups={projector: {}}", "--set"]
    inflate, resample = ([*flags, f"model.patch_embed_init={init}"] for init in ("inflate", "resample"))
    printed = umbrella(*world.train_flags(tmp_path / "first", "--batch-size", 4, *inflate))
    assert "T1: patch embedding inflated from SigLIP's own\n" in printed
    expected = inflated(load_file(world.base / "model.safetensors"), small_run.modalities())
    after = parameters(tmp_path / "first")
    same(after, expected)
    umbrella("convert", "to-hf", tmp_path / "first", tmp_path / "export")
    same(parameters(tmp_path / "export"), after)

    old = small_run.modalities()
    new = {**old, "T1": replace(old["T1"], size=(8, 6, 7), patch=(2, 3, 3))}
    sizes = ["--set", "model.modalities.T1.size=[8, 6, 7]", "--set", "model.modalities.T1.patch=[2, 3, 3]"]
    base = ["--base", tmp_path / "export"]
    printed = umbrella(*world.train_flags(tmp_path / "second", "--batch-size", 4, *resample, *sizes, *base))
    line = "T1: patch embedding resampled from size 6×7×5, patch 3×2×4\n"
    assert line in printed
    assert "rsfMRI: patch embedding resampled" not in printed
    output = umbrella("inspect", "--config", world.config, *base, *sizes, *resample)
    assert line in output
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    expected |= resampled(tensors, old, {"T1": new["T1"]})
    after = parameters(tmp_path / "second")
    same(after, expected)
    umbrella("convert", "to-hf", tmp_path / "second", tmp_path / "again")
    same(parameters(tmp_path / "again"), after)
    stored = read_config(tmp_path / "again").modalities
    assert stored == new
    with pytest.raises(ConfigError, match=r"T1\.size"):
        umbrella_jax.load(tmp_path / "again", modalities=old)


def test_train_moves_inflated_parameters(world: World, tmp_path: Path) -> None:
    """The run's file of trained parameters also adds the patch embedding to the stock base."""
    flags = ["--batch-size", 4, "--set", "model.patch_embed_init=inflate", "--set", "train.learning_rate=1e-4"]
    umbrella(*world.train_flags(tmp_path / "run", *flags))
    start = inflated(load_file(world.base / "model.safetensors"), small_run.modalities())
    after = parameters(tmp_path / "run")
    for path, array in start.items():
        if "rsfMRI" in path:  # not in the data
            np.testing.assert_array_equal(after[path], array)
        else:
            moved = np.abs(after[path] - array).max()
            assert 0 < moved < 1e-3, path
    umbrella("convert", "to-hf", tmp_path / "run", tmp_path / "part", "--trainable-only", "--include-untrained")
    (part,) = (tmp_path / "part").iterdir()
    same(split(umbrella_jax.load(world.base, patch_embed=part))[1], after)


def test_weights_without_a_record_of_their_preprocessing_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The original system read arrays as stored, and the default here is RAS."""
    write_umbrella(tmp_path / "base", umbrella_config=False)
    checkpoint = Checkpoint.open(tmp_path / "base", MODALITIES)
    lines = [line for line in checkpoint.check() if "does not say" in line]
    assert [line.partition(":")[0] for line in lines] == ["T1", "rsfMRI"]
    assert lines[0] == (
        "T1: the checkpoint does not say how its volumes were prepared; taken as configured: orientation RAS, mode "
        "resize, scaling znorm, background auto. The original system and SwiFT-style pipelines read the axes as "
        "stored: for weights of theirs set model.modalities.T1.orientation: as_stored, or left and right may be swapped"
    )
    assert lines[1].count("stride_between_seq 1.0. The original system") == 1
    with caplog.at_level(logging.WARNING):
        umbrella_jax.load(tmp_path / "base", modalities=MODALITIES)
    assert [f"{tmp_path / 'base'}: {line}" for line in lines] == caplog.messages

    stored = {name: replace(modality, orientation="as_stored") for name, modality in MODALITIES.items()}
    original = Checkpoint.open(tmp_path / "base", stored)
    assert not any("left and right may be swapped" in line for line in original.check())
    write_native(original, tmp_path / "native")
    native = Checkpoint.open(tmp_path / "native")
    assert dict(native.config.modalities) == stored
    assert native.check() == []
    with pytest.raises(ConfigError) as error:
        Checkpoint.open(tmp_path / "native", MODALITIES)
    assert error.value.faults == tuple(
        f"{tmp_path / 'native' / 'umbrella_config.json'}: {name}.orientation: as_stored in the checkpoint, RAS as "
        f"configured; set model.modalities.{name}.orientation: as_stored, which these weights were trained on"
        for name in MODALITIES
    )


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("T1", "orientation", "LAS"),
        ("T1", "scaling", "minmax"),
        ("T1", "mode", "pad"),
        ("rsfMRI", "background", "lowest"),
        ("rsfMRI", "stride_within_seq", 2),
        ("rsfMRI", "stride_between_seq", 0.5),
    ],
)
def test_weights_are_not_used_with_other_preprocessing(tmp_path: Path, name: str, field: str, value: Any) -> None:
    """Every field counts that a patch embedding's meaning depends on; the names in data files (`aliases`) do not."""
    write_umbrella(tmp_path)
    changed = MODALITIES | {name: replace(MODALITIES[name], **{field: value})}
    with pytest.raises(
        ConfigError, match=f"{name}.{field}: .* in the checkpoint, {value} as configured; set model.mod"
    ):
        Checkpoint.open(tmp_path, changed)
    Checkpoint.open(tmp_path, MODALITIES | {"T1": replace(MODALITIES["T1"], aliases=("dMRI",))})
