"""Killed, or on a full disk, at every file event of a command: the same command then ends well, or says why not.

One run of a command gives every state that `kill -9` could leave: before each event that changes a file, the folder is
copied as it is. A full disk is an ENOSPC at one event and at all that follow.
"""

import errno
import hashlib
import io
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import small_run
from tests.helpers.small_run import World, read_lines
from umbrella_jax.cli import main

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
GROWS = ("open", "os.mkdir", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
UMASK = os.umask(0)
os.umask(UMASK)
ODD = "lr=[1,2] *?ü#%41 {x}"
"""A folder's name with all that could be taken for something else; all paths of the commands lead through it."""
Event = Callable[[str, Path], None]
_heard: Event | None = None
_busy = threading.RLock()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is None or event not in ("open", *CHANGES):
        return
    if event == "open" and not (len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & WRITES):
        return
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    path = Path(os.fsdecode(path))
    descriptor = arguments[-1]
    if not path.is_absolute() and event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(descriptor, int):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"), path) if descriptor >= 0 else path.absolute()
    _heard(event, path.absolute())


sys.addaudithook(_hook)  # which stays as long as the process does


@contextmanager
def hearing(event: Event) -> Iterator[None]:
    global _heard
    _heard = event
    try:
        yield
    finally:
        _heard = None


def state_of(root: Path) -> str:
    """A hash of all files below a folder, and of their names."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders.sort()
        digest.update(f"{os.path.relpath(folder, root)}/".encode())
        for name in sorted(names):
            try:
                content = Path(folder, name).read_bytes()
            except FileNotFoundError:  # another thread was faster
                continue
            digest.update(f"{name}:{hashlib.sha256(content).hexdigest()}".encode())
    return digest.hexdigest()


def run(*words: object) -> tuple[int, str]:
    """Exit code of `umbrella-jax WORDS` in this process, and what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with small_run.on(1), redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, err.getvalue()


@dataclass
class Case:
    """A command that is cut off, within a folder of its own."""

    command: Callable[[Path], list[object]]
    """In that folder."""
    again: Callable[[Path], list[object]]
    """What goes on with what is left."""
    read: Callable[[Path], None]
    """Asserts that all commands read the result."""
    prepare: Callable[[Path], None] = lambda place: place.mkdir()


def killed_states(case: Case, place: Path, states: Path) -> tuple[int, list[Path]]:
    """How many events the command has, and a copy of each different state before one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    case.prepare(place)
    events, seen, kept = 0, set[str](), list[Path]()

    def keep(event: str, path: Path) -> None:
        nonlocal events, _heard_once
        if not path.is_relative_to(place) or _heard_once:
            return
        with _busy:
            _heard_once = True
            try:
                events += 1
                state = state_of(place)
                if state not in seen:
                    seen.add(state)
                    kept.append(states / str(events))
                    shutil.copytree(place, kept[-1], ignore=None, dirs_exist_ok=False)
            except (FileNotFoundError, shutil.Error):  # another thread was faster
                shutil.rmtree(states / str(events), ignore_errors=True)
                kept[:] = [one for one in kept if one.exists()]
            finally:
                _heard_once = False

    _heard_once = False
    with hearing(keep):
        code, err = run(*case.command(place))
    assert code == 0, err
    case.read(place)
    return events, kept


def recovers(case: Case, place: Path) -> None:
    """What is left in `place` is gone on with, or refused with a reason and begun anew."""
    code, err = run(*case.again(place))
    if code == 2 and ("already exists" in err or "directory is not empty" in err):  # whole, all but its tidying up
        code = 0
    elif code == 2:  # a reason, such as that there is nothing to go on with
        assert str(place) in err
        code, err = run(*case.command(place))
    assert code == 0, f"{place}: {err}"
    assert "Traceback" not in err
    case.read(place)


def disk_full_at(case: Case, place: Path, number: int) -> tuple[bool, int, str]:
    """Whether the command came to the event of this number, its exit code and what it said."""
    place.parent.mkdir(parents=True, exist_ok=True)
    case.prepare(place)
    count = 0

    def fail(event: str, path: Path) -> None:
        nonlocal count
        if path.is_relative_to(place) and event in GROWS:
            count += 1
            if count > number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with hearing(fail):
        code, err = run(*case.command(place))
    return count > number, code, err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = small_run.make_world(tmp_path_factory.mktemp("world") / ODD)
    small_run.keep(world.train, "one")
    small_run.keep(world.eval, "eval-one")
    return world


@pytest.fixture(scope="module")
def trained(world: World) -> Path:
    out = world.root / "trained"
    code, err = run(*train_words(world, out))
    assert code == 0, err
    return out


def train_words(world: World, out: Path, *more: object) -> list[object]:
    return [*world.train_flags(out, "--eval-data", world.eval, "--epochs", 2, "--set", "train.save_steps=1"), *more]


@pytest.fixture(scope="module")
def cases(world: World, trained: Path) -> dict[str, Case]:
    predictions = (trained / "predictions" / "step_2.jsonl").read_bytes()

    def read_run(place: Path) -> None:
        out = place / "run"
        assert small_run.numbers(out) == small_run.numbers(trained)
        assert (out / "predictions" / "step_2.jsonl").read_bytes() == predictions
        for words in (
            ["predict", out, "--data", world.eval, "--image-root", world.root / "scans", "--out", place / "p.jsonl"],
            ["convert", "to-hf", out, place / "export"],
            ["report", out],
            ["score", out],
            ["runs", place],
        ):
            code, err = run(*words)
            assert code == 0, err

    def read_model(place: Path) -> None:
        out = place / "out"
        code, err = run("generate", out, "Which sex?", "--image", f"T1={world.root}/scans/0.nii.gz")
        assert code == 0, err
        assert [path.name for path in place.iterdir()] == ["out"]

    def read_predictions(place: Path) -> None:
        assert [row["task_id"] for row in read_lines(place / "p.jsonl")] == ["eval-one"]
        assert {path.name for path in place.iterdir()} <= {"p.jsonl", "p.jsonl.part"}
        code, err = run("score", place / "p.jsonl")
        assert code == 0, err

    def read_page(place: Path) -> None:
        assert (place / "run" / "report.html").read_text().rstrip().endswith("</html>")

    def cache_words(place: Path) -> list[object]:
        return ["data", "cache", "--config", world.config, "--train-data", world.train, "--cache", place]

    def read_cache(place: Path) -> None:
        code, err = run(*cache_words(place), "--verify")
        assert code == 0, err

    def same(words: Callable[[Path], list[object]], read: Callable[[Path], None], **more: Any) -> Case:
        return Case(words, words, read, **more)

    data = ["--data", world.eval, "--image-root", world.root / "scans"]
    export = exported(world, trained)
    return {
        "train": Case(
            lambda place: train_words(world, place / "run"),
            lambda place: train_words(world, place / "run", "--resume"),
            read_run,
        ),
        "from-hf": same(
            lambda place: ["convert", "from-hf", export, place / "out", "--config", world.config], read_model
        ),
        "to-hf": same(lambda place: ["convert", "to-hf", trained, place / "out"], read_model),
        "predict": Case(
            lambda place: ["predict", trained, *data, "--out", place / "p.jsonl"],
            lambda place: ["predict", trained, *data, "--out", place / "p.jsonl", "--resume"],
            read_predictions,
        ),
        "report": same(
            lambda place: ["report", place / "run"],
            read_page,
            prepare=lambda place: shutil.copytree(trained, place / "run") and None,
        ),
        "cache": same(cache_words, read_cache),
    }


def exported(world: World, trained: Path) -> Path:
    """Weights that are trained, for whatever answers."""
    out = world.root / "exported"
    code, err = run("convert", "to-hf", trained, out)
    assert code == 0, err
    return out


def check(case: Case, tmp_path: Path, *, kills: slice, fills: slice) -> str:
    events, states = killed_states(case, tmp_path / "once", tmp_path / "states") if kills != slice(0) else (0, [])
    for state in states[kills]:
        recovers(case, state)
    number, tried = fills.start or 0, 0
    while fills.stop is None or number < fills.stop:
        place = tmp_path / f"full{number}"
        reached, code, err = disk_full_at(case, place, number)
        if not reached:
            break
        assert code in (0, 1, 2), err
        if code:
            assert "No space left on device" in err, (number, err)
            assert "Traceback" not in err, (number, err)
            assert "RESOURCE_EXHAUSTED" not in err
        recovers(case, place)
        shutil.rmtree(place)
        number, tried = number + (fills.step or 1), tried + 1
    return f"{events} events, {len(states)} states, {tried} full disks"


NAMES = ("train", "from-hf", "to-hf", "predict", "report", "cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_at_every_event(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    print(name, check(cases[name], tmp_path, kills=slice(None), fills=slice(None)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("train", "from-hf") else name for name in NAMES]
)
def test_at_some_events(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    """Of the same, a few. tests/run/test_reliability.py kills runs; `to-hf` writes a directory as `from-hf` does."""
    check(cases[name], tmp_path / ODD, kills=slice(4, None, 20), fills=slice(3, 4))


def test_participant_data_are_readable_only_by_their_owner(trained: Path) -> None:
    """Whatever the umask lets others read; a run's settings, metrics and weights are not hidden."""
    private = {"inputs.json", "counts.json", "log.txt", "predictions/step_2.jsonl"}
    modes = {path.relative_to(trained).as_posix(): path.stat().st_mode & 0o777 for path in trained.rglob("*")}
    assert {name: modes[name] for name in private} == dict.fromkeys(private, 0o600)
    assert modes["predictions"] == 0o700
    assert modes["config.yaml"] == modes["metrics.jsonl"] == 0o666 & ~UMASK


@pytest.mark.slow
def test_other_commands_take_an_odd_name(world: World, trained: Path, tmp_path: Path) -> None:
    place = tmp_path / ODD
    for subject in range(8):
        scan = place / f"bids/sub-{subject}/anat/sub-{subject}_T1w.nii.gz"
        small_run.write_volume(scan, small_run.VOLUME_SHAPES["T1"], seed=subject)
    table = "".join(f"sub-{subject}\t{'MF'[subject % 2]}\n" for subject in range(8))
    (place / "bids" / "participants.tsv").write_text(f"participant_id\tsex\n{table}")
    data = ["--config", world.config, "--train-data", world.train, "--eval-data", world.eval]
    image, answer = f"T1={world.root}/scans/0.nii.gz", ("--answer", "left.")
    export = place / "export"
    closed = ["--base", world.base, "--set", "evaluation.tasks={T1: {kind: classification, answers: [left., right.]}}"]
    for words in (
        ["data", "from-bids", place / "bids", place / "conversations", "--target", "sex"],
        ["data", "validate", *data, "--base", world.base, "--html", place / "page.html"],
        ["inspect", "--config", world.config, "--base", world.base],
        ["plan", "--config", world.config, "--base", world.base, "--devices", "h100x8", "--flops", 1e12],
        ["convert", "to-hf", trained, export],
        ["convert", "verify", export, trained, "--no-logits"],
        ["explain", export, "Which sex?", "--image", image, "--method", "gradient", *answer, "--out", place / "maps"],
        ["runs", world.root, "--plot", place / "runs.svg"],
        ["baseline", *data, *closed, "--out", place / "baseline", "--only", "probe"],
    ):
        code, err = run(*words)
        assert code == 0, (words, err)
    assert {"conversations", "page.html", "export", "maps", "runs.svg", "baseline"} <= {p.name for p in place.iterdir()}
    read = ["data", "validate", "--config", world.config, "--train-data", place / "conversations" / "train.json"]
    code, err = run(*read, "--image-root", place / "bids")
    assert code == 0, err
