"""PyTorch users get the same numbers from an UMBRELLA checkpoint (under 4.46: tests/test_transformers_446.py)."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, LlavaConfig

from convert.config_json import read_config
from convert.rules import hub_name
from convert.safetensors_files import open_checkpoint
from convert.torch_model import TorchPatchEmbed, load_umbrella
from convert.verify import compare_reading
from tests.helpers import torch_golden
from tests.helpers.checkpoints import MODALITIES, write_stock, write_umbrella
from umbrella_jax.config.schema import ModalityConfig, to_dict
from umbrella_jax.errors import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", torch_golden.FOLDERS)
def test_golden(folder):
    torch_golden.check(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_the_file_bit_for_bit(tmp_path, tied, dtype):
    original = write_umbrella(tmp_path, tied=tied, dtype=dtype, shards=2)
    model = load_umbrella(tmp_path)
    theirs = original.state_dict()
    state = model.state_dict()
    assert state.keys() == theirs.keys()
    for name, tensor in state.items():
        assert tensor.dtype == theirs[name].dtype == getattr(torch, dtype)
        assert torch.equal(tensor, theirs[name]), name
    assert {hub_name(n) for n in state} - open_checkpoint(tmp_path).keys() == (
        {"language_model.lm_head.weight"} if tied else set()
    )
    tied_now = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied_now == tied
    assert not model.training


@pytest.mark.parametrize(
    ("group", "modality"),
    [
        ("embeddings.", "T1"),
        ("embeddings.", "rsfMRI"),
        *((g, "T1") for g in ("projector.", "q_proj.", "norm", "lm_head.")),
    ],
)
def test_export_of_mixed_types(tmp_path, group, modality):
    """Trained parameters are float32 and others bfloat16; saving and loading again keeps every bit."""
    write_umbrella(tmp_path / "base", dtype="bfloat16", tied=False)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    rng = torch.Generator().manual_seed(1)
    trained = [name for name in tensors if group in name]
    for name in trained:
        tensors[name] = tensors[name].float() + 1e-4 * torch.rand(tensors[name].shape, generator=rng)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = load_umbrella(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    shutil.copyfile(tmp_path / "base" / "umbrella_config.json", tmp_path / "saved" / "umbrella_config.json")
    again = load_umbrella(tmp_path / "saved")
    saved = {hub_name(n): t for n, t in load_file(tmp_path / "saved" / "model.safetensors").items()}
    for state in (saved, *({hub_name(n): t for n, t in m.state_dict().items()} for m in (model, again))):
        assert state.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert state[name].dtype == tensor.dtype == (torch.float32 if name in trained else torch.bfloat16)
            assert torch.equal(state[name], tensor), name

    patches, shape = {"T1": (18, (11, 9, 7)), "rsfMRI": (8, (8, 6, 5, 7))}[modality]
    ids = torch.tensor([[5, *[320] * patches, 7, 9]])
    volume = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed, copied = (m(input_ids=ids, pixel_values=volume).logits for m in (model, copy.deepcopy(model)))
        exact = load_umbrella(tmp_path / "base", torch.float32)(input_ids=ids, pixel_values=volume).logits
        converted = model.float()(input_ids=ids, pixel_values=volume).logits
    assert torch.equal(mixed, copied)
    assert (mixed.float() - exact).abs().max() < 0.1 * exact.abs().max()  # bfloat16 between modules
    assert torch.equal(converted, exact)


@pytest.mark.parametrize("asked", [None, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_patch_embedding_is_float32_unless_asked_otherwise(tmp_path, dtype, asked):
    """Here it is bfloat16 in the file, so that its values are the same in float32."""
    write_umbrella(tmp_path, dtype="bfloat16")
    model = load_umbrella(tmp_path, dtype, patch_embed_dtype=asked)
    types = {"patch embedding": set(), "others": set()}
    for name, parameter in model.named_parameters():
        types["patch embedding" if "embeddings." in name else "others"].add(parameter.dtype)
    assert types == {"patch embedding": {asked or torch.float32}, "others": {dtype}}
    ids = torch.tensor([[5, *[320] * 18, 7]])
    volume = torch.randn(1, 1, 11, 9, 7, generator=torch.Generator().manual_seed(0))
    assert model(input_ids=ids, pixel_values=volume).logits.isfinite().all()


def test_logits_are_those_of_the_model_that_was_saved(tmp_path):
    original = write_umbrella(tmp_path, tied=False)
    ids = torch.tensor([[5, *[320] * 8, 7, 9]])
    volume = torch.randn(1, 1, 8, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = original(input_ids=ids, pixel_values=volume).logits
        ours = load_umbrella(tmp_path)(input_ids=ids, pixel_values=volume).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_modality_without_weights_is_refused(tmp_path):
    write_stock(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_umbrella(tmp_path, modalities=MODALITIES)
    message = str(error.value)
    assert "modality T1: no patch embedding" in message
    assert "modality rsfMRI: no patch embedding" in message


def test_a_language_model_that_transformers_does_not_know_is_named(tmp_path, monkeypatch):
    write_umbrella(tmp_path, "qwen3")
    monkeypatch.setattr(LlavaConfig, "from_dict", lambda raw: CONFIG_MAPPING["qwen33"])  # as 4.46 does with Qwen3
    with pytest.raises(CheckpointError, match=r"transformers \S+ does not know 'qwen33'; install a later version"):
        load_umbrella(tmp_path)
    (fault,) = compare_reading(tmp_path, read_config(tmp_path), grown=False)
    assert f"transformers {transformers.__version__} cannot read it: KeyError: 'qwen33'" in fault


def test_modality_by_shape():
    m = ModalityConfig(size=(6, 6, 6), patch=(2, 3, 3))
    embed = TorchPatchEmbed({"sMRI": to_dict(m), "dMRI": {"size": (6, 6, 6), "patch": (3, 3, 3)}}, 8)
    volume = torch.zeros(2, 1, 6, 6, 6)
    with pytest.raises(ValueError, match=r"sMRI or dMRI: set \.modality"):
        embed(volume)
    embed.modality = "dMRI"
    assert embed(volume).shape == (2, 8, 8)
    with pytest.raises(ValueError, match=r"expected sMRI \(B, 1, 6, 6, 6\)"):
        embed(torch.zeros(2, 1, 6, 6, 7))


def test_patches_are_those_of_the_definition():
    """Four loops define the 4D embedding: patches and their voxels in order (d, h, w, t). 3D is torch's convolution."""
    rng = np.random.default_rng(0)
    m = MODALITIES["rsfMRI"]
    embed = TorchPatchEmbed({"rsfMRI": to_dict(m)}, 9)
    x = rng.normal(size=(2, 1, *m.size)).astype(np.float32)
    weight, bias = (p.detach().numpy() for p in embed.rsfMRI_proj.parameters())
    table = embed.rsfMRI_positional_embeddings.detach().numpy()
    expected = []
    for index in np.ndindex(*m.grid):
        cut = tuple(slice(i * p, (i + 1) * p) for i, p in zip(index, m.patch, strict=True))
        expected.append(x[:, 0][:, *cut].reshape(2, -1) @ weight.T + bias)
    with torch.no_grad():
        np.testing.assert_allclose(embed(torch.from_numpy(x)).numpy(), np.stack(expected, 1) + table, atol=1e-5)
