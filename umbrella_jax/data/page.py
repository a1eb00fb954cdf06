"""The page of `validate`: one HTML file with all that was found, and slices of the volumes as the model gets them.

No script and nothing from elsewhere: it opens anywhere, offline too.
"""

import base64
import importlib.util
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from umbrella_jax.config import AugmentConfig, ModalityConfig
from umbrella_jax.data.augment import examples
from umbrella_jax.data.report import KINDS, SEVERITIES, Contents, Finding, Report, Severity, Volume, grouped, histogram
from umbrella_jax.data.volume import load_volume
from umbrella_jax.errors import ConfigError

PRIVACY = "holds pictures of people's scans and names of files: keep and share it as you may the scans themselves"
_LONGEST, _MARGIN = 260, 18  # pixels: of the longest side of a plane, and for a letter beside it


def check_page(file: Path) -> None:
    """Raises ConfigError where the page could not be written, before any work is done for it."""
    faults = []
    if missing := [name for name, module in (("jinja2", "jinja2"), ("pillow", "PIL")) if not _installed(module)]:
        faults.append(f"--html: {' and '.join(missing)} not installed; pip install 'umbrella-jax[report]'")
    if file.is_dir() or not file.parent.is_dir():
        faults.append(f"--html {file}: expected the name of a file in a directory that exists")
    if faults:
        raise ConfigError(faults)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def write_page(
    report: Report,
    modalities: Mapping[str, ModalityConfig],
    file: Path,
    *,
    sample: int,
    threads: int,
    augment: AugmentConfig,
) -> None:
    """Writes the page.

    Args:
        sample: how many volumes are drawn; those of which something was found first, the rest evenly over all.
        augment: each augmentation that is on is drawn too, alone and at its largest.

    Raises:
        ConfigError: see `check_page`.
        DataError: a volume cannot be read any more.
    """
    check_page(file)
    import jinja2

    def card(volume: Volume) -> dict[str, Any]:
        config = modalities[volume.modality]
        array = load_volume(volume.path, config)
        codes, spacing = geometry(volume.contents, config)
        background = 0.0 if config.scaling == "znorm_zeroback" else None
        changes = [
            (title, augmentation.apply(array, codes, background=background))
            for title, augmentation in examples(augment)
            if codes or not augmentation.left_right
        ]
        pictures = [
            (", ".join(filter(None, (title, part))), _data(draw(slices(image, codes, spacing), *_grey(image))))
            for title, changed in [("as the model gets it", array), *changes]
            for part, image in _images(changed)
        ]
        return {"volume": volume, "codes": codes, "spacing": spacing, "pictures": pictures, "of": about[volume]}

    about = {volume: [f for f in report.findings if f.place == str(volume.path)] for volume in report.volumes}
    drawn = _sample(report.volumes, {volume for volume in report.volumes if about[volume]}, sample)
    with ThreadPoolExecutor(threads) as pool:
        cards = list(pool.map(card, drawn))
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    text = page.render(
        report=report,
        found={
            severity: [(title, groups) for kind, title in KINDS.items() if (groups := _groups(report, severity, kind))]
            for severity in SEVERITIES
        },
        histograms=[
            (f"{name}: {what} of a conversation", _bars(histogram(numbers)))
            for name, s in report.sets.items()
            for what, numbers in s.lengths.items()
            if numbers.size
        ],
        cards=cards,
        usable=sum(volume.windows > 0 for volume in report.volumes),
        privacy=PRIVACY,
    )
    file.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")  # a file's name may be no text


def _groups(report: Report, severity: Severity, kind: str) -> list[list[Finding]]:
    return grouped(finding for finding in report.of(severity) if finding.kind == kind)


def _sample(volumes: Sequence[Volume], first: set[Volume], number: int) -> list[Volume]:
    """That many volumes that can be drawn: evenly of `first`, then evenly of the others."""
    chosen: list[Volume] = []
    for among in ([v for v in volumes if v in first], [v for v in volumes if v not in first]):
        usable = [volume for volume in among if volume.windows]
        left = min(number - len(chosen), len(usable))
        chosen += [usable[i] for i in np.linspace(0, len(usable) - 1, left).round().astype(int)]
    return chosen


