"""Products with frozen weights in 8 bits (`model.quantize_activations`), by qwix."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from umbrella_jax.config.schema import Quantized

_TPUS: dict[Quantized, str] = {"int8": r"TPU v[4-6].*", "fp8": r"TPU ?7.*"}
"""Patterns of jax's names. Ironwood is Google's first TPU with float8 (https://discuss.google.dev/t/336681)."""
_CAPABILITY: dict[Quantized, float] = {"int8": 7.5, "fp8": 8.9}
"""Compute capability of the first NVIDIA GPUs with these products: Turing and Ada."""


def has_eight_bit_products(device: jax.Device, dtype: Quantized) -> bool:
    """Return whether a device is known to multiply in an 8-bit type. On others XLA converts to a wider one first."""
    if device.platform == "gpu":
        capability = getattr(device, "compute_capability", "")  # NVIDIA's are `9.0`, AMD's `gfx942`
        return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= _CAPABILITY[dtype]
    return device.platform == "tpu" and re.fullmatch(_TPUS[dtype], device.device_kind) is not None


def dense(weight: Any, dtype: Any) -> Float[Array, "..."]:
    """Return a weight in `dtype`; dequantise it if it is a QArray (umbrella_jax/models/quantize.py)."""
    if isinstance(weight, jax.Array):
        return weight.astype(dtype)
    import qwix

    return qwix.dequantize(weight.astype(dtype))


@jax.custom_vjp
def eight_bit_product(x: Float[Array, "... I"], weight: Any) -> Float[Array, "... O"]:
    """Return x · Wᵀ in x's dtype, computed in the 8-bit type of `weight`, a QArray [O, I].

    Each row of x becomes q·s: q in 8 bits, and s float32, max|row| divided by the largest number of the type. Products
    of int8 are summed in int32, those of fp8 in float32 and then rounded to x's dtype, because GPUs write the sums to
    memory. The sums are multiplied by both scales in float32.

    The gradient of x is dy · W in dy's dtype, with W dequantised, as if x had not been rounded. W gets no gradient.
    """
    import qwix

    rounded = qwix.quantize(x.astype(jnp.float32), weight.qtype, channelwise_axes=tuple(range(x.ndim - 1)))
    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    with jax.numpy_dtype_promotion("standard"):  # qwix multiplies sums of int32 or bfloat16 by float32
        return qwix.dot_general(rounded, weight, contracted, preferred_element_type=x.dtype)


def _eight_bit_product(x: Array, weight: Any) -> tuple[Array, Any]:
    return eight_bit_product(x, weight), weight


def _gradients(weight: Any, dy: Array) -> tuple[Array, None]:
    return jnp.einsum("...o,oi->...i", dy, dense(weight, dy.dtype)), None


eight_bit_product.defvjp(_eight_bit_product, _gradients)
