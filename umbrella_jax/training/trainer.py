"""The loop, read from top to bottom. It takes any iterator of `Batch`."""

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from umbrella_jax.batch import Batch
from umbrella_jax.config import TrainConfig
from umbrella_jax.distributed import together
from umbrella_jax.errors import UmbrellaError
from umbrella_jax.models import Params
from umbrella_jax.sharding import put_batch
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.step import TrainState, jit_train_step

Evaluate = Callable[[int, Params], dict[str, float]]
"""(step, trainable parameters) → metrics under names of their own."""


class Metrics:
    """`metrics.jsonl`: one line per update, flushed as it is written. Lines behind `step`, from a run that was cut
    off after its last checkpoint, are taken out: they are made again."""

    def __init__(self, path: Path, step: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except json.JSONDecodeError:  # the torn last line of a killed run
                    continue
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def write(self, **values: float) -> None:
        """Appends one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
    evaluate: Evaluate | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> TrainState:
    """Trains from `state.step` to `num_steps` on `batches`, which starts at that step, and returns the last state.

    Saves every `config.save_steps` updates and at the end, `meta` beside it; evaluates every `config.eval_steps` and
    at the end; hands each line of metrics to `log` too. Raises UmbrellaError, keeping the last checkpoint, when the
    loss is not finite. While a step runs, the next batch is read and put on the devices; its errors wait until then.

    Of several processes each brings its own part of every batch (see `put_batch`); all of them save and evaluate, the
    first alone prints, writes metrics and logs.
    """
    first = jax.process_index() == 0
    start = int(state.step)
    step_fn = partial(jit_train_step, graphdef=graphdef, optimizer=optimizer)
    shapes: set[Any] = set()

    def next_batch() -> Batch:
        return put_batch(next(batches), mesh, axis=1)

    with (
        jax.set_mesh(mesh),
        ThreadPoolExecutor(1) as ahead,
        Metrics(metrics_path, start) if first else nullcontext() as metrics,
        tqdm(total=num_steps, initial=start, desc="train", unit="step", disable=None if first else True) as bar,
    ):
        coming = ahead.submit(next_batch) if start < num_steps else None
        for step in range(start, num_steps):
            assert coming is not None
            batch, last = coming.result(), step + 1 == num_steps
            shape = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
            if first and shape not in shapes:
                shapes.add(shape)
                bar.write(f"step {step + 1}: compiling for {describe(batch)}")
            started = time.perf_counter()
            state, values = step_fn(state, frozen, batch)
            coming = None if last else ahead.submit(next_batch)
            values = jax.device_get(values)  # waits for the step
            seconds = time.perf_counter() - started
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                with together():  # every process comes here: all have the same values
                    raise UmbrellaError(
                        f"step {step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite; "
                        f"the last checkpoint is step {checkpoints.latest_step()}"
                    )
            line: dict[str, float] = {
                "step": step + 1,
                "loss": float(values["loss"]),
                "grad_norm": float(values["grad_norm"]),
                "learning_rate": float(schedule(step)),
                "supervised_tokens": int(values["supervised_tokens"]),
                "step_seconds": seconds,
            }
            if evaluate and (last or (config.eval_steps and (step + 1) % config.eval_steps == 0)):
                line |= evaluate(step + 1, state.trainable)
            if metrics:
                metrics.write(**line)
                if log:
                    log(line)
            bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            bar.update()
            if last or (step + 1) % config.save_steps == 0:
                checkpoints.save(state, meta)
    return state


def describe(batch: Batch) -> str:
    """The shape of a training batch in words."""
    micro, rows, length = batch.input_ids.shape
    counts = [f"{x.shape[1]} {name} {'×'.join(map(str, x.shape[2:]))}" for name, x in batch.volumes.items()]
    volumes = ", ".join(counts) or "no volumes"
    targets = batch.target_pos.shape[-1]
    return f"{micro} × {rows} conversations of {length} positions, {targets} of them supervised; {volumes}"
