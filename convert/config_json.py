"""Read config.json of a LLaVA, and `umbrella_config.json` beside it, which describes the volumes.

An absent field has transformers' default value. A value that this model does not support is rejected by name; which
these are, is said in `convert/architectures.py`.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from convert.architectures import DECODERS, LAYOUTS, TOWERS, Decoder, Layout, VisionTower, unsupported
from convert.checksum import FILES, file_checksum, read_checksums
from convert.dialects import HubConfig, dialect_of, to_hub
from convert.foreign import check_placeholders, folder_contents
from convert.peft_adapter import open_trained
from umbrella_jax.config.load import parse_config
from umbrella_jax.config.origins import Origins
from umbrella_jax.config.schema import ModalityConfig, PatchEmbedInit, RematPolicy, Template, resolve_modality
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.io import reading
from umbrella_jax.models.llava import LlavaConfig
from umbrella_jax.models.paths import adapted_weight, component_of, is_component
from umbrella_jax.models.qwen import QwenConfig
from umbrella_jax.models.siglip import SiglipConfig

CONFIG = "config.json"
UMBRELLA_CONFIG = "umbrella_config.json"
TRAINING = "training"
"""Field of `umbrella_config.json` with what `convert.model_card.training_facts` returns."""
PROCESSOR = "processor_config.json"
RANDOM_WEIGHTS = "random_weights"
"""Key of config.json that is true in a toy model, whose weights are all random, such as the demo's base."""

CODE = ("modeling_umbrella.py", "processing_umbrella.py")
"""Files of this package that `convert to-hf --with-code` writes into an export, for PyTorch."""
COPY = "umbrella"
"""Field of config.json with a copy of `umbrella_config.json` without checksums, for the code."""
_OWN_CLASS = re.compile(r"(modeling|processing)_umbrella\.Umbrella[A-Za-z]*")
"""How `auto_map` names a class in `CODE`."""

LARGEST = 1 << 24
"""Limit of whole numbers in config.json: sixty times the vocabulary, three hundred times the width and more than the
positions of the largest published models. Products of them fit into 64 bits."""
MOST_LAYERS = 1000
"""Limit of layers: eight times those of the deepest published models. Each layer is a dozen tensors to look for."""
# Files that transformers reads; each may name code in the folder or elsewhere on the hub.
_CODE = (CONFIG, *(f"{kind}_config.json" for kind in ("tokenizer", "processor", "preprocessor", "generation")))
# Files that are copied with the weights; others may be a Trainer's state, another model's card, or anybody's notes.
_TEMPLATES = "additional_chat_templates"
_CARRIED = (
    *(
        "tokenizer*.json",  # not tokenizer*, since a file that ends in .py is code
        "tokenizer*.model",
        "added_tokens.json",
        "special_tokens_map.json",
        "vocab.*",
        "merges.txt",
        "*.tiktoken",
        "spiece.model",
    ),
    *("chat_template*", "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE*"),
    *CODE,
)


class _Section:
    """Reads numbers of one object in config.json; collects faults instead of raising them."""

    def __init__(self, name: str, data: dict[str, Any], defaults: Mapping[str, int | float], faults: list[str]):
        self.name, self.data, self.defaults, self.faults = name, data, defaults, faults

    def states(self, key: str) -> bool:
        """Return whether the field has a value, here or by default."""
        return bool(self.data.get(key)) or key in self.defaults

    def get(self, key: str, kind: type[int] | type[float] = int, default: int | None = None) -> Any:
        """Return a positive number; if the field is absent or null, `default` or the one of `defaults`."""
        absent = self.defaults[key] if default is None else default
        return self.checked(key, absent if self.data.get(key) is None else self.data[key], kind)

    def checked(self, key: str, value: Any, kind: type[int] | type[float] = int) -> Any:
        """Return a positive number of a field; after a fault 0, which passes all later checks."""
        accepted = (int, float) if kind is float else int
        if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value <= sys.float_info.max:
            self.faults.append(f"{self.name}{key}: expected a positive {kind.__name__}, got {value!r}")
            return kind(0)
        most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST
        if kind is int and value > most:
            self.faults.append(f"{self.name}{key}: {value}; expected at most {most}, more than any published model has")
            return 0
        return kind(value)


