"""For any configuration and layout, parameters have the file's bits, stacked by the test, and so has the export."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from convert.config_json import read_config
from convert.from_hf import load_params
from convert.lazy_tensor import Tensor
from convert.rules import EMBED, LM_HEAD, map_tensors
from convert.safetensors_files import open_checkpoint, write_checkpoint
from convert.to_hf import export
from tests.convert.test_layouts import NAMES
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import write_hf, write_native
from umbrella_jax.config.schema import ALIASES, ModalityConfig, to_dict
from umbrella_jax.models import abstract_params

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SETTINGS = settings(deadline=None, derandomize=True, phases=[Phase.generate, Phase.shrink])
TRICKY = ("x_proj", "x_positional_embeddings", "patch_embedding", "position_embedding", "layers", "_", "__x", "Öl")


@dataclass(frozen=True)
class Case:
    """A checkpoint to write."""

    raw: dict[str, Any]
    """Contents of config.json."""
    modalities: dict[str, ModalityConfig]
    described: bool
    """Whether to write umbrella_config.json."""
    dtype: str
    names: Any
    """Function from a name on the hub to the name in this layout."""
    head: bool
    """Whether to write a head although it is tied."""
    shard_size: int | str
    export_size: int | str
    seed: int


@st.composite
def cases(draw) -> Case:
    def number(least, most):
        return draw(st.integers(least, most))

    layers = st.sampled_from([1, 2, 3, 12])  # also two digits, which names sort differently
    vision_heads, kv_heads = number(1, 3), number(1, 3)
    heads = kv_heads * number(1, 3)
    head_dim = draw(st.none() | st.sampled_from([2, 4, 6]))
    tied = draw(st.booleans())
    words = number(1, 40)
    name = st.sampled_from([*sorted(frozenset().union(*ALIASES)), *TRICKY]) | st.from_regex(
        r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True, alphabet=st.characters(codec="ascii")
    )
    modalities = {}
    for m in draw(st.lists(name, min_size=1, max_size=3, unique=True)):
        patch = tuple(draw(st.lists(st.integers(1, 3), min_size=3, max_size=4)))
        modalities[m] = ModalityConfig(size=tuple(p * number(1, 2) + number(0, p - 1) for p in patch), patch=patch)
    raw = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": number(0, words - 1),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision_heads * number(1, 4),
            "intermediate_size": number(1, 9),
            "num_attention_heads": vision_heads,
            "num_hidden_layers": draw(layers),
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": number(1, 13) if head_dim else heads * 2 * number(1, 2),
            "intermediate_size": number(1, 9),
            "num_attention_heads": heads,
            "num_hidden_layers": draw(layers),
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
            "vocab_size": words,
            **({"head_dim": head_dim} if head_dim else {}),
        },
    }
    size = st.sampled_from(["5GB", 200, "1KB", "4KB"])
    return Case(
        raw=raw,
        modalities=modalities,
        described=draw(st.booleans()),
        dtype=draw(st.sampled_from([*DTYPES])),
        names=draw(st.sampled_from(NAMES)),
        head=tied and draw(st.booleans()),
        shard_size=draw(size),
        export_size=draw(size),
        seed=number(0, 2**32 - 1),
    )


def file_shapes(case):
    """Return {name on the hub: shape}, from the definitions of Qwen2, SigLIP, LLaVA and the volume patch embedding."""
    v, t = case.raw["vision_config"], case.raw["text_config"]
    e, f, d, m, words = (
        v["hidden_size"],
        v["intermediate_size"],
        t["hidden_size"],
        t["intermediate_size"],
        t["vocab_size"],
    )
    heads, kv_heads = t["num_attention_heads"], t["num_key_value_heads"]
    head_dim = t.get("head_dim", d // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {EMBED: (words, d), "language_model.model.norm.weight": (d,)}
    if not t["tie_word_embeddings"]:
        shapes[LM_HEAD] = (words, d)

    def linear(name, inputs, outputs, bias=True):
        shapes[f"{name}.weight"] = outputs, inputs
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    for i in range(t["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (d,), layer + "post_attention_layernorm.weight": (d,)}
        linear(layer + "self_attn.q_proj", d, q)
        linear(layer + "self_attn.k_proj", d, kv)
        linear(layer + "self_attn.v_proj", d, kv)
        linear(layer + "self_attn.o_proj", q, d, bias=False)
        linear(layer + "mlp.gate_proj", d, m, bias=False)
        linear(layer + "mlp.up_proj", d, m, bias=False)
        linear(layer + "mlp.down_proj", m, d, bias=False)
    linear("multi_modal_projector.linear_1", e, d)
    linear("multi_modal_projector.linear_2", d, d)
    tower = "vision_tower.vision_model."
    norms = [tower + "post_layernorm"]
    for i in range(v["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        norms += [layer + "layer_norm1", layer + "layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{name}", e, e)
        linear(layer + "mlp.fc1", e, f)
        linear(layer + "mlp.fc2", f, e)
    for name in norms:
        shapes |= {name + ".weight": (e,), name + ".bias": (e,)}
    for name, modality in case.modalities.items():
        path = f"{tower}embeddings.{name}"
        voxels, patches = int(np.prod(modality.patch)), int(np.prod(np.array(modality.size) // modality.patch))
        shapes[f"{path}_proj.weight"] = (e, 1, *modality.patch) if len(modality.patch) == 3 else (e, voxels)
        shapes |= {f"{path}_proj.bias": (e,), f"{path}_positional_embeddings": (1, patches, e)}
    return shapes


def write(directory, case):
    """Write the checkpoint with random bits, NaNs included; return {name on the hub: array} without a tied head."""
    rng = np.random.default_rng(case.seed)
    dtype = np.dtype(DTYPES[case.dtype])
    arrays = {
        name: rng.integers(256, size=int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(shape)
        for name, shape in file_shapes(case).items()
    }
    held = arrays | ({LM_HEAD: arrays[EMBED]} if case.head else {})
    write_checkpoint(directory, {case.names(n): Tensor.from_array(a) for n, a in held.items()}, case.shard_size)
    (directory / "config.json").write_text(json.dumps(case.raw))
    if case.described:
        data = {"modalities": {name: to_dict(modality) for name, modality in case.modalities.items()}}
        (directory / "umbrella_config.json").write_text(json.dumps(data))
    return arrays


def bits(array):
    return array.dtype.name, tuple(array.shape), np.asarray(array).tobytes()


def exported(directory):
    return {name: bits(tensor.read()) for name, tensor in open_checkpoint(directory).items()}


@settings(SETTINGS, max_examples=12)
@given(cases())
def test_parameters_and_export_are_the_file(case):
    with tempfile.TemporaryDirectory() as root:
        source, out = Path(root) / "in", Path(root) / "out"
        arrays = write(source, case)
        config = read_config(source, None if case.described else case.modalities)
        assert {entry.name: entry.file_shape for entry in map_tensors(config)} == file_shapes(case)
        params, summary = load_params(source, config)
        assert summary.lines() == list(summary.undescribed)
        abstract = abstract_params(config)[1]
        assert params.keys() == abstract.keys()

        rest = dict(arrays)
        for path, leaf in abstract.items():
            if path in rest:
                expected = rest.pop(path).reshape(leaf.shape)
            else:
                before, after = path.split(".layers.")
                layers = [rest.pop(f"{before}.layers.{i}.{after}") for i in range(leaf.shape[0])]
                expected = np.stack(layers).reshape(leaf.shape)
            assert bits(params[path]) == bits(expected), path
        assert not rest

        export(out, params, config, source, max_shard_size=case.export_size)
        assert exported(out) == {name: bits(array) for name, array in arrays.items()}
        assert read_config(out) == config


@settings(SETTINGS, max_examples=5)
@given(cases())
def test_native_and_back(case):
    with tempfile.TemporaryDirectory() as root:
        source, native, out = (Path(root) / name for name in ("in", "native", "out"))
        arrays = write(source, case)
        write_native(Checkpoint.open(source, case.modalities), native)
        write_hf(Checkpoint.open(native), out, max_shard_size=case.export_size)
        assert exported(out) == {name: bits(array) for name, array in arrays.items()}
