"""Make the float32 array that the model takes from a scan: orientation, size, windows of a run, scaling.

    load_volume      all steps for one volume or window, and a check of the file to its end
      open_volume    open the file (`umbrella_jax.data.voxels.open_voxels`) and check that it fits the modality
      preprocess     read and orient its voxels, find the background, resample or pad and crop, scale

`check_volume` and `check_volumes` do the same for all windows and files before a run. `restore` goes the other way: it
brings a map over the preprocessed volume back to the voxels of the file.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from umbrella_jax.config.schema import AS_STORED, ModalityConfig
from umbrella_jax.console import plural
from umbrella_jax.data.background import Background, Note, find_background, ignore, unknown_background
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.confounds import DenoisedRun, confounds_files, confounds_table, require_nilearn
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.reframe import ReframedRun, resample_run
from umbrella_jax.data.repetition_time import read_repetition_time, repetition_time_files
from umbrella_jax.data.threads import map_in_threads
from umbrella_jax.data.voxels import Voxels, open_voxels
from umbrella_jax.errors import DataError

MAX_AXIS = 8192
"""Voxels along a spatial axis, four times those of the finest scans. Resampling needs a matrix of weights per axis."""
_NARROW = 1e-4
"""Spread, as a fraction of the mean, below which float32 rounds z-scores noticeably."""
_SMALL = 1e-16
"""Standard deviation below which squares in float32 lose digits or become 0."""
_READ_BYTES, _MADE_BYTES = 32, 16
"""Memory per voxel that is read, and per voxel that is made: voxels as stored and decompressed, scaled in float64, the
float32 copies and the masks that are in memory at a time."""
PREPROCESSING_VERSION = 1
"""Increase it when the same file and configuration give other numbers: existing cache entries are then stale."""


def load_volume(path: str | Path, config: ModalityConfig, window: int = 0, *, note: Note = ignore) -> np.ndarray:
    """Read one volume, or one window of a run, as the model takes it, and check the file to its end.

    3D: orient, bring to `config.size` by `config.mode`, and scale over the whole result. Mode `resize` applies
    `area_weights` to each axis. Mode `pad` applies `linear_weights`: it resamples to cubic voxels of `config.spacing`
    mm, then pads and crops around the centre. It pads with the file's background before scaling, so the amount of air
    stored around a scan makes no difference, except for a shift of less than a voxel. It crops background only: a file
    that would lose other voxels is rejected.

    4D: remove the signals of `config.confounds` and bring the run to the repetition time `config.tr`, if these are set;
    take the window's frames, orient, scale over the window's brain (the voxels that are not background), then pad
    around the centre with the scaled background, or crop, to `config.size[:3]`. As in the original, the crop may cut
    off brain.

    `config.background` decides which voxels are background (`umbrella_jax.data.background`). An oblique scan is not
    rotated; its axes are assigned to the nearest anatomical ones.

    Args:
        path: file or directory of frames; `umbrella_jax.data.voxels` lists the formats.
        window: index of the window of a run; 0 in 3D.
        note: receives the background if it is unusual.

    Returns:
        float32 array of shape `config.size`, C-contiguous.

    Raises:
        DataError: the file is missing, unreadable, damaged, of another rank, empty or shorter than a window; a voxel is
            not finite; the background is unknown. Also if `config.orientation` needs an orientation, or mode `pad`
            voxel sizes, that the file lacks, and if mode `pad` would crop brain.
    """
    image = open_volume(path, config)
    with checked_to_end(image):
        return preprocess(path, image, config, window, note=note)


@contextmanager
def checked_to_end(image: Voxels) -> Iterator[None]:
    """Check a file to its end after the block has read from it.

    The DataError of a damaged file replaces an error of the block, because wrong voxels can cause any error.
    """
    try:
        yield
    finally:
        image.check_end()


def preprocess(
    path: str | Path, image: Voxels, config: ModalityConfig, window: int = 0, *, note: Note = ignore
) -> np.ndarray:
    """Do what `load_volume` does, without the check to the end, for a file that `open_volume` opened.

    Several windows of a .nii.gz then decompress no frame twice.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked instead
        if len(config.size) == 3:
            volume, background = _preprocess_3d(path, image, config)
        else:
            volume, background = _preprocess_4d(path, image, config, window)
    if background is not None and background.is_unusual:
        note(Path(path), config, window, background)
    if not np.isfinite(volume).all():
        raise DataError(f"{path}: scaling {config.scaling} takes it beyond float32; expected smaller numbers")
    return volume


