"""Two layers at the widths of LLaVA-Qwen 7B: conversion and back gives the same files, logits are PyTorch's."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

import umbrella_jax
from convert.rules import hub_name
from convert.safetensors_files import open_checkpoint, weights_digest
from convert.torch_model import TorchPatchEmbed
from tests.helpers import small_run
from tests.helpers.golden_case import relative
from tests.helpers.small_run import umbrella
from umbrella_jax import Batch
from umbrella_jax.config.schema import ModalityConfig, to_dict
from umbrella_jax.models import merge, split

pytestmark = pytest.mark.slow

T1 = ModalityConfig(size=(96, 96, 96), patch=(16, 16, 16))
VOCABULARY, IMAGE_ID = 2000, 1999


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write about 450 M random bfloat16 numbers in shards, as transformers does; no parameter is constant."""
    directory = tmp_path_factory.mktemp("large")
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        tie_word_embeddings=False,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
        model.model.vision_tower.embeddings = TorchPatchEmbed({"T1": to_dict(T1)}, 1152)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.02 if p.ndim == 2 or "proj" in name else 0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p += 1
    model.save_pretrained(directory, max_shard_size="300MB")
    (directory / "umbrella_config.json").write_text(json.dumps({"modalities": {"T1": asdict(T1)}}))
    return directory


def test_bit_for_bit(base: Path, tmp_path: Path) -> None:
    modalities = {"T1": {"size": list(T1.size), "patch": list(T1.patch)}}
    config = small_run.write_config(tmp_path / "run.yaml", {"model": {"modalities": modalities}})
    printed = umbrella("convert", "from-hf", base, tmp_path / "native", "--config", config, "--check-finite")
    assert "initialised" not in printed
    umbrella("convert", "to-hf", tmp_path / "native", tmp_path / "out", "--max-shard-size", "200MB")
    theirs = {hub_name(name): tensor for name, tensor in open_checkpoint(base).items()}
    ours = open_checkpoint(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert {t.dtype for t in ours.values()} == {"bfloat16"}
    assert weights_digest(ours) == weights_digest(theirs)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > len(list(base.glob("*.safetensors"))) > 1


def test_logits(base: Path) -> None:
    patches = T1.num_patches
    ids = np.array([[5, 17, *[IMAGE_ID] * patches, *range(100, 140)]], np.int32)
    volume = np.random.default_rng(1).normal(size=(1, *T1.size)).astype(np.float32)
    expected = torch_logits(base, ids, volume)
    length = ids.shape[1]
    feature_idx = np.full(ids.shape, -1, np.int32)
    feature_idx[ids == IMAGE_ID] = np.arange(patches)
    none = np.zeros((1, 1), np.int32)
    batch = Batch(
        input_ids=ids,
        positions=np.arange(length, dtype=np.int32)[None],
        feature_idx=feature_idx,
        lengths=np.array([length], np.int32),
        target_pos=none,
        target_ids=none,
        target_mask=none.astype(bool),
        volumes={"T1": volume},
    )
    ours = logits(*split(umbrella_jax.load(base, dtype="float32")), batch)[0]
    assert ours.shape == expected.shape == (length, VOCABULARY)
    assert relative(ours, expected) <= 1e-4
    without = replace(batch, volumes={"T1": volume[:, ::-1].copy()})
    other = logits(*split(umbrella_jax.load(base, dtype="float32")), without)[0]
    assert relative(other, expected) > 1e-2, "what the volume holds is seen"


@partial(jax.jit, static_argnums=0)
def logits(graphdef: Any, params: Any, batch: Batch) -> jax.Array:
    return merge(graphdef, params)(batch)


def torch_logits(base: Path, ids: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """The logits are those of transformers' own model, with its embeddings replaced before loading."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(base))
        model.model.vision_tower.embeddings = TorchPatchEmbed({"T1": to_dict(T1)}, 1152)
    names = {hub_name(name): name for name in model.state_dict()}
    state = {
        names[hub_name(name)]: tensor.float()
        for file in base.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    rotary = model.model.language_model
    rotary.rotary_emb = type(rotary.rotary_emb)(config=rotary.config)  # empty on the meta device, and not in the file
    with torch.no_grad():
        outputs = model.eval()(input_ids=torch.from_numpy(ids).long(), pixel_values=torch.from_numpy(volume)[:, None])
    return outputs.logits[0].numpy()
