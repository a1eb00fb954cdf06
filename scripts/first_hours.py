"""Type the commands of two first hours with umbrella-jax, and record them.

    python scripts/first_hours.py [--short] [--write] [--work DIR]

Runs both walks of walks.py (a researcher trains; an engineer adds a modality)
and checks the exit code and the output of each command. `--write` writes
docs/first_hours.md. Commands of umbrella-jax run in this process, all others in
bash. `--short`, for CI, uses fewer subjects and steps, and skips the few long
commands.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from walks import DWI, LESION, NANS, PARTS, TORCH, Command, Part

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first_hours.md"
DIFF = ROOT / "scripts" / "first_hours.diff"
WIDTH = 80
INTERRUPT_AFTER = 5  # lines of metrics.jsonl
# Output that changes with the machine or the day, and its replacement on the page.
REPLACEMENTS = [
    (r"\d[\d.,]*(e\+\d+)? (?=(samples|tokens)/s)", "… "),
    (r"\b\d:\d\d:\d\d left", "… left"),
    (r"\b\d[\d.]* (m?s)\b(?!/)", r"… \1"),
    (r"(compiled in|passed in) [\d.]+ ?s( \([\d:]+\))?", r"\1 … s"),
    (r"seconds [\d.e+-]+", "seconds …"),
    (r"has \d[\d.]* GB", "has … GB"),
]


@dataclass(frozen=True)
class Result:
    """A command's output."""

    command: Command
    output: str
    seconds: float
    fault: str
    """How the command differs from its expectation; empty if it does not."""


def make_world(work: Path, short: bool) -> None:
    """Write the files that the walks start with: a base, a BIDS data set, configs, programs, and a copy of the code."""
    from umbrella_jax.demo import make_base, make_data

    make_base(work / "llava")
    subjects, epochs = (12, 8) if short else (100, 24)
    data = make_data(work / "made", 0, subjects - 4, 4)
    rows = []
    for file in data.train, data.eval:
        for conversation in json.loads(file.read_text()):
            if conversation["metadata"]["task"] == "lesion_side":
                name = conversation["metadata"]["subject_id"]
                target = work / "ds" / name / "anat" / f"{name}_T1w.nii.gz"
                target.parent.mkdir(parents=True)
                shutil.move(data.root / conversation["images"][0]["path"], target)
                rows.append((name, conversation["metadata"]["subject_label"], str(20 + 7 * len(rows) % 50)))
    shutil.rmtree(data.root)
    table = [("participant_id", "lesion_side", "age"), *rows]
    (work / "ds" / "participants.tsv").write_text("".join("\t".join(row) + "\n" for row in table))
    description = {"Name": "Heads with a drawn lesion", "BIDSVersion": "1.9.0", "DatasetType": "raw"}
    (work / "ds" / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
    (work / "lesion.yaml").write_text(LESION.format(epochs=epochs))
    (work / "in_torch.py").write_text(TORCH)
    (work / "nans.py").write_text(NANS)

    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(0)
    for name in [row[0] for side in ("left", "right") for row in [row for row in rows if row[1] == side][:4]]:
        file = work / "ds" / name / "dwi" / f"{name}_dwi.nii.gz"
        file.parent.mkdir()
        nib.save(nib.Nifti1Image(rng.normal(500, 100, (20, 22, 5, 7)).astype(np.int16), np.eye(4)), file)
    (work / "dwi.yaml").write_text(DWI)
    shutil.copy(DIFF, work / "dwi.diff")
    copy = work / "umbrella-jax"
    for folder in ("umbrella_jax", "convert", "configs", "tests", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", copy)


def walk(work: Path, commands: Iterable[Command]) -> Iterator[Result]:
    """Run each command in `work`, which must be the working directory."""
    for command in commands:
        start = time.perf_counter()
        run = run_in_process if re.match(r"(umbrella-jax|python) ", command.typed) else run_in_shell
        with terminated(command.interrupted):
            code, output = run(command.typed)
        seconds, output = time.perf_counter() - start, neutral(output, work)
        missing = [pattern for pattern in command.patterns if not re.search(pattern, output, re.MULTILINE)]
        fault = f"$ {command.typed}\n{output}\nexit code {code}, expected {command.code}; missing: {missing}"
        yield Result(command, output, seconds, fault if code != command.code or missing else "")


def run_in_process(typed: str) -> tuple[int, str]:
    """Run `umbrella-jax ...` or `python FILE` in this process; return the exit code, and stdout and stderr together."""
    from umbrella_jax.cli import main

    words = [
        w for word in shlex.split(typed) for w in (sorted(map(str, Path().glob(word))) if "*" in word else []) or [word]
    ]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
            return 0, output.getvalue()
        try:
            return main(words[1:]), output.getvalue()
        except SystemExit as end:  # from argparse
            return int(end.code or 0), output.getvalue()


def run_in_shell(typed: str) -> tuple[int, str]:
    """Run a command in bash with this process's umbrella-jax and python; return as `run_in_process` does."""
    python = shlex.quote(sys.executable)
    functions = f'umbrella-jax() {{ {python} -m umbrella_jax.cli "$@"; }}; python() {{ {python} "$@"; }}; '
    words = ["bash", "-c", functions + typed]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@contextlib.contextmanager
def terminated(run: str) -> Iterator[None]:
    """Send this process SIGTERM when the run has made a few steps; without a run, do nothing."""
    done = threading.Event()

    def watch() -> None:
        lines = Path(run) / "metrics.jsonl"
        while not done.wait(0.002):
            if lines.exists() and lines.read_bytes().count(b"\n") >= INTERRUPT_AFTER:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch)
    if run:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if run:
            thread.join()


def neutral(output: str, work: Path) -> str:
    """Replace output that depends on the machine or the day; remove colours and overwritten lines."""
    output = output.replace(f"{work.resolve()}/", "").replace(str(work.resolve()), ".")
    output = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output)
    output = "\n".join(line.rpartition("\r")[2].rstrip() for line in output.strip("\n").split("\n"))
    for pattern, replacement in REPLACEMENTS:
        output = re.sub(pattern, replacement, output)
    return output


