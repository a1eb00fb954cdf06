"""Metrics against scikit-learn and scipy on random answers, by hand on few, and what cannot be scored."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
import sklearn.metrics
from scipy.special import softmax

from umbrella_jax.cli import main
from umbrella_jax.config.schema import TaskConfig
from umbrella_jax.console import table_lines
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.scoring import bootstrap, metrics, weighted_statistics
from umbrella_jax.scoring.metrics import metric_names, score, tasks_of
from umbrella_jax.scoring.parse_answer import parse_number

Rows = list[dict[str, Any]]
LABELS = ("aged", "child", "teen", "young")


def row(prediction: str, reference: str, subject: str | None = None, **fields: Any) -> dict[str, Any]:
    """A prediction; `task`, and labels of `metadata`, among the fields."""
    top = {key: fields.pop(key) for key in ("task_id", "task_type", "likelihoods") if key in fields}
    metadata = {"task": "sex", "subject_id": subject, **fields}
    return {"task_id": "x", "task_type": "T1", "prediction": prediction, "reference": reference, **top} | {
        "metadata": {key: value for key, value in metadata.items() if value is not None}
    }


def classified(seed: int, classes: int, absent: bool = False) -> Rows:
    """Make 200 answers of 40 subjects, some outside the classes, and likelihoods with many ties."""
    rng = np.random.default_rng(seed)
    labels = LABELS[:classes]
    truths = rng.choice(labels[absent:], 200)
    predictions = np.where(rng.random(200) < 0.4, truths, rng.choice([*labels, "no idea"], 200))
    counts = rng.multinomial(7 - classes, np.full(classes, 1 / classes), 200) + 1  # of 7: on no edge of a tenth
    return [
        row(p, f"{t}.", f"sub-{i % 40}", likelihoods={f"{c.upper()}.": float(np.log(n / 7)) for c, n in by_class})
        for i, (p, t, by_class) in enumerate(
            zip(predictions, truths, [list(zip(labels, c, strict=True)) for c in counts], strict=True)
        )
    ]


@pytest.mark.parametrize(("classes", "absent"), [(2, False), (4, False), (4, True)])
def test_classification_is_scikit_learns(classes: int, absent: bool) -> None:
    rows, labels = classified(classes, classes, absent), list(LABELS[:classes])
    scores = score(rows, tasks_of(rows), resamples=0)
    (task,) = scores.tasks.values()
    assert (task.kind, task.answers) == ("classification", tuple(f"{label}." for label in labels))

    truth = [r["reference"].strip(".") for r in rows]
    answer = [r["prediction"] for r in rows]
    p = softmax([list(r["likelihoods"].values()) for r in rows], axis=1)
    present = sorted(set(truth))
    assert len(present) == classes - absent
    one_hot = np.array(truth)[:, None] == labels
    right, confidence = one_hot[np.arange(200), p.argmax(1)], p.max(1)
    shares, means = sklearn.calibration.calibration_curve(right, confidence, n_bins=10)
    counts = np.histogram(confidence, np.linspace(0, 1, 11))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # answers that no reference is
        expected = {
            "accuracy": sklearn.metrics.accuracy_score(truth, answer),
            "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, answer),
            "f1": sklearn.metrics.f1_score(truth, answer, labels=labels, average="macro"),
            "auroc": np.mean(
                [sklearn.metrics.roc_auc_score(one_hot[:, labels.index(c)], p[:, labels.index(c)]) for c in present]
            ),
            "brier": sklearn.metrics.brier_score_loss(truth, p, labels=labels, scale_by_half=True),
            "ece": np.abs(shares - means) @ counts[counts > 0] / 200,
            "unparsable": np.mean(np.array(answer) == "no idea"),
        }
    assert {name: figure.value for name, figure in scores.task_figures("sex").items()} == pytest.approx(
        expected, abs=1e-12
    )
    if not absent:
        multi = {"multi_class": "ovr", "labels": labels} if classes > 2 else {}
        theirs = sklearn.metrics.roc_auc_score(truth, p if classes > 2 else p[:, 1], **multi)
        assert scores.flat()["auroc/sex"] == pytest.approx(theirs, abs=1e-12)
    confusion = sklearn.metrics.confusion_matrix(truth, answer, labels=[*labels, "no idea"])[:-1]
    assert scores.confusion["sex"] == confusion.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_regression_is_scikit_learns_and_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(20, 70, 100)  # with ties
    answer = truth + rng.integers(-9, 10, 100)
    rows = [
        row(f"about {a} years", f"{t} years", str(i), task="age")
        for i, (a, t) in enumerate(zip(answer, truth, strict=True))
    ]
    tasks = tasks_of(rows)
    assert (tasks["age"].kind, tasks["age"].unit) == ("regression", "years")
    assert score(rows, tasks, resamples=0).flat() == pytest.approx(
        {
            "mae/age": sklearn.metrics.mean_absolute_error(truth, answer),
            "rmse/age": sklearn.metrics.root_mean_squared_error(truth, answer),
            "r2/age": sklearn.metrics.r2_score(truth, answer),
            "pearson/age": scipy.stats.pearsonr(truth, answer).statistic,
            "spearman/age": scipy.stats.spearmanr(truth, answer).statistic,
            "unparsable/age": 0,
        },
        abs=1e-12,
    )


def one_hot(codes: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes + 1)[codes][:, :classes]


@pytest.mark.parametrize(
    ("statistic", "values"),
    [
        (weighted_statistics.mean, lambda rng, n: [rng.normal(size=n)]),
        (
            weighted_statistics.balanced_accuracy,
            lambda rng, n: [one_hot(rng.integers(3, size=n), 3), one_hot(rng.integers(4, size=n), 3)],
        ),
        (
            weighted_statistics.macro_f1,
            lambda rng, n: [one_hot(rng.integers(3, size=n), 3), one_hot(rng.integers(4, size=n), 3)],
        ),
        (
            weighted_statistics.macro_auroc,
            lambda rng, n: [one_hot(rng.integers(3, size=n), 3), rng.integers(9, size=(n, 3))],
        ),
        (weighted_statistics.calibration_error, lambda rng, n: [rng.integers(2, size=n), rng.random(n)]),
        (weighted_statistics.rmse, lambda rng, n: [rng.normal(size=n)]),
        (weighted_statistics.r2, lambda rng, n: [rng.integers(5, size=n), rng.normal(size=n)]),
        (weighted_statistics.pearson, lambda rng, n: [rng.integers(5, size=n), rng.normal(size=n)]),
        (
            lambda w, x, y: weighted_statistics.least_squares(w, np.stack([np.ones(len(x)), x], 1), y)[1],
            lambda rng, n: [rng.normal(size=n), rng.normal(size=n)],
        ),
        (weighted_statistics.spearman, lambda rng, n: [rng.integers(5, size=n), rng.integers(9, size=n)]),
    ],
)
def test_a_weight_is_a_repetition(statistic: Callable[..., Any], values: Callable[..., Any]) -> None:
    """So that what a resample gives is what scikit-learn or scipy would say of the answers that it drew."""
    rng = np.random.default_rng(0)
    arrays, w = values(rng, 60), rng.integers(4, size=(60, 20))
    repeated = [
        statistic(np.ones((weights.sum(), 1)), *(np.repeat(array, weights, axis=0) for array in arrays))[0]
        for weights in w.T
    ]
    assert len(set(repeated)) > 10
    np.testing.assert_allclose(statistic(w.astype(float), *arrays), repeated, rtol=1e-12, atol=1e-12)


def clustered(seed: int = 0) -> Rows:
    """Two tasks about 12 subjects, of each 1 to 5 answers."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for i in range(12):
        for _ in range(rng.integers(1, 6)):
            age = int(rng.integers(20, 80))
            rows.append(row(rng.choice(["male", "female"]), rng.choice(["male", "female"]), f"s{i:02}"))
            rows.append(row(str(age + int(rng.integers(-9, 9))), str(age), f"s{i:02}", task="age"))
    return rows


