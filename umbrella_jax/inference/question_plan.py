"""Plan the answers to a data set: read shared beginnings once, encode each volume once. Pure arithmetic, no I/O.

Prompts about the same images often begin alike, since the images come before the question. Such prompts share a
*context*: their images, and all text before the first token in which they differ. A row of a batch holds one context,
which is read once; its questions follow one after the other, in as many rounds as the row with most questions has.

Volumes are encoded ahead of the batches that show them, a few at a time and whatever batch shows them. Their features
are kept in numbered slots on the devices until no later batch needs them.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import zip_longest
from typing import Any

import numpy as np

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.epoch_plan import ConversationSizes, EpochPlan, round_positions, rows_by_part
from umbrella_jax.data.ragged import Ragged
from umbrella_jax.data.tokenize import Encoded

_MIN_SAVING = 0.25
"""Fraction of all positions that shared contexts must save, to be worth the further program that they need."""
_MOST_BYTES = 2**28
"""Largest size of all features that are kept, unless a batch needs more."""
_MAX_CHOICES = 16
"""Numbers of rounds that are compared."""


@dataclass(frozen=True)
class Context:
    """The shared beginning of some prompts, and the prompts."""

    prompt: int
    """Number of a prompt that begins with it."""
    length: int
    """Positions of the context."""
    questions: tuple[int, ...]
    """Numbers of the prompts, in the order in which they are asked."""
    place: int
    """Orders contexts by the first appearance of the images that they show."""


@dataclass(frozen=True)
class QuestionBatch:
    """Contexts that are read together, one per row."""

    positions: int
    """T of the contexts."""
    question_positions: int
    """T of the questions; 0 if each context is a whole prompt."""
    contexts: tuple[Context, ...]
    """The contexts of the first rows; the remaining rows are empty."""

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes that decide, with the number of rows, which programs the batch needs."""
        return self.positions, self.question_positions

    def rounds(self) -> Iterator[list[int | None]]:
        """Yield for each round the number of the prompt that each context asks about; None if it has no more."""
        for number in range(max(len(context.questions) for context in self.contexts)):
            yield [c.questions[number] if number < len(c.questions) else None for c in self.contexts]


