"""A study's conversations, compared with an independent reading of the table; and the mistakes that are refused."""

import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.study_visits import asked, faults_of, made, study_of, visits_from
from umbrella_jax.data.conversation import read_conversations

TABLE = pd.DataFrame(
    {
        "subject": [f"sub-{i:02}" for i in range(1, 13)],
        "dx": ["0", "1"] * 6,
        "age": [f"{60 + i / 4:.2f}" for i in range(12)],
        "sex": ["F", "F", "M", "M"] * 3,
        "code": [f"{i:03}" for i in range(12)],
    }
)
LONG = pd.DataFrame(
    [
        {"subject": f"sub-{i:02}", "visit": v, "mmse": f"{30 - i - n}", "dx": "CN" if i % 2 else "AD", "fMRI": 1}
        for i in range(1, 9)
        for n, v in enumerate(["bl", "m12", "m24"])
    ]
)


DX = {"kind": "classification", "column": "dx"}


def splits(table: pd.DataFrame, **scans: int) -> dict:
    """Return {split: visits}: the last four subjects in eval."""
    held_out = sorted(set(table.subject))[-4:]
    parts = {"train": table[~table.subject.isin(held_out)], "eval": table[table.subject.isin(held_out)]}
    return {name: visits_from(part, {"sMRI": 1} | scans) for name, part in parts.items()}


def test_classification_exactly():
    task = {"kind": "classification", "column": "dx", "labels": {0: "healthy", 1: "ill"}, "covariates": "Sex {sex}."}
    study = study_of({"dx": task}, keep=["age", "sex", "code"])
    records, notes, _ = made(study, splits(TABLE))
    path = "sub-01/sub-01_run-1_sMRI.nii.gz"
    assert records["train"][0] == {
        "task_id": "sub-01_dx",
        "task_type": "T1",
        "subject_ids": ["sub-01"],
        "modalities": ["sMRI"],
        "images": [{"path": path, "token": "<image>", "modality": "sMRI"}],
        "conversations": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "modality": "sMRI", "image_path": path},
                    {"type": "text", "text": "Sex F. What is the dx of this subject?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "healthy."}]},
        ],
        "metadata": {
            "subject_id": "sub-01",
            "subject_label": "healthy",
            "task": "dx",
            "kind": "classification",
            "age": 60.0,
            "sex": "F",
            "code": "000",  # a code with leading zeros stays a text
        },
    }
    rows = [r for split in records.values() for r in split]
    found = {r["metadata"]["subject_id"]: r["metadata"]["subject_label"] for r in rows}
    assert found == TABLE.set_index("subject").dx.map({"0": "healthy", "1": "ill"}).to_dict()
    assert not notes


def test_labels_match_numbers_as_numbers():
    table = TABLE.assign(dx=["0.0", "1"] * 6)
    study = study_of({"dx": {"kind": "classification", "column": "dx", "labels": {"0": "CN", "1.0": "AD"}}})
    records, _, _ = made(study, splits(table))
    assert [r["metadata"]["subject_label"] for r in records["eval"]] == ["CN", "AD"] * 2


@pytest.mark.parametrize(("decimals", "texts"), [(None, "60.25 years"), (1, "60.2 years"), (0, "60 years")])
def test_regression_has_unit_and_decimals(decimals, texts):
    study = study_of({"age": {"kind": "regression", "column": "age", "unit": "years", "decimals": decimals}})
    records, _, _ = made(study, splits(TABLE))
    assert asked(records["train"][1])[-1] == texts
    expected = TABLE.set_index("subject").age.astype(float).to_dict()
    assert {
        r["metadata"]["subject_id"]: r["metadata"]["subject_label"] for s in records.values() for r in s
    } == expected


@pytest.mark.parametrize(
    ("cell", "decimals", "text"),
    [("1e3", None, "1000"), ("007", None, "7"), (".5", None, "0.5"), ("+4.50", None, "4.50"), ("-0.04", 1, "0.0")],
)
def test_a_number_is_answered_as_people_write_it(cell, decimals, text):
    study = study_of({"t": {"kind": "regression", "column": "age", "decimals": decimals}})
    records, _, _ = made(study, splits(TABLE.assign(age=[cell, *TABLE.age[1:]])))
    assert asked(records["train"][0])[-1] == text
    assert records["train"][0]["metadata"]["subject_label"] == float(cell)


@pytest.mark.parametrize("task", [{"kind": "text", "answer": "{target}."}, DX | {"covariates": "{target}."}])
def test_a_column_called_target_has_its_value_in_captions_and_covariates(task):
    records, _, _ = made(study_of({"t": task}), splits(TABLE.assign(target=[f"v{i % 3}" for i in range(12)])))
    assert any("v1." in text for text in asked(records["train"][1]))


