"""Attention. One entry for every caller and, later, every backend."""

import chex
import jax

Array = jax.Array


def attention(q: Array, k: Array, v: Array, *, causal: bool, lengths: Array | None = None) -> Array:
    """Softmax(q·kᵀ/√Dh + mask)·v, softmax in float32.

    q [B, T, H, Dh]; k, v [B, S, K, Dh] with K kv heads, H a multiple of K (head h reads kv head h·K/H);
    lengths int32 [B]: keys in use, counted from the left. Returns [B, T, H, Dh] in q's dtype.
    """
    chex.assert_equal_shape([k, v])
    chex.assert_equal_shape_prefix([q, k], 1)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="xla")
