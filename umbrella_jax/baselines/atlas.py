"""Regions of an atlas, and their mean signals in a run.

Axes: R regions, V voxels of a grid, T frames.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from umbrella_jax.baselines.frames import read_frames
from umbrella_jax.console import plural
from umbrella_jax.data.tables import check_columns, read_table
from umbrella_jax.data.voxels import Voxels, map_header, open_voxels
from umbrella_jax.errors import ConfigError, DataError

COORDINATES = ("dosenbach_2010", "power_2011", "seitzman_2018")
"""Atlases of spheres in MNI space that nilearn has in its package."""
RADIUS = 5.0
"""Radius of a sphere in mm, if the atlas states none."""
_LARGEST_LABEL = np.iinfo(np.int32).max
_SPACE = re.compile(r"(?:^|_)space-([0-9A-Za-z+]+)(?=_|$)")
_SCANNER, _MNI = 1, 4
"""NIfTI's codes of a coordinate system: of the scanner, and MNI152."""


@dataclass(frozen=True)
class Atlas:
    """Regions, given by an image of labels or by spheres."""

    name: str
    regions: tuple[str, ...]
    labels: nib.Nifti1Image | None = None
    """int [D, H, W], where voxels of region i have `values[i]`; None for spheres."""
    values: tuple[int, ...] = ()
    centres: np.ndarray | None = None
    """float [R, 3], in mm of MNI space; None for an image of labels."""
    radii: np.ndarray | None = None
    """float [R], in mm."""
    in_mni: bool = False
    """Whether it is known to be in MNI space."""

    def weights(self, shape: tuple[int, ...], affine: np.ndarray) -> csr_array:
        """Return the matrix [R, V] that maps the voxels of a grid, in C order, to the mean of each region.

        An image of labels on another grid is resampled by nilearn to the nearest voxel. A sphere holds the voxels
        whose centres are within its radius, and the one nearest to its centre. Regions outside the grid have rows of 0.
        """
        members = self._in_labels(shape, affine) if self.labels is not None else self._in_spheres(shape, affine)
        rows = np.repeat(np.arange(len(members)), [len(voxels) for voxels in members])
        shares = np.concatenate([np.full(len(voxels), 1 / max(len(voxels), 1)) for voxels in members])
        return csr_array((shares, (rows, np.concatenate(members))), (len(members), int(np.prod(shape))))

    def _in_labels(self, shape: tuple[int, ...], affine: np.ndarray) -> list[np.ndarray]:
        assert self.labels is not None
        labels = self.labels
        if labels.shape != shape or not np.allclose(labels.affine, affine, atol=1e-3):
            from nilearn.image import resample_to_img
            from nilearn.image.resampling import BoundingBoxError

            grid = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
            try:
                labels = resample_to_img(labels, grid, interpolation="nearest", force_resample=True, copy_header=True)
            except BoundingBoxError:  # they share no voxel
                return [np.zeros(0, int)] * len(self.values)
        flat = np.asarray(labels.dataobj).reshape(-1)
        order = np.argsort(flat, kind="stable")
        starts, ends = (np.searchsorted(flat[order], self.values, side) for side in ("left", "right"))
        return [order[start:end] for start, end in zip(starts, ends, strict=True)]

    def _in_spheres(self, shape: tuple[int, ...], affine: np.ndarray) -> list[np.ndarray]:
        assert self.centres is not None
        assert self.radii is not None
        indices = np.indices(shape).reshape(3, -1).T
        near = cKDTree(nib.affines.apply_affine(affine, indices)).query_ball_point(self.centres, self.radii)
        nearest = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), self.centres)).astype(int)
        inside = ((nearest >= 0) & (nearest < shape)).all(1)
        own = np.ravel_multi_index(tuple(np.where(inside[:, None], nearest, 0).T), shape)
        return [
            np.unique([*voxels, voxel] if is_inside else voxels).astype(int)
            for voxels, voxel, is_inside in zip(near, own, inside, strict=True)
        ]


