"""Plan an epoch: decide which conversations make each update, and the shape of its batch. Pure arithmetic, no I/O.

An update is A micro-batches of B rows. There are at most six batch shapes, because each is compiled separately. Three
rules keep padding low:

- Conversations that show the same modalities are grouped by length into *buckets*.
- If a bucket's conversations do not fill its last update, the remainder moves up to a longer bucket when that is
  cheaper.
- Conversations that share volumes are put into one micro-batch. A volume is encoded once for all rows of a micro-batch
  on the same device.

The number of updates U in an epoch depends only on the data. The step number is therefore the whole position of a run:
step s is update s mod U of epoch s div U.

**Randomness.** Each (seed, epoch) draws one uniform permutation of the conversations and one uniform order of the
updates. The permutation decides which conversations move up; every conversation of a bucket is equally likely to.
Without shared volumes, a bucket is shuffled by the permutation and cut into updates. With shared volumes, the
permutation decides which conversation begins a micro-batch and which of several equally good ones comes next.
So conversations that share volumes are in one micro-batch far more often than by chance, other pairs less often, and an
update shows fewer subjects. Conversations with different modalities, or of very different lengths, are in one update
only if one of them moved up, or is of a kind too rare for a bucket of its own.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import product
from threading import Lock
from typing import TypeVar

import numpy as np

T = TypeVar("T")

MAX_SHAPES = 6
"""Shapes that a plan may compile."""
# Fewer buckets if conversations share volumes: conversations in different buckets cannot share, and the plan's six
# shapes are also needed for different numbers of volumes.
_BUCKETS_WITH_SHARING = 4
_MIN_SAVING, _MIN_SAVING_WITH_SHARING = 0.01, 0.03
"""Fraction of the total cost that a further bucket, or a further choice of M, must save to be added."""
_REHEARSED = 10_000
"""Conversations that a trial run of the plan covers, in whole epochs, to learn how many volumes updates hold."""
_TARGETS_MULTIPLE = 8
_LOOKAHEAD = 4
"""How many of a volume's conversations to consider next, in units of the micro-batch. A limit is needed because a
reference scan may be in every conversation."""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch. Each distinct shape is compiled once."""

    conversations: int
    """B; rows after the last conversation are empty."""
    positions: int
    """T, see `round_positions`."""
    targets: int
    """K, a multiple of 8."""
    volumes: tuple[tuple[str, int], ...]
    """(modality, M), sorted; M is a multiple of the plan's `parts`. Absent modalities have no entry."""

    def __str__(self) -> str:
        volumes = ", ".join(f"{count} {modality}" for modality, count in self.volumes) or "no volumes"
        return f"{self.conversations} × {self.positions} positions, {self.targets} supervised; {volumes}"


@dataclass(frozen=True)
class ConversationSizes:
    """Everything a plan needs to know about n conversations."""

    lengths: np.ndarray
    """int [n]; positions."""
    targets: np.ndarray
    """int [n]; supervised positions."""
    volumes: Sequence[tuple[int, ...]]
    """[n]; numbers of the distinct volumes that each conversation shows. Equal numbers are one shared volume."""
    modality: Sequence[str]
    """Modality of each volume, by number."""
    patches: Mapping[str, int]
    """{modality: patches of a volume}, the cost of encoding one, in positions."""

    def __len__(self) -> int:
        return len(self.lengths)

    def distinct(self, rows: Iterable[int]) -> Counter[str]:
        """Return {modality: number of distinct volumes that the rows show}."""
        return Counter(self.modality[v] for v in {v for row in rows for v in self.volumes[row]})


@dataclass(frozen=True)
class PlannedUpdate:
    """One update of an epoch."""

    rows: tuple[tuple[int, ...], ...]
    """[A]; the conversations of each micro-batch, at most B. Micro-batches differ by at most one conversation."""
    shape: BatchShape


