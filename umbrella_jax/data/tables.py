"""Read tab-separated tables, and tell ids, numbers and missing values in the spellings that people really use."""

import csv
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType

from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.errors import DataError
from umbrella_jax.io.reading import LISTING, read_text

_MISSING = {
    *("", "n/a", "na", "<na>", "n.a.", "nan", "null", "-", "--", "---", "–", "—", "?", "??", "???", ".", "..", "..."),
    *("#n/a", "#na", "#value!", "#ref!", "#div/0!", "#null!", "#name?", "#num!"),
}
"""Cells that mean a missing value: BIDS' n/a, and what R, Python, SPSS, databases and spreadsheets write."""
_DOUBTFUL = {
    *("none", "nil", "missing", "unknown", "unk", "undefined", "not available", "not known", "not applicable"),
    *("nd", "n.d.", "nk", "tbd", "refused", "declined", "prefer not to say", "prefer not to answer"),
    *("not reported", "unknown or not reported", "not specified", "unspecified", "no data", "missing data"),
}
"""Cells that may mean a missing value, or may be a label."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon"}
"""{character between two cells: its name}."""


@dataclass(frozen=True)
class Table:
    """Rows of a table, with white space around cells removed."""

    path: Path
    columns: tuple[str, ...]
    """Names in the header; a name may occur twice."""
    rows: tuple[tuple[int, Mapping[str, str]], ...]
    """(line or row of the file, {column: cell})."""
    faults: tuple[str, ...]
    """Messages about rows with more or fewer cells than the header, which `rows` leaves out."""


def read_table(path: Path) -> Table:
    """Read a tab-separated table in UTF-8, with or without a byte order mark, quoted cells and CRLF.

    Empty rows, and empty cells beyond the header, are dropped.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or has an unclosed quote.
    """
    text = read_text(path, DataError, LISTING, "expected a table of tab-separated rows")
    if "\0" in text:  # ASCII text in UTF-16 without a mark is valid UTF-8, with a NUL beside each letter
        raise DataError(f"{path}: cannot be read: contains NUL bytes, as UTF-16 does; save it as UTF-8")
    return make_table(path, split_rows(path, text, "\t"), "tab-separated cells")


def split_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (last line, cells) of each row of a text. Raise DataError for an unclosed quote, naming `path`."""
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    name = DELIMITERS[delimiter]
    try:
        for row in reader:
            yield reader.line_num, [cell.strip() for cell in row]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a {name}-separated row: {error}") from None


def make_table(path: Path, rows: Iterable[tuple[int, list[str]]], noun: str) -> Table:
    """Return the table of (line, cells), whose first row with any text is the header; `noun` is for messages."""
    rows = [(line, row) for line, row in rows if any(row)]
    header = rows[0][1] if rows else []
    while header and not header[-1]:
        header.pop()
    uneven = [(line, row) for line, row in rows[1:] if len(row) < len(header) or any(row[len(header) :])]
    faults = [f"{path}:{line}: expected {len(header)} {noun}, got {len(row)}" for line, row in uneven]
    skipped = {line for line, _ in uneven}
    cells = [(line, dict(zip(header, row, strict=False))) for line, row in rows[1:] if line not in skipped]
    return Table(path, tuple(header), tuple(cells), tuple(faults))


def check_columns(table: Table, names: Iterable[str]) -> None:
    """Raise DataError unless the table has each named column exactly once."""
    columns = ", ".join(table.columns) or "none"
    if len(table.columns) == 1 and re.search(r"[,;]", columns):
        columns += "; columns must be separated by tabs"
    faults = [
        f"{table.path}: {name}: expected one such column, got {columns}"
        for name in dict.fromkeys(names)
        if table.columns.count(name) != 1
    ]
    if faults:
        raise DataError(faults)


def subject_rows(table: Table) -> dict[str, Mapping[str, str]]:
    """Return {sub-LABEL: cells}, sorted.

    Raises:
        DataError: for every faulty row, row without a subject, and second row of a subject.
    """
    cells_of: dict[str, Mapping[str, str]] = {}
    faults = list(table.faults)
    for line, cells in table.rows:
        name = with_prefix("sub", cells["participant_id"])
        if name == "sub-":
            faults.append(f"{table.path}:{line}: participant_id: expected sub-LABEL, got {cells['participant_id']!r}")
        elif re.search(r"[\t\r\n]", name):
            faults.append(
                f"{table.path}:{line}: participant_id: contains a tab or line break, so a quote has swallowed cells; "
                "remove the quotes around it"
            )
        elif name in cells_of:
            faults.append(
                f"{table.path}:{line}: participant_id: {name} has a row already; expected one row per subject "
                "(values per visit go to sub-LABEL/sub-LABEL_sessions.tsv)"
            )
        cells_of[name] = cells
    if not faults and not cells_of:
        faults.append(f"{table.path}: has no subject; expected one row per subject below the header")
    if faults:
        raise DataError(faults)
    return dict(sorted(cells_of.items()))


