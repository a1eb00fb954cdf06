"""Time that the training loop spends between steps."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from bench.convert import make_base
from bench.data import CONFIGS
from bench.measure import figure

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def loop(work_dir: Path) -> None:
    """Measure the share of time between steps: the demo's tiny model; 0.5b with a save every other step."""
    from umbrella_jax.demo import make_base as make_tiny
    from umbrella_jax.demo import make_data

    folder = work_dir / "loop"
    tiny, data = make_tiny(folder / "tiny"), make_data(folder / "data")
    common = {"data.cache": str(folder / "cache"), "data.train": str(data.train), "data.eval": None}
    epochs = 6
    options = {"model.base": str(tiny), "train.epochs": epochs, "train.save_steps": 10**6}
    lines = run("tiny", folder / "run_tiny", common | options)
    print_share("loop_between_steps", lines[len(lines) // epochs :])  # the first epoch compiles all shapes

    make_base(folder / "0.5b")
    for name in TOKENIZER_FILES:
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
    print_share("loop_between_steps_05b", run("t1_0.5b", folder / "run_05b", common | options)[1:])


def run(config: str, out: Path, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """Train and return the run's lines of metrics."""
    import umbrella_jax

    umbrella_jax.train(umbrella_jax.load_config(CONFIGS / f"{config}.yaml", overrides | {"output_dir": str(out)}))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def print_share(name: str, lines: list[dict[str, Any]]) -> None:
    """Print the share of time between steps."""
    waits, steps = ([line[key] for line in lines] for key in ("wait_seconds", "step_seconds"))
    more = {"step_ms": round(statistics.median(steps) * 1e3, 1), "wait_ms": round(statistics.median(waits) * 1e3, 2)}
    figure(name, sum(waits) / sum(waits + steps), "of the time", limit=0.03, **more)