@dataclass(frozen=True)
class PlanCost:
    """The cost of a plan. `str()` is the text that a run prints after `plan: `."""

    shapes: int
    """Shapes to compile."""
    padding: float
    """Fraction of positions that are padding, empty rows included: 1 − Σ length / Σ B·T. The same in every epoch."""
    volumes: float
    """Volumes encoded per conversation in the first epoch, padding up to M included."""
    shown: float
    """Volumes shown per conversation: the number to encode if none were shared or padded."""

    def __str__(self) -> str:
        return (
            f"{self.shapes} shape{'s' * (self.shapes != 1)} to compile, {self.padding:.1%} of positions padded\n"
            f"      {self.shown:.2f} images per conversation, {self.volumes:.2f} encoded after sharing"
        )


@dataclass(frozen=True)
class _Bucket:
    """Conversations of similar length that show the same modalities."""

    modalities: frozenset[str]
    positions: int
    members: np.ndarray
    """int [n]; its own conversations."""
    patches: int
    """Largest number of patches that one conversation shows."""
    min_saving: int
    """Positions that this bucket must save to be worth a shape of its own."""
    conversations: int = 0
    """Conversations it holds in an epoch, after remainders have moved in from shorter buckets and on to longer ones."""
    updates: int = 0
    moves_to: int | None = None
    """Index of the bucket that takes the remainder; None to keep it here, in updates that are not full."""