def with_prefix(entity: str, label: str) -> str:
    """Return `sub-01` for `sub-01` and for `01`."""
    return f"{entity}-{label.removeprefix(f'{entity}-')}"


def match_misspelled(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Return {name: other} for ids that differ only in leading zeros, a decimal `.0`, case or punctuation.

    Ids that occur on both sides, and ids with several counterparts, are left out.
    """
    names, others = set(names), set(others)
    by_key: dict[str, list[str]] = {}
    for other in others - names:
        by_key.setdefault(_id_key(other), []).append(other)
    pairs = {name: by_key.get(_id_key(name), []) for name in sorted(names - others)}
    return {name: counterparts[0] for name, counterparts in pairs.items() if len(counterparts) == 1}


def _id_key(name: str) -> str:
    entity, _, label = name.partition("-")
    label = re.sub(r"\.0$", "", unicodedata.normalize("NFKC", label).casefold())
    label = re.sub(r"(?<![0-9])0+(?=[0-9])|[\W_]", "", label)
    return f"{entity}-{label.removeprefix(entity).lstrip('0')}"


def has_lost_zeros(name: str, other: str) -> bool:
    """Return whether `name` is `other` without its leading zeros (and perhaps with a decimal `.0`)."""
    stripped = re.sub(r"-0+(?=.)", "-", other)
    return name != other and re.sub(r"\.0$", "", name) == stripped


def parse_cell_number(cell: str) -> float | None:
    """Return the number in a cell, None for anything else, including Python's 1_000, inf, nan and 1e999."""
    number = float(cell) if _NUMBER.fullmatch(cell) else math.inf
    return number if math.isfinite(number) else None


def is_missing(cell: str, declared: Sequence[str] = (), labels: Collection[str] = ()) -> bool:
    """Return whether a cell means a missing value.

    Args:
        cell: as in the table.
        declared: values that the user declares missing; numbers are compared as numbers.
        labels: values with a description, such as `Levels` in participants.json; they are not missing.
    """
    if _is_declared(cell, declared) or cell.lower() in ("", "n/a"):
        return True
    return cell.lower() in _MISSING and cell not in labels


def _is_declared(cell: str, declared: Iterable[str]) -> bool:
    number = parse_cell_number(cell)
    return any(cell == value or (number is not None and number == parse_cell_number(value)) for value in declared)


def doubtful_values(cells: Collection[str], labels: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Return the distinct values that may mean a missing one.

    Three kinds of values are doubtful: words such as `unknown`; values whose description is such a word; and numbers
    that are a common code (-9, 77, 999, ...) and far from the other numbers. Far means negative if no other number is,
    or outside their range by more than half of it. -1 counts as a code only among more than MAX_CLASSES distinct
    numbers. If all other values are words, every code and every negative number is doubtful.

    Args:
        cells: values as in the table.
        labels: {value: description}, such as `Levels` in participants.json.
    """
    described = {cell for cell in cells if cell in labels and not _describes_missing(labels[cell])}
    distinct = sorted(set(cells) - described)
    words = [cell for cell in distinct if cell in labels or cell.lower() in _DOUBTFUL]
    numbers = {cell: number for cell in cells if (number := parse_cell_number(cell)) is not None}
    quantity = len(numbers) > MAX_CLASSES
    codes = {cell: n for cell, n in numbers.items() if cell not in described and _is_code(n, quantity)}
    others = [number for cell, number in numbers.items() if cell not in codes]
    if all(number < 0 for number in others) and set(cells) - set(words) - numbers.keys():
        return [*words, *(cell for cell, n in numbers.items() if cell in distinct and (cell in codes or n < 0))]
    if not others:
        return words
    low, high = min(others), max(others)
    margin = (high - low) / 2
    far = [
        cell
        for cell, number in codes.items()
        if (number < 0 <= low) or number < low - margin or (number > high + margin and number > 9)
    ]
    return list(dict.fromkeys(words + far))


def _describes_missing(description: str) -> bool:
    """Return whether a description means a missing value; `none` may mean that nothing was found."""
    return description.lower() in (_MISSING | _DOUBTFUL) - {"none", "nil"}


def _is_code(number: float, quantity: bool) -> bool:
    if not number.is_integer() or abs(number) >= 1e9:
        return False
    digits = str(abs(int(number)))
    return (len(set(digits)) == 1 and digits[0] in "789" and (len(digits) > 1 or number < 0)) or (
        quantity and number == -1
    )
