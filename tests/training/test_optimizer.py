"""The optimiser equals PyTorch's AdamW with Hugging Face's schedule, and has no state for frozen parameters."""

from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import torch
from transformers import TrainingArguments, get_linear_schedule_with_warmup, get_scheduler

from tests.helpers.training_case import CONSTANT, EMBEDDINGS, QUICK, total_bytes
from umbrella_jax.config.schema import GroupConfig, TrainConfig
from umbrella_jax.models.paths import FROZEN
from umbrella_jax.training.freeze import label_params
from umbrella_jax.training.optimizer import make_optimizer, make_schedule, warmup_updates

SHAPES = {
    EMBEDDINGS + "T1_proj.weight": (5, 7),
    EMBEDDINGS + "T1_proj.bias": (5,),
    EMBEDDINGS + "T1_positional_embeddings": (1, 6, 5),
    EMBEDDINGS + "rsfMRI_proj.weight": (5, 3),
    EMBEDDINGS + "norm_proj.weight": (5, 4),  # FreeSurfer's norm.mgz
    "vision_tower.vision_model.encoder.layers.layer_norm1.weight": (2, 5),
    "vision_tower.vision_model.encoder.layers.mlp.fc1.weight": (2, 9, 5),
    "multi_modal_projector.linear_1.weight": (8, 5),
    "multi_modal_projector.linear_1.bias": (8,),
    "language_model.model.layers.input_layernorm.weight": (2, 8),
    "language_model.model.layers.mlp.up_proj.weight": (2, 40, 30),
    "language_model.model.norm.weight": (8,),
}
GROUPS = {
    "patch_embed": GroupConfig(weight_decay=0.05),
    "projector": GroupConfig(learning_rate_factor=0.1, weight_decay=0.3),
    "vision_tower": GroupConfig(learning_rate_factor=2.0, weight_decay=0.0),
}
ALL_PRESENT = {"T1": True, "rsfMRI": True, "norm": True}


def random_tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def jit_update(optimizer, schedule):
    return partial(jax.jit(optimizer.update, compiler_options=QUICK), schedule=schedule)


def trained_part(tree, labels):
    return {path: leaf for path, leaf in tree.items() if labels[path] != FROZEN}


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (3, 10), (1, 2), (9, 10), (10, 10), (15, 10), (0, 1)])
@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_schedule_is_hugging_faces(name, theirs, warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = make_schedule(TrainConfig(learning_rate=0.3, schedule=name, warmup_steps=warmup), steps)(np.arange(steps))
    for rate in np.broadcast_to(rates, steps):
        np.testing.assert_allclose(rate, scheduler.get_last_lr()[0], rtol=1e-6, atol=1e-7)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.1, 35, 4), (0.1, 30, 3), (0.07, 100, 8), (0.9, 7, 7), (0.001, 7, 1), (0.0, 7, 0)]
)
def test_share_of_warmup_rounds_up_as_hugging_face_does(ratio, steps, warmup):
    """Their product is in float64, where 0.07 · 100 is a little more than 7."""
    assert warmup_updates(TrainConfig(warmup_ratio=ratio), steps) == warmup
    their_arguments = SimpleNamespace(warmup_steps=0, warmup_ratio=ratio)
    if int(version("transformers").partition(".")[0]) >= 5:
        their_arguments.warmup_steps = ratio  # one field holds a number or a share
    assert TrainingArguments.get_warmup_steps(their_arguments, steps) == warmup


def test_one_program_serves_every_rate_and_length():
    """Peak, warm-up and planned updates are arguments, so another run finds the step in the compilation cache."""

    def program(steps, **settings):
        config = TrainConfig(**settings)
        optimizer = make_optimizer(config, labels)
        arguments = params, optimizer.init(params), params
        options = {"present": ALL_PRESENT, "schedule": make_schedule(config, steps)}
        return jax.jit(optimizer.update).lower(*arguments, **options).as_text()

    labels = label_params(list(SHAPES), ["patch_embed"])
    params = trained_part(random_tree(0), labels)
    first = program(10, learning_rate=1e-2, warmup_steps=0)
    assert program(99, learning_rate=1e-3, warmup_ratio=0.3) == first
    assert program(10, learning_rate=1e-2, warmup_steps=0, schedule="cosine") != first


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_equals_pytorchs_adamw(clip_norm):
    """Three groups with their own rates and decays, over six steps with a falling rate, without frozen parameters."""
    config = TrainConfig(
        groups=GROUPS, learning_rate=1e-2, betas=(0.8, 0.95), eps=1e-6, decay_bias=True, clip_norm=clip_norm
    )
    labels = label_params(list(SHAPES), list(GROUPS))
    params = trained_part(random_tree(0), labels)
    optimizer = make_optimizer(config, labels)
    update, state = jit_update(optimizer, make_schedule(config, 6)), optimizer.init(params)

    theirs = {path: torch.nn.Parameter(torch.from_numpy(leaf.copy())) for path, leaf in params.items()}
    reference = torch.optim.AdamW(
        [
            {
                "params": [p for path, p in theirs.items() if labels[path].partition("/")[0] == group],
                "lr": 1e-2 * options.learning_rate_factor,
                "weight_decay": options.weight_decay,
            }
            for group, options in GROUPS.items()
        ],
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    schedule = get_linear_schedule_with_warmup(reference, 0, 6)
    clipped = []
    for step in range(6):
        grads = {path: leaf * 0.4**step for path, leaf in random_tree(step + 1).items() if path in params}
        updates, state = update(grads, state, params, present=ALL_PRESENT)
        params = optax.apply_updates(params, updates)
        for path, p in theirs.items():
            p.grad = torch.from_numpy(grads[path].copy())
        if clip_norm:
            clipped.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)) > clip_norm)
        reference.step()
        schedule.step()
        for path, p in theirs.items():
            np.testing.assert_allclose(params[path], p.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=path)
    assert not clip_norm or set(clipped) == {True, False}, "gradients on both sides of the limit"


