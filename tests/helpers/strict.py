"""Strict promotion: arrays of different types or ranks do not combine by themselves."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest import mock

import jax
import optax
import pytest


@pytest.fixture(scope="module", autouse=True)
def strict_promotion() -> Iterator[None]:
    """Refuse arithmetic between arrays of different types or ranks in a module's tests, and in what they trace."""
    with ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        # optax itself mixes types: float ** integer in Adam.
        stack.enter_context(mock.patch.object(optax.tree, "bias_correction", _lenient(optax.tree.bias_correction)))
        yield


def _lenient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a library's function to run under jax's standard promotion."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapper
