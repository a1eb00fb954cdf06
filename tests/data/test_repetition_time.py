"""Repetition times: their sources, and resampling runs to one of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.signal import resample_poly

from umbrella_jax.config.schema import DataConfig, ModalityConfig
from umbrella_jax.data.cache import Sources, VolumeCache
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.inputs import read_inputs
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.reframe import ResampledRun
from umbrella_jax.data.repetition_time import read_repetition_time
from umbrella_jax.data.volume import count_windows, load_volume, open_volume, restore
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import ConfigError, DataError

SHAPE = (3, 2, 2)
FMRI = ModalityConfig(size=(*SHAPE, 8), patch=(3, 2, 2, 4), scaling="none", background="nonpositive")
FREQUENCY = 0.06  # Hz
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, tr, data or frames, unit)` writes a run; its default is a sine about 10 in each voxel."""

    def save(name: str, tr: float, data: Any = 60, unit: str = "sec") -> Path:
        if isinstance(data, int):
            data = sine(tr, data)
        image = nib.Nifti1Image(data.astype(np.float32), np.eye(4))
        image.header.set_xyzt_units("mm", unit)
        image.header["pixdim"][4] = tr * {"sec": 1, "msec": 1000, "usec": 1e6, "unknown": 1}[unit]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        return path

    return save


def sine(tr: float, frames: int) -> np.ndarray:
    """Return the sine of each voxel, [D, H, W, frames], float64."""
    phase = np.linspace(0, 3, 12).reshape(SHAPE)[..., None]
    return 10 + np.sin(2 * np.pi * FREQUENCY * np.arange(frames) * tr + phase)


@pytest.mark.parametrize(("own", "tr", "frames"), [(0.72, 2.0, 200), (2.0, 0.8, 60), (1.5, 1.0, 90)])
def test_resampling_gives_the_sine_at_other_times(own, tr, frames, write):
    run = open_volume(write("run.nii", own, frames), replace(FMRI, tr=tr))
    resampled = run.read(slice(None))
    last = (resampled.shape[3] - 1) * tr
    assert last <= (frames - 1) * own < last + tr  # no frame after the run, and none missing
    expected = sine(tr, resampled.shape[3])
    np.testing.assert_allclose(resampled, expected, atol=0.03)
    inside = slice(*(sign * (int(10 * max(own, tr) / tr) + 1) for sign in (1, -1)))  # beyond the reach of the ends
    np.testing.assert_allclose(resampled[..., inside], expected[..., inside], atol=1e-3)


def test_two_repetition_times_of_one_signal_give_equal_windows(write):
    config = replace(FMRI, tr=2.0)
    fast, slow = write("fast.nii.gz", 0.72, 200), write("slow.nii", 2.0, 72)
    assert count_windows(open_volume(fast, config), config) == count_windows(open_volume(slow, config), config) == 9
    for window in (0, 4, 8):
        np.testing.assert_allclose(load_volume(fast, config, window), load_volume(slow, config, window), atol=0.01)


def test_frequencies_that_the_new_time_cannot_hold_are_removed_as_scipy_does(write):
    data = np.random.default_rng(0).normal(100, 10, (*SHAPE, 200))
    data[0, 0, 0] = 100 + np.sin(2 * np.pi * 0.55 * np.arange(200) * 0.8)  # would alias to 0.05 Hz
    resampled = open_volume(write("run.nii", 0.8, data), replace(FMRI, tr=2.0)).read(slice(None))
    scipys = resample_poly(data, 2, 5, axis=3)
    np.testing.assert_allclose(resampled[..., 10:-10], scipys[..., 10:-10], rtol=1e-3)
    np.testing.assert_allclose(resampled[0, 0, 0, 10:-10], 100, atol=0.01)


def test_constant_voxels_stay_constant_and_windows_do_not_depend_on_the_order(write):
    data = np.random.default_rng(0).normal(0, 1, (*SHAPE, 90))
    data[0] = -123.456
    path, config = write("run.nii.gz", 0.8, data), replace(FMRI, tr=2.0, background=-123.456)
    whole = open_volume(path, config).read(slice(None))
    np.testing.assert_array_equal(whole[0], np.float32(-123.456))
    run = open_volume(path, config)
    for start in (8, 0, 10, 20):
        np.testing.assert_allclose(run.read(slice(start, start + 8)), whole[..., start : start + 8], atol=1e-5)


def test_a_run_with_this_repetition_time_stays_as_it_is(write):
    path = write("run.nii.gz", 0.8, np.random.default_rng(0).normal(5, 1, (*SHAPE, 20)))
    run = open_volume(path, replace(FMRI, tr=0.8))
    assert not isinstance(run, ResampledRun)
    np.testing.assert_array_equal(load_volume(path, replace(FMRI, tr=0.8), 1), load_volume(path, FMRI, 1))


