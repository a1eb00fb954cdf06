"""The patch embedding for volumes: what takes the place of SigLIP's whole `embeddings` module, and what is trained.

Names are the original system's: `{modality}_proj` and `{modality}_positional_embeddings`.
"""

import math
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.models.layers import Linear
from umbrella_jax.models.parallel import split_rows

Array = jax.Array
_init = nnx.initializers.truncated_normal(0.02)


def patchify(x: Array, patch: tuple[int, ...]) -> Array:
    """Volumes [M, D, H, W] or [M, D, H, W, T] → patches [M, N, P], a reshape and no arithmetic.

    Patches come in C order over (d, h, w[, t]), and so do the voxels within one. A remainder at the high end of an
    axis is cropped, as a convolution with stride = kernel = patch does.
    """
    chex.assert_rank(x, 1 + len(patch))
    grid = [s // p for s, p in zip(x.shape[1:], patch, strict=True)]
    x = x[:, *(slice(g * p) for g, p in zip(grid, patch, strict=True))]
    x = x.reshape(x.shape[0], *(n for gp in zip(grid, patch, strict=True) for n in gp))
    x = x.transpose(0, *range(1, x.ndim, 2), *range(2, x.ndim, 2))
    return x.reshape(x.shape[0], math.prod(grid), math.prod(patch))


class PatchEmbed(nnx.Module):
    """A linear map of patches and a table of positions for each modality."""

    def __init__(self, modalities: Mapping[str, ModalityConfig], hidden_size: int, *, rngs: nnx.Rngs):
        self.modalities = modalities
        for name, modality in modalities.items():
            proj = Linear(modality.patch_dim, hidden_size, rngs=rngs)
            proj.weight[...] = _init(rngs.params(), proj.weight.shape, jnp.float32)
            setattr(self, f"{name}_proj", proj)
            table = _init(rngs.params(), (1, modality.num_patches, hidden_size), jnp.float32)
            setattr(self, f"{name}_positional_embeddings", nnx.Param(table))

    def __call__(self, name: str, volumes: Array) -> Array:
        """Volumes [M, *size] of modality `name` → [M, N, E] in the volumes' dtype."""
        modality = self.modalities[name]
        chex.assert_shape(volumes, (None, *modality.size))
        table = getattr(self, f"{name}_positional_embeddings")[...]
        # in float32 where it trains: its gradient is summed over rows and devices in the type of the products
        x = patchify(volumes, modality.patch).astype(jnp.result_type(volumes, table))
        x = getattr(self, f"{name}_proj")(x)
        return split_rows((x + table).astype(volumes.dtype))
