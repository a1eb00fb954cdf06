"""A linear probe of the frozen vision tower."""

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from umbrella_jax.baselines.baseline import ScanBaseline
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import prefetch
from umbrella_jax.inference.features import Tower

_BATCH = 8


class ProbeBaseline(ScanBaseline):
    """Regression on the mean over patches of the tower's last hidden state, in the first window of a run."""

    name: ClassVar[str] = "probe"
    title: ClassVar[str] = "probe"
    needs_weights: ClassVar[bool] = True

    def measure(self, images: Iterable[Image]) -> tuple[dict[Image, np.ndarray], list[str]]:
        """Return the features of each image's first window, float32 [E], and notes."""
        began, inputs, checkpoint = time.monotonic(), self.inputs, self.inputs.checkpoint
        tower = Tower.load(checkpoint, attention=inputs.config.model.attention)
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
