"""Read a lab's tables: text in any encoding, spreadsheets and parquet, each cell as text with the line of its row."""

import csv
import difflib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from umbrella_jax.data.tables import (
    DELIMITERS,
    Table,
    is_missing,
    make_table,
    split_rows,
)
from umbrella_jax.errors import DataError
from umbrella_jax.io.reading import LISTING, read_content
from umbrella_jax.study import sheet_process
from umbrella_jax.study.schema import StudyConfig, TableConfig

VISIT = "visit"
"""The column with the name of the visit, in every table with visits, and in `Visit.values`."""
SUBJECT = "subject"
"""The column with the subject's id, in `Visit.values`."""
_TEXT_FILES = (".tsv", ".csv", ".txt")
_SPREADSHEETS = (".xlsx", ".xls")
_FORMATS = ", ".join((*_TEXT_FILES, *_SPREADSHEETS, ".parquet"))
_SINGLE_BYTE = ("cp125", "latin", "iso8859", "iso-8859", "iso_8859", "windows-125", "mac")
_NAMES_SHOWN = 20


@dataclass(frozen=True)
class MissingValues:
    """Cells that mean a missing value, per column of a study."""

    declared: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """{column, or "*" for all: values}."""
    labels: Mapping[str, Collection[str]] = field(default_factory=dict)
    """{column: values with a label, which are not missing unless declared}."""

    @classmethod
    def of_study(cls, study: StudyConfig) -> "MissingValues":
        """Return the missing values that a study declares, and the labels of its tasks."""
        labels: dict[str, set[str]] = {}
        for task in study.tasks.values():
            if task.column is not None:
                labels.setdefault(task.column, set()).update(task.labels)
        return cls(study.missing, labels)

    def of_column(self, column: str) -> "_KnownCells":
        """Return {cell: whether it means a missing value} of a column, for any cell."""
        declared = (*self.declared.get(column, ()), *self.declared.get("*", ()))
        return _KnownCells(declared, self.labels.get(column, ()))


class _KnownCells(dict[str, bool]):
    """{cell: whether it means a missing value}, filled when a cell is looked up."""

    def __init__(self, declared: Sequence[str], labels: Collection[str]):
        self._declared, self._labels = declared, labels

    def __missing__(self, cell: str) -> bool:
        self[cell] = is_missing(cell, declared=self._declared, labels=self._labels)
        return self[cell]


def read_lab_table(
    path: Path, config: TableConfig, missing: MissingValues, notes: list[str], *, with_visits: bool = False
) -> Table:
    """Read one table, with the study's names for its columns and without missing cells.

    A table with a column per visit becomes one row per subject and visit that has any value.

    Args:
        path: the file, of which `config.file` may be the pattern.
        config: columns, sheet, encoding and width of ids.
        missing: cells to leave out of the rows.
        notes: receives a line about rows that have a declared missing value instead of an id.
        with_visits: whether rows are visits, as in `sessions`.

    Returns:
        Its columns are `config.key`, then `visit` if the rows are visits, then the others. Ids have their zeros again,
        and visits no `ses-`.

    Raises:
        DataError: the file cannot be read, a column is not there or is there twice, a row has another number of cells,
            or a row has no subject or no visit.
    """
    table = _read_table(path, config)
    faults = list(table.faults)
    own_key = re.fullmatch(r"(sub-[^_]+)_sessions\.tsv", path.name) if config.key not in table.columns else None
    wide = _wide_columns(table, config) if with_visits else {}
    visit = None if wide or not with_visits else config.visit or "session_id"
    required = [*([] if own_key else [config.key]), *([visit] if visit else [])]
    named = {name: column for name, column in config.columns.items() if name not in wide}
    if not config.columns:
        named = {column: column for column in table.columns if column not in required and column}
    faults += _column_faults(table, [*required, *named.values(), *config.rows])
    faults += [
        f"{path}: {name}: a study gives this name to {meaning}; rename the column with `columns`"
        for name, meaning in ((VISIT, "the visit"), (SUBJECT, "the subject"))
        if name in named and name != config.key
    ]
    if faults:
        raise DataError(faults)
    rows: list[tuple[int, Mapping[str, str]]] = []
    chosen = [(line, cells) for line, cells in table.rows if all(cells[c] in v for c, v in config.rows.items())]
    if not chosen:
        conditions = " and ".join(f"{column} in {', '.join(values)}" for column, values in config.rows.items())
        raise DataError(f"{path}: rows: no row has {conditions}")
    plan = [(name, column, missing.of_column(name)) for name, column in named.items()]
    missing_in = {name: missing.of_column(name) for name in wide}
    labels = dict.fromkeys(label for columns in wide.values() for label in columns)
    visit_names = {name.removeprefix("ses-"): other.removeprefix("ses-") for name, other in config.visit_names.items()}
    without_id: Counter[str] = Counter()
    for line, cells in chosen:
        subject = own_key[1] if own_key else cells[config.key]
        if not own_key and any(subject in missing.declared.get(name, ()) for name in (config.key, "*")):
            without_id[subject] += 1
            continue
        for text, replacement in config.replace.items():
            subject = subject.replace(text, replacement)
        subject = _with_zeros(subject, config.width)
        if subject.lower() in ("", "n/a", "sub-"):
            faults.append(f"{path}:{line}: {config.key}: expected a subject's id, got {subject!r}")
            continue
        base = {name: cell for name, column, is_gone in plan if not is_gone[cell := cells[column]]}
        base[config.key] = subject
        if visit is not None:
            own_visit = cells[visit].removeprefix("ses-")
            base[VISIT] = visit_names.get(own_visit, own_visit)
            if base[VISIT].lower() in ("", "n/a"):
                faults.append(f"{path}:{line}: {visit}: expected the name of a visit, got {cells[visit]!r}")
                continue
        if not wide:
            rows.append((line, base))
        for label in labels:
            own = {name: cells[columns[label]] for name, columns in wide.items() if label in columns}
            own = {name: cell for name, cell in own.items() if not missing_in[name][cell]}
            if own or len(base) > 1:  # columns without {visit} have their value at every visit
                rows.append((line, {**base, **own, VISIT: visit_names.get(label, label)}))
    if faults:
        raise DataError(faults)
    if without_id:
        values = ", ".join(f"{value} {number:,}" for value, number in without_id.items())
        notes.append(f"{config.file}: rows without a subject, whose {config.key} is a missing value ({values})")
    columns = dict.fromkeys([config.key, *([VISIT] if with_visits else []), *named, *wide])
    return Table(path, tuple(columns), tuple(rows), ())


