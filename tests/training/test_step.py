"""A step changes only trainable parameters, and depends only on its micro-batches as a whole."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.golden_case import golden_batch, golden_model, relative
from tests.helpers.training_case import (
    CONFIG,
    EMBEDDINGS,
    QUICK,
    arrange_volumes,
    as_bytes,
    golden_case,
    make_case,
    micro_batches,
    quick_step,
    rows_of,
    small_batch,
    small_case,
    stack,
    step_traced_once,
    to_numpy,
    total_bytes,
)
from umbrella_jax.config.schema import GroupConfig, LoraConfig, TrainConfig
from umbrella_jax.models.paths import COMPONENTS
from umbrella_jax.training.optimizer import make_schedule
from umbrella_jax.training.step import jit_eval_step, jit_train_step, train_step


def test_twenty_steps_change_only_trainable_parameters():
    """Weight decay acts on all trainable parameters. All steps share one trace; another batch shape adds one."""
    case = golden_case()
    state = case.state()
    before, frozen_before = to_numpy(state.trainable), as_bytes(case.frozen)
    step = step_traced_once()
    batch = stack(golden_batch())
    for _ in range(20):
        state, _ = step(state, case.frozen, batch, **case.options)
    with pytest.raises(AssertionError, match="traced"):
        step(state, case.frozen, stack(golden_batch([0])), **case.options)

    assert int(state.step) == 20
    assert as_bytes(case.frozen) == frozen_before
    assert len(state.trainable) == 6
    for path, leaf in state.trainable.items():
        assert (np.asarray(leaf) != before[path]).all(), path
    assert total_bytes(state.opt_state) <= 2 * total_bytes(state.trainable) + 1000


def one_step(batch):
    """Return metrics and trained parameters after one step of the golden case."""
    case = golden_case()
    state, metrics = quick_step(case.state(), case.frozen, batch, **case.options)
    return metrics, state.trainable


def test_order_of_rows_and_volumes_does_not_matter():
    batch = golden_batch()
    loss = one_step(stack(batch))[0]["loss"]
    rows = rows_of(batch, [2, 0, 3, 1])
    volumes = arrange_volumes(batch, {"T1": [1, 2, 0], "rsfMRI": [1, 0]})
    assert (volumes.feature_idx != batch.feature_idx).any()
    for other in (rows, volumes):
        assert relative(one_step(stack(other))[0]["loss"], loss) <= 1e-6
    wrong = replace(volumes, feature_idx=batch.feature_idx)
    assert relative(one_step(stack(wrong))[0]["loss"], loss) > 1e-6, "the volumes of other rows"


def test_micro_batches_add_up_to_the_whole_batch():
    """The rows have 7, 5, 6 and 2 supervised tokens, so a mean of means would differ."""
    micro = stack(*micro_batches())
    assert micro.target_mask.sum((1, 2)).tolist() == [7, 5, 6, 2]
    (whole_metrics, whole), (micro_metrics, parts) = one_step(stack(golden_batch())), one_step(micro)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(micro_metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)
    assert micro_metrics["supervised_tokens"] == whole_metrics["supervised_tokens"] == 20
    for path, leaf in whole.items():
        assert relative(parts[path], np.asarray(leaf)) <= 1e-5, path


@pytest.fixture(scope="module")
def case_of_three_updates():
    """The golden case, whose learning rate is 0 from the fourth update on."""
    config, params = golden_model(remat="none")
    return make_case(config, params, CONFIG, make_schedule(CONFIG, 3))


@pytest.mark.parametrize("entry", [pytest.param(False, marks=pytest.mark.slow), True])
def test_absent_modality_stays_as_it_is(entry, case_of_three_updates):
    """Neither momentum nor decay moves it in a step that shows none of its volumes, with or without padding volumes."""
    case = case_of_three_updates
    both, anatomical = stack(golden_batch()), stack(golden_batch([0]))
    assert anatomical.volumes.keys() == {"T1"}
    if entry:
        padded = arrange_volumes(rows_of(golden_batch(), [0]), {"rsfMRI": [None], "T1": [0, 1]})
        assert not padded.volumes["rsfMRI"].any()
        anatomical = stack(padded)

    def step(state, batch):
        """Return the new state, and parameters, moments and count of each modality before and after."""
        before = parts(state)
        state, _ = quick_step(state, case.frozen, batch, **case.options)
        return state, before, parts(state)

    def parts(state):
        inner = state.opt_state[1].inner_states
        return {
            m: as_bytes(
                [
                    {p: v for p, v in state.trainable.items() if p.startswith(f"{EMBEDDINGS}{m}_")},
                    inner[f"patch_embed/{m}"],
                ]
            )
            for m in ("T1", "rsfMRI")
        }

    state, _, _ = step(case.state(), both)
    state, before, after = step(state, anatomical)
    assert len(before["rsfMRI"]) == 3 + 1 + 2 * 3, "parameters, count, moments"
    assert after["rsfMRI"] == before["rsfMRI"]
    assert all(a != b for a, b in zip(after["T1"], before["T1"], strict=True))

    # The schedule counted that step: the third update of `both` is the fourth of the run, whose rate is 0.
    state, before, after = step(state, both)
    assert all(a != b for m in after for a, b in zip(after[m], before[m], strict=True))
    trained = as_bytes(state.trainable)
    state, _, _ = step(state, both)
    assert as_bytes(state.trainable) == trained


def test_bfloat16_checkpoint_trains_in_float32():
    case = small_case(dtype="bfloat16")
    state, frozen = case.state(), as_bytes(case.frozen)
    before = to_numpy(state.trainable)
    state, metrics = quick_step(state, case.frozen, small_batch(), **case.options)
    assert np.isfinite(metrics["loss"])
    assert {leaf.dtype for leaf in case.frozen.values()} == {jnp.dtype("bfloat16")}
    assert as_bytes(case.frozen) == frozen
    for path, leaf in state.trainable.items():
        assert leaf.dtype == jnp.float32
        assert (leaf != before[path]).any(), path
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(state.trainable)
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param(["projector", "language_model.*.self_attn.*"], marks=pytest.mark.slow),
        pytest.param(["vision_tower", "patch_embed"], marks=pytest.mark.slow),
        ["language_model"],
    ],
)
def test_other_groups_train(groups):
    case = small_case(TrainConfig(groups=dict.fromkeys(groups, GroupConfig()), decay_bias=True))
    prefixes = tuple(COMPONENTS.get(group, group).partition("*")[0] for group in groups)
    state, frozen = case.state(), as_bytes(case.frozen)
    before = to_numpy(state.trainable)
    assert len(before) == {"projector": 4 + 7, "vision_tower": 16 + 3, "language_model": 14}[groups[0]]
    assert all(path.startswith(prefixes) for path in before)
    state, _ = quick_step(state, case.frozen, small_batch(), **case.options)
    assert as_bytes(case.frozen) == frozen
    assert state.trainable.keys() == before.keys()
    for path, leaf in state.trainable.items():
        changed = np.asarray(leaf) != before[path]
        if path.endswith("embed_tokens.weight"):  # tied: the softmax moves every word
            assert changed.any(axis=1).all()
        assert changed.mean() > 0.9, path


def test_entry_points():
    """The jitted step donates only the old state's buffers; the evaluation step gives the training loss."""
    case = small_case()
    state = case.state()
    micro = jax.tree.map(lambda leaf: leaf[0], small_batch())
    evaluate = jit_eval_step().lower(state.trainable, case.frozen, micro, graphdef=case.graphdef).compile(QUICK)
    total, count = evaluate(state.trainable, case.frozen, micro)
    lowered = jit_train_step().lower(state, case.frozen, small_batch(), **case.options)
    for part, given_away in zip(lowered.args_info[0], (True, False, False), strict=True):
        assert {leaf.donated for leaf in jax.tree.leaves(part)} == {given_away}
    new, metrics = lowered.compile(QUICK)(state, case.frozen, small_batch(), schedule=case.schedule)
    assert int(count) == metrics["supervised_tokens"] == 12
    np.testing.assert_allclose(float(total) / int(count), metrics["loss"], rtol=1e-6)
    assert all(leaf.is_deleted() for leaf in state.trainable.values())
    assert not any(leaf.is_deleted() for leaf in [*case.params.values(), *new.trainable.values()])


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a program, including those of its loops and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def matrix_shapes(params):
    """Return the shapes of matrices, stacked matrices and stacked vectors, as stored and transposed."""
    shapes = set()
    for path, leaf in params.items():
        for shape in (leaf.shape, leaf.shape[1:] if ".layers." in path else leaf.shape):
            shapes |= {shape, shape[::-1]}
    return {shape for shape in shapes if len(shape) > 1}


