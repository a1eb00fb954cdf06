"""Where arrays live: batches split over the devices, parameters on each of them."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umbrella_jax.errors import ConfigError

T = TypeVar("T")


def make_mesh() -> Mesh:
    """All devices on one axis, `data`."""
    return Mesh(np.array(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: T, mesh: Mesh, *, axis: int) -> T:
    """Splits every array of a batch over `data` along `axis`: 1 behind the micro-batch axis of a training step, else 0.

    Raises ConfigError for an axis that the devices do not divide.
    """
    size = mesh.shape["data"]
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[axis] % size:
            raise ConfigError(f"train.batch_size: {leaf.shape[axis]} rows cannot be split over {size} devices")
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(*[None] * axis, "data")))
