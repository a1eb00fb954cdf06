"""Turn config.json of LLaVA's original code and of TinyLLaVA into the hub's layout (`architectures.DIALECTS`).

LLaVA-NeXT writes the language model's fields at the top level and names the tower instead of describing it. So the
tower's sizes come from a table and the number of its layers from the tensors: the code deletes the last layer before
training, since the projector gets the output of the one before.
"""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from convert.architectures import DIALECTS, LAYOUTS, TOWERS, Dialect, unsupported
from convert.rules import IMAGE_NEWLINE, hub_name
from convert.safetensors_files import tensor_names
from umbrella_jax.errors import CheckpointError
from umbrella_jax.io.reading import LISTING, read_json
from umbrella_jax.models.paths import VISION_MODEL

_TOWER = re.compile(
    r"(?:.*/)?siglip2?-(?P<size>[a-z0-9-]+)-patch(?P<patch>\d{1,4})-(?P<image>\d{1,4})(?:-i18n|-multilingual)?/?"
)
"""Name of one of Google's SigLIP checkpoints, or a path that ends in it."""
_LAYER = re.compile(re.escape(VISION_MODEL) + r"encoder\.layers\.(\d+)\.")
_DECODER, _ADDED = "added_tokens_decoder", "added_tokens"
_TYPES = ("torch_dtype", "dtype")
_NO_TOWER = (
    "but the weights lack it, since the original code loads it by that name; load the model with that code, call "
    "save_pretrained, and name the new folder"
)


class HubConfig(NamedTuple):
    """A config.json in the hub's layout."""

    raw: dict[str, Any]
    faults: list[str]
    """Messages about fields without a counterpart on the hub."""
    names: Mapping[str, str]
    """{field on the hub, or prefix of fields: name in the file}, where they differ."""

    def as_in_file(self, message: str) -> str:
        """Return a message that begins with a field's name on the hub, with the name that the file has."""
        for hub, own in self.names.items():
            if message.startswith(hub):
                return own + message.removeprefix(hub)
        return message


def dialect_of(raw: Mapping[str, Any]) -> Dialect | None:
    """Return the dialect of a config.json; None if it is in the hub's layout."""
    return next((dialect for dialect in DIALECTS if dialect.marker in raw), None)


