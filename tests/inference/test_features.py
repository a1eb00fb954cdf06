"""Features: the tower's own, one row per scan, and patches that can be placed in the scan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

import umbrella_jax
from tests.helpers.small_run import (
    MODALITIES,
    World,
    conversation,
    make_world,
    modalities,
    umbrella,
    write_config,
    write_json,
    write_volume,
)
from umbrella_jax.config.schema import ConfoundsConfig, DataConfig, ModalityConfig
from umbrella_jax.data.volume import load_volume, open_volume, restore, voxel_affine
from umbrella_jax.errors import ConfigError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def arrays(world: World) -> dict[str, np.ndarray]:
    """Write features of the base with patches, in batches that the scans do not fill."""
    out = world.root / "features.npz"
    data = DataConfig(train=str(world.train), eval=str(world.eval), image_root=str(world.root / "scans"))
    options: dict[str, Any] = {"modalities": modalities(), "allow_untrained": True, "batch_size": 3}
    assert umbrella_jax.features(world.base, out, data, patches=True, **options) == 8
    assert out.stat().st_mode & 0o077 == 0
    with np.load(out) as file:
        return dict(file)


def test_each_scan_has_the_towers_features(world: World, arrays: dict[str, np.ndarray]) -> None:
    model = umbrella_jax.load(world.base, modalities=modalities(), allow_untrained=True)
    assert len(set(arrays["scan"])) == len(arrays["features"]) == 8
    assert list(arrays["modality"]) == ["T1"] * 4 + ["rsfMRI"] * 4
    assert sorted(arrays["split"]) == ["eval"] + ["train"] * 7  # only the last run is new in eval
    for name, config in modalities().items():
        rows = np.flatnonzero(arrays["modality"] == name)
        volumes = np.stack([load_volume(arrays["scan"][row], config) for row in rows])
        tower = nnx.jit(model.vision_tower, static_argnums=0)  # for each operation a program of its own, otherwise
        expected = np.asarray(tower(name, jnp.asarray(volumes)))
        np.testing.assert_allclose(arrays[f"patches_{name}"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays["features"][rows], expected.mean(1), rtol=1e-4, atol=1e-5)
        assert arrays[f"grid_{name}"].prod() == expected.shape[1]


def test_the_projector_gives_what_the_language_model_sees(world: World, tmp_path: Path) -> None:
    """Use the command line, float16 and other conversations."""
    turns = [("user", ["sMRI:2.nii.gz", "Which sex?"]), ("assistant", ["left."])]
    one = write_json(tmp_path / "one.json", [conversation("a", "T1", turns, metadata={"subject_id": "sub-S7"})])
    config = write_config(tmp_path / "run.yaml", {"model": {"modalities": MODALITIES}})
    out = tmp_path / "projected.npz"
    flags = ["--data", one, "--image-root", world.root / "scans", "--config", config, "--allow-untrained", "--float16"]
    said = umbrella("features", world.base, *flags, "--layer", "projector", "--out", out)
    assert said == f"{out}: 1 scans\n  contains participant data: handle it like the scans\n"
    model = umbrella_jax.load(world.base, modalities=modalities(), allow_untrained=True)
    volume = load_volume(world.root / "scans" / "2.nii.gz", modalities()["T1"])
    with np.load(out) as file:
        assert file["subject"] == ["S7"]
        assert file["features"].dtype == np.float16
        expected = model.image_features("T1", volume[None]).mean(1)
        np.testing.assert_allclose(file["features"], expected, rtol=2e-3, atol=1e-3)
        assert not [name for name in file if name.startswith("patches")]


@pytest.mark.parametrize(
    ("shape", "zooms", "config"),
    [
        ((12, 9, 10), (1.0, 2.0, 1.5), ModalityConfig(size=(6, 3, 5), patch=(2, 1, 5))),
        ((12, 9, 10), (1.0, 2.0, 1.5), ModalityConfig(size=(8, 12, 12), patch=(4, 3, 4), mode="pad", spacing=1.5)),
        ((7, 6, 9, 4), (2.0, 2.0, 3.0), ModalityConfig(size=(6, 8, 6, 4), patch=(2, 2, 3, 2))),
    ],
)
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR"])
def test_the_affine_places_voxels_in_the_scan(
    tmp_path: Path, shape: tuple[int, ...], zooms: tuple[float, ...], config: ModalityConfig, orientation: str
) -> None:
    """The file's voxels of which one preprocessed voxel is made have their centre of mass where the affine puts it."""
    path = tmp_path / "scan.nii"
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = (-10, 5, 20)
    values = np.random.default_rng(0).uniform(1, 9, shape).astype(np.float32)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(orientation))
    nib.save(nib.Nifti1Image(values, affine).as_reoriented(turn), path)
    config = replace(config, orientation="RAS", background=0.0 if config.mode == "pad" else "auto")
    scan = open_volume(path, config)
    found, file_affine = voxel_affine(scan, config), scan.affine
    assert found is not None
    assert file_affine is not None
    for index in [(2, 2, 2), (4, 1, 3)]:
        one = np.zeros(config.size, np.float32)
        one[index] = 1
        share = restore(path, one, config)
        share = share.sum(-1) if share.ndim == 4 else share
        centre = (np.indices(share.shape).reshape(3, -1) * share.reshape(-1)).sum(1) / share.sum()
        np.testing.assert_allclose(found @ [*index, 1], file_affine @ [*centre, 1], atol=0.05)


