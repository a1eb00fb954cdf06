"""What a task is: its kind, its answers, which of them is right. Known from references and metadata alone."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from umbrella_jax.config.schema import MAX_CLASSES, Metric, TaskConfig, TaskKind
from umbrella_jax.errors import ConfigError, DataError, UmbrellaError
from umbrella_jax.scoring.parse_answer import is_number, normalise, parse_number, same_unit, stated_unit

Row = Mapping[str, Any]
"""A prediction: `{task_id, task_type, prediction, reference, metadata}` and, where the probability of each answer of a
closed set was computed, `likelihoods`: `{answer: its natural log}`."""
OF_LIKELIHOODS: tuple[Metric, ...] = ("auroc", "brier", "ece")
METRICS: dict[TaskKind, tuple[Metric, ...]] = {
    "classification": ("accuracy", "balanced_accuracy", "f1", *OF_LIKELIHOODS),
    "comparison": ("accuracy", "balanced_accuracy", "f1", "copy_rate", "vote_accuracy", *OF_LIKELIHOODS),
    "regression": ("mae", "rmse", "r2", "pearson", "spearman"),
    "text": ("accuracy",),
}
"""That a task of a kind can have; `unparsable` all have but `text`."""
MACRO = tuple(metric for metric in get_args(Metric) if metric not in ("mae", "rmse", "copy_rate"))
"""What is averaged over tasks: neither what has a unit, nor what is good neither high nor low."""


@dataclass(frozen=True)
class Task:
    """How one task is scored."""

    kind: TaskKind
    metrics: tuple[Metric, ...]
    answers: tuple[str, ...] | None = None
    """The closed set, as its answers are said; None where there is none."""
    unit: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """What labels of `metadata` are said as: {label: answer}, both normalised. Those not in it are said as they are."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The closed set, normalised."""
        return tuple(map(normalise, self.answers or ()))

    def truth(self, row: Row) -> str:
        """The right answer, normalised: the reference or, where that is blank, what `metadata.subject_label` says."""
        return _truth(row, self.labels)

    def compared_with(self, row: Row) -> str:
        """The answer, normalised, that `metadata.reference_label` stands for."""
        return _said(label_of(row, "reference_label"), self.labels)

    def figures(self, *, likelihoods: bool) -> list[str]:
        """What `score` gives of the task: METRIC, or METRIC/PART of its answers."""
        found: list[str] = []
        for metric in self.metrics:
            if likelihoods or metric not in OF_LIKELIHOODS:
                found.append(metric)
            if self.kind == "comparison" and metric == "accuracy":
                found += ["accuracy/same", "accuracy/different", *(f"accuracy/reference={c}" for c in self.classes)]
            if metric == "copy_rate":
                found.append("copy_rate/different")
        return found if self.kind == "text" else [*found, "unparsable"]


def task_of(row: Row) -> str:
    """The task that a prediction belongs to: `metadata.task`, or where there is none its `task_type`."""
    return str(label_of(row, "task") or row.get("task_type") or "unnamed")


def label_of(row: Row, key: str) -> Any:
    """What `metadata` says; None where that is nothing, blank, or the NaN that pandas has for nothing."""
    value = (row.get("metadata") or {}).get(key)
    return value if value is not None and value == value and str(value).strip() else None


