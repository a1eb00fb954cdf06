"""`umbrella-jax doctor`: it reports problems, and its reference step matches PyTorch."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from convert.config_json import read_config
from convert.lazy_tensor import Tensor
from tests.helpers.small_run import umbrella_command
from umbrella_jax import tpu
from umbrella_jax.doctor import diagnose, reference_step
from umbrella_jax.doctor.diagnose import Diagnosis, Problem
from umbrella_jax.models import abstract_params


def write_description(directory: Path) -> Path:
    """Write config.json of the reference step's model in the format of Hugging Face's hub."""
    vision, text = reference_step.VISION, reference_step.TEXT
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": reference_step.CONFIG.image_token_id,
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
    """Return loss and gradient norm of the reference step in PyTorch, float64, one conversation at a time."""
    import torch

    from convert.torch_model import TorchPatchEmbed, umbrella_model

    assert read_config(directory, reference_step.MODALITIES) == reference_step.CONFIG
    params = {path: Tensor.from_array(leaf) for path, leaf in reference_step.make_params().items()}
    model = umbrella_model(json.loads((directory / "config.json").read_text()), reference_step.CONFIG, params).double()
    embeddings = next(module for module in model.modules() if isinstance(module, TorchPatchEmbed))
    batch = reference_step.make_batch()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, (name, length, targets) in enumerate(
        zip(reference_step.SHOWN, reference_step.LENGTHS, reference_step.TARGETS, strict=True)
    ):
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


def test_reference_step_matches_pytorch(tmp_path: Path) -> None:
    loss, norm = torch_step(write_description(tmp_path))
    assert (loss, norm) == (
        pytest.approx(reference_step.LOSS, rel=1e-9),
        pytest.approx(reference_step.GRAD_NORM, rel=1e-9),
    )


def test_draws_do_not_change() -> None:
    """The expected numbers are numpy 2.4's. With others, LOSS and GRAD_NORM would belong to another model."""
    assert reference_step._Draws(0).integers(1000, 4).tolist() == [259, 458, 49, 556]
    values = reference_step._Draws(0).uniform((1000,), 0.5)
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 0.5) < 0.02
    assert set(reference_step.make_params()) == set(abstract_params(reference_step.CONFIG)[1])


@pytest.fixture(scope="module")
def healthy() -> Diagnosis:
    return diagnose.diagnose()


def test_this_machine_has_no_problems(healthy: Diagnosis) -> None:
    assert healthy.problems == ()
    assert healthy.lines()[-1] == "No problems found."
    step = healthy.facts["step"]
    assert step["within"]
    assert abs(step["loss"] / reference_step.LOSS - 1) <= 1e-6
    assert abs(step["grad_norm"] / reference_step.GRAD_NORM - 1) <= 1e-6
    assert healthy.facts["versions"]["jax"] == jax.__version__
    assert len(healthy.facts["devices"]["devices"]) == jax.local_device_count()


def test_report_fits_a_screen_and_json(healthy: Diagnosis) -> None:
    lines = healthy.lines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert not jax.distributed.is_initialized()
    again = json.loads(json.dumps(healthy.to_json()))
    assert again["ok"] is True
    assert list(again) == ["ok", "problems", *diagnose._SECTIONS]


def test_wrong_gradient_is_a_problem(healthy: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = healthy.facts["step"]
    step = reference_step.StepResult(facts["loss"], facts["grad_norm"] * (1 + 2e-4), 1.0)
    monkeypatch.setattr(reference_step, "take_step", lambda device: step)
    problems: list[Problem] = []
    assert not diagnose._step(problems)["within"]
    (problem,) = problems
    assert "a training step gives loss" in problem.what


def test_check_that_raises_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problems: list[Problem]) -> Any:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    sections = dict.fromkeys(diagnose._SECTIONS, (broken, str))
    monkeypatch.setattr(diagnose, "_SECTIONS", sections)
    found = diagnose.diagnose()
    assert len(found.problems) == len(sections)
    text = "\n".join(found.lines())
    assert text.count("ImportError: libcudart.so.12: cannot open shared object file") == len(sections)


