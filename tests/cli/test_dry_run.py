"""`train --dry-run` prepares a run, compiles its programs and makes no step."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import small_run
from tests.helpers.small_run import World, read_lines, umbrella
from umbrella_jax.inference import answers
from umbrella_jax.run import evaluation, rehearsal, train
from umbrella_jax.rundir import how_it_ended
from umbrella_jax.training import trainer

PROGRAMS = {
    "step": ((rehearsal, "jit_train_step"), (trainer, "jit_train_step")),
    "evaluation": ((rehearsal, "jit_eval_step"), (evaluation, "jit_eval_step")),
    "volumes": ((answers, "encode"),),
    "prompts": ((answers, "prefill"),),
    "likelihoods": ((answers, "score_answers"),),
    "answers": ((answers, "decode"),),
}


class Recorded:
    """A jitted function that records the program of each `lower` and of each call."""

    def __init__(self, function: Any, name: str, lowered: set[Any], called: set[Any]):
        self._function, self._name, self._lowered, self._called = function, name, lowered, called

    def lower(self, *args: Any, **options: Any) -> Any:
        program = self._function.lower(*args, **options)
        self._lowered.add((self._name, program.as_text()))
        return program

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._called.add((self._name, self._function.lower(*args, **options).as_text()))
        return self._function(*args, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_run.make_world(
        tmp_path_factory.mktemp("world"), train={"batch_size": 4, "learning_rate": 1e-2, "max_new_tokens": 2}
    )


@pytest.fixture(scope="module")
def flags(world: World) -> list[object]:
    """Train and evaluate on the same four comparisons of two scans, which need one shape of each program."""
    answers = "evaluation.tasks={T3: {kind: classification, answers: [left, right]}}"
    settings = ["--set", answers, "--set", "evaluation.likelihoods=true"]
    return ["--task-filter", "T3", "--eval-data", world.train, "--epochs", 2, *settings]


@pytest.fixture(scope="module")
def recorded() -> Iterator[tuple[set[Any], set[Any]]]:
    """Collect (name, text) of lowered programs, and of called programs."""
    lowered, called = set[Any](), set[Any]()
    with pytest.MonkeyPatch.context() as patch:
        for program, attributes in PROGRAMS.items():
            for module, name in attributes:
                function = getattr(module, name)
                if name.startswith("jit_"):  # returns the jitted function
                    jitted = Recorded(function(), program, lowered, called)
                    patch.setattr(module, name, lambda jitted=jitted: jitted)
                else:
                    patch.setattr(module, name, Recorded(function, program, lowered, called))
        yield lowered, called


@pytest.fixture(scope="module")
def rehearsed(world: World, flags: list[object], recorded: tuple[set[Any], set[Any]]) -> str:
    """Return the output of a dry run into `run`."""
    output = umbrella(*world.train_flags(world.root / "run", *flags, "--dry-run"))
    assert not recorded[1], "the dry run made a step"
    return output


@pytest.fixture(scope="module")
def counted() -> list[tuple[int, int, int, bool]]:
    """Collect (count, conversations, positions, whether it compiled) of each step and batch of `trained`."""
    return []


@pytest.fixture(scope="module")
def trained(rehearsed: str, world: World, flags: list[object], counted: list[tuple[int, int, int, bool]]) -> Path:
    """Train the run of the dry run."""
    advance = train.Progress.advance

    def recording_advance(self: Any, count: int, work: Any, seconds: float, *, compiled: bool, **more: Any) -> None:
        assert seconds > 0
        counted.append((count, work.samples, work.tokens, compiled))
        advance(self, count, work, seconds, compiled=compiled, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Progress, "advance", recording_advance)
        umbrella(*world.train_flags(world.root / "run", *flags))
    return world.root / "run"


@pytest.mark.slow  # six programs for TPUs; tests/plan/test_compile_step.py compiles one; before `recorded` patches
def test_programs_are_compiled_for_tpus_that_are_not_at_hand(world: World, flags: list[object]) -> None:
    elsewhere = ["--dry-run", "--devices", "v5e-4", "--set", "model.attention=splash"]
    output = umbrella(*world.train_flags(world.root / "elsewhere", *flags, *elsewhere))
    assert "on v5e-4, data×fsdp×tensor 4×1×1:" in output
    for what in PROGRAMS:
        assert re.search(rf"  \d+\.\d s, \d+\.\d MB, {what} of 4 × (\d+ positions|T1)", output), what
    assert "as plan estimates; it has 16.9 GB" in output


def test_output(rehearsed: str) -> None:
    for text in (
        r"patch_embed: vision_tower\.\S+\n  T1_positional_embeddings ",
        r"4 conversations, 2 steps, into ",
        r"devices: 1 × cpu \(data=1,fsdp=1,tensor=1\)",
        r"plan: 1 shape to compile",
        *(rf"  \d+\.\d s, \d+\.\d MB, {what} of 4 × (\d+ positions|T1)" for what in PROGRAMS),
        r"6 programs compiled in \d+\.\d s",
        r"memory per device: \d+\.\d MB as compiled, \d+\.\d MB as plan estimates; it has \d+\.\d GB",
        r"nothing was written to ",
    ):
        assert re.search(text, rehearsed), text


def test_it_leaves_nothing(rehearsed: str, world: World) -> None:
    assert not list(world.root.glob("*run/*"))
    assert not (world.root / "run").exists()


def test_its_programs_are_the_runs(trained: Path, recorded: tuple[set[Any], set[Any]]) -> None:
    """The programs are identical with shardings and donated arguments, so a compilation cache serves the run."""
    lowered, called = recorded
    assert {name for name, _ in called} == PROGRAMS.keys()
    assert called <= lowered


def test_memory_covers_arguments_and_results(rehearsed: str) -> None:
    """A step takes at least its 180 thousand float32 weights; a program that needs fewer takes less."""
    sizes = {program: size for size, program in re.findall(r" s, (\d+\.\d) MB, (\w+) of ", rehearsed)}
    assert sizes.keys() == PROGRAMS.keys()
    assert 0.7 < float(sizes["step"]) < 20
    assert float(sizes["likelihoods"]) < float(sizes["step"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--devices", "v5e-4"], "--devices: expected --dry-run too"),
        (["--devices", "h100x8", "--dry-run"], "a dry run compiles for TPUs only"),
        (["--devices", "v5e-8", "--dry-run"], "train.batch_size: 4 rows cannot be split over data × fsdp = 8 devices"),
    ],
)
def test_other_devices_are_checked_before_anything_is_read(
    world: World, flags: list[object], more: list[str], words: str
) -> None:
    assert words in umbrella(*world.train_flags(world.root / "elsewhere", *flags, *more, "--base", "nowhere"), code=2)


def test_too_little_memory_is_rejected(
    world: World, flags: list[object], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_programs", lambda *_: iter([("step", "2 volumes", Program(10**18))]))
    monkeypatch.setattr(rehearsal, "_planned", lambda *_: 0.0)
    message = umbrella(*world.train_flags(world.root / "other", *flags, "--dry-run"), code=2)
    assert "step of 2 volumes: needs 1000000000.0 GB on a device that has " in message
    assert "lower the batch size" in message
    assert not (world.root / "other").exists()


class Program:
    """A compiled program that reports its size as XLA does."""

    def __init__(self, size: int):
        self.argument_size_in_bytes, self.temp_size_in_bytes = size, 0
        self.output_size_in_bytes = self.alias_size_in_bytes = self.generated_code_size_in_bytes = 0

    def memory_analysis(self) -> "Program":
        return self


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make dry runs stop before they compile."""
    monkeypatch.setattr(rehearsal, "_programs", lambda *_: iter([("step", "2 volumes", Program(1))]))
    monkeypatch.setattr(rehearsal, "_planned", lambda *_: 0.0)