def _described(
    prefix: str, section: Mapping[str, Any], known: Mapping[str, Any], default: str | None, faults: list[str]
) -> Any:
    """Return the description of `known` that a section's `model_type` names, or after a fault the first.

    Appends faults of the model type and of the fields that have one supported value.
    """
    kind = section.get("model_type", default)
    if not isinstance(kind, str) or kind not in known:
        names = [f"{name!r} ({described.covers})" for name, described in known.items()]
        faults.append(unsupported(f"{prefix}model_type", kind, section, "expected " + " or ".join(names)))
    found = known.get(kind) if isinstance(kind, str) else None
    found = next(iter(known.values())) if found is None else found
    faults += [fault for only in found.only if (fault := only.fault(prefix, section))]
    return found


def read_hub_config(directory: str | Path) -> dict[str, Any]:
    """Read config.json, in the hub's layout whichever code wrote it.

    Raises CheckpointError if it cannot be read, or if it is of other code and has fields without a counterpart.
    """
    hub = _read_hub_config(Path(directory))
    if hub.faults:
        raise CheckpointError([f"{Path(directory) / CONFIG}: {fault}" for fault in hub.faults])
    return hub.raw


def translated_config(directory: str | Path) -> dict[str, Any] | None:
    """Return config.json in the hub's layout if other code wrote it; None for the hub's own, or without the file.

    Raises CheckpointError as `read_hub_config`.
    """
    path = Path(directory) / CONFIG
    return read_hub_config(directory) if path.exists() and dialect_of(read_checkpoint_json(path)) else None


def _read_hub_config(directory: Path) -> HubConfig:
    return to_hub(read_checkpoint_json(directory / CONFIG), directory)


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError if the file cannot be read or contains anything else."""
    data = reading.read_json(path, CheckpointError, "give the whole folder of a LLaVA in Hugging Face format, or a run")
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(data).__name__}; copy it again")
    return data


def check_code(directory: Path) -> None:
    """Raise CheckpointError if a file of a checkpoint asks to run code (`auto_map`) other than that of our exports.

    This package runs neither, and copies neither: an export with code gets the code of the installed version. But other
    programs may run foreign code, and a checkpoint that needs it is not the model that we read.
    """
    faults = []
    for file in (directory / name for name in _CODE):
        if file.exists():
            raw = _read_hub_config(directory).raw if file.name == CONFIG else read_checkpoint_json(file)
            sections = {"": raw, **{f"{key}.": value for key, value in raw.items() if isinstance(value, dict)}}
            faults += [
                f"{file}: {name}auto_map: names code to be run; code of a checkpoint is not, take it out of the file"
                for name, section in sections.items()
                if "auto_map" in section and not (name == "" and _is_own(section["auto_map"]))
            ]
    if faults:
        raise CheckpointError(faults)


def _is_own(auto_map: Any) -> bool:
    """Return whether all that an `auto_map` names are classes in `CODE`, in the same folder."""
    return isinstance(auto_map, dict) and all(
        isinstance(name, str) and _OWN_CLASS.fullmatch(name) for name in auto_map.values()
    )


def check_copies(directory: Path) -> None:
    """Raise CheckpointError if an export with code describes volumes for the code otherwise than umbrella_config.json.

    The code reads its copies in config.json and processor_config.json.
    """
    if not all((directory / name).exists() for name in (CONFIG, UMBRELLA_CONFIG)):
        return
    record = read_checkpoint_json(directory / UMBRELLA_CONFIG)
    processor = directory / PROCESSOR
    copies = {directory / CONFIG: section_of(read_hub_config(directory), COPY)}
    copies[processor] = read_checkpoint_json(processor) if processor.exists() else {}
    faults = [
        f"{file}: {key}: differs from {UMBRELLA_CONFIG}; change both files, or export again with --with-code"
        for file, copy in copies.items()
        for key in ("modalities", "template")
        if key in copy and copy[key] != record.get(key, "umbrella" if key == "template" else None)
    ]
    if faults:
        raise CheckpointError(faults)


def section_of(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object within config.json, empty if it is absent, so that its fields are reported as absent."""
    return raw[name] if isinstance(raw.get(name), dict) else {}


