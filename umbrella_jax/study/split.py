"""Split a study's subjects by shares, into folds, by leaving out one value of a column at a time, or as a file says.

A split depends on the included subjects, the columns it names and the seed, never on the tasks or the order of rows.
Adding a subject may change it; `file` keeps an earlier one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from umbrella_jax.console import plural
from umbrella_jax.data.labels import alike_labels
from umbrella_jax.data.subject_split import column_levels, split_subjects
from umbrella_jax.data.tables import check_columns, parse_cell_number, with_prefix
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.study.divide import Levels, cut_folds, divide_groups, divide_strata
from umbrella_jax.study.schema import TEST, SplitConfig, TableConfig
from umbrella_jax.study.tables import MissingValues, read_lab_table
from umbrella_jax.study.visits import Visit

_MAX_FOLDS = 100
_FEW = 10
"""Subjects of a left-out value below which a note says that its scores are uncertain."""
_NAMED = 5
"""Number of subjects that a note names."""


@dataclass(frozen=True)
class Partition:
    """One split of all subjects; with folds there are several."""

    name: str | None
    """`fold-1`, `fold-2`, …; None without folds."""
    left_out: str | None
    """The value of `leave_out` whose subjects are the test set."""
    split_of: dict[str, str]
    """{subject: split}, subjects sorted."""


def split_cohort(
    split: SplitConfig, visits: Sequence[Visit], root: Path, faults: Faults, notes: list[str]
) -> list[Partition]:
    """Assign every subject of `visits` to a split, or to a split per fold.

    Without groups, every split has less than one subject more or less than its share, of all subjects and of each
    stratum. Groups (`by`) stay together; then sizes are as near as whole groups allow, largest groups first.

    Args:
        split: the study's section.
        visits: the included visits; those of one subject in their order.
        root: where the path `file` starts.
        faults: collects what is wrong.
        notes: collects what the user should know: columns that vary, small strata, sizes that groups do not allow.

    Returns:
        One partition without a name, or one per fold: each subject is in the test set of exactly one, and the others
        are in train, or divided as `sizes` says. Empty if there are faults.
    """
    with faults:
        return _Splitter(split, visits, root, notes).partitions()
    return []


class _Splitter:
    """A split under way: the subjects with the values that it needs."""

    def __init__(self, split: SplitConfig, visits: Sequence[Visit], root: Path, notes: list[str]):
        self._split, self._root, self._notes = split, root, notes
        self._inexact: list[str] = []  # sizes of splits that whole groups do not allow, for one note
        self._visits: dict[str, list[Visit]] = {subject: [] for subject in sorted({v.subject for v in visits})}
        for visit in visits:
            self._visits[visit.subject].append(visit)
        if not self._visits:
            raise DataError("split: no subject is included")
        self._shares = split.shares()
        faults = Faults()
        self._group_of = faults.check(self._read_groups) or {}
        self._levels: Levels = faults.check(self._read_levels) or {}
        faults.raise_as(DataError)

    def partitions(self) -> list[Partition]:
        """Return the partitions. Raise DataError with every fault."""
        partitions = self._partitions()
        if self._inexact:
            more = len(self._inexact) - _NAMED
            self._notes.append(
                f"split.by: whole groups of {self._split.by} do not allow the exact sizes: "
                + "; ".join(self._inexact[:_NAMED])
                + (f"; and {more} more" if more > 0 else "")
            )
        return partitions

    def _partitions(self) -> list[Partition]:
        split, subjects = self._split, list(self._visits)
        if split.file is not None:
            return self._from_file(self._root / split.file)
        if split.leave_out is not None:
            value_of = self._single_values("leave_out", split.leave_out, required=True)
            self._check_left_out(value_of)
            values = sorted(set(value_of.values()), key=lambda text: (parse_cell_number(text) or 0, text))
            return self._folds({value: [s for s in subjects if value_of[s] == value] for value in values}, named=True)
        if split.folds is not None:
            return self._folds(self._equal_folds(split.folds), named=False)
        split_of = self._divide(subjects, self._shares, split.seed)
        self._check_filled(split_of, "")
        if split.stratify:
            self._note_small_strata(len(self._shares))
        return [Partition(None, None, split_of)]

    def _folds(self, tests: Mapping[str, Sequence[str]], *, named: bool) -> list[Partition]:
        """Return a partition per test set, whose other subjects are divided as `sizes` says."""
        partitions = []
        for number, (value, tested) in enumerate(tests.items(), 1):
            rest = sorted(self._visits.keys() - set(tested))
            split_of = self._divide(rest, self._shares, self._split.seed + number, f"fold-{number}: ")
            self._check_filled(split_of, f"fold-{number}: ")
            split_of |= dict.fromkeys(tested, TEST)
            partitions.append(Partition(f"fold-{number}", value if named else None, dict(sorted(split_of.items()))))
        return partitions

    def _equal_folds(self, number: int) -> dict[str, list[str]]:
        units = self._units(list(self._visits))
        if len(units) < number:
            what = (
                plural(len(units), "group") + f" ({self._split.by})"
                if self._group_of
                else plural(len(units), "subject")
            )
            raise DataError(f"split.folds: {number} folds of {what}; expected fewer folds")
        names = [f"fold-{i}" for i in range(1, number + 1)]
        if self._group_of or self._split.balance:
            fold_of = self._divide(list(self._visits), dict.fromkeys(names, Fraction(1, number)), self._split.seed)
        else:
            fold_of = cut_folds(self._strata(list(self._visits)), names, self._split.seed)
        if self._split.stratify:
            self._note_small_strata(number)
        return {name: [subject for subject in self._visits if fold_of[subject] == name] for name in names}

    def _divide(
        self, subjects: Sequence[str], shares: Mapping[str, Fraction], seed: int, place: str = ""
    ) -> dict[str, str]:
        """Return {subject: split}, subjects sorted; `place` begins notes."""
        levels = {subject: self._levels.get(subject, ()) for subject in subjects}
        if len(shares) == 1:
            split_of = dict.fromkeys(subjects, next(iter(shares)))
        elif self._group_of:
            split_of = divide_groups(self._units(subjects), levels, shares, seed)
            self._note_sizes(split_of, shares, place)
        elif self._split.balance:
            split_of = split_subjects(levels, shares, seed)
        else:
            split_of = divide_strata(self._strata(subjects), shares, seed)
        return dict(sorted(split_of.items()))

    def _units(self, subjects: Sequence[str]) -> list[list[str]]:
        """Return the subjects in lists that stay together."""
        units: dict[str | tuple[str, str], list[str]] = {}
        for subject in subjects:
            key = (self._split.by, self._group_of[subject]) if subject in self._group_of else subject
            units.setdefault(key, []).append(subject)
        return sorted(units.values())

    def _strata(self, subjects: Sequence[str]) -> list[list[str]]:
        """Return the subjects in lists with the same levels."""
        strata: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for subject in subjects:
            strata.setdefault(tuple(self._levels.get(subject, ())), []).append(subject)
        return [strata[key] for key in sorted(strata)]

    def _read_groups(self) -> dict[str, str]:
        """Return {subject: group} of those that have one. Raise DataError for a subject with two."""
        if self._split.by == "subject":
            return {}
        group_of = self._single_values("by", self._split.by, required=False)
        if alone := [subject for subject in self._visits if subject not in group_of]:
            self._notes.append(f"split.by: {self._split.by} is missing, so each is a group of its own: {_names(alone)}")
        return group_of

    def _read_levels(self) -> dict[str, list[tuple[str, str]]]:
        """Return what every split gets its share of. Raise DataError for a column without values."""
        setting = "stratify" if self._split.stratify else "balance"
        levels: dict[str, list[tuple[str, str]]] = {subject: [] for subject in self._visits}
        faults = Faults()
        for column in dict.fromkeys(self._split.stratify or self._split.balance):
            with faults:
                values = self._values(setting, column)
                if varied := [subject for subject, own in values.items() if len(own) > 1]:
                    self._notes.append(
                        f"split.{setting}: {column} varies between visits; the first is used for {_names(varied)}"
                    )
                cells = {subject: own[0] if own else "" for subject, own in values.items()}
                for subject, level in column_levels(cells).items():
                    levels[subject].append((column, level))
        faults.raise_as(DataError)
        if self._split.stratify:  # a stratum is a combination of levels
            return {subject: [("combination", repr(own))] for subject, own in levels.items()}
        return levels

    def _values(self, setting: str, column: str) -> dict[str, list[str]]:
        """Return the distinct values of each subject, first visit first. Raise DataError if nobody has one."""
        values = {
            subject: list(dict.fromkeys(visit.values[column] for visit in visits if column in visit.values))
            for subject, visits in self._visits.items()
        }
        if not any(values.values()):
            columns = sorted({name for visits in self._visits.values() for visit in visits for name in visit.values})
            raise DataError(
                f"split.{setting}: {column}: no included subject has a value; expected one of {', '.join(columns)}"
            )
        return values

    def _single_values(self, setting: str, column: str, *, required: bool) -> dict[str, str]:
        """Return {subject: its value}. Raise DataError for subjects with several, or without one if `required`."""
        faults, value_of = Faults(), {}
        for subject, own in self._values(setting, column).items():
            if len(own) > 1:
                faults.append(
                    f"{subject}: split.{setting}: {column}: {' and '.join(own)} at different visits; expected one"
                )
            elif own:
                value_of[subject] = own[0]
            elif required:
                faults.append(
                    f"{subject}: split.{setting}: {column} is missing; add it, or leave the subject out with include"
                )
        for alike in alike_labels(dict.fromkeys(value_of.values()))[0]:
            names = ", ".join(map(repr, alike))
            faults.append(f"split.{setting}: {column}: one value or several? {names}; spell them the same in the table")
        faults.raise_as(DataError)
        return value_of

    def _check_left_out(self, value_of: Mapping[str, str]) -> None:
        column, counts = self._split.leave_out, Counter(value_of.values())
        if not 1 < len(counts) <= _MAX_FOLDS:
            raise DataError(
                f"split.leave_out: {column}: {plural(len(counts), 'value')}; expected 2 to {_MAX_FOLDS}, one per fold"
            )
        if faults := list(self._torn_groups(value_of, f"{column} ")):
            remedy = "leave out such groups with include, or drop split.by"
            raise DataError([f"split.leave_out: {fault}; {remedy}" for fault in faults])
        if small := [f"{value} ({number})" for value, number in sorted(counts.items()) if number < _FEW]:
            self._notes.append(
                f"split.leave_out: fewer than {_FEW} subjects, so scores will be uncertain: {column} {', '.join(small)}"
            )

    def _torn_groups(self, split_of: Mapping[str, str], prefix: str) -> Iterator[str]:
        """Yield a fault for each group whose subjects are in two splits."""
        members: dict[str, dict[str, str]] = {}
        for subject in self._visits:
            if subject in self._group_of and subject in split_of:
                members.setdefault(self._group_of[subject], {}).setdefault(split_of[subject], subject)
        for group, example in sorted(members.items()):
            if len(example) > 1:
                places = " and ".join(f"{prefix}{name} ({subject})" for name, subject in example.items())
                yield f"{self._split.by} {group}: in {places}; expected all of a group in one"

    def _check_filled(self, split_of: Mapping[str, str], place: str) -> None:
        if empty := [name for name in self._shares if name not in split_of.values()]:
            shares = ", ".join(f"{name} {float(self._shares[name]):g}" for name in empty)
            what = f"groups of {self._split.by}" if self._group_of else "subjects"
            raise DataError(
                f"split.sizes: {place}{shares}: nobody, of {plural(len(split_of), 'subject')}; "
                f"expected a larger share, or more {what}"
            )

    def _note_small_strata(self, splits: int) -> None:
        sizes = [len(stratum) for stratum in self._strata(list(self._visits))]
        if small := sum(size < splits for size in sizes):
            self._notes.append(
                f"split.stratify: {small} of {plural(len(sizes), 'combination')} have fewer subjects than the "
                f"{splits} splits or folds, so not every one has them; balance evens out columns one by one"
            )

    def _note_sizes(self, split_of: Mapping[str, str], shares: Mapping[str, Fraction], place: str) -> None:
        counts, total = Counter(split_of.values()), len(split_of)
        off = {name: counts[name] for name, share in shares.items() if abs(counts[name] - share * total) >= 1}
        if off:
            sizes = ", ".join(f"{name} {n} (ideal {float(shares[name] * total):.1f})" for name, n in off.items())
            self._inexact.append(f"{place}{sizes}")

    def _from_file(self, file: Path) -> list[Partition]:
        """Return the partitions that a table lists: its column `split`, or `fold` with each subject's test fold."""
        table = read_lab_table(file, TableConfig(file=file.name), MissingValues(), self._notes)
        column = "fold" if "fold" in table.columns and "split" not in table.columns else "split"
        check_columns(table, (column,))
        if column == "split" and (self._split.sizes or self._split.stratify or self._split.balance):
            raise DataError(f"{file}: lists the splits itself; leave out split.sizes, stratify and balance")
        subjects = {with_prefix("sub", subject): subject for subject in self._visits}
        faults, lines, listed, unknown = Faults(), dict[str, int](), dict[str, str](), list[str]()
        for line, cells in table.rows:
            name, cell = with_prefix("sub", cells["participant_id"]), cells.get(column, "")
            if name in lines:
                faults.append(f"{file}:{line}: participant_id: {name}: is in line {lines[name]} too; expected one row")
            elif name in subjects and not (re.fullmatch(r"\w+", cell) if column == "split" else _fold_number(cell)):
                expected = "a name of letters and digits" if column == "split" else "fold-1, fold-2, …"
                faults.append(f"{file}:{line}: {column}: expected {expected}, got {cell!r}")
            elif name in subjects:
                listed[subjects[name]] = cell
            else:
                unknown.append(name)
            lines[name] = line
        faults += [
            f"{subject}: not in {file}; add a row, or leave the subject out with include"
            for name, subject in subjects.items()
            if name not in lines
        ]
        faults += [f"{file}: {fault}" for fault in self._torn_groups(listed, "")]
        faults.raise_as(DataError)
        if unknown:
            self._notes.append(f"split.file: {file}: not among the included subjects: {_names(unknown)}")
        if column == "split":
            return [Partition(None, None, dict(sorted(listed.items())))]
        numbers = sorted(set(map(_fold_number, listed.values())))
        if numbers != list(range(1, max(numbers) + 1)) or len(numbers) < 2:
            names = ", ".join(f"fold-{number}" for number in numbers)
            raise DataError(f"{file}: fold: included subjects are in {names}; expected fold-1, fold-2, … without a gap")
        folds = [f"fold-{number}" for number in numbers]
        return self._folds({fold: [s for s, own in listed.items() if own == fold] for fold in folds}, named=False)


def _fold_number(cell: str) -> int:
    """Return K of fold-K, 0 for another text."""
    number = cell.removeprefix("fold-")
    return int(number) if number != cell and number.isdecimal() and not number.startswith("0") else 0


def _names(subjects: Sequence[str]) -> str:
    """Return `2 subjects (sub-01, sub-02)`, at most _NAMED of them by name."""
    shown = [*subjects[:_NAMED], *(["…"] if len(subjects) > _NAMED else [])]
    return f"{plural(len(subjects), 'subject')} ({', '.join(shown)})"
