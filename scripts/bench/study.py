"""Time and memory of the command `data build`."""

import random
from pathlib import Path

from bench.measure import figure, run

STUDY = """\
root: data
subjects: [{file: participants.tsv}]
scans: {sMRI: {bids: .}}
include: age >= 45
keep: [sex, site]
bins: {weight: {column: bmi, edges: [18.5, 25, 30]}}
tasks:
  sex: {kind: classification, column: sex, labels: {M: male, F: female}, covariates: "Age {age}."}
  age: {kind: regression, column: age, unit: years}
  compared: {kind: comparison, column: weight, references: {count: 1, per_query: 1}}
split: {stratify: [site, sex, age], sizes: {train: 0.8, eval: 0.1, test: 0.1}}
"""


def make_study(folder: Path, subjects: int) -> None:
    """Write a BIDS data set with a table and a T1 of a few bytes per subject; `data build` opens no scan."""
    random_numbers = random.Random(0)
    rows = ["participant_id\tsex\tsite\tage\tbmi"]
    for i in range(subjects):
        name = f"sub-{i:06d}"
        anat = folder / "data" / name / "anat"
        anat.mkdir(parents=True)
        (anat / f"{name}_T1w.nii.gz").write_bytes(name.encode())
        age, bmi = random_numbers.randint(40, 80), random_numbers.gauss(27, 4)
        rows.append(f"{name}\t{'MF'[i % 2]}\t{random_numbers.randrange(20)}\t{age}\t{bmi:.1f}")
    (folder / "data" / "participants.tsv").write_text("\n".join(rows) + "\n")
    (folder / "study.yaml").write_text(STUDY)


def study(work_dir: Path) -> None:
    """Measure `data build` on 40,000 subjects with three tasks, and on a tenth of them."""
    for subjects, limit, memory in ((4000, None, None), (40000, 60, 1)):
        folder = work_dir / f"study_{subjects}"
        if not folder.exists():
            make_study(folder, subjects)
        out = folder / "built"
        number = 0
        while out.exists():
            number += 1
            out = folder / f"built_{number}"
        measured = run(["data", "build", str(folder / "study.yaml"), str(out)])
        limits = {} if limit is None else {"limit": limit}
        figure(
            "study_seconds", measured["seconds"], "s", **limits, processor=round(measured["processor"], 1),
            subjects=subjects,
        )  # fmt: skip
        figure("study_peak", measured["peak"], "GB", **({} if memory is None else {"limit": memory}), subjects=subjects)
