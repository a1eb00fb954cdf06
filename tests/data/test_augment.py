"""Augmentation: the effect of each change on known voxels, and the same draw for all images of a conversation."""

import itertools
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella_jax.config.load import dump_config, load_config, parse_config
from umbrella_jax.config.schema import AugmentConfig
from umbrella_jax.data.augment import Augmentation, check_axes, draw_augmentation, examples
from umbrella_jax.errors import ConfigError, DataError

EVERYTHING = AugmentConfig(
    left_right_flip=0.5,
    flip_any_axis=0.5,
    rotation=10,
    translation=2,
    bias_field=0.3,
    intensity_scale=(0.8, 1.2),
    noise=0.1,
)
DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def random(shape, seed=0):
    """Return a random read-only volume: augmentation must not write to cached volumes."""
    volume = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    volume.flags.writeable = False
    return volume


def head(shape=(12, 14, 10), background=-0.75, seed=0):
    """Return a random brain in a constant background below it."""
    volume = np.full(shape, background, np.float32)
    inside = (slice(3, -3),) * 3
    volume[inside] = np.random.default_rng(seed).uniform(background + 0.1, 2, volume[inside].shape)
    volume.flags.writeable = False
    return volume


def blob(shape, centre):
    grid = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return np.exp(-(grid**2).sum(0) / (2 * 2.0**2)).astype(np.float32)


def centre_of_mass(volume):
    return np.array([(volume * grid).sum() for grid in np.indices(volume.shape)]) / volume.sum()


def as_pir(volume):
    """Return a volume with axes R, A, S, stored as P, I, R."""
    return np.ascontiguousarray(np.moveaxis(volume, 0, 2)[::-1, ::-1])


# Flips


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("frames", [(), (2,)])
def test_left_right_flip_moves_a_voxel_to_the_other_side(codes, frames):
    shape = (5, 6, 7)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (row, sign) in enumerate(DIRECTIONS[code] for code in codes):
        affine[row, column] = sign * (1.5 + row)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)  # the centre of the array is the origin
    assert "".join(nib.aff2axcodes(affine)) == codes
    volume = np.zeros(shape + frames, np.float32)
    volume[1, 4, 2] = 1
    flipped = Augmentation(left_right=True).apply(volume, codes)
    (voxel,) = {tuple(index[:3]) for index in np.argwhere(flipped)}
    right, anterior, superior = nib.affines.apply_affine(affine, (1, 4, 2))
    np.testing.assert_allclose(nib.affines.apply_affine(affine, voxel), (-right, anterior, superior), atol=1e-12)


def test_flip_any_axis():
    volume = random((4, 5, 6))
    for axis in range(3):
        np.testing.assert_array_equal(Augmentation(flip_axis=axis).apply(volume, None), np.flip(volume, axis))
    np.testing.assert_array_equal(Augmentation(left_right=True, flip_axis=0).apply(volume, "RAS"), volume)


def test_a_left_right_flip_needs_an_orientation():
    with pytest.raises(DataError, match=r"left_right_flip: .*orientation.*expected"):
        Augmentation(left_right=True).apply(random((4, 5, 6)), None)
    axes = {Path("a.nii"): "RAS", Path("b.npy"): None, Path("c.pt"): None}
    with pytest.raises(DataError) as caught:
        check_axes(AugmentConfig(left_right_flip=0.1), axes)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["b.npy", "c.pt"]
    check_axes(replace(EVERYTHING, left_right_flip=0), axes)
    check_axes(EVERYTHING, {Path("a.nii"): "RAS"})


# Rigid motion


@pytest.mark.parametrize(
    ("rotation", "start", "end"),
    [
        ((0, 0, 30), (8, 0, 0), (8 * np.sqrt(3) / 2, 4, 0)),  # from axis 0 towards axis 1
        ((30, 0, 0), (0, 8, 0), (0, 8 * np.sqrt(3) / 2, 4)),
        ((0, 30, 0), (0, 0, 8), (4, 0, 8 * np.sqrt(3) / 2)),
        ((90, 90, 0), (0, 8, 0), (8, 0, 0)),  # about axis 0 first; in the reverse order it would end at (0, 0, 8)
    ],
)
def test_rotation_and_translation(rotation, start, end):
    shape, shift = (36, 33, 39), (1.5, -2.0, 0.25)
    centre = (np.array(shape) - 1) / 2
    volume = blob(shape, centre + start)
    moved = Augmentation(rotation=rotation, translation=shift).apply(volume, None)
    np.testing.assert_allclose(centre_of_mass(moved), centre + end + shift, atol=0.02)
    assert moved.sum() == pytest.approx(volume.sum(), rel=1e-3)


