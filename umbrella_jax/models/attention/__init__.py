"""Attention. One entry for every caller and every backend.

Axes: B rows, T queries, S keys, H heads, K kv heads, Dh head width.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from umbrella_jax.config.schema import AttentionBackend
from umbrella_jax.errors import ConfigError
from umbrella_jax.models.attention.cudnn import MULTIPLE, cudnn_attention, cudnn_serves
from umbrella_jax.models.attention.splash import splash_attention
from umbrella_jax.models.attention.xla import xla_attention
from umbrella_jax.models.parallel import HEADS, ROWS, local, ways

Array = jax.Array
_BACKENDS: dict[AttentionBackend, Callable[..., Array]] = {
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    lengths: Array | None = None,
    backend: AttentionBackend = "xla",
) -> Array:
    """Softmax(q·kᵀ/√Dh + mask)·v, softmax in float32, by a backend that serves here (`choose_backend`).

    q [B, T, H, Dh]; k, v [B, S, K, Dh] with K kv heads, H a multiple of K (head h reads kv head h·K/H);
    lengths int32 [B]: keys in use, counted from the left; None: all. Padding among the queries sees them too.
    Returns [B, T, H, Dh] in q's dtype.

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
    return local(partial(_BACKENDS[backend], causal=causal), **specs, check_vma=False)(q, k, v, lengths)


def extension_attention(q: Array, k: Array, v: Array, past_k: Array, past_v: Array, used: Array, ways: int) -> Array:
    """Attention of new positions to those of their row in a cache and, causally, to those before them of their way.

    q [B, W·N, H, Dh]; k, v [B, W·N, K, Dh]: W = `ways` continuations of N positions each, one behind the other;
    past_k, past_v [B, K, S, Dh]; used bool [B, S]. Returns [B, W·N, H, Dh] in q's dtype. Softmax in float32.
    """
    b, t, h, d = q.shape
    kv, n, slots = k.shape[2], t // ways, used.shape[1]
    float32 = {"preferred_element_type": jnp.float32}
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype).reshape(b, ways, n, kv, h // kv, d)
    k, v = (x.reshape(b, ways, n, kv, d) for x in (k, v))
    before = jnp.einsum("bwnkgd,bksd->bkwgns", q, past_k, **float32)
    before = jnp.where(used[:, None, None, None, None], before, -jnp.inf)
    own = jnp.einsum("bwnkgd,bwmkd->bkwgnm", q, k, **float32)
    own = jnp.where(jnp.tri(n, dtype=bool), own, -jnp.inf)  # each sees itself at least: no row without a key
    p = jax.nn.softmax(jnp.concatenate([before, own], -1), axis=-1).astype(v.dtype)
    # in the order of the operands: XLA's CPU backend has no bfloat16 product that comes out transposed in float32
    out = jnp.einsum("bkwgns,bksd->bkwgnd", p[..., :slots], past_v, **float32)
    out += jnp.einsum("bkwgnm,bwmkd->bkwgnd", p[..., slots:], v, **float32)
    return out.astype(q.dtype).transpose(0, 2, 4, 1, 3, 5).reshape(b, t, h, d)


def length_multiple(backend: AttentionBackend) -> int:
    """Of which a backend wants lengths to be. Others it pads itself: q, k, v, output and gradients of every layer."""
    return MULTIPLE if backend == "cudnn" else 1


def native_backend(device: jax.Device) -> AttentionBackend:
    """The backend that was written for such devices."""
    if device.platform == "tpu":
        return "splash"
    major, _, _ = getattr(device, "compute_capability", "").partition(".")  # NVIDIA's are `9.0`, AMD's `gfx942`
    return "cudnn" if major.isdigit() and int(major) >= 8 else "xla"


def choose_backend(
    wanted: Literal["auto", AttentionBackend], native: AttentionBackend, dtype: str, head_dims: Collection[int]
) -> AttentionBackend:
    """What `model.attention` means on devices whose own backend is `native`, for a model's type and head widths.

    Raises ConfigError for a backend that cannot serve there.
    """
    unfit = [] if native != "cudnn" else [width for width in head_dims if not cudnn_serves(dtype, width)]
    if wanted == "auto":
        return "xla" if unfit else native
    if wanted not in ("xla", native):
        where = {"cudnn": "NVIDIA GPUs since Ampere", "splash": "TPUs"}[wanted]
        raise ConfigError(f"model.attention: {wanted} is for {where}, not for this device; expected auto or xla")
    if wanted == "cudnn" and unfit:
        raise ConfigError(
            f"model.attention: cudnn takes bfloat16 and heads of a multiple of 8 up to 128, not {dtype} with heads of "
            f"{', '.join(map(str, unfit))}; expected auto or xla, or another model.compute_dtype"
        )
    return wanted
