"""`train --resume` with another number of epochs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import small_run
from tests.helpers.small_run import World, numbers, read_config, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.load import parse_config
from umbrella_jax.config.schema import to_dict
from umbrella_jax.errors import ConfigError
from umbrella_jax.run.resumption import _describe_new_length


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world_of_one_shape(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_a_longer_run_of_constant_rate_is_as_if_planned_so(world: World, tmp_path: Path) -> None:
    """Also if the first run kept its best and was evaluated at its end."""
    longer, planned = tmp_path / "longer", tmp_path / "planned"
    flags = ["--eval-data", world.eval, "--set", "train.schedule=constant", "--set", "train.eval_steps=3"]
    flags += ["--set", "train.eval_samples=2", "--set", "train.keep_best=1", "--set", "train.best_metric=eval_loss"]
    umbrella(*world.train_flags(longer, *flags, "--epochs", 2))
    said = umbrella(*world.train_flags(longer, *flags, "--epochs", 4, "--resume"))
    line = "resume: 4 epochs instead of 2: 8 updates instead of 4; the learning rate at step 4 stays 0.01"
    assert f"resume: from step 4 {line} " in " ".join(said.split())
    assert line.partition(";")[0] in (longer / "log.txt").read_text()
    assert read_config(longer / "config.yaml")["train"]["epochs"] == 4
    umbrella(*world.train_flags(planned, *flags, "--epochs", 4))
    ours, theirs = numbers(longer), numbers(planned)
    assert len(ours) == 8
    assert {name for name in ours[3] if name.startswith("eval_")}, "the end of the shorter run was evaluated"
    for one, other in zip(ours, theirs, strict=True):
        common = {name for name in one.keys() & other.keys() if not name.startswith("final_")} - {"steps"}
        assert {"loss", "grad_norm", "learning_rate"} <= common
        assert {name: one[name] for name in common} == {name: other[name] for name in common}
    assert [line["steps"] for line in ours] == [4] * 4 + [8] * 4
    (ours_8, theirs_8) = (trained_at(run, 8) for run in (longer, planned))
    assert all(leaf.tobytes() == theirs_8[path].tobytes() for path, leaf in ours_8.items())


def trained_at(run: Path, step: int) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in Checkpoint.open(run, step=step).trained().items()}


def meta(num_steps: int, epochs: float, **train: Any) -> dict[str, Any]:
    """Meta of a checkpoint, as far as the length of a run is concerned."""
    settings: dict[str, Any] = {"model": {"modalities": small_run.MODALITIES}, "train": {"epochs": epochs, **train}}
    return {"config": to_dict(parse_config(settings)), "num_steps": num_steps}


@pytest.mark.parametrize(
    ("train", "step", "epochs", "expected"),
    [
        ({}, 200, 20, "400 updates instead of 200; the learning rate at step 200 rises from 0 to 2.5e-05"),
        ({}, 100, 20, "400 updates instead of 200; the learning rate at step 100 rises from 2.5e-05 to 3.75e-05"),
        ({}, 60, 5, "100 updates instead of 200; the learning rate at step 60 falls from 3.5e-05 to 2e-05"),
        ({"schedule": "cosine"}, 200, 20, "the learning rate at step 200 rises from 0 to 2.5e-05"),
        ({"warmup_ratio": 0.1}, 20, 20, "falls from 5e-05 to 2.5e-05; the warm-up lasts 40 updates instead of 20"),
        ({"schedule": "constant", "warmup_steps": 20}, 150, 20, "the learning rate at step 150 stays 5e-05"),
    ],
)
def test_the_new_length_and_its_effect_are_printed(
    train: dict[str, Any], step: int, epochs: float, expected: str
) -> None:
    before, now = meta(200, 10, **train), meta(int(20 * epochs), epochs, **train)
    line = _describe_new_length(Path("run"), before, now, step, 0)
    assert line is not None
    assert line.startswith(f"resume: {epochs} epochs instead of 10: ")
    assert line.endswith(expected)
    assert _describe_new_length(Path("run"), before, before, step, 0) is None


def test_a_length_that_is_reached_already_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="5 epochs are 100 updates, and 100 are made; expected more, or the 10 epochs"
    ):
        _describe_new_length(Path("run"), meta(200, 10), meta(100, 5), 100, 0)
