"""What `validate` found, as text for people and as JSON for programs."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from umbrella_jax.config.schema import MAX_CLASSES
from umbrella_jax.console import plural, wrapped
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.errors import visible

Severity = Literal["fault", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
SETS = ("train", "eval")
KINDS = {
    "base": "the base and its tokenizer",
    "conversation": "conversation files",
    "text": "conversations as text",
    "images": "what conversations show",
    "volume": "volumes that a run refuses",
    "overlap": "in train and in eval",
    "unchecked": "not checked",
    "duplicate": "the same voxels under several names",
    "contradiction": "the same question about the same images, answered differently",
    "answers": "answers",
    "header": "headers that contradict themselves",
    "empty": "volumes with next to nothing in them",
    "background": "background of volumes with voxels below 0",
    "outlier": "volumes unlike the others of their modality",
    "task_id": "task ids that come twice",
}
"""Of findings, in the order in which they are told."""
_PLACES = 5  # of a finding, on the terminal
_ANSWERS = 6  # of a task, on the terminal


@dataclass(frozen=True)
class Finding:
    """One thing found. Faults are what a run refuses, and what train and eval share; the rest is to be looked at."""

    severity: Severity
    kind: str
    """One of KINDS."""
    sets: tuple[str, ...]
    """Which of train and eval it concerns."""
    place: str
    """The file, and what in it."""
    reason: str


@dataclass(frozen=True)
class Contents:
    """What a file holds, before any preprocessing. Numbers are of its finite voxels, None where there are none."""

    shape: tuple[int, ...]
    dtype: str
    """As stored, before a NIfTI file's scaling."""
    orientation: str | None
    """As `nibabel.aff2axcodes`, such as LPS; None where the format says nothing of it."""
    voxel_size: tuple[float, ...] | None
    """mm along each stored axis."""
    minimum: float | None
    maximum: float | None
    mean: float | None
    nonzero: float
    """Share of the voxels that are not 0."""
    still: bool
    """Whether it has several frames, all of them the same."""
    digest: str
    """BLAKE2b of shape, last axes of length 1 left out, and float32 voxels in stored order, whatever the file's format,
    type and compression."""
    remarks: tuple[str, ...] = ()
    """Contradictions of its header, each with the reading that was taken."""

    @property
    def frames(self) -> int:
        """Length of the fourth axis, 1 where there is none."""
        return self.shape[3] if len(self.shape) > 3 else 1


@dataclass(frozen=True)
class Volume:
    """One image that conversations show."""

    path: Path
    modality: str
    sets: tuple[str, ...]
    windows: int
    """That a run can draw; 0 where it would refuse the volume."""
    contents: Contents | None
    """None where it cannot be read."""

    @property
    def key(self) -> str:
        """The same for the same voxels under any name; the path where they cannot be read."""
        return self.contents.digest if self.contents else str(self.path)


