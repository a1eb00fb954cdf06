"""The training loop: metrics, evaluations, checkpoints, what stops it, and that a resumed run changes nothing."""

import errno
import json
import os
import re
import shutil
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest

from tests.helpers.training_case import CONFIG, as_bytes, quick_step, small_batch, small_case, stack
from umbrella_jax.config.schema import EarlyStoppingConfig, MeshConfig, TrainConfig
from umbrella_jax.errors import CheckpointError, DataError, Interrupted, RunError, UmbrellaError
from umbrella_jax.rundir import read_metrics
from umbrella_jax.sharding import make_mesh, put_batch, shardings
from umbrella_jax.training import trainer
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.diagnose import first_nonfinite
from umbrella_jax.training.optimizer import make_schedule
from umbrella_jax.training.trainer import (
    EvaluateRegularly,
    Metrics,
    ReadSignal,
    SaveCheckpoint,
    StopEarly,
    StopOnNonfinite,
    TrainingRun,
    WriteMetrics,
    describe_batch,
    fit,
    report_failed_save,
    stop_on_signal,
)

STEPS = 5
VALUES = {"loss", "grad_norm", "learning_rate", "supervised_tokens", "step_seconds", "wait_seconds"}
MESH = make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def case():
    """Return one case for all tests, so that the step compiles once."""
    return replace(small_case(), schedule=make_schedule(CONFIG, STEPS))


def placed(state):
    """Put a state on the devices as a run does."""
    return jax.device_put(state, shardings(state, MESH))


@pytest.fixture
def start(case):
    """Return the state before the first step."""
    return placed(case.state())


@pytest.fixture
def run(case, tmp_path, monkeypatch):
    """`run(state, batches, ...)` calls `fit` with the hooks of a run, which write into tmp_path.

    It returns the state, the lines of metrics.jsonl, the evaluations and the logged lines.
    """
    monkeypatch.setattr(trainer, "jit_train_step", lambda: quick_step)

    def call(state, batches, *, num_steps=STEPS, signals=(), cut_off=None, nan=None, pending=None, more=(), **settings):
        """`signals`: the answers of `interrupted`, in order; `cut_off`: the step whose evaluation a signal ends; `nan`:
        the step whose evaluation is not finite; `more`: further hooks."""
        evaluated, logged, signals = [], [], list(signals)

        def interrupted():
            return signals.pop(0) if signals else 0

        def evaluate(step, trainable):
            evaluated.append((step, as_bytes(trainable)))
            if step == cut_off:
                signals.append(signal.SIGINT)
                return None
            if step == nan:
                raise RunError("evaluation: not finite")
            return {"eval_loss": step / 10}

        config = TrainConfig(**{"save_steps": 2, "eval_steps": 2, **settings})
        setup = TrainingRun(
            config=config,
            num_steps=num_steps,
            graphdef=case.graphdef,
            frozen=case.frozen,
            optimizer=case.optimizer,
            schedule=case.schedule,
            mesh=MESH,
        )
        try:
            with (
                Checkpoints(tmp_path / "checkpoints", config) as checkpoints,
                Metrics(tmp_path / "metrics.jsonl", int(state.step) - bool(pending)) as metrics,
            ):
                save = SaveCheckpoint(config, checkpoints, {"name": "run"}, metrics)
                hooks = [
                    StopOnNonfinite(setup, checkpoints, lambda step: [[f"{step + 1}{row}" for row in "abcd"]], print),
                    report_failed_save(checkpoints),
                    ReadSignal(interrupted),
                    EvaluateRegularly(evaluate, config, save, interrupted),
                    StopEarly(config.early_stopping, read_metrics(tmp_path / "metrics.jsonl"), print),
                    WriteMetrics(metrics, logged.append),
                    save,
                    stop_on_signal,
                    *more,
                ]
                state = fit(setup, state, iter(batches), hooks, pending=pending)
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
        assert line["wait_seconds"] > 0
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
    """Prefetching batches changes no number."""
    result = run(start, map(small_batch, range(STEPS)))
    state, losses = placed(case.state()), []
    for i in range(STEPS):
        state, values = quick_step(state, case.frozen, put_batch(small_batch(i), MESH, axis=1), **case.options)
        losses.append(float(values["loss"]))
    assert [line["loss"] for line in result.lines] == losses
    assert as_bytes(result.state) == as_bytes(state)


