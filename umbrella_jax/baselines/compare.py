"""Train baselines on a run's data and compare them with its language model.

They train on the run's training data and answer its evaluation questions. They see only the scans that a question
itself shows, or columns of its metadata, and no word of the text. For a comparison that is only the scan in question,
not its reference.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbrella_jax.baselines.baseline import DEFAULTS, Baseline, BaselineOptions, Inputs
from umbrella_jax.baselines.cnn import CnnBaseline
from umbrella_jax.baselines.connectivity import ConnectivityBaseline
from umbrella_jax.baselines.covariates import CovariatesBaseline
from umbrella_jax.baselines.intensity import IntensityBaseline
from umbrella_jax.baselines.probe import ProbeBaseline
from umbrella_jax.baselines.problems import LearningProblem, answer_rows, find_problems
from umbrella_jax.baselines.table import side_by_side
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import open_base, same_template
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.console import wrapped
from umbrella_jax.data.validation.checks import check_overlap
from umbrella_jax.errors import CheckpointError, ConfigError, DataError, Faults
from umbrella_jax.inference.processor import Processor
from umbrella_jax.io.files import PRIVATE, check_output, strict_json, write_whole
from umbrella_jax.rundir import Step, predictions_by_step
from umbrella_jax.scoring.metrics import Scores, read_predictions, score, task_of
from umbrella_jax.scoring.parse_answer import normalise
from umbrella_jax.scoring.rows import Row, blank_rows

BASELINES: Mapping[str, type[Baseline]] = {
    kind.name: kind
    for kind in (CnnBaseline, ProbeBaseline, ConnectivityBaseline, IntensityBaseline, CovariatesBaseline)
}
"""{name: baseline}, in the order of the table."""
MODEL = "language model"
"""Column of the language model's answers."""


@dataclass(frozen=True)
class Comparison:
    """The metrics of the baselines and the language model, as returned by `baseline`."""

    scores: Mapping[str, Scores]
    """{title: scores}: `language model` if there is one, and each baseline, with the tasks that it answers. A task's
    questions are the same for all."""
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
    only: Sequence[str] = (),
    options: BaselineOptions = DEFAULTS,
) -> Comparison:
    """Train baselines for every task of `data.eval` whose answers are a closed set or a quantity, and score them.

    The answers of each are written to `out`/baseline/NAME.jsonl, in the format of a run's predictions. Volumes are not
    augmented. No reference of `data.eval` influences the answers.

    Args:
        run: run whose predictions are compared and whose tower the probe reads. Default: no predictions, and the base's
            tower with an untrained patch embedding.
        predictions: file of answers to the evaluation data, to compare instead of a run's.
        step: checkpoint of `run`. Default: its best if it keeps one, else its newest.
        only: names of `BASELINES`. Default: all that apply; the notes say why others do not.

    Raises:
        ConfigError, DataError, CheckpointError: every fault, before anything is computed; also if a baseline of `only`
            applies to no task.
        RunError: the network's loss was never finite.
    """
    kinds = [kind for name, kind in BASELINES.items() if name in only or not only]
    files = {kind.name: Path(out) / "baseline" / f"{kind.name}.jsonl" for kind in kinds}
    _check(config, only, files.values(), options)
    checkpoint = _open(config, run, step, weights=any(kind.needs_weights for kind in kinds))
    data = config.data
    processor = Processor.from_checkpoint(checkpoint, template=data.template, max_length=data.max_length)
    train, evaluation = processor.datasets(data).values()
    rows = blank_rows(evaluation.conversations)
    overlap = check_overlap({"train": train, "eval": evaluation}, allowed=data.allow_overlap)
    problems, notes = find_problems(train, evaluation, config.evaluation.tasks)
    tasks = {problem.name: problem.task for problem in problems}
    if overlap:
        notes = [f"{overlap}.", *notes]
    answers: dict[str, list[Row]] = {}
    answers_file = predictions if run is None else predictions_by_step(Path(run)).get(checkpoint.step or 0)
    if answers_file is not None:
        answers[MODEL] = _with_answers(Path(answers_file), [row for row in rows if task_of(row) in tasks])
        notes.append(f"{MODEL}: {answers_file}.")
    elif run is not None:
        notes.append(f"{MODEL}: {run} holds no predictions of step {checkpoint.step}.")
    if checkpoint.step_message:
        notes.append(f"{checkpoint.step_message}.")

    inputs = Inputs(
        config=config,
        train=train,
        evaluation=evaluation,
        train_rows=blank_rows(train.conversations),
        eval_rows=rows,
        checkpoint=checkpoint,
        options=options,
    )
    chosen, more = _choose([kind(inputs) for kind in kinds], problems, needed=only)
    notes += more
    for each, learnable in chosen:
        outputs, more = each.answer(learnable)
        pairs = zip(learnable, outputs, strict=True)
        answered = dict(row for problem, output in pairs for row in answer_rows(problem, rows, output))
        answers[each.title] = [answered[i] for i in sorted(answered)]
        files[each.name].parent.mkdir(0o700, parents=True, exist_ok=True)
        write_whole(files[each.name], "".join(strict_json(row) + "\n" for row in answers[each.title]), PRIVATE)
        notes += more
    scores = {
        title: score(
            answered_rows,
            {name: task for name, task in tasks.items() if name in {*map(task_of, answered_rows)}},
            resamples=config.evaluation.resamples,
        )
        for title, answered_rows in answers.items()
    }
    how = next(iter(scores.values())).notes[0]
    return Comparison(scores, (how, *(f"{name}: {n}" for name, s in scores.items() for n in s.notes[1:]), *notes))


