"""Layers unrolled compute what they do scanned, without copies of weights."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from tests.helpers.golden_case import relative
from tests.helpers.mesh_case import mesh_batch, mesh_case
from tests.helpers.training_case import QUICK, TEXT, quick_step, small_batch, small_case, to_numpy
from umbrella_jax.config.schema import GroupConfig, LoraConfig, MeshConfig, TrainConfig
from umbrella_jax.models import abstract_params, merge, quantize, unstack
from umbrella_jax.models.attention import attention
from umbrella_jax.models.layer_loop import PerLayer
from umbrella_jax.models.layers import run_layers
from umbrella_jax.models.qwen import QwenModel
from umbrella_jax.models.siglip import SiglipConfig, SiglipEncoder
from umbrella_jax.sharding import make_mesh, put_batch, shardings
from umbrella_jax.training.step import train_step

UP = "language_model.model.layers.mlp.up_proj.weight"


def unrolled(graphdef, params):
    """Return the same model with its layers unrolled."""
    return abstract_params(replace(merge(graphdef, params).config, layers="unrolled"))[0]


def adapters():
    groups = {"patch_embed": GroupConfig(), "lora": GroupConfig()}
    lora = LoraConfig(rank=4, targets=("vision_tower", "language_model"))
    return small_case(TrainConfig(groups=groups), remat="mlp", lora=lora)


CASES = {
    "frozen": lambda: small_case(remat="none"),
    "adapters": adapters,
    "trained": lambda: small_case(TrainConfig(groups={"language_model": GroupConfig()}), remat="full"),
    "quantized": lambda: small_case(remat="full"),
}


@pytest.mark.parametrize("remat", [*(pytest.param(p, marks=pytest.mark.slow) for p in ("none", "mlp")), "full"])
def test_gradients_are_those_of_scanned_layers(remat):
    """For layers of which one weight trains, in its stack, and the others are frozen, each on its own."""
    config = SiglipConfig(
        hidden_size=6, intermediate_size=10, num_hidden_layers=3, num_attention_heads=2, layer_norm_eps=1e-6
    )
    graphdef, stacked = nnx.split(SiglipEncoder(config, 3, rngs=nnx.Rngs(0)).layers)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)
    attend = partial(attention, causal=False)
    frozen = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(stacked)}
    trained = frozen.pop("mlp.fc1.weight")[...]
    per_layer = unstack({f"encoder.layers.{path}": leaf[...] for path, leaf in frozen.items()})

    def loss(trained, x, params, loop):
        leaves = {path.removeprefix("encoder.layers."): leaf for path, leaf in params.items()}
        layers = nnx.merge(graphdef, unflatten_dict(leaves | {"mlp.fc1.weight": trained}, sep="."))
        return jnp.square(run_layers(layers, x, attend, remat=remat, loop=loop)).mean()

    @partial(jax.jit, compiler_options=QUICK)
    def run(trained, x, stacked, per_layer):
        gradient = jax.value_and_grad(loss, argnums=(0, 1))
        return gradient(trained, x, stacked, "scanned"), gradient(trained, x, per_layer, "unrolled")

    stacked = {path: leaf[...] for path, leaf in frozen.items()}
    expected, results = run(trained, x, stacked, per_layer)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-7), expected, results)
    assert np.abs(expected[1][0]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_scanned_layers(name):
    """Stacked parameters train as they are; frozen ones are per layer, or 8-bit ones."""
    case, results = CASES[name](), []
    for loop in ("scanned", "unrolled"):
        frozen = quantize(dict(case.frozen), "int8") if name == "quantized" else dict(case.frozen)
        graphdef = case.graphdef
        if loop == "unrolled":
            graphdef, frozen = unrolled(graphdef, case.params), unstack(frozen)
            assert isinstance(frozen.get(UP, PerLayer(())), PerLayer)
        state, metrics = quick_step(case.state(), frozen, small_batch(), **case.options | {"graphdef": graphdef})
        results.append((metrics["loss"], metrics["grad_norm"], state.trainable))
    (loss, norm, trainable), (other, other_norm, others) = results
    assert relative(other, np.asarray(loss)) <= 1e-6
    assert relative(other_norm, np.asarray(norm)) <= 1e-5
    assert trainable.keys() == others.keys()
    for path, leaf in trainable.items():
        assert relative(others[path], np.asarray(leaf)) <= 1e-5, path


def test_no_weight_is_taken_out_of_a_stack():
    """A step's program has no array of a frozen stack's shape, and slices none of a layer's weight."""
    case = small_case()
    frozen = unstack(dict(case.frozen))
    options = case.options | {"graphdef": unrolled(case.graphdef, case.params)}
    step = jax.jit(train_step, static_argnames=("graphdef", "optimizer"))
    program = step.lower(case.state(), frozen, small_batch(), **options).as_text()
    for stack in ("3x47x28xf32", "2x37x21xf32", "1x47x28xf32", "1x37x21xf32"):  # MLPs of decoder and tower
        assert stack not in program
    assert "47x28xf32" in program
    stacked = step.lower(case.state(), case.frozen, small_batch(), **options).as_text()
    assert "1x47x28xf32" in stacked


