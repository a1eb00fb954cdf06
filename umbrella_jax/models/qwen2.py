"""Qwen2 (Yang et al. 2024; Qwen1.5 is the same network) under Hugging Face's names.

Axes: B conversations, T positions, D width, F width of the MLP, H heads, K kv heads, Dh head width, V words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from umbrella_jax.config import AttentionBackend, RematPolicy
from umbrella_jax.models.attention import attention
from umbrella_jax.models.layers import Embedding, Linear, RMSNorm, scan_layers, stack
from umbrella_jax.models.parallel import split_heads

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """Shape of the language model, under the names of `text_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool


def rope_tables(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin, float32 [B, T, 1, Dh], for positions [B, T] (Su et al. 2021, in GPT-NeoX's half-split order)."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns x [B, T, H, Dh] by its position; in float32, since late positions turn by large angles."""
    h = x.astype(jnp.float32)
    first, second = jnp.split(h, 2, axis=-1)
    return (h * cos + jnp.concatenate([-second, first], -1) * sin).astype(x.dtype)


class Qwen2Attention(nnx.Module):
    """Grouped-query attention with rope, biases on q, k, v only; `attend` takes q [B, T, H, Dh], k, v [B, T, K, Dh]."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, q, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, kv, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, kv, rngs=rngs)
        self.o_proj = Linear(q, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Callable[..., Array]) -> Array:
        projected = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (split_heads(y.reshape(*x.shape[:2], -1, self.head_dim)) for y in projected)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class Qwen2MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = (checkpoint_name(proj(x), "mlp") for proj in (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up)


class Qwen2DecoderLayer(nnx.Module):
    """Pre-norm block: x [B, T, D] → [B, T, D]."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Qwen2Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen2MLP(config, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array, attend: Callable[..., Array]) -> Array:
        x = checkpoint_name(x + self.self_attn(self.input_layernorm(x), cos, sin, attend), "middle")
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2Model(nnx.Module):
    """Embeddings [B, T, D] → last hidden states [B, T, D], normed."""

    def __init__(self, config: Qwen2Config, remat: RematPolicy, backend: AttentionBackend, *, rngs: nnx.Rngs):
        self.config, self.remat, self.backend = config, remat, backend
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stack(lambda rngs: Qwen2DecoderLayer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: Array, positions: Array, lengths: Array) -> Array:
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        attend = partial(attention, causal=True, lengths=lengths, backend=self.backend)
        return self.norm(scan_layers(self.layers, x, cos, sin, attend, remat=self.remat))


class Qwen2ForCausalLM(nnx.Module):
    """The decoder and the head that turns hidden states into words; tied to the embeddings or its own."""

    def __init__(self, config: Qwen2Config, remat: RematPolicy, backend: AttentionBackend, *, rngs: nnx.Rngs):
        self.model = Qwen2Model(config, remat, backend, rngs=rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def logits(self, x: Array) -> Array:
        """Hidden states [..., D] → float32 [..., V]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        weight = head.weight[...].astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, weight, preferred_element_type=jnp.float32)
