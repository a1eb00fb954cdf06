"""Measure how much subjects moved: the mean framewise displacement of runs, from fMRIPrep's tables of confounds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from umbrella_jax.console import plural
from umbrella_jax.data.bids.sidecars import cells_as_numbers, find_confounds, read_confounds_table
from umbrella_jax.errors import DataError
from umbrella_jax.study.visits import Scan

MEAN_FD = "mean_fd"
"""The column with the mean framewise displacement, in mm."""
_DISPLACEMENT = ("framewise_displacement", "FramewiseDisplacement")
"""Its column in a table of confounds, in current versions of fMRIPrep and in those before 1.2."""
_NAMES_SHOWN = 20


def mean_framewise_displacement(table: Path) -> float:
    """Return the mean framewise displacement of a run in mm, as in Power et al. 2012, from its table of confounds.

    The first frame has no displacement and does not count, whether the table has `n/a` or 0 there.

    Raises:
        DataError: the table has no such column, no number in it, another text than a number, or a number below 0.
    """
    columns = read_confounds_table(table)
    column = next((name for name in _DISPLACEMENT if name in columns), None)
    if column is None:
        raise DataError(f"{table}: no column {_DISPLACEMENT[0]}; expected fMRIPrep's table of confounds")
    numbers = cells_as_numbers(table, column, columns[column])[1:]
    known = numbers[~np.isnan(numbers)]
    if not len(known):
        raise DataError(f"{table}: {column}: expected a number for every frame but the first")
    if known.min() < 0:
        raise DataError(f"{table}: {column}: {known.min():g}; expected displacements of 0 mm or more")
    return float(known.mean())


def with_motion(scans: Mapping[str, Sequence[Scan]], root: Path, missing: list[str]) -> dict[str, tuple[Scan, ...]]:
    """Return the scans of a visit, with `mean_fd` of each run with a table of confounds beside it.

    Args:
        scans: {modality: its scans}.
        root: folder that their paths start at.
        missing: receives the path of each BIDS run without such a table.
    """
    return {modality: tuple(_measured(scan, root, missing) for scan in group) for modality, group in scans.items()}


def _measured(scan: Scan, root: Path, missing: list[str]) -> Scan:
    path = root / scan.path
    if not path.name.partition(".")[0].endswith("_bold"):
        return scan
    table = find_confounds(path)
    if table is None:
        missing.append(scan.path)
        return scan
    return replace(scan, mean_fd=mean_framewise_displacement(table))


def mean_over_runs(scans: Iterable[Scan]) -> str | None:
    """Return the mean of `mean_fd` over the runs that have one, as a cell of a table; None without any."""
    known = [scan.mean_fd for scan in scans if scan.mean_fd is not None]
    return f"{math.fsum(known) / len(known):.4f}" if known else None


def missing_note(missing: Sequence[str]) -> str:
    """Return the note about runs without a table of confounds, with the first names only."""
    more = f", and {len(missing) - _NAMES_SHOWN:,} more" if len(missing) > _NAMES_SHOWN else ""
    return (
        f"{MEAN_FD} is blank for {plural(len(missing), 'run')} without *_desc-confounds_timeseries.tsv beside it: "
        f"{', '.join(missing[:_NAMES_SHOWN])}{more}"
    )
