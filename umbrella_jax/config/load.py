"""Read, check and write configurations."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from umbrella_jax.config.from_original import Conversion, convert, keys_by_system
from umbrella_jax.config.original_rules import settings
from umbrella_jax.config.origins import Origins
from umbrella_jax.config.ranges import Section, range_faults
from umbrella_jax.config.schema import SECRET, MeshConfig, RunConfig, to_dict
from umbrella_jax.errors import ConfigError, Faults
from umbrella_jax.io.files import yaml_text
from umbrella_jax.io.reading import quoted, read_yaml

S = TypeVar("S", bound=Section)


def parse_mesh(text: str) -> dict[str, int]:
    """Parse `data=4,fsdp=2,tensor=2` into the section `mesh`. Raises ConfigError for an unknown axis or a bad size."""
    axes = [f.name for f in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    faults = []
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in axes:
            near = difflib.get_close_matches(axis, axes, n=1, cutoff=0.5)
            expected = f"expected {', '.join(axes)}" + (f"; the nearest is {near[0]}" if near else "")
            faults.append(f"--mesh {part}: no such axis; {expected}")
        elif not size.isdecimal() or int(size) < 1 or axis in sizes:
            faults.append(f"--mesh {part}: expected {axis}=N once, N at least 1")
        else:
            sizes[axis] = int(size)
    if faults:
        raise ConfigError(faults)
    return sizes


@cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


_UNKNOWN = Origins()


def parse_config(data: Mapping[str, Any], origins: Origins = _UNKNOWN) -> RunConfig:
    """Check a nested mapping and return the run. Raises ConfigError with every fault, its origin and its key."""
    return parse_section(RunConfig, data, origins)


def parse_section(cls: type[S], data: Mapping[str, Any], origins: Origins) -> S:
    """Check a nested mapping and return it as `cls`. Raises ConfigError as `parse_config` does."""
    from pydantic import ValidationError  # here, so that models import without it

    root: Any = cls  # for mypy, a class is no key of a cache
    faults, refused, checked = list[tuple[str, str]](), set[str](), set[str]()
    try:
        config: S = _adapter(root).validate_python(dict(data))
    except ValidationError as error:
        for fault in _without_unions(error.errors()):
            key = ".".join(str(part) for part in fault["loc"])
            cause = fault.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):
                checked.add(key)
                faults += [(key, message) for message in cause.faults]
            elif fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                faults.append((key, f"no such key; expected {_expected_keys(root, fault['loc'])}"))
            else:
                refused.add(key)
                faults.append((key, _expected_value(key, fault)))
    for section, name, hint, value in _number_fields(cls, data):
        key = f"{section}.{name}" if section else name
        if booleans := list(_booleans(key, value)):  # pydantic accepts true as 1
            expected = _EXPECTED["float" if float in set(_parts(hint)) else "int"]
            faults += [(place, f"expected {expected}, got {str(boolean).lower()}") for place, boolean in booleans]
        elif section not in checked and key not in refused:  # a section with an unknown key checks no ranges
            faults += [(section, message) for message in range_faults(name, hint, value)]
    if faults:
        raise ConfigError(
            [f"{origins.place_of(key, message)}: {key + ': ' if key else ''}{message}" for key, message in faults]
        ) from None
    return config


def _number_fields(section: type, given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """Yield (dotted section, name, type, value) of every field that holds a number or several."""
    for name, hint in get_type_hints(section, include_extras=True).items():
        if name not in given:
            continue
        parts, value = set(_parts(hint)), given[name]
        inner = next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)
        if inner:
            below = f"{path}.{name}" if path else name
            sections = {below: value}
            if isinstance(value, Mapping) and any(get_origin(part) is dict for part in parts):
                sections = {f"{below}.{key}": fields for key, fields in value.items()}
            elif isinstance(value, list):
                sections = {f"{below}.{index}": fields for index, fields in enumerate(value)}
            for key, fields in sections.items():
                if isinstance(fields, Mapping):
                    yield from _number_fields(inner, fields, key)
        elif {int, float} & parts and bool not in parts and not (str in parts and isinstance(value, list)):
            yield path, name, hint, tuple(value) if isinstance(value, list) else value


def _parts(hint: Any) -> Iterator[Any]:
    """Yield a type and everything in its brackets."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