def shortened(result: Result) -> list[str]:
    """Return the first and last lines and those that match the patterns, with the number of lines left out between."""
    lines = result.output.split("\n") if result.output else []
    first, last = result.command.show
    kept = {n for n in range(len(lines)) if n < first or n >= len(lines) - last}
    for pattern in result.command.patterns:
        match = re.search(pattern, result.output, re.MULTILINE)
        assert match, result.fault
        begin, end = (result.output.count("\n", 0, position) for position in match.span())
        kept |= set(range(begin, end + 1))
    shown, left_out = [], 0
    for n, line in enumerate(lines):
        if n in kept or (n - 1 in kept and n + 1 in kept):  # "[... 1 lines]" would be no shorter than the line
            shown += [*([f"[... {left_out} lines]"] if left_out else []), *folded(line)]
            left_out = 0
        else:
            left_out += 1
    return [*shown, *([f"[... {left_out} lines]"] if left_out else [])]


FOLD = "  ↪ "


def folded(line: str) -> list[str]:
    """Wrap a line at 80 columns as a terminal does, but between words."""
    options = {"drop_whitespace": True, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, WIDTH, subsequent_indent=FOLD, replace_whitespace=False, **options) or [""]


def typed_lines(typed: str) -> list[str]:
    """Wrap a command at 80 columns, with `\\` at the end of continued lines."""
    lines, line = [], "$"
    shell_word = r"""(?:"[^"]*"|'[^']*'|[^\s"'])+"""
    for word in re.findall(rf"--\S+ (?!-){shell_word}|{shell_word}", typed):  # keeps a flag and its value together
        if len(line) + 1 + len(word) > WIDTH - 2:
            lines.append(f"{line} \\")
            line = "   "
        line += f" {word}"
    return [*lines, line]


