"""Read a sheet of a spreadsheet, as a program of its own.

A damaged spreadsheet can make calamine ask for all memory or end the process, so `umbrella_jax.study.tables` runs this
file with the spreadsheet as input and the sheet's name, if one is chosen, as argument. The output is JSON: a list of
(row, cells), or a text with what is wrong.
"""

import datetime
import decimal
import json
import math
import sys
from contextlib import suppress
from io import BytesIO
from typing import Any

_MEMORY = 4 << 30
"""Bytes of address space; a table of 40,000 rows and 100 columns needs a tenth."""


def read_sheet(content: bytes, sheet: str | None) -> list[tuple[int, list[str]]] | str:
    """Return (row, cells) of every row that is not empty, or what is wrong, to follow the name of the file."""
    from python_calamine import CalamineError, CalamineWorkbook, SheetVisibleEnum

    try:
        workbook = CalamineWorkbook.from_filelike(BytesIO(content))
        names = [s.name for s in workbook.sheets_metadata if s.visible == SheetVisibleEnum.Visible]
        if not names:
            return ": has no sheet that is shown"
        if sheet is None and len(names) > 1:
            return f": has several sheets; set sheet to one of {', '.join(names)}"
        if sheet is not None and sheet not in workbook.sheet_names:
            return f": sheet {sheet}: no such sheet; expected {' or '.join(names)}"
        cells = workbook.get_sheet_by_name(sheet or names[0])
        for (first, _), (last, _) in cells.merged_cell_ranges or ():
            if first < last:
                return f":{first + 1}: cells are merged down to row {last + 1}; write the value in every row"
        rows = cells.to_python(skip_empty_area=False)
    except CalamineError as error:
        return f": not a spreadsheet that can be read: {error}"
    return [(n, [cell_text(cell) for cell in row]) for n, row in enumerate(rows, start=1) if any(c != "" for c in row)]


def cell_text(value: Any) -> str:
    """Return a typed cell as text: 45.0 as 45, a date in ISO 8601, a boolean as TRUE or FALSE."""
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.15g}"
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    return str(value)


def _main() -> None:
    if sys.platform != "win32":
        import resource

        with suppress(ValueError, OSError):  # a lower limit is set already, or the system has none
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    json.dump(read_sheet(sys.stdin.buffer.read(), sys.argv[1] if len(sys.argv) > 1 else None), sys.stdout)


if __name__ == "__main__":
    _main()
