"""Generate answers that begin and end at different times, in the lanes of one batch.

`umbrella_jax.inference.generate` answers a batch whose rows begin together. A server has questions that arrive one by
one: each is read by itself (`prefill` with one row), takes a free lane (`enter`), and leaves it after its last token,
while other lanes go on. All lanes advance by one token at a time (`advance`).

The number of lanes and of slots are the only shapes, so a server compiles a handful of programs. Each lane has its own
temperature, seed and number of tokens; draws equal those of `generate` with the same seed.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from umbrella_jax.batch import AnyArray
from umbrella_jax.inference.generate import Decoding
from umbrella_jax.models import KVCache, Params, merge


@no_type_check  # jax also builds it with shapes or None as fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Lanes:
    """State of B lanes. A free lane keeps the state of its last question."""

    cache: KVCache
    lengths: Int32[Array, "B"]
    """Filled slots of each lane; the position of its last token, which is not in the cache yet."""
    tokens: Int32[Array, "B"]
    """The last token of each lane."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Draws:
    """How each of B lanes chooses its next token; see `Sampling`."""

    temperature: AnyArray
    """float32 [B]; 0 takes the likeliest token."""
    top_k: AnyArray
    """int32 [B]; the number of words, or more, for all."""
    top_p: AnyArray
    """float32 [B]."""
    seeds: AnyArray
    """uint32 [B]."""
    counts: AnyArray
    """int32 [B]; tokens that each lane has so far."""


def empty_lanes(state: Decoding, lanes: int, slots: int) -> Lanes:
    """Return free lanes of so many slots, for prompts that are read as `state` was."""

    def empty(x: Float[Array, "L 1 K S Dh"]) -> Float[Array, "L B K Z Dh"]:
        layers, _, heads, _, width = x.shape
        return jnp.zeros((layers, lanes, heads, slots, width), x.dtype)

    cache = KVCache(k=empty(state.cache.k), v=empty(state.cache.v), used=jnp.zeros((lanes, slots), bool))
    return Lanes(cache=cache, lengths=jnp.zeros(lanes, jnp.int32), tokens=jnp.zeros(lanes, jnp.int32))


@partial(jax.jit, donate_argnames="lanes")
def enter(lanes: Lanes, state: Decoding, lane: Int[AnyArray, ""], token: Int[AnyArray, ""]) -> Lanes:
    """Put a prompt and the first token of its answer into a lane. `lanes` is donated.

    Nothing of the lane's last question stays: attention gives it the weight 0, and 0 · NaN is NaN.

    Args:
        state: the result of `prefill` for the prompt, of one row, with no more slots than the lanes have.
    """
    cache, (_, slots) = lanes.cache, lanes.cache.used.shape

    def put(all_lanes: Array, own: Array) -> Array:
        own = jnp.pad(own, ((0, 0), (0, 0), (0, 0), (0, slots - own.shape[3]), (0, 0)))
        return jax.lax.dynamic_update_slice(all_lanes, own, (0, lane, 0, 0, 0))

    used = (jnp.arange(slots) < state.lengths[0])[None]
    return Lanes(
        cache=KVCache(
            k=put(cache.k, state.cache.k),
            v=put(cache.v, state.cache.v),
            used=jax.lax.dynamic_update_slice(cache.used, used, (lane, 0)),
        ),
        lengths=lanes.lengths.at[lane].set(state.lengths[0]),
        tokens=lanes.tokens.at[lane].set(token),
    )


@partial(jax.jit, static_argnames="graphdef")
def first_token(
    params: Params, hidden: Float[Array, "B D"], draws: Draws | None, *, graphdef: nnx.GraphDef
) -> tuple[Int32[Array, "B"], Bool[Array, "B"]]:
    """Choose the first token after each prompt's last hidden state.

    Args:
        draws: None takes the likeliest tokens.

    Returns:
        The tokens, and whether all logits of each row are finite.
    """
    return _choose(merge(graphdef, params).language_model.logits(hidden), draws)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="lanes")
def advance(
    params: Params, lanes: Lanes, is_busy: Bool[AnyArray, "B"], draws: Draws | None, *, graphdef: nnx.GraphDef
) -> tuple[Lanes, Bool[Array, "B"]]:
    """Generate the next token of every busy lane. `lanes` is donated.

    Args:
        draws: None takes the likeliest tokens.

    Returns:
        The lanes with their new `tokens`, and whether all logits of each lane are finite.
    """
    language_model = merge(graphdef, params).language_model
    x = language_model.model.embed_tokens(lanes.tokens).astype(lanes.cache.k.dtype)[:, None]
    hidden, k, v = language_model.model.extend(x, lanes.lengths[:, None], lanes.cache)
    rows = jnp.arange(len(lanes.tokens))

    def put(cache: Float[Array, "L B K S Dh"], new: Float[Array, "L B K 1 Dh"]) -> Float[Array, "L B K S Dh"]:
        return cache.at[:, rows, :, lanes.lengths].set(new[:, :, :, 0].swapaxes(0, 1), mode="drop")

    cache = KVCache(
        k=put(lanes.cache.k, k),
        v=put(lanes.cache.v, v),
        used=lanes.cache.used.at[rows, lanes.lengths].set(is_busy, mode="drop"),
    )
    tokens, finite = _choose(language_model.logits(hidden[:, 0]), draws)
    return replace(lanes, cache=cache, lengths=lanes.lengths + is_busy, tokens=tokens), finite


def _choose(logits: Float32[Array, "B V"], draws: Draws | None) -> tuple[Int32[Array, "B"], Bool[Array, "B"]]:
    likeliest, finite = logits.argmax(-1).astype(jnp.int32), jnp.isfinite(logits).all(-1)
    if draws is None:
        return likeliest, finite
    is_drawn = draws.temperature > 0
    logits = logits / jnp.where(is_drawn, draws.temperature, 1)[:, None]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.clip(draws.top_k, 1, logits.shape[-1])[:, None] - 1
    logits, ranked = (jnp.where(x < jnp.take_along_axis(ranked, last, axis=-1), -jnp.inf, x) for x in (logits, ranked))
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.where(before < draws.top_p[:, None], ranked, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where((logits < least) & (draws.top_p < 1)[:, None], -jnp.inf, logits)
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(draws.seeds, draws.counts)
    drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jnp.where(is_drawn, drawn, likeliest), finite


def draws_of(
    temperature: Float32[AnyArray, "B"],
    top_k: Int32[AnyArray, "B"],
    top_p: Float32[AnyArray, "B"],
    seeds: UInt32[AnyArray, "B"],
    counts: Int32[AnyArray, "B"],
) -> Draws | None:
    """Return how to choose the next tokens; None if no lane draws, which needs no sorting of the words."""
    if not (temperature > 0).any():
        return None
    return Draws(temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds, counts=counts)
