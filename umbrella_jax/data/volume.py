"""Volumes to arrays, float32: orientation; resize, or one voxel size and pad; windows; scaling."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from umbrella_jax.config.schema import AS_STORED, ModalityConfig
from umbrella_jax.data.background import Background, Note, find_background, ignore, undecided
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.voxels import Voxels, open_voxels
from umbrella_jax.errors import DataError

MAX_AXIS = 8192
"""Voxels along an axis of space, four times those of the finest scans: resizing one makes a matrix of its weights."""
_NARROW = 1e-4
"""Spread as a fraction of the mean, below which float32 rounds z-scores noticeably."""
_SMALL = 1e-16
"""Standard deviation below which squares in float32 lose digits or become 0."""
PREPROCESSING_VERSION = 1
"""Raise it whenever the same file and the same config become other numbers: cached volumes of before are then stale."""


def load_volume(path: str | Path, config: ModalityConfig, window: int = 0, *, note: Note = ignore) -> np.ndarray:
    """Read one volume, or one window of a run, as the model takes it, and check the file to its end.

    3D: orientation; to `config.size` by `config.mode`; scaling over the whole result. Mode `resize` is `area_weights`
    on each axis. Mode `pad` is `linear_weights`: cubic voxels of `config.spacing` mm, then centred pad and crop. It
    pads with the file's background before the scaling, so a scan means the same however much air was stored around
    it, except for a shift below a voxel. It crops background only: a file that would lose other voxels is refused.

    4D: only the window's frames are read; orientation; scaling over the window's brain (what is not background);
    centred pad with the scaled background, or crop, to `config.size[:3]`. As in the original, the crop cuts off brain.

    What is background, `config.background` says (`umbrella_jax.data.background`). An oblique scan is not rotated: its
    axes are the nearest ones. `umbrella_jax.data.voxels` lists the formats.

    Args:
        note: is given the background if it is not the usual one.

    Returns:
        float32 array of shape `config.size`, C-contiguous.

    Raises:
        DataError: naming the file: missing, unreadable, damaged, of another rank, not finite, empty, shorter than a
            window, without an orientation where `config.orientation` asks for one, without voxel sizes or too large
            where `config.mode` is `pad` in 3D, or with an unknown background.
    """
    image = open_volume(path, config)
    with checked_to_end(image):
        return preprocess(path, image, config, window, note=note)


@contextmanager
def checked_to_end(image: Voxels) -> Iterator[None]:
    """Check a file to its end after what is read of it in the block.

    The DataError of a damaged file replaces any other: voxels that are wrong may look like any fault.
    """
    try:
        yield
    finally:
        image.check_end()


def preprocess(
    path: str | Path, image: Voxels, config: ModalityConfig, window: int = 0, *, note: Note = ignore
) -> np.ndarray:
    """Do what `load_volume` does with a file that `open_volume` opened.

    The windows of a .nii.gz then decompress no frame twice.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # it shows in the result
        if len(config.size) == 3:
            volume, background = _preprocess_3d(path, image, config)
        else:
            volume, background = _preprocess_4d(path, image, config, window)
    if background is not None and background.remarkable:
        note(Path(path), config, window, background)
    if not np.isfinite(volume).all():
        raise DataError(f"{path}: scaling {config.scaling} takes it beyond float32; expected smaller numbers")
    return volume


def axis_codes(image: Voxels, config: ModalityConfig) -> str | None:
    """Return where the axes of the preprocessed array point, such as "RAS"; None if the file does not say."""
    if image.affine is None:
        return None
    return "".join(nib.aff2axcodes(image.affine)) if config.orientation == AS_STORED else config.orientation


def count_windows(image: Voxels, config: ModalityConfig) -> int:
    """Windows of an opened volume, 1 in 3D."""
    return 1 if len(config.size) == 3 else num_windows(image.shape[3], config)