REQUIRES = {
    "umbrella-jax": ["jax>=0.10", "old>=2", "gone>=1", 'jax[cuda12]; extra == "cuda12"', 'fine; extra == "report"'],
    "jax": ["fine", 'jax-cuda12-plugin; extra == "cuda12"'],
    "jax-cuda12-plugin": [],
}
INSTALLED = {"umbrella-jax": "0.1.0", "jax": "0.11.0", "jaxlib": "0.11.0", "old": "1.9", "fine": "3"}


def installed(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    monkeypatch.setattr(diagnose, "_version", (INSTALLED | {k.replace("_", "-"): v for k, v in more.items()}).get)
    monkeypatch.setattr(diagnose.metadata, "requires", REQUIRES.get)


def test_incompatible_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, jax_cuda12_plugin="0.10.2")
    problems: list[Problem] = []
    diagnose._versions(problems)
    assert problems == [
        Problem("old is 1.9; expected >=2", "pip install 'old>=2'"),
        Problem("gone is not installed", "pip install 'gone>=1'"),
        Problem(
            "jax-cuda12-plugin 0.10.2 does not match jaxlib 0.11.0: jax does not use it",
            "pip install 'jax[cuda12]==0.11.0'",
        ),
    ]


def test_extra_of_an_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda12` requires jax with jax's own extra; jax is installed, the plugin of that extra is not."""
    extras = mock.Mock(get_all=lambda name, default: ["cuda12", "report", "dev"])
    monkeypatch.setattr(diagnose.metadata, "metadata", lambda name: extras)
    installed(monkeypatch)
    assert diagnose._extras([]) == {"cuda12": ["jax-cuda12-plugin is not installed"], "report": []}
    installed(monkeypatch, jax_cuda12_plugin="0.11.0")
    assert diagnose._extras([]) == {"cuda12": [], "report": []}


def test_a_broken_machine(tmp_path: Path) -> None:
    """Every problem is reported at once, and one SLURM task does not wait for the others."""
    (tmp_path / "file").touch()
    environment = os.environ | {
        "JAX_PLATFORMS": "cuda",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file" / "cache"),
        "HF_HUB_CACHE": str(tmp_path / "file" / "hub"),
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_LOCALID": "0",
    }
    command = f"ulimit -S -n 200 && exec {shlex.join(umbrella_command('doctor', '--json'))}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert [problem["what"].partition(":")[0] for problem in report["problems"]] == [
        "jax finds no devices",
        "HF cache",
        "200 files may be open at once; expected 1024",
        "compilation cache",
    ]
    assert all(problem["remedy"] for problem in report["problems"])
    assert report["step"] is None
    assert report["host"]["job"] == {"SLURM_JOB_ID": "17", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "packages", "has_tpu", "problem"),
    [
        ({}, ["libtpu"], True, "libtpu is installed, but jax finds no such device"),
        ({}, ["libtpu"], False, None),  # there only to compile
        ({"JAX_PLATFORMS": "cpu"}, ["libtpu"], True, None),
        ({}, [], False, None),
    ],
)
def test_unused_accelerator(
    environment: dict[str, str],
    packages: list[str],
    has_tpu: bool,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tpu, "has_chips", lambda: has_tpu)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(diagnose, "_version", lambda name: "1" if name in packages else None)
    problems = [each.what for each in diagnose._unused_accelerators("cpu")]
    assert len(problems) == (problem is not None)
    assert all(text.startswith(str(problem)) for text in problems)


def test_low_memory_and_full_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "_cgroups", lambda: [(3 * diagnose.GIB, 2 * diagnose.GIB)])
    monkeypatch.setattr(diagnose.shutil, "disk_usage", lambda path: mock.Mock(free=1 << 20))
    problems: list[Problem] = []
    assert diagnose._host(problems)["memory"] == 3 * diagnose.GIB
    diagnose._disk(problems)
    assert [problem.what.partition(":")[0] for problem in problems] == ["host memory", "runs", "TMPDIR", "HF cache"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    problems.clear()
    diagnose._disk(problems)
    assert [problem.what.partition(":")[0] for problem in problems] == ["runs", "TMPDIR"]
