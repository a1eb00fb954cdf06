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
class Step:
    """One command."""

    why: str
    """A sentence, or two."""
    typed: str
    holds: Sequence[str] = ()
    """Regular expressions that the output must hold, in the short form and in the page."""
    code: int = 0
    show: tuple[int, int] = (14, 4)
    """Lines of the output's beginning and end that the page has."""
    interrupted: str = ""
    """The run directory of a training that SIGTERM ends."""
    long: bool = False
    """Not in the short form."""


@dataclass(frozen=True)
class Part:
    """A heading, and what is below it."""

    title: str
    steps: Sequence[Step]
    text: str = ""


@dataclass(frozen=True)
class Result:
    """What came."""

    step: Step
    output: str
    seconds: float
    fault: str
    """What it did else than it must; empty where nothing."""


LESION = """\
model:
  modalities:
    T1: {{size: [24, 32, 12], patch: [6, 8, 4]}}  # small, for two cores: 48 patches
  remat: none
train:
  groups:
    patch_embed: {{weight_decay: 10.0}}
  batch_size: 8
  epochs: {epochs}
  learning_rate: 2e-3
  warmup_steps: 10
  max_new_tokens: 4
evaluation:
  likelihoods: true  # for AUROC and calibration
seed: 0
"""
FLAGS = "--config lesion.yaml --base llava"
DATA = "--train-data conversations/train.json --eval-data conversations/eval.json --image-root ds"
ASK = '"What is the lesion side of this subject?" --image ds/sub-004/anat/sub-004_T1w.nii.gz'
TORCH = """\
import torch
from transformers import AutoTokenizer

from convert.torch_model import load_umbrella

model = load_umbrella("export")  # transformers' own LlavaForConditionalGeneration
print(type(model).__name__, f"{sum(p.numel() for p in model.parameters()):,} parameters")
tokenizer = AutoTokenizer.from_pretrained("export")
question = "What is the lesion side of this subject?"
ids = tokenizer(
    "<|im_start|>user\\n" + "<image>" * 48 + question + "<|im_end|>\\n<|im_start|>assistant\\n", return_tensors="pt"
)
volume = torch.randn(1, 1, 24, 32, 12)  # a batch of one volume, with its channel
with torch.no_grad():
    print("logits", tuple(model(**ids, pixel_values=volume).logits.shape))
"""
NANS = """\
import nibabel, numpy

path = "spoiled/sub-003/anat/sub-003_T1w.nii.gz"
scan = nibabel.load(path)
voxels = scan.get_fdata(dtype=numpy.float32)
voxels[0, 0, 0] = numpy.nan
scan.set_data_dtype(numpy.float32)
nibabel.save(nibabel.Nifti1Image(voxels, scan.affine), path)
"""

