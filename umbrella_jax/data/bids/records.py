"""Write conversations about labelled scans: one scan each, or a query scan after a reference."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_jax.data.bids.labels import LabelledSubject
from umbrella_jax.data.bids.scans import Scan
from umbrella_jax.data.conversation import IMAGE_MARKER
from umbrella_jax.data.labels import plain_number
from umbrella_jax.io.files import naming, open_private, strict_json

LabelledScan = tuple[LabelledSubject, Scan]


@dataclass(frozen=True)
class RecordWriter:
    """Makes records of the schema that `read_conversations` reads."""

    target: str
    kind: str
    """A key of TEMPLATES."""
    modality: str
    texts: Mapping[str, str]
    """{part: text with placeholders}, the section of `kind` in a template."""

    def records(
        self, subjects: Sequence[LabelledSubject], references: int, rng: random.Random
    ) -> Iterator[dict[str, Any]]:
        """Yield the records of one split: one per scan or, in a comparison, one per pair of `draw_pairs`."""
        if self.kind == "comparison":
            return (self._comparison(*pair) for pair in draw_pairs(subjects, references, rng))
        return (self._question(subject, scan) for subject in subjects for scan in subject.scans)

    def _question(self, subject: LabelledSubject, scan: Scan) -> dict[str, Any]:
        """Return a T1 record: one subject, one scan."""
        turns = self._turns("question", "answer", subject, scan)
        task = f"{self.target}_{self.kind}"
        return self._record(f"{scan.name}_{task}", "T1", [(subject, scan)], turns, {"task": task})

    def _comparison(self, reference: LabelledScan, query: LabelledScan) -> dict[str, Any]:
        """Return a T3 record: a reference, then the query."""
        turns = self._turns("reference_question", "reference_answer", *reference)
        turns += self._turns("question", "answer", *query)
        metadata = {
            "reference_id": reference[0].name,
            "reference_label": reference[0].label,
            "comparison_type": "same" if reference[0].label == query[0].label else "different",
            "task": f"{self.target}_classification_via_comparison",
        }
        task_id = f"{query[1].name}_vs_{reference[1].name}_{self.target}"
        return self._record(task_id, "T3", [reference, query], turns, metadata)

    def _turns(self, question: str, answer: str, subject: LabelledSubject, scan: Scan) -> list[dict[str, Any]]:
        image = {"type": "image", "modality": self.modality, "image_path": scan.path}
        asked, answered = ({"type": "text", "text": self._text(key, subject)} for key in (question, answer))
        return [{"role": "user", "content": [image, asked]}, {"role": "assistant", "content": [answered]}]

    def _text(self, key: str, subject: LabelledSubject) -> str:
        return self.texts[key].format(target=self.target.replace("_", " "), label=subject.label)

    def _record(
        self,
        task_id: str,
        task_type: str,
        shown: Sequence[LabelledScan],
        turns: list[dict[str, Any]],
        metadata: dict[str, Any],
    ) -> dict[str, Any]:
        subject = shown[-1][0]
        label = plain_number(subject.value) if self.kind == "regression" else subject.label
        return {
            "task_id": task_id,
            "task_type": task_type,
            "subject_ids": [subject.name for subject, _ in shown],
            "modalities": [self.modality] * len(shown),
            "images": [{"path": scan.path, "token": IMAGE_MARKER, "modality": self.modality} for _, scan in shown],
            "conversations": turns,
            "metadata": {"subject_id": subject.name, "subject_label": label, **metadata, "kind": self.kind},
        }


def draw_pairs(
    subjects: Sequence[LabelledSubject], references: int, rng: random.Random
) -> Iterator[tuple[LabelledScan, LabelledScan]]:
    """Yield (reference, query) for every scan as query, with `references` other subjects of the same split.

    Half of a query's references have its label and half another, if there are enough of both. If `references` is odd,
    successive queries give the extra one to either half in turn. If there are too few of one kind, the other fills up.
    If there are too few in all, the query has fewer references.
    """
    labels = dict.fromkeys(subject.label for subject in subjects)
    same = {label: [s for s in subjects if s.label == label] for label in labels}
    different = {label: [s for s in subjects if s.label != label] for label in labels}
    index_of = {(s.name, label): i for label, group in same.items() for i, s in enumerate(group)}
    num_labels = Counter(subject.name for subject in subjects)
    queries = [(subject, scan) for subject in subjects for scan in subject.scans]
    for turn, (query, scan) in enumerate(queries):
        alike, others = same[query.label], different[query.label]
        if num_labels[query.name] > 1:  # the query's own subject has another label in another session
            others = [subject for subject in others if subject.name != query.name]
        num_alike = min(len(alike) - 1, max((references + turn % 2) // 2, references - len(others)))
        num_others = min(len(others), references - num_alike)
        own = index_of[query.name, query.label]
        drawn = rng.sample(range(len(alike) - 1), num_alike)  # indices of `alike` without the query itself
        chosen = [alike[i + (i >= own)] for i in drawn]
        chosen += rng.sample(others, num_others)
        for reference in chosen:
            yield (reference, rng.choice(reference.scans)), (query, scan)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Write JSON Lines (.jsonl) or a JSON list, one record per line.

    Only one record is in memory at a time.

    Returns:
        Number of records by `comparison_type`, "" for records without one.
    """
    start, between, end = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    counts: Counter[str] = Counter()
    with naming(path), open(path, "w", encoding="utf-8", opener=open_private) as file:
        file.write(start)
        for record in records:
            file.write((between if counts else "") + strict_json(record, ensure_ascii=False))
            counts[record["metadata"].get("comparison_type", "")] += 1
        file.write(end)
    return counts
