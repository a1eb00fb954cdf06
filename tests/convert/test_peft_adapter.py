"""Adapters in PEFT's format: PEFT's own numbers in both directions, every setting accounted for, and runs upon them."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

import umbrella_jax
from convert.from_hf import fingerprint
from convert.peft_adapter import ONLY, READ, WITHOUT_EFFECT, open_adapter, write_adapter
from convert.rules import hub_name
from convert.to_hf import hub_tensors
from convert.torch_model import load_umbrella
from tests.helpers import checkpoints, small_run
from tests.helpers.checkpoints import MODALITIES, TEXT, under_transformers_4_46
from tests.helpers.small_run import World, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.checkpoints.export import write_peft
from umbrella_jax.errors import CheckpointError
from umbrella_jax.inference.processor import Processor

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks transformers 5 for it
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
PATTERNS: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 7,
    "target_modules": ["q_proj", "up_proj", "fc1", "linear_2"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "fc1": 5},
    "alpha_pattern": {r".*layers\.2\..*": 11},
    "layers_to_transform": None,
}
TRAINED = "base_model.model."


def adapt(model: Any, folder: Path, **settings: Any) -> Any:
    """Put an adapter with random numbers onto a PyTorch model, write it into `folder`, and return PEFT's model."""
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=generator)
    adapted.save_pretrained(folder)
    return adapted


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename(folder: Path, name: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name(old): tensor.clone() for old, tensor in load_file(file).items()}, file)


