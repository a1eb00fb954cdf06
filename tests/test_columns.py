"""Tables for a terminal of 80 columns."""

from umbrella_jax.baselines.table import side_by_side
from umbrella_jax.console import columns
from umbrella_jax.scoring.metrics import score, tasks_of


def test_columns_that_do_not_fit_follow_in_blocks() -> None:
    rows = [["", *(f"run_{i:02}" for i in range(20))], ["x" * 50, *"abcdefghijklmnopqrst"]]
    lines = columns(rows)
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).split() == [
        *(f"run_{i:02}" for i in range(5)),
        *("x" * 50, *"abcde"),
        *(f"run_{i:02}" for i in range(5, 10)),
        *("x" * 50, *"fghij"),
        *(f"run_{i:02}" for i in range(10, 15)),
        *("x" * 50, *"klmno"),
        *(f"run_{i:02}" for i in range(15, 20)),
        *("x" * 50, *"pqrst"),
    ]
    assert columns([["a", "b"], ["cc", "1"]]) == ["a   b", "cc  1"]


def test_columns_of_predictors_do_not_touch() -> None:
    """Intervals of large numbers are longer than a column."""

    def rows(shift: float) -> list[dict[str, object]]:
        return [
            {
                "task_id": str(i),
                "task_type": "T1",
                "prediction": f"{-900 - 99 * i + shift}",
                "reference": f"{-900 - 91 * i}",
            }
            for i in range(12)
        ]

    predictors = {name: rows(shift) for name, shift in (("language model", 0.0), ("CNN", 1e5), ("probe", -123.456))}
    scores = {name: score(of, tasks_of(of, {}), resamples=50) for name, of in predictors.items()}
    lines = side_by_side(scores)
    assert max(map(len, lines)) <= 80
    (r2,) = [line.split() for line in lines if "r2" in line]
    assert r2[2] == "-1.01e+05"
    below = lines[[line.split()[:1] for line in lines].index(["r2"]) + 1].replace(" to ", "–")
    assert len(below.split()) == 3
