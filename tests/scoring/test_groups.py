"""Scores by group: against scikit-learn per group, and gaps against a bootstrap written out."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from umbrella_jax.cli import main
from umbrella_jax.errors import DataError
from umbrella_jax.scoring.groups import MAX_GROUPS, score_groups
from umbrella_jax.scoring.metrics import score, tasks_of

Rows = list[dict[str, Any]]


def row(prediction: str, reference: str, subject: object, task: str = "side", **metadata: Any) -> dict[str, Any]:
    own = {"task": task, "subject_id": f"s{subject:>02}", **metadata}
    fields = {"task_id": f"{subject}-{prediction}", "task_type": "T1", "prediction": prediction, "reference": reference}
    return fields | {"metadata": own}


def visits(subjects: int = 24, seed: int = 0) -> Rows:
    """Two visits of each subject, with two tasks each; the second visit may be in another age bin."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(subjects):
        for visit in range(2):
            age = 40 + i + 9 * visit
            person: dict[str, Any] = {"sex": "F" if i % 3 else "M", "age": age, "age_bin": "<50" if age < 50 else "50+"}
            side, answer = rng.choice(["left", "right"], 2)
            likelihood = float(rng.uniform(0.05, 0.95))
            likelihoods = {"left": np.log(likelihood), "right": np.log1p(-likelihood)}
            rows.append(row(str(answer), str(side), i, **person) | {"likelihoods": likelihoods})
            rows.append(row(f"{age + rng.normal() * 5:.2f}", f"{age:.1f}", i, "age", **person))
    return rows


def column(rows: Rows, name: str) -> np.ndarray:
    return np.array([r["metadata"][name] if name in r["metadata"] else r[name] for r in rows])


def select(rows: Rows, **values: str) -> Rows:
    return [r for r in rows if all(r["metadata"][name] == value for name, value in values.items())]


@pytest.mark.parametrize("by", ["sex", "age_bin"])
def test_each_group_has_scikit_learns_values(by: str) -> None:
    rows = visits()
    grouped = score_groups(rows, tasks_of(rows), [by], resamples=0)
    for name in set(column(rows, by)):
        own = select(rows, **{by: name})
        sides, ages = select(own, task="side"), select(own, task="age")
        truth, answer = column(sides, "reference"), column(sides, "prediction")
        is_right, share = truth == "right", np.exp([r["likelihoods"]["right"] for r in sides])
        age, given = column(ages, "reference").astype(float), column(ages, "prediction").astype(float)
        expected = {
            "accuracy/side": sklearn.metrics.accuracy_score(truth, answer),
            "balanced_accuracy/side": sklearn.metrics.balanced_accuracy_score(truth, answer),
            "f1/side": sklearn.metrics.f1_score(truth, answer, average="macro"),
            "auroc/side": sklearn.metrics.roc_auc_score(is_right, share),
            "brier/side": sklearn.metrics.brier_score_loss(is_right, share),
            "mae/age": sklearn.metrics.mean_absolute_error(age, given),
            "r2/age": sklearn.metrics.r2_score(age, given),
            "pearson/age": scipy.stats.pearsonr(age, given).statistic,
            "spearman/age": scipy.stats.spearmanr(age, given).statistic,
        }
        figures = {figure: values.groups[name] for figure, values in grouped.columns[by].figures.items()}
        assert {figure: figures[figure].value for figure in expected} == pytest.approx(expected, abs=1e-12)
        assert figures["accuracy/side"].chance == max(is_right.mean(), 1 - is_right.mean())
        assert figures["mae/age"].chance == pytest.approx(np.abs(age - np.median(age)).mean())
        assert grouped.columns[by].counts[name] == (len(own), len(set(column(own, "subject_id"))))
    assert len(figures) == 13  # 7 of sides, 6 of ages; none over tasks, which groups may not share


