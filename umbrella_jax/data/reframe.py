"""Change the frames of an opened run. `ReframedRun` is the interface; `ResampledRun` changes the repetition time.

The frames of a reframed run are weighted sums of the frames of the run below it. `read` computes them, and `spread`
takes a map over them back by the transposed weights.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from umbrella_jax.data.voxels import Voxels

_CROSSINGS = 10
"""Zeros of the sinc on either side of its middle; the filter ends at the last."""
_KAISER = 5.0
"""Shape of the Kaiser window over the sinc."""
_SAME = 1e-5
"""Relative difference up to which two repetition times are equal: a hundredth of a frame in a thousand."""


class ReframedRun(ABC):
    """An opened run with other frames than the run that it reads, which is otherwise the same (`Voxels`)."""

    def __init__(self, run: Voxels, frames: int):
        self.run = run
        self.shape: tuple[int, ...] = (*run.shape[:3], frames, *run.shape[4:])
        self.dtype = np.dtype(np.float32)
        self.affine, self.zooms, self.has_time_unit = run.affine, run.zooms, run.has_time_unit
        self.why_no_affine, self.why_no_zooms = run.why_no_affine, run.why_no_zooms
        self.remarks, self.files, self.files_read = run.remarks, run.files, run.files_read

    @abstractmethod
    def weights(self, frames: Sequence[int]) -> tuple[int, np.ndarray]:
        """Return (first frame of `run`, weights [frames, frames of `run` from there]), float64. Rows sum to 1."""

    @abstractmethod
    def read(self, frames: slice | int) -> np.ndarray:
        """Return frames, as `Voxels.read` does."""

    def check_end(self) -> None:
        """Read the rest, as `Voxels.check_end` does."""
        self.run.check_end()

    def read_tr(self) -> float | None:
        """Return the seconds from frame to frame that the file states, as `Voxels.read_tr` does."""
        return self.run.read_tr()

    def spread(self, frames: Sequence[int], values: np.ndarray) -> tuple[range, np.ndarray]:
        """Take a map over frames back to the frames of `run`: each gives them shares by its weights.

        Args:
            frames: indices of frames of this run.
            values: [D, H, W, frames].

        Returns:
            (frames of `run`, values [D, H, W, those frames]).
        """
        first, weights = self.weights(frames)
        return range(first, first + weights.shape[1]), np.tensordot(values, weights.astype(np.float32), 1)


class ResampledRun(ReframedRun):
    """A run at another repetition time, `tr` seconds instead of `own_tr`.

    Frame j is the signal at j · `tr` after the first frame; there is none after the run's last frame. The filter is the
    one of `scipy.signal.resample_poly`: a sinc that passes frequencies below both Nyquist frequencies, ten zeros on
    either side, under a Kaiser window of shape 5. So the signal between frames is band-limited interpolation, and with
    a longer repetition time, frequencies that it cannot hold are removed before they alias. At its ends, a run
    continues as its own mirror image about its first and last frame, which keeps level and slope. A constant voxel
    stays exactly as it is.
    """

    def __init__(self, run: Voxels, own_tr: float, tr: float):
        self._length = run.shape[3]
        self._ratio = tr / own_tr
        super().__init__(run, math.floor((self._length - 1) / self._ratio + 1e-6) + 1)
        self._held: tuple[int, np.ndarray] | None = None  # the frames of `run` that were read last

    def weights(self, frames: Sequence[int]) -> tuple[int, np.ndarray]:
        """Return the filter's weights, as `ReframedRun.weights` does."""
        times = np.asarray(frames, np.float64) * self._ratio  # in frames of the run
        cutoff = min(1.0, 1 / self._ratio)
        reach = _CROSSINGS / cutoff
        offsets = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
        sources = np.round(times).astype(np.int64)[:, None] + offsets
        distance = (sources - times[:, None]) * cutoff
        inside = np.clip(1 - (distance / _CROSSINGS) ** 2, 0, None)
        filter_ = np.where(inside > 0, np.sinc(distance) * np.i0(_KAISER * np.sqrt(inside)), 0)
        filter_ /= filter_.sum(axis=1, keepdims=True)
        return _folded(sources, filter_, self._length)

    def read(self, frames: slice | int) -> np.ndarray:
        """Return resampled frames: float32."""
        requested = [frames] if isinstance(frames, int) else list(range(self.shape[3]))[frames]
        first, weights = self.weights(requested)
        data = self._read_run(first, first + weights.shape[1])
        level = data[..., :1]  # a constant voxel stays exactly constant if its level is taken off first
        resampled = np.tensordot(data - level, weights.T.astype(np.float32), 1) + level
        return resampled[..., 0] if isinstance(frames, int) else resampled

    def _read_run(self, start: int, stop: int) -> np.ndarray:
        """Read frames of the run. Those that the last call read are not read again: a .nii.gz cannot go back."""
        parts = []
        if self._held is not None and self._held[0] <= start < self._held[0] + self._held[1].shape[3]:
            begin, held = self._held
            parts = [held[..., start - begin : stop - begin]]
        at = start + sum(part.shape[3] for part in parts)
        if at < stop:
            parts.append(self.run.read(slice(at, stop)).astype(np.float32, copy=False))
        data = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        self._held = start, data
        return data


def _folded(sources: np.ndarray, filter_: np.ndarray, length: int) -> tuple[int, np.ndarray]:
    """Return `ReframedRun.weights` for weights of frames that may lie outside the run, mirrored about its ends.

    Args:
        sources: frames, int [frames, taps].
        filter_: their weights, of the same shape.
        length: frames of the run.
    """
    if length == 1:
        return 0, np.ones((len(sources), 1))
    rows = np.arange(len(sources))
    at_end = np.zeros((len(sources), 2))  # weights of the first and of the last frame
    sources, filter_ = sources.copy(), filter_.copy()
    while (before := sources < 0).any() | (after := sources > length - 1).any():
        # x(-i) = 2 x(0) - x(i), and the same about the last frame
        at_end[:, 0] += 2 * np.where(before, filter_, 0).sum(axis=1)
        at_end[:, 1] += 2 * np.where(after, filter_, 0).sum(axis=1)
        filter_ = np.where(before | after, -filter_, filter_)
        sources = np.where(before, -sources, np.where(after, 2 * (length - 1) - sources, sources))
    ends = [0] * bool(at_end[:, 0].any()) + [length - 1] * bool(at_end[:, 1].any())
    used = sources[filter_ != 0]
    low, high = min([used.min(), *ends]), max([used.max(), *ends])
    weights = np.zeros((len(rows), high - low + 1))
    inside = (sources >= low) & (sources <= high)
    np.add.at(weights, (np.broadcast_to(rows[:, None], sources.shape)[inside], sources[inside] - low), filter_[inside])
    if at_end[:, 0].any():
        weights[:, 0 - low] += at_end[:, 0]
    if at_end[:, 1].any():
        weights[:, length - 1 - low] += at_end[:, 1]
    return int(low), weights


def resample_run(run: Voxels, own_tr: float, tr: float) -> Voxels:
    """Return a run at the repetition time `tr`; the run itself if it has that one, so its voxels stay as they are."""
    return run if abs(own_tr - tr) <= _SAME * tr else ResampledRun(run, own_tr, tr)
