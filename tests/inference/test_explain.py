"""Tests of attribution maps: the properties of each method, and that maps match the scan's voxels."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from tests.helpers.golden_case import golden_batch, golden_model
from tests.helpers.small_run import write_volume
from tests.helpers.strict import strict_promotion  # noqa: F401  # for every test here
from tests.helpers.training_case import QUICK
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import Conversation, Image, Message
from umbrella_jax.data.volume import load_volume, open_volume, restore, window_stride
from umbrella_jax.errors import ConfigError
from umbrella_jax.inference import attribution as module
from umbrella_jax.inference.attribution import gradient, integrated, log_probability, occlusion
from umbrella_jax.inference.explain import Explanation, explain
from umbrella_jax.inference.processor import Processor
from umbrella_jax.models import abstract_params


@pytest.fixture(scope="module", autouse=True)
def quick():
    patch = pytest.MonkeyPatch()
    plain = log_probability.__wrapped__
    options = {"static_argnames": ("graphdef",), "compiler_options": QUICK}
    patch.setattr(module, "log_probability", jax.jit(plain, **options))
    patch.setattr(module, "value_and_slope", jax.jit(jax.value_and_grad(plain), **options))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def case():
    """Return row 3 of the golden batch, which shows a volume of each modality, with params and graphdef."""
    config, params = golden_model()
    batch = jax.tree.map(jnp.asarray, golden_batch([3]))
    background = {name: jnp.full_like(x, x.min()) for name, x in batch.volumes.items()}
    f = partial(module.log_probability, params=params, batch=batch, graphdef=abstract_params(config)[0])
    return batch, background, params, abstract_params(config)[0], f


def test_gradient_is_the_slope(case):
    batch, background, params, graphdef, f = case
    maps = gradient(batch.volumes, background, params, batch, graphdef=graphdef)
    for name, x in batch.volumes.items():
        voxel = np.unravel_index(np.abs(maps[name]).argmax(), x.shape)
        step = 1e-2 * float(x.std())
        up, down = (f(batch.volumes | {name: x.at[voxel].add(sign * step)}) for sign in (1, -1))
        slope = float(maps[name][voxel]) / float(x[voxel] - background[name][voxel])
        assert slope == pytest.approx(float(up - down) / (2 * step), rel=2e-2)


def test_integrated_gradients_are_complete(case):
    """Their sum is what the volumes add to the log-probability (Sundararajan et al. 2017, proposition 1)."""
    batch, background, params, graphdef, f = case
    maps = integrated(batch.volumes, background, params, batch, graphdef=graphdef, steps=64)
    added = float(f(batch.volumes)) - float(f(background))
    assert sum(float(m.sum()) for m in maps.values()) == pytest.approx(added, rel=1e-2)
    assert abs(added) > 0.01


def test_occlusion_is_the_drop_when_a_box_is_hidden(case):
    batch, background, params, graphdef, f = case
    windows = {"T1": (11, 10, 9), "rsfMRI": (12, 8, 5, 6)}  # which leave smaller boxes at the ends
    maps = occlusion(batch.volumes, background, params, batch, graphdef=graphdef, windows=windows)
    x, box = batch.volumes["T1"], (0, slice(11, 20), slice(0, 10), slice(9, 16))
    hidden = f(batch.volumes | {"T1": x.at[box].set(background["T1"][box])})
    np.testing.assert_allclose(maps["T1"][box].sum(), f(batch.volumes) - hidden, rtol=1e-3)
    assert len(np.unique(maps["T1"][box])) == 1
    assert len(np.unique(maps["T1"])) == 2 * 2 * 2 + 1
    assert not maps["T1"][:, :, 20:].any(), "no patch reaches there"
    assert len(np.unique(maps["rsfMRI"])) == 2


OBLIQUE = np.array([[0, 2.0, 0.1, -9], [-1.5, 0, 0, 4], [0, 0.1, 3.0, 7], [0, 0, 0, 1]])


def scan(path: Path, shape: tuple[int, ...], affine: np.ndarray = OBLIQUE) -> Path:
    data = np.random.default_rng(0).uniform(1, 9, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.mark.parametrize(
    "config",
    [
        ModalityConfig(size=(6, 5, 4), patch=(3, 5, 2), scaling="none"),
        ModalityConfig(size=(14, 15, 16), patch=(7, 5, 2), scaling="none"),
        ModalityConfig(size=(30, 30, 30), patch=(5, 5, 5), scaling="none", mode="pad", spacing=2.0),
        ModalityConfig(size=(6, 5, 4), patch=(3, 5, 2), scaling="none", orientation="as_stored"),
    ],
    ids=["smaller", "larger", "pad", "as stored"],
)
def test_restoring_is_the_transpose_of_preprocessing(tmp_path: Path, config: ModalityConfig) -> None:
    """⟨P x, m⟩ = ⟨x, Pᵀ m⟩ for the linear map P from the stored voxels to the model's, so each voxel of the scan gets
    just what its share in the model's voxels earns it."""
    path = scan(tmp_path / "x.nii", (9, 10, 7))
    stored = np.asarray(nib.load(path).dataobj)
    values = np.random.default_rng(1).normal(size=config.size).astype(np.float32)
    made = restore(path, values, config)
    assert made.shape == stored.shape
    assert (made * stored).sum() == pytest.approx((load_volume(path, config) * values).sum(), rel=1e-4)


