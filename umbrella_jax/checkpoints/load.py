"""Load a model for inference, or open the base of a run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from convert.hub import parse_hub_name
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.config.schema import (
    AttentionBackend,
    ComputeDtype,
    ModalityConfig,
    ModelConfig,
    Quantized,
    RunConfig,
    StoredDtype,
    Template,
)
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import Llava, abstract_params, merge, native_backend, quantize
from umbrella_jax.rundir import Step


def load(
    path: str | Path,
    *,
    modalities: Mapping[str, ModalityConfig] | None = None,
    patch_embed: str | Path | None = None,
    dtype: StoredDtype = "auto",
    compute_dtype: ComputeDtype = "float32",
    attention: Literal["auto", AttentionBackend] = "auto",
    quantized: Quantized | None = None,
    quantize_activations: bool = False,
    allow_untrained: bool = False,
    step: Step | None = None,
) -> Llava:
    """Load a Hugging Face directory, an export, a native checkpoint or a run as a model on the first device.

    Args:
        modalities: configuration of the patch embedding, for a stock LLaVA, which lacks one (`allow_untrained`).
        patch_embed: a file of `convert to-hf --trainable-only`, or the folder or name on the hub of a PEFT adapter,
            which is merged; `path` is then the base that it was trained on.
        dtype: type of every parameter; `auto` keeps the types of the files.
        compute_dtype: type of activations.
        attention: as `model.attention` of the configuration.
        quantized: as `model.quantize` of the configuration. A run with `quantize_activations` has its own by default.
        quantize_activations: as `model.quantize_activations` of the configuration; needs `quantized`.
        allow_untrained: let the model answer from untrained patch embeddings (`Checkpoint.untrained`).
        step: step of a run: a number, `best` or `latest`; by default the best if it keeps one, else the newest.

    Raises:
        CheckpointError, ConfigError: naming every faulty tensor, field or argument; and, without `allow_untrained`, if
            no modality is trained. A model with trained and untrained modalities loads, and refuses to answer about the
            untrained ones.
    """
    words = {
        "dtype": (dtype, get_args(StoredDtype)),
        "compute_dtype": (compute_dtype, get_args(ComputeDtype)),
        "attention": (attention, ("auto", *get_args(AttentionBackend))),
        "quantized": (quantized, (None, *get_args(Quantized))),
        "step": (None if isinstance(step, int) else step, (None, "best", "latest", "a number")),
    }
    if faults := [
        f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}"
        for name, (value, known) in words.items()
        if value not in known
    ]:
        raise ConfigError(faults)
    if quantize_activations and quantized is None:
        raise ConfigError("quantize_activations: needs quantized weights; set quantized to int8 or fp8")
    checkpoint = Checkpoint.open(path, modalities, compute_dtype=compute_dtype, patch_embed=patch_embed, step=step)
    if not allow_untrained:
        checkpoint = checkpoint.answering()
    options: dict[str, Any] = {"quantized": quantized, "quantize_activations": quantize_activations}
    return load_opened(checkpoint, dtype=dtype, attention=attention, **options)


def load_opened(
    checkpoint: Checkpoint,
    *,
    dtype: StoredDtype = "auto",
    attention: Literal["auto", AttentionBackend] = "auto",
    quantized: Quantized | None = None,
    quantize_activations: bool = False,
) -> Llava:
    """Load an opened checkpoint as a model on the first device; arguments as in `load`."""
    checkpoint.warn_doubtful()
    config = checkpoint.config.with_attention(attention, native_backend(jax.devices()[0]))
    if quantized is None:
        return merge(abstract_params(config)[0], checkpoint.params(dtype))
    params = replace(checkpoint, config=replace(config, product_dtype=None)).params(dtype)
    config = replace(config, product_dtype=quantized if quantize_activations else None)
    return merge(abstract_params(config)[0], quantize(params, quantized))


def same_template(field: str, template: Template, checkpoint: Checkpoint) -> Template:
    """Return `template`. Raises ConfigError if `checkpoint` was trained with another one."""
    if checkpoint.template not in (None, template):
        raise ConfigError(
            f"{field}: {template}, but {checkpoint.path} was trained with {checkpoint.template}; expected the same"
        )
    return template


def local_tokenizer(config: RunConfig) -> Any | None:
    """Return the tokenizer of a run's base; None without a base, or if the hub's was not downloaded yet.

    Raises the errors of `open_base`.
    """
    base = config.model.base
    if base is None:
        return None
    if not Path(base).is_dir() and (parsed := parse_hub_name(base)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            base = snapshot_download(parsed[0], revision=parsed[1], local_files_only=True)
        except LocalEntryNotFoundError:
            return None
    return open_base(replace(config, model=replace(config.model, base=base))).tokenizer()


def open_base(config: RunConfig | ModelConfig, *, weights: bool = True) -> Checkpoint:
    """Open the base of a run, with the run's template.

    If the base is a run itself, its current best or newest checkpoint is opened, with adapters merged.

    Args:
        weights: whether to download the weights of a base on the hub; shapes need only the small files.

    Raises:
        ConfigError: if the config names no base, or another template than the base was trained with.
    """
    model, seed = (config.model, config.seed) if isinstance(config, RunConfig) else (config, 0)
    if model.base is None:
        raise ConfigError("model.base: expected a LLaVA directory in Hugging Face format (--base HF_DIR)")
    base = Checkpoint.open(
        model.base,
        model.modalities,
        compute_dtype=model.compute_dtype,
        remat=model.remat,
        init=model.patch_embed_init,
        patch_embed=model.adapter,
        merge_lora=model.lora is None,
        seed=seed,
        weights=weights,
    ).merged()
    if isinstance(config, RunConfig):
        return replace(base, template=same_template("data.template", config.data.template, base))
    return base
