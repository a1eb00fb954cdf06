"""What a config.json may describe: one description per layout of a LLaVA, per vision tower and per language model.

Reading, conversion, the comparison with transformers and the model card follow from these. A field of config.json that
this package reads is in `defaults`, one that has a single supported value in `only`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Only(NamedTuple):
    """A field of config.json with one supported value."""

    key: str
    default: Any
    """Value that transformers takes for an absent field."""
    value: Any
    why: str
    """Reason or remedy, for the message."""


_EVERYWHERE = (
    Only("quantization_config", None, None, "quantised weights cannot be read; use the original ones"),
    Only("per_layer_config", None, None, "all layers have the same sizes"),
    Only("return_dict", True, True, "a LLaVA of transformers fails with any other"),
)


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """A vision tower: a `vision_config`."""

    title: str
    """Name on the model card."""
    covers: str
    """Published models that have this `model_type`, for messages."""
    defaults: Mapping[str, int | float]
    """{field of `SiglipConfig`: value that transformers takes for an absent one}."""
    only: tuple[Only, ...]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A language model: a `text_config`."""

    title: str
    """Name on the model card."""
    covers: str
    """Published models that have this `model_type`, for messages."""
    defaults: Mapping[str, int | float]
    """{field of `QwenConfig`: value that transformers takes for an absent one}."""
    only: tuple[Only, ...]
    qkv_bias: bool
    qk_norm: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A kind of LLaVA: the top level of a config.json."""

    covers: str
    """Published models that have this `model_type`, for messages."""
    tower: str
    """Default `model_type` of its `vision_config`."""
    decoder: str
    """Default `model_type` of its `text_config`."""
    image_token: int
    """Default id of `<image>`."""
    torch_name: str
    """Name of transformers' classes without `Config` and `ForConditionalGeneration`."""
    image_newline: bool
    """Whether there is an embedding that ends the rows of an image; volumes never use it."""
    only: tuple[Only, ...]


TOWERS: Mapping[str, VisionTower] = {
    "siglip_vision_model": VisionTower(
        title="SigLIP",
        covers="SigLIP and SigLIP 2, except NaFlex",
        defaults={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "layer_norm_eps": 1e-6,
        },
        only=(
            Only("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh", "the tower's activation is tanh GELU"),
            Only("vision_use_head", True, False, "the pooling head is not supported, and LLaVA does not use it"),
            Only("tie_last_hidden_states", None, None, "features are those before post_layernorm"),
            *_EVERYWHERE,
        ),
    ),
}
"""{`model_type`: vision tower}."""

_QWEN_ONLY = (
    Only("hidden_act", "silu", "silu", "the MLP's activation is SiLU"),
    Only("use_sliding_window", False, False, "attention sees the whole text"),
    Only("is_causal", True, True, "a position sees those before it"),
    Only("partial_rotary_factor", 1.0, 1.0, "rope turns all of a head"),
    *_EVERYWHERE,
)

_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
}

DECODERS: Mapping[str, Decoder] = {
    "qwen2": Decoder(
        title="Qwen2",
        covers="Qwen1.5, Qwen2, Qwen2.5",
        defaults=_QWEN_DEFAULTS,
        only=_QWEN_ONLY,
        qkv_bias=True,
        qk_norm=False,
    ),
    "qwen3": Decoder(
        title="Qwen3",
        covers="Qwen3, dense",
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        only=(*_QWEN_ONLY, Only("attention_bias", False, False, "the projections of attention have no biases")),
        qkv_bias=False,
        qk_norm=True,
    ),
}
"""{`model_type`: language model}."""

_PROJECTOR_ONLY = (
    Only("projector_hidden_act", "gelu", "gelu", "the projector's activation is the exact GELU"),
    Only("multimodal_projector_bias", True, True, "the projector has biases"),
)

LAYOUTS: Mapping[str, Layout] = {
    "llava": Layout(
        covers="LLaVA, LLaVA-Interleave",
        tower="clip_vision_model",
        decoder="llama",
        image_token=32000,
        torch_name="Llava",
        image_newline=False,
        only=(
            *_PROJECTOR_ONLY,
            Only("vision_feature_select_strategy", "default", "full", "SigLIP has no CLS token to drop"),
            Only("vision_feature_layer", -2, -1, "features are the last layer's output"),
            *_EVERYWHERE,
        ),
    ),
    # vision_aspect_ratio, image_grid_pinpoints and video_token_index are about images and videos: volumes use none.
    "llava_onevision": Layout(
        covers="LLaVA-OneVision",
        tower="siglip_vision_model",
        decoder="qwen2",
        image_token=151646,
        torch_name="LlavaOnevision",
        image_newline=True,
        only=(
            *_PROJECTOR_ONLY,
            Only("vision_feature_select_strategy", "full", "full", "SigLIP has no CLS token to drop"),
            Only("vision_feature_layer", -1, -1, "features are the last layer's output"),
            *_EVERYWHERE,
        ),
    ),
}
"""{`model_type`: layout}."""
