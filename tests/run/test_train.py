"""Runs from end to end through the command line: their files, trained parameters, and resuming."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import umbrella_jax.run.train
from tests.helpers import small_run
from tests.helpers.small_run import World, parameters, read_config, read_lines, umbrella
from umbrella_jax.batch import Batch
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.load import load_config
from umbrella_jax.data.conversation import Conversation, Message
from umbrella_jax.data.validation.checks import validate
from umbrella_jax.errors import DataError
from umbrella_jax.inference.generate import decode, prefill, score_answers
from umbrella_jax.scoring.rows import blank_rows
from umbrella_jax.training.step import TrainState, jit_eval_step
from umbrella_jax.training.trainer import EvaluateRegularly, SaveCheckpoint, TrainingRun, WriteMetrics

STEPS, SAVE, EVAL = 36, 3, 24
FLAGS = ["--epochs", STEPS // 3, "--set", f"train.save_steps={SAVE}"]  # steps with one scan, with two, and with runs
PATCH_EMBED = "vision_tower.vision_model.embeddings."
TRAINED = {
    f"{PATCH_EMBED}{modality}{end}"
    for modality in small_run.MODALITIES
    for end in ("_proj.weight", "_proj.bias", "_positional_embeddings")
}
SECRETS = {"WANDB_API_KEY": "5ec2e7-of-wandb", "HF_TOKEN": "hf_5ec2e7"}  # environment variables of the runs below
METRICS = ("step", "loss", "grad_norm", "learning_rate", "supervised_tokens")  # all but seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def printed(world: World) -> str:
    """Train 36 steps into `run`, evaluate after 24 and at the end, and return stdout."""
    flags = [*FLAGS, "--eval-data", world.eval, "--set", f"train.eval_steps={EVAL}"]
    with mock.patch.dict(os.environ, SECRETS):
        out, err = small_run.said(*world.train_flags(world.root / "run", *flags))
    assert not any(secret in out + err for secret in SECRETS.values())
    return out


@pytest.fixture(scope="module")
def run(printed: str, world: World) -> Path:
    return world.root / "run"


def test_a_run_writes_these_files(run: Path, world: World) -> None:
    written = {"config.yaml", "model", "checkpoints", "metrics.jsonl", "predictions", "log.txt", ".lock"}
    written |= {"inputs.json", "counts.json", "summary.json"}
    assert {p.name for p in run.iterdir()} == written
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all({*METRICS, "step_seconds", "wait_seconds"} <= line.keys() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert [line["learning_rate"] for line in lines[:3]] == pytest.approx([0, 5e-3, 1e-2])  # two steps of warm-up
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"30", "33", "36"}
    assert {"config.json", "umbrella_config.json", "tokenizer.json"} <= {p.name for p in (run / "model").iterdir()}
    assert not list((run / "model").glob("*.safetensors"))
    settings = read_config(run / "config.yaml")
    assert settings["model"]["base"] == str(world.base)
    assert settings["train"]["epochs"] == STEPS / 3
    assert settings["data"]["max_length"] == 8192  # defaults too, so that a run does not depend on later defaults


def test_another_rate_and_length_take_the_compiled_step(run: Path, world: World, tmp_path: Path) -> None:
    traced = list[str]()

    def listen(event: str, _: float, *, fun_name: str = "", **__: Any) -> None:
        traced.append(fun_name)

    flags = ["--epochs", 1, "--learning-rate", 0.03, "--set", "train.warmup_steps=1"]
    jax.monitoring.register_event_duration_secs_listener(listen)
    umbrella(*world.train_flags(tmp_path / "run", *flags))
    jax.jit(lambda: 0)()
    jax.monitoring.unregister_event_duration_listener(listen)
    assert "<lambda>" in traced
    assert "train_step" not in traced
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 0.03, 0.015])


def test_secrets_go_nowhere(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not into config, checkpoints, metrics, predictions or exports."""
    for key, secret in SECRETS.items():
        monkeypatch.setenv(key, secret)
    umbrella("convert", "to-hf", run, tmp_path / "export")
    umbrella("convert", "to-hf", run, tmp_path / "part", "--trainable-only")
    files = [file for root in (run, tmp_path) for file in root.rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.jsonl", "metadata", "README.md", "trainable.safetensors"} <= {f.name for f in files}
    for file in files:
        assert not any(secret.encode() in file.read_bytes() for secret in SECRETS.values()), file


def test_each_evaluation_writes_its_answers(run: Path) -> None:
    lines = {line["step"]: line for line in read_lines(run / "metrics.jsonl")}
    evaluated = {step for step, line in lines.items() if "eval_loss" in line}
    assert evaluated == {EVAL, STEPS}
    assert {p.name for p in (run / "predictions").iterdir()} == {f"step_{step}.jsonl" for step in evaluated}
    rows = read_lines(run / "predictions" / f"step_{STEPS}.jsonl")
    assert [row["task_id"] for row in rows] == ["eval-one", "eval-two", "eval-run"]
    assert [row["reference"] for row in rows] == ["left.", "right.", "left."]
    assert lines[STEPS]["eval_accuracy"] == pytest.approx(
        np.mean([row["prediction"].strip(" .") == row["reference"].strip(".") for row in rows])
    )


def test_each_evaluation_prints_its_results(printed: str, run: Path) -> None:
    """Terminal and log get step, loss, and each task's main metrics with chance level."""
    lines = {line["step"]: line for line in read_lines(run / "metrics.jsonl")}
    log = [line[26:] for line in (run / "log.txt").read_text().splitlines()]
    for step in (EVAL, STEPS):
        beginning = f"step {step}  evaluation: loss {lines[step]['eval_loss']:.4f}"
        assert log.count(beginning) == 1, "when it was made, not again at the end"
        words = " ".join(" ".join(log[log.index(beginning) :]).split())
        for task in ("T1", "T3"):
            assert f"step {step} {task}: accuracy {lines[step][f'eval_accuracy/{task}']:.3f} (chance 1.000)" in words
        assert f"(2 conversations, {round(2 * lines[step]['eval_unparsable/T1'])} unparsable)" in words
        assert beginning in printed


def test_predictions_say_whose_they_are() -> None:
    """The subject follows from the images' paths if metadata lacks it and all are of one subject."""
    messages = (Message("user", ("Which sex?",)), Message("assistant", ("female.",)))
    whose: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {"01"}),
        ({}, {"01", "02"}),
        ({"subject_id": "02"}, {"01", "02"}),
        ({}, set()),
        ({"subject_id": None}, {"01"}),
        ({"subject_id": math.nan}, {"01"}),
    ]
    conversations = [Conversation("a", "T1", messages, metadata, "a.json", frozenset(s)) for metadata, s in whose]
    rows = blank_rows(conversations)
    assert [row["metadata"].get("subject_id") for row in rows] == ["01", None, "02", None, "01", "01"]
    assert rows[0]["reference"] == "female."


