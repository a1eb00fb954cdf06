"""The loop: what it writes, when it evaluates and saves, what stops it, and that a resumed one goes on the same."""

import json
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from training_case import CONFIG, as_bytes, quick_step, small_batch, small_case, stack

from umbrella_jax.config import MeshConfig, TrainConfig
from umbrella_jax.errors import DataError, UmbrellaError
from umbrella_jax.sharding import make_mesh, put_batch, shardings
from umbrella_jax.training import trainer
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.optimizer import make_schedule
from umbrella_jax.training.trainer import Metrics, describe, fit

STEPS = 5
VALUES = {"loss", "grad_norm", "learning_rate", "supervised_tokens", "step_seconds"}
SCHEDULE = make_schedule(CONFIG, STEPS)


MESH = make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def case():
    """One for all tests: the step compiles once."""
    return small_case()


def placed(state):
    """As a run places it."""
    return jax.device_put(state, shardings(state, MESH))


@pytest.fixture
def start(case):
    """The state before the first step."""
    return placed(case.state())


@pytest.fixture
def run(case, tmp_path, monkeypatch):
    """`run(state, batches, ...)` is `fit` into tmp_path; returns the state, the lines and what it called."""

    monkeypatch.setattr(trainer, "jit_train_step", quick_step)

    def call(state, batches, *, save_steps=2, eval_steps=2, num_steps=STEPS):
        evaluated, logged = [], []

        def evaluate(step, trainable):
            evaluated.append((step, as_bytes(trainable)))
            return {"eval_loss": step / 10}

        try:
            with Checkpoints(tmp_path / "checkpoints") as checkpoints:
                state = fit(
                    state,
                    case.frozen,
                    iter(batches),
                    graphdef=case.graphdef,
                    optimizer=case.optimizer,
                    schedule=SCHEDULE,
                    config=TrainConfig(save_steps=save_steps, eval_steps=eval_steps),
                    num_steps=num_steps,
                    mesh=MESH,
                    checkpoints=checkpoints,
                    meta={"name": "run"},
                    metrics_path=tmp_path / "metrics.jsonl",
                    evaluate=evaluate,
                    log=logged.append,
                )
        finally:
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return SimpleNamespace(state=state, lines=lines, evaluated=evaluated, logged=logged)

    return call


def saved(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())


