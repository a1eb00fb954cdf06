"""Intensity and volume: from the file's own voxels."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.baselines import frames
from umbrella_jax.baselines.intensity import FEATURES, describe_scan, otsu_threshold
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import Image

T1 = ModalityConfig(size=(8, 8, 8), patch=(4, 4, 4))
RUN = ModalityConfig(size=(8, 8, 8, 4), patch=(4, 4, 4, 2))


def write(path: Path, values: np.ndarray, orientation: str = "RAS") -> Image:
    """Write values [R, A, S(, T)] of voxels of 2 × 3 × 4 mm, stored in another order of axes."""
    image = nib.Nifti1Image(values.astype(np.float32), np.diag([2.0, 3.0, 4.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation))
    nib.save(image.as_reoriented(turn), path)
    return Image(path, "T1")


@pytest.mark.parametrize("orientation", ["RAS", "PIR"])
def test_features_are_of_the_files_own_voxels(tmp_path: Path, orientation: str) -> None:
    """A dim box of 6 × 5 × 4 voxels with a bright half, in air of exactly 0."""
    volume = np.zeros((12, 11, 10))
    volume[2:8, 3:8, 1:5] = np.random.default_rng(0).uniform(10, 12, (6, 5, 4))
    volume[2:5, 3:8, 1:5] += 80
    features = dict(zip(FEATURES, describe_scan(write(tmp_path / "a.nii", volume, orientation), T1), strict=True))
    for name, values in (("foreground", volume[volume > 0]), ("bright", volume[volume > 50])):
        assert features[f"{name}_mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert features[f"{name}_sd"] == pytest.approx(values.std(), rel=1e-5)
        assert features[f"{name}_p75"] == pytest.approx(np.percentile(values, 75), rel=1e-5)
        assert features[f"{name}_volume"] == pytest.approx(len(values) * 24)
    sides = [
        [features[f"{mask}_{side}"] for side in ("right", "anterior", "superior")] for mask in ("foreground", "bright")
    ]
    assert sides == [[12, 15, 16], [6, 15, 16]]


def test_a_run_is_described_over_all_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are read a few at a time; a window has four of the eleven."""
    monkeypatch.setattr(frames, "_CHUNK", 4 * 8**3 * 3)
    run = np.random.default_rng(0).uniform(900, 910, (8, 8, 8, 11))
    run[:3] = 0
    features = describe_scan(write(tmp_path / "run.nii.gz", run), RUN)
    assert len(features) == len(FEATURES) + 1
    assert features[0] == pytest.approx(run[3:].mean(), rel=1e-6)
    assert features[-1] == pytest.approx(run[3:].std(-1).mean(), rel=1e-4)


def test_otsu_finds_the_valley() -> None:
    """Its threshold has the largest variance between classes of all thresholds that the histogram allows."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 3, 3000), rng.normal(60, 8, 1000)])

    def between(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    found = otsu_threshold(values)
    best = max(between(t) for t in np.linspace(values.min() + 1, values.max() - 1, 400))
    assert between(found) == pytest.approx(best, rel=1e-3)
    assert otsu_threshold(np.full(10, 7.0)) >= 7.0
