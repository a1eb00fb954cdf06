"""Write config.json and umbrella_config.json of an export, and tell its files from others."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.architectures import torch_class
from convert.checksum import FILES, KEY
from convert.config_json import (
    CODE,
    CONFIG,
    COPY,
    PROCESSOR,
    TRAINING,
    UMBRELLA_CONFIG,
    file_checksums,
    is_carried,
    read_checkpoint_json,
    read_hub_config,
    section_of,
    small_files,
    stored_parts,
)
from convert.foreign import ADAPTER, ADAPTER_WEIGHTS
from convert.rules import hub_name
from convert.safetensors_files import weight_files
from umbrella_jax.config.schema import (
    ALIASES,
    Template,
    resolve_modality,
    to_dict,
)
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.models.llava import LlavaConfig

CARD = "README.md"
"""Name of the model card of an export."""
LOCAL_PATH = re.compile(
    r"(?<![\w./<~-])(?:~?/(?:[\w.@+-]+/)+[\w.@+-]*|file:/+[\w./@+-]+|[A-Za-z]:\\[\w.@+ -]+\\[\w.@+ \\-]*)"
)
"""An absolute path in a text, of at least two parts; URLs do not match."""
_ADAPTER_FILES = (ADAPTER, ADAPTER_WEIGHTS)
_IMAGE_PROCESSORS = ("preprocessor_config.json", PROCESSOR)
"""Files that describe a processor of images, which volumes do not fit."""
_ORIGINS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
"""Keys under which transformers records the source of a configuration or tokenizer."""


def export_names(modalities: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, str]:
    """Return {configured name: name in the export}: the one of `names` with the same meaning, or unchanged."""
    renamed = {m: (resolve_modality(m, names) or m) if names else m for m in modalities}
    known = frozenset(modalities).union(*ALIASES)
    faults = [
        f"names: {name}: no modality has this name; expected T1,rsfMRI or sMRI,fMRI"
        for name in sorted({*(names or ())} - known)
    ]
    faults += [
        f"names: {name} is given {count} times; give each name once"
        for name, count in Counter(names or ()).items()
        if count > 1
    ]
    faults += [
        f"names: {m} would be called {name} in the export, as another modality is; give other names"
        for m, name in renamed.items()
        if list(renamed.values()).count(name) > 1
    ]
    if faults:
        raise ConfigError(faults)
    return renamed


def hf_dict(raw: Mapping[str, Any], config: LlavaConfig) -> dict[str, Any]:
    """Return config.json `raw` with fields that transformers 4.46 and 5 both read as `config`; others are kept."""
    rope = dict(section_of(raw, "text_config").get("rope_parameters") or {})
    text = {
        **section_of(raw, "text_config"),
        "vocab_size": config.text.vocab_size,
        "rope_theta": config.text.rope_theta,  # 4.46 does not know rope_parameters
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }
    if rope:
        text["rope_parameters"] = {**rope, "rope_theta": config.text.rope_theta}
    token = {"image_token_id": config.image_token_id} if "image_token_id" in raw else {}  # 4.46 does not know it
    return {
        **raw,
        **token,
        "image_token_index": config.image_token_id,
        "text_config": text,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "vision_feature_select_strategy": "full",
    }


def carried_files(source: Path) -> list[Path]:
    """Return the files of a folder that are copied with its weights: tokenizer, generation, processor, licence.

    Raises CheckpointError as `link_faults`.
    """
    files = small_files(source)
    if faults := link_faults(source, files):
        raise CheckpointError(faults)
    return files


def code_faults(folder: Path) -> list[str]:
    """Return a fault for each file of code in an export that is not this version's, which other programs would run."""
    return [
        f"{path}: not the code of umbrella-jax {version('umbrella-jax')}; export again"
        for path in (folder / name for name in CODE)
        if path.exists() and path.read_bytes() != Path(__file__).with_name(path.name).read_bytes()
    ]


def link_faults(folder: Path, files: Sequence[Path]) -> list[str]:
    """Return a fault for each file that is a link out of the folder: a copy of the folder would contain its target.

    A link may point to a file of the same name, or into the cache of the hub.
    """
    return [
        f"{path}: a link that leads out of the folder, to {target}; copy the file there if it belongs to the checkpoint"
        for path in files
        if not (target := path.resolve()).is_relative_to(folder.resolve())
        and target.name != path.name
        and target.parent.name != "blobs"
    ]


def export_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the files that an export consists of, and all other files below its folder, both sorted.

    An export consists of its weights, config.json, umbrella_config.json, its model card and the `carried_files`.

    Raises CheckpointError if the index of the weights cannot be read.
    """
    expected = {*weight_files(directory), *(directory / name for name in (CONFIG, UMBRELLA_CONFIG, CARD))}
    expected |= {*small_files(directory)}
    found = {path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()}
    return sorted(found & expected), sorted(found - expected)


def adapter_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the files that an exported PEFT adapter consists of, and all others, as `export_files`."""
    found = {path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()}
    own = {path for path in found if path.parent == directory and path.name in (*_ADAPTER_FILES, CARD)}
    own |= {path for path in directory.glob("LICENSE*") if path in found}
    return sorted(own), sorted(found - own)


