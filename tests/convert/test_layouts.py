"""Every layout of names and files loads as the same model and exports the same bits in the hub's layout."""

import json
import shutil
from argparse import Namespace
from functools import lru_cache
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert.config_json import read_config
from convert.from_hf import fingerprint, load_params, plan_loading
from convert.rules import EMBED, LM_HEAD
from convert.safetensors_files import open_checkpoint
from convert.to_hf import export
from tests.conftest import write_tokenizer
from tests.helpers.checkpoints import (
    FAMILIES,
    MODALITIES,
    make_model,
    randomise,
    save,
    under_transformers_4_46,
    write_umbrella,
)
from umbrella_jax.checkpoints.checkpoint import Checkpoint, NativeCheckpoint
from umbrella_jax.checkpoints.export import write_hf, write_native
from umbrella_jax.errors import CheckpointError

ROOT = Path(__file__).parents[2]
DTYPES = ("float32", "float16", "bfloat16")
EMBEDDINGS = "vision_tower.vision_model.embeddings."
TABLE = EMBEDDINGS + "position_embedding.weight"
RENAMED_FAMILY = {name: dict(zip(name, MODALITIES.values(), strict=True)) for name in FAMILIES}


def hub(name):
    """Return the name in files of transformers 4.x, and in its modules up to 4.51."""
    return name


def in_memory_4(name):
    """Return the name in modules of transformers 4.52 to 4.57."""
    for old, new in (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return "model." + name


def in_memory_5(name):
    """Return the name in modules of transformers 5."""
    return in_memory_4(name).replace("vision_tower.vision_model.", "vision_tower.")


def saved_by_5(name):
    """Return the name in files that transformers 5 writes for a model which it made itself."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


NAMES = (hub, in_memory_4, in_memory_5, saved_by_5)
FILES = ("safetensors", "safetensors shards", "bin", "bin shards", "bin legacy", "bin legacy shards")


def write_weights(directory, tensors, files="safetensors"):
    """Write tensors to one file or to three with an index, as one of FILES; return the paths without the index."""
    kind = files.split()[0]
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    shards = [f"{stem}.{kind}"]
    names = sorted(tensors)
    if "shards" in files:
        shards = [f"{stem}-{i + 1:05}-of-00003.{kind}" for i in range(3)]
        index = {"metadata": {}, "weight_map": {name: shards[i % 3] for i, name in enumerate(names)}}
        (directory / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    for i, file in enumerate(shards):
        part = {name: tensors[name] for name in names[i :: len(shards)]}
        if kind == "bin":
            torch.save(part, directory / file, _use_new_zipfile_serialization="legacy" not in files)
        else:
            save_file(part, directory / file, metadata={"format": "pt"})
    return [directory / file for file in shards]


def write(directory, source, tensors, files="safetensors"):
    """Write a checkpoint of other weights with the small files of `source`; return its directory."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    write_weights(directory, tensors, files)
    return directory


def read(directory):
    """Read the tensors of all safetensors files in a directory with the library."""
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def contents(directory):
    return {
        n: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in read(directory).items()
    }


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for path, array in expected.items():
        assert (params[path].dtype, params[path].shape) == (array.dtype, array.shape), path
        assert np.asarray(params[path]).tobytes() == np.asarray(array).tobytes(), path


@lru_cache(maxsize=12)
def params_of(source, config):
    """Load the parameters of a checkpoint that no test changes, once for all tests that compare with them."""
    return load_params(source, config)[0]


@lru_cache(maxsize=12)
def contents_of(source):
    """Read a checkpoint that no test changes, once for all tests that compare with it."""
    return contents(source)


@lru_cache(maxsize=12)
def fingerprint_of(source):
    """Compute the fingerprint of a checkpoint that no test changes once."""
    return fingerprint(source)


def assert_round_trip(directory, source, out, modalities=MODALITIES):
    """`directory` has the parameters of `source`, and its export the tensors of `source`.

    Returns the messages of loading, except those about preprocessing that is not recorded.
    """
    config = read_config(directory, modalities)
    params, summary = load_params(directory, config)
    assert_same(params, params_of(source, config))
    export(out, params, config, directory)
    assert contents(out) == contents_of(source)
    assert read_config(out) == config
    assert {path.name for path in out.iterdir() if path.suffix in (".bin", ".safetensors")} == {"model.safetensors"}
    assert not list(out.glob("*.index.json"))
    return [line for line in summary.lines() if line not in summary.undescribed]


def refused(directory, modalities=MODALITIES) -> str:
    with pytest.raises(CheckpointError) as error:
        load_params(directory, read_config(directory, modalities))
    return str(error.value)


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """Write checkpoints in the hub's layout, one safetensors file each: {(dtype, tied): directory}."""
    root = tmp_path_factory.mktemp("hubs")
    for seed, (dtype, tied) in enumerate(product(DTYPES, (True, False))):
        write_umbrella(root / f"{dtype}_{tied}", dtype=dtype, tied=tied, seed=10 * seed)
    return {(dtype, tied): root / f"{dtype}_{tied}" for dtype, tied in product(DTYPES, (True, False))}


# Names and files.


def unless(kept, *case):
    """Return a case that is slow unless it is kept."""
    return pytest.param(*case, marks=() if kept else pytest.mark.slow)


@pytest.mark.parametrize(
    ("names", "files", "dtype", "tied"),
    [
        # by default half of the pairs of names and files, which are read one after the other
        unless(k == (i + j) % 3 and (i + j) % 2 == 0, names, files, dtype, (i + k) % 2 == 0)
        for (i, names), (j, files), (k, dtype) in product(*map(enumerate, (NAMES, FILES, DTYPES)))
    ],
)
def test_names_and_files(hubs, tmp_path, names, files, dtype, tied):
    source = hubs[dtype, tied]
    tensors = {names(n): t for n, t in read(source).items()}
    directory = write(tmp_path / "in", source, tensors, files)
    assert open_checkpoint(directory).keys() == tensors.keys()
    assert assert_round_trip(directory, source, tmp_path / "out") == []
    assert fingerprint(directory) == fingerprint_of(source)


def compiled_inside(name):
    """Return the name in a model whose language model and layers were compiled or wrapped one by one."""
    name = name.replace("language_model.model.", "language_model._orig_mod.model.")
    return name.replace(".layers.1.", ".layers.1._checkpoint_wrapped_module.").replace(
        "layers.0.", "layers.0._orig_mod."
    )


WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "Lightning": lambda name: f"model.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "compiled DDP": lambda name: f"module._orig_mod.{name}",
    "DDP of compiled PEFT": lambda name: f"_orig_mod.module.base_model.model.{name}",
    "a class of one's own": lambda name: f"student.net.{name}",
    "parts compiled": compiled_inside,
}