def to_hub(raw: dict[str, Any], directory: Path) -> HubConfig:
    """Return a config.json in the hub's layout, whichever code wrote it.

    Args:
        raw: the content of the file.
        directory: contains the file and, for a dialect, weights and tokenizer. Without weights, as while a run is only
            planned, the tensors are taken to be those that the original code saves.

    Raises CheckpointError if the weights or the tokenizer of a dialect cannot be read.
    """
    dialect = dialect_of(raw)
    if dialect is None:
        return HubConfig(raw, [], {})
    faults = [fault for only in dialect.only if (fault := only.fault("", raw))]
    names = tensor_names(directory)
    tensors = None if names is None else {hub_name(name) for name in names}
    layers = None if tensors is None else len({match[1] for name in tensors if (match := _LAYER.match(name))})
    renamed = {"tie_word_embeddings": "text_config.tie_word_embeddings"}
    if dialect.tower_name is None:
        text, vision = (
            section if isinstance(section := raw.get(f"{name}_config"), dict) else {} for name in ("text", "vision")
        )
        vision = {key: value for key, value in vision.items() if not key.startswith("model_name_or_path")}
        layer = raw.get(dialect.layer, -2)
        if layers == 0:
            faults.append(f"vision_config: describes a tower, {_NO_TOWER}")
    else:
        text = _text_fields(raw, dialect, faults)
        vision, layer = _named_tower(raw, dialect, layers, faults)
        renamed = {"text_config.": "", "vision_feature_layer": dialect.layer}
    has_newline = "unpad" in str(raw.get("mm_patch_merge_type")) if tensors is None else IMAGE_NEWLINE in tensors
    kind = next(kind for kind, layout in LAYOUTS.items() if layout.image_newline == has_newline)
    hub = {
        "architectures": [f"{LAYOUTS[kind].torch_name}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_index": _image_token(raw, text, directory),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        **{key: raw[key] for key in _TYPES if key in raw},
        "text_config": text,
        "vision_config": {**vision, "vision_use_head": False},
    }
    return HubConfig(hub, faults, renamed)


def _text_fields(raw: Mapping[str, Any], dialect: Dialect, faults: list[str]) -> dict[str, Any]:
    """Return the language model's fields of a config.json that has them at the top level; append unknown others."""
    own = {dialect.marker, dialect.layer, *_TYPES, *(only.key for only in dialect.only)}
    rest = {
        key: value
        for key, value in raw.items()
        if key not in own and not any(fnmatchcase(key, pattern) for pattern in dialect.unused)
    }
    unknown = {key for key in rest if key.startswith("mm_")}
    faults += [
        f"{key}: {rest[key]!r} is unknown and may change features; delete the field if it does not"
        for key in sorted(unknown)
        if rest[key] not in (None, False)
    ]
    return {key: value for key, value in rest.items() if key not in unknown} | {"model_type": dialect.decoder}


def _named_tower(
    raw: Mapping[str, Any], dialect: Dialect, layers: int | None, faults: list[str]
) -> tuple[dict[str, Any], Any]:
    """Return the `vision_config` of a tower that is only named, and the layer whose output is projected.

    Args:
        layers: number of the tower's layers among the tensors; None if that is unknown.
        faults: gets a message for a tower that is unknown or not that of the tensors.
    """
    assert dialect.tower_name is not None
    name = raw.get(dialect.tower_name)
    match = _TOWER.fullmatch(name) if isinstance(name, str) else None
    sizes = {size: (kind, fields) for kind, tower in TOWERS.items() for size, fields in tower.sizes.items()}
    if match is None or match["size"] not in sizes:
        known = f"google/siglip-SIZE-patchP-N or google/siglip2-…, SIZE one of {', '.join(sizes)}"
        faults.append(unsupported(dialect.tower_name, name, raw, f"expected {known}"))
        return {"model_type": next(iter(TOWERS))}, -1
    kind, fields = sizes[match["size"]]
    total, layer = fields["num_hidden_layers"], raw.get(dialect.layer, -2)
    found = total - 1 if layers is None else layers
    if found == total - 1 and layer not in (-1, -2):
        why = "expected -2: the weights lack the tower's last layer, and features are the output of the one before"
        faults.append(unsupported(dialect.layer, layer, raw, why))
    elif found == 0:
        faults.append(f"{dialect.tower_name}: {name!r}, {_NO_TOWER}")
    elif found not in (total - 1, total):
        expected = f"expected {total}, or {total - 1} without the last, which the original code deletes"
        faults.append(f"{dialect.tower_name}: {name!r}, but the weights have {found} of its layers; {expected}")
    image = {"image_size": int(match["image"]), "patch_size": int(match["patch"])}
    vision = {"model_type": kind, **fields, "num_hidden_layers": found or total, **image}
    return vision, layer if found == total else -1


def _image_token(raw: Mapping[str, Any], text: Mapping[str, Any], directory: Path) -> Any:
    """Return the id of `<image>`: the tokenizer's or, if it has none, `image_token_index`.

    The original code marks images by -200, which is no token, and its tokenizer may lack `<image>`. Opening the
    checkpoint with its tokenizer then adds `<image>` and uses its id; until then, it is the last row of the embeddings.
    """
    if (token := _id_in_tokenizer(directory)) is not None:
        return token
    token, rows = raw.get("image_token_index"), text.get("vocab_size")
    if token is None or (isinstance(token, int) and token < 0):
        return rows - 1 if isinstance(rows, int) else 0
    return token


def _id_in_tokenizer(directory: Path) -> int | None:
    """Return the id of `<image>` in a tokenizer's files; None if they lack it."""
    stated: list[tuple[Any, Any]] = []
    for name, key in (("added_tokens.json", None), ("tokenizer_config.json", _DECODER), ("tokenizer.json", _ADDED)):
        if stated or not (directory / name).is_file():  # tokenizer.json is large
            continue
        content = read_json(directory / name, CheckpointError, "copy it again", LISTING)
        tokens = content if key is None or not isinstance(content, dict) else content.get(key)
        if isinstance(tokens, dict):
            stated = [(t.get("content"), i) if isinstance(t, dict) else (i, t) for i, t in tokens.items()]
        elif isinstance(tokens, list):
            stated = [(t.get("content"), t.get("id")) for t in tokens if isinstance(t, dict)]
    tokens = {str(token) for word, token in stated if word == "<image>"}
    return next((int(token) for token in tokens if re.fullmatch("[0-9]{1,9}", token)), None)