def _choose(
    baselines: Sequence[Baseline], problems: Sequence[LearningProblem], *, needed: Collection[str]
) -> tuple[list[tuple[Baseline, list[LearningProblem]]], list[str]]:
    """Return each baseline that applies to any task, with the problems that it learns, and notes on what it does not.

    A baseline answers a task only if it can learn all of its problems, so that all answer the same questions. Raises
    DataError if a `needed` one applies to no task, and with every fault of `Baseline.check`.
    """
    chosen, notes, faults = list[tuple[Baseline, list[LearningProblem]]](), list[str](), Faults()
    for each in baselines:
        reasons: dict[str, list[str]] = defaultdict(list)
        unlearnable = dict[str, str]()
        missing = each.missing_extra()
        for problem in problems:
            if reason := missing or each.why_not(problem):
                unlearnable.setdefault(problem.name, reason)
        for task, reason in unlearnable.items():
            reasons[reason].append(task)
        lines = [f"{each.title}: not for {', '.join(of)}: {reason}." for reason, of in reasons.items()]
        learnable = [problem for problem in problems if problem.name not in unlearnable]
        if learnable:
            faults += each.check(learnable)
            chosen.append((each, learnable))
        elif each.name in needed:
            faults += [line.removesuffix(".") for line in lines]
        notes += lines
    faults.raise_as(DataError)
    return chosen, notes


def _check(config: RunConfig, only: Sequence[str], files: Collection[Path], options: BaselineOptions) -> None:
    """Check everything that can be checked before any file is read. Raises ConfigError."""
    faults = [
        f"{name}: expected a path ({flag})"
        for name, flag in (("data.train", "--train-data PATH"), ("data.eval", "--eval-data PATH"))
        if getattr(config.data, name.removeprefix("data.")) is None
    ]
    faults += [f"{file}: already exists; choose another --out, or remove it" for file in files if file.exists()]
    faults += [f"only: expected some of {', '.join(BASELINES)}, got {name!r}" for name in only if name not in BASELINES]
    for name, kind in BASELINES.items():
        if only and name not in only:
            faults += [
                f"{flag}: is of no use without {name} in --only; leave it out"
                for option, flag in kind.flags.items()
                if getattr(options, option) != getattr(DEFAULTS, option)
            ]
            continue
        faults += kind.option_faults(options)
        if name in only and (missing := kind.missing_extra()):
            faults.append(f"{name}: {missing}")
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