@pytest.mark.parametrize(
    ("wrapper", "names", "files", "tied"),
    [
        unless(i < len(WRAPPERS), wrapper, NAMES[i % 4], FILES[i % 6], i % 2 == 0)
        for i, wrapper in enumerate([*WRAPPERS, *reversed(WRAPPERS), "Lightning"])
    ],
)
def test_prefixes_of_wrappers_are_removed(hubs, tmp_path, wrapper, names, files, tied):
    """The parts are removed, and the first name is reported as an example."""
    source = hubs["float32", tied]
    wrapped = {WRAPPERS[wrapper](names(n)): t for n, t in read(source).items()}
    directory = write(tmp_path / "in", source, wrapped, files)
    (line,) = assert_round_trip(directory, source, tmp_path / "out")
    assert line.startswith("tensor names: parts that wrappers added are removed: ")
    long, short = line.rpartition(": ")[2].split(" → ")
    assert long in wrapped
    assert short in {names(n) for n in read(source)}
    assert fingerprint(directory) == fingerprint_of(source)


def test_the_same_tensor_with_and_without_a_wrapper(hubs, tmp_path):
    tensors = read(hubs["float32", True])
    name = EMBEDDINGS + "T1_proj.bias"
    tensors[name.replace("T1", "_orig_mod.T1")] = tensors[name].clone()
    assert f"_orig_mod.T1_proj.bias: the same tensor as {name}; remove one" in refused(
        write(tmp_path / "in", hubs["float32", True], tensors)
    )


def test_names_are_those_of_the_installed_transformers(tmp_path):
    model = write_umbrella(tmp_path, tied=False)
    assert model.state_dict().keys() == {in_memory_5(name) for name in read(tmp_path)}


PROGRAM_446 = """
import sys
from pathlib import Path
import torch, transformers
from convert.torch_model import load_umbrella
assert transformers.__version__ == "4.46.3", transformers.__version__
for source in map(Path, sys.argv[2:]):
    model, out = load_umbrella(source), Path(sys.argv[1]) / source.name
    for safe in (True, False):
        for size in ("5GB", "100KB"):
            model.save_pretrained(out / f"{safe}_{size}", safe_serialization=safe, max_shard_size=size)
    model.config.save_pretrained(out / "state_dict")
    torch.save(model.state_dict(), out / "state_dict" / "pytorch_model.bin")
"""


