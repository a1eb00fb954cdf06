"""Small volumes, conversations and modalities for the tests of `umbrella_jax.data`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.config.schema import ModalityConfig


@pytest.fixture(scope="session")
def modalities() -> dict[str, ModalityConfig]:
    """T1: 2·3·1 = 6 patches; rsfMRI: 2·1·1·2 = 4 patches in windows of 4 frames."""
    return {
        "T1": ModalityConfig(size=(6, 7, 5), patch=(3, 2, 4)),
        "rsfMRI": ModalityConfig(size=(4, 3, 5, 4), patch=(2, 3, 4, 2)),
    }


@pytest.fixture
def nifti(tmp_path: Path) -> Callable[..., Path]:
    """`nifti(name, array or shape, affine)` writes a file; a shape means positive random voxels, seeded by the name."""

    def write(name: str, data: Any, affine: np.ndarray | None = None) -> Path:
        if isinstance(data, tuple):
            data = np.random.default_rng(sum(name.encode())).uniform(1, 9, data).astype(np.float32)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """`record([("user", ["T1:a.nii", "text"]), ...])`: a conversation of the current schema; `M:path` is an image."""

    def make(turns: list[tuple[str, list[str]]], **fields: Any) -> dict[str, Any]:
        def part(text: str) -> dict[str, str]:
            modality, _, path = text.partition(":")
            if modality in ("T1", "sMRI", "dMRI", "rsfMRI", "fMRI"):
                return {"type": "image", "modality": modality, "image_path": path}
            return {"type": "text", "text": text}

        messages = [{"role": role, "content": [part(text) for text in content]} for role, content in turns]
        return {"task_id": "S01", "conversations": messages, **fields}

    return make


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., Path]:
    """`write_json(name, value)`; a list under a .jsonl name becomes a line each."""

    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps(v) for v in value) if name.endswith(".jsonl") else json.dumps(value)
        path.write_text(lines)
        return path

    return write
