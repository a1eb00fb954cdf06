"""What a step takes: one static-shape batch of conversations and the distinct volumes that they name."""

from dataclasses import dataclass
from typing import Any

import jax

Array = Any  # jax.Array; on the host, until a step puts them on devices, np.ndarray


@dataclass(frozen=True)
class Parts:
    """How a batch is shared out: rows and volumes are cut into `of` parts of one size, and some are one's `own`.

    A row takes features of volumes in its own part alone, so that devices need not exchange any.
    """

    of: int = 1
    own: tuple[int, ...] = (0,)
    """Ascending."""


WHOLE = Parts()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of B conversations of T positions, K of them supervised at most.

    A training step takes the same fields with one more leading axis A, the micro-batches that it accumulates.
    """

    input_ids: Array
    """int32 [B, T]; an image is expanded to as many placeholders as it has patches."""
    positions: Array
    """int32 [B, T]; rope positions."""
    feature_idx: Array
    """int32 [B, T]; row of the concatenated image features that the position takes, -1 for text.

    Features are concatenated over `volumes` in the order of its sorted names: M·N rows each, volume by volume. A
    position that takes one that is not there, or not in its row's part (`Parts`), is NaN, and the loss with it.
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
    """{modality: float32 [M, D, H, W] or [M, D, H, W, T]}: of each part each distinct volume once, and zeros behind
    them up to a static M.

    A modality may have no entry. Where no position of a training batch takes a feature of it, entry or not, the step
    leaves its parameters untouched.
    """
