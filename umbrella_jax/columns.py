"""Tables and sentences for a terminal."""

import textwrap
from collections.abc import Sequence
from typing import Any


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def wrapped(line: str) -> list[str]:
    """In 80 columns, indented further where it goes on; what has no space stays whole, as paths do."""
    indent = " " * (len(line) - len(line.lstrip()))
    options: dict[str, Any] = {"initial_indent": indent, "subsequent_indent": f"{indent}  "}
    return textwrap.wrap(line.lstrip(), 80, break_long_words=False, break_on_hyphens=False, **options)


def plural(number: int, what: str) -> str:
    """`1 subject`, `2 subjects`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
