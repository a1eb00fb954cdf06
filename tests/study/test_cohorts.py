"""The study files of docs/cohorts.md, built on look-alikes of the folders; pandas reads the tables independently."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xlwt

from tests.helpers.small_run import umbrella

PAGE = Path(__file__).parents[2] / "docs" / "cohorts.md"
STUDIES = dict(re.findall(r"^## (.+?)\n.*?^```yaml study\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
Expected = Callable[[dict[str, Any]], dict[str, Any]]
"""{task: right answer} of the subject and visit in a record's metadata, from pandas' table."""
RNG = np.random.default_rng(0)


def scan(path: Path) -> None:
    """A file with bytes of its own; `data build` opens none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(RNG.bytes(64))


def openneuro(root: Path) -> Expected:
    ids = [f"sub-{i:02}" for i in range(1, 31)]
    table = pd.DataFrame({"participant_id": ids, "sex": ["M", "F"] * 15, "age": [20 + 3 * i % 41 for i in range(30)]})
    (root / "ds000000").mkdir()
    table.to_csv(root / "ds000000" / "participants.tsv", sep="\t", index=False)
    (root / "ds000000" / "dataset_description.json").write_text("{}")
    for subject in ids[:-1]:  # the last was not preprocessed
        folder = root / "ds000000" / "derivatives" / "fmriprep" / subject
        for space in ("", "_space-MNI152NLin2009cAsym"):
            scan(folder / "anat" / f"{subject}{space}_desc-preproc_T1w.nii.gz")
            scan(folder / "func" / f"{subject}_task-rest{space}_desc-preproc_bold.nii.gz")
        scan(folder / "func" / f"{subject}_task-nback_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz")
    rows = table.set_index("participant_id")

    def expected(about: dict[str, Any]) -> dict[str, Any]:
        row = rows.loc[about["subject_id"]]
        return {"sex": {"M": "male", "F": "female"}[row["sex"]], "age": row["age"]}

    return expected


def uk_biobank(root: Path) -> Expected:
    ids = [1000012 + 7 * i for i in range(40)]
    table = pd.DataFrame(
        {
            "eid": ids,
            "31-0.0": [i % 2 for i in range(40)],
            "21003-0.0": [41 + i for i in range(40)],
            "21003-2.0": [48 + i for i in range(40)],
            "21003-3.0": [51 + i if i % 3 else np.nan for i in range(40)],
            "54-2.0": [11025 + 2 * (i % 2) for i in range(40)],
            "54-3.0": [11025 + 2 * (i % 2) if i % 3 else np.nan for i in range(40)],
        }
    )
    (root / "ukb").mkdir()
    table.to_csv(root / "ukb" / "fields.csv", index=False)
    for i, eid in enumerate(ids):
        for visit in (2, 3) if i % 3 else (2,):
            scan(root / "ukb" / str(eid) / "T1" / f"{eid}_20252_{visit}_0.nii.gz")
    rows = pd.read_csv(root / "ukb" / "fields.csv").set_index("eid")

    def expected(about: dict[str, Any]) -> dict[str, Any]:
        row = rows.loc[int(about["subject_id"])]
        return {"age": row[f"21003-{about['visit']}.0"], "sex": ["female", "male"][int(row["31-0.0"])]}

    return expected


def hcp(root: Path) -> Expected:
    ids = [100206 + 101 * i for i in range(40)]
    (root / "hcp").mkdir()
    first = pd.DataFrame({"Subject": ids, "Gender": ["M", "F"] * 20, "PMAT24_A_CR": [5 + i % 20 for i in range(40)]})
    first.to_csv(root / "hcp" / "unrestricted.csv", index=False)
    second = pd.DataFrame(
        {
            "Subject": ids,
            "Age_in_Yrs": [22 + i % 15 for i in range(40)],
            "Family_ID": [f"5{i // 3}_8" for i in range(40)],
        }
    )
    second.to_csv(root / "hcp" / "restricted.csv", index=False)
    for subject in map(str, ids):
        scan(root / "hcp" / subject / "T1w" / "T1w_acpc_dc_restore.nii.gz")
        for name in ("rfMRI_REST1_LR", "rfMRI_REST2_RL"):
            scan(root / "hcp" / subject / "MNINonLinear" / "Results" / name / f"{name}_hp2000_clean.nii.gz")
    rows = first.set_index("Subject")

    def expected(about: dict[str, Any]) -> dict[str, Any]:
        row = rows.loc[int(about["subject_id"])]
        return {"sex": {"M": "male", "F": "female"}[row["Gender"]], "fluid": row["PMAT24_A_CR"]}

    return expected


