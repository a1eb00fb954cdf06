"""Which voxels an answer rests on: log p(answer | prompt, volumes) as a function of the volumes.

Everything here is in the preprocessed volumes' own grid; `umbrella_jax.inference.explain` brings maps back to the scan.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umbrella_jax.batch import Batch
from umbrella_jax.models import Params, merge
from umbrella_jax.training.loss import loss_sum

Array = jax.Array
Volumes = dict[str, Array]
"""{modality: float32 [M, ...]}, as of a batch; and, of the same shapes, what each voxel contributes."""
Method = Literal["gradient", "integrated", "occlusion"]


@partial(jax.jit, static_argnames=("graphdef",))
def log_probability(volumes: Volumes, params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> Array:
    """log p of all supervised tokens of the batch, its volumes replaced by these; float32 []."""
    shown = replace(batch, volumes=volumes)
    return -loss_sum(merge(graphdef, params), shown)[0]


_slope = partial(jax.jit, static_argnames=("graphdef",))(jax.grad(log_probability))


def gradient(volumes: Volumes, background: Volumes, params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> Volumes:
    """Gradient × input: how the answer's log-probability would change, to first order, from each voxel's height above
    the background (Shrikumar et al. 2016); `background` has the volumes' shapes."""
    slope = _slope(volumes, params, batch, graphdef=graphdef)
    return jax.tree.map(lambda x, x0, g: (x - x0) * g, volumes, background, slope)


def integrated(
    volumes: Volumes, background: Volumes, params: Params, batch: Batch, *, graphdef: nnx.GraphDef, steps: int
) -> Volumes:
    """Integrated gradients (Sundararajan et al. 2017) from the background, by the midpoint rule in so many steps; their
    sum is what the volumes add to the log-probability, but for the error of the rule."""
    total = jax.tree.map(jnp.zeros_like, volumes)
    for step in range(steps):
        share = (step + 0.5) / steps
        between = jax.tree.map(lambda x, x0, share=share: x0 + share * (x - x0), volumes, background)
        total = jax.tree.map(jnp.add, total, _slope(between, params, batch, graphdef=graphdef))
    return jax.tree.map(lambda x, x0, g: (x - x0) * g / steps, volumes, background, total)


def occlusion(
    volumes: Volumes,
    background: Volumes,
    params: Params,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    windows: Mapping[str, tuple[int, ...]],
) -> Volumes:
    """By how much the log-probability falls where a box of voxels is background (Zeiler & Fergus 2014), shared evenly
    over the box's voxels. Boxes of `windows` voxels, by modality, stand side by side; those at the end are cut."""
    whole = log_probability(volumes, params, batch, graphdef=graphdef)
    maps = {name: np.zeros(x.shape, np.float32) for name, x in volumes.items()}
    for name, x in volumes.items():
        size = jnp.array(windows[name])
        grids = (range(0, length, step) for length, step in zip(x.shape[1:], windows[name], strict=True))
        corners = list(itertools.product(*grids))
        for m in range(len(x)):
            for corner in corners:
                without = _hide(x, background[name], jnp.int32(m), jnp.array(corner), size)
                fall = whole - log_probability(volumes | {name: without}, params, batch, graphdef=graphdef)
                box = maps[name][m][tuple(slice(i, i + n) for i, n in zip(corner, windows[name], strict=True))]
                box[...] = fall / box.size
    return {name: jnp.asarray(values) for name, values in maps.items()}


@jax.jit
def _hide(x: Array, background: Array, volume: Array, corner: Array, size: Array) -> Array:
    """x [M, ...] whose box of one volume is background; the box may reach over the end."""
    places = jnp.meshgrid(*(jnp.arange(n) for n in x.shape[1:]), indexing="ij")
    inside = jnp.stack([(i <= p) & (p < i + n) for p, i, n in zip(places, corner, size, strict=True)]).all(0)
    hidden = inside & (jnp.arange(len(x)).reshape(-1, *[1] * inside.ndim) == volume)
    return jnp.where(hidden, background, x)