@dataclass(frozen=True)
class QuestionPlan:
    """The batches in which prompts are answered, those about the same volumes close together."""

    prompts: Sequence[Encoded]
    modalities: Mapping[str, ModalityConfig]
    batch_size: int
    """Rows of a batch, over all devices."""
    parts: int
    """Equal parts into which the rows are split (`Parts`)."""
    batches: Sequence[QuestionBatch]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Encoded],
        modalities: Mapping[str, ModalityConfig],
        *,
        batch_size: int,
        max_new_tokens: int,
        parts: int = 1,
    ) -> "QuestionPlan":
        """Return the plan of all prompts; `parts` must divide `batch_size`.

        Args:
            max_new_tokens: largest number of tokens of an answer.
        """
        lengths = [len(prompt) for prompt in prompts]
        groups, rounds = _by_context(prompts, modalities), 1
        saved = sum(length * (len(own) - 1) for length, own in groups)
        # Only contexts show images, so each prompt needs a token after its last one.
        is_shared = saved >= _MIN_SAVING * sum(lengths) and all(
            _images_end(prompt, modalities) < len(prompt) for prompt in prompts
        )
        if is_shared:
            rounds = _best_rounds(groups, lengths, batch_size, max_new_tokens)
        else:
            groups = [(length, [number]) for number, length in enumerate(lengths)]
        appeared: dict[Image, int] = {}
        contexts = list[Context]()
        for length, questions in groups:
            shown = prompts[questions[0]].images
            place = max((appeared.setdefault(image, len(appeared)) for image in shown), default=len(appeared))
            rows = -(-len(questions) // rounds)
            for first in range(rows):  # the longest questions first, so that those of a round are about equally long
                own = sorted(questions[first::rows], key=lambda number: (-lengths[number], number))
                contexts.append(Context(own[0], length, tuple(own), place))
        # rows with about as many questions together, so that few are idle in the last rounds
        contexts.sort(key=lambda context: (-len(context.questions), context.place))
        sizes = ConversationSizes(
            lengths=np.array([context.length for context in contexts]),
            targets=np.zeros(len(contexts), int),
            volumes=Ragged.from_rows([()] * len(contexts)),
            modality=(),
            patches={},
        )
        planned = EpochPlan(sizes, batch_size=batch_size, parts=parts).epoch(0)
        longest: dict[int, int] = {}
        for update in planned:
            rest = max(lengths[own.questions[0]] - own.length for own in (contexts[i] for i in update.rows[0]))
            longest[update.shape.positions] = max(longest.get(update.shape.positions, 1), rest)
        batches = [
            QuestionBatch(
                positions=update.shape.positions,
                question_positions=round_positions(longest[update.shape.positions]) if is_shared else 0,
                contexts=tuple(contexts[i] for i in update.rows[0]),
            )
            for update in planned
        ]
        return cls(prompts, modalities, batch_size, parts, _ordered(batches))

    def only(self, numbers: Sequence[int]) -> "QuestionPlan":
        """Return the plan of some of the prompts; its batches have shapes of this plan."""
        requested, left = set(numbers), defaultdict[tuple[int, int], list[Context]](list)
        for batch in self.batches:
            for context in batch.contexts:
                if questions := tuple(number for number in context.questions if number in requested):
                    left[batch.shape].append(replace(context, questions=questions))
        batches = [
            QuestionBatch(*shape, tuple(contexts[start : start + self.batch_size]))
            for shape, contexts in left.items()
            for start in range(0, len(contexts), self.batch_size)
        ]
        return replace(self, batches=_ordered(batches))

    def shapes(self) -> list[tuple[int, int]]:
        """Return the distinct shapes of the batches."""
        return list(dict.fromkeys(batch.shape for batch in self.batches))

    def images(self, name: str) -> list[list[list[Image]]]:
        """Return the distinct images of modality `name` that each part of each batch shows: [batch][part][image]."""
        return [
            [
                [image for image in dict.fromkeys(shown) if image.modality == name]
                for part in rows_by_part(batch.contexts, self.batch_size, self.parts)
                for shown in [[image for context in part for image in self.prompts[context.prompt].images]]
            ]
            for batch in self.batches
        ]


def _ordered(batches: Sequence[QuestionBatch]) -> list[QuestionBatch]:
    """Return batches in the order of their images, so that a volume's features are not needed for long."""
    return sorted(batches, key=lambda batch: min(context.place for context in batch.contexts))


def _by_context(prompts: Sequence[Encoded], modalities: Mapping[str, ModalityConfig]) -> list[tuple[int, list[int]]]:
    """Return (length of the context, numbers of the prompts) for each context, by first appearance."""
    groups: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        key: Any = number
        if prompt.images:
            shown = prompt.input_ids[: _images_end(prompt, modalities)]
            key = prompt.images, blake2b(shown.tobytes(), digest_size=16).digest()
        groups.setdefault(key, []).append(number)
    return [(_common_length([prompts[number].input_ids for number in numbers]), numbers) for numbers in groups.values()]


def _images_end(prompt: Encoded, modalities: Mapping[str, ModalityConfig]) -> int:
    """Return the first position after a prompt's last image; 0 without images."""
    if not prompt.images:
        return 0
    return int(prompt.image_starts[-1]) + modalities[prompt.images[-1].modality].num_patches


def _common_length(rows: Sequence[np.ndarray]) -> int:
    """Return how many positions all rows have in common, at most all but the last of the shortest."""
    length = min(map(len, rows)) - 1
    for row in rows[1:]:
        differs = np.flatnonzero(row[:length] != rows[0][:length])
        length = int(differs[0]) if len(differs) else length
    return length


def _best_rounds(
    groups: Sequence[tuple[int, Sequence[int]]], lengths: Sequence[int], batch_size: int, max_new_tokens: int
) -> int:
    """Return the cheapest limit of questions per row: with fewer, contexts with more questions fill several rows."""
    counts = np.array([len(numbers) for _, numbers in groups])
    context = np.mean([length for length, _ in groups])
    question = max(lengths[number] - length for length, numbers in groups for number in numbers) + max_new_tokens
    choices = {int(count) for count in np.unique(counts)} | {-(-int(counts.sum()) // batch_size)}
    choices |= {-(-int(counts.max()) // parts) for parts in (2, 3, 4, batch_size)}
    most = int(counts.max())
    ranked = sorted(min(choice, most) for choice in choices)
    chosen = {ranked[i] for i in np.linspace(0, len(ranked) - 1, _MAX_CHOICES).round().astype(int)}

    def cost(rounds: int) -> float:
        rows = -(-counts // rounds)
        asked = np.sort(np.repeat(-(-counts // rows), rows))[::-1]
        return float(batch_size * (context + question * asked[::batch_size]).sum())

    return min(sorted(chosen), key=cost)


@dataclass(frozen=True)
class FeatureLoad:
    """Volumes of one modality that are encoded together."""

    modality: str
    slots: tuple[Mapping[Image, int], ...]
    """[part]; {image: slot within the part}, at most as many as a part encodes at a time."""


@dataclass(frozen=True)
class FeaturePlan:
    """The volumes to encode before each batch, and the slots that hold their features."""

    rows: Mapping[str, int]
    """{modality: volumes that all parts encode at a time}."""
    slots: Mapping[str, int]
    """{modality: slots of all parts}."""
    loads: Sequence[Sequence[FeatureLoad]]
    """[batch]; loads before it."""
    places: Sequence[Sequence[Mapping[Image, int]]]
    """[batch][part]; {image: its slot within the part}."""

    @classmethod
    def of(cls, plan: QuestionPlan, whole: QuestionPlan, bytes_per_patch: int) -> "FeaturePlan":
        """Plan the slots for the batches of `plan`.

        Args:
            whole: the plan of all prompts, which decides the sizes, so that some prompts need no further program.
            bytes_per_patch: size of a patch's features.
        """
        parts, rows, slots = plan.parts, dict[str, int](), dict[str, int]()
        shown = [{*whole.prompts[context.prompt].images} for batch in whole.batches for context in batch.contexts]
        by_modality = Counter(image.modality for image in set[Image]().union(*shown))
        for name, distinct in sorted(by_modality.items()):
            chunk = min(distinct, plan.batch_size // parts)
            largest = plan.batch_size // parts * max(sum(i.modality == name for i in images) for images in shown)
            patches = plan.modalities[name].num_patches
            affordable = _MOST_BYTES // (len(by_modality) * parts * bytes_per_patch * patches)
            rows[name], slots[name] = chunk * parts, min(distinct, max(largest + chunk, affordable)) * parts
        loads: list[list[FeatureLoad]] = [[] for _ in plan.batches]
        places: list[list[dict[Image, int]]] = [[{} for _ in range(parts)] for _ in plan.batches]
        for name in rows:
            needs = plan.images(name)
            sizes = rows[name] // parts, slots[name] // parts
            filled = [_fill_slots([batch[part] for batch in needs], *sizes) for part in range(parts)]
            for number, own in enumerate(zip(*filled, strict=True)):  # of each part
                turns = zip_longest(*(of_part for of_part, _ in own), fillvalue=dict[Image, int]())
                loads[number] += [FeatureLoad(name, turn) for turn in turns]
                for part, (_, held) in enumerate(own):
                    places[number][part] |= held
        return cls(rows, slots, loads, places)


def _fill_slots(
    needs: Sequence[Sequence[Image]], chunk: int, slots: int
) -> list[tuple[list[dict[Image, int]], dict[Image, int]]]:
    """Return the loads before each batch, {image: slot} of at most `chunk` images, and {image: slot} of its own images.

    A load that a batch does not fill takes images of later batches along, if there are free slots. If there is none
    for an image, it takes the slot of the image that is needed last.

    Args:
        needs: distinct images of each batch.
    """
    uses: dict[Image, deque[int]] = defaultdict(deque)
    for number, images in enumerate(needs):
        for image in images:
            uses[image].append(number)
    coming = deque(image for images in needs for image in images)
    held, free, result = dict[Image, int](), list(range(slots))[::-1], []
    for images in needs:
        loads, shown = list[dict[Image, int]](), {*images}
        missing = deque(image for image in images if image not in held)
        while missing:
            load = dict[Image, int]()
            while missing and len(load) < chunk:
                if not free:
                    free.append(held.pop(max((i for i in held if i not in shown), key=lambda i: uses[i][0])))
                image = missing.popleft()
                load[image] = held[image] = free.pop()
            while coming and free and not missing and len(load) < chunk:
                image = coming.popleft()
                if image not in held and uses[image]:
                    load[image] = held[image] = free.pop()
            loads.append(load)
        result.append((loads, {image: held[image] for image in images}))
        for image in images:
            uses[image].popleft()
            if not uses[image]:
                free.append(held.pop(image))
    return result
