"""LLaVA-OneVision: what its layout has and other LLaVAs do not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert.config_json import read_config, read_titles
from convert.from_hf import load_params
from convert.to_hf import export
from convert.torch_model import load_umbrella
from convert.verify import compare_reading
from tests.helpers.checkpoints import IMAGE_ID, MODALITIES, write_stock, write_umbrella
from tests.helpers.small_run import make_world, umbrella
from umbrella_jax.errors import CheckpointError

TOWER = {"hidden_size": 36, "num_attention_heads": 3, "vision_use_head": False}
STATED: dict[str, object] = {"model_type": "llava_onevision", "text_config": {}, "vision_config": TOWER}


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        ({}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),  # the hub's 0.5b
        ({"tie_word_embeddings": True}, True),
    ],
)
def test_absent_fields_and_ties_are_read_as_transformers_does(
    tmp_path: Path, change: dict[str, object], tied: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(STATED | change))
    config = read_config(tmp_path, MODALITIES)
    assert compare_reading(tmp_path, config, grown=False) == []
    assert (config.image_token_id, config.text.tie_word_embeddings, config.image_newline) == (151646, tied, True)
    assert read_titles(tmp_path) == ("SigLIP", "Qwen2")


def test_volumes_reach_transformers_own_modules_without_tiles(tmp_path: Path) -> None:
    """The modules are those of `LlavaOnevisionForConditionalGeneration`, put together by hand."""
    stock, model = write_umbrella(tmp_path, "onevision"), load_umbrella(tmp_path)
    assert type(stock).__name__ == "LlavaOnevisionForConditionalGeneration"
    ids = torch.tensor([[5, *[IMAGE_ID] * 18, 7]])
    volume = torch.randn(1, 1, 11, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = stock.model.vision_tower(volume, output_hidden_states=True).hidden_states[-1]
        words = stock.get_input_embeddings()(ids)
        embeds = torch.cat([words[:, :1], stock.model.multi_modal_projector(hidden), words[:, -1:]], 1)
        expected = stock(inputs_embeds=embeds).logits
        torch.testing.assert_close(model(ids, pixel_values=volume).logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(model.state_dict()["model.image_newline"], stock.model.image_newline)


def test_export_of_mixed_types_gives_its_numbers_in_pytorch(tmp_path: Path) -> None:
    """The patch embedding is float32, as after training, and the rest bfloat16."""
    write_stock(tmp_path / "base", "onevision", dtype="bfloat16")
    config = read_config(tmp_path / "base", MODALITIES)
    export(tmp_path / "out", load_params(tmp_path / "base", config)[0], config, tmp_path / "base")
    model, exact = (load_umbrella(tmp_path / "out", dtype) for dtype in (None, torch.float32))
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    ids = torch.tensor([[5, *[IMAGE_ID] * 18, 7]])
    volume = torch.randn(1, 1, 11, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed, expected = (m(ids, pixel_values=volume).logits for m in (model, exact))
        assert (mixed.float() - expected).abs().max() < 0.1 * expected.abs().max()
        with pytest.raises(ValueError, match=r"with 17 .*with 18 patches"):
            model(input_ids=ids[:, :-2], pixel_values=volume)


def test_checkpoint_without_image_newline_is_refused(tmp_path: Path) -> None:
    write_umbrella(tmp_path, "onevision")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["image_newline"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"image_newline: missing, expected shape \[48\]"):
        load_params(tmp_path, read_config(tmp_path))


@pytest.mark.slow
def test_trains_and_keeps_image_newline(tmp_path: Path) -> None:
    """A base is trained from its native checkpoint; only the patch embedding of the export differs."""
    world = make_world(tmp_path)
    file, weights = world.base / "config.json", world.base / "model.safetensors"
    raw = json.loads(file.read_text()) | {"architectures": ["LlavaOnevisionForConditionalGeneration"]}
    file.write_text(json.dumps(raw | {"model_type": "llava_onevision", "video_token_index": 1}))
    tensors = load_file(weights)
    width = raw["text_config"]["hidden_size"]
    tensors["image_newline"] = np.random.default_rng(0).normal(size=width).astype(np.float32)
    save_file(tensors, weights, metadata={"format": "pt"})

    umbrella("convert", "from-hf", world.base, tmp_path / "native", "--config", world.config)
    umbrella(*world.train_flags(tmp_path / "run", "--base", tmp_path / "native", "--epochs", 1))
    umbrella("convert", "to-hf", tmp_path / "run", tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["model_type"] == "llava_onevision"
    after = load_file(tmp_path / "export" / "model.safetensors")
    kept = {name for name, tensor in tensors.items() if name in after and np.array_equal(tensor, after[name])}
    changed = {name for name in after if name not in kept}
    assert "image_newline" in kept
    assert changed == {name for name in after if ".embeddings." in name}
    assert "the same model" in umbrella("convert", "verify", tmp_path / "export", tmp_path / "run")
    message = umbrella(*world.train_flags(tmp_path / "no", "--set", "train.groups={image_newline: {}}"), code=2)
    assert "covers image_newline, which LLaVA does not use: it cannot train" in message