def test_frozen_is_frozen_and_the_patch_embedding_trains(run: Path, world: World) -> None:
    after = parameters(run)
    before = parameters(world.base, modalities=small_run.modalities(), allow_untrained=True)
    assert after.keys() == before.keys()
    changed = {path for path, leaf in after.items() if leaf.tobytes() != before[path].tobytes()}
    assert changed == TRAINED


@pytest.fixture(scope="module")
def counted(world: World) -> dict[str, tuple[int, int]]:
    """Count the model's parameters: {component: (trainable, frozen)}."""
    sizes = dict.fromkeys(["patch_embed", "vision_tower", "projector", "language_model", "unused"], (0, 0))
    for path, leaf in parameters(world.base, modalities=small_run.modalities(), allow_untrained=True).items():
        beginnings = {
            PATCH_EMBED: "patch_embed",
            "vision_tower.vision_model.post_layernorm.": "unused",
            "vision_tower.": "vision_tower",
            "multi_modal_projector.": "projector",
            "language_model.": "language_model",
        }
        part = next(part for beginning, part in beginnings.items() if path.startswith(beginning))
        trainable, frozen = sizes[part]
        sizes[part] = (trainable + leaf.size, frozen) if path in TRAINED else (trainable, frozen + leaf.size)
    return sizes | {"total": tuple(map(sum, zip(*sizes.values(), strict=True)))}


