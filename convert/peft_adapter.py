"""PEFT's LoRA adapters: a folder with `adapter_config.json` and `adapter_model.safetensors`, read and written.

Formulas and names are PEFT's (peft/tuners/lora): W + s·B·A with s = alpha/r, or alpha/√r with `use_rslora`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.foreign import ADAPTER, ADAPTER_WEIGHTS, NOT_LORA, check_placeholders
from convert.hub import parse_hub_name
from convert.lazy_tensor import Tensor
from convert.rules import EMBED, LM_HEAD, hub_name, unwrapped_names
from convert.safetensors_files import open_bin, open_safetensors, write_safetensors
from convert.trainable import Trainable, make_header, open_trainable, parse_header
from umbrella_jax.config.schema import LoraConfig
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.io.files import strict_json
from umbrella_jax.io.reading import read_json
from umbrella_jax.models.paths import (
    EMBEDDINGS,
    PROJECTOR,
    VISION_MODEL,
    adapted_weight,
    adapter_paths,
    component_of,
    modality_of,
)

_BIN = "adapter_model.bin"
"""Name of the weights in PyTorch's format."""
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")

_Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        return not value
    try:
        return all(re.compile(pattern) for pattern in value)
    except re.error:
        return False


READ: Mapping[str, tuple[_Check, str]] = {
    "r": (_is_number, "a positive number"),
    "lora_alpha": (_is_number, "a positive number"),
    "rank_pattern": (_is_pattern, "{regular expression: number}"),
    "alpha_pattern": (_is_pattern, "{regular expression: number}"),
    "use_rslora": (_is_flag, "true or false"),
    "modules_to_save": (lambda value: not value or isinstance(value, list), "a list of names"),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a name"),
}
"""{field of adapter_config.json that is read: (whether a value is valid, description of valid ones)}."""

_PLAIN = "W + s·B·A is the only adapter that is read; merge it in PyTorch (merge_and_unload, then save_pretrained)"
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), _PLAIN),
    "bias": (("none",), "biases that train with an adapter are not read; merge it in PyTorch"),
    "fan_in_fan_out": ((False,), "weights of a LLaVA are [outputs, inputs]"),
    "init_lora_weights": (
        (True, False, "gaussian", "eva", "orthogonal", "mica"),
        "it changed the base's weights; save it again with path_initial_model_for_weight_conversion",
    ),
    "megatron_config": ((None,), "parallel products of Megatron are not read"),
    "trainable_token_indices": ((None,), "save the embeddings as a whole (modules_to_save)"),
    "layer_replication": ((None,), "the base has its own number of layers"),
    "target_parameters": ((None,), _PLAIN),
    **dict.fromkeys(("lora_bias", "use_dora", "use_qalora"), ((False,), _PLAIN)),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"), ((None,), _PLAIN)),
    **dict.fromkeys(("monteclora_config", "use_bdlora", "velora_config"), ((None,), _PLAIN)),
}
"""{field with few supported values: (those values, reason or remedy)}. Any empty value is the same as None."""

WITHOUT_EFFECT: Mapping[str, str] = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        "the tensors in the file are the modules that it adapts",
    ),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), "settings of init_lora_weights"),
    **dict.fromkeys(("task_type", "auto_mapping", "inference_mode", "runtime_config"), "of PyTorch's classes"),
    "revision": "says, like the base's name, what it was trained on",
    "peft_version": "says what wrote it",
    "lora_dropout": "only in training, where there is no dropout here",
    "megatron_core": "without effect while megatron_config is null",
    "qalora_group_size": "without effect while use_qalora is false",
}
"""{field without effect on the model's numbers: reason}."""


def open_trained(path: Path) -> Trainable:
    """Open the folder of a PEFT adapter, or a file of `convert to-hf --trainable-only`.

    Raises CheckpointError as `open_adapter` and `open_trainable`.
    """
    return open_adapter(path) if path.is_dir() else open_trainable(path)


