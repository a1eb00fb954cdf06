"""The decoder of Qwen1.5, Qwen2 and Qwen2.5 (Yang et al. 2024) and of Qwen3 (Yang et al. 2025), with HF's names.

Axes: B conversations, T positions, D width, F width of the MLP, H heads, K kv heads, Dh head width, R half of Dh,
V words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int

from umbrella_jax.batch import NONE, AnswerTree, AnyArray
from umbrella_jax.config.schema import AttentionBackend, LayerLoop, RematPolicy
from umbrella_jax.models.attention import attention, extension_attention
from umbrella_jax.models.layer_loop import loop_over_layers, stack_layers
from umbrella_jax.models.layers import Embedding, Linear, RMSNorm, float32_product, run_layers
from umbrella_jax.models.parallel import split_heads, split_rows


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """Sizes of the language model, named as in `text_config`."""

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
    qkv_bias: bool = True
    """Whether the projections to queries, keys and values have biases; Qwen3's have none."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalised before they are rotated, as in Qwen3."""


@no_type_check  # jax also builds it with shapes, shardings or None as fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Rotated keys and values of earlier positions, for all L layers, in S slots per row."""

    k: Float[Array, "L B K S Dh"]
    v: Float[Array, "L B K S Dh"]
    used: Bool[Array, "B S"]
    """Slots that are filled."""

    def grown(self, slots: int) -> "KVCache":
        """Return the cache with `slots` empty slots appended."""
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, slots), (0, 0))) for x in (self.k, self.v))
        return KVCache(k=k, v=v, used=jnp.pad(self.used, ((0, 0), (0, slots))))

    def put(
        self, k: Float[Array, "L B K N Dh"], v: Float[Array, "L B K N Dh"], slot: Int[Array, ""] | int
    ) -> "KVCache":
        """Return the cache with k and v written from `slot` on, the same slot in every row.

        With one slot for all rows, this is a cheap slice update; a slot per row would need a scatter.
        """
        put = jax.lax.dynamic_update_slice_in_dim
        used = put(self.used, jnp.ones((k.shape[1], k.shape[3]), bool), slot, axis=1)
        return KVCache(k=put(self.k, k, slot, axis=3), v=put(self.v, v, slot, axis=3), used=used)


