"""Score the answers of several seeds of one run: mean, spread, and an interval over seeds and subjects."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from umbrella_jax.console import plural, table_lines, wrapped
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.scoring.bootstrap import Figure, Resampled
from umbrella_jax.scoring.metrics import (
    answer_notes,
    cut_faults,
    resample,
    short,
    span,
    subject_keys,
)
from umbrella_jax.scoring.tasks import Prediction, Task, by_task, figures_of_task, figures_over_tasks, task_of

_COLUMNS = (23, 8, 8, 18, 7, 9, 7)
"""Widths of a table's columns: name, mean, standard deviation, interval, n, subjects and chance."""
_NAMED = 3
"""Number of conversations that a fault names."""


@dataclass(frozen=True)
class SeedFigure:
    """A metric over several seeds."""

    mean: Figure
    """The mean over seeds, with the interval over seeds and subjects. It is undefined if a seed's value is; `n` and
    `subjects` are those of the seed that has fewest."""
    sd: float | None
    """Standard deviation over seeds, with the divisor number − 1; None for a single seed or an undefined mean."""
    by_seed: Mapping[int, float | None]

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON."""
        mean = asdict(self.mean)
        return {"mean": mean.pop("value"), "sd": self.sd, **mean, "seeds": dict(self.by_seed)}


@dataclass(frozen=True)
class SeedScores:
    """The figures of all tasks over several seeds, as returned by `score_seeds`."""

    seeds: tuple[int, ...]
    tasks: Mapping[str, Task]
    figures: Mapping[str, SeedFigure]
    """{name as in `metric_names`: figure}."""
    notes: tuple[str, ...]
    resamples: int

    def task_figures(self, task: str) -> dict[str, SeedFigure]:
        """Return a task's figures: {METRIC or METRIC/PART: figure}."""
        return figures_of_task(task, self.tasks[task], self.figures)

    def overall(self) -> dict[str, SeedFigure]:
        """Return the figures over several tasks."""
        return figures_over_tasks(self.figures)

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        rows: list[str | tuple[str, ...]] = [("", "mean", "sd", "95 % interval", "n", "subjects", "chance")]
        for name, task in self.tasks.items():
            rows += [f"{name} ({task.title})", *_figure_rows(self.task_figures(name)), ""]
        if overall := self.overall():
            rows += ["over all tasks", *_figure_rows(overall), ""]
        lines = table_lines(rows, _COLUMNS)
        return "\n".join([*lines, *(line for note in self.notes for line in wrapped(note))])

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; docs/metrics.md documents the keys."""
        return {
            "version": 1,
            "resamples": self.resamples,
            "notes": list(self.notes),
            "overall": {name: figure.to_json() for name, figure in self.overall().items()},
            "tasks": {
                name: {
                    "kind": task.kind,
                    "answers": None if task.answers is None else list(task.classes),
                    "unit": task.unit,
                    "figures": {figure: value.to_json() for figure, value in self.task_figures(name).items()},
                }
                for name, task in self.tasks.items()
            },
        }


def score_seeds(
    rows: Mapping[int, Sequence[Prediction]], tasks: Mapping[str, Task], *, resamples: int = 1000, seed: int = 0
) -> SeedScores:
    """Compute all figures over the answers of several seeds to the same conversations.

    The interval is a two-way bootstrap, since seeds and subjects are crossed: a resample draws as many subjects as
    there are and, independently, as many seeds, both with replacement; its value is the mean over the drawn seeds of
    the figure on the drawn subjects (the pigeonhole bootstrap of Owen 2007, https://doi.org/10.1214/07-AOAS122). The
    interval reaches from the 2.5th to the 97.5th percentile. Subjects are drawn as `score` draws them.

    Args:
        rows: {seed: its rows}.
        tasks: the result of `tasks_of`.
        resamples: 0 for no intervals.
        seed: of the draws; not one of `rows`.

    Raises:
        DataError: seeds answered other conversations; or as `score` and for `cut_faults`, naming the seed.
    """
    if faults := conversation_faults(rows):
        raise DataError(faults)
    collected, of_seed = Faults(), dict[int, dict[str, Resampled]]()
    groups = {number: by_task(own) for number, own in rows.items()}
    for number, own in rows.items():
        faults = cut_faults(own, tasks)
        try:
            of_seed[number] = resample(groups[number], tasks, resamples=resamples, seed=seed)
        except DataError as error:
            faults += error.faults
        collected += [f"seed {number}: {fault}" for fault in faults]
    collected.raise_as(DataError)
    drawn = drawn_seeds(len(rows), resamples, seed)
    own_names, *others = of_seed.values()
    names = [name for name in own_names if all(name in other for other in others)]
    first = next(iter(groups.values()))
    return SeedScores(
        seeds=tuple(rows),
        tasks=dict(tasks),
        figures={name: _over_seeds({n: own[name] for n, own in of_seed.items()}, drawn) for name in names},
        notes=(interval_note(len(rows), resamples, first), *_seed_notes(tasks, groups)),
        resamples=resamples,
    )


def conversation_faults(rows: Mapping[int, Sequence[Prediction]]) -> list[str]:
    """Return a fault for each seed whose answers are not to the conversations of the first."""
    keys = {seed: sorted(map(_conversation, own)) for seed, own in rows.items()}
    (first, expected), *others = keys.items()
    faults = []
    for seed, own in others:
        if own != expected:
            names = sorted({key[0] for key in set(own) ^ set(expected)})
            shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
            faults.append(
                f"seed {seed}: {plural(len(own), 'answer')}, not to the same conversations as the "
                f"{len(expected)} of seed {first}" + (f"; they differ in {shown}" if names else "")
            )
    return faults


def _conversation(row: Prediction) -> tuple[str, str, str, str]:
    """Return everything about a row that is not an answer."""
    return str(row["task_id"]), task_of(row), row["reference"], repr(sorted((row.get("metadata") or {}).items()))


def drawn_seeds(number: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each seed counts, int [S, 1 + R]: first once each, then in each resample."""
    # a second number keeps this stream apart from that of the subjects
    draws = np.random.default_rng([seed, 1]).integers(number, size=(resamples, number))
    counts = (draws[:, :, None] == np.arange(number)).sum(1)
    return np.concatenate([np.ones((1, number), int), counts]).T


def mean_over_seeds(each: Sequence[Resampled], drawn: np.ndarray) -> Resampled:
    """Return the mean of a figure over seeds, over all answers and in each resample of subjects and seeds.

    Args:
        each: the figure of each seed.
        drawn: the result of `drawn_seeds`.
    """
    values = np.stack([one.values for one in each])
    # a seed that was not drawn does not count, also if its figure is undefined
    with np.errstate(invalid="ignore"):
        means = np.where(drawn > 0, drawn * values, 0).sum(0) / len(each)
    fewest = min(each, key=lambda one: len(one.subject))
    chances = [one.chance for one in each if one.chance is not None]
    chance = float(np.mean(chances)) if len(chances) == len(each) else None
    return Resampled(means, fewest.subject, chance, each[0].is_share)


def sd_over_seeds(each: Sequence[Resampled]) -> float | None:
    """Return a figure's standard deviation over seeds; None for a single seed or an undefined figure."""
    values = [float(one.values[0]) for one in each]
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(np.std(values, ddof=1)) if max(values) > min(values) else 0.0  # exact, while a sum is rounded


def _over_seeds(of_seed: Mapping[int, Resampled], drawn: np.ndarray) -> SeedFigure:
    each = list(of_seed.values())
    mean = mean_over_seeds(each, drawn).figure()
    return SeedFigure(mean, sd_over_seeds(each), {seed: one.figure().value for seed, one in of_seed.items()})


def interval_note(seeds: int, resamples: int, groups: Mapping[str, Sequence[Prediction]]) -> str:
    """Return a sentence about the intervals of figures over seeds. `groups` is {task: rows of one seed}."""
    if not resamples:
        what = "No intervals: no resamples"
    elif seeds == 1:
        what = f"95 % intervals: {resamples} resamples of subjects; one seed, so without its share of the variance"
    else:
        what = f"95 % intervals: {resamples} resamples of subjects and of the {seeds} seeds"
    return f"{what}; {subject_keys(groups)}."


def _seed_notes(tasks: Mapping[str, Task], groups: Mapping[int, Mapping[str, Sequence[Prediction]]]) -> Iterator[str]:
    """Yield the notes about answers, those that all seeds share once."""
    notes = {seed: list(answer_notes(tasks, own)) for seed, own in groups.items()}
    shared = [note for note in next(iter(notes.values())) if all(note in own for own in notes.values())]
    yield from shared
    for seed, own in notes.items():
        yield from (f"Seed {seed}: {note}" for note in own if note not in shared)


def _figure_rows(figures: Mapping[str, SeedFigure]) -> Iterator[str | tuple[str, ...]]:
    for name, figure in figures.items():
        f = figure.mean
        interval = span(f, _COLUMNS[3]) or "–"
        yield f"  {name}", short(f.value), short(figure.sd), interval, str(f.n), str(f.subjects), short(f.chance)
        values = ", ".join(f"{seed}: {short(value)}" for seed, value in figure.by_seed.items())
        yield f"    seed {values}"
