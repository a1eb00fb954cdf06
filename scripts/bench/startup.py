"""Start-up time of the command line and of the package."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import figure


def startup(work_dir: Path) -> None:
    """Time `umbrella-jax --help` and `import umbrella_jax`, the fastest of five."""
    for name, code, limit in (
        ("help_seconds", "from umbrella_jax.cli import main; main(['--help'])", 0.7),
        ("import_seconds", "import umbrella_jax", 1.5),
    ):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        figure(name, min(seconds), "s", at_most=limit, median=round(statistics.median(seconds), 3))
