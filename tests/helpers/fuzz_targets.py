"""What is fuzzed and what must hold of it: of broken input, readers raise what they document, and nothing else.

Four targets, each a hypothesis test: valid files, altered in their bytes or in their structure. The suite runs them on
random bytes for seconds (`fuzz`), scripts/fuzz.py under atheris, which seeks bytes that reach new code.
"""

import bz2
import copy
import gzip
import json
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from convert.config_json import read_config, stored_template, stored_untrained, unused_dropout
from convert.foreign import ADAPTER
from convert.lazy_tensor import Tensor
from convert.safetensors_files import INDEX, SINGLE, open_checkpoint, write_safetensors
from convert.trainable import Trainable, open_trainable, write_trainable
from umbrella_jax.config.load import load_config, load_original
from umbrella_jax.config.schema import ModalityConfig, to_dict
from umbrella_jax.data.conversation import Conversation, read_conversations
from umbrella_jax.data.volume import load_volume
from umbrella_jax.errors import CheckpointError, ConfigError, DataError, UmbrellaError

SECONDS = float(os.environ.get("UMBRELLA_FUZZ_SECONDS", "2"))
"""Of each target in the suite."""
LENGTH = 4096
"""Bytes that an input is made from."""
SETTINGS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # which tells of every header that it mends


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz")


def folder() -> Path:
    """One for all inputs of this process."""
    return Path(_temporary().name)


def put(name: str, content: bytes) -> Path:
    path = folder() / name
    path.write_bytes(content)
    return path


