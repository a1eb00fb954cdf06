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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import chain, pairwise, product
from threading import Lock
from typing import TypeVar

import numpy as np

from umbrella_jax.data.ragged import Ragged

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
_FEW = 4
"""Volumes per conversation above which NumPy groups faster than Python."""
_COUNTED = 16
"""Up to how many conversations per volume NumPy counts their seen volumes, in units of the lookahead."""
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
    volumes: Ragged
    """[n]; numbers of the distinct volumes that each conversation shows. Equal numbers are one shared volume."""
    modality: Sequence[str]
    """Modality of each volume, by number."""
    patches: Mapping[str, int]
    """{modality: patches of a volume}, the cost of encoding one, in positions."""

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def names(self) -> list[str]:
        """The modalities that volumes have, sorted."""
        return sorted(set(self.modality))

    @cached_property
    def kinds(self) -> np.ndarray:
        """int64 [volumes]; the index in `names` of each volume's modality."""
        number = {name: index for index, name in enumerate(self.names)}
        return np.array([number[name] for name in self.modality], np.int64)

    @cached_property
    def shown(self) -> np.ndarray:
        """int64 [n, names]; volumes of each modality that each conversation shows."""
        each = [self.volumes.sums(self.kinds == kind) for kind in range(len(self.names))]
        return np.stack(each, axis=1) if each else np.zeros((len(self), 0), np.int64)

    def distinct(self, rows: np.ndarray, groups: np.ndarray, number: int) -> np.ndarray:
        """Count the distinct volumes that groups of rows show.

        Args:
            rows: int [r]; conversations.
            groups: int [r]; the group of each, below `number`.

        Returns:
            int64 [number, names].
        """
        shown = self.volumes.take(rows)
        keys = np.unique(groups[shown.owners] * len(self.modality) + shown.values)
        owners, volumes = np.divmod(keys, max(len(self.modality), 1))
        size = len(self.names)
        return np.bincount(owners * size + self.kinds[volumes], minlength=number * size).reshape(number, size)


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