RESEARCHER = [
    Part(
        "What there is",
        [
            Step(
                "A BIDS data set, as any other.",
                "ls ds ds/sub-001/anat",
                [r"participants\.tsv", r"sub-001_T1w"],
                show=(5, 4),
            ),
            Step(
                "What is known of the subjects.", "head -4 ds/participants.tsv", [r"participant_id\s+lesion_side\s+age"]
            ),
            Step(
                "The run's config: `configs/t1_0.5b.yaml` cut down to what two cores train in a minute.",
                "cat lesion.yaml",
                [r"T1: \{size"],
                show=(20, 0),
            ),
        ],
        "40 subjects, each with a T1 scan and a lesion in one hemisphere; and a LLaVA as Hugging Face's hub has it. "
        "Both are small and made by `umbrella_jax/demo`: heads are real, lesions drawn, weights random.",
    ),
    Part(
        "From BIDS to conversations",
        [
            Step(
                "Questions and answers, in splits of subjects that do not overlap.",
                "umbrella-jax data from-bids ds conversations --target lesion_side",
                [
                    r"lesion_side, classification, sMRI, \d+ of \d+ subjects",
                    r"train\.json: \d+ subjects",
                    r"^next:\n  umbrella-jax train",
                ],
            ),
            Step(
                "One line is one conversation.",
                "head -2 conversations/train.json",
                [r'"task_id": "sub-\d+_T1w_lesion_side_classification"'],
            ),
            Step(
                "A column that is not there: the columns that are.",
                "umbrella-jax data from-bids ds other --target lesion",
                [r"participants\.tsv: lesion: expected one such column, got participant_id, lesion_side, age"],
                code=2,
            ),
        ],
    ),
    Part(
        "Is it fit to train on?",
        [
            Step(
                "All that a run would read is read, and all that is wrong is told.",
                f"umbrella-jax data validate {FLAGS} {DATA} --html look.html",
                [r"good: 0 faults, 0 warnings, 0 notes", r"orientation\s+LAS", r"look\.html: holds pictures"],
                show=(26, 9),
            ),
            Step(
                "Without `--image-root` paths start at the conversation file.",
                f"umbrella-jax data validate {FLAGS} --train-data conversations/train.json",
                [r"image-root|image_root", r"not good: \d+ faults"],
                code=1,
                show=(0, 8),
            ),
            Step("A wrong path, ", "mkdir wrong; sed '2s/sub-0/sub-9/g' conversations/train.json > wrong/path.json"),
            Step(
                "is named.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/path.json --image-root ds",
                [r"sub-9\d\d_T1w\.nii\.gz: not found", r"not good: 1 fault"],
                code=1,
                show=(0, 8),
            ),
            Step(
                "A modality that the config does not have,",
                "sed 's/sMRI/PET/g' conversations/train.json > wrong/modality.json",
            ),
            Step(
                "is named with those that it has.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/modality.json --image-root ds",
                [r"PET", r"T1", r"not good: \d+ faults"],
                code=1,
                show=(0, 12),
            ),
            Step(
                "Another split,",
                "umbrella-jax data from-bids ds again --target lesion_side --seed 7",
                [r"again/eval\.json"],
                show=(3, 0),
            ),
            Step(
                "whose eval subjects are in this one's train.",
                f"umbrella-jax data validate {FLAGS} --train-data conversations/train.json "
                "--eval-data again/eval.json --image-root ds",
                [r"in train and in eval", r"subject \d+: conversations/train\.json\[\d+\]", r"not good: \d+ faults"],
                code=1,
                show=(0, 22),
            ),
            Step("A scan with a NaN in it,", "cp -r ds spoiled; python nans.py"),
            Step(
                "stops the run before anything compiles.",
                f"umbrella-jax train {FLAGS} --train-data conversations/train.json --image-root spoiled --out runs/nan",
                [r"sub-003_T1w\.nii\.gz: 1 voxels? (is|are) NaN or infinite"],
                code=2,
            ),
        ],
    ),
    Part(
        "What will train, and what it takes",
        [
            Step(
                "The patch embedding is new and trains; all else is the base's and frozen.",
                f"umbrella-jax inspect {FLAGS}",
                [r"patch_embed\s+[\d,]+\s+0\n", r"language_model\s+0\s+[\d,]+\n", r"T1_proj\.weight"],
                show=(16, 4),
            ),
            Step(
                "Bytes, FLOPs and time on devices that are not at hand.",
                f"umbrella-jax plan {FLAGS} --devices h100x8 --set model.compute_dtype=bfloat16",
                [r"h100", r"to train, as configured: --batch-size 8 --mesh data=\d"],
                show=(24, 12),
            ),
            Step(
                "All but the steps, on this machine: for the queue's short partition, before the long job.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion --dry-run",
                [r"compiled in .* s: step of 8 conversations", r"memory of a device", r"nothing was written"],
                show=(2, 14),
            ),
        ],
    ),
    Part(
        "Train",
        [
            Step(
                "Forgotten: the weights.",
                f"umbrella-jax train --config lesion.yaml {DATA} --out runs/lesion",
                [r"model\.base", r"--base"],
                code=2,
            ),
            Step("Misspelt: a key.", "sed 's/learning_rate/learning_rat/' lesion.yaml > wrong/typo.yaml"),
            Step(
                "",
                f"umbrella-jax train --config wrong/typo.yaml --base llava {DATA} --out runs/lesion",
                [r"learning_rat\b", r"learning_rate"],
                code=2,
            ),
            Step(
                "More devices than there are.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion --mesh data=3",
                [r"mesh"],
                code=2,
            ),
            Step(
                "SLURM sends SIGTERM as a job's time ends; here a second terminal does, `kill -TERM PID`.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion",
                [r"SIGTERM", r"it goes on with\n\s+umbrella-jax train .*--resume"],
                code=143,
                show=(3, 10),
                interrupted="runs/lesion",
            ),
            Step(
                "Forgotten: that there is a run.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion",
                [r"runs/lesion: holds a run; go on with --resume"],
                code=2,
            ),
            Step(
                "The line that it said.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion --resume",
                [r"resume: from step \d+", r"step \d+ of \d+  loss", r"eval_accuracy"],
                show=(0, 16),
            ),
            Step(
                "How far runs are, and how they ended.",
                "umbrella-jax runs runs",
                [r"lesion\s+finished"],
            ),
        ],
    ),
    Part(
        "How good is it?",
        [
            Step(
                "With intervals over subjects, beside chance.",
                "umbrella-jax score runs/lesion/predictions/step_*.jsonl",
                [r"lesion_side_classification", r"balanced_accuracy|accuracy"],
                show=(18, 3),
            ),
            Step(
                "Beside a 3D CNN and a linear probe on the same split.",
                f"umbrella-jax baseline {FLAGS} {DATA} --run runs/lesion --out runs/lesion "
                "--cnn-width 0.25 --cnn-epochs 4",
                [r"language model\s+CNN\s+probe\s+chance"],
                show=(10, 8),
                long=True,
            ),
            Step(
                "One page of all that.",
                "umbrella-jax report runs/lesion --baseline runs/lesion --samples 2 --explain gradient",
                [r"runs/lesion/report\.html: holds pictures"],
                long=True,
            ),
        ],
    ),
    Part(
        "Ask",
        [
            Step("One question.", f"umbrella-jax generate runs/lesion {ASK}", [r"\S"]),
            Step(
                "How probable each answer is.",
                f"umbrella-jax generate runs/lesion {ASK} --answers left. right.",
                [r"\d\d\.\d\d%  left\.", r"\d\.\d\d%  right\."],
            ),
            Step(
                "What the answer rests on, in the scan's own grid.",
                f"umbrella-jax explain runs/lesion {ASK} --out maps --method gradient",
                [r"log p", r"maps/\S+\.nii\.gz"],
            ),
            Step(
                "Every conversation of a file.",
                "umbrella-jax predict runs/lesion --data conversations/eval.json --image-root ds --out answers.jsonl",
                [r"answers\.jsonl: \d+ answers"],
            ),
            Step(
                "A modality that the model does not have.",
                f"umbrella-jax generate runs/lesion {ASK.replace('--image ', '--image PET=')}",
                [r"PET: the model has T1"],
                code=2,
            ),
        ],
    ),
    Part(
        "Back to PyTorch",
        [
            Step(
                "A directory that transformers loads.",
                "umbrella-jax convert to-hf runs/lesion export",
                [r"export"],
            ),
            Step("What a PyTorch user types.", "cat in_torch.py", [r"load_umbrella"], show=(20, 0)),
            Step("", "python in_torch.py", [r"LlavaForConditionalGeneration", r"logits \(1, \d+, \d+\)"]),
        ],
    ),
]
DWI = """\
model:
  modalities:
    T1: {size: [24, 32, 12], patch: [6, 8, 4]}
    rsfMRI: {size: [16, 20, 3, 20], patch: [4, 4, 3, 10]}
    DWI: {size: [20, 24, 4, 6], patch: [5, 6, 2, 3]}  # 4 x 4 x 2 x 2 = 64 patches, of windows of 6 directions
  remat: none
train:
  groups:
    vision_tower.vision_model.embeddings.DWI_*: {}  # the new patch embedding alone
  batch_size: 4
  learning_rate: 1e-3
  max_new_tokens: 2
seed: 0
"""
NEW = "--config dwi.yaml --base llava"
ENGINEER = [
    Part(
        "Configuration alone",
        [
            Step("Diffusion scans, 4D, with patches of their own.", "cat dwi.yaml", [r"DWI: \{size"], show=(20, 0)),
            Step(
                "A modality is a name, a size and a patch: model, gradient, optimiser, checkpoints and export follow.",
                f"umbrella-jax inspect {NEW}",
                [
                    r"DWI: patch embedding not in the checkpoint",
                    r"DWI_proj\.weight\s+\(64, 180\)",
                    r"patch_embed\s+\S+\s+\S+",
                ],
            ),
            Step(
                "A group that trains may be any pattern of parameter paths.",
                f"umbrella-jax inspect {NEW} --set 'train.groups={{patch_embed: {{}}, vision_tower.*.q_proj.*: {{}}}}'",
                [r"q_proj\.weight\s+\(2, 64, 64\)\s+\[vision_tower\.\*\.q_proj\.\*\]"],
                show=(0, 12),
            ),
            Step(
                "A pattern that meets nothing is a mistake.",
                f"umbrella-jax inspect {NEW} --set 'train.groups={{vision_tower.*.query.*: {{}}}}'",
                [r"vision_tower\.\*\.query\.\* covers no parameter"],
                code=2,
            ),
            Step(
                "A name is part of a parameter's path.",
                f"umbrella-jax inspect {NEW} --set 'model.modalities.DWI-b1000={{size: [8, 8, 8], patch: [4, 4, 4]}}'",
                [r"modalities\.DWI-b1000: expected letters, digits and _"],
                code=2,
            ),
        ],
        "Freezing, optimiser, checkpoints, conversion, export and `data validate` follow from `model.modalities`. What "
        "does not is listed by file in [architecture.md](architecture.md).",
    ),
    Part(
        "Names that mean something already",
        [
            Step(
                "The PyTorch system's data say `dMRI` of what its T1 embedding takes,",
                "sed 's/sMRI/dMRI/g' conversations/train.json > wrong/alias.json",
            ),
            Step(
                "so `dMRI` is an alias of T1 (`ALIASES` in umbrella_jax/config.py) unless a modality of this very "
                "name is configured: call yours otherwise.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/alias.json --image-root ds",
                [r"T1: \d+ volumes, \d+ of them readable", r"good: 0 faults"],
                show=(3, 2),
            ),
        ],
    ),
    Part(
        "Where code must know it: BIDS",
        [
            Step(
                "Where a modality's files lie is in code.",
                "umbrella-jax data from-bids ds diffusion --target lesion_side --modality DWI",
                [r"invalid choice: 'DWI'"],
                code=2,
            ),
            Step("The change, with its test,", "cat dwi.diff", [r"^\+.*DWI"], show=(400, 0)),
            Step("put into a copy of the repository", "git -C umbrella-jax apply ../dwi.diff"),
            Step("with the config", "cp dwi.yaml umbrella-jax/configs/"),
            Step(
                "goes from BIDS",
                "cd umbrella-jax; umbrella-jax data from-bids ../ds ../diffusion --target lesion_side --modality DWI",
                [r"lesion_side, classification, DWI, 8 of \d+ subjects", r"--config dwi"],
            ),
            Step(
                "to PyTorch.",
                "cd umbrella-jax; python -m pytest tests/test_dwi.py",
                [r"4 passed in"],
                show=(0, 2),
            ),
        ],
        "`data from-bids` knows by name where scans lie. What is 4D is taken in windows of frames: of diffusion, "
        "directions in the file's order; b-values and vectors are not read. In an export the new modality keeps its "
        "name, whatever `--names` calls T1 and rsfMRI. Where two modalities have one size, `.modality` of PyTorch's "
        "patch embedding says which is meant.",
    ),
]
PARTS: dict[str, Sequence[Part]] = {
    "A researcher who knows NIfTI, BIDS, PyTorch and SLURM, and never saw JAX": RESEARCHER,
    "A JAX engineer who adds a modality": ENGINEER,
}


def make_world(work: Path, short: bool) -> None:
    """What the newcomers have before they begin: a base, a BIDS data set, and the files that the page shows."""
    from umbrella_jax.demo import make_base, make_data

    make_base(work / "llava")
    subjects, epochs = (12, 8) if short else (40, 60)
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

What differs from a screen: long output is cut, `[... N lines]`; lines of more than 80 characters are folded, `↪`;
times, rates, and what this machine has are `…`. `JAX_COMPILATION_CACHE_DIR` was set, as a job's should be: what one
command compiled, the next does not. The exit code is 2 where what was typed or handed in is at fault, 1 for any other
failure and for what `validate` finds.
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
