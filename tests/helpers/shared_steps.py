"""Runs of one process share the traced and compiled training step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from umbrella_jax.run import preparation


@contextmanager
def shared_steps() -> Iterator[None]:
    """Give runs with equal settings the same optimizer object, which lets them share the traced and compiled step.

    `jax.jit` compares the optimizer, a static argument, by identity. To trace and lower a step takes ten times as long
    as the rest of a small run.
    """
    made: dict[object, Any] = {}

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            key = function.__name__, *(repr(argument) for argument in arguments)  # a schedule's repr has its address
            if key not in made:
                made[key] = function(*arguments)
            return made[key]

        return call

    names = "make_schedule", "make_optimizer"
    with mock.patch.multiple(preparation, **{name: once(getattr(preparation, name)) for name in names}):
        yield
