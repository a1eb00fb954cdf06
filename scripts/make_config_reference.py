#!/usr/bin/env python
"""Print the pages of all keys, docs/configuration.md or docs/study_keys.md, from dataclasses and their docstrings.

    python scripts/make_config_reference.py run > docs/configuration.md
    python scripts/make_config_reference.py study > docs/study_keys.md

tests/test_docs.py checks that the files are up to date.
"""

import ast
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from umbrella_jax.cli.options import _FLAGS, _SHORT
from umbrella_jax.config import schema
from umbrella_jax.config.ranges import Range, range_of
from umbrella_jax.study.schema import StudyConfig

RUN_HEAD = """# Configuration of a run

<!-- Made by scripts/make_config_reference.py from umbrella_jax/config/schema.py; edit the docstrings there. -->

A run is configured by one YAML file; [configs/](../configs) has full-size examples. Only `model.modalities` is
required; every other key has the default below. Set any key on the command line with `--set KEY=VALUE` and a value in
YAML, such as `--set train.clip_norm=0.5` or `--set model.modalities.T1.mode=pad`. Common keys also have a flag. Both
override the file. Unknown keys, values of the wrong type and impossible combinations are reported together before
anything is read. The `config.yaml` in a run's directory has every key with its value.
"""
STUDY_HEAD = """# Every key of a study file

<!-- Made by scripts/make_config_reference.py from umbrella_jax/study/schema.py; edit the docstrings there. -->

[study.md](study.md) explains how a study is put together, and [cohorts.md](cohorts.md) has files to start from.
`subjects`, `scans` and `tasks` are required. Unknown keys, values of the wrong type and contradictions are reported
together.
"""
PAGES = {"run": (RUN_HEAD, schema.RunConfig), "study": (STUDY_HEAD, StudyConfig)}
"""{name: (head of its page, the config)}."""
PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}
TYPES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}


def sections(cls: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, dataclass) of a config and of its sections, in the order of the fields."""
    yield key, cls
    for name, kind in fields(cls).items():
        path = f"{key}.{name}" if key else name
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            yield from sections(kind, path)
        elif origin is dict and dataclasses.is_dataclass(parts[1]):
            yield from sections(parts[1], f"{path}.NAME")
        elif origin is tuple and dataclasses.is_dataclass(parts[0]):
            yield from sections(parts[0], path)


def keys_of_sections(cls: Any) -> dict[Any, list[str]]:
    """Return {dataclass: keys of a config that are such a section}; those of a cohort of its own are left out."""
    keys: dict[Any, list[str]] = {}
    for key, section in sections(cls):
        if not key.startswith("external.NAME."):  # the same as at the top
            keys.setdefault(section, []).append(key)
    return keys


def fields(cls: Any) -> dict[str, Any]:
    """Return {name: type}; the type of an optional section is the section."""
    hints = typing.get_type_hints(cls)
    return {
        name: next((part for part in typing.get_args(kind) if dataclasses.is_dataclass(part)), kind)
        if isinstance(kind, types.UnionType)
        else kind
        for name, kind in hints.items()
    }


def docstrings(cls: Any) -> dict[str, str]:
    """Return {field: the string below it}, of the class and those that it extends."""
    above = [docstrings(base) for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    return {name: text for inherited in above for name, text in inherited.items()} | own_docstrings(cls)


def own_docstrings(cls: Any) -> dict[str, str]:
    """Return {field: the string below it} of one class."""
    (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def type_name(kind: Any) -> str:
    """Return a type in words, as its values are written in YAML."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return "section"
    if origin is typing.Annotated:
        text, allowed = type_name(parts[0]), range_of(kind)
        if typing.get_origin(parts[0]) is tuple and typing.get_args(parts[0])[-1] is ...:
            text = f"text, or {text}"
        if allowed in (None, Range()):
            return text
        # "a positive number" needs no "number" before it
        return str(allowed).removeprefix("a ") if "number" in str(allowed) else f"{text}, {allowed}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts if part is not type(None))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin is tuple:
        count = "" if parts[-1] is ... else f"{len(parts)} "
        item = parts[0] if typing.get_origin(parts[0]) is not typing.Annotated else typing.get_args(parts[0])[0]
        items = "sections" if dataclasses.is_dataclass(item) else PLURALS.get(item) or type_name(item)
        return f"list of {count}{items}"
    if origin is dict:
        return f"{{text: {type_name(parts[1])}}}"
    return TYPES[kind]


def default(field: "dataclasses.Field[Any]") -> str:
    """Return the default of a field in YAML."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{name}: {{}}' for name in value)}}}`"
    if value in (None, ""):
        return "–"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def reference(head: str, config: Any) -> str:
    """Return a page. Raises ValueError for a field without a docstring."""
    lines, flag = [head], {}
    for name, (_, key, *_) in _FLAGS.items() if config is schema.RunConfig else ():
        flag[key] = f"`{name}`" + (f", short `{_SHORT[name]}`" if name in _SHORT else "")
    for cls, keys in keys_of_sections(config).items():
        key = keys[0]
        documented, hints = docstrings(cls), typing.get_type_hints(cls, include_extras=True)
        rows = []
        for field in dataclasses.fields(cls):
            path = f"{key}.{field.name}" if key else field.name
            kind = hints[field.name]
            if dataclasses.is_dataclass(kind):
                continue
            if field.name not in documented:
                raise ValueError(f"{cls.__name__}.{field.name}: no docstring below it")
            meaning = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", documented[field.name])
            meaning += f" Flag: {flag[path]}." if path in flag else ""
            origin, parts = typing.get_origin(kind), typing.get_args(kind)
            kind_name = (
                f"sections `{path}.NAME`" if origin is dict and dataclasses.is_dataclass(parts[1]) else type_name(kind)
            )
            rows.append(f"| `{field.name}` | {kind_name} | {default(field)} | {meaning.replace('|', chr(92) + '|')} |")
        paragraphs = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", inspect.cleandoc(cls.__doc__ or ""))
        paragraphs += f" Flag: {flag[key]}." if key in flag else ""
        title = ", ".join(f"`{key}`" for key in keys) if key else "Top level"
        lines += [f"## {title}", "", paragraphs, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(*PAGES[sys.argv[1]]), end="")
