"""Collect the facts about a run that the model card of its export states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.model_card import TaskMetric, TrainingRecord
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.config.load import flat
from umbrella_jax.config.schema import AugmentConfig, RunConfig, to_dict
from umbrella_jax.errors import DataError, UmbrellaError
from umbrella_jax.io.reading import LISTING, read_json
from umbrella_jax.models import abstract_params
from umbrella_jax.rundir import COUNTS, NEWEST, PREDICTIONS, load_run_config, predictions_by_step
from umbrella_jax.scoring.metrics import cut_faults, read_predictions, score, tasks_of
from umbrella_jax.training import freeze

_SETTINGS = ("train", "model", "data", "seed")
_LEFT_OUT = (
    *("model.base", "model.adapter", "model.modalities", "train.tensorboard", "train.wandb", "train.eval_"),
    *("train.save_steps", "train.keep_latest", "data.train", "data.eval", "data.image_root"),
    *("data.allow_outside_root", "data.threads"),
    *("data.cache", "model.remat", "model.attention", "model.layers", "train.keep_best", "train.max_skipped"),
)
"""Settings that name files, or do not change the weights."""


def read_training_records(checkpoint: Checkpoint) -> tuple[TrainingRecord, ...]:
    """Return the record of each run that made the weights of a checkpoint, first to last.

    The record of a run whose predictions are missing or cannot be scored says so in `why_no_metrics`. Raises DataError,
    CheckpointError or ConfigError if another file of a run is damaged.
    """
    return tuple(_read(run) for run in checkpoint.runs)


def _read(run: RunCheckpoint) -> TrainingRecord:
    config = load_run_config(run.path)
    shapes = abstract_params(replace(run.config, lora=run.lora))[1]
    metrics, why_no_metrics = _metrics(run, config)
    return TrainingRecord(
        step=f"step {run.step}" + (f" ({run.why_step})" if run.why_step not in ("", NEWEST) else ""),
        settings=_settings(config),
        versions=run.meta()["versions"],
        parameters=freeze.counts(shapes, freeze.label_params(list(shapes), run.groups)),
        counts=_counts(run.path / COUNTS),
        metrics=metrics,
        resamples=config.evaluation.resamples,
        why_no_metrics=why_no_metrics,
    )


def _counts(file: Path) -> dict[str, Any] | None:
    """Return the numbers about a run's data, None if it did not record them."""
    if not file.exists():
        return None
    remedy = "copy the run again, or delete the file if the card may lack it"
    splits = read_json(file, DataError, remedy, LISTING)
    try:
        for split in splits.values():
            _ = split["conversations"], split["subjects"], split["volumes"].items()
            _ = [(task["kind"], task["conversations"], task["subjects"]) for task in split["tasks"].values()]
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{file}: not as `umbrella-jax train` writes it; {remedy}") from None
    return dict(splits)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return {key: value} of the settings on which the weights depend, without changes of volumes that are off."""
    off = flat({"data": {"augment": to_dict(AugmentConfig())}})
    return {
        key: value
        for key, value in flat(to_dict(config)).items()
        if key.startswith(_SETTINGS) and not key.startswith(_LEFT_OUT) and value is not None
        if key not in off or value != off[key]
    }


def _metrics(run: RunCheckpoint, config: RunConfig) -> tuple[tuple[TaskMetric, ...] | None, str]:
    """Return the metrics of the evaluation after the exported step; None and the reason without one."""
    by_step, step = predictions_by_step(run.path), run.step or 0
    if config.data.eval is None and not by_step:
        return None, f"{run.path}: the run had no evaluation data (data.eval)"
    if step not in by_step:
        others = f"; step {', '.join(map(str, by_step))} was: choose it with --step" if by_step else ""
        return None, f"{run.path / PREDICTIONS}: step {step} was not evaluated{others}"
    try:
        rows = read_predictions(by_step[step])
        tasks = tasks_of(rows, config.evaluation.tasks)
        if faults := cut_faults(rows, tasks):
            raise DataError(faults)
        scores = score(rows, tasks, resamples=config.evaluation.resamples)
    except UmbrellaError as error:  # as `umbrella-jax score` reports; the weights can be used all the same
        return None, str(error)
    return tuple(
        TaskMetric(task, name, figure.value, figure.low, figure.high, figure.chance, figure.n, figure.subjects)
        for task in scores.tasks
        for name, figure in scores.task_figures(task).items()
        if "/" not in name
    ), ""
