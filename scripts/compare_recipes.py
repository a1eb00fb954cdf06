#!/usr/bin/env python
"""What each recipe buys on the demo's data, made hard: fewer subjects, one question about each, as many steps for all.

    python scripts/compare_recipes.py [--work-dir D] [--subjects N] [--epochs N] [--seed N]

Trains the patch embedding; embedding and projector; the embedding in two stages; and in the second of two stages
embedding, projector and adapters (docs/recipes.md), all on the demo's base, whose weights are random. Prints the
held-out accuracy of each with its 95 % interval over subjects. A quarter of an hour on two cores.
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
"""{what it is called: what trains in each of its stages, which share the steps alike}."""


def compare(folder: Path, subjects: int, epochs: int, seed: int) -> None:
    """Trains all recipes below `folder`, stages that two have in common once, and prints the table."""
    make_base(folder / "base", seed)
    data = make_data(folder / "data", seed, train_subjects=subjects, eval_subjects=HELD_OUT)
    table = []
    for recipe, stages in RECIPES.items():
        base, numbers = folder / "base", list[str]()
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
            numbers.append(f"{sum(leaf.size for leaf in Checkpoint.open(out).trained().values()):,}")
            base = out
        (file,) = (base / "predictions").glob("step_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        figure = score(rows, tasks_of(rows)).of(TASK)["accuracy"]
        assert figure.value is not None
        assert figure.low is not None
        assert figure.high is not None
        interval = f"{figure.low:.1%} to {figure.high:.1%}"
        loss = json.loads((base / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
        table.append((recipe, " → ".join(numbers), f"{figure.value:.1%}", interval, f"{loss:.3f}"))
    print(f"\n{subjects} subjects, {epochs} epochs, seed {seed}; {HELD_OUT} held out, chance 50 %\n")
    print("| recipe | numbers that train | accuracy | 95 % interval | loss |\n|---|---|---|---|---|")
    for row in table:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="where files are made and left; default a temporary folder")
    parser.add_argument("--subjects", type=int, default=64, help="to train on, a multiple of 4; default 64")
    parser.add_argument("--epochs", type=int, default=40, help="of all stages together, batches of 16; default 40")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work_dir or Path(temporary)
        compare(folder, arguments.subjects, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
