"""What the model says to the devices that share it out. Where no mesh is in force, as on one device, it says nothing.

Under `jax.set_mesh` XLA shares out all products by itself, by how parameters and batch lie (umbrella_jax/sharding.py).
Said here is what it would not find, or not surely: that activations stay split by rows, and what is never exchanged.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array
ROWS = ("data", "fsdp")
"""Axes of a mesh that rows are split over: conversations, and volumes."""
HEADS = "tensor"
"""The axis that heads, the MLP's width and words are split over."""


def ways(axes: str | Sequence[str]) -> int:
    """Into how many parts the mesh in force splits something along `axes`; 1 where there is none."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes))


def split_rows(x: Array) -> Array:
    """x [rows, ...], its rows over the devices, and all that belongs to a row on each device of it."""
    return x if _alone() else jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def split_heads(x: Array) -> Array:
    """x [B, T, H, Dh], its heads over the devices too; where there are fewer, or they do not divide, all on each."""
    heads = None if x.shape[2] % ways(HEADS) else HEADS
    return x if _alone() else jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, None, heads))


def look_up(table: Array, ids: Array) -> Array:
    """Rows [B, ..., D] of a table [V, D] for ids int [B, ...], of a table that lies with its words and its width split.

    The ids are exchanged, and what was found of each row: less than the table, as a rule.
    """
    if _alone():
        return table[ids]

    def own(table: Array, ids: Array) -> Array:
        ids = jax.lax.all_gather(ids, "fsdp", tiled=True) - jax.lax.axis_index(HEADS) * len(table)
        here = (ids >= 0) & (ids < len(table))
        found = jnp.where(here[..., None], table.at[ids].get(mode="clip"), 0)
        found = jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=ids.ndim, tiled=True)
        return jax.lax.psum(found, HEADS)

    rows = PartitionSpec(ROWS)
    return local(own, in_specs=(PartitionSpec(HEADS, "fsdp"), rows), out_specs=rows, check_vma=True)(table, ids)


def local(function: Callable[..., Any], *, in_specs: Any, out_specs: Any, check_vma: bool) -> Callable[..., Any]:
    """`function`, of what each device has of the arguments: nothing is exchanged but what it exchanges itself.

    `check_vma` as of `jax.shard_map`: False for kernels, whose results do not say over which axes they differ; the
    specs must then name all axes, else gradients are added up over the others.
    """
    if _alone():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def _alone() -> bool:
    return ways([*ROWS, HEADS]) == 1
