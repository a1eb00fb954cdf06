"""Describe a served model: its training data, the quality of its answers, and its tasks."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from convert.export_config import CARD
from convert.model_card import TrainingRecord
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.config.load import load_stored_config
from umbrella_jax.config.schema import ModalityConfig, RunConfig, aliases_of
from umbrella_jax.data.conversation import Conversation, Image, Message, read_with_config
from umbrella_jax.errors import UmbrellaError
from umbrella_jax.io.reading import parse_yaml
from umbrella_jax.rundir import CONFIG, predictions_by_step
from umbrella_jax.scoring.metrics import read_predictions
from umbrella_jax.scoring.rows import blank_rows
from umbrella_jax.scoring.tasks import Task, headline, task_of, tasks_of
from umbrella_jax.serve.engine import Question

NOTICE = (
    "Not a medical device. For research only: no diagnosis, treatment, screening or other decision about a person. The "
    "model answers every question, also one that it was never trained on; such an answer means nothing."
)
_READ = 20_000
"""Conversations that are searched for the questions of tasks."""
_QUESTIONS = 5
"""Questions that are listed for a task."""


@dataclass(frozen=True)
class ServedTask:
    """A task that the model was trained or evaluated on."""

    name: str
    task: Task | None = None
    """How its answers are scored; None if that is not known."""
    questions: tuple[str, ...] = ()
    """The most frequent wordings."""
    metric: Mapping[str, Any] | None = None
    """`name`, `value`, `interval`, `chance` and `n` of its main metric."""
    example: Conversation | None = None
    """A conversation of the task, without its last answer."""

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
            "kind": None if task is None else task.kind,
            "answers": None if task is None else task.answers,
            "numbers": numbers,
            "metric": self.metric,
        }


@dataclass(frozen=True)
class ModelDescription:
    """The recorded facts about a served model."""

    id: str
    base: str
    trained: tuple[str, ...]
    """Groups of parameters that were trained."""
    subjects: int | None
    """Subjects of the training data; None if not recorded."""
    conversations: int | None
    modalities: Mapping[str, ModalityConfig]
    untrained: frozenset[str]
    """Modalities that the model may not answer about."""
    tasks: tuple[ServedTask, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the answer to GET /api/model."""
        return {
            "id": self.id,
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


def describe_model(checkpoint: Checkpoint, records: Sequence[TrainingRecord]) -> ModelDescription:
    """Return the recorded facts about a checkpoint.

    Args:
        checkpoint: opened to answer (`Checkpoint.answering`), or with untrained parts allowed.
        records: of its runs, as `read_training_records` returns them.

    Raises ConfigError if the configuration of its run is damaged.
    """
    counts = (records[-1].counts or {}).get("train", {}) if records else {}
    run = checkpoint.runs[-1] if checkpoint.runs else None
    return ModelDescription(
        id=checkpoint.name,
        base=checkpoint.base_name,
        trained=tuple(run.groups) if run else (),
        subjects=counts.get("subjects"),
        conversations=counts.get("conversations"),
        modalities=checkpoint.config.modalities,
        untrained=frozenset(checkpoint.config.untrained),
        tasks=_tasks_of_run(run, records[-1]) if run and records else _tasks_of_card(checkpoint.description / CARD),
    )


def _tasks_of_run(run: RunCheckpoint, record: TrainingRecord) -> tuple[ServedTask, ...]:
    """Return the tasks of a run's predictions or, without any, of its data if that can still be read."""
    config = load_stored_config(run.path / CONFIG)
    conversations = list(islice(_conversations(config), _READ))
    rows: Iterable[Mapping[str, Any]] = blank_rows(conversations)
    wordings, examples = defaultdict[str, Counter[str]](Counter), dict[str, Conversation]()
    for row, conversation in zip(rows, conversations, strict=True):
        asked = [message.text.strip() for message in conversation.messages if message.role == "user"]
        if asked and conversation.messages[-1].role == "assistant":
            wordings[task_of(row)][asked[-1]] += 1
            blank = (*conversation.messages[:-1], Message("assistant", ("",)))
            examples.setdefault(task_of(row), replace(conversation, messages=blank))
    tasks = dict[str, Task]()
    try:
        if file := predictions_by_step(run.path).get(run.step or 0):
            rows = read_predictions(file)
        tasks = tasks_of(rows, config.evaluation.tasks)
    except UmbrellaError:  # `umbrella-jax score` reports it; the model can answer all the same
        pass
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
            figures[name][headline(list(figures[name]))] if figures[name] else None,
            examples.get(name),
        )
        for name in tasks or examples
    )


def _conversations(config: RunConfig) -> Iterable[Conversation]:
    """Return the evaluation data of a run, or its training data; nothing if they cannot be read any more."""
    for path in (config.data.eval, config.data.train):
        if path is not None:
            try:
                return read_with_config(path, config.model.modalities or {}, config.data)
            except UmbrellaError:
                continue
    return ()


def _tasks_of_card(card: Path) -> tuple[ServedTask, ...]:
    """Return the tasks with metrics in the model card of an export."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    figures = defaultdict[str, dict[str, Any]](dict)
    try:
        for result in parse_yaml(front[1], str(card))["model-index"][0]["results"] if front else ():
            name = str(result["dataset"]["name"]).removesuffix(", data of the run")
            for metric in result["metrics"]:
                own = {"name": metric["type"], "value": float(metric["value"])}
                figures[name][metric["type"]] = own | {"interval": None, "chance": None, "n": None}
    except (UmbrellaError, LookupError, TypeError, ValueError):  # somebody else's card
        return ()
    return tuple(ServedTask(name, metric=own[headline(list(own))]) for name, own in figures.items())
