"""Functional connectivity: nilearn's numbers, and no atlas in the wrong space."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nilearn.connectome import ConnectivityMeasure
from nilearn.maskers import NiftiLabelsMasker, NiftiSpheresMasker

from tests.helpers.baseline_case import make_problem
from umbrella_jax.baselines import frames
from umbrella_jax.baselines.atlas import Atlas, mean_signals, read_atlas
from umbrella_jax.baselines.baseline import BaselineOptions, Inputs
from umbrella_jax.baselines.connectivity import ConnectivityBaseline
from umbrella_jax.baselines.problems import LearningProblem
from umbrella_jax.config.schema import ConfoundsConfig, DataConfig, ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import ConfigError, UmbrellaError

SHAPE, FRAMES, REGIONS = (10, 12, 8), 60, 6
AFFINE = np.array([[-3.0, 0, 0, 15], [0, 3, 0, -18], [0, 0, 3, -12], [0, 0, 0, 1]])
RUN = ModalityConfig(size=(10, 12, 8, 4), patch=(5, 6, 4, 2))
T1 = ModalityConfig(size=(8, 8, 8), patch=(4, 4, 4))


def blocks(shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Labels in blocks along the second axis, with numbers that are not 1, 2, 3."""
    labels = np.zeros(shape, np.int16)
    for region, part in enumerate(np.array_split(np.arange(1, shape[1]), REGIONS)):
        labels[2:-2, part] = 10 * region + 3
    return labels


def write(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE, code: int = 4) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nib.save(image, path)
    return path


def write_run(path: Path, coupling: float, seed: int, **options: Any) -> Path:
    """A run in which pairs of regions go together by `coupling`."""
    rng = np.random.default_rng(seed)
    signals = rng.normal(size=(REGIONS, FRAMES))
    signals[1::2] = coupling * signals[::2] + np.sqrt(1 - coupling**2) * signals[1::2]
    data = rng.normal(0, 0.1, (*SHAPE, FRAMES)) + 100 + 0.05 * np.arange(FRAMES)
    labels = blocks()
    for region, value in enumerate(np.unique(labels)[1:]):
        data[labels == value] += signals[region]
    return write(path, data.astype(np.float32), **options)


@pytest.fixture(scope="module")
def atlas_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlas")
    (folder / "atlas.tsv").write_text("index\tname\n" + "".join(f"{10 * i + 3}\tregion {i}\n" for i in range(REGIONS)))
    return write(folder / "atlas.nii.gz", blocks())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"{i}.nii.gz", 0.95 * (i % 2), i) for i in range(24)]