def rope_tables(
    positions: Int[AnyArray, "B T"], head_dim: int, theta: float
) -> tuple[Float32[Array, "B T 1 R"], Float32[Array, "B T 1 R"]]:
    """Return cos and sin for positions (Su et al. 2021; GPT-NeoX's half-split order)."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T H Dh"], cos: Float32[Array, "B T 1 R"], sin: Float32[Array, "B T 1 R"]
) -> Float[Array, "B T H Dh"]:
    """Rotate x by its position, in float32, since late positions have large angles: number i with number i + R."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class QwenAttention(nnx.Module):
    """Grouped-query attention with rotary positions; `o_proj` has no bias."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, q, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, kv, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, kv, bias=config.qkv_bias, rngs=rngs)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None for _ in range(2)
        )
        self.o_proj = Linear(q, config.hidden_size, bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float32[Array, "B T 1 R"],
        sin: Float32[Array, "B T 1 R"],
        attend: Callable[..., Array],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K Dh"], Float[Array, "B T K Dh"]]:
        """Attend from x by `attend(q, k, v)` with q [B, T, H, Dh] and k, v [B, T, K, Dh].

        Returns the output, the rotated keys and the values.
        """
        projected = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if self.q_norm is not None:  # whose gradient needs its input: remat policies keep that
            projected = [checkpoint_name(y, "qkv") for y in projected]
        q, k, v = (split_heads(y.reshape(*x.shape[:2], -1, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(attend(q, k, v).reshape(*x.shape[:2], -1)), k, v


class QwenMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = (checkpoint_name(proj(x), "mlp") for proj in (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up)


class QwenDecoderLayer(nnx.Module):
    """Pre-norm block of attention and MLP."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = QwenAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = QwenMLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float32[Array, "B T 1 R"],
        sin: Float32[Array, "B T 1 R"],
        attend: Callable[..., Array],
    ) -> Float[Array, "B T D"]:
        return self.with_keys_and_values(x, cos, sin, attend)[0]

    def with_keys_and_values(
        self,
        x: Float[Array, "B T D"],
        cos: Float32[Array, "B T 1 R"],
        sin: Float32[Array, "B T 1 R"],
        attend: Callable[..., Array],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K Dh"], Float[Array, "B T K Dh"]]:
        """Return the block's output and its rotated keys and its values, for a cache."""
        attended, k, v = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = checkpoint_name(x + attended, "middle")
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class QwenModel(nnx.Module):
    """Embeddings → last hidden states, after the final norm."""

    def __init__(
        self,
        config: QwenConfig,
        remat: RematPolicy,
        backend: AttentionBackend,
        loop: LayerLoop,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.remat, self.backend, self.loop = config, remat, backend, loop
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stack_layers(lambda rngs: QwenDecoderLayer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[AnyArray, "B T"], lengths: Int[AnyArray, "B"]
    ) -> Float[Array, "B T D"]:
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        attend = self._attention(lengths)
        return self.norm(run_layers(self.layers, x, cos, sin, attend, remat=self.remat, loop=self.loop))

    def _attention(self, lengths: Int[AnyArray, "B"]) -> Callable[..., Array]:
        """Return causal attention; with norms, remat policies do not keep what it takes (see `QwenAttention`)."""
        name = "normalised" if self.config.qk_norm else "qkv"
        return partial(attention, causal=True, lengths=lengths, backend=self.backend, name=name)

    def with_answers(
        self,
        x: Float[Array, "B T D"],
        positions: Int[AnyArray, "B T"],
        lengths: Int[AnyArray, "B"],
        tree: AnswerTree,
        prompt_lengths: Int[AnyArray, "B"],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N D"]]:
        """Return what a call returns, and the last hidden states of the nodes of `tree`.

        Both go through the layers together, so that no layer's keys and values are kept for another pass.

        Args:
            tree: answers to the first part of each row.
            prompt_lengths: positions of that part; no node sees a position after it.
        """
        tables = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        node_positions = prompt_lengths[:, None] + tree.depths[:, 1:] - 1
        node_tables = rope_tables(node_positions, self.config.head_dim, self.config.rope_theta)
        attend = self._attention(lengths)
        used = jnp.arange(x.shape[1])[None] < prompt_lengths[:, None]
        sees = visible_nodes(tree)[:, 1:, 1:]

        def call(layer: QwenDecoderLayer, both: tuple[Array, Array]) -> tuple[Array, Array]:
            x, k, v = layer.with_keys_and_values(both[0], *tables, attend)
            past = {"past_k": k.transpose(0, 2, 1, 3), "past_v": v.transpose(0, 2, 1, 3)}
            return x, layer(both[1], *node_tables, partial(extension_attention, used=used, sees=sees, **past))

        both = (x, self.embed_tokens(tree.tokens[:, 1:]).astype(x.dtype))
        hidden, nodes = map(self.norm, run_layers(self.layers, both, remat=self.remat, loop=self.loop, call=call))
        return hidden, _with_root(hidden, nodes, prompt_lengths)

    def prefill(
        self, x: Float[Array, "B T D"], positions: Int[AnyArray, "B T"], lengths: Int[AnyArray, "B"]
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Return what a call returns, and the cache from which `extend` continues."""
        attend = self._attention(lengths)
        hidden, k, v = self._with_keys_and_values(x, positions, attend)
        used = jnp.arange(x.shape[1])[None] < lengths[:, None]
        return hidden, KVCache(k=k, v=v, used=used)

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[AnyArray, "B T"],
        cache: KVCache,
        sees: Bool[Array, "B T T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T Dh"], Float[Array, "L B K T Dh"]]:
        """Continue each row by T positions, which see the row's cache.

        Returns the last hidden states after the final norm, and the new keys and values, which are not in the cache
        yet.

        Args:
            sees: which new positions see each other; None for all up to itself.
        """
        attend = partial(extension_attention, used=cache.used, sees=sees)
        return self._with_keys_and_values(x, positions, attend, {"past_k": cache.k, "past_v": cache.v})

    def _with_keys_and_values(
        self,
        x: Float[Array, "B T D"],
        positions: Int[AnyArray, "B T"],
        attend: Callable[..., Array],
        past: Mapping[str, Array] = FrozenDict(),
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T Dh"], Float[Array, "L B K T Dh"]]:
        """Run the layers; return the last hidden states, and each layer's keys and values.

        Args:
            past: keyword arguments of `attend`, stacked over the layers on axis 0; each layer gets its own slice.
        """
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        graphdef, params = nnx.split(self.layers)

        def body(x: Array, per_layer: tuple[nnx.State, dict[str, Array]]) -> tuple[Array, tuple[Array, Array]]:
            params, past = per_layer
            layer = nnx.merge(graphdef, params)
            x, k, v = layer.with_keys_and_values(split_rows(x), cos, sin, partial(attend, **past))
            return x, (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

        x, (k, v) = loop_over_layers(body, x, (params, dict(past)), self.loop)
        return self.norm(x), k, v


class QwenForCausalLM(nnx.Module):
    """The decoder, and the head that maps hidden states to words: tied to the embeddings, or separate."""

    def __init__(
        self,
        config: QwenConfig,
        remat: RematPolicy,
        backend: AttentionBackend,
        loop: LayerLoop,
        *,
        rngs: nnx.Rngs,
    ):
        self.model = QwenModel(config, remat, backend, loop, rngs=rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def logits(self, x: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Map hidden states to logits."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return float32_product(x, head.weight[...].astype(x.dtype))

    def answer_scores(
        self, hidden: Float[Array, "B N D"], next_tokens: Int[AnyArray, "B N A"]
    ) -> Float32[Array, "B A"]:
        """Return log p(answer | prompt) of the answers of an `AnswerTree`, summed over their tokens.

        Args:
            hidden: last hidden states of the nodes.
            next_tokens: as in `AnswerTree`. An answer that passes no node has log-probability 0.
        """
        b, n, a = next_tokens.shape
        # A few nodes at a time, since each has V logits. The backward pass computes them again.
        size = max(1, min(n, _MAX_LOGITS // (b * self.model.config.vocab_size)))
        padding = ((0, 0), (0, -n % size), (0, 0))
        hidden = jnp.pad(hidden, padding).reshape(b, -1, size, hidden.shape[-1]).swapaxes(0, 1)
        tokens = jnp.pad(next_tokens, padding, constant_values=NONE).reshape(b, -1, size, a).swapaxes(0, 1)

        def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
            hidden, tokens = chunk
            logits = self.logits(hidden)
            of_tokens = jnp.take_along_axis(logits, jnp.maximum(tokens, 0), axis=-1)
            scores = of_tokens - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            return total + jnp.where(tokens == NONE, 0, scores).sum(1), None

        return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), jnp.zeros((b, a)), (hidden, tokens))[0]


_MAX_LOGITS = 2**26
"""Largest number of logits in memory while answers are scored: 256 MB in float32."""


def visible_nodes(tree: AnswerTree) -> Bool[Array, "B N N"]:
    """Return whether each node sees each other one: itself and its ancestors, with which it shares an answer."""
    passes = (jnp.asarray(tree.next_tokens) != NONE).astype(jnp.float32)
    shared = jnp.einsum("bia,bja->bij", passes, passes) > 0
    is_before = tree.depths[:, None, :] <= tree.depths[:, :, None]
    return (shared & is_before) | jnp.eye(shared.shape[1], dtype=bool)[None]  # so that padding sees a key too


def _with_root(
    hidden: Float[Array, "B T D"], nodes: Float[Array, "B M D"], prompt_lengths: Int[AnyArray, "B"]
) -> Float[Array, "B N D"]:
    """Put the hidden state of each prompt's last position, which is node 0, before those of the other nodes."""
    last = jnp.take_along_axis(hidden, prompt_lengths[:, None, None] - 1, axis=1)
    return jnp.concatenate([last, nodes], axis=1)
