"""Runs of one process share the traced and compiled training step, and all programs share one MLIR context."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any
from unittest import mock

from jax._src.interpreters import mlir

from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.run import preparation
from umbrella_jax.training import optimizer

shared_context = cache(mlir.make_ir_context)
"""Return the MLIR context in which every program is lowered. JAX makes one for each, which takes 6 ms: as long as the
rest of a small program's lowering and half as long as its compilation."""

UNUSED = (
    *("epochs", "batch_size", "accumulate_steps", "number_loss"),
    *("learning_rate", "schedule", "warmup_steps", "warmup_ratio"),  # arguments of the step
    *("eval_steps", "eval_samples", "save_steps", "keep_latest", "keep_best", "best_metric", "early_stopping"),
    *("max_new_tokens", "on_nonfinite", "max_skipped", "tensorboard", "wandb"),
)
"""Settings that the optimizer does not read."""


@contextmanager
def shared_steps() -> Iterator[None]:
    """Lower all programs in `shared_context`. Give runs with equal settings the same optimizer object, which lets them
    share the traced and compiled step.

    `jax.jit` compares the optimizer, a static argument, by identity. To trace and lower a step takes ten times as long
    as the rest of a small run.
    """
    made: dict[str, Any] = {}

    def make_optimizer(config: TrainConfig, labels: Mapping[str, str]) -> Any:
        used = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in UNUSED}
        key = repr((used, labels))
        if key not in made:
            made[key] = optimizer.make_optimizer(config, labels)
        return made[key]

    shared = mock.patch.object(preparation, "make_optimizer", make_optimizer)
    with shared, mock.patch.object(mlir, "make_ir_context", shared_context):
        yield
