"""Read text, JSON and YAML that others wrote, within limits of size and depth.

No file is read beyond its limit, and nothing is parsed deeper than its limit of levels, so that a hostile file cannot
exhaust memory or the interpreter's stack. Parsed values are text, finite numbers, booleans, null, lists and mappings.
"""

import codecs
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TextIO

from umbrella_jax.errors import ConfigError, UmbrellaError, is_out_of_memory

DESCRIPTION = 16 << 20
"""Bytes of a descriptive JSON file. A config.json has a few KB, the index of a thousand shards a few MB."""
LISTING = 256 << 20
"""Bytes of a table or of a run's record of its inputs. Parsed JSON takes up to twenty times its bytes, so 1 GB
would exhaust the machine's memory."""
LINE = 16 << 20
"""Characters of one line of a .jsonl or one item of a JSON list, thousands of times as many as a model could read."""
_QUOTED = 200
"""Characters of a value that a message quotes."""
DEPTH = 200
"""Levels of nesting in JSON."""
YAML = 256 << 10
"""Bytes of a YAML file, a hundred times the longest one in configs/. The parser takes seconds per MB."""
YAML_DEPTH = 20
"""Levels of nesting in a YAML file; configurations have six."""
YAML_VALUES = 10_000
"""Values in a YAML file with aliases expanded. Nine aliases of nine aliases, and so on, soon make 10⁹."""
_WHERE = re.compile(r"(.*) at line (\d+) column (\d+)", re.DOTALL)


_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = b"/annex/objects/"
_LFS_REMEDY = "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
_ANNEX_REMEDY = "a git-annex pointer, not the file itself; run `datalad get` (or `git annex get`) on it"


def describe_pointer(path: str | Path) -> str | None:
    """Return a message with a remedy if a file is a pointer of Git LFS or git-annex; None for any other file."""
    try:
        if os.path.islink(path) and not os.path.exists(path):
            return _ANNEX_REMEDY if _ANNEX.decode() in os.readlink(path) else None
        if not os.path.isfile(path) or os.path.getsize(path) > 1024:
            return None
        with open(path, "rb") as file:
            return _pointer(file.read(len(_LFS)))
    except (OSError, ValueError):  # the caller reports why the file cannot be read
        return None


def _pointer(content: bytes) -> str | None:
    if content.startswith(_LFS):
        return _LFS_REMEDY
    return _ANNEX_REMEDY if content.startswith(_ANNEX) else None


def regular_file(path: str, flags: int) -> int:
    """Open a regular file, as an `opener` of `open`.

    Raises OSError for a directory, pipe or device: opening a pipe without a writer would block, and a device has no
    end.
    """
    file = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "a directory, pipe or device; expected a file", path)
    return file


JSON_KINDS = {str: "a string", list: "a list", dict: "an object", type(None): "nothing"}


def kind(value: Any) -> str:
    """Return the name of a JSON value's kind, for messages; a number is returned as text."""
    return JSON_KINDS[type(value)] if type(value) in JSON_KINDS else repr(value)


def quoted(value: Any) -> str:
    """Return a value for messages, cut to a length. Lists and objects are only named, since they may hold anything."""
    text = kind(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]} …"


def read_text(path: str | Path, error: type[UmbrellaError], limit: int, remedy: str) -> str:
    """Read a whole UTF-8 file, without its byte order mark.

    Raises `error` as `read_content` does, and for a file that is not UTF-8.
    """
    try:
        return read_content(path, error, limit, remedy).decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{path}: {_reason(fault)}; {remedy}") from None


def read_content(path: str | Path, error: type[UmbrellaError], limit: int, remedy: str) -> bytes:
    """Read a whole file.

    Raises `error`, with the `remedy`, if the file cannot be read, has more than `limit` bytes or is a pointer.
    """
    try:
        with open(path, "rb", opener=regular_file) as file:
            size, content = os.fstat(file.fileno()).st_size, bytearray()
            # check the bytes read as well, since files in /proc report no size
            while max(size, len(content)) <= limit and (piece := file.read(1 << 20)):
                content += piece
    except (OSError, ValueError) as fault:  # not found, say, or an impossible file name
        raise error(f"{path}: {_reason(fault)}; {remedy}") from None
    if pointer := _pointer(bytes(content[: len(_LFS)])):
        raise error(f"{path}: {pointer}")
    if max(size, len(content)) > limit:
        raise error(f"{path}: larger than {limit / 2**20:g} MB; {remedy}")
    return bytes(content)


