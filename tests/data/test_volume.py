"""Volumes: the same numbers as the original's preprocessing, for any axis order of the file; bad files are rejected."""

import gzip
import itertools
import re
import tracemalloc
import weakref
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

import umbrella_jax.data.volume
import umbrella_jax.data.voxels
from umbrella_jax.config.schema import ORIENTATIONS as ORIENTATIONS_48
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import prefetch
from umbrella_jax.data.volume import (
    area_weights,
    axis_codes,
    check_volumes,
    load_volume,
    num_windows,
    open_volume,
    preprocess,
    reading_memory,
    resample,
    restore,
    restoring_memory,
)
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.html.slices import preprocessed_geometry

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


@pytest.mark.parametrize("scaling", ["none", "znorm", "minmax"])
@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR", "ILA", "SPL"])
@pytest.mark.parametrize("size", [(8, 6, 7), (24, 13, 9), (12, 9, 10)])  # from (12, 9, 10) in RAS
def test_live_against_monai_in_any_orientation(nifti, codes, size, scaling):
    """MONAI reorients, resizes and scales int16 volumes, both to RAS and as stored."""
    transforms = pytest.importorskip("monai.transforms")
    meta_tensor = pytest.importorskip("monai.data").MetaTensor
    ras = np.random.default_rng(0).integers(-50, 900, (12, 9, 10)).astype(np.int16)
    data, affine = stored_as(ras, np.diag([1.5, 2, 3, 1]), codes)
    path = nifti("a.nii.gz", data, affine)
    for orientation in ("RAS", "as_stored"):
        expected = meta_tensor(data[None].astype(np.float32), affine=affine)
        if orientation == "RAS":
            expected = transforms.Orientation("RAS", labels=None)(expected)
        expected = transforms.Resize(size, mode="area")(expected)
        if scaling == "znorm":
            expected = transforms.NormalizeIntensity()(expected)
        elif scaling == "minmax":
            expected = expected / expected.max()
        expected = expected[0].numpy()
        volume = load_volume(path, t1(size, orientation=orientation, scaling=scaling))
        np.testing.assert_allclose(volume, expected, atol=1e-5 * max(1, np.abs(expected).max()))


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
    np.testing.assert_allclose(found, np.arange(210) / 2 + 3, atol=2e-3)  # nibabel chooses its own slope when it writes


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
def test_a_constant_volume_becomes_zero(nifti, value):
    found = load_volume(nifti("a.nii", np.full((37, 45, 29), value, np.float32)), t1((24, 17, 11)))
    assert np.abs(found).max() < 0.1  # rounding must not be scaled to a standard deviation of 1


