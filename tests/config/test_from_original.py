"""Tests of converting configurations of the original system: no key is lost silently, and the result loads."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
from ruamel.yaml import YAML

from umbrella_jax.config.from_original import Conversion, render
from umbrella_jax.config.load import load_config, load_original, parse_config
from umbrella_jax.config.schema import AugmentConfig
from umbrella_jax.errors import ConfigError, visible
from umbrella_jax.io.reading import read_yaml

ORIGINAL = """
wandb: {API_KEY: not-for-your-eyes, project: umbrella}
seed: 1234
dataset:
  train_size: 0.8
  val_size: 0.1
  test_size: 0.1
  add_context: False
  T1: {target: [sex], img_size: [96, 96, 96], study_sample: [ABCD], meta_dir: [/m.csv], img_dir: [/sMRI]}
  rsfMRI: {img_size: [96, 96, 96, 24], sequence_length: 24, stride_between_seq: 1, stride_within_seq: 1,
           input_scaling_method: znorm_minback, shuffle_time_sequence: False, dtype: float16,
           limit_training_samples: Null, balanced_training_samples: False}
  FA: {img_size: [96, 96, 96]}
model: {hf_name: llava-hf/llava-interleave-qwen-0.5b-hf, T1: {patch_size: [10, 10, 10]},
        rsfMRI: {patch_size: [16, 16, 16, 3]}}
trainer: {max_epochs: 50, learning_rate: 0.00005, warmup_steps: 500, weight_decay: 0.01, per_device_batch_size: 2,
          gradient_accumulation_steps: 4, gradient_checkpointing: True, mixed_precision: bf16, logging_steps: 1,
          ckpt_dir: results/t1, resume_training: False, lr_scheduler_type: linear, optim: adamw_torch,
          max_grad_norm: 1.0, adam_beta2: 0.95, eval_steps: 100, save_steps: 50, save_total_limit: 3,
          dataloader_num_workers: 8, report_to: wandb, warmup_ratio: 0.1, something_new: {deep: 3}}
"""


def write(tmp_path: Any, text: str) -> Any:
    path = tmp_path / "original.yaml"
    path.write_text(text)
    return path


def leaves(data: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


LEAVES = list(leaves(YAML(typ="safe").load(ORIGINAL)))


def another(value: Any) -> Any:
    """A value that differs, of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [another(value[0]), *value[1:]]
    return f"{value}-other" if isinstance(value, str) else 7 if value is None else value * 2


def test_values(tmp_path: Any) -> None:
    conversion = load_original(write(tmp_path, ORIGINAL))
    mapping, notes = conversion.mapping, conversion.notes
    run = parse_config(mapping)
    assert run.seed == 1234
    assert run.output_dir == "results/t1"
    assert run.model.base == "llava-hf/llava-interleave-qwen-0.5b-hf"
    assert list(run.model.modalities) == ["T1", "rsfMRI"]
    t1, fmri = run.model.modalities.values()
    assert (t1.size, t1.patch, t1.orientation, t1.scaling) == ((96, 96, 96), (10, 10, 10), "as_stored", "znorm")
    assert (t1.aliases, fmri.aliases) == (("dMRI",), ())  # diffusion maps pass through T1 there
    assert any(note.startswith("model.modalities.T1.aliases: [dMRI]: assumed: the original feeds") for note in notes)
    assert (fmri.size, fmri.patch, fmri.scaling) == ((96, 96, 96, 24), (16, 16, 16, 3), "znorm_minback")
    assert (t1.mode, t1.spacing, fmri.mode, fmri.spacing) == ("resize", None, "pad", None)
    assert (run.model.compute_dtype, run.model.frozen_dtype, run.model.remat) == ("bfloat16", "bfloat16", "full")
    assert (run.data.threads, run.data.template) == (8, "original")
    assert run.data.augment == AugmentConfig(flip_any_axis=0.5)
    assert any(note.startswith("data.augment.flip_any_axis: 0.5: assumed: the original flips") for note in notes)
    assert (run.train.epochs, run.train.learning_rate, run.train.warmup_steps) == (50, 5e-5, 500)
    assert (run.train.batch_size, run.train.accumulate_steps, run.train.betas) == (2, 4, (0.9, 0.95))
    assert (run.train.eval_steps, run.train.save_steps, run.train.wandb) == (100, 50, True)
    assert run.train.groups["patch_embed"].weight_decay == 0.01
    assert "trainer.something_new.deep: dropped: unknown to umbrella-jax" in notes