def axis_codes(image: Voxels, config: ModalityConfig) -> str | None:
    """Return the orientation of the preprocessed array, such as "RAS"; None if it is unknown."""
    if image.affine is None:
        return None
    return "".join(nib.aff2axcodes(image.affine)) if config.orientation == AS_STORED else config.orientation


def count_windows(image: Voxels, config: ModalityConfig) -> int:
    """Return the number of windows of an opened volume, 1 in 3D."""
    return 1 if len(config.size) == 3 else num_windows(image.shape[3], config)


def reading_order(count: int, config: ModalityConfig) -> Iterator[int]:
    """Return windows 0 .. count - 1 in the order that reads fastest.

    Going back in a .nii.gz means decompressing it from the start. So the order makes few passes: the first one takes
    windows that do not overlap, each later pass begins one window later.
    """
    lap = -(-_span(config) // window_stride(config)) if count > 1 else 1
    return (window for first in range(lap) for window in range(first, count, lap))


def num_windows(num_frames: int, config: ModalityConfig) -> int:
    """Return the number of windows of a run, 0 if it is shorter than one window.

    A window is `size[3]` frames, `stride_within_seq` apart; window i starts at frame i · `window_stride(config)`.
    """
    return max((num_frames - _span(config)) // window_stride(config) + 1, 0)


def window_stride(config: ModalityConfig) -> int:
    """Return the frames between two window starts: max(round(stride_between_seq · frames · stride_within_seq), 1)."""
    return max(round(config.stride_between_seq * config.size[3] * config.stride_within_seq), 1)


def reading_memory(image: Voxels, config: ModalityConfig) -> int:
    """Return an upper bound of the memory in bytes that `preprocess` takes for a volume or window of an opened file."""
    voxels = math.prod(map(int, image.shape[:3]))
    if len(config.size) == 4:  # cleaning or resampling a run may read every frame
        voxels *= image.run.shape[3] if isinstance(image, ReframedRun) else _span(config)
    return _READ_BYTES * voxels + _MADE_BYTES * math.prod(config.size)


def restoring_memory(shape: Sequence[int], config: ModalityConfig) -> int:
    """Return an upper bound of the memory in bytes that `restore` takes for a file of this shape."""
    voxels = math.prod(map(int, shape[:3])) * (config.size[3] if len(config.size) == 4 else 1)
    return 4 * math.prod(map(int, shape)) + _MADE_BYTES * (voxels + math.prod(config.size))


def _span(config: ModalityConfig) -> int:
    """Return the number of frames from the first to the last of a window."""
    return (config.size[3] - 1) * config.stride_within_seq + 1


def check_volume(
    path: str | Path,
    config: ModalityConfig,
    on_volume: Callable[[np.ndarray], object] = lambda volume: None,
    *,
    note: Note = ignore,
) -> int:
    """Read a file to its end and preprocess it, with all windows of a run. Return the number of windows.

    Args:
        on_volume: called with each preprocessed volume; may raise.
        note: as in `load_volume`.
    """
    return check_opened(path, open_volume(path, config), config, on_volume, note=note)


def check_opened(
    path: str | Path,
    image: Voxels,
    config: ModalityConfig,
    on_volume: Callable[[np.ndarray], object] = lambda volume: None,
    *,
    note: Note = ignore,
) -> int:
    """Do what `check_volume` does for a file that `open_volume` opened."""
    count = count_windows(image, config)
    with checked_to_end(image):
        for window in reading_order(count, config):
            on_volume(preprocess(path, image, config, window, note=note))
    return count


def check_volumes(
    images: Iterable[Image],
    modalities: Mapping[str, ModalityConfig],
    threads: int,
    check: Callable[[Path, ModalityConfig], int] = check_volume,
) -> dict[Image, int]:
    """Check each distinct image once, in threads, and show the progress on a terminal.

    Args:
        check: checks a file and returns the number of its windows.

    Returns:
        {image: number of its windows}, 1 in 3D, in the order of first appearance.

    Raises:
        DataError: with every fault of every file.
    """

    def count_or_faults(image: Image) -> int | tuple[str, ...]:
        try:
            return check(image.path, modalities[image.modality])
        except DataError as error:
            return error.faults  # the error itself would keep its frames alive, and in them the opened file

    distinct = list(dict.fromkeys(images))
    with one_blas_thread():
        progress = tqdm(map_in_threads(count_or_faults, distinct, threads), "volumes", len(distinct), disable=None)
        results = dict(zip(distinct, progress, strict=True))
    faults = [fault for result in results.values() if isinstance(result, tuple) for fault in result]
    if faults:
        raise DataError(faults)
    return {image: count for image, count in results.items() if isinstance(count, int)}


def open_volume(path: str | Path, config: ModalityConfig, content: bytes | None = None) -> Voxels:
    """Open a file without reading its voxels, and check that the modality can use it, as `fit_voxels` does.

    Args:
        content: as for `open_voxels`.
    """
    return fit_voxels(path, open_voxels(path, content), config)


def companion_files(path: Path, config: ModalityConfig) -> list[Path]:
    """Return the files beside a volume on which its preprocessed voxels depend.

    These are its table of confounds, and the sidecar with its repetition time.

    Raises DataError as `fit_voxels` does.
    """
    confounds = config.confounds
    files = [] if confounds is None else confounds_files(path, confounds)
    return [*files, *repetition_time_files(path)] if _needs_own_tr(config) else files


def _needs_own_tr(config: ModalityConfig) -> bool:
    """Return whether a run's own repetition time matters: to resample its frames, or to filter them."""
    return config.tr is not None or (config.confounds is not None and config.confounds.high_pass is not None)


def fit_voxels(path: str | Path, image: Voxels, config: ModalityConfig) -> Voxels:
    """Return an opened file with its frames as the modality needs them: without confounds, at the repetition time `tr`.

    Raises DataError unless rank, length, orientation, voxel sizes and repetition time are as the modality needs them.
    """
    rank, shape = len(config.size), image.shape
    if 0 in shape or len(shape) < rank or any(n != 1 for n in shape[rank:]):
        raise DataError(f"{path}: shape {shape}; expected {rank} axes, as the modality's size {config.size} has")
    faults = []
    if max(shape[:3]) > MAX_AXIS:
        faults.append(f"{path}: shape {shape}; expected at most {MAX_AXIS} voxels along an axis")
    if config.orientation != AS_STORED and image.affine is None:
        remedy = "use NIfTI with a valid qform or sform, or set orientation: as_stored for the modality"
        faults.append(f"{path}: no orientation: {image.why_no_affine}; {remedy}")
    if config.spacing is not None and image.zooms is None:
        remedy = "use a file with voxel sizes, or set mode: resize for the modality"
        faults.append(f"{path}: no voxel sizes: {image.why_no_zooms}; {remedy}")
    if not faults:
        try:
            image = _reframe(Path(path), image, config)
        except DataError as error:
            faults += error.faults
    if rank == 4 and not num_windows(image.shape[3], config):
        window = f"a window of {config.size[3]}, {config.stride_within_seq} apart"
        resampled = "" if image.shape == shape else f", {image.shape[3]} after scrubbing and resampling"
        faults.append(f"{path}: {plural(shape[3], 'frame')}{resampled}; expected at least {window}")
    if faults:
        raise DataError(faults)
    return image


def _reframe(path: Path, image: Voxels, config: ModalityConfig) -> Voxels:
    """Return a run without its confounds, at the modality's repetition time."""
    confounds = config.confounds
    own_tr = read_repetition_time(path, image) if _needs_own_tr(config) else None
    if confounds is not None:
        require_nilearn("confounds")
        image = DenoisedRun(image, confounds_table(path, confounds), confounds, own_tr)
    return image if config.tr is None or own_tr is None else resample_run(image, own_tr, config.tr)


def _orientation(image: Voxels, config: ModalityConfig) -> np.ndarray:
    """Return the (3, 2) orientation, as nibabel writes one: for each stored axis, its new index and direction."""
    if config.orientation == AS_STORED:
        return nib.io_orientation(np.eye(4))
    return nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(config.orientation)
    )


def _read(path: str | Path, image: Voxels, config: ModalityConfig, frames: slice | int) -> np.ndarray:
    """Read frames, or one frame, in the configured orientation. Raise DataError unless they are finite in float32."""
    data = nib.apply_orientation(image.read(frames), _orientation(image, config))
    limit = np.finfo(np.float32).max
    if data.dtype.kind == "f" and not (data.min() >= -limit and data.max() <= limit):
        bad = data.size - np.count_nonzero(np.abs(data) <= limit)
        which = "1 voxel is" if bad == 1 else f"{bad} voxels are"
        raise DataError(f"{path}: {which} NaN or infinite; expected finite numbers, preprocess the file again")
    return data


@one_blas_thread()
def restore(path: str | Path, values: np.ndarray, config: ModalityConfig, window: int = 0) -> np.ndarray:
    """Bring a map over the preprocessed volume back to the voxels of the file as it is stored.

    This is the transpose of the resampling: a voxel of the preprocessed volume gives each voxel of the file a share,
    by the weight with which it was made from it. Sums are kept, except for values on padding. With `tr`, this is so
    along time too. Frames that the window is not made from get 0.

    Args:
        values: float32 of shape `config.size`.

    Returns:
        float32 of the file's shape.

    Raises:
        DataError: as `load_volume`.
    """
    image = open_volume(path, config)
    rank = len(config.size)
    forward = _orientation(image, config)
    back = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), forward)
    shape = tuple(image.shape[axis] for axis in np.argsort(forward[:, 0]))  # of the oriented array
    if rank == 3:
        restored = nib.apply_orientation(resample(values, [w.T for w in _weights(shape, image, config)]), back)
        return restored.reshape(image.shape)
    inside, outside = zip(*(_centred(n, s) for n, s in zip(shape, config.size[:3], strict=True)), strict=True)
    frames = np.zeros((*shape, config.size[3]), np.float32)
    frames[inside] = values[outside]
    start, step = window * window_stride(config), config.stride_within_seq
    shown, spread = range(start, start + _span(config), step), nib.apply_orientation(frames, back)
    while isinstance(image, ReframedRun):
        shown, spread = image.spread(shown, spread)
        image = image.run
    out = np.zeros(image.shape[:4], np.float32)
    out[..., shown.start : shown.stop : shown.step] = spread
    return out.reshape(image.shape)


