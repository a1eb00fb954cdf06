"""Weights on disk, of every kind, and what a notebook needs beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from convert.from_hf import check_checkpoint
from convert.from_hf import load_params as params_from_hf
from convert.hf_config import UMBRELLA_CONFIG, read_config, write_config
from convert.safetensors_io import fingerprint
from umbrella_jax.batch import Batch
from umbrella_jax.config import ModalityConfig, ModelConfig, RematPolicy, RunConfig, load_config
from umbrella_jax.data.loader import Dataset, eval_batches
from umbrella_jax.data.tokenize import load_tokenizer
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.models import Llava, LlavaConfig, Params, abstract_params, merge
from umbrella_jax.training.checkpoint import Checkpoints, load_params, param_shapes, save_params

PARAMS = "params"
"""Of a native checkpoint: the orbax directory beside config.json."""
MODEL, CONFIG, CHECKPOINTS = "model", "config.yaml", "checkpoints"
"""Of a run: all but the weights of its model, its resolved config, its checkpoints."""


def fetch(base: str) -> Path:
    """A local directory: `base` itself, or what the hub holds under that name, downloaded once and kept."""
    if Path(base).is_dir():
        return Path(base)
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{base}: no such directory; expected one in Hugging Face format, a native checkpoint or a run"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{base}: no such directory, and the hub does not give it: {reason}") from None


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk and what belongs to them; opening one reads configuration and tokenizer alone.

    A *run* names its base and holds what was trained on top of it; a *native* checkpoint is what `convert from-hf`
    wrote; everything else is a Hugging Face directory, stock LLaVA or with the patch embedding.
    """

    path: Path
    kind: Literal["hf", "native", "run"]
    description: Path
    """Where config.json and the tokenizer are."""
    config: LlavaConfig
    notes: tuple[str, ...]
    """What was added to the vocabulary, for people."""
    step: int | None = None
    """Of a run: which of its checkpoints."""
    base: "Checkpoint | None" = None
    """Of a run: the weights that it trained on top of."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        modalities: Mapping[str, ModalityConfig] | None = None,
        *,
        compute_dtype: str = "float32",
        remat: RematPolicy = "none",
    ) -> "Checkpoint":
        """Finds out what `path` holds: a directory, a run's `checkpoints/STEP`, or a name on the hub.

        Args:
            modalities: of the patch embedding; needed for a stock LLaVA, read from the checkpoint otherwise.

        Raises:
            CheckpointError, ConfigError, DataError: naming what is missing, unsupported or contradictory.
        """
        found = fetch(str(path))
        options: dict[str, Any] = {"compute_dtype": compute_dtype, "remat": remat}
        step = int(found.name) if found.name.isdigit() and found.parent.name == CHECKPOINTS else None
        run = found.parent.parent if step is not None else found
        if (run / MODEL).is_dir() and (run / CONFIG).is_file():
            config = read_config(run / MODEL, modalities, **options)
            trained = load_config(run / CONFIG)
            assert trained.model.base is not None  # a run does not start without
            base = cls.open(trained.model.base, config.modalities, **options)
            base = replace(base, config=config)
            return cls(run, "run", run / MODEL, config, (), step, base)
        kind: Literal["hf", "native"] = "native" if (found / PARAMS).is_dir() else "hf"
        config = read_config(found, modalities, **options)
        if not has_tokenizer(found):
            return cls(found, kind, found, config, ())
        tokenizer, added = load_tokenizer(found, config.image_token_id)
        notes = [f"{token}: added to the tokenizer" for token in added]
        size = max(tokenizer.get_vocab().values()) + 1
        rows = config.text.vocab_size
        if size > rows:
            notes.append(f"vocabulary: grown from {rows} to {size} rows, the new ones the mean of the others")
            config = replace(config, text=replace(config.text, vocab_size=size))
        config = replace(config, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
        return cls(found, kind, found, config, tuple(notes))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights that came from Hugging Face: a run's base, what a native checkpoint was made from."""
        if self.base is not None:
            return self.base.fingerprint
        if self.kind == "native":
            return json.loads((self.path / UMBRELLA_CONFIG).read_text())["base_fingerprint"]
        return fingerprint(self.path)

    def tokenizer(self) -> Any:
        """The tokenizer, with `<|im_start|>`, `<|im_end|>` and `<image>`. Raises DataError where there is none."""
        return load_tokenizer(self.description, None)[0]

    def check(self, dtype: str = "auto") -> list[str]:
        """Compares names, shapes and types in the files with the model's; reads no weights.

        Returns what will be initialised, left out or grown, for people. Raises CheckpointError with every fault.
        """
        if self.kind == "hf":
            return check_checkpoint(self.path, self.config, dtype=dtype).lines()
        if self.kind == "native":
            expected = {path: leaf.shape for path, leaf in abstract_params(self.config)[1].items()}
            found = param_shapes(self.path / PARAMS)
            faults = [
                f"{self.path}: {path}: expected {expected.get(path, 'no such parameter')}, found "
                f"{found.get(path, 'none')}; name the modalities as when it was converted, or convert again"
                for path in sorted(expected.keys() | found.keys())
                if expected.get(path) != found.get(path)
            ]
            if faults:
                raise CheckpointError(faults)
        return []

    def params(self, dtype: str = "auto", *, sharding: jax.sharding.Sharding | None = None, seed: int = 0) -> Params:
        """Reads all parameters.

        Args:
            dtype: of every parameter; `auto` keeps the files' types.
            sharding: where they go; default the first device.
            seed: of a patch embedding that the checkpoint does not hold.
        """
        where = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if self.kind == "native":
            return _cast(load_params(self.path / PARAMS, where), dtype)
        if self.base is not None:
            trained = _cast(self._trained(where), dtype)
            return self.base.params(dtype, sharding=where, seed=seed) | trained

        def put(_: str, leaf: np.ndarray) -> jax.Array:
            return jax.device_put(leaf, where)

        return params_from_hf(self.path, self.config, dtype=dtype, seed=seed, put=put)[0]

    def _trained(self, where: jax.sharding.Sharding) -> Params:
        """What a run trained, if it was on these weights of the base."""
        with Checkpoints(self.path / CHECKPOINTS, read_only=True) as checkpoints:
            step = self.step if self.step is not None else checkpoints.latest_step()
            if step is None:
                raise CheckpointError(f"{self.path}: the run has no checkpoint yet")
            expected = checkpoints.meta(step)["base_fingerprint"]
            if expected != self.fingerprint:
                assert self.base is not None
                raise CheckpointError(
                    f"{self.base.path}: not the weights that {self.path} was trained on (fingerprint "
                    f"{self.fingerprint[:12]}, expected {expected[:12]}); bring them back, or name where they are as "
                    f"model.base in {self.path / CONFIG}"
                )
            return checkpoints.restore_trainable(step, where)


