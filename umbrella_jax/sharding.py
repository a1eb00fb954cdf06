"""The mesh that the devices of a run form, and how each parameter and batch is sharded over it.

`data` splits the rows of a batch. `fsdp` splits them too, and also the weights, which are gathered layer by layer.
`tensor` splits heads, the MLP's width and the vocabulary. XLA derives the sharding of everything else from these
(umbrella_jax/models/parallel.py).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from umbrella_jax.batch import Parts
from umbrella_jax.config.schema import MeshConfig
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import LlavaConfig
from umbrella_jax.models.parallel import ROWS
from umbrella_jax.models.paths import adapted_weight

T = TypeVar("T")

RULES: dict[str, P] = {
    # The patch embedding's output is the residual stream, which `tensor` does not split.
    "*.embeddings.*_proj.weight": P("fsdp"),
    "*.embeddings.*_proj.bias": P("fsdp"),
    "*.embeddings.*_positional_embeddings": P(None, None, "fsdp"),
    # Axis 0 holds the layers and is never split. Heads and MLP follow Shoeybi et al. 2019: `tensor` splits the outputs
    # of the first product and the inputs of the second.
    "*.layers.self_attn.[qkv]_proj.weight": P(None, "tensor", "fsdp"),
    "*.layers.self_attn.[qkv]_proj.bias": P(None, "tensor"),
    "*.layers.self_attn.o*_proj.weight": P(None, "fsdp", "tensor"),
    "*.layers.mlp.fc1.weight": P(None, "tensor", "fsdp"),
    "*.layers.mlp.fc1.bias": P(None, "tensor"),
    "*.layers.mlp.fc2.weight": P(None, "fsdp", "tensor"),
    "*.layers.mlp.gate_proj.weight": P(None, "tensor", "fsdp"),
    "*.layers.mlp.up_proj.weight": P(None, "tensor", "fsdp"),
    "*.layers.mlp.down_proj.weight": P(None, "fsdp", "tensor"),
    "*.linear_1.weight": P("tensor", "fsdp"),
    "*.linear_1.bias": P("tensor"),
    "*.linear_2.weight": P("fsdp", "tensor"),
    "*.embed_tokens.weight": P("tensor", "fsdp"),
    "*.lm_head.weight": P("tensor", "fsdp"),
    # Vectors of the residual stream's width: gathering one would take longer than splitting it saves.
    "*.layers.self_attn.out_proj.bias": P(),
    "*.layers.mlp.fc2.bias": P(),
    "*.linear_2.bias": P(),
    "*norm*.weight": P(),
    "*norm*.bias": P(),
    "image_newline": P(),
}
"""{path pattern: how the parameter is split}, for moments and gradients too. One rule covers each parameter."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Number of devices along each axis; `data` is the outermost, `tensor` the innermost."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def parts(self) -> int:
        """Number of parts into which a batch is split."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"{self.data}×{self.fsdp}×{self.tensor}"

    def undivided(self, model: LlavaConfig) -> list[str]:
        """Return a message per axis that does not divide the model's dimensions, with the nearest size that does."""
        faults = []
        for axis, dimensions in _split_dimensions(model).items():
            size = getattr(self, axis)
            if wrong := [f"{name} {number}" for name, number in dimensions.items() if number % size]:
                fits = min(_divisors(math.gcd(*dimensions.values())), key=lambda n: abs(n - size))
                faults.append(f"mesh.{axis}: {size} does not divide {', '.join(wrong)}; the nearest that does: {fits}")
        return faults


def _split_dimensions(model: LlavaConfig) -> dict[str, dict[str, int]]:
    """Return {axis: {name: size}} of the model's dimensions that a mesh axis must divide (see `RULES`)."""
    vision, text = model.vision, model.text
    return {
        "fsdp": {"vision width": vision.hidden_size, "text width": text.hidden_size},
        "tensor": {
            "vision heads": vision.num_attention_heads,
            "vision MLP": vision.intermediate_size,
            "text width": text.hidden_size,
            "text heads": text.num_attention_heads,
            # The number of kv heads does not limit `tensor`: if it is larger, they are repeated.
            "text keys' width": text.num_key_value_heads * text.head_dim,
            "text MLP": text.intermediate_size,
            "vocabulary": text.vocab_size,
        },
    }