def drawn_differences(rows: Rows, by: str, resamples: int, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Draw subjects one by one; return {pair of groups: differences of accuracy}."""
    sides = select(rows, task="side")
    right, group = column(sides, "reference") == column(sides, "prediction"), column(sides, by)
    subject = column(sides, "subject_id")
    subjects, names = sorted(set(subject)), sorted(set(group))
    found: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.permutations(names, 2)}
    for draw in np.random.default_rng(seed).integers(len(subjects), size=(resamples, len(subjects))):
        drawn = np.concatenate([np.flatnonzero(subject == subjects[i]) for i in draw])
        accuracy = {name: right[drawn][group[drawn] == name].mean() for name in names}
        for one, other in found:
            found[one, other].append(accuracy[one] - accuracy[other])
    return {pair: np.array(values) for pair, values in found.items()}


def test_a_gap_draws_a_subject_for_both_groups_at_once() -> None:
    rows = visits()
    gap = (
        score_groups(rows, tasks_of(rows), ["age_bin"], resamples=60, seed=4)
        .columns["age_bin"]
        .figures["accuracy/side"]
        .gap
    )
    assert gap
    differences = drawn_differences(rows, "age_bin", 60, 4)[gap.highest, gap.lowest]
    assert (gap.low, gap.high) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-12)
    sides = select(rows, task="side")
    accuracy = {
        name: np.mean([r["reference"] == r["prediction"] for r in select(sides, age_bin=name)])
        for name in ("<50", "50+")
    }
    assert gap.value == pytest.approx(accuracy[gap.highest] - accuracy[gap.lowest])
    assert gap.value >= 0


def test_the_interval_of_a_gap_holds_for_all_pairs() -> None:
    rows = [r | {"metadata": r["metadata"] | {"site": f"site {i // 2 % 4}"}} for i, r in enumerate(visits(40))]
    gap = (
        score_groups(rows, tasks_of(rows), ["site"], resamples=80, seed=1).columns["site"].figures["accuracy/side"].gap
    )
    assert gap
    assert gap.pairs == 6
    differences = drawn_differences(rows, "site", 80, 1)
    low, high = np.percentile(np.array(list(differences.values())), [2.5, 97.5], axis=1)
    middle, half = (low + high) / 2, (high - low) / 2
    widening = np.percentile((abs(np.array(list(differences.values())) - middle[:, None]) / half[:, None]).max(0), 95)
    assert widening > 1.1
    at = list(differences).index((gap.highest, gap.lowest))
    assert (gap.low, gap.high) == pytest.approx((middle[at] - widening * half[at], middle[at] + widening * half[at]))


def test_a_group_without_a_value_is_missing() -> None:
    rows = visits()
    for i, absent in ((0, None), (2, float("nan")), (4, "  ")):
        rows[i]["metadata"]["sex"] = absent
    del rows[6]["metadata"]["sex"]
    for r in rows[:8:2]:
        r["prediction"] = r["reference"]  # the best group, but no group of people
    grouped = score_groups(rows, tasks_of(rows), ["sex"], resamples=50)
    assert list(grouped.columns["sex"].counts) == ["F", "M", "missing"]
    assert grouped.columns["sex"].counts["missing"] == (4, 2)
    assert sum(n for n, _ in grouped.columns["sex"].counts.values()) == len(rows)
    gap = grouped.columns["sex"].figures["accuracy/side"].gap
    assert gap
    assert {gap.highest, gap.lowest} == {"F", "M"}
    assert any("4 answers of 2 subjects without a value" in note for note in grouped.notes)


def test_groups_are_named_after_values_and_sorted_by_number() -> None:
    values = [10, 2.0, "2", 2, "below 5", " 10 ", True, 10**20, "9" * 90, "e\u0301", "\u00e9"]
    rows = [row("a", "ab"[i % 2], i, site=value) for i, value in enumerate(values)]
    counts = score_groups(rows, tasks_of(rows), ["site"], resamples=0).columns["site"].counts
    assert counts == {
        "below 5": (1, 1),
        "2": (3, 3),
        "10": (2, 2),
        "9" * 90: (1, 1),
        "1" + "0" * 20: (1, 1),
        "true": (1, 1),
        "\u00e9": (2, 2),
    }
    assert list(counts)[:3] == ["below 5", "2", "10"]


def test_whole_numbers_of_many_subjects_are_codes() -> None:
    rows = [row("a", "ab"[i % 2], i, site=i % 22) for i in range(110)]
    counts = score_groups(rows, tasks_of(rows), ["site"], resamples=0).columns["site"].counts
    assert counts == {str(site): (5, 5) for site in range(22)}


def test_crossed_columns() -> None:
    rows = visits()
    rows[0]["metadata"]["sex"] = None
    counts = score_groups(rows, tasks_of(rows), ["sex*age_bin"], resamples=0).columns["sex*age_bin"].counts
    sizes = {f"{sex} × {age}": len(select(rows, sex=sex, age_bin=age)) for sex in "FM" for age in ("<50", "50+")}
    assert {name: n for name, (n, _) in counts.items() if name != "missing"} == sizes
    assert counts["missing"] == (1, 1)


def test_an_answer_without_a_number_costs_the_same_in_its_group() -> None:
    """The end of the range that replaces it is that of all references, so group means add up to the mean."""
    rows = [r for r in visits() if r["metadata"]["task"] == "age"]
    rows[3]["prediction"] = "old"
    tasks = tasks_of(rows)
    groups = score_groups(rows, tasks, ["age_bin"], resamples=0).columns["age_bin"].figures["mae/age"].groups
    whole = score(rows, tasks, resamples=0).figures["mae/age"].value
    assert sum(f.value * f.n for f in groups.values() if f.value) / len(rows) == pytest.approx(whole)


def test_a_group_of_one_subject_has_no_interval() -> None:
    rows = [row("a", "a" if i else "b", i, site="one" if i < 1 else "more") for i in range(9)] + [
        row("a", "b", 3, site="more")
    ]
    found = score_groups(rows, tasks_of(rows), ["site"]).columns["site"].figures["accuracy/side"]
    assert (found.groups["one"].n, found.groups["one"].low) == (1, None)
    assert found.groups["more"].low is not None
    assert found.gap
    assert (found.gap.highest, found.gap.value, found.gap.low) == ("more", pytest.approx(8 / 9), None)


def test_a_group_with_every_answer_right_has_a_gap_with_an_interval() -> None:
    """All resamples of it agree; Jeffreys' interval of 12 right of 12 is wider than none."""
    rows = [row("a" if i < 12 or i % 2 else "b", "a", i, site="x" if i < 12 else "y") for i in range(36)]
    rows.append(row("b", "b", 40, site="y"))
    gap = score_groups(rows, tasks_of(rows), ["site"]).columns["site"].figures["accuracy/side"].gap
    assert gap
    rng = np.random.default_rng(9)
    other = rng.binomial(25, 13 / 25, 100_000) / 25
    expected = np.percentile(scipy.stats.beta.rvs(12.5, 0.5, size=100_000, random_state=rng) - other, [2.5, 97.5])
    assert (gap.low, gap.high) == pytest.approx(expected, abs=0.04)
    only_right = [r | {"prediction": "a" if r["metadata"]["site"] == "x" else "b"} for r in rows[:-1]]
    gap = score_groups(only_right, tasks_of(rows), ["site"]).columns["site"].figures["accuracy/side"].gap
    assert gap
    assert (gap.value, gap.high) == (1, 1)
    balanced = score_groups(rows, tasks_of(rows), ["site"]).columns["site"].figures["balanced_accuracy/side"]
    assert balanced.gap
    assert balanced.gap.low is None  # no share of answers


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        (["F", "M"], "height", "by: height: no answer has it in its metadata; expected some of site, subject_id, task"),
        (["F", "M"], "site*height", "by: height: no answer has it"),
        ([None, "", float("nan")], "site", "by: site: no answer has it"),
        ([["a"], "b"], "site", "by: site: expected texts or numbers, got a list in 0-a"),
        ([{"a": 1}, "b"], "site", "by: site: expected texts or numbers, got an object in 0-a"),
        (
            list(range(11)) * 4,
            "site",
            "by: site: 11 different numbers of 44 subjects; expected at most 10, or codes of",
        ),
        (list(range(31)) * 6, "site", "different numbers of 186 subjects; expected at most 10, or codes of at least 5"),
        ([str(i) for i in range(MAX_GROUPS + 1)], "site", "by: site: 101 values; expected at most 100"),
    ],
)
def test_refuses_columns_that_make_no_groups(values: list[Any], column: str, message: str) -> None:
    rows = [row("a", "ab"[i % 2], i, site=value) for i, value in enumerate(values)]
    with pytest.raises(DataError) as raised:
        score_groups(rows, tasks_of(rows), [column], resamples=0)
    assert message in raised.value.faults[0]


def test_the_command_prints_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in visits()))
    assert main(["score", str(file), "--by", "sex,age_bin"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "by sex: answers (subjects): F 64 (16), M 32 (8)\n" in text
    assert "\n    gap: " in text
    assert "one in 20 of the 26 intervals of gaps would exclude 0" in " ".join(text.split())
    assert main(["score", str(file), "--by", "sex", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["by"]["columns"]["sex"]
    right = [r["reference"] == r["prediction"] for r in select(visits(), task="side", sex="F")]
    accuracy = found["tasks"]["side"]["accuracy"]
    assert accuracy["groups"]["F"]["value"] == pytest.approx(np.mean(right))
    assert accuracy["gap"].keys() == {"highest", "lowest", "value", "low", "high", "pairs"}
    assert found["groups"]["F"] == {"n": 64, "subjects": 16}
    assert main(["score", str(file), "--by", "se\x1b[2Jx"]) == 2
    message = capsys.readouterr().err
    assert "--by: se\\x1b[2Jx: no answer has it in its metadata" in message
    assert "\x1b" not in message
