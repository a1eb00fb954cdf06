"""BIDS data sets to conversations: what is asked and answered, of which scans, in which split; what is refused."""

import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.small_run import umbrella
from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import resolve_modality
from umbrella_jax.data.bids import MODALITIES, from_bids
from umbrella_jax.data.conversation import read_conversations
from umbrella_jax.data.ignore_file import IgnoreFile
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.subject_split import split_subjects
from umbrella_jax.data.tables import check_columns, doubtful, read_table, subject_rows
from umbrella_jax.errors import DataError


@pytest.fixture
def bids(tmp_path, nifti):
    """`bids({"01": {"sex": "F"}}, {"01": ["anat/sub-01_T1w.nii.gz"]})`: a data set; by default a T1w each."""

    def make(participants, scans=None, sidecar=None, root="ds", encoding="utf-8"):
        folder = tmp_path / root
        folder.mkdir()
        columns = list(dict.fromkeys(column for row in participants.values() for column in row))
        rows = [[f"sub-{name}", *(row.get(c, "n/a") for c in columns)] for name, row in participants.items()]
        lines = ["\t".join(row) for row in [["participant_id", *columns], *rows]]
        (folder / "participants.tsv").write_text("\n".join(lines) + "\n", encoding=encoding)
        if sidecar is not None:
            (folder / "participants.json").write_text(json.dumps(sidecar))
        for name, files in (scans or {name: [f"anat/sub-{name}_T1w.nii.gz"] for name in participants}).items():
            for file in files:
                nifti(f"{root}/sub-{name}/{file}", (4, 3, 5, 10) if "_bold" in file else (6, 7, 5))
        return folder

    return make


def sexes(num):
    return {f"{i:02}": {"sex": "FM"[i % 2]} for i in range(num)}


def written(folder, *names):
    """The records of each split."""
    return [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names or ("train", "eval")]


def subjects(records):
    return {subject for record in records for subject in record["subject_ids"]}


def turns(record):
    """(role, image or None, text) of each."""
    return [
        (turn["role"], *(part.get("image_path", part.get("text")) for part in turn["content"]))
        for turn in record["conversations"]
    ]


def faults(*args, **options):
    with pytest.raises(DataError) as caught:
        from_bids(*args, **options)
    assert not Path(args[1]).exists() or not Path(args[1], "train.json").exists()
    return caught.value.faults


def test_classification_exactly(bids, tmp_path):
    root = bids({"01": {"sex": "F"}, "02": {"sex": "M"}}, sidecar={"sex": {"Levels": {"M": "male", "F": "female"}}})
    from_bids(root, tmp_path / "out", "sex", split="all=1")
    ((first, second),) = written(tmp_path / "out", "all")
    assert first == {
        "task_id": "sub-01_T1w_sex_classification",
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


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([str(i) for i in range(11)], "regression"),
        ([str(i % 10) for i in range(20)], "classification"),
        ([f"site{i}" for i in range(11)], "classification"),
    ],
)
def test_default_kind(bids, tmp_path, values, kind):
    root = bids({f"{i:02}": {"x": value} for i, value in enumerate(values)})
    from_bids(root, tmp_path / "out", "x")
    assert written(tmp_path / "out")[0][0]["metadata"]["task"] == f"x_{kind}"


@pytest.mark.parametrize("kind", ["classification", "comparison"])
def test_splits_are_disjoint_stratified_and_a_function_of_the_seed(bids, tmp_path, kind):
    root = bids({f"{i:02}": {"sex": "F" if i % 4 else "M"} for i in range(40)})  # 30 F, 10 M

    def made(out, **options):
        from_bids(root, tmp_path / out, "sex", kind=kind, split="train=0.7,val=0.1,eval=0.2", **options)
        return written(tmp_path / out, "train", "val", "eval")

    first = made("a")
    assert [len(subjects(records)) for records in first] == [28, 4, 8]
    assert len(set.union(*map(subjects, first))) == 40
    of_subjects = [{r["metadata"]["subject_id"]: r["metadata"]["subject_label"] for r in records} for records in first]
    labels = [Counter(found.values()) for found in of_subjects]
    assert labels == [{"F": 21, "M": 7}, {"F": 3, "M": 1}, {"F": 6, "M": 2}]
    assert made("b") == first
    assert made("c", seed=7) != first


