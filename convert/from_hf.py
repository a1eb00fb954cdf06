"""Read a Hugging Face checkpoint as parameters; names, shapes and types are checked before any number is read."""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from convert.config_json import CONFIG, UMBRELLA_CONFIG, file_vocab_size, is_tied, stored_modalities
from convert.lazy_tensor import ShardingFor, Tensor, add_product, grow, place, stack_tensors
from convert.patch_embed_init import inflate_patch_embed, resample_patch_embed
from convert.peft_adapter import describe_adapter, open_trained
from convert.rules import EMBED, HEAD, LM_HEAD, REPLACED, TensorMapping, hub_name, map_tensors
from convert.safetensors_files import open_checkpoint, weights_digest
from convert.trainable import Trainable
from umbrella_jax.config.schema import AS_STORED, ModalityConfig, PatchEmbedInit, resolve_modality
from umbrella_jax.errors import CheckpointError
from umbrella_jax.io.files import strict_json
from umbrella_jax.models.llava import LlavaConfig, Params
from umbrella_jax.models.patch_embed import PatchEmbed
from umbrella_jax.models.paths import EMBEDDINGS, adapted_weight, adapter_paths, modality_of

_FLOATS = ("float32", "float16", "bfloat16")
_IMAGE = tuple(EMBEDDINGS + n for n in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight"))
_KEYS = ("proj.weight", "proj.bias", "positional_embeddings")


@dataclass(frozen=True)
class LoadSummary:
    """Differences between the parameters and the tensors in the files."""

    initialised: Mapping[str, str] = field(default_factory=dict)
    """{configured modality: how its patch embedding is initialised} for those not in the checkpoint."""
    untrained: tuple[str, ...] = ()
    """Modalities of `initialised` whose weights were never trained on volumes: random, or inflated from images."""
    lost_modalities: tuple[str, ...] = ()
    """Modalities of `initialised` that umbrella_config.json describes."""
    undescribed: tuple[str, ...] = ()
    """Messages about modalities that have weights and no record of their preprocessing."""
    replaced: tuple[str, ...] = ()
    """Tensors that the volume patch embedding replaces."""
    left_out: tuple[str, ...] = ()
    """Tensors that LLaVA does not use, and that are not part of the parameters."""
    wrapped: str | None = None
    """If wrappers added parts to the names: `NAME IN THE FILE → NAME WITHOUT THEM` of the first tensor."""
    grown: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """{parameter: (rows in the file, rows now)}; each new row is the mean of the old ones."""
    adapter: str | None = None
    """Line about a PEFT adapter that is applied (`describe_adapter`)."""

    def lines(self) -> list[str]:
        """Return one message per difference."""
        replaced = "\n  ".join(["replaced by the 3D/4D patch embedding:", *self.replaced])
        left_out = "\n  ".join(["left out, since LLaVA does not use SigLIP's pooling head:", *self.left_out])
        return [
            *([f"tensor names: parts that wrappers added are removed: {self.wrapped}"] if self.wrapped else []),
            *([self.adapter] if self.adapter else []),
            *(f"{name}: patch embedding {how}" for name, how in self.initialised.items()),
            *self.undescribed,
            *([replaced] if self.replaced else []),
            *([left_out] if self.left_out else []),
            *(f"{path}: {a} rows → {b}, new ones the mean" for path, (a, b) in self.grown.items()),
        ]


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights of a patch embedding that the checkpoint lacks as configured."""

    description: str
    """Description for messages."""
    sources: tuple[Tensor, ...]
    """Tensors that it is made from."""
    make: Callable[[int], dict[str, np.ndarray]]
    """Function from a seed to {parameter's name after `{modality}_`: float32 array}."""
    untrained: bool = False


@dataclass(frozen=True)
class LoadPlan:
    """Plan that names the tensors to read for each parameter."""

    leaves: Mapping[str, list[tuple[TensorMapping, Tensor]]]
    initial_weights: Mapping[str, InitialWeights]
    """{modality: how its patch embedding is initialised} for the modalities in `summary.initialised`."""
    tied_copy: tuple[Tensor, Tensor] | None
    """Embeddings and head, if the file contains a head although it is tied to the embeddings."""
    summary: LoadSummary

    def sources(self) -> list[Tensor]:
        """Return all tensors in files that parameters are made from."""
        return [
            *(tensor for sources in self.leaves.values() for _, tensor in sources),
            *(tensor for weights in self.initial_weights.values() for tensor in weights.sources),
        ]

    def params(self, dtype: str = "auto", seed: int = 0) -> dict[str, Tensor]:
        """Return every parameter unread: those in the checkpoint as `dtype`, newly initialised ones as float32.

        Raises CheckpointError if the checkpoint has a head that differs from the embeddings that it is tied to.
        """
        self._check_tied_copy()
        params = {}
        for path, sources in self.leaves.items():
            if path in self.summary.grown:
                tensor = grow(sources[0][1], self.summary.grown[path][1])
            elif sources[0][0].layer is None:
                tensor = sources[0][1].reshape(sources[0][0].shape)
            else:
                tensor = stack_tensors([tensor.reshape(entry.shape) for entry, tensor in sources])
            params[path] = tensor.astype(dtype)
        for name, weights in self.initial_weights.items():
            params |= {
                f"{EMBEDDINGS}{name}_{key}": Tensor.from_array(array) for key, array in weights.make(seed).items()
            }
        return params

    def _check_tied_copy(self) -> None:
        if self.tied_copy is not None:
            check_tied_copy(*self.tied_copy)


def check_tied_copy(embed: Tensor, head: Tensor) -> None:
    """Raise CheckpointError if a head differs from the embeddings that it is tied to."""
    same = (embed.dtype, embed.shape) == (head.dtype, head.shape)
    if not same or any(a.tobytes() != b.tobytes() for a, b in zip(embed.blocks(), head.blocks(), strict=True)):
        remedy = f"set tie_word_embeddings to false in {CONFIG}, wherever it is true, if the head is its own"
        raise CheckpointError(f"{head.file}: {head.name}: differs from the tied embeddings; {remedy}")


def plan_loading(
    directory: str | Path,
    config: LlavaConfig,
    *,
    dtype: str = "auto",
    init: PatchEmbedInit = "random",
    patch_embed: Path | None = None,
    merge_lora: bool = True,
) -> LoadPlan:
    """Match the headers of a checkpoint with `config`, without reading numbers.

    Args:
        dtype: type to load the parameters in; `auto` keeps the types of the files.
        init: how to initialise a patch embedding that the checkpoint lacks as configured.
        patch_embed: a file of `write_trainable`, or the folder of a PEFT adapter, whose tensors replace those of the
            checkpoint.
        merge_lora: whether to add its products B·A to the weights that they adapt.

    Raises:
        CheckpointError: with every fault.
    """
    directory = Path(directory)
    tensors, wrapped, faults = _open_tensors(directory, patch_embed, merge_lora)
    names: dict[str, str] = {}  # configured modality → its name in the file
    claimed: set[str] = set(REPLACED)
    for stored in sorted({m for hub in tensors if (m := modality_of(hub))}):
        configured = resolve_modality(stored, config.modalities)
        if configured is None or configured in names:
            why = f"{names[configured]} is {configured} already" if configured else "not a configured modality"
            faults.append(f"{directory}: modality {stored}: {why}; name it among the configuration's modalities")
            claimed |= {hub for hub in tensors if modality_of(hub) == stored}
        else:
            names[configured] = stored

    stored_config = _with_stored_modalities(directory, config, init, patch_embed, names)
    unknown = names.keys() - stored_config.modalities.keys()
    faults += [
        f"{directory / UMBRELLA_CONFIG}: modality {names[m]}: missing, so its original size and patch are unknown"
        for m in sorted(unknown)
    ]
    claimed |= {hub for hub in tensors if modality_of(hub) in {names[m] for m in unknown}}
    leaves: dict[str, list[tuple[TensorMapping, Tensor]]] = {}
    grown: dict[str, tuple[int, int]] = {}
    rows = file_vocab_size(directory)
    for entry in map_tensors(stored_config, names):
        modality = modality_of(entry.path)
        if modality is not None and modality not in names:
            continue
        claimed.add(entry.name)
        if entry.name not in tensors:
            shape = list(entry.file_shape)
            remedy = "copy all of the checkpoint"
            if entry.path == LM_HEAD:
                remedy = f"set tie_word_embeddings to true in {CONFIG} if the head is the embeddings"
            faults.append(f"{directory}: {entry.name}: missing, expected shape {shape}; {remedy}")
            continue
        name, tensor = tensors[entry.name]
        expected = entry.file_shape
        if entry.path in (EMBED, LM_HEAD) and rows != expected[0]:
            if rows > expected[0]:
                faults.append(f"{tensor.file}: {name}: {rows} rows cannot shrink to a vocabulary of {expected[0]}")
            grown[entry.path] = rows, expected[0]
            expected = (rows, *expected[1:])
        if tensor.shape != expected:
            shapes = f"expected shape {list(expected)}, found {list(tensor.shape)}"
            faults.append(f"{tensor.file}: {name}: {shapes}; use the {CONFIG} and modalities of these weights")
        if tensor.dtype not in _FLOATS:
            faults.append(f"{tensor.file}: {name}: type {tensor.dtype}, expected one of {', '.join(_FLOATS)}")
        leaves.setdefault(entry.path, []).append((entry, tensor))
    if dtype == "auto":
        for path, sources in leaves.items():
            if len(types := {t.dtype for _, t in sources}) > 1:
                which = ", ".join(f"{tensors[e.name][0]} {t.dtype}" for e, t in sources)
                remedy = "layers are stacked, so name one type to load them in"
                faults.append(f"{directory}: {path}: {len(types)} types ({which}); {remedy}")

    tied_copy = None
    if config.text.tie_word_embeddings and LM_HEAD in tensors and EMBED in tensors:
        tied_copy = tensors[EMBED][1], tensors[LM_HEAD][1]
        claimed.add(LM_HEAD)
    left_out = tuple(name for hub, (name, _) in tensors.items() if hub.startswith(HEAD))
    for hub, (name, tensor) in tensors.items():
        if hub not in claimed and not hub.startswith(HEAD):
            faults.append(f"{tensor.file}: {name}: not a part of the model that {CONFIG} describes; is it of another?")

    initial: dict[str, InitialWeights] = {}
    lost: list[str] = []
    image = {hub: tensors[hub][1] for hub in _IMAGE if hub in tensors}
    for name, new in config.modalities.items():
        if name in unknown:
            continue
        if name in names and stored_config.modalities[name] != new:
            ours = [leaves.pop(f"{EMBEDDINGS}{name}_{key}", [])[:1] for key in _KEYS]
            initial[name] = _resampled([source for one in ours for source in one], stored_config.modalities[name], new)
            if len(stored_config.modalities[name].size) != len(new.size):
                sizes = f"size {_x(stored_config.modalities[name].size)} to {_x(new.size)}"
                faults.append(f"{directory}: modality {name}: {sizes}: expected as many axes; resample cannot add one")
        elif name not in names:
            if resolve_modality(name, stored_modalities(directory)) is not None:
                lost.append(name)
            initial[name] = _inflated(image, new) if init == "inflate" else _random(name, config, lost=name in lost)
    if init == "inflate" and len(initial):
        faults += _image_faults(directory, image, config.vision.hidden_size)
    if init == "resample" and not names:
        faults.append(f"{directory}: model.patch_embed_init resample: the checkpoint has no patch embedding of volumes")
    if faults:
        raise CheckpointError(faults)
    summary = LoadSummary(
        initialised={name: weights.description for name, weights in initial.items()},
        untrained=tuple(name for name, weights in initial.items() if weights.untrained),
        lost_modalities=tuple(lost),
        undescribed=_undescribed(directory, config, patch_embed, [name for name in names if name not in initial]),
        replaced=tuple(name for hub, (name, _) in tensors.items() if hub in REPLACED),
        left_out=left_out,
        wrapped=wrapped,
        grown=grown,
        adapter=describe_adapter(patch_embed, merged=merge_lora) if patch_embed and patch_embed.is_dir() else None,
    )
    return LoadPlan(leaves, initial, tied_copy, summary)


def load_params(
    directory: str | Path,
    config: LlavaConfig,
    *,
    dtype: str = "auto",
    seed: int = 0,
    init: PatchEmbedInit = "random",
    sharding_for: ShardingFor = lambda path, shape: SingleDeviceSharding(jax.devices()[0]),
) -> tuple[Params, LoadSummary]:
    """Read every parameter of the model that `config` describes.

    Args:
        dtype: type of all parameters that are read; `auto` keeps the types of the files.
        seed: seed of newly initialised patch embeddings, with the modality's name; they are float32.
        init: how to initialise a patch embedding that the checkpoint lacks as configured.
        sharding_for: maps a parameter's path and shape to its sharding. Only the parts of the files that this process's
            devices hold are read.

    Raises:
        CheckpointError: with every fault, before any number is read.
    """
    plan = plan_loading(directory, config, dtype=dtype, init=init)
    return place(plan.params(dtype, seed), sharding_for), plan.summary


def fingerprint(directory: str | Path, patch_embed: Path | None = None) -> str:
    """Return the SHA-256, in hex, of a checkpoint's weights, with those of `patch_embed` applied to it.

    It does not depend on the layout of names and shards, nor on whether the file contains a head that is tied to the
    embeddings, or tensors that LLaVA does not use (`LoadSummary.left_out`). Raises CheckpointError if `patch_embed` was
    trained on another checkpoint, as far as it says so.
    """
    tensors = {hub_name(name): tensor for name, tensor in open_checkpoint(directory).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
    if is_tied(directory):
        tensors.pop(LM_HEAD, None)
    own = weights_digest(tensors)
    if patch_embed is None:
        return own
    trained = open_trained(patch_embed)
    if trained.base_fingerprint not in (None, own):
        raise CheckpointError(
            f"{patch_embed}: trained on another base (fingerprint {str(trained.base_fingerprint)[:12]}) than "
            f"{directory} ({own[:12]}); name the one that it was trained on"
        )
    scales = strict_json(sorted(trained.scales.items())) if trained.scales else ""
    return hashlib.sha256((own + weights_digest(trained.tensors) + scales).encode()).hexdigest()


def _open_tensors(
    directory: Path, patch_embed: Path | None, merge_lora: bool
) -> tuple[dict[str, tuple[str, Tensor]], str | None, list[str]]:
    """Open a checkpoint and apply `patch_embed` to it, as in `plan_loading`.

    Returns {name on the hub: (name in the file, tensor)}, an example of a name that wrappers changed, if any
    (`LoadSummary.wrapped`), and faults.
    """
    faults: list[str] = []
    tensors: dict[str, tuple[str, Tensor]] = {}
    wrapped = None
    for name, tensor in open_checkpoint(directory).items():
        if name != tensor.name and wrapped is None:
            wrapped = f"{tensor.name} → {name}"
        hub = hub_name(name)
        if hub in tensors:
            faults.append(f"{tensor.file}: {name}: the same tensor as {tensors[hub][0]}; expected it once, remove one")
        tensors.setdefault(hub, (name, tensor))
    if patch_embed is not None:
        trained = open_trained(patch_embed)
        # all tensors of a modality are replaced, whichever of its names they have
        theirs = {m for name in trained.tensors if (m := modality_of(name))}
        tensors = {h: f for h, f in tensors.items() if not ((m := modality_of(h)) and resolve_modality(m, [*theirs]))}
        tensors |= {name: (name, tensor) for name, tensor in trained.tensors.items() if not adapted_weight(name)}
        if trained.unties and is_tied(directory):
            remedy = "save it with ensure_weight_tying, or with the head in modules_to_save and an untied config.json"
            faults.append(f"{patch_embed}: {EMBED}: replaced, but not the head that is tied to it; {remedy}")
        if merge_lora:
            faults += _add_adapters(tensors, trained)
    return tensors, wrapped, faults


def _add_adapters(tensors: dict[str, tuple[str, Tensor]], trained: Trainable) -> list[str]:
    """Replace each weight W that has an adapter in `trained` by W + s·B·A. Returns faults of the adapters."""
    faults = []
    for weight in dict.fromkeys(w for name in trained.tensors if (w := adapted_weight(name))):
        a, b = (trained.tensors.get(name) for name in adapter_paths(weight))
        shape = tensors[weight][1].shape if weight in tensors else ()
        file = next(iter(trained.tensors.values())).file
        if a is None or b is None:
            faults.append(f"{file}: {weight}: half of its adapter is missing; write the file again")
        elif weight not in tensors:
            faults.append(f"{file}: {weight}: has an adapter, but is not in the base; is it of another base?")
        elif len(shape) != 2 or (b.shape[:1] + a.shape[1:], a.shape[:1]) != (shape, b.shape[1:]):
            shapes = f"{list(a.shape)} and {list(b.shape)} beside {list(shape)}"
            faults.append(f"{file}: {weight}: its adapter has shapes {shapes}; is it of another base?")
        elif {a.dtype, b.dtype} - set(_FLOATS):
            faults.append(f"{file}: {weight}: its adapter has types {a.dtype} and {b.dtype}, expected floats")
        else:
            name, tensor = tensors[weight]
            tensors[weight] = name, add_product(tensor, a, b, trained.scales.get(weight, 1.0))
    return faults


def _undescribed(
    directory: Path, config: LlavaConfig, patch_embed: Path | None, names: Sequence[str]
) -> tuple[str, ...]:
    """Return a message for each modality of `names` whose preprocessing is not recorded; all have weights."""
    stored = stored_modalities(directory, patch_embed)
    lines = []
    for name in names:
        if resolve_modality(name, stored) is not None:
            continue
        modality = config.modalities[name]
        fields = ("orientation", "mode", "spacing", "scaling", "background", "stride_within_seq", "stride_between_seq")
        values = {field: getattr(modality, field) for field in fields[: 7 if len(modality.size) == 4 else 5]}
        taken = ", ".join(f"{field} {value}" for field, value in values.items() if value is not None)
        line = f"{name}: the checkpoint does not say how its volumes were prepared; taken as configured: {taken}"
        if modality.orientation != AS_STORED:
            line += (
                ". The original system and SwiFT-style pipelines read the axes as stored: for weights of theirs set "
                f"model.modalities.{name}.orientation: as_stored, or left and right may be swapped"
            )
        lines.append(line)
    return tuple(lines)


def _with_stored_modalities(
    directory: Path, config: LlavaConfig, init: PatchEmbedInit, patch_embed: Path | None, names: Mapping[str, str]
) -> LlavaConfig:
    """Return `config` with the checkpoint's own sizes and patches, before they are resampled.

    Modalities that the checkpoint does not describe are left out.
    """
    if init != "resample":
        return config
    stored = stored_modalities(directory, patch_embed)
    own = {m: (stored.get(names[m]) if m in names else new) for m, new in config.modalities.items()}
    modalities = {m: modality for m, modality in own.items() if modality is not None}
    return dataclasses.replace(config, modalities=modalities)


def _image_faults(directory: Path, image: Mapping[str, Tensor], width: int) -> list[str]:
    """Return faults of SigLIP's 2D patch embedding: missing tensors, and shapes that cannot be inflated."""
    faults = []
    if missing := ", ".join(hub for hub in _IMAGE if hub not in image):
        faults.append(f"{directory}: model.patch_embed_init inflate: {missing}: missing; start from a stock LLaVA")
    expected = dict(zip(_IMAGE, ("[E, channels, p, p]", "[E]", "[side², E]"), strict=True))
    for hub, tensor in image.items():
        shape = tensor.shape
        fits = {
            _IMAGE[0]: len(shape) == 4 and shape[0] == width and shape[2] == shape[3],
            _IMAGE[1]: shape == (width,),
            _IMAGE[2]: len(shape) == 2 and shape[1] == width and math.isqrt(shape[0]) ** 2 == shape[0],
        }[hub]
        if not fits or tensor.dtype not in _FLOATS:
            found = f"found {tensor.dtype} {list(shape)}"
            faults.append(f"{tensor.file}: {tensor.name}: expected floats {expected[hub]} with E = {width}, {found}")
    return faults


def _random(name: str, config: LlavaConfig, *, lost: bool) -> InitialWeights:
    """Initialise as PatchEmbed does, with a key per modality, so that other modalities do not change the result.

    `lost`: whether the checkpoint's umbrella_config.json describes this patch embedding.
    """

    def make(seed: int) -> dict[str, np.ndarray]:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        module = PatchEmbed({name: config.modalities[name]}, config.vision.hidden_size, rngs=nnx.Rngs(params=key))
        state = flatten_dict(nnx.to_pure_dict(nnx.state(module, nnx.Param)), sep=".")
        return {path.removeprefix(f"{name}_"): np.asarray(value) for path, value in state.items()}

    how = "not in the checkpoint, newly initialised"
    if lost:
        how += f", although {UMBRELLA_CONFIG} describes it (transformers' own save_pretrained drops it)"
    return InitialWeights(how, (), make, untrained=True)


def _inflated(image: Mapping[str, Tensor], new: ModalityConfig) -> InitialWeights:
    def make(_: int) -> dict[str, np.ndarray]:
        kernel, bias, table = (image[hub].read() for hub in _IMAGE)
        return inflate_patch_embed(kernel, bias, table, new)

    return InitialWeights("inflated from SigLIP's own", tuple(image.values()), make, untrained=True)


def _resampled(ours: list[tuple[TensorMapping, Tensor]], old: ModalityConfig, new: ModalityConfig) -> InitialWeights:
    def make(_: int) -> dict[str, np.ndarray]:
        weight, bias, table = (tensor.reshape(entry.shape).read() for entry, tensor in ours)
        return resample_patch_embed(weight, bias, table, old, new)

    how = f"resampled from size {_x(old.size)}, patch {_x(old.patch)}"
    return InitialWeights(how, tuple(tensor for _, tensor in ours), make)


def _x(numbers: tuple[int, ...]) -> str:
    return "×".join(map(str, numbers))
