"""Read the answers of a directory of `umbrella-jax cv`: those of each fold to its test set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_jax.config.schema import EvaluationConfig
from umbrella_jax.errors import ConfigError
from umbrella_jax.report.compare_runs import find_runs
from umbrella_jax.rundir import FoldRun, load_run_config, step_to_test, test_answers
from umbrella_jax.scoring.metrics import pool_predictions, read_predictions


@dataclass(frozen=True)
class FoldPredictions:
    """The out-of-fold predictions of a cross-validation: each conversation once."""

    rows: Mapping[str, Sequence[dict[str, Any]]]
    """{title of a fold: its rows}."""
    files: Mapping[str, Path]
    """{title of a fold: its predictions file}."""
    lines: Sequence[str]
    """A line per fold with its file and why its step was chosen."""
    evaluation: EvaluationConfig
    """How to score them."""

    @property
    def pooled(self) -> list[dict[str, Any]]:
        """The rows of all folds."""
        return [row for own in self.rows.values() for row in own]


def unfinished_folds(folds: Sequence[FoldRun]) -> dict[str, str]:
    """Return {directory of a fold's run: what it lacks} of the folds that have not answered their test set."""
    return {str(fold.run): lacking for fold in folds if (lacking := _lacking(fold))}


def _lacking(fold: FoldRun) -> str | None:
    try:
        (run,) = find_runs(fold.run)
    except ConfigError:
        return "not trained yet"
    if run.state != "finished":
        return f"{run.state}: {run.stop_reason or f'step {run.step} of {run.steps}'}"
    step, _ = step_to_test(fold.run, load_run_config(fold.run).train)
    return None if test_answers(fold.run, step).exists() else "trained, but its test set is not answered yet"


def read_folds(folds: Sequence[FoldRun], evaluation: EvaluationConfig | None) -> FoldPredictions:
    """Read the answers of all folds.

    Args:
        folds: of one directory, as from `fold_runs`; at least one.
        evaluation: how to score; by default as the runs do.

    Raises:
        ConfigError: a fold is not finished, naming each; or folds differ in how they score.
        DataError: answers are damaged, or a conversation is in two test sets.
    """
    if unfinished := unfinished_folds(folds):
        raise ConfigError([f"{run}: {lacking}; run umbrella-jax cv again" for run, lacking in unfinished.items()])
    configs = {fold: load_run_config(fold.run) for fold in folds}
    if evaluation is None:
        evaluation = configs[folds[0]].evaluation
        if differing := [fold for fold, config in configs.items() if config.evaluation != evaluation]:
            first = folds[0].run
            raise ConfigError(
                [
                    f"{fold.run}: other settings of evaluation than in {first}; name those to use: "
                    f"umbrella-jax score {first.parent} --config FILE"
                    for fold in differing
                ]
            )
    files, lines = dict[str, Path](), []
    for fold, config in configs.items():
        step, why = step_to_test(fold.run, config.train)
        files[fold.title] = test_answers(fold.run, step)
        lines.append(f"{fold.title}: {files[fold.title]} ({why})")
    pool_predictions(files.values())  # refuses a conversation that is in two
    rows = {title: read_predictions(file) for title, file in files.items()}
    return FoldPredictions(rows, files, lines, evaluation)
