"""Answers in JSON: the fields of a JSON schema, and their values in an answer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.io.reading import kind, parse_json, read_json

_REMEDY = "docs/answers.md has an example"


@dataclass(frozen=True)
class AnswerSchema:
    """A JSON schema of an object."""

    file: str
    text: str
    """The schema, as JSON."""
    fields: Mapping[str, bool]
    """{field: whether it is a number}; fields of nested objects are named `OUTER.INNER`."""

    @property
    def content(self) -> dict[str, Any]:
        """The schema as a mapping."""
        content: dict[str, Any] = json.loads(self.text)
        return content


def read_schema(path: str | Path) -> AnswerSchema:
    """Read a JSON schema. Raises ConfigError if it is no JSON, or not of an object with properties."""
    content = read_json(path, ConfigError, _REMEDY)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object, got {kind(content)}; {_REMEDY}")
    fields = dict(_fields(content, content, (), 0))
    if _resolved(content, content).get("type") != "object" or not fields:
        raise ConfigError(f'{path}: expected "type": "object" and at least one property; {_REMEDY}')
    return AnswerSchema(str(path), json.dumps(content), fields)


def parse_answer_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object of an answer, None if it is none."""
    try:
        value = parse_json(text, "answer", DataError, "")
    except DataError:
        return None
    return value if isinstance(value, dict) else None


def canonical(text: str) -> str | None:
    """Return a JSON object written in one way: sorted keys, no white space, 1 for 1.0; None if it is none."""
    value = parse_answer_object(text)
    return None if value is None else _written(value)


def _written(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fields(
    schema: Mapping[str, Any], root: Mapping[str, Any], names: tuple[str, ...], depth: int
) -> Iterator[tuple[str, bool]]:
    schema = _resolved(schema, root)
    properties = schema.get("properties")
    if isinstance(properties, dict) and properties and depth < 16:  # a schema may contain itself
        for name, inner in properties.items():
            yield from _fields(inner if isinstance(inner, dict) else {}, root, (*names, name), depth + 1)
    elif names:
        yield ".".join(names), _is_numeric(schema)


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    reference, target = schema.get("$ref"), root
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    for key in reference[2:].split("/"):
        target = target.get(key, {}) if isinstance(target, dict) else {}
    return target if isinstance(target, dict) else {}


def _is_numeric(schema: Mapping[str, Any]) -> bool:
    """Return whether a field is a quantity: a number that is not one of a listed few, null aside."""
    if "enum" in schema or "const" in schema:
        return False
    options = schema.get("anyOf", [schema])
    types = [
        name
        for option in options
        if isinstance(option, dict)
        for name in (option["type"] if isinstance(option.get("type"), list) else [option.get("type")])
        if name != "null"
    ]
    return bool(types) and set(types) <= {"number", "integer"}


def field_text(answer: Mapping[str, Any] | None, field: str) -> str | None:
    """Return a field of an answer as JSON, written in one way; None if the answer lacks it."""
    value = _inner(answer, field)
    return None if value is None else _written(value[0])


def field_number(answer: Mapping[str, Any] | None, field: str) -> float | None:
    """Return the number in a field of an answer; None if it lacks one."""
    value = _inner(answer, field)
    if value is None or isinstance(value[0], bool) or not isinstance(value[0], int | float):
        return None
    return float(value[0])


def _inner(answer: Mapping[str, Any] | None, field: str) -> tuple[Any] | None:
    inner: Any = answer
    for name in field.split("."):
        if not isinstance(inner, dict) or name not in inner:
            return None
        inner = inner[name]
    return (inner,)
