"""Runs with adapters, and runs on top of runs: what they start from, hold, resume, export and give back."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import umbrella_jax
from tests.helpers import small_run
from tests.helpers.small_run import World, parameters, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.load import load_config
from umbrella_jax.errors import CheckpointError
from umbrella_jax.inference.processor import Processor
from umbrella_jax.models.paths import adapted_weight, adapter_paths

TARGETS = "[language_model.q_proj, language_model.down_proj, vision_tower.fc1]"
LORA = ["--set", f"model.lora={{rank: 2, alpha: 4, targets: {TARGETS}}}"]
GROUPS = ["--set", "train.groups={patch_embed: {}, 'multi_modal_projector.linear_2.*': {}, lora: {}}"]
WEIGHTS = [
    "language_model.model.layers.mlp.down_proj.weight",
    "language_model.model.layers.self_attn.q_proj.weight",
    "vision_tower.vision_model.encoder.layers.mlp.fc1.weight",
]
ADAPTERS = {path for weight in WEIGHTS for path in adapter_paths(weight)}
PROJECTOR = {f"multi_modal_projector.linear_2.{end}" for end in ("weight", "bias")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world(tmp_path_factory.mktemp("world"), train={"warmup_steps": 0, "save_steps": 1}, seed=3)


def train(world: World, out: str, *flags: object) -> Path:
    """Run two steps on T1 only, which compiles in half the time."""
    anatomical = [record for record in json.loads(world.train.read_text()) if record["task_id"].startswith("one")]
    data = small_run.write_json(world.root / "anatomical.json", anatomical)
    umbrella(*world.train_flags(world.root / out, "--train-data", data, "--batch-size", 2, *flags))
    return world.root / out


@pytest.fixture(scope="module")
def first(world: World) -> Path:
    """Stage 1: the patch embedding."""
    return train(world, "first")


@pytest.fixture(scope="module")
def second(world: World, first: Path) -> Path:
    """Stage 2, on top of it: a part of the projector, and adapters, too."""
    return train(world, "second", "--base", first, *LORA, *GROUPS)


@pytest.fixture(scope="module")
def export(second: Path) -> Path:
    umbrella("convert", "to-hf", second, second.parent / "export", "--include-untrained")
    return second.parent / "export"


def changed(after: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> set[str]:
    assert after.keys() == before.keys()
    return {path for path, leaf in after.items() if leaf.tobytes() != before[path].tobytes()}


@pytest.mark.slow
def test_a_run_starts_from_a_run(first: Path, second: Path) -> None:
    """Nothing but what it trains is other than the first run's end, whose step it names."""
    assert load_config(second / "config.yaml").model.base == str(first / "checkpoints" / "2")
    before = parameters(first)
    after = {path: leaf for path, leaf in parameters(second).items() if path not in ADAPTERS}
    trained = {path for path in before if "embeddings.T1_" in path} | PROJECTOR
    assert changed(after, before) == trained
    embedding = next(path for path in trained if path.endswith("T1_proj.weight"))
    steps = [
        np.abs(b[embedding] - a[embedding]).max()
        for a, b in ((before, after), (parameters(first / "checkpoints/1"), before))
    ]
    assert 0 < steps[0] < 3 * steps[1]


def test_adapters_are_parameters_of_the_run(second: Path) -> None:
    trained = Checkpoint.open(second).trained()
    assert trained.keys() >= ADAPTERS | PROJECTOR
    assert {path for path in trained if adapted_weight(path)} == ADAPTERS
    start = Checkpoint.open(second / "checkpoints" / "1").trained()
    for path in ADAPTERS:
        assert trained[path].dtype == np.float32
        assert (np.asarray(trained[path]) != np.asarray(start[path])).any(), path
    assert parameters(second).keys() >= ADAPTERS


def test_inspect_counts_adapters(world: World, first: Path) -> None:
    said = umbrella("inspect", "--config", world.config, "--base", first, *LORA, *GROUPS)
    assert f"{first}: step 2 (the newest)" in said
    # 2 layers of 2·(64 + 64), 2·(128 + 64) and 2·(64 + 128)
    size = 2 * 2 * (128 + 192 + 192)
    assert f"lora {size:,} {size:,} 100% 0 0%" in [" ".join(line.split()) for line in said.splitlines()]
    assert re.search(r"^lora: vision_tower\.\S+\.fc1\.\n  lora_A\.weight +2×2×64 +256$", said, re.MULTILINE)


def test_many_tensors_share_a_line_per_module(world: World, second: Path) -> None:
    """44 tensors train: one stacked tensor per kind and layer, and adapters. They fit a screen, of 80 columns."""
    lora = ["--set", "model.lora={rank: 3, targets: [vision_tower, language_model]}"]
    groups = ["--set", "train.groups={patch_embed: {}, projector: {}, lora: {}}"]
    said = umbrella("inspect", "--config", world.config, "--base", second, *lora, *groups)
    assert "base: second (run on base)\n" in said
    assert "adapters of second: merged into the weights\n" in said
    assert re.search(
        r"^lora: language_model\.model\.layers\.\n  mlp\.down_proj ×2 +2×3×128, 2×64×3 +1,152$", said, re.M
    )
    assert said.count("\n") < 50
    assert max(len(line) for line in said.splitlines() if " " in line.strip() and str(world.root) not in line) <= 80


