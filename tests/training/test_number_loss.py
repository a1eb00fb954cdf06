"""The loss over candidate numbers, and its gradient, against its definition: one whole pass for each candidate."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers.strict import strict_promotion  # noqa: F401  # for every test here
from tests.helpers.training_case import QUICK, small_batch, small_case, stack
from umbrella_jax.batch import Batch, NumberTargets
from umbrella_jax.config.schema import GroupConfig, NumberLossConfig, TrainConfig
from umbrella_jax.data.answer_trees import answer_trees
from umbrella_jax.models import merge
from umbrella_jax.training.loss import loss_sums, number_errors
from umbrella_jax.training.step import train_step

CANDIDATES = [(3, 4, 9), (3, 5, 9), (3, 4, 7, 9), (6, 9)]  # one begins another, but for the token after the number
ERRORS = np.array([-1.5, 0.25, 1.0, 2.0], np.float32)
PROMPTS = np.array([20, 1, 12, 19], np.int32)  # within the lengths 29, 17, 23, 19
HAS_NUMBER = np.array([True, False, True, True])


def batch_with_numbers(seed: int) -> Batch:
    """Conversations without the axis of micro-batches; the second has no number."""
    batch = jax.tree.map(lambda leaf: leaf[0], small_batch(seed))
    targets = NumberTargets(
        tree=answer_trees([CANDIDATES if has else () for has in HAS_NUMBER]),
        prompt_lengths=PROMPTS,
        errors=np.where(HAS_NUMBER[:, None], ERRORS, np.float32(0)),
        mask=np.tile(HAS_NUMBER[:, None], (1, 4)),
    )
    return replace(batch, numbers=targets)


def likelihoods_of_whole_passes(
    graphdef: nnx.GraphDef, params: dict[str, jax.Array], batches: Sequence[Batch]
) -> tuple[jax.Array, jax.Array]:
    """Return log p of each candidate [batches, B, A], from whole passes over prompt and candidate, and log p of all
    supervised tokens [batches, B]. One program makes all passes, which compiles once."""
    wholes, places, tokens = [], [], []
    width = max(4, batches[0].target_ids.shape[1])

    def padded(array: np.ndarray, value: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=value)

    for batch in batches:
        for answer in CANDIDATES:
            ids, feature_idx = np.array(batch.input_ids), np.array(batch.feature_idx)
            for row, start in enumerate(PROMPTS):
                ids[row, start : start + len(answer)] = answer
                feature_idx[row, start : start + len(answer)] = -1
            lengths = np.full(4, ids.shape[1], np.int32)
            wholes.append(replace(batch, input_ids=ids, feature_idx=feature_idx, lengths=lengths, numbers=None))
            places.append(padded(PROMPTS[:, None] - 1 + np.arange(len(answer)), 0))
            tokens.append(padded(np.tile(answer, (4, 1)), -1))
        wholes.append(replace(batch, numbers=None))
        places.append(padded(batch.target_pos, 0))
        tokens.append(padded(np.where(batch.target_mask, batch.target_ids, -1), -1))

    def score(one: tuple[Batch, jax.Array, jax.Array]) -> jax.Array:
        whole, places, tokens = one
        log_p = jax.nn.log_softmax(merge(graphdef, params)(whole))
        each = log_p[jnp.arange(4)[:, None], places, jnp.maximum(tokens, 0)]
        return jnp.where(tokens < 0, 0, each).sum(1)

    scores = jax.lax.map(score, (stack(*wholes), np.stack(places), np.stack(tokens)))
    scores = scores.reshape(len(batches), len(CANDIDATES) + 1, 4).swapaxes(1, 2)
    return scores[..., :-1], scores[..., -1]


def test_an_update_adds_the_mean_over_numbers_to_the_cross_entropy() -> None:
    """Two micro-batches, as an update accumulates them: both losses and the gradient of their sum."""
    groups = {"patch_embed": GroupConfig(), "language_model": GroupConfig()}
    case, config = small_case(TrainConfig(groups=groups), remat="full"), NumberLossConfig(weight=0.5)
    plain = small_case(TrainConfig(groups=groups)).graphdef  # without remat, which takes longer to trace
    batches = [batch_with_numbers(seed) for seed in (0, 1)]

    def defined(params: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        candidates, supervised = likelihoods_of_whole_passes(plain, params | case.frozen, batches)
        p = jax.nn.softmax(candidates)
        errors = [jnp.where(HAS_NUMBER, (each * ERRORS[None] ** 2).sum(1), 0).sum() for each in p]
        count = np.float32(sum(one.target_mask.sum() for one in batches))
        cross_entropy, numbers = -supervised.sum() / count, sum(errors) / 6
        return cross_entropy + config.weight * numbers, (cross_entropy, numbers)

    state = case.state()
    defined = jax.jit(jax.value_and_grad(defined, has_aux=True), compiler_options=QUICK)
    (_, (cross_entropy, numbers)), gradient = defined(state.trainable)
    step = jax.jit(partial(train_step, **case.options, number_loss=config), compiler_options=QUICK)
    new, values = step(state, case.frozen, stack(*batches))
    assert values["loss"] == pytest.approx(float(cross_entropy), rel=1e-5)
    assert values["number_loss"] == pytest.approx(float(numbers), rel=1e-4)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    assert values["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    moments = {  # Adam's first moment after one update is 0.1 · the clipped gradient
        keys[-1].key: leaf
        for keys, leaf in jax.tree.leaves_with_path(new.opt_state)
        if ".mu" in jax.tree_util.keystr(keys) and leaf.ndim
    }
    assert moments.keys() == gradient.keys()
    for path, leaf in gradient.items():
        expected = 0.1 * np.asarray(leaf) / max(1, norm)
        np.testing.assert_allclose(moments[path], expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max(), err_msg=path)


def test_both_forms_are_their_formulas() -> None:
    scores = np.log(np.float32([[0.2, 0.1, 0.1, 7], [1, 1, 1, 1]]))  # the last is padding
    mask = np.array([[True, True, True, False], [False] * 4])
    errors = np.float32([[-1, 0, 2, 9], [0, 0, 0, 0]])
    scores, errors, mask = map(jnp.asarray, (scores, errors, mask))
    expected = number_errors(scores, errors, mask, NumberLossConfig())
    np.testing.assert_allclose(expected, [0.5 * 1 + 0.25 * 4, 0], rtol=1e-6)
    raft = number_errors(scores, errors, mask, NumberLossConfig(form="squared_error_of_expectation"))
    np.testing.assert_allclose(raft, [(-0.5 + 0.25 * 2) ** 2, 0], atol=1e-6)


def test_numbers_in_bfloat16_agree_with_float32() -> None:
    sums = []
    for dtype in ("float32", "bfloat16"):
        case = small_case(dtype=dtype)
        model = merge(case.graphdef, case.params)
        compute = jax.jit(partial(loss_sums, model, number_loss=NumberLossConfig()), compiler_options=QUICK)
        sums.append(compute(batch_with_numbers(0)))
    assert int(sums[1].numbers) == 3
    assert float(sums[1].number_errors) == pytest.approx(float(sums[0].number_errors), rel=0.05)