@pytest.mark.parametrize(("path", "value"), LEAVES, ids=[".".join(path) for path, _ in LEAVES])
def test_no_key_is_lost(tmp_path: Any, path: tuple[str, ...], value: Any) -> None:
    """Every key is named in the notes, or another value of it changes the run or is refused."""
    conversion = load_original(write(tmp_path, ORIGINAL))
    mapping, notes = conversion.mapping, conversion.notes
    if any(note.startswith(".".join(path) + ":") for note in notes):
        return
    changed = YAML(typ="safe").load(ORIGINAL)
    section = changed
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = another(value)
    file = tmp_path / "changed.yaml"
    YAML(typ="safe").dump(changed, file)
    try:
        changed_mapping = load_original(file).mapping
    except ConfigError:
        return
    assert changed_mapping != mapping


def test_only_3d_volumes_are_flipped(tmp_path: Any) -> None:
    text = "{dataset: {fMRI: {img_size: 64, sequence_length: 20}}, model: {fMRI: {patch_size: [16, 16, 16, 4]}}}"
    conversion = load_original(write(tmp_path, text))
    mapping, notes = conversion.mapping, conversion.notes
    assert parse_config(mapping).data.augment == AugmentConfig()
    assert not any("flip" in note for note in notes)


def test_rendered_loads(tmp_path: Any) -> None:
    conversion = load_original(write(tmp_path, ORIGINAL))
    mapping, notes = conversion.mapping, conversion.notes
    path = tmp_path / "run.yaml"
    path.write_text(render(conversion))
    assert load_config(path) == parse_config(copy.deepcopy(mapping))
    assert all(f"# {note}" in path.read_text() for note in notes)


def test_secrets_are_shown_nowhere(tmp_path: Any) -> None:
    conversion = load_original(write(tmp_path, ORIGINAL))
    notes = conversion.notes
    assert "wandb.API_KEY: dropped: keys come from the environment only" in notes
    assert "not-for-your-eyes" not in render(conversion)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shuffle_time_sequence: False", "shuffle_time_sequence: True", "shuffle_time_sequence: True has no counter"),
        ("lr_scheduler_type: linear", "lr_scheduler_type: polynomial", "expected one of linear, cosine, constant"),
        ("mixed_precision: bf16", "mixed_precision: fp8", "expected bf16, fp16 or no"),
        ("sequence_length: 24", "sequence_length: 20", "20 frames, but dataset.rsfMRI.img_size says 24"),
        ("patch_size: [10, 10, 10]", "patch_size: [10, 10]", "expected 3 numbers"),
        ("znorm_minback", "zscore", "scaling"),
    ],
)
def test_refused(tmp_path: Any, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_original(write(tmp_path, ORIGINAL.replace(old, new)))


FLAT = """
seed: 1234
model_name: llava-hf/llava-interleave-qwen-0.5b-hf
T1_img_size: [96, 96, 96]
T1_patch_size: [10, 10, 10]
rsfMRI_img_size: [96, 96, 96, 24]
rsfMRI_patch_size: [16, 16, 16, 3]
batch_size: 2
learning_rate: 0.00005
num_epochs: 50
max_seq_length: 2048
"""
NESTED = """
seed: 1234
dataset: {T1: {img_size: [96, 96, 96]}, rsfMRI: {img_size: [96, 96, 96, 24]}}
model: {hf_name: llava-hf/llava-interleave-qwen-0.5b-hf, T1: {patch_size: 10}, rsfMRI: {patch_size: [16, 16, 16, 3]}}
trainer: {per_device_batch_size: 2, learning_rate: 0.00005, max_epochs: 50}
"""


def test_both_forms_mean_the_same(tmp_path: Any) -> None:
    assert load_config(write(tmp_path, FLAT)) == load_config(write(tmp_path, NESTED))


def test_sizes_without_a_name_are_those_of_the_modality(tmp_path: Any) -> None:
    run = load_config(write(tmp_path, "{modality: rsfMRI, img_size: [8, 8, 8, 4], patch_size: [4, 4, 4, 2]}"))
    assert (run.model.modalities["rsfMRI"].grid, run.data.modality) == ((2, 2, 2, 2), "rsfMRI")


def printed(path: Any, **overrides: Any) -> list[str]:
    """Return the printed lines about a file of the original; `__` in a name stands for a dot."""
    lines: list[str] = []
    load_config(path, {key.replace("__", "."): value for key, value in overrides.items()}, say=lines.append)
    return "\n".join(lines).splitlines()


def test_the_table_says_what_is_read_assumed_and_dropped(tmp_path: Any) -> None:
    lines = printed(write(tmp_path, ORIGINAL.replace("mixed_precision: bf16, ", "")), data__eval="eval.json")
    text = re.sub(r"\s+", " ", "\n".join(lines))
    assert "train.epochs: 50 trainer.max_epochs" in text
    assert "model.modalities.T1: {size: [96, 96, 96], patch: [10, 10, 10]} dataset.T1, model.T1" in text
    assumed = text[text.index("assumed: ") :]
    assert "model.compute_dtype=bfloat16, " in assumed  # the original's default
    assert "train.best_metric=eval_loss" in assumed
    assert any("trainer.logging_steps: dropped: every update is logged" in line for line in lines)
    assert "trainer.per_device_batch_size: train.batch_size is over all devices, not per" in lines
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)


