"""Give every scan its value, decide which kind of question the values suit, and spell them as labels."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from umbrella_jax.config.schema import TaskKind
from umbrella_jax.console import plural
from umbrella_jax.data.bids.participants import PARTICIPANTS, Participants
from umbrella_jax.data.bids.scans import BidsFiles, BidsScan, left_out
from umbrella_jax.data.labels import alike_labels, infer_kind, kind_faults
from umbrella_jax.data.tables import doubtful_values, has_lost_zeros, is_missing, match_misspelled, parse_cell_number
from umbrella_jax.errors import DataError

ValuedScan = tuple[BidsScan, str]
"""A scan and the value of its target, as in the table."""


@dataclass(frozen=True)
class LabelledSubject:
    """A subject's scans that share one label. A subject whose label changes between sessions is several of these."""

    name: str
    """Such as `sub-01`."""
    value: str
    """As in the table."""
    label: str
    """As in the conversation."""
    scans: tuple[BidsScan, ...]


def scans_with_values(
    table: Participants,
    files: BidsFiles,
    scans: Mapping[str, Sequence[BidsScan]],
    target: str,
    *,
    missing: Sequence[str],
    labels: Mapping[str, str],
    notes: list[str],
) -> list[ValuedScan]:
    """Return the scans that have a value, with it.

    Args:
        table: rows and values per session.
        files: all files of the data set, whose ids are compared with those of the tables.
        scans: {sub-LABEL: its scans}.
        target: column to take values from.
        missing: values that the user declares missing.
        labels: {value: description}; a described value is not missing.
        notes: receives a line about every reason to leave scans out.

    Raises:
        DataError: ids that differ only in spelling, values that may or may not mean a missing one, or nothing left.
    """
    faults = _misspelled_ids(table, files, scans)
    valued: list[ValuedScan] = []
    without_value: list[str] = []
    for scan in (scan for subject, group in scans.items() if subject in table.rows for scan in group):
        value = table.value(scan.subject, scan.entities.get("ses"), target)
        if value is None:
            without_value.append(scan.visit)
        else:
            valued.append((scan, value))
    # A value is missing for a subject, or for a session if sessions have values of their own.
    owner: Callable[[BidsScan], str] = (lambda scan: scan.visit) if table.sessions else (lambda scan: scan.subject)
    empty = dict.fromkeys(owner(scan) for scan, value in valued if value.lower() in ("", "n/a"))
    coded = {
        owner(scan): value
        for scan, value in valued
        if owner(scan) not in empty and is_missing(value, declared=missing, labels=labels)
    }
    kept = [(scan, value) for scan, value in valued if owner(scan) not in empty and owner(scan) not in coded]

    visits = {scan.visit for group in scans.values() for scan in group}
    owners = "sessions" if table.sessions and any(" " in visit for visit in visits) else "subjects"
    counts = ", ".join(f"{value} {n}" for value, n in Counter(coded.values()).items())
    unvalued = list(dict.fromkeys(without_value))
    reasons = {
        "subjects without a scan": [subject for subject in table.rows if subject not in scans],
        f"scans without ses- in their names, since only {table.session_tables} has {target}": [
            visit for visit in unvalued if " " not in visit
        ],
        f"sessions without a value in {table.session_tables}": [visit for visit in unvalued if " " in visit],
        f"{owners} whose {target} is n/a or empty": list(empty),
        f"{owners} whose {target} is a code for a missing value ({counts})": list(coded),
        f"subjects without a row in {PARTICIPANTS}": [subject for subject in scans if subject not in table.rows],
    }
    notes += [left_out(reason, names) for reason, names in reasons.items() if names]
    for value in missing:
        used = any(cell == value or is_missing(cell, declared=[value]) for cell in coded.values())
        if not used and value.lower() != "n/a":
            notes.append(f"--missing {value}: no {target} has this value")
    if table.sessions:
        own = sum(scan.entities.get("ses") is not None for scan, _ in kept)
        differing = sum(table.rows[scan.subject].get(target, value) != value for scan, value in kept)
        notes.append(
            f"values from {table.session_tables}: {plural(own, 'scan')}, {differing} differ from {PARTICIPANTS}"
        )
    counts_of = Counter(value for _, value in dict.fromkeys((owner(scan), value) for scan, value in kept))
    if not missing and (odd := doubtful_values(counts_of.keys(), labels)):
        listed = ", ".join(f"{value!r} ({counts_of[value]})" for value in odd)
        flags = " ".join(f"--missing {shlex.quote(value)}" for value in odd)
        faults.append(
            f"{table.path}: {target}: do these mean a missing value? {listed}; {flags} leaves them out, "
            "--missing n/a keeps every value"
        )
    if not kept and not faults:
        faults.append("; ".join([f"{table.path}: {target}: no subject has both a value and a scan", *notes]))
    if faults:
        raise DataError(faults)
    return kept


