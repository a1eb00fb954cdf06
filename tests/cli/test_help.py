"""The help of every command, and shell completion."""

import argparse
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from umbrella_jax.cli import main, make_parser
from umbrella_jax.cli.options import DIRECTORIES, FILES, walk

PARSER = make_parser()
COMMANDS = {command.prog: command for command in walk(PARSER)}
ROOT = Path(__file__).parents[2]


def example_of(command: argparse.ArgumentParser) -> str:
    """Return the example command at the end of a help text."""
    assert command.epilog
    title, _, text = command.epilog.partition("\n")
    assert title == "example:"
    assert command.format_help().endswith(f"{command.epilog}\n")
    return text.replace("\\\n", "")


def test_commands_are_found() -> None:
    assert {"umbrella-jax", "umbrella-jax train", "umbrella-jax convert to-hf"} <= COMMANDS.keys()
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = COMMANDS[name].format_help().splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: {name} ")


def test_each_command_is_listed_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in COMMANDS.items():
        if groups := [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]:
            shown = command.format_help().partition("commands:\n")[2].partition("\nexample:")[0].splitlines()[1:]
            listed = [line.split()[0] for line in shown if line]
            assert listed == list(groups[0].choices), name
            assert all(re.match(r"    \S+ +\S+ \S", line) for line in shown if line), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == importlib.metadata.version("umbrella-jax")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It calls this command or one of its commands; the part after `>` is for the shell."""
    words = shlex.split(example_of(COMMANDS[name]).partition(">")[0])
    assert words[: len(name.split())] == name.split()
    if words[-1] == "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            PARSER.parse_args(words[1:])
    else:
        assert callable(PARSER.parse_args(words[1:]).call)


def test_a_wrong_example_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        PARSER.parse_args(["train", "--config", "run.yaml", "--outdir", "runs/sex"])
    assert "--outdir" in capsys.readouterr().err


def test_unknown_flag_prints_the_usage_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["data", "validate", "--config", "run.yaml", "--imageroot=scans"])
    printed = capsys.readouterr().err
    assert printed.startswith("usage: umbrella-jax data validate")
    assert printed.rstrip().endswith("--imageroot scans: no such flag; did you mean --image-root?")


def test_no_flag_is_abbreviated() -> None:
    """If flags could be abbreviated, a new flag would change the meaning of `--eval` in a script."""
    for command in COMMANDS.values():
        assert not command.allow_abbrev, command.prog


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("data from-bids ds out --target sex --target age", "--target: given twice: sex, age; give one value"),
        ("data from-bids ds out --target=sex --target sex", "--target: given twice: sex, sex; give one value"),
        ("train --config a.yaml --epochs 1 --epochs 2", "--epochs: given twice: 1.0, 2.0; give one value"),
        ("train --config a.yaml --out x --output-dir y", "--output-dir/--out: given twice: x, y; give one value"),
        ("train --config a.yaml --set seed=1 --set seed=2", "--set seed: already given by --set"),
        (
            "train --config a.yaml --epochs 1 --set train.epochs=2",
            "--set train.epochs: already given by --epochs",
        ),
    ],
)
def test_a_flag_given_twice_is_an_error(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Argparse would keep the last value. Repeatable flags, such as `--entity` and `--metric`, collect their values."""
    if "--set" in words:
        assert main(words.split()) == 2
    else:
        with pytest.raises(SystemExit, match=r"^2$"):
            main(words.split())
    assert expected in capsys.readouterr().err
    words = "data from-bids ds out --target sex --entity run=1 --entity run=2"
    for _ in range(2):  # a parser can be used again
        assert PARSER.parse_args(words.split()).entities == ["run=1", "run=2"]


