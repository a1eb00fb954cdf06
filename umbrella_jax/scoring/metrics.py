"""Score predictions task by task. docs/metrics.md says what each figure means."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from umbrella_jax.config.schema import MAX_CLASSES, Metric, TaskKind
from umbrella_jax.console import WIDTH, plural, table_lines, wrapped
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.io.reading import kind, parse_json, read_lines
from umbrella_jax.scoring import weighted_statistics
from umbrella_jax.scoring.bootstrap import (
    Figure,
    Resampled,
    Statistic,
    number_subjects,
    resample_statistics,
    subject_of,
)
from umbrella_jax.scoring.numeric import number_statistics
from umbrella_jax.scoring.parse_answer import normalise, parse_number
from umbrella_jax.scoring.structured import parse_answer_object
from umbrella_jax.scoring.tasks import (
    LIKELIHOOD_METRICS,
    METRICS,
    Prediction,
    Task,
    by_task,
    figures_of_task,
    figures_over_tasks,
    headline,
    metric_names,
    name_of,
    over_tasks,
    reference_faults,
    task_of,
    tasks_of,
)
from umbrella_jax.scoring.text import report_statistics, text_signatures

__all__ = [
    "METRICS",
    "Figure",
    "Prediction",
    "Scores",
    "Task",
    "metric_names",
    "normalise",
    "parse_number",
    "pool_predictions",
    "read_predictions",
    "score",
    "short",
    "task_of",
    "tasks_of",
]

Part = TypeVar("Part")
COLUMNS = (28, 9, 20, 7, 9, 7)
"""Widths of a table's columns: name, value, interval, n, subjects and chance."""


@dataclass(frozen=True)
class Scores:
    """The figures of all tasks, as returned by `score`."""

    tasks: Mapping[str, Task]
    figures: Mapping[str, Figure]
    """{name as in `metric_names`: figure}."""
    confusion: Mapping[str, Sequence[Sequence[int]]]
    """{task with a closed set: counts [reference, answer]}; the last column counts predictions outside the set."""
    notes: tuple[str, ...]
    resamples: int

    def flat(self) -> dict[str, float | None]:
        """Return {name: value} of all figures."""
        return {name: figure.value for name, figure in self.figures.items()}

    def overall(self) -> dict[str, Figure]:
        """Return the figures over several tasks."""
        return figures_over_tasks(self.figures)

    def task_figures(self, task: str) -> dict[str, Figure]:
        """Return a task's figures: {METRIC or METRIC/PART: figure}."""
        return figures_of_task(task, self.tasks[task], self.figures)

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; docs/metrics.md documents the keys."""
        return {
            "version": 1,
            "resamples": self.resamples,
            "notes": list(self.notes),
            "overall": {name: asdict(figure) for name, figure in self.overall().items()},
            "tasks": {
                name: {
                    "kind": task.kind,
                    "answers": None if task.answers is None else list(task.classes),
                    "unit": task.unit,
                    "figures": {figure: asdict(value) for figure, value in self.task_figures(name).items()},
                    "confusion": self.confusion.get(name),
                }
                for name, task in self.tasks.items()
            },
        }

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        rows: list[str | tuple[str, ...]] = [("", "", "95 % interval", "n", "subjects", "chance")]
        for name, task in self.tasks.items():
            rows += [f"{name} ({task.title})", *figure_rows(self.task_figures(name))]
            rows += _confusion_lines(task.classes, self.confusion[name]) if task.answers is not None else []
            rows.append("")
        if overall := self.overall():
            rows += ["over all tasks", *figure_rows(overall), ""]
        lines = table_lines(rows, COLUMNS)
        return "\n".join([*lines, *(line for note in self.notes for line in wrapped(note))])


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """Read predictions from a .jsonl file. Raises DataError with every line that is none."""
    remedy = "expected predictions, as `umbrella-jax predict` writes them"
    rows, faults = [], list[str]()
    for number, line in read_lines(path, DataError, remedy):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path, DataError, remedy, number, nan_is_null=True)
        except DataError as error:
            faults += error.faults
            continue
        faults += [f"{path}:{number}: {fault}" for fault in _schema_faults(row)]
        rows.append(row)
    if not rows and not faults:
        faults.append(f"{path}: no predictions in the file; {remedy}")
    if faults:
        raise DataError(faults)
    return rows


def pool_predictions(files: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read several files of predictions as one set, such as the out-of-fold predictions of a cross-validation.

    A conversation is known by its `task_id`, task and subject.

    Raises:
        DataError: every line of every file that is no prediction, and conversations that are in two files.
    """
    faults, pooled = Faults(), dict[str, list[dict[str, Any]]]()
    for file in files:
        with faults:
            if str(file) in pooled:
                raise DataError(f"{file}: given twice; name each file once")
            pooled[str(file)] = read_predictions(file)
    faults.raise_as(DataError)
    seen: dict[tuple[Any, ...], str] = {}
    for file, rows in pooled.items():
        keys = {(str(row["task_id"]), task_of(row), subject_of(row)) for row in rows}
        for other in dict.fromkeys(seen[key] for key in keys if key in seen):
            both = sorted(key[0] for key in keys if seen.get(key) == other)
            names = ", ".join(both[:3]) + (", …" if len(both) > 3 else "")
            faults.append(
                f"{file}: {plural(len(both), 'conversation')} also in {other} ({names}); expected each in one file"
            )
        seen |= dict.fromkeys(keys - seen.keys(), file)
    faults.raise_as(DataError)
    return [row for rows in pooled.values() for row in rows]


