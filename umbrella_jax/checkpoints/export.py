"""Write checkpoints: native, Hugging Face, or the trained parameters only."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.checksum import folder_checksums
from convert.export_config import CARD, export_names, write_config
from convert.lazy_tensor import Tensor, host_memory
from convert.model_card import TrainingRecord
from convert.rules import EMBED
from convert.to_hf import export, hub_tensors
from convert.trainable import FILE, Trainable, write_trainable
from umbrella_jax.checkpoints.checkpoint import PARAMS, Checkpoint, has_tokenizer
from umbrella_jax.data.tokenize import save_tokenizer
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.io.files import check_new_folder, check_run_name, new_folder
from umbrella_jax.io.reading import parse_yaml
from umbrella_jax.models.paths import COMPONENTS, adapted_weight, adapter_paths, modality_of
from umbrella_jax.training.checkpoint import save_params


def write_description(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    dtype: str | None = None,
    untrained: Mapping[str, str] | None = None,
    checksums: Mapping[str, str] | None = None,
    first_steps: Mapping[str, int] | None = None,
) -> None:
    """Write everything but the weights to `directory`: config.json, umbrella_config.json, and the tokenizer.

    Args:
        dtype: type of the weights; None keeps the type in config.json.
        untrained: {part: reason} for untrained parts (`Checkpoint.untrained`).
        checksums: {file: checksum} of the weights.
        first_steps: {modality: first step of the run that shows it} (`EpochPlan.first_steps`).
    """
    write_config(
        checkpoint.description,
        directory,
        checkpoint.config,
        base=checkpoint.base_name,
        base_fingerprint=checkpoint.identity,
        dtype=dtype,
        template=checkpoint.template,
        untrained=untrained,
        checksums=checksums,
        first_steps=first_steps,
        finish=lambda part: save_tokenizer(checkpoint.tokenizer(), part) if checkpoint.notes else None,
    )


def write_native(checkpoint: Checkpoint, directory: Path, *, dtype: str = "auto", finite: bool = False) -> None:
    """Write a native checkpoint atomically: orbax parameters, config.json, umbrella_config.json and tokenizer.

    Raises ConfigError as `check_new_folder` and, with `finite`, CheckpointError for weights that are not finite.
    """
    directory, checkpoint = Path(directory), checkpoint.merged()
    check_new_folder(directory)
    check_run_name(directory, "choose another directory")
    if finite:
        checkpoint.check_finite()
    params = checkpoint.params(dtype, sharding_for=host_memory)
    with new_folder(directory) as part:
        save_params(part / PARAMS, params)
        checksums = folder_checksums(part / PARAMS)
        stored = params[EMBED].dtype.name
        write_description(checkpoint, part, dtype=stored, untrained=checkpoint.untrained, checksums=checksums)


def untrained_to_leave_out(checkpoint: Checkpoint) -> dict[str, str]:
    """Return {modality: reason} for the modalities that an export leaves out: untrained ones, unless all are."""
    untrained = {name: why for name, why in checkpoint.untrained.items() if name not in COMPONENTS}
    return {} if checkpoint.config.modalities.keys() == untrained.keys() else untrained


def write_hf(
    checkpoint: Checkpoint,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    include_untrained: bool = False,
    records: Sequence[TrainingRecord] = (),
) -> None:
    """Write a Hugging Face directory, tensor by tensor, with tokenizer and model card.

    Adapters are merged into the weights, which keep their types.

    Args:
        names, max_shard_size: as in `export`.
        include_untrained: whether to write untrained modalities, which are otherwise left out
            (`untrained_to_leave_out`).
        records: facts about the runs that made the weights, for the model card.
    """
    check_new_folder(out)
    checkpoint = checkpoint.merged()
    left_out = {} if include_untrained else untrained_to_leave_out(checkpoint)
    modalities = {name: modality for name, modality in checkpoint.config.modalities.items() if name not in left_out}
    tensors = {path: tensor for path, tensor in checkpoint.tensors().items() if modality_of(path) not in left_out}

    def finish(part: Path) -> None:
        if checkpoint.notes and has_tokenizer(checkpoint.description):
            save_tokenizer(checkpoint.tokenizer(), part)

    export(
        out,
        tensors,
        replace(checkpoint.config, modalities=modalities),
        checkpoint.description,
        names=names,
        max_shard_size=max_shard_size,
        base=checkpoint.base_name if checkpoint.is_derived else None,
        fingerprint=checkpoint.fingerprint if checkpoint.is_derived else None,
        template=checkpoint.template,
        untrained={name: why for name, why in checkpoint.untrained.items() if name not in left_out},
        records=records,
        license=_license(checkpoint.origin.path / CARD),
        finish=finish,
    )


def _license(card: Path) -> dict[str, str]:
    """Return the fields about the license in a model card; none if there is no card or it states none."""
    front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    try:
        stated = parse_yaml(front[1], str(card)) if front else None
    except ConfigError:  # somebody else's card
        return {}
    named = stated if isinstance(stated, dict) and isinstance(stated.get("license"), str) else {}
    fields = ("license", "license_name", "license_link")
    return {field: named[field] for field in fields if isinstance(named.get(field), str)}


def write_trained(
    checkpoint: Checkpoint, out: Path, *, names: Sequence[str] | None = None, include_untrained: bool = False
) -> Path:
    """Write the trained parameters of a run, and the fingerprint of its base, as one file into the new folder `out`.

    For a run on top of another run, the file has the trained parameters of all of them. B of an adapter includes its
    scale, so that a reader adds B·A. Adapters of several runs for one weight become one, whose rank is their sum.
    Untrained patch embeddings are left out as in `write_hf`.

    Returns the path of the file. Raises CheckpointError if `checkpoint` is not a run.
    """
    if not checkpoint.runs:
        raise CheckpointError(f"{checkpoint.path}: not a run, so it does not say what was trained; name a run")
    left_out = {} if include_untrained else untrained_to_leave_out(checkpoint)
    kept = {name: modality for name, modality in checkpoint.config.modalities.items() if name not in left_out}
    renamed = export_names(kept, names)
    check_new_folder(out)
    trained = [(run.trained(), run.lora.scale if run.lora else 1.0) for run in checkpoint.runs]
    paths = {path for leaves, _ in trained for path in leaves}
    # patch embeddings are written whole, even if partly trained: a stock base lacks the other part
    tensors = {
        path: tensor
        for path, tensor in checkpoint.tensors().items()
        if (path in paths or modality_of(path) is not None) and modality_of(path) not in left_out
    }
    for weight in sorted({w for path in paths if (w := adapted_weight(path))} - paths):
        a, b = adapter_paths(weight)
        own = [(leaves, np.float32(scale)) for leaves, scale in trained if a in leaves]
        tensors[a] = Tensor.from_array(np.concatenate([np.asarray(leaves[a]) for leaves, _ in own], axis=-2))
        tensors[b] = Tensor.from_array(
            np.concatenate([np.asarray(leaves[b]) * scale for leaves, scale in own], axis=-1)
        )
    named = hub_tensors(tensors, replace(checkpoint.config, modalities=kept), renamed)
    modalities = {renamed[m]: modality for m, modality in kept.items()}
    untrained = {renamed.get(name, name): why for name, why in checkpoint.untrained.items() if name not in left_out}
    with new_folder(out) as part:
        write_trainable(
            part / FILE, Trainable(named, modalities, checkpoint.fingerprint, checkpoint.template, untrained)
        )
    return out / FILE
