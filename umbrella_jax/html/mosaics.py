"""Pictures of all slices of a volume, for readers without a script or WebGL, and thumbnails.

The macro `mosaics` of `parts.html` writes one picture for each axis, to unfold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from umbrella_jax.html.page import data_url
from umbrella_jax.html.slices import SliceStack, grey_range, stack_slices

MOST_SLICES = 128
"""Slices of a mosaic. A volume with more along an axis is shown at even distances."""
_LONGEST = 112
"""Pixels of the longest side of a slice."""
_THUMBNAIL = 56
"""Pixels of the longest side of a slice in a thumbnail."""
_QUALITY = 70
"""Of the JPEG images."""


@dataclass(frozen=True)
class Mosaic:
    """All slices along one axis, as one image: row by row from the first to the last, from left to right."""

    url: str
    """Data URL of a JPEG image."""
    name: str
    """As `SliceStack.name`."""
    numbers: tuple[int, ...]
    """Index of each slice in the volume, from 0."""
    length: int
    """Number of slices that the volume has."""
    ends: tuple[str, str]
    """As `SliceStack.ends`."""


def draw_mosaics(volume: np.ndarray, codes: str | None, spacing: Sequence[float] | None) -> tuple[Mosaic, ...]:
    """Draw all slices along each axis; about 0.3 MB of the page for a volume of 96³.

    Args:
        volume: [D, H, W].
        codes: orientation of its axes, as in `stack_slices`.
        spacing: mm from voxel to voxel along each axis, as in `stack_slices`.
    """
    stacks, grey = stack_slices(volume, codes, spacing), grey_range(volume)
    scale = _LONGEST / max(max(stack.mm) for stack in stacks)
    return tuple(_mosaic(stack, *grey, scale) for stack in stacks)


def thumbnail(volume: np.ndarray, codes: str | None, spacing: Sequence[float] | None) -> str:
    """Return a data URL of the three middle planes side by side, about 4 KB; arguments as in `draw_mosaics`."""
    stacks = stack_slices(volume, codes, spacing)
    scale = _THUMBNAIL / max(max(stack.mm) for stack in stacks)
    tiles = [_tile(stack.rows[len(stack.rows) // 2], stack.mm, scale, *grey_range(volume)) for stack in stacks]
    return _jpeg(tiles, len(tiles), (max(t.width for t in tiles), max(t.height for t in tiles)))


def _mosaic(stack: SliceStack, low: float, high: float, scale: float) -> Mosaic:
    """Draw the slices of a stack from black at `low` to white at `high`, with `scale` pixels per mm."""
    length = len(stack.rows)
    numbers = tuple(np.linspace(0, length - 1, min(length, MOST_SLICES)).round().astype(int).tolist())
    tiles = [_tile(stack.rows[number], stack.mm, scale, low, high) for number in numbers]
    size = tiles[0].size
    across = max(round(math.sqrt(len(tiles) * size[1] / size[0])), 1)
    url = _jpeg(tiles, across, size)
    return Mosaic(url, stack.name, numbers, length, stack.ends)


def _tile(rows: np.ndarray, mm: tuple[float, float], scale: float, low: float, high: float) -> Any:
    """Draw a slice of this width and height in mm as a PIL image."""
    from PIL import Image

    grey = np.clip((rows - low) * (255 / ((high - low) or 1)), 0, 255).astype(np.uint8)
    size = max(round(mm[0] * scale), 1), max(round(mm[1] * scale), 1)
    return Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR)


def _jpeg(tiles: Sequence[Any], across: int, size: tuple[int, int]) -> str:
    """Return a data URL of tiles in rows of `across`, each in the middle of a box of this size."""
    from PIL import Image

    image = Image.new("L", (across * size[0], -(-len(tiles) // across) * size[1]), 0)
    for i, tile in enumerate(tiles):
        beside, above = (size[0] - tile.width) // 2, (size[1] - tile.height) // 2
        image.paste(tile, (i % across * size[0] + beside, i // across * size[1] + above))
    out = BytesIO()
    image.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return data_url("image/jpeg", out.getvalue())
