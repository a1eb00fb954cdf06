"""Distributions of a `ValidationReport` by set, for its page: answers, subjects, lengths, and properties of volumes."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.data.validation.findings import (
    PROPERTIES,
    ShownVolume,
    ValidationReport,
    VolumeContents,
    as_numbers,
)
from umbrella_jax.html.charts import CountTable, Histogram, count_table, histogram_of

_CATEGORIES = 12
"""Categories of a table; rarer ones are summed up in a last row."""
_NUMBERS: dict[str, Callable[[VolumeContents], float | None]] = {
    "voxel volume (mm³)": lambda c: None if c.voxel_size is None else math.prod(c.voxel_size),
    "TR (s)": lambda c: c.tr,
    "frames": lambda c: c.frames,
    "smallest voxel, as stored": lambda c: c.minimum,
    "mean of the voxels, as stored": lambda c: c.mean,
    "largest voxel, as stored": lambda c: c.maximum,
    "voxels that are not 0 (%)": lambda c: 100 * c.nonzero,
}
_IN_TABLES = ("voxel volume (mm³)", "TR (s)", "frames")
"""Numbers that a table of `PROPERTIES` shows too; a histogram follows if they have too many values for it."""


@dataclass(frozen=True)
class DistributionGroup:
    """Distributions that the page shows under one heading."""

    title: str
    tables: list[CountTable] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)


def distributions(report: ValidationReport) -> list[DistributionGroup]:
    """Return the distributions of conversations, then those of each modality's volumes, without empty groups."""
    modalities = dict.fromkeys(volume.modality for volume in report.volumes)
    groups = [_conversations(report), *(_volumes(report, modality) for modality in modalities)]
    return [group for group in groups if group.tables or group.histograms]


def _conversations(report: ValidationReport) -> DistributionGroup:
    group = DistributionGroup("Conversations")
    answers = {name: s.answers for name, s in report.sets.items()}
    for task in sorted({task for by_task in answers.values() for task in by_task}):
        counts = {name: by_task.get(task, Counter[str]()) for name, by_task in answers.items()}
        title = f"task {task or 'without a name'}"
        numbers = as_numbers(counts) if len(set().union(*counts.values())) > MAX_CLASSES else None
        if numbers is None:
            group.tables.append(_most_common(f"Answers, {title}", counts, "answer", "conversations"))
        elif plot := histogram_of(title, numbers, axis="answer", counted="conversations"):
            group.histograms.append(plot)
    subjects = {name: [len(labels) for labels in s.subjects.values()] for name, s in report.sets.items()}
    histograms = [histogram_of("conversations per subject", subjects, axis="conversations", counted="subjects")]
    for unit in ("positions", "patches", "text", "supervised"):
        lengths = {name: s.lengths[unit] for name, s in report.sets.items() if unit in s.lengths}
        title = f"{unit} per conversation"
        histograms.append(histogram_of(title, lengths, axis=f"{unit} (tokens)", counted="conversations"))
    group.histograms.extend(filter(None, histograms))
    return group


def _volumes(report: ValidationReport, modality: str) -> DistributionGroup:
    volumes = [volume for volume in report.volumes if volume.modality == modality and volume.contents]
    group = DistributionGroup(f"{modality}: {len(volumes):,} volumes that can be read")
    of_sets = {name: list(_contents(volumes, name)) for name in report.sets}
    for name, property_of in PROPERTIES.items():
        counts = {set_name: Counter(filter(None, map(property_of, contents))) for set_name, contents in of_sets.items()}
        if any(counts.values()):
            group.tables.append(_most_common(name, counts, name, "volumes"))
    for axis, value_of in _NUMBERS.items():
        numbers = {
            set_name: [value for c in contents if (value := value_of(c)) is not None]
            for set_name, contents in of_sets.items()
        }
        in_a_table = axis in _IN_TABLES and len(set().union(*numbers.values())) <= _CATEGORIES
        if not in_a_table and (plot := histogram_of(axis, numbers, axis=axis, counted="volumes")):
            group.histograms.append(plot)
    return group


def _contents(volumes: Sequence[ShownVolume], name: str) -> Iterator[VolumeContents]:
    """Yield the contents of the volumes in a set."""
    for volume in volumes:
        if name in volume.sets and volume.contents:
            yield volume.contents


def _most_common(title: str, counts: Mapping[str, Counter[str]], axis: str, counted: str) -> CountTable:
    """Return the table of the most frequent categories; the others are summed up in a last row."""
    both = sum(counts.values(), Counter[str]())
    kept = [category for category, _ in both.most_common(_CATEGORIES)]
    rows = {name: {category or "blank": of_set[category] for category in kept} for name, of_set in counts.items()}
    if others := len(both) - len(kept):
        for name, of_set in counts.items():
            rows[name][f"{others:,} others"] = of_set.total() - sum(rows[name].values())
    return count_table(title, rows, axis=axis, counted=counted)
