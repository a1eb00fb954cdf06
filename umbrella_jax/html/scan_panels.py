"""Scans that a page contains, for the panels of `viewer.js`; the macro `scan_panel` of `parts.html` writes them.

A page has a limit. Scans beyond it stay pictures, and the page says how many: nothing is downsampled.
"""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from umbrella_jax.console import plural
from umbrella_jax.html.slices import grey_range

PAGE_LIMIT = 24 * 2**20
"""Bytes of all scans in a page."""
SCAN_LIMIT = 4 * 2**20
"""Bytes of one scan; of a run that needs more, the first frames are shown."""
_GREYS = 255
"""Steps from black to white to which voxels are rounded."""
_MAP_STEPS = 500
"""Steps from 0 to the limit of a map to which its values are rounded."""
CENTRE = "the centre"
"""Where a panel counts mm from if a scan is embedded without an affine."""
ROUNDING = f"Their voxels are rounded to 1/{_GREYS} of the range from black to white."
"""Sentence for a page that shows panels."""


@dataclass(frozen=True)
class EmbeddedScan:
    """A gzipped NIfTI as base64 text."""

    content: str
    note: str = ""
    """What it leaves out, in words."""
    origin: str = CENTRE
    """From where its mm are counted; empty if from the file's own origin."""


@dataclass(frozen=True)
class ScanMap:
    """A map to lay over a scan, with its colour bar."""

    scan: EmbeddedScan
    unit: str
    limit: float
    """Value that has full colour."""


@dataclass(frozen=True)
class ScanPanel:
    """A panel of a page."""

    title: str
    volume: str
    """Id of the scan in the page; empty if the page has no room for it."""
    overlay: str
    """Id of the map, empty without one."""
    map: ScanMap | None
    at: str
    """Where the crosshair is at first: three fractions of the way to the patient's left-to-right, back-to-front and
    bottom-to-top end; empty for the centre."""
    note: str
    origin: str
    """As `EmbeddedScan.origin`."""


class PageScans:
    """The scans of one page, each stored once, until its limit is reached."""

    def __init__(self, limit: int = PAGE_LIMIT) -> None:
        self.contents: dict[str, str] = {}
        """{content: id}"""
        self._limit, self._size = limit, 0
        self._shown = self._left_out = 0

    def panel(self, title: str, scan: EmbeddedScan, over: ScanMap | None = None, at: str = "") -> ScanPanel:
        """Add a scan and its map, if there is room, and return its panel."""
        needed = {part.content for part in (scan, over and over.scan) if part and part.content}
        new = sum(len(content) for content in needed - self.contents.keys())
        if not scan.content or self._size + new > self._limit:
            self._left_out += 1
            return ScanPanel(title, "", "", None, "", "", "")
        self._size += new
        self._shown += 1
        for content in sorted(needed):
            self.contents.setdefault(content, f"scan-{len(self.contents) + 1}")
        overlay = self.contents[over.scan.content] if over else ""
        return ScanPanel(title, self.contents[scan.content], overlay, over, at, scan.note, scan.origin)

    def summary(self) -> str:
        """Return sentences about the scans that can be scrolled, and why others cannot; empty without any."""
        if not self._shown + self._left_out:
            return ""
        size = f"{self._size / 2**20:.1f} of at most {self._limit / 2**20:.0f} MB"
        text = f"Panels show {plural(self._shown, 'scan')} to scroll through ({size} of this page). {ROUNDING}"
        if self._left_out:
            text += f" {plural(self._left_out, 'scan')} more did not fit: pictures only."
        return text


def embed_scan(
    volume: np.ndarray,
    codes: str | None,
    spacing: Sequence[float] | None,
    repetition_time: float | None = None,
    *,
    affine: np.ndarray | None = None,
) -> EmbeddedScan:
    """Encode a volume for a panel.

    Args:
        volume: [D, H, W] or [D, H, W, T], finite.
        codes: orientation of its axes; None if unknown: the NIfTI then has no orientation either.
        spacing: mm from voxel to voxel along each axis; None for cubes.
        repetition_time: seconds from frame to frame.
        affine: [4, 4] from voxel to mm, of a scan as stored; by default mm are counted from the centre of the array.
    """
    low, high = grey_range(volume if volume.ndim == 3 else volume[..., 0])
    step = (high - low) / _GREYS or 1.0
    origin = CENTRE if affine is None else ""

    def encode(part: np.ndarray) -> str:
        return _encode(part, codes, spacing, low, step, (low, high), repetition_time, affine)

    if volume.ndim == 3:
        content = encode(volume)
        return EmbeddedScan(content if len(content) <= SCAN_LIMIT else "", origin=origin)
    frames = volume.shape[-1]
    shown = min(frames, max(SCAN_LIMIT // len(encode(volume[..., :1])), 1))
    while len(content := encode(volume[..., :shown])) > SCAN_LIMIT:  # later frames may be larger than the first
        shown = min(max(shown * SCAN_LIMIT // len(content), 1), shown - 1)
        if not shown:
            return EmbeddedScan("")
    return EmbeddedScan(content, "" if shown == frames else f"the first {shown} of {frames} frames", origin)


def embed_map(
    values: np.ndarray, codes: str | None, spacing: Sequence[float] | None, *, limit: float, unit: str
) -> ScanMap:
    """Encode a map, float [D, H, W], for a panel; the other arguments are those of `embed_scan` and `ScanMap`."""
    return ScanMap(EmbeddedScan(_encode(values, codes, spacing, 0.0, limit / _MAP_STEPS, (0.0, limit))), unit, limit)


def crosshair(place: Sequence[int], shape: Sequence[int], codes: str | None) -> str:
    """Return `ScanPanel.at` for a voxel of an array whose axes have this orientation."""
    fractions = (np.array(place) + 0.5) / np.array(shape[:3])
    if codes is not None:
        order = nib.orientations.axcodes2ornt(codes)
        fractions = np.where(order[:, 1] < 0, 1 - fractions, fractions)[np.argsort(order[:, 0])]
    return " ".join(f"{fraction:.4f}" for fraction in fractions)


def _encode(
    values: np.ndarray,
    codes: str | None,
    spacing: Sequence[float] | None,
    low: float,
    step: float,
    window: tuple[float, float],
    repetition_time: float | None = None,
    affine: np.ndarray | None = None,
) -> str:
    """Return a gzipped NIfTI as base64, whose voxels are multiples of `step` above `low`; without `affine`, with its
    origin at the centre of the array."""
    levels = np.rint((values - low) / step)
    whole = levels.astype(np.int16 if np.abs(levels).max(initial=0) < 2**15 else np.float32)
    mm = np.array(spacing or (1.0, 1.0, 1.0))
    if affine is None and codes is not None:
        affine = np.eye(4)
        order = nib.orientations.axcodes2ornt(codes)
        affine[:3, :3] = 0
        for axis, (side, direction) in enumerate(order):
            affine[int(side), axis] = direction * mm[axis]
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(whole.shape[:3]) - 1) / 2)
    image = nib.Nifti1Image(whole, affine)
    image.header.set_zooms((*mm, repetition_time or 0.0)[: whole.ndim])
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(step, low)
    image.header["cal_min"], image.header["cal_max"] = window
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode()
