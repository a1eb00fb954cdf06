"""Tasks: their kind, their answers and the right one of each row, inferred only from references and metadata."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, TypeVar, get_args

from umbrella_jax.config.schema import MAX_CLASSES, OPEN_KINDS, Metric, NumbersConfig, TaskConfig, TaskKind
from umbrella_jax.errors import ConfigError, DataError, Faults, UmbrellaError
from umbrella_jax.scoring.findings import MENTION_KINDS, MentionKind, WordList, default_word_list, read_word_list
from umbrella_jax.scoring.number_grid import NumberGrid
from umbrella_jax.scoring.parse_answer import is_number, normalise, parse_number, same_unit, stated_unit
from umbrella_jax.scoring.structured import AnswerSchema, canonical, field_number, parse_answer_object, read_schema

Prediction = Mapping[str, Any]
"""A row of predictions: `{task_id, task_type, prediction, reference, metadata}`, and for a closed set `likelihoods`,
`{answer: natural log of its probability}`, if they were computed."""
F = TypeVar("F")
Name = TypeVar("Name", bound=str)
LIKELIHOOD_METRICS: tuple[Metric, ...] = ("auroc", "brier", "ece")
FINDING_METRICS: dict[Metric, MentionKind] = {"finding_f1": "finding", "region_f1": "region", "laterality_f1": "side"}
"""{metric of statements: their kind}."""
TEXT_METRICS: tuple[Metric, ...] = ("bleu", "chrf", "rouge_l")
"""Metrics of overlapping words, which need the extra `text`."""
LEVELS = (80, 95)
"""Levels, in percent, of the central intervals of a number."""
NUMBER_PARTS: dict[Metric, tuple[str, ...]] = {
    "mae": ("expectation", "median"),
    "rmse": ("expectation",),
    "r2": ("expectation",),
    "pearson": ("expectation",),
    "coverage": tuple(map(str, LEVELS)),
    "interval_width": tuple(map(str, LEVELS)),
}
"""{metric: its parts that need the likelihoods of candidate numbers}."""
NUMBER_METRICS: tuple[Metric, ...] = ("crps", "coverage", "interval_width")
"""Metrics of the distribution over candidate numbers; the last two have only parts."""
SCHEMA_METRICS: tuple[Metric, ...] = ("accuracy", "field_accuracy")
"""Metrics of a report with a JSON schema, besides those of every report."""
METRICS: dict[TaskKind, tuple[Metric, ...]] = {
    "classification": ("accuracy", "balanced_accuracy", "f1", *LIKELIHOOD_METRICS),
    "comparison": ("accuracy", "balanced_accuracy", "f1", "copy_rate", "vote_accuracy", *LIKELIHOOD_METRICS),
    "regression": ("mae", "rmse", "r2", "pearson", "spearman", *NUMBER_METRICS),
    "text": ("accuracy",),
    "report": (*FINDING_METRICS, *TEXT_METRICS),
}
"""The metrics that each kind of task can have. All kinds but `text` and `report` have `unparsable` too."""
WITH_UNIT: tuple[Metric, ...] = ("mae", "rmse", "crps", "interval_width")
"""Metrics in the unit of the answers."""
MACRO = tuple(metric for metric in get_args(Metric) if metric not in (*WITH_UNIT, "copy_rate", "coverage"))
"""Metrics averaged over tasks: those without a unit and with a good end, high or low."""


@dataclass(frozen=True)
class Task:
    """How one task is scored."""

    kind: TaskKind
    metrics: tuple[Metric, ...]
    answers: tuple[str, ...] | None = None
    """The closed set of answers as they are written; None if answers are open or numbers."""
    unit: str | None = None
    numbers: NumberGrid | None = None
    """The candidate numbers of a regression whose likelihoods are computed; None if there are none."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """{label of `metadata`: answer that means it}, both normalised. A label that is missing here is its own answer."""
    words: WordList | None = None
    """List of words of a report; None for other kinds."""
    stated: Mapping[MentionKind, tuple[str, ...]] = field(default_factory=dict)
    """{kind: names of findings, regions and sides that the references of a report mention}, in the list's order."""
    schema: AnswerSchema | None = None
    """Schema of the answers of a report in JSON."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """{number field of the schema: smallest and largest number of the references}."""

    @property
    def title(self) -> str:
        """The kind and, if there is one, the unit: `regression, years`."""
        return f"{self.kind}, {self.unit}" if self.unit else self.kind

    @property
    def classes(self) -> tuple[str, ...]:
        """The closed set of answers, normalised."""
        return tuple(map(normalise, self.answers or ()))

    @property
    def choices(self) -> tuple[str, ...]:
        """The candidate numbers or the closed set, as they are written; empty without either."""
        return self.answers or () if self.numbers is None else self.numbers.texts

    def truth(self, row: Prediction) -> str:
        """Return the right answer, normalised: the reference or, if it is blank, that of `metadata.subject_label`."""
        if self.schema is not None and (text := canonical(self.reference_text(row))) is not None:
            return text
        return _truth(row, self.labels)

    def answer_of(self, row: Prediction) -> str:
        """Return the prediction, normalised as `truth`."""
        if self.schema is not None and (text := canonical(row["prediction"])) is not None:
            return text
        return normalise(row["prediction"])

    def reference_text(self, row: Prediction) -> str:
        """Return the right answer as it is written: the reference or, if it is blank, `metadata.subject_label`."""
        return str(row["reference"]).strip() or str(label_of(row, "subject_label")).strip()

    def compared_with(self, row: Prediction) -> str:
        """Return the normalised answer that has the meaning of the `compared_label`."""
        return _answer_for(compared_label(row), self.labels)

    def figures(self, *, likelihoods: bool) -> list[str]:
        """Return the names of the task's figures: METRIC, or METRIC/PART for some of its answers."""
        names: list[str] = []
        for metric in self.metrics:
            has_numbers = likelihoods and self.numbers is not None
            if metric in NUMBER_METRICS:
                names += [metric] if has_numbers and metric not in NUMBER_PARTS else []
            elif likelihoods or metric not in LIKELIHOOD_METRICS:
                names.append(metric)
            names += [f"{metric}/{part}" for part in NUMBER_PARTS.get(metric, ()) if has_numbers]
            if self.kind == "comparison" and metric == "accuracy":
                names += ["accuracy/same", "accuracy/different", *(f"accuracy/reference={c}" for c in self.classes)]
            if metric == "copy_rate":
                names.append("copy_rate/different")
            if metric in FINDING_METRICS:
                names += [f"{metric}/{name}" for name in self.stated[FINDING_METRICS[metric]]]
            if metric == "field_accuracy" and self.schema is not None:
                names += [f"{'field_mae' if n else metric}/{name}" for name, n in self.schema.fields.items()]
        return names if self.kind in OPEN_KINDS and self.schema is None else [*names, "unparsable"]