def open_adapter(directory: Path) -> Trainable:
    """Read the description of a PEFT adapter and the headers of its weights.

    The factors A and B are under the hub's name of their weight, others under their own: they replace the base's.

    Raises:
        CheckpointError: naming every setting that is not supported and every tensor that is no part of an adapter.
    """
    check_placeholders(directory)
    if not (directory / ADAPTER).exists():
        remedy = "name a PEFT adapter, or a file of `umbrella-jax convert to-hf --trainable-only`"
        raise CheckpointError(f"{directory}: a folder without {ADAPTER}; {remedy}")
    config = _read_description(directory / ADAPTER)
    stored, metadata = _open_weights(directory)
    modules = unwrapped_names({_FACTOR.sub(".weight", name) for name in stored})
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    faults = []
    for name, tensor in stored.items():
        factor = _FACTOR.search(name)
        own = _FACTOR.sub(".weight", name)
        hub = hub_name(modules[own])
        is_product = factor is None or len(tensor.shape) == 2
        if not is_product or re.search(r"\.(lora_|base_layer|modules_to_save|original_module)", hub):
            faults.append(f"{tensor.file}: {name}: not a factor A or B of a product; {_PLAIN}")
            continue
        if factor is not None:
            module = own.removeprefix(_PREFIX).removesuffix(".weight")
            rank = config["rank_pattern"].get(_matching(config["rank_pattern"], module), config["r"])
            alpha = config["alpha_pattern"].get(_matching(config["alpha_pattern"], module), config["lora_alpha"])
            if tensor.shape[:: 1 if factor[1] == "A" else -1][:1] != (rank,):
                remedy = f"{ADAPTER} says rank {rank}; copy both files from the same adapter"
                faults.append(f"{tensor.file}: {name}: shape {list(tensor.shape)}, but {remedy}")
            scales[hub] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            hub = adapter_paths(hub)[factor[1] == "B"]
        if hub in tensors and not _same(tensor, tensors[hub]):
            faults.append(f"{tensor.file}: {name}: another tensor than {tensors[hub].name}; remove one")
        tensors.setdefault(hub, tensor)
    if not tensors and not faults:
        faults.append(f"{directory}: an adapter without tensors; copy it again")
    if faults:
        raise CheckpointError(faults)
    saved = config["modules_to_save"] or ()
    unties = EMBED in tensors and LM_HEAD not in tensors and bool(saved) and not config["ensure_weight_tying"]
    if "base_fingerprint" in metadata:
        trained = parse_header(directory / ADAPTER_WEIGHTS, tensors, metadata)
        return replace(trained, scales=scales)
    return Trainable(tensors, {}, None, scales=scales, unties=unties)


def _read_description(file: Path) -> dict[str, Any]:
    """Return the fields of `READ`, absent ones as PEFT reads them. Raises CheckpointError with every fault."""
    stated = read_json(file, CheckpointError, "name the folder of a PEFT adapter")
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(stated).__name__}; copy it again")
    defaults = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    defaults |= {"ensure_weight_tying": False, "modules_to_save": None, "base_model_name_or_path": None}
    config = {key: default if stated.get(key) is None else stated[key] for key, default in defaults.items()}
    faults = []
    for key, (is_valid, expected) in READ.items():
        if not is_valid(config[key]):
            faults.append(f"{file}: {key}: expected {expected}, got {config[key]!r}")
    for key, (values, why) in ONLY.items():
        value = stated.get(key)
        is_absent = key != "peft_type" and (value is None or (None in values and not value))
        if not is_absent and not any(value == known and type(value) is type(known) for known in values):
            supported = " or ".join(strict_json(known) for known in values)
            faults.append(f"{file}: {key}: {value!r} is not supported, expected {supported}: {why}")
    known = {*READ, *ONLY, *WITHOUT_EFFECT}
    faults += [
        f"{file}: {key}: {value!r}: not a setting that is known here; {_PLAIN}"
        for key, value in stated.items()
        if key not in known and value
    ]
    if faults:
        raise CheckpointError(faults)
    return config