def test_the_next_batch_is_fetched_while_a_step_runs(start, run, tmp_path, monkeypatch):
    """It is fetched before the step's values are read. Its error is raised in its turn, and no step is lost."""
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


def test_a_further_hook_sees_each_update_with_its_evaluation(start, run):
    """Hooks are added without a change to the loop."""
    seen = []
    run(start, map(small_batch, range(2)), num_steps=2, more=[lambda u: seen.append((u.step, u.is_last, u.evaluation))])
    assert seen == [(1, False, {}), (2, True, {"eval_loss": 0.2})]


def test_without_eval_steps_the_end_is_evaluated_once(start, run):
    result = run(start, map(small_batch, range(2)), eval_steps=None, num_steps=2)
    assert [step for step, _ in result.evaluated] == [2]
    assert [line.get("eval_loss") for line in result.lines] == [None, 0.2]


def test_resumed_run_is_the_same_run(start, run, tmp_path):
    """It was killed while it wrote its fourth line, and has a checkpoint after the second step."""
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
    return {name: value for name, value in line.items() if not name.endswith("_seconds")}


def test_finished_run_does_nothing_more(start, run, tmp_path):
    state = run(start, map(small_batch, range(STEPS))).state
    again = run(state, [])
    assert again.state is state
    assert len(again.lines) == STEPS
    assert not again.evaluated + again.logged


def bad_batch():
    """Return a batch with a NaN in its second volume, which conversations 1, 3 and 4 of 4 show."""
    bad = small_batch(2)
    bad.volumes["T1"][0, 1] = np.nan
    bad.feature_idx[0, 1] = np.minimum(bad.feature_idx[0, 1], 9)
    return bad


def test_loss_that_is_not_finite_stops_the_run(start, run, tmp_path):
    message = (
        r"^step 3: loss nan, gradient norm nan: not finite; first in patch_embed \(T1\), of 3a, 3c, 3d; "
        r"the step's task_ids: 3a, 3b, 3c, 3d; the last checkpoint is step 2; .*--on-nonfinite skip\)$"
    )
    with pytest.raises(UmbrellaError, match=message):
        run(start, [small_batch(0), small_batch(1), bad_batch()], save_steps=1)
    assert saved(tmp_path) == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_weights_that_are_not_finite_are_named(start, run, case, on_nonfinite, monkeypatch):
    """Such weights stop the run even if it skips steps, because every step would fail."""
    path = next(path for path in case.frozen if path.endswith("linear_2.bias"))
    monkeypatch.setitem(case.frozen, path, case.frozen[path].at[1].set(np.nan))
    with pytest.raises(
        CheckpointError, match=f"^weights: NaN or infinity in {path}: nothing can be computed from them"
    ):
        run(start, [small_batch(0)], on_nonfinite=on_nonfinite)


