"""What a step takes: one static-shape batch of conversations and the distinct volumes that they name."""

import chex
import jax

Array = jax.Array  # numpy's on the host, until a step puts them on devices


@chex.dataclass(frozen=True)
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

    Features are concatenated over `volumes` in the order of its sorted names: M·N rows each, volume by volume.
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
    """{modality: float32 [M, D, H, W] or [M, D, H, W, T]}: each distinct volume once, zeros behind up to a static M.

    A modality may have no entry. Where no position of a training batch takes a feature of it, entry or not, the step
    leaves its parameters untouched.
    """
