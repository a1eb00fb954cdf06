"""Join tables and scans to the visits that may take part in a study."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from umbrella_jax.errors import Faults
from umbrella_jax.study.find_scans import FoundScan
from umbrella_jax.study.join import JoinedTables, few
from umbrella_jax.study.patterns import names_in
from umbrella_jax.study.schema import CohortConfig, ScansConfig
from umbrella_jax.study.tables import SUBJECT, VISIT
from umbrella_jax.study.visits import Scan, Visit


@dataclass(frozen=True, slots=True)
class Candidate:
    """A subject at a visit, with scans, who may take part."""

    label: str
    """The subject's, without `sub-`."""
    visit: Visit
    values: dict[str, str]
    """Those of `visit`, to which bins are added."""


def make_candidates(
    config: CohortConfig, tables: JoinedTables, scans: Iterable[FoundScan], notes: list[str], faults: Faults
) -> list[Candidate]:
    """Return the visits with scans whose subjects are in the first table, sorted.

    Args:
        config: which of several scans to use.
        tables: values of subjects and visits.
        scans: of all modalities.
        notes: receives a line about scans that are left out, and about subjects with some scans that name no visit.
        faults: receives a fault for each visit with several scans, if `several` is error.
    """
    labels = tables.first.labels
    groups: dict[tuple[str, str | None], dict[str, list[Scan]]] = defaultdict(dict)
    for owned in scans:
        if owned.subject in labels:
            groups[owned.subject, owned.visit].setdefault(owned.scan.modality, []).append(owned.scan)
    name_of = naming(config, tables)
    placeholders = placeholder_columns(config.scans, tables.first.key)
    surplus: Counter[str] = Counter()
    candidates = []
    for label, visit in sorted(groups, key=natural_visit):
        chosen = {}
        for modality, group in groups[label, visit].items():
            several = config.scans[modality].several
            if len(group) > 1:
                group.sort(key=lambda scan: natural(scan.path))
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
        candidates.append(Candidate(label, Visit(values[SUBJECT], visit, values, chosen), values))
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


def placeholder_columns(scans: Mapping[str, ScansConfig], key: str) -> list[str]:
    """Return the names in patterns that become columns."""
    names = [name for config in scans.values() for name in names_in(config.pattern or "")]
    return [name for name in dict.fromkeys(names) if name not in (SUBJECT, VISIT, key)]


def naming(config: CohortConfig, tables: JoinedTables) -> Callable[[str], str]:
    """Return the function from a label to the subject's name in conversations."""
    if any(scans.bids is not None for scans in config.scans.values()):
        return lambda label: f"sub-{label}"
    rows = tables.first.rows
    return lambda label: rows[label, None].subject if (label, None) in rows else label


def natural_visit(key: tuple[str, str | None]) -> tuple[tuple[tuple[str | int, ...], str], ...]:
    """Return a key that sorts (subject, visit), each as `natural` does."""
    return natural(key[0]), natural(key[1])


@lru_cache(maxsize=1 << 17)
def natural(text: str | None) -> tuple[tuple[str | int, ...], str]:
    """Return a key by which run-2 comes before run-10, and no two texts are equal; nothing comes first."""
    parts = re.split(r"([0-9]+)", text or "")
    return tuple(int(part) if n % 2 else part for n, part in enumerate(parts)), text or ""