def test_signals_are_those_of_nilearns_maskers(
    runs: list[Path], atlas_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the atlas's own grid, on a finer one, and in spheres; frames are read a few at a time."""
    monkeypatch.setattr(frames, "_CHUNK", 4 * 960 * 7)
    scan = open_voxels(runs[0])
    fine = np.diag([2.0, 2, 2, 1])
    fine[:3, 3] = (-14, -17, -11)
    other = write(tmp_path / "other.nii", blocks((15, 18, 12)), fine)
    for file in (atlas_file, other):
        atlas = read_atlas(file)
        signals = mean_signals(scan, atlas.weights(SHAPE, AFFINE), runs[0])
        masker = NiftiLabelsMasker(file, resampling_target="data", standardize=None)
        np.testing.assert_allclose(signals, masker.fit_transform(runs[0]), rtol=1e-5)
    assert read_atlas(atlas_file).regions[1] == "region 1"
    centres = np.array([[0.0, 1, 0], [-7.4, -9.1, 2], [3, 9.2, -5]])
    spheres = Atlas("spheres", ("a", "b", "c"), centres=centres, radii=np.full(3, 5.0))
    signals = mean_signals(scan, spheres.weights(SHAPE, AFFINE), runs[0])
    masker = NiftiSpheresMasker(centres, radius=5, allow_overlap=True, standardize=None)
    np.testing.assert_allclose(signals, masker.fit_transform(runs[0]), rtol=1e-5)


def learned(
    runs: Sequence[Path], modality: str = "rsfMRI", **options: Any
) -> tuple[ConnectivityBaseline, LearningProblem]:
    """Return the baseline, and a task of which the last runs are asked."""
    answers = ["coupled" if i % 2 else "free" for i in range(len(runs))]
    problem = make_problem("state", answers, [(Image(run, modality),) for run in runs], 2 * len(runs) // 3)
    given: Any = {
        "config": SimpleNamespace(data=DataConfig()),
        "evaluation": SimpleNamespace(modalities={"rsfMRI": RUN, "T1": T1}),
        **dict.fromkeys(("train", "checkpoint", "train_rows", "eval_rows")),
    }
    return ConnectivityBaseline(Inputs(options=BaselineOptions(**options), **given)), problem


@pytest.mark.parametrize("kind", ["correlation", "partial", "tangent"])
def test_connectivity_is_nilearns(runs: list[Path], atlas_file: Path, kind: str) -> None:
    """The mean of the tangent space is that of the training runs; the diagonal of correlations is constant."""
    baseline, problem = learned(runs, atlas=atlas_file, connectivity=kind)
    assert baseline.why_not(problem) is None
    assert baseline.check([problem]) == []
    (outputs,), notes = baseline.answer([problem])
    assert [problem.classes[i] for i in outputs.argmax(1)] == ["free", "coupled"] * 4
    assert f"{kind} of 6 regions of atlas.nii.gz over all 60 frames of 24 runs" in notes[0]
    masker = NiftiLabelsMasker(atlas_file, standardize="zscore_sample", detrend=True)
    signals = [masker.fit_transform(run).astype(np.float64) for run in runs]
    name = "partial correlation" if kind == "partial" else kind
    measure = ConnectivityMeasure(kind=name, vectorize=True, discard_diagonal=kind != "tangent")
    features = baseline.features(problem)
    np.testing.assert_allclose(features.train, measure.fit_transform(signals[:16]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features.asked, measure.transform(signals[16:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "code", "atlas", "message"),
    [
        ("space-MNI152NLin2009cAsym_bold.nii", 1, "dosenbach_2010", "regions of dosenbach_2010 lie outside it"),
        ("bold.nii", 4, None, "regions of dosenbach_2010 lie outside it"),
        ("space-T1w_bold.nii", 4, "dosenbach_2010", "is in MNI space, but its name has space-T1w"),
        ("bold.nii", 1, "power_2011", "is in MNI space, but its header states the scanner's coordinates"),
        ("bold.nii", 1, None, "not known to be in MNI space: its header states the scanner's"),
        ("bold.nii", 2, None, "not known to be in MNI space: neither its name"),
    ],
)
def test_coordinates_are_for_mni_space_only(
    tmp_path: Path, name: str, code: int, atlas: str | None, message: str
) -> None:
    """These small runs, which hold few of the spheres, are faults even then."""
    runs = [write_run(tmp_path / f"{i}_{name}", 0.0, i, code=code) for i in range(6)]
    baseline, problem = learned(runs, atlas=atlas)
    if reason := baseline.why_not(problem):
        assert message in reason
    else:
        assert message in "\n".join(baseline.check([problem]))
        assert len(baseline.check([problem])) == 6


def test_regions_without_a_signal(runs: list[Path], atlas_file: Path, tmp_path: Path) -> None:
    """One that a run lacks is left out for all; a run that lacks most is refused."""
    data = np.asarray(nib.load(runs[5]).dataobj).copy()
    labels = blocks()
    data[labels == 23] = 7
    cut = write(tmp_path / "cut.nii.gz", data)
    baseline, problem = learned([*runs[:5], cut, *runs[6:]], atlas=atlas_file)
    notes = baseline.read([problem])
    assert "5 regions" in notes[0]
    assert "left out: region 2." in notes[1]
    assert baseline.features(problem).train.shape == (16, 10)
    data[labels > 3] = 1000.1 + 0.37 * np.arange(FRAMES)  # a trend, whose rest is rounding
    bad = write(tmp_path / "bad.nii.gz", data)
    baseline, problem = learned([*runs[:5], bad, *runs[6:]], atlas=atlas_file)
    with pytest.raises(UmbrellaError, match=r"bad.nii.gz: 5 of 6 regions of atlas.nii.gz have no signal"):
        baseline.read([problem])


def test_a_task_without_runs_has_none(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    baseline, problem = learned(runs, modality="T1")
    assert baseline.why_not(problem) == "it shows no 4D scan"
    monkeypatch.setattr("umbrella_jax.baselines.baseline.find_spec", lambda name: None)
    assert baseline.missing_extra() == 'needs nilearn; install it: pip install "umbrella-jax[fmri]"'


def test_an_atlas_of_another_place_or_space_is_refused(atlas_file: Path, tmp_path: Path) -> None:
    far = AFFINE.copy()
    far[0, 3] += 500
    image = nib.load(atlas_file)
    runs = [write_run(tmp_path / f"sub-{i}_space-T1w_bold.nii", 0.0, i) for i in range(6)]
    for atlas, message in [
        (atlas_file, "atlas.nii.gz is in MNI space, but its name has space-T1w"),
        (write(tmp_path / "far.nii", image.dataobj, far, code=2), "6 of 6 regions of far.nii lie outside it"),
    ]:
        baseline, problem = learned(runs, atlas=atlas)
        assert message in baseline.check([problem])[0]
    scanner = [write_run(tmp_path / f"sub-{i}_bold.nii", 0.0, i, code=1) for i in range(6)]
    baseline, problem = learned(scanner, atlas=atlas_file)
    assert baseline.check([problem]) == []
    assert "is in MNI space, but of" in baseline.read([problem])[1]


def test_files_that_are_no_atlas_are_refused(tmp_path: Path, runs: list[Path]) -> None:
    for name, data, message in [
        ("real.nii", np.full(SHAPE, 0.5, np.float32), "0.5 is no label; expected whole numbers from 0"),
        ("large.nii", np.full(SHAPE, 2.0**31), "2147483648 is no label"),
        ("one.nii", np.ones(SHAPE, np.int16), "1 label other than 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_atlas(write(tmp_path / name, data))
    for atlas, message in [
        (tmp_path / "none.nii", "not found; expected an image of labels or one of dosenbach_2010"),
        (runs[0], "expected one volume of labels"),
    ]:
        (fault,) = ConnectivityBaseline.option_faults(BaselineOptions(atlas=atlas))
        assert message in fault
    assert "expected one of correlation, partial, tangent" in json.dumps(
        ConnectivityBaseline.option_faults(BaselineOptions(connectivity="cosine"))  # type: ignore[arg-type]
    )


def test_runs_are_cleaned_as_configured(atlas_file: Path, tmp_path: Path) -> None:
    """Regressing a signal out of each voxel or out of the regions' means is the same; its place stays the file's."""
    confounds = ConfoundsConfig(strategy=(), columns=("pulse",), pattern="{name}.tsv", detrend=True)
    run = write_run(tmp_path / "bold.nii.gz", 0.5, 0)
    pulse = np.sin(np.arange(FRAMES))
    (tmp_path / "bold.tsv").write_text("pulse\n" + "".join(f"{value!r}\n" for value in pulse.tolist()))
    baseline, problem = learned([run] * 6, atlas=atlas_file)
    modalities: Any = baseline.inputs.evaluation.modalities
    modalities["rsfMRI"] = replace(RUN, confounds=confounds)
    baseline.read([problem])
    (signals,) = baseline._signals.values()
    masker = NiftiLabelsMasker(atlas_file, standardize="zscore_sample", detrend=True)
    np.testing.assert_allclose(signals, masker.fit_transform(run, confounds=pulse[:, None]), rtol=1e-3, atol=1e-3)
    assert baseline._place(problem.samples[0].shown[0]).in_mni
