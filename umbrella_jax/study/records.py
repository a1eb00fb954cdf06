"""Make the conversations of a study's task: scans, a question and the right answer.

`cases.py` explains which scans make a conversation, `references.py` how the references of a comparison are drawn.
References come before the query, each with its answer. `metadata.reference_id`, `reference_label` and
`comparison_type` are about the last one; `reference_ids` and `reference_labels` list several in the order shown.

`covariates` come before the question, and before the question about a reference with the reference's values.

Each conversation of `train` draws its phrasings from the study's seed and its own task_id, so another task or subject
changes no conversation. All other splits use the first phrasings.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from umbrella_jax.config.schema import OPEN_KINDS
from umbrella_jax.data.conversation import IMAGE_MARKER
from umbrella_jax.data.labels import plain_number
from umbrella_jax.data.placeholders import TextTemplate
from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.data.validation.leaks import Exchange, LeakSearch
from umbrella_jax.errors import Faults
from umbrella_jax.study.cases import CaseReader, ShownCase
from umbrella_jax.study.leaks import column_leaks
from umbrella_jax.study.motion import MEAN_FD, mean_over_runs
from umbrella_jax.study.references import ReferencePool
from umbrella_jax.study.schema import TRAIN, StudyConfig
from umbrella_jax.study.task_checks import Survey, column_faults, split_faults, value_faults
from umbrella_jax.study.visits import Visit

Record = dict[str, Any]


class TaskRecords(dict[str, Iterator[Record]]):
    """{split: its conversations}, each made when it is asked for."""

    def __init__(self, left_out: Mapping[str, int]):
        super().__init__()
        self.left_out = left_out
        """{reason: number of visits, or of runs of visits, that the task leaves out}."""


def _exchange(record: Record) -> Exchange:
    metadata = record["metadata"]
    asked = [turn["content"][-1]["text"] for turn in record["conversations"] if turn["role"] == "user"]
    label = metadata.get("reference_label")
    return Exchange(
        record["task_id"],
        metadata["subject_id"],
        "\n".join(asked),
        str(metadata["subject_label"]),
        tuple(metadata.get("reference_labels", () if label is None else (label,))),
        None if label is None else metadata["comparison_type"] == "same",
    )


def make_records(
    name: str,
    study: StudyConfig,
    visits_of: Mapping[str, Sequence[Visit]],
    faults: Faults,
    notes: list[str],
    *,
    refuse_rare_labels: bool = True,
) -> TaskRecords:
    """Return the conversations of one task, of the schema in docs/data.md.

    Args:
        name: of the task.
        study: gives the task, the modalities, `keep`, and the seed and groups of the split.
        visits_of: {split: its visits}, sorted by subject and visit.
        faults: receives what is wrong with the task; there are no conversations then. Faults of texts and references
            that give answers away come when the last conversation of all splits has been made.
        notes: receives what is left out and why, and what a person should look at. A line about queries with too few
            references comes when a split's last conversation has been made.
        refuse_rare_labels: whether labels that one subject has, or that a split lacks, are faults; else they are notes.
    """
    task, own_faults = study.tasks[name], Faults()
    columns = {column for visits in visits_of.values() for visit in visits for column in visit.values}
    own_faults += column_faults(name, task, study, columns)
    if not own_faults:
        reader = CaseReader(name, task, study)
        survey = Survey.take(reader, visits_of)
        notes += survey.left_out_notes(reader.place)
        own_faults += value_faults(reader, survey, notes)
    if not own_faults:
        rare_labels = [*split_faults(reader, survey, notes)]
        if refuse_rare_labels:
            own_faults += rare_labels
        else:
            notes += rare_labels
        own_faults += column_leaks(reader, visits_of)
    faults += own_faults
    if own_faults:
        return TaskRecords({})
    writer = _RecordWriter(reader, _numeric_columns(study.keep, visits_of))
    records = TaskRecords(survey.left_out)
    for split, visits in visits_of.items():
        if reader.references is None:
            records[split] = writer.questions(split, visits)
        else:
            pool = visits_of[TRAIN] if reader.references.split == TRAIN else visits
            records[split] = writer.comparisons(split, visits, pool, notes)
    _search_leaks(name, records, faults)
    return records


def _search_leaks(name: str, records: TaskRecords, faults: Faults) -> None:
    """Look for leaks in the records as they are made; the end of the last split adds the faults."""
    search, unfinished = LeakSearch(), set(records)

    def searched(split: str, made: Iterator[Record]) -> Iterator[Record]:
        for record in made:
            search.add(split, _exchange(record))
            yield record
        unfinished.discard(split)
        if not unfinished:
            faults.extend(f"tasks.{name}: {' and '.join(leak.splits)}: {leak.reason}" for leak in search.leaks())

    records |= {split: searched(split, made) for split, made in records.items()}


def _numeric_columns(columns: Sequence[str], visits_of: Mapping[str, Sequence[Visit]]) -> set[str]:
    """Return the columns that hold only numbers; a number with leading zeros is a code."""
    numeric = set(columns)
    for visits in visits_of.values():
        for visit in visits:
            for column in [*numeric]:
                cell = visit.values.get(column)
                if cell is not None and (parse_cell_number(cell) is None or re.match(r"[+-]?0\d", cell)):
                    numeric.discard(column)
    return numeric


class _RecordWriter:
    """Makes the records of one task."""

    def __init__(self, reader: CaseReader, numeric: set[str]):
        self.reader, self.task, self.numeric = reader, reader.task, numeric
        self.group = reader.study.split.by if reader.study.split.by != "subject" else None

    def questions(self, split: str, visits: Sequence[Visit]) -> Iterator[Record]:
        """Yield a record for everything that is shown of each case."""
        for case in self.reader.cases(visits):
            for shown in self.reader.shown(case):
                task_id = f"{shown.name}_{self.reader.name}"
                turns = self._turns(shown, "question", "answer", split, task_id)
                yield self._record(task_id, "T1" if len(shown.scans) == 1 else "T2", [shown], turns)

    def comparisons(
        self, split: str, visits: Sequence[Visit], pool_visits: Sequence[Visit], notes: list[str]
    ) -> Iterator[Record]:
        """Yield `per_query` records for everything that is shown of each case, each with other references."""
        config, reader = self.reader.references, self.reader
        assert config is not None
        pool, turns = ReferencePool(reader, pool_visits), Counter[str]()
        seed, short = f"{reader.study.split.seed} {reader.name}", 0
        for case in reader.cases(visits):
            for query in reader.shown(case):
                rng = random.Random(f"{seed} {query.name}")
                if config.count == 1:
                    one = pool.draw_single(query.label, case.subject, config.per_query, turns[query.label], rng)
                    drawn = [[person] for person in one]
                else:
                    drawn = pool.draw_several(case.subject, config.per_query, config.count, rng)
                turns[query.label] += 1
                short += config.per_query - len(drawn)
                for number, people in enumerate(drawn, start=1):
                    references = [pool.draw_shown(person, rng) for person in people]
                    yield self._comparison(split, query, references, number)
        if short:
            expected = f"{config.per_query} per query: too few other subjects"
            notes.append(f"{reader.place}: {split}: {short:,} conversations short of {expected}")

    def _comparison(self, split: str, query: ShownCase, references: list[ShownCase], number: int) -> Record:
        last, task = references[-1], self.reader.name
        versus = last.name if len(references) == 1 else f"{len(references)}_references_{number}"
        task_id = f"{query.name}_vs_{versus}_{task}"
        parts = "reference_question", "reference_answer"
        turns = [turn for reference in references for turn in self._turns(reference, *parts, split, task_id)]
        turns += self._turns(query, "question", "answer", split, task_id)
        metadata: dict[str, Any] = {
            "reference_id": last.case.subject,
            "reference_label": last.label,
            "comparison_type": "same" if last.label == query.label else "different",
        }
        if len(references) > 1:
            metadata["reference_ids"] = [reference.case.subject for reference in references]
            metadata["reference_labels"] = [reference.label for reference in references]
        return self._record(task_id, "T3", [*references, query], turns, metadata)

    def _turns(self, shown: ShownCase, question: str, answer: str, split: str, task_id: str) -> list[dict[str, Any]]:
        values = shown.case.answered.values
        label = shown.label if self.task.unit is None else f"{shown.label} {self.task.unit}"
        asked = self._phrase(question, split, task_id).fill(values)
        if "covariates" in self.reader.texts:
            asked = f"{self.reader.texts['covariates'][0].fill(values)} {asked}"
        answered = self._phrase(answer, split, task_id).fill(
            values if self.task.kind in OPEN_KINDS else {"label": label}
        )
        images = [{"type": "image", "modality": scan.modality, "image_path": scan.path} for scan in shown.scans]
        return [
            {"role": "user", "content": [*images, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": [{"type": "text", "text": answered}]},
        ]

    def _phrase(self, part: str, split: str, task_id: str) -> TextTemplate:
        phrasings = self.reader.texts[part]
        if len(phrasings) == 1 or split != TRAIN:
            return phrasings[0]
        kind = part.removeprefix("reference_")  # a reference's phrasings are drawn like those of the query
        key = f"{self.reader.study.split.seed} {kind} {task_id}".encode()
        return phrasings[int.from_bytes(blake2b(key, digest_size=8).digest()) % len(phrasings)]

    def _record(
        self,
        task_id: str,
        task_type: str,
        shown: Sequence[ShownCase],
        turns: list[dict[str, Any]],
        metadata: Mapping[str, Any] | None = None,
    ) -> Record:
        case, scans = shown[-1].case, [(one.case.subject, scan) for one in shown for scan in one.scans]
        visits = ", ".join(visit.name for visit in case.visits if visit.name is not None)
        own = dict(case.answered.values)
        if any(scan.mean_fd is not None for visit in case.visits for group in visit.scans.values() for scan in group):
            own.pop(MEAN_FD, None)  # that of all runs of the visit
            if (motion := mean_over_runs(shown[-1].scans)) is not None:
                own[MEAN_FD] = motion
        group = {"group_id": own[self.group]} if self.group is not None and self.group in own else {}
        return {
            "task_id": task_id,
            "task_type": task_type,
            "subject_ids": [subject for subject, _ in scans],
            "modalities": [scan.modality for _, scan in scans],
            "images": [{"path": s.path, "token": IMAGE_MARKER, "modality": s.modality} for _, s in scans],
            "conversations": turns,
            "metadata": {
                "subject_id": case.subject,
                "subject_label": self._subject_label(shown[-1], turns),
                **(metadata or {}),
                **({"visit": visits} if visits else {}),
                "task": self.reader.name,
                "kind": self.task.kind,
                **group,
                **{
                    column: plain_number(own[column]) if column in self.numeric else own[column]
                    for column in self.reader.study.keep
                    if column in own
                },
            },
        }

    def _subject_label(self, shown: ShownCase, turns: Sequence[Mapping[str, Any]]) -> str | int | float:
        if self.task.kind in OPEN_KINDS:
            return str(turns[-1]["content"][0]["text"])
        return plain_number(self.reader.number(shown.case)) if self.task.kind == "regression" else shown.label