def _cast(params: Params, dtype: str) -> Params:
    return params if dtype == "auto" else {path: leaf.astype(dtype) for path, leaf in params.items()}


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer lies there; a bare checkpoint can be converted and trained on ids of one's own."""
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def describe(checkpoint: Checkpoint, directory: Path) -> None:
    """Writes all but the weights to `directory`: config.json, tokenizer, modalities; grown where the vocabulary was."""
    write_config(checkpoint.description, directory, checkpoint.config, base_fingerprint=checkpoint.fingerprint)
    if checkpoint.notes:
        checkpoint.tokenizer().save_pretrained(directory)


def write_native(checkpoint: Checkpoint, directory: Path, *, dtype: str, seed: int) -> None:
    """Writes a native checkpoint: orbax parameters, config.json, tokenizer, modalities."""
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory}: not empty; name a directory that does not exist yet")
    params = checkpoint.params(dtype, seed=seed)
    describe(checkpoint, directory)
    save_params(directory / PARAMS, params)


def load(
    path: str | Path,
    *,
    modalities: Mapping[str, ModalityConfig] | None = None,
    dtype: str = "auto",
    compute_dtype: str = "float32",
) -> Llava:
    """The model of a Hugging Face directory, an export, a native checkpoint or a run, on the first device.

    Args:
        modalities: of the patch embedding, for a stock LLaVA, which has none yet.
        dtype: of every parameter; `auto` keeps what the files hold.
        compute_dtype: of activations, `float32` or `bfloat16`.

    Raises:
        CheckpointError, ConfigError: naming every tensor or field that is not as it should be.
    """
    checkpoint = Checkpoint.open(path, modalities, compute_dtype=compute_dtype)
    return merge(abstract_params(checkpoint.config)[0], checkpoint.params(dtype))


class Processor:
    """Conversations to batches and tokens to text, as the model of `path` expects them."""

    def __init__(self, tokenizer: Any, modalities: Mapping[str, ModalityConfig], *, max_length: int = 8192):
        self.tokenizer, self.modalities, self.max_length = tokenizer, modalities, max_length

    @classmethod
    def load(
        cls, path: str | Path, *, modalities: Mapping[str, ModalityConfig] | None = None, max_length: int = 8192
    ) -> "Processor":
        """The processor of whatever `umbrella_jax.load` takes."""
        checkpoint = Checkpoint.open(path, modalities)
        return cls(checkpoint.tokenizer(), checkpoint.config.modalities, max_length=max_length)

    def dataset(
        self,
        conversations: str | Path,
        *,
        image_root: str | Path | None = None,
        evaluation: bool = False,
        threads: int = 4,
    ) -> Dataset:
        """Reads and checks a conversation file or a directory of them, and every volume; see `Dataset.load`."""
        return Dataset.load(
            conversations,
            self.tokenizer,
            self.modalities,
            image_root=image_root,
            max_length=self.max_length,
            threads=threads,
            evaluation=evaluation,
        )

    def batch(self, conversations: str | Path, *, image_root: str | Path | None = None, prompts: bool = False) -> Batch:
        """All conversations of a file as one Batch: whole, or as prompts for their last answer."""
        dataset = self.dataset(conversations, image_root=image_root, evaluation=prompts)
        ((_, batch),) = eval_batches(dataset, len(dataset), prompts=prompts)
        return batch

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ids = [self.tokenizer.convert_tokens_to_ids("<|im_end|>"), self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None})

    def decode(self, tokens: jax.Array | np.ndarray | Sequence[Sequence[int]]) -> list[str]:
        """Text of generated tokens, int [B, L]; special tokens and what stands behind the end are left out."""
        rows = np.asarray(tokens)
        return [self.tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in rows]


def open_base(config: RunConfig | ModelConfig) -> Checkpoint:
    """The base of a run. Raises ConfigError where the config names none."""
    model = config.model if isinstance(config, RunConfig) else config
    if model.base is None:
        raise ConfigError("model.base: expected a LLaVA directory in Hugging Face format (--base HF_DIR)")
    base = Checkpoint.open(model.base, model.modalities, compute_dtype=model.compute_dtype, remat=model.remat)
    if base.kind == "run":  # its weights may still move
        raise ConfigError(
            f"model.base: {base.path} is a run; export it (umbrella-jax convert to-hf) and name the export"
        )
    return base