def test_quarter_turn_is_exact():
    volume = head((13, 13, 10))
    moved = Augmentation(rotation=(0, 0, 90)).apply(volume, "RAS")
    np.testing.assert_allclose(moved, np.rot90(volume, axes=(0, 1)), atol=1e-5)


@pytest.mark.parametrize("background", [None, 0.0])
def test_background_moves_in(background):
    volume = random((6, 5, 4))
    moved = Augmentation(translation=(2, 0, -1)).apply(volume, None, background=background)
    expected = np.full_like(volume, volume.min() if background is None else background)
    expected[2:, :, :-1] = volume[:-2, :, 1:]
    np.testing.assert_array_equal(moved, expected)


# Intensities


def test_bias_field_matches_monai():
    transforms = pytest.importorskip("monai.transforms")
    drawn = draw_augmentation(AugmentConfig(bias_field=0.5), np.random.default_rng(3))
    heights = np.abs(random((9, 6, 7)))
    heights[2, 3, 4] = 0
    monai = transforms.RandBiasField(degree=3, prob=1)
    monai._coeff = [0.0, *drawn.bias]  # the first coefficient is the constant
    expected = monai(heights[None], randomize=False)[0].numpy()
    np.testing.assert_allclose(drawn.apply(heights, "RAS"), expected, rtol=1e-5)
    np.testing.assert_allclose(drawn.apply(heights - 3, None), expected - 3, atol=1e-5)


def test_intensity_scales_heights_above_the_minimum():
    volume = head()
    scaled = Augmentation(intensity=1.2).apply(volume, None)
    np.testing.assert_allclose(scaled + 0.75, 1.2 * (volume + 0.75), atol=1e-6)


INTENSITY = draw_augmentation(AugmentConfig(bias_field=0.5, intensity_scale=(0.5, 0.9)), np.random.default_rng(1))


def test_intensity_changes_everything_but_the_background():
    volume = head()
    lit = INTENSITY.apply(volume, "LPS")
    np.testing.assert_array_equal(lit != volume, volume != np.float32(-0.75))


def test_intensity_keeps_a_background_inside_the_range_of_the_brain():
    brain = np.zeros((12, 12, 12, 3), bool)
    brain[2:-2, 2:-2, 2:-2] = True
    volume = np.where(brain, random(brain.shape), 0)  # znorm_zeroback
    lit = INTENSITY.apply(volume, None, background=0.0)
    brain[volume == volume.min()] = False  # the factors leave the minimum unchanged
    np.testing.assert_array_equal(lit != volume, brain)


