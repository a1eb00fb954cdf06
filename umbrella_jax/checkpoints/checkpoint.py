"""Checkpoints of every kind: a Hugging Face directory, a native checkpoint, or a run."""

import hashlib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from convert.checksum import KEY, check_folder, read_checksums
from convert.config_json import CONFIG as HF_CONFIG
from convert.config_json import (
    RANDOM_WEIGHTS,
    UMBRELLA_CONFIG,
    changed_files,
    read_checkpoint_json,
    read_config,
    stored_first_steps,
    stored_template,
    stored_untrained,
    unused_dropout,
)
from convert.from_hf import LoadPlan, fingerprint, plan_loading
from convert.hub import fetch
from convert.lazy_tensor import Index, ShardingFor, Tensor, add_product, check_finite, copy_numbers, place
from convert.peft_adapter import continue_adapters
from convert.rules import map_tensors
from convert.safetensors_files import weights_digest
from umbrella_jax.config.schema import (
    LoraConfig,
    ModalityConfig,
    PatchEmbedInit,
    RematPolicy,
    Template,
    resolve_modality,
)
from umbrella_jax.data.checked import CheckedFiles, describe_stat
from umbrella_jax.data.tokenize import load_tokenizer
from umbrella_jax.distributed import broadcast, process_index, raise_together
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.models import LlavaConfig, Params, abstract_params, quantize
from umbrella_jax.models.paths import adapted_weight, adapter_paths, component_of, is_component, modality_of
from umbrella_jax.rundir import CHECKPOINTS, CONFIG, MODEL, NEWEST, Step, check_one_run, choose_step, load_run_config
from umbrella_jax.training import freeze
from umbrella_jax.training.checkpoint import Checkpoints, param_shapes, restore_params
from umbrella_jax.training.diagnose import nonfinite_params

