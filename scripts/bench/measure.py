"""Print a figure as a JSON line; measure time and memory of a function in its own process."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_figures: TextIO | None = None


def keep_stdout_for_figures() -> None:
    """Send what commands, libraries and child processes print to stderr, so that stdout has nothing but figures."""
    global _figures
    _figures = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def figure(name: str, value: float | None, unit: str, **more: Any) -> None:
    """Print one line; `value` is None if nothing could be measured."""
    rounded = None if value is None else round(value, 3)
    print(json.dumps({"figure": name, "value": rounded, "unit": unit, **more}), file=_figures, flush=True)


def resident(pid: int | str = "self") -> float:
    """Return the resident memory of a process in GB, with the touched pages of mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e9


def measure(work: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Run `work(*args)` in a new process that has imported jax and found its devices.

    Returns:
        {"seconds": duration, "peak": GB of memory that it adds at its peak, "value": the list that it returns, or None}
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measured, args=(results, work, args))
    process.start()
    result = results.get()
    process.join()
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


def run(words: list[str]) -> dict[str, float]:
    """Run `umbrella-jax WORDS`; return its seconds, its processor seconds, and the GB of memory at its peak."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "umbrella_jax.cli", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{words} failed")
    busy = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - start, "processor": busy, "peak": usage.ru_maxrss * 1024 / 1e9}


def _measured(results: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        import jax

        jax.devices()
        before, peak, done = resident(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, resident())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            start = time.perf_counter()
            value = work(*args)
            seconds = time.perf_counter() - start
        finally:  # otherwise this process would never end
            done.set()
            watcher.join()
        results.put({"seconds": seconds, "peak": peak - before, "value": value if isinstance(value, list) else None})
    except BaseException as error:
        results.put({"error": repr(error)})
