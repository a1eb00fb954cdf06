"""`convert verify` tells what is the same, what was rounded and what differs, and runs PyTorch against JAX on it."""

import json
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.tensor import Tensor
from convert.verify import _compare, _ulp
from tests.checkpoints import FAMILIES, MODALITIES, write_stock, write_umbrella
from umbrella_jax.api import Checkpoint, verify, write_hf, write_native
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
    for a, b in ((base, tmp_path / "native"), (tmp_path / "native", tmp_path / "back"), (tmp_path / "back", base)):
        found = verify(a, b)
        assert found.same
        assert {t.kind for t in found.tensors} == {"identical"}
        assert len(found.tensors) == len(load_file(base / "model.safetensors"))
        for forward in found.forward.values():
            assert 0 < forward.logits < 1e-5  # 0 would be one framework compared with itself
            assert forward.greedy == forward.of == 8
        assert len(found.forward) == 2


def test_stock_and_its_conversion(tmp_path):
    write_stock(tmp_path / "stock", tied=False)
    write_native(Checkpoint.open(tmp_path / "stock", MODALITIES, seed=7), tmp_path / "native")
    for pair in ((tmp_path / "stock", tmp_path / "native"), (tmp_path / "native", tmp_path / "stock")):
        found = verify(*pair)
        assert found.same
        odd = [t for t in found.tensors if t.kind != "identical"]
        assert len(odd) == 6
        assert all("embeddings." in t.name and t.kind.startswith("only in ") for t in odd)
        assert set(found.forward) == {"T1", "rsfMRI"}
        (note,) = (note for note in found.notes if f"{tmp_path / 'stock'}: left out, " in note)
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


def test_logits_tell_what_tensors_cannot(base, tmp_path):
    """The same tensors under another rope: the configuration is what differs."""
    other = edited(base, tmp_path / "b", lambda tensors: None)
    raw = json.loads((other / "config.json").read_text())
    raw["text_config"]["rope_parameters"]["rope_theta"] = 1e4
    (other / "config.json").write_text(json.dumps(raw))
    found = verify(base, other)
    assert {t.kind for t in found.tensors} == {"identical"}
    assert found.configuration == ["text.rope_theta: 1000000.0 in A, 10000.0 in B"]
    assert not found.same


def test_preprocessing_is_part_of_the_model(base, tmp_path):
    other = edited(base, tmp_path / "b", lambda tensors: None)
    raw = json.loads((other / "umbrella_config.json").read_text())
    raw["modalities"]["T1"]["orientation"] = "as_stored"
    (other / "umbrella_config.json").write_text(json.dumps(raw))
    found = verify(base, other, forward=False)
    assert found.configuration == ["T1.orientation: RAS in A, as_stored in B"]
    assert not found.same


def test_products_are_of_float32_on_any_device(base, monkeypatch):
    """Whose own precision of float32 products, TF32 or bfloat16, would make any two models differ."""
    seen, target_logits = [], Llava.target_logits

    def noted(self, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return target_logits(self, batch)

    monkeypatch.setattr(Llava, "target_logits", noted)
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
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert found["components"]["language_model"]["different"] == 1
    assert found["components"]["patch_embed"] == {
        "identical": 6,
        "rounded": 0,
        "different": 0,
        "only in A": 0,
        "only in B": 0,
    }
    assert [d["name"] for d in found["differences"]] == [NORM, WEIGHT]
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
    found = _compare("x", Tensor.of(a), Tensor.of(b))
    assert (found.kind, found.largest) == (kind, largest)
