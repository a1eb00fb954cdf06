"""What the tests of training share: a model made ready to train, and batches put together from golden rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from golden_case import MODALITIES, PATCHES, golden_batch, golden_model

from umbrella_jax.batch import Batch
from umbrella_jax.config import TrainConfig
from umbrella_jax.models import LlavaConfig, Params, abstract_params
from umbrella_jax.training.freeze import as_trainable, label_params, partition
from umbrella_jax.training.optimizer import make_optimizer
from umbrella_jax.training.step import TrainState, init_state

EMBEDDINGS = "vision_tower.vision_model.embeddings."
CONFIG = TrainConfig(learning_rate=1e-2, decay_bias=True)


@dataclass(frozen=True)
class Case:
    """All that a step takes but the batch."""

    graphdef: nnx.GraphDef
    params: Params
    frozen: Params
    optimizer: optax.GradientTransformationExtraArgs

    def state(self) -> TrainState:
        """A new state before the first update; steps give its buffers away."""
        trainable = {path: leaf for path, leaf in self.params.items() if path not in self.frozen}
        return init_state(as_trainable(trainable), self.optimizer)

    @property
    def static(self) -> dict[str, Any]:
        return {"graphdef": self.graphdef, "optimizer": self.optimizer}


def make_case(config: LlavaConfig, params: Params, train: TrainConfig, schedule: optax.Schedule) -> Case:
    graphdef, _ = abstract_params(config)
    labels = label_params(list(params), list(train.groups))
    _, frozen = partition(params, labels)
    return Case(graphdef, params, frozen, make_optimizer(train, schedule, labels))


@cache
def golden_case() -> Case:
    """The golden model, its patch embedding trained at a constant rate."""
    return make_case(*golden_model(), CONFIG, optax.constant_schedule(1e-2))


def stack(*batches: Batch) -> Batch:
    """Micro-batches of one shape → what a step takes."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows, or the same in another order, with all of the volumes."""
    taken = jax.tree.map(lambda leaf: leaf[list(rows)], batch.replace(volumes={}))
    return taken.replace(volumes=batch.volumes)


def arrange_volumes(batch: Batch, slots: Mapping[str, Sequence[int | None]]) -> Batch:
    """The same rows on other slots of volumes: each holds one of the batch's volumes, or zeros where None.

    `feature_idx` follows. Volumes that no row names may be left out.
    """
    first, moved = 0, {}
    for name in sorted(batch.volumes):
        for volume in range(len(batch.volumes[name])):
            moved[name, volume], first = first, first + PATCHES
    feature_idx = np.where(batch.feature_idx < 0, -1, np.iinfo(np.int32).max)  # an index that was not moved: no feature
    first, volumes = 0, {}
    for name in sorted(slots):
        volumes[name] = np.zeros((len(slots[name]), *MODALITIES[name].size), np.float32)
        for slot, volume in enumerate(slots[name]):
            if volume is not None:
                volumes[name][slot] = batch.volumes[name][volume]
                offset = batch.feature_idx - moved[name, volume]
                feature_idx = np.where((offset >= 0) & (offset < PATCHES), first + offset, feature_idx)
            first += PATCHES
    assert feature_idx.max() < first, "a row names a volume that has no slot"
    return batch.replace(feature_idx=feature_idx.astype(np.int32), volumes=volumes)


def micro_batches() -> list[Batch]:
    """The golden batch row by row, of one shape: with the row's own volumes and zeros in the other slots."""
    slots = [
        {"T1": [0, 1], "rsfMRI": [None]},
        {"T1": [None, None], "rsfMRI": [0]},
        {"T1": [None, None], "rsfMRI": [None]},
        {"T1": [None, 2], "rsfMRI": [1]},
    ]
    return [arrange_volumes(rows_of(golden_batch(), [row]), slots[row]) for row in range(4)]


def as_bytes(tree: Any) -> list[bytes]:
    """Every leaf's bits, for comparisons that nothing escapes, NaN and -0 included."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def total_bytes(tree: Any) -> int:
    return sum(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
