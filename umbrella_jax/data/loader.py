"""Batches of a run, in an order that is a pure function of the seed and the step; threads read ahead."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np

from umbrella_jax.batch import Batch
from umbrella_jax.config import ModalityConfig, Template
from umbrella_jax.data.cache import VolumeCache
from umbrella_jax.data.collate import BatchShape, collate, shape_of
from umbrella_jax.data.conversation import Conversation, Image, read_conversations
from umbrella_jax.data.tokenize import Encoded, encode, encode_all, encode_prompt
from umbrella_jax.data.volume import check_volume, check_volumes, load_volume
from umbrella_jax.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Dataset:
    """Conversations that were read, tokenized and all of whose volumes were found good."""

    conversations: tuple[Conversation, ...]
    encoded: tuple[Encoded, ...]
    """Each conversation as a whole."""
    prompts: tuple[Encoded, ...]
    """Each without its last answer; empty for training data."""
    windows: Mapping[Image, int]
    """Number of windows of each distinct image, in the order of first appearance."""
    modalities: Mapping[str, ModalityConfig]
    cache: VolumeCache | None = None
    """Where preprocessed volumes are kept and read from."""

    def __len__(self) -> int:
        return len(self.conversations)

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
        cache: VolumeCache | None = None,
    ) -> "Dataset":
        """Reads and checks everything that a run will need, before it starts.

        Args:
            path, image_root, modality, task_filter, allow_outside_root: see `read_conversations`.
            template: how conversations are written, see `umbrella_jax.data.tokenize`.
            max_length: positions of a conversation, patches included.
            threads: how many volumes are checked at a time.
            evaluation: make prompts too, so each conversation must end with an assistant turn, which may be empty;
                otherwise each conversation must supervise something.
            cache: preprocessed volumes are taken from it, and those that it lacks are put there.

        Raises:
            DataError: with every fault of the conversation files, or, when they are good, of texts and volumes.
        """
        kept = read_conversations(
            path,
            modalities,
            image_root,
            modality=modality,
            task_filter=task_filter,
            allow_outside_root=allow_outside_root,
        )
        common: dict[str, Any] = {"tokenizer": tokenizer, "modalities": modalities, "max_length": max_length}
        common["template"] = template
        faults: list[str] = []

        def collect(check: Callable[[], T]) -> T | None:
            try:
                return check()
            except DataError as error:
                faults.extend(error.faults)
                return None

        encoded = collect(lambda: encode_all(kept, partial(encode, needs_answer=not evaluation, **common)))
        prompts = collect(lambda: encode_all(kept if evaluation else (), partial(encode_prompt, **common)))
        images = [image for conversation in kept for image in conversation.images]
        check = check_volume if cache is None else cache.check
        windows = collect(lambda: check_volumes(images, modalities, threads, check))
        if encoded is None or prompts is None or windows is None:
            raise DataError(faults)
        return cls(tuple(kept), tuple(encoded), tuple(prompts), windows, modalities, cache)


def num_steps(num_conversations: int, epochs: float, batch_size: int, accumulate_steps: int) -> int:
    """Updates of a run: ceil(epochs · conversations / (batch size · micro-batches))."""
    # Exact: in floating point 0.07 * 100 lies above 7, which would add a step.
    return math.ceil(Fraction(str(epochs)) * num_conversations / (batch_size * accumulate_steps))


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    accumulate_steps: int,
    seed: int,
    start_step: int,
    num_steps: int,
    threads: int,
    divisor: int = 1,
) -> Iterator[Batch]:
    """Batches of the steps start_step .. num_steps - 1, each of A micro-batches of B conversations.

    Epochs follow one another, each in an order of its own, so every conversation comes once an epoch, none is dropped,
    and a step may hold the end of one epoch and the beginning of the next. In 4D, an epoch draws one window per run,
    the same for every conversation that shows it. Both depend on `seed` and the epoch alone: step s is the same
    whether or not the run was resumed.

    Args:
        num_steps: steps of the whole run, not of what is left of it.
        threads: how many steps are prepared at a time.
        divisor: the number of volumes of a micro-batch is a multiple of it.

    Yields:
        Batch of numpy arrays with a leading axis A; its micro-batches have one shape.

    Raises:
        DataError: a volume cannot be read any more.
    """
    number = {image: index for index, image in enumerate(dataset.windows)}

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(dataset))

    def sample(position: int) -> Encoded:
        epoch, place = divmod(position, len(dataset))
        row: Encoded = dataset.encoded[order(epoch)[place]]
        return replace(row, images=tuple(with_window(image, epoch) for image in row.images))

    def with_window(image: Image, epoch: int) -> Image:
        rng = np.random.default_rng([seed, epoch, 1 + number[image]])  # 0 would be the stream of `order`
        return replace(image, window=int(rng.integers(dataset.windows[image])))

    def make(step: int) -> Batch:
        first = step * batch_size * accumulate_steps
        starts = range(first, first + batch_size * accumulate_steps, batch_size)
        rows = [[sample(p) for p in range(start, start + batch_size)] for start in starts]
        return _stack(_collate_all(rows, dataset, shape_of(rows, batch_size, divisor)))

    return _prefetch(make, start_step, num_steps, threads)


def eval_batches(
    dataset: Dataset, batch_size: int, *, prompts: bool, threads: int = 4, divisor: int = 1
) -> Iterator[tuple[list[int], Batch]]:
    """Every conversation once, in order, with the first window of its runs; all batches have one shape.

    Args:
        prompts: what to generate from, instead of the whole conversations.

    Yields:
        Indices into `dataset.conversations` and the Batch (no axis A) whose first rows they are; the last batch may
        have empty rows behind them.

    Raises:
        DataError: a volume cannot be read any more, or `prompts` of a dataset that was not loaded for evaluation.
    """
    rows = dataset.prompts if prompts else dataset.encoded
    if len(rows) != len(dataset):
        raise DataError("prompts: the dataset has none; expected one that was loaded with evaluation=True")
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    shape = shape_of(batches, batch_size, divisor)

    def make(index: int) -> tuple[list[int], Batch]:
        start = index * batch_size
        (batch,) = _collate_all([batches[index]], dataset, shape)
        return list(range(start, start + len(batches[index]))), batch

    return _prefetch(make, 0, len(batches), threads)


def _collate_all(batches: Sequence[Sequence[Encoded]], dataset: Dataset, shape: BatchShape) -> list[Batch]:
    """One Batch each; an image that several of them show is read once."""
    images = dict.fromkeys(image for rows in batches for row in rows for image in row.images)
    load = load_volume if dataset.cache is None else dataset.cache.load
    volumes = {i: load(i.path, dataset.modalities[i.modality], i.window) for i in images}
    return [collate(rows, volumes, dataset.modalities, shape) for rows in batches]


def _stack(batches: Sequence[Batch]) -> Batch:
    """Micro-batches of one shape on a new leading axis."""
    # one is not copied: its volumes are the most of what a batch costs
    stack: Callable[[list[Any]], Any] = np.stack if len(batches) > 1 else lambda only: only[0][None]
    names = [field.name for field in fields(Batch) if field.name != "volumes"]  # type: ignore[arg-type]
    stacked: dict[str, Any] = {name: stack([getattr(batch, name) for batch in batches]) for name in names}
    stacked["volumes"] = {m: stack([batch.volumes[m] for batch in batches]) for m in batches[0].volumes}
    return Batch(**stacked)


def _prefetch(make: Callable[[int], T], start: int, stop: int, threads: int) -> Iterator[T]:
    """make(start), ..., make(stop - 1) in order, prepared by threads; an error of a thread reaches who iterates."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
