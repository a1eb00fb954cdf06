"""Seconds and memory from a command to its first batch, by the size of the cohort: cold, warm and resumed."""

import gzip
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import CONFIGS
from bench.measure import figure
from bench.start_texts import start_texts

VOLUMES = 400
"""Volumes of 96³ that are checked for the rate."""
SHOWN = 3
"""Conversations about each volume."""


def start(work_dir: Path) -> None:
    """Measure seconds and memory up to the first batch, and the volumes checked per second."""
    start_rate(work_dir)
    start_texts(work_dir)
    for number in (10_000, 40_000, 120_000):
        start_cohort(work_dir, number)


def start_rate(work_dir: Path) -> None:
    """Measure how many .nii.gz of 96³ int16 are checked per second by two threads."""
    import nibabel as nib

    scans = work_dir / "scans_96"
    if not scans.exists():
        scans.mkdir()
        x, y, z = np.ogrid[-1:1:96j, -1:1:96j, -1:1:96j]
        radius = np.sqrt((x / 0.6) ** 2 + (y / 0.75) ** 2 + (z / 0.65) ** 2)
        head = 800 * (radius < 1) * (0.6 + 0.4 * np.cos(9 * radius) * np.cos(7 * x * y))
        rng = np.random.default_rng(0)
        noise = [rng.normal(0, 12, head.shape) for _ in range(8)]
        for i in range(VOLUMES):
            noisy = np.hypot(head + np.roll(noise[i % 8], i, 0), noise[(i + 1) % 8]).astype(np.int16)
            nib.save(nib.Nifti1Image(noisy, np.diag([-2, 2, 2, 1.0])), scans / f"{i}.nii.gz")
    (result,) = _processes(1, _check, scans)
    rate = VOLUMES / result["seconds"]
    figure("start_check_volumes", rate, "1/s", at_least=60, per_cpu_second=round(VOLUMES / result["processor"], 1))


def start_cohort(work_dir: Path, number: int) -> None:
    """Measure the start of `number` conversations over a third as many volumes of 8³."""
    from umbrella_jax.demo import make_base

    base = make_base(work_dir / "demo_base")
    cohort = work_dir / f"cohort_{number}"
    if not cohort.exists():
        make_cohort(cohort, number)
    for processes in (1, 2):
        home = work_dir / "home"  # with the index of checked files
        shutil.rmtree(home, ignore_errors=True)
        for state in ("cold", "warm", "resumed"):
            results = _processes(processes, _first_batch, cohort, base, state == "resumed", home=home)
            opened = sum((Counter(result["opened"]) for result in results), Counter())
            more = {"conversations": number, "volumes": number // SHOWN, "processes": processes, "state": state}
            more["processor"] = round(sum(result["processor"] for result in results), 1)
            more["checked"] = sum(result["checked"] for result in results)
            more["opens"] = opened.total()  # a volume of the first batch is opened again, to make the batch
            more["peak_gb"] = round(max(result["peak"] for result in results), 2)
            figure("start_seconds", max(result["seconds"] for result in results), "s", **more)


def make_cohort(directory: Path, number: int) -> None:
    """Write distinct volumes of 8³ int16 as .nii.gz, and three conversations about each, in one file.

    Each volume is a file of its own, since links would share what a start has to look up for each.
    """
    import nibabel as nib

    (directory / "scans").mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.integers(1, 1000, (8, 8, 8), np.int16), np.eye(4))
    content = bytearray(image.to_bytes())
    with (directory / "train.jsonl").open("w") as lines:
        for subject in range(number // SHOWN):
            content[-1024:-1016] = subject.to_bytes(8, "little")
            name = f"scans/sub-{subject:06d}_T1w.nii.gz"
            (directory / name).write_bytes(gzip.compress(bytes(content), 1, mtime=0))
            for task, question, answers in (
                ("sex", "What is the sex of this subject?", ("male.", "female.")),
                ("age", "How old is this subject?", tuple(f"{age} years." for age in range(20, 90))),
                ("site", "Where was this scan made?", ("Site A.", "Site B.", "Site C.")),
            ):
                content_parts = [{"type": "image", "modality": "T1", "image_path": name}]
                turns = [
                    {"role": "user", "content": [*content_parts, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answers[subject % len(answers)]}]},
                ]
                record = {"task_id": f"{task}-{subject}", "task_type": "T1", "conversations": turns}
                lines.write(json.dumps(record | {"metadata": {"task": task, "subject_id": f"{subject:06d}"}}) + "\n")


