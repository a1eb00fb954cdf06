"""A base is hashed once per content, and its fingerprint is then known to later starts and other processes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.golden_case import GOLDEN, golden_model
from umbrella_jax.checkpoints import checkpoint
from umbrella_jax.checkpoints.checkpoint import HfCheckpoint
from umbrella_jax.data import checked


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checked, "SETTLED", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return shutil.copytree(GOLDEN / "umbrella_T1_rsfMRI", tmp_path / "base")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the directories that are hashed, each time."""
    paths: list[Path] = []
    original = checkpoint.fingerprint

    def fingerprint(path: Path, *overlay: Any) -> str:
        paths.append(path)
        return original(path, *overlay)

    monkeypatch.setattr(checkpoint, "fingerprint", fingerprint)
    return paths


def opened(path: Path) -> HfCheckpoint:
    return HfCheckpoint(name="base", path=path, config=golden_model()[0])


def test_a_base_is_hashed_again_only_after_a_change(base: Path, hashed: list[Path]) -> None:
    first = opened(base).fingerprint
    assert opened(base).fingerprint == first
    assert len(hashed) == 1
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert opened(base).fingerprint != first
    assert len(hashed) == 2


def test_one_process_hashes_for_all_that_see_the_same_files(
    base: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(checkpoint, "broadcast", lambda value: sent.append(value) or sent[0])
    opened(base).share_fingerprint()
    monkeypatch.setattr(checkpoint, "process_index", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other_home"))
    second, copy = opened(base), opened(shutil.copytree(base, tmp_path / "copy"))
    for each in (second, copy):
        each.share_fingerprint()
        assert each.fingerprint == sent[0][1]
    assert hashed == [base, tmp_path / "copy"]
