"""Every YAML in configs/ loads, and the full-size ones fit models of the real sizes, without a weight in memory."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.small_run import umbrella
from umbrella_jax.batch import Batch
from umbrella_jax.checkpoints.load import open_base
from umbrella_jax.config.load import dump_config, load_config
from umbrella_jax.config.schema import LOWER_IS_BETTER, EarlyStoppingConfig, Metric, TrainConfig, lower_is_better
from umbrella_jax.demo import make_base
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import abstract_params
from umbrella_jax.training import freeze
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import init_state, train_step

CONFIGS = Path(__file__).parents[2] / "configs"
FULL_SIZE = ("t1_0.5b", "rsfmri_0.5b", "joint_0.5b", "t1_7b", "t1_ov_0.5b", "t1_ov_7b")

# From the hub's config.json files: hidden size, MLP size, layers, heads, kv heads, words; patches and voxels per patch.
VISION = (1152, 4304, 26)
TEXT = {
    "0.5b": (1024, 2816, 24, 16, 16, 152_000),
    "7b": (4096, 11008, 32, 32, 32, 152_000),
    "ov_0.5b": (896, 4864, 24, 14, 2, 152_000),
    "ov_7b": (3584, 18944, 28, 28, 4, 152_128),
    "ov_72b": (8192, 29568, 80, 64, 8, 152_128),
}
TIED = ("0.5b", "ov_0.5b")
PATCHES = {"T1": (9 * 9 * 9, 10 * 10 * 10), "rsfMRI": (6 * 6 * 6 * 8, 16 * 16 * 16 * 3)}


def write_hub_config(directory: Path, size: str) -> Path:
    """Write only the config.json of llava-hf/llava-interleave-qwen-SIZE-hf or llava-onevision-qwen2-SIZE-ov-hf."""
    hidden, mlp, layers, heads, kv_heads, words = TEXT[size]
    tied = size in TIED
    onevision = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384]],
        "tie_word_embeddings": False,  # the 0.5b says otherwise in its text_config
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9",
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 151646,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": words,
        },
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | (onevision if size.startswith("ov_") else {})))
    return directory


def size_of(name: str) -> str:
    """Return the size of `TEXT` that a config is for, such as `ov_0.5b` for `t1_ov_0.5b`."""
    return name.partition("_")[2]


def expected_counts(size: str, modalities: list[str]) -> dict[str, int]:
    """Compute the number of parameters per component by hand."""
    e, m, layers = VISION
    d, f, text_layers, heads, kv_heads, words = TEXT[size]
    kv = d // heads * kv_heads
    return {
        "patch_embed": sum((PATCHES[name][1] + 1) * e + PATCHES[name][0] * e for name in modalities),
        "vision_tower": layers * (2 * 2 * e + 4 * (e * e + e) + (e * m + m) + (m * e + e)),
        "projector": (e * d + d) + (d * d + d),
        "language_model": words * d * (1 if size in TIED else 2)
        + text_layers * (2 * d + 2 * d * d + 2 * d * kv + d + 2 * kv + 3 * d * f)  # biases on q, k, v
        + d,
        "unused": 2 * e + (d if size.startswith("ov_") else 0),
    }


def test_these_are_there() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"tiny", *FULL_SIZE}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_loads(path: Path, tmp_path: Path) -> None:
    run = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(run))
    assert load_config(tmp_path / "again.yaml") == run
    groups = {"stage2_0.5b": ["patch_embed", "projector", "lora"], "stage1_stitched": ["patch_embed", "projector"]}
    assert list(run.train.groups) == groups.get(path.stem, ["patch_embed"])
    assert (run.model.lora is not None) == path.stem.startswith("stage2")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parameter_counts(name: str, tmp_path: Path) -> None:
    size = size_of(name)
    modalities = list(load_config(CONFIGS / f"{name}.yaml").model.modalities)
    base = write_hub_config(tmp_path / "base", size)
    printed = umbrella("inspect", "--config", CONFIGS / f"{name}.yaml", "--base", base)
    rows = re.findall(r"^(\w+) +[\d,]+ +([\d,]+) +\S+% +([\d,]+) +\S+%$", printed, re.MULTILINE)
    counts = {name: tuple(int(number.replace(",", "")) for number in numbers) for name, *numbers in rows}
    expected = expected_counts(size, modalities)
    trains = {"patch_embed": expected.pop("patch_embed")}
    assert counts == {
        "patch_embed": (trains["patch_embed"], 0),
        **{component: (0, count) for component, count in expected.items()},
        "total": (trains["patch_embed"], sum(expected.values())),
    }
    if name == "t1_0.5b":
        assert trains["patch_embed"] == (1000 + 1) * 1152 + 729 * 1152 == 1_992_960


def test_the_second_stage_continues_from_the_first(tmp_path: Path) -> None:
    first, second = (load_config(CONFIGS / f"stage{n}_0.5b.yaml") for n in (1, 2))
    assert second.model.base == first.output_dir
    assert second.model.modalities == first.model.modalities
    base = write_hub_config(tmp_path / "base", "0.5b")
    printed = umbrella("inspect", "--config", CONFIGS / "stage2_0.5b.yaml", "--base", base)
    rows = {row[0]: row[1:] for row in (line.replace(",", "").split() for line in printed.splitlines()) if row}
    d, f, layers, *_ = TEXT["0.5b"]
    expected = expected_counts("0.5b", ["T1"])
    adapters = layers * 16 * (4 * (d + d) + 3 * (d + f))
    assert adapters == 7_569_408
    assert rows["lora"] == [str(adapters), str(adapters), "100%", "0", "0%"]
    frozen = str(expected["language_model"])
    assert rows["language_model"] == [frozen, "0", "0%", frozen, "100%"]
    assert rows["total"][1] == str(expected["patch_embed"] + expected["projector"] + adapters)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_step_has_shapes(name: str, tmp_path: Path) -> None:
    """Trace a step at full size, with frozen weights in bfloat16 and optimiser state only for the patch embedding."""
    run = load_config(CONFIGS / f"{name}.yaml", {"model.base": str(write_hub_config(tmp_path / "base", size_of(name)))})
    graphdef, shapes = abstract_params(open_base(run).config)
    labels = freeze.label_params(list(shapes), list(run.train.groups))
    trainable, frozen = freeze.partition(shapes, labels)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in frozen.items()}
    optimizer = make_optimizer(run.train, labels)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), trainable)

    count = run.train.batch_size
    modalities = run.model.modalities
    positions = 64 + count * sum(modality.num_patches for modality in modalities.values())

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, count, *shape), dtype)

    batch = Batch(
        input_ids=array(positions),
        positions=array(positions),
        feature_idx=array(positions),
        lengths=array(),
        target_pos=array(8),
        target_ids=array(8),
        target_mask=array(8, dtype=bool),
        volumes={name: array(*modality.size, dtype=jnp.float32) for name, modality in modalities.items()},
    )
    step = partial(train_step, schedule=make_schedule(run.train, 1000), graphdef=graphdef, optimizer=optimizer)
    after, metrics = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {(leaf.shape, str(leaf.dtype)) for leaf in metrics.values()} <= {((), "float32"), ((), "int32")}
    numbers = sum(math.prod(leaf.shape) for leaf in trainable.values())
    moments = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
    assert moments <= 2 * 4 * numbers + 1000


def test_tiny_fits_the_demos_base(tmp_path: Path) -> None:
    printed = umbrella("inspect", "--config", CONFIGS / "tiny.yaml", "--base", make_base(tmp_path))
    (row,) = (line.replace(",", "").split() for line in printed.splitlines() if line.startswith("patch_embed "))
    count = str(64 * ((6 * 8 * 4 + 1 + 48) + (4 * 4 * 3 * 10 + 1 + 40)))
    assert row[1:] == [count, count, "100%", "0", "0%"]


ORIGINAL = """
seed: 1234
dataset: {T1: {img_size: [96,96,96]}, rsfMRI: {img_size: [96,96,96,24], sequence_length: 24, stride_between_seq: 1,
          stride_within_seq: 1, input_scaling_method: znorm_minback, shuffle_time_sequence: False}, train_size: 0.8}
