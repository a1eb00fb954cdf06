"""A whole study: built, validated, trained on and scored by site."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.helpers import small_run
from tests.helpers.devtools import Browser, check_page
from tests.helpers.small_run import umbrella
from tests.helpers.study_world import NO_ROW, NO_SCAN, NO_SEX, SUBJECTS, TOO_YOUNG, make_study
from umbrella_jax.errors import UmbrellaError
from umbrella_jax.study import build
from umbrella_jax.study.build import build_study

SPLITS = ("train", "eval", "test")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def printed(study: Path) -> str:
    return umbrella("data", "build", study, study.parent / "built")


@pytest.fixture(scope="module")
def built(printed: str, study: Path) -> Path:
    return study.parent / "built"


@pytest.fixture(scope="module")
def table(study: Path) -> pd.DataFrame:
    """One row per subject and visit, read by pandas."""
    bids = study.parent / "bids"
    subjects = pd.read_csv(bids / "participants.tsv", sep="\t", dtype=str)
    visits = []
    for file in bids.glob("sub-*/sub-*_sessions.tsv"):
        rows = pd.read_csv(file, sep="\t", dtype={"session_id": str})
        visits.append(rows.assign(participant_id=file.parent.name))
    rows = subjects.merge(pd.concat(visits), on="participant_id")
    rows["moca"] = rows["moca"].mask(rows["moca"] == -9)
    return rows.set_index(["participant_id", rows["session_id"].str.removeprefix("ses-")]).sort_index()


def records(built: Path, *splits: str) -> Iterator[dict[str, Any]]:
    for split in splits or SPLITS:
        yield from json.loads((built / f"{split}.json").read_text())


def row_of(about: dict[str, Any], table: pd.DataFrame) -> pd.Series:
    """The row of a record's visit, the last one if it shows several."""
    return table.loc[about["subject_id"], str(about["visit"])[-1]]


def test_every_label_is_the_tables(built: Path, table: pd.DataFrame) -> None:
    tasks: dict[str, int] = {}
    for record in records(built):
        about = record["metadata"]
        row = row_of(about, table)
        task = about["task"]
        tasks[task] = tasks.get(task, 0) + 1
        by_visit = table.loc[about["subject_id"]]["moca"]
        expected = {
            "sex": {"M": "male", "F": "female"}.get(row["sex"]),
            "age": row["age"],
            "diagnosis": row["diagnosis"],
            "compared": row["diagnosis"],
            "decline": by_visit.get("2", 0) - by_visit["1"],
        }
        answer = record["conversations"][-1]["content"][0]["text"]
        if task == "caption":
            assert answer == f"A {row['sex']} subject, diagnosis {row['diagnosis']}."
            continue
        assert about["subject_label"] == expected[task], record["task_id"]
        assert str(about["subject_label"]) in answer
    assert tasks.keys() == {"sex", "age", "diagnosis", "compared", "decline", "caption"}


def test_the_commands_that_follow_have_the_paths(printed: str, built: Path, study: Path) -> None:
    look, _, commands = printed.partition("next:\n")
    assert look.endswith(f"look at {built}/study.html\n")
    validate, train = (shlex.split(line) for line in commands.replace("\\\n", " ").splitlines())
    data = ["--image-root", str(study.parent / "bids"), "--train-data", f"{built}/train.json"]
    data += ["--eval-data", f"{built}/eval.json"]
    model = ["--config", "joint_0.5b", "--base", "LLAVA_DIR"]
    assert validate == ["umbrella-jax", "data", "validate", *model, *data]
    assert train == ["umbrella-jax", "train", *model, *data, "--out", "runs/built"]
    assert all(len(line) <= 80 or line.count(" --") + line.count("/") > 1 for line in printed.splitlines())