TRAINER = """
load_best_model_at_end: true
metric_for_best_model: accuracy
early_stopping_patience: 3
warmup_ratio: 0.1
lr_scheduler_type: cosine
bf16: false
"""


def test_keys_of_hugging_faces_trainer_are_read(tmp_path: Any) -> None:
    path = write(tmp_path, FLAT + TRAINER)
    train = load_config(path, {"data.eval": "eval.json"}).train
    assert (train.schedule, train.warmup_steps, train.warmup_ratio) == ("cosine", 0, 0.1)
    assert (train.keep_best, train.best_metric) == (1, "eval_accuracy")
    assert train.early_stopping is not None
    assert (train.early_stopping.metric, train.early_stopping.patience) == ("eval_accuracy", 3)
    assert load_config(path).model.compute_dtype == "float32"
    lines = printed(path)
    assert "load_best_model_at_end, metric_for_best_model, early_stopping_patience: dropped:" in lines
    assert "  there are no evaluation data (--eval-data PATH)" in lines


def test_a_constant_schedule_has_no_warm_up(tmp_path: Any) -> None:
    train = load_config(write(tmp_path, f"{FLAT}warmup_steps: 9\nlr_scheduler_type: constant")).train
    assert (train.schedule, train.warmup_steps) == ("constant", 0)


def test_a_flag_replaces_a_key_and_its_fault(tmp_path: Any) -> None:
    path = write(tmp_path, NESTED.replace("max_epochs: 50", "max_epochs: many, mixed_precision: bf16"))
    with pytest.raises(ConfigError, match=rf"{path}: trainer\.max_epochs: train\.epochs: expected a number"):
        load_config(path)
    lines = printed(path, train__epochs=10, model__compute_dtype="float32")
    assert "trainer.max_epochs: dropped: a flag sets it" in lines
    assert not any("train.epochs" in line or "compute_dtype" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FLAT.replace("0.00005", "fast"), "learning_rate: train.learning_rate: expected a number, got 'fast'"),
        (FLAT.replace("[10, 10, 10]", "[10, 10]"), "T1_patch_size: model.modalities.T1: patch (10, 10): expected 3"),
        (
            FLAT.replace("batch_size: 2", "batch_size: -2"),
            "batch_size: train: batch_size: expected 1 to 65,536, got -2",
        ),
        (f"{FLAT}gradient_checkpointing: maybe", "gradient_checkpointing: expected true or false, got 'maybe'"),
        (f"{FLAT}max_steps: 100", "max_steps: 100 has no counterpart: set the length in passes over the data"),
        ("{model_name: llava, T1_img_size: 96}", "no modality has both NAME_img_size and NAME_patch_size"),
        (
            "{model: {modalities: {T1: {size: [8, 8, 8], patch: [4, 4, 4]}}}, learning_rate: 0.1, trainer: {}}",
            "mixes two kinds of keys: model.modalities of umbrella-jax, and of the PyTorch system learning_rate "
            "(train.learning_rate here), trainer; keep one kind",
        ),
    ],
)
def test_faults_name_the_key_and_the_file(tmp_path: Any, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}: {message}" in str(caught.value)