model: {hf_name: llava-hf/llava-interleave-qwen-0.5b-hf, T1: {patch_size: [10,10,10]},
        rsfMRI: {patch_size: [16,16,16,3]}}
trainer: {max_epochs: 50, learning_rate: 0.00005, warmup_steps: 500, weight_decay: 0.01, per_device_batch_size: 2,
          gradient_accumulation_steps: 1, gradient_checkpointing: True, mixed_precision: bf16, logging_steps: 1,
          ckpt_dir: results}
"""


def test_a_config_of_the_original_becomes_ours(tmp_path: Path) -> None:
    (tmp_path / "original.yaml").write_text(ORIGINAL)
    printed = umbrella("config", "from-original", tmp_path / "original.yaml")
    for dropped in ("dataset.train_size: dropped", "trainer.logging_steps: dropped"):
        assert f"# {dropped}" in printed
    (tmp_path / "ours.yaml").write_text(printed)
    theirs, ours = load_config(tmp_path / "ours.yaml"), load_config(CONFIGS / "joint_0.5b.yaml")
    assert theirs.output_dir == "results"
    assert (theirs.seed, theirs.model.base, theirs.model.remat) == (ours.seed, ours.model.base, ours.model.remat)
    assert theirs.model.compute_dtype == ours.model.compute_dtype == "bfloat16"
    for field in ("groups", "batch_size", "accumulate_steps", "epochs", "learning_rate", "warmup_steps", "clip_norm"):
        assert getattr(theirs.train, field) == getattr(ours.train, field)
    for name, modality in ours.model.modalities.items():
        other = theirs.model.modalities[name]
        assert (other.size, other.patch, other.scaling) == (modality.size, modality.patch, modality.scaling)
        assert (other.orientation, modality.orientation) == ("as_stored", "RAS")
    base = write_hub_config(tmp_path / "base", "0.5b")
    assert "patch_embed" in umbrella("inspect", "--config", tmp_path / "ours.yaml", "--base", base)


def test_training_settings_that_contradict_each_other_are_refused() -> None:
    stops = EarlyStoppingConfig(metric="eval_loss", patience=3)
    with pytest.raises(ConfigError) as caught:
        TrainConfig(warmup_steps=2, warmup_ratio=0.1, early_stopping=stops)
    assert [fault.partition(";")[0] for fault in caught.value.faults] == [
        "warmup_steps and warmup_ratio: 2 and 0.1",
        "early_stopping: without keep_best, the run would end with weights that 3 evaluations did not improve",
        "early_stopping: without eval_steps, the only evaluation is at the end",
    ]
    with pytest.raises(ConfigError, match="eval_copy_rate/sex: neither high nor low values are good"):
        EarlyStoppingConfig(metric="eval_copy_rate/sex", patience=3)


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("eval_loss", True),
        *((f"eval_{name}/age", True) for name in ("mae", "rmse", "unparsable")),
        *((f"eval_{name}", True) for name in ("brier/sex", "ece/sex", "macro/brier", "copy_rate/sex/different")),
        *((f"eval_{name}", False) for name in ("accuracy", "accuracy/sex/reference=loss", "macro/balanced_accuracy")),
        *((f"eval_{name}/t", False) for name in ("f1", "auroc", "vote_accuracy", "r2", "pearson", "spearman")),
        ("eval_copy_rate/sex", None),
        ("eval_accuracy/mae", False),
    ],
)
def test_the_metric_says_which_end_is_best(metric: str, lower: bool | None) -> None:
    assert lower_is_better(metric) is lower


def test_every_metric_has_a_direction() -> None:
    assert set(LOWER_IS_BETTER) == {"loss", "unparsable", "field_mae", *get_args(Metric)}