def _booleans(key: str, value: Any) -> Iterator[tuple[str, bool]]:
    """Yield (dotted key, value) of every true or false in a value."""
    if isinstance(value, bool):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _booleans(f"{key}.{name}", inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from _booleans(key, inner)


def _without_unions(errors: Sequence[Any]) -> list[Any]:
    """Merge pydantic's two errors, `KEY.literal[…]` and `KEY.float`, about a value that must be a word or a number."""
    unions = {e["loc"][:-1]: e for e in errors if e["loc"] and str(e["loc"][-1]).startswith("literal[")}
    merged = []
    for error in errors:
        union = unions.get(error["loc"][:-1])
        if union is None:
            merged.append(error)
        elif error is union:
            context = {"expected": f"{error['ctx']['expected']}, or a number"}
            merged.append(error | {"loc": error["loc"][:-1], "ctx": context})
    return merged


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number that is not infinite",
    "bool": "true or false",
    "string": "text",
    "dataclass": "a section of keys",
    "dict": "a section of keys",
    "mapping": "a section of keys",
    "tuple": "a list",
    "list": "a list",
}
"""{first word of a pydantic error type: the value that was expected}."""


def _expected_value(key: str, fault: Mapping[str, Any]) -> str:
    """Return the message for a pydantic error, in YAML's terms. The value of a secret is not shown."""
    kind, value = fault["type"], fault["input"]
    if kind.startswith("missing"):
        return "missing; expected a value"
    if kind == "literal_error":
        expected = f"one of {fault['ctx']['expected']}"
    else:
        expected = _EXPECTED.get(kind.partition("_")[0], f"another value ({fault['msg']})")
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        got = "a section of keys" if isinstance(value, Mapping) else "a list"
    else:
        got = "nothing" if value is None else "a value" if SECRET.search(key) else quoted(value)
    return f"expected {expected}, got {got}"


def _is_original(data: Mapping[Any, Any], source: str) -> bool:
    """Return whether a YAML file is the original system's. Raises ConfigError if it mixes keys of both, or has none."""
    ours, theirs = keys_by_system(data)
    if ours and theirs:
        raise ConfigError(
            f"{source}: mixes two kinds of keys: {_some(ours)} of umbrella-jax, and of the PyTorch system "
            f"{_some([_with_ours(name, data.get(name)) for name in theirs])}; keep one kind"
        )
    known = [f.name for f in dataclasses.fields(RunConfig)]
    if data and not theirs and not set(known) & set(data):
        raise ConfigError(
            f"{source}: not a config of a run: it has the keys {_some(list(data))}; expected {', '.join(known)}"
        )
    return bool(theirs)


def _with_ours(name: str, value: Any) -> str:
    """Return a key of the original with the keys here that it sets, for messages."""
    keys = _counterparts(name, value)
    return f"{name} ({', '.join(keys)} here)" if keys else name


def _counterparts(name: str, value: Any) -> Collection[str]:
    """Return the keys here that a name of the original or of Hugging Face's TrainingArguments sets."""
    try:
        new, _ = settings(name, value) or ({}, None)
    except ConfigError:  # a value without counterpart
        return ()
    return new.keys()


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:10])) + (", …" if len(names) > 10 else "")


def _expected_keys(root: Any, path: Sequence[str | int]) -> str:
    """Return the known keys of the section around `path`, for the message about an unknown one."""
    cls: Any = root
    for part in path[:-1]:
        if dataclasses.is_dataclass(cls):
            kind = next((f.type for f in dataclasses.fields(cls) if f.name == part), None)
            cls = get_args(kind)[0] if type(None) in get_args(kind) else kind  # SomeConfig | None
        elif cls is not None:  # dict[str, SomeConfig] or tuple[SomeConfig, ...]
            cls = get_args(cls)[0 if get_origin(cls) is tuple else 1]
    if not dataclasses.is_dataclass(cls):
        return "another"
    known = [f.name for f in dataclasses.fields(cls)]
    name = str(path[-1])
    near = difflib.get_close_matches(name, known, n=1) or [
        f"{section.name}.{name}"
        for section in dataclasses.fields(root)
        if dataclasses.is_dataclass(section.type) and name in {f.name for f in dataclasses.fields(section.type)}
    ]
    near = near or (list(_counterparts(name, None)) if root is RunConfig else [])
    return f"one of {', '.join(known)}" + (f"; the nearest is {near[0]}" if near else "")


