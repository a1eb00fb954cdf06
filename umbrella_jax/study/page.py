"""The page of a built study, study.html: who was left out, the columns by split, and examples with pictures."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from umbrella_jax.config.schema import MAX_CLASSES, OPEN_KINDS
from umbrella_jax.console import plural
from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import DataError
from umbrella_jax.html.charts import CountTable, Histogram, count_table, histogram_of
from umbrella_jax.html.page import page_faults, png, render_page
from umbrella_jax.html.scan_panels import EmbeddedScan, PageScans, ScanPanel, embed_scan
from umbrella_jax.html.slices import cut_planes, draw_planes, grey_range
from umbrella_jax.study.built import BuiltStudy, visits_by_split
from umbrella_jax.study.cohort import bin_labels
from umbrella_jax.study.schema import STUDY, TEST, StudyConfig
from umbrella_jax.study.visits import Visit

PAGE = "study.html"
_EXAMPLES = 12
_COMMON = 30
"""Categories of a column that have a row of their own, the most frequent ones."""


@dataclass(frozen=True)
class FlowSplit:
    """A split, or the test set of a fold, at the end of the flow diagram."""

    name: str
    subjects: int
    facts: Sequence[str]


@dataclass(frozen=True)
class CohortFlow:
    """The flow of one cohort, from the subjects that were found to the splits."""

    title: str
    found: int
    left_out: Sequence[tuple[str, Sequence[str]]]
    """(reason, subjects)."""
    included: int
    splits: Sequence[FlowSplit]


@dataclass(frozen=True)
class ShownScan:
    """A scan of an example conversation."""

    path: str
    picture: str
    """Data URL; empty if it cannot be drawn."""
    remark: str
    """Why it cannot be drawn, or what differs from the file."""
    panel: ScanPanel


def write_page(built: BuiltStudy, file: Path) -> None:
    """Write study.html; without Pillow (extra `report`) it has no pictures, and says so."""
    sets = _sets(built)
    columns = dict.fromkeys((*built.config.keep, *built.config.split.stratify, *built.config.split.balance))
    if (leave_out := built.config.split.leave_out) is not None:
        columns[leave_out] = None
    can_draw, scans = not page_faults("", file, ["pillow"]), PageScans()
    examples = [
        (title, record, [_shown(built.root / image["path"], can_draw, scans) for image in record["images"]])
        for title, record in _examples(built)
    ]
    render_page(
        Path(__file__).with_name("page.html"),
        file,
        script=True,
        scans=scans,
        built=built,
        flows=[_flow(built, name) for name in built.cohorts],
        columns=[_column_chart(name, sets, built.config) for name in columns],
        labels=_label_charts(built),
        shared=_shared(built.config, sets),
        examples=examples,
        can_draw=can_draw,
    )


def _sets(built: BuiltStudy) -> dict[str, list[Visit]]:
    """Return {split, test set of a fold, or external split: its visits}."""
    visits = built.cohorts[STUDY].visits
    external = {name: list(cohort.visits) for name, cohort in built.cohorts.items() if name != STUDY}
    if not built.has_folds:
        return visits_by_split(built.partitions[0], visits) | external
    return {
        f"{p.name} ({p.left_out})" if p.left_out else str(p.name): visits_by_split(p, visits).get(TEST, [])
        for p in built.partitions
    } | external


def _flow(built: BuiltStudy, name: str) -> CohortFlow:
    flow = built.cohorts[name].flow
    splits = []
    for partition, counts in zip(built.partitions, built.counts.values(), strict=True):
        for split, of_split in counts.items():
            in_cohort = split == name if name != STUDY else split not in built.config.external
            if not in_cohort or (built.has_folds and name == STUDY and split != TEST):
                continue
            members = [s for s in flow.included if name != STUDY or partition.split_of.get(s) == split]
            title = split
            if partition.name and name == STUDY:
                title = f"tested in {partition.name}" + (f" ({partition.left_out})" if partition.left_out else "")
            facts = [f"{task}: {labels.total()} conversations" for task, labels in of_split.labels.items()]
            splits.append(FlowSplit(title, len(members), facts))
        if name != STUDY:
            break  # an external cohort is the same in every fold
    title = "Study" if name == STUDY else f"External cohort {name}"
    return CohortFlow(title, flow.total, list(flow.left_out.items()), len(flow.included), splits)


def _column_chart(column: str, sets: Mapping[str, Sequence[Visit]], config: StudyConfig) -> CountTable | Histogram:
    """Return the distribution of a column over subjects, each with the value of the first visit that has one."""
    values: dict[str, dict[str, str | None]] = {}
    for name, visits in sets.items():
        of_set = values.setdefault(name, {})
        for visit in visits:
            of_set[visit.subject] = of_set.get(visit.subject) or visit.values.get(column)
    cells = {name: list(of_set.values()) for name, of_set in values.items()}
    return _chart(column, cells, column, "subjects", _bin_order(config, column))


def _bin_order(config: StudyConfig, column: str | None) -> Sequence[str]:
    """Return the names of a column's groups from the lowest to the highest; empty if it has no bins."""
    bins = config.bins.get(column or "")
    return () if bins is None else bin_labels(bins)


