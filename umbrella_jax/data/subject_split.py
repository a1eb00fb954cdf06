"""Which subjects train and which are held out: one split per data set and seed, whatever is asked about them."""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.data.tables import check_columns, is_missing, number_in, read_table, subject_rows
from umbrella_jax.errors import DataError
from umbrella_jax.io.files import PRIVATE, write_whole

SPLITS = "splits.tsv"
"""The file beside conversations that says which subject is in which of them."""


def split_subjects(
    subjects: Mapping[str, Mapping[str, str]], shares: Mapping[str, Fraction], seed: int
) -> dict[str, str]:
    """Assign every subject to a split, balanced over all columns at once.

    Subjects are taken in an order drawn by `seed`. Each goes to one of the splits that are below their share of the
    subjects so far: the one that also lacks the subject's values most, summed over columns (minimisation, Pocock and
    Simon 1975, https://doi.org/10.2307/2529712). So no split is off its share of the subjects by one or more.

    Args:
        subjects: {subject: {column: value}}. Columns of words with more than MAX_CLASSES distinct values are not
            balanced; numbers with more are, in at most ten quantiles. Missing values are balanced too.
        shares: {split: share}, which sum to 1.
        seed: of the order.

    Returns:
        {subject: split}, subjects sorted.
    """
    strata = _strata(subjects)
    order = sorted(subjects)
    random.Random(seed).shuffle(order)
    unit = math.lcm(*(share.denominator for share in shares.values()))  # whole numbers are exact, and much faster
    parts = {name: int(share * unit) for name, share in shares.items()}
    sizes: Counter[str] = Counter()
    seen: Counter[tuple[str, str]] = Counter()
    held: Counter[tuple[str, tuple[str, str]]] = Counter()
    found: dict[str, str] = {}
    left = _quotas(shares, len(order))
    for dealt, subject in enumerate(order, start=1):
        of = strata[subject]
        seen.update(of)
        lags = {name: part * dealt - unit * sizes[name] for name, part in parts.items() if left[name]}
        wants = {
            name: lag + sum(parts[name] * seen[stratum] - unit * held[name, stratum] for stratum in of)
            for name, lag in lags.items()
            if lag > 0 or max(lags.values()) <= 0
        }
        split = max(wants, key=lambda name: wants[name])
        found[subject] = split
        sizes[split] += 1
        left[split] -= 1
        held.update((split, stratum) for stratum in of)
    return dict(sorted(found.items()))


def _quotas(shares: Mapping[str, Fraction], number: int) -> dict[str, int]:
    """Return how many of `number` subjects each split gets: its share, rounded so that the sum is right."""
    quotas = {name: int(share * number) for name, share in shares.items()}
    rest = sorted(shares, key=lambda name: quotas[name] - shares[name] * number)
    for name in rest[: number - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _strata(subjects: Mapping[str, Mapping[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Return the (column, value or quantile) pairs of each subject."""
    strata: dict[str, list[tuple[str, str]]] = {subject: [] for subject in subjects}
    for column in dict.fromkeys(column for cells in subjects.values() for column in cells):
        cells = {subject: of.get(column, "") for subject, of in subjects.items()}
        known = {subject: cell for subject, cell in cells.items() if not is_missing(cell)}
        levels = dict.fromkeys(subjects, "") | known
        if len(set(known.values())) > MAX_CLASSES:
            numbers = {subject: number for subject, cell in known.items() if (number := number_in(cell)) is not None}
            if len(numbers) < len(known):
                continue
            bins = max(min(10, len(numbers) // 5), 1)  # of five subjects at least: finer ones leave nothing to chance
            ranked = sorted(sorted(numbers), key=lambda subject: numbers[subject])
            levels |= {subject: str(rank * bins // len(ranked)) for rank, subject in enumerate(ranked)}
        for subject, level in levels.items():
            strata[subject].append((column, level))
    return strata


def write_splits(path: Path, split_of: Mapping[str, str]) -> None:
    """Write {subject: split} as a table."""
    rows = "".join(f"{subject}\t{split}\n" for subject, split in split_of.items())
    write_whole(path, f"participant_id\tsplit\n{rows}", PRIVATE)


def read_splits(path: Path) -> dict[str, str]:
    """Read {subject: split} as `write_splits` writes it. Raise DataError if it is no such table."""
    table = read_table(path)
    check_columns(table, ("participant_id", "split"))
    found = {subject: cells["split"] for subject, cells in subject_rows(table).items()}
    nameless = [(subject, split) for subject, split in found.items() if not re.fullmatch(r"\w+", split)]
    if nameless:
        raise DataError([f"{path}: {subject}: split: expected a name, got {split!r}" for subject, split in nameless])
    return found


def split_names(split_of: Mapping[str, str]) -> Sequence[str]:
    """Return the splits' names, train first."""
    return sorted(set(split_of.values()), key=lambda name: (name != "train", name))
