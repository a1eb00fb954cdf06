"""Check that columns, values and splits suit a study's task, before any conversation is made."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from umbrella_jax.config.schema import OPEN_KINDS
from umbrella_jax.console import plural
from umbrella_jax.data.labels import alike_labels, kind_faults
from umbrella_jax.data.placeholders import TextTemplate, control_token_faults, text_faults
from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.data.validation.leaks import ROWS_SHOWN, rows_text
from umbrella_jax.study.cases import Case, CaseReader, names_target, phrasings_of, row_of
from umbrella_jax.study.schema import TRAIN, StudyConfig, TaskStudyConfig
from umbrella_jax.study.visits import Visit

OWN_METADATA = {
    *("subject_id", "subject_label", "reference_id", "reference_label", "reference_ids", "reference_labels"),
    *("comparison_type", "visit", "task", "kind", "group_id"),
}
"""Keys of metadata that conversations always use for themselves."""


def column_faults(name: str, task: TaskStudyConfig, study: StudyConfig, columns: Collection[str]) -> Iterator[str]:
    """Yield faults of names of columns, and of texts."""
    named = {f"tasks.{name}.column": [task.column] if task.column is not None else [], "keep": study.keep}
    for key, names in named.items():
        for column in names:
            if column not in columns:
                near = get_close_matches(column, columns, n=1, cutoff=0.5)
                nearest = f"; the nearest is {near[0]}" if near else f"; columns: {', '.join(sorted(columns))}"
                yield f"{key}: {column}: no such column, or no visit has a value in it{nearest}"
    for column in study.keep:
        if column in OWN_METADATA:
            yield f"keep: {column}: metadata of this name is there already; rename the column in `columns`"
    for part, phrasings in phrasings_of(task).items():
        labelled = part.endswith("answer") and task.kind not in OPEN_KINDS
        allowed = ["target"] if names_target(part, task) else []
        allowed += ["label"] if labelled else sorted({*columns} - {*allowed})
        if not phrasings:
            yield f"tasks.{name}.{part}: expected at least one text"
        for number, text in enumerate(phrasings):
            key = f"tasks.{name}.{part}" + (f"[{number}]" if len(phrasings) > 1 else "")
            if part == "answer" and task.kind in OPEN_KINDS:
                own_faults = text_faults(text, allowed)
                if not own_faults and not TextTemplate.parse(text).names:
                    own_faults = ["expected {COLUMN} in it; without it every subject has the same answer"]
            else:
                own_faults = text_faults(text, allowed, needed="label" if labelled else None)
            yield from (f"{key}: {fault}" for fault in own_faults)
    for value, label in task.labels.items():
        yield from (f"tasks.{name}.labels.{value}: {fault}" for fault in control_token_faults(label))


@dataclass
class Survey:
    """Counts and first rows of a task's values, from a first pass over all splits."""

    left_out: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    """{value: its cases}."""
    rows: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """{value: its first rows}."""
    left_out_rows: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """{reason: its first rows}."""
    subjects: dict[str, dict[str, dict[str, None]]] = field(default_factory=dict)
    """{split: {label: its subjects}}; of a regression or text, all under one label."""
    forged: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """{column: fault, rows}."""

    @classmethod
    def take(cls, reader: CaseReader, visits_of: Mapping[str, Sequence[Visit]]) -> "Survey":
        """Read all cases."""
        survey, closed = cls(), reader.task.kind in ("classification", "comparison")
        for split, visits in visits_of.items():
            members = survey.subjects[split] = defaultdict(dict)
            for case in reader.cases(visits, survey.leave_out):
                for cell in case.cells:
                    survey.count(cell, case)
                members[reader.label(case) if closed else ""][case.subject] = None
                for column in reader.text_columns:
                    if "<" in (cell := case.answered.values[column]) and control_token_faults(cell):
                        survey.forged[column].append(case.answered.place)
        return survey

    def leave_out(self, reason: str, row: str) -> None:
        """Count a run of visits that is not a case."""
        self.left_out[reason] += 1
        if self.left_out[reason] <= ROWS_SHOWN:
            self.left_out_rows[reason].append(row)

    def count(self, cell: str, case: Case) -> None:
        """Count a value."""
        self.counts[cell] += 1
        if self.counts[cell] <= ROWS_SHOWN:
            self.rows[cell].append(row_of(case.visits))

    def left_out_notes(self, place: str) -> list[str]:
        """Return a line for each reason."""
        return [
            f"{place}: left out: {reason} ({number:,}): {rows_text(self.left_out_rows[reason], number)}"
            for reason, number in self.left_out.items()
        ]