@pytest.mark.slow
def test_reads_the_files_that_transformers_4_46_saves(hubs, tmp_path):
    sources = [hubs["float32", False], hubs["bfloat16", True]]
    under_transformers_4_46("-c", PROGRAM_446, tmp_path, *sources)
    for source in sources:
        saved = tmp_path / source.name
        assert {path.name: len([*path.glob("*.index.json")]) for path in saved.iterdir()} == {
            "True_5GB": 0,
            "True_100KB": 1,
            "False_5GB": 0,
            "False_100KB": 1,
            "state_dict": 0,
        }
        for directory in saved.iterdir():
            held = open_checkpoint(directory).keys()
            assert held - {LM_HEAD} == read(source).keys() - {LM_HEAD}
            assert (LM_HEAD in held) == (source == sources[0] or not directory.name.startswith("True"))
            assert assert_round_trip(directory, source, tmp_path / "out" / source.name / directory.name) == []


# pytorch_model.bin.


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_parameters_in_a_bin(hubs, tmp_path, dtype):
    """A state_dict may contain parameters, views, and tensors that are not contiguous."""
    source = hubs[dtype, False]
    tensors = read(source)
    for i, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 2:
            tensors[name] = tensor.T.contiguous().T
        elif i % 2:
            tensors[name] = torch.cat([tensor, tensor + 1])[: len(tensor)]
        else:
            tensors[name] = torch.nn.Parameter(tensor)
    assert sum(not t.is_contiguous() for t in tensors.values()) > 20
    assert sum(t.requires_grad for t in tensors.values()) > 5
    assert_round_trip(write(tmp_path / "in", source, tensors, "bin"), source, tmp_path / "out")


