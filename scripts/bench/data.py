"""Time, memory and padding on the way from files to batches."""

import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import figure, measure, resident

CONFIGS = Path(__file__).parents[2] / "configs"


def _pair(number: int, *subjects: int) -> dict[str, Any]:
    """Return a conversation with one turn about each subject."""
    turns = []
    for subject in subjects:
        image = {"type": "image", "modality": "sMRI", "image_path": f"sub-{subject:03d}.nii.gz"}
        question = {"type": "text", "text": "What is the sex of this subject?"}
        answer = {"type": "text", "text": "male." if subject % 2 else "female."}
        turns += [{"role": "user", "content": [image, question]}, {"role": "assistant", "content": [answer]}]
    return {"task_id": str(number), "conversations": turns, "metadata": {"task": "sex"}}


def make_head(path: Path) -> None:
    """Write a smooth head of 256³ int16 at 1 mm with a magnitude image's noise, stored as LIA like FreeSurfer's."""
    import nibabel as nib

    x, y, z = np.ogrid[-1:1:256j, -1:1:256j, -1:1:256j]
    radius = np.sqrt((x / 0.6) ** 2 + (y / 0.75) ** 2 + (z / 0.65) ** 2)
    head = 800 * (radius < 1) * (0.6 + 0.4 * np.cos(9 * radius) * np.cos(7 * x * y))
    rng = np.random.default_rng(0)
    noisy = np.hypot(head + rng.normal(0, 12, head.shape), rng.normal(0, 12, head.shape))
    affine = np.array([[-1.0, 0, 0, 128], [0, 0, 1, -128], [0, -1, 0, 128], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(noisy.astype(np.int16), affine), path)


def make_run(path: Path) -> None:
    """Write an fMRI run of noise: 64 x 64 x 36 voxels, 1200 frames, int16, 354 MB."""
    import nibabel as nib

    data = np.random.default_rng(0).integers(1, 1000, (1200, 36, 64, 64), np.int16).T
    nib.save(nib.Nifti1Image(data, np.diag([3, 3, 4, 1.0])), path)


def preprocess(path: Path, mode: str) -> list[tuple[float, float]]:
    """Resize or pad a volume to 96³ five times; return (seconds, processor seconds) of each."""
    from umbrella_jax.config.schema import ModalityConfig
    from umbrella_jax.data.volume import load_volume

    spacing = {"spacing": 2.7} if mode == "pad" else {}
    config = ModalityConfig(size=(96, 96, 96), patch=(16, 16, 16), mode=mode, **spacing)
    return [_seconds(lambda: load_volume(path, config)) for _ in range(5)]


def read_window(path: Path, window: int) -> list[float]:
    """Read one window of 20 frames; return seconds, processor seconds, and MB read from the file."""
    from umbrella_jax.config.schema import ModalityConfig
    from umbrella_jax.data.volume import open_volume, preprocess

    config = ModalityConfig(size=(64, 64, 36, 20), patch=(16, 16, 12, 5))
    bytes_before = _bytes_read()
    seconds, busy = _seconds(lambda: preprocess(path, open_volume(path, config), config, window))
    return [seconds, busy, (_bytes_read() - bytes_before) / 1e6]


def _seconds(work: Callable[[], Any]) -> tuple[float, float]:
    start, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - busy


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def data_preprocess(work_dir: Path) -> None:
    """Time reading and preprocessing volumes, and windows of fMRI runs, on one core."""
    head, run, zipped = (work_dir / name for name in ("head.nii.gz", "run.nii", "run.nii.gz"))
    for path, make in ((head, make_head), (run, make_run), (zipped, make_run)):
        if not path.exists():
            make(path)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # inherited by the processes of `measure`
    try:
        for mode in ("resize", "pad"):
            result = measure(preprocess, head, mode)
            seconds, busy = (statistics.median(times) for times in zip(*result["value"], strict=True))
            name, peak = f"preprocess_256_to_96_{mode}_seconds", round(result["peak"], 3)
            figure(name, seconds, "s", limit=0.35, processor=round(busy, 3), peak_gb=peak, limit_gb=0.4)
        for path, window in ((run, 0), (run, 59), (zipped, 0), (zipped, 59)):
            result = measure(read_window, path, window)
            seconds, busy, megabytes = result["value"]
            figure(
                f"window_{window}_of_{path.name}_seconds",
                seconds,
                "s",
                processor=round(busy, 3),
                read_mb=round(megabytes, 1),
                of_mb=round(path.stat().st_size / 1e6, 1),
                peak_gb=round(result["peak"], 3),
            )
    finally:
        os.sched_setaffinity(0, cores)


VOLUMES = 64


def make_scans(directory: Path) -> None:
    """Write int16 volumes of 128³ and one conversation about each."""
    import nibabel as nib

    directory.mkdir(parents=True)
    records, rng = [], np.random.default_rng(0)
    for i in range(VOLUMES):
        nib.save(nib.Nifti1Image(rng.integers(0, 4000, (128,) * 3, np.int16), np.eye(4)), directory / f"{i}.nii")
        image = {"type": "image", "modality": "T1", "image_path": f"{i}.nii"}
        question, answer = ({"type": "text", "text": text} for text in ("What is the sex?", "female."))
        turns = [{"role": "user", "content": [image, question]}, {"role": "assistant", "content": [answer]}]
        records.append({"task_id": str(i), "task_type": "T1", "conversations": turns})
    (directory / "train.json").write_text(json.dumps(records))


def deliver(scans: Path, base: Path, cache: Path, dtype: str) -> list[tuple[float, float]]:
    """Bring volumes from the cache into batches of 8 on one core, seven times, with the files in the page cache.

    Returns (volumes per second, volumes per second of processor time) of each pass.
    """
    from umbrella_jax.config.schema import ModalityConfig
    from umbrella_jax.data.cache import VolumeCache
    from umbrella_jax.data.loader import Dataset, make_epoch_plan, train_batches
    from umbrella_jax.data.tokenize import load_tokenizer

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer, _ = load_tokenizer(base, None)
    modalities = {"T1": ModalityConfig(size=(96, 96, 96), patch=(10, 10, 10))}
    options: dict[str, Any] = {"max_length": 2048, "threads": 1, "sources": VolumeCache(cache, dtype)}
    dataset = Dataset.load(scans / "train.json", tokenizer, modalities, **options)
    plan = make_epoch_plan(dataset, batch_size=8, accumulate_steps=1, seed=0)
    steps, rates = 4 * VOLUMES // 8, []
    for _ in range(8):
        start = time.perf_counter(), time.process_time()
        for _batch in train_batches(dataset, plan, start_step=0, num_steps=steps, threads=1):
            pass
        rates.append((steps * 8 / (time.perf_counter() - start[0]), steps * 8 / (time.process_time() - start[1])))
    return rates[1:]


def data_cache(work_dir: Path) -> None:
    """Measure volumes per second from the cache to batches."""
    from umbrella_jax.demo import make_base

    scans, base = work_dir / "scans", work_dir / "demo_base"
    if not scans.exists():
        make_scans(scans)
    if not base.exists():
        make_base(base)
    for dtype in ("float32", "float16"):
        rates = measure(deliver, scans, base, work_dir / "cache", dtype)["value"]
        wall, cpu = (statistics.median(column) for column in zip(*rates, strict=True))
        more = {"best": round(max(rates)[0], 1), "per_cpu_second": round(cpu, 1)}  # the core may be shared
        figure(f"cache_{dtype}_volumes", wall, "1/s of one core", at_least=150, **more)


def demo_sizes(work_dir: Path) -> Any:
    """Return the sizes of the demo's training conversations, from which a plan is made; volumes are not read."""
    from umbrella_jax.config.load import load_config
    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.data.loader import measure_conversations
    from umbrella_jax.data.tokenize import encode_all, load_tokenizer
    from umbrella_jax.demo import make_base, make_data

    modalities = load_config(CONFIGS / "tiny.yaml").model.modalities
    tokenizer, _ = load_tokenizer(make_base(work_dir / "demo_base"), None)
    conversations = read_conversations(make_data(work_dir / "demo_data").train, modalities)
    return measure_conversations(encode_all(conversations, tokenizer, modalities, 8192), modalities)


def synthetic_sizes(subjects: int, single: int, pairs: int, text: int) -> Any:
    """Return sizes of T1 questions, T3 comparisons of two subjects and questions without an image, in this order.

    An image has 729 patches and each turn 20 to 60 tokens; a conversation without an image has 20 to 800 tokens.
    """
    from umbrella_jax.data.epoch_plan import ConversationSizes
    from umbrella_jax.data.ragged import Ragged

    rng = np.random.default_rng(0)
    volumes: list[tuple[int, ...]] = [(int(rng.integers(subjects)),) for _ in range(single)]
    for _ in range(pairs):
        first, second = rng.choice(subjects, 2, replace=False)
        volumes.append((int(first), int(second)))
    volumes += [()] * text
    turns = np.array([len(shown) * 729 + rng.integers(20, 60, 2 * len(shown)).sum() for shown in volumes])
    lengths = np.where(turns > 0, turns, rng.integers(20, 800, len(volumes)))
    targets = rng.integers(3, 30, len(volumes))
    return ConversationSizes(lengths, targets, Ragged.from_rows(volumes), ["T1"] * subjects, {"T1": 729})


def data_plan(work_dir: Path) -> None:
    """Measure padding, shapes and volumes of the plans of three data sets, and the time to plan a large one."""
    from umbrella_jax.data.epoch_plan import MAX_SHAPES, EpochPlan

    sets = {
        "demo": (demo_sizes(work_dir), (16,)),
        "mixed": (synthetic_sizes(400, 1000, 1500, 500), (8, 16, 32)),
        "comparisons": (synthetic_sizes(100, 0, 600, 0), (8, 16, 32)),
    }
    for name, (sizes, batch_sizes) in sets.items():
        for batch_size in batch_sizes:
            cost = EpochPlan(sizes, batch_size=batch_size, seed=0).cost
            more = {"set": name, "batch_size": batch_size}
            figure("plan_padding", cost.padding, "of positions", **more, limit=0.1)
            figure("plan_shapes", cost.shapes, "shapes", **more, limit=MAX_SHAPES)
            figure("plan_volumes", cost.volumes, "per conversation", **more, shown=round(cost.shown, 3))
    large = synthetic_sizes(40_000, 0, 240_000, 0)
    start = time.perf_counter()
    plan = EpochPlan(large, batch_size=8, seed=0)
    made = time.perf_counter()
    plan.epoch(1)
    more = {"conversations": len(large), "of_each_epoch": round(time.perf_counter() - made, 2)}
    figure("plan_seconds", made - start, "s", **more)


def read_texts(work_dir: Path, number: int, distinct: bool) -> list[float]:
    """Read, tokenize and plan `number` conversations, with distinct or repeated answers.

    Returns the conversations per processor second of each of these steps, and the bytes of memory per conversation.
    """
    import gc

    from umbrella_jax.config.schema import ModalityConfig
    from umbrella_jax.data.cache import Sources
    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.data.loader import Dataset, make_epoch_plan
    from umbrella_jax.data.tokenize import encode_all, load_tokenizer

    file = work_dir / f"texts_{number}_{distinct}.jsonl"
    with file.open("w") as lines:
        for i in range(number):
            record = _pair(i, i % (number // 30), i * 7 % (number // 30))
            if distinct:
                record["conversations"][-1]["content"][0]["text"] = f"Number {i}, that is male."
            lines.write(json.dumps(record) + "\n")
    modalities = {"T1": ModalityConfig(size=(90, 90, 90), patch=(10, 10, 10))}
    tokenizer, _ = load_tokenizer(work_dir / "demo_base", None)
    gc.collect()
    before, times = resident(), [time.process_time()]
    conversations = read_conversations(file, modalities)
    times.append(time.process_time())
    rows = encode_all(conversations, tokenizer, modalities, 8192)
    times.append(time.process_time())
    windows = dict.fromkeys(conversations.images, 1)
    dataset = Dataset(conversations, rows, (), windows, modalities, Sources())
    plan = make_epoch_plan(dataset, batch_size=8, accumulate_steps=1, seed=0)
    times.append(time.process_time())
    gc.collect()
    bytes_each = (resident() - before) * 1e9 / number
    assert plan.updates_per_epoch
    return [*(number / (end - start) for start, end in pairwise(times)), bytes_each]


def data_texts(work_dir: Path) -> None:
    """Measure the way from conversation files to a plan: comparisons of two scans of 729 patches, 30 per subject."""
    from umbrella_jax.demo import make_base

    make_base(work_dir / "demo_base")
    for number, distinct in ((10_000, False), (30_000, False), (100_000, False), (30_000, True)):
        read, encoded, planned, bytes_each = measure(read_texts, work_dir, number, distinct)["value"]
        rates = {"read": round(read), "tokenized": round(encoded), "planned": round(planned)}
        figure("conversation_bytes", bytes_each, "bytes", limit=2000, conversations=number, distinct=distinct, **rates)


def data(work_dir: Path) -> None:
    """Measure preprocessing, cache, plan and conversations."""
    data_preprocess(work_dir)
    data_cache(work_dir)
    data_plan(work_dir)
    data_texts(work_dir)