def test_maps_go_back_to_the_stored_frames_by_the_transposed_weights(write):
    config, rng = replace(FMRI, tr=2.0), np.random.default_rng(0)
    data = rng.normal(100, 1, (*SHAPE, 60))
    path, values = write("run.nii", 0.8, data), rng.normal(size=FMRI.size).astype(np.float32)
    for window in (0, 1):
        back = restore(path, values, config, window)
        assert back.shape == (*SHAPE, 60)
        assert back.sum() == pytest.approx(values.sum(), abs=1e-3)
        stored = np.asarray(nib.load(path).dataobj, np.float64)
        assert np.sum(back * stored) == pytest.approx(np.sum(values * load_volume(path, config, window)), rel=1e-4)


@pytest.mark.parametrize("unit", ["sec", "msec", "usec"])
def test_the_header_states_the_time_in_any_unit(unit, write):
    path = write("run.nii", 0.735, unit=unit)
    assert read_repetition_time(path, open_voxels(path)) == 0.735


def test_the_nearest_sidecar_states_the_time_if_the_header_has_no_unit(write, tmp_path):
    path = write("sub-1/func/sub-1_task-rest_run-2_bold.nii.gz", 1.0, unit="unknown")
    (tmp_path / "dataset_description.json").write_text("{}")
    for name, value in [
        ("task-rest_bold.json", 2.0),
        ("task-other_bold.json", 9.0),
        ("sub-1/func/sub-1_task-rest_run-1_bold.json", 8.0),
    ]:
        (tmp_path / name).write_text(json.dumps({"RepetitionTime": value}))
    assert read_repetition_time(path, open_voxels(path)) == 2.0
    (tmp_path / "sub-1/func/sub-1_task-rest_bold.json").write_text('{"RepetitionTime": 0.735}')
    assert read_repetition_time(path, open_voxels(path)) == 0.735


@pytest.mark.parametrize(
    ("tr", "unit", "sidecar", "message"),
    [
        (2.0, "sec", 0.72, r"run.nii: its header says a repetition time of 2 s, .*run.json says 0.72 s"),
        (1.0, "unknown", None, r"run.nii: its repetition time is unknown: .*; pixdim\[4\] is 1, but without a unit"),
        (0.0, "sec", None, r"run.nii: its repetition time is unknown: neither its header nor a JSON sidecar"),
        (800.0, "sec", None, r"its header says a repetition time of 800 s; expected 0.05 to 30 s"),
        (0.0, "sec", 10**400, r"run.json: RepetitionTime: expected seconds, got 1000"),
        (0.0, "sec", "two", r"run.json: RepetitionTime: expected seconds, got 'two'"),
    ],
)
def test_refuses_runs_whose_repetition_time_is_not_known(tr, unit, sidecar, message, write, tmp_path):
    path = write("run.nii", tr, np.ones((*SHAPE, 20)), unit)
    if sidecar is not None:
        (tmp_path / "run.json").write_text(json.dumps({"RepetitionTime": sidecar}))
    with pytest.raises(DataError, match=message):
        open_volume(path, replace(FMRI, tr=2.0))
    assert open_volume(path, FMRI).shape == (*SHAPE, 20)  # without `tr`, nobody asks


def test_refuses_a_run_that_is_too_short_at_the_new_time_and_tr_of_a_volume(write):
    with pytest.raises(DataError, match="20 frames, 7 after scrubbing and resampling; expected at least a window of 8"):
        open_volume(write("run.nii", 0.7, 20), replace(FMRI, tr=2.0))
    with pytest.raises(ConfigError, match=r"tr 2\.0: only 4D runs have a repetition time"):
        ModalityConfig(size=SHAPE, patch=SHAPE, tr=2.0)


def test_the_sidecar_is_part_of_the_cache_and_of_the_inputs(write, tmp_path):
    path, config = write("run.nii", 0.0, sine(0.8, 60)), replace(FMRI, tr=2.0)
    sidecar = tmp_path / "run.json"
    sidecar.write_text('{"RepetitionTime": 0.8}')
    cache = VolumeCache(tmp_path / "cache", strict=True)
    assert cache.check(path, config) == 3
    assert VolumeCache(tmp_path / "cache").check(path, config) == 3
    np.testing.assert_array_equal(cache.load(path, config, 1), load_volume(path, config, 1))
    asked = tmp_path / "eval.json"
    asked.write_text("[]")
    dataset = Dataset((), (), (), {Image(path, "fMRI"): 3}, {"fMRI": config}, cache)
    digests = read_inputs(DataConfig(eval=str(asked)), {"eval": dataset})["volumes"]
    assert [Path(name).name for name, _ in digests] == ["run.nii", "run.json"]

    sidecar.write_text('{"RepetitionTime": 1.0}')
    again = VolumeCache(tmp_path / "cache")
    assert again.check(path, config) == 3
    assert (again.num_found, again.num_made) == (0, 3)
    sources = Sources()
    sources.check(path, config)
    sidecar.write_text('{"RepetitionTime": 0.8}')
    with pytest.raises(DataError, match=r"run\.json: changed since the run began"):
        sources.load(path, config)
