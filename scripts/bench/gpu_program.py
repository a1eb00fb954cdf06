"""Copies, memory and compile time of the training step's program for an H200, compiled without one."""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import figure, measure

CASES = (("0.5b", 32), ("7b", 8))  # size, conversations of a T1 volume of 729 patches
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_MOVES = {"copy", "slice", "dynamic-slice", "dynamic-update-slice", "transpose", "broadcast", "concatenate", "pad"}
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "reshape"}
_SMALL = 64  # bytes: indices into a stack


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    rest: str

    @property
    def size(self) -> int:
        """Bytes of the result."""
        found = re.findall(r"([a-z]+\d*)\w*\[([\d,]*)\]", self.shape)
        return sum(math.prod(int(n) for n in sizes.split(",") if n) * _bytes(dtype) for dtype, sizes in found)

    def called(self, *attributes: str) -> str:
        """Return the computation that one of these attributes names."""
        found = re.search(rf"(?:{'|'.join(attributes)})=%?([\w.\-]+)", self.rest)
        assert found is not None, self.rest
        return found[1]


def _bytes(dtype: str) -> float:
    return 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 32) / 8


def read_computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Return {name: instructions} of the computations of a compiled program, and the name of the first to run."""
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$", line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(_Instruction(*found.groups()))
    return computations, entry


def count_kernels(hlo: str) -> tuple[Counter[str], Counter[str]]:
    """Return {kind: number of kernels per step} and {kind: bytes that they write}, loops counted as often as they run.

    Kinds that only move numbers are `copy`, `copy out of a stack` and `copy into a stack`.
    """
    computations, entry = read_computations(hlo)
    numbers, sizes = Counter[str](), Counter[str]()

    def visit(name: str, times: int) -> None:
        for instruction in computations[name]:
            operation = instruction.operation
            if operation == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.rest)
                visit(instruction.called("body"), times * int(trips[1] if trips else 1))
            elif operation in ("call", "async-start"):
                visit(instruction.called("to_apply", "calls"), times)
            elif operation in _FREE or operation.endswith("-done") or "AllocateBuffer" in instruction.rest:
                continue
            else:
                kind, size = _kind(instruction, computations)
                numbers[kind] += times
                sizes[kind] += times * size

    visit(entry, 1)
    return numbers, sizes


def _kind(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> tuple[str, int]:
    if instruction.operation == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        return "product" if target and "matmul" in target[1] else "other kernels of libraries", instruction.size
    if instruction.operation != "fusion":
        return "copy" if instruction.operation in _MOVES else "element-wise", instruction.size
    body = computations[instruction.called("calls")]
    operations = {one.operation for one in body if one.size > _SMALL} - _FREE
    if operations - _MOVES:
        return "element-wise", instruction.size
    if updates := [one for one in body if one.operation == "dynamic-update-slice"]:
        shapes = {one.name: one for one in body}
        written = [shapes[re.findall(r"%([\w.\-]+)", one.rest)[1]].size for one in updates]
        return "copy into a stack", sum(written)
    return "copy out of a stack" if "dynamic-slice" in operations else "copy", instruction.size


def compile_for_h200(size: str, batch: int, layers: str) -> list[Any]:
    """Return [GiB that copies write, the other figures] of a step in bfloat16 with `remat: none`."""
    from bench.step import CONFIGS, model_config
    from bench.workload import SCANS, TEXT
    from umbrella_jax.config.load import load_config
    from umbrella_jax.plan import parse_devices
    from umbrella_jax.plan.compile_step import compile_step
    from umbrella_jax.plan.flops import workload
    from umbrella_jax.sharding import MeshShape

    settings = {"model.remat": "none", "model.compute_dtype": "bfloat16", "model.layers": layers}
    config = load_config(CONFIGS / "t1_0.5b.yaml", settings)
    model = model_config(size, SCANS["t1"], "bfloat16", "none")
    work = workload(config, model, text_tokens=TEXT - 1)  # 792 positions, as jax_step.py has
    busy = time.process_time()
    program = compile_step(
        config, model, parse_devices("h200"), MeshShape(), batch, work, frozen_dtype="bfloat16", hlo=True
    )
    busy = time.process_time() - busy
    numbers, sizes = count_kernels(program.hlo or "")
    copies = {kind: (numbers[kind], round(sizes[kind] / 2**20)) for kind in numbers if kind.startswith("copy")}
    more = {
        "copies_and_mib": copies,
        "kernels": numbers.total(),
        "temporaries_gib": round(program.bytes["temporaries"] / 2**30, 2),
        "arguments_gib": round(program.bytes["arguments"] / 2**30, 2),
        "compile_seconds": round(program.seconds, 1),
        "cpu_seconds": round(busy, 1),
    }
    return [sum(mib for _, mib in copies.values()) / 2**10, more]


def gpu_program(work_dir: Path) -> None:
    """Count copies in the step's program for an H200, scanned and unrolled; needs no GPU."""
    for size, batch in CASES:
        for layers in ("scanned", "unrolled"):
            copied, more = measure(compile_for_h200, size, batch, layers)["value"]
            figure(f"gpu_program_{size}_{batch}_{layers}_copies", copied, "GiB", **more)
