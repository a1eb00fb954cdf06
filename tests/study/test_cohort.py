"""The visits of a study: tables joined to scans, conditions, and reasons to leave subjects out."""

from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella_jax.config.load import parse_section
from umbrella_jax.config.origins import Origins
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
    first = {"subjects": [{"file": "participants.tsv"}], "scans": {"T1": {"bids": "."}}, **keys}
    tasks = {"sex": {"kind": "classification", "column": "sex", "show": next(iter(first["scans"]))}}
    return parse_section(StudyConfig, {"tasks": tasks, **first}, Origins("study.yaml"))


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
        "`age > 40` is false": ["sub-03"],
        "`age > 40` is unknown, since a value is missing": ["sub-02"],
        "`sex != 'F' or age < 50` is false": ["sub-01", "sub-04"],
    }
    assert [visit.place for visit in cohort.visits] == ["sub-05 ses-1"]
    visits = "sub-01 ses-2, sub-02 ses-1, sub-03 ses-2, sub-05 ses-2"
    assert f"left out: visits at which `age > 40` is false (4): {visits}" in notes


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
            ("participant_id sex", "P001 F", "0-02 M", "3.0 F"),
            {},
            "participants.tsv: participant_id: 0-02 in the table, 002 on disk and 1 other; they differ only in "
            "spelling; write them the same, or use `replace`",
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
            "participants.tsv:4: age: expected a number, got '63,5'; write a decimal point, and no separator of "
            "thousands",
        ),
        (
            (*PARTICIPANTS[:3], "003 unknown 63"),
            {},
            "participants.tsv: sex: do these mean a missing value? 'unknown' (1); write `missing: {sex: ['unknown']}` "
            "to leave them out, `missing: {sex: []}` to keep every value",
        ),
        (PARTICIPANTS, {"missing": {"aeg": "-9"}}, "missing: aeg: no such column; the nearest is age"),
        (
            PARTICIPANTS,
            {"bins": {"sex": {"column": "ages", "edges": [50]}}},
            "bins.sex: a column has this name already; choose another",
        ),
        (PARTICIPANTS, {"visits": ["2"]}, "visits: 2: no scan has this visit; expected some of none"),
        (PARTICIPANTS, {"include": "age > 99"}, "participants.tsv: no subject is left: `age > 99` is false: 3"),
        (
            PARTICIPANTS,
            {"scans": {"T1": {"bids": ".", "entities": {"run": 1}}}},
            "scans.T1: entities: {run: 1}: no scan has it; names have no run",
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
            {"scans": {"T1": {"bids": "."}, "T2": {"pattern": "other/{subject}.nii"}}},
            "scans.T2: no subject is in participants.tsv: X1 on disk, 001, 002, 003 in the table",
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
            "scans.T1: pattern: sub-*/anat/{age}0{subject}_T1w.nii.gz: matches in several ways: "
            "sub-001/anat/sub-001_T1w.nii.gz (age=sub-, subject=01 or age=sub-0, subject=1); "
            "sub-002/anat/sub-002_T1w.nii.gz (age=sub-, subject=02 or age=sub-0, subject=2); "
            "sub-003/anat/sub-003_T1w.nii.gz (age=sub-, subject=03 or age=sub-0, subject=3); write the text around "
            "the names more exactly, or * for what needs no name",
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
    scan(tmp_path, "other/X1.nii")
    assert refuse(tmp_path, **keys)[0] == fault


AGES = st.sampled_from(["", "30", "45", "45.0", "61.5", "n/a"])
PEOPLE = st.dictionaries(
    st.sampled_from(["S2", "S3", "S10", "S11", "S12"]),
    st.fixed_dictionaries(
        {
            "sex": st.sampled_from([None, "F", "M", "NA"]),  # None: no row in the first table
            "ages": st.dictionaries(st.sampled_from("123"), AGES),
            "T1": st.sets(st.sampled_from("123")),
            "T2": st.sets(st.sampled_from("123")),
        }
    ),
)
INCLUDED = {"sex": "F", "ages": {"1": "50"}, "T1": {"1"}, "T2": {"1"}}


@settings(max_examples=20, deadline=None)
@given(PEOPLE, st.sampled_from(["all", "first", "last"]))
def test_every_subject_counts_once_and_visits_equal_those_of_pandas(people, which):
    people = {"S1": INCLUDED, **people}
    first = pd.DataFrame([(s, p["sex"]) for s, p in people.items() if p["sex"]], columns=["id", "sex"])
    rows = [(s, visit, age) for s, p in people.items() for visit, age in p["ages"].items()]
    sessions = pd.DataFrame(rows, columns=["id", "session_id", "age"])
    scans = pd.DataFrame(
        [(s, visit, f"{m}/{s}_{visit}.nii") for s, p in people.items() for m in ("T1", "T2") for visit in sorted(p[m])],
        columns=["id", "session_id", "path"],
    )
    with TemporaryDirectory() as folder:
        root = Path(folder)
        first.to_csv(root / "participants.csv", index=False)
        sessions.to_csv(root / "ages.csv", index=False)
        scan(root, *scans["path"])
        cohort, _ = read(
            root,
            subjects=[{"file": "participants.csv", "key": "id"}],
            sessions=[{"file": "ages.csv", "key": "id"}],
            scans={m: {"pattern": f"{m}/{{id}}_{{visit}}.nii"} for m in ("T1", "T2")},
            include=["age >= 45", 'sex == "F"'],
            visits=which,
        )
        # pandas reads the same files by itself
        sessions = pd.read_csv(root / "ages.csv", dtype={"session_id": str})
        first = pd.read_csv(root / "participants.csv")
    assert sorted([*cohort.flow.included, *chain(*cohort.flow.left_out.values())]) == sorted(
        {s for s, p in people.items() if p["sex"] or p["ages"] or p["T1"] or p["T2"]}
    )
    visits = scans.groupby(["id", "session_id"])["path"].apply(tuple).reset_index().merge(first, on="id")
    if which != "all":
        by_subject = visits.sort_values("session_id").groupby("id")
        visits = by_subject.head(1) if which == "first" else by_subject.tail(1)
    visits = visits.merge(sessions, how="left", on=["id", "session_id"])
    expected = visits.query("age >= 45 and sex == 'F'")
    assert {
        (v.subject, v.name, tuple(s.path for group in v.scans.values() for s in group), float(v.values["age"]))
        for v in cohort.visits
    } == set(expected[["id", "session_id", "path", "age"]].itertuples(index=False, name=None))


def test_bids_scans_may_be_of_any_folder_with_entities_given_or_excluded(tmp_path):
    table(tmp_path, "participants.tsv", "participant_id sex", "sub-01 F", "sub-02 M")
    names = ["space-MNI_desc-preproc_T1w", "desc-preproc_T1w", "desc-preproc_run-2_T1w", "T2w", "FLAIR"]
    folder = "ds/derivatives/fmriprep"
    scan(tmp_path, *(f"{folder}/sub-{s}/anat/sub-{s}_{name}.nii.gz" for s in ("01", "02") for name in names))
    (tmp_path / "ds/.bidsignore").write_text("sub-02/anat/*_FLAIR.nii.gz\n")
    fmriprep = {"bids": folder}
    scans = {
        "T1": {**fmriprep, "entities": {"space": "none"}, "exclude": {"run": 2}},
        "MNI": {**fmriprep, "entities": {"suffix": "T1w", "space": "MNI"}},
        "T2": fmriprep,
        "FLAIR": fmriprep,
    }
    cohort, notes = read(tmp_path, scans=scans)
    assert [{m: [s.path for s in group] for m, group in visit.scans.items()} for visit in cohort.visits] == [
        {
            m: [f"{folder}/{visit}/anat/{visit}_{name}.nii.gz"]
            for m, name in zip(scans, [names[1], names[0], *names[3:]], strict=True)
            if (visit, m) != ("sub-02", "FLAIR")
        }
        for visit in ("sub-01", "sub-02")
    ]
    assert "FLAIR: left out: files that .bidsignore excludes (1): sub-02/anat/sub-02_FLAIR.nii.gz" in notes
    assert "T1: left out: scans that are run=2 (2)" in notes
    (fault,) = refuse(tmp_path, scans={"T1": fmriprep})
    assert fault == (
        f"scans.T1: {folder}: 2 subjects with several variants of one scan, which differ in space (MNI, none); choose "
        "with scans.T1.entities: {space: MNI} (a list keeps several)"
    )


def test_names_in_a_pattern_become_columns_and_files_without_content_are_left_out(tmp_path):
    table(tmp_path, "participants.csv", "RID sex", "7 F", "8 M", "9 F")
    scan(tmp_path, "adni/7/bl_Siemens/a.nii", "adni/7/bl_Siemens/a.nii.gz", "adni/7/bl_Siemens/._b.nii")
    scan(tmp_path, "adni/7/m12_GE/a.nii", "adni/7/.m24_GE/a.nii", "adni/8/bl_GE/a.json", "adni/8/bl_GE/b.mgz")
    (tmp_path / "adni/8/bl_GE/c.nii").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "adni/8/bl_GE/d.nii").write_text("")
    (tmp_path / "adni/8/bl_GE/e.nii").symlink_to("nowhere")
    (tmp_path / "adni/9").symlink_to(tmp_path / "adni/8")
    pattern = {"pattern": "adni/{RID}/{visit}_{maker}/*"}
    cohort, notes = read(
        tmp_path,
        subjects=[{"file": "participants.csv", "key": "RID"}],
        scans={"T1": pattern},
        include='maker in ["GE", "Siemens"]',
        visits=["m12", "bl"],
    )
    assert values(cohort, "maker") == {"7 ses-m12": "GE", "7 ses-bl": "Siemens", "8 ses-bl": "GE", "9 ses-bl": "GE"}
    assert [scan.path for scan in cohort.visits[1].scans["T1"]] == ["adni/7/bl_Siemens/a.nii.gz"]
    assert notes == [
        "T1: left out: files that are no images (2): adni/8/bl_GE/a.json, adni/9/bl_GE/a.json",
        "T1: left out: broken links; `datalad get` them (2): adni/8/bl_GE/e.nii, adni/9/bl_GE/e.nii",
        "T1: left out: pointers to files that were not downloaded; `datalad get` or `git lfs pull` them (2): "
        "adni/8/bl_GE/c.nii, adni/9/bl_GE/c.nii",
        "T1: left out: empty files (2): adni/8/bl_GE/d.nii, adni/9/bl_GE/d.nii",
        "T1: left out: hidden files (1): adni/7/bl_Siemens/._b.nii",
        "T1: left out: X.nii beside X.nii.gz (1): adni/7/bl_Siemens/a.nii",
    ]


