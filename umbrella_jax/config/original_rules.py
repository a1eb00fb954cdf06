"""The table of rules by which the original PyTorch system's settings become ours.

It covers its nested YAML, the flat names of its flags and config attributes, and the names of Hugging Face's
TrainingArguments.
"""

from collections.abc import Callable, Mapping
from typing import Any

from umbrella_jax.errors import ConfigError
from umbrella_jax.io.reading import quoted

Rule = Callable[[Any], tuple[dict[str, Any], str | None]]
"""Takes a key's value; returns {dotted key here: value} and a remark, or raises ConfigError."""
DROPPED = "dropped: "
"""Start of the remark about a key that has no counterpart here."""


def _to(target: str, note: str | None = None) -> Rule:
    return lambda value: ({target: value}, note)


def _drop(reason: str) -> Rule:
    return lambda value: ({}, f"{DROPPED}{reason}")


def _only(*allowed: Any, reason: str) -> Rule:
    """Return the rule for a key that must have one of the `allowed` values; others have no counterpart here."""

    def rule(value: Any) -> tuple[dict[str, Any], str | None]:
        if value not in allowed:
            raise ConfigError(f"{quoted(value)} has no counterpart: {reason}")
        return {}, None

    return rule


def _is_true(value: Any) -> bool:
    """Read a boolean, also in the words that YAML 1.1 has for it."""
    words = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
    if not isinstance(value, bool | str) or (isinstance(value, str) and value.lower() not in words):
        raise ConfigError(f"expected true or false, got {quoted(value)}")
    return value if isinstance(value, bool) else words[value.lower()]


def _switch(true: Mapping[str, Any], false: Mapping[str, Any]) -> Rule:
    """Return the rule for a boolean that sets these keys."""
    return lambda value: (dict(true if _is_true(value) else false), None)


def _mixed_precision(value: Any) -> tuple[dict[str, Any], str | None]:
    if value in (False, "no", "none", "fp32", "32", 32):  # YAML 1.1 read `no` as False
        return {"model.compute_dtype": "float32"}, None
    if value in ("bf16", "fp16"):
        types = {"model.compute_dtype": "bfloat16", "model.frozen_dtype": "bfloat16"}
        return types, None if value == "bf16" else "fp16 becomes bfloat16, which needs no loss scaling"
    raise ConfigError(f"expected bf16, fp16 or no, got {quoted(value)}")


def _type_flag(name: str) -> Rule:
    """Return the rule for `bf16: True` or `fp16: True` of Hugging Face's TrainingArguments."""
    return lambda value: _mixed_precision(name) if _is_true(value) else ({}, None)


def _schedule(value: Any) -> tuple[dict[str, Any], str | None]:
    names = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
    if not isinstance(value, str) or value not in names:
        raise ConfigError(f"{quoted(value)} has no counterpart; expected one of {', '.join(names)}")
    return {"train.schedule": names[value]}, None


def _output_dir(value: Any) -> tuple[dict[str, Any], str | None]:
    if isinstance(value, str) and ("{" in value or value.endswith((".ckpt", ".pt", ".pth"))):
        return {}, f"{DROPPED}{quoted(value)} is a template or a file; set output_dir to a directory"
    return {"output_dir": value}, None


def _report_to(value: Any) -> tuple[dict[str, Any], str | None]:
    loggers = {str(v) for v in (value if isinstance(value, list) else [value])}
    known = ("tensorboard", "wandb")
    others = loggers - {*known, "none", "False"}
    note = f"of {value}, only {' and '.join(known)} have a counterpart" if others else None
    asked = {f"train.{name}": True for name in known if name in loggers}
    return asked or {f"train.{name}": False for name in known}, note


def _best_metric(value: Any) -> tuple[dict[str, Any], str | None]:
    name = str(value)
    return {"train.best_metric": name if name.startswith("eval_") else f"eval_{name}"}, None


