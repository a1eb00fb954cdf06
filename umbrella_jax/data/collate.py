"""Encoded conversations and their volumes to one Batch of static shape."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from umbrella_jax.batch import Batch
from umbrella_jax.config import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.plan import BatchShape
from umbrella_jax.data.tokenize import Encoded


def collate(
    batches: Sequence[Sequence[Encoded]],
    volume: Callable[[Image], np.ndarray],
    modalities: Mapping[str, ModalityConfig],
    shape: BatchShape,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Batch:
    """Pads micro-batches to `shape`; in each, a distinct image is one volume, whoever names it.

    Args:
        batches: A of them, at most B conversations each. Rows behind those have length 1, no image and nothing
            supervised.
        volume: gives the float32 array, of its modality's size, of an image. Called once per image at most.
        shape: what holds them; numpy raises where it is too small. The processes divide its B and its M.
        process_index, process_count: which part is made. Of P processes, p has rows p·B/P to (p+1)·B/P and as many of
            the M volumes, and asks for no other volumes; `feature_idx` counts rows of the features of all processes.

    Returns:
        Batch of numpy arrays with a leading axis A; see there for fields and types.
    """
    rows = (len(batches), shape.conversations, shape.positions)
    input_ids = np.zeros(rows, np.int32)
    feature_idx = np.full(rows, -1, np.int32)
    lengths = np.ones(rows[:2], np.int32)
    target_pos = np.zeros((*rows[:2], shape.targets), np.int32)
    target_ids = np.zeros_like(target_pos)
    target_mask = np.zeros(target_pos.shape, bool)

    def own(count: int) -> slice:
        return slice(process_index * count // process_count, (process_index + 1) * count // process_count)

    volumes = {
        modality: np.empty((len(batches), count // process_count, *modalities[modality].size), np.float32)
        for modality, count in shape.volumes
    }
    made: dict[Image, np.ndarray] = {}  # micro-batches may share images
    for a, encoded in enumerate(batches):
        distinct = _distinct(encoded)
        first_feature: dict[Image, int] = {}
        features = 0
        for modality, count in shape.volumes:
            patches, part = modalities[modality].num_patches, own(count)
            for slot, image in enumerate(distinct.get(modality, ())):
                first_feature[image] = features + slot * patches
                if part.start <= slot < part.stop:
                    out = volumes[modality][a, slot - part.start]
                    out[...] = made[image] if image in made else volume(image)
                    made[image] = out
            features += count * patches
            filled = max(len(distinct.get(modality, ())) - part.start, 0)
            volumes[modality][a, filled:] = 0  # alone: zeros everywhere first would be written twice

        for b, row in enumerate(encoded):
            lengths[a, b] = len(row)
            input_ids[a, b, : len(row)] = row.input_ids
            for image, start in zip(row.images, row.image_starts, strict=True):
                offsets = np.arange(modalities[image.modality].num_patches)
                feature_idx[a, b, start + offsets] = first_feature[image] + offsets
            targets = np.flatnonzero(row.supervised)
            target_pos[a, b, : len(targets)] = targets - 1  # the position that predicts the token
            target_ids[a, b, : len(targets)] = row.input_ids[targets]
            target_mask[a, b, : len(targets)] = True
    part = own(shape.conversations)
    return Batch(  # type: ignore[call-arg]  # mypy does not know that chex.dataclass makes a dataclass
        input_ids=input_ids[:, part],
        positions=np.broadcast_to(np.arange(rows[2], dtype=np.int32), rows)[:, part],
        feature_idx=feature_idx[:, part],
        lengths=lengths[:, part],
        target_pos=target_pos[:, part],
        target_ids=target_ids[:, part],
        target_mask=target_mask[:, part],
        volumes=volumes,
    )


def _distinct(encoded: Sequence[Encoded]) -> dict[str, list[Image]]:
    """{modality: its distinct images, in the order of first appearance}."""
    found: dict[str, list[Image]] = {}
    for image in dict.fromkeys(image for row in encoded for image in row.images):
        found.setdefault(image.modality, []).append(image)
    return found
