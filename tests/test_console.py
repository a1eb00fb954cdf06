"""Tests of tables for a terminal of 80 columns, of progress lines, and of a run's log."""

import fcntl
import logging
import os
import pty
import re
import struct
import termios
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from umbrella_jax import console as module
from umbrella_jax.baselines.table import side_by_side
from umbrella_jax.console import INTERVAL, Progress, Work, table_lines, wrapped
from umbrella_jax.errors import DataError, Interrupted
from umbrella_jax.rundir import RunLog, how_it_ended
from umbrella_jax.scoring.metrics import score, short, tasks_of


class Clock:
    """A replacement for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Make stderr a terminal of 50 columns; yield a function that returns what was written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 50, 0, 0))
    with os.fdopen(theirs, "w") as file:
        monkeypatch.setattr("sys.stderr", file)

        def written() -> str:
            file.write("$")  # so that there is something
            file.flush()
            return os.read(ours, 100_000).decode().removesuffix("$")

        yield written
    os.close(ours)


def test_rates_leave_out_steps_that_compiled(clock: Clock) -> None:
    printed: list[str] = []
    with Progress("step", 1000, done=10, say=printed.append, log=printed.append, always=True, peak=1e6) as progress:
        clock.now += 500
        progress.advance(1, Work(2, 10, 1e6), 500, compiled=True, loss=3.25)
        assert printed == ["step 11 of 1,000  loss 3.2500"], "the first line has no rates yet"
        for _ in range(4):
            clock.now += 2.5  # includes half a second of evaluating or saving
            progress.advance(1, Work(2, 1000, 1e6), 2, compiled=False, loss=1.5)
    assert len(printed) == 1
    assert progress.text(1.5) == "step 15 of 1,000  loss 1.5000  0:41:02 left  1 samples/s  500 tokens/s  50% of peak"
    progress.latest = "eval_accuracy 0.750"
    assert progress.text().startswith("step 15 of 1,000  0:41:02 left  eval_accuracy 0.750  1 samples/s")


def test_rates_are_no_powers_of_ten(clock: Clock) -> None:
    with Progress("step", 9, say=print, log=print) as progress:
        progress.advance(1, Work(1, 123_456), 0.05, compiled=False)
        assert "  20 samples/s  2,469,120 tokens/s" in progress.text()
        progress.advance(1, Work(2470, 0), 0.95, compiled=False)
        assert "  2,471 samples/s  123,456 tokens/s" in progress.text()
        progress.advance(1, Work(0, 0), 7999, compiled=False)
        assert "  0.309 samples/s  15.4 tokens/s" in progress.text()


def test_lines_come_now_and_then(clock: Clock) -> None:
    """Without a terminal, lines come at intervals; short work prints none."""
    printed: list[str] = []
    with Progress("answer", 100, say=printed.append, log=pytest.fail) as progress:
        for _ in range(100):
            clock.now += INTERVAL / 10
            progress.advance(1, Work(1, 1), INTERVAL / 10, compiled=False)
    assert [line.split(" of ")[0] for line in printed] == [f"answer {n}" for n in range(10, 101, 10)]
    printed.clear()
    with Progress("answer", 2, say=printed.append, log=pytest.fail) as progress:
        clock.now += INTERVAL - 1
        progress.advance(2, Work(1, 1), 1, compiled=False)
    assert printed == []
    with Progress("step", 5, say=printed.append, log=pytest.fail, always=True) as progress:
        for _ in range(5):
            progress.advance(1, Work(1, 1), 1, compiled=False)
    assert [line.split("  ")[0] for line in printed] == ["step 1 of 5", "step 5 of 5"]
    assert not any(re.search(r"[\x00-\x1f]", line) for line in printed)


def test_a_terminal_has_one_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal shows one line, cut to its width; the log has plain lines."""
    logged: list[str] = []
    with terminal(monkeypatch) as read:
        with Progress("step", 3, say=pytest.fail, log=logged.append, always=True) as progress:
            for _ in range(3):
                clock.now += 10
                time.sleep(0.11)  # tqdm draws no more often
                progress.advance(1, Work(4, 4000), 10, compiled=False, loss=2.0)
        written = read()
    assert "\n" not in written.rstrip(), "the line is rewritten"
    shown = re.sub(r"\x1b\[\w+", "", written).split("\r")
    assert any("step 2 of 3  loss 2.0000  0:00:10 left" in part for part in shown)
    assert max(map(len, shown)) <= 50
    assert [line.split("  ")[0] for line in logged] == ["step 1 of 3", "step 3 of 3"]
    assert not any(re.search(r"[\x00-\x1f]", line) for line in logged)


