"""Refuse a study whose splits share people or scans, or whose questions give the answers away.

`data validate` searches the written conversations of anyone in the same way (`umbrella_jax.data.validation`).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

from umbrella_jax.config.schema import OPEN_KINDS
from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.data.validation.leaks import LOG_CHANCE, may_be_accident, rows_text
from umbrella_jax.io.reading import sha256
from umbrella_jax.study.cases import CaseReader, row_of
from umbrella_jax.study.schema import StudyConfig
from umbrella_jax.study.visits import Visit

_HEAD = 1 << 16
"""Bytes of each file that are compared first."""
_PAIRS_SHOWN = 10


def split_leaks(study: StudyConfig, visits_of: Mapping[str, Sequence[Visit]]) -> Iterator[str]:
    """Yield a fault for each subject or group that is in two splits.

    Args:
        study: names the group, `split.by`.
        visits_of: {split: its visits}.
    """
    everything = [(split, visit) for split, visits in visits_of.items() for visit in visits]
    by = study.split.by
    kinds: dict[str, Callable[[Visit], str | None]] = {"subject": lambda visit: visit.subject}
    if by != "subject":
        kinds[by] = lambda visit: visit.values.get(by)
    for kind, name_of in kinds.items():
        for name, splits in _shared((split, name_of(visit), visit.place) for split, visit in everything).items():
            where = ", ".join(f"{split} ({rows_text(rows)})" for split, rows in splits.items())
            remedy = "".join(
                f"; if it is another {kind} with the same id, set external.{split}.prefix"
                for split in splits
                if split in study.external
            )
            yield f"split: {kind} {name} is in several splits: {where}; expected it in one only{remedy}"


def _shared(members: Iterable[tuple[str, str | None, str]]) -> dict[str, dict[str, list[str]]]:
    """Return {name: {split: rows}} of names that are in several splits, from (split, name, row)."""
    places: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for split, name, row in members:
        if name is not None:
            places[name].setdefault(split, []).append(row)
    return {name: splits for name, splits in places.items() if len(splits) > 1}


def scan_faults(visits: Iterable[Visit], root: Path) -> Iterator[str]:
    """Yield a fault for each scan that several visits have, and for files with the same content.

    Files of one size are compared by their first bytes, and only files that agree in these as a whole. `data validate`
    goes further: it compares voxels, which may be equal in files with other bytes.
    """
    owners: dict[str, dict[str, None]] = defaultdict(dict)
    for visit in visits:
        for scans in visit.scans.values():
            for scan in scans:
                owners[scan.path][visit.place] = None
    for path, places in owners.items():
        if len(places) > 1:
            yield f"{path}: the scan of {rows_text([*places])} ({len(places):,}); expected a file for each visit"
    for paths in same_contents(owners, root):
        named = [f"{path} ({', '.join(owners[path])})" for path in paths]
        yield (
            f"{named[0]}: the same content as {rows_text(named[1:])}; expected one name for each scan: leave the "
            "copies out, or mend the conversion that wrote them"
        )


def same_contents(paths: Iterable[str], root: Path) -> Iterator[list[str]]:
    """Yield groups of files, or folders of frames, with the same bytes. Files that cannot be read are left out."""
    groups = [[*paths]]
    for fingerprint in (_sizes, _heads, _digests):
        finer: list[list[str]] = []
        for group in groups:
            alike: dict[Hashable, list[str]] = defaultdict(list)
            for path in group:
                with suppress(OSError):  # whoever reads the scans reports it
                    alike[fingerprint(root / path)].append(path)
            finer += (members for members in alike.values() if len(members) > 1)
        groups = finer
    yield from groups


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _sizes(path: Path) -> Hashable:
    return tuple(file.stat().st_size for file in _files(path))


def _heads(path: Path) -> Hashable:
    digest = blake2b()
    for file in _files(path):
        with open(file, "rb") as stream:
            digest.update(stream.read(_HEAD))
    return digest.digest()


def _digests(path: Path) -> Hashable:
    return tuple(map(sha256, _files(path)))


def column_leaks(reader: CaseReader, visits_of: Mapping[str, Sequence[Visit]]) -> Iterator[str]:
    """Yield a fault for each column in a task's texts that is the answer or determines it.

    A column determines a label if each of its values goes with one label, or if its numbers fall apart into a range for
    each label; and a number if it rises or falls with it. The chance that this is an accident must be below 1 in 1,000,
    so a column whose values are all different is judged by its order only.
    """
    task, bins = reader.task, reader.study.bins
    made_of = {name: config.column for name, config in bins.items()}
    if task.kind in OPEN_KINDS:
        answered = {name for text in reader.texts["answer"] for name in text.names}
        asked = {name for part in ("question", "covariates") for t in reader.texts.get(part, ()) for name in t.names}
    else:
        answered, asked = {task.column or ""}, set(reader.text_columns)
    sources = {made_of.get(name, name): name for name in answered}
    for column in sorted(asked):
        target = sources.get(made_of.get(column, column))
        if target is not None and task.value != "change":
            same = "is the answer" if column == target else f"is made of the same values as the answer, {target}"
            reason = f"{same}, so the scan is not needed"
        elif task.kind not in OPEN_KINDS and (how := _determined_by(column, reader, visits_of)):
            reason = f"determines the answer, so the scan is not needed: {how}"
        else:
            continue
        yield f"tasks.{reader.name}: {{{column}}} in the text {reason} ({_all_rows(reader, visits_of)}); take it out"


def _all_rows(reader: CaseReader, visits_of: Mapping[str, Sequence[Visit]]) -> str:
    """Return the number of cases of a task, and the first ones."""
    rows = [row_of(case.visits) for visits in visits_of.values() for case in reader.cases(visits)]
    return f"{len(rows):,}: {rows_text(rows)}"


def _determined_by(column: str, reader: CaseReader, visits_of: Mapping[str, Sequence[Visit]]) -> str | None:
    """Return how a column determines the answer, None if it does not."""
    effect_of: dict[str, str] = {}
    subjects: Counter[str] = Counter()
    pure, last = True, None
    for visits in visits_of.values():
        for case in reader.cases(visits):
            cell, effect = case.answered.values[column], reader.label(case)
            pure = pure and effect_of.setdefault(cell, effect) == effect
            if not pure:
                return None
            if case.subject != last:
                subjects[cell] += 1
            last = case.subject
    effects = Counter[str]()
    for cell, n in subjects.items():
        effects[effect_of[cell]] += n
    if len(effects) < 2:
        return None
    counts = {(cell, effect_of[cell]): n for cell, n in subjects.items()}
    if not may_be_accident(counts):
        shown = [f"{cell} → {effect_of[cell]} ({n:,})" for cell, n in subjects.most_common(_PAIRS_SHOWN)]
        more = len(subjects) - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")
    numbers = {cell: parse_cell_number(cell) for cell in subjects}
    if any(number is None for number in numbers.values()):
        return None
    ordered = [effect_of[cell] for cell in sorted(numbers, key=lambda cell: numbers[cell] or 0.0)]
    return describe_order(ordered, reader.task.kind == "regression")


def describe_order(effects: Sequence[str], is_number: bool) -> str | None:
    """Return how labels or numbers follow the order of another number, None if they may do so by accident.

    Args:
        effects: labels or numbers in that order.
        is_number: whether they are numbers.
    """
    ties = sum(math.lgamma(n + 1) for n in Counter(effects).values())
    orders = math.lgamma(len(effects) + 1) - ties  # log of the number of distinct orders
    if is_number:
        values = [float(effect) for effect in effects]
        rising, falling = values == sorted(values), values == sorted(values, reverse=True)
        if (rising or falling) and orders - math.log(2) > LOG_CHANCE:
            return f"it {'rises' if rising else 'falls'} with it"
        return None
    labels = [*dict.fromkeys(effects)]
    runs = 1 + sum(one != other for one, other in pairwise(effects))
    if runs == len(labels) and orders - math.lgamma(len(labels) + 1) > LOG_CHANCE:
        return f"from low to high it is {', '.join(labels)}"
    return None
