"""Read the predictions of a directory of `umbrella-jax train --seeds`, checking that its runs are comparable."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_jax.config.schema import EvaluationConfig
from umbrella_jax.data.inputs import changed_inputs, load_stored_inputs
from umbrella_jax.errors import ConfigError, Faults
from umbrella_jax.report.compare_runs import Run, find_runs
from umbrella_jax.rundir import INPUTS, Step, choose_step, load_run_config, predictions_by_step
from umbrella_jax.scoring.metrics import read_predictions

_MAY_DIFFER = (
    *("data.threads", "data.cache", "data.image_root", "data.allow_outside_root", "data.allow_overlap"),
    *("mesh", "model.remat", "model.attention", "train.save_steps", "train.keep_latest"),
    *("train.tensorboard", "train.wandb"),
)
"""Settings, sections or fields, that change neither answers by more than rounding nor which step is scored."""


@dataclass(frozen=True)
class SeedPredictions:
    """The predictions of several seeds."""

    rows: Mapping[int, Sequence[dict[str, Any]]]
    files: Mapping[int, Path]
    reasons: Mapping[int, str]
    """Why each seed's step was chosen, in words."""
    evaluation: EvaluationConfig
    """How the runs score."""


def read_seeds(runs: Mapping[int, Path], asked: Step | None) -> SeedPredictions:
    """Read the predictions of each seed's run.

    Args:
        runs: {seed: directory of its run}, as from `seed_runs`; at least one.
        asked: the step to read, chosen in each run by `choose_step`.

    Raises:
        ConfigError: a run is not finished, unless `asked` is a number; it has no such step or no predictions; runs
            differ in their settings or in the files that they read.
        DataError: predictions are damaged.
    """
    faults, run_of = Faults(), dict[int, Run]()
    for seed, path in runs.items():
        with faults:
            (run_of[seed],) = find_runs(path)
    faults += [
        f"{run.path}: {run.state}: {run.stop_reason or f'step {run.step} of {run.steps}'}; finish it (--resume)"
        + ("" if run.state == "damaged" else ", or choose a step that all seeds have (--step N)")
        for run in run_of.values()
        if run.state == "damaged" or (run.state != "finished" and not isinstance(asked, int))
    ]
    faults.raise_as(ConfigError)
    faults += _differences(run_of)
    faults.raise_as(ConfigError)
    files, reasons = dict[int, Path](), dict[int, str]()
    configs = {seed: load_run_config(path) for seed, path in runs.items()}
    for seed, path in runs.items():
        with faults:
            by_step = predictions_by_step(path)
            if not by_step:
                raise ConfigError(f"{path}: no predictions; train with data.eval (--eval-data PATH)")
            step, reasons[seed] = choose_step(path, configs[seed].train, by_step, asked)
            files[seed] = by_step[step]
    faults.raise_as(ConfigError)
    rows = {seed: read_predictions(file) for seed, file in files.items()}
    return SeedPredictions(rows, files, reasons, next(iter(configs.values())).evaluation)


def _differences(run_of: Mapping[int, Run]) -> Iterator[str]:
    """Yield a fault for each setting in which a run differs from the first, and for inputs that differ."""
    first = next(iter(run_of.values()))
    before = load_stored_inputs(first.path / INPUTS, "restore it")
    for seed, run in run_of.items():
        if run.config["seed"] != seed:
            yield f"{run.path}: its seed is {run.config['seed']}; expected {seed}, as its name says"
        for key in dict.fromkeys([*first.config, *run.config]):
            here, there = run.config.get(key), first.config.get(key)
            may_differ = key == "seed" or any(f"{key}.".startswith(f"{name}.") for name in _MAY_DIFFER)
            if here != there and not may_differ:
                yield f"{run.path}: {key}: {here} here, {there} in {first.path}; expected the same"
        if run is not first:
            names = changed_inputs(before, load_stored_inputs(run.path / INPUTS, "restore it"))
            yield from (f"{run.path}: {name}: not the file that {first.path} read" for name in names)