@pytest.mark.parametrize(
    ("several", "runs"), [("all", ["1", "2", "10"]), ("first", ["1"]), ("last", ["10"]), ("error", None)]
)
def test_several_scans_of_a_visit(tmp_path, several, runs):
    table(tmp_path, "participants.tsv", "participant_id sex", "A F")
    scan(tmp_path, *(f"A/run-{run}.nii" for run in (1, 2, 10)))
    keys = {"scans": {"T1": {"pattern": "{subject}/run-{run}.nii", "several": several}}}
    if runs is None:
        assert refuse(tmp_path, **keys) == [
            "scans.T1: A has 3 scans: A/run-1.nii, A/run-10.nii, A/run-2.nii; choose by their names, or set several "
            "to all, first or last"
        ]
        return
    cohort, _ = read(tmp_path, **keys)
    assert [scan.entities["run"] for scan in cohort.visits[0].scans["T1"]] == runs
    assert values(cohort, "run") == {"A": runs[0] if len(runs) == 1 else None}
    if len(runs) > 1:
        fault = "scans: run: has several values at A; a column needs one per visit: set several to first or last"
        assert refuse(tmp_path, **keys, keep="run") == [fault]


def test_groups_of_numbers_begin_at_their_edges(tmp_path):
    table(
        tmp_path, "participants.tsv", "participant_id sex bmi", "1 F 18.4", "2 F 18.5", "3 F 29.9", "4 F 30", "5 F n/a"
    )
    bids(tmp_path, *"12345")
    bins = {"column": "bmi", "edges": [18.5, 30]}
    cohort, _ = read(tmp_path, bins={"group": bins, "named": {**bins, "labels": ["thin", "mid", "fat"]}})
    assert list(values(cohort, "group").values()) == ["below 18.5", "18.5 to 30", "18.5 to 30", "30 and above", None]
    assert list(values(cohort, "named").values()) == ["thin", "mid", "mid", "fat", None]
    assert cohort.columns == ("subject", "visit", "participant_id", "sex", "bmi", "group", "named")


