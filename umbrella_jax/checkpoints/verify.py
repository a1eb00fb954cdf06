"""Compare two checkpoints: tensors, configuration, tokenizer and logits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from convert.config_json import read_hub_config, stored_modalities
from convert.export_config import hf_dict
from convert.hub import fetch
from convert.verify import (
    LogitComparison,
    ModelComparison,
    compare_configs,
    compare_forward,
    compare_reading,
    compare_tensors,
    compare_tokenizers,
)
from umbrella_jax.checkpoints.checkpoint import Checkpoint, has_tokenizer
from umbrella_jax.checkpoints.export import untrained_to_leave_out
from umbrella_jax.config.schema import ModalityConfig, resolve_modality
from umbrella_jax.data.tokenize import stop_ids
from umbrella_jax.models.paths import modality_of
from umbrella_jax.rundir import MODEL


def verify(
    a: str | Path,
    b: str | Path,
    modalities: Mapping[str, ModalityConfig] | None = None,
    *,
    forward: bool = True,
) -> ModelComparison:
    """Compare two checkpoints of any kind: tensors, configuration, tokenizer, A's logits in PyTorch and B's in JAX.

    Args:
        modalities: modalities of a stock LLaVA; by default those of the other model.
        forward: whether to compute logits, which needs PyTorch and memory for all weights in float32.

    Raises:
        CheckpointError, ConfigError: if one cannot be read as a model.
    """
    paths = [fetch(str(path)) for path in (a, b)]
    stock = [not stored_modalities(p) and not (p / MODEL).exists() and modalities is None for p in paths]
    opened = {p: Checkpoint.open(p, modalities) for p, bare in zip(paths, stock, strict=True) if not bare}
    known = next(iter(opened.values())).config.modalities if opened else None
    model_a, model_b = models = [(opened[p] if p in opened else Checkpoint.open(p, known)).merged() for p in paths]
    left_out = [_left_out(model_a, model_b), _left_out(model_b, model_a)]
    config_a, config_b = (
        replace(c.config, modalities={m: modality for m, modality in c.config.modalities.items() if m not in out})
        for c, out in zip(models, left_out, strict=True)
    )
    notes = [
        f"{c.path}: {name}: not compared, the other leaves it out: its patch embedding is {why}"
        for c, out in zip(models, left_out, strict=True)
        for name, why in out.items()
    ]

    configuration = compare_configs(config_a, config_b)
    sources = [checkpoint.origin for checkpoint in models]
    for checkpoint, source in zip(models, sources, strict=True):
        configuration += compare_reading(source.description, checkpoint.config, grown=bool(source.notes))
        configuration += [f"{checkpoint.path}: modality {name}: no weights" for name in checkpoint.lost_modalities]
    tokenizers = [c.tokenizer() for c in models if has_tokenizer(c.description)]
    if len(tokenizers) == 2:
        configuration += compare_tokenizers(*tokenizers)
        ends = [stop_ids(tokenizer) for tokenizer in tokenizers]
        if ends[0] != ends[1]:
            configuration.append(f"ids that end an answer: {ends[0]} in A, {ends[1]} in B")
    if model_a.template and model_b.template and model_a.template != model_b.template:
        configuration.append(f"template: {model_a.template} in A, {model_b.template} in B")
    notes += [f"{c.path}: {line}" for c in models for line in (*c.notes, *c.check())]
    tensors_a, tensors_b = (
        {path: tensor for path, tensor in c.stored_tensors().items() if modality_of(path) not in out}
        for c, out in zip(models, left_out, strict=True)
    )
    tensors = compare_tensors(tensors_a, config_a, tensors_b, config_b)
    logits: dict[str, LogitComparison] = {}
    shapes_differ = any("→ [" in t.types for t in tensors)
    if forward and not configuration and not shapes_differ:
        try:
            raw = read_hub_config(sources[0].description)
            if sources[0].notes:
                raw = hf_dict(raw, model_a.config)
            logits = compare_forward(raw, tensors_a, config_a, tensors_b, config_b)
        except ImportError as error:
            notes.append(f"logits: not compared, {error.name} is not installed; pip install 'umbrella-jax[torch]'")
    elif forward:
        notes.append("logits: not compared, since the models are of other shapes or configurations")
    return ModelComparison(tensors, configuration, logits, tuple(notes))


def _left_out(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """Return {modality: reason} for untrained modalities that `other` lacks, as an export leaves them out."""
    untrained = untrained_to_leave_out(checkpoint)
    return {m: why for m, why in untrained.items() if resolve_modality(m, other.config.modalities) is None}
