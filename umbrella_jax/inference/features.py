"""Features of scans: what the frozen or trained vision tower makes of each, for any other model.

Axes: n scans, M volumes, N patches, E width of the tower or, after the projector, of the language model.
"""

import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, get_args

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from convert.lazy_tensor import place
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.schema import AttentionBackend, ComputeDtype, DataConfig, ModalityConfig
from umbrella_jax.data.cache import VolumeCache
from umbrella_jax.data.confounds import check_confounds
from umbrella_jax.data.conversation import Image, read_with_config
from umbrella_jax.data.loader import prefetch
from umbrella_jax.data.volume import voxel_affine
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import ConfigError, DataError, Faults, RunError
from umbrella_jax.io.files import PRIVATE, check_output, naming
from umbrella_jax.models import LlavaConfig, Params, native_backend
from umbrella_jax.models.paths import PROJECTOR, VISION_TOWER
from umbrella_jax.models.projector import LlavaMultiModalProjector
from umbrella_jax.models.siglip import SiglipVisionModel
from umbrella_jax.rundir import Step, load_run_config

Layer = Literal["tower", "projector"]
"""Features before or after the projector."""


class Tower:
    """The vision tower, and with `layer` projector also the projector: maps volumes to features."""

    def __init__(self, config: LlavaConfig, params: Params, layer: Layer = "tower"):
        """Initialise the tower from the model's parameters whose paths begin with VISION_TOWER or PROJECTOR."""

        def make() -> nnx.List:
            tower = SiglipVisionModel(
                config.vision, config.modalities, config.remat, config.attention, config.layers, rngs=nnx.Rngs(0)
            )
            sizes = config.vision.hidden_size, config.text.hidden_size
            projector = [LlavaMultiModalProjector(*sizes, rngs=nnx.Rngs(0))] if layer == "projector" else []
            return nnx.List([tower, *projector])

        self._graphdef, _ = nnx.split(nnx.eval_shape(make))
        prefixes = [VISION_TOWER, PROJECTOR][: 1 + (layer == "projector")]
        self._params = {
            number: unflatten_dict(
                {path.removeprefix(prefix): leaf for path, leaf in params.items() if path.startswith(prefix)}, sep="."
            )
            for number, prefix in enumerate(prefixes)
        }
        self._dtype = config.compute_dtype

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        layer: Layer = "tower",
        attention: Literal["auto", AttentionBackend] = "auto",
    ) -> "Tower":
        """Read the tower of a checkpoint onto the first device, without the language model."""
        device = jax.devices()[0]
        config = checkpoint.config.with_attention(attention, native_backend(device))
        prefixes = (VISION_TOWER, PROJECTOR) if layer == "projector" else (VISION_TOWER,)
        tensors = {path: tensor for path, tensor in checkpoint.tensors().items() if path.startswith(prefixes)}
        return cls(config, place(tensors, lambda path, shape: jax.sharding.SingleDeviceSharding(device)), layer)

    def __call__(self, name: str, volumes: np.ndarray, *, patches: bool = False) -> np.ndarray:
        """Return the features of volumes [M, *size] of modality `name`, float32 [M, E], or [M, N, E] per patch.

        They are the hidden state of the tower that the projector receives: the output of the layer that config.json
        names (`vision_feature_layer`), before `post_layernorm`; or the projector's output. Without `patches`, the mean
        over patches.
        """
        options = {"graphdef": self._graphdef, "dtype": self._dtype, "name": name, "patches": patches}
        return np.asarray(_features(self._params, volumes, **options))

    def batches(
        self,
        name: str,
        images: Sequence[Image],
        load: Callable[[Image], np.ndarray],
        *,
        batch_size: int = 8,
        threads: int,
        patches: bool = False,
    ) -> Iterator[tuple[Sequence[Image], np.ndarray]]:
        """Yield batches of images of modality `name` in order, each with the features that a call returns.

        Args:
            load: returns the preprocessed volume of an image; called by several `threads`, ahead of the device.
        """
        size = min(batch_size, len(images))

        def make(batch: int) -> tuple[Sequence[Image], np.ndarray]:
            part = images[batch * batch_size : (batch + 1) * batch_size]
            volumes = np.stack([load(image) for image in part])
            # one shape for all batches: the first volumes fill up the last one
            return part, np.resize(volumes, (size, *volumes.shape[1:]))

        for part, volumes in prefetch(make, 0, -(-len(images) // batch_size), threads):
            yield part, self(name, volumes, patches=patches)[: len(part)]


@partial(jax.jit, static_argnames=("graphdef", "dtype", "name", "patches"))
def _features(
    params: Mapping[int, Any], volumes: jax.Array, *, graphdef: nnx.GraphDef, dtype: str, name: str, patches: bool
) -> jax.Array:
    tower, *projector = nnx.merge(graphdef, params)
    x = tower(name, volumes.astype(dtype))
    for projection in projector:
        x = projection(x)
    x = x.astype(jnp.float32)
    return x if patches else x.mean(1)


@dataclass(frozen=True)
class _Scan:
    """A row of the file."""

    image: Image
    subject: str
    split: str


def features(
    model: str | Path,
    out: str | Path,
    data: DataConfig | None = None,
    *,
    modalities: Mapping[str, ModalityConfig] | None = None,
    layer: Layer = "tower",
    patches: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int = 8,
    compute_dtype: ComputeDtype = "float32",
    allow_untrained: bool = False,
    step: Step | None = None,
) -> int:
    """Write the features of every scan that conversations show to a .npz file. Questions and answers are not read.

    The file has one row per distinct scan (file and modality), sorted by modality. Of a 4D run it is the first window,
    as in an evaluation. docs/metrics.md describes the arrays. Only the pooled features are kept in memory; those per
    patch are written as they are computed.

    Args:
        model: a run, an export, a native checkpoint or a Hugging Face directory.
        out: new file.
        data: names the conversations, `train` and `eval`. Default: those of the run.
        modalities: configuration of the patch embedding, for a stock LLaVA.
        layer: before (`tower`) or after the projector.
        patches: also write the features of each patch.
        dtype: type of the features in the file.
        compute_dtype: type of activations.
        allow_untrained: accept untrained patch embeddings.
        step: step of a run; by default the best if it keeps one, else the newest.

    Returns:
        The number of scans.

    Raises:
        ConfigError, CheckpointError, DataError: every fault, before anything is computed.
        RunError: a feature is not finite in `dtype`.
    """
    out = Path(out)
    _check(out, layer, dtype, batch_size)
    checkpoint = Checkpoint.open(model, modalities, compute_dtype=compute_dtype, step=step)
    if not allow_untrained:
        checkpoint = checkpoint.answering()
    if data is None:
        if not checkpoint.runs:
            raise ConfigError(f"{model}: not a run, so nothing names its data; expected conversations (--data PATH)")
        data = load_run_config(checkpoint.runs[-1].path).data
    scans = _scans(data, checkpoint.config.modalities)
    by_modality: dict[str, list[_Scan]] = defaultdict(list)
    for scan in scans:
        by_modality[scan.image.modality].append(scan)
    checkpoint.config.check_trained(by_modality)
    check_confounds({name: checkpoint.config.modalities[name] for name in by_modality}, data.cache)
    sources = VolumeCache.from_config(data)
    sources.check_all((scan.image for scan in scans), checkpoint.config.modalities, data.threads)
    tower, rows, pooled = Tower.load(checkpoint, layer), list[_Scan](), list[np.ndarray]()
    with _new_archive(out) as archive, tqdm(total=len(scans), desc="features", disable=None) as bar:
        for modality, members in sorted(by_modality.items()):
            config = checkpoint.config.modalities[modality]

            def load(image: Image, config: ModalityConfig = config) -> np.ndarray:
                return sources.load(image.path, config)

            images, shape = [scan.image for scan in members], tuple[int, ...]()
            options: dict[str, Any] = {"batch_size": batch_size, "threads": data.threads, "patches": patches}
            with _member(archive, f"patches_{modality}") if patches else _nothing() as write:
                for part, values in tower.batches(modality, images, load, **options):
                    own = values.mean(1) if patches else values
                    for array in (values, own):
                        _check_finite(part, array, dtype)
                    shape = (len(members), *values.shape[1:])
                    write(values.astype(dtype), shape)
                    pooled.append(own.astype(dtype))
                    bar.update(len(part))
            rows += members
            grid = [size // patch for size, patch in zip(config.size, config.patch, strict=True)]
            _add(archive, f"grid_{modality}", np.array(grid))
        _add(archive, "features", np.concatenate(pooled))
        _add(archive, "subject", np.array([scan.subject for scan in rows], str))
        _add(archive, "scan", np.array([str(scan.image.path) for scan in rows], str))
        _add(archive, "modality", np.array([scan.image.modality for scan in rows], str))
        _add(archive, "split", np.array([scan.split for scan in rows], str))
        _add(archive, "affine", np.stack([_patch_affine(scan.image, checkpoint.config.modalities) for scan in rows]))
    return len(rows)


def _check(out: Path, layer: str, dtype: str, batch_size: int) -> None:
    """Raise ConfigError with every fault of the arguments."""
    faults = [
        f"{name}: expected one of {', '.join(known)}, got {value!r}"
        for name, value, known in (("layer", layer, get_args(Layer)), ("dtype", dtype, ("float32", "float16")))
        if value not in known
    ]
    if batch_size < 1:
        faults.append(f"batch_size: expected 1 or more, got {batch_size}")
    if out.suffix != ".npz":
        faults.append(f"{out}: expected a name that ends in .npz")
    if out.exists():
        faults.append(f"{out}: already exists; choose another name, or remove it")
    if faults:
        raise ConfigError(faults)
    check_output(out, "choose another file (--out FILE)", folder=False)


def _scans(data: DataConfig, modalities: Mapping[str, ModalityConfig]) -> list[_Scan]:
    """Return the distinct scans of all conversations, by first appearance; those of train first."""
    scans, faults = dict[Image, _Scan](), Faults()
    for split in ("train", "eval"):
        if (path := getattr(data, split)) is None:
            continue
        with faults:
            for conversation in read_with_config(path, modalities, data):
                for image, subject in zip(conversation.images, conversation.image_subjects, strict=True):
                    if image not in scans or not scans[image].subject:
                        before = scans.get(image)
                        scans[image] = _Scan(image, subject or "", before.split if before else split)
    faults.raise_as(DataError)
    if not scans:
        raise DataError("no conversation shows a scan; expected at least one")
    return list(scans.values())


def _patch_affine(image: Image, modalities: Mapping[str, ModalityConfig]) -> np.ndarray:
    """Return the affine, (4, 4), from a patch's place in the grid to its centre in mm; NaN if it is unknown."""
    config = modalities[image.modality]
    voxels = voxel_affine(open_voxels(image.path), config)
    if voxels is None:
        return np.full((4, 4), np.nan)
    patch = np.array(config.patch[:3], np.float64)
    return voxels @ nib.affines.from_matvec(np.diag(patch), (patch - 1) / 2)


def _check_finite(images: Sequence[Image], values: np.ndarray, dtype: str) -> None:
    limit = np.finfo(dtype).max
    for image, row in zip(images, values, strict=True):
        if not (np.abs(row) <= limit).all():
            raise RunError(f"{image.path}: a feature is not finite in {dtype}; expected float32, or sound weights")


@contextmanager
def _new_archive(out: Path) -> Iterator[zipfile.ZipFile]:
    """Write an archive atomically, readable only by its owner."""
    aside = out.with_name(f".{out.name}.part")
    try:
        with naming(out):
            aside.unlink(missing_ok=True)
            aside.touch(PRIVATE)
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                yield archive
            aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


Write = Callable[[np.ndarray, tuple[int, ...]], None]
"""Writes the next rows of an array whose final shape is given."""


@contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[Write]:
    """Write one array of an archive in parts along its first axis, each C-contiguous."""
    file: IO[bytes]
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        begun = False

        def write(part: np.ndarray, shape: tuple[int, ...]) -> None:
            nonlocal begun
            if not begun:
                begun = True
                described = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, described)
            file.write(np.ascontiguousarray(part).tobytes())

        yield write


@contextmanager
def _nothing() -> Iterator[Write]:
    yield lambda part, shape: None


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with _member(archive, name) as write:
        write(array, array.shape)