def test_tables_that_contradict_each_other_or_share_no_id_are_refused(tmp_path):
    table(tmp_path, "participants.tsv", "participant_id sex note", "01 F a", "02 M n/a")
    table(tmp_path, "more.csv", "id sex note", "1.0 F b", "02 F c", "03 F d")
    table(tmp_path, "other.csv", "id iq", "X1 100")
    bids(tmp_path, "01", "02", "03", "04")
    first, more = {"file": "participants.tsv"}, {"file": "more.csv", "key": "id"}
    place = "more.csv: id: 1.0 in the table, 01 in participants.tsv; the table has lost leading zeros; set width: 2"
    assert refuse(tmp_path, subjects=[first, more]) == [place]
    more["width"] = 2
    assert refuse(tmp_path, subjects=[first, more]) == [
        "more.csv:3: sex: F for 02, but M in participants.tsv:3; take one of the two columns with `columns`, or give "
        "it another name"
    ]
    assert refuse(tmp_path, subjects=[first, {"file": "other.csv", "key": "id"}]) == [
        "other.csv: id: no id of the table is in participants.tsv: X1 in the table, 01, 02 in participants.tsv"
    ]
    more["columns"] = {"note": "note"}
    cohort, _ = read(tmp_path, subjects=[first, more])
    assert values(cohort, "note") == {"sub-01": "a", "sub-02": "c"}
    assert set(cohort.visits[1].values) == set(cohort.columns) - {"visit"}
    assert cohort.flow.left_out == {"with a scan, but without a row in participants.tsv": ["sub-03", "sub-04"]}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (
            ["01 1 30", "01 2 31"],
            "ages.tsv: visit: 1 in the table, 01 on disk and 1 other; map them, as in visit_names: {'1': "
            "'01', '2': '02'}",
        ),
        (
            ["01 ses-1 30", "01 ses-2 31"],
            "ages.tsv: visit: 1 in the table, 01 on disk and 1 other; map them, as in visit_names: {'1': "
            "'01', '2': '02'}",
        ),
        (["01 bl 30"], "ages.tsv: visit: no visit of the table is on disk: bl there, 01, 02 on disk"),
        (
            ["01 01 30", "01 01 31"],
            "ages.tsv:3: participant_id: 01 has a row for visit 01 already, in line 2; expected one row per subject "
            "and visit",
        ),
    ],
)
def test_visits_that_do_not_match_the_scans_are_refused(tmp_path, rows, fault):
    table(tmp_path, "participants.tsv", "participant_id sex", "sub-01 F")
    table(tmp_path, "ages.tsv", "participant_id session_id age", *rows)
    bids(tmp_path, "01/01", "01/02")
    assert refuse(tmp_path, sessions=[{"file": "ages.tsv"}]) == [fault]
    if "visit_names" in fault:
        names = {"1": "01", "2": "02"}
        cohort, _ = read(tmp_path, sessions=[{"file": "ages.tsv", "visit_names": names}])
        assert values(cohort, "age") == {"sub-01 ses-01": "30", "sub-01 ses-02": "31"}


