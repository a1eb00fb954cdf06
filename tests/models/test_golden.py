"""Equal to PyTorch: the golden case, float32, with XLA's optimisations, as users run it."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from tests.helpers.golden_case import golden, golden_batch, golden_model, relative
from tests.helpers.training_case import OPTIMISED, first_moments, generating_with, loss_and_logits
from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.inference.generate import generate
from umbrella_jax.models import abstract_params, merge, unstack
from umbrella_jax.training.freeze import as_trainable, label_params, partition
from umbrella_jax.training.loss import loss_sum
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import init_state, jit_train_step

EMBEDDINGS = "vision_tower.vision_model.embeddings."
KEYS = {"T1": "t1", "rsfMRI": "fmri"}
"""How the arrays of forward.npz name each modality."""

optimised = partial(jax.jit, compiler_options=OPTIMISED)


@pytest.fixture(scope="module")
def model():
    """Its definition and parameters."""
    config, params = golden_model()
    return abstract_params(config)[0], params


@pytest.fixture(scope="module")
def values(model):
    """Compute each tower's values, the merged embeddings and the logits in one optimised program."""
    graphdef, params = model

    @optimised
    def run(params, batch, volumes):
        model, towers = merge(graphdef, params), {}
        for name, own in volumes.items():
            tower = model.vision_tower
            hidden = tower.vision_model.embeddings(name, own), tower(name, own)
            towers[name] = (*hidden, model.image_features(name, own))
        return towers, model.inputs_embeds(batch), model(batch)

    volumes = {name: golden("forward")[key][:, 0] for name, key in KEYS.items()}
    return run(params, golden_batch(), volumes)


@pytest.mark.parametrize("name", KEYS)
def test_features(values, name):
    embedded, hidden, features = values[0][name]
    assert relative(embedded, golden("forward")[f"{KEYS[name]}_patch_embed"]) <= 1e-5
    assert relative(hidden, golden("forward")[f"{KEYS[name]}_hidden"]) <= 1e-5
    assert relative(features, golden("forward")[f"{KEYS[name]}_features"]) <= 1e-5


def test_merge_and_logits(values):
    _, merged, logits = values
    mask = golden("forward")["attention_mask"].astype(bool)[..., None]
    assert relative(np.where(mask, merged, 0), np.where(mask, golden("forward")["merged"], 0)) <= 1e-5
    assert relative(np.where(mask, logits, 0), golden("forward")["logits"]) <= 1e-5


@pytest.mark.parametrize(
    ("remat", "layers"),
    [
        ("mlp", "scanned"),
        ("none", "scanned"),
        ("none", "unrolled"),
    ],
)
@pytest.mark.slow
def test_loss_and_gradients(remat, layers):
    """`test_ten_adamw_steps` has the policy `full`, and all policies have one gradient (test_shapes.py)."""
    config, params = golden_model(remat=remat)
    graphdef, _ = abstract_params(replace(config, layers=layers))
    trainable, frozen = partition(params, label_params(list(params), ["patch_embed"]))
    if layers == "unrolled":
        frozen = unstack(frozen)

    def loss(trainable):
        total, count = loss_sum(merge(graphdef, trainable | frozen), golden_batch())
        return total / count.astype(np.float32), count

    # `test_ten_adamw_steps` has the optimised gradients: to compile both would take ten seconds more.
    (value, count), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    assert int(count) == golden("forward")["supervised"]
    assert relative(value, golden("forward")["loss"]) <= 1e-6
    assert len(grads) == 6
    for path, grad in grads.items():
        expected = golden("forward")["grad." + path.removeprefix(EMBEDDINGS)]
        assert relative(grad.reshape(expected.shape), expected) <= 1e-4, path


