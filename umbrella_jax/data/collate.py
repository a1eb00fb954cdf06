"""Pad encoded conversations and their volumes to one `Batch` of a static shape."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from umbrella_jax.batch import WHOLE, AnswerTree, Batch, NumberTargets, Parts
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.answer_trees import answer_trees
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.epoch_plan import BatchShape, rows_by_part
from umbrella_jax.data.tokenize import Encoded, NumberTarget


def collate(
    batches: Sequence[Sequence[Encoded]],
    volume: Callable[[Image], np.ndarray],
    modalities: Mapping[str, ModalityConfig],
    shape: BatchShape,
    parts: Parts = WHOLE,
    number_shape: tuple[int, int] | None = None,
) -> Batch:
    """Pad A micro-batches to `shape`. Each part of a micro-batch holds every distinct image of its rows once.

    Args:
        batches: [A], at most B conversations each. The remaining rows have length 1, no image and no targets.
        volume: returns the float32 array of an image, of its modality's size; called at most once per image.
        shape: must hold every micro-batch; otherwise NumPy raises. `parts.total` divides its B and each M.
        parts: the parts to make; only their volumes are requested.
        number_shape: (N, A) of `NumberTargets.tree`; None for a batch without them.

    Returns:
        `Batch` of NumPy arrays with a leading axis A.
    """
    size = shape.conversations // parts.total
    rows = (len(batches), size * len(parts.own), shape.positions)
    input_ids = np.zeros(rows, np.int32)
    feature_idx = np.full(rows, -1, np.int32)
    lengths = np.ones(rows[:2], np.int32)
    target_pos = np.zeros((*rows[:2], shape.targets), np.int32)
    target_ids = np.zeros_like(target_pos)
    target_mask = np.zeros(target_pos.shape, bool)
    room = {modality: count // parts.total for modality, count in shape.volumes}
    volumes = {
        m: np.empty((len(batches), n * len(parts.own), *modalities[m].size), np.float32) for m, n in room.items()
    }
    loaded: dict[Image, np.ndarray] = {}  # micro-batches and parts may share images
    numbers: list[NumberTarget | None] = [None] * (rows[0] * rows[1])
    for a, encoded in enumerate(batches):
        rows_of_part = rows_by_part(encoded, shape.conversations, parts.total)
        for place, part in enumerate(parts.own):
            distinct = _distinct_images(rows_of_part[part])
            first_feature: dict[Image, int] = {}
            features = 0
            for modality, count in shape.volumes:
                n, patches = room[modality], modalities[modality].num_patches
                out, images = volumes[modality][a, place * n : (place + 1) * n], distinct.get(modality, ())
                for slot, image in enumerate(images):
                    first_feature[image] = features + (part * n + slot) * patches
                    out[slot] = loaded[image] if image in loaded else volume(image)
                    loaded[image] = out[slot]
                out[len(images) :] = 0  # only the padding, so that no memory is written twice
                features += count * patches

            for b, row in enumerate(rows_of_part[part], start=place * size):
                lengths[a, b] = len(row)
                numbers[a * rows[1] + b] = row.number
                input_ids[a, b, : len(row)] = row.input_ids
                for image, start in zip(row.images, row.image_starts, strict=True):
                    offsets = np.arange(modalities[image.modality].num_patches)
                    feature_idx[a, b, start + offsets] = first_feature[image] + offsets
                targets = np.flatnonzero(row.supervised)
                target_pos[a, b, : len(targets)] = targets - 1  # the position that predicts the token
                target_ids[a, b, : len(targets)] = row.input_ids[targets]
                target_mask[a, b, : len(targets)] = True
    return Batch(
        input_ids=input_ids,
        positions=np.broadcast_to(np.arange(rows[2], dtype=np.int32), rows),
        feature_idx=feature_idx,
        lengths=lengths,
        target_pos=target_pos,
        target_ids=target_ids,
        target_mask=target_mask,
        volumes=volumes,
        numbers=None if number_shape is None else _number_targets(numbers, rows[:2], number_shape),
    )


def _number_targets(
    numbers: Sequence[NumberTarget | None], rows: tuple[int, int], shape: tuple[int, int]
) -> NumberTargets:
    """Return the targets of A · B rows, with leading axes A and B."""
    tree = answer_trees([() if number is None else number.answers for number in numbers], shape)
    lengths = np.ones(len(numbers), np.int32)
    errors = np.zeros((len(numbers), shape[1]), np.float32)
    mask = np.zeros(errors.shape, bool)
    for row, number in enumerate(numbers):
        if number is not None:
            lengths[row] = number.prompt_length
            errors[row, : len(number.values)] = number.values - number.truth
            mask[row, : len(number.values)] = True

    def split(array: np.ndarray) -> np.ndarray:
        return array.reshape(*rows, *array.shape[1:])

    return NumberTargets(
        tree=AnswerTree(tokens=split(tree.tokens), depths=split(tree.depths), next_tokens=split(tree.next_tokens)),
        prompt_lengths=split(lengths),
        errors=split(errors),
        mask=split(mask),
    )


def _distinct_images(encoded: Sequence[Encoded]) -> dict[str, list[Image]]:
    """Return {modality: its distinct images, in the order of first appearance}."""
    images: dict[str, list[Image]] = {}
    for image in dict.fromkeys(image for row in encoded for image in row.images):
        images.setdefault(image.modality, []).append(image)
    return images