ABCD_VISITS = {
    "baseline_year_1_arm_1": "baselineYear1Arm1",
    "2_year_follow_up_y_arm_1": "2YearFollowUpYArm1",
}


def abcd(root: Path) -> Expected:
    ids = [f"0A{i:06}" for i in range(36)]
    core = root / "abcd" / "core"
    core.mkdir(parents=True)
    demo = [(f"NDAR_INV{i}", visit, 1 + n % 2) for n, i in enumerate(ids) for visit in ABCD_VISITS]
    frame = pd.DataFrame(demo, columns=["src_subject_id", "eventname", "demo_sex_v2"])
    frame.loc[frame["eventname"] != "baseline_year_1_arm_1", "demo_sex_v2"] = np.nan
    frame.to_csv(core / "abcd_p_demo.csv", index=False)
    long = [
        (f"NDAR_INV{i}", visit, 108 + n + 24 * later, f"site{n % 3:02}", n // 2)
        for n, i in enumerate(ids)
        for later, visit in enumerate(ABCD_VISITS)
    ]
    columns = ["src_subject_id", "eventname", "interview_age", "site_id_l", "rel_family_id"]
    table = pd.DataFrame(long, columns=columns)
    table["site_id_l"] = [f"site{family % 3:02}" for family in table["rel_family_id"]]
    table.to_csv(core / "abcd_y_lt.csv", index=False)
    (root / "abcd" / "rawdata").mkdir()
    for i in ids:
        for visit in ABCD_VISITS.values():
            stem = f"sub-NDARINV{i}_ses-{visit}"
            scan(root / "abcd" / "rawdata" / f"sub-NDARINV{i}" / f"ses-{visit}" / "anat" / f"{stem}_T1w.nii.gz")
    months = table.set_index(["src_subject_id", "eventname"])["interview_age"]
    sexes = frame.dropna().set_index("src_subject_id")["demo_sex_v2"]
    table_names = {folder: name for name, folder in ABCD_VISITS.items()}

    def expected(about: dict[str, Any]) -> dict[str, Any]:
        subject = about["subject_id"].replace("sub-NDARINV", "NDAR_INV")
        return {
            "sex": {1: "male", 2: "female"}[int(sexes[subject])],
            "age": months[subject, table_names[about["visit"]]],
        }

    return expected


def adni(root: Path) -> Expected:
    rows = []
    for i in range(30):
        subject, group = f"{2 + i % 3:03}_S_{295 + i:04}", ("CN", "AD", "MCI")[i % 3]
        for n, visit in enumerate(("sc", "m06")):
            rows.append((f"I{13700 + 10 * i + n}", subject, group, "MF"[i // 3 % 2], 60 + i, visit))
    columns = ["Image Data ID", "Subject", "Group", "Sex", "Age", "Visit"]
    table = pd.DataFrame(rows, columns=columns)
    (root / "adni").mkdir()
    table.to_csv(root / "adni" / "collection.csv", index=False)
    table.drop_duplicates("Subject")[["Subject", "Sex"]].to_csv(root / "adni" / "subjects.csv", index=False)
    for image, subject, *_ in rows:
        name = f"ADNI_{subject}_MR_MP-RAGE_br_raw_{image}.nii"
        scan(root / "adni" / "ADNI" / subject / "MP-RAGE" / "2006-04-18_08_20_30.0" / image / name)
    groups = table.set_index("Image Data ID")["Group"]
    names = {"CN": "cognitively normal", "AD": "Alzheimer's disease"}

    def expected(about: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(("group", "compared"), names.get(groups[about["visit"]]))

    return expected


def ixi(root: Path) -> Expected:
    book = xlwt.Workbook()
    sheet = book.add_sheet("Table")
    header = ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "AGE"]
    rows = [(n, 1 + n % 2, 170 + n % 9, 20.5 + n / 3) for n in range(2, 62)]
    for r, row in enumerate([header, *rows]):
        for c, value in enumerate(row):
            sheet.write(r, c, value)
    (root / "ixi").mkdir()
    book.save(str(root / "ixi" / "IXI.xls"))
    sites = ("Guys", "HH", "IOP")
    for n, *_ in rows[:-2]:
        scan(root / "ixi" / "IXI-T1" / f"IXI{n:03}-{sites[n // 2 % 3]}-{800 + n:04}-T1.nii.gz")
    table = {n: (sex, age) for n, sex, _, age in rows}

    def expected(about: dict[str, Any]) -> dict[str, Any]:
        number = int(about["subject_id"])
        sex, age = table[number]
        assert about["site"] == sites[number // 2 % 3]
        return {"sex": {1: "male", 2: "female"}[sex], "age": pytest.approx(age, abs=0.051)}

    return expected


def abide(root: Path) -> Expected:
    sites = ("Pitt", "NYU", "UCLA")
    rows = [
        {
            "SUB_ID": 50003 + i,
            "SITE_ID": sites[i % 3],
            "FILE_ID": "no_filename" if i in (4, 9) else f"{sites[i % 3]}_{50003 + i:07}",
            "DX_GROUP": 1 + i // 3 % 2,
            "AGE_AT_SCAN": 10.5 + i / 4,
            "SEX": 1 + i % 2,
            "FIQ": -9999 if i == 12 else 90 + i % 37,
        }
        for i in range(60)
    ]
    folder = root / "abide"
    folder.mkdir()
    table = pd.DataFrame(rows)
    table.to_csv(folder / "Phenotypic_V1_0b_preprocessed1.csv")
    for row in rows:
        if row["FILE_ID"] != "no_filename":
            scan(folder / "Outputs/cpac/filt_global/func_preproc" / f"{row['FILE_ID']}_func_preproc.nii.gz")
    by_file = table.set_index("FILE_ID")

    def expected(about: dict[str, Any]) -> dict[str, Any]:
        row = by_file.loc[about["subject_id"]]
        assert row["FIQ"] != -9999 or about["task"] != "iq"
        return {"diagnosis": {1: "autism", 2: "control"}[row["DX_GROUP"]], "iq": row["FIQ"]}

    return expected


TREES: dict[str, tuple[Callable[[Path], Expected], dict[str, int]]] = {
    "OpenNeuro with fMRIPrep": (openneuro, {"sex": 29, "age": 29}),
    "UK Biobank": (uk_biobank, {"age": 66, "sex": 66}),
    "HCP Young Adult": (hcp, {"sex": 40, "fluid": 40}),
    "ABCD": (abcd, {"sex": 72, "age": 72}),
    "ADNI": (adni, {"group": 20, "compared": 40}),
    "IXI": (ixi, {"sex": 58, "age": 58}),
    "ABIDE preprocessed": (abide, {"diagnosis": 58, "iq": 57}),
}
"""{heading in docs/cohorts.md: (what makes the look-alike, conversations by task over all test sets or splits)}."""


def test_every_cohort_of_the_page_is_built() -> None:
    assert TREES.keys() == STUDIES.keys()


@pytest.mark.parametrize("cohort", TREES)
def test_every_label_is_the_tables(cohort: str, tmp_path: Path) -> None:
    make_tree, numbers = TREES[cohort]
    expected = make_tree(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDIES[cohort])
    umbrella("data", "build", tmp_path / "study.yaml", tmp_path / "built")
    folds = sorted((tmp_path / "built").glob("fold-*"))
    files = [f / "test.json" for f in folds] or sorted((tmp_path / "built").glob("[!s]*.json"))
    counts: dict[str, int] = {}
    for record in (record for file in files for record in json.loads(file.read_text())):
        about = record["metadata"]
        assert about["subject_label"] == expected(about)[about["task"]], record["task_id"]
        answer = record["conversations"][-1]["content"][-1]["text"]
        if isinstance(about["subject_label"], str):
            assert answer.removesuffix(".") == about["subject_label"]
        else:
            assert float(answer.split()[0]) == pytest.approx(about["subject_label"], abs=0.051)  # IXI: one decimal
        counts[about["task"]] = counts.get(about["task"], 0) + 1
        for image in record["images"]:
            assert (tmp_path / STUDIES[cohort].partition("root: ")[2].split()[0] / image["path"]).is_file()
    assert counts == numbers
