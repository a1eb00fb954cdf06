"""docs/first_hours.md shows the commands of scripts/first_hours.py and their output."""

import json
import re
import subprocess
import sys
from pathlib import Path

import first_hours
import pytest
from first_hours import FOLD, PAGE, ROOT, Result, folded, neutral, shortened, transcript, typed_lines
from walks import PARTS, Command

from tests.helpers.small_run import process_environment

COMMANDS = [command for parts in PARTS.values() for part in parts for command in part.commands]


@pytest.fixture(scope="module")
def written() -> list[tuple[str, str]]:
    """Return commands and outputs of the page."""
    return transcript(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_the_commands_in_order(written: list[tuple[str, str]]) -> None:
    assert [typed for typed, _ in written] == [command.typed for command in COMMANDS]
    titles = [title for parts in PARTS.values() for title in [part.title for part in parts]]
    assert re.findall(r"^### (.*)$", PAGE.read_text(), re.MULTILINE) == titles


def test_the_page_matches_the_patterns(written: list[tuple[str, str]]) -> None:
    for command, (_, output) in zip(COMMANDS, written, strict=True):
        for pattern in command.patterns:
            assert re.search(pattern, output, re.MULTILINE), (command.typed, pattern)


def test_the_page_depends_on_no_machine(written: list[tuple[str, str]]) -> None:
    for typed, output in written:
        assert not re.search(r"(?<![\w.])/(home|tmp|root|usr|work|opt)\b", typed + output), typed
        assert neutral(output, Path("/nowhere")) == output.strip("\n"), typed
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        assert not [line for line in block.split("\n") if len(line) > 80 and " " in line.removeprefix(FOLD).strip()]


@pytest.mark.slow
def test_the_short_walk(tmp_path: Path) -> None:
    """The commands behave as expected in one process with one device, and none but the long ones is skipped."""
    environment = {k: v for k, v in process_environment().items() if k != "PYTEST_CURRENT_TEST"}
    outputs = tmp_path / "outputs.json"
    command = [sys.executable, ROOT / "scripts" / "first_hours.py", "--short", "--json", outputs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [command.typed for command in COMMANDS if not command.is_long]
    assert [typed for typed, _ in json.loads(outputs.read_text())] == expected


def test_typed_lines_are_the_command() -> None:
    for command in COMMANDS:
        lines = typed_lines(command.typed)
        assert all(len(line) <= 80 for line in lines), command.typed
        assert transcript("\n".join(["```console", *lines, "output", "```"])) == [(command.typed, "output\n")]


def test_shortened_keeps_lines_that_match() -> None:
    command = Command("", "x", [r"seven\n\s+eight"], show=(1, 1))
    lines = ["one", "two", "three", "four", "five", "six", "seven", "  eight", "nine", "ten", "eleven", "twelve"]
    shown = shortened(Result(command, "\n".join(lines), 0.0, ""))
    assert shown == ["one", "[... 5 lines]", "seven", "  eight", "[... 3 lines]", "twelve"]
    assert folded("a" * 50 + " " + "b" * 50) == ["a" * 50, FOLD + "b" * 50]
    assert folded("") == [""]


def test_neutral() -> None:
    work = Path("/some/where")
    assert neutral("/some/where/ds/a.nii: at 12.3 samples/s, 0:12:03 left, in 4.5 s", work) == (
        "ds/a.nii: at … samples/s, … left, in … s"
    )
    assert neutral("\x1b[1mbold\x1b[0m\nold\rnew  \n", work) == "bold\nnew"


def test_unexpected_output_is_a_fault(tmp_path: Path) -> None:
    commands = [Command("", "echo here; exit 3", ["there"]), Command("", "echo there; exit 3", ["there"], 3)]
    wrong, right = first_hours.walk(tmp_path, commands)
    assert "exit code 3, expected 0; missing: ['there']" in wrong.fault
    assert not right.fault