def _rope_theta(section: _Section, faults: list[str]) -> float:
    """Return rope_theta of a `text_config`.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 only `rope_parameters`.
    """
    text = section.data
    stated = [t for t in [text.get("rope_theta")] if t is not None]
    if text.get("rope_scaling") and text.get("rope_parameters"):  # of which each version reads another
        faults.append("text_config.rope_scaling: given beside rope_parameters; take one of them out")
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.get(name) or {}
        if not isinstance(rope, dict):
            faults.append(f"text_config.{name}: {rope!r} is not supported, expected an object")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        others = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
        if kind != "default" or others:
            faults.append(f"text_config.{name}: {rope!r} is not supported, expected none or rope_type 'default' alone")
        theta = rope.get("rope_theta")
        if theta is not None and stated and stated[0] != theta:
            faults.append(f"text_config.rope_theta: {stated[0]}, but {name} says {theta}; make them agree")
        stated += [theta] if theta is not None else []
    return float(section.checked("rope_theta", stated[0] if stated else section.defaults["rope_theta"], float))


def _unused_layers(raw: Mapping[str, Any], layout: Layout, layers: int, faults: list[str]) -> int:
    """Return how many of the tower's `layers` are above the one whose output the features are.

    `vision_feature_layer` counts as transformers' `hidden_states`, in which 0 is the patch embedding's output.
    """
    layer = raw.get("vision_feature_layer", layout.feature_layer)
    if type(layer) is not int or not 1 <= abs(layer) <= layers:
        if layers:  # else a fault already
            remedy = f"expected one layer: 1 to {layers}, or -{layers} to -1 counted from the last"
            faults.append(unsupported("vision_feature_layer", layer, raw, remedy))
        return 0
    return layers - range(layers + 1)[layer]


def _tied(raw: Mapping[str, Any]) -> bool:
    """Return whether the head is tied to the embeddings, as transformers 5 decides.

    transformers 4 only reads text_config; both read the same from what `hf_dict` writes.
    """
    return bool(raw.get("tie_word_embeddings")) or bool(section_of(raw, "text_config").get("tie_word_embeddings"))


def unused_dropout(directory: str | Path) -> list[str]:
    """Return a message for each dropout in config.json, which PyTorch applies in training and this package does not."""
    path = Path(directory) / CONFIG
    hub = _read_hub_config(path.parent)
    sections = {"": hub.raw, **{f"{name}.": section_of(hub.raw, name) for name in ("vision_config", "text_config")}}
    applied = {
        f"{prefix}{key}": value
        for prefix, section in sections.items()
        for key, value in section.items()
        if "drop" in key and isinstance(value, int | float) and value > 0
    }
    return [
        f"{path}: {hub.as_in_file(key)}: {value} is not applied: there is no dropout in training here"
        for key, value in applied.items()
    ]


def read_config(
    directory: str | Path,
    modalities: Mapping[str, ModalityConfig] | None = None,
    *,
    compute_dtype: str = "float32",
    remat: RematPolicy = "none",
    init: PatchEmbedInit = "random",
    patch_embed: Path | None = None,
) -> LlavaConfig:
    """Read the model that `config.json` describes.

    Args:
        modalities: modalities of the model; by default those of `umbrella_config.json`.
        init: as in `plan_loading`; `resample` allows sizes and patches that differ from `umbrella_config.json`.
        patch_embed: as in `plan_loading`.

    Raises:
        CheckpointError: with every unsupported value, and as `check_code`.
        ConfigError: if `modalities` and `umbrella_config.json` do not agree, or neither is given.
    """
    directory = Path(directory)
    check_placeholders(directory)
    if not (directory / CONFIG).exists() and (found := folder_contents(directory)):
        raise CheckpointError(f"{directory}: no {CONFIG}; found {found}")
    hub = _read_hub_config(directory)
    check_code(directory)
    check_copies(directory)
    faults: list[str] = []
    config = describe_model(hub.raw, faults)
    if faults := [*hub.faults, *dict.fromkeys(map(hub.as_in_file, faults))]:
        raise CheckpointError([f"{directory / CONFIG}: {fault}" for fault in faults])
    modalities = _modalities(directory, modalities, init, patch_embed)
    return replace(config, modalities=modalities, compute_dtype=compute_dtype, remat=remat)


