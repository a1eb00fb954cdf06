"""Corrected regressions: against the formulas of the papers, typed here, and what cannot be corrected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from umbrella_jax.cli import main
from umbrella_jax.errors import DataError
from umbrella_jax.scoring.adjustment import AdjustedScores, adjust_scores
from umbrella_jax.scoring.metrics import score, tasks_of

Rows = list[dict[str, Any]]


def ages(subjects: int = 30, seed: int = 0, prefix: str = "s") -> Rows:
    """Answers that are too near to the mean, of two visits each."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(subjects):
        sex = "M" if i % 2 else "F"
        for visit in range(2):
            age = round(float(rng.uniform(20, 80)), 1)
            answer = 50 + 0.4 * (age - 50) + 2 * (sex == "M") + 4 * rng.normal()
            metadata = {"task": "age", "subject_id": f"{prefix}{i:02}", "age": age, "sex": sex, "visit": visit}
            fields = {"task_id": f"{prefix}{i}-{visit}", "prediction": f"{answer:.2f}", "reference": f"{age} years"}
            rows.append(fields | {"metadata": metadata})
    return rows


def arrays(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, answer, and 1 for men."""
    answer = np.array([float(r["prediction"]) for r in rows])
    return np.array([r["metadata"]["age"] for r in rows]), answer, np.array([r["metadata"]["sex"] == "M" for r in rows])


def adjusted(rows: Rows, *covariates: str, **options: Any) -> AdjustedScores:
    return adjust_scores(rows, tasks_of(rows), covariates, **{"resamples": 0} | options)


def metrics(truth: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    return {
        "error_correlation/age": scipy.stats.pearsonr(truth, answer - truth).statistic,
        "mae": sklearn.metrics.mean_absolute_error(truth, answer),
        "rmse": sklearn.metrics.root_mean_squared_error(truth, answer),
        "r2": sklearn.metrics.r2_score(truth, answer),
        "pearson": scipy.stats.pearsonr(truth, answer).statistic,
    }


@pytest.mark.parametrize("elsewhere", [False, True])
def test_age_is_corrected_as_published(elsewhere: bool) -> None:
    """Beheshti et al. 2019: answer − (α Ω + β), fitted to the error; de Lange & Cole 2020: answer + Ω − (α Ω + β),
    fitted to the answer. Ω is the true age."""
    rows, others = ages(), ages(seed=1, prefix="v") if elsewhere else None
    truth, answer, _ = arrays(rows)
    fit_truth, fit_answer, _ = arrays(others or rows)
    alpha, beta = np.polyfit(fit_truth, fit_answer - fit_truth, 1)
    beheshti = answer - (alpha * truth + beta)
    a, b = np.polyfit(fit_truth, fit_answer, 1)
    np.testing.assert_allclose(answer + truth - (a * truth + b), beheshti)
    found = adjusted(rows, "age", fit_rows=others)
    (adjustment,) = found.adjustments.values()
    assert (adjustment.slopes["age"], adjustment.intercept) == pytest.approx((alpha, beta))
    for which, values in (("uncorrected", answer), ("corrected", beheshti)):
        got = {name: getattr(figure, which).value for name, figure in adjustment.figures.items()}
        assert got == pytest.approx(metrics(truth, values), abs=1e-9)
    assert abs(adjustment.figures["error_correlation/age"].corrected.value or 0) < (0.3 if elsewhere else 1e-9)
    assert found.fitted_elsewhere == elsewhere
    assert "do not measure accuracy" in found.notes[-1]
    assert ("fitted on the true values" in found.notes[-1]) != elsewhere


def test_several_covariates_are_fitted_together() -> None:
    rows = ages()
    truth, answer, man = arrays(rows)
    design = np.stack([np.ones(60), truth, man], 1)
    coefficients = np.linalg.lstsq(design, answer - truth, rcond=None)[0]
    found = adjusted(rows, "age", "sex")
    (adjustment,) = found.adjustments.values()
    assert [adjustment.intercept, *adjustment.slopes.values()] == pytest.approx(coefficients)
    expected = sklearn.metrics.mean_absolute_error(truth, answer - design @ coefficients)
    assert adjustment.figures["mae"].corrected.value == pytest.approx(expected)
    correlation = scipy.stats.pearsonr(man, answer - truth).statistic
    assert adjustment.figures["error_correlation/sex"].uncorrected.value == pytest.approx(correlation)
    assert found.coding == {"age": None, "sex": ("F", "M")}
    assert "(sex is M)" in found.notes[0]


def test_each_resample_is_fitted_again() -> None:
    rows = ages(12)
    found = adjusted(rows, "age", resamples=40, seed=2).adjustments["age"].figures["mae"].corrected
    values = []
    for draw in np.random.default_rng(2).integers(12, size=(40, 12)):
        truth, answer, _ = arrays([r for i in draw for r in rows if r["metadata"]["subject_id"] == f"s{i:02}"])
        alpha, beta = np.polyfit(truth, answer - truth, 1)
        values.append(np.abs(answer - (alpha * truth + beta) - truth).mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(values, [2.5, 97.5]))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_chance_shows_that_age_corrects_any_answer(elsewhere: bool) -> None:
    """Corrected for age, a constant is the true age: the inflation of Butler et al. 2021."""
    rows = ages()
    others = ages(seed=1, prefix="v") if elsewhere else None
    figures = adjusted(rows, "age", fit_rows=others).adjustments["age"].figures
    assert {name: figures[name].corrected.chance for name in ("mae", "r2", "pearson")} == {
        "mae": 0,
        "r2": 1,
        "pearson": 1,
    }
    assert figures["r2"].uncorrected.chance == 0
    sex = adjusted(rows, "sex", fit_rows=others).adjustments["age"].figures["r2"].corrected.chance
    assert sex is not None
    assert sex < 0.1  # a covariate that does not tell the age
    constant = [r | {"prediction": "50"} for r in rows]
    found = adjusted(constant, "age", fit_rows=others and [r | {"prediction": "50"} for r in others])
    assert found.adjustments["age"].figures["r2"].corrected.value == pytest.approx(1)


def test_counts_the_answers_left_out() -> None:
    rows = ages()
    rows[0]["prediction"], rows[1]["metadata"]["age"], rows[2]["metadata"]["age"] = "old", None, float("nan")
    adjustment = adjusted(rows, "age").adjustments["age"]
    assert adjustment.left_out == 3
    assert {(f.uncorrected.n, f.corrected.n) for f in adjustment.figures.values()} == {(57, 57)}
    assert score(rows, tasks_of(rows), resamples=0).figures["mae/age"].n == 60


@pytest.mark.parametrize(
    ("change", "covariates", "message"),
    [
        ({}, ["height"], "adjust: height: no answer to a regression has it in its metadata; expected some of age, sex"),
        ({"site": "1"}, ["site"], "adjust: site: all answers have the same value"),
        ({"site": ["a", "b", "c"]}, ["site"], "adjust: site: 3 different values, some of them texts"),
        ({"site": [1, 2, "3"]}, ["site"], "adjust: site: 3 different values, some of them texts"),
        ({"site": [[1], "b"]}, ["site"], "adjust: site: expected numbers or texts, got a list in s0-0"),
        ({"size": [1, 10**400]}, ["size"], "adjust: size: expected numbers below 1e+100 in size in s1-0"),
        ({"months": None}, ["age", "months"], "adjust: task age: age, months: one is constant or a linear function"),
        ({"rare": [1.5, *[None] * 28, 2.5]}, ["rare"], "adjust: task age: 4 answers with a number and rare"),
    ],
)
def test_refuses_covariates_that_cannot_be_fitted(change: dict[str, Any], covariates: list[str], message: str) -> None:
    rows = ages(30)
    for i, r in enumerate(rows):
        for name, values in change.items():
            value = values[i // 2 % len(values)] if isinstance(values, list) else values
            r["metadata"][name] = r["metadata"]["age"] * 12 if name == "months" else value
    if "rare" in change:
        rows[0]["prediction"] = rows[1]["prediction"] = "old"
        message = message.replace("4 answers", "2 answers")
    with pytest.raises(DataError) as raised:
        adjusted(rows, *covariates)
    assert message in raised.value.faults[0]


def test_refuses_to_fit_on_the_scored_subjects_or_without_a_regression() -> None:
    rows = ages()
    others = ages(seed=1, prefix="v")
    with pytest.raises(DataError, match="adjust_from: 1 subject scored too"):
        adjusted(rows, "age", fit_rows=[*others, rows[0]])
    with pytest.raises(DataError, match="adjust_from: task age: no answers in it"):
        adjusted(rows, "age", fit_rows=[r | {"metadata": r["metadata"] | {"task": "iq"}} for r in others])
    sides = [r | {"reference": "left", "prediction": "left"} for r in rows]
    with pytest.raises(DataError, match="adjust: none of age is a regression"):
        adjusted(sides, "age")


def test_the_command_corrects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "test.jsonl", tmp_path / "val.jsonl"]
    for file, rows in zip(files, (ages(), ages(seed=1, prefix="v")), strict=True):
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    test, val = map(str, files)
    assert main(["score", test, "--adjust", "age,sex"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "age: corrected = answer − (" in text
    assert "Butler et al. 2021" in text
    assert main(["score", test, "--adjust", "age", "--adjust-from", val, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adjust"]
    assert found["fitted_elsewhere"]
    assert found["tasks"]["age"]["figures"]["mae"]["corrected"]["n"] == 60
    assert main(["score", test, "--adjust-from", val]) == 2
    assert "--adjust-from: nothing to correct for" in capsys.readouterr().err
