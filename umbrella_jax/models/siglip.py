"""SigLIP's vision tower (Zhai et al. 2023) under Hugging Face's names, with the patch embedding for volumes.

Axes: M volumes, N patches, E width, F width of the MLP, H heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from umbrella_jax.config.schema import AttentionBackend, LayerLoop, ModalityConfig, RematPolicy
from umbrella_jax.models.attention import attention, length_multiple
from umbrella_jax.models.layer_loop import stack_layers
from umbrella_jax.models.layers import LayerNorm, Linear, run_layers
from umbrella_jax.models.patch_embed import PatchEmbed


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Sizes of the tower, named as in `vision_config`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """All layers, those that do not run included."""
    num_attention_heads: int
    layer_norm_eps: float
    num_unused_layers: int = 0
    """Layers above the one whose output LLaVA takes as features (`vision_feature_layer`), which do not run."""

    @property
    def num_used_layers(self) -> int:
        """Layers that run."""
        return self.num_hidden_layers - self.num_unused_layers


class SiglipAttention(nnx.Module):
    """Attention whose projections have biases; `attend` takes q, k and v [M, N, H, Dh]."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "M N E"], attend: Callable[..., Array]) -> Float[Array, "M N E"]:
        q, k, v = (
            proj(x).reshape(*x.shape[:2], self.num_heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v).reshape(x.shape))


class SiglipMLP(nnx.Module):
    """E → F → E, with the tanh approximation of GELU."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "M N E"]) -> Float[Array, "M N E"]:
        return self.fc2(jax.nn.gelu(checkpoint_name(self.fc1(x), "mlp"), approximate=True))


class SiglipEncoderLayer(nnx.Module):
    """Pre-norm block of attention and MLP."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "M N E"], attend: Callable[..., Array]) -> Float[Array, "M N E"]:
        x = checkpoint_name(x + self.self_attn(self.layer_norm1(x), attend), "middle")
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nnx.Module):
    """The layers, stacked on axis 0 of their parameters."""

    def __init__(self, config: SiglipConfig, num_layers: int, *, rngs: nnx.Rngs):
        self.layers = stack_layers(lambda rngs: SiglipEncoderLayer(config, rngs=rngs), num_layers, rngs)


class SiglipVisionTransformer(nnx.Module):
    """Patch embedding and encoder; `unused` and `post_layernorm` are kept only for lossless conversion.

    LLaVA takes the output of the encoder's last layer, so the parameters of the layers above it (`unused`, if there are
    any) and of `post_layernorm` never reach the loss.
    """

    def __init__(self, config: SiglipConfig, modalities: Mapping[str, ModalityConfig], *, rngs: nnx.Rngs):
        self.embeddings = PatchEmbed(modalities, config.hidden_size, rngs=rngs)
        self.encoder = SiglipEncoder(config, config.num_used_layers, rngs=rngs)
        above = config.num_unused_layers
        self.unused = SiglipEncoder(config, above, rngs=rngs) if above else None
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class SiglipVisionModel(nnx.Module):
    """Volumes of one modality → hidden states of the last layer that runs."""

    def __init__(
        self,
        config: SiglipConfig,
        modalities: Mapping[str, ModalityConfig],
        remat: RematPolicy,
        backend: AttentionBackend,
        loop: LayerLoop,
        *,
        rngs: nnx.Rngs,
    ):
        self.remat, self.backend, self.loop = remat, backend, loop
        self.vision_model = SiglipVisionTransformer(config, modalities, rngs=rngs)

    def __call__(self, name: str, volumes: Float[Array, "M *size"]) -> Float[Array, "M N E"]:
        x = self.vision_model.embeddings(name, volumes)
        patches, lengths = x.shape[1], None
        if padding := -patches % length_multiple(self.backend):
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
            lengths = jnp.full(x.shape[:1], patches, jnp.int32)
        attend = partial(attention, causal=False, lengths=lengths, backend=self.backend)
        layers = self.vision_model.encoder.layers
        return run_layers(layers, x, attend, remat=self.remat, loop=self.loop)[:, :patches]
