"""Check the values of a column as answers, and spell them as numbers or labels."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal

from umbrella_jax.config.schema import MAX_CLASSES, TaskKind
from umbrella_jax.data.tables import parse_cell_number


def infer_kind(values: Collection[str]) -> TaskKind:
    """Return regression for more than MAX_CLASSES distinct values that are all numbers, else classification."""
    numbers = all(parse_cell_number(value) is not None for value in values)
    return "regression" if numbers and len(set(values)) > MAX_CLASSES else "classification"


def kind_faults(
    place: str,
    kind: str | None,
    values: Collection[str],
    *,
    words: Sequence[str],
    described: Collection[str],
    mixed_remedy: str,
) -> list[str]:
    """Return faults of values that do not suit a kind of question.

    Args:
        place: of the column, in messages.
        kind: of the question; None if it is to be inferred.
        values: the distinct values.
        words: values that are not numbers, each as `value (where)`.
        described: values that have a text as their label.
        mixed_remedy: what to do about many values that are partly numbers, partly words.
    """
    many = len(values) > MAX_CLASSES
    numbers = any(parse_cell_number(value) is not None for value in values)
    commas = [word for word in words if re.match(r"[+-]?\d+(,\d+)+(\.\d+)?( |$)", word)]
    if commas and kind in (None, "regression") and not {*described} & {*values}:
        return [
            f"{place}: numbers with a comma: {', '.join(commas[:5])} ({len(commas)}); write a decimal point and no "
            "thousands separator"
        ]
    if kind is None and many and words and numbers:
        return [f"{place}: numbers and words mixed; {mixed_remedy}"]
    if kind == "regression":
        return [f"{place}: expected a number or n/a, got {word}" for word in words]
    if kind == "comparison" and many and not words:
        return [
            f"{place}: {len(values)} distinct numbers, so hardly any two subjects have the same label; "
            "compare a column with few labels, such as groups of these numbers"
        ]
    return []


def alike_labels(labels: Iterable[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Find labels that may be one and the same.

    Returns:
        Groups of labels that differ only in case, spaces or the spelling of a number; and groups in which one label is
        the initial of another.
    """
    variants: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        number = parse_cell_number(label)
        key = " ".join(label.casefold().split()) if number is None else str(Decimal(label).normalize())
        variants[key].append(label)
    same = [group for group in variants.values() if len(group) > 1]
    initials = [label for label in variants if len(label) == 1 and label.isalpha()]
    pairs = [(i, other) for i in initials for other in variants if other.startswith(i) and other != i]
    return same, [[*variants[label], *variants[other]] for label, other in pairs]


def plain_number(cell: str) -> int | float:
    """Return the number in a cell, whole if it is written so."""
    return int(cell) if cell.lstrip("+-").isdigit() else float(cell)