def test_phenotype_tables_add_their_columns_and_scans_without_a_visit_are_told_apart(tmp_path):
    table(tmp_path, "participants.tsv", "participant_id sex", "sub-01 F", "sub-02 M")
    table(tmp_path, "phenotype/bdi.tsv", "participant_id bdi", "sub-01 12")
    table(tmp_path, "phenotype/iq.tsv", "participant_id iq", "sub-02 99", "sub-01 101", "sub-05 100")
    bids(tmp_path, "01", "02")
    scan(tmp_path, "sub-01/ses-2/func/sub-01_ses-2_task-rest_bold.nii.gz")
    cohort, notes = read(
        tmp_path,
        subjects=[{"file": "participants.tsv"}, {"file": "phenotype/*.tsv"}],
        scans={"T1": {"bids": "."}, "fMRI": {"bids": "."}},
    )
    assert values(cohort, "bdi") == {"sub-01": "12", "sub-01 ses-2": "12", "sub-02": None}
    assert values(cohort, "iq") == {"sub-01": "101", "sub-01 ses-2": "101", "sub-02": "99"}
    assert cohort.flow.left_out == {"in other tables, but without a row in participants.tsv": ["sub-05"]}
    assert [path.name for path in cohort.inputs] == ["participants.tsv", "bdi.tsv", "iq.tsv"]
    assert (
        "subjects whose scans of T1 name no visit, but others do; they count as a visit of their own (1): sub-01"
    ) in notes


