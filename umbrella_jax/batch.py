"""The input of a step: a batch of conversations of static shape, and the distinct volumes that they show."""

from dataclasses import dataclass
from typing import Any

import jax

Array = Any  # np.ndarray on the host, jax.Array once a step has put the batch on devices


@dataclass(frozen=True)
class Parts:
    """How a batch is divided: rows and volumes are cut into `of` equal parts, and this process makes its `own`.

    A row takes only features of volumes in its own part, so devices need not exchange features.
    """

    of: int = 1
    own: tuple[int, ...] = (0,)
    """Ascending."""


WHOLE = Parts()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """B conversations of T positions, at most K of them supervised.

    For a training step every field has one more leading axis A, the micro-batches whose gradients it accumulates.
    """

    input_ids: Array
    """int32 [B, T]; token ids, with one placeholder per patch of an image."""
    positions: Array
    """int32 [B, T]; positions for rotary embeddings."""
    feature_idx: Array
    """int32 [B, T]; row of the concatenated image features for this position, -1 for text.

    Features are concatenated over `volumes` in the order of its sorted names, M·N rows each, volume by volume. A
    position whose feature is missing, or is not in the part of its row (`Parts`), becomes NaN, and so does the loss.
    """
    lengths: Array
    """int32 [B]; positions in use, counted from the left."""
    target_pos: Array
    """int32 [B, K]; positions whose *next* token is supervised; padded with 0."""
    target_ids: Array
    """int32 [B, K]; that next token; padded with 0."""
    target_mask: Array
    """bool [B, K]; False where padded."""
    volumes: dict[str, Array]
    """{modality: float32 [M, D, H, W] or [M, D, H, W, T]}: each distinct volume once per part, then zeros up to a
    static M.

    A modality may have no entry. If no position of a training batch takes one of its features, with or without an
    entry, the step leaves its parameters untouched.
    """
