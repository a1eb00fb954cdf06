"""Generate answers to prompts, and compute the probability of given answers.

`prefill` reads a prompt once and keeps its keys and values, so each further token costs a pass over that token only.
Prompts that begin alike share the pass over their beginning: `ask` continues it by each of their questions in turn.
Each batch shape and answer length compiles `prefill` and `decode`, `ask` for prompts that begin alike, and
`score_answers` if likelihoods are asked for. `encode` encodes volumes ahead of the prompts that show them.
Tokens may be limited step by step (`TokenMasks`), as `inference/constrained.py` does for answers in JSON.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int32, Key, UInt32

from umbrella_jax.batch import NONE as NONE
from umbrella_jax.batch import AnswerTree, AnyArray, Batch
from umbrella_jax.data.answer_trees import answer_trees
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import KVCache, Llava, Params, merge, split
from umbrella_jax.models.parallel import ROWS, local
from umbrella_jax.models.qwen import visible_nodes
from umbrella_jax.scoring.numeric import NumberDistributions
from umbrella_jax.training.diagnose import nonfinite_error

_LARGEST = 1e6
"""Largest temperature, and 1 over the smallest one: beyond them, float32 turns logits into infinity or all into 0."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token: the most likely one, or a random draw from the likelier ones.

    Raises ConfigError for numbers out of range, and for `top_k` or `top_p` at temperature 0.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 always chooses the most likely token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens, and from all that tie with the last one."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities sum to at least this (Holtzman et al. 2020)."""

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < float("inf"):
            faults.append(f"temperature: expected 0 or more, got {self.temperature}")
        elif self.temperature and not 1 / _LARGEST <= self.temperature <= _LARGEST:
            limits = f"from {1 / _LARGEST:g} to {_LARGEST:g}"
            faults.append(f"temperature: expected 0, or {limits}, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            faults.append(f"top_k: expected 1 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        for name, given in (("top_k", self.top_k is not None), ("top_p", self.top_p < 1)):
            if given and self.temperature == 0:
                faults.append(f"{name}: does nothing at temperature 0; expected a temperature above 0, or no {name}")
        if faults:
            raise ConfigError(faults)


GREEDY = Sampling()


@no_type_check  # jax also builds it with shapes, shardings or None as fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Decoding:
    """State of B rows during generation of at most N tokens."""

    cache: KVCache
    """Keys and values; the slots of the prompts are followed by N - 1 slots for tokens."""
    lengths: Int32[Array, "B"]
    """Number of positions of each prompt."""
    hidden: Float[Array, "B D"]
    """Last hidden state of each prompt, from which its first token is chosen."""
    tokens: Int32[Array, "B N"]
    """The answers so far, padded with `NONE`."""
    num_generated: Int32[Array, ""]
    """Number of tokens generated so far."""
    ended: Bool[Array, "B"]
    """Whether the answer has ended."""
    finite: Bool[Array, "B"]
    """Whether all logits so far were finite; a row ends at the first logits that are not."""


@partial(jax.jit, static_argnames=("graphdef", "name"), donate_argnames="features")
def encode(
    params: Params,
    volumes: Float[AnyArray, "M *size"],
    slots: Int32[AnyArray, "M"],
    features: Float[Array, "S N D"],
    *,
    graphdef: nnx.GraphDef,
    name: str,
) -> Float[Array, "S N D"]:
    """Write the features of volumes of modality `name` into slots of `features`, which is donated.

    Args:
        slots: on a mesh, a slot within the part of the device that holds the volume; S or more for a volume to ignore.
    """
    model = merge(graphdef, params)

    def put(features: Array, new: Array, slots: Array) -> Array:
        return features.at[slots].set(new.astype(features.dtype), mode="drop")

    rows = PartitionSpec(ROWS)
    new = model.image_features(name, volumes)
    return local(put, in_specs=rows, out_specs=rows, check_vma=True)(features, new, jnp.asarray(slots))


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "question_slots"))
def prefill(
    params: Params,
    batch: Batch,
    features: Mapping[str, Array] | None = None,
    is_asked: Bool[AnyArray, "B"] | None = None,
    *,
    graphdef: nnx.GraphDef,
    max_new_tokens: int,
    question_slots: int = 0,
) -> Decoding:
    """Read the prompts of a batch and encode each of its volumes once.

    Args:
        features: {modality: features [M, N, D]} for `batch.feature_idx`, instead of encoding `batch.volumes`.
        is_asked: rows that get an answer; None for all.
        question_slots: slots of the cache to leave free for `ask`.
    """
    model = merge(graphdef, params)
    embeds = model.inputs_embeds(batch, features)
    hidden, cache = model.language_model.model.prefill(embeds, batch.positions, batch.lengths)
    last = jnp.take_along_axis(hidden, batch.lengths[:, None, None] - 1, axis=1)[:, 0]
    cache = cache.grown(question_slots + max_new_tokens - 1)
    return _begin(cache, batch.lengths, last, max_new_tokens, is_asked)


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"), donate_argnames="cache")
def ask(
    params: Params,
    cache: KVCache,
    context_lengths: Int32[AnyArray, "B"],
    questions: Int32[AnyArray, "B T"],
    question_lengths: Int32[AnyArray, "B"],
    *,
    graphdef: nnx.GraphDef,
    max_new_tokens: int,
) -> Decoding:
    """Continue each context by a question; what its cache holds beyond the context is overwritten.

    Args:
        cache: that of a `prefill` of the contexts with T `question_slots`; donated.
        question_lengths: tokens of each question; a row with 0 is not asked.
    """
    language_model = merge(graphdef, params).language_model
    slots, size = cache.used.shape[1], questions.shape[1]
    used = jnp.arange(slots)[None] < context_lengths[:, None]
    cache = replace(cache, used=used)
    x = language_model.model.embed_tokens(questions).astype(cache.k.dtype)
    positions = context_lengths[:, None] + jnp.arange(size)[None]
    hidden, k, v = language_model.model.extend(x, positions, cache)
    first = slots - (max_new_tokens - 1) - size
    is_asked = jnp.arange(size)[None] < question_lengths[:, None]
    cache = cache.put(k, v, first)
    cache = replace(cache, used=jax.lax.dynamic_update_slice_in_dim(used, is_asked, first, axis=1))
    last = jnp.take_along_axis(hidden, jnp.maximum(question_lengths, 1)[:, None, None] - 1, axis=1)[:, 0]
    return _begin(cache, context_lengths + question_lengths, last, max_new_tokens, question_lengths > 0)


