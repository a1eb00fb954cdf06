"""A file of trained parameters gives the run's parameters bit for bit on its base, and fits no other base."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import umbrella_jax
from convert.rules import hub_name
from convert.safetensors_files import open_checkpoint, write_checkpoint
from convert.torch_model import load_umbrella
from tests.helpers import small_run
from tests.helpers.small_run import World, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.inference.processor import Processor
from umbrella_jax.models import split

EMBEDDINGS = "vision_tower.vision_model.embeddings."
ENDS = ("_proj.weight", "_proj.bias", "_positional_embeddings")
PROJECTOR = {f"multi_modal_projector.linear_2.{end}" for end in ("weight", "bias")}
NEW, OLD = ("sMRI", "fMRI"), ("T1", "rsfMRI")
GROUPS = "train.groups={patch_embed: {}, 'multi_modal_projector.linear_2.*': {}}"
SEED = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world(tmp_path_factory.mktemp("world"), train={"warmup_steps": 0}, seed=SEED)


def train(world: World, out: str, groups: str, *flags: object) -> Path:
    """Train two steps on T1 only, which compiles in half the time."""
    anatomical = [record for record in json.loads(world.train.read_text()) if record["task_id"].startswith("one")]
    data = small_run.write_json(world.root / "anatomical.json", anatomical)
    own = ["--train-data", data, "--batch-size", 2, "--set", groups, *flags]
    umbrella(*world.train_flags(world.root / out, *own))
    return world.root / out


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """Train the patch embedding and a part of the projector."""
    return train(world, "run", GROUPS)


@pytest.fixture(scope="module")
def files(run: Path) -> dict[tuple[str, str], Path]:
    """Return {names: file of the run's trained parameters under these names}."""
    found = {}
    for names, flags in ((OLD, []), (NEW, ["--names", "sMRI,fMRI"])):
        out = run.parent / f"part-{names[0]}"
        printed = umbrella("convert", "to-hf", run, out, "--trainable-only", "--include-untrained", *flags)
        (found[names],) = out.iterdir()
        assert f"{found[names]}: trained weights" in printed
    return found


@pytest.fixture(scope="module")
def part(files: dict[tuple[str, str], Path]) -> Path:
    return files[OLD]


@pytest.fixture(scope="module")
def trained(run: Path) -> dict[str, np.ndarray]:
    return parameters(umbrella_jax.load(run))


def parameters(model: umbrella_jax.Llava) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in split(model)[1].items()}


def same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], names: tuple[str, str] = OLD) -> None:
    """Patch embeddings under `names` have the bits of `expected`, which calls them T1 and rsfMRI."""
    renamed = {
        f"{EMBEDDINGS}{a}{end}": f"{EMBEDDINGS}{b}{end}" for a, b in zip(OLD, names, strict=True) for end in ENDS
    }
    expected = {renamed.get(path, path): leaf for path, leaf in expected.items()}
    assert ours.keys() == expected.keys()
    for path, leaf in expected.items():
        assert (ours[path].dtype, ours[path].shape) == (leaf.dtype, leaf.shape), path
        assert ours[path].tobytes() == leaf.tobytes(), path


def config_with(path: Path, world: World, names: tuple[str, str], **t1: object) -> Path:
    """Write the world's YAML with its modalities under `names`."""
    settings = small_run.read_config(world.config)
    modalities = dict(zip(names, settings["model"]["modalities"].values(), strict=True))
    modalities[names[0]] |= t1
    settings["model"]["modalities"] = modalities
    return small_run.write_config(path, settings)


@pytest.mark.parametrize("names", [OLD, NEW])
def test_the_file_holds_exactly_the_trained_parameters(
    run: Path, files: dict[tuple[str, str], Path], world: World, tmp_path: Path, names: tuple[str, str]
) -> None:
    umbrella("convert", "to-hf", run, tmp_path / "export", "--include-untrained", "--names", ",".join(names))
    whole = load_file(tmp_path / "export" / "model.safetensors")
    ours = load_file(files[names])
    assert ours.keys() == {f"{EMBEDDINGS}{m}{end}" for m in names for end in ENDS} | PROJECTOR
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (whole[name].dtype, whole[name].shape)
        assert array.tobytes() == whole[name].tobytes()
    with safe_open(files[names], "np") as file:
        metadata = file.metadata()
    description = json.loads((tmp_path / "export" / "umbrella_config.json").read_text())
    assert metadata["base_fingerprint"] == description["base_fingerprint"] == Checkpoint.open(run).fingerprint
    assert metadata["template"] == description["template"] == "umbrella"
    modalities = json.loads(metadata["modalities"])
    assert modalities == description["modalities"]
    assert list(modalities) == list(names)
    for written, settings in zip(modalities.values(), small_run.MODALITIES.values(), strict=True):
        assert settings.items() <= written.items()
    assert modalities[names[0]]["orientation"] == "RAS"
    assert modalities[names[1]]["scaling"] == "znorm_minback"


