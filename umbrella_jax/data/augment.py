"""Change preprocessed training volumes at random: one draw per conversation, applied to each of its images.

    augmentation = draw_augmentation(config.data.augment, np.random.default_rng([seed, epoch, conversation, 1]))
    volume = augmentation.apply(volume, axes, image)

A FLIP TURNS LEFT INTO RIGHT. It shows a lesion of the left side on the right, while the conversation still says
"left". Leave `left_right_flip` and `flip_any_axis` off if any text mentions sides.

If the orientation is known, flips, motion and bias field act on the axes in the order R, A, S, so that images with
different storage orders get the same changes. Otherwise they act on the axes of the array.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from umbrella_jax.config.schema import AugmentConfig
from umbrella_jax.errors import DataError

_REMEDY = "expected a format that holds it (NIfTI, .mgz), or data.augment.left_right_flip: 0"
_DEGREE = 3
"""Degree of the bias field's polynomial."""
# The degrees of each term along the three axes. The constant term is `intensity_scale`.
_TERMS = [degrees for degrees in product(range(_DEGREE + 1), repeat=3) if 0 < sum(degrees) <= _DEGREE]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Drawn parameters, shared by all images of a conversation. The defaults change nothing. Hashable."""

    left_right: bool = False
    flip_axis: int | None = None
    """Axis 0, 1 or 2; a flip along axis 0 undoes a left–right flip."""
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Degrees about axes 0, 1, 2, in this order, right-handed, about the centre of the array."""
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Voxels along axes 0, 1, 2, after the rotation."""
    bias: tuple[float, ...] = (0.0,) * len(_TERMS)
    """Coefficients of the log bias field."""
    intensity: float = 1.0
    """Factor of the intensity."""
    noise: float = 0.0
    """Standard deviation of the noise, as a fraction of the volume's."""
    noise_seed: int = 0

    def apply(
        self, volume: np.ndarray, axes: str | None, image: int = 0, *, background: float | None = None
    ) -> np.ndarray:
        """Apply flips, rigid motion, bias field and intensity, then noise.

        Args:
            volume: preprocessed, float32 (D, H, W) or (D, H, W, T); not written to. All frames get the same
                changes, except for noise.
            axes: orientation of the three spatial axes, as `"".join(nibabel.aff2axcodes(affine))`; None if unknown.
            image: index of the image in its conversation; each image has its own noise.
            background: value outside the brain; default the minimum, 0 after `znorm_zeroback`. Motion fills with it,
                and bias field and intensity leave it unchanged.

        Returns:
            float32 C-contiguous array of the same shape; `volume` itself if nothing changes.

        Raises:
            DataError: a left–right flip of a volume with unknown `axes`. `check_axes` reports this before a run starts,
                with the file's name.
        """
        if self == Augmentation():
            return volume
        if self.left_right and axes is None:
            raise DataError(f"left_right_flip: the volume's orientation is unknown; {_REMEDY}")
        std = volume.std() if self.noise else 0
        fill = volume.min() if background is None else np.float32(background)
        stored, canonical = (nib.orientations.axcodes2ornt(a) for a in (axes or "RAS", "RAS"))
        volume = nib.apply_orientation(volume, stored)
        if self.left_right:
            volume = np.flip(volume, 0)
        if self.flip_axis is not None:
            volume = np.flip(volume, self.flip_axis)
        if any(self.rotation) or any(self.translation):
            volume = self._apply_motion(volume, fill)
        if any(self.bias) or self.intensity != 1:
            volume = self._apply_intensity(volume, fill)
        if self.noise:
            noise = np.random.default_rng([self.noise_seed, image]).standard_normal(volume.shape, np.float32)
            noise *= self.noise * std
            noise += volume
            volume = noise
        back = nib.orientations.ornt_transform(canonical, stored)
        return np.ascontiguousarray(nib.apply_orientation(volume, back))

    def _apply_motion(self, volume: np.ndarray, fill: np.float32) -> np.ndarray:
        """Apply one rigid motion to every frame, with linear interpolation; voxels from outside the array get
        `fill`."""
        inverse = Rotation.from_euler("xyz", self.rotation, degrees=True).as_matrix().T
        centre = (np.array(volume.shape[:3]) - 1) / 2
        offset = centre - inverse @ (centre + self.translation)  # output = R (input - centre) + centre + translation
        moved = np.empty(volume.shape, np.float32)
        for frame in np.ndindex(volume.shape[3:]):
            part = (..., *frame)
            voxels = np.ascontiguousarray(volume[part])  # a contiguous copy makes this twice as fast
            moved[part] = affine_transform(voxels, inverse, offset, order=1, mode="constant", cval=fill)
        return moved

    def _apply_intensity(self, volume: np.ndarray, fill: np.float32) -> np.ndarray:
        """Multiply the height above the volume's minimum by bias field and intensity. Keep voxels equal to `fill`.

        The factors apply above the minimum, because scaling has moved the zero of the scan; the minimum is air or
        nearly so. The field is exp of a third-degree polynomial (Van Leemput et al. 1999, IEEE TMI 18:885; TorchIO's
        RandomBiasField), made of Legendre polynomials over [-1, 1] along each axis, as in MONAI's RandBiasField.
        Without the constant term, the mean of its logarithm is about 0.
        """
        minimum = volume.min()
        lit = volume - minimum
        lit *= self.intensity
        if any(self.bias):
            coefficients = np.zeros((_DEGREE + 1,) * 3, np.float32)
            coefficients[tuple(np.transpose(_TERMS))] = self.bias
            lines = [np.linspace(-1, 1, n) for n in volume.shape[:3]]
            basis = [np.polynomial.legendre.legvander(line, _DEGREE).astype(np.float32) for line in lines]
            field = np.exp(np.einsum("ijk,di,hj,wk->dhw", coefficients, *basis, optimize=True))
            lit *= field.reshape(field.shape + (1,) * (volume.ndim - 3))
        lit += minimum
        if fill != minimum:
            lit[volume == fill] = fill
        return lit


