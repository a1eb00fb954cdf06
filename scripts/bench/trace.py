"""Time that a GPU spends in each kernel."""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernels(work: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """Profile `work()` on the first GPU; return (kernel, milliseconds, calls), the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        milliseconds: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        for plane in planes:
            for line in plane.lines if plane.name == "/device:GPU:0" else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    milliseconds[event.name] += event.duration_ns / 1e6
                    calls[event.name] += 1
    return [(name, round(milliseconds[name], 3), calls[name]) for name in sorted(calls, key=lambda n: -milliseconds[n])]
