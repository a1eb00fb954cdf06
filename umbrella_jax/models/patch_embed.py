"""The patch embedding for volumes. It replaces SigLIP's whole `embeddings` module, and it is what a run trains.

Parameters have the original system's names: `{modality}_proj` and `{modality}_positional_embeddings`.
"""

import math
from collections.abc import Mapping
from functools import partial

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from umbrella_jax.batch import AnyArray
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.models.layers import Linear, add_bias, dense, widest_dtype
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


def cut_for_tpu(
    volumes: Shaped[Array, "M *size"], weight: Float[Array, "E P"], patch: tuple[int, ...]
) -> tuple[Shaped[Array, "M N P"], Float[Array, "E P"]]:
    """Cut volumes as `patchify` does, and order the voxels of patches and weight as (w, d, h[, t]).

    W stays the innermost axis until all others are in place, since a TPU pads the innermost axis to 128: a patch's 10
    voxels would take 12 times their bytes. The barrier keeps XLA from turning the cut and the product after it into a
    convolution, which it compiles ten times as long, to a program with the same padding.
    """
    pd, ph, pw, pt = (*patch, 1)[:4]
    x = volumes.reshape(*volumes.shape[:4], -1)  # T is 1 if there is none
    m, d, h, w, t = x.shape[0], *(s // p for s, p in zip(x.shape[1:], (pd, ph, pw, pt), strict=True))
    x = x[:, : d * pd, : h * ph, : w * pw, : t * pt].reshape(m, d, pd, h, ph, w * pw, t, pt)
    x = x.transpose(0, 1, 3, 6, 2, 4, 7, 5).reshape(m, d, h, t, pd * ph * pt, w * pw)
    x = x.swapaxes(4, 5).reshape(m, d, h, t, w, math.prod(patch))
    x = x.swapaxes(3, 4).reshape(m, d * h * w * t, math.prod(patch))
    width_first = jnp.moveaxis(weight.reshape(-1, *patch), 3, 1).reshape(weight.shape)
    return jax.lax.optimization_barrier(x), width_first


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
        dtype = widest_dtype(volumes, table)
        proj = getattr(self, f"{name}_proj")
        patches, weight = jax.lax.platform_dependent(
            *(volumes, dense(proj.weight[...], dtype)),
            tpu=partial(cut_for_tpu, patch=modality.patch),
            default=lambda volumes, weight: (patchify(volumes, modality.patch), weight),
        )
        x = add_bias(jnp.einsum("...i,oi->...o", patches.astype(dtype), weight), proj.bias[...])
        return split_rows((x + table.astype(x.dtype)).astype(volumes.dtype))
