"""Stacked layers, and the loop over them: scanned, or unrolled.

A scan compiles one layer, so that compile time does not grow with depth. But it takes every layer's weights out of
their stack, and puts what the backward pass needs into another one: on a GPU these are copies. Unrolled, the program
holds every layer, and weights that are kept per layer (`unstack`) are read where they are.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from umbrella_jax.config.schema import LayerLoop

M = TypeVar("M", bound=nnx.Module)
X = TypeVar("X")


@jax.tree_util.register_pytree_with_keys_class
class PerLayer:
    """A parameter of stacked layers as one array per layer, instead of one array with a leading axis."""

    def __init__(self, arrays: Iterable[Any]):
        self.arrays = tuple(arrays)

    @property
    def dtype(self) -> Any:
        """The arrays' type."""
        return self.arrays[0].dtype

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """Return (number of the layer, array) of every layer."""
        return [(jax.tree_util.SequenceKey(i), array) for i, array in enumerate(self.arrays)], None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: Iterable[Any]) -> "PerLayer":
        """Rebuild it from arrays, or from whatever jax puts in their place."""
        return cls(arrays)


def stack_layers(make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """Return one module whose parameters have a leading axis of `num_layers`, each layer initialised independently."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Replace the parameters of stacked layers by `PerLayer`; empties `params`.

    A stack and its layers are in memory together, but only one stack at a time.
    """
    unstacked = {}
    for path in list(params):
        leaf = params.pop(path)
        if ".layers." in path:
            leaf = jax.jit(_split, out_shardings=_shardings_of_layers(leaf))(leaf)
        unstacked[path] = leaf
    return unstacked


def unstacked_shapes(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shapes and shardings of what `unstack` makes of parameters, from those of the parameters."""

    def of_layers(stack: Any) -> PerLayer:
        parts = jax.eval_shape(_split, stack)
        put = lambda part, s: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=s)  # noqa: E731
        return cast(PerLayer, jax.tree.map(put, parts, _shardings_of_layers(stack)))

    return {path: of_layers(leaf) if ".layers." in path else leaf for path, leaf in params.items()}


def _split(leaf: Any) -> PerLayer:
    """Split a stacked array, or a tree of stacked arrays, into its layers.

    Its gradient is a concatenation. That of an index per layer would be a sum of whole stacks.
    """
    if isinstance(leaf, PerLayer):
        return leaf
    stacks, structure = jax.tree.flatten(leaf)
    layers = zip(*([part[0] for part in jax.lax.split(stack, [1] * len(stack))] for stack in stacks), strict=True)
    return PerLayer(jax.tree.unflatten(structure, own) for own in layers)


def _shardings_of_layers(leaf: Any) -> PerLayer:
    """Shard each layer as the stack is."""

    def sharding_of(stack: jax.Array) -> NamedSharding | None:
        sharding = stack.sharding
        if not isinstance(sharding, NamedSharding):
            return None
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    return PerLayer([jax.tree.map(sharding_of, leaf)] * jax.tree.leaves(leaf)[0].shape[0])


def loop_over_layers(body: Callable[[X, Any], tuple[X, Any]], x: X, params: Any, loop: LayerLoop) -> tuple[X, Any]:
    """Run x through the layers in order.

    Args:
        body: takes x and what one layer has of `params`; returns the next x, of the same shapes, and a tree of arrays.
        params: a tree of stacked arrays and, if unrolled, `PerLayer`.
        loop: `scanned` or `unrolled`.

    Returns:
        The last x, and the trees of all layers, stacked on axis 0.
    """
    if loop == "scanned":
        return jax.lax.scan(body, x, params)
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, PerLayer))
    layers = zip(*(_split(leaf).arrays for leaf in leaves), strict=True)
    shared = jax.jit(body)  # traced once; XLA inlines it
    results = []
    for own in layers:
        x, result = shared(x, jax.tree.unflatten(structure, own))
        results.append(result)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *results)
