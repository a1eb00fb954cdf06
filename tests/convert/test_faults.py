"""One change to a good checkpoint gives one error that names file and tensor, before any parameter is read."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.config_json import read_config
from convert.from_hf import fingerprint, load_params, plan_loading
from convert.rules import EMBED, LM_HEAD
from convert.safetensors_files import INDEX, SINGLE, open_checkpoint
from convert.trainable import Trainable, write_trainable
from tests.helpers import small_run
from tests.helpers.checkpoints import MODALITIES, write_stock, write_umbrella
from tests.helpers.small_run import umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.errors import CheckpointError, ConfigError, UmbrellaError
from umbrella_jax.models import LlavaConfig

LAYER = "language_model.model.layers.1.mlp.up_proj.weight"
STACK = "language_model.model.layers.mlp.up_proj.weight"
NORM = "language_model.model.norm.weight"
SQUARE = "language_model.model.layers.0.self_attn.q_proj.weight"  # square, so a transposition keeps the shape
EMBEDDINGS = "vision_tower.vision_model.embeddings."
KERNEL = EMBEDDINGS + "T1_proj.weight"
LINEAR = "multi_modal_projector.linear_1.weight"
FIRST, SECOND, THIRD, LAST = (f"model-0000{i}-of-00005.safetensors" for i in (1, 2, 3, 5))

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write checkpoints without faults: `one` file, five `shards`, `stock`, and `part`, trained parameters of `one`."""
    root = tmp_path_factory.mktemp("good")
    write_umbrella(root / "one")
    write_umbrella(root / "shards", shards=5)  # consecutive layers are in different shards
    write_stock(root / "stock")
    own = {name: t for name, t in open_checkpoint(root / "one").items() if name.startswith(EMBEDDINGS)}
    write_trainable(root / "part", Trainable(own, dict(MODALITIES), fingerprint(root / "one")))
    modalities = {m: {"size": list(c.size), "patch": list(c.patch)} for m, c in MODALITIES.items()}
    small_run.write_config(root / "run.yaml", {"model": {"modalities": modalities}})
    return root


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return `copy(kind, change)`, which copies a good checkpoint and makes one change."""

    def make(kind: str, change: Change = lambda directory: None) -> Path:
        directory = shutil.copytree(good / kind, tmp_path / kind)
        change(directory)
        return directory

    return make


def failing(path: str, shape: tuple[int, ...]) -> Any:
    pytest.fail(f"{path} was made")


def refused(
    directory: Path, config: LlavaConfig, error: type[UmbrellaError] = CheckpointError, **options: Any
) -> tuple[str, ...]:
    """Return the faults found in the headers; loading reports the same."""
    with pytest.raises(error) as headers:
        plan_loading(directory, config, **options)
    if "patch_embed" not in options:  # `load_params` does not take it
        with pytest.raises(error) as whole:
            load_params(directory, config, sharding_for=failing, **options)
        assert whole.value.faults == headers.value.faults
    return headers.value.faults


def only(faults: Sequence[str], *expected: str) -> None:
    """There is one fault, which contains every expected text."""
    assert len(faults) == 1, faults
    for part in expected:
        assert part in faults[0], faults[0]


# Tensors: each change alters {name: array}.


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def make(directory: Path) -> None:
        arrays = load_file(directory / SINGLE)
        change(arrays)
        save_file({name: np.array(a, order="C") for name, a in arrays.items()}, directory / SINGLE)

    return make


def cast(name: str, dtype: Any) -> Change:
    return tensors(lambda t: t.update({name: t[name].astype(dtype)}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(tensors(lambda t: t.pop(LAYER)), ["{dir}: " + LAYER, "missing", "[104, 48]"], id="missing"),
        pytest.param(
            tensors(lambda t: t.pop(KERNEL)), ["{dir}: " + KERNEL, "missing", "[36, 1, 5, 3, 2]"], id="missing-kernel"
        ),
        pytest.param(
            tensors(lambda t: t.update({"language_model.model.norm.bias": t[NORM]})),
            ["{file}: language_model.model.norm.bias: not a part of the model"],
            id="extra",
        ),
        pytest.param(
            tensors(lambda t: t.update({LAYER.replace(".1.", ".3."): t[LAYER]})),
            ["{file}: " + LAYER.replace(".1.", ".3."), "not a part of the model"],
            id="a layer more",
        ),
        pytest.param(
            tensors(lambda t: t.update({LAYER: t[LAYER][1:]})),
            ["{file}: " + LAYER, "expected shape [104, 48], found [103, 48]"],
            id="shape",
        ),
        pytest.param(
            tensors(lambda t: t.update({LINEAR: t[LINEAR].T})),
            ["{file}: " + LINEAR, "expected shape [48, 36], found [36, 48]"],
            id="transposed",
        ),
        pytest.param(
            tensors(lambda t: t.update({KERNEL: t[KERNEL].reshape(36, 30)})),
            ["{file}: " + KERNEL, "expected shape [36, 1, 5, 3, 2], found [36, 30]"],
            id="flattened kernel",
        ),
        pytest.param(
            tensors(lambda t: t.update({KERNEL: t[KERNEL].transpose(0, 1, 4, 3, 2)})),
            ["{file}: " + KERNEL, "expected shape [36, 1, 5, 3, 2], found [36, 1, 2, 3, 5]"],
            id="kernel along W, H, D",
        ),
        pytest.param(
            tensors(lambda t: t.update({NORM: t[NORM][0]})),
            ["{file}: " + NORM, "expected shape [48], found []"],
            id="scalar",
        ),
        pytest.param(
            tensors(lambda t: t.update({NORM: t[NORM][:0]})),
            ["{file}: " + NORM, "expected shape [48], found [0]"],
            id="no numbers",
        ),
        pytest.param(cast(LINEAR, np.int8), ["{file}: " + LINEAR, "type I8", "expected one of float32"], id="int8"),
        pytest.param(cast(LINEAR, np.float64), ["{file}: " + LINEAR, "type float64"], id="float64"),
        pytest.param(cast(LINEAR, ml_dtypes.float8_e4m3fn), ["{file}: " + LINEAR, "type F8_E4M3"], id="float8"),
        pytest.param(
            cast(LAYER, np.float16),
            ["{dir}: " + STACK, "2 types", LAYER + " float16", LAYER.replace(".1.", ".2.") + " float32"],
            id="two types in a stack",
        ),
        pytest.param(
            tensors(lambda t: t.update({"model.language_model.norm.weight": t[NORM]})),
            ["{file}: ", "model.language_model.norm.weight", NORM, "the same tensor"],
            id="two layouts' names",
        ),
        pytest.param(
            tensors(lambda t: t.update({EMBEDDINGS + "patch_embedding.T1_proj.weight": t[KERNEL]})),
            ["{file}: ", KERNEL, EMBEDDINGS + "patch_embedding.T1_proj.weight", "the same tensor"],
            id="two layouts' names of the kernel",
        ),
        pytest.param(
            tensors(lambda t: t.update({n.replace("T1_", "sMRI_"): t[n] for n in list(t) if "T1_" in n})),
            ["{dir}: modality sMRI", "T1 already"],
            id="two names of a modality",
        ),
        pytest.param(
            tensors(lambda t: t.update({n.replace("T1_", "PET_"): t[n] for n in list(t) if "T1_" in n})),
            ["{dir}: modality PET", "not a configured modality"],
            id="modality that is not configured",
        ),
    ],
)
def test_tensors(copy: Callable[..., Path], good: Path, change: Change, expected: list[str]) -> None:
    directory = copy("one", change)
    places = {"dir": directory, "file": directory / SINGLE}
    only(refused(directory, read_config(good / "one")), *(part.format(**places) for part in expected))


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_without_a_change_all_is_accepted(copy: Callable[..., Path], good: Path, kind: str) -> None:
    directory = copy(kind, tensors(lambda t: None) if kind == "one" else lambda directory: None)
    assert load_params(directory, read_config(good / "one"))[1].lines() == []


def test_head_that_differs_from_the_embeddings_to_which_it_is_tied(copy: Callable[..., Path]) -> None:
    def change(t: dict[str, np.ndarray]) -> None:
        t[LM_HEAD] = t[EMBED].copy()
        t[LM_HEAD][330, 47] = -t[LM_HEAD][330, 47]

    directory = copy("one", tensors(change))
    with pytest.raises(CheckpointError) as error:
        load_params(directory, read_config(directory), sharding_for=failing)
    only(error.value.faults, f"{directory / SINGLE}: {LM_HEAD}", "differs from the tied embeddings")


@pytest.mark.parametrize(
    ("own", "dtype", "value", "fits"),
    [
        ("float32", "float32", 1e6, True),
        ("float32", "bfloat16", 1e6, True),
        ("float32", "float16", 6e4, True),
        ("float32", "float16", 1e6, False),
        ("float32", "float16", -1e6, False),
        ("float32", "bfloat16", 3.4e38, False),  # bfloat16 ends at 3.39e38
        ("bfloat16", "float16", 1e6, False),
        ("float16", "bfloat16", 6e4, True),
    ],
)
def test_number_too_large_for_the_type(
    copy: Callable[..., Path], good: Path, tmp_path: Path, own: str, dtype: str, value: float, fits: bool
) -> None:
    """The layer is in another shard than the first layer."""
    directory = copy("shards")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    assert weight_map[LAYER] != weight_map[LAYER.replace(".1.", ".0.")]
    for shard in set(weight_map.values()):
        arrays = load_file(directory / shard)
        if LAYER in arrays:
            arrays[LAYER][5, 6] = value
        save_file({name: a.astype(np.dtype(own)) for name, a in arrays.items()}, directory / shard)
    flags = [directory, tmp_path / "native", "--config", good / "run.yaml", "--set", f"model.frozen_dtype={dtype}"]
    message = umbrella("convert", "from-hf", *flags, code=0 if fits else 2)
    assert (tmp_path / "native").exists() == fits
    if fits:
        assert json.loads((tmp_path / "native" / "config.json").read_text())["torch_dtype"] == dtype
    else:
        for part in (str(directory / weight_map[LAYER]), LAYER, f"too large for {dtype}"):
            assert part in message


# Files: each change alters the bytes.


def raw(file: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda directory: (directory / file).write_bytes(change((directory / file).read_bytes())) and None


def header(file: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def make(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        value = json.loads(data[8:end])
        change(value)
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return raw(file, make)


def shift(value: dict[str, Any], by: int) -> None:
    """Move the last tensor in the file."""
    last = max((v for k, v in value.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][1])
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


def long(data: bytes, length: int) -> bytes:
    return length.to_bytes(8, "little") + data[8:]


def index(change: Callable[[dict[str, str]], Any]) -> Change:
    def make(directory: Path) -> None:
        value = json.loads((directory / INDEX).read_text())
        change(value["weight_map"])
        (directory / INDEX).write_text(json.dumps(value))

    return make


def move(name: str, to: str, keep: bool = False) -> Change:
    """A tensor moves from its shard to another, and the index is not updated."""

    def make(directory: Path) -> None:
        own = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
        arrays, others = load_file(own), load_file(directory / to)
        save_file(others | {name: arrays[name]}, directory / to)
        save_file({k: v for k, v in arrays.items() if keep or k != name}, own)

    return make


def huge(directory: Path) -> None:
    """The header has more than 100 MB, and so has the file."""
    with (directory / FIRST).open("r+b") as file:
        file.write((100_000_008).to_bytes(8, "little"))
        file.truncate(200_000_000)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(raw(FIRST, lambda data: data[:-1]), ["{dir}/" + FIRST, "cut short"], id="a byte short"),
        pytest.param(raw(FIRST, lambda data: data[: len(data) // 2]), ["{dir}/" + FIRST, "cut short"], id="half"),
        pytest.param(raw(FIRST, lambda data: data[:100]), ["{dir}/" + FIRST, "cut short"], id="cut in the header"),
        pytest.param(raw(FIRST, lambda data: data + b"\0"), ["{dir}/" + FIRST, "damaged"], id="a byte long"),
        pytest.param(raw(FIRST, lambda data: b""), ["{dir}/" + FIRST, "cut short"], id="empty"),
        pytest.param(raw(FIRST, lambda data: data[:8]), ["{dir}/" + FIRST, "cut short"], id="8 bytes"),
        pytest.param(raw(FIRST, lambda data: b"\0" * 64), ["{dir}/" + FIRST, "damaged"], id="zeros"),
        pytest.param(
            raw(FIRST, lambda data: long(data, len(data))), ["{dir}/" + FIRST, "damaged"], id="header behind the end"
        ),
        pytest.param(raw(FIRST, lambda data: long(data, 2**63)), ["{dir}/" + FIRST, "damaged"], id="header of 2^63"),
        pytest.param(huge, ["{dir}/" + FIRST, "damaged"], id="header of 100 MB"),
        pytest.param(
            raw(FIRST, lambda data: data[:8] + b"?" + data[9:]), ["{dir}/" + FIRST, "damaged"], id="header no JSON"
        ),
        pytest.param(
            raw(FIRST, lambda data: data[:8] + b"\xff" + data[9:]), ["{dir}/" + FIRST, "damaged"], id="header no text"
        ),
        pytest.param(header(FIRST, lambda v: shift(v, 4)), ["{dir}/" + FIRST, "damaged"], id="behind the end"),
        pytest.param(header(FIRST, lambda v: shift(v, -4)), ["{dir}/" + FIRST, "damaged"], id="on its neighbour"),
        pytest.param(
            header(FIRST, lambda v: v.pop(sorted(v.keys() - {"__metadata__"})[3])),
            ["{dir}/" + FIRST, "damaged"],
            id="hole",
        ),
        pytest.param(
            header(FIRST, lambda v: v[sorted(v.keys() - {"__metadata__"})[0]].update(dtype="F99")),
            ["{dir}/" + FIRST, "damaged"],
            id="unknown type",
        ),
        pytest.param(
            header(FIRST, lambda v: v[sorted(v.keys() - {"__metadata__"})[0]]["shape"].append(2)),
            ["{dir}/" + FIRST, "damaged"],
            id="shape of more bytes",
        ),
        pytest.param(raw(INDEX, lambda data: data[:-9]), ["{dir}/" + INDEX, "not valid JSON"], id="index cut short"),
        pytest.param(raw(INDEX, lambda data: b"\xff\xfe"), ["{dir}/" + INDEX, "cannot be read"], id="index no text"),
        pytest.param(
            raw(INDEX, lambda data: b'{"weight_map": {"a": 1}}'), ["{dir}/" + INDEX], id="index of other values"
        ),
        pytest.param(
            lambda directory: (directory / SECOND).unlink(), ["{dir}/" + SECOND, "missing", INDEX], id="shard missing"
        ),
        pytest.param(
            index(lambda m: m.update({"ghost": "model-00006-of-00005.safetensors"})),
            ["{dir}/model-00006-of-00005.safetensors", "missing", INDEX],
            id="index names a missing file",
        ),
        pytest.param(
            index(lambda m: m.update({"ghost": FIRST})),
            ["{dir}/" + INDEX, "ghost", FIRST, "none"],
            id="index names a missing tensor",
        ),
        pytest.param(
            index(lambda m: m.pop(LAYER)), ["{dir}/model-", LAYER, f"not in {INDEX}"], id="tensor not in the index"
        ),
        pytest.param(
            move(NORM, SECOND), ["{dir}/" + INDEX, NORM, "found in {dir}/" + SECOND], id="tensor in another shard"
        ),
        pytest.param(move(NORM, LAST, keep=True), ["{dir}/" + LAST, NORM, "also in {dir}/"], id="tensor in two shards"),
        pytest.param(
            lambda directory: save_file({"a": np.ones(3)}, directory / SINGLE),
            ["{dir}: holds both"],
            id="also one file",
        ),
    ],
)
def test_files(copy: Callable[..., Path], good: Path, change: Change, expected: list[str]) -> None:
    directory = copy("shards", change)
    only(refused(directory, read_config(good / "one")), *(part.format(dir=directory) for part in expected))


# Folders without a LLaVA's weights.

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1735000000\n"


def instead(*names: str, config: bool = True) -> Change:
    """Replace the weights by files of these names, or folders if a name ends in /."""

    def make(directory: Path) -> None:
        (directory / SINGLE).unlink()
        if not config:
            (directory / "config.json").unlink()
        for name in names:
            path = directory / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_text('{"base_model_name_or_path": "lab/llava"}' if name == "adapter_config.json" else "")

    return make


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"],
            ["only a PEFT adapter, of the base lab/llava", "with --adapter"],
        ),
        (["adapter_model.bin"], ["only a PEFT adapter; ", "with --adapter"]),
        (
            ["global_step500/", "latest", "zero_to_fp32.py", "rng_state_0.pth"],
            ["DeepSpeed", "(global_step500)", "zero_to_fp32.py . OUT"],
        ),
        (["pytorch_model_fsdp.bin", "optimizer.bin"], ["FSDP", "accelerate merge-weights"]),
        (["pytorch_model_fsdp_0/"], ["FSDP", "accelerate merge-weights"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["without the index", ".index.json"],
        ),
        (["pytorch_model-00001-of-00002.bin"], ["without the index", ".index.json"]),
        (["model.fp16.safetensors"], ["variant", "rename"]),
        (["trainable.safetensors"], ["what a run trained", "--patch-embed"]),
        (["llava-Q4_K_M.gguf"], ["llama.cpp", "original"]),
        (["tf_model.h5"], ["TensorFlow", "from_tf=True"]),
        (["flax_model.msgpack"], ["Flax", "from_flax=True"]),
        (["consolidated.00.pth"], ["PyTorch files of another kind", "save_pretrained"]),
        (
            ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"],
            ["Trainer's state", "model.safetensors"],
        ),
        (
            ["checkpoint-20/model.safetensors", "training_args.bin"],
            ["one folder further down", "name {dir}/checkpoint-20"],
        ),
        (["merges.txt", "special_tokens_map.json"], ["without"]),
    ],
)
def test_folder_of_something_else(
    copy: Callable[..., Path], names: list[str], expected: list[str], with_config: bool
) -> None:
    """The contents are named, with and without config.json."""
    directory = copy("one", instead(*names, config=with_config))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(directory).check()
    only(error.value.faults, f"{directory}: ", *(part.format(dir=directory) for part in expected))


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_beside_the_weights(copy: Callable[..., Path], weights: str) -> None:
    """Nothing says which of the two models is meant."""
    directory = copy("one")
    (directory / weights).touch()
    (directory / "adapter_config.json").write_text("{}")
    for call in (open_checkpoint, fingerprint, Checkpoint.open(directory).check):
        with pytest.raises(CheckpointError) as error:
            call(*([] if call not in (open_checkpoint, fingerprint) else [directory]))
        only(
            error.value.faults,
            f"{directory}/adapter_config.json: a PEFT adapter beside",
            "merge_and_unload",
            "or remove",
        )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: (
                {f"base_model.model.{n}": a for n, a in t.items()}
                | {f"base_model.model.{SQUARE[:-6]}lora_A.default.weight": t[SQUARE]}
            ),
            "PEFT adapter that is not merged",
        ),
        (
            lambda t: {n.replace("q_proj.", "q_proj.base_layer."): a for n, a in t.items()},
            "PEFT adapter that is not merged",
        ),
        (
            lambda t: {n.replace("embed_tokens.", "embed_tokens.modules_to_save.default."): a for n, a in t.items()},
            "merge_and_unload",
        ),
        (lambda t: {n.replace("up_proj.weight", "up_proj.qweight"): a for n, a in t.items()}, "quantised weights"),
        (lambda t: t | {f"{LAYER}.absmax": t[NORM]}, "quantised weights"),
    ],
    ids=["lora", "base_layer", "modules_to_save", "gptq", "bitsandbytes"],
)
def test_tensors_of_another_kind(copy: Callable[..., Path], good: Path, change: Any, expected: str) -> None:
    """There is one fault, not one per tensor."""
    directory = copy("one")
    save_file(change(load_file(directory / SINGLE)), directory / SINGLE)
    only(refused(directory, read_config(good / "one")), f"{directory}: ", expected)


@pytest.mark.parametrize(
    "file",
    [
        SINGLE,
        "config.json",
        "umbrella_config.json",
        "generation_config.json",
        "tokenizer.json",
        "vocab.json",
        "chat_template.jinja",
        "pytorch_model.bin",
    ],
)
def test_git_lfs_pointer(copy: Callable[..., Path], file: str) -> None:
    directory = copy("one", lambda directory: [(directory / file).write_text(POINTER)])
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(directory)
    only(error.value.faults, f"{directory / file}: a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("file", [SINGLE, "pytorch_model.bin"])
def test_git_lfs_pointer_where_the_file_alone_is_read(copy: Callable[..., Path], good: Path, file: str) -> None:
    directory = copy("one", lambda directory: (directory / SINGLE).rename(directory / file))
    (directory / file).write_text(POINTER)
    only(refused(directory, read_config(good / "one")), f"{directory / file}: a Git LFS pointer", "git lfs pull")


def test_git_lfs_pointers_are_named_together(copy: Callable[..., Path], good: Path) -> None:
    directory = copy("shards", lambda directory: [(directory / name).write_text(POINTER) for name in (FIRST, LAST)])
    with pytest.raises(CheckpointError) as error:
        read_config(directory)
    assert [fault.partition(":")[0] for fault in error.value.faults] == [
        f"{directory / name}" for name in (FIRST, LAST)
    ]
    part = directory / "part"
    part.write_text(POINTER)
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        read_config(good / "one", patch_embed=part)


# config.json.


def config(section: str = "", **values: Any) -> Change:
    def make(directory: Path) -> None:
        value = json.loads((directory / "config.json").read_text())
        (value[section] if section else value).update(values)
        (directory / "config.json").write_text(json.dumps(value))

    return make


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda d: (d / "config.json").unlink(), ["not found"], id="missing"),
        pytest.param(raw("config.json", lambda data: data[:-3]), ["not valid JSON"], id="cut short"),
        pytest.param(raw("config.json", lambda data: b"[]"), ["expected an object, found list"], id="a list"),
        pytest.param(raw("config.json", lambda data: b"\xff\xfe"), ["cannot be read"], id="no text"),
        pytest.param(config(model_type="llava_next"), ["model_type: 'llava_next'", "'llava'"], id="other LLaVA"),
        pytest.param(
            config("text_config", hidden_act="relu"), ["text_config.hidden_act: 'relu'", "'silu'"], id="activation"
        ),
        pytest.param(
            config("vision_config", hidden_act="quick_gelu"),
            ["vision_config.hidden_act: 'quick_gelu'"],
            id="activation of the tower",
        ),
        pytest.param(
            config(projector_hidden_act="relu"), ["projector_hidden_act: 'relu'"], id="activation of the projector"
        ),
    ],
)
def test_config(copy: Callable[..., Path], good: Path, tmp_path: Path, change: Change, expected: list[str]) -> None:
    directory = copy("one", change)
    with pytest.raises(CheckpointError) as error:
        read_config(directory)
    only(error.value.faults, f"{directory / 'config.json'}:", *expected)
    flags = [directory, tmp_path / "native", "--config", good / "run.yaml"]
    assert umbrella("convert", "from-hf", *flags, code=2) == f"umbrella-jax: {error.value}\n"
    assert not (tmp_path / "native").exists()


def test_config_of_fewer_layers(copy: Callable[..., Path]) -> None:
    directory = copy("one", config("vision_config", num_hidden_layers=2))
    faults = refused(directory, read_config(directory))
    assert len(faults) == 16
    assert all(f"{directory / SINGLE}: vision_tower.vision_model.encoder.layers.2." in fault for fault in faults)


# NaN and infinity, which only `--check-finite` detects.


@pytest.mark.parametrize("name", [LAYER, EMBED, KERNEL], ids=["in a stack", "table", "kernel"])
@pytest.mark.parametrize(
    "values", [[np.nan, np.nan], [np.inf, -np.inf], [np.nan, np.inf]], ids=["nan", "inf", "nan and inf"]
)
def test_not_finite(copy: Callable[..., Path], good: Path, tmp_path: Path, name: str, values: list[float]) -> None:
    directory = copy("shards")
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    arrays = load_file(file)
    arrays[name].reshape(-1)[[3, -1]] = values
    save_file(arrays, file)
    flags = [directory, tmp_path / "native", "--config", good / "run.yaml"]
    message = umbrella("convert", "from-hf", *flags, "--check-finite", code=2)
    assert message == f"umbrella-jax: {file}: {name}: 2 of {arrays[name].size} numbers are NaN or infinite\n"
    assert not (tmp_path / "native").exists()
    umbrella("convert", "from-hf", *flags)
    assert (tmp_path / "native").exists()


def test_finite_weights_are_accepted(good: Path, tmp_path: Path) -> None:
    flags = [good / "shards", tmp_path / "native", "--config", good / "run.yaml", "--check-finite"]
    assert "native checkpoint" in umbrella("convert", "from-hf", *flags)


def test_not_finite_where_a_patch_embedding_starts_from(copy: Callable[..., Path], good: Path, tmp_path: Path) -> None:
    name = EMBEDDINGS + "patch_embedding.bias"
    directory = copy("stock", tensors(lambda t: t[name].put(4, np.nan)))
    flags = [directory, tmp_path / "native", "--config", good / "run.yaml", "--check-finite"]
    umbrella("convert", "from-hf", *flags)  # the NaN is not read
    shutil.rmtree(tmp_path / "native")
    message = umbrella("convert", "from-hf", *flags, "--set", "model.patch_embed_init=inflate", code=2)
    assert f"{directory / 'model.safetensors'}: {name}: 1 of 36 numbers are NaN or infinite" in message
    assert not (tmp_path / "native").exists()


# Files of trained parameters.


def test_part_is_accepted_on_its_base(good: Path) -> None:
    params = Checkpoint.open(good / "one", patch_embed=good / "part").params()
    assert params.keys() == load_params(good / "one", read_config(good / "one"))[0].keys()


@pytest.mark.parametrize("name", [KERNEL, NORM])
def test_part_of_another_base(copy: Callable[..., Path], good: Path, tmp_path: Path, name: str) -> None:
    directory = copy("one", tensors(lambda t: t[name].put(5, -t[name].flat[5])))
    part = good / "part"
    checkpoint = Checkpoint.open(directory, patch_embed=part)
    assert checkpoint.check() == []  # reads no numbers
    with pytest.raises(CheckpointError) as error:
        checkpoint.params(sharding_for=failing)
    ours, theirs = (fingerprint(d)[:12] for d in (directory, good / "one"))
    only(error.value.faults, f"{part}: trained on another base", ours, theirs, str(directory))
    flags = [directory, tmp_path / "native", "--config", good / "run.yaml", "--patch-embed", part]
    assert f"{part}: trained on another base" in umbrella("convert", "from-hf", *flags, code=2)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda p: p.unlink(), "no such file", id="missing"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut short", id="cut short"),
        pytest.param(lambda p: p.write_bytes(b""), "cut short", id="empty"),
        pytest.param(lambda p: (p.unlink(), p.mkdir()), "", id="a folder"),
        pytest.param(lambda p: save_file({"a": np.ones(3)}, p), "expected a file of `umbrella-jax", id="no metadata"),
        pytest.param(
            lambda p: save_file({"a": np.ones(3)}, p, metadata={"format": "pt"}),
            "expected a file of `umbrella-jax",
            id="transformers'",
        ),
        pytest.param(
            lambda p: save_file({"a": np.ones(3)}, p, metadata={"base_fingerprint": "0", "modalities": "{"}),
            "expected a file of `umbrella-jax",
            id="modalities no JSON",
        ),
        pytest.param(
            lambda p: save_file({"a": np.ones(3)}, p, metadata={"base_fingerprint": "0", "modalities": "[3]"}),
            "modalities",
            id="modalities a list",
        ),
    ],
)
def test_part_that_is_none(good: Path, tmp_path: Path, change: Callable[[Path], Any], expected: str) -> None:
    part = Path(shutil.copy(good / "part", tmp_path / "part"))
    change(part)
    only(refused(good / "one", read_config(good / "one"), UmbrellaError, patch_embed=part), str(part), expected)
    flags = [good / "one", tmp_path / "native", "--config", good / "run.yaml", "--patch-embed", part]
    message = umbrella("convert", "from-hf", *flags, code=2)
    assert message.startswith(f"umbrella-jax: {part}: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda t: t.pop(KERNEL), [KERNEL, "missing"], id="missing"),
        pytest.param(lambda t: t.update(other=t[KERNEL]), ["{part}: other", "not a part of the model"], id="extra"),
        pytest.param(
            lambda t: t.update({KERNEL: t[KERNEL].reshape(36, 30)}),
            ["{part}: " + KERNEL, "expected shape [36, 1, 5, 3, 2], found [36, 30]"],
            id="shape",
        ),
        pytest.param(
            lambda t: t.update({KERNEL: t[KERNEL].astype(np.float64)}), ["{part}: " + KERNEL, "float64"], id="type"
        ),
    ],
)
def test_part_whose_tensors_do_not_fit(
    good: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], expected: list[str]
) -> None:
    part = tmp_path / "part"
    arrays = load_file(good / "part")
    change(arrays)
    modalities = json.dumps({m: {"size": c.size, "patch": c.patch} for m, c in MODALITIES.items()})
    metadata = {"modalities": modalities, "base_fingerprint": fingerprint(good / "one")}
    save_file({k: np.array(v, order="C") for k, v in arrays.items()}, part, metadata=metadata)
    faults = refused(good / "one", read_config(good / "one"), patch_embed=part)
    only(faults, *(text.format(part=part) for text in expected))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(good / "one", patch_embed=part).params(sharding_for=failing)
    assert error.value.faults == faults


def test_part_onto_a_native_checkpoint(good: Path, tmp_path: Path) -> None:
    native, part = tmp_path / "native", good / "part"
    umbrella("convert", "from-hf", good / "one", native, "--config", good / "run.yaml")
    flags = [native, tmp_path / "again", "--config", good / "run.yaml", "--patch-embed", part]
    message = umbrella("convert", "from-hf", *flags, code=2)
    for said in (str(native), str(part), "Hugging Face directory"):
        assert said in message
    with pytest.raises(CheckpointError, match="Hugging Face directory"):
        Checkpoint.open(native, patch_embed=part)


# Initial weights of the patch embedding.


def test_resample_on_a_stock_base(good: Path) -> None:
    config = read_config(good / "stock", MODALITIES, init="resample")
    only(refused(good / "stock", config, init="resample"), f"{good / 'stock'}: model.patch_embed_init resample")


@pytest.mark.parametrize("kind", ["one", "stock"])
def test_inflate_without_siglips_own(copy: Callable[..., Path], kind: str, tmp_path: Path) -> None:
    """UMBRELLA bases lack SigLIP's tensors; the stock base here lacks the positions."""
    gone = [EMBEDDINGS + n for n in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")]
    if kind == "one":
        directory = tmp_path / "umbrella"
        write_umbrella(directory, modalities={"T1": MODALITIES["T1"]})
    else:
        gone = gone[2:]
        directory = copy("stock", tensors(lambda t: t.pop(gone[0])))
    config = read_config(directory, MODALITIES, init="inflate")
    for fault in (faults := refused(directory, config, init="inflate")):
        for part in (f"{directory}: model.patch_embed_init inflate", *gone, "missing"):
            assert part in fault
    assert len(faults) == 1  # although the stock checkpoint lacks two modalities


# Exports.


@pytest.mark.parametrize("size", ["many", "", "5XB", "GB", "-1GB", "0GB", "nanGB", "infGB"])
def test_max_shard_size(good: Path, tmp_path: Path, size: str) -> None:
    message = umbrella("convert", "to-hf", good / "one", tmp_path / "out", f"--max-shard-size={size}", code=2)
    assert f"--max-shard-size: {size!r}: expected a size" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--max-shard-size", "20KB"]])
def test_export_onto_a_folder_that_is_not_empty(good: Path, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    message = umbrella("convert", "to-hf", good / "one", tmp_path / "out", *flags, code=2)
    assert f"{tmp_path / 'out'}: directory is not empty" in message
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", ["one", "native"])
def test_trainable_only_needs_a_run(good: Path, tmp_path: Path, kind: str) -> None:
    source = good / "one"
    if kind == "native":
        source = tmp_path / "native"
        umbrella("convert", "from-hf", good / "one", source, "--config", good / "run.yaml")
    message = umbrella("convert", "to-hf", source, tmp_path / "out", "--trainable-only", code=2)
    assert f"{source}: not a run" in message
    assert not (tmp_path / "out").exists()


# Several faults.


def test_faults_are_named_together(copy: Callable[..., Path], good: Path) -> None:
    """Faults of tensors, modalities, types and initial weights are each reported once."""

    def change(t: dict[str, np.ndarray]) -> None:
        del t[LAYER], t[EMBEDDINGS + "rsfMRI_proj.bias"]
        t[LINEAR] = t[LINEAR].T
        t["multi_modal_projector.linear_2.bias"] = t["multi_modal_projector.linear_2.bias"].astype(np.int8)
        t[SQUARE] = t[SQUARE].astype(np.float16)
        t["model.language_model.norm.weight"] = t[NORM]
        t["other"] = t[NORM]
        t[EMBEDDINGS + "PET_proj.bias"] = t[EMBEDDINGS + "T1_proj.bias"]

    directory = copy("one", tensors(change))
    config = read_config(good / "one")
    config = replace(config, modalities={**config.modalities, "DWI": MODALITIES["T1"]})
    faults = refused(directory, config, init="inflate")
    expected = (LAYER, "rsfMRI_proj.bias", LINEAR, "linear_2.bias", "q_proj.weight: 2 types")
    expected += ("the same tensor as", "other: not a part", "modality PET", "patch_embed_init inflate")
    for part in expected:
        assert sum(part in fault for fault in faults) == 1, part
    assert len(faults) == len(expected)


def test_faults_of_files_are_named_together(copy: Callable[..., Path], good: Path) -> None:
    def change(directory: Path) -> None:
        raw(FIRST, lambda data: data[:-1])(directory)
        (directory / SECOND).unlink()
        index(lambda m: m.pop(next(name for name, file in m.items() if file == THIRD)))(directory)

    directory = copy("shards", change)
    faults = refused(directory, read_config(good / "one"))
    assert len(faults) == 3
    for fault, file in zip(sorted(faults), (FIRST, SECOND, THIRD), strict=True):
        assert fault.startswith(f"{directory / file}: ")


def test_resample_and_other_faults_are_named_together(copy: Callable[..., Path]) -> None:
    def change(directory: Path) -> None:
        tensors(lambda t: t.pop(LAYER))(directory)
        (directory / "umbrella_config.json").unlink()

    directory = copy("one", change)
    config = read_config(directory, MODALITIES, init="resample")
    message = str(refused(directory, config, init="resample"))
    assert LAYER in message
    assert message.count("umbrella_config.json") == 2  # once per modality


def test_modalities_that_do_not_agree_are_named_together(good: Path) -> None:
    other = {
        name: replace(m, orientation="as_stored", size=tuple(s + 1 for s in m.size)) for name, m in MODALITIES.items()
    }
    with pytest.raises(ConfigError) as error:
        read_config(good / "one", other)
    faults = error.value.faults
    assert len(faults) == 4
    for name in MODALITIES:
        for field in ("size", "orientation"):
            assert any(f"umbrella_config.json: {name}.{field}: " in fault for fault in faults)
