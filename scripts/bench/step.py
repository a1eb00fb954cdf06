"""The training step against PyTorch's: 0.5b size, a T1 volume of 729 patches, 64 tokens, the last 8 supervised."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.data import CONFIGS, synthetic_sizes
from bench.jax_step import model_config
from bench.measure import figure
from bench.workload import ANSWER, SCANS, TEXT
from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.data.epoch_plan import EpochPlan
from umbrella_jax.models import LlavaConfig
from umbrella_jax.plan import HardwarePlan, at_shape, parse_devices, plan_hardware
from umbrella_jax.plan.devices import Devices

ROUNDS, STEPS = 2, 3
JAX, TORCH = "bench.jax_step", "bench.torch_step"


def run(module: str, *options: str) -> list[dict[str, Any]]:
    """Run a module in its own process; return the JSON lines that it prints."""
    words = [sys.executable, "-m", module, *options]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, options))}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def step(work_dir: Path) -> None:
    """Measure seconds and memory of a training step, ours and PyTorch's in turn."""
    steps = ["--steps", str(STEPS)]
    pairs = {  # name: (our options, PyTorch's options, limit of the ratio)
        "none": (["--remat", "none", *steps], ["--mode", "tuned:1", *steps], 0.95),
        "mlp": (["--remat", "mlp", *steps], ["--mode", "tuned:1", "--remat", *steps], 0.85),
    }
    ours: dict[str, list[dict[str, Any]]] = {name: [] for name in pairs}
    theirs: dict[str, list[dict[str, Any]]] = {name: [] for name in pairs}
    rates, compiled, cache = [], [], str(work_dir / "compilation")
    for _ in range(ROUNDS):
        for name, (our_options, their_options, _) in pairs.items():
            rate, compilation, *lines = run(JAX, *our_options)
            rates.append(rate)
            compiled.append(compilation["compile_seconds"] + lines[0]["seconds"])
            ours[name] += lines[1:]
            theirs[name] += run(TORCH, *their_options)[1:]
    seconds = {name: _median(lines) for name, lines in ours.items()}
    for name, (_, _, limit) in pairs.items():
        times = sorted(line["seconds"] for line in ours[name])
        torch = sorted(line["seconds"] for line in theirs[name])
        peaks = {"peak_gib": _peak(ours[name]), "torch_peak_gib": _peak(theirs[name])}
        figure(f"step_{name}_seconds", seconds[name], "s", all=_rounded(times), torch=_rounded(torch), **peaks)
        ratio = seconds[name] / _median(theirs[name])
        figure(
            f"step_{name}_to_torch",
            ratio,
            "",
            limit=limit,
            memory=round(peaks["peak_gib"] / peaks["torch_peak_gib"], 2),
        )
    matmul, layer = (statistics.median(rate[name] for rate in rates) for name in ("matmul_flops", "layer_flops"))
    share = minimum_flops("0.5b", "t1") / seconds["none"] / matmul
    figure("step_none_of_matmul_rate", share, "", at_least=0.8, matmul_gflops=round(matmul / 1e9))
    expected, gflops = planned_seconds(layer), round(layer / 1e9)
    figure("step_none_to_plan", seconds["none"] / expected, "", limit=1.25, planned=round(expected, 1), gflops=gflops)
    figure("first_step_more_seconds", statistics.median(compiled) - seconds["none"], "s", limit=10)
    for _ in range(2):  # the first run fills the cache, the second uses it
        _, compilation, *lines = run(JAX, "--remat", "none", "--steps", "2", "--compilation-cache", cache)
    more = compilation["compile_seconds"] + lines[0]["seconds"] - lines[1]["seconds"]
    figure("first_step_more_seconds_cached", more, "s", limit=4)
    reference = run(TORCH, "--mode", "reference:1", "--steps", "2")[1:]
    ratio = seconds["none"] / _median(reference)
    figure("step_none_to_reference", ratio, "", limit=0.2, torch_seconds=round(_median(reference), 1))


def planned_seconds(rate: float) -> float:
    """Return the step's seconds according to `umbrella-jax plan --devices cpu --flops RATE`."""
    devices = parse_devices("cpu", flops=rate, dtype="float32")
    return make_hardware_plan("0.5b", "t1", 1, "float32", devices).configured[0].step_seconds


def minimum_flops(size: str, scan: str) -> float:
    """Return the FLOPs that any step needs per conversation: forward, and gradients back to the patch embedding."""
    config, model = _workload(size, scan, 1, "float32")
    positions = SCANS[scan].patches + TEXT
    counted = at_shape(config, model, SCANS[scan].modality, positions=positions, targets=ANSWER, frozen_dtype="float32")
    return sum(counted.flops(None).values())


def make_hardware_plan(size: str, scan: str, batch: int, dtype: str, devices: Devices) -> HardwarePlan:
    """Return the plan of `umbrella-jax plan` for a case without remat."""
    config, model = _workload(size, scan, batch, dtype)
    return plan_hardware(config, model, devices, frozen_dtype=dtype, text_tokens=TEXT)


def _workload(size: str, scan: str, batch: int, dtype: str) -> tuple[RunConfig, LlavaConfig]:
    settings = {"model.remat": "none", "model.compute_dtype": dtype, "train.batch_size": batch}
    config = load_config(CONFIGS / f"{SCANS[scan].config}.yaml", settings)
    return config, model_config(size, SCANS[scan], dtype, "none")


def sharing(work_dir: Path) -> None:
    """Compare steps that encode a scan once per batch with steps that encode it once per conversation.

    The conversations are comparisons of two scans. The plan of 600 comparisons over 100 subjects gives the number of
    distinct scans per batch. The model is the 0.5b size's with two layers in tower and language model.
    """
    size = 8
    plan = EpochPlan(synthetic_sizes(100, 0, 600, 0), batch_size=size, seed=0)
    distinct = round(plan.cost.volumes * size)
    lines_by_volumes: dict[int, list[dict[str, Any]]] = {distinct: [], 2 * size: []}
    for _ in range(ROUNDS):
        for volumes, lines in lines_by_volumes.items():
            options = ["--remat", "full", "--layers", "2", "--case", f"t1:{size}", "--images", "2"]
            lines += run(JAX, *options, "--volumes", str(volumes), "--steps", "3")[3:]
    shared, separate = map(_median, lines_by_volumes.values())
    more = {"volumes_per_conversation": round(distinct / size, 2), "padding": round(plan.cost.padding, 3)}
    figure("sharing_conversations_per_second", separate / shared, "times those without", at_least=2, **more)


def _median(lines: list[dict[str, Any]]) -> float:
    return statistics.median(line["seconds"] for line in lines)


def _peak(lines: list[dict[str, Any]]) -> float:
    return round(max(line["peak_gib"] for line in lines), 2)


def _rounded(times: list[float]) -> list[float]:
    return [round(t, 1) for t in times]
