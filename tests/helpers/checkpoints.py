"""Write small random checkpoints with the installed transformers, for tests to read.

Every parameter is random, biases and norms included, and all dimensions differ, so swaps and transpositions show.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from convert.torch_model import TorchPatchEmbed
from umbrella_jax.config.schema import ModalityConfig

ROOT = Path(__file__).parents[2]
IMAGE_ID = 320
MODALITIES: dict[str, ModalityConfig] = {
    "T1": ModalityConfig(size=(11, 9, 7), patch=(5, 3, 2)),  # 2·3·3 = 18 patches; 1, 0 and 1 voxels cropped
    "rsfMRI": ModalityConfig(size=(8, 6, 5, 7), patch=(4, 3, 5, 3)),  # 2·2·1·2 = 8 patches; 1 frame cropped
}
FAMILIES = (("T1", "rsfMRI"), ("sMRI", "fMRI"))


def folder_of_transformers_4_46() -> str:
    """Return the folder with transformers 4.46.3.

    Skip if that version is missing: only scripts/test.sh installs it, into a folder of its own, since one environment
    cannot have two versions. Under CI its absence is a failure.
    """
    target = os.environ.get("UMBRELLA_TRANSFORMERS_446")
    if not target and os.environ.get("CI") != "true":
        pytest.skip("UMBRELLA_TRANSFORMERS_446 is not set: scripts/test.sh installs transformers 4.46.3 and sets it")
    assert target, "CI must run this: UMBRELLA_TRANSFORMERS_446 is to name a folder with transformers 4.46.3"
    return target


def under_transformers_4_46(*words: object) -> None:
    """Run `python WORDS` from the root with transformers 4.46.3 instead of the installed one; it must succeed."""
    target = folder_of_transformers_4_46()
    run = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([target, str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def siglip(**fields: Any) -> SiglipVisionConfig:
    """Return a SigLIP 36 wide (3 heads, 2 layers), with `fields` changed."""
    sizes = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3}
    return SiglipVisionConfig(**sizes | {"image_size": 28, "patch_size": 7, "vision_use_head": False} | fields)


TEXT = {
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""Fields of a language model 48 wide (6 heads, 3 layers), with 331 words."""


def llava(text: PreTrainedConfig, vision: PreTrainedConfig | None = None, **fields: Any) -> LlavaConfig:
    """Return a LLaVA of a language model and a tower, by default a SigLIP of 3 layers whose last does not run."""
    own = {"image_token_index": IMAGE_ID, "vision_feature_layer": -2, "vision_feature_select_strategy": "full"}
    tied, vision = text.tie_word_embeddings, vision or siglip(num_hidden_layers=3)
    return LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **own | fields)


BASES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: llava(Qwen2Config(**TEXT)),
    "qwen3": lambda: llava(Qwen3Config(**TEXT | {"head_dim": 10})),  # queries 60 wide
    "qwen3-siglip2": lambda: llava(
        Qwen3Config(
            **TEXT
            | {"head_dim": 6, "num_key_value_heads": 6, "tie_word_embeddings": False, "rms_norm_eps": 1e-3}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
        ),
        siglip(hidden_size=40, num_attention_heads=5, patch_size=16, image_size=48, layer_norm_eps=1e-3),
    ),
    "qwen2-untied": lambda: llava(Qwen2Config(**TEXT | {"num_key_value_heads": 6, "tie_word_embeddings": False})),
    "onevision": lambda: LlavaOnevisionConfig(
        vision_config=siglip(), text_config=Qwen2Config(**TEXT), image_token_index=IMAGE_ID, video_token_index=321
    ),
    "last-layer": lambda: llava(Qwen2Config(**TEXT), siglip(), vision_feature_layer=-1),
    "first-layer": lambda: llava(Qwen2Config(**TEXT), siglip(num_hidden_layers=4), vision_feature_layer=1),
}
"""{name: makes transformers' own config of a base}: layouts, towers and language models that are supported.

Over all of them run tests/models/test_live.py and the round trips of tests/convert/test_round_trip.py.
"""
QUICK_BASES = ("qwen3",)
"""Bases that cover the others: of the longer tests, the default suite runs only these."""
EACH_BASE = [pytest.param(name, marks=() if name in QUICK_BASES else pytest.mark.slow) for name in BASES]


def make_model(base: str = "qwen2", *, tied: bool | None = None, dtype: str = "float32", seed: int = 0) -> Any:
    """Return a stock model of `BASES` in PyTorch; `tied` replaces whether its head is."""
    config = BASES[base]()
    if tied is not None:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config)
    randomise(model, seed)
    return model.to(getattr(torch, dtype)).eval()


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Draw every parameter from a normal distribution with std 0.1, the weights of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p += 1


def save(model: Any, directory: Path, shards: int = 1) -> None:
    """Write `model` in the hub's layout, which is transformers 4.46's; tensors are dealt to shards in turn.

    `save_pretrained` would not do: transformers 5 writes `vision_tower.encoder` for a model that it made itself, and
    `vision_tower.vision_model.encoder` for one that it loaded.
    """
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            if not model.config.tie_word_embeddings:
                tensors["language_model.lm_head.weight"] = tensor
        elif name.startswith("model.language_model."):
            tensors["language_model.model." + name.removeprefix("model.language_model.")] = tensor
        elif name.startswith("model.vision_tower."):
            tensors["vision_tower.vision_model." + name.removeprefix("model.vision_tower.")] = tensor
        else:
            tensors[name.removeprefix("model.")] = tensor
    names = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        save_file({n: tensors[n].contiguous() for n in names[i::shards]}, directory / file, metadata={"format": "pt"})


def write_stock(
    directory: str | Path,
    base: str = "qwen2",
    *,
    tied: bool | None = None,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
) -> Any:
    """Write a stock checkpoint, with SigLIP's 2D embedding; return the torch model."""
    model = make_model(base, tied=tied, dtype=dtype, seed=seed)
    save(model, Path(directory), shards)
    return model


def write_umbrella(
    directory: str | Path,
    base: str = "qwen2",
    *,
    tied: bool | None = None,
    dtype: str = "float32",
    modalities: Mapping[str, ModalityConfig] = MODALITIES,
    names: Sequence[str] | None = None,
    umbrella_config: bool = True,
    shards: int = 1,
    seed: int = 0,
) -> Any:
    """Write a checkpoint with the volume patch embedding; return the torch model.

    `names` renames the modalities one by one; without `umbrella_config` there is no umbrella_config.json, as in
    checkpoints of the original system.
    """
    directory = Path(directory)
    if names is not None:
        modalities = dict(zip(names, modalities.values(), strict=True))
    model = make_model(base, tied=tied, dtype=dtype, seed=seed)
    embeddings = TorchPatchEmbed(
        {name: asdict(m) for name, m in modalities.items()}, model.config.vision_config.hidden_size
    )
    randomise(embeddings, seed + 1)
    model.model.vision_tower.embeddings = embeddings.to(model.dtype)
    save(model, directory, shards)
    if umbrella_config:
        data = {"modalities": {name: asdict(m) for name, m in modalities.items()}}
        (directory / "umbrella_config.json").write_text(json.dumps(data))
    return model
