"""The facts about a run that the page shows, and what it says about those that are missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from convert.model_card import TaskMetric, TrainingRecord, training_facts
from tests.helpers.checkpoints import write_umbrella
from tests.helpers.served import AGE, Served
from tests.helpers.small_run import read_config, write_config
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.run.record import read_training_records
from umbrella_jax.serve.description import ModelDescription, describe_model


def describe(run: Path, data: Path | None = None) -> ModelDescription:
    checkpoint = Checkpoint.open(run).answering()
    return describe_model(checkpoint, read_training_records(checkpoint), data)


@pytest.fixture
def run(served: Served, tmp_path: Path) -> Path:
    """A run that was started in `tmp_path` with relative paths."""
    run = shutil.copytree(served.run, tmp_path / "runs" / "sex")
    shutil.copy(served.run.parent / "train.json", tmp_path)
    config = read_config(run / "config.yaml")
    config["data"] |= {"train": "train.json", "image_root": "scans"}
    write_config(run / "config.yaml", config | {"output_dir": "runs/sex"})
    return run


def test_relative_paths_of_a_run_start_where_it_was_started(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        tasks = {task.name: task for task in describe(run).tasks}
        assert {name: task.questions for name, task in tasks.items()} == {
            "T0": ("Does an ox have two brains?",),
            "T1": ("Which sex?", "Awake?"),
            "T3": ("And this?",),
        }
        assert [tasks[name].shape for name in tasks] == [(1, 0), (1, 1), (2, 2)]
        assert tasks["T1"].task is not None


def test_says_which_file_is_missing_and_what_is_lost(served: Served, run: Path, tmp_path: Path) -> None:
    original = tmp_path / "train.json"
    copied = shutil.copy(original, tmp_path / "copied.json")
    assert {gap["effect"]: gap["reason"] for gap in (gap.to_json() for gap in describe(run).gaps)} == {
        "measured accuracies": "sex: the run had no evaluation data (data.eval)",
        "the number of subjects": "the run's conversations name no subject; add metadata.subject_id to them for the "
        "next run",
    }

    original.write_text(original.read_text().replace("Which sex?", "Which?"))
    assert "train.json: has changed since" in describe(run).gaps[0].reason
    original.unlink()
    description = describe(run)
    assert description.gaps[0].effect == "the tasks' questions"
    assert description.gaps[0].reason.startswith("data.train of the run: train.json: not found")
    assert description.tasks == ()

    # other conversations do not take their place; the same ones do, wherever they are
    assert describe(run, served.run.parent / "eval.json").tasks == ()
    found = describe(run, copied)
    assert {task.name for task in found.tasks} == {"T0", "T1", "T3"}
    assert [gap.effect for gap in found.gaps] == ["measured accuracies", "the number of subjects"]

    (run / "counts.json").unlink()
    (run / "inputs.json").unlink()
    gaps = {gap.effect: gap for gap in describe(run, copied).gaps}
    assert "counts.json: not found" in gaps["the number of subjects and conversations"].reason
    assert str(run / "inputs.json") in gaps["the tasks' questions"].reason
    assert str(tmp_path) not in str([gap.to_json() for gap in gaps.values()])


def test_an_export_shows_what_its_run_recorded(served: Served, tmp_path: Path) -> None:
    write_umbrella(tmp_path)
    file = tmp_path / "umbrella_config.json"
    record = json.loads(file.read_text()) | {"base": "lab/base"}
    file.write_text(json.dumps(record))
    (gap, _) = (described := describe(tmp_path)).gaps[::-1]
    assert (described.base, described.trained, described.subjects) == ("lab/base", None, None)
    assert gap.reason == f"{file}: records no `training`; export the run again, or serve the run itself"

    accuracy = TaskMetric("T1", "accuracy", 0.875, 0.8, 0.95, 0.6, 100, 100)
    counts = {"train": {"conversations": 200, "subjects": 100, "tasks": {}}}
    training = TrainingRecord("step 20", {}, {}, {"patch_embed": (9, 0), "total": (9, 5)}, counts, (accuracy,))
    file.write_text(json.dumps(record | {"training": training_facts([training])}))
    described = describe(tmp_path)
    assert (described.trained, described.step) == (("patch_embed",), "step 20")
    assert (described.subjects, described.conversations) == (100, 200)
    (task,) = described.tasks
    assert task.metric is not None
    assert {key: task.metric[key] for key in ("name", "value", "interval")} == {
        "name": "accuracy",
        "value": 0.875,
        "interval": [0.8, 0.95],
    }
    assert [gap.effect for gap in described.gaps] == ["the tasks' questions and answers"]
    units = [replace(task, task=AGE, metric={"name": name}).to_json()["metric"]["unit"] for name in ("mae", "r2")]
    assert units == ["years", ""]

    described = describe(tmp_path, served.run.parent / "train.json")
    tasks = {task.name: task for task in described.tasks}
    assert tasks["T1"].questions == ("Which sex?", "Awake?")
    assert tasks["T1"].metric == task.metric
    assert tasks["T1"].task is not None
    assert not described.gaps