def test_rejects_the_same_input_as_a_run(
    trained: Path, world: World, flags: list[object], uncompiled: None, tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    assert "holds a run; continue it with --resume" in umbrella(
        *world.train_flags(trained, *flags, "--dry-run"), code=2
    )
    assert "resume: from step 2" in umbrella(*world.train_flags(trained, *flags, "--dry-run", "--resume"))
    other = ["--dry-run", "--resume", "--learning-rate", 0.5]
    assert "train.learning_rate: 0.5 now, 0.01 in the" in umbrella(*world.train_flags(trained, *flags, *other), code=2)
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before

    (tmp_path / "file").touch()
    for out, cause in (
        (tmp_path / "file", "a file, not a directory"),
        (tmp_path / "file" / "run", f"{tmp_path / 'file'} is a file, not a directory"),
    ):
        message = umbrella(*world.train_flags(out, *flags, "--dry-run"), code=2)
        assert f"{out}: {cause}; choose another output_dir (--out DIR)" in message
    message = umbrella(*world.train_flags(tmp_path / "run", "--train-data", tmp_path / "none", "--dry-run"), code=2)
    assert str(tmp_path / "none") in message


def test_warmup_as_long_as_the_run_gets_a_warning(world: World, flags: list[object], uncompiled: None) -> None:
    for steps, expected in ((1, False), (2, True)):
        output = umbrella(
            *world.train_flags(world.root / "w", *flags, "--dry-run", "--set", f"train.warmup_steps={steps}")
        )
        assert ("WARNING: train.warmup_steps: 2 of 2 steps: the rate never reaches" in output) == expected


def test_progress_and_log_of_the_run(trained: Path) -> None:
    """Every line starts with a time, and none has control characters. Steps are logged without a terminal too."""
    text = (trained / "log.txt").read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d ", line) for line in text.splitlines())
    assert re.search(r" started: umbrella-jax \S+, jax \S+, 1 × cpu, process ", text)
    assert re.search(r" step 1: compiling for 1 × 4 conversations of ", text)
    assert re.search(r" step 1 of 2  loss \d+\.\d{4}$", text, re.MULTILINE), "a step that compiled has no rate"
    assert re.search(r" step 2 of 2  loss \d+\.\d{4}  [\d.,e+]+ samples/s  [\d,]+ tokens/s$", text, re.MULTILINE)
    assert len(re.findall(r" step 2  evaluation: loss \d", text)) == 1, "not again at the end"
    assert how_it_ended(trained / "log.txt") == ""
    assert [line["steps"] for line in read_lines(trained / "metrics.jsonl")] == [2, 2]


def test_the_log_has_the_error(trained: Path, world: World, flags: list[object]) -> None:
    """Resuming a run whose volumes are gone appends the error to the log."""
    before = (trained / "log.txt").read_bytes()
    message = umbrella(*world.train_flags(trained, *flags, "--resume", "--image-root", world.root / "gone"), code=2)
    after = (trained / "log.txt").read_bytes()
    assert after.startswith(before)
    assert how_it_ended(trained / "log.txt")
    assert how_it_ended(trained / "log.txt").splitlines()[0] in message


def test_progress_counts_conversations_and_positions(
    trained: Path, counted: list[tuple[int, int, int, bool]], rehearsed: str
) -> None:
    """Positions include answers and exclude padding. The run has two steps and one evaluation of four conversations."""
    first, second, loss, answers = counted
    assert (first[:2], second[:2], loss[:2], answers[:2]) == ((1, 4), (1, 4), (4, 4), (4, 4))
    assert [compiled for *_, compiled in counted] == [True, False, True, True]
    assert first[2] == second[2] == loss[2]
    positions = int(re.search(r"step of 4 × (\d+) positions", rehearsed)[1])  # type: ignore[index]
    assert 4 * (2 * 6 + 8) < loss[2] <= 4 * positions
    assert loss[2] - 40 < answers[2] < loss[2], "prompts lack the last answer"
