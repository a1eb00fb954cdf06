"""Frozen weights of products in 8 bits, one scale for each output; qwix makes them and reads them."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from umbrella_jax.models.llava import Params
from umbrella_jax.models.paths import adapted_weight, component_of

Quantized = Literal["int8", "fp8"]
_TYPES: dict[Quantized, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def quantizable(path: str) -> bool:
    """Whether a parameter is the weight of a product of a layer or of the projector. Word embeddings and the head stay
    as they are: they are looked up, and decide between words; adapters too: they are small."""
    if "norm" in path or adapted_weight(path) is not None or not path.endswith(".weight"):
        return False
    return ".layers." in path or component_of(path) == "projector"


def quantize(params: Params, dtype: Quantized) -> Params:
    """The parameters with those that are `quantizable` as qwix's QArray: W ≈ q·s, q [..., O, I] in 8 bits, s float32
    [..., O, 1] the largest magnitude of each output's row over that of the type.

    One after the other, so that of one alone both are there, if the caller lets go of the others. Products dequantise a
    layer's weights when they use them, and compute in x's dtype as ever.
    """
    import qwix  # here: the model runs without it

    done: Params = {}
    for path in list(params):
        leaf = params.pop(path)
        if quantizable(path):
            axes = tuple(range(leaf.ndim - 1))
            make = partial(qwix.quantize, qtype=_TYPES[dtype], channelwise_axes=axes, scale_dtype=jnp.float32)
            made = jax.eval_shape(make, leaf)
            leaf = jax.jit(make, out_shardings=_lying_as(leaf, made))(leaf)
        done[path] = leaf
    return done


def _lying_as(leaf: jax.Array, made: Any) -> Any:
    """Where the parts of a QArray lie: as the weight does, but for what a scale has once."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))

    def of(part: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [axis if size > 1 else None for axis, size in zip(spec, part.shape, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    return jax.tree.map(of, made)
