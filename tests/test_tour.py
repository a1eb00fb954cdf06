"""docs/tour.ipynb runs in Jupyter, here and on Colab."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tests.helpers import tour
from tests.helpers.docs_world import ROOT, extras, pattern, project


def test_tour_calls_what_exists() -> None:
    """Every import of the notebook works, and functions of the package take the arguments that they are given."""
    to_python = TransformerManager().transform_cell
    cells = [
        ast.parse(to_python(cell.source), f"{tour.NOTEBOOK.name}, {cell.id}") for cell in tour.code_of(tour.read())
    ]
    names: dict[str, Any] = {}
    checked = set()
    for node in (node for cell in cells for node in ast.walk(cell)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), names)
    for call in (node for cell in cells for node in ast.walk(cell) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if re.fullmatch(r"[\w.]+", called) and called.split(".")[0] in names:
            function = eval(called, names)  # raises if there is no such name
            if function.__module__.startswith("umbrella_jax"):
                inspect.signature(function).bind(*call.args, **{str(one.arg): one.value for one in call.keywords})
                checked.add(called)
    assert {"make_base", "umbrella_jax.train", "umbrella_jax.generate", "umbrella_jax.explain"} <= checked


def test_first_cell_installs_this_version_with_extras_that_exist() -> None:
    first = tour.code_of(tour.read())[0].source
    (chosen,) = re.findall(r"extras = (.+)", first)
    assert {extra for words in re.findall(r'"([\w,-]*report)"', chosen) for extra in words.split(",")} <= extras()
    assert chosen.count("report") == 3  # GPU, TPU, CPU
    assert f"umbrella_jax-{project()['version']}-py3-none-any.whl" in first


def test_notebook_is_small_and_names_no_machine() -> None:
    assert tour.NOTEBOOK.stat().st_size < 200_000
    assert str(ROOT) not in tour.NOTEBOOK.read_text()


@pytest.mark.slow
def test_tour_prints_and_shows_what_it_contains(tmp_path: Path) -> None:
    """Numbers may differ from those in the file, but it learns, and the map points at the lesion."""
    stored, executed = tour.read(), tour.read()
    tour.execute(executed, tmp_path)
    for cell, expected in zip(tour.code_of(executed), tour.code_of(stored), strict=True):
        assert [output.output_type for output in cell.outputs] == [output.output_type for output in expected.outputs]
        for ours, theirs in zip(cell.outputs, expected.outputs, strict=True):
            if "text" in theirs:
                assert pattern(theirs.text).fullmatch(ours.text.strip()), ours.text
    printed = "".join(output.text for cell in tour.code_of(executed) for output in cell.outputs if "text" in output)
    right, asked = map(int, re.findall(r"(\d+) of (\d+) held-out", printed)[0])
    assert right >= 0.75 * asked
    assert float(re.findall(r"has ([\d.]+) times", printed)[0]) > 1.5
