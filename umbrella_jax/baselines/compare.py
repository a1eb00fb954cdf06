"""Baselines for a language model: a small convolutional network and a linear probe of frozen features.

Both train on a run's training data and answer its evaluation questions, on the volumes that the model sees. They see
only the scans that a question itself shows and no word of the text. For a comparison that is only the scan in question,
not its reference.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from convert.lazy_tensor import place
from umbrella_jax.baselines.cnn import BATCH, EPOCHS, WIDTHS, Scans, Stream, channels, fit_cnn
from umbrella_jax.baselines.probe import NEVER, Tower, fit_probe, folds
from umbrella_jax.baselines.table import side_by_side
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import open_base, same_template
from umbrella_jax.config.schema import RunConfig, TaskConfig
from umbrella_jax.console import wrapped
from umbrella_jax.data.conversation import Conversation, Image
from umbrella_jax.data.loader import Dataset, prefetch
from umbrella_jax.data.validation.checks import check_overlap
from umbrella_jax.errors import CheckpointError, ConfigError, DataError, UmbrellaError
from umbrella_jax.inference.processor import Processor
from umbrella_jax.io.files import PRIVATE, check_output, strict_json, write_whole
from umbrella_jax.models import native_backend
from umbrella_jax.models.paths import VISION_TOWER
from umbrella_jax.rundir import Step, predictions_by_step
from umbrella_jax.scoring.metrics import Scores, Task, read_predictions, score, task_of, tasks_of
from umbrella_jax.scoring.parse_answer import normalise, parse_number, same_unit
from umbrella_jax.scoring.rows import Row, blank_rows
from umbrella_jax.scoring.tasks import label_of

BaselineKind = Literal["cnn", "probe"]
BASELINE_KINDS: tuple[BaselineKind, ...] = ("cnn", "probe")
Shown = tuple[Image, ...]
"""The scans of one question."""
_COLUMNS = {"cnn": "CNN", "probe": "probe"}
_KEPT = 4 << 30
"""Bytes of scans kept in memory between epochs; further scans are read again."""


@dataclass(frozen=True)
class Baselines:
    """The metrics of the baselines and the language model, as returned by `baseline`."""

    scores: Mapping[str, Scores]
    """{column: scores}: `language model` if there is one, `CNN`, `probe`; all on the same questions."""
    notes: tuple[str, ...]

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        notes = [line for note in self.notes for line in wrapped(note)]
        return "\n".join([*side_by_side(self.scores), *notes])


def baseline(
    config: RunConfig,
    out: str | Path,
    *,
    run: str | Path | None = None,
    predictions: str | Path | None = None,
    step: Step | None = None,
    only: BaselineKind | None = None,
    epochs: int = EPOCHS,
    width: float = 1.0,
) -> Baselines:
    """Train baselines for every task of `data.eval` whose answers are a closed set or a quantity, and score them.

    Their answers are written to `out`/baseline/cnn.jsonl and probe.jsonl, in the format of a run's predictions. Volumes
    are not augmented. No reference of `data.eval` influences the answers.

    Args:
        run: run whose predictions are compared and whose tower the probe reads. Default: no predictions, and the base's
            tower with an untrained patch embedding.
        predictions: file of answers to the evaluation data, to compare instead of a run's.
        step: checkpoint of `run`. Default: its best if it keeps one, else its newest.
        only: train only this baseline.
        epochs: epochs of the network.
        width: factor of the network's published channels.

    Raises:
        ConfigError, DataError, CheckpointError: every fault, before anything is computed.
        RunError: the network's loss was never finite.
    """
    kinds = [kind for kind in BASELINE_KINDS if only in (None, kind)]
    files = {kind: Path(out) / "baseline" / f"{kind}.jsonl" for kind in kinds}
    _check(config, only, files.values(), epochs, width)
    checkpoint = _open(config, run, step, weights="probe" in kinds)
    data = config.data
    processor = Processor.from_checkpoint(checkpoint, template=data.template, max_length=data.max_length)
    train, evaluation = processor.datasets(data).values()
    rows = blank_rows(evaluation.conversations)
    overlap = check_overlap({"train": train, "eval": evaluation}, allowed=data.allow_overlap)
    problems, notes = _problems(train, evaluation, config.evaluation.tasks)
    tasks = {problem.name: problem.task for problem in problems}
    if overlap:
        notes = [f"{overlap}.", *notes]
    columns: dict[str, list[Row]] = {}
    answers = predictions if run is None else predictions_by_step(Path(run)).get(checkpoint.step or 0)
    if answers is not None:
        columns["language model"] = _with_answers(Path(answers), [row for row in rows if task_of(row) in tasks])
        notes.append(f"language model: {answers}.")
    elif run is not None:
        notes.append(f"language model: {run} holds no predictions of step {checkpoint.step}.")
    if checkpoint.step_message:
        notes.append(f"{checkpoint.step_message}.")

    work = _Work(config, train, evaluation)
    for kind in kinds:
        if kind == "cnn":
            outputs, more = _cnn(problems, work, epochs, _widths(width))
        else:
            outputs, more = _probe(problems, work, checkpoint)
        pairs = zip(problems, outputs, strict=True)
        answered = dict(row for problem, output in pairs for row in _answer_rows(problem, rows, output))
        columns[_COLUMNS[kind]] = [answered[i] for i in sorted(answered)]
        files[kind].parent.mkdir(0o700, parents=True, exist_ok=True)
        write_whole(files[kind], "".join(strict_json(row) + "\n" for row in columns[_COLUMNS[kind]]), PRIVATE)
        notes += more
    scores = {name: score(answers, tasks, resamples=config.evaluation.resamples) for name, answers in columns.items()}
    how = next(iter(scores.values())).notes[0]
    return Baselines(scores, (how, *(f"{name}: {n}" for name, s in scores.items() for n in s.notes[1:]), *notes))


def _widths(width: float) -> tuple[int, ...]:
    return tuple(round(width * published) for published in WIDTHS)


def _check(config: RunConfig, only: str | None, files: Collection[Path], epochs: int, width: float) -> None:
    """Check everything that can be checked before any file is read. Raises ConfigError."""
    faults = [
        f"{name}: expected a path ({flag})"
        for name, flag in (("data.train", "--train-data PATH"), ("data.eval", "--eval-data PATH"))
        if getattr(config.data, name.removeprefix("data.")) is None
    ]
    faults += [f"{file}: already exists; choose another --out, or remove it" for file in files if file.exists()]
    if only is not None and only not in BASELINE_KINDS:
        faults.append(f"only: expected {' or '.join(BASELINE_KINDS)}, got {only!r}")
    if epochs < 1:
        faults.append(f"--cnn-epochs {epochs}: expected 1 or more")
    if not math.isfinite(width) or min(_widths(width)) < 1:
        faults.append(f"--cnn-width {width}: expected a share of {', '.join(map(str, WIDTHS))} channels, such as 0.25")
    if faults:
        raise ConfigError(faults)
    for file in files:
        check_output(file, "choose another directory (--out DIR)", folder=False)


def _open(config: RunConfig, run: str | Path | None, step: Step | None, *, weights: bool) -> Checkpoint:
    """Open the run's model, or the base; check its weights if they are needed."""
    if run is None:
        checkpoint = open_base(config, weights=weights)
    else:
        checkpoint = Checkpoint.open(run, config.model.modalities, compute_dtype=config.model.compute_dtype, step=step)
        if not checkpoint.runs:
            raise CheckpointError(f"{run}: not a run; expected the --out of umbrella-jax train")
        same_template("data.template", config.data.template, checkpoint)
    if weights:
        checkpoint.check(config.model.frozen_dtype)
    return checkpoint


