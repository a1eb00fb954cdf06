"""Join a lab's tables: one row per subject, and one per subject and visit."""

import glob
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from umbrella_jax.console import plural
from umbrella_jax.data.tables import Table, has_lost_zeros, match_misspelled
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.study.schema import CohortConfig, TableConfig
from umbrella_jax.study.tables import VISIT, MissingValues, read_lab_table

_FEW = 3
"""Ids of each side that a message shows."""

RowKey = tuple[str, str | None]
"""A subject's label without `sub-`, and a visit; None in tables with one row per subject."""


class LabRow(NamedTuple):
    """A row of a table, without missing cells, the subject and the visit."""

    file: Path
    line: int
    subject: str
    """As in the table, with its zeros."""
    cells: Mapping[str, str]

    @property
    def place(self) -> str:
        """The row in messages."""
        return f"{self.file}:{self.line}"


@dataclass
class LabTable:
    """Rows of one table, or of several with the same columns that one pattern names."""

    name: str
    """File or pattern, as the study names it."""
    path: str
    """The same from the working directory, for faults."""
    key: str
    columns: tuple[str, ...]
    """Without the key and the visit."""
    rows: dict[RowKey, LabRow] = field(default_factory=dict)

    @cached_property
    def labels(self) -> dict[str, None]:
        """Subjects without `sub-`, in order."""
        return dict.fromkeys(subject for subject, _ in self.rows)


class JoinedTables:
    """All tables of a cohort. Its subjects are those of the first table; other tables add columns.

    Args:
        subjects: tables with one row per subject.
        sessions: tables with one row per subject and visit.
        files: every file that was read.
    """

    def __init__(self, subjects: Sequence[LabTable], sessions: Sequence[LabTable], files: Sequence[Path]):
        self.subjects, self.sessions, self.files = tuple(subjects), tuple(sessions), tuple(files)
        self.first = self.subjects[0]
        self.per_visit = frozenset(name for table in self.sessions for name in table.columns)
        """Columns of `sessions`, which hide the subject's."""
        for table in (table for table in self.subjects if self.per_visit.intersection(table.columns)):
            for key, row in table.rows.items():
                own = {name: cell for name, cell in row.cells.items() if name not in self.per_visit}
                table.rows[key] = row._replace(cells=own)
        names = [name for table in (*self.subjects, *self.sessions) for name in table.columns]
        self.columns = tuple(dict.fromkeys([self.first.key, *names]))
        """All columns; the first table's key comes first."""

    def values(self, subject: str, visit: str | None) -> dict[str, str]:
        """Return {column: cell} without missing ones of a subject in the first table, at a visit.

        A column of `sessions` has the visit's value or none.
        """
        values: dict[str, str] = {}
        for row in reversed(self._rows(subject, visit)):
            values.update(row.cells)
        values[self.first.key] = self.first.rows[subject, None].subject
        return values

    def place(self, column: str, subject: str, visit: str | None) -> str:
        """Return `FILE:LINE` of a value, for messages."""
        rows = self._rows(subject, visit)
        return next((row.place for row in rows if column in row.cells), self.first.path)

    def table_of(self, column: str) -> str:
        """Return the file with a column, for messages."""
        return next((t.path for t in (*self.sessions, *self.subjects) if column in t.columns), self.first.path)

    def has_visit(self, subject: str, visit: str | None) -> bool:
        """Return whether a table of `sessions` has a row for a visit."""
        return any((subject, visit) in table.rows for table in self.sessions)

    def _rows(self, subject: str, visit: str | None) -> list[LabRow]:
        rows = [table.rows.get((subject, visit)) for table in self.sessions]
        rows += [table.rows.get((subject, None)) for table in self.subjects]
        return [row for row in rows if row is not None]

    def conflicts(self, columns: Collection[str]) -> Iterator[str]:
        """Yield a fault for every value, of the given columns, that two tables contradict."""
        for tables in (self.sessions, self.subjects):
            owners: dict[str, list[LabTable]] = defaultdict(list)
            for table in tables:
                for name in table.columns:
                    owners[name].append(table)
            for name in (name for name in columns if len(owners.get(name, ())) > 1):
                known: dict[RowKey, LabRow] = {}
                for key, row in (
                    item for table in owners[name] for item in table.rows.items() if name in item[1].cells
                ):
                    first = known.setdefault(key, row)
                    if first.cells[name] != row.cells[name]:
                        yield (
                            f"{row.place}: {name}: {row.cells[name]} for {row.subject}, but {first.cells[name]} in "
                            f"{first.place}; take one of the two columns with `columns`, or give it another name"
                        )


