"""Attention in XLA's own operations, with a backward pass that keeps the softmax's denominator alone.

Axes: B rows, T queries, S keys, K kv heads, G heads that share one, Dh head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
_BLOCK_BYTES = 4 << 20  # of scores at a time, about what a core's cache holds
_MASKED = -1e30  # not -inf: a row without any key would be NaN


def xla_attention(q: Array, k: Array, v: Array, lengths: Array, *, causal: bool) -> Array:
    """Softmax(q·kᵀ/√Dh + mask)·v: q [B, T, H, Dh]; k, v [B, S, K, Dh]; lengths int32 [B] → [B, T, H, Dh]."""
    b, t, h, d = q.shape
    kv = k.shape[2]
    q = q.reshape(b, t, kv, h // kv, d).transpose(2, 0, 3, 1, 4)
    k, v = (x.transpose(2, 0, 1, 3) for x in (k, v))
    out = _attention(q, k, v, lengths, causal)
    return out.transpose(1, 3, 0, 2, 4).reshape(b, t, h, d)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, lengths: Array, causal: bool) -> Array:
    """q [K, B, G, T, Dh]; k, v [K, B, S, Dh]; lengths [B] → [K, B, G, T, Dh]."""
    return _forward(q, k, v, lengths, causal)[0]


def _forward(q: Array, k: Array, v: Array, lengths: Array, causal: bool) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _for_each_kv_head(partial(_one_forward, lengths, causal=causal), (q, k, v))
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, lengths, out, lse)


def _backward(causal: bool, residuals: tuple[Array, ...], dout: Array) -> tuple[Array | None, ...]:
    q, k, v, lengths, out, lse = residuals
    args = (q, k, v, out, lse, dout)
    dq, dk, dv = _for_each_kv_head(partial(_one_backward, lengths, causal=causal), args)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _for_each_kv_head(function: Callable[..., Any], args: tuple[Array, ...]) -> Any:
    """One after the other on a CPU, where the scores of a head then stay in its cache; elsewhere all at once.

    Rows are not gone through: they are what devices share out.
    """
    one_by_one = lambda *args: jax.lax.map(lambda one: function(*one), args)  # noqa: E731
    return jax.lax.platform_dependent(*args, cpu=one_by_one, default=jax.vmap(function))


def _blocks(shape: tuple[int, ...], keys: int, causal: bool) -> list[tuple[slice, int]]:
    """Queries block by block, and how many keys a block can see: above the diagonal nothing is computed."""
    rows, heads, queries, _ = shape
    wanted = -(-rows * heads * queries * keys * 4 // _BLOCK_BYTES)
    count = min(max(wanted, 4 if causal else 1), 8, -(-queries // 128))  # each is compiled on its own
    size = -(-queries // count)
    starts = range(0, queries, size)
    return [(slice(i, min(i + size, queries)), min(i + size, keys) if causal else keys) for i in starts]


def _scores(q: Array, k: Array, lengths: Array, first: int | None) -> Array:
    """Masked and scaled scores, transposed: float32 [B, G, S, T]. `first` is the first query's place, where causal."""
    scores = jnp.einsum("bsd,bgtd->bgst", k, q, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    s, t = scores.shape[2:]
    allowed = jnp.arange(s)[:, None] < lengths[:, None, None, None]
    if first is not None:
        allowed &= jnp.arange(s)[:, None] <= first + jnp.arange(t)
    return jnp.where(allowed, scores, _MASKED)


def _one_forward(lengths: Array, q: Array, k: Array, v: Array, *, causal: bool) -> tuple[Array, Array]:
    """One kv head: out [B, G, T, Dh] and the logarithm of the softmax's denominator, float32 [B, G, T]."""
    outs, lses = [], []
    for block, keys in _blocks(q.shape, k.shape[1], causal):
        scores = _scores(q[:, :, block], k[:, :keys], lengths, block.start if causal else None)
        top = scores.max(2, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(2)
        out = jnp.einsum("bgst,bsd->bgtd", p.astype(v.dtype), v[:, :keys], preferred_element_type=jnp.float32)
        outs.append((out / total[..., None]).astype(q.dtype))
        lses.append(top[:, :, 0] + jnp.log(total))
    return jnp.concatenate(outs, 2), jnp.concatenate(lses, 2)


def _one_backward(
    lengths: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, dout: Array, *, causal: bool
) -> tuple[Array, Array, Array]:
    """Dao et al. 2022, algorithm 4: the probabilities are made again from q, k and the softmax's denominator."""
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1)
    scale = q.shape[-1] ** -0.5
    dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block, keys in _blocks(q.shape, k.shape[1], causal):
        q_, dout_, row = q[:, :, block], dout[:, :, block], (slice(None), slice(None), None, block)
        p = jnp.exp(_scores(q_, k[:, :keys], lengths, block.start if causal else None) - lse[row])
        dp = jnp.einsum("bsd,bgtd->bgst", v[:, :keys], dout_, preferred_element_type=jnp.float32)
        ds = (p * (dp - delta[row]) * scale).astype(q.dtype)
        dqs.append(jnp.einsum("bgst,bsd->bgtd", ds, k[:, :keys]))
        float32 = {"preferred_element_type": jnp.float32}
        dk = dk.at[:, :keys].add(jnp.einsum("bgst,bgtd->bsd", ds, q_, **float32))
        dv = dv.at[:, :keys].add(jnp.einsum("bgst,bgtd->bsd", p.astype(q.dtype), dout_, **float32))
    return jnp.concatenate(dqs, 2), dk.astype(k.dtype), dv.astype(v.dtype)
