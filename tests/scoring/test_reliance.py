"""Reliance on the scan: by hand on few answers, by brute force on random ones, and what cannot be compared."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from umbrella_jax.errors import DataError
from umbrella_jax.scoring.bootstrap import Figure
from umbrella_jax.scoring.metrics import tasks_of
from umbrella_jax.scoring.reliance import (
    ControlFigures,
    ControlScores,
    _paired_error,
    score_control_seeds,
    score_controls,
)

Rows = list[dict[str, Any]]


def rows(task: str, references: Sequence[str], answers: Sequence[str], **fields: Any) -> Rows:
    """Return a row per answer, each of its own subject."""
    return [
        {
            "task_id": f"{task}-{i}",
            "task_type": task,
            "prediction": answer,
            "reference": reference,
            "metadata": {"subject_id": f"sub-{i}"},
            **fields,
        }
        for i, (reference, answer) in enumerate(zip(references, answers, strict=True))
    ]


def under(control: str, true: Rows, answers: Sequence[str], **fields: Any) -> Rows:
    return [
        {**row, "prediction": answer, "control": control, **fields} for row, answer in zip(true, answers, strict=True)
    ]


def compare(true: Rows, **controls: Rows) -> ControlScores:
    return score_controls(true, controls, tasks_of(true))


SEXES = ["male"] * 4 + ["female"] * 4
TRUE = rows("sex", SEXES, ["male"] * 4 + ["female"] * 3 + ["male"])  # 7 of 8 are right


def test_reliance_by_hand() -> None:
    noise = ["male"] * 3 + ["female"] * 4 + ["male"]  # 6 of 8 are right, 4 of 8 by chance
    scores = compare(TRUE, blank=under("blank", TRUE, ["male"] * 8), noise=under("noise", TRUE, noise))
    blank, noise_figures = scores.controls["sex"].values()
    assert figures(blank) == {"true": 7 / 8, "control": 1 / 2, "chance": 1 / 2, "changed": 3 / 8, "reliance": 1.0}
    expected = {"true": 7 / 8, "control": 6 / 8, "chance": 1 / 2, "changed": 1 / 8, "reliance": 1 / 3}
    assert figures(noise_figures) == expected
    assert blank.nats is None
    assert max(map(len, scores.table().splitlines())) <= 80


def figures(own: ControlFigures) -> dict[str, float | None]:
    assert own.true
    assert own.control
    return {
        "true": own.true.value,
        "control": own.control.value,
        "chance": own.control.chance,
        "changed": own.changed.value,
        "reliance": reliance(own).value,
    }


def reliance(own: ControlFigures) -> Figure:
    assert own.reliance
    return own.reliance


def ends(own: ControlFigures) -> tuple[float, float]:
    """Return the interval of reliance, which must be there."""
    low, high = reliance(own).low, reliance(own).high
    assert low is not None
    assert high is not None
    return low, high


def test_reliance_of_a_regression_by_hand() -> None:
    true = rows("age", [f"{20 + i} years" for i in range(12)], [f"{21 + i} years" for i in range(12)])
    scores = compare(true, blank=under("blank", true, ["24.0 years"] * 12), noise=under("noise", true, ["?"] * 12))
    mae = float(np.abs(np.arange(20, 32) - 24).mean())
    worst = float(np.maximum(np.arange(12), 11 - np.arange(12)).mean())  # to the farther end of the ages
    blank, noise = scores.controls["age"].values()
    assert figures(blank) == pytest.approx(
        {"true": 1.0, "control": mae, "chance": mae, "changed": 11 / 12, "reliance": 1.0}
    )
    assert figures(noise) == pytest.approx(
        {"true": 1.0, "control": worst, "chance": 143 / 36, "changed": 1.0, "reliance": 1.0}
    )


def test_error_of_random_pairs_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    truth, answer = rng.integers(0, 9, 30).astype(float), rng.integers(-2, 12, 30).astype(float)
    answer[:5] = np.nan
    w = rng.integers(0, 3, (30, 4)).astype(float)
    guesses = [np.abs(truth[:, None] - truth) @ own / own.sum() for own in w.T]  # of an answer without a number
    errors = [np.where(np.isnan(answer)[:, None], guess, np.abs(answer[:, None] - truth)) for guess in guesses]
    expected = [own @ error @ own / own.sum() ** 2 for own, error in zip(w.T, errors, strict=True)]
    np.testing.assert_allclose(_paired_error(w, truth, answer), expected)


def test_answers_from_the_text_have_reliance_0() -> None:
    references = ["male", "female"] * 20
    true = rows("sex", references, ["male", *references[1:-1], "male"])
    own = compare(true, blank=under("blank", true, [row["prediction"] for row in true])).controls["sex"]["blank"]
    low, high = ends(own)
    assert reliance(own).value == 0
    assert low < 0 < high < 0.25
    assert own.verdict == (
        "the answers hardly depend on the scan: none of 40 answers changes with blank volumes (95 % interval: at most "
        "9 % do)."
    )
    few = compare(true[:4], blank=under("blank", true[:4], [row["prediction"] for row in true[:4]]))
    assert few.verdicts() == [
        "sex: none of 4 answers changes with blank volumes; of so few subjects that up to 60 % may."
    ]


def test_answers_from_the_scan_have_reliance_1() -> None:
    rng = np.random.default_rng(1)
    references = ["male", "female"] * 100
    true = rows("sex", references, [r if rng.random() < 0.9 else "male" for r in references])
    answers = list(rng.permutation([row["prediction"] for row in true]))
    own = compare(true, shuffled=under("shuffled", true, answers)).controls["sex"]["shuffled"]
    low, high = ends(own)
    assert 0.7 < low < 1 < high < 1.3


def test_a_small_fall_of_log_p_is_not_called_independence() -> None:
    def likelihoods(male: float) -> dict[str, float]:
        return {"male": math.log(male), "female": math.log(1 - male)}

    right, blank = (
        [{**row, "likelihoods": likelihoods(p if row["reference"] == "male" else 1 - p)} for row in TRUE * 3]
        for p in (0.9, 0.8)
    )
    true = [{**row, "metadata": {"subject_id": str(n)}, "task_id": str(n)} for n, row in enumerate(right)]
    other = [
        {**row, "likelihoods": lower["likelihoods"], "control": "blank"} for row, lower in zip(true, blank, strict=True)
    ]
    other[0]["likelihoods"] = true[0]["likelihoods"]  # else all resamples agree
    (verdict,) = compare(true, blank=other).verdicts()
    assert "hardly depend" in verdict
    assert verdict.endswith("though log p(right answer) falls by 0.113 nats.")


def test_a_part_is_not_claimed_if_all_may_be_lost() -> None:
    truths = ["male", "female"] * 20
    true = rows("sex", truths, truths)
    wrong = [{"male": "female", "female": "male"}[truth] if i % 4 < 2 else truth for i, truth in enumerate(truths)]
    scores = compare(true, shuffled=under("shuffled", true, wrong))
    reliance = scores.controls["sex"]["shuffled"].reliance
    assert reliance is not None
    assert reliance.low is not None
    assert 0.2 < reliance.low < 0.8 < 1 == reliance.value
    (verdict,) = scores.verdicts()
    assert "depend on the scan in part or entirely" in verdict


def test_one_subject_shows_nothing_about_others() -> None:
    one = [{**row, "metadata": {"subject_id": "sub-1"}} for row in TRUE]
    (verdict,) = compare(one, blank=under("blank", one, ["male"] * 8)).verdicts()
    assert verdict.endswith("reliance has no interval.")


def test_nonsense_without_the_scan_is_no_reliance() -> None:
    """A model at chance does not rely on the scan because it answers blank volumes with other words."""
    true = rows("sex", SEXES, ["male", "female"] * 4)
    nonsense = compare(true, blank=under("blank", true, ["a scan"] * 8)).controls["sex"]["blank"]
    assert figures(nonsense) == {"true": 0.5, "control": 0.0, "chance": 0.5, "changed": 1.0, "reliance": None}
    good = compare(TRUE, blank=under("blank", TRUE, ["a scan"] * 8))
    assert reliance(good.controls["sex"]["blank"]).value == 1
    assert "sex, blank: 8 of 8 answers are none of female, male; reliance counts each as a guess." in good.notes
    same = rows("sex", SEXES, ["male"] * 4 + ["female"] * 2 + ["?"] * 2)
    blind = compare(same, blank=under("blank", same, [row["prediction"] for row in same])).controls["sex"]["blank"]
    assert reliance(blind).value == 0


def test_no_reliance_without_accuracy_beyond_chance() -> None:
    true = rows("sex", SEXES, ["male"] * 4 + ["male"] * 4)
    own = compare(true, noise=under("noise", true, ["male"] * 6 + ["female"] * 2)).controls["sex"]["noise"]
    assert (reliance(own).value, reliance(own).low) == (None, None)
    assert own.verdict == (
        "reliance is undefined: accuracy 0.500 is not better than chance agreement, 0.500; 25 % of the answers change "
        "with noise for the volumes."
    )


def test_no_interval_if_the_accuracy_may_be_chance() -> None:
    true = rows("sex", SEXES, ["male", "female"] * 2 + ["female"] * 3 + ["male"])
    own = compare(true, noise=under("noise", true, ["male", "female"] * 4)).controls["sex"]["noise"]
    assert (reliance(own).value, reliance(own).low, reliance(own).high) == (1.0, None, None)
    assert own.verdict.endswith("which may be chance: too little to tell how much depends on the scan.")


def test_nats_are_the_loss_of_log_p_among_the_answers() -> None:
    def likelihoods(male: float, female: float) -> dict[str, float]:
        return {"male": math.log(male), "female": math.log(female)}

    true = [{**row, "likelihoods": likelihoods(0.2, 0.2)} for row in TRUE]
    blank = [{**row, "likelihoods": likelihoods(0.1, 0.3)} for row in under("blank", TRUE, ["male"] * 8)]
    nats = compare(true, blank=blank).controls["sex"]["blank"].nats
    assert nats
    assert nats.value == pytest.approx((math.log(1 / 2 / (1 / 4)) + math.log(1 / 2 / (3 / 4))) / 2)


def test_conversations_that_were_left_out_are_counted() -> None:
    control = under("other-modality", TRUE, ["male"] * 8)
    for row in control[2:]:
        row |= {"left_out": "no scan of another modality", "prediction": ""}
    scores = compare(TRUE, **{"other-modality": control})
    own = scores.controls["sex"]["other-modality"]
    assert (own.changed.n, own.left_out) == (2, {"no scan of another modality": 6})
    assert "sex, other-modality: 6 conversations left out: no scan of another modality." in scores.notes


def test_agreement_of_phrasings_by_hand() -> None:
    first = under("paraphrase", TRUE, [row["prediction"] for row in TRUE], question="Man or woman?")
    second = under("paraphrase", TRUE, SEXES, question="Sex?")
    text = rows("words", ["yes", "no"], ["yes", "no"])  # a task without phrasings
    scores = compare([*TRUE, *text], paraphrase=[*first, *second])
    assert not scores.controls
    own = scores.paraphrases["sex"]
    assert own.agreement.value == pytest.approx(1 - 1 / 8 * 2 / 3)  # one answer differs in two of three pairs
    assert {name: f and f.value for name, f in own.phrasings.items()} == {"Man or woman?": 7 / 8, "Sex?": 1.0}
    ages = rows("age", [f"{20 + i}" for i in range(12)], [f"{20 + i}" for i in range(12)])
    older = under("paraphrase", ages, [f"{22 + i}" for i in range(11)] + ["?"], question="How old?")
    difference = compare(ages, paraphrase=older).paraphrases["age"].difference
    assert difference
    assert (difference.value, scores.to_json()["paraphrases"]["sex"]["metric"]) == (2.0, "accuracy")


def test_refuses_answers_to_other_conversations() -> None:
    blank = under("blank", TRUE, ["male"] * 8)
    for control, fault in [
        ([], "blank: no answers"),
        (blank[1:], "blank: 7 answers, not to the same conversations as the 8 true ones; they differ in sex-0"),
        ([*blank[1:], {**blank[0], "reference": "female"}], "blank: sex-0: its reference differs"),
        ([*blank[1:], {**blank[0], "control": "noise"}], "blank: sex-0: not an answer under this control"),
        ([*blank[1:], {**blank[0], "prediction": None}], "blank: task sex: sex-0: prediction: expected a string"),
    ]:
        with pytest.raises(DataError, match=fault):
            compare(TRUE, blank=control)


def test_seeds_have_the_ratio_of_their_means() -> None:
    other = [{**row, "prediction": row["reference"]} for row in TRUE]
    blank = [under("blank", TRUE, ["male"] * 6 + ["female"] * 2), under("blank", other, ["female"] * 8)]
    scores = score_control_seeds({1: TRUE, 2: other}, {"blank": blank}, tasks_of(TRUE))
    own = scores.controls["sex"]["blank"]
    assert own.true
    assert own.true.value == (7 / 8 + 1) / 2
    assert reliance(own).value == pytest.approx(((7 / 8 - 6 / 8) + (1 - 4 / 8)) / ((7 / 8 - 4 / 8) + (1 - 4 / 8)))
    assert scores.notes[0].startswith("Means over 2 seeds. 95 % intervals: 1000 resamples of subjects and of the 2 se")
    with pytest.raises(DataError, match="seed 2: blank: 7 answers"):
        score_control_seeds({1: TRUE, 2: other}, {"blank": [blank[0], blank[1][1:]]}, tasks_of(TRUE))
