"""Attention. One entry for every caller and, later, every backend.

Axes: B rows, T queries, S keys, H heads, K kv heads, Dh head width.
"""

import chex
import jax
from jax.ad_checkpoint import checkpoint_name

from umbrella_jax.models.xla_attention import xla_attention

Array = jax.Array


def attention(q: Array, k: Array, v: Array, *, causal: bool, lengths: Array | None = None) -> Array:
    """Softmax(q·kᵀ/√Dh + mask)·v, softmax in float32.

    q [B, T, H, Dh]; k, v [B, S, K, Dh] with K kv heads, H a multiple of K (head h reads kv head h·K/H);
    lengths int32 [B]: keys in use, counted from the left; None: all. Returns [B, T, H, Dh] in q's dtype.
    """
    chex.assert_equal_shape([k, v])
    chex.assert_equal_shape_prefix([q, k], 1)
    q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
    return xla_attention(q, k, v, lengths, causal=causal)
