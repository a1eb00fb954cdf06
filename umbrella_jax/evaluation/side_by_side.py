"""What several predictors reach on the same questions, in one table."""

from collections.abc import Iterator, Mapping

from umbrella_jax.evaluation.metrics import Figure, Scores, short, span

_NAME, _COLUMN, _CHANCE = 21, 17, 8
"""Widths; with three columns a line has 80."""


def side_by_side(scores: Mapping[str, Scores]) -> list[str]:
    """Lines for a terminal: a column for each of the `scores`, its 95 % intervals below its values, and chance.

    Chance is left out where it is not the same of all, since it depends on their answers; `unparsable` where it is 0 of
    all. All are of the same tasks.
    """
    first = next(iter(scores.values()))
    lines = [f"{'':<{_NAME}}" + "".join(f"{name:>{_COLUMN}}" for name in scores) + f"{'chance':>{_CHANCE}}"]
    for name, task in first.tasks.items():
        lines += [f"{name} ({task.kind}, {task.unit})" if task.unit else f"{name} ({task.kind})"]
        lines += [*_lines([found.of(name) for found in scores.values()]), ""]
    if first.overall():
        lines += ["over all tasks", *_lines([found.overall() for found in scores.values()]), ""]
    return lines


def _lines(columns: list[dict[str, Figure]]) -> Iterator[str]:
    for name in dict.fromkeys(name for column in columns for name in column):
        figures = [column.get(name) for column in columns]
        if name == "unparsable" and not any(figure and figure.value for figure in figures):
            continue
        chances = {figure.chance for figure in figures if figure}
        chance = short(chances.pop()) if len(chances) == 1 else "–"
        label = f"  {name}"
        if len(label) > _NAME:
            yield label
            label = ""
        values = "".join(f"{short(figure.value if figure else None):>{_COLUMN}}" for figure in figures)
        yield f"{label:<{_NAME}}{values}{chance:>{_CHANCE}}"
        if any(figure and figure.low is not None for figure in figures):
            intervals = (span(figure, _COLUMN) if figure else "" for figure in figures)
            yield (" " * _NAME + "".join(f"{interval:>{_COLUMN}}" for interval in intervals)).rstrip()