def _wide_columns(table: Table, config: TableConfig) -> dict[str, dict[str, str]]:
    """Return {name in the study: {visit: column of the table}} for names with `{visit}`."""
    wide: dict[str, dict[str, str]] = {}
    for name, pattern in config.columns.items():
        if f"{{{VISIT}}}" not in pattern:
            continue
        before, _, after = pattern.partition(f"{{{VISIT}}}")
        regex = re.compile(f"{re.escape(before)}(.+){re.escape(after)}")
        wide[name] = {match[1]: column for column in table.columns if (match := regex.fullmatch(column))}
        if not wide[name]:
            hint = _expected(before + after, table.columns)
            raise DataError(f"{table.path}: {name}: no column is named {pattern}; {hint}")
    return wide


def _with_zeros(label: str, width: int | None) -> str:
    match = re.fullmatch(r"(sub-)?([0-9]+)(\.0)?", label)
    return label if width is None or match is None else (match[1] or "") + match[2].zfill(width)


def _column_faults(table: Table, columns: Iterable[str]) -> Iterator[str]:
    for column in dict.fromkeys(columns):
        count = table.columns.count(column)
        if count > 1:
            numbers = ", ".join(str(i) for i, name in enumerate(table.columns, start=1) if name == column)
            yield f"{table.path}: {column}: columns {numbers} have this name; rename all but one"
        elif not count:
            hint = ""
            if len(table.columns) == 1 and re.search(r"[,;]", table.columns[0]):
                hint = "; columns of .tsv are separated by tabs"
            yield f"{table.path}: {column}: no such column; {_expected(column, table.columns)}{hint}"


def unknown_column(name: str, columns: Sequence[str]) -> str:
    """Return the message for a column that no table has, with the nearest names."""
    return f"{name}: no such column; {_expected(name, columns)}"


def _expected(name: str, columns: Sequence[str]) -> str:
    lowered = {column.lower(): column for column in columns}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3)]
    if near:
        return f"the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"
    more = f" and {len(columns) - _NAMES_SHOWN:,} more" if len(columns) > _NAMES_SHOWN else ""
    return f"expected one of {', '.join(columns[:_NAMES_SHOWN]) or 'none'}{more}"


def number_fault(cell: str) -> str:
    """Return why a cell is not a number, and the remedy."""
    if re.fullmatch(r"[+-]?\d+,\d+", cell):
        return f"expected a number, got {cell!r}; write a decimal point, and no separator of thousands"
    if re.match(r"\d{4}-\d\d-\d\d", cell):
        return f"expected a number, got the date {cell}"
    return f"expected a number, got {cell!r}"


