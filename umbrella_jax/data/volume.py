"""Volumes to arrays: orientation, resize or windows, scaling. Every voxel is float32 from the file to the batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from umbrella_jax.config import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.voxels import Voxels, open_voxels, readable
from umbrella_jax.errors import DataError

PREPROCESSING_VERSION = 1
"""Raise it whenever the same file and the same config become other numbers: cached volumes of before are then stale."""


def load_volume(path: str | Path, config: ModalityConfig, window: int = 0) -> np.ndarray:
    """Reads one volume, or one window of a run, as the model takes it.

    3D: orientation, area resize to `config.size`, scaling over the whole volume. 4D: the window's frames alone are
    read; orientation, scaling over the window's brain (voxels above 0), centred pad or crop to `config.size[:3]`.
    Which formats are read, and what a directory of frames is, `umbrella_jax.data.voxels` says.

    Returns:
        float32 array of shape `config.size`, C-contiguous.

    Raises:
        DataError: naming the file: missing, unreadable, of another rank, not finite, empty, shorter than a window,
            without an orientation where `config.orientation` asks for one.
    """
    return preprocess(path, open_volume(path, config), config, window)


def preprocess(path: str | Path, image: Voxels, config: ModalityConfig, window: int = 0) -> np.ndarray:
    """`load_volume` of a file that `open_volume` opened: of a .nii.gz, windows then decompress no frame twice."""
    if len(config.size) == 3:
        return _preprocess_3d(path, image, config)
    return _preprocess_4d(path, image, config, window)


def axes(image: Voxels, config: ModalityConfig) -> str | None:
    """Where the first three axes of the preprocessed array point, such as `RAS`; None where the format does not say."""
    if config.orientation == "RAS":
        return "RAS"
    if image.affine is None or not np.isfinite(image.affine).all():  # as_stored takes any affine
        return None
    codes = nib.aff2axcodes(image.affine)
    return None if None in codes else "".join(codes)


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


def check_volume(path: str | Path, config: ModalityConfig) -> int:
    """Reads and preprocesses a file, all windows of a run included, and keeps none of it. Returns their number."""
    image = open_volume(path, config)
    count = count_windows(image, config)
    for window in reading_order(count, config):
        preprocess(path, image, config, window)
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

    def windows(image: Image) -> int | DataError:
        try:
            return check(image.path, modalities[image.modality])
        except DataError as error:
            return error

    distinct = list(dict.fromkeys(images))
    with ThreadPoolExecutor(threads) as pool:
        progress = tqdm(pool.map(windows, distinct), "volumes", len(distinct), disable=None)
        found = dict(zip(distinct, progress, strict=True))
    faults = [fault for error in found.values() if isinstance(error, DataError) for fault in error.faults]
    if faults:
        raise DataError(faults)
    return {image: count for image, count in found.items() if isinstance(count, int)}


def open_volume(path: str | Path, config: ModalityConfig) -> Voxels:
    """The file, its voxels not yet read; rank, length and orientation are as the modality wants them."""
    image = open_voxels(path)
    rank, shape = len(config.size), image.shape
    if 0 in shape or len(shape) < rank or any(n != 1 for n in shape[rank:]):
        raise DataError(f"{path}: shape {shape}; expected {rank} axes, as the modality's size {config.size} has")
    if config.orientation != "as_stored" and image.affine is None:
        raise DataError(
            f"{path}: its format says nothing of orientation; expected orientation: as_stored of the modality, or NIfTI"
        )
    if rank == 4 and not num_windows(shape[3], config):
        window = f"a window of {config.size[3]}, {config.stride_within_seq} apart"
        raise DataError(f"{path}: {shape[3]} frames; expected at least {window}")
    return image


def _read(path: str | Path, image: Voxels, config: ModalityConfig, frames: slice | int) -> np.ndarray:
    """Voxels of some frames, or of one, as finite float32 in the configured orientation."""
    data = image.read(frames)
    if config.orientation == "RAS":
        with readable(Path(path)):  # an affine may be anything
            data = nib.apply_orientation(data, nib.io_orientation(image.affine))
    if bad := data.size - np.count_nonzero(np.isfinite(data)):
        raise DataError(f"{path}: {bad} voxels are NaN or infinite; expected finite numbers, preprocess the file again")
    return data


def _preprocess_3d(path: str | Path, image: Voxels, config: ModalityConfig) -> np.ndarray:
    volume = area_resize(_read(path, image, config, 0), config.size)
    if config.scaling == "znorm":
        mean, std = _moments(volume)
        volume -= mean
        volume /= std
    elif config.scaling == "minmax":
        volume /= _positive_max(path, volume)
    return volume


def _preprocess_4d(path: str | Path, image: Voxels, config: ModalityConfig, window: int) -> np.ndarray:
    if window >= (count := num_windows(image.shape[3], config)):
        raise DataError(f"{path}: window {window} asked for; it has {count}, did the file change during the run?")
    start, step = window * window_stride(config), config.stride_within_seq
    data = _read(path, image, config, slice(start, start + _span(config), step))
    maximum = _positive_max(path, data)
    inside, outside = zip(*(_centred(n, s) for n, s in zip(data.shape[:3], config.size[:3], strict=True)), strict=True)
    background = np.float32(0)
    if config.scaling in ("znorm_zeroback", "znorm_minback"):
        brain = data > 0
        voxels = data[brain]
        mean, std = _moments(voxels)
        if config.scaling == "znorm_minback":
            background = (voxels.min() - mean) / std
        data = np.where(brain[inside], (data[inside] - mean) / std, background)
    else:
        data = data[inside] / maximum if config.scaling == "minmax" else data[inside]
    volume = np.full(config.size, background, np.float32)
    volume[outside] = data
    return volume


def area_resize(volume: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Adaptive average pooling of float32 (X, Y, Z) to `size`, as PyTorch's `adaptive_avg_pool3d`, MONAI's "area".

    Output i of an axis is the mean of the inputs floor(i·n/o) .. ceil((i+1)·n/o). The axes are independent of one
    another, so this is three small matrix products; each takes the first axis and puts the new one last.
    """
    for n, out in zip(volume.shape, size, strict=True):
        i, j = np.arange(out)[:, None], np.arange(n)
        window = (i * n // out <= j) & (j < -(-(i + 1) * n // out))  # -(-a // b) is the ceiling of a / b
        weights = (window / window.sum(axis=1, keepdims=True)).astype(np.float32)
        volume = np.tensordot(volume, weights, axes=(0, 1))
    return np.ascontiguousarray(volume)


def _centred(length: int, size: int) -> tuple[slice, slice]:
    """Where `length` voxels of an axis are taken from and put to, so that they stand centred in `size`."""
    cut, pad = max(length - size, 0) // 2, max(size - length, 0) // 2
    common = min(length, size)
    return slice(cut, cut + common), slice(pad, pad + common)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation; the latter is 1 where the values are constant but for rounding."""
    mean = float(values.mean(dtype=np.float64))
    std = float(values.std(mean=np.float32(mean)))
    return mean, std if std > 1e-6 * abs(mean) else 1.0


def _positive_max(path: str | Path, data: np.ndarray) -> float:
    maximum = float(data.max())
    if maximum <= 0:
        raise DataError(f"{path}: no voxel is above 0; expected a brain, preprocess the file again")
    return maximum
