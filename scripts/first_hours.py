"""Two first hours with umbrella-jax, typed and recorded: docs/first_hours.md.

    python scripts/first_hours.py [--short] [--write] [--work DIR]

Walks both ways (a researcher who trains; an engineer who adds a modality), asserts of each command its exit code and
what its output must hold, and with `--write` writes the page. Commands of umbrella-jax are called in this process, all
others in bash. `--short`, for CI, is the same on fewer subjects and steps, without the few commands that take long
(`Step.long`).
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

from walks import DWI, LESION, NANS, PARTS, TORCH, Part, Step

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first_hours.md"
DIFF = ROOT / "scripts" / "first_hours.diff"
WIDTH = 80
INTERRUPT_AFTER = 5  # lines of metrics.jsonl
NOT_THE_SAME = [  # of another machine or another day, and what stands in the page instead
    (r"\d[\d.,]*(e\+\d+)? (?=(samples|tokens)/s)", "… "),
    (r"\b\d:\d\d:\d\d left", "… left"),
    (r"\b\d[\d.]* (m?s)\b(?!/)", r"… \1"),
    (r"(compiled in|passed in) [\d.]+ ?s( \([\d:]+\))?", r"\1 … s"),
    (r"seconds [\d.e+-]+", "seconds …"),
    (r"has \d[\d.]* GB", "has … GB"),
]


@dataclass(frozen=True)
class Result:
    """What came."""

    step: Step
    output: str
    seconds: float
    fault: str
    """What it did else than it must; empty where nothing."""


def make_world(work: Path, short: bool) -> None:
    """What the newcomers have before they begin: a base, a BIDS data set, and the files that the page shows."""
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
    copied = work / "umbrella-jax"
    for folder in ("umbrella_jax", "convert", "configs", "tests", "docs"):
        shutil.copytree(ROOT / folder, copied / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", copied)


def walk(work: Path, steps: Iterable[Step]) -> Iterator[Result]:
    """Types each command in `work`, which is the working directory."""
    for step in steps:
        begun = time.perf_counter()
        with signalled(step.interrupted):
            code, output = (in_process if re.match(r"(umbrella-jax|python) ", step.typed) else in_shell)(step.typed)
        seconds, output = time.perf_counter() - begun, neutral(output, work)
        missing = [pattern for pattern in step.holds if not re.search(pattern, output, re.MULTILINE)]
        wrong = code != step.code or missing
        fault = f"$ {step.typed}\n{output}\nexit code {code}, expected {step.code}; not there: {missing}"
        yield Result(step, output, seconds, fault if wrong else "")


def in_process(typed: str) -> tuple[int, str]:
    """`umbrella-jax ...` or `python FILE` without a new interpreter: exit code, and stdout and stderr in one."""
    from umbrella_jax.cli import main

    words = [
        w for word in shlex.split(typed) for w in (sorted(map(str, Path().glob(word))) if "*" in word else []) or [word]
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
            return 0, said.getvalue()
        try:
            return main(words[1:]), said.getvalue()
        except SystemExit as end:  # argparse's
            return int(end.code or 0), said.getvalue()


def in_shell(typed: str) -> tuple[int, str]:
    """In bash, where umbrella-jax and python are those of this process: exit code, and stdout and stderr in one."""
    python = shlex.quote(sys.executable)
    begin = f'umbrella-jax() {{ {python} -m umbrella_jax.cli "$@"; }}; python() {{ {python} "$@"; }}; '
    done = subprocess.run(["bash", "-c", begin + typed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@contextlib.contextmanager
def signalled(run: str) -> Iterator[None]:
    """Sends this process SIGTERM behind a few steps of a run; of none where there is no name."""
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
    """Without what another machine or another day would change, colours and lines that were rewritten."""
    output = output.replace(f"{work.resolve()}/", "").replace(str(work.resolve()), ".")
    output = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output)
    output = "\n".join(line.rpartition("\r")[2].rstrip() for line in output.strip("\n").split("\n"))
    for pattern, instead in NOT_THE_SAME:
        output = re.sub(pattern, instead, output)
    return output


def shortened(result: Result) -> list[str]:
    """The first lines, the last, and those that the walk looks for; how many are left out in between."""
    lines = result.output.split("\n") if result.output else []
    first, last = result.step.show
    wanted = {n for n in range(len(lines)) if n < first or n >= len(lines) - last}
    for pattern in result.step.holds:
        match = re.search(pattern, result.output, re.MULTILINE)
        assert match, result.fault
        begins, ends = (result.output.count("\n", 0, at) for at in match.span())
        wanted |= set(range(begins, ends + 1))
    found, left_out = [], 0
    for n, line in enumerate(lines):
        if n in wanted or (n - 1 in wanted and n + 1 in wanted):  # three dots would take as much room
            found += [*([f"[... {left_out} lines]"] if left_out else []), *folded(line)]
            left_out = 0
        else:
            left_out += 1
    return [*found, *([f"[... {left_out} lines]"] if left_out else [])]


FOLD = "  ↪ "


def folded(line: str) -> list[str]:
    """As it stands in a terminal of 80 columns, but that words stay whole."""
    options = {"drop_whitespace": True, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, WIDTH, subsequent_indent=FOLD, replace_whitespace=False, **options) or [""]


def typed_lines(typed: str) -> list[str]:
    """A command as one types it on 80 columns, `\\` where it goes on."""
    lines, line = [], "$"
    one = r"""(?:"[^"]*"|'[^']*'|[^\s"'])+"""
    for word in re.findall(rf"--\S+ (?!-){one}|{one}", typed):  # a flag stands beside its value
        if len(line) + 1 + len(word) > WIDTH - 2:
            lines.append(f"{line} \\")
            line = "   "
        line += f" {word}"
    return [*lines, line]


