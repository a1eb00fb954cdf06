"""Attention in plain XLA operations; for the backward pass it keeps the softmax's denominators, not its probabilities.

Axes: B rows, T queries, S keys, H heads, K kv heads, N = B·H heads of all rows, Dh head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from umbrella_jax.batch import AnyArray

_BLOCK_BYTES = 4 << 20  # of scores at a time, about the size of a core's cache
_MASKED = -1e30  # not -inf, which would make a row without any key NaN


def xla_attention(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S K Dh"],
    v: Float[Array, "B S K Dh"],
    lengths: Int[AnyArray, "B"] | None,
    *,
    causal: bool,
) -> Float[Array, "B T H Dh"]:
    """Compute `attention` on one device."""
    b, t, h, d = q.shape
    k, v = (jnp.repeat(x, h // k.shape[2], axis=2) for x in (k, v))
    q = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)  # q has fewer numbers to scale than the scores
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], d) for x in (q, k, v))
    lengths = None if lengths is None else jnp.repeat(lengths, h)
    return _attention(q, k, v, lengths, causal).reshape(b, h, t, d).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q: Float[Array, "N T Dh"],
    k: Float[Array, "N S Dh"],
    v: Float[Array, "N S Dh"],
    lengths: Int[Array, "N"] | None,
    causal: bool,
) -> Float[Array, "N T Dh"]:
    """Attend head by head; q is already scaled."""
    return _forward(q, k, v, lengths, causal)[0]


def _forward(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> tuple[Array, tuple[Any, ...]]:
    out, lse = _for_each_head(partial(_one_forward, causal=causal), (q, k, v, lengths))
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, lengths, out, lse)


def _backward(causal: bool, residuals: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    q, k, v, lengths, out, lse = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    args = (q, k, v, lengths, lse, delta, dout)
    dq, dk, dv = _for_each_head(partial(_one_backward, causal=causal), args)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _for_each_head(function: Callable[..., Any], args: tuple[Array | None, ...]) -> Any:
    """Apply `function` to each head: all at once, but one by one on a CPU, whose cache then holds a head's scores."""
    one_by_one = lambda *args: jax.lax.map(lambda one: function(*one), args)  # noqa: E731
    return jax.lax.platform_dependent(*args, cpu=one_by_one, default=jax.vmap(function))


def _blocks(queries: int, keys: int, causal: bool) -> list[tuple[slice, int]]:
    """Split queries into blocks, each with the number of keys it sees: nothing above the diagonal is computed."""
    needed = -(-queries * keys * 4 // _BLOCK_BYTES)
    count = min(max(needed, 4 if causal else 1), 8, -(-queries // 128))  # each block is compiled separately
    size = -(-queries // count)
    starts = range(0, queries, size)
    return [(slice(i, min(i + size, queries)), min(i + size, keys) if causal else keys) for i in starts]


def _scores(
    q: Float[Array, "T Dh"], k: Float[Array, "S Dh"], length: Int[Array, ""] | None, first: int | None
) -> Float32[Array, "T S"]:
    """Return masked q·kᵀ; `first` is the first query's position if causal, else None."""
    scores = jnp.einsum("td,sd->ts", q, k, preferred_element_type=jnp.float32)
    t, s = scores.shape
    if length is not None:
        scores = jnp.where(jnp.arange(s) < length, scores, _MASKED)
    if first is not None:
        scores = jnp.where(jnp.arange(s)[None] <= first + jnp.arange(t)[:, None], scores, _MASKED)
    return scores


def _one_forward(
    q: Float[Array, "T Dh"],
    k: Float[Array, "S Dh"],
    v: Float[Array, "S Dh"],
    length: Int[Array, ""] | None,
    *,
    causal: bool,
) -> tuple[Float[Array, "T Dh"], Float32[Array, "T 1"]]:
    """Return one head's output and the logarithm of its softmax's denominators."""
    outs, lses = [], []
    for block, keys in _blocks(len(q), len(k), causal):
        scores = _scores(q[block], k[:keys], length, block.start if causal else None)
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        out = jnp.einsum("ts,sd->td", p.astype(v.dtype), v[:keys], preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs), jnp.concatenate(lses)


def _one_backward(
    q: Float[Array, "T Dh"],
    k: Float[Array, "S Dh"],
    v: Float[Array, "S Dh"],
    length: Int[Array, ""] | None,
    lse: Float32[Array, "T 1"],
    delta: Float32[Array, "T 1"],
    dout: Float[Array, "T Dh"],
    *,
    causal: bool,
) -> tuple[Float[Array, "T Dh"], Float[Array, "S Dh"], Float[Array, "S Dh"]]:
    """Return the gradients of one head's q, k and v, computing the probabilities again (Dao et al. 2022, algorithm 4).

    Args:
        lse: the logarithm of the softmax's denominators.
        delta: Σ out·dout over Dh.
    """
    float32 = {"preferred_element_type": jnp.float32}
    dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block, keys in _blocks(len(q), len(k), causal):
        q_, dout_ = q[block], dout[block]
        p = jnp.exp(_scores(q_, k[:keys], length, block.start if causal else None) - lse[block])
        dp = jnp.einsum("td,sd->ts", dout_, v[:keys], **float32)
        ds = (p * (dp - delta[block])).astype(q.dtype)
        dqs.append(jnp.einsum("ts,sd->td", ds, k[:keys]))
        dk = dk.at[:keys].add(jnp.einsum("ts,td->sd", ds, q_, **float32))
        dv = dv.at[:keys].add(jnp.einsum("ts,td->sd", p.astype(q.dtype), dout_, **float32))
    return jnp.concatenate(dqs), dk.astype(k.dtype), dv.astype(v.dtype)