class Touch:
    """Creates an empty file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("files", [f for f in FILES if f.startswith("bin")])
def test_nothing_in_a_bin_is_executed(hubs, tmp_path, files):
    source = hubs["float32", True]
    directory = write(tmp_path / "in", source, read(source) | {"zzz": Touch(tmp_path / "touched")}, files)
    last = sorted(directory.glob("*.bin"))[(len(read(source)) % 3) if "shards" in files else 0]
    message = refused(directory)
    assert f"{last}: " in message
    assert not (tmp_path / "touched").exists()
    torch.load(last, weights_only=False)
    assert (tmp_path / "touched").exists()  # the pickle does create the file


@pytest.mark.parametrize("percent", [0, 1, 3, 10, 50, 99])
@pytest.mark.parametrize("files", ["bin", "bin legacy shards"])
def test_bin_that_is_cut_short(hubs, tmp_path, files, percent):
    source = hubs["float16", True]
    directory = write(tmp_path / "in", source, read(source), files)
    file = sorted(directory.glob("*.bin"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * percent // 100])
    assert f"{file}: cut short" in refused(directory)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, of the bit that is the protocol
@pytest.mark.parametrize("files", ["bin", "bin legacy"])
def test_damaged_bin_is_refused_by_name(tmp_path, files):
    """A file cut anywhere in its pickles, or with a flipped bit, is a CheckpointError and no other exception."""
    (file,) = write_weights(tmp_path, {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, files)
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [data[:n] for n in range(0, len(data) - 1, len(data) // 100)]
    for at, bit in zip(rng.integers(len(data), size=100), rng.integers(8, size=100), strict=True):
        damaged.append(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    refusals, others = 0, set()
    for contents in damaged:
        file.write_bytes(contents)
        try:
            open_checkpoint(tmp_path)  # a flipped bit of a number is not detected
        except CheckpointError as error:
            refusals += str(file) in str(error)
        except Exception as error:
            others.add(repr(error))
    assert others == set()
    assert refusals > 100


@pytest.mark.parametrize(
    "contents",
    [
        [torch.ones(3)],
        {"state_dict": {"a": torch.ones(3)}},
        {3: torch.ones(3)},
        {"a": torch.ones(3).to(torch.float8_e4m3fn)},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.ones(3, device="meta")},
    ],
    ids=["list", "nested", "number as name", "float8", "sparse", "meta"],
)
def test_bin_that_holds_something_else(hubs, tmp_path, contents):
    directory = write(tmp_path / "in", hubs["float32", True], {})
    (directory / "model.safetensors").unlink()
    torch.save(contents, directory / "pytorch_model.bin")
    assert str(directory / "pytorch_model.bin") in refused(directory)


@pytest.mark.parametrize("kind", ["int64", "float64", "bool"])
def test_type_that_no_parameter_has(hubs, tmp_path, kind):
    source = hubs["float32", True]
    tensors = read(source)
    tensors[EMBED] = tensors[EMBED].to(getattr(torch, kind))
    directory = write(tmp_path / "in", source, tensors, "bin")
    assert f"{directory / 'pytorch_model.bin'}: {EMBED}: type {kind}, expected one of float32" in refused(directory)


@pytest.mark.parametrize(("first", "second"), [*product(FILES[:2], FILES[2:4])])
def test_safetensors_win_over_a_bin(hubs, tmp_path, first, second):
    source = hubs["float32", False]
    directory = write(tmp_path / "in", source, read(source), first)
    write_weights(directory, {n: t + 1 for n, t in read(source).items()}, second)
    assert assert_round_trip(directory, source, tmp_path / "out") == []
    for file in directory.glob("*.bin"):
        file.write_bytes(b"nonsense")
    assert assert_round_trip(directory, source, tmp_path / "again") == []


def test_bin_beside_the_index_of_other_shards(hubs, tmp_path):
    source = hubs["float32", False]
    directory = write(tmp_path / "in", source, read(source), "bin")
    write_weights(directory, read(source), "bin shards")
    assert "both pytorch_model.bin and pytorch_model.bin.index.json" in refused(directory)


def test_shard_of_a_bin_that_is_missing(hubs, tmp_path):
    source = hubs["float32", False]
    directory = write(tmp_path / "in", source, read(source), "bin shards")
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    assert f"{directory / 'pytorch_model-00002-of-00003.bin'}: missing, but pytorch_model.bin.index" in refused(
        directory
    )


# Checkpoints of the Trainer of the original system.

TRAINER = (
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "training_args.bin",
    "events.out.tfevents.1700000000.host.1.0",
    "latest",  # DeepSpeed's
    "zero_to_fp32.py",
)


def write_trainer(directory, files, words=331, dtype="float32", tied=True):
    """Write the files of a Trainer for a model with `words` words, without umbrella_config.json."""
    model = write_umbrella(directory, dtype=dtype, tied=tied, umbrella_config=False)
    if words != 331:
        model.resize_token_embeddings(words, mean_resizing=False)
        randomise(model.get_input_embeddings(), 5)
        if not tied:
            randomise(model.lm_head, 6)
        save(model, directory)
    tensors = read(directory)
    (directory / "model.safetensors").unlink()
    if tied and files.startswith("bin"):
        tensors[LM_HEAD] = tensors[EMBED]  # as in a state_dict
    write_weights(directory, tensors, files)
    for name in TRAINER:
        torch.save(Namespace(of=name, state=torch.ones(3)), directory / name)
    (directory / "trainer_state.json").write_text('{"global_step": 500, "log_history": []}')
    (directory / "global_step500").mkdir()
    torch.save({"module": tensors}, directory / "global_step500" / "mp_rank_00_model_states.pt")
    return {name: tensor for name, tensor in tensors.items() if name != LM_HEAD or not tied}


@pytest.mark.parametrize(
    ("files", "words", "dtype", "tied"),
    [
        # by default each kind of file once
        unless(i // 5 == i % 5 % 3, files, words, DTYPES[i % 3], i % 2 == 0)
        for i, (words, files) in enumerate(product((331, 340, 324), FILES[:5]))
    ],
)
def test_trainer_checkpoint(tmp_path, files, words, dtype, tied):
    directory = tmp_path / "checkpoint-500"
    tensors = write_trainer(directory, files, words, dtype, tied)
    assert tensors[EMBED].shape == (words, 48)
    assert (LM_HEAD in tensors) == (not tied)
    config = read_config(directory, MODALITIES)
    assert config.text.vocab_size == words
    params, summary = load_params(directory, config)
    assert summary.lines() == list(summary.undescribed)
    assert len(summary.undescribed) == len(MODALITIES)
    assert params[EMBED].shape == (words, 48)
    export(tmp_path / "out", params, config, directory)
    (tmp_path / "expected").mkdir()
    write_weights(tmp_path / "expected", tensors)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert read_config(tmp_path / "out") == config


def test_trainer_checkpoint_names_no_modalities(tmp_path):
    write_trainer(tmp_path, "safetensors shards")
    message = refused(tmp_path, {"T1": MODALITIES["T1"]})
    assert "modality rsfMRI: not a configured modality" in message


def test_nothing_else_of_a_trainer_is_exported(tmp_path):
    write_trainer(tmp_path / "checkpoint-500", "safetensors shards")
    names = {*TRAINER, "global_step500", "model.safetensors.index.json"}
    assert names <= {path.name for path in (tmp_path / "checkpoint-500").iterdir()}
    config = read_config(tmp_path / "checkpoint-500", MODALITIES)
    params, _ = load_params(tmp_path / "checkpoint-500", config)
    export(tmp_path / "out", params, config, tmp_path / "checkpoint-500")
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not names & {path.name for path in (tmp_path / "out").iterdir()}


# Location of the patch embedding.


@pytest.mark.parametrize(
    ("names", "family", "within", "dtype", "files"),
    [
        unless((i + j) % 2 == k and i // 2 == m, names, family, within, DTYPES[(4 * i + 2 * j + k) % 3], files)
        for (i, names), (j, family), (k, within), (m, files) in product(
            *map(enumerate, (NAMES, FAMILIES, (False, True), ("safetensors", "bin shards")))
        )
    ],
)
def test_place_of_the_patch_embedding(tmp_path, names, family, within, dtype, files):
    """The patch embedding replaces SigLIP's `embeddings`, or only its convolution, so that the positions remain."""
    source = tmp_path / "hub"
    write_umbrella(source, names=family, dtype=dtype, umbrella_config=False)
    tensors = read(source)
    if within:
        ours = [name for name in tensors if name.startswith(EMBEDDINGS)]
        assert len(ours) == 6
        for name in ours:
            tensors[name.replace(".embeddings.", ".embeddings.patch_embedding.")] = tensors.pop(name)
        stock = make_model(seed=7).state_dict()
        tensors[TABLE] = stock["model.vision_tower.embeddings.position_embedding.weight"]
    directory = write(tmp_path / "in", source, {names(n): t for n, t in tensors.items()}, files)
    lines = assert_round_trip(directory, source, tmp_path / "out", RENAMED_FAMILY[family])
    assert lines == [f"replaced by the 3D/4D patch embedding:\n  {names(TABLE)}"] * within


