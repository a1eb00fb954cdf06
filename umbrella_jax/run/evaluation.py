"""Evaluate a run: compute the loss over the answers, then generate and score answers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from umbrella_jax.console import Progress, Work, plural, wrapped
from umbrella_jax.data.loader import eval_batches, eval_subset
from umbrella_jax.errors import visible
from umbrella_jax.inference.answers import generate_answers
from umbrella_jax.io.files import PRIVATE, strict_json, write_whole
from umbrella_jax.models import Params
from umbrella_jax.run.preparation import EvaluationData, Prepared
from umbrella_jax.rundir import PREDICTIONS, Line
from umbrella_jax.scoring.metrics import Task, score, short, task_of
from umbrella_jax.scoring.rows import Row
from umbrella_jax.scoring.tasks import name_of
from umbrella_jax.sharding import parts, put_batch
from umbrella_jax.training.diagnose import nonfinite_error
from umbrella_jax.training.step import jit_eval_step

_MAIN = ("accuracy", "balanced_accuracy", "auroc", "mae", "pearson", "finding_f1", "rouge_l", "field_accuracy")
"""Metrics of a task that are printed after each evaluation."""
_NO_BREAK = "\xa0"


def evaluate(
    run: Prepared,
    data: EvaluationData,
    interrupted: Callable[[], int],
    options: Mapping[str, Any],
    step: int,
    trainable: Params,
    *,
    final: bool = False,
) -> Line | None:
    """Compute the loss over the answers, and score greedy answers, which are written to predictions/step_N.jsonl.

    Args:
        interrupted: returns the signal that asks the run to end, 0 without one.
        options: arguments of `Progress`; its `say` takes the lines of results too.
        trainable: the parameters after `step`.
        final: evaluate all evaluation data. Otherwise `train.eval_samples` limits them, so that steps are compared on
            the same conversations. In a run without `keep_best`, the last step is always final.

    Returns:
        `eval_NAME` of each metric; None if a signal came meanwhile, in which case no answers are written.

    Raises:
        CheckpointError: weights are not finite; raised on all processes.
        RunError: loss or logits are not finite, naming the conversations; raised on all processes.
    """
    config, dataset = run.config, data.dataset
    mesh, frozen, graphdef = run.training.mesh, run.training.frozen, run.training.graphdef
    common: dict[str, Any] = {"threads": config.data.threads, "only": None}
    final = final or (step == run.training.num_steps and not config.train.keep_best)
    if not final and config.train.eval_samples is not None:
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
            placed = put_batch(batch, mesh, axis=0)
            batch_loss, count = jit_eval_step()(trainable, frozen, placed, graphdef=graphdef)
            if not math.isfinite(batch_loss):
                names = {row: dataset.conversations[i].label for row, i in enumerate(indices)}
                raise nonfinite_error(
                    f"evaluation at step {step}: losses", names, trainable | frozen, placed, graphdef=graphdef
                )
            loss, supervised = loss + float(batch_loss), supervised + int(count)
            work = Work(samples=len(indices), tokens=sum(len(dataset.encoded[i]) for i in indices))
            progress.advance(len(indices), work, time.perf_counter() - begun, compiled=shape not in shapes)
            shapes.add(shape)
            begun = time.perf_counter()
    versions: dict[int, Row] = {}
    only = None if common["only"] is None else data.expanded.numbers(common["only"])
    with Progress(
        f"evaluation at step {step}: answer", len(data.expanded.dataset if only is None else only), **options
    ) as progress:
        for new in generate_answers(
            trainable | frozen,
            graphdef,
            data.expanded,
            dict(enumerate(data.rows)),
            data.tasks,
            run.model.processor,
            mesh,
            batch_size=config.train.batch_size,
            max_new_tokens=config.train.max_new_tokens,
            choices=data.choices,
            constraints=data.constraints,
            progress=progress,
            threads=config.data.threads,
            only=only,
        ):
            if interrupted():
                return None
            versions |= new
    rows = data.expanded.merge(versions, data.tasks)
    answered = [rows[index] for index in sorted(rows)]
    if jax.process_index() == 0:
        folder = run.out / PREDICTIONS
        folder.mkdir(0o700, exist_ok=True)
        write_whole(folder / f"step_{step}.jsonl", "".join(strict_json(row) + "\n" for row in answered), PRIVATE)
    mean = loss / supervised if supervised else None  # if the right answers are only in metadata
    metrics: Line = {} if mean is None else {"loss": mean}
    answered_tasks = {task_of(row) for row in answered}
    tasks = {name: task for name, task in data.tasks.items() if name in answered_tasks}
    metrics |= score(answered, tasks, resamples=0).flat()
    metrics = {f"eval_{name}": value for name, value in metrics.items()}
    options["say"]("\n".join(evaluation_lines(step, metrics, [data.rows[index] for index in sorted(rows)], tasks)))
    return metrics


def evaluation_lines(step: int, metrics: Line, rows: Sequence[Row], tasks: Mapping[str, Task]) -> list[str]:
    """Return the lines about an evaluation: one of its loss, and one per task, wrapped at 80 columns.

    A task's line has its main metrics, the chance level of the first, and the numbers of conversations and of
    unparsable answers.

    Args:
        metrics: `eval_NAME` of each metric.
        rows: the evaluated conversations, with blank answers.
        tasks: the tasks of the rows.
    """
    loss = metrics.get("eval_loss")
    lines = [] if loss is None else [f"step {step:,}  evaluation: loss {loss:.4f}"]
    blank = score(rows, tasks, resamples=0)  # chance levels do not depend on the answers
    for name, task in tasks.items():
        keys = {figure: f"eval_{name_of(name, figure)}" for figure in task.figures(likelihoods=True)}
        values = {figure: metrics[key] for figure, key in keys.items() if key in metrics}
        if not values:  # `evaluation.tasks` was different then
            continue
        shown = [figure for figure in _MAIN if figure in values] or list(values)[:1]
        texts = [f"{figure} {short(values[figure])}" for figure in shown]
        first = blank.figures.get(name_of(name, shown[0]))
        texts[0] += "" if first is None or first.chance is None else f" (chance {short(first.chance)})"
        count, share = sum(task_of(row) == name for row in rows), values.get("unparsable")
        counts = [plural(count, "conversation"), *([] if share is None else [f"{round(share * count)} unparsable"])]
        text = f"step {step:,}  {visible(name, kept='')}: {_unbroken(texts)} ({_unbroken(counts)})"
        lines += [line.replace(_NO_BREAK, " ") for line in wrapped(text)]
    return lines


def _unbroken(items: Sequence[str]) -> str:
    """Join items with commas; lines break only between items."""
    return ", ".join(item.replace(" ", _NO_BREAK) for item in items)


def headline_of(metrics: Line, best_metric: str | None) -> str:
    """Return name and value of an evaluation's main metric: `train.best_metric`, else the first but the loss."""
    names = [name for name in metrics if name.startswith("eval_") and name != "eval_loss"] or ["eval_loss"]
    name = best_metric if best_metric in metrics else names[0]
    return f"{name} {short(metrics.get(name))}"
