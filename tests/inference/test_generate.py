"""Tests of generation: answers with a cache equal answers without one; draws for a row depend only on that row."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.golden_case import relative
from tests.helpers.mesh_case import B, T, V, mesh_case, micro_batch
from tests.helpers.strict import strict_promotion  # noqa: F401  # for every test here
from tests.helpers.training_case import QUICK, generating_with
from umbrella_jax.batch import Batch
from umbrella_jax.data.answer_trees import answer_trees
from umbrella_jax.errors import CheckpointError, ConfigError, RunError
from umbrella_jax.inference import generate as module
from umbrella_jax.inference.generate import GREEDY, NONE, Sampling, choose, generate, probabilities, stream
from umbrella_jax.models import Llava, merge, split
from umbrella_jax.models.attention import extension_attention

NEW = 6
SEEDS = np.arange(100, 100 + B)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The three programs, compiled in a third of the time."""
    model(), batch()  # not while something is traced
    with generating_with(QUICK):
        yield


@cache
def model() -> Llava:
    """Eight heads to two kv heads, every leaf random."""
    case = mesh_case()
    return merge(case.graphdef, case.params)


@cache
def batch() -> Batch:
    """Make rows of different lengths, with a volume of each modality or of some."""
    return micro_batch(0, "T1", "rsfMRI")


def row(number: int) -> Batch:
    """Return a batch of one of the rows, with all volumes."""
    one = {name: getattr(batch(), name)[number : number + 1] for name in ("input_ids", "positions", "feature_idx")}
    more = {name: getattr(batch(), name)[number : number + 1] for name in ("lengths", "target_pos", "target_ids")}
    return replace(batch(), **one, **more, target_mask=batch().target_mask[number : number + 1])


@cache
def forced(seed: int) -> np.ndarray:
    """Return some tokens to append to each row, [B, NEW]."""
    return np.random.default_rng(seed).integers(0, V, (B, NEW), np.int32)


@partial(jax.jit, compiler_options=QUICK)
def without_cache(batch: Batch, tokens: jax.Array) -> jax.Array:
    """Compute logits [B, N + 1, V] at each row's last position and at the appended tokens [B, N], by whole passes."""
    language_model = model().language_model
    embeds = jnp.pad(model().inputs_embeds(batch), ((0, 0), (0, tokens.shape[1]), (0, 0)))
    places = batch.lengths[:, None] + jnp.arange(tokens.shape[1])[None]
    embeds = embeds.at[jnp.arange(len(tokens))[:, None], places].set(language_model.model.embed_tokens(tokens))
    positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), embeds.shape[:2])
    hidden = language_model.model(embeds, positions, batch.lengths + tokens.shape[1])
    wanted = jnp.concatenate([batch.lengths[:, None] - 1, places], axis=1)
    return language_model.logits(jnp.take_along_axis(hidden, wanted[..., None], axis=1))


@partial(jax.jit, compiler_options=QUICK)
def with_cache(batch: Batch, tokens: jax.Array) -> jax.Array:
    """The same, a token at a time."""
    language_model = model().language_model
    hidden, cache = language_model.model.prefill(model().inputs_embeds(batch), batch.positions, batch.lengths)
    cache = cache.grown(tokens.shape[1])
    states = [jnp.take_along_axis(hidden, batch.lengths[:, None, None] - 1, axis=1)]
    for n in range(tokens.shape[1]):
        x = language_model.model.embed_tokens(tokens[:, n])[:, None]
        hidden, k, v = language_model.model.extend(x, (batch.lengths + n)[:, None], cache)
        cache = cache.put(k, v, T + n)
        states.append(hidden)
    return language_model.logits(jnp.concatenate(states, axis=1))


def test_logits_with_the_cache_are_those_without():
    """Logits agree at every step, for rows of different lengths and grouped queries."""
    expected = without_cache(batch(), forced(1))
    assert relative(with_cache(batch(), forced(1)), expected) <= 1e-5
    assert relative(with_cache(batch(), forced(2)), expected) > 0.1, "the tokens must matter"