def program(case):
    step = partial(train_step, **case.options)
    return list(equations(jax.make_jaxpr(step)(case.state(), case.frozen, small_batch())))


def computed(case):
    """Return (primitive, shape) of every array that a program computes."""
    return {(e.primitive.name, v.aval.shape) for e in program(case) for v in e.outvars if hasattr(v.aval, "shape")}


@pytest.mark.parametrize(
    ("dtype", "remat"),
    [
        ("float32", "none"),
        ("bfloat16", "mlp"),
        ("bfloat16", "full"),
        *(
            pytest.param(dtype, remat, marks=pytest.mark.slow)
            for dtype, remat in (("float32", "mlp"), ("float32", "full"), ("bfloat16", "none"))
        ),
    ],
)
def test_nothing_of_a_frozen_weights_shape_is_computed(dtype, remat):
    """No gradient of it, no transposed, converted or float32 copy; and logits only at supervised positions."""
    case = small_case(dtype=dtype, remat=remat)
    found = computed(case)
    frozen = matrix_shapes(case.frozen)
    assert len(frozen) == 40
    assert not {(name, shape) for name, shape in found if shape in frozen}
    assert ("dot_general", (21, 30)) in found, "the gradient of the patch projection, which is seen"
    assert ("dot_general", (4, 5, 53)) in found, "the logits of 5 positions"
    assert not {(name, shape) for name, shape in found if 53 in shape and 29 in shape}