@contextmanager
def only(*errors: type[UmbrellaError], data: Any) -> Iterator[None]:
    """Passes over the errors that are documented, if they say where the fault is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        return
    except errors as error:
        faults, message = error.faults, str(error)
    except BaseException:  # panics of Rust are none of Exception
        print(f"input: {repr(data)[:4000]}", flush=True)
        raise
    assert faults, f"no fault; input: {data!r}"
    assert all(str(folder()) in fault for fault in faults), f"a fault without its place: {faults}; input: {data!r}"
    assert message.encode(), data  # no half of a surrogate pair, which no terminal takes


def fuzz(target: Callable[..., None], seconds: float = SECONDS, seed: int = 0) -> int:
    """Runs a target on random bytes, the same ones for a seed, for some time behind a first input, which imports.
    Returns on how many."""
    one = target.hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    rng, count = random.Random(seed), 0
    one(rng.randbytes(LENGTH))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        count += one(rng.randbytes(LENGTH)) is not None
    return count


# Alterations

NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 127, 255, 2**15 - 1, -(2**15), 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63)
NUMBERS += (2**64, 10**12, 10**400, 0.5, -0.0, 1e-45, 1e-300, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
STRINGS = (
    "",
    "\0",
    "..",
    "/",
    "../x",
    "<image>",
    "<|im_end|>",
    "\ud800",
    "\u2028",
    "x" * 5000,
    "é\u0301",
    "1e3",
    "null",
    "~",
)
SCALARS = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(STRINGS) | st.text(max_size=8)
TREES = st.recursive(
    SCALARS, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=8), t, max_size=3), max_leaves=6
)


TOKENS = (
    "[",
    "{",
    "]",
    "}",
    '"',
    ",",
    ":",
    "\\",
    "\\ud800",
    "\\u0000",
    "null",
    "NaN",
    "-Infinity",
    "1e999",
    "-",
    "0",
    ".5",
)
TOKENS += (
    "\n",
    "\r",
    "\t",
    "  ",
    "- ",
    "? ",
    "#",
    "&a ",
    "*a",
    "<<: *a",
    "!!python/name:os.system ",
    "!x ",
    '"task_id": "b", ',
    '{"a": 1, "a": 2}',
    "%YAML 1.1\n---\n",
)
TOKENS += (
    "2024-13-45",
    "---\n",
    "...",
    "|",
    ">",
    "\ufeff",
    "\u2028",
    "\x1b[2J",
    "[" * 3000,
    '{"a":' * 3000,
    "- " * 3000,
    "9" * 5000,
)
WORDS = tuple(token.encode() for token in TOKENS)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, words: Sequence[bytes] = ()) -> bytes:
    """Bytes with up to six changes, none of which knows what they mean; of a text, most put one of the `words` in."""
    hows = ("flip", "write", "insert", "remove", "repeat", "cut", "number") + ("word",) * (12 if words else 0)
    for _ in range(draw(st.integers(0, 6))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 12))
        how, behind = draw(st.sampled_from(hows)), content[at + length :]
        if how == "flip":
            content = (
                content[:at] + bytes(b ^ 1 << draw(st.integers(0, 7)) for b in content[at : at + 1]) + content[at + 1 :]
            )
        elif how == "write":
            content = content[:at] + draw(st.binary(min_size=length, max_size=length)) + behind
        elif how == "insert":
            content = content[:at] + draw(st.binary(max_size=12)) + content[at:]
        elif how == "word":
            content = content[:at] + draw(st.sampled_from(words)) + (behind if draw(st.booleans()) else content[at:])
        elif how == "remove":
            content = content[:at] + behind
        elif how == "repeat":
            content = content[:at] + content[at : at + length] * draw(st.sampled_from((2, 3, 300))) + behind
        elif how == "cut":
            content = content[:at]
        else:
            number = draw(st.sampled_from([n for n in NUMBERS if isinstance(n, int) and abs(n) < 2**63]))
            content = content[:at] + number.to_bytes(8, "little", signed=True)[: max(1, length % 9)] + behind
    return content


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of JSON with up to four places that hold, lack or are called something else."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(0, 4))):
        places: list[tuple[Any, Any]] = []
        waiting: list[Any] = [root]
        for parent in waiting:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            places += [(parent, key) for key in keys]
            waiting += [parent[key] for key in keys if isinstance(parent[key], dict | list)]
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(("replace", "replace", "remove", "rename", "add", "wrap", "repeat")))
        if how == "wrap":
            for _ in range(draw(st.sampled_from((1, 30, 250)))):
                parent[key] = [parent[key]] if draw(st.booleans()) else {"a": parent[key]}
        elif how == "repeat":
            parent[key] = [copy.deepcopy(parent[key]) for _ in range(draw(st.integers(0, 3)))]
        elif how == "replace" or parent is root:
            parent[key] = draw(TREES)
        elif how == "remove":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8) | st.sampled_from(STRINGS))] = parent.pop(key)
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(TREES)
        else:
            parent.insert(key, draw(TREES))
    return root[0]


def written(tree: Any) -> bytes:
    """A tree as JSON."""
    return json.dumps(tree).encode()


@st.composite
def texts(draw: st.DrawFn, trees: Sequence[Any], write: Callable[[Any], bytes] = written) -> bytes:
    """A file of one of the trees, altered in its structure or its bytes."""
    tree = draw(st.sampled_from(trees))
    if draw(st.booleans()):
        return write(draw(altered(tree)))
    return draw(damaged(write(tree), WORDS))


# Conversations

IMAGE = {"type": "image", "modality": "sMRI", "image_path": "a.nii.gz"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "no."}]}
CONVERSATIONS: tuple[Any, ...] = (
    {
        "task_id": "a",
        "task_type": "T1",
        "conversations": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Old?"}]}, ANSWER],
        "metadata": {"subject_id": "S01", "task": "age"},
        "subject_ids": ["S01"],
    },
    {
        "task_id": "b",
        "images": [{"path": "sub-1/x.nii", "modality": "fMRI"}, {"path": "y.nii", "modality": "T1"}],
        "conversations": [{"role": "user", "content": "<image> and <image>?"}, ANSWER],
    },
    {
        "task_id": "c",
        "conversation": [{"from": "human", "value": "<image> Asleep?"}, {"from": "gpt", "value": "no"}],
        "modality_paths": {"rsfMRI": ["S01"]},
    },
    {
        "task_id": "d",
        "conversations": [{"from": "human", "value": "Old?"}, {"from": "gpt", "value": "no"}],
        "brain_scans": [{"path": "x.nii", "modality": "sMRI"}],
    },
)


def lines(tree: Any) -> bytes:
    """A list as .jsonl."""
    return b"\n".join(map(written, tree if isinstance(tree, list) else [tree]))


@st.composite
def conversation_files(draw: st.DrawFn) -> tuple[str, bytes]:
    trees = [*CONVERSATIONS, list(CONVERSATIONS), []]
    if draw(st.booleans()):
        return "a.json", draw(texts(trees))
    return "a.jsonl", draw(texts(trees, lines))


@SETTINGS
@given(conversation_files())
def conversations(file: tuple[str, bytes]) -> None:
    path = put(*file)
    with only(DataError, data=file):
        found = read_conversations(path, ("T1", "rsfMRI"))
        assert found
        assert all(isinstance(one, Conversation) for one in found)


# Volumes

SIZE = (4, 3, 5)
MODALITIES = {
    "resize": ModalityConfig(size=(3, 4, 2), patch=(1, 1, 1), orientation="as_stored"),
    "RAS": ModalityConfig(size=(3, 4, 2), patch=(1, 1, 1), scaling="minmax"),
    "pad": ModalityConfig(size=(3, 4, 2), patch=(1, 1, 1), mode="pad", spacing=1.5),
    "run": ModalityConfig(size=(3, 4, 2, 2), patch=(1, 1, 1, 1), stride_within_seq=2),
    "stored run": ModalityConfig(size=(3, 4, 2, 2), patch=(1, 1, 1, 1), orientation="as_stored"),
}
KINDS = {"nii": nib.Nifti1Image, "2.nii": nib.Nifti2Image, "mgh": nib.MGHImage, "hdr": nib.AnalyzeImage}


@cache
def volume(kind: str, axes: int) -> tuple[bytes, np.dtype | None]:
    """A small volume or run, and the type of its header."""
    data = np.random.default_rng(axes).integers(1, 99, (*SIZE, 6)[:axes]).astype(np.int16)
    if kind == "npy":
        np.save(folder() / "valid.npy", data)
        return (folder() / "valid.npy").read_bytes(), None
    path = folder() / f"valid.{kind}"
    nib.save(KINDS[kind](data.astype(np.int32) if kind == "mgh" else data, np.diag([2, 1, 3, 1])), path)
    return path.read_bytes(), KINDS[kind].header_class.template_dtype


@cache
def voxels() -> bytes:
    """Those of a run in an Analyze pair."""
    volume("hdr", 4)
    return (folder() / "valid.img").read_bytes()


# Fields of a header from which shapes, sizes, types, scales and orientations follow; the others are changed less often.
TELLING = (
    "dim",
    "dims",
    "datatype",
    "type",
    "bitpix",
    "pixdim",
    "delta",
    "vox_offset",
    "scl_slope",
    "scl_inter",
    "glmin",
)
TELLING += ("xyzt_units", "qform_code", "sform_code", "goodRASFlag", "Mdc", "Pxyz_c", "srow_x", "srow_y", "srow_z")
TELLING += ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "sizeof_hdr", "magic", "version")


@st.composite
def volume_files(draw: st.DrawFn) -> tuple[str, bytes, str, bytes | None]:
    """Name, content, and the modality that it is read as; of a compressed file what was compressed."""
    kind, axes = draw(st.sampled_from((*KINDS, "npy"))), draw(st.sampled_from((3, 4)))
    fitting = ("run", "stored run", "stored run") if axes == 4 and kind != "npy" else ("resize", "resize", "RAS", "pad")
    modality = draw(st.sampled_from((*fitting * 3, *MODALITIES)))
    content, dtype = volume(kind, axes)
    if dtype is not None:
        header = np.frombuffer(content[: dtype.itemsize].ljust(dtype.itemsize, b"\0"), dtype)[0].copy()
        if kind != "mgh" and draw(st.sampled_from((False, False, True))):
            header = header.astype(dtype.newbyteorder())
        telling = tuple(name for name in header.dtype.names if name in TELLING)
        for _ in range(draw(st.integers(0, 3))):
            field = draw(st.sampled_from((*telling * 4, *header.dtype.names)))
            cell = header.dtype[field].base
            value: Any = (
                draw(st.sampled_from(NUMBERS) | st.integers(-9, 9))
                if cell.kind in "iuf"
                else draw(st.binary(max_size=8))
            )
            with np.errstate(all="ignore"):
                try:
                    value = np.array(value).astype(cell)
                except (OverflowError, TypeError):
                    value = np.zeros((), cell)
            if header.dtype[field].shape:
                header[field].reshape(-1)[draw(st.integers(0, header[field].size - 1))] = value
            else:
                header[field] = value
        content = header.tobytes()[: len(content)] + content[dtype.itemsize :]
    if draw(st.sampled_from((False, False, True))):
        content = draw(damaged(content))
    name = "a." + kind.removeprefix("2.")
    if kind in ("npy", "hdr") or draw(st.booleans()):
        return name, content, modality, None
    bzip2 = kind != "mgh" and draw(st.booleans())
    packed = bz2.compress(content, 1) if bzip2 else gzip.compress(content, 1, mtime=0)
    name = "a.mgz" if kind == "mgh" else name + (".bz2" if bzip2 else ".gz")
    return name, draw(damaged(packed)) if draw(st.booleans()) else packed, modality, content


@SETTINGS
@given(volume_files(), st.sampled_from((0, 0, 1)))
def volumes(file: tuple[str, bytes, str, bytes | None], window: int) -> None:
    """What is read of a damaged compressed file is what was compressed."""
    name, content, modality, plain = file
    path, config = put(name, content), MODALITIES[modality]
    if path.suffix == ".hdr":
        put("a.img", voxels())
    with only(DataError, data=file):
        volume = load_volume(path, config, window)
        assert volume.shape == config.size
        assert volume.dtype == np.float32
        assert np.isfinite(volume).all()
        if plain is not None:
            plain_path = put("plain.mgh" if name == "a.mgz" else "plain.nii", plain)
            np.testing.assert_array_equal(volume, load_volume(plain_path, config, window))


# Checkpoints

NAMES = (
    "module.language_model.model.norm.weight",
    "module._orig_mod.multi_modal_projector.linear_1.bias",
    "module.vision_tower.vision_model.embeddings.T1_proj.weight",
)
"""As wrappers leave them (`rules.unwrapped_names`)."""
ARRAYS = {name: Tensor.from_array(np.arange(6, dtype=np.float32).reshape(2, 3) + i) for i, name in enumerate(NAMES)}


@cache
def checkpoint(kind: str) -> bytes:
    """A valid file of weights."""
    path = folder() / "valid"
    if kind == "trainable":
        write_trainable(path, Trainable(ARRAYS, {"T1": MODALITIES["resize"]}, "f" * 64, "umbrella"))
    else:
        write_safetensors(path, ARRAYS)
    return path.read_bytes()


@st.composite
def weight_files(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from(("weights", "weights", "index", "adapter")))
    if kind == "index":
        return INDEX, draw(texts([{"metadata": {}, "weight_map": dict.fromkeys(NAMES, "shard.safetensors")}]))
    if kind == "adapter":
        return ADAPTER, draw(texts([{"base_model_name_or_path": "lab/llava", "peft_type": "LORA"}]))
    content = checkpoint(draw(st.sampled_from(("weights", "trainable"))))
    if draw(st.booleans()):
        end = 8 + int.from_bytes(content[:8], "little")
        tree = json.loads(content[8:end])
        text = written(draw(altered(tree))) if draw(st.booleans()) else draw(damaged(written(tree), WORDS))
        content = len(text).to_bytes(8, "little") + text + content[end:]
    return SINGLE, draw(damaged(content)) if draw(st.sampled_from((False, False, True))) else content


@SETTINGS
@given(weight_files())
def checkpoints(file: tuple[str, bytes]) -> None:
    for name in (INDEX, SINGLE, ADAPTER):
        (folder() / name).unlink(missing_ok=True)
    put("shard.safetensors", checkpoint("weights"))
    path = put(*file)
    with only(CheckpointError, data=file):
        for tensor in open_checkpoint(folder()).values():
            assert tensor.read().shape == tensor.shape
            for block in tensor.blocks():
                assert block.shape[1:] == tensor.shape[1:]
    if path.name == SINGLE:
        with only(CheckpointError, ConfigError, data=file):
            open_trainable(path)


# Configurations

RUN = {
    "model": {
        "base": "base",
        "modalities": {"T1": {"size": [96, 96, 96], "patch": [16, 16, 16], "mode": "pad", "spacing": 2.0}},
        "remat": "mlp",
    },
    "data": {"train": "a.json", "augment": {"rotation": 5.0, "translation": 3}, "threads": 2},
    "train": {
        "groups": {"patch_embed": {"weight_decay": 0.1}},
        "learning_rate": 5e-5,
        "betas": [0.9, 0.99],
        "epochs": 1,
    },
    "mesh": {"fsdp": 2},
    "seed": 3,
}
ORIGINAL = {
    "dataset": {"sMRI": {"img_size": [96, 96, 96]}, "rsfMRI": {"img_size": [96, 96, 96, 24], "stride_within_seq": 1}},
    "model": {"hf_name": "llava", "sMRI": {"patch_size": [10, 10, 10]}, "rsfMRI": {"patch_size": [16, 16, 16, 3]}},
    "trainer": {
        "learning_rate": 5e-5,
        "mixed_precision": "bf16",
        "max_epochs": 3,
        "report_to": "wandb",
        "ckpt_dir": "x",
    },
    "wandb": {"API_KEY": "x"},
    "seed": 1,
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 9,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "torch_dtype": "bfloat16",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 12,
        "intermediate_size": 9,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 24,
        "intermediate_size": 9,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "vocab_size": 40,
        "layer_types": ["full_attention"],
        "attention_dropout": 0.1,
        "tie_word_embeddings": True,
        "quantization_config": None,
    },
}
UMBRELLA = {
    "modalities": {"T1": to_dict(MODALITIES["pad"])},
    "template": "umbrella",
    "base": "x",
    "base_fingerprint": "f",
    "untrained": {"T1": "random"},
}


def yaml(tree: Any) -> bytes:
    """A tree as YAML, in blocks; strings that YAML cannot hold as JSON has them."""
    path = folder() / "dumped.yaml"
    try:
        with path.open("w") as file:
            YAML(typ="safe", pure=True).dump(tree, file)
        return path.read_bytes()
    except Exception:  # what its writer cannot write, which raises nearly anything, is tried as JSON
        return written(tree)


YAMLS: Mapping[str, tuple[Callable[[Path], Any], Any]] = {
    "run.yaml": (load_config, RUN),
    "original.yaml": (load_original, ORIGINAL),
}
JSONS = {"config.json": LLAVA, "umbrella_config.json": UMBRELLA}


@st.composite
def config_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from((*YAMLS, *JSONS)))
    if name in YAMLS:
        return name, draw(texts([YAMLS[name][1]], draw(st.sampled_from((written, yaml)))))
    return name, draw(texts([JSONS[name]]))


@SETTINGS
@given(config_files())
def configs(file: tuple[str, bytes]) -> None:
    for name, tree in JSONS.items():
        put(name, written(tree))
    path = put(*file)
    if path.name in YAMLS:
        with only(ConfigError, data=file):
            YAMLS[path.name][0](path)
        return
    with only(CheckpointError, ConfigError, data=file):
        read_config(folder())
    with only(CheckpointError, ConfigError, data=file):
        stored_template(folder())
    with only(CheckpointError, ConfigError, data=file):
        stored_untrained(folder())
    with only(CheckpointError, data=file):
        unused_dropout(folder())


TARGETS: Mapping[str, Callable[..., None]] = {
    "conversations": conversations,
    "volumes": volumes,
    "checkpoints": checkpoints,
    "configs": configs,
}
