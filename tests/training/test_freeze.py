"""Every parameter gets a label, and groups that make no sense are refused by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from umbrella_jax.config.schema import GroupConfig, ModalityConfig, TrainConfig
from umbrella_jax.errors import ConfigError, RunError
from umbrella_jax.models import LlavaConfig, QwenConfig, SiglipConfig, abstract_params
from umbrella_jax.models.paths import FROZEN, modality_of
from umbrella_jax.training.freeze import as_trainable, check_state, label_params, partition
from umbrella_jax.training.optimizer import make_optimizer

EMBEDDINGS = "vision_tower.vision_model.embeddings."
POST = "vision_tower.vision_model.post_layernorm."
# Names that hold what other names end with, or are the start of another.
NAMES = ("T1", "T1_w", "rsfMRI", "proj", "my_proj_map", "positional_embeddings")


@pytest.fixture(scope="module")
def shapes():
    volume = ModalityConfig(size=(4, 4, 4), patch=(2, 2, 2))
    text = QwenConfig(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    vision = SiglipConfig(
        hidden_size=10,
        intermediate_size=11,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_unused_layers=1,
        layer_norm_eps=1e-6,
    )
    config = LlavaConfig(vision=vision, text=text, modalities=dict.fromkeys(NAMES, volume), image_token_id=3)
    return abstract_params(config)[1]


def trained(labels):
    return {path for path, label in labels.items() if label != FROZEN}


def test_default_trains_only_the_patch_embedding(shapes):
    labels = label_params(list(shapes), list(TrainConfig().groups))
    assert labels.keys() == shapes.keys()
    assert trained(labels) == {path for path in shapes if path.startswith(EMBEDDINGS)}
    assert len(trained(labels)) == 3 * len(NAMES)


@pytest.mark.parametrize(
    ("group", "prefix"),
    [
        ("patch_embed", EMBEDDINGS),
        ("vision_tower", "vision_tower.vision_model.encoder."),
        ("projector", "multi_modal_projector."),
        ("language_model", "language_model."),
    ],
)
def test_named_group(shapes, group, prefix):
    labels = label_params(list(shapes), [group])
    assert labels.keys() == shapes.keys()
    assert trained(labels) == {path for path in shapes if path.startswith(prefix)} != set()
    assert {label.partition("/")[0] for label in labels.values()} == {group, FROZEN}


def test_all_groups_train_everything_but_the_unused(shapes):
    labels = label_params(list(shapes), ["patch_embed", "vision_tower", "projector", "language_model"])
    above = {path for path in shapes if path.startswith("vision_tower.vision_model.unused.layers.")}
    assert len(above) == 16
    assert shapes.keys() - trained(labels) == {POST + "weight", POST + "bias"} | above
    assert labels["language_model.lm_head.weight"] == "language_model"
    assert labels["multi_modal_projector.linear_1.bias"] == "projector"


def test_path_patterns(shapes):
    queries, table = "language_model.*.q_proj.*", "vision_tower.vision_model.embeddings.T?_positional_embeddings"
    labels = label_params(list(shapes), [queries, table])
    attention = "language_model.model.layers.self_attn."
    assert {path: label for path, label in labels.items() if label != FROZEN} == {
        attention + "q_proj.weight": queries,
        attention + "q_proj.bias": queries,
        EMBEDDINGS + "T1_positional_embeddings": f"{table}/T1",
    }


@pytest.mark.parametrize("name", NAMES)
def test_modality_labels(shapes, name):
    leaves = [f"{EMBEDDINGS}{name}_{leaf}" for leaf in ("proj.weight", "proj.bias", "positional_embeddings")]
    labels = label_params(list(shapes), ["patch_embed"])
    assert [path for path, label in labels.items() if label == f"patch_embed/{name}"] == [
        path for path in shapes if path in leaves
    ]
    assert {modality_of(path) for path in leaves} == {name}


def test_only_the_patch_embedding_has_modalities(shapes):
    others = [path for path in shapes if not path.startswith(EMBEDDINGS)]
    assert {modality_of(path) for path in others} == {None}


def faults(shapes, groups):
    with pytest.raises(ConfigError) as error:
        label_params(list(shapes), groups)
    return error.value.faults


def test_overlap_is_refused(shapes):
    found = faults(shapes, ["projector", "*.linear_1.*"])
    assert len(found) == 2
    for leaf in ("weight", "bias"):
        covered = f"multi_modal_projector.linear_1.{leaf} is covered by projector and *.linear_1.*"
        assert any(covered in fault for fault in found)


def test_nothing_to_train_is_refused(shapes):
    assert faults(shapes, []) == ("train.groups: nothing trains; name a group, such as patch_embed",)


def test_every_group_without_parameters_is_named(shapes):
    first, second = faults(shapes, ["patch_embed", "patch_embedding", "lm_head"])
    assert first.startswith("train.groups: patch_embedding covers no parameter; expected patch_embed, vision_tower")
    assert second.startswith("train.groups: lm_head covers no parameter")


@pytest.mark.parametrize(
    ("pattern", "path", "count"),
    [
        ("*post_layernorm*", "post_layernorm", 2),
        ("vision_tower.*", "post_layernorm", 18),
        ("*.fc1.*", "unused.layers.mlp.fc1", 2),
    ],
)
def test_refuses_parameters_that_cannot_reach_the_loss(shapes, pattern, path, count):
    found = faults(shapes, [pattern])
    assert len(found) == count
    for leaf in ("weight", "bias"):
        covered = f"{pattern} covers vision_tower.vision_model.{path}.{leaf}, which LLaVA does not use"
        assert any(covered in fault for fault in found)


def test_partition_and_float32(shapes):
    params = {path: jnp.full(leaf.shape, 0.1, jnp.bfloat16) for path, leaf in shapes.items()}
    labels = label_params(list(params), ["projector"])
    trainable, frozen = partition(params, labels)
    assert trainable.keys() == trained(labels)
    assert trainable.keys() | frozen.keys() == params.keys()
    assert not trainable.keys() & frozen.keys()
    assert all(frozen[path] is params[path] for path in frozen)
    for path, leaf in as_trainable(trainable).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, params[path].astype(jnp.float32))


def test_trainable_parameters_are_copies(shapes):
    """The step donates their buffers, so float32 parameters must not be the caller's arrays."""
    params = {path: jnp.ones(leaf.shape) for path, leaf in shapes.items()}
    for path, leaf in as_trainable(params).items():
        assert leaf.unsafe_buffer_pointer() != params[path].unsafe_buffer_pointer(), path