def test_the_start_of_a_run(printed: str, counted: dict[str, tuple[int, int]], run: Path, world: World) -> None:
    start = printed[printed.index("base: base (Hugging Face directory)\n") : printed.index("step 1: ")].splitlines()
    assert len(start) < 45
    assert max(len(line) for line in start if " " in line.strip() and str(run) not in line) <= 80
    lines = [" ".join(line.split()) for line in start]
    assert "T1: patch embedding not in the checkpoint, newly initialised" in lines
    assert "T1 (sMRI) 6×7×5 3×2×4 2×3×1 6 64" in lines
    assert "rsfMRI (fMRI) 4×3×5×4 2×3×4×2 2×1×1×2 4 64" in lines
    for name, (trainable, frozen) in counted.items():
        total = trainable + frozen
        shares = [f"{100 * part / total:.2f}%".replace(".00%", "%") for part in (trainable, frozen)]
        assert f"{name} {total:,} {trainable:,} {shares[0]} {frozen:,} {shares[1]}" in lines
    for path, leaf in parameters(run).items():
        row = f"{path.removeprefix(PATCH_EMBED)} {'×'.join(map(str, leaf.shape))} {leaf.size:,}"
        assert (row in lines) == (path in TRAINED), row
    for line in (
        "the patch embedding is trainable: passed (T1, rsfMRI)",
        f"trainable parameters match train.groups: passed ({len(TRAINED)} tensors, in float32)",
        f"everything else is frozen: passed ({len(parameters(run)) - len(TRAINED)} tensors, no moments)",
        "remat: none",
        "precision: compute float32, frozen float32, trainable and moments float32",
        "attention: xla (auto: these devices have no kernel of their own)",
        "layers: scanned (auto: unrolling pays on GPUs)",
        "devices: 1 × cpu (data=1,fsdp=1,tensor=1)",
        f"12 conversations, {STEPS} steps, into {run}",
    ):
        assert line in lines
    # three of its scans are in eval too, which the world allows; no conversation names a subject
    assert "WARNING: 3 scans are in train and in eval: " in " ".join(printed.split())
    # 4 of one scan and the one of text, 3 of runs, 4 of two scans; M is 4, 3 and 4
    assert "plan: 3 shapes to compile, 36.3% of positions padded\n" in printed
    assert "\n      1.25 images per conversation, 0.92 encoded after sharing" in printed


def test_summary_json(run: Path, counted: dict[str, tuple[int, int]], world: World) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert {name: (count["trainable"], count["frozen"]) for name, count in summary["components"].items()} == counted
    trained = {path: leaf for path, leaf in parameters(run).items() if path in TRAINED}
    assert {path: (tuple(t["shape"]), t["parameters"]) for path, t in summary["trainable"].items()} == {
        path: (leaf.shape, leaf.size) for path, leaf in trained.items()
    }
    assert summary["base"]["path"] == str(world.base)
    assert summary["modalities"]["T1"] == {
        "aliases": ["sMRI"],
        "volume": [6, 7, 5],
        "patch": [3, 2, 4],
        "grid": [2, 3, 1],
        "tokens": 6,
        "embedding": 64,
    }
    assert [check["result"] for check in summary["checks"]] == ["passed"] * 3
    assert (summary["mesh"], summary["resumed_from"]) == ({"data": 1, "fsdp": 1, "tensor": 1}, None)


