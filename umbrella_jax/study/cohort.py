"""Read a study's tables and scans, choose the visits that take part, and count who is left out why."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from umbrella_jax.data.bids.scans import left_out
from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.study.candidates import (
    Candidate,
    make_candidates,
    naming,
    natural,
    natural_visit,
    placeholder_columns,
)
from umbrella_jax.study.cohort_checks import (
    doubtful_value_faults,
    placeholder_faults,
    subject_id_faults,
    unknown_column_faults,
    used_columns,
    visit_name_faults,
)
from umbrella_jax.study.conditions import CellError, Condition, parse_condition
from umbrella_jax.study.find_scans import FoundScan, find_modality
from umbrella_jax.study.join import JoinedTables, few, join_tables
from umbrella_jax.study.motion import MEAN_FD, mean_over_runs, missing_note, with_motion
from umbrella_jax.study.schema import BinsConfig, CohortConfig, StudyConfig
from umbrella_jax.study.tables import SUBJECT, VISIT, MissingValues, number_fault
from umbrella_jax.study.visits import Flow, Visit

_VISITS_SHOWN = 20


@dataclass(frozen=True)
class Cohort:
    """The visits of a study, before any task."""

    visits: tuple[Visit, ...]
    """Included visits, sorted by subject and visit."""
    flow: Flow
    columns: tuple[str, ...]
    """All columns that values may have: `subject`, `visit`, those of tables, patterns and bins, and `mean_fd` if the
    study uses it."""
    inputs: tuple[Path, ...]
    """The tables that were read."""

    def with_prefix(self, prefix: str, group: str) -> "Cohort":
        """Return the cohort with a text before the names of its subjects and the values of the column `group`."""
        visits = []
        for visit in self.visits:
            named = {name: prefix + visit.values[name] for name in (SUBJECT, group) if name in visit.values}
            visits.append(replace(visit, subject=prefix + visit.subject, values={**visit.values, **named}))
        left_out = {reason: [prefix + name for name in names] for reason, names in self.flow.left_out.items()}
        flow = Flow(left_out, [prefix + name for name in self.flow.included])
        return replace(self, visits=tuple(visits), flow=flow)


def read_cohort(config: CohortConfig, study: StudyConfig, root: Path, faults: Faults, notes: list[str]) -> Cohort:
    """Return the visits that have a scan, a row in the first table and every condition of the study.

    Args:
        config: tables and scans: the study itself, or an external cohort of it.
        study: visits, bins, conditions and missing values.
        root: folder that paths start at.
        faults: receives faults that leave the cohort usable for further checks.
        notes: receives a line about every reason to leave out files, visits or subjects.

    Raises:
        DataError: faults after which there is no cohort: tables or scans that cannot be read, or ids that do not match.
    """
    fatal = Faults()
    conditions = _parse_conditions(study.include, fatal)
    tables = fatal.check(lambda: join_tables(config, root, MissingValues.of_study(study), notes))
    labels: Collection[str] = () if tables is None else tables.first.labels
    scans: list[FoundScan] = []
    key = config.subjects[0].key
    for modality, of_modality in config.scans.items():
        with fatal:
            scans += find_modality(modality, of_modality, root, notes, key=key, subjects=labels)
    fatal.raise_as(DataError)
    assert tables is not None
    used = used_columns(study) | {name for condition in conditions for name in condition.columns}
    columns = _column_names(config, study, tables, used)
    fatal += unknown_column_faults(config, study, conditions, columns, tables)
    fatal += subject_id_faults(tables, scans)
    fatal += visit_name_faults(tables, scans)
    fatal.raise_as(DataError)

    faults += tables.conflicts(sorted(used))
    candidates = make_candidates(config, tables, scans, notes, faults)
    if MEAN_FD in used and MEAN_FD not in tables.columns:
        candidates = _with_motion(candidates, root, faults, notes)
    faults += placeholder_faults(config, tables, candidates, used)
    faults += doubtful_value_faults(study, tables, candidates, used)
    selection = _Selection(tables, candidates, faults, notes)
    selection.leave_out_unmatched(config, scans)
    selection.choose_visits(study.visits)
    if any(isinstance(task.visits, int) and task.visits > 1 for task in study.tasks.values()):
        selection.note_order(study.visits)
    for name, bins in study.bins.items():
        selection.add_bins(name, bins)
    for condition in conditions:
        selection.check_texts(condition)
    for condition in conditions:
        selection.apply(condition)
    flow, candidates = selection.flow, selection.candidates
    if not candidates and not faults:
        reasons = "; ".join(f"{reason}: {len(names):,}" for reason, names in flow.left_out.items())
        raise DataError(f"{tables.first.path}: no subject is left: {reasons}")
    flow.included += dict.fromkeys(candidate.visit.subject for candidate in candidates)
    return Cohort(tuple(candidate.visit for candidate in candidates), flow, columns, tables.files)


def _parse_conditions(texts: Iterable[str], faults: Faults) -> list[Condition]:
    conditions = []
    for text in texts:
        try:
            conditions.append(parse_condition(text))
        except ConfigError as error:
            faults += [f"include: {fault}" for fault in error.faults]
    return conditions


def _with_motion(candidates: Iterable[Candidate], root: Path, faults: Faults, notes: list[str]) -> list[Candidate]:
    """Return the candidates with the column of mean framewise displacement, the mean over the runs of the visit."""
    missing: list[str] = []
    moved = []
    for candidate in candidates:
        visit = candidate.visit
        with faults:
            visit = replace(visit, scans=with_motion(visit.scans, root, missing))
        cell = mean_over_runs(scan for group in visit.scans.values() for scan in group)
        if cell is not None:
            candidate.values[MEAN_FD] = cell  # these are the visit's values too
        moved.append(replace(candidate, visit=visit))
    if missing:
        notes.append(missing_note(missing))
    return moved


def _column_names(
    config: CohortConfig, study: StudyConfig, tables: JoinedTables, used: Collection[str]
) -> tuple[str, ...]:
    names = [SUBJECT, VISIT, *tables.columns, *placeholder_columns(config.scans, tables.first.key), *study.bins]
    return tuple(dict.fromkeys([*names, *([MEAN_FD] if MEAN_FD in used else [])]))


class _Selection:
    """The visits that are left, and everybody who is left out, while a cohort is read."""

    def __init__(self, tables: JoinedTables, candidates: list[Candidate], faults: Faults, notes: list[str]):
        self.candidates, self.flow = candidates, Flow()
        self._tables, self._faults, self._notes = tables, faults, notes

    def leave_out_unmatched(self, config: CohortConfig, scans: Iterable[FoundScan]) -> None:
        """Count subjects, and visits, that are only in tables or only among the scans."""
        tables = self._tables
        rows = tables.first.labels
        on_disk = {scan.subject for scan in scans}
        elsewhere = {label for table in (*tables.subjects[1:], *tables.sessions) for label in table.labels}
        name, name_of = tables.first.name, naming(config, tables)
        for reason, labels in {
            f"in {name}, but without a scan": rows.keys() - on_disk,
            f"with a scan, but without a row in {name}": on_disk - rows.keys(),
            f"in other tables, but without a row in {name}": elsewhere - rows.keys() - on_disk,
        }.items():
            self.flow.leave_out(reason, [name_of(label) for label in sorted(labels, key=natural)])
        if tables.sessions:
            where = ", ".join(dict.fromkeys(table.name for table in tables.sessions))
            there = {(candidate.label, candidate.visit.name) for candidate in self.candidates}
            unknown = [c.visit.place for c in self.candidates if not tables.has_visit(c.label, c.visit.name)]
            if unknown:
                self._notes.append(left_out(f"values of visits that have a scan, but no row in {where}", unknown))
            visits = {key for table in tables.sessions for key in table.rows if key[0] in rows} - there
            places = [f"{name_of(label)} ses-{visit}" for label, visit in sorted(visits, key=natural_visit)]
            if places:
                self._notes.append(left_out(f"visits with a row in {where}, but without a scan", places))

    def choose_visits(self, chosen: str | Sequence[str]) -> None:
        """Keep `all` visits, a subject's `first` or `last`, or the named ones in their order."""
        if chosen == "all":
            return
        names = sorted({c.visit.name for c in self.candidates if c.visit.name is not None}, key=natural)
        if isinstance(chosen, str):
            by_subject = {}
            for candidate in self.candidates if chosen == "last" else reversed(self.candidates):
                by_subject[candidate.label] = candidate
            if len(names) > 1:
                self._notes.append(f"the {chosen} visit of each subject, in the order {', '.join(names)}")
            self.candidates = [one for one in self.candidates if by_subject[one.label] is one]
            return
        self._faults += [
            f"visits: {name}: no scan has this visit; expected some of {few(names, 20) or 'none'}"
            for name in chosen
            if name not in names
        ]
        visits_of: dict[str, dict[str | None, Candidate]] = defaultdict(dict)
        for candidate in self.candidates:
            if candidate.visit.name in chosen:
                visits_of[candidate.label][candidate.visit.name] = candidate
        lost = dict.fromkeys(c.visit.subject for c in self.candidates if c.label not in visits_of)
        self.flow.leave_out(f"without a scan at visit {' or '.join(chosen)}", list(lost))
        self.candidates = [visits[name] for visits in visits_of.values() for name in chosen if name in visits]

    def note_order(self, chosen: str | Sequence[str]) -> None:
        """Add a note about the order of visits that several are shown in, unless their names are numbers or a list."""
        names = sorted({c.visit.name for c in self.candidates if c.visit.name is not None}, key=natural)
        if chosen == "all" and not all(name.isdecimal() for name in names):
            order = ", ".join(names[:_VISITS_SHOWN]) + (", …" if len(names) > _VISITS_SHOWN else "")
            remedy = "list them in visits for another"
            self._notes.append(f"tasks with several visits show them in the order {order}; {remedy}")

    def check_texts(self, condition: Condition) -> None:
        """Add a fault for a text whose number a cell writes in another way, as 3.0 for "3"; a note for an unused text.

        Either may be a mistake that includes, or leaves out, the wrong subjects.
        """
        for column, texts in condition.texts.items():
            holders = {c.values[column]: c for c in self.candidates if column in c.values}
            numbers = {cell: number for cell in holders if (number := parse_cell_number(cell)) is not None}
            for text in dict.fromkeys(texts):
                number = parse_cell_number(text)
                same = [cell for cell, own in numbers.items() if own == number and cell != text]
                for cell in same:
                    place = self._tables.place(column, holders[cell].label, holders[cell].visit.name)
                    remedy = f"write {text} without quotes to compare numbers"
                    self._faults.append(
                        f'{place}: {column}: {cell} is not the text "{text}" of {condition.text}; {remedy}'
                    )
                if not same and text not in holders:
                    self._notes.append(f'include: {condition.text}: no visit has the text "{text}" in {column}')

    def add_bins(self, name: str, bins: BinsConfig) -> None:
        """Add the column of groups to every visit that has the number."""
        labels = bin_labels(bins)
        for candidate in self.candidates:
            if (cell := candidate.values.get(bins.column)) is None:
                continue
            if (number := parse_cell_number(cell)) is not None:
                candidate.values[name] = labels[bisect_right(bins.edges, number)]
            else:
                place = self._tables.place(bins.column, candidate.label, candidate.visit.name)
                self._faults.append(f"{place}: {bins.column}: {number_fault(cell)}")

    def apply(self, condition: Condition) -> None:
        """Keep the visits at which a condition holds. A subject without any left counts for its last visit's reason."""
        kept: list[Candidate] = []
        fails, unknown = f"`{condition.text}` is false", f"`{condition.text}` is unknown, since a value is missing"
        reason_of: dict[str, str] = {}
        visits: dict[str, list[str]] = defaultdict(list)
        for candidate in self.candidates:
            try:
                holds = condition.holds(candidate.values)
            except CellError as error:
                place = self._tables.place(error.column, candidate.label, candidate.visit.name)
                self._faults.append(f"{place}: {error}; the condition {condition.text} compares it with a number")
                holds = None
            if holds:
                kept.append(candidate)
            else:
                reason = unknown if holds is None else fails
                visits[reason].append(candidate.visit.place)
                reason_of[candidate.visit.subject] = reason
        included = {candidate.visit.subject for candidate in kept}
        for reason in (fails, unknown):
            self.flow.leave_out(reason, [s for s, own in reason_of.items() if own == reason and s not in included])
            if visits[reason] and self.candidates[0].visit.name is not None:
                self._notes.append(left_out(f"visits at which {reason}", visits[reason]))
        self.candidates = kept


def bin_labels(bins: BinsConfig) -> Sequence[str]:
    """Return the names of groups of numbers, from the lowest to the highest."""
    if bins.labels is not None:
        return bins.labels
    texts = [f"{edge:.15g}" for edge in bins.edges]
    between = [f"{low} to {high}" for low, high in pairwise(texts)]
    return [f"below {texts[0]}", *between, f"{texts[-1]} and above"]