def by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """{task: its rows}, in the order of the tasks' names."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[task_of(row)].append(row)
    return dict(sorted(groups.items()))


def tasks_of(rows: Iterable[Row], configured: Mapping[str, TaskConfig] | None = None) -> dict[str, Task]:
    """How each task is scored: as the config says and, where it says nothing, as references and metadata do.

    `prediction` is not looked at, so that an evaluation is refused before anything is computed for it.

    Args:
        configured: `evaluation.tasks` of the config.

    Raises:
        DataError, ConfigError: there are no rows; one has no reference, or one that is outside the configured answers
            or no number; a metric is not of the task's kind; a configured task has no row. With every fault.
    """
    configured = configured or {}
    groups = by_task(rows)
    if not groups:
        raise DataError("no answers to score; expected at least one conversation")
    faults = [
        f"evaluation.tasks.{name}: no such task here; expected one of {', '.join(groups)}"
        for name in configured
        if name not in groups
    ]
    kind: type[UmbrellaError] = ConfigError
    tasks: dict[str, Task] = {}
    for name, members in groups.items():
        try:
            tasks[name] = _task(name, members, configured.get(name, TaskConfig()))
        except UmbrellaError as error:
            faults += error.faults
            kind = DataError if isinstance(error, DataError) else kind
    names = Counter(metric_names(tasks, likelihoods=True))
    faults += [f"two figures would be called {name}; name the tasks otherwise" for name, n in names.items() if n > 1]
    if faults:
        raise kind(faults)
    return tasks


def metric_names(tasks: Mapping[str, Task], *, likelihoods: bool = False) -> list[str]:
    """What `score` gives for these tasks: `accuracy` (of all answers that can be right), `macro/METRIC` (its mean over
    two tasks or more that have it), `METRIC/TASK` and `METRIC/TASK/PART`.

    Args:
        likelihoods: whether the rows have them.
    """
    of = {name: task.figures(likelihoods=likelihoods) for name, task in tasks.items()}
    return [*over_tasks(of), *(name_of(task, figure) for task, figures in of.items() for figure in figures)]


def headline(metrics: Sequence[str]) -> str:
    """Of the metrics of a task, the first to look at."""
    return next((name for name in ("accuracy", "mae") if name in metrics), metrics[0])


def name_of(task: str, figure: str) -> str:
    """Of a task's figure, among those of all tasks."""
    metric, *part = figure.split("/", 1)
    return "/".join([metric, task, *part])