def test_noise():
    volume = 5 * random((40, 40, 40)) + 100
    augmentation = draw_augmentation(AugmentConfig(noise=0.2), np.random.default_rng(0))
    first, again, second = (augmentation.apply(volume, None, image) - volume for image in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.std() == pytest.approx(0.2 * volume.std(), rel=0.02)
    assert abs(first.mean()) < 0.02
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    other = draw_augmentation(AugmentConfig(noise=0.2), np.random.default_rng(1)).apply(volume, None) - volume
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.02


# One draw for a conversation


def test_images_stored_differently_change_alike():
    volume = head((12, 14, 11))
    augmentation = replace(
        draw_augmentation(replace(EVERYTHING, noise=0), np.random.default_rng(7)), left_right=True, flip_axis=2
    )
    expected = as_pir(augmentation.apply(volume, "RAS"))
    np.testing.assert_allclose(augmentation.apply(as_pir(volume), "PIR"), expected, atol=1e-5)
    assert np.abs(expected - as_pir(volume)).max() > 0.5


def test_every_frame_changes_alike():
    frames = [head(seed=seed) for seed in range(3)]
    augmentation = replace(draw_augmentation(replace(EVERYTHING, noise=0), np.random.default_rng(2)), left_right=True)
    run = augmentation.apply(np.stack(frames, axis=-1), "LAS")
    for index, frame in enumerate(frames):
        np.testing.assert_allclose(run[..., index], augmentation.apply(frame, "LAS"), atol=1e-6)


def test_without_changes_the_array_is_returned():
    volume = random((4, 5, 6))
    assert draw_augmentation(AugmentConfig(), np.random.default_rng(0)).apply(volume, None) is volume


def test_draws_depend_only_on_the_random_stream():
    first, again, next_epoch = (
        draw_augmentation(EVERYTHING, np.random.default_rng([1, epoch, 5, 1])) for epoch in (0, 0, 1)
    )
    assert first == again
    assert hash(first) == hash(again)
    assert first != next_epoch
    only_rotation = draw_augmentation(AugmentConfig(rotation=10), np.random.default_rng([1, 0, 5, 1]))
    assert only_rotation == Augmentation(rotation=first.rotation)  # whatever else is on


def test_draws_are_uniform_in_their_ranges():
    config = replace(EVERYTHING, left_right_flip=0.3, flip_any_axis=0.6, intensity_scale=(0.8, 1.4))
    drawn = [draw_augmentation(config, np.random.default_rng([0, 0, index, 1])) for index in range(4000)]
    assert np.mean([a.left_right for a in drawn]) == pytest.approx(0.3, abs=0.04)
    assert np.mean([a.left_right and a.flip_axis is not None for a in drawn]) == pytest.approx(0.18, abs=0.03)
    for axis in range(3):
        assert np.mean([a.flip_axis == axis for a in drawn]) == pytest.approx(0.2, abs=0.03)
    for name, low, high in [
        ("rotation", -10, 10),
        ("translation", -2, 2),
        ("bias", -0.3, 0.3),
        ("intensity", 0.8, 1.4),
    ]:
        values = np.array([getattr(a, name) for a in drawn])
        assert values.min() >= low
        assert values.max() <= high
        shares = np.array([0.01, 0.25, 0.75])
        expected = low + shares * (high - low)
        np.testing.assert_allclose(np.quantile(values, shares), expected, atol=0.03 * (high - low))


AXES = ["".join(codes) for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3) | st.tuples(*[st.integers(1, 6)] * 4),
    axes=st.none() | st.sampled_from(AXES),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 1.0, 1e4]),
    flips=st.booleans(),
)
def test_any_volume(shape, axes, seed, spread, flips):
    volume = random(shape, seed) * np.float32(spread)
    volume.flags.writeable = False
    config = replace(EVERYTHING, left_right_flip=float(flips and axes is not None), flip_any_axis=float(flips))
    found = draw_augmentation(config, np.random.default_rng(seed)).apply(volume, axes)
    assert found.shape == shape
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, draw_augmentation(config, np.random.default_rng(seed)).apply(volume, axes))


# For people to look at


def test_examples_show_one_change_each():
    volume = head((16, 18, 14))
    shown = examples(EVERYTHING)
    names = [name.split(":")[0] for name, _ in shown]
    assert list(dict.fromkeys(names)) == [
        *("left_right_flip", "flip_any_axis", "rotation", "translation", "bias_field", "intensity_scale", "noise")
    ]
    assert names.count("flip_any_axis") == 3
    assert len({name for name, _ in shown}) == len({a for _, a in shown}) == len(shown)
    assert not any((a.apply(volume, "RAS") == volume).all() for _, a in shown)
    assert examples(AugmentConfig()) == []


# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("left_right_flip", 1.5),
        ("left_right_flip", -0.1),
        ("flip_any_axis", float("nan")),
        ("rotation", -1.0),
        ("rotation", 91.0),
        ("translation", -1.0),
        ("translation", float("inf")),
        ("bias_field", 1.1),
        ("noise", float("nan")),
        ("intensity_scale", (1.1, 0.9)),
        ("intensity_scale", (0.0, 1.0)),
    ],
)
def test_ranges(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: expected"):
        AugmentConfig(**{field: value})


RUN = {"model": {"modalities": {"T1": {"size": [8, 12, 8], "patch": [4, 4, 4]}}}}


def test_faults_are_named_by_key():
    with pytest.raises(ConfigError) as caught:
        parse_config({**RUN, "data": {"augment": {"noise": -1, "left_right_flip": 2}}})
    assert [fault.split(": expected")[0] for fault in caught.value.faults] == [
        "config: data.augment: left_right_flip",
        "config: data.augment: noise",
    ]
    with pytest.raises(ConfigError, match=r"data\.augment\.flip: no such key; expected one of left_right_flip"):
        parse_config({**RUN, "data": {"augment": {"flip": 1}}})
    with pytest.raises(ConfigError, match=r"data\.augment\.translation: 4\.0 .*expected less than half .*8"):
        parse_config({**RUN, "data": {"augment": {"translation": 4}}})


def test_a_run_keeps_them(tmp_path):
    run = parse_config({**RUN, "data": {"augment": {"noise": 0.1, "intensity_scale": [0.9, 1.1]}}})
    (tmp_path / "run.yaml").write_text(dump_config(run))
    assert load_config(tmp_path / "run.yaml") == run
    assert run.data.augment == AugmentConfig(noise=0.1, intensity_scale=(0.9, 1.1))
