"""Attention by cuDNN's flash kernel, on NVIDIA GPUs since Ampere."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from umbrella_jax.batch import AnyArray

MULTIPLE = 2
"""Sequence lengths must be multiples of this number: jax refuses gradients at odd lengths."""


def cudnn_serves(dtype: str, head_dim: int) -> bool:
    """Return whether the kernel supports this type and head width."""
    return dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128


def cudnn_attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S K Dh"],
    v: Float[Array, "B S K Dh"],
    lengths: Int[AnyArray, "B"] | None,
    *,
    causal: bool,
) -> Float[Array, "B T H Dh"]:
    """Compute `attention` on one device."""
    if lengths is None and k.shape[1] % MULTIPLE:
        lengths = jnp.full(k.shape[:1], k.shape[1], jnp.int32)  # hides the padding below
    even = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % MULTIPLE), (0, 0), (0, 0))) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(*even, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, : q.shape[1]]


def is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy that keeps the forward kernel's output and softmax denominators, which jax gives no names."""
    return primitive.name == "dot_product_attention_fwd_wrapper"
