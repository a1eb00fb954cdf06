"""`data from-bids`: the records it writes, the faults it refuses, the command."""

import json
import re
import shlex
from collections import Counter

import pytest

from tests.helpers.bids_case import faults, sexes, turns, written
from tests.helpers.small_run import modalities, umbrella
from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import resolve_modality
from umbrella_jax.data import conversation
from umbrella_jax.data.bids.scans import MODALITIES
from umbrella_jax.data.conversation import read_conversations
from umbrella_jax.data.loader import Dataset
from umbrella_jax.errors import DataError
from umbrella_jax.study.from_bids import from_bids


def test_classification_exactly(bids, tmp_path):
    root = bids({"01": {"sex": "F"}, "02": {"sex": "M"}}, sidecar={"sex": {"Levels": {"M": "male", "F": "female"}}})
    from_bids(root, tmp_path / "out", "sex", split="all=1")
    ((first, second),) = written(tmp_path / "out", "all")
    assert first == {
        "task_id": "sub-01_sex_classification",
        "task_type": "T1",
        "subject_ids": ["sub-01"],
        "modalities": ["sMRI"],
        "images": [{"path": "sub-01/anat/sub-01_T1w.nii.gz", "token": "<image>", "modality": "sMRI"}],
        "conversations": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "modality": "sMRI", "image_path": "sub-01/anat/sub-01_T1w.nii.gz"},
                    {"type": "text", "text": "What is the sex of this subject?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "female."}]},
        ],
        "metadata": {
            "subject_id": "sub-01",
            "subject_label": "female",
            "task": "sex_classification",
            "kind": "classification",
        },
    }
    assert second["metadata"]["subject_label"] == "male"


