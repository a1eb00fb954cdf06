"""List all answers of a run in a table to sort and filter: by subject, task, right or wrong, confidence and group."""

from collections.abc import Callable
from typing import Any

from umbrella_jax.html.tables import DataTable, TableCell, TableColumn
from umbrella_jax.report.facts import Facts
from umbrella_jax.scoring.bootstrap import subject_of
from umbrella_jax.scoring.metrics import Prediction, answer_probabilities, parse_number, task_of

MOST_ROWS = 10_000
"""Rows of the table; the worst answers come first, and the caption states how many there are."""
_MOST_GROUPS = 12
"""Different values up to which a column of `metadata` is a group to filter by."""
_LONGEST_TEXT = 120
"""Characters of an answer."""


def answer_table(facts: Facts) -> DataTable:
    """Return a row for each answer, the worst first; those that the page shows in full are links."""
    columns: dict[str, tuple[Any, Callable[[Prediction, bool, str], Any]]] = {
        "conversation": ("text", lambda row, _, link: TableCell(str(row["task_id"]), link=link)),
        "subject": ("name", lambda row, *_: subject_of(row)[1]),
        "task": ("choice", lambda row, *_: task_of(row)),
        "result": ("choice", lambda _, failed, __: _result(failed)),
        "expected": ("text", lambda row, *_: _shorten(row["reference"].strip() or _task(facts, row).truth(row))),
        "answered": ("text", lambda row, *_: _shorten(row["prediction"])),
    }
    if any(task.kind == "regression" for task in facts.scores.tasks.values()):
        columns["error"] = ("range", lambda row, *_: _error(facts, row))
    if any(_confidence(facts, row) is not None for row in facts.rows):
        columns["probability"] = ("range", lambda row, *_: _confidence(facts, row))
    for name in _group_columns(facts):
        columns[name] = ("choice", lambda row, *_, name=name: _label(row, name))
    shown = {id(sample.row): f"sample-{number}" for number, sample in enumerate(facts.samples, 1)}
    rows = [
        [cell(facts.rows[i], failed, shown.get(id(facts.rows[i]), "")) for _, cell in columns.values()]
        for i, failed in facts.order[:MOST_ROWS]
    ]
    count = f"{len(facts.rows):,} answers" if len(rows) == len(facts.rows) else f"{len(rows):,} of {len(facts.rows):,}"
    headings = [TableColumn(name, kind) for name, (kind, _) in columns.items()]
    return DataTable("answers-of-all", f"{count}, the worst first", headings, rows)


def _result(failed: bool) -> TableCell:
    return TableCell("wrong", severity="bad") if failed else TableCell("correct")


def _task(facts: Facts, row: Prediction) -> Any:
    return facts.scores.tasks[task_of(row)]


def _confidence(facts: Facts, row: Prediction) -> float | None:
    """Return the probability of the likeliest answer; None without likelihoods of all answers."""
    task = _task(facts, row)
    if task_of(row) not in facts.calibration:
        return None
    return float(answer_probabilities(task, [row]).max())


def _error(facts: Facts, row: Prediction) -> float | None:
    task = _task(facts, row)
    if task.kind != "regression":
        return None
    answer, truth = parse_number(row["prediction"], task.unit), parse_number(task.truth(row), task.unit)
    return None if answer is None or truth is None else abs(answer - truth)


def _group_columns(facts: Facts) -> list[str]:
    """Return the columns of `--by`, or else those of `metadata` that have a few values."""
    if facts.groups is not None:
        return [name for name in facts.groups.columns if "*" not in name]
    values: dict[str, set[str]] = {}
    for row in facts.rows:
        for name in row.get("metadata") or {}:
            values.setdefault(name, set()).add(_label(row, name))
    taken = ("task", "subject_id", "subject_label", "task_id")
    return [name for name, own in values.items() if name not in taken and 2 <= len(own) <= _MOST_GROUPS]


def _label(row: Prediction, name: str) -> str:
    value = (row.get("metadata") or {}).get(name)
    return "" if value is None else str(value)


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
