"""Sharding hints inside the model. Without a mesh, as on one device, they do nothing.

Under `jax.set_mesh` XLA partitions all products itself, from the sharding of parameters and batch
(umbrella_jax/sharding.py). This module adds what XLA might not infer: activations stay split by rows, and some
computations are local to a device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from umbrella_jax.batch import AnyArray

ROWS = ("data", "fsdp")
"""Mesh axes that split rows, which are conversations or volumes."""
HEADS = "tensor"
"""Mesh axis that splits attention heads, the MLP's width and the vocabulary."""


def ways(axes: str | Sequence[str]) -> int:
    """Return the number of parts into which the current mesh splits along `axes`; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes))


def split_rows(x: Float[Array, "rows *rest"]) -> Float[Array, "rows *rest"]:
    """Split x over the devices by rows; the other axes stay whole."""
    return x if _is_unsplit() else jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def split_heads(x: Float[Array, "B T H Dh"]) -> Float[Array, "B T H Dh"]:
    """Split x by rows and, if the number of heads divides, by heads."""
    heads = None if x.shape[2] % ways(HEADS) else HEADS
    return x if _is_unsplit() else jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, None, heads))


def look_up(table: Float[Array, "V D"], ids: Int[AnyArray, "B *rest"]) -> Float[Array, "B *rest D"]:
    """Return rows of a table by their ids; the table is split by words and by width.

    Devices exchange the ids and the rows they hold, usually far less than the table.
    """
    if _is_unsplit():
        return table[ids]

    def look_up_locally(table: Array, ids: Array) -> Array:
        ids = jax.lax.all_gather(ids, "fsdp", tiled=True) - jax.lax.axis_index(HEADS) * len(table)
        here = (ids >= 0) & (ids < len(table))
        values = jnp.where(here[..., None], table.at[ids].get(mode="clip"), 0)
        values = jax.lax.all_to_all(values, "fsdp", split_axis=0, concat_axis=ids.ndim, tiled=True)
        return jax.lax.psum(values, HEADS)

    rows = PartitionSpec(ROWS)
    in_specs = (PartitionSpec(HEADS, "fsdp"), rows)
    return local(look_up_locally, in_specs=in_specs, out_specs=rows, check_vma=True)(table, ids)


def local(function: Callable[..., Any], *, in_specs: Any, out_specs: Any, check_vma: bool) -> Callable[..., Any]:
    """Run `function` on each device's local shard; devices exchange only what `function` itself exchanges.

    Args:
        check_vma: as for `jax.shard_map`. Pass False for kernels, which do not declare over which axes their results
            vary. The specs must then name every axis: gradients are summed over axes that they leave out.
    """
    if _is_unsplit():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def _is_unsplit() -> bool:
    return ways([*ROWS, HEADS]) == 1
