"""LLaVA: vision tower, projector and language model under Hugging Face's names; Batch → hidden states and logits.

Axes: B conversations, T positions, K supervised positions, D width, V words, M volumes, N patches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int

from umbrella_jax.batch import AnswerTree, AnyArray, Batch
from umbrella_jax.config.schema import (
    AttentionBackend,
    LayerLoop,
    LoraConfig,
    ModalityConfig,
    Quantized,
    RematPolicy,
)
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.attention import choose_backend, explain_backend
from umbrella_jax.models.layers import Linear
from umbrella_jax.models.lora import attach
from umbrella_jax.models.parallel import ROWS, local, split_rows, ways
from umbrella_jax.models.projector import LlavaMultiModalProjector
from umbrella_jax.models.qwen import QwenConfig, QwenForCausalLM
from umbrella_jax.models.siglip import SiglipConfig, SiglipVisionModel

Params = dict[str, Array]
"""Parameters by dotted path: Hugging Face's name without the layer number, since layers are stacked on axis 0."""


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """Sizes from config.json and the patch embedding's JSON, and the options of the computation."""

    vision: SiglipConfig
    text: QwenConfig
    modalities: Mapping[str, ModalityConfig]
    image_token_id: int
    image_newline: bool = False
    """Whether the checkpoint has an embedding `image_newline`, which volumes do not use."""
    compute_dtype: str = "float32"
    remat: RematPolicy = "none"
    attention: AttentionBackend = "xla"
    layers: LayerLoop = "scanned"
    lora: LoraConfig | None = None
    """LoRA adapters to attach; None for none."""
    product_dtype: Quantized | None = None
    """8-bit type of products with quantised weights (`model.quantize_activations`); None for the compute dtype."""
    untrained: Mapping[str, str] = FrozenDict()
    """{modality: message}: modalities with an untrained patch embedding, which may not answer questions."""

    def __post_init__(self) -> None:
        for name in ("modalities", "untrained"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))  # hashable: jit keys on it

    def check_trained(self, modalities: Iterable[str]) -> None:
        """Raise CheckpointError if any of these modalities has an untrained patch embedding."""
        if faults := [self.untrained[name] for name in sorted({*modalities}) if name in self.untrained]:
            raise CheckpointError(faults)

    def with_attention(self, requested: Literal["auto", AttentionBackend], native: AttentionBackend) -> "LlavaConfig":
        """Return the same model with its attention chosen for the given kind of device.

        Args:
            requested: `model.attention` of the run.
            native: the backend written for the devices (`native_backend`); they need not be present.

        Raises:
            ConfigError: the requested backend cannot run this model on these devices.
        """
        return replace(self, attention=choose_backend(requested, native, self.compute_dtype, self._head_dims))

    def why_attention(self, requested: Literal["auto", AttentionBackend], native: AttentionBackend) -> str:
        """Return why `with_attention` chooses its backend from the same arguments."""
        return explain_backend(requested, native, self.compute_dtype, self._head_dims)

    @property
    def architecture(self) -> dict[str, dict[str, Any]]:
        """Fields of tower and language model, for a run's records.

        A field with its default value is left out: records from before the field existed then remain equal.
        """
        return {
            name: {f.name: value for f in fields(part) if (value := getattr(part, f.name)) != f.default}
            for name, part in (("vision", self.vision), ("text", self.text))
        }

    @property
    def _head_dims(self) -> tuple[int, int]:
        return self.vision.hidden_size // self.vision.num_attention_heads, self.text.head_dim


