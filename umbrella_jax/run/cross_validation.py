"""Train and test the folds of a study that `umbrella-jax data build` made: `umbrella-jax cv`.

Each fold has an ordinary run, `output_dir`/fold-K, which reads the fold's train and eval conversations. Its checkpoint
then answers the fold's test set, into fold-K/test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import open_base
from umbrella_jax.config.schema import RunConfig, TaskConfig
from umbrella_jax.data.conversation import LOCK_FILE, Conversation, read_conversations
from umbrella_jax.distributed import broadcast, check_same, raise_together
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.inference.answers import check_lengths
from umbrella_jax.inference.controls import applicable_controls, change_conversations, inapplicable_lines
from umbrella_jax.inference.predict import predict
from umbrella_jax.io.files import PRIVATE, strict_json, write_whole
from umbrella_jax.io.reading import read_json, sha256
from umbrella_jax.run.preparation import Shared
from umbrella_jax.run.resumption import check_outs, directory_of_runs, is_finished
from umbrella_jax.run.train import rehearse, train_sharing
from umbrella_jax.rundir import FOLDS, FoldRun, Say, fold_runs, say_nothing, seed_runs, step_to_test, test_answers
from umbrella_jax.scoring.rows import blank_rows
from umbrella_jax.scoring.tasks import Task, task_of, tasks_of
from umbrella_jax.study.lock import read_lock


@dataclass(frozen=True)
class _Fold:
    """A fold to train and test."""

    config: RunConfig
    """Of its run."""
    test: Path
    """The conversations of its test set."""
    test_set: Sequence[Conversation]
    title: str

    @property
    def run(self) -> Path:
        return Path(str(self.config.output_dir))


def cross_validate(
    config: RunConfig,
    study: str | Path,
    *,
    only: int | None = None,
    notes: Sequence[str] = (),
    say: Say = tqdm.write,
) -> None:
    """Train and test the folds of a built study that are not finished yet, one after the other.

    A fold that was cut off continues. The first that fails ends the call. A fold's test set is answered by the step
    that its run's settings choose on its eval split (`train.keep_best`), and without one by the last step.

    Args:
        config: its `output_dir` gets the runs; its data are replaced by the folds'.
        study: directory of the built study.
        only: number of a single fold, from 1.
        notes: what was printed about the config, for each `log.txt`.
        say: takes lines to print.

    Raises:
        ConfigError: the study has no folds, or not this one; `output_dir` belongs to another study, to several seeds or
            to a single run; a fold's run has other settings; a setting needs an eval split and the folds have none.
        DataError: a test set cannot be read, or an answer in it is longer than `train.max_new_tokens`.
        UmbrellaError, Interrupted: as `train` and `predict` do.
    """
    tell = say if jax.process_index() == 0 else say_nothing
    folds, tasks = _open_folds(config, Path(study), only, tell)
    with raise_together():
        if jax.process_index() == 0:
            _record(Path(str(config.output_dir)), Path(study))
    shared: Shared | None = None
    for number, fold in enumerate(folds, 1):
        trained, tested, begun = broadcast([is_finished(fold.config), _is_tested(fold), fold.run.exists()])
        if trained and tested:
            tell(f"{fold.title}: finished: {fold.run}")
            continue
        tell(f"{fold.title}, {number} of {len(folds)}: {fold.run}")
        with raise_together():
            _check_same_study(Path(str(config.output_dir)), Path(study))
        if not trained:
            _, shared = train_sharing(fold.config, shared, resume=begun, notes=notes, say=say)
            shared = replace(shared, datasets={}, inputs={})
            with raise_together():  # training may have taken days
                _check_same_study(Path(str(config.output_dir)), Path(study))
        _test(fold, tasks, say)


def rehearse_folds(config: RunConfig, study: str | Path, *, only: int | None = None, say: Say = tqdm.write) -> None:
    """Rehearse the first fold that `cross_validate` would train. Raises its errors and those of `rehearse`."""
    tell = say if jax.process_index() == 0 else say_nothing
    folds, _ = _open_folds(config, Path(study), only, tell)
    names = broadcast([fold.title for fold in folds if not is_finished(fold.config)])
    if not names:
        tell("every fold is trained")
        return
    tell(f"{names[0]}, as an example of {len(names)}")
    rehearse(next(fold.config for fold in folds if fold.title == names[0]), resume=True, say=say)


def _open_folds(config: RunConfig, study: Path, only: int | None, tell: Say) -> tuple[list[_Fold], dict[str, Task]]:
    """Check everything about the folds that can be checked before one trains.

    Returns:
        The folds, and the tasks of all test sets together, so that all folds know the same closed sets.
    """
    check_same([("the folds", str(study)), ("--fold", only)], "start every process with the same")
    with raise_together():
        out = directory_of_runs(config, "folds")
        if seed_runs(out):
            raise ConfigError(f"{out}: holds the runs of several seeds; choose another directory (--out DIR)")
        lock = _read_folds(study)
        if only is not None and not 1 <= only <= len(lock["folds"]):
            raise ConfigError(f"fold: {only}: {study} has folds 1 to {len(lock['folds'])}; expected one of them")
        _check_same_study(out, study)
        study = study.absolute()  # the runs record it, and a later call may come from another directory
        suffix, root = lock["suffix"], str((study / lock["image_root"]).resolve())
        has_eval = (study / lock["folds"][0]["name"] / f"eval{suffix}").exists()
        config = _without_eval(config, study, tell) if not has_eval else config
        folds, faults = list[_Fold](), Faults()
        base = open_base(config, weights=False)
        for fold in lock["folds"]:
            folder = study / fold["name"]
            paths = {split: folder / f"{split}{suffix}" for split in ("train", "test", *(["eval"] if has_eval else []))}
            faults += [f"{path}: not found; build the study again" for path in paths.values() if not path.exists()]
            data = replace(
                config.data,
                train=str(paths["train"]),
                eval=str(paths["eval"]) if has_eval else None,
                image_root=root,
            )
            own = replace(config, data=data, output_dir=str(out / fold["name"]))
            title = FoldRun(out / fold["name"], fold["left_out"]).title
            with faults:
                conversations = read_conversations(
                    paths["test"],
                    base.config.modalities,
                    root,
                    modality=data.modality,
                    task_filter=data.task_filter,
                    allow_outside_root=data.allow_outside_root,
                )
                folds.append(_Fold(own, paths["test"], conversations, title))
        faults.raise_as(DataError)
        tasks = tasks_of([row for fold in folds for row in blank_rows(fold.test_set)], config.evaluation.tasks)
        folds = folds if only is None else folds[only - 1 : only]
        check_outs((fold.config for fold in folds), resume=True)
        _check_answers(base, config, folds, tasks)
        _check_controls(base, folds)
    return folds, tasks


def _read_folds(study: Path) -> dict[str, Any]:
    """Return the record of a built study with folds. Raise DataError for any other folder."""
    lock = read_lock(study)
    if not lock["folds"]:
        raise DataError(
            f"{study}: has no folds; build it with split.folds or split.leave_out, or use umbrella-jax train"
        )
    return lock


def _check_same_study(out: Path, study: Path) -> None:
    """Raise ConfigError if `out` has folds of another study."""
    if (out / FOLDS).exists():
        fold_runs(out)
        before = read_json(out / FOLDS, ConfigError, "restore it").get("study_sha256")
        if before != sha256(study / LOCK_FILE):
            raise ConfigError(
                f"{out}: its folds are not those of {study}, which may have been built again; choose another directory "
                "(--out DIR)"
            )


def _record(out: Path, study: Path) -> None:
    """Write the list of folds, unless it is there."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / FOLDS).exists():
        record = {
            "study": str(study.absolute()),
            "study_sha256": sha256(study / LOCK_FILE),
            "folds": _read_folds(study)["folds"],
        }
        write_whole(out / FOLDS, strict_json(record, indent=1) + "\n", PRIVATE)