_SPLIT = _drop("the split is made by the files that data.train and data.eval name")
_IN_FILES = _drop("conversation files hold the text, the labels and the image paths")
_SAMPLES = _drop("a run uses every conversation of its files")
_BATCH = _to("train.batch_size", "train.batch_size is over all devices, not per device")
_TRAIN, _EVAL = _to("data.train"), _to("data.eval")

RULES: dict[str, Rule] = {
    "seed": _to("seed"),
    "modality": lambda value: (
        ({}, f"{DROPPED}the conversation files say which modalities are mixed")
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
    "trainer.lr_scheduler_type": _schedule,
    "trainer.warmup_steps": _to("train.warmup_steps"),
    "trainer.warmup_ratio": _to("train.warmup_ratio"),
    "trainer.weight_decay": _to("train.groups.patch_embed.weight_decay"),
    "trainer.optim": _only("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", reason="the optimiser is AdamW"),
    "trainer.adam_beta1": _to("train.betas.0"),
    "trainer.adam_beta2": _to("train.betas.1"),
    "trainer.adam_epsilon": _to("train.eps"),
    "trainer.max_grad_norm": lambda value: ({"train.clip_norm": value or None}, None),  # 0: no clipping
    "trainer.per_device_batch_size": _BATCH,
    "trainer.per_device_train_batch_size": _BATCH,
    "trainer.per_device_eval_batch_size": _drop("evaluation uses train.batch_size; predict has --batch-size"),
    "trainer.gradient_accumulation_steps": _to("train.accumulate_steps"),
    "trainer.gradient_checkpointing": _switch({"model.remat": "full"}, {"model.remat": "none"}),
    "trainer.mixed_precision": _mixed_precision,
    "trainer.bf16": _type_flag("bf16"),
    "trainer.fp16": _type_flag("fp16"),
    "trainer.eval_steps": _to("train.eval_steps"),
    "trainer.save_steps": _to("train.save_steps"),
    "trainer.save_total_limit": _to("train.keep_latest"),
    "trainer.load_best_model_at_end": _switch(
        {"train.keep_best": 1, "train.best_metric": "eval_loss"}, {"train.keep_best": 0}
    ),
    "trainer.metric_for_best_model": _best_metric,
    "trainer.early_stopping_patience": lambda value: (
        {"train.early_stopping.patience": value, "train.early_stopping.metric": "eval_loss"},
        None,
    ),
    "trainer.early_stopping_threshold": _to("train.early_stopping.min_delta"),
    "trainer.output_dir": _output_dir,
    "trainer.ckpt_dir": _output_dir,
    "trainer.use_wandb": _switch({"train.wandb": True}, {"train.wandb": False}),
    "trainer.no_wandb": _switch({"train.wandb": False}, {}),
    "trainer.task_filter": _to("data.task_filter"),
    "trainer.max_steps": _only(-1, reason="set the length in passes over the data, train.epochs (--epochs 0.5)"),
    "trainer.mask_human_turns": _only(True, reason="only answers are supervised"),
    "trainer.mask_padding_tokens": _only(True, reason="padding is never supervised"),
    "trainer.task_type_weights": _only({}, reason="every supervised token has the same weight"),
    "trainer.label_smoothing_factor": _only(0, reason="the loss is the cross-entropy"),
    "trainer.dataloader_num_workers": _to("data.threads"),
    "trainer.report_to": _report_to,
    "wandb.project": _drop("comes from the environment: WANDB_PROJECT; train.wandb turns logging on"),
    "wandb.entity": _drop("comes from the environment: WANDB_ENTITY; train.wandb turns logging on"),
    "wandb.name": _drop("comes from the environment: WANDB_NAME; train.wandb turns logging on"),
}
"""{key of the nested YAML: rule}; `*` is a modality's name."""
_REASONS: dict[str, str] = {
    "logging_steps logging_strategy logging_first_step log_level disable_tqdm log_turn_distribution "
    "log_image_statistics log_memory_usage": "every update is logged",
    "logging_dir": "logs are in the run's directory, output_dir",
    "run_name": "the name of a run is that of its directory, output_dir",
    "eval_strategy evaluation_strategy do_eval eval_on_start": "train.eval_steps says when; always at the end",
    "eval_output_dir": "answers are in the run's directory: predictions/",
    "save_strategy": "train.save_steps says when; always at the end",
    "greater_is_better": "which end is best follows from the metric",
    "resume_training resume_from_checkpoint": "--resume continues a run",
    "do_train do_predict": "commands do one thing each: train, predict",
    "overwrite_output_dir": "a directory that holds a run is never overwritten",
    "deepspeed fsdp fsdp_config local_rank ddp_find_unused_parameters ddp_backend ddp_timeout num_gpus gpus": (
        "the run uses all devices; --mesh says how (docs/clusters.md)"
    ),
    "device no_cuda use_cpu": "JAX_PLATFORMS=cpu, cuda or tpu chooses the devices",
    "max_seq_length max_length": "a conversation longer than data.max_length is refused, never cut",
    "max_images max_images_per_sample": "every image of a conversation is used",
    "enable_memory_aware_batching memory_budget_gb max_batch_tokens auto_find_batch_size": (
        "the batch size is fixed; `umbrella-jax plan` says what fits"
    ),
    "enable_dummy_loss dummy_loss_weight": "a modality that is not in a batch stays as it is",
    "enable_task_aware_loss normalize_gradients_by_batch_size base_batch_size": (
        "the loss is the mean over supervised tokens"
    ),
    "tokenizer_name": "the tokenizer is the base's",
    "tf32": "JAX_DEFAULT_MATMUL_PRECISION says how float32 products are rounded",
    "torch_compile": "every step is compiled",
    "data_seed": "seed is the seed of every random draw",
    "full_determinism": "runs are deterministic",
    "push_to_hub hub_model_id": "a run uploads nothing",
    "dataloader_pin_memory dataloader_drop_last dataloader_persistent_workers remove_unused_columns group_by_length "
    "gradient_checkpointing_kwargs optim_args": "has no counterpart and needs none",
}
"""{words of TrainingArguments and of the original's attributes: why they are dropped}."""
RULES |= {f"trainer.{name}": _drop(reason) for names, reason in _REASONS.items() for name in names.split()}
_OTHER_NAMES: dict[str, str] = {
    **dict.fromkeys(("model_name", "model_name_or_path", "base_model"), "model.hf_name"),
    **dict.fromkeys(("train_json", "train_file", "train_data_path"), "dataset.train_data"),
    **dict.fromkeys(("eval_json", "validation_file", "eval_data_path", "val_data"), "dataset.eval_data"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "trainer.per_device_batch_size"),
    "eval_batch_size": "trainer.per_device_eval_batch_size",
    **dict.fromkeys(("epochs", "num_epochs"), "trainer.max_epochs"),
    "lr": "trainer.learning_rate",
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps"), "trainer.gradient_accumulation_steps"),
    **dict.fromkeys(("clip_grad", "grad_clip", "max_norm"), "trainer.max_grad_norm"),
    "wandb": "trainer.use_wandb",
    "num_workers": "trainer.dataloader_num_workers",
    "mask_user_turns": "trainer.mask_human_turns",
    **{f"wandb_{name}": f"wandb.{name}" for name in ("project", "entity", "name")},
}
FLAT = _OTHER_NAMES | {key.rpartition(".")[2]: key for key in RULES if not key.startswith(("dataset.*", "wandb."))}
"""{flat name: key of the nested YAML}."""


def settings(name: str, value: Any) -> tuple[dict[str, Any], str | None] | None:
    """Return what a flat name of the original or of TrainingArguments sets here and a remark; None for other names.

    Raises ConfigError for a value without counterpart.
    """
    rule = RULES.get(FLAT.get(name, name))
    return rule(value) if rule else None
