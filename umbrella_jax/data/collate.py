"""Encoded conversations and their volumes to one Batch of static shape."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from umbrella_jax.batch import Batch
from umbrella_jax.config import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.tokenize import Encoded

_T_MULTIPLE = 64
_K_MIN = 8


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch; each new one compiles anew, so they are rounded up to a few."""

    conversations: int
    """B; rows behind the last conversation are empty."""
    positions: int
    """T, a multiple of 64."""
    targets: int
    """K, a power of two, 8 at least."""
    volumes: tuple[tuple[str, int], ...]
    """(modality, M) in sorted order; M is a power of two, B/2 at least, rounded up to the divisor. Absent modalities
    have no entry."""


def shape_of(batches: Iterable[Sequence[Encoded]], batch_size: int, divisor: int = 1) -> BatchShape:
    """The smallest shape that holds each of the batches.

    Args:
        batch_size: B.
        divisor: M becomes a multiple of it, so that volumes can be sharded over that many devices.
    """
    positions, targets = 1, _K_MIN
    volumes: dict[str, int] = {}
    for batch in batches:
        positions = max([positions, *(len(row) for row in batch)])
        targets = max([targets, *(int(row.supervised.sum()) for row in batch)])
        for modality, images in _distinct(batch).items():
            # Half the conversations at least: fewer shapes to compile, for at most that much padding.
            volumes[modality] = max(volumes.get(modality, 1), len(images), batch_size // 2)
    return BatchShape(
        conversations=batch_size,
        positions=_multiple(positions, _T_MULTIPLE),
        targets=_power_of_two(targets),
        volumes=tuple((m, _multiple(_power_of_two(count), divisor)) for m, count in sorted(volumes.items())),
    )


def collate(
    encoded: Sequence[Encoded],
    volumes: Mapping[Image, np.ndarray],
    modalities: Mapping[str, ModalityConfig],
    shape: BatchShape,
) -> Batch:
    """Pads conversations to `shape`; each distinct image becomes one volume, whoever names it.

    Args:
        encoded: at most B conversations. Rows behind them have length 1, no image and nothing supervised.
        volumes: {image: float32 array of its modality's size}, at least those that the conversations show.
        shape: from `shape_of`; numpy raises where it is too small.

    Returns:
        Batch of numpy arrays; see there for fields and types.
    """
    rows = (shape.conversations, shape.positions)
    input_ids = np.zeros(rows, np.int32)
    feature_idx = np.full(rows, -1, np.int32)
    lengths = np.ones(rows[0], np.int32)
    target_pos = np.zeros((rows[0], shape.targets), np.int32)
    target_ids = np.zeros_like(target_pos)
    target_mask = np.zeros(target_pos.shape, bool)

    distinct = _distinct(encoded)
    stacked: dict[str, np.ndarray] = {}
    first_feature: dict[Image, int] = {}
    features = 0
    for modality, count in shape.volumes:
        config = modalities[modality]
        images = distinct.get(modality, [])
        stacked[modality] = np.empty((count, *config.size), np.float32)
        stacked[modality][len(images) :] = 0  # alone: zeros everywhere first would be written twice
        for slot, image in enumerate(images):
            stacked[modality][slot] = volumes[image]
            first_feature[image] = features + slot * config.num_patches
        features += count * config.num_patches

    for b, row in enumerate(encoded):
        lengths[b] = len(row)
        input_ids[b, : len(row)] = row.input_ids
        for image, start in zip(row.images, row.image_starts, strict=True):
            patches = np.arange(modalities[image.modality].num_patches)
            feature_idx[b, start + patches] = first_feature[image] + patches
        targets = np.flatnonzero(row.supervised)
        target_pos[b, : len(targets)] = targets - 1  # the position that predicts the token
        target_ids[b, : len(targets)] = row.input_ids[targets]
        target_mask[b, : len(targets)] = True
    return Batch(  # type: ignore[call-arg]  # mypy does not know that chex.dataclass makes a dataclass
        input_ids=input_ids,
        positions=np.broadcast_to(np.arange(rows[1], dtype=np.int32), rows),
        feature_idx=feature_idx,
        lengths=lengths,
        target_pos=target_pos,
        target_ids=target_ids,
        target_mask=target_mask,
        volumes=stacked,
    )


def _distinct(encoded: Sequence[Encoded]) -> dict[str, list[Image]]:
    """{modality: its distinct images, in the order of first appearance}."""
    found: dict[str, list[Image]] = {}
    for image in dict.fromkeys(image for row in encoded for image in row.images):
        found.setdefault(image.modality, []).append(image)
    return found


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
