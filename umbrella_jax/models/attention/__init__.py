"""Attention: one function for every caller and every backend.

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
from jaxtyping import Array, Bool, Float, Int

from umbrella_jax.batch import AnyArray
from umbrella_jax.config.schema import AttentionBackend
from umbrella_jax.errors import ConfigError
from umbrella_jax.models.attention.cudnn import MULTIPLE, cudnn_attention, cudnn_serves
from umbrella_jax.models.attention.splash import splash_attention
from umbrella_jax.models.attention.xla import xla_attention
from umbrella_jax.models.parallel import HEADS, ROWS, local, ways

_BACKENDS: dict[AttentionBackend, Callable[..., Array]] = {
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}


def attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S K Dh"],
    v: Float[Array, "B S K Dh"],
    *,
    causal: bool,
    lengths: Int[AnyArray, "B"] | None = None,
    backend: AttentionBackend = "xla",
    name: str = "qkv",
) -> Float[Array, "B T H Dh"]:
    """Return softmax(q·kᵀ/√Dh + mask)·v with the softmax in float32, in q's dtype.

    On a mesh each device computes its own rows and heads. If the mesh splits heads into more parts than there are kv
    heads, the kv heads are repeated.

    Args:
        k, v: H is a multiple of K, and head h reads kv head h·K/H.
        causal: whether a query sees only keys up to its own position.
        lengths: keys in use, counted from the left; None for all. Padding queries see these keys too.
        backend: one that runs on these devices (`choose_backend`).
        name: name of q, k and v for remat policies, which keep `qkv`.
    """
    chex.assert_equal_shape([k, v])
    chex.assert_equal_shape_prefix([q, k], 1)
    attend = partial(_BACKENDS[backend], causal=causal)
    if backend == "splash":
        attend = partial(attend, name=name)  # it keeps them in the kernel's layout
    else:
        q, k, v = (checkpoint_name(x, name) for x in (q, k, v))
    kv = k.shape[2]
    if (times := math.lcm(kv, ways(HEADS)) // kv) > 1:
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    heads = PartitionSpec(ROWS, None, HEADS)
    specs = {"in_specs": (heads, heads, heads, PartitionSpec(ROWS)), "out_specs": heads}
    return local(attend, **specs, check_vma=False)(q, k, v, lengths)


def extension_attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    past_k: Float[Array, "B K S Dh"],
    past_v: Float[Array, "B K S Dh"],
    used: Bool[Array, "B S"],
    sees: Bool[Array, "B T T"] | None = None,
) -> Float[Array, "B T H Dh"]:
    """Attend from new positions to their row's cache and to each other.

    Args:
        past_k, past_v: the cache.
        used: filled slots of the cache.
        sees: whether each new position sees each other one, itself included; None for all up to itself.

    Returns:
        In q's dtype; the softmax is in float32.
    """
    b, t, h, d = q.shape
    kv, slots = k.shape[2], used.shape[1]
    sees = jnp.tri(t, dtype=bool)[None] if sees is None else sees
    float32 = {"preferred_element_type": jnp.float32}
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype).reshape(b, t, kv, h // kv, d)
    before = jnp.einsum("btkgd,bksd->bkgts", q, past_k, **float32)
    before = jnp.where(used[:, None, None, None], before, -jnp.inf)
    own = jnp.einsum("btkgd,bskd->bkgts", q, k, **float32)
    own = jnp.where(sees[:, None, None], own, -jnp.inf)  # every position sees itself: no row without a key
    p = jax.nn.softmax(jnp.concatenate([before, own], -1), axis=-1).astype(v.dtype)
    # Keep the operands' axis order: XLA's CPU backend has no bfloat16 product with a transposed float32 result.
    out = jnp.einsum("bkgts,bksd->bkgtd", p[..., :slots], past_v, **float32)
    out += jnp.einsum("bkgts,bskd->bkgtd", p[..., slots:], v, **float32)
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def length_multiple(backend: AttentionBackend) -> int:
    """Return the number that sequence lengths should be a multiple of.

    The backend pads other lengths itself, in every layer: q, k, v, output and gradients.
    """
    return MULTIPLE if backend == "cudnn" else 1


def native_backend(device: jax.Device) -> AttentionBackend:
    """Return the backend written for this kind of device."""
    if device.platform == "tpu":
        return "splash"
    major, _, _ = getattr(device, "compute_capability", "").partition(".")  # NVIDIA's are `9.0`, AMD's `gfx942`
    return "cudnn" if major.isdigit() and int(major) >= 8 else "xla"


_SERVES: dict[AttentionBackend, str] = {"cudnn": "NVIDIA GPUs since Ampere", "splash": "TPUs"}


def choose_backend(
    requested: Literal["auto", AttentionBackend], native: AttentionBackend, dtype: str, head_dims: Collection[int]
) -> AttentionBackend:
    """Resolve `model.attention` to a backend for devices whose own backend is `native`.

    Args:
        requested: `model.attention`.
        native: what `native_backend` returns for the devices.
        dtype: the model's compute type.
        head_dims: its head widths.

    Raises:
        ConfigError: the requested backend cannot run there.
    """
    unmet = _unmet_by_cudnn(native, dtype, head_dims)
    if requested == "auto":
        return "xla" if unmet else native
    if requested not in ("xla", native):
        raise ConfigError(
            f"model.attention: {requested} is for {_SERVES[requested]}, not for this device; expected auto or xla"
        )
    if requested == "cudnn" and unmet:
        raise ConfigError(f"model.attention: {unmet}; expected auto or xla, or another model.compute_dtype")
    return requested


def explain_backend(
    requested: Literal["auto", AttentionBackend], native: AttentionBackend, dtype: str, head_dims: Collection[int]
) -> str:
    """Return why `choose_backend` chooses its backend from the same arguments."""
    if requested != "auto":
        return "model.attention names it"
    served = f"it is for {_SERVES[native]}" if native in _SERVES else "these devices have no kernel of their own"
    return f"auto: {_unmet_by_cudnn(native, dtype, head_dims) or served}"


def _unmet_by_cudnn(native: AttentionBackend, dtype: str, head_dims: Collection[int]) -> str:
    """Return the requirement of cuDNN's kernel that the model does not meet; "" if it meets all, or elsewhere."""
    unfit = [width for width in head_dims if not cudnn_serves(dtype, width)] if native == "cudnn" else []
    heads = ", ".join(map(str, unfit))
    needs = f"cudnn takes bfloat16 and heads of a multiple of 8 up to 128, not {dtype} with heads of {heads}"
    return needs if unfit else ""