def voxel_affine(image: Voxels, config: ModalityConfig) -> np.ndarray | None:
    """Return the affine, (4, 4), from indices of the preprocessed volume to RAS+ mm; None without an orientation.

    For mode `resize` an index is mapped to the middle of the voxels that it would average with equal weights, which is
    exact if the size divides the file's; otherwise to within half a voxel.
    """
    if image.affine is None:
        return None
    orientation = _orientation(image, config)
    stored = np.argsort(orientation[:, 0])  # the stored axis that each axis was
    scales, offsets = np.ones(3), np.zeros(3)
    for axis, (length, size) in enumerate(zip(np.array(image.shape[:3])[stored], config.size, strict=False)):
        length = int(length)
        if len(config.size) == 3 and config.mode == "resize":
            scales[axis], offsets[axis] = length / size, (length / size - 1) / 2
            continue
        resampled, scale = length, 1.0
        if len(config.size) == 3:
            assert config.spacing is not None  # by ModalityConfig
            assert image.zooms is not None  # by open_volume
            zoom = float(image.zooms[stored[axis]])
            resampled, scale = max(round(length * zoom / config.spacing), 1), config.spacing / zoom
        inside, outside = _centred(resampled, size)
        first = inside.start - outside.start - (resampled - 1) / 2  # index 0, measured from the centre
        scales[axis], offsets[axis] = scale, (length - 1) / 2 + first * scale
    oriented = nib.orientations.inv_ornt_aff(orientation, image.shape[:3])
    return image.affine @ oriented @ nib.affines.from_matvec(np.diag(scales), offsets)


