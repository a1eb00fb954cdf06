"""The golden case (tests/golden/README.md): a Batch, a model, and the values that PyTorch computed."""

from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.config_json import read_config
from convert.from_hf import load_params
from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.models import LlavaConfig, Params

GOLDEN = Path(__file__).parents[1] / "golden"
MODALITIES = {
    "T1": ModalityConfig(size=(20, 24, 16), patch=(6, 5, 4)),
    "rsfMRI": ModalityConfig(size=(12, 8, 8, 6), patch=(4, 4, 2, 3)),
}
PATCHES = 48
# Volumes that each row's runs of placeholders show.
IMAGES = [[("T1", 0), ("T1", 1)], [("rsfMRI", 0)], [], [("T1", 2), ("rsfMRI", 1)]]


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def golden_model(**options: str) -> tuple[LlavaConfig, Params]:
    """Return config and parameters, which no device is bound to: a step would be compiled again for its own result."""
    directory = GOLDEN / "umbrella_T1_rsfMRI"
    config = read_config(directory, MODALITIES, **options)  # type: ignore[arg-type]
    params, _ = load_params(directory, config)
    return config, {path: jnp.asarray(np.asarray(leaf)) for path, leaf in params.items()}


def golden_batch(rows: list[int] | None = None) -> Batch:
    """Return the batch of forward.npz or some of its rows, with only the volumes that these rows show."""
    data = golden("forward")
    rows = list(range(4)) if rows is None else rows
    ids = data["input_ids"][rows].astype(np.int32)
    images = [IMAGES[row] for row in rows]
    used = {m: sorted({i for row in images for name, i in row if name == m}) for m in MODALITIES}
    volumes = {m: data[{"T1": "t1", "rsfMRI": "fmri"}[m]][used[m], 0] for m in MODALITIES if used[m]}
    first = dict(zip(sorted(volumes), np.cumsum([0, *(len(used[m]) * PATCHES for m in sorted(volumes))]), strict=False))
    feature_idx = np.full(ids.shape, -1, np.int32)
    for b, row in enumerate(images):
        starts = [first[m] + used[m].index(i) * PATCHES for m, i in row]
        feature_idx[b, ids[b] == 320] = [s + n for s in starts for n in range(PATCHES)]
    supervised = data["labels"][rows] != -100
    count = supervised.sum(1).max()
    target_pos, target_ids = (np.zeros((len(rows), count), np.int32) for _ in range(2))
    target_mask = np.zeros(target_pos.shape, bool)
    for b in range(len(rows)):
        where = np.flatnonzero(supervised[b])
        target_pos[b, : len(where)], target_ids[b, : len(where)] = where - 1, ids[b, where]
        target_mask[b, : len(where)] = True
    return Batch(
        input_ids=ids,
        positions=np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy(),
        feature_idx=feature_idx,
        lengths=data["attention_mask"][rows].sum(1).astype(np.int32),
        target_pos=target_pos,
        target_ids=target_ids,
        target_mask=target_mask,
        volumes=volumes,
    )


def relative(value: object, expected: np.ndarray) -> float:
    """Return max |difference| / max |expected|."""
    return float(np.abs(np.asarray(value) - expected).max() / np.abs(expected).max())
