"""A linear probe of the frozen vision tower.

Axes: M volumes, E width of the tower.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from convert.lazy_tensor import place
from umbrella_jax.baselines.baseline import ScanBaseline
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import prefetch
from umbrella_jax.models import LlavaConfig, Params, native_backend
from umbrella_jax.models.paths import VISION_TOWER
from umbrella_jax.models.siglip import SiglipVisionModel

_BATCH = 8


class Tower:
    """The frozen vision tower, which maps volumes to features."""

    def __init__(self, config: LlavaConfig, params: Params):
        """Initialise the tower from the model's parameters whose paths begin with VISION_TOWER."""
        self._graphdef, _ = nnx.split(
            nnx.eval_shape(
                lambda: SiglipVisionModel(
                    config.vision, config.modalities, config.remat, config.attention, rngs=nnx.Rngs(0)
                )
            )
        )
        self._params = unflatten_dict({path.removeprefix(VISION_TOWER): leaf for path, leaf in params.items()}, sep=".")
        self._dtype = config.compute_dtype

    def __call__(self, name: str, volumes: np.ndarray) -> np.ndarray:
        """Return the features of volumes [M, *size] of modality `name`, float32 [M, E].

        They are the mean over patches of the last hidden state, which the projector receives, before `post_layernorm`.
        """
        return np.asarray(_features(self._params, volumes, graphdef=self._graphdef, dtype=self._dtype, name=name))


@partial(jax.jit, static_argnames=("graphdef", "dtype", "name"))
def _features(
    params: Mapping[str, Any], volumes: jax.Array, *, graphdef: nnx.GraphDef, dtype: str, name: str
) -> jax.Array:
    tower = nnx.merge(graphdef, params)
    return tower(name, volumes.astype(dtype)).astype(jnp.float32).mean(1)


class ProbeBaseline(ScanBaseline):
    """Regression on the mean over patches of the tower's last hidden state, in the first window of a run."""

    name: ClassVar[str] = "probe"
    title: ClassVar[str] = "probe"
    needs_weights: ClassVar[bool] = True

    def measure(self, images: Iterable[Image]) -> tuple[dict[Image, np.ndarray], list[str]]:
        """Return the features of each image's first window, float32 [E], and notes."""
        began, inputs, checkpoint = time.monotonic(), self.inputs, self.inputs.checkpoint
        config = checkpoint.config.with_attention(inputs.config.model.attention, native_backend(jax.devices()[0]))
        tensors = {path: tensor for path, tensor in checkpoint.tensors().items() if path.startswith(VISION_TOWER)}
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        tower = Tower(config, place(tensors, lambda path, shape: first))
        features: dict[Image, np.ndarray] = {}
        by_modality: dict[str, list[Image]] = defaultdict(list)
        for image in images:
            by_modality[image.modality].append(image)
        for modality, scans in by_modality.items():

            def make(batch: int, scans: list[Image] = scans) -> np.ndarray:
                part = scans[batch * _BATCH : (batch + 1) * _BATCH]
                volumes = np.stack([inputs.evaluation.volume(image) for image in part])
                return np.resize(
                    volumes, (_BATCH, *volumes.shape[1:])
                )  # one shape for all batches; the first images fill up

            batches = prefetch(make, 0, -(-len(scans) // _BATCH), inputs.config.data.threads)
            rows = np.concatenate([tower(modality, volumes) for volumes in batches])
            features |= dict(zip(scans, rows, strict=False))
        patch_embed = "as the run trained it" if checkpoint.runs else "as a run would start it, not trained"
        note = (
            f"probe: on the mean over patches of the tower's last hidden state of {checkpoint.path}, patch embedding "
            f"{patch_embed}; {len(features)} scans in {time.monotonic() - began:.0f} s."
        )
        return features, [note]