def _preprocess_3d(path: str | Path, image: Voxels, config: ModalityConfig) -> tuple[np.ndarray, Background | None]:
    data = _read(path, image, config, 0)
    weights = _weights(data.shape, image, config)
    background = find_background(data, config) if config.mode == "pad" else None
    if config.mode == "pad":
        _check_covered(path, image, data, weights, background, config)
    volume = resample(data, weights)
    if background is not None and background.value != 0:
        inside = tuple(slice(near[0], near[-1] + 1) for near in (np.flatnonzero(w.any(axis=1)) for w in weights))
        padded = np.full_like(volume, background.value)
        padded[inside] = volume[inside]
        volume = padded
    if config.mode == "resize" and (config.background not in ("auto", "nonpositive") or volume.min() < 0):
        background = find_background(data, config)  # only for augmentation and maps; the volume does not depend on it
    mean, std = 0.0, 1.0
    if config.scaling == "znorm":
        mean, std = _moments(volume)
        offset = 0.0
        if config.mode == "resize" and np.ptp(volume) < _NARROW * abs(mean):
            # float32 has few digits left for the differences. Subtracting first does not change z-scores.
            offset = mean
            volume = resample(data - np.float64(offset), weights)
            mean, std = _moments(volume)
        volume -= mean
        volume /= std
        mean += offset
    elif config.scaling == "minmax":
        std = _largest(path, volume, config)
        volume /= std
    return volume, _with_level(background, mean, std)