def test_no_product_of_two_types():
    """For a frozen weight and a float32 gradient, XLA would make a float32 copy of the weight."""
    found = [
        [v.aval.dtype.name for v in e.invars]
        for e in program(small_case(dtype="bfloat16"))
        if "dot" in str(e.primitive)
    ]
    assert len(found) > 50
    assert all(first == second for first, second in found)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_with_adapters_too(remat):
    """A weight with an adapter adds no such array: only A and B get gradients."""
    groups = {"patch_embed": GroupConfig(), "lora": GroupConfig()}
    lora = LoraConfig(rank=4, targets=("vision_tower", "projector", "language_model"))
    case = small_case(TrainConfig(groups=groups), remat=remat, lora=lora)
    operations = computed(case)
    frozen = matrix_shapes(case.frozen)
    assert len(frozen) == 40
    assert not {(name, shape) for name, shape in operations if shape in frozen}
    of_adapters = {leaf.shape[".layers." in path :] for path, leaf in case.state().trainable.items() if "lora" in path}
    inputs, outputs = {21, 28, 37, 47, 48}, {16, 21, 28, 37, 47, 48}
    assert of_adapters == {(4, n) for n in inputs} | {(n, 4) for n in outputs}
    assert {("dot_general", shape) for shape in of_adapters} <= operations


def test_gradients_of_weights_would_be_seen():
    """If all matrices train, the check above finds the shape of each."""
    case = small_case(TrainConfig(groups=dict.fromkeys(COMPONENTS, GroupConfig())))
    state = case.state()
    found = {shape for _, shape in computed(case)}
    assert len(state.trainable) == len(case.params) - 2 - 16  # post_layernorm, and the layers that do not run
    assert {leaf.shape for leaf in state.trainable.values()} <= found
    dots = {shape for name, shape in computed(case) if name == "dot_general"}
    layers = {leaf.shape[1:] for path, leaf in state.trainable.items() if ".layers." in path and leaf.ndim == 3}
    assert layers <= dots
