"""Read configurations of the original PyTorch system: every key is carried over or reported as dropped.

A setting without counterpart here is an error, so a run never differs silently.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from umbrella_jax.config.original_rules import DROPPED, FLAT, RULES
from umbrella_jax.config.schema import SECRET, ModelConfig, RunConfig, TrainConfig, resolve_modality
from umbrella_jax.console import WIDTH, table_lines, wrapped
from umbrella_jax.errors import ConfigError, visible
from umbrella_jax.io.files import yaml_text
from umbrella_jax.io.reading import quoted

_SIZE, _FRAMES, _PATCH = "dataset.{}.img_size", "dataset.{}.sequence_length", "model.{}.patch_size"
# carried over only for a modality that has both size and patch
_MODALITY_KEYS = {
    "img_size": "size",
    "sequence_length": "size",
    "patch_size": "patch",
    "input_scaling_method": "scaling",
    "stride_within_seq": "stride_within_seq",
    "stride_between_seq": "stride_between_seq",
}
_TYPE_FLAGS = {"trainer.bf16", "trainer.fp16"}
_BEST = "trainer.load_best_model_at_end"
_DEFAULTS: dict[str, Any] = {
    "model.compute_dtype": "bfloat16",
    "model.frozen_dtype": "bfloat16",
    "train.epochs": 50,
    "train.warmup_steps": 500,
    "train.save_steps": 500,
    "train.wandb": False,
}
"""Defaults of the original that differ from those here, except `train.wandb`: nothing is uploaded unasked."""
_DEFAULTS_WITH_EVAL: dict[str, Any] = {
    "train.eval_steps": 500,
    "train.keep_best": 1,
    "train.best_metric": "eval_loss",
}
_EARLY_STOPPING = tuple(f"train.early_stopping.{name}" for name in ("patience", "metric", "min_delta"))
_FLIP = (
    "the original flips half of the 3D training volumes along a random axis, each image independently; here all images "
    "of a conversation flip together, also in 4D. A flip turns left into right: set it to 0 if any answer mentions a "
    "side"
)
_DIFFUSION = (
    "the original feeds diffusion maps through this patch embedding too; without the alias, dMRI is a modality of its "
    "own, to be configured"
)
_TEMPLATE = (
    "as in the original, images come before the text, or at the markers of a turn that is a single string; headers of "
    "answers and system turns are learnt too"
)
_STORED = "the original ignores the orientation of a file"
_DEFAULT = "the original's default"
_MODALITIES = "model.modalities."


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A configuration of the original, in the keys here."""

    mapping: dict[str, Any]
    """The nested mapping for `parse_config`."""
    sources: dict[str, str]
    """{dotted key here: key of the file that gave its value}."""
    assumed: dict[str, str]
    """{dotted key here: why it has a value that the file does not give}."""
    remarks: list[tuple[str, str]]
    """(key of the file, what changes its meaning, or `dropped: ` and the reason)."""

    @property
    def notes(self) -> list[str]:
        """One line on each key that is dropped, changes its meaning or is assumed."""
        values = dict(_leaves(self.mapping))
        assumed = (f"{key}: {_text(values[key])}: assumed: {why}" for key, why in self.assumed.items())
        return [*(f"{key}: {text}" for key, text in self.remarks), *assumed]

    def lines(self, path: object) -> list[str]:
        """Return a short table for a terminal: values with the file's keys, what is assumed, dropped and why.

        Values of one modality, or from one key, share a row.
        """
        read, assumed = dict[str, tuple[list[str], list[str]]](), list[str]()
        for key, value in _leaves(self.mapping):
            source = self.sources.get(key)
            if source is None:
                assumed.append(f"{key}={_text(value)}")
                continue
            modality, _, field = key.rpartition(".") if key.startswith(_MODALITIES) else ("", "", "")
            values, sources = read.setdefault(modality or source, ([], []))
            values.append(f"{field if modality else key}: {_text(value)}")
            source = source.rpartition(".")[0] or source if modality else source  # dataset.T1, or T1_img_size
            sources += [source] if source not in sources else []
        rows = list[tuple[str, str]]()
        for name, (values, sources) in read.items():
            text = ", ".join(values)
            rows.append((f"{name}: {{{text}}}" if name.startswith(_MODALITIES) else text, ", ".join(sources)))
        notes: dict[str, list[str]] = {}
        for key, text in self.remarks:
            notes.setdefault(text, []).append(key)
        texts = [f"assumed: {', '.join(assumed)}"] if assumed else []
        ordered = sorted(notes.items(), key=lambda note: note[0].startswith(DROPPED))
        texts += [f"{', '.join(keys)}: {text}" for text, keys in ordered]
        return [
            f"{path}: a configuration of the PyTorch system, read as",
            *(table_lines(rows, (WIDTH, 0)) if rows else []),
            *(line for text in texts for line in wrapped(visible(text, kept=""))),
            f"why, and to edit: umbrella-jax config from-original {path} > run.yaml",
        ]