def test_a_last_axis_of_one_is_three_dimensional(nifti):
    data = np.random.default_rng(0).uniform(1, 2, (6, 7, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(load_volume(nifti("a.nii", data), t1(scaling="none")), data[..., 0], atol=1e-6)


# 3D, one voxel size


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SRA"])
@pytest.mark.parametrize(
    ("shape", "zooms", "spacing", "size"),
    [
        ((20, 17, 11), (1, 1.5, 4), 2.0, (16, 16, 24)),  # larger, larger, smaller voxels; padded on every axis
        ((3, 40, 2), (0.2, 1, 1.1), 5, (1, 8, 4)),  # less than half a voxel becomes one voxel
    ],
)
def test_pad_against_jax(nifti, shape, zooms, spacing, size, codes):
    """jax.image resamples with antialiasing, and NumPy pads."""
    data = np.random.default_rng(0).uniform(1, 900, shape).astype(np.float32)
    numbers = [max(round(n * zoom / spacing), 1) for n, zoom in zip(shape, zooms, strict=True)]
    scale = np.array(zooms, np.float32) / spacing
    # jax.image centres voxel k at (k + 1/2 - translation) / scale; this translation aligns the centres of both fields
    translation = np.array(numbers, np.float32) / 2 - scale * np.array(shape, np.float32) / 2
    resample = jax.jit(jax.image.scale_and_translate, static_argnums=(1, 2, 5))  # one program, not one per operation
    resampled = resample(data, tuple(numbers), (0, 1, 2), scale, translation, "linear")
    before = [(s - n) // 2 for s, n in zip(size, numbers, strict=True)]
    width = [(b, s - n - b) for b, s, n in zip(before, size, numbers, strict=True)]
    expected = np.pad(np.asarray(resampled), width)
    path = nifti("a.nii", *stored_as(data, np.diag([*zooms, 1]), codes))
    volume = load_volume(path, t1(size, mode="pad", spacing=spacing, scaling="none"))
    assert volume.flags.c_contiguous
    np.testing.assert_allclose(volume, expected, atol=2e-5 * 900)
    if codes == "RAS":
        same = load_volume(path, t1(size, mode="pad", spacing=spacing, scaling="none", orientation="as_stored"))
        np.testing.assert_array_equal(same, volume)
    z = load_volume(path, t1(size, mode="pad", spacing=spacing))  # over the whole volume, padding included
    np.testing.assert_allclose(z, (expected - expected.mean()) / expected.std(), atol=1e-5)
    share = load_volume(path, t1(size, mode="pad", spacing=spacing, scaling="minmax"))
    np.testing.assert_allclose(share, expected / expected.max(), atol=2e-5)


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SRA"])
@pytest.mark.parametrize(
    ("zooms", "size"), [((2, 2, 2), (9, 8, 12)), ((6, 4, 2), (32, 25, 11)), ((4, 4, 3), (18, 15, 19))]
)
def test_pad_against_monai(nifti, zooms, size, codes):
    """Only to smaller or equal voxels, since MONAI does not antialias; its scale_extent keeps the centre."""
    transforms = pytest.importorskip("monai.transforms")
    meta_tensor = pytest.importorskip("monai.data").MetaTensor
    ras = np.random.default_rng(0).uniform(1, 9, (9, 7, 10)).astype(np.float32)
    data, affine = stored_as(ras, np.diag([*zooms, 1.0]), codes)
    expected = transforms.Orientation("RAS", labels=None)(meta_tensor(data[None], affine=affine))
    spacing = transforms.Spacing((2.0,) * 3, mode="bilinear", padding_mode="border", scale_extent=True)
    expected = transforms.ResizeWithPadOrCrop(size)(spacing(expected))
    path = nifti("a.nii", data, affine)
    volume = load_volume(path, t1(size, mode="pad", scaling="none"))
    np.testing.assert_allclose(volume, expected[0].numpy(), atol=1e-5 * 9)
    expected = transforms.NormalizeIntensity()(expected)[0].numpy()
    np.testing.assert_allclose(load_volume(path, t1(size, mode="pad")), expected, atol=1e-5)


def test_pad_does_not_move_voxels_of_the_right_size(nifti):
    """This holds even if they cannot be exactly centred."""
    data = np.random.default_rng(0).uniform(1, 9, (5, 7, 6)).astype(np.float32)
    found = load_volume(nifti("a.nii", data, np.diag([2, 2, 2, 1])), t1((6, 8, 9), mode="pad", scaling="none"))
    np.testing.assert_array_equal(found, np.pad(data, [(0, 1), (0, 1), (1, 2)]))


def test_pad_keeps_shape_and_position_of_a_ball_that_resize_distorts(nifti):
    """The ball is 30 mm wide at (12, -8, 5) mm, sampled with thick slices and with small voxels."""
    for zooms, shape in [((1, 1, 5), (120, 100, 20)), ((3, 2, 2), (40, 50, 50))]:
        axes = [(np.arange(n) - (n - 1) / 2) * zoom for n, zoom in zip(shape, zooms, strict=True)]
        x, y, z = np.meshgrid(*axes, indexing="ij")
        ball = np.exp(-((x - 12) ** 2 + (y + 8) ** 2 + (z - 5) ** 2) / 2 / 15**2).astype(np.float32)
        path = nifti("a.nii", ball, np.diag([*zooms, 1]))
        volume = load_volume(path, t1((80, 80, 80), mode="pad", scaling="none"))
        grid = np.moveaxis(np.indices(volume.shape), 0, -1) * 2 - 79.0
        weights = (volume / volume.sum())[..., None]
        middle = (weights * grid).sum((0, 1, 2))
        np.testing.assert_allclose(middle, [12, -8, 5], atol=0.3)
        width = np.sqrt((weights * (grid - middle) ** 2).sum((0, 1, 2)))
        np.testing.assert_allclose(width, 15, atol=0.5)


@pytest.mark.parametrize("scaling", ["none", "znorm", "minmax"])
def test_the_amount_of_air_around_a_brain_does_not_matter(nifti, scaling):
    data = np.zeros((9, 9, 10), np.float32)
    data[2:-2, 1:-1, 3:-3] = np.random.default_rng(0).uniform(1, 9, (5, 7, 4))  # the edge of the field is air
    affine = np.diag([2, 3, 1.5, 1])
    config = t1((8, 9, 7), mode="pad", spacing=3, scaling=scaling)
    close = load_volume(nifti("close.nii", data, affine), config)
    wide = np.pad(data, [(3, 3), (2, 2), (40, 40)])  # 2, 2 and 20 voxels of 3 mm
    np.testing.assert_allclose(load_volume(nifti("wide.nii", wide, affine), config), close, atol=1e-5)


def test_voxels_of_a_brain_are_not_cropped(nifti):
    data = np.zeros((10, 8, 6), np.float32)
    data[2:8, 1:7, 1:5] = np.random.default_rng(0).uniform(1, 9, (6, 6, 4))
    path = nifti("a.nii", data, np.diag([2, 2, 2, 1]))
    volume = load_volume(path, t1((6, 6, 6), mode="pad", scaling="none"))
    np.testing.assert_array_equal(volume, data[2:8, 1:7])
    fault = one_fault(path, t1((5, 6, 6), mode="pad"))  # 10 - 5 leaves out 2 and 3
    assert fault == (
        f"{path}: 24 voxels above 0 (of 2×2×2 mm) lie outside the central 10×12×12 mm; expected a larger size or "
        "spacing of the modality, or a volume without the rest of the body and with a background of 0"
    )
    assert "outside the central 9×9×9 mm" in one_fault(path, t1((6, 6, 6), mode="pad", spacing=1.5))
    load_volume(path, t1((6, 6, 6), mode="pad", spacing=2.5))


def header_with(path, pixdim=(2, 3, 4), units="mm", qform=1, sform=0, header_class=nib.Nifti1Header):
    """Write ones of shape (6, 7, 5) with a header that nibabel has not repaired."""
    header = header_class()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((6, 7, 5))
    affine = np.diag([2.0, 3, 4, 1])
    header.set_qform(affine, qform)
    header.set_sform(affine, sform)
    header["xyzt_units"] = units if isinstance(units, int) else nib.nifti1.unit_codes[units]
    header["pixdim"][1:4] = pixdim
    header["vox_offset"] = header.sizeof_hdr + 4
    path.write_bytes(header.binaryblock + bytes(4) + b"" * 210)
    return path


@pytest.mark.parametrize("header_class", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize(
    ("fields", "zooms"),
    [
        ({}, (2, 3, 4)),
        ({"pixdim": (-2, 3, 4)}, (2, 3, 4)),
        ({"qform": 0}, (2, 3, 4)),  # only the orientation is unknown
        ({"pixdim": (0, 0, 0), "sform": 1}, (2, 3, 4)),  # the sform has the sizes
        ({"pixdim": (9, 9, 9), "sform": 1}, (2, 3, 4)),
        ({"pixdim": (2000, 3000, 4000), "units": "micron"}, (2, 3, 4)),
        ({"pixdim": (0.002, 0.003, 0.004), "units": "meter"}, (2, 3, 4)),
        ({"units": "unknown"}, (2, 3, 4)),
        ({"units": 4}, (2, 3, 4)),  # not a unit of NIfTI
        ({"pixdim": (2, 0, 4)}, "2 × 0 × 4"),
        ({"pixdim": (2, np.nan, 4), "qform": 0}, "2 × nan × 4"),
        ({"pixdim": (2, np.inf, 4), "qform": 0}, "2 × inf × 4"),
        ({"units": "micron", "pixdim": (0.5, 0.5, 0.5)}, "0.0005 × 0.0005 × 0.0005"),
    ],
)
def test_voxel_sizes(tmp_path, header_class, fields, zooms):
    path = header_with(tmp_path / "a.nii", header_class=header_class, **fields)
    config = {"orientation": "as_stored", "scaling": "none", "spacing": 1, "mode": "pad"}
    if isinstance(zooms, str):
        assert one_fault(path, t1(**config)) == (
            f"{path}: no voxel sizes: its header says {zooms} mm, which is not from 0.001 to 1000; use a file with "
            "voxel sizes, or set mode: resize for the modality"
        )
        load_volume(path, t1(orientation="as_stored"))
    else:
        volume = load_volume(path, t1((30, 30, 30), **config))
        assert [len(np.unique(axis)) for axis in np.nonzero(volume)] == [12, 21, 20]


# Intensities far from 0, or close to it


def z_scores(values):
    values = np.asarray(values, np.float64)
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("factor", [1e-30, 1e-24, 1e-19, 1e-3, 1e12])
def test_the_unit_of_intensities_does_not_matter(nifti, factor):
    """Squares of 1e-24 are 0 in float32, which must not make these volumes count as constant."""
    for shape, config in (((9, 10, 7), t1()), ((4, 3, 5, 4), fmri())):
        data = np.random.default_rng(0).uniform(1, 9, shape)
        expected = load_volume(nifti("a.nii", data.astype(np.float32)), config)
        found = load_volume(nifti("b.nii", (data * factor).astype(np.float32)), config)
        assert expected.std() > 0.9
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("offset", [-1e6, 1e6, 1e9])
@pytest.mark.parametrize("half", [0.5, 0.01, 1e-3])
def test_small_differences_far_from_0(nifti, offset, half):
    """A volume of 1e6 ± 0.5 must not count as constant."""
    data = offset + half * np.sign(np.random.default_rng(0).normal(size=(12, 14, 10)))
    data[0, 0, 0] += half  # break the symmetry
    path = nifti("a.nii", data)
    weights = [area_weights(n, out).astype(np.float64) for n, out in zip(data.shape, (6, 7, 5), strict=True)]
    expected = z_scores(np.einsum("abc,ia,jb,kc->ijk", data - offset, *weights))
    np.testing.assert_allclose(load_volume(path, t1()), expected, atol=1e-3)


def test_small_differences_in_a_run(nifti):
    data = 1e6 + 0.5 * np.sign(np.random.default_rng(0).normal(size=(4, 3, 5, 4)))
    np.testing.assert_allclose(
        load_volume(nifti("a.nii", data), fmri()), z_scores(data), atol=0.05
    )  # 8 steps of float32


@pytest.mark.parametrize("value", [1e-24, 0.1, 7.3, 1e6 + 0.5, 3e9])
def test_constant_volumes_stay_constant(nifti, value):
    """Rounding by resampling is not a signal."""
    for shape, size in (((37, 45, 29), (24, 17, 11)), ((12, 10, 9), (16, 13, 20))):
        assert np.abs(load_volume(nifti("a.nii", np.full(shape, value)), t1(size))).max() <= max(1e-6 * value, 1e-6)
    assert not load_volume(nifti("b.nii", np.full((4, 3, 5, 4), value)), fmri()).any()


# Orientation


def rotation(x, y):
    """Return the rotation by degrees about x, then about y."""
    x, y = np.deg2rad((x, y))
    about_x = [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]]
    about_y = [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]]
    return np.array(about_y) @ about_x


@pytest.mark.parametrize("angles", [(0, 0), (20, -30)])
def test_all_48_orders_and_directions_of_axes_against_nibabel(nifti, angles):
    data = np.random.default_rng(0).integers(1, 900, (6, 7, 5)).astype(np.int16)
    affine = np.eye(4)
    affine[:3, :3] = rotation(*angles) @ np.diag([1, 2, 3])
    seen = set()
    for axes, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = affine.copy()
        turned[:3, :3] = affine[:3, axes] * signs
        path = nifti("a.nii", data, turned)
        expected = nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
        image, config = open_voxels(path), t1(expected.shape, scaling="none")
        np.testing.assert_array_equal(load_volume(path, config), expected)
        assert axis_codes(image, config) == "RAS"
        stored = t1(orientation="as_stored", scaling="none")
        np.testing.assert_array_equal(load_volume(path, stored), data)
        seen.add(codes := "".join(nib.aff2axcodes(turned)))
        assert axis_codes(image, stored) == codes
    assert len(seen) == 48


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize(("shape", "config"), [((6, 7, 5), t1), ((4, 3, 5, 4), fmri)])
def test_nifti_without_orientation(tmp_path, kind, shape, config):
    path = tmp_path / ("a.img" if kind is nib.Nifti1Pair else "a.nii")
    data = np.ones(shape, np.float32)
    for qform, sform in [(1, 0), (0, 1), (0, 0)]:
        image = kind(data, np.eye(4))
        image.set_qform(np.eye(4), qform)
        image.set_sform(np.eye(4), sform)
        nib.save(image, path)
        stored = config(orientation="as_stored", scaling="none")
        np.testing.assert_array_equal(load_volume(path, stored), data)
        if qform or sform:
            load_volume(path, config())
            assert axis_codes(open_voxels(path), stored) == "RAS"
    assert one_fault(path, config()) == (
        f"{path}: no orientation: its qform_code and sform_code are 0; use NIfTI with a valid qform or sform, or set "
        "orientation: as_stored for the modality"
    )
    assert axis_codes(open_voxels(path), stored) is None


@pytest.mark.parametrize("fault", [0, np.nan, np.inf])
def test_an_invalid_affine(nifti, fault):
    affine = np.eye(4)
    affine[1, 1] = fault
    path = nifti("a.nii", (6, 7, 5), np.eye(4))
    image = nib.load(path)
    content = bytearray(path.read_bytes())
    content[280:328] = affine[:3].astype("<f4").tobytes()  # srow_x, srow_y, srow_z
    path.write_bytes(content)
    which = "is singular" if fault == 0 else "holds NaN or infinity"
    assert f"no orientation: its sform (code 2) {which}; " in one_fault(path, t1())
    load_volume(path, t1(orientation="as_stored", mode="pad"))  # pixdim still has the voxel sizes
    stored = t1(orientation="as_stored", scaling="none")
    np.testing.assert_array_equal(load_volume(path, stored), image.get_fdata(dtype=np.float32))
    assert axis_codes(open_voxels(path), stored) is None


LAS, RAS = np.diag([-2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
DIAGONAL = np.array([[2**0.5, -(2**0.5), 0, 0], [2**0.5, 2**0.5, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])  # by 45°
TURNED = np.array([[0, 2.0, 0, 0], [-2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])


def contradictory(path, qform=(None, 0), sform=(None, 0), header_class=nib.Nifti1Header, more=0, **fields):
    """Write a file with both forms (matrix, code) and other fields as given, and `more` bytes after its voxels."""
    header = header_class()
    header.set_data_dtype(np.int16)
    header.set_data_shape((6, 7, 5))
    header["pixdim"][1:4] = 2
    header["vox_offset"] = header.sizeof_hdr + 4
    header.set_qform(*qform)
    header.set_sform(RAS if sform[0] is None else sform[0], 1)
    header["sform_code"] = sform[1]
    for name, value in fields.items():
        header[name] = value
    data = np.arange(1, 211, dtype=np.int16).tobytes()
    content = header.binaryblock + bytes(4) + data + bytes(more)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


SINGULAR = np.diag([0.0, 0, 0, 1])
BOTH = {"qform": (RAS, 1), "sform": (RAS, 1)}
CONTRADICTIONS = [
    (BOTH, "RAS", None),
    ({"qform": (RAS, 1), "sform": (RAS * 1.0005, 4)}, "RAS", None),
    (
        {"qform": (LAS, 1), "sform": (RAS, 2)},
        "RAS",
        "its qform (code 1) says LAS, its sform (code 2) says RAS: they disagree about left and right; the sform",
    ),
    (
        {"qform": (np.diag([-2, -2, 2, 1]), 1), "sform": (RAS, 1)},
        "RAS",
        "its qform (code 1) says LPS, its sform (code 1) says RAS: they disagree about left and right and about front "
        "and back; the sform is used",
    ),
    (
        {"qform": (TURNED, 1), "sform": (LAS, 1)},
        "LAS",
        "its qform (code 1) says PRS, its sform (code 1) says LAS: they disagree about the order of axes; the sform is "
        "used",
    ),
    ({"qform": (DIAGONAL, 1), "sform": (DIAGONAL, 4)}, "RAS", None),  # rounding turns the qform into PRS
    (
        {"qform": (LAS, 1), "sform": (SINGULAR, 1)},
        "LAS",
        "its sform (code 1) is singular; its qform (code 1), LAS, is used",
    ),
    (
        {"qform": (LAS, 3), "sform": (LAS * np.nan, 1)},
        "LAS",
        "its sform (code 1) holds NaN or infinity; its qform (code 3), LAS, is used",
    ),
    (
        {"qform": (LAS, 1), "sform": (RAS, 77)},
        "LAS",
        "sform_code is 77, which NIfTI does not define; its qform (code 1), ",
    ),
    (
        BOTH | {"quatern_b": 2},
        "RAS",
        "the quaternion of its qform (code 1) is not a rotation; its sform (code 1), RAS, is",
    ),
    (
        {"qform": (RAS, 1), "sform": (RAS / 2, 1)},
        "RAS",
        "pixdim says voxels of 2 × 2 × 2, its sform 1 × 1 × 1; the sform is used",
    ),
    (BOTH | {"bitpix": 32}, "RAS", "bitpix is 32, but datatype is int16; datatype is used"),
    (BOTH | {"scl_slope": np.inf}, "RAS", "scl_slope is infinite; voxels are read without scaling"),
    (BOTH | {"xyzt_units": 5}, "RAS", "xyzt_units has the unit of length 5, which NIfTI does not define; mm is used"),
    (BOTH | {"more": 420 * 3 + 5}, "RAS", "room for 3 more volumes follows its voxels: dim in its header may be wrong"),
    (BOTH | {"more": 419}, "RAS", None),
    (BOTH | {"vox_offset": 0}, "RAS", "vox_offset is 0; voxels are read from byte "),
]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("header_class", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize(("fields", "codes", "remark"), CONTRADICTIONS)
def test_a_header_that_contradicts_itself(tmp_path, header_class, name, fields, codes, remark):
    path = contradictory(tmp_path / name, header_class=header_class, **fields)
    image = open_voxels(path)
    assert axis_codes(image, t1(orientation="as_stored")) == codes
    data = np.arange(1, 211).reshape((6, 7, 5), order="F")
    np.testing.assert_array_equal(image.read(0), data)
    volume = load_volume(path, t1(scaling="none"))
    np.testing.assert_array_equal(volume, data[::-1] if codes == "LAS" else data)
    image.check_end()
    image.check_end()
    assert len(image.remarks) == (remark is not None)
    assert not remark or image.remarks[0].startswith(remark)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"qform": (LAS, 0)}, "no orientation: its qform_code and sform_code are 0"),
        ({"qform": (LAS, 0), "sform": (SINGULAR, 1)}, "no orientation: its sform (code 1) is singular"),
        (
            {"qform": (LAS, 1), "quatern_c": np.nan, "sform": (RAS, 9)},
            "no orientation: sform_code is 9, which NIfTI does not define; its qform (code 1) holds NaN or infinity",
        ),
        # nibabel reads it as +1, NIfTI's library as -1
        (
            {"qform": (LAS, 1), "pixdim": [-2, 2, 2, 2, 1, 1, 1, 1]},
            "no orientation: pixdim[0], which its qform (code 1) ",
        ),
        (BOTH | {"vox_offset": 100}, "vox_offset: 100 is within the header, which ends at byte "),
        (BOTH | {"vox_offset": 100, "magic": b"ni1"}, "vox_offset: 100 is within the header, which ends at byte "),
        (BOTH | {"dim": [8, 6, 7, 5, 1, 1, 1, 1]}, "dim[0], its number of axes, is 8; NIfTI has 1 to 7"),
        (
            BOTH | {"datatype": 3},
            "cannot be read: HeaderDataError: data code 3 not recognized; expected another header",
        ),
    ],
)
def test_a_header_without_a_valid_orientation(tmp_path, fields, reason):
    assert one_fault(contradictory(tmp_path / "a.nii", **fields), t1()).startswith(f"{tmp_path / 'a.nii'}: {reason}")


def test_an_mgh_file_without_valid_geometry(tmp_path):
    """If goodRASFlag is 0, nibabel assumes FreeSurfer's own axes and voxels of 1 mm; we report both as unknown."""
    path = tmp_path / "a.mgh"
    nib.save(nib.MGHImage(np.ones((6, 7, 5), np.float32), np.diag([2.0, 2, 2, 1])), path)
    assert axis_codes(open_voxels(path), t1()) == "RAS"
    content = bytearray(path.read_bytes())
    content[28:30] = b"\0\0"
    path.write_bytes(content)
    assert "no orientation: its goodRASFlag is 0; " in one_fault(path, t1())
    assert "no voxel sizes: its goodRASFlag is 0; " in one_fault(path, t1(orientation="as_stored", mode="pad"))
    load_volume(path, t1(orientation="as_stored"))


def test_arrays_have_neither_orientation_nor_voxel_sizes(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((6, 7, 5)))
    assert axis_codes(open_voxels(tmp_path / "a.npy"), t1(orientation="as_stored")) is None
    with pytest.raises(DataError) as caught:
        load_volume(tmp_path / "a.npy", t1(mode="pad"))
    assert [fault.partition("; ")[0] for fault in caught.value.faults] == [
        f"{tmp_path / 'a.npy'}: no orientation: .npy and .pt arrays do not hold one",
        f"{tmp_path / 'a.npy'}: no voxel sizes: .npy and .pt arrays do not hold one",
    ]


def test_all_48_orientations_of_a_modality(nifti):
    """Volumes agree with nibabel's `as_reoriented`, maps return to their voxels, and pages use the same geometry."""
    ras = np.random.default_rng(0).integers(1, 900, (6, 7, 5)).astype(np.int16)
    data, affine = stored_as(ras, np.diag([2.0, 4, 4, 1]), "PIR")
    path = nifti("a.nii", data, affine)
    image, cubes = open_voxels(path), {"mode": "pad", "spacing": 1, "scaling": "none"}
    canonical = load_volume(
        path, t1((28,) * 3, **cubes)
    )  # 12 × 28 × 20 voxels of 1 mm, with an even number of voxels around them
    for orientation in sorted(ORIENTATIONS_48):
        expected, turned = stored_as(data, affine, orientation)
        config = t1(expected.shape, scaling="none", orientation=orientation)
        volume = load_volume(path, config)
        np.testing.assert_array_equal(volume, expected)
        assert axis_codes(image, config) == "".join(nib.aff2axcodes(turned)) == orientation
        np.testing.assert_array_equal(restore(path, volume, config), data)
        stored = ("PIR", (4.0, 4.0, 2.0), data.shape)
        assert preprocessed_geometry(*stored, config) == (orientation, tuple(nib.affines.voxel_sizes(turned)))
        turn = nib.orientations.axcodes2ornt(orientation)
        there = nib.apply_orientation(load_volume(path, t1((28,) * 3, orientation=orientation, **cubes)), turn)
        np.testing.assert_allclose(there, canonical, atol=1e-3)
    assert len(ORIENTATIONS_48) == 48


@pytest.mark.parametrize("orientation", ["ras", "RA", "RAL", "RASL", "", "stored", "XYZ"])
def test_an_invalid_orientation(orientation):
    with pytest.raises(ConfigError, match=f"orientation {orientation}: expected as_stored, or three codes such as RAS"):
        t1(orientation=orientation)


ORIENTATIONS = ["LAS", "PSR", "ILA", "SPL"]


def stored_as(data, affine, codes):
    """Return the same brain with its array axes in another order, and the affine for it."""
    ornt = nib.orientations.axcodes2ornt(codes)
    image = nib.Nifti1Image(data, affine).as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), ornt)
    )
    assert "".join(nib.aff2axcodes(image.affine)) == codes
    return np.ascontiguousarray(image.dataobj), image.affine


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_order_of_the_axes_in_the_file_does_not_matter(nifti, codes):
    affine = np.array([[2.0, 0.1, 0, -9], [-0.1, 2, 0, 4], [0, 0.05, 3, 1], [0, 0, 0, 1]])  # slightly oblique RAS
    data = np.random.default_rng(0).uniform(1, 9, (9, 8, 10)).astype(np.float32)
    other = nifti("other.nii", *stored_as(data, affine, codes))
    padded = t1((12, 13, 20), mode="pad")  # each axis is padded by an odd number of voxels
    np.testing.assert_allclose(
        load_volume(other, padded), load_volume(nifti("ras.nii", data, affine), padded), atol=1e-5
    )
    expected = load_volume(nifti("ras.nii", data, affine), t1())
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
        (15, 2, 1.0, [0, 8]),  # a window spans 3·2 + 1 = 7 frames, and the next one begins 8 frames later
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
    """Return a run with a brain in the middle, and zeros and some negative noise around it."""
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
    volume = load_volume(nifti("a.nii", data), fmri(scaling=scaling))
    assert volume.dtype == np.float32
    assert volume.flags.c_contiguous
    np.testing.assert_allclose(volume, expected, atol=1e-5)


