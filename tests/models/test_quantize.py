"""Frozen weights in 8 bits: their form, their effect on the numbers, and training with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from tests.helpers.golden_case import golden_batch, golden_model, relative
from tests.helpers.mesh_case import mesh_case, micro_batch
from tests.helpers.training_case import QUICK, loss_and_logits
from umbrella_jax.config.schema import MeshConfig
from umbrella_jax.models import abstract_params, merge, quantize
from umbrella_jax.models.quantize import quantizable
from umbrella_jax.sharding import make_mesh, put_batch, shardings
from umbrella_jax.training.freeze import label_params, partition
from umbrella_jax.training.step import eval_step

TYPES = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}


def halves(remat: str = "full"):
    config, params = golden_model(remat=remat)
    trainable, frozen = partition(params, label_params(list(params), ["patch_embed"]))
    return abstract_params(config)[0], trainable, frozen


def test_only_products_are_quantized():
    _, _, frozen = halves()
    chosen = {path.rsplit(".", 2)[-2] for path in frozen if quantizable(path)}
    tower = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    decoder = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert chosen == tower | decoder | {"linear_1", "linear_2"}
    assert all(leaf.ndim - (".layers." in path) == 2 for path, leaf in frozen.items() if quantizable(path))


@pytest.mark.parametrize("dtype", TYPES)
def test_each_output_has_a_scale_of_its_own(dtype):
    """W ≈ q·s; s = max|row| / largest number, and the error of a number at most half a step (int8) or 1/16 (fp8)."""
    _, _, frozen = halves()
    given = {path: np.asarray(leaf) for path, leaf in frozen.items()}
    stored, largest = TYPES[dtype]
    for path, leaf in quantize(dict(frozen), dtype).items():
        if not quantizable(path):
            np.testing.assert_array_equal(leaf, given[path])
            continue
        weight = given[path]
        assert leaf.qvalue.dtype == stored
        assert leaf.scale.dtype == jnp.float32
        top = np.abs(weight).max(-1, keepdims=True)
        np.testing.assert_allclose(leaf.scale, top / largest, rtol=2e-2)  # qwix takes 127.5 for int8
        error = np.abs(np.asarray(qwix.dequantize(leaf)) - weight)
        assert (error <= (0.51 * leaf.scale if dtype == "int8" else np.abs(weight) / 16 + 2e-3 * top)).all(), path
        assert error.max() > 0


@pytest.mark.parametrize(
    ("dtype", "limit", "remat"), [("int8", 0.05, "full"), pytest.param("fp8", 0.12, "none", marks=pytest.mark.slow)]
)
def test_logits_and_gradients_are_those_of_the_rounded_weights(dtype, limit, remat):
    """And near those of the weights as they were, as far as 8 bits reach in a network of 32 to 64 wide."""
    graphdef, trainable, frozen = halves(remat)

    @jax.jit
    def run(trainable, frozen):
        def loss(trainable):
            return loss_and_logits(merge(graphdef, trainable | frozen), golden_batch())

        grads, logits = jax.grad(loss, has_aux=True)(trainable)
        return logits, grads

    logits, grads = run(trainable, frozen)
    rounded = quantize(dict(frozen), dtype)
    ours, gradients = run(trainable, rounded)
    same, slopes = run(
        trainable, {p: x if isinstance(x, jax.Array) else qwix.dequantize(x) for p, x in rounded.items()}
    )
    assert relative(ours, np.asarray(same)) <= 1e-6
    assert all(relative(gradients[path], np.asarray(slope)) <= 1e-5 for path, slope in slopes.items())
    mask = np.arange(logits.shape[1]) < golden_batch().lengths[:, None]
    assert 0 < relative(ours[mask], np.asarray(logits[mask])) <= limit
    for path, grad in grads.items():
        cosine = (grad * gradients[path]).sum() / jnp.sqrt((grad**2).sum() * (gradients[path] ** 2).sum())
        assert cosine > 1 - limit, path


@pytest.mark.slow
def test_on_a_mesh_it_is_one_devices():
    """Each device holds its part of a weight and of its scales."""
    case, batch, results = mesh_case(), micro_batch(2, "T1"), []
    for sizes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        count = int(np.prod(list(sizes.values())))
        mesh = make_mesh(MeshConfig(**sizes), devices=jax.devices()[:count])
        with jax.set_mesh(mesh):
            params = jax.device_put(case.params, shardings(case.params, mesh))
            lying = {path: leaf.sharding for path, leaf in params.items()}
            params = quantize(params, "int8")
            for path, leaf in params.items():
                if quantizable(path):
                    assert leaf.qvalue.sharding.is_equivalent_to(lying[path], leaf.qvalue.ndim)
                    assert leaf.scale.shape == (*leaf.qvalue.shape[:-1], 1)
            evaluate = jax.jit(lambda p, b: eval_step(p, {}, b, graphdef=case.graphdef), compiler_options=QUICK)
            results.append(float(evaluate(params, put_batch(batch, mesh, axis=0))[0]))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