def _with_answers(file: Path, rows: Sequence[Row]) -> list[Row]:
    """Return `rows` with the answers of a file. Raises DataError for each row that the file does not answer."""
    answers: dict[tuple[str, ...], deque[Row]] = defaultdict(deque)
    for row in read_predictions(file):
        answers[_key(row)].append(row)
    answered, faults = list[Row](), list[str]()
    for row in rows:
        if queue := answers[_key(row)]:
            answer = queue.popleft()
            likelihoods = {"likelihoods": answer["likelihoods"]} if answer.get("likelihoods") else {}
            answered.append(row | {"prediction": answer["prediction"]} | likelihoods)
        else:
            faults.append(
                f"{file}: no answer to {row['task_id']} of task {task_of(row)}, reference {row['reference']!r}"
            )
    if faults:
        raise DataError([*faults, f"{file}: expected answers to all questions of data.eval"])
    return answered


def _key(row: Row) -> tuple[str, ...]:
    return row["task_id"], task_of(row), normalise(row["reference"])


# Questions.


@dataclass(frozen=True)
class _Sample:
    """A training question. Conversations that ask the same about the same scans are one sample."""

    shown: Shown
    target: str | float
    subject: str
    conversation: int = field(compare=False)
    """Number of a conversation that asks it."""


