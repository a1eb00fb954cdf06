"""The demo's data: real scans with random pose and brightness, and a drawn target in one hemisphere.

Both source scans are part of nibabel's wheel. The target in the anatomical scan is a bright lesion; in the functional
scan it is a region whose signal follows a block design.
"""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GRID, ZOOMS = (48, 64, 24), (3.0, 3.0, 2.2)  # voxels of an anatomical scan, and their size in mm
MAX_ROTATION, MAX_SHIFT = 5.0, 4.0  # degrees about each axis, mm along each axis
LESION_RADIUS = (9.0, 15.0)  # mm: 3 to 5 voxels
LESION_CENTRE = ((20.0, 40.0), (-40.0, 40.0), (-12.0, 12.0))  # mm from the middle; x to either side
LESION_GAIN = 2.5  # multiple of the brain's 98th percentile
ACTIVE_RADIUS = (12.0, 18.0)  # mm
ACTIVE_GAIN = (0.10, 0.20)  # increase, as a fraction of the resting signal
BLOCK_FRAMES = 5  # rest and task alternate, each for this many frames

LESION_QUESTION = "On which side is the lesion?"
REFERENCE_QUESTION = "A reference scan. On which side is the lesion?"
QUERY_QUESTION = "And in this one?"
ACTIVE_QUESTION = "Which hemisphere is active?"
SIDES = ("left", "right")
SENTENCES = (LESION_QUESTION, REFERENCE_QUESTION, QUERY_QUESTION, ACTIVE_QUESTION, *(f"{side}." for side in SIDES))


@dataclass(frozen=True)
class DemoData:
    """The folder that `make_data` wrote, and its two conversation files, whose subjects are disjoint."""

    root: Path
    train: Path
    eval: Path