def _read_table(path: Path, config: TableConfig) -> Table:
    suffix = path.suffix.lower()
    if suffix in _SPREADSHEETS:
        rows: Iterable[tuple[int, list[str]]] = _read_spreadsheet(path, config.sheet)
        noun = "cells"
    elif suffix == ".parquet":
        names = {config.key, config.visit or "session_id", *config.columns.values(), *config.rows}
        if not config.columns or any(f"{{{VISIT}}}" in name for name in names):
            names = set()
        rows, noun = _read_parquet(path, names), "cells"
    elif suffix in _TEXT_FILES:
        text = _decode(path, config.encoding)
        delimiter = "\t" if suffix == ".tsv" else _delimiter(text)
        rows, noun = split_rows(path, text, delimiter), f"{DELIMITERS[delimiter]}-separated cells"
    else:
        raise DataError(f"{path}: no table that can be read; expected one of {_FORMATS}")
    if config.sheet is not None and suffix not in _SPREADSHEETS:
        raise DataError(f"{path}: sheet: only for a spreadsheet; leave it out")
    filled = [(line, row) for line, row in rows if any(row)]
    del filled[1 : 1 + config.skip_rows]
    if len(filled) < 2:
        raise DataError(f"{path}: has no row below its header; expected one row per subject or visit")
    return make_table(path, filled, noun)


def _decode(path: Path, encoding: str) -> str:
    """Return the text of a file. Raise DataError, with the likely encoding, if it is not in the declared one."""
    content = read_content(path, DataError, LISTING, "expected a table")
    declared = encoding.lower().replace("_", "-")
    try:
        text = content.decode("utf-8-sig" if declared in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise DataError(f"{path}: encoding: Python knows none named {encoding}; {_suggestion(content)}") from None
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        byte = content[fault.start : fault.start + 1].hex()
        raise DataError(f"{path}:{line}: byte 0x{byte} is not {encoding}; {_suggestion(content)}") from None
    is_utf16 = b"\0" in content[:1000]
    if is_utf16 != declared.startswith(("utf-16", "utf16", "utf-32", "utf32")):
        raise DataError(f"{path}: the text is not {encoding}; {_suggestion(content)}")
    if declared.startswith(_SINGLE_BYTE) and not content.isascii() and _decodes(content, "utf-8"):
        raise DataError(f"{path}: the text is not {encoding}; {_suggestion(content)}")
    return text.removeprefix("\ufeff")


def _suggestion(content: bytes) -> str:
    if b"\0" in content[:1000]:
        return "set encoding: utf-16"
    name = next(name for name in ("utf-8", "cp1252", "latin-1") if _decodes(content, name))
    return f"set encoding: {name}" + (" if it comes from Windows" if name == "cp1252" else "")


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _delimiter(text: str) -> str:
    """Return the delimiter that gives the header the most cells; a comma if there is only one."""
    header = next((line for line in text.splitlines() if line.strip()), "")

    def cells(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter), ()))

    return max(",;\t", key=cells)


def _read_spreadsheet(path: Path, sheet: str | None) -> Iterator[tuple[int, list[str]]]:
    """Yield (row, cells) of a sheet. Formulas have the value that was saved; one with an error is empty."""
    content = read_content(path, DataError, LISTING, "expected a spreadsheet")
    command = [sys.executable, "-P", sheet_process.__file__, *([] if sheet is None else [sheet])]
    child = subprocess.run(command, input=content, capture_output=True, check=False)
    if child.returncode:
        reason = "damaged, or has a cell far from all others"
        raise DataError(f"{path}: not a spreadsheet that can be read: {reason}; save the table as .csv")
    answer = json.loads(child.stdout)
    if isinstance(answer, str):
        raise DataError(f"{path}{answer}")
    yield from answer


def _read_parquet(path: Path, names: Collection[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (row, cells) of the named columns, all if there are no names; the header is row 0."""
    try:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        remedy = 'pip install "umbrella-jax[parquet]"'
        raise DataError(f"{path}: a parquet table needs pyarrow, which is not installed: {remedy}") from None
    content = read_content(path, DataError, LISTING, "expected a parquet table")
    try:
        file = pq.ParquetFile(BytesIO(content))
        header = [name for name in file.schema_arrow.names if not names or name in names]
        table = file.read(columns=header)
        columns = []
        for name in header:
            column = table.column(name)
            if pa.types.is_nested(column.type):
                raise DataError(f"{path}: {name}: has a list in each cell; expected a number or a text")
            values = column.to_pylist()
            if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
                short = np.dtype(column.type.to_pandas_dtype()).type  # 0.1 is 0.10000000149011612 with more digits
                values = [None if value is None else float(str(short(value))) for value in values]
            columns.append([sheet_process.cell_text(value) for value in values])
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a parquet table that can be read: {str(error).splitlines()[0]}") from None
    yield 0, header
    yield from enumerate(map(list, zip(*columns, strict=True)), start=1)
