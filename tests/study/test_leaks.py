"""People and scans in several splits, and questions that give their answers away."""

import random

import pandas as pd
import pytest

from tests.helpers.study_visits import faults_of, made, study_of, visits_from
from umbrella_jax.data.validation.leaks import Exchange, LeakSearch
from umbrella_jax.errors import Faults
from umbrella_jax.study.leaks import scan_faults, split_leaks

TABLE = pd.DataFrame(
    {
        "subject": [f"{'AD' if i % 2 else 'CN'}-{i:02}" for i in range(24)],
        "dx": ["CN", "AD"] * 12,
        "site": ["1", "2", "1", "3"] * 6,
        "sex": list("FFMM") * 6,
        "age": [f"{60 + i / 4:.2f}" for i in range(24)],
        "months": [f"{12 * (60 + i / 4):.0f}" for i in range(24)],
        "score": [f"{i + 40 * (i % 2)}" for i in range(24)],
        "family": [f"F{i // 2}" for i in range(24)],
        "old": ["no"] * 12 + ["yes"] * 12,
    }
)
DX = {"kind": "classification", "column": "dx"}
BINS = {"old": {"column": "age", "edges": [63]}}


HELD_OUT = TABLE.index // 2 % 3 == 2


def splits(table: pd.DataFrame = TABLE) -> dict:
    """Return {split: visits}: a third of the subjects in eval."""
    return {"train": visits_from(table[~HELD_OUT]), "eval": visits_from(table[HELD_OUT])}


def leaks(visits_of, root, **sections) -> list[str]:
    faults = Faults()
    faults += split_leaks(study_of({"dx": DX}, **sections), visits_of)
    faults += scan_faults((visit for visits in visits_of.values() for visit in visits), root)
    return faults


def test_refuses_people_in_two_splits(tmp_path):
    shared = {"train": visits_from(TABLE[:17]), "eval": visits_from(TABLE[15:])}
    assert leaks(shared, tmp_path)[:2] == [
        "split: subject AD-15 is in several splits: train (AD-15), eval (AD-15); expected it in one only",
        "split: subject CN-16 is in several splits: train (CN-16), eval (CN-16); expected it in one only",
    ]
    families = {"train": visits_from(TABLE[:17]), "eval": visits_from(TABLE[17:])}
    assert leaks(families, tmp_path, split={"by": "family"}) == [
        "split: family F8 is in several splits: train (CN-16), eval (AD-17); expected it in one only"
    ]
    assert not leaks(families, tmp_path)


def test_refuses_a_scan_under_several_names(tmp_path):
    visits = visits_from(TABLE[:4])
    contents = [b"a" * 70_000, b"a" * 69_999 + b"b", b"a" * 70_000, b"a"]  # equal size, and equal first bytes
    paths = [visit.scans["sMRI"][0].path for visit in visits]
    for path, content in zip(paths, contents, strict=True):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(content)
    assert leaks({"train": visits}, tmp_path) == [
        f"{paths[0]} (CN-00): the same content as {paths[2]} (CN-02); expected one name for each scan: leave the "
        "copies out, or mend the conversion that wrote them"
    ]
    scans = {"sMRI": visits[0].scans["sMRI"]}
    other = [visits[0], type(visits[1])(visits[1].subject, None, {}, scans)]
    assert leaks({"train": other}, tmp_path) == [
        f"{paths[0]}: the scan of CN-00, AD-01 (2); expected a file for each visit"
    ]


def test_refuses_folders_with_the_same_frames(tmp_path):
    visits = visits_from(TABLE[:2])
    for visit in visits:
        folder = tmp_path / visit.scans["sMRI"][0].path
        folder.mkdir(parents=True)
        (folder / "frame_0.pt").write_bytes(b"0")
    assert "the same content as" in leaks({"train": visits}, tmp_path)[0]


ORDER = [*TABLE.subject[~HELD_OUT], *TABLE.subject[HELD_OUT]]
ROWS = f"(24: {', '.join(ORDER[:20])} and 4 more); take it out"
COLUMN_LEAKS = [
    (DX | {"covariates": "It is {dx}."}, f"{{dx}} in the text is the answer, so the scan is not needed {ROWS}"),
    (
        DX | {"column": "old", "question": "Age {age}?"},
        f"{{age}} in the text is made of the same values as the answer, old, so the scan is not needed {ROWS}",
    ),
    (
        DX | {"question": "Site {site}?"},
        "{site} in the text determines the answer, so the scan is not needed: 1 → CN (12), 2 → AD (6), 3 → AD (6) "
        + ROWS,
    ),
    (
        DX | {"question": "Score {score}?"},
        f"{{score}} in the text determines the answer, so the scan is not needed: from low to high it is CN, AD {ROWS}",
    ),
    (
        {"kind": "regression", "column": "age", "covariates": "{months} months."},
        f"{{months}} in the text determines the answer, so the scan is not needed: it rises with it {ROWS}",
    ),
    (
        {"kind": "text", "answer": "A {sex} with {dx}.", "question": "Describe this {sex} subject."},
        f"{{sex}} in the text is the answer, so the scan is not needed {ROWS}",
    ),
]


