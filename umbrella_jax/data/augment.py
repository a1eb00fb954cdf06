"""Random changes of preprocessed training volumes, drawn once per conversation and applied to each of its images.

    augmentation = draw(config.data.augment, np.random.default_rng([seed, epoch, conversation, 1]))
    volume = augmentation.apply(volume, axes, image)

A FLIP TURNS LEFT INTO RIGHT. A lesion on the left is then shown on the right, while the conversation still says
"left". Leave `left_right_flip` and `flip_any_axis` off where any text speaks of sides.

Geometry and bias field act in the order R, A, S of the axes where the orientation is known, so that two images stored
differently move alike; elsewhere in the order of the array.
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
_DEGREE = 3  # of the bias field's polynomial
# Degrees along the three axes; the constant is left out, it is `intensity_scale`.
_TERMS = [degrees for degrees in product(range(_DEGREE + 1), repeat=3) if 0 < sum(degrees) <= _DEGREE]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Drawn parameters, the same for all images of a conversation; the defaults change nothing. Hashable."""

    left_right: bool = False
    flip_axis: int | None = None
    """Axis 0, 1 or 2; along axis 0, a left–right flip is undone."""
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Degrees about axes 0, 1, 2, one after another, right-handed, about the centre of the array."""
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Voxels along axes 0, 1, 2, after the rotation."""
    bias: tuple[float, ...] = (0.0,) * len(_TERMS)
    """Coefficients of the log bias field."""
    intensity: float = 1.0
    """Factor."""
    noise: float = 0.0
    """Standard deviation, as a share of the volume's."""
    noise_seed: int = 0

    def apply(
        self, volume: np.ndarray, axes: str | None, image: int = 0, *, background: float | None = None
    ) -> np.ndarray:
        """Flips, rigid motion, bias field and intensity, noise, in this order.

        Args:
            volume: preprocessed, float32 (D, H, W) or (D, H, W, T); every frame is changed alike but for its noise.
                It is not written to.
            axes: orientation of its first three axes, as `"".join(nibabel.aff2axcodes(affine))`; None where unknown.
            image: number of the image in its conversation; each has noise of its own.
            background: its value outside of the brain, the minimum by default; 0 after `znorm_zeroback`. It is what
                moves in from outside, and neither bias field nor intensity change it.

        Returns:
            float32 C-contiguous array of the same shape; `volume` itself where nothing changes.

        Raises:
            DataError: a left–right flip, and `axes` are not known (`check_axes` says so in time, with the file's name).
        """
        if self == Augmentation():
            return volume
        if self.left_right and axes is None:
            raise DataError(f"left_right_flip: the volume's orientation is unknown; {_REMEDY}")
        std = volume.std() if self.noise else 0
        outside = volume.min() if background is None else np.float32(background)
        stored, canonical = (nib.orientations.axcodes2ornt(a) for a in (axes or "RAS", "RAS"))
        volume = nib.apply_orientation(volume, stored)
        if self.left_right:
            volume = np.flip(volume, 0)
        if self.flip_axis is not None:
            volume = np.flip(volume, self.flip_axis)
        if any(self.rotation) or any(self.translation):
            volume = self._move(volume, outside)
        if any(self.bias) or self.intensity != 1:
            volume = self._light(volume, outside)
        if self.noise:
            noise = np.random.default_rng([self.noise_seed, image]).standard_normal(volume.shape, np.float32)
            noise *= self.noise * std
            noise += volume
            volume = noise
        back = nib.orientations.ornt_transform(canonical, stored)
        return np.ascontiguousarray(nib.apply_orientation(volume, back))

    def _move(self, volume: np.ndarray, outside: np.float32) -> np.ndarray:
        """Rigid motion in voxels, with linear interpolation; the same for each frame."""
        inverse = Rotation.from_euler("xyz", self.rotation, degrees=True).as_matrix().T
        centre = (np.array(volume.shape[:3]) - 1) / 2
        offset = centre - inverse @ (centre + self.translation)  # output = R (input - centre) + centre + translation
        moved = np.empty(volume.shape, np.float32)
        for frame in np.ndindex(volume.shape[3:]):
            part = (..., *frame)
            voxels = np.ascontiguousarray(volume[part])  # twice as fast as the frame where it lies
            moved[part] = affine_transform(voxels, inverse, offset, order=1, mode="constant", cval=outside)
        return moved

    def _light(self, volume: np.ndarray, outside: np.float32) -> np.ndarray:
        """Bias field and intensity, as factors of the height above the volume's minimum.

        Scaled volumes have lost their zero, and z-scores lie on both sides of theirs; the minimum is air or nearly so.
        The field is exp of a polynomial of third degree (Van Leemput et al. 1999, IEEE TMI 18:885; TorchIO's
        RandomBiasField), made of Legendre polynomials over [-1, 1] along each axis, as MONAI's RandBiasField. Without
        the constant one, the mean of its logarithm is about 0.
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
        if outside != minimum:
            lit[volume == outside] = outside
        return lit


def draw(config: AugmentConfig, rng: np.random.Generator) -> Augmentation:
    """Parameters of one conversation, a function of `config` and the state of `rng` alone.

    Uniform within the configured ranges. All are drawn whatever is on, so that turning one on leaves the others.
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
    """Name and augmentation for each one that is on, alone and at its largest, for people to look at."""
    found: list[tuple[str, Augmentation]] = []
    if config.left_right_flip:
        found.append(("left_right_flip", Augmentation(left_right=True)))
    if config.flip_any_axis:
        found += [(f"flip_any_axis: axis {axis}", Augmentation(flip_axis=axis)) for axis in range(3)]
    if degrees := config.rotation:
        found.append((f"rotation: {degrees:g}° about each axis", Augmentation(rotation=(degrees,) * 3)))
    if voxels := config.translation:
        found.append((f"translation: {voxels:g} voxels along each axis", Augmentation(translation=(voxels,) * 3)))
    if config.bias_field:
        corners = config.bias_field * np.random.default_rng(0).choice([-1.0, 1.0], len(_TERMS))
        found.append((f"bias_field: {config.bias_field:g}", Augmentation(bias=tuple(corners.tolist()))))
    found += [(f"intensity_scale: {f:g}", Augmentation(intensity=f)) for f in config.intensity_scale if f != 1]
    if config.noise:
        found.append((f"noise: {config.noise:g}", Augmentation(noise=config.noise)))
    return found


def check_axes(config: AugmentConfig, axes: Mapping[Path, str | None]) -> None:
    """Raises DataError naming each file whose orientation (`axes`, by path) a left–right flip needs and lacks."""
    if config.left_right_flip and (unknown := [path for path, codes in axes.items() if codes is None]):
        raise DataError([f"{path}: left_right_flip: its orientation is unknown; {_REMEDY}" for path in unknown])
