#!/usr/bin/env python
"""Compare the losses of a regression (train.number_loss) on small data, for docs/recipes.md.

    python scripts/compare_number_losses.py [--subjects N] [--epochs N]

A scan is noise with one bright ball; the question is its size, a number from 20
to 79 that the radius shows only roughly. Each loss trains the demo's random base
from the same start for the same number of steps. Prints held-out figures.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from umbrella_jax.cli import main as umbrella
from umbrella_jax.demo import make_base
from umbrella_jax.scoring.metrics import read_predictions, score, tasks_of

LOSSES = {
    "cross-entropy": "null",
    "expected squared error": "{weight: %g}",
    "squared error of the expectation": "{weight: %g, form: squared_error_of_expectation}",
}
FIGURES = ("mae", "mae/expectation", "rmse/expectation", "crps", "coverage/80", "interval_width/80")
CONFIG = """
model:
  modalities: {T1: {size: [16, 16, 16], patch: [8, 8, 8]}}
  remat: none
train:
  groups: {patch_embed: {weight_decay: 1.0}, projector: {}, language_model: {}}
  batch_size: 16
  learning_rate: 1e-3
  warmup_steps: 20
  max_new_tokens: 8
evaluation:
  tasks: {size: {kind: regression, numbers: {low: 20, high: 79}}}
"""
HELD_OUT = 200


def make_data(folder: Path, name: str, subjects: int, seed: int) -> Path:
    """Write scans of balls, and the conversations about their sizes."""
    rng = np.random.default_rng(seed)
    axes = np.stack(np.meshgrid(*[np.arange(16.0)] * 3, indexing="ij"))
    conversations = []
    for i in range(subjects):
        size = int(rng.integers(20, 80))
        radius = 2 + size / 20 + rng.normal(0, 0.25)
        centre = 7.5 + rng.uniform(-1.5, 1.5, 3)
        ball = np.sqrt(np.square(axes - centre[:, None, None, None]).sum(0)) < radius
        path = folder / f"{name}-{i}.nii"
        nib.save(nib.Nifti1Image((rng.normal(1, 0.3, ball.shape) + 2 * ball).astype(np.float32), np.eye(4)), path)
        question = [
            {"type": "image", "modality": "T1", "image_path": str(path)},
            {"type": "text", "text": "How large?"},
        ]
        turns = [("user", question), ("assistant", [{"type": "text", "text": str(size)}])]
        conversations.append(
            {
                "task_id": f"{name}-{i}",
                "task_type": "T1",
                "conversations": [{"role": role, "content": content} for role, content in turns],
                "metadata": {"task": "size", "subject_id": f"{name}-{i}"},
            }
        )
    file = folder / f"{name}.json"
    file.write_text(json.dumps(conversations))
    return file


def compare(folder: Path, subjects: int, epochs: float, weight: float) -> None:
    """Train with each loss in `folder`, and print the table."""
    make_base(folder / "base")
    (folder / "config.yaml").write_text(CONFIG)
    train, held_out = (make_data(folder, *each) for each in (("train", subjects, 0), ("eval", HELD_OUT, 1)))
    table = []
    for number, (name, loss) in enumerate(LOSSES.items()):
        out = folder / str(number)
        flags: list[Any] = ["--config", folder / "config.yaml", "--base", folder / "base", "--out", out]
        flags += ["--train-data", train, "--eval-data", held_out, "--epochs", epochs]
        setting = f"train.number_loss={loss % weight if '%' in loss else loss}"
        if umbrella([*map(str, ["train", *flags, "--set", setting])]):
            raise SystemExit(1)
        (predictions,) = (out / "predictions").iterdir()
        rows = read_predictions(predictions)
        figures = score(rows, tasks_of(rows)).task_figures("size")
        table.append(f"| {name} | " + " | ".join(f"{figures[key].value:.2f}" for key in FIGURES) + " |")
        mae = figures["mae/expectation"]
        print(f"{name}: mae/expectation {mae.value:.2f}, 95 % interval {mae.low:.2f} to {mae.high:.2f}")
    print(f"| loss | {' | '.join(FIGURES)} |\n|{'---|' * (len(FIGURES) + 1)}")
    print("\n".join(table))


def main() -> None:
    """Parse the arguments, and compare in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=320, help="training subjects")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--weight", type=float, default=1.0, help="of the loss over numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments.subjects, arguments.epochs, arguments.weight)


if __name__ == "__main__":
    main()
