"""The model for PyTorch users: transformers' own LLaVA with the volume patch embedding in its tower.

It works with transformers 4.46 and 5, whose modules have different names.
"""

import math
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from convert.architectures import LAYOUTS
from convert.config_json import CONFIG, read_config, read_hub_config
from convert.export_config import hf_dict
from convert.from_hf import fingerprint, plan_loading
from convert.hub import fetch
from convert.lazy_tensor import Tensor
from convert.peft_adapter import rewrite_adapter
from convert.rules import LM_HEAD, hub_name
from convert.to_hf import hub_tensors
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.llava import LlavaConfig


class TorchPatchEmbed(nn.Module):
    """Volume patch embedding, which replaces SigLIP's `embeddings`.

    It has {m}_proj and {m}_positional_embeddings for each modality m. The shape of a volume determines its modality; if
    two modalities share a shape, set `.modality` to the name of one.
    """

    def __init__(self, modalities: Mapping[str, ModalityConfig], hidden_size: int):
        super().__init__()
        self.modalities = dict(modalities)
        self.modality: str | None = None
        for name, m in self.modalities.items():
            if len(m.patch) == 3:
                proj: nn.Module = nn.Conv3d(1, hidden_size, m.patch, stride=m.patch)
            else:
                proj = nn.Linear(m.patch_dim, hidden_size)
            nn.init.trunc_normal_(proj.weight, std=0.02)
            nn.init.zeros_(proj.bias)
            self.add_module(f"{name}_proj", proj)
            table = nn.Parameter(torch.empty(1, m.num_patches, hidden_size))
            self.register_parameter(f"{name}_positional_embeddings", nn.init.trunc_normal_(table, std=0.02))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Embed volumes (B, 1, D, H, W) or (B, 1, D, H, W, T) of one modality: (B, N, E) in the parameters' dtype.

        Raises ValueError if no modality, or more than one, has this shape.
        """
        name = self._modality_of(pixel_values)
        proj, m = getattr(self, f"{name}_proj"), self.modalities[name]
        x = pixel_values.to(proj.weight.dtype)
        x = proj(x).flatten(2).transpose(1, 2) if len(m.patch) == 3 else proj(_patchify(x[:, 0], m.patch))
        return x + getattr(self, f"{name}_positional_embeddings")

    def _modality_of(self, pixel_values: torch.Tensor) -> str:
        """Return the modality whose volumes have this shape."""
        shape = tuple(pixel_values.shape)
        found = [n for n, m in self.modalities.items() if shape[1:] == (1, *m.size) and self.modality in (None, n)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"volumes {shape} may be {' or '.join(found)}: set .modality of the patch embedding")
        known = ", ".join(f"{n} (B, 1, {', '.join(map(str, m.size))})" for n, m in self.modalities.items())
        meant = f", and .modality is {self.modality}" if self.modality else ""
        raise ValueError(f"volumes {shape}: expected {known}{meant}")


def _patchify(x: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Cut (B, *size) into patches (B, N, P), patches and their voxels in C order; a remainder at the end is cropped."""
    grid = [s // p for s, p in zip(x.shape[1:], patch, strict=True)]
    x = x[(slice(None), *(slice(g * p) for g, p in zip(grid, patch, strict=True)))]
    x = x.reshape(x.shape[0], *(n for gp in zip(grid, patch, strict=True) for n in gp))
    x = x.permute(0, *range(1, x.ndim, 2), *range(2, x.ndim, 2))
    return x.reshape(x.shape[0], math.prod(grid), math.prod(patch))


def load_umbrella(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    modalities: Mapping[str, ModalityConfig] | None = None,
    patch_embed: str | Path | None = None,
    adapter: str | Path | None = None,
) -> Any:
    """Load an UMBRELLA checkpoint as the stock class that its config.json names, in eval mode on the CPU.

    The class is `LlavaForConditionalGeneration` or `LlavaOnevisionForConditionalGeneration`.

    `model(input_ids, pixel_values=volumes, ...)` and `generate` take volumes of one modality, as
    `TorchPatchEmbed.forward` does, and one `<image>` id per patch. Activations have the type of the token embeddings.

    Args:
        directory: the checkpoint in Hugging Face format, or its name on the hub (`NAME` or `NAME@REVISION`); with
            `patch_embed`, the base of that file.
        dtype: type of all parameters; by default the types in the file.
        modalities: required without an `umbrella_config.json`.
        patch_embed: a file of `convert to-hf --trainable-only`, or the folder of a PEFT adapter, to merge into it.
        adapter: folder of a PEFT adapter, or its name on the hub; the model is then a `peft.PeftModel`, with the patch
            embedding of the adapter if it has one. Not together with `patch_embed`.

    Raises:
        CheckpointError: for everything that `from_hf` rejects, and for a modality without weights.
    """
    directory, patch_embed = fetch(directory), None if patch_embed is None else Path(patch_embed)
    if adapter is not None:
        if patch_embed is not None:
            raise CheckpointError(f"{adapter}: not together with the patch_embed {patch_embed}; give one of them")
        patch_embed = fetch(adapter)
    config = read_config(directory, modalities, patch_embed=patch_embed)
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    plan = plan_loading(directory, config, dtype=name, patch_embed=patch_embed, merge_lora=adapter is None)
    if plan.summary.initialised:
        raise CheckpointError(
            [f"{directory}: modality {m}: no patch embedding in the checkpoint" for m in plan.summary.initialised]
        )
    if patch_embed is not None:
        fingerprint(directory, patch_embed)  # raises for another base
    model = umbrella_model(hf_dict(read_hub_config(directory), config), config, plan.params(name))
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model if adapter is None or patch_embed is None else _with_adapter(model, patch_embed)


def _with_adapter(model: Any, adapter: Path) -> Any:
    """Return the model with an adapter, which is written anew, since it may have names of another class."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        rewrite_adapter(adapter, Path(folder))
        return PeftModel.from_pretrained(model, folder)


def umbrella_model(raw: Mapping[str, Any], config: LlavaConfig, params: Mapping[str, Tensor]) -> Any:
    """Return the model of `load_umbrella` with the parameters `params`.

    Only the modalities and the width of the tower come from `config`; transformers reads everything else from `raw`, a
    config.json. Raises CheckpointError if that needs a head which is not among the parameters.
    """
    # there is one placeholder per patch; with 0, transformers 4.46 never assumes one per image
    layout = LAYOUTS[raw["model_type"]]
    hf_config = getattr(transformers, f"{layout.torch_name}Config").from_dict({**raw, "image_seq_length": 0})
    with torch.device("meta"):  # only the structure: nothing is allocated or initialised
        model: Any = getattr(transformers, f"{layout.torch_name}ForConditionalGeneration")(hf_config)
        embeddings = TorchPatchEmbed(config.modalities, config.vision.hidden_size)
    base = getattr(model, "model", model)  # transformers 5 has one level more here and one less in the tower
    getattr(base.vision_tower, "vision_model", base.vision_tower).embeddings = embeddings
    _renew_rope(model, hf_config.text_config)

    tensors = {name: _to_torch(tensor.read()) for name, tensor in hub_tensors(params, config).items()}
    keys = {hub_name(key): key for key in model.state_dict()}
    missing, unknown = model.load_state_dict({keys.get(n, n): t for n, t in tensors.items()}, strict=False, assign=True)
    assert not unknown, unknown
    assert {*missing} <= {keys[LM_HEAD]}, missing
    model.tie_weights()
    if model.get_output_embeddings().weight.is_meta:
        raise CheckpointError(f"{CONFIG}: transformers reads an untied head in it, which the weights do not have")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "left without values"
    _cast_between(model, embeddings)
    if layout.image_newline:
        base.get_image_features = MethodType(_volume_features, base)  # called by `generate` of transformers 5
        model.register_forward_pre_hook(_embed_volumes, with_kwargs=True)
    return model.eval()


def _volume_features(base: Any, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
    """Return the features of volumes, one row per patch, in the place of `get_image_features` of LLaVA-OneVision.

    transformers would cut images into tiles and end the rows of their patches with `image_newline`.
    """
    layer = base.config.vision_feature_layer
    hidden = base.vision_tower(pixel_values, output_hidden_states=True).hidden_states[layer]
    features: Any = base.multi_modal_projector(hidden).flatten(0, 1)
    return BaseModelOutputWithPooling(pooler_output=(features,))


def _embed_volumes(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replace the arguments `input_ids` and `pixel_values` of a call by `inputs_embeds`.

    Raises ValueError if there are not as many placeholders as patches.
    """
    pixel_values = kwargs.pop("pixel_values", None)
    if pixel_values is None:
        return args, kwargs
    ids = args[0] if args else kwargs.pop("input_ids")
    (features,) = getattr(model, "model", model).get_image_features(pixel_values).pooler_output
    embeds, places = model.get_input_embeddings()(ids), ids == model.config.image_token_index
    if (count := int(places.sum())) != len(features):
        raise ValueError(f"{count} placeholders, but the volumes have {len(features)} patches")
    embeds = embeds.masked_scatter(places[..., None], features.to(embeds.dtype))
    return (None, *args[1:]), {**kwargs, "inputs_embeds": embeds}


def _cast_between(model: Any, embeddings: TorchPatchEmbed) -> None:
    """Make each module compute in its own type and return the token embeddings' type, if the file mixes types."""
    words: Any = model.get_input_embeddings()
    if len({parameter.dtype for parameter in model.parameters()}) == 1:
        return
    inner = {*embeddings.modules()} - {embeddings}
    owner = getattr(model, "model", model)  # of image_newline, which it does not compute with
    for module in {*model.modules()} - inner - {words, owner}:
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_to_own_type)
            module.register_forward_hook(partial(_to_type_of, words))


