"""Answer a run's evaluation data under controls, such as blank volumes, after its last evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from umbrella_jax.console import Progress, wrapped
from umbrella_jax.distributed import broadcast, raise_together
from umbrella_jax.inference.answers import generate_answers
from umbrella_jax.inference.controls import left_out_lines
from umbrella_jax.inference.windows import expand
from umbrella_jax.io.files import PRIVATE, strict_json, write_whole
from umbrella_jax.models import Params
from umbrella_jax.run.preparation import EvaluationData, Prepared
from umbrella_jax.rundir import predictions_by_step, run_control
from umbrella_jax.scoring.metrics import read_predictions
from umbrella_jax.scoring.reliance import score_controls
from umbrella_jax.scoring.rows import Row


def unanswered_controls(run: Prepared, data: EvaluationData, step: int) -> list[str]:
    """Return the controls of a step that have no file, or one with other questions."""
    left = []
    for name, controlled in data.controls.items():
        asked = [_question(row) for one in controlled for row in one.changed.rows.values()]
        file = run_control(run.out, step, name)
        if not file.exists() or list(map(_question, read_predictions(file))) != asked:
            left.append(name)
    return left


def _question(row: Row) -> tuple[Any, ...]:
    return row["task_id"], row.get("question"), row.get("left_out")


def answer_controls(
    run: Prepared,
    data: EvaluationData,
    interrupted: Callable[[], int],
    options: Mapping[str, Any],
    step: int,
    trainable: Params,
) -> bool:
    """Answer each control that is not answered yet, write controls/step_N/NAME.jsonl, and print the verdicts.

    Arguments are those of `evaluate`.

    Returns:
        Whether all are answered; False if a signal came meanwhile. The files of finished controls are kept.

    Raises:
        CheckpointError, RunError: as `evaluate` does.
    """
    config, mesh = run.config, run.training.mesh
    names = broadcast(unanswered_controls(run, data, step) if jax.process_index() == 0 else None)
    for line in left_out_lines({name: data.controls[name] for name in names}):
        options["say"]("\n".join(wrapped(line)))
    for name in names:
        rows = list[Row]()
        for one in data.controls[name]:
            own = dict(one.changed.rows)
            expanded = expand(one.dataset, config.evaluation.windows)
            asked, versions = expanded.numbers(one.changed.asked), dict[int, Row]()
            with Progress(f"{name} at step {step}: answer", len(asked), **options) as progress:
                for answers in generate_answers(
                    trainable | run.training.frozen,
                    run.training.graphdef,
                    expanded,
                    own,
                    data.tasks,
                    run.model.processor,
                    mesh,
                    batch_size=config.train.batch_size,
                    threads=config.data.threads,
                    max_new_tokens=config.train.max_new_tokens,
                    choices=data.choices,
                    constraints=data.constraints,
                    only=asked,
                    progress=progress,
                ):
                    if interrupted():
                        return False
                    versions |= answers
            own |= expanded.merge(versions, data.tasks)
            rows += own.values()
        if jax.process_index() == 0:
            file = run_control(run.out, step, name)
            file.parent.mkdir(0o700, parents=True, exist_ok=True)
            write_whole(file, "".join(strict_json(row) + "\n" for row in rows), PRIVATE)
    with raise_together():
        if jax.process_index() == 0 and names:
            options["say"]("\n".join(_verdict_lines(run, data, step)))
    return True


def _verdict_lines(run: Prepared, data: EvaluationData, step: int) -> list[str]:
    """Return the verdicts about all controls of a step, wrapped."""
    if (true := predictions_by_step(run.out).get(step)) is None:  # removed by the user
        return []
    controls = {name: read_predictions(run_control(run.out, step, name)) for name in data.controls}
    scores = score_controls(read_predictions(true), controls, data.tasks, resamples=run.config.evaluation.resamples)
    return [f"controls at step {step:,}:", *(line for text in scores.verdicts() for line in wrapped(f"  {text}"))]
