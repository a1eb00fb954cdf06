"""Which files of a BIDS data set are used as scans."""

import re
import subprocess

import pytest

from tests.helpers.bids_case import faults, sexes, subjects, taken, written
from tests.helpers.small_run import write_volume
from umbrella_jax.data.ignore_file import IgnoreFile
from umbrella_jax.study.from_bids import from_bids

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
    names = [r["images"][0]["path"].removeprefix("sub-").partition("_T1w")[0] for r in records]
    assert names == paths
    text = " ".join(" ".join(lines).split())  # without line breaks
    if entities:
        assert f"scans that are not {' '.join(entities)}" in text
    else:
        assert "1 subject with several scans, all used; narrow with --entity KEY=VALUE: run 1, none; ses 1, 2" in text


def test_an_entity_given_twice_takes_either_value(bids, tmp_path):
    root = bids(sexes(2), {n: [f"anat/sub-{n}_run-{r}_T1w.nii" for r in (1, 2, 3)] for n in sexes(2)})
    from_bids(root, tmp_path / "out", "sex", split="all=1", entities=["run=1", "run=3"])
    (records,) = written(tmp_path / "out", "all")
    assert [r["task_id"][:12] for r in records] == ["sub-00_run-1", "sub-00_run-3", "sub-01_run-1", "sub-01_run-3"]


def test_functional_runs_are_resting_state_by_default(bids, tmp_path):
    files = {n: [f"func/sub-{n}_task-{t}_bold.nii.gz" for t in ("rest", "nback")] for n in sexes(2)}
    files["00"].append("func/sub-00_task-rest_sbref.nii.gz")
    root = bids(sexes(2), files)
    lines = from_bids(root, tmp_path / "rest", "sex", modality="fMRI", split="train=0.5,eval=0.5")
    train, held = written(tmp_path / "rest")
    assert all(r["images"][0]["path"].endswith("_task-rest_bold.nii.gz") for r in train + held)
    assert train[0]["modalities"] == ["fMRI"]
    assert "left out: runs of other tasks (2); --entity task=VALUE selects one: nback" in lines
    assert any("--config rsfmri_0.5b " in line for line in lines)
    from_bids(root, tmp_path / "nback", "sex", modality="fMRI", split="all=1", entities=["task=nback"])
    (records,) = written(tmp_path / "nback", "all")
    assert all("task-nback" in r["images"][0]["path"] for r in records)


def test_derivatives(bids, tmp_path):
    root = bids(sexes(2), {"00": ["anat/sub-00_T1w.nii"]})
    for name in sexes(2):
        folder = root / "derivatives/fmriprep" / f"sub-{name}" / "anat"
        write_volume(folder / f"sub-{name}_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz", (6, 7, 5), int(name))
    from_bids(root, tmp_path / "out", "sex", derivatives="fmriprep", split="all=1")
    (records,) = written(tmp_path / "out", "all")
    start = "derivatives/fmriprep/sub-00/anat/"
    assert records[0]["images"][0]["path"] == f"{start}sub-00_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz"
    (fault,) = faults(root, tmp_path / "none", "sex", derivatives="freesurfer")
    assert "derivatives/freesurfer: not found; expected a directory, such as fmriprep" in fault


def test_files_and_subjects_left_out_are_listed(bids, tmp_path):
    people = {**sexes(4), "10": {"sex": "n/a"}, "11": {"sex": "N/A"}, "12": {"sex": "F"}, "13": {"sex": "F"}, "14": {}}
    files = {n: [f"anat/sub-{n}_T1w.nii"] for n in [*sexes(4), "10", "11", "14", "20"]}
    files["00"] += ["anat/sub-00_defaced-T1w_old_T1w.nii", "anat/sub-01_run-2_T1w.nii"]
    root = bids(people, files)
    (root / "sub-13/anat").mkdir(parents=True)
    (root / "sub-13/anat/sub-13_T1w.nii.gz").symlink_to(root / ".git/annex/nowhere")
    lines = from_bids(root, tmp_path / "out", "sex", split="train=0.5,eval=0.5")
    assert lines[3:9] == [
        "left out: files without a BIDS name for their folder (2):",
        "  sub-00/anat/sub-00_defaced-T1w_old_T1w.nii, sub-00/anat/sub-01_run-2_T1w.nii",
        "left out: broken links; `datalad get` them (1): sub-13/anat/sub-13_T1w.nii.gz",
        "left out: subjects without a scan (2): sub-12, sub-13",
        "left out: subjects whose sex is n/a or empty (3): sub-10, sub-11, sub-14",
        "left out: subjects without a row in participants.tsv (1): sub-20",
    ]
    assert set.union(*map(subjects, written(tmp_path / "out"))) == {f"sub-{n}" for n in sexes(4)}


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
def test_variants_of_one_scan_need_a_choice(bids, tmp_path, variants, asked, choices):
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


def test_all_repeats_are_used(bids, tmp_path):
    """Sessions, runs, directions and kinds of rest are separate measurements; other suffixes are ignored."""
    ends = ["ses-1_task-rest_dir-AP_run-1", "ses-1_task-rest_dir-PA_run-1", "ses-1_task-resteyesopen_dir-AP_run-1"]
    files = [f"ses-1/func/sub-00_{end}_bold.nii.gz" for end in ends]
    others = ["func/sub-00_task-rest_sbref.nii.gz", "func/sub-00_task-rest_desc-brain_mask.nii.gz"]
    root = bids(sexes(2), {"00": [*files, *others], "01": ["func/sub-01_task-rest_bold.nii.gz"]})
    paths, said = taken(root, tmp_path / "out", "sex", modality="fMRI")
    assert paths == [*(f"sub-00/{file}" for file in sorted(files)), "sub-01/func/sub-01_task-rest_bold.nii.gz"]
    note = "1 subject with several scans, all used; narrow with --entity KEY=VALUE: "
    assert f"{note}dir AP, PA, none; task rest, resteyesopen" in said


def test_files_that_are_not_scans_are_left_out_and_counted(bids, tmp_path):
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
    paths, messages = taken(root, tmp_path / "out", "sex")
    assert paths == [f"sub-{n}/anat/sub-{n}_T1w.nii.gz" for n in list(people)[:5]]
    for part in (
        "X.nii beside X.nii.gz (1): sub-00/anat/sub-00_T1w.nii",
        "empty files (1): sub-01/anat/sub-01_run-2_T1w.nii.gz",
        "hidden files (1): sub-02/anat/._sub-02_T1w.nii.gz",
        "`git lfs pull` them (2): sub-03/anat/sub-03_run-2_T1w.nii.gz, sub-04/anat/sub-04_run-2_T1w.nii.gz",
        "subjects without a scan (1): sub-05",
    ):
        assert f"left out: {part}" in messages.replace(
            "pointers to files that were not downloaded; `datalad get` or ", ""
        )


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
def test_bidsignore_follows_gitignore(patterns, excluded, tmp_path):
    paths = ["sub-01/anat/sub-01_run-2_T1w.nii", "sub-02/anat/a.nii", "sub-02/a.nii", "x/sub-02/a.nii"]
    ignore = IgnoreFile(patterns.splitlines())
    assert {path for path in paths if ignore.excludes(path)} == excluded
    (tmp_path / ".gitignore").write_text(patterns)  # and so says git
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    told = subprocess.run(["git", "check-ignore", *paths], cwd=tmp_path, capture_output=True, text=True)
    assert set(told.stdout.split()) == excluded


def test_ignored_files_are_left_out(bids, tmp_path):
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
