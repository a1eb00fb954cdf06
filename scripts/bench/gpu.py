"""The training step on a GPU, in bfloat16: ours, and PyTorch's on the same card in the same run."""

import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bench.measure import figure
from bench.step import JAX, TORCH, floor, plan_of, run
from umbrella_jax.plan import parse_devices, sheet_of

# The last of each is about the largest that fits an H200.
OURS = {
    "0.5b": ("t1:8", "t1:32:defaults", "t1:32", "t1-16:128", "rsfmri:24", "t1:128"),
    "7b": ("t1:8:defaults", "t1:8", "rsfmri:8", "t1:32"),
}
THEIRS = {"0.5b": ("reference:8", "tuned:32", "compiled:32"), "7b": ("tuned:8", "compiled:8", "reference:8")}
OF_RATE = {"0.5b": 0.45, "7b": 0.55}
TIMES_FASTER = {"reference": 2.5, "tuned": 1.3, "compiled": 1.3}
KINDS = {
    "attention": "sdpa|fmha|flash|cudnn",
    "products": "nvjet|gemm|cutlass",
    "copies": "memcpy|memset|copy|broadcast|dynamic_update_slice",
    "element-wise": "",
}


def gpu(work_dir: Path) -> None:
    """Seconds, memory and share of the card's rate of a training step on a GPU; what it spends its time on."""
    jax.config.update("jax_platforms", "cpu")  # of this process: the card is for those that it starts
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    for size, cases in OURS.items():
        common = ("--size", size, "--dtype", "bfloat16")
        ours = run(JAX, *common, "--remat", "none", "--steps", "7", "--trace", "--case", *cases)
        (work_dir / f"ours-{size}.json").write_text(json.dumps(ours))
        rate, device = ours[0]["matmul_flops"], ours[0]["device"]
        figure(f"gpu_{size}_matmul", rate / 1e12, "TFLOP/s", device=device)
        for case in cases:
            _ours(size, case, _of(ours, case), rate, device)
        theirs = run(TORCH, *common, "--device", "cuda", "--steps", "5", "--mode", *THEIRS[size])
        (work_dir / f"theirs-{size}.json").write_text(json.dumps(theirs))
        for case in THEIRS[size]:
            mode, _, batch = case.partition(":")
            _theirs(f"gpu_{size}_{mode}_{batch}", mode, _of(theirs, case), _of(ours, f"t1:{batch}"))


def _of(lines: Sequence[dict[str, Any]], case: str) -> dict[str, Any]:
    """What the lines of a case say: `seconds` of every step, of the rest the last."""
    found: dict[str, Any] = {}
    for line in lines:
        if line.get("case") == case:
            found |= {key: value for key, value in line.items() if key != "seconds"}
            found.setdefault("seconds", []).extend([line["seconds"]] if "seconds" in line else [])
    return found


def _ours(size: str, case: str, found: dict[str, Any], rate: float, device: str) -> None:
    name = f"gpu_{size}_{case.replace(':', '_')}"
    if "error" in found:
        figure(f"{name}_seconds", None, "s", error=found["error"])
        return
    scan, batch, *_ = case.split(":")
    seconds = statistics.median(found["seconds"][1:])
    reached = floor(size, scan) * int(batch) / seconds
    kinds = dict.fromkeys(KINDS, 0.0)
    for kernel, milliseconds, _ in found["kernels"]:
        kinds[next(kind for kind, words in KINDS.items() if re.search(words, kernel, re.I))] += milliseconds
    figure(
        f"{name}_seconds",
        seconds,
        "s",
        all=[round(t, 3) for t in sorted(found["seconds"][1:])],
        conversations_per_second=round(int(batch) / seconds, 1),
        peak_gib=round(found["peak_gib"], 1),
        compile_seconds=round(found["compile_seconds"], 1),
        milliseconds={kind: round(spent, 1) for kind, spent in kinds.items()},
    )
    limit = {"at_least": OF_RATE[size]} if scan == "t1" else {}
    figure(f"{name}_of_matmul_rate", reached / rate, "", tflops=round(reached / 1e12), **limit)
    if sheet := sheet_of(device):
        planned = plan_of(size, scan, int(batch), "bfloat16", parse_devices(sheet.name)).configured[0]
        more = {"planned": round(planned.step_seconds, 3), "planned_gib": round(planned.total_bytes / 2**30, 1)}
        figure(f"{name}_to_plan", seconds / planned.step_seconds, "", limit=1.25, **more)


def _theirs(name: str, mode: str, found: dict[str, Any], ours: dict[str, Any]) -> None:
    if "error" in found:
        figure(f"{name}_seconds", None, "s", error=found["error"])
        return
    times = found["seconds"][1:]
    seconds = statistics.median(times)
    more = {"all": [round(t, 3) for t in sorted(times)], "first": round(found["seconds"][0], 1)}
    figure(f"{name}_seconds", seconds, "s", peak_gib=round(found["peak_gib"], 1), **more)
    if "error" not in ours:
        ratio = seconds / statistics.median(ours["seconds"][1:])
        figure(f"{name}_to_ours", ratio, "times", at_least=TIMES_FASTER[mode])
