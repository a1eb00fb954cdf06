"""Read the cases of a study's task from visits: the visits and scans that a question shows, and its answer.

**Runs of visits.** With `visits: 2` every two consecutive visits of a subject are a case; a visit between them that
lacks a scan or a value breaks the run. Texts take their values from the visit whose value is the answer; for a change
this is the last one.

**Several scans.** If a visit has several scans of the modality, each makes a conversation. If several modalities or
visits are shown, the one with the most scans (the first of these) makes a conversation per scan. Every other adds its
scan with the same `run`, or its first one if there is none.
"""

from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from itertools import groupby
from typing import NamedTuple

from umbrella_jax.config.schema import OPEN_KINDS
from umbrella_jax.data.bids.templates import TEMPLATES
from umbrella_jax.data.placeholders import TextTemplate
from umbrella_jax.data.tables import parse_cell_number
from umbrella_jax.study.schema import ReferencesConfig, StudyConfig, TaskStudyConfig
from umbrella_jax.study.visits import Scan, Visit

_DESCRIBE = "Describe this subject."
_CHANGE = "By how much does the {target} of this subject change from the first visit to the last?"
_SEVERAL = "Compared with the references, what is the {target} of this subject?"


def phrasings_of(task: TaskStudyConfig) -> dict[str, tuple[str, ...]]:
    """Return {part: phrasings} of a task, its own or the default ones."""
    defaults = dict(TEMPLATES.get(task.kind, {"question": _DESCRIBE}))
    if task.value == "change":
        defaults["question"] = _CHANGE
    if task.references is not None and task.references.count > 1:
        defaults["question"] = _SEVERAL
    texts: dict[str, tuple[str, ...]] = {part: (text,) for part, text in defaults.items()}
    own = {part: getattr(task, part) for part in ("question", "answer", "reference_question")}
    own["reference_answer"] = task.reference_answer or task.answer
    if task.kind != "comparison":
        del own["reference_question"], own["reference_answer"]
    texts |= {part: phrasings for part, phrasings in own.items() if phrasings is not None}
    return texts | ({} if task.covariates is None else {"covariates": (task.covariates,)})


def names_target(part: str, task: TaskStudyConfig) -> bool:
    """Return whether {target} in a part is the name of the task's column, and no column of its own."""
    return part != "covariates" and not (part == "answer" and task.kind in OPEN_KINDS)


class Case(NamedTuple):
    """A subject's visits that one question shows, with the value asked for."""

    visits: tuple[Visit, ...]
    """Visits shown, of one subject."""
    answered: Visit
    """The visit whose values texts use."""
    cells: tuple[str, ...]
    """The value asked for, as in the table: one cell, two for a change, none for kind text."""

    @property
    def subject(self) -> str:
        """The subject's id."""
        return self.answered.subject


class ShownCase(NamedTuple):
    """A case with the scans that one conversation shows."""

    case: Case
    label: str
    scans: tuple[Scan, ...]
    name: str
    """Unique in a task: the subject, the visits, and the run if they have several scans."""