def test_an_interval_is_that_of_subjects_drawn_one_by_one() -> None:
    rows = clustered()
    scores = score(rows, tasks_of(rows), resamples=60, seed=3)
    samples: dict[str, list[float]] = {"accuracy/sex": [], "f1/sex": [], "spearman/age": []}
    for draw in np.random.default_rng(3).integers(12, size=(60, 12)):
        drawn = [r for i in draw for r in rows if r["metadata"]["subject_id"] == f"s{i:02}"]
        sex, age = (
            [(r["reference"], r["prediction"]) for r in drawn if r["metadata"]["task"] == t] for t in ("sex", "age")
        )
        samples["accuracy/sex"].append(sklearn.metrics.accuracy_score(*zip(*sex, strict=True)))
        samples["f1/sex"].append(sklearn.metrics.f1_score(*zip(*sex, strict=True), average="macro"))
        samples["spearman/age"].append(scipy.stats.spearmanr(*np.array(age, int).T).statistic)
    for name, values in samples.items():
        figure = scores.figures[name]
        assert (figure.low, figure.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-12)
        assert figure.subjects == 12
        assert figure.n == len(rows) // 2


def test_an_interval_counts_subjects_not_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers said nine times over say nothing new of a subject; of other subjects they would. Nor does it depend on
    the order of rows, or how many resamples are worked on at a time."""
    rows = clustered()
    tasks = tasks_of(rows)
    once = score(rows, tasks)
    again = score([r for r in rows for _ in range(9)], tasks)
    others = [
        {**r, "metadata": {**r["metadata"], "subject_id": f"{r['metadata']['subject_id']}-{i}"}}
        for r in rows
        for i in range(9)
    ]
    more = score(others, tasks)
    monkeypatch.setattr(bootstrap, "_CHUNK", 7 * len(rows))
    shuffled = score(rows[::-1], tasks)
    for name, figure in once.figures.items():
        ends = (figure.low, figure.high)
        assert (again.figures[name].low, again.figures[name].high) == pytest.approx(ends, abs=1e-12)
        assert (shuffled.figures[name].low, shuffled.figures[name].high) == pytest.approx(ends, abs=1e-12)
        width, narrower = (f.high - f.low for f in (figure, more.figures[name]))  # type: ignore[operator]
        assert narrower < 0.6 * width or width == 0 == narrower


def test_no_interval_of_one_subject_or_without_resamples() -> None:
    rows = clustered()
    assert all(f.low is f.high is None for f in score(rows, tasks_of(rows), resamples=0).figures.values())
    one = [{**r, "metadata": {**r["metadata"], "subject_id": "s"}} for r in rows]
    found = score(one, tasks_of(one))
    assert all(f.low is f.high is None for f in found.figures.values())
    assert found.figures["accuracy"].subjects == 1


def values(rows: Rows, task: str, **configured: Any) -> dict[str, float | None]:
    tasks = tasks_of(rows, {task: TaskConfig(**configured)})
    return {name: figure.value for name, figure in score(rows, tasks).task_figures(task).items()}


def test_classification_by_hand() -> None:
    """A missing answer is wrong, and an answer that never occurs and is never given counts for nothing."""
    rows = [row("Yes.", "yes", "a"), row("no", "yes", "b"), row("", "yes", "c"), row(" no ", "no.", "d")]
    scores = score(rows, tasks_of(rows, {"sex": TaskConfig(answers=("yes", "no", "maybe"))}))
    assert {name: (f.value, f.chance, f.n, f.subjects) for name, f in scores.task_figures("sex").items()} == {
        "accuracy": (0.5, 0.75, 4, 4),
        "balanced_accuracy": (pytest.approx((1 / 3 + 1) / 2), 0.5, 4, 4),
        "f1": (pytest.approx((1 / 2 + 2 / 3) / 2), pytest.approx(6 / 7 / 2), 4, 4),  # of always yes: 6/7 and 0
        "unparsable": (0.25, None, 4, 4),
    }
    # columns: maybe, no, yes, none of them
    assert scores.confusion["sex"] == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    assert any("1 of 4 answers are none of maybe, no, yes" in note for note in scores.notes)


def test_likelihoods_by_hand() -> None:
    rows = [
        row("yes", truth, str(i), likelihoods={"no": np.log(1 - p), "yes": np.log(p)})
        for i, (truth, p) in enumerate([("yes", 0.85), ("yes", 0.55), ("no", 0.55), ("no", 0.15)])
    ]
    scores = score(rows, tasks_of(rows))
    of = scores.task_figures("sex")
    assert of["auroc"].value == pytest.approx(3.5 / 4)  # one tie among four pairs
    assert of["brier"].value == pytest.approx((0.15**2 + 0.45**2 + 0.55**2 + 0.15**2) / 4)
    assert of["ece"].value == pytest.approx(
        (2 * 0.15 + 2 * 0.05) / 4
    )  # two of 0.85, both right; two of 0.55, one right
    assert (of["auroc"].chance, of["brier"].chance, of["ece"].chance) == (0.5, 0.25, None)


def test_one_class_absent() -> None:
    rows = [row(p, "yes", p, likelihoods={"no": -1.0, "yes": -0.5}) for p in ("yes", "no")]
    assert values(rows, "sex", answers=("yes", "no")) == pytest.approx(
        {"accuracy": 0.5, "balanced_accuracy": 0.5, "f1": (2 / 3 + 0) / 2, "auroc": None, "unparsable": 0}
        | {"brier": (1 - softmax([-1, -0.5])[1]) ** 2, "ece": 1 - softmax([-1, -0.5])[1]}
    )


def compared(answers: str = "{}", **labels: str) -> Rows:
    """Five comparisons: of a with a man and two women, of b with a man and a woman."""
    pairs = [
        ("a", "male", "male", "male"),
        ("a", "male", "female", "female"),
        ("a", "male", "female", ""),
        ("b", "female", "male", "female"),
        ("b", "female", "female", "female"),
    ]
    return [
        row(
            answers.format(answer) if answer else "",
            answers.format(own),
            subject,
            task_type="T3",
            subject_label=labels.get(own, own),
            reference_label=labels.get(reference, reference),
            comparison_type="same" if own == reference else "different",
        )
        for subject, own, reference, answer in pairs
    ]


def with_references(rows: Rows, *labels: str) -> Rows:
    """Return comparisons with further references before the last one."""
    metadata = [dict(r["metadata"]) for r in rows]
    lists = [{"reference_labels": [*labels, m.pop("reference_label")]} for m in metadata]
    return [r | {"metadata": m | own} for r, m, own in zip(rows, metadata, lists, strict=True)]


@pytest.mark.parametrize("spelled", ["plain", "in a sentence", "several references"])
def test_comparison_by_hand(spelled: str) -> None:
    rows = compared("They are {}.", male="M", female="F") if spelled == "in a sentence" else compared()
    female, male = ("they are female", "they are male") if spelled == "in a sentence" else ("female", "male")
    if spelled == "several references":  # the last one counts
        rows = with_references(rows, "female", "male", "male")
    scores = score(rows, tasks_of(rows))
    assert scores.tasks["sex"].kind == "comparison"
    of = scores.task_figures("sex")
    assert {name: (f.value, f.chance, f.n) for name, f in of.items()} == {
        "accuracy": (0.6, 0.6, 5),  # chance: male for a man as reference, or female; male for a woman
        "accuracy/same": (1, 0.5, 2),
        "accuracy/different": (pytest.approx(1 / 3), pytest.approx(2 / 3), 3),
        f"accuracy/reference={female}": (pytest.approx(1 / 3), pytest.approx(2 / 3), 3),
        f"accuracy/reference={male}": (1, 0.5, 2),
        "balanced_accuracy": (pytest.approx((1 / 3 + 1) / 2), 0.5, 5),
        "f1": (pytest.approx((2 / 4 + 4 / 5) / 2), pytest.approx(0.75 / 2), 5),
        "copy_rate": (0.6, pytest.approx((1 * 2 + 3 * 3) / 25), 5),  # of 1, 3 answers and 2, 3 references
        "copy_rate/different": (pytest.approx(1 / 3), pytest.approx(2 * 2 / 9), 3),
        # subject a: one right answer in a tie of three, none of them blank; subject b: two of two
        "vote_accuracy": (pytest.approx((1 / 3 + 1) / 2), 0.5, 2),
        "unparsable": (0.2, None, 5),
    }
    assert of["vote_accuracy"].subjects == 2


def test_regression_by_hand() -> None:
    """An answer without a number is as far off as the references reach, and correlates with nothing; tied answers share
    their rank."""
    pairs = [("20 years", 20), ("25", 30), ("forty years", 40), ("60 years.", 60)]
    rows = [row(p, f"{t} years", str(t), task="age") for p, t in pairs]
    scores = score(rows, tasks_of(rows, {"age": TaskConfig(kind="regression")}))
    assert {name: (f.value, f.chance) for name, f in scores.task_figures("age").items()} == {
        "mae": (pytest.approx((5 + 20) / 4), 12.5),
        "rmse": (pytest.approx(np.sqrt(425 / 4)), pytest.approx(np.sqrt(875 / 4))),
        "r2": (pytest.approx(1 - 425 / 875), 0),
        "pearson": (pytest.approx(np.corrcoef([20, 30, 60], [20, 25, 60])[0, 1]), 0),
        "spearman": (pytest.approx(1), 0),
        "unparsable": (0.25, None),
    }
    assert (scores.task_figures("age")["pearson"].n, scores.task_figures("age")["mae"].n) == (3, 4)
    assert any("1 of 4 answers are not a number (years)" in note for note in scores.notes)
    tied = [{**r, "prediction": p} for r, p in zip(rows, ["20", "25", "60", "60"], strict=True)]
    ranks = values(tied, "age", kind="regression")["spearman"]
    assert ranks == pytest.approx(4.5 / np.sqrt(5 * 4.5))  # ranks 1, 2, 3, 4 and 1, 2, 3.5, 3.5
    same = values([{**r, "prediction": "0.1"} for r in rows], "age", kind="regression")
    assert same["pearson"] is same["spearman"] is None
    assert same["mae"] == pytest.approx(37.4)


@pytest.mark.parametrize("said", [0, 1, 2])
def test_silence_correlates_with_nothing(said: int) -> None:
    """The ends of the range that replace missing answers depend on the truth: with them, 40 blanks had -0.87."""
    rows = [row("25" if i < said else "I do not know", str(i), f"{i}", task="age") for i in range(40)]
    found = score(rows, tasks_of(rows, {"age": TaskConfig(kind="regression")})).task_figures("age")
    for name in ("pearson", "spearman"):
        assert (found[name].value, found[name].n) == (None, said)
    assert found["mae"].n == found["unparsable"].n == 40


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_an_interval_is_never_without_width(share: float) -> None:
    """If all resamples agree, a share has the exact binomial interval of its number of subjects; other figures have
    none."""
    rows = [row("female" if a < 2 * share else "male", "female", f"{i}") for i in range(40) for a in range(2)]
    figures = score(rows, tasks_of(rows, {"sex": TaskConfig(answers=("female", "male"))})).figures
    exact = scipy.stats.binomtest(round(40 * share), 40).proportion_ci(method="exact")
    assert (figures["accuracy/sex"].low, figures["accuracy/sex"].high) == pytest.approx(
        (exact.low, exact.high), abs=1e-12
    )
    assert (exact.low, exact.high) == pytest.approx(
        {0: (0, 0.088), 0.5: (0.338, 0.662), 1: (0.912, 1)}[share], abs=1e-3
    )
    assert figures["balanced_accuracy/sex"].value == share
    assert figures["balanced_accuracy/sex"].low is figures["balanced_accuracy/sex"].high is None


@pytest.mark.parametrize("constant", [True, False])
def test_figures_without_a_spread(constant: bool) -> None:
    """Perfect answers: no interval for an error of 0. Constant references, or one class: undefined, not perfect."""
    rows = [row(str(t := 30 if constant else 20 + i), str(t), f"{i}", task="age") for i in range(12)]
    age = score(rows, tasks_of(rows, {"age": TaskConfig(kind="regression")})).task_figures("age")
    assert {name: figure.value for name, figure in age.items()} == {
        "mae": 0,
        "rmse": 0,
        **dict.fromkeys(("r2", "pearson", "spearman"), None if constant else pytest.approx(1)),
        "unparsable": 0,
    }
    assert all(figure.low is None for name, figure in age.items() if name != "unparsable")
    one_class = [row("a", "a", f"{i}", likelihoods={"a": -1.0, "b": -2.0}) for i in range(12)]
    assert score(one_class, tasks_of(one_class)).figures["auroc/sex"].value is None


def test_over_tasks() -> None:
    """Accuracy pools all answers; macro averages weigh tasks equally; metrics with a unit are not averaged."""
    rows = [row("yes", "yes", "a"), row("no", "yes", "b"), row("no", "no", "c"), row("", "no", "d")]
    rows += [row("x", "x", "a", task="side"), row("x", "x", "e", task="side"), row("y", "z", "e", task="side")]
    rows += [row(str(i), str(i), "a", task="age") for i in range(20)]
    scores = score(rows, tasks_of(rows))
    overall = scores.overall()
    assert overall.keys() == {"accuracy", "macro/accuracy", "macro/balanced_accuracy", "macro/f1"}
    assert (overall["accuracy"].value, overall["accuracy"].n) == (pytest.approx(4 / 7), 7)
    assert overall["accuracy"].chance == pytest.approx((2 + 2) / 7)
    assert (overall["macro/accuracy"].value, overall["macro/accuracy"].n) == (pytest.approx((1 / 2 + 2 / 3) / 2), 7)
    assert (overall["macro/accuracy"].subjects, overall["macro/accuracy"].chance) == (
        5,
        pytest.approx((1 / 2 + 2 / 3) / 2),
    )
    assert overall["macro/accuracy"].low < overall["macro/accuracy"].value < overall["macro/accuracy"].high  # type: ignore[operator]


@pytest.mark.parametrize("likelihoods", [False, True])
def test_the_names_are_known_before(likelihoods: bool) -> None:
    rows = [*classified(0, 4), *(r | {"metadata": r["metadata"] | {"task": "pairs"}} for r in compared())]
    rows += [row(f"{i} mm", f"{i} mm", str(i), task="volume") for i in range(20)]
    rows += [row(f"a report {i}", f"a report {i}", str(i), task="report") for i in range(20)]
    for r in rows[:200]:
        if not likelihoods:
            del r["likelihoods"]
    for r in rows[200:205]:
        if likelihoods:
            r["likelihoods"] = {"male": -1, "female": -2}
    tasks = tasks_of([{k: v for k, v in r.items() if k != "prediction"} for r in rows])
    assert {name: task.kind for name, task in tasks.items()} == {
        "sex": "classification",
        "pairs": "comparison",
        "volume": "regression",
        "report": "text",
    }
    names = metric_names(tasks, likelihoods=likelihoods)
    assert list(score(rows, tasks, resamples=0).flat()) == names
    assert {"accuracy", "macro/accuracy", "accuracy/report", "mae/volume", "accuracy/pairs/reference=male"} <= set(
        names
    )
    assert ("auroc/sex" in names) is ("macro/ece" in names) is likelihoods


@pytest.mark.parametrize(
    ("text", "unit", "number"),
    [
        ("27", None, 27),
        ("27.", "years", 27),
        ("27.5 years", "years", 27.5),
        ("The subject is about 27 years old.", "years", 27),
        ("A 27-year-old man", "years", 27),
        ("27years", "years", 27),
        ("27 Year", "years", 27),
        ("Age: 27, female", "years", 27),
        ("27 or 27.0", None, 27),
        ("-3.5", None, -3.5),
        ("\N{MINUS SIGN}3.5 %", "%", -3.5),
        ("+.5", None, 0.5),
        ("1e-3", None, 1e-3),
        ("3,5 years", "years", 3.5),
        ("0,125", None, 0.125),
        ("2.5 kg/m2", "kg/m2", 2.5),
        ("The T1 scan at 3T says 27", None, 27),
        ("27 apples", None, 27),
        ("", "years", None),
        ("unknown", None, None),
        ("twenty-seven", "years", None),
        ("324 months", "years", None),
        ("27 years and 3 months", None, None),
        ("27 or 28", None, None),
        ("20-30", None, None),
        ("20 \N{EN DASH} 30 years", "years", None),
        ("27 ± 3", None, None),
        ("1,234", None, None),
        ("1,234.5", None, None),
        ("12.05.2020", None, None),
        ("12.05.2020: 27", None, None),
        ("1e999", None, None),
        ("T1", None, None),
        ("27½", None, None),
        ("27²", None, None),
    ],
)
def test_numbers_in_text(text: str, unit: str | None, number: float | None) -> None:
    assert parse_number(text, unit) == number


MANY = [str(i / 2) for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "configured", "kind"),
    [
        ([row("", r) for r in ("male.", "Male", "female")], {}, "classification"),
        ([row("", r, subject_label=r) for r in ("site a", "site b")], {}, "classification"),
        ([row("", r, subject_label=f"label {r}") for r in "abcdefghijkl"], {}, "text"),
        ([row("", r, subject_label=r.upper()) for r in "abcdefghijkl"], {}, "classification"),
        ([row("", f"A report of {r}.") for r in "ab"], {}, "text"),
        ([row("", r) for r in "0123401234"], {}, "classification"),
        ([row("", r) for r in MANY], {}, "regression"),
        ([row("", f"{r} mm.") for r in MANY], {}, "regression"),
        ([row("", f"site {r}") for r in MANY], {}, "text"),
        ([row("", f"It is {r} years old.", subject_label=float(r)) for r in MANY], {}, "regression"),
        ([row("", "", subject_label=float(r)) for r in MANY], {}, "regression"),
        ([row("", "", subject_label=r) for r in ("left", "right", "right")], {}, "classification"),
        (compared(), {}, "comparison"),
        (compared()[:1], {}, "comparison"),
        (compared(), {"kind": "classification"}, "classification"),
        # whether two are alike is not the label of either
        ([r | {"reference": r["metadata"]["comparison_type"]} for r in compared()], {}, "classification"),
        ([row("", r) for r in "ab"], {"answers": ("a", "b")}, "classification"),
        ([row("", r) for r in "12"], {"unit": "mm"}, "regression"),
        ([row("", r) for r in MANY], {"kind": "text"}, "text"),
        ([row("", r) for r in MANY], {"kind": "report"}, "report"),
        (
            [row("", r) for r in "ab"],
            {"findings": str(metrics.__file__).replace("metrics.py", "findings.yaml")},
            "report",
        ),
        ([row("", r, kind="report") for r in MANY], {}, "report"),
        # as those say who asked: of few subjects, numbers look like labels; of many sites, labels like numbers
        ([row("", r, subject_label=float(r), kind="regression") for r in MANY[:5]], {}, "regression"),
        ([row("", r, subject_label=r, kind="classification") for r in MANY], {}, "classification"),
        ([row("", r, kind="classification") for r in MANY], {"kind": "regression"}, "regression"),
        ([row("", r, kind="classification") for r in MANY], {"unit": "mm"}, "regression"),
        ([row("", r, kind="regression") for r in "ab"], {"answers": ("a", "b")}, "classification"),
        ([row("", r, kind=["of mine"]) for r in MANY], {}, "regression"),
        ([row("", MANY[0]), *(row("", r, kind="classification") for r in MANY)], {}, "regression"),
    ],
)
def test_the_kind_of_a_task(rows: Rows, configured: dict[str, Any], kind: str) -> None:
    assert tasks_of(rows, {"sex": TaskConfig(**configured)})["sex"].kind == kind


def test_answers_are_spelled_as_the_references_are() -> None:
    """Since their likelihoods are asked for."""
    rows = [
        row("", r, reference_label="Other", subject_label=r.strip(".")) for r in ("male.", "male.", "Male.", "female.")
    ]
    assert tasks_of(rows)["sex"].answers == ("female.", "male.", "other.")
    configured = {"sex": TaskConfig(kind="classification", answers=("FEMALE", "MALE", "X"))}
    assert tasks_of(rows, configured)["sex"].answers == ("female.", "male.", "X")


def test_only_the_configured_metrics() -> None:
    rows = compared()
    names = metric_names(tasks_of(rows, {"sex": TaskConfig(metrics=("vote_accuracy",))}))
    assert names == ["vote_accuracy/sex", "unparsable/sex"]


SEX = [row("a", "a", "s1", task_id="one"), row("b", "b", "s2", task_id="two"), row("b", "b", "s2", task_id="three")]


@pytest.mark.parametrize(
    ("rows", "configured", "error", "message"),
    [
        ([], {}, DataError, "no answers to score"),
        ([r | {"reference": ""} for r in SEX], {}, DataError, "task sex: none of its 3 conversations has a reference"),
        ([SEX[0], SEX[1] | {"reference": " "}], {}, DataError, "task sex: two: no reference; expected the last answer"),
        (SEX, {"answers": ("a", "c")}, DataError, "task sex: two: reference 'b': expected one of a, c"),
        (SEX, {"kind": "regression"}, DataError, "task sex: one: reference 'a': expected a number"),
        (SEX, {"unit": "mm"}, DataError, "task sex: three: reference 'b': expected a number (mm)"),
        (SEX, {"kind": "comparison"}, DataError, "task sex: one: metadata.reference_label: missing"),
        (
            [r | {"metadata": r["metadata"] | {"reference_label": "other"}} for r in compared()],
            {"answers": ("male", "female")},
            DataError,
            "metadata.reference_label 'other': expected one of female, male",
        ),
        (
            with_references(compared(), "male", "other"),
            {"answers": ("male", "female")},
            DataError,
            "metadata.reference_labels: 'other': expected one of female, male",
        ),
        (
            [r | {"metadata": r["metadata"] | {"comparison_type": "same"}} for r in compared()],
            {},
            DataError,
            "metadata.comparison_type is same, of 'female' and 'male'",
        ),
        (
            [
                row("", "yes", subject_label="m"),
                row("", "no", subject_label="m"),
                row("", "", task_id="blank", subject_label="m"),
            ],
            {},
            DataError,
            "task sex: no reference: blank; metadata.subject_label cannot replace it",
        ),
        (
            SEX,
            {"metrics": ("mae",)},
            ConfigError,
            "evaluation.tasks.sex.metrics: mae: a classification has none; expected some of acc",
        ),
        (SEX, {"answers": ("a", "b", "A.")}, ConfigError, "evaluation.tasks.sex.answers: a: listed several times"),
        (
            [*compared(), row("", "a", task="sex/same")],
            {},
            ConfigError,
            "two figures would be called accuracy/sex/same",
        ),
    ],
)
def test_refuses_rows_and_tasks_that_cannot_be_scored(
    rows: Rows, configured: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Tasks are checked before there is any prediction."""
    asked = [{k: v for k, v in r.items() if k != "prediction"} for r in rows]
    tasks = {"sex": TaskConfig(**configured)} if configured else {}
    with pytest.raises(error) as raised:
        tasks_of(asked, tasks)
    assert any(message in fault for fault in raised.value.faults), raised.value.faults


