"""Numbers with intervals: distributions set by hand, and every figure against its definition."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from umbrella_jax.baselines.table import side_by_side
from umbrella_jax.config.schema import NumbersConfig, TaskConfig, lower_is_better
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.scoring.metrics import score, tasks_of
from umbrella_jax.scoring.number_calibration import calibrate_numbers
from umbrella_jax.scoring.number_grid import NumberGrid
from umbrella_jax.scoring.numeric import NumberDistributions, read_number
from umbrella_jax.scoring.tasks import number_tasks


def make_rows(truths, values, probabilities, text="{:g} years."):
    return [
        {
            "task_id": str(i),
            "task_type": "age",
            "prediction": text.format(values[p.argmax()]),
            "reference": text.format(truth),
            "likelihoods": {text.format(v): float(np.log(share) - 3) for v, share in zip(values, p, strict=True)},
        }
        for i, (truth, p) in enumerate(zip(truths, probabilities, strict=True))
    ]


def test_a_distribution_set_by_hand_is_read_exactly() -> None:
    values, shares = (10, 20, 30, 40), [0.1, 0.5, 0.3, 0.1]
    texts = tuple(f"{v} mm" for v in values)
    likelihoods = {text: np.log(share) - 2 for text, share in zip(texts, shares, strict=True)}
    number = read_number(NumberGrid(values, texts, texts), likelihoods)
    assert number["expectation"] == pytest.approx(24)
    assert number["median"] == 20
    assert number["interval_80"] == [10, 30], "10 % of the probability on either side"
    assert number["interval_95"] == [10, 40]
    one = NumberDistributions(np.array(values, float), np.array([shares]))
    # E|X − 20| = 1 + 3 + 2 = 6; ½ E|X − X'| = 10 · (0.1·0.9 + 0.6·0.4 + 0.9·0.1)
    assert one.crps(np.array([20.0]))[0] == pytest.approx(6 - 4.2)
    certain = NumberDistributions(np.array(values, float), np.array([[0.0, 1, 0, 0]]))
    assert certain.crps(np.array([33.0]))[0] == 13, "the absolute error"


def test_figures_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    values = np.arange(20.0, 80, 2)
    p = rng.dirichlet(np.full(len(values), 0.3), 40)
    truths = rng.choice(values, 40)
    rows = make_rows(truths, values, p)
    figures = score(rows, tasks_of(rows, {"age": TaskConfig(kind="regression")}), resamples=0).flat()
    expectation = p @ values
    below = p.cumsum(1)
    median = values[(below >= 0.5).argmax(1)]
    assert figures["mae/age/expectation"] == pytest.approx(np.abs(expectation - truths).mean())
    assert figures["mae/age/median"] == pytest.approx(np.abs(median - truths).mean())
    assert figures["rmse/age/expectation"] == pytest.approx(np.sqrt(np.square(expectation - truths).mean()))
    assert figures["pearson/age/expectation"] == pytest.approx(np.corrcoef(expectation, truths)[0, 1])
    explained = 1 - np.square(expectation - truths).sum() / np.square(truths - truths.mean()).sum()
    assert figures["r2/age/expectation"] == pytest.approx(explained)
    low, high = (values[(below >= share).argmax(1)] for share in (0.1, 0.9))
    assert figures["coverage/age/80"] == pytest.approx(((low <= truths) & (truths <= high)).mean())
    assert figures["interval_width/age/80"] == pytest.approx((high - low).mean())

    def squared(x: float, row: int) -> float:  # of the distribution function's error
        return float((p[row][values <= x].sum() - (x >= truths[row])) ** 2)

    integrals = [quad(squared, 20, 80, args=(row,), limit=500, points=values)[0] for row in range(3)]
    three = NumberDistributions(values, p[:3]).crps(truths[:3])
    np.testing.assert_allclose(three, integrals, rtol=1e-6)
    assert lower_is_better("eval_crps/age")
    assert lower_is_better("eval_mae/age/expectation")
    assert lower_is_better("eval_coverage/age/80") is None


def test_a_table_beside_baselines_has_only_the_metrics_that_baselines_have() -> None:
    rows = make_rows([20, 40, 60], [20, 40, 60], np.full((3, 3), 1 / 3))
    plain = [{key: value for key, value in row.items() if key != "likelihoods"} for row in rows]
    scores = {
        name: score(own, tasks_of(own, {"age": TaskConfig(kind="regression")}), resamples=0)
        for name, own in (("language model", rows), ("CNN", plain))
    }
    assert "mae/age/expectation" in scores["language model"].flat()
    text = "\n".join(side_by_side(scores))
    assert "mae" in text
    assert not any(name in text for name in ("expectation", "median", "crps", "coverage", "interval_width"))


def test_intervals_of_a_calibrated_model_cover_as_they_say() -> None:
    """Truths are drawn from the model's own distributions; a narrower model covers less than it says."""
    rng = np.random.default_rng(1)
    values, n = np.arange(0.0, 100), 2000
    centres = rng.uniform(30, 70, n)
    p, narrow = (np.exp(-0.5 * ((values - centres[:, None]) / sd) ** 2) for sd in (8, 4))
    truths = [rng.choice(values, p=row / row.sum()) for row in p]
    rows = make_rows(truths, values, p / p.sum(1, keepdims=True))
    tasks = tasks_of(rows, {"age": TaskConfig(kind="regression")})
    calibration = calibrate_numbers(rows, tasks, resamples=0)
    assert calibration is not None
    for one in calibration.levels["age"]:
        assert one.coverage.value == pytest.approx(one.mass, abs=4 * np.sqrt(one.mass * (1 - one.mass) / n))
        assert one.level / 100 <= one.mass < one.level / 100 + 0.05, "one candidate is 5 % at most"
    assert "  80 %" in calibration.table()
    assert all(len(line) <= 80 for line in calibration.table().splitlines())
    rows = make_rows(truths, values, narrow / narrow.sum(1, keepdims=True))
    calibration = calibrate_numbers(rows, tasks, resamples=0)
    assert calibration is not None
    assert all(one.coverage.value < one.mass - 0.03 for one in calibration.levels["age"])


