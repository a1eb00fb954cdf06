"""Recognise folders and tensors that are not a LLaVA's weights, and say what to do with them."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from umbrella_jax.errors import CheckpointError
from umbrella_jax.io.reading import describe_pointer, read_json

WEIGHTS = frozenset(
    f"{stem}{index}" for stem in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
ADAPTER = "adapter_config.json"
"""PEFT's description of an adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NOT_LORA = "non_lora_trainables.bin"
"""Parameters that LLaVA's code trains beside an adapter: the projector."""
_MERGE = (
    "merge it in PyTorch (peft: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUT)) and "
    "name OUT"
)
_DEEPSPEED = "merge them (python zero_to_fp32.py . OUT --safe_serialization, run in that folder) and name OUT"
_FSDP = "merge them (accelerate merge-weights FOLDER OUT) and name OUT"
_PYTORCH = "save the model in PyTorch with save_pretrained, and name that folder"
_TRANSFORMERS_4 = "load them with transformers 4 ({}=True), call save_pretrained, and name that folder"

_TRAINER = ("optimizer*", "scheduler*", "rng_state*", "random_states*", "training_args.bin", "trainer_state.json")
_ORIGINAL = "load the whole model with {}'s code, call save_pretrained, and name the new folder"
# How to recognise a folder without weights by its names; the first match counts: patterns, contents, what to do.
_FILES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("global_step*", "zero_pp_rank_*", "mp_rank_*", "zero_to_fp32.py"), "DeepSpeed's shards of a model", _DEEPSPEED),
    (("pytorch_model_fsdp*", "*.distcp"), "FSDP's shards of a model", _FSDP),
    (("trainable*.safetensors",), "what a run trained, without its base", "put it onto its base with --patch-embed"),
    (
        ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"),
        "shards without the index that names them",
        "copy the file that ends in .index.json too",
    ),
    (("model.*.safetensors", "pytorch_model.*.bin"), "a variant's weights", "rename them to model.safetensors"),
    (("*.gguf", "ggml-*"), "llama.cpp's quantised weights", "use the original ones"),
    (("*.h5",), "TensorFlow's weights", _TRANSFORMERS_4.format("from_tf")),
    (("*.msgpack",), "Flax's weights", _TRANSFORMERS_4.format("from_flax")),
    (("*.safetensors",), "tensors under another name than model.safetensors", "name the folder of the model"),
    (("mm_projector.bin", "mm_projector"), "only the projector of LLaVA's first stage", _ORIGINAL.format("LLaVA")),
    (
        (NOT_LORA,),
        "the projector that belongs to a LoRA adapter of LLaVA's code, without the adapter",
        _ORIGINAL.format("LLaVA"),
    ),
    (("connector",), "the parts of TinyLLaVA's first stage in folders of their own", _ORIGINAL.format("TinyLLaVA")),
    (("*.bin", "*.pth", "*.pt", "*.ckpt"), "PyTorch files of another kind", _PYTORCH),
)
_REST: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (_TRAINER, "a Trainer's state without weights", "name the folder that holds model.safetensors"),
    (("config.json",), "a description without weights", "copy the weights too"),
    (("tokenizer*", "vocab.*", "merges.txt"), "a tokenizer without a model", "name the folder of the model"),
)
_PEFT = re.compile(r"(?:^|\.)(?:lora_\w+|base_layer|modules_to_save|original_module|ia3_l|hada_\w+|oft_\w+)(?:\.|$)")
_QUANTISED = re.compile(r"\.(?:qweight|qzeros|g_idx|SCB|weight\.(?:absmax|quant_map|nested_absmax|quant_state\..*))$")


def folder_contents(directory: Path) -> str | None:
    """Describe a folder that lacks a LLaVA's weights, and say what to do.

    Returns None if the folder has the weights, or contains nothing that is recognised.
    """
    names = sorted(path.name for path in directory.iterdir())
    if not WEIGHTS.isdisjoint(names):
        return None
    if (base := _adapter_base(directory)) is not None:
        return f"only a PEFT adapter{base}; name its base, and this folder with --adapter"
    own = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _TRAINER)]
    if found := _recognise(own, _FILES):
        return found
    if below := sorted(directory.glob("*/model*.safetensors*"), key=lambda path: path.stat().st_mtime):
        return f"weights one folder further down; name {below[-1].parent}"
    return _recognise(names, _REST)


def _recognise(names: Iterable[str], kinds: tuple[tuple[tuple[str, ...], str, str], ...]) -> str | None:
    names = list(names)
    for patterns, what, remedy in kinds:
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                return f"{what} ({name}); {remedy}"
    return None


def _adapter_base(directory: Path) -> str | None:
    """Return `, of the base NAME` for a folder with a PEFT adapter, "" if the adapter names no base, else None."""
    config = directory / ADAPTER
    if not config.exists():
        return "" if any(directory.glob("adapter_model*")) else None
    stated = read_json(config, CheckpointError, "copy it again")
    base = stated.get("base_model_name_or_path") if isinstance(stated, dict) else None
    return f", of the base {base}" if base else ""


def adapter_faults(directory: Path) -> list[str]:
    """Return a fault if a PEFT adapter is beside the weights, as the weights may or may not contain it."""
    if _adapter_base(directory) is None:
        return []
    file = min(path for path in (directory / ADAPTER, *directory.glob("adapter_model*")) if path.exists())
    remedy = f"{_MERGE}; or remove {ADAPTER} and adapter_model.* if the weights contain it"
    return [f"{file}: a PEFT adapter beside the weights, which would not be used; {remedy}"]


def tensor_faults(names: Iterable[str], place: Path) -> list[str]:
    """Return a fault for each kind of tensor that a plain model does not have, naming the first such tensor."""
    names = list(names)
    kinds = (
        (_PEFT, f"a PEFT adapter that is not merged; {_MERGE}"),
        (_QUANTISED, "quantised weights (GPTQ, AWQ or bitsandbytes); use the original ones"),
    )
    found = [(next(filter(pattern.search, names), None), what) for pattern, what in kinds]
    return [f"{place}: {name}: {what}" for name, what in found if name is not None]


def check_placeholders(directory: Path) -> None:
    """Raise CheckpointError for placeholder files in a folder, which Git LFS leaves in place of the content."""
    faults = [f"{path}: {reason}" for path in sorted(directory.iterdir()) if (reason := describe_pointer(path))]
    if faults:
        raise CheckpointError(faults)