def test_folds_have_a_line_each(study: Path, tmp_path: Path, chromium: Browser) -> None:
    folds = study.parent / "folds.yaml"
    folds.write_text(re.sub("split: .*", "split: {stratify: site, folds: 7}", study.read_text()))
    printed = " ".join(umbrella("data", "build", folds, tmp_path / "built").split())
    assert re.findall(r"(fold-\d): subjects: train \d+, test \d+ ", printed) == [f"fold-{i}" for i in range(1, 8)]
    tested = [record for file in tmp_path.glob("built/*/test.json") for record in json.loads(file.read_text())]
    ages = [record for record in tested if record["metadata"]["task"] == "age"]
    assert f" age: {len(ages)} conversations, " in printed
    assert f"umbrella-jax cv {tmp_path}/built " in printed
    with chromium.open((tmp_path / "built" / "study.html").as_uri(), webgl=False) as tab:
        on_paper = tab.measure(718, paper=True)
    assert (on_paper["whole"], on_paper["out"], on_paper["cut"]) == (718, [], 0)


def test_every_eligible_visit_is_asked_about(built: Path, table: pd.DataFrame) -> None:
    eligible = table[table["age"] >= 45].drop(index=[f"sub-{i:03}" for i in NO_SCAN], level=0)
    expected = {
        "sex": eligible["sex"].notna().sum(),
        "age": len(eligible),
        "decline": eligible["moca"].unstack().dropna().shape[0],
    }
    for task, number in expected.items():
        assert sum(r["metadata"]["task"] == task for r in records(built)) == number, task


def test_two_modalities_of_one_visit_and_covariates(built: Path, table: pd.DataFrame) -> None:
    shown = [r for r in records(built) if r["metadata"]["task"] == "diagnosis"]
    for record in shown:
        about = record["metadata"]
        row = table.loc[about["subject_id"], str(about["visit"])]
        assert record["task_type"] == "T2"
        assert [image["modality"] for image in record["images"]] == ["sMRI", "fMRI"]
        assert all(f"{about['subject_id']}_ses-{about['visit']}_" in image["path"] for image in record["images"])
        question = record["conversations"][-2]["content"][-1]["text"]
        assert question.startswith(f"Age {row['age']}, sex {row['sex']}.")
    assert {r["metadata"]["subject_id"] for r in shown}.isdisjoint(f"sub-{i:03}" for i in NO_SEX)


def test_no_family_is_in_two_splits(built: Path, table: pd.DataFrame) -> None:
    families = [
        {table.loc[r["metadata"]["subject_id"]]["family"].iloc[0] for r in records(built, split)} for split in SPLITS
    ]
    assert len(set.union(*families)) == sum(map(len, families))
    listed = pd.read_csv(built / "splits.tsv", sep="\t", index_col=0)["split"]
    assert all(listed[r["metadata"]["subject_id"]] == split for split in SPLITS for r in records(built, split))


def test_references_are_from_the_training_set(built: Path) -> None:
    split_of = pd.read_csv(built / "splits.tsv", sep="\t", index_col=0)["split"]
    compared = [r for r in records(built) if r["metadata"]["task"] == "compared"]
    assert compared
    for record in compared:
        about = record["metadata"]
        assert split_of[about["reference_id"]] == "train"
        assert about["reference_id"] != about["subject_id"]


def test_the_flow_counts_every_subject_once(built: Path) -> None:
    flow = json.loads((built / "study.lock.json").read_text())["flow"]["study"]
    left_out = flow["left_out"]
    assert flow["included"] + sum(left_out.values()) == SUBJECTS + len(NO_ROW)
    assert sorted(left_out.values()) == sorted([len(NO_SCAN), len(TOO_YOUNG), len(NO_ROW)])
    assert any("age >= 45" in reason for reason in left_out)


def test_kept_columns_are_metadata_and_not_text(built: Path, table: pd.DataFrame) -> None:
    for record in records(built):
        about = record["metadata"]
        row = row_of(about, table)
        assert about["site"] == row["site"]
        assert (about["age_bin"] == "60 and above") == (row["age"] >= 60)


def test_the_page_is_legible_in_a_browser_and_on_paper(built: Path, chromium: Browser) -> None:
    check_page(chromium, built / "study.html")


