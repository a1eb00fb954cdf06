"""Two real processes on this machine act as one run, with one set of numbers, files and messages."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import small_run
from tests.helpers.shared_steps import shared_steps
from tests.helpers.small_run import World, assert_close, latest, numbers, read_lines, trained, umbrella
from umbrella_jax import distributed
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.data.inputs import changed_inputs
from umbrella_jax.distributed import _local_devices, _peers, broadcast, gather, raise_together, start
from umbrella_jax.errors import ConfigError, DataError, UmbrellaError

ROOT = Path(__file__).parents[2]
STEPS = 3
# Four comparisons of four scans, all in every batch: each process has two rows, which show three of the scans.
FLAGS = ["--task-filter", "T3", "--batch-size", 4, "--epochs", STEPS, "--learning-rate", 1e-3]
FLAGS += ["--set", "train.warmup_steps=0", "--set", "train.save_steps=1"]


def child() -> None:
    """Run `umbrella-jax WORDS` for each line [record, *words] on stdin, and print its exit code.

    Its output goes to `record.out` and `record.err`. `record.json` lists the files opened for reading, phase by
    phase, and for writing.
    """
    from umbrella_jax import cli
    from umbrella_jax.run import evaluation, train

    small_run.hide_torch()
    if "HEARTBEAT" in os.environ:  # seconds between JAX's checks that the others are alive; its default is 100
        beat = int(os.environ["HEARTBEAT"])
        jax.distributed.initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=beat)
    record, phase = "", "check"
    read, written = list[tuple[str, str]](), list[str]()

    def hook(event: str, arguments: Any) -> None:
        if event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            if (flags or 0) & (os.O_WRONLY | os.O_RDWR) or set(mode or "") & set("wax+"):
                written.append(path)
            else:
                read.append((phase, path))

    def entering(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            nonlocal phase
            phase = name
            return call(*args, **kwargs)

        return enter

    batches = train_batches = train.train_batches
    if "SIGNAL_AT" in os.environ:  # send a signal to this process when it reads that batch
        name, place = os.environ["SIGNAL_AT"].split()

        def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for i, batch in enumerate(train_batches(*args, **kwargs)):
                if i == int(place):
                    Path(f"{record}.json").write_text(str(time.time()))
                    os.kill(os.getpid(), getattr(signal, name))
                    time.sleep(1)  # so that the signal comes before the next step
                yield batch

    train.train_batches = entering("train", batches)
    evaluation.eval_batches = entering("eval", evaluation.eval_batches)
    sys.addaudithook(hook)
    codes = os.dup(1)
    for line in sys.stdin:
        record, *words = json.loads(line)
        phase = "check"
        read.clear()
        written.clear()
        for end, descriptor in ("out", 1), ("err", 2):
            with open(f"{record}.{end}", "w") as file:
                os.dup2(file.fileno(), descriptor)
        code = cli.main(words)
        sys.stdout.flush()
        Path(f"{record}.json").write_text(json.dumps({"read": read, "written": written}))
        os.write(codes, f"{code}\n".encode())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(processes: list[subprocess.Popen[str]], timeout: int = 900) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each process."""
    try:
        found = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(processes, found, strict=True)]


def lines_of(out: str) -> list[str]:
    """Return the lines of a process but for XLA's."""
    return [line for line in out.splitlines() if not line.startswith("[Gloo]")]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return small_run.process_environment() | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = small_run.make_world(tmp_path_factory.mktemp("world"))
    small_run.soften(found.base)
    return found


