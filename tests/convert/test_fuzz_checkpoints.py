"""Readers of checkpoints and configs on broken input, for seconds; for longer by scripts/fuzz.py."""

import pytest

from convert.hf_config import read_config
from convert.safetensors_io import SINGLE, open_checkpoint
from convert.trainable import open_trainable
from tests import fuzz_targets
from tests.fuzz_targets import ARRAYS, JSONS, YAMLS, checkpoint, folder, fuzz, put, written, yaml


def test_unaltered_checkpoints_are_read() -> None:
    assert open_checkpoint(put(SINGLE, checkpoint("weights")).parent).keys() == ARRAYS.keys()
    assert open_trainable(put("part", checkpoint("trainable"))).modalities.keys() == {"T1"}


def test_unaltered_configs_are_read() -> None:
    for name, (read, tree) in YAMLS.items():
        for write in (written, yaml):
            read(put(name, write(tree)))
    for name, tree in JSONS.items():
        put(name, written(tree))
    assert read_config(folder()).modalities.keys() == {"T1"}


@pytest.mark.parametrize("target", ["checkpoints", "configs"])
def test_only_documented_errors(target: str) -> None:
    count = fuzz(fuzz_targets.TARGETS[target])
    print(f"{target}: {count} inputs")
    assert count > 0