def test_faults_of_several_tasks_come_together() -> None:
    rows = [*SEX, row("", "", task="age", task_id="four")]
    with pytest.raises(DataError) as raised:
        tasks_of(rows, {"sex": TaskConfig(metrics=("mae", "r2")), "sx": TaskConfig()})
    assert [fault.split(":")[0] for fault in raised.value.faults] == [
        "evaluation.tasks.sx",
        "task age",
        "evaluation.tasks.sex.metrics",
        "evaluation.tasks.sex.metrics",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "text", "answers": ("a", "b")}, "answers: a text has none"),
        ({"kind": "classification", "unit": "mm"}, "unit: a classification has none"),
        ({"answers": ("a", "b"), "unit": "mm"}, "answers and unit"),
        ({"kind": "text", "findings": "words.yaml"}, "findings: a text has none"),
        ({"unit": "mm", "findings": "words.yaml"}, "unit and findings"),
        ({"answers": ("a",)}, "answers: expected at least two"),
        ({"unit": " "}, "unit: expected a word"),
        ({"metrics": ()}, "metrics: expected at least one"),
    ],
)
def test_refuses_contradictory_tasks(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskConfig(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": None}, "two: prediction: expected a string, got None"),
        ({"reference": "c"}, "two: reference 'c': expected one of a, b"),
        ({"metadata": {"task": "side"}}, "task side: 1 answers to none of the tasks sex"),
        ({"likelihoods": {"a": -1.0, "b": -1.0}}, "1 of 3 answers have likelihoods; expected all or none"),
        ({"likelihoods": {"a": -1.0, "c": -1.0}}, "two: likelihoods of a, c; expected of a, b"),
        ({"likelihoods": {"a": -1.0, "b": float("nan")}}, "two: likelihoods: expected finite numbers"),
    ],
)
def test_answers_that_cannot_be_scored(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        score([SEX[0], SEX[1] | change, SEX[2]], tasks_of(SEX))
    assert any(message in fault for fault in raised.value.faults), raised.value.faults
    with pytest.raises(DataError, match="task sex: no answers"):
        score([], tasks_of(SEX))


def test_a_subject_is_known_by_its_id_or_by_the_task_id() -> None:
    rows = [row("a", "a", "sub-1"), row("a", "b", "1"), row("b", "b", task_id="1"), row("a", "a", task_id="2")]
    found = score(rows, tasks_of(rows))
    assert found.figures["accuracy"].subjects == 3
    assert (
        found.notes[0]
        == "95 % intervals: 1000 resamples of subjects; subjects by subject_id (2 answers) and task_id (2 answers)."
    )


def test_the_nan_of_pandas_counts_as_missing() -> None:
    """Neither a label of its own nor a subject."""
    nan = float("nan")
    rows = [row("a", "a", task_id="1", subject_label=nan), row("b", "b", task_id="2")]
    for each in rows:
        each["metadata"]["subject_id"] = nan
    assert score(rows, tasks_of(rows)).figures["accuracy"].subjects == 2
    with pytest.raises(DataError, match="task sex: 3: no reference"):
        tasks_of([*rows, row("a", "", task_id="3", subject_label=nan)])


def test_letters_of_two_signs_are_one() -> None:
    """Tokenizers normalise to NFC, so a model cannot answer in the other spelling."""
    composed, decomposed = "M\N{LATIN SMALL LETTER U WITH DIAERESIS}ller", "Mu\N{COMBINING DIAERESIS}ller"
    assert composed != decomposed
    rows = [row(composed, decomposed, "1"), row("b", "b", "2"), row("b", composed, "3")]
    assert score(rows, tasks_of(rows), resamples=0).figures["accuracy"].value == pytest.approx(2 / 3)


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *classified(0, 4),
        *(r | {"metadata": r["metadata"] | {"task": "pairs of " * 12}} for r in compared("It is {0}" * 9)),
    ]
    rows += [row("1" * i, str(i), task="age") for i in range(1, 30)]
    rows += [row("a", "a", task="\x1b[2J")]
    file = str(write(tmp_path / "answers.jsonl", rows))
    assert main(["score", file]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out, "a terminal is not steered by a task's name"
    figure = score(rows, tasks_of(rows)).figures["auroc/sex"]
    assert f"  auroc{figure.value:>30.3f}" in out
    assert f"{figure.low:.3f} to {figure.high:.3f}    200       40  0.500" in out
    assert main(["score", file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tasks"]["sex"]["figures"]["auroc"] == {
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "n": 200,
        "subjects": 40,
        "chance": 0.5,
    }
    assert report["tasks"]["sex"]["answers"] == list(LABELS)


def test_the_command_reads_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(tmp_path / "answers.jsonl", SEX))
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {modalities: {T1: {size: [4, 4, 4], patch: [2, 2, 2]}}}\n"
        "evaluation: {tasks: {sex: {answers: [a, b, c], metrics: [accuracy]}}, resamples: 0}\n"
    )
    assert main(["score", file, "--json", "--config", str(config)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["resamples"], report["tasks"]["sex"]["answers"]) == (0, ["a", "b", "c"])
    assert report["tasks"]["sex"]["figures"].keys() == {"accuracy", "unparsable"}
    for old, new, message in [
        ("accuracy", "acuracy", "evaluation.tasks.sex.metrics.0: expected one of 'accuracy', 'balanced_accuracy'"),
        ("answers", "anwers", "evaluation.tasks.sex.anwers: no such key; expected one of kind, answers, unit, "),
        ("[a, b, c]", "[a]", "evaluation.tasks.sex: answers: expected at least two, got 1"),
        ("resamples: 0", "resamples: -1", "evaluation: resamples: expected 0 or more, got -1"),
    ]:
        bad = tmp_path / "bad.yaml"
        bad.write_text(config.read_text().replace(old, new))
        assert main(["score", file, "--config", str(bad)]) == 2
        assert message in capsys.readouterr().err


def test_an_answer_that_was_cut_off_on_its_way_is_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row("left", "left side", "1"),
        row("left si", "left side", "2", task_id="c"),
        row("right", "left side", "3"),
    ]
    for given, code in ([rows, 0], [[{**r, "cut": True} for r in rows[1:]], 2], [[{**rows[0], "cut": 1}], 2]):
        assert main(["score", str(write(tmp_path / "rows.jsonl", given))]) == code
    error_text = capsys.readouterr().err
    assert (
        "task sex: c: max_new_tokens cut the answer 'left si' off before it could be 'left side'; predict again"
        in error_text
    )
    assert "cut: expected true or false" in error_text