class Pair:
    """Two processes that run one command after another, so that they start and compile once."""

    def __init__(self, environment: dict[str, str], signals: Sequence[str] = ("", "")):
        """`signals`: the signal that each process sends to itself, and the batch at which it does."""
        self.where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.run.test_processes"]
        beat = {"HEARTBEAT": "10"} if any(signals) else {}
        own = [beat | ({"SIGNAL_AT": signal} if signal else {}) for signal in signals]
        self.processes = [subprocess.Popen(command, env=environment | more, cwd=ROOT, **pipes) for more in own]

    def __call__(self, record: Path, *words: object, second: Sequence[object] = ()) -> list[tuple[int, str, str]]:
        """Run `umbrella-jax WORDS` in both, with more words in the second; return each exit code, stdout and stderr.

        Their records are `record.0` and `record.1`."""
        for i, process in enumerate(self.processes):
            own = [words[0], *latest(*words[1:], *(second if i else ())), *self.where, i]
            process.stdin.write(json.dumps([f"{record}.{i}", *map(str, own)]) + "\n")
            process.stdin.flush()
        limit = Timer(600, self.end)
        limit.start()
        try:
            codes = [process.stdout.readline() for process in self.processes]
        finally:
            limit.cancel()
        return [
            (
                int(code or process.wait()),  # without a line, the process has ended
                *(Path(f"{record}.{i}.{kind}").read_text() for kind in ("out", "err")),
            )
            for i, (process, code) in enumerate(zip(self.processes, codes, strict=True))
        ]

    @property
    def ended(self) -> bool:
        """Return whether either has ended, as both do when they refuse a command."""
        return any(process.poll() is not None for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            with process:  # closes its pipes
                process.kill()


Two = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture(scope="module")
def pair(environment: dict[str, str]) -> Iterator[Two]:
    """`pair(record, *words)` runs `umbrella-jax WORDS` in the same two processes as before, unless they have ended."""
    running = Pair(environment)

    def command(record: Path, *words: object, **more: Any) -> list[tuple[int, str, str]]:
        nonlocal running
        if running.ended:
            running.end()
            running = Pair(environment)
        return running(record, *words, **more)

    yield command
    running.end()


@pytest.fixture(scope="module")
def two(world: World, environment: dict[str, str], pair: Two) -> Two:
    """`two(out, *flags)` trains in two processes; with `signals`, in a pair of its own, which ends with the run."""

    def train(out: Path, *flags: object, signals: Sequence[str] = ()) -> list[tuple[int, str, str]]:
        words = world.train_flags(out, *FLAGS, "--eval-data", world.eval, *flags)
        if not signals:
            return pair(out, *words)
        own = Pair(environment, signals)
        try:
            return own(out, *words)
        finally:
            own.end()

    return train


@pytest.fixture(scope="module")
def outputs(two: Two, world: World) -> list[tuple[int, str, str]]:
    found = two(world.root / "two")
    assert [code for code, *_ in found] == [0, 0], found
    return found


@pytest.fixture(scope="module")
def run(outputs: Any, world: World) -> Path:
    return world.root / "two"


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(Path(f"{run}.{i}.json").read_text()) for i in range(2)]


@pytest.fixture(scope="module")
def whole(world: World) -> Callable[[int], Path]:
    """Return the same run, made by one process with that many devices."""

    def of(devices: int) -> Path:
        out = world.root / f"devices{devices}"
        umbrella(*world.train_flags(out, *FLAGS, "--eval-data", world.eval), devices=devices)
        return out

    return of


def assert_same(run: Path, expected: Path) -> None:
    assert numbers(run) == numbers(expected)
    ours, theirs = trained(run), trained(expected)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf)


def test_two_processes_are_one_with_two_devices(run: Path, whole: Callable[[int], Path]) -> None:
    """Bit for bit, because program and rows of each device are the same."""
    expected = whole(2)
    assert len(numbers(expected)) == STEPS
    assert_same(run, expected)
    start = {path: np.asarray(leaf) for path, leaf in Checkpoint.open(expected / "checkpoints" / "1").trained().items()}
    for path, leaf in trained(expected).items():
        if "T1" in path:
            assert np.abs(leaf - start[path]).max() > 1e-3 * np.abs(leaf).max(), f"{path} moved by more than that"
    answers = f"predictions/step_{STEPS}.jsonl"
    assert read_lines(run / answers) == read_lines(expected / answers)


