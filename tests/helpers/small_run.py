"""A world small enough to train in seconds: a base, NIfTI files, conversations of every kind, the YAML of a run."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import nibabel as nib
import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file

import umbrella_jax
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.cli import main
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.demo import make_base
from umbrella_jax.models import split
from umbrella_jax.sharding import make_mesh
from umbrella_jax.training.checkpoint import json_crc32

ANATOMICAL, RUNS = 4, 4
BATCH_SIZE = 6  # more than there are conversations of a kind: one batch of each
MODALITIES: dict[str, dict[str, Any]] = {
    "T1": {"size": [6, 7, 5], "patch": [3, 2, 4]},  # 2·3·1 = 6 patches
    "rsfMRI": {"size": [4, 3, 5, 4], "patch": [2, 3, 4, 2], "stride_between_seq": 0.5},  # 2·1·1·2 = 4 patches
}
VOLUME_SHAPES = {"T1": (9, 8, 7), "rsfMRI": (4, 4, 5, 10)}
Turn = tuple[str, Sequence[str]]


@dataclass(frozen=True)
class World:
    """Where the parts lie."""

    root: Path
    base: Path
    config: Path
    train: Path
    eval: Path

    def train_flags(self, out: Path, *more: object) -> list[str]:
        """Return `umbrella-jax train` of this world into `out`; flags among `more` replace the world's own."""
        flags = ["--config", self.config, "--base", self.base, "--train-data", self.train, "--out", out]
        return ["train", *latest(*flags, *more)]


def latest(*flags: object) -> list[str]:
    """Return flags with their values; of a flag (or a key of --set) that is given twice, only the last."""
    words = list(map(str, flags))
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    groups = [words[start:end] for start, end in zip(starts, [*starts[1:], None], strict=False)]
    kept = {(group[0], group[-1].partition("=")[0] if group[0] == "--set" else ""): group for group in groups}
    return [*words[: starts[0] if starts else None], *(word for group in kept.values() for word in group)]


def make_world(root: Path, **config: Any) -> World:
    """12 conversations to train on and 3 to evaluate, about 4 anatomical scans and 4 runs; `config` is laid over the
    YAML section by section."""
    world = World(root, root / "base", root / "run.yaml", root / "train.json", root / "eval.json")
    make_base(world.base)
    file = world.base / "config.json"  # as a LLaVA of the hub, which does not say that its weights are random
    write_json(file, {k: v for k, v in json.loads(file.read_text()).items() if k != "random_weights"})
    for i in range(ANATOMICAL):
        write_volume(root / "scans" / f"{i}.nii.gz", VOLUME_SHAPES["T1"], seed=i)
    for i in range(RUNS):
        write_volume(root / "scans" / f"run-{i}.nii", VOLUME_SHAPES["rsfMRI"], seed=10 + i)

    def one(i: int, task_id: str) -> dict[str, Any]:
        return conversation(task_id, "T1", [("user", [f"sMRI:{i}.nii.gz", "Which sex?"]), ("assistant", [answer(i)])])

    def two(i: int, j: int, task_id: str) -> dict[str, Any]:
        turns = [("user", [f"sMRI:{i}.nii.gz", "A reference."]), ("assistant", [answer(i)])]
        return conversation(
            task_id, "T3", [*turns, ("user", [f"sMRI:{j}.nii.gz", "And this?"]), ("assistant", [answer(j)])]
        )

    def run(i: int, task_id: str) -> dict[str, Any]:
        return conversation(task_id, "T1", [("user", [f"fMRI:run-{i}.nii", "Awake?"]), ("assistant", [answer(i)])])

    text = conversation("text", "T0", [("user", ["Does an ox have two brains?"]), ("assistant", ["No."])])
    pairs = [(0, 1), (1, 2), (2, 3), (3, 0)]
    write_json(
        world.train,
        [
            *(one(i, f"one-{i}") for i in range(ANATOMICAL)),
            *(two(i, j, f"two-{i}{j}") for i, j in pairs),
            *(run(i, f"run-{i}") for i in range(3)),
            text,
        ],
    )
    write_json(world.eval, [one(1, "eval-one"), two(2, 0, "eval-two"), run(3, "eval-run")])
    settings: dict[str, Any] = {
        "model": {"modalities": MODALITIES, "remat": "none"},
        "data": {"image_root": str(root / "scans"), "threads": 2, "allow_overlap": True},
        "train": {"batch_size": BATCH_SIZE, "learning_rate": 1e-2, "warmup_steps": 2, "max_new_tokens": 4},
        "evaluation": {"controls": []},  # each would compile programs of its own
        "seed": 0,
    }
    write_config(
        world.config,
        {k: {**v, **config.get(k, {})} if isinstance(v, dict) else config.get(k, v) for k, v in settings.items()},
    )
    return world


def make_world_of_one_shape(root: Path) -> World:
    """Make a world of four conversations, two updates per epoch, all of one shape; they are evaluation data too."""
    world = make_world(root, train={"max_new_tokens": 2, "batch_size": 2})
    keep(world.train, "one")
    shutil.copy(world.train, world.eval)
    return world


