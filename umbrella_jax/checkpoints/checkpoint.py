"""Weights on disk, of every kind."""

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert.checksum import KEY, check_folder, recorded
from convert.config_json import CONFIG as HF_CONFIG
from convert.config_json import (
    RANDOM_WEIGHTS,
    UMBRELLA_CONFIG,
    changed_files,
    read_config,
    read_json,
    stored_first_steps,
    stored_template,
    stored_untrained,
    unused_dropout,
)
from convert.from_hf import Plan, fingerprint, plan_loading
from convert.lazy_tensor import Index, Tensor, Where, add_product, check_finite, copy, place
from convert.rules import modality_of
from convert.safetensors_files import digest
from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import (
    LoraConfig,
    ModalityConfig,
    PatchEmbedInit,
    RematPolicy,
    Template,
    resolve_modality,
)
from umbrella_jax.data.tokenize import load_tokenizer
from umbrella_jax.errors import CheckpointError, ConfigError, no_directory
from umbrella_jax.models import LlavaConfig, Params, abstract_params
from umbrella_jax.models.paths import adapted_weight, adapters
from umbrella_jax.rundir import CHECKPOINTS, CONFIG, MODEL, NEWEST, Step, choose_step
from umbrella_jax.training import freeze
from umbrella_jax.training.checkpoint import Checkpoints, load_params, param_shapes
from umbrella_jax.training.diagnose import nonfinite_params

_log = logging.getLogger(__name__)
PARAMS = "params"
"""Of a native checkpoint: the orbax directory beside config.json."""


