"""The loop, read from top to bottom. It takes any iterator of `Batch`."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.distributed import raise_together
from umbrella_jax.errors import CheckpointError, Interrupted, RunError
from umbrella_jax.io.files import append, naming, strict_json, write_whole
from umbrella_jax.models import Params
from umbrella_jax.rundir import Line, Say, read_metrics
from umbrella_jax.sharding import put_batch
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.diagnose import first_nonfinite, weights_error
from umbrella_jax.training.step import TrainState, jit_train_step

Evaluate = Callable[[int, Params], Line | None]
"""(step, trainable parameters) → metrics under names of their own, None where a signal cut it off."""
Progress = Callable[[int, float, bool, float | None], None]
"""(step, seconds that it took with the wait for its batch, whether it was compiled meanwhile, loss), after each."""


class Metrics:
    """`metrics.jsonl`: one line per update, there as a whole as soon as it is written. Lines behind `step`, from a run
    that was cut off after its last checkpoint, are taken out: they are made again."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = read_metrics(path)
        write_whole(path, "".join(strict_json(line) + "\n" for line in lines if int(line["step"] or 0) <= step))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, line: Line) -> None:
        """Appends one line."""
        append(self._file, self.path, (strict_json(line) + "\n").encode())

    def sync(self) -> None:
        """Down to the disk, as a checkpoint does that counts on the lines."""
        with naming(self.path):
            os.fsync(self._file)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def fit(
    state: TrainState,
    frozen: Params,
    batches: Iterator[Batch],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    config: TrainConfig,
    num_steps: int,
    mesh: Mesh,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    metrics_path: Path,
    task_ids: Callable[[int], Sequence[Sequence[str]]],
    evaluate: Evaluate | None = None,
    log: Callable[[Line], None] | None = None,
    interrupted: Callable[[], int] = lambda: 0,
    pending: Line | None = None,
    say: Say = print,
    progress: Progress | None = None,
) -> TrainState:
    """Trains from `state.step` to `num_steps` on `batches`, which starts at that step, and returns the last state.

    Saves every `config.save_steps` updates and at the end, `meta` beside it; evaluates every `config.eval_steps` and
    at the end; hands each line of metrics to `log` too. While a step runs, the next batch is read and put on the
    devices; its errors wait until then.

    Of several processes each brings its own part of every batch (see `put_batch`); all of them save and evaluate, the
    first alone says something, writes metrics and logs.

    Args:
        task_ids: of the conversations in each micro-batch of a step, for the message about one that goes wrong.
        interrupted: the signal that asks the run to end, 0 for none; all processes get the same answer.
        progress: is told after each update, before its evaluation and checkpoint.
        pending: the line of `state.step`, where a signal came before its evaluation, as `meta["pending"]` holds it.

    Raises:
        RunError: loss or gradient are not finite, and `config.on_nonfinite` is `stop` or too many were skipped.
            The last checkpoint stays.
        CheckpointError, RunError: from `evaluate`; the step is saved, and a run that goes on evaluates it first.
        Interrupted: by a signal, after the step was saved.
    """
    first = jax.process_index() == 0
    start, skipped = int(state.step), int(state.skipped)
    step_fn = partial(jit_train_step(), graphdef=graphdef, optimizer=optimizer)
    rates = np.broadcast_to(schedule(np.arange(num_steps)), num_steps)  # once: it takes a millisecond
    shapes: set[Any] = set()

    def next_batch() -> Batch:
        return put_batch(next(batches), mesh, axis=1)

    with (
        jax.set_mesh(mesh),
        ThreadPoolExecutor(1) as ahead,
        Metrics(metrics_path, start - bool(pending)) if first else nullcontext() as metrics,
    ):

        def finish(line: Line) -> None:
            """What follows an update: evaluation, the line, a checkpoint, and the end where a signal asks for it."""
            checkpoints.check()
            step = int(state.step)
            last, number, found = step == num_steps, interrupted(), Line()
            if evaluate and (last or (config.eval_steps and step % config.eval_steps == 0)):
                try:
                    evaluated = None if number else evaluate(step, state.trainable)
                except (CheckpointError, RunError):  # not finite, on every process
                    checkpoints.save(state, {**meta, "pending": line})
                    with raise_together():
                        raise
                if evaluated is None:
                    checkpoints.save(state, {**meta, "pending": line})
                    raise _interrupted(interrupted(), step, num_steps)
                found = evaluated
            if metrics:
                metrics.write(line | found)
                if log:
                    log(line | found)
            if last or number or step % config.save_steps == 0 or (found and config.keep_best):
                if metrics:
                    metrics.sync()
                checkpoints.save(state, meta, found)
            if number and not last:
                raise _interrupted(number, step, num_steps)

        if pending:
            finish(pending)
        coming = ahead.submit(next_batch) if start < num_steps else None
        ended = time.perf_counter()
        for step in range(start, num_steps):
            assert coming is not None
            begun = time.perf_counter()
            batch = coming.result()
            shape = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
            fresh = shape not in shapes
            shapes.add(shape)
            if first and fresh:
                say(f"step {step + 1}: compiling for {describe(batch)}")
            started = time.perf_counter()
            state, values = step_fn(state, frozen, batch)
            coming = ahead.submit(next_batch) if step + 1 < num_steps else None
            values = jax.device_get(values)  # waits for the step
            waited, ended = started - ended, time.perf_counter()
            line: Line = {
                "step": step + 1,
                "steps": num_steps,
                "loss": _finite(values["loss"]),
                "grad_norm": _finite(values["grad_norm"]),
                "learning_rate": float(rates[step - skipped]),
                "supervised_tokens": int(values["supervised_tokens"]),
                "step_seconds": ended - started,
                "wait_seconds": waited,  # of the device, since the last step: for data, evaluation and checkpoints
            }
            if line["loss"] is None or line["grad_norm"] is None:
                skipped += 1
                line["skipped"] = skipped
                if error := weights_error(state.trainable | frozen):
                    with raise_together():
                        raise error
                part, rows = first_nonfinite(state.trainable | frozen, batch, graphdef=graphdef)
                message = (
                    f"step {step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite; "
                    f"{_where(part, rows, task_ids(step))}"
                )
                if config.on_nonfinite == "stop" or skipped > config.max_skipped:
                    with raise_together():  # every process comes here: all have the same values
                        raise RunError(f"{message}; {_remedy(config, checkpoints.latest_step())}")
                if first:
                    say(f"{message}; skipped, {skipped} of {config.max_skipped} that may be")
            if progress:
                progress(step + 1, ended - begun, fresh, line["loss"])
            finish(line)
    return state


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _where(part: str, rows: np.ndarray, ids: Sequence[Sequence[str]]) -> str:
    """In words, what `first_nonfinite` found of conversations with these ids."""
    hit = [name for micro, found in zip(ids, rows, strict=True) for name, bad in zip(micro, found, strict=False) if bad]
    among = f", of {', '.join(hit)}" if hit else ""
    return f"first in {part}{among}; the step's task_ids: {', '.join(name for micro in ids for name in micro)}"


def _remedy(config: TrainConfig, saved: int | None) -> str:
    last = "there is no checkpoint yet" if saved is None else f"the last checkpoint is step {saved}"
    if config.on_nonfinite == "skip":
        return f"train.max_skipped is {config.max_skipped}; {last}"
    return f"{last}; look at these conversations, lower train.learning_rate, or skip such steps (--on-nonfinite skip)"


def _interrupted(number: int, step: int, num_steps: int) -> Interrupted:
    return Interrupted(number, f"{signal.Signals(number).name}: saved at step {step} of {num_steps}")


def describe(batch: Batch) -> str:
    """The shape of a training batch in words."""
    micro, rows, length = batch.input_ids.shape
    volumes = ", ".join(f"{x.shape[1]} {name}" for name, x in batch.volumes.items()) or "no volumes"
    return f"{micro} × {rows} conversations of {length} positions; {volumes}"
