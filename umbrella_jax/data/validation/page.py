"""The HTML page of `validate`: findings, distributions, tables of everything, and volumes to scroll through."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_jax.config.schema import AugmentConfig, ModalityConfig
from umbrella_jax.console import Progress, plural
from umbrella_jax.data.augment import examples
from umbrella_jax.data.background import Background, background_level
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.validation.distributions import distributions
from umbrella_jax.data.validation.findings import (
    FINDING_KINDS,
    SEVERITIES,
    Finding,
    Severity,
    ShownVolume,
    ValidationReport,
    grouped,
)
from umbrella_jax.data.volume import open_volume, preprocess
from umbrella_jax.errors import ConfigError
from umbrella_jax.html.mosaics import draw_mosaics, thumbnail
from umbrella_jax.html.page import page_faults, png, render_page
from umbrella_jax.html.scan_panels import PageScans, embed_scan
from umbrella_jax.html.slices import cut_planes, draw_planes, grey_range, images_to_draw, preprocessed_geometry
from umbrella_jax.html.tables import DataTable, TableCell, TableColumn
from umbrella_jax.rundir import Say, say_nothing

MOST_ROWS = 5000
"""Rows of a table; flagged ones come first, and the caption states how many there are."""
MOST_THUMBNAILS = 200
"""Flagged volumes with a small picture in the table."""
_PLACES = 20
"""Places listed for each group of findings; the table of findings lists them all."""
_LONGEST_TEXT = 80
"""Characters of a question or an answer in a table."""


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
    say: Say = say_nothing,
) -> None:
    """Write the page.

    Args:
        report: of `validate`.
        modalities: the configured modalities, by name.
        file: where to write; must not exist.
        sample: number of volumes to scroll through: flagged ones first, then others at even distances.
        threads: number of volumes drawn at a time.
        augment: each enabled augmentation is drawn too, alone and at its largest.
        say: receives lines about the progress, as in `validate`.

    Raises:
        ConfigError: see `check_page`.
        DataError: a volume can no longer be read.
    """
    check_page(file)
    by_place: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_place[finding.place].append(finding)
    flags = {volume: by_place.get(str(volume.path), []) for volume in report.volumes}
    flagged = {volume for volume in report.volumes if flags[volume]}
    drawn = _sample(report.volumes, flagged, sample)
    small = _sample(report.volumes, flagged, min(MOST_THUMBNAILS, sum(v.windows > 0 for v in flagged)))
    drawn_or_small = list(dict.fromkeys((*drawn, *small)))

    def draw(volume: ShownVolume) -> tuple[str, dict[str, Any]]:
        return _draw(volume, modalities[volume.modality], augment if volume in large else None)

    large, pictures = set(drawn), dict[ShownVolume, tuple[str, dict[str, Any]]]()
    with (
        one_blas_thread(),
        ThreadPoolExecutor(threads) as pool,
        Progress("picture", len(drawn_or_small), say=say, log=say_nothing) as progress,
    ):
        for volume, picture in zip(drawn_or_small, pool.map(draw, drawn_or_small), strict=True):
            pictures[volume] = picture
            progress.count()
    thumbnails = {volume: pictures[volume][0] for volume in small}
    ids = {volume: f"volume-{number}" for number, volume in enumerate(drawn, 1)}
    scans = PageScans()
    panels = {volume: scans.panel(pictures[volume][1]["title"], pictures[volume][1]["scan"]) for volume in drawn}
    render_page(
        Path(__file__).with_name("page.html"),
        file,
        script=True,
        scans=scans,
        report=report,
        findings={
            severity: [
                (title, groups) for kind, title in FINDING_KINDS.items() if (groups := _groups(report, severity, kind))
            ]
            for severity in SEVERITIES
        },
        places=_PLACES,
        all_findings=_finding_table(report, {str(volume.path): name for volume, name in ids.items()}),
        distributions=distributions(report),
        volumes=_volume_table(report, flags, thumbnails, ids),
        conversations=_conversation_table(report, by_place),
        cards=[{"id": ids[v], "volume": v, "findings": flags[v], "panel": panels[v], **pictures[v][1]} for v in drawn],
        usable=sum(volume.windows > 0 for volume in report.volumes),
    )


def _draw(volume: ShownVolume, config: ModalityConfig, augment: AugmentConfig | None) -> tuple[str, dict[str, Any]]:
    """Return a thumbnail of a volume, and the rest that its card shows; nothing of this without `augment`."""
    backgrounds: list[Background] = []
    opened = open_volume(volume.path, config)
    array = preprocess(volume.path, opened, config, note=lambda *remark: backgrounds.append(remark[-1]))
    contents = volume.contents
    assert contents is not None  # a file that cannot be read has no windows, so it is not drawn
    codes, spacing = preprocessed_geometry(contents.orientation, contents.voxel_size, contents.shape, config)
    (part, first), *others = images_to_draw(array)
    small = thumbnail(first, codes, spacing)
    if augment is None:
        return small, {}
    background = background_level(backgrounds[0] if backgrounds else None, config)
    changes = [
        (", ".join(filter(None, (title, name))), image)
        for title, augmentation in examples(augment)
        if codes or not augmentation.left_right
        for name, image in images_to_draw(augmentation.apply(array, codes, background=background))
    ]
    title = f"{volume.path}, " + ", ".join(filter(None, ("as the model gets it", part)))
    pictures = [
        (name, png(draw_planes(cut_planes(image, codes, spacing), *grey_range(image))))
        for name, image in [*((f"as the model gets it, {name}", image) for name, image in others), *changes]
    ]
    return small, {
        "codes": codes,
        "spacing": spacing,
        "title": title,
        "scan": embed_scan(array, codes, spacing, contents.tr),
        "picture": png(draw_planes(cut_planes(first, codes, spacing), *grey_range(first))),
        "mosaics": draw_mosaics(first, codes, spacing),
        "pictures": pictures,
    }


def _finding_table(report: ValidationReport, ids: Mapping[str, str]) -> DataTable:
    findings = [finding for severity in SEVERITIES for finding in report.with_severity(severity)]
    kinds = ("choice", "choice", "choice", "text", "text")
    names = ("severity", "kind", "set", "place", "reason")
    rows = [
        (
            TableCell(f.severity, SEVERITIES.index(f.severity), severity=f.severity),
            f.kind,
            ", ".join(f.sets),
            TableCell(f.place, link=ids.get(f.place, "")),
            f.reason,
        )
        for f in findings[:MOST_ROWS]
    ]
    return DataTable("findings", _caption(findings, rows, "finding"), _columns(names, kinds), rows)


def _volume_table(
    report: ValidationReport,
    flags: Mapping[ShownVolume, Sequence[Finding]],
    thumbnails: Mapping[ShownVolume, str],
    ids: Mapping[ShownVolume, str],
) -> DataTable:
    folder = _common_folder(str(volume.path) for volume in report.volumes)
    shown_by = defaultdict[tuple[Path, str], int](int)
    for c in (c for s in report.sets.values() for c in s.conversations):
        for image in dict.fromkeys((image.path, image.modality) for image in c.images):
            shown_by[image] += 1
    columns: dict[str, tuple[str, Callable[[ShownVolume], Any]]] = {
        "file": (
            "text",
            lambda v: TableCell(str(v.path).removeprefix(folder), link=ids.get(v, ""), picture=thumbnails.get(v, "")),
        ),
        "flagged": ("choice", lambda v: _severity_cell(flags[v])),
        "finding": ("text", lambda v: _reasons(flags[v])),
        "set": ("choice", lambda v: ", ".join(v.sets)),
        "modality": ("choice", lambda v: v.modality),
        "conversations": ("number", lambda v: shown_by[v.path, v.modality]),
        "shape": ("choice", lambda v: v.contents and " × ".join(map(str, v.contents.shape))),
        "voxel size (mm)": (
            "choice",
            lambda v: v.contents and v.contents.voxel_size and " × ".join(f"{mm:g}" for mm in v.contents.voxel_size),
        ),
        "TR (s)": ("number", lambda v: v.contents and v.contents.tr),
        "orientation": ("choice", lambda v: v.contents and (v.contents.orientation or "unknown")),
        "type": ("choice", lambda v: v.contents and v.contents.dtype),
        "smallest": ("number", lambda v: v.contents and v.contents.minimum),
        "mean": ("number", lambda v: v.contents and v.contents.mean),
        "largest": ("number", lambda v: v.contents and v.contents.maximum),
        "not 0 (%)": ("number", lambda v: v.contents and 100 * v.contents.nonzero),
    }
    volumes = sorted(report.volumes, key=lambda volume: _rank(flags[volume]))
    rows = [[cell(volume) for _, cell in columns.values()] for volume in volumes[:MOST_ROWS]]
    kinds = [kind for kind, _ in columns.values()]
    return DataTable("volumes", _caption(volumes, rows, "volume", folder), _columns(tuple(columns), kinds), rows)


def _conversation_table(report: ValidationReport, by_place: Mapping[str, Sequence[Finding]]) -> DataTable:
    names = ("conversation", "flagged", "finding", "set", "task", "subjects", "volumes", "question", "answer", "tokens")
    kinds = ("text", "choice", "text", "choice", "choice", "text", "number", "text", "text", "number")
    entries: list[tuple[str, Conversation, int | None]] = []
    for name, s in report.sets.items():
        lengths = s.lengths.get("positions", ())
        known = len(lengths) == len(s.conversations)  # conversations that cannot be encoded have none
        entries += [(name, c, int(lengths[i]) if known else None) for i, c in enumerate(s.conversations)]
    folder = _common_folder(s.path for s in report.sets.values())
    entries.sort(key=lambda entry: _rank(by_place.get(entry[1].label, ())))
    rows = []
    for name, c, length in entries[:MOST_ROWS]:
        own_findings = by_place.get(c.label, ())
        questions = [message.text.strip() for message in c.messages if message.role == "user"]
        answers = [message.text.strip() for message in c.messages if message.role == "assistant"]
        rows.append(
            (
                c.label.removeprefix(folder),
                _severity_cell(own_findings),
                _reasons(own_findings),
                name,
                str(c.metadata.get("task") or c.task_type or ""),
                ", ".join(sorted(c.subjects)),
                len(c.images),
                _short(questions[-1] if questions else ""),
                _short(answers[-1] if answers else ""),
                length,
            )
        )
    return DataTable("conversations", _caption(entries, rows, "conversation", folder), _columns(names, kinds), rows)


def _columns(names: Sequence[str], kinds: Sequence[Any]) -> list[TableColumn]:
    return [TableColumn(name, kind) for name, kind in zip(names, kinds, strict=True)]


def _caption(every: Sequence[object], rows: Sequence[object], noun: str, folder: str = "") -> str:
    """Return a table's caption, which states how many rows there are if the table leaves some out."""
    total = plural(len(every), noun)
    count = total if len(rows) == len(every) else f"{len(rows):,} of {total}"
    return f"{count}, the worst first" + (f"; paths start at {folder}" if folder else "")


def _common_folder(paths: Iterable[str]) -> str:
    """Return the folder that all paths share, with a slash at its end; an empty text without one."""
    folders = {os.path.dirname(path) for path in paths}
    absolute = folders and all(map(os.path.isabs, folders))
    return f"{os.path.commonpath(folders).rstrip('/')}/" if absolute else ""


def _rank(findings: Sequence[Finding]) -> int:
    """Return the position of the worst severity; SEVERITIES' length without findings."""
    return min((SEVERITIES.index(finding.severity) for finding in findings), default=len(SEVERITIES))


def _severity_cell(findings: Sequence[Finding]) -> TableCell | None:
    if not findings:
        return None
    worst = SEVERITIES[_rank(findings)]
    return TableCell(worst, SEVERITIES.index(worst), severity=worst)


def _reasons(findings: Sequence[Finding]) -> str:
    more = f"; and {len(findings) - 1} more" if len(findings) > 1 else ""
    return (findings[0].reason + more) if findings else ""


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"


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
