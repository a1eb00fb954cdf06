"""`umbrella-jax runs`, on directories as runs leave them."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_run import MODALITIES, read_config, write_config
from umbrella_jax.cli import main
from umbrella_jax.config.load import dump_config, parse_config
from umbrella_jax.io.files import locked
from umbrella_jax.report.compare_runs import compare, find_runs

SEX, AGE = "eval_accuracy/sex", "eval_mae/age"


def lines(count: int, steps: int, evaluated: Sequence[str] = (), every: int = 2) -> list[dict[str, Any]]:
    """Make metrics lines; step S has the values S/10, S/10 + 1, …"""
    made: list[dict[str, Any]] = [{"step": i, "steps": steps, "loss": 10 / i} for i in range(1, count + 1)]
    for line in made[every - 1 :: every]:
        line |= {name: line["step"] / 10 + n for n, name in enumerate(evaluated)}
    return made


def write_run(path: Path, metrics: Sequence[dict[str, Any]], log: str, **settings: Any) -> Path:
    """A directory without weights."""
    for name in ("checkpoints", "model", "predictions"):
        (path / name).mkdir(parents=True)
    data = {"model": {"modalities": MODALITIES}, "output_dir": str(path), **settings}
    (path / "config.yaml").write_text(dump_config(parse_config(data)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (path / "log.txt").write_text("".join(f"2026-01-01 10:00:00+00:00 {line}\n" for line in log.split("\n")))
    (path / ".lock").write_text("process 1 on here")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs: one that finished, one that a signal ended, after it was killed, and one that is running."""
    both = ["eval_loss", SEX, f"{SEX}/male", AGE, "eval_rmse/age"]
    write_run(tmp_path / "a", lines(6, 6, both), "started: x\nfinished:", seed=1)
    log = "started: x\nstarted: x\nWARNING: y\nended: SIGTERM: saved at step 4 of 8"
    write_run(tmp_path / "deep" / "b", lines(4, 8, ["eval_loss", SEX]), log, seed=2)
    write_run(tmp_path / "c", lines(1, 6), "started: x", seed=1, train={"epochs": 2.0})
    with (tmp_path / "c" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "lo')  # which is being written
    return tmp_path


@pytest.fixture
def running(folder: Path) -> Iterator[Path]:
    """While it is held as a run holds it."""
    file = os.open(folder / "c" / ".lock", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    yield folder
    os.close(file)


def test_states_steps_and_figures(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(running), "--json"]) == 0
    runs = {run["run"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert list(runs) == ["a", "c", "deep/b"]
    about = {name: (run["state"], run["why"], run["step"], run["steps"]) for name, run in runs.items()}
    assert about == {
        "a": ("finished", "", 6, 6),
        "c": ("running", "", 1, 6),
        "deep/b": ("stopped", "SIGTERM: saved at step 4 of 8", 4, 8),
    }
    # the loss and each headline that both evaluated runs share, at the last step of each
    assert runs["a"]["metrics"] == {"loss": 10 / 6, "eval_loss": 0.6, SEX: 1.6}
    assert runs["deep/b"]["metrics"] == {"loss": 2.5, "eval_loss": 0.4, SEX: 1.4}
    assert runs["c"]["metrics"] == {"loss": 10.0, "eval_loss": None, SEX: None}
    assert runs["a"]["config"] == {"train.epochs": 1.0, "seed": 1}
    assert runs["c"]["config"] == {"train.epochs": 2.0, "seed": 1}


def test_the_table(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(running), "--metric", AGE]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["evaluated", "eval_mae/"],
        ["run", "state", "step", "loss", "at", "step", "age"],
        ["a", "finished", "6", "of", "6", "1.667", "6", "3.6"],
        ["c", "running", "1", "of", "6", "10", "–", "–"],
        ["deep/b", "stopped", "4", "of", "8", "2.5", "4", "–"],
        [],
        ["deep/b:", "stopped:", "SIGTERM:", "saved", "at", "step", "4", "of", "8"],
        [],
        ["configs", "differ", "in"],
        ["a", "c", "deep/b"],
        ["train.epochs", "1.0", "2.0", "1.0"],
        ["seed", "1", "1", "2"],
    ]


def test_differences_of_many_runs_are_listed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column per run would not fit 80 columns."""
    for number in range(9):
        epochs = float(number % 2 + 1)
        write_run(tmp_path / f"a_run_{number}", lines(1, 1), "started: x\nfinished:", train={"epochs": epochs})
    assert main(["runs", str(tmp_path)]) == 0
    _, _, differences = capsys.readouterr().out.partition("configs differ in\n")
    assert differences == (
        "train.epochs\n  1.0: a_run_0, a_run_2, a_run_4, a_run_6, a_run_8\n  2.0: a_run_1, a_run_3, a_run_5, a_run_7\n"
    )


def test_figures_are_of_the_step_that_score_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best of a run that keeps its best, on all evaluation data once its end has evaluated it on all."""
    train = {"keep_best": 1, "best_metric": "eval_loss"}
    metrics = lines(6, 6, ["eval_loss", SEX])
    metrics[1] |= {"final_loss": 0.5, "final_accuracy/sex": 0.25}  # worse than step 4 was on some of the data
    write_run(tmp_path, metrics, "started: x\nfinished:", train=train)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["evaluated_step"] == 2
    assert found["metrics"] == {"loss": 10 / 6, "eval_loss": 0.5, SEX: 0.25}


def test_a_refused_directory_is_not_a_run(folder: Path) -> None:
    """A refused run left only a log; while a process holds the directory, the run is starting."""
    (folder / "d").mkdir()
    (folder / "d" / "log.txt").write_text("2026-01-01 10:00:00+00:00 started: x\n")
    assert [run.name for run in find_runs(folder)] == ["a", "c", "deep/b"]
    with locked(folder / "d"):
        assert [(run.name, run.state) for run in find_runs(folder)][2] == ("d", "running")


def test_a_killed_run_has_no_last_word(folder: Path) -> None:
    """Nobody holds its lock any more; how an earlier process ended is not how this one did."""
    (run,) = find_runs(folder / "c")
    assert (run.name, run.state) == ("c", "stopped")
    assert "killed" in run.stop_reason
    log = folder / "deep" / "b" / "log.txt"
    log.write_text(log.read_text() + "2026-01-01 10:00:00+00:00 started: x\n")
    (run,) = find_runs(folder / "deep")
    assert run.state == "stopped"
    assert "killed" in run.stop_reason


@pytest.mark.parametrize("what", ["metrics", "no text", "config", "no config"])
def test_damage_is_named(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And the other runs are compared all the same."""
    if what == "metrics":
        (folder / "a" / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        expected = f"{folder / 'a' / 'metrics.jsonl'}:2: not a line of metrics"
    elif what == "no text":
        (folder / "a" / "metrics.jsonl").write_bytes(b'\xff\xfe\n{"step": 3}\n')
        expected = f"{folder / 'a' / 'metrics.jsonl'}:1: not a line of metrics"
    elif what == "config":
        settings = read_config(folder / "a" / "config.yaml")
        write_config(folder / "a" / "config.yaml", settings | {"sead": 2})
        expected = f"{folder / 'a' / 'config.yaml'}: sead: no such key"
    else:
        (folder / "a" / "config.yaml").unlink()
        expected = f"{folder / 'a' / 'config.yaml'}: not found"
    assert main(["runs", str(folder)]) == 0
    out = capsys.readouterr().out
    assert ["a", "damaged"] in [line.split()[:2] for line in out.splitlines()]
    text = " ".join(out.split())
    assert f"a: damaged: {expected}" in text
    assert all(len(line) <= 80 for line in out.splitlines() if str(folder) not in line)
    assert "deep/b" in out


def test_refuses_folders_metrics_and_plots_that_do_not_exist(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["runs", str(tmp_path / "empty")], "no run in it"),
        (
            ["runs", str(folder), "--metric", "eval_f1/sex"],
            "--metric eval_f1/sex: no run has it; expected one of eval_loss, ",
        ),
        (["runs", str(folder), "--plot", str(tmp_path / "a.pdf")], "ends with .svg or .png"),
        (["runs", str(folder), "--plot", str(tmp_path / "none" / "a.svg")], "a directory that exists"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_curves(folder: Path, suffix: str) -> None:
    """The picture contains the names of all runs."""
    file = folder / f"curves{suffix}"
    assert main(["runs", str(folder), "--plot", str(file)]) == 0
    content = file.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
        return
    text = content.decode()
    for name in ("a", "c", "deep/b", "accuracy/sex"):
        assert f"<!-- {name} -->" in text
    shutil.rmtree(folder / "c")
    assert main(["runs", str(folder), "--plot", str(file)]) == 2  # never overwritten
    file.unlink()
    assert main(["runs", str(folder), "--plot", str(file)]) == 0
    assert "<!-- c -->" not in file.read_text()


def test_a_metric_of_its_own_is_a_headline(folder: Path) -> None:
    """A task with neither accuracy nor mae has its first metric as headline."""
    shutil.rmtree(folder / "deep")
    (folder / "a" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines(6, 6, ["eval_r2/age"])))
    assert compare(find_runs(folder)).metrics == ("eval_r2/age",)