@pytest.mark.parametrize(("task", "message"), COLUMN_LEAKS, ids=[message[:30] for _, message in COLUMN_LEAKS])
def test_refuses_a_column_that_tells_the_answer(task, message):
    assert faults_of(study_of({"t": task}, bins=BINS), splits()) == [f"tasks.t: {message}"]


@pytest.mark.parametrize(
    "task",
    [
        DX | {"covariates": "Age {age}, sex {sex}, family {family}."},
        DX | {"question": ["Is it CN or AD?", "CN, or AD?"]},
        DX | {"covariates": "A CN study."},
        {"kind": "regression", "column": "age", "covariates": "Sex {sex}, score {score}."},
        {"kind": "comparison", "column": "dx"},
        {"kind": "comparison", "column": "site", "references": {"per_query": 2}},
        {"kind": "comparison", "column": "site", "references": {"count": 5}},
    ],
)
def test_takes_covariates_choices_and_references_that_give_nothing_away(task):
    made(study_of({"t": task}), splits())


def test_refuses_a_subject_id_that_names_the_label():
    (fault,) = faults_of(study_of({"t": DX | {"covariates": "Scan {subject}."}}), splits())
    rows = ", ".join(f"{subject}_t" for subject in ORDER[:20])
    where = "tasks.t: train and eval: the text shown names the answer in 24 conversations"
    assert fault == f"{where}: {rows} and 4 more"


def test_refuses_words_that_go_with_one_answer():
    table = TABLE.assign(arm=["xp", "yq", "yq", "xp"] * 6)
    task = {"kind": "classification", "column": "both", "covariates": "{sex}{arm}"}
    table["both"] = [s + a for s, a in zip(table.sex, table.arm, strict=True)]  # no column alone determines it
    (fault,) = faults_of(study_of({"t": task}), splits(table))
    assert "words give the answer away: 'Fxp What is the both of this subject?' always goes with 'fxp' (6: " in fault


def search(pairs) -> list[str]:
    """Return the leaks of comparisons (split, reference's label, answer), each of another subject."""
    found = LeakSearch()
    for number, (split, reference, answer) in enumerate(pairs):
        exchange = Exchange(f"c{number}", f"s{number}", "Which?", answer, (reference,), reference == answer)
        found.add(split, exchange)
    return [leak.reason for leak in found.leaks()]


def test_refuses_references_that_give_the_answer_away():
    rng = random.Random(0)
    labels = [rng.choice("ab") for _ in range(40)]
    other = {"a": "b", "b": "a"}
    (always,) = search(("train", label, label) for label in labels)
    assert always.startswith("the reference's label gives the answer away: it is always the answer's (40: c0, c1, ")
    (never,) = search(("train", other[label], label) for label in labels)
    assert "it is never the answer's (40: " in never
    mostly = [("train", label if i % 8 else other[label], label) for i, label in enumerate(labels)]
    (guess,) = search(mostly)
    assert "guessing a → a, b → b is right in 88% of comparisons (35: " in guess


def test_refuses_splits_whose_references_are_drawn_differently():
    def drawn(split, share, number=200):
        return [
            (split, answer if i % 10 < share * 10 else "b" if answer == "a" else "a", answer)
            for i, answer in enumerate(["a"] * (number // 2) + ["b"] * (number // 2))
        ]

    assert search(drawn("train", 0.5) + drawn("eval", 0.5, 60)) == []
    assert search(drawn("train", 0.5) + drawn("eval", 0.2, 60)) == [
        "the references' labels give the answer away: guessing a → b, b → a is right in 80% of comparisons (48: "
        + ", ".join(f"c{n}" for n in [*(200 + i for i in range(30) if i % 10 > 1)][:20])
        + " and 28 more), without them in 50%",
        "50% of comparisons have a reference with the same label in train, 20% in eval; draw references in the same "
        "way for both",
    ]
    few = drawn("eval", 0.2, 10)
    assert search(drawn("train", 0.5) + few) == []  # 10 subjects may differ by accident
