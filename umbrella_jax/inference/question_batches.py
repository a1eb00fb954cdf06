"""Make the arrays of a `QuestionPlan` for one process, while threads read ahead."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import jax
import numpy as np

from umbrella_jax.batch import WHOLE, Batch, Parts
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import Dataset, prefetch
from umbrella_jax.inference.question_plan import FeatureLoad, FeaturePlan, QuestionBatch, QuestionPlan


@dataclass(frozen=True)
class VolumesToEncode:
    """Volumes of a modality for `encode`."""

    modality: str
    volumes: np.ndarray
    """float32 [M, *size]."""
    slots: np.ndarray
    """int32 [M]."""


@dataclass(frozen=True)
class PromptsToAnswer:
    """Contexts for `prefill`, and questions for `ask`."""

    shape: tuple[int, int]
    """See `QuestionBatch`."""
    contexts: Batch
    """The contexts; it has no volumes, and its `feature_idx` means the slots of a `FeaturePlan`."""
    is_asked: np.ndarray | None
    """bool [B]: rows with a prompt; None if there are questions, whose lengths show it."""
    questions: Sequence[tuple[np.ndarray, np.ndarray]]
    """Tokens int32 [B, T] and lengths int32 [B] of each round; empty if the contexts are whole prompts."""
    numbers: Sequence[Sequence[int | None]]
    """[round][row]; number of the prompt over all processes; None for a row without one."""


class QuestionBatches:
    """The volumes and prompts of a data set in the order in which the devices need them."""

    def __init__(
        self,
        dataset: Dataset,
        parts: Parts = WHOLE,
        *,
        batch_size: int,
        max_new_tokens: int,
        bytes_per_patch: int,
        only: Sequence[int] | None = None,
    ):
        """Plan the batches.

        Args:
            dataset: loaded with `evaluation=True`.
            parts: the parts of each batch to make; other volumes are not read.
            max_new_tokens: largest number of tokens of an answer.
            bytes_per_patch: size of a patch's features.
            only: numbers of the prompts to answer; default all.
        """
        self._dataset, self._parts = dataset, parts
        self.whole = QuestionPlan.of(
            dataset.rows(prompts=True),
            dataset.modalities,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            parts=parts.total,
        )
        self.plan = self.whole if only is None else self.whole.only(only)
        self.features = FeaturePlan.of(self.plan, self.whole, bytes_per_patch)

    def __call__(self, threads: int) -> Iterator[VolumesToEncode | PromptsToAnswer]:
        """Yield what to encode and what to answer, prepared by so many threads."""
        steps: list[FeatureLoad | int] = []
        for number, loads in enumerate(self.features.loads):
            steps += [*loads, number]

        def make(step: int) -> VolumesToEncode | PromptsToAnswer:
            todo = steps[step]
            return self._prompts(todo) if isinstance(todo, int) else self._volumes(todo)

        yield from prefetch(make, 0, len(steps), threads)

    def empty_volumes(self, modality: str) -> VolumesToEncode:
        """Return volumes of zeros for all processes together, with the shapes of any others."""
        rows = self.features.rows[modality]
        volumes = np.zeros((rows, *self._dataset.modalities[modality].size), np.float32)
        return VolumesToEncode(modality, volumes, np.zeros(rows, np.int32))

    def empty_prompts(self, shape: tuple[int, int]) -> PromptsToAnswer:
        """Return empty prompts of a shape for all processes together."""
        rows, (positions, question_positions) = self.whole.batch_size, shape
        questions = [(np.zeros((rows, question_positions), np.int32), np.zeros(rows, np.int32))]
        return PromptsToAnswer(
            shape=shape,
            contexts=text_batch(rows, positions),
            is_asked=None if question_positions else np.zeros(rows, bool),
            questions=questions if question_positions else (),
            numbers=[[None] * rows],
        )

    def _volumes(self, load: FeatureLoad) -> VolumesToEncode:
        modality, parts = load.modality, self._parts
        size, ignored = (sizes[modality] // parts.total for sizes in (self.features.rows, self.features.slots))
        volumes = np.zeros((size * len(parts.own), *self._dataset.modalities[modality].size), np.float32)
        slots = np.full(len(volumes), ignored, np.int32)
        for place, part in enumerate(parts.own):
            for row, (image, slot) in enumerate(load.slots[part].items(), start=place * size):
                volumes[row], slots[row] = self._dataset.volume(image), slot
        return VolumesToEncode(modality, volumes, slots)

    def _prompts(self, number: int) -> PromptsToAnswer:
        batch = self.plan.batches[number]
        made = self.empty_prompts(batch.shape)
        self._write_contexts(made.contexts, batch, self.features.places[number])
        numbers = [[*asked, *[None] * (self.whole.batch_size - len(asked))] for asked in batch.rounds()]
        questions = [self._questions(batch, asked) for asked in numbers] if made.questions else []
        is_asked = None if made.is_asked is None else np.array([one is not None for one in numbers[0]])
        size = self.whole.batch_size // self._parts.total
        own = np.concatenate([np.arange(part * size, (part + 1) * size) for part in self._parts.own])
        contexts, is_asked, questions = jax.tree.map(lambda array: array[own], (made.contexts, is_asked, questions))
        return PromptsToAnswer(batch.shape, contexts, is_asked, questions, numbers)

    def _write_contexts(self, out: Batch, batch: QuestionBatch, places: Sequence[Mapping[Image, int]]) -> None:
        """Write the contexts of a batch into empty ones; `places` are the batch's of the `FeaturePlan`."""
        slots, patches = self.features.slots, {n: m.num_patches for n, m in self._dataset.modalities.items()}
        ends = accumulate(slots[name] * patches[name] for name in slots)
        first = dict(zip(slots, [0, *ends], strict=False))  # features are concatenated in this order
        size = self.whole.batch_size // self._parts.total
        for row, context in enumerate(batch.contexts):
            prompt, part = self.whole.prompts[context.prompt], row // size
            out.lengths[row] = context.length
            out.input_ids[row, : context.length] = prompt.input_ids[: context.length]
            for image, start in zip(prompt.images, prompt.image_starts, strict=True):
                name = image.modality
                slot = part * (slots[name] // self._parts.total) + places[part][image]
                offsets = np.arange(patches[name])
                out.feature_idx[row, start + offsets] = first[name] + slot * patches[name] + offsets

    def _questions(self, batch: QuestionBatch, numbers: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that follow each row's context, and their number."""
        tokens, lengths = np.zeros((len(numbers), batch.question_positions), np.int32), np.zeros(len(numbers), np.int32)
        for row, (number, context) in enumerate(zip(numbers, batch.contexts, strict=False)):
            if number is not None:
                rest = self.whole.prompts[number].input_ids[context.length :]
                tokens[row, : len(rest)], lengths[row] = rest, len(rest)
        return tokens, lengths


def text_batch(rows: int, positions: int) -> Batch:
    """Return a batch of empty rows without volumes and without targets."""
    shape = rows, positions
    targets = np.zeros((rows, 1), np.int32)
    return Batch(
        input_ids=np.zeros(shape, np.int32),
        positions=np.tile(np.arange(positions, dtype=np.int32), (rows, 1)),
        feature_idx=np.full(shape, -1, np.int32),
        lengths=np.ones(rows, np.int32),
        target_pos=targets,
        target_ids=targets,
        target_mask=np.zeros(targets.shape, bool),
        volumes={},
    )
