"""Remove nuisance signals from a run: regression and scrubbing by fMRIPrep's table of confounds, through nilearn.

Regressors and frames to scrub are those of `nilearn.interfaces.fmriprep.load_confounds`, the regression is
`nilearn.signal.clean`. Afterwards each voxel gets back its mean, which regression takes away, so background and scaling
see a brain as before.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_jax.config.schema import ConfoundsConfig, ModalityConfig
from umbrella_jax.console import plural
from umbrella_jax.data.bids.sidecars import (
    CONFOUNDS,
    cells_as_numbers,
    find_confounds,
    read_confounds_table,
    split_name,
)
from umbrella_jax.data.reframe import ReframedRun
from umbrella_jax.data.voxels import Voxels
from umbrella_jax.errors import ConfigError, DataError, is_out_of_memory

_SLAB = 1 << 22
"""Numbers of a run that are cleaned at a time: 32 MiB in float64, of which nilearn makes several copies."""
_SCRUBBING = ("framewise_displacement", "std_dvars")
"""Columns by which nilearn decides which frames to scrub."""
_QUOTED = r"'(\w+)'"
"""A name in the message of a KeyError of pandas."""
_SHORTEST_FILTERED = 19
"""Frames that nilearn's Butterworth filter of order 5 needs: it pads by 18 of a run's own."""


def check_confounds(modalities: Mapping[str, ModalityConfig], cache: str | None) -> None:
    """Raise ConfigError if a modality has confounds, and a run has no cache for the result, or nilearn is missing."""
    named = [
        f"model.modalities.{name}.confounds" for name, config in modalities.items() if config.confounds is not None
    ]
    if named and cache is None:
        raise ConfigError(
            f"{named[0]}: every step would clean whole runs again; name a directory that keeps the result, data.cache "
            "(--cache DIR)"
        )
    if named:
        require_nilearn(named[0])


def require_nilearn(key: str) -> None:
    """Raise ConfigError if nilearn is not installed; `key` needs it."""
    if find_spec("nilearn") is None:
        raise ConfigError(f'{key}: nilearn is not installed; pip install "umbrella-jax[fmri]"')


def confounds_table(path: Path, config: ConfoundsConfig) -> Path:
    """Return the table of confounds of a run.

    Raises DataError if there is none, or the run's name lacks an entity of `pattern`.
    """
    if config.pattern is None:
        table = find_confounds(path)
        if table is None:
            raise DataError(
                f"{path}: no table of confounds; expected *_{CONFOUNDS[0]} beside it, or its place in "
                "confounds.pattern of the modality"
            )
        return table
    named = split_name(path.name)
    values = {"name": path.name.partition(".")[0], **(named[0] if named else {})}
    known = ", ".join(f"{{{name}}}" for name in values)
    try:
        table = path.parent / config.pattern.format_map(values)
    except KeyError as error:
        raise DataError(
            f"{path}: its name has no {error.args[0]}, as in confounds.pattern {config.pattern}; expected some of "
            f"{known}"
        ) from None
    if not table.is_file():
        raise DataError(f"{path}: no table of confounds: {table} not found; expected it, as confounds.pattern says")
    return table


def confounds_files(path: Path, config: ConfoundsConfig) -> list[Path]:
    """Return the table of confounds of a run and, if CompCor needs it, the JSON file with its components."""
    table = confounds_table(path, config)
    described = table.with_suffix(".json")
    return [table, described] if "compcor" in config.strategy and described.is_file() else [table]


def read_confounds(table: Path, config: ConfoundsConfig, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (regressors, float64 [frames, columns]; the frames that scrubbing keeps, int, sorted).

    Raises:
        DataError: the table has another number of rows, lacks columns, or has missing values; or too many frames would
            be scrubbed, or too few are left for the regressors.
    """
    content = read_confounds_table(table)
    rows = max(map(len, content.values()), default=0)
    if rows != frames:
        raise DataError(f"{table}: {rows} rows; expected one for each of the run's {frames} frames")
    names, regressors, kept = list[str](), [np.empty((frames, 0))], np.arange(frames)
    if config.strategy:
        if "scrub" in config.strategy:
            _check_scrubbing(table, content)
        selected, signals, mask = _load_confounds(table, config, content)
        names += selected
        regressors.append(signals)
        kept = kept if mask is None else np.asarray(mask)
    if config.columns:
        own_names = [name for name in content if any(fnmatchcase(name, pattern) for pattern in config.columns)]
        if unused := [pattern for pattern in config.columns if not any(fnmatchcase(name, pattern) for name in content)]:
            raise DataError(f"{table}: no column {', '.join(unused)}; it has {', '.join(content)}")
        own = np.stack([cells_as_numbers(table, name, content[name]) for name in own_names], axis=1)
        own[0] = np.where(np.isnan(own[0]), own[1] if frames > 1 else 0, own[0])  # derivatives begin with n/a
        names += own_names
        regressors.append(own)
    matrix = np.concatenate(regressors, axis=1)
    if frames - len(kept) > config.max_scrubbed * frames:
        raise DataError(
            f"{table}: {frames - len(kept)} of {frames} frames would be scrubbed, more than {config.max_scrubbed:.0%} "
            "(confounds.max_scrubbed); leave the run out, or raise it"
        )
    if matrix.shape[1] + 2 > len(kept):  # a mean and a trend besides
        scrubbed = len(kept) < frames
        raise DataError(
            f"{table}: {plural(matrix.shape[1], 'regressor')} for {plural(len(kept), 'frame')}"
            f"{' that scrubbing keeps' if scrubbed else ''} would leave nothing; "
            + ("leave the run out" if scrubbed else "expected fewer columns or a longer run")
        )
    if not np.isfinite(matrix).all():
        empty = [name for name, column in zip(names, matrix.T, strict=True) if not np.isfinite(column).all()]
        raise DataError(f"{table}: {', '.join(empty)}: missing values after the first frame; expected numbers")
    return matrix, kept


