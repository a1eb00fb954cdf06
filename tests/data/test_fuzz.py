"""Readers of data on broken input, for seconds; for longer by scripts/fuzz.py."""

import pytest

from tests import fuzz_targets
from tests.fuzz_targets import CONVERSATIONS, KINDS, MODALITIES, fuzz, lines, put, volume, voxels, written
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


@pytest.mark.parametrize("target", ["conversations", "volumes"])
def test_only_documented_errors(target: str) -> None:
    count = fuzz(fuzz_targets.TARGETS[target])
    print(f"{target}: {count} inputs")
    assert count > 0
