"""`train --seeds` makes an ordinary run per seed, and `score` compares them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import small_run
from tests.helpers.small_run import World, numbers, umbrella
from umbrella_jax import cli
from umbrella_jax.inference.processor import Processor
from umbrella_jax.run import preparation, seeds
from umbrella_jax.training import optimizer
from umbrella_jax.training.step import jit_train_step


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world_of_one_shape(tmp_path_factory.mktemp("world"))


FLAGS = ["--epochs", 2, "--set", "train.eval_steps=2", "--set", "train.save_steps=2"]


@pytest.fixture(scope="module")
def printed(world: World) -> str:
    """Train seeds 1 and 2 into `runs`, and return stdout."""
    return umbrella(*world.train_flags(world.root / "runs", *FLAGS, "--eval-data", world.eval, "--seeds", "1,2"))


@pytest.fixture(scope="module")
def runs(printed: str, world: World) -> Path:
    return world.root / "runs"


def test_each_seed_is_the_run_that_it_would_be_alone(runs: Path, world: World, tmp_path: Path) -> None:
    """Although the second uses data and programs of the first."""
    flags = [*FLAGS, "--eval-data", world.eval, "--set", "seed=2"]
    umbrella(*world.train_flags(tmp_path / "alone", *flags))
    assert numbers(runs / "seed-2") == numbers(tmp_path / "alone")
    assert numbers(runs / "seed-1") != numbers(tmp_path / "alone")
    ours, theirs = small_run.trained(runs / "seed-2"), small_run.trained(tmp_path / "alone")
    assert all(leaf.tobytes() == theirs[path].tobytes() for path, leaf in ours.items())
    names = [{path.relative_to(run) for path in run.glob("*")} for run in (runs / "seed-2", tmp_path / "alone")]
    assert names[0] == names[1]


def test_seeds_share_data_and_programs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "make_optimizer", optimizer.make_optimizer)  # without the suite's own sharing
    reads, compiled = list[Path](), list[int]()
    after = recorded(Processor.datasets, lambda _, data: reads.append(data.train))
    monkeypatch.setattr(Processor, "datasets", after)
    after = recorded(seeds.train_sharing, lambda *_: compiled.append(jit_train_step()._cache_size()))
    monkeypatch.setattr(seeds, "train_sharing", after)
    umbrella(*world.train_flags(tmp_path / "runs", "--epochs", 1, "--seeds", "3,4"))
    assert reads == [str(world.train)]
    assert compiled == [compiled[0]] * 2


def test_the_start_is_printed_once_and_is_in_each_log(printed: str, runs: Path) -> None:
    assert (printed.count("base: base"), printed.count("compiling for")) == (1, 1)
    for seed in (1, 2):
        assert f"steps, into {runs / f'seed-{seed}'}" in (runs / f"seed-{seed}" / "log.txt").read_text()


def recorded(function: Callable[..., Any], record: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which hands its arguments to `record` after each call."""

    def call(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        record(*args)
        return result

    return call


def test_resume_trains_what_is_unfinished(runs: Path, world: World, tmp_path: Path) -> None:
    """Seed 1 is finished, seed 2 was killed after step 2, seed 3 never began."""
    again = shutil.copytree(runs, tmp_path / "again")
    shutil.rmtree(again / "seed-2" / "checkpoints" / "4")
    log = again / "seed-2" / "log.txt"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]))
    finished = (again / "seed-1" / "log.txt").read_bytes()
    words = world.train_flags(again, *FLAGS, "--eval-data", world.eval, "--seeds", "1,2,3")
    assert f"{again}/seed-1: holds a run; continue it with --resume" in umbrella(*words, code=2)
    assert "seed 2, as an example of 2\n" in umbrella(*words, "--resume", "--dry-run")
    out = umbrella(*words, "--resume")
    assert f"seed 1: finished: {again}/seed-1\nseed 2, 1 of 2: {again}/seed-2\n" in out
    assert "resume: from step 2" in out
    assert f"seed 3, 2 of 2: {again}/seed-3\n" in out
    assert (again / "seed-1" / "log.txt").read_bytes() == finished
    assert numbers(again / "seed-2") == numbers(runs / "seed-2")
    assert "every seed is finished" in umbrella(*words, "--resume")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "3", "--set", "seed=3"], "--set seed: already given by --seeds; give one of them"),
        (["--set", "seed=3"], "/runs: holds the runs of several seeds; continue them with --seeds 1,2 --resume"),
    ],
)
def test_seeds_that_are_refused(runs: Path, world: World, flags: list[str], message: str) -> None:
    assert message in umbrella(*world.train_flags(runs, *flags), code=2)


@pytest.mark.parametrize(
    ("text", "message"), [("1,1", "a seed is given twice: 1,1"), ("1-5", "expected whole numbers separated by commas")]
)
def test_lists_that_are_refused(
    world: World, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(world.train_flags(tmp_path, "--seeds", text))
    assert message in capsys.readouterr().err


def test_several_seeds_in_a_run_are_refused(runs: Path, world: World) -> None:
    run = runs / "seed-1"
    assert f"{run}: holds a run; several seeds need" in umbrella(*world.train_flags(run, "--seeds", "1"), code=2)


def test_score_compares_the_seeds(runs: Path) -> None:
    values = [numbers(runs / f"seed-{seed}")[-1]["eval_accuracy"] for seed in (1, 2)]
    found = json.loads(umbrella("score", runs, "--json"))["overall"]["accuracy"]
    assert found["mean"] == pytest.approx(sum(values) / 2)
    assert list(found["seeds"].values()) == values