def fetch(base: str, *, weights: bool = True) -> Path:
    """A local directory: `base` itself, or what the hub holds under that name, downloaded once and kept."""
    if Path(base).is_dir():
        return Path(base)
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{base}: {no_directory(base)}; expected a directory in Hugging Face format, a native checkpoint or a run"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.jinja", "*.txt", *["*.safetensors"] * weights]
        found = Path(snapshot_download(base, allow_patterns=wanted))
        if weights and not any(found.glob("*.safetensors")):  # an older model, in PyTorch's own format
            found = Path(snapshot_download(base, allow_patterns=[*wanted, "pytorch_model*.bin"]))
        return found
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{base}: no such directory, and the hub does not give it: {reason}") from None


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk and what belongs to them; opening one reads configuration and tokenizer alone.

    A *run* names its base and holds what was trained on top of it; a *native* checkpoint is what `convert from-hf`
    wrote; everything else is a Hugging Face directory, stock LLaVA or with the patch embedding.
    """

    name: str
    """What people call it: its name on the hub, or its folder's."""
    path: Path
    kind: Literal["hf", "native", "run"]
    description: Path
    """Where config.json and the tokenizer are."""
    config: LlavaConfig
    notes: tuple[str, ...]
    """What was added to the vocabulary, for people."""
    init: PatchEmbedInit = "random"
    """Of a Hugging Face directory: where a patch embedding comes from that it does not have as configured."""
    patch_embed: Path | None = None
    """Of a Hugging Face directory: a file of `convert to-hf --trainable-only`, put onto it."""
    seed: int = 0
    """Of a Hugging Face directory: of a patch embedding that starts at random."""
    step: int | None = None
    """Of a run: which of its checkpoints, None before the first."""
    why: str = ""
    """Of a run: why that step, for people."""
    base: "Checkpoint | None" = None
    """Of a run: the weights that it trained on top of, which may be another run's."""
    lora: LoraConfig | None = None
    """Of a run: its adapters, which lie beside the weights where `config` has them too, else are merged into them."""
    groups: tuple[str, ...] = ()
    """The groups that a run trains (`train.groups`)."""
    template: Template | None = None
    """How the text was written that it was trained on; None where nobody says, as of a stock LLaVA."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        modalities: Mapping[str, ModalityConfig] | None = None,
        *,
        compute_dtype: str = "float32",
        remat: RematPolicy = "none",
        init: PatchEmbedInit = "random",
        patch_embed: str | Path | None = None,
        seed: int = 0,
        weights: bool = True,
        step: Step | None = None,
    ) -> "Checkpoint":
        """Find out what `path` holds: a directory, a run's `checkpoints/STEP`, or a name on the hub.

        Args:
            modalities: of the patch embedding; needed for a stock LLaVA, read from the checkpoint otherwise.
            init: as `model.patch_embed_init` of the configuration.
            patch_embed: a file of `convert to-hf --trainable-only`, to be put onto a Hugging Face directory.
            seed: of a patch embedding that starts at random; a run has its own.
            weights: download them too, where `path` is a name on the hub.
            step: of a run; by default its best checkpoint if it keeps one (`train.keep_best`), else its newest.

        Raises:
            CheckpointError, ConfigError, DataError: naming what is missing, unsupported or contradictory.
        """
        found = fetch(str(path), weights=weights)
        name = found.resolve().name if Path(path).is_dir() else str(path)
        overlay = None if patch_embed is None else Path(patch_embed)
        options: dict[str, Any] = {"compute_dtype": compute_dtype, "remat": remat}
        named = int(found.name) if found.name.isdecimal() and found.parent.name == CHECKPOINTS else None
        run = found.parent.parent if named is not None else found
        is_run = (run / MODEL).is_dir() and (run / CONFIG).is_file()
        kind: Literal["hf", "native", "run"] = "run" if is_run else "native" if (found / PARAMS).is_dir() else "hf"
        if kind == "hf" and (run / CHECKPOINTS).is_dir():
            absent = " and ".join(name for name in (MODEL, CONFIG) if not (run / name).exists())
            raise CheckpointError(
                f"{run}: a run without {absent}: cut off while it began; train it again with --resume"
            )
        if step is not None and (kind != "run" or named is not None):
            what = "names a step itself" if kind == "run" else "is not a run"
            raise ConfigError(f"--step {step}: {path} {what}; leave --step out, or name the run")
        if kind != "hf" and overlay is not None:
            raise CheckpointError(f"{path}: {overlay} goes onto the Hugging Face directory that it was trained on")
        if kind == "run":
            config = read_config(run / MODEL, modalities, **options)
            settings = load_config(run / CONFIG, {"model.remat": "full"})  # not asked; older runs may say `dots`
            assert settings.model.base is not None  # a run does not start without
            # what it did not train is as it was when it began
            options |= {"init": settings.model.patch_embed_init, "seed": settings.seed, "weights": weights}
            base = replace(cls.open(settings.model.base, config.modalities, **options), config=config)
            template, lora = stored_template(run / MODEL), settings.model.lora
            own = replace(config, lora=lora)
            trained: dict[str, Any] = {"lora": lora, "groups": tuple(settings.train.groups), "template": template}
            at, why = named, ""
            # not asked of orbax, for which all processes meet, also those that have found a fault before
            steps = [int(p.name) for p in (run / CHECKPOINTS).glob("*") if p.name.isdecimal()] if named is None else []
            if steps:
                at, why = choose_step(run, settings.train, steps, step)
            return cls(name, run, "run", run / MODEL, own, (), step=at, why=why, base=base, **trained)
        config = read_config(found, modalities, init=init, patch_embed=overlay, **options)
        template = stored_template(found, overlay)
        if not has_tokenizer(found):
            return cls(name, found, kind, found, config, (), init, overlay, seed, template=template)
        tokenizer, added = load_tokenizer(found, config.image_token_id)
        notes = [f"{token}: added to the tokenizer" for token in added]
        size = max(tokenizer.get_vocab().values()) + 1
        rows = config.text.vocab_size
        if size > rows:
            notes.append(f"vocabulary: grown from {rows} to {size} rows, the new ones the mean of the others")
            config = replace(config, text=replace(config.text, vocab_size=size))
        config = replace(config, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
        return cls(name, found, kind, found, config, tuple(notes), init, overlay, seed, template=template)

    def merged(self) -> "Checkpoint":
        """The same model without adapters: a run's are added to the weights beside which they lie."""
        return replace(self, config=replace(self.config, lora=None))

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all weights, for who trains on top of them: of a run, of its base's and of what it trained."""
        if self.base is None:
            return self.fingerprint
        trained = {path: Tensor.of(leaf) for path, leaf in self.trained().items()}
        parts = (self.base.identity, digest(trained), self.lora.scale if self.lora else "")
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    @cached_property
    def _native_params(self) -> Path:
        """Of a native checkpoint: where its parameters are. Read and compared with their checksums, the first time."""
        directory, record = self.path / PARAMS, self.path / UMBRELLA_CONFIG
        stated = read_json(record)
        if KEY not in stated:
            raise CheckpointError(f"{record}: no {KEY} of the parameters; convert it again")
        check_folder(directory, recorded(stated[KEY], record), record)
        return directory

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights that came from Hugging Face: a run's base, what a native checkpoint was made from."""
        if self.base is not None:
            return self.base.fingerprint
        if self.kind == "native":
            return _stated(self.path, "base_fingerprint")
        return fingerprint(self.path, self.patch_embed)

    @property
    def base_name(self) -> str:
        """What the weights are called that `fingerprint` is of."""
        if self.kind == "hf":
            return self.name
        return _stated(self.description, "base", "unknown")

    @cached_property
    def untrained(self) -> dict[str, str]:
        """Return {modality: why} for every patch embedding that was never trained on volumes.

        A Hugging Face directory lacks its weights, which are then random or inflated from SigLIP's own; a native
        checkpoint or an export records that; or a run starts from such ones and trains none of them.
        """
        if self.base is not None:
            whole = replace(self.config, lora=self.lora)  # merged or not, the groups may name adapters
            labels = freeze.label_params(list(abstract_params(whole)[1]), self.groups)
            found = self.base.untrained_after([path for path, label in labels.items() if label != freeze.FROZEN])
            first_steps = stored_first_steps(self.description)
            if first_steps is None:  # a run of before
                return found
            for name, start in self.base.untrained.items():
                why = start.partition(", and ")[0]  # without what an earlier run adds
                if name not in first_steps:
                    found[name] = f"{why}, and no conversation of the run shows one"
                elif (self.step or 0) < first_steps[name]:
                    found[name] = f"{why}, and the run shows none before step {first_steps[name]}"
            return found
        stated = stored_untrained(self.path, self.patch_embed)
        untrained = {resolve_modality(m, self.config.modalities) or m: why for m, why in stated.items()}
        if self.kind == "hf":
            report = self._plan("float32").report
            untrained |= {name: report.started[name] for name in report.untrained}
        return untrained

    def warn_doubtful(self) -> None:
        """Log what may be wrong with answers: modalities of a Hugging Face directory without a record of their
        preprocessing, and small files that are not as they were written (`changed_files`)."""
        for line in self._plan("float32").report.undescribed if self.kind == "hf" else ():
            _log.warning("%s: %s", self.path, line)
        for line in changed_files(self.description):
            _log.warning(line)

    def untrained_after(self, trained: Collection[str]) -> dict[str, str]:
        """Return those of `untrained` of which nothing is among the parameters `trained`."""
        own = {modality_of(path) for path in trained}
        return {name: why for name, why in self.untrained.items() if name not in own}

    def answering(self) -> "Checkpoint":
        """Return the same model, which refuses to answer from untrained weights (`LlavaConfig.check_trained`).

        A toy whose config.json says that every weight is random (`RANDOM_WEIGHTS`) answers: nothing in it is trained.

        Raises CheckpointError if no modality is trained.
        """
        is_stock = self.kind == "hf" and not (self.path / UMBRELLA_CONFIG).exists() and self.patch_embed is None
        if is_stock and read_json(self.path / HF_CONFIG).get(RANDOM_WEIGHTS) is True:
            return self
        remedy = "name a checkpoint that was trained on it, or allow untrained weights (--allow-untrained)"
        refusals = {
            name: f"{self.path}: modality {name}: patch embedding {why}; {remedy}"
            for name, why in self.untrained.items()
        }
        config = replace(self.config, untrained=refusals)
        if config.modalities.keys() == config.untrained.keys():
            config.check_trained(config.untrained)
        return replace(self, config=config)

    def tokenizer(self) -> Any:
        """The tokenizer, with `<|im_start|>`, `<|im_end|>` and `<image>`. Raises DataError where there is none."""
        return load_tokenizer(self.description, None)[0]

    def _plan(self, dtype: str) -> Plan:
        return plan_loading(self.path, self.config, dtype=dtype, init=self.init, patch_embed=self.patch_embed)

    def check(self, dtype: str = "auto") -> list[str]:
        """Compares names, shapes and types in the files with the model's; reads no weights.

        Returns what will be initialised, left out or grown, for people. Raises CheckpointError with every fault, and
        for a run that has no checkpoint yet.
        """
        if self.kind == "run" and self.step is None:
            raise CheckpointError(f"{self.path}: the run has no checkpoint yet; train it first")
        if self.kind == "hf":
            return [*unused_dropout(self.path), *self._plan(dtype).report.lines()]
        if self.kind == "native":
            expected = {path: leaf.shape for path, leaf in abstract_params(self.config)[1].items()}
            found = {path: leaf.shape for path, leaf in param_shapes(self.path / PARAMS).items()}
            faults = [
                f"{self.path}: {path}: expected {expected.get(path, 'no such parameter')}, found "
                f"{found.get(path, 'none')}; name the modalities as when it was converted, or convert again"
                for path in sorted(expected.keys() | found.keys())
                if expected.get(path) != found.get(path)
            ]
            if faults:
                raise CheckpointError(faults)
            return unused_dropout(self.path)
        return []

    def tensors(self, dtype: str = "auto") -> dict[str, Tensor]:
        """All parameters, to be read one by one, adapters merged; arguments as of `params`."""
        if self.base is not None:
            trained = {path: Tensor.of(leaf, str(self.path), path) for path, leaf in self.trained().items()}
            return _merge(self.base.tensors(dtype), trained, self.lora, dtype)
        if self.kind == "native":
            return {path: tensor.astype(dtype) for path, tensor in _native_tensors(self._native_params).items()}
        if self.patch_embed is not None:
            _ = self.fingerprint  # which refuses another base
        return self._plan(dtype).params(dtype, self.seed)

    def held(self) -> dict[str, Tensor]:
        """`tensors` without a patch embedding that the checkpoint does not have."""
        started = self._plan("auto").report.started if self.kind == "hf" else {}
        return {path: tensor for path, tensor in self.tensors().items() if modality_of(path) not in started}

    def lost(self) -> tuple[str, ...]:
        """Return the modalities that umbrella_config.json describes and the weights lack."""
        return self._plan("float32").report.lost if self.kind == "hf" else ()

    @property
    def origin(self) -> "Checkpoint":
        """What a run began from, through all runs before it; anything else itself."""
        return self if self.base is None else self.base.origin

    def check_finite(self) -> None:
        """Reads every number. Raises CheckpointError naming each tensor that holds a NaN or an infinity."""
        check_finite(self._plan("float32").sources() if self.kind == "hf" else self.tensors().values())

    def params(self, dtype: str = "auto", *, where: Where | None = None, in_float32: Collection[str] = ()) -> Params:
        """Reads all parameters, adapters among them where `config` has some, each straight onto its devices.

        Args:
            dtype: of every parameter; `auto` keeps the files' types.
            where: a parameter's path and shape → its sharding; default the first device.
            in_float32: paths of those that are float32, whatever `dtype` says.

        Raises:
            CheckpointError: where a number is too large for `dtype`, too.
        """
        where = where or _first_device

        def cast(path: str, leaf: jax.Array) -> jax.Array:
            return _cast(path, leaf, "float32" if path in in_float32 else dtype, self.path)

        if self.base is not None and self.lora == self.config.lora:
            trained = {path: cast(path, leaf) for path, leaf in self.trained(where).items()}
            return self.base.params(dtype, where=where, in_float32=in_float32) | trained
        if self.kind == "native":
            directory = self._native_params
            params = {}
            for path, leaf in param_shapes(directory).items():  # one by one, so that only one is there in two types
                like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(path, leaf.shape))
                params[path] = cast(path, load_params(directory, {path: like})[path])
            return params
        tensors = self.tensors(dtype)
        return place(tensors | {path: tensors[path].astype("float32") for path in in_float32}, where)

    @property
    def step_line(self) -> str:
        """Of a run: which step is used and why, for people."""
        return f"{self.path}: step {self.step}" + (f" ({self.why})" if self.why else "")

    @property
    def chosen(self) -> str | None:
        """`step_line` of a run that is not simply taken at its newest step."""
        return self.step_line if self.why not in ("", NEWEST) else None

    def trained(self, where: Where | None = None) -> Params:
        """Of a run: what it trained, if that was on these weights of the base."""
        assert self.base is not None
        with Checkpoints(self.path / CHECKPOINTS, read_only=True) as checkpoints:
            step = self.step
            if step is None:
                raise CheckpointError(f"{self.path}: the run has no checkpoint yet; train it first")
            try:
                expected = checkpoints.meta(step)["base_fingerprint"]
                trained = checkpoints.restore_trainable(step, where or _first_device)
            except CheckpointError as error:
                older = [str(checkpoints.directory / str(other)) for other in checkpoints.steps() if other < step]
                remedy = f"name an older checkpoint: {', '.join(older)}" if older else "there is no older checkpoint"
                raise CheckpointError([*error.faults, remedy]) from error
            if expected != self.base.identity:
                raise CheckpointError(
                    f"{self.base.path}: not the weights that {self.path} was trained on (fingerprint "
                    f"{self.base.identity[:12]}, expected {expected[:12]}); bring them back, or name where they are as "
                    f"model.base in {self.path / CONFIG}"
                )
            if paths := nonfinite_params(trained):
                folder = checkpoints.directory / str(step)
                raise CheckpointError([f"{folder}: {path}: NaN or infinite; choose another step" for path in paths])
            return trained