def test_the_file_says_how_its_text_was_written(world: World, part: Path, tmp_path: Path) -> None:
    with safe_open(part, "np") as file:
        metadata = file.metadata()
    assert Processor.load(world.base, patch_embed=part).template == "umbrella"
    save_file(load_file(part), tmp_path / "other", metadata | {"template": "original"})
    assert Processor.load(world.base, patch_embed=tmp_path / "other").template == "original"
    flags = ["--config", world.config, "--patch-embed", tmp_path / "other"]
    umbrella("convert", "from-hf", world.base, tmp_path / "native", *flags)
    assert Processor.load(tmp_path / "native").template == "original"
    save_file(load_file(part), tmp_path / "other", metadata | {"template": "poetry"})
    with pytest.raises(ConfigError, match="other: template: expected one of umbrella, original, chat, got 'poetry'"):
        Processor.load(world.base, patch_embed=tmp_path / "other")


def test_trained_parameters_differ_from_the_base(world: World, part: Path) -> None:
    """Otherwise the base would pass the tests below, too."""
    before = parameters(umbrella_jax.load(world.base, modalities=small_run.modalities(), allow_untrained=True))
    after = load_file(part)
    for name in {f"{EMBEDDINGS}T1{end}" for end in ENDS} | PROJECTOR:
        assert (after[name].reshape(-1) != before[name].reshape(-1)).any(), name


@pytest.mark.parametrize(
    ("names", "configured"),
    [(OLD, NEW), (NEW, OLD), *(pytest.param(own, own, marks=pytest.mark.slow) for own in (OLD, NEW))],
)
def test_from_hf(
    world: World,
    files: dict[tuple[str, str], Path],
    trained: dict[str, np.ndarray],
    tmp_path: Path,
    names: tuple[str, str],
    configured: tuple[str, str],
) -> None:
    config = config_with(tmp_path / "run.yaml", world, configured)
    flags = ["--config", config, "--patch-embed", files[names]]
    printed = umbrella("convert", "from-hf", world.base, tmp_path / "native", *flags)
    assert "initialised" not in printed
    same(parameters(umbrella_jax.load(tmp_path / "native")), trained, configured)
    umbrella("convert", "to-hf", tmp_path / "native", tmp_path / "export", "--include-untrained")
    same(parameters(umbrella_jax.load(tmp_path / "export")), trained, configured)


@pytest.mark.parametrize("names", [pytest.param(OLD, marks=pytest.mark.slow), NEW])
def test_load(
    world: World, files: dict[tuple[str, str], Path], trained: dict[str, np.ndarray], names: tuple[str, str]
) -> None:
    same(parameters(umbrella_jax.load(world.base, patch_embed=files[names])), trained, names)
    other = small_run.modalities()
    model = umbrella_jax.load(world.base, modalities=other, patch_embed=files[names])
    same(parameters(model), trained)
    half = parameters(umbrella_jax.load(world.base, patch_embed=files[names], dtype="bfloat16"))
    same(half, {path: leaf.astype("bfloat16") for path, leaf in trained.items()}, names)


@pytest.mark.parametrize("names", [pytest.param(OLD, marks=pytest.mark.slow), NEW])
def test_pytorch(
    run: Path, world: World, files: dict[tuple[str, str], Path], tmp_path: Path, names: tuple[str, str]
) -> None:
    umbrella("convert", "to-hf", run, tmp_path / "export", "--include-untrained", "--names", ",".join(names))
    expected = load_umbrella(tmp_path / "export").state_dict()
    ours = load_umbrella(world.base, patch_embed=files[names]).state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(ours[name], tensor), name
    file = load_file(files[names])
    tensors = {hub_name(name): tensor for name, tensor in ours.items()}
    for name, array in file.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)


