"""Convert a configuration of the original PyTorch system: every key is carried over or reported as dropped.

A setting without counterpart here is an error, so a run never differs silently.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from umbrella_jax.config.load import parse_config
from umbrella_jax.config.schema import SECRET, TrainConfig, resolve_modality
from umbrella_jax.errors import ConfigError, visible
from umbrella_jax.io.reading import quoted, read_yaml

# A rule takes a key's value. It returns {dotted key here: value} and a note, or raises ConfigError.
_Rule = Callable[[Any], tuple[dict[str, Any], str | None]]


def _to(target: str, note: str | None = None) -> _Rule:
    return lambda value: ({target: value}, note)


def _drop(reason: str) -> _Rule:
    return lambda value: ({}, f"dropped: {reason}")


def _only(*allowed: Any, reason: str) -> _Rule:
    """Return the rule for a key that must have one of the `allowed` values; others have no counterpart here."""

    def rule(value: Any) -> tuple[dict[str, Any], str | None]:
        if value not in allowed:
            raise ConfigError(f"{quoted(value)} has no counterpart: {reason}")
        return {}, None

    return rule


def _mixed_precision(value: Any) -> tuple[dict[str, Any], str | None]:
    if value in (False, "no", "none", "fp32", "32"):  # YAML 1.1 read `no` as False
        return {"model.compute_dtype": "float32"}, None
    if value in ("bf16", "fp16"):
        types = {"model.compute_dtype": "bfloat16", "model.frozen_dtype": "bfloat16"}
        return types, None if value == "bf16" else "fp16 becomes bfloat16, which needs no loss scaling"
    raise ConfigError(f"expected bf16, fp16 or no, got {quoted(value)}")


def _flag(name: str) -> _Rule:
    """Return the rule for `bf16: True` or `fp16: True` of Hugging Face's TrainingArguments."""
    return lambda value: _mixed_precision(name) if value else ({}, None)


def _output_dir(value: Any) -> tuple[dict[str, Any], str | None]:
    if isinstance(value, str) and ("{" in value or value.endswith((".ckpt", ".pt", ".pth"))):
        return {}, f"dropped: {quoted(value)} is a template or a file; set output_dir to a directory"
    return {"output_dir": value}, None


def _report_to(value: Any) -> tuple[dict[str, Any], str | None]:
    loggers = {str(v) for v in (value if isinstance(value, list) else [value])}
    known = ("tensorboard", "wandb")
    others = loggers - {*known, "none", "False"}
    note = f"of {value}, only {' and '.join(known)} have a counterpart" if others else None
    return {f"train.{name}": name in loggers for name in known}, note


_SPLIT = _drop("the split is made by the files that data.train and data.eval name")
_IN_FILES = _drop("conversation files hold the text, the labels and the image paths")
_SAMPLES = _drop("a run uses every conversation of its files")
_CHECKPOINTS = _drop("which checkpoints are kept is not configured")
_TRAIN, _EVAL = _to("data.train"), _to("data.eval")