def test_restoring_a_window_of_a_run(tmp_path: Path) -> None:
    config = ModalityConfig(size=(8, 8, 8, 3), patch=(4, 4, 4, 3), scaling="none", stride_within_seq=2)
    path = scan(tmp_path / "x.nii", (6, 10, 5, 12))
    values = np.random.default_rng(1).normal(size=config.size).astype(np.float32)
    made, stored = restore(path, values, config, window=1), np.asarray(nib.load(path).dataobj)
    assert (made * stored).sum() == pytest.approx((load_volume(path, config, 1) * values).sum(), rel=1e-4)
    first = window_stride(config)
    assert np.flatnonzero(made.any((0, 1, 2))).tolist() == [first, first + 2, first + 4]


def test_a_point_comes_back_to_where_it_was(tmp_path: Path) -> None:
    """A single bright voxel in a scan with permuted and flipped axes comes back to its place."""
    data = np.ones((9, 10, 7), np.float32)
    data[2, 7, 5] = 50
    path = write_volume(tmp_path / "x.nii", data.shape, values=data)
    nib.save(nib.Nifti1Image(data, OBLIQUE), path)
    config = ModalityConfig(size=(5, 5, 5), patch=(5, 5, 5), scaling="none")
    assert open_volume(path, config).shape == data.shape
    made = restore(path, load_volume(path, config) - 1, config)
    voxel = np.unravel_index(made.argmax(), made.shape)
    assert np.abs(np.array(voxel) - (2, 7, 5)).max() <= 2
    assert made[2, 7, 5] > 0


PIXDIM = [-1, 2000, 1500, 3000, 720, 1, 1, 1]
SHIFTED = OBLIQUE - np.eye(4, k=3)


