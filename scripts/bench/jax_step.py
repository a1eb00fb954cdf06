"""Our training step on the workload of `torch_step.py`, as JSON lines."""

import argparse
import ctypes
import json
import resource
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from convert.hf_config import CONFIG, UMBRELLA_CONFIG, read_config
from umbrella_jax.batch import Batch
from umbrella_jax.config import ModalityConfig, RematPolicy, TrainConfig, to_dict
from umbrella_jax.models import LlavaConfig, abstract_params, native_backend
from umbrella_jax.plan.devices import layer_rate
from umbrella_jax.training import freeze
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import init_state, jit_train_step

IMAGE = 151646
MODALITIES = {"T1": ModalityConfig(size=(96, 96, 96), patch=(10, 10, 10))}


def matmul_rate() -> float:
    """FLOP/s of float32 products as large as the tower's, the best of 20."""
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(729, 1152), (4304, 1152)]))
    product = jax.jit(lambda x, w: x @ w.T)
    product(x, w).block_until_ready()
    best = np.inf
    for _ in range(20):
        start = time.perf_counter()
        product(x, w).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 729 * 1152 * 4304 / best


def make_batch(size: int, images: int, volumes: int, rng: np.random.Generator) -> Batch:
    """[1, B, ...]: `images` T1 scans and 64 tokens each, their placeholders among them; the last 8 supervised.

    `volumes` distinct scans go round over the images.
    """
    patches, text, answer = MODALITIES["T1"].num_patches, 64, 8
    length = text + images * (patches - 1)
    rows, first = (1, size, length), 4
    ids = rng.integers(0, 150000, rows, np.int32)
    feature_idx = np.full(rows, -1, np.int32)
    for b in range(size):
        for i in range(images):
            place = slice(first + i * (patches + 4), first + i * (patches + 4) + patches)
            ids[0, b, place] = IMAGE
            feature_idx[0, b, place] = (b * images + i) % volumes * patches + np.arange(patches)
    return Batch(  # type: ignore[call-arg]
        input_ids=ids,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), rows),
        feature_idx=feature_idx,
        lengths=np.full((1, size), length, np.int32),
        target_pos=np.broadcast_to(np.arange(length - answer - 1, length - 1, dtype=np.int32), (1, size, answer)),
        target_ids=ids[..., -answer:],
        target_mask=np.ones((1, size, answer), bool),
        volumes={"T1": rng.standard_normal((1, volumes, *MODALITIES["T1"].size), np.float32)},
    )


def model_config(text: str, dtype: str, remat: RematPolicy, layers: int | None = None) -> LlavaConfig:
    """The model of a config.json, cut to so many layers."""
    content = json.loads(text)
    for part in ("vision_config", "text_config"):
        content[part]["num_hidden_layers"] = layers or content[part]["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(content))
        modalities = {name: to_dict(modality) for name, modality in MODALITIES.items()}
        (Path(folder) / UMBRELLA_CONFIG).write_text(json.dumps({"modalities": modalities}))
        return read_config(Path(folder), compute_dtype=dtype, remat=remat)


def main() -> None:
    """Prints a line on the compilation, and one per step: seconds, loss, and the peak of memory so far."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", help="config.json, as JSON")
    parser.add_argument("--remat", choices=["none", "mlp", "full"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--layers", type=int, help="of tower and language model each; default as configured")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--images", type=int, default=1, help="of a conversation")
    parser.add_argument("--volumes", type=int, help="distinct ones of the batch; default one for each image")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compilation-cache", metavar="DIR")
    args = parser.parse_args()
    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
    config = model_config(args.config, args.dtype, args.remat, args.layers)
    config = config.with_attention("auto", native_backend(jax.devices()[0]))
    graphdef, shapes = abstract_params(config)
    rng = np.random.default_rng(0)
    labels = freeze.label_params(list(shapes), ["patch_embed"])
    params = {}
    for path, leaf in shapes.items():
        values = np.empty(leaf.shape, np.float32)
        rng.standard_normal(out=values.reshape(-1), dtype=np.float32)
        values *= np.float32(0.02)  # in place: the peak of memory is to be the step's
        values += np.float32("norm" in path)
        params[path] = jax.device_put(values).astype(args.dtype if labels[path] == freeze.FROZEN else "float32")
    trainable, frozen = freeze.partition(params, labels)
    del params
    train = TrainConfig()
    optimizer = make_optimizer(train, make_schedule(train, 100), labels)
    made = make_batch(args.batch, args.images, args.volumes or args.batch * args.images, rng)
    state, batch = init_state(trainable, optimizer), jax.device_put(made)
    on_cpu = jax.default_backend() == "cpu"
    rates = {"matmul_flops": matmul_rate(), "layer_flops": layer_rate(args.dtype)} if on_cpu else {}
    print(json.dumps(rates), flush=True)
    start = time.perf_counter()
    step = jit_train_step.lower(state, frozen, batch, graphdef=graphdef, optimizer=optimizer).compile()
    print(json.dumps({"compile_seconds": time.perf_counter() - start}), flush=True)
    ctypes.CDLL(None).malloc_trim(0)  # what the compiler has freed is no memory of the step
    for _ in range(args.steps):
        start, busy = time.perf_counter(), time.process_time()
        state, values = step(state, frozen, batch)
        loss = float(values["loss"])  # waits for the device
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if stats := jax.devices()[0].memory_stats():
            peak = stats["peak_bytes_in_use"] / 2**30
        print(json.dumps({"seconds": seconds, "busy": busy, "peak_gib": peak, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