def test_the_command_takes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its newest predictions, by its own config."""
    (tmp_path / "config.yaml").write_text(
        "model: {modalities: {T1: {size: [4, 4, 4], patch: [2, 2, 2]}}}\nevaluation: {resamples: 0}\n"
    )
    assert main(["score", str(tmp_path)]) == 2
    assert "no predictions; expected an evaluated run" in capsys.readouterr().err
    (tmp_path / "predictions").mkdir()
    for step in (9, 10):
        write(tmp_path / "predictions" / f"step_{step}.jsonl", SEX[: step - 7])
    assert main(["score", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/predictions/step_10.jsonl (the newest)\n\n")
    assert "No intervals: no resamples" in out
    assert main(["score", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["accuracy"]["n"] == 3


def test_several_files_are_scored_as_one_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Out-of-fold answers: intervals and chance of all together, and each conversation once."""
    rows = classified(0, 3)
    for i, r in enumerate(rows):
        r["task_id"] = f"t{i}"
    folds = [str(write(tmp_path / f"{fold}.jsonl", rows[fold::3])) for fold in range(3)]
    assert metrics.pool_predictions(folds) == [*rows[::3], *rows[1::3], *rows[2::3]]
    assert main(["score", *folds, "--json"]) == 0
    pooled, whole = json.loads(capsys.readouterr().out), score(rows, tasks_of(rows)).task_figures("sex")
    for name, figure in pooled["tasks"]["sex"]["figures"].items():
        assert figure == pytest.approx(asdict(whole[name]), abs=1e-12)
    twice = str(write(tmp_path / "twice.jsonl", [rows[0], rows[3], {**rows[6], "task_id": "other"}]))
    assert main(["score", *folds, twice]) == 2
    message = f"{twice}: 2 conversations also in {folds[0]} (t0, t3); expected each in one file"
    assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match="given twice; name each file once"):
        metrics.pool_predictions([folds[0], folds[0]])


