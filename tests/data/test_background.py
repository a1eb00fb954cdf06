"""Background: decided from the voxels or by the configuration, reported, and unchanged if no voxel is below 0."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from umbrella_jax.config.schema import AugmentConfig, DataConfig, ModalityConfig, ModelConfig, RunConfig
from umbrella_jax.data.augment import Augmentation
from umbrella_jax.data.background import find_background
from umbrella_jax.data.cache import Sources, VolumeCache
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.validation.checks import validate
from umbrella_jax.data.volume import check_volumes, load_volume
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.inference.explain import _background
from umbrella_jax.inference.processor import Processor

RUN = ModalityConfig(size=(6, 6, 6, 4), patch=(3, 3, 3, 4))
CUBES = ModalityConfig(size=(8, 8, 8), patch=(4, 4, 4), mode="pad", spacing=1)
MASK = np.zeros((6, 6, 6), bool)
MASK[1:5, 1:5, 1:5] = True


def denoised(seed=0, frames=4):
    """Return a run after confound regression: voxels have mean 0, and those outside the brain are 0."""
    signal = np.random.default_rng(seed).normal(0, 3, (6, 6, 6, frames)).astype(np.float32)
    signal[2, 2, 2, 0] = 0  # a brain's signal passes through 0
    signal -= np.float32(0)
    signal[~MASK] = 0
    return signal


def standardised(seed=0):
    """Return a volume that was z-scored as a whole, so air, the lowest value, is below 0."""
    volume = np.where(MASK, np.random.default_rng(seed).uniform(100, 900, MASK.shape), 0)
    return ((volume - volume.mean()) / volume.std()).astype(np.float32)


@pytest.mark.parametrize("scaling", ["znorm_minback", "znorm_zeroback", "minmax", "none"])
def test_a_denoised_run_keeps_its_brain(nifti, scaling):
    data = denoised()
    brain = data[MASK]
    z = (data - brain.mean()) / brain.std()
    expected, level = {
        "znorm_minback": (np.where(MASK[..., None], z, z[MASK].min()), z[MASK].min()),
        "znorm_zeroback": (np.where(MASK[..., None], z, 0), 0),
        "minmax": (data / data.max(), 0),
        "none": (data, 0),
    }[scaling]
    config, remarks = replace(RUN, scaling=scaling, size=(8, 6, 6, 4)), []
    volume = load_volume(nifti("a.nii", data), config, note=lambda *remark: remarks.append(remark[-1]))
    np.testing.assert_allclose(volume[1:7], expected, atol=1e-5)
    assert (volume[[0, 7]] == volume[1, 0, 0, 0]).all()  # padding is background
    (background,) = remarks
    assert (background.rule, background.shared) == (0.0, pytest.approx(1 - MASK.mean()))
    assert background.level == pytest.approx(level, abs=1e-5)


@pytest.mark.parametrize("scaling", ["znorm_minback", "znorm_zeroback", "minmax", "none"])
@pytest.mark.parametrize("ringing", [0, -2])
def test_auto_is_nonpositive_without_voxels_below_0(nifti, scaling, ringing):
    """They agree to the bit, also with a little ringing below 0. `test_volume.py` compares this rule with PyTorch."""
    data = np.where(MASK[..., None], np.random.default_rng(0).uniform(100, 300, (6, 6, 6, 4)), 0).astype(np.float32)
    data[0, :, 0] = ringing
    path, remarks = nifti("a.nii", data), []
    config = replace(RUN, scaling=scaling, size=(8, 6, 6, 4))
    volume = load_volume(path, config, note=lambda *remark: remarks.append(remark))
    np.testing.assert_array_equal(volume, load_volume(path, replace(config, background="nonpositive")))
    assert remarks == []
    brain = data[data > 0]
    if scaling == "znorm_minback":
        background = (brain.min() - brain.mean(dtype=np.float64)) / brain.std()
        assert np.unique(volume[1:7][~MASK]).tolist() == pytest.approx([background], abs=1e-5)


@pytest.mark.parametrize("background", ["auto", "lowest", float(standardised().min())])
@pytest.mark.parametrize("scaling", ["none", "znorm", "minmax"])
def test_a_standardised_volume_is_padded_with_its_air(nifti, scaling, background):
    data = standardised()
    config = replace(CUBES, scaling=scaling, background=background)
    padded = np.pad(data, 1, constant_values=data.min())
    expected = {"none": padded, "znorm": (padded - padded.mean()) / padded.std(), "minmax": padded / padded.max()}
    path, remarks = nifti("a.nii", data), []
    volume = load_volume(path, config, note=lambda *remark: remarks.append(remark[-1]))
    np.testing.assert_allclose(volume, expected[scaling], atol=1e-5)
    assert (volume[0] == volume[1, 0, 0]).all()
    (background_found,) = remarks
    assert background_found.level is None or background_found.level == pytest.approx(float(volume.min()), abs=1e-5)
    wide = nifti("wide.nii", np.pad(data, 3, constant_values=data.min()))  # only air is cropped
    np.testing.assert_allclose(load_volume(wide, config), expected[scaling], atol=1e-5)
    with pytest.raises(DataError, match=r"56 voxels other than .* lie outside the central 2×2×2 mm") as caught:
        load_volume(path, replace(config, size=(2, 2, 2), patch=(1, 1, 1)))
    assert len(caught.value.faults) == 1


def unknown():
    return np.random.default_rng(0).normal(0, 1, (6, 6, 6, 4)).astype(np.float32)


@pytest.mark.parametrize("make", [lambda: RUN, lambda: replace(RUN, scaling="none", size=(7, 6, 6, 4)), lambda: CUBES])
def test_an_unknown_background_is_rejected_if_it_is_needed(nifti, make):
    config = make()
    data = unknown() if len(config.size) == 4 else unknown()[..., 0]
    path = nifti("a.nii", data)
    with pytest.raises(DataError) as caught:
        load_volume(path, config)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{path}: ")
    assert fault.endswith(
        "set background of the modality to nonpositive, lowest or a number, or mask the volume with 0"
    )
    for background in ("nonpositive", "lowest", 0):
        load_volume(path, replace(config, background=background))


def test_an_unknown_background_is_accepted_if_it_is_not_needed(nifti):
    data = unknown()
    run = replace(RUN, scaling="none")
    np.testing.assert_array_equal(load_volume(nifti("run.nii", data), run), data)
    cubes = replace(CUBES, size=(6, 6, 6), patch=(3, 3, 3), scaling="none")
    np.testing.assert_array_equal(load_volume(nifti("a.nii", data[..., 0]), cubes), data[..., 0])
    resized = ModalityConfig(size=(6, 6, 6), patch=(3, 3, 3), scaling="none")
    np.testing.assert_allclose(load_volume(nifti("b.nii", data[..., 0]), resized), data[..., 0], atol=1e-6)


def test_a_volume_below_0_names_its_cause(nifti):
    data = np.where(MASK, -np.random.default_rng(0).uniform(1, 9, MASK.shape), 0).astype(np.float32)
    run = nifti("run.nii", np.repeat(data[..., None], 4, -1))
    assert load_volume(run, RUN).std() > 0
    fault = partial(pytest.raises, DataError)
    with fault(match=r"no voxel is above 0; scaling minmax divides by the largest one, which is 0; choose another"):
        load_volume(run, replace(RUN, scaling="minmax"))
    with fault(
        match="no voxel is above 0; background: nonpositive leaves no brain; set it to auto, lowest or a number"
    ):
        load_volume(run, replace(RUN, background="nonpositive"))
    with fault(match=r"every voxel has the background's value, -2; expected a brain"):
        load_volume(nifti("flat.nii", np.full((6, 6, 6, 4), -2, np.float32)), RUN)


def test_windows_of_a_run_with_different_rules_are_reported(nifti, tmp_path):
    """A remaining drift raises nearly all of the first window above 0."""
    data = denoised(frames=8)
    data[MASK, :4] += 9
    paths = [nifti(f"{i}.nii", data) for i in range(2)]
    reason = "background is the value 0 in 1 of its 2 windows, and voxels at 0 or below in the others; set background"
    for sources in (Sources(), VolumeCache(tmp_path / "cache"), VolumeCache(tmp_path / "cache")):
        for path in paths:
            assert sources.check(path, RUN) == 2
        first, *_ = sources.background_remarks({"fMRI": RUN})
        assert first.startswith(f"{paths[0]}: {reason}")
        assert first.endswith("; 1 more run like it")
    even = replace(RUN, background=0.0)
    sources = Sources()
    assert sources.check(paths[0], even) == 2
    assert not any("of its 2 windows" in line for line in sources.background_remarks({"fMRI": even}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_background_must_be_a_finite_number(value):
    with pytest.raises(ConfigError, match="background: expected"):
        replace(RUN, background=value)


def test_the_lowest_integer_can_be_background(nifti):
    data = np.where(MASK, np.random.default_rng(0).integers(-900, 900, MASK.shape), -32768).astype(np.int16)
    found = find_background(data, CUBES)
    assert (found.rule, found.value) == ("lowest", -32768)


def test_augmentation_and_maps_fill_with_the_background(nifti, tokenizer, record, write_json, tmp_path):
    """The same without a cache, with an empty one and with a full one."""
    resized = ModalityConfig(size=(6, 6, 6), patch=(3, 3, 3))
    modalities = {"rsfMRI": replace(RUN, scaling="none"), "T1": resized}
    run, volume = nifti("run.nii", denoised(frames=8)), nifti("t1.nii", denoised()[..., 0])
    path = write_json("a.json", record([("user", [f"rsfMRI:{run}", f"T1:{volume}"]), ("assistant", ["male."])]))
    options = {"max_length": 99, "threads": 1, "augment": AugmentConfig(translation=1)}
    z = load_volume(volume, resized)
    for sources in (Sources(), VolumeCache(tmp_path / "cache"), VolumeCache(tmp_path / "cache")):
        dataset = Dataset.load(path, tokenizer, modalities, sources=sources, **options)
        for window in (0, 1):
            assert dataset.background(Image(run, "rsfMRI", window)) == 0
        level = dataset.background(Image(volume, "T1"))
        assert level == pytest.approx(float(z[0, 0, 0]), abs=1e-6)
        assert level > z.min()
    moved = Augmentation(translation=(1.0, 0, 0)).apply(z, "RAS", background=level)
    np.testing.assert_allclose(moved[0], level, atol=1e-6)
    ground = _background(np.stack([z, z, z]), [level, None])
    assert np.unique(ground[0]).tolist() == pytest.approx([level])
    assert (ground[1:] == z.min()).all()


def run_config(path, **fields):
    return RunConfig(model=ModelConfig(modalities={"rsfMRI": replace(RUN, **fields)}), data=DataConfig(train=str(path)))


@pytest.fixture
def mixed(nifti, record, write_json):
    """Return a data set with two denoised runs and a raw one."""
    raw = np.where(MASK[..., None], 1000 + denoised(2), 0)
    files = [nifti("0.nii", denoised(0)), nifti("1.nii", denoised(1)), nifti("2.nii", raw.astype(np.float32))]
    asked = [record([("user", [f"rsfMRI:{f}", "?"]), ("assistant", [f"{i}."])]) for i, f in enumerate(files)]
    return write_json("a.json", asked), files


def test_validate_reports_backgrounds_and_finds_a_mixture(mixed):
    path, files = mixed
    findings = [f for f in validate(run_config(path)).findings if f.kind == "background"]
    assert [(f.severity, f.place) for f in findings] == [
        ("note", str(files[0])),
        ("note", str(files[1])),
        ("warning", "rsfMRI"),
    ]
    assert "of its intensity is below 0: background is the value 0 (70% of its voxels)" in findings[0].reason
    assert findings[2].reason == (
        f"background differs between the rsfMRI volumes: the value 0 in 2 (such as {files[0]}), voxels at 0 or below "
        "in 1; expected volumes prepared alike, or one rule, model.modalities.rsfMRI.background"
    )


@pytest.mark.parametrize(
    ("background", "reason"),
    [
        ("nonpositive", "of its intensity is below 0 and becomes background, as background: nonpositive says"),
        (-1000.0, "no voxel has the value -1000, which background says; expected auto or another number"),
    ],
)
def test_a_rule_that_the_voxels_contradict_is_a_warning(mixed, background, reason, tokenizer, caplog):
    path, files = mixed
    config = run_config(path, background=background)
    found = [f for f in validate(config).findings if f.kind == "background" and f.place in map(str, files[:2])]
    assert [f.severity for f in found] == ["warning", "warning"]
    assert all(reason in f.reason for f in found)
    with caplog.at_level(logging.WARNING):
        Processor(tokenizer, config.model.modalities).datasets(config.data)
    assert any(reason in message and message.startswith(f"rsfMRI: {files[0]}: ") for message in caplog.messages)


def test_loading_data_logs_unusual_backgrounds(mixed, tokenizer, caplog, tmp_path):
    """One line covers all volumes with the same background, also when they come from a full cache."""
    path, files = mixed
    modalities = run_config(path).model.modalities
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Processor(tokenizer, modalities).datasets(DataConfig(train=str(path), cache=cache))
        taken, different = caplog.messages
        assert taken.startswith(f"rsfMRI: {files[0]}: ")
        assert taken.endswith("background is the value 0 (70% of its voxels); 1 more volume like it")
        assert different.startswith("background differs between the rsfMRI volumes: the value 0 in 2")
    ordinary = check_volumes([Image(files[2], "rsfMRI")], modalities, 1)
    assert ordinary == {Image(files[2], "rsfMRI"): 1}
