"""Readers on broken input, for seconds; for longer by scripts/fuzz.py."""

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from convert.config_json import read_config
from convert.safetensors_files import SINGLE, open_checkpoint
from convert.trainable import open_trainable
from tests.helpers import fuzz_targets
from tests.helpers.fuzz_targets import (
    ARRAYS,
    CONVERSATIONS,
    JSONS,
    KINDS,
    MODALITIES,
    YAMLS,
    checkpoint,
    folder,
    lines,
    put,
    volume,
    voxels,
    written,
    yaml,
)
from umbrella_jax.data.conversation import read_conversations
from umbrella_jax.data.volume import load_volume


def test_unaltered_conversations_are_read() -> None:
    for name, content in (("a.json", written(list(CONVERSATIONS))), ("a.jsonl", lines(list(CONVERSATIONS)))):
        assert len(read_conversations(put(name, content), ("T1", "rsfMRI"))) == len(CONVERSATIONS)


@pytest.mark.parametrize("kind", [*KINDS, "npy"])
def test_unaltered_volumes_are_read(kind: str) -> None:
    for axes, modality in ((3, "resize"), (4, "stored run")):
        if (kind, axes) != ("npy", 4):
            path = put(f"a.{kind}", volume(kind, axes)[0])
            if kind == "hdr":
                put("a.img", voxels())
            load_volume(path, MODALITIES[modality])


def test_unaltered_checkpoints_are_read() -> None:
    names = {name.removeprefix("module.").replace("_orig_mod.", "") for name in ARRAYS}
    assert open_checkpoint(put(SINGLE, checkpoint("weights")).parent).keys() == names
    assert open_trainable(put("part", checkpoint("trainable"))).modalities.keys() == {"T1"}


def test_unaltered_configs_are_read() -> None:
    for name, (read, tree) in YAMLS.items():
        for write in (written, yaml):
            read(put(name, write(tree)))
    for name, tree in JSONS.items():
        put(name, written(tree))
    assert read_config(folder()).modalities.keys() == {"T1"}


def count(target: str) -> int:
    return fuzz_targets.fuzz(fuzz_targets.TARGETS[target])


@pytest.fixture(scope="module")
def counts() -> Iterator[dict[str, Future[int]]]:
    """Of all targets at once, each in a process of its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.test_fuzz"])
    with ProcessPoolExecutor(len(fuzz_targets.TARGETS), context) as pool:
        yield {target: pool.submit(count, target) for target in fuzz_targets.TARGETS}


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_only_documented_errors(target: str, counts: dict[str, Future[int]]) -> None:
    found = counts[target].result()
    print(f"{target}: {found} inputs")
    assert found > 0  # behind the first
