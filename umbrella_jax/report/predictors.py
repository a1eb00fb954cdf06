"""Read the answers that a model is compared with: those of baselines, and its own under controls."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umbrella_jax.console import plural
from umbrella_jax.errors import ConfigError, DataError, Faults, why_not_a_directory
from umbrella_jax.rundir import CONTROL_NAMES, controls_of
from umbrella_jax.scoring.metrics import pool_predictions, read_predictions

Rows = list[dict[str, Any]]
_PLACES = ("baseline/*.jsonl", "*.jsonl", "*/baseline/*.jsonl")
"""Where a folder has answers of baselines; the first pattern that matches counts."""


def read_baselines(folder: str | Path) -> dict[str, Rows]:
    """Read the answers of each baseline.

    Args:
        folder: the output directory of `umbrella-jax baseline`, another directory with a NAME.jsonl per baseline, or a
            directory with an output directory per fold, whose answers are pooled.

    Raises:
        ConfigError: there are no answers.
        DataError: answers are damaged, or a conversation is in two folds.
    """
    folder = Path(folder)
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in _PLACES)), [])
    if not files:
        problem = "no .jsonl in it" if folder.is_dir() else why_not_a_directory(folder)
        raise ConfigError(f"--baseline {folder}: {problem}; expected the --out of umbrella-jax baseline")
    by_name = defaultdict[str, list[Path]](list)
    for file in files:
        by_name[file.stem].append(file)
    faults, baselines = Faults(), dict[str, Rows]()
    for name, own in by_name.items():
        with faults:
            baselines[name] = read_predictions(own[0]) if len(own) == 1 else pool_predictions(own)
    faults.raise_as(DataError)
    return baselines


def own_baselines(run: str | Path) -> str | None:
    """Return `run` if `umbrella-jax baseline RUN` has written answers into it, otherwise None."""
    return str(run) if any(Path(run).glob(_PLACES[0])) else None


def read_controls(predictions: Sequence[Path], asked: Sequence[str] | None = None) -> dict[str, list[Rows]]:
    """Return {control: rows of each file} of controls that all of these predictions files have.

    Args:
        asked: names of the controls to read. Default: all.

    Raises:
        ConfigError: a file has no answers under an asked control.
        DataError: answers are damaged.
    """
    files = {file: controls_of(file) for file in predictions}
    if faults := [
        f"--control {name}: {file} has no answers under this control; predict again with --control {name}"
        for name in asked or ()
        for file, own in files.items()
        if name not in own
    ]:
        raise ConfigError(faults)
    names = [
        name
        for name in CONTROL_NAMES
        if (asked is None or name in asked) and all(name in own for own in files.values())
    ]
    return {name: [read_predictions(own[name]) for own in files.values()] for name in names}


def lacking_controls(predictions: Sequence[Path], asked: Sequence[str] | None = None) -> list[str]:
    """Return a line per control that some of these predictions files have, and others lack; none for those `asked`."""
    files = {file: controls_of(file) for file in predictions}
    lines = list[str]()
    for name in CONTROL_NAMES if asked is None else ():
        lacking = [file for file, own in files.items() if name not in own]
        if 0 < len(lacking) < len(files):
            others = f" and {plural(len(lacking) - 1, 'other file')}" if len(lacking) > 1 else ""
            missing = f"no such answers of {lacking[0]}{others}"
            lines.append(f"{name}: left out: {missing}; predict again with --control {name}")
    return lines
