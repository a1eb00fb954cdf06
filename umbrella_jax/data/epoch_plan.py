"""The plan of an epoch: which conversations make an update, and of what shape. Numbers in, numbers out; no I/O.

An update is A micro-batches of B rows; all of them have one of at most six shapes, since each compiles anew. So that
little of a shape is padding,

- conversations that show the same modalities are grouped by length into *buckets*;
- what a bucket has over, short of a whole update, moves up into a longer bucket where that costs less;
- conversations that share volumes come together, and a volume is encoded once for all rows of a micro-batch that lie
  on one device.

How many updates a bucket makes depends on the data alone, so every epoch has equally many, and the position of a run
is the step alone: step s is update s mod U of epoch s div U.

**What is random.** One uniform permutation per (seed, epoch) is all the randomness but for the order of updates, which
is uniform. It says who moves up: each conversation of a bucket is as likely to. Without shared volumes a bucket's
order is that permutation: a uniform shuffle, cut into updates. With shared volumes it says where a micro-batch begins
and which of equally good conversations comes next; then conversations that share volumes are in one micro-batch far
more often than by chance, those that share none more rarely, and an update shows fewer subjects. Conversations of
different modalities or of very different lengths are never in one update, but for those that moved up and for kinds
of which there are too few for a bucket of their own.
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
# Where volumes are shared, fewer buckets: they part those who share, and the other shapes tell apart how many distinct
# volumes an update holds.
_BUCKETS_WITH_SHARING = 4
_WORTH, _WORTH_WITH_SHARING = 0.01, 0.03  # a bucket more, or choice of M, saves that share of the cost at least
_REHEARSED = 10_000  # conversations, in whole epochs, from which it is learnt how many volumes updates hold
_TARGETS_MULTIPLE = 8
_LOOK = 4  # how many waiting conversations of a volume are looked at, in micro-batches: a reference of all has many


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch; each new one compiles anew."""

    conversations: int
    """B; rows behind the last conversation are empty."""
    positions: int
    """T, see `round_positions`."""
    targets: int
    """K, a multiple of 8."""
    volumes: tuple[tuple[str, int], ...]
    """(modality, M) in sorted order; M is a multiple of the plan's parts. Absent modalities have no entry."""

    def __str__(self) -> str:
        volumes = ", ".join(f"{count} {modality}" for modality, count in self.volumes) or "no volumes"
        return f"{self.conversations} × {self.positions} positions, {self.targets} supervised; {volumes}"


@dataclass(frozen=True)
class Facts:
    """What a plan knows of n conversations."""

    lengths: np.ndarray
    """int [n]; positions."""
    targets: np.ndarray
    """int [n]; supervised positions."""
    volumes: Sequence[tuple[int, ...]]
    """[n]; the distinct volumes of each, by number. Two conversations share a volume by naming the same number."""
    modality: Sequence[str]
    """Of each volume, by number."""
    patches: Mapping[str, int]
    """Of a volume, by modality: what encoding it costs, in positions."""

    def __len__(self) -> int:
        return len(self.lengths)

    def distinct(self, rows: Iterable[int]) -> Counter[str]:
        """{modality: how many distinct volumes the rows show}."""
        return Counter(self.modality[v] for v in {v for row in rows for v in self.volumes[row]})


@dataclass(frozen=True)
class Update:
    """One update of an epoch."""

    rows: tuple[tuple[int, ...], ...]
    """Conversations of each of the A micro-batches, at most B; their numbers differ by one at most."""
    shape: BatchShape


@dataclass(frozen=True)
class Report:
    """What a plan costs; `str` says it, below `plan: `."""

    shapes: int
    padding: float
    """Share of positions in which nothing stands, those of empty rows included: 1 − Σ length / Σ B·T. In each epoch."""
    volumes: float
    """Volumes encoded per conversation, padding up to M included, in the first epoch."""
    shown: float
    """Volumes that a conversation shows: what would be encoded if none were shared and none padded."""

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
    """Of the volumes of a conversation, at most."""
    worth: int
    """Positions that one bucket more has to save."""
    conversations: int = 0
    """How many an epoch has here, those that moved here counted, those that moved on not."""
    updates: int = 0
    moves_to: int | None = None
    """The bucket that takes what is over; None: updates are not all full then."""


