"""Every field of transformers' config classes: read, refused unless it has the one supported value, or without effect.

A field that a newer transformers adds is not in the table and fails the first test.
"""

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlavaConfig, LlavaOnevisionConfig, Qwen2Config, Qwen3Config, SiglipVisionConfig, masking_utils
from transformers.models.llava import modeling_llava
from transformers.models.llava_onevision import modeling_llava_onevision
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.siglip import modeling_siglip

from convert.config_json import read_config
from convert.torch_model import load_umbrella
from convert.verify import compare_reading
from tests.helpers.checkpoints import IMAGE_ID, MODALITIES, write_umbrella
from umbrella_jax.errors import CheckpointError


class Read(NamedTuple):
    """A field that `read_config` reads, with another value."""

    value: Any


class Refused(NamedTuple):
    """A field with one supported value, with a value that is refused."""

    value: Any


class Unused(NamedTuple):
    """A field without effect on the forward pass, with another value and the reason."""

    value: Any
    why: str


COMMON = {
    "transformers_version": Unused("9.9", "a record"),
    "architectures": Unused(["Other"], "a record"),
    "output_hidden_states": Unused(True, "asks for outputs that LLaVA asks for itself"),
    "return_dict": Refused(False),
    "dtype": Unused("float16", "weights keep their types"),
    "chunk_size_feed_forward": Unused(2, "these models do not read it"),
    "is_encoder_decoder": Unused(True, "these models do not read it"),
    "id2label": Unused({"0": "a", "1": "b", "2": "c"}, "for classifiers"),
    "label2id": Unused({"a": 0, "b": 1, "c": 2}, "for classifiers"),
    "problem_type": Unused("regression", "for classifiers"),
    # no fields of the classes
    "quantization_config": Refused({"bits": 4}),
    "per_layer_config": Refused({"1": {"intermediate_size": 64}}),
}
LAYOUT = {
    "vision_config": Refused({"model_type": "siglip2_vision_model"}),  # NaFlex; its fields have a table of their own
    "text_config": Refused({"model_type": "qwen3_moe"}),
    "image_token_index": Read(319),
    "projector_hidden_act": Refused("relu"),
    "vision_feature_select_strategy": Refused("default"),
    "vision_feature_layer": Read(1),
    "multimodal_projector_bias": Refused(False),
    "tie_word_embeddings": Read(True),
}
QWEN = {
    "vocab_size": Read(332),
    "hidden_size": Read(60),
    "intermediate_size": Read(105),
    "num_hidden_layers": Read(4),
    "num_attention_heads": Read(12),
    "num_key_value_heads": Read(3),
    "hidden_act": Refused("gelu"),
    "max_position_embeddings": Read(4097),
    "initializer_range": Unused(0.5, "for new weights"),
    "rms_norm_eps": Read(0.5),
    "use_cache": Unused(False, "a cache changes no numbers"),
    "tie_word_embeddings": Read(True),
    "rope_parameters": Read({"rope_type": "default", "rope_theta": 5.0}),
    "use_sliding_window": Refused(True),
    "sliding_window": Unused(2, "for use_sliding_window"),
    "max_window_layers": Unused(1, "for use_sliding_window"),
    "layer_types": Refused(["full_attention", "sliding_attention", "full_attention"]),
    "attention_dropout": Unused(0.5, "for training: convert and train report it"),
    "pad_token_id": Unused(7, "its embedding gets no gradient in PyTorch, which changes no output"),
    "bos_token_id": Unused(7, "for generation: generation_config.json has it"),
    "eos_token_id": Unused(7, "for generation: generation_config.json has it"),
    # no fields of the classes
    "head_dim": Read(12),
    "is_causal": Refused(False),
    "partial_rotary_factor": Refused(0.5),
    "rope_scaling": Refused({"rope_type": "yarn", "factor": 4.0}),
}
TABLE: dict[type, dict[str, Read | Refused | Unused]] = {
    LlavaConfig: COMMON | LAYOUT | {"image_seq_length": Unused(5, "there is a placeholder for each patch")},
    LlavaOnevisionConfig: COMMON
    | LAYOUT
    | {
        "video_token_index": Unused(318, "for videos; volumes take the place of `<image>`"),
        "image_grid_pinpoints": Unused([[28, 28]], "volumes are not cut into tiles"),
        "vision_aspect_ratio": Unused("anyres_max_4", "volumes are not cut into tiles"),
    },
    SiglipVisionConfig: COMMON
    | {
        "hidden_size": Read(39),
        "intermediate_size": Read(53),
        "num_hidden_layers": Read(4),
        "num_attention_heads": Read(4),
        "num_channels": Unused(1, "the patch embedding of volumes replaces that of images"),
        "image_size": Unused(56, "the patch embedding of volumes replaces that of images"),
        "patch_size": Unused(14, "the patch embedding of volumes replaces that of images"),
        "hidden_act": Refused("gelu"),
        "layer_norm_eps": Read(0.5),
        "attention_dropout": Unused(0.5, "for training: convert and train report it"),
        "vision_use_head": Refused(True),
        "tie_last_hidden_states": Refused(True),  # no field of the class; features would follow post_layernorm
    },
    Qwen2Config: COMMON | QWEN,
    Qwen3Config: COMMON | QWEN | {"attention_bias": Refused(True)},
}
SECTIONS = {SiglipVisionConfig: "vision_config", Qwen2Config: "text_config", Qwen3Config: "text_config"}
BASES = {LlavaOnevisionConfig: "onevision", Qwen3Config: "qwen3"}
each_class = pytest.mark.parametrize("config_class", TABLE, ids=lambda c: c.__name__)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Return {base: checkpoint}, whose head is untied."""
    made = {base: tmp_path_factory.mktemp(base) for base in ("qwen2", "onevision", "qwen3")}
    for base, directory in made.items():
        write_umbrella(directory, base, tied=False)
    return made


@pytest.fixture
def change(directories, tmp_path):
    """Return `change(config_class, fields)`: a checkpoint whose config.json has other values of some fields."""

    def make(config_class: type, fields: dict[str, Any]) -> Path:
        directory = tmp_path / "changed"
        if not directory.exists():
            shutil.copytree(directories[BASES.get(config_class, "qwen2")], directory)
        raw = json.loads((directories[BASES.get(config_class, "qwen2")] / "config.json").read_text())
        raw["text_config"].pop("layer_types", None)  # one per layer, which another number of layers would contradict
        (raw[SECTIONS[config_class]] if config_class in SECTIONS else raw).update(fields)
        (directory / "config.json").write_text(json.dumps(raw))
        return directory

    return make


def of_kind(config_class: type, kind: type) -> dict[str, Any]:
    return {name: entry.value for name, entry in TABLE[config_class].items() if isinstance(entry, kind)}


@each_class
def test_every_field_is_in_the_table(config_class):
    assert {field.name for field in dataclasses.fields(config_class)} <= TABLE[config_class].keys()


def test_everything_that_the_models_read_is_in_the_table():
    """Also what transformers reads with `getattr`, which no class declares."""
    modules = masking_utils, modeling_llava, modeling_llava_onevision, modeling_siglip, modeling_qwen2, modeling_qwen3
    pattern = re.compile(r'config\.(\w+)|getattr\((?:self\.)?config, "(\w+)"')
    read = {a or b for module in modules for a, b in pattern.findall(inspect.getsource(module))}
    known = {name for table in TABLE.values() for name in table}
    known |= {"image_token_id", "video_token_id"}  # other names of image_token_index and video_token_index
    known |= {"projection_size", "initializer_factor", "num_labels"}  # SigLIP's text tower, new weights, classifiers
    known |= {"attention_chunk_size"}  # masks of models without layer_types
    known |= {"_attn_implementation", "get_text_config", "is_heterogeneous", "per_layer_attributes"}
    assert read <= known


@each_class
def test_fields_are_read_as_transformers_reads_them(config_class, change):
    before = read_config(change(config_class, {}))
    for name, value in of_kind(config_class, Read).items():
        directory = change(config_class, {name: value})
        config = read_config(directory)
        assert config != before, name
        assert compare_reading(directory, config, grown=False) == [], name


@each_class
def test_other_values_are_refused_by_name(config_class, change):
    for name, value in of_kind(config_class, Refused).items():
        with pytest.raises(CheckpointError, match=name):
            read_config(change(config_class, {name: value}))


@each_class
def test_other_fields_have_no_effect(config_class, change):
    """All of them changed at once: transformers gives the same logits."""
    volume = np.random.default_rng(0).normal(size=(1, 1, *MODALITIES["T1"].size)).astype(np.float32)
    ids = torch.tensor([[5, *[IMAGE_ID] * MODALITIES["T1"].num_patches, 17, 7, 4]])

    def logits(fields: dict[str, Any]) -> np.ndarray:
        model = load_umbrella(change(config_class, fields))
        with torch.no_grad():
            return model(ids, pixel_values=torch.from_numpy(volume))[0].numpy()

    np.testing.assert_array_equal(logits(of_kind(config_class, Unused)), logits({}))