def test_regression_is_stratified_by_quantile(bids, tmp_path):
    root = bids({f"{i:03}": {"age": str(i)} for i in range(100)})
    from_bids(root, tmp_path / "a", "age")
    from_bids(root, tmp_path / "b", "age", seed=7)
    train, held = written(tmp_path / "a")
    assert len(train) == 80
    deciles = Counter(record["metadata"]["subject_label"] // 10 for record in held)
    assert deciles.total() == 20
    assert all(abs(deciles[decile] - 2) <= 1 for decile in range(10))
    assert written(tmp_path / "b")[1] != held


def test_comparison_is_balanced_and_pairs_nobody_with_themselves(bids, tmp_path):
    from_bids(bids(sexes(20)), tmp_path / "out", "sex", kind="comparison", pairs_per_subject=3)
    (train, held) = written(tmp_path / "out")
    assert len(train) == 16 * 3
    assert Counter(record["metadata"]["comparison_type"] for record in train) == {"same": 24, "different": 24}
    pairs = [tuple(record["subject_ids"]) for record in train + held]
    assert len(set(pairs)) == len(pairs)  # no reference twice
    assert all(reference != query for reference, query in pairs)


def test_comparison_fills_up_where_a_label_is_rare(bids, tmp_path):
    root = bids({f"{i}": {"x": "rare" if i == 0 else "common"} for i in range(4)})
    lines = from_bids(root, tmp_path / "out", "x", kind="comparison", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    found = Counter((r["metadata"]["subject_label"], r["metadata"]["comparison_type"]) for r in records)
    assert found == {("rare", "different"): 3, ("common", "same"): 6, ("common", "different"): 3}
    assert "all: 4 pairs fewer than 4 a scan: not enough other subjects" in lines


SESSIONS = {
    "01": ["ses-1/anat/sub-01_ses-1_T1w.nii.gz", "ses-2/anat/sub-01_ses-2_run-1_T1w.nii", "anat/sub-01_T2w.nii.gz"],
    "02": ["ses-1/anat/sub-02_ses-1_acq-mprage_T1w.nii.gz", "ses-1/anat/sub-02_ses-1_desc-brain_mask.nii.gz"],
}


@pytest.mark.parametrize(
    ("entities", "paths"),
    [
        (
            [],
            [
                *("01/ses-1/anat/sub-01_ses-1", "01/ses-2/anat/sub-01_ses-2_run-1"),
                *("02/ses-1/anat/sub-02_ses-1_acq-mprage", "03/anat/sub-03_ses-2_run-1"),
            ],
        ),
        (["ses=1"], ["01/ses-1/anat/sub-01_ses-1", "02/ses-1/anat/sub-02_ses-1_acq-mprage"]),
        (["run=1", "ses=2"], ["01/ses-2/anat/sub-01_ses-2_run-1", "03/anat/sub-03_ses-2_run-1"]),
    ],
)
def test_sessions_and_entities(bids, tmp_path, entities, paths):
    root = bids(
        {"01": {"age": "1"}, "02": {"age": "2"}, "03": {"age": "3"}},
        {**SESSIONS, "03": ["anat/sub-03_ses-2_run-1_T1w.nii"]},
    )
    lines = from_bids(root, tmp_path / "out", "age", split="all=1", entities=entities)
    (records,) = written(tmp_path / "out", "all")
    found = [r["images"][0]["path"].removeprefix("sub-").partition("_T1w")[0] for r in records]
    assert found == paths
    text = " ".join(" ".join(lines).split())  # without line breaks
    if entities:
        assert f"scans that are not {' '.join(entities)}" in text
    else:
        assert (
            "subjects with several scans, all of them taken (1); --entity KEY=VALUE narrows: run 1, none; ses 1, 2"
            in text
        )


def test_a_key_twice_takes_either(bids, tmp_path):
    root = bids(sexes(2), {n: [f"anat/sub-{n}_run-{r}_T1w.nii" for r in (1, 2, 3)] for n in sexes(2)})
    from_bids(root, tmp_path / "out", "sex", split="all=1", entities=["run=1", "run=3"])
    (records,) = written(tmp_path / "out", "all")
    assert [r["task_id"][:12] for r in records] == ["sub-00_run-1", "sub-00_run-3", "sub-01_run-1", "sub-01_run-3"]


def test_many_conversations_are_written_as_json_lines(bids, tmp_path, monkeypatch):
    root, sets = bids(sexes(8)), {}
    for longest in (31, 32):
        monkeypatch.setattr("umbrella_jax.data.bids.LONG", longest)
        told = from_bids(root, tmp_path / f"out{longest}", "sex", kind="comparison", split="train=1/2,eval=1/2")
        suffix = "jsonl" if longest < 32 else "json"  # 8 scans with 4 references each
        assert f"--train-data {tmp_path}/out{longest}/train.{suffix}" in " ".join(told).replace(" \\", "")
        names = [f"eval.{suffix}", "splits.tsv", f"train.{suffix}"]
        assert sorted(file.name for file in (tmp_path / f"out{longest}").iterdir()) == names
        read = read_conversations(tmp_path / f"out{longest}/train.{suffix}", ("T1",), root)
        sets[longest] = [(c.task_id, c.messages, c.metadata) for c in read]
    assert sets[31] == sets[32]
    with pytest.raises(DataError, match=r"holds several splits: eval\.jsonl, train\.jsonl"):
        read_conversations(tmp_path / "out31", ("T1",))


def test_scans_of_a_subject_stay_together(bids, tmp_path):
    files = {n: [f"ses-{s}/anat/sub-{n}_ses-{s}_T1w.nii" for s in (1, 2)] for n in sexes(10)}
    for kind in ("classification", "comparison"):
        from_bids(bids(sexes(10), files, root=kind), tmp_path / f"out-{kind}", "sex", kind=kind)
        train, held = written(tmp_path / f"out-{kind}")
        assert not subjects(train) & subjects(held)
        assert len({image["path"] for record in train for image in record["images"]}) == 16


def test_functional_runs_are_of_rest_unless_asked(bids, tmp_path):
    files = {n: [f"func/sub-{n}_task-{t}_bold.nii.gz" for t in ("rest", "nback")] for n in sexes(2)}
    files["00"].append("func/sub-00_task-rest_sbref.nii.gz")
    root = bids(sexes(2), files)
    lines = from_bids(root, tmp_path / "rest", "sex", modality="fMRI", split="train=0.5,eval=0.5")
    train, held = written(tmp_path / "rest")
    assert all(r["images"][0]["path"].endswith("_task-rest_bold.nii.gz") for r in train + held)
    assert train[0]["modalities"] == ["fMRI"]
    assert "left out: runs of other tasks (2), which --entity task=VALUE takes: nback" in lines
    assert any("--config rsfmri_0.5b " in line for line in lines)
    from_bids(root, tmp_path / "nback", "sex", modality="fMRI", split="all=1", entities=["task=nback"])
    (records,) = written(tmp_path / "nback", "all")
    assert all("task-nback" in r["images"][0]["path"] for r in records)


def test_derivatives(bids, tmp_path, nifti):
    root = bids(sexes(2), {"00": ["anat/sub-00_T1w.nii"]})
    for name in sexes(2):
        nifti(
            f"ds/derivatives/fmriprep/sub-{name}/anat/sub-{name}_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz",
            (6, 7, 5),
        )
    from_bids(root, tmp_path / "out", "sex", derivatives="fmriprep", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    start = "derivatives/fmriprep/sub-00/anat/"
    assert records[0]["images"][0]["path"] == f"{start}sub-00_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz"
    (fault,) = faults(root, tmp_path / "none", "sex", derivatives="freesurfer")
    assert "derivatives/freesurfer: not found; expected a directory, such as fmriprep" in fault


def test_what_is_left_out_is_named(bids, tmp_path):
    people = {**sexes(4), "10": {"sex": "n/a"}, "11": {"sex": "N/A"}, "12": {"sex": "F"}, "13": {"sex": "F"}, "14": {}}
    files = {n: [f"anat/sub-{n}_T1w.nii"] for n in [*sexes(4), "10", "11", "14", "20"]}
    files["00"] += ["anat/sub-00_defaced-T1w_old_T1w.nii", "anat/sub-01_run-2_T1w.nii"]
    root = bids(people, files)
    (root / "sub-13/anat").mkdir(parents=True)
    (root / "sub-13/anat/sub-13_T1w.nii.gz").symlink_to(root / ".git/annex/nowhere")
    lines = from_bids(root, tmp_path / "out", "sex", split="train=0.5,eval=0.5")
    assert lines[3 : lines.index("next:")] == [
        "left out: files with another name than BIDS gives them there (2):",
        "  sub-00/anat/sub-00_defaced-T1w_old_T1w.nii, sub-00/anat/sub-01_run-2_T1w.nii",
        "left out: files that are links to nothing; `datalad get` them (1):",
        "  sub-13/anat/sub-13_T1w.nii.gz",
        "left out: subjects without a scan (2): sub-12, sub-13",
        "left out: subjects whose sex is n/a or empty (3): sub-10, sub-11, sub-14",
        "left out: subjects without a row in participants.tsv (1): sub-20",
    ]
    assert set.union(*map(subjects, written(tmp_path / "out"))) == {f"sub-{n}" for n in sexes(4)}


def test_spelling(bids, tmp_path):
    """Levels, as text or as an object; the template's labels before them; what neither spells stays as it is."""
    levels = {"1": "patient", "2": {"Description": " control "}, "3": "never"}
    root = bids(
        {f"{i}": {"group": str(i)} for i in range(1, 5)}, sidecar={"group": {"Levels": levels}}, encoding="utf-8-sig"
    )
    template = tmp_path / "template.yaml"
    template.write_text('labels: {"3": sibling}\n')
    lines = from_bids(root, tmp_path / "out", "group", split="all=1", template=template)
    (records,) = written(tmp_path / "out", "all")
    assert [r["metadata"]["subject_label"] for r in records] == ["patient", "control", "sibling", "4"]
    assert "said as in participants.tsv, since neither Levels nor labels spell them: 4" in lines


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
        ("classification: {question: 'A <image>?'}", "question: holds <image>"),
        ("labels: {F: 1}", "labels.F: expected a string, got 1"),
        ("labels: {F: '<|im_end|>'}", "label '<|im_end|>': holds <|im_end|>"),
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


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("participant_id\tage\nsub-1\t3\n", ["sex: expected one such column, got participant_id, age"]),
        ("id\tage\n1\t3\n", ["participant_id: expected one such column", "sex: expected one such column"]),
        ("participant_id\tsex\nsub-1\tF\n1\tM\nsub-2\n", [":4: expected 2", ":3: participant_id: sub-1 has a row"]),
        ("participant_id\tsex\tsex\nsub-1\tF\tM\n", ["sex: expected one such column, got participant_id, sex, sex"]),
        ("participant_id\tsex\n\tF\n", [":2: participant_id: expected sub-LABEL, got ''"]),
        ('participant_id\tsex\nsub-1\t"F\n', ["not a tab-separated row"]),
        ("participant_id\tsex\n", ["holds no subject"]),
        ("", ["participant_id: expected one such column, got none", "sex: expected one such column, got none"]),
        (b"participant_id\tsex\nsub-1\t\xff\n", ["cannot be read"]),
        (None, ["not found"]),
    ],
)  # fmt: skip
def test_a_faulty_table_is_refused(bids, tmp_path, table, expected):
    root = bids(sexes(3))
    file = root / "participants.tsv"
    file.unlink()
    if table is not None:
        file.write_bytes(table if isinstance(table, bytes) else table.encode())
    found = faults(root, tmp_path / "out", "sex")
    assert len(found) == len(expected)
    assert all(str(file) in fault and part in fault for fault, part in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    ("sidecar", "expected"),
    [
        ("{", "participants.json:1: not valid JSON"),
        ("[]", "participants.json: sex: expected an object"),
        ('{"sex": {"Levels": ["F"]}}', "and an object under its Levels"),
        ('{"sex": {"Levels": {"F": 1}}}', "sex.Levels.F: expected a description"),
    ],
)
def test_a_faulty_sidecar_is_refused(bids, tmp_path, sidecar, expected):
    root = bids(sexes(3))
    (root / "participants.json").write_text(sidecar)
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert expected in fault


def test_a_sidecar_that_was_not_downloaded_is_refused(bids, tmp_path):
    root = bids(sexes(3))
    (root / "participants.json").symlink_to(root / ".git/annex/nowhere")
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert "participants.json: a link to " in fault


def ages(*more):
    return {f"{i:02}": {"x": value} for i, value in enumerate([*(str(i) for i in range(11)), *more])}


@pytest.mark.parametrize(
    ("people", "options", "expected"),
    [
        (ages("89+"), {}, "numbers and words mixed; write numbers or n/a instead of 89+ (sub-11), or ask for kind"),
        (ages("young"), {"kind": "regression"}, "x: expected a number or n/a, got young (sub-11)"),
        (ages("1_0"), {"kind": "regression"}, "x: expected a number or n/a, got 1_0 (sub-11)"),
        (ages(), {"kind": "comparison"}, "11 distinct numbers, of which hardly two are the same"),
        (ages(), {"pairs_per_subject": 2}, "pairs_per_subject: of kind comparison only; this is a regression"),
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


def test_a_directory_with_other_splits_is_refused(bids, tmp_path, write_json):
    write_json("out/val.jsonl", [])
    (fault,) = faults(bids(sexes(10)), tmp_path / "out", "sex")
    assert "out: directory is not empty; choose another" in fault


# Which files are scans.


def taken(root, out, *args, **options):
    """The paths that conversations show, and what was said, in one line."""
    lines = from_bids(root, out, *args, split="all=1", **options)
    (records,) = written(out, "all")
    assert all(len(record["images"]) == 1 for record in records)
    return [record["images"][0]["path"] for record in records], " ".join(" ".join(lines).split())


@pytest.mark.parametrize("magnitude", ["_part-mag", ""])
def test_parts_of_complex_images_are_left_out(bids, tmp_path, magnitude):
    """BIDS: a file without part-, or with part-mag, is the magnitude."""
    names = [f"func/sub-{{}}_task-rest{part}_bold.nii.gz" for part in (magnitude, "_part-phase", "_part-real")]
    root = bids(sexes(2), {n: [name.format(n) for name in names] for n in sexes(2)})
    paths, said = taken(root, tmp_path / "out", "sex", modality="fMRI")
    assert paths == [f"sub-{n}/func/sub-{n}_task-rest{magnitude}_bold.nii.gz" for n in sexes(2)]
    assert "left out: parts of complex images other than the magnitude (4): phase, real" in said
    paths, _ = taken(root, tmp_path / "phase", "sex", modality="fMRI", entities=["part=phase"])
    assert [path.partition("part-")[2] for path in paths] == ["phase_bold.nii.gz"] * 2


@pytest.mark.parametrize(
    ("variants", "asked", "choices"),
    [
        (["echo-1", "echo-2", "echo-3"], "echo (1, 2, 3); choose with --entity echo=1", ["echo=2"]),
        (["inv-1", "inv-2"], "inv (1, 2); choose with --entity inv=1", ["inv=1"]),
        (["mt-on", "mt-off"], "mt (off, on)", ["mt=on"]),
        (["flip-1", "flip-2"], "flip (1, 2)", ["flip=2"]),
        (["rec-norm", ""], "rec (none, norm); choose with --entity rec=none", ["rec=none"]),
        (["acq-mprage", "acq-mp2rage"], "acq (mp2rage, mprage)", ["acq=mprage"]),
        (["space-MNI152_res-2", "space-MNI152_res-1"], "res (1, 2)", ["res=1"]),
        (["space-MNI152_desc-preproc", "desc-preproc"], "space (MNI152, none)", ["space=none"]),
        (["ce-gadolinium", ""], "ce (gadolinium, none)", ["ce=none"]),
    ],
)
def test_variants_of_one_scan_are_asked_about(bids, tmp_path, variants, asked, choices):
    names = ["_".join(filter(None, ("anat/sub-{}", variant, "T1w.nii.gz"))) for variant in variants]
    root = bids(sexes(2), {n: [name.format(n) for name in names] for n in sexes(2)})
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert f"2 subjects with several variants of one scan, which differ in {asked}" in fault
    assert len(taken(root, tmp_path / "one", "sex", entities=choices)[0]) == 2
    every = [text for v in variants for text in [f"{choices[0].partition('=')[0]}={_of(v, choices[0])}"]]
    assert len(taken(root, tmp_path / "all", "sex", entities=every)[0]) == 2 * len(variants)


def _of(variant, choice):
    found = re.search(rf"{choice.partition('=')[0]}-([a-zA-Z0-9]+)", variant)
    return found[1] if found else "none"


def test_repeats_are_all_taken(bids, tmp_path):
    """Sessions, runs, directions and kinds of rest are measurements of their own; what is no scan is none."""
    ends = ["ses-1_task-rest_dir-AP_run-1", "ses-1_task-rest_dir-PA_run-1", "ses-1_task-resteyesopen_dir-AP_run-1"]
    files = [f"ses-1/func/sub-00_{end}_bold.nii.gz" for end in ends]
    others = ["func/sub-00_task-rest_sbref.nii.gz", "func/sub-00_task-rest_desc-brain_mask.nii.gz"]
    root = bids(sexes(2), {"00": [*files, *others], "01": ["func/sub-01_task-rest_bold.nii.gz"]})
    paths, said = taken(root, tmp_path / "out", "sex", modality="fMRI")
    assert paths == [*(f"sub-00/{file}" for file in sorted(files)), "sub-01/func/sub-01_task-rest_bold.nii.gz"]
    assert "all of them taken (1); --entity KEY=VALUE narrows: dir AP, PA, none; task rest, resteyesopen" in said


def test_what_is_no_scan_is_left_out_and_counted(bids, tmp_path):
    people = sexes(6)
    root = bids(people, {**{n: [f"anat/sub-{n}_T1w.nii.gz"] for n in people}, "05": []})
    folders = {n: root / f"sub-{n}/anat" for n in people}
    (folders["00"] / "sub-00_T1w.nii").write_bytes((folders["00"] / "sub-00_T1w.nii.gz").read_bytes())
    (folders["01"] / "sub-01_run-2_T1w.nii.gz").touch()
    (folders["02"] / "._sub-02_T1w.nii.gz").write_bytes(b"\0\5\26\7")
    (folders["03"] / "sub-03_run-2_T1w.nii.gz").write_text("/annex/objects/MD5E-s5--1.nii.gz\n")
    (folders["04"] / "sub-04_run-2_T1w.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "sourcedata/sub-05/anat").mkdir(parents=True)
    (root / "sourcedata/sub-05/anat/sub-05_T1w.nii.gz").write_bytes(b"scan")
    paths, said = taken(root, tmp_path / "out", "sex")
    assert paths == [f"sub-{n}/anat/sub-{n}_T1w.nii.gz" for n in list(people)[:5]]
    for part in (
        "X.nii beside X.nii.gz (1): sub-00/anat/sub-00_T1w.nii",
        "empty files (1): sub-01/anat/sub-01_run-2_T1w.nii.gz",
        "hidden files (1): sub-02/anat/._sub-02_T1w.nii.gz",
        "`git lfs pull` them (2): sub-03/anat/sub-03_run-2_T1w.nii.gz, sub-04/anat/sub-04_run-2_T1w.nii.gz",
        "subjects without a scan (1): sub-05",
    ):
        assert f"left out: {part}" in said.replace("pointers to files that were not downloaded; `datalad get` or ", "")


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        ("sub-02/", {"sub-02/anat/a.nii", "sub-02/a.nii", "x/sub-02/a.nii"}),
        ("/sub-02", {"sub-02/anat/a.nii", "sub-02/a.nii"}),
        ("**/*_run-2_*", {"sub-01/anat/sub-01_run-2_T1w.nii"}),
        ("*_run-2_T1w.nii", {"sub-01/anat/sub-01_run-2_T1w.nii"}),
        ("sub-02/*.nii", {"sub-02/a.nii"}),
        ("sub-02/**", {"sub-02/anat/a.nii", "sub-02/a.nii"}),
        ("sub-02/**/a.nii", {"sub-02/anat/a.nii", "sub-02/a.nii"}),
        ("sub-0[13]\n# sub-02\n\n", {"sub-01/anat/sub-01_run-2_T1w.nii"}),
        ("sub-0[!1]", {"sub-02/anat/a.nii", "sub-02/a.nii", "x/sub-02/a.nii"}),
        ("sub-0?/anat/?.nii  ", {"sub-02/anat/a.nii"}),
        ("a.nii\n!sub-02/a.nii", {"sub-02/anat/a.nii", "x/sub-02/a.nii"}),
        ("/sub-02\n!sub-02/a.nii", {"sub-02/anat/a.nii", "sub-02/a.nii"}),  # nothing below an excluded folder
        (r"\#a\n\!b\na.nii/", set()),
    ],
)
def test_bidsignore_is_gitignore(patterns, excluded, tmp_path):
    paths = ["sub-01/anat/sub-01_run-2_T1w.nii", "sub-02/anat/a.nii", "sub-02/a.nii", "x/sub-02/a.nii"]
    ignore = IgnoreFile(patterns.splitlines())
    assert {path for path in paths if ignore.excludes(path)} == excluded
    (tmp_path / ".gitignore").write_text(patterns)  # and so says git
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    told = subprocess.run(["git", "check-ignore", *paths], cwd=tmp_path, capture_output=True, text=True)
    assert set(told.stdout.split()) == excluded


def test_files_of_bidsignore_are_left_out(bids, tmp_path):
    people = sexes(4)
    root = bids(people, {**{n: [f"anat/sub-{n}_T1w.nii"] for n in people}, "01": ["anat/sub-01_run-2_T1w.nii"]})
    (root / ".bidsignore").write_text("**/*_run-2_*\nsub-02/\n")
    paths, said = taken(root, tmp_path / "out", "sex")
    assert paths == [f"sub-{n}/anat/sub-{n}_T1w.nii" for n in ("00", "03")]
    expected = "files that .bidsignore excludes (2): sub-01/anat/sub-01_run-2_T1w.nii, sub-02/anat/sub-02_T1w.nii"
    assert f"left out: {expected}" in said
    (root / ".bidsignore").write_text("[z-a]\n")
    (fault,) = faults(root, tmp_path / "bad", "sex")
    assert ".bidsignore: [z-a]: bad character range z-a" in fault


# Tables as people have them.


def table(root, text, encoding="utf-8"):
    (root / "participants.tsv").write_bytes(text.encode(encoding))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["0", "1", "2"],
            "participant_id: sub-0 in the table, sub-00 on disk and 2 others; the table has lost leading",
        ),
        (["0.0", "sub-1.0", "2.0"], "sub-0.0 in the table, sub-00 on disk and 2 others; the table has lost leading"),
        (["00", "01", "2"], "participant_id: sub-2 in the table, sub-02 on disk; the table has lost leading zeros"),
        (["00", "01", "_02"], "sub-_02 in the table, sub-02 on disk; they differ only in spelling"),
        (["00", "01", "Sub-02"], "sub-Sub-02 in the table, sub-02 on disk; they differ only in spelling"),
    ],
)
def test_ids_that_are_spelled_otherwise_are_named(bids, tmp_path, names, expected):
    root = bids(sexes(3))
    table(root, "participant_id\tsex\n" + "".join(f"{name}\t{'FM'[i % 2]}\n" for i, name in enumerate(names)))
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert expected in fault


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-16", "it is UTF-16"), ("utf-16-le", "UTF-16"), ("cp1252", "Windows-1252")]
)
def test_other_encodings_are_named(bids, tmp_path, encoding, expected):
    root = bids(sexes(3))
    table(root, "participant_id\tsex\tnote\nsub-00\tF\tM\u00fcller\nsub-01\tM\t-\n", encoding)
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert expected in fault
    assert "save it as UTF-8" in fault