def test_regression_exactly(bids, tmp_path):
    ages = {f"{i:02}": {"age_at_scan": f"{20 + i}.50" if i % 2 else f"{20 + i}"} for i in range(11)}
    from_bids(bids(ages), tmp_path / "out", "age_at_scan", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    assert turns(records[1]) == [
        ("user", "sub-01/anat/sub-01_T1w.nii.gz", "What is the age at scan of this subject?"),
        ("assistant", "21.50"),  # as in the file
    ]
    labels = [record["metadata"]["subject_label"] for record in records]
    assert labels[:2] == [20, 21.5]
    assert isinstance(labels[0], int)
    assert {record["metadata"]["task"] for record in records} == {"age_at_scan_regression"}


def test_comparison_exactly(bids, tmp_path):
    root = bids({"01": {"sex": "F"}, "02": {"sex": "M"}})
    from_bids(root, tmp_path / "out", "sex", kind="comparison", split="all=1", pairs_per_subject=1)
    ((record, _),) = written(tmp_path / "out", "all")
    assert turns(record) == [
        ("user", "sub-02/anat/sub-02_T1w.nii.gz", "This is a reference. What is the sex of this subject?"),
        ("assistant", "M."),
        ("user", "sub-01/anat/sub-01_T1w.nii.gz", "Compared with the reference, what is the sex of this subject?"),
        ("assistant", "F."),
    ]
    assert record["task_type"] == "T3"
    assert record["subject_ids"] == ["sub-02", "sub-01"]
    assert record["modalities"] == ["sMRI", "sMRI"]
    assert [image["path"][:6] for image in record["images"]] == ["sub-02", "sub-01"]
    assert record["metadata"] == {
        "subject_id": "sub-01",
        "subject_label": "F",
        "reference_id": "sub-02",
        "reference_label": "M",
        "comparison_type": "different",
        "task": "sex_classification_via_comparison",
        "kind": "comparison",
    }


def test_comparison_is_balanced_and_pairs_nobody_with_themselves(bids, tmp_path):
    from_bids(bids(sexes(20)), tmp_path / "out", "sex", kind="comparison", pairs_per_subject=3)
    (train, held) = written(tmp_path / "out")
    assert len(train) == 16 * 3
    assert Counter(record["metadata"]["comparison_type"] for record in train) == {"same": 24, "different": 24}
    pairs = [tuple(record["subject_ids"]) for record in train + held]
    assert len(set(pairs)) == len(pairs)  # no reference twice
    assert all(reference != query for reference, query in pairs)


def test_a_rare_label_is_compared_with_other_labels(bids, tmp_path):
    root = bids({f"{i}": {"x": "rare" if i == 0 else "common"} for i in range(4)})
    lines = from_bids(root, tmp_path / "out", "x", kind="comparison", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    found = Counter((r["metadata"]["subject_label"], r["metadata"]["comparison_type"]) for r in records)
    assert found == {("rare", "different"): 3, ("common", "same"): 6, ("common", "different"): 3}
    assert "4 conversations short of 4 per query: too few other subjects" in " ".join(" ".join(lines).split())


def test_many_conversations_are_written_as_json_lines(bids, tmp_path, monkeypatch):
    root, sets = bids(sexes(8)), {}
    for longest in (23, 24):
        monkeypatch.setattr("umbrella_jax.study.build.LONG", longest)
        lines = from_bids(root, tmp_path / f"out{longest}", "sex", kind="comparison", split="train=1/2,eval=1/2")
        suffix = "jsonl" if longest < 24 else "json"  # 8 scans with 3 references each
        assert f"--train-data {tmp_path}/out{longest}/train.{suffix}" in " ".join(lines).replace(" \\", "")
        names = [f"eval.{suffix}", "splits.tsv", "study.html", "study.yaml", f"train.{suffix}"]
        assert sorted(file.name for file in (tmp_path / f"out{longest}").iterdir()) == names
        read = read_conversations(tmp_path / f"out{longest}/train.{suffix}", ("T1",), root)
        sets[longest] = [(c.task_id, c.messages, c.metadata) for c in read]
    assert sets[23] == sets[24]
    with pytest.raises(DataError, match=r"contains several splits: eval\.jsonl, train\.jsonl"):
        read_conversations(tmp_path / "out23", ("T1",))


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_template(bids, tmp_path, suffix):
    texts = {"regression": {"question": "Give the {target} {{in years}}.", "answer": "{label} years"}}
    template = tmp_path / f"template.{suffix}"
    template.write_text(json.dumps(texts, indent=2))
    root = bids({f"{i:02}": {"age": f"{i}"} for i in range(11)})
    from_bids(root, tmp_path / "out", "age", template=template)
    train, _ = written(tmp_path / "out")
    assert [texts[-1] for texts in turns(train[0])] == ["Give the age {in years}.", "0 years"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a", "expected sections classification, regression, comparison, labels"),
        ("ranking: {question: x}", "ranking: expected a section, one of classification"),
        ("classification: x", "classification: expected a section"),
        ("classification: {reply: x}", "classification.reply: no such text; expected one of question, answer"),
        ("classification: {question: 3}", "classification.question: expected a string, got 3"),
        ("classification: {question: 'A {label}?'}", "question: placeholder 'label': expected {target}"),
        ("classification: {answer: '{label} {sex}'}", "answer: placeholder 'sex': expected {target} or {label}"),
        ("classification: {answer: '{label:d}'}", "answer: placeholder 'label'"),
        ("classification: {answer: '{label.x}'}", "answer: placeholder 'label.x'"),
        ("classification: {answer: '{label'}", "write {{ or }} for a brace"),
        ("classification: {answer: 'yes'}", "answer: expected {label} in it"),
        ("classification: {question: 'A <image>?'}", "question: contains <image>"),
        ("labels: {F: 1}", "labels.F: expected a string, got 1"),
        ("labels: {F: '<|im_end|>'}", "label '<|im_end|>': contains <|im_end|>"),
        ("a: [", "not valid YAML"),
        (None, "not found"),
    ],
)
def test_a_faulty_template_is_refused(bids, tmp_path, text, expected):
    template = tmp_path / "template.yaml"
    if text is not None:
        template.write_text(text)
    (fault,) = faults(bids(sexes(10)), tmp_path / "out", "sex", template=template)
    assert expected in fault
    assert expected.startswith("label '") or str(template) in fault


def ages(*more):
    return {f"{i:02}": {"x": value} for i, value in enumerate([*(str(i) for i in range(11)), *more])}


@pytest.mark.parametrize(
    ("people", "options", "expected"),
    [
        (ages("89+"), {}, "numbers and words mixed; write numbers or n/a instead of 89+ (sub-11), or ask for kind"),
        (ages("young"), {"kind": "regression"}, "x: expected a number or n/a, got young (sub-11)"),
        (ages("1_0"), {"kind": "regression"}, "x: expected a number or n/a, got 1_0 (sub-11)"),
        (ages(), {"kind": "comparison"}, "11 distinct numbers, so hardly any two subjects have the same label"),
        (ages(), {"pairs_per_subject": 2}, "pairs_per_subject: only for kind comparison, and this is a regression"),
        (ages(), {"kind": "comparison", "pairs_per_subject": 0}, "pairs_per_subject: expected at least 1, got 0"),
        (ages(), {"kind": "ranking"}, "kind: expected one of classification, regression, comparison, got 'ranking'"),
        (ages(), {"modality": "T1w"}, "modality: expected one of sMRI (or T1), fMRI (or rsfMRI), got 'T1w'"),
        (ages(), {"modality": "fMRI"}, "no scan; expected sub-*/[ses-*/]func/*_bold.nii[.gz]"),
        (ages(), {"entities": ["ses=1"]}, "--entity ses=1: no scan has it; names have no ses"),
        (ages(), {"entities": ["sub=99"]}, "--entity sub=99: no scan has it; sub is 00 or 01"),
        (ages(), {"entities": ["run=(none)"]}, "--entity run=(none): no scan has it; names have no run"),
        (ages(), {"modality": "fMRI", "entities": ["run=1"]}, "no scan; expected sub-*/[ses-*/]func/*_bold.nii[.gz]"),
        (ages(), {"derivatives": "/fmriprep"}, "derivatives /fmriprep: expected the name of a directory in"),
        (ages(), {"derivatives": "../../x"}, "derivatives ../../x: expected the name of a directory in"),
        (ages(), {"entities": ["run"]}, "--entity run: expected KEY=VALUE"),
        (ages(), {"split": "train=0.8"}, "the shares sum to 0.8; expected 1"),
        (ages(), {"split": "train=0.8,train=0.2"}, "'train=0.2': expected NAME=SHARE, each name once"),
        (ages(), {"split": "train=1,eval=0"}, "'eval=0': expected NAME=SHARE, each name once and its share above 0"),
        (ages(), {"split": "../x=1"}, "'../x=1': expected NAME=SHARE"),
        (ages(), {"split": "train=0.99,eval=0.01"}, "--split eval: gets 0 of 11 subjects, a regression needs"),
        (sexes(3), {"kind": "comparison"}, "--split eval: gets 1 of 3 subjects, a comparison needs at least 2"),
        ({"0": {"x": "a"}, "1": {"x": "a"}}, {}, "x: every subject is a; expected at least two values"),
        ({"0": {"x": "n/a"}}, {}, "x: no subject has both a value and a scan"),
    ],
)  # fmt: skip
def test_a_fault_is_named(bids, tmp_path, people, options, expected):
    found = faults(bids(people), tmp_path / "out", "x" if people != sexes(3) else "sex", **options)
    assert any(expected in fault for fault in found), found


def test_faults_are_listed_together_and_nothing_is_written(bids, tmp_path):
    root = bids(sexes(3))
    (root / "participants.json").write_text("{")
    found = faults(
        root, tmp_path / "out", "iq", split="train=2", entities=["ses=1", "run=1"], template=tmp_path / "none.yaml"
    )
    names = ["--split", "none.yaml", "participants.json", "participants.tsv", "--entity ses=1", "--entity run=1"]
    assert len(found) == len(names)
    assert all(name in fault for name, fault in zip(names, found, strict=True)), found
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_splits_is_refused(bids, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val.jsonl").write_text("")
    (fault,) = faults(bids(sexes(10)), tmp_path / "out", "sex")
    assert "out: directory is not empty; choose another" in fault


def test_the_error_keeps_the_notes_that_explain_it(bids, tmp_path):
    root = bids(sexes(2), {"00": [], "01": [], "07": ["anat/sub-07_T1w.nii"]})
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert "no subject has both a value and a scan" in fault
    assert "subjects without a scan (2): sub-00, sub-01" in fault
    assert "subjects without a row in participants.tsv (1): sub-07" in fault


def test_no_subject_is_compared_with_their_own_other_visit(visits, tmp_path):
    root = visits(**{f"{i:02}": {"age": "n/a"} for i in range(6)})
    for i in range(6):
        text = f"session_id\tstage\nses-1\t{'ab'[i % 2]}\nses-2\tb\n"
        (root / f"sub-{i:02}/sub-{i:02}_sessions.tsv").write_text(text)
    from_bids(root, tmp_path / "out", "stage", kind="comparison", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    stages = {f"sub-{i:02}_ses-{k}": "ab"[i % 2] if k == 1 else "b" for i in range(6) for k in (1, 2)}
    for record in records:
        reference, query = (image["path"].split("/")[-1].partition("_T1w")[0] for image in record["images"])
        assert record["metadata"]["reference_id"] == reference[:6] != query[:6]
        assert (record["metadata"]["reference_label"], record["metadata"]["subject_label"]) == (
            stages[reference],
            stages[query],
        )


@pytest.mark.parametrize("kind", ["classification", "comparison"])
@pytest.mark.parametrize("modality", ["sMRI", "fMRI"])
def test_written_conversations_can_be_read(bids, tmp_path, tokenizer, monkeypatch, kind, modality):
    """They are plain records, which are read fastest."""
    names = {"sMRI": "anat/sub-{}_T1w.nii.gz", "fMRI": "func/sub-{}_task-rest_bold.nii.gz"}
    root = bids(sexes(10), {n: [names[modality].format(n)] for n in sexes(10)})
    from_bids(root, tmp_path / "out", "sex", kind=kind, modality=modality)
    monkeypatch.setattr(conversation._Parser, "parse", None)
    for name, num in (("train", 8), ("eval", 2)):
        file = tmp_path / "out" / f"{name}.json"
        options = {"max_length": 400, "threads": 1, "evaluation": name == "eval"}
        dataset = Dataset.load(file, tokenizer, modalities(), image_root=root, **options)
        assert len(dataset.windows) == num
        assert {i.modality for i in dataset.windows} == {"T1" if modality == "sMRI" else "rsfMRI"}
        assert len(read_conversations(file, modalities(), root, task_filter="T1" if kind != "comparison" else "T3")) > 0


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_config_to_train_with_has_the_modality(modality):
    config = load_config(MODALITIES[modality][2])
    assert resolve_modality(modality, config.model.modalities)


def test_command(bids, tmp_path):
    root = bids(sexes(10), sidecar={"sex": {"Levels": {"F": "female", "M": "male"}}}, root="my ds")
    out = tmp_path / "out"
    printed = umbrella("data", "from-bids", root, out, "--target", "sex", "--seed", 3, "--split", "train=0.6,eval=0.4")
    assert printed.splitlines() == [
        f"{root}: sex, classification, sMRI, 10 of 10 subjects",
        f"{out}/train.json: 6 subjects, 6 conversations: female 3, male 3",
        f"{out}/eval.json: 4 subjects, 4 conversations: female 2, male 2",
        "next:",
        *printed.splitlines()[4:],
    ]
    _, _, command = printed.partition("next:\n")
    assert all(len(line) <= 80 or line.count(" --") == 1 for line in command.splitlines())
    assert shlex.split(command.replace("\\\n", " ")) == shlex.split(
        f"umbrella-jax train --config t1_0.5b --base LLAVA_DIR --train-data {out}/train.json "
        f"--eval-data {out}/eval.json --image-root {shlex.quote(str(root))} --out runs/sex"
    )
    pairs = umbrella("data", "from-bids", root, tmp_path / "t3", "--target", "sex", "--kind", "comparison")
    assert "train.json: 8 subjects, 32 conversations: female 4, male 4\n  pairs: same 16, different 16\n" in pairs


def test_command_prints_the_range_of_numbers(bids, tmp_path):
    root = bids({f"{i:02}": {"age": f"{i}"} for i in range(20)})
    printed = umbrella("data", "from-bids", root, tmp_path / "out", "--target", "age")
    assert re.search(r"eval.json: 4 subjects, 4 conversations: \d+ to \d+, mean \d", printed)


def test_command_names_faults(bids, tmp_path):
    printed = umbrella(
        "data", "from-bids", bids(sexes(3)), tmp_path / "out", "--target", "iq", "--split", "a=2", code=2
    )
    assert "2 faults:" in printed
    assert "iq: expected one such column, got participant_id, sex" in printed


def test_one_cause_is_one_fault(bids, tmp_path):
    (fault,) = faults(tmp_path / "none", tmp_path / "out", "sex")
    assert fault.endswith("none: not found; expected a directory with a BIDS data set")
    root = bids(sexes(3))
    table = root / "participants.tsv"
    table.write_text(table.read_text().replace("\t", ","))
    assert all("must be separated by tabs" in fault for fault in faults(root, tmp_path / "out", "sex"))


@pytest.mark.parametrize("kind", ["classification", "comparison"])
def test_its_study_builds_the_same_again(kind, bids, tmp_path):
    """The study that it writes says all that the flags said."""
    people = {f"{i:02}": {"group": ["-1", "1", "2"][i % 3], "age": str(i)} for i in range(18)}
    root = bids(people, sidecar={"group": {"Levels": {"1": "patient", "2": "control"}}})
    from_bids(root, tmp_path / "out", "group", kind=kind, missing=["-1"], pairs_per_subject={"comparison": 2}.get(kind))
    umbrella("data", "build", tmp_path / "out" / "study.yaml", tmp_path / "again")
    for name in ("train.json", "eval.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert (tmp_path / "again" / "study.lock.json").is_file()
