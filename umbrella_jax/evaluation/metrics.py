"""How right answers are."""

from collections import defaultdict
from collections.abc import Iterable, Mapping


def normalise(answer: str) -> str:
    """An answer without case, surrounding white space and final full stop."""
    return answer.strip().casefold().removesuffix(".").strip()


def accuracy(predictions: Iterable[Mapping[str, str | None]]) -> dict[str, float]:
    """Share of predictions equal to their reference after `normalise`, over all and per task.

    Every prediction counts: one that says nothing sensible is wrong. Keys: `accuracy`, `accuracy/<task_type>`.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for row in predictions:
        correct = normalise(row["prediction"] or "") == normalise(row["reference"] or "")
        right["accuracy"].append(correct)
        if row["task_type"]:
            right[f"accuracy/{row['task_type']}"].append(correct)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}
