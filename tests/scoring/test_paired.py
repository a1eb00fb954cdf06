"""Paired differences: their tests are scipy's and statsmodels', their intervals those of paired resamples."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from umbrella_jax.cli import main
from umbrella_jax.errors import DataError
from umbrella_jax.scoring.paired import EXACT, MCNEMAR, RANDOM, correct_holm, exact_mcnemar, paired_test
from umbrella_jax.scoring.paired import permutation_test as permutation_test_of
from umbrella_jax.scoring.paired_scores import PairedScores, compare_predictors
from umbrella_jax.scoring.paper_table import to_csv, to_latex, to_markdown
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
            "metadata": {"subject_id": f"s{subject:02}"},
        }
        for i, (is_right, truth, subject) in enumerate(zip(right, truths, subjects, strict=True))
    ]


def ages(errors: np.ndarray, subjects: np.ndarray) -> Rows:
    row: dict[str, Any] = {"task_type": "age", "reference": "50"}
    return [
        row | {"task_id": f"t{i}", "prediction": f"{50 + error:.17g}", "metadata": {"subject_id": f"s{subject:02}"}}
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


def test_a_thousand_subjects_who_all_differ() -> None:
    test = permutation_test_of(lambda kept: (2 * kept - 1).sum(0), 1100, seed=0)
    assert test.p == 1 / 10_000


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
    for seed in range(3):
        p = np.random.default_rng(seed).random(6) ** 3
        p[1] = p[4]
        assert correct_holm(p) == pytest.approx(multipletests(p, method="holm")[1])


SUBJECTS = np.arange(20)
TRUTHS = np.arange(20) % 2 == 0
TASKS = {"side": SIDE, "age": AGE}


def answers(wrong: int, error: float) -> Rows:
    """Return rows of 20 subjects: the first `wrong` sides are wrong, and every age is off by about `error`."""
    rows = sides(wrong <= SUBJECTS, TRUTHS, SUBJECTS)
    return rows + ages(error * (1 + np.sin(SUBJECTS)), SUBJECTS)


@pytest.fixture(scope="module")
def compared() -> PairedScores:
    controls = {"blank": [answers(11, 30)]}
    baselines = {"cnn": answers(6, 9), "pro_be & co": answers(4, 9.5), "covariates": answers(8, 40)[:20]}
    return compare_predictors([answers(2, 5)], TASKS, controls=controls, baselines=baselines, resamples=80, seed=7)


def test_a_difference_has_the_interval_of_the_same_resamples(compared: PairedScores) -> None:
    draws = np.random.default_rng(7).integers(20, size=(80, 20))
    apart = (SUBJECTS >= 2).astype(float) - (SUBJECTS >= 6)
    cnn = next(one for one in compared.predictors["side"] if one.name == "cnn")
    assert cnn.difference is not None
    figure = cnn.difference.figure
    assert figure.value == pytest.approx(0.2)
    assert (figure.low, figure.high) == pytest.approx(np.percentile(apart[draws].mean(1), [2.5, 97.5]))


def test_only_best_baselines_and_controls_are_tested_each_over_the_tasks(compared: PairedScores) -> None:
    best = {task: one.name for task in TASKS if (one := compared.best_baseline(task))}
    assert best == {"side": "pro_be & co", "age": "cnn"}
    p = {task: {one.name: one.difference for one in own} for task, own in compared.predictors.items()}
    exact = {"blank": binomtest(0, 9).pvalue, "pro_be & co": binomtest(0, 2).pvalue}
    for name, other, value in (("blank", "blank", exact["blank"]), ("pro_be & co", "cnn", exact["pro_be & co"])):
        side, age = p["side"][name], p["age"][other]
        assert side is not None
        assert age is not None
        assert side.p == pytest.approx(value)
        assert [side.p_holm, age.p_holm] == pytest.approx(multipletests([side.p, age.p], method="holm")[1])
    assert [name for name, one in p["side"].items() if one and one.p_holm is None] == ["cnn", "covariates"]
    assert "covariates" not in p["age"]


def test_questions_without_a_control_are_left_out_of_both() -> None:
    control = [row | ({"left_out": "no other scan"} if i < 5 else {}) for i, row in enumerate(answers(15, 0)[:20])]
    scores = compare_predictors([answers(4, 0)], TASKS, controls={"shuffled": [control]}, resamples=0)
    _, shuffled = scores.predictors["side"]
    assert shuffled.difference is not None
    assert (shuffled.figure.n, shuffled.figure.value) == (15, pytest.approx(5 / 15))
    assert shuffled.difference.figure.value == pytest.approx(1 - 5 / 15)
    assert shuffled.difference.p == pytest.approx(binomtest(0, 10).pvalue)


def test_seeds_have_a_mean_a_spread_and_an_interval_over_both() -> None:
    seeds = [answers(wrong, 0)[:20] for wrong in (1, 2, 6)]
    baseline = answers(7, 0)[:20]
    scores = compare_predictors(seeds, {"side": SIDE}, baselines={"cnn": baseline}, resamples=50, seed=3)
    model, cnn = scores.predictors["side"]
    assert model.figure.value == pytest.approx(0.85)
    assert model.sd == pytest.approx(np.std([0.95, 0.9, 0.7], ddof=1))
    draws = np.random.default_rng(3).integers(20, size=(50, 20))
    drawn = np.random.default_rng([3, 1]).integers(3, size=(50, 3))
    right = np.array([wrong <= SUBJECTS for wrong in (1, 2, 6)]) - (SUBJECTS >= 7).astype(float)
    means = [right[np.ix_(some, who)].mean() for some, who in zip(drawn, draws, strict=True)]
    assert cnn.difference is not None
    assert (cnn.difference.figure.low, cnn.difference.figure.high) == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_refuses_other_conversations_than_the_models() -> None:
    others = [row | {"reference": "right"} for row in answers(2, 5)]
    with pytest.raises(
        DataError, match=r"baseline cnn: task side: other conversations than the run's: t0, t10, t12, …"
    ):
        compare_predictors([answers(2, 5)], TASKS, baselines={"cnn": others}, resamples=0)


def test_a_csv_has_every_digit(compared: PairedScores) -> None:
    rows = list(csv.DictReader(StringIO(to_csv(compared))))
    names = ["model", "blank", "cnn", "pro_be & co"]
    assert [row["predictor"] for row in rows] == [*names, "covariates", *names]
    for row in rows:
        one = next(one for one in compared.predictors[row["task"]] if one.name == row["predictor"])
        assert float(row["value"]) == one.figure.value
        assert int(row["best_baseline"]) == one.is_best
        if one.difference:
            assert float(row["difference_low"]) == one.difference.figure.low
            assert [row["p"], row["p_holm"]] == [
                "" if p is None else repr(p) for p in (one.difference.p, one.difference.p_holm)
            ]


def test_tables_round_alike_and_escape_names(compared: PairedScores) -> None:
    markdown, latex = to_markdown(compared), to_latex(compared)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    assert {len(row) for row in cells} == {9}
    by_name = {row[1]: row for row in cells[2:7]}
    assert by_name["model"][:5] == ["side: accuracy", "model", "20", "20", "0.900"]
    assert by_name["blank (control)"][6:] == ["+0.450", "0.250 to 0.650", "0.004"]
    assert by_name["pro_be & co (baseline) \\*"][6:] == ["+0.100", "0.000 to 0.251", "0.500"]
    lines = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert [line.replace(r"\&", "").count("&") for line in lines] == [7, 0, *[7] * 5, 0, *[7] * (len(lines) - 8)]
    assert r"\multicolumn{8}{l}{side: accuracy} \\" in lines
    assert any(line.startswith(r"pro\_be \& co (baseline) * & 20 & 20 & 0.800 & ") for line in lines)
    assert latex.count("{") == latex.count("}")
    assert "$-$" in latex
    assert "−" not in latex
    for text in (markdown, latex):
        assert "Holm" in text
        assert "Chance, without looking at the images: side 0.500" in text


def write(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_compares_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "answers.jsonl", answers(2, 5))
    write(tmp_path / "answers.blank.jsonl", [row | {"control": "blank"} for row in answers(11, 30)])
    for fold in (0, 1):
        write(tmp_path / f"base/fold-{fold}/baseline/cnn.jsonl", answers(6, 9)[fold::2])
    flags = ["score", file, "--baseline", str(tmp_path / "base")]
    table = tmp_path / "new" / "table.md"
    assert main([*flags, "--table", str(table)]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{table}: table of 2 tasks\n"
    assert max(map(len, printed.out.splitlines())) <= 80
    line = next(line.split() for line in printed.out.splitlines() if line.startswith("  cnn *") and "0.700" in line)
    assert [line[i] for i in (2, 6, 10)] == ["0.700", "+0.200", "0.250"]
    assert "| blank (control)" in table.read_text()
    assert main([*flags, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["compared"]
    assert [one["name"] for one in compared["tasks"]["side"]["predictors"]] == ["model", "blank", "cnn"]
    assert main([*flags, "--table", "md"]) == 0
    assert capsys.readouterr().out == table.read_text()
    for target, fault in (
        (str(table), "already exists; choose another name, or remove it"),
        ("table.docx", "expected FILE.md, FILE.csv, FILE.tex, or md, csv, tex to print it"),
    ):
        assert main([*flags, "--table", target]) == 2
        assert f"--table {target}: {fault}" in " ".join(capsys.readouterr().err.split())
