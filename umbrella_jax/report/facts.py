"""Collect the facts about a run for its page, from its directory; no weights are read and nothing is drawn."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.config_json import UMBRELLA_CONFIG, read_checkpoint_json, read_config, stored_untrained
from umbrella_jax.config.schema import RunConfig, TrainConfig
from umbrella_jax.data.cache import source_digest
from umbrella_jax.data.conversation import Conversation, conversation_files, read_with_config
from umbrella_jax.data.inputs import load_stored_inputs
from umbrella_jax.errors import CheckpointError, ConfigError, DataError, Faults, UmbrellaError, why_not_a_directory
from umbrella_jax.io import reading
from umbrella_jax.models import LlavaConfig, abstract_params
from umbrella_jax.models.paths import is_component
from umbrella_jax.report.predictors import read_baselines, read_controls
from umbrella_jax.rundir import (
    CHECKPOINTS,
    CONFIG,
    INPUTS,
    METRICS,
    MODEL,
    PREDICTIONS,
    Line,
    Step,
    check_one_run,
    choose_step,
    load_run_config,
    predictions_by_step,
    read_metrics,
)
from umbrella_jax.scoring.adjustment import AdjustedScores, adjust_scores
from umbrella_jax.scoring.bootstrap import number_subjects
from umbrella_jax.scoring.groups import GroupedScores, score_groups
from umbrella_jax.scoring.metrics import (
    Prediction,
    Scores,
    Task,
    answer_probabilities,
    parse_number,
    read_predictions,
    score,
    short,
    task_of,
    tasks_of,
)
from umbrella_jax.scoring.number_calibration import NumberCalibration, calibrate_numbers
from umbrella_jax.scoring.paired_scores import PairedScores, compare_predictors
from umbrella_jax.scoring.reliance import ControlScores, score_controls
from umbrella_jax.scoring.rows import blank_rows
from umbrella_jax.scoring.tasks import by_task
from umbrella_jax.scoring.text import different_statements
from umbrella_jax.training import freeze
from umbrella_jax.training.checkpoint import Checkpoints

BINS = 10
"""Number of equal-width bins in which confidence is compared with accuracy, as for `ece`."""


@dataclass(frozen=True)
class Bin:
    """One bin of a calibration: the answers whose probability is in one tenth of 0 .. 1."""

    count: int
    confidence: float
    """Mean probability."""
    accuracy: float


@dataclass(frozen=True)
class Sample:
    """One conversation of the evaluation data and its answer."""

    conversation: Conversation
    row: Prediction
    task: str
    failed: bool
    verdict: str
    """The result in words: `correct`, `wrong`, `no number`, `off by` how much, or how many statements differ."""


@dataclass(frozen=True)
class Facts:
    """Everything that the page shows in numbers and text."""

    run: Path
    config: RunConfig
    step: int | None
    """Step of the evaluation; None if the predictions come from elsewhere."""
    step_reason: str
    """Why this step was chosen, in words."""
    answering: int
    """Step whose weights explain the answers: `step`, or the default of `predict`."""
    saved: tuple[int, ...]
    """Steps that have a checkpoint, newest first."""
    versions: Mapping[str, str]
    """{package: version} with which the newest checkpoint was trained."""
    base: Mapping[str, str]
    """`name`, `path` and `fingerprint` of the base."""
    model: LlavaConfig
    trains: Mapping[str, tuple[int, int]]
    """{component: (number of trainable values, number of frozen values)}, from `freeze.counts`."""
    trained: tuple[str, ...]
    """Paths of the trainable parameters."""
    untrained: Mapping[str, str]
    """{component: reason} for those that neither the base's training nor the run has trained."""
    data: Mapping[str, Mapping[str, Any]]
    """{train, eval: `path` and the numbers of `conversations`, `subjects` and `volumes`; or `unknown`, the reason why
    they cannot be counted}."""
    lines: tuple[Line, ...]
    """Lines of `metrics.jsonl`."""
    predictions: Path
    rows: tuple[Prediction, ...]
    scores: Scores
    groups: GroupedScores | None
    """Scores by group; None if not asked for."""
    adjusted: AdjustedScores | None
    """Scores of corrected regressions; None if not asked for."""
    baselines: Mapping[str, Scores]
    """{baseline: scores of the tasks that it answers}."""
    controls: ControlScores
    """Scores under the controls that were run; empty without any."""
    compared: PairedScores
    """The main figures beside those of controls and baselines."""
    calibration: Mapping[str, tuple[Bin, ...]]
    """{task whose answers have likelihoods: its bins that are not empty}."""
    intervals: NumberCalibration | None
    """Coverage of the intervals of regressions with candidate numbers; None if no task has any."""
    numbers: Mapping[str, tuple[tuple[float, float | None], ...]]
    """{regression task: (truth, answer) per row}; the answer is None if it has no number."""
    num_subjects: int
    """Number of subjects of all rows together."""
    order: tuple[tuple[int, bool], ...]
    """(number of a row, whether it failed) of all rows: failures first, tasks in turn, the worst of each first."""
    failures: int
    """Number of failed rows. A number has failed if its error exceeds the mean error of always answering the median."""
    samples: tuple[Sample, ...]
    """Chosen conversations, failures first."""


