"""What a run's directory says, put together for its page; nothing is drawn here, and no weights are read."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.config_json import UMBRELLA_CONFIG, read_config, read_json
from umbrella_jax.config.load import load_stored_config
from umbrella_jax.config.schema import RunConfig, TrainConfig
from umbrella_jax.data.cache import source_digest
from umbrella_jax.data.conversation import Conversation, conversation_files, read_conversations
from umbrella_jax.errors import CheckpointError, ConfigError, DataError, Faults, UmbrellaError, why_not_a_directory
from umbrella_jax.io import reading
from umbrella_jax.models import LlavaConfig, abstract_params
from umbrella_jax.rundir import (
    CHECKPOINTS,
    CONFIG,
    INPUTS,
    METRICS,
    MODEL,
    PREDICTIONS,
    Line,
    Step,
    choose_step,
    predictions_by_step,
    read_metrics,
)
from umbrella_jax.scoring.metrics import (
    Row,
    Scores,
    Task,
    normalise,
    parse_number,
    probabilities,
    read_predictions,
    score,
    short,
    task_of,
    tasks_of,
)
from umbrella_jax.scoring.rows import blank_rows
from umbrella_jax.scoring.tasks import by_task
from umbrella_jax.training import freeze
from umbrella_jax.training.checkpoint import Checkpoints

BINS = 10
"""Of equal width, in which confidence is compared with accuracy; those of `ece`."""


@dataclass(frozen=True)
class Bin:
    """Of a calibration: the answers whose probability lies in one tenth of 0 .. 1."""

    count: int
    confidence: float
    """Mean probability."""
    accuracy: float


@dataclass(frozen=True)
class Sample:
    """One conversation of the evaluation data, and what was answered."""

    conversation: Conversation
    row: Row
    task: str
    failed: bool
    verdict: str
    """In words: correct, wrong, no number, off by how much."""


@dataclass(frozen=True)
class Facts:
    """All that the page says in numbers and text."""

    run: Path
    config: RunConfig
    step: int | None
    """Of the evaluation; None where the predictions come from elsewhere."""
    why: str
    """Why that step, for people."""
    answering: int
    """The step whose weights explain the answers: `step`, or the one that `predict` takes by default."""
    saved: tuple[int, ...]
    """Steps whose checkpoints are there, the newest first."""
    versions: Mapping[str, str]
    """Of packages, as the newest checkpoint was trained with them."""
    base: Mapping[str, str]
    """`name`, `path`, `fingerprint` of what it trained on top of."""
    model: LlavaConfig
    trains: Mapping[str, tuple[int, int]]
    """{component: how many numbers train, how many are frozen}, as `freeze.counts`."""
    trained: tuple[str, ...]
    """Paths of the parameters that train."""
    data: Mapping[str, Mapping[str, Any]]
    """{train, eval: `path`; `conversations`, `subjects`, `volumes`, or `unknown`, why they cannot be counted}."""
    lines: tuple[Line, ...]
    """Of `metrics.jsonl`."""
    predictions: Path
    rows: tuple[Row, ...]
    scores: Scores
    baselines: Mapping[str, Scores]
    """By the name of the baseline; each of the tasks that it answers."""
    calibration: Mapping[str, tuple[Bin, ...]]
    """Of the tasks whose answers have likelihoods: the bins that hold some."""
    numbers: Mapping[str, tuple[tuple[float, float | None], ...]]
    """Of regressions: truth and answer, None where it holds no number, in the order of the rows."""
    failures: int
    """Of all rows; in numbers those that are farther off than always answering the median is on average."""
    samples: tuple[Sample, ...]
    """Failures first."""


def read_facts(
    run: str | Path,
    *,
    step: Step | None = None,
    predictions: str | Path | None = None,
    baseline: str | Path | None = None,
    samples: int = 8,
    weights: bool = False,
) -> Facts:
    """Reads a run. Everything that is missing or does not fit is refused together, before anything is worked out.

    Args:
        step: of the evaluation; by default the best if the run keeps its best, else the last.
        predictions: answers to the run's evaluation data from elsewhere, `umbrella-jax predict` say, instead of one.
        baseline: what `umbrella-jax baseline` wrote to, or another directory with a NAME.jsonl for each of several.
        samples: how many conversations to choose, failures first; 0 needs neither conversations nor volumes.
        weights: whether the checkpoint that answered must be there still.

    Raises:
        ConfigError, CheckpointError, DataError: naming what.
    """
    run = Path(run)
    check_run(run)
    config = load_stored_config(run / CONFIG)
    model = read_config(run / MODEL, None)
    faults = Faults()
    with faults:
        saved, meta = _checkpoints(run)
    with faults:
        lines, inputs = read_metrics(run / METRICS), _inputs(run)
    with faults:
        file, at, why = Path(predictions or ""), None, ""
        if predictions is None:
            file, at, why = _evaluation(run, config.train, step)
        if weights and at is not None and at not in saved:
            there = ", ".join(map(str, saved))
            raise ConfigError(f"--explain: step {at} answered, of which no checkpoint is left; expected --step {there}")
        rows = read_predictions(file)
    others: dict[str, list[dict[str, Any]]] = {}
    with faults:
        others = {} if baseline is None else _baselines(Path(baseline))
    faults.raise_as(DataError)
    read: dict[str, list[Conversation] | str] = {}
    for split in ("train", "eval"):
        if getattr(config.data, split) is not None:
            try:
                read[split] = _conversations(config, model, split, inputs)
            except UmbrellaError as error:
                read[split] = error.faults[0]
    found = read.get("eval", "data.eval: the run has none")
    with faults:
        # by all of the evaluation data, where it is there: these may be a part (train.eval_samples)
        whole = rows if isinstance(found, str) else blank_rows(found)
        groups, known = by_task(rows), tasks_of(whole, config.evaluation.tasks)
        tasks = {name: task for name, task in known.items() if name in groups}
    with faults:
        conversations = _answered(found, rows, file) if samples else []
    for name, of in others.items():
        faults += _baseline_faults(name, of, rows)
    faults.raise_as(DataError)

    order = _order(rows, tasks)
    chosen = [_sample(conversations[i], rows[i], tasks[task_of(rows[i])], failed) for i, failed in order[:samples]]
    _check_volumes(chosen, inputs)
    _, shapes = abstract_params(replace(model, lora=config.model.lora))
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    options: dict[str, Any] = {"resamples": config.evaluation.resamples}
    return Facts(
        run=run,
        config=config,
        step=at,
        why=why,
        answering=choose_step(run, config.train, saved, None)[0] if at is None else at,
        saved=saved,
        versions=meta["versions"],
        base={
            "name": read_json(run / MODEL / UMBRELLA_CONFIG).get("base", "unknown"),
            "path": str(config.model.base),
            "fingerprint": meta["base_fingerprint"],
        },
        model=model,
        trains=freeze.counts(shapes, labels),
        trained=tuple(path for path, label in labels.items() if label != freeze.FROZEN),
        data={split: {"path": getattr(config.data, split)} | _counts(of) for split, of in read.items()},
        lines=tuple(lines),
        predictions=file,
        rows=tuple(rows),
        scores=score(rows, tasks, **options),
        baselines={
            name: score(of, {task: tasks[task] for task in tasks if task in by_task(of)}, **options)
            for name, of in others.items()
        },
        calibration={
            name: tuple(_bins(tasks[name], of))
            for name, of in groups.items()
            if tasks[name].answers is not None and all(row.get("likelihoods") for row in of)
        },
        numbers={
            name: tuple((_number(tasks[name].truth(row), tasks[name]), _answer(row, tasks[name])) for row in of)
            for name, of in groups.items()
            if tasks[name].kind == "regression"
        },
        failures=sum(failed for _, failed in order),
        samples=tuple(chosen),
    )


def check_run(run: str | Path) -> None:
    """Raise ConfigError if a path is not the directory of a run."""
    run = Path(run)
    if not (run / CONFIG).is_file() or not (run / MODEL).is_dir():
        problem = "no run" if run.is_dir() else why_not_a_directory(run)
        raise ConfigError(f"{run}: {problem}; expected the --out of umbrella-jax train, with {CONFIG} and {MODEL}/")


def _checkpoints(run: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Steps, the newest first, and what stands beside the newest."""
    if not (run / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{run}: the run has no checkpoint yet; train it first")
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{run}: the run has no checkpoint yet; train it first")
        return tuple(steps), checkpoints.meta(steps[0])


def _evaluation(run: Path, train: TrainConfig, step: Step | None) -> tuple[Path, int, str]:
    """Return the predictions of an evaluation, its step, and why that one."""
    files = predictions_by_step(run)
    if not files:
        raise ConfigError(f"{run / PREDICTIONS}: no predictions; train with data.eval (--eval-data PATH)")
    at, why = choose_step(run, train, files, step)
    return files[at], at, why


def _baselines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    inner = folder / "baseline"
    files = sorted((inner if inner.is_dir() else folder).glob("*.jsonl"))
    if not files:
        problem = "no .jsonl in it" if folder.is_dir() else why_not_a_directory(folder)
        raise ConfigError(f"--baseline {folder}: {problem}; expected the --out of umbrella-jax baseline")
    return {file.stem: read_predictions(file) for file in files}


def _baseline_faults(name: str, rows: Sequence[Row], expected: Sequence[Row]) -> Iterator[str]:
    """Of a task that the run has not, or other conversations than the run's of a task."""
    wanted = {task: Counter(str(row["task_id"]) for row in of) for task, of in by_task(expected).items()}
    for task, of in by_task(rows).items():
        if task not in wanted:
            yield f"--baseline: {name}: task {task}: not one of the run's, {', '.join(wanted)}"
        elif differ := sorted(
            {*(found := Counter(str(row["task_id"]) for row in of)) - wanted[task]} | {*wanted[task] - found}
        ):
            yield f"--baseline: {name}: task {task}: other conversations than the run's: {', '.join(differ[:5])}"


def _inputs(run: Path) -> dict[str, set[str]]:
    """{kind: digests of the files that the run read}."""
    recorded = reading.read_json(run / INPUTS, ConfigError, "a run writes it as it starts", reading.LISTING)
    return {kind: {digest for _, digest in files} for kind, files in recorded.items()}


def _conversations(
    config: RunConfig, model: LlavaConfig, split: str, inputs: Mapping[str, set[str]]
) -> list[Conversation]:
    """As the run read them. Raises DataError where they cannot be read, or are others now."""
    data, path = config.data, Path(getattr(config.data, split))
    if changed := [
        f"data.{split}: {file}: other content than the run read"
        for file in conversation_files(path)
        if reading.sha256(file) not in inputs["conversations"]
    ]:
        raise DataError(changed)
    return read_conversations(
        path,
        model.modalities,
        data.image_root,
        modality=data.modality,
        task_filter=data.task_filter,
        allow_outside_root=data.allow_outside_root,
    )


def _answered(found: list[Conversation] | str, rows: Sequence[Row], file: Path) -> Sequence[Conversation]:
    """The conversation of each row. Raises DataError where they are not to be had, or are others."""
    remedy = "or leave the conversations out (--samples 0)"
    if isinstance(found, str):
        raise DataError(f"{found}; bring it back (relative paths start where the run was started), {remedy}")
    wanted = [str(row["task_id"]) for row in rows]
    if wanted == [c.task_id for c in found]:  # which need not be unique
        return found
    named = {c.task_id: c for c in found}
    if len(named) < len(found) or not named.keys() >= set(wanted):
        raise DataError(f"{file}: answers to other conversations than those of data.eval; name others, {remedy}")
    return [named[name] for name in wanted]


def _check_volumes(samples: Sequence[Sample], inputs: Mapping[str, set[str]]) -> None:
    """Raises DataError naming each volume of the samples that is gone, or not what the run read."""
    faults = []
    for path in dict.fromkeys(image.path for sample in samples for image in sample.conversation.images):
        try:
            if source_digest(path) not in inputs["volumes"]:
                faults.append(f"{path}: other content than the run read; bring it back, or --samples 0")
        except DataError as error:
            faults += [f"{fault}; or leave the conversations out (--samples 0)" for fault in error.faults]
    if faults:
        raise DataError(faults)


def _counts(conversations: list[Conversation] | str) -> dict[str, Any]:
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


def _answer(row: Row, task: Task) -> float | None:
    return parse_number(row["prediction"], task.unit)


def _bins(task: Task, rows: Sequence[Row]) -> Iterator[Bin]:
    shares = probabilities(task, rows)
    confidence, likeliest = shares.max(1), shares.argmax(1)
    right = np.array([task.classes[i] == task.truth(row) for i, row in zip(likeliest, rows, strict=True)])
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    for which in (place == number for number in range(BINS)):
        if which.any():
            yield Bin(int(which.sum()), float(confidence[which].mean()), float(right[which].mean()))


def _order(rows: Sequence[Row], tasks: Mapping[str, Task]) -> list[tuple[int, bool]]:
    """(place of a row, whether it failed): failures first, of all tasks in turn, the worst of each first; then the
    others alike."""
    order: list[tuple[int, bool]] = []
    places: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[task_of(row)].append(i)
    errors = {name: [_error(rows[i], tasks[name]) for i in of] for name, of in sorted(places.items())}
    for failed in (True, False):
        queues = []
        for name, of in errors.items():
            limit = _tolerated(tasks[name], [rows[i] for i in places[name]])
            ranked = sorted(zip(of, places[name], strict=True), key=lambda pair: (-pair[0], pair[1]))
            queues.append([place for error, place in ranked if (error > limit) == failed])
        for turn in range(max(map(len, queues))):
            order += [(queue[turn], failed) for queue in queues if turn < len(queue)]
    return order


def _sample(conversation: Conversation, row: Row, task: Task, failed: bool) -> Sample:
    error = _error(row, task)
    if task.kind == "regression":
        verdict = f"off by {short(error)} {task.unit or ''}".strip() if np.isfinite(error) else "no number"
    else:
        verdict = "wrong" if failed else "correct"  # not "right", which is a side
    return Sample(conversation, row, task_of(row), failed, verdict)


def _error(row: Row, task: Task) -> float:
    """How wrong it is: of numbers the absolute error, else 1 or 0."""
    if task.kind != "regression":
        return float(normalise(row["prediction"]) != task.truth(row))
    answer = _answer(row, task)
    return np.inf if answer is None else abs(answer - _number(task.truth(row), task))


def _tolerated(task: Task, rows: Sequence[Row]) -> float:
    """Above it an answer has failed: of numbers, what always answering the median is off by on average."""
    if task.kind != "regression":
        return 0.0
    truths = np.array([_number(task.truth(row), task) for row in rows])
    return float(np.abs(truths - np.median(truths)).mean())
