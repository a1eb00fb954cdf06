"""The loss over numbers in a run: its targets, its lines in metrics.jsonl, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import small_run
from tests.helpers.small_run import World, read_lines, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.schema import NumbersConfig, TaskConfig
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.inference.processor import Processor
from umbrella_jax.run.number_targets import find_number_targets

AGES = ("21 years.", "24 years.", "24 years.", "27 years.")
TASKS = {"age": TaskConfig(numbers=NumbersConfig(low=20, high=29))}


def write_ages(world: World, answers: tuple[str, ...]) -> None:
    """Ask each of four scans for its sex, and the first ones for an age."""
    rows = [row for row in json.loads(world.train.read_text()) if row["task_id"].startswith("one-")][:4]
    asked = [row | {"metadata": {"task": "sex"}} for row in rows]
    for row, answer in zip(rows, answers, strict=False):
        question, right = row["conversations"]
        turns = [question, right | {"content": [{"type": "text", "text": answer}]}]
        asked.append(row | {"task_id": f"age-{row['task_id']}", "conversations": turns, "metadata": {"task": "age"}})
    small_run.write_json(world.train, asked)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = small_run.make_world_of_one_shape(tmp_path)
    write_ages(world, AGES)
    return world


def test_targets_are_the_numbers_of_configured_tasks(world: World) -> None:
    processor = Processor.from_checkpoint(Checkpoint.open(world.base, small_run.modalities()))
    dataset = processor.dataset(world.train, image_root=world.root / "scans")
    targets = find_number_targets(dataset, processor, TASKS)
    assert list(targets) == [4, 5, 6, 7]
    sd = np.std([21, 24, 24, 27])
    for index, age in zip(targets, (21, 24, 24, 27), strict=True):
        target, encoded = targets[index], dataset.encoded[index]
        np.testing.assert_allclose(target.values * sd, np.arange(20, 30), rtol=1e-6)
        assert target.truth * sd == pytest.approx(age)
        answer = target.answers[age - 20]
        written = encoded.input_ids[target.prompt_length : target.prompt_length + len(answer)]
        np.testing.assert_array_equal(answer, written)
        assert encoded.supervised[target.prompt_length - 1 : target.prompt_length + 1].tolist() == [False, True]
    refused = [
        ((), ConfigError, "no training conversation has a task of age"),
        (("24 years.",) * 4, ConfigError, "age: all training references are equal"),
        (("21 years.", "40 years."), ConfigError, "reference '40 years.' is not from 20 to 29; change low or high"),
        (("21 years.", ""), DataError, "last answer '': expected a number to learn"),
    ]
    for answers, error, message in refused:
        write_ages(world, answers)
        dataset = processor.dataset(world.train, image_root=world.root / "scans", evaluation=True)
        with pytest.raises(error, match=message):
            find_number_targets(dataset, processor, TASKS)


def test_a_run_logs_the_loss_over_numbers(world: World, tmp_path: Path) -> None:
    """It decreases, apart from the cross entropy. The candidates may not change when the run resumes."""
    flags = ["--eval-data", world.train, "--set", "train.number_loss={weight: 3}", "--set", "train.max_new_tokens=12"]
    grid = "evaluation.tasks={age: {numbers: {low: 20, high: 29}}}"
    out = tmp_path / "run"
    small_run.keep(world.train, "age-")  # one shape of batch, whose step takes longest to compile
    umbrella(*world.train_flags(out, *flags, "--epochs", 8, "--set", grid))
    lines = read_lines(out / "metrics.jsonl")
    losses = [line["number_loss"] for line in lines if line["number_loss"] is not None]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert {"eval_mae/age/expectation", "eval_crps/age", "eval_coverage/age/80"} <= lines[-1].keys()
    other = grid.replace("20", "19")
    refusal = umbrella(*world.train_flags(out, *flags, "--epochs", 9, "--set", other, "--resume"), code=2)
    assert "evaluation.tasks.age.numbers.low: 19" in refusal
    refusal = umbrella(*world.train_flags(tmp_path / "new", "--set", "train.number_loss={}"), code=2)
    assert "train.number_loss: no task has candidate numbers" in refusal