def read_facts(
    run: str | Path,
    *,
    step: Step | None = None,
    predictions: str | Path | None = None,
    baseline: str | Path | None = None,
    by: Sequence[str] = (),
    adjust: Sequence[str] = (),
    adjust_from: str | Path | None = None,
    samples: int = 8,
    weights: bool = False,
) -> Facts:
    """Read a run. Everything that is missing or does not fit is reported together, before anything is computed.

    Args:
        step: step of the evaluation; by default the best if the run keeps its best, else the last.
        predictions: answers to the run's evaluation data from elsewhere, such as `umbrella-jax predict`, to use instead
            of an evaluation's.
        baseline: the output directory of `umbrella-jax baseline`, or another directory with a NAME.jsonl per baseline.
        by: columns of `metadata` by which to score groups, as for `score_groups`.
        adjust: covariates for which to correct regressions, as for `adjust_scores`.
        adjust_from: answers on which to fit that correction, instead of the scored ones.
        samples: number of conversations to choose, failures first; 0 needs neither conversations nor volumes.
        weights: require that the checkpoint that answered still exists.

    Raises:
        ConfigError, CheckpointError, DataError: every fault found.
    """
    run = Path(run)
    check_run(run)
    config = load_run_config(run)
    model = read_config(run / MODEL, None)
    faults = Faults()
    with faults:
        saved, meta = _checkpoints(run)
    with faults:
        lines, inputs = read_metrics(run / METRICS), _inputs(run)
    with faults:
        file, answered_step, step_reason = Path(predictions or ""), None, ""
        if predictions is None:
            file, answered_step, step_reason = _evaluation(run, config.train, step)
        if weights and answered_step is not None and answered_step not in saved:
            steps = ", ".join(map(str, saved))
            raise ConfigError(
                f"--explain: step {answered_step} answered, but its checkpoint is gone; expected --step {steps}"
            )
        rows = read_predictions(file)
    fit_rows = None
    with faults:
        fit_rows = None if adjust_from is None else read_predictions(adjust_from)
    baseline_rows: dict[str, list[dict[str, Any]]] = {}
    with faults:
        baseline_rows = {} if baseline is None else read_baselines(baseline)
    faults.raise_as(DataError)
    splits: dict[str, Sequence[Conversation] | str] = {}
    for split in ("train", "eval"):
        if getattr(config.data, split) is not None:
            try:
                splits[split] = _conversations(config, model, split, inputs)
            except UmbrellaError as error:
                splits[split] = error.faults[0]
    evaluated = splits.get("eval", "data.eval: the run has none")
    with faults:
        # infer tasks from all evaluation data if possible: the rows may cover only a part (train.eval_samples)
        all_rows = rows if isinstance(evaluated, str) else blank_rows(evaluated)
        groups, known = by_task(rows), tasks_of(all_rows, config.evaluation.tasks)
        tasks = {name: task for name, task in known.items() if name in groups}
    with faults:
        conversations = _answered(evaluated, rows, file) if samples else []
    for name, answers in baseline_rows.items():
        faults += _baseline_faults(str(baseline), name, answers, rows)
    control_rows: dict[str, list[dict[str, Any]]] = {}
    with faults:
        control_rows = {name: own[0] for name, own in read_controls([file]).items()}
    faults.raise_as(DataError)
    options: dict[str, Any] = {"resamples": config.evaluation.resamples}
    grouped = adjusted = None
    with faults:
        grouped = score_groups(rows, tasks, by, **options) if by else None
    with faults:
        adjusted = adjust_scores(rows, tasks, adjust, fit_rows=fit_rows, **options) if adjust else None
    with faults:
        controls = score_controls(rows, control_rows, tasks, **options)
    faults.raise_as(DataError)

    order = _order(rows, tasks)
    shown_samples = [
        _sample(conversations[i], rows[i], tasks[task_of(rows[i])], failed) for i, failed in order[:samples]
    ]
    _check_volumes(shown_samples, inputs)
    _, shapes = abstract_params(replace(model, lora=config.model.lora))
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    return Facts(
        run=run,
        config=config,
        step=answered_step,
        step_reason=step_reason,
        answering=choose_step(run, config.train, saved, None)[0] if answered_step is None else answered_step,
        saved=saved,
        versions=meta["versions"],
        base={
            "name": read_checkpoint_json(run / MODEL / UMBRELLA_CONFIG).get("base", "unknown"),
            "path": str(config.model.base),
            "fingerprint": meta["base_fingerprint"],
        },
        model=model,
        trains=freeze.counts(shapes, labels),
        trained=tuple(path for path, label in labels.items() if label != freeze.FROZEN),
        untrained={name: why for name, why in stored_untrained(run / MODEL).items() if is_component(name)},
        data={split: {"path": getattr(config.data, split)} | _counts(c) for split, c in splits.items()},
        lines=tuple(lines),
        predictions=file,
        rows=tuple(rows),
        scores=score(rows, tasks, **options),
        groups=grouped,
        adjusted=adjusted,
        baselines={
            name: score(answers, {task: tasks[task] for task in tasks if task in by_task(answers)}, **options)
            for name, answers in baseline_rows.items()
        },
        controls=controls,
        compared=compare_predictors(
            [rows],
            tasks,
            controls={name: [own] for name, own in control_rows.items()},
            baselines=baseline_rows,
            **options,
        ),
        calibration={
            name: tuple(_bins(tasks[name], members))
            for name, members in groups.items()
            if tasks[name].answers is not None and all(row.get("likelihoods") for row in members)
        },
        intervals=calibrate_numbers(rows, tasks, **options),
        numbers={
            name: tuple((_number(tasks[name].truth(row), tasks[name]), _answer(row, tasks[name])) for row in members)
            for name, members in groups.items()
            if tasks[name].kind == "regression"
        },
        num_subjects=len(number_subjects(rows)),
        order=tuple(order),
        failures=sum(failed for _, failed in order),
        samples=tuple(shown_samples),
    )


