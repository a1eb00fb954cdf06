"""Volumes: equal to the original's preprocessing, whatever the axis order of the file; bad files are refused."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.config import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.volume import area_weights, check_volumes, load_volume, num_windows, resample
from umbrella_jax.errors import DataError

GOLDEN = Path(__file__).parent.parent / "golden"


def t1(size=(6, 7, 5), **fields):
    return ModalityConfig(size=size, patch=(1, 1, 1), **fields)


def fmri(size=(4, 3, 5, 4), **fields):
    return ModalityConfig(size=size, patch=(1, 1, 1, 1), **fields)


# 3D


@pytest.mark.parametrize("name", ["t1_24x24x24", "t1_40x16x31", "t1_37x45x29", "t1_48x60x40"])
def test_golden(name):
    expected = np.load(GOLDEN / "preprocess.npz")[name]
    found = load_volume(GOLDEN / "t1.nii.gz", t1(expected.shape, orientation="as_stored"))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size"), [((9, 14, 11), (4, 14, 5)), ((5, 3, 8), (7, 9, 3)), ((7, 7, 7), (1, 2, 20))]
)
def test_live_against_monai(nifti, shape, size):
    transforms = pytest.importorskip("monai.transforms")
    path = nifti("a.nii.gz", shape)
    data = nib.load(path).get_fdata(dtype=np.float32)[None]
    resized = transforms.Resize(size, mode="area")(data)
    np.testing.assert_allclose(load_volume(path, t1(size, scaling="none")), resized[0].numpy(), atol=1e-5)
    expected = transforms.NormalizeIntensity()(resized)[0].numpy()
    np.testing.assert_allclose(load_volume(path, t1(size)), expected, atol=1e-5)


def test_area_weights_are_the_mean_of_each_window():
    volume = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    found = resample(volume, [area_weights(n, size) for n, size in zip((7, 5, 3), (3, 5, 4), strict=True)])
    # 7 -> 3: windows 0..3, 2..5, 4..7;  3 -> 4: 0..1, 0..2, 1..3, 2..3
    assert found[1, 2, 2] == pytest.approx(volume[2:5, 2, 1:3].mean(), abs=1e-6)
    assert found[2, 0, 3] == pytest.approx(volume[4:7, 0, 2].mean(), abs=1e-6)


def test_scalings_3d(nifti):
    data = np.random.default_rng(0).normal(20, 5, (6, 7, 5)).astype(np.float32)
    path = nifti("a.nii", data)
    np.testing.assert_allclose(load_volume(path, t1(scaling="none")), data, atol=1e-5)
    np.testing.assert_allclose(load_volume(path, t1(scaling="minmax")), data / data.max(), atol=1e-6)
    np.testing.assert_allclose(load_volume(path, t1()), (data - data.mean()) / data.std(), atol=1e-5)


def test_scale_slope_of_the_file_is_applied(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_slope_inter(0.5, 3)
    image = nib.Nifti1Image(np.arange(210.0).reshape(6, 7, 5) / 2 + 3, np.eye(4), header)
    nib.save(image, tmp_path / "a.nii")
    assert nib.load(tmp_path / "a.nii").get_data_dtype() == np.int16
    found = load_volume(tmp_path / "a.nii", t1(scaling="none")).ravel()
    np.testing.assert_allclose(found, np.arange(210) / 2 + 3, atol=2e-3)  # nibabel chose its own slope to write with


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
def test_a_constant_volume_becomes_zero(nifti, value):
    found = load_volume(nifti("a.nii", np.full((37, 45, 29), value, np.float32)), t1((24, 17, 11)))
    assert np.abs(found).max() < 0.1  # not rounding blown up to a standard deviation of 1


def test_a_last_axis_of_one_is_three_dimensional(nifti):
    data = np.random.default_rng(0).uniform(1, 2, (6, 7, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(load_volume(nifti("a.nii", data), t1(scaling="none")), data[..., 0], atol=1e-6)


ORIENTATIONS = ["LAS", "PSR", "ILA", "SPL"]


def stored_as(data, affine, codes):
    """The same brain with its array axes in another order, and the affine that says so."""
    ornt = nib.orientations.axcodes2ornt(codes)
    image = nib.Nifti1Image(data, affine).as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), ornt)
    )
    assert "".join(nib.aff2axcodes(image.affine)) == codes
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_order_of_the_axes_in_the_file_does_not_matter(nifti, codes):
    affine = np.array([[2.0, 0.1, 0, -9], [-0.1, 2, 0, 4], [0, 0.05, 3, 1], [0, 0, 0, 1]])  # slightly oblique RAS
    data = np.random.default_rng(0).uniform(1, 9, (9, 8, 10)).astype(np.float32)
    expected = load_volume(nifti("ras.nii", data, affine), t1())
    other = nifti("other.nii", *stored_as(data, affine, codes))
    np.testing.assert_allclose(load_volume(other, t1()), expected, atol=1e-5)
    assert np.abs(load_volume(other, t1(orientation="as_stored")) - expected).max() > 0.1


def test_orientation_4d(nifti):
    data = np.random.default_rng(0).uniform(1, 9, (4, 3, 5, 6)).astype(np.float32)
    expected = load_volume(nifti("ras.nii", data), fmri())
    other = nifti("other.nii", *stored_as(data, np.eye(4), "PSR"))
    np.testing.assert_allclose(load_volume(other, fmri()), expected, atol=1e-6)


# 4D


@pytest.mark.parametrize(
    ("frames", "within", "between", "starts"),
    [
        (4, 1, 1.0, [0]),
        (11, 1, 1.0, [0, 4]),
        (12, 1, 1.0, [0, 4, 8]),
        (8, 1, 0.5, [0, 2, 4]),
        (6, 1, 0.01, [0, 1, 2]),  # at least one frame apart
        (15, 2, 1.0, [0, 8]),  # a window reaches over 3·2 + 1 = 7 frames, the next begins 8 later
        (3, 1, 1.0, []),
        (6, 2, 1.0, []),
    ],
)
def test_windows(nifti, frames, within, between, starts):
    config = fmri(stride_within_seq=within, stride_between_seq=between, scaling="none")
    assert num_windows(frames, config) == len(starts)
    path = nifti("a.nii.gz", np.ones((4, 3, 5, 1), np.float32) * np.arange(1, frames + 1, dtype=np.float32))
    for window, start in enumerate(starts):
        found = load_volume(path, config, window)
        assert found[0, 0, 0].tolist() == [1 + start + within * k for k in range(4)]
    with pytest.raises(DataError, match=f"window {len(starts)}" if starts else f"{frames} frames; expected at least"):
        load_volume(path, config, len(starts))


def brain_run():
    """A brain in the middle, zeros and some negative noise around it."""
    data = np.zeros((4, 3, 5, 4), np.float32)
    data[1:3, 1:, 1:4] = np.random.default_rng(0).uniform(100, 300, (2, 2, 3, 4))
    data[0, 0, 0] = -2
    return data


@pytest.mark.parametrize("scaling", ["none", "minmax", "znorm_zeroback", "znorm_minback"])
def test_scalings_4d(nifti, scaling):
    data = brain_run()
    brain = data[data > 0]
    z = (data - brain.mean()) / brain.std()
    expected = {
        "none": data,
        "minmax": data / brain.max(),
        "znorm_zeroback": np.where(data > 0, z, 0),
        "znorm_minback": np.where(data > 0, z, z[data > 0].min()),
    }[scaling]
    found = load_volume(nifti("a.nii", data), fmri(scaling=scaling))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("scaling", ["none", "minmax", "znorm_zeroback", "znorm_minback"])
def test_pad_and_crop_are_centred_with_the_background(nifti, scaling):
    path = nifti("a.nii", brain_run())
    same = load_volume(path, fmri(scaling=scaling))
    found = load_volume(path, fmri((7, 3, 2, 4), scaling=scaling))  # 4 -> 7 pads 1 and 2; 5 -> 2 crops 1 and 2
    np.testing.assert_array_equal(found[1:5], same[:, :, 1:3])
    background = same.min() if scaling == "znorm_minback" else 0
    assert (found[[0, 5, 6]] == background).all()


# What is refused


def one_fault(path, config):
    with pytest.raises(DataError) as caught:
        load_volume(path, config)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{path}: ")
    return fault


def test_missing(tmp_path):
    assert "not found" in one_fault(tmp_path / "none.nii.gz", t1())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_gzip(nifti, share):
    path = nifti("a.nii.gz", (20, 20, 20))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot be read" in one_fault(path, t1())


@pytest.mark.parametrize("damage", ["zlib", "header", "short", "text"])
def test_damaged(nifti, damage):
    path = nifti("a.nii.gz", (20, 20, 20))
    content = bytearray(path.read_bytes())
    if damage == "zlib":
        content[200:260] = b"\xff" * 60
    elif damage == "header":
        content = bytearray(gzip.compress(b"\0" * 1000))
    elif damage == "short":
        content = bytearray(gzip.compress(gzip.decompress(content)[:-100]))
    else:
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\n")
    path.write_bytes(content)
    assert "cannot be read" in one_fault(path, t1())


def test_wrong_rank(nifti):
    assert "shape (6, 7, 5); expected 4 axes" in one_fault(nifti("three.nii", (6, 7, 5)), fmri())
    assert "shape (4, 3, 5, 6); expected 3 axes" in one_fault(nifti("four.nii", (4, 3, 5, 6)), t1())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("shape", "config"), [((6, 7, 5), t1()), ((4, 3, 5, 4), fmri())])
def test_not_finite(nifti, value, shape, config):
    data = np.ones(shape, np.float32)
    data[1, 2, :2] = value
    count = data[1, 2, :2].size
    assert f"{count} voxels are NaN or infinite" in one_fault(nifti("a.nii", data), config)


def test_empty_brain(nifti):
    assert "no voxel is above 0" in one_fault(nifti("four.nii", np.zeros((4, 3, 5, 4), np.float32)), fmri())
    empty = nifti("three.nii", np.zeros((6, 7, 5), np.float32))
    assert "no voxel is above 0" in one_fault(empty, t1(scaling="minmax"))


def test_complex_voxels(nifti):
    assert "expected real numbers" in one_fault(nifti("a.nii", np.ones((6, 7, 5), np.complex64)), t1())


# All at once


def test_check_volumes_counts_windows(nifti, modalities):
    images = [Image(nifti("r.nii.gz", (4, 3, 5, 9)), "rsfMRI"), Image(nifti("t.nii", (6, 7, 5)), "T1")]
    found = check_volumes([*images, *images], modalities, threads=2)
    assert list(found.items()) == [(images[0], 2), (images[1], 1)]


def test_check_volumes_looks_at_every_overlapping_window(nifti):
    config = fmri(stride_between_seq=0.5)  # windows start at 0, 2, 4, 6
    for frame in (0, 5, 9):
        data = np.ones((4, 3, 5, 10), np.float32)
        assert check_volumes([Image(nifti("good.nii.gz", data), "fMRI")], {"fMRI": config}, 1).popitem()[1] == 4
        data[0, 0, 0, frame] = np.nan
        with pytest.raises(DataError, match="1 voxels are NaN"):
            check_volumes([Image(nifti("bad.nii.gz", data), "fMRI")], {"fMRI": config}, 1)


def test_check_volumes_reads_each_image_once(nifti, modalities, monkeypatch):
    loads = []
    original = nib.load
    monkeypatch.setattr(nib, "load", lambda path, **kw: loads.append(path) or original(path, **kw))
    images = [Image(nifti(f"{i}.nii", (6, 7, 5)), "T1") for i in range(3)]
    check_volumes(images * 4, modalities, threads=3)
    assert sorted(loads) == sorted(i.path for i in images)


def test_check_volumes_lists_every_fault(nifti, modalities, tmp_path):
    late = np.ones((4, 3, 5, 8), np.float32)
    late[0, 0, 0, 7] = np.nan  # in the second window only
    images = [
        Image(tmp_path / "none.nii.gz", "T1"),
        Image(nifti("good.nii", (6, 7, 5)), "T1"),
        Image(nifti("three.nii", (6, 7, 5)), "rsfMRI"),
        Image(nifti("short.nii", (4, 3, 5, 2)), "rsfMRI"),
        Image(nifti("late.nii.gz", late), "rsfMRI"),
    ]
    with pytest.raises(DataError) as caught:
        check_volumes(images, modalities, threads=2)
    bad = [images[i].path for i in (0, 2, 3, 4)]
    assert len(caught.value.faults) == 4
    assert all(fault.startswith(f"{path}: ") for fault, path in zip(caught.value.faults, bad, strict=True))