def join_tables(config: CohortConfig, root: Path, missing: MissingValues, notes: list[str]) -> JoinedTables:
    """Read all tables of a cohort; `notes` receives what is left out. Raise DataError with every fault."""
    reader = _TableReader(root, missing, notes)
    subjects = reader.read(config.subjects, with_visits=False)
    sessions = reader.read(config.sessions, with_visits=True)
    faults = reader.faults
    faults.raise_as(DataError)
    first = subjects[0]
    for table in (*subjects[1:], *sessions):
        faults += id_faults(table, f"in {first.name}", first.labels)
    faults.raise_as(DataError)
    return JoinedTables(subjects, sessions, reader.files)


class _TableReader:
    """Reads tables one after the other, and collects what is wrong with all."""

    def __init__(self, root: Path, missing: MissingValues, notes: list[str]):
        self.files, self.faults = list[Path](), Faults()
        self._root, self._missing, self._notes = root, missing, notes

    def read(self, configs: Iterable[TableConfig], *, with_visits: bool) -> list[LabTable]:
        """Return the tables of the entries, one per set of columns of each."""
        return [table for config in configs for table in self._read_entry(config, with_visits)]

    def _read_entry(self, config: TableConfig, with_visits: bool) -> Iterable[LabTable]:
        pattern = self._root / config.file
        paths = [pattern]
        if "*" in config.file:
            paths = [Path(path) for path in sorted(glob.glob(os.path.join(glob.escape(str(self._root)), config.file)))]
            if not paths:
                self.faults.append(f"{pattern}: no file matches; expected tables")
        tables: dict[frozenset[str], LabTable] = {}
        for path in paths:
            self.files.append(path)
            with self.faults:
                table = read_lab_table(path, config, self._missing, self._notes, with_visits=with_visits)
                columns = tuple(name for name in table.columns if name not in (config.key, VISIT))
                empty = LabTable(config.file, str(pattern), config.key, columns)
                self._add_rows(tables.setdefault(frozenset(columns), empty), table, with_visits)
        return tables.values()

    def _add_rows(self, table: LabTable, own: Table, with_visits: bool) -> None:
        """Add the rows of one file, each a subject, or a visit of one, that has none yet."""
        for line, cells in own.rows:
            subject, visit = cells[table.key], cells.get(VISIT) if with_visits else None
            others = {name: cell for name, cell in cells.items() if name not in (table.key, VISIT)}
            row = LabRow(own.path, line, subject, others)
            first = table.rows.setdefault((subject.removeprefix("sub-"), visit), row)
            if first is not row:
                other = f"line {first.line}" if first.file == own.path else first.place
                what = f"{subject} has a row already, in {other}"
                remedy = "expected one row per subject; list a table with visits in sessions"
                if with_visits:
                    what = f"{subject} has a row for visit {visit} already, in {other}"
                    remedy = "expected one row per subject and visit"
                self.faults.append(f"{row.place}: {table.key}: {what}; {remedy}")


def id_faults(table: LabTable, where: str, others: Collection[str]) -> list[str]:
    """Return faults for ids of a table that others spell differently, or that match none of them.

    Args:
        table: the table.
        where: place of the others, such as `on disk`.
        others: their labels, without `sub-`.
    """
    place = f"{table.path}: {table.key}"
    pairs = match_misspelled((f"sub-{label}" for label in table.labels), (f"sub-{label}" for label in others))
    if pairs:
        widths = {len(other) for other in pairs.values()}
        remedy = "they differ only in spelling; write them the same, or use `replace`"
        if all(has_lost_zeros(name, other) for name, other in pairs.items()) and len(widths) == 1:
            remedy = f"the table has lost leading zeros; set width: {widths.pop() - len('sub-')}"
        elif all(has_lost_zeros(other, name) for name, other in pairs.items()):
            remedy = f"the ids {where} have lost leading zeros; write them the same"
        return [f"{place}: {describe_pairs(pairs, where)}; {remedy}"]
    if table.labels and others and not table.labels.keys() & set(others):
        return [f"{place}: no id of the table is {where}: {few(table.labels)} in the table, {few(others)} {where}"]
    return []


def describe_pairs(pairs: Mapping[str, str], where: str) -> str:
    """Return the first pair of {sub-LABEL or ses-LABEL of a table: that of the others}, and how many more there are."""
    (name, other), *more = ((a[len("sub-") :], b[len("sub-") :]) for a, b in pairs.items())
    return f"{name} in the table, {other} {where}" + (f" and {plural(len(more), 'other')}" if more else "")


def few(labels: Iterable[str], number: int = _FEW) -> str:
    """Return the first labels, sorted, for messages."""
    names = sorted(labels)
    return ", ".join(names[:number]) + (", …" if len(names) > number else "")