def _merge(
    base: Mapping[str, Tensor], trained: Mapping[str, Tensor], lora: LoraConfig | None, dtype: str
) -> dict[str, Tensor]:
    """What was trained in the place of the base's, in `dtype`; its adapters added to the weights beside them."""
    found = dict(base)
    for path, tensor in trained.items():
        weight = adapted_weight(path)
        if weight is None:
            found[path] = tensor.astype(dtype)
        elif path.endswith("lora_A.weight"):
            assert lora is not None
            a, b = adapters(weight)
            found[weight] = add_product(base[weight], trained[a], trained[b], lora.scale)
    return found


def _stated(directory: Path, key: str, default: str | None = None) -> str:
    """What `umbrella_config.json` says."""
    found = read_json(directory / UMBRELLA_CONFIG).get(key, default)
    if not isinstance(found, str):
        raise CheckpointError(f"{directory / UMBRELLA_CONFIG}: {key}: expected a string, got {found!r}; convert again")
    return found


def _first_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _native_tensors(directory: Path) -> dict[str, Tensor]:
    """Parameters that orbax wrote, each read as a whole and kept until another is asked for."""

    @lru_cache(maxsize=1)
    def leaf(path: str) -> np.ndarray:
        like = jax.ShapeDtypeStruct(shapes[path].shape, shapes[path].dtype, sharding=_first_device(path, ()))
        return np.asarray(load_params(directory, {path: like})[path])

    def tensor(path: str, shape: jax.ShapeDtypeStruct) -> Tensor:
        def fill(out: np.ndarray, index: Index) -> None:
            copy(out, leaf(path)[index], str(directory), path)

        return Tensor(shape.shape, np.dtype(shape.dtype).name, fill, str(directory), path)

    shapes = param_shapes(directory)
    return {path: tensor(path, shape) for path, shape in shapes.items()}


def _cast(path: str, leaf: jax.Array, dtype: str, file: Path) -> jax.Array:
    """As `tensor.copy` does, on the devices where it lies."""
    cast = leaf if dtype == "auto" else leaf.astype(dtype)
    if cast.dtype != leaf.dtype and cast.dtype.itemsize == 2 and jnp.isinf(cast).sum() > jnp.isinf(leaf).sum():
        raise CheckpointError(f"{file}: {path}: a number is too large for {dtype}; choose a wider type")
    return cast


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer lies there; a bare checkpoint can be converted and trained on ids of one's own."""
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
