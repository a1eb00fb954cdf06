"""Numbers with intervals: a model's distribution over the candidate numbers of a regression, and how good it is.

The distribution is the softmax of a row's `likelihoods`, so it can be computed from any predictions that hold them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from umbrella_jax.scoring import weighted_statistics
from umbrella_jax.scoring.bootstrap import Statistic
from umbrella_jax.scoring.number_grid import NumberGrid
from umbrella_jax.scoring.tasks import LEVELS, Prediction, Task

_ROUNDING = 1e-9


@dataclass(frozen=True)
class NumberDistributions:
    """Distributions of n answers over A candidate numbers."""

    values: np.ndarray
    """float64 [A]; the candidates, ascending."""
    probabilities: np.ndarray
    """float64 [n, A]; rows sum to 1."""

    @classmethod
    def of(cls, grid: NumberGrid, likelihoods: Sequence[Mapping[str, float]]) -> "NumberDistributions":
        """Return the distributions of rows' likelihoods, normalised over the candidates."""
        from scipy.special import softmax

        logs = np.array([[row[text] for text in grid.texts] for row in likelihoods], float)
        return cls(np.array(grid.values), softmax(logs, axis=1))

    def expectation(self) -> np.ndarray:
        """Return Σ p·x, float64 [n]: the prediction with the smallest expected squared error."""
        return self.probabilities @ self.values

    def quantile(self, share: float) -> np.ndarray:
        """Return the smallest candidate up to which the probability is at least `share`, float64 [n]."""
        reached = self.probabilities.cumsum(1) >= share - _ROUNDING
        reached[:, -1] = True
        return self.values[reached.argmax(1)]

    def median(self) -> np.ndarray:
        """Return the 50 % quantile, float64 [n]: a prediction with the smallest expected absolute error."""
        return self.quantile(0.5)

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return both ends, float64 [n] each, of the central interval of a level in percent.

        Both are quantiles, so the interval has a probability of at least the level.
        """
        tail = (1 - level / 100) / 2
        return self.quantile(tail), self.quantile(1 - tail)

    def mass(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return the probability from `low` to `high`, both included, float64 [n]."""
        inside = (low[:, None] <= self.values) & (self.values <= high[:, None])
        return np.where(inside, self.probabilities, 0).sum(1)

    def summaries(self) -> list[dict[str, Any]]:
        """Return `expectation`, `median` and `interval_LEVEL` ([low, high]) of each distribution."""
        columns = {"expectation": self.expectation(), "median": self.median()}
        columns |= {f"interval_{level}": np.stack(self.interval(level), 1) for level in LEVELS}
        count = len(self.probabilities)
        return [{name: column[row].tolist() for name, column in columns.items()} for row in range(count)]

    def crps(self, truth: np.ndarray) -> np.ndarray:
        """Return the continuous ranked probability score, float64 [n], in the unit of the numbers.

        It is E|X − truth| − ½ E|X − X'| with X and X' independent draws (Gneiting & Raftery 2007,
        https://doi.org/10.1198/016214506000001437, equation 21): the absolute error, if one candidate has all
        probability.
        """
        error = (self.probabilities * np.abs(self.values - truth[:, None])).sum(1)
        below = self.probabilities.cumsum(1)[:, :-1]
        return error - (below * (1 - below)) @ np.diff(self.values)  # the sum is ½ E|X − X'|


def read_number(grid: NumberGrid, likelihoods: Mapping[str, float]) -> dict[str, Any]:
    """Return the summary (`NumberDistributions.summaries`) of one answer's likelihoods."""
    return NumberDistributions.of(grid, [likelihoods]).summaries()[0]


def distributions_of(task: Task, rows: Sequence[Prediction]) -> NumberDistributions:
    """Return the distributions of a regression's rows, which all have likelihoods of the same numbers."""
    assert task.numbers is not None
    return NumberDistributions.of(task.numbers, [row["likelihoods"] for row in rows])


def number_statistics(
    task: Task, rows: Sequence[Prediction], truth: np.ndarray, subject: np.ndarray, chances: Mapping[str, float]
) -> dict[str, Statistic]:
    """Return the statistics of the distributions of a regression's rows: those in `NUMBER_PARTS`, and `crps`.

    Args:
        truth: float [n].
        subject: number of each row's subject, int [n].
        chances: {metric: value that is reached without images}.
    """
    numbers = distributions_of(task, rows)
    expectation = numbers.expectation()
    error = expectation - truth
    spread = np.abs(truth[:, None] - truth).mean() / 2  # CRPS of always answering the references' distribution
    absolute = {"expectation": np.abs(error), "median": np.abs(numbers.median() - truth)}
    statistics = {
        "rmse/expectation": Statistic(partial(weighted_statistics.rmse, error=error), subject, chances["rmse"]),
        "r2/expectation": Statistic(
            partial(weighted_statistics.r2, truth=truth, answer=expectation), subject, chances["r2"]
        ),
        "pearson/expectation": Statistic(
            partial(weighted_statistics.pearson, x=truth, y=expectation), subject, chances["pearson"]
        ),
        "crps": Statistic.mean(numbers.crps(truth), subject, float(spread)),
        **{f"mae/{part}": Statistic.mean(values, subject, chances["mae"]) for part, values in absolute.items()},
    }
    for level in LEVELS:
        low, high = numbers.interval(level)
        statistics[f"coverage/{level}"] = coverage_statistic(low, high, truth, subject)
        statistics[f"interval_width/{level}"] = Statistic.mean(high - low, subject)
    return statistics


def coverage_statistic(low: np.ndarray, high: np.ndarray, truth: np.ndarray, subject: np.ndarray) -> Statistic:
    """Return the statistic of the share of truths from `low` to `high`, both included."""
    inside = (low <= truth) & (truth <= high)
    return Statistic.mean(inside, subject, is_share=True)