def test_subjects_that_differ_in_a_space_have_conversations_of_their_own():
    records, _, _ = made(
        study_of({"t": DX}), splits(TABLE.assign(subject=[f"{i // 2}{' _'[i % 2]}x" for i in range(12)]))
    )
    assert len({r["task_id"] for members in records.values() for r in members}) == 12


def test_codes_of_many_digits_are_different_labels():
    table = TABLE.assign(dx=["10000001", "10000002"] * 6)
    made(study_of({"t": DX}), splits(table))


@pytest.mark.parametrize("kind", ["text", "report"])
def test_a_caption_names_its_columns(kind):
    answers = ["A {age}-year-old {sex}.", "{sex}, {age} years."]
    records, _, _ = made(study_of({"caption": {"kind": kind, "answer": answers}}), splits(TABLE))
    rows = TABLE.set_index("subject")
    for split, phrasings in {"train": 2, "eval": 1}.items():
        used = set()
        for r in records[split]:
            texts = [a.format(**rows.loc[r["metadata"]["subject_id"]]) for a in answers]
            used.add(texts.index(asked(r)[-1]))
            assert r["metadata"]["kind"] == kind
        assert len(used) == phrasings  # only training varies its words
    assert asked(records["eval"][0])[0] == "Describe this subject."


def test_another_subject_or_task_changes_no_conversation():
    task = {
        "kind": "classification",
        "column": "dx",
        "question": ["A?", "B?", "C?"],
        "answer": ["{label}.", "It is {label}."],
    }
    few, _, _ = made(study_of({"dx": task}), splits(TABLE[2:]))
    many, _, _ = made(study_of({"sex": task | {"column": "sex"}, "dx": task}), splits(TABLE), "dx")
    assert all(record in many["train"] for record in few["train"])
    assert len({asked(record)[0] for record in many["train"]}) == 3


def test_modalities_of_a_visit_are_shown_in_order():
    study = study_of({"dx": {"kind": "classification", "column": "dx", "show": ["fMRI", "sMRI"]}}, ("sMRI", "fMRI"))
    table = TABLE.assign(fMRI=[2] + [1] * 10 + [0])
    records, notes, task = made(study, splits(table))
    assert [image["path"][7:] for record in records["train"][:3] for image in record["images"]] == [
        *("sub-01_run-1_fMRI.nii.gz", "sub-01_run-1_sMRI.nii.gz"),
        *("sub-01_run-2_fMRI.nii.gz", "sub-01_run-1_sMRI.nii.gz"),  # no run-2 of sMRI: its first scan
        *("sub-02_run-1_fMRI.nii.gz", "sub-02_run-1_sMRI.nii.gz"),
    ]
    assert [record["task_id"] for record in records["train"][:3]] == ["sub-01_run-1_dx", "sub-01_run-2_dx", "sub-02_dx"]
    assert {record["task_type"] for record in records["train"]} == {"T2"}
    assert notes[0] == "tasks.dx.column: dx: left out: no fMRI scan (1): sub-12"
    assert task.left_out == {"no fMRI scan": 1}


@pytest.mark.parametrize(
    ("visits", "value", "names", "expected"),
    [
        (2, "last", ["bl, m12", "m12, m24"], lambda m: [m[1], m[2]]),
        (2, "first", ["bl, m12", "m12, m24"], lambda m: [m[0], m[1]]),
        (["bl", "m24"], "change", ["bl, m24"], lambda m: [m[2] - m[0]]),
    ],
)
def test_several_visits_in_one_conversation(visits, value, names, expected):
    study = study_of({"mmse": {"kind": "regression", "column": "mmse", "visits": visits, "value": value}})
    records, _, _ = made(study, splits(LONG))
    table = LONG.assign(mmse=LONG.mmse.astype(int)).groupby("subject").mmse.apply(list)
    for subject in table.index:
        own = [r for s in records.values() for r in s if r["metadata"]["subject_id"] == subject]
        assert [r["metadata"]["visit"] for r in own] == names
        assert [r["metadata"]["subject_label"] for r in own] == expected(table[subject])
        assert [len(r["images"]) for r in own] == [2] * len(names)


def test_what_is_missing_is_left_out_and_counted():
    table = LONG.copy()
    table.loc[0, "mmse"] = None
    table.loc[4, "sMRI"] = 0
    table = table.drop([7, 8]).fillna({"sMRI": 1})
    study = study_of({"mmse": {"kind": "regression", "column": "mmse", "visits": 2, "value": "change"}})
    records, notes, task = made(study, splits(table))
    assert task.left_out == {"no value of mmse": 1, "no sMRI scan": 2, "fewer than 2 visits": 1}
    assert "tasks.mmse.column: mmse: left out: no sMRI scan (2): sub-02 ses-bl ses-m12, sub-02 ses-m12 ses-m24" in notes
    assert sum(map(len, records.values())) == 16 - 1 - 2 - 2


