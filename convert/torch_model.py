"""The model for PyTorch users: transformers' own LLaVA with the volume patch embedding in its tower.

The only file that imports torch. It works with transformers 4.46 and 5, whose modules have different names.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from convert.config_json import CONFIG, read_config, read_json
from convert.export_config import hf_dict
from convert.from_hf import fingerprint, plan_loading
from convert.lazy_tensor import Tensor
from convert.rules import LM_HEAD, hub_name
from convert.to_hf import hub_tensors
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.llava import LlavaConfig


class PatchEmbed(nn.Module):
    """Takes the place of SigLIP's `embeddings`: {m}_proj and {m}_positional_embeddings for each modality m.

    A volume's shape says its modality; where two modalities share a shape, set `.modality` to the name meant.
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
        """Volumes (B, 1, D, H, W) or (B, 1, D, H, W, T) of one modality → (B, N, E) in the parameters' dtype.

        Raises ValueError for a shape that no modality, or more than one, has.
        """
        name = self._modality_of(pixel_values)
        proj, m = getattr(self, f"{name}_proj"), self.modalities[name]
        x = pixel_values.to(proj.weight.dtype)
        x = proj(x).flatten(2).transpose(1, 2) if len(m.patch) == 3 else proj(_patchify(x[:, 0], m.patch))
        return x + getattr(self, f"{name}_positional_embeddings")

    def _modality_of(self, pixel_values: torch.Tensor) -> str:
        """The modality whose volumes have this shape."""
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
    """(B, *size) → (B, N, P), patches and the voxels within one in C order; a remainder at the high end is cropped."""
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
) -> Any:
    """The stock `LlavaForConditionalGeneration` of an UMBRELLA checkpoint, in eval mode on the CPU.

    `model(input_ids, pixel_values=volumes, ...)` and `generate` take volumes of one modality, as `PatchEmbed.forward`
    does, and one `<image>` id for each of their patches. Parameters have the types of the file, or all of them `dtype`;
    activations have the type of the token embeddings. `modalities` are needed without an `umbrella_config.json`;
    `patch_embed` is a file of `convert to-hf --trainable-only`, and `directory` then the base that it was trained on.

    Raises CheckpointError for all that `from_hf` refuses, and for a modality without weights.
    """
    directory, patch_embed = Path(directory), None if patch_embed is None else Path(patch_embed)
    config = read_config(directory, modalities, patch_embed=patch_embed)
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    plan = plan_loading(directory, config, dtype=name, patch_embed=patch_embed)
    if plan.summary.started:
        raise CheckpointError(
            [f"{directory}: modality {m}: no patch embedding in the checkpoint" for m in plan.summary.started]
        )
    if patch_embed is not None:
        fingerprint(directory, patch_embed)  # refuses another base
    model = umbrella_model(hf_dict(read_json(directory / CONFIG), config), config, plan.params(name))
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


def umbrella_model(raw: Mapping[str, Any], config: LlavaConfig, params: Mapping[str, Tensor]) -> Any:
    """Return the model of `load_umbrella`, with parameters from anywhere.

    Of `config`, only the modalities and the width of the tower are used: all else is what transformers reads in `raw`,
    a config.json. Raises CheckpointError if that needs a head which is not among the parameters.
    """
    # placeholders are always one per patch: with 0, 4.46 never takes them for one per image
    hf_config = transformers.LlavaConfig.from_dict({**raw, "image_seq_length": 0})
    with torch.device("meta"):  # structure only: nothing is allocated, nothing initialised
        model: Any = transformers.LlavaForConditionalGeneration(hf_config)
        embeddings = PatchEmbed(config.modalities, config.vision.hidden_size)
    base = getattr(model, "model", model)  # transformers 5 has one more level there, and none in the tower
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
    return model.eval()


def _cast_between(model: Any, embeddings: PatchEmbed) -> None:
    """Let each module compute in its own type and hand on the token embeddings' type, whatever types the file mixes."""
    words: Any = model.get_input_embeddings()
    if len({parameter.dtype for parameter in model.parameters()}) == 1:
        return
    inner = {*embeddings.modules()} - {embeddings}
    for module in {*model.modules()} - inner - {words}:
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
    """`ids` [B, T] with one volume [B, *size] each → ids with the greedy tokens after them, and all logits.

    Tokens are the likeliest ones, as many as asked for, whatever the model's generation config says.
    """
    next(m for m in model.modules() if isinstance(m, PatchEmbed)).modality = modality
    prompt, pixels = torch.from_numpy(ids), torch.from_numpy(volume[:, None])
    # what the base's own says, transformers would fill in here: penalties change logits, an eos ends too early
    plain = model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    with torch.no_grad():
        sequence = model.generate(
            prompt, pixel_values=pixels, attention_mask=torch.ones_like(prompt), generation_config=plain
        )
        return sequence.numpy(), model(sequence, pixel_values=pixels).logits.numpy()


def _renew_rope(model: nn.Module, config: Any) -> None:
    """Computes the rope tables, which no checkpoint holds and the meta device left without values."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=config))


def _to_torch(array: np.ndarray) -> torch.Tensor:
    """The same bytes; torch does not know numpy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
