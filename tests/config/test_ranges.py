"""Tests of the ranges that configuration fields declare."""

import dataclasses
import math
import typing
from typing import Any

import pytest
from make_config_reference import sections

from umbrella_jax.config.load import load_config
from umbrella_jax.config.ranges import Range, range_of
from umbrella_jax.config.schema import RunConfig, TrainConfig
from umbrella_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("allowed", "text", "inside", "outside"),
    [
        (Range(ge=1), "1 or more", [1, 10**9], [0, math.inf, math.nan]),
        (Range(gt=0), "a positive number", [1e-9], [0, -1, math.inf, math.nan]),
        (Range(ge=0, lt=1), "0 or more, less than 1", [0, 0.999], [1, -1e-9, math.nan]),
        (Range(gt=0, le=1 << 20), "a positive number, at most 1,048,576", [0.5, 1 << 20], [0, (1 << 20) + 1]),
        (Range(ge=1e-3, le=1e3, unit="mm"), "0.001 to 1000 mm", [1e-3, 1e3], [0, 1001, math.nan]),
        (Range(), "a finite number", [-1e300, 0], [math.inf, -math.inf, math.nan]),
    ],
)
def test_range(allowed: Range, text: str, inside: list[float], outside: list[float]) -> None:
    assert str(allowed) == text
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)


def test_range_faults_and_contradictions_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(clip_norm=0, betas=(0.9, 1.0), keep_best=1)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["betas", "clip_norm", "keep_best"]


def numbers(hint: Any) -> set[Any]:
    return {int, float} & {
        part for outer in (hint, *typing.get_args(hint)) for part in (outer, *typing.get_args(outer))
    }


def test_every_number_declares_its_range() -> None:
    related = {"size", "patch", "intensity_scale"}  # bounded by each other, in `contradictions`
    missing = [
        f"{key}.{field.name}"
        for key, section in sections(RunConfig)
        for field in dataclasses.fields(section)
        if field.name not in related and numbers(field.type) and range_of(field.type) is None
    ]
    assert missing == []


@pytest.mark.parametrize("key", ["train.batch_size", "seed", "train.epochs"])
def test_refuses_a_whole_number_too_large_for_a_float(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key.rpartition('.')[2]}: expected .*, got 1000"):
        load_config("tiny", {key: 10**400})


def test_refuses_a_seed_that_jax_would_cut_off() -> None:
    with pytest.raises(ConfigError, match=r"seed: expected 0 to 4,294,967,295, got 4294967296"):
        load_config("tiny", {"seed": 2**32})
