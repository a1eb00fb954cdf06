"""Resample subjects: the bootstrap of every interval."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from umbrella_jax.scoring import weighted_statistics
from umbrella_jax.scoring.tasks import Prediction, label_of

Key = TypeVar("Key")
_CHUNK = 2**21
"""Number of weights in memory at a time; a resample has one per answer."""
_SAME = 1e-9
"""Relative width of an interval whose resamples differ by rounding only."""


@dataclass(frozen=True)
class Figure:
    """A metric's value with its 95 % interval."""

    value: float | None
    """None if it is undefined or not finite."""
    low: float | None
    """Lower end of the 95 % interval. Both ends are None if there are no resamples or only one subject, if the figure
    is undefined in more than half of the resamples, or if all resamples agree and the figure is not a share of
    answers."""
    high: float | None
    n: int
    """Number of answers, or of votes if subjects vote."""
    subjects: int
    chance: float | None
    """Value that is reached without looking at the images; None if chance has no meaning for the metric."""


@dataclass(frozen=True)
class Statistic:
    """A figure as a function of how often each answer counts."""

    compute: Callable[[np.ndarray], np.ndarray]
    """Maps weights of the n answers [n, R] to values [R]."""
    subject: np.ndarray
    """Number of each answer's subject, int [n]."""
    chance: float | None
    is_share: bool = False
    """Whether the value is a share of answers or votes."""

    @classmethod
    def mean(
        cls, values: np.ndarray, subject: np.ndarray, chance: float | None = None, *, is_share: bool = False
    ) -> "Statistic":
        """Return the mean of a value of each answer [n]; with `is_share`, of whether something is true of it."""
        return cls(partial(weighted_statistics.mean, values=values), subject, chance, is_share)


@dataclass(frozen=True)
class Resampled:
    """A figure over all answers, and over each resample of subjects."""

    values: np.ndarray
    """float [1 + R]; the first is over all answers."""
    subject: np.ndarray
    """Number of each answer's subject, int [n]."""
    chance: float | None
    is_share: bool = False
    """Whether the value is a share of answers or votes."""

    def figure(self) -> Figure:
        """Return the value over all answers, with the interval of the resamples."""
        subjects = len(np.unique(self.subject))
        value, samples = float(self.values[0]), self.values[1:][np.isfinite(self.values[1:])]
        low = high = None
        if math.isfinite(value) and subjects > 1 and 0 < len(self.values) - 1 <= 2 * len(samples):
            low, high = map(float, np.percentile(samples, [2.5, 97.5]))
            if not differ(low, high):  # agreeing resamples do not mean certainty
                low, high = _exact_interval(value, subjects) if self.is_share else (None, None)
        n, finite = len(self.subject), math.isfinite(value)
        return Figure(value if finite else None, low, high, n, subjects, self.chance)


def subject_of(row: Prediction) -> tuple[str, str]:
    """Return the key that names a row's subject, and the subject without BIDS' `sub-`."""
    name = label_of(row, "subject_id")
    return ("task_id", str(row["task_id"])) if name is None else ("subject_id", str(name).removeprefix("sub-"))


def number_subjects(rows: Iterable[Prediction]) -> dict[tuple[str, str], int]:
    """Return {result of `subject_of`: number of the subject among all of these rows}."""
    return {key: i for i, key in enumerate(sorted(set(map(subject_of, rows))))}


def resample_statistics(
    statistics: Mapping[Key, Statistic], subjects: int, answers: int, *, resamples: int, seed: int
) -> dict[Key, Resampled]:
    """Compute each statistic over all answers, and over each resample of subjects.

    All statistics see the same draws, so that their differences are paired.

    Args:
        subjects: number of subjects of all statistics together.
        answers: largest number of answers of one statistic; it bounds the memory only.
    """
    samples: dict[Key, list[np.ndarray]] = defaultdict(list)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for w in _weights(subjects, answers, resamples, seed):
            for name, statistic in statistics.items():
                samples[name].append(statistic.compute(w[statistic.subject]))
    values = {name: np.concatenate(parts) for name, parts in samples.items()}
    return {name: Resampled(values[name], s.subject, s.chance, s.is_share) for name, s in statistics.items()}


def _weights(subjects: int, answers: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each subject counts, float64 [subjects, R]: first once each, then chunks of resamples."""
    yield np.ones((subjects, 1))
    rng = np.random.default_rng(seed)
    step = max(_CHUNK // answers, 1)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        draws = rng.integers(subjects, size=(count, subjects)) + np.arange(count)[:, None] * subjects
        counts = np.bincount(draws.ravel(), minlength=count * subjects).reshape(count, subjects)
        yield np.ascontiguousarray(counts.T, dtype=float)


def differ(low: float | np.ndarray, high: float | np.ndarray) -> Any:
    """Return whether the ends of intervals differ by more than rounding, so that resamples do not all agree."""
    return high - low > _SAME * np.maximum(np.abs(high), 1)


def _exact_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent draws (Clopper & Pearson 1934).

    It uses quantiles of the beta distribution, so share · n, the number of successes, need not be whole.
    """
    from scipy.special import betaincinv

    k = share * n
    low = 0.0 if k <= 0 else float(betaincinv(k, n - k + 1, 0.025))
    return low, 1.0 if k >= n else float(betaincinv(k + 1, n - k, 0.975))
