"""Answers: what a model says to a prompt, and how probable it finds each of several answers.

A prompt is read once (`prefill`); its keys and values stay, and each further token costs one pass over that token
alone. Three programs for each shape of a batch and length of an answer: `prefill`, `decode`, `score_answers`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umbrella_jax.batch import Batch
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import KVCache, Llava, Params, merge, split
from umbrella_jax.training.diagnose import nonfinite_error

Array = jax.Array
NONE = -1
"""Stands where a row had ended already."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the most likely one, or drawn from the likelier ones.

    Raises ConfigError for numbers out of range, and for `top_k` or `top_p` at temperature 0."""

    temperature: float = 0.0
    """Logits are divided by it; 0: the most likely token, always."""
    top_k: int | None = None
    """Draw from so many of the likeliest; all that are as likely as the last of them count too."""
    top_p: float = 1.0
    """Draw from the fewest of the likeliest whose probabilities reach this sum (Holtzman et al. 2020)."""

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < float("inf"):
            faults.append(f"temperature: expected 0 or more, got {self.temperature}")
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Decoding:
    """B rows in the midst of their answers, of N tokens at most."""

    cache: KVCache
    """Slots: those of the prompts, and N - 1 behind them."""
    lengths: Array
    """int32 [B]: positions of each prompt."""
    hidden: Array
    """[B, D]: last hidden state of each prompt, from which its first token is chosen."""
    tokens: Array
    """int32 [B, N]: the answers so far; `NONE` behind."""
    made: Array
    """int32 []: tokens made so far."""
    done: Array
    """bool [B]: whether the answer has ended."""
    finite: Array
    """bool [B]: whether all logits that a token was chosen from were finite; a row ends where they were not."""


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def prefill(params: Params, batch: Batch, *, graphdef: nnx.GraphDef, max_new_tokens: int) -> Decoding:
    """Reads the prompts of a batch; volumes are encoded here, each once."""
    model = merge(graphdef, params)
    hidden, cache = model.language_model.model.prefill(model.inputs_embeds(batch), batch.positions, batch.lengths)
    rows = len(batch.lengths)
    return Decoding(
        cache=cache.grown(max_new_tokens - 1),
        lengths=jnp.asarray(batch.lengths),
        hidden=jnp.take_along_axis(hidden, batch.lengths[:, None, None] - 1, axis=1)[:, 0],
        tokens=jnp.full((rows, max_new_tokens), NONE, jnp.int32),
        made=jnp.zeros((), jnp.int32),
        done=jnp.zeros(rows, bool),
        finite=jnp.ones(rows, bool),
    )


@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames="state")
def decode(
    params: Params,
    state: Decoding,
    stop_ids: Array,
    seeds: Array,
    until: Array,
    *,
    graphdef: nnx.GraphDef,
    sampling: Sampling = GREEDY,
) -> Decoding:
    """Goes on to `until` (int32 []) tokens, or until all rows have ended. `state` is used up.

    A row ends with the first of `stop_ids` (int32 [S]), which is in the result. What is drawn for a row depends on its
    own of `seeds` (uint32 [B]) and how many tokens it has, not on the rows beside it.
    """
    language_model = merge(graphdef, params).language_model
    size = state.tokens.shape[1]
    first_slot = state.cache.used.shape[1] - (size - 1)
    keys = jax.vmap(jax.random.key)(seeds)

    def chosen(state: Decoding, hidden: Array) -> dict[str, Array]:
        logits = language_model.logits(hidden)
        finite = jnp.isfinite(logits).all(-1)
        token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, state.made), sampling)
        kept = jnp.where(state.done, NONE, token)
        # not tokens.at[:, made], for which devices would exchange rows
        tokens = jnp.where(jnp.arange(size) == state.made, kept[:, None], state.tokens)
        done = state.done | jnp.isin(token, stop_ids) | ~finite
        return {"tokens": tokens, "made": state.made + 1, "done": done, "finite": state.finite & (state.done | finite)}

    def unfinished(state: Decoding) -> Array:
        return (state.made < until) & ~state.done.all()

    def step(state: Decoding) -> Decoding:
        last = jnp.take(state.tokens, state.made - 1, axis=1)
        x = language_model.model.embed_tokens(jnp.maximum(last, 0)).astype(state.hidden.dtype)[:, None]
        positions = (state.lengths + state.made - 1)[:, None]
        hidden, k, v = language_model.model.extend(x, positions, state.cache)
        cache = state.cache.put(k, v, first_slot + state.made - 1)
        return replace(state, cache=cache, **chosen(state, hidden[:, 0]))

    begun = jax.lax.cond(
        state.made == 0,
        lambda: chosen(state, state.hidden),
        lambda: {name: getattr(state, name) for name in ("tokens", "made", "done", "finite")},
    )
    return jax.lax.while_loop(unfinished, step, replace(state, **begun))


def choose(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """Next tokens, int32 [B], of logits float32 [B, V]; one random key a row."""
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
def score_answers(params: Params, state: Decoding, answers: Array, *, graphdef: nnx.GraphDef) -> Array:
    """Logarithm of the probability of answers, given each row's prompt; float32 [B, A].

    answers int32 [B, A, N]: token ids, the one that ends an answer included, and `NONE` behind. Of a state of which
    nothing was decoded yet. The sum over an answer's tokens; 0 for one without any.
    """
    language_model = merge(graphdef, params).language_model
    b, a, n = answers.shape
    hidden = jnp.broadcast_to(state.hidden[:, None, None], (b, a, 1, state.hidden.shape[-1]))
    if n > 1:  # the first token of each follows from the prompt
        given = jnp.maximum(answers[..., :-1], 0).reshape(b, a * (n - 1))
        x = language_model.model.embed_tokens(given).astype(state.hidden.dtype)
        positions = jnp.tile(state.lengths[:, None] + jnp.arange(n - 1), (1, a))
        behind, _, _ = language_model.model.extend(x, positions, state.cache, ways=a)
        hidden = jnp.concatenate([hidden, behind.reshape(b, a, n - 1, -1)], axis=2)

    def of_one(one: tuple[Array, Array]) -> Array:  # answer by answer: logits are V numbers for each token
        hidden, tokens = one
        logits = language_model.logits(hidden)
        found = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(tokens == NONE, 0, found - jax.nn.logsumexp(logits, axis=-1)).sum(-1)

    return jax.lax.map(of_one, (hidden.swapaxes(0, 1), answers.swapaxes(0, 1))).T


def stream(
    model: Llava,
    batch: Batch,
    *,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int = 32,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Tokens of `generate` as they are made, int32 [B] each time, `NONE` of a row that has ended; arguments and errors
    are those of `generate`."""
    state, until = _start(model, batch, stop_ids, max_new_tokens, sampling, seeds)
    for count in range(1, max_new_tokens + 1):
        state = until(state, count)
        _check_finite("logits", np.asarray(state.finite), model, batch)
        yield np.asarray(state.tokens[:, count - 1])
        if state.done.all():
            return


