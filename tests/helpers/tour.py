"""Execute docs/tour.ipynb in Jupyter. `python -m tests.helpers.tour` stores the outputs in the file."""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


def read() -> nbformat.NotebookNode:
    """Return the notebook, which must have the schema of nbformat 4."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a kernel that starts in `folder`, and replace their outputs by what they print and show.

    Like a reader's kernel, it lacks the suite's flags of XLA. Warnings, and the progress that slow machines print, are
    left out.
    """
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"TMPDIR": str(folder)}
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, coalesce_streams=True, record_timing=False, resources=resources)
    client.execute(env=environment)
    for cell in code_of(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output.text = re.sub(r"^answer \d+ of \d+\n", "", output.text, flags=re.MULTILINE)


def main() -> None:
    """Execute the notebook and store its outputs."""
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    sys.exit(main())