def test_notes_of_folds_come_once_or_name_their_fold() -> None:
    shared, left = "t: treated as two labels: a, A", "t: left out: no fMRI scan (2): {}"
    notes = {"fold-1": [left.format("s1, s2"), shared, "t: small"], "fold-2": [left.format("s2, s1"), shared]}
    assert build._join_notes(notes) == [left.format("s1, s2"), shared, "fold-1: t: small"]
    many = build._join_notes({f"fold-{i}": [f"t: {i} subjects"] for i in range(50)})
    assert many[9:] == ["fold-9: t: 9 subjects", "and 40 more notes about folds"]


def test_a_second_build_is_the_same(built: Path, study: Path, tmp_path: Path) -> None:
    umbrella("data", "build", study, tmp_path / "again")
    for name in ("train.json", "eval.json", "test.json", "splits.tsv"):
        assert (tmp_path / "again" / name).read_bytes() == (built / name).read_bytes()


@pytest.mark.slow
def test_validated_trained_and_scored_by_site(built: Path, study: Path, tmp_path: Path) -> None:
    # all tasks are planned for; one update is enough, since each kind of batch compiles for seconds
    world = small_run.make_world(tmp_path, train={"max_new_tokens": 32, "batch_size": 40, "epochs": 0.1})
    images = ["--image-root", study.parent / "bids"]
    data = ["--train-data", built / "train.json", *images, "--set", "data.allow_overlap=false"]
    words = ["--config", world.config, "--base", world.base, *data, "--eval-data", built / "eval.json"]
    umbrella("data", "validate", *words)
    umbrella(*world.train_flags(tmp_path / "run", *data))
    predictions = tmp_path / "predictions.jsonl"
    flags = [
        "--data",
        built / "test.json",
        "--out",
        predictions,
        *images,
        "--task-filter",
        "sex",
        "--max-new-tokens",
        5,
    ]
    umbrella("predict", tmp_path / "run", *flags)
    scores = json.loads(umbrella("score", predictions, "--by", "site,age_bin", "--json"))
    by_site = scores["by"]["columns"]["site"]
    asked = [r["metadata"] for r in records(built, "test") if r["metadata"]["task"] == "sex"]
    sites = {site: [about for about in asked if about["site"] == site] for site in "ABC"}
    assert by_site["groups"] == {
        site: {"n": len(members), "subjects": len({about["subject_id"] for about in members})}
        for site, members in sites.items()
    }
    assert by_site["tasks"].keys() == {"sex"}


def test_the_length_of_the_study_does_not_change_a_conversation(study: Path, built: Path, tmp_path: Path) -> None:
    """Another task is another task: what the first six ask stays as it was."""
    more = study.read_text() + "\n"
    more = more.replace("tasks:\n", "tasks:\n  site_of: {kind: classification, column: site, show: sMRI}\n")
    other = study.parent / "more.yaml"
    other.write_text(more)
    umbrella("data", "build", other, tmp_path / "more")
    ours = {r["task_id"]: r for r in records(built)}
    theirs = {r["task_id"]: r for r in records(tmp_path / "more")}
    assert ours.items() <= theirs.items()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("study", "external.study: expected a name of letters and digits other than study and those of splits"),
        ("abroad", "external.abroad: splits.tsv lists subjects in a split of this name; choose another"),
    ],
)
def test_refuses_an_external_cohort_that_would_hide_subjects(name: str, fault: str, tmp_path: Path) -> None:
    """A split of the study with the same name would be lost."""
    rows = [f"sub-{i}\t{'FM'[i % 2]}" for i in range(4)]
    (tmp_path / "participants.tsv").write_text("\n".join(["participant_id\tsex", *rows]))
    rows = [f"sub-{i}\t{'train' if i < 2 else 'abroad'}" for i in range(4)]
    (tmp_path / "splits.tsv").write_text("\n".join(["participant_id\tsplit", *rows]))
    for i in range(4):
        (tmp_path / f"sub-{i}.nii").write_bytes(bytes([i]))
    cohort = {"subjects": [{"file": "participants.tsv"}], "scans": {"T1": {"pattern": "{subject}.nii"}}}
    tasks = {"sex": {"kind": "classification", "column": "sex"}}
    config = {**cohort, "tasks": tasks, "split": {"file": "splits.tsv"}, "external": {name: cohort}}
    (tmp_path / "study.yaml").write_text(json.dumps(config))
    with pytest.raises(UmbrellaError) as caught:
        build_study(tmp_path / "study.yaml", tmp_path / "out")
    assert [message.removeprefix(f"{tmp_path}/study.yaml: ") for message in caught.value.faults] == [fault]