_RULES: dict[str, _Rule] = {
    "seed": _to("seed"),
    "modality": lambda value: (
        ({}, "dropped: the conversation files say which modalities are mixed")
        if "_" in str(value)
        else _to("data.modality")(value)
    ),
    "dataset.train_size": _SPLIT,
    "dataset.val_size": _SPLIT,
    "dataset.test_size": _SPLIT,
    "dataset.add_context": _IN_FILES,
    "dataset.train_data": _TRAIN,
    "dataset.eval_data": _EVAL,
    "dataset.*.target": _IN_FILES,
    "dataset.*.study_sample": _IN_FILES,
    "dataset.*.meta_dir": _IN_FILES,
    "dataset.*.img_dir": _drop(
        "conversation files hold the image paths; data.image_root says where relative ones start"
    ),
    "dataset.*.data_root": _drop(
        "conversation files hold the image paths; data.image_root says where relative ones start"
    ),
    "dataset.*.json_file": _drop("one file holds every modality's conversations: data.train, data.eval"),
    "dataset.*.label_scaling_method": _IN_FILES,
    "dataset.*.dtype": _drop("volumes are read as float32"),
    "dataset.*.dataset_split_num": _SPLIT,
    "dataset.*.shuffle_time_sequence": _only(False, reason="frames are read in their order"),
    "dataset.*.limit_training_samples": _SAMPLES,
    "dataset.*.limit_validation_samples": _SAMPLES,
    "dataset.*.limit_test_samples": _SAMPLES,
    "dataset.*.balanced_training_samples": _SAMPLES,
    "dataset.*.balanced_validation_samples": _SAMPLES,
    "dataset.*.balanced_test_samples": _SAMPLES,
    "model.hf_name": _to("model.base"),
    "trainer.train_json_path": _TRAIN,
    "trainer.eval_json_path": _EVAL,
    "trainer.max_epochs": _to("train.epochs"),
    "trainer.num_train_epochs": _to("train.epochs"),
    "trainer.learning_rate": _to("train.learning_rate"),
    "trainer.lr_scheduler_type": _only("linear", reason="the schedule is linear warm-up, then linear decay to 0"),
    "trainer.warmup_steps": _to("train.warmup_steps"),
    "trainer.warmup_ratio": _drop("set train.warmup_steps, a number of updates"),
    "trainer.weight_decay": _to("train.groups.patch_embed.weight_decay"),
    "trainer.optim": _only("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", reason="the optimiser is AdamW"),
    "trainer.adam_beta1": _to("train.betas.0"),
    "trainer.adam_beta2": _to("train.betas.1"),
    "trainer.adam_epsilon": _to("train.eps"),
    "trainer.max_grad_norm": lambda value: ({"train.clip_norm": value or None}, None),  # 0: no clipping
    "trainer.per_device_batch_size": _to("train.batch_size", "train.batch_size is over all devices, not per device"),
    "trainer.per_device_train_batch_size": _to(
        "train.batch_size", "train.batch_size is over all devices, not per device"
    ),
    "trainer.per_device_eval_batch_size": _drop("evaluation uses train.batch_size"),
    "trainer.gradient_accumulation_steps": _to("train.accumulate_steps"),
    "trainer.gradient_checkpointing": lambda value: ({"model.remat": "full" if value else "none"}, None),
    "trainer.mixed_precision": _mixed_precision,
    "trainer.bf16": _flag("bf16"),
    "trainer.fp16": _flag("fp16"),
    "trainer.logging_steps": _drop("every update is logged"),
    "trainer.eval_steps": _to("train.eval_steps"),
    "trainer.save_steps": _to("train.save_steps"),
    "trainer.save_total_limit": _CHECKPOINTS,
    "trainer.load_best_model_at_end": _CHECKPOINTS,
    "trainer.metric_for_best_model": _CHECKPOINTS,
    "trainer.output_dir": _output_dir,
    "trainer.ckpt_dir": _output_dir,
    "trainer.resume_training": _drop("resuming is asked for when a run starts, not in its configuration"),
    "trainer.dataloader_num_workers": _to("data.threads"),
    "trainer.report_to": _report_to,
    "wandb.project": _drop("comes from the environment: WANDB_PROJECT; train.wandb turns logging on"),
    "wandb.entity": _drop("comes from the environment: WANDB_ENTITY; train.wandb turns logging on"),
    "wandb.name": _drop("comes from the environment: WANDB_NAME; train.wandb turns logging on"),
}

_SIZE, _FRAMES, _PATCH = "dataset.{}.img_size", "dataset.{}.sequence_length", "model.{}.patch_size"
# carried over only for a modality that has both size and patch
_MODALITY_KEYS = {
    "input_scaling_method": "scaling",
    "stride_within_seq": "stride_within_seq",
    "stride_between_seq": "stride_between_seq",
}
_FLIP = (
    "data.augment.flip_any_axis: the original flips half of the 3D training volumes along a random axis, each image "
    "independently; here all images of a conversation flip together, also in 4D. A flip turns left into right: "
    "set it to 0 if any answer mentions a side"
)
_DIFFUSION = (
    "model.modalities.{}.aliases: [dMRI]: the original feeds diffusion maps through this patch embedding too; "
    "without the alias, dMRI is a modality of its own, to be configured"
)