def test_a_process_that_is_not_the_first_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as read:
        with Progress("step", 1, say=lambda _: None, log=lambda _: None, quiet=True) as progress:
            progress.advance(1, Work(1, 1), 1, compiled=False)
        assert read() == ""


def test_memory_where_the_device_says_it(clock: Clock) -> None:
    stats = {"bytes_in_use": 12.34e9, "peak_bytes_in_use": 31.2e9, "bytes_limit": 79.6e9}
    for known, text in ((stats, "memory 12.3, at most 31.2 of 79.6 GB"), ({"bytes_in_use": 1e9}, "memory 1.0 GB")):
        with Progress("step", 2, say=print, log=print, memory=lambda known=known: known) as progress:
            assert progress.text() == f"step 0 of 2  {text}"


TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d ")


def noted(path: Path) -> list[str]:
    """Lines of a log, without their time."""
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert all(TIME.match(line) for line in lines), lines
    return [TIME.sub("", line, count=1) for line in lines]


def test_the_log_has_everything_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, printed = tmp_path / "log.txt", list[str]()
    with (  # noqa: PT031  # the log is open before the warning
        pytest.warns(UserWarning, match="old file"),
        RunLog(path, printed.append, "umbrella-jax 1") as log,
    ):
        log.say("two\nlines")
        log.say("a name: \x1b[31m\r\udcff é")
        log.note("unsaid")
        logging.getLogger("orbax").warning("slow %s", "disk")
        logging.getLogger("orbax").info("chatter")
        warnings.warn("old file", UserWarning, stacklevel=1)
    assert printed == ["two\nlines", "a name: \x1b[31m\r\udcff é"]
    first, *rest, last = noted(path)
    assert re.fullmatch(r"started: umbrella-jax 1, process \d+ on \S+", first)
    assert rest[:5] == ["two", "  lines", "a name: \\x1b[31m\\r\\udcff é", "unsaid", "WARNING: orbax: slow disk"]
    assert re.fullmatch(r"UserWarning: old file \(.*test_console\.py:\d+\)", rest[5])
    assert (len(rest), last) == (6, "finished:")
    assert how_it_ended(path) == ""
    logging.getLogger("orbax").warning("after it")
    assert len(noted(path)) == 8


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Interrupted(15, "SIGTERM: saved at step 3 of 9"), "SIGTERM: saved at step 3 of 9"),
        (DataError(["one", "two"]), "2 faults:"),
        (
            OSError(28, "No space left on device", "a.jsonl"),
            "a.jsonl: No space left on device: the disk is full; free some space, or write elsewhere",
        ),
        (KeyError("x"), "KeyError: 'x'"),
        (KeyboardInterrupt(), "SIGINT: stopped before there was anything to save"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_the_log_ends_with_the_error(tmp_path: Path, error: BaseException, text: str) -> None:
    """The log ends with the error, with a traceback if it is a bug; a resumed run appends to it."""
    path = tmp_path / "log.txt"
    with pytest.raises(type(error)), RunLog(path, print, "x"):
        raise error
    assert noted(path)[1] == f"ended: {text}"
    assert how_it_ended(path) == text
    assert ("  Traceback (most recent call last):" in noted(path)) == isinstance(error, KeyError)
    before = path.read_bytes()
    log = RunLog(path, print, "x")
    log.__enter__()
    assert how_it_ended(path) is None, "the run goes on, or was killed"
    log.__exit__(None, None, None)
    assert path.read_bytes().startswith(before)
    assert how_it_ended(path) == ""


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that cannot be written is reported once, and closed."""
    printed: list[str] = []
    with RunLog(tmp_path / "log.txt", printed.append, "x") as log:
        file: Any = log._file
        flush = file.flush

        def full() -> None:
            flush()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file, "flush", full)
        log.say("one")
        log.say("two")
    assert file.closed
    assert printed == ["one", f"WARNING: {tmp_path / 'log.txt'}: no longer written: No space left on device", "two"]


def test_no_log_says_nothing_of_an_end(tmp_path: Path) -> None:
    assert how_it_ended(tmp_path / "log.txt") is None
    (tmp_path / "log.txt").write_bytes(b"\xff\n\n" + b"x" * 300_000)
    assert how_it_ended(tmp_path / "log.txt") is None


def test_columns_that_do_not_fit_follow_in_blocks() -> None:
    rows = [["", *(f"run_{i:02}" for i in range(20))], ["x" * 50, *"abcdefghijklmnopqrst"]]
    lines = table_lines(rows)
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).split() == [
        *(f"run_{i:02}" for i in range(5)),
        *("x" * 50, *"abcde"),
        *(f"run_{i:02}" for i in range(5, 10)),
        *("x" * 50, *"fghij"),
        *(f"run_{i:02}" for i in range(10, 15)),
        *("x" * 50, *"klmno"),
        *(f"run_{i:02}" for i in range(15, 20)),
        *("x" * 50, *"pqrst"),
    ]
    assert table_lines([["a", "b"], "", ["cc", "1"]]) == ["a   b", "", "cc  1"]
    assert table_lines([["a", "b"], ["ccccc", "10"]], (4, 3)) == ["a     b", "ccccc", "     10"]


def test_a_model_and_six_baselines_are_rows_of_a_terminal() -> None:
    """Numbers of any size, a baseline that does not answer every task, and chance in the last row."""

    def rows(task: str, shift: float) -> list[dict[str, object]]:
        return [
            {
                "task_id": f"{task}{i}",
                "task_type": task,
                "prediction": f"{-900 - 99 * i + shift}",
                "reference": f"{-900 - 91 * i}",
            }
            for i in range(12)
        ]

    names = ("language model", "CNN", "probe", "connectivity", "intensity", "covariates", "another")
    answers = {name: [*rows("T1", 1e5 * i), *rows("T2", -0.5 * i)] for i, name in enumerate(names)}
    answers["connectivity"] = rows("T2", 3.0)
    scores = {name: score(of, tasks_of(of, {}), resamples=50) for name, of in answers.items()}
    lines = side_by_side(scores)
    assert max(map(len, lines)) <= 80
    one, two, over = (lines.index(title) for title in ("T1 (regression)", "T2 (regression)", "over all tasks"))
    assert [line[:16].strip() for line in lines[one + 2 : one + 9]] == [n for n in names if n != "connectivity"] + [
        "chance"
    ]
    assert [line[:16].strip() for line in lines[two + 2 : two + 10]] == [*names, "chance"]
    mae = scores["CNN"].figures["mae/T1"]
    assert lines[one + 1].split()[:4] == ["mae", "95", "%", "interval"]
    assert lines[one + 3].split()[:5] == ["CNN", short(mae.value), short(mae.low), "to", short(mae.high)]
    assert "connectivity" not in "".join(lines[over:])


def test_wrapping_keeps_empty_lines() -> None:
    """They part the blocks of a table that is wrapped once more, as in a run's summary."""
    assert wrapped("") == [""]
    lines = table_lines([(name, *["1" * 40] * 2) for name in ("T1", "T2")])
    assert [part for line in lines for part in wrapped(line)] == lines
