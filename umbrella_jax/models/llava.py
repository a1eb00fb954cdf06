"""LLaVA: tower, projector and language model composed under Hugging Face's names; Batch → hidden states, logits.

Axes: B conversations, T positions, K supervised positions, D width, V words, M volumes, N patches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import AttentionBackend, LoraConfig, ModalityConfig, RematPolicy
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.attention import choose_backend
from umbrella_jax.models.lora import attach
from umbrella_jax.models.parallel import ROWS, local, split_rows, ways
from umbrella_jax.models.projector import LlavaMultiModalProjector
from umbrella_jax.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from umbrella_jax.models.siglip import SiglipConfig, SiglipVisionModel

Array = jax.Array
Params = dict[str, Array]
"""Parameters by dotted path, which is the hub's name without the layer's number: layers are stacked on axis 0."""


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """What config.json and the patch embedding's JSON say, and how to compute it."""

    vision: SiglipConfig
    text: Qwen2Config
    modalities: Mapping[str, ModalityConfig]
    image_token_id: int
    compute_dtype: str = "float32"
    remat: RematPolicy = "none"
    attention: AttentionBackend = "xla"
    lora: LoraConfig | None = None
    """Of the adapters beside its weights."""
    untrained: Mapping[str, str] = FrozenDict()
    """{modality: why no answer may use it}: the patch embedding's weights are untrained."""

    def __post_init__(self) -> None:
        for name in ("modalities", "untrained"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))  # hashable: jit keys on it

    def check_trained(self, modalities: Iterable[str]) -> None:
        """Raise CheckpointError if any of these modalities has an untrained patch embedding."""
        if faults := [self.untrained[name] for name in sorted({*modalities}) if name in self.untrained]:
            raise CheckpointError(faults)

    def with_attention(self, wanted: Literal["auto", AttentionBackend], native: AttentionBackend) -> "LlavaConfig":
        """The same model, for devices whose own backend is `native`, at hand (`native_backend`) or not.

        `wanted` is as `model.attention` of a run. Raises ConfigError where that cannot serve there.
        """
        head_dims = (self.vision.hidden_size // self.vision.num_attention_heads, self.text.head_dim)
        return replace(self, attention=choose_backend(wanted, native, self.compute_dtype, head_dims))


class Llava(nnx.Module):
    """`LlavaForConditionalGeneration` whose images are volumes."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision_tower = SiglipVisionModel(
            config.vision, config.modalities, config.remat, config.attention, rngs=rngs
        )
        self.multi_modal_projector = LlavaMultiModalProjector(
            config.vision.hidden_size, config.text.hidden_size, rngs=rngs
        )
        self.language_model = Qwen2ForCausalLM(config.text, config.remat, config.attention, rngs=rngs)
        if config.lora is not None:
            attach(self, config.lora)

    def image_features(self, name: str, volumes: Array) -> Array:
        """Volumes [M, *size] of modality `name` → [M, N, D], a row for every patch."""
        hidden = self.vision_tower(name, volumes.astype(self.config.compute_dtype))
        return split_rows(self.multi_modal_projector(hidden))

    def shown(self, batch: Batch) -> dict[str, Array]:
        """Of each modality of `batch.volumes`, bool []: whether a position of the batch takes a feature of it.

        Takes a training step's batch too, with its axis of micro-batches."""
        found, first = {}, 0
        for name in sorted(batch.volumes):
            behind = (
                first + batch.volumes[name].shape[batch.lengths.ndim - 1] * self.config.modalities[name].num_patches
            )
            found[name] = jnp.any((first <= batch.feature_idx) & (batch.feature_idx < behind))
            first = behind
        return found

    def inputs_embeds(self, batch: Batch) -> Array:
        """Token embeddings [B, T, D] in which a position with feature_idx ≥ 0 holds that row of the image features."""
        chex.assert_equal_shape([batch.input_ids, batch.feature_idx, batch.positions])
        ids, idx = batch.input_ids, batch.feature_idx
        embeds = split_rows(self.language_model.model.embed_tokens(ids).astype(self.config.compute_dtype))
        # What names no feature that the device has must not pass for text.
        embeds = jnp.where((idx >= 0)[..., None], jnp.nan, embeds)
        parts, first = ways(ROWS), 0
        rows, part = PartitionSpec(ROWS), jnp.arange(parts)
        for name in sorted(batch.volumes):
            features = self.image_features(name, batch.volumes[name])
            size = features.shape[0] * features.shape[1]
            start = first + part * (size // parts)
            embeds = local(_show, in_specs=rows, out_specs=rows, check_vma=True)(embeds, idx, features, start)
            first += size
        return embeds

    def hidden_states(self, batch: Batch) -> Array:
        """Last hidden states [B, T, D] in the compute dtype."""
        return self.language_model.model(self.inputs_embeds(batch), batch.positions, batch.lengths)

    def target_logits(self, batch: Batch) -> Array:
        """Logits, float32 [B, K, V], at the supervised positions alone."""
        hidden = jnp.take_along_axis(self.hidden_states(batch), batch.target_pos[..., None], axis=1)
        return self.language_model.logits(hidden)

    def __call__(self, batch: Batch) -> Array:
        """Logits, float32 [B, T, V], at every position; those beyond a row's length mean nothing."""
        return self.language_model.logits(self.hidden_states(batch))


def _show(embeds: Array, idx: Array, features: Array, start: Array) -> Array:
    """embeds [B, T, D] with rows idx − start of the features [M, N, D] at all positions that mean one of them."""
    features = features.reshape(-1, features.shape[-1])
    idx = idx - start
    here = (idx >= 0) & (idx < len(features))
    return jnp.where(here[..., None], features.at[idx].get(mode="clip"), embeds)


def split(model: Llava) -> tuple[nnx.GraphDef, Params]:
    """The model's structure, which is hashable, and its parameters by dotted path."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, flatten_dict(nnx.to_pure_dict(state), sep=".")


def merge(graphdef: nnx.GraphDef, params: Params) -> Llava:
    """The inverse of `split`; may be called inside jit and grad, with parameters from several traces."""
    return nnx.merge(graphdef, unflatten_dict(params, sep="."))


def abstract_params(config: LlavaConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """`split` of a model that holds float32 shapes alone: nothing is computed and nothing allocated."""
    graphdef, shapes = _abstract(config)
    return graphdef, dict(shapes)


@lru_cache(maxsize=8)  # tracing takes longer than reading all headers of a checkpoint, and several ask
def _abstract(config: LlavaConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graphdef, flatten_dict(nnx.to_pure_dict(state), sep=".")
