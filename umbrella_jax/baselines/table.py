"""The metrics of several predictors on the same questions, in one table."""

from collections.abc import Iterator, Mapping, Sequence

from umbrella_jax.console import table_lines
from umbrella_jax.scoring.metrics import Figure, Scores, short, span

_NAME, _COLUMN, _CHANCE = 21, 17, 8
"""Least widths; with three predictors a line has 80 columns."""


def side_by_side(scores: Mapping[str, Scores]) -> list[str]:
    """Return lines for a terminal: a column per predictor, 95 % intervals below the values, and chance.

    Chance is left out if it differs between predictors, since it depends on their answers; `unparsable` if it is 0 for
    all. All `scores` have the same tasks.
    """
    first = next(iter(scores.values()))
    rows: list[str | tuple[str, ...]] = [("", *scores, "chance")]
    for name, task in first.tasks.items():
        rows += [f"{name} ({task.title})"]
        rows += [*_rows([s.task_figures(name) for s in scores.values()]), ""]
    if first.overall():
        rows += ["over all tasks", *_rows([s.overall() for s in scores.values()]), ""]
    return table_lines(rows, (_NAME, *[_COLUMN] * len(scores), _CHANCE))


def _rows(columns: Sequence[Mapping[str, Figure]]) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys(name for column in columns for name in column):
        figures = [column.get(name) for column in columns]
        if name == "unparsable" and not any(figure and figure.value for figure in figures):
            continue
        chances = {figure.chance for figure in figures if figure}
        chance = short(chances.pop()) if len(chances) == 1 else "–"
        yield (f"  {name}", *(short(figure.value if figure else None) for figure in figures), chance)
        if any(figure and figure.low is not None for figure in figures):
            yield ("", *(span(figure, _COLUMN) if figure else "" for figure in figures), "")
