"""Calibration of the intervals of numbers: nominal against actual coverage at several levels."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from umbrella_jax.console import table_lines, wrapped
from umbrella_jax.scoring.bootstrap import Figure, Statistic, number_subjects, resample_statistics, subject_of
from umbrella_jax.scoring.metrics import numbers_of, short, span
from umbrella_jax.scoring.numeric import coverage_statistic, distributions_of
from umbrella_jax.scoring.tasks import Prediction, Task, by_task

CALIBRATION_LEVELS = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
"""Levels of the intervals, in percent."""


@dataclass(frozen=True)
class CalibratedLevel:
    """How the central intervals of one level do."""

    level: int
    """In percent."""
    mass: float
    """Mean probability that the model itself gives to the interval: the level or more, since candidates are discrete.
    A calibrated model's coverage equals it."""
    coverage: Figure
    """Share of truths in the interval."""
    width: Figure
    """Mean width of the interval."""


@dataclass(frozen=True)
class NumberCalibration:
    """Nominal and actual coverage of the central intervals of every regression with candidate numbers."""

    tasks: Mapping[str, Task]
    levels: Mapping[str, tuple[CalibratedLevel, ...]]
    """{task: its levels, ascending}."""

    def to_json(self) -> dict[str, Any]:
        """Return {task: a list of `level`, `mass`, `coverage` and `width`}."""
        return {name: [asdict(level) for level in levels] for name, levels in self.levels.items()}

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        rows: list[str | tuple[str, ...]] = [("", "model's", "coverage", "95 % interval", "mean width")]
        for name, levels in self.levels.items():
            rows.append(f"{name} ({self.tasks[name].title}): central intervals")
            for one in levels:
                interval = span(one.coverage, 20) or "–"
                rows.append(
                    (f"  {one.level} %", short(one.mass), short(one.coverage.value), interval, short(one.width.value))
                )
        note = (
            "model's: mean probability that the model gives to its intervals, at least the level, since candidates are "
            "discrete. Coverage below it means intervals that are too narrow."
        )
        return "\n".join([*table_lines(rows, (16, 10, 10, 20, 12)), "", *wrapped(note)])


def calibrate_numbers(
    rows: Sequence[Prediction], tasks: Mapping[str, Task], *, resamples: int = 1000, seed: int = 0
) -> NumberCalibration | None:
    """Compare nominal and actual coverage of the intervals of every regression whose rows have likelihoods.

    Args:
        rows: answers that `score` accepts.
        tasks: the result of `tasks_of`.
        resamples: of subjects, for the intervals of the figures; 0 for none.

    Returns:
        None if no task has candidate numbers.
    """
    groups = {
        name: members
        for name, members in by_task(rows).items()
        if tasks[name].numbers is not None and all(row.get("likelihoods") for row in members)
    }
    if not groups:
        return None
    subjects = number_subjects(row for members in groups.values() for row in members)
    statistics: dict[tuple[str, int, str], Statistic] = {}
    masses: dict[tuple[str, int], float] = {}
    for name, members in groups.items():
        numbers, truth = distributions_of(tasks[name], members), numbers_of(tasks[name], members)[0]
        subject = np.array([subjects[subject_of(row)] for row in members])
        for level in CALIBRATION_LEVELS:
            low, high = numbers.interval(level)
            masses[name, level] = float(numbers.mass(low, high).mean())
            statistics[name, level, "coverage"] = coverage_statistic(low, high, truth, subject)
            statistics[name, level, "width"] = Statistic.mean(high - low, subject)
    answers = max(map(len, groups.values()))
    samples = resample_statistics(statistics, len(subjects), answers, resamples=resamples, seed=seed)
    return NumberCalibration(
        {name: tasks[name] for name in groups},
        {
            name: tuple(
                CalibratedLevel(
                    level,
                    masses[name, level],
                    samples[name, level, "coverage"].figure(),
                    samples[name, level, "width"].figure(),
                )
                for level in CALIBRATION_LEVELS
            )
            for name in groups
        },
    )
