"""Load a data set, and make the batches of its epoch plan while threads read ahead.

A batch of a step is a pure function of the plan's seed and the step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np

from umbrella_jax.batch import WHOLE, Batch, Parts
from umbrella_jax.config.schema import AugmentConfig, ModalityConfig, Template
from umbrella_jax.data.answer_trees import tree_shape
from umbrella_jax.data.augment import check_axes, draw_augmentation
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.cache import Sources
from umbrella_jax.data.collate import collate
from umbrella_jax.data.conversation import Conversation, Conversations, Image, read_conversations
from umbrella_jax.data.epoch_plan import BatchShape, ConversationSizes, EpochPlan, PlannedUpdate, exact_shape
from umbrella_jax.data.ragged import Ragged
from umbrella_jax.data.tokenize import Encoded, EncodedConversations, NumberTarget, encode_all
from umbrella_jax.errors import DataError, Faults

T = TypeVar("T")
_UNCHANGED = AugmentConfig()


@dataclass(frozen=True)
class Dataset:
    """Conversations with their tokens; every volume that they show has been checked."""

    conversations: Sequence[Conversation]
    encoded: Sequence[Encoded]
    """Tokens of each whole conversation."""
    prompts: Sequence[Encoded]
    """Tokens of each conversation without its last answer; empty for training data."""
    windows: Mapping[Image, int]
    """Number of windows of each distinct image, in the order of first appearance."""
    modalities: Mapping[str, ModalityConfig]
    sources: Sources
    """Source of the volumes: the checked files, or a cache."""
    augment: AugmentConfig = _UNCHANGED
    """Random changes of the volumes in training."""
    axes: Mapping[tuple[Path, str], str | None] = field(default_factory=dict)
    """{(file, modality): orientation of the preprocessed array}, see `axis_codes`; empty without augmentation."""
    number_targets: Mapping[int, NumberTarget] = field(default_factory=dict)
    """{number of a conversation: its target of the loss over numbers}; empty without that loss."""

    def __len__(self) -> int:
        return len(self.conversations)

    def rows(self, *, prompts: bool = False) -> Sequence[Encoded]:
        """Return the tokens of the conversations, or of their prompts. Raise DataError if there are no prompts."""
        rows = self.prompts if prompts else self.encoded
        if len(rows) != len(self):
            raise DataError("prompts: the dataset has none; expected one that was loaded with evaluation=True")
        return rows

    def training_row(self, index: int, seed: int, epoch: int) -> Encoded:
        """Return a conversation for an epoch: draw the windows of its runs and the augmentation of its volumes.

        A window is drawn per run, so that conversations share it. Augmentation is drawn per conversation, so that with
        augmentation no two conversations share a volume.
        """
        encoded = self.encoded[index]
        places = {image: place for place, image in enumerate(dict.fromkeys(encoded.images))}

        def drawn(image: Image) -> Image:
            window = 0
            if self.windows[image] > 1:
                # Numbers start at 1: NumPy ignores trailing zeros of a seed, so 0 would give the plan's own stream.
                rng = np.random.default_rng([seed, epoch, 1 + self._number[image]])
                window = int(rng.integers(self.windows[image]))
            changed = None if self.augment == _UNCHANGED else (seed, epoch, index, places[image])
            return replace(image, window=window, changed=changed) if window or changed else image

        images = tuple(drawn(image) for image in encoded.images)
        return replace(encoded, images=images, number=self.number_targets.get(index))

    @cached_property
    def number_shape(self) -> tuple[int, int] | None:
        """(N, A) of the trees of `number_targets`; None if there are none."""
        targets = self.number_targets.values()
        return tree_shape([target.answers for target in targets]) if targets else None

    @cached_property
    def _number(self) -> dict[Image, int]:
        return {image: number for number, image in enumerate(self.windows)}

    def volume(self, image: Image) -> np.ndarray:
        """Return an image for the model: float32, of its modality's size. Every volume of a batch is made here.

        Raises:
            DataError: the file can no longer be read, or it has changed.
        """
        config = self.modalities[image.modality]
        volume = self.sources.load(image.path, config, image.window)
        if image.changed is None:
            return volume
        seed, epoch, conversation, place = image.changed
        # Four numbers keep this stream apart from the plan's [seed, epoch] and the windows' [seed, epoch, number].
        augmentation = draw_augmentation(self.augment, np.random.default_rng([seed, epoch, conversation, 1]))
        axes = self.axes[image.path, image.modality]
        return augmentation.apply(volume, axes, place, background=self.background(image))

    def background(self, image: Image) -> float | None:
        """Return the background's value in a preprocessed image; None means the lowest value."""
        return self.sources.background(image.path, self.modalities[image.modality], image.window)

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: Any,
        modalities: Mapping[str, ModalityConfig],
        *,
        image_root: str | Path | None = None,
        modality: str | None = None,
        task_filter: str | None = None,
        allow_outside_root: bool = False,
        template: Template = "umbrella",
        max_length: int,
        threads: int,
        evaluation: bool = False,
        sources: Sources | None = None,
        augment: AugmentConfig = _UNCHANGED,
    ) -> "Dataset":
        """Read and check everything a run needs, before it starts.

        Args:
            path, image_root, modality, task_filter, allow_outside_root: see `read_conversations`.
            template: how to write conversations as text, see `umbrella_jax.data.tokenize`.
            max_length: largest number of positions of a conversation, patches included.
            threads: number of volumes to check at a time.
            evaluation: also encode the prompts. Each conversation must then end with an assistant turn, which may be
                empty; otherwise each conversation needs at least one supervised token.
            sources: where to read volumes from; a `VolumeCache` keeps them preprocessed. Default: the files.
            augment: random changes that `train_batches` makes to the volumes.

        Raises:
            DataError: with every fault of the conversation files; if these are good, with every fault of texts and
                volumes.
        """
        conversations = read_conversations(
            path,
            modalities,
            image_root,
            modality=modality,
            task_filter=task_filter,
            allow_outside_root=allow_outside_root,
        )
        return cls.from_conversations(
            conversations,
            tokenizer,
            modalities,
            template=template,
            max_length=max_length,
            threads=threads,
            evaluation=evaluation,
            sources=sources,
            augment=augment,
        )

    @classmethod
    def from_conversations(
        cls,
        conversations: Conversations,
        tokenizer: Any,
        modalities: Mapping[str, ModalityConfig],
        *,
        template: Template = "umbrella",
        max_length: int,
        threads: int,
        evaluation: bool = False,
        sources: Sources | None = None,
        augment: AugmentConfig = _UNCHANGED,
    ) -> "Dataset":
        """Encode conversations and check their volumes; arguments and errors as for `load`."""
        encode = partial(encode_all, conversations, tokenizer, modalities, max_length, template=template)
        sources = Sources() if sources is None else sources
        encoded: Sequence[Encoded] = ()
        prompts: Sequence[Encoded] = ()
        faults = Faults()
        with faults:
            encoded = encode(needs_answer=not evaluation)
        with faults:
            prompts = encode(prompts=True) if evaluation else ()
        with faults:
            windows = sources.check_all(conversations.images, modalities, threads)
        faults.raise_as(DataError)
        axes: dict[tuple[Path, str], str | None] = {}
        if augment != _UNCHANGED:
            axes = {(i.path, i.modality): sources.axes(i.path, modalities[i.modality]) for i in windows}
            check_axes(augment, {path: c for (path, _), c in axes.items()})
        return cls(conversations, encoded, prompts, windows, modalities, sources, augment, axes)


