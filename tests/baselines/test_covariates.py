"""Covariates: which columns are used, and that the model is scikit-learn's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.helpers.baseline_case import make_problem
from umbrella_jax.baselines.baseline import BaselineOptions, Inputs
from umbrella_jax.baselines.covariates import CovariatesBaseline
from umbrella_jax.baselines.problems import LearningProblem
from umbrella_jax.data.conversation import Image

TRAIN, EVAL = 80, 20
Columns = dict[str, Sequence[Any]]


def learned(
    name: str, answers: Sequence[Any], columns: Columns, **options: Any
) -> tuple[CovariatesBaseline, LearningProblem]:
    """Return the baseline, and a task of TRAIN subjects and EVAL further ones, whose answers it never sees."""
    rows = [
        {"task_id": str(i), "metadata": {k: v[i] for k, v in columns.items() if v[i] is not None}}
        for i in range(TRAIN + EVAL)
    ]
    shown = [(Image(Path(f"{i}.nii"), "T1"),) for i in range(TRAIN + EVAL)]
    problem = make_problem(name, answers, shown, TRAIN)
    given: Any = {"config": None, "train": None, "evaluation": None, "checkpoint": None}
    inputs = Inputs(train_rows=rows[:TRAIN], eval_rows=rows[TRAIN:], options=BaselineOptions(**options), **given)
    return CovariatesBaseline(inputs), problem


RNG = np.random.default_rng(0)
AGE = RNG.uniform(20, 80, TRAIN + EVAL).round(1).tolist()
SITE = [("Oslo", "Leeds", "Turin", "Ghent")[i % 4] for i in range(TRAIN + EVAL)]
SEX = [("F", "M")[i // 2 % 2] for i in range(TRAIN + EVAL)]
BY_SITE = ["patient" if site in ("Oslo", "Turin") else "control" for site in SITE]
COLUMNS: Columns = {"age": AGE, "sex": SEX, "site": SITE}


@pytest.mark.parametrize("classes", [True, False])
def test_the_model_is_a_pipeline_of_scikit_learn(classes: bool) -> None:
    """With missing numbers and texts, and a site that train lacks."""
    columns: Columns = {
        "Age": [None if i % 7 == 3 else age for i, age in enumerate(AGE)],
        "site": [None if i % 9 == 4 else "Rome" if i == TRAIN else site for i, site in enumerate(SITE)],
    }
    noise = RNG.normal(0, 20, TRAIN + EVAL)
    score = [age + 30 * (site == "Oslo") + n for age, site, n in zip(AGE, SITE, noise, strict=True)]
    answers = ["high" if s > 60 else "low" for s in score] if classes else score
    baseline, problem = learned("risk", answers, columns)
    assert baseline.why_not(problem) is None
    (outputs,), (note,) = baseline.answer([problem])
    strength = float(note.partition(" = ")[2].split()[0])
    table = np.array(
        [[np.nan if a is None else a, s or ""] for a, s in zip(columns["Age"], columns["site"], strict=True)], object
    )
    model = make_pipeline(
        ColumnTransformer(
            [
                ("numbers", make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()), [0]),
                ("texts", OneHotEncoder(handle_unknown="ignore"), [1]),
            ]
        ),
        LogisticRegression(C=strength, max_iter=10_000) if classes else Ridge(strength),
    ).fit(table[:TRAIN], problem.targets)
    expected = model.predict_log_proba(table[TRAIN:]) if classes else model.predict(table[TRAIN:])
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert "Age, site" in note


def test_a_task_that_only_the_site_predicts_is_solved() -> None:
    baseline, problem = learned("group", BY_SITE, COLUMNS)
    (outputs,), (note,) = baseline.answer([problem])
    assert [problem.classes[i] for i in outputs.argmax(1)] == BY_SITE[TRAIN:]
    assert "age, sex, site" in note


YOUNG = ["young" if age < 50 else "old" for age in AGE]


@pytest.mark.parametrize(
    ("name", "answers", "used", "reason"),
    [
        ("age", AGE, ["sex", "site"], "is the answer"),
        ("years_regression", AGE, ["sex", "site"], "is the answer"),
        ("months", [12 * age + 1 for age in AGE], ["sex", "site"], "it rises with it"),
        ("sex_classification", ["male" if sex == "M" else "female" for sex in SEX], ["age", "site"], "is the answer"),
        ("man", ["male" if sex == "M" else "female" for sex in SEX], ["age", "site"], "is the answer"),
        ("group", ["yes" if sex == "M" else "no" for sex in SEX], ["age", "site"], "F → no, M → yes"),
        ("decade", YOUNG, ["sex", "site"], "from low to high it is young, old"),
    ],
)
def test_the_answers_own_column_is_left_out(name: str, answers: Sequence[Any], used: list[str], reason: str) -> None:
    baseline, problem = learned(name, answers, COLUMNS)
    about = baseline.features(problem).about
    assert about.startswith(f"{', '.join(used)}; without")
    assert reason in about
    named, problem = learned(name, answers, COLUMNS, covariates=["age", "sex"])
    assert reason != "is the answer" or len(named.features(problem).train.T) == 1


def test_only_columns_of_train_with_several_values_are_used() -> None:
    constant: Columns = {"site": ["Oslo"] * (TRAIN + EVAL), "visit": SEX}
    baseline, problem = learned("group", BY_SITE, constant)
    assert "keeps columns by `keep`" in (baseline.why_not(problem) or "")
    baseline, problem = learned("sex", SEX, {"sex": SEX})
    assert baseline.why_not(problem) == "its metadata has no other column than sex"
    baseline, problem = learned("group", BY_SITE, constant, covariates=["visit", "height"])
    assert baseline.why_not(problem) is None
    (fault,) = baseline.check([problem])
    assert "height: no conversation of train has it in its metadata; expected some of site, visit" in fault


def test_unknown_values_in_a_column_of_numbers_are_missing_and_texts_are_named() -> None:
    """One word must not turn every age into a text, nor a code be an age."""
    answers = [
        "old" if age + noise > 50 else "young" for age, noise in zip(AGE, RNG.normal(0, 8, len(AGE)), strict=True)
    ]
    expected = learned("group", answers, {"age": [None if i % 7 == 0 else age for i, age in enumerate(AGE)]})
    (outputs,), _ = expected[0].answer([expected[1]])
    for unknown in ("missing", -999):
        column: list[Any] = [unknown if i % 7 == 0 else age for i, age in enumerate(AGE)]
        baseline, problem = learned("group", answers, {"age": column})
        (others,), (note,) = baseline.answer([problem])
        np.testing.assert_allclose(others, outputs, rtol=1e-6)
        assert f"age ({unknown} counts as missing, 12 questions)" in note
    baseline, problem = learned("group", answers, {"age": [f"{age}Y" for age in AGE]})
    assert f"age (as {len({*AGE[:TRAIN]})} texts, such as {AGE[0]}Y)" in baseline.answer([problem])[1][0]


def test_refuses_numbers_whose_squares_overflow_and_leaves_out_codes_of_the_answer() -> None:
    ages = [1e300 if i == 3 else age for i, age in enumerate(AGE)]
    baseline, problem = learned("group", BY_SITE, {"age": ages})
    (fault,) = baseline.check([problem])
    assert "3: metadata: age: 1e+300; expected numbers up to 1e+100" in fault
    baseline, problem = learned("group", BY_SITE, {"age": [int(answer == "patient") for answer in BY_SITE]})
    assert baseline.why_not(problem) == "its metadata has no other column than age"