def keys_by_system(data: Mapping[Any, Any]) -> tuple[list[str], list[str]]:
    """Return the keys in a YAML file that only umbrella-jax has, and those that only the original has.

    Keys that both have, such as `seed`, and unknown ones are in neither list.
    """
    ours, theirs = list[str](), list[str]()
    here, model = ({field.name for field in fields(section)} for section in (RunConfig, ModelConfig))
    for name, value in data.items():
        if name == "model" and isinstance(value, Mapping):
            ours += [f"model.{key}" for key in value if key in model]
            with_patch = {key for key, part in value.items() if isinstance(part, Mapping) and "patch_size" in part}
            theirs += [f"model.{key}" for key in value if key in {"hf_name", *with_patch} - model]
        elif name in here:
            ours += [name] if name not in ("model", *FLAT) else []
        elif name in ("dataset", "trainer", "wandb", *FLAT) or _nested_name(str(name), "T1") != name:
            theirs.append(str(name))
    return ours, theirs


def convert(data: Mapping[Any, Any], path: object, overrides: Mapping[str, Any] | None = None) -> Conversion:
    """Convert a YAML file of the original system, in its nested or its flat form.

    Args:
        path: the file, for messages.
        overrides: {dotted key here: value} of the command line, to be left out; None if the result is a file to edit,
            which keeps settings of evaluations even without evaluation data.

    Raises:
        ConfigError: every fault: a value without counterpart, no modality with both size and patch.
    """
    reading = _Reading(data, overrides)
    reading.read_modalities()
    reading.read_keys()
    if not reading.modalities and not reading.faults and not reading.is_overridden("model.modalities"):
        reading.faults.append(f"no modality has both {reading.size_and_patch('NAME')}")
    if reading.faults:
        raise ConfigError([f"{path}: {fault}" for fault in reading.faults])
    return reading.conversion()


