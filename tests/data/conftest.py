"""Small volumes, conversations and modalities for the tests of `umbrella_jax.data`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.tokenize import load_tokenizer


@pytest.fixture(scope="session")
def modalities() -> dict[str, ModalityConfig]:
    """T1: 2·3·1 = 6 patches; rsfMRI: 2·1·1·2 = 4 patches in windows of 4 frames."""
    return {
        "T1": ModalityConfig(size=(6, 7, 5), patch=(3, 2, 4)),
        "rsfMRI": ModalityConfig(size=(4, 3, 5, 4), patch=(2, 3, 4, 2)),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Any:
    return load_tokenizer(tokenizer_directory, None)[0]


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


@pytest.fixture
def bids(tmp_path, nifti):
    """`bids({"01": {"sex": "F"}}, {"01": ["anat/sub-01_T1w.nii.gz"]})` makes a data set; default: a T1w per subject."""

    def make(participants, scans=None, sidecar=None, root="ds", encoding="utf-8"):
        folder = tmp_path / root
        folder.mkdir()
        columns = list(dict.fromkeys(column for row in participants.values() for column in row))
        rows = [[f"sub-{name}", *(row.get(c, "n/a") for c in columns)] for name, row in participants.items()]
        lines = ["\t".join(row) for row in [["participant_id", *columns], *rows]]
        (folder / "participants.tsv").write_text("\n".join(lines) + "\n", encoding=encoding)
        if sidecar is not None:
            (folder / "participants.json").write_text(json.dumps(sidecar))
        for name, files in (scans or {name: [f"anat/sub-{name}_T1w.nii.gz"] for name in participants}).items():
            for file in files:
                nifti(f"{root}/sub-{name}/{file}", (4, 3, 5, 10) if "_bold" in file else (6, 7, 5))
        return folder

    return make


@pytest.fixture
def visits(bids):
    """`visits()` makes 6 subjects with two sessions, 20 years apart in age."""

    def make(sessions=("ses-1", "ses-2"), **people):
        people = people or {f"{i:02}": {"age": str(20 + i)} for i in range(6)}
        root = bids(people, {n: [f"ses-{k}/anat/sub-{n}_ses-{k}_T1w.nii" for k in (1, 2)] for n in people})
        for i, name in enumerate(people):
            rows = "".join(f"{ses}\t{20 + i + 20 * k}\n" for k, ses in enumerate(sessions))
            (root / f"sub-{name}/sub-{name}_sessions.tsv").write_text(f"session_id\tage\n{rows}")
        return root

    return make