def test_a_table_of_a_spreadsheet_is_read(bids, tmp_path):
    """Byte order mark, CRLF, quotes, trailing tabs and spaces, empty rows, no `sub-`."""
    root = bids(sexes(3))
    text = '\ufeff"participant_id"\tsex \t\r\n00\tF\t\r\n\t\t\r\n"01"\t"M"\r\nsub-02\t F\t\t\r\n'
    table(root, text)
    from_bids(root, tmp_path / "out", "sex", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    assert [record["metadata"]["subject_label"] for record in records] == ["F", "M", "F"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["sub-1", "F", "", '"', "\t", "\r", "\0", "\ufeff", "a,b", "n/a"])), max_size=6)
)
def test_a_table_of_any_text_is_read_or_refused(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("table") / "participants.tsv"
    file.write_text("\n".join("\t".join(row) for row in [["participant_id", "sex"], *rows]), newline="")
    faults, found = (), {}
    try:
        table = read_table(file)
        check_columns(table, ["participant_id", "sex"])
        found = subject_rows(table)
    except DataError as error:
        faults = error.faults
    assert all(fault.startswith(str(file)) for fault in faults)
    assert all(
        re.fullmatch(r"sub-.+", name) and set(cells) == {"participant_id", "sex"} for name, cells in found.items()
    )
    assert bool(faults) != bool(found)


MISSING = ["n/a", "", "-", "?", ".", "#N/A", "NA", "N/A", "nan", "NULL", "<NA>", "#VALUE!"]


def test_missing_values_are_no_labels(bids, tmp_path):
    people = {**sexes(4), **{f"1{chr(97 + i)}": {"sex": value} for i, value in enumerate(MISSING)}}
    root = bids(people)
    paths, said = taken(root, tmp_path / "out", "sex")
    assert [path[:6] for path in paths] == [f"sub-0{i}" for i in range(4)]
    assert "left out: subjects whose sex is n/a or empty (3): sub-1a, sub-1b, sub-1h" in said
    assert (
        "whose sex is missing, by other words (- 1, ? 1, . 1, #N/A 1, NA 1, nan 1, NULL 1, <NA> 1, #VALUE! 1)" in said
    )


def test_what_levels_describe_is_no_missing_value(bids, tmp_path):
    people = {"00": {"site": "NA"}, "01": {"site": "EU"}, "02": {"site": "unknown"}, "03": {"site": "n/a"}}
    levels = {"NA": "Namibia", "EU": "Europe", "unknown": "not recorded"}
    from_bids(bids(people, sidecar={"site": {"Levels": levels}}), tmp_path / "out", "site", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    assert [record["metadata"]["subject_label"] for record in records] == ["Namibia", "Europe", "not recorded"]


NUMBERS = [str(i) for i in range(20, 60, 2)]


@pytest.mark.parametrize(
    ("values", "doubted"),
    [
        (["F", "M", "unknown", "Unknown", "none"], ["Unknown", "none", "unknown"]),
        ([*NUMBERS, "-999"], ["-999"]),
        ([*NUMBERS, "9999", "-9", "-1"], ["-1", "-9", "9999"]),
        ([*NUMBERS, "999.0"], ["999.0"]),
        (["0", "1", "2", "-9"], ["-9"]),
        (["1", "2", "3", "99"], ["99"]),
        ([*NUMBERS, "77"], []),  # an age, within half of the range of the others
        ([str(70 + 3 * i) for i in range(15)] + ["99"], []),  # within them
        ([f"{i / 4}" for i in range(-12, 12)] + ["-1"], []),
        (["-1", "0", "1"], []),  # labels
        (["7", "8", "9"], []),
        (["99", "999"], []),  # nothing else to compare with
        (["F", "M", "-999", "-1", "0"], ["-999"]),
        (["F", "M", "-999", "-1", "999"], ["-1", "-999", "999"]),  # words only beside them
        (["F", "M", "Not reported"], ["Not reported"]),
    ],
)
def test_doubtful_values(values, doubted):
    assert sorted(doubtful(values)) == sorted(doubted)


@pytest.mark.parametrize(
    ("values", "levels", "doubted"),
    [
        (["1", "2", "-9"], {"1": "male", "2": "female"}, ["-9"]),
        (["1", "2", "-9"], {"1": "male", "2": "female", "-9": "missing"}, ["-9"]),
        (["1", "2", "9"], {"1": "male", "2": "female", "9": "Unknown"}, ["9"]),
        (["0", "1"], {"0": "none", "1": "mild"}, []),
        (["1", "2", "99"], {"1": "left", "2": "right", "99": "both"}, []),
    ],
)
def test_values_that_levels_describe_as_missing_are_doubtful(values, levels, doubted):
    assert sorted(doubtful(values, levels)) == sorted(doubted)


def test_doubtful_values_are_asked_about(bids, tmp_path):
    people = {f"{i:02}": {"age": value} for i, value in enumerate([*NUMBERS, "-999", "-999.0", "999"])}
    root = bids(people)
    (fault,) = faults(root, tmp_path / "out", "age")
    assert "age: missing values or not? '-999' (1), '-999.0' (1), '999' (1)" in fault
    assert (
        "--missing -999 --missing -999.0 --missing 999 leaves them out, --missing n/a takes every value as it is"
        in fault
    )
    paths, said = taken(root, tmp_path / "some", "age", missing=["-999", "unknown"])
    assert len(paths) == 21
    assert "whose age is missing, by other words (-999 1, -999.0 1) (2): sub-20, sub-21" in said
    assert "--missing unknown: no age is that" in said
    assert len(taken(root, tmp_path / "all", "age", missing=["n/a"])[0]) == 23


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        (["23,5", *NUMBERS], {}, "numbers with a comma: 23,5 (sub-00) (1); write a decimal point"),
        ([f"{n},5" for n in NUMBERS], {}, "numbers with a comma: 20,5 (sub-00), 22,5"),
        (["M", "m", "F"], {}, "one label or several? 'M' (1), 'm' (1)"),
        (["1", "1.0", "2"], {}, "one label or several? '1' (1), '1.0' (1)"),
    ],
)
def test_values_that_are_spelled_otherwise_are_named(bids, tmp_path, values, options, expected):
    people = {f"{i:02}": {"x": value} for i, value in enumerate(values)}
    (fault,) = faults(bids(people), tmp_path / "out", "x", **options)
    assert expected in fault


