"""Find the files that BIDS keeps beside a scan: JSON sidecars with inheritance, and tables of confounds."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.errors import DataError
from umbrella_jax.io.reading import read_json, read_text

CONFOUNDS = ("desc-confounds_timeseries.tsv", "desc-confounds_regressors.tsv")
"""Ends of the names of fMRIPrep's tables of confounds, in current versions and in those before 20.2."""
_VARIANT = ("space", "res", "den", "desc", "hemi", "cohort")
"""Entities of a derivative that its table of confounds does not have: the table is about the whole run."""
_ENTITY = re.compile(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)")
_DATA_SET = "dataset_description.json"
_LARGEST_TABLE = 64 << 20
"""Bytes of a table of confounds; one of 1,200 frames with 500 columns has 10 MB."""
_LEVELS = 3
"""Folders above a scan's own in which BIDS may keep a sidecar: session, subject, data set."""


def split_name(name: str) -> tuple[dict[str, str], str] | None:
    """Return ({"sub": "01", "run": "2"}, "bold") for sub-01_run-2_bold.nii.gz; None for a name that is not BIDS."""
    *entities, suffix = name.partition(".")[0].split("_")
    matches = [_ENTITY.fullmatch(entity) for entity in entities]
    if not matches or not all(matches):
        return None
    return {match[1]: match[2] for match in matches if match}, suffix


def find_sidecars(scan: Path) -> list[Path]:
    """Return the JSON sidecars that apply to a scan, the nearest one first.

    By BIDS' inheritance principle these are `*_SUFFIX.json` files in the scan's folder and in those above it, up to the
    data set, whose entities the scan has too. For any other name, it is the file with the same name but `.json`.
    """
    named = split_name(scan.name)
    if named is None:
        sidecar = scan.with_name(f"{scan.name.partition('.')[0]}.json")
        return [sidecar] if sidecar.is_file() else []
    entities, suffix = named
    sidecars: list[Path] = []
    for folder in [scan.parent, *scan.parent.parents][: 1 + _LEVELS]:
        applicable = [
            (len(own[0]), name)
            for name in _names(str(folder), f"{suffix}.json")
            if (own := _entities_before(name, suffix)) is not None and own[0].items() <= entities.items()
        ]
        sidecars += [folder / name for _, name in sorted(applicable, reverse=True)]
        if (folder / _DATA_SET).is_file():
            break
    return sidecars


def read_sidecar_field(sidecars: Sequence[Path], field: str) -> tuple[Any, Path] | None:
    """Return (value, file) of a field from the nearest sidecar that has it; None without one.

    Raises DataError for a sidecar that is not a JSON object.
    """
    for sidecar in sidecars:
        content = read_json(sidecar, DataError, "expected the JSON sidecar of a scan")
        if not isinstance(content, dict):
            raise DataError(f"{sidecar}: expected an object, as the JSON sidecar of a scan")
        if field in content:
            return content[field], sidecar
    return None


def find_confounds(scan: Path) -> Path | None:
    """Return fMRIPrep's table of confounds beside a run; None without one.

    Its name has the run's entities, except those of the variant: space, resolution and description.

    Raises DataError if several fit.
    """
    named = split_name(scan.name)
    if named is None:
        return None
    entities = {key: label for key, label in named[0].items() if key not in _VARIANT}
    for end in CONFOUNDS:
        fitting = [
            (len(own[0]), name)
            for name in _names(str(scan.parent), end)
            if (own := split_name(name)) and own[0].items() <= (entities | {"desc": "confounds"}).items()
        ]
        most = max((count for count, _ in fitting), default=0)
        best = [name for count, name in fitting if count == most]
        if len(best) > 1:
            raise DataError(f"{scan}: several tables of confounds fit: {', '.join(best)}; expected one")
        if best:
            return scan.parent / best[0]
    return None


def read_confounds_table(table: Path) -> dict[str, list[str]]:
    """Return {column: its cells} of a table of confounds.

    Raises DataError if it cannot be read, its cells are not separated by tabs, two columns have one name, or a row has
    another number of cells than the header.
    """
    text = read_text(table, DataError, _LARGEST_TABLE, "expected fMRIPrep's table of confounds")
    header, *rows = csv.reader(io.StringIO(text), delimiter="\t") if text.strip() else [[]]
    while rows and not rows[-1]:
        rows.pop()  # blank lines at the end
    if len(header) == 1 and re.search(r"[,; ]", header[0].strip()):
        raise DataError(f"{table}: one column, {header[0][:60]!r}; columns must be separated by tabs")
    if repeated := sorted(name for name, count in Counter(header).items() if count > 1):
        raise DataError(f"{table}: {', '.join(repeated)}: several columns of this name; expected one")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(f"{table}:{line}: {len(row)} cells; expected {len(header)}, as the header has")
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def cells_as_numbers(table: Path, column: str, cells: Sequence[str]) -> np.ndarray:
    """Return the numbers of a column, float64, with NaN for `n/a`. Raises DataError for infinity or another text."""
    numbers = np.full(len(cells), np.nan)
    for place, cell in enumerate(cells):
        if cell.strip().lower() not in ("", "n/a", "nan"):
            number = parse_cell_number(cell.strip())
            if number is None:
                raise DataError(f"{table}:{place + 2}: {column}: expected a number or n/a, got {cell!r}")
            numbers[place] = number
    return numbers


def _entities_before(name: str, suffix: str) -> tuple[dict[str, str], str] | None:
    """Return `split_name`, also for a sidecar without entities, such as `bold.json`."""
    return ({}, suffix) if name == f"{suffix}.json" else split_name(name)


def _names(folder: str, end: str) -> tuple[str, ...]:
    """Return the names in a folder that are `end`, or end with `_` and `end`; none if it cannot be read."""
    try:
        return _listed(folder, os.stat(folder).st_mtime_ns, end)
    except OSError:
        return ()


@lru_cache(1024)
def _listed(folder: str, changed: int, end: str) -> tuple[str, ...]:
    """List a folder once for all of its scans, until it changes."""
    return tuple(sorted(name for name in os.listdir(folder) if name == end or name.endswith(f"_{end}")))
