"""Put a vision tower and a language model together as a base: a LLaVA with a new projector that must be trained."""

import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.architectures import DECODERS, TOWERS, VisionTower
from convert.checksum import KEY
from convert.config_json import CONFIG, check_code, describe_model, read_checkpoint_json, section_of
from convert.export_config import CARD, carried_files, hf_dict, write_record
from convert.foreign import check_placeholders, folder_contents
from convert.from_hf import check_tied_copy
from convert.hub import fetch, parse_hub_name
from convert.lazy_tensor import Tensor, grow
from convert.model_card import UNLIKE_LICENSES, describe_license
from convert.rules import EMBED, LM_HEAD, REPLACED, map_tensors
from convert.safetensors_files import open_checkpoint, write_checkpoint
from umbrella_jax.checkpoints.export import read_license
from umbrella_jax.config.ranges import Seed, range_of
from umbrella_jax.data.placeholders import IMAGE_MARKER
from umbrella_jax.data.tokenize import load_tokenizer, save_tokenizer
from umbrella_jax.errors import CheckpointError, ConfigError, Faults
from umbrella_jax.io.files import check_new_folder, new_folder, strict_json
from umbrella_jax.models import LlavaConfig
from umbrella_jax.models.paths import LANGUAGE_MODEL, PROJECTOR, VISION_MODEL, VISION_TOWER

VISION, LANGUAGE = "vision tower", "language model"
_GENERATION = "generation_config.json"
_FLOATS = ("float32", "float16", "bfloat16")
_OF_THE_FILES = ("architectures", "_name_or_path", "torch_dtype", "dtype", "transformers_version", "auto_map")
"""Fields of a part's config.json that do not describe the part."""


@dataclass(frozen=True)
class _Part:
    """One of the two models, before its tensors are compared with its description."""

    title: str
    name: str
    """Name on the hub, or name of the directory."""
    directory: Path
    kind: str
    """Its title on the model card."""
    config: dict[str, Any]
    """The section of config.json that describes it."""
    prefix: str
    """Prefix of that section's fields in the part's own config.json."""
    tensors: dict[str, Tensor]
    """{name in a LLaVA: tensor}."""
    left_out: tuple[str, ...]
    """Names in the file of tensors that a LLaVA does not use."""
    license: dict[str, str]

    @property
    def types(self) -> str:
        return " and ".join(sorted({tensor.dtype for tensor in self.tensors.values()}))


@dataclass(frozen=True)
class _Base:
    """A base to write: everything is checked, and no number is read."""

    parts: tuple[_Part, ...]
    raw: dict[str, Any]
    """Content of config.json."""
    tensors: dict[str, Tensor]
    """{name on the hub: tensor}."""
    tokenizer: Any
    seed: int
    lines: tuple[str, ...]
    """Messages about what was left out and added."""


def stitch(vision: str | Path, language: str | Path, out: str | Path, *, seed: int = 0) -> list[str]:
    """Write a LLaVA of a SigLIP and a Qwen as the new Hugging Face directory `out`, atomically, tensor by tensor.

    Weights keep their bits and types. The projector starts as `torch.nn.Linear` does, which LLaVA's first stage starts
    from too. umbrella_config.json records it as untrained, so the base does not answer before its projector has
    trained.

    Args:
        vision: directory of a SigLIP or SigLIP 2 of a fixed resolution, whole or only its tower, or its name on the
            hub.
        language: directory of a language model with its tokenizer, or its name on the hub.
        seed: seed of the projector.

    Returns:
        Messages about what was left out and added.

    Raises:
        ConfigError: `out` is not empty, or `seed` is no `Seed`.
        CheckpointError, DataError: with every fault of both models, before anything is written.
    """
    out = Path(out)
    check_new_folder(out)
    seeds = range_of(Seed)
    if seeds is not None and seed not in seeds:
        raise ConfigError(f"seed: expected {seeds}, got {seed}")
    base = _plan(vision, language, seed)
    with new_folder(out) as part:
        checksums = write_checkpoint(part, base.tensors)
        for one in base.parts:
            for file in carried_files(one.directory):
                if file.name.startswith("LICENSE"):
                    shutil.copyfile(file, part / f"LICENSE-{one.title.split()[0]}{file.name.removeprefix('LICENSE')}")
                elif file.name == _GENERATION and one.title == LANGUAGE:
                    shutil.copyfile(file, part / file.name)
        (part / CONFIG).write_text(strict_json(base.raw, indent=2) + "\n")
        save_tokenizer(base.tokenizer, part)
        (part / CARD).write_text(_card(out.name, base), encoding="utf-8")
        record = {
            "modalities": {},
            "untrained": {"projector": f"never trained (random, seed {seed})"},
            "parts": {one.title: {"name": one.name, **one.license} for one in base.parts},
            KEY: checksums,
        }
        write_record(part, record)
    return list(base.lines)


