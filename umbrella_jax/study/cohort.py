"""Join a study's tables and scans to visits, apply its conditions, and count who was left out why."""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from umbrella_jax.data.bids.scans import left_out
from umbrella_jax.data.tables import doubtful_values, match_misspelled, parse_cell_number
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.study.cases import phrasings_of
from umbrella_jax.study.conditions import CellError, Condition, parse_condition
from umbrella_jax.study.find_scans import FoundScan, find_modality
from umbrella_jax.study.join import JoinedTables, describe_pairs, few, id_faults, join_tables
from umbrella_jax.study.patterns import names_in
from umbrella_jax.study.schema import BinsConfig, CohortConfig, ScansConfig, StudyConfig
from umbrella_jax.study.tables import SUBJECT, VISIT, MissingValues, number_fault, unknown_column
from umbrella_jax.study.visits import Flow, Scan, Visit


@dataclass(frozen=True)
class Cohort:
    """The visits of a study, before any task."""

    visits: tuple[Visit, ...]
    """Included visits, sorted by subject and visit."""
    flow: Flow
    columns: tuple[str, ...]
    """All columns that values may have: `subject`, `visit`, and those of tables, patterns and bins."""
    inputs: tuple[Path, ...]
    """The tables that were read."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A subject at a visit, with scans, until it is left out."""

    label: str
    """The subject's, without `sub-`."""
    visit: Visit
    values: dict[str, str]
    """Those of `visit`, to which bins are added."""


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
    for modality, of_modality in config.scans.items():
        with fatal:
            scans += find_modality(modality, of_modality, config.subjects[0].key, labels, root, notes)
    fatal.raise_as(DataError)
    assert tables is not None
    columns = _column_names(config, study, tables)
    fatal += _column_faults(config, study, conditions, columns, tables)
    fatal += _subject_faults(tables, scans)
    fatal += _visit_name_faults(tables, scans)
    fatal.raise_as(DataError)

    used = used_columns(study) | {name for condition in conditions for name in condition.columns}
    faults += tables.conflicts(sorted(used))
    flow = Flow()
    candidates = _make_candidates(config, tables, scans, notes, faults)
    _leave_out_unmatched(config, tables, scans, candidates, flow, notes)
    faults += _placeholder_faults(config, tables, candidates, used)
    faults += _doubt_faults(study, tables, candidates, used)
    candidates = _choose_visits(study, candidates, flow, notes, faults)
    for name, bins in study.bins.items():
        _add_bins(name, bins, tables, candidates, faults)
    for condition in conditions:
        candidates = _apply(condition, tables, candidates, flow, notes, faults)
    if not candidates and not faults:
        reasons = "; ".join(f"{reason}: {len(names):,}" for reason, names in flow.left_out.items())
        raise DataError(f"{tables.first.path}: no subject is left: {reasons}")
    flow.included += dict.fromkeys(candidate.visit.subject for candidate in candidates)
    return Cohort(tuple(candidate.visit for candidate in candidates), flow, columns, tables.files)


def used_columns(study: StudyConfig) -> set[str]:
    """Return the columns that a study's answers, prompts, metadata, bins and splits depend on."""
    used = {*study.keep, *(bins.column for bins in study.bins.values())}
    split = study.split
    used |= {split.by, *split.stratify, *split.balance, *([split.leave_out] if split.leave_out else [])}
    for task in study.tasks.values():
        used |= {task.column} if task.column else set()
        for text in (text for phrasings in phrasings_of(task).values() for text in phrasings):
            used.update(re.findall(r"\{([^{}]+)\}", text))
    return used


def _parse_conditions(texts: Iterable[str], faults: Faults) -> list[Condition]:
    conditions = []
    for text in texts:
        try:
            conditions.append(parse_condition(text))
        except ConfigError as error:
            faults += [f"include: {fault}" for fault in error.faults]
    return conditions


def _placeholders(scans: Mapping[str, ScansConfig], key: str) -> list[str]:
    """Return the names in patterns that become columns."""
    names = [name for config in scans.values() for name in names_in(config.pattern or "")]
    return [name for name in dict.fromkeys(names) if name not in (SUBJECT, VISIT, key)]


def _column_names(config: CohortConfig, study: StudyConfig, tables: JoinedTables) -> tuple[str, ...]:
    names = (SUBJECT, VISIT, *tables.columns, *_placeholders(config.scans, tables.first.key), *study.bins)
    return tuple(dict.fromkeys(names))