def test_labels_may_be_spelled_alike(bids, tmp_path):
    root = bids({"00": {"sex": "M"}, "01": {"sex": "male"}, "02": {"sex": "m"}, "03": {"sex": "F"}})
    template = tmp_path / "template.yaml"
    template.write_text("labels: {M: male, m: male, F: female, X: other}\n")
    lines = from_bids(root, tmp_path / "out", "sex", split="all=1", template=template)
    (records,) = written(tmp_path / "out", "all")
    assert [record["metadata"]["subject_label"] for record in records] == ["male", "male", "male", "female"]
    assert "values that Levels or labels spell and no scan has: X" in lines
    template.write_text("labels: {m: M}\n")
    assert "taken as two labels of sex: M, male" in from_bids(root, tmp_path / "two", "sex", template=template)


def test_the_error_keeps_the_notes_that_explain_it(bids, tmp_path):
    root = bids(sexes(2), {"00": [], "01": [], "07": ["anat/sub-07_T1w.nii"]})
    (fault,) = faults(root, tmp_path / "out", "sex")
    assert "no subject has both a value and a scan" in fault
    assert "subjects without a scan (2): sub-00, sub-01" in fault
    assert "subjects without a row in participants.tsv (1): sub-07" in fault


# Values per session.


@pytest.fixture
def visits(bids):
    """6 subjects with two sessions, their ages 20 years apart."""

    def make(sessions=("ses-1", "ses-2"), **people):
        people = people or {f"{i:02}": {"age": str(20 + i)} for i in range(6)}
        root = bids(people, {n: [f"ses-{k}/anat/sub-{n}_ses-{k}_T1w.nii" for k in (1, 2)] for n in people})
        for i, name in enumerate(people):
            rows = "".join(f"{ses}\t{20 + i + 20 * k}\n" for k, ses in enumerate(sessions))
            (root / f"sub-{name}/sub-{name}_sessions.tsv").write_text(f"session_id\tage\n{rows}")
        return root

    return make


