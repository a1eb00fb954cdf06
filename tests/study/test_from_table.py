"""`data from-table`: a spreadsheet and a folder of scans."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers.small_run import umbrella


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A spreadsheet that lost the zeros of its ids, and a T1 per subject."""
    table = pd.DataFrame({"ID": range(1, 21), "Sex": ["f", "m"] * 10, "IQ": [90 + i for i in range(20)]})
    table.to_excel(tmp_path / "table.xlsx", index=False, engine="openpyxl")
    for i in range(1, 21):
        file = tmp_path / f"{i:03}" / "T1.nii.gz"
        file.parent.mkdir()
        file.write_bytes(bytes([i]))
    return tmp_path


FLAGS = ("--key", "ID", "--scans", "{ID}/T1.nii.gz", "--width", 3)


@pytest.mark.parametrize(("target", "kind"), [("Sex", "classification"), ("IQ", "regression")])
def test_every_label_is_the_tables(target: str, kind: str, lab: Path) -> None:
    umbrella("data", "from-table", lab / "table.xlsx", lab / "out", "--target", target, *FLAGS)
    rows = pd.read_excel(lab / "table.xlsx", engine="openpyxl").set_index("ID")
    records = [r for split in ("train", "eval") for r in json.loads((lab / "out" / f"{split}.json").read_text())]
    assert len(records) == 20
    for record in records:
        about = record["metadata"]
        assert about["subject_label"] == rows.loc[int(about["subject_id"])][target]
        assert about["kind"] == kind
        assert (lab / record["images"][0]["path"]).read_bytes() == bytes([int(about["subject_id"])])


def test_its_study_builds_the_same_again(lab: Path) -> None:
    umbrella("data", "from-table", lab / "table.xlsx", lab / "out", "--target", "Sex", "--stratify", "Sex", *FLAGS)
    umbrella("data", "build", lab / "out" / "study.yaml", lab / "again")
    for name in ("train.json", "eval.json", "splits.tsv"):
        assert (lab / "out" / name).read_bytes() == (lab / "again" / name).read_bytes()


def test_the_way_to_the_images_leads_out_of_a_linked_folder(lab: Path) -> None:
    """`out/..` is where the folder really is."""
    far = lab / "a" / "b" / "c"
    far.mkdir(parents=True)
    (lab / "link").symlink_to(far)
    umbrella("data", "from-table", lab / "table.xlsx", lab / "link" / "out", "--target", "Sex", *FLAGS)
    umbrella("data", "build", lab / "link" / "out" / "study.yaml", lab / "link" / "again")
    lock = json.loads((far / "again" / "study.lock.json").read_text())
    assert (far / "again" / lock["image_root"] / "001" / "T1.nii.gz").exists()


def test_refuses_a_folder_that_is_not_empty_before_it_reads(lab: Path) -> None:
    err = umbrella("data", "from-table", lab / "none.csv", lab, "--target", "Sex", *FLAGS, code=2)
    assert err.startswith(f"umbrella-jax: {lab}: directory is not empty; choose another")