def _without_eval(config: RunConfig, study: Path, tell: Say) -> RunConfig:
    """Return the config for folds without an eval split. Raise ConfigError for settings that need one."""
    train = config.train
    needing = {
        "train.keep_best": train.keep_best,
        "train.best_metric": train.best_metric,
        "train.early_stopping": train.early_stopping,
    }
    if faults := [
        f"{key}: the folds of {study} have no eval split to choose a step on; give the study split.sizes such as "
        "{train: 0.8, eval: 0.2}, or leave it out"
        for key, value in needing.items()
        if value
    ]:
        raise ConfigError(faults)
    tell("no eval split: nothing is evaluated during training, and the last step answers the test set")
    return replace(config, train=replace(train, eval_steps=None, eval_samples=None))


def _check_answers(base: Checkpoint, config: RunConfig, folds: Sequence[_Fold], tasks: dict[str, Task]) -> None:
    """Raise DataError if an answer in a test set is longer than the limit: training first would waste hours."""
    limit = (base.tokenizer(), config.data.template, config.train.max_new_tokens, "train.max_new_tokens")
    faults = Faults()
    for fold in folds:
        with faults:
            check_lengths(fold.test_set, blank_rows(fold.test_set), tasks, *limit)
    faults.raise_as(DataError)


def _check_controls(base: Checkpoint, folds: Sequence[_Fold]) -> None:
    """Raise DataError if a control of a test set cannot be made."""
    faults = Faults()
    for fold in folds:
        try:
            change_conversations(fold.test_set, list(base.config.modalities), **_controls(fold))
        except DataError as error:
            faults += [f"evaluation.controls: {fold.test}: {fault}" for fault in error.faults]
    faults.raise_as(DataError)


