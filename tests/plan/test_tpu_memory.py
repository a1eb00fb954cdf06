"""The plan's memory on TPUs against the compiler's, at full depth: `scripts/benchmark.py tpu` has every cell."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.tpu import compiled_cell
from bench.workload import HUB_CONFIGS

from tests.helpers.full_size import full_size
from umbrella_jax.plan import parse_devices, plan_hardware
from umbrella_jax.plan.compile_step import compile_step


def compiled(cell: str, folder: Path, *, quick: bool) -> dict[str, Any]:
    size = cell.partition("/")[0]
    (folder / "config.json").write_text(json.dumps(HUB_CONFIGS[size]))
    (found,) = compiled_cell(str(folder), cell, quick)
    return found


def test_a_program_that_is_too_large_is_refused_with_the_plans_memory(tmp_path: Path) -> None:
    run, model = full_size(tmp_path, "0.5b", "bfloat16", remat="none")
    run, devices = replace(run, model=replace(run.model, remat="none")), parse_devices("v5e-16")
    plan = plan_hardware(run, model, devices, frozen_dtype="bfloat16")
    mesh, batch_size = plan.largest[0].mesh, 2 * plan.largest[0].batch_size
    program = compile_step(run, model, devices, mesh, batch_size, plan.model.workload, frozen_dtype="bfloat16")
    assert not program.fits
    assert program.available_bytes == devices.kind.usable
    planned = sum(plan.model.device_bytes(mesh, batch_size, "none").values())
    assert planned == pytest.approx(program.needed_bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        "0.5b/rsfmri/full/v6e-16",
        "0.5b/t1/full/v5p-64",
        "0.5b/t1/none/v5e-16x2",
        "7b/t1/mlp/v6e-16",
        "7b/t1/none/v5p-64",
    ],
)
def test_a_batch_larger_than_the_largest_is_refused_with_the_plans_memory(cell: str, tmp_path: Path) -> None:
    found = compiled(cell, tmp_path, quick=True)
    for name in ("larger", "twice"):
        assert not found[name]["fits"]
        assert abs(found[name]["error"]) < 0.1
    # needed memory is linear in the batch: the largest batch of the plan is below what there is
    (small, needed), (large, more) = ((found[n]["batch_size"], found[n]["needed_bytes"]) for n in ("larger", "twice"))
    at_largest = needed - (small - found["batch_size"]) * (more - needed) / (large - small)
    assert at_largest < found["larger"]["available_bytes"]


@pytest.mark.slow  # two minutes each: the compiler takes them
@pytest.mark.parametrize("cell", ["0.5b/t1/none/v5e-16", "7b/t1/full/v6e-16", "0.5b/t1/none/v5e-16x2"])
def test_the_largest_batch_compiles(cell: str, tmp_path: Path) -> None:
    found = compiled(cell, tmp_path, quick=False)
    assert found["largest"]["fits"]
    assert not found["larger"]["fits"]
    assert abs(found["largest"]["error"]) < 0.1