def test_greedy_answers_are_the_most_likely_tokens_of_whole_passes():
    tokens = np.asarray(generate(model(), batch(), max_new_tokens=NEW))
    expected = np.asarray(without_cache(batch(), tokens)).argmax(-1)[:, :NEW]
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(tokens)) > 4


def test_a_row_ends_with_its_first_stop_token():
    free = np.asarray(generate(model(), batch(), max_new_tokens=NEW))
    stop = [int(free[0, 1]), int(free[3, 4])]
    stopped = np.asarray(generate(model(), batch(), stop_ids=stop, max_new_tokens=NEW))
    for ours, answer in zip(stopped, free, strict=True):
        end = next((n for n, token in enumerate(answer) if token in stop), NEW - 1) + 1
        np.testing.assert_array_equal(ours[:end], answer[:end])
        assert (ours[end:] == NONE).all()


SAMPLING = Sampling(temperature=1.5, top_k=20, top_p=0.95)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "drawn"])
def test_a_single_row_gets_the_same_answer_as_in_a_batch(sampling):
    together = np.asarray(generate(model(), batch(), max_new_tokens=NEW, sampling=sampling, seeds=SEEDS))
    for number in (0, 5):
        alone = generate(model(), row(number), max_new_tokens=NEW, sampling=sampling, seeds=SEEDS[number : number + 1])
        np.testing.assert_array_equal(np.asarray(alone)[0], together[number])


def test_equal_seeds_draw_equal_answers():
    drawn = partial(generate, model(), batch(), max_new_tokens=NEW, sampling=SAMPLING)
    first = np.asarray(drawn(seeds=SEEDS))
    np.testing.assert_array_equal(first, drawn(seeds=SEEDS))
    assert (first != np.asarray(drawn(seeds=SEEDS + 1))).any(axis=1).sum() >= B - 2
    with pytest.raises(ConfigError, match=r"seeds: expected 0 to 4294967295, got -1"):
        generate(model(), batch(), max_new_tokens=NEW, seeds=[*SEEDS[1:].tolist(), -1])
    with pytest.raises(ConfigError, match="max_new_tokens: expected 1 or more, got 0"):
        generate(model(), batch(), max_new_tokens=0)
    with pytest.raises(ConfigError, match="seeds: 3 given; expected one for each of 8 rows"):
        drawn(seeds=[1, 2, 3])


def test_a_stream_is_the_answer_token_by_token():
    whole = np.asarray(generate(model(), batch(), max_new_tokens=NEW))
    stop = [int(whole[0, 1])]
    whole = np.asarray(generate(model(), row(0), stop_ids=stop, max_new_tokens=NEW))
    told = np.stack(list(stream(model(), row(0), stop_ids=stop, max_new_tokens=NEW)), axis=1)
    assert told.shape == (1, 2), "nothing follows the end"
    np.testing.assert_array_equal(told, whole[:, :2])


def test_two_programs_whatever_is_asked_of_a_shape():
    """Prompts of other content and another number of tokens of a stream compile nothing more."""
    for function in (module.prefill, module.decode):
        function.clear_cache()
    for number in range(3):
        list(stream(model(), row(number), max_new_tokens=NEW, stop_ids=[5]))
        generate(model(), row(number), max_new_tokens=NEW, stop_ids=[6])
    assert (module.prefill._cache_size(), module.decode._cache_size()) == (1, 1)


ANSWERS = np.array([[3, 9, 70, 5], [3, 8, 5, NONE], [60, 5, NONE, NONE]], np.int32)