@dataclass(frozen=True)
class _Problem:
    """The questions of one task that show scans of the same modalities."""

    name: str
    task: Task
    """The task as inferred from eval."""
    spelled: Mapping[str, str]
    """{normalised answer: its spelling}."""
    samples: tuple[_Sample, ...]
    asked: Mapping[int, Shown]
    """{number of a conversation of eval: its scans}."""
    classes: tuple[str, ...]
    """The answers of train, normalised; empty for a quantity."""
    targets: np.ndarray
    """Targets of the samples: classes, int [n]; or quantities, float [n]."""
    parts: Sequence[np.ndarray]
    """Numbers of the samples in each part for cross-validation; the network does not train on the first part."""


def _problems(
    train: Dataset, evaluation: Dataset, configured: Mapping[str, TaskConfig]
) -> tuple[list[_Problem], list[str]]:
    """Return the problems of all tasks that baselines can learn from train and answer in eval, and notes on the others.

    Raises DataError and ConfigError with every fault, or if there is nothing to learn.
    """
    tasks = tasks_of(blank_rows(evaluation.conversations), configured)
    if blank := [c.label for c in train.conversations if c.messages[-1].role != "assistant"]:
        raise DataError(
            [f"{label}: the last turn is not the assistant's; expected an answer to learn" for label in blank]
        )
    rows = {"train": blank_rows(train.conversations), "eval": blank_rows(evaluation.conversations)}
    problems, notes, faults = list[_Problem](), list[str](), list[str]()
    for name, task in tasks.items():
        train_scans, eval_scans = (
            {
                i: _question(data.conversations[i], task.kind == "comparison")
                for i, row in enumerate(rows[split])
                if task_of(row) == name
            }
            for split, data in (("train", train), ("eval", evaluation))
        )
        if task.kind == "text":
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
    known = {_modalities(shown) for shown in learnt.values()}
    faults += [
        f"{evaluation.conversations[i].label}: shows {' and '.join(_modalities(shown))}; train has no such question"
        for i, shown in asked.items()
        if shown and _modalities(shown) not in known
    ]
    if faults:
        raise DataError(faults)


def _modalities(shown: Shown) -> tuple[str, ...]:
    return tuple(image.modality for image in shown)


def _task_problems(
    name: str,
    task: Task,
    own: Task,
    rows: Mapping[str, Sequence[Row]],
    learnt: Mapping[int, Shown],
    asked: Mapping[int, Shown],
) -> tuple[list[_Problem], list[str]]:
    """Return a problem for each combination of modalities that eval shows, and notes. Raises DataError for too few
    subjects or answers."""
    spelled = {normalise(answer): answer for answer in (*(own.answers or ()), *(task.answers or ()))}
    problems, notes, faults = list[_Problem](), list[str](), list[str]()
    for modalities in dict.fromkeys(map(_modalities, asked.values())):
        distinct: dict[tuple[Shown, str | float], _Sample] = {}
        for i, shown in learnt.items():
            if _modalities(shown) == modalities:
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
        here = {i: shown for i, shown in asked.items() if _modalities(shown) == modalities}
        problems.append(_Problem(name, task, spelled, samples, here, classes, targets, parts))
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


