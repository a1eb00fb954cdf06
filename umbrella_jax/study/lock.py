"""The record of a built study, study.lock.json: what it was made of, with what, and what came out."""

import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from umbrella_jax.config.schema import to_dict
from umbrella_jax.data.conversation import LOCK_FILE
from umbrella_jax.errors import DataError
from umbrella_jax.io.files import relative_path
from umbrella_jax.io.reading import read_json, sha256
from umbrella_jax.study.built import BuiltStudy, SplitCounts
from umbrella_jax.study.visits import Visit


def describe_study(built: BuiltStudy, out: Path, suffix: str) -> dict[str, Any]:
    """Return the content of study.lock.json.

    Tables are identified by SHA-256 of their bytes. Scans are identified by one SHA-256 over the list of their paths
    and sizes, because hashing terabytes would take longer than training; `data validate` and the cache read contents.

    Args:
        built: the study.
        out: where it will be, from which `image_root` is given.
        suffix: of the conversation files.
    """
    tables = sorted({path for cohort in built.cohorts.values() for path in cohort.inputs})
    kinds = {name: task.kind for name, task in built.config.tasks.items()}
    visits = [visit for cohort in built.cohorts.values() for visit in cohort.visits]
    return {
        "versions": {
            **{name: version(name) for name in ("umbrella-jax", "numpy", "scikit-learn")},
            "python": platform.python_version(),
        },
        "image_root": relative_path(built.root, out),
        "suffix": suffix,
        "folds": [{"name": p.name, "left_out": p.left_out} for p in built.partitions] if built.has_folds else [],
        "inputs": {
            "study": hashlib.sha256(built.text.encode()).hexdigest(),
            "tables": {os.path.relpath(path, built.root): sha256(path) for path in tables},
            "scans": _describe_scans(visits, built.root),
        },
        "flow": {
            name: {
                "left_out": {reason: len(subjects) for reason, subjects in cohort.flow.left_out.items()},
                "included": len(cohort.flow.included),
            }
            for name, cohort in built.cohorts.items()
        },
        "splits": {
            name: {split: _describe_split(counts, kinds) for split, counts in splits.items()}
            for name, splits in built.counts.items()
        },
        "study": to_dict(built.config),
    }


def _describe_scans(visits: Sequence[Visit], root: Path) -> dict[str, Any]:
    digest, number = hashlib.sha256(), 0
    for path in sorted({scan.path for visit in visits for scans in visit.scans.values() for scan in scans}):
        digest.update(f"{path} {os.path.getsize(root / path)}\n".encode())
        number += 1
    return {"number": number, "sha256_of_paths_and_sizes": digest.hexdigest()}


def _describe_split(counts: SplitCounts, kinds: Mapping[str, str]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for name, labels in counts.labels.items():
        tasks[name] = {"subjects": len(counts.subjects_of[name]), "conversations": labels.total()}
        if kinds[name] in ("classification", "comparison"):
            tasks[name]["labels"] = dict(sorted(labels.items()))
        if name in counts.comparison_types:
            tasks[name]["comparison_types"] = dict(sorted(counts.comparison_types[name].items()))
    return {"subjects": len(counts.subjects), "tasks": tasks}


def _is_record(lock: Mapping[str, Any]) -> bool:
    """Return whether a record has what others read of it."""
    folds, root, suffix = (lock.get(key) for key in ("folds", "image_root", "suffix"))
    return (
        isinstance(root, str)
        and suffix in (".json", ".jsonl")
        and isinstance(folds, list)
        and all(
            isinstance(fold, dict)
            and re.fullmatch(r"fold-\d+", str(fold.get("name")))
            and isinstance(fold.get("left_out"), str | None)
            for fold in folds
        )
    )


def read_lock(folder: Path) -> dict[str, Any]:
    """Read the record of a built study. Raise DataError for any other folder."""
    file = folder / LOCK_FILE
    lock = read_json(file, DataError, "expected a folder that `umbrella-jax data build` made")
    if not isinstance(lock, dict) or not _is_record(lock):
        raise DataError(f"{file}: not the record of a built study; build it again with `umbrella-jax data build`")
    return lock