def read_atlas(name: str | Path) -> Atlas:
    """Read an atlas: one of COORDINATES, or a file with an image of labels, 0 outside all regions.

    The regions of a file are named by the table of the same name in .tsv, if there is one, with the columns `index`
    and `name` of BIDS.

    Raises:
        ConfigError, DataError: there is no such file or atlas, or it is not an image of at least two labels, with an
            orientation.
    """
    if str(name) in COORDINATES:
        return _spheres(str(name))
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"atlas: {path}: not found; expected an image of labels or one of {', '.join(COORDINATES)}")
    voxels = open_voxels(path)
    if len(voxels.shape) < 3 or any(n != 1 for n in voxels.shape[3:]):
        raise ConfigError(f"atlas: {path}: shape {voxels.shape}; expected one volume of labels")
    if voxels.affine is None:
        raise ConfigError(f"atlas: {path}: no orientation: {voxels.why_no_affine}")
    data = voxels.read(0).reshape(voxels.shape[:3])
    voxels.check_end()
    values = np.unique(data)
    wrong = ~np.isfinite(values) | (values != np.rint(values)) | (values < 0) | (values > _LARGEST_LABEL)
    if wrong.any():
        raise ConfigError(
            f"atlas: {path}: {values[wrong][0]:.10g} is no label; expected whole numbers from 0 to {_LARGEST_LABEL}"
        )
    labels = tuple(int(value) for value in values if value)
    if len(labels) < 2:
        raise ConfigError(f"atlas: {path}: {plural(len(labels), 'label')} other than 0; expected at least 2")
    names = _region_names(path)
    image = nib.Nifti1Image(data.astype(np.int32), voxels.affine)
    regions = tuple(names.get(label, str(label)) for label in labels)
    return Atlas(path.name, regions, image, labels, in_mni=bool(is_in_mni(path, voxels)[0]))


def _region_names(path: Path) -> Mapping[int, str]:
    """Return {label: name} of the table beside an atlas; empty without one."""
    table_path = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".tsv")
    if not table_path.is_file():
        return {}
    table = read_table(table_path)
    check_columns(table, ("index", "name"))
    return {int(row["index"]): row["name"] for _, row in table.rows if row["index"].isdecimal()}


def _spheres(name: str) -> Atlas:
    from nilearn import datasets

    fetched = getattr(datasets, f"fetch_coords_{name}")()
    centres = np.asarray(fetched.rois[["x", "y", "z"]], np.float64)
    radii = np.asarray(fetched.get("radius", np.full(len(centres), RADIUS)), np.float64)
    regions = tuple(f"({x:g}, {y:g}, {z:g})" for x, y, z in centres)
    return Atlas(name, regions, centres=centres, radii=radii, in_mni=True)


def space_of(path: Path) -> str | None:
    """Return the label of the entity `space` of a BIDS name; None without one."""
    match = _SPACE.search(path.name.split(".")[0])
    return match[1] if match else None


def is_in_mni(path: Path, scan: Voxels) -> tuple[bool | None, str]:
    """Return whether a scan is in MNI space, None if nothing states it, and the reason.

    The entity `space` of a BIDS name decides; without one, the code of the header's coordinate system.
    """
    if (space := space_of(path)) is not None:
        return space.startswith("MNI"), f"its name has space-{space}"
    header = map_header(scan)
    code = int(header["sform_code"]) or int(header["qform_code"])
    if code == _MNI:
        return True, "its header states MNI152"
    if code == _SCANNER:
        return False, "its header states the scanner's coordinates"
    return None, "neither its name (space-MNI…) nor its header (code 4) states MNI space"


def mean_signals(scan: Voxels, weights: csr_array, path: Path) -> np.ndarray:
    """Return the mean signal of each region in all frames of a run, float64 [T, R].

    Raises DataError if a voxel of a region is not finite.
    """
    signals = np.concatenate([(weights @ frames.reshape(-1, frames.shape[-1])).T for frames in read_frames(scan)])
    if not np.isfinite(signals).all():
        raise DataError(f"{path}: a voxel is NaN or infinite; expected finite numbers, preprocess the file again")
    return signals