@pytest.mark.slow
def test_two_processes_are_one_device(run: Path, whole: Callable[[int], Path], world: World) -> None:
    """But for rounding, because sums are computed in another order."""
    expected, answers = whole(1), f"predictions/step_{STEPS}.jsonl"
    assert_close(run, expected)
    assert read_lines(run / answers) == read_lines(expected / answers)


def test_each_process_reads_its_own_part(records: list[dict[str, Any]], world: World) -> None:
    scans = {str(path) for path in (world.root / "scans").iterdir() if "run" not in path.name}
    opened = [
        {
            phase: Counter(p for name, p in record["read"] if name == phase and p in scans)
            for phase in ("check", "train")
        }
        for record in records
    ]
    # one of the two checks a file, for both, and nothing but the check reads it
    assert opened[0]["check"].keys() | opened[1]["check"].keys() == scans
    assert not opened[0]["check"].keys() & opened[1]["check"].keys()
    assert abs(len(opened[0]["check"]) - len(opened[1]["check"])) <= 1
    assert {*opened[0]["check"].values(), *opened[1]["check"].values()} == {2}  # `open`, and `os.open` of its opener
    for own in (o["train"] for o in opened):
        once = own.total() // (STEPS * 3)
        assert own.total() == STEPS * 3 * once > 0
        assert max(own.values()) <= STEPS * once


def test_only_process_0_prints_and_writes(
    outputs: list[tuple[int, str, str]], records: list[dict[str, Any]], run: Path
) -> None:
    (_, first, _), (_, *second) = outputs
    assert f"4 conversations, {STEPS} steps, into " in first
    assert re.search(r"^devices: 2 × cpu \(data=2,fsdp=1,tensor=1\), 2 processes$", first, re.MULTILINE)
    assert first.count("step 1: compiling") == 1
    assert f"step {STEPS}  loss" in first
    assert [line for text in second for line in lines_of(text)] == []
    # `run` itself: an unnamed file in it, by which each process tries whether it can write there
    written = [[Path(path) for path in record["written"] if Path(path) != run] for record in records]
    ours, theirs = ({p.relative_to(run).parts[0] for p in paths if p.is_relative_to(run)} for paths in written)
    assert {".config.yaml.part", ".inputs.json.part", ".summary.json.part", "metrics.jsonl", "predictions"} <= ours
    assert theirs <= {"checkpoints"}


def test_two_processes_resume(two: Two, run: Path, world: World) -> None:
    """They continue from the step before the last, as if they had been cut off there."""
    again = world.root / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    (first, out, _), (second, *_) = two(again, "--resume")
    assert (first, second) == (0, 0)
    assert f"resume: from step {STEPS - 1}" in out
    assert_same(again, run)


@pytest.mark.slow
def test_two_processes_stop_early_at_the_same_step(two: Two, world: World) -> None:
    """No evaluation improves by 100, so the second one ends the run of both; resumed, it trains nothing."""
    out = world.root / "early"
    rule = "train.early_stopping={metric: eval_loss, patience: 1, min_delta: 100}"
    settings = ["train.eval_steps=1", "train.keep_best=1", "train.best_metric=eval_loss", rule]
    flags = [word for setting in settings for word in ("--set", setting)]
    for more in ([], ["--resume"]):
        (first, printed, error), (second, _, silent) = two(out, *flags, *more)
        assert (first, second, silent) == (0, 0, ""), error
        assert "stopped early at step 2: eval_loss did not improve by more than 100 in 1 evaluation" in " ".join(
            printed.split()
        )
        assert len(numbers(out)) == 2