def make_data(directory: str | Path, seed: int = 0, train_subjects: int = 320, eval_subjects: int = 40) -> DemoData:
    """Write NIfTI files, one folder per subject, and the conversations about them, train.json and eval.json.

    Each subject has an anatomical scan (48, 64, 24) at 3 x 3 x 2.2 mm with one bright lesion, and a functional run
    (17, 21, 3, 20) at 4 x 4 x 8 mm, TR 2 s, with one active region. Voxels are int16; half of the scans are stored as
    RAS, half as LAS. There are three tasks: `lesion_side` (T1), `active_side` (T1, fMRI), and
    `lesion_side_via_comparison` (T3), in which the reference is another subject of the same split, once with a lesion
    on the same side and once on the other. Sides are the patient's, according to the affine. The same seed gives the
    same bytes.

    Raises:
        ValueError: a number of subjects is not a multiple of 4, so sides and storage orders cannot be balanced.
    """
    if train_subjects % 4 or eval_subjects % 4:
        raise ValueError(f"subjects: expected multiples of 4, got {train_subjects} and {eval_subjects}")
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    head, run = _load_sources()
    first = 1
    for split, count in ("train", train_subjects), ("eval", eval_subjects):
        rng = np.random.default_rng([seed, first])
        # balances sides and storage orders; a subject's lesion side says nothing about its active side
        lesion = rng.permutation([(side, order) for side in SIDES for order in ("RAS", "LAS")] * (count // 4))
        active = rng.permutation(lesion)
        names = [f"sub-{first + i:03d}" for i in range(count)]
        for i, name in enumerate(names):
            scan, affine, inside = _draw_lesion(rng, *head, lesion[i][0])
            _save(root / _anat(name), scan, affine, lesion[i][1])
            if split == "eval":
                _save(root / lesion_mask(name), inside, affine, lesion[i][1])
            _save(root / _func(name), *_draw_activity(rng, *run, active[i][0]), active[i][1])
        conversations = _conversations(rng, names, [s for s, _ in lesion.tolist()], [s for s, _ in active.tolist()])
        (root / f"{split}.json").write_text(json.dumps(conversations, indent=1) + "\n")
        first += count
    return DemoData(root, root / "train.json", root / "eval.json")


def _anat(subject: str) -> str:
    return f"{subject}/anat/{subject}_brain.nii.gz"


def lesion_mask(subject: str) -> str:
    """Return the path, relative to the data's root, of a held-out subject's lesion mask: 1 in the lesion, else 0."""
    return f"{subject}/anat/{subject}_label-lesion_mask.nii.gz"


def _func(subject: str) -> str:
    return f"{subject}/func/{subject}_task-blocks_bold.nii.gz"


def _load_sources() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return both real scans in RAS order, float32, each with its voxel size in mm (and TR in s)."""
    import nibabel as nib

    folder = Path(nib.__file__).parent / "tests" / "data"
    head, run = (nib.as_closest_canonical(nib.load(folder / n)) for n in ("example4d.nii.gz", "functional.nii"))
    volume = head.get_fdata(dtype=np.float32)[..., 0]
    brain = np.argwhere(volume > 0)
    low, high = brain.min(0), brain.max(0) + 1
    volume = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return (volume, np.array(head.header.get_zooms()[:3])), (
        run.get_fdata(dtype=np.float32),
        np.array(run.header.get_zooms()),
    )


def _coordinates(shape: tuple[int, ...], zooms: np.ndarray) -> np.ndarray:
    """Return each voxel's position in mm from the middle of the grid, float32 [D, H, W, 3]."""
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * z for n, z in zip(shape, zooms, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def _affine(shape: tuple[int, ...], zooms: np.ndarray) -> np.ndarray:
    """Return the RAS+ affine with its origin in the middle of the grid."""
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * zooms
    return affine


def _sample(volume: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Interpolate a volume [D, H, W] trilinearly at voxel coordinates [..., 3]; 0 outside."""
    padded = np.ascontiguousarray(np.pad(volume, 1))
    points = np.clip(points + 1, 0, np.array(padded.shape, np.float32) - 1.001)
    low = points.astype(np.int32)
    axes = [(f, 1 - f) for f in np.moveaxis(points - low, -1, 0)]
    strides = np.array([s // padded.itemsize for s in padded.strides], np.int32)
    first, values = low @ strides, padded.ravel()
    result = np.zeros(points.shape[:-1], np.float32)
    for corner in itertools.product((0, 1), repeat=3):
        x, y, z = (near if step == 0 else far for (far, near), step in zip(axes, corner, strict=True))
        result += x * y * z * values[first + np.array(corner) @ strides]
    return result


def _rotation(rng: np.random.Generator) -> np.ndarray:
    matrix = np.eye(3)
    for axis in range(3):
        angle = np.deg2rad(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
        i, j = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
        matrix = matrix @ turn
    return matrix.astype(np.float32)


def _draw_lesion(
    rng: np.random.Generator, head: np.ndarray, zooms: np.ndarray, side: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a lesion on the patient's `side` into the head, with random pose and brightness.

    Returns:
        The scan [D, H, W], its affine, and the lesion's mask, bool [D, H, W].
    """
    grid_zooms = np.array(ZOOMS)
    affine = _affine(GRID, grid_zooms)
    rotation, shift = _rotation(rng), rng.uniform(-MAX_SHIFT, MAX_SHIFT, 3).astype(np.float32)
    if rng.random() < 0.5:  # mirroring half of the heads keeps their asymmetry from revealing the side
        head = head[::-1]
    in_head = (_coordinates(GRID, grid_zooms) - shift) @ rotation  # mm in the head's own frame
    image = _sample(head, in_head / zooms + (np.array(head.shape) - 1) / 2)

    top = np.percentile(image[image > 0], 98)
    image = top * (image / top) ** rng.uniform(0.8, 1.25)
    centre = np.array([rng.uniform(*limits) for limits in LESION_CENTRE]) * (-1 if side == "left" else 1, 1, 1)
    distance = np.linalg.norm(in_head - centre, axis=-1)
    inside = 1 / (1 + np.exp(distance - rng.uniform(*LESION_RADIUS)))  # an edge of a few mm
    image += inside * (LESION_GAIN * top - image)
    image += rng.normal(0, 0.03 * top, GRID) * (image > 0)

    voxel = np.unravel_index(np.argmin(distance), GRID)
    assert ((affine @ (*voxel, 1))[0] < 0) == (side == "left")  # RAS+: x grows towards the patient's right
    return image * rng.uniform(0.7, 1.4), affine, inside > 0.5


def _draw_activity(
    rng: np.random.Generator, run: np.ndarray, zooms: np.ndarray, side: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a region on the patient's `side` whose signal follows the block design.

    Returns:
        The run [D, H, W, T] and its affine.
    """
    shape, frames = run.shape[:3], run.shape[3]
    if rng.random() < 0.5:
        run = run[::-1]
    run = np.roll(run, rng.integers(frames), axis=-1)  # moves the real run's drifts and spikes in time
    positions = _coordinates(shape, zooms[:3])
    centre = np.array([rng.uniform(14, 20) * (-1 if side == "left" else 1), rng.uniform(-25, 25), 0.0])
    inside = 1 / (1 + np.exp(np.linalg.norm(positions - centre, axis=-1) - rng.uniform(*ACTIVE_RADIUS)))
    task = (np.arange(frames) // BLOCK_FRAMES) % 2
    image = run * (1 + rng.uniform(*ACTIVE_GAIN) * inside[..., None] * task)
    image += rng.normal(0, 0.01 * run.mean(), run.shape)
    return image * rng.uniform(0.7, 1.4), _affine(shape, zooms[:3])


def _save(path: Path, image: np.ndarray, affine: np.ndarray, order: str) -> None:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nifti = nib.Nifti1Image(np.clip(np.round(image), 0, None).astype(np.int16), affine)
    nifti.header.set_xyzt_units("mm", "sec")
    if image.ndim == 4:
        nifti.header["pixdim"][4] = 2.0
    ornt = nib.orientations.axcodes2ornt(tuple(order))
    nib.save(nifti.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), ornt)), path)


def _conversations(
    rng: np.random.Generator, subjects: list[str], lesion: list[str], active: list[str]
) -> list[dict[str, Any]]:
    """Return four conversations about each subject; reference scans are drawn from the same subjects."""
    result = []
    for i, subject in enumerate(subjects):
        anat, func = (_anat(subject), "sMRI"), (_func(subject), "fMRI")
        result.append(_conversation(f"{subject}_lesion", "lesion_side", subject, [(*anat, LESION_QUESTION, lesion[i])]))
        result.append(_conversation(f"{subject}_active", "active_side", subject, [(*func, ACTIVE_QUESTION, active[i])]))
        for comparison in ("same", "different"):
            others = [j for j in range(len(subjects)) if j != i and (lesion[j] == lesion[i]) == (comparison == "same")]
            j = int(rng.choice(others))
            reference = (_anat(subjects[j]), "sMRI", REFERENCE_QUESTION, lesion[j])
            conversation = _conversation(
                f"{subject}_{comparison}",
                "lesion_side_via_comparison",
                subject,
                [reference, (*anat, QUERY_QUESTION, lesion[i])],
            )
            conversation["subject_ids"] = [subjects[j], subject]
            conversation["metadata"] |= {
                "reference_id": subjects[j],
                "reference_label": lesion[j],
                "comparison_type": comparison,
            }
            result.append(conversation)
    return result


def _conversation(task_id: str, task: str, subject: str, turns: list[tuple[str, str, str, str]]) -> dict[str, Any]:
    """Return a conversation with (image, modality, question, side) turns; the last side is the subject's label."""
    messages: list[dict[str, Any]] = []
    for path, modality, question, side in turns:
        image = {"type": "image", "modality": modality, "image_path": path}
        messages.append({"role": "user", "content": [image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"{side}."}]})
    return {
        "task_id": task_id,
        "task_type": "T1" if len(turns) == 1 else "T3",
        "subject_ids": [subject],
        "modalities": [modality for _, modality, _, _ in turns],
        "images": [{"path": path, "token": "<image>", "modality": modality} for path, modality, _, _ in turns],
        "conversations": messages,
        "metadata": {"subject_id": subject, "subject_label": turns[-1][3], "task": task},
    }
