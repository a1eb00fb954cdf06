"""Initial weights of a volume patch embedding, made from SigLIP's 2D patch kernel or from one trained at other sizes.

The result is {`proj.weight`: [E, P], `proj.bias`: [E], `positional_embeddings`: [1, N, E]}; the keys are the names of a
modality's parameters after `{modality}_`. Input has any float type and is computed on in float64; output is float32.
"""

import math
from collections.abc import Callable

import numpy as np

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.errors import CheckpointError


def inflate_patch_embed(
    kernel: np.ndarray, bias: np.ndarray, table: np.ndarray, modality: ModalityConfig
) -> dict[str, np.ndarray]:
    """Inflate SigLIP's 2D patch embedding to initial weights for volumes of `modality`.

    Rows of the kernel and of the table's grid run along H, columns along W. Channels are summed, since a grey image has
    the same values in R, G and B. All axes are resized as in `resample_patch_embed`; depth and time have size 1 in an
    image. Along depth and time this divides w by pd·pt, so a volume that is constant along both gives the same output
    as its slice (filter inflation of I3D, Carreira & Zisserman 2017). Positions are repeated along both (ViViT, Arnab
    et al. 2021).

    Args:
        kernel: [E, C, p, p].
        bias: [E].
        table: position embeddings [G·G, E].

    Raises:
        CheckpointError: if the positions do not form a square grid.
    """
    side = math.isqrt(len(table))
    if side * side != len(table):
        raise CheckpointError(f"positions of {len(table)} patches: expected a square grid of them, as 27 x 27 = 729")
    grey = kernel.astype(np.float64).sum(1)
    time = (1,) * (len(modality.size) - 3)
    embed_dim, rows, columns = grey.shape
    return _start(
        grey.reshape(embed_dim, 1, rows, columns, *time), bias, table.reshape(1, side, side, *time, -1), modality
    )


def resample_patch_embed(
    weight: np.ndarray, bias: np.ndarray, table: np.ndarray, old: ModalityConfig, new: ModalityConfig
) -> dict[str, np.ndarray]:
    """Resample the patch embedding of `old` to initial weights for the size and patch of `new`.

    Kernels become w' = (Bᵀ)⁺·w, where B resizes a patch linearly: the w' that minimises E[(⟨x, w⟩ − ⟨B·x, w'⟩)²] over
    white noise x. The minimum is 0 if no axis of the patch shrinks (FlexiViT, Beyer et al. 2023). Positions are
    interpolated linearly along every axis of the grid. An axis that keeps its length is copied bit for bit.

    Args:
        weight: [E, P].
        bias: [E].
        table: position embeddings [1, N, E].

    Raises:
        CheckpointError: if one modality is 3D and the other 4D.
    """
    if len(old.size) != len(new.size):
        ranks = f"expected {len(new.size)}D as size {new.size} is, found {len(old.size)}D of size {old.size}"
        raise CheckpointError(f"patch embedding: {ranks}; start from a modality of the same rank")
    return _start(weight.reshape(-1, *old.patch), bias, table.reshape(*old.grid, -1), new)


def _start(kernel: np.ndarray, bias: np.ndarray, table: np.ndarray, modality: ModalityConfig) -> dict[str, np.ndarray]:
    """Resize `kernel` [E, *patch] and `table` [*grid, E] from any patch and grid to those of `modality`."""
    embed_dim = len(bias)
    weight = _resize(kernel, (embed_dim, *modality.patch), lambda old, new: np.linalg.pinv(_linear(old, new).T))
    table = _resize(table, (*modality.grid, embed_dim), _linear)
    return {
        "proj.weight": weight.reshape(embed_dim, modality.patch_dim).astype(np.float32, order="C"),
        "proj.bias": bias.astype(np.float32),
        "positional_embeddings": table.reshape(1, modality.num_patches, embed_dim).astype(np.float32, order="C"),
    }


def _resize(x: np.ndarray, shape: tuple[int, ...], matrix: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Resize x to `shape` in float64, applying `matrix(old, new)` [new, old] along each axis that changes."""
    x = x.astype(np.float64)
    for axis, (old, new) in enumerate(zip(x.shape, shape, strict=True)):
        if old != new:
            x = np.moveaxis(np.tensordot(matrix(old, new), x, (1, axis)), 0, axis)
    return x


def _linear(old: int, new: int) -> np.ndarray:
    """Return the matrix [new, old] of linear interpolation: half-pixel centres, clamped at the edges, not antialiased
    (as in FlexiViT)."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
