"""What a config.json may describe: one description per layout of a LLaVA, per vision tower and per language model.

Reading, conversion, the comparison with transformers and the model card follow from these. A field of config.json that
this package reads is in `defaults`, one that has a single supported value in `only`. Other code describes the same
models in config.json files of its own: `DIALECTS`.
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

    def fault(self, prefix: str, section: Mapping[str, Any]) -> str | None:
        """Return a message if a section of config.json, whose name is `prefix`, has another value."""
        value = section.get(self.key, self.default)
        if value == self.value and isinstance(value, bool) == isinstance(self.value, bool):
            return None
        return unsupported(f"{prefix}{self.key}", value, section, f"expected {self.value!r}: {self.why}")


def unsupported(name: str, value: Any, section: Mapping[str, Any], remedy: str) -> str:
    """Return a message about the value of a field, which `section` may lack."""
    absent = "" if name.rpartition(".")[2] in section else ", which absence means,"
    return f"{name}: {value!r}{absent} is not supported, {remedy}"


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
    sizes: Mapping[str, Mapping[str, int]]
    """{size in the names of Google's checkpoints: fields of `SiglipConfig`}."""
    whole: str
    """`model_type` of a whole checkpoint, whose `vision_config` it is."""
    left_out: tuple[str, ...]
    """Patterns of the tensors of a whole checkpoint that a LLaVA does not use."""
    others: Mapping[str, str]
    """{`model_type` of a similar tower that is not supported: reason and remedy}."""


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
    feature_layer: int
    """Default `vision_feature_layer`."""
    only: tuple[Only, ...]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """A config.json of other code for a LLaVA; reading turns it into one of the hub's `LAYOUTS` (convert/dialects.py).

    Names of tensors need no description here: `convert/rules.py` recognises them.
    """

    marker: str
    """Field by which the dialect is recognised."""
    layer: str
    """Field with the layer whose output is projected; transformers calls it `vision_feature_layer`."""
    tower_name: str | None
    """Field with the name of the tower, whose sizes the file does not have; None if it has a `vision_config`."""
    decoder: str | None
    """`model_type` of the language model, whose fields are at the top level; None if it has a `text_config`."""
    only: tuple[Only, ...]
    unused: tuple[str, ...] = ()
    """Patterns of fields at the top level that do not affect a volume's features; the rest are the language model's."""


def _siglip(hidden_size: int, intermediate_size: int, *, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


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
        sizes={  # of SigLIP and of SigLIP 2 with a fixed resolution
            "base": _siglip(768, 3072, layers=12, heads=12),
            "large": _siglip(1024, 4096, layers=24, heads=16),
            "so400m": _siglip(1152, 4304, layers=27, heads=16),
            "giant-opt": _siglip(1536, 6144, layers=40, heads=16),
        },
        whole="siglip",
        left_out=("text_model.*", "logit_*", "vision_model.head.*", "vision_model.embeddings.position_ids"),
        others=dict.fromkeys(
            ("siglip2", "siglip2_vision_model"),
            "the NaFlex variant of SigLIP 2; use one of a fixed resolution, such as siglip2-so400m-patch14-384",
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
        feature_layer=-2,
        only=(
            *_PROJECTOR_ONLY,
            Only("vision_feature_select_strategy", "default", "full", "SigLIP has no CLS token to drop"),
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
        feature_layer=-1,
        only=(
            *_PROJECTOR_ONLY,
            Only("vision_feature_select_strategy", "full", "full", "SigLIP has no CLS token to drop"),
            *_EVERYWHERE,
        ),
    ),
}
"""{`model_type`: layout}."""

_TWO_LAYERS = "the projector is two layers with the exact GELU between them"

DIALECTS: tuple[Dialect, ...] = (
    Dialect(  # LLaVA-NeXT: LLaVA-OneVision, LLaVA-Video and LLaVA-NeXT-Interleave with Qwen
        marker="mm_vision_tower",
        layer="mm_vision_select_layer",
        tower_name="mm_vision_tower",
        decoder="qwen2",
        only=(
            Only("architectures", None, ["LlavaQwenForCausalLM"], "only LLaVA-NeXT's models with Qwen can be read"),
            Only("use_mm_proj", True, True, "there is a projector"),
            Only("mm_projector_type", "linear", "mlp2x_gelu", _TWO_LAYERS),
            Only("mm_resampler_type", None, None, "features are not resampled"),
            Only("mm_vision_select_feature", "patch", "patch", "features are those of the patches"),
            Only("mm_use_im_start_end", False, False, "no token precedes or follows an image"),
            Only("use_pos_skipping", False, False, "no position is skipped"),
            Only("add_faster_video", False, False, "frames have one kind of feature"),
            Only("s2", False, False, "images have one scale"),
        ),
        unused=(
            # training
            *("mm_tunable_parts", "mm_projector_lr", "mm_vision_tower_lr", "tune_*", "freeze_*", "unfreeze_*"),
            *("vision_tower_pretrained", "delay_load"),
            # images, which are cut into tiles, and videos, whose frames are pooled: a volume is neither
            *("image_*", "mm_patch_merge_type", "mm_newline_position", "mm_spatial_pool_*", "mm_pooler_*"),
            *("faster_token_stride", "add_time_instruction", "force_sample", "s2_scales", "pos_skipping_range"),
            # of resamplers, which are refused
            *("mm_mask_drop_*", "mm_perceiver_*", "mm_qformer_*", "mm_resampler_location"),
            # text
            *("mm_use_im_patch_token", "tokenizer_*", "ignore_index", "max_sequence_length"),
            # stated by the tensors
            "mm_hidden_size",
            # of the file itself
            *("_name_or_path", "transformers_version", "model_type", "auto_map"),
            # left in LLaVA-OneVision's by transformers' class for LLaVA, and not about this model
            *("text_config", "vision_config", "projector_hidden_act", "vision_feature_*"),
        ),
    ),
    Dialect(  # TinyLLaVA
        marker="connector_type",
        layer="vision_feature_layer",
        tower_name=None,
        decoder=None,
        only=(
            Only("architectures", None, ["TinyLlavaForConditionalGeneration"], "only TinyLLaVA has connectors"),
            Only("connector_type", None, "mlp2x_gelu", _TWO_LAYERS),
            Only("vision_model_name_or_path2", "", "", "there is one tower"),
            *_EVERYWHERE,
        ),
    ),
)
"""Dialects of config.json."""


def torch_class(layout: str) -> str:
    """Return the name of the class in convert/modeling_umbrella.py of one of `LAYOUTS`."""
    return f"Umbrella{LAYOUTS[layout].torch_name.removeprefix('Llava')}ForConditionalGeneration"
