"""Products in 8 bits: their numbers and gradients, which products they are, and the same on a mesh."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers.golden_case import golden_batch, golden_model
from umbrella_jax.config.schema import LoraConfig, MeshConfig, ModelConfig
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import abstract_params, merge
from umbrella_jax.models.eight_bit import eight_bit_product, has_eight_bit_products
from umbrella_jax.models.quantize import quantizable, quantized_shape
from umbrella_jax.sharding import make_mesh

# {type: number that the largest of a row becomes, type of q, sum}
TYPES = {"int8": (127.5, np.int8, np.int32), "fp8": (448.0, ml_dtypes.float8_e4m3fn, np.float32)}


def factors(dtype: str, dy: Any = np.float32) -> tuple[np.ndarray, Any, np.ndarray]:
    """Return x [2, 3, 16] with one row of zeros, a quantised weight [8, 16], and dy [2, 3, 8]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 16)).astype(np.float32) * rng.uniform(0.01, 100, (2, 3, 1)).astype(np.float32)
    x[1, 2] = 0
    weight = rng.normal(size=(8, 16)).astype(np.float32)
    quantized = qwix.quantize(jnp.asarray(weight), TYPES[dtype][1], channelwise_axes=(0,), scale_dtype=jnp.float32)
    return x, quantized, rng.normal(size=(2, 3, 8)).astype(dy)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_and_an_output_have_one_scale_each(dtype):
    largest, stored, summed = TYPES[dtype]
    x, weight, _ = factors(dtype)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(largest)
    q = x / np.where(scale == 0, 1, scale)
    q = (q.round().clip(-127, 127) if dtype == "int8" else q).astype(stored)
    sums = q.astype(summed) @ np.asarray(weight.qvalue).astype(summed).T
    expected = sums * scale * np.asarray(weight.scale).T
    np.testing.assert_allclose(eight_bit_product(jnp.asarray(x), weight), expected, rtol=1e-5, atol=1e-6)
    rounding = np.abs(expected - x @ np.asarray(qwix.dequantize(weight)).T)
    assert 0 < rounding.max() <= 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gradient_is_computed_in_its_own_type_from_the_dequantised_weight(dtype):
    x, weight, dy = factors(dtype, ml_dtypes.bfloat16)
    product, pull_back = jax.vjp(lambda x: eight_bit_product(x, weight), jnp.asarray(x, jnp.bfloat16))
    (dx,) = pull_back(jnp.asarray(dy))
    assert product.dtype == dx.dtype == jnp.bfloat16
    expected = dy.astype(np.float32) @ np.asarray(qwix.dequantize(weight))
    np.testing.assert_allclose(dx.astype(np.float32), expected, atol=0.02 * np.abs(expected).max())


def dots(jaxpr: Any) -> Iterator[Any]:
    """Yield the products of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from dots(inner)


@pytest.mark.parametrize(("dtype", "summed"), [("int8", "int32"), ("fp8", "float32")])
def test_every_product_with_a_frozen_weight_is_in_8_bits(dtype, summed):
    """Per modality six in a layer of the tower and two in the projector; seven in one of the decoder's, but for the
    adapters beside them."""
    config, _ = golden_model()
    lora = LoraConfig(rank=2, targets=("language_model",))
    graphdef, shapes = abstract_params(replace(config, product_dtype=dtype, lora=lora))
    params = {path: quantized_shape(leaf, dtype) if quantizable(path) else leaf for path, leaf in shapes.items()}
    jaxpr = jax.make_jaxpr(lambda params: merge(graphdef, params).hidden_states(golden_batch()))(params)
    found = Counter(tuple(var.aval.dtype.name for var in (*eqn.invars, *eqn.outvars)) for eqn in dots(jaxpr.jaxpr))
    stored = jnp.dtype(TYPES[dtype][1]).name
    assert found[stored, stored, summed] == 2 * (6 + 2) + 7
    assert {types for types in found if stored in types} == {(stored, stored, summed)}
    assert found["float32", "float32", "float32"] >= 2 * 7  # A and B


def test_on_a_mesh_it_is_one_devices():
    """Also if a row is split, whose largest number the devices then exchange; sums of int8 are exact."""
    x, weight, _ = factors("int8")
    x = np.concatenate([x, -x])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices()[:8])
    specs = PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec("fsdp", "tensor"), PartitionSpec("fsdp")
    x_sharding, q_sharding, scale_sharding = (NamedSharding(mesh, spec) for spec in specs)
    split = replace(
        weight,
        qvalue=jax.device_put(weight.qvalue, q_sharding),
        scale=jax.device_put(weight.scale, scale_sharding),
    )
    product = jax.jit(eight_bit_product)
    with jax.set_mesh(mesh):
        found = product(jax.device_put(x, x_sharding), split)
    np.testing.assert_array_equal(found, product(jnp.asarray(x), weight))


def test_refuses_activations_in_8_bits_without_weights_in_8_bits():
    golden, _ = golden_model()
    with pytest.raises(ConfigError, match="quantize_activations: needs quantized weights"):
        ModelConfig(modalities=dict(golden.modalities), quantize_activations=True)


def device(platform: str, kind: str, compute_capability: str = "") -> Any:
    return mock.Mock(jax.Device, platform=platform, device_kind=kind, compute_capability=compute_capability)


def test_knows_which_devices_multiply_in_8_bits():
    devices = {
        device("cpu", "cpu"): (False, False),
        device("tpu", "TPU v5 lite"): (True, False),
        device("tpu", "TPU v6 lite"): (True, False),
        device("tpu", "TPU7x"): (False, True),
        device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"): (True, False),
        device("gpu", "NVIDIA H200", "9.0"): (True, True),
        device("gpu", "NVIDIA B200", "10.0"): (True, True),
        device("gpu", "AMD Instinct MI300X", "gfx942"): (False, False),
    }
    for one, expected in devices.items():
        assert (has_eight_bit_products(one, "int8"), has_eight_bit_products(one, "fp8")) == expected, one.device_kind