def labels_of(folder):
    (records,) = written(folder, "all")
    return {record["task_id"].partition("_T1w")[0]: record["metadata"]["subject_label"] for record in records}


def test_values_per_session_need_sessions_in_names(bids, tmp_path):
    root = bids(sexes(3))
    for name in sexes(3):
        (root / f"sub-{name}/sub-{name}_sessions.tsv").write_text(f"session_id\tage\nses-1\t4{name}\n")
    (fault,) = faults(root, tmp_path / "out", "age")
    assert "scans without ses- in their names, when only sub-*_sessions.tsv has age (3): sub-00, sub-01" in fault


def test_a_session_has_its_own_value(visits, tmp_path):
    root = visits()
    (root / "sub-05/sub-05_sessions.tsv").write_text("session_id\tage\nses-2\tn/a\n")
    lines = from_bids(root, tmp_path / "out", "age", kind="regression", split="all=1")
    expected = {f"sub-{i:02}_ses-{k}": 20 * k + i for i in range(5) for k in (1, 2)}
    assert labels_of(tmp_path / "out") == expected
    assert "left out: sessions without a value in sub-*_sessions.tsv (1): sub-05 ses-1" in lines
    assert "left out: sessions whose age is n/a or empty (1): sub-05 ses-2" in lines
    assert "values per session, of sub-*_sessions.tsv: 10 scans, 5 unlike participants.tsv" in lines


