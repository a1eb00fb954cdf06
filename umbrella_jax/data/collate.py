"""Encoded conversations and their volumes to one Batch of static shape."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from umbrella_jax.batch import WHOLE, Batch, Parts
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.epoch_plan import BatchShape, split_rows
from umbrella_jax.data.tokenize import Encoded


def collate(
    batches: Sequence[Sequence[Encoded]],
    volume: Callable[[Image], np.ndarray],
    modalities: Mapping[str, ModalityConfig],
    shape: BatchShape,
    parts: Parts = WHOLE,
) -> Batch:
    """Pads micro-batches to `shape`; in each part of one, a distinct image is one volume, whoever names it.

    Args:
        batches: A of them, at most B conversations each. Rows behind those have length 1, no image and nothing
            supervised.
        volume: gives the float32 array, of its modality's size, of an image. Called once per image at most.
        shape: what holds them; numpy raises where it is too small. `parts.of` divides its B and its M.
        parts: those of its own are made, and no other volumes asked for.

    Returns:
        Batch of numpy arrays with a leading axis A; see there for fields and types.
    """
    size = shape.conversations // parts.of
    rows = (len(batches), size * len(parts.own), shape.positions)
    input_ids = np.zeros(rows, np.int32)
    feature_idx = np.full(rows, -1, np.int32)
    lengths = np.ones(rows[:2], np.int32)
    target_pos = np.zeros((*rows[:2], shape.targets), np.int32)
    target_ids = np.zeros_like(target_pos)
    target_mask = np.zeros(target_pos.shape, bool)
    room = {modality: count // parts.of for modality, count in shape.volumes}
    volumes = {
        m: np.empty((len(batches), n * len(parts.own), *modalities[m].size), np.float32) for m, n in room.items()
    }
    made: dict[Image, np.ndarray] = {}  # micro-batches and parts may share images
    for a, encoded in enumerate(batches):
        of_part = split_rows(encoded, shape.conversations, parts.of)
        for place, part in enumerate(parts.own):
            distinct = _distinct(of_part[part])
            first_feature: dict[Image, int] = {}
            features = 0
            for modality, count in shape.volumes:
                n, patches = room[modality], modalities[modality].num_patches
                out, images = volumes[modality][a, place * n : (place + 1) * n], distinct.get(modality, ())
                for slot, image in enumerate(images):
                    first_feature[image] = features + (part * n + slot) * patches
                    out[slot] = made[image] if image in made else volume(image)
                    made[image] = out[slot]
                out[len(images) :] = 0  # alone: zeros everywhere first would be written twice
                features += count * patches

            for b, row in enumerate(of_part[part], start=place * size):
                lengths[a, b] = len(row)
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
    )


def _distinct(encoded: Sequence[Encoded]) -> dict[str, list[Image]]:
    """{modality: its distinct images, in the order of first appearance}."""
    found: dict[str, list[Image]] = {}
    for image in dict.fromkeys(image for row in encoded for image in row.images):
        found.setdefault(image.modality, []).append(image)
    return found