@dataclass(frozen=True)
class Set:
    """What is good of train or of eval."""

    path: str
    conversations: tuple[Conversation, ...]
    lengths: Mapping[str, np.ndarray]
    """{positions, patches, text, supervised: int [conversations]}; positions are patches and text. Empty where there
    was no tokenizer."""

    @property
    def answers(self) -> dict[str, Counter[str]]:
        """{task: {last answer: how often}}; the task is `metadata.task`, else `task_type`."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for c in self.conversations:
            if c.messages[-1].role == "assistant":
                found[str(c.metadata.get("task") or c.task_type or "")][c.messages[-1].text.strip()] += 1
        return found

    @property
    def subjects(self) -> dict[str, list[str]]:
        """{subject: labels of the conversations about it}."""
        found: dict[str, list[str]] = defaultdict(list)
        for conversation in self.conversations:
            for subject in sorted(conversation.subjects):
                found[subject].append(conversation.label)
        return found


@dataclass(frozen=True)
class Report:
    """All that was found."""

    sets: Mapping[str, Set]
    volumes: tuple[Volume, ...]
    """Each distinct one, in the order of first appearance."""
    findings: tuple[Finding, ...]

    def of(self, severity: Severity) -> list[Finding]:
        """In the order of KINDS."""
        found = [finding for finding in self.findings if finding.severity == severity]
        return sorted(found, key=lambda finding: list(KINDS).index(finding.kind))

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.of("fault")

    def tables(self) -> list["Table"]:
        """The statistics."""
        modalities = dict.fromkeys(volume.modality for volume in self.volumes)
        of_volumes = (table for modality in modalities for table in _volume_tables(self, modality))
        found = [_set_table(self), _length_table(self), *_task_tables(self), *of_volumes]
        return [table for table in found if table.rows]

    def lines(self) -> list[str]:
        """For people: tables, then notes, warnings and faults, alike ones together with the first few places."""
        out = [line for table in self.tables() for line in (*table.lines(), "")]
        for severity in reversed(SEVERITIES):
            found = self.of(severity)
            if found:
                out += [f"{plural(len(found), severity)}:", *_grouped_lines(found, self._shown_by()), ""]
        counts = ", ".join(plural(len(self.of(s)), s) for s in SEVERITIES)
        return [visible(line, kept="") for line in [*out, f"{'good' if self.ok else 'not good'}: {counts}"]]

    def _shown_by(self) -> dict[str, str]:
        """{path of a volume: the first conversation that shows it}."""
        found = [(str(i.path), c.label) for s in self.sets.values() for c in s.conversations for i in c.images]
        return dict(reversed(found))

    def to_json(self) -> dict[str, Any]:
        """For programs; docs/validate.md says what the keys are."""
        return {
            "version": 1,
            "ok": self.ok,
            "counts": {severity: len(self.of(severity)) for severity in SEVERITIES},
            "findings": [
                {"severity": f.severity, "kind": f.kind, "sets": f.sets, "place": f.place, "reason": f.reason}
                for severity in SEVERITIES
                for f in self.of(severity)
            ],
            "sets": {
                name: {
                    "path": s.path,
                    "conversations": len(s.conversations),
                    "subjects": len(s.subjects),
                    "lengths": {
                        what: {"min": int(n.min()), "median": float(np.median(n)), "max": int(n.max()), **histogram(n)}
                        for what, n in s.lengths.items()
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


PROPERTIES: dict[str, Callable[[Contents], str]] = {
    "shape": lambda c: _times(c.shape[:3]),
    "frames": lambda c: str(c.frames),
    "orientation": lambda c: c.orientation or "not said",
    "voxel size (mm)": lambda c: "not said" if c.voxel_size is None else _times(c.voxel_size),
    "type": lambda c: c.dtype,
    "below 0": lambda c: "some voxels" if (c.minimum or 0) < 0 else "none",
}
"""Of which the volumes of a modality mostly have one value."""


@dataclass(frozen=True)
class Table:
    """A few numbers for people."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def lines(self) -> list[str]:
        """Numbers to the right, the first column to the left."""
        columns = []
        for i, column in enumerate(zip(self.columns, *self.rows, strict=True)):
            width = max(map(len, column))
            columns.append([f"{cell:>{width}}" if i else f"{cell:<{width}}" for cell in column])
        return [self.title, *(f"  {'  '.join(row)}".rstrip() for row in zip(*columns, strict=True))]


def histogram(values: np.ndarray, bins: int = 20) -> dict[str, list[int]]:
    """Counts between whole-numbered edges; the last bin holds its upper edge too."""
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(bins, high + 1 - low) + 1).round().astype(int))
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}


def _set_table(report: Report) -> Table:
    rows = []
    for name, s in report.sets.items():
        faulty = {f.place for f in report.findings if f.kind == "conversation" and name in f.sets}
        volumes = sum(name in volume.sets for volume in report.volumes)
        rows.append((name, str(len(s.conversations)), str(len(faulty)), str(volumes), str(len(s.subjects)), s.path))
    return Table("Sets", ("", "conversations", "faulty", "volumes", "subjects", "from"), tuple(rows))


def _length_table(report: Report) -> Table:
    rows = [
        (f"{name} {what}", str(n.min()), f"{np.median(n):g}", str(n.max()), f"{n.sum():,}")
        for name, s in report.sets.items()
        for what, n in s.lengths.items()
        if n.size
    ]
    return Table("Lengths of a conversation, in tokens", ("", "min", "median", "max", "sum"), tuple(rows))


def _task_tables(report: Report) -> Iterator[Table]:
    answers = {name: s.answers for name, s in report.sets.items()}
    for task in sorted({task for of_set in answers.values() for task in of_set}):
        counts = {name: of_set.get(task, Counter()) for name, of_set in answers.items()}
        both = sum(counts.values(), Counter())
        title = f"Answers, task {task or 'not named'}"
        if len(both) > MAX_CLASSES and (values := _numbers(counts)) is not None:
            summaries: dict[str, Callable[[list[float]], Any]] = {"min": min, "median": np.median, "max": max}
            found = [(what, *(f"{of(n):g}" if n else "" for n in values)) for what, of in summaries.items()]
            yield Table(title, ("", *counts), (*found, ("numbers", *(str(len(n)) for n in values))))
            continue
        shown = [answer for answer, _ in both.most_common(MAX_CLASSES if len(both) <= MAX_CLASSES else _ANSWERS)]
        rows = [
            (repr(answer) if answer else "blank", *(_share(c[answer], c.total()) for c in counts.values()))
            for answer in shown
        ]
        if rest := len(both) - len(shown):
            left = [(c.total() - sum(c[answer] for answer in shown), c.total()) for c in counts.values()]
            rows.append((f"{rest} others", *(_share(*pair) for pair in left)))
        yield Table(title, ("", *counts), tuple(rows))