def test_onto_an_export(run: Path, part: Path, world: World, trained: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The file's patch embedding replaces the one that the base has under the other names."""
    umbrella("convert", "to-hf", run, tmp_path / "base", "--include-untrained", "--names", "sMRI,fMRI")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name, array in tensors.items():
        if "MRI_" in name or name in PROJECTOR:
            array += 1
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    record = tmp_path / "base" / "umbrella_config.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "checksums"}))
    arrays = load_file(part)
    with safe_open(part, "np") as file:
        metadata = file.metadata() | {"base_fingerprint": Checkpoint.open(tmp_path / "base").fingerprint}
    save_file(arrays, tmp_path / "part", metadata=metadata)
    same(parameters(umbrella_jax.load(tmp_path / "base", patch_embed=tmp_path / "part")), trained)


@pytest.mark.parametrize(
    ("field", "value"), [("size", [7, 7, 5]), ("patch", [2, 2, 4]), ("orientation", "as_stored"), ("scaling", "minmax")]
)
def test_other_modalities_than_the_files(
    world: World, files: dict[tuple[str, str], Path], tmp_path: Path, field: str, value: object
) -> None:
    config = config_with(tmp_path / "run.yaml", world, OLD, **{field: value})
    flags = ["--config", config, "--patch-embed", files[NEW]]
    message = umbrella("convert", "from-hf", world.base, tmp_path / "native", *flags, code=2)
    assert message.startswith(f"umbrella-jax: {files[NEW]}: sMRI.{field}: ")
    assert not (tmp_path / "native").exists()


def test_modality_that_only_the_file_has(world: World, part: Path) -> None:
    with pytest.raises(ConfigError, match=f"{part}: rsfMRI: is in the checkpoint but not configured"):
        umbrella_jax.load(world.base, modalities={"T1": small_run.modalities()["T1"]}, patch_embed=part)


def test_base_with_a_flipped_byte(world: World, part: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    for load in (umbrella_jax.load, load_umbrella):
        with pytest.raises(CheckpointError, match=f"{part}: trained on another base .* than {base} "):
            load(base, patch_embed=part)
    flags = [base, tmp_path / "native", "--config", world.config, "--patch-embed", part]
    assert f"{part}: trained on another base" in umbrella("convert", "from-hf", *flags, code=2)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("layout", ["shards", "transformers 5", "transformers 5 in shards"])
def test_base_in_another_layout(
    world: World, part: Path, trained: dict[str, np.ndarray], tmp_path: Path, layout: str
) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    tensors = open_checkpoint(world.base)
    (base / "model.safetensors").unlink()
    if layout.startswith("transformers"):
        new = {
            n: n.replace("language_model.model.", "model.language_model.").replace("vision_model.", "") for n in tensors
        }
        new = {n: m if m.startswith("model.") else f"model.{m}" for n, m in new.items()}
        tensors = {new[n]: t for n, t in tensors.items()}
    write_checkpoint(base, tensors, "100KB" if "shards" in layout else "5GB")
    assert (len(list(base.glob("*.safetensors"))) > 1) == ("shards" in layout)
    same(parameters(umbrella_jax.load(base, patch_embed=part)), trained)
    load_umbrella(base, patch_embed=part)


def test_fingerprint_of_the_native_form_is_its_own(world: World, part: Path, run: Path, tmp_path: Path) -> None:
    """A base with other weights applied has another fingerprint, so `--resume` rejects it."""
    flags = ["--config", world.config]
    umbrella("convert", "from-hf", world.base, tmp_path / "plain", *flags)
    umbrella("convert", "from-hf", world.base, tmp_path / "with", *flags, "--patch-embed", part)
    plain, other = (Checkpoint.open(tmp_path / name).fingerprint for name in ("plain", "with"))
    assert plain == Checkpoint.open(run).fingerprint
    assert other != plain


# Runs that train a part of the patch embedding: the other part was initialised with the run's seed.


@pytest.fixture(scope="module", params=["{projector: {}}", "{'*.T1_proj.*': {}}"], ids=["projector", "kernel"])
def partly(request: pytest.FixtureRequest, world: World) -> tuple[Path, dict[str, np.ndarray]]:
    """Return such a run and its final parameters."""
    run = train(world, f"partly-{'projector' in request.param}", f"train.groups={request.param}")
    start = Checkpoint.open(world.base, small_run.modalities(), seed=SEED).params()
    return run, {path: np.asarray(leaf) for path, leaf in (start | Checkpoint.open(run).trained()).items()}


def log_text(run: Path) -> str:
    """Return the words of log.txt without times and line ends."""
    return " ".join(re.sub(r"(?m)^\S+ \S+\+00:00", "", (run / "log.txt").read_text()).split())


def test_untrained_parameters_are_loaded_as_they_started(partly: tuple[Path, dict[str, np.ndarray]]) -> None:
    run, expected = partly
    same(parameters(umbrella_jax.load(run, allow_untrained=True)), expected)
    of_projector = run.name == "partly-True"
    said = "WARNING: T1: patch embedding not in the checkpoint, newly initialised, and train.groups does not train it"
    assert (said in log_text(run)) == of_projector
    assert set(Checkpoint.open(run).untrained) == ({"T1", "rsfMRI"} if of_projector else {"rsfMRI"})


def test_untrained_parameters_are_exported_as_they_started(
    partly: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    run, expected = partly
    umbrella("convert", "to-hf", run, tmp_path / "export", "--include-untrained")
    same(parameters(umbrella_jax.load(tmp_path / "export", allow_untrained=True)), expected)


def test_untrained_parameters_come_back_onto_the_base(
    partly: tuple[Path, dict[str, np.ndarray]], world: World, tmp_path: Path
) -> None:
    run, expected = partly
    umbrella("convert", "to-hf", run, tmp_path / "part", "--trainable-only", "--include-untrained")
    (part,) = (tmp_path / "part").iterdir()
    same(parameters(umbrella_jax.load(world.base, patch_embed=part, allow_untrained=True)), expected)


def test_a_part_of_the_patch_embedding_onto_a_base_that_has_it(run: Path, world: World, tmp_path: Path) -> None:
    umbrella("convert", "to-hf", run, tmp_path / "base", "--include-untrained")
    other = train(world, "on-export", "train.groups={'*.T1_proj.*': {}}", "--base", tmp_path / "base")
    umbrella("convert", "to-hf", other, tmp_path / "part", "--trainable-only", "--include-untrained")
    (part,) = (tmp_path / "part").iterdir()
    ours = parameters(umbrella_jax.load(tmp_path / "base", patch_embed=part))
    same(ours, parameters(umbrella_jax.load(other)))


# A modality that the run's conversations do not show: `run` only shows T1, and its base is a stock LLaVA.


def test_a_modality_that_was_never_trained_is_known(run: Path, world: World, tmp_path: Path) -> None:
    unseen = "patch embedding not in the checkpoint, newly initialised, and no conversation of the run shows one"
    assert Checkpoint.open(run).untrained == {"rsfMRI": unseen.removeprefix("patch embedding ")}
    log = log_text(run)
    stays = "its patch embedding stays untrained (not in the checkpoint, newly initialised)"
    assert f"WARNING: rsfMRI: no conversation in {world.root / 'anatomical.json'} shows it: {stays}" in " ".join(
        log.split()
    )
    scan = world.root / "scans" / "run-0.nii"
    message = umbrella("generate", run, "Which sex?", "--image", f"rsfMRI={scan}", code=2)
    assert f"{run}: modality rsfMRI: {unseen}" in message
    copy = shutil.copytree(run, tmp_path / "run")
    described = json.loads((copy / "model" / "umbrella_config.json").read_text())
    assert described["first_steps"] == {"T1": 1}
    small_run.write_json(copy / "model" / "umbrella_config.json", described | {"first_steps": {"T1": 1, "rsfMRI": 9}})
    assert Checkpoint.open(copy).untrained["rsfMRI"].endswith("and the run shows none before step 9")
    small_run.write_json(copy / "model" / "umbrella_config.json", described | {"first_steps": {"T1": 1, "rsfMRI": 2}})
    assert Checkpoint.open(copy).untrained == {}


def test_a_modality_that_was_never_trained_is_left_out_of_exports(run: Path, tmp_path: Path) -> None:
    printed = umbrella("convert", "to-hf", run, tmp_path / "export")
    assert "rsfMRI: patch embedding not in the checkpoint" in printed
    assert "left out; --include-untrained exports it" in printed
    described = json.loads((tmp_path / "export" / "umbrella_config.json").read_text())
    assert (list(described["modalities"]), "untrained" in described) == (["T1"], False)
    assert not any("rsfMRI" in name for name in load_file(tmp_path / "export" / "model.safetensors"))
    assert "rsfMRI" not in (tmp_path / "export" / "README.md").read_text()
    for pair in ((run, tmp_path / "export"), (tmp_path / "export", run)):
        output = umbrella("convert", "verify", *pair, "--no-logits")
        assert "rsfMRI: not compared, the other leaves it out" in output
    umbrella("convert", "to-hf", run, tmp_path / "part", "--trainable-only")
    assert not any("rsfMRI" in name for name in load_file(tmp_path / "part" / "trainable.safetensors"))
    umbrella("convert", "to-hf", run, tmp_path / "whole", "--include-untrained", "--names", "sMRI,fMRI")
    described = json.loads((tmp_path / "whole" / "umbrella_config.json").read_text())
    assert list(described["untrained"]) == ["fMRI"]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "**fMRI was never trained: its patch embedding has its initial values.**" in card
