# Copyright 2026 The umbrella-jax authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""UMBRELLA in PyTorch: a LLaVA that sees brain MRI, through a patch embedding of volumes in place of that of images.

    processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)  # processing_umbrella.py
    model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)
    inputs = processor("What is the sex of this subject?", [("T1", "scan.nii.gz")])
    tokens = model.generate(**inputs, max_new_tokens=16)
    print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :]))

umbrella-jax writes this file into exports. It needs only torch and transformers, 4.46 or later.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial, wraps
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaOnevisionConfig, PreTrainedModel

try:
    from transformers import conversion_mapping
except ImportError:  # transformers 4
    pass
else:  # transformers 5 renames the tensors of a file for its own classes only
    for _name in ("UmbrellaForConditionalGeneration", "UmbrellaOnevisionForConditionalGeneration"):
        conversion_mapping.register_checkpoint_conversion_mapping(
            _name, conversion_mapping.get_checkpoint_conversion_mapping("llava"), overwrite=True
        )

_KEEPS_FLOAT32 = hasattr(PreTrainedModel, "_keep_in_fp32_modules_strict")
"""Whether this version of transformers can load a float32 module of a bfloat16 model in every way."""


class TorchPatchEmbed(nn.Module):
    """Volume patch embedding, which replaces SigLIP's `embeddings`.

    It has {m}_proj and {m}_positional_embeddings for each modality m. The shape of a volume determines its modality; if
    two modalities share a shape, set `.modality` to the name of one.
    """

    def __init__(self, modalities: Mapping[str, Mapping[str, Any]], hidden_size: int):
        super().__init__()
        self.modalities = {name: (tuple(m["size"]), tuple(m["patch"])) for name, m in modalities.items()}
        self.modality: str | None = None
        for name, (size, patch) in self.modalities.items():
            if len(patch) == 3:
                proj: nn.Module = nn.Conv3d(1, hidden_size, patch, stride=patch)
            else:
                proj = nn.Linear(math.prod(patch), hidden_size)
            table = nn.Parameter(torch.empty(1, _num_patches(size, patch), hidden_size))
            nn.init.trunc_normal_(proj.weight, std=0.02)
            nn.init.zeros_(proj.bias)
            nn.init.trunc_normal_(table, std=0.02)
            self.add_module(f"{name}_proj", proj)
            self.register_parameter(f"{name}_positional_embeddings", table)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Embed volumes (B, 1, D, H, W) or (B, 1, D, H, W, T) of one modality: (B, N, E) in the parameters' dtype.

        Raises ValueError if no modality, or more than one, has this shape.
        """
        name = self._modality_of(pixel_values)
        proj, (_, patch) = getattr(self, f"{name}_proj"), self.modalities[name]
        x = pixel_values.to(proj.weight.device, proj.weight.dtype)
        x = proj(x).flatten(2).transpose(1, 2) if len(patch) == 3 else proj(_patchify(x[:, 0], patch))
        return x + getattr(self, f"{name}_positional_embeddings")

    def num_patches(self, volumes: torch.Tensor) -> int:
        """Return the number of patches N of each of these volumes. Raises ValueError as `forward`."""
        return _num_patches(*self.modalities[self._modality_of(volumes)])

    def _modality_of(self, pixel_values: torch.Tensor) -> str:
        """Return the modality whose volumes have this shape."""
        shape = tuple(pixel_values.shape)
        fits = [m for m, (size, _) in self.modalities.items() if shape[1:] == (1, *size) and self.modality in (None, m)]
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise ValueError(f"volumes {shape} may be {' or '.join(fits)}: set .modality of the patch embedding")
        known = ", ".join(f"{m} (B, 1, {', '.join(map(str, size))})" for m, (size, _) in self.modalities.items())
        meant = f", and .modality is {self.modality}" if self.modality else ""
        raise ValueError(f"volumes {shape}: expected {known}{meant}")


def _num_patches(size: tuple[int, ...], patch: tuple[int, ...]) -> int:
    return math.prod(s // p for s, p in zip(size, patch, strict=True))


def _patchify(x: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Cut (B, *size) into patches (B, N, P), patches and their voxels in C order; a remainder at the end is cropped."""
    grid = [s // p for s, p in zip(x.shape[1:], patch, strict=True)]
    x = x[(slice(None), *(slice(g * p) for g, p in zip(grid, patch, strict=True)))]
    x = x.reshape(x.shape[0], *(n for gp in zip(grid, patch, strict=True) for n in gp))
    x = x.permute(0, *range(1, x.ndim, 2), *range(2, x.ndim, 2))
    return x.reshape(x.shape[0], math.prod(grid), math.prod(patch))


class UmbrellaForConditionalGeneration(LlavaForConditionalGeneration):
    """A LLaVA that sees volumes, in the order of their `<image>` in the text, one row after the other.

    `pixel_values` is a tensor (n, 1, *size) with volumes of one modality, or a list with one tensor (1, 1, *size) per
    volume. Raises ValueError if the volumes of a row have not as many patches as the row has `<image>`.

    `config.umbrella` describes the modalities. The patch embedding has the type `config.patch_embed_dtype`, float32
    unless you ask for another: `from_pretrained(DIR, dtype=torch.bfloat16, patch_embed_dtype="bfloat16")`.
    """

    _keep_in_fp32_modules_strict: Any = ("embeddings",)
    _supports_param_buffer_assignment = False  # 4.46 would give all parameters the types of the file

    def __init__(self, config: Any):
        if not hasattr(config, "umbrella"):
            raise ValueError("config.json describes no volumes (umbrella); use LlavaForConditionalGeneration")
        config.image_seq_length = 0  # else 4.46 may take one <image> for all patches of a volume
        config.patch_embed_dtype = str(getattr(config, "patch_embed_dtype", "float32")).removeprefix("torch.")
        super().__init__(config)
        embeddings = TorchPatchEmbed(config.umbrella["modalities"], config.vision_config.hidden_size)
        embeddings.to(getattr(torch, config.patch_embed_dtype))
        if config.patch_embed_dtype != "float32":
            self._keep_in_fp32_modules_strict = set()
        elif self.device.type == "meta" and torch.get_default_dtype() != torch.float32 and not _KEEPS_FLOAT32:
            torch.set_default_dtype(torch.float32)  # after an error, 4.46 would leave it for all later models
            raise ValueError(
                f"transformers {transformers.__version__} would round the float32 patch embedding: leave out "
                "device_map and low_cpu_mem_usage, ask for patch_embed_dtype, or install transformers 5"
            )
        tower = getattr(self.base_model.vision_tower, "vision_model", self.base_model.vision_tower)
        del tower.embeddings  # the new ones come last: transformers takes the first parameter's type for the model's
        tower.embeddings = embeddings
        embeddings.register_forward_hook(partial(_to_type_of, tower.encoder.layers[0].layer_norm1))

    @wraps(LlavaForConditionalGeneration.forward)  # Trainer and generate look at the signature
    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        if pixel_values is not None:
            rows = self._volumes_of_rows(input_ids, pixel_values)
            volumes = [v for row in rows for v in row] if isinstance(pixel_values, list | tuple) else [pixel_values]
            words = self.get_input_embeddings()(input_ids)
            features = torch.cat([self._features(v) for v in volumes]).to(words)
            shown = (input_ids == self.config.image_token_index)[..., None].expand_as(words)
            kwargs["inputs_embeds"] = words.masked_scatter(shown, features)
            input_ids = None
        return super().forward(input_ids=input_ids, **kwargs)

    def _volumes_of_rows(self, input_ids: Any, pixel_values: Any) -> list[list[torch.Tensor]]:
        """Return the volumes (1, 1, *size) of each row of `input_ids`."""
        if input_ids is None:
            raise ValueError("pixel_values need input_ids, whose <image> they replace, not inputs_embeds")
        stacks = pixel_values if isinstance(pixel_values, list | tuple) else [pixel_values]
        if len(stacks) > 1 and any(len(stack) != 1 for stack in stacks):
            shapes = ", ".join(str(tuple(stack.shape)) for stack in stacks)
            raise ValueError(f"pixel_values: {shapes}; a list has one (1, 1, *size) per volume, in the text's order")
        volumes = [volume[None] for stack in stacks for volume in stack]
        embeddings = next(module for module in self.modules() if isinstance(module, TorchPatchEmbed))
        patches = [embeddings.num_patches(volume) for volume in volumes]
        wanted = (input_ids == self.config.image_token_index).sum(1).tolist()
        ends = [0, *accumulate(patches)]  # index: number of volumes, value: their patches
        totals = list(accumulate(wanted))
        if totals[-1] != ends[-1] or not {*totals} <= {*ends}:
            counts, sizes = (", ".join(map(str, numbers)) for numbers in (wanted, patches))
            raise ValueError(f"rows with {counts} <image>, but volumes, in the same order, with {sizes} patches")
        starts = [ends.index(total) for total in (0, *totals)]
        return [volumes[start:end] for start, end in pairwise(starts)]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Repeat the rows for beams, with all volumes of a row together; transformers would repeat each volume."""
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and input_ids is not None and expand_size > 1:
            rows = self._volumes_of_rows(input_ids, pixel_values)
            volumes = [volume for row in rows for _ in range(expand_size) for volume in row]
            pixel_values = volumes if isinstance(pixel_values, list | tuple) else torch.cat(volumes)
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**kwargs, "pixel_values": pixel_values}

    def _supports_mm_encoder_outputs(self) -> bool:
        """Return that `generate` of transformers 5 leaves the volumes to `forward`, which takes a list."""
        return False

    def _features(self, volumes: torch.Tensor) -> torch.Tensor:
        """Return the projected features of volumes (B, 1, *size) of one modality, (B * N, E)."""
        layer, strategy = self.config.vision_feature_layer, self.config.vision_feature_select_strategy
        output = self.get_image_features(
            pixel_values=volumes, vision_feature_layer=layer, vision_feature_select_strategy=strategy
        )
        return torch.cat(list(getattr(output, "pooler_output", output)))  # 4.46 returns them, 5 an output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens as transformers does. Raises ValueError for volumes if weights that see them are untrained.

        `config.umbrella["untrained"]` names these. Weights that PEFT replaces (`modules_to_save`) count as trained.
        """
        volumes = kwargs.get("pixel_values")
        if volumes is not None and self.config.umbrella.get("untrained"):
            self._check_trained(volumes if isinstance(volumes, list | tuple) else [volumes])
        return super().generate(*args, **kwargs)

    def _check_trained(self, stacks: Sequence[torch.Tensor]) -> None:
        embeddings = next(module for module in self.modules() if isinstance(module, TorchPatchEmbed))
        seen_by: dict[str, nn.Module] = {embeddings._modality_of(stack): embeddings for stack in stacks}
        seen_by["projector"] = self.base_model.multi_modal_projector
        wrappers = [m for m in self.modules() if getattr(m, "modules_to_save", None) and not m.disable_adapters]
        replaced = {inner for wrapper in wrappers for inner in wrapper.modules()}
        untrained = self.config.umbrella["untrained"]
        if names := [name for name in seen_by if name in untrained and seen_by[name] not in replaced]:
            reasons = "; ".join(f"{name}: {untrained[name]}" for name in names)
            raise ValueError(
                f"{reasons}: answers would mean nothing. Once these weights are trained, or to generate all the same, "
                'remove the record: model.config.umbrella.pop("untrained")'
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load parameters under their own names, or under those of the files that `save_pretrained` writes.

        Trainer in transformers 5 resumes from such a file, and would leave out every tensor.
        """
        own = {_without_models(name): name for name in self.state_dict()}
        named = {own.get(_without_models(name), name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(named, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model with this file, and umbrella_config.json, which umbrella-jax reads."""
        super().save_pretrained(save_directory, *args, **kwargs)
        text = json.dumps(self.config.umbrella, indent=2) + "\n"
        Path(save_directory, "umbrella_config.json").write_text(text, encoding="utf-8")


class UmbrellaOnevisionForConditionalGeneration(UmbrellaForConditionalGeneration):
    """The same on LLaVA-OneVision, whose `image_newline` is kept; only tiles of images use it, not volumes."""

    config_class = LlavaOnevisionConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.base_model.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))


def _without_models(name: str) -> str:
    """Return the name of a parameter without the models that contain it, whose names differ between versions."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "vision_model"))


def _to_type_of(norm: nn.Module, _: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(norm.weight.dtype)


UmbrellaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
UmbrellaOnevisionForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
