"""The patch embedding for volumes. It replaces SigLIP's whole `embeddings` module, and it is what a run trains.

Parameters have the original system's names: `{modality}_proj` and `{modality}_positional_embeddings`.
"""

import math
from collections.abc import Mapping

import chex
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from umbrella_jax.batch import AnyArray
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.models.layers import Linear, widest_dtype
from umbrella_jax.models.parallel import split_rows

_init = nnx.initializers.truncated_normal(0.02)


def patchify(x: Shaped[AnyArray, "M *size"], patch: tuple[int, ...]) -> Shaped[AnyArray, "M N P"]:
    """Cut volumes of size (D, H, W) or (D, H, W, T) into patches of P voxels, without arithmetic.

    Patches are in C order over (d, h, w[, t]), and so are the voxels within a patch. A remainder at the high end of an
    axis is cropped, as by a convolution with stride = kernel = patch.
    """
    chex.assert_rank(x, 1 + len(patch))
    grid = [s // p for s, p in zip(x.shape[1:], patch, strict=True)]
    x = x[:, *(slice(g * p) for g, p in zip(grid, patch, strict=True))]
    x = x.reshape(x.shape[0], *(n for gp in zip(grid, patch, strict=True) for n in gp))
    x = x.transpose(0, *range(1, x.ndim, 2), *range(2, x.ndim, 2))
    return x.reshape(x.shape[0], math.prod(grid), math.prod(patch))


class PatchEmbed(nnx.Module):
    """One linear map of patches and one table of position embeddings per modality."""

    def __init__(self, modalities: Mapping[str, ModalityConfig], hidden_size: int, *, rngs: nnx.Rngs):
        self.modalities = modalities
        for name, modality in modalities.items():
            proj = Linear(modality.patch_dim, hidden_size, rngs=rngs)
            proj.weight[...] = _init(rngs.params(), proj.weight.shape, jnp.float32)
            setattr(self, f"{name}_proj", proj)
            table = _init(rngs.params(), (1, modality.num_patches, hidden_size), jnp.float32)
            setattr(self, f"{name}_positional_embeddings", nnx.Param(table))

    def __call__(self, name: str, volumes: Float[Array, "M *size"]) -> Float[Array, "M N E"]:
        """Embed volumes of modality `name`, in the volumes' dtype."""
        modality = self.modalities[name]
        chex.assert_shape(volumes, (None, *modality.size))
        table = getattr(self, f"{name}_positional_embeddings")[...]
        # A patch embedding that trains computes in float32: its gradient is summed over rows and devices in that type.
        x = patchify(volumes, modality.patch).astype(widest_dtype(volumes, table))
        x = getattr(self, f"{name}_proj")(x)
        return split_rows((x + table.astype(x.dtype)).astype(volumes.dtype))