def test_ten_adamw_steps():
    config, params = golden_model(remat="full")
    labels = label_params(list(params), ["patch_embed"])
    trainable, frozen = partition(params, labels)
    # The golden run decays all of its tensors, at a constant rate.
    train = TrainConfig(learning_rate=1e-2, schedule="constant", decay_bias=True)
    optimizer, schedule = make_optimizer(train, labels), make_schedule(train, 10)
    state = init_state(as_trainable(trainable), optimizer)
    batch = jax.tree.map(lambda leaf: leaf[None], golden_batch())
    static = {"graphdef": abstract_params(config)[0], "optimizer": optimizer}
    step = jit_train_step().lower(state, frozen, batch, schedule=schedule, **static).compile(OPTIMISED)
    for i, (loss, norm) in enumerate(golden("train")["loss_and_grad_norm"]):
        state, metrics = step(state, frozen, batch, schedule=schedule)
        assert relative(metrics["loss"], loss) <= 1e-5
        assert relative(metrics["grad_norm"], norm) <= 1e-4
        if i == 0:  # the first moments are a tenth of the clipped gradients
            moments = first_moments(state.opt_state)
            assert len(moments) == 6
            for path, gradient in moments.items():
                expected = golden("forward")["grad." + path.removeprefix(EMBEDDINGS)]
                scale = 0.1 * min(1, 1 / norm)
                assert relative(gradient.reshape(expected.shape) / scale, expected) <= 1e-4, path
    for path, leaf in state.trainable.items():
        expected = golden("train")["after." + path.removeprefix(EMBEDDINGS)]
        assert relative(leaf.reshape(expected.shape), expected) <= 1e-4, path


@pytest.fixture(scope="module")
def trained_model():
    """The model after the ten golden steps, with which greedy.npz was made (golden/README.md)."""
    config, params = golden_model()
    after = {EMBEDDINGS + k.removeprefix("after."): v for k, v in golden("train").items() if k.startswith("after.")}
    params |= {path: jax.numpy.asarray(leaf).reshape(params[path].shape) for path, leaf in after.items()}
    with generating_with(OPTIMISED):
        yield merge(abstract_params(config)[0], params)


def test_greedy(trained_model):
    never = 319  # a stop token, as `test_greedy_stops` has one: both then run one program
    tokens = np.asarray(generate(trained_model, golden_batch(), stop_ids=[never], max_new_tokens=24))
    assert not any(never in golden("greedy")[f"row{row}"] for row in range(4))
    for row in range(4):
        np.testing.assert_array_equal(tokens[row], golden("greedy")[f"row{row}"])


def test_greedy_stops(trained_model):
    """A row ends with its first stop token; the others go on as if it were not there."""
    expected = [golden("greedy")[f"row{row}"] for row in range(4)]
    stop = int(expected[0][5])
    tokens = np.asarray(generate(trained_model, golden_batch(), stop_ids=[stop], max_new_tokens=24))
    for row, answer in zip(tokens, expected, strict=True):
        end = [*np.flatnonzero(answer == stop), 23][0] + 1
        np.testing.assert_array_equal(row[:end], answer[:end])
        assert (row[end:] == -1).all()
    assert len(tokens[0][tokens[0] >= 0]) <= 6


def test_bfloat16_compute_is_close():
    """Compute type bfloat16 with float32 parameters: the same model, and way down, up to its 3 digits."""
    config, params = golden_model(compute_dtype="bfloat16")
    graphdef, _ = abstract_params(config)
    trainable, frozen = partition(params, label_params(list(params), ["patch_embed"]))

    def run(trainable):
        return loss_and_logits(merge(graphdef, trainable | frozen), golden_batch())

    grads, logits = jax.jit(jax.grad(run, has_aux=True))(trainable)  # its optimisation takes half a minute
    assert logits.dtype == np.float32
    mask = golden("forward")["attention_mask"].astype(bool)[..., None]
    difference = relative(np.where(mask, logits, 0), golden("forward")["logits"])
    assert 1e-5 < difference <= 2e-2, "float32 would mean that the option does nothing"
    for path, grad in grads.items():
        assert grad.dtype == np.float32
        ours, theirs = np.ravel(grad), np.ravel(golden("forward")["grad." + path.removeprefix(EMBEDDINGS)])
        assert ours @ theirs >= 0.999 * np.linalg.norm(ours) * np.linalg.norm(theirs), path
