"""Read the answers that a model is compared with: those of baselines, and its own under controls."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umbrella_jax.errors import ConfigError, DataError, Faults, why_not_a_directory
from umbrella_jax.rundir import controls_of
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


def read_controls(predictions: Sequence[Path]) -> dict[str, list[Rows]]:
    """Return {control: rows of each file} of the controls that all of these predictions files have.

    Raises DataError for damaged answers.
    """
    files = [controls_of(file) for file in predictions]
    names = [name for name in files[0] if all(name in others for others in files)]
    return {name: [read_predictions(own[name]) for own in files] for name in names}
