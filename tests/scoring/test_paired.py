"""Paired differences: their tests are scipy's and statsmodels', their intervals those of paired resamples."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from umbrella_jax.scoring.paired import EXACT, MCNEMAR, RANDOM, correct_holm, exact_mcnemar, paired_test
from umbrella_jax.scoring.tasks import Task

Rows = list[dict[str, Any]]
SIDE = Task("classification", ("accuracy",), ("left", "right"))
AGE = Task("regression", ("mae",))


def sides(right: np.ndarray, truths: np.ndarray, subjects: np.ndarray) -> Rows:
    """Return a row per answer: whether it is right, whether the truth is left, and its subject."""
    names = np.array(["right", "left"])
    return [
        {
            "task_id": f"t{i}",
            "task_type": "side",
            "prediction": str(names[int(truth == is_right)]),
            "reference": str(names[int(truth)]),
            "metadata": {"subject_id": f"s{subject}"},
        }
        for i, (is_right, truth, subject) in enumerate(zip(right, truths, subjects, strict=True))
    ]


def ages(errors: np.ndarray, subjects: np.ndarray) -> Rows:
    row: dict[str, Any] = {"task_type": "age", "reference": "50"}
    return [
        row | {"task_id": f"t{i}", "prediction": f"{50 + error:.17g}", "metadata": {"subject_id": f"s{subject}"}}
        for i, (error, subject) in enumerate(zip(errors, subjects, strict=True))
    ]


@pytest.mark.parametrize("seed", range(3))
def test_one_answer_per_subject_has_statsmodels_exact_mcnemar(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    one, other, truths = (rng.random(n) < share for share in (0.8, 0.5, 0.5))
    found = paired_test(SIDE, "accuracy", *([sides(x, truths, np.arange(n))] for x in (one, other)), seed=0)
    table = [[np.sum((one == a) & (other == b)) for b in (True, False)] for a in (True, False)]
    assert found.name == MCNEMAR
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)


@pytest.mark.parametrize("metric", ["accuracy", "mae"])
def test_few_subjects_have_scipys_exact_permutations(metric: Any) -> None:
    rng = np.random.default_rng(1)
    subjects = np.repeat(np.arange(9), 3)
    one, other, truths = (rng.random(27) for _ in range(3))
    if metric == "mae":
        found = paired_test(AGE, metric, [ages(one, subjects)], [ages(-other, subjects)], seed=0)
    else:
        one, other = one < 0.9, other < 0.4
        found = paired_test(SIDE, metric, *([sides(x, truths < 0.5, subjects)] for x in (one, other)), seed=0)
    means = [x.reshape(9, 3).mean(1) for x in (one, other)]
    expected = permutation_test(means, lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert found.name == EXACT
    assert found.p == pytest.approx(expected.pvalue)


def test_many_subjects_have_random_permutations_near_scipys() -> None:
    rng = np.random.default_rng(2)
    subjects = np.repeat(np.arange(60), 2)
    one, other = rng.normal(0, 1.2, 120), rng.normal(0, 0.9, 120)
    found = paired_test(AGE, "mae", [ages(one, subjects)], [ages(other, subjects)], seed=0)
    means = [np.abs(x).reshape(60, 2).mean(1) for x in (one, other)]
    options: Any = {"permutation_type": "samples", "n_resamples": 20_000, "rng": np.random.default_rng(0)}
    expected = permutation_test(means, lambda x, y, axis: np.mean(x - y, axis), vectorized=True, **options)
    assert found.name == RANDOM
    assert found.p is not None
    assert 0.005 < found.p < 0.2
    assert found.p == pytest.approx(expected.pvalue, abs=4 * np.sqrt(found.p / 10_000 * 1.5))


def test_a_metric_that_is_no_mean_is_permuted_as_scipy_would() -> None:
    """scipy exchanges whole answers of a question, here one per subject."""
    rng = np.random.default_rng(3)
    one, other, truths = rng.random(10) < 0.9, rng.random(10) < 0.3, np.arange(10) < 4
    task = Task("classification", ("balanced_accuracy",), ("left", "right"))
    answers = [sides(x, truths, np.arange(10)) for x in (one, other)]
    found = paired_test(task, "balanced_accuracy", *([rows] for rows in answers), seed=0)

    def difference(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([(x - y)[truths].mean(), (x - y)[~truths].mean()]))  # of the two recalls

    expected = permutation_test(
        (one.astype(float), other.astype(float)), difference, permutation_type="samples", n_resamples=np.inf
    )
    assert found.name == EXACT
    assert found.p == pytest.approx(expected.pvalue)


def test_seeds_are_averaged_before_the_test() -> None:
    rng = np.random.default_rng(4)
    subjects = np.arange(8)
    seeds, other = rng.normal(0, 1, (3, 8)), rng.normal(0, 3, 8)
    found = paired_test(AGE, "mae", [ages(x, subjects) for x in seeds], [ages(other, subjects)], seed=0)
    means = np.abs(seeds).mean(0), np.abs(other)
    expected = permutation_test(means, lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert found.p == pytest.approx(expected.pvalue)


def test_equal_answers_do_not_differ() -> None:
    right = np.ones(40, bool)
    rows = sides(right, right, np.repeat(np.arange(20), 2))
    assert paired_test(SIDE, "accuracy", [rows], [rows], seed=0).p == 1
    assert exact_mcnemar(right, right) == 1


def test_the_correction_is_statsmodels_holm() -> None:
    for seed in range(20):
        p = np.random.default_rng(seed).random(6) ** 3
        p[1] = p[4]
        assert correct_holm(p) == pytest.approx(multipletests(p, method="holm")[1])