@pytest.mark.slow
def test_one_killed_the_other_ends_and_both_go_on(two: Two, run: Path, world: World) -> None:
    """It ends within a minute with heartbeats every 10 s, without process 0 and without process 1."""
    out = world.root / "killed"
    for killed, (more, signals) in enumerate([([], ["SIGKILL 2", ""]), (["--resume"], ["", "SIGKILL 1"])]):
        ended = two(out, *more, signals=signals)
        assert time.time() - float(Path(f"{out}.{killed}.json").read_text()) < 60
        assert ended[killed][0] == -signal.SIGKILL
        code, _, error = ended[1 - killed]
        assert code != 0
        # found in a collective, or by JAX, which then ends the process itself
        assert "a process of the run is gone" in error or "another task died" in error
    assert len(numbers(out)) < STEPS
    assert [code for code, *_ in two(out, "--resume")] == [0, 0]
    assert_same(out, run)


@pytest.mark.slow
def test_a_signal_to_one_ends_both_after_the_same_step(two: Two, run: Path, world: World) -> None:
    """One process resumes it: with two devices bit for bit, with one device but for rounding."""
    out = world.root / "signalled"
    (first, _, error), (second, _, silent) = two(out, signals=["", "SIGTERM 1"])
    assert (first, second) == (143, 143), error + silent
    step = len(numbers(out))
    assert 0 < step < STEPS
    assert f"SIGTERM: saved at step {step} of {STEPS}; continue with" in error
    assert (out / "checkpoints" / str(step)).exists()
    one = shutil.copytree(out, world.root / "signalled-one")
    flags = [*FLAGS, "--eval-data", world.eval, "--resume"]
    umbrella(*world.train_flags(out, *flags), devices=2)
    assert_same(out, run)
    umbrella(*world.train_flags(one, *flags), devices=1)
    assert_close(one, run)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=2", "tensor=2"])
def test_weights_are_split_over_processes(two: Two, run: Path, world: World, mesh: str) -> None:
    """Repeat the last step on a mesh where no process has all weights; with `tensor`, both have all rows."""
    again = world.root / mesh
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    (first, out, _), (second, *_) = two(again, "--resume", "--mesh", mesh)
    assert (first, second) == (0, 0)
    assert mesh in out
    assert_close(again, run)
    answers = f"predictions/step_{STEPS}.jsonl"
    assert read_lines(again / answers) == read_lines(run / answers)


@pytest.mark.slow
def test_two_processes_predict_as_one(pair: Two, run: Path, world: World) -> None:
    """They answer every conversation once, in order, with likelihoods, and both refuse what one refuses."""
    out, alone = world.root / "two.jsonl", world.root / "one.jsonl"
    words = ["predict", run, "--data", world.train, "--out", out, "--image-root", world.root / "scans"]
    words += ["--task-filter", "T3", "--likelihoods", "--max-new-tokens", 3, "--batch-size", 2]
    (first, output, _), (second, other, _) = ended = pair(out, *words)
    assert (first, second) == (0, 0), "\n".join(err for *_, err in ended)
    assert f"{out}: 4 answers" in output
    assert str(out) not in other, "only one process prints it"
    flags = ["--data", world.train, "--out", alone, "--image-root", world.root / "scans", "--task-filter", "T3"]
    umbrella("predict", run, *flags, "--likelihoods", "--max-new-tokens", 3)
    for ours, theirs in zip(read_lines(out), read_lines(alone), strict=True):
        for answer, value in theirs.pop("likelihoods").items():
            assert ours["likelihoods"][answer] == pytest.approx(value, abs=1e-4)
        ours.pop("likelihoods")
        assert ours == theirs
    assert [code for code, *_ in pair(out, *words)] == [2, 2]


class Recorded(Exception):
    """Ends a run as soon as the facts that its processes would compare are known."""


def compared(monkeypatch: pytest.MonkeyPatch, world: World, *flags: object) -> dict[str, list[tuple[str, Any]]]:
    """Return the facts that a process of this run hands to `check_same`: settings, then contents."""
    exchanged: list[list[tuple[str, Any]]] = []

    def record(facts: Sequence[tuple[str, Any]], remedy: str) -> None:
        exchanged.append(list(facts))
        if len(exchanged) == 2:
            raise Recorded

    monkeypatch.setattr("umbrella_jax.run.preparation.check_same", record)
    with pytest.raises(Recorded):
        umbrella(*world.train_flags(world.root / "never", *FLAGS, "--eval-data", world.eval, *flags))
    return dict(zip(("settings", "contents"), exchanged, strict=True))


