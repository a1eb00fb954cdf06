"""Draw preprocessed volumes: three planes to scale with letters for the patient's sides, and maps over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from umbrella_jax.config.schema import AS_STORED, ModalityConfig

LONGEST, MARGIN = 260, 18
"""Pixels of the longest side of a plane, and of the margin for a letter beside it."""
RED, BLUE = (220, 30, 20), (30, 90, 255)
"""Colours of a map above 0 and below 0."""
_OPAQUE = 200
"""Opacity of a map at its maximum, of 255, so that the scan below shows through."""
_GREY = 110
"""Grey of the tissue that a colour bar shows below the map."""


def preprocessed_geometry(
    codes: str | None, size: Sequence[float] | None, shape: Sequence[int], config: ModalityConfig
) -> tuple[str | None, tuple[float, ...] | None]:
    """Return the orientation of a preprocessed array, such as "RAS", and the mm between its voxels along each axis.

    None means unknown, in the arguments and in the result.

    Args:
        codes: orientation of the file as stored.
        size: mm between its voxels along each stored axis.
        shape: shape of the file as stored.
    """
    lengths, mm = tuple(shape[:3]), None if size is None else tuple(size)
    if config.orientation != AS_STORED and codes is not None:
        before, after = (nib.orientations.axcodes2ornt(axes) for axes in (codes, config.orientation))
        stored = np.argsort(nib.orientations.ornt_transform(before, after)[:, 0])  # index of the stored axis
        codes, lengths = config.orientation, tuple(lengths[axis] for axis in stored)
        mm = mm and tuple(mm[axis] for axis in stored)
    if config.spacing is not None:
        mm = (config.spacing,) * 3
    elif config.mode == "resize" and mm is not None:  # the field of view stays the same
        mm = tuple(edge * n / out for edge, n, out in zip(mm, lengths, config.size, strict=True))
    return codes, mm


def images_to_draw(array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return (caption, volume) to draw: for a 4D window, its first frame and the standard deviation over its frames."""
    if array.ndim == 3:
        return [("", array)]
    return [("first frame", array[..., 0]), ("standard deviation over its frames", array.std(axis=-1))]


def grey_range(image: np.ndarray) -> tuple[float, float]:
    """Return the intensities to draw black and white: the 0.5th and 99.5th percentiles of the volume, or its ends if
    these are the same, as those of a small mask are."""
    low, high = np.percentile(image, (0.5, 99.5))
    if low == high:
        low, high = image.min(), image.max()
    return float(low), float(high)


@dataclass(frozen=True)
class Plane:
    """A slice, ready to draw."""

    rows: np.ndarray
    """Rows from top to bottom, each from left to right."""
    letters: tuple[str, ...]
    """Letters at its left, right, top and bottom."""
    mm: tuple[float, float]
    """Width and height in mm."""


@dataclass(frozen=True)
class SliceStack:
    """All slices along one axis of a volume, ready to draw."""

    name: str
    """`axial`, `coronal` or `sagittal`; `slices along i` if the volume's orientation is unknown."""
    rows: np.ndarray
    """[slices, rows from top to bottom, columns from left to right]."""
    letters: tuple[str, ...]
    """Letters at the left, right, top and bottom of each slice."""
    ends: tuple[str, str]
    """Letters at the first and the last slice."""
    mm: tuple[float, float]
    """Width and height of a slice in mm."""

    def plane(self, index: int) -> Plane:
        """Return one slice."""
        return Plane(self.rows[index], self.letters, self.mm)


def stack_slices(volume: np.ndarray, codes: str | None, spacing: Sequence[float] | None) -> list[SliceStack]:
    """Return the axial, coronal and sagittal slices of a volume in radiological convention.

    The left of a slice is the patient's right, or front in sagittal slices. The top is the patient's front, or top.

    Args:
        volume: [D, H, W].
        codes: orientation of its axes; None for slices along the axes i, j, k without the patient's sides.
        spacing: mm from voxel to voxel along each axis; None to draw voxels as cubes.
    """
    mm, ends = np.array(spacing or (1.0, 1.0, 1.0)), [(f"+{axis}", f"-{axis}") for axis in "ijk"]
    names = [f"slices along {axis}" for axis in "ijk"]
    if codes is not None:
        order = nib.orientations.axcodes2ornt(codes)
        volume, mm = nib.apply_orientation(volume, order), mm[np.argsort(order[:, 0])]
        ends, names = [("R", "L"), ("A", "P"), ("S", "I")], ["sagittal", "coronal", "axial"]
    stacks = []
    for axis in (2, 1, 0):
        across, up = (a for a in range(3) if a != axis)
        rows = volume.transpose(axis, up, across)[:, ::-1, ::-1]
        size = (rows.shape[2] * mm[across], rows.shape[1] * mm[up])
        stacks.append(SliceStack(names[axis], rows, (*ends[across], *ends[up]), ends[axis][::-1], size))
    return stacks