def _numbers(counts: Mapping[str, Counter[str]]) -> list[list[float]] | None:
    """The answers of each set, if all but the blank ones are numbers."""
    try:
        return [[float(answer) for answer in c.elements() if answer] for c in counts.values()]
    except ValueError:
        return None


def _volume_tables(report: Report, modality: str) -> Iterator[Table]:
    volumes = [volume for volume in report.volumes if volume.modality == modality]
    known = [volume.contents for volume in volumes if volume.contents is not None]
    rows = []
    for name, of in PROPERTIES.items():
        counts = Counter(map(of, known)).most_common()
        rows += [(name if i == 0 else "", value, str(count)) for i, (value, count) in enumerate(counts[:_ANSWERS])]
        if rest := counts[_ANSWERS:]:
            rows.append(("", f"{len(rest)} others", str(sum(count for _, count in rest))))
    yield Table(f"{modality}: {len(volumes)} volumes, {len(known)} of them readable", ("", "", "volumes"), tuple(rows))
    ranges = []
    for name in ("minimum", "mean", "maximum", "nonzero"):
        if values := [value for c in known if (value := getattr(c, name)) is not None]:
            low, middle, high = min(values), float(np.median(values)), max(values)
            label = "share of voxels not 0" if name == "nonzero" else f"{name} of the voxels"
            ranges.append((label, f"{low:.4g}", f"{middle:.4g}", f"{high:.4g}"))
    if ranges:
        yield Table(f"{modality}: intensities as stored", ("", "min", "median", "max"), tuple(ranges))


def _grouped_lines(findings: Sequence[Finding], shown_by: Mapping[str, str]) -> Iterator[str]:
    """Findings that differ in numbers and names alone are one, with its first places; of a volume that a run refuses
    with the conversation to mend, which may name it wrongly."""
    for kind in KINDS:
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            yield f"  {KINDS[kind]} ({len(of_kind)})"
        for group in grouped(of_kind):
            first = group[0]
            where = [f", in {shown_by[f.place]}" if kind == "volume" and f.place in shown_by else "" for f in group]
            if len(group) == 1:
                yield from wrapped(visible(f"    {first.place}{where[0]}: {first.reason}", kept=""))
                continue
            said, details = _differences([finding.reason for finding in group])
            yield from wrapped(visible(f"    {len(group)} × {said}", kept=""))
            for finding, of_one, of_volume in zip(group[:_PLACES], details, where, strict=False):
                text = f": {', '.join(of_one)}" if of_one else ""
                yield from wrapped(visible(f"        {finding.place}{of_volume}{text}", kept=""))
            if len(group) > _PLACES:
                yield f"        … and {len(group) - _PLACES} more (--json and --html name all)"


def _differences(texts: Sequence[str]) -> tuple[str, list[list[str]]]:
    """Return the words that all texts share, with `…` for those that differ, and the differing words of each text.

    Texts of different lengths share nothing: return the first, and the others whole. Brackets around a difference stay
    with the shared words.
    """
    words = [text.split(" ") for text in texts]
    if len({len(of_one) for of_one in words}) > 1:
        return texts[0], [[] if text == texts[0] else [text] for text in texts]
    said, details = list[str](), [list[str]() for _ in texts]
    for same, run in itertools.groupby(zip(*words, strict=True), key=lambda column: len(set(column)) == 1):
        columns = list(run)
        if same:
            said += [column[0] for column in columns]
            continue
        phrases = [" ".join(phrase) for phrase in zip(*columns, strict=True)]
        ends = {phrase[-1:] for phrase in phrases}
        end = ends.pop() if len(ends) == 1 and ends <= {",", ";", ":"} else ""  # punctuation of the sentence
        phrases = [phrase.removesuffix(end) for phrase in phrases]
        opening, closing = _brackets(phrases)
        said.append(f"{opening}…{closing}{end}")
        for of_one, phrase in zip(details, phrases, strict=True):
            of_one.append(phrase.removeprefix(opening).removesuffix(closing))
    return " ".join(said), details


def _brackets(phrases: Sequence[str]) -> tuple[str, str]:
    """Return the brackets that belong to the sentence: those around all phrases, or that all leave open."""
    opened, closed = [], []
    for phrase in phrases:
        depths = list(itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in phrase)) or [0]
        around = depths[0] == 1 and depths[-1] == 0 and min(depths[:-1]) > 0
        opened.append(around or (depths[0] == 1 and min(depths) > 0))
        closed.append(around or (phrase.endswith(")") and depths[-1] < 0 and min(depths[:-1], default=0) >= 0))
    return "(" if all(opened) else "", ")" if all(closed) else ""


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """By kind and reason but for numbers, paths and what stands in quotes; the largest group first."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        pattern = re.sub(r"'[^']*'|\S*/\S*|\d+(\.\d+)?(e[+-]?\d+)?", "…", finding.reason)
        groups[finding.kind, pattern].append(finding)
    return sorted(groups.values(), key=len, reverse=True)


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"


def _times(numbers: Iterable[float]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)
