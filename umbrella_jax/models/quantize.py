"""Frozen weights in 8 bits with one scale per output, by qwix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from umbrella_jax.config.schema import Quantized
from umbrella_jax.errors import ConfigError
from umbrella_jax.models.llava import Params
from umbrella_jax.models.paths import adapted_weight, component_of

_TYPES: dict[Quantized, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def quantizable(path: str) -> bool:
    """Return whether a parameter is a weight matrix of a layer or of the projector, without adapters.

    Word embeddings are looked up, the head decides between words, and adapters are small: these keep their type.
    """
    if "norm" in path or adapted_weight(path) is not None or not path.endswith(".weight"):
        return False
    return ".layers." in path or component_of(path) == "projector"


def quantize(params: Params, dtype: Quantized) -> Params:
    """Replace each `quantizable` parameter by qwix's QArray; empties `params`.

    W ≈ q·s: q [..., O, I] in 8 bits; s float32 [..., O, 1] is max|W| of each output's row, divided by the largest
    number of the 8-bit type. A product dequantises a layer's weights when it uses them, and computes in x's
    dtype as without quantisation; or it computes in 8 bits (`LlavaConfig.product_dtype`).

    Parameters are converted one by one and removed from `params`: only one exists in both forms at a time, unless the
    caller holds on to them.

    Raises ConfigError if qwix is not installed.
    """
    quantized: Params = {}
    for path in list(params):
        leaf = params.pop(path)
        if quantizable(path):
            make = _quantizer(leaf, dtype)
            leaf = jax.jit(make, out_shardings=_shardings_like(leaf, jax.eval_shape(make, leaf)))(leaf)
        quantized[path] = leaf
    return quantized


def abstract_param(param: Any, sharding: NamedSharding) -> Any:
    """Return the shapes of a parameter, or of a QArray's parts, sharded as a parameter with this sharding is."""
    shardings = _shardings_like(jax.ShapeDtypeStruct(param.shape, jnp.float32, sharding=sharding), param)
    return jax.tree.map(lambda part, s: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=s), param, shardings)


def quantized_shape(leaf: jax.ShapeDtypeStruct, dtype: Quantized) -> Any:
    """Return the shapes and shardings of the QArray that `quantize` makes of a parameter."""
    parts = jax.eval_shape(_quantizer(leaf, dtype), leaf)
    shardings = _shardings_like(leaf, parts)
    if shardings is None:
        return parts
    return jax.tree.map(lambda part, s: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=s), parts, shardings)


def _quantizer(leaf: jax.Array | jax.ShapeDtypeStruct, dtype: Quantized) -> Callable[..., Any]:
    try:
        import qwix  # imported here, since the model runs without it
    except ModuleNotFoundError:
        raise ConfigError("model.quantize: qwix is not installed; pip install 'umbrella-jax[quantize]'") from None

    axes = tuple(range(leaf.ndim - 1))
    return partial(qwix.quantize, qtype=_TYPES[dtype], channelwise_axes=axes, scale_dtype=jnp.float32)


def _shardings_like(leaf: jax.Array | jax.ShapeDtypeStruct, parts: Any) -> Any:
    """Shard the parts of a QArray as the weight `leaf` is; axes on which a scale has length 1 stay whole."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))

    def sharding_of(part: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [axis if size > 1 else None for axis, size in zip(spec, part.shape, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding_of, parts)