def shipped_configs() -> dict[str, Path]:
    """Return {name: path} of the configs shipped with the package."""
    package = Path(__file__).parents[1]
    # a wheel has them inside the package, a checkout next to it
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def print_to_stderr(text: str) -> None:
    """Print a text on stderr, which no command uses for its result."""
    print(text, file=sys.stderr)


def load_config(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
    say: Callable[[str], object] = print_to_stderr,
) -> RunConfig:
    """Read a YAML file, or the shipped config of that name (`t1_0.5b`) if there is no such file.

    A YAML file of the original PyTorch system is converted.

    Args:
        overrides: {dotted key: value that replaces the file's}.
        flags: {dotted key: flag} of the overrides that the command line gave, for messages.
        say: prints how a file of the original system is read.

    Raises:
        ConfigError: the file is missing or not YAML, gives a key twice, mixes keys of both systems, or `parse_config`
            rejects it.
    """
    return read_config(path, overrides, flags, say)[0]


def read_config(
    path: str | Path, overrides: Mapping[str, Any] | None, flags: Mapping[str, str], say: Callable[[str], object]
) -> tuple[RunConfig, Origins]:
    """Read a config as `load_config` does, and return with it where its values came from."""
    path, data = _read_mapping(path)
    keys, given, lines = dict[str, str](), list(flat(data)), list[str]()
    if _is_original(data, str(path)):
        conversion = convert(data, path, overrides or {})
        data, keys, given, lines = conversion.mapping, conversion.sources, [], conversion.lines(path)
    faults = Faults()
    for key, value in (overrides or {}).items():
        *parents, last = names = key.split(".")
        is_ours = names[0] in {f.name for f in dataclasses.fields(RunConfig)}
        theirs = () if is_ours else _counterparts(key, value)
        if theirs:
            faults.append(f"{flags.get(key, path)}: {key}: a key of the PyTorch system; write {' and '.join(theirs)}")
            continue
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                faults.append(f"{flags.get(key, path)}: {key}: {parent} is not a section of {path}")
                break
        else:
            section[last] = value
    origins = Origins(str(path), flags, keys, given)
    with faults:
        config = parse_config(data, origins)
    faults.raise_as(ConfigError)
    if lines:
        say("\n".join(lines))
    return config, origins


def load_original(path: str | Path) -> Conversion:
    """Read a YAML file of the original PyTorch system. Raises ConfigError as `load_config` does, and for any other."""
    path, data = _read_mapping(path)
    if not _is_original(data, str(path)):
        raise ConfigError(f"{path}: not a configuration of the PyTorch system: no key that only that system has")
    conversion = convert(data, path)
    parse_config(conversion.mapping, Origins(str(path), keys=conversion.sources))
    return conversion


def _read_mapping(path: str | Path) -> tuple[str | Path, dict[Any, Any]]:
    """Return the path of a config, which may be a shipped one's, and its keys."""
    shipped = shipped_configs()
    if os.path.isdir(path) or not os.path.lexists(path):
        path = shipped.get(str(path), path)
    data = read_yaml(path, f"expected a YAML file, or a shipped config: {', '.join(shipped)}")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: {'empty' if data is None else 'no config'}; expected the keys of a run: model, data, train, …"
        )
    return path, data


def load_stored_config(path: Path) -> RunConfig:
    """Read the config.yaml that a run wrote, maybe of an older version. Raises ConfigError as `load_config` does."""
    _, data = _read_mapping(path)
    if _is_original(data, str(path)):
        raise ConfigError(f"{path}: a configuration of the PyTorch system; expected one that a run here wrote")
    return parse_stored_config(data, str(path))


def parse_stored_config(data: Mapping[str, Any], source: str) -> RunConfig:
    """Check the config that a run stored, maybe of an older version. Raises ConfigError as `parse_config` does.

    `model.remat: dots`, which no longer exists, is read as `full`; it changes memory and speed, not results.
    """
    model = data.get("model")
    if isinstance(model, Mapping) and model.get("remat") == "dots":
        data = {**data, "model": {**model, "remat": "full"}}
    return parse_config(data, Origins(source))


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of nested mappings."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def dump_config(config: RunConfig) -> str:
    """Return the resolved run as YAML."""
    return yaml_text(to_dict(config))
