"""Metrics reach TensorBoard and Weights & Biases, which are closed however the run ends."""

import signal
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.helpers.small_run import modalities
from umbrella_jax.config.schema import ModelConfig, RunConfig, TrainConfig
from umbrella_jax.errors import Interrupted, RunError
from umbrella_jax.run.loggers import missing_loggers, open_loggers
from umbrella_jax.rundir import Line

LINES: list[Line] = [
    {"step": 1, "loss": 0.5, "learning_rate": 1e-3},
    {"step": 2, "loss": None, "learning_rate": 2e-3, "skipped": 1, "eval_accuracy/T1": 0.75},
]


def config(**train: bool) -> RunConfig:
    return RunConfig(model=ModelConfig(modalities=modalities()), train=TrainConfig(**train))  # type: ignore[arg-type]


def write(settings: RunConfig, out: Path, lines: list[Line], step: int = 0, end: BaseException | None = None) -> None:
    with open_loggers(settings, out, step) as log:
        assert log is not None
        for line in lines:
            log(line)
        if end is not None:
            raise end


def events(out: Path) -> list[Event]:
    """Read the events of all files in the order of writing. A record is length, its checksum, event, its checksum."""
    found = []
    for file in sorted((out / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(out: Path) -> list[tuple[int, str, float]]:
    return [(e.step, v.tag, v.simple_value) for e in events(out) for v in e.summary.value]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the package by one that records its calls."""
    calls: list[Any] = []

    class Run:
        def log(self, line: Line, step: int) -> None:
            calls.append((step, line))

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    def init(dir: str, config: dict[str, Any]) -> Run:
        calls.append((dir, config["train"]["wandb"]))
        return Run()

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_none(tmp_path: Path) -> None:
    with open_loggers(config(), tmp_path, 0) as log:
        assert log is None
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    write(config(tensorboard=True), tmp_path, LINES)
    assert scalars(tmp_path) == [
        (1, "loss", 0.5),
        (1, "learning_rate", pytest.approx(1e-3)),
        (2, "learning_rate", pytest.approx(2e-3)),
        (2, "skipped", 1),
        (2, "eval_accuracy/T1", 0.75),
    ]


@pytest.mark.parametrize("end", [Interrupted(signal.SIGTERM, "saved"), RunError("not finite"), KeyboardInterrupt()])
def test_all_lines_are_written_however_a_run_ends(end: BaseException, tmp_path: Path, wandb: list[Any]) -> None:
    with pytest.raises(type(end)):
        write(config(tensorboard=True, wandb=True), tmp_path, LINES, end=end)
    assert len(scalars(tmp_path)) == 5
    assert wandb[-1] == (0 if isinstance(end, Interrupted) else 1)


def test_a_resumed_run_replaces_lines_after_its_checkpoint(tmp_path: Path) -> None:
    write(config(tensorboard=True), tmp_path, LINES)
    write(config(tensorboard=True), tmp_path, LINES[1:], step=1)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [1, 2]  # TensorBoard ignores these and later steps of the earlier file


def test_wandb(tmp_path: Path, wandb: list[Any]) -> None:
    write(config(wandb=True), tmp_path, LINES)
    assert wandb == [
        (str(tmp_path), True),
        (1, {"loss": 0.5, "learning_rate": 1e-3}),
        (2, {"learning_rate": 2e-3, "skipped": 1, "eval_accuracy/T1": 0.75}),
        0,
    ]


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_loggers(config()) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_loggers(config()) == []
    assert missing_loggers(config(tensorboard=True, wandb=True)) == [
        "train.tensorboard: tensorboardX is not installed; pip install 'umbrella-jax[tensorboard]', or leave it out",
        "train.wandb: wandb is not installed; pip install 'umbrella-jax[wandb]', or --no-wandb",
    ]
