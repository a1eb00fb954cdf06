"""Checkpoints of LLaVA-NeXT's code and of TinyLLaVA are read as the same model in the hub's layout."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import modeling_umbrella
from convert.architectures import TOWERS
from convert.config_json import read_config, read_hub_config, unused_dropout
from convert.from_hf import fingerprint, load_params, plan_loading
from convert.to_hf import export
from convert.torch_model import load_umbrella
from convert.verify import compare_reading
from tests.conftest import SPECIAL_TOKENS, write_tokenizer
from tests.helpers.checkpoints import IMAGE_ID, MODALITIES, write_umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.errors import CheckpointError

TOWER = "google/siglip-tiny-patch7-28"
SOURCES = {"interleave": "last-layer", "onevision": "onevision", "tinyllava": "qwen2-untied"}
"""{kind of checkpoint: base of the same model in the hub's layout}."""

# Verbatim: config.json of lmms-lab/llava-next-interleave-qwen-0.5b.
INTERLEAVE = {
    "_name_or_path": "./",
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "image_split_resolution": 224,
    "initializer_range": 0.02,
    "intermediate_size": 2816,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "mm_hidden_size": 1152,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_tunable_parts": "mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": None,
    "model_type": "llava_qwen",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
    "vocab_size": 151936,
}
# LLaVA-OneVision's also has fields for video, and sections that transformers' class for LLaVA left, which do not
# describe the model.
ONEVISION = {
    "image_aspect_ratio": "anyres_max_9",
    "ignore_index": -100,
    "image_token_index": 151646,
    "mm_newline_position": "one_token",
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "model_type": "llava",
    "pos_skipping_range": 4096,
    "projector_hidden_act": "gelu",
    "text_config": {"model_type": "llama"},
    "use_pos_skipping": False,
    "vision_config": {"hidden_size": 1024, "model_type": "clip_vision_model", "num_hidden_layers": 24},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
VIDEO = {
    "add_faster_video": False,
    "add_time_instruction": True,
    "faster_token_stride": 10,
    "force_sample": True,
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
}
TINYLLAVA = {
    "architectures": ["TinyLlavaForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration.TinyLlavaConfig"},
    "cache_dir": None,
    "connector_type": "mlp2x_gelu",
    "hidden_size": 48,
    "ignore_index": -100,
    "image_aspect_ratio": "square",
    "image_token_index": -200,
    "llm_model_name_or_path": "Qwen/Qwen2-0.5B",
    "model_type": "tinyllava",
    "num_queries": 128,
    "num_resampler_layers": 3,
    "pad_token_id": None,
    "resampler_hidden_size": 768,
    "tokenizer_model_max_length": 2048,
    "tokenizer_name_or_path": "Qwen/Qwen2-0.5B",
    "torch_dtype": "float16",
    "tune_type_connector": "full",
    "tune_vision_tower_from_layer": 0,
    "use_cache": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch",
    "vision_hidden_size": 36,
    "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
    "vision_model_name_or_path2": "",
    "vocab_size": 331,
}


@pytest.fixture(autouse=True)
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the tower of the tests to the table, with the layer that the original code deletes."""
    sizes = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3}
    monkeypatch.setitem(TOWERS["siglip_vision_model"].sizes, "tiny", sizes)  # type: ignore[arg-type]


def original_name(name: str) -> str:
    """Return the name in LLaVA-NeXT's code of a tensor on the hub."""
    for hub, original in [
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("image_newline", "model.image_newline"),
    ]:
        if name.startswith(hub):
            return original + name.removeprefix(hub)
    raise ValueError(name)


def tinyllava_name(name: str) -> str:
    """Return the name in TinyLLaVA of a tensor on the hub."""
    for hub, own in [
        ("vision_tower.", "vision_tower._vision_tower."),
        ("multi_modal_projector.linear_1.", "connector._connector.0."),
        ("multi_modal_projector.linear_2.", "connector._connector.2."),
    ]:
        if name.startswith(hub):
            return own + name.removeprefix(hub)
    return name


def write_config(directory: Path, raw: dict[str, Any], **fields: Any) -> Path:
    """Write config.json with some fields changed; `...` removes a field."""
    raw = {key: value for key, value in (raw | fields).items() if value is not ...}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def write_dialect(directory: Path, source: Path, kind: str, **fields: Any) -> Path:
    """Write the checkpoint `source`, which is in the hub's layout, as another code would."""
    hub = json.loads((source / "config.json").read_text())
    text = hub["text_config"] | {"rope_theta": 1e6, "torch_dtype": hub.get("dtype", "float32")}
    text = {key: value for key, value in text.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    tensors = load_file(source / "model.safetensors")
    if kind == "tinyllava":
        vision = hub["vision_config"] | {"model_name_or_path": "google/siglip", "vision_use_head": True}
        own = {key: hub[key] for key in ("image_token_index", "vision_feature_layer")}
        raw = TINYLLAVA | {"text_config": text, "vision_config": vision} | own
        tensors = {tinyllava_name(name): tensor for name, tensor in tensors.items()}
        tensors["vision_tower._vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 36)
    else:
        raw = INTERLEAVE | (ONEVISION | {"image_token_index": IMAGE_ID} if kind == "onevision" else {})
        raw = raw | {key: value for key, value in text.items() if key in INTERLEAVE} | {"model_type": raw["model_type"]}
        raw |= {"architectures": INTERLEAVE["architectures"], "mm_vision_tower": TOWER, "image_token_index": IMAGE_ID}
        tensors = {original_name(name): tensor for name, tensor in tensors.items()}
    write_config(directory, raw, **fields)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "umbrella_config.json", directory)
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Write checkpoints in the hub's layout: {(kind of checkpoint, dtype): directory}."""
    root = tmp_path_factory.mktemp("sources")
    cases = [*product(SOURCES, ("float32", "float16", "bfloat16"))]
    for seed, (kind, dtype) in enumerate(cases):
        write_umbrella(root / f"{kind}_{dtype}", SOURCES[kind], dtype=dtype, seed=10 * seed)
        if kind == "tinyllava":
            hub = json.loads((root / f"{kind}_{dtype}" / "config.json").read_text())
            write_config(root / f"{kind}_{dtype}", hub, vision_feature_layer=-2)
    return {case: root / "_".join(case) for case in cases}


def contents(directory: Path) -> dict[str, Any]:
    tensors = load_file(directory / "model.safetensors")
    return {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def refused(directory: Path) -> list[str]:
    """Return the faults of loading, without the name of the file."""
    with pytest.raises(CheckpointError) as error:
        plan_loading(directory, read_config(directory, MODALITIES))
    return [fault.removeprefix(f"{directory / 'config.json'}: ") for fault in error.value.faults]


@pytest.mark.parametrize(("kind", "dtype"), [*product(SOURCES, ("float32", "float16", "bfloat16"))])
def test_other_code_s_checkpoint_is_the_hub_s(sources, tmp_path, kind, dtype):
    source = sources[kind, dtype]
    directory = write_dialect(tmp_path / "in", source, kind)
    config = read_config(directory)
    assert config == read_config(source)
    assert compare_reading(directory, config, grown=False) == []
    assert fingerprint(directory) == fingerprint(source)
    params, summary = load_params(directory, config)
    left_out = ("vision_tower._vision_tower.vision_model.head.probe",) if kind == "tinyllava" else ()
    assert (summary.left_out, len(summary.lines())) == (left_out, len(left_out))
    export(tmp_path / "out", params, config, directory)
    assert contents(tmp_path / "out") == contents(source)
    assert read_config(tmp_path / "out") == config
    hub = json.loads((source / "config.json").read_text())
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    written_for = getattr(modeling_umbrella, raw["architectures"][0]).config_class
    assert written_for.model_type == raw["model_type"] == hub["model_type"]
    assert raw.keys() <= hub.keys() | {"architectures", "torch_dtype"}, "no field of the other code is left"


@pytest.mark.parametrize("kind", SOURCES)
def test_pytorch_s_logits_of_both_layouts_are_equal(sources, tmp_path, kind):
    source = sources[kind, "float32"]
    ids = torch.cat([torch.arange(5), torch.full((18,), IMAGE_ID), torch.arange(9)])[None]
    volume = torch.randn(1, 1, *MODALITIES["T1"].size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            load_umbrella(directory)(input_ids=ids, pixel_values=volume).logits
            for directory in (write_dialect(tmp_path / "in", source, kind), source)
        )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "raw",
    [
        INTERLEAVE,
        INTERLEAVE | ONEVISION,
        INTERLEAVE | VIDEO | {"mm_vision_tower": "/models/siglip-so400m-patch14-384/"},
    ],
    ids=["interleave", "onevision", "video"],
)
@pytest.mark.parametrize("layers", [None, 26])
def test_published_configs_are_read(tmp_path, raw, layers):
    """With the names of the tensors, and without weights, as while a run is planned."""
    write_config(tmp_path, raw)
    if layers is not None:
        names = [
            "model.image_newline",
            *(f"model.vision_tower.vision_tower.vision_model.encoder.layers.{i}.x" for i in range(layers)),
        ]
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = read_config(tmp_path, MODALITIES)
    assert (config.vision.num_hidden_layers, config.vision.num_attention_heads, config.vision.hidden_size) == (
        26,
        16,
        1152,
    )
    assert (config.text.hidden_size, config.text.vocab_size, config.text.tie_word_embeddings) == (1024, 151936, True)
    assert config.image_newline
    assert read_hub_config(tmp_path)["model_type"] == "llava_onevision"


def test_layers_of_the_tower_are_counted(sources, tmp_path, monkeypatch):
    """A tower without its last layer, a whole one, and one that is neither."""
    directory = write_dialect(tmp_path / "in", sources["interleave", "float32"], "interleave")
    raw = json.loads((directory / "config.json").read_text())
    assert read_hub_config(directory)["vision_feature_layer"] == -1
    assert refused(write_config(directory, raw, mm_vision_select_layer=-3))[0].startswith(
        "mm_vision_select_layer: -3 is not"
    )
    sizes = TOWERS["siglip_vision_model"].sizes["tiny"]
    monkeypatch.setitem(sizes, "num_hidden_layers", 2)
    for layer in (-1, -2):
        assert (
            read_hub_config(write_config(directory, raw, mm_vision_select_layer=layer))["vision_feature_layer"] == layer
        )
    (fault,) = refused(write_config(directory, raw, mm_vision_select_layer=[1, 2]))
    assert fault.startswith("mm_vision_select_layer: [1, 2] is not supported")
    monkeypatch.setitem(sizes, "num_hidden_layers", 5)
    (fault,) = refused(write_config(directory, raw))
    assert fault.startswith(
        f"mm_vision_tower: '{TOWER}', but the weights have 2 of its layers; expected 5, or 4 without"
    )
    monkeypatch.setitem(sizes, "num_hidden_layers", 3)
    monkeypatch.setitem(sizes, "hidden_size", 48)
    assert any("layers.0.layer_norm1.weight: expected shape [48], found [36]" in fault for fault in refused(directory))


def test_weights_without_the_tower_are_refused(sources, tmp_path):
    directory = write_dialect(tmp_path / "in", sources["interleave", "float32"], "interleave")
    tensors = {n: t for n, t in load_file(directory / "model.safetensors").items() if "vision_tower" not in n}
    save_file(tensors, directory / "model.safetensors")
    (fault,) = refused(directory)
    assert fault.startswith(f"mm_vision_tower: '{TOWER}', but the weights lack it")
    assert "call save_pretrained" in fault


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["LlavaLlamaForCausalLM"]),
        ("architectures", ["LlavaQwenMoeForCausalLM"]),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336"),
        ("mm_vision_tower", "google/siglip2-so400m-patch16-naflex"),
        ("mm_vision_tower", None),
        ("mm_projector_type", "linear"),
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_projector_type", ...),
        ("mm_resampler_type", "spatial_pool"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("use_mm_proj", False),
        ("use_pos_skipping", True),
        ("add_faster_video", True),
        ("s2", True),
        ("mm_num_experts", 4),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("quantization_config", {"bits": 4}),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("num_key_value_heads", 5),
        ("num_hidden_layers", "24"),
        ("tie_word_embeddings", "true"),
    ],
)
def test_a_field_is_refused_by_its_name_in_the_file(tmp_path, field, value):
    faults = refused(write_config(tmp_path, INTERLEAVE, **{field: value}))
    assert all(fault.startswith(f"{field}: ") for fault in faults), faults


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("connector_type", "linear"),
        ("vision_model_name_or_path2", "facebook/dinov2-large"),
        ("architectures", ["TinyLlavaLlamaForCausalLM"]),
        ("text_config", {"model_type": "phi"}),
        ("vision_config", {"model_type": "clip_vision_model"}),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_a_field_of_tinyllava_is_refused_by_its_name(tmp_path, field, value):
    sections = {"text_config": {"model_type": "qwen2"}, "vision_config": {"model_type": "siglip_vision_model"}}
    faults = refused(write_config(tmp_path, TINYLLAVA | sections, **{field: value}))
    assert all(fault.startswith((f"{field}: ", f"{field}.model_type: ")) for fault in faults), faults


def test_all_faults_are_in_one_report(tmp_path):
    fields = {"mm_projector_type": "linear", "rope_scaling": {"type": "linear"}, "attention_dropout": 0.1}
    faults = refused(write_config(tmp_path, INTERLEAVE, **fields))
    assert [fault.partition(":")[0] for fault in faults] == ["mm_projector_type", "rope_scaling"]
    write_config(tmp_path, INTERLEAVE, attention_dropout=0.1)
    assert unused_dropout(tmp_path)[0].startswith(f"{tmp_path / 'config.json'}: attention_dropout: 0.1")


@pytest.mark.parametrize(
    ("stated", "special_tokens", "before"),
    [
        (-200, SPECIAL_TOKENS[:3], 330),
        (..., SPECIAL_TOKENS[:3], 330),
        (7, SPECIAL_TOKENS[:3], 7),
        (-200, SPECIAL_TOKENS, None),
    ],
)
def test_the_id_of_images_is_the_tokenizer_s(sources, tmp_path, stated, special_tokens, before):
    """The original code marks images by -200; a tokenizer without `<image>` gets it when the checkpoint is opened."""
    source = sources["interleave", "float32"]
    directory = write_dialect(tmp_path / "in", source, "interleave", image_token_index=stated)
    write_tokenizer(directory, special_tokens)
    checkpoint = Checkpoint.open(directory)
    token = checkpoint.tokenizer().convert_tokens_to_ids("<image>")
    assert checkpoint.config.image_token_id == token
    assert read_config(directory).image_token_id == (token if before is None else before)
    assert checkpoint.notes == (("<image>: added to the tokenizer",) if len(special_tokens) == 3 else ())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mm_projector.bin"], "only the projector of LLaVA's first stage (mm_projector.bin); load the whole model"),
        (["adapter_config.json", "non_lora_trainables.bin"], "name its base, and this folder with --adapter"),
        (["non_lora_trainables.bin"], "without the adapter (non_lora_trainables.bin)"),
        (
            ["language_model", "vision_tower", "connector"],
            "TinyLLaVA's first stage in folders of their own (connector)",
        ),
    ],
)
def test_parts_of_other_code_s_models_are_named(tmp_path, names, expected):
    write_config(tmp_path, INTERLEAVE)
    for name in names:
        (tmp_path / name).write_text("{}")
    assert expected in " ".join(refused(tmp_path))
