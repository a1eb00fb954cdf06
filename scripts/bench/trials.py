"""Changes of the model that may make a step faster on a GPU, tried without being in the package."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from umbrella_jax.models.layers import LayerNorm, dense
from umbrella_jax.models.siglip import SiglipAttention


def _sigmoid_gelu(x: jax.Array, approximate: bool = True) -> jax.Array:
    """Compute GELU's tanh approximation by a sigmoid: (1 + tanh u) / 2 = sigmoid(2u)."""
    return x * jax.nn.sigmoid(jnp.asarray(1.5957691216, x.dtype) * (x + jnp.asarray(0.044715, x.dtype) * x**3))


@jax.custom_vjp
def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _layer_norm_forward(x, weight, bias, eps)[0]


def _layer_norm_forward(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    h = x.astype(jnp.float32)
    mean = h.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(h - mean).mean(-1, keepdims=True) + eps)
    y = (h - mean) * scale * weight[None, None] + bias[None, None]
    return y.astype(x.dtype), (x, weight, mean, scale)


def _layer_norm_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, weight, mean, scale = kept
    h, dy = (x.astype(jnp.float32) - mean) * scale, dy.astype(jnp.float32)
    dh = dy * weight[None, None]
    dx = scale * (dh - dh.mean(-1, keepdims=True) - h * (dh * h).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (dy * h).sum((0, 1)), dy.sum((0, 1)), None


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _norm_with_own_backward(self: LayerNorm, x: jax.Array) -> jax.Array:
    weight, bias = (v[...].astype(jnp.float32) for v in (self.weight, self.bias))
    return _layer_norm(x, weight, bias, self.eps)


def _one_product(self: SiglipAttention, x: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
    """Compute q, k and v of the tower in one product."""
    projections = (self.q_proj, self.k_proj, self.v_proj)
    weight = jnp.concatenate([dense(one.weight[...], x.dtype) for one in projections])
    bias = jnp.concatenate([one.bias[...].astype(x.dtype) for one in projections])
    y = jnp.einsum("...i,oi->...o", x, weight) + bias[None, None]
    q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(y, 3, axis=-1))
    return self.out_proj(attend(q, k, v).reshape(x.shape))


def _padded_heads(width: int) -> Callable[..., jax.Array]:
    """Compute the tower's heads `width` wide, by weights with more rows: nothing else is padded."""

    def call(self: SiglipAttention, x: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        heads, own = self.num_heads, x.shape[-1] // self.num_heads

        def rows(array: jax.Array) -> jax.Array:
            split = array.astype(x.dtype).reshape(heads, own, *array.shape[1:])
            return jnp.pad(split, ((0, 0), (0, width - own), *[(0, 0)] * (array.ndim - 1)))

        def project(one: Any) -> jax.Array:
            return jnp.einsum("...i,hdi->...hd", x, rows(one.weight[...])) + rows(one.bias[...])[None, None]

        q, k, v = map(project, (self.q_proj, self.k_proj, self.v_proj))
        q = q * jnp.asarray((width / own) ** 0.5, x.dtype)  # attention divides by √width
        weight = rows(self.out_proj.weight[...].T)
        y = jnp.einsum("...hd,hdo->...o", attend(q, k, v), weight)
        return y + self.out_proj.bias[...].astype(x.dtype)[None, None]

    return call


TRIALS: dict[str, tuple[Any, str, Any]] = {
    "gelu": (jax.nn, "gelu", _sigmoid_gelu),
    "norm": (LayerNorm, "__call__", _norm_with_own_backward),
    "qkv": (SiglipAttention, "__call__", _one_product),
    "heads80": (SiglipAttention, "__call__", _padded_heads(80)),
    "heads128": (SiglipAttention, "__call__", _padded_heads(128)),
}
"""{name: (owner, attribute, what takes its place)}."""


@contextmanager
def trying(names: Iterable[str]) -> Iterator[None]:
    """Trace models with these changes."""
    with ExitStack() as patched:
        for name in names:
            patched.enter_context(mock.patch.object(*TRIALS[name]))
        yield
