"""The training step, compiled for TPUs that are not at hand: its memory beside the plan's, and the largest batch."""

import json
import math
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from bench.measure import figure, measure
from bench.workload import HUB_CONFIGS, SCANS

CONFIGS = Path(__file__).parents[2] / "configs"
CELLS = [
    *map("/".join, product(("0.5b", "7b"), ("t1", "rsfmri"), ("none", "mlp", "full"), ("v5e-16", "v5p-64", "v6e-16"))),
    "0.5b/t1/none/v5e-16x2",  # two slices
]
"""Model, scan, remat policy and devices of each program."""
LARGER = 1.15
"""A batch this much larger than the largest that the plan recommends must be refused."""


def compiled_cell(base: str, cell: str, quick: bool) -> list[Any]:
    """Return [figures of a cell] for the mesh and the largest batch that the plan recommends."""
    from dataclasses import replace

    from umbrella_jax.checkpoints.load import open_base
    from umbrella_jax.config.load import load_config
    from umbrella_jax.plan import parse_devices, plan_hardware
    from umbrella_jax.plan.compile_step import CompiledProgram, compile_step

    _, scan, remat, name = cell.split("/")
    settings = {"model.base": base, "model.remat": remat, "model.compute_dtype": "bfloat16"}
    run = load_config(CONFIGS / f"{SCANS[scan].config}.yaml", settings)
    model, devices = replace(open_base(run, weights=False).config, remat=remat), parse_devices(name)
    plan = plan_hardware(run, model, devices, frozen_dtype="bfloat16")
    if not plan.largest:
        return [{"mesh": None}]
    step = plan.largest[0]

    def compiled(batch_size: int) -> CompiledProgram:
        return compile_step(run, model, devices, step.mesh, batch_size, plan.model.workload, frozen_dtype="bfloat16")

    def planned(batch_size: int) -> float:
        return sum(plan.model.device_bytes(step.mesh, batch_size, remat).values())

    found: dict[str, Any] = {"mesh": str(step.mesh), "batch_size": step.batch_size}
    larger = math.ceil(step.batch_size / step.mesh.parts * LARGER) * step.mesh.parts
    for key, batch_size in (("largest", step.batch_size), ("larger", larger), ("twice", 2 * larger)):
        if (key == "largest" and quick) or (key == "twice" and not quick):
            continue
        program = compiled(batch_size)
        figures = {"batch_size": batch_size, **program.to_json(), "planned_bytes": planned(batch_size)}
        if program.fits:
            figures["temporaries_per_conversation"] = program.bytes["temporaries"] * step.mesh.parts / batch_size
            figures["accessed_per_conversation"] = (program.bytes_accessed or 0) * step.mesh.parts / batch_size
        if program.needed_bytes:
            figures["error"] = planned(batch_size) / program.needed_bytes - 1
        found[key] = figures
    return [found]


def tpu(work_dir: Path, cells: str = "*", results: Path | None = None, quick: bool = False) -> None:
    """Compile the step at the largest batch that `plan` recommends and at one 15 % larger, per model and slice."""
    lines = results.read_text().splitlines() if results and results.exists() else []
    done = {json.loads(line)["cell"] for line in lines}
    for cell in CELLS:
        if not fnmatch(cell, cells) or cell in done:
            continue
        base = work_dir / cell.partition("/")[0]
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps(HUB_CONFIGS[base.name]))
        (found,) = measure(compiled_cell, str(base), cell, quick)["value"]
        needed = found.get("largest", {}).get("needed_bytes")
        more = {"cell": cell, **found}
        figure("compiled_memory", needed and needed / 1e9, "GB", **more)
        if results:
            with results.open("a") as file:
                print(json.dumps(more), file=file)
