"""What first_hours.py types: two walks, as commands with what their output must hold."""

from collections.abc import Sequence
from dataclasses import dataclass


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
        "100 subjects, each with a T1 scan and a lesion in one hemisphere; and a LLaVA as Hugging Face's hub has it. "
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
                [
                    r"good: 0 faults, 0 warnings, 0 notes",
                    r"orientation\s+LAS",
                    r"look\.html:\n  contains participant data",
                ],
                show=(26, 9),
            ),
            Step(
                "Without `--image-root` paths start at the conversation file.",
                f"umbrella-jax data validate {FLAGS} --train-data conversations/train.json",
                [r"image-root|image_root", r"not good: \d+ faults"],
                code=1,
                show=(0, 15),
            ),
            Step("A wrong path, ", "mkdir wrong; sed '2s/sub-0/sub-9/g' conversations/train.json > wrong/path.json"),
            Step(
                "is named.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/path.json --image-root ds",
                [r"sub-9\d\d_T1w\.nii\.gz, in\s+wrong/path\.json\[0\]", r"not good: 1 fault"],
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
                [r" s, .* MB, step of 8 × ", r"memory of a device", r"nothing was written"],
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
                [r"SIGTERM", r"continue with\n\s+umbrella-jax train .*--resume"],
                code=143,
                show=(3, 10),
                interrupted="runs/lesion",
            ),
            Step(
                "Forgotten: that there is a run.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion",
                [r"runs/lesion: holds a run; continue it with --resume"],
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
                "umbrella-jax score runs/lesion",
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
                [r"runs/lesion/report\.html:\n  contains participant data"],
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
                [r"\d\.\d\d%  left\.", r"\d\.\d\d%  right\."],
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
                    r"DWI_proj\.weight\s+64×180",
                    r"patch_embed\s+\S+\s+\S+",
                ],
            ),
            Step(
                "A group that trains may be any pattern of parameter paths.",
                f"umbrella-jax inspect {NEW} --set 'train.groups={{patch_embed: {{}}, vision_tower.*.q_proj.*: {{}}}}'",
                [r"trains, vision_tower\.\*\.q_proj\.\*:\n", r"q_proj\.weight\s+2×64×64$"],
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
                "The PyTorch system feeds maps named `dMRI` through its T1 patch embedding. Data made for it",
                "sed 's/sMRI/dMRI/g' conversations/train.json > wrong/alias.json",
            ),
            Step(
                "need the same said in the config. Without `aliases`, `dMRI` is a modality of its own.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/alias.json --image-root ds "
                "--set 'model.modalities.T1.aliases=[dMRI]'",
                [r"T1: \d+ volumes, \d+ readable", r"good: 0 faults"],
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
        "directions in the file's order; b-values and vectors are not read. An export leaves out T1 and rsfMRI, "
        "because this run trained neither. If two modalities have the same size, set `.modality` of PyTorch's patch "
        "embedding to the one that you mean.",
    ),
]
PARTS: dict[str, Sequence[Part]] = {
    "A researcher who knows NIfTI, BIDS, PyTorch and SLURM, and never saw JAX": RESEARCHER,
    "A JAX engineer who adds a modality": ENGINEER,
}