@pytest.mark.parametrize("scaling", ["none", "minmax", "znorm_zeroback", "znorm_minback"])
def test_pad_and_crop_are_centred_with_the_background(nifti, scaling):
    path = nifti("a.nii", brain_run())
    same = load_volume(path, fmri(scaling=scaling))
    found = load_volume(path, fmri((7, 3, 2, 4), scaling=scaling))  # 4 -> 7 pads 1 and 2; 5 -> 2 crops 1 and 2
    np.testing.assert_array_equal(found[1:5], same[:, :, 1:3])
    background = same.min() if scaling == "znorm_minback" else 0
    assert (found[[0, 5, 6]] == background).all()


@pytest.mark.parametrize("codes", ["RAS", "PSR"])
@pytest.mark.parametrize("size", [(7, 3, 8, 4), (4, 5, 3, 4), (4, 1, 5, 4), (6, 5, 7, 4)])  # from (4, 3, 5)
@pytest.mark.parametrize("scaling", ["none", "minmax", "znorm_zeroback", "znorm_minback"])
def test_live_against_monai_4d(nifti, codes, size, scaling):
    transforms = pytest.importorskip("monai.transforms")
    data = np.zeros((4, 3, 5, 9), np.float32)
    data[:3, :, 1:] = np.random.default_rng(0).uniform(100, 300, (3, 3, 4, 9))
    path = nifti("a.nii.gz", *stored_as(data, np.diag([3, 3, 4, 1]), codes))
    frames = np.moveaxis(data[..., 4:8], -1, 0)  # the second window; MONAI's channels are the frames
    background = 0.0
    if scaling == "minmax":
        frames = frames / frames.max()
    elif scaling != "none":
        brain = frames > 0
        frames = transforms.NormalizeIntensity(nonzero=True)(frames).numpy()
        background = frames[brain].min() if scaling == "znorm_minback" else 0.0
        frames = np.where(brain, frames, background)
    expected = transforms.ResizeWithPadOrCrop(size[:3], constant_values=background)(frames)
    volume = load_volume(path, fmri(size, scaling=scaling), 1)
    np.testing.assert_allclose(volume, np.moveaxis(expected.numpy(), 0, -1), atol=1e-5 * max(1, float(expected.max())))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_only_the_window_of_a_run_is_read(nifti, name):
    """The first window can be read although the rest is lost: the gzip stream ends early, the plain file has zeros."""
    data = np.random.default_rng(0).uniform(1, 9, (4, 3, 5, 4000)).astype(np.float32)
    path = nifti(name, data)
    content = path.read_bytes()
    half = content[: len(content) // 2]
    path.write_bytes(half if name == "a.nii.gz" else half.ljust(len(content), b"\0"))
    config = fmri(scaling="none")
    image = open_volume(path, config)
    np.testing.assert_array_equal(preprocess(path, image, config), data[..., :4])
    if name == "a.nii.gz":
        with pytest.raises(DataError, match="cannot be read: EOFError"):
            image.check_end()
    with pytest.raises(DataError, match="cannot be read" if name == "a.nii.gz" else "no voxel is above 0"):
        load_volume(path, fmri(scaling="none"), 999)


def test_integers_are_not_converted_before_they_are_averaged(nifti):
    path = nifti("a.nii.gz", np.ones((6, 7, 5), np.int16))
    assert open_voxels(path).read(0).dtype == np.int16
    assert load_volume(path, t1()).dtype == np.float32


# What a modality says


def test_modes():
    assert (t1().mode, t1().spacing) == ("resize", None)
    assert (t1(mode="pad").spacing, t1(mode="pad", spacing=1.25).spacing) == (2.0, 1.25)
    assert (fmri().mode, fmri(mode="pad").spacing) == ("pad", None)


@pytest.mark.parametrize(
    ("make", "fields", "fault"),
    [
        (fmri, {"mode": "resize"}, "mode resize: expected pad for 4D volumes"),
        (fmri, {"spacing": 2.0}, "spacing 2.0: only 3D volumes with mode pad are brought to one voxel size"),
        (t1, {"spacing": 2.0}, "spacing 2.0: only 3D volumes with mode pad are brought to one voxel size"),
        *[
            (t1, {"mode": "pad", "spacing": s}, f"spacing: expected 0.001 to 1000 mm, got {s}")
            for s in (0, -1.0, np.inf, np.nan, 1e-9)
        ],
    ],
)
def test_invalid_modes(make, fields, fault):
    with pytest.raises(ConfigError) as caught:
        make(**fields)
    assert caught.value.faults == (fault,)


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
        content = bytearray(b"<!DOCTYPE html>\n")
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
    assert re.search(rf"{count} voxels? (is|are) NaN or infinite", one_fault(nifti("a.nii", data), config))


def test_empty_brain(nifti):
    assert "no voxel is above 0" in one_fault(nifti("four.nii", np.zeros((4, 3, 5, 4), np.float32)), fmri())
    empty = nifti("three.nii", np.zeros((6, 7, 5), np.float32))
    assert "no voxel is above 0" in one_fault(empty, t1(scaling="minmax"))


def test_complex_voxels(nifti):
    assert "expected real numbers" in one_fault(nifti("a.nii", np.ones((6, 7, 5), np.complex64)), t1())


# Checking all volumes


def test_blas_uses_one_thread_while_volumes_are_prepared(nifti, modalities):
    """The limit holds in the threads that prepare them, and ends with them."""
    blas = ThreadpoolController().select(user_api="blas")
    threads = []

    def work(_):
        threads.extend(library.get_num_threads() for library in blas.lib_controllers)
        return 1

    images = [Image(nifti(f"{i}.nii", (6, 7, 5)), "T1") for i in range(3)]
    with blas.limit(limits=2):
        check_volumes(images, modalities, 2, lambda path, config: work(path))
        batches = prefetch(work, 0, 3, 2)
        assert list(batches) == [1] * 3
        assert set(threads) == {1}
        threads.clear()
        work(None)
        assert set(threads) == {2}


MEMORY = {
    "integers with a scale": (np.int16, 2.5, 0, (64, 64, 64), t1((32, 32, 32))),
    "floats with a scale": (np.float64, 2.5, 0, (64, 64, 64), t1((32, 32, 32))),
    "small differences": (np.float64, 1, 1e7, (64, 64, 64), t1((32, 32, 32))),
    "negative": (np.float32, 1, -100, (64, 64, 64), t1((32, 32, 32))),
    "padded": (np.float64, 2.5, 0, (64, 64, 64), t1((32, 32, 32), mode="pad", spacing=8.0, background="lowest")),
    "larger than the file": (np.float64, 1, 0, (8, 8, 8), t1((64, 64, 64))),
    "a window": (np.float64, 2.5, 0, (32, 32, 16, 24), fmri((32, 32, 16, 12))),
    "every other frame": (np.float64, 2.5, 0, (32, 32, 16, 24), fmri((32, 32, 16, 12), stride_within_seq=2)),
    "negative window": (np.float64, 2.5, -100, (32, 32, 16, 24), fmri((48, 48, 16, 12), background="lowest")),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", MEMORY)
def test_reading_takes_no_more_memory_than_the_header_says(tmp_path, kind, suffix):
    dtype, slope, mean, shape, config = MEMORY[kind]
    values = mean + np.abs(np.random.default_rng(0).normal(0, 20 if mean < 1e6 else 1, shape))
    content = nib.Nifti1Image(values.astype(dtype), np.diag([4.0, 4, 4, 1])).to_bytes()
    header = nib.Nifti1Header(content[:348])
    header.set_slope_inter(slope, 0)
    content = header.binaryblock + content[348:]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content, 1) if suffix == ".nii.gz" else content)
    bound, peak = reading_memory(open_volume(path, config), config), traced_peak(lambda: load_volume(path, config))
    assert bound / 16 < peak < bound
    peak = traced_peak(lambda: restore(path, np.ones(config.size, np.float32), config))
    assert peak < restoring_memory(shape, config)