class _Reading:
    """The keys of one file of the original, and what they set here."""

    def __init__(self, data: Mapping[Any, Any], overrides: Mapping[str, Any] | None):
        self.faults: list[str] = []
        self.modalities: dict[str, dict[str, Any]] = {}
        """{name: fields} of every modality that has both size and patch."""
        self._remarks: list[tuple[str, str]] = []
        self._targets: dict[str, tuple[str, Any]] = {}
        """{dotted key here: (key of the nested YAML, value)}."""
        self._overrides = overrides or {}
        self._is_to_edit = overrides is None
        self._is_flat = not any(name in data for name in ("dataset", "model", "trainer"))
        self._source: dict[str, Any] = {}
        """{key of the nested YAML: value}."""
        self._typed: dict[str, str] = {}
        """{key of the nested YAML: key of the file}."""
        modality = str(data.get("modality", "T1"))
        # last, names without a modality: T1_img_size comes before img_size
        for name, value in sorted(_leaves(data), key=lambda leaf: leaf[0] in _MODALITY_KEYS):
            key = _nested_name(name, modality)
            if key not in self._source:
                self._source[key], self._typed[key] = value, name
            elif self._source[key] != value:
                self._remarks.append((name, f"{DROPPED}{self._typed[key]} holds"))

    def is_overridden(self, key: str) -> bool:
        """Return whether the command line sets a dotted key here, or its section."""
        return any(f"{key}.".startswith(f"{name}.") for name in self._overrides)

    def size_and_patch(self, name: str) -> str:
        """Return the keys of a modality's size and patch, as this file would name them."""
        if self._is_flat:
            return f"{name}_img_size and {name}_patch_size"
        return f"{_SIZE.format(name)} and {_PATCH.format(name)}"

    def read_modalities(self) -> None:
        """Read the size and patch of every modality."""
        for key in self._source:
            section, _, rest = key.partition(".")
            name, _, last = rest.partition(".")
            if section not in ("dataset", "model") or not last or "." in last or name in self.modalities:
                continue
            try:
                if fields_here := _geometry(self._source, self._typed, name):
                    self.modalities[name] = fields_here
            except ConfigError as error:
                self.faults.extend(fault for fault in error.faults if fault not in self.faults)

    def read_keys(self) -> None:
        """Apply the rule of every key; the best checkpoint's last, because its metric is only a default."""
        for key, value in sorted(self._source.items(), key=lambda item: item[0] == _BEST):
            *sections, last = key.split(".")
            name = sections[1] if len(sections) == 2 and sections[0] in ("dataset", "model") else ""
            rule = RULES.get(f"{sections[0]}.*.{last}" if name else key)
            if SECRET.search(last):  # its value is shown nowhere
                self._drop(key, "keys come from the environment only")
            elif value is None:
                self._drop(key, "null, the default holds")
            elif name and last in _MODALITY_KEYS:
                self._read_modality_key(key, name, last)
            elif rule is None:
                self._drop(key, "unknown to umbrella-jax")
            else:
                try:
                    self._put(key, *rule(value))
                except ConfigError as error:
                    self.faults.extend(f"{self._typed[key]}: {fault}" for fault in error.faults)

    def _read_modality_key(self, key: str, name: str, last: str) -> None:
        modality = self.modalities.get(name)
        if modality is None:
            self._drop(key, f"the modality needs {self.size_and_patch(name)}")
        elif len(modality["size"]) == 3 and last.startswith("stride"):
            self._drop(key, "only 4D volumes have windows")
        else:
            field = _MODALITY_KEYS[last]
            value = modality.setdefault(field, self._source[key])
            self._put(key, {f"model.modalities.{name}.{field}": value}, None)

    def _drop(self, key: str, reason: str) -> None:
        remark = (self._typed[key], f"{DROPPED}{reason}")
        self._remarks += [remark] if remark not in self._remarks else []

    def _put(self, key: str, new: Mapping[str, Any], remark: str | None) -> None:
        for target, value in new.items():
            first, known = self._targets.setdefault(target, (key, value))
            if known != value and key != _BEST:
                self._drop(key, f"{target} is taken from {self._typed[first]}")
        if new and all(map(self.is_overridden, new)):
            self._drop(key, "a flag sets it")
        elif remark:
            self._remarks.append((self._typed[key], remark))

    def _leave_out(self, target: str, reason: str) -> None:
        if target in self._targets:
            self._drop(self._targets.pop(target)[0], reason)

    def _defaults(self) -> dict[str, Any]:
        """Return the original's defaults that apply; leave out settings of evaluations that it would not make."""
        defaults = dict(_DEFAULTS)
        has_eval = "data.eval" in self._targets or self.is_overridden("data.eval")
        if has_eval:
            defaults |= _DEFAULTS_WITH_EVAL
        elif not self._is_to_edit:
            for target in (*_DEFAULTS_WITH_EVAL, *_EARLY_STOPPING):
                self._leave_out(target, "there are no evaluation data (--eval-data PATH)")
        _, keep_best = self._targets.get("train.keep_best", ("", has_eval))
        if not self._overrides.get("train.keep_best", keep_best):
            self._leave_out("train.best_metric", "only with load_best_model_at_end")
            defaults.pop("train.best_metric", None)
        if _EARLY_STOPPING[1] in self._targets:  # Hugging Face's callback watches metric_for_best_model
            key, metric = self._targets[_EARLY_STOPPING[1]]
            self._targets[_EARLY_STOPPING[1]] = key, self._targets.get("train.best_metric", ("", metric))[1]
        if self._source.get("trainer.lr_scheduler_type") == "constant":
            defaults.pop("train.warmup_steps")
            for target in ("train.warmup_steps", "train.warmup_ratio"):
                self._leave_out(target, "Hugging Face's constant schedule has no warm-up")
        elif "train.warmup_ratio" in self._targets or self.is_overridden("train.warmup_ratio"):
            defaults.pop("train.warmup_steps")
            if self._targets.get("train.warmup_steps", ("", 0))[1]:
                self._leave_out("train.warmup_ratio", "warmup_steps comes first, as in Hugging Face's Trainer")
        compute = "model.compute_dtype"
        if compute in self._targets or self.is_overridden(compute) or _TYPE_FLAGS & self._source.keys():
            del defaults[compute], defaults["model.frozen_dtype"]
        return defaults

    def conversion(self) -> Conversion:
        """Return what all keys and the original's defaults and habits set."""
        reasons = {"data.template": _TEMPLATE, "train.wandb": "nothing is uploaded unless train.wandb asks for it"}
        values = {"data.template": "original", **self._defaults()}
        if any(len(modality["size"]) == 3 for modality in self.modalities.values()):
            values["data.augment.flip_any_axis"], reasons["data.augment.flip_any_axis"] = 0.5, _FLIP
        for name, modality in self.modalities.items():
            reasons |= {f"model.modalities.{name}.orientation": _STORED, f"model.modalities.{name}.aliases": _DIFFUSION}
            values |= {f"model.modalities.{name}.{field}": value for field, value in modality.items()}
        structural = resolve_modality("T1", self.modalities)
        if structural and "dMRI" not in self.modalities:
            values[f"model.modalities.{structural}.aliases"] = ["dMRI"]
        _merge_betas(self._targets)
        values |= {target: value for target, (_, value) in self._targets.items()}
        kept = sorted((key for key in values if not self.is_overridden(key)), key=_place)
        return Conversion(
            mapping=_nest({key: values[key] for key in kept}),
            sources={key: self._typed[self._targets[key][0]] for key in kept if key in self._targets},
            assumed={key: reasons.get(key, _DEFAULT) for key in kept if key not in self._targets},
            remarks=self._remarks,
        )


