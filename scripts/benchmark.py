#!/usr/bin/env python
"""Measures, and prints one JSON line per figure: {"figure": …, "value": …, "unit": …, …}.

    python scripts/benchmark.py convert [--work-dir D]     needs the extra `torch`, 12 GB of disk
    python scripts/benchmark.py data [--work-dir D]

Every measurement has a process of its own, begun with the files in the page cache; peaks are over what the
interpreter holds with jax imported and its devices found.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONFIG_05B = {  # of llava-hf/llava-interleave-qwen-0.5b-hf
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 151646,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "vocab_size": 152000,
        "max_position_embeddings": 32768,
    },
}


def figure(name: str, value: float, unit: str, **more: Any) -> None:
    """Prints one line."""
    print(json.dumps({"figure": name, "value": round(value, 3), "unit": unit, **more}), flush=True)


def resident(pid: int | str = "self") -> float:
    """Resident memory in GB: what is touched of it, mapped files included."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e9


def measure(work: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Runs `work(*args)` in a new process; its seconds, the GB that it adds at its peak, and a list that it returns."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measured, args=(results, work, args))
    process.start()
    result = results.get()
    process.join()
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


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
        start = time.perf_counter()
        value = work(*args)
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        results.put({"seconds": seconds, "peak": peak - before, "value": value if isinstance(value, list) else None})
    except BaseException as error:
        results.put({"error": repr(error)})


# -- convert ----------------------------------------------------------------------------------------------------------


def make_base(directory: Path) -> None:
    """A 0.5b UMBRELLA checkpoint, T1 96³ with patch 10, float32 and random."""
    from convert.hf_config import CONFIG, UMBRELLA_CONFIG, read_config
    from convert.safetensors_io import write_checkpoint
    from convert.tensor import Tensor
    from convert.to_hf import hub_tensors
    from umbrella_jax.config import ModalityConfig, to_dict
    from umbrella_jax.models import abstract_params

    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps(CONFIG_05B))
    modalities = {"T1": ModalityConfig(size=(96, 96, 96), patch=(10, 10, 10))}
    (directory / UMBRELLA_CONFIG).write_text(json.dumps({"modalities": {m: to_dict(c) for m, c in modalities.items()}}))
    config = read_config(directory)
    rng = np.random.default_rng(0)

    def fill(out: np.ndarray, index: Any) -> None:
        out[...] = rng.standard_normal(out.shape, np.float32) * np.float32(0.02)

    params = {path: Tensor(leaf.shape, "float32", fill) for path, leaf in abstract_params(config)[1].items()}
    write_checkpoint(directory, hub_tensors(params, config))


def load_jax(directory: Path, dtype: str) -> Any:
    """All parameters on the first device."""
    import jax

    from umbrella_jax.api import Checkpoint

    params = Checkpoint.open(directory).params(dtype)
    jax.block_until_ready(params)
    return params


def load_torch(directory: Path, dtype: str) -> Any:
    """The same directory by transformers."""
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=getattr(torch, dtype))


def alternate(directory: Path, dtype: str) -> list[tuple[float, float]]:
    """Seconds that each takes, three times in turn, once both have been imported."""
    import transformers

    import umbrella_jax.api  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _ = transformers.LlavaForConditionalGeneration  # imports it
    runs = []
    for _ in range(3):
        seconds = []
        for load in (load_jax, load_torch):
            start = time.perf_counter()
            model = load(directory, dtype)
            seconds.append(time.perf_counter() - start)
            del model
        runs.append((seconds[0], seconds[1]))
    return runs


def to_native(directory: Path, out: Path) -> None:
    """`convert from-hf`."""
    from umbrella_jax.api import Checkpoint, write_native

    write_native(Checkpoint.open(directory), out)


def to_hf(native: Path, out: Path) -> None:
    """`convert to-hf`."""
    from umbrella_jax.api import Checkpoint, write_hf

    write_hf(Checkpoint.open(native), out)


def fingerprint(directory: Path) -> str:
    """SHA-256 of the base."""
    from umbrella_jax.api import Checkpoint

    return Checkpoint.open(directory).fingerprint


