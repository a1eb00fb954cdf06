"""The facts about a run that the page shows, and what it says about those that are missing."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.served import Served
from tests.helpers.small_run import read_config, umbrella, write_config, write_json
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


def test_an_export_is_described_by_what_it_states_about_its_training(served: Served, tmp_path: Path) -> None:
    export = tmp_path / "export"
    umbrella("convert", "to-hf", served.run, export)
    gaps = {gap.effect for gap in describe(export).gaps}
    assert gaps == {"the tasks' questions and answers", "measured accuracies"}
    file = export / "umbrella_config.json"
    stated = json.loads(file.read_text())
    accuracy = {"value": 0.9, "interval": [0.8, 1.0], "chance": 0.5, "answers": "about 120"}
    write_json(
        file, stated | {"training": stated["training"] | {"subjects": 40, "tasks": {"sex": {"accuracy": accuracy}}}}
    )
    description = describe(export)
    (task,) = description.tasks
    assert task.metric == {"name": "accuracy", "value": 0.9, "interval": [0.8, 1.0], "chance": 0.5, "n": "about 120"}
    assert (description.step, description.subjects) == (stated["training"]["step"], 40)
    assert [gap.effect for gap in description.gaps] == ["the tasks' questions and answers"]
    write_json(file, {key: value for key, value in stated.items() if key != "training"})
    assert "states nothing about training" in describe(export).gaps[1].reason
