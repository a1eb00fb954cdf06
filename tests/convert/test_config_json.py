"""Test config.json of transformers 4 and 5, the values that are rejected, and the files of an export."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from convert.config_json import read_config, unused_dropout
from convert.export_config import hf_dict, write_config
from convert.model_card import model_card
from convert.verify import compare_reading
from tests.helpers.checkpoints import MODALITIES, make_model
from umbrella_jax.config.schema import ConfoundsConfig, ModalityConfig
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.models import abstract_params
from umbrella_jax.models.paths import component_of

GOLDEN = Path(__file__).parents[1] / "golden" / "llava"  # written by transformers 4.46.3
RAW = json.loads((GOLDEN / "config.json").read_text())


def put(directory, raw) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def changed(**fields):
    """Return RAW with fields replaced; prefixes `text_` and `vision_` name the sections, `...` removes a field."""
    raw = json.loads(json.dumps(RAW))
    for key, value in fields.items():
        section = raw
        for prefix in ("text", "vision"):
            if key.startswith(f"{prefix}__"):
                section, key = raw[f"{prefix}_config"], key.removeprefix(f"{prefix}__")
        section.pop(key, None)
        if value is not ...:
            section[key] = value
    return raw


def refused(directory, raw) -> str:
    with pytest.raises(CheckpointError) as error:
        read_config(put(directory, raw), MODALITIES)
    return str(error.value)


def test_version_4():
    config = read_config(GOLDEN, MODALITIES, compute_dtype="bfloat16", remat="full")
    assert dataclasses.asdict(config.text) == {
        "vocab_size": 331,
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "qkv_bias": True,
        "qk_norm": False,
    }
    assert dataclasses.asdict(config.vision) == {
        "hidden_size": 40,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "layer_norm_eps": 1e-6,
        "num_unused_layers": 0,
    }
    # what runs have recorded since before biases, norms and the layer of the features were options, so that they can
    # be resumed
    tower, recorded = dataclasses.asdict(config.vision), dataclasses.asdict(config.text)
    del recorded["qkv_bias"], recorded["qk_norm"], tower["num_unused_layers"]
    assert config.architecture == {"vision": tower, "text": recorded}
    assert (config.image_token_id, config.compute_dtype, config.remat) == (320, "bfloat16", "full")
    assert dict(config.modalities) == MODALITIES


@pytest.mark.parametrize("tied", [True, False])
def test_version_5(tmp_path, tied):
    make_model(tied=tied).config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in raw["text_config"]  # it is in rope_parameters
    config = read_config(tmp_path, MODALITIES)
    assert (config.text.rope_theta, config.text.tie_word_embeddings) == (1e6, tied)
    assert (config.text.num_key_value_heads, config.image_token_id) == (2, 320)


def test_absent_fields_have_the_defaults_of_transformers(tmp_path):
    from transformers import LlavaConfig

    raw = {
        "model_type": "llava",
        "image_token_index": 320,
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "vision_feature_select_strategy": "full",
    }
    config = read_config(put(tmp_path, raw), MODALITIES)
    theirs = LlavaConfig.from_dict(raw)
    assert (config.vision.num_unused_layers, theirs.vision_feature_layer) == (1, -2)
    for ours, section in ((config.text, theirs.text_config), (config.vision, theirs.vision_config)):
        for field in dataclasses.fields(ours):
            if field.name not in ("rope_theta", "head_dim", "qkv_bias", "qk_norm", "num_unused_layers"):
                assert getattr(ours, field.name) == getattr(section, field.name), field.name
    assert config.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    assert config.text.head_dim == 128


@pytest.mark.parametrize(("layer", "unused"), [(-1, 0), (3, 0), (-2, 1), (2, 1), (..., 1), (1, 2), (-3, 2)])
def test_counts_the_layers_above_the_features(tmp_path, layer, unused):
    """Their number among the three layers follows from `vision_feature_layer`, which an export keeps as it is."""
    raw = changed(vision_feature_layer=layer)
    config = read_config(put(tmp_path, raw), MODALITIES)
    assert config.vision.num_unused_layers == unused
    assert hf_dict(raw, config).get("vision_feature_layer", ...) == layer


def test_qwen3_has_as_many_parameters_as_published(tmp_path):
    """The smallest and the largest dense one on the hub: heads of 128 numbers, whatever the width."""
    for width, mlp, layers, heads, tied, count in (
        (1024, 3072, 28, 16, True, 596_049_920),
        (5120, 25600, 64, 64, False, 32_762_123_264),
    ):
        text = {"model_type": "qwen3", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
        text |= {"num_attention_heads": heads, "num_key_value_heads": 8, "rope_theta": 1000000, "rope_scaling": None}
        text |= {"attention_bias": False, "sliding_window": None, "max_window_layers": layers}
        raw = changed(tie_word_embeddings=tied, text_config=text | {"tie_word_embeddings": tied})
        config = read_config(put(tmp_path, raw), MODALITIES)
        shapes = abstract_params(config)[1]
        assert count == sum(
            math.prod(leaf.shape) for path, leaf in shapes.items() if component_of(path) == "language_model"
        )


def test_kv_heads_null_means_heads(tmp_path):
    assert read_config(put(tmp_path, changed(text__num_key_value_heads=None)), MODALITIES).text.num_key_value_heads == 6


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [(..., True, True), (..., False, False), (False, True, True), (True, ..., True), (..., ..., False)],
)
def test_tied_embeddings_are_read_as_transformers_5_reads_them(tmp_path, top, text, tied):
    from transformers import LlavaConfig

    raw = changed(tie_word_embeddings=top, text__tie_word_embeddings=text)
    config = read_config(put(tmp_path, raw), MODALITIES)
    assert config.text.tie_word_embeddings == tied == LlavaConfig.from_dict(raw).tie_word_embeddings
    written = hf_dict(raw, config)
    assert written["tie_word_embeddings"] == written["text_config"]["tie_word_embeddings"] == tied


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llava_next"),
        ("projector_hidden_act", "relu"),
        ("multimodal_projector_bias", False),
        ("vision_feature_select_strategy", "default"),
        ("vision_feature_select_strategy", ...),
        ("vision_feature_layer", 0),
        ("vision_feature_layer", 4),
        ("vision_feature_layer", -4),
        ("vision_feature_layer", True),
        ("vision_feature_layer", [-1, -2]),
        ("quantization_config", {"bits": 4}),
        ("vision__model_type", "clip_vision_model"),
        ("vision__hidden_act", "gelu"),
        ("vision__vision_use_head", True),
        ("vision__vision_use_head", ...),
        ("vision__num_attention_heads", 7),
        ("text__model_type", "llama"),
        ("text_config", "qwen2"),
        ("vision_config", ...),
        ("text__hidden_act", "gelu"),
        ("text__use_sliding_window", True),
        ("text__layer_types", ["full_attention", "sliding_attention"]),
        ("text__rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("text__rope_parameters", {"rope_type": "llama3", "rope_theta": 1e6}),
        ("text__rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("text__rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ("text__rope_theta", "many"),
        ("text__num_key_value_heads", 4),
        ("text__num_hidden_layers", 0),
        ("text__vocab_size", "331"),
        ("image_token_index", 331),
        ("image_token_index", "320"),
        ("image_token_index", 320.0),
        ("image_token_index", True),
        ("image_token_id", "320"),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("text__tie_word_embeddings", "true"),
        ("text__quantization_config", {"quant_method": "gptq"}),
        ("vision__quantization_config", {"quant_method": "bitsandbytes"}),
        ("text__partial_rotary_factor", 0.5),
        ("text__vocab_size", 331.0),
        ("text__hidden_size", True),
        ("vision_feature_layer", [-1]),
        ("vision_feature_layer", "-1"),
        ("vision_feature_layer", None),
        ("text__use_sliding_window", "false"),
        ("text__rope_scaling", {"rope_type": "default", "rope_theta": 5.0}),
    ],
)
def test_refused_by_name(tmp_path, field, value):
    message = refused(tmp_path, changed(**{field: value}))
    assert str(tmp_path / "config.json") in message
    key = field.removeprefix("text__").removeprefix("vision__").removesuffix("_parameters")
    assert key.replace("rope_scaling", "rope_") in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", None),
        ("text__quantization_config", None),
        ("text__rope_scaling", None),
        ("text__layer_types", None),
        ("text__sliding_window", 4096),  # unused if use_sliding_window is absent or false
        ("text__num_key_value_heads", 6),
        ("text__rope_scaling", {"rope_type": "default"}),
    ],
)
def test_null_and_unused_values_mean_nothing(tmp_path, field, value):
    raw = changed(**{field: value})
    config = read_config(put(tmp_path, raw), MODALITIES)
    assert config.text.rope_theta == 1e6
    assert compare_reading(tmp_path, config, grown=False) == []


def test_dropout_is_reported(tmp_path):
    raw = changed(text__attention_dropout=0.1, vision__attention_dropout=0.0, text__resid_pdrop=1)
    read_config(put(tmp_path, raw), MODALITIES)
    assert unused_dropout(tmp_path) == [
        f"{tmp_path / 'config.json'}: text_config.{key} is not applied: there is no dropout in training here"
        for key in ("attention_dropout: 0.1", "resid_pdrop: 1")
    ]


def test_refused_together(tmp_path):
    message = refused(tmp_path, changed(model_type="llava_next", text__hidden_act="gelu", vision__hidden_size=-1))
    assert message.startswith("3 faults:")
    assert all(part in message for part in ("llava_next", "text_config.hidden_act", "vision_config.hidden_size"))


def test_two_values_of_one_thing(tmp_path):
    raw = changed(text__rope_parameters={"rope_type": "default", "rope_theta": 5.0}, image_token_id=5)
    message = refused(tmp_path, raw)
    assert "rope_theta: 1000000.0, but rope_parameters says 5.0" in message
    assert "image_token_index: [5, 320]" in message


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_config_that_is_none(tmp_path, text):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(tmp_path / "config.json")):
        read_config(tmp_path, MODALITIES)


def umbrella(directory, modalities) -> Path:
    put(directory, RAW)
    write_config(GOLDEN, directory, read_config(GOLDEN, modalities))
    return directory


def test_modalities_come_from_the_file_or_the_argument(tmp_path):
    umbrella(tmp_path, MODALITIES)
    assert dict(read_config(tmp_path).modalities) == MODALITIES
    aliased = {"sMRI": MODALITIES["T1"], "fMRI": MODALITIES["rsfMRI"], "other": MODALITIES["T1"]}
    assert dict(read_config(tmp_path, aliased).modalities) == aliased
    with pytest.raises(ConfigError, match="name the modalities"):
        read_config(GOLDEN)


def test_modalities_that_disagree(tmp_path):
    umbrella(tmp_path, MODALITIES)
    other = dataclasses.replace(MODALITIES["T1"], patch=(5, 3, 7), orientation="as_stored", mode="pad")
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path, {"sMRI": other})
    message = str(error.value)
    assert "T1.patch: [5, 3, 2] in the checkpoint, [5, 3, 7] as configured" in message
    assert (
        "T1.orientation: RAS in the checkpoint, as_stored as configured; set model.modalities.sMRI.orientation: RAS, "
        "which these weights were trained on" in message
    )
    assert "T1.mode: resize in the checkpoint, pad as configured" in message
    assert "T1.spacing: None in the checkpoint, 2.0 as configured" in message
    assert "rsfMRI: is in the checkpoint but not configured" in message


def test_umbrella_config_that_is_none(tmp_path):
    put(tmp_path, RAW)
    (tmp_path / "umbrella_config.json").write_text('{"modalities": {"T1": {"size": [4, 4, 4], "patches": [2, 2, 2]}}}')
    with pytest.raises(ConfigError, match="patches"):
        read_config(tmp_path)


def test_write_config(tmp_path):
    source, out = tmp_path / "base", tmp_path / "out"
    source.mkdir()
    raw = changed(unknown={"kept": 1}, vision_feature_select_strategy="full", dtype="float16")
    raw["image_token_id"] = raw.pop("image_token_index")
    put(source, raw)
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"):
        (source / name).write_text("{}")
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "optimizer.pt"):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")
    config = read_config(source, MODALITIES)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=340), image_token_id=335)
    write_config(source, out, config, ("sMRI", "fMRI"), dtype="bfloat16", base_fingerprint="f00")
    assert sorted(p.name for p in out.iterdir()) == [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "umbrella_config.json",
    ]
    raw = json.loads((out / "config.json").read_text())
    assert (raw["unknown"], raw["torch_dtype"]) == ({"kept": 1}, "bfloat16")
    assert raw["image_token_id"] == raw["image_token_index"] == 335
    assert raw["text_config"]["vocab_size"] == 340
    assert "dtype" not in raw
    written = json.loads((out / "umbrella_config.json").read_text())
    assert (list(written["modalities"]), written["base_fingerprint"]) == (["sMRI", "fMRI"], "f00")
    again = read_config(out)
    assert again == dataclasses.replace(config, modalities={"sMRI": MODALITIES["T1"], "fMRI": MODALITIES["rsfMRI"]})


def test_every_parameter_of_the_preprocessing_is_in_an_export(tmp_path):
    t1 = dataclasses.replace(MODALITIES["T1"], orientation="as_stored", mode="pad", spacing=1.5, scaling="minmax")
    fmri = dataclasses.replace(
        MODALITIES["rsfMRI"], scaling="none", stride_within_seq=2, stride_between_seq=0.5, orientation="as_stored"
    )
    fmri = dataclasses.replace(fmri, aliases=("bold",), background=-1.5, tr=2.0, confounds=ConfoundsConfig())
    default = ModalityConfig(size=(9, 9, 9), patch=(3, 3, 3))
    changed = {f.name for f in dataclasses.fields(t1) for m in (t1, fmri) if getattr(m, f.name) != f.default}
    assert changed == {f.name for f in dataclasses.fields(ModalityConfig)}
    modalities = {"T1": t1, "rsfMRI": fmri, "other": default}
    umbrella(tmp_path, modalities)
    assert dict(read_config(tmp_path).modalities) == modalities
    card = model_card(read_config(tmp_path), modalities, "folder", titles=("SigLIP", "Qwen2"))
    for name, cells in (("T1", "as_stored | pad, 1.5 mm | minmax"), ("rsfMRI", "as_stored | pad | none")):
        assert f" {cells} | " in next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    assert " RAS | resize | znorm | " in next(line for line in card.splitlines() if line.startswith("| other |"))


def test_an_export_from_before_modes_is_read_as_it_was_meant(tmp_path):
    umbrella(tmp_path, MODALITIES)
    stored = json.loads((tmp_path / "umbrella_config.json").read_text())
    for modality in stored["modalities"].values():
        del modality["mode"], modality["spacing"]
    (tmp_path / "umbrella_config.json").write_text(json.dumps(stored))
    found = read_config(tmp_path).modalities
    assert dict(found) == MODALITIES
    assert [(m.mode, m.spacing) for m in found.values()] == [("resize", None), ("pad", None)]


def test_two_modalities_under_one_name(tmp_path):
    config = read_config(GOLDEN, {"T1": MODALITIES["T1"], "sMRI": MODALITIES["T1"]})
    with pytest.raises(ConfigError, match="would be called T1"):
        write_config(GOLDEN, tmp_path, config, ("T1", "rsfMRI"))
    with pytest.raises(ConfigError, match=r"^names: T1 is given 2 times; give each name once$"):
        write_config(GOLDEN, tmp_path, read_config(GOLDEN, MODALITIES), ("T1", "rsfMRI", "T1"))
