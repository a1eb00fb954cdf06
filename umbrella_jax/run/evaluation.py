"""A run's evaluations: loss over the answers, and the answers."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from umbrella_jax.data.loader import eval_batches, eval_subset
from umbrella_jax.evaluation.metrics import score, task_of
from umbrella_jax.files import PRIVATE, strict_json, write_whole
from umbrella_jax.models import Params
from umbrella_jax.prediction import Row, answers, with_answer
from umbrella_jax.progress import Progress, Work
from umbrella_jax.run.preparation import Evaluated, Prepared
from umbrella_jax.rundir import PREDICTIONS, Line
from umbrella_jax.sharding import parts, put_batch
from umbrella_jax.training.step import jit_eval_step


def evaluate(
    run: Prepared,
    evaluated: Evaluated,
    interrupted: Callable[[], int],
    options: Mapping[str, Any],
    step: int,
    trainable: Params,
) -> Line | None:
    """Loss over the answers, and how right greedy ones are; these go to predictions/step_N.jsonl.

    None, and no answers, where a signal comes meanwhile.

    Args:
        options: of the `Progress` of both.
    """
    config, mesh, dataset = run.config, run.mesh, evaluated.dataset
    common: dict[str, Any] = {"threads": config.data.threads, "only": None}
    if step < run.steps and config.train.eval_samples is not None:
        common["only"] = eval_subset(dataset, config.train.batch_size, config.train.eval_samples, parts(mesh))
    total = len(dataset if common["only"] is None else common["only"])
    loss, supervised = 0.0, 0
    with Progress(f"evaluation at step {step}: loss of", total, **options) as progress:
        batches = eval_batches(dataset, config.train.batch_size, prompts=False, parts=parts(mesh), **common)
        shapes: set[Any] = set()
        begun = time.perf_counter()
        for indices, batch in batches:
            if interrupted():
                return None
            shape = batch.input_ids.shape, tuple((name, len(x)) for name, x in batch.volumes.items())
            batch_loss, count = jit_eval_step()(
                trainable, run.frozen, put_batch(batch, mesh, axis=0), graphdef=run.graphdef
            )
            loss, supervised = loss + float(batch_loss), supervised + int(count)
            work = Work(samples=len(indices), tokens=sum(len(dataset.encoded[i]) for i in indices))
            progress.advance(len(indices), work, time.perf_counter() - begun, compiled=shape not in shapes)
            shapes.add(shape)
            begun = time.perf_counter()
    rows: dict[int, Row] = {}
    with Progress(f"evaluation at step {step}: answer", total, **options) as progress:
        for found in answers(
            trainable | run.frozen,
            run.graphdef,
            dataset,
            run.processor,
            mesh,
            batch_size=config.train.batch_size,
            max_new_tokens=config.train.max_new_tokens,
            choices=evaluated.choices,
            progress=progress,
            **common,
        ):
            if interrupted():
                return None
            rows |= {index: with_answer(evaluated.rows[index], answer) for index, answer in found.items()}
    answered = [rows[index] for index in sorted(rows)]
    if jax.process_index() == 0:
        folder = run.out / PREDICTIONS
        folder.mkdir(0o700, exist_ok=True)
        write_whole(folder / f"step_{step}.jsonl", "".join(strict_json(row) + "\n" for row in answered), PRIVATE)
    mean = loss / supervised if supervised else None  # none: the truth is in metadata alone
    metrics: Line = {} if mean is None else {"loss": mean if math.isfinite(mean) else None}
    there = {task_of(row) for row in answered}
    tasks = {name: task for name, task in evaluated.tasks.items() if name in there}
    return {f"eval_{name}": value for name, value in (metrics | score(answered, tasks, resamples=0).flat()).items()}
