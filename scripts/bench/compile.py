"""Time of tracing and compiling the training step, and the matrix products in the compiled program."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.measure import figure, measure
from bench.workload import SCANS


def compiled(work_dir: str, layers: int) -> list[Any]:
    """Return [seconds of tracing, seconds of compiling, {type: number of matrix products}] of the 0.5b step."""
    import jax
    import numpy as np

    from bench.jax_step import make_batch, model_config
    from umbrella_jax.config.schema import TrainConfig
    from umbrella_jax.models import abstract_params
    from umbrella_jax.training import freeze
    from umbrella_jax.training.optimizer import make_optimizer, make_schedule
    from umbrella_jax.training.step import init_state, jit_train_step

    jax.config.update("jax_compilation_cache_dir", work_dir)
    config = model_config("0.5b", SCANS["t1"], "float32", "none", layers)
    graphdef, shapes = abstract_params(config)
    labels = freeze.label_params(list(shapes), ["patch_embed"])
    trainable, frozen = freeze.partition(shapes, labels)
    train = TrainConfig()
    optimizer = make_optimizer(train, labels)
    state = jax.eval_shape(lambda: init_state({p: jax.numpy.zeros(s.shape) for p, s in trainable.items()}, optimizer))
    batch = jax.eval_shape(
        lambda: jax.tree.map(jax.numpy.asarray, make_batch(SCANS["t1"], 1, 1, 1, np.random.default_rng(0)))
    )
    start = time.perf_counter()
    options = {"schedule": make_schedule(train, 100), "graphdef": graphdef, "optimizer": optimizer}
    lowered = jit_train_step().lower(state, frozen, batch, **options)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    dots = Counter(re.findall(r" = (\w+)\[[^ ]* dot\(", program.as_text()))
    return [traced - start, done - traced, dict(dots)]


def compile(work_dir: Path) -> None:
    """Time tracing and compiling per depth, without and with the compilation cache."""
    for layers in (2, 24):
        folder = work_dir / f"compilation-{layers}"
        for cached in (False, True):
            traced, seconds, dots = measure(compiled, str(folder), layers)["value"]
            more = {"layers": layers, "cached": cached}
            figure("trace_seconds", traced, "s", **more)
            figure("compile_seconds", seconds, "s", **more, products=dots)
