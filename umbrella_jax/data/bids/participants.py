"""Read the tables of a BIDS data set: one row per subject, values per session, descriptions of values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from umbrella_jax.data.tables import check_columns, read_table, subject_rows, with_prefix
from umbrella_jax.errors import DataError
from umbrella_jax.io.reading import read_json

PARTICIPANTS = "participants.tsv"


@dataclass(frozen=True)
class Participants:
    """Rows of participants.tsv, and the target's values per session if other tables have them."""

    path: Path
    rows: Mapping[str, Mapping[str, str]]
    """{sub-LABEL: {column: cell}}, sorted."""
    sessions: Mapping[tuple[str, str], str]
    """{(sub-LABEL, ses-LABEL): value}; empty if no table has the target per session."""
    session_files: tuple[str, ...]
    """Tables that `sessions` come from, below the data set; one pattern for all sub-*_sessions.tsv."""

    @property
    def session_tables(self) -> str:
        """The tables that `sessions` come from, for messages."""
        return ", ".join(name.removeprefix("sub-*/") for name in self.session_files)

    @classmethod
    def read(cls, root: Path, target: str) -> "Participants":
        """Read all tables of a data set. Raise DataError with every fault."""
        table = read_table(root / PARTICIPANTS)
        values = _read_session_values(root, target)
        required = ["participant_id", *([] if values and target not in table.columns else [target])]
        try:
            check_columns(table, required)
        except DataError as error:
            hints = [
                f"; {file.relative_to(root)} has it: copy it to {PARTICIPANTS}. If conversations exist already, give "
                "--split-from, since the split depends on the columns"
                for file in sorted(root.glob("phenotype/*.tsv"))
                if target not in table.columns and target in _read_header(file)
            ]
            raise DataError([f + (hints[0] if hints and f": {target}: " in f else "") for f in error.faults]) from None
        first: dict[tuple[str, str], _SessionValue] = {}
        faults = []
        for value in values:
            earlier = first.setdefault((value.subject, value.session), value)
            if earlier.value != value.value:
                faults.append(
                    f"{root / value.file}: {target}: {value.value} for {value.subject} {value.session}, "
                    f"but {earlier.value} in {earlier.file}"
                )
        if faults:
            raise DataError(faults)
        names = dict.fromkeys("sub-*/sub-*_sessions.tsv" if v.file.startswith("sub-") else v.file for v in values)
        sessions = {key: value.value for key, value in first.items()}
        return cls(table.path, subject_rows(table), sessions, tuple(names))

    def value(self, subject: str, session: str | None, target: str) -> str | None:
        """Return the target of a subject (`sub-LABEL`) in a session (LABEL); None if the tables have none.

        If any table has values per session, a scan with a session has no other value than its session's.
        """
        if self.sessions and session is not None:
            return self.sessions.get((subject, f"ses-{session}"))
        return self.rows[subject].get(target)


class _SessionValue(NamedTuple):
    file: str
    subject: str
    session: str
    value: str


def _read_session_values(root: Path, target: str) -> list[_SessionValue]:
    """Read every table that has the target per session: sub-*_sessions.tsv, and those in phenotype/ with session_id."""
    faults: list[str] = []
    values: list[_SessionValue] = []
    for file in (*sorted(root.glob("sub-*/sub-*_sessions.tsv")), *sorted(root.glob("phenotype/*.tsv"))):
        one_subject = file.parent.name != "phenotype"
        required = ["session_id", *([] if one_subject else ["participant_id"])]
        try:
            header = _read_header(file)
            if target not in header or (not one_subject and "session_id" not in header):
                continue
            table = read_table(file)
            check_columns(table, [*required, target])
            faults += table.faults
        except DataError as error:
            faults.extend(error.faults)
            continue
        for _, cells in table.rows:
            subject = file.parent.name if one_subject else with_prefix("sub", cells["participant_id"])
            session = with_prefix("ses", cells["session_id"])
            values.append(_SessionValue(file.relative_to(root).as_posix(), subject, session, cells[target]))
    if faults:
        raise DataError(faults)
    return values


def _read_header(file: Path) -> list[str]:
    """Return the columns of a table without reading its rows."""
    try:
        with file.open("rb") as lines:
            return [cell.strip(' "') for cell in lines.readline(1 << 20).decode("utf-8-sig").strip().split("\t")]
    except UnicodeDecodeError:
        return list(read_table(file).columns)  # raises an error that names the encoding
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def read_levels(root: Path, target: str) -> dict[str, str]:
    """Return {value: text} from the column's `Levels` in participants.json and sessions.json.

    A level is a description, or an object with a `Description`.

    Raises:
        DataError: `Levels` is not an object, or a level has no description.
    """
    texts: dict[str, str] = {}
    for file in (root / "participants.json", root / "sessions.json"):
        if not file.exists() and not file.is_symlink():  # a broken link is a file that datalad has yet to download
            continue
        columns = read_json(file, DataError, "expected an object of columns")
        column = columns.get(target, {}) if isinstance(columns, dict) else None
        levels = column.get("Levels", {}) if isinstance(column, dict) else None
        if not isinstance(levels, dict):
            raise DataError(f"{file}: {target}: expected an object, and an object under its Levels")
        entries = {
            value: level.get("Description") if isinstance(level, dict) else level for value, level in levels.items()
        }
        described = {value: text.strip() for value, text in entries.items() if isinstance(text, str) and text.strip()}
        if faulty := entries.keys() - described.keys():
            raise DataError([f"{file}: {target}.Levels.{value}: expected a description" for value in sorted(faulty)])
        texts |= described
    return texts
