"""Runs of one process share the traced and compiled training step, and all programs share one MLIR context."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any
from unittest import mock

from jax._src.interpreters import mlir

from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.run import preparation

shared_context = cache(mlir.make_ir_context)
"""Return the MLIR context in which every program is lowered. JAX makes one for each, which takes 6 ms: as long as the
rest of a small program's lowering and half as long as its compilation."""

UNUSED = (
    *("epochs", "batch_size", "accumulate_steps"),  # the number of updates is an argument of its own
    *("eval_steps", "eval_samples", "save_steps", "keep_latest", "keep_best", "best_metric", "early_stopping"),
    *("max_new_tokens", "on_nonfinite", "max_skipped", "tensorboard", "wandb"),
)
"""Settings that neither the schedule nor the optimizer reads."""


@contextmanager
def shared_steps() -> Iterator[None]:
    """Lower all programs in `shared_context`. Give runs with equal settings the same optimizer object, which lets them
    share the traced and compiled step.

    `jax.jit` compares the optimizer, a static argument, by identity. To trace and lower a step takes ten times as long
    as the rest of a small run.
    """
    made: dict[object, Any] = {}

    def once(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
        def call(config: TrainConfig, *arguments: Any) -> Any:
            used = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in UNUSED}
            arguments_key = function.__name__, repr(used), key(config, *arguments)
            if arguments_key not in made:
                made[arguments_key] = function(config, *arguments)
            return made[arguments_key]

        return call

    def steps_key(config: TrainConfig, num_steps: int) -> int:
        return 0 if config.schedule == "constant" and not config.warmup_ratio else num_steps

    def labels_key(config: TrainConfig, schedule: object, labels: object) -> str:
        return repr((schedule, labels))  # with the schedule's address

    schedule, optimizer = once(preparation.make_schedule, steps_key), once(preparation.make_optimizer, labels_key)
    steps = mock.patch.multiple(preparation, make_schedule=schedule, make_optimizer=optimizer)
    with steps, mock.patch.object(mlir, "make_ir_context", shared_context):
        yield