def _begin(
    cache: KVCache,
    lengths: Int32[AnyArray, "B"],
    hidden: Float[Array, "B D"],
    max_new_tokens: int,
    is_asked: Bool[AnyArray, "B"] | None,
) -> Decoding:
    """Return the state before the first token of an answer."""
    rows = len(lengths)
    return Decoding(
        cache=cache,
        lengths=jnp.asarray(lengths),
        hidden=hidden,
        tokens=jnp.full((rows, max_new_tokens), NONE, jnp.int32),
        num_generated=jnp.zeros((), jnp.int32),
        ended=jnp.zeros(rows, bool) if is_asked is None else ~is_asked,
        finite=jnp.ones(rows, bool),
    )


@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames="state")
def decode(
    params: Params,
    state: Decoding,
    stop_ids: Int32[Array, "S"],
    seeds: UInt32[Array, "B"],
    until: Int32[Array, ""],
    allowed: UInt32[AnyArray, "B W"] | None = None,
    *,
    graphdef: nnx.GraphDef,
    sampling: Sampling = GREEDY,
) -> Decoding:
    """Generate until the rows have `until` tokens or have all ended. `state` is donated.

    A row ends with the first of `stop_ids`, which is part of the result. Draws for a row depend on its own seed and its
    number of tokens, not on the other rows.

    Args:
        allowed: tokens to choose from, before `sampling` limits them further: bit i % 32 of word i // 32 is set for
            token i. It holds for all tokens of this call, so `until` is then one more than there are.
    """
    language_model = merge(graphdef, params).language_model
    size = state.tokens.shape[1]
    first_slot = state.cache.used.shape[1] - (size - 1)
    keys = jax.vmap(jax.random.key)(seeds)

    def next_token(state: Decoding, hidden: Float[Array, "B D"]) -> dict[str, Array]:
        logits = language_model.logits(hidden)
        finite = jnp.isfinite(logits).all(-1)
        if allowed is not None:
            bits = (jnp.asarray(allowed)[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
            logits = jnp.where(bits.reshape(len(bits), -1)[:, : logits.shape[-1]] == 1, logits, -jnp.inf)
        token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, state.num_generated), sampling)
        kept = jnp.where(state.ended, NONE, token)
        # tokens.at[:, num_generated] would make devices exchange rows
        tokens = jnp.where(jnp.arange(size) == state.num_generated, kept[:, None], state.tokens)
        ended = state.ended | jnp.isin(token, stop_ids) | ~finite
        return {
            "tokens": tokens,
            "num_generated": state.num_generated + 1,
            "ended": ended,
            "finite": state.finite & (state.ended | finite),
        }

    def unfinished(state: Decoding) -> Bool[Array, ""]:
        return (state.num_generated < until) & ~state.ended.all()

    def step(state: Decoding) -> Decoding:
        last = jnp.take(state.tokens, state.num_generated - 1, axis=1)
        x = language_model.model.embed_tokens(jnp.maximum(last, 0)).astype(state.hidden.dtype)[:, None]
        positions = (state.lengths + state.num_generated - 1)[:, None]
        hidden, k, v = language_model.model.extend(x, positions, state.cache)
        cache = state.cache.put(k, v, first_slot + state.num_generated - 1)
        return replace(state, cache=cache, **next_token(state, hidden[:, 0]))

    first = jax.lax.cond(
        state.num_generated == 0,
        lambda: next_token(state, state.hidden),
        lambda: {name: getattr(state, name) for name in ("tokens", "num_generated", "ended", "finite")},
    )
    return jax.lax.while_loop(unfinished, step, replace(state, **first))


