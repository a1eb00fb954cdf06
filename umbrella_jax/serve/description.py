"""Describe a served model: its training data, the quality of its answers, and its tasks."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.config_json import UMBRELLA_CONFIG, read_checkpoint_json, stored_training
from convert.model_card import TrainingRecord
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.config.schema import DataConfig, ModalityConfig, RunConfig, aliases_of
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
from umbrella_jax.scoring.tasks import Task, headline, task_of, tasks_of, unit_of
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
            "metric": self.metric and {**self.metric, "unit": (task and unit_of(task, self.metric["name"])) or ""},
        }


@dataclass(frozen=True)
class ModelDescription:
    """The recorded facts about a served model."""

    id: str
    step: str | None
    """The step of a run, and why it was chosen."""
    base: str
    trained: tuple[str, ...] | None
    """Groups of parameters that were trained; None if not recorded."""
    subjects: int | str | None
    """Subjects of the training data, of an export perhaps a text such as "about 120"; None if not recorded."""
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
        data: conversations of --data. They are the tasks of an export, which records only measured accuracies. They
            replace those of the run if these cannot be read and the content is the same, for example because the run
            was copied to another machine.

    Raises ConfigError if the configuration of its run is damaged, DataError if the data cannot be read.
    """
    run = checkpoint.runs[-1] if checkpoint.runs and records else None
    tasks, gaps = _tasks_of_run(run, records[-1], data) if run else _tasks_of_export(checkpoint, data)
    facts = _facts_of_run(run, records[-1], gaps) if run else _facts_of_export(checkpoint, gaps)
    return ModelDescription(
        id=checkpoint.name,
        modalities=checkpoint.config.modalities,
        untrained=frozenset(checkpoint.config.untrained),
        tasks=tasks,
        gaps=tuple(gaps),
        **facts,
    )


def _facts_of_run(run: RunCheckpoint, record: TrainingRecord, gaps: list[MissingFact]) -> dict[str, Any]:
    """Return fields of `ModelDescription` about the training of a run; append those that are missing to `gaps`."""
    train = (record.counts or {}).get("train", {})
    if record.counts is None:
        reason = f"{run.path / COUNTS}: not found; copy it from the run, if the run has one"
        gaps.append(MissingFact("the number of subjects and conversations", reason, (run.path,)))
    elif not train.get("subjects"):
        reason = "the run's conversations name no subject; add metadata.subject_id to them for the next run"
        gaps.append(MissingFact("the number of subjects", reason))
    facts = {"base": run.base_name, "step": record.step, "trained": tuple(run.groups)}
    return facts | {key: train.get(key) for key in ("subjects", "conversations")}


def _facts_of_export(checkpoint: Checkpoint, gaps: list[MissingFact]) -> dict[str, Any]:
    """Return the same of an export or a checkpoint made of one."""
    file = checkpoint.description / UMBRELLA_CONFIG
    base = read_checkpoint_json(file).get("base") if file.exists() else None
    facts = stored_training(checkpoint.description)
    if not facts and file.exists():
        reason = f"{file}: records no `training`; export the run again, or serve the run itself"
        gaps.append(MissingFact("what was trained, on how many subjects, and the measured accuracies", reason, (file,)))
    elif facts and not facts["tasks"]:
        reason = "the run was not evaluated, or on too few subjects to state its accuracies"
        gaps.append(MissingFact("measured accuracies", reason))
    trained = tuple(facts["trained"]) if facts else None if file.exists() else ()
    known = {key: facts.get(key) for key in ("step", "subjects", "conversations")}
    return {"base": base or checkpoint.base_name, "trained": trained, **known}