def test_likelihoods_are_those_of_whole_passes():
    """Likelihoods equal whole passes over prompt and answer, although the prompt is read only once."""
    case = mesh_case()
    state = module.prefill(case.params, batch(), graphdef=case.graphdef, max_new_tokens=1)
    given = answer_trees([ANSWERS.tolist()] * B)
    scores = np.asarray(module.score_answers(case.params, state, given, graphdef=case.graphdef))
    for a, answer in enumerate(ANSWERS):
        logits = without_cache(batch(), np.tile(np.maximum(answer[:-1], 0), (B, 1)))
        p = np.asarray(jax.nn.log_softmax(logits))
        expected = sum(p[:, n, token] for n, token in enumerate(answer) if token != NONE)
        np.testing.assert_allclose(scores[:, a], expected, rtol=1e-5, atol=1e-5)
    shares = probabilities(model(), batch(), ANSWERS)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(shares, np.asarray(jax.nn.softmax(scores)), rtol=1e-4, atol=1e-7)
    firsts = jax.nn.log_softmax(without_cache(batch(), np.zeros((B, ANSWERS.shape[1] - 1), np.int32)))[:, 0]
    words = np.array([[3], [7], [NONE]], np.int32)  # of one token, and of none
    given = answer_trees([words.tolist()] * B)
    scores = np.asarray(module.score_answers(case.params, state, given, graphdef=case.graphdef))
    expected = np.stack([firsts[:, 3], firsts[:, 7], np.zeros(B)], axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_not_finite_are_no_answers():
    """The rows that show a damaged volume are named, and no others; or the weights, whatever rows there are."""
    volumes = batch().volumes | {"T1": jnp.asarray(batch().volumes["T1"]).at[0].set(jnp.nan)}
    damaged = replace(batch(), volumes=volumes)
    rows = np.flatnonzero(~np.isfinite(without_cache(damaged, np.zeros((B, 0), np.int32))).all((1, 2)))
    assert 0 < len(rows) < B
    names = ", ".join(f"row {number} of the batch" for number in rows)
    for what, ask in {
        "logits": lambda: generate(model(), damaged, max_new_tokens=NEW),
        "logits ": lambda: next(stream(model(), damaged, max_new_tokens=NEW)),
        "likelihoods": lambda: probabilities(model(), damaged, ANSWERS),
    }.items():
        with pytest.raises(RunError, match=rf"^{names}: {what.strip()} are not finite, first in patch_embed \(T1\)"):
            ask()
    path = "language_model.model.layers.mlp.down_proj.weight"
    graphdef, params = split(model())
    broken = merge(graphdef, params | {path: params[path].at[1, 0, 0].set(jnp.inf)})
    with pytest.raises(CheckpointError, match=rf"^weights: NaN or infinity in {path}: nothing can be computed"):
        generate(broken, batch(), max_new_tokens=NEW)


LOGITS = np.log([0.4, 0.3, 0.2, 0.06, 0.04]).astype(np.float32)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(temperature=0.5), np.array([0.16, 0.09, 0.04, 0.0036, 0.0016]) / 0.2952),
        (Sampling(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=9), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(temperature=1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampling(temperature=1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0, 0]),  # of 9/10: 0.44, 0.78
        (GREEDY, [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_likely_as_they_are(sampling, expected):
    """20,000 draws: a share's standard deviation is at most 0.0036."""
    order = np.array([3, 0, 4, 1, 2])  # ranks do not follow ids
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(choose(jnp.tile(LOGITS[order], (len(keys), 1)), keys, sampling))
    shares = np.bincount(order[drawn], minlength=5) / len(keys)
    np.testing.assert_allclose(shares, expected, atol=0.015)
    assert ((shares > 0) == (np.array(expected) > 0)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more"),
        ({"temperature": 1e-40}, "temperature: expected 0, or from 1e-06 to 1e\\+06, got 1e-40"),
        ({"temperature": 1e39}, "temperature: expected 0, or from 1e-06"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected 1 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected above 0"),
        ({"top_k": 4}, "top_k: does nothing at temperature 0"),
    ],
)
def test_sampling_that_means_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("count", [1, 4])
def test_extension_in_bfloat16(count):
    """bfloat16 agrees with float32 to 8 bits; XLA's CPU backend lacks some products of bfloat16 into float32."""
    rng = np.random.default_rng(0)
    shapes = [(2, count, 4, 16), *[(2, count, 2, 16)] * 2, *[(2, 2, 24, 16)] * 2]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    used = rng.random((2, 24)) < 0.7
    attention = jax.jit(extension_attention)
    found = attention(*(x.astype(jnp.bfloat16) for x in arrays), used)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), attention(*arrays, used), atol=2e-2)
