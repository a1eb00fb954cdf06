"""docs/first_hours.md is what scripts/first_hours.py types, and what comes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import first_hours
import pytest
from first_hours import FOLD, PAGE, ROOT, Result, folded, neutral, shortened, transcript, typed_lines
from walks import PARTS, Step

from tests.helpers.small_run import process_environment

STEPS = [step for parts in PARTS.values() for part in parts for step in part.steps]


@pytest.fixture(scope="module")
def written() -> list[tuple[str, str]]:
    """Commands and outputs of the page."""
    return transcript(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_the_commands_in_order(written: list[tuple[str, str]]) -> None:
    assert [typed for typed, _ in written] == [step.typed for step in STEPS]
    titles = [title for parts in PARTS.values() for title in [part.title for part in parts]]
    assert re.findall(r"^### (.*)$", PAGE.read_text(), re.MULTILINE) == titles


def test_the_page_holds_what_the_commands_must_say(written: list[tuple[str, str]]) -> None:
    for step, (_, output) in zip(STEPS, written, strict=True):
        for pattern in step.holds:
            assert re.search(pattern, output, re.MULTILINE), (step.typed, pattern)


def test_the_page_is_of_no_machine(written: list[tuple[str, str]]) -> None:
    for typed, output in written:
        assert not re.search(r"(?<![\w.])/(home|tmp|root|usr|work|opt)\b", typed + output), typed
        assert neutral(output, Path("/nowhere")) == output.strip("\n"), typed
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        assert not [line for line in block.split("\n") if len(line) > 80 and " " in line.removeprefix(FOLD).strip()]


def test_the_short_walk(tmp_path: Path) -> None:
    """The same commands, in one process that sees one device, do what they must; and no step is left out."""
    environment = {k: v for k, v in process_environment().items() if k != "PYTEST_CURRENT_TEST"}
    told = tmp_path / "told.json"
    command = [sys.executable, ROOT / "scripts" / "first_hours.py", "--short", "--json", told]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [typed for typed, _ in json.loads(told.read_text())] == [step.typed for step in STEPS if not step.long]


def test_typed_lines_are_the_command() -> None:
    for step in STEPS:
        lines = typed_lines(step.typed)
        assert all(len(line) <= 80 for line in lines), step.typed
        assert transcript("\n".join(["```console", *lines, "came", "```"])) == [(step.typed, "came\n")]


def test_shortened_keeps_what_is_looked_for() -> None:
    step = Step("", "x", [r"seven\n\s+eight"], show=(1, 1))
    lines = ["one", "two", "three", "four", "five", "six", "seven", "  eight", "nine", "ten", "eleven", "twelve"]
    found = shortened(Result(step, "\n".join(lines), 0.0, ""))
    assert found == ["one", "[... 5 lines]", "seven", "  eight", "[... 3 lines]", "twelve"]
    assert folded("a" * 50 + " " + "b" * 50) == ["a" * 50, FOLD + "b" * 50]
    assert folded("") == [""]


def test_neutral() -> None:
    work = Path("/some/where")
    assert neutral("/some/where/ds/a.nii: at 12.3 samples/s, 0:12:03 left, in 4.5 s", work) == (
        "ds/a.nii: at … samples/s, … left, in … s"
    )
    assert neutral("\x1b[1mbold\x1b[0m\nold\rnew  \n", work) == "bold\nnew"


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    steps = [Step("", "echo here; exit 3", ["there"]), Step("", "echo there; exit 3", ["there"], 3)]
    wrong, right = first_hours.walk(tmp_path, steps)
    assert "exit code 3, expected 0; not there: ['there']" in wrong.fault
    assert not right.fault
