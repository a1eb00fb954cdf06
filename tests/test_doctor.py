"""`umbrella-jax doctor`: what it finds, and that its golden step is PyTorch's."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.hf_config import read_config
from convert.tensor import Tensor
from umbrella_jax import doctor, golden
from umbrella_jax.doctor import Diagnosis, Problem
from umbrella_jax.models import abstract_params

ROOT = Path(__file__).parents[1]


def write_description(directory: Path) -> Path:
    """config.json of the golden step's model, as Hugging Face's hub holds one."""
    vision, text = golden.VISION, golden.TEXT
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": golden.CONFIG.image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_position_embeddings,
            "rope_theta": text.rope_theta,
            "rms_norm_eps": text.rms_norm_eps,
            "tie_word_embeddings": text.tie_word_embeddings,
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def torch_step(directory: Path) -> tuple[float, float]:
    """Loss and gradient norm of the golden step, in PyTorch, float64, a conversation at a time."""
    import torch

    from convert.torch_model import PatchEmbed, umbrella_model

    assert read_config(directory, golden.MODALITIES) == golden.CONFIG
    params = {path: Tensor.of(leaf) for path, leaf in golden.make_params().items()}
    model = umbrella_model(directory, golden.CONFIG, params).double()
    embeddings = next(module for module in model.modules() if isinstance(module, PatchEmbed))
    batch = golden.make_batch()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, (name, length, targets) in enumerate(zip(golden.SHOWN, golden.LENGTHS, golden.TARGETS, strict=True)):
        ids = torch.from_numpy(batch.input_ids[row : row + 1, :length]).long()
        volumes = {}
        if name is not None:
            embeddings.modality = name
            volumes = {"pixel_values": torch.from_numpy(batch.volumes[name][:, None]).double()}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **volumes).logits[0]
        supervised = slice(length - targets - 1, length - 1)
        total = total + torch.nn.functional.cross_entropy(
            logits[supervised], ids[0, length - targets :], reduction="sum"
        )
        count += targets
    loss = total / count
    gradients = torch.autograd.grad(loss, list(embeddings.parameters()))
    assert len(gradients) == 6
    return float(loss.detach()), float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())


def test_the_golden_step_is_pytorchs(tmp_path):
    loss, norm = torch_step(write_description(tmp_path))
    assert (loss, norm) == (pytest.approx(golden.LOSS, rel=1e-9), pytest.approx(golden.GRAD_NORM, rel=1e-9))


def test_draws_are_bits_of_philox():
    """As of numpy 2.4; another number here, and the golden values are of another model."""
    assert golden._Draws(0).integers(1000, 4).tolist() == [259, 458, 49, 556]
    values = golden._Draws(0).uniform((1000,), 0.5)
    assert values.dtype == np.float32
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(0.5, abs=0.02)
    assert set(golden.make_params()) == set(abstract_params(golden.CONFIG)[1])