def keep(data: Path, *names: str) -> None:
    """Of a file's conversations those whose task_id begins so."""
    write_json(data, [record for record in json.loads(data.read_text()) if record["task_id"].startswith(names)])


def soften(base: Path) -> None:
    """Weights of a checkpoint as training starts with them, normal numbers: those of `make_base` are so steep that the
    order of a sum changes a gradient's fifth digit."""
    file = base / "model.safetensors"
    rng = np.random.default_rng(0)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            tensors[name] = 0.1 * rng.standard_normal(tensor.shape, np.float32)
    save_file(tensors, file, metadata={"format": "pt"})


def answer(i: int) -> str:
    return "left." if i % 2 else "right."


def conversation(task_id: str, task_type: str, turns: Sequence[Turn], **fields: Any) -> dict[str, Any]:
    """One record of the present schema; of a turn's parts, `MODALITY:path` is an image and all else is text."""

    def part(text: str) -> dict[str, str]:
        modality, colon, path = text.partition(":")
        if colon:
            return {"type": "image", "modality": modality, "image_path": path}
        return {"type": "text", "text": text}

    messages = [{"role": role, "content": [part(p) for p in parts]} for role, parts in turns]
    return {"task_id": task_id, "task_type": task_type, "conversations": messages, "metadata": {}, **fields}


def write_volume(path: Path, shape: tuple[int, ...], seed: int = 0, values: np.ndarray | None = None) -> Path:
    """A NIfTI file of positive random voxels, stored as LAS where the seed is odd."""
    data = np.random.default_rng(seed).uniform(1, 9, shape) if values is None else values
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([(-1) ** seed, 1, 1, 1])), path)
    return path


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    with path.open("w") as file:
        YAML(typ="safe").dump(settings, file)
    return path


def read_config(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    return settings


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(run: Path) -> list[dict[str, float]]:
    """A run's metrics without what the machine's speed says."""
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in read_lines(run / "metrics.jsonl")]


def parameters(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """What `umbrella_jax.load` gives."""
    return {path: np.asarray(leaf) for path, leaf in split(umbrella_jax.load(path, **options))[1].items()}


@contextmanager
def on(devices: int) -> Iterator[None]:
    """Runs in this block are on so many of the devices that the suite simulates."""
    some = partial(make_mesh, devices=jax.devices()[:devices])
    with ExitStack() as patched:
        for module in ("run.preparation", "inference.predict"):
            patched.enter_context(mock.patch(f"umbrella_jax.{module}.make_mesh", some))
        yield


def umbrella(*words: object, code: int = 0, devices: int = 1) -> str:
    """As `said`; returns stderr where it failed, else stdout."""
    out, err = said(*words, code=code, devices=devices)
    return err if code else out


def said(*words: object, code: int = 0, devices: int = 1) -> tuple[str, str]:
    """Runs `umbrella-jax WORDS` in this process, on some of the eight devices that the suite simulates; asserts its
    exit code, and returns what it printed, on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with on(devices), redirect_stdout(out), redirect_stderr(err):
        found = main([str(word) for word in words])
    assert found == code, f"{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def trained(run: Path) -> dict[str, np.ndarray]:
    """What a run trained."""
    return {path: np.asarray(leaf) for path, leaf in Checkpoint.open(run).trained().items()}


def assert_close(run: Path, expected: Path) -> None:
    """Two runs whose sums are made in another order: metrics and parameters to 1e-6; a bias, which began at 0, against
    the weights of the products that it is added to."""
    for line, other in zip(numbers(run), numbers(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-6)
    ours, theirs = trained(run), trained(expected)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        scale = np.abs(theirs[path.replace("_proj.bias", "_proj.weight")]).max()
        assert np.abs(ours[path] - leaf).max() <= 1e-6 * scale, path


def edit_meta(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes what stands beside the state in each of a run's checkpoints, as if it had been written so."""
    for file in (run / "checkpoints").glob("*/meta/metadata"):
        content = json.loads(file.read_text())
        del content["crc32"]
        edit(content["run"])
        file.write_text(json.dumps({**content, "crc32": json_crc32(content)}))


def umbrella_command(*words: object) -> list[str]:
    """`umbrella-jax WORDS` for a process of its own, which wants `process_environment`."""
    return [sys.executable, "-m", "umbrella_jax.cli", *map(str, words)]


def hide_torch() -> None:
    """Keep transformers from importing torch for its tokenizers in this process, which takes 2 to 4 s."""
    from transformers.utils.import_utils import is_torch_available

    sys.modules["torch"] = None  # type: ignore[assignment]
    is_torch_available.cache_clear()


def process_environment() -> dict[str, str]:
    """This process's environment but for the simulated devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags)}


def modalities() -> dict[str, ModalityConfig]:
    """MODALITIES as a Python caller names them."""
    return {
        name: ModalityConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in m.items()})
        for name, m in MODALITIES.items()
    }