def over_tasks(of: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """{name of a figure over tasks: those tasks}, from the figures of each task."""
    having = {metric: [task for task, figures in of.items() if metric in figures] for metric in MACRO}
    found = {"accuracy": having["accuracy"]} if having["accuracy"] else {}
    return found | {f"macro/{metric}": tasks for metric, tasks in having.items() if len(tasks) > 1}


def reference_faults(name: str, rows: Sequence[Row], task: Task) -> list[str]:
    """Of rows whose right answer, or whose reference's in a comparison, is not known or no answer to the task."""
    faults: list[str] = []
    classes = frozenset(task.classes)
    within = f"expected one of {', '.join(task.classes)} (evaluation.tasks.{name}.answers)"
    for row in rows:
        place = f"task {name}: {row['task_id']}"
        if not _has_truth(row):
            faults.append(f"{place}: no reference; {_EXPECTED}")
            continue
        truth = task.truth(row)
        if task.answers is not None and truth not in classes:
            faults.append(f"{place}: reference {truth!r}: {within}")
        if task.kind == "regression" and parse_number(truth, task.unit) is None:
            faults.append(f"{place}: reference {truth!r}: expected a number{f' ({task.unit})' if task.unit else ''}")
        if task.kind == "comparison":
            label, said = label_of(row, "reference_label"), label_of(row, "comparison_type")
            if label is None:
                faults.append(f"{place}: metadata.reference_label: missing; a comparison needs it")
            elif (reference := task.compared_with(row)) not in classes:
                faults.append(f"{place}: metadata.reference_label {label!r}: {within}")
            elif said in ("same", "different") and (said == "same") != (reference == truth):
                faults.append(f"{place}: metadata.comparison_type is {said}, of {reference!r} and {truth!r}")
    return faults


_EXPECTED = "expected the last answer of the conversation, or metadata.subject_label"


def _has_truth(row: Row) -> bool:
    return bool(normalise(row["reference"])) or label_of(row, "subject_label") is not None


def _truth(row: Row, labels: Mapping[str, str]) -> str:
    return normalise(row["reference"]) or _said(label_of(row, "subject_label"), labels)


def _said(label: Any, labels: Mapping[str, str]) -> str:
    text = normalise(str(label))
    return labels.get(text, text)


def _task(name: str, rows: Sequence[Row], config: TaskConfig) -> Task:
    if not any(map(_has_truth, rows)):
        raise DataError(f"task {name}: none of its {len(rows)} conversations has a reference; {_EXPECTED}")
    if faults := [f"task {name}: {row['task_id']}: no reference; {_EXPECTED}" for row in rows if not _has_truth(row)]:
        raise DataError(faults)
    labels, ambiguous = _labels(rows)
    if ambiguous and (blank := [str(row["task_id"]) for row in rows if not normalise(row["reference"])]):
        raise DataError(
            f"task {name}: no reference: {', '.join(blank)}; metadata.subject_label does not say it, since among other "
            f"conversations {', '.join(ambiguous)} goes with several"
        )
    kind = config.kind or _kind(rows, labels, bool(ambiguous), config)
    place = f"evaluation.tasks.{name}"
    faults = [
        f"{place}.metrics: {metric}: a {kind} has none; expected some of {', '.join(METRICS[kind])}"
        for metric in config.metrics or ()
        if metric not in METRICS[kind]
    ]
    if twice := [answer for answer, n in Counter(map(normalise, config.answers or ())).items() if n > 1]:
        faults.append(f"{place}.answers: {', '.join(twice)}: several times, but for case and full stop")
    if faults:
        raise ConfigError(faults)
    metrics = config.metrics or METRICS[kind]
    if kind == "regression":
        task = Task(kind, metrics, unit=config.unit or _stated_unit([_truth(row, {}) for row in rows]))
    else:
        closed = kind in ("classification", "comparison")
        task = Task(kind, metrics, _answers(rows, labels, kind, config) if closed else None, labels=labels)
    if faults := reference_faults(name, rows, task):
        raise DataError(faults)
    return task


def _labels(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """{label: answer}, both normalised, of rows that have both. Or none, and the labels that have several answers:
    `metadata.subject_label` is then not what is asked."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        label, answer = label_of(row, "subject_label"), normalise(row["reference"])
        if label is not None and answer:
            found[normalise(str(label))].add(answer)
    ambiguous = sorted(label for label, answers in found.items() if len(answers) > 1)
    return ({} if ambiguous else {label: answers.pop() for label, answers in found.items()}), ambiguous


def _kind(rows: Sequence[Row], labels: Mapping[str, str], ambiguous: bool, config: TaskConfig) -> TaskKind:
    """As docs/metrics.md says."""
    truths = [_truth(row, labels) for row in rows]
    own = [label_of(row, "subject_label") for row in rows]
    distinct = set(truths)
    if config.unit is not None:
        return "regression"
    stated = label_of(rows[0], "kind")
    for kind in METRICS if config.answers is None else ():
        if stated == kind and all(label_of(row, "kind") == kind for row in rows):
            return kind
    if config.answers is None and len(distinct) > MAX_CLASSES:
        numeric = [isinstance(label, int | float) for label in own]
        if all(is_number(t) or (n and parse_number(t) is not None) for t, n in zip(truths, numeric, strict=True)):
            return "regression"
    references = [label_of(row, "reference_label") for row in rows]
    if None not in references and not ambiguous:
        plain = all(label == answer for label, answer in labels.items())
        if (labels and plain) or distinct.issuperset(_said(label, labels) for label in references):
            return "comparison"
    labelled = all(normalise(str(label)) == truth for label, truth in zip(own, truths, strict=True))
    if config.answers is not None or labelled or len(distinct) <= min(MAX_CLASSES, len(rows) - 1):
        return "classification"
    return "text"


def _answers(rows: Sequence[Row], labels: Mapping[str, str], kind: TaskKind, config: TaskConfig) -> tuple[str, ...]:
    """The closed set, each answer as the references mostly spell it; one that none of them is, as they end."""
    texts = [row["reference"].strip() for row in rows if normalise(row["reference"])]
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        spelled[normalise(text)][text] += 1
    if config.answers is None:
        names = {_truth(row, labels) for row in rows}
        names |= {normalise(answer) for row in rows for answer in row.get("likelihoods") or ()}
        if kind == "comparison":
            references = [label_of(row, "reference_label") for row in rows]
            names |= {_said(label, labels) for label in references if label is not None}
        stop = "." if texts and all(text.endswith(".") for text in texts) else ""
        given = {name: f"{name}{stop}" for name in names}
    else:
        given = {normalise(answer): answer for answer in config.answers}
    return tuple(
        max(sorted(spelled[name]), key=spelled[name].__getitem__) if name in spelled else text
        for name, text in sorted(given.items())
    )


def _stated_unit(truths: Sequence[str]) -> str | None:
    """Behind the numbers of those that have one, if it is the same of all."""
    units = [unit for truth in truths if (unit := stated_unit(truth))]
    return units[0] if units and all(same_unit(units[0], unit) for unit in units) else None
