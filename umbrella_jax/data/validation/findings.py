"""The report of `validate`: text for people, JSON for programs."""

import itertools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.console import plural, table_lines, wrapped
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.errors import visible

_NUMBER = re.compile(r"([-+\N{MINUS SIGN}]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)(?!\w)(\D*)")
"""A number, and a text after it without another one."""

Severity = Literal["fault", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
SETS = ("train", "eval")
FINDING_KINDS = {
    "base": "the base and its tokenizer",
    "conversation": "conversation files",
    "text": "conversations as text",
    "images": "images in conversations",
    "volume": "volumes that a run refuses",
    "overlap": "in train and in eval",
    "leak": "answers that can be known without the scan",
    "unchecked": "not checked",
    "duplicate": "the same voxels under several names",
    "contradiction": "the same question about the same images, answered differently",
    "answers": "answers",
    "header": "headers that contradict themselves",
    "repetition_time": "repetition times of runs",
    "empty": "nearly empty volumes",
    "background": "background of volumes with voxels below 0",
    "outlier": "volumes unlike the others of their modality",
    "task_id": "repeated task ids",
}
"""{kind of finding: its heading}, in the order of the report."""
_PLACES_SHOWN = 5  # per group of findings, on the terminal
_ROWS_SHOWN = 6  # answers of a task, and values of a property


@dataclass(frozen=True)
class Finding:
    """One entry of the report.

    A fault is something that a run refuses, data that train and eval share, a copy of a scan, or an answer that can be
    known without it. Warnings and notes are for a person to check.
    """

    severity: Severity
    kind: str
    """One of FINDING_KINDS."""
    sets: tuple[str, ...]
    """The sets it concerns: train, eval or both."""
    place: str
    """The file, and the position in it."""
    reason: str


@dataclass(frozen=True)
class VolumeContents:
    """Header and voxel statistics of a file, before preprocessing.

    Statistics count finite voxels only; they are None if there are none.
    """

    shape: tuple[int, ...]
    dtype: str
    """Type of the stored numbers, before a NIfTI file's scaling."""
    orientation: str | None
    """Axis codes as in `nibabel.aff2axcodes`, such as LPS; None if the format has none."""
    voxel_size: tuple[float, ...] | None
    """mm along each stored axis; None if the format has none."""
    tr: float | None
    """Seconds from frame to frame, as the sidecar or else the header states it; None for a single frame, and if
    neither does."""
    minimum: float | None
    maximum: float | None
    mean: float | None
    nonzero: float
    """Fraction of the voxels that are not 0."""
    still: bool
    """Whether the file has several frames, all equal."""
    digest: str
    """BLAKE2b of the shape (without last axes of length 1) and the float32 voxels in stored order. It does not depend
    on the file's format, type and compression."""
    remarks: tuple[str, ...] = ()
    """Contradictions in the header, each with the reading that is used."""

    @property
    def frames(self) -> int:
        """Length of the fourth axis, 1 if there is none."""
        return self.shape[3] if len(self.shape) > 3 else 1


@dataclass(frozen=True)
class ShownVolume:
    """A volume that conversations show."""

    path: Path
    modality: str
    sets: tuple[str, ...]
    windows: int
    """Number of windows that a run can draw; 0 if a run would refuse the volume."""
    contents: VolumeContents | None
    """None if the file cannot be read."""

    @property
    def key(self) -> str:
        """A key for the voxels, whatever the file is called; the path if the file cannot be read."""
        return self.contents.digest if self.contents else str(self.path)


def task_name(conversation: Conversation) -> str:
    """Return the task of a conversation: `metadata.task`, else `task_type`."""
    return str(conversation.metadata.get("task") or conversation.task_type or "")


@dataclass(frozen=True)
class ConversationSet:
    """The conversations of train or eval that have no fault."""

    path: str
    conversations: Sequence[Conversation]
    lengths: Mapping[str, np.ndarray]
    """{positions, patches, text, supervised: int array [conversations]}; positions = patches + text. Empty without a
    tokenizer."""

    @property
    def answers(self) -> dict[str, Counter[str]]:
        """{task: {last answer: count}}; the task is `metadata.task`, else `task_type`."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for c in self.conversations:
            if c.messages[-1].role == "assistant":
                counts[task_name(c)][c.messages[-1].text.strip()] += 1
        return counts

    @property
    def subjects(self) -> dict[str, list[str]]:
        """{subject: labels of the conversations that show it}."""
        return self._labels(lambda c: sorted(c.subjects))

    @property
    def queried(self) -> dict[str, list[str]]:
        """`subjects` without those that conversations show only as references."""
        return self._labels(lambda c: sorted(c.subjects - c.references))

    @property
    def groups(self) -> dict[str, list[str]]:
        """{`group_id` of `metadata`, such as a family: labels of its conversations}."""
        return self._labels(lambda c: [str(group)] if (group := c.metadata.get("group_id")) is not None else [])

    def _labels(self, names_of: Callable[[Conversation], list[str]]) -> dict[str, list[str]]:
        labels: dict[str, list[str]] = defaultdict(list)
        for conversation in self.conversations:
            for name in names_of(conversation):
                labels[name].append(conversation.label)
        return labels


@dataclass(frozen=True)
class ValidationReport:
    """Everything that `validate` returns."""

    sets: Mapping[str, ConversationSet]
    volumes: tuple[ShownVolume, ...]
    """Distinct volumes in the order of first appearance."""
    findings: tuple[Finding, ...]

    def with_severity(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity in the order of FINDING_KINDS."""
        findings = [finding for finding in self.findings if finding.severity == severity]
        return sorted(findings, key=lambda finding: list(FINDING_KINDS).index(finding.kind))

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.with_severity("fault")

    def tables(self) -> list["StatisticsTable"]:
        """Return the statistics as tables, without empty ones."""
        modalities = dict.fromkeys(volume.modality for volume in self.volumes)
        volume_tables = (table for modality in modalities for table in _volume_tables(self, modality))
        tables = [*self.overview(), *_task_tables(self), *volume_tables]
        return [table for table in tables if table.rows]

    def overview(self) -> list["StatisticsTable"]:
        """Return the first tables: the sets, and the lengths of their conversations."""
        return [_set_table(self), _length_table(self)]

    def lines(self) -> list[str]:
        """Return the text for people: tables, then notes, warnings and faults in groups with their first places."""
        lines = [line for table in self.tables() for line in (*table.lines(), "")]
        for severity in reversed(SEVERITIES):
            findings = self.with_severity(severity)
            if findings:
                lines += [f"{plural(len(findings), severity)}:", *_grouped_lines(findings, self._shown_by()), ""]
        return [visible(line, kept="") for line in [*lines, self.verdict()]]

    def verdict(self) -> str:
        """Return the last line for people: whether there is no fault, and the number of findings."""
        counts = ", ".join(plural(len(self.with_severity(s)), s) for s in SEVERITIES)
        return f"{'good' if self.ok else 'not good'}: {counts}"

    def _shown_by(self) -> dict[str, str]:
        """Return {path of a volume: label of the first conversation that shows it}."""
        pairs = [(str(i.path), c.label) for s in self.sets.values() for c in s.conversations for i in c.images]
        return dict(reversed(pairs))

    def to_json(self) -> dict[str, Any]:
        """Return the report for programs; docs/validate.md explains the keys."""
        return {
            "version": 1,
            "ok": self.ok,
            "counts": {severity: len(self.with_severity(severity)) for severity in SEVERITIES},
            "findings": [
                {"severity": f.severity, "kind": f.kind, "sets": f.sets, "place": f.place, "reason": f.reason}
                for severity in SEVERITIES
                for f in self.with_severity(severity)
            ],
            "sets": {
                name: {
                    "path": s.path,
                    "conversations": len(s.conversations),
                    "subjects": len(s.subjects),
                    "lengths": {
                        unit: {"min": int(n.min()), "median": float(np.median(n)), "max": int(n.max()), **histogram(n)}
                        for unit, n in s.lengths.items()
                        if n.size
                    },
                    "answers": s.answers,
                }
                for name, s in self.sets.items()
            },
            "volumes": [
                {
                    "path": str(v.path),
                    "modality": v.modality,
                    "sets": v.sets,
                    "windows": v.windows,
                    "contents": v.contents and dict(vars(v.contents)),
                }
                for v in self.volumes
            ],
        }


PROPERTIES: dict[str, Callable[[VolumeContents], str]] = {
    "shape": lambda c: _times(c.shape[:3]),
    "frames": lambda c: str(c.frames),
    "orientation": lambda c: c.orientation or "unknown",
    "voxel size (mm)": lambda c: "unknown" if c.voxel_size is None else _times(c.voxel_size),
    "TR (s)": lambda c: "" if c.frames == 1 else "unknown" if c.tr is None else f"{c.tr:.4g}",
    "type": lambda c: c.dtype,
    "below 0": lambda c: "some voxels" if (c.minimum or 0) < 0 else "none",
}
"""{property: its value as text}, for properties in which most volumes of a modality agree. An empty text means that a
volume does not have the property."""


@dataclass(frozen=True)
class StatisticsTable:
    """A small table of the report."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def lines(self) -> list[str]:
        """Return the title and the rows below it, indented."""
        rows = table_lines([self.columns, *self.rows], width=sys.maxsize)
        return [self.title, *(f"  {row}".rstrip() for row in rows)]


def histogram(values: np.ndarray, bins: int = 20) -> dict[str, list[int]]:
    """Return {edges, counts} of a histogram with whole-numbered edges; the last bin includes its upper edge."""
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(bins, high + 1 - low) + 1).round().astype(int))
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}


def _set_table(report: ValidationReport) -> StatisticsTable:
    rows = []
    for name, s in report.sets.items():
        faulty = {f.place for f in report.findings if f.kind == "conversation" and name in f.sets}
        volumes = sum(name in volume.sets for volume in report.volumes)
        rows.append((name, str(len(s.conversations)), str(len(faulty)), str(volumes), str(len(s.subjects)), s.path))
    return StatisticsTable("Sets", ("", "conversations", "faulty", "volumes", "subjects", "from"), tuple(rows))


def _length_table(report: ValidationReport) -> StatisticsTable:
    rows = [
        (f"{name} {unit}", str(n.min()), f"{np.median(n):g}", str(n.max()), f"{n.sum():,}")
        for name, s in report.sets.items()
        for unit, n in s.lengths.items()
        if n.size
    ]
    return StatisticsTable("Lengths of a conversation, in tokens", ("", "min", "median", "max", "sum"), tuple(rows))


def _task_tables(report: ValidationReport) -> Iterator[StatisticsTable]:
    answers = {name: s.answers for name, s in report.sets.items()}
    for task in sorted({task for by_task in answers.values() for task in by_task}):
        counts = {name: by_task.get(task, Counter()) for name, by_task in answers.items()}
        both = sum(counts.values(), Counter())
        title = f"Answers, task {task or 'not named'}"
        if len(both) > MAX_CLASSES and (numbers := as_numbers(counts)) is not None:
            values = numbers.values()
            summaries: dict[str, Callable[[list[float]], Any]] = {"min": min, "median": np.median, "max": max}
            rows = [
                (name, *(f"{summarise(n):g}" if n else "" for n in values)) for name, summarise in summaries.items()
            ]
            rows.append(("numbers", *(str(len(n)) for n in values)))
            yield StatisticsTable(title, ("", *counts), tuple(rows))
            continue
        shown = [answer for answer, _ in both.most_common(MAX_CLASSES if len(both) <= MAX_CLASSES else _ROWS_SHOWN)]
        rows = [
            (repr(answer) if answer else "blank", *(_share(c[answer], c.total()) for c in counts.values()))
            for answer in shown
        ]
        if num_others := len(both) - len(shown):
            others = [(c.total() - sum(c[answer] for answer in shown), c.total()) for c in counts.values()]
            rows.append((f"{num_others} others", *(_share(*pair) for pair in others)))
        yield StatisticsTable(title, ("", *counts), tuple(rows))


def as_numbers(answers: Mapping[str, Counter[str]]) -> dict[str, list[float]] | None:
    """Return the answers of each set as numbers; None if one is neither blank nor a number.

    A number may have a text after it, such as `64 years.`, if all have the same: numbers in several units have no
    distribution. After a text, as in `site 12`, it counts as part of a name.
    """
    matches = {answer: _NUMBER.fullmatch(answer.strip()) for c in answers.values() for answer in c if answer}
    if not all(matches.values()) or len({match[2].strip(" .") for match in matches.values() if match}) > 1:
        return None
    numbers = {answer: float(match[1].replace("\N{MINUS SIGN}", "-")) for answer, match in matches.items() if match}
    return {name: [numbers[answer] for answer in c.elements() if answer] for name, c in answers.items()}


def _volume_tables(report: ValidationReport, modality: str) -> Iterator[StatisticsTable]:
    volumes = [volume for volume in report.volumes if volume.modality == modality]
    readable = [volume.contents for volume in volumes if volume.contents is not None]
    rows = []
    for name, property_of in PROPERTIES.items():
        counts = Counter(filter(None, map(property_of, readable))).most_common()
        rows += [(name if i == 0 else "", value, str(count)) for i, (value, count) in enumerate(counts[:_ROWS_SHOWN])]
        if others := counts[_ROWS_SHOWN:]:
            rows.append(("", f"{len(others)} others", str(sum(count for _, count in others))))
    title = f"{modality}: {len(volumes)} volumes, {len(readable)} readable"
    yield StatisticsTable(title, ("", "", "volumes"), tuple(rows))
    ranges = []
    for name in ("minimum", "mean", "maximum", "nonzero"):
        if values := [value for c in readable if (value := getattr(c, name)) is not None]:
            low, middle, high = min(values), float(np.median(values)), max(values)
            label = "share of voxels not 0" if name == "nonzero" else f"{name} of the voxels"
            ranges.append((label, f"{low:.4g}", f"{middle:.4g}", f"{high:.4g}"))
    if ranges:
        yield StatisticsTable(f"{modality}: intensities as stored", ("", "min", "median", "max"), tuple(ranges))


def _grouped_lines(findings: Sequence[Finding], shown_by: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of findings of one severity, by kind and in groups.

    A group is one sentence with its first places. A volume that a run refuses comes with the conversation that shows
    it, since the conversation may have a wrong path.
    """
    for kind in FINDING_KINDS:
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            yield f"  {FINDING_KINDS[kind]} ({len(of_kind)})"
        for group in grouped(of_kind):
            first = group[0]
            where = [f", in {shown_by[f.place]}" if kind == "volume" and f.place in shown_by else "" for f in group]
            if len(group) == 1:
                yield from wrapped(visible(f"    {first.place}{where[0]}: {first.reason}", kept=""))
                continue
            shared, details = _differences([finding.reason for finding in group])
            yield from wrapped(visible(f"    {len(group)} × {shared}", kept=""))
            for finding, differing, shown_in in zip(group[:_PLACES_SHOWN], details, where, strict=False):
                text = f": {', '.join(differing)}" if differing else ""
                yield from wrapped(visible(f"        {finding.place}{shown_in}{text}", kept=""))
            if len(group) > _PLACES_SHOWN:
                yield f"        … and {len(group) - _PLACES_SHOWN} more (--json and --html list all)"


def _differences(texts: Sequence[str]) -> tuple[str, list[list[str]]]:
    """Return (sentence, differences): the words that all texts share, with `…` for the rest, and each text's own words.

    Texts with different numbers of words are not compared: the sentence is the first text, and the differences are the
    other texts. Brackets around a difference stay in the sentence.
    """
    words = [text.split(" ") for text in texts]
    if len({len(text) for text in words}) > 1:
        return texts[0], [[] if text == texts[0] else [text] for text in texts]
    shared, details = list[str](), [list[str]() for _ in texts]
    for same, run in itertools.groupby(zip(*words, strict=True), key=lambda column: len(set(column)) == 1):
        columns = list(run)
        if same:
            shared += [column[0] for column in columns]
            continue
        phrases = [" ".join(phrase) for phrase in zip(*columns, strict=True)]
        ends = {phrase[-1:] for phrase in phrases}
        end = (
            ends.pop() if len(ends) == 1 and ends <= {",", ";", ":"} else ""
        )  # punctuation that belongs to the sentence
        phrases = [phrase.removesuffix(end) for phrase in phrases]
        opening, closing = _brackets(phrases)
        shared.append(f"{opening}…{closing}{end}")
        for differing, phrase in zip(details, phrases, strict=True):
            differing.append(phrase.removeprefix(opening).removesuffix(closing))
    return " ".join(shared), details


def _brackets(phrases: Sequence[str]) -> tuple[str, str]:
    """Return the brackets that belong to the sentence.

    They enclose every phrase, or every phrase opens one without closing it, or closes one without opening it.
    """
    opened, closed = [], []
    for phrase in phrases:
        depths = list(itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in phrase)) or [0]
        around = depths[0] == 1 and depths[-1] == 0 and min(depths[:-1]) > 0
        opened.append(around or (depths[0] == 1 and min(depths) > 0))
        closed.append(around or (phrase.endswith(")") and depths[-1] < 0 and min(depths[:-1], default=0) >= 0))
    return "(" if all(opened) else "", ")" if all(closed) else ""


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings by kind and by reason, ignoring numbers, paths and quoted words; the largest group first."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        pattern = re.sub(r"'[^']*'|\S*/\S*|\d+(\.\d+)?(e[+-]?\d+)?", "…", finding.reason)
        groups[finding.kind, pattern].append(finding)
    return sorted(groups.values(), key=len, reverse=True)


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"


def _times(numbers: Iterable[float]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)
