"""`convert verify` reports identical, rounded and different tensors, and compares logits of PyTorch and JAX."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.config_json import read_config
from convert.lazy_tensor import Tensor
from convert.rules import EMBED, LM_HEAD
from convert.verify import _compare, _target_logits, _ulp, compare_reading
from tests.conftest import write_tokenizer
from tests.helpers.checkpoints import FAMILIES, MODALITIES, write_stock, write_umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.checkpoints.export import write_hf, write_native
from umbrella_jax.checkpoints.verify import verify
from umbrella_jax.cli import main
from umbrella_jax.models import Llava

NORM = "language_model.model.norm.weight"
WEIGHT = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    write_umbrella(directory)
    return directory


def edited(base: Path, to: Path, change) -> Path:
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_a_conversion_is_the_same_model(base, tmp_path):
    write_native(Checkpoint.open(base), tmp_path / "native")
    write_hf(Checkpoint.open(tmp_path / "native"), tmp_path / "back", names=FAMILIES[1])
    pairs = (base, tmp_path / "native"), (tmp_path / "native", tmp_path / "back"), (tmp_path / "back", base)
    for a, b in pairs:
        comparison = verify(a, b, forward=(a, b) != pairs[2])  # whose logits are those of the first two pairs
        assert comparison.same
        assert {t.kind for t in comparison.tensors} == {"identical"}
        assert len(comparison.tensors) == len(load_file(base / "model.safetensors"))
        for forward in comparison.forward.values():
            assert 0 < forward.logits < 1e-5  # 0 would be one framework compared with itself
            assert forward.greedy == forward.greedy_total == 8
        assert len(comparison.forward) == (0 if (a, b) == pairs[2] else 2)


def test_stock_and_its_conversion(tmp_path):
    write_stock(tmp_path / "stock", tied=False)
    write_native(Checkpoint.open(tmp_path / "stock", MODALITIES, seed=7), tmp_path / "native")
    for pair in ((tmp_path / "stock", tmp_path / "native"), (tmp_path / "native", tmp_path / "stock")):
        comparison = verify(*pair)
        assert comparison.same
        where = "only in A" if pair[0].name == "native" else "only in B"
        assert comparison.lines()[-1] == f"the same model, but for the patch embedding, which is {where}"
        odd = [t for t in comparison.tensors if t.kind != "identical"]
        assert len(odd) == 6
        assert all("embeddings." in t.name and t.kind.startswith("only in ") for t in odd)
        assert set(comparison.forward) == {"T1", "rsfMRI"}
        (note,) = (note for note in comparison.notes if f"{tmp_path / 'stock'}: replaced by " in note)
        assert "\n  vision_tower.vision_model.embeddings.position_embedding.weight" in note


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_to_another_type(base, tmp_path, dtype):
    write_native(Checkpoint.open(base), tmp_path / "native", dtype=dtype)
    found = verify(base, tmp_path / "native")
    assert found.same
    assert {t.kind for t in found.tensors} == {"rounded"}
    assert {t.types for t in found.tensors} == {f"float32 → {dtype}"}
    assert all(forward.same for forward in found.forward.values())


def test_one_number_by_one_bit(base, tmp_path):
    def change(tensors):
        tensors[WEIGHT][3, 4] = np.nextafter(tensors[WEIGHT][3, 4], np.float32(9))

    found = verify(base, edited(base, tmp_path / "b", change), forward=False)
    assert not found.same
    (odd,) = [t for t in found.tensors if t.kind != "identical"]
    assert (odd.name, odd.kind) == (WEIGHT, "different")
    tensors = load_file(base / "model.safetensors")
    assert odd.largest == np.spacing(np.abs(tensors[WEIGHT][3, 4]))


def test_logits_differ_if_only_the_configuration_does(base, tmp_path):
    """The tensors are the same and the rope differs, so only the configuration differs."""
    other = edited(base, tmp_path / "b", lambda tensors: None)
    raw = json.loads((other / "config.json").read_text())
    raw["text_config"]["rope_parameters"]["rope_theta"] = 1e4
    (other / "config.json").write_text(json.dumps(raw))
    found = verify(base, other)
    assert {t.kind for t in found.tensors} == {"identical"}
    assert found.configuration == ["text.rope_theta: 1000000.0 in A, 10000.0 in B"]
    assert not found.same


GENERATION = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 2,
    "eos_token_id": list(range(331)),
    "suppress_tokens": [7],
}


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_generation_settings_are_not_compared(base, tmp_path, where):
    """Greedy tokens are the likeliest ones in spite of penalties and an eos at every token."""
    other = edited(base, tmp_path / "b", lambda tensors: None)
    raw = json.loads((other / where).read_text())
    (other / where).write_text(json.dumps(raw | GENERATION))
    found = verify(other, base)
    assert found.same, found.lines()
    assert all(forward.greedy == 8 and forward.logits < 1e-5 for forward in found.forward.values())


def misread(monkeypatch, change):
    """Make our own reading of config.json wrong everywhere."""

    def wrong(*args, **options):
        return change(read_config(*args, **options))

    monkeypatch.setattr("umbrella_jax.checkpoints.checkpoint.read_config", wrong)


MISREADINGS = {
    "text.rope_theta": lambda c: replace(c, text=replace(c.text, rope_theta=1e4)),
    "text.rms_norm_eps": lambda c: replace(c, text=replace(c.text, rms_norm_eps=1e-3)),
    "text.num_attention_heads": lambda c: replace(
        c, text=replace(c.text, num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    ),
    "vision.layer_norm_eps": lambda c: replace(c, vision=replace(c.vision, layer_norm_eps=1e-2)),
    "vision.num_attention_heads": lambda c: replace(c, vision=replace(c.vision, num_attention_heads=4)),
    "image_token_id": lambda c: replace(c, image_token_id=7),
}


@pytest.mark.parametrize("field", MISREADINGS)
def test_a_misreading_of_ours_is_named(base, monkeypatch, field):
    """It is named for both models; otherwise only our own code reads them."""
    misread(monkeypatch, MISREADINGS[field])
    found = verify(base, base, forward=False)
    assert not found.same
    said = [fault for fault in found.configuration if fault.startswith(f"{base / 'config.json'}: {field}: ")]
    assert len(said) == 2, found.configuration


@pytest.mark.parametrize("field", ["text.rope_theta", "image_token_id"])
def test_a_misreading_of_ours_shows_in_the_logits(base, monkeypatch, field):
    """PyTorch computes with transformers' reading of the original config.json."""
    misread(monkeypatch, MISREADINGS[field])
    monkeypatch.setattr("umbrella_jax.checkpoints.verify.compare_reading", lambda *args, **options: [])
    found = verify(base, base)
    assert not found.same
    assert all(forward.logits > 1e-3 for forward in found.forward.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_misread_tie_shows(tmp_path, monkeypatch, tied):
    write_umbrella(tmp_path / "base", tied=tied)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[LM_HEAD] = tensors[EMBED].copy()  # either reading can load this
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    assert verify(tmp_path / "base", tmp_path / "base").same
    monkeypatch.setattr("convert.config_json._tied", lambda raw: not tied)
    found = verify(tmp_path / "base", tmp_path / "base")
    said = f"text.tie_word_embeddings: {tied} as transformers reads it, {not tied} as it is read here"
    assert [fault for fault in found.configuration if said in fault]
    assert not found.same


def test_a_misread_base_of_a_run_shows(base, tmp_path, monkeypatch):
    """The run's own config.json, which this package writes, cannot show it."""
    misread(monkeypatch, lambda c: replace(c, text=replace(c.text, rope_theta=1e4)))
    opened = Checkpoint.open(base)
    run = RunCheckpoint(name="run", path=tmp_path, config=opened.config, base=opened, why_step="", lora=None, groups=())
    assert run.origin is opened
    assert compare_reading(run.origin.description, run.config, grown=False) == [
        f"{base / 'config.json'}: text.rope_theta: 1000000.0 as transformers reads it, 10000.0 as it is read here"
    ]


def test_a_patch_embedding_that_both_have_lost(base, tmp_path):
    """Both describe a patch embedding that neither has, so they are not stock LLaVAs, which would be the same."""

    def lose(tensors):
        for name in [name for name in tensors if ".embeddings." in name]:
            del tensors[name]

    lost = edited(base, tmp_path / "lost", lose)
    for a, b in ((base, lost), (lost, base), (lost, lost)):
        comparison = verify(a, b, forward=False)
        assert not comparison.same
        assert f"{lost}: modality T1: no weights" in comparison.configuration


def test_tokenizers_are_part_of_the_model(base, tmp_path):
    one, other = (edited(base, tmp_path / name, lambda tensors: None) for name in "ab")
    again = edited(base, tmp_path / "c", lambda tensors: None)
    write_tokenizer(again, ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>"))
    for directory in (one, other, again):
        if directory is not again:
            write_tokenizer(directory)
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(raw | {"image_token_index": 283}))
    assert verify(one, other, forward=False).same
    file = other / "tokenizer.json"
    raw = json.loads(file.read_text())
    merges = raw["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    raw["normalizer"] = {"type": "NFC"}
    file.write_text(json.dumps(raw))
    stated = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(stated | {"eos_token": "<|im_end|>"}))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    comparison = verify(one, other, forward=False)
    assert not comparison.same
    differences = "\n".join(comparison.configuration)
    assert "tokenizer: ids of 'naïve" in differences
    assert "tokenizer: eos_token: <|endoftext|> in A, <|im_end|> in B" in differences
    assert "tokenizer: chat_template: None in A" in differences
    comparison = verify(one, again, forward=False)
    assert any(
        "2 words have other ids; '<|im_end|>' is 282 in A, 281 in B" in fault for fault in comparison.configuration
    )


def test_preprocessing_is_part_of_the_model(base, tmp_path):
    other = edited(base, tmp_path / "b", lambda tensors: None)
    raw = json.loads((other / "umbrella_config.json").read_text())
    raw["modalities"]["T1"]["orientation"] = "as_stored"
    (other / "umbrella_config.json").write_text(json.dumps(raw))
    found = verify(base, other, forward=False)
    assert found.configuration == ["T1.orientation: RAS in A, as_stored in B"]
    assert not found.same


def test_products_are_of_float32_on_any_device(base, monkeypatch):
    """A device's default precision of float32 products, TF32 or bfloat16, would make any two models differ."""
    seen, target_logits = [], Llava.target_logits

    def noted(self, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return target_logits(self, batch)

    monkeypatch.setattr(Llava, "target_logits", noted)
    _target_logits.clear_cache()  # traced before, it would not call `noted`
    assert verify(base, base).same
    assert set(seen) == {"highest"}


def test_wrong_weights_give_other_logits(base, tmp_path):
    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT][::-1].copy()

    found = verify(base, edited(base, tmp_path / "b", change))
    assert all(forward.logits > 1e-3 and not forward.same for forward in found.forward.values())


def test_command_line(base, tmp_path, capsys):
    def change(tensors):
        tensors[NORM][5] += 1
        tensors[WEIGHT] *= np.float32(1.5)

    other = edited(base, tmp_path / "b", change)
    assert main(["convert", "verify", str(base), str(base)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the same model"
    assert main(["convert", "verify", str(base), str(other), "--no-logits"]) == 1
    printed = capsys.readouterr().out
    assert printed.index(f"  {NORM}  different  float32  1") < printed.index(f"  {WEIGHT}  different")
    assert printed.splitlines()[-1] == "NOT the same model"
    assert main(["convert", "verify", str(base), str(other), "--no-logits", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["same"]
    assert report["components"]["language_model"]["different"] == 1
    assert report["components"]["patch_embed"] == {
        "identical": 6,
        "rounded": 0,
        "different": 0,
        "only in A": 0,
        "only in B": 0,
    }
    assert [d["name"] for d in report["differences"]] == [NORM, WEIGHT]
    assert main(["convert", "verify", str(base), str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_without_pytorch_it_says_so(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "convert.torch_model", raising=False)
    found = verify(base, base)
    assert found.same
    assert found.forward == {}
    assert any("torch is not installed" in note for note in found.notes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_ulp_is_numpys_spacing(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(200), [0, 1, 2, 0.999, 6e-8, 1e-7, -4]]).astype(dtype)
    x = np.concatenate([x, np.nextafter(x, dtype(0))])
    np.testing.assert_array_equal(_ulp(x), np.spacing(np.abs(x)).astype(np.float64))


def test_ulp_of_bfloat16():
    x = np.array([1, 1.5, -3, 0, 1e-39], ml_dtypes.bfloat16)
    up = (np.abs(x).view(np.uint16) + 1).view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(_ulp(x), up - np.abs(x).astype(np.float64))


@pytest.mark.parametrize(
    ("a", "b", "kind", "largest"),
    [
        (np.array([1, np.nan], np.float32), np.array([1, np.nan], np.float32), "identical", 0),
        (np.array([1, 2], np.float32), np.array([1, np.nan], np.float32), "different", np.inf),
        (np.array([1, np.inf], np.float32), np.array([1, np.inf], ml_dtypes.bfloat16), "rounded", 0),
        (np.array([1, 1e6], np.float32), np.array([1, np.inf], np.float16), "different", np.inf),
        (np.array([1 + 2**-8], np.float32), np.array([1 + 2**-7], ml_dtypes.bfloat16), "rounded", 2**-8),
        (np.array([1 + 2**-8], np.float32), np.array([1 + 2**-6], ml_dtypes.bfloat16), "different", 2**-6 - 2**-8),
        (np.array([[1, 2]], np.float32), np.array([1, 2], np.float32), "different", np.inf),
        (np.array([0.0], np.float32), np.array([-0.0], np.float32), "different", 0),
    ],
)
def test_kinds(a, b, kind, largest):
    found = _compare("x", Tensor.from_array(a), Tensor.from_array(b))
    assert (found.kind, found.largest) == (kind, largest)
