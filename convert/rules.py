"""Which tensor of a Hugging Face checkpoint is which JAX parameter: one table, read in both directions.

A parameter's path is the hub's name of the tensor without the layer's number, since layers are stacked on axis 0.
The only other difference is a shape, so each row's operation is a reshape, and its inverse the reshape back.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.models.llava import LlavaConfig, abstract_params
from umbrella_jax.models.paths import EMBEDDINGS, LANGUAGE_MODEL, PROJECTOR, VISION_MODEL, modality_of

Shape = tuple[int, ...]
Op = Callable[[Shape, ModalityConfig | None], Shape]
"""Shape of one layer's parameter → shape of its tensor in the file."""


def _identity(shape: Shape, modality: ModalityConfig | None) -> Shape:
    return shape


def _patch_kernel(shape: Shape, modality: ModalityConfig | None) -> Shape:
    """[E, P], which PyTorch holds as a Conv3d kernel (E, 1, pd, ph, pw) in 3D and as it is in 4D."""
    assert modality is not None
    return (shape[0], 1, *modality.patch) if len(modality.patch) == 3 else shape


@dataclass(frozen=True)
class TensorRule:
    """A tensor's name on the hub, with {i} for a layer's number and {m} for a modality, and its operation."""

    torch: str
    op: Op = _identity

    @property
    def path(self) -> str:
        """The JAX parameter's path, {m} still in it."""
        return self.torch.replace(".{i}", "")


_QWEN = LANGUAGE_MODEL + "model."
EMBED = _QWEN + "embed_tokens.weight"
LM_HEAD = LANGUAGE_MODEL + "lm_head.weight"

TENSOR_RULES: tuple[TensorRule, ...] = (
    TensorRule(EMBED),
    TensorRule(_QWEN + "layers.{i}.input_layernorm.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.q_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.q_proj.bias"),
    TensorRule(_QWEN + "layers.{i}.self_attn.k_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.k_proj.bias"),
    TensorRule(_QWEN + "layers.{i}.self_attn.v_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.self_attn.v_proj.bias"),
    TensorRule(_QWEN + "layers.{i}.self_attn.o_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.post_attention_layernorm.weight"),
    TensorRule(_QWEN + "layers.{i}.mlp.gate_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.mlp.up_proj.weight"),
    TensorRule(_QWEN + "layers.{i}.mlp.down_proj.weight"),
    TensorRule(_QWEN + "norm.weight"),
    TensorRule(LM_HEAD),  # untied only
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

# SigLIP's embedding of 2D images: a stock checkpoint has it, and the volume patch embedding takes its place.
REPLACED: frozenset[str] = frozenset(
    EMBEDDINGS + name
    for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight", "position_ids")
)

_LAYOUTS = [  # other layouts' names → the hub's
    (re.compile(r"^model\.language_model\."), _QWEN),  # transformers 4.5x and 5 in memory
    (re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.)"), ""),
    (re.compile(r"^lm_head\."), LANGUAGE_MODEL + "lm_head."),
    (re.compile(r"^vision_tower\.(?!vision_model\.)"), VISION_MODEL),  # transformers 5 has no `vision_model`
    # older UMBRELLA code put the volume patch embedding in place of the convolution only
    (re.compile(r"(?<=\.embeddings\.)patch_embedding\.(?=\w+_(?:proj\.|positional_embeddings$))"), ""),
]


def hub_name(name: str) -> str:
    """The hub's name of a tensor that any version of transformers names; other names come back unchanged."""
    for pattern, replacement in _LAYOUTS:
        name = pattern.sub(replacement, name)
    return name


# What wrappers around a module put into the names of its parameters: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"(?<=\.layers\.)\d+\.")
_PATHS = frozenset(row.path for row in TENSOR_RULES) | REPLACED


def unwrapped_names(names: Collection[str]) -> dict[str, str]:
    """Return {name: the same without what wrappers put into it}.

    That is `_orig_mod.` and the like anywhere, and a prefix of all names, such as `module.` (DDP) or
    `base_model.model.` (PEFT), if more of them are those of a LLaVA without it.
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
    best = max(prefixes, key=known) if len(prefixes) > 1 else ""  # the first of several, which is the shortest
    return {name: without.removeprefix(best) for name, without in short.items()}


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of a checkpoint and its place among the parameters."""

    name: str
    """Name in the hub's layout."""
    file_shape: Shape
    path: str
    layer: int | None
    """Index on the parameter's axis 0; None where the tensor is the whole parameter."""
    shape: Shape
    """Shape of that slice, or of the whole."""


def map_tensors(config: LlavaConfig, names: Mapping[str, str] | None = None) -> list[TensorMapping]:
    """Every tensor of the checkpoint that `config` describes, modalities under `names` (configured → in the file)."""
    abstract = abstract_params(config)[1]
    found = []
    for row in TENSOR_RULES:
        for modality in config.modalities if "{m}" in row.torch else (None,):
            path, name = row.path, row.torch
            if modality is not None:
                path = path.replace("{m}", modality)
                name = name.replace("{m}", (names or {}).get(modality, modality))
            if path not in abstract:  # the head of a tied model
                continue
            shape = abstract[path].shape
            layers: list[int | None] = [None]
            if "{i}" in name:
                layers, shape = list(range(shape[0])), shape[1:]
            file_shape = row.op(shape, config.modalities[modality] if modality is not None else None)
            found += [TensorMapping(name.replace("{i}", str(i)), file_shape, path, i, shape) for i in layers]
    return found