def _chart(
    title: str, values: Mapping[str, Sequence[str | None]], axis: str, counted: str, first: Sequence[str] = ()
) -> CountTable | Histogram:
    """Return a histogram of numbers with many values, else a table of counts; categories of `first` come first."""
    distinct = Counter(cell for row in values.values() for cell in row if cell is not None)
    numbers = {cell: parse_cell_number(cell) for cell in distinct}
    if len(distinct) > MAX_CLASSES and None not in numbers.values():
        known = {
            name: [n for cell in row if cell is not None and (n := numbers[cell]) is not None]
            for name, row in values.items()
        }
        if (histogram := histogram_of(title, known, axis=axis, counted=counted)) is not None:
            return histogram
    common = {cell for cell, _ in distinct.most_common(_COMMON)}

    def name_of(cell: str | None) -> str:
        return "missing" if cell is None else cell if cell in common else "other values"

    ranks = {cell: rank for rank, cell in enumerate(first, -len(first))}
    order = [*sorted(common, key=lambda c: (ranks.get(c, 0), numbers[c] or 0, c)), "other values", "missing"]
    counts = {}
    for name, row in values.items():
        number_of = Counter(map(name_of, row))
        counts[name] = {category: number_of[category] for category in order}
    used = {category for row in counts.values() for category, n in row.items() if n}
    counts = {name: {c: n for c, n in row.items() if c in used} for name, row in counts.items()}
    return count_table(title, counts, axis=axis, counted=counted)


def _label_charts(built: BuiltStudy) -> list[CountTable | Histogram]:
    """Return the answers of each task in each split; of folds, in their test sets."""
    charts = []
    for task, config in built.config.tasks.items():
        if config.kind in OPEN_KINDS:
            continue
        values: dict[str, list[str | None]] = {}
        for name, splits in built.counts.items():
            for split, counts in splits.items():
                if name == STUDY or split == TEST:
                    values[split if name == STUDY else name] = list(counts.labels.get(task, Counter()).elements())
        order = [config.labels.get(name, name) for name in _bin_order(built.config, config.column)]
        charts.append(_chart(f"{task}: answers", values, config.column or "answer", "conversations", order))
    return charts


def _shared(config: StudyConfig, sets: Mapping[str, Sequence[Visit]]) -> list[tuple[str, str, int, int, int]]:
    """Return (set, other set, number of subjects, groups and scans that both have) of all pairs, as evidence."""
    subjects = {name: {visit.subject for visit in visits} for name, visits in sets.items()}
    groups = {name: set(_groups(config, visits)) for name, visits in sets.items()}
    scans = {
        name: {scan.path for visit in visits for scans in visit.scans.values() for scan in scans}
        for name, visits in sets.items()
    }
    return [
        (
            one,
            other,
            len(subjects[one] & subjects[other]),
            len(groups[one] & groups[other]),
            len(scans[one] & scans[other]),
        )
        for one, other in combinations(sets, 2)
    ]


def _groups(config: StudyConfig, visits: Iterable[Visit]) -> Iterable[str]:
    by = config.split.by
    return (visit.subject if by == "subject" else visit.values.get(by, f"{visit.subject} alone") for visit in visits)


def _examples(built: BuiltStudy) -> list[tuple[str, Mapping[str, Any]]]:
    """Return up to twelve (title, record): of each task in turn, from one split after the other."""
    splits = next(iter(built.counts.values()))
    by_task = [
        [(f"{task}, {split}", counts.examples[task]) for split, counts in splits.items() if task in counts.examples]
        for task in built.config.tasks
    ]
    rounds = zip_longest(*by_task)
    return [example for of_round in rounds for example in of_round if example is not None][:_EXAMPLES]


def _shown(path: Path, can_draw: bool, scans: PageScans) -> ShownScan:
    """Draw three planes of a scan as stored, and embed it; of a run, its first frame."""
    try:
        opened = open_voxels(path)
        volume = np.asarray(opened.read(0), np.float64)
    except DataError as error:
        return ShownScan(path.name, "", error.faults[0], scans.panel(path.name, EmbeddedScan("")))
    remark, finite = "", np.isfinite(volume)
    if not finite.any():
        return ShownScan(path.name, "", "no voxel is finite", scans.panel(path.name, EmbeddedScan("")))
    if not finite.all():
        volume[~finite] = volume[finite].min()
        remark = f"{plural(int((~finite).sum()), 'voxel')} not finite, shown as the smallest"
    codes = None if opened.affine is None else "".join(nib.aff2axcodes(opened.affine))
    zooms = None if opened.zooms is None else tuple(map(float, opened.zooms))
    picture = ""
    if can_draw:
        picture = png(draw_planes(cut_planes(volume, codes, zooms), *grey_range(volume), longest=150))
    scan = embed_scan(volume, codes, zooms, affine=opened.affine)
    return ShownScan(path.name, picture, remark, scans.panel(path.name, scan))
