"""Time our training step on the workload of `torch_step.py`; print JSON lines."""

import argparse
import ctypes
import json
import math
import resource
import tempfile
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from bench.trace import kernels
from bench.trials import TRIALS, trying
from bench.workload import ANSWER, HUB_CONFIGS, IMAGE, SCANS, TEXT, VolumeSpec
from convert.config_json import CONFIG, UMBRELLA_CONFIG, read_config
from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import ModalityConfig, RematPolicy, TrainConfig, to_dict
from umbrella_jax.models import LlavaConfig, Params, abstract_params, native_backend, unstack
from umbrella_jax.plan.devices import layer_rate
from umbrella_jax.training import freeze
from umbrella_jax.training.compiler import choose_loop
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import init_state, jit_train_step, train_step


def matmul_rate(dtype: str) -> float:
    """Return the best FLOP/s of 20 measurements of matrix products.

    On a CPU it measures one product of the vision tower's size. Elsewhere it measures ten products of 8192³ in a row,
    which fill the card without pauses.
    """
    times, m, n, k = (1, 729, 4304, 1152) if jax.default_backend() == "cpu" else (10, *[8192] * 3)
    x, w = (jax.random.normal(jax.random.key(i), (rows, k), dtype) for i, rows in enumerate((m, n)))
    w = w * k**-0.5  # keeps the scale of x
    product = jax.jit(lambda x, w: jax.lax.fori_loop(0, times, lambda _, x: x @ w.T, x) if times > 1 else x @ w.T)
    product(x, w).block_until_ready()
    best = np.inf
    for _ in range(20):
        start = time.perf_counter()
        product(x, w).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return times * 2 * m * n * k / best


def make_batch(scan: VolumeSpec, size: int, images: int, volumes: int, rng: np.random.Generator) -> Batch:
    """Return a batch [1, B, ...] of `size` conversations with `images` scans and 64 tokens, the last 8 supervised.

    The images show `volumes` distinct scans in turn.
    """
    patches = scan.patches
    length = TEXT + images * (patches - 1)
    rows, first = (1, size, length), 4
    ids = rng.integers(0, 150000, rows, np.int32)
    feature_idx = np.full(rows, -1, np.int32)
    for b in range(size):
        for i in range(images):
            positions = slice(first + i * (patches + 4), first + i * (patches + 4) + patches)
            ids[0, b, positions] = IMAGE
            feature_idx[0, b, positions] = (b * images + i) % volumes * patches + np.arange(patches)
    drawn = rng.standard_normal((min(volumes, 8), *scan.size), np.float32)  # drawing a 4D scan takes a second
    return Batch(
        input_ids=ids,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), rows),
        feature_idx=feature_idx,
        lengths=np.full((1, size), length, np.int32),
        target_pos=np.broadcast_to(np.arange(length - ANSWER - 1, length - 1, dtype=np.int32), (1, size, ANSWER)),
        target_ids=ids[..., -ANSWER:],
        target_mask=np.ones((1, size, ANSWER), bool),
        volumes={scan.modality: np.resize(drawn, (1, volumes, *scan.size))},
    )


def model_config(size: str, scan: VolumeSpec, dtype: str, remat: RematPolicy, layers: int | None = None) -> LlavaConfig:
    """Return the config of the hub's model of this size, with `layers` layers in tower and language model, if given."""
    content = json.loads(json.dumps(HUB_CONFIGS[size]))
    for part in ("vision_config", "text_config"):
        content[part]["num_hidden_layers"] = layers or content[part]["num_hidden_layers"]
    modality = ModalityConfig(size=scan.size, patch=scan.patch)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(content))
        (Path(folder) / UMBRELLA_CONFIG).write_text(json.dumps({"modalities": {scan.modality: to_dict(modality)}}))
        return read_config(Path(folder), compute_dtype=dtype, remat=remat)


def random_params(config: LlavaConfig, rng: np.random.Generator) -> tuple[Params, Params]:
    """Return (trainable, frozen): a float32 patch embedding, and the rest in the compute dtype, as the layers' loop
    takes it."""
    shapes = abstract_params(config)[1]
    labels = freeze.label_params(list(shapes), ["patch_embed"])
    params: Params = {}
    for i, (path, leaf) in enumerate(shapes.items()):
        dtype = config.compute_dtype if labels[path] == freeze.FROZEN else "float32"
        if jax.default_backend() == "cpu":
            values = np.empty(leaf.shape, np.float32)
            rng.standard_normal(out=values.reshape(-1), dtype=np.float32)
            values *= np.float32(0.02)  # in place, so that the peak of memory is the step's
            values += np.float32("norm" in path)
            params[path] = jax.device_put(values).astype(dtype)
        else:
            params[path] = jax.random.normal(jax.random.key(i, impl="rbg"), leaf.shape, dtype) * 0.02 + ("norm" in path)
    trainable, frozen = freeze.partition(params, labels)
    del params
    return trainable, unstack(frozen) if config.layers == "unrolled" else frozen