def check_run(run: str | Path) -> None:
    """Raise ConfigError if a path is not the directory of a run."""
    run = Path(run)
    check_one_run(run)
    if not (run / CONFIG).is_file() or not (run / MODEL).is_dir():
        problem = "no run" if run.is_dir() else why_not_a_directory(run)
        raise ConfigError(f"{run}: {problem}; expected the --out of umbrella-jax train, with {CONFIG} and {MODEL}/")


def _checkpoints(run: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the steps that have a checkpoint, newest first, and the metadata of the newest."""
    if not (run / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{run}: the run has no checkpoint yet; train it first")
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{run}: the run has no checkpoint yet; train it first")
        return tuple(steps), checkpoints.meta(steps[0])


def _evaluation(run: Path, train: TrainConfig, step: Step | None) -> tuple[Path, int, str]:
    """Return the predictions of an evaluation, its step, and why it was chosen."""
    files = predictions_by_step(run)
    if not files:
        raise ConfigError(f"{run / PREDICTIONS}: no predictions; train with data.eval (--eval-data PATH)")
    at, why = choose_step(run, train, files, step)
    return files[at], at, why


def _baseline_faults(
    folder: str, name: str, rows: Sequence[Prediction], expected: Sequence[Prediction]
) -> Iterator[str]:
    """Yield a fault for each task that the run lacks or whose conversations differ from the run's."""
    run_ids = {task: _task_ids(members) for task, members in by_task(expected).items()}
    for task, members in by_task(rows).items():
        if task not in run_ids:
            yield f"--baseline {folder}: {name}: task {task}: not one of the run's, {', '.join(run_ids)}"
            continue
        ids = _task_ids(members)
        if differ := sorted({*ids - run_ids[task]} | {*run_ids[task] - ids}):
            ids_shown = ", ".join(differ[:5])
            yield f"--baseline {folder}: {name}: task {task}: other conversations than the run's: {ids_shown}"


def _task_ids(rows: Sequence[Prediction]) -> Counter[str]:
    return Counter(str(row["task_id"]) for row in rows)


def _inputs(run: Path) -> dict[str, set[str]]:
    """Return {kind: digests of the files that the run read}."""
    recorded = load_stored_inputs(run / INPUTS, "restore it")
    return {kind: {digest for _, digest in files} for kind, files in recorded.items()}


def _conversations(
    config: RunConfig, model: LlavaConfig, split: str, inputs: Mapping[str, set[str]]
) -> Sequence[Conversation]:
    """Read a split's conversations as the run did. Raises DataError if they cannot be read or have changed."""
    data, path = config.data, Path(getattr(config.data, split))
    if changed := [
        f"data.{split}: {file}: other content than the run read"
        for file in conversation_files(path)
        if reading.sha256(file) not in inputs["conversations"]
    ]:
        raise DataError(changed)
    return read_with_config(path, model.modalities, data)


def _answered(
    conversations: Sequence[Conversation] | str, rows: Sequence[Prediction], file: Path
) -> Sequence[Conversation]:
    """Return the conversation of each row. Raises DataError if they cannot be read or are others."""
    remedy = "or leave the conversations out (--samples 0)"
    if isinstance(conversations, str):
        raise DataError(f"{conversations}; bring it back (relative paths start where the run was started), {remedy}")
    ids = [str(row["task_id"]) for row in rows]
    if ids == [c.task_id for c in conversations]:  # ids need not be unique if the order is the same
        return conversations
    by_id = {c.task_id: c for c in conversations}
    if len(by_id) < len(conversations) or not by_id.keys() >= set(ids):
        raise DataError(f"{file}: answers to other conversations than those of data.eval; name others, {remedy}")
    return [by_id[name] for name in ids]


def _check_volumes(samples: Sequence[Sample], inputs: Mapping[str, set[str]]) -> None:
    """Raise DataError naming each volume of the samples that is gone or differs from what the run read."""
    faults = []
    for path in dict.fromkeys(image.path for sample in samples for image in sample.conversation.images):
        try:
            if source_digest(path) not in inputs["volumes"]:
                faults.append(f"{path}: other content than the run read; bring it back, or --samples 0")
        except DataError as error:
            faults += [f"{fault}; or leave the conversations out (--samples 0)" for fault in error.faults]
    if faults:
        raise DataError(faults)


def _counts(conversations: Sequence[Conversation] | str) -> dict[str, Any]:
    if isinstance(conversations, str):
        return {"unknown": conversations}
    return {
        "conversations": len(conversations),
        "subjects": len({subject for c in conversations for subject in c.subjects}),
        "volumes": len({(image.path, image.modality) for c in conversations for image in c.images}),
    }


def _number(text: str, task: Task) -> float:
    value = parse_number(text, task.unit)
    assert value is not None  # `tasks_of` refuses such references
    return value


def _answer(row: Prediction, task: Task) -> float | None:
    return parse_number(row["prediction"], task.unit)


def _bins(task: Task, rows: Sequence[Prediction]) -> Iterator[Bin]:
    shares = answer_probabilities(task, rows)
    confidence, likeliest = shares.max(1), shares.argmax(1)
    right = np.array([task.classes[i] == task.truth(row) for i, row in zip(likeliest, rows, strict=True)])
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    for which in (place == number for number in range(BINS)):
        if which.any():
            yield Bin(int(which.sum()), float(confidence[which].mean()), float(right[which].mean()))


def _order(rows: Sequence[Prediction], tasks: Mapping[str, Task]) -> list[tuple[int, bool]]:
    """Return (number of a row, whether it failed) for all rows in the order in which the page shows them.

    Failures come first, then the other rows. In each half, tasks take turns, and each gives its worst answers first.
    """
    order: list[tuple[int, bool]] = []
    places: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[task_of(row)].append(i)
    errors = {name: [_error(rows[i], tasks[name]) for i in own] for name, own in sorted(places.items())}
    for failed in (True, False):
        queues = []
        for name, own in errors.items():
            limit = _tolerated(tasks[name], [rows[i] for i in places[name]])
            ranked = sorted(zip(own, places[name], strict=True), key=lambda pair: (-pair[0], pair[1]))
            queues.append([place for error, place in ranked if (error > limit) == failed])
        for turn in range(max(map(len, queues))):
            order += [(queue[turn], failed) for queue in queues if turn < len(queue)]
    return order


def _sample(conversation: Conversation, row: Prediction, task: Task, failed: bool) -> Sample:
    error = _error(row, task)
    if task.kind == "regression":
        verdict = f"off by {short(error)} {task.unit or ''}".strip() if np.isfinite(error) else "no number"
    elif task.kind == "report" and task.schema is None:
        verdict = f"{error:.0%} of statements differ" if failed else "same statements"
    else:
        verdict = "wrong" if failed else "correct"  # not "right", which is a side
    return Sample(conversation, row, task_of(row), failed, verdict)


def _error(row: Prediction, task: Task) -> float:
    """Return the absolute error of a number, the share of different statements of a report, or 1 for another wrong
    answer and 0 for a right one."""
    if task.kind == "report" and task.schema is None:
        return different_statements(task, row)
    if task.kind != "regression":
        return float(task.answer_of(row) != task.truth(row))
    answer = _answer(row, task)
    return np.inf if answer is None else abs(answer - _number(task.truth(row), task))


def _tolerated(task: Task, rows: Sequence[Prediction]) -> float:
    """Return the largest error that does not count as a failure: 0, or for numbers the mean error of always answering
    the median."""
    if task.kind != "regression":
        return 0.0
    truths = np.array([_number(task.truth(row), task) for row in rows])
    return float(np.abs(truths - np.median(truths)).mean())