def read_lines(path: str | Path, error: type[UmbrellaError], remedy: str) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a text file of any length, with one line in memory at a time.

    Raises as `read_text` does, and for a line of more than LINE characters.
    """
    try:
        with open(path, encoding="utf-8-sig", opener=regular_file) as file:
            # not with splitlines(), which would also split at U+2028 inside a string
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), ""), start=1):
                if len(line) > LINE:
                    raise error(f"{path}:{number}: a line of more than {LINE / 2**20:g} M characters; {remedy}")
                yield number, line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{path}: {_reason(fault)}; {remedy}") from None


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, read a piece at a time."""
    with open(path, "rb", opener=regular_file) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(fault: Exception) -> str:
    """Return why a file cannot be read."""
    if isinstance(fault, FileNotFoundError):
        link = os.path.islink(fault.filename)
        return f"a link to {os.readlink(fault.filename)}, which does not exist" if link else "not found"
    reason = (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
    if isinstance(fault, UnicodeDecodeError):
        reason = f"byte {fault.object[fault.start]:#04x} is not UTF-8, as in a Windows-1252 text; save it as UTF-8"
        if bytes(fault.object[:2]) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in fault.object[:1000]:
            reason = "it is UTF-16; save it as UTF-8"
    return f"cannot be read: {reason}"


def read_json(
    path: str | Path, error: type[UmbrellaError], remedy: str, limit: int = DESCRIPTION, *, nan_is_null: bool = False
) -> Any:
    """Read the value of a JSON file. Raise `error`, with the `remedy`, as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, error, limit, remedy), path, error, remedy, nan_is_null=nan_is_null)


def parse_json(
    text: str, path: str | Path, error: type[UmbrellaError], remedy: str, line: int = 1, *, nan_is_null: bool = False
) -> Any:
    """Parse JSON strictly.

    Args:
        text: JSON.
        path: the file it comes from, for messages.
        error: class of the error to raise.
        remedy: ends each message.
        line: line of the file at which `text` begins.
        nan_is_null: read NaN, which pandas writes, as null; otherwise NaN is an error.

    Raises:
        error: names the line of text that is not JSON, of a key given twice in an object, of more than DEPTH levels, of
            half a surrogate pair, of a number with more than 4300 digits or beyond a float's range, or of Infinity.
    """
    if not text.strip():
        raise error(f"{path}: empty; {remedy}")
    try:
        value = _DECODERS[nan_is_null].decode(text)
        _check_strict(text)
        return value
    except (ValueError, RecursionError) as fault:
        place, message = _json_fault(fault, text, 0, line, 0)
        raise error(f"{path}:{place[0]}: not valid JSON: {message} (column {place[1]}); {remedy}") from None


def read_items(
    path: str | Path, error: type[UmbrellaError], remedy: str, *, nan_is_null: bool = False
) -> Iterator[tuple[int | None, Any]]:
    """Yield (index, item) of a JSON list of any length, with one item in memory at a time.

    If the file holds another value, yield (None, value). JSON Lines are an error that names the format. Raises as
    `read_lines` and `parse_json` do.
    """
    try:
        with open(path, encoding="utf-8-sig", opener=regular_file) as file:
            yield from _Items(file, path, error, remedy, nan_is_null).items()
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{path}: {_reason(fault)}; {remedy}") from None


class _Items:
    """Reads values from JSON text, a piece at a time. `text[at:]` is the part that was read but not yet consumed."""

    def __init__(
        self, file: TextIO, path: str | Path, error: type[UmbrellaError], remedy: str, nan_is_null: bool
    ) -> None:
        self.file, self.path, self.error, self.remedy = file, path, error, remedy
        self.decoder = _DECODERS[nan_is_null]
        self.text, self.at = "", 0
        self.line, self.before = 1, 0  # the line in which `text` begins, and the characters before it in that line

    def items(self) -> Iterator[tuple[int | None, Any]]:
        """Yield the items of `read_items`."""
        if self.next() != "[":
            yield None, self.value()
            if self.next() == "{":
                name = f"{Path(self.path).stem}.jsonl"
                raise self.error(
                    f"{self.path}:{self.line_at()}: a second object after the first, as in JSON Lines; if each line "
                    f"holds one, rename the file to {name}, otherwise make them a list"
                )
        else:
            self.at += 1
            index = 0
            while index or self.next() != "]":  # after a comma, an item must follow
                yield index, self.value()
                index += 1
                if self.next() == "]":
                    break
                if self.next() != ",":
                    self.refuse(json.JSONDecodeError("Expecting ',' delimiter", self.text, self.at))
                self.at += 1
            self.at += 1
        if self.next():
            self.refuse(json.JSONDecodeError("Extra data", self.text, self.at))

    def next(self) -> str:
        """Skip white space. Return the next character without consuming it; "" at the end of the file."""
        while True:
            while self.text[self.at : self.at + 1] in tuple(" \t\n\r"):
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def line_at(self) -> int:
        """Return the line of `text[at]`."""
        return self.line + self.text.count("\n", 0, self.at)

    def more(self) -> bool:
        """Drop the consumed text and read on: as much again as is left, at least a piece. Return whether there was
        more."""
        piece = self.file.read(max(_PIECE, len(self.text) - self.at))
        if piece:
            newline = self.text.rfind("\n", 0, self.at)
            self.before = self.at - newline - 1 if newline >= 0 else self.before + self.at
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def value(self) -> Any:
        """Consume and return the next value."""
        self.next()
        while True:
            fault: Exception | None = None
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (_RefusedError, RecursionError) as error:
                self.refuse(error)
            except ValueError as error:
                if isinstance(error, json.JSONDecodeError) and _is_final(error):
                    self.refuse(error)
                fault, end = error, len(self.text)
            if end == len(self.text):  # the value may continue beyond the text that was read
                if end - self.at > LINE:
                    message = f"Longer than {LINE / 2**20:g} M characters, which is no conversation"
                    self.refuse(json.JSONDecodeError(message, self.text, self.at))
                if self.more():
                    continue
                if fault:
                    self.refuse(fault)
            try:
                _check_strict(self.text[self.at : end])
            except ValueError as error:
                self.refuse(error)
            self.at = end
            return value

    def refuse(self, fault: Exception) -> NoReturn:
        """Raise the error for a fault of the next value."""
        (line, column), message = _json_fault(fault, self.text, self.at, self.line, self.before)
        raise self.error(f"{self.path}:{line}: not valid JSON: {message} (column {column}); {self.remedy}") from None


class _RefusedError(ValueError):
    """A value that Python's JSON reader accepts and we do not: the number as written, or "" for a key given twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise _RefusedError("")
    return mapping


def _refuse_constant(text: str) -> NoReturn:
    raise _RefusedError(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _RefusedError(text)
    return value


def _decoder(constant: Callable[[str], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=constant)


_DECODERS = {
    False: _decoder(_refuse_constant),
    True: _decoder(lambda text: None if text == "NaN" else _refuse_constant(text)),
}
"""{whether NaN is null: decoder}."""
_PIECE = 1 << 20
_STRING = r'"(?P<string>[^"\\]*(?:\\.[^"\\]*)*)"\s*(?P<colon>:)?'
_TOKEN = re.compile(_STRING + r"|[{}]|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|NaN|-?Infinity", re.DOTALL)


def _check_strict(text: str) -> None:
    """Raise ValueError for deep nesting, and for half of a surrogate pair, which cannot be written as UTF-8.

    Python's JSON reader accepts both.
    """
    if "\\u" in text or text.count("[") + text.count("{") > DEPTH:
        from pydantic_core import from_json  # imported here, so that models import without it

        from_json(text)


def _is_final(fault: json.JSONDecodeError) -> bool:
    """Return whether the fault would remain if more text followed."""
    return not fault.msg.startswith("Unterminated string") and fault.pos + len("-Infinity") < len(fault.doc)


def _json_fault(fault: Exception, text: str, at: int, line: int, before: int) -> tuple[tuple[int, int], str]:
    """Return ((line, column), message) for a fault of the value that begins at `text[at]`.

    Args:
        line: line of `text[0]` in the file.
        before: number of characters before `text[0]` in that line.
    """
    message, position, rows, columns = str(fault), at, 0, 0
    if isinstance(fault, json.JSONDecodeError):
        message, position = fault.msg, fault.pos
    elif isinstance(fault, _RefusedError):
        message, position = _find_refused(str(fault), text, at)
    else:
        from pydantic_core import from_json

        try:
            from_json(text[at:])
        except ValueError as strict:
            if match := _WHERE.fullmatch(str(strict)):
                message, rows, columns = match[1], int(match[2]) - 1, int(match[3]) - 1
                message = message.replace("recursion limit exceeded", f"nests deeper than {DEPTH} levels")
    newline = text.rfind("\n", 0, position)
    column = (position - newline if newline >= 0 else before + position + 1) if not rows else 1
    return (line + text.count("\n", 0, position) + rows, column + columns), message


def _find_refused(number: str, text: str, at: int) -> tuple[str, int]:
    """Return (message, position) of a `_RefusedError` with this `number`, for the value that begins at `text[at]`."""
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(text, at):
        if token[0] == "{":
            keys.append(set())
        elif token[0] == "}":
            keys.pop()
        elif number and token[0] == number:
            return f"{number} is not a JSON number; write null, or a finite number", token.start()
        elif not number and token["colon"]:
            key = json.loads(f'"{token["string"]}"')
            if key in keys[-1]:
                return f'the key "{token["string"]}" is given twice in one object', token.start()
            keys[-1].add(key)
    raise AssertionError("no value to refuse")


def read_yaml(path: str | Path, remedy: str = "expected a YAML file") -> Any:
    """Read the plain values of a YAML (or JSON) file.

    Raises ConfigError as `parse_yaml` does, and with the `remedy` if the file is missing or too long.
    """
    return parse_yaml(read_text(path, ConfigError, YAML, remedy), str(path))


def parse_yaml(text: str, place: str) -> Any:
    """Parse YAML 1.2, in which `5e-5` is a number and `no` is a word.

    Raises ConfigError naming `place` for text that is not YAML, a key given twice, a tag (`!`, which asks for a type of
    its own), and nesting or aliases beyond the limits.
    """
    try:
        return deepcopy(_plain_yaml(text))
    except Exception as fault:  # the scanner, and the constructors of dates and numbers, raise nearly anything
        if is_out_of_memory(fault):
            raise
        raise ConfigError(f"{place}: not valid YAML: {_yaml_reason(fault)}") from None


@lru_cache(maxsize=64)
def _plain_yaml(text: str) -> Any:
    """Parse YAML. Results are kept: a run's config takes 30 ms, and commands read it several times."""
    from ruamel.yaml import YAML

    _check_plain(text)
    return YAML(typ="safe", pure=True).load(text)


def _yaml_reason(fault: Exception) -> str:
    """Return the line and the reason of a fault, without any text of the file, which may hold secret keys."""
    reason, mark = getattr(fault, "problem", None), getattr(fault, "problem_mark", None)
    if isinstance(reason, str) and mark is not None:
        reason = reason.partition('" with value "')[0]  # drops the value of a duplicate key
        return f"line {mark.line + 1}: {reason}" + '"' * (reason.count('"') % 2)
    if isinstance(fault, ValueError) and type(fault) is ValueError:
        return re.sub(r"""'[^']*'|"[^"]*\"""", "…", str(fault))
    return next(iter(str(fault).splitlines()), type(fault).__name__)


def _check_plain(text: str) -> None:
    """Raise ValueError for YAML with more than plain values. Its events are enough for that, and make no objects."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

    count, opened = 0, list[tuple[str | None, int]]()
    sizes: dict[str, int] = {}  # {anchor: number of its values, nested ones included}
    for event in YAML(typ="safe", pure=True).parse(text):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        if not isinstance(event, NodeEvent):
            continue
        alias = isinstance(event, AliasEvent)
        # an alias inside its own anchor would be endless, so it counts as too many
        count += sizes.get(event.anchor, YAML_VALUES) if alias else 1
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{line}: a tag, {event.tag}; expected plain values")
        if isinstance(event, CollectionStartEvent):
            opened.append((event.anchor, count - 1))
        elif not alias and event.anchor is not None:
            sizes[event.anchor] = 1
        if len(opened) > YAML_DEPTH:
            raise ValueError(f"{line}: nests deeper than {YAML_DEPTH} levels")
        if count > YAML_VALUES:
            raise ValueError(f"{line}: more than {YAML_VALUES} values, with aliases expanded")