def merged_tensors(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """Return our tensors of a base with an adapter merged, under the hub's names."""
    checkpoint = Checkpoint.open(base, patch_embed=adapter)
    return {name: tensor.read() for name, tensor in hub_tensors(checkpoint.tensors(), checkpoint.config).items()}


def assert_merged_as(expected: Any, base: Path, adapter: Path) -> None:
    """Our tensors equal those of the PyTorch model `expected`, and some differ from the base's."""
    ours, before = merged_tensors(base, adapter), load_file(base / "model.safetensors")
    theirs = {hub_name(name): tensor for name, tensor in expected.state_dict().items()}
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
    assert sum((array != before[name].numpy()).any() for name, array in ours.items()) > 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    checkpoints.write_umbrella(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return an adapter with different ranks and scales and a whole projector, and the model that PEFT merges."""
    folder = tmp_path_factory.mktemp("adapter")
    targets = ["q_proj", "up_proj", "fc1"]
    settings = PATTERNS | {"target_modules": targets, "modules_to_save": ["multi_modal_projector"]}
    return folder, adapt(load_umbrella(base), folder, **settings).merge_and_unload()


LAYOUTS: dict[str, Callable[[str], str]] = {
    "transformers 5": lambda name: name,
    "transformers 4.46": lambda name: TRAINED + hub_name(name.removeprefix(TRAINED)),
    "language models of LLaVA-NeXT": lambda name: name.replace(".model.language_model.", ".model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merges_as_peft_does(base: Path, adapter: tuple[Path, Any], tmp_path: Path, layout: str) -> None:
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    rename(folder, LAYOUTS[layout])
    assert_merged_as(adapter[1], base, folder)


def test_merges_an_adapter_of_the_language_model_alone(base: Path, tmp_path: Path) -> None:
    """It was trained on a plain Qwen2, of some layers only, and with a scale of alpha/√r."""
    model = load_umbrella(base)
    alone = Qwen2ForCausalLM(model.config.text_config).eval()
    weights = {name.replace("language_model.", ""): t for name, t in model.state_dict().items() if "language_m" in name}
    alone.load_state_dict(weights, strict=False)
    targets = {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [0, 2]}
    merged = adapt(alone, tmp_path, r=4, lora_alpha=6, use_rslora=True, **targets).merge_and_unload()
    replaced = {"model.language_model." + name.removeprefix("model."): t for name, t in merged.state_dict().items()}
    model.load_state_dict({name: t for name, t in replaced.items() if "lm_head" not in name}, strict=False)
    assert_merged_as(model, base, tmp_path)


def test_reads_what_llava_trains_beside_an_adapter(base: Path, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    """LLaVA's own scripts write the projector into a file of its own."""
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    beside = {name: tensors.pop(name) for name in list(tensors) if "lora_" not in name}
    save_file(tensors, folder / "adapter_model.safetensors")
    torch.save(beside, folder / "non_lora_trainables.bin")
    edit(folder, modules_to_save=None)
    assert_merged_as(adapter[1], base, folder)


def test_adapters_of_every_product_are_written_for_peft(base: Path, tmp_path: Path) -> None:
    expected = adapt(load_umbrella(base), tmp_path, target_modules="all-linear", r=2).state_dict()
    found = load_umbrella(base, adapter=tmp_path).state_dict()
    assert any("multi_modal_projector.linear_1.lora_B" in name for name in expected)
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_refuses_the_adapter_of_a_convolution(base: Path, tmp_path: Path) -> None:
    adapt(load_umbrella(base), tmp_path, target_modules=["T1_proj"], r=2)
    with pytest.raises(CheckpointError, match=r"T1_proj\.lora_A\.weight: not a factor A or B of a product"):
        open_adapter(tmp_path)


def test_every_setting_of_peft_is_accounted_for() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert sorted([*READ, *ONLY, *WITHOUT_EFFECT]) == sorted(fields)
    assert {"velora_config", "use_dora", "init_lora_weights", "bias"} <= ONLY.keys()


OTHERS = {"peft_type": "ADALORA", "bias": "all", "init_lora_weights": "pissa_niter_4", "layer_replication": [[0, 2]]}


def test_refuses_each_setting_that_is_not_supported(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    others = {key: OTHERS.get(key, True) for key in ONLY}
    edit(folder, **others, r="eight", use_rslora=1, from_a_newer_peft={"on": True})
    with pytest.raises(CheckpointError) as raised:
        open_adapter(folder)
    named = {fault.removeprefix(f"{folder}/adapter_config.json: ").partition(":")[0] for fault in raised.value.faults}
    assert named == {*ONLY, "r", "use_rslora", "from_a_newer_peft"}


def test_settings_without_effect_may_have_any_value(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    edit(folder, **{key: ["anything"] for key in WITHOUT_EFFECT})
    assert open_adapter(folder).scales == open_adapter(adapter[0]).scales


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda name: name.replace("layers.0", "layers.9"),
            "layers.9.self_attn.q_proj.weight: has an adapter, but",
        ),
        (lambda name: name.replace("up_proj", "down_proj"), "down_proj.weight: its adapter has shapes"),
        (lambda name: name.replace("layers.0.self_attn.q_proj.lora_A", "layers.0.x"), "half of its adapter is missing"),
        (lambda name: name.replace("up_proj.lora_B.weight", "up_proj.lora_magnitude_vector"), "not a factor A or B"),
    ],
)
def test_refuses_tensors_that_do_not_fit(
    base: Path, adapter: tuple[Path, Any], tmp_path: Path, fault: Callable[[str], str], message: str
) -> None:
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    rename(folder, fault)
    with pytest.raises(CheckpointError, match=message):
        merged_tensors(base, folder)


def test_refuses_ranks_other_than_those_described(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    edit(folder, rank_pattern={})
    with pytest.raises(CheckpointError, match=r"fc1.lora_A.weight: shape \[5, 36\], but adapter_config.json says "):
        open_adapter(folder)


def test_refuses_new_embeddings_whose_tied_head_keeps_the_old_ones(base: Path, tmp_path: Path) -> None:
    adapt(load_umbrella(base), tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: replaced, but not the head that is tied to it"):
        merged_tensors(base, tmp_path)


# Runs.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = small_run.make_world_of_one_shape(tmp_path_factory.mktemp("world"))
    small_run.soften(world.base)
    return world


LORA = "model.lora={rank: 3, alpha: 7, targets: [language_model.q_proj, language_model.up_proj, vision_tower.fc1]}"
GROUPS = "train.groups={patch_embed: {}, projector: {}, lora: {}}"


@pytest.fixture(scope="module")
def start(world: World) -> Path:
    """Return an adapter from PyTorch for the language model of the world's base."""
    config = {**TEXT, **json.loads((world.base / "config.json").read_text())["text_config"]}
    model = Qwen2ForCausalLM._from_config(Qwen2ForCausalLM.config_class(**config))
    adapt(model, world.root / "start", r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"])
    return world.root / "start"


@pytest.fixture(scope="module")
def run(world: World, start: Path) -> Path:
    """Train an adapter from PyTorch on, with new ones in the tower, patch embedding and projector."""
    umbrella(*world.train_flags(world.root / "run", "--adapter", start, "--set", LORA, "--set", GROUPS))
    return world.root / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    printed = umbrella("convert", "to-hf", run, run.parent / "exported", "--adapter", "--include-untrained")
    assert "PEFT adapter for base" in printed
    return run.parent / "exported"


def both_logits(ours: Any, theirs: Any, run: Path, scan: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of a question about a scan: of our model, and of one in PyTorch."""
    batch = Processor.load(run).prompt("Which sex?", [("T1", scan)])
    length = int(batch.lengths[0])
    ids = torch.from_numpy(batch.input_ids[:, :length]).long()
    volumes = torch.from_numpy(batch.volumes["T1"])[:, None]
    with torch.no_grad():
        found = theirs(input_ids=ids, pixel_values=volumes).logits.numpy()
    return np.asarray(ours(batch))[:, :length], found


def test_an_exported_adapter_has_the_runs_logits_in_peft(world: World, run: Path, exported: Path) -> None:
    """On the stock base and, by PEFT alone, on an export of it that has an untrained patch embedding."""
    umbrella("convert", "from-hf", world.base, world.root / "native", "--config", world.config)
    umbrella("convert", "to-hf", world.root / "native", world.root / "with-embedding")
    ours, scan = umbrella_jax.load(run), world.root / "scans" / "0.nii.gz"
    onto_stock = load_umbrella(world.base, adapter=exported)
    onto_export = PeftModel.from_pretrained(load_umbrella(world.root / "with-embedding"), exported)
    for adapted in (onto_stock, onto_export):
        a, b = both_logits(ours, adapted, run, scan)
        assert np.abs(a).max() > 0.5
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
    with onto_export.disable_adapter():
        a, b = both_logits(ours, onto_export, run, scan)
        assert np.abs(a - b).max() > 0.1
    a, b = both_logits(umbrella_jax.load(world.base, patch_embed=exported), onto_stock, run, scan)
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


def test_an_exported_adapter_describes_exactly_what_trained(world: World, run: Path, exported: Path) -> None:
    trained = open_adapter(exported)
    assert trained.base_fingerprint == Checkpoint.open(world.base, small_run.modalities()).fingerprint
    assert list(trained.modalities) == list(small_run.MODALITIES)
    described = json.loads((exported / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["base_model_name_or_path"]) == (3, 7, "base")
    pattern = re.compile(described["target_modules"])
    for model in (load_umbrella(world.base, patch_embed=exported),):
        modules = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
        assert len(modules) == len(trained.scales)
    assert all(pattern.fullmatch(weight.removesuffix(".weight")) for weight in trained.scales)  # transformers 4.46's
    assert not pattern.fullmatch("model.vision_tower.encoder.layers.0.self_attn.q_proj")


def test_an_exported_adapter_has_a_card_and_can_be_pushed(
    exported: Path, adapter: tuple[Path, Any], tmp_path: Path
) -> None:
    card = (exported / "README.md").read_text()
    assert "Trained on top of `base` with the adapter `start`." in card
    assert "### Run" not in card.partition("## Training\n")[0]
    words = ["my-lab/lora", "--dry-run", "--allow-untrained"]
    printed = umbrella("push", exported, *words)
    assert re.findall(r"^  (\S+\.\w+) ", printed, re.MULTILINE) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "predictions.jsonl").touch()
    assert "predictions.jsonl: not part of an export" in umbrella("push", copy, *words, code=2)
    other = shutil.copytree(adapter[0], tmp_path / "other")
    (other / "README.md").write_text("---\ntags: [mri]\n---\n")
    assert "not an adapter that `umbrella-jax convert to-hf" in umbrella("push", other, *words, code=2)


def test_a_run_trains_an_adapter_on(run: Path, start: Path) -> None:
    before, after = open_adapter(start).tensors, small_run.trained(run)
    for name, tensor in before.items():
        path, layer = re.sub(r"\.layers\.\d+", ".layers", name), int(name.split(".layers.")[1][0])
        change = np.abs(after[path][layer] - tensor.read()).max()
        assert 0 < change < 0.03, name  # the numbers are 0.1 large
    new = after["vision_tower.vision_model.encoder.layers.mlp.fc1.lora_B.weight"]
    assert 0 < np.abs(new).max() < 0.03


@pytest.mark.parametrize(
    "lora", ["{rank: 4, alpha: 7, targets: [language_model]}", "{rank: 3, alpha: 7, targets: [language_model.up_proj]}"]
)
def test_other_adapters_than_those_of_the_config_do_not_train_on(world: World, start: Path, lora: str) -> None:
    flags = ["--adapter", start, "--set", f"model.lora={lora}", "--set", GROUPS]
    message = umbrella(*world.train_flags(world.root / "refused", *flags), code=2)
    expected = "set model.lora to rank 3, alpha 7, targets [language_model.q_proj, language_model.up_proj], or merge it"
    assert expected in " ".join(message.split())


def test_refuses_another_base_than_that_of_the_fingerprint(world: World, exported: Path, tmp_path: Path) -> None:
    other = shutil.copytree(world.base, tmp_path / "other")
    small_run.soften(other)
    tensors = load_file(other / "model.safetensors")
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="exported: trained on another base"):
        umbrella_jax.load(other, patch_embed=exported)
    with pytest.raises(CheckpointError, match="exported: trained on another base"):
        load_umbrella(other, adapter=exported)


def test_weights_that_an_adapter_cannot_contain_are_named(run: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(run)
    assert isinstance(checkpoint, RunCheckpoint)
    with pytest.raises(CheckpointError, match=r"language_model.model.norm.weight: trained as a whole; an adapter "):
        write_peft(replace(checkpoint, groups=("lora", "language_model.model.norm.*")), tmp_path / "out")


@pytest.mark.slow
def test_a_run_upon_a_merged_adapter_needs_it_and_exports_it(world: World, start: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(start, tmp_path / "adapter")
    flags = world.train_flags(tmp_path / "run", "--adapter", adapter)
    printed = umbrella(*flags)
    assert "products merged into the weights" in " ".join(printed.split())
    ours = small_run.parameters(tmp_path / "run")
    weight = "language_model.model.layers.self_attn.q_proj.weight"
    native = umbrella(
        "convert", "from-hf", world.base, tmp_path / "native", "--config", world.config, "--adapter", adapter
    )
    assert "products merged into the weights" in " ".join(native.split())
    np.testing.assert_array_equal(ours[weight], small_run.parameters(tmp_path / "native", allow_untrained=True)[weight])
    assert "not a run with LoRA adapters" in umbrella(
        "convert", "to-hf", tmp_path / "run", tmp_path / "out", "--adapter", code=2
    )
    umbrella("convert", "to-hf", tmp_path / "run", tmp_path / "part", "--trainable-only", "--include-untrained")
    again = small_run.parameters(world.base, patch_embed=tmp_path / "part" / "trainable.safetensors")
    for path, leaf in ours.items():
        np.testing.assert_allclose(again[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    rename(adapter, lambda name: name.replace("q_proj", "o_proj"))
    for words in ([*flags, "--resume"], ["convert", "to-hf", tmp_path / "run", tmp_path / "export"]):
        assert "not the weights" in umbrella(*words, code=2)


PROGRAM = """
import sys, torch, transformers
from peft import PeftModel
from convert.torch_model import load_umbrella
assert transformers.__version__ == "4.46.3"
base, adapter, given = sys.argv[1:]
inputs, expected = torch.load(given)
for model in (load_umbrella(base, adapter=adapter), PeftModel.from_pretrained(load_umbrella(base), adapter)):
    with torch.no_grad():
        difference = (model(**inputs).logits - expected).abs().max()
    assert difference <= 1e-5, difference
"""


@pytest.mark.slow
def test_the_same_adapter_under_transformers_4_46(base: Path, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    described = {"base_fingerprint": fingerprint(base), "modalities": dict(MODALITIES)}
    write_adapter(tmp_path / "adapter", replace(open_adapter(adapter[0]), **described), None)
    ids = torch.tensor([[*[checkpoints.IMAGE_ID] * MODALITIES["T1"].num_patches, *range(20, 40)]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 1, *MODALITIES["T1"].size)}
    with torch.no_grad():
        torch.save((inputs, adapter[1](**inputs).logits), tmp_path / "given")
    under_transformers_4_46("-c", PROGRAM, base, tmp_path / "adapter", tmp_path / "given")
