"""Check that columns, ids and visits of a cohort's tables and scans match, and that no value is in doubt."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from umbrella_jax.data.tables import doubtful_values, match_misspelled
from umbrella_jax.study.candidates import Candidate, placeholder_columns
from umbrella_jax.study.cases import phrasings_of
from umbrella_jax.study.conditions import Condition
from umbrella_jax.study.find_scans import FoundScan
from umbrella_jax.study.join import JoinedTables, describe_pairs, few, id_faults
from umbrella_jax.study.motion import MEAN_FD
from umbrella_jax.study.schema import CohortConfig, StudyConfig
from umbrella_jax.study.tables import SUBJECT, VISIT, unknown_column


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


def unknown_column_faults(
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
    own = {*tables.columns, *placeholder_columns(config.scans, tables.first.key), SUBJECT, VISIT, MEAN_FD}
    for name, bins in study.bins.items():
        if name in own:
            yield f"bins.{name}: a column has this name already; choose another"
        if bins.column not in own:
            yield f"bins.{name}.column: {unknown_column(bins.column, [c for c in columns if c in own])}"
    for condition in conditions:
        for name in condition.columns:
            if name not in columns:
                yield f"include: {condition.text}: {unknown_column(name, columns)}; a text needs quotes"


def subject_id_faults(tables: JoinedTables, scans: Iterable[FoundScan]) -> list[str]:
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


def visit_name_faults(tables: JoinedTables, scans: Iterable[FoundScan]) -> list[str]:
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


def placeholder_faults(
    config: CohortConfig, tables: JoinedTables, candidates: Iterable[Candidate], used: set[str]
) -> Iterator[str]:
    """Yield a fault for every column of a pattern that contradicts a table, or has several values at one visit."""
    names = placeholder_columns(config.scans, tables.first.key)
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


def doubtful_value_faults(
    study: StudyConfig, tables: JoinedTables, candidates: Sequence[Candidate], used: set[str]
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
                f"`missing: {{{name}: [{', '.join(map(repr, odd))}]}}` to leave them out, `missing: {{{name}: []}}` "
                "to keep every value"
            )