def test_inspect_prints_the_same_summary(printed: str, world: World, tmp_path: Path) -> None:
    summary = umbrella("inspect", "--config", world.config, "--base", world.base)
    assert summary in printed
    shutil.copy(world.base / "config.json", tmp_path)
    bare = umbrella("inspect", "--config", world.config, "--base", tmp_path)
    assert "no weights there" in " ".join(bare.split())
    assert bare[bare.index("modality") :] == summary[summary.index("modality") :]
    other = umbrella("inspect", "--config", world.config, "--base", tmp_path, "--set", "train.groups={projector: {}}")
    assert re.search(r"^projector +8,320 +8,320 +100% +0 +0%$", other, re.MULTILINE)
    assert "the patch embedding is trainable: not requested (frozen: T1, rsfMRI)" in other
    torch.save(load_file(world.base / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert "no weights there" not in umbrella("inspect", "--config", world.config, "--base", tmp_path)


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(tmp_path: Path) -> None:
    """Four comparisons, three times on 1×2×2 devices; resumed on 2×1×1 before the last time."""
    world = small_run.make_world(tmp_path)
    small_run.soften(world.base)
    flags = ["--task-filter", "T3", "--batch-size", 4, "--epochs", 3, "--set", "train.save_steps=1"]
    flags += ["--learning-rate", 1e-3, "--set", "train.warmup_steps=0"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    output = umbrella(*world.train_flags(whole, *flags, "--mesh", "fsdp=2,tensor=2"), devices=4)
    assert "3 steps, into " in output
    assert "devices: 4 × cpu (data=1,fsdp=2,tensor=2)" in output
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "3")
    output = umbrella(*world.train_flags(again, *flags, "--resume"), devices=2)
    assert "resume: from step 2" in output
    assert "devices: 2 × cpu (data=2,fsdp=1,tensor=1)" in output
    summary = json.loads((again / "summary.json").read_text())
    assert (summary["mesh"], summary["resumed_from"]) == ({"data": 2, "fsdp": 1, "tensor": 1}, 2)
    small_run.assert_close(again, whole)


def test_a_run_is_not_overwritten(run: Path, world: World) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    message = umbrella(*world.train_flags(run, *FLAGS), code=2)
    assert str(run) in message
    assert "--resume" in message
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--learning-rate", 5e-3], "train.learning_rate: 0.005 now, 0.01 in the run"),
        (["--set", "train.groups.patch_embed.weight_decay=0"], "train.groups.patch_embed.weight_decay: 0"),
        (["--set", "model.compute_dtype=bfloat16"], "model.compute_dtype: bfloat16"),
        (["--set", "data.template=original"], "data.template: original now, umbrella in the run"),
        (["--set", "seed=7"], "seed: 7 now"),
    ],
)
def test_resuming_with_other_settings_is_refused(run: Path, world: World, flags: list[Any], key: str) -> None:
    """Before volumes are opened."""
    other = [*FLAGS, "--eval-data", world.eval, "--resume", "--image-root", run / "nowhere", *flags]
    message = umbrella(*world.train_flags(run, *other), code=2)
    assert f"cannot resume: {flags[0]}: {key}" in message
    assert "faults" not in message  # only that one


