"""Write checkpoints: native, Hugging Face, or the trained parameters only."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.checksum import folder_checksums
from convert.config_json import read_titles, stored_modalities, stored_parts, stored_training
from convert.export_config import CARD, export_names, write_config
from convert.lazy_tensor import Tensor, host_memory
from convert.model_card import TrainingRecord, model_card
from convert.peft_adapter import is_saved_whole, open_trained, write_adapter
from convert.rules import EMBED, map_tensors
from convert.to_hf import export, hub_tensors
from convert.trainable import FILE, Trainable, write_trainable
from umbrella_jax.checkpoints.checkpoint import PARAMS, Checkpoint, HfCheckpoint, has_tokenizer
from umbrella_jax.data.tokenize import save_tokenizer, stop_ids
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.io.files import check_new_folder, check_run_name, new_folder, strict_json
from umbrella_jax.io.reading import parse_yaml
from umbrella_jax.models import abstract_params
from umbrella_jax.models.paths import PROJECTOR, adapted_weight, adapter_paths, is_component, modality_of
from umbrella_jax.training.checkpoint import save_params


def write_description(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    dtype: str | None = None,
    untrained: Mapping[str, str] | None = None,
    checksums: Mapping[str, str] | None = None,
    first_steps: Mapping[str, int] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write everything but the weights to `directory`: config.json, umbrella_config.json, and the tokenizer.

    Args:
        dtype: type of the weights; None keeps the type in config.json.
        untrained: {part: reason} for untrained parts (`Checkpoint.untrained`).
        checksums: {file: checksum} of the weights.
        first_steps: {modality: first step of the run that shows it} (`EpochPlan.first_steps`).
        training: facts about the training of these weights, as `convert.config_json.stored_training` returns them.
    """
    write_config(
        checkpoint.description,
        directory,
        checkpoint.config,
        base=checkpoint.base_name,
        base_fingerprint=checkpoint.identity,
        adapter=checkpoint.adapter_name,
        dtype=dtype,
        template=checkpoint.template,
        untrained=untrained,
        checksums=checksums,
        first_steps=first_steps,
        training=training,
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
        stated: dict[str, Any] = {"dtype": params[EMBED].dtype.name, "untrained": checkpoint.untrained}
        stated["training"] = _training_of_same_weights(checkpoint)
        write_description(checkpoint, part, checksums=checksums, **stated)


def _training_of_same_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts about the training that an export records, {} if a native checkpoint of it has other weights."""
    own = checkpoint.description
    is_same = not checkpoint.is_derived and _applied(checkpoint) is None
    return stored_training(own) if is_same and stored_modalities(own) == checkpoint.config.modalities else {}


def untrained_to_leave_out(checkpoint: Checkpoint) -> dict[str, str]:
    """Return {modality: reason} for the modalities that an export leaves out: untrained ones, unless all are."""
    untrained = {name: why for name, why in checkpoint.untrained.items() if not is_component(name)}
    return {} if checkpoint.config.modalities.keys() == untrained.keys() else untrained


def write_hf(
    checkpoint: Checkpoint,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    include_untrained: bool = False,
    records: Sequence[TrainingRecord] = (),
    with_code: bool = False,
) -> None:
    """Write a Hugging Face directory, tensor by tensor, with tokenizer and model card.

    Adapters are merged into the weights, which keep their types.

    Args:
        names, max_shard_size: as in `export`.
        include_untrained: whether to write untrained modalities, which are otherwise left out
            (`untrained_to_leave_out`).
        records: facts about the runs that made the weights, for the model card.
        with_code: whether to add code and settings with which transformers loads and asks the model without this
            package: greedy, with the ends of an answer that we use.

    Raises CheckpointError if the code needs a tokenizer and the checkpoint has none.
    """
    check_new_folder(out)
    if with_code and not has_tokenizer(checkpoint.description):
        raise CheckpointError(f"{checkpoint.description}: no tokenizer, which --with-code needs; copy the base's there")
    checkpoint = checkpoint.merged()
    left_out = {} if include_untrained else untrained_to_leave_out(checkpoint)
    modalities = {name: modality for name, modality in checkpoint.config.modalities.items() if name not in left_out}
    tensors = {path: tensor for path, tensor in checkpoint.tensors().items() if modality_of(path) not in left_out}

    def finish(part: Path) -> None:
        if with_code:
            _write_for_generate(checkpoint.tokenizer(), part)
        elif checkpoint.notes and has_tokenizer(checkpoint.description):
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
        adapter=checkpoint.adapter_name if checkpoint.is_derived else None,
        template=checkpoint.template,
        untrained={name: why for name, why in checkpoint.untrained.items() if name not in left_out},
        records=records,
        license=read_license(checkpoint.origin.path / CARD),
        with_code=with_code,
        finish=finish,
    )


def _write_for_generate(tokenizer: Any, part: Path) -> None:
    """Write tokenizer and generation_config.json with which transformers' `generate` answers as this package does.

    A base's own generation_config.json may sample or have penalties, and lacks ends of an answer.
    """
    save_tokenizer(tokenizer, part)
    file = part / "tokenizer_config.json"
    settings, template = json.loads(file.read_text(encoding="utf-8")), tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:  # transformers 4.46 does not read chat_template.jinja
        file.write_text(strict_json({**settings, "chat_template": template}, indent=2, ensure_ascii=False) + "\n")
    ends = stop_ids(tokenizer)
    generation = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
    (part / "generation_config.json").write_text(strict_json(generation, indent=2) + "\n")


def read_license(card: Path) -> dict[str, str]:
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

    For a run on top of another run, the file has the trained parameters of both. B of an adapter includes its
    scale, so that a reader adds B·A. Adapters of several runs for one weight become one, whose rank is their sum.
    Untrained patch embeddings are left out as in `write_hf`.

    Returns the path of the file. Raises CheckpointError if `checkpoint` is not a run.
    """
    left_out = {} if include_untrained else untrained_to_leave_out(checkpoint)
    # patch embeddings are written whole, even if partly trained: a stock base lacks the other part
    paths = {path for path in abstract_params(checkpoint.config)[1] if modality_of(path)} | _trained_paths(checkpoint)
    trained = _collect_trained(checkpoint, paths, left_out, names)
    scaled = {
        b: Tensor.from_array(trained.tensors[b].read() * np.float32(scale))
        for weight, scale in trained.scales.items()
        for b in adapter_paths(weight)[1:]
    }
    check_new_folder(out)
    with new_folder(out) as part:
        write_trainable(part / FILE, replace(trained, tensors={**trained.tensors, **scaled}, scales={}))
    return out / FILE


def write_peft(
    checkpoint: Checkpoint,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    include_untrained: bool = False,
    records: Sequence[TrainingRecord] = (),
) -> bool:
    """Write the adapters of a run as a PEFT adapter into the new folder `out`, with its trained patch embedding and a
    model card.

    For a run on top of another run, it has what both trained, as in `write_trained`. It goes onto the Hugging
    Face directory that the first one started from, whose fingerprint it records.

    Args:
        names: names of the modalities; by default those in that directory.
        include_untrained: as in `write_hf`, for modalities that the directory lacks.
        records: facts about the runs, for the model card.

    Returns whether it has a patch embedding that the directory lacks, so that only `load_umbrella` can put it there.

    Raises:
        CheckpointError: if `checkpoint` is not a run with adapters, or weights other than those of the patch embedding
            and the projector trained as a whole.
    """
    if not any(run.lora for run in checkpoint.runs):
        remedy = "export the whole model (without --adapter), or what trained (--trainable-only)"
        raise CheckpointError(f"{checkpoint.path}: not a run with LoRA adapters (model.lora); {remedy}")
    base = _plain(checkpoint.origin)
    of_base = {m for path in base.stored_tensors() if (m := modality_of(path))}
    untrained = {} if include_untrained else untrained_to_leave_out(checkpoint)
    left_out = {name: why for name, why in untrained.items() if name not in of_base}
    kept = checkpoint.config.modalities.keys() - left_out.keys()
    paths = _trained_paths(checkpoint)
    if unfit := [path for path in sorted(paths) if not is_saved_whole(path)]:
        remedy = (
            "an adapter has only factors, patch embedding and projector; export the whole model (without --adapter)"
        )
        raise CheckpointError([f"{checkpoint.path}: {path}: trained as a whole; {remedy}" for path in unfit])
    known = abstract_params(checkpoint.merged().config)[1]
    if kept - of_base or any(map(modality_of, paths)):  # PEFT replaces whole modules
        paths |= {path for path in known if modality_of(path)}
    if any(path.startswith(PROJECTOR) for path in paths):
        paths |= {path for path in known if path.startswith(PROJECTOR)}
    trained = _collect_trained(checkpoint, paths, left_out, names or tuple(stored_modalities(base.path)))
    check_new_folder(out)
    with new_folder(out) as part:
        write_adapter(part, trained, base.name)
        card = model_card(
            checkpoint.config,
            trained.modalities,
            out.name,
            base.name,
            trained.base_fingerprint,
            trained.template,
            tuple(trained.untrained),
            records,
            read_license(base.path / CARD),
            titles=read_titles(checkpoint.description),
            parts=stored_parts(checkpoint.description),
            adapter=checkpoint.adapter_name,
            form="adapter",
        )
        (part / CARD).write_text(card, encoding="utf-8")
    return bool(kept - of_base)


def _plain(origin: Checkpoint) -> Checkpoint:
    """Return the checkpoint that runs started from without the adapter that was put onto it (`model.adapter`)."""
    return replace(origin, patch_embed=None) if isinstance(origin, HfCheckpoint) else origin


def _applied(origin: Checkpoint) -> Trainable | None:
    """Return the adapter that was put onto the checkpoint that runs started from."""
    return open_trained(origin.patch_embed) if isinstance(origin, HfCheckpoint) and origin.patch_embed else None


def _trained_paths(checkpoint: Checkpoint) -> set[str]:
    """Return the parameters, without adapters, that the runs of a checkpoint trained or the adapter below replaced.

    Raises CheckpointError if it is not a run.
    """
    if not checkpoint.runs:
        raise CheckpointError(f"{checkpoint.path}: not a run, so it does not say what was trained; name a run")
    applied = _applied(checkpoint.origin)
    paths = {path for run in checkpoint.runs for path in run.trained_paths if not adapted_weight(path)}
    entries = map_tensors(checkpoint.config) if applied else []
    return paths | {entry.path for entry in entries if applied and entry.name in applied.tensors}


def _collect_trained(
    checkpoint: Checkpoint, paths: Collection[str], left_out: Collection[str], names: Sequence[str] | None
) -> Trainable:
    """Collect what the runs of a checkpoint trained, on top of the Hugging Face weights that the first started from.

    Adapters of several runs for one weight become one, whose rank is their sum.

    Args:
        paths: parameters to collect as a whole, with the adapters merged.
        left_out: modalities to leave out.
        names: names of the modalities, as in `export_names`.
    """
    kept = {name: modality for name, modality in checkpoint.config.modalities.items() if name not in left_out}
    renamed = export_names(kept, names)
    config = replace(checkpoint.config, modalities=kept)
    merged = checkpoint.merged().tensors()
    tensors = hub_tensors({p: merged[p] for p in paths if modality_of(p) not in left_out}, config, renamed)
    applied = _applied(checkpoint.origin)
    adapters: list[tuple[Mapping[str, Tensor], Mapping[str, float]]] = []
    if applied is not None and checkpoint.runs[0].lora is None:  # else the first run trained it on
        adapters.append((applied.tensors, applied.scales))
    for run in checkpoint.runs:
        if run.lora is not None:
            factors = {path: leaf for path, leaf in run.trained().items() if adapted_weight(path)}
            named = hub_tensors(factors, config, renamed)
            adapters.append((named, {w: run.lora.scale for name in named if (w := adapted_weight(name))}))
    scales: dict[str, float] = {}
    for weight in dict.fromkeys(weight for _, own in adapters for weight in own):
        if weight in tensors:
            continue
        a, b = adapter_paths(weight)
        factors_of = [(named[a], named[b], own[weight]) for named, own in adapters if weight in own]
        tensors[a], tensors[b], scales[weight] = factors_of[0]
        if len(factors_of) > 1:
            tensors[a] = Tensor.from_array(np.concatenate([a.read() for a, _, _ in factors_of], axis=0))
            parts = [b.read() * np.float32(scale / scales[weight]) for _, b, scale in factors_of]
            tensors[b] = Tensor.from_array(np.concatenate(parts, axis=1))
    return Trainable(
        tensors,
        {renamed[m]: modality for m, modality in kept.items()},
        _plain(checkpoint.origin).fingerprint,
        checkpoint.template,
        {renamed.get(name, name): why for name, why in checkpoint.untrained.items() if name not in left_out},
        scales,
    )