class EpochPlan:
    """The updates of every epoch over a set of conversations.

    Args:
        sizes: lengths and volumes of the conversations.
        batch_size: B, conversations of a micro-batch over all devices; a multiple of `parts`.
        accumulate_steps: A, micro-batches of an update.
        seed: decides the order, together with the number of the epoch. Without one, every epoch keeps the order of the
            conversations, as far as buckets and shared volumes allow.
        parts: equal parts to split the B rows (see `rows_by_part`) and the M volumes of a micro-batch into. Each part
            holds the volumes of its own rows, so a volume that rows of two parts show is encoded twice. The grouping
            of conversations does not depend on `parts`.
    """

    def __init__(
        self,
        sizes: ConversationSizes,
        *,
        batch_size: int,
        accumulate_steps: int = 1,
        seed: int | None = None,
        parts: int = 1,
    ):
        self.sizes, self.batch_size, self.accumulate_steps = sizes, batch_size, accumulate_steps
        self.seed, self.parts = seed, parts
        assert batch_size % parts == 0, "the configuration check rejects a mesh that does not divide the batch"
        # In a single pass, a further shape must save at least one update, to make up for its compilation.
        self._buckets = _make_buckets(sizes, batch_size * accumulate_steps, min_updates_saved=int(seed is None))
        self.updates_per_epoch = sum(bucket.updates for bucket in self._buckets)
        self._first = self._compose(0)
        self.shapes = self._make_shapes()
        """Shapes of each bucket in ascending order; the last one holds any update of any epoch."""
        self._lock, self._epoch = Lock(), lru_cache(maxsize=2)(self._make_epoch)

    def update(self, step: int) -> PlannedUpdate:
        """Return the update of a training step."""
        epoch, index = self.locate(step)
        return self.epoch(epoch)[index]

    def num_steps(self, epochs: float) -> int:
        """Return ceil(epochs · updates per epoch)."""
        # Exact arithmetic: in floating point 0.07 * 100 is above 7, which would add a step.
        return math.ceil(Fraction(str(epochs)) * self.updates_per_epoch)

    def first_steps(self) -> dict[str, int]:
        """Return {modality: first step, counted from 1, whose batch shows it} for every modality that is shown."""
        left, first = set(self.sizes.modality), dict[str, int]()
        for step in range(self.updates_per_epoch if left else 0):
            rows = (row for micro in self.update(step).rows for row in micro)
            shown = {self.sizes.modality[volume] for row in rows for volume in self.sizes.volumes[row]} & left
            first |= dict.fromkeys(sorted(shown), step + 1)
            left -= shown
            if not left:
                break
        return first

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the index of its update in that epoch."""
        return divmod(step, self.updates_per_epoch)

    def epoch(self, epoch: int) -> list[PlannedUpdate]:
        """Return the updates of an epoch in order. Each conversation is in exactly one row of one update.

        The last two epochs are cached.
        """
        with self._lock:  # one thread plans an epoch while the others wait
            return self._epoch(epoch)

    def _make_epoch(self, epoch: int) -> list[PlannedUpdate]:
        composed = self._first if epoch == 0 else self._compose(epoch)
        return [PlannedUpdate(rows, self._shape(bucket, rows)) for bucket, rows in composed]

    @cached_property
    def cost(self) -> PlanCost:
        """Return what the plan costs."""
        updates, n = self.epoch(0), len(self.sizes)
        positions = sum(self.accumulate_steps * u.shape.conversations * u.shape.positions for u in updates)
        volumes = sum(self.accumulate_steps * sum(count for _, count in u.shape.volumes) for u in updates)
        return PlanCost(
            shapes=len({shape for shapes in self.shapes for shape in shapes}),
            padding=1 - int(self.sizes.lengths.sum()) / positions,
            volumes=volumes / n,
            shown=sum(map(len, self.sizes.volumes)) / n,
        )

    def _compose(self, epoch: int) -> list[tuple[int, tuple[tuple[int, ...], ...]]]:
        """Return (index of the bucket, rows of each micro-batch) for every update of an epoch, in order."""
        n = len(self.sizes)
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        rank = np.arange(n) if rng is None else rng.permutation(n)
        arrived: list[list[np.ndarray]] = [[bucket.members] for bucket in self._buckets]
        updates = []
        for index, bucket in enumerate(self._buckets):
            members = np.concatenate(arrived[index])
            members = members[np.argsort(rank[members])]
            if bucket.moves_to is not None:
                arrived[bucket.moves_to].append(members[bucket.conversations :])
                members = members[: bucket.conversations]
            # Evenly, because an update of few conversations would move the parameters as far as a full one.
            totals = _even(len(members), bucket.updates)
            sizes = [size for total in totals for size in _even(total, self.accumulate_steps)]
            micro = group_by_shared_volumes(members.tolist(), self.sizes.volumes, sizes)
            for batch in zip(*[micro] * self.accumulate_steps, strict=True):
                updates.append((index, tuple(map(tuple, batch))))
        return updates if rng is None else [updates[i] for i in rng.permutation(len(updates))]

    def _make_shapes(self) -> tuple[tuple[BatchShape, ...], ...]:
        """Return the shapes of each bucket. The first epochs show how many volumes its updates need."""
        epochs = 1 if self.seed is None else max(1, min(8, _REHEARSED // len(self.sizes)))
        needs: dict[int, list[Counter[str]]] = {}
        for epoch in range(epochs):
            for index, rows in self._compose(epoch) if epoch else self._first:
                needs.setdefault(index, []).append(self._needs(rows))
        ladders = {i: _VolumeLadder(self._most_volumes(i), needs[i], self.sizes.patches) for i in sorted(needs)}
        rungs = dict.fromkeys(ladders, 1)
        price = sum(len(needs[i]) * self.batch_size * self._buckets[i].positions + ladders[i].cost(1) for i in needs)
        least = _MIN_SAVING * price
        if self.seed is None:  # in a single pass, a shape must save at least one update
            least = max(least, price / sum(map(len, needs.values())))
        while spare := MAX_SHAPES - sum(rungs.values()):
            # One further rung may save little and a second one much: compare the savings per rung of one or more.
            saving, index, more = max(
                ((ladders[i].cost(rungs[i]) - ladders[i].cost(rungs[i] + more)) / more, i, more)
                for i in ladders
                for more in range(1, spare + 1)
            )
            if saving < least:
                break
            rungs[index] += more
        return tuple(
            tuple(self._bucket_shapes(i, ladders[i].rungs(rungs[i]))) if i in ladders else ()
            for i in range(len(self._buckets))
        )

    def _bucket_shapes(self, index: int, rungs: list[Counter[str]]) -> Iterator[BatchShape]:
        targets = max(int(self.sizes.targets[b.members].max()) for b in self._feeding(index))
        for volumes in dict.fromkeys(_counts(rung) for rung in rungs):
            yield BatchShape(
                conversations=self.batch_size,
                positions=self._buckets[index].positions,
                targets=_multiple(max(targets, 1), _TARGETS_MULTIPLE),
                volumes=volumes,
            )

    def _shape(self, bucket: int, rows: Sequence[Sequence[int]]) -> BatchShape:
        """Return the smallest shape of the bucket that holds the rows."""
        needs = self._needs(rows)
        return next(shape for shape in self.shapes[bucket] if needs <= Counter(dict(shape.volumes)))

    def _needs(self, rows: Sequence[Sequence[int]]) -> Counter[str]:
        """Return {modality: M} that holds these micro-batches. M is a multiple of `parts`, and set by the fullest
        part."""
        needs: Counter[str] = Counter()
        for micro in rows:
            for part in rows_by_part(micro, self.batch_size, self.parts):
                needs |= self.sizes.distinct(part)
        return Counter({m: self.parts * count for m, count in needs.items()})

    def _feeding(self, index: int) -> list[_Bucket]:
        """Return the buckets whose conversations may end up in this one, itself included."""
        feeding = {index}
        for i in reversed(range(index)):
            if self._buckets[i].moves_to in feeding:
                feeding.add(i)
        return [self._buckets[i] for i in sorted(feeding)]

    def _most_volumes(self, index: int) -> Counter[str]:
        """Return {modality: M} that holds any update of any epoch.

        It assumes that a part consists of the rows that show most volumes, but never counts more than exist.
        """
        bucket = self._buckets[index]
        members = np.concatenate([b.members for b in self._feeding(index)]).tolist()
        rows = -(-bucket.conversations // (bucket.updates * self.accumulate_steps))  # rows of the largest micro-batch
        rows = min(rows, self.batch_size // self.parts)  # rows of one part
        volumes, modality, existing = self.sizes.volumes, self.sizes.modality, self.sizes.distinct(members)

        def largest(name: str) -> int:
            return sum(heapq.nlargest(rows, (sum(modality[v] == name for v in volumes[i]) for i in members)))

        return Counter({m: self.parts * min(existing[m], largest(m)) for m in bucket.modalities})


def rows_by_part(rows: Sequence[T], batch_size: int, parts: int) -> list[Sequence[T]]:
    """Split the rows of a micro-batch, at most `batch_size`, into the parts that devices hold; trailing ones may be
    empty."""
    size = batch_size // parts
    return [rows[start : start + size] for start in range(0, batch_size, size)]


def exact_shape(sizes: ConversationSizes) -> BatchShape:
    """Return the shape of one batch with all conversations."""
    return BatchShape(
        conversations=len(sizes),
        positions=round_positions(int(sizes.lengths.max())),
        targets=_multiple(max(int(sizes.targets.max()), 1), _TARGETS_MULTIPLE),
        volumes=_counts(sizes.distinct(range(len(sizes)))),
    )


def round_positions(length: int) -> int:
    """Return T for a length: round up to a multiple of 8, of 16 from 512, 32 from 1024, 64 from 2048, 128 from 4096.

    Less than a 32nd of a row of 256 or more positions is padding, and long rows are a multiple of the tiles of matrix
    units.
    """
    return _multiple(length, min(max(1 << (length.bit_length() - 6), 8), 128) if length >= 256 else 8)


def group_by_shared_volumes(
    order: Sequence[int], volumes: Sequence[tuple[int, ...]], sizes: Iterable[int]
) -> Iterator[list[int]]:
    """Cut `order` into micro-batches of the given sizes, with conversations that share volumes together.

    A micro-batch begins with the first conversation that is left. The next one is a conversation that needs the fewest
    new volumes. Among those that need one new volume, the volume that most others also need is preferred; ties usually
    go to the first in `order`. If no volumes are shared, the result follows `order`. The time is nearly linear in the
    total number of volumes named.

    Grouping the edges of a graph into sets of B that touch few nodes is NP-hard; this is a heuristic.

    Args:
        order: conversations.
        volumes: the volumes of each conversation.
        sizes: number of conversations of each micro-batch.

    Yields:
        The conversations of each micro-batch.
    """
    rank = {c: i for i, c in enumerate(order)}
    waiting: dict[int, list[int]] = {}  # {volume: its conversations, the first in `order` last}
    for c in reversed(order):
        for v in volumes[c]:
            waiting.setdefault(v, []).append(c)
    left, starts = set(order), iter(order)
    for size in sizes:
        batch: list[int] = []
        seen: set[int] = set()
        opens: Counter[int] = Counter()  # {new volume: conversations that need only this one}
        heap: list[tuple[int, int, int, int]] = []
        while len(batch) < size:
            while heap and (heap[0][3] not in left or heap[0][0] != len(_missing(volumes[heap[0][3]], seen))):
                heapq.heappop(heap)
            chosen = heap[0][3] if heap else next(c for c in starts if c in left)
            batch.append(chosen)
            left.remove(chosen)
            new = _missing(volumes[chosen], seen)
            seen.update(new)
            near = {
                c: _missing(volumes[c], seen) for v in new for c in _first_waiting(waiting[v], left, _LOOKAHEAD * size)
            }
            opens.update(missing[0] for missing in near.values() if len(missing) == 1)
            for c, missing in near.items():
                heapq.heappush(heap, (len(missing), -opens[missing[0]] if len(missing) == 1 else 0, rank[c], c))
        yield batch


def _missing(volumes: tuple[int, ...], seen: set[int]) -> list[int]:
    return [v for v in volumes if v not in seen]


def _first_waiting(waiting: list[int], left: set[int], most: int) -> list[int]:
    """Return the first conversations of `waiting` that are still `left`, at most `most`; remove the others from it."""
    if len(waiting) <= most:
        waiting[:] = [c for c in waiting if c in left]
        return waiting[::-1]
    taken: list[int] = []
    while waiting and len(taken) < most:
        if (c := waiting.pop()) in left:
            taken.append(c)
    waiting.extend(reversed(taken))
    return taken


def _make_buckets(sizes: ConversationSizes, update_size: int, min_updates_saved: int) -> list[_Bucket]:
    """Return the cheapest buckets, ordered so that a remainder moves to a later one.

    Args:
        update_size: conversations of a full update.
        min_updates_saved: updates that a further bucket must save.
    """
    members: dict[frozenset[str], list[int]] = {}
    for i, volumes in enumerate(sizes.volumes):
        members.setdefault(frozenset(sizes.modality[v] for v in volumes), []).append(i)
    while len(members) > MAX_SHAPES:  # merge the rarest set of modalities into the most similar one
        rarest = min(members, key=lambda s: (len(members[s]), sorted(s)))
        others = members.keys() - {rarest}
        members = _join(members, rarest, min(others, key=lambda s: (len(s ^ rarest), len(members[s]), sorted(s))))
    rounded = np.array([round_positions(int(length)) for length in sizes.lengths])
    patches = np.array([sum(sizes.patches[sizes.modality[v]] for v in volumes) for volumes in sizes.volumes])
    price = partial(
        _cheapest,
        sizes=sizes,
        rounded=rounded,
        patches=patches,
        update_size=update_size,
        min_positions_saved=min_updates_saved * update_size * (int(rounded.sum() + patches.sum()) // len(sizes)),
    )
    best = price(members)
    while True:  # a few conversations may be cheaper among those that show more modalities
        joined = [_join(members, a, b) for a in members for b in members if a < b]
        priced = [(price(candidate), candidate) for candidate in joined]
        if not priced or (cheapest := min(priced, key=lambda pair: pair[0][:2]))[0][:2] >= best[:2]:
            return best[2]
        best, members = cheapest


def _join(
    members: Mapping[frozenset[str], list[int]], one: frozenset[str], other: frozenset[str]
) -> dict[frozenset[str], list[int]]:
    """Merge two sets of modalities: their conversations become members of the union."""
    joined = {modalities: indices for modalities, indices in members.items() if modalities not in (one, other)}
    joined[one | other] = sorted([*joined.get(one | other, []), *members[one], *members[other]])
    return joined


_PricedBuckets = tuple[int, int, list[_Bucket]]
"""(cost, number of shapes, buckets).