def test_a_cache_is_that_of_scanned_layers():
    """Its keys and values are stacked over the layers, after prompts and after the token that follows."""
    shape, rng = (2, 5, TEXT.hidden_size), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    positions, lengths = jnp.broadcast_to(jnp.arange(5), shape[:2]), jnp.array([5, 3])
    config = replace(TEXT, num_hidden_layers=2)

    @partial(jax.jit, compiler_options=QUICK)
    def run(*stacks):
        results = []
        for loop, params in zip(("scanned", "unrolled"), stacks, strict=True):
            graphdef = nnx.split(
                nnx.eval_shape(lambda loop=loop: QwenModel(config, "none", "xla", loop, rngs=nnx.Rngs(0)))
            )[0]
            decoder = nnx.merge(graphdef, unflatten_dict(params, sep="."))
            hidden, cache = decoder.prefill(x, positions, lengths)
            results.append((hidden, cache, decoder.extend(hidden[:, :1], lengths[:, None], cache)))
        return results

    model = QwenModel(config, "none", "xla", "scanned", rngs=nnx.Rngs(0))
    params = flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep=".")
    per_layer = {
        path.removeprefix("model."): leaf
        for path, leaf in unstack({f"model.{path}": leaf for path, leaf in params.items()}).items()
    }
    assert isinstance(per_layer["layers.mlp.up_proj.weight"], PerLayer)
    expected, results = run(params, per_layer)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6), expected, results)


def test_each_layer_is_split_over_devices_as_its_stack():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = {path: leaf for path, leaf in mesh_case().params.items() if path == UP}
    (leaf,) = unstack(jax.device_put(params, shardings(params, mesh))).values()
    assert [array.sharding.spec for array in leaf.arrays] == [PartitionSpec("tensor", "fsdp")] * 3
    np.testing.assert_array_equal(jnp.stack(leaf.arrays), mesh_case().params[UP])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_eight_devices_update_as_one_with_scanned_layers(sizes):
    case, results = mesh_case(), []
    for loop, (data, fsdp, tensor) in (("scanned", (1, 1, 1)), ("unrolled", sizes)):
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices=jax.devices()[: data * fsdp * tensor])
        with jax.set_mesh(mesh):
            state, frozen = jax.device_put((case.state(), case.frozen), shardings((case.state(), case.frozen), mesh))
            graphdef = case.graphdef
            if loop == "unrolled":
                graphdef, frozen = unrolled(graphdef, case.params), unstack(frozen)
            batch = put_batch(mesh_batch(), mesh, axis=1)
            state, metrics = quick_step(state, frozen, batch, **case.options | {"graphdef": graphdef})
        results.append(to_numpy((metrics, state.trainable)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-6), *results)
