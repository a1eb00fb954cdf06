"""Executes docs/tour.ipynb. `python -m tests.helpers.tour` puts what it prints and shows back into the file."""

import base64
import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    return found


def code_of(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Its cells of code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The outputs of one cell of code after the other, as notebooks hold them: what is printed, and figures."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(code_of(notebook), 1):
        out, figures = io.StringIO(), list[dict[str, Any]]()

        def show(figures: list[dict[str, Any]] = figures) -> None:
            png = io.BytesIO()
            plt.gcf().savefig(png, format="png")
            plt.close("all")
            data = {"image/png": base64.b64encode(png.getvalue()).decode()}
            figures.append({"data": data, "metadata": {}, "output_type": "display_data"})

        code = compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec")
        with redirect_stdout(out), mock.patch.object(plt, "show", show):
            exec(code, namespace)
        lines = out.getvalue().splitlines(keepends=True)
        yield [*figures, *([{"name": "stdout", "output_type": "stream", "text": lines}] if lines else [])]


def main() -> None:
    notebook = read()
    for number, (cell, outputs) in enumerate(zip(code_of(notebook), run(notebook), strict=True), 1):
        cell |= {"execution_count": number, "outputs": outputs}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
