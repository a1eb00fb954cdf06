"""Tables of a page that its script can sort and filter; the macro `data_table` of `parts.html` writes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TableColumn:
    """A column of a `DataTable`."""

    name: str
    """Heading, with the unit of its numbers."""
    kind: Literal["text", "name", "number", "range", "choice"] = "text"
    """`name` has a field that filters the rows by a part of it, `choice` a menu of its values. `number` is aligned
    right; `range` is a number with fields for the lowest and the highest to show."""


@dataclass(frozen=True)
class TableCell:
    """A cell of a `DataTable` that is more than its text."""

    text: str
    key: float | None = None
    """Number to sort by instead of the text."""
    link: str = ""
    """Id of an element of the page."""
    picture: str = ""
    """Data URL of a small picture, shown beside the text."""
    severity: str = ""
    """`fault`, `warning`, `note` or `bad`; colours the text."""

    @property
    def key_text(self) -> str:
        """`key` as JavaScript reads it; empty if it is NaN, which is sorted as unknown."""
        if self.key is None or math.isnan(self.key):
            return ""
        return repr(float(self.key)).replace("inf", "Infinity")


@dataclass(frozen=True)
class DataTable:
    """A table whose first column names its rows. Without a script it is an ordinary table that scrolls in a box."""

    name: str
    """Id of the table in the page."""
    caption: str
    columns: Sequence[TableColumn]
    rows: Sequence[Sequence[TableCell | str | int | float | None]]
    """Cells of each row in the order of `columns`. Numbers are written with 4 digits and None as an empty cell."""

    def cells(self) -> list[list[TableCell]]:
        """Return the rows with every value as a cell."""
        return [[value if isinstance(value, TableCell) else _cell(value) for value in row] for row in self.rows]


def _cell(value: str | int | float | None) -> TableCell:
    if value is None or isinstance(value, str):
        return TableCell(value or "")
    return TableCell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", float(value))