def test_sessions_lose_their_prefix_too(visits, tmp_path):
    from_bids(visits(sessions=("1", "2")), tmp_path / "out", "age", kind="regression", split="all=1")
    assert labels_of(tmp_path / "out")["sub-03_ses-2"] == 43
    root = tmp_path / "ds"
    (root / "sub-00/ses-1").rename(root / "sub-00/ses-01")
    (root / "sub-00/ses-01/anat/sub-00_ses-1_T1w.nii").rename(root / "sub-00/ses-01/anat/sub-00_ses-01_T1w.nii")
    (fault,) = faults(root, tmp_path / "none", "age", kind="regression")
    assert "session_id: ses-1 in the table, ses-01 on disk of sub-00; the table has lost leading zeros" in fault


def test_a_table_of_phenotypes_may_have_it(visits, tmp_path):
    root = visits()
    for file in root.glob("sub-*/*_sessions.tsv"):
        file.unlink()
    (root / "phenotype").mkdir()
    rows = [f"{i:02}\t{k}\t{i * 10 + k}" for i in range(6) for k in (1, 2)]
    (root / "phenotype/iq.tsv").write_text("\n".join(["participant_id\tsession_id\tiq", *rows]) + "\n")
    lines = from_bids(root, tmp_path / "out", "iq", kind="regression", split="all=1")
    assert labels_of(tmp_path / "out") == {f"sub-{i:02}_ses-{k}": i * 10 + k for i in range(6) for k in (1, 2)}
    assert "values per session, of phenotype/iq.tsv: 12 scans, 0 unlike participants.tsv" in lines
    (root / "sub-01/sub-01_sessions.tsv").write_text("session_id\tiq\nses-1\t99\n")
    (fault,) = faults(root, tmp_path / "none", "iq")
    assert "phenotype/iq.tsv: iq: 11 for sub-01 ses-1, but 99 in sub-01/sub-01_sessions.tsv" in fault
    (root / "phenotype/iq.tsv").write_text("participant_id\thand\n00\tleft\n")
    (fault,) = faults(root, tmp_path / "none", "hand")
    assert "hand: expected one such column, got participant_id, age; phenotype/iq.tsv has it: copy it to" in fault