def generate(
    model: Llava,
    batch: Batch,
    *,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int = 32,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> Array:
    """What the model answers to the prompts of a batch; int32 [B, max_new_tokens].

    Args:
        stop_ids: tokens that end an answer; the one that did is in the result, and `NONE` behind it.
        sampling: how tokens are chosen, by default the most likely.
        seeds: of each row, for tokens that are drawn; by default its number. The same seed and prompt give the same
            answer, whatever other rows are in the batch.

    Raises:
        ConfigError: as many `seeds` as there are rows were not given, or one of them is no uint32; `max_new_tokens` is
            below 1.
        CheckpointError: the batch shows an untrained modality (`umbrella_jax.load`, `allow_untrained`);
            weights hold NaN or infinity.
        RunError: logits are not finite; names the rows.
    """
    state, until = _start(model, batch, stop_ids, max_new_tokens, sampling, seeds)
    state = until(state, max_new_tokens)
    _check_finite("logits", np.asarray(state.finite), model, batch)
    return state.tokens


def probabilities(model: Llava, batch: Batch, answers: Array | np.ndarray) -> np.ndarray:
    """How probable each of several answers is, of these alone; float64 [B, A], each row sums to 1.

    answers int32 [A, N] or [B, A, N], as of `score_answers`, such as `Processor.answers` gives. Not normalised by
    length: an answer of more tokens has a product of more factors, as its text has in the model.

    Raises CheckpointError and RunError as `generate`.
    """
    model.config.check_trained(batch.volumes)
    graphdef, params = split(model)
    state = prefill(params, batch, graphdef=graphdef, max_new_tokens=1)
    given = jnp.broadcast_to(jnp.asarray(answers), (len(batch.lengths), *answers.shape[-2:]))
    scores = np.asarray(score_answers(params, state, given, graphdef=graphdef), np.float64)
    _check_finite("likelihoods", np.asarray(np.isfinite(scores).all(-1)), model, batch)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def _check_finite(what: str, finite: np.ndarray, model: Llava, batch: Batch) -> None:
    """Raise for rows that are not `finite`, bool [B]."""
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
    seeds: Sequence[int] | None,
) -> tuple[Decoding, Callable[[Decoding, int], Decoding]]:
    """The prompts as read, and what makes their answers so many tokens long."""
    given: Any = range(len(batch.lengths)) if seeds is None else seeds
    faults = [] if max_new_tokens > 0 else [f"max_new_tokens: expected 1 or more, got {max_new_tokens}"]
    if len(given) != len(batch.lengths):
        faults.append(f"seeds: {len(given)} given; expected one for each of {len(batch.lengths)} rows")
    faults += [f"seeds: expected 0 to {2**32 - 1}, got {seed}" for seed in given if not 0 <= seed < 2**32]
    if faults:
        raise ConfigError(faults)
    model.config.check_trained(batch.volumes)
    keys, stop = jnp.asarray(given, jnp.uint32), jnp.asarray(stop_ids, jnp.int32)
    graphdef, params = split(model)

    def until(state: Decoding, count: int) -> Decoding:
        return decode(params, state, stop, keys, jnp.int32(count), graphdef=graphdef, sampling=sampling)

    return prefill(params, batch, graphdef=graphdef, max_new_tokens=max_new_tokens), until