class Plan:
    """All epochs over some conversations.

    Args:
        batch_size: B, conversations of a micro-batch over all devices.
        accumulate_steps: A, micro-batches of an update.
        seed: with the number of the epoch, decides the order; None: always that of the conversations, as far as
            buckets and shared volumes leave it.
        parts: into so many, one after the other, `cut` takes the B rows of a micro-batch, and as many equal parts the
            M volumes; each part has the volumes of its own rows, so one that rows of several show is encoded in each.
            B is a multiple of it. Which conversations come together does not depend on it.
    """

    def __init__(
        self, facts: Facts, *, batch_size: int, accumulate_steps: int = 1, seed: int | None = None, parts: int = 1
    ):
        self.facts, self.batch_size, self.accumulate_steps = facts, batch_size, accumulate_steps
        self.seed, self.parts = seed, parts
        assert batch_size % parts == 0, "a mesh that does not divide the batch is refused before"
        # A shape of a single pass has to be worth an update at least: compiling takes longer than one.
        self._buckets = _make_buckets(facts, batch_size * accumulate_steps, updates_worth=int(seed is None))
        self.updates_per_epoch = sum(bucket.updates for bucket in self._buckets)
        self._first = self._compose(0)
        self.shapes = self._make_shapes()
        """Of each bucket, from the smallest to the one that holds whatever an epoch brings."""
        self._lock, self._epoch = Lock(), lru_cache(maxsize=2)(self._made)

    def update(self, step: int) -> Update:
        """Of a step."""
        epoch, place = self.place(step)
        return self.epoch(epoch)[place]

    def num_steps(self, epochs: float) -> int:
        """ceil(epochs · updates per epoch)."""
        # Exact: in floating point 0.07 * 100 lies above 7, which would add a step.
        return math.ceil(Fraction(str(epochs)) * self.updates_per_epoch)

    def first_steps(self) -> dict[str, int]:
        """Return {modality: the first step, counted from 1, whose batch shows one}, for all that are shown at all."""
        left, found = set(self.facts.modality), dict[str, int]()
        for step in range(self.updates_per_epoch if left else 0):
            rows = (row for micro in self.update(step).rows for row in micro)
            shown = {self.facts.modality[volume] for row in rows for volume in self.facts.volumes[row]} & left
            found |= dict.fromkeys(sorted(shown), step + 1)
            left -= shown
            if not left:
                break
        return found

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and which of its updates it is."""
        return divmod(step, self.updates_per_epoch)

    def epoch(self, epoch: int) -> list[Update]:
        """The updates of one epoch in order: each conversation in exactly one row of one of them. The last two are
        kept."""
        with self._lock:  # one thread plans an epoch, the others wait for it
            return self._epoch(epoch)

    def _made(self, epoch: int) -> list[Update]:
        composed = self._first if epoch == 0 else self._compose(epoch)
        return [Update(rows, self._shape(bucket, rows)) for bucket, rows in composed]

    @cached_property
    def report(self) -> Report:
        """What it costs."""
        updates, n = self.epoch(0), len(self.facts)
        positions = sum(self.accumulate_steps * u.shape.conversations * u.shape.positions for u in updates)
        volumes = sum(self.accumulate_steps * sum(count for _, count in u.shape.volumes) for u in updates)
        return Report(
            shapes=len({shape for shapes in self.shapes for shape in shapes}),
            padding=1 - int(self.facts.lengths.sum()) / positions,
            volumes=volumes / n,
            shown=sum(map(len, self.facts.volumes)) / n,
        )

    def _compose(self, epoch: int) -> list[tuple[int, tuple[tuple[int, ...], ...]]]:
        """(bucket, rows of each micro-batch) of every update in order."""
        n = len(self.facts)
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
            # Evenly: an update of few conversations would move the parameters as far as a full one.
            totals = _even(len(members), bucket.updates)
            sizes = [size for total in totals for size in _even(total, self.accumulate_steps)]
            micro = gather(members.tolist(), self.facts.volumes, sizes)
            for batch in zip(*[micro] * self.accumulate_steps, strict=True):
                updates.append((index, tuple(map(tuple, batch))))
        return updates if rng is None else [updates[i] for i in rng.permutation(len(updates))]

    def _make_shapes(self) -> tuple[tuple[BatchShape, ...], ...]:
        """The shapes of each bucket. How many volumes its updates will hold is learnt from the first epochs."""
        epochs = 1 if self.seed is None else max(1, min(8, _REHEARSED // len(self.facts)))
        needs: dict[int, list[Counter[str]]] = {}
        for epoch in range(epochs):
            for index, rows in self._compose(epoch) if epoch else self._first:
                needs.setdefault(index, []).append(self._needs(rows))
        ladders = {i: _VolumeLadder(self._most_volumes(i), needs[i], self.facts.patches) for i in sorted(needs)}
        rungs = dict.fromkeys(ladders, 1)
        price = sum(len(needs[i]) * self.batch_size * self._buckets[i].positions + ladders[i].cost(1) for i in needs)
        least = _WORTH * price
        if self.seed is None:  # a single pass: compiling takes longer than an update
            least = max(least, price / sum(map(len, needs.values())))
        while spare := MAX_SHAPES - sum(rungs.values()):
            # The next rung may save little and the one behind it much, so steps of several are looked at.
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
        targets = max(int(self.facts.targets[b.members].max()) for b in self._feeding(index))
        for volumes in dict.fromkeys(_counts(rung) for rung in rungs):
            yield BatchShape(
                conversations=self.batch_size,
                positions=self._buckets[index].positions,
                targets=_multiple(max(targets, 1), _TARGETS_MULTIPLE),
                volumes=volumes,
            )

    def _shape(self, bucket: int, rows: Sequence[Sequence[int]]) -> BatchShape:
        """The bucket's smallest that holds the rows."""
        needs = self._needs(rows)
        return next(shape for shape in self.shapes[bucket] if needs <= Counter(dict(shape.volumes)))

    def _needs(self, rows: Sequence[Sequence[int]]) -> Counter[str]:
        """{modality: M that holds the part of a micro-batch that shows most, in each part}."""
        needs: Counter[str] = Counter()
        for micro in rows:
            for part in cut(micro, self.batch_size, self.parts):
                needs |= self.facts.distinct(part)
        return Counter({m: self.parts * count for m, count in needs.items()})

    def _feeding(self, index: int) -> list[_Bucket]:
        """The buckets whose conversations may come into this one, itself included."""
        feeding = {index}
        for i in reversed(range(index)):
            if self._buckets[i].moves_to in feeding:
                feeding.add(i)
        return [self._buckets[i] for i in sorted(feeding)]

    def _most_volumes(self, index: int) -> Counter[str]:
        """{modality: M that holds whatever an epoch brings}: the rows that show most, or all volumes there are."""
        bucket = self._buckets[index]
        members = np.concatenate([b.members for b in self._feeding(index)]).tolist()
        rows = -(-bucket.conversations // (bucket.updates * self.accumulate_steps))  # of a micro-batch, at most
        rows = min(rows, self.batch_size // self.parts)  # of a part
        volumes, modality, exist = self.facts.volumes, self.facts.modality, self.facts.distinct(members)

        def largest(name: str) -> int:
            return sum(heapq.nlargest(rows, (sum(modality[v] == name for v in volumes[i]) for i in members)))

        return Counter({m: self.parts * min(exist[m], largest(m)) for m in bucket.modalities})


def cut(rows: Sequence[T], batch_size: int, parts: int) -> list[Sequence[T]]:
    """The rows of a micro-batch, at most `batch_size`, part by part as devices hold them; the last may be empty."""
    size = batch_size // parts
    return [rows[start : start + size] for start in range(0, batch_size, size)]


def exact_shape(facts: Facts) -> BatchShape:
    """The shape that holds all conversations in one batch."""
    return BatchShape(
        conversations=len(facts),
        positions=round_positions(int(facts.lengths.max())),
        targets=_multiple(max(int(facts.targets.max()), 1), _TARGETS_MULTIPLE),
        volumes=_counts(facts.distinct(range(len(facts)))),
    )


def round_positions(length: int) -> int:
    """T of rows of that length: up to a multiple of 8, of 16 from 512 on, 32 from 1024, 64 from 2048, 128 from 4096.

    At most a 32nd is padding (an 8th below 64), and long rows are a multiple of the tiles of matrix units.
    """
    return _multiple(length, min(max(1 << (length.bit_length() - 6), 8), 128) if length >= 256 else 8)


def gather(order: Sequence[int], volumes: Sequence[tuple[int, ...]], sizes: Iterable[int]) -> Iterator[list[int]]:
    """Cuts `order` into micro-batches of `sizes`, so that conversations that share volumes come together.

    A micro-batch begins with the first conversation that is left. Whoever needs the fewest volumes that are not there
    yet comes next; of those that need one, whose volume lets most others in; of those, as a rule the first in `order`.
    Where nothing is shared, that is `order` itself. Time is near linear in the number of names of volumes.

    The problem (edges of a graph into groups of B that touch few nodes) is NP-hard; this is a heuristic.
    """
    rank = {c: i for i, c in enumerate(order)}
    waiting: dict[int, list[int]] = {}  # by volume, the first in `order` at the end
    for c in reversed(order):
        for v in volumes[c]:
            waiting.setdefault(v, []).append(c)
    left, starts = set(order), iter(order)
    for size in sizes:
        batch: list[int] = []
        seen: set[int] = set()
        opens: Counter[int] = Counter()  # by volume that is not there yet, how many need it alone
        heap: list[tuple[int, int, int, int]] = []
        while len(batch) < size:
            while heap and (heap[0][3] not in left or heap[0][0] != len(_missing(volumes[heap[0][3]], seen))):
                heapq.heappop(heap)
            chosen = heap[0][3] if heap else next(c for c in starts if c in left)
            batch.append(chosen)
            left.remove(chosen)
            new = _missing(volumes[chosen], seen)
            seen.update(new)
            near = {c: _missing(volumes[c], seen) for v in new for c in _first_waiting(waiting[v], left, _LOOK * size)}
            opens.update(missing[0] for missing in near.values() if len(missing) == 1)
            for c, missing in near.items():
                heapq.heappush(heap, (len(missing), -opens[missing[0]] if len(missing) == 1 else 0, rank[c], c))
        yield batch


def _missing(volumes: tuple[int, ...], seen: set[int]) -> list[int]:
    return [v for v in volumes if v not in seen]


def _first_waiting(waiting: list[int], left: set[int], most: int) -> list[int]:
    """The first few that are left; those that are not are forgotten."""
    if len(waiting) <= most:
        waiting[:] = [c for c in waiting if c in left]
        return waiting[::-1]
    found: list[int] = []
    while waiting and len(found) < most:
        if (c := waiting.pop()) in left:
            found.append(c)
    waiting.extend(reversed(found))
    return found


def _make_buckets(facts: Facts, update_size: int, updates_worth: int) -> list[_Bucket]:
    """The cheapest buckets, in the order in which what is over may move up. One more saves so many updates at least."""
    members: dict[frozenset[str], list[int]] = {}
    for i, volumes in enumerate(facts.volumes):
        members.setdefault(frozenset(facts.modality[v] for v in volumes), []).append(i)
    while len(members) > MAX_SHAPES:  # the rarest joins those whose modalities it adds least to
        rarest = min(members, key=lambda s: (len(members[s]), sorted(s)))
        others = members.keys() - {rarest}
        members = _join(members, rarest, min(others, key=lambda s: (len(s ^ rarest), len(members[s]), sorted(s))))
    rounded = np.array([round_positions(int(length)) for length in facts.lengths])
    patches = np.array([sum(facts.patches[facts.modality[v]] for v in volumes) for volumes in facts.volumes])
    price = partial(
        _cheapest,
        facts=facts,
        rounded=rounded,
        patches=patches,
        update_size=update_size,
        least_worth=updates_worth * update_size * (int(rounded.sum() + patches.sum()) // len(facts)),
    )
    best = price(members)
    while True:  # a few may be cheaper among those that show more
        joined = [_join(members, a, b) for a in members for b in members if a < b]
        found = [(price(candidate), candidate) for candidate in joined]
        if not found or (nearest := min(found, key=lambda f: f[0][:2]))[0][:2] >= best[:2]:
            return best[2]
        best, members = nearest


def _join(
    members: Mapping[frozenset[str], list[int]], one: frozenset[str], other: frozenset[str]
) -> dict[frozenset[str], list[int]]:
    """With both as conversations of the union of their modalities."""
    joined = {modalities: indices for modalities, indices in members.items() if modalities not in (one, other)}
    joined[one | other] = sorted([*joined.get(one | other, []), *members[one], *members[other]])
    return joined


Priced = tuple[int, int, list[_Bucket]]
"""(Σ over rows of an epoch of T and the patches that are encoded for it, as if nothing were shared, and what the
buckets have to be worth; number of shapes; the buckets)"""


def _cheapest(
    members: Mapping[frozenset[str], list[int]],
    *,
    facts: Facts,
    rounded: np.ndarray,
    patches: np.ndarray,
    update_size: int,
    least_worth: int,
) -> Priced:
    """Cuts each set of modalities by length. Of each conversation, `rounded` is T, int [n], `patches` its volumes'."""
    counted = {m: Counter(v for i in own for v in facts.volumes[i]) for m, own in members.items()}
    shared = {m for m, counts in counted.items() if max(counts.values(), default=0) > 1}
    most = max(_BUCKETS_WITH_SHARING, len(members)) if shared else MAX_SHAPES
    least = int(rounded.sum() + patches.sum())
    # Of each set the best bounds for every number of buckets ...
    choices: list[list[list[_Bucket]]] = []
    for modalities, indices in sorted(members.items(), key=lambda item: sorted(item[0])):
        own, share = np.array(indices), _WORTH_WITH_SHARING if modalities in shared else _WORTH
        worth = max(int(least * share), least_worth)
        values, counts = np.unique(rounded[own], return_counts=True)
        choices.append([])
        for _, bounds in _bounds(values, counts, most):
            place = np.searchsorted(values[bounds], rounded[own])
            parts = [own[place == i] for i in range(len(bounds))]
            choices[-1].append(
                [
                    _Bucket(modalities, int(values[bound]), part, int(patches[part].max()), worth)
                    for bound, part in zip(bounds, parts, strict=True)
                ]
            )
    # ... and of all combinations, what is over counted in, the cheapest.
    priced: list[Priced] = []
    for combination in product(*choices):
        if sum(map(len, combination)) <= most:
            buckets = [bucket for part in combination for bucket in part]
            buckets.sort(key=lambda b: (b.positions, len(b.modalities), sorted(b.modalities)))
            priced.append(_settle(buckets, update_size))
    return min(priced, key=lambda p: p[:2])


def _settle(buckets: list[_Bucket], update_size: int) -> Priced:
    """Decides of each bucket whether what is over moves up."""
    targets = [
        next((j for j in range(i + 1, len(buckets)) if buckets[i].modalities <= buckets[j].modalities), None)
        for i in range(len(buckets))
    ]
    best: Priced | None = None
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
            cost += updates * update_size * (bucket.positions + bucket.patches) + bucket.worth * (updates > 0)
            settled.append(replace(bucket, conversations=counts[i], updates=updates, moves_to=to))
        shapes = sum(bucket.updates > 0 for bucket in settled)
        if best is None or (cost, shapes) < best[:2]:
            best = cost, shapes, settled
    assert best is not None
    return best


class _VolumeLadder:
    """A bucket's choices of M. The top one holds whatever comes; those below it, what the first epochs need."""

    def __init__(self, most: Counter[str], needs: Sequence[Counter[str]], patches: Mapping[str, int]):
        def cost(volumes: Counter[str]) -> int:
            return sum(count * patches[m] for m, count in volumes.items())

        # Ascending and nested: a rung that holds an update holds all before it.
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
        """Patches encoded in those epochs, of one micro-batch per update."""
        return self._choices[min(rungs, len(self._choices)) - 1][0]

    def rungs(self, number: int) -> list[Counter[str]]:
        """That many, ascending."""
        return [self._rungs[i] for i in self._choices[min(number, len(self._choices)) - 1][1]]


def _bounds(values: np.ndarray, counts: np.ndarray, most: int) -> list[tuple[int, list[int]]]:
    """Upper bounds for ascending `values`, of which there are `counts`: for each number of bounds from 1 to `most`
    the least Σ count · (bound above it), and which values are the bounds. The last value always is.

    Exact: dynamic programming over the number of bounds and the last of them.
    """
    n = len(values)
    total = np.concatenate([[0], np.cumsum(counts)])
    # pieces[j, i]: values[i : j + 1] under the bound values[j]
    pieces = np.where(np.arange(n) <= np.arange(n)[:, None], (total[1:, None] - total[None, :-1]) * values[:, None], 0)
    impossible = np.arange(n) > np.arange(n)[:, None]
    big = np.iinfo(np.int64).max // 4
    before = np.full(n, big)  # best cost of values[:i] with one bound fewer
    before[0] = 0
    starts: list[np.ndarray] = []
    found = []
    for _ in range(min(most, n)):
        costs = np.where(impossible, big, pieces + before)
        start = costs.argmin(1)
        best = costs[np.arange(n), start]
        starts.append(start)
        bounds, j = [], n - 1
        for level in reversed(starts):
            bounds.append(j)
            j = int(level[j]) - 1
        found.append((int(best[-1]), bounds[::-1]))
        before = np.concatenate([[big], np.minimum(best[:-1], big)])
    return found


def _even(number: int, parts: int) -> list[int]:
    """Sizes of parts that differ by one at most, the larger ones first."""
    return [number // parts + (i < number % parts) for i in range(parts)]


def _counts(volumes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((m, count) for m, count in sorted(volumes.items()) if count)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