def geometry(contents: Contents | None, config: ModalityConfig) -> tuple[str | None, tuple[float, ...] | None]:
    """Of a preprocessed array: where its axes point to, "RAS" say, and mm from voxel to voxel along each.

    None where the file does not say.
    """
    if contents is None:
        return None, None
    codes, size, shape = contents.orientation, contents.voxel_size, contents.shape[:3]
    if config.orientation == "RAS" and codes is not None:
        stored = np.argsort(nib.orientations.axcodes2ornt(codes)[:, 0])  # the stored axis that each axis was
        codes, shape = "RAS", tuple(shape[axis] for axis in stored)
        size = size and tuple(size[axis] for axis in stored)
    if config.spacing is not None:
        size = (config.spacing,) * 3
    elif config.mode == "resize" and size is not None:  # the field of view stays
        size = tuple(mm * n / out for mm, n, out in zip(size, shape, config.size, strict=True))
    return codes, size


def _images(array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """What is drawn of an array: of a window of a run, its first frame and how much each voxel varies."""
    if array.ndim == 3:
        return [("", array)]
    return [("first frame", array[..., 0]), ("standard deviation over its frames", array.std(axis=-1))]


def _grey(image: np.ndarray) -> tuple[float, float]:
    """What is drawn black and white: the 0.5th and the 99.5th percentile of the whole volume."""
    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Plane:
    """A slice as it is drawn."""

    rows: np.ndarray
    """From top to bottom, each from left to right."""
    letters: tuple[str, ...]
    """At its left, right, top and bottom."""
    mm: tuple[float, float]
    """Its width and height."""


def slices(volume: np.ndarray, codes: str | None, spacing: Sequence[float] | None) -> list[Plane]:
    """The middle axial, coronal and sagittal plane as a radiologist hangs them: the patient's right, or front, at the
    left, and front, or top, up.

    Args:
        volume: [D, H, W].
        codes: where its axes point to; None: planes of the axes i, j, k, and no claim about sides.
        spacing: mm from voxel to voxel along each axis; None: as if it were 1.
    """
    mm, ends = np.array(spacing or (1.0, 1.0, 1.0)), [(f"+{axis}", f"−{axis}") for axis in "ijk"]
    if codes is not None:
        order = nib.orientations.axcodes2ornt(codes)
        volume, mm = nib.apply_orientation(volume, order), mm[np.argsort(order[:, 0])]
        ends = [("R", "L"), ("A", "P"), ("S", "I")]
    found = []
    for axis in (2, 1, 0):
        across, up = (a for a in range(3) if a != axis)
        rows = np.take(volume, volume.shape[axis] // 2, axis).T[::-1, ::-1]
        size = (rows.shape[1] * mm[across], rows.shape[0] * mm[up])
        found.append(Plane(rows, (*ends[across], *ends[up]), size))
    return found


def draw(planes: Sequence[Plane], low: float, high: float) -> Any:
    """Planes side by side, to one scale, as a PIL image in grey from `low`, black, to `high`, white.

    The letters stand beside each plane, in the picture itself, so that they go wherever it goes.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = _LONGEST / max(max(plane.mm) for plane in planes)
    sizes = [(max(round(plane.mm[0] * scale), 1), max(round(plane.mm[1] * scale), 1)) for plane in planes]
    width = sum(w for w, _ in sizes) + len(planes) * 2 * _MARGIN
    canvas = Image.new("L", (width, max(h for _, h in sizes) + 2 * _MARGIN), 0)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    x, half = _MARGIN, _MARGIN // 2
    for plane, (w, h) in zip(planes, sizes, strict=True):
        y = (canvas.height - h) // 2
        grey = np.clip((plane.rows - low) / (high - low or 1), 0, 1) * 255
        canvas.paste(Image.fromarray(grey.astype(np.uint8)).resize((w, h), Image.Resampling.BILINEAR), (x, y))
        places = [
            (x - half, y + h // 2),
            (x + w + half, y + h // 2),
            (x + w // 2, y - half),
            (x + w // 2, y + h + half),
        ]
        for letter, place in zip(plane.letters, places, strict=True):
            pen.text(place, letter, fill=255, font=font, anchor="mm")
        x += w + 2 * _MARGIN
    return canvas


def _data(image: Any) -> str:
    """A PNG as a URL that holds it."""
    out = BytesIO()
    image.save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _bars(found: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A histogram's bars, x, width and height in percent and what each says, and what its axes reach to."""
    edges, counts = found["edges"], found["counts"]
    span, top = edges[-1] - edges[0], max(counts)
    bars = [
        (100 * (low - edges[0]) / span, 100 * (high - low) / span, 100 * n / top, f"{low} to {high - 1}: {n}")
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    return {"bars": bars, "low": edges[0], "high": edges[-1] - 1, "top": top}
