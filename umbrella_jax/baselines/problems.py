"""The questions that baselines learn and answer: those of one task, about scans of the same modalities.

Baselines read no word of a question: two questions of one task about the same scans are one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from umbrella_jax.baselines.linear import NEVER, folds
from umbrella_jax.config.schema import TaskConfig
from umbrella_jax.data.conversation import Conversation, Image
from umbrella_jax.data.loader import Dataset
from umbrella_jax.errors import DataError, UmbrellaError
from umbrella_jax.scoring.parse_answer import normalise, parse_number, same_unit
from umbrella_jax.scoring.rows import Row, blank_rows
from umbrella_jax.scoring.tasks import Task, label_of, task_of, tasks_of

Shown = tuple[Image, ...]
"""The scans of one question."""


@dataclass(frozen=True)
class TrainingQuestion:
    """A training question. Conversations that ask the same about the same scans are one sample."""

    shown: Shown
    target: str | float
    subject: str
    conversation: int = field(compare=False)
    """Number of a conversation that asks it."""


@dataclass(frozen=True)
class LearningProblem:
    """The questions of one task that show scans of the same modalities."""

    name: str
    task: Task
    """The task as inferred from eval."""
    spelled: Mapping[str, str]
    """{normalised answer: its spelling}."""
    samples: tuple[TrainingQuestion, ...]
    asked: Mapping[int, Shown]
    """{number of a conversation of eval: its scans}."""
    classes: tuple[str, ...]
    """The answers of train, normalised; empty for a quantity."""
    targets: np.ndarray
    """Targets of the samples: classes, int [n]; or quantities, float [n]."""
    parts: Sequence[np.ndarray]
    """Numbers of the samples in each part for cross-validation; the network does not train on the first part."""


def find_problems(
    train: Dataset, evaluation: Dataset, configured: Mapping[str, TaskConfig]
) -> tuple[list[LearningProblem], list[str]]:
    """Return the problems of all tasks that baselines can learn from train and answer in eval, and notes on the others.

    Raises DataError and ConfigError with every fault, or if there is nothing to learn.
    """
    tasks = tasks_of(blank_rows(evaluation.conversations), configured)
    if blank := [c.label for c in train.conversations if c.messages[-1].role != "assistant"]:
        raise DataError(
            [f"{label}: the last turn is not the assistant's; expected an answer to learn" for label in blank]
        )
    rows = {"train": blank_rows(train.conversations), "eval": blank_rows(evaluation.conversations)}
    problems, notes, faults = list[LearningProblem](), list[str](), list[str]()
    for name, task in tasks.items():
        train_scans, eval_scans = (
            {
                i: _question(data.conversations[i], task.kind == "comparison")
                for i, row in enumerate(rows[split])
                if task_of(row) == name
            }
            for split, data in (("train", train), ("eval", evaluation))
        )
        if task.kind not in ("classification", "comparison", "regression"):
            notes.append(f"{name}: no baseline, since its answers are open.")
        elif not any(eval_scans.values()):
            notes.append(f"{name}: no baseline, since it shows no scan.")
        elif not train_scans:
            notes.append(f"{name}: no baseline, since train has no such conversation.")
        else:
            try:
                train_tasks = tasks_of(
                    [rows["train"][i] for i in train_scans], {k: v for k, v in configured.items() if k == name}
                )
                _check_task(name, task, train_tasks[name], (train, train_scans), (evaluation, eval_scans))
                task_problems, task_notes = _task_problems(name, task, train_tasks[name], rows, train_scans, eval_scans)
            except UmbrellaError as error:
                faults += [f"baseline of {name}: {fault}" for fault in error.faults]
                continue
            problems += task_problems
            notes += task_notes
    if faults:
        raise DataError(faults)
    if not problems:
        raise DataError(notes)
    return problems, notes


def _question(conversation: Conversation, comparison: bool) -> Shown:
    """Return the scans of the last turn that shows any; for a comparison only its last scan, the one in question."""
    turns = [tuple(part for part in message.parts if isinstance(part, Image)) for message in conversation.messages]
    last = next(filter(None, reversed(turns)), ())
    return last[-1:] if comparison else last


def _check_task(name: str, task: Task, own: Task, *sets: tuple[Dataset, Mapping[int, Shown]]) -> None:
    """Raise DataError if train does not teach what eval asks; `own` is the task as inferred from train."""
    faults = [
        f"{data.conversations[i].label}: shows no scan, unlike other conversations of the task"
        for data, scans in sets
        for i, shown in scans.items()
        if not shown
    ]
    kinds = {own.kind, task.kind}
    if len(kinds) > 1 and kinds != {"classification", "comparison"}:
        kinds_differ = f"a {task.kind} by the answers of eval, a {own.kind} by those of train"
        faults.append(f"{kinds_differ}; expected evaluation.tasks.{name}.kind")
    if own.unit and task.unit and not same_unit(own.unit, task.unit):
        faults.append(f"in {own.unit} in train, in {task.unit} in eval; expected one unit")
    (_, learnt), (evaluation, asked) = sets
    known = {modalities_of(shown) for shown in learnt.values()}
    faults += [
        f"{evaluation.conversations[i].label}: shows {' and '.join(modalities_of(shown))}; train has no such question"
        for i, shown in asked.items()
        if shown and modalities_of(shown) not in known
    ]
    if faults:
        raise DataError(faults)


def modalities_of(shown: Shown) -> tuple[str, ...]:
    """Return the modality of each scan."""
    return tuple(image.modality for image in shown)


def _task_problems(
    name: str,
    task: Task,
    own: Task,
    rows: Mapping[str, Sequence[Row]],
    learnt: Mapping[int, Shown],
    asked: Mapping[int, Shown],
) -> tuple[list[LearningProblem], list[str]]:
    """Return a problem for each combination of modalities that eval shows, and notes. Raises DataError for too few
    subjects or answers."""
    spelled = {normalise(answer): answer for answer in (*(own.answers or ()), *(task.answers or ()))}
    problems, notes, faults = list[LearningProblem](), list[str](), list[str]()
    for modalities in dict.fromkeys(map(modalities_of, asked.values())):
        distinct: dict[tuple[Shown, str | float], TrainingQuestion] = {}
        for i, shown in learnt.items():
            if modalities_of(shown) == modalities:
                sample = _sample(i, rows["train"][i], own, shown)
                distinct.setdefault((shown, sample.target), sample)
        # sorted without regard to the task, so that two tasks that ask the same share a network
        samples = tuple(sorted(distinct.values(), key=lambda s: ([str(i.path) for i in s.shown], s.target)))
        answers = sorted({s.target for s in samples})
        if len(answers) < 2:
            faults.append(f"every answer of train is {answers[0]}; expected at least two different answers")
            continue
        classes = () if task.kind == "regression" else tuple(map(str, answers))
        targets = np.array([classes.index(str(s.target)) if classes else s.target for s in samples])
        try:
            parts = folds(targets, [s.subject for s in samples], classes=bool(classes))
        except DataError as error:
            faults += [f"train: {fault}" for fault in error.faults]
            continue
        here = {i: shown for i, shown in asked.items() if modalities_of(shown) == modalities}
        problems.append(LearningProblem(name, task, spelled, samples, here, classes, targets, parts))
        if classes and (new := {task.truth(rows["eval"][i]) for i in here}.difference(classes)):
            notes.append(f"{name}: train has no answer {', '.join(sorted(new))}, so no baseline gives it.")
        if classes and (more := set(classes).difference(task.classes)):
            notes.append(
                f"{name}: train has the answer {', '.join(sorted(more))} and eval has not; a baseline that gives it "
                f"counts as unparsable. List all answers in evaluation.tasks.{name}.answers."
            )
    if faults:
        raise DataError(faults)
    return problems, notes


def _sample(conversation: int, row: Row, task: Task, shown: Shown) -> TrainingQuestion:
    truth = task.truth(row)
    target: str | float = truth
    if task.kind == "regression":
        number = parse_number(truth, task.unit)
        assert number is not None  # tasks_of refuses other references
        target = number
    subject = label_of(row, "subject_id")
    paths = "\n".join(str(image.path) for image in shown)
    return TrainingQuestion(
        shown, target, paths if subject is None else str(subject).removeprefix("sub-"), conversation
    )


def answer_rows(problem: LearningProblem, rows: Sequence[Row], outputs: np.ndarray) -> Iterator[tuple[int, Row]]:
    """Yield the number of each conversation of eval and its answered row.

    Args:
        rows: blank rows of all conversations of eval.
        outputs: answers to `problem.asked`, as `Baseline.answer` returns them.
    """
    for i, value in zip(problem.asked, outputs, strict=True):
        if not problem.classes:
            yield i, rows[i] | {"prediction": f"{float(value):.6g}"}
            continue
        answer = problem.spelled[problem.classes[int(value.argmax())]]
        by_class = dict(zip(problem.classes, map(float, value), strict=True))
        likelihoods = {a: by_class.get(normalise(a), NEVER) for a in problem.task.answers or ()}
        yield i, rows[i] | {"prediction": answer, "likelihoods": likelihoods}
