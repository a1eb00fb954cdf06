"""Where arrays lie: which mesh the devices of a run form, and how each parameter and batch is split over it.

`data` splits the rows of a batch. `fsdp` splits them too, and the weights, which are gathered layer by layer. `tensor`
splits heads, the MLP's width and words. What is split so goes on as it is; all else follows from there
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
    # What comes out of the patch embedding is the residual stream, which `tensor` does not split.
    "*.embeddings.*_proj.weight": P("fsdp"),
    "*.embeddings.*_proj.bias": P("fsdp"),
    "*.embeddings.*_positional_embeddings": P(None, None, "fsdp"),
    # Layers lie on axis 0, which is never split. Into heads and MLP, and out of them (Shoeybi et al. 2019).
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
    # Vectors as wide as the residual stream: to gather one takes longer than it saves.
    "*.layers.self_attn.out_proj.bias": P(),
    "*.layers.mlp.fc2.bias": P(),
    "*.linear_2.bias": P(),
    "*norm*.weight": P(),
    "*norm*.bias": P(),
}
"""How a parameter, or whatever has its shape, is split, by path pattern; one rule covers each."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis; `data` outermost, `tensor` innermost."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def parts(self) -> int:
        """Parts of a batch."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"{self.data}×{self.fsdp}×{self.tensor}"

    def undivided(self, model: LlavaConfig) -> list[str]:
        """What of a model the axes do not divide, and the size nearest to each that does."""
        faults = []
        for axis, split in _split(model).items():
            size = getattr(self, axis)
            if wrong := [f"{what} {number}" for what, number in split.items() if number % size]:
                fits = min(_divisors(math.gcd(*split.values())), key=lambda n: abs(n - size))
                faults.append(f"mesh.{axis}: {size} does not divide {', '.join(wrong)}; the nearest that does: {fits}")
        return faults


def _split(model: LlavaConfig) -> dict[str, dict[str, int]]:
    """What an axis must divide; which of them for a parameter, `RULES` say."""
    vision, text = model.vision, model.text
    return {
        "fsdp": {"vision width": vision.hidden_size, "text width": text.hidden_size},
        "tensor": {
            "vision heads": vision.num_attention_heads,
            "vision MLP": vision.intermediate_size,
            "text width": text.hidden_size,
            "text heads": text.num_attention_heads,
            # kv heads themselves are repeated where `tensor` is more than they are
            "text keys' width": text.num_key_value_heads * text.head_dim,
            "text MLP": text.intermediate_size,
            "vocabulary": text.vocab_size,
        },
    }


def mesh_shapes(count: int, model: LlavaConfig, *, island_size: int) -> list[MeshShape]:
    """All that use `count` devices and divide the model. `island_size`: see `mesh_shape`."""
    sizes = _divisors(count)
    shapes = [MeshShape(data=count // (f * t), fsdp=f, tensor=t) for f in sizes for t in sizes if count % (f * t) == 0]
    return [shape for shape in shapes if island_size % (shape.fsdp * shape.tensor) == 0 and not shape.undivided(model)]


def mesh_shape(config: MeshConfig, count: int, *, island_size: int, batch_size: int | None = None) -> MeshShape:
    """The shape of a run's mesh on `count` devices.

    Args:
        island_size: devices that fast links connect, as of a slice or a node: `fsdp` and `tensor` stay within them.
        batch_size: rows that it has to split evenly.

    Raises:
        ConfigError: for sizes that are not all the devices, reach too far, or do not divide the rows, each with the
            nearest that would do.
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
    """All devices, or those, as a mesh; what crosses slices of TPUs or nodes of GPUs is `data`.

    Raises ConfigError as `mesh_shape` does.
    """
    devices = jax.devices() if devices is None else devices
    slices = _slices(devices)
    shape = mesh_shape(config, len(devices), island_size=len(devices) // slices, batch_size=batch_size)
    return Mesh(device_grid(shape, devices), tuple(dataclasses.asdict(shape)))


def device_grid(shape: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """Devices [data, fsdp, tensor], neighbours in the grid as near to each other as the links allow."""
    slices = _slices(devices)
    sizes = (shape.data // slices, shape.fsdp, shape.tensor)
    split = {"allow_split_physical_axes": True}  # else a 4×4 torus has no axis of 8
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    return mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1), devices, **split)


def _slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@cache
def spec_of(path: str) -> P:
    """How the parameter of that path is split: an adapter's inputs and outputs as those of the weight beside it, its
    rank never. Raises KeyError for one that no rule covers."""
    if weight := adapted_weight(path):
        *layers, outputs, inputs = spec_of(weight)
        return P(*layers, None, inputs) if "lora_A" in path else P(*layers, outputs, None)
    for pattern, spec in RULES.items():
        if fnmatchcase(path, pattern):
            return spec
    raise KeyError(f"{path}: umbrella_jax.sharding.RULES has no rule for this parameter")


def param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...] = ()) -> NamedSharding:
    """Of a parameter, by its path; as `where` of whoever reads weights."""
    return NamedSharding(mesh, spec_of(path))


def shardings(tree: T, mesh: Mesh) -> T:
    """The sharding of every leaf of a tree of parameters, moments and numbers, as `TrainState`.

    What has a parameter's shape is found under its path; numbers are on every device.
    """
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: NamedSharding(mesh, _spec(keys, leaf)), tree)


def constrain(tree: T) -> T:
    """Within a program: a tree as `shardings` says, on the mesh in force. Where there is none, the tree as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jax.lax.with_sharding_constraint(leaf, _spec(keys, leaf)), tree
    )


def _spec(keys: tuple[Any, ...], leaf: Any) -> P:
    return spec_of(keys[-1].key) if leaf.ndim else P()


def parts(mesh: Mesh) -> Parts:
    """Which parts of a batch this process brings: those that its devices hold."""
    ways = math.prod(mesh.shape[axis] for axis in ROWS)
    own = [
        part
        for part, group in enumerate(mesh.devices.reshape(ways, -1))
        if any(device.process_index == jax.process_index() for device in group)
    ]
    return Parts(of=ways, own=tuple(own))


def abstract_batch(batch: T, mesh: Mesh, *, axis: int) -> T:
    """Shapes and shardings of what `put_batch` makes of a whole batch."""
    sharding = NamedSharding(mesh, P(*[None] * axis, ROWS))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch)


def put_batch(batch: T, mesh: Mesh, *, axis: int) -> T:
    """Splits every array of a batch over `data` and `fsdp` along `axis`: 1 behind the micro-batch axis of a training
    step, else 0.

    Each process hands in its `parts`; the result is the whole.

    Raises ConfigError for an axis that the devices do not divide.
    """
    own = parts(mesh)
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[axis] % len(own.own):
            rows = leaf.shape[axis] * own.of // len(own.own)
            raise ConfigError(f"train.batch_size: {rows} rows cannot be split over {own.of} devices")
    sharding = NamedSharding(mesh, P(*[None] * axis, ROWS))
    # not jax.device_put, which lets the processes compare their arrays first
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)