def test_resumed_is_not_cut_off(world: World, first: Path, second: Path) -> None:
    """Bit for bit, adapters among it; and with other adapters it is another run."""
    again = Path(shutil.copytree(second, world.root / "again"))
    shutil.rmtree(again / "checkpoints" / "2")
    flags = ["--base", first, *GROUPS, "--resume"]
    other = world.train_flags(again, "--train-data", world.root / "anatomical.json", "--batch-size", 2, *flags)
    message = umbrella(*other, "--set", f"model.lora={{rank: 3, alpha: 4, targets: {TARGETS}}}", code=2)
    assert "cannot resume: --set: model.lora.rank: 3 now, 2 in the run" in message
    train(world, "again", *flags, *LORA)
    assert changed(parameters(again), parameters(second)) == set()
    assert small_run.numbers(again) == small_run.numbers(second)


def test_the_first_run_may_go_on_but_is_not_exchanged(world: World, second: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(second, tmp_path / "moved"))
    settings = small_run.read_config(moved / "config.yaml")
    settings["model"]["base"] = str(world.root / "first" / "checkpoints" / "1")
    small_run.write_config(moved / "config.yaml", settings)
    with pytest.raises(CheckpointError, match=r"first: not the weights that .*moved was trained on"):
        umbrella_jax.load(moved)


def test_a_run_without_a_checkpoint_is_no_base(world: World, first: Path, tmp_path: Path) -> None:
    empty = Path(shutil.copytree(first, tmp_path / "empty"))
    shutil.rmtree(empty / "checkpoints")
    message = umbrella(*world.train_flags(tmp_path / "out", "--base", empty), code=2)
    assert f"{empty}: the run has no checkpoint yet; train it first" in message


# Export.


def test_merged_it_says_the_same(second: Path, export: Path, world: World) -> None:
    """Logits of W + s·B·A against those of W with the adapter beside it."""
    merged, held = parameters(export), parameters(second)
    assert merged.keys() == held.keys() - ADAPTERS
    for weight in WEIGHTS:
        a, b = (held[path] for path in adapter_paths(weight))
        np.testing.assert_allclose(merged[weight], held[weight] + 2 * np.matmul(b, a), rtol=1e-6, atol=1e-7)
        assert (merged[weight] != held[weight]).mean() > 0.9
    batch = Processor.load(export).batch(world.eval, image_root=world.root / "scans")
    ours, theirs = (np.asarray(umbrella_jax.load(path)(batch)) for path in (second, export))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()


def test_pytorch_says_the_same(second: Path, export: Path) -> None:
    """The run in PyTorch, merged, against its export in JAX: logits and greedy tokens, too."""
    said = umbrella("convert", "verify", second, export)
    assert said.splitlines()[-1] == "the same model"
    assert "T1: logits of PyTorch (A) and JAX (B) differ by" in said
    assert json.loads((export / "umbrella_config.json").read_text())["base"] == "base"


@pytest.fixture(scope="module")
def part(second: Path) -> Path:
    umbrella("convert", "to-hf", second, second.parent / "part", "--trainable-only", "--include-untrained")
    return second.parent / "part" / "trainable.safetensors"


def test_parameters_of_both_runs_come_back_onto_the_base(
    world: World, export: Path, part: Path, tmp_path: Path
) -> None:
    """Bit for bit what the export holds: the scale is a power of two."""
    held = load_file(part)
    name = "language_model.model.layers.1.self_attn.q_proj"
    assert {held[f"{name}.lora_{which}.weight"].shape for which in "AB"} == {(2, 64), (64, 2)}
    assert len([key for key in held if "lora_" in key]) == 2 * 2 * len(WEIGHTS)
    assert sum(array.size for array in held.values()) < 20_000
    assert changed(parameters(world.base, patch_embed=part), parameters(export)) == set()
    flags = ["--config", world.config, "--patch-embed", part]
    umbrella("convert", "from-hf", world.base, tmp_path / "native", *flags)
    assert changed(parameters(tmp_path / "native"), parameters(export)) == set()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda held, a, b: held.pop(a), "q_proj.weight: half of its adapter is missing"),
        (lambda held, a, b: held.update({a: held[a][:, 1:]}), r"its adapter has shapes \[2, 63\] and \[64, 2\] beside"),
        (lambda held, a, b: held.update({b: held[b].astype(float)}), "types float32 and float64, expected floats"),
        (lambda held, a, b: held.update({f"x.{b}": held[b], f"x.{a}": held[a]}), r"x.language\S+: has an adapter, but"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(world: World, part: Path, tmp_path: Path, change, fault: str) -> None:
    from safetensors import safe_open

    with safe_open(part, "np") as file:
        metadata = file.metadata()
    held = load_file(part)
    change(held, *adapter_paths("language_model.model.layers.1.self_attn.q_proj.weight"))
    save_file(held, tmp_path / "other", metadata)
    with pytest.raises(CheckpointError, match=fault):
        umbrella_jax.load(world.base, patch_embed=tmp_path / "other")