def test_without_values_per_session_it_is_said(visits, tmp_path):
    root = visits()
    for file in root.glob("sub-*/*_sessions.tsv"):
        file.unlink()
    said = " ".join(" ".join(from_bids(root, tmp_path / "out", "age", kind="regression")).split())
    assert "every session of a subject (6 have several) has its age of participants.tsv" in said


def test_nobody_is_compared_with_another_visit_of_themselves(visits, tmp_path):
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
def test_no_visit_and_no_reference_is_in_two_splits(visits, tmp_path, kind):
    """Whatever a subject is called in another session, by subjects, by images and as `validate` sees it."""
    root = visits(**{f"{i:02}": {"age": "n/a"} for i in range(20)})
    for i in range(20):
        rows = "".join(f"ses-{k}\t{'ab'[(i + k) % 2]}\n" for k in (1, 2))
        (root / f"sub-{i:02}/sub-{i:02}_sessions.tsv").write_text(f"session_id\tstage\n{rows}")
    from_bids(root, tmp_path / "out", "stage", kind=kind)
    both = {}
    for name, number in (("train", 32), ("eval", 8)):
        read = read_conversations(tmp_path / f"out/{name}.json", ("T1",), root)
        images = {image.path for c in read for image in c.images}
        assert len(images) == number
        both[name] = {subject for c in read for subject in c.subjects}, images
        assert {image.name[4:6] for image in images} == both[name][0]
    assert not both["train"][0] & both["eval"][0]
    assert not both["train"][1] & both["eval"][1]


# One split per data set.