The cost is the number of positions and patches in all rows of an epoch, as if no volumes were shared, plus `min_saving`
of each bucket."""


def _cheapest(
    members: Mapping[frozenset[str], list[int]],
    *,
    sizes: ConversationSizes,
    rounded: np.ndarray,
    patches: np.ndarray,
    update_size: int,
    min_positions_saved: int,
) -> _PricedBuckets:
    """Split each set of modalities by length into the cheapest buckets.

    Args:
        members: {modalities: conversations that show them}.
        rounded: int [n], T of each conversation.
        patches: int [n], patches of each conversation's volumes.
        update_size: conversations of a full update.
        min_positions_saved: least positions that a further bucket must save.
    """
    counted = {m: Counter(v for i in own for v in sizes.volumes[i]) for m, own in members.items()}
    shared = {m for m, counts in counted.items() if max(counts.values(), default=0) > 1}
    most = max(_BUCKETS_WITH_SHARING, len(members)) if shared else MAX_SHAPES
    least = int(rounded.sum() + patches.sum())
    # For each set of modalities, the best bounds for every number of buckets ...
    choices: list[list[list[_Bucket]]] = []
    for modalities, indices in sorted(members.items(), key=lambda item: sorted(item[0])):
        own, share = np.array(indices), _MIN_SAVING_WITH_SHARING if modalities in shared else _MIN_SAVING
        min_saving = max(int(least * share), min_positions_saved)
        values, counts = np.unique(rounded[own], return_counts=True)
        choices.append([])
        for _, bounds in _bounds(values, counts, most):
            place = np.searchsorted(values[bounds], rounded[own])
            parts = [own[place == i] for i in range(len(bounds))]
            choices[-1].append(
                [
                    _Bucket(modalities, int(values[bound]), part, int(patches[part].max()), min_saving)
                    for bound, part in zip(bounds, parts, strict=True)
                ]
            )
    # ... then the cheapest combination, with the cost of remainders.
    priced: list[_PricedBuckets] = []
    for combination in product(*choices):
        if sum(map(len, combination)) <= most:
            buckets = [bucket for part in combination for bucket in part]
            buckets.sort(key=lambda b: (b.positions, len(b.modalities), sorted(b.modalities)))
            priced.append(_settle(buckets, update_size))
    return min(priced, key=lambda p: p[:2])


def _settle(buckets: list[_Bucket], update_size: int) -> _PricedBuckets:
    """Decide for each bucket whether its remainder moves up."""
    targets = [
        next((j for j in range(i + 1, len(buckets)) if buckets[i].modalities <= buckets[j].modalities), None)
        for i in range(len(buckets))
    ]
    best: _PricedBuckets | None = None
    for moves in product(*[(False, True) if target is not None else (False,) for target in targets]):
        counts = [bucket.members.size for bucket in buckets]
        settled, cost = [], 0
        for i, (bucket, move) in enumerate(zip(buckets, moves, strict=True)):
            updates, over = divmod(counts[i], update_size)
            to = targets[i] if move and over else None
            if to is None:
                updates += over > 0
            else:
                counts[i] -= over
                counts[to] += over
            cost += updates * update_size * (bucket.positions + bucket.patches) + bucket.min_saving * (updates > 0)
            settled.append(replace(bucket, conversations=counts[i], updates=updates, moves_to=to))
        shapes = sum(bucket.updates > 0 for bucket in settled)
        if best is None or (cost, shapes) < best[:2]:
            best = cost, shapes, settled
    assert best is not None
    return best


class _VolumeLadder:
    """Possible values of M for one bucket, in ascending order.

    Args:
        most: the top rung, which holds any update.
        needs: {modality: M} of each update of the first epochs; the lower rungs are chosen from these.
        patches: {modality: patches of a volume}.
    """

    def __init__(self, most: Counter[str], needs: Sequence[Counter[str]], patches: Mapping[str, int]):
        def cost(volumes: Counter[str]) -> int:
            return sum(count * patches[m] for m, count in volumes.items())

        # Ascending and nested: a rung that holds an update also holds every cheaper one.
        steps: dict[tuple[tuple[str, int], ...], int] = {}
        held: Counter[str] = Counter()
        for need in sorted(needs, key=cost):
            held |= need
            key = tuple(sorted(held.items()))
            steps[key] = steps.get(key, 0) + 1
        steps.setdefault(tuple(sorted(most.items())), 0)
        self._rungs = [Counter(dict(step)) for step in steps]
        values = np.array([cost(rung) for rung in self._rungs])
        self._choices = _bounds(values, np.array(list(steps.values())), MAX_SHAPES)

    def cost(self, rungs: int) -> int:
        """Return the number of patches encoded in the first epochs if M has this many choices and A is 1."""
        return self._choices[min(rungs, len(self._choices)) - 1][0]

    def rungs(self, number: int) -> list[Counter[str]]:
        """Return the best `number` rungs, ascending."""
        return [self._rungs[i] for i in self._choices[min(number, len(self._choices)) - 1][1]]


def _bounds(values: np.ndarray, counts: np.ndarray, most: int) -> list[tuple[int, list[int]]]:
    """Choose the best upper bounds for ascending `values`, for each number of bounds from 1 to `most`.

    Exact, by dynamic programming over the number of bounds and the last bound.

    Args:
        values: int [n], ascending.
        counts: int [n], how often each value occurs.

    Returns:
        For each number of bounds, the least Σ count · (bound at or above the value), and the indices of the values
        that are bounds. The last value always is one.
    """
    n = len(values)
    total = np.concatenate([[0], np.cumsum(counts)])
    # pieces[j, i]: values[i : j + 1] under the bound values[j]
    pieces = np.where(np.arange(n) <= np.arange(n)[:, None], (total[1:, None] - total[None, :-1]) * values[:, None], 0)
    impossible = np.arange(n) > np.arange(n)[:, None]
    big = np.iinfo(np.int64).max // 4
    before = np.full(n, big)  # the least cost of values[:i] with one bound fewer
    before[0] = 0
    starts: list[np.ndarray] = []
    solutions = []
    for _ in range(min(most, n)):
        costs = np.where(impossible, big, pieces + before)
        start = costs.argmin(1)
        best = costs[np.arange(n), start]
        starts.append(start)
        bounds, j = [], n - 1
        for level in reversed(starts):
            bounds.append(j)
            j = int(level[j]) - 1
        solutions.append((int(best[-1]), bounds[::-1]))
        before = np.concatenate([[big], np.minimum(best[:-1], big)])
    return solutions


def _even(number: int, parts: int) -> list[int]:
    """Split a number into parts that differ by at most one, the larger ones first."""
    return [number // parts + (i < number % parts) for i in range(parts)]


def _counts(volumes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((m, count) for m, count in sorted(volumes.items()) if count)


def _multiple(number: int, factor: int) -> int:
    """Round up to a multiple of `factor`."""
    return -(-number // factor) * factor
