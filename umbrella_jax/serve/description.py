"""Describe a served model: its training data, the quality of its answers, and its tasks."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.config_json import UMBRELLA_CONFIG, stored_training
from convert.model_card import TrainingRecord
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.config.schema import ModalityConfig, RunConfig, aliases_of
from umbrella_jax.data.conversation import (
    Conversation,
    Image,
    Message,
    conversation_files,
    read_with_config,
)
from umbrella_jax.data.inputs import load_stored_inputs
from umbrella_jax.errors import UmbrellaError
from umbrella_jax.io.reading import sha256
from umbrella_jax.rundir import COUNTS, INPUTS, load_run_config, predictions_by_step
from umbrella_jax.scoring.metrics import read_predictions
from umbrella_jax.scoring.rows import blank_rows
from umbrella_jax.scoring.tasks import Task, headline, task_of, tasks_of
from umbrella_jax.serve.engine import Question

NOTICE = (
    "Not a medical device. For research only: no diagnosis, treatment, screening or other decision about a person. The "
    "model answers every question, also one that it was never trained on; such an answer means nothing."
)
_QUESTIONS = 20
"""Questions that are listed for a task."""


@dataclass(frozen=True)
class MissingFact:
    """A part of the description that is missing."""

    effect: str
    """What the page lacks."""
    reason: str
    """Why, with the file and the remedy."""
    paths: tuple[Path, ...] = ()
    """Paths in `reason`, of which the page shows only the names."""

    def to_json(self) -> dict[str, str]:
        """Return the fields for a page."""
        reason = self.reason
        for path in self.paths:
            reason = reason.replace(str(path), path.name)
        return {"effect": self.effect, "reason": reason}


@dataclass(frozen=True)
class ServedTask:
    """A task that the model was trained or evaluated on."""

    name: str
    task: Task | None = None
    """How its answers are scored; None if that is not known."""
    questions: tuple[str, ...] = ()
    """The most frequent wordings."""
    more_questions: int = 0
    """Number of further wordings."""
    metric: Mapping[str, Any] | None = None
    """`name`, `value`, `interval`, `chance` and `n` of its main metric."""
    example: Conversation | None = None
    """A conversation of the task, without its last answer."""
    shape: tuple[int, int] | None = None
    """Number of questions, and of scans, of a conversation; None if they differ or are not known."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields for a page."""
        task, numbers = self.task, None
        if task is not None and task.numbers is not None:
            low, second, *_ = [*task.numbers.values, None]
            step = None if second is None else second - low
            numbers = {"low": low, "high": task.numbers.values[-1], "step": step, "unit": task.unit}
        return {
            "name": self.name,
            "questions": self.questions,
            "more_questions": self.more_questions,
            "turns": self.shape and self.shape[0],
            "scans": self.shape and self.shape[1],
            "kind": None if task is None else task.kind,
            "answers": None if task is None else task.answers,
            "numbers": numbers,
            "metric": self.metric,
        }


