"""The input of a step: a batch of conversations of static shape, and the distinct volumes that they show."""

from dataclasses import dataclass
from typing import Any

import jax

AnyArray = Any  # np.ndarray on the host, jax.Array on devices


@dataclass(frozen=True)
class Parts:
    """How processes share the work of making a batch.

    Rows and volumes are cut into `total` equal parts, and this process makes the parts `own`. A row uses only volumes
    of its own part, so devices need not exchange image features.
    """

    total: int = 1
    own: tuple[int, ...] = (0,)
    """Indices of the parts, ascending."""


WHOLE = Parts()
NONE = -1
"""Token id after the end of a row."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AnswerTree:
    """A possible answers to each of B prompts, as a tree of their tokens: answers that begin alike share nodes.

    The nodes of a row are numbered from 0, parents first. Node 0 is the last position of the prompt; every other one is
    a token of an answer that another token follows. Trees with fewer nodes or answers are padded.
    """

    tokens: AnyArray
    """int32 [B, N]; the token of each node; 0 for node 0 and padding."""
    depths: AnyArray
    """int32 [B, N]; number of the answer's tokens up to the node: 0 for node 0."""
    next_tokens: AnyArray
    """int32 [B, N, A]; the token that follows the node in each answer; `NONE` for an answer that does not pass it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NumberTargets:
    """What the loss over numbers (`train.number_loss`) needs of B conversations with A candidate numbers.

    A conversation without a number has `mask` False everywhere.
    """

    tree: AnswerTree
    """The candidates as answers to the prompt of the last answer."""
    prompt_lengths: AnyArray
    """int32 [B]; positions before the last answer; 1 without a number."""
    errors: AnyArray
    """float32 [B, A]; candidate − truth, in standard deviations of the task's training references."""
    mask: AnyArray
    """bool [B, A]; True for candidates, False for padding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """B conversations of T positions; up to K positions of each conversation are supervised.

    For a training step every field has one more leading axis A, the micro-batches whose gradients it accumulates.
    """

    input_ids: AnyArray
    """int32 [B, T]; token ids, with one placeholder per patch of an image."""
    positions: AnyArray
    """int32 [B, T]; positions for rotary embeddings."""
    feature_idx: AnyArray
    """int32 [B, T]; row of the concatenated image features for this position, -1 for text.

    Features are concatenated over `volumes` in the order of its sorted names, M·N rows each, volume by volume. A
    position whose feature is missing, or is not in the part of its row (`Parts`), becomes NaN, and so does the loss.
    """
    lengths: AnyArray
    """int32 [B]; positions in use, counted from the left."""
    target_pos: AnyArray
    """int32 [B, K]; positions whose *next* token is supervised; padded with 0."""
    target_ids: AnyArray
    """int32 [B, K]; that next token; padded with 0."""
    target_mask: AnyArray
    """bool [B, K]; False where padded."""
    volumes: dict[str, AnyArray]
    """{modality: float32 [M, D, H, W] or [M, D, H, W, T]}: each distinct volume once per part, then zeros up to a
    static M.

    A modality may be absent. A training step leaves a modality's parameters untouched if no position of the batch shows
    one of its volumes, even if there are padding volumes.
    """
    numbers: NumberTargets | None = None
    """Candidate numbers of regressions; None unless `train.number_loss` is set."""