def value_faults(reader: CaseReader, survey: Survey, notes: list[str]) -> Iterator[str]:
    """Yield faults of values, whatever split they are in; add notes about labels."""
    task, place, counts = reader.task, reader.place, survey.counts
    for column, rows in survey.forged.items():
        token = "a token that marks a turn or an image, which only the tokenizer may add; take it out"
        yield f"tasks.{reader.name}: {column}: contains {token}: {rows_text(rows)}"
    if not any(survey.subjects.values()):
        reasons = "; ".join(f"{reason} ({number:,})" for reason, number in survey.left_out.items())
        yield f"{place}: no visit has what the task needs: {reasons}"
    if task.column is None:
        return
    words = [
        f"{value} ({rows_text(survey.rows[value], number)})"
        for value, number in counts.items()
        if parse_cell_number(value) is None
    ]
    remedy = (
        f"write numbers or n/a instead of {', '.join(words[:5])}, or describe each value in tasks.{reader.name}.labels"
    )
    described = task.labels.keys() & counts.keys()
    for kind in {"comparison": (None, "comparison"), "classification": (None,)}.get(task.kind, (task.kind,)):
        yield from kind_faults(place, kind, counts, words=words, described=described, mixed_remedy=remedy)
    if task.kind == "regression":
        if len(counts) == 1:
            yield f"{place}: every visit has {next(iter(counts))}; expected at least two values"
        return
    values_of: dict[str, list[str]] = defaultdict(list)
    for value in counts:
        values_of[reader.text_of(value)].append(value)
    same, initials = alike_labels(values_of)
    for group in same:
        listed = ", ".join(_label_rows(label, values_of[label], survey) for label in group)
        yield (
            f"{place}: one label or several? {listed}; spell them the same in the table, or give them the same text in "
            f"tasks.{reader.name}.labels"
        )
    notes += [f"{place}: treated as two labels: {', '.join(group)}" for group in initials]
    for label in values_of:
        yield from (f"{place}: label {label!r}: {fault}" for fault in control_token_faults(label))
    if task.labels:
        plain = [value for value in counts if reader.text_of(value) == value and value not in task.labels]
        if plain:
            notes.append(f"{place}: values used as in the table, since `labels` does not have them: {rows_text(plain)}")
        used = {reader.text_of(value) for value in counts}
        if unused := [value for value, label in task.labels.items() if label not in used]:
            notes.append(f"{place}: values in `labels` that no visit has: {rows_text(unused)}")


def _label_rows(label: str, values: Sequence[str], survey: Survey) -> str:
    number = sum(survey.counts[value] for value in values)
    return f"{label!r} ({number:,}: {rows_text([row for value in values for row in survey.rows[value]], number)})"


def split_faults(reader: CaseReader, survey: Survey, notes: list[str]) -> Iterator[str]:
    """Yield faults of how labels and references are spread over splits; add notes about small ones."""
    place, splits, study = reader.place, survey.subjects, reader.study
    for split, members in splits.items():
        if not members:
            yield (
                f"{place}: {split}: no subject has what the task needs; give the split a larger share, another seed, "
                "or leave it out"
            )
    if reader.references is not None:
        yield from _reference_faults(reader, survey)
    if reader.task.kind not in ("classification", "comparison"):
        return
    total: dict[str, dict[str, None]] = defaultdict(dict)
    for members in splits.values():
        for label, subjects in members.items():
            total[label] |= subjects
    if len(total) == 1:
        yield f"{place}: every subject is {next(iter(total))}; expected at least two labels"
        return
    for label, subjects in total.items():
        if len(subjects) == 1:
            yield (
                f"{place}: label {label!r} has one subject, {next(iter(subjects))}; nothing can be learnt and tested "
                "about it: leave it out with `include`, or give it another label's text in "
                f"tasks.{reader.name}.labels"
            )
    known = splits.get(TRAIN) or total
    lacking = [(split, label) for split, members in splits.items() for label in sorted(members.keys() - known.keys())]
    for split, label in lacking:
        rows = [*splits[split][label]]
        yield (
            f"{place}: label {label!r} is in {split} ({len(rows):,}: {rows_text(rows)}) and not in {TRAIN}; "
            "stratify by the column (split.stratify), or use another seed"
        )
    held_out = study.split.folds is not None or study.split.leave_out is not None
    for split, members in splits.items() if not lacking else ():
        counts = ", ".join(f"{label} {len(members.get(label, ())):,}" for label in sorted(total))
        if len(members) == 1 and (split == TRAIN or not (held_out or split in study.external)):
            yield (
                f"{place}: {split}: every subject is {next(iter(members))} ({counts}); stratify by the column "
                "(split.stratify), give the split a larger share, or use another seed"
            )
        elif small := [label for label in sorted(total) if len(members.get(label, ())) < 2]:
            notes.append(f"{place}: {split} has fewer than two subjects of {', '.join(small)} ({counts})")


def _reference_faults(reader: CaseReader, survey: Survey) -> Iterator[str]:
    """Yield a fault for each split whose queries have too few subjects to be compared with."""
    assert reader.references is not None
    needed, own = reader.references.count, reader.references.split == "same"
    if not own and TRAIN not in survey.subjects:
        yield f"tasks.{reader.name}.references.split: no split is called {TRAIN}; expected same"
        return
    for split in survey.subjects if own else (TRAIN,):
        number = len({subject for subjects in survey.subjects[split].values() for subject in subjects})
        if number <= needed:
            yield (
                f"tasks.{reader.name}.references.count: {needed} for one query, but {split} has only "
                f"{plural(number, 'subject')}, the query's own included; lower it, or give {split} a larger share"
            )