def _schema_faults(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return [f"expected a prediction, an object, got {kind(row)}"]
    required = {"task_id": str, "prediction": str, "reference": str}
    optional = {"task_type": str, "metadata": dict, "likelihoods": dict, "cut": bool}
    names = {str: "a string", dict: "an object", bool: "true or false"}
    return [
        f"{key}: expected {names[type_]}, got {kind(row.get(key))}"
        for key, type_ in (required | optional).items()
        if not isinstance(row.get(key), type_) and (key in required or row.get(key) is not None)
    ]


def cut_faults(rows: Iterable[Prediction], tasks: Mapping[str, Task]) -> list[str]:
    """Return a fault for each answer that `max_new_tokens` cut off on its way to the reference."""
    faults = []
    for row in rows:
        task = tasks[task_of(row)]
        truth, answer = task.truth(row), task.answer_of(row)
        if row.get("cut") and answer and truth != answer and truth.startswith(answer):
            faults.append(
                f"task {task_of(row)}: {row['task_id']}: max_new_tokens cut the answer {row['prediction']!r} off "
                f"before it could be {truth!r}; predict again with more (--max-new-tokens)"
            )
    return faults


def score(rows: Iterable[Prediction], tasks: Mapping[str, Task], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """Compute all figures of all tasks, each with the 95 % interval of a bootstrap over subjects.

    A resample draws as many subjects as there are, over all tasks, with replacement, and takes all answers of each. An
    interval reaches from the 2.5th to the 97.5th percentile. If all resamples agree, a share of answers has the exact
    binomial interval of its number of subjects instead, and other figures have none. A row's subject is its
    `metadata.subject_id`, else its `task_id`; `notes` name the key.

    Args:
        tasks: the result of `tasks_of`.
        resamples: 0 for no intervals, which is cheap enough for evaluations during training.

    Raises:
        DataError: a row's task is not in `tasks`, or a task has no rows; a reference does not fit its task; a
            prediction is not text; likelihoods are of other answers than the task's, or only some of its rows have any.
    """
    groups = by_task(rows)
    figures = {
        name: values.figure() for name, values in resample(groups, tasks, resamples=resamples, seed=seed).items()
    }
    intervals = f"95 % intervals: {resamples} resamples of subjects" if resamples else "No intervals: no resamples"
    return Scores(
        tasks=dict(tasks),
        figures=figures,
        confusion={name: _confusion(task, groups[name]) for name, task in tasks.items() if task.answers is not None},
        notes=(f"{intervals}; {subject_keys(groups)}.", *answer_notes(tasks, groups)),
        resamples=resamples,
    )


def resample(
    groups: Mapping[str, Sequence[Prediction]], tasks: Mapping[str, Task], *, resamples: int, seed: int
) -> dict[str, Resampled]:
    """Return {name: values} of all figures, those over several tasks first.

    The draws depend only on `resamples`, `seed` and the subjects, so two models' answers to the same conversations are
    resampled alike. Other arguments and errors are those of `score`.

    Args:
        groups: {task: its rows}.
    """
    check_answers(groups, tasks)
    numbers = number_subjects(row for members in groups.values() for row in members)
    statistics = _statistics(groups, tasks, numbers)
    names = {name: task.figures(likelihoods=_with_likelihoods(groups[name])) for name, task in tasks.items()}
    overall = over_tasks(names)
    if pooled := overall.get("accuracy"):
        right = np.array([tasks[t].answer_of(row) == tasks[t].truth(row) for t in pooled for row in groups[t]])
        chances = [statistics[f"accuracy/{t}"].chance or 0 for t in pooled]
        chance = float(np.average(chances, weights=[len(groups[t]) for t in pooled]))
        subject = np.concatenate([statistics[f"accuracy/{t}"].subject for t in pooled])
        statistics["accuracy"] = _share(right, subject, chance)
    answers = sum(map(len, groups.values()))
    found = resample_statistics(statistics, len(numbers), answers, resamples=resamples, seed=seed)
    for name, averaged in overall.items():
        if name != "accuracy":
            each = [found[name_of(task, name.removeprefix("macro/"))] for task in averaged]
            chances = [one.chance for one in each if one.chance is not None]
            found[name] = Resampled(
                np.mean([one.values for one in each], axis=0),
                np.concatenate([one.subject for one in each]),
                float(np.mean(chances)) if len(chances) == len(each) else None,
            )
    return {name: found[name] for name in [*overall, *(n for n in statistics if n not in overall)]}


def resample_parts(
    parts: Mapping[Part, Mapping[str, Sequence[Prediction]]],
    groups: Mapping[str, Sequence[Prediction]],
    tasks: Mapping[str, Task],
    *,
    resamples: int,
    seed: int,
) -> dict[tuple[Part, str], Resampled]:
    """Return {(part, name): values} of the figures of each task, over parts of the answers.

    Subjects are drawn over all answers, as by `resample`, so parts are resampled together even if they share subjects.

    Args:
        parts: {part: {task: its rows}}, each row one of `groups`.
        groups: {task: all of its rows}, which `score` accepts.
    """
    numbers = number_subjects(row for members in groups.values() for row in members)
    statistics = {
        (part, name): statistic
        for part, members in parts.items()
        for name, statistic in _statistics(members, tasks, numbers, groups).items()
    }
    answers = sum(map(len, groups.values()))
    return resample_statistics(statistics, len(numbers), answers, resamples=resamples, seed=seed)


def _statistics(
    groups: Mapping[str, Sequence[Prediction]],
    tasks: Mapping[str, Task],
    numbers: Mapping[tuple[str, str], int],
    all_rows: Mapping[str, Sequence[Prediction]] | None = None,
) -> dict[str, Statistic]:
    """Return {name: statistic} of the figures of the tasks that have rows.

    Args:
        all_rows: {task: all of its rows} if `groups` has only some.
    """
    statistics: dict[str, Statistic] = {}
    for name, task in tasks.items():
        if name not in groups:
            continue
        rows = groups[name]
        subject = np.array([numbers[subject_of(row)] for row in rows])
        by_figure = _statistics_of_task(task, rows, subject, (all_rows or groups)[name])
        figures = task.figures(likelihoods=_with_likelihoods(rows))
        statistics |= {name_of(name, figure): by_figure[figure] for figure in figures}
    return statistics


def _statistics_of_task(
    task: Task, rows: Sequence[Prediction], subject: np.ndarray, all_rows: Sequence[Prediction]
) -> dict[str, Statistic]:
    if task.kind == "regression":
        return _regression(task, rows, subject, all_rows)
    return _STATISTICS[task.kind](task, rows, subject)


def headline_of(task: Task, rows: Sequence[Prediction]) -> Metric | None:
    """Return the main metric of a task's answers; None if all of its metrics need likelihoods that they lack."""
    figures = task.figures(likelihoods=_with_likelihoods(rows))
    metrics = [metric for metric in task.metrics if metric in figures]
    return headline(metrics) if metrics else None


def statistic_of(task: Task, figure: str, rows: Sequence[Prediction], subject: np.ndarray) -> Statistic:
    """Return a figure of a task, METRIC or METRIC/PART, as a function of how often each row counts.

    Args:
        subject: number of each row's subject, int [n].
    """
    return _statistics_of_task(task, rows, subject, rows)[figure]


def answer_values(task: Task, metric: Metric, rows: Sequence[Prediction]) -> np.ndarray | None:
    """Return the value of each answer, float [n], whose mean is the metric; None if it is no mean over answers.

    They are 1 for right and 0 for wrong answers (`accuracy`), or absolute errors (`mae`).
    """
    if metric == "accuracy":
        return np.array([task.answer_of(row) == task.truth(row) for row in rows], float)
    if metric == "mae":
        truth, answer = numbers_of(task, rows)
        return np.abs(_with_ends(truth, answer, truth) - truth)
    return None


def check_answers(groups: Mapping[str, Sequence[Prediction]], tasks: Mapping[str, Task]) -> None:
    """Raise DataError, as `score` documents it, if answers cannot be scored. `groups` is {task: its rows}."""
    faults = [f"task {name}: no answers; expected at least one" for name in tasks if name not in groups]
    for name, members in groups.items():
        if name in tasks:
            faults += [*reference_faults(name, members, tasks[name]), *_answer_faults(name, members, tasks[name])]
        else:
            faults.append(f"task {name}: {len(members)} answers to none of the tasks {', '.join(tasks)}")
    if faults:
        raise DataError(faults)


def _with_likelihoods(rows: Sequence[Prediction]) -> bool:
    return all(row.get("likelihoods") for row in rows)


def _answer_faults(name: str, rows: Sequence[Prediction], task: Task) -> list[str]:
    """Return the faults of predictions and likelihoods that cannot be scored."""
    faults = [
        f"task {name}: {row['task_id']}: prediction: expected a string, got {row.get('prediction')!r}"
        for row in rows
        if not isinstance(row.get("prediction"), str)
    ]
    having = [row for row in rows if row.get("likelihoods")]
    expected = [*task.classes] if task.numbers is None else sorted(task.numbers.texts)
    if not expected or not having:
        return faults
    if len(having) < len(rows):
        faults.append(f"task {name}: {len(having)} of {len(rows)} answers have likelihoods; expected all or none")
    for row in having:
        place, likelihoods = f"task {name}: {row['task_id']}: likelihoods", row["likelihoods"]
        given = likelihoods if task.numbers is not None else map(normalise, likelihoods)
        if sorted(given) != sorted(expected):
            faults.append(f"{place} of {_listed(likelihoods)}; expected of {_listed(expected)}")
        elif not all(isinstance(value, int | float) and math.isfinite(value) for value in likelihoods.values()):
            faults.append(f"{place}: expected finite numbers, got {', '.join(map(repr, likelihoods.values()))}")
    return faults


def _listed(texts: Iterable[str]) -> str:
    """Return texts with commas between them, without the middle of more than ten."""
    texts = list(texts)
    return ", ".join(texts if len(texts) <= MAX_CLASSES else [*texts[:3], "…", texts[-1]])


# Statistics as functions of the answers' weights.


def _share(which: np.ndarray, subject: np.ndarray, chance: float | None) -> Statistic:
    return Statistic.mean(which, subject, chance, is_share=True)


def _part(values: np.ndarray, subject: np.ndarray, which: np.ndarray, chance: float | None) -> Statistic:
    return _share(values[which], subject[which], chance)


def _codes(task: Task, rows: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Return the right and the answered class of each row, int [n] each; `len(task.classes)` means no class."""
    code = {name: i for i, name in enumerate(task.classes)}
    answers = [code.get(normalise(row["prediction"]), len(code)) for row in rows]
    return np.array([code[task.truth(row)] for row in rows]), np.array(answers)


def _confusion(task: Task, rows: Sequence[Prediction]) -> list[list[int]]:
    truth, answer = _codes(task, rows)
    counts = np.zeros((len(task.classes), len(task.classes) + 1), int)
    np.add.at(counts, (truth, answer), 1)
    return counts.tolist()


def _most(truth: np.ndarray) -> float | None:
    """Return the share of the most frequent class, which is the accuracy of always answering it."""
    return float(np.bincount(truth).max() / len(truth)) if len(truth) else None


def _classification(task: Task, rows: Sequence[Prediction], subject: np.ndarray) -> dict[str, Statistic]:
    truth, answer = _codes(task, rows)
    classes = len(task.classes)
    one_hot, answered = np.eye(classes)[truth], np.eye(classes + 1)[answer][:, :classes]
    share = one_hot.mean(0)
    most, occurring = share.max(), (share > 0).sum()
    right = truth == answer
    pair = {"truth": one_hot, "answer": answered}
    statistics = {
        "accuracy": _share(right, subject, float(most)),
        "balanced_accuracy": Statistic(
            partial(weighted_statistics.balanced_accuracy, **pair), subject, float(1 / occurring)
        ),
        "f1": Statistic(
            partial(weighted_statistics.macro_f1, **pair), subject, float(2 * most / (1 + most) / occurring)
        ),
        "unparsable": _share(answer == classes, subject, None),
    }
    if not _with_likelihoods(rows):
        return statistics
    probability = answer_probabilities(task, rows)
    brier = ((probability - one_hot) ** 2).sum(1) / 2
    calibration = {"right": probability.argmax(1) == truth, "confidence": probability.max(1)}
    auroc = partial(weighted_statistics.macro_auroc, truth=one_hot, probability=probability)
    return statistics | {
        "auroc": Statistic(auroc, subject, 0.5),
        "brier": Statistic.mean(brier, subject, float((1 - (share**2).sum()) / 2)),
        "ece": Statistic(partial(weighted_statistics.calibration_error, **calibration), subject, None),
    }


def answer_probabilities(task: Task, rows: Sequence[Prediction]) -> np.ndarray:
    """Return the softmax of the likelihoods, float [n, K] in the order of `task.classes`. All rows have likelihoods."""
    from scipy.special import softmax

    by_class = [{normalise(a): value for a, value in row["likelihoods"].items()} for row in rows]
    return softmax(np.array([[likelihoods[name] for name in task.classes] for likelihoods in by_class]), axis=1)


def _comparison(task: Task, rows: Sequence[Prediction], subject: np.ndarray) -> dict[str, Statistic]:
    statistics = _classification(task, rows, subject)
    truth, answer = _codes(task, rows)
    code = {name: i for i, name in enumerate(task.classes)}
    reference = np.array([code[task.compared_with(row)] for row in rows])
    counts = np.zeros((len(code), len(code)), int)
    np.add.at(counts, (reference, truth), 1)
    right, copied, same = truth == answer, answer == reference, reference == truth
    # The conversation states the reference's label, so chance is to give the answer most frequent with that label.
    statistics["accuracy"] = _share(right, subject, float(counts.max(1).sum() / len(rows)))
    parts = {"same": same, "different": ~same} | {f"reference={name}": reference == i for name, i in code.items()}
    for part, which in parts.items():
        statistics[f"accuracy/{part}"] = _part(right, subject, which, _most(truth[which]))
    statistics["copy_rate"] = _share(copied, subject, _agreement(answer, reference))
    statistics["copy_rate/different"] = _part(copied, subject, ~same, _agreement(answer[~same], reference[~same]))
    return statistics | {"vote_accuracy": _votes(truth, answer, len(code), subject)}


def _agreement(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the share of equal elements if the two were independent: Cohen's expected agreement."""
    if not len(one):
        return None
    length = max(one.max(), other.max()) + 1
    return float(np.bincount(one, minlength=length) @ np.bincount(other, minlength=length) / len(one) ** 2)


def _votes(truth: np.ndarray, answer: np.ndarray, classes: int, subject: np.ndarray) -> Statistic:
    """Return whether each subject's majority vote is right; a subject with several right answers has a vote for each.

    If m answers tie as the most frequent and one is right, the vote counts 1/m. All answers outside the classes are
    pooled into one.
    """
    pairs, which = np.unique(np.stack([subject, truth], 1), axis=0, return_inverse=True)
    votes = np.zeros((len(pairs), classes + 1))
    np.add.at(votes, (which.reshape(-1), answer), 1)
    most = votes == votes.max(1, keepdims=True)
    return _share(most[np.arange(len(pairs)), pairs[:, 1]] / most.sum(1), pairs[:, 0], _most(pairs[:, 1]))


def numbers_of(task: Task, rows: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Return the right and the answered number of each row of a regression, float [n] each; NaN for no number."""
    truth = [parse_number(task.truth(row), task.unit) for row in rows]
    answer = [parse_number(row["prediction"], task.unit) for row in rows]
    return np.array(truth, float), np.array(answer, float)


def _with_ends(truth: np.ndarray, answer: np.ndarray, all_truths: np.ndarray) -> np.ndarray:
    """Return the answers, and for each without a number the end of all truths' range that is farther from its truth."""
    low, high = all_truths.min(), all_truths.max()
    return np.where(np.isnan(answer), np.where(truth - low > high - truth, low, high), answer)


def _regression(
    task: Task, rows: Sequence[Prediction], subject: np.ndarray, all_rows: Sequence[Prediction]
) -> dict[str, Statistic]:
    """Return the statistics of a regression. The error of an answer without a number depends on `all_rows` only."""
    truth, answer = numbers_of(task, rows)
    none = np.isnan(answer)
    answer = _with_ends(truth, answer, numbers_of(task, all_rows)[0])
    error = answer - truth
    # Correlations leave out answers without a number: their replacements above depend on the truth.
    pair, own = {"x": truth[~none], "y": answer[~none]}, subject[~none]
    statistics = {
        "mae": Statistic.mean(np.abs(error), subject, float(np.abs(truth - np.median(truth)).mean())),
        "rmse": Statistic(partial(weighted_statistics.rmse, error=error), subject, float(truth.std())),
        "r2": Statistic(partial(weighted_statistics.r2, truth=truth, answer=answer), subject, 0.0),
        "pearson": Statistic(partial(weighted_statistics.pearson, **pair), own, 0.0),
        "spearman": Statistic(partial(weighted_statistics.spearman, **pair), own, 0.0),
        "unparsable": _share(none, subject, None),
    }
    if task.numbers is None or not _with_likelihoods(rows):
        return statistics
    chances = {name: statistic.chance for name, statistic in statistics.items() if statistic.chance is not None}
    return statistics | number_statistics(task, rows, truth, subject, chances)


def _text(task: Task, rows: Sequence[Prediction], subject: np.ndarray) -> dict[str, Statistic]:
    truths = [task.truth(row) for row in rows]
    right = np.array([normalise(row["prediction"]) == truth for row, truth in zip(rows, truths, strict=True)])
    return {"accuracy": _share(right, subject, max(Counter(truths).values()) / len(truths))}


_STATISTICS: dict[TaskKind, Callable[[Task, Sequence[Prediction], np.ndarray], dict[str, Statistic]]] = {
    "classification": _classification,
    "comparison": _comparison,
    "text": _text,
    "report": report_statistics,
}


# Notes and tables.


def subject_keys(groups: Mapping[str, Sequence[Prediction]]) -> str:
    """Return in words which keys name the subjects of answers."""
    known = Counter(subject_of(row)[0] for members in groups.values() for row in members)
    return "subjects by " + " and ".join(f"{key} ({n} answers)" for key, n in sorted(known.items()))


def answer_notes(tasks: Mapping[str, Task], groups: Mapping[str, Sequence[Prediction]]) -> Iterator[str]:
    """Yield sentences about answers that cannot be parsed, tasks with one class, and metrics that lack likelihoods; and
    the signatures of BLEU, chrF and ROUGE-L."""
    yield from text_signatures({metric for task in tasks.values() for metric in task.metrics})
    for name, task in tasks.items():
        rows = groups[name]
        if task.kind == "regression":
            num_failed = sum(parse_number(row["prediction"], task.unit) is None for row in rows)
            failure = "are not a number" + (f" ({task.unit})" if task.unit else "")
            counts_as = (
                "the end of the references' range that is farther from the truth, and not in pearson and spearman"
            )
        elif task.schema is not None:
            num_failed = sum(parse_answer_object(row["prediction"]) is None for row in rows)
            failure, counts_as = "are no JSON object", "wrong in every field"
        else:
            num_failed = sum(normalise(row["prediction"]) not in task.classes for row in rows) if task.answers else 0
            failure, counts_as = f"are none of {', '.join(task.classes)}", "wrong"
        if num_failed:
            yield f"{name}: {num_failed} of {len(rows)} answers {failure}; each counts as {counts_as}."
        if len(task.classes) == 1:
            yield f"{name}: every reference is {task.classes[0]}; list all answers in evaluation.tasks.{name}.answers."
    lacking = {
        name: [metric for metric in task.metrics if metric in LIKELIHOOD_METRICS]
        for name, task in tasks.items()
        if not _with_likelihoods(groups[name])
    }
    if metrics := dict.fromkeys(metric for missing in lacking.values() for metric in missing):
        names = ", ".join(name for name, missing in lacking.items() if missing)
        yield f"No {', '.join(metrics)} of {names}: their predictions hold no likelihoods."


def figure_rows(figures: Mapping[str, Figure], indent: str = "  ") -> Iterator[tuple[str, ...]]:
    """Yield the row of each figure in a table of `COLUMNS`."""
    for name, f in figures.items():
        yield f"{indent}{name}", short(f.value), span(f, 20) or "–", str(f.n), str(f.subjects), short(f.chance)


def span(figure: Figure, width: int) -> str:
    """Return a figure's interval, shortened to fit into a column with a space before it; empty without one."""
    if figure.low is None or figure.high is None:
        return ""
    whole = f"{short(figure.low)} to {short(figure.high)}"
    return whole if len(whole) < width else f"{short(figure.low)}–{short(figure.high)}"


def short(value: float | None) -> str:
    """Format a value with three decimals, or with three digits if it is very small or large."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def _confusion_lines(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> list[str]:
    """Return a table with a row per reference and a column per answer, named by letters."""
    if len(classes) > MAX_CLASSES:
        return [f"  confusion of {len(classes)} answers: with --json"]
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(classes)]
    columns = [6] * (len(classes) + 1)
    width = WIDTH - sum(columns)
    rows = [("  reference / answer", *letters, "none")]
    for letter, name, row in zip(letters, classes, counts, strict=True):
        label = f"  {letter} {name}"
        rows.append((label if len(label) <= width else f"{label[: width - 1]}…", *map(str, row)))
    return table_lines(rows, (width, *columns))
