"""Collect the facts about a run that the model card of its export states."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.model_card import TaskMetric, TrainingRecord
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.config.load import flat, load_stored_config
from umbrella_jax.config.schema import AugmentConfig, RunConfig, to_dict
from umbrella_jax.errors import DataError, UmbrellaError
from umbrella_jax.io.reading import LISTING, read_json
from umbrella_jax.models import abstract_params
from umbrella_jax.rundir import CONFIG, COUNTS, NEWEST, predictions_by_step
from umbrella_jax.scoring.metrics import cut_faults, read_predictions, score, tasks_of
from umbrella_jax.training import freeze

_log = logging.getLogger(__name__)
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

    Predictions that cannot be scored cause a warning. Raises DataError, CheckpointError or ConfigError if another file
    of a run is damaged.
    """
    return tuple(_read(run) for run in checkpoint.runs)


def _read(run: RunCheckpoint) -> TrainingRecord:
    config = load_stored_config(run.path / CONFIG)
    shapes = abstract_params(replace(run.config, lora=run.lora))[1]
    return TrainingRecord(
        step=f"step {run.step}" + (f" ({run.why_step})" if run.why_step not in ("", NEWEST) else ""),
        settings=_settings(config),
        versions=run.meta()["versions"],
        parameters=freeze.counts(shapes, freeze.label_params(list(shapes), run.groups)),
        counts=_counts(run.path / COUNTS),
        metrics=_metrics(run, config),
        resamples=config.evaluation.resamples,
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


def _metrics(run: RunCheckpoint, config: RunConfig) -> tuple[TaskMetric, ...] | None:
    """Return the metrics of the evaluation after the exported step; None without one, or if it cannot be scored."""
    file = predictions_by_step(run.path).get(run.step or 0)
    if file is None:
        return None
    try:
        rows = read_predictions(file)
        tasks = tasks_of(rows, config.evaluation.tasks)
        if faults := cut_faults(rows, tasks):
            raise DataError(faults)
        scores = score(rows, tasks, resamples=config.evaluation.resamples)
    except UmbrellaError as error:  # as `umbrella-jax score` reports; the weights can be exported all the same
        _log.warning("the model card will have no metrics: %s", error)
        return None
    return tuple(
        TaskMetric(task, name, figure.value, figure.low, figure.high, figure.chance, figure.n, figure.subjects)
        for task in scores.tasks
        for name, figure in scores.task_figures(task).items()
        if "/" not in name
    )
