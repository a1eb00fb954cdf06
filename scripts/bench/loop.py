"""What the training loop does while no step runs."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from bench.convert import make_base
from bench.data import CONFIGS
from bench.measure import figure

BESIDE_WEIGHTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def loop(work_dir: Path) -> None:
    """Share of time between steps, volumes cached: the demo's tiny model; 0.5b with a save every other step."""
    from umbrella_jax.demo import make_base as make_tiny
    from umbrella_jax.demo import make_data

    folder = work_dir / "loop"
    tiny, data = make_tiny(folder / "tiny"), make_data(folder / "data")
    common = {"data.cache": str(folder / "cache"), "data.train": str(data.train), "data.eval": None}
    epochs = 6
    options = {"model.base": str(tiny), "train.epochs": epochs, "train.save_steps": 10**6}
    lines = run("tiny", folder / "run_tiny", common | options)
    between("loop_between_steps", lines[len(lines) // epochs :])  # all shapes are compiled in the first

    make_base(folder / "0.5b")
    for name in BESIDE_WEIGHTS:
        if (tiny / name).exists():
            shutil.copy(tiny / name, folder / "0.5b")
    config = json.loads((folder / "0.5b" / "config.json").read_text())
    image = json.loads((tiny / "config.json").read_text())["image_token_index"]
    (folder / "0.5b" / "config.json").write_text(json.dumps(config | {"image_token_index": image}))
    few = make_data(folder / "few", train_subjects=8, eval_subjects=4)
    options = {
        "model.base": str(folder / "0.5b"),
        "model.compute_dtype": "float32",
        "model.frozen_dtype": "auto",
        "model.remat": "none",
        "data.train": str(few.train),
        "data.task_filter": "lesion_side",
        "train.batch_size": 1,
        "train.epochs": 1,
        "train.save_steps": 2,
        "train.eval_steps": None,
    }
    between("loop_between_steps_05b", run("t1_0.5b", folder / "run_05b", common | options)[1:])


def run(config: str, out: Path, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """A run's lines of metrics."""
    import umbrella_jax

    umbrella_jax.train(umbrella_jax.load_config(CONFIGS / f"{config}.yaml", overrides | {"output_dir": str(out)}))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def between(name: str, lines: list[dict[str, Any]]) -> None:
    waits, steps = ([line[key] for line in lines] for key in ("wait_seconds", "step_seconds"))
    more = {"step_ms": round(statistics.median(steps) * 1e3, 1), "wait_ms": round(statistics.median(waits) * 1e3, 2)}
    figure(name, sum(waits) / sum(waits + steps), "of the time", limit=0.03, **more)
