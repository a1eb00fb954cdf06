"""Text, JSON and YAML from outside: within limits, and refused by name beyond them.

A file is never read further than its limit, nor text parsed deeper than a few levels, so that neither memory nor the
interpreter's stack is at the mercy of whoever wrote it. What comes out is text, numbers, lists and mappings alone.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umbrella_jax.errors import ConfigError, UmbrellaError

DESCRIPTION = 16 << 20
"""Bytes of a JSON file that describes something: config.json has some KB, the index of a thousand shards some MB."""
LISTING = 256 << 20
"""Bytes of a JSON file or table that lists: 250,000 conversations of 1 KB. Parsed, JSON takes up to twenty times its
bytes, so one of 1 GB would take the machine's memory; lines of a .jsonl have no such sum."""
LINE = 16 << 20
"""Characters of one line of a .jsonl: thousands of times a conversation that a model could read."""
YAML = 256 << 10
"""Bytes of a YAML file, a hundred times the longest in configs/; its parser takes seconds for each MB."""
YAML_DEPTH = 20
"""Levels of a YAML file: configs have six."""
YAML_VALUES = 10_000
"""Values of a YAML file with its aliases written out: nine aliases of nine aliases, and so on, are soon 10⁹."""
_WHERE = re.compile(r"(.*) at line (\d+) column (\d+)", re.DOTALL)


def read_text(path: str | Path, error: type[UmbrellaError], limit: int, remedy: str) -> str:
    """A whole file of UTF-8, with or without a byte order mark. Raises `error` with the `remedy` where it cannot be
    read, is longer than `limit` bytes or is no text."""
    try:
        with open(path, "rb") as file:
            size, content = os.fstat(file.fileno()).st_size, bytearray()
            # of a pipe, the size says nothing
            while max(size, len(content)) <= limit and (piece := file.read(1 << 20)):
                content += piece
        if max(size, len(content)) <= limit:
            return content.decode("utf-8-sig")
    except (OSError, ValueError) as fault:  # no text, or a name that none can have
        raise error(f"{path}: cannot be read: {_reason(fault)}; {remedy}") from None
    raise error(f"{path}: larger than {limit / 2**20:g} MB; {remedy}")


def read_lines(path: str | Path, error: type[UmbrellaError], remedy: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file of any length, one in memory at a time; raises as `read_text`, of a line of
    more than LINE characters too."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            # not by splitlines(), which would also cut at U+2028 inside a string
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), ""), start=1):
                if len(line) > LINE:
                    raise error(f"{path}:{number}: a line of more than {LINE / 2**20:g} M characters; {remedy}")
                yield number, line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{path}: cannot be read: {_reason(fault)}; {remedy}") from None


def sha256(path: str | Path) -> str:
    """Of a file's content, which is read a piece at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(fault: Exception) -> str:
    return (fault.strerror if isinstance(fault, OSError) else None) or str(fault)


def read_json(path: str | Path, error: type[UmbrellaError], remedy: str, limit: int = DESCRIPTION) -> Any:
    """What a JSON file holds. Raises `error` with the `remedy` as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, error, limit, remedy), path, error, remedy)


def parse_json(text: str, path: str | Path, error: type[UmbrellaError], remedy: str, line: int = 1) -> Any:
    """What JSON that begins at a `line` of `path` holds.

    Raises `error` for what is none, nests deeper than 200 levels, or has half of a surrogate pair or a number of more
    than 4300 digits, which no later text could be written with. NaN and Infinity are taken, as pandas writes them.
    """
    from pydantic_core import from_json  # here, so that models import without it

    # Not by json: it goes as deep as the interpreter's stack, whatever is left of it.
    try:
        return from_json(text)
    except ValueError as fault:
        message, row, column = m.groups() if (m := _WHERE.fullmatch(str(fault))) else (str(fault), "1", "?")
        place = f"{path}:{line + int(row) - 1}"
        raise error(f"{place}: not valid JSON: {message} (column {column}); {remedy}") from None


def read_yaml(path: str | Path, remedy: str = "expected a YAML file") -> Any:
    """What a YAML (or JSON) file holds, plain values alone. Raises ConfigError as `parse_yaml`, and with the `remedy`
    where it is missing or too long."""
    return parse_yaml(read_text(path, ConfigError, YAML, remedy), str(path))


def parse_yaml(text: str, place: str) -> Any:
    """What YAML 1.2 holds: `5e-5` is a number, `no` a word. Raises ConfigError naming `place` for what is none, a key
    that is given twice, tags (`!`, which ask for types of their own), and nesting or aliases without measure."""
    from ruamel.yaml import YAML

    try:
        _check_plain(text)
        return YAML(typ="safe", pure=True).load(text)
    except Exception as fault:  # its scanner, and the constructors of dates and numbers, raise nearly anything
        raise ConfigError(f"{place}: not valid YAML: {fault}") from None


def _check_plain(text: str) -> None:
    """Raises ValueError for YAML that holds more than plain values, going by its events, which make none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

    count, opened = 0, list[tuple[str | None, int]]()
    sizes: dict[str, int] = {}  # of an anchor, values with its own
    for event in YAML(typ="safe", pure=True).parse(text):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        if not isinstance(event, NodeEvent):
            continue
        alias = isinstance(event, AliasEvent)
        count += sizes.get(event.anchor, YAML_VALUES) if alias else 1  # within itself an anchor has no end, and no size
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{line}: a tag, {event.tag}; expected plain values")
        if isinstance(event, CollectionStartEvent):
            opened.append((event.anchor, count - 1))
        elif not alias and event.anchor is not None:
            sizes[event.anchor] = 1
        if len(opened) > YAML_DEPTH:
            raise ValueError(f"{line}: nests deeper than {YAML_DEPTH} levels")
        if count > YAML_VALUES:
            raise ValueError(f"{line}: more than {YAML_VALUES} values, those behind aliases counted each time")
