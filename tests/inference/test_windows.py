"""Several windows of a run: which are shown, and how their answers become one."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbrella_jax.data.cache import Sources
from umbrella_jax.data.conversation import Conversation, Image, Message
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.tokenize import Encoded
from umbrella_jax.inference.windows import expand, merge_rows
from umbrella_jax.scoring.tasks import METRICS, Task

SEX = Task("classification", METRICS["classification"], ("female.", "male."))
AGE = Task("regression", METRICS["regression"], unit="years")
CAPTION = Task("text", METRICS["text"])
ANATOMY, LONG, SHORT = Image(Path("a.nii"), "T1"), Image(Path("long.nii"), "rsfMRI"), Image(Path("short.nii"), "rsfMRI")


def dataset() -> Dataset:
    """Return three conversations: a scan, a long run, and a scan with a long and a short run."""
    shown = [(ANATOMY,), (LONG,), (ANATOMY, LONG, SHORT)]
    conversations = [
        Conversation(str(n), None, (Message("user", images), Message("assistant", ("x",))), {}, "x.json")
        for n, images in enumerate(shown)
    ]
    rows = [Encoded(np.zeros(9, np.int32), np.zeros(9, bool), i, np.arange(len(i), dtype=np.int32)) for i in shown]
    return Dataset(tuple(conversations), rows, rows, {ANATOMY: 1, LONG: 5, SHORT: 3}, {}, Sources())


def windows_of(expanded: Dataset) -> list[tuple[int, ...]]:
    assert len(expanded.prompts) == len(expanded.encoded) == len(expanded)
    return [tuple(image.window for image in row.images) for row in expanded.prompts]


def test_all_windows_are_shown_in_step() -> None:
    expanded = expand(dataset(), "all")
    assert [list(versions) for versions in expanded.versions] == [[0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    several = [(0, 0, 0), (0, 1, 0), (0, 2, 1), (0, 3, 2), (0, 4, 2)]
    assert windows_of(expanded.dataset) == [(0,), (0,), (1,), (2,), (3,), (4,), *several]
    assert [c.task_id for c in expanded.dataset.conversations] == [*"01111122222"]
    assert expanded.numbers([0, 2]) == [0, 6, 7, 8, 9, 10]


def test_some_windows_are_spread_over_the_run() -> None:
    assert windows_of(expand(dataset(), 2).dataset) == [(0,), (0,), (4,), (0, 0, 0), (0, 4, 2)]
    assert len(expand(dataset(), 99).dataset) == len(expand(dataset(), "all").dataset)
    first = expand(dataset(), "first")
    assert windows_of(first.dataset) == windows_of(expand(dataset(), 1).dataset) == [(0,), (0,), (0, 0, 0)]


def rows(*predictions: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"task_id": "x", "prediction": prediction, **fields} for prediction in predictions]


def test_the_answer_with_the_largest_mean_probability_is_taken() -> None:
    """Two of three windows say male, but the third one is surer."""
    answered = rows("male.", "male.", "female.")
    chances = [(0.4, 0.5), (0.4, 0.5), (0.9, 0.05)]
    for row, (female, male) in zip(answered, chances, strict=True):
        row["likelihoods"] = {"female.": math.log(female), "male.": math.log(male)}
    merged = merge_rows(answered, SEX)
    assert merged["prediction"] == "female."
    assert merged["likelihoods"] == pytest.approx({"female.": math.log(1.7 / 3), "male.": math.log(1.05 / 3)})
    assert merged["windows"] == 3


def test_likelihoods_of_numbers_are_averaged_beside_the_number() -> None:
    answered = rows("20 years", "30 years")
    for row, (low, high) in zip(answered, [(-1.0, -800.0), (-900.0, -3.0)], strict=True):
        row["likelihoods"] = {"20 years": low, "30 years": high}
    merged = merge_rows(answered, AGE)
    assert merged["prediction"] == "25 years"
    assert merged["likelihoods"] == pytest.approx({"20 years": -1 - math.log(2), "30 years": -3 - math.log(2)})


@pytest.mark.parametrize(
    ("task", "predictions", "expected"),
    [
        (SEX, ["male.", "female.", "Female"], "female."),
        (SEX, ["male.", "female.", "female.", "male."], "male."),  # a tie: the first in the run
        (SEX, ["perhaps", "perhaps", "female."], "female."),
        (SEX, ["perhaps", "no"], "perhaps"),
        (AGE, ["20 years", "25 years", "about 36 years"], "27 years"),
        (AGE, ["20 years", "old", "21"], "20.5 years"),
        (AGE, ["old", "young"], "old"),
        (CAPTION, ["a lesion", "none", "none"], "a lesion"),
        (None, ["a", "b", "b"], "a"),
    ],
)
def test_answers_without_likelihoods_are_merged(task: Task | None, predictions: list[str], expected: str) -> None:
    merged = merge_rows(rows(*predictions), task)
    assert merged == {"task_id": "x", "prediction": expected, "windows": len(predictions)}


def test_an_answer_is_cut_if_the_window_it_comes_from_was() -> None:
    (cut,), (whole,) = rows("female", cut=True), rows("male")
    assert merge_rows([cut, whole, whole], SEX) == {"task_id": "x", "prediction": "male", "windows": 3}
    assert merge_rows([cut, whole], SEX)["cut"]
    assert merge_rows([cut], SEX) == cut