def measure_conversations(rows: Sequence[Encoded], modalities: Mapping[str, ModalityConfig]) -> ConversationSizes:
    """Return the sizes of conversations for a plan.

    Equal images are one volume, so every difference between two volumes must be part of `Image`.
    """
    patches = {name: config.num_patches for name, config in modalities.items()}
    if isinstance(rows, EncodedConversations):
        shown = [image.modality for image in rows.images]
        return ConversationSizes(rows.lengths, rows.targets, rows.image_rows.distinct(), shown, patches)
    number: dict[Image, int] = {}
    lengths, targets, volumes = [], [], []
    for row in rows:
        lengths.append(len(row))
        targets.append(np.count_nonzero(row.supervised))
        volumes.append([number.setdefault(i, len(number)) for i in dict.fromkeys(row.images)])
    return ConversationSizes(
        lengths=np.array(lengths),
        targets=np.array(targets),
        volumes=Ragged.from_rows(volumes),
        modality=[image.modality for image in number],
        patches=patches,
    )


def make_epoch_plan(
    dataset: Dataset, *, batch_size: int, accumulate_steps: int, seed: int, parts: int = 1
) -> EpochPlan:
    """Return the plan of a training run; see `EpochPlan`."""
    # Windows do not matter: an epoch draws one per run, so images that are equal before are equal afterwards.
    sizes = measure_conversations(dataset.encoded, dataset.modalities)
    if dataset.augment != _UNCHANGED:  # each conversation changes its volumes in its own way
        shown = sizes.volumes
        sizes = replace(
            sizes,
            volumes=Ragged(np.arange(len(shown.values), dtype=np.int32), shown.ends),
            modality=[sizes.modality[volume] for volume in shown.values.tolist()],
        )
    return EpochPlan(sizes, batch_size=batch_size, accumulate_steps=accumulate_steps, seed=seed, parts=parts)


