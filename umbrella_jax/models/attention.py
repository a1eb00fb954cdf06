"""Attention. One entry for every caller and, later, every backend.

Axes: B rows, T queries, S keys, H heads, K kv heads, Dh head width.
"""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from umbrella_jax.models.parallel import HEADS, ROWS, local, ways
from umbrella_jax.models.xla_attention import xla_attention

Array = jax.Array


def attention(q: Array, k: Array, v: Array, *, causal: bool, lengths: Array | None = None) -> Array:
    """Softmax(q·kᵀ/√Dh + mask)·v, softmax in float32.

    q [B, T, H, Dh]; k, v [B, S, K, Dh] with K kv heads, H a multiple of K (head h reads kv head h·K/H);
    lengths int32 [B]: keys in use, counted from the left; None: all. Returns [B, T, H, Dh] in q's dtype.

    On a mesh every device has its own rows and heads. Where it has more parts of heads than there are kv heads, those
    are repeated.
    """
    chex.assert_equal_shape([k, v])
    chex.assert_equal_shape_prefix([q, k], 1)
    q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
    kv = k.shape[2]
    if (times := math.lcm(kv, ways(HEADS)) // kv) > 1:
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    heads = PartitionSpec(ROWS, None, HEADS)
    specs = {"in_specs": (heads, heads, heads, PartitionSpec(ROWS)), "out_specs": heads}
    return local(partial(xla_attention, causal=causal), **specs, check_vma=False)(q, k, v, lengths)