def render(conversion: Conversion) -> str:
    """Return the YAML of a run for `load_config`, below the notes as comments."""
    comments = [f"# {line}" for note in conversion.notes for line in note.splitlines()]
    return "\n".join([*comments, yaml_text(conversion.mapping)])


def _nested_name(name: str, modality: str) -> str:
    """Return the key of the nested YAML that a flat name means, or the name itself.

    Args:
        modality: the one that `img_size` and `patch_size` without a name mean.
    """
    if name in FLAT:
        return FLAT[name]
    for field in _MODALITY_KEYS:
        section = "model" if field == "patch_size" else "dataset"
        if name == field:
            return f"{section}.{modality}.{field}"
        if name.endswith(f"_{field}"):
            return f"{section}.{name.removesuffix(f'_{field}')}.{field}"
    return name


def _leaves(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; a list is a value, and so is an empty section."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _geometry(source: Mapping[str, Any], typed: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Return the fields of a modality as the original reads them, or None if size or patch is missing."""
    keys = [key.format(name) for key in (_SIZE, _FRAMES, _PATCH)]
    size, frames, patch = map(source.get, keys)
    if size is None or patch is None:
        return None
    for key, value in ((keys[0], size), (keys[2], patch)):
        if not isinstance(value, int | list):
            raise ConfigError(f"{typed[key]}: expected a number or a list of numbers, got {quoted(value)}")
    size = [size] * 3 if isinstance(size, int) else list(size)
    if frames is not None and len(size) == 3:
        size = [*size, frames]
    if frames is not None and size[-1] != frames:
        raise ConfigError(f"{typed[keys[1]]}: {frames} frames, but {typed[keys[0]]} says {size[-1]}")
    patch = [patch] * len(size) if isinstance(patch, int) else list(patch)
    return {"size": size, "patch": patch, "orientation": "as_stored"}


def _place(key: str) -> tuple[int, int]:
    """Return the places of a key's section and field in the order of RunConfig's fields."""
    section, _, rest = key.partition(".")
    sections: dict[str, Any] = {field.name: field.type for field in fields(RunConfig)}
    inside = [field.name for field in fields(sections[section])] if rest else []
    return list(sections).index(section), inside.index(rest.partition(".")[0]) if inside else 0


def _merge_betas(targets: dict[str, tuple[str, Any]]) -> None:
    """Replace `train.betas.0` and `.1`, which have a key each in the original, by one list."""
    given = {i: targets.pop(f"train.betas.{i}") for i in range(2) if f"train.betas.{i}" in targets}
    if given:
        betas = [given[i][1] if i in given else beta for i, beta in enumerate(TrainConfig().betas)]
        targets["train.betas"] = next(iter(given.values()))[0], betas


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted keys into sections."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return result


def _text(value: Any) -> str:
    """Return a value as YAML, cut to a length."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} …"