def test_the_page_shows_flow_columns_and_examples(built: Path) -> None:
    page = (built / "study.html").read_text()
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "25 subjects in tables and scans" in text
    assert "2 left out: `age &gt;= 45` is false" in text
    assert "21 included" in text
    splits = {split: {r["metadata"]["subject_id"] for r in records(built, split)} for split in SPLITS}
    assert all(f"{len(members)} {split}" in text for split, members in splits.items())
    examples = re.findall(r"<h3>(\w+), (\w+): ", page)
    assert len(examples) == 12
    assert {task for task, _ in examples} == {"sex", "age", "diagnosis", "compared", "decline", "caption"}
    assert page.count('src="data:image/png') >= 12
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_a_leak_in_the_texts_leaves_no_folder(study: Path, tmp_path: Path) -> None:
    """Every conversation has been made by then."""
    bids = study.parent / "bids"
    rows = pd.read_csv(bids / "participants.tsv", sep="\t", dtype=str)
    rows["code"] = rows["sex"].map({"M": "male", "F": "female"}) + rows.index.astype(str)
    rows.to_csv(bids / "coded.tsv", sep="\t", index=False)
    text = study.read_text().replace("participants.tsv", "coded.tsv")
    text = text.replace("F: female}, show: sMRI}", 'F: female}, show: sMRI, covariates: "Scan {code}."}')
    leaking = study.parent / "leaking.yaml"
    leaking.write_text(text)
    error = umbrella("data", "build", leaking, tmp_path / "out", code=2)
    assert "tasks.sex" in error
    assert not (tmp_path / "out").exists()
    assert not [*tmp_path.glob(".*")]


def test_other_people_with_the_same_ids_get_a_prefix(tmp_path: Path) -> None:
    for cohort in ("own", "other"):
        rows = [f"{i:02}\t{'MF'[i % 2]}\tf{i}\n" for i in range(20)]
        for i in range(20):
            scan = tmp_path / cohort / f"sub-{i:02}" / "anat" / f"sub-{i:02}_T1w.nii"
            scan.parent.mkdir(parents=True)
            scan.write_text(f"{cohort} {i}")
        (tmp_path / cohort / "participants.tsv").write_text("participant_id\tsex\tfamily\n" + "".join(rows))
    study = tmp_path / "study.yaml"
    cohort = "{subjects: [{file: other/participants.tsv}], scans: {sMRI: {bids: other}}%s}"
    text = f"""\
subjects: [{{file: own/participants.tsv}}]
scans: {{sMRI: {{bids: own}}}}
tasks: {{sex: {{kind: classification, column: sex}}}}
split: {{by: family, stratify: sex, sizes: {{train: 0.8, eval: 0.2}}}}
external: {{abroad: {cohort}}}
"""
    study.write_text(text % "")
    err = umbrella("data", "build", study, tmp_path / "built", code=2)
    for name in ("subject sub-00", "family f0"):
        assert f"split: {name} is in several splits: " in err
    assert "; if it is another family with the same id, set external.abroad.prefix" in err
    study.write_text(text % ", prefix: X-")
    umbrella("data", "build", study, tmp_path / "built")
    abroad = {r["metadata"]["subject_id"]: r["metadata"] for r in records(tmp_path / "built", "abroad")}
    assert abroad.keys() == {f"X-sub-{i:02}" for i in range(20)}
    assert all(about["group_id"] == f"X-f{int(name[-2:])}" for name, about in abroad.items())
