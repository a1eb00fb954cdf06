"""A baseline of the plainest properties of a scan: how bright it is and how large the head or brain in it is.

All are read from the file, in its own voxels: nothing is resampled, cropped, scaled or cleaned.

Axes: D, H, W voxels, T frames.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import nibabel as nib
import numpy as np
from tqdm import tqdm

from umbrella_jax.baselines.baseline import ScanBaseline
from umbrella_jax.baselines.frames import read_frames
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.background import find_background
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.volume import checked_to_end
from umbrella_jax.data.voxels import Voxels, open_voxels
from umbrella_jax.errors import DataError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_IN_MASK = ("mean", "sd", *(f"p{p}" for p in PERCENTILES), "volume", "right", "anterior", "superior")
FEATURES = tuple(f"{mask}_{name}" for mask in ("foreground", "bright") for name in _IN_MASK)
"""Names of the features of a scan; a 4D run has `temporal_sd` too."""
_BINS = 256


class IntensityBaseline(ScanBaseline):
    """Regression on `describe_scan`."""

    name: ClassVar[str] = "intensity"
    title: ClassVar[str] = "intensity"

    def measure(self, images: Iterable[Image]) -> tuple[dict[Image, np.ndarray], list[str]]:
        """Return the features of each file, and a note about files without voxel sizes."""
        data, modalities, images = self.inputs.config.data, self.inputs.evaluation.modalities, list(images)
        with one_blas_thread(), ThreadPoolExecutor(data.threads) as pool:
            described = pool.map(lambda image: describe_scan(image, modalities[image.modality]), images)
            rows = dict(zip(images, tqdm(described, "intensity", len(images), disable=None), strict=True))
        unknown = [image.path for image in images if open_voxels(image.path).zooms is None]
        if not unknown:
            return rows, []
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        return rows, [f"intensity: {unknown[0]}{more} without voxel sizes: volumes are counted in voxels."]


def describe_scan(image: Image, config: ModalityConfig) -> np.ndarray:
    """Return the `FEATURES` of a file, float64; of a 4D run, those of the mean over all frames, and `temporal_sd`.

    They are taken in two masks: `foreground`, the voxels that are not background (as the modality's `background`
    decides, or all voxels if it cannot), and `bright`, those above Otsu's threshold. In each: mean, standard deviation
    and percentiles of the intensity; the volume in mm³; and the sides of the box around the mask in mm, from left to
    right, back to front and bottom to top. `temporal_sd` is the mean over the foreground of the standard deviation over
    frames.

    Raises:
        DataError: the file is damaged, or a voxel is not finite.
    """
    scan = open_voxels(image.path)
    with checked_to_end(scan):
        volume, deviation = _over_time(scan) if len(config.size) == 4 else (scan.read(0).astype(np.float32), None)
    if not np.isfinite(volume).all():
        raise DataError(f"{image.path}: a voxel is NaN or infinite; expected finite numbers, preprocess the file again")
    background = find_background(volume, config)
    foreground = np.ones(volume.shape, bool) if background is None else ~background.mask(volume)
    zooms = np.ones(3) if scan.zooms is None else scan.zooms
    axes = np.arange(3) if scan.affine is None else np.argsort(nib.io_orientation(scan.affine)[:, 0])
    parts = [_in_mask(volume, mask, zooms, axes) for mask in (foreground, volume > otsu_threshold(volume))]
    if deviation is not None:
        parts.append(np.array([deviation[foreground].mean() if foreground.any() else 0.0]))
    return np.concatenate(parts).astype(np.float64)


def _over_time(scan: Voxels) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population standard deviation over all frames, float32 [D, H, W] and float64 [D, H, W]."""
    count, mean, squares = 0, np.zeros(scan.shape[:3]), np.zeros(scan.shape[:3])
    for frames in read_frames(scan):  # combined as by Chan et al. 1983, since squares of raw values lose digits
        n, own = frames.shape[-1], frames.mean(-1, dtype=np.float64)
        squares += frames.var(-1, dtype=np.float64) * n + (own - mean) ** 2 * (count * n / (count + n))
        mean += (own - mean) * (n / (count + n))
        count += n
    return mean.astype(np.float32), np.sqrt(squares / count)


def _in_mask(volume: np.ndarray, mask: np.ndarray, zooms: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return the features in one mask, in the order of _IN_MASK; 0 if it is empty."""
    values = volume[mask]
    if not values.size:
        return np.zeros(len(_IN_MASK))
    sides = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        sides.append((used[-1] - used[0] + 1) * zooms[axis])
    return np.array(
        [
            values.mean(dtype=np.float64),
            values.std(dtype=np.float64),
            *np.percentile(values, PERCENTILES),
            values.size * float(np.prod(zooms)),
            *np.array(sides)[axes],
        ]
    )


def otsu_threshold(volume: np.ndarray) -> float:
    """Return the intensity that divides the voxels into two classes with the largest variance between them.

    Otsu 1979, "A threshold selection method from gray-level histograms", on a histogram of 256 bins.
    """
    counts, edges = np.histogram(volume, _BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), volume.size
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(edges[1 + np.nanargmax(between[:-1])]) if np.isfinite(between[:-1]).any() else float(edges[-1])