def test_resuming_on_another_base_is_refused(run: Path, world: World, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(world.base, tmp_path / "base")
    tensors = load_file(other / "model.safetensors")
    tensors["language_model.model.norm.weight"][3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    flags = [*FLAGS, "--eval-data", world.eval, "--resume", "--base", other]
    assert "not the weights that the run started from" in umbrella(*world.train_flags(run, *flags), code=2)


def test_a_run_from_before_a_field_was_known_resumes(run: Path, world: World, tmp_path: Path) -> None:
    """The field counts as its default, and `model.remat: dots`, which no longer exists, can be read."""
    old = shutil.copytree(run, tmp_path / "old")

    def forget(meta: dict[str, Any]) -> None:
        for modality in meta["config"]["model"]["modalities"].values():
            del modality["mode"], modality["spacing"]
        meta["config"]["model"]["remat"] = "dots"

    small_run.edit_meta(old, forget)
    settings = read_config(old / "config.yaml")
    settings["model"]["remat"] = "dots"
    small_run.write_config(old / "config.yaml", settings)
    assert "damaged" not in umbrella("runs", old)
    umbrella("score", old)
    flags = [*FLAGS, "--eval-data", world.eval, "--resume"]
    assert f"from step {STEPS}" in umbrella(*world.train_flags(old, *flags))
    message = umbrella(*world.train_flags(old, *flags, "--set", "model.modalities.T1.mode=pad"), code=2)
    assert "cannot resume: --set: model.modalities.T1.mode: pad now, resize in the run" in message
    small_run.edit_meta(old, lambda meta: meta.pop("num_steps"))
    message = umbrella(*world.train_flags(old, *flags), code=2)
    assert "cannot resume: another version wrote it, without num_steps; " in message


def test_a_finished_run_resumes_to_its_end(run: Path, world: World) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    other = ["--set", "evaluation={tasks: {T1: {answers: [left, right]}}, resamples: 7}"]  # changes no step
    flags = [*FLAGS, "--eval-data", world.eval, *other, "--resume"]
    assert f"from step {STEPS}" in umbrella(*world.train_flags(run, *flags))
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["keep_best=1", "best_metric=eval_acuracy"],
            "no evaluation gives eval_acuracy; expected one of eval_accuracy",
        ),
        (["keep_best=1", "best_metric=eval_mae/T1"], "no evaluation gives eval_mae/T1"),
        (["keep_best=1"], "1 with best_metric not set; set both"),
        (["keep_best=1", "best_metric=eval_copy_rate/T1"], "neither high nor low values are good"),
        (["keep_best=1", "best_metric=eval_loss", "best_mode=max"], "train.best_mode: no such key"),
        (["best_metric=eval_loss"], "0 with best_metric eval_loss; set both"),
        (["keep_latest=0"], "keep_latest: expected 1 or more"),
        (
            ["keep_best=1", "best_metric=eval_loss", "eval_steps=1", "early_stopping={metric: eval_f1, patience: 2}"],
            "train.early_stopping.metric: no evaluation gives eval_f1; expected one of eval_accuracy",
        ),
    ],
)
def test_refuses_best_checkpoints_without_a_metric_to_rank_them(
    world: World, tmp_path: Path, settings: list[str], message: str
) -> None:
    flags = [word for key in settings for word in ("--set", f"train.{key}")]
    assert message in umbrella(*world.train_flags(tmp_path, "--eval-data", world.eval, *flags), code=2)
    if "acuracy" in message:
        assert "data.eval too" in umbrella(*world.train_flags(tmp_path, *flags), code=2)


@dataclass
class Planned:
    """The arguments that `umbrella-jax train` passes to the loop."""

    run: TrainingRun
    state: TrainState
    batches: list[Batch]
    hooks: dict[type, Any]
    stdout: str
    settings: dict[str, Any]


@pytest.fixture
def planned(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Planned]:
    """`planned(*flags)` prepares a run and returns the loop's arguments, without making a step."""
    seen: list[Any] = []

    def fit(run: TrainingRun, state: TrainState, batches: Iterator[Batch], hooks: list[Any], **_: Any) -> TrainState:
        seen[:] = run, state, list(batches), {type(hook): hook for hook in hooks}
        (tmp_path / "planned" / "metrics.jsonl").write_text(f'{{"step": {run.num_steps}}}\n')
        return replace(state, step=jnp.int32(run.num_steps))

    def plan(*flags: object) -> Planned:
        monkeypatch.setattr(umbrella_jax.run.train, "fit", fit)
        printed = umbrella(*world.train_flags(tmp_path / "planned", *flags))
        return Planned(*seen, printed, read_config(tmp_path / "planned" / "config.yaml"))

    return plan


def test_modality(planned: Callable[..., Planned]) -> None:
    plan = planned("--modality", "fMRI")
    assert "4 conversations, 1 steps" in plan.stdout  # three runs, and the one without images
    assert plan.settings["data"]["modality"] == "fMRI"
    assert [set(batch.volumes) for batch in plan.batches] == [{"rsfMRI"}]


def test_task_filter(planned: Callable[..., Planned]) -> None:
    plan = planned("--task-filter", "T3")
    assert "4 conversations, 1 steps" in plan.stdout
    assert plan.settings["data"]["task_filter"] == "T3"
    (batch,) = plan.batches
    patches = (batch.feature_idx[0] >= 0).sum(-1)
    assert patches.tolist() == [12] * 4 + [0] * 2  # each shows two scans of 6 patches; two rows are empty