def _sample(conversation: int, row: Row, task: Task, shown: Shown) -> _Sample:
    truth = task.truth(row)
    target: str | float = truth
    if task.kind == "regression":
        number = parse_number(truth, task.unit)
        assert number is not None  # tasks_of refuses other references
        target = number
    subject = label_of(row, "subject_id")
    paths = "\n".join(str(image.path) for image in shown)
    return _Sample(shown, target, paths if subject is None else str(subject).removeprefix("sub-"), conversation)


def _answer_rows(
    problem: _Problem, rows: Sequence[Row], outputs: Mapping[Shown, np.ndarray]
) -> Iterator[tuple[int, Row]]:
    """Yield the number of each conversation of eval and its answered row."""
    for i, shown in problem.asked.items():
        value = outputs[shown]
        if not problem.classes:
            yield i, rows[i] | {"prediction": f"{float(value):.6g}"}
            continue
        answer = problem.spelled[problem.classes[int(value.argmax())]]
        by_class = dict(zip(problem.classes, map(float, value), strict=True))
        likelihoods = {a: by_class.get(normalise(a), NEVER) for a in problem.task.answers or ()}
        yield i, rows[i] | {"prediction": answer, "likelihoods": likelihoods}


# Answers.


class _Work:
    """The scans of both data sets, in the form that each baseline takes."""

    def __init__(self, config: RunConfig, train: Dataset, evaluation: Dataset):
        self.config, self.train, self.evaluation = config, train, evaluation
        self._kept: dict[Image, np.ndarray] = {}
        self._bytes = 0

    def channels(self, image: Image) -> np.ndarray:
        """Return a scan as the network takes it; keep it if there is room."""
        if image in self._kept:
            return self._kept[image]
        scan = channels(self.evaluation.volume(image))
        if self._bytes + scan.nbytes <= _KEPT:
            self._kept[image] = scan
            self._bytes += scan.nbytes
        return scan

    def stream(self, shown: Callable[[int, int | None], Shown]) -> Stream:
        """Return the stream of questions, given the scans that each shows in an epoch."""

        def batches(indices: Sequence[np.ndarray], epoch: int | None) -> Iterator[Scans]:
            def make(batch: int) -> Scans:
                questions = [shown(int(i), epoch) for i in indices[batch]]
                return tuple(np.stack([self.channels(i) for i in images]) for images in zip(*questions, strict=True))

            return prefetch(make, 0, len(indices), self.config.data.threads)

        return batches

    def drawn(self, samples: Sequence[_Sample]) -> Callable[[int, int | None], Shown]:
        """Return a function from a sample's number and an epoch to its scans.

        The epoch draws their windows; without an epoch they have their first windows.
        """

        def shown(index: int, epoch: int | None) -> Shown:
            sample = samples[index]
            if epoch is None:
                return sample.shown
            images = self.train.encoded[sample.conversation].images
            row = self.train.training_row(sample.conversation, self.config.seed, epoch)
            windows = dict(zip(images, row.images, strict=True))
            return tuple(windows[image] for image in sample.shown)

        return shown

    def features(self, tower: Tower, images: Iterable[Image]) -> dict[Image, np.ndarray]:
        """Return the features of each distinct image's first window: float32 [E]."""
        features: dict[Image, np.ndarray] = {}
        by_modality: dict[str, list[Image]] = defaultdict(list)
        for image in dict.fromkeys(images):
            by_modality[image.modality].append(image)
        for modality, scans in by_modality.items():

            def make(batch: int, scans: list[Image] = scans) -> np.ndarray:
                part = scans[batch * BATCH : (batch + 1) * BATCH]
                volumes = np.stack([self.evaluation.volume(image) for image in part])
                return np.resize(
                    volumes, (BATCH, *volumes.shape[1:])
                )  # one shape for all batches; the first images fill up

            batches = prefetch(make, 0, -(-len(scans) // BATCH), self.config.data.threads)
            rows = np.concatenate([tower(modality, volumes) for volumes in batches])
            features |= dict(zip(scans, rows, strict=False))
        return features


def _first_windows(questions: Sequence[Shown], index: int, epoch: int | None) -> Shown:
    return questions[index]


def _cnn(
    problems: Sequence[_Problem], work: _Work, epochs: int, widths: Sequence[int]
) -> tuple[list[dict[Shown, np.ndarray]], list[str]]:
    """Return the network's outputs {scans of a question: output} for each problem, and notes."""
    fitted: dict[tuple[_Sample, ...], Any] = {}
    by_problem, notes = [], list[str]()
    for problem in problems:
        began = time.monotonic()
        again = problem.samples in fitted
        if not again:
            fitted[problem.samples] = fit_cnn(
                problem.targets,
                problem.parts[0],
                work.stream(work.drawn(problem.samples)),
                classes=len(problem.classes) or None,
                seed=work.config.seed,
                epochs=epochs,
                widths=widths,
                name=problem.name,
            )
        network = fitted[problem.samples]
        asked = list(dict.fromkeys(problem.asked.values()))
        outputs = network(len(asked), work.stream(partial(_first_windows, asked)))
        by_problem.append(dict(zip(asked, outputs, strict=True)))
        held_out, total = len(problem.parts[0]), len(problem.samples)
        modalities = ", ".join(_modalities(asked[0]))
        notes.append(
            f"CNN: {problem.name}: " + "the network of an earlier task, which asks the same about the same scans."
            if again
            else f"CNN: {problem.name}: SFCN (Peng et al. 2021) of {network.parameters:,} parameters on {modalities}; "
            f"trained on {total - held_out} questions, epoch {network.best} of {epochs} chosen by {held_out} of other "
            f"subjects of train; {time.monotonic() - began:.0f} s."
        )
    return by_problem, notes


def _probe(
    problems: Sequence[_Problem], work: _Work, checkpoint: Checkpoint
) -> tuple[list[dict[Shown, np.ndarray]], list[str]]:
    """Return the probe's outputs {scans of a question: output} for each problem, and notes."""
    began = time.monotonic()
    config = checkpoint.config.with_attention(work.config.model.attention, native_backend(jax.devices()[0]))
    tensors = {path: tensor for path, tensor in checkpoint.tensors().items() if path.startswith(VISION_TOWER)}
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tower = Tower(config, place(tensors, lambda path, shape: first))
    shown = [s for p in problems for s in (*(sample.shown for sample in p.samples), *p.asked.values())]
    features = work.features(tower, (image for images in shown for image in images))

    def rows(questions: Iterable[Shown]) -> np.ndarray:
        return np.stack([np.concatenate([features[image] for image in images]) for images in questions])

    patch_embed = "as the run trained it" if checkpoint.runs else "as a run would start it, not trained"
    notes = [
        f"probe: on the mean over patches of the tower's last hidden state of {checkpoint.path}, patch embedding "
        f"{patch_embed}; {len(features)} scans in {time.monotonic() - began:.0f} s."
    ]
    by_problem = []
    for problem in problems:
        probe = fit_probe(
            rows(sample.shown for sample in problem.samples),
            problem.targets,
            problem.parts,
            classes=len(problem.classes) or None,
        )
        asked = list(dict.fromkeys(problem.asked.values()))
        by_problem.append(dict(zip(asked, probe(rows(asked)), strict=True)))
        notes.append(f"probe: {problem.name}: {probe.chosen} by cross-validation over subjects of train.")
    return by_problem, notes