def differences(monkeypatch: pytest.MonkeyPatch, first: list[Any], second: list[Any]) -> tuple[str, ...]:
    """Return the faults that `check_same` would raise on the second of two processes."""
    digest = hashlib.sha256(json.dumps([value for _, value in first]).encode()).hexdigest()
    monkeypatch.setattr(distributed, "is_single_process", lambda: False)
    monkeypatch.setattr(distributed, "gather", lambda value: [digest, value])
    monkeypatch.setattr(distributed, "broadcast", lambda value: json.loads(json.dumps([first, "node1"])))
    monkeypatch.setattr(distributed, "raise_together", nullcontext)
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    try:
        distributed.check_same(second, "mend it")
    except ConfigError as error:
        return error.faults
    return ()


@pytest.fixture(scope="module")
def facts(world: World) -> dict[str, list[tuple[str, Any]]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return compared(monkeypatch, world)


@pytest.mark.parametrize("what", ["answers", "order", "volume", "weights", "run.yaml", "nothing"])
def test_differences_between_hosts_are_named(
    world: World, facts: dict[str, list[tuple[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """The host and the file or setting are named; before, the run trained on it. Paths may differ."""
    shutil.copytree(world.base, tmp_path / "base")
    shutil.copytree(world.root / "scans", tmp_path / "scans")
    flags: list[object] = ["--image-root", tmp_path / "scans"]
    expected = "{}: other contents on node2 than on node1 (process 0); mend it"
    other = replace(world, base=tmp_path / "base")
    content = world.train.read_bytes()
    if what in ("answers", "order"):
        records = json.loads(content)
        text = json.dumps(records[::-1] if what == "order" else records)
        world.train.write_text(text.replace("left.", "Left.") if what == "answers" else text)
        expected = expected.format(world.train)
    elif what == "volume":
        file = small_run.write_volume(tmp_path / "scans" / "2.nii.gz", small_run.VOLUME_SHAPES["T1"], seed=98)
        expected = expected.format(file)
    elif what == "weights":
        file = other.base / "model.safetensors"
        tensors = load_file(file)
        save_file({name: tensor * np.float32(1.5) for name, tensor in tensors.items()}, file, {"format": "pt"})
        expected = expected.format(f"{other.base}: weights")
    elif what == "run.yaml":
        settings = small_run.read_config(world.config)
        settings["train"]["clip_norm"] = 0.5
        other = replace(other, config=small_run.write_config(tmp_path / "run.yaml", settings))
        expected = "train.clip_norm: 0.5 on node2, 1.0 on node1 (process 0); mend it"
    try:
        other_facts = compared(monkeypatch, other, *flags)
    finally:
        world.train.write_bytes(content)
    kind = "settings" if what == "run.yaml" else "contents"
    faults = differences(monkeypatch, facts[kind], other_facts[kind])
    if what == "nothing":
        assert faults == differences(monkeypatch, facts["settings"], other_facts["settings"]) == ()
    else:
        assert expected in faults
        assert len(faults) <= 6  # token ids and the order of volumes depend on the conversations


@pytest.mark.slow
def test_two_processes_that_read_other_scans_are_refused(pair: Two, world: World, tmp_path: Path) -> None:
    """Before the first step, with the host's name, which is this machine for both."""
    shutil.copytree(world.root / "scans", tmp_path / "scans")
    file = small_run.write_volume(tmp_path / "scans" / "2.nii.gz", small_run.VOLUME_SHAPES["T1"], seed=98)
    words = world.train_flags(tmp_path / "run", *FLAGS)
    (code, out, error), (second, _, silent) = pair(
        tmp_path / "record", *words, second=["--image-root", tmp_path / "scans"]
    )
    host = socket.gethostname()
    assert (code, second, silent) == (2, 2, "")
    assert f"process 1: {file}: other contents on {host} than on {host} (process 0); copy it again" in error
    assert "step 1" not in out


@pytest.mark.slow
def test_a_scan_that_one_process_lacks_is_reported_if_the_base_is_a_run(pair: Two, run: Path, world: World) -> None:
    """Orbax makes all processes read the base's checkpoint together, so the other process must not wait there."""
    out, empty = world.root / "unseen", world.root / "empty"
    empty.mkdir()
    words = world.train_flags(out, *FLAGS, "--base", run)
    for second, fault in (["--base", empty / "gone"], "not found"), (["--image-root", empty], "not found"):
        (first, _, error), (other, *_) = pair(out, *words, second=second)
        assert (first, other) == (2, 2), error
        assert f"process 1: {empty}" in error
        assert fault in error


# Who belongs to a run.

STARTED = """
import json, sys, jax
from umbrella_jax.distributed import broadcast, gather, start
start(timeout=60)
assert jax.distributed.is_initialized()
start()
own = {"from": jax.process_index()}
print(json.dumps([jax.process_index(), gather(own), broadcast(own | {"µ": [None] * 100 * (own["from"] == 0)})]))
"""


REFUSED = """
from umbrella_jax.distributed import raise_together
with raise_together():
    print("both")
with raise_together():
    if jax.process_index() == 1:
        raise OSError(28, "No space left on device", "/x")
print("not reached")
"""


# As on a TPU VM, but that the devices are CPUs: jax is told that there are TPUs, and has to find out all the rest.
ON_TPU = """
import os, jax
if "GCE_METADATA_IP" in os.environ:
    del os.environ["TPU_SKIP_MDS_QUERY"]  # JAX sets it if it sees no chips; GKE sets it itself
from umbrella_jax.distributed import start
start(timeout=60)
jax.config.update("jax_platforms", "cpu")
"""


def launched(
    environment: dict[str, str], *own: dict[str, object], program: str = STARTED
) -> list[tuple[int, str, str]]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return finish(
        [
            subprocess.Popen(
                [sys.executable, "-c", program], env=environment | {k: str(v) for k, v in e.items()}, cwd=ROOT, **pipes
            )
            for e in own
        ]
    )


@pytest.fixture(scope="module")
def tasks(environment: dict[str, str]) -> list[tuple[int, str, str]]:
    """Two tasks of SLURM that exchange values; then the second one's disk is full."""
    job = {
        "SLURM_JOB_ID": 7,
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": 2,
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_STEP_NUM_NODES": 1,
        "JAX_COORDINATOR_PORT": free_port(),
    }
    own = ({**job, "SLURM_PROCID": i, "SLURM_LOCALID": i} for i in range(2))
    return launched(environment, *own, program=STARTED + REFUSED)


def test_slurm_starts_its_tasks(tasks: list[tuple[int, str, str]]) -> None:
    """JAX reads the variables that srun sets."""
    for i, (_, out, err) in enumerate(tasks):
        assert lines_of(out), err
        assert json.loads(lines_of(out)[0]) == [i, [{"from": 0}, {"from": 1}], {"from": 0, "µ": [None] * 100}]


@pytest.fixture
def metadata() -> Iterator[str]:
    """Serve Google's metadata for each worker of a slice of two hosts; yield HOST:PORT, to use with its number."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            worker, _, key = self.path.removeprefix("/").partition("/computeMetadata/v1/instance/attributes/")
            known = {
                "agent-worker-number": worker[-1],
                "worker-network-endpoints": "unknown:1:127.0.0.1,unknown:2:127.0.0.1",
                "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\n",
            }
            self.send_response(200 if key in known else 404)
            self.end_headers()
            self.wfile.write(known.get(key, "").encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}/worker-"
        server.shutdown()


@pytest.mark.parametrize("kind", ["TPU VM", pytest.param("GKE", marks=pytest.mark.slow)])
def test_tpus_start_their_hosts(environment: dict[str, str], kind: str, metadata: str) -> None:
    """JAX reads the metadata, and the variables that GKE sets."""
    chips = {"JAX_FORCE_TPU_INIT": 1, "TPU_LIBRARY_PATH": sys.executable, "JAX_COORDINATOR_PORT": free_port()}
    hosts: list[dict[str, object]] = [
        chips
        | (
            {"GCE_METADATA_IP": f"{metadata}{i}"}
            if kind == "TPU VM"
            else {
                "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1",
                "TPU_WORKER_ID": i,
                "MEGASCALE_COORDINATOR_ADDRESS": "",  # otherwise JAX asks the metadata server
                "MEGASCALE_NUM_SLICES": "",
                "MEGASCALE_SLICE_ID": "",
            }
        )
        for i in range(2)
    ]
    # tests/conftest.py describes a machine for libtpu's compiler; these hosts have to be found out
    without = {n: value for n, value in environment.items() if n != "JAX_PLATFORMS" and not n.startswith("TPU_")}
    for i, (code, out, err) in enumerate(launched(without, *hosts, program=ON_TPU + STARTED)):
        assert code == 0, err
        assert json.loads(out.splitlines()[-1]) == [i, [{"from": 0}, {"from": 1}], {"from": 0, "µ": [None] * 100}]


@pytest.mark.parametrize(("alone", "faults"), [(True, ("process 1: one", "process 1: two")), (False, ("one", "two"))])
def test_an_error_on_one_process_ends_all(
    monkeypatch: pytest.MonkeyPatch, alone: bool, faults: tuple[str, ...]
) -> None:
    """Process 0 raises the faults of all; process 1 exits silently with the same code."""
    outcome = DataError.exit_code, ["one", "two"]
    shut_down: list[int] = []

    def fail(fails: bool) -> None:
        if fails:
            raise DataError(["one", "two"])

    monkeypatch.setattr(distributed, "is_single_process", lambda: False)
    monkeypatch.setattr(distributed, "gather", lambda mine: [(1, []) if alone else outcome, outcome])
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax.distributed, "shutdown", lambda process=process: shut_down.append(process))
        with pytest.raises(SystemExit if process else UmbrellaError) as error, raise_together():
            fail(process == 1 or not alone)
        if isinstance(error.value, UmbrellaError):
            assert error.value.faults == faults
        else:
            assert error.value.code == DataError.exit_code
    assert shut_down == [0, 1]


def test_an_error_of_the_system_on_one_process_ends_all(tasks: list[tuple[int, str, str]]) -> None:
    """The other process must not be aborted by JAX, with a stack trace of C++."""
    (first, out, error), (second, other, own) = tasks
    assert (first, second) == (1, 1), error  # uncaught errors
    for said in (out, other):
        assert lines_of(said)[1:] == ["both"]
    assert "RunError: process 1: /x: No space left on device: the disk is full" in error.splitlines()[-1]
    assert own.splitlines()[-1].startswith("OSError")


LOST = """
import sys
from umbrella_jax.distributed import exit_on_error, gather, start
from umbrella_jax.errors import DataError
start(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
with exit_on_error():
    gather(0)
    if sys.argv[2] == "1":
        raise DataError("a volume is gone")
    gather(1)  # waits for the other
"""


def test_a_process_that_fails_ends_the_run(environment: dict[str, str]) -> None:
    """It ends within seconds. JAX would make the other process wait for minutes."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", LOST, f"127.0.0.1:{free_port()}"]
    found = finish([subprocess.Popen([*words, str(i)], env=environment, cwd=ROOT, **pipes) for i in range(2)], 90)
    assert found[0][0] != 0
    assert found[1][0] == 2
    assert found[1][2] == "umbrella-jax: process 1 ends, and with it the run:\na volume is gone\n"


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_missing_process_is_named(environment: dict[str, str], process: int, tmp_path: Path) -> None:
    words = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id", process]
    command = small_run.umbrella_command("train", "--config", tmp_path, *words, "--start-timeout", 1)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert f"timed out after 1 s waiting for 2 processes with --coordinator {words[1]}" in done.stderr
    assert "stack trace" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "peers"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "16"}, "16 tasks .* on n"),
        # a shell of `salloc --ntasks 16`, an `srun --pty bash` and an ssh into its node, and a script of sbatch
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 processes of mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"tpu": "1"}, "hosts of this TPU .* --worker=all"),
        ({"tpu": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, "pods on a,b$"),
        ({"tpu": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"tpu": "1", "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "pods on a and of 2 slices"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook
    ],
)
def test_descriptions_of_the_other_processes(
    variables: dict[str, str], peers: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "TPU", "MEGASCALE"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # JAX sets this if it finds TPUs and JAX_PLATFORMS is not set
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu" if "tpu" in variables else None)
    try:
        description = _peers()
    finally:
        jax.config.update("jax_platforms", before)
    if peers is None:
        assert description is None
    else:
        assert description is not None
        assert re.search(peers, description), description


@pytest.mark.parametrize(
    ("tasks", "nodes", "gpus", "expected"),
    [
        (2, 2, "0,1,2,3", []),  # one task per node: all GPUs
        (8, 2, "0,1,2,3", None),  # one task per GPU: jax takes the task's own
        (8, 2, None, None),
        (8, 2, "3", []),  # --gpus-per-task=1: it sees no other
    ],
)
def test_gpus_of_a_task(
    tasks: int, nodes: int, gpus: str | None, expected: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(tasks))
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", str(nodes))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if gpus:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert _local_devices() == expected


@pytest.mark.parametrize(
    ("flags", "faults"),
    [
        (
            ["--coordinator", "a:1"],
            ["--coordinator: expected --num-processes and --process-id too, or none of the three"],
        ),
        (["--process-id", 0], ["--process-id: expected --coordinator and --num-processes too, or none of the three"]),
        (
            ["--coordinator", "node1", "--num-processes", 2, "--process-id", 2],
            ["--coordinator node1: expected HOST:PORT", "--process-id 2: expected 0 to 1"],
        ),
        (
            ["--coordinator", "a:99999", "--num-processes", 0, "--process-id", 0, "--start-timeout", 0],
            ["--start-timeout 0: expected", "--coordinator a:99999: expected", "--num-processes 0: expected 1 or more"],
        ),
        (["--coordinator", "a:1", "--num-processes", 2, "--process-id", -1], ["--process-id -1: expected 0 to 1"]),
    ],
)
def test_flags_that_contradict_each_other(world: World, flags: list[object], faults: list[str]) -> None:
    message = umbrella(*world.train_flags(world.root / "contradicted", *flags), code=2)
    for fault in faults:
        assert fault in message
    assert ("faults" in message) == (len(faults) > 1)
    assert not (world.root / "contradicted").exists()


def test_a_cluster_that_jax_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # but not which task this is
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"2 tasks of srun .*: jax cannot join them: .*; name them by --coordinator"):
        start()


def test_a_single_process_agrees_with_itself() -> None:
    assert gather({"a": [1]}) == [{"a": [1]}]
    assert broadcast({"a": [1]}) == {"a": [1]}
    with raise_together():
        pass

    def fail() -> None:
        raise DataError("a fault")

    with pytest.raises(DataError, match="a fault"), raise_together():
        fail()


def test_missing_files_are_named_on_every_process() -> None:
    """Files of this run reach all processes but the first as JSON, like those of the earlier run."""
    before = {"conversations": [("c", "1")], "volumes": [("a", "1"), ("b", "2")]}
    now = before | {"volumes": [("a", "1")]}
    for found in (now, json.loads(json.dumps(now))):
        assert changed_inputs(json.loads(json.dumps(before)), found) == ["b"]


if __name__ == "__main__":
    with shared_steps():
        child()
