"""Attention by splash, the flash kernel for TPUs that comes with jax.

TPUs store the last two axes of an array in tiles of 8×128. With heads of 64 or 72 numbers on the last axis, almost half
of each tile would be padding. Here positions are on the last axis: in the kernel's inputs, in the gradients, and in the
arrays that the backward pass keeps.

Axes: B rows, T queries, S keys, H heads, K kv heads, Dh head width, N a length in whole blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from umbrella_jax.batch import AnyArray
from umbrella_jax.errors import ConfigError

_LANES = 128
_BLOCKS = (1024, 896, 768, 640, 512, 384, 256)  # queries or keys per block, multiples of _LANES
_PARTS = (512, 384, 256, 128)  # keys of a block at a time; scores of 512·1024 take 2 MiB of VMEM


def splash_block(length: int) -> int:
    """Return the largest block size of those that pad `length` least: 768 for 729, 896 for 793."""
    return min(_BLOCKS, key=lambda block: -length % block)


def splash_length(length: int) -> int:
    """Return `length` rounded up to whole blocks."""
    return length + -length % splash_block(length)


def splash_attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S K Dh"],
    v: Float[Array, "B S K Dh"],
    lengths: Int[AnyArray, "B"] | None,
    *,
    causal: bool,
    name: str = "qkv",
) -> Float[Array, "B T H Dh"]:
    """Compute `attention` on one device."""
    lengths = jnp.full(k.shape[:1], k.shape[1], jnp.int32) if lengths is None else lengths
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # splash does not scale
    # Pad to whole tiles before the values are kept: they take no more memory, and are not padded again.
    tiles = (_keep(_pad(x.transpose(0, 2, 3, 1), _LANES), name) for x in (scaled, k, v))
    return _attention(*tiles, lengths, causal)[..., : q.shape[1]].transpose(0, 3, 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q: Float[Array, "B H Dh T"],
    k: Float[Array, "B K Dh S"],
    v: Float[Array, "B K Dh S"],
    lengths: Int[Array, "B"],
    causal: bool,
) -> Float[Array, "B H Dh T"]:
    """Attend from queries that are already scaled.

    It calls the kernel's two passes one by one, because the kernel's own gradient rule keeps the output with heads of
    Dh numbers on the last axis.
    """
    return _forward(q, k, v, lengths, causal)[0]


def _forward(q: Array, k: Array, v: Array, lengths: Array, causal: bool) -> tuple[Array, tuple[Any, ...]]:
    kernel, (forward, _) = _kernel(q, k, causal), _passes()
    masks = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info

    def attend(q: Array, k: Array, v: Array, segments: Any) -> tuple[Array, Array]:
        out, (*_, lse, _, _) = forward(*masks, q, k, v, segments, None, **kernel.kwargs)
        return out, lse

    out, lse = jax.vmap(attend)(_to_kernel(q), _to_kernel(k), _to_kernel(v), _segments(q, k, lengths))
    out = _keep(_from_kernel(out, q.shape[-1]), "attention")
    return out, (q, k, v, lengths, out, checkpoint_name(lse, "attention"))


def _backward(causal: bool, residuals: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    q, k, v, lengths, out, lse = residuals
    kernel, (_, backward) = _kernel(q, k, causal), _passes()
    masks, segments = (kernel.dq_mask_info, kernel.dkv_mask_info), _segments(q, k, lengths)
    t, s = q.shape[-1], k.shape[-1]

    def gradients(kept: tuple[Any, ...], dout: Array) -> tuple[Array, Array, Array]:
        return backward(**kernel.kwargs, res=(*kept, *masks), do=dout)[3:6]

    q, k, v, out, dout = map(_to_kernel, (q, k, v, out, dout))
    dq, dk, dv = jax.vmap(gradients)((q, k, v, segments, None, out, lse), dout)
    return _from_kernel(dq, t), _from_kernel(dk, s), _from_kernel(dv, s), None


_attention.defvjp(_forward, _backward)


def _passes() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the kernel's forward and backward pass, which jax 0.8 to 0.12 have but do not export.

    Raises ConfigError if this jax lacks them.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    try:
        return splash._splash_attention_fwd, splash._splash_attention_bwd
    except AttributeError:
        raise ConfigError(
            f"model.attention: the splash kernel of jax {jax.__version__} is not the one this version calls; set it to "
            "xla, or install jax 0.8 to 0.12"
        ) from None


def _kernel(q: Float[Array, "B H Dh T"], k: Float[Array, "B K Dh S"], causal: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import (
        splash_attention as splash,
    )  # imported here, since it is slow and only TPUs need it

    (bq, t), (bkv, s) = ((splash_block(x.shape[-1]), splash_length(x.shape[-1])) for x in (q, k))
    mask = splash.CausalMask((t, s)) if causal else splash.FullMask((t, s))
    part = next(size for size in _PARTS if bkv % size == 0)
    blocks: dict[str, Any] = {"block_q": bq, "block_kv": bkv, "block_kv_compute": part}
    backward: dict[str, Any] = {"block_q_dkv": bq, "block_kv_dkv": bkv, "block_kv_dkv_compute": part}
    layouts: dict[str, Any] = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[1]),
        # One backward kernel, not two: it computes scores and their gradient once.
        block_sizes=splash.BlockSizes(**blocks, **backward, **layouts, use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
    )


def _segments(q: Float[Array, "B H Dh T"], k: Float[Array, "B K Dh S"], lengths: Int[Array, "B"]) -> Any:
    """Return segment 1 for every query, padding included, and for the keys in use: no query is without a key."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    used = jnp.arange(splash_length(k.shape[-1]))[None] < lengths[:, None]
    queries = jnp.ones((len(used), splash_length(q.shape[-1])), jnp.int32)
    return splash.SegmentIds(q=queries, kv=used.astype(jnp.int32))


def _pad(x: Float[Array, "B H Dh T"], multiple: int) -> Float[Array, "B H Dh N"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % multiple)))


def _to_kernel(x: Float[Array, "B H Dh T"]) -> Float[Array, "B H N Dh"]:
    return _pad(x, splash_block(x.shape[-1])).swapaxes(2, 3)


def _from_kernel(x: Float[Array, "B H N Dh"], length: int) -> Float[Array, "B H Dh T"]:
    return with_layout_constraint(x[:, :, :length].swapaxes(2, 3), Layout((0, 1, 2, 3)))


def _keep(x: Float[Array, "B H Dh T"], name: str) -> Float[Array, "B H Dh T"]:
    return checkpoint_name(x.reshape(x.shape[0], -1, x.shape[-1]), name).reshape(x.shape)
