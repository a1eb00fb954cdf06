"""Commands replaced by a test's own functions."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from umbrella_jax import cli


def replace_command(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, call: Callable[..., Any]) -> None:
    """Let a command call another function than `module.name`, in a parser of its own: tests share one otherwise."""
    monkeypatch.setattr(module, name, call)
    monkeypatch.setattr(cli, "make_parser", getattr(cli.make_parser, "__wrapped__", cli.make_parser))
