"""The training step beside PyTorch's: 0.5b size, a T1 volume of 729 patches, 64 tokens, 8 of them supervised."""

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
    """The lines that a module prints."""
    words = [sys.executable, "-m", module, *options]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, options))}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def step(work_dir: Path) -> None:
    """Seconds and memory of a training step, ours and PyTorch's in turn."""
    steps = ["--steps", str(STEPS)]
    pairs = {  # ours, and what of PyTorch's it is held against
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
    share = floor("0.5b", "t1") / seconds["none"] / matmul
    figure("step_none_of_matmul_rate", share, "", at_least=0.8, matmul_gflops=round(matmul / 1e9))
    expected, gflops = planned(layer), round(layer / 1e9)
    figure("step_none_to_plan", seconds["none"] / expected, "", limit=1.25, planned=round(expected, 1), gflops=gflops)
    figure("first_step_more_seconds", statistics.median(compiled) - seconds["none"], "s", limit=10)
    for _ in range(2):  # filled, then used
        _, compilation, *lines = run(JAX, "--remat", "none", "--steps", "2", "--compilation-cache", cache)
    more = compilation["compile_seconds"] + lines[0]["seconds"] - lines[1]["seconds"]
    figure("first_step_more_seconds_cached", more, "s", limit=4)
    reference = run(TORCH, "--mode", "reference:1", "--steps", "2")[1:]
    ratio = seconds["none"] / _median(reference)
    figure("step_none_to_reference", ratio, "", limit=0.2, torch_seconds=round(_median(reference), 1))


def planned(rate: float) -> float:
    """Seconds that `umbrella-jax plan --devices cpu --flops RATE` says of the step."""
    devices = parse_devices("cpu", flops=rate, dtype="float32")
    return plan_of("0.5b", "t1", 1, "float32", devices).configured[0].step_seconds


def floor(size: str, scan: str) -> float:
    """FLOPs of a conversation that no step can do without: forward, and the activations' gradients down to the patch
    embedding."""
    config, model = _workload(size, scan, 1, "float32")
    positions = SCANS[scan].patches + TEXT
    counted = at_shape(config, model, SCANS[scan].modality, positions=positions, targets=ANSWER, frozen_dtype="float32")
    return sum(counted.flops(None).values())


def plan_of(size: str, scan: str, batch: int, dtype: str, devices: Devices) -> HardwarePlan:
    """What `umbrella-jax plan` says of a case without remat."""
    config, model = _workload(size, scan, batch, dtype)
    return plan_hardware(config, model, devices, frozen_dtype=dtype, text_tokens=TEXT)


def _workload(size: str, scan: str, batch: int, dtype: str) -> tuple[RunConfig, LlavaConfig]:
    settings = {"model.remat": "none", "model.compute_dtype": dtype, "train.batch_size": batch}
    config = load_config(CONFIGS / f"{SCANS[scan].config}.yaml", settings)
    return config, model_config(size, SCANS[scan], dtype, "none")


def sharing(work_dir: Path) -> None:
    """Steps of comparisons whose scans several conversations of a batch show: each encoded once, or for each of them.

    The plan of 600 comparisons over 100 subjects says how many a batch holds; the model is the 0.5b size's, of two
    layers each.
    """
    size = 8
    plan = EpochPlan(synthetic_sizes(100, 0, 600, 0), batch_size=size, seed=0)
    held = round(plan.cost.volumes * size)
    lines: dict[int, list[dict[str, Any]]] = {held: [], 2 * size: []}
    for _ in range(ROUNDS):
        for volumes, found in lines.items():
            options = ["--remat", "full", "--layers", "2", "--case", f"t1:{size}", "--images", "2"]
            found += run(JAX, *options, "--volumes", str(volumes), "--steps", "3")[3:]
    shared, apart = (_median(found) for found in lines.values())
    more = {"volumes_per_conversation": round(held / size, 2), "padding": round(plan.cost.padding, 3)}
    figure("sharing_conversations_per_second", apart / shared, "times those without", at_least=2, **more)


def _median(lines: list[dict[str, Any]]) -> float:
    return statistics.median(line["seconds"] for line in lines)


def _peak(lines: list[dict[str, Any]]) -> float:
    return round(max(line["peak_gib"] for line in lines), 2)


def _rounded(times: list[float]) -> list[float]:
    return [round(t, 1) for t in times]
