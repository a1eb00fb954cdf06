"""A base of a SigLIP and a Qwen: its parts keep their bits, and it answers once its projector has trained."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file

import umbrella_jax
from convert.torch_model import TorchPatchEmbed
from tests.conftest import write_tokenizer
from tests.helpers import small_run
from tests.helpers.checkpoints import MODALITIES, randomise
from tests.helpers.golden_case import relative
from tests.helpers.parts import ENDS, ROWS, write_language, write_vision
from tests.helpers.small_run import World, umbrella
from tests.helpers.training_case import QUICK
from umbrella_jax import Processor
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.stitch import stitch
from umbrella_jax.config.schema import to_dict
from umbrella_jax.data.tokenize import stop_ids
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import merge, split

EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TOWER = "vision_tower.vision_model."
IMAGE = 283
"""The first id after those of the tokenizer."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a whole SigLIP and a Qwen."""
    root = tmp_path_factory.mktemp("parts")
    write_vision(root / "siglip")
    write_language(root / "qwen")
    return root


def write(source: Path, out: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Stitch the parts in `source`. Returns the tensors, config.json and the messages."""
    lines = stitch(source / "siglip", source / "qwen", out, **options)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text()), "\n".join(lines)


@pytest.mark.parametrize(
    ("kind", "tied", "whole"),
    [
        ("qwen3", True, True),
        pytest.param("qwen3", False, False, marks=pytest.mark.slow),
        pytest.param("qwen2", True, False, marks=pytest.mark.slow),
        pytest.param("qwen2", False, True, marks=pytest.mark.slow),
    ],
)
def test_parts_keep_their_bits_and_give_what_transformers_gives(
    kind: str, tied: bool, whole: bool, tmp_path: Path
) -> None:
    tower, language = write_vision(tmp_path / "siglip", whole=whole), write_language(tmp_path / "qwen", kind, tied=tied)
    tensors, config, lines = write(tmp_path, tmp_path / "base")
    own = {TOWER + name: p for name, p in tower.state_dict().items() if not name.startswith("head.")}
    own |= {f"language_model.{name}": p.to(torch.bfloat16) for name, p in language.state_dict().items()}
    if tied:
        del own[HEAD]
    projector = {name: tensors.pop(name) for name in list(tensors) if name.startswith("multi_modal_projector.")}
    assert {name: t.dtype for name, t in tensors.items()} == {name: p.dtype for name, p in own.items()}
    assert all(torch.equal(tensors[name], p) for name, p in own.items())
    assert "vision_model.head (11 tensors)" in lines if whole else "head (11 tensors)" in lines
    assert f"<image>: added to the tokenizer, id {IMAGE}: an unused row of the embeddings" in lines
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (IMAGE, ROWS)

    only_t1 = {"T1": MODALITIES["T1"]}
    model = umbrella_jax.load(tmp_path / "base", modalities=only_t1, allow_untrained=True, dtype="float32")
    graphdef, params = split(model)
    tower.embeddings = TorchPatchEmbed({"T1": to_dict(only_t1["T1"])}, tower.config.hidden_size)
    randomise(tower.embeddings, 5)
    for name, p in tower.embeddings.named_parameters():
        path = f"{TOWER}embeddings.{name}"
        params[path] = jnp.asarray(p.detach().numpy()).reshape(params[path].shape)
    scan = small_run.write_volume(tmp_path / "0.nii.gz", MODALITIES["T1"].size)
    batch = Processor.load(tmp_path / "base", modalities=only_t1).prompt("Which sex?", [("T1", scan)])
    with torch.no_grad():
        hidden = tower(torch.from_numpy(batch.volumes["T1"])[:, None], output_hidden_states=True).hidden_states[-1]
        first, second = (torch.nn.utils.skip_init(torch.nn.Linear, width, 48) for width in (hidden.shape[-1], 48))
        for i, layer in enumerate((first, second), 1):
            layer.load_state_dict(
                {end: projector[f"multi_modal_projector.linear_{i}.{end}"] for end in ("weight", "bias")}
            )
        features = second(torch.nn.functional.gelu(first(hidden)))
        embeds = language.get_input_embeddings()(torch.from_numpy(batch.input_ids).long())
        shown = torch.from_numpy(batch.feature_idx) >= 0
        assert shown.sum() == only_t1["T1"].num_patches
        embeds[shown] = features[0]
        length = batch.lengths[0]
        logits = language(inputs_embeds=embeds[:, :length]).logits
    ours = jax.jit(lambda params, batch: merge(graphdef, params)(batch), compiler_options=QUICK)(params, batch)
    assert relative(ours[:, :length], logits.numpy()) <= 1e-5


def test_the_projector_depends_only_on_the_seed(parts: Path, tmp_path: Path) -> None:
    bases = {out: write(parts, tmp_path / out, seed=seed)[0] for out, seed in (("a", 1), ("b", 1), ("c", 2))}
    for i, inputs in ((1, 36), (2, 48)):
        for end in ("weight", "bias"):
            a, b, c = (base[f"multi_modal_projector.linear_{i}.{end}"] for base in bases.values())
            assert torch.equal(a, b)
            assert not torch.equal(a, c)
            assert 0.8 * inputs**-0.5 < a.abs().max() <= inputs**-0.5
    assert (tmp_path / "a" / "umbrella_config.json").read_bytes() == (
        tmp_path / "b" / "umbrella_config.json"
    ).read_bytes()


def test_tokens_and_their_rows(tmp_path: Path) -> None:
    """Without a row to spare, the embeddings and the head grow by their means; ends of answers are carried."""
    write_vision(tmp_path / "siglip")
    language = write_language(tmp_path / "qwen", tied=False, rows=IMAGE)
    tensors, config, lines = write(tmp_path, tmp_path / "base")
    assert f"vocabulary: grown from {IMAGE} to {IMAGE + 1} rows" in lines
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (IMAGE, IMAGE + 1)
    for name, own in ((EMBED, language.get_input_embeddings()), (HEAD, language.get_output_embeddings())):
        assert torch.equal(tensors[name][:IMAGE], own.weight.to(torch.bfloat16))
        torch.testing.assert_close(tensors[name][IMAGE].float(), own.weight.mean(0), rtol=1e-2, atol=1e-3)
    checkpoint = Checkpoint.open(tmp_path / "base", MODALITIES)
    assert (checkpoint.notes, checkpoint.config.image_token_id) == ((), IMAGE)
    assert stop_ids(checkpoint.tokenizer()) == sorted({*ENDS})


# Whether the base answers


@pytest.fixture(scope="module")
def world(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a world of one shape whose base is stitched."""
    world = small_run.make_world_of_one_shape(tmp_path_factory.mktemp("world"))
    small_run.write_config(
        world.config,
        (settings := small_run.read_config(world.config)) | {"train": settings["train"] | {"max_new_tokens": 8}},
    )
    shutil.rmtree(world.base)
    printed = umbrella(
        *("convert", "stitch", "--vision", parts / "siglip", "--language", parts / "qwen", "--seed", 3, world.base)
    )
    assert "projector: random, seed 3" in printed
    return world


WHY = "projector never trained (random, seed 3)"


def ask(world: World, model: Path, *flags: object, code: int = 0) -> str:
    scan = f"T1={world.root}/scans/0.nii.gz"
    return umbrella("generate", model, "Which sex?", "--image", scan, "--max-new-tokens", 8, *flags, code=code)


def test_an_untrained_projector_answers_nothing(world: World) -> None:
    said = ask(world, world.base, "--config", world.config, code=2)
    assert f"{world.base}: {WHY}; train the group projector, or allow" in said


@pytest.mark.slow
def test_answers_once_the_projector_has_trained(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    umbrella(*world.train_flags(run, "--set", "train.groups={patch_embed: {}, projector: {}}", "--epochs", 8))
    losses = [line["loss"] for line in small_run.read_lines(run / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    ask(world, run)
    umbrella("convert", "to-hf", run, tmp_path / "export")
    umbrella("convert", "to-hf", run, tmp_path / "part", "--trainable-only")
    (file,) = (tmp_path / "part").iterdir()
    for checkpoint in (Checkpoint.open(tmp_path / "export"), Checkpoint.open(world.base, patch_embed=file)):
        assert checkpoint.answering().untrained.keys() <= {"rsfMRI"}
    card = (tmp_path / "export" / "README.md").read_text()
    assert "Its vision tower: `siglip`; license: apache-2.0.\n" in card


@pytest.mark.slow
def test_the_patch_embedding_alone_does_not_make_a_base_answer(world: World, tmp_path: Path) -> None:
    """The run says so when it starts, and its report; the projector may follow in a second run."""
    first, second = tmp_path / "first", tmp_path / "second"
    umbrella(*world.train_flags(first, "--epochs", 1, "--eval-data", world.eval))
    log = " ".join(re.sub(r"(?m)^\S+ \S+\+00:00", "", (first / "log.txt").read_text()).split())
    assert f"WARNING: {WHY}, and train.groups does not train it as a whole: add the group projector" in log
    assert f"{first}: {WHY}; train the group projector" in ask(world, first, code=2)
    umbrella("report", first)
    says = "The projector is untrained (never trained (random, seed 3)): the answers mean nothing."
    assert says in " ".join((first / "report.html").read_text().split())
    umbrella(*world.train_flags(second, "--base", first, "--set", "train.groups={projector: {}}", "--epochs", 1))
    ask(world, second)


# Faults


def edit(file: str, **fields: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        small_run.write_json(root / file, json.loads((root / file).read_text()) | fields)

    return change


def tensors_of(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write_again(root: Path) -> None:
        tensors = load_file(root / file)
        change(tensors)
        save_file(tensors, root / file, metadata={"format": "pt"})

    return write_again


SIGLIP, QWEN = "siglip/config.json", "qwen/config.json"
NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda root: shutil.rmtree(root / "siglip"), "siglip: "),
    "naflex": (edit(SIGLIP, model_type="siglip2"), f"{SIGLIP}: model_type: 'siglip2' is not supported: the NaFlex"),
    "other tower": (edit(SIGLIP, model_type="clip"), f"{SIGLIP}: model_type: 'clip' is not supported: expected 'sig"),
    "other language": (edit(QWEN, model_type="llama"), f"{QWEN}: model_type: 'llama' is not supported: expected 'qw"),
    "activation": (edit(QWEN, hidden_act="relu"), f"{QWEN}: hidden_act: 'relu' is not supported"),
    "quantised": (edit(QWEN, quantization_config={}), f"{QWEN}: quantization_config: quantised weights cannot"),
    "words": (edit(QWEN, vocab_size=-5), f"{QWEN}: vocab_size: expected a positive int, got -5"),
    "code": (edit(QWEN, auto_map={"AutoModel": "modeling_qwen.Qwen"}), f"{QWEN}: auto_map: names code to be run"),
    "pickle": (
        lambda root: (root / "qwen/model.safetensors").rename(root / "qwen/pytorch_model.bin"),
        "qwen/pytorch_model.bin: a pickle of PyTorch, expected model.safetensors; save the model",
    ),
    "no tokenizer": (
        lambda root: (root / "qwen/tokenizer.json").unlink(),
        f"qwen: the tokenizer has 1 tokens and the embeddings {ROWS} rows; copy this model's own",
    ),
    "missing": (tensors_of("qwen/model.safetensors", lambda t: t.pop(NORM)), f"qwen: {NORM}: missing, expected shape"),
    "unknown": (
        tensors_of("qwen/model.safetensors", lambda t: t.update(score=t[NORM].clone())),
        "qwen/model.safetensors: score: not a part of the language model",
    ),
    "tied head": (
        tensors_of(
            "qwen/model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
        ),
        "qwen/model.safetensors: lm_head.weight: differs from the tied embeddings",
    ),
    "shape": (
        tensors_of("qwen/model.safetensors", lambda t: t.update({NORM: t[NORM][:5].clone()})),
        f"qwen/model.safetensors: {NORM}: expected shape [48], found [5]",
    ),
    "8 bits": (
        tensors_of("qwen/model.safetensors", lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        f"qwen/model.safetensors: {NORM}: type I8, expected one of float32",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_refuses_faulty_parts_before_anything_is_written(
    damage: Callable[[Path], None], message: str, parts: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(parts, tmp_path / "parts")
    damage(root)
    words = ["convert", "stitch", "--vision", root / "siglip", "--language", root / "qwen", tmp_path / "base"]
    assert f"{root}/{message}" in umbrella(*words, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_a_base_can_be_read_although_a_part_has_an_auto_map_without_code(parts: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(parts, tmp_path / "parts"))
    for file in (SIGLIP, QWEN):
        edit(file, auto_map={})(root)
    write(root, tmp_path / "base")
    Checkpoint.open(tmp_path / "base", MODALITIES)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_refuses_a_seed_that_jax_would_cut_off(seed: int, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"seed: expected 0 to 4,294,967,295, got {seed}"):
        write(parts, tmp_path / "base", seed=seed)


def test_a_tokenizer_may_have_the_token_of_images_already(parts: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(parts, tmp_path / "parts"))
    write_tokenizer(root / "qwen")
    lines = write(root, tmp_path / "base")[2]
    assert lines.endswith(f"<image>: in the tokenizer already, id {IMAGE}")


def test_refuses_a_folder_that_is_not_empty(parts: Path) -> None:
    words = ["convert", "stitch", "--vision", parts / "siglip", "--language", parts / "qwen", parts / "qwen"]
    assert "directory is not empty; choose another" in umbrella(*words, code=2)


def test_a_card_names_licenses_that_differ(parts: Path, tmp_path: Path) -> None:
    root = shutil.copytree(parts, tmp_path / "parts")
    (root / "qwen" / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    (root / "siglip" / "README.md").unlink()
    (root / "qwen" / "LICENSE").write_text("Terms.\n")
    write(root, tmp_path / "base")
    card = (tmp_path / "base" / "README.md").read_text()
    assert "\nlicense:" not in card
    assert "| vision tower (SigLIP) | `siglip` | not recorded |" in card
    assert "| language model (Qwen2) | `qwen` | other (qwen-research) |" in card
    assert (tmp_path / "base" / "LICENSE-language").read_text() == "Terms.\n"
