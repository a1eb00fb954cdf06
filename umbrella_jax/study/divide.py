"""Divide subjects into folds or by shares, with strata or whole groups.

The algorithms are our own because scikit-learn's splitters do not give these guarantees, and so that a seed gives the
same split with every version:

- StratifiedKFold cuts strata into folds as evenly as `cut_folds`, but refuses a table whose strata all have fewer
  subjects than there are folds. The combinations of several columns often do.
- StratifiedShuffleSplit refuses a stratum of one subject, makes two splits only, and keeps no groups together.
- StratifiedGroupKFold has no shares, and prefers even strata to even sizes.

The tests compare with them where they apply.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from umbrella_jax.data.subject_split import split_sizes

Levels = Mapping[str, Sequence[tuple[str, str]]]
"""{subject: (column, level) pairs that every split gets its share of}."""


def cut_folds(strata: Sequence[Sequence[str]], names: Sequence[str], seed: int) -> dict[str, str]:
    """Return {subject: fold} of equal folds.

    Subjects are sorted by stratum, shuffled inside, and dealt to the folds in turn, so that neither a stratum's counts
    nor the sizes differ by more than one between folds. scikit-learn's StratifiedKFold allocates in the same way.
    """
    dealt = [subject for stratum in _shuffled(strata, random.Random(seed)) for subject in stratum]
    return {subject: names[i % len(names)] for i, subject in enumerate(dealt)}


def _shuffled(strata: Sequence[Sequence[str]], rng: random.Random) -> Iterator[list[str]]:
    for stratum in strata:
        yield rng.sample(stratum, len(stratum))


def divide_strata(strata: Sequence[Sequence[str]], shares: Mapping[str, Fraction], seed: int) -> dict[str, str]:
    """Return {subject: split}; each split has its share of every stratum and of all subjects, to less than one.

    The ideal counts [strata, splits] are rounded up or down with their sums (controlled rounding, Cox 1987,
    https://doi.org/10.1080/01621459.1987.10478456, with the smaller of the two steps instead of a random one).
    Strata come in an order drawn by `seed`, so that chance decides whose remainders are rounded up.
    """
    rng = random.Random(seed)
    members = rng.sample(list(_shuffled(strata, rng)), len(strata))
    unit = math.lcm(*(share.denominator for share in shares.values()))  # whole numbers are exact and fast
    parts = [int(share * unit) for share in shares.values()]
    total = sum(map(len, members))
    # a last row with what the sizes lack to whole numbers lets them be rounded too
    remainders = [[len(stratum) * part % unit for part in parts] for stratum in members]
    remainders.append([-total * part % unit for part in parts])
    _round_with_sums(remainders, unit)
    split_of: dict[str, str] = {}
    for stratum, row in zip(members, remainders, strict=False):
        start = 0
        for name, part, rounded in zip(shares, parts, row, strict=True):
            end = start + len(stratum) * part // unit + rounded // unit
            split_of |= dict.fromkeys(stratum[start:end], name)
            start = end
    return split_of


def _round_with_sums(table: list[list[int]], unit: int) -> None:
    """Round each entry to 0 or `unit` in place, without changing the sums of rows and columns.

    A path from rows to columns and back over entries that are not rounded yet closes soon, since no row or
    column has only one such entry. Raising and lowering the entries along the cycle in turn keeps all sums and rounds
    at least one.

    Args:
        table: entries from 0 to `unit` − 1, whose sums over rows and over columns are multiples of `unit`.
    """
    # row i is node i, column j is node ~j
    neighbours = {i: {~j: None for j, entry in enumerate(row) if entry} for i, row in enumerate(table)}
    for j in range(len(table[0])):
        neighbours[~j] = {i: None for i, row in enumerate(table) if row[j]}
    for start in range(len(table)):
        while neighbours[start]:
            path = [start]
            while (node := next(n for n in neighbours[path[-1]] if n not in path[-2:-1])) not in path:
                path.append(node)
            cycle = [*path[path.index(node) :], node]
            entries = [(max(edge), ~min(edge)) for edge in pairwise(cycle)]
            raised, lowered = entries[::2], entries[1::2]
            up = min(*(unit - table[i][j] for i, j in raised), *(table[i][j] for i, j in lowered))
            down = min(*(table[i][j] for i, j in raised), *(unit - table[i][j] for i, j in lowered))
            step = up if up <= down else -down
            for changed, change in ((raised, step), (lowered, -step)):
                for i, j in changed:
                    table[i][j] += change
                    if table[i][j] in (0, unit):
                        del neighbours[i][~j], neighbours[~j][i]


def divide_groups(
    groups: Sequence[Sequence[str]], levels: Levels, shares: Mapping[str, Fraction], seed: int
) -> dict[str, str]:
    """Return {subject: split} that keeps groups together.

    Groups are assigned from the largest to the smallest, equal ones in an order drawn by `seed`. A group goes to the
    split with room for it where it adds least to the squared differences from the ideal counts of subjects and levels,
    each divided by its ideal; or to the split with most room if it fits nowhere. No split stays empty if there are
    enough groups.
    """
    order = sorted(random.Random(seed).sample(groups, len(groups)), key=len, reverse=True)
    counted = {subject: [None, *levels[subject]] for group in groups for subject in group}
    totals = Counter(level for own in counted.values() for level in own)
    room = split_sizes(shares, len(counted))
    in_split: dict[str, Counter[tuple[str, str] | None]] = {name: Counter() for name in shares}
    split_of: dict[str, str] = {}

    def increase(name: str) -> float:
        share, own = float(shares[name]), in_split[name]
        return sum(
            n * (n + 2 * (own[level] - share * totals[level])) / (share * totals[level]) for level, n in added.items()
        )

    for position, group in enumerate(order):
        added = Counter(level for subject in group for level in counted[subject])
        empty = [name for name in shares if not in_split[name]]
        candidates = empty if len(order) - position <= len(empty) else list(shares)
        fitting = [name for name in candidates if room[name] >= len(group)]
        name = min(fitting, key=increase) if fitting else max(candidates, key=lambda name: room[name])
        split_of |= dict.fromkeys(group, name)
        in_split[name].update(added)
        room[name] -= len(group)
    return split_of
