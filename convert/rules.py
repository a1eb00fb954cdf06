"""Map the tensors of a Hugging Face checkpoint to JAX parameters: one table, used in both directions.

A parameter's path is the hub's name of the tensor without the layer's number, since layers are stacked on axis 0. The
tower's layers that do not run are a stack of their own. The only other difference is the shape, so each rule has a
reshape, and its inverse reshapes back.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.models.llava import LlavaConfig, abstract_params
from umbrella_jax.models.paths import (
    EMBEDDINGS,
    ENCODER,
    LANGUAGE_MODEL,
    PROJECTOR,
    UNUSED_LAYERS,
    VISION_MODEL,
    VISION_TOWER,
    modality_of,
)

Shape = tuple[int, ...]
FileShape = Callable[[Shape, ModalityConfig | None], Shape]
"""Function from the shape of one layer's parameter to the shape of its tensor in the file."""


def _identity(shape: Shape, modality: ModalityConfig | None) -> Shape:
    return shape


def _patch_kernel(shape: Shape, modality: ModalityConfig | None) -> Shape:
    """Return PyTorch's shape of a patch kernel [E, P]: a Conv3d kernel (E, 1, pd, ph, pw) in 3D, unchanged in 4D."""
    assert modality is not None
    return (shape[0], 1, *modality.patch) if len(modality.patch) == 3 else shape


@dataclass(frozen=True)
class TensorRule:
    """Name and shape of one kind of tensor."""

    name: str
    """Name on the hub, with {i} for the layer's number and {m} for the modality."""
    file_shape: FileShape = _identity
    is_unused: bool = False
    """Whether it is of the tower's layers that do not run, whose numbers follow those of the others."""

    @property
    def path(self) -> str:
        """Path of the JAX parameter, with {m} for the modality."""
        path = self.name.replace(".{i}", "")
        return path.replace(ENCODER, UNUSED_LAYERS) if self.is_unused else path


_QWEN = LANGUAGE_MODEL + "model."
EMBED = _QWEN + "embed_tokens.weight"
LM_HEAD = LANGUAGE_MODEL + "lm_head.weight"
IMAGE_NEWLINE = "image_newline"

_USED: tuple[TensorRule, ...] = (
    TensorRule(EMBED),
    TensorRule(_QWEN + "layers.{i}.input_layernorm.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.q_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.q_proj.bias"),
    TensorRule(_QWEN + "layers.{i}.self_attn.k_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.k_proj.bias"),
    TensorRule(_QWEN + "layers.{i}.self_attn.v_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.v_proj.bias"),
    TensorRule(_QWEN + "layers.{i}.self_attn.o_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.q_norm.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.k_norm.weight"),
    TensorRule(_QWEN + "layers.{i}.post_attention_layernorm.weight"),
    TensorRule(_QWEN + "layers.{i}.mlp.gate_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.mlp.up_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.mlp.down_proj.weight"),
    TensorRule(_QWEN + "norm.weight"),
    TensorRule(LM_HEAD),  # untied only
    TensorRule(IMAGE_NEWLINE),  # LLaVA-OneVision only
    TensorRule(PROJECTOR + "linear_1.weight"),
    TensorRule(PROJECTOR + "linear_1.bias"),
    TensorRule(PROJECTOR + "linear_2.weight"),
    TensorRule(PROJECTOR + "linear_2.bias"),
    TensorRule(EMBEDDINGS + "{m}_proj.weight", _patch_kernel),
    TensorRule(EMBEDDINGS + "{m}_proj.bias"),
    TensorRule(EMBEDDINGS + "{m}_positional_embeddings"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.layer_norm1.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.layer_norm1.bias"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.q_proj.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.q_proj.bias"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.k_proj.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.k_proj.bias"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.v_proj.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.v_proj.bias"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.out_proj.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.self_attn.out_proj.bias"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.layer_norm2.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.layer_norm2.bias"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.mlp.fc1.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.mlp.fc1.bias"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.mlp.fc2.weight"),
    TensorRule(VISION_MODEL + "encoder.layers.{i}.mlp.fc2.bias"),
    TensorRule(VISION_MODEL + "post_layernorm.weight"),
    TensorRule(VISION_MODEL + "post_layernorm.bias"),
)
TENSOR_RULES = (*_USED, *(replace(rule, is_unused=True) for rule in _USED if rule.name.startswith(ENCODER)))

# SigLIP's embedding of 2D images, in a stock checkpoint; the volume patch embedding replaces it.
REPLACED: frozenset[str] = frozenset(
    EMBEDDINGS + name
    for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight", "position_ids")
)

