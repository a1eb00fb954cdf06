#!/usr/bin/env python
"""Compare the recipes of docs/recipes.md on a harder version of the demo.

    python scripts/compare_recipes.py [--work-dir DIR] [--subjects N]

There are fewer subjects and one question about each. The recipes train the
patch embedding; embedding and projector; the embedding in two stages; and the
embedding, then embedding, projector and adapters. All start from the demo's
random base and take the same number of steps. Prints each recipe's held-out
accuracy with its 95 % interval over subjects. Takes a quarter of an hour on two
cores.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.cli import main as umbrella
from umbrella_jax.demo import make_base, make_data
from umbrella_jax.demo.run import CONFIG
from umbrella_jax.scoring.metrics import score, tasks_of

TASK, HELD_OUT = "lesion_side", 160
EMBEDDING = "patch_embed: {weight_decay: 10.0}"  # as configs/tiny.yaml
ADAPTERS = "{rank: 8, alpha: 16, targets: [language_model, vision_tower]}"
GROUPS: dict[str, list[str]] = {
    "embedding": [f"train.groups={{{EMBEDDING}}}"],
    "embedding, projector": [f"train.groups={{{EMBEDDING}, projector: {{}}}}"],
    "embedding, projector, LoRA": [
        f"train.groups={{{EMBEDDING}, projector: {{}}, lora: {{}}}}",
        f"model.lora={ADAPTERS}",
    ],
}
RECIPES: dict[str, list[str]] = {
    "embedding": ["embedding"],
    "embedding, projector": ["embedding, projector"],
    "embedding → embedding": ["embedding", "embedding"],
    "embedding → embedding, projector, LoRA": ["embedding", "embedding, projector, LoRA"],
}
"""{recipe: groups that train in each stage}. All stages of a recipe have the same number of steps."""


def compare(folder: Path, subjects: int, epochs: int, seed: int) -> None:
    """Train all recipes in `folder`, each shared stage once, and print the table."""
    make_base(folder / "base", seed)
    data = make_data(folder / "data", seed, train_subjects=subjects, eval_subjects=HELD_OUT)
    table = []
    for recipe, stages in RECIPES.items():
        base, trainable_counts = folder / "base", list[str]()
        for i, groups in enumerate(stages, 1):
            out = folder / " then ".join([f"{len(stages)} stages", *stages[:i]]).replace(", ", "+").replace(" ", "-")
            if not out.exists():
                flags: list[Any] = ["--config", CONFIG, "--base", base, "--out", out]
                flags += ["--train-data", data.train, "--eval-data", data.eval, "--task-filter", TASK]
                flags += ["--cache", folder / "cache", "--epochs", epochs / len(stages)]
                settings = [*GROUPS[groups], "evaluation.likelihoods=false", f"seed={seed}"]
                flags += [word for setting in settings for word in ("--set", setting)]
                if code := umbrella(["train", *map(str, flags)]):
                    raise SystemExit(code)
            trainable_counts.append(f"{sum(leaf.size for leaf in Checkpoint.open(out).trained().values()):,}")
            base = out
        (file,) = (base / "predictions").glob("step_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        figure = score(rows, tasks_of(rows)).task_figures(TASK)["accuracy"]
        assert figure.value is not None
        assert figure.low is not None
        assert figure.high is not None
        interval = f"{figure.low:.1%} to {figure.high:.1%}"
        loss = json.loads((base / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
        table.append((recipe, " → ".join(trainable_counts), f"{figure.value:.1%}", interval, f"{loss:.3f}"))
    print(f"\n{subjects} subjects, {epochs} epochs, seed {seed}; {HELD_OUT} held out, chance 50 %\n")
    print("| recipe | trainable parameters | accuracy | 95 % interval | loss |\n|---|---|---|---|---|")
    for row in table:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="folder for files; default a temporary one")
    parser.add_argument("--subjects", type=int, default=64, help="training subjects, a multiple of 4; default 64")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of all stages together; default 40")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work_dir or Path(temporary)
        compare(folder, arguments.subjects, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
