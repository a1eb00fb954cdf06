"""The training loop, and the hooks that it calls after each update.

`fit` updates parameters and measures time. Everything else is a hook: a function of an `Update`, called after each one
in the order of the list that `fit` is given. A run (umbrella_jax/run/train.py) has these:

1. `StopOnNonfinite` names the cause of a loss that is not finite; it stops the run or lets it skip the update.
2. The progress line.
3. `report_failed_save` raises the error of a checkpoint that could not be written.
4. `ReadSignal` asks whether a signal came.
5. `EvaluateRegularly` adds evaluation metrics to the line.
6. `StopEarly` ends the run if its evaluations no longer improve.
7. `WriteMetrics` appends the line to metrics.jsonl.
8. `SaveCheckpoint` saves regularly, at the end, and if a signal came.
9. `stop_on_signal` ends the run if a signal came.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import EarlyStoppingConfig, TrainConfig
from umbrella_jax.console import wrapped
from umbrella_jax.distributed import broadcast, raise_together
from umbrella_jax.errors import CheckpointError, Interrupted, RunError
from umbrella_jax.io.files import append_line, naming, strict_json, write_whole
from umbrella_jax.models import Params
from umbrella_jax.rundir import Line, Say, evaluations, read_metrics, stopped_early
from umbrella_jax.sharding import put_batch
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.diagnose import first_nonfinite, weights_error
from umbrella_jax.training.optimizer import Schedule
from umbrella_jax.training.step import TrainState, jit_train_step


@dataclass(frozen=True)
class TrainingRun:
    """Everything that stays the same from update to update."""

    config: TrainConfig
    num_steps: int
    graphdef: nnx.GraphDef
    frozen: Params
    optimizer: optax.GradientTransformationExtraArgs
    schedule: Schedule
    mesh: Mesh
    compiled_shapes: set[Any] = field(default_factory=set)
    """Batch shapes for which the step is compiled. `fit` adds to it; runs with one optimizer and model share it."""


@dataclass(kw_only=True)
class Update:
    """One update, as the hooks see it. A hook may add to it for the hooks after it."""

    step: int
    """Number of updates so far, this one included."""
    num_steps: int
    state: TrainState
    """Parameters and moments after the update. The next update overwrites them, so a hook must not keep them."""
    line: Line
    """The update's line of `metrics.jsonl`, without its evaluation."""
    batch: Batch | None = None
    """None if an earlier process made the update and a signal came before its evaluation."""
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The scalars that the step returned; empty without a batch."""
    seconds: float = 0.0
    """Duration, including the wait for the batch."""
    compiled: bool = False
    """Whether the step was compiled meanwhile."""
    signal: int = 0
    """The signal that asks the run to end; 0 without one."""
    evaluation: Line = field(default_factory=dict)
    """`eval_NAME` of the evaluation after this update; empty without one."""
    stops: bool = False
    """Whether early stopping ends the run after this update."""

    @property
    def is_last(self) -> bool:
        """True for the run's last update."""
        return self.stops or self.step == self.num_steps


Hook = Callable[[Update], None]
"""Called after each update. An error that it raises ends the run."""


def fit(
    run: TrainingRun,
    state: TrainState,
    batches: Iterator[Batch],
    hooks: Sequence[Hook],
    *,
    pending: Line | None = None,
    say: Say = print,
) -> TrainState:
    """Train until `run.num_steps`, or until a hook sets `Update.stops`, and call every hook after each update.

    While a step runs, a thread reads the next batch and puts it on the devices. An error in that thread is raised when
    its batch is needed. With several processes, each brings its own part of every batch (see `put_batch`).

    Args:
        state: must not be used afterwards: the first update reuses its memory.
        batches: the batches from `state.step` on.
        hooks: called in this order.
        pending: the line of the update that made `state`, if an earlier process could not evaluate it. The hooks are
            then called for it before the first update.
        say: takes a line whenever the step is compiled.

    Returns:
        The state after the last update.
    """
    start, skipped = int(state.step), int(state.skipped)
    static = {"graphdef": run.graphdef, "optimizer": run.optimizer, "number_loss": run.config.number_loss}
    train_step = partial(jit_train_step(), schedule=run.schedule, **static)
    rates = np.asarray(run.schedule(np.arange(run.num_steps)))  # all at once, since each call takes a millisecond

    def next_batch() -> Batch:
        return put_batch(next(batches), run.mesh, axis=1)

    with jax.set_mesh(run.mesh), ThreadPoolExecutor(1) as thread:
        if pending and _call(hooks, Update(step=start, num_steps=run.num_steps, state=state, line=pending)):
            return state
        prefetched = thread.submit(next_batch) if start < run.num_steps else None
        ended = time.perf_counter()
        for step in range(start + 1, run.num_steps + 1):
            assert prefetched is not None
            began = time.perf_counter()
            batch = prefetched.result()
            shape = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
            compiles = shape not in run.compiled_shapes
            run.compiled_shapes.add(shape)
            if compiles:
                say(f"step {step}: compiling for {describe_batch(batch)}")
            started = time.perf_counter()
            state, values = train_step(state, run.frozen, batch)
            prefetched = thread.submit(next_batch) if step < run.num_steps else None
            values = jax.device_get(values)  # waits for the step
            waited, ended = started - ended, time.perf_counter()
            line: Line = {
                "step": step,
                "steps": run.num_steps,
                "loss": _finite(values["loss"]),
                "grad_norm": _finite(values["grad_norm"]),
                "learning_rate": float(rates[step - 1 - skipped]),
                "supervised_tokens": int(values["supervised_tokens"]),
                "step_seconds": ended - started,
                "wait_seconds": waited,  # of the devices since the last step, for data and hooks
            }
            if "number_loss" in values:
                line["number_loss"] = _finite(values["number_loss"])
            if line["loss"] is None or line["grad_norm"] is None:
                skipped += 1
                line["skipped"] = skipped
            stops = _call(
                hooks,
                Update(
                    step=step,
                    num_steps=run.num_steps,
                    state=state,
                    line=line,
                    batch=batch,
                    values=values,
                    seconds=ended - began,
                    compiled=compiles,
                ),
            )
            if stops:
                break
    return state


