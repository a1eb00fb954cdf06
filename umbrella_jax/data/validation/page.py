"""The HTML page of `validate`: findings, statistics, and slices of volumes as the model gets them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_jax.config.schema import AugmentConfig, ModalityConfig
from umbrella_jax.data.augment import examples
from umbrella_jax.data.background import Background, background_level
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.validation.findings import (
    FINDING_KINDS,
    SEVERITIES,
    Finding,
    Severity,
    ShownVolume,
    ValidationReport,
    grouped,
    histogram,
)
from umbrella_jax.data.volume import open_volume, preprocess
from umbrella_jax.errors import ConfigError
from umbrella_jax.html.page import page_faults, png, render_page
from umbrella_jax.html.slices import cut_planes, draw_planes, grey_range, images_to_draw, preprocessed_geometry


def check_page(file: Path) -> None:
    """Raise ConfigError if the page cannot be written; call this before any work is done for it."""
    if faults := page_faults("--html", file, ["pillow"]):
        raise ConfigError(faults)


def write_page(
    report: ValidationReport,
    modalities: Mapping[str, ModalityConfig],
    file: Path,
    *,
    sample: int,
    threads: int,
    augment: AugmentConfig,
) -> None:
    """Write the page.

    Args:
        report: of `validate`.
        modalities: the configured modalities, by name.
        file: where to write; must not exist.
        sample: number of volumes to draw: flagged ones first, then others at even distances.
        threads: number of volumes drawn at a time.
        augment: each enabled augmentation is drawn too, alone and at its largest.

    Raises:
        ConfigError: see `check_page`.
        DataError: a volume can no longer be read.
    """
    check_page(file)

    def card(volume: ShownVolume) -> dict[str, Any]:
        config = modalities[volume.modality]
        backgrounds: list[Background] = []
        opened = open_volume(volume.path, config)
        array = preprocess(volume.path, opened, config, note=lambda *remark: backgrounds.append(remark[-1]))
        contents = volume.contents
        assert contents is not None  # a file that cannot be read has no windows, so it is not drawn
        codes, spacing = preprocessed_geometry(contents.orientation, contents.voxel_size, contents.shape, config)
        background = background_level(backgrounds[0] if backgrounds else None, config)
        changes = [
            (title, augmentation.apply(array, codes, background=background))
            for title, augmentation in examples(augment)
            if codes or not augmentation.left_right
        ]
        pictures = [
            (
                ", ".join(filter(None, (title, part))),
                png(draw_planes(cut_planes(image, codes, spacing), *grey_range(image))),
            )
            for title, changed in [("as the model gets it", array), *changes]
            for part, image in images_to_draw(changed)
        ]
        return {"volume": volume, "codes": codes, "spacing": spacing, "pictures": pictures, "findings": flags[volume]}

    by_place: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_place[finding.place].append(finding)
    flags = {volume: by_place.get(str(volume.path), []) for volume in report.volumes}
    drawn = _sample(report.volumes, {volume for volume in report.volumes if flags[volume]}, sample)
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        cards = list(pool.map(card, drawn))
    render_page(
        Path(__file__).with_name("page.html"),
        file,
        report=report,
        findings={
            severity: [
                (title, groups) for kind, title in FINDING_KINDS.items() if (groups := _groups(report, severity, kind))
            ]
            for severity in SEVERITIES
        },
        histograms=[
            (f"{name}: {unit} per conversation", _bars(histogram(numbers)))
            for name, s in report.sets.items()
            for unit, numbers in s.lengths.items()
            if numbers.size
        ],
        cards=cards,
        usable=sum(volume.windows > 0 for volume in report.volumes),
    )


def _groups(report: ValidationReport, severity: Severity, kind: str) -> list[list[Finding]]:
    return grouped(finding for finding in report.with_severity(severity) if finding.kind == kind)


def _sample(volumes: Sequence[ShownVolume], flagged: set[ShownVolume], number: int) -> list[ShownVolume]:
    """Choose up to `number` drawable volumes at even distances: from `flagged`, then from the others."""
    chosen: list[ShownVolume] = []
    for candidates in ([v for v in volumes if v in flagged], [v for v in volumes if v not in flagged]):
        usable = [volume for volume in candidates if volume.windows]
        left = min(number - len(chosen), len(usable))
        chosen += [usable[i] for i in np.linspace(0, len(usable) - 1, left).round().astype(int)]
    return chosen


def _bars(bins: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a histogram's bars (x, width and height in percent, and a text) and the ends of its axes."""
    edges, counts = bins["edges"], bins["counts"]
    span, top = edges[-1] - edges[0], max(counts)
    bars = [
        (100 * (low - edges[0]) / span, 100 * (high - low) / span, 100 * n / top, f"{low} to {high - 1}: {n}")
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    return {"bars": bars, "low": edges[0], "high": edges[-1] - 1, "top": top}