def _column_faults(
    config: CohortConfig,
    study: StudyConfig,
    conditions: Iterable[Condition],
    columns: Sequence[str],
    tables: JoinedTables,
) -> Iterator[str]:
    """Yield a fault for every column that missing values, bins or conditions name and no table has."""
    for name in study.missing if config is study else ():  # an external cohort may have fewer columns
        if name != "*" and name not in columns:
            yield f"missing: {unknown_column(name, columns)}"
    own = {*tables.columns, *_placeholders(config.scans, tables.first.key), SUBJECT, VISIT}
    for name, bins in study.bins.items():
        if name in own:
            yield f"bins.{name}: a column has this name already; choose another"
        if bins.column not in own:
            yield f"bins.{name}.column: {unknown_column(bins.column, [c for c in columns if c in own])}"
    for condition in conditions:
        for name in condition.columns:
            if name not in columns:
                yield f"include: {condition.text}: {unknown_column(name, columns)}; a text needs quotes"


def _subject_faults(tables: JoinedTables, scans: Iterable[FoundScan]) -> list[str]:
    """Return faults for subjects that the first table and the scans spell differently, or that match nowhere."""
    on_disk: dict[str, dict[str, None]] = defaultdict(dict)
    for scan in scans:
        on_disk[scan.scan.modality][scan.subject] = None
    first = tables.first
    faults = id_faults(first, "on disk", {label for labels in on_disk.values() for label in labels})
    return faults or [
        f"scans.{modality}: no subject is in {first.name}: {few(labels)} on disk, {few(first.labels)} in the table"
        for modality, labels in on_disk.items()
        if not labels.keys() & first.labels.keys()
    ]


def _visit_name_faults(tables: JoinedTables, scans: Iterable[FoundScan]) -> list[str]:
    """Return faults for visits that tables and scans spell differently, or that match nowhere."""
    if not tables.sessions:
        return []
    on_disk: dict[str, set[str]] = defaultdict(set)
    for scan in scans:
        if scan.visit is not None:
            on_disk[scan.subject].add(scan.visit)
    name = tables.sessions[0].path
    if not on_disk:
        return [
            f"{name}: has visits, but no scan's path has one; write {{visit}} in the pattern, or list it in subjects"
        ]
    faults = []
    for table in tables.sessions:
        in_table: dict[str, set[str]] = defaultdict(set)
        for subject, visit in table.rows:
            in_table[subject].add(str(visit))
        pairs: dict[str, str] = {}
        for subject, visits in in_table.items():
            others = on_disk.get(subject, set())
            if visits - others and others - visits:
                pairs |= match_misspelled((f"ses-{v}" for v in visits), (f"ses-{v}" for v in others))
        if pairs:
            names = ", ".join(f"{a[len('ses-') :]!r}: {b[len('ses-') :]!r}" for a, b in list(pairs.items())[:2])
            remedy = f"map them, as in visit_names: {{{names}}}"
            faults.append(f"{table.path}: visit: {describe_pairs(pairs, 'on disk')}; {remedy}")
        elif not any(visits & on_disk.get(subject, set()) for subject, visits in in_table.items()):
            ours, theirs = (set().union(*visits.values()) for visits in (in_table, on_disk))
            faults.append(
                f"{table.path}: visit: no visit of the table is on disk: {few(ours)} there, {few(theirs)} on disk"
            )
    return faults


def _make_candidates(
    config: CohortConfig, tables: JoinedTables, scans: Iterable[FoundScan], notes: list[str], faults: Faults
) -> list[_Candidate]:
    """Return the visits with scans whose subjects are in the first table, sorted."""
    labels = tables.first.labels
    groups: dict[tuple[str, str | None], dict[str, list[Scan]]] = defaultdict(dict)
    for found in scans:
        if found.subject in labels:
            groups[found.subject, found.visit].setdefault(found.scan.modality, []).append(found.scan)
    name_of = _naming(config, tables)
    placeholders = _placeholders(config.scans, tables.first.key)
    surplus: Counter[str] = Counter()
    candidates = []
    for label, visit in sorted(groups, key=_natural_visit):
        chosen = {}
        for modality, group in groups[label, visit].items():
            several = config.scans[modality].several
            if len(group) > 1:
                group.sort(key=lambda scan: _natural(scan.path))
                if several == "error":
                    place = name_of(label) + (f" ses-{visit}" if visit else "")
                    faults.append(
                        f"scans.{modality}: {place} has {len(group)} scans: {few(s.path for s in group)}; choose by "
                        "their names, or set several to all, first or last"
                    )
                surplus[modality] += len(group) - 1 if several in ("first", "last") else 0
            chosen[modality] = tuple({"first": group[:1], "last": group[-1:]}.get(several, group))
        values = tables.values(label, visit)
        for name in placeholders:
            texts = {s.entities[name] for group in chosen.values() for s in group if name in s.entities}
            if len(texts) == 1:
                values.setdefault(name, texts.pop())
        values[SUBJECT] = name_of(label)
        if visit is not None:
            values[VISIT] = visit
        candidates.append(_Candidate(label, Visit(values[SUBJECT], visit, values, chosen), values))
    for modality, number in surplus.items():
        if number:
            notes.append(f"{modality}: {number:,} scans left out: several is {config.scans[modality].several}")
    without = {candidate.label: candidate for candidate in candidates if candidate.visit.name is None}
    mixed = dict.fromkeys(c.visit.subject for c in candidates if c.visit.name is not None and c.label in without)
    if mixed:
        modalities = " and ".join(dict.fromkeys(m for candidate in without.values() for m in candidate.visit.scans))
        reason = (
            f"subjects whose scans of {modalities} name no visit, but others do; they count as a visit of their own"
        )
        notes.append(f"{reason} ({len(mixed):,}): {few(mixed)}")
    return candidates


