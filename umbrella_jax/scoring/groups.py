"""Score groups of answers, such as those about women and men, and the gaps between the groups."""

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.console import plural, table_lines, wrapped
from umbrella_jax.errors import DataError
from umbrella_jax.io.reading import kind
from umbrella_jax.scoring.bootstrap import Figure, Resampled, differ, subject_of
from umbrella_jax.scoring.metrics import COLUMNS, check_answers, figure_rows, resample_parts, short, span
from umbrella_jax.scoring.tasks import Prediction, Task, by_task, figures_of_task, label_of

MISSING = "missing"
"""Name of the group of answers without a value."""
MAX_GROUPS = 100
"""Largest number of groups of a column."""
MAX_CODES = 30
"""Largest number of different whole numbers that may be codes, such as those of sites."""
_LONGEST = 100
"""Characters of a group's name."""
_SUBJECTS_PER_CODE = 5
"""Fewest subjects per whole number, on average, for more than `MAX_CLASSES` of them to be codes."""


@dataclass(frozen=True)
class Gap:
    """How far apart a figure is in the groups where it is highest and lowest."""

    highest: str
    lowest: str
    value: float
    """The figure in `highest` minus that in `lowest`."""
    low: float | None
    """Lower end of the 95 % interval, which holds for the differences of all pairs of groups at once. Both ends are
    None if the figure of one of the two has no interval."""
    high: float | None
    pairs: int
    """Number of pairs of groups that have an interval."""


@dataclass(frozen=True)
class GroupFigure:
    """A figure in each group of a column."""

    groups: Mapping[str, Figure]
    """{group that has answers to the task: figure}."""
    gap: Gap | None
    """None if fewer than two groups, not counting `MISSING`, have a value."""


@dataclass(frozen=True)
class Grouping:
    """The figures by the values of one column, or of several crossed ones."""

    counts: Mapping[str, tuple[int, int]]
    """{group: (number of answers, number of subjects)}."""
    figures: Mapping[str, GroupFigure]
    """{name as in `metric_names`: figure}, without those over several tasks."""