def _to_own_type(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _to_type_of(words: nn.Module, _: nn.Module, inputs: Any, output: Any) -> Any:
    return output.to(next(words.parameters()).dtype)


def greedy_logits(
    model: Any, modality: str, ids: np.ndarray, volume: np.ndarray, new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Generate `new_tokens` tokens greedily, whatever the model's generation config is.

    Args:
        ids: prompts [B, T], each with one volume.
        volume: [B, *size], of `modality`.

    Returns:
        The ids with the generated tokens appended, and the logits of all positions.
    """
    next(m for m in model.modules() if isinstance(m, TorchPatchEmbed)).modality = modality
    prompt, pixels = torch.from_numpy(ids), torch.from_numpy(volume[:, None])
    # transformers would use the model's own generation config here: penalties change logits, an eos ends too early
    plain = model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    with torch.no_grad():
        sequence = model.generate(
            prompt, pixel_values=pixels, attention_mask=torch.ones_like(prompt), generation_config=plain
        )
        return sequence.numpy(), model(sequence, pixel_values=pixels).logits.numpy()


def _renew_rope(model: nn.Module, config: Any) -> None:
    """Compute the rope tables: checkpoints do not contain them, and modules made on the meta device have no values."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=config))


def _to_torch(array: np.ndarray) -> torch.Tensor:
    """Return the array as a torch tensor without copying; torch does not know NumPy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