def written(folder: Path, scan: Path, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """The header of a map of ones over a scan."""
    name, window = ("rsfMRI", (4,)) if len(shape) > 3 else ("T1", ())
    config = ModalityConfig(size=(3, 5, 7, *window), patch=(3, 5, 7, *window), orientation="as_stored")
    processor = Processor(SimpleNamespace(chat_template=None), {name: config})
    image = Image(scan, name)
    (path,) = Explanation("a", 0, 0, {image: np.ones(config.size, np.float32)}).write(processor, folder / "maps")
    made = nib.load(path)
    assert made.shape == shape
    assert made.get_data_dtype() == np.float32
    return made.header


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.img"])
@pytest.mark.parametrize("header_class", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("shape", [(9, 10, 7), (9, 10, 7, 6)])
@pytest.mark.parametrize(("qform", "sform"), [(1, 4), (3, 0), (0, 0)])
def test_a_map_has_the_geometry_of_its_scan(
    tmp_path: Path, name: str, header_class: Any, shape: tuple[int, ...], qform: int, sform: int
) -> None:
    """Forms that differ, both codes, microns, and a repetition time in milliseconds; nothing else of its header."""
    header = header_class()
    header.set_data_shape(shape)
    header.set_xyzt_units("micron", "msec")
    header.set_qform(OBLIQUE * 1000, qform)
    header.set_sform(SHIFTED * 1000, sform)
    header["pixdim"] = PIXDIM
    header["pixdim"][0] = np.sign(np.linalg.det(OBLIQUE[:3, :3]))
    header["descrip"] = b"sub-01, 1970-01-01"
    kinds = {nib.Nifti1Header: (nib.Nifti1Image, nib.Nifti1Pair), nib.Nifti2Header: (nib.Nifti2Image, nib.Nifti2Pair)}
    kind = kinds[header_class][name == "x.img"]
    nib.save(kind(np.ones(shape, np.int16), None, header), tmp_path / name)
    seen, made = nib.load(tmp_path / name).header, written(tmp_path, tmp_path / name, shape)
    assert isinstance(made, header_class)
    np.testing.assert_array_equal(made["pixdim"][: 1 + len(shape)], seen["pixdim"][: 1 + len(shape)])
    for field in ("xyzt_units", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z"):
        np.testing.assert_array_equal(made[field], seen[field], field)
    assert made["pixdim"][4] == 720 or len(shape) == 3
    assert made["descrip"].item() == b""


@pytest.mark.parametrize("name", ["x.mgz", "x.mgh"])
@pytest.mark.parametrize("shape", [(9, 10, 7), (9, 10, 7, 6)])
def test_a_map_of_an_mgh(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    turned = np.array([[0, 2.0, 0, -9], [-1.5, 0, 0, 4], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    scan = nib.MGHImage(np.ones(shape, np.float32), turned)
    if len(shape) == 4:
        scan.header.set_zooms((1.5, 2, 3, 720))  # ms
    nib.save(scan, tmp_path / name)
    made = written(tmp_path, tmp_path / name, shape)
    for form, code in (made.get_qform(True), made.get_sform(True)):
        assert code == 1
        np.testing.assert_allclose(form, turned, atol=1e-5)
    assert made.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(made.get_zooms(), (1.5, 2, 3, 0.72)[: len(shape)], atol=1e-6)


def test_a_map_of_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((9, 10, 7), np.float32))
    made = written(tmp_path, tmp_path / "x.npy", (9, 10, 7))
    assert (made["qform_code"], made["sform_code"]) == (0, 0)


def test_a_method_that_does_not_exist_is_refused() -> None:
    messages = (Message("user", (Image(Path("x.nii"), "T1"), "Which?")), Message("assistant", ("",)))
    with pytest.raises(ConfigError, match="method: expected one of gradient, integrated, occlusion, got 'saliency'"):
        explain(None, None, Conversation("x", None, messages, {}, "x"), method="saliency")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_map_is_placed_like_its_scan(tmp_path: Path, kind: Any) -> None:
    """This holds even if the scan's header lacks an orientation, so that a viewer must assume one."""
    config = ModalityConfig(size=(3, 5, 7), patch=(3, 5, 7), orientation="as_stored")
    processor = Processor(SimpleNamespace(chat_template=None), {"T1": config})
    for affine in (OBLIQUE, None):
        scan = kind(np.random.default_rng(0).uniform(1, 9, (9, 10, 7)).astype(np.float32), affine)
        if affine is None:
            scan.header.set_zooms((1.5, 2, 3))
        nib.save(scan, tmp_path / "x.nii")
        image = Image(tmp_path / "x.nii", "T1")
        (path,) = Explanation("a", 0, 0, {image: np.ones(config.size, np.float32)}).write(processor, tmp_path)
        seen, made = nib.load(tmp_path / "x.nii"), nib.load(path)
        np.testing.assert_allclose(made.affine, seen.affine, atol=1e-6)
        if affine is None:
            assert (made.header["qform_code"], made.header["sform_code"]) == (0, 0)