def test_gradient_that_is_not_finite_stops_the_run(start, run, tmp_path):
    """The loss is finite and the gradient overflows, because volumes are huge and parameters tiny."""
    bad = jax.tree.map(np.copy, small_batch(0))
    bad.volumes["T1"][:] = 1e38
    small = {path: leaf * (1e-38 if path.endswith("weight") else 1) for path, leaf in start.trainable.items()}
    message = (
        r"^step 1: loss \d.*, gradient norm (inf|nan): not finite; first in gradient; .* there is no checkpoint yet"
    )
    with pytest.raises(UmbrellaError, match=message):
        run(replace(start, trainable=small), [bad])
    assert saved(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (".encoder.layers.mlp.fc1.weight", r"vision_tower \(T1\)"),
        ("multi_modal_projector.linear_2.bias", r"projector \(T1\)"),
        ("language_model.model.layers.mlp.up_proj.weight", "language_model"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_part_that_is_not_finite(case, path, part, value):
    (path,) = [name for name in case.params if name.endswith(path)]
    params = {**case.params, path: case.params[path].at[..., -1].set(value)}
    found, rows = first_nonfinite(params, small_batch(), graphdef=case.graphdef)
    assert re.fullmatch(part, found)
    assert rows.all()
    found, rows = first_nonfinite(case.params, small_batch(), graphdef=case.graphdef)
    assert found == "gradient"
    assert not rows.any()


def test_skipped_updates_change_nothing_and_are_counted(start, run, case, tmp_path, capsys):
    """A run with a bad batch equals the run without it, except for step numbers."""
    batches = [small_batch(0), small_batch(1), bad_batch(), small_batch(3)]
    whole = run(start, batches, on_nonfinite="skip", max_skipped=1, num_steps=4, save_steps=1)
    assert whole.lines[2]["loss"] is whole.lines[2]["grad_norm"] is None
    assert [line.get("skipped") for line in whole.lines] == [None, None, 1, None]
    assert "first in patch_embed (T1), of 3a, 3c, 3d" in (out := capsys.readouterr().out)
    assert "skipped (1 of at most 1)" in out
    assert (int(whole.state.step), int(whole.state.skipped)) == (4, 1)
    assert whole.lines[3]["learning_rate"] == whole.lines[2]["learning_rate"]  # the schedule does not advance either
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        before, behind = (checkpoints.restore(step, whole.state) for step in (2, 3))
    assert as_bytes(replace(behind, step=0, skipped=0)) == as_bytes(replace(before, step=0, skipped=0))
    assert int(behind.skipped) == 1

    (tmp_path / "checkpoints").rename(tmp_path / "first")
    without = run(placed(case.state()), [*batches[:2], batches[3]], num_steps=3)
    assert as_bytes(replace(without.state, step=0, skipped=0)) == as_bytes(replace(whole.state, step=0, skipped=0))
    assert [line["loss"] for line in without.lines] == [whole.lines[i]["loss"] for i in (0, 1, 3)]

    # a resumed run continues the count, and the limit ends it
    with pytest.raises(UmbrellaError, match=r"^step 5: .*train\.max_skipped is 1; the last checkpoint is step 3$"):
        run(whole.state, [bad_batch()], on_nonfinite="skip", max_skipped=1, num_steps=6)


@pytest.mark.parametrize("when", ["between", "before an evaluation", "in an evaluation", "in the last evaluation"])
def test_a_signal_ends_the_run_after_a_step(case, start, run, tmp_path, when):
    """The resumed run equals a run without signal, and makes the evaluation that the signal prevented."""
    whole = run(start, map(small_batch, range(STEPS)))
    shutil.rmtree(tmp_path / "checkpoints")
    step, wishes = {
        "between": (3, {"signals": [0, 0, signal.SIGTERM]}),
        "before an evaluation": (2, {"signals": [0, signal.SIGTERM, signal.SIGTERM]}),
        "in an evaluation": (4, {"cut_off": 4}),
        "in the last evaluation": (5, {"cut_off": 5}),
    }[when]
    name, number = ("SIGINT", 2) if "cut_off" in wishes else ("SIGTERM", 15)
    with pytest.raises(Interrupted, match=f"^{name}: saved at step {step} of 5$") as end:
        run(placed(case.state()), map(small_batch, range(STEPS)), **wishes)
    assert end.value.signum == number
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == step
        state, pending = checkpoints.restore(step, whole.state), checkpoints.meta(step).get("pending")
    assert (pending is None) == (when == "between")
    resumed = run(state, map(small_batch, range(step, STEPS)), pending=pending)
    assert as_bytes(resumed.state) == as_bytes(whole.state)
    assert [without_time(line) for line in resumed.lines] == [without_time(line) for line in whole.lines]


def test_a_run_interrupted_in_every_evaluation_stops_early_at_the_same_step(case, start, run, tmp_path, capsys):
    """The loss grows, so the second and third evaluations do not improve on the first."""
    stopping = EarlyStoppingConfig(metric="eval_loss", patience=2)
    settings = {"eval_steps": 1, "keep_best": 1, "best_metric": "eval_loss", "early_stopping": stopping}
    whole = run(start, map(small_batch, range(STEPS)), **settings)
    reason = "stopped early at step 3: eval_loss did not improve in 2 evaluations (best 0.1 at\n  step 1)"
    assert reason in capsys.readouterr().out
    assert [line["step"] for line in whole.lines] == saved(tmp_path) == [1, 2, 3]
    shutil.rmtree(tmp_path / "checkpoints")
    state, pending = placed(case.state()), None
    for step in (1, 2, 3):
        with pytest.raises(Interrupted):
            run(state, map(small_batch, range(step - 1, STEPS)), pending=pending, cut_off=step, **settings)
        with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
            state, pending = checkpoints.restore(step, whole.state), checkpoints.meta(step)["pending"]
    resumed = run(state, map(small_batch, range(3, STEPS)), pending=pending, **settings)
    assert reason in capsys.readouterr().out
    assert as_bytes(resumed.state) == as_bytes(whole.state)
    assert [without_time(line) for line in resumed.lines] == [without_time(line) for line in whole.lines]


def test_an_evaluation_that_is_not_finite_ends_the_run_with_its_step_saved(case, run, tmp_path):
    """A resumed run evaluates that step first, and ends like an undisturbed run."""
    whole = run(placed(case.state()), map(small_batch, range(STEPS)))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="evaluation: not finite"):
        run(placed(case.state()), map(small_batch, range(STEPS)), nan=4)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 4
        state, pending = checkpoints.restore(4, whole.state), checkpoints.meta(4)["pending"]
    with pytest.raises(RunError, match="evaluation: not finite"):
        run(jax.tree.map(np.copy, state), [], pending=pending, nan=4)
    resumed = run(state, [small_batch(4)], pending=pending)
    assert as_bytes(resumed.state) == as_bytes(whole.state)
    assert [without_time(line) for line in resumed.lines] == [without_time(line) for line in whole.lines]


def test_metrics_of_lost_steps_are_taken_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    with Metrics(path, 2) as metrics:
        assert path.read_text() == '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
        metrics.write({"step": 3, "loss": 1.5})
        assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "loss": 1.5}, "at once, not at the end"
    with Metrics(path, 0):
        assert path.read_text() == ""
    for damaged in (b'{"st', b"\xff"):
        path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
        with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a line of metrics"):
            Metrics(path, 3)


def test_an_incomplete_line_is_removed(tmp_path):
    """The disk becomes full while the line is written."""
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, 0) as metrics:
        metrics.write({"step": 1})
        writes = [3, OSError(errno.ENOSPC, "No space left on device")]

        def write(file, data):
            now = writes.pop(0)
            if isinstance(now, OSError):
                raise now
            return os_write(file, data[:now])

        os_write = os.write
        with mock.patch("os.write", write), pytest.raises(OSError, match=r"No space left .*metrics\.jsonl"):
            metrics.write({"step": 2})
        metrics.write({"step": 3})
        assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
        path.rename(tmp_path / "moved")
        with pytest.raises(UmbrellaError, match=r"metrics\.jsonl: deleted, moved or replaced"):
            metrics.write({"step": 4})


def test_description_of_a_batch():
    batch = jax.tree.map(lambda leaf: leaf[0], small_batch())
    text = "3 × 4 conversations of 29 positions; "
    assert describe_batch(stack(batch, batch, batch)) == text + "2 T1"
    assert describe_batch(stack(*[replace(batch, volumes={})] * 3)) == text + "no volumes"