def _open_weights(directory: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return the tensors of an adapter and the metadata of its file."""
    if (directory / ADAPTER_WEIGHTS).exists():
        tensors, metadata = open_safetensors(directory / ADAPTER_WEIGHTS)
    elif (directory / _BIN).exists():
        tensors, metadata = open_bin(directory / _BIN), {}
    else:
        raise CheckpointError(
            f"{directory}: neither {ADAPTER_WEIGHTS} nor {_BIN}; copy the whole folder of the adapter"
        )
    if (directory / NOT_LORA).exists():
        tensors = tensors | open_bin(directory / NOT_LORA)
    return tensors, metadata


def _matching(patterns: Iterable[str], module: str) -> str | None:
    """Return the first pattern that matches the name of a module, as PEFT's `get_pattern_key`."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()


def describe_adapter(directory: Path, *, merged: bool) -> str:
    """Return a line about what an adapter changes, and what it says it was trained on."""
    trained = open_adapter(directory)
    base = _read_description(directory / ADAPTER)["base_model_name_or_path"]
    whole = [name for name in trained.tensors if adapted_weight(name) is None]
    parts = [f"{len(trained.scales)} products {'merged into the weights' if merged else 'train on'}"] * bool(
        trained.scales
    )
    parts += [f"{len(whole)} tensors replaced"] * bool(whole)
    return f"adapter {directory}{f', of the base {base}' if base else ''}: {', '.join(parts)}"


def continue_adapters(
    directory: Path, lora: LoraConfig, fresh: Mapping[str, np.ndarray], paths: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Return the initial factors of a run that trains on the adapter in `directory`.

    Args:
        lora: adapters of the run.
        fresh: {path: factors of new adapters [L, ...]}; products that the adapter does not adapt keep them, and their
            B is zero.
        paths: {name of a weight on the hub: its path}.

    Raises:
        ConfigError: if `lora` has another rank or scale, or lacks a product that the adapter adapts.
        CheckpointError: if shapes differ from the base's.
    """
    trained = open_adapter(directory)
    pairs, faults = {}, []
    for weight in trained.scales:
        a, b = (trained.tensors.get(name) for name in adapter_paths(weight))
        if a is None or b is None:
            faults.append(f"{directory}: {weight}: half of its adapter is missing; copy it again")
        elif weight not in paths:
            faults.append(f"{directory}: {weight}: not a weight of the base; is it an adapter of another one?")
        else:
            pairs[weight] = a, b
    if faults:
        raise CheckpointError(faults)
    products = {f"{component_of(paths[weight])}.{weight.split('.')[-2]}" for weight in pairs}
    kinds = {(a.shape[0], round(trained.scales[weight] * a.shape[0], 6)) for weight, (a, _) in pairs.items()}
    if kinds != {(lora.rank, round(lora.alpha, 6))} or products - lora.products:
        remedy = "its products differ in rank or scale" if kinds else "it has no factors"
        if len(kinds) == 1:
            ((rank, alpha),) = kinds
            remedy = f"set model.lora to rank {rank}, alpha {alpha:g}, targets [{', '.join(sorted(products))}]"
        raise ConfigError(
            f"model.adapter: {directory}: not the adapters of model.lora; {remedy}, or merge it into the base "
            "(umbrella-jax convert from-hf HF_DIR OUT --adapter DIR) and train on OUT"
        )
    factors = {path: array.copy() for path, array in fresh.items()}
    for weight, pair in pairs.items():
        layer = re.search(r"\.layers\.(\d+)\.", weight)
        for path, tensor in zip(adapter_paths(paths[weight]), pair, strict=True):
            factor = factors[path][int(layer[1])] if layer else factors[path]
            if factor.shape != tensor.shape:
                shapes = f"shape {list(tensor.shape)}, expected {list(factor.shape)}"
                faults.append(f"{tensor.file}: {tensor.name}: {shapes}; is it an adapter of another base?")
            else:
                factor[...] = tensor.astype("float32").read()
    if faults:
        raise CheckpointError(faults)
    return factors


def write_adapter(out: Path, trained: Trainable, base: str | None) -> None:
    """Write an adapter that PEFT loads onto a base in transformers 4.46 and 5.

    Its name for a module depends on transformers' version. PEFT renames the factors when it loads them, but not those
    of the projector nor whole modules, so these are in the file under both names.

    Args:
        out: existing folder.
        trained: factors, and whole tensors of the patch embedding or the projector.
        base: name of the base; `OWNER/NAME@REVISION` for one on the hub.
    """
    weights = list(trained.scales)
    ranks = {weight: trained.tensors[adapter_paths(weight)[0]].shape[0] for weight in weights}
    alphas = {weight: float(f"{trained.scales[weight] * ranks[weight]:.12g}") for weight in weights}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    parsed = parse_hub_name(base) if base else None
    whole = {name: tensor for name, tensor in trained.tensors.items() if adapted_weight(name) is None}
    description = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": parsed[0] if parsed else base,
        "revision": parsed[1] if parsed else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "target_modules": rf"(?:.*\.)?(?:{'|'.join(_patterns(weights))})",
        "rank_pattern": _pattern_of_others(ranks, rank),
        "alpha_pattern": _pattern_of_others(alphas, alpha),
        "modules_to_save": sorted({module for name in whole for module in _saved_modules(name)}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {_PREFIX + name: tensor for name, tensor in trained.tensors.items()}
    kept = whole | {name: tensor for name, tensor in trained.tensors.items() if name.startswith(PROJECTOR)}
    tensors |= {f"{_PREFIX}model.{_name_in_5(name)}": tensor for name, tensor in kept.items()}
    (out / ADAPTER).write_text(strict_json(description, indent=2) + "\n")
    write_safetensors(out / ADAPTER_WEIGHTS, tensors, make_header(trained), record=True)


def rewrite_adapter(adapter: Path, out: Path) -> None:
    """Write an adapter as `write_adapter` does; of one from elsewhere only the factors."""
    trained = open_adapter(adapter)
    if trained.base_fingerprint is None:
        factors = {name: tensor for name, tensor in trained.tensors.items() if adapted_weight(name)}
        trained = replace(trained, tensors=factors)
    write_adapter(out, trained, _read_description(adapter / ADAPTER)["base_model_name_or_path"])


def is_saved_whole(name: str) -> bool:
    """Return whether an adapter can contain a tensor, or parameter, that trained as a whole."""
    return bool(_saved_modules(name))


def _saved_modules(name: str) -> Sequence[str]:
    """Return the names of the whole module that contains a tensor, in transformers 5 and 4.46; none if it is not one
    that `modules_to_save` can name."""
    if name.startswith(PROJECTOR):
        return (PROJECTOR.removesuffix("."),)
    if modality_of(name):
        return tuple(path.removesuffix(".") for path in (_name_in_5(EMBEDDINGS), EMBEDDINGS))
    return ()


def _name_in_5(name: str) -> str:
    """Return transformers 5's name for a tensor of the tower or the projector, below `model.`."""
    return name.replace(VISION_MODEL, "vision_tower.")


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _pattern_of_others(values: Mapping[str, float], usual: float) -> dict[str, int | float]:
    """Return {pattern of modules: value} for the weights whose value is not `usual`."""
    others: dict[float, list[str]] = {}
    for weight, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(weight)
    return {"|".join(_patterns(weights)): _plain(value) for value, weights in others.items()}


def _patterns(weights: Iterable[str]) -> list[str]:
    """Return regular expressions that match exactly the modules of these weights, in transformers 4.46 and 5."""
    layers: dict[tuple[str, str], list[str]] = {}  # (module of the layers, path within a layer) → layers
    for weight in weights:
        module = weight.removesuffix(".weight")
        stack, number, rest = re.fullmatch(r"(?:(.*\.layers)\.(\d+)\.)?(.*)", module).groups()  # type: ignore[union-attr]
        layers.setdefault((stack or "", rest), []).append(number or "")
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (stack, rest), numbers in layers.items():
        together.setdefault((stack, tuple(numbers)), []).append(rest)
    return [
        (rf"{_either(stack)}\.(?:{'|'.join(numbers)})\." if stack else "") + f"(?:{'|'.join(map(_either, rests))})"
        for (stack, numbers), rests in together.items()
    ]


def _either(name: str) -> str:
    """Return a regular expression for a module's name on the hub and in transformers 5."""
    escaped = re.escape(name)
    for optional in (
        r"(?<=language_model\\\.)model\\\.",
        r"(?<=vision_tower\\\.)vision_model\\\.",
        r"^language_model\\\.(?=lm_head)",
    ):
        escaped = re.sub(optional, lambda found: f"(?:{found[0]})?", escaped)
    return escaped
