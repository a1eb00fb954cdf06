"""Leaf modules, and the scan over stacked ones.

Weights lie as PyTorch stores them, [out, in]: conversion is then the identity, and the backward pass of a
frozen layer (dy·W, the only product with W that it needs) reads them without a transposition.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from umbrella_jax.config.schema import RematPolicy
from umbrella_jax.models.attention.cudnn import is_cudnn_forward
from umbrella_jax.models.parallel import look_up, split_rows

Array = jax.Array
M = TypeVar("M", bound=nnx.Module)
_init = nnx.initializers.normal(0.02)  # what HF starts SigLIP and Qwen2 from


def dense(weight: Any, dtype: Any) -> Array:
    """A weight in `dtype`, be it an array or qwix's QArray (umbrella_jax/models/quantize.py)."""
    if isinstance(weight, jax.Array):
        return weight.astype(dtype)
    import qwix

    return qwix.dequantize(weight.astype(dtype))


@jax.custom_vjp
def float32_product(x: Array, weight: Array) -> Array:
    """x [..., I] · Wᵀ, float32 [..., O], of x and `weight` [O, I] of one type, in which their gradients are computed.

    Left to itself, jax multiplies a float32 gradient by the weight, of which XLA then makes a float32 copy.
    """
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)


def _float32_product(x: Any, weight: Any) -> tuple[Array, tuple[Array | None, Array]]:
    return float32_product(x.value, weight.value), (x.value if weight.perturbed else None, weight.value)


def _float32_product_gradients(kept: tuple[Array | None, Array], dy: Array) -> tuple[Array, Array | None]:
    x, weight = kept
    dy = dy.astype(weight.dtype)
    dx = jnp.einsum("...o,oi->...i", dy, weight)
    return dx, None if x is None else jnp.einsum("...o,...i->oi", dy, x)


float32_product.defvjp(_float32_product, _float32_product_gradients, symbolic_zeros=True)


class Factor(nnx.Module):
    """One of the two of an adapter: `weight`, [..., r, I] or [..., O, r]."""

    def __init__(self, shape: tuple[int, ...]):
        self.weight = nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """x [..., I] → x·Wᵀ + b [..., O] in x's dtype; `weight` [O, I], perhaps quantized, `bias` [O].

    With an adapter (umbrella_jax/models/lora.py), x·Wᵀ + s · x·Aᵀ·Bᵀ + b.
    """

    lora_A: Factor | None = None
    lora_B: Factor | None = None
    lora_scale: float = 1.0

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.weight = nnx.Param(_init(rngs.params(), (out_features, in_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.einsum("...i,oi->...o", x, dense(self.weight[...], x.dtype))
        if self.lora_A is not None and self.lora_B is not None:
            low = jnp.einsum("...i,ri->...r", x, self.lora_A.weight[...].astype(x.dtype)) * self.lora_scale
            y = y + jnp.einsum("...r,or->...o", low, self.lora_B.weight[...].astype(x.dtype))
        # in float32 where it trains: its gradient is summed over all rows, and over devices, as what is added to it
        return y if self.bias is None else (y + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """ids int [...] → rows [..., D] of `weight` [V, D]."""

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(_init(rngs.params(), (num_embeddings, features), jnp.float32))

    def __call__(self, ids: Array) -> Array:
        return look_up(self.weight[...], ids)


class LayerNorm(nnx.Module):
    """(x − mean) / √(var + eps) · weight + bias over the last axis; statistics in float32: bfloat16 has 3 digits."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019); statistics in float32."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * self.weight[...].astype(jnp.float32)).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """One module whose parameters carry a leading axis of `num_layers`, each slice initialised on its own."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


# What the nonlinearities of a layer need in its backward pass; a frozen product needs none of its inputs.
_KEPT = ("qkv", "attention", "middle", "mlp")
_keep, _or = jax.checkpoint_policies.save_only_these_names, jax.checkpoint_policies.save_from_both_policies
_POLICIES: dict[str, Any] = {
    "none": _or(_keep(*_KEPT), is_cudnn_forward),
    "mlp": _or(_keep(*_KEPT[:-1]), is_cudnn_forward),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scan_layers(layers: nnx.Module, x: Array, *args: Any, remat: RematPolicy) -> Array:
    """Runs x through stacked `layers` one after the other: compile time does not grow with depth.

    `args` go to every layer unchanged. `remat` says which products with weights the backward pass does again: `none`,
    those into each layer's `mlp`, or those of the `full` layer. What is cheaper than a product is always made again.
    """
    graphdef, params = nnx.split(layers)

    def body(x: Array, params: nnx.State) -> tuple[Array, None]:
        return nnx.merge(graphdef, params)(split_rows(x), *args), None

    body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)  # scan prevents it already
    return jax.lax.scan(body, x, params)[0]