def describe_model(raw: dict[str, Any], faults: list[str]) -> LlavaConfig:
    """Return the model that the content of a config.json describes, without modalities.

    Appends every unsupported value to `faults`, as `FIELD: what is wrong`.
    """
    sections = {"": raw, **{k: section_of(raw, k) for k in ("vision_config", "text_config")}}
    layout: Layout = _described("", raw, LAYOUTS, None, faults)
    tower: VisionTower = _described("vision_config.", sections["vision_config"], TOWERS, layout.tower, faults)
    decoder: Decoder = _described("text_config.", sections["text_config"], DECODERS, layout.decoder, faults)
    kinds = sections["text_config"].get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        faults.append("text_config.layer_types: only 'full_attention' is supported: attention sees the whole text")

    v = _Section("vision_config.", sections["vision_config"], tower.defaults, faults)
    t = _Section("text_config.", sections["text_config"], decoder.defaults, faults)
    layers = v.get("num_hidden_layers")
    vision = SiglipConfig(
        hidden_size=v.get("hidden_size"),
        intermediate_size=v.get("intermediate_size"),
        num_hidden_layers=layers,
        num_unused_layers=_unused_layers(raw, layout, layers, faults),
        num_attention_heads=v.get("num_attention_heads"),
        layer_norm_eps=v.get("layer_norm_eps", float),
    )
    width, heads = t.get("hidden_size"), t.get("num_attention_heads")
    per_head = max(width // max(heads, 1), 1)
    # null means one per head; an absent field means the default
    kv_heads = t.get("num_key_value_heads", default=max(heads, 1) if "num_key_value_heads" in t.data else None)
    text = QwenConfig(
        vocab_size=t.get("vocab_size"),
        hidden_size=width,
        intermediate_size=t.get("intermediate_size"),
        num_hidden_layers=t.get("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=t.get("head_dim", default=None if "head_dim" in decoder.defaults else per_head),
        rms_norm_eps=t.get("rms_norm_eps", float),
        rope_theta=_rope_theta(t, faults),
        max_position_embeddings=t.get("max_position_embeddings"),
        tie_word_embeddings=_tied(raw),
        qkv_bias=decoder.qkv_bias,
        qk_norm=decoder.qk_norm,
    )
    for name, parts, of, whole in [
        ("vision_config.num_attention_heads", vision.num_attention_heads, "hidden_size", vision.hidden_size),
        ("text_config.num_key_value_heads", kv_heads, "num_attention_heads", heads),
        *([] if t.states("head_dim") else [("text_config.num_attention_heads", heads, "hidden_size", width)]),
    ]:
        if parts and whole % parts:
            faults.append(f"{name}: {parts} does not divide {of} {whole}")
    if text.head_dim % 2:
        faults.append(f"text_config.head_dim: {text.head_dim} is odd, and rope turns pairs")
    for place in ("", "text_config"):
        tied = sections[place].get("tie_word_embeddings")
        if tied is not None and not isinstance(tied, bool):
            place = f"{place}." if place else ""
            faults.append(f"{place}tie_word_embeddings: expected true or false, got {tied!r}")
    stated = {k: raw[k] for k in ("image_token_index", "image_token_id") if raw.get(k) is not None}
    odd = {k: v for k, v in stated.items() if isinstance(v, bool) or not isinstance(v, int)}
    faults += [f"{key}: expected a whole number, got {value!r}" for key, value in odd.items()]
    tokens = {*({} if odd else stated).values()} or {layout.image_token}
    if not odd and (len(tokens) > 1 or not 0 <= min(tokens) < (text.vocab_size or 2**31)):
        faults.append(f"image_token_index: {sorted(tokens)}, expected one id below vocab_size {text.vocab_size}")
    return LlavaConfig(
        vision=vision,
        text=text,
        modalities={},
        image_token_id=min(tokens),
        image_newline=layout.image_newline,
    )


def stored_modalities(directory: str | Path, patch_embed: Path | None = None) -> dict[str, ModalityConfig]:
    """Return the modalities of `umbrella_config.json`, if it exists, updated with those of the file `patch_embed`."""
    path = Path(directory) / UMBRELLA_CONFIG
    stored: dict[str, ModalityConfig] = {}
    if path.exists():
        section = {"modalities": read_checkpoint_json(path).get("modalities")}
        if section["modalities"] != {}:  # a base that has been stitched has none yet
            stored = parse_config({"model": section}, Origins(str(path))).model.modalities
    if patch_embed is not None:
        theirs = open_trained(patch_embed).modalities
        stored = {m: c for m, c in stored.items() if resolve_modality(m, theirs) is None} | theirs
    return stored


def stored_template(directory: str | Path, patch_embed: Path | None = None) -> Template | None:
    """Return the conversation template of the training data; None if it is not recorded, as for a stock LLaVA.

    `patch_embed` or else `umbrella_config.json` records it.
    """
    path, template = Path(directory) / UMBRELLA_CONFIG, None
    if patch_embed is not None and (template := open_trained(patch_embed).template) is not None:
        path = patch_embed
    elif path.exists():
        template = read_checkpoint_json(path).get("template")
    if template not in (None, *get_args(Template)):
        raise ConfigError(f"{path}: template: expected one of {', '.join(get_args(Template))}, got {template!r}")
    return template


def stored_untrained(directory: str | Path, patch_embed: Path | None = None) -> dict[str, str]:
    """Return {modality or component: reason} for those that are recorded as untrained.

    For components and modalities in the file `patch_embed`, its record replaces that of `umbrella_config.json`.
    """
    path = Path(directory) / UMBRELLA_CONFIG
    untrained = _string_mapping(path, read_checkpoint_json(path).get("untrained")) if path.exists() else {}
    if patch_embed is not None:
        trained = open_trained(patch_embed)
        contained = {component_of(name) for name in trained.tensors if not adapted_weight(name)}
        replaced = {m for m in untrained if m in contained or resolve_modality(m, trained.modalities) is not None}
        untrained = {m: why for m, why in untrained.items() if m not in replaced}
        untrained |= _string_mapping(patch_embed, trained.untrained)
    return untrained


def stored_parts(directory: str | Path) -> dict[str, dict[str, str]]:
    """Return {title of a part: its `name`, and the fields about the license on its card} of a base that was stitched,
    or of a model that was trained from one; {} for all others.
    """
    path = Path(directory) / UMBRELLA_CONFIG
    stated = read_checkpoint_json(path).get("parts", {}) if path.exists() else {}
    parts = stated.values() if isinstance(stated, dict) else [None]
    if not all(isinstance(p, dict) and "name" in p and all(isinstance(v, str) for v in p.values()) for p in parts):
        raise ConfigError(f"{path}: parts: expected {{part: its name and license}}, got {stated!r}")
    return dict(stated)


def stored_training(directory: str | Path) -> dict[str, Any]:
    """Return the facts about the training of an export or of a checkpoint made of one; {} if none are recorded.

    Raises ConfigError if they are not as `convert.model_card.training_facts` returns them.
    """
    path = Path(directory) / UMBRELLA_CONFIG
    stated = read_checkpoint_json(path).get(TRAINING) if path.exists() else None
    if stated is None:
        return {}
    try:
        numbers = [stated["subjects"], stated["conversations"]]
        texts = [stated["step"], *stated["trained"], *stated["tasks"]]
        for task in stated["tasks"].values():
            for metric in task.values():
                numbers.append(metric["answers"])
                figures = [metric["value"], metric["chance"], *(metric["interval"] or ())]
                if not all(figure is None or type(figure) in (int, float) for figure in figures):
                    raise TypeError
        if not all(isinstance(own, int | str | None) for own in numbers) or not all(isinstance(t, str) for t in texts):
            raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{path}: {TRAINING}: not as `convert to-hf` writes it; export again") from None
    return dict(stated)


def stored_first_steps(directory: str | Path) -> dict[str, int] | None:
    """Return {modality: first step that shows one} from the model folder of a run; None if it is not recorded."""
    path = Path(directory) / UMBRELLA_CONFIG
    stated = read_checkpoint_json(path).get("first_steps") if path.exists() else None
    if stated is not None and not (isinstance(stated, dict) and all(type(step) is int for step in stated.values())):
        raise ConfigError(f"{path}: first_steps: expected {{modality: step}}, got {stated!r}")
    return stated


def _string_mapping(path: Path, stated: Any) -> dict[str, str]:
    stated = {} if stated is None else stated
    if not isinstance(stated, dict) or not all(isinstance(text, str) for pair in stated.items() for text in pair):
        raise ConfigError(f"{path}: untrained: expected {{modality: reason}}, got {stated!r}")
    return stated


_GEOMETRY = ("size", "patch", "mode", "spacing")  # fields that a resampled patch embedding may change


def _modalities(
    directory: Path, given: Mapping[str, ModalityConfig] | None, init: PatchEmbedInit, patch_embed: Path | None
) -> Mapping[str, ModalityConfig]:
    """Return the modalities `given`, if they agree with the stored ones; if None is given, the stored ones."""
    stored = stored_modalities(directory, patch_embed)
    own = open_trained(patch_embed).modalities if patch_embed is not None else {}
    path = patch_embed if patch_embed is not None and own else directory / UMBRELLA_CONFIG
    if given is None:
        if not stored:
            remedy = "name the modalities, with size and patch, in a config (--config FILE)"
            raise ConfigError(f"{path}: {'names no modality' if path.exists() else 'not found'}; {remedy}")
        return stored
    taken = filter(is_component, given)
    faults = [f"model.modalities.{name}: is a component of the model; choose another name" for name in taken]
    for name, theirs in stored.items():
        configured = resolve_modality(name, given)
        if configured is None:
            faults.append(f"{path}: {name}: is in the checkpoint but not configured; add it to the modalities")
            continue
        ours = given[configured].meaning
        for field, value in theirs.meaning.items():
            if ours[field] != value and not (init == "resample" and field in _GEOMETRY):
                remedy = f"set model.modalities.{configured}.{field}: {value}, which these weights were trained on"
                if field in _GEOMETRY:
                    remedy += ", or model.patch_embed_init: resample"
                both = f"{value} in the checkpoint, {ours[field]} as configured"
                faults.append(f"{path}: {name}.{field}: {both}; {remedy}")
    if faults:
        raise ConfigError(faults)
    return given


def read_titles(directory: str | Path) -> tuple[str, str]:
    """Return the names of the tower and the language model of a config.json that `read_config` accepts."""
    raw = read_hub_config(directory)
    tower = section_of(raw, "vision_config").get("model_type", LAYOUTS[raw["model_type"]].tower)
    return TOWERS[tower].title, _decoder_of(raw).title


def file_vocab_size(directory: str | Path) -> int:
    """Return the number of embeddings according to the checkpoint's config.json."""
    raw = read_hub_config(directory)
    return int(section_of(raw, "text_config").get("vocab_size") or _decoder_of(raw).defaults["vocab_size"])


def _decoder_of(raw: Mapping[str, Any]) -> Decoder:
    """Return the language model of a config.json that `read_config` accepts."""
    return DECODERS[section_of(raw, "text_config").get("model_type", LAYOUTS[raw["model_type"]].decoder)]


def is_tied(directory: str | Path) -> bool:
    """Return whether the head is tied to the embeddings according to the checkpoint's config.json."""
    return _tied(read_hub_config(directory))


def small_files(source: Path) -> list[Path]:
    files = (*source.iterdir(), *(source / _TEMPLATES).glob("*"))
    return [path for path in files if is_carried(path.relative_to(source).as_posix()) and path.is_file()]


def is_carried(name: str) -> bool:
    """Return whether a file of this name, with its path below the folder, is copied with the weights."""
    folder, _, file = name.rpartition("/")
    if folder == _TEMPLATES:
        return fnmatchcase(file, "*.jinja")
    return not folder and any(fnmatchcase(file, pattern) for pattern in _CARRIED)


def file_checksums(directory: Path) -> dict[str, str]:
    """Return {path below `directory`: CRC-32} of config.json and the `carried_files`, except licences."""
    files = sorted(path for path in (directory / CONFIG, *small_files(directory)) if path.is_file())
    return {
        path.relative_to(directory).as_posix(): file_checksum(path)
        for path in files
        if not path.name.startswith("LICENSE")
    }


def changed_files(directory: Path) -> list[str]:
    """Return a message for each small file that changed since `write_config` recorded its checksum.

    These are config.json and the files of tokenizer, generation and processor. Unlike changed weights, they are not
    rejected: people edit chat templates and generation settings, and transformers rewrites config.json. But a change
    affects answers, and a flipped bit in a digit or a word is still valid, so each change is reported.
    """
    record = directory / UMBRELLA_CONFIG
    stated = read_checkpoint_json(record).get(FILES, {}) if record.exists() else {}
    expected, found = read_checksums(stated, record, FILES), file_checksums(directory)
    remedy = f"recorded it; copy it again or, if the change is on purpose, delete its line from {FILES} there"
    return [
        f"{directory / name}: {'changed since' if name in found else 'missing, but'} {UMBRELLA_CONFIG} {remedy}"
        for name, checksum in expected.items()
        if found.get(name) != checksum
    ]