def _call(hooks: Sequence[Hook], update: Update) -> bool:
    """Call the hooks, and return whether the run ends after this update."""
    # Separate from `fit`: a variable of its loop would keep the update's batch in memory during the next step.
    for hook in hooks:
        hook(update)
    return update.stops


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def describe_batch(batch: Batch) -> str:
    """Return the shape of a training batch in words."""
    micro, rows, length = batch.input_ids.shape
    volumes = ", ".join(f"{x.shape[1]} {name}" for name, x in batch.volumes.items()) or "no volumes"
    return f"{micro} × {rows} conversations of {length} positions; {volumes}"


class StopOnNonfinite:
    """Hook: find the cause of a loss or gradient that is not finite, and stop the run or report a skipped update.

    The step itself left parameters and moments as they were.

    Args:
        checkpoints: the message names the newest.
        task_ids: takes the number of updates before this one; returns the task_ids of each micro-batch.
        say: takes the line about a skipped update.

    Raises:
        CheckpointError: the weights are not finite.
        RunError: `train.on_nonfinite` is `stop`, or more than `train.max_skipped` updates were skipped.
    """

    def __init__(
        self, run: TrainingRun, checkpoints: Checkpoints, task_ids: Callable[[int], Sequence[Sequence[str]]], say: Say
    ):
        self.run, self.checkpoints, self.task_ids, self.say = run, checkpoints, task_ids, say

    def __call__(self, update: Update) -> None:
        """Return at once if loss and gradient are finite."""
        skipped = update.line.get("skipped")
        if update.batch is None or skipped is None:
            return
        params, config = update.state.trainable | self.run.frozen, self.run.config
        if error := weights_error(params):
            with raise_together():
                raise error
        part, rows = first_nonfinite(params, update.batch, graphdef=self.run.graphdef)
        message = (
            f"step {update.step}: loss {update.values['loss']}, gradient norm {update.values['grad_norm']}: "
            f"not finite; {_where(part, rows, self.task_ids(update.step - 1))}"
        )
        if config.on_nonfinite == "stop" or skipped > config.max_skipped:
            with raise_together():  # every process comes here: all have the same values
                raise RunError(f"{message}; {_remedy(config, self.checkpoints.latest_step())}")
        self.say(f"{message}; skipped ({skipped} of at most {config.max_skipped})")


def _where(part: str, rows: np.ndarray, ids: Sequence[Sequence[str]]) -> str:
    """Return in words what `first_nonfinite` found; `ids` are the task_ids of each micro-batch."""
    hit = [name for names, bad in zip(ids, rows, strict=True) for name, b in zip(names, bad, strict=False) if b]
    among = f", of {', '.join(hit)}" if hit else ""
    return f"first in {part}{among}; the step's task_ids: {', '.join(name for micro in ids for name in micro)}"


def _remedy(config: TrainConfig, saved: int | None) -> str:
    last = "there is no checkpoint yet" if saved is None else f"the last checkpoint is step {saved}"
    if config.on_nonfinite == "skip":
        return f"train.max_skipped is {config.max_skipped}; {last}"
    return f"{last}; look at these conversations, lower train.learning_rate, or skip such steps (--on-nonfinite skip)"


def report_failed_save(checkpoints: Checkpoints) -> Hook:
    """Return the hook that raises RunError if a checkpoint could not be written, such as onto a full disk."""
    return lambda _: checkpoints.check()


