"""Count the conversations, subjects and answers of a data set, for the record that a run keeps of its data."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from umbrella_jax.config.schema import TaskConfig
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.errors import UmbrellaError
from umbrella_jax.scoring.parse_answer import parse_number
from umbrella_jax.scoring.rows import Row, blank_rows
from umbrella_jax.scoring.tasks import Task, label_of, task_of, tasks_of


def count_conversations(
    conversations: Sequence[Conversation], configured: Mapping[str, TaskConfig] | None = None
) -> dict[str, Any]:
    """Return numbers about a data set, without any name or id.

    Args:
        configured: `evaluation.tasks` of the config; other tasks are inferred (`tasks_of`).

    Returns:
        `conversations`; `subjects`, None if a conversation shows a scan and names no subject; `volumes`, {modality:
        number of distinct volumes}; and `tasks`, {task: its `kind`, `conversations` and `subjects`; for a closed set
        `answers`, {answer: number of subjects, or of conversations if `subjects` is None}; for numbers their `mean`,
        `sd` and `unit`}. A task without references has the kind `text`.
    """
    volumes: dict[str, set[Any]] = defaultdict(set)
    groups: dict[str, list[tuple[Conversation, Row]]] = defaultdict(list)
    for conversation, row in zip(conversations, blank_rows(conversations), strict=True):
        groups[task_of(row)].append((conversation, row))
        for image in conversation.images:
            volumes[image.modality].add(image.path)
    return {
        "conversations": len(conversations),
        "subjects": _num_subjects(conversations),
        "volumes": {modality: len(paths) for modality, paths in sorted(volumes.items())},
        "tasks": {name: _count_task(name, members, configured or {}) for name, members in sorted(groups.items())},
    }


def _num_subjects(conversations: Sequence[Conversation]) -> int | None:
    if any(conversation.images and not conversation.subjects for conversation in conversations):
        return None
    return len({subject for conversation in conversations for subject in conversation.subjects})


def _count_task(
    name: str, members: Sequence[tuple[Conversation, Row]], configured: Mapping[str, TaskConfig]
) -> dict[str, Any]:
    subjects = _num_subjects([conversation for conversation, _ in members])
    counts: dict[str, Any] = {"kind": "text", "conversations": len(members), "subjects": subjects}
    try:
        task = tasks_of([row for _, row in members], {name: configured[name]} if name in configured else None)[name]
    except UmbrellaError:  # only evaluation data need references, and they have been checked
        return counts
    counts["kind"] = task.kind
    if task.kind == "regression":
        numbers = [_number(task, row) for _, row in members]
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return counts | {"mean": statistics.fmean(numbers), "sd": spread, "unit": task.unit}
    if task.answers is None:
        return counts
    people: dict[str, set[Any]] = {answer: set() for answer in task.classes}
    for place, (_, row) in enumerate(members):
        people[task.truth(row)].add(place if subjects is None else str(label_of(row, "subject_id") or place))
    return counts | {"answers": {answer: len(ids) for answer, ids in people.items()}}


def _number(task: Task, row: Row) -> float:
    value = parse_number(task.truth(row), task.unit)
    assert value is not None  # `tasks_of` refuses such references
    return value