def traced_peak(work):
    """The memory in bytes that `work()` adds at its peak."""
    work()
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


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
        with pytest.raises(DataError, match="1 voxel is NaN"):
            check_volumes([Image(nifti("bad.nii.gz", data), "fMRI")], {"fMRI": config}, 1)


def test_check_volumes_reads_each_image_once(nifti, modalities, monkeypatch):
    loads = []
    original = umbrella_jax.data.voxels._kind
    monkeypatch.setattr(umbrella_jax.data.voxels, "_kind", lambda path, *_: loads.append(path) or original(path, *_))
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


def test_a_faulty_file_is_not_kept_open(nifti, modalities, monkeypatch):
    """A thousand open files would exhaust the limit of the process, and later good files would seem unreadable."""
    opened, held = [], []
    original = umbrella_jax.data.volume.open_voxels

    def counted(path, *more):
        held.append(sum(reference() is not None for reference in opened))
        image = original(path, *more)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(umbrella_jax.data.volume, "open_voxels", counted)
    images = [Image(nifti(f"{i}.nii.gz", np.full((6, 7, 5), np.nan, np.float32)), "T1") for i in range(6)]
    with pytest.raises(DataError):
        check_volumes(images, modalities, threads=1)
    assert len(held) == 6
    assert max(held) <= 1
