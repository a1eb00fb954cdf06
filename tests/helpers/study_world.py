"""A study of 24 subjects as labs have them: two visits, three sites, families, missing scans and values."""

from pathlib import Path

import numpy as np

from tests.helpers.small_run import VOLUME_SHAPES, write_volume

SUBJECTS = 24
NO_SCAN, ONE_VISIT, NO_SEX, TOO_YOUNG, NO_ROW = (5,), (7, 8), (11,), (3, 16), (25,)
NO_RUN = (2, 9, 14)
"""Subjects without fMRI at visit 2."""

STUDY = """\
root: bids
subjects: [{file: participants.tsv}]
sessions: [{file: "sub-*/sub-*_sessions.tsv"}]
scans:
  sMRI: {bids: .}
  fMRI: {bids: .}
missing: {moca: [-9]}
bins:
  age_bin: {column: age, edges: [50, 60]}
include:
  - age >= 45
keep: [sex, site, age_bin]
tasks:
  sex: {kind: classification, column: sex, labels: {M: male, F: female}, show: sMRI}
  age:
    kind: regression
    column: age
    show: sMRI
    unit: years
    question: [How old is this person?, "At what age was this scan acquired?"]
  diagnosis:
    kind: classification
    column: diagnosis
    show: [sMRI, fMRI]
    covariates: "Age {age}, sex {sex}."
  compared:
    kind: comparison
    column: diagnosis
    show: sMRI
    references: {count: 1, per_query: 2}
  decline: {kind: regression, column: moca, show: sMRI, visits: 2, value: change}
  caption: {kind: text, show: fMRI, question: Describe this person., answer: "A {sex} subject, diagnosis {diagnosis}."}
split: {by: family, stratify: site, sizes: {train: 0.5, eval: 0.25, test: 0.25}}
"""


def make_study(root: Path, study: str = STUDY) -> Path:
    """Write a BIDS data set into `root`/bids and the study beside it, and return the study's path."""
    bids = root / "bids"
    bids.mkdir(parents=True)
    (bids / "dataset_description.json").write_text('{"Name": "Look-alike", "BIDSVersion": "1.10.0"}')
    rows = ["participant_id\tsex\tsite\tfamily"]
    for i in range(1, SUBJECTS + 1):
        sex = "n/a" if i in NO_SEX else "MF"[i % 2]
        rows.append(f"sub-{i:03}\t{sex}\t{'ABC'[i % 3]}\tf{(i + 1) // 2:02}")
        visits = (1,) if i in ONE_VISIT else (1, 2)
        sessions = ["session_id\tage\tmoca\tdiagnosis"]
        for visit in visits:
            age = (30 + i % 10 if i in TOO_YOUNG else 45 + i % 20) + 2 * (visit - 1)
            moca = -9 if i == 20 and visit == 2 else 30 - i % 5 - (visit - 1) * (i % 3)
            sessions.append(f"ses-{visit}\t{age}\t{moca}\t{'CN' if i % 4 < 2 else 'MCI'}")
        folder = bids / f"sub-{i:03}"
        folder.mkdir()
        (folder / f"sub-{i:03}_sessions.tsv").write_text("\n".join(sessions) + "\n")
        if i not in NO_SCAN:
            _write_scans(bids, i, visits)
    for i in NO_ROW:
        _write_scans(bids, i, (1,))
    (bids / "participants.tsv").write_text("\n".join(rows) + "\n")
    path = root / "study.yaml"
    path.write_text(study)
    return path


def _write_scans(bids: Path, subject: int, visits: tuple[int, ...]) -> None:
    for visit in visits:
        stem = f"sub-{subject:03}_ses-{visit}"
        folder = bids / f"sub-{subject:03}" / f"ses-{visit}"
        seed = 100 * subject + 2 * visit  # even, so that all are stored alike
        write_volume(folder / "anat" / f"{stem}_T1w.nii.gz", VOLUME_SHAPES["T1"], seed)
        if not (visit == 2 and subject in NO_RUN):
            values = np.random.default_rng(seed + 1).uniform(1, 9, VOLUME_SHAPES["rsfMRI"])
            write_volume(folder / "func" / f"{stem}_task-rest_bold.nii.gz", (), 0, values)
