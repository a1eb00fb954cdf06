"""Cross entropy as a sum and a count, which add up over micro-batches and devices."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from umbrella_jax.batch import Batch
from umbrella_jax.models import Llava


def loss_sum(model: Llava, batch: Batch) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
    """Return −Σ log p(target) over the supervised tokens of a batch, and their number.

    The mean that a run reports is Σ sum / Σ count, so every supervised token has the same weight.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(model.target_logits(batch), batch.target_ids)
    return jnp.sum(losses, where=batch.target_mask), jnp.sum(batch.target_mask, dtype=jnp.int32)