def _plan(vision: str | Path, language: str | Path, seed: int) -> _Base:
    faults = Faults()
    tower, opened = faults.check(partial(_read_tower, vision)), faults.check(partial(_read_decoder, language))
    faults.raise_as(CheckpointError)
    assert tower is not None
    assert opened is not None
    decoder, tokenizer, added = opened
    stated = decoder.config["vocab_size"]
    rows = stated if type(stated) is int and stated > 0 else 0
    size = max(rows, max(tokenizer.get_vocab().values()) + 1)
    image = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    tied = decoder.config.get("tie_word_embeddings", False)
    raw = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
        "vision_config": tower.config,
        "text_config": {**decoder.config, "vocab_size": size if rows else stated},
    }
    config_faults: list[str] = []
    config = describe_model(raw, config_faults)
    for fault in config_faults:
        part, field = (tower if fault.startswith("vision_config.") else decoder), fault
        for section in ("vision_config.", "text_config."):
            field = field.removeprefix(section)
        faults.append(f"{part.directory / CONFIG}: {part.prefix}{field}")
    faults[:] = dict.fromkeys(faults)  # a tie is described twice
    faults.raise_as(CheckpointError)
    tensors = {**tower.tensors, **decoder.tensors}
    faults += _tensor_faults((tower, decoder), tensors, config, rows)
    if not rows // 2 <= (tokens := len(tokenizer) - len(added)) <= rows:
        why = f"the tokenizer has {tokens} tokens and the embeddings {rows} rows; copy this model's own tokenizer"
        faults.append(f"{decoder.directory}: {why}")
    faults.raise_as(CheckpointError)
    has_copy = config.text.tie_word_embeddings and decoder.tensors.pop(LM_HEAD, None) is not None
    if has_copy:
        check_tied_copy(tensors[EMBED], tensors.pop(LM_HEAD))
    raw = hf_dict(raw, config) | {"torch_dtype": tensors[EMBED].dtype}
    for name in (EMBED, LM_HEAD) if size > rows else ():
        if name in tensors:
            tensors[name] = grow(tensors[name], size)
    projector = _projector(config, seed)
    lines = [
        *_part_lines(tower, decoder),
        *(["left out, as it is the embeddings: lm_head.weight"] if has_copy else []),
        f"projector: random, seed {seed}: uniform within ±1/√inputs (as torch.nn.Linear), float32; untrained",
        *_token_lines(added, image, rows, size),
    ]
    return _Base((tower, decoder), raw, {**tensors, **projector}, tokenizer, seed, tuple(lines))


def _open(model: str | Path) -> tuple[Path, str, dict[str, Any], dict[str, Tensor]]:
    """Return the directory of a part, its name, its config.json and its tensors."""
    directory = fetch(model)
    check_placeholders(directory)
    if not (directory / CONFIG).exists():
        found = folder_contents(directory) or "nothing that is known"
        raise CheckpointError(f"{directory}: no {CONFIG}; found {found}")
    raw = read_checkpoint_json(directory / CONFIG)
    check_code(directory)
    carried_files(directory)  # raises for links
    if raw.get("quantization_config") is not None:
        why = "quantised weights cannot be read; use the original ones"
        raise CheckpointError(f"{directory / CONFIG}: quantization_config: {why}")
    if not any(directory.glob("*.safetensors*")) and (pickles := sorted(directory.glob("pytorch_model*.bin*"))):
        remedy = "save the model in PyTorch with save_pretrained, which writes safetensors"
        raise CheckpointError(f"{pickles[0]}: a pickle of PyTorch, expected model.safetensors; {remedy}")
    name = directory.resolve().name if Path(model).is_dir() else str(model)
    return directory, name, raw, open_checkpoint(directory)


