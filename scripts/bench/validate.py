"""Time and memory of the command `data validate --html`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import figure, run

CONFIG = Path(__file__).parents[2] / "configs/t1_0.5b.yaml"


def make_scans(folder: Path, number: int) -> None:
    """Write int16 heads of 91 x 109 x 91 at 2 mm with noise, .nii.gz; each hundredth has voxels of 3 mm."""
    import nibabel as nib
    from isal import igzip

    x, y, z = np.ogrid[-1:1:91j, -1:1:109j, -1:1:91j]
    radius = np.sqrt((x / 0.7) ** 2 + (y / 0.85) ** 2 + (z / 0.75) ** 2)
    head = 800 * (radius < 1) * (0.6 + 0.4 * np.cos(9 * radius) * np.cos(7 * x * y))
    noise = np.random.default_rng(0).normal(0, 12, head.size)
    for i in range(number):
        voxels = np.abs(head + np.roll(noise, 997 * i).reshape(head.shape)).astype(np.int16)
        size = 3 if i % 100 == 99 else 2
        image = nib.Nifti1Image(voxels, np.diag([size, size, size, 1]))
        (folder / f"sub-{i:04d}.nii.gz").write_bytes(igzip.compress(image.to_bytes(), 1))


def make_conversations(file: Path, subjects: range, number: int) -> None:
    """Write questions about the sex of one subject, and each tenth about a second one too."""
    records = []
    for i in range(number):
        shown = [subjects[i % len(subjects)], subjects[i * 7 % len(subjects)]][: 2 if i % 10 == 9 else 1]
        turns: list[dict[str, Any]] = []
        for subject in shown:
            image = {"type": "image", "modality": "sMRI", "image_path": f"sub-{subject:04d}.nii.gz"}
            question = {"type": "text", "text": "What is the sex of this subject?"}
            answer = {"type": "text", "text": "male." if subject % 2 else "female."}
            turns += [{"role": "user", "content": [image, question]}, {"role": "assistant", "content": [answer]}]
        records.append({"task_id": str(i), "conversations": turns, "metadata": {"task": "sex"}})
    file.write_text(json.dumps(records))


def validate(work_dir: Path) -> None:
    """Measure `data validate --html` on 10,000 conversations over 2,000 volumes, and on a tenth of them."""
    from umbrella_jax.demo import make_base

    base = work_dir / "demo_base"
    make_base(base)
    for volumes, limit in ((200, None), (2000, 300)):
        folder = work_dir / f"validate_{volumes}"
        if not folder.exists():
            folder.mkdir(parents=True)
            make_scans(folder, volumes)
            make_conversations(folder / "train.json", range(volumes * 4 // 5), volumes * 4)
            make_conversations(folder / "eval.json", range(volumes * 4 // 5, volumes), volumes)
        page = folder / "page.html"
        page.unlink(missing_ok=True)
        words = ["data", "validate", "--config", CONFIG, "--base", base, "--html", page]
        words += ["--train-data", folder / "train.json", "--eval-data", folder / "eval.json"]
        measured = run(list(map(str, words)))
        figure(
            "validate_seconds",
            measured["seconds"],
            "s",
            **({} if limit is None else {"limit": limit}),
            processor=round(measured["processor"], 1),
            peak_gb=round(measured["peak"], 2),
            page_mb=round(page.stat().st_size / 1e6, 1),
            conversations=5 * volumes,
            volumes=volumes,
        )
