"""All frames of a run, a few at a time."""

import math
from collections.abc import Iterator

import numpy as np

from umbrella_jax.data.voxels import Voxels

_CHUNK = 64 << 20
"""Bytes of frames, as float32, that are read at a time."""


def read_frames(scan: Voxels) -> Iterator[np.ndarray]:
    """Yield all frames of a run in order, float32 [D, H, W, t], a few at a time."""
    frames = scan.shape[3]
    step = max(_CHUNK // (4 * math.prod(scan.shape[:3])), 1)
    for start in range(0, frames, step):
        yield scan.read(slice(start, min(start + step, frames))).astype(np.float32, copy=False)