class Llava(nnx.Module):
    """`LlavaForConditionalGeneration` or `LlavaOnevisionForConditionalGeneration` whose images are volumes.

    In LLaVA-OneVision, `image_newline` ends the rows of an image's patches. A volume's patches have no such rows, so it
    never reaches the loss and is kept only for lossless conversion.
    """

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision_tower = SiglipVisionModel(
            config.vision, config.modalities, config.remat, config.attention, config.layers, rngs=rngs
        )
        self.multi_modal_projector = LlavaMultiModalProjector(
            config.vision.hidden_size, config.text.hidden_size, rngs=rngs
        )
        self.language_model = QwenForCausalLM(config.text, config.remat, config.attention, config.layers, rngs=rngs)
        if config.image_newline:
            width = config.text.hidden_size
            self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,)) / width**0.5)
        if config.lora is not None:
            attach(self, config.lora)
        if config.product_dtype is not None:
            for _, module in nnx.iter_modules(self):
                if isinstance(module, Linear):
                    module.in_8_bits = True

    def image_features(self, name: str, volumes: Float[AnyArray, "M *size"]) -> Float[Array, "M N D"]:
        """Encode volumes of modality `name` to features, one row per patch."""
        hidden = self.vision_tower(name, jnp.asarray(volumes, self.config.compute_dtype))
        return split_rows(self.multi_modal_projector(hidden))

    def shown(self, batch: Batch) -> dict[str, Bool[Array, ""]]:
        """Return {modality of `batch.volumes`: whether any position of the batch shows one of its volumes}.

        The batch may have a leading axis of micro-batches, as a training step's has.
        """
        is_shown, start = {}, 0
        for name in sorted(batch.volumes):
            count = batch.volumes[name].shape[batch.lengths.ndim - 1]
            end = start + count * self.config.modalities[name].num_patches
            is_shown[name] = jnp.any((start <= batch.feature_idx) & (batch.feature_idx < end))
            start = end
        return is_shown

    def inputs_embeds(self, batch: Batch, features: Mapping[str, Array] | None = None) -> Float[Array, "B T D"]:
        """Return token embeddings; positions with feature_idx ≥ 0 hold that row of the image features.

        Args:
            features: {modality: features [M, N, D]} to show instead of encoding `batch.volumes`.
        """
        chex.assert_equal_shape([batch.input_ids, batch.feature_idx, batch.positions])
        ids, idx = batch.input_ids, batch.feature_idx
        embeds = split_rows(self.language_model.model.embed_tokens(ids).astype(self.config.compute_dtype))
        # A position whose feature is missing stays NaN, so that the loss fails loudly.
        embeds = jnp.where((idx >= 0)[..., None], jnp.nan, embeds)
        parts, first = ways(ROWS), 0
        rows, part = PartitionSpec(ROWS), jnp.arange(parts)
        for name in sorted(batch.volumes if features is None else features):
            shown = self.image_features(name, batch.volumes[name]) if features is None else features[name]
            size = shown.shape[0] * shown.shape[1]
            start = first + part * (size // parts)
            embeds = local(_show, in_specs=rows, out_specs=rows, check_vma=True)(embeds, idx, shown, start)
            first += size
        return embeds

    def hidden_states(self, batch: Batch) -> Float[Array, "B T D"]:
        """Return the last hidden states in the compute dtype."""
        return self.language_model.model(self.inputs_embeds(batch), batch.positions, batch.lengths)

    def target_logits(self, batch: Batch) -> Float32[Array, "B K V"]:
        """Return logits at the supervised positions only."""
        return self._logits_at(self.hidden_states(batch), batch.target_pos)

    def target_logits_and_scores(
        self, batch: Batch, tree: AnswerTree, prompt_lengths: Int[AnyArray, "B"]
    ) -> tuple[Float32[Array, "B K V"], Float32[Array, "B A"]]:
        """Return logits at the supervised positions, and log p(answer | prompt) of each answer of `tree`.

        Args:
            prompt_lengths: positions of each conversation that the answers continue.
        """
        decoder = self.language_model.model
        embeds = self.inputs_embeds(batch)
        hidden, nodes = decoder.with_answers(embeds, batch.positions, batch.lengths, tree, prompt_lengths)
        scores = self.language_model.answer_scores(nodes, tree.next_tokens)
        return self._logits_at(hidden, batch.target_pos), scores

    def _logits_at(self, hidden: Float[Array, "B T D"], places: Int[AnyArray, "B K"]) -> Float32[Array, "B K V"]:
        return self.language_model.logits(jnp.take_along_axis(hidden, places[..., None], axis=1))

    def __call__(self, batch: Batch) -> Float32[Array, "B T V"]:
        """Return logits at every position; those beyond a row's length are meaningless."""
        return self.language_model.logits(self.hidden_states(batch))


def _show(
    embeds: Float[Array, "B T D"], idx: Int[AnyArray, "B T"], features: Float[Array, "M N D"], start: Int[Array, "1"]
) -> Float[Array, "B T D"]:
    """Write features into embeds: each position gets row idx − start, if there is such a row."""
    features = features.reshape(-1, features.shape[-1])
    idx = idx - start[:, None]
    here = (idx >= 0) & (idx < len(features))
    return jnp.where(here[..., None], features.at[idx].get(mode="clip"), embeds)


def split(model: Llava) -> tuple[nnx.GraphDef, Params]:
    """Return the model's structure, which is hashable, and its parameters by dotted path."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, flatten_dict(nnx.to_pure_dict(state), sep=".")


def merge(graphdef: nnx.GraphDef, params: Params) -> Llava:
    """Rebuild the model from the results of `split`; works inside jit and grad, with parameters of several traces."""
    return nnx.merge(graphdef, unflatten_dict(params, sep="."))


def abstract_params(config: LlavaConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Return what `split` returns, with float32 shapes for parameters; computes and allocates nothing."""
    graphdef, shapes = _abstract(config)
    return graphdef, dict(shapes)


@lru_cache(maxsize=32)  # tracing takes longer than reading a checkpoint's headers, and there are several callers
def _abstract(config: LlavaConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graphdef, flatten_dict(nnx.to_pure_dict(state), sep=".")
