"""A long run needs no more memory, files, threads or compilations than a short one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import small_run
from tests.helpers.small_run import read_lines

ROOT = Path(__file__).parents[2]
STEPS, EVAL, CUT_OFF, SETTLED = 2001, 100, 1000, 200
FLAGS = ["--epochs", STEPS // 3, "--set", "train.save_steps=25", "--set", f"train.eval_steps={EVAL}"]


def child(record: str, words: Sequence[str]) -> int:
    """Run `umbrella-jax WORDS`, send SIGTERM at CUT_OFF, and record the resources in use every ten steps."""
    from jax import monitoring

    from umbrella_jax import cli
    from umbrella_jax.training import trainer

    compiled, samples, write = 0, [], trainer.Metrics.write

    def count(event: str, *_: Any, **__: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    def sample(self: trainer.Metrics, line: trainer.Line) -> None:
        write(self, line)
        step = int(line["step"] or 0)
        if step % 10 == 5:  # no save is in progress, which would have files open
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
            samples.append(
                {"step": step, "bytes": pages * 4096, "files": files, "threads": threads, "compiled": compiled}
            )
        if step == CUT_OFF:
            os.kill(os.getpid(), signal.SIGTERM)

    monitoring.register_event_duration_secs_listener(count)
    trainer.Metrics.write = sample  # type: ignore[method-assign]
    code = cli.main(words)
    Path(record).write_text(json.dumps(samples))
    return code


@pytest.mark.slow
def test_two_thousand_steps(tmp_path: Path) -> None:
    """They are saved every 25 and evaluated every 100 steps, and interrupted and resumed once."""
    world = small_run.make_world(tmp_path)
    environment = small_run.process_environment() | {"PYTHONPATH": str(ROOT)}
    words = world.train_flags(tmp_path / "run", *FLAGS, "--eval-data", world.eval)
    for number, (more, code) in enumerate([([], 143), (["--resume"], 0)]):
        record = tmp_path / f"{number}.json"
        command = [sys.executable, "-m", "tests.run.test_soak", str(record), *words, *more]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        samples = json.loads(record.read_text())
        settled = [s for s in samples if s["step"] > samples[0]["step"] + SETTLED]
        first, last = settled[0], settled[-1]
        growth = max(s["bytes"] for s in settled) / first["bytes"] - 1
        halves = (settled[: len(settled) // 2], settled[len(settled) // 2 :])
        # A save or a read in progress has files and threads of its own, so the smallest number of files counts. Pools
        # start threads when they need them: a few may start late, but not one for each of some 30 saves.
        largest = {"files": [min(s["files"] for s in half) for half in halves]}
        largest |= {kind: [max(s[kind] for s in half) for half in halves] for kind in ("threads", "compiled")}
        print(f"steps {samples[0]['step']}..{last['step']}: {first['bytes'] / 1e6:.0f} MB, {growth:+.2%}; {largest}")
        assert growth <= 0.02
        assert largest["files"][1] == largest["files"][0]
        assert largest["threads"][1] <= largest["threads"][0] + 3
        assert largest["compiled"][1] == largest["compiled"][0]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, STEPS + 1))


if __name__ == "__main__":
    sys.exit(child(sys.argv[1], sys.argv[2:]))