def mesh_shapes(count: int, model: LlavaConfig, *, island_size: int) -> list[MeshShape]:
    """Return all shapes that use `count` devices and divide the model; `island_size` as in `mesh_shape`."""
    sizes = _divisors(count)
    shapes = [MeshShape(data=count // (f * t), fsdp=f, tensor=t) for f in sizes for t in sizes if count % (f * t) == 0]
    return [shape for shape in shapes if island_size % (shape.fsdp * shape.tensor) == 0 and not shape.undivided(model)]


def mesh_shape(config: MeshConfig, count: int, *, island_size: int, batch_size: int | None = None) -> MeshShape:
    """Return the shape of a run's mesh on `count` devices.

    Args:
        config: the sizes; `data` may be left open.
        count: number of devices; the mesh uses all.
        island_size: number of devices in a slice or node, which fast links connect. `fsdp` and `tensor` stay within it.
        batch_size: rows of a batch, which the mesh must split evenly.

    Raises:
        ConfigError: the sizes do not use all devices, exceed an island, or do not divide the rows; each message has the
            nearest size that fits.
    """
    faults = []
    inner = config.fsdp * config.tensor
    data = config.data or max(count // inner, 1)
    if data * inner != count:
        fits = min(_divisors(count), key=lambda n: abs(n - inner))
        faults.append(
            f"mesh: data={data}, fsdp={config.fsdp}, tensor={config.tensor} are {data * inner} devices; expected sizes "
            f"whose product is {count}, the nearest: data={count // fits} with fsdp × tensor = {fits}"
        )
    elif island_size % inner:
        fits = min(_divisors(island_size), key=lambda n: abs(n - inner))
        faults.append(
            f"mesh: fsdp={config.fsdp}, tensor={config.tensor} are {inner} devices, which have to be together; "
            f"expected a divisor of the {island_size} of a slice or node, the nearest: {fits}"
        )
    shape = MeshShape(data=data, fsdp=config.fsdp, tensor=config.tensor)
    if batch_size is not None and batch_size % shape.parts:
        fits = max(round(batch_size / shape.parts), 1) * shape.parts
        faults.append(
            f"train.batch_size: {batch_size} rows cannot be split over data × fsdp = {shape.parts} devices; "
            f"the nearest that can: {fits}"
        )
    if faults:
        raise ConfigError(faults)
    return shape


def make_mesh(config: MeshConfig, *, batch_size: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange `devices` (all by default) as a mesh; only `data` crosses slices of TPUs or nodes of GPUs.

    Raises ConfigError as `mesh_shape` does.
    """
    devices = jax.devices() if devices is None else devices
    slices = _slices(devices)
    shape = mesh_shape(config, len(devices), island_size=len(devices) // slices, batch_size=batch_size)
    return Mesh(device_grid(shape, devices), tuple(dataclasses.asdict(shape)))


def device_grid(shape: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices as [data, fsdp, tensor], with neighbours in the grid as close as the links allow."""
    slices = _slices(devices)
    sizes = (shape.data // slices, shape.fsdp, shape.tensor)
    split = {"allow_split_physical_axes": True}  # otherwise a 4×4 torus has no axis of 8
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    return mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1), devices, **split)


def _slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@cache
def spec_of(path: str) -> P:
    """Return how the parameter at `path` is split. Raises KeyError if no rule covers it.

    An adapter's inputs and outputs are split as those of the weight it adapts; its rank is never split.
    """
    if weight := adapted_weight(path):
        *layers, outputs, inputs = spec_of(weight)
        return P(*layers, None, inputs) if "lora_A" in path else P(*layers, outputs, None)
    for pattern, spec in RULES.items():
        if fnmatchcase(path, pattern):
            return spec
    raise KeyError(f"{path}: umbrella_jax.sharding.RULES has no rule for this parameter")


def param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...] = ()) -> NamedSharding:
    """Return a parameter's sharding by its path; `shape` is ignored, since readers of weights pass it too."""
    return NamedSharding(mesh, spec_of(path))


def shardings(tree: T, mesh: Mesh) -> T:
    """Return the sharding of every leaf of a tree such as `TrainState`: parameters, moments and numbers.

    Arrays are sharded by the parameter path that is their key; numbers are on every device.
    """
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: NamedSharding(mesh, _spec(keys, leaf)), tree)


def constrain(tree: T) -> T:
    """Constrain a tree inside jit to its `shardings` on the current mesh; without a mesh, return it unchanged."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jax.lax.with_sharding_constraint(leaf, _spec(keys, leaf)), tree
    )


def _spec(keys: tuple[Any, ...], leaf: Any) -> P:
    return spec_of(keys[-1].key) if leaf.ndim else P()


def parts(mesh: Mesh) -> Parts:
    """Return the parts of a batch that this process makes: those that its devices hold."""
    ways = math.prod(mesh.shape[axis] for axis in ROWS)
    own = [
        part
        for part, group in enumerate(mesh.devices.reshape(ways, -1))
        if any(device.process_index == jax.process_index() for device in group)
    ]
    return Parts(total=ways, own=tuple(own))


def abstract_batch(batch: T, mesh: Mesh, *, axis: int) -> T:
    """Return the shapes and shardings that `put_batch` gives a whole batch."""
    sharding = NamedSharding(mesh, P(*[None] * axis, ROWS))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch)


def put_batch(batch: T, mesh: Mesh, *, axis: int) -> T:
    """Put a batch on the mesh, every array split over `data` and `fsdp` along `axis`.

    Args:
        batch: the `parts` of this process; the result is the whole batch.
        axis: 1 for a training step's batch, which has an axis of micro-batches, else 0.

    Raises:
        ConfigError: the devices do not divide the axis.
    """
    local_parts = parts(mesh)
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[axis] % len(local_parts.own):
            rows = leaf.shape[axis] * local_parts.total // len(local_parts.own)
            raise ConfigError(
                f"train.batch_size: {rows} rows cannot be split over {local_parts.total} devices; "
                f"expected a multiple of {local_parts.total}"
            )
    sharding = NamedSharding(mesh, P(*[None] * axis, ROWS))
    # jax.device_put would first compare the arrays of all processes
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)
