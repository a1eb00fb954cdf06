"""Time of a generated token, compared with reading the language model's weights once."""

import time
from pathlib import Path

from bench.measure import figure, measure
from bench.workload import SCANS

NEW, ROUNDS = 64, 3


def generation_times() -> list[float]:
    """Return [bytes of the language model's weights, seconds of prefill, of NEW tokens, of copying as many bytes]."""
    import jax
    import numpy as np

    from bench.jax_step import make_batch, model_config, random_params
    from umbrella_jax.inference.generate import decode, prefill
    from umbrella_jax.models import abstract_params

    config, rng = model_config("0.5b", SCANS["t1"], "float32", "none"), np.random.default_rng(0)
    trainable, frozen = random_params(config, rng)
    graphdef, params = abstract_params(config)[0], trainable | frozen
    batch = jax.tree.map(lambda leaf: leaf[0], make_batch(SCANS["t1"], 1, 1, 1, rng))
    size = sum(leaf.nbytes for path, leaf in params.items() if path.startswith("language_model"))
    source = np.ones(size // 4, np.float32)
    target = np.empty_like(source)
    stop, seeds = np.array([-5], np.int32), np.zeros(1, np.uint32)
    prefilled, decoded, copied = [], [], []
    for _ in range(ROUNDS + 1):  # the first compiles
        start = time.perf_counter()
        state = jax.block_until_ready(prefill(params, batch, graphdef=graphdef, max_new_tokens=NEW))
        prefilled.append(time.perf_counter() - start)
        start = time.perf_counter()
        jax.block_until_ready(decode(params, state, stop, seeds, np.int32(NEW), graphdef=graphdef))
        decoded.append(time.perf_counter() - start)
        start = time.perf_counter()
        np.copyto(target, source)
        copied.append(time.perf_counter() - start)
    return [size, *(float(np.median(times[1:])) for times in (prefilled, decoded, copied))]


def generate(work_dir: Path) -> None:
    """Time an answer of 64 tokens, batch 1, against copying the language model's weights."""
    size, prefilled, decoded, copied = measure(generation_times)["value"]
    figure("generate_prefill_seconds", prefilled, "s")
    figure("generate_token_seconds", decoded / NEW, "s", weights_gb=round(size / 1e9, 2), copy=round(copied, 3))
    figure("generate_tokens_to_copies", decoded / NEW / copied, "", limit=1.5)