def reading_order(count: int, config: ModalityConfig) -> Iterator[int]:
    """Windows 0 .. count - 1 as they are read fastest. Going back in a .nii.gz starts it anew, so first come every
    lap-th, none of which overlap, then those that begin one window later, and so on."""
    lap = -(-_span(config) // window_stride(config)) if count > 1 else 1
    return (window for first in range(lap) for window in range(first, count, lap))


def num_windows(num_frames: int, config: ModalityConfig) -> int:
    """Windows of a run, 0 where it is shorter than one.

    A window is `size[3]` frames, `stride_within_seq` apart; window i starts at frame i · `window_stride(config)`.
    """
    return max((num_frames - _span(config)) // window_stride(config) + 1, 0)


def window_stride(config: ModalityConfig) -> int:
    """Frames between the starts of two windows: max(round(stride_between_seq · frames · stride_within_seq), 1)."""
    return max(round(config.stride_between_seq * config.size[3] * config.stride_within_seq), 1)


def _span(config: ModalityConfig) -> int:
    """Frames from the first to the last of a window."""
    return (config.size[3] - 1) * config.stride_within_seq + 1


def check_volume(
    path: str | Path,
    config: ModalityConfig,
    look: Callable[[np.ndarray], object] = lambda volume: None,
    *,
    note: Note = ignore,
) -> int:
    """Read and preprocess a file, all windows of a run included, to its end, and keep nothing.

    Returns the number of windows.

    `look` is shown each; what it raises is raised. `note` is as in `load_volume`.
    """
    return check_opened(path, open_volume(path, config), config, look, note=note)


def check_opened(
    path: str | Path,
    image: Voxels,
    config: ModalityConfig,
    look: Callable[[np.ndarray], object] = lambda volume: None,
    *,
    note: Note = ignore,
) -> int:
    """Do what `check_volume` does with a file that `open_volume` opened."""
    count = count_windows(image, config)
    with checked_to_end(image):
        for window in reading_order(count, config):
            look(preprocess(path, image, config, window, note=note))
    return count


def check_volumes(
    images: Iterable[Image],
    modalities: Mapping[str, ModalityConfig],
    threads: int,
    check: Callable[[Path, ModalityConfig], int] = check_volume,
) -> dict[Image, int]:
    """Reads and preprocesses each distinct image once, by `check`, and shows on a terminal how far it is.

    Returns:
        {image: number of its windows}, 1 in 3D, in the order of first appearance.

    Raises:
        DataError: with every fault of every file.
    """

    def windows(image: Image) -> int | tuple[str, ...]:
        try:
            return check(image.path, modalities[image.modality])
        except DataError as error:
            return error.faults  # the error itself would hold its frames, and in them the opened file

    distinct = list(dict.fromkeys(images))
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        progress = tqdm(pool.map(windows, distinct), "volumes", len(distinct), disable=None)
        found = dict(zip(distinct, progress, strict=True))
    faults = [fault for each in found.values() if isinstance(each, tuple) for fault in each]
    if faults:
        raise DataError(faults)
    return {image: count for image, count in found.items() if isinstance(count, int)}


def open_volume(path: str | Path, config: ModalityConfig) -> Voxels:
    """The file, its voxels not yet read; rank, length, orientation and voxel sizes are as the modality wants them."""
    image = open_voxels(path)
    rank, shape = len(config.size), image.shape
    if 0 in shape or len(shape) < rank or any(n != 1 for n in shape[rank:]):
        raise DataError(f"{path}: shape {shape}; expected {rank} axes, as the modality's size {config.size} has")
    faults = []
    if max(shape[:3]) > MAX_AXIS:
        faults.append(f"{path}: shape {shape}; expected at most {MAX_AXIS} voxels along an axis")
    if config.orientation != AS_STORED and image.affine is None:
        remedy = "use NIfTI with a valid qform or sform, or set orientation: as_stored for the modality"
        faults.append(f"{path}: no orientation: {image.unoriented}; {remedy}")
    if config.spacing is not None and image.zooms is None:
        remedy = "use a file with voxel sizes, or set mode: resize for the modality"
        faults.append(f"{path}: no voxel sizes: {image.unsized}; {remedy}")
    if rank == 4 and not num_windows(shape[3], config):
        window = f"a window of {config.size[3]}, {config.stride_within_seq} apart"
        faults.append(f"{path}: {shape[3]} frames; expected at least {window}")
    if faults:
        raise DataError(faults)
    return image


def _orientation(image: Voxels, config: ModalityConfig) -> np.ndarray:
    """Return, as `nibabel.io_orientation`, (3, 2): for each stored axis its place and whether it is reversed."""
    if config.orientation == AS_STORED:
        return nib.io_orientation(np.eye(4))
    return nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(config.orientation)
    )


def _read(path: str | Path, image: Voxels, config: ModalityConfig, frames: slice | int) -> np.ndarray:
    """Voxels of some frames, or of one, in the configured orientation, a view of what was read; finite in float32."""
    data = nib.apply_orientation(image.read(frames), _orientation(image, config))
    limit = np.finfo(np.float32).max
    if data.dtype.kind == "f" and not (data.min() >= -limit and data.max() <= limit):
        bad = data.size - np.count_nonzero(np.abs(data) <= limit)
        which = "1 voxel is" if bad == 1 else f"{bad} voxels are"
        raise DataError(f"{path}: {which} NaN or infinite; expected finite numbers, preprocess the file again")
    return data


@one_blas_thread()
def restore(path: str | Path, values: np.ndarray, config: ModalityConfig, window: int = 0) -> np.ndarray:
    """A map over the preprocessed volume, brought back to the voxels of the file as it is stored.

    Every voxel of the file gets its shares of the voxels that were made of it, as they were weighted (the transpose of
    the resampling), so that sums are kept, but for what fell on padding. Frames outside the window get 0.

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
        made = nib.apply_orientation(resample(values, [w.T for w in _weights(shape, image, config)]), back)
        return made.reshape(image.shape)
    out = np.zeros((*image.shape[:3], image.shape[3]), np.float32)
    inside, outside = zip(*(_centred(n, s) for n, s in zip(shape, config.size[:3], strict=True)), strict=True)
    frames = np.zeros((*shape, config.size[3]), np.float32)
    frames[inside] = values[outside]
    start, step = window * window_stride(config), config.stride_within_seq
    out[..., start : start + _span(config) : step] = nib.apply_orientation(frames, back)
    return out.reshape(image.shape)


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
        background = find_background(data, config)  # for who fills with it later; here it changes nothing
    mean, std = 0.0, 1.0
    if config.scaling == "znorm":
        mean, std = _moments(volume)
        offset = 0.0
        if config.mode == "resize" and np.ptp(volume) < _NARROW * abs(mean):
            # float32 has few digits left for the differences; subtracting first does not change z-scores
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
    """Return the background with its value in a volume from which `mean` was subtracted, and divided by `std`."""
    if background is None or background.rule in ("nonpositive", "lowest"):
        return background
    return replace(background, level=float((np.float32(background.value) - np.float32(mean)) / np.float32(std)))


def _preprocess_4d(
    path: str | Path, image: Voxels, config: ModalityConfig, window: int
) -> tuple[np.ndarray, Background | None]:
    if window >= (count := num_windows(image.shape[3], config)):
        raise DataError(f"{path}: window {window} asked for; it has {count}, did the file change during the run?")
    start, step = window * window_stride(config), config.stride_within_seq
    data = _read(path, image, config, slice(start, start + _span(config), step)).astype(np.float32, copy=False)
    background = find_background(data, config)
    scaled = config.scaling in ("znorm_zeroback", "znorm_minback")
    if background is None and (scaled or any(n < s for n, s in zip(data.shape[:3], config.size[:3], strict=True))):
        raise undecided(path, data)
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
    assert background is not None  # else it was refused
    if background.rule == "nonpositive":
        voxels = data.ravel("K")  # in the order of memory, which a mask of (D, H, W, T) is slow to leave
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
    """(size, length), float32: output i of an axis is the mean of the inputs floor(i·n/o) .. ceil((i+1)·n/o).

    On all axes this is adaptive average pooling, PyTorch's `adaptive_avg_pool3d` and MONAI's "area".
    """
    i, j = np.arange(size)[:, None], np.arange(length)
    window = (i * length // size <= j) & (j < -(-(i + 1) * length // size))  # -(-a // b) is the ceiling of a / b
    return (window / window.sum(axis=1, keepdims=True)).astype(np.float32)


def linear_weights(length: int, zoom: float, size: int, spacing: float) -> np.ndarray:
    """(size, length), float32: an axis of voxels `zoom` mm apart to ones `spacing` mm apart, padded and cropped.

    round(length · zoom / spacing) voxels share the middle of the field of view, and stand centred in `size` as
    `_centred` says. Each is the mean of the inputs around it, weighted by a triangle of half-width
    max(zoom, spacing): linear interpolation to smaller voxels, and to larger ones no aliasing, as PyTorch's
    `interpolate(mode="linear", antialias=True)`. What pads has no weights.
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
    """(X, Y, Z) of any real type to float32 (U, V, W), by weights (U, X), (V, Y) and (W, Z) of its axes.

    The axes are independent of one another, so these are three matrix products. The first is over the axis that is
    slowest in memory, a few slices at a time, so that nothing of the volume's own size is made.
    """
    order = sorted(range(3), key=lambda axis: -abs(volume.strides[axis]))
    slow, middle, fast = (weights[axis] for axis in order)
    data = volume.transpose(order)
    reduced = np.zeros((len(slow), *data.shape[1:]), np.float32)
    for row, out in zip(slow, reduced, strict=True):
        near = np.flatnonzero(row)
        if len(near):
            some = slice(near[0], near[-1] + 1)
            out[...] = np.tensordot(row[some], data[some].astype(np.float32), 1)
    return np.ascontiguousarray((middle @ reduced @ fast.T).transpose(np.argsort(order)))


def _weights(shape: tuple[int, ...], image: Voxels, config: ModalityConfig) -> list[np.ndarray]:
    """By which each axis of the oriented array, of this shape, becomes one of `config.size`."""
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
            raise undecided(path, data)
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
    """Where `length` voxels of an axis are taken from and put to, so that they stand centred in `size`."""
    cut, pad = max(length - size, 0) // 2, max(size - length, 0) // 2
    common = min(length, size)
    return slice(cut, cut + common), slice(pad, pad + common)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Return mean and population standard deviation; 1 for the latter if the values are constant but for rounding."""
    mean = float(values.mean(dtype=np.float64))
    std = float(values.std(mean=np.float32(mean)))
    if std == math.inf:  # its squares were too large; nothing that is divided by it would tell
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