def test_five_steps(start, run, tmp_path, capsys):
    result = run(start, map(small_batch, range(STEPS)))
    assert [line["step"] for line in result.lines] == [1, 2, 3, 4, 5]
    for i, line in enumerate(result.lines):
        assert line.keys() >= VALUES
        assert line["learning_rate"] == pytest.approx(1e-2 * (1 - i / STEPS))
        assert line["supervised_tokens"] == 12
        assert line["step_seconds"] > 0
        assert np.isfinite([line["loss"], line["grad_norm"]]).all()
    assert result.logged == result.lines
    assert len({line["loss"] for line in result.lines}) == STEPS
    assert int(result.state.step) == STEPS

    assert [step for step, _ in result.evaluated] == [2, 4, 5], "every second step and the last"
    assert result.evaluated[-1][1] == as_bytes(result.state.trainable), "with the parameters after the step"
    assert {line["step"]: line["eval_loss"] for line in result.lines if "eval_loss" in line} == {2: 0.2, 4: 0.4, 5: 0.5}
    assert saved(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.meta(5) == {"name": "run"}
        assert as_bytes(checkpoints.restore(5, result.state)) == as_bytes(result.state)
    assert capsys.readouterr().out.count("compiling for") == 1


def test_the_loop_is_the_steps_one_by_one(case, start, run):
    """Batches put on devices ahead change no number."""
    result = run(start, map(small_batch, range(STEPS)))
    state, losses = placed(case.state()), []
    for i in range(STEPS):
        state, values = quick_step(state, case.frozen, put_batch(small_batch(i), MESH, axis=1), **case.static)
        losses.append(float(values["loss"]))
    assert [line["loss"] for line in result.lines] == losses
    assert as_bytes(result.state) == as_bytes(state)


def test_the_next_batch_is_fetched_while_a_step_runs(start, run, tmp_path, monkeypatch):
    """Before anybody waits for the step's numbers; its error comes when its turn does, and no step is lost."""
    fetched = [threading.Event() for _ in range(STEPS)]

    def batches():
        for i in range(STEPS):
            fetched[i].set()
            if i == 3:
                raise DataError("3.nii: cannot be read")
            yield small_batch(i)

    steps, waited = [], []

    def device_get(values):
        steps.append(len(steps))
        waited.append(fetched[steps[-1] + 1].wait(20))
        return jax.device_get(values)

    monkeypatch.setattr(trainer, "jax", SimpleNamespace(**{**vars(jax), "device_get": device_get}))
    with pytest.raises(DataError, match=r"3\.nii"):
        run(start, batches(), save_steps=1)
    assert waited == [True] * 3
    assert saved(tmp_path) == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_eval_steps_the_end_is_evaluated_once(start, run):
    result = run(start, map(small_batch, range(2)), eval_steps=None, num_steps=2)
    assert [step for step, _ in result.evaluated] == [2]
    assert [line.get("eval_loss") for line in result.lines] == [None, 0.2]


def test_resumed_run_is_the_same_run(start, run, tmp_path):
    """Killed while it wrote its fourth line, with a checkpoint after the second step."""
    whole = run(start, map(small_batch, range(STEPS)))
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(2, whole.state)
    for step in (4, 5):
        (tmp_path / "checkpoints" / str(step)).rename(tmp_path / f"lost-{step}")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "los')
    resumed = run(state, map(small_batch, range(2, STEPS)))
    assert as_bytes(resumed.state) == as_bytes(whole.state)
    assert [without_time(line) for line in resumed.lines] == [without_time(line) for line in whole.lines]
    assert [line["step"] for line in resumed.logged] == [3, 4, 5]
    assert saved(tmp_path) == [2, 4, 5]


def without_time(line):
    return {name: value for name, value in line.items() if name != "step_seconds"}


def test_finished_run_does_nothing_more(start, run, tmp_path):
    state = run(start, map(small_batch, range(STEPS))).state
    again = run(state, [])
    assert again.state is state
    assert len(again.lines) == STEPS
    assert not again.evaluated + again.logged


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_loss_that_is_not_finite_stops_the_run(start, run, tmp_path, value):
    bad = small_batch(2)
    bad.volumes["T1"][0, 0, 0] = value
    with pytest.raises(UmbrellaError, match=r"^step 3: loss nan, .*not finite; the last checkpoint is step 2$"):
        run(start, [small_batch(0), small_batch(1), bad], save_steps=1)
    assert saved(tmp_path) == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_gradient_that_is_not_finite_stops_the_run(start, run, tmp_path):
    """A finite loss with an infinite gradient: float32 parameters whose product with the volumes is near its end."""
    bad = jax.tree.map(np.copy, small_batch(0))
    bad.volumes["T1"][:] = 1e38
    small = {path: leaf * (1e-38 if path.endswith("weight") else 1) for path, leaf in start.trainable.items()}
    with pytest.raises(UmbrellaError, match=r"^step 1: loss \d.*, gradient norm (inf|nan): not finite"):
        run(start.replace(trainable=small), [bad])
    assert saved(tmp_path) == []


def test_metrics_of_lost_steps_are_taken_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    with Metrics(path, 2) as metrics:
        assert path.read_text() == '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
        metrics.write(step=3, loss=1.5)
        assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "loss": 1.5}, "at once, not at the end"
    with Metrics(path, 0):
        assert path.read_text() == ""


def test_description_of_a_batch():
    batch = jax.tree.map(lambda leaf: leaf[0], small_batch())
    text = "3 × 4 conversations of 29 positions, 5 of them supervised; "
    assert describe(stack(batch, batch, batch)) == text + "2 T1 7×11×5"
    assert describe(stack(*[batch.replace(volumes={})] * 3)) == text + "no volumes"