def task_of(row: Prediction) -> str:
    """Return the task that a prediction belongs to: `metadata.task`, else its `task_type`."""
    return str(label_of(row, "task") or row.get("task_type") or "unnamed")


def label_of(row: Prediction, key: str) -> Any:
    """Return a value of `metadata`; None if it is missing, blank, or NaN, which pandas writes for a missing value."""
    value = (row.get("metadata") or {}).get(key)
    return value if value is not None and value == value and str(value).strip() else None


def compared_label(row: Prediction) -> Any:
    """Return the label of the reference: `metadata.reference_label`, of several the one shown last."""
    label, several = label_of(row, "reference_label"), label_of(row, "reference_labels")
    return several[-1] if label is None and isinstance(several, list) and several else label


def by_task(rows: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Return {task: its rows}, sorted by task."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        groups[task_of(row)].append(row)
    return dict(sorted(groups.items()))


def tasks_of(rows: Iterable[Prediction], configured: Mapping[str, TaskConfig] | None = None) -> dict[str, Task]:
    """Return how to score each task: as configured, and otherwise inferred from references and metadata.

    `prediction` is not read, so an evaluation can be refused before anything is computed for it.

    Args:
        configured: `evaluation.tasks` of the config.

    Raises:
        DataError, ConfigError: every fault: there are no rows; a reference is missing, outside the configured answers
            or no number; a metric is not of the task's kind; a configured task has no row.
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
    error_type: type[UmbrellaError] = ConfigError
    tasks: dict[str, Task] = {}
    for name, members in groups.items():
        try:
            tasks[name] = _task(name, members, configured.get(name, TaskConfig()))
        except UmbrellaError as error:
            faults += error.faults
            error_type = DataError if isinstance(error, DataError) else error_type
    names = Counter(metric_names(tasks, likelihoods=True))
    faults += [f"two figures would be called {name}; rename the tasks" for name, n in names.items() if n > 1]
    if faults:
        raise error_type(faults)
    return tasks


def metric_names(tasks: Mapping[str, Task], *, likelihoods: bool = False) -> list[str]:
    """Return the names of all figures that `score` gives for these tasks.

    These are `accuracy` (over all answers that can be right), `macro/METRIC` (the mean over at least two tasks that
    have it), `METRIC/TASK` and `METRIC/TASK/PART`.

    Args:
        likelihoods: whether the rows of closed sets have likelihoods; those of tasks with candidate numbers do.
    """
    by_name = {name: task.figures(likelihoods=likelihoods or task.numbers is not None) for name, task in tasks.items()}
    names = [name_of(task, figure) for task, figures in by_name.items() for figure in figures]
    return [*over_tasks(by_name), *names]


def headline(metrics: Sequence[Name]) -> Name:
    """Return the main one of a task's metrics."""
    return next((name for name in metrics if name in ("accuracy", "mae")), metrics[0])


def unit_of(task: Task, metric: str) -> str | None:
    """Return the unit of a metric; None if it has none or the task's is not known."""
    return task.unit if metric in WITH_UNIT else None


def with_unit(task: Task, metric: str) -> str:
    """Return the name of a metric with its unit."""
    return f"{metric} ({unit})" if (unit := unit_of(task, metric)) else metric


def name_of(task: str, figure: str) -> str:
    """Return the full name of a task's figure: METRIC/TASK or METRIC/TASK/PART."""
    metric, *part = figure.split("/", 1)
    return "/".join([metric, task, *part])


def figures_of_task(name: str, task: Task, figures: Mapping[str, F]) -> dict[str, F]:
    """Return a task's figures, {METRIC or METRIC/PART: figure}, of {name as in `metric_names`: figure}."""
    full_names = {figure: name_of(name, figure) for figure in task.figures(likelihoods=True)}
    return {figure: figures[full_name] for figure, full_name in full_names.items() if full_name in figures}


def figures_over_tasks(figures: Mapping[str, F]) -> dict[str, F]:
    """Return the figures over several tasks of {name as in `metric_names`: figure}."""
    return {name: figure for name, figure in figures.items() if name == "accuracy" or name.startswith("macro/")}


def over_tasks(figures_by_task: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return {name of a figure over several tasks: those tasks}."""
    having = {metric: [task for task, names in figures_by_task.items() if metric in names] for metric in MACRO}
    pooled = {"accuracy": having["accuracy"]} if having["accuracy"] else {}
    return pooled | {f"macro/{metric}": tasks for metric, tasks in having.items() if len(tasks) > 1}


def reference_faults(name: str, rows: Sequence[Prediction], task: Task) -> list[str]:
    """Return a fault for each row whose right answer is unknown or no answer to the task.

    In a comparison the answer of its reference scan is checked too.
    """
    faults: list[str] = []
    classes = frozenset(task.classes)
    expected = f"expected one of {', '.join(task.classes)} (evaluation.tasks.{name}.answers)"
    for row in rows:
        place = f"task {name}: {row['task_id']}"
        if not _has_truth(row):
            faults.append(f"{place}: no reference; {_EXPECTED}")
            continue
        truth = task.truth(row)
        if task.answers is not None and truth not in classes:
            faults.append(f"{place}: reference {truth!r}: {expected}")
        if task.schema is not None and parse_answer_object(task.reference_text(row)) is None:
            faults.append(f"{place}: reference {truth!r}: expected a JSON object (evaluation.tasks.{name}.schema)")
        if task.kind == "regression" and parse_number(truth, task.unit) is None:
            faults.append(f"{place}: reference {truth!r}: expected a number{f' ({task.unit})' if task.unit else ''}")
        if task.kind == "comparison":
            label, relation = compared_label(row), label_of(row, "comparison_type")
            several = label_of(row, "reference_labels")
            faults += [
                f"{place}: metadata.reference_labels: {other!r}: {expected}"
                for other in (several if isinstance(several, list) else ())
                if _answer_for(other, task.labels) not in classes
            ]
            if label is None:
                faults.append(f"{place}: metadata.reference_label: missing; a comparison needs it")
            elif (reference := task.compared_with(row)) not in classes:
                faults.append(f"{place}: metadata.reference_label {label!r}: {expected}")
            elif relation in ("same", "different") and (relation == "same") != (reference == truth):
                faults.append(f"{place}: metadata.comparison_type is {relation}, of {reference!r} and {truth!r}")
    return faults


_EXPECTED = "expected the last answer of the conversation, or metadata.subject_label"


def _has_truth(row: Prediction) -> bool:
    return bool(normalise(row["reference"])) or label_of(row, "subject_label") is not None


def _truth(row: Prediction, labels: Mapping[str, str]) -> str:
    return normalise(row["reference"]) or _answer_for(label_of(row, "subject_label"), labels)


def _answer_for(label: Any, labels: Mapping[str, str]) -> str:
    text = normalise(str(label))
    return labels.get(text, text)


def _task(name: str, rows: Sequence[Prediction], config: TaskConfig) -> Task:
    if not any(map(_has_truth, rows)):
        raise DataError(f"task {name}: none of its {len(rows)} conversations has a reference; {_EXPECTED}")
    if faults := [f"task {name}: {row['task_id']}: no reference; {_EXPECTED}" for row in rows if not _has_truth(row)]:
        raise DataError(faults)
    labels, ambiguous = _labels(rows)
    if ambiguous and (blank := [str(row["task_id"]) for row in rows if not normalise(row["reference"])]):
        raise DataError(
            f"task {name}: no reference: {', '.join(blank)}; metadata.subject_label cannot replace it, since in other "
            f"conversations {', '.join(ambiguous)} has several answers"
        )
    kind = config.kind or _kind(rows, labels, bool(ambiguous), config)
    place = f"evaluation.tasks.{name}"
    known = METRICS[kind] if config.schema is None else (*SCHEMA_METRICS, *METRICS[kind])
    faults = [
        f"{place}.metrics: {metric}: a {kind} has none; expected some of {', '.join(known)}"
        for metric in config.metrics or ()
        if metric not in known
    ]
    if twice := [answer for answer, n in Counter(map(normalise, config.answers or ())).items() if n > 1]:
        faults.append(f"{place}.answers: {', '.join(twice)}: listed several times, ignoring case and full stop")
    if faults:
        raise ConfigError(faults)
    metrics = config.metrics or (METRICS[kind] if config.schema is None else SCHEMA_METRICS)
    if kind == "regression":
        unit = config.unit or _stated_unit([_truth(row, {}) for row in rows])
        task = Task(kind, metrics, unit=unit, numbers=_numbers(name, rows, unit, config))
    elif kind == "report":
        task = _report(name, rows, config, metrics)
    else:
        closed = kind in ("classification", "comparison")
        task = Task(kind, metrics, _answers(rows, labels, kind, config) if closed else None, labels=labels)
    if faults := reference_faults(name, rows, task):
        raise DataError(faults)
    return task


def _report(name: str, rows: Sequence[Prediction], config: TaskConfig, metrics: tuple[Metric, ...]) -> Task:
    """Return a task of reports. Raises ConfigError for a faulty list of words, or if the extra `text` is missing."""
    absent = [package for package in ("sacrebleu", "rouge_score") if find_spec(package) is None]
    if absent and set(metrics) & set(TEXT_METRICS):
        raise ConfigError(
            f"task {name}: {', '.join(TEXT_METRICS)} of a report need {' and '.join(absent)}, which is not installed: "
            'pip install "umbrella-jax[text]", or choose others in evaluation.tasks.NAME.metrics'
        )
    words = read_word_list(config.findings) if config.findings else default_word_list()
    schema = read_schema(config.schema) if config.schema else None
    task = Task("report", metrics, words=words, schema=schema)
    mentions = [mention for row in rows for mention in words.mentions(task.reference_text(row))]
    known = {kind: {mention.name for mention in mentions if mention.kind == kind} for kind in MENTION_KINDS}
    stated = {kind: tuple(name for name in words.names(kind) if name in known[kind]) for kind in MENTION_KINDS}
    return replace(
        task, stated=stated, ranges={} if schema is None else _ranges(schema, map(task.reference_text, rows))
    )


def _ranges(schema: AnswerSchema, references: Iterable[str]) -> dict[str, tuple[float, float]]:
    answers = list(map(parse_answer_object, references))
    numbers = {
        field: [number for answer in answers if (number := field_number(answer, field)) is not None]
        for field, is_number in schema.fields.items()
        if is_number
    }
    return {field: (min(known), max(known)) for field, known in numbers.items() if known}


def _labels(rows: Sequence[Prediction]) -> tuple[dict[str, str], list[str]]:
    """Return {label: answer}, both normalised, from rows that have both, and the labels that have several answers.

    If any label has several, `metadata.subject_label` is not what the task asks for, and the mapping is empty.
    """
    answers_of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        label, answer = label_of(row, "subject_label"), normalise(row["reference"])
        if label is not None and answer:
            answers_of[normalise(str(label))].add(answer)
    ambiguous = sorted(label for label, answers in answers_of.items() if len(answers) > 1)
    return ({} if ambiguous else {label: answers.pop() for label, answers in answers_of.items()}), ambiguous


def _kind(rows: Sequence[Prediction], labels: Mapping[str, str], ambiguous: bool, config: TaskConfig) -> TaskKind:
    """Infer a task's kind by the rules of docs/metrics.md."""
    truths = [_truth(row, labels) for row in rows]
    own = [label_of(row, "subject_label") for row in rows]
    distinct = set(truths)
    if config.unit is not None or config.numbers is not None:
        return "regression"
    if config.findings is not None or config.schema is not None:
        return "report"
    stated = label_of(rows[0], "kind")
    for kind in METRICS if config.answers is None else ():
        if stated == kind and all(label_of(row, "kind") == kind for row in rows):
            return kind
    if config.answers is None and len(distinct) > MAX_CLASSES:
        numeric = [isinstance(label, int | float) for label in own]
        if all(is_number(t) or (n and parse_number(t) is not None) for t, n in zip(truths, numeric, strict=True)):
            return "regression"
    references = [compared_label(row) for row in rows]
    if None not in references and not ambiguous:
        plain = all(label == answer for label, answer in labels.items())
        if (labels and plain) or distinct.issuperset(_answer_for(label, labels) for label in references):
            return "comparison"
    labelled = all(normalise(str(label)) == truth for label, truth in zip(own, truths, strict=True))
    if config.answers is not None or labelled or len(distinct) <= min(MAX_CLASSES, len(rows) - 1):
        return "classification"
    return "text"


def _answers(
    rows: Sequence[Prediction], labels: Mapping[str, str], kind: TaskKind, config: TaskConfig
) -> tuple[str, ...]:
    """Return the closed set, each answer in the references' most frequent spelling.

    An answer that does not occur as a reference gets a full stop if all references end with one.
    """
    texts = [row["reference"].strip() for row in rows if normalise(row["reference"])]
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        spelled[normalise(text)][text] += 1
    if config.answers is None:
        names = {_truth(row, labels) for row in rows}
        names |= {normalise(answer) for row in rows for answer in row.get("likelihoods") or ()}
        if kind == "comparison":
            references = [compared_label(row) for row in rows]
            names |= {_answer_for(label, labels) for label in references if label is not None}
        stop = "." if texts and all(text.endswith(".") for text in texts) else ""
        spellings = {name: f"{name}{stop}" for name in names}
    else:
        spellings = {normalise(answer): answer for answer in config.answers}
    return tuple(
        max(sorted(spelled[name]), key=spelled[name].__getitem__) if name in spelled else text
        for name, text in sorted(spellings.items())
    )


def _numbers(name: str, rows: Sequence[Prediction], unit: str | None, config: TaskConfig) -> NumberGrid | None:
    """Return the candidate numbers: those of the rows' likelihoods if there are any, else those of the config."""
    if likelihoods := next((row["likelihoods"] for row in rows if row.get("likelihoods")), None):
        values = {text: parse_number(text, unit) for text in likelihoods}
        if unreadable := [text for text, value in values.items() if value is None]:
            raise DataError(f"task {name}: likelihoods of {unreadable[0]!r}, which is not a number")
        ordered = sorted((value, text) for text, value in values.items() if value is not None)
        texts = tuple(text for _, text in ordered)
        return NumberGrid(tuple(value for value, _ in ordered), texts, texts)
    return None if config.numbers is None else _configured_numbers(name, rows, unit, config.numbers)


def _configured_numbers(name: str, rows: Sequence[Prediction], unit: str | None, config: NumbersConfig) -> NumberGrid:
    place = f"evaluation.tasks.{name}.numbers"
    grid = NumberGrid.make(config, [row["reference"] for row in rows if row["reference"].strip()], place)
    for number, text in zip(grid.values, grid.texts, strict=True):
        if parse_number(text, unit) != number:
            meant = f"{number:g} {unit}" if unit else f"{number:g}"
            raise ConfigError(
                f"{place}: candidate {text!r} cannot be read as {meant}; give {place}.text the unit of the references, "
                "and no other number"
            )
    low, high = grid.values[0], grid.values[-1]
    for row in rows:
        value = parse_number(_truth(row, {}), unit)
        if value is not None and not low <= value <= high:
            raise ConfigError(
                f"{place}: {row['task_id']}: reference {row['reference']!r} is not from {low:g} to {high:g}; change "
                "low or high"
            )
    return grid


def number_tasks(rows: Iterable[Prediction], configured: Mapping[str, TaskConfig]) -> dict[str, Task]:
    """Return the tasks with configured candidate numbers that have rows, whose references may be blank.

    Raises ConfigError if the candidates do not fit the references, or if there are none to take their text from.
    """
    tasks = dict[str, Task]()
    faults = Faults()
    for name, members in by_task(rows).items():
        config = configured.get(name, TaskConfig())
        if config.numbers is not None:
            with faults:
                unit = config.unit or _stated_unit([_truth(row, {}) for row in members])
                numbers = _configured_numbers(name, members, unit, config.numbers)
                tasks[name] = Task("regression", METRICS["regression"], unit=unit, numbers=numbers)
    faults.raise_as(ConfigError)
    return tasks


def _stated_unit(truths: Sequence[str]) -> str | None:
    """Return the unit after the numbers, if all references that have a unit have the same."""
    units = [unit for truth in truths if (unit := stated_unit(truth))]
    return units[0] if units and all(same_unit(units[0], unit) for unit in units) else None