@dataclass(frozen=True)
class ModelDescription:
    """The recorded facts about a served model."""

    id: str
    step: str | None
    """The step of the run, and why it was chosen."""
    base: str
    trained: tuple[str, ...]
    """Groups of parameters that were trained, or components of an export."""
    subjects: int | str | None
    """Subjects of the training data; a text of an export that rounds it, None if not recorded."""
    conversations: int | str | None
    modalities: Mapping[str, ModalityConfig]
    untrained: frozenset[str]
    """Modalities that the model may not answer about."""
    tasks: tuple[ServedTask, ...]
    gaps: tuple[MissingFact, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the answer to GET /api/model."""
        return {
            "id": self.id,
            "version": version("umbrella-jax"),
            "step": self.step,
            "base": self.base,
            "trained": self.trained,
            "subjects": self.subjects,
            "conversations": self.conversations,
            "modalities": [
                {
                    "name": name,
                    "aliases": aliases_of(name, self.modalities),
                    "size": config.size,
                    "patch": config.patch,
                    "ndim": len(config.size),
                    "orientation": config.orientation,
                    "trained": name not in self.untrained,
                }
                for name, config in self.modalities.items()
            ],
            "tasks": [task.to_json() for task in self.tasks],
            "gaps": [gap.to_json() for gap in self.gaps],
            "notice": NOTICE,
        }

    def warm_up(self) -> list[Question]:
        """Return a question for each task, and for each trained modality that these do not show."""
        questions, left = list[Question](), self.modalities.keys() - self.untrained
        for own in self.tasks:
            if own.example is not None:
                answers, numbers = (own.task.answers or (), own.task.numbers) if own.task else ((), None)
                questions.append(Question(own.example, answers=answers, numbers=numbers))
                left -= {image.modality for image in own.example.images}
        for name in sorted(left):
            asked = Message("user", (Image(Path("scan"), name), "What does it show?"))
            messages = asked, Message("assistant", ("",))
            questions.append(Question(Conversation("warm-up", None, messages, {}, "warm-up")))
        return questions


def describe_model(
    checkpoint: Checkpoint, records: Sequence[TrainingRecord], data: str | Path | None = None
) -> ModelDescription:
    """Return the recorded facts about a checkpoint, and which are missing (`ModelDescription.gaps`).

    Args:
        checkpoint: opened to answer (`Checkpoint.answering`), or with untrained parts allowed.
        records: of its runs, as `read_training_records` returns them.
        data: conversations of --data. They replace those of the run if these cannot be read and the content is the
            same, for example because the run was copied to another machine.

    Raises ConfigError if the configuration of its run, or the description of an export, is damaged.
    """
    run = checkpoint.runs[-1] if checkpoint.runs and records else None
    counts = records[-1].counts if run else None
    if run:
        tasks, gaps = _tasks_of_run(run, records[-1], data)
        if counts is None:
            reason = f"{run.path / COUNTS}: not found; copy it from the run, if the run has one"
            gaps.append(MissingFact("the number of subjects and conversations", reason, (run.path,)))
        elif not counts.get("train", {}).get("subjects"):
            reason = "the run's conversations name no subject; add metadata.subject_id to them for the next run"
            gaps.append(MissingFact("the number of subjects", reason))
        stated = {"step": records[-1].step, "trained": run.groups, **(counts or {}).get("train", {})}
    else:
        stated = stored_training(checkpoint.description)
        tasks, gaps = _tasks_of_export(stated, checkpoint.description / UMBRELLA_CONFIG)
    return ModelDescription(
        id=checkpoint.name,
        step=stated.get("step"),
        base=checkpoint.base_name,
        trained=tuple(stated.get("trained", ())),
        subjects=stated.get("subjects"),
        conversations=stated.get("conversations"),
        modalities=checkpoint.config.modalities,
        untrained=frozenset(checkpoint.config.untrained),
        tasks=tasks,
        gaps=tuple(gaps),
    )


def _tasks_of_run(
    run: RunCheckpoint, record: TrainingRecord, data: str | Path | None
) -> tuple[tuple[ServedTask, ...], list[MissingFact]]:
    """Return the tasks of a run's conversations and predictions, and what is missing of them."""
    config = load_run_config(run.path)
    conversations, gaps = _conversations(run, config, data)
    rows: Sequence[Mapping[str, Any]] = blank_rows(conversations)
    wordings, examples = defaultdict[str, Counter[str]](Counter), dict[str, Conversation]()
    shapes = defaultdict[str, set[tuple[int, int]]](set)
    for row, conversation in zip(rows, conversations, strict=True):
        asked = [message.text.strip() for message in conversation.messages if message.role == "user"]
        if asked and conversation.messages[-1].role == "assistant":
            wordings[task_of(row)][asked[-1]] += 1
            shapes[task_of(row)].add((len(asked), len(conversation.images)))
            blank = (*conversation.messages[:-1], Message("assistant", ("",)))
            examples.setdefault(task_of(row), replace(conversation, messages=blank))
    tasks = dict[str, Task]()
    try:
        if file := predictions_by_step(run.path).get(run.step or 0):
            rows = read_predictions(file)
        if rows:
            tasks = tasks_of(rows, config.evaluation.tasks)
    except UmbrellaError as error:
        gaps.append(MissingFact("answers to compare of the tasks", _first_fault(error), (run.path,)))
    if record.why_no_metrics:
        gaps.append(MissingFact("measured accuracies", record.why_no_metrics.split("\n")[0], (run.path,)))
    figures = defaultdict[str, dict[str, Any]](dict)
    for figure in record.metrics or ():
        interval = None if figure.low is None else [figure.low, figure.high]
        own = {"name": figure.metric, "value": figure.value, "interval": interval}
        figures[figure.task][figure.metric] = own | {"chance": figure.chance, "n": figure.answers}
    return tuple(
        ServedTask(
            name,
            tasks.get(name),
            tuple(text for text, _ in wordings[name].most_common(_QUESTIONS)),
            max(len(wordings[name]) - _QUESTIONS, 0),
            figures[name][headline(list(figures[name]))] if figures[name] else None,
            examples.get(name),
            next(iter(shapes[name])) if len(shapes[name]) == 1 else None,
        )
        for name in dict.fromkeys([*tasks, *examples])  # predictions may cover only a part (train.eval_samples)
    ), gaps


def _conversations(
    run: RunCheckpoint, config: RunConfig, data: str | Path | None
) -> tuple[Sequence[Conversation], list[MissingFact]]:
    """Return the evaluation data of a run or else its training data, as the run read them, and what is missing."""
    questions = "the tasks' questions"
    recorded = {"data.eval": config.data.eval, "--data": data, "data.train": config.data.train}
    named = {name: Path(path) for name, path in recorded.items() if path is not None}
    paths = (run.path, *named.values())
    without_scans = replace(config.data, image_root=None, allow_outside_root=True)  # which are not read here
    try:
        known = {digest for _, digest in load_stored_inputs(run.path / INPUTS, "copy it from the run")["conversations"]}
    except UmbrellaError as error:
        return (), [MissingFact(questions, _first_fault(error), paths)]
    reasons = list[str]()
    for name, path in named.items():
        try:
            if changed := [file for file in conversation_files(path) if sha256(file) not in known]:
                if name != "--data":  # which may be any other conversations
                    reasons.append(f"{name} of the run: {changed[0]}: has changed since")
                continue
            conversations = read_with_config(path, run.config.modalities, without_scans)
        except UmbrellaError as error:
            reasons.append(f"{name} of the run: {_first_fault(error)}")
            continue
        if not reasons or name == "--data":
            return conversations, []
        reason = f"{'; '.join(reasons)}; bring it back, or name a copy with --data"
        return conversations, [
            MissingFact(f"{questions} in the evaluation data; those of data.train are shown", reason, paths)
        ]
    return (), [MissingFact(questions, f"{'; '.join(reasons)}; bring one back, or name a copy with --data", paths)]


def _first_fault(error: UmbrellaError) -> str:
    more = len(error.faults) - 1
    return error.faults[0] + (f" (and {more} more)" if more else "")


def _tasks_of_export(stated: Mapping[str, Any], file: Path) -> tuple[tuple[ServedTask, ...], list[MissingFact]]:
    """Return the tasks of an export by what its description states about training, and what it lacks."""
    remedy = "serve the run itself to have them"
    gaps = [MissingFact("the tasks' questions and answers", f"an export does not contain them; {remedy}")]
    if not stated:
        reason = f"{file}: states nothing about training; {remedy}"
        gaps.append(MissingFact("measured accuracies, and the number of subjects", reason, (file.parent,)))
    elif not stated["tasks"]:
        reason = f"{file}: states none, because the run had none or too few subjects; {remedy}"
        gaps.append(MissingFact("measured accuracies", reason, (file.parent,)))
    tasks = list[ServedTask]()
    for name, figures in stated.get("tasks", {}).items():
        metric = headline(list(figures))
        figure = dict(figures[metric])
        tasks.append(ServedTask(name, metric={"name": metric, "n": figure.pop("answers"), **figure}))
    return tuple(tasks), gaps