def test_clipping_scales_all_groups_by_one_norm():
    """AdamW's updates do not depend on the gradients' scale, so this compares its moments."""
    config = TrainConfig(groups=GROUPS, clip_norm=1.0)
    labels = label_params(list(SHAPES), list(GROUPS))
    params, grads = (trained_part(random_tree(seed), labels) for seed in (0, 1))
    optimizer = make_optimizer(config, labels)
    _, state = jit_update(optimizer, CONSTANT)(grads, optimizer.init(params), params, present=ALL_PRESENT)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    assert norm > 5
    seen = {}
    for _, moments in optax.tree.get_all_with_path(state, "mu"):
        seen |= {path: leaf for path, leaf in moments.items() if not isinstance(leaf, optax.MaskedNode)}
    assert seen.keys() == grads.keys()
    for path, leaf in seen.items():
        np.testing.assert_allclose(leaf, 0.1 * grads[path] / norm, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("decay_bias", [False, True])
def test_decay_spares_biases_and_norms(decay_bias):
    """Without gradients, the update is only the decay: −rate · decay · parameter."""
    groups = dict.fromkeys(
        ("patch_embed", "projector", "vision_tower", "language_model"), GroupConfig(weight_decay=0.5)
    )
    labels = label_params(list(SHAPES), list(groups))
    optimizer = make_optimizer(TrainConfig(groups=groups, decay_bias=decay_bias), labels)
    params, grads = random_tree(0), jax.tree.map(np.zeros_like, random_tree(0))
    updates, _ = jit_update(optimizer, CONSTANT)(grads, optimizer.init(params), params, present=ALL_PRESENT)
    spared = {path for path in SHAPES if path.endswith("bias") or "norm.weight" in path or "norm1.weight" in path}
    assert len(spared) == 5
    for path, update in updates.items():
        expected = 0 if path in spared and not decay_bias else -0.005 * params[path]
        np.testing.assert_allclose(update, expected * np.ones_like(update), rtol=1e-5, err_msg=path)


def test_frozen_parameters_get_no_update_and_no_state():
    """Even with gradients of every parameter: frozen ones get zero updates and no moments."""
    labels = label_params(list(SHAPES), ["patch_embed"])
    config = TrainConfig(groups={"patch_embed": GroupConfig(weight_decay=0.5)}, decay_bias=True, clip_norm=None)
    optimizer = make_optimizer(config, labels)
    params = random_tree(0)
    state = optimizer.init(params)
    for step in range(3):
        updates, state = jit_update(optimizer, CONSTANT)(random_tree(step + 1), state, params, present=ALL_PRESENT)
        params = optax.apply_updates(params, updates)
    for path, leaf in random_tree(0).items():
        if labels[path] == FROZEN:
            assert not np.asarray(updates[path]).any(), path
            assert np.asarray(params[path]).tobytes() == leaf.tobytes(), path
        else:
            assert (np.asarray(params[path]) != leaf).all(), path
    trained = trained_part(random_tree(0), labels)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim) == sorted(
        leaf.shape for leaf in trained.values() for _ in ("mu", "nu")
    )
    assert total_bytes(state) <= 2 * total_bytes(trained) + 1000
    assert total_bytes(params) > 10_000, "moments of frozen parameters would not fit into that"


def test_state_does_not_depend_on_frozen_parameters():
    """The step passes only trainable parameters, and the result is the same."""
    labels = label_params(list(SHAPES), ["patch_embed"])
    optimizer = make_optimizer(TrainConfig(), labels)
    params, grads = random_tree(0), random_tree(1)
    alone = trained_part(params, labels)
    # Clipping uses the norm of the gradients that it is given: equal only if both are far below the limit.
    grads = {path: 1e-3 * leaf for path, leaf in grads.items()}
    update = jit_update(optimizer, CONSTANT)
    every, _ = update(grads, optimizer.init(params), params, present=ALL_PRESENT)
    some, _ = update(trained_part(grads, labels), optimizer.init(alone), alone, present=ALL_PRESENT)
    for path, update in some.items():
        np.testing.assert_array_equal(update, every[path])


@pytest.mark.parametrize("present", [{"T1": True}, {"T1": True, "rsfMRI": False}])
def test_absent_modality_is_left_untouched(present):
    """It gets no update and keeps its state, while the other modality moves and the schedule advances."""
    labels = label_params(list(SHAPES), ["patch_embed"])
    config = TrainConfig(learning_rate=1e-2, decay_bias=True)
    optimizer = make_optimizer(config, labels)
    params, *grads = (trained_part(random_tree(seed), labels) for seed in range(5))
    update = jit_update(optimizer, make_schedule(config, 3))
    _, state = update(grads[0], optimizer.init(params), params, present=ALL_PRESENT)
    before = state[1].inner_states
    updates, state = update(grads[1], state, params, present=present)
    for path, change in updates.items():
        assert np.asarray(change).any() == ("T1" in path), path
    for label, inner in state[1].inner_states.items():
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[label], inner)), strict=True)]
        assert not any(same) if label == "patch_embed/T1" else all(same), label

    updates, state = update(grads[2], state, params, present=ALL_PRESENT)
    assert all(np.asarray(change).any() for change in updates.values()), "the third update has a rate"
    updates, _ = update(grads[3], state, params, present=ALL_PRESENT)
    assert not any(np.asarray(change).any() for change in updates.values()), "and the fourth has none"