def state_of(shapes, groups):
    """Return the arguments of `check_state` for a run that trains `groups`."""
    labels = label_params(list(shapes), groups)
    trainable, frozen = partition({path: jnp.zeros(leaf.shape) for path, leaf in shapes.items()}, labels)
    config = TrainConfig(groups={group: GroupConfig() for group in groups})
    opt_state = make_optimizer(config, labels).init(trainable)
    return {"trainable": trainable, "frozen": frozen, "opt_state": opt_state}


@pytest.mark.parametrize(
    ("groups", "result", "detail"),
    [
        (["patch_embed"], "passed", ", ".join(sorted(NAMES))),
        (["projector"], "not requested", "frozen: " + ", ".join(sorted(NAMES))),
        ([f"{EMBEDDINGS}rsfMRI_proj.*", f"{EMBEDDINGS}T1_[pw]*"], "in part", ""),
    ],
)
def test_checks_of_a_run_pass(shapes, groups, result, detail):
    first, *others = check_state(groups, shapes, **state_of(shapes, groups))
    assert (first.result, [check.result for check in others]) == (result, ["passed", "passed"])
    assert first.detail == detail or result == "in part"


def test_checks_name_the_parameter_that_fails(shapes):
    groups, path, other = ["projector"], "multi_modal_projector.linear_1.weight", f"{EMBEDDINGS}T1_proj.weight"
    linear = "multi_modal_projector.linear_2.weight"
    state = state_of(shapes, groups)

    def faults_of(frozen_dtype="auto", **changed):
        with pytest.raises(RunError) as error:
            check_state(groups, shapes, **state | changed, frozen_dtype=frozen_dtype)
        return error.value.faults

    trainable, frozen = state["trainable"], state["frozen"]
    moved = {"trainable": trainable | {other: frozen[other]}, "frozen": {p: v for p, v in frozen.items() if p != other}}
    (fault,) = faults_of(**moved)
    assert fault.startswith(f"{other}: train.groups does not cover it, against the run's state")
    (fault,) = faults_of(trainable={p: v for p, v in trainable.items() if p != path})
    assert fault.startswith(f"{path}: train.groups covers it, against the run's state")
    (fault,) = faults_of(trainable=trainable | {path: trainable[path].astype(jnp.bfloat16)})
    assert fault.startswith(f"{path}: trains in bfloat16, expected float32")
    (fault,) = faults_of(opt_state=(state["opt_state"], {other: frozen[other]}))
    assert fault.startswith(f"{other}: the optimiser keeps 1 moments, expected 0")
    found = faults_of("bfloat16", frozen=frozen)
    assert any(f"{POST}weight: is frozen in float32, expected bfloat16" in fault for fault in found)
    assert not any(linear in fault or other in fault for fault in found)