class ReadSignal:
    """Hook: note in `Update.signal` the signal that asks the run to end.

    Args:
        interrupted: returns that signal, 0 without one, and the same on every process.
    """

    def __init__(self, interrupted: Callable[[], int]):
        self.interrupted = interrupted

    def __call__(self, update: Update) -> None:
        """Ask again after each update."""
        update.signal = self.interrupted()


class Metrics:
    """The file `metrics.jsonl`, to which each update appends its line.

    A line is in the file completely as soon as it is written. Opening the file removes lines after `step`, which a run
    wrote after its last checkpoint before it was cut off: they will be written again.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = read_metrics(path)
        write_whole(path, "".join(strict_json(line) + "\n" for line in lines if int(line["step"] or 0) <= step))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, line: Line) -> None:
        """Append one line."""
        append_line(self._file, self.path, (strict_json(line) + "\n").encode())

    def sync(self) -> None:
        """Wait until the lines are on the disk, before a checkpoint is saved that relies on them."""
        with naming(self.path):
            os.fsync(self._file)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


class WriteMetrics:
    """Hook: append the update's line, with its evaluation, to `metrics.jsonl`, and hand it to `log` too."""

    def __init__(self, metrics: Metrics, log: Callable[[Line], None] | None):
        self.metrics, self.log = metrics, log

    def __call__(self, update: Update) -> None:
        """Write one line."""
        line = update.line | update.evaluation
        self.metrics.write(line)
        if self.log:
            self.log(line)


class SaveCheckpoint:
    """Hook: save every `train.save_steps` updates, at the end, if a signal came, and if the evaluation may be the best.

    Args:
        meta: what is saved beside the state.
        metrics: is on the disk before the checkpoint is saved; None on all processes but the first.
    """

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints, meta: dict[str, Any], metrics: Metrics | None):
        self.config, self.checkpoints, self.meta, self.metrics = config, checkpoints, meta, metrics

    def __call__(self, update: Update) -> None:
        """Start to save, if it is time."""
        is_time = update.is_last or update.step % self.config.save_steps == 0
        if is_time or update.signal or (update.evaluation and self.config.keep_best):
            if self.metrics:
                self.metrics.sync()
            self.checkpoints.save(update.state, self.meta, update.evaluation)

    def save_pending(self, update: Update) -> None:
        """Save an update that could not be evaluated, with its line, so that a resumed run evaluates it first."""
        self.checkpoints.save(update.state, {**self.meta, "pending": update.line})


Evaluate = Callable[[int, Params], Line | None]
"""Takes step and trainable parameters; returns `eval_NAME` of each metric, or None if a signal came meanwhile."""


class EvaluateRegularly:
    """Hook: evaluate every `train.eval_steps` updates and at the end.

    If the evaluation fails or a signal comes, the update is saved with its line first, and a resumed run evaluates it
    before it goes on.

    Raises:
        CheckpointError, RunError: raised by `evaluate` on every process, for numbers that are not finite.
        Interrupted: a signal came before the evaluation was done.
    """

    def __init__(self, evaluate: Evaluate, config: TrainConfig, save: SaveCheckpoint, interrupted: Callable[[], int]):
        self.evaluate, self.every, self.save, self.interrupted = evaluate, config.eval_steps, save, interrupted

    def __call__(self, update: Update) -> None:
        """Evaluate, if it is time."""
        if not update.is_last and not (self.every and update.step % self.every == 0):
            return
        try:
            evaluation = None if update.signal else self.evaluate(update.step, update.state.trainable)
        except (CheckpointError, RunError):
            self.save.save_pending(update)
            with raise_together():
                raise
        if evaluation is None:
            self.save.save_pending(update)
            raise _interrupted(update, self.interrupted())
        update.evaluation = evaluation


class StopEarly:
    """Hook: end the run if its evaluations no longer improve.

    The decision needs only the lines of `metrics.jsonl`, so a resumed run stops at the same step. Process 0 makes it.

    Args:
        lines: of earlier processes.
        say: takes the line about why the run stops.
    """

    def __init__(self, rule: EarlyStoppingConfig | None, lines: Iterable[Line], say: Say):
        self.rule, self.lines, self.say = rule, list(evaluations(lines).values()), say

    def reason(self) -> str | None:
        """Return why the run stops after the lines so far; None if it goes on."""
        reason: str | None = broadcast(stopped_early(self.lines, self.rule))
        return reason

    def __call__(self, update: Update) -> None:
        """Decide after each evaluation but the last."""
        if not update.evaluation or update.is_last:
            return
        self.lines.append(update.line | update.evaluation)
        if reason := self.reason():
            self.say("\n".join(wrapped(reason)))
            update.stops = True


def stop_on_signal(update: Update) -> None:
    """End the run if a signal came. Raises Interrupted; the update was saved before."""
    if update.signal and not update.is_last:
        raise _interrupted(update, update.signal)


def _interrupted(update: Update, number: int) -> Interrupted:
    return Interrupted(number, f"{signal.Signals(number).name}: saved at step {update.step} of {update.num_steps}")