# SigLIP's pooling head, which LLaVA does not use. TinyLLaVA saves it; other code leaves it out.
HEAD = VISION_MODEL + "head."

_LAYOUTS = [  # rewrites names of other layouts to those on the hub
    (re.compile(r"^model\.vision_tower\.vision_tower\."), "vision_tower."),  # LLaVA-NeXT
    (re.compile(r"^model\.mm_projector\.0\."), PROJECTOR + "linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), PROJECTOR + "linear_2."),
    (re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)"), _QWEN),
    (re.compile(r"^vision_tower\._vision_tower\."), "vision_tower."),  # TinyLLaVA
    (re.compile(r"^connector\._connector\.0\."), PROJECTOR + "linear_1."),
    (re.compile(r"^connector\._connector\.2\."), PROJECTOR + "linear_2."),
    (re.compile(r"^model\.language_model\."), _QWEN),  # transformers 4.5x and 5 in memory
    (re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)"), ""),
    (re.compile(r"^lm_head\."), LANGUAGE_MODEL + "lm_head."),
    (re.compile(r"^(?=vision_model\.)|^(?=encoder\.layers\.)"), VISION_TOWER),  # a tower without a language model
    (re.compile(r"^vision_tower\.(?!vision_model\.)"), VISION_MODEL),  # transformers 5 has no `vision_model`
    # older UMBRELLA code replaced only the convolution by the volume patch embedding
    (re.compile(r"(?<=\.embeddings\.)patch_embedding\.(?=\w+_(?:proj\.|positional_embeddings$))"), ""),
]


def hub_name(name: str) -> str:
    """Return the name on the hub of a tensor with a name of any version of transformers; other names are unchanged."""
    for pattern, replacement in _LAYOUTS:
        name = pattern.sub(replacement, name)
    return name


# parts that torch.compile, FSDP and activation checkpointing add to parameter names
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"(?<=\.layers\.)\d+\.")
_PATHS = frozenset(rule.path for rule in TENSOR_RULES) | REPLACED


def unwrapped_names(names: Collection[str]) -> dict[str, str]:
    """Return {name: the name without the parts that wrappers add}.

    These are parts such as `_orig_mod.`, anywhere in a name, and a prefix that all names share, such as `module.` (DDP)
    or `base_model.model.` (PEFT). A prefix is removed only if more names are a LLaVA's without it.
    """
    short = {name: _WRAPPERS.sub("", name) for name in names}

    def known(prefix: str) -> int:
        hubs = (hub_name(name.removeprefix(prefix)) for name in short.values())
        return sum(_LAYER.sub("", hub) in _PATHS or modality_of(hub) is not None for hub in hubs)

    prefixes = [""]
    for parts in zip(*(name.split(".")[:-1] for name in short.values()), strict=False):
        if len({*parts}) > 1:
            break
        prefixes.append(f"{prefixes[-1]}{parts[0]}.")
    best = max(prefixes, key=known) if len(prefixes) > 1 else ""  # max returns the first, which is the shortest
    return {name: without.removeprefix(best) for name, without in short.items()}


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of a Hugging Face checkpoint, and the parameter or slice of a parameter that it is."""

    name: str
    """Name on the hub."""
    file_shape: Shape
    path: str
    layer: int | None
    """Index on the parameter's axis 0; None if the tensor is the whole parameter."""
    shape: Shape
    """Shape of the slice, or of the whole parameter."""


def map_tensors(config: LlavaConfig, names: Mapping[str, str] | None = None) -> list[TensorMapping]:
    """Return every tensor of the checkpoint that `config` describes.

    `names` maps configured modality names to those in the file.
    """
    abstract = abstract_params(config)[1]
    mappings = []
    for rule in TENSOR_RULES:
        for modality in config.modalities if "{m}" in rule.name else (None,):
            path, name = rule.path, rule.name
            if modality is not None:
                path = path.replace("{m}", modality)
                name = name.replace("{m}", (names or {}).get(modality, modality))
            if path not in abstract:  # such as the head of a tied model
                continue
            shape = abstract[path].shape
            layers: list[int | None] = [None]
            if "{i}" in name:
                layers, shape = list(range(shape[0])), shape[1:]
            file_shape = rule.file_shape(shape, config.modalities[modality] if modality is not None else None)
            first = config.vision.num_used_layers if rule.is_unused else 0
            mappings += [
                TensorMapping(name.replace("{i}", str(first + (i or 0))), file_shape, path, i, shape) for i in layers
            ]
    return mappings