def page(found: Sequence[tuple[str, Sequence[tuple[Part, Sequence[Result]]]]], seconds: float) -> str:
    """docs/first_hours.md."""
    lines = [HEAD.format(minutes=max(1, round(seconds / 60)))]
    for number, (title, parts) in enumerate(found, start=1):
        lines += [f"## {number}. {title}", ""]
        for part, results in parts:
            lines += [f"### {part.title}", "", *([textwrap.fill(part.text, 120), ""] if part.text else [])]
            for result in results:
                block = ["```console", *typed_lines(result.step.typed), *shortened(result), "```", ""]
                lines += [*([textwrap.fill(result.step.why, 120), ""] if result.step.why else []), *block]
    return "\n".join(lines).rstrip() + "\n"


HEAD = """\
# Two first hours

What two newcomers type, what comes, and why: one who trains on own data, with the mistakes one makes on the way, and
one who changes the model. `python scripts/first_hours.py --write` types all of it and writes this page, in {minutes}
minutes of processor time; commands are called in one process there, and each takes some seconds more by itself. CI
types nearly all of it on fewer subjects (`--short`, `tests/test_first_hours.py`).

What differs from a screen: long output is cut, `[... N lines]`; lines of more than 80 characters are folded, `↪`; paths
lack the folder in which all was typed; times, rates, and what this machine has are `…`. `JAX_COMPILATION_CACHE_DIR` was
set, as a job's should be: what one command compiled, the next does not. The exit code is 2 where what was typed or
handed in is at fault, 1 for any other failure and for what `validate` finds.
"""


def transcript(text: str) -> list[tuple[str, str]]:
    """(command, output) of a page, folded lines put together again."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.split("\n")
        typed = list(itertools.takewhile(lambda line: line.endswith(" \\"), lines))
        typed = lines[: len(typed) + 1]
        command = " ".join(line.removesuffix(" \\").strip() for line in typed).removeprefix("$ ")
        found.append((command, "\n".join(lines[len(typed) :]).replace(f"\n{FOLD}", " ")))
    return found


def main() -> int:
    """Returns 1 where a command does not do what it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer subjects and steps")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--work", type=Path, help="an empty folder for all that is made; default one that is removed")
    parser.add_argument("--json", type=Path, help="where to write commands and outputs to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        os.chdir(work)
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "COLUMNS": str(WIDTH),
            "PYTHONPATH": str(ROOT),
        }
        if arguments.short:  # programs that run once: not worth XLA's optimising them
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
        sys.path.insert(0, str(ROOT))
        make_world(work, arguments.short)
        begun, found, all_results = time.perf_counter(), [], list[Result]()
        for title, parts in PARTS.items():
            of_title = []
            for part in parts:
                results = []
                for result in walk(work, (s for s in part.steps if not (arguments.short and s.long))):
                    print(f"{result.seconds:6.1f} s  $ {result.step.typed}", flush=True)
                    results.append(result)
                of_title.append((part, results))
                all_results += results
            found.append((title, of_title))
        print(f"{time.perf_counter() - begun:.0f} s, {sum(os.times()[:4]):.0f} s of processors")
        if arguments.json:
            told = [(result.step.typed, result.output) for result in all_results]
            arguments.json.write_text(json.dumps(told, indent=1, ensure_ascii=False))
        if faults := [result.fault for result in all_results if result.fault]:
            print("\n\n".join(faults), file=sys.stderr)
            return 1
        if arguments.write:
            PAGE.write_text(page(found, sum(os.times()[:4])), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
