"""Attribute an answer to voxels: log p(answer | prompt, volumes) as a function of the volumes.

Everything here is on the grid of the preprocessed volumes; `umbrella_jax.inference.explain` maps it back to the scan.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from umbrella_jax.batch import Batch
from umbrella_jax.models import Params, merge
from umbrella_jax.training.loss import loss_sum

Volumes = dict[str, Float[Array, "M ..."]]
"""{modality: array}: the volumes of a batch, or each voxel's contribution in the same shapes."""
Method = Literal["gradient", "integrated", "occlusion"]


@partial(jax.jit, static_argnames=("graphdef",))
def log_probability(volumes: Volumes, params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> Float32[Array, ""]:
    """Return log p of all supervised tokens of the batch with `volumes` instead of its own."""
    shown = replace(batch, volumes=volumes)
    return -loss_sum(merge(graphdef, params), shown)[0]


value_and_slope = partial(jax.jit, static_argnames=("graphdef",))(jax.value_and_grad(log_probability))
"""Return log p as `log_probability` and its gradient in `volumes`."""


def gradient(volumes: Volumes, background: Volumes, params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> Volumes:
    """Compute gradient × input (Shrikumar et al. 2016); the input is a voxel's height above the background.

    It is the first-order change of the answer's log-probability due to each voxel. `background` has the shapes of
    `volumes`.
    """
    _, slope = value_and_slope(volumes, params, batch, graphdef=graphdef)
    return jax.tree.map(lambda x, x0, g: (x - x0) * g, volumes, background, slope)


def no_report(result: object) -> None:
    """Report no pass of an attribution."""


def integrated(
    volumes: Volumes,
    background: Volumes,
    params: Params,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    steps: int,
    report: Callable[[object], None] = no_report,
) -> Volumes:
    """Compute integrated gradients (Sundararajan et al. 2017) from the background, by the midpoint rule.

    Their sum is what the volumes add to the log-probability, up to the error of the rule with `steps` steps.

    Args:
        report: called after each of the `steps` with its result, which may not be computed yet.
    """
    total = jax.tree.map(jnp.zeros_like, volumes)
    for step in range(steps):
        share = (step + 0.5) / steps
        between = jax.tree.map(lambda x, x0, share=share: x0 + share * (x - x0), volumes, background)
        total = jax.tree.map(jnp.add, total, value_and_slope(between, params, batch, graphdef=graphdef)[1])
        report(total)
    return jax.tree.map(lambda x, x0, g: (x - x0) * g / steps, volumes, background, total)


def occlusion(
    volumes: Volumes,
    background: Volumes,
    params: Params,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    windows: Mapping[str, tuple[int, ...]],
    report: Callable[[object], None] = no_report,
) -> Volumes:
    """Compute how far the log-probability falls if a box of voxels becomes background (Zeiler & Fergus 2014).

    The fall is shared evenly among the box's voxels. Boxes of `windows` voxels, per modality, tile the volume; those at
    the end are cut.

    Args:
        report: called after each of the `occlusion_passes`.
    """
    whole = log_probability(volumes, params, batch, graphdef=graphdef)
    report(whole)
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
                report(fall)
    return {name: jnp.asarray(values) for name, values in maps.items()}


def occlusion_passes(volumes: Volumes, windows: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many passes through the model `occlusion` takes: one per box, and one of the whole volumes."""
    boxes = {
        n: [-(-size // step) for size, step in zip(x.shape[1:], windows[n], strict=True)] for n, x in volumes.items()
    }
    return 1 + sum(len(x) * math.prod(boxes[name]) for name, x in volumes.items())


@jax.jit
def _hide(
    x: Float[Array, "M *size"],
    background: Float[Array, "M *size"],
    volume: Int[Array, ""],
    corner: Int[Array, "rank"],
    size: Int[Array, "rank"],
) -> Float[Array, "M *size"]:
    """Replace a box of one volume of x by background; the box may reach beyond the end."""
    places = jnp.meshgrid(*(jnp.arange(n) for n in x.shape[1:]), indexing="ij")
    inside = jnp.stack([(i <= p) & (p < i + n) for p, i, n in zip(places, corner, size, strict=True)]).all(0)
    hidden = inside[None] & (jnp.arange(len(x)).reshape(-1, *[1] * inside.ndim) == volume)
    return jnp.where(hidden, background, x)
