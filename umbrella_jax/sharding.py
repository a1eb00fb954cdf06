"""Where arrays live: batches split over the devices, parameters on each of them."""

from functools import partial
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umbrella_jax.errors import ConfigError

T = TypeVar("T")


def make_mesh() -> Mesh:
    """All devices on one axis, `data`, those of a process side by side: its rows of a batch are then contiguous."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: T, mesh: Mesh, *, axis: int) -> T:
    """Splits every array of a batch over `data` along `axis`: 1 behind the micro-batch axis of a training step, else 0.

    Each process hands in its part, of P processes the p-th P-th; the result is the whole.

    Raises ConfigError for an axis that the devices do not divide.
    """
    size, processes = mesh.shape["data"], len({device.process_index for device in mesh.devices.flat})
    for leaf in jax.tree.leaves(batch):
        if (rows := leaf.shape[axis] * processes) % size:
            raise ConfigError(f"train.batch_size: {rows} rows cannot be split over {size} devices")
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    # not jax.device_put, which lets the processes compare their arrays first
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)