def test_the_tables_subjects_decide_where_an_id_ends(tmp_path):
    table(tmp_path, "adni.csv", "PTID sex", "002_S_0413 F", "002_S_0559 M")
    scan(tmp_path, "002_S_0413_bl.nii", "002_S_0559_m12.nii")
    subjects, scans = [{"file": "adni.csv", "key": "PTID"}], {"T1": {"pattern": "{PTID}_{visit}.nii"}}
    cohort, _ = read(tmp_path, subjects=subjects, scans=scans)
    assert values(cohort, "sex") == {"002_S_0413 ses-bl": "F", "002_S_0559 ses-m12": "M"}
    table(tmp_path, "adni.csv", "PTID sex", "002_S_0413 F", "002_S_0559 M", "002 F")
    assert refuse(tmp_path, subjects=subjects, scans=scans)[0].startswith(
        "scans.T1: pattern: {PTID}_{visit}.nii: matches in several ways: 002_S_0413_bl.nii (PTID=002, "
        "visit=S_0413_bl or PTID=002_S_0413, visit=bl); 002_S_0559_m12.nii "
    )


def test_an_external_cohort_has_the_studys_conditions_and_its_own_tables(tmp_path):
    table(tmp_path, "participants.tsv", "participant_id sex age iq", "sub-01 F 30 -9")
    table(tmp_path, "other.csv", "eid sex age", "7 F 30", "8 M 50")
    scan(tmp_path, "other/007.nii.gz", "other/008.nii.gz")
    external = {
        "subjects": [{"file": "other.csv", "key": "eid", "width": 3}],
        "scans": {"T1": {"pattern": "other/{eid}.nii.gz"}},
    }
    config, faults = study(external={"abroad": external}, include="age < 40", missing={"iq": "-9"}), Faults()
    cohort = read_cohort(config.external["abroad"], config, tmp_path, faults, [])
    assert not faults
    assert [visit.subject for visit in cohort.visits] == ["007"]
    assert cohort.flow.left_out == {"`age < 40` is false": ["008"]}


def test_ids_that_lost_a_zero_inside_are_refused(tmp_path):
    table(tmp_path, "people.csv", "eid sex", "P9 F", "P10 M", "Zoë F", "Åse M")
    scan(tmp_path, "P09.nii", "P10.nii", "Ida.nii", "Åse.nii")
    keys = {"subjects": [{"file": "people.csv", "key": "eid"}], "scans": {"T1": {"pattern": "{eid}.nii"}}}
    assert refuse(tmp_path, **keys) == [
        "people.csv: eid: P9 in the table, P09 on disk; they differ only in spelling; write them the same, or use "
        "`replace`"
    ]


def test_visits_of_subjects_whose_ids_differ_in_zeros_stay_together(tmp_path):
    ids = ["1", "01", "001"]
    table(tmp_path, "people.csv", "eid sex", *(f"{i} F" for i in ids))
    scan(tmp_path, *(f"{i}_{visit}.nii" for i in ids for visit in ("pre", "post")))
    tasks = {"sex": {"kind": "classification", "column": "sex", "visits": 2}}
    scans = {"T1": {"pattern": "{eid}_{visit}.nii"}}
    cohort, notes = read(tmp_path, subjects=[{"file": "people.csv", "key": "eid"}], scans=scans, tasks=tasks)
    assert [visit.place for visit in cohort.visits] == [f"{i} ses-{v}" for i in sorted(ids) for v in ("post", "pre")]
    assert "tasks with several visits show them in the order post, pre; list them in visits for another" in notes


def test_a_text_of_a_condition_that_no_visit_has_is_refused_as_a_number_or_named(tmp_path):
    table(tmp_path, "participants.tsv", "participant_id site sex", "01 3.0 F", "02 2.0 M")
    bids(tmp_path, "01", "02")
    assert refuse(tmp_path, include='site != "3"') == [
        'participants.tsv:2: site: 3.0 is not the text "3" of site != "3"; write 3 without quotes to compare numbers'
    ]
    cohort, notes = read(tmp_path, include='sex != "male"')
    assert len(cohort.visits) == 2
    assert 'include: sex != "male": no visit has the text "male" in sex' in notes


def test_a_scan_outside_the_root_is_beside_the_linked_folder(tmp_path):
    table(tmp_path, "real/participants.tsv", "participant_id sex", "01 F")
    scan(tmp_path, "scans/01.nii", "other/scans/01.nii")
    (tmp_path / "other" / "link").symlink_to(tmp_path / "real")
    cohort, _ = read(tmp_path / "other" / "link", scans={"T1": {"pattern": "../scans/{subject}.nii"}})
    assert cohort.visits[0].scans["T1"][0].path == str(tmp_path / "scans" / "01.nii")