def _naming(config: CohortConfig, tables: JoinedTables) -> Callable[[str], str]:
    """Return the function from a label to the subject's name in conversations."""
    if any(scans.bids is not None for scans in config.scans.values()):
        return lambda label: f"sub-{label}"
    rows = tables.first.rows
    return lambda label: rows[label, None].subject if (label, None) in rows else label


def _natural_visit(key: tuple[str, str | None]) -> tuple[tuple[str | int, ...], ...]:
    return _natural(key[0]), _natural(key[1])


@lru_cache(maxsize=1 << 17)
def _natural(text: str | None) -> tuple[str | int, ...]:
    """Return a key by which run-2 comes before run-10; nothing comes first."""
    return tuple(int(part) if n % 2 else part for n, part in enumerate(re.split(r"([0-9]+)", text or "")))


def _leave_out_unmatched(
    config: CohortConfig,
    tables: JoinedTables,
    scans: Iterable[FoundScan],
    candidates: Sequence[_Candidate],
    flow: Flow,
    notes: list[str],
) -> None:
    """Count subjects, and visits, that are only in tables or only among the scans."""
    rows = tables.first.labels
    on_disk = {scan.subject for scan in scans}
    elsewhere = {label for table in (*tables.subjects[1:], *tables.sessions) for label in table.labels}
    name, name_of = tables.first.name, _naming(config, tables)
    for reason, labels in {
        f"in {name}, but without a scan": rows.keys() - on_disk,
        f"with a scan, but without a row in {name}": on_disk - rows.keys(),
        f"in other tables, but without a row in {name}": elsewhere - rows.keys() - on_disk,
    }.items():
        _leave_out(reason, [name_of(label) for label in sorted(labels, key=_natural)], flow, notes)
    if tables.sessions:
        where = ", ".join(dict.fromkeys(table.name for table in tables.sessions))
        there = {(candidate.label, candidate.visit.name) for candidate in candidates}
        unknown = [c.visit.place for c in candidates if not tables.has_visit(c.label, c.visit.name)]
        if unknown:
            notes.append(left_out(f"values of visits that have a scan, but no row in {where}", unknown))
        visits = {key for table in tables.sessions for key in table.rows if key[0] in rows} - there
        places = [f"{name_of(label)} ses-{visit}" for label, visit in sorted(visits, key=_natural_visit)]
        if places:
            notes.append(left_out(f"visits with a row in {where}, but without a scan", places))


def _leave_out(reason: str, names: Sequence[str], flow: Flow, notes: list[str]) -> None:
    flow.leave_out(reason, names)
    if names:
        notes.append(left_out(f"subjects {reason}", names))


def _placeholder_faults(
    config: CohortConfig, tables: JoinedTables, candidates: Iterable[_Candidate], used: set[str]
) -> Iterator[str]:
    """Yield a fault for every column of a pattern that contradicts a table, or has several values at one visit."""
    names = _placeholders(config.scans, tables.first.key)
    for candidate in candidates if names else ():
        for name in names:
            for scan in (scan for group in candidate.visit.scans.values() for scan in group):
                text, cell = scan.entities.get(name), candidate.values.get(name)
                if name in tables.columns and None not in (text, cell) and text != cell:
                    place = tables.place(name, candidate.label, candidate.visit.name)
                    yield f"{place}: {name}: {cell}, but {text} in {scan.path}; correct one, or rename one of the two"
                elif name in used and text is not None and cell is None:
                    yield (
                        f"scans: {name}: has several values at {candidate.visit.place}; a column needs one per visit: "
                        "set several to first or last"
                    )
                    break


