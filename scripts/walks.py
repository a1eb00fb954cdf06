"""The two walks of first_hours.py: commands, and patterns that their output must match."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command, with the sentences that introduce it on the page."""

    introduction: str
    typed: str
    patterns: Sequence[str] = ()
    """Regular expressions that the output must match, on the page and in the short walk."""
    code: int = 0
    """Expected exit code."""
    show: tuple[int, int] = (14, 4)
    """How many lines of the output the page shows: at the beginning, and at the end."""
    interrupted: str = ""
    """Run directory of a training run that the walk ends by SIGTERM; empty for any other command."""
    is_long: bool = False
    """Whether the short walk skips the command."""


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    title: str
    commands: Sequence[Command]
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

model = load_umbrella("export")  # a LlavaForConditionalGeneration for volumes
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
        "The inputs",
        [
            Command(
                "An ordinary BIDS data set.",
                "ls ds ds/sub-001/anat",
                [r"participants\.tsv", r"sub-001_T1w"],
                show=(5, 4),
            ),
            Command("The subjects' labels.", "head -4 ds/participants.tsv", [r"participant_id\s+lesion_side\s+age"]),
            Command(
                "The run's config: `configs/t1_0.5b.yaml`, reduced until two cores train it in a minute.",
                "cat lesion.yaml",
                [r"T1: \{size"],
                show=(20, 0),
            ),
        ],
        "There are 100 subjects, each with a T1 scan and a lesion in one hemisphere, and a LLaVA in the format of "
        "Hugging Face's hub. Both are small and made by `umbrella_jax/demo`: the heads are real, the lesions drawn, "
        "and the weights random.",
    ),
    Part(
        "From BIDS to conversations",
        [
            Command(
                "Turn the table into questions and answers. No subject is in two splits.",
                "umbrella-jax data from-bids ds conversations --target lesion_side",
                [
                    r"lesion_side, classification, sMRI, \d+ of \d+ subjects",
                    r"train\.json: \d+ subjects",
                    r"^next:\n  umbrella-jax train",
                ],
            ),
            Command(
                "One line is one conversation.",
                "head -2 conversations/train.json",
                [r'"task_id": "sub-\d+_T1w_lesion_side_classification"'],
            ),
            Command(
                "A mistake: a column that does not exist. The message lists the ones that do.",
                "umbrella-jax data from-bids ds other --target lesion",
                [r"participants\.tsv: lesion: expected one such column, got participant_id, lesion_side, age"],
                code=2,
            ),
        ],
    ),
    Part(
        "Check the data",
        [
            Command(
                "`data validate` reads everything that a run would read, and reports every problem.",
                f"umbrella-jax data validate {FLAGS} {DATA} --html look.html",
                [
                    r"good: 0 faults, 0 warnings, 0 notes",
                    r"orientation\s+LAS",
                    r"look\.html:\n  contains participant data",
                ],
                show=(26, 9),
            ),
            Command(
                "A mistake: no `--image-root`. Paths then start at the folder of the conversation file.",
                f"umbrella-jax data validate {FLAGS} --train-data conversations/train.json",
                [r"image-root|image_root", r"not good: \d+ faults"],
                code=1,
                show=(0, 15),
            ),
            Command("A wrong path:", "mkdir wrong; sed '2s/sub-0/sub-9/g' conversations/train.json > wrong/path.json"),
            Command(
                "The report names the file and the conversation.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/path.json --image-root ds",
                [r"sub-9\d\d_T1w\.nii\.gz, in\s+wrong/path\.json\[0\]", r"not good: 1 fault"],
                code=1,
                show=(0, 8),
            ),
            Command(
                "A modality that the config lacks:",
                "sed 's/sMRI/PET/g' conversations/train.json > wrong/modality.json",
            ),
            Command(
                "The report names it, and the modalities of the config.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/modality.json --image-root ds",
                [r"PET", r"T1", r"not good: \d+ faults"],
                code=1,
                show=(0, 12),
            ),
            Command(
                "Another random split:",
                "umbrella-jax data from-bids ds again --target lesion_side --seed 7",
                [r"again/eval\.json"],
                show=(3, 0),
            ),
            Command(
                "Some of its evaluation subjects are training subjects of the first split.",
                f"umbrella-jax data validate {FLAGS} --train-data conversations/train.json "
                "--eval-data again/eval.json --image-root ds",
                [r"in train and in eval", r"subject \d+: conversations/train\.json\[\d+\]", r"not good: \d+ faults"],
                code=1,
                show=(0, 22),
            ),
            Command("A scan with a NaN:", "cp -r ds spoiled; python nans.py"),
            Command(
                "It stops the run before anything compiles.",
                f"umbrella-jax train {FLAGS} --train-data conversations/train.json --image-root spoiled --out runs/nan",
                [r"sub-003_T1w\.nii\.gz: 1 voxels? (is|are) NaN or infinite"],
                code=2,
            ),
        ],
    ),
    Part(
        "See what will train, and what it costs",
        [
            Command(
                "The patch embedding is new and trains. Everything else comes from the base and stays frozen.",
                f"umbrella-jax inspect {FLAGS}",
                [r"patch_embed\s+[\d,]+\s+[\d,]+\s+100%", r"language_model\s+[\d,]+\s+0\s+0%", r"T1_proj\.weight"],
                show=(16, 8),
            ),
            Command(
                "Estimate memory, FLOPs and time on devices that you do not have here.",
                f"umbrella-jax plan {FLAGS} --devices h100x8 --set model.compute_dtype=bfloat16",
                [r"h100", r"to train, as configured: --batch-size 8 --mesh data=\d"],
                show=(24, 12),
            ),
            Command(
                "Do everything but the training steps on this machine. On a cluster, do this in a short job before the "
                "long one.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion --dry-run",
                [r" s, .* MB, step of 8 × ", r"memory per device", r"nothing was written"],
                show=(2, 14),
            ),
        ],
    ),
    Part(
        "Train",
        [
            Command(
                "A mistake: no weights.",
                f"umbrella-jax train --config lesion.yaml {DATA} --out runs/lesion",
                [r"model\.base", r"--base"],
                code=2,
            ),
            Command("A mistake: a misspelt key.", "sed 's/learning_rate/learning_rat/' lesion.yaml > wrong/typo.yaml"),
            Command(
                "",
                f"umbrella-jax train --config wrong/typo.yaml --base llava {DATA} --out runs/lesion",
                [r"learning_rat\b", r"learning_rate"],
                code=2,
            ),
            Command(
                "A mistake: more devices than this machine has.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion --mesh data=3",
                [r"mesh"],
                code=2,
            ),
            Command(
                "SLURM sends SIGTERM before a job's time is over. Here a second terminal sends it: `kill -TERM PID`.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion",
                [r"SIGTERM", r"continue with\n\s+umbrella-jax train .*--resume"],
                code=143,
                show=(3, 10),
                interrupted="runs/lesion",
            ),
            Command(
                "A mistake: the same command again, although the directory has a run.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion",
                [r"runs/lesion: holds a run; continue it with --resume"],
                code=2,
            ),
            Command(
                "Continue with the printed command.",
                f"umbrella-jax train {FLAGS} {DATA} --out runs/lesion --resume",
                [r"resume: from step \d+", r"step \d+ of \d+  loss", r"step \d+  lesion\w+: accuracy"],
                show=(0, 11),
            ),
            Command(
                "List the runs, with their progress and state.",
                "umbrella-jax runs runs",
                [r"lesion\s+finished"],
            ),
        ],
    ),
    Part(
        "How good is it?",
        [
            Command(
                "Metrics, with confidence intervals over subjects and the chance level.",
                "umbrella-jax score runs/lesion",
                [r"lesion_side_classification", r"balanced_accuracy|accuracy"],
                show=(18, 3),
            ),
            Command(
                "Compare with simple models on the same split.",
                "umbrella-jax baseline runs/lesion --cnn-width 0.25 --cnn-epochs 4",
                [r"accuracy\s+95 % interval.*\n\s+language model .*\n\s+CNN .*\n\s+probe "],
                show=(7, 15),
                is_long=True,
            ),
            Command(
                "One page with all of these results.",
                "umbrella-jax report runs/lesion --baseline runs/lesion --samples 2 --explain gradient",
                [r"runs/lesion/report\.html:\n  contains participant data"],
                is_long=True,
            ),
        ],
    ),
    Part(
        "Ask the model",
        [
            Command("Ask one question.", f"umbrella-jax generate runs/lesion {ASK}", [r"\S"]),
            Command(
                "Print the probability of each answer.",
                f"umbrella-jax generate runs/lesion {ASK} --answers left. right.",
                [r"\d\.\d\d%  left\.", r"\d\.\d\d%  right\."],
            ),
            Command(
                "Map the voxels that the answer depends on, on the scan's own grid.",
                f"umbrella-jax explain runs/lesion {ASK} --out maps --method gradient",
                [r"log p", r"maps/\S+\.nii\.gz"],
            ),
            Command(
                "Answer every conversation of a file.",
                "umbrella-jax predict runs/lesion --data conversations/eval.json --image-root ds --out answers.jsonl",
                [r"answers\.jsonl: \d+ answers"],
            ),
            Command(
                "A mistake: a modality that the model lacks.",
                f"umbrella-jax generate runs/lesion {ASK.replace('--image ', '--image PET=')}",
                [r"PET: the model has T1"],
                code=2,
            ),
        ],
    ),
    Part(
        "Back to PyTorch",
        [
            Command(
                "Export a directory that transformers loads.",
                "umbrella-jax convert to-hf runs/lesion export",
                [r"export"],
            ),
            Command("A PyTorch user's script:", "cat in_torch.py", [r"load_umbrella"], show=(20, 0)),
            Command("", "python in_torch.py", [r"UmbrellaForConditionalGeneration", r"logits \(1, \d+, \d+\)"]),
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
    vision_tower.vision_model.embeddings.DWI_*: {}  # only the new patch embedding
  batch_size: 4
  learning_rate: 1e-3
  max_new_tokens: 2
seed: 0
"""
NEW = "--config dwi.yaml --base llava"
ENGINEER = [
    Part(
        "Only configuration",
        [
            Command(
                "A config for 4D diffusion scans, with their own patch size.",
                "cat dwi.yaml",
                [r"DWI: \{size"],
                show=(20, 0),
            ),
            Command(
                "A modality needs a name, a size and a patch. Model, gradient, optimiser, checkpoints and export "
                "follow from it.",
                f"umbrella-jax inspect {NEW}",
                [
                    r"DWI: patch embedding not in the checkpoint",
                    r"DWI_proj\.weight\s+64×180",
                    r"patch_embed\s+\S+\s+\S+",
                ],
            ),
            Command(
                "A trainable group can be any pattern of parameter paths.",
                f"umbrella-jax inspect {NEW} --set 'train.groups={{patch_embed: {{}}, vision_tower.*.q_proj.*: {{}}}}'",
                [r"^vision_tower\.\*\.q_proj\.\*:\n  vision_tower\.\S+\.q_proj\.\n", r"  weight\s+2×64×64\s"],
                show=(0, 20),
            ),
            Command(
                "A mistake: a pattern that matches no parameter.",
                f"umbrella-jax inspect {NEW} --set 'train.groups={{vision_tower.*.query.*: {{}}}}'",
                [r"vision_tower\.\*\.query\.\* covers no parameter"],
                code=2,
            ),
            Command(
                "A mistake: a modality's name is part of parameter paths, so it cannot contain `-`.",
                f"umbrella-jax inspect {NEW} --set 'model.modalities.DWI-b1000={{size: [8, 8, 8], patch: [4, 4, 4]}}'",
                [r"modalities\.DWI-b1000: expected letters, digits and _"],
                code=2,
            ),
        ],
        "Freezing, optimiser, checkpoints, conversion, export and `data validate` follow from `model.modalities`. The "
        "files that name a modality in code are listed in [architecture.md](architecture.md).",
    ),
    Part(
        "Names with another meaning",
        [
            Command(
                "The PyTorch system feeds maps named `dMRI` through its T1 patch embedding. These are data for it:",
                "sed 's/sMRI/dMRI/g' conversations/train.json > wrong/alias.json",
            ),
            Command(
                "To read them, add the alias to the config. Without it, `dMRI` is a modality of its own.",
                f"umbrella-jax data validate {FLAGS} --train-data wrong/alias.json --image-root ds "
                "--set 'model.modalities.T1.aliases=[dMRI]'",
                [r"T1: \d+ volumes, \d+ readable", r"good: 0 faults"],
                show=(3, 2),
            ),
        ],
    ),
    Part(
        "A change in code: BIDS",
        [
            Command(
                "A new modality is unknown to it.",
                "umbrella-jax data from-bids ds diffusion --target lesion_side --modality DWI",
                [r"--modality: expected one of .*, got 'DWI'"],
                code=2,
            ),
            Command("The change, with its test:", "cat dwi.diff", [r"^\+.*DWI"], show=(400, 0)),
            Command("Apply it to a copy of the repository.", "git -C umbrella-jax apply ../dwi.diff"),
            Command("Add the config.", "cp dwi.yaml umbrella-jax/configs/"),
            Command(
                "Now `data from-bids` finds the scans.",
                "cd umbrella-jax; umbrella-jax data from-bids ../ds ../diffusion --target lesion_side --modality DWI",
                [r"lesion_side, classification, DWI, 8 of \d+ subjects", r"--config dwi"],
            ),
            Command(
                "The test goes all the way to PyTorch.",
                "cd umbrella-jax; python -m pytest tests/test_dwi.py",
                [r"4 passed in"],
                show=(0, 2),
            ),
        ],
        "`data from-bids` lists the places of each modality's scans in code. 4D scans are read in windows of frames. "
        "For diffusion, the frames are directions in the file's order; b-values and vectors are not read. The export "
        "leaves out T1 and rsfMRI, because this run trained neither. If two modalities have the same size, set "
        "`.modality` of PyTorch's patch embedding to the right one.",
    ),
]
PARTS: dict[str, Sequence[Part]] = {
    "A researcher who knows NIfTI, BIDS, PyTorch and SLURM, but not JAX": RESEARCHER,
    "A JAX engineer who adds a modality": ENGINEER,
}