@pytest.mark.parametrize("text", ["seed: 1", "[1, 2]", "a: {", "dataset: {T1: {img_size: [8, 8, 8]}}"])
def test_not_a_configuration(tmp_path: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"original\.yaml"):
        load_original(write(tmp_path, text))


def test_short_forms(tmp_path: Any) -> None:
    text = """
    dataset: {T1: {img_size: 96}, fMRI: {img_size: 64, sequence_length: 20}}
    model: {T1: {patch_size: 16}, fMRI: {patch_size: [16, 16, 16, 4]}}
    trainer: {fp16: True, report_to: [tensorboard, comet], ckpt_dir: "./hf_results/{}/last.ckpt"}
    """
    conversion = load_original(write(tmp_path, text))
    mapping, notes = conversion.mapping, conversion.notes
    run = parse_config(mapping)
    assert run.model.modalities["T1"].grid == (6, 6, 6)
    assert run.model.modalities["fMRI"].size == (64, 64, 64, 20)
    assert run.output_dir is None
    assert (run.train.tensorboard, run.train.wandb) == (True, False)
    assert "trainer.report_to: of ['tensorboard', 'comet'], only tensorboard and wandb have a counterpart" in notes
    assert any(note.startswith("trainer.ckpt_dir: dropped") for note in notes)
    assert "trainer.fp16: fp16 becomes bfloat16, which needs no loss scaling" in notes


def test_invisible_characters_survive_the_terminal(tmp_path):
    """A no-break space of a path is escaped as YAML has it, and so read back."""
    mapping = {"model": {"base": "a\u00a0b/\u202ec"}}
    conversion = Conversion(mapping=mapping, sources={}, assumed={}, remarks=[("a", "note\u2028seed: 3")])
    text = render(conversion)
    assert visible(text) == text
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == mapping


def test_an_unknown_section_of_a_flag_is_not_blamed_on_the_file(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--set: trainers: no such key"):
        load_config(write(tmp_path, FLAT), {"trainers.max_epochs": 3}, {"trainers.max_epochs": "--set"})


def test_a_flag_with_the_original_key_names_ours(tmp_path: Any) -> None:
    flags = dict.fromkeys(["trainer.max_epochs", "lr"], "--set")
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, FLAT), {"trainer.max_epochs": 3, "lr": 1}, flags)
    assert caught.value.faults == (
        "--set: trainer.max_epochs: a key of the PyTorch system; write train.epochs",
        "--set: lr: a key of the PyTorch system; write train.learning_rate",
    )


def test_a_field_that_a_flag_left_out_is_not_blamed_on_the_file() -> None:
    key = "train.early_stopping.patience"
    with pytest.raises(ConfigError, match=r"^--set: train\.early_stopping\.metric: missing; expected a value"):
        load_config("t1_0.5b", {key: 3}, {key: "--set"})


def test_names_no_flag_that_only_shares_a_word_with_the_fault() -> None:
    flags = {"data.train": "--train-data", "model.lora.rank": "--set"}
    with pytest.raises(ConfigError, match=r"t1_0.5b.yaml, --set: model.lora: its adapters do not train"):
        load_config("t1_0.5b", {"data.train": "a.json", "model.lora.rank": 2}, flags)