def test_patch_embedding_at_both_places(hubs, tmp_path):
    source = hubs["float32", True]
    tensors = read(source)
    name = EMBEDDINGS + "T1_proj.bias"
    tensors[name.replace("T1", "patch_embedding.T1")] = tensors[name].clone()
    assert "T1_proj.bias: the same tensor as" in refused(write(tmp_path / "in", source, tensors))


# The head.


@pytest.mark.parametrize(
    ("names", "files", "dtype"),
    [
        unless((i + i // 4) % 2 == 0, *case, DTYPES[i % 3])
        for i, case in enumerate(product(NAMES, ("safetensors", "safetensors shards", "bin shards", "bin legacy")))
    ],
)
def test_tied_head_that_is_in_the_file(hubs, tmp_path, names, files, dtype):
    source = hubs[dtype, True]
    tensors = read(source)
    assert LM_HEAD not in tensors
    tensors[LM_HEAD] = tensors[EMBED].clone()
    directory = write(tmp_path / "in", source, {names(n): t for n, t in tensors.items()}, files)
    assert names(LM_HEAD) in open_checkpoint(directory)
    assert assert_round_trip(directory, source, tmp_path / "out") == []


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("change", ["last bit", "type", "fewer rows"])
@pytest.mark.parametrize("names", NAMES)
def test_tied_head_that_differs(hubs, tmp_path, names, change, files):
    source = hubs["float32", True]
    tensors = read(source)
    tensors[LM_HEAD] = tensors[EMBED].clone()
    if change == "last bit":
        tensors[LM_HEAD].view(torch.int32)[-1, -1] ^= 1
    elif change == "type":
        tensors[LM_HEAD] = tensors[LM_HEAD].bfloat16()
    else:
        tensors[LM_HEAD] = tensors[LM_HEAD][:-1].clone()
    directory = write(tmp_path / "in", source, {names(n): t for n, t in tensors.items()}, files)
    message = refused(directory)
    assert f"{directory}/" in message
    assert "lm_head.weight: differs from the tied embeddings; set tie_word_embeddings to false" in message
    assert not any(directory.glob("out*"))


@pytest.mark.parametrize("files", ["safetensors shards", "bin"])
@pytest.mark.parametrize("names", NAMES)
def test_untied_head_that_is_missing(hubs, tmp_path, names, files):
    source = hubs["float32", False]
    tensors = {names(n): t for n, t in read(source).items() if n != LM_HEAD}
    directory = write(tmp_path / "in", source, tensors, files)
    assert refused(directory) == (
        f"{directory}: {LM_HEAD}: missing, expected shape [331, 48]; "
        "set tie_word_embeddings to true in config.json if the head is the embeddings"
    )
    raw = json.loads((directory / "config.json").read_text())  # the remedy in the message
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = True
    (directory / "config.json").write_text(json.dumps(raw))
    config = read_config(directory)
    assert config.text.tie_word_embeddings
    assert load_params(directory, config)[0].keys() == plan_loading(source, read_config(source)).leaves.keys() - {
        LM_HEAD
    }


# Through a native checkpoint.


def through_native(source, root, modalities=None, max_shard_size="5GB"):
    """Convert a Hugging Face directory to a native checkpoint and back; return the result."""
    write_native(Checkpoint.open(source, modalities), root / "native")
    native = Checkpoint.open(root / "native")
    assert isinstance(native, NativeCheckpoint)
    write_hf(native, root / "out", max_shard_size=max_shard_size)
    return root / "out"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_back(hubs, tmp_path, dtype, tied):
    source = hubs[dtype, tied]
    out = through_native(source, tmp_path)
    assert contents(out) == contents(source)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert read_config(out) == read_config(source)
    assert Checkpoint.open(tmp_path / "native").fingerprint == Checkpoint.open(source).fingerprint


@pytest.mark.parametrize(
    ("names", "files", "dtype"),
    [(in_memory_4, "bin", "bfloat16"), (in_memory_5, "safetensors shards", "float16"), (hub, "bin shards", "float32")],
)
def test_native_and_back_from_another_layout(hubs, tmp_path, names, files, dtype):
    source = hubs[dtype, True]
    tensors = read(source)
    tensors[LM_HEAD] = tensors[EMBED].clone()
    directory = write(tmp_path / "in", source, {names(n): t for n, t in tensors.items()}, files)
    write_tokenizer(directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"image_token_index": 283}))
    out = through_native(directory, tmp_path)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in out.glob("*") if p.suffix in (".bin", ".safetensors")) == ["model.safetensors"]
    assert not list(out.glob("*.index.json"))