def test_runs_that_score_otherwise_are_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for fold in range(2):
        runs.append(str(tmp_path / f"fold-{fold}"))
        (tmp_path / f"fold-{fold}" / "predictions").mkdir(parents=True)
        (tmp_path / f"fold-{fold}" / "config.yaml").write_text(
            f"model: {{modalities: {{T1: {{size: [4, 4, 4], patch: [2, 2, 2]}}}}}}\nevaluation: {{resamples: {fold}}}\n"
        )
        write(tmp_path / f"fold-{fold}" / "predictions" / "step_1.jsonl", [SEX[fold], SEX[2]][: 2 - fold])
    assert main(["score", *runs]) == 2
    assert f"{runs[1]}: other settings of evaluation than in {runs[0]}" in capsys.readouterr().err
    assert main(["score", *runs, "--config", f"{runs[0]}/config.yaml"]) == 0
    out = capsys.readouterr().out
    assert all(f"{run}/predictions/step_1.jsonl (the newest)\n" in out for run in runs)
    assert "No intervals: no resamples" in out


def test_columns_stay_apart() -> None:
    """Columns stay apart even with the widest interval."""
    found = metrics.Figure(5.49e-07, 2.78e-11, 2.05e-06, 5, 4, 0.24)
    (line,) = table_lines(metrics.figure_rows({"brier": found}), metrics.COLUMNS)
    assert line.split() == ["brier", "5.49e-07", "2.78e-11–2.05e-06", "5", "4", "0.240"]
    assert len(line) == 80


def test_the_command_names_every_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"task_id": "a", "prediction": null, "reference": "x"}\n\n{"task_id"\n[]\n')
    assert main(["score", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}:1: prediction: expected a string, got nothing" in err
    assert f"{file}:3: not valid JSON" in err
    assert f"{file}:4: expected a prediction, an object, got a list" in err
    assert main(["score", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: not found" in capsys.readouterr().err