class JaxStep:
    """A compiled training step with its state, frozen parameters and batch.

    `options` may be `defaults`, for XLA's default options, and names of trials.
    """

    def __init__(
        self, config: LlavaConfig, trainable: Params, frozen: Params, batch: Batch, options: Collection[str] = ()
    ):
        labels = freeze.label_params([*trainable, *frozen], ["patch_embed"])
        train = TrainConfig()
        optimizer = make_optimizer(train, labels)
        self.state, self.frozen, self.batch = init_state(trainable, optimizer), frozen, jax.device_put(batch)
        self.schedule = make_schedule(train, 100)
        static = {"graphdef": abstract_params(config)[0], "optimizer": optimizer}
        jitted = jit_train_step()
        if trials := TRIALS.keys() & set(options):
            jax.clear_caches()  # what is traced is remembered by the function that was there before
        if "defaults" in options:
            jitted = jax.jit(train_step, static_argnames=tuple(static), donate_argnames="state")
        start = time.perf_counter()
        with trying(trials):
            lowered = jitted.lower(self.state, self.frozen, self.batch, schedule=self.schedule, **static)
            self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        """Take one step; return the loss when the device is done."""
        self.state, values = self.compiled(self.state, self.frozen, self.batch, schedule=self.schedule)
        return float(values["loss"])


def peak_gib() -> float:
    """Return the peak memory so far in GiB: the device's, or on a CPU the process's."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print a line with the rates; then, for each case, a line on compilation and a line per step.

    A step's line has its time, its loss and the peak memory so far. A case that does not fit prints an error line.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=HUB_CONFIGS, default="0.5b")
    parser.add_argument(
        "--case",
        nargs="+",
        default=["t1:1"],
        metavar="SCAN:BATCH[:OPTION+OPTION]",
        help="cases to measure in turn; options: `scanned` or `unrolled` layers (default those of a long run), "
        "`defaults` for XLA's default options, and trials: " + ", ".join(TRIALS),
    )
    parser.add_argument("--remat", choices=["none", "mlp", "full"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--layers", type=int, help="layers of tower and language model; default the model's")
    parser.add_argument("--images", type=int, default=1, help="images per conversation")
    parser.add_argument("--volumes", type=int, help="distinct volumes per batch; default one per image")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compilation-cache", metavar="DIR")
    parser.add_argument("--trace", action="store_true", help="print the kernels of one more step per case")
    args = parser.parse_args()
    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
    backend = native_backend(jax.devices()[0])
    rates = {"matmul_flops": matmul_rate(args.dtype)}
    rates |= {"layer_flops": layer_rate(args.dtype)} if jax.default_backend() == "cpu" else {}
    print(json.dumps(rates | {"device": jax.devices()[0].device_kind}), flush=True)
    for case in args.case:
        name, count, *words = case.split(":")
        options = words[0].split("+") if words else []
        scan, size = SCANS[name], int(count)
        config = model_config(args.size, scan, args.dtype, args.remat, args.layers).with_attention("auto", backend)
        loop, _ = choose_loop("auto", jax.devices()[0].platform, math.inf, cached=True)
        config = replace(config, layers=next((word for word in options if word in ("scanned", "unrolled")), loop))
        rng = np.random.default_rng(0)
        trainable, frozen = random_params(config, rng)
        batch = make_batch(scan, size, args.images, args.volumes or size * args.images, rng)
        try:
            step = JaxStep(config, trainable, frozen, batch, options)
            print(json.dumps({"case": case, "compile_seconds": step.compile_seconds}), flush=True)
            ctypes.CDLL(None).malloc_trim(0)  # returns the compiler's memory, which is not the step's
            for _ in range(args.steps):
                start, busy = time.perf_counter(), time.process_time()
                loss = step()
                seconds, busy = time.perf_counter() - start, time.process_time() - busy
                line = {"case": case, "seconds": seconds, "busy": busy, "peak_gib": peak_gib(), "loss": loss}
                print(json.dumps(line), flush=True)
            if args.trace:
                print(json.dumps({"case": case, "kernels": kernels(step)}), flush=True)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(json.dumps({"case": case, "error": "out of memory"}), flush=True)
        step = trainable = frozen = None  # the next case needs their memory


if __name__ == "__main__":
    main()
