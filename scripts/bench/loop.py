"""What the training loop does while no step runs."""

import json
import statistics
from pathlib import Path

from bench.data import CONFIGS
from bench.measure import figure


def loop(work_dir: Path) -> None:
    """Share of time between steps, in a run of the demo's tiny model with its volumes cached."""
    import umbrella_jax
    from umbrella_jax.demo import make_base, make_data

    folder, epochs = work_dir / "loop", 6
    data, out = make_data(folder / "data"), folder / "run"
    overrides = {
        "model.base": str(make_base(folder / "base")),
        "data.train": str(data.train),
        "data.cache": str(folder / "cache"),
        "output_dir": str(out),
        "train.epochs": epochs,
        "train.save_steps": 10**6,
    }
    umbrella_jax.train(umbrella_jax.load_config(CONFIGS / "tiny.yaml", overrides))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = lines[len(lines) // epochs :]  # all shapes are compiled in the first
    waits, steps = ([line[key] for line in lines] for key in ("wait_seconds", "step_seconds"))
    more = {"step_ms": round(statistics.median(steps) * 1e3, 1), "wait_ms": round(statistics.median(waits) * 1e3, 2)}
    figure("loop_between_steps", sum(waits) / sum(waits + steps), "of the time", limit=0.03, **more)
