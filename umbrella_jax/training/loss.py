"""Losses as sums and counts, which add up over micro-batches and devices."""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32

from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import NumberLossConfig
from umbrella_jax.models import Llava


@no_type_check  # jax also builds it with None as fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """Sums over the conversations of a batch."""

    cross_entropy: Float32[Array, ""]
    """−Σ log p(target) over the supervised tokens."""
    tokens: Int32[Array, ""]
    """Number of supervised tokens."""
    number_errors: Float32[Array, ""] | None = None
    """Σ of `number_errors` over the conversations with a number; None without a loss over numbers."""
    numbers: Int32[Array, ""] | None = None
    """Number of these conversations."""


def loss_sums(model: Llava, batch: Batch, number_loss: NumberLossConfig | None = None) -> LossSums:
    """Return the sums of cross entropy and, if `number_loss` is set and the batch has numbers, of their errors.

    The mean that a run reports is Σ sum / Σ count, so every supervised token and every number has the same weight.
    """
    if number_loss is None or batch.numbers is None:
        return LossSums(*_cross_entropy(model.target_logits(batch), batch))
    targets = batch.numbers
    logits, scores = model.target_logits_and_scores(batch, targets.tree, targets.prompt_lengths)
    errors = number_errors(scores, targets.errors, targets.mask, number_loss)
    count = jnp.sum(targets.mask.any(-1), dtype=jnp.int32)
    return LossSums(*_cross_entropy(logits, batch), errors.sum(), count)


def loss_sum(model: Llava, batch: Batch) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
    """Return −Σ log p(target) over the supervised tokens of a batch, and their number."""
    return _cross_entropy(model.target_logits(batch), batch)


def _cross_entropy(logits: Float32[Array, "B K V"], batch: Batch) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.target_ids)
    return jnp.sum(losses, where=batch.target_mask), jnp.sum(batch.target_mask, dtype=jnp.int32)


def number_errors(
    scores: Float32[Array, "B A"],
    errors: Float32[Array, "B A"],
    mask: Bool[Array, "B A"],
    config: NumberLossConfig,
) -> Float32[Array, "B"]:
    """Return the loss over the candidate numbers of each conversation; 0 for one without candidates.

    With p the softmax of `scores` over the candidates and e their errors, it is Σ p·e² (the expected squared error) or
    (Σ p·e)² (the squared error of the expectation). The latter is the loss of Lukasik et al., "Better autoregressive
    regression with LLMs via regression-aware fine-tuning" (RAFT, ICLR 2025), except that theirs does not normalise p:
    there, probability on other answers pulls the expectation to 0, and the first form would fall with it.

    Args:
        scores: log p(candidate | prompt).
        errors: candidate − truth.
        mask: False for padding.
    """
    p = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1), 0)
    if config.form == "expected_squared_error":
        return (p * jnp.square(errors)).sum(-1)
    return jnp.square((p * errors).sum(-1))


_MASKED = -1e30  # not -inf, which would make a conversation without candidates NaN