def _processes(number: int, work: Any, *args: Any, home: Path | None = None) -> list[dict[str, Any]]:
    """Run `work` in new processes that belong together, with caches below `home`; return the results of all."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    if home is not None:
        os.environ["XDG_CACHE_HOME"] = str(home)
    queue = context.Queue()
    children = [context.Process(target=_child, args=(queue, coordinator, number, i, work, args)) for i in range(number)]
    for child in children:
        child.start()
    results = [queue.get() for _ in children]
    for child in children:
        child.join()
    for result in results:
        if "error" in result:
            raise RuntimeError(result["error"])
    return results


def _child(queue: Any, coordinator: str, number: int, index: int, work: Any, args: tuple[Any, ...]) -> None:
    import resource

    from umbrella_jax import distributed

    opened: Counter[str] = Counter()

    def hook(event: str, arguments: Any) -> None:
        if event == "open" and arguments[1] is not None and isinstance(arguments[0], str | os.PathLike):  # no `os.open`
            name = os.fspath(arguments[0])
            if isinstance(name, str) and name.endswith(".nii.gz"):
                opened[name] += 1

    try:
        if number > 1:
            distributed.start(coordinator, number, index)
        sys.addaudithook(hook)
        begin, busy = time.perf_counter(), time.process_time()
        checked = work(*args)
        seconds, processor = time.perf_counter() - begin, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        result = {"seconds": seconds, "processor": processor, "peak": peak, "checked": checked, "opened": dict(opened)}
    except BaseException as error:
        result = {"error": repr(error)}
    queue.put(result)


def _check(scans: Path) -> int:
    from umbrella_jax.config.schema import ModalityConfig
    from umbrella_jax.data.cache import Sources
    from umbrella_jax.data.conversation import Image

    config = ModalityConfig(size=(96, 96, 96), patch=(10, 10, 10))
    images = [Image(path, "T1") for path in sorted(scans.iterdir())]
    return len(Sources().check_all(images, {"T1": config}, 2))


def _first_batch(cohort: Path, base: Path, resumed: bool) -> int:
    """Make the first batch as `train` does; return the number of volumes that were checked.

    Args:
        resumed: begin in the middle of the second epoch.
    """
    from umbrella_jax.cli import collect_rarely
    from umbrella_jax.config.load import load_config
    from umbrella_jax.config.schema import DataConfig, ModalityConfig
    from umbrella_jax.data.inputs import read_inputs
    from umbrella_jax.data.loader import make_epoch_plan, train_batches
    from umbrella_jax.data.tokenize import load_tokenizer
    from umbrella_jax.inference.processor import Processor

    collect_rarely()  # as every command does
    template = load_config(CONFIGS / "tiny.yaml").data.template
    tokenizer, _ = load_tokenizer(base, None)
    modalities = {"T1": ModalityConfig(size=(8, 8, 8), patch=(4, 4, 4))}
    processor = Processor(tokenizer, modalities, template=template, max_length=2048)
    data = DataConfig(train=str(cohort / "train.jsonl"), threads=2)
    datasets = processor.datasets(data, ("train",))
    read_inputs(data, datasets)
    train_set = datasets["train"]
    plan = make_epoch_plan(train_set, batch_size=8, accumulate_steps=1, seed=0)
    first = plan.updates_per_epoch * 3 // 2 if resumed else 0
    batches = train_batches(train_set, plan, start_step=first, num_steps=first + 1, threads=2)
    next(iter(batches))
    return train_set.sources.num_checked
