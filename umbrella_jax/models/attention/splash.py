"""Attention by splash, the flash kernel for TPUs that comes with jax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umbrella_jax.batch import AnyArray

_BLOCKS = (512, 384, 256)  # queries or keys per block, multiples of 128 lanes; scores of 512² take 1 MiB of VMEM
_LANES = 128


def splash_block(length: int) -> int:
    """Return the block size that pads `length` least: 384 pads 729 to 768, 512 pads 793 to 1024."""
    return min(_BLOCKS, key=lambda block: -length % block)


def splash_shape(length: int, head_dim: int) -> tuple[int, int]:
    """Return length and head width as the kernel pads them: to whole blocks, and to whole lanes (64 and 72 to 128)."""
    return length + -length % splash_block(length), head_dim + -head_dim % _LANES


def splash_attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S K Dh"],
    v: Float[Array, "B S K Dh"],
    lengths: Int[AnyArray, "B"] | None,
    *,
    causal: bool,
) -> Float[Array, "B T H Dh"]:
    """Compute `attention` on one device."""
    from jax.experimental.pallas.ops.tpu import (
        splash_attention as splash,
    )  # imported here, since it is slow and only TPUs need it

    def padded(x: Array) -> Array:
        length, width = splash_shape(x.shape[1], x.shape[3])
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))
        return x.transpose(0, 2, 1, 3)

    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # splash does not scale
    queries, keys, values = padded(scaled), padded(k), padded(v)
    heads, t, s = *queries.shape[1:3], keys.shape[2]
    mask = splash.CausalMask((t, s)) if causal else splash.FullMask((t, s))
    bq, bkv = splash_block(q.shape[1]), splash_block(k.shape[1])
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=bq, block_kv=bkv, block_q_dkv=bq, block_kv_dkv=bkv, block_q_dq=bq, block_kv_dq=bkv
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
    )
    # Segment 1 holds every query, padding included, and the keys in use, so no query is without a key.
    lengths = jnp.full(k.shape[:1], k.shape[1]) if lengths is None else lengths
    used = (jnp.arange(s)[None] < lengths[:, None]).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones((len(used), t), jnp.int32), kv=used)
    out = jax.vmap(kernel)(queries, keys, values, segments)
    return out.transpose(0, 2, 1, 3)[:, : q.shape[1], :, : q.shape[3]]