def train_batches(
    dataset: Dataset,
    plan: EpochPlan,
    *,
    start_step: int,
    num_steps: int,
    threads: int,
    parts: Parts = WHOLE,
) -> Iterator[Batch]:
    """Yield the batches of steps start_step .. num_steps - 1, each A micro-batches of B conversations.

    Each epoch has its own order (`umbrella_jax.data.epoch_plan`). In 4D, an epoch draws one window per run, the same
    for all conversations that show the run. Order and windows depend only on the plan's seed and the epoch, so step s
    is the same after a resume and with any number of threads or processes.

    Args:
        plan: made by `make_epoch_plan` for this data set and the same number of parts.
        num_steps: steps of the whole run, not only the remaining ones.
        threads: number of steps to prepare at a time.
        parts: the parts of each batch to make; other volumes are not read.

    Yields:
        `Batch` of NumPy arrays with a leading axis A; its micro-batches have one shape.

    Raises:
        DataError: a volume can no longer be read.
    """
    assert plan.parts == parts.total
    seed = plan.seed
    assert seed is not None, "a plan without a seed is for a single epoch"

    def make(step: int) -> Batch:
        epoch, _ = plan.locate(step)
        update = plan.update(step)
        return collate(
            [[dataset.training_row(index, seed, epoch) for index in micro] for micro in update.rows],
            dataset.volume,
            dataset.modalities,
            update.shape,
            parts,
            dataset.number_shape,
        )

    return prefetch(make, start_step, num_steps, threads)


def task_ids(dataset: Dataset, plan: EpochPlan, step: int) -> list[list[str]]:
    """Return the task ids of the conversations in each micro-batch of a training step, in the order of the rows."""
    return [[dataset.conversations[index].task_id for index in micro] for micro in plan.update(step).rows]


def eval_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    prompts: bool,
    threads: int = 4,
    parts: Parts = WHOLE,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """Yield every conversation once, with the first window of its runs, in batches that are always the same.

    Args:
        prompts: take the prompts, to generate from, in place of the whole conversations.
        parts: the parts of each batch to make; other volumes are not read.
        only: indices of the requested conversations; default all. Batches and shapes are those of the whole data set
            without the other rows, so no new shape is compiled.

    Yields:
        (indices, batch): indices into `dataset.conversations`, in no particular order, and a `Batch` without axis A.
        The indices are those of its first rows, over all processes; the remaining rows are empty.

    Raises:
        DataError: a volume can no longer be read, or `prompts` of a data set that was not loaded for evaluation.
    """
    rows = dataset.rows(prompts=prompts)
    updates = _eval_updates(dataset, batch_size, prompts, parts)
    if only is not None:
        requested = set(only)
        batches = ((tuple(i for i in update.rows[0] if i in requested), update.shape) for update in updates)
        updates = [PlannedUpdate((indices,), shape) for indices, shape in batches if indices]

    def make(index: int) -> tuple[list[int], Batch]:
        (indices,), shape = updates[index].rows, updates[index].shape
        batch = collate([[rows[i] for i in indices]], dataset.volume, dataset.modalities, shape, parts)
        return list(indices), _first(batch)

    return prefetch(make, 0, len(updates), threads)


