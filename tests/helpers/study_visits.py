"""Visits of a study made from a pandas table, and its tasks as a study file has them."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from umbrella_jax.config.load import parse_section
from umbrella_jax.config.origins import Origins
from umbrella_jax.errors import Faults
from umbrella_jax.study.records import TaskRecords, make_records
from umbrella_jax.study.schema import StudyConfig
from umbrella_jax.study.visits import Scan, Visit


def study_of(tasks: Mapping[str, Any], modalities: tuple[str, ...] = ("sMRI",), **sections: Any) -> StudyConfig:
    """Return a study with these tasks, as if read from a file."""
    scans = {modality: {"bids": "."} for modality in modalities}
    show = {"show": list(modalities[:1])} if len(modalities) > 1 else {}
    data = {"subjects": [{"file": "participants.tsv"}], "scans": scans, **sections}
    return parse_section(StudyConfig, data | {"tasks": {n: show | t for n, t in tasks.items()}}, Origins("study.yaml"))


def visits_from(table: pd.DataFrame, scans: Mapping[str, int] | None = None) -> list[Visit]:
    """Return a visit for each row of a table with `subject` and perhaps `visit`; a missing cell is NaN.

    Args:
        table: its columns `sMRI`, `fMRI`, … say how many scans of the modality the row has.
        scans: the same for all rows.
    """
    visits = []
    for row in table.astype(object).to_dict("records"):
        name, subject = row.get("visit"), row["subject"]
        counts = {m: int(row.get(m, (scans or {"sMRI": 1}).get(m, 0))) for m in ("sMRI", "fMRI")}
        place = f"{subject}{f'_ses-{name}' if name else ''}"
        shown = {
            modality: tuple(
                Scan(f"{subject}/{place}_run-{run}_{modality}.nii.gz", modality, {"run": str(run)})
                for run in range(1, n + 1)
            )
            for modality, n in counts.items()
            if n
        }
        cells = {str(k): str(v) for k, v in row.items() if k not in (*counts, "visit") and not pd.isna(v)}
        visits.append(Visit(subject, name, cells, shown))
    return visits


def made(
    study: StudyConfig, visits_of: Mapping[str, list[Visit]], task: str | None = None
) -> tuple[dict[str, list[dict[str, Any]]], list[str], TaskRecords]:
    """Return the records of one task by split, its notes, and what `make_records` returned. Expect no fault."""
    faults, notes = Faults(), list[str]()
    name = task or next(iter(study.tasks))
    records = make_records(name, study, visits_of, faults, notes)
    made_records = {split: list(members) for split, members in records.items()}
    assert not faults, faults
    return made_records, notes, records


def faults_of(study: StudyConfig, visits_of: Mapping[str, list[Visit]]) -> list[str]:
    """Return the faults of a study's only task."""
    faults = Faults()
    (name,) = study.tasks
    records = make_records(name, study, visits_of, faults, [])
    assert bool(records) != bool(faults)
    for members in records.values():
        assert list(members)
    return faults


def asked(record: Mapping[str, Any]) -> list[str]:
    """Return the texts of all turns."""
    return [part["text"] for turn in record["conversations"] for part in turn["content"] if part["type"] == "text"]