class CaseReader:
    """Reads the cases of one task, whose names and texts have no fault, from visits."""

    def __init__(self, name: str, task: TaskStudyConfig, study: StudyConfig):
        self.name, self.task, self.study = name, task, study
        self.place = f"tasks.{name}" + (f".column: {task.column}" if task.column is not None else "")
        self.show = task.show or tuple(study.scans)
        self.references = (task.references or ReferencesConfig()) if task.kind == "comparison" else None
        target = (task.column or name).replace("_", " ")
        numbers = {parse_cell_number(value): label for value, label in task.labels.items()}
        self._label_of_number: dict[float | None, str] = {n: label for n, label in numbers.items() if n is not None}
        parsed = {part: [*map(TextTemplate.parse, texts)] for part, texts in phrasings_of(task).items()}
        self.texts = {
            part: tuple(text.replace("target", target) if names_target(part, task) else text for text in own)
            for part, own in parsed.items()
        }
        open_parts = [part for part in self.texts if task.kind in OPEN_KINDS or not part.endswith("answer")]
        names = [name for part in open_parts for text in self.texts[part] for name in text.names]
        self.text_columns = tuple(dict.fromkeys(names))

    def cases(
        self, visits: Sequence[Visit], leave_out: Callable[[str, str], object] = lambda reason, row: None
    ) -> Iterator[Case]:
        """Yield the cases of a split. Call `leave_out(reason, row)` for every other run of visits."""
        column, kind = self.task.column, self.task.value
        for subject, group in groupby(visits, key=lambda visit: visit.subject):
            for shown in self._runs(subject, tuple(group), leave_out):
                answered = shown[0] if kind == "first" else shown[-1]
                valued = () if column is None else (shown[0], shown[-1]) if kind == "change" else (answered,)
                lacking = self._lacking(shown, answered, valued)
                if lacking is None:
                    yield Case(shown, answered, tuple(visit.values[column] for visit in valued if column is not None))
                else:
                    leave_out(lacking, row_of(shown))

    def _runs(
        self, subject: str, visits: tuple[Visit, ...], leave_out: Callable[[str, str], object]
    ) -> Iterator[tuple[Visit, ...]]:
        requested_visits = self.task.visits
        if isinstance(requested_visits, int):
            if len(visits) < requested_visits:
                leave_out(f"fewer than {requested_visits} visits", subject)
            for start in range(len(visits) - requested_visits + 1):
                yield visits[start : start + requested_visits]
            return
        by_name = {visit.name: visit for visit in visits}
        if missing := [name for name in requested_visits if name not in by_name]:
            leave_out(f"no visit {missing[0]}", subject)
        else:
            yield tuple(by_name[name] for name in requested_visits)

    def _lacking(self, shown: Sequence[Visit], answered: Visit, valued: Sequence[Visit]) -> str | None:
        """Return why a run of visits is not a case; None if it is one."""
        for visit in shown:
            for modality in self.show:
                if modality not in visit.scans:
                    return f"no {modality} scan"
        for visit in valued:
            if self.task.column not in visit.values:
                return f"no value of {self.task.column}"
        for column in self.text_columns:
            if column not in answered.values:
                return f"no value of {column}"
        return None

    def label(self, case: Case) -> str:
        """Return the text of the answer's label, or its number with its decimals but without its unit."""
        if self.task.kind in OPEN_KINDS:
            return ""
        if self.task.kind != "regression":
            return self.text_of(case.cells[0])
        number, decimals = self.number(case), self.task.decimals
        return number if decimals is None else f"{Decimal(number):z.{decimals}f}"

    def text_of(self, cell: str) -> str:
        """Return the label of a value; numbers are compared as numbers."""
        if cell in self.task.labels or not self._label_of_number:
            return self.task.labels.get(cell, cell)
        return self._label_of_number.get(parse_cell_number(cell), cell)

    def number(self, case: Case) -> str:
        """Return the exact number of a regression, with the decimal places of the table."""
        first, *others = map(Decimal, case.cells)
        return format(others[0] - first if others else first, "zf")

    def shown(self, case: Case) -> Iterator[ShownCase]:
        """Yield what each conversation about the case shows."""
        slots = [visit.scans[modality] for visit in case.visits for modality in self.show]
        label = self.label(case)
        name = "_".join([case.subject, *(f"ses-{visit.name}" for visit in case.visits if visit.name is not None)])
        leading = max(slots, key=len)
        if len(leading) == 1:
            yield ShownCase(case, label, tuple(scans[0] for scans in slots), name)
            return
        runs = [scan.entities.get("run") for scan in leading]
        distinct = None not in runs and len(set(runs)) == len(runs)
        for number, (lead, run) in enumerate(zip(leading, runs, strict=True), start=1):
            others = (_with_run(scans, run) for scans in slots)
            scans = tuple(lead if group is leading else other for group, other in zip(slots, others, strict=True))
            yield ShownCase(case, label, scans, f"{name}_run-{run}" if distinct else f"{name}_scan-{number}")


def row_of(visits: Sequence[Visit]) -> str:
    """Return visits of one subject as messages name them: `sub-01 ses-1 ses-2`."""
    return " ".join([visits[0].place, *(f"ses-{visit.name}" for visit in visits[1:])])


def _with_run(scans: Sequence[Scan], run: str | None) -> Scan:
    return next((scan for scan in scans if run is not None and scan.entities.get("run") == run), scans[0])