def convert(work_dir: Path) -> None:
    """Memory and time of loading and converting the 0.5b size, beside transformers' from_pretrained."""
    from convert.safetensors_io import open_checkpoint

    base = work_dir / "base"
    if not base.exists():
        make_base(base)
    tensors = open_checkpoint(base)
    size, largest = sum(t.nbytes for t in tensors.values()) / 1e9, max(t.nbytes for t in tensors.values()) / 1e9
    (base / "model.safetensors").read_bytes()  # into the page cache
    for dtype, held in (("float32", size), ("bfloat16", size / 2)):
        peak = measure(load_jax, base, dtype)["peak"]
        figure(f"load_{dtype}_peak_over_parameters", peak - held, "GB", parameters=round(held, 3), limit=0.7)
        runs = measure(alternate, base, dtype)["value"]
        ours, theirs = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
        figure(f"load_{dtype}_seconds", ours, "s", torch=round(theirs, 3), ratio=round(ours / theirs, 3), limit_ratio=1)
    native, out = work_dir / "native", work_dir / "export"
    for name, work, source, to, limit in (
        ("from_hf", to_native, base, native, None),
        ("to_hf", to_hf, native, out, 1 + 2 * largest),
    ):
        result = measure(work, source, to)
        figure(
            f"{name}_peak", result["peak"], "GB", limit=limit and round(limit, 3), seconds=round(result["seconds"], 2)
        )
    same = (base / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    figure("hf_native_hf_identical", float(same), "bool")
    result = measure(fingerprint, base)
    figure("fingerprint_seconds", result["seconds"], "s", gb_per_second=round(size / result["seconds"], 2))


# -- data -------------------------------------------------------------------------------------------------------------


def demo_facts(work_dir: Path) -> Any:
    """What a plan knows of the demo's training conversations; volumes are not read."""
    from functools import partial

    from umbrella_jax.config import load_config
    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.data.loader import facts_of
    from umbrella_jax.data.tokenize import encode, encode_all, load_tokenizer
    from umbrella_jax.demo import make_base, make_data

    modalities = load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml").model.modalities
    tokenizer, _ = load_tokenizer(make_base(work_dir / "demo_base"), None)
    conversations = read_conversations(make_data(work_dir / "demo_data").train, modalities)
    encoder = partial(encode, tokenizer=tokenizer, modalities=modalities, max_length=8192)
    return facts_of(encode_all(conversations, encoder), modalities)


def synthetic_facts(subjects: int, single: int, pairs: int, text: int) -> Any:
    """T1 questions, T3 comparisons of two subjects and questions without an image, in this order: 729 patches for an
    image and 20 to 60 tokens for a turn, of text alone 20 to 800 in all."""
    from umbrella_jax.data.plan import Facts

    rng = np.random.default_rng(0)
    volumes: list[tuple[int, ...]] = [(int(rng.integers(subjects)),) for _ in range(single)]
    for _ in range(pairs):
        first, second = rng.choice(subjects, 2, replace=False)
        volumes.append((int(first), int(second)))
    volumes += [()] * text
    turns = np.array([len(shown) * 729 + rng.integers(20, 60, 2 * len(shown)).sum() for shown in volumes])
    lengths = np.where(turns > 0, turns, rng.integers(20, 800, len(volumes)))
    return Facts(lengths, rng.integers(3, 30, len(volumes)), volumes, ["T1"] * subjects, {"T1": 729})


def data_plan(work_dir: Path) -> None:
    """What the plans of the demo's, a mixed and a comparing data set cost, and how long a large one takes."""
    from umbrella_jax.data.plan import MAX_SHAPES, Plan

    sets = {
        "demo": (demo_facts(work_dir), (16,)),
        "mixed": (synthetic_facts(400, 1000, 1500, 500), (8, 16, 32)),
        "comparisons": (synthetic_facts(100, 0, 600, 0), (8, 16, 32)),
    }
    for name, (facts, batch_sizes) in sets.items():
        for batch_size in batch_sizes:
            report = Plan(facts, batch_size=batch_size, seed=0).report
            more = {"set": name, "batch_size": batch_size}
            figure("plan_padding", report.padding, "of positions", **more, limit=0.1)
            figure("plan_shapes", report.shapes, "shapes", **more, limit=MAX_SHAPES)
            figure("plan_volumes", report.volumes, "per conversation", **more, shown=round(report.shown, 3))
    large = synthetic_facts(40_000, 0, 240_000, 0)
    start = time.perf_counter()
    plan = Plan(large, batch_size=8, seed=0)
    made = time.perf_counter()
    plan.epoch(1)
    more = {"conversations": len(large), "of_each_epoch": round(time.perf_counter() - made, 2)}
    figure("plan_seconds", made - start, "s", **more)


def data(work_dir: Path) -> None:
    """The loader's figures."""
    data_plan(work_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for work in (convert, data):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.add_argument("--work-dir", type=Path, help="where files are made and left; default a temporary folder")
        command.set_defaults(work=work)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work(arguments.work_dir or Path(temporary))


if __name__ == "__main__":
    main()
