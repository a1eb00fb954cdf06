"""Time and memory of the baselines that read whole scans, and of regression on connectivity."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.measure import figure, measure

SCANS, SUBJECTS, CONNECTIONS = 4, 1000, 160 * 159 // 2
FRAMES = 200


def baselines(work_dir: Path) -> None:
    """Measure intensity per 1 mm scan, connectivity per run of 200 frames, and a fit to 1,000 subjects."""
    make_scans(work_dir)
    for name, work, count in (("intensity", describe, SCANS), ("connectivity", read_signals, SCANS), ("fit", fit, 1)):
        measured = measure(work, work_dir)
        figure(f"baseline_{name}_processor", measured["value"][0] / count, "s")
        figure(f"baseline_{name}_peak", measured["peak"], "GB")


def make_scans(folder: Path) -> None:
    """Write nilearn's MNI brain with noise, as int16 .nii.gz: at 1 mm, and at 3 mm as runs."""
    import nibabel as nib
    from nilearn.datasets import load_mni152_template

    rng = np.random.default_rng(0)
    for name, resolution, frames in (("T1w", 1, ()), ("bold", 3, (FRAMES,))):
        template = load_mni152_template(resolution=resolution)
        brain = 800 * np.asarray(template.dataobj, np.float32)
        brain = brain.reshape(*brain.shape, *(1 for _ in frames))
        for i in range(SCANS):
            noise = 20 * rng.standard_normal((*brain.shape[:3], *frames), np.float32) * (brain > 0)
            image = nib.Nifti1Image((brain + noise).astype(np.int16), template.affine)
            nib.save(image, folder / f"sub-{i}_space-MNI152NLin6Asym_{name}.nii.gz")


def describe(folder: Path) -> list[float]:
    """Return the processor seconds of `describe_scan` of all T1 scans."""
    from umbrella_jax.baselines.intensity import describe_scan
    from umbrella_jax.config.schema import ModalityConfig
    from umbrella_jax.data.conversation import Image

    config = ModalityConfig(size=(96, 96, 96), patch=(8, 8, 8))
    files = sorted(folder.glob("*_T1w.nii.gz"))
    return _processor(lambda: [describe_scan(Image(file, "T1"), config) for file in files])


def read_signals(folder: Path) -> list[float]:
    """Return the processor seconds of the signals of all runs, without the import of nilearn."""
    from umbrella_jax.baselines.baseline import BaselineOptions, Inputs
    from umbrella_jax.baselines.connectivity import ConnectivityBaseline
    from umbrella_jax.config.schema import DataConfig, ModalityConfig
    from umbrella_jax.data.conversation import Image

    config = ModalityConfig(size=(64, 76, 64, 8), patch=(8, 4, 8, 2))
    given: Any = {
        "config": SimpleNamespace(data=DataConfig()),
        "evaluation": SimpleNamespace(modalities={"rsfMRI": config}),
        **dict.fromkeys(("train", "checkpoint", "train_rows", "eval_rows")),
    }
    baseline = ConnectivityBaseline(Inputs(options=BaselineOptions(), **given))
    images = [Image(file, "rsfMRI") for file in sorted(folder.glob("*_bold.nii.gz"))]
    baseline._clean_signals(images[0])
    return _processor(lambda: [baseline._clean_signals(image) for image in images])


def fit(folder: Path) -> list[float]:
    """Return the processor seconds of a logistic regression on connections of 1,000 subjects."""
    from umbrella_jax.baselines.linear import fit_linear, folds

    rng = np.random.default_rng(0)
    features = rng.normal(size=(SUBJECTS, CONNECTIONS))
    targets = (features[:, :50].sum(1) + rng.normal(0, 5, SUBJECTS) > 0).astype(int)
    parts = folds(targets, [str(i) for i in range(SUBJECTS)], classes=True)
    return _processor(lambda: fit_linear(features, targets, parts, classes=2))


def _processor(work: Callable[[], Any]) -> list[float]:
    start = time.process_time()
    work()
    return [time.process_time() - start]