def test_native_trainer_checkpoint_and_back(tmp_path):
    tensors = write_trainer(tmp_path / "checkpoint-500", "bin shards", words=340, dtype="bfloat16")
    out = through_native(tmp_path / "checkpoint-500", tmp_path, MODALITIES)
    (tmp_path / "expected").mkdir()
    write_weights(tmp_path / "expected", tensors)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "expected" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False), ("float16", True)])
@pytest.mark.parametrize("native", [True, False])
def test_shards_of_an_export(hubs, tmp_path, dtype, tied, native):
    source = hubs[dtype, tied]
    if native:
        out = through_native(source, tmp_path, max_shard_size="40KB")
    else:
        out = tmp_path / "out"
        write_hf(Checkpoint.open(source), out, max_shard_size="40KB")
    assert contents(out) == contents(source)
    expected = read(source)
    assert open_checkpoint(out).keys() == expected.keys()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert {path.name: sorted(load_file(path)) for path in shards} == {
        path.name: sorted(n for n, file in index["weight_map"].items() if file == path.name) for path in shards
    }
    for path in shards:
        held = load_file(path).values()
        assert sum(t.nbytes for t in held) <= 40_000 or len(held) == 1
    assert not (out / "model.safetensors").exists()
    params, _ = load_params(out, read_config(out))
    assert_same(params, load_params(source, read_config(source))[0])

    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, dtype=getattr(torch, dtype), output_loading_info=True
    )
    patch_embed = {in_memory_5(n) for n in expected if n.startswith(EMBEDDINGS)}
    assert set(info["unexpected_keys"]) == patch_embed
    assert {key.rpartition("embeddings.")[2] for key in info["missing_keys"]} == {
        "patch_embedding.weight",
        "patch_embedding.bias",
        "position_embedding.weight",
    }
    state = model.state_dict()
    for name, tensor in expected.items():
        if in_memory_5(name) not in patch_embed:
            assert torch.equal(state[in_memory_5(name)], tensor), name
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == dtype, params))