@dataclass(frozen=True)
class GroupedScores:
    """The figures of all groups, as returned by `score_groups`."""

    tasks: Mapping[str, Task]
    columns: Mapping[str, Grouping]
    notes: tuple[str, ...]

    def task_figures(self, column: str, task: str) -> dict[str, GroupFigure]:
        """Return a task's figures in the groups of a column: {METRIC or METRIC/PART: figure}."""
        return figures_of_task(task, self.tasks[task], self.columns[column].figures)

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; docs/metrics.md documents the keys."""
        return {
            "notes": list(self.notes),
            "columns": {
                column: {
                    "groups": {name: {"n": n, "subjects": s} for name, (n, s) in grouping.counts.items()},
                    "tasks": {
                        task: {name: asdict(figure) for name, figure in self.task_figures(column, task).items()}
                        for task in self.tasks
                    },
                }
                for column, grouping in self.columns.items()
            },
        }

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        lines = list[str]()
        for column, grouping in self.columns.items():
            counts = (f"{name} {n:,} ({s:,})" for name, (n, s) in grouping.counts.items())
            rows: list[str | tuple[str, ...]] = [f"by {column}: answers (subjects): {', '.join(counts)}"]
            rows.append(("", "", "95 % interval", "n", "subjects", "chance"))
            for name, task in self.tasks.items():
                rows.append(f"{name} ({task.title})")
                for figure, values in self.task_figures(column, name).items():
                    rows += [f"  {figure}", *figure_rows(values.groups, "    ")]
                    rows += [] if values.gap is None else [_gap_row(values.gap)]
                rows.append("")
            lines += table_lines(rows, COLUMNS)
        return "\n".join([*lines, *(line for note in self.notes for line in wrapped(note))])


def score_groups(
    rows: Iterable[Prediction],
    tasks: Mapping[str, Task],
    columns: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> GroupedScores:
    """Compute all figures of each task in the groups that columns of `metadata` make.

    Intervals are those of `score`. A resample draws subjects once for all groups, so a subject that is in several, such
    as with two visits in different age bins, counts as often in each.

    A gap is the highest minus the lowest value over groups, as in Fairlearn's `MetricFrame.difference` (Weerts et al.
    2023, https://jmlr.org/papers/v24/23-0389.html). Noise makes the largest of several differences too large (Lum et
    al. 2022, https://doi.org/10.1145/3531146.3533105). Its interval is therefore that of `gap_between`, which holds for
    all pairs of groups at once.

    Args:
        tasks: the result of `tasks_of`.
        columns: keys of `metadata`, each with groups of its own; `sex*site` crosses two or more.
        resamples: 0 for no intervals.

    Raises:
        DataError: no row has a column; its values are lists or objects, more than `MAX_CLASSES` whole numbers that do
            not look like codes, or more than `MAX_GROUPS` values; or as `score`.
    """
    rows = list(rows)
    by_group = group_rows(rows, columns)
    groups = by_task(rows)
    check_answers(groups, tasks)
    parts = {(column, name): by_task(members) for column, named in by_group.items() for name, members in named.items()}
    resampled = resample_parts(parts, groups, tasks, resamples=resamples, seed=seed)
    figures: dict[str, dict[str, dict[str, Resampled]]] = {column: defaultdict(dict) for column in by_group}
    for ((column, name), figure), values in resampled.items():
        figures[column][figure][name] = values
    groupings = {
        column: Grouping(
            {name: (len(members), len(set(map(subject_of, members)))) for name, members in named.items()},
            {
                figure: GroupFigure(
                    {name: one.figure() for name, one in values.items()},
                    gap_between({name: one for name, one in values.items() if name != MISSING}, seed),
                )
                for figure, values in figures[column].items()
            },
        )
        for column, named in by_group.items()
    }
    return GroupedScores(dict(tasks), groupings, tuple(_notes(groupings, resamples)))


def group_rows(rows: Sequence[Prediction], columns: Sequence[str]) -> dict[str, dict[str, list[Prediction]]]:
    """Return {column: {group: its rows}}, groups in natural order and `MISSING` last.

    A group is named after its value: 1, 1.0 and "1" are one group. More than `MAX_CLASSES` numbers that are not all
    whole are a measured quantity, such as `mean_fd`, and are cut into thirds of the answers. Arguments and errors are
    those of `score_groups`.
    """
    known = {key: None for row in rows for key in row.get("metadata") or () if label_of(row, key) is not None}
    faults = list[str]()
    rows_of: dict[str, dict[str, list[Prediction]]] = {}
    for column in dict.fromkeys(columns):
        keys = [column] if column in known else [key.strip() for key in column.split("*")]
        unknown = [key for key in keys if key not in known]
        faults += [f"by: {key}: no answer has it in its metadata; {_expected(known)}" for key in unknown]
        own = [] if unknown else [fault for key in keys if (fault := _column_fault(key, rows))]
        faults += own
        if unknown or own:
            continue
        members: dict[str, list[Prediction]] = defaultdict(list)
        cuts = {key: _cuts(key, rows) for key in keys}
        for row in rows:
            members[_group_of(row, cuts)].append(row)
        if len(members) > MAX_GROUPS:
            faults.append(
                f"by: {column}: {len(members)} values; expected at most {MAX_GROUPS}, with several subjects each"
            )
        rows_of[column] = {name: members[name] for name in sorted(members, key=_order)}
    if faults:
        raise DataError(faults)
    return rows_of


def _expected(known: Iterable[str]) -> str:
    names = ", ".join(sorted(known))
    return f"expected some of {names}" if names else "no answer has any; keep columns when you make the conversations"


def _column_fault(key: str, rows: Iterable[Prediction]) -> str | None:
    """Return why a column's values cannot be groups."""
    values = [(row, value) for row in rows if (value := label_of(row, key)) is not None]
    for row, value in values:
        if not isinstance(value, str | int | float):
            return f"by: {key}: expected texts or numbers, got {kind(value)} in {row['task_id']}"
        if len(value_name(value)) > _LONGEST:
            return f"by: {key}: expected at most {_LONGEST} characters, got more in {row['task_id']}"
    numbers = {value for _, value in values if not isinstance(value, str)}
    subjects = len({subject_of(row) for row, _ in values})
    if _cuts(key, [row for row, _ in values]) is not None:
        return None
    are_codes = all(isinstance(number, int) or number.is_integer() for number in numbers) and len(numbers) <= min(
        MAX_CODES, subjects / _SUBJECTS_PER_CODE
    )
    if len(numbers) > MAX_CLASSES and not are_codes:
        return (
            f"by: {key}: {len(numbers)} different numbers of {plural(subjects, 'subject')}; expected at most "
            f"{MAX_CLASSES}, or codes of at least {_SUBJECTS_PER_CODE} subjects each: make bins in study.yaml"
        )
    return None


def _cuts(key: str, rows: Iterable[Prediction]) -> tuple[float, float] | None:
    """Return the numbers that cut a measured quantity into thirds of the answers; None for any other column."""
    values = [value for row in rows if (value := label_of(row, key)) is not None]
    if len(set(values)) <= MAX_CLASSES or not all(type(value) in (int, float) for value in values):
        return None
    if all(float(value).is_integer() for value in values):
        return None
    low, high = np.quantile(np.array(values, np.float64), [1 / 3, 2 / 3])
    return float(low), float(high)


def _group_of(row: Prediction, cuts: Mapping[str, tuple[float, float] | None]) -> str:
    """Return the group of a row; `cuts` are those of each column."""
    values = {key: label_of(row, key) for key in cuts}
    return MISSING if None in values.values() else " × ".join(_name(value, cuts[key]) for key, value in values.items())


