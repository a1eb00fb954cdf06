"""A linear probe of the frozen vision tower."""

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from umbrella_jax.baselines.baseline import ScanBaseline
from umbrella_jax.data.conversation import Image
from umbrella_jax.inference.features import Tower


class ProbeBaseline(ScanBaseline):
    """Regression on the mean over patches of the tower's features, in the first window of a run."""

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
            batches = tower.batches(modality, scans, inputs.evaluation.volume, threads=inputs.config.data.threads)
            for part, rows in batches:
                features |= dict(zip(part, rows, strict=True))
        patch_embed = "as the run trained it" if checkpoint.runs else "as a run would start it, not trained"
        note = (
            f"probe: on the mean over patches of the tower's features of {checkpoint.path}, patch embedding "
            f"{patch_embed}; {len(features)} scans in {time.monotonic() - began:.0f} s."
        )
        return features, [note]