def _with_level(background: Background | None, mean: float, std: float) -> Background | None:
    """Return the background with its level in a volume that was scaled as (volume - mean) / std."""
    if background is None or background.rule in ("nonpositive", "lowest"):
        return background
    return replace(background, level=float((np.float32(background.value) - np.float32(mean)) / np.float32(std)))


def _preprocess_4d(
    path: str | Path, image: Voxels, config: ModalityConfig, window: int
) -> tuple[np.ndarray, Background | None]:
    if window >= (count := num_windows(image.shape[3], config)):
        raise DataError(f"{path}: no window {window}; it has {count}, did the file change during the run?")
    start, step = window * window_stride(config), config.stride_within_seq
    data = _read(path, image, config, slice(start, start + _span(config), step)).astype(np.float32, copy=False)
    background = find_background(data, config)
    scaled = config.scaling in ("znorm_zeroback", "znorm_minback")
    if background is None and (scaled or any(n < s for n, s in zip(data.shape[:3], config.size[:3], strict=True))):
        raise unknown_background(path, data)
    if background is None or background.rule == "nonpositive":
        maximum = _largest(path, data, config) if background is not None or config.scaling == "minmax" else 0.0
        volume = np.zeros(config.size, np.float32)
    else:
        maximum = _largest(path, data, config) if config.scaling == "minmax" else 0.0
        volume = np.full(config.size, background.value, np.float32)
    inside, outside = zip(*(_centred(n, s) for n, s in zip(data.shape[:3], config.size[:3], strict=True)), strict=True)
    volume[outside] = data[inside]
    if config.scaling == "minmax":
        volume /= maximum
        return volume, _with_level(background, 0.0, maximum)
    if not scaled:
        return volume, _with_level(background, 0.0, 1.0)
    assert background is not None  # checked above
    if background.rule == "nonpositive":
        voxels = data.ravel("K")  # in the order of memory, since a mask of (D, H, W, T) is slow on a strided array
        voxels = voxels[voxels > 0]
    else:
        voxels = data[~background.mask(data)]
        if not voxels.size:
            raise DataError(f"{path}: every voxel has the background's value, {background.value:.6g}; expected a brain")
    mean, std = _moments(voxels)
    mask = background.mask(volume)
    volume -= mean
    volume /= std
    level = (voxels.min() - mean) / std if config.scaling == "znorm_minback" else 0
    volume[mask] = level
    return volume, replace(background, level=float(level))