def _name(value: str | float, cuts: tuple[float, float] | None) -> str:
    if cuts is None or isinstance(value, str):
        return value_name(value)
    low, high = (f"{cut:.3g}" for cut in cuts)
    return f"≤ {low}" if value <= cuts[0] else f"{low} to {high}" if value <= cuts[1] else f"> {high}"


def value_name(value: str | float) -> str:
    """Return a value of `metadata` as text: 1 and 1.0 as `1`, True as `true`, a text without white space around it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value).strip())


def _order(name: str) -> tuple[bool, bool, list[str | int]]:
    """Return a key that sorts numbers in names by value, `<45` and `below 45` before them, `MISSING` last."""
    parts = re.split(r"(\d{1,18})", name)
    return (
        name == MISSING,
        not name.startswith(("<", "≤", "below ")),
        [int(part) if i % 2 else part for i, part in enumerate(parts)],
    )


def gap_between(groups: Mapping[str, Resampled], seed: int) -> Gap | None:
    """Return the gap between the highest and the lowest group, with an interval that holds for all pairs at once.

    The differences of all pairs are resampled together. Their percentile intervals, from the 2.5th to the 97.5th, are
    widened about their middles by one factor, the smallest with which all differences of a resample are in their
    intervals in 95 % of resamples (the single-step maximum of Westfall & Young 1993; Mandel & Betensky 2008,
    https://doi.org/10.1016/j.csda.2007.07.005, for percentiles). With two groups, it is the percentile interval.

    If all resamples of a share agree, its values are drawn from Jeffreys' Beta(k + ½, m − k + ½) instead, with m
    subjects and k = m × share (Brown, Cai & DasGupta 2001, https://doi.org/10.1214/ss/1009213286). As these draws are
    below 1, the interval is extended to the gap itself.

    Args:
        groups: {group: a figure's values}, of the same draws.
        seed: of the draws from beta distributions.
    """
    values = {name: float(one.values[0]) for name, one in groups.items() if np.isfinite(one.values[0])}
    if len(values) < 2:
        return None
    order = sorted(values, key=values.__getitem__, reverse=True)
    highest, lowest = order[0], order[-1]
    value = values[highest] - values[lowest]
    rng = np.random.default_rng([seed, 2])
    samples = {name: own for name in order if (own := _samples(groups[name], rng)) is not None}
    pairs = list(itertools.combinations(samples, 2))
    low = high = None
    if (highest, lowest) in pairs:
        differences = np.array([samples[a] - samples[b] for a, b in pairs])
        lows, highs = np.nanpercentile(differences, [2.5, 97.5], axis=1)
        middle = (lows + highs) / 2
        # a difference is constant if both groups have the same subjects
        half = np.where(differ(lows, highs), (highs - lows) / 2, np.nan)
        farthest = np.nanmax(np.abs(differences - middle[:, None]) / half[:, None], axis=0, initial=0)
        widening = max(1.0, float(np.percentile(farthest, 95))) if len(pairs) > 1 else 1.0
        at = pairs.index((highest, lowest))
        if np.isfinite(half[at]):
            low = min(float(middle[at] - widening * half[at]), value)
            high = max(float(middle[at] + widening * half[at]), value)
    return Gap(highest, lowest, value, low, high, len(pairs))


def _samples(one: Resampled, rng: np.random.Generator) -> np.ndarray | None:
    """Return a figure in each resample, NaN if undefined; None if it has no interval."""
    figure, samples = one.figure(), np.where(np.isfinite(one.values[1:]), one.values[1:], np.nan)
    if figure.value is None or figure.low is None:
        return None
    if differ(*np.nanpercentile(samples, [2.5, 97.5])):
        return samples
    right = figure.value * figure.subjects
    return rng.beta(right + 0.5, figure.subjects - right + 0.5, len(samples))


def _notes(columns: Mapping[str, Grouping], resamples: int) -> Iterator[str]:
    for column, grouping in columns.items():
        if MISSING in grouping.counts:
            n, subjects = grouping.counts[MISSING]
            counts = f"{plural(n, 'answer')} of {plural(subjects, 'subject')}"
            yield f"{column}: {counts} without a value are the group {MISSING}; gaps leave it out."
    gaps = [figure.gap for grouping in columns.values() for figure in grouping.figures.values() if figure.gap]
    if gaps and resamples:
        shown = sum(gap.low is not None for gap in gaps)
        yield (
            "A gap is the highest group minus the lowest. Its 95 % interval holds for all pairs of groups at once, but "
            f"for one metric of one column: without any true difference, one in 20 of the {plural(shown, 'interval')} "
            "of gaps would exclude 0."
        )


def _gap_row(gap: Gap) -> tuple[str, ...]:
    figure = Figure(gap.value, gap.low, gap.high, 0, 0, None)
    return f"    gap: {gap.highest} − {gap.lowest}", short(gap.value), span(figure, COLUMNS[2]) or "–", "", "", ""
