"""Commands of the PyTorch system run as they are typed there."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_run import MODALITIES, read_config, said, write_json
from umbrella_jax.config.load import load_original
from umbrella_jax.demo import DemoData, make_base, make_data

TYPED = (
    "train --config umbrella_llava_train.yaml --train-data ./sample_data/sex_comparison_conversations_v2/ "
    "--modality T1 --batch-size 2 --epochs 10 --no-wandb --output-dir ./hf_results/umbrella_v1"
)
CHEAP = {"gradient_checkpointing": False, "learning_rate": 0.001}
"""Settings of both files; without recomputation, the step compiles faster."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """Conversations about four subjects; the base is in `root`/base."""
    data = make_data(tmp_path_factory.mktemp("data"), train_subjects=4, eval_subjects=4)
    make_base(data.root / "base")
    return data


def nested(base: Path) -> dict[str, Any]:
    """Return the original's nested YAML, without `mixed_precision`."""
    return {
        "dataset": {name: {"img_size": modality["size"]} for name, modality in MODALITIES.items()},
        "model": {"hf_name": str(base), **{name: {"patch_size": m["patch"]} for name, m in MODALITIES.items()}},
        "trainer": {"per_device_batch_size": 4, "max_epochs": 50, "warmup_steps": 5, "eval_steps": 9, **CHEAP},
    }


def flat(base: Path) -> dict[str, Any]:
    """Return the same in the names of the original's config attributes."""
    sizes = {f"{name}_img_size": modality["size"] for name, modality in MODALITIES.items()}
    patches = {f"{name}_patch_size": modality["patch"] for name, modality in MODALITIES.items()}
    return {"model_name": str(base), "num_epochs": 50, "warmup_steps": 5, **CHEAP, **sizes, **patches}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "folders"), [(nested, ["."]), (flat, ["same_sex", "different_sex/pairs"])])
def test_the_command_of_the_original_trains(
    data: DemoData, settings: Any, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "umbrella_llava_train.yaml", settings(data.root / "base"))  # JSON is YAML too
    for number, record in enumerate(json.loads(data.train.read_text())):
        for image in [*record["images"], *(part for turn in record["conversations"] for part in turn["content"])]:
            for key in {"path", "image_path"} & image.keys():
                image[key] = str(data.root / image[key])
        folder = tmp_path / "sample_data" / "sex_comparison_conversations_v2" / folders[number % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{record['task_id']}_{number}.json", record)
    _, printed = said(*shlex.split(TYPED))
    assert "umbrella_llava_train.yaml: a configuration of the PyTorch system, read as" in printed
    run = tmp_path / "hf_results" / "umbrella_v1"
    assert "umbrella_llava_train.yaml: a configuration of the PyTorch system" in (run / "log.txt").read_text()
    assert (run / "checkpoints" / "60").is_dir()  # 12 conversations of T1, 10 epochs
    config = read_config(run / "config.yaml")
    assert (config["train"]["batch_size"], config["train"]["learning_rate"]) == (2, 0.001)
    assert (config["model"]["compute_dtype"], config["data"]["template"]) == ("bfloat16", "original")


@pytest.mark.parametrize("origin", ["flag", "set", "ours", "theirs"])
@pytest.mark.parametrize(
    ("key", "flag", "original", "value", "fault"),
    [
        ("data.train", "--train-data", "trainer.train_json_path", "nope", "nope: not found"),
        ("data.eval", "--eval-data", "trainer.eval_json_path", "nope", "nope: not found"),
        ("data.modality", "--modality", "modality", "PET", "'PET' is not configured"),
        ("train.epochs", "--epochs", "trainer.max_epochs", 1e9, "1,000,000,000 epochs of "),
    ],
)
def test_a_fault_found_after_parsing_names_what_was_typed(
    data: DemoData,
    origin: str,
    key: str,
    flag: str,
    original: str,
    value: Any,
    fault: str,
    tmp_path: Path,
) -> None:
    """The flag, our key in our YAML, or the key in the original's."""
    file, settings = tmp_path / "run.yaml", nested(data.root / "base")
    del settings["trainer"]["max_epochs"], settings["trainer"]["eval_steps"]
    write_json(file, settings)
    if origin == "ours":
        settings = load_original(file).mapping
    section, _, name = (original if origin == "theirs" else key).rpartition(".")
    if origin in ("ours", "theirs"):
        settings |= {section: {**settings.get(section, {}), name: value}} if section else {name: value}
    write_json(file, settings)
    words = {"flag": [flag, str(value)], "set": ["--set", f"{key}={value}"]}.get(origin, [])
    train_data = [] if key == "data.train" else ["--train-data", data.train]
    _, printed = said("train", "--config", file, "--out", tmp_path / "run", *train_data, *words, code=2)
    start = {"flag": flag, "set": "--set", "ours": str(file), "theirs": f"{file}: {original}"}[origin]
    assert f"umbrella-jax: {start}: {key}: {fault}" in printed
