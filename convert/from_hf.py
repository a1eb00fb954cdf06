"""A Hugging Face checkpoint → parameters; names, shapes and types are checked before any number is read."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from convert.hf_config import CONFIG, file_vocab_size
from convert.rules import EMBED, LM_HEAD, REPLACED, Entry, entries, hub_name, modality_of
from convert.safetensors_io import Tensor, open_checkpoint
from umbrella_jax.config import resolve_modality
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.llava import LlavaConfig, Params
from umbrella_jax.models.patch_embed import PatchEmbed

Put = Callable[[str, np.ndarray], jax.Array]
_FLOATS = ("float32", "float16", "bfloat16")
_EMBEDDINGS = "vision_tower.vision_model.embeddings"


@dataclass(frozen=True)
class Report:
    """What of a checkpoint was not taken over one to one."""

    initialised: tuple[str, ...] = ()
    """Configured modalities that the checkpoint does not have; they start from random weights."""
    replaced: tuple[str, ...] = ()
    """Tensors whose place the volume patch embedding takes."""
    grown: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """{parameter: (rows in the file, rows now)}; new rows are the mean of the old."""

    def lines(self) -> list[str]:
        """One sentence for each, for people."""
        return [
            *(f"{name}: not in the checkpoint, patch embedding newly initialised" for name in self.initialised),
            *(f"{name}: replaced by the volume patch embedding" for name in self.replaced),
            *(f"{path}: grown from {a} to {b} rows, new ones are the mean" for path, (a, b) in self.grown.items()),
        ]


@dataclass(frozen=True)
class Plan:
    """Which tensor fills which parameter."""

    leaves: Mapping[str, list[tuple[Entry, Tensor]]]
    tied_copy: tuple[Tensor, Tensor] | None
    """Embeddings, and a head that the file holds although it is tied to them."""
    report: Report

    def check_tied_copy(self) -> None:
        """Reads both and raises CheckpointError unless they are the same bit for bit."""
        if self.tied_copy is None:
            return
        embed, head = (t.read() for t in self.tied_copy)
        if embed.dtype != head.dtype or embed.shape != head.shape or embed.tobytes() != head.tobytes():
            remedy = f"say tie_word_embeddings false in {CONFIG} (text_config and top level) if the head is its own"
            raise CheckpointError(f"{self.tied_copy[1].file}: {LM_HEAD}: differs from the tied embeddings; {remedy}")


def plan_loading(directory: str | Path, config: LlavaConfig, *, dtype: str = "auto") -> Plan:
    """Matches the headers of a checkpoint with `config`. Raises CheckpointError with every fault; reads no numbers."""
    directory = Path(directory)
    faults: list[str] = []
    found: dict[str, tuple[str, Tensor]] = {}  # hub's name → name in the file, tensor
    for name, tensor in open_checkpoint(directory).items():
        hub = hub_name(name)
        if hub in found:
            faults.append(f"{tensor.file}: {name}: the same tensor as {found[hub][0]}; expected it once, remove one")
        found.setdefault(hub, (name, tensor))

    names: dict[str, str] = {}  # configured modality → its name in the file
    claimed: set[str] = set(REPLACED)
    for stored in sorted({m for hub in found if (m := modality_of(hub))}):
        configured = resolve_modality(stored, config.modalities)
        if configured is None or configured in names:
            why = f"{names[configured]} is {configured} already" if configured else "no configured modality means it"
            faults.append(f"{directory}: modality {stored}: {why}; name it among the configuration's modalities")
            claimed |= {hub for hub in found if modality_of(hub) == stored}
        else:
            names[configured] = stored
    missing_modalities = tuple(m for m in config.modalities if m not in names)

    leaves: dict[str, list[tuple[Entry, Tensor]]] = {}
    grown: dict[str, tuple[int, int]] = {}
    rows = file_vocab_size(directory)
    for entry in entries(config, names):
        if modality_of(entry.path) in missing_modalities:
            continue
        claimed.add(entry.name)
        if entry.name not in found:
            shape = list(entry.file_shape)
            faults.append(f"{directory}: {entry.name}: missing, expected shape {shape}; copy all of the checkpoint")
            continue
        name, tensor = found[entry.name]
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
                which = ", ".join(f"{found[e.name][0]} {t.dtype}" for e, t in sources)
                remedy = "layers are stacked, so give one type to load them in"
                faults.append(f"{directory}: {path}: {len(types)} types ({which}); {remedy}")

    tied_copy = None
    if config.text.tie_word_embeddings and LM_HEAD in found and EMBED in found:
        tied_copy = found[EMBED][1], found[LM_HEAD][1]
        claimed.add(LM_HEAD)
    for hub, (name, tensor) in found.items():
        if hub not in claimed:
            faults.append(f"{tensor.file}: {name}: not a part of the model that {CONFIG} describes; is it of another?")
    if faults:
        raise CheckpointError(faults)
    replaced = tuple(name for hub, (name, _) in found.items() if hub in REPLACED)
    return Plan(leaves, tied_copy, Report(missing_modalities, replaced, grown))


def check_checkpoint(directory: str | Path, config: LlavaConfig, *, dtype: str = "auto") -> Report:
    """What loading would report, from the headers alone. Raises CheckpointError with every fault."""
    return plan_loading(directory, config, dtype=dtype).report


def _device_put(path: str, array: np.ndarray) -> jax.Array:
    return jax.device_put(array)


def load_params(
    directory: str | Path, config: LlavaConfig, *, dtype: str = "auto", seed: int = 0, put: Put = _device_put
) -> tuple[Params, Report]:
    """Every parameter of the model that `config` describes, and what was not taken over one to one.

    `dtype` is the type of all that is read, `auto` the file's own; what is newly initialised, from `seed` and the
    modality's name, is float32. `put` receives each path and its whole array, and places it. Raises CheckpointError
    with every fault before any parameter is made.
    """
    plan = plan_loading(directory, config, dtype=dtype)
    plan.check_tied_copy()
    params: Params = {}
    for path, sources in plan.leaves.items():
        params[path] = put(path, _fill(sources, plan.report.grown.get(path), dtype))
    for name in plan.report.initialised:
        params |= {path: put(path, array) for path, array in _initial(name, config, seed).items()}
    return params, plan.report


def _fill(sources: list[tuple[Entry, Tensor]], grown: tuple[int, int] | None, dtype: str) -> np.ndarray:
    """One parameter, its layers read one after the other."""
    entry, tensor = sources[0]
    target = np.dtype(tensor.dtype if dtype == "auto" else dtype)
    if entry.layer is not None:
        stacked = np.empty((len(sources), *entry.shape), target)
        for entry, tensor in sources:
            stacked[entry.layer] = entry.to_jax(tensor.read())
        return stacked
    array = tensor.read()
    if grown is None:
        return entry.to_jax(array).astype(target, copy=False)
    # summed in float64: 150,000 rows one after the other lose digits in float32
    mean = array.mean(0, dtype=np.float64).astype(np.float32)
    return np.concatenate([array.astype(target, copy=False), np.tile(mean.astype(target), (grown[1] - grown[0], 1))])


def _initial(name: str, config: LlavaConfig, seed: int) -> dict[str, np.ndarray]:
    """A modality's patch embedding as PatchEmbed starts it; the key is its own, so other modalities change nothing."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    module = PatchEmbed({name: config.modalities[name]}, config.vision.hidden_size, rngs=nnx.Rngs(params=key))
    state = flatten_dict(nnx.to_pure_dict(nnx.state(module, nnx.Param)), sep=".")
    return {f"{_EMBEDDINGS}.{path}": np.asarray(value) for path, value in state.items()}