_Rows = tuple[tuple[int, ...], ...]
"""The conversations of each micro-batch of an update."""


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
            shown = {name for row in rows for name, n in zip(self.sizes.names, self.sizes.shown[row], strict=True) if n}
            shown &= left
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
        needs, buckets = self._needs(composed), np.array([bucket for bucket, _ in composed])
        choice = np.zeros(len(composed), np.int64)  # the smallest shape that holds the rows
        for bucket in set(buckets.tolist()):
            shapes = [dict(shape.volumes) for shape in self.shapes[bucket]]
            room = np.array([[volumes.get(name, 0) for name in self.sizes.names] for volumes in shapes], np.int64)
            fits = (needs[buckets == bucket][:, None] <= room).all(axis=2)
            assert fits.any(axis=1).all(), "the last shape holds any update"
            choice[buckets == bucket] = fits.argmax(axis=1)
        return [
            PlannedUpdate(rows, self.shapes[bucket][shape])
            for (bucket, rows), shape in zip(composed, choice.tolist(), strict=True)
        ]

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
            shown=len(self.sizes.volumes.values) / n,
        )

    def _compose(self, epoch: int) -> list[tuple[int, _Rows]]:
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
            micro = group_by_shared_volumes(members, self.sizes.volumes, sizes)
            for batch in zip(*[micro] * self.accumulate_steps, strict=True):
                updates.append((index, tuple(map(tuple, batch))))
        return updates if rng is None else [updates[i] for i in rng.permutation(len(updates))]

    def _make_shapes(self) -> tuple[tuple[BatchShape, ...], ...]:
        """Return the shapes of each bucket. The first epochs show how many volumes its updates need."""
        epochs = 1 if self.seed is None else max(1, min(8, _REHEARSED // len(self.sizes)))
        composed = [update for epoch in range(epochs) for update in (self._compose(epoch) if epoch else self._first)]
        all_needs, buckets = self._needs(composed), np.array([bucket for bucket, _ in composed])
        needs = {i: all_needs[buckets == i] for i in sorted(set(buckets.tolist()))}
        patches = {name: self.sizes.patches[name] for name in self.sizes.names}
        ladders = {i: _VolumeLadder(self._most_volumes(i), needs[i], patches) for i in needs}
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

    def _needs(self, composed: Sequence[tuple[int, _Rows]]) -> np.ndarray:
        """Return int64 [updates, names]: the M that holds the micro-batches of each update.

        M is a multiple of `parts`, and set by the fullest part.
        """
        batches = [micro for _, rows in composed for micro in rows]
        lengths, size = np.array([len(micro) for micro in batches]), self.batch_size // self.parts
        rows = np.fromiter(chain.from_iterable(batches), np.int64, int(lengths.sum()))
        places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        part = np.repeat(np.arange(len(batches)) * self.parts, lengths) + places // size
        distinct = self.sizes.distinct(rows, part, len(batches) * self.parts)
        parts = self.accumulate_steps * self.parts
        return self.parts * distinct.reshape(len(composed), parts, len(self.sizes.names)).max(axis=1)

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
        members = np.concatenate([b.members for b in self._feeding(index)])
        rows = -(-bucket.conversations // (bucket.updates * self.accumulate_steps))  # rows of the largest micro-batch
        rows = min(rows, self.batch_size // self.parts)  # rows of one part
        existing = self.sizes.distinct(members, np.zeros_like(members), 1)[0]
        shown = self.sizes.shown[members]
        largest = np.sort(shown, axis=0)[-rows:].sum(axis=0)
        most = dict(zip(self.sizes.names, (self.parts * np.minimum(existing, largest)).tolist(), strict=True))
        return Counter({name: most[name] for name in bucket.modalities})


def rows_by_part(rows: Sequence[T], batch_size: int, parts: int) -> list[Sequence[T]]:
    """Split the rows of a micro-batch, at most `batch_size`, into the parts that devices hold; trailing ones may be
    empty."""
    size = batch_size // parts
    return [rows[start : start + size] for start in range(0, batch_size, size)]


def exact_shape(sizes: ConversationSizes, round_length: Callable[[int], int] | None = None) -> BatchShape:
    """Return the shape of one batch with all conversations.

    Args:
        round_length: takes a number of positions to the one to pad to; by default `round_positions`. Supervised
            positions are then padded to 8, 16, 32 and so on, so that such batches have few shapes.
    """
    targets = _multiple(max(int(sizes.targets.max()), 1), _TARGETS_MULTIPLE)
    if round_length is not None:
        targets = _TARGETS_MULTIPLE << (targets // _TARGETS_MULTIPLE - 1).bit_length()
    everything = np.arange(len(sizes))
    return BatchShape(
        conversations=len(sizes),
        positions=(round_length or round_positions)(int(sizes.lengths.max())),
        targets=targets,
        volumes=_counts(dict(zip(sizes.names, sizes.distinct(everything, everything * 0, 1)[0].tolist(), strict=True))),
    )


def round_positions(length: int) -> int:
    """Return T for a length: round up to a multiple of 8, of 16 from 512, 32 from 1024, 64 from 2048, 128 from 4096.

    Less than a 32nd of a row of 256 or more positions is padding, and long rows are a multiple of the tiles of matrix
    units.
    """
    return _multiple(length, min(max(1 << (length.bit_length() - 6), 8), 128) if length >= 256 else 8)


def group_by_shared_volumes(order: np.ndarray, volumes: Ragged, sizes: Sequence[int]) -> Iterator[list[int]]:
    """Cut `order` into micro-batches of the given sizes, with conversations that share volumes together.

    A micro-batch begins with the first conversation that is left. The next one is a conversation that needs the fewest
    new volumes. Among those that need one new volume, the volume that most others also need is preferred; ties usually
    go to the first in `order`. If no volumes are shared, the result follows `order`. The time is nearly linear in the
    total number of volumes named.

    Grouping the edges of a graph into sets of B that touch few nodes is NP-hard; this is a heuristic. A run's batches
    depend on every choice that it makes.

    Args:
        order: int [r]; conversations.
        volumes: the volumes of each conversation.
        sizes: number of conversations of each micro-batch.

    Yields:
        The conversations of each micro-batch.
    """
    shown = volumes.take(order)
    known, numbers = np.unique(shown.values, return_inverse=True)
    shown = Ragged(numbers, shown.ends)
    places: Iterable[list[int]]  # in `order`
    if len(known) == len(numbers):  # none is shared
        ends = np.cumsum(sizes).tolist()
        places = (list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True))
    elif len(numbers) <= _FEW * len(order):
        places = _group_few(shown, len(known), sizes)
    else:
        places = _group_many(shown, len(known), sizes)
    conversations = order.tolist()
    for batch in places:
        yield [conversations[place] for place in batch]


def _group_few(shown: Ragged, number: int, sizes: Iterable[int]) -> Iterator[list[int]]:
    """Group conversations, numbered in their order, that show few of the `number` volumes each."""
    flat, ends = shown.values.tolist(), shown.ends.tolist()
    volumes = [flat[start:end] for start, end in pairwise(ends)]
    waiting: list[list[int]] = [[] for _ in range(number)]  # the conversations of each volume, the first one last
    for c in reversed(range(len(volumes))):
        for v in volumes[c]:
            waiting[v].append(c)
    left, starts = bytearray(b"\1" * len(volumes)), iter(range(len(volumes)))
    for size in sizes:
        batch: list[int] = []
        seen: set[int] = set()
        opens: Counter[int] = Counter()  # {new volume: conversations that need only this one}
        heap: list[tuple[int, int, int]] = []
        while len(batch) < size:
            while heap and not (left[heap[0][2]] and heap[0][0] == len(_missing(volumes[heap[0][2]], seen))):
                heapq.heappop(heap)
            chosen = heap[0][2] if heap else next(c for c in starts if left[c])
            batch.append(chosen)
            left[chosen] = 0
            new = _missing(volumes[chosen], seen)
            seen.update(new)
            near = {
                c: _missing(volumes[c], seen) for v in new for c in _first_waiting(waiting[v], left, _LOOKAHEAD * size)
            }
            for missing in near.values():
                if len(missing) == 1:
                    opens[missing[0]] += 1
            for c, missing in near.items():
                heapq.heappush(heap, (len(missing), -opens[missing[0]] if len(missing) == 1 else 0, c))
        yield batch


def _missing(volumes: Sequence[int], seen: set[int]) -> list[int]:
    return [v for v in volumes if v not in seen]


def _first_waiting(waiting: list[int], left: bytearray, most: int) -> list[int]:
    """Return the first conversations of `waiting` that are still `left`, at most `most`; remove the others from it."""
    if len(waiting) <= most:
        waiting[:] = [c for c in waiting if left[c]]
        return waiting[::-1]
    taken: list[int] = []
    while waiting and len(taken) < most:
        if left[c := waiting.pop()]:
            taken.append(c)
    waiting.extend(reversed(taken))
    return taken


def _group_many(shown: Ragged, number: int, sizes: Iterable[int]) -> Iterator[list[int]]:
    """Group as `_group_few` does, with NumPy, which is faster if conversations show many volumes each."""
    n, waiting = len(shown), _Waiting(shown, number)
    left, starts = np.ones(n, bool), iter(range(n))
    seen, opens = np.zeros(number, bool), np.zeros(number, np.int64)
    needed, hits, slots = shown.lengths, np.zeros(n, np.int64), np.zeros(n, np.int64)
    runs: list[tuple[np.ndarray, int]] = []  # candidates near each conversation of the batch, the best first
    heap: list[tuple[int, int, int, int, int]] = []  # the best of each run that is left

    def push(run: int, place: int) -> None:
        keys, most = runs[run]
        if place < len(keys):
            rest, c = divmod(int(keys[place]), n)
            missing, others = divmod(rest, most + 1)
            heapq.heappush(heap, (missing, others - most, c, run, place))

    for size in sizes:
        batch: list[int] = []
        touched: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # to reset `seen`, `hits` and `opens`
        is_counted = True  # whether `hits` is the number of volumes of a conversation that were seen
        runs.clear()
        heap.clear()
        while len(batch) < size:
            while heap and not (left[heap[0][2]] and heap[0][0] == np.count_nonzero(~seen[shown[heap[0][2]]])):
                *_, run, place = heapq.heappop(heap)
                push(run, place + 1)
            chosen = heap[0][2] if heap else next(c for c in starts if left[c])
            batch.append(chosen)
            left[chosen] = False
            new = shown[chosen]
            new = new[~seen[new]]
            seen[new] = True
            near, everywhere = waiting.find(new, left, _LOOKAHEAD * size)
            opened = near[:0]
            if is_counted := is_counted and everywhere is not None:
                np.add.at(hits, everywhere, 1)
            if len(near):
                slots[near] = np.arange(len(near))
                near = near[slots[near] == np.arange(len(near))]  # each once
                if is_counted:
                    missing = needed[near] - hits[near]
                else:
                    volumes = shown.take(near)
                    missing = np.add.reduceat(~seen[volumes.values], volumes.ends[:-1], dtype=np.int64)
                single = np.flatnonzero(missing == 1)
                opened = shown.take(near[single]).values
                opened = opened[~seen[opened]]
                np.add.at(opens, opened, 1)
                others = np.zeros(len(near), np.int64)
                others[single] = opens[opened]
                most = int(others.max())
                runs.append((np.sort((missing * (most + 1) + most - others) * n + near), most))
                push(len(runs) - 1, 0)
            touched.append((new, near if everywhere is None else everywhere, opened))
        for new, conversations, opened in touched:
            seen[new], hits[conversations], opens[opened] = False, 0, 0
        yield batch


class _Waiting:
    """The conversations of each volume, in order, without most of those that are no longer left."""

    def __init__(self, shown: Ragged, number: int):
        self._conversations = shown.owners[np.argsort(shown.values, kind="stable")]
        self._ends = np.cumsum(np.bincount(shown.values, minlength=number))
        self._starts = np.concatenate([[0], self._ends[:-1]])

    def find(self, volumes: np.ndarray, left: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the first `most` conversations of each volume that are still `left`, and all that are.

        A conversation is there once for each of the volumes. The second is None if they are too many.
        """
        while True:
            starts, stops = self._starts[volumes], self._ends[volumes]
            remaining = stops - starts
            is_whole = bool((remaining <= _COUNTED * most).all())
            lengths = remaining if is_whole else np.minimum(remaining, 2 * most)
            ends = np.concatenate([[0], np.cumsum(lengths)])
            conversations = self._conversations[np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)]
            is_left = left[conversations]
            if is_whole and int(remaining.max(initial=0)) <= most:
                return (conversations[is_left],) * 2
            total = np.concatenate([[0], np.cumsum(is_left)])
            before = total[ends[:-1]]
            is_short = (total[ends[1:]] - before < most) & (remaining > lengths)
            if not is_short.any():
                first = conversations[is_left & (total[1:] - np.repeat(before, lengths) <= most)]
                return first, conversations[is_left] if is_whole else None
            for volume in volumes[is_short].tolist():
                self._drop(volume, left, most)

    def _drop(self, volume: int, left: np.ndarray, most: int) -> None:
        """Remove conversations that are not `left` from the start of a volume, until `most` others are there."""
        start, end, length = int(self._starts[volume]), int(self._ends[volume]), 4 * most
        while True:
            stop = min(start + length, end)
            kept = self._conversations[start:stop]
            kept = kept[left[kept]]
            if len(kept) >= most or stop == end:
                break
            length *= 2
        self._starts[volume] = stop - len(kept)
        self._conversations[stop - len(kept) : stop] = kept


def _make_buckets(sizes: ConversationSizes, update_size: int, min_updates_saved: int) -> list[_Bucket]:
    """Return the cheapest buckets, ordered so that a remainder moves to a later one.

    Args:
        update_size: conversations of a full update.
        min_updates_saved: updates that a further bucket must save.
    """
    bits = (sizes.shown > 0) @ (1 << np.arange(len(sizes.names)))  # a bit for each modality
    kinds, first, kind_of = np.unique(bits, return_index=True, return_inverse=True)
    members = {
        frozenset(name for bit, name in enumerate(sizes.names) if kinds[kind] >> bit & 1): np.flatnonzero(
            kind_of == kind
        )
        for kind in np.argsort(first).tolist()
    }
    while len(members) > MAX_SHAPES:  # merge the rarest set of modalities into the most similar one
        rarest = min(members, key=lambda s: (len(members[s]), sorted(s)))
        others = members.keys() - {rarest}
        members = _join(members, rarest, min(others, key=lambda s: (len(s ^ rarest), len(members[s]), sorted(s))))
    lengths, length_of = np.unique(sizes.lengths, return_inverse=True)
    rounded = np.array([round_positions(length) for length in lengths.tolist()])[length_of]
    patches = sizes.shown @ np.array([sizes.patches[name] for name in sizes.names], np.int64)
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
    members: Mapping[frozenset[str], np.ndarray], one: frozenset[str], other: frozenset[str]
) -> dict[frozenset[str], np.ndarray]:
    """Merge two sets of modalities: their conversations become members of the union."""
    joined = {modalities: indices for modalities, indices in members.items() if modalities not in (one, other)}
    together = [joined[one | other]] if one | other in joined else []
    joined[one | other] = np.sort(np.concatenate([*together, members[one], members[other]]))
    return joined


_PricedBuckets = tuple[int, int, list[_Bucket]]
"""(cost, number of shapes, buckets).

The cost is the number of positions and patches in all rows of an epoch, as if no volumes were shared, plus `min_saving`
of each bucket."""


def _cheapest(
    members: Mapping[frozenset[str], np.ndarray],
    *,
    sizes: ConversationSizes,
    rounded: np.ndarray,
    patches: np.ndarray,
    update_size: int,
    min_positions_saved: int,
) -> _PricedBuckets:
    """Split each set of modalities by length into the cheapest buckets.

    Args:
        members: {modalities: conversations that show them, ascending}.
        rounded: int [n], T of each conversation.
        patches: int [n], patches of each conversation's volumes.
        update_size: conversations of a full update.
        min_positions_saved: least positions that a further bucket must save.
    """
    counts = {m: np.bincount(sizes.volumes.take(own).values) for m, own in members.items()}
    shared = {m for m, each in counts.items() if each.max(initial=0) > 1}
    most = max(_BUCKETS_WITH_SHARING, len(members)) if shared else MAX_SHAPES
    least = int(rounded.sum() + patches.sum())
    # For each set of modalities, the best bounds for every number of buckets ...
    choices: list[list[list[_Bucket]]] = []
    for modalities, own in sorted(members.items(), key=lambda item: sorted(item[0])):
        share = _MIN_SAVING_WITH_SHARING if modalities in shared else _MIN_SAVING
        min_saving = max(int(least * share), min_positions_saved)
        values, frequencies = np.unique(rounded[own], return_counts=True)
        choices.append([])
        for _, bounds in _bounds(values, frequencies, most):
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
        needs: int [updates, modalities]; M of each update of the first epochs. The lower rungs are chosen from these.
        patches: {modality: patches of a volume}, in the order of the columns of `needs`.
    """

    def __init__(self, most: Counter[str], needs: np.ndarray, patches: Mapping[str, int]):
        def cost(volumes: Counter[str]) -> int:
            return sum(count * patches[m] for m, count in volumes.items())

        # Ascending and nested: a rung that holds an update also holds every cheaper one.
        order = np.argsort(needs @ np.array([*patches.values()], np.int64), kind="stable")
        held = np.maximum.accumulate(needs[order])
        starts = np.flatnonzero(np.concatenate([[True], (held[1:] != held[:-1]).any(axis=1)]))
        updates = np.diff([*starts.tolist(), len(held)]).tolist()
        steps = {
            _counts(dict(zip(patches, rung, strict=True))): number
            for rung, number in zip(held[starts].tolist(), updates, strict=True)
        }
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
