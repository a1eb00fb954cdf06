"""A run that is killed, stopped or out of disk space resumes to the same result as an undisturbed run.

docs/reliability.md lists the promises, test by test.
"""

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.helpers import small_run
from tests.helpers.small_run import World, numbers, parameters, umbrella, umbrella_command
from umbrella_jax import cli
from umbrella_jax.errors import ConfigError, Interrupted
from umbrella_jax.io.files import locked, write_whole
from umbrella_jax.run.resumption import MAY_CHANGE

ROOT = Path(__file__).parents[2]
STEPS, SAVE, EVAL = 36, 3, 24
FLAGS = ["--epochs", STEPS // 2, "--set", f"train.save_steps={SAVE}"]  # steps with one scan, and with runs
TO_EVALUATE = [
    "--set",
    f"train.eval_steps={EVAL}",
    "--set",
    "train.best_metric=eval_loss",
    "--set",
    "train.keep_best=1",
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return small_run.process_environment() | paths


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with few batch shapes, because every process compiles each of them."""
    world = small_run.make_world(tmp_path_factory.mktemp("world"), train={"max_new_tokens": 8})
    small_run.keep(world.train, "one", "run", "text")
    small_run.keep(world.eval, "eval-run")
    return world


def train_words(world: World, out: Path, *flags: object) -> list[str]:
    """Return the words of `umbrella-jax train` into `out`."""
    return world.train_flags(out, *FLAGS, "--eval-data", world.eval, *TO_EVALUATE, *flags)


Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def begin(world: World, environment: dict[str, str]) -> Begin:
    """`begin(out, *flags)` starts `umbrella-jax train` in a process; `inside` is as in `child`."""

    def start(out: Path, *flags: object, inside: str = "nothing") -> "subprocess.Popen[str]":
        words = train_words(world, out, *flags)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.run.test_reliability", inside, *words]
        # with the suite's devices, so that its programs are compiled already
        simulated = {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
        return subprocess.Popen(command, env=environment | simulated, cwd=ROOT, **pipes)

    return start


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """Return the undisturbed run."""
    umbrella(*train_words(world, world.root / "run"))
    return world.root / "run"


def end(process: "subprocess.Popen[str]", code: int) -> str:
    """Wait for a process, check its exit code and return its stderr."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return err


def child(inside: str, words: Sequence[str]) -> int:
    """Run `umbrella-jax WORDS`, and disturb it.

    `save:N` kills it the N-th time that a save touches a file. `disk:N` limits files to N bytes from the first time on,
    like a full disk.
    """
    what, _, number = inside.partition(":")
    left = int(number) if what == "save" else 1

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename") and "orbax-checkpoint-tmp" in str(arguments[0]):
            left -= 1
            if left == 0 and what == "save":
                os.kill(os.getpid(), signal.SIGKILL)
            elif left == 0 and what == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))

    sys.addaudithook(count)
    with small_run.on(devices=1):
        return cli.main(words)


def assert_same_run(out: Path, run: Path) -> None:
    assert numbers(out) == numbers(run)
    found, expected = parameters(out), parameters(run)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].tobytes() == leaf.tobytes(), path


def wait_for(ended: Callable[[], object], out: Path, step: int, before: int | None = None) -> None:
    """Wait until a run has written `step` lines or has `ended`.

    `before` is the `inode` of an earlier run's lines, which this run replaces with a new file.
    """
    metrics = out / "metrics.jsonl"
    while not ended() and (inode(out) in (None, before) or metrics.read_bytes().count(b"\n") < step):
        time.sleep(0.001)


def inode(out: Path) -> int | None:
    """Return the inode of `metrics.jsonl`, None if there is no such file yet."""
    metrics = out / "metrics.jsonl"
    return metrics.stat().st_ino if metrics.exists() else None


