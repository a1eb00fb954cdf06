"""A configuration to validate, and records of its conversations."""

import pytest

from umbrella_jax.config.schema import DataConfig, ModelConfig, RunConfig


@pytest.fixture
def config(modalities):
    """`config(train, eval)` makes the config of a run; with None, that set is not given."""

    def make(train, evaluation=None, **data):
        paths = {name: str(path) for name, path in (("train", train), ("eval", evaluation)) if path}
        return RunConfig(model=ModelConfig(modalities=modalities), data=DataConfig(**paths, threads=2, **data))

    return make


@pytest.fixture
def ask(record):
    """`ask("a.nii")` makes a record with one question about a T1 volume."""

    def make(path, answer="male.", question="Which sex?", **fields):
        return record([("user", [f"T1:{path}", question]), ("assistant", [answer])], **fields)

    return make