def _refuse(file: Path, raw: Mapping[str, Any], expected: Sequence[str], why: str | None) -> CheckpointError:
    remedy = why or f"expected {' or '.join(map(repr, expected))}"
    return CheckpointError(f"{file}: model_type: {raw.get('model_type')!r} is not supported: {remedy}")


def _read_tower(model: str | Path) -> _Part:
    """Open a vision tower, or the whole checkpoint that contains it."""
    directory, name, raw, tensors = _open(model)
    kind = str(raw.get("model_type"))
    described: dict[str, tuple[str, VisionTower]] = {}
    for key, tower in TOWERS.items():
        described |= {key: (key, tower), tower.whole: (key, tower)}
    if kind not in described:
        why = next((tower.others[kind] for tower in TOWERS.values() if kind in tower.others), None)
        raise _refuse(directory / CONFIG, raw, list(described), why)
    key, tower = described[kind]
    is_whole = kind == tower.whole
    section = section_of(raw, "vision_config") if is_whole else raw
    # the head is left out, and transformers 5 saves a tower without the prefix
    config = {**_described(section), "model_type": section.get("model_type", key), "vision_use_head": False}
    prefix = VISION_MODEL.removeprefix(VISION_TOWER)
    bare = "" if any(name.startswith(prefix) for name in tensors) else prefix
    named = {f"{bare}{name}": tensor for name, tensor in tensors.items()}
    left_out = [name for name in named if any(fnmatchcase(name, pattern) for pattern in tower.left_out)]
    return _Part(
        title=VISION,
        name=name,
        directory=directory,
        kind=tower.title,
        config=config,
        prefix="vision_config." if is_whole else "",
        tensors={VISION_TOWER + name: tensor for name, tensor in named.items() if name not in left_out},
        left_out=tuple(named[name].name for name in left_out),
        license=read_license(directory / CARD),
    )


def _read_decoder(model: str | Path) -> tuple[_Part, Any, list[str]]:
    """Open a language model. Returns also its tokenizer, with `<image>`, and the tokens that were added."""
    directory, name, raw, tensors = _open(model)
    kind = str(raw.get("model_type"))
    if kind not in DECODERS:
        raise _refuse(directory / CONFIG, raw, list(DECODERS), None)
    decoder = DECODERS[kind]
    tokenizer, added = load_tokenizer(directory, None)
    part = _Part(
        title=LANGUAGE,
        name=name,
        directory=directory,
        kind=decoder.title,
        config={**_described(raw), "vocab_size": raw.get("vocab_size") or decoder.defaults["vocab_size"]},
        prefix="",
        tensors={LANGUAGE_MODEL + name: tensor for name, tensor in tensors.items()},
        left_out=(),
        license=read_license(directory / CARD),
    )
    return part, tokenizer, added


def _described(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _OF_THE_FILES}


def _tensor_faults(
    parts: Sequence[_Part], tensors: Mapping[str, Tensor], config: LlavaConfig, rows: int
) -> Iterator[str]:
    """Yield a fault for each tensor that is missing, unknown, or of another shape or type than described."""
    expected = {entry.name: entry.file_shape for entry in map_tensors(config) if not entry.path.startswith(PROJECTOR)}
    for name in (EMBED, LM_HEAD):
        if name in expected:
            expected[name] = (rows, *expected[name][1:])
    for part, root in zip(parts, (VISION_TOWER, LANGUAGE_MODEL), strict=True):
        for name, shape in expected.items():
            if name.startswith(root) and name not in tensors:
                remedy = "copy all of the checkpoint"
                if name == LM_HEAD:
                    remedy = f"set tie_word_embeddings to true in {CONFIG} if the head is the embeddings"
                yield f"{part.directory}: {name.removeprefix(root)}: missing, expected shape {list(shape)}; {remedy}"
        for name, tensor in part.tensors.items():
            place = f"{tensor.file}: {tensor.name}"
            if name not in expected and name not in REPLACED and name != LM_HEAD:
                yield f"{place}: not a part of the {part.title} that {CONFIG} describes; is it of another?"
            elif name in expected and tensor.shape != expected[name]:
                shapes = f"expected shape {list(expected[name])}, found {list(tensor.shape)}"
                yield f"{place}: {shapes}; use the {CONFIG} of these weights"
            elif tensor.dtype not in _FLOATS:
                yield f"{place}: type {tensor.dtype}, expected one of {', '.join(_FLOATS)}; use the original weights"