@pytest.mark.slow
def test_killed_again_and_again_it_is_the_same_run(world: World, begin: Begin, run: Path) -> None:
    """It is killed by SIGTERM, and by `kill -9` between steps, within steps and during saves."""
    rng, out = random.Random(10), world.root / "killed"
    ends = [*["SIGTERM", "SIGKILL", "save"] * 3, "SIGKILL"]
    for number, kind in enumerate(ends):
        resume, before = [] if number == 0 else ["--resume"], inode(out)
        if kind == "save":
            process = begin(out, *resume, inside=f"save:{rng.randrange(1, 40)}")
        else:
            process = begin(out, *resume)
            step = round((number + rng.random()) * (STEPS - 6) / len(ends))
            wait_for(lambda running=process: running.poll() is not None, out, step, before)
            time.sleep(rng.random() * 0.01)
            process.send_signal(getattr(signal, kind))
        err = end(process, 143 if kind == "SIGTERM" else -signal.SIGKILL)
        if kind == "SIGTERM":
            step = len(numbers(out))
            assert f"SIGTERM: saved at step {step} of {STEPS}; continue with\n  umbrella-jax train --config" in err
            assert err.rstrip().endswith("--resume")
            assert (out / "checkpoints" / str(step)).exists()
    assert "resume: from step " in umbrella(*train_words(world, out, "--resume"))
    assert_same_run(out, run)
    assert not list((out / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_saved_checkpoints(
    world: World, begin: Begin, run: Path, tmp_path: Path
) -> None:
    """Files are limited in length: the largest array is longer, however a save splits arrays; metrics are shorter."""
    out = shutil.copytree(run, tmp_path / "full")
    shutil.rmtree(out / "checkpoints" / "36")
    err = end(begin(out, "--resume", inside="disk:10000"), 1)
    assert "could not be written, step 33 is intact: " in err
    assert "Traceback" not in err
    umbrella(*train_words(world, out, "--resume"))
    assert_same_run(out, run)


@pytest.mark.slow
def test_a_disk_that_is_really_full(world: World, environment: dict[str, str], run: Path, tmp_path: Path) -> None:
    """Fill a disk of 3 MB with checkpoints, then make room. Mounting needs a user namespace."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    flags = ["--set", "train.save_steps=1", "--set", "train.keep_latest=1000"]
    train = shlex.join(umbrella_command(*train_words(world, disk / "run", *flags)))
    script = f"""mount -t tmpfs -o size=3m tmpfs {disk} || exit 9
        {train}; code=$?
        cp {disk}/run/metrics.jsonl {tmp_path}
        mount -o remount,size=1g {disk}
        {train} --resume || exit 8
        cp -r {disk}/run {kept}
        exit $code"""
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "could not be written, step " in done.stderr
    assert "Traceback" not in done.stderr
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert lines.endswith(b"\n")
    assert 1 < lines.count(b"\n") < STEPS
    assert_same_run(kept, run)


@pytest.mark.slow
def test_a_deleted_directory_ends_the_run(world: World, tmp_path: Path) -> None:
    out, ended = tmp_path / "deleted", Event()

    def delete() -> None:
        wait_for(ended.is_set, out, 3)
        out.rename(tmp_path / "gone")  # at once, while a file may be open
        shutil.rmtree(tmp_path / "gone")

    Thread(target=delete, daemon=True).start()
    flags = ["--epochs", 1000, "--set", "train.save_steps=100000", "--set", "train.eval_steps=100000"]
    try:
        err = umbrella(*train_words(world, out, *flags), code=1)
    finally:
        ended.set()
    assert f"{out / 'metrics.jsonl'}: deleted, moved or replaced" in err
    assert "Traceback" not in err
    assert not out.exists()


def test_a_directory_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    message = umbrella(*world.train_flags(Path("/proc/run"), *FLAGS), code=2)
    assert "/proc/run: /proc cannot be written to: it takes no new files; choose another output_dir (--out" in message
    with pytest.raises(OSError, match=r"/proc/file"):
        write_whole(Path("/proc/file"), "text")


HOLDER = """
import sys, time
from pathlib import Path
from umbrella_jax.io.files import locked
with locked(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_the_directory_is_refused(world: World, run: Path, tmp_path: Path) -> None:
    """It is refused until the first has ended, even by `kill -9`."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        for more in ([], ["--resume"]):
            message = umbrella(*train_words(world, run, *more), code=2)
            assert f"{run}: process {holder.pid} on {os.uname().nodename} is writing to it" in message
    finally:
        holder.kill()
        holder.communicate()
    assert f"resume: from step {STEPS}" in umbrella(*train_words(world, run, "--resume"))
    with locked(tmp_path), pytest.raises(ConfigError, match="is writing to it"), locked(tmp_path):
        pass


SIGNALLED = """
import time
from umbrella_jax.run.signals import Signals
with Signals(lambda line: print(line, flush=True)) as signals:
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("second", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_at_once(second: str, code: int) -> None:
    """A second SIGTERM within a second is ignored, because SLURM and its script may both send it."""
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("SIGTERM: saving after this step, then exiting; send again")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1 if second == "SIGINT" else 1.2)
    assert process.poll() is None
    process.send_signal(getattr(signal, second))
    assert process.wait(timeout=10) == code
    process.stdout.close()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            Interrupted(signal.SIGINT, "SIGINT: saved at step 3 of 9"),
            130,
            "SIGINT: saved at step 3 of 9; continue with",
        ),
        (KeyboardInterrupt(), 130, "SIGINT: stopped\n"),
    ],
)
def test_exit_codes_of_signals(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("umbrella_jax.run.train.train", train)
    assert said in umbrella(*world.train_flags(tmp_path, "--resume"), code=code)


def test_a_damaged_checkpoint_is_passed_over(world: World, run: Path, tmp_path: Path) -> None:
    """The newest checkpoint lacks numbers, and one directory is no checkpoint: the run resumes from the one before."""
    out = shutil.copytree(run, tmp_path / "damaged")
    for file in (out / "checkpoints" / "36" / "state").glob("ocdbt.process_*/d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    (out / "checkpoints" / "99").mkdir()
    message = umbrella("convert", "to-hf", out, tmp_path / "export", "--step", "latest", code=2)
    assert f"{out / 'checkpoints' / '99'}: damaged: " in message
    assert f"name an older checkpoint: {out / 'checkpoints' / '36'}, " in message

    output = umbrella(*train_words(world, out, "--resume"))
    for step in (36, 99):
        assert f"{out / 'checkpoints' / str(step)}: damaged: " in output
        assert f"renamed to {step}.damaged" in output
    assert "resume: from step 33" in output
    losses = {line["step"]: line["eval_loss"] for line in numbers(run) if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert f"best: eval_loss {losses[best]:.4g} at step {best}: {out / 'checkpoints' / str(best)}" in output
    left = {"30", "33", "36", str(best)}
    assert {p.name for p in (run / "checkpoints").iterdir()} == left
    assert {p.name for p in (out / "checkpoints").iterdir()} == left | {"36.damaged", "99.damaged"}
    assert_same_run(out, run)

    for file in (out / "checkpoints").glob("[0-9]*/meta"):
        shutil.rmtree(file)
    message = umbrella(*train_words(world, out, "--resume"), code=2)
    assert "damaged: meta: " in message
    assert all(str(out / "checkpoints" / name) in message for name in left)
    assert "no intact checkpoint: cannot resume" in message


@pytest.mark.parametrize("what", ["volume", "conversations", "eval", "tokenizer", "config.json", "volume in a cache"])
def test_resuming_on_changed_files_is_refused(run: Path, world: World, tmp_path: Path, what: str) -> None:
    """Content counts: a copy is accepted, and a change is found even with the same size and modification time."""
    copy = tmp_path / "world"
    ignore = shutil.ignore_patterns("run")
    shutil.copytree(world.root, copy, ignore=ignore)
    out = shutil.copytree(run, tmp_path / "out")
    flags = ["--base", copy / "base", "--image-root", copy / "scans", "--eval-data", world.eval]
    if what == "volume in a cache":
        flags += ["--cache", tmp_path / "cache"]
    command = world.train_flags(out, *FLAGS, *flags, *TO_EVALUATE, "--resume")
    if what.startswith("volume"):
        assert f"resume: from step {STEPS}" in umbrella(*command)
    file, expected = {
        "volume": (copy / "scans" / "run-3.nii", "{}: changed since the run began"),  # only evaluation uses it
        "volume in a cache": (copy / "scans" / "2.nii.gz", "{}: changed since the run began"),
        "conversations": (world.train, "{}: changed since the run began"),
        "eval": (world.eval, "{}: changed since the run began"),
        "tokenizer": (copy / "base" / "tokenizer.json", "token ids of data.train: changed since the run began"),
        "config.json": (
            copy / "base" / "config.json",
            "--base: model.base: config.json: text.rope_theta: 20000.0 now, ",
        ),
    }[what]
    content, stat = file.read_bytes(), file.stat()
    try:
        if what == "volume":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif what == "volume in a cache":
            small_run.write_volume(file, small_run.VOLUME_SHAPES["T1"], seed=98)
        elif what in ("conversations", "eval"):
            file.write_bytes(content.replace(b"left.", b"Left."))
        elif what == "tokenizer":
            settings = json.loads(content)
            ids = settings["model"]["vocab"]  # answers must not become longer, or they may not fit
            ids["."], ids["!"] = ids["!"], ids["."]
            file.write_text(json.dumps(settings))
        else:
            settings = json.loads(content)
            settings["text_config"]["rope_theta"] = 20000.0
            file.write_text(json.dumps(settings))
        if what != "volume in a cache":  # the cache compares size and time
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        message = umbrella(*command, code=2)
        assert f"cannot resume: {expected.format(file)}" in message
        assert ("faults" in message) == (what == "tokenizer")  # one fault for each data set
    finally:
        file.write_bytes(content)


def test_the_document_names_tests_that_exist() -> None:
    """Its tests exist, and its list of settings that may change is that of `run/resumption.py`."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"::(test_\w+)", text)
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []
    may_change = text[text.index("## What may change") : text.index("## How it works")]
    assert set(re.findall(r"`([a-z_.]+)`", may_change)) == set(MAY_CHANGE)


if __name__ == "__main__":
    sys.exit(child(sys.argv[1], sys.argv[2:]))
