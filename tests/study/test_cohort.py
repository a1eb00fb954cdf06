"""Which visits a study has: tables joined to scans, conditions, and who is left out why."""

from pathlib import Path

import pytest

from umbrella_jax.config.load import parse_section
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.study.cohort import Cohort, read_cohort
from umbrella_jax.study.schema import StudyConfig

UKB = {"pattern": "bulk/{eid}/T1/{eid}_20252_{visit}_0.nii.gz"}
EID = [{"file": "ukb.csv", "key": "eid"}]


def scan(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"scan")


def bids(root: Path, *visits: str) -> None:
    """Write a T1w image for each `01` or `01/2`: a subject, and perhaps a session."""
    for label, _, session in (visit.partition("/") for visit in visits):
        folder, ses = (f"ses-{session}/", f"_ses-{session}") if session else ("", "")
        scan(root, f"sub-{label}/{folder}anat/sub-{label}{ses}_T1w.nii.gz")


def table(root: Path, name: str, *lines: str) -> None:
    """Write a table whose cells are separated by spaces here, and by tabs or commas there."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    delimiter = "," if name.endswith(".csv") else "\t"
    path.write_text("".join(f"{line}\n" for line in lines).replace(" ", delimiter), encoding="utf-8")


def study(**keys) -> StudyConfig:
    tasks = {"sex": {"kind": "classification", "column": "sex"}}
    first = {"subjects": [{"file": "participants.tsv"}], "scans": {"T1": {"bids": "."}}, "tasks": tasks}
    return parse_section(StudyConfig, {**first, **keys}, "study.yaml")


def read(root: Path, **keys) -> tuple[Cohort, list[str]]:
    config, notes, faults = study(**keys), list[str](), Faults()
    with faults:
        cohort = read_cohort(config, config, root, faults, notes)
    faults.raise_as(DataError)
    return cohort, notes


def refuse(root: Path, **keys) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(root, **keys)
    return [fault.replace(f"{root}/", "") for fault in caught.value.faults]


def values(cohort: Cohort, column: str) -> dict[str, str | None]:
    return {visit.place: visit.values.get(column) for visit in cohort.visits}


def test_a_visit_has_its_sessions_values_and_never_the_subjects(tmp_path):
    table(tmp_path, "participants.tsv", "participant_id sex age", "sub-01 F 30", "02 M 41", "sub-03 F n/a")
    table(tmp_path, "sub-01/sub-01_sessions.tsv", "session_id age", "ses-1 31", "ses-2 n/a")
    table(tmp_path, "sub-02/sub-02_sessions.tsv", "session_id age", "ses-1 41", "ses-4 44")
    bids(tmp_path, "01/1", "01/2", "01/10", "02/1", "09/1")
    cohort, notes = read(tmp_path, sessions=[{"file": "sub-*/sub-*_sessions.tsv"}])
    assert values(cohort, "age") == {
        "sub-01 ses-1": "31",
        "sub-01 ses-2": None,
        "sub-01 ses-10": None,
        "sub-02 ses-1": "41",
    }
    assert values(cohort, "sex") == {
        **dict.fromkeys(("sub-01 ses-1", "sub-01 ses-2", "sub-01 ses-10"), "F"),
        "sub-02 ses-1": "M",
    }
    assert cohort.visits[0].scans["T1"][0].path == "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
    assert cohort.flow.left_out == {
        "in participants.tsv, but without a scan": ["sub-03"],
        "with a scan, but without a row in participants.tsv": ["sub-09"],
    }
    assert cohort.flow.included == ["sub-01", "sub-02"]
    where = "sub-*/sub-*_sessions.tsv"
    assert f"left out: values of visits that have a scan, but no row in {where} (1): sub-01 ses-10" in notes
    assert f"left out: visits with a row in {where}, but without a scan (1): sub-02 ses-4" in notes


def test_a_column_per_visit_and_a_pattern_read_uk_biobank(tmp_path):
    table(tmp_path, "ukb.csv", "eid 31-0.0 21003-2.0 21003-3.0", "1000001 0 55 58", "1000002 1 61 ")
    scan(tmp_path, *(f"bulk/{eid}/T1/{eid}_20252_{visit}_0.nii.gz" for eid in (1000001, 1000002) for visit in (2, 3)))
    scan(tmp_path, "bulk/1000001/T1/1000002_20252_2_0.nii.gz", "bulk/1000002/T1/1000002_20252_4_0.json")
    cohort, _ = read(
        tmp_path,
        subjects=[{**EID[0], "columns": {"sex": "31-0.0"}}],
        sessions=[{**EID[0], "columns": {"age": "21003-{visit}.0"}}],
        scans={"T1": UKB},
        include='age >= 50 and visit != "4"',
    )
    assert values(cohort, "age") == {"1000001 ses-2": "55", "1000001 ses-3": "58", "1000002 ses-2": "61"}
    assert values(cohort, "sex") == {"1000001 ses-2": "0", "1000001 ses-3": "0", "1000002 ses-2": "1"}


def test_conditions_leave_out_visits_and_a_subject_counts_for_its_last_one(tmp_path):
    table(tmp_path, "participants.tsv", "participant_id sex", "01 F", "02 M", "03 F", "04 F", "05 M")
    ages = ["01 1 50", "01 2 30", "02 1 30", "02 2 n/a", "03 1 n/a", "03 2 30", "04 1 50", "05 1 50", "05 2 40"]
    table(tmp_path, "ages.tsv", "participant_id session_id age", *ages)
    bids(tmp_path, *("/".join(row.split()[:2]) for row in ages))
    conditions = ["age > 40", "sex != 'F' or age < 50"]
    cohort, notes = read(tmp_path, sessions=[{"file": "ages.tsv"}], include=conditions)
    assert cohort.flow.left_out == {
        "age > 40": ["sub-03"],
        "age > 40: value missing": ["sub-02"],
        "sex != 'F' or age < 50": ["sub-01", "sub-04"],
    }
    assert [visit.place for visit in cohort.visits] == ["sub-05 ses-1"]
    assert "left out: age > 40 (4): sub-01 ses-2, sub-02 ses-1, sub-03 ses-2, sub-05 ses-2" in notes


PARTICIPANTS = ("participant_id sex age", "sub-001 F 44", "sub-002 M 51", "sub-003 F 63")


@pytest.mark.parametrize(
    ("lines", "keys", "fault"),
    [
        (
            ("participant_id sex", "1 F", "2 M", "3 F"),
            {},
            "participants.tsv: participant_id: 1 in the table, 001 on disk and 2 others; the table has lost leading "
            "zeros; set width: 3",
        ),
        (
            ("participant_id sex", "0001 F", "sub-0002 M"),
            {},
            "participants.tsv: participant_id: 0001 in the table, 001 on disk and 1 other; they differ only in "
            "spelling; write them the same",
        ),
        (
            ("participant_id sex", "P1 F", "P2 M", "P3 M", "P4 M"),
            {},
            "participants.tsv: participant_id: no id of the table is on disk: P1, P2, P3, … in the table, 001, 002, "
            "003 on disk",
        ),
        (
            (*PARTICIPANTS, "002 F 30"),
            {},
            "participants.tsv:5: participant_id: 002 has a row already, in line 3; expected one row per subject; list "
            "a table with visits in sessions",
        ),
        (
            PARTICIPANTS,
            {"include": 'sexe == "F"'},
            'include: sexe == "F": sexe: no such column; the nearest is sex; a text needs quotes',
        ),
        (
            PARTICIPANTS,
            {"include": "sex == F"},
            "include: sex == F: F: no such column; expected one of subject, visit, participant_id, sex, age; a text "
            "needs quotes",
        ),
        (PARTICIPANTS, {"include": "age = 45"}, "include: age = 45: at = 45: = does not compare; write =="),
        (
            PARTICIPANTS,
            {"include": "sex > 1"},
            "participants.tsv:2: sex: expected a number, got 'F'; the condition sex > 1 compares it with a number",
        ),
        (
            (*PARTICIPANTS[:3], "003 F 63,5"),
            {"bins": {"age_bin": {"column": "age", "edges": [50]}}},
            "participants.tsv:4: age: expected a number, got '63,5'; write a decimal point",
        ),
        (
            (*PARTICIPANTS[:3], "003 unknown 63"),
            {},
            "participants.tsv: sex: do these mean a missing value? 'unknown' (1); write `missing: {sex: ['unknown']}` "
            "to leave them out, `missing: {sex: n/a}` to keep every value",
        ),
        (PARTICIPANTS, {"missing": {"aeg": "-9"}}, "missing: aeg: no such column; the nearest is age"),
        (
            PARTICIPANTS,
            {"bins": {"sex": {"column": "ages", "edges": [50]}}},
            "bins.sex: a column has this name already; choose another",
        ),
        (PARTICIPANTS, {"visits": ["2"]}, "visits: 2: no scan has this visit; expected some of none"),
        (PARTICIPANTS, {"include": "age > 99"}, "participants.tsv: no subject is left: age > 99: 3"),
        (
            PARTICIPANTS,
            {"scans": {"T1": {"bids": ".", "entities": {"run": 1}}}},
            "scans.T1: scans.T1.entities: {run: 1}: no scan has it; names have no run",
        ),
        (
            PARTICIPANTS,
            {"scans": {"PD": {"bids": "."}}},
            "scans.PD: entities.suffix: expected one, such as T2w; PD is none of sMRI, fMRI, dMRI, T2, FLAIR",
        ),
        (
            PARTICIPANTS,
            {"scans": {"T1": {"bids": "raw"}}},
            "scans.T1: bids: raw: not found; expected a BIDS data set, or a derivative's folder",
        ),
        (
            PARTICIPANTS,
            {"scans": {"T1": {"pattern": "sub-{subject}/func/{run}.nii.gz"}}},
            "scans.T1: pattern: sub-{subject}/func/{run}.nii.gz: nothing matches as far as func; there are "
            "sub-001/anat, sub-002/anat, sub-003/anat",
        ),
        (
            PARTICIPANTS,
            {"scans": {"T1": {"pattern": "sub-*/anat/{age}0{subject}_T1w.nii.gz"}}},
            "scans.T1: pattern: sub-*/anat/{age}0{subject}_T1w.nii.gz: matches in several ways: sub-001_T1w.nii.gz "
            "(age=sub-, subject=01 or age=sub-0, subject=1); sub-002_T1w.nii.gz (age=sub-, subject=02 or age=sub-0, "
            "subject=2); sub-003_T1w.nii.gz (age=sub-, subject=03 or age=sub-0, subject=3); write the text around the "
            "names more exactly, or * for what needs no name",
        ),
        (
            PARTICIPANTS,
            {"scans": {"T1": {"pattern": "sub-{id}/anat/*.nii.gz"}}},
            "scans.T1: pattern: sub-{id}/anat/*.nii.gz: expected {subject} or {participant_id} for the subject, once "
            "or repeated",
        ),
        (
            PARTICIPANTS,
            {"scans": {"T1": {"pattern": "sub-{subject}/anat/sub-00{age}_T1w.nii.gz"}}},
            "participants.tsv:2: age: 44, but 1 in sub-001/anat/sub-001_T1w.nii.gz; correct one, or rename one of the "
            "two",
        ),
        (
            PARTICIPANTS,
            {"sessions": [{"file": "participants.tsv", "visit": "age"}]},
            "participants.tsv: has visits, but no scan's path has one; write {visit} in the pattern, or list it in "
            "subjects",
        ),
    ],
)
def test_refuses_a_mistake_with_its_place_and_remedy(tmp_path, lines, keys, fault):
    table(tmp_path, "participants.tsv", *lines)
    bids(tmp_path, "001", "002", "003")
    assert refuse(tmp_path, **keys)[0] == fault
