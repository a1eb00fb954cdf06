"""What README and docs name, small: the world in which `tests/test_docs.py` executes their blocks.

A page's commands run in a folder of its own, in which the names that pages use are there: `WORLD` says which, and
what stands in for them. What one page makes and another one reads (`runs/sex`, ...) is README's own, copied (`GIVEN`).
"""

import doctest
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from tests.helpers.small_run import MODALITIES, VOLUME_SHAPES, read_config, write_config, write_json, write_volume
from umbrella_jax.cli import main, make_parser
from umbrella_jax.config.load import load_config, parse_config
from umbrella_jax.config.schema import RunConfig, to_dict
from umbrella_jax.data.bids.templates import TEMPLATES
from umbrella_jax.data.conversation import read_conversations
from umbrella_jax.demo import make_base
from umbrella_jax.demo.run import ATTRIBUTION_TEXT, print_accuracies
from umbrella_jax.scoring.findings import read_word_list
from umbrella_jax.scoring.structured import read_schema
from umbrella_jax.sharding import make_mesh
from umbrella_jax.study.from_bids import from_bids
from umbrella_jax.study.schema import load_study

ROOT = Path(__file__).parents[2]
README = "README.md"

# The names that pages use -------------------------------------------------------------------------------------------

SUBJECTS = 12
EPOCHS = 8  # of 10 conversations in batches of 2: 40 steps


def _configs(folder: Path) -> None:
    """The YAMLs of configs/ as they are, but for sizes, base, length, and types, which CPUs do slowly."""
    folder.mkdir()
    for file in (ROOT / "configs").glob("*.yaml"):
        settings = read_config(file)
        for name, modality in settings["model"]["modalities"].items():
            modality |= {key: MODALITIES[name][key] for key in ("size", "patch")}
        settings["model"] |= {"base": "LLAVA_DIR", "compute_dtype": "float32", "frozen_dtype": "auto"}
        settings["train"] |= {"epochs": EPOCHS, "max_new_tokens": 8}  # "female." takes five
        write_config(folder / file.name, settings)


def _study(folder: Path) -> None:
    """A BIDS data set: T1w and resting-state scans, sex and age."""
    rows = ["participant_id\tsex\tage"]
    for i in range(1, SUBJECTS + 1):
        name = f"sub-{i:02}"
        rows.append(f"{name}\t{'MF'[i % 2]}\t{20 + i}")
        write_volume(folder / name / "anat" / f"{name}_T1w.nii.gz", VOLUME_SHAPES["T1"], seed=i)
        write_volume(folder / name / "func" / f"{name}_task-rest_bold.nii.gz", VOLUME_SHAPES["rsfMRI"], seed=100 + i)
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    write_json(folder / "participants.json", {"sex": {"Levels": {"M": "male", "F": "female"}}})