def test_batch_size(planned: Callable[..., Planned]) -> None:
    plan = planned("--batch-size", 5, "--epochs", 2)
    assert plan.settings["train"]["batch_size"] == 5
    assert [batch.input_ids.shape[:2] for batch in plan.batches] == [(1, 5)] * 6  # 3 an epoch


def test_accumulate_steps(planned: Callable[..., Planned]) -> None:
    plan = planned("--set", "train.accumulate_steps=2")
    assert [batch.input_ids.shape[:2] for batch in plan.batches] == [(2, 6)] * 2


def test_learning_rate(planned: Callable[..., Planned]) -> None:
    plan = planned("--learning-rate", "3e-4", "--set", "train.warmup_steps=0")
    assert float(plan.run.schedule(0)) == pytest.approx(3e-4)
    assert plan.settings["train"]["learning_rate"] == 3e-4


def test_epochs(planned: Callable[..., Planned]) -> None:
    plan = planned("--epochs", 2.5)
    assert plan.run.num_steps == len(plan.batches) == 8  # of 3 an epoch
    assert plan.settings["train"]["epochs"] == 2.5


def test_set(planned: Callable[..., Planned]) -> None:
    plan = planned("--set", "train.groups={projector: {weight_decay: 0}}", "--set", "seed=5")
    assert plan.settings["train"]["groups"] == {"projector": {"learning_rate_factor": 1.0, "weight_decay": 0.0}}
    assert {path.partition(".")[0] for path in plan.state.trainable} == {"multi_modal_projector"}
    assert plan.settings["seed"] == 5


def test_template(planned: Callable[..., Planned], world: World, tmp_path: Path) -> None:
    plan = planned("--task-filter", "T3", "--set", "data.template=original", "--eval-data", world.eval)
    assert json.loads((tmp_path / "planned" / "model" / "umbrella_config.json").read_text())["template"] == "original"
    tokenizer = Checkpoint.open(world.base, small_run.modalities()).tokenizer()
    (batch,) = plan.batches
    learnt = tokenizer.decode(batch.target_ids[0, 0][batch.target_mask[0, 0]])
    assert re.fullmatch(r"(<\|im_start\|>assistant\n(left|right)\.<\|im_end\|>\n){2}", learnt)
    assert plan.hooks[EvaluateRegularly].evaluate.args[0].model.processor.template == "original"


def test_image_root(planned: Callable[..., Planned], world: World, tmp_path: Path) -> None:
    shutil.copytree(world.root / "scans", tmp_path / "moved")
    small_run.write_volume(tmp_path / "moved" / "0.nii.gz", small_run.VOLUME_SHAPES["T1"], seed=99)
    volumes = []
    for root in (world.root / "scans", tmp_path / "moved"):
        plan = planned("--image-root", root, "--task-filter", "T3")
        assert plan.settings["data"]["image_root"] == str(root)
        shutil.rmtree(tmp_path / "planned")
        volumes.append({volume.tobytes() for volume in plan.batches[0].volumes["T1"][0]})
    assert len(volumes[0] - volumes[1]) == 1  # one file differs