def test_comparison_exactly():
    study = study_of({"sex": {"kind": "comparison", "column": "sex", "references": {"per_query": 1}}})
    records, _, _ = made(study, splits(TABLE))
    record = records["eval"][0]
    reference = record["metadata"]["reference_id"]
    label = TABLE.set_index("subject").sex[reference]
    assert record["task_id"] == f"sub-09_vs_{reference}_sex"
    assert record["task_type"] == "T3"
    assert record["subject_ids"] == [reference, "sub-09"]
    assert asked(record) == [
        "This is a reference. What is the sex of this subject?",
        f"{label}.",
        "Compared with the reference, what is the sex of this subject?",
        "F.",
    ]
    assert record["metadata"] == {
        "subject_id": "sub-09",
        "subject_label": "F",
        "reference_id": reference,
        "reference_label": label,
        "comparison_type": "same" if label == "F" else "different",
        "task": "sex",
        "kind": "comparison",
    }


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.sampled_from("abc"), min_size=12, max_size=30),
    st.sampled_from([1, 2, 3, 5, 10]),
    st.integers(1, 5),
    st.sampled_from(["train", "same"]),
    st.integers(0, 3),
)
def test_references_are_of_others_of_the_right_split_and_balanced(labels, count, per_query, split, seed):
    labels = [*"abc" * 6, *labels, *"abc" * 6]  # so that there are five different lists of 10 references in both splits
    table = pd.DataFrame({"subject": [f"s{i:02}" for i in range(len(labels))], "x": labels})
    parts = {"train": table[:-18], "eval": table[-18:]}
    task = {"kind": "comparison", "column": "x", "references": {"count": count, "per_query": per_query, "split": split}}
    study = study_of({"x": task}, split={"seed": seed})
    label_of = table.set_index("subject").x
    records, notes, _ = made(study, {name: visits_from(part) for name, part in parts.items()})
    assert not [note for note in notes if "short" in note]
    ids = Counter(r["task_id"] for s in records.values() for r in s)
    assert max(ids.values()) == 1
    for name, members in records.items():
        pool = set(parts["train" if split == "train" else name].subject)
        kinds = Counter()
        for r in members:
            *references, query = r["subject_ids"]
            metadata = r["metadata"]
            assert len(set(references)) == count
            assert set(references) <= pool - {query}
            assert metadata["reference_id"] == references[-1]
            assert metadata["reference_label"] == label_of[references[-1]]
            same = label_of[references[-1]] == label_of[query]
            assert metadata["comparison_type"] == ("same" if same else "different")
            kinds[query, same] += 1
            if count > 1:
                assert metadata["reference_ids"] == references
                assert metadata["reference_labels"] == [label_of[n] for n in references]
                among = Counter(dict.fromkeys("abc", 0)) | Counter(label_of[n] for n in references)
                assert max(among[x] for x in "abc") - min(among[x] for x in "abc") <= 1
        if count == 1:
            for query in parts[name].subject:
                assert abs(kinds[query, True] - kinds[query, False]) <= 1
            for label in "abc":
                of_label = [q for q in parts[name].subject if label_of[q] == label]
                assert abs(sum(kinds[q, True] for q in of_label) - sum(kinds[q, False] for q in of_label)) <= 1


def test_references_of_train_are_no_overlap(tmp_path):
    task = {"kind": "comparison", "column": "sex", "references": {"count": 3, "per_query": 2}}
    records, _, _ = made(study_of({"sex": task}), splits(TABLE))
    sets = {}
    for split, members in records.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(members))
        sets[split] = read_conversations(tmp_path / f"{split}.json", ["T1"])
    train = {subject for c in sets["train"] for subject in c.subjects}
    for conversation, record in zip(sets["eval"], records["eval"], strict=True):
        assert conversation.subjects - conversation.references == {record["metadata"]["subject_id"][4:]}
        assert conversation.references <= train
        assert [i.path.name for i in conversation.queried_images] == [record["images"][-1]["path"].split("/")[1]]