def split_of(folder):
    rows = [line.split("\t") for line in (folder / "splits.tsv").read_text().splitlines()]
    assert rows[0] == ["participant_id", "split"]
    return dict(rows[1:])


def test_every_target_has_the_same_split(bids, tmp_path):
    """Whoever has a label for it, and whatever the kind and the modality."""
    people = {f"{i:02}": {"sex": "FM"[i % 2], "age": str(20 + i), "iq": "n/a" if i % 3 else str(i)} for i in range(40)}
    names = {n: [f"anat/sub-{n}_T1w.nii"] + [f"func/sub-{n}_task-rest_bold.nii.gz"] * (n > "05") for n in people}
    root = bids(people, names)
    calls = [("sex", {}), ("age", {}), ("iq", {}), ("sex", {"modality": "rsfMRI"}), ("sex", {"kind": "comparison"})]
    for i, (target, options) in enumerate(calls):
        from_bids(root, tmp_path / f"{i}", target, **options)
    splits = [split_of(tmp_path / f"{i}") for i in range(len(calls))]
    assert splits[0].keys() == {f"sub-{n}" for n in people}
    assert all(found == splits[0] for found in splits)
    for i in range(len(calls)):
        for name, records in zip(("train", "eval"), written(tmp_path / f"{i}"), strict=True):
            assert {splits[0][subject] for subject in subjects(records)} == {name}
    for column, of in (("sex", lambda v: v), ("age", lambda v: int(v) // 10)):  # all columns are balanced
        held = Counter(of(people[s[4:]][column]) for s, name in splits[0].items() if name == "eval")
        whole = Counter(of(cells[column]) for cells in people.values())
        assert all(abs(held[value] - n / 5) <= 1.2 for value, n in whole.items()), (column, held)


def test_derivatives_have_the_split_of_their_data_set(bids, tmp_path):
    """Also where subjects have a scan only in the derivatives: those were in another task's evaluation set before."""
    people = {f"{i:02}": {"sex": "FM"[i % 2], "age": str(i)} for i in range(30)}
    root = bids(people)
    shutil.copytree(root, root / "derivatives/prep")
    for name in ("00", "07", "18", "29"):
        shutil.rmtree(root / f"sub-{name}")
    from_bids(root, tmp_path / "raw", "sex")
    from_bids(root, tmp_path / "derived", "age", derivatives="prep")
    assert split_of(tmp_path / "raw") == split_of(tmp_path / "derived")
    assert len(split_of(tmp_path / "raw")) == 30
    assert sum(len(records) for records in written(tmp_path / "raw")) == 26
    assert sum(len(records) for records in written(tmp_path / "derived")) == 30


def test_an_earlier_split_is_used(bids, tmp_path):
    root = bids({f"{i:02}": {"sex": "FM"[i % 2], "age": str(i)} for i in range(20)})
    from_bids(root, tmp_path / "a", "sex", split="train=0.5,val=0.25,eval=0.25", seed=3)
    rows = (tmp_path / "a/splits.tsv").read_text().splitlines()
    (tmp_path / "a/splits.tsv").write_text("\n".join(rows[:-1]) + "\n")  # who came later is in none
    lines = from_bids(root, tmp_path / "b", "age", split_from=tmp_path / "a")
    expected = split_of(tmp_path / "a")
    assert split_of(tmp_path / "b") == expected
    found = zip(("train", "val", "eval"), written(tmp_path / "b", "train", "val", "eval"), strict=True)
    assert {s: name for name, records in found for s in subjects(records)} == expected
    last = rows[-1].partition("\t")[0]
    assert f"left out: subjects that {tmp_path / 'a'}/splits.tsv does not have (1): {last}" in " ".join(
        " ".join(lines).split()
    )
    (fault,) = faults(root, tmp_path / "c", "age", split_from=tmp_path / "a", seed=3)
    assert "leave out split and seed" in fault
    (fault,) = faults(root, tmp_path / "c", "age", split_from=tmp_path / "none")
    assert "none/splits.tsv: not found" in fault


def test_a_split_is_exact_and_fast():
    """Every split is within one of its share; 4000 subjects take less than seconds."""
    people = {f"{i}": {"a": "xy"[i % 2], "b": str(i * 7919 % 1000), "c": "n/a", "d": f"word {i}"} for i in range(4000)}
    shares = {"train": Fraction(7, 10), "val": Fraction(1, 3) - Fraction(1, 30), "eval": Fraction(0)}
    shares["eval"] = 1 - sum(shares.values())
    found = split_subjects(people, {name: share for name, share in shares.items() if share}, 0)
    sizes = Counter(found.values())
    assert all(abs(sizes[name] - share * 4000) < 1 for name, share in shares.items())
    held = Counter(int(people[s]["b"]) // 100 for s, name in found.items() if name == "val")
    assert max(held.values()) - min(held.values()) <= 2


# What is written.


@pytest.mark.parametrize("kind", ["classification", "comparison"])
@pytest.mark.parametrize("modality", ["sMRI", "fMRI"])
def test_what_is_written_can_be_read(bids, tmp_path, tokenizer, modalities, kind, modality):
    names = {"sMRI": "anat/sub-{}_T1w.nii.gz", "fMRI": "func/sub-{}_task-rest_bold.nii.gz"}
    root = bids(sexes(10), {n: [names[modality].format(n)] for n in sexes(10)})
    from_bids(root, tmp_path / "out", "sex", kind=kind, modality=modality)
    for name, num in (("train", 8), ("eval", 2)):
        file = tmp_path / "out" / f"{name}.json"
        options = {"max_length": 400, "threads": 1, "evaluation": name == "eval"}
        dataset = Dataset.load(file, tokenizer, modalities, image_root=root, **options)
        assert len(dataset.windows) == num
        assert {i.modality for i in dataset.windows} == {"T1" if modality == "sMRI" else "rsfMRI"}
        assert len(read_conversations(file, modalities, root, task_filter="T1" if kind != "comparison" else "T3")) > 0


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
    assert all("parted by tabs" in fault for fault in faults(root, tmp_path / "out", "sex"))