def test_cache(planned: Callable[..., Planned], tmp_path: Path) -> None:
    plain = planned("--epochs", 1)
    shutil.rmtree(tmp_path / "planned")
    cached = planned("--epochs", 1, "--cache", tmp_path / "cache")
    assert cached.settings["data"]["cache"] == str(tmp_path / "cache")
    assert list((tmp_path / "cache").glob("volumes/*/*.safetensors"))
    for left, right in zip(plain.batches, cached.batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_native_base_starts_the_same_run(planned: Callable[..., Planned], world: World, tmp_path: Path) -> None:
    umbrella("convert", "from-hf", world.base, tmp_path / "native", "--config", world.config)
    native = planned("--base", tmp_path / "native")
    shutil.rmtree(tmp_path / "planned")
    stock = planned()
    jax.tree.map(np.testing.assert_array_equal, native.state, stock.state)
    assert native.hooks[SaveCheckpoint].meta["base_fingerprint"] == stock.hooks[SaveCheckpoint].meta["base_fingerprint"]


def test_loggers(
    world: World, planned: Callable[..., Planned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_config(world.config)
    settings["train"] |= {"wandb": True, "tensorboard": True}
    config = ["--config", small_run.write_config(tmp_path / "logged.yaml", settings)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = umbrella(*world.train_flags(tmp_path / "none", *config), code=2)
    assert "pip install 'umbrella-jax[wandb]', or --no-wandb" in message
    assert "pip install 'umbrella-jax[tensorboard]'" in message
    assert not (tmp_path / "none").exists()

    monkeypatch.undo()
    plan = planned(*config, "--no-wandb")
    assert plan.settings["train"]["wandb"] is False
    assert plan.hooks[WriteMetrics].log is not None
    assert list((tmp_path / "planned" / "tensorboard").iterdir())
    shutil.rmtree(tmp_path / "planned")
    assert planned().hooks[WriteMetrics].log is None


@pytest.mark.slow
def test_evaluations_of_a_part_compile_nothing_more(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the end, at least one conversation is evaluated; at the end, all; both with likelihoods."""
    programs = list[tuple[int, ...]]()
    evaluate = umbrella_jax.run.train.evaluate

    def counted(*args: Any) -> Any:
        line = evaluate(*args)
        programs.append(tuple(f._cache_size() for f in (prefill, decode, score_answers, jit_eval_step())))
        return line

    monkeypatch.setattr(umbrella_jax.run.train, "evaluate", counted)
    rows = [row for row in json.loads(world.train.read_text()) if row["task_type"] == "T3"] * 3
    data = small_run.write_json(tmp_path / "eval.json", [row | {"task_id": f"{i}"} for i, row in enumerate(rows)])
    flags = ["--task-filter", "T3", "--eval-data", data, "--epochs", 3, "--batch-size", 4]
    flags += ["--set", "train.eval_steps=1", "--set", "train.eval_samples=1", "--set", "evaluation.likelihoods=true"]
    umbrella(*world.train_flags(tmp_path / "run", *flags))
    assert len(programs) == 3
    assert programs[0] == programs[1] == programs[2]
    sizes = [len(read_lines(tmp_path / f"run/predictions/step_{step}.jsonl")) for step in (1, 2, 3)]
    assert sizes == [4, 4, 12]
    first, second, _ = (read_lines(tmp_path / f"run/predictions/step_{step}.jsonl") for step in (1, 2, 3))
    assert [row["task_id"] for row in first] == [row["task_id"] for row in second]
    assert all(row["likelihoods"].keys() == {"left.", "right."} for row in first)
    assert {"eval_auroc/T3", "eval_accuracy/T3"} <= read_lines(tmp_path / "run/metrics.jsonl")[0].keys()


def test_the_end_evaluates_the_best_step_on_all_data(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the first step is best. `train.eval_samples` ranks all steps alike. A resumed run evaluates it too."""
    evaluate = umbrella_jax.run.train.evaluate
    evaluated: dict[bool, list[tuple[int, Any]]] = {False: [], True: []}

    def first_is_best(*args: Any, final: bool = False) -> Any:
        *_, step, trainable = args
        evaluated[final].append((step, jax.device_get(trainable)))
        if final and len(evaluated[True]) == 1:
            raise DataError("killed")
        return evaluate(*args, final=final) | ({} if final else {"eval_accuracy": 1 / step})

    monkeypatch.setattr(umbrella_jax.run.train, "evaluate", first_is_best)
    rows = [row for row in json.loads(world.train.read_text()) if row["task_type"] == "T3"] * 3
    data = small_run.write_json(tmp_path / "eval.json", [row | {"task_id": f"{i}"} for i, row in enumerate(rows)])
    run, settings = tmp_path / "run", ("eval_steps=1", "eval_samples=1", "keep_best=1", "best_metric=eval_accuracy")
    flags = ["--task-filter", "T3", "--eval-data", data, "--epochs", 3, "--batch-size", 4]
    flags += [word for setting in settings for word in ("--set", f"train.{setting}")]
    umbrella(*world.train_flags(run, *flags), code=2)
    printed = umbrella(*world.train_flags(run, *flags, "--resume"))
    (first, weights), _, (last, _) = evaluated[False]
    assert (first, last, [step for step, _ in evaluated[True]]) == (1, 3, [1, 1])
    chex.assert_trees_all_equal(weights, *(params for _, params in evaluated[True]))
    first_line, _, last_line = read_lines(run / "metrics.jsonl")
    assert f"\nstep 1  evaluation: loss {first_line['final_loss']:.4f}\n" in printed
    assert f"step 3  loss {last_line['loss']:.4g}" in printed
    assert not any(name.startswith("final_") for name in last_line)
    assert [len(read_lines(run / f"predictions/step_{step}.jsonl")) for step in (1, 3)] == [len(rows), 4]


def test_a_run_that_stops_early_is_finished(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs` and `--resume` report it. With a larger patience it trains on, here to its planned end."""
    evaluated: list[tuple[int, bool]] = []

    def evaluate(*args: Any, final: bool = False) -> dict[str, float]:
        *_, step, _ = args
        evaluated.append((step, final))
        return {"eval_loss": (0.9, 0.5, 0.6, 0.7, 0.4, 0.3)[step - 1]}

    monkeypatch.setattr(umbrella_jax.run.train, "evaluate", evaluate)
    run, settings = tmp_path / "run", ("eval_steps=1", "keep_best=1", "best_metric=eval_loss")
    flags = ["--task-filter", "T3", "--eval-data", world.eval, "--epochs", 6, "--batch-size", 4]
    flags += [word for setting in settings for word in ("--set", f"train.{setting}")]

    def train(patience: int, *more: str) -> str:
        stopping = ["--set", f"train.early_stopping={{metric: eval_loss, patience: {patience}}}"]
        return " ".join(umbrella(*world.train_flags(run, *flags, *stopping, *more)).split())

    reason = "stopped early at step 4: eval_loss did not improve in 2 evaluations (best 0.5 at step 2)"
    printed = train(2)
    assert reason in printed
    assert "best: eval_loss 0.5 at step 2" in printed
    assert evaluated == [(1, False), (2, False), (3, False), (4, False), (2, True)]
    found = json.loads(umbrella("runs", run, "--json"))["runs"][0]
    assert (found["state"], found["why"], found["step"], found["steps"]) == ("finished", reason, 4, 6)
    lines = read_lines(run / "metrics.jsonl")
    assert f"{reason}; to train on, resume with a larger" in train(2, "--resume")
    assert (read_lines(run / "metrics.jsonl"), len(evaluated)) == (lines, 5)
    printed = train(3, "--resume")
    assert "stopped early" not in printed
    for step, before in ((5, 0.7), (6, 0.4)):
        assert re.search(rf"step {step} of 6 loss [\d.]+ (\S+ left )?eval_loss {before:.3f} ", printed), "progress"
    assert evaluated[5:] == [(5, False), (6, False), (6, True)]
    assert json.loads(umbrella("runs", run, "--json"))["runs"][0]["why"] == ""


def test_data_without_images_train_nothing_and_are_refused(world: World, tmp_path: Path) -> None:
    """Before the first step, because no gradient would reach the patch embedding. `data validate` reports it too."""
    records = json.loads(world.train.read_text())
    for record in records:
        for turn in record["conversations"]:
            turn["content"] = [part for part in turn["content"] if part["type"] == "text"]
        record.pop("images", None)
    data = small_run.write_json(tmp_path / "text.json", records)
    message = umbrella(*world.train_flags(tmp_path / "run", "--train-data", data), code=2)
    assert (
        f"{data}: its {len(records)} conversations show no image, so train.groups (patch_embed) would train" in message
    )
    assert not list(tmp_path.glob("run/checkpoints/*"))
    (fault,) = validate(load_config(world.config, {"data.train": str(data)})).with_severity("fault")
    assert (fault.kind, fault.place) == ("images", str(data))
    assert fault.reason.startswith(f"none of its {len(records)} conversations shows an image, so no patch embedding")