class _Asked:
    """What conversations ask in each task."""

    def __init__(self, conversations: Sequence[Conversation]):
        self.rows: Sequence[Mapping[str, Any]] = blank_rows(conversations)
        self.wordings = defaultdict[str, Counter[str]](Counter)
        self.examples = dict[str, Conversation]()
        """{task: a conversation without its last answer}."""
        self._shapes = defaultdict[str, set[tuple[int, int]]](set)
        for row, conversation in zip(self.rows, conversations, strict=True):
            asked = [message.text.strip() for message in conversation.messages if message.role == "user"]
            if asked and conversation.messages[-1].role == "assistant":
                task = task_of(row)
                self.wordings[task][asked[-1]] += 1
                self._shapes[task].add((len(asked), len(conversation.images)))
                blank = (*conversation.messages[:-1], Message("assistant", ("",)))
                self.examples.setdefault(task, replace(conversation, messages=blank))

    def served(
        self, tasks: Mapping[str, Task], metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    ) -> tuple[ServedTask, ...]:
        """Return the tasks that are in `tasks`, in the conversations or in `metrics`, {task: {metric: its figures}}."""
        served = list[ServedTask]()
        for name in dict.fromkeys([*tasks, *self.examples, *metrics]):
            wordings, shapes, figures = self.wordings[name], self._shapes[name], metrics.get(name, {})
            main = headline(list(figures)) if figures else None
            served.append(
                ServedTask(
                    name,
                    tasks.get(name),
                    questions=tuple(text for text, _ in wordings.most_common(_QUESTIONS)),
                    more_questions=max(len(wordings) - _QUESTIONS, 0),
                    metric=None if main is None else {"name": main, **figures[main]},
                    example=self.examples.get(name),
                    shape=next(iter(shapes)) if len(shapes) == 1 else None,
                )
            )
        return tuple(served)


def _tasks_of_run(
    run: RunCheckpoint, record: TrainingRecord, data: str | Path | None
) -> tuple[tuple[ServedTask, ...], list[MissingFact]]:
    """Return the tasks of a run's conversations and predictions, and what is missing of them."""
    config = load_run_config(run.path)
    conversations, gaps = _conversations(run, config, data)
    asked, tasks = _Asked(conversations), dict[str, Task]()
    try:
        file = predictions_by_step(run.path).get(run.step or 0)
        if rows := read_predictions(file) if file else asked.rows:
            tasks = tasks_of(rows, config.evaluation.tasks)
    except UmbrellaError as error:
        gaps.append(MissingFact("answers to compare of the tasks", _first_fault(error), (run.path,)))
    if record.why_no_metrics:
        gaps.append(MissingFact("measured accuracies", record.why_no_metrics.split("\n")[0], (run.path,)))
    metrics = defaultdict[str, dict[str, dict[str, Any]]](dict)
    for figure in record.metrics or ():
        interval = None if figure.low is None else [figure.low, figure.high]
        own = {"value": figure.value, "interval": interval, "chance": figure.chance, "n": figure.answers}
        metrics[figure.task][figure.metric] = own
    return asked.served(tasks, metrics), gaps


def _tasks_of_export(
    checkpoint: Checkpoint, data: str | Path | None
) -> tuple[tuple[ServedTask, ...], list[MissingFact]]:
    """Return the tasks that an export was evaluated on and those of --data, and what is missing of them."""
    stored = stored_training(checkpoint.description).get("tasks", {})
    metrics = defaultdict[str, dict[str, dict[str, Any]]](dict)
    for task, figures in stored.items():
        for name, own in figures.items():
            shown = {key: own[key] for key in ("value", "interval", "chance")}
            metrics[task][name] = shown | {"n": own["answers"]}
    if data is None:
        remedy = "name conversations of its tasks with --data, or serve the run itself"
        reason = f"an export does not record them; {remedy}"
        return _Asked(()).served({}, metrics), [MissingFact("the tasks' questions and answers", reason)]
    asked = _Asked(read_with_config(data, checkpoint.config.modalities, DataConfig(allow_outside_root=True)))
    try:
        return asked.served(tasks_of(asked.rows, {}), metrics), []
    except UmbrellaError as error:
        gap = MissingFact("answers to compare of the tasks", _first_fault(error), (Path(data),))
        return asked.served({}, metrics), [gap]


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