def _misspelled_ids(table: Participants, files: BidsFiles, scans: Mapping[str, Sequence[BidsScan]]) -> list[str]:
    """Return faults for ids that tables and folders spell differently."""
    faults = []
    pairs = match_misspelled(table.rows, [*files.modalities, *scans])
    if pairs:
        faults.append(_spelling_fault(f"{table.path}: participant_id", pairs, ""))
    on_disk = defaultdict(set)
    for scan in (scan for group in scans.values() for scan in group if "ses" in scan.entities):
        on_disk[scan.subject].add(f"ses-{scan.entities['ses']}")
    in_tables = defaultdict(set)
    for subject, session in table.sessions:
        in_tables[subject].add(session)
    sessions = {subject: match_misspelled(in_tables[subject], names) for subject, names in on_disk.items()}
    if first := next((subject for subject, differing in sessions.items() if differing), None):
        faults.append(_spelling_fault(f"{table.session_tables}: session_id", sessions[first], f" for {first}"))
    return faults


def _spelling_fault(place: str, pairs: Mapping[str, str], owner: str) -> str:
    (name, other), *more = pairs.items()
    others = f" and {plural(len(more), 'other')}" if more else ""
    if all(has_lost_zeros(name, other) for name, other in pairs.items()):
        why = "the table has lost leading zeros, as in a spreadsheet; write the ids as the folders have them, as text"
    else:
        why = "they differ only in spelling; write the ids as the folders have them"
    return f"{place}: {name} in the table, {other} on disk{owner}{others}; {why}"


def choose_kind(
    table: Participants,
    target: str,
    valued_scans: Sequence[ValuedScan],
    kind: TaskKind | None,
    *,
    texts: Mapping[str, str],
    notes: list[str],
) -> TaskKind:
    """Return the requested kind of conversation, or without a request the one that the values suggest.

    Args:
        table: names the file in messages.
        target: the column.
        valued_scans: scans and their values.
        kind: requested kind.
        texts: {value: text} that replaces values.
        notes: receives lines about labels that look alike or are not used.

    Raises:
        DataError: the values do not fit the kind.
    """
    place = f"{table.path}: {target}"
    value_of = {scan.subject: value for scan, value in valued_scans}
    counts = Counter(value for _, value in valued_scans)
    words = [f"{value} ({subject})" for subject, value in value_of.items() if parse_cell_number(value) is None]
    words = words or [value for value in counts if parse_cell_number(value) is None]
    described = texts.keys() & counts.keys()
    remedy = f"write numbers or n/a instead of {', '.join(words)}, or ask for kind classification"
    if faults := kind_faults(place, kind, counts, words=words, described=described, mixed_remedy=remedy):
        raise DataError(faults)
    kind = kind or infer_kind(counts)
    if kind != "regression":
        _check_labels(place, target, counts, texts, notes)
    return kind


def _check_labels(place: str, target: str, counts: Counter[str], texts: Mapping[str, str], notes: list[str]) -> None:
    """Raise DataError for labels that differ only in case, spaces or the spelling of a number."""
    labels: Counter[str] = Counter()
    for value, count in counts.items():
        labels[texts.get(value, value)] += count
    same, initials = alike_labels(labels)
    if same:
        spellings = [", ".join(f"{label!r} ({labels[label]})" for label in group) for group in same]
        remedy = "spell them the same, or map them with `labels` in --template"
        raise DataError([f"{place}: one label or several? {group}; {remedy}" for group in spellings])
    notes += [f"treated as two labels of {target}: {', '.join(group)}" for group in initials]
    if unused := sorted(texts.keys() - counts.keys()):
        notes.append(f"values that Levels or labels describe but no scan has: {', '.join(unused)}")


def group_by_label(valued_scans: Iterable[ValuedScan], texts: Mapping[str, str]) -> list[LabelledSubject]:
    """Group scans by subject and label, in order; `texts` is {value: label} for values that have another label."""
    groups: dict[tuple[str, str], list[ValuedScan]] = defaultdict(list)
    for scan, value in valued_scans:
        groups[scan.subject, texts.get(value, value)].append((scan, value))
    return [
        LabelledSubject(name, group[0][1], label, tuple(scan for scan, _ in group))
        for (name, label), group in groups.items()
    ]


def count_people(subjects: Iterable[LabelledSubject]) -> int:
    """Return the number of distinct subjects."""
    return len({subject.name for subject in subjects})


def labels_of(subjects: Collection[LabelledSubject]) -> list[str]:
    """Return the distinct labels, sorted."""
    return sorted({subject.label for subject in subjects})