def is_replaced(name: str) -> bool:
    """Return whether a file of a repository is replaced by the next export: if that lacks it, it is outdated.

    These are all files of an export but licences, which people add themselves.
    """
    is_weight = name in _ADAPTER_FILES or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
    return bool(is_weight) or (is_carried(name) and not name.startswith("LICENSE"))


def _without_local_paths(value: Any) -> Any:
    """Return a value of a JSON file without the local paths that transformers recorded as its source."""
    if not isinstance(value, dict):
        return value
    return {
        key: _without_local_paths(inner)
        for key, inner in value.items()
        if not (key in _ORIGINS and isinstance(inner, str) and (Path(inner).is_absolute() or LOCAL_PATH.match(inner)))
    }


def write_config(
    source_dir: str | Path,
    out_dir: str | Path,
    config: LlavaConfig,
    names: Sequence[str] | None = None,
    *,
    dtype: str | None = None,
    base: str | None = None,
    base_fingerprint: str | None = None,
    adapter: str | None = None,
    template: Template | None = None,
    untrained: Mapping[str, str] | None = None,
    checksums: Mapping[str, str] | None = None,
    first_steps: Mapping[str, int] | None = None,
    training: Mapping[str, Any] | None = None,
    with_code: bool = False,
    finish: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write config.json and umbrella_config.json, and copy the `carried_files` of `source_dir`.

    These are left out: local paths that transformers recorded as the source of config.json or of the tokenizer; code;
    the class of the model and the processor of images, since transformers would answer nonsense with them.

    Args:
        names: modality names to export under, as in `export_names`.
        dtype: type of the weights; None keeps the type in config.json.
        base: name of the model that training began from.
        base_fingerprint: SHA-256 of the weights that training began from.
        adapter: name of the adapter that was put onto that model before training.
        template: conversation template of the training data.
        untrained: {modality or component: reason} for those whose weights are untrained.
        checksums: {tensor or file: checksum} of the weights (convert/checksum.py).
        first_steps: {modality: first step of the run that shows it}.
        training: facts about the training, as `training_facts` returns them. The code's copy lacks them: weights that
            are trained further with it have other accuracies.
        with_code: whether to write `CODE`, and how transformers finds it.
        finish: called with `out_dir` to change small files before their checksums are recorded.
    """
    source, out = Path(source_dir), Path(out_dir)
    raw = hf_dict(read_hub_config(source), config)
    raw = {key: value for key, value in raw.items() if key not in ("auto_map", COPY, "patch_embed_dtype")}
    raw["architectures"] = [torch_class(raw["model_type"])]  # programs that do not know it refuse the model
    if dtype is not None:
        raw = {k: v for k, v in raw.items() if k != "dtype"} | {"torch_dtype": dtype}  # transformers 5 reads either
    renamed = export_names(config.modalities, names)
    modalities = {name: to_dict(config.modalities[m]) for m, name in renamed.items()}
    random = {renamed.get(name, name): why for name, why in (untrained or {}).items()}
    stated: dict[str, Any] = {
        "template": template,
        "base": base,
        "base_fingerprint": base_fingerprint,
        "adapter": adapter,
        "untrained": random,
    }
    stated["parts"] = stored_parts(source)
    umbrella: dict[str, Any] = {"modalities": modalities} | {key: value for key, value in stated.items() if value}
    out.mkdir(parents=True, exist_ok=True)
    for path in carried_files(source):
        if path.name not in (*_IMAGE_PROCESSORS, *CODE):
            copy = out / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    processor = source / PROCESSOR
    if processor.exists() and (chat := read_checkpoint_json(processor).get("chat_template")):
        _write_json(out / "chat_template.json", {"chat_template": chat})
    if with_code:
        raw["auto_map"] = {"AutoModelForImageTextToText": f"modeling_umbrella.{raw['architectures'][0]}"}
        raw |= {COPY: umbrella, "patch_embed_dtype": "float32"}
        described = {"modalities": modalities, "template": template or "umbrella"}
        found = {"auto_map": {"AutoProcessor": "processing_umbrella.UmbrellaProcessor"}}
        _write_json(out / PROCESSOR, {**found, "processor_class": "UmbrellaProcessor", **described})
        for name in CODE:
            shutil.copyfile(Path(__file__).with_name(name), out / name)
    _write_json(out / CONFIG, _without_local_paths(raw))
    finish(out)
    umbrella |= {KEY: {hub_name(name): crc for name, crc in checksums.items()}} if checksums else {}
    umbrella |= {} if first_steps is None else {"first_steps": dict(first_steps)}
    umbrella |= {TRAINING: dict(training)} if training else {}
    write_record(out, umbrella)


def write_record(out: Path, umbrella: dict[str, Any]) -> None:
    """Write umbrella_config.json with the content `umbrella` and the checksums of the small files beside it.

    Local paths that transformers recorded as the source of the tokenizer are left out.
    """
    if (tokenizer := out / "tokenizer_config.json").exists():
        settings = read_checkpoint_json(tokenizer)
        portable = _without_local_paths(settings)
        portable = {key: value for key, value in portable.items() if key not in ("auto_map", "processor_class")}
        if portable != settings:
            _write_json(tokenizer, portable)
    umbrella[FILES] = file_checksums(out)
    _write_json(out / UMBRELLA_CONFIG, umbrella)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
