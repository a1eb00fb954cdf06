"""Split subjects into train, eval and others: one split per data set and seed, whatever the target."""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.data.tables import check_columns, is_missing, parse_cell_number, read_table, subject_rows
from umbrella_jax.errors import DataError

SPLITS = "splits.tsv"
"""Name of the file, beside the conversations, that lists every subject's split."""


def split_subjects(
    levels: Mapping[str, Sequence[tuple[str, str]]], shares: Mapping[str, Fraction], seed: int
) -> dict[str, str]:
    """Assign every subject to a split, balanced over all columns at once.

    Subjects are assigned in an order drawn by `seed`. The candidates for a subject are the splits below their share of
    the subjects so far. The subject goes to the candidate that most lacks its values, summed over columns
    (minimisation, Pocock and Simon 1975, https://doi.org/10.2307/2529712). Every split ends less than one subject away
    from its share.

    Args:
        levels: {subject: (column, level) pairs}, such as `balanced_levels` returns.
        shares: {split: share}, which sum to 1.
        seed: of the order.

    Returns:
        {subject: split}, subjects sorted.
    """
    order = sorted(levels)
    random.Random(seed).shuffle(order)
    unit = math.lcm(
        *(share.denominator for share in shares.values())
    )  # whole numbers are exact and much faster than fractions
    parts = {name: int(share * unit) for name, share in shares.items()}
    sizes: Counter[str] = Counter()
    totals: Counter[tuple[str, str]] = Counter()
    in_split: Counter[tuple[str, tuple[str, str]]] = Counter()
    split_of: dict[str, str] = {}
    places = split_sizes(shares, len(order))
    for assigned, subject in enumerate(order, start=1):
        values = levels[subject]
        totals.update(values)
        deficits = {name: part * assigned - unit * sizes[name] for name, part in parts.items() if places[name]}
        scores = {
            name: deficit + sum(parts[name] * totals[value] - unit * in_split[name, value] for value in values)
            for name, deficit in deficits.items()
            if deficit > 0 or max(deficits.values()) <= 0
        }
        split = max(scores, key=lambda name: scores[name])
        split_of[subject] = split
        sizes[split] += 1
        places[split] -= 1
        in_split.update((split, value) for value in values)
    return dict(sorted(split_of.items()))


def split_sizes(shares: Mapping[str, Fraction], number: int) -> dict[str, int]:
    """Return how many of `number` subjects each split gets: its share, rounded so that the sum is `number`."""
    quotas = {name: int(share * number) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: quotas[name] - shares[name] * number)
    for name in by_remainder[: number - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def balanced_levels(subjects: Mapping[str, Mapping[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Return each subject's (column, level) pairs, for `split_subjects`.

    Columns of more than MAX_CLASSES texts are left out.

    Args:
        subjects: {subject: {column: cell}}.
    """
    levels: dict[str, list[tuple[str, str]]] = {subject: [] for subject in subjects}
    for column in dict.fromkeys(column for row in subjects.values() for column in row):
        cells = {subject: row.get(column, "") for subject, row in subjects.items()}
        of_column = column_levels({subject: "" if is_missing(cell) else cell for subject, cell in cells.items()})
        if len(set(of_column.values())) <= MAX_CLASSES + 1:  # 1 for missing values
            for subject, level in of_column.items():
                levels[subject].append((column, level))
    return levels


def column_levels(cells: Mapping[str, str]) -> dict[str, str]:
    """Return {subject: level} of a column.

    A level is the cell itself, so missing values are a level too. If all others are numbers, and more than MAX_CLASSES
    of them are distinct, it is one of at most ten quantiles.

    Args:
        cells: {subject: cell}, empty for a missing value.
    """
    known = {subject: cell for subject, cell in cells.items() if cell}
    numbers = {subject: number for subject, cell in known.items() if (number := parse_cell_number(cell)) is not None}
    if len(set(known.values())) <= MAX_CLASSES or len(numbers) < len(known):
        return dict(cells)
    # at least five subjects each: finer bins would leave nothing to chance
    bins = max(min(10, len(numbers) // 5), 1)
    ranked = sorted(sorted(numbers), key=lambda subject: numbers[subject])
    return {**cells, **{subject: str(rank * bins // len(ranked)) for rank, subject in enumerate(ranked)}}


def read_splits(path: Path) -> dict[str, str]:
    """Read {subject: split} from a table of participant_id and split. Raise DataError for any other file."""
    table = read_table(path)
    check_columns(table, ("participant_id", "split"))
    split_of = {subject: cells["split"] for subject, cells in subject_rows(table).items()}
    faulty = [(subject, split) for subject, split in split_of.items() if not re.fullmatch(r"\w+", split)]
    if faulty:
        raise DataError([f"{path}: {subject}: split: expected a name, got {split!r}" for subject, split in faulty])
    return split_of


def split_names(split_of: Mapping[str, str]) -> Sequence[str]:
    """Return the names of the splits, train first, the others sorted."""
    return sorted(set(split_of.values()), key=lambda name: (name != "train", name))