def _controls(fold: _Fold) -> dict[str, Any]:
    """Return the controls of a fold's test set, and the wordings of the tasks that it has, as for `predict`."""
    evaluation, tasks = fold.config.evaluation, {task_of(row) for row in blank_rows(fold.test_set)}
    paraphrases = {task: questions for task, questions in evaluation.paraphrases.items() if task in tasks}
    names = applicable_controls(evaluation.controls, fold.test_set)
    return {"controls": [n for n in names if n != "paraphrase" or paraphrases], "paraphrases": paraphrases}


def _is_tested(fold: _Fold) -> bool:
    if not is_finished(fold.config):
        return False
    return test_answers(fold.run, step_to_test(fold.run, fold.config.train)[0]).exists()


def tasks_to_answer(configured: Mapping[str, TaskConfig], tasks: Mapping[str, Task]) -> dict[str, TaskConfig]:
    """Return the settings of tasks for one fold's test set, with the kinds and closed sets that all folds share.

    Args:
        configured: `evaluation.tasks`.
        tasks: the tasks of all test sets together.
    """
    return {
        name: replace(
            configured.get(name, TaskConfig()),
            kind=task.kind,
            answers=task.answers if task.answers and len(task.answers) > 1 else None,
        )
        for name, task in tasks.items()
    }


def _test(fold: _Fold, tasks: dict[str, Task], say: Say) -> None:
    """Answer a fold's test set with the checkpoint that its run's settings choose."""
    config = fold.config
    step, why = step_to_test(fold.run, config.train)
    answers = test_answers(fold.run, step)
    with raise_together():
        if jax.process_index() == 0:
            answers.parent.mkdir(0o700, exist_ok=True)
    if jax.process_index() == 0:
        say(f"{fold.title}: answering {fold.test} with step {step} ({why})")

        for line in inapplicable_lines(config.evaluation.controls, fold.test_set):
            say(line)

    def say_others(line: str) -> None:
        if not line.startswith(f"{fold.run}: step "):  # the line above says it, and why
            say(line)

    closed = any(tasks[task_of(row)].answers for row in blank_rows(fold.test_set))
    predict(
        fold.run,
        replace(config.data, train=None, eval=str(fold.test)),
        answers,
        batch_size=config.train.batch_size,
        max_new_tokens=config.train.max_new_tokens,
        likelihoods=config.evaluation.likelihoods and closed,
        **_controls(fold),
        tasks=tasks_to_answer(config.evaluation.tasks, tasks),
        mesh=config.mesh,
        compute_dtype=config.model.compute_dtype,
        step=step,
        resume=True,
        say=say_others,
    )