MISTAKES = [
    (
        {"kind": "regression", "column": "agee"},
        {},
        "tasks.t.column: agee: no such column, or no visit has a value in it; the nearest is age",
    ),
    (
        {"kind": "regression", "column": "age"},
        {"age": ["61", "x", "x", *map(str, range(62, 71))]},
        "tasks.t.column: age: expected a number or n/a, got x (sub-02, sub-03)",
    ),
    (
        {"kind": "regression", "column": "age"},
        {"age": [f"{i},5" for i in range(12)]},
        "tasks.t.column: age: numbers with a comma: 0,5 (sub-01), 1,5 (sub-02), 2,5 (sub-03), 3,5 (sub-04), "
        "4,5 (sub-05) (12); write a decimal point and no thousands separator",
    ),
    (
        {"kind": "classification", "column": "age"},
        {"age": ["old", *map(str, range(11))]},
        "tasks.t.column: age: numbers and words mixed; write numbers or n/a instead of old (sub-01), or describe each "
        "value in tasks.t.labels",
    ),
    (
        {"kind": "comparison", "column": "age"},
        {},
        "tasks.t.column: age: 12 distinct numbers, so hardly any two subjects have the same label; compare a column "
        "with few labels, such as groups of these numbers",
    ),
    (
        {"kind": "classification", "column": "sex"},
        {"sex": ["F", "f", "M", "M"] * 3},
        "tasks.t.column: sex: one label or several? 'F' (3: sub-01, sub-05, sub-09), 'f' (3: sub-02, sub-06, sub-10); "
        "spell them the same in the table, or give them the same text in tasks.t.labels",
    ),
    (
        {"kind": "classification", "column": "sex"},
        {"sex": ["F"] * 12},
        "tasks.t.column: sex: every subject is F; expected at least two labels",
    ),
    (
        {"kind": "classification", "column": "sex"},
        {"sex": ["F"] * 8 + ["M"] * 4},
        "tasks.t.column: sex: label 'M' is in eval (4: sub-09, sub-10, sub-11, sub-12) and not in train; stratify by "
        "the column (split.stratify), or use another seed",
    ),
    (
        {"kind": "classification", "column": "sex"},
        {"sex": ["F", "X"] + ["F", "M"] * 5},
        "tasks.t.column: sex: label 'X' has one subject, sub-02; nothing can be learnt and tested about it: leave it "
        "out with `include`, or give it another label's text in tasks.t.labels",
    ),
    (
        {"kind": "classification", "column": "sex"},
        {"sex": ["F", "M"] * 4 + ["F"] * 4},
        "tasks.t.column: sex: eval: every subject is F (F 4, M 0); stratify by the column (split.stratify), give the "
        "split a larger share, or use another seed",
    ),
    (
        {"kind": "classification", "column": "sex", "question": "Is it {label}?"},
        {},
        "tasks.t.question: placeholder 'label': expected {target} or {age} or {code} or {dx} or {sex} or {subject}",
    ),
    (
        {"kind": "classification", "column": "sex", "answer": ["{label}.", "Yes."]},
        {},
        "tasks.t.answer[1]: expected {label} in it; without it every subject has the same answer",
    ),
    ({"kind": "classification", "column": "sex", "question": []}, {}, "tasks.t.question: expected at least one text"),
    (
        {"kind": "text", "answer": "A subject."},
        {},
        "tasks.t.answer: expected {COLUMN} in it; without it every subject has the same answer",
    ),
    (
        {"kind": "classification", "column": "sex", "labels": {"F": "<image>"}},
        {},
        "tasks.t.labels.F: contains <image>, which only the tokenizer may add; take it out",
    ),
    (
        {"kind": "classification", "column": "sex", "covariates": "{code}"},
        {"code": ["<|im_end|>", *map(str, range(11))]},
        "tasks.t: code: contains a token that marks a turn or an image, which only the tokenizer may add; take it out: "
        "sub-01",
    ),
    (
        {"kind": "comparison", "column": "sex", "references": {"count": 10}},
        {},
        "tasks.t.references.count: 10 for one query, but train has only 8 subjects, the query's own included; lower "
        "it, or give train a larger share",
    ),
    (
        {"kind": "classification", "column": "sex"},
        {"sMRI": [1] * 8 + [0] * 4},
        "tasks.t.column: sex: eval: no subject has what the task needs; give the split a larger share, another seed, "
        "or leave it out",
    ),
]


@pytest.mark.parametrize(("task", "columns", "message"), MISTAKES, ids=[m[2][:60] for m in MISTAKES])
def test_refuses_a_mistake_with_its_rows(task, columns, message):
    assert faults_of(study_of({"t": task}), splits(TABLE.assign(**columns))) == [message]


def test_refuses_a_column_to_keep_that_is_metadata_already():
    study = study_of({"sex": {"kind": "classification", "column": "sex"}}, keep=["visit", "agee"])
    assert faults_of(study, splits(TABLE.assign(visit="1"))) == [
        "keep: visit: no such column, or no visit has a value in it; columns: age, code, dx, sex, subject",
        "keep: agee: no such column, or no visit has a value in it; the nearest is age",
        "keep: visit: metadata of this name is there already; rename the column in `columns`",
    ]
