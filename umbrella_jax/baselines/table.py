"""The metrics of several predictors on the same questions, in one table."""

from collections.abc import Iterator, Mapping

from umbrella_jax.console import table_lines
from umbrella_jax.scoring.metrics import Figure, Scores, short

_INTERVAL = "95 % interval"


def side_by_side(scores: Mapping[str, Scores]) -> list[str]:
    """Return lines for a terminal: a block per task, with a row per predictor and a column per figure.

    The last row is chance, which is left out of a column if it differs between predictors, since it depends on their
    answers. `unparsable` is left out if it is 0 for all. A predictor without a task has no row there. Figures over all
    tasks are only of predictors that answer all of them.
    """
    tasks = dict(sorted((name, task) for s in scores.values() for name, task in s.tasks.items()))
    lines = list[str]()
    for name, task in tasks.items():
        figures = {title: s.task_figures(name) for title, s in scores.items() if name in s.tasks}
        lines += [*table_lines([f"{name} ({task.title})", *_rows(figures)]), ""]
    overall = {title: s.overall() for title, s in scores.items() if s.tasks.keys() == tasks.keys()}
    if any(overall.values()):
        lines += [*table_lines(["over all tasks", *_rows(overall)]), ""]
    return lines


def _rows(predictors: Mapping[str, Mapping[str, Figure]]) -> Iterator[tuple[str, ...]]:
    """Yield the header, a row for each predictor, and chance."""
    header, chance = [""], ["  chance"]
    cells = {title: [f"  {title}"] for title in predictors}
    for name in dict.fromkeys(name for figures in predictors.values() for name in figures):
        column = {title: figures.get(name) for title, figures in predictors.items()}
        if name == "unparsable" and not any(figure and figure.value for figure in column.values()):
            continue
        with_interval = any(figure and figure.low is not None for figure in column.values())
        header += [name, *([_INTERVAL] if with_interval else [])]
        for title, figure in column.items():
            cells[title].append(short(figure.value if figure else None))
            if with_interval:
                known = figure is not None and figure.low is not None and figure.high is not None
                cells[title].append(f"{short(figure.low)} to {short(figure.high)}" if figure and known else "")
        chances = {figure.chance for figure in column.values() if figure}
        chance += [short(chances.pop()) if len(chances) == 1 else "–", *([""] if with_interval else [])]
    yield tuple(header)
    yield from map(tuple, cells.values())
    yield tuple(chance)