def _spoilt(folder: Path) -> None:
    """Conversations with faults: what docs/validate.md shows."""
    folder.mkdir()

    def one(name: str, **fields: Any) -> dict[str, Any]:
        image = {"type": "image", "modality": "sMRI", "image_path": f"{name}_T1w.nii.gz"}
        asked = {"role": "user", "content": [image, {"type": "text", "text": "What is the sex of this subject?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "female."}]}
        return {
            "task_id": name,
            "conversations": [asked, answer],
            "metadata": {"subject_id": name, "task": "sex"},
            **fields,
        }

    for i in range(1, 5):
        values = np.random.default_rng(i).uniform(1, 9, VOLUME_SHAPES["T1"])
        if i == 2:
            values[0, 0, 0] = np.nan
        write_volume(folder / f"sub-0{i}_T1w.nii.gz", VOLUME_SHAPES["T1"], values=values)
    listed = {"images": [{"path": f"sub-0{i}_T1w.nii.gz", "modality": "sMRI"} for i in (3, 4)]}
    write_json(folder / "train.json", [one("sub-01"), one("sub-02"), one("sub-03", **listed)])
    write_json(folder / "eval.json", [one("sub-04"), one("sub-01")])


def _original(file: Path) -> None:
    settings = {"dataset": {"T1": {"img_size": [96, 96, 96]}}, "model": {"T1": {"patch_size": [10, 10, 10]}}}
    settings["model"]["hf_name"] = "llava-hf/llava-interleave-qwen-0.5b-hf"  # type: ignore[assignment]
    write_config(file, settings)


WORLD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "LLAVA_DIR": (make_base, "the demo's base, stock in every respect, for a LLaVA of the hub"),
    "configs": (_configs, "configs/ with small volumes, and few epochs"),
    "my_study": (_study, "a BIDS data set of 12 subjects"),
    "scan.nii.gz": (lambda path: write_volume(path, VOLUME_SHAPES["T1"], seed=50), "a T1w scan of nobody in it"),
    "spoilt": (_spoilt, "four subjects, a NaN, a list of images that is wrong, a subject on both sides"),
    "OLD.yaml": (_original, "a config of the PyTorch system"),
}
"""Name → what makes it, and what it stands for."""

GIVEN: dict[str, tuple[str, ...]] = {
    "docs/answers.md": ("runs/sex",),
    "docs/architecture.md": ("conversations", "runs/sex"),
    "docs/conversion.md": ("runs/sex",),
    "docs/data.md": ("conversations",),
    "docs/evidence.md": ("runs/sex",),
    "docs/metrics.md": ("runs/sex",),
    "docs/pytorch.md": ("exports/sex",),
    "docs/runs.md": ("conversations", "runs/sex"),
    "docs/sharing.md": ("exports/sex",),
}
"""Page → what README makes and the page reads."""
NEEDS = {"runs/sex": ("conversations",)}
"""What of these goes with one of them: a run reads its data."""


@cache
def _new_world() -> tempfile.TemporaryDirectory[str]:
    """Make the world once for all pages; it is removed when the process ends."""
    directory = tempfile.TemporaryDirectory(prefix="docs-world")
    for name, (make, _) in WORLD.items():
        make(Path(directory.name) / name)
    return directory


def make_world(folder: Path) -> None:
    shutil.copytree(_new_world().name, folder, dirs_exist_ok=True)


# Blocks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: the first word behind its fence, and what stands in it."""

    page: str
    line: int
    kind: str
    text: str

    @property
    def label(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def first(self) -> str:
        return next((line.strip() for line in self.text.splitlines() if line.strip()), "")


def pages() -> list[str]:
    """README first: what it makes, the others read. tests/test_first_hours.py executes the one that is a transcript."""
    names = sorted(file.name for file in (ROOT / "docs").glob("*.md") if file.name != "first_hours.md")
    return [README, "CONTRIBUTING.md", *(f"docs/{name}" for name in names)]


def blocks(page: str) -> list[Block]:
    blocks_of_page, kind, start, indent = list[Block](), "", 0, ""
    lines: list[str] | None = None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = re.match(r"^( *)```(.*)$", line)
        if fence and lines is None:
            indent, kind, start, lines = fence[1], fence[2].strip(), number, []
        elif fence:
            assert lines is not None
            blocks_of_page.append(Block(page, start, kind, "\n".join(lines) + "\n"))
            lines = None
        elif lines is not None:
            lines.append(line.removeprefix(indent))
    assert lines is None, f"{page}:{start}: a block that does not end"
    return blocks_of_page


def commands(text: str) -> list[list[str]]:
    """The words of each command of a bash block; comments are left out, `\\` goes on, `&&`, `;` and `|` part."""
    command_words: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word in (";", "&&", "|"):
                command_words += [words] if words else []
                words = []
            else:
                words.append(word)
    return command_words


# What runs them -----------------------------------------------------------------------------------------------------

NOT_RUN: dict[str, str] = {
    "bash scripts/demo.sh": "five minutes; what it prints, compare_demo looks at",
    "bash scripts/test.sh": "the suite itself",
    "pytest": "the suite itself",
    "python scripts/voice.py": "a check of scripts/test.sh",
    "uv tool install": "the environment is the suite's",
    "pre-commit": "not in the suite's environment; its hooks are checks of scripts/test.sh",
    "docker": "no daemon here; bash scripts/check_containers.sh builds what it can",
    "apptainer": "not in the suite's environment; bash scripts/check_containers.sh builds what it can",
    "conda": "not in the suite's environment; tests/test_containers.py reads its file",
    "bash scripts/install.sh": "the environment is the suite's; scripts/test.sh begins with it",
    "bash scripts/lock.sh": "asks the registry for versions, which change",
    "sbatch --array=1-3": "no SLURM here; its words are those of a single run",
    "srun": "no SLURM here; tests/doctor/test_diagnose.py has its variables",
    "uv pip install": "the environment is the suite's; scripts/install.sh installs so",
    "python -m venv": "the environment is the suite's",
    ". .venv/bin/activate": "the environment is the suite's",
}
"""Beginnings of commands that are not executed, with why."""

PARSED: dict[str, str] = {
    "umbrella-jax train --config run.yaml --coordinator": "two machines; tests/run/test_processes.py has two processes",
    "umbrella-jax train --seeds 1,2,3 --config t1_0.5b": "tests/run/test_seeds.py trains several seeds",
    "umbrella-jax score runs/seeds": "tests/run/test_seeds.py scores them",
    "umbrella-jax score runs/sex --by": "README's conversations keep no columns; tests/scoring/test_groups.py has some",
    "umbrella-jax score reports.jsonl": "no reports; tests/scoring/test_text.py has some",
    "umbrella-jax score runs/age": "no run about age; tests/scoring/test_adjustment.py has answers",
    "umbrella-jax score site-a.jsonl": "tests/scoring/test_metrics.py scores several files",
    "umbrella-jax data build study.yaml": "tests/study/test_build.py builds a study",
    "umbrella-jax data from-table": "tests/study/test_from_table.py has a spreadsheet",
    "umbrella-jax plan --config t1_0.5b --base LLAVA_DIR --devices v5e-16 --set model.remat=none --batch-size 64": (
        "tests/plan/test_compile_step.py compiles a step"
    ),
    "umbrella-jax predict runs/conversations": "tests/study/test_build.py trains on a study and answers its test set",
    "umbrella-jax score test.jsonl": "tests/study/test_build.py scores it by site",
    "umbrella-jax serve": "runs until it is stopped; tests/serve has its parts",
    "umbrella-jax cv": "tests/run/test_cross_validation.py trains two folds",
    "umbrella-jax push exports/sex my-lab/sex-t1 --message": "needs the hub; tests/checkpoints/test_push.py has one",
    "umbrella-jax train --config umbrella_llava_train.yaml": "tests/run/test_typed.py trains with both kinds of YAML",
    **dict.fromkeys(
        (
            "umbrella-jax convert to-hf runs/lora",
            "umbrella-jax convert from-hf LLAVA_DIR adapted",
            "umbrella-jax train --config run.yaml --base LLAVA_DIR --adapter",
        ),
        "needs an adapter of PEFT; tests/convert/test_peft_adapter.py has one",
    ),
    "umbrella-jax convert stitch": "tests/checkpoints/test_stitch.py puts two models together",
    "umbrella-jax train --config configs/stage1_stitched.yaml": "tests/checkpoints/test_stitch.py trains such a base",
    "umbrella-jax train --config configs/stage1_0.5b.yaml": "tests/models/test_lora.py trains both stages",
    "umbrella-jax train --config configs/stage2_0.5b.yaml": "tests/models/test_lora.py trains both stages",
}
"""Beginnings of `umbrella-jax` commands of which the words alone are checked, with why."""

CHEAPER: dict[str, tuple[list[str], str]] = {
    "umbrella-jax plan": (["--set", "model.compute_dtype=bfloat16"], "as configs/ has it; see _configs"),
    "umbrella-jax baseline": (
        ["--only", "probe", "intensity"],
        "the network compiles long; tests/baselines/test_compare.py has it",
    ),
}
"""Beginnings of commands → flags that they get besides, with why."""

EXIT_CODES: dict[str, int] = {
    "umbrella-jax data validate --config t1_0.5b --base LLAVA_DIR --train-data spoilt": 1,
}
"""Beginnings of commands that end with another code than 0."""


def beginning(table: Mapping[str, Any], words: Sequence[str]) -> str | None:
    """The key of a table that a command begins with."""
    text = " ".join(words)
    return next((key for key in table if text == key or text.startswith((key + " ", key + "/"))), None)


@cache
def extras() -> frozenset[str]:
    return frozenset(project()["optional-dependencies"])


@cache
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


@dataclass
class Page:
    """A page as it is executed: its folder, the names its Python blocks share, what was printed last."""

    name: str
    folder: Path
    namespace: dict[str, Any] = field(default_factory=dict)
    printed: str = ""

    def run(self, block: Block) -> None:
        """Raises AssertionError, or what the block raises."""
        runner = RUNNERS.get(block.kind)
        assert runner, (
            f"{block.label}: nothing executes {block.kind or 'a block without a kind'}; see docs_world.RUNNERS"
        )
        runner(self, block)


@contextmanager
def captured(devices: int = 1) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """stdout and stderr of what runs within, on some of the eight devices that the suite simulates; configs by name are
    those of the world."""
    out, err = io.StringIO(), io.StringIO()
    on_some = partial(make_mesh, devices=jax.devices()[:devices])
    shipped = {file.stem: file for file in Path("configs").absolute().glob("*.yaml")}
    with ExitStack() as stack:
        if shipped:
            stack.enter_context(mock.patch("umbrella_jax.config.load.shipped_configs", return_value=shipped))
        for module in ("run.preparation", "inference.predict"):
            stack.enter_context(mock.patch(f"umbrella_jax.{module}.make_mesh", on_some))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        yield out, err


def run_bash(page: Page, block: Block) -> None:
    page.printed = ""
    for words in commands(block.text):
        settings = {}
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            name, _, settings[name] = words[0].partition("=")
            words = words[1:]
        if beginning(NOT_RUN, words):
            continue
        program = beginning(PROGRAMS, words)
        assert program, f"{block.label}: nothing runs or checks `{' '.join(words)}`; see docs_world.PROGRAMS"
        page.printed += PROGRAMS[program](page, words, settings).replace(f"{page.folder}/", "")


def umbrella(page: Page, words: list[str], settings: Mapping[str, str]) -> str:
    """`umbrella-jax` in this process."""
    if beginning(PARSED, words):
        make_parser().parse_args(words[1:])
        return ""
    cheap = beginning(CHEAPER, words)
    code = EXIT_CODES.get(beginning(EXIT_CODES, words) or "", 0)
    with captured() as (out, err):
        found = main([*words[1:], *(CHEAPER[cheap][0] if cheap else [])])
    assert found == code, f"{page.name}: {shlex.join(words)}: exit code {found}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue()


def pip(page: Page, words: list[str], settings: Mapping[str, str]) -> str:
    """Extras that are named are pyproject's."""
    for word in words[2:]:
        named = re.fullmatch(r"(?:\.|umbrella-jax|.*\.whl)\[([\w,-]+)\]", word)
        if named:
            assert set(named[1].split(",")) <= extras(), f"{page.name}: {shlex.join(words)}: no such extra"
    return ""


def script(page: Page, words: list[str], settings: Mapping[str, str]) -> str:
    """A launcher, as a dry run: what it prints. The flags of `umbrella-jax` in it are ones that that takes."""
    if words[0] == "sbatch":
        first = next(i for i, word in enumerate(words[1:], 1) if not word.startswith("-"))
        words, settings = ["bash", *words[first:]], {**settings, "DRY_RUN": "1", "SLURM_ARRAY_TASK_ID": "1"}
    elif words[0].endswith("train_tpu_vm.sh"):
        words = [words[0], *(["--dry-run"] if "--dry-run" not in words else []), *words[1:]]
        assert re.search(rf" dist/umbrella_jax-{re.escape(project()['version'])}-py3-none-any.whl ", " ".join(words))
    run = subprocess.run(words, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    trained = re.findall(r"umbrella-jax(?:\\ | )(train|cv)(?:\\ | )(.*)", run.stdout)
    assert trained, f"{page.name}: {shlex.join(words)} trains nothing"
    for command, flags in trained:
        make_parser().parse_args([command, *shlex.split(flags.replace("\\ ", " ").strip())])
    return run.stdout


def kubectl(page: Page, words: list[str], settings: Mapping[str, str]) -> str:
    """The file it names is YAML."""
    if "-f" in words:
        assert read_config(ROOT / words[words.index("-f") + 1])["kind"], page.name
    return ""


Program = Callable[[Page, list[str], Mapping[str, str]], str]
PROGRAMS: dict[str, Program] = {
    "umbrella-jax": umbrella,
    "pip install": pip,
    "pip wheel": pip,
    "sbatch": script,
    "bash scripts": script,
    "scripts": script,
    "kubectl": kubectl,
}
"""Beginnings of commands → what runs them, or checks what can be checked of them."""


def run_python(page: Page, block: Block) -> None:
    code = compile("\n" * block.line + block.text, block.page, "exec")
    with captured() as (out, _):
        exec(code, page.namespace)
    page.printed = out.getvalue()


def run_session(page: Page, block: Block) -> None:
    """Run an interactive session; each statement must print exactly what the block shows, numbers included."""
    text = re.sub(r"^$", "<BLANKLINE>", block.text.rstrip(), flags=re.MULTILINE)  # which doctest wants in outputs
    session = doctest.DocTestParser().get_doctest(text, page.namespace, block.page, block.page, block.line)
    assert session.examples, f"{block.label}: no line begins with >>>"
    differences = io.StringIO()
    with captured():
        failed, _ = doctest.DocTestRunner(verbose=False).run(session, out=differences.write, clear_globs=False)
    assert not failed, f"{block.label}:\n{differences.getvalue()}"
    page.namespace |= session.globs


def run_json(page: Page, block: Block) -> None:
    """A conversation, a participants.json, or a schema, which becomes the page's schema.json."""
    data = json.loads(block.text)
    if data.get("type") == "object":
        assert read_schema(write_json(page.folder / "schema.json", data)).fields
        return
    if "conversations" in data:
        file = write_json(page.folder / "example.json", data)
        run = load_config(page.folder / "configs" / "joint_0.5b.yaml")
        assert len(read_conversations(file, run.model.modalities)) == 1
        return
    has_levels = all(isinstance(column, dict) and "Levels" in column for column in data.values())
    assert has_levels, f"{block.label}: neither conversation nor participants"
    study = page.folder / "levels"
    shutil.copytree(page.folder / "my_study", study)
    write_json(study / "participants.json", data)
    for target, column in data.items():
        assert set(column["Levels"].values()) <= _said(study, page.folder / f"as_{target}", target)


def _said(study: Path, out: Path, target: str, **options: Any) -> set[str]:
    """The last answers of what `data from-bids` makes of a study, without their full stops."""
    from_bids(study, out, target, **options)
    records = [record for file in out.glob("*.json") for record in json.loads(file.read_text())]
    return {record["conversations"][-1]["content"][0]["text"].removesuffix(".") for record in records}


def run_yaml(page: Page, block: Block) -> None:
    """A part of a config, laid over one; a template of `data from-bids`; or a list of words."""
    file = page.folder / f"block_{block.line}.yaml"
    file.write_text(block.text)
    data = read_config(file)
    if "findings" in data:
        read_word_list(file)
        return
    if data.keys() <= {"labels", *TEMPLATES}:
        for kind in TEMPLATES.keys() & data.keys():
            target = "age" if kind == "regression" else "sex"
            answers = _said(page.folder / "my_study", page.folder / f"as_{kind}", target, kind=kind, template=file)
            assert set(data.get("labels", {}).values()) <= answers or kind == "regression"
        return
    assert data.keys() <= RunConfig.__dataclass_fields__.keys(), f"{block.label}: neither a config nor a template"
    whole = to_dict(load_config(page.folder / "configs" / "t1_0.5b.yaml"))
    parse_config(
        {
            key: {**whole[key], **value} if isinstance(value, dict) else value
            for key, value in {**whole, **data}.items()
        },
        block.label,
    )


def run_study(page: Page, block: Block) -> None:
    """A study file; or a part of one, laid over the page's first."""
    file = page.folder / f"block_{block.line}.yaml"
    file.write_text(block.text)
    study = read_config(file)
    whole = page.namespace.setdefault("study", study)
    if "tasks" not in study:
        write_config(file, {**whole, **study, "scans": whole["scans"] | study.get("scans", {})})
    load_study(file)


NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"


def pattern(expected: str) -> re.Pattern[str]:
    """What an `output` block stands for: its words and signs; of numbers that there are some; `…` for anything."""
    parts = []
    for token in re.findall(rf"…|\.\.\.|{NUMBER}|\s+|[^\s\d….]+|.", expected.strip()):
        if token in ("…", "..."):
            parts.append(r"[\s\S]*?")
        elif token[-1].isdigit():
            parts.append(f"(?:{NUMBER})")
        else:
            parts.append(r"\s+" if token.isspace() else re.escape(token))
    return re.compile("".join(parts))


def compare_output(page: Page, block: Block) -> None:
    assert page.printed, f"{block.label}: nothing was printed before it"
    assert pattern(block.text).fullmatch(page.printed.strip()), f"{block.label}: printed was\n{page.printed}"


def compare_demo(page: Page, block: Block) -> None:
    """What the demo prints at its end, of answers made up here: it takes minutes."""
    rows = [
        {"task_id": task, "task_type": "T1", "prediction": "left.", "reference": side, "metadata": {"task": task}}
        for task in ("active_side", "lesion_side", "lesion_side_via_comparison")
        for side in ("left.", "right.", "left.")
    ]
    with captured() as (out, _):
        print_accuracies(rows)
    page.printed = out.getvalue() + ATTRIBUTION_TEXT.format(1.0)
    compare_output(page, block)


def check_tree(page: Page, block: Block) -> None:
    """A listing of folders: a line's names lie in the last folder above it that is less indented."""
    above: list[tuple[int, Path]] = []
    names = 0
    for line in block.text.splitlines():
        depth = len(line) - len(line.lstrip())
        above = [(d, path) for d, path in above if d < depth]
        folder = above[-1][1] if above else ROOT
        for name in itertools.takewhile(lambda word: re.fullmatch(r"[\w./-]+(\.\w+|/)", word), line.split()):
            assert (folder / name).exists(), f"{block.label}: {name} is not in {folder}"
            names += 1
            if name.endswith("/"):
                above.append((depth, folder / name))
    assert names, f"{block.label}: names no file"


PICTURES: dict[str, tuple[str, ...]] = {
    README: ("HF checkpoint directory ──convert──► parameters ─┐",),
    "docs/conversion.md": ("HF directory ──convert from-hf──► native checkpoint",),
    "docs/evidence.md": ("95 % interval  model −",),
    "docs/install.md": ("loss 9.1216; 16 answers", "built, and doctor passes"),
    "docs/serve.md": ("http://127.0.0.1:8765/", "import base64", "Female."),  # tests/serve/test_api.py
    "docs/runs.md": (
        "step 1,200 of 30,000",
        "step 240  evaluation",
        "stopped early at step 1400",
        "resume: from step 40",
        "seed 1: runs/seeds/seed-1",
        "fold-1 without Oslo, 1 of 3",
    ),
    "docs/pytorch.md": ("from transformers import AutoModelForImageTextToText",),  # tests/convert/test_with_code.py
    "docs/study.md": ("study: 25 subjects, 21 included",),
}
"""Page → beginnings of its blocks of kind `picture`: drawings, what a terminal shows while one waits, and a program
that a test of its own runs without this package."""


def look_at_picture(page: Page, block: Block) -> None:
    assert block.first.startswith(PICTURES.get(page.name, ())), f"{block.label}: a picture that PICTURES does not list"


RUNNERS: dict[str, Callable[[Page, Block], None]] = {
    "bash": run_bash,
    "python": run_python,
    "pycon": run_session,
    "json": run_json,
    "yaml": run_yaml,
    "yaml study": run_study,
    "output": compare_output,
    "demo": compare_demo,
    "tree": check_tree,
    "picture": look_at_picture,
}
"""What executes a block, by the first word behind its fence."""


def prepare(name: str, folder: Path, made: Path | None) -> None:
    """Puts into `folder` what a page reads; `made` is where README ran."""
    if any(block.kind in ("bash", "python", "pycon", "json", "yaml") for block in blocks(name)):
        make_world(folder)
    given = GIVEN.get(name, ())
    for product in dict.fromkeys([*given, *(more for one in given for more in NEEDS.get(one, ()))]):
        assert made is not None
        source, target = made / product, folder / product
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def execute(name: str, folder: Path, made: Path | None) -> None:
    """Runs all blocks of a page in `folder`; `made` is where README ran."""
    prepare(name, folder, made)
    page = Page(name, folder)
    with chdir(folder):
        for block in blocks(name):
            page.run(block)