def cut_planes(
    volume: np.ndarray, codes: str | None, spacing: Sequence[float] | None, at: Sequence[int] | None = None
) -> list[Plane]:
    """Return an axial, coronal and sagittal plane of a volume, as `stack_slices` orients them.

    Args:
        volume: [D, H, W].
        codes: orientation of its axes, as in `stack_slices`.
        spacing: mm from voxel to voxel along each axis, as in `stack_slices`.
        at: the voxel that the planes go through; default the middle one.
    """
    stacks = stack_slices(volume, codes, spacing)
    if at is None:
        return [stack.plane(len(stack.rows) // 2) for stack in stacks]
    place = np.array(at)
    if codes is not None:
        order = nib.orientations.axcodes2ornt(codes)
        place = np.where(order[:, 1] < 0, np.array(volume.shape) - 1 - place, place)[np.argsort(order[:, 0])]
    return [stack.plane(index) for stack, index in zip(stacks, place[::-1], strict=True)]


def draw_planes(
    planes: Sequence[Plane],
    low: float,
    high: float,
    over: Sequence[Plane] = (),
    *,
    bar: tuple[str, str] | None = None,
    longest: int = LONGEST,
) -> Any:
    """Draw planes side by side, to one scale, as a PIL image from black at `low` to white at `high`.

    The letters beside each plane are part of the picture, so they stay with it when it is copied.

    Args:
        planes: the planes of a volume.
        over: the same planes of a map in -1 .. 1, drawn on top: red above 0, blue below 0, more opaque farther from 0.
        bar: (value of 1 in the map, unit) as text; draws a colour bar of the map below the planes.
        longest: pixels of the longest side of a plane.
    """
    from PIL import Image, ImageDraw, ImageFont

    def sized(pixels: np.ndarray, size: tuple[int, int]) -> Any:
        return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)

    scale = longest / max(max(plane.mm) for plane in planes)
    sizes = [(max(round(plane.mm[0] * scale), 1), max(round(plane.mm[1] * scale), 1)) for plane in planes]
    width = sum(w for w, _ in sizes) + len(planes) * 2 * MARGIN
    height = max(h for _, h in sizes) + 2 * MARGIN
    canvas = Image.new("RGB" if over else "L", (width, height + (2 * MARGIN + 6 if bar else 0)), 0)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)

    def overlay(rows: np.ndarray, box: tuple[int, int, int, int]) -> None:
        for colour, part in ((RED, rows), (BLUE, -rows)):
            size = box[2] - box[0], box[3] - box[1]
            canvas.paste(colour, box, sized(np.maximum(part, 0) * _OPAQUE, size))

    x, half = MARGIN, MARGIN // 2
    for number, (plane, (w, h)) in enumerate(zip(planes, sizes, strict=True)):
        y = (height - h) // 2
        canvas.paste(sized(np.clip((plane.rows - low) / (high - low or 1), 0, 1) * 255, (w, h)), (x, y))
        if over:
            overlay(np.clip(over[number].rows, -1, 1), (x, y, x + w, y + h))
        places = [
            (x - half, y + h // 2),
            (x + w + half, y + h // 2),
            (x + w // 2, y - half),
            (x + w // 2, y + h + half),
        ]
        for letter, place in zip(plane.letters, places, strict=True):
            pen.text(place, letter, fill="white", font=font, anchor="mm")
        x += w + 2 * MARGIN
    if bar:
        limit, unit = bar
        left, right, top = MARGIN + 40, width - MARGIN - 40, height
        pen.rectangle((left, top, right - 1, top + 11), fill=(_GREY,) * 3)
        overlay(np.linspace(-1, 1, right - left)[None], (left, top, right, top + 12))
        middle = (left + right) // 2
        for at, text in ((left, f"-{limit}"), (middle, f"0 {unit}"), (right, f"+{limit}")):
            pen.text((at, top + 22), text, fill="white", font=font, anchor="mm")
    return canvas