def _projector(config: LlavaConfig, seed: int) -> dict[str, Tensor]:
    """Return the projector's tensors, in float32, as torch.nn.Linear initialises them: uniform within ±1/√inputs.

    Each has a key of its own, from the seed and its name.
    """
    bounds = {"linear_1": config.vision.hidden_size**-0.5, "linear_2": config.text.hidden_size**-0.5}
    tensors = {}
    for entry in map_tensors(config):
        if entry.path.startswith(PROJECTOR):
            bound = bounds[entry.path.removeprefix(PROJECTOR).partition(".")[0]]
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(entry.name.encode()))
            array = jax.random.uniform(key, entry.file_shape, jax.numpy.float32, -bound, bound)
            tensors[entry.name] = Tensor.from_array(np.asarray(array))
    return tensors


def _part_lines(*parts: _Part) -> Iterator[str]:
    for part in parts:
        layers, width = part.config.get("num_hidden_layers"), part.config.get("hidden_size")
        sizes = f", {layers} layers, {width} wide" if layers and width else ""
        yield f"{part.title}: {part.name} ({part.kind}{sizes}): {len(part.tensors)} tensors, kept as {part.types}"
        groups: dict[str, int] = {}
        for name in part.left_out:
            group = ".".join(name.split(".")[: 2 if name.startswith(VISION_MODEL.removeprefix(VISION_TOWER)) else 1])
            groups[group] = groups.get(group, 0) + 1
        if groups:
            listed = ", ".join(f"{name}{f' ({count} tensors)' if count > 1 else ''}" for name, count in groups.items())
            yield f"left out, as LLaVA does not use them: {listed}"
        if len({tensor.dtype for tensor in part.tensors.values()}) > 1:
            yield f"{part.title}: its layers have several types, so train with model.frozen_dtype: bfloat16 or float32"


def _token_lines(added: Sequence[str], image: int, rows: int, size: int) -> Iterator[str]:
    if others := [token for token in added if token != IMAGE_MARKER]:
        yield f"{', '.join(others)}: added to the tokenizer"
    if IMAGE_MARKER in added:
        row = "an unused row of the embeddings" if image < rows else "a new row of the embeddings"
        yield f"{IMAGE_MARKER}: added to the tokenizer, id {image}: {row}"
    else:
        yield f"{IMAGE_MARKER}: in the tokenizer already, id {image}"
    if size > rows:
        yield f"vocabulary: grown from {rows} to {size} rows, the new ones the mean of the others"


def _card(name: str, base: _Base) -> str:
    """Return the model card of the base, in Markdown."""
    from huggingface_hub import ModelCardData

    licenses = [part.license for part in base.parts]
    same = licenses[0] if licenses[0] == licenses[1] else {}
    on_hub = [parsed[0] for part in base.parts if (parsed := parse_hub_name(part.name))]
    front = ModelCardData(
        **same,
        base_model=on_hub or None,
        library_name="transformers",
        tags=["llava", "umbrella-jax"],
    )
    rows = [f"| {part.title} ({part.kind}) | `{part.name}` | {describe_license(part.license)} |" for part in base.parts]
    license = "Both parts have the same license." if same else UNLIKE_LICENSES
    return "\n".join(
        [
            "---",
            str(front.to_yaml()),
            "---",
            f"# {name}: a base to train, not a model to ask",
            "",
            f"Two models, bit for bit, and a new projector; put together by umbrella-jax {version('umbrella-jax')} "
            "(`convert stitch`).",
            "",
            "| part | from | license |",
            "| --- | --- | --- |",
            *rows,
            f"| projector | random numbers, seed {base.seed} | – |",
            "",
            "**The projector was never trained, so this base answers nothing.** Train it first, with a patch embedding "
            "for volumes: the groups `patch_embed` and `projector` of `umbrella-jax train`.",
            "",
            "## License",
            license,
            "",
        ]
    )
