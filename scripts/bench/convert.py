"""Time and memory of loading and converting a 0.5b size."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import figure, measure
from bench.workload import CONVERTED


def make_base(directory: Path, size: str = "0.5b") -> None:
    """Write an UMBRELLA checkpoint of a size of `CONVERTED`, T1 96³ with patch 10, with random float32 weights."""
    from convert.config_json import CONFIG, UMBRELLA_CONFIG, read_config
    from convert.lazy_tensor import Tensor
    from convert.safetensors_files import write_checkpoint
    from convert.to_hf import hub_tensors
    from umbrella_jax.config.schema import ModalityConfig, to_dict
    from umbrella_jax.models import abstract_params

    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps(CONVERTED[size]))
    modalities = {"T1": ModalityConfig(size=(96, 96, 96), patch=(10, 10, 10))}
    (directory / UMBRELLA_CONFIG).write_text(json.dumps({"modalities": {m: to_dict(c) for m, c in modalities.items()}}))
    config = read_config(directory)
    rng = np.random.default_rng(0)

    def fill(out: np.ndarray, index: Any) -> None:
        out[...] = rng.standard_normal(out.shape, np.float32) * np.float32(0.02)

    params = {path: Tensor(leaf.shape, "float32", fill) for path, leaf in abstract_params(config)[1].items()}
    write_checkpoint(directory, hub_tensors(params, config))


def load_jax(directory: Path, dtype: str) -> Any:
    """Load all parameters onto the first device."""
    import jax

    from umbrella_jax.checkpoints.checkpoint import Checkpoint

    params = Checkpoint.open(directory).params(dtype)
    jax.block_until_ready(params)
    return params


def load_torch(directory: Path, dtype: str) -> Any:
    """Load the same directory with transformers."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=getattr(torch, dtype))


def load_times(directory: Path, checked: Path, dtype: str) -> list[list[float]]:
    """Return the seconds of three loads each: ours, ours with the checksums in `checked`, and transformers'.

    Imports and one warm-up load per loader are not timed. The loaders do not take turns: the host of a virtual machine
    reclaims memory a second after it is freed, and the next load would wait for the host (4 s instead of 0.6 s).
    """
    import transformers

    import umbrella_jax.checkpoints.checkpoint  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _ = transformers.AutoModelForImageTextToText  # transformers imports it lazily
    times = []
    for load, source in ((load_jax, directory), (load_jax, checked), (load_torch, directory)):
        load(source, dtype)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            model = load(source, dtype)
            seconds.append(time.perf_counter() - start)
            del model
        times.append(seconds)
    return times


def to_native(directory: Path, out: Path) -> None:
    """Convert as `convert from-hf` does."""
    from umbrella_jax.checkpoints.checkpoint import Checkpoint
    from umbrella_jax.checkpoints.export import write_native

    write_native(Checkpoint.open(directory), out)


def to_hf(native: Path, out: Path) -> None:
    """Export as `convert to-hf` does."""
    from umbrella_jax.checkpoints.checkpoint import Checkpoint
    from umbrella_jax.checkpoints.export import write_hf

    write_hf(Checkpoint.open(native), out)


def fingerprint(directory: Path) -> str:
    """Return the SHA-256 of the base."""
    from umbrella_jax.checkpoints.checkpoint import Checkpoint

    return Checkpoint.open(directory).fingerprint


def convert(work_dir: Path, *, size: str = "0.5b") -> None:
    """Measure memory and time of loading and converting, against transformers' from_pretrained."""
    from convert.safetensors_files import open_checkpoint

    work_dir /= size
    base = work_dir / "base"
    if not base.exists():
        make_base(base, size)
    tensors = open_checkpoint(base)
    total, largest = sum(t.nbytes for t in tensors.values()) / 1e9, max(t.nbytes for t in tensors.values()) / 1e9
    (base / "model.safetensors").read_bytes()  # into the page cache
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
    for dtype, parameters in (("float32", total), ("bfloat16", total / 2)):
        excess = measure(load_jax, base, dtype)["peak"] - parameters
        figure(f"load_{dtype}_peak_over_parameters", excess, "GB", parameters=round(parameters, 3), limit=0.7)
        ours, checked, theirs = map(statistics.median, measure(load_times, base, out, dtype)["value"])
        figure(f"load_{dtype}_seconds", ours, "s", torch=round(theirs, 3), ratio=round(ours / theirs, 3), limit_ratio=1)
        figure(f"load_{dtype}_with_checksums_seconds", checked, "s", ratio_to_without=round(checked / ours, 3))
    result = measure(fingerprint, base)
    figure("fingerprint_seconds", result["seconds"], "s", gb_per_second=round(total / result["seconds"], 2))