def _doubt_faults(
    study: StudyConfig, tables: JoinedTables, candidates: Sequence[_Candidate], used: set[str]
) -> Iterator[str]:
    """Yield a fault for every column, that the study uses, with values that may mean a missing one."""
    for name in (name for name in tables.columns if name in used and name not in study.missing):
        if name == tables.first.key:
            continue
        cells = {
            (candidate.label, candidate.visit.name if name in tables.per_visit else None): candidate.values[name]
            for candidate in candidates
            if name in candidate.values
        }
        counts = Counter(cells.values())
        labels = {
            value: text for task in study.tasks.values() if task.column == name for value, text in task.labels.items()
        }
        if odd := doubtful_values(counts.keys(), labels):
            listed = ", ".join(f"{value!r} ({counts[value]:,})" for value in odd)
            yield (
                f"{tables.table_of(name)}: {name}: do these mean a missing value? {listed}; write "
                f"`missing: {{{name}: [{', '.join(map(repr, odd))}]}}` to leave them out, `missing: {{{name}: n/a}}` "
                "to keep every value"
            )


def _choose_visits(
    study: StudyConfig, candidates: list[_Candidate], flow: Flow, notes: list[str], faults: Faults
) -> list[_Candidate]:
    if study.visits == "all":
        return candidates
    if isinstance(study.visits, str):
        by_subject = {}
        for candidate in candidates if study.visits == "last" else reversed(candidates):
            by_subject[candidate.label] = candidate
        order = sorted({c.visit.name for c in candidates if c.visit.name is not None}, key=_natural)
        if len(order) > 1:
            notes.append(f"the {study.visits} visit of each subject, in the order {', '.join(order)}")
        return [candidate for candidate in candidates if by_subject[candidate.label] is candidate]
    order = list(study.visits)
    names = sorted({c.visit.name for c in candidates if c.visit.name is not None}, key=_natural)
    for name in order:
        if name not in names:
            faults.append(f"visits: {name}: no scan has this visit; expected some of {few(names, 20) or 'none'}")
    kept = [candidate for candidate in candidates if candidate.visit.name in order]
    _count_lost(f"without a scan at visit {' or '.join(order)}", candidates, kept, flow, notes)
    positions: dict[str, dict[str | None, _Candidate]] = defaultdict(dict)
    for candidate in kept:
        positions[candidate.label][candidate.visit.name] = candidate
    return [visits[name] for visits in positions.values() for name in order if name in visits]


def _count_lost(
    reason: str, before: Iterable[_Candidate], after: Iterable[_Candidate], flow: Flow, notes: list[str]
) -> None:
    """Count the subjects without any visit left."""
    left = {candidate.label for candidate in after}
    names = dict.fromkeys(candidate.visit.subject for candidate in before if candidate.label not in left)
    _leave_out(reason, list(names), flow, notes)


def _add_bins(
    name: str, bins: BinsConfig, tables: JoinedTables, candidates: Iterable[_Candidate], faults: Faults
) -> None:
    labels = bins.labels or _bin_labels(bins.edges)
    for candidate in candidates:
        if (cell := candidate.values.get(bins.column)) is None:
            continue
        if (number := parse_cell_number(cell)) is not None:
            candidate.values[name] = labels[bisect_right(bins.edges, number)]
        else:
            place = tables.place(bins.column, candidate.label, candidate.visit.name)
            faults.append(f"{place}: {bins.column}: {number_fault(cell)}")


def _bin_labels(edges: Sequence[float]) -> list[str]:
    texts = [f"{edge:.15g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(texts)]
    return [f"below {texts[0]}", *between, f"{texts[-1]} and above"]


def _apply(
    condition: Condition,
    tables: JoinedTables,
    candidates: Sequence[_Candidate],
    flow: Flow,
    notes: list[str],
    faults: Faults,
) -> list[_Candidate]:
    """Keep the visits at which a condition holds. A subject without any left counts for its last visit's reason."""
    kept: list[_Candidate] = []
    fails, unknown = f"`{condition.text}` is false", f"`{condition.text}` is unknown, since a value is missing"
    left: dict[str, str] = {}
    visits: dict[str, list[str]] = defaultdict(list)
    for candidate in candidates:
        try:
            holds = condition.holds(candidate.values)
        except CellError as error:
            place = tables.place(error.column, candidate.label, candidate.visit.name)
            faults.append(f"{place}: {error}; the condition {condition.text} compares it with a number")
            holds = None
        if holds:
            kept.append(candidate)
        else:
            reason = unknown if holds is None else fails
            visits[reason].append(candidate.visit.place)
            left[candidate.visit.subject] = reason
    included = {candidate.visit.subject for candidate in kept}
    for reason in (fails, unknown):
        flow.leave_out(reason, [subject for subject, own in left.items() if own == reason and subject not in included])
        if visits[reason]:
            notes.append(left_out(reason, visits[reason]))
    return kept