def from_original(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Read a YAML file of the original system.

    Returns:
        The mapping for `parse_config`, and a note on each key that is dropped or changes its meaning.

    Raises:
        ConfigError: every fault: a file that is not YAML, a value without counterpart, no modality with both size and
            patch.
    """
    source = dict(_leaves(_read(path)))
    faults: list[str] = []
    notes: list[str] = []
    targets: dict[str, tuple[str, Any]] = {}

    def put(key: str, new: Mapping[str, Any]) -> None:
        for target, value in new.items():
            first, known = targets.setdefault(target, (key, value))
            if known != value:
                notes.append(f"{key}: dropped: {target} is taken from {first}")

    modalities: dict[str, dict[str, Any] | None] = {}
    nested = [key.split(".") for key in source if key.startswith(("dataset.", "model.")) and key.count(".") == 2]
    for _, modality, _ in nested:
        try:
            modalities[modality] = _geometry(source, modality)
        except ConfigError as error:
            faults.extend(error.faults)

    for key, value in source.items():
        *sections, last = key.split(".")
        name = sections[1] if len(sections) == 2 and sections[0] in ("dataset", "model") else ""
        geometry = modalities.get(name)
        rule = _RULES.get(f"{sections[0]}.*.{last}" if name else key)
        if SECRET.search(last):
            notes.append(f"{key}: dropped: keys come from the environment only")  # its value is shown nowhere
        elif value is None:
            notes.append(f"{key}: dropped: null, the default holds")
        elif name and key in [k.format(name) for k in (_SIZE, _FRAMES, _PATCH)]:
            if geometry is None:
                notes.append(f"{key}: dropped: the modality needs {_SIZE.format(name)} and {_PATCH.format(name)}")
        elif name and key in [f"dataset.{name}.{k}" for k in _MODALITY_KEYS]:
            if geometry is None:
                notes.append(f"{key}: dropped: the modality needs {_SIZE.format(name)} and {_PATCH.format(name)}")
            elif len(geometry["size"]) == 3 and last.startswith("stride"):
                notes.append(f"{key}: dropped: only 4D volumes have windows")
            else:
                geometry[_MODALITY_KEYS[last]] = value
        elif rule is None:
            notes.append(f"{key}: dropped: unknown to umbrella-jax")
        else:
            try:
                new, note = rule(value)
            except ConfigError as error:
                faults.extend(f"{key}: {fault}" for fault in error.faults)
            else:
                put(key, new)
                notes.extend([f"{key}: {note}"] if note else [])

    complete = {name: geometry for name, geometry in modalities.items() if geometry is not None}
    if not complete and not faults:
        faults.append(f"no modality has both {_SIZE.format('NAME')} and {_PATCH.format('NAME')}")
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    if any(len(geometry["size"]) == 3 for geometry in complete.values()):
        targets["data.augment.flip_any_axis"] = ("", 0.5)
        notes.append(_FLIP)
    if "dMRI" not in complete and (structural := resolve_modality("T1", complete)):
        complete[structural]["aliases"] = ["dMRI"]
        notes.append(_DIFFUSION.format(structural))
    notes.append(
        "data.template: original: as in the original, images come before the text, or at the markers of a turn that "
        "is a single string; headers of answers and system turns are learnt too"
    )
    flat = {"data.template": "original", **{target: value for target, (_, value) in targets.items()}}
    mapping = _nest(flat, complete)
    parse_config(mapping, str(path))
    return mapping, notes


def render(mapping: Mapping[str, Any], notes: list[str]) -> str:
    """Return the YAML of a run for `load_config`, below the notes as comments."""
    from ruamel.yaml import YAML

    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(mapping, out)
    if visible(out.getvalue()) != out.getvalue():  # write characters that a terminal hides as YAML's escapes
        yaml.allow_unicode, out = False, io.StringIO()
        yaml.dump(mapping, out)
    comments = [f"# {line}" for note in notes for line in note.splitlines()]
    return "\n".join([*comments, out.getvalue()])


def _read(path: str | Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping with the sections dataset, model and trainer")
    return data


def _leaves(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; a list is a value, and so is an empty section."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _geometry(source: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the fields of a modality as the original reads them, or None if size or patch is missing."""
    size, frames, patch = (source.get(key.format(name)) for key in (_SIZE, _FRAMES, _PATCH))
    if size is None or patch is None:
        return None
    for key, value in ((_SIZE, size), (_PATCH, patch)):
        if not isinstance(value, int | list):
            raise ConfigError(f"{key.format(name)}: expected a number or a list of numbers, got {quoted(value)}")
    size = [size] * 3 if isinstance(size, int) else list(size)
    if frames is not None and len(size) == 3:
        size = [*size, frames]
    if frames is not None and size[-1] != frames:
        raise ConfigError(f"{_FRAMES.format(name)}: {frames} frames, but {_SIZE.format(name)} says {size[-1]}")
    patch = [patch] * len(size) if isinstance(patch, int) else list(patch)
    return {"size": size, "patch": patch, "orientation": "as_stored"}


def _nest(flat: Mapping[str, Any], modalities: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted keys into sections, in the order of RunConfig's fields."""
    betas = [flat.get(f"train.betas.{i}", default) for i, default in enumerate(TrainConfig().betas)]
    if betas != list(TrainConfig().betas):
        flat = {**flat, "train.betas": betas}
    result: dict[str, Any] = {"model": {}, "data": {}, "train": {}}
    for key, value in {**flat, "model.modalities": dict(modalities)}.items():
        *parents, last = key.split(".")
        if last.isdigit():  # one of the two betas, merged above
            continue
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return {key: value for key, value in result.items() if value != {}}