def choose(logits: Float32[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int32[Array, "B"]:
    """Choose the next tokens from logits, with one random key per row."""
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        least = jnp.where(before < sampling.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graphdef",))
def score_answers(
    params: Params, state: Decoding, answers: AnswerTree, *, graphdef: nnx.GraphDef
) -> Float32[Array, "B A"]:
    """Return log p(answer | prompt), summed over the answer's tokens.

    Args:
        state: the result of `prefill` or `ask`, before any call of `decode`.
        answers: as `answer_trees` returns them. An answer without tokens has log-probability 0.
    """
    language_model = merge(graphdef, params).language_model
    x = language_model.model.embed_tokens(answers.tokens[:, 1:]).astype(state.hidden.dtype)
    positions = state.lengths[:, None] + answers.depths[:, 1:] - 1
    sees = visible_nodes(answers)[:, 1:, 1:]
    later, _, _ = language_model.model.extend(x, positions, state.cache, sees)
    # the prompt's last hidden state predicts the first token
    hidden = jnp.concatenate([state.hidden[:, None], later], axis=1)
    return language_model.answer_scores(hidden, answers.next_tokens)


@runtime_checkable
class TokenMasks(Protocol):
    """Limits the next token of each of B rows, given the tokens so far."""

    def allowed(self) -> UInt32[np.ndarray, "B W"]:
        """Return the tokens that may come next, as for `decode`."""

    def accept(self, tokens: Int32[np.ndarray, "B"]) -> None:
        """Append a token to each row; `NONE` to a row that has ended."""


def decode_masked(
    state: Decoding,
    masks: TokenMasks,
    decode_to: Callable[[Decoding, int, UInt32[np.ndarray, "B W"]], Decoding],
    fetch: Callable[[Any], Any] = jax.device_get,
) -> Decoding:
    """Generate token by token until the rows are full or have all ended.

    Args:
        state: the result of `prefill` or `ask`.
        decode_to: extends a state to a number of tokens with masks.
        fetch: brings arrays of the devices to this host.
    """
    for count in range(1, state.tokens.shape[1] + 1):
        state = decode_to(state, count, masks.allowed())
        tokens, ended = fetch((state.tokens, state.ended))
        if ended.all():
            break
        masks.accept(tokens[:, count - 1])
    return state


def stream(
    model: Llava,
    batch: Batch,
    *,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int = 32,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | Int[AnyArray, "B"] | None = None,
    masks: TokenMasks | None = None,
) -> Iterator[Int32[np.ndarray, "B"]]:
    """Yield the tokens of `generate` one by one; a row that has ended gives `NONE`.

    Arguments and errors are the same as for `generate`.
    """
    state, decode_to = _start(model, batch, stop_ids, max_new_tokens, sampling, seeds)
    for count in range(1, max_new_tokens + 1):
        state = decode_to(state, count, masks.allowed() if masks else None)
        _check_finite("logits", np.asarray(state.finite), model, batch)
        tokens = np.asarray(state.tokens[:, count - 1])
        yield tokens
        if state.ended.all():
            return
        if masks:
            masks.accept(tokens)


def generate(
    model: Llava,
    batch: Batch,
    *,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int = 32,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | Int[AnyArray, "B"] | None = None,
    masks: TokenMasks | None = None,
) -> Int32[Array, "B {max_new_tokens}"]:
    """Generate the model's answers to the prompts of a batch.

    Args:
        stop_ids: tokens that end an answer; the ending one is part of the result, followed by `NONE`.
        sampling: how to choose tokens; by default always the most likely.
        seeds: one seed per row for random draws; by default the row's number. The same seed and prompt give the same
            answer, whatever other rows are in the batch.
        masks: limits of the rows' tokens, such as `JsonConstraint.masks` returns them.

    Raises:
        ConfigError: the number of `seeds` differs from that of rows, or a seed is not a uint32; `max_new_tokens` is
            below 1.
        CheckpointError: the batch shows an untrained modality (`umbrella_jax.load`, `allow_untrained`); weights contain
            NaN or infinity.
        RunError: logits are not finite; names the rows.
    """
    state, decode_to = _start(model, batch, stop_ids, max_new_tokens, sampling, seeds)
    state = decode_masked(state, masks, decode_to) if masks else decode_to(state, max_new_tokens, None)
    _check_finite("logits", np.asarray(state.finite), model, batch)
    return state.tokens


def probabilities(model: Llava, batch: Batch, answers: Int[AnyArray, "... A N"]) -> Float64[np.ndarray, "B A"]:
    """Return the probability of each answer, given that it is one of `answers`; rows sum to 1.

    It is not normalised by length: a longer answer is a product of more factors, as in the model.

    Args:
        answers: token ids [A, N] or [B, A, N], the ending one included, padded with `NONE`; `Processor.answers`
            returns them.

    Raises:
        CheckpointError, RunError: as `generate`.
    """
    model.config.check_trained(batch.volumes)
    graphdef, params = split(model)
    state = prefill(params, batch, graphdef=graphdef, max_new_tokens=1)
    tokens = np.broadcast_to(np.asarray(answers), (len(batch.lengths), *answers.shape[-2:]))
    scores = np.asarray(score_answers(params, state, answer_trees(tokens.tolist()), graphdef=graphdef), np.float64)
    _check_finite("likelihoods", np.asarray(np.isfinite(scores).all(-1)), model, batch)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def read_numbers(
    model: Llava, batch: Batch, numbers: Int[AnyArray, "... A N"], values: Sequence[float]
) -> NumberDistributions:
    """Return the model's distributions over candidate numbers, one for each row of the batch.

    Args:
        numbers: tokens of the candidates, as `Processor.numbers` returns them.
        values: the candidates, ascending (`NumberGrid.values`).

    Raises:
        CheckpointError, RunError: as `generate`.
    """
    return NumberDistributions(np.array(values, np.float64), probabilities(model, batch, numbers))


def _check_finite(what: str, finite: Bool[np.ndarray, "B"], model: Llava, batch: Batch) -> None:
    """Raise the error of `nonfinite_error` if any row of `finite` is false."""
    if not finite.all():
        graphdef, params = split(model)
        names = {int(row): f"row {row} of the batch" for row in np.flatnonzero(~finite)}
        raise nonfinite_error(what, names, params, jax.tree.map(jnp.asarray, batch), graphdef=graphdef)


def _start(
    model: Llava,
    batch: Batch,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int] | Int[AnyArray, "B"] | None,
) -> tuple[Decoding, Callable[[Decoding, int, UInt32[np.ndarray, "B W"] | None], Decoding]]:
    """Read the prompts; return their state and a function that extends their answers to a number of tokens."""
    row_seeds: Any = range(len(batch.lengths)) if seeds is None else seeds
    faults = [] if max_new_tokens > 0 else [f"max_new_tokens: expected 1 or more, got {max_new_tokens}"]
    if len(row_seeds) != len(batch.lengths):
        faults.append(f"seeds: {len(row_seeds)} given; expected one for each of {len(batch.lengths)} rows")
    faults += [f"seeds: expected 0 to {2**32 - 1}, got {seed}" for seed in row_seeds if not 0 <= seed < 2**32]
    if faults:
        raise ConfigError(faults)
    model.config.check_trained(batch.volumes)
    keys, stop = jnp.asarray(row_seeds, jnp.uint32), jnp.asarray(stop_ids, jnp.int32)
    graphdef, params = split(model)

    def decode_to(state: Decoding, count: int, allowed: UInt32[np.ndarray, "B W"] | None) -> Decoding:
        return decode(params, state, stop, keys, jnp.int32(count), allowed, graphdef=graphdef, sampling=sampling)

    return prefill(params, batch, graphdef=graphdef, max_new_tokens=max_new_tokens), decode_to