def draw_augmentation(config: AugmentConfig, rng: np.random.Generator) -> Augmentation:
    """Draw the parameters of one conversation, uniform within the configured ranges.

    They depend only on `config` and the state of `rng`. All are always drawn, so switching one on does not
    change the others.
    """
    left_right, any_axis = rng.random(2)
    axis = int(rng.integers(3))
    rotation, translation = rng.uniform(-1, 1, (2, 3))
    bias = rng.uniform(-1, 1, len(_TERMS))
    low, high = config.intensity_scale
    intensity = low + (high - low) * rng.random()
    noise_seed = int(rng.integers(2**63))
    return Augmentation(
        left_right=bool(left_right < config.left_right_flip),
        flip_axis=axis if any_axis < config.flip_any_axis else None,
        rotation=tuple((rotation * config.rotation).tolist()),
        translation=tuple((translation * config.translation).tolist()),
        bias=tuple((bias * config.bias_field).tolist()),
        intensity=intensity,
        noise=config.noise,
        noise_seed=noise_seed if config.noise else 0,
    )


def examples(config: AugmentConfig) -> list[tuple[str, Augmentation]]:
    """Return (name, augmentation) for each change that is on: only this change, at its largest, for people to see."""
    changes: list[tuple[str, Augmentation]] = []
    if config.left_right_flip:
        changes.append(("left_right_flip", Augmentation(left_right=True)))
    if config.flip_any_axis:
        changes += [(f"flip_any_axis: axis {axis}", Augmentation(flip_axis=axis)) for axis in range(3)]
    if degrees := config.rotation:
        changes.append((f"rotation: {degrees:g}° about each axis", Augmentation(rotation=(degrees,) * 3)))
    if voxels := config.translation:
        changes.append((f"translation: {voxels:g} voxels along each axis", Augmentation(translation=(voxels,) * 3)))
    if config.bias_field:
        corners = config.bias_field * np.random.default_rng(0).choice([-1.0, 1.0], len(_TERMS))
        changes.append((f"bias_field: {config.bias_field:g}", Augmentation(bias=tuple(corners.tolist()))))
    changes += [(f"intensity_scale: {f:g}", Augmentation(intensity=f)) for f in config.intensity_scale if f != 1]
    if config.noise:
        changes.append((f"noise: {config.noise:g}", Augmentation(noise=config.noise)))
    return changes


def check_axes(config: AugmentConfig, axes: Mapping[Path, str | None]) -> None:
    """Raise DataError for every file whose orientation is unknown, if a left–right flip needs it.

    Args:
        axes: {file: orientation, or None if unknown}.
    """
    if config.left_right_flip and (unknown := [path for path, codes in axes.items() if codes is None]):
        raise DataError([f"{path}: left_right_flip: its orientation is unknown; {_REMEDY}" for path in unknown])