_log = logging.getLogger(__name__)
PARAMS = "params"
"""Name of the orbax directory beside config.json in a native checkpoint."""
_GROUP_BYTES = 16 << 20
"""Bytes of small parameters that are read from it at once. Each call of orbax takes 15 ms, whatever it reads."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ABC):
    """A model on disk: configuration, tokenizer and weights. `Checkpoint.open` returns one of the three kinds.

    Opening a checkpoint reads its configuration and tokenizer, and no weights.
    """

    kind: ClassVar[str]
    """What it is, for messages."""
    is_derived: ClassVar[bool] = True
    """Whether the weights were made from another checkpoint, which `base_name` and `fingerprint` describe."""
    name: str
    """Name to print: the model's name on the hub, or the name of the directory."""
    path: Path
    config: LlavaConfig
    template: Template | None = None
    """Conversation template of the training data; None if unknown, as for a stock LLaVA."""
    step: int | None = None
    """Step of a run; None before its first checkpoint, and for anything but a run."""
    notes: tuple[str, ...] = ()
    """Messages about what was added to the vocabulary."""

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
        merge_lora: bool = True,
        seed: int = 0,
        weights: bool = True,
        step: Step | None = None,
    ) -> "Checkpoint":
        """Open the checkpoint at `path`: a directory, a run's `checkpoints/STEP`, or a name on the hub (`fetch`).

        Args:
            modalities: configuration of the patch embedding; required for a stock LLaVA, otherwise read from the
                checkpoint.
            init: as `model.patch_embed_init` of the configuration.
            patch_embed: a file of `convert to-hf --trainable-only`, or the folder or name on the hub of a PEFT adapter,
                to apply to a Hugging Face directory.
            merge_lora: whether to merge the adapter into the weights; else `initial_factors` returns it.
            seed: seed of a patch embedding that is initialised at random; ignored for a run, which has its own.
            weights: whether to download the weights, too, if `path` is a name on the hub.
            step: step of a run; by default its best checkpoint if it keeps one (`train.keep_best`), else its newest.

        Raises:
            CheckpointError, ConfigError, DataError: naming what is missing, unsupported or contradictory.
        """
        directory = fetch(str(path), weights=weights)
        name = directory.resolve().name if Path(path).is_dir() else str(path)
        overlay = None if patch_embed is None else Path(patch_embed)
        if overlay is not None and not overlay.exists() and overlay.suffix != ".safetensors":
            overlay = fetch(str(patch_embed))
        options: dict[str, Any] = {"compute_dtype": compute_dtype, "remat": remat}
        is_step = directory.name.isdecimal() and directory.parent.name == CHECKPOINTS
        run = directory.parent.parent if is_step else directory
        is_run = (run / MODEL).is_dir() and (run / CONFIG).is_file()
        is_native = not is_run and (directory / PARAMS).is_dir()
        if not is_run and not (directory / HF_CONFIG).is_file():
            check_one_run(directory)
        if not is_run and not is_native and (run / CHECKPOINTS).is_dir():
            absent = " and ".join(name for name in (MODEL, CONFIG) if not (run / name).exists())
            raise CheckpointError(
                f"{run}: a run without {absent}, since it was cut off while it began; train it again with --resume"
            )
        if step is not None and (not is_run or is_step):
            what = "names a step itself" if is_run else "is not a run"
            raise ConfigError(f"--step {step}: {path} {what}; leave --step out, or name the run")
        if (is_run or is_native) and overlay is not None:
            raise CheckpointError(f"{path}: {overlay} goes onto the Hugging Face directory that it was trained on")
        if is_run:
            own_step = int(directory.name) if is_step else None
            return RunCheckpoint._open(name, run, modalities, own_step, step, weights=weights, **options)
        config = read_config(directory, modalities, init=init, patch_embed=overlay, **options)
        config, notes = _with_tokenizer(directory, config)
        fields: dict[str, Any] = {"name": name, "path": directory, "config": config, "notes": notes}
        fields["template"] = stored_template(directory, overlay)
        if is_native:
            return NativeCheckpoint(**fields)
        if overlay is not None:
            fields["overlay_name"] = overlay.resolve().name if Path(str(patch_embed)).exists() else str(patch_embed)
        return HfCheckpoint(**fields, init=init, patch_embed=overlay, merge_lora=merge_lora, seed=seed)

    @property
    def description(self) -> Path:
        """Directory of config.json and the tokenizer."""
        return self.path

    @property
    def summary_lines(self) -> list[str]:
        """Lines to print about the checkpoint when training starts from it."""
        return list(self.notes)

    @property
    def has_weights(self) -> bool:
        """Whether the directory contains weights, and not only the configuration."""
        return True

    @property
    def base_name(self) -> str:
        """Name of the Hugging Face model that `fingerprint` identifies."""
        return _recorded(self.description, "base", "unknown")

    @property
    def adapter_name(self) -> str | None:
        """Name of the adapter, or of the file with trained weights, that was put onto that model; None without one."""
        return _recorded(self.description, "adapter", "") or None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the Hugging Face weights that this checkpoint, or the base of the run, was made from."""

    @property
    def identity(self) -> str:
        """SHA-256 of all weights; a run records the identity of its base."""
        return self.fingerprint

    def share_fingerprint(self) -> None:
        """Let one process of the run read the weights for `fingerprint`, if all see the same files.

        All processes must call it at the same point.
        """
        if self.origin is not self:
            self.origin.share_fingerprint()

    @property
    @abstractmethod
    def untrained(self) -> dict[str, str]:
        """Return {part: reason} for every part of the model that was never trained.

        A part is a modality, for its patch embedding, or a component.
        """

    @property
    def runs(self) -> "tuple[RunCheckpoint, ...]":
        """The runs that made these weights, first to last: each trained on top of the one before."""
        return ()

    @property
    def origin(self) -> "Checkpoint":
        """The checkpoint that the first of `runs` trained on top of; without runs, this one."""
        return self

    @property
    def step_directory(self) -> Path | None:
        """Path that always opens this step of a run, also after later steps; None for anything else."""
        return None

    @property
    def step_message(self) -> str | None:
        """Message about the step of a run, unless it is the newest; None for anything else."""
        return None

    @property
    def lost_modalities(self) -> tuple[str, ...]:
        """Modalities that umbrella_config.json describes and whose weights are missing."""
        return ()

    def merged(self) -> Self:
        """Return the same model without adapters, which are added to the weights, and without 8-bit products."""
        return replace(self, config=replace(self.config, lora=None, product_dtype=None))

    def answering(self) -> Self:
        """Return the same model, which refuses to answer from untrained weights (`LlavaConfig.check_trained`).

        Raises CheckpointError if no modality is trained, or if a component is not.
        """
        untrained, allow = self.untrained, "allow untrained weights (--allow-untrained)"
        if components := [name for name in untrained if is_component(name)]:
            raise CheckpointError(
                [f"{self.path}: {name} {untrained[name]}; train the group {name}, or {allow}" for name in components]
            )
        remedy = f"name a checkpoint that was trained on it, or {allow}"
        refusals = {
            name: f"{self.path}: modality {name}: patch embedding {why}; {remedy}" for name, why in untrained.items()
        }
        config = replace(self.config, untrained=refusals)
        if config.modalities.keys() == config.untrained.keys():
            config.check_trained(config.untrained)
        return replace(self, config=config)

    def untrained_after(self, trained: Collection[str]) -> dict[str, str]:
        """Return those of `untrained` that stay untrained when the parameters `trained` are trained.

        A component is trained if all of its weights are, a patch embedding if any is.
        """
        weights = [path for path in abstract_params(self.config)[1] if adapted_weight(path) is None]
        left = {component_of(path) for path in weights if path not in trained}
        lifted = {component_of(path) for path in trained} - left | {modality_of(path) for path in trained}
        return {name: why for name, why in self.untrained.items() if name not in lifted}

    def warn_doubtful(self) -> None:
        """Log a warning for each thing that may make answers wrong, such as a small file that changed
        (`changed_files`)."""
        for line in changed_files(self.description):
            _log.warning(line)

    def tokenizer(self) -> Any:
        """Load the tokenizer, with `<|im_start|>`, `<|im_end|>` and `<image>`. Raises DataError if there is none."""
        return load_tokenizer(self.description, None)[0]

    @abstractmethod
    def check(self, dtype: str = "auto") -> list[str]:
        """Compare the names, shapes and types in the files with the model's, without reading weights.

        Returns messages about what will be initialised, left out or grown. Raises CheckpointError with every problem,
        and for a run without a checkpoint. A run's base and what it trained are compared when they are read.
        """

    def check_finite(self) -> None:
        """Read every number. Raises CheckpointError naming each tensor that contains a NaN or an infinity."""
        check_finite(self.tensors().values())

    @abstractmethod
    def tensors(self, dtype: str = "auto") -> dict[str, Tensor]:
        """Return all parameters unread, by path, with adapters merged and `dtype` as in `params`."""

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return `tensors` without patch embeddings that the files lack and that would be initialised."""
        return self.tensors()

    def params(
        self, dtype: str = "auto", *, sharding_for: ShardingFor | None = None, in_float32: Collection[str] = ()
    ) -> Params:
        """Read all parameters, each straight onto its devices; adapters stay separate if `config` has them.

        If `config` has 8-bit products, the weights that the run did not train are quantised.

        Args:
            dtype: type of every parameter; `auto` keeps the types of the files.
            sharding_for: maps a parameter's path and shape to its sharding; by default the first device.
            in_float32: paths of parameters that are read as float32, whatever `dtype` is.

        Raises:
            CheckpointError: also if a number is too large for `dtype`.
        ConfigError: qwix is needed and not installed.
        """
        return self._params(dtype, sharding_for or _first_device, in_float32)

    def _params(self, dtype: str, sharding_for: ShardingFor, in_float32: Collection[str]) -> Params:
        tensors = self.tensors(dtype)
        return place(tensors | {path: tensors[path].astype("float32") for path in in_float32}, sharding_for)

    def trained(self, sharding_for: ShardingFor | None = None) -> Params:
        """Read the parameters that the run trained, placed as in `params`; anything but a run has none."""
        return {}

    def initial_factors(self, lora: LoraConfig | None, fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the factors with which the adapters `lora` of a run start: those that it trains on, or `fresh`.

        Raises ConfigError and CheckpointError as `continue_adapters`.
        """
        return dict(fresh)

    def _cast(self, path: str, leaf: jax.Array, dtype: str, in_float32: Collection[str]) -> jax.Array:
        """Convert a parameter on its devices, as `lazy_tensor.copy_numbers` does in host memory."""
        dtype = "float32" if path in in_float32 else dtype
        cast = leaf if dtype == "auto" else leaf.astype(dtype)
        if cast.dtype != leaf.dtype and cast.dtype.itemsize == 2 and jnp.isinf(cast).sum() > jnp.isinf(leaf).sum():
            raise CheckpointError(f"{self.path}: {path}: a number is too large for {dtype}; choose a wider type")
        return cast

    def _recorded_untrained(self, patch_embed: Path | None = None) -> dict[str, str]:
        """Return {configured modality or component: reason} for the parts that are recorded as untrained."""
        recorded = stored_untrained(self.path, patch_embed)
        return {resolve_modality(m, self.config.modalities) or m: why for m, why in recorded.items()}


@dataclass(frozen=True, kw_only=True)
class HfCheckpoint(Checkpoint):
    """A directory in Hugging Face format: a stock LLaVA, or one with the 3D/4D patch embedding."""

    kind: ClassVar[str] = "Hugging Face directory"
    is_derived: ClassVar[bool] = False
    init: PatchEmbedInit = "random"
    """How to initialise a patch embedding that the files lack or have in another size."""
    patch_embed: Path | None = None
    """File of `convert to-hf --trainable-only`, or folder of a PEFT adapter, to apply to the directory."""
    overlay_name: str | None = None
    """Name of `patch_embed`, on the hub or of the file or folder, without the folders that contain it."""
    merge_lora: bool = True
    """Whether the adapter is merged into the weights; else the run trains it on."""
    seed: int = 0
    """Seed of a patch embedding that is initialised at random."""

    @property
    def has_weights(self) -> bool:
        return any((*self.path.glob("*.safetensors*"), *self.path.glob("pytorch_model*.bin*")))

    @property
    def base_name(self) -> str:
        return self.name

    @property
    def adapter_name(self) -> str | None:
        return self.overlay_name

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, computed once as long as names, sizes and times of the files stay the same."""
        known = CheckedFiles.of_user("weights")
        if known is None:
            return fingerprint(self.path, self.patch_embed)
        stat, changed = self._stat()
        overlay = "" if self.patch_embed is None else self.patch_embed.absolute()
        name = os.path.abspath(self.path), f"fingerprint 1 {overlay}"
        known.read({name})
        if (fields := known.find(*name, stat)) is not None:
            return str(fields["sha256"])
        digest = fingerprint(self.path, self.patch_embed)
        if changed < math.inf:
            known.add(*name, stat, {"sha256": digest})
            known.write(final=True)
        return digest

    def share_fingerprint(self) -> None:
        with raise_together():
            stat, _ = self._stat()
            own = self.fingerprint if process_index() == 0 else ""
        first_stat, first = broadcast([stat, own])
        if first_stat == stat:
            self.__dict__["fingerprint"] = first  # as `cached_property` keeps it

    def _stat(self) -> tuple[str, float]:
        """Return the `describe_stat` of the files that the fingerprint depends on."""
        files = sorted(file for file in self.path.iterdir() if file.is_file())
        overlay = [] if self.patch_embed is None else [self.patch_embed, *self.patch_embed.glob("*")]
        return describe_stat((file, file.stat()) for file in [*files, *overlay])

    @cached_property
    def untrained(self) -> dict[str, str]:
        """Return {part: reason} for parts that are recorded as untrained, and patch embeddings that the files lack.

        The latter are initialised at random or inflated from SigLIP's own.
        """
        summary = self._plan("float32").summary
        missing = {name: summary.initialised[name] for name in summary.untrained}
        return self._recorded_untrained(self.patch_embed) | missing

    @property
    def lost_modalities(self) -> tuple[str, ...]:
        return self._plan("float32").summary.lost_modalities

    def answering(self) -> Self:
        """Return the same model, which refuses to answer from untrained weights, unless it is a toy.

        A toy, whose config.json says that every weight is random (`RANDOM_WEIGHTS`), has no trained weights at all.
        """
        is_stock = self.patch_embed is None and not (self.path / UMBRELLA_CONFIG).exists()
        is_toy = is_stock and read_checkpoint_json(self.path / HF_CONFIG).get(RANDOM_WEIGHTS) is True
        return self if is_toy else super().answering()

    def warn_doubtful(self) -> None:
        """Also log a warning for each modality whose preprocessing is not recorded."""
        for line in self._plan("float32").summary.undescribed:
            _log.warning("%s: %s", self.path, line)
        super().warn_doubtful()

    def check(self, dtype: str = "auto") -> list[str]:
        return [*unused_dropout(self.path), *self._plan(dtype).summary.lines()]

    def check_finite(self) -> None:
        check_finite(self._plan("float32").sources())

    def tensors(self, dtype: str = "auto") -> dict[str, Tensor]:
        if self.patch_embed is not None:
            _ = self.fingerprint  # raises if `patch_embed` was trained on another base
        return self._plan(dtype).params(dtype, self.seed)

    def stored_tensors(self) -> dict[str, Tensor]:
        initialised = self._plan("auto").summary.initialised
        return {path: tensor for path, tensor in self.tensors().items() if modality_of(path) not in initialised}

    def initial_factors(self, lora: LoraConfig | None, fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.patch_embed is None or self.merge_lora or lora is None:
            return dict(fresh)
        paths = {entry.name: entry.path for entry in map_tensors(self.config)}
        return continue_adapters(self.patch_embed, lora, fresh, paths)

    @property
    def _overlay(self) -> dict[str, Any]:
        return {"patch_embed": self.patch_embed, "merge_lora": self.merge_lora}

    def _plan(self, dtype: str) -> LoadPlan:
        return plan_loading(self.path, self.config, dtype=dtype, init=self.init, **self._overlay)


@dataclass(frozen=True, kw_only=True)
class NativeCheckpoint(Checkpoint):
    """A checkpoint of `convert from-hf`: config.json and tokenizer beside the parameters in orbax's format."""

    kind: ClassVar[str] = "native checkpoint"

    @property
    def fingerprint(self) -> str:
        return _recorded(self.path, "base_fingerprint")

    @cached_property
    def untrained(self) -> dict[str, str]:
        return self._recorded_untrained()

    def check(self, dtype: str = "auto") -> list[str]:
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

    def tensors(self, dtype: str = "auto") -> dict[str, Tensor]:
        return {path: tensor.astype(dtype) for path, tensor in _orbax_tensors(self._verified_params).items()}

    def _params(self, dtype: str, sharding_for: ShardingFor, in_float32: Collection[str]) -> Params:
        directory = self._verified_params
        params: Params = {}
        # group by group, so that only one is in memory in two types
        for group in _groups(param_shapes(directory)):
            leaves = restore_params(directory, _on_devices(group, sharding_for))
            params |= {path: self._cast(path, leaf, dtype, in_float32) for path, leaf in leaves.items()}
        return params

    @cached_property
    def _verified_params(self) -> Path:
        """Directory of the parameters, whose files are compared with their checksums on first use."""
        directory, record = self.path / PARAMS, self.path / UMBRELLA_CONFIG
        stated = read_checkpoint_json(record)
        if KEY not in stated:
            raise CheckpointError(f"{record}: no {KEY} of the parameters; convert it again")
        check_folder(directory, read_checksums(stated[KEY], record), record)
        return directory


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint(Checkpoint):
    """A step of a run: the parameters that it trained, on top of its base."""

    kind: ClassVar[str] = "run"
    base: Checkpoint
    """The checkpoint that the run trained on top of, which may be another run."""
    why_step: str
    """Why that step was chosen, as a message."""
    lora: LoraConfig | None
    """The adapters that the run trained. They are merged into the weights unless `config` has them, too."""
    groups: tuple[str, ...]
    """The parameter groups that the run trains (`train.groups`)."""

    @classmethod
    def _open(
        cls,
        name: str,
        run: Path,
        modalities: Mapping[str, ModalityConfig] | None,
        own_step: int | None,
        requested_step: Step | None,
        *,
        weights: bool,
        **options: Any,
    ) -> "RunCheckpoint":
        """Open the directory `run`, at `own_step` if the path named one; other arguments as in `Checkpoint.open`."""
        config = read_config(run / MODEL, modalities, **options)
        settings = load_run_config(run)
        assert settings.model.base is not None  # `train` requires one
        # parameters that the run did not train must start as they did in the run
        model = settings.model
        options |= {"init": model.patch_embed_init, "seed": settings.seed, "weights": weights}
        options |= {"patch_embed": model.adapter, "merge_lora": model.lora is None}
        base = Checkpoint.open(settings.model.base, config.modalities, **options)
        step, why = own_step, ""
        if own_step is None:
            # listed without orbax, which would wait for all processes, also those that have already failed
            steps = [int(path.name) for path in (run / CHECKPOINTS).glob("*") if path.name.isdecimal()]
            if steps:
                step, why = choose_step(run, settings.train, steps, requested_step)
        return cls(
            name=name,
            path=run,
            config=replace(config, lora=settings.model.lora, product_dtype=settings.model.product_dtype),
            template=stored_template(run / MODEL),
            base=replace(base, config=config),
            step=step,
            why_step=why,
            lora=settings.model.lora,
            groups=tuple(settings.train.groups),
        )

    @property
    def description(self) -> Path:
        return self.path / MODEL

    @property
    def summary_lines(self) -> list[str]:
        return [f"{self.path}: step {self.step}" + (f" ({self.why_step})" if self.why_step else "")]

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the weights, made from the base's identity and the trained parameters."""
        trained = {path: Tensor.from_array(leaf) for path, leaf in self.trained().items()}
        parts = (self.base.identity, weights_digest(trained), self.lora.scale if self.lora else "")
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    @cached_property
    def untrained(self) -> dict[str, str]:
        """Return {part: reason} for parts that neither the base's training nor this run has trained.

        A run trains a patch embedding if its groups contain it and a conversation up to this step shows its modality.
        It trains another component if one up to this step shows any volume.
        """
        untrained = self.base.untrained_after(self.trained_paths)
        first_steps = stored_first_steps(self.description)
        if first_steps is None:  # runs of older versions do not record them
            return untrained
        for name, start in self.base.untrained.items():
            why = start.partition(", and ")[0]  # without the part that an earlier run adds
            volume = "volume" if is_component(name) else "one"
            first = min(first_steps.values(), default=None) if is_component(name) else first_steps.get(name)
            if first is None:
                untrained[name] = f"{why}, and no conversation of the run shows {volume}"
            elif (self.step or 0) < first:
                untrained[name] = f"{why}, and the run shows none before step {first}"
        return untrained

    @property
    def trained_paths(self) -> list[str]:
        """Paths of the parameters that the run trains, adapters included."""
        whole = replace(self.config, lora=self.lora)  # `groups` may name adapters, also of a merged model
        labels = freeze.label_params(list(abstract_params(whole)[1]), self.groups)
        return [path for path, label in labels.items() if label != freeze.FROZEN]

    @property
    def runs(self) -> "tuple[RunCheckpoint, ...]":
        return (*self.base.runs, self)

    @property
    def origin(self) -> Checkpoint:
        return self.base.origin

    @property
    def step_directory(self) -> Path:
        return self.path / CHECKPOINTS / str(self.step)

    @property
    def step_message(self) -> str | None:
        return self.summary_lines[0] if self.why_step not in ("", NEWEST) else None

    def check(self, dtype: str = "auto") -> list[str]:
        self._existing_step()
        return []

    def tensors(self, dtype: str = "auto") -> dict[str, Tensor]:
        trained = {path: Tensor.from_array(leaf, str(self.path), path) for path, leaf in self.trained().items()}
        return _merge(self.base.tensors(dtype), trained, self.lora, dtype)

    def params(
        self, dtype: str = "auto", *, sharding_for: ShardingFor | None = None, in_float32: Collection[str] = ()
    ) -> Params:
        params = super().params(dtype, sharding_for=sharding_for, in_float32=in_float32)
        if self.config.product_dtype is None:
            return params
        labels = freeze.label_params(list(params), self.groups)
        frozen = {path: params.pop(path) for path in list(params) if labels[path] == freeze.FROZEN}
        return params | quantize(frozen, self.config.product_dtype)

    def _params(self, dtype: str, sharding_for: ShardingFor, in_float32: Collection[str]) -> Params:
        if self.lora != self.config.lora:  # adapters are merged, which `tensors` does
            return super()._params(dtype, sharding_for, in_float32)
        trained = self.trained(sharding_for).items()
        base = self.base.params(dtype, sharding_for=sharding_for, in_float32=in_float32)
        return base | {path: self._cast(path, leaf, dtype, in_float32) for path, leaf in trained}

    def trained(self, sharding_for: ShardingFor | None = None) -> Params:
        """Read the parameters that the run trained, placed as in `params`.

        Raises CheckpointError if they are damaged, not finite, or were trained on other weights than those of `base`.
        """
        with self._reading() as (checkpoints, step):
            expected = checkpoints.meta(step)["base_fingerprint"]
            trained = checkpoints.restore_trainable(step, sharding_for or _first_device)
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

    def meta(self) -> dict[str, Any]:
        """Read what the run recorded beside the weights (`Checkpoints.meta`)."""
        with self._reading() as (checkpoints, step):
            return checkpoints.meta(step)

    @contextmanager
    def _reading(self) -> Iterator[tuple[Checkpoints, int]]:
        """Open the checkpoints of the run; an error about a damaged one names the older ones."""
        step = self._existing_step()
        with Checkpoints(self.path / CHECKPOINTS, read_only=True) as checkpoints:
            try:
                yield checkpoints, step
            except CheckpointError as error:
                older = [str(checkpoints.directory / str(other)) for other in checkpoints.steps() if other < step]
                remedy = f"name an older checkpoint: {', '.join(older)}" if older else "there is no older checkpoint"
                raise CheckpointError([*error.faults, remedy]) from error

    def _existing_step(self) -> int:
        if self.step is None:
            raise CheckpointError(f"{self.path}: the run has no checkpoint yet; train it first")
        return self.step


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory contains a tokenizer.

    A checkpoint without one can be converted, and trained on token ids that the caller makes.
    """
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def _with_tokenizer(directory: Path, config: LlavaConfig) -> tuple[LlavaConfig, tuple[str, ...]]:
    """Return `config` with the vocabulary size and `<image>` id of the directory's tokenizer, and messages about it."""
    if not has_tokenizer(directory):
        return config, ()
    tokenizer, added = load_tokenizer(directory, config.image_token_id)
    notes = [f"{token}: added to the tokenizer" for token in added]
    size = max(tokenizer.get_vocab().values()) + 1
    rows = config.text.vocab_size
    if size > rows:
        notes.append(f"vocabulary: grown from {rows} to {size} rows, the new ones the mean of the others")
        config = replace(config, text=replace(config.text, vocab_size=size))
    return replace(config, image_token_id=tokenizer.convert_tokens_to_ids("<image>")), tuple(notes)


def _merge(
    base: Mapping[str, Tensor], trained: Mapping[str, Tensor], lora: LoraConfig | None, dtype: str
) -> dict[str, Tensor]:
    """Replace parameters of `base` by trained ones, as `dtype`, and add trained adapters to the weights they adapt."""
    merged = dict(base)
    for path, tensor in trained.items():
        weight = adapted_weight(path)
        if weight is None:
            merged[path] = tensor.astype(dtype)
        elif path.endswith("lora_A.weight"):
            assert lora is not None
            a, b = adapter_paths(weight)
            merged[weight] = add_product(base[weight], trained[a], trained[b], lora.scale)
    return merged


def _recorded(directory: Path, key: str, default: str | None = None) -> str:
    """Return a string of the directory's `umbrella_config.json`."""
    value = read_checkpoint_json(directory / UMBRELLA_CONFIG).get(key, default)
    if not isinstance(value, str):
        raise CheckpointError(f"{directory / UMBRELLA_CONFIG}: {key}: expected a string, got {value!r}; convert again")
    return value


def _first_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Divide parameters into groups of at most `_GROUP_BYTES`, in their order; a larger parameter is one by itself."""
    groups, size = list[dict[str, jax.ShapeDtypeStruct]](), 0
    for path, shape in shapes.items():
        nbytes = math.prod(shape.shape) * np.dtype(shape.dtype).itemsize
        if not groups or size + nbytes > _GROUP_BYTES:
            groups.append({})
            size = 0
        groups[-1][path] = shape
        size += nbytes
    return groups


def _on_devices(shapes: Mapping[str, jax.ShapeDtypeStruct], sharding_for: ShardingFor) -> dict[str, Any]:
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_for(path, leaf.shape))
        for path, leaf in shapes.items()
    }


def _orbax_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the parameters of an orbax directory unread; a group is read as a whole, and kept until the next is."""

    @lru_cache(maxsize=1)
    def leaves(number: int) -> dict[str, np.ndarray]:
        read = restore_params(directory, _on_devices(groups[number], _first_device))
        return {path: np.asarray(leaf) for path, leaf in read.items()}

    def tensor(path: str, shape: jax.ShapeDtypeStruct, number: int) -> Tensor:
        def fill(out: np.ndarray, index: Index) -> None:
            copy_numbers(out, leaves(number)[path][index], str(directory), path)

        return Tensor(shape.shape, np.dtype(shape.dtype).name, fill, str(directory), path)

    groups = _groups(param_shapes(directory))
    return {path: tensor(path, shape, i) for i, group in enumerate(groups) for path, shape in group.items()}
