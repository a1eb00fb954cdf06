"""What a built study contains, for its record, its page and the lines that are printed."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from umbrella_jax.data.subject_split import split_names
from umbrella_jax.study.cohort import Cohort
from umbrella_jax.study.schema import TEST, StudyConfig
from umbrella_jax.study.split import Partition
from umbrella_jax.study.visits import Visit


@dataclass
class SplitCounts:
    """Counts and examples of one split's conversations."""

    subjects: set[str] = field(default_factory=set)
    """Subjects that are asked about; references are not counted."""
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """{task: {label or number: conversations}}."""
    subjects_of: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """{task: subjects that it asks about}."""
    comparison_types: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """{task that compares: {`same` or `different`: conversations}}."""
    examples: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """{task: one of its records, as good as drawn at random, the same in every build}."""
    _ranks: dict[str, int] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one record."""
        metadata = record["metadata"]
        task = metadata["task"]
        self.subjects.add(metadata["subject_id"])
        self.subjects_of[task].add(metadata["subject_id"])
        self.labels[task][str(metadata.get("subject_label", ""))] += 1
        if (comparison := metadata.get("comparison_type")) is not None:
            self.comparison_types[task][comparison] += 1
        rank = crc32(record["task_id"].encode())
        if rank < self._ranks.get(task, 1 << 32):
            self._ranks[task], self.examples[task] = rank, record

    @property
    def conversations(self) -> int:
        """Conversations of all tasks."""
        return sum(counts.total() for counts in self.labels.values())


@dataclass(frozen=True)
class BuiltStudy:
    """Everything that a study consists of; `write_study` adds the counts."""

    config: StudyConfig
    text: str
    """The study file."""
    root: Path
    """Where image paths start."""
    cohorts: Mapping[str, Cohort]
    """{STUDY, or the split of an external cohort: its visits and flow}."""
    partitions: Sequence[Partition]
    notes: list[str]
    """What was left out and why, for the user."""
    counts: dict[str, dict[str, SplitCounts]] = field(default_factory=dict)
    """{fold, or STUDY without folds: {split: what it contains}}."""

    @property
    def has_folds(self) -> bool:
        """Whether every subject is in the test set of one fold."""
        return self.partitions[0].name is not None

    @property
    def tested_labels(self) -> dict[str, Counter[str]]:
        """{task: {label or number: conversations}} in the test sets of all folds."""
        labels: dict[str, Counter[str]] = {}
        for splits in self.counts.values():
            for task, counts in splits[TEST].labels.items():
                labels[task] = labels.get(task, Counter()) + counts
        return labels

    @property
    def group_of(self) -> dict[str, str]:
        """{subject: its split, or with folds the fold whose test set it is in}, sorted."""
        if not self.has_folds:
            return dict(sorted(self.partitions[0].split_of.items()))
        tested = ((s, str(p.name)) for p in self.partitions for s, split in p.split_of.items() if split == TEST)
        return dict(sorted(tested))


def visits_by_split(partition: Partition, visits: Sequence[Visit]) -> dict[str, list[Visit]]:
    """Return {split: its visits}, train first; visits of subjects without a split are left out."""
    splits: dict[str, list[Visit]] = {name: [] for name in split_names(partition.split_of)}
    for visit in visits:
        if (split := partition.split_of.get(visit.subject)) is not None:
            splits[split].append(visit)
    return splits