def eval_subset(dataset: Dataset, batch_size: int, count: int, parts: Parts = WHOLE) -> list[int]:
    """Choose whole batches of `eval_batches(prompts=True)` with at least `count` conversations, or all there are.

    The choice holds a batch of each shape and is otherwise spread evenly. It is always the same.

    Returns:
        Sorted indices of the conversations.
    """
    updates = _eval_updates(dataset, batch_size, True, parts)
    first = {update.shape: place for place, update in reversed(list(enumerate(updates)))}
    others = [place for place in range(len(updates)) if place not in first.values()]
    bits = len(others).bit_length()
    # Bit-reversed order: any number of leading elements is spread evenly over the whole.
    order = sorted(range(len(others)), key=lambda n: f"{n:0{bits}b}"[::-1])
    chosen: list[int] = []
    for place in [*sorted(first.values()), *(others[n] for n in order)]:
        if len(chosen) >= count and place not in first.values():
            break
        chosen += updates[place].rows[0]
    return sorted(chosen)


def eval_shapes(dataset: Dataset, batch_size: int, *, prompts: bool, parts: Parts = WHOLE) -> list[BatchShape]:
    """Return the distinct shapes of `eval_batches`."""
    return list(dict.fromkeys(update.shape for update in _eval_updates(dataset, batch_size, prompts, parts)))


def empty_batch(dataset: Dataset, shape: BatchShape, *, accumulate_steps: int | None = None) -> Batch:
    """Return an empty batch of a shape, for all processes together.

    Without `accumulate_steps`, it has no axis A of micro-batches.
    """
    shapes: dict[str, Any] = {"number_shape": dataset.number_shape} if accumulate_steps else {}
    batch = collate([()] * (accumulate_steps or 1), dataset.volume, dataset.modalities, shape, **shapes)
    return batch if accumulate_steps else _first(batch)


def _eval_updates(dataset: Dataset, batch_size: int, prompts: bool, parts: Parts) -> list[PlannedUpdate]:
    sizes = measure_conversations(dataset.rows(prompts=prompts), dataset.modalities)
    return EpochPlan(sizes, batch_size=batch_size, parts=parts.total).epoch(0)


@one_blas_thread()
def whole_batch(dataset: Dataset, *, prompts: bool, round_length: Callable[[int], int] | None = None) -> Batch:
    """Return all conversations in order as one `Batch` without axis A, with the first window of their runs.

    Args:
        prompts: take the prompts in place of the whole conversations.
        round_length: as for `exact_shape`.

    Raises:
        DataError: as `eval_batches`.
    """
    rows = dataset.rows(prompts=prompts)
    shape = exact_shape(measure_conversations(rows, dataset.modalities), round_length)
    return _first(collate([rows], dataset.volume, dataset.modalities, shape))


def _first(batch: Batch) -> Batch:
    """Return the first micro-batch, without axis A, of a batch without candidate numbers."""
    leaves: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.name != "numbers"}
    volumes = leaves.pop("volumes")
    first: dict[str, Any] = {name: leaf[0] for name, leaf in leaves.items()}
    return Batch(**first | {"volumes": {modality: leaf[0] for modality, leaf in volumes.items()}})


def prefetch(make: Callable[[int], T], start: int, stop: int, threads: int) -> Iterator[T]:
    """Yield make(start), ..., make(stop - 1) in order, prepared by threads. An error in a thread is raised here."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    with one_blas_thread():
        yield from grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options)