PLACE = "evaluation.tasks.age.numbers"


@pytest.mark.parametrize("text", ["{} months", "T 3: {} years"])
def test_refuses_a_text_in_which_the_candidates_are_not_read_as_numbers(text: str) -> None:
    rows = [{"task_id": str(n), "task_type": "age", "reference": f"{n} years", "metadata": {}} for n in (4, 5)]
    numbers = NumbersConfig(low=4, high=6, text=text)
    with pytest.raises(ConfigError, match=rf"{PLACE}: candidate '{text.format(4)}' cannot be read as 4 years"):
        number_tasks(rows, {"age": TaskConfig(numbers=numbers)})


@pytest.mark.parametrize(
    "numbers", [{"step": 0}, {"step": math.nan}, {"high": math.inf}, {"high": math.nan}, {"low": -math.inf}]
)
def test_refuses_candidates_without_end(numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        NumbersConfig(**{"low": 0, "high": 9, **numbers})


@pytest.mark.parametrize(
    ("references", "grid", "expected"),
    [
        (["45 years.", "18 years."], {"low": 18, "high": 20}, ("18 years.", "19 years.", "20 years.")),
        (["It is 4.5.", "It is 7."], {"low": 4, "high": 5, "step": 0.5}, ("It is 4.", "It is 4.5.", "It is 5.")),
        (["4.50", "7.25"], {"low": 4, "high": 4.6, "step": 0.3}, ("4.00", "4.30", "4.60")),
        (["T1: -3"], {"low": -3, "high": 6, "step": 3}, ("T1: -3", "T1: 0", "T1: 3", "T1: 6")),
        ([], {"low": 0.5, "high": 1, "step": 0.25, "text": "{:.2f} mm"}, ("0.50 mm", "0.75 mm", "1.00 mm")),
        ([], {"low": 0, "high": 2e29, "step": 1e29, "text": "{:.1f}"}, ("0.0", f"1{'0' * 29}.0", f"2{'0' * 29}.0")),
        (["45 years", "1 year"], {}, "are written differently: '45 years' and '1 year'"),
        (["3,5"], {}, "reference '3,5': expected exactly one number"),
        (["4.50", "7"], {}, "some references end in a 0"),
        (["4.5", "7.5"], {"step": 0.25}, "4.25 cannot be written with 1 decimals"),
        ([], {}, "references are missing"),
    ],
)
def test_candidates_are_written_as_the_references_are(references, grid, expected) -> None:
    config = NumbersConfig(**{"low": 4, "high": 6, **grid})
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=f"^{PLACE}: .*{expected}"):
            NumberGrid.make(config, references, PLACE)
    else:
        assert NumberGrid.make(config, references, PLACE).texts == expected


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"low": 1, "high": 0}, r"high: expected more than low \(1\), got 0"),
        ({"low": 0, "high": 1e4}, "step: 1 gives 10,001 candidates; expected 2 to 1000"),
        ({"low": 0, "high": 1, "step": 2}, "step: 2 gives 1 candidates"),
        ({"low": 0, "high": 5, "text": "{} to {}"}, "text: expected one place for the number"),
    ],
)
def test_refuses_candidates_that_are_none(grid, message) -> None:
    with pytest.raises(ConfigError, match=message):
        NumbersConfig(**grid)


def test_refuses_references_out_of_range_and_rows_with_other_candidates() -> None:
    rows = make_rows([4, 6], [4, 5, 6], np.full((2, 3), 1 / 3))
    tasks = tasks_of(rows, {"age": TaskConfig(kind="regression")})
    with pytest.raises(DataError, match=r"likelihoods of 4 years\.; expected of 4 years\., 5 years\., 6 years\."):
        score([rows[0], rows[1] | {"likelihoods": {"4 years.": -1.0}}], tasks, resamples=0)
    blank = [{key: value for key, value in row.items() if key != "likelihoods"} for row in rows]
    with pytest.raises(ConfigError, match=f"{PLACE}: 1: reference '6 years.' is not from 4 to 5"):
        tasks_of(blank, {"age": TaskConfig(numbers=NumbersConfig(low=4, high=5))})
    names = score(blank, tasks_of(blank, {"age": TaskConfig(numbers=NumbersConfig(low=4, high=6))}), resamples=0).flat()
    assert set(names) == {f"{m}/age" for m in ("mae", "rmse", "r2", "pearson", "spearman", "unparsable")}
