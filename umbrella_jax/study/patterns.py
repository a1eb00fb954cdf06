"""Find files by a path with placeholders, such as `{subject}/T1/{subject}_20252_{visit}_0.nii.gz`."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from umbrella_jax.console import plural
from umbrella_jax.errors import ConfigError, DataError

_SHOWN = 3
"""Paths that a message shows."""


class _Part(NamedTuple):
    """A piece of one folder's or file's name in a pattern."""

    kind: str
    """`text`, `any` for `*`, or `name` for a placeholder."""
    text: str


Names = Mapping[str, str]
"""{placeholder: its text}."""


def find_matches(pattern: str, root: Path, is_known: Callable[[Names], bool]) -> dict[str, Names]:
    """Return the files that a pattern matches, sorted, each with the texts of the pattern's names.

    A name in braces matches any text without a slash, at least one character, and the same text wherever it is
    repeated. `*` matches any text without a slash. Folders whose names start with a dot are not searched unless the
    pattern's do.

    Args:
        pattern: the path; relative to `root`, or absolute.
        root: folder.
        is_known: returns whether a subject is known; it decides if a path can be read in several ways, such as
            `002_S_0413_bl` for `{subject}_{visit}`.

    Raises:
        ConfigError: a faulty pattern.
        DataError: nothing matches, or a path can be read in several ways.
    """
    segments = [segment for segment in pattern.split("/") if segment not in ("", ".")]
    parts = [_parse(pattern, segment) for segment in segments]
    if not segments:
        raise ConfigError(f"{pattern!r}: expected a path, such as {{subject}}/T1.nii.gz")
    matches: list[tuple[str, Names]] = [("/" if pattern.startswith("/") else str(root), {})]
    for number, (segment, segment_parts) in enumerate(zip(segments, parts, strict=True)):
        last = number == len(segments) - 1
        longer = [match for folder, names in matches for match in _step(folder, names, segment_parts, last)]
        if not longer:
            raise DataError(_nothing_matches(pattern, segment, [folder for folder, _ in matches], root))
        matches = longer
    readings: dict[str, list[Names]] = {}
    for path, names in sorted(matches, key=lambda match: (match[0], *match[1].items())):
        readings.setdefault(path, []).append(names)
    ambiguous = []
    for path, ways in readings.items():
        if len(ways) > 1 and not os.path.basename(path).startswith("."):
            known = [names for names in ways if is_known(names)]
            if len(known) == 1:
                readings[path] = known
            else:
                shown = (", ".join(f"{name}={text}" for name, text in names.items()) for names in (known or ways)[:2])
                ambiguous.append(f"{os.path.relpath(path, root)} ({' or '.join(shown)})")
    if ambiguous:
        more = f"; and {plural(len(ambiguous) - _SHOWN, 'other')}" if len(ambiguous) > _SHOWN else ""
        raise DataError(
            f"{pattern}: matches in several ways: {'; '.join(ambiguous[:_SHOWN])}{more}; write the text around the "
            "names more exactly, or * for what needs no name"
        )
    return {path: ways[0] for path, ways in readings.items()}


def names_in(pattern: str) -> list[str]:
    """Return the distinct names in braces, in order."""
    return list(dict.fromkeys(re.findall(r"\{([^{}/]+)\}", pattern)))


def _parse(pattern: str, segment: str) -> list[_Part]:
    if "**" in segment:
        raise ConfigError(f"{pattern}: {segment}: ** is not supported; write one * for each folder")
    parts = []
    for match in re.finditer(r"\{([^{}]+)\}|(\*)|([^{}*]+)|(.)", segment):
        name, star, text, stray = match.groups()
        if stray:
            raise ConfigError(f"{pattern}: {segment}: expected names in braces, such as {{subject}}")
        parts.append(_Part("name", name) if name else _Part("any", "") if star else _Part("text", text))
    return parts


def _step(folder: str, names: Names, parts: Sequence[_Part], last: bool) -> Iterator[tuple[str, Names]]:
    """Yield what one segment of a pattern matches in a folder, once for each way to read it."""
    parts = [_Part("text", names[p.text]) if p.kind == "name" and p.text in names else p for p in parts]
    if all(part.kind == "text" for part in parts):
        path = os.path.join(folder, "".join(part.text for part in parts))
        if os.path.lexists(path) if last else os.path.isdir(path):
            yield path, names
        return
    shows_hidden = last or (parts[0].kind == "text" and parts[0].text.startswith("."))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and not shows_hidden:
                continue
            readings = _readings(parts, entry.name)
            if readings and (last or entry.is_dir()):
                yield from ((entry.path, {**names, **dict(reading)}) for reading in readings)


def _readings(parts: Sequence[_Part], text: str) -> set[tuple[tuple[str, str], ...]]:
    """Return every way to read a text, each as (name, its text) of all names in the parts."""
    states: set[tuple[int, tuple[tuple[str, str], ...]]] = {(0, ())}
    for number, part in enumerate(parts):
        after = parts[number + 1] if number + 1 < len(parts) else None
        step = set()
        for start, names in states:
            fixed = part.text if part.kind == "text" else dict(names).get(part.text) if part.kind == "name" else None
            if fixed is not None:
                if text.startswith(fixed, start):
                    step.add((start + len(fixed), names))
                continue
            first = start + (part.kind == "name")
            for end in _ends(text, first, None if after is None else after.text if after.kind == "text" else ""):
                step.add((end, (*names, (part.text, text[start:end])) if part.kind == "name" else names))
        states = step
    return {names for end, names in states if end == len(text)}


def _ends(text: str, first: int, after: str | None) -> Iterator[int]:
    """Yield the places from `first` on at which `after` follows; the end of the text if it is None."""
    if after is None:
        if first <= len(text):
            yield len(text)
        return
    end = text.find(after, first)
    while end >= 0:
        yield end
        end = text.find(after, end + 1)


def _nothing_matches(pattern: str, segment: str, folders: Sequence[str], root: Path) -> str:
    """Return the message that names the first segment without a match, and paths that are there instead."""
    there = list[str]()
    for folder in sorted(folders):
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError:
            names = []
        there += [os.path.relpath(os.path.join(folder, name), root) for name in names[: _SHOWN - len(there)]]
        if len(there) == _SHOWN:
            break
    shown = f"there are {', '.join(there)}" if there else "there is nothing at that place"
    return f"{pattern}: nothing matches as far as {segment}; {shown}"
