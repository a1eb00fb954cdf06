"""The metrics of several predictors on the same questions, in one table."""

from collections.abc import Mapping

from umbrella_jax.console import table_lines
from umbrella_jax.scoring.metrics import Figure, Scores, short
from umbrella_jax.scoring.tasks import NUMBER_METRICS, NUMBER_PARTS

_NUMBER_FIGURES = {*NUMBER_METRICS, *(f"{metric}/{part}" for metric, parts in NUMBER_PARTS.items() for part in parts)}


def side_by_side(scores: Mapping[str, Scores]) -> list[str]:
    """Return lines for a terminal: a block per task, with a row per predictor and a column per figure.

    The last row is chance, which is left out of a column if it differs between predictors, since it depends on their
    answers. `unparsable` is left out if it is 0 for all, and so are metrics of candidate numbers, which no baseline
    has. A predictor without a task has no row there. Figures over all tasks are only of predictors that answer all of
    them.
    """
    tasks = dict(sorted({name: task for s in scores.values() for name, task in s.tasks.items()}.items()))
    lines = list[str]()
    for name, task in tasks.items():
        figures = {title: s.task_figures(name) for title, s in scores.items() if name in s.tasks}
        lines += [*table_lines([f"{name} ({task.title})", *_rows(figures)]), ""]
    overall = {title: s.overall() for title, s in scores.items() if s.tasks.keys() == tasks.keys()}
    if any(overall.values()):
        lines += [*table_lines(["over all tasks", *_rows(overall)]), ""]
    return lines


def _rows(predictors: Mapping[str, Mapping[str, Figure]]) -> list[list[str]]:
    """Return the header, a row for each predictor, and chance. A figure and its interval are one cell."""
    rows = [[""], *([f"  {title}"] for title in predictors), ["  chance"]]
    for name in dict.fromkeys(name for figures in predictors.values() for name in figures):
        figures = [of.get(name) for of in predictors.values()]
        if name in _NUMBER_FIGURES or (name == "unparsable" and not any(f and f.value for f in figures)):
            continue
        intervals = [_interval(figure) for figure in figures]
        chances = {figure.chance for figure in figures if figure}
        values = [short(figure.value if figure else None) for figure in figures]
        column = [name, *values, short(chances.pop()) if len(chances) == 1 else "–"]
        beside = ["95 % interval", *intervals, ""] if any(intervals) else [""] * len(column)
        widths = [max(map(len, cells)) for cells in (column, beside)]
        for row, value, interval in zip(rows, column, beside, strict=True):
            row.append(f"{value:>{widths[0]}}  {interval:>{widths[1]}}" if any(intervals) else value)
    return rows


def _interval(figure: Figure | None) -> str:
    if figure is None or figure.low is None or figure.high is None:
        return ""
    return f"{short(figure.low)} to {short(figure.high)}"
