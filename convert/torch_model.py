"""Load any checkpoint that we read into the PyTorch model of convert/modeling_umbrella.py.

It works with transformers 4.46 and 5, whose modules have different names.
"""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from convert import modeling_umbrella
from convert.architectures import torch_class
from convert.config_json import (
    CONFIG,
    read_config,
    read_hub_config,
    stored_template,
    stored_untrained,
)
from convert.export_config import hf_dict
from convert.from_hf import fingerprint, plan_loading
from convert.hub import fetch
from convert.lazy_tensor import Tensor
from convert.modeling_umbrella import TorchPatchEmbed
from convert.peft_adapter import rewrite_adapter
from convert.rules import LM_HEAD, hub_name
from convert.to_hf import hub_tensors
from umbrella_jax.config.schema import ModalityConfig, to_dict
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.llava import LlavaConfig
from umbrella_jax.models.paths import modality_of


def load_umbrella(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    modalities: Mapping[str, ModalityConfig] | None = None,
    patch_embed: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    patch_embed_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> Any:
    """Load an UMBRELLA checkpoint as `UmbrellaForConditionalGeneration`, in eval mode.

    `model(input_ids, pixel_values=volumes, ...)` and `generate` take volumes in the order of their `<image>` in the
    text, one id per patch: a tensor (n, 1, *size), or for several modalities a list with one (1, 1, *size) per volume.
    Activations have the type of the token embeddings.

    Args:
        directory: the checkpoint in Hugging Face format, or its name on the hub (`NAME` or `NAME@REVISION`); with
            `patch_embed`, the base of that file.
        dtype: type of all parameters but the patch embedding; by default the types in the file.
        modalities: required without an `umbrella_config.json`.
        patch_embed: a file of `convert to-hf --trainable-only`, or the folder of a PEFT adapter, to merge into it.
        adapter: folder of a PEFT adapter, or its name on the hub; the model is then a `peft.PeftModel`, with the patch
            embedding of the adapter if it has one. Not together with `patch_embed`.
        patch_embed_dtype: type of the patch embedding; by default float32 with a `dtype`, else the type in the file.
        device: where the parameters go, one by one.
        attn_implementation: as for `from_pretrained`: `eager`, `sdpa`, `flash_attention_2`; by default transformers'.

    Raises:
        CheckpointError: for everything that `from_hf` rejects, and for a modality without weights.
    """
    directory, patch_embed = fetch(directory), None if patch_embed is None else Path(patch_embed)
    if adapter is not None:
        if patch_embed is not None:
            raise CheckpointError(f"{adapter}: not together with the patch_embed {patch_embed}; give one of them")
        patch_embed = fetch(adapter)
    config = read_config(directory, modalities, patch_embed=patch_embed)
    plan = plan_loading(directory, config, patch_embed=patch_embed, merge_lora=adapter is None)
    if plan.summary.initialised:
        raise CheckpointError(
            [f"{directory}: modality {m}: no patch embedding in the checkpoint" for m in plan.summary.initialised]
        )
    if patch_embed is not None:
        fingerprint(directory, patch_embed)  # raises for another base
    if patch_embed_dtype is None and dtype is not None:
        patch_embed_dtype = torch.float32
    types = {False: _dtype_name(dtype), True: _dtype_name(patch_embed_dtype)}
    params = {path: tensor.astype(types[modality_of(path) is not None]) for path, tensor in plan.params().items()}
    stated: dict[str, Any] = {"template": stored_template(directory, patch_embed)}
    stated["untrained"] = stored_untrained(directory, patch_embed)
    model = umbrella_model(
        hf_dict(read_hub_config(directory), config),
        config,
        params,
        stated={key: value for key, value in stated.items() if value},
        device=device,
        attn_implementation=attn_implementation,
    )
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model if adapter is None or patch_embed is None else _with_adapter(model, patch_embed)


def _with_adapter(model: Any, adapter: Path) -> Any:
    """Return the model with an adapter, which is written anew, since it may have names of another class."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        rewrite_adapter(adapter, Path(folder))
        return PeftModel.from_pretrained(model, folder)


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def umbrella_model(
    raw: Mapping[str, Any],
    config: LlavaConfig,
    params: Mapping[str, Tensor],
    *,
    stated: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> Any:
    """Return the model of `load_umbrella` with the parameters `params`.

    Only the modalities come from `config`; transformers reads everything else from `raw`, a config.json. Raises
    CheckpointError if this version does not know the language model, or if it needs a head which is not among the
    parameters.

    Args:
        stated: further fields of umbrella_config.json, which `save_pretrained` writes again.
        device, attn_implementation: as for `load_umbrella`.
    """
    kind = getattr(modeling_umbrella, torch_class(raw["model_type"]))
    try:
        hf_config = kind.config_class.from_dict(dict(raw))
    except KeyError as error:  # such as 'qwen3' before 4.51
        why = f"transformers {transformers.__version__} does not know {error}; install a later version"
        raise CheckpointError(f"{CONFIG}: {why}") from error
    modalities = {name: to_dict(modality) for name, modality in config.modalities.items()}
    hf_config.umbrella = {**(stated or {}), "modalities": modalities}
    with torch.device("meta"):  # only the structure: nothing is allocated or initialised
        model: Any = kind._from_config(hf_config, attn_implementation=attn_implementation)
    _renew_rope(model, hf_config.text_config)

    keys = {hub_name(key): key for key in model.state_dict()}
    state = {
        keys.get(name, name): _to_torch(tensor.read()).to(device)
        for name, tensor in hub_tensors(params, config).items()
    }
    missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    assert not unknown, unknown
    assert {*missing} <= {keys[LM_HEAD]}, missing
    model.tie_weights()
    if model.get_output_embeddings().weight.is_meta:
        raise CheckpointError(f"{CONFIG}: transformers reads an untied head in it, which the weights do not have")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "left without values"
    _cast_between(model)
    return model.to(device).eval()


def _cast_between(model: Any) -> None:
    """Make each module compute in its own type and return the token embeddings' type, if they mix types."""
    words: Any = model.get_input_embeddings()
    embeddings = {inner for m in model.modules() if isinstance(m, TorchPatchEmbed) for inner in m.modules()}
    others = {*model.modules()} - embeddings  # the patch embedding has a hook of its own
    if len({parameter.dtype for module in others for parameter in module.parameters(recurse=False)}) == 1:
        return
    for module in others - {words, model.base_model}:  # which owns image_newline and does not compute with it
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
