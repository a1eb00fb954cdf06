"""How right answers are."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def normalise(answer: str) -> str:
    """An answer without case, surrounding white space and final full stop."""
    return answer.strip().casefold().removesuffix(".").strip()


def task_of(row: Mapping[str, Any]) -> str:
    """The task that a prediction belongs to: `metadata.task`, or where there is none its `task_type`."""
    return str((row.get("metadata") or {}).get("task") or row.get("task_type") or "unnamed")


def accuracy(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of predictions equal to their reference after `normalise`, over all and per task.

    Every row counts: an answer that says nothing sensible is wrong. Keys: `accuracy`, `accuracy/<task>`.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        correct = normalise(row["prediction"]) == normalise(row["reference"])
        right["accuracy"].append(correct)
        right[f"accuracy/{task_of(row)}"].append(correct)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}
