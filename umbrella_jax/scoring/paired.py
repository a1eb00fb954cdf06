"""Test the difference between two predictors that answered the same questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from umbrella_jax.config.schema import Metric
from umbrella_jax.scoring.bootstrap import subject_of
from umbrella_jax.scoring.metrics import answer_values, statistic_of
from umbrella_jax.scoring.tasks import Prediction, Task

PERMUTATIONS = 9999
"""Number of random permutations. Fewer possible ones are enumerated instead."""
MCNEMAR, EXACT, RANDOM = "exact McNemar", "exact permutation", "random permutation"
_CHUNK = 2**21
"""Number of weights in memory at a time."""
_SAME = 1e-9
"""Relative size of a difference that is only rounding."""


@dataclass(frozen=True)
class PairedTest:
    """The result of a two-sided test of no difference."""

    p: float | None
    """None if the difference is undefined."""
    name: str
    """`MCNEMAR`, `EXACT` or `RANDOM`."""


def paired_test(
    task: Task, metric: Metric, ones: Sequence[Sequence[Prediction]], others: Sequence[Sequence[Prediction]], seed: int
) -> PairedTest:
    """Test whether a metric of two predictors differs by more than chance.

    Accuracy with one answer per subject has the exact test of McNemar (1947). Otherwise the two exchange their answers
    about random subjects, all answers about a subject together (a paired permutation test; for means it is Fisher's
    test of random signs). p is the share of exchanges whose difference is as large, over all exchanges if there are at
    most `PERMUTATIONS`, else (b + 1) / (m + 1), with b of m random ones (Phipson & Smyth 2010,
    https://doi.org/10.2202/1544-6115.1585).

    Args:
        ones, others: answers of each seed of the two predictors, to the same questions in the same order. With several
            seeds the difference is that of the means over seeds; a predictor with one seed is compared with each of
            the other's.
    """
    number, rows = max(len(ones), len(others)), ones[0]
    names = sorted(set(map(subject_of, rows)))
    numbers = {name: i for i, name in enumerate(names)}
    subject = np.array([numbers[subject_of(row)] for row in rows])
    pairs = [(ones[i % len(ones)], others[i % len(others)]) for i in range(number)]
    each = [(answer_values(task, metric, one), answer_values(task, metric, other)) for one, other in pairs]
    if number == 1 and metric == "accuracy" and len(names) == len(rows):
        ((right, other_right),) = each
        assert right is not None
        assert other_right is not None
        return PairedTest(exact_mcnemar(right, other_right), MCNEMAR)
    differences = [one - other for one, other in each if one is not None and other is not None]
    if differences:
        by_subject = np.bincount(subject, np.mean(differences, axis=0)) / len(rows)
        by_subject = by_subject[by_subject != 0]  # others change nothing by being exchanged
        return permutation_test(lambda kept: (2 * kept - 1).T @ by_subject, len(by_subject), seed)
    statistics = [
        statistic_of(task, metric, [*one, *other], np.concatenate([subject, subject + len(names)]))
        for one, other in pairs
    ]

    def difference(kept: np.ndarray) -> np.ndarray:
        """Return the mean over seeds of the metric of the one predictor minus that of the other."""
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = [np.concatenate([own, 1 - own]) for own in (kept, 1 - kept)]
            return np.mean(
                [s.compute(weights[0][s.subject]) - s.compute(weights[1][s.subject]) for s in statistics], axis=0
            )

    return permutation_test(difference, len(names), seed)


def permutation_test(difference: Callable[[np.ndarray], np.ndarray], subjects: int, seed: int) -> PairedTest:
    """Test a difference by exchanging the answers of subjects; see `paired_test`.

    Args:
        difference: maps whether each subject keeps its own answers, float [subjects, R] of 0 and 1, to R differences.
    """
    observed = float(difference(np.ones((subjects, 1)))[0])
    is_exact = 2**subjects <= PERMUTATIONS + 1
    if not np.isfinite(observed):
        return PairedTest(None, EXACT if is_exact else RANDOM)
    if is_exact:
        values = difference(((np.arange(2**subjects) >> np.arange(subjects)[:, None]) & 1).astype(float))
    else:
        rng, step = np.random.default_rng([seed, 3]), max(_CHUNK // subjects, 1)
        counts = [min(step, PERMUTATIONS - start) for start in range(0, PERMUTATIONS, step)]
        values = np.concatenate(
            [difference(rng.integers(2, size=(subjects, n), dtype=np.uint8).astype(float)) for n in counts]
        )
    rounding = _SAME * np.nanmax(np.abs(values), initial=abs(observed))
    as_large = int(np.count_nonzero(~(np.abs(values) < abs(observed) - rounding)))  # an undefined one counts too
    if is_exact:
        return PairedTest(as_large / len(values), EXACT)
    return PairedTest((as_large + 1) / (PERMUTATIONS + 1), RANDOM)


def exact_mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """Return the two-sided p of McNemar's exact test: a binomial test of the questions that only one answers right.

    Args:
        one, other: whether each answer is right, [n].
    """
    from scipy.special import bdtr

    only_one, only_other = np.count_nonzero(one > other), np.count_nonzero(one < other)
    return min(1.0, 2 * float(bdtr(min(only_one, only_other), only_one + only_other, 0.5)))


def correct_holm(p: Sequence[float]) -> list[float]:
    """Correct p values for their number by the method of Holm (1979), https://www.jstor.org/stable/4615733."""
    order, corrected, largest = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected
