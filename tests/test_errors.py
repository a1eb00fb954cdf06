"""Messages of errors and exit codes of the command line."""

import argparse
import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import replace_command
from umbrella_jax import cli, distributed
from umbrella_jax.cli import setup
from umbrella_jax.errors import (
    MEMORY_REMEDY,
    CheckpointError,
    ConfigError,
    DataError,
    Faults,
    Interrupted,
    RunError,
    UmbrellaError,
    known_cause,
)
from umbrella_jax.io.files import strict_json

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("umbrella_jax", "convert") for path in (ROOT / package).rglob("*.py"))


def exit_code(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Return the exit code of a command that raises `error`."""

    def fail(arguments: argparse.Namespace) -> None:
        raise error

    replace_command(monkeypatch, setup, "_from_original", fail)
    return cli.main([*words, "config", "from-original", "old.yaml"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a key"), 2),
        (DataError(["one", "two"]), 2),
        (CheckpointError("a tensor"), 2),
        (UmbrellaError("of several processes"), 2),
        (RunError("a loss"), 1),
        (OSError(28, "No space left on device", "metrics.jsonl"), 1),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmany lines"), 1),
        (MemoryError(), 1),
        (RuntimeError("Unable to initialize backend 'cuda': no driver\nmany lines"), 1),
        (Interrupted(15, "SIGTERM: saved at step 3"), 143),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(error, monkeypatch) == code
    message = capsys.readouterr().err
    assert message.startswith("umbrella-jax: ")
    assert "Traceback" not in message
    assert "many lines" not in message
    if "RESOURCE" in str(error):
        assert "the device's memory is full: lower the batch size" in message


def test_one_of_several_processes_reports_a_full_device_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "is_single_process", lambda: False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end, distributed.exit_on_error():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmany lines")
    assert end.value.code == 1
    message = capsys.readouterr().err.splitlines()
    assert message[0] == "umbrella-jax: process 0 ends, and with it the run:"
    assert message[1:] == [
        f"RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes; the device's memory is full: {MEMORY_REMEDY}"
    ]


def test_a_locale_without_unicode(tmp_path: Path) -> None:
    """With LANG=en_US, as on some clusters, characters that a terminal cannot show are escaped, and files are UTF-8."""
    rows = [{"task_id": "a", "prediction": "left", "reference": "left"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = (
        "import sys; from pathlib import Path; from umbrella_jax.cli import main; from umbrella_jax.io.files import "
        "write_whole; write_whole(Path(sys.argv[1], 'x'), chr(233)); main(['score', sys.argv[1] + '/rows.jsonl'])"
    )
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    finished = subprocess.run(command, env=ascii_only, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert b"\\u2013" in finished.stdout
    assert (tmp_path / "x").read_bytes() == "\xe9".encode()


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(ConfigError("a key"), monkeypatch, "--debug") == 2
    message = capsys.readouterr().err
    assert "Traceback (most recent call last)" in message
    assert message.endswith("umbrella-jax: a key\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("INTERNAL"), KeyError("x"), AssertionError()):
        with pytest.raises(type(error)):
            exit_code(error, monkeypatch)


def test_alike_faults_are_printed_together() -> None:
    """Four or more places with the same reason are listed below it. `faults` itself is unchanged."""
    missing = [f"scan{i}.nii: not found; expected: a volume" for i in range(4)]
    error = DataError([missing[0], "train.json: no turn", *missing[1:], "odd"])
    assert str(error).splitlines() == [
        "6 faults:",
        "  - 4 × not found; expected: a volume",
        *(f"      scan{i}.nii" for i in range(4)),
        "  - train.json: no turn",
        "  - odd",
    ]
    assert str(DataError(missing[1:])).splitlines()[1:] == [f"  - {fault}" for fault in missing[1:]]
    assert error.faults[2] == missing[1]


def test_faults_of_several_checks_are_raised_together() -> None:
    faults = Faults()
    faults.raise_as(DataError)
    with faults:
        raise ConfigError(["one", "two"])
    faults.append("three")
    assert faults.check(lambda: 4) == 4
    with pytest.raises(KeyError), faults:
        raise KeyError("a bug is no fault")
    with pytest.raises(DataError) as caught:
        faults.raise_as(DataError)
    assert caught.value.faults == ("one", "two", "three")


def test_errors_of_argparse_have_the_same_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train"])
    assert end.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_no_error_is_swallowed() -> None:
    """There is no bare `except`, and no `except Exception` that does nothing."""
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"except\s*:", text), path
        assert not re.search(
            r"except (Base)?Exception( as \w+)?:\s*(#.*)?\n\s*(pass|continue|return( None)?)\n", text
        ), path
    assert len(SOURCES) > 60


def test_json_that_we_write_is_strict() -> None:
    assert strict_json({"é": [1.5, (2, None)]}, ensure_ascii=False) == '{"é": [1.5, [2, null]]}'
    value = {"a": math.nan, "b": [math.inf, {"c": (-math.inf, 1e308)}], "d": np.float64("nan")}
    assert strict_json(value) == '{"a": null, "b": [null, {"c": [null, 1e+308]}], "d": null}'


def test_json_is_written_by_strict_json() -> None:
    """Exempt are texts to hash, messages between processes, and values without numbers that could be infinite."""
    exempt = {"training/checkpoint.py", "distributed.py", "data/cache.py", "data/tokenize.py", "data/inputs.py"}
    exempt |= {"study/sheet_process.py", "inference/constrained.py", "scoring/structured.py"}
    exempt |= {"demo/base.py", "demo/data.py", "safetensors_files.py", "export_config.py", "trainable.py", "files.py"}
    exempt |= {"modeling_umbrella.py"}  # which imports nothing of ours; its JSON comes from such a file
    for path in SOURCES:
        if not path.as_posix().endswith(tuple(exempt)):
            assert "json.dump" not in path.read_text(), path


def test_grouped_faults_keep_their_brackets() -> None:
    """A colon inside brackets does not end the place of a fault."""
    faults = [f"a.json[{i}] (task: T{i}): no such image; give --image-root" for i in range(5)]
    assert str(DataError(faults)).splitlines() == [
        "5 faults:",
        "  - 5 × no such image; give --image-root",
        *(f"      a.json[{i}] (task: T{i})" for i in range(5)),
    ]
    assert str(DataError(["a (b", "(c: d) e: f"])) == "2 faults:\n  - a (b\n  - (c: d) e: f"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "No space left on device: the disk is full; free some space, or write elsewhere"),
        (errno.EDQUOT, "Disk quota exceeded: your quota on this disk is used up; free some space, or write elsewhere"),
        (errno.EROFS, "Read-only file system: the file system is read-only; write elsewhere"),
        (errno.EACCES, "Permission denied: ask its owner for access, or use another path"),
        (errno.ENOENT, "No such file or directory"),
    ],
)
def test_errors_of_the_system_name_file_and_remedy(number: int, expected: str) -> None:
    assert known_cause(OSError(number, os.strerror(number), "out/a.jsonl")) == f"out/a.jsonl: {expected}"


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """JAX raises an AssertionError without a message if no plugin for the platform is installed."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code = compile("raise AssertionError", "/jax/_src/xla_bridge.py", "exec")
    with pytest.raises(AssertionError) as caught:
        exec(code)
    assert exit_code(caught.value, monkeypatch) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        "umbrella-jax: JAX_PLATFORMS=cuda: jax finds no such device: no plugin for it is installed; "
    )
    assert message.count("\n") == 1