def page(walks: Sequence[tuple[str, Sequence[tuple[Part, Sequence[Result]]]]], seconds: float) -> str:
    """Return the text of docs/first_hours.md."""
    lines = [HEAD.format(minutes=max(1, round(seconds / 60)))]
    for number, (title, parts) in enumerate(walks, start=1):
        lines += [f"## {number}. {title}", ""]
        for part, results in parts:
            lines += [f"### {part.title}", "", *([textwrap.fill(part.text, 120), ""] if part.text else [])]
            for result in results:
                block = ["```console", *typed_lines(result.command.typed), *shortened(result), "```", ""]
                lines += [
                    *([textwrap.fill(result.command.introduction, 120), ""] if result.command.introduction else []),
                    *block,
                ]
    return "\n".join(lines).rstrip() + "\n"


HEAD = """\
# Two first hours

Follow two newcomers through their first hour: a researcher who trains on their own data and makes the usual mistakes,
and an engineer who changes the model. `python scripts/first_hours.py --write` runs every command and writes this page
in {minutes} minutes of processor time. It runs them in one process; typed one by one, each takes some seconds more. CI
runs nearly all of them on fewer subjects (`--short`, `tests/test_first_hours.py`).

The page differs from a terminal in a few ways. Long output is cut, `[... N lines]`. Lines of more than 80 characters
are folded, `↪`. Paths lack the working directory. Times, rates and sizes that depend on the machine are `…`.
`JAX_COMPILATION_CACHE_DIR` is set, as it should be for every job, so no program is compiled twice. The exit code is 2
if the command or its input is wrong, and 1 for any other failure and for problems that `validate` finds.
"""


def transcript(text: str) -> list[tuple[str, str]]:
    """Return (command, output) of each block of a page, with folded lines joined again."""
    pairs = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.split("\n")
        typed = list(itertools.takewhile(lambda line: line.endswith(" \\"), lines))
        typed = lines[: len(typed) + 1]
        command = " ".join(line.removesuffix(" \\").strip() for line in typed).removeprefix("$ ")
        pairs.append((command, "\n".join(lines[len(typed) :]).replace(f"\n{FOLD}", " ")))
    return pairs


def record(work: Path, *, short: bool, write: bool, outputs: Path | None) -> list[str]:
    """Run both walks in `work`, and return the faults.

    Args:
        work: empty folder; becomes the working directory.
        short: fewer subjects and steps, without the long commands.
        write: write the page, if there are no faults.
        outputs: JSON file for all commands and their outputs.
    """
    os.chdir(work)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "COLUMNS": str(WIDTH),
        "PYTHONPATH": str(ROOT),
    }
    if short:  # most programs run once: XLA's optimisation takes longer than it saves
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    sys.path.insert(0, str(ROOT))
    make_world(work, short)
    start, walks = time.perf_counter(), []
    for title, parts in PARTS.items():
        sections = []
        for part in parts:
            results = []
            for result in walk(work, (c for c in part.commands if not (short and c.is_long))):
                print(f"{result.seconds:6.1f} s  $ {result.command.typed}", flush=True)
                results.append(result)
            sections.append((part, results))
        walks.append((title, sections))
    processor_seconds = sum(os.times()[:4])
    print(f"{time.perf_counter() - start:.0f} s, {processor_seconds:.0f} s of processor time")
    all_results = [result for _, sections in walks for _, results in sections for result in results]
    if outputs:
        pairs = [(result.command.typed, result.output) for result in all_results]
        outputs.write_text(json.dumps(pairs, indent=1, ensure_ascii=False))
    faults = [result.fault for result in all_results if result.fault]
    if write and not faults:
        PAGE.write_text(page(walks, processor_seconds), encoding="utf-8")
    return faults


def main() -> int:
    """Run both walks. Return 1 if a command's exit code or output is not as expected, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer subjects and steps")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--work", type=Path, help="empty folder to work in; default a temporary one")
    parser.add_argument("--json", type=Path, help="file for commands and outputs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        outputs = arguments.json.resolve() if arguments.json else None
        faults = record(work, short=arguments.short, write=arguments.write, outputs=outputs)
    if faults:
        print("\n\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