def area_weights(length: int, size: int) -> np.ndarray:
    """Return weights (size, length), float32, for area resampling of an axis.

    With n = length and o = size, output i is the mean of the inputs floor(i·n/o) .. ceil((i+1)·n/o). Applied to every
    axis, this is adaptive average pooling: PyTorch's `adaptive_avg_pool3d` and MONAI's "area".
    """
    i, j = np.arange(size)[:, None], np.arange(length)
    window = (i * length // size <= j) & (j < -(-(i + 1) * length // size))  # -(-a // b) is the ceiling of a / b
    return (window / window.sum(axis=1, keepdims=True)).astype(np.float32)


def linear_weights(length: int, zoom: float, size: int, spacing: float) -> np.ndarray:
    """Return weights (size, length), float32, from voxels `zoom` mm apart to voxels `spacing` mm apart, in `size`.

    The field of view becomes round(length · zoom / spacing) voxels with the same centre, and `_centred` pads or crops
    these to `size`. Each is the mean of the inputs around it, weighted by a triangle of half-width max(zoom, spacing).
    This interpolates linearly if voxels become smaller, and avoids aliasing if they become larger, as PyTorch's
    `interpolate(mode="linear", antialias=True)` does. Rows of padding are 0.
    """
    resampled = max(round(length * zoom / spacing), 1)
    inside, outside = _centred(resampled, size)
    middles = (np.arange(inside.start, inside.stop) - (resampled - 1) / 2) * spacing
    distance = np.abs(middles[:, None] - (np.arange(length) - (length - 1) / 2) * zoom)
    triangle = np.maximum(1 - distance / max(zoom, spacing), 0)
    weights = np.zeros((size, length), np.float32)
    weights[outside] = triangle / triangle.sum(axis=1, keepdims=True)
    return weights


def resample(volume: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Resample a volume (X, Y, Z) of any real type to float32 (U, V, W), by weights (U, X), (V, Y) and (W, Z).

    The axes are independent, so these are three matrix products. The first is over the slowest axis in memory, a few
    slices at a time, so no float32 copy of the whole volume is made.
    """
    order = sorted(range(3), key=lambda axis: -abs(volume.strides[axis]))
    slow, middle, fast = (weights[axis] for axis in order)
    data = volume.transpose(order)
    if _is_identity(slow):
        reduced = data.astype(np.float32)
    else:
        reduced = np.zeros((len(slow), *data.shape[1:]), np.float32)
        for row, out in zip(slow, reduced, strict=True):
            near = np.flatnonzero(row)
            if len(near):
                some = slice(near[0], near[-1] + 1)
                out[...] = np.tensordot(row[some], data[some].astype(np.float32), 1)
    reduced = reduced if _is_identity(middle) else middle @ reduced
    reduced = reduced if _is_identity(fast) else reduced @ fast.T
    return np.ascontiguousarray(reduced.transpose(np.argsort(order)))


def _is_identity(weights: np.ndarray) -> bool:
    """Return whether weights leave an axis as it is; the product would give the same numbers."""
    length = len(weights)
    return weights.shape == (length, length) and bool((weights.diagonal() == 1).all()) and weights.sum() == length


def _weights(shape: tuple[int, ...], image: Voxels, config: ModalityConfig) -> list[np.ndarray]:
    """Return the weights that bring each axis of the oriented array, of this shape, to `config.size`."""
    if config.mode == "resize":
        return [area_weights(n, out) for n, out in zip(shape, config.size, strict=True)]
    spacing, zooms = config.spacing, image.zooms
    assert spacing is not None  # by ModalityConfig
    assert zooms is not None  # by open_volume
    stored = np.argsort(_orientation(image, config)[:, 0])  # the stored axis that each axis was
    return [linear_weights(*axis, spacing) for axis in zip(shape, zooms[stored], config.size, strict=True)]


def _check_covered(
    path: str | Path,
    image: Voxels,
    data: np.ndarray,
    weights: Sequence[np.ndarray],
    background: Background | None,
    config: ModalityConfig,
) -> None:
    """Raise DataError if the weights leave out voxels that are not background, or need an unknown background."""
    used = [np.flatnonzero(w.any(axis=0)) for w in weights]
    kept = tuple(slice(near[0], near[-1] + 1) for near in used)
    cropped = data[kept].shape != data.shape
    if background is None:
        if cropped or not all(w.any(axis=1).all() for w in weights):
            raise unknown_background(path, data)
        return
    if lost := 0 if not cropped else np.sum(~background.mask(data)) - np.sum(~background.mask(data[kept])):
        field = "×".join(f"{size * config.spacing:g}" for size in config.size if config.spacing)
        usual = background.rule == "nonpositive"
        which = "above 0" if usual else f"other than {background.name}"
        remedy = "or a volume without the rest of the body" + " and with a background of 0" * usual
        assert image.zooms is not None  # by open_volume
        voxels = "×".join(f"{zoom:.4g}" for zoom in image.zooms)
        raise DataError(
            f"{path}: {lost} voxels {which} (of {voxels} mm) lie outside the central {field} mm; expected a larger "
            f"size or spacing of the modality, {remedy}"
        )


def _centred(length: int, size: int) -> tuple[slice, slice]:
    """Return two slices that pad or crop an axis around its centre: those to read from and to write to."""
    cut, pad = max(length - size, 0) // 2, max(size - length, 0) // 2
    common = min(length, size)
    return slice(cut, cut + common), slice(pad, pad + common)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Return mean and population standard deviation; the latter is 1 if only rounding makes the values differ."""
    mean = float(values.mean(dtype=np.float64))
    std = float(values.std(mean=np.float32(mean)))
    if std == math.inf:  # the squares overflowed; NaN makes the result fail its check, division by infinity would not
        return mean, math.nan
    if std > max(_NARROW * abs(mean), _SMALL):
        return mean, std
    std = float(values.std(dtype=np.float64))
    step = float(np.spacing(np.abs(np.array([values.min(), values.max()], np.float32)).max()))
    return mean, std if std > 2 * step else 1.0


def _largest(path: str | Path, data: np.ndarray, config: ModalityConfig) -> float:
    """Return the largest voxel. Raise DataError if it is not above 0."""
    maximum = float(data.max())
    if maximum > 0:
        return maximum
    reason = "no voxel is above 0"
    if data.min() == 0:
        remedy = "expected a brain, preprocess the file again"
    elif config.scaling == "minmax":
        remedy = f"scaling minmax divides by the largest one, which is {maximum:.4g}; choose another scaling"
    else:
        remedy = "background: nonpositive leaves no brain; set it to auto, lowest or a number"
    raise DataError(f"{path}: {reason}; {remedy}")
