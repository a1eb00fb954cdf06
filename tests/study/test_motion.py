"""Mean framewise displacement: from fMRIPrep's tables into the conversations, and from there into scores."""

import json
from pathlib import Path

import pytest

from umbrella_jax.errors import DataError
from umbrella_jax.scoring.adjustment import adjust_scores
from umbrella_jax.scoring.groups import group_rows
from umbrella_jax.scoring.metrics import tasks_of
from umbrella_jax.study.build import build_study
from umbrella_jax.study.from_bids import from_bids
from umbrella_jax.study.motion import mean_framewise_displacement

PEOPLE = {f"{i:02}": {"age": str(20 + i + i % 3)} for i in range(12)}


def write_table(run: Path, displacements: list[float | str], column: str = "framewise_displacement") -> Path:
    """Write fMRIPrep's table beside a run, whose name may have a space and a description."""
    name = run.name.partition("_space")[0].removesuffix("_bold.nii.gz")
    table = run.parent / f"{name}_desc-confounds_timeseries.tsv"
    rows = [f"0.1\t{cell}" for cell in ["n/a", *displacements]]
    table.write_text("\n".join([f"trans_x\t{column}", *rows]) + "\n")
    return table


@pytest.fixture
def moving(bids) -> Path:
    """A derivative with two runs of each of 12 subjects, who move by 0.1, 0.2, … mm, in the second run twice that."""
    files = [f"func/sub-{{0}}_task-rest_run-{run}_space-MNI_desc-preproc_bold.nii.gz" for run in (1, 2)]
    root = bids(PEOPLE, {name: [file.format(name) for file in files] for name in PEOPLE})
    for number, name in enumerate(PEOPLE, start=1):
        for run, file in enumerate(files, start=1):
            write_table(root / f"sub-{name}" / file.format(name), [number * run * 0.05, number * run * 0.15])
    return root


def records_of(out: Path) -> dict[str, dict]:
    return {
        r["task_id"]: r["metadata"]
        for file in out.glob("*.json")
        if "lock" not in file.name
        for r in json.loads(file.read_text())
    }


def test_from_bids_keeps_the_motion_of_the_runs_shown(moving, tmp_path):
    (moving / "sub-03/func/sub-03_task-rest_run-2_desc-confounds_timeseries.tsv").unlink()
    lines = from_bids(moving, tmp_path / "out", "age", modality="fMRI", kind="regression", split="all=1")
    metadata = records_of(tmp_path / "out")
    assert metadata["sub-00_run-1_age_regression"]["mean_fd"] == 0.1
    assert metadata["sub-01_run-2_age_regression"]["mean_fd"] == 0.4
    assert "mean_fd" not in metadata["sub-03_run-2_age_regression"]
    assert "mean_fd is blank for 1 run without" in " ".join(lines)
    build_study(tmp_path / "out" / "study.yaml", tmp_path / "again")
    assert records_of(tmp_path / "again") == metadata


def test_a_study_excludes_by_motion_and_averages_over_the_runs_of_a_conversation(moving, tmp_path):
    study = {
        "root": str(moving),
        "subjects": [{"file": "participants.tsv"}],
        "scans": {"fMRI": {"bids": "."}},
        "include": ["mean_fd < 1.2"],  # the mean of a subject's two runs is 0.15 mm for the first
        "keep": ["mean_fd", "age"],
        "tasks": {"age": {"kind": "regression", "column": "age"}},
        "split": {"sizes": {"all": 1.0}},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    build_study(tmp_path / "study.yaml", tmp_path / "out")
    metadata = records_of(tmp_path / "out")
    assert {own["subject_id"] for own in metadata.values()} == {f"sub-{i:02}" for i in range(7)}
    assert metadata["sub-01_run-2_age"]["mean_fd"] == 0.4
    rows = [
        {
            "task_id": name,
            "task_type": "T1",
            "prediction": str(own["subject_label"] + 10 * own["mean_fd"]),
            "reference": str(own["subject_label"]),
            "metadata": own,
        }
        for name, own in metadata.items()
    ]
    adjusted = adjust_scores(rows, tasks_of(rows), ["mean_fd"], resamples=0)
    assert adjusted.adjustments["age"].slopes == pytest.approx({"mean_fd": 10})
    thirds = group_rows([*rows, {**rows[0], "metadata": {**rows[0]["metadata"], "mean_fd": 0.55}}], ["mean_fd"])
    assert {name: len(members) for name, members in thirds["mean_fd"].items()} == {
        "≤ 0.4": 6,
        "0.4 to 0.633": 4,
        "> 0.633": 5,
    }


def test_the_mean_leaves_out_the_first_frame(tmp_path):
    run = tmp_path / "sub-1_task-rest_bold.nii.gz"
    assert mean_framewise_displacement(write_table(run, [0.2, 0.4])) == pytest.approx(0.3)
    assert mean_framewise_displacement(write_table(run, [0.2], "FramewiseDisplacement")) == 0.2
    table = write_table(run, [0.2, 0.4])
    table.write_text(table.read_text().replace("n/a", "0"))  # as some tools write it
    assert mean_framewise_displacement(table) == pytest.approx(0.3)
    with pytest.raises(DataError, match=r"framewise_displacement: -0\.2; expected displacements of 0 mm or more"):
        mean_framewise_displacement(write_table(run, [0.4, -0.2]))
    with pytest.raises(DataError, match="no column framewise_displacement"):
        mean_framewise_displacement(write_table(run, [0.2], "dvars"))
    with pytest.raises(DataError, match=r"tsv:4: framewise_displacement: expected a number or n/a, got 'high'"):
        mean_framewise_displacement(write_table(run, [0.2, "high"]))
