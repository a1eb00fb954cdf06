"""The training step on a GPU in bfloat16, against PyTorch's on the same card in the same run."""

import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bench.measure import figure
from bench.step import JAX, TORCH, make_hardware_plan, minimum_flops, run
from umbrella_jax.plan import parse_devices, sheet_of

# The last case of each size is about the largest that fits an H200.
OURS = {
    "0.5b": ("t1:8", "t1:32:scanned", "t1:32", "t1-16:128", "rsfmri:24", "t1:128"),
    "7b": ("t1:8:scanned", "t1:8", "rsfmri:8", "t1:32"),
}
THEIRS = {"0.5b": ("reference:8", "tuned:32", "compiled:32"), "7b": ("tuned:8", "compiled:8", "reference:8")}
TRIED = ("scanned", "unrolled", "defaults", "gelu", "norm", "qkv", "heads80", "heads128", "gelu+norm")
MIN_SHARE_OF_RATE = {"0.5b": 0.45, "7b": 0.55}
MIN_SPEEDUP = {"reference": 2.5, "tuned": 1.3, "compiled": 1.3}
KERNEL_KINDS = {  # kind of kernel: pattern of its name
    "attention": "sdpa|fmha|flash|cudnn",
    "products": "nvjet|gemm|cutlass",
    "copies": "memcpy|memset|copy|broadcast|dynamic_update_slice",
    "element-wise": "",
}


def gpu(work_dir: Path) -> None:
    """Measure a training step on a GPU: seconds, memory, share of the card's peak rate, and time per kind of kernel."""
    jax.config.update("jax_platforms", "cpu")  # leaves the card to the processes that this one starts
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    for size, cases in OURS.items():
        common = ("--size", size, "--dtype", "bfloat16")
        ours = run(JAX, *common, "--remat", "none", "--steps", "7", "--trace", "--case", *cases)
        (work_dir / f"ours-{size}.json").write_text(json.dumps(ours))
        rate, device = ours[0]["matmul_flops"], ours[0]["device"]
        figure(f"gpu_{size}_matmul", rate / 1e12, "TFLOP/s", device=device)
        for case in cases:
            _print_ours(size, case, _merged(ours, case), rate, device)
        theirs = run(TORCH, *common, "--device", "cuda", "--steps", "5", "--mode", *THEIRS[size])
        (work_dir / f"theirs-{size}.json").write_text(json.dumps(theirs))
        for case in THEIRS[size]:
            mode, _, batch = case.partition(":")
            _print_theirs(f"gpu_{size}_{mode}_{batch}", mode, _merged(theirs, case), _merged(ours, f"t1:{batch}"))


def gpu_trials(work_dir: Path) -> None:
    """Measure changes of the model or of its compilation that may make a step faster on a GPU (trials.py), in turn."""
    jax.config.update("jax_platforms", "cpu")
    cases = [f"t1:32:{tried}" for tried in TRIED]
    common = ("--size", "0.5b", "--dtype", "bfloat16", "--remat", "none", "--steps", "7", "--trace")
    lines = run(JAX, *common, "--case", *cases)
    (work_dir / "trials.json").write_text(json.dumps(lines))
    for case in cases:
        measured = _merged(lines, case)
        _print_ours("0.5b", case, measured, lines[0]["matmul_flops"], lines[0]["device"])
        figure(f"gpu_0.5b_{case.replace(':', '_')}_loss", measured.get("loss"), "")


def _merged(lines: Sequence[dict[str, Any]], case: str) -> dict[str, Any]:
    """Merge the lines of a case: `seconds` lists every step; the last value of any other key is kept."""
    merged: dict[str, Any] = {}
    for line in lines:
        if line.get("case") == case:
            merged |= {key: value for key, value in line.items() if key != "seconds"}
            merged.setdefault("seconds", []).extend([line["seconds"]] if "seconds" in line else [])
    return merged


def _print_ours(size: str, case: str, measured: dict[str, Any], rate: float, device: str) -> None:
    name = f"gpu_{size}_{case.replace(':', '_')}"
    if "error" in measured:
        figure(f"{name}_seconds", None, "s", error=measured["error"])
        return
    scan, batch, *_ = case.split(":")
    seconds = statistics.median(measured["seconds"][1:])
    achieved = minimum_flops(size, scan) * int(batch) / seconds
    kinds = dict.fromkeys(KERNEL_KINDS, 0.0)
    for kernel, milliseconds, _ in measured["kernels"]:
        kinds[next(kind for kind, words in KERNEL_KINDS.items() if re.search(words, kernel, re.I))] += milliseconds
    figure(
        f"{name}_seconds",
        seconds,
        "s",
        all=[round(t, 3) for t in sorted(measured["seconds"][1:])],
        conversations_per_second=round(int(batch) / seconds, 1),
        peak_gib=round(measured["peak_gib"], 1),
        compile_seconds=round(measured["compile_seconds"], 1),
        milliseconds={kind: round(spent, 1) for kind, spent in kinds.items()},
    )
    limit = {"at_least": MIN_SHARE_OF_RATE[size]} if scan == "t1" else {}
    figure(f"{name}_of_matmul_rate", achieved / rate, "", tflops=round(achieved / 1e12), **limit)
    if sheet := sheet_of(device):
        planned = make_hardware_plan(size, scan, int(batch), "bfloat16", parse_devices(sheet.name)).configured[0]
        more = {"planned": round(planned.step_seconds, 3), "planned_gib": round(planned.total_bytes / 2**30, 1)}
        figure(f"{name}_to_plan", seconds / planned.step_seconds, "", limit=1.25, **more)


def _print_theirs(name: str, mode: str, measured: dict[str, Any], ours: dict[str, Any]) -> None:
    if "error" in measured:
        figure(f"{name}_seconds", None, "s", error=measured["error"])
        return
    times = measured["seconds"][1:]
    seconds = statistics.median(times)
    more = {"all": [round(t, 3) for t in sorted(times)], "first": round(measured["seconds"][0], 1)}
    figure(f"{name}_seconds", seconds, "s", peak_gib=round(measured["peak_gib"], 1), **more)
    if "error" not in ours:
        ratio = seconds / statistics.median(ours["seconds"][1:])
        figure(f"{name}_to_ours", ratio, "times", at_least=MIN_SPEEDUP[mode])