def test_patches_are_placed_at_their_middle(world: World, arrays: dict[str, np.ndarray]) -> None:
    """The first patch covers 3 × 2 × 4 resized voxels, each as large as 9/6 × 8/7 × 7/5 of the file's voxels."""
    for row in np.flatnonzero(arrays["modality"] == "T1"):
        placed = arrays["affine"][row] @ [0, 0, 0, 1]
        middle = [3 * 9 / 6 / 2 - 0.5, 2 * 8 / 7 / 2 - 0.5, 4 * 7 / 5 / 2 - 0.5]
        file_affine = nib.load(arrays["scan"][row]).affine
        if file_affine[0, 0] < 0:  # stored as LAS
            middle[0] = 8 - middle[0]
        np.testing.assert_allclose(placed, file_affine @ [*middle, 1], atol=1e-6)


def test_wrong_arguments_are_reported_together(world: World, arrays: dict[str, np.ndarray]) -> None:
    """Before anything is read; tests/test_docs.py takes the data of a run."""
    flags = ["features", world.base, "--config", world.config, "--allow-untrained", "--out"]
    assert "features.npz: already exists" in umbrella(*flags, world.root / "features.npz", code=2)
    assert "expected conversations (--data PATH)" in umbrella(*flags, world.root / "none.npz", code=2)
    with pytest.raises(ConfigError, match=r"(?s)layer: expected.*dtype: expected.*batch_size.*ends in .npz"):
        umbrella_jax.features(world.base, "x", layer="head", dtype="int8", batch_size=0)  # type: ignore[arg-type]


def test_subjects_of_references_are_told_apart(world: World, tmp_path: Path) -> None:
    turns = [
        ("user", ["sMRI:0.nii.gz", "A reference."]),
        ("assistant", ["left."]),
        ("user", ["sMRI:sub-9_T1w.nii.gz", "And this?"]),
        ("assistant", ["right."]),
    ]
    write_volume(tmp_path / "sub-9_T1w.nii.gz", (9, 8, 7))
    (tmp_path / "0.nii.gz").write_bytes((world.root / "scans" / "0.nii.gz").read_bytes())
    data = write_json(
        tmp_path / "pair.json", [conversation("a", "T3", turns, metadata={"subject_id": "9", "reference_id": "4"})]
    )
    out = tmp_path / "pair.npz"
    umbrella_jax.features(world.base, out, DataConfig(eval=str(data)), modalities=modalities(), allow_untrained=True)
    with np.load(out) as file:
        assert dict(zip(file["scan"], file["subject"], strict=True)) == {
            str(tmp_path / "0.nii.gz"): "4",
            str(tmp_path / "sub-9_T1w.nii.gz"): "9",
        }


def test_runs_with_confounds_need_a_cache(world: World, tmp_path: Path) -> None:
    """Each would be cleaned twice otherwise, and a 3D scan has none."""
    runs = {"rsfMRI": replace(modalities()["rsfMRI"], confounds=ConfoundsConfig())}
    data = DataConfig(eval=str(world.eval), image_root=str(world.root / "scans"))
    options: dict[str, Any] = {"modalities": modalities() | runs, "allow_untrained": True}
    with pytest.raises(ConfigError, match=r"model.modalities.rsfMRI.confounds: .* data.cache \(--cache DIR\)"):
        umbrella_jax.features(world.base, tmp_path / "features.npz", data, **options)
