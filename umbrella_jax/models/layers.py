"""Leaf modules, and the run through stacked layers.

Weights keep PyTorch's layout, [out, in]. Conversion is then the identity, and the backward pass of a frozen layer,
which needs only dy·W, reads them without a transposition.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Shaped

from umbrella_jax.batch import AnyArray
from umbrella_jax.config.schema import LayerLoop, RematPolicy
from umbrella_jax.models.attention.cudnn import is_cudnn_forward
from umbrella_jax.models.eight_bit import dense, eight_bit_product
from umbrella_jax.models.layer_loop import loop_over_layers
from umbrella_jax.models.parallel import look_up, split_rows

X = TypeVar("X")
_init = nnx.initializers.normal(0.02)  # as Hugging Face initialises SigLIP and Qwen2


def widest_dtype(*arrays: Shaped[Array, "..."]) -> Any:
    """Return the narrowest type that holds all `arrays`. Call it to mix types on purpose: strict promotion refuses
    that."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def _over_channels(vector: Float[Array, "D"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Reshape a vector over the last axis of x to the rank of x, so that it broadcasts."""
    return jax.lax.broadcast_to_rank(vector, x.ndim)


@jax.custom_vjp
def float32_product(x: Float[Array, "... I"], weight: Float[Array, "O I"]) -> Float32[Array, "... O"]:
    """Return x · Wᵀ; x and `weight` share one type, and so do their gradients.

    By default jax would multiply the float32 gradient by the weight, and XLA would copy the weight to float32 for it.
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
    """One LoRA factor, A with `weight` [..., r, I] or B with `weight` [..., O, r]."""

    def __init__(self, shape: tuple[int, ...]):
        self.weight = nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """x → x·Wᵀ + b in x's dtype; `weight` [O, I] may be quantised, `bias` is [O].

    With a LoRA adapter (umbrella_jax/models/lora.py) it computes x·Wᵀ + s · x·Aᵀ·Bᵀ + b. With `in_8_bits` it computes
    x·Wᵀ in the 8 bits of a quantised weight.
    """

    lora_A: Factor | None = None
    lora_B: Factor | None = None
    lora_scale: float = 1.0
    in_8_bits: bool = False

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.weight = nnx.Param(_init(rngs.params(), (out_features, in_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight = self.weight[...]
        if self.in_8_bits and not isinstance(weight, jax.Array):
            y = eight_bit_product(x, weight)
        else:
            y = jnp.einsum("...i,oi->...o", x, dense(weight, x.dtype))
        if self.lora_A is not None and self.lora_B is not None:
            low = jnp.einsum("...i,ri->...r", x, self.lora_A.weight[...].astype(x.dtype)) * self.lora_scale
            y = y + jnp.einsum("...r,or->...o", low, self.lora_B.weight[...].astype(x.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


def add_bias(y: Float[Array, "... O"], bias: Float[Array, "O"]) -> Float[Array, "... O"]:
    """Return y + bias in y's dtype; a trained bias is added in float32, in which its gradient is then summed."""
    wide = widest_dtype(y, bias)
    return (y.astype(wide) + _over_channels(bias.astype(wide), y)).astype(y.dtype)


class Embedding(nnx.Module):
    """Rows of `weight` [V, D]."""

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(_init(rngs.params(), (num_embeddings, features), jnp.float32))

    def __call__(self, ids: Int[AnyArray, "..."]) -> Float[Array, "... D"]:
        return look_up(self.weight[...], ids)


class LayerNorm(nnx.Module):
    """(x − mean) / √(var + eps) · weight + bias over the last axis; statistics in float32, as bfloat16 has 3 digits."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        h = x.astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        weight, bias = (_over_channels(v[...].astype(jnp.float32), h) for v in (self.weight, self.bias))
        return (h * weight + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019); statistics in float32."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * _over_channels(self.weight[...].astype(jnp.float32), h)).astype(x.dtype)


# The values that a layer's nonlinearities need in the backward pass. Inputs of products are not kept: a frozen product
# does not need them.
_KEPT = ("qkv", "attention", "middle", "mlp")
_keep, _or = jax.checkpoint_policies.save_only_these_names, jax.checkpoint_policies.save_from_both_policies
_POLICIES: dict[str, Any] = {
    "none": _or(_keep(*_KEPT), is_cudnn_forward),
    "mlp": _or(_keep(*_KEPT[:-1]), is_cudnn_forward),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_layers(
    layers: nnx.Module,
    x: X,
    *args: Any,
    remat: RematPolicy,
    loop: LayerLoop,
    call: Callable[..., X] = lambda layer, x, *args: layer(x, *args),
) -> X:
    """Run x through stacked `layers` in order.

    Args:
        layers: a module from `stack_layers`, called as `call(layer, x, *args)`.
        x: an array, or a tree of arrays; their first axis is rows.
        args: passed to every layer unchanged.
        remat: which products with weights the backward pass recomputes: `none`, those at the input of each layer's
            `mlp`, or all (`full`). Anything cheaper than a product is always recomputed.
        loop: `scanned` or `unrolled` (`loop_over_layers`).
        call: returns the layer's output, of the same shapes as x.
    """
    graphdef, params = nnx.split(layers)

    def body(x: X, params: nnx.State) -> tuple[X, None]:
        return call(nnx.merge(graphdef, params), jax.tree.map(split_rows, x), *args), None

    # A scan prevents by itself that XLA merges what is recomputed with the first computation, which would then be kept.
    body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=loop == "unrolled")
    return loop_over_layers(body, x, params, loop)[0]
