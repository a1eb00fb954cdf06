"""Tables and sentences for a terminal."""

import textwrap
from collections.abc import Sequence
from typing import Any

from umbrella_jax.errors import visible

WIDTH = 80
"""Columns of a terminal."""
_LABEL = 40  # longest first cell that shares its line with the others


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: its first column aligned left, the others right.

    Columns that do not fit into `WIDTH` follow in further blocks, each with the first column. A long first cell is a
    line of its own. Cells have no line breaks.
    """
    rows = [[visible(cell, kept="") for cell in row] for row in rows]
    label, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    label = min(label, _LABEL)
    blocks: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if blocks[-1] and label + sum(2 + widths[j] for j in blocks[-1]) + 2 + width > WIDTH:
            blocks.append([])
        blocks[-1].append(i)
    lines = list[str]()
    for number, block in enumerate(blocks):
        lines += [""] if number else []
        for name, *cells in rows:
            if len(name) > label:
                lines.append(name)
                name = ""
            lines.append("  ".join([name.ljust(label), *(cells[i].rjust(widths[i]) for i in block)]))
    return lines


def wrapped(line: str) -> list[str]:
    """Wrap a line at `WIDTH` and indent its continuation; a word without spaces, such as a path, stays whole."""
    indent = " " * (len(line) - len(line.lstrip()))
    options: dict[str, Any] = {"initial_indent": indent, "subsequent_indent": f"{indent}  "}
    return textwrap.wrap(line.lstrip(), WIDTH, break_long_words=False, break_on_hyphens=False, **options)


def plural(number: int, what: str) -> str:
    """Return `1 subject` or `2 subjects`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