def _check_scrubbing(table: Path, content: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError if a column that decides which frames are scrubbed has no number after the first frame: nilearn
    would keep that frame."""
    for name in _SCRUBBING:
        if name in content and np.isnan(cells_as_numbers(table, name, content[name])[1:]).any():
            raise DataError(f"{table}: {name}: missing values after the first frame; scrub needs numbers")


def _load_confounds(
    table: Path, config: ConfoundsConfig, content: Mapping[str, Sequence[str]]
) -> tuple[list[str], np.ndarray, Any]:
    """Call nilearn's `load_confounds`, which finds a table by the name of its run: give it links with such names.

    Returns (names of the regressors, the regressors, mask of the frames to keep).
    """
    from nilearn.interfaces.fmriprep import load_confounds

    end = next((end for end in CONFOUNDS if table.name.endswith(end)), CONFOUNDS[0])
    options: dict[str, Any] = {
        **{name: getattr(config, name) for name in ("motion", "wm_csf", "global_signal", "compcor", "n_compcor")},
        **{name: getattr(config, name) for name in ("scrub", "fd_threshold", "std_dvars_threshold")},
    }
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"sub-1_task-rest_{end}"
        link.symlink_to(table.resolve())
        if (described := table.with_suffix(".json")).is_file():
            link.with_suffix(".json").symlink_to(described.resolve())
        run = Path(folder) / "sub-1_task-rest_space-MNI_desc-preproc_bold.nii.gz"
        try:
            selected, mask = load_confounds(str(run), strategy=config.strategy, **options)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).replace(folder + "/", "").split())
            if isinstance(error, KeyError):
                missing = str(error.args[0]).partition("dtype")[0]
                reason = f"no column {', '.join(re.findall(_QUOTED, missing)) or missing}"
            else:
                for name, cells in content.items():
                    cells_as_numbers(table, name, cells)  # a text in some column is the likely cause
            raise DataError(f"{table}: nilearn cannot take {', '.join(config.strategy)} from it: {reason}") from None
    return [*map(str, selected.columns)], selected.to_numpy(np.float64), mask


def _check_filter(table: Path, high_pass: float, tr: float, frames: int) -> None:
    """Raise DataError if a run cannot be filtered; nilearn would lower the cutoff and leave almost nothing."""
    if high_pass * 2 * tr >= 1:
        raise DataError(
            f"{table}: a run with a repetition time of {tr:g} s holds frequencies below {1 / (2 * tr):.4g} Hz; "
            f"confounds.high_pass is {high_pass:g} Hz, lower it"
        )
    if frames < _SHORTEST_FILTERED:
        raise DataError(
            f"{table}: its run has {plural(frames, 'frame')}; confounds.high_pass needs {_SHORTEST_FILTERED} or more"
        )


class DenoisedRun(ReframedRun):
    """A run without the signals of its confounds.

    Frames that scrubbing removes do not take part in the regression. They are then filled by linear interpolation
    between the frames around them, so time goes on as before; those at either end are cut off. Each voxel keeps its
    mean over the frames that are kept. A constant voxel stays as it is.
    """

    def __init__(self, run: Voxels, table: Path, config: ConfoundsConfig, tr: float | None):
        """Read the table; voxels are read and cleaned as a whole by the first `read`.

        Args:
            tr: repetition time in seconds, needed for `high_pass`.

        Raises:
            DataError: as `read_confounds`; or the run is too short or too slow for `high_pass`.
        """
        if config.high_pass is not None and tr is not None:
            _check_filter(table, config.high_pass, tr, run.shape[3])
        self._regressors, self._kept = read_confounds(table, config, run.shape[3])
        self._config, self._tr = config, tr
        self._first = int(self._kept[0])
        super().__init__(run, int(self._kept[-1]) - self._first + 1)
        self._cleaned: np.ndarray | None = None

    def weights(self, frames: Sequence[int]) -> tuple[int, np.ndarray]:
        """Return the weights of the interpolation, as `ReframedRun.weights` does; regression counts as none."""
        kept, own = self._kept - self._first, np.asarray(frames)
        after = np.searchsorted(kept, own)  # the first kept frame at or after each
        before = np.where(kept[after] == own, after, after - 1)
        gap = np.maximum(kept[after] - kept[before], 1)
        weights = np.zeros((len(own), self.shape[3]))
        rows = np.arange(len(own))
        np.add.at(weights, (rows, kept[before]), 1 - (own - kept[before]) / gap)
        np.add.at(weights, (rows, kept[after]), (own - kept[before]) / gap)
        return self._first, weights

    def read(self, frames: slice | int) -> np.ndarray:
        """Return cleaned frames: float32."""
        if self._cleaned is None:
            self._cleaned = self._clean()
        return self._cleaned[..., frames]

    def _clean(self) -> np.ndarray:
        """Clean a few slices at a time, so that only the run itself is in memory twice."""
        data = self.run.read(slice(None))
        frames, last = self._kept - self._first, self.shape[3]
        cleaned = np.empty((*data.shape[:3], last), np.float32)
        step = max(_SLAB // max(data[:, :, :1].size, 1), 1)
        for start in range(0, data.shape[2], step):
            slab = data[:, :, start : start + step].astype(np.float64)
            signals = slab.reshape(-1, slab.shape[3]).T  # [frames, voxels]
            out = np.empty((last, signals.shape[1]))
            out[frames] = self._clean_signals(signals)
            holes = np.setdiff1d(np.arange(last), frames)
            if len(holes):
                out[holes] = self.weights(holes.tolist())[1][:, frames] @ out[frames]
            cleaned[:, :, start : start + step] = out.T.reshape(*slab.shape[:3], last)
        return cleaned

    def _clean_signals(self, signals: np.ndarray) -> np.ndarray:
        """Return the cleaned signals at the frames that are kept, [kept, voxels]."""
        from nilearn.signal import clean

        kept = signals[self._kept]
        varying = np.ptp(kept, axis=0) > 0
        cleaned = kept.copy()
        if varying.any():
            without = clean(
                signals[:, varying],
                confounds=self._regressors if self._regressors.shape[1] else None,
                sample_mask=self._kept if len(self._kept) < len(signals) else None,
                detrend=self._config.detrend,
                standardize=None,
                filter="butterworth" if self._config.high_pass is not None else False,
                high_pass=self._config.high_pass,
                t_r=self._tr,
            )
            cleaned[:, varying] = without - without.mean(axis=0) + kept[:, varying].mean(axis=0)
        return cleaned
