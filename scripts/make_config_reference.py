#!/usr/bin/env python
"""Print docs/configuration.md from the dataclasses in umbrella_jax/config/schema.py and their docstrings.

    python scripts/make_config_reference.py > docs/configuration.md

tests/test_docs.py checks that the file is up to date.
"""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from umbrella_jax.cli.options import _FLAGS, _SHORT
from umbrella_jax.config import schema
from umbrella_jax.config.ranges import Range, range_of

HEAD = """# Configuration of a run

<!-- Made by scripts/make_config_reference.py from umbrella_jax/config/schema.py; edit the docstrings there. -->

A run is configured by one YAML file; [configs/](../configs) has full-size examples. Only `model.modalities` is
required; every other key has the default below. Set any key on the command line with `--set KEY=VALUE` and a value in
YAML, such as `--set train.clip_norm=0.5` or `--set model.modalities.T1.mode=pad`. Common keys also have a flag. Both
override the file. Unknown keys, values of the wrong type and impossible combinations are reported together before
anything is read. The `config.yaml` in a run's directory has every key with its value.
"""
PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}
TYPES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}


def sections(cls: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, dataclass) of a config and of its sections, in the order of the fields."""
    yield key, cls
    for name, kind in fields(cls).items():
        path = f"{key}.{name}" if key else name
        if dataclasses.is_dataclass(kind):
            yield from sections(kind, path)
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            yield from sections(typing.get_args(kind)[1], f"{path}.NAME")


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
    """Return {field: the string below it}."""
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
        return f"list of {count}{PLURALS.get(parts[0]) or type_name(parts[0])}"
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
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def reference() -> str:
    """Return the page. Raises ValueError for a field without a docstring."""
    lines, flag = [HEAD], {}
    for name, (_, key, *_) in _FLAGS.items():
        flag[key] = f"`{name}`" + (f", short `{_SHORT[name]}`" if name in _SHORT else "")
    for key, cls in sections(schema.RunConfig):
        documented, hints = docstrings(cls), typing.get_type_hints(cls, include_extras=True)
        rows = []
        for field in dataclasses.fields(cls):
            path = f"{key}.{field.name}" if key else field.name
            kind = hints[field.name]
            is_mapping = typing.get_origin(kind) is dict
            if dataclasses.is_dataclass(kind):
                continue
            if field.name not in documented:
                raise ValueError(f"{cls.__name__}.{field.name}: no docstring below it")
            meaning = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", documented[field.name])
            meaning += f" Flag: {flag[path]}." if path in flag else ""
            kind_name = f"sections `{path}.NAME`" if is_mapping else type_name(kind)
            rows.append(f"| `{field.name}` | {kind_name} | {default(field)} | {meaning.replace('|', chr(92) + '|')} |")
        paragraphs = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", inspect.cleandoc(cls.__doc__ or ""))
        paragraphs += f" Flag: {flag[key]}." if key in flag else ""
        lines += [f"## {f'`{key}`' if key else 'Top level'}", "", paragraphs, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
