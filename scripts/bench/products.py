"""The rate of a layer's products on this CPU: XLA with each of its libraries, and PyTorch."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.measure import figure

SHAPES = {  # rows, inputs, outputs of products at the 0.5b size
    "tower's fc1": (729, 1152, 4304),
    "tower's fc2": (729, 4304, 1152),
    "language model's gate_proj": (793, 1024, 2816),
    "language model's down_proj": (793, 2816, 1024),
}
_LIBRARY = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
OPTIONS = {
    "XLA": "",
    "XLA with YNNPACK": f"--xla_cpu_experimental_ynn_fusion_type={_LIBRARY}",
    "XLA with XNNPACK": f"--xla_cpu_experimental_xnn_fusion_type={_LIBRARY}",
    "XLA with oneDNN": f"--xla_cpu_experimental_onednn_fusion_type={_LIBRARY} --xla_cpu_use_onednn=true",
    "XLA with Eigen": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INVALID",
    "PyTorch": "",
}
ROUNDS, WEIGHTS, CALLS = 3, 8, 5


def products(work_dir: Path) -> None:
    """Measure FLOPs per processor second of four products, by XLA's libraries and by PyTorch in turn."""
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in OPTIONS}
    for _ in range(ROUNDS):
        for name, flags in OPTIONS.items():
            environment = os.environ | {"XLA_FLAGS": flags}
            words = [sys.executable, "-m", "bench.products", name]
            done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
            if done.returncode == 0:  # an option that this XLA does not know ends the process
                rates[name].append(json.loads(done.stdout))
    for name, lines in rates.items():
        by_shape = {shape: round(statistics.median(line[shape] for line in lines)) for shape in SHAPES} if lines else {}
        figure(
            "product_gflops", statistics.median(by_shape.values()) if lines else None, "GFLOP/s", by=name, **by_shape
        )


def _rate(name: str) -> dict[str, float]:
    """Return GFLOP per processor second of each shape; the weights, [out, in], come from memory in turn."""
    import numpy as np

    random = np.random.default_rng(0)
    rates = dict[str, float]()
    for shape, (rows, inputs, outputs) in SHAPES.items():
        x = random.standard_normal((rows, inputs), dtype=np.float32)
        weights = [random.standard_normal((outputs, inputs), dtype=np.float32) for _ in range(WEIGHTS)]
        multiply, x, weights = (_torch if name == "PyTorch" else _xla)(x, weights)
        seconds = []
        multiply(x, weights[0])
        for weight in weights * CALLS:
            start = time.process_time()
            multiply(x, weight)
            seconds.append(time.process_time() - start)
        rates[shape] = 2 * rows * inputs * outputs / statistics.median(seconds) / 1e9
    return rates


def _torch(x: Any, weights: list[Any]) -> tuple[Any, Any, list[Any]]:
    import torch

    return torch.nn.functional.linear, torch.from_numpy(x), [torch.from_numpy(weight) for weight in weights]


def _xla(x: Any, weights: list[Any]) -> tuple[Any, Any, list[Any]]:
    import jax

    multiply = jax.jit(lambda x, weight: jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ()))))
    return lambda *args: multiply(*args).block_until_ready(), jax.device_put(x), [*map(jax.device_put, weights)]


if __name__ == "__main__":
    print(json.dumps(_rate(sys.argv[1])))