def test_flags_have_one_meaning() -> None:
    """A flag has the same kind of value in every command, and no flag is the plural of another."""
    kinds: dict[str, set[str | None]] = {}
    for command in COMMANDS.values():
        for action in command._actions:
            for flag in action.option_strings:
                metavar = action.metavar if isinstance(action.metavar, str) else None
                path = "path" if metavar in (*FILES, *DIRECTORIES) else metavar
                kinds.setdefault(flag, set()).add(path)
    different = {flag: values for flag, values in kinds.items() if len(values) > 1}
    assert different == {"--adapter": {None, "path"}}  # what `to-hf` writes, and what others read
    assert not [flag for flag in kinds if f"{flag}s" in kinds and flag not in ("--answer", "--seed")]


def test_every_directory_that_is_written_has_both_names() -> None:
    """A file, as in `predict`, has only `--out`."""
    named = {name: {a.metavar for a in c._actions if "--out" in a.option_strings} for name, c in COMMANDS.items()}
    both = {name for name, c in COMMANDS.items() if any("--output-dir" in a.option_strings for a in c._actions)}
    assert both == {name for name, metavars in named.items() if metavars == {"DIR"}}
    assert "umbrella-jax train" in both


def test_help_and_package_import_nothing_slow() -> None:
    heavy = "jax flax optax orbax numpy scipy pydantic pydantic_core ruamel nibabel grain transformers shtab tqdm torch"
    code = f"""
import sys
import umbrella_jax
from umbrella_jax.cli import main
try:
    main(["train", "--help"])
except SystemExit as end:
    assert end.code == 0
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & set({heavy.split()!r})), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: umbrella-jax train" in done.stdout
    assert done.stderr.split() == []


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the output of `umbrella-jax completion bash` to a file."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["completion", "bash"]) == 0
    path = tmp_path_factory.mktemp("completion") / "umbrella-jax.bash"
    path.write_text(out.getvalue())
    subprocess.run(["bash", "-n", path], check=True)
    return path


def completed(script: Path, folder: Path, *words: str) -> set[str]:
    """Return bash's completions of the last word in a folder."""
    code = f"""
. {shlex.quote(str(script))}
COMP_WORDS=({" ".join(map(shlex.quote, words))})
COMP_CWORD={len(words) - 1}
read -r function <<< "$(complete -p umbrella-jax | sed -E 's/.*-F ([^ ]+).*/\\1/')"
"$function" umbrella-jax "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert not done.stderr
    return {re.sub(r"/$", "", line) for line in done.stdout.split()}


def test_bash_completes(bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scan.nii.gz").touch()
    assert completed(bash_script, tmp_path, "umbrella-jax", "tr") == {"train"}
    assert completed(bash_script, tmp_path, "umbrella-jax", "convert", "to") == {"to-hf"}
    assert completed(bash_script, tmp_path, "umbrella-jax", "train", "--image-r") == {"--image-root"}
    assert completed(bash_script, tmp_path, "umbrella-jax", "train", "--config", "sc") == {"scans", "scan.nii.gz"}
    assert completed(bash_script, tmp_path, "umbrella-jax", "train", "--image-root", "sc") == {"scans"}
    assert completed(bash_script, tmp_path, "umbrella-jax", "explain", "m", "--method", "o") == {"occlusion"}


def test_zsh_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef umbrella-jax")
    assert "_files -/" in script


def test_every_path_is_completed() -> None:
    """Every metavar is listed as a file, as a directory, or as neither."""
    others = {"NAME", "VALUE", "TEXT", "PROMPT", "ID", "N", "RATE", "SHARE", "FRACTION", "FACTOR", "STEP", "TIME"}
    others |= {"AXES", "ADDRESS", "KEY=VALUE", "ACTION", "TYPE", "METHOD", "COLUMN", "KIND", "SHARES", "NAMES"}
    others |= {"LOW:HIGH:STEP", "SIZE", "SHELL", "COMMAND", "REPO", "BRANCH", "SEEDS", "PATTERN", "WHICH", "I/N"}
    named = {action.metavar for command in COMMANDS.values() for action in command._actions if action.metavar}
    assert named - {*FILES, *DIRECTORIES} <= others
