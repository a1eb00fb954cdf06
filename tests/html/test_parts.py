"""Shared parts of pages, used in a real browser: tables, charts, volumes to scroll through."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import browser
from umbrella_jax.html.charts import count_table, histogram_of
from umbrella_jax.html.page import render_page
from umbrella_jax.html.slices import stack_slices
from umbrella_jax.html.tables import DataTable, TableCell, TableColumn
from umbrella_jax.html.viewer import MOST_SLICES, slice_viewer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\""
COLUMNS = (TableColumn("file"), TableColumn("set", "choice"), TableColumn("largest voxel", "number"))
ROWS = (
    ("sub-10", "train", 1234.5),
    (TableCell("sub-2", link="volume"), "eval", 99.0),
    ("sub-9", "train", None),
    (HOSTILE, HOSTILE, TableCell("many", key=1e6, severity="warning")),
)
TEMPLATE = """{% extends "pages.html" %}
{% from "parts.html" import data_table, count_table, histogram, slice_viewer %}
{% block body %}
{% if table %}{{ data_table(table) }}{% endif %}
{% for plot in plots %}{{ histogram(plot) }}{% endfor %}
{% if counts %}{{ count_table(counts) }}{% endif %}
{% if viewer %}<div id="volume">{{ slice_viewer(viewer) }}</div>{% endif %}
{% endblock %}"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(table=…, plots=…, counts=…, viewer=…)` writes a page with a script."""

    def make(**parts: object) -> Path:
        (tmp_path / "template.html").write_text(TEMPLATE)
        values = {"table": None, "plots": [], "counts": None, "viewer": None, **parts}
        render_page(tmp_path / "template.html", tmp_path / "page.html", script=True, **values)
        return tmp_path / "page.html"

    return make


def test_tables_sort_and_filter(write: Callable[..., Path]) -> None:
    page = write(table=DataTable("volumes", "All volumes", COLUMNS, ROWS))
    result = browser.evaluate(
        page,
        """
        const shown = () => [...document.querySelectorAll("tbody tr")].filter(row => !row.hidden);
        const rows = () => shown().map(row => row.cells[0].innerText);
        const headings = [...document.querySelectorAll("thead th")];
        const states = () => headings.map(h => h.getAttribute("aria-sort"));
        const [file, , largest] = headings.map(h => h.querySelector("button"));
        const [search, menu] = [document.querySelector("input[type=search]"), document.querySelector("select")];
        const fire = (field, value) => {
          field.value = value;
          for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind));
        };
        const options = [...menu.options].map(option => option.value);
        const result = {before: rows(), options, scopes: headings.map(heading => heading.scope)};
        file.click(); result.names = rows();
        largest.click(); result.rising = rows(); result.states = states();
        largest.click(); result.falling = rows(); result.fallen = states();
        fire(menu, "train"); result.train = rows();
        fire(search, "SUB 9"); result.both = rows(); result.status = document.querySelector("output").innerText;
        result.labels = [search, menu].map(field => field.labels[0].innerText.split("\\n")[0].trim());
        result.focusable = document.querySelector(".scroll").tabIndex;
        return result;
        """,
    )
    assert result["before"] == ["sub-10", "sub-2", "sub-9", HOSTILE]
    assert result["names"] == [HOSTILE, "sub-2", "sub-9", "sub-10"]  # numbers within names count
    assert result["rising"] == ["sub-2", "sub-10", HOSTILE, "sub-9"]  # an unknown number is last
    assert result["falling"] == [HOSTILE, "sub-10", "sub-2", "sub-9"]
    assert (result["states"], result["fallen"]) == ([None, None, "ascending"], [None, None, "descending"])
    assert result["options"] == ["", HOSTILE, "eval", "train"]
    assert result["train"] == ["sub-10", "sub-9"]
    assert (result["both"], result["status"]) == (["sub-9"], "1 of 4 rows")
    assert result["scopes"] == ["col"] * 3
    assert result["labels"][0] == "Search rows"
    assert result["labels"][1].startswith("set")
    assert result["focusable"] == 0


def test_long_tables_show_their_first_rows(write: Callable[..., Path]) -> None:
    rows = [(f"sub-{i:03d}", "eval" if i % 2 else "train", i) for i in range(450)]
    result = browser.evaluate(
        write(table=DataTable("volumes", "All volumes", COLUMNS, rows)),
        """
        const names = () => [...document.querySelectorAll("tbody th")].map(cell => cell.innerText);
        const states = [];
        const note = () => states.push([names().length, names()[0], names().at(-1),
          document.querySelector("output").innerText, more.hidden]);
        const more = document.querySelector(".data > button"), largest = document.querySelectorAll("thead button")[2];
        note(); more.click(); note(); more.click(); note(); largest.click(); largest.click(); note();
        return states;
        """,
    )
    assert result == [
        [200, "sub-000", "sub-199", "450 of 450 rows, the first 200 shown", False],
        [400, "sub-000", "sub-399", "450 of 450 rows, the first 400 shown", False],
        [450, "sub-000", "sub-449", "450 of 450 rows", True],
        [
            *(200, "sub-449", "sub-250"),
            *("450 of 450 rows, the first 200 shown, sorted by largest voxel, descending", False),
        ],
    ]


def test_the_policy_allows_the_script_of_the_page_and_no_other(write: Callable[..., Path]) -> None:
    page = write(table=DataTable("volumes", HOSTILE, COLUMNS, ROWS), viewer=volume_viewer(HOSTILE))
    dumped = browser.dump(page, until="<canvas")
    assert 'class="controls"' in dumped
    assert "<canvas" in dumped
    assert page.read_text().count("<script") == 1
    intruder = page.with_name("intruder.html")
    intruder.write_text(page.read_text().replace("</body>", "<script>document.title = 'intruder'</script></body>"))
    assert "<title>intruder" not in browser.dump(intruder)


def volume_viewer(title: str) -> object:
    """Return the viewer of a volume that gets brighter towards the patient's left, front and top."""
    x, y, z = np.indices((20, 24, 30))
    return slice_viewer(title, (200 * x / 20 + 20 * y / 24 + 40 * z / 30).astype(np.float32), "LAS", (1, 1, 1))


def test_volumes_scroll(write: Callable[..., Path]) -> None:
    page = write(viewer=volume_viewer("sub-1"))
    result = browser.evaluate(
        page,
        """
        while (document.querySelectorAll("canvas").length < 3) await new Promise(done => setTimeout(done, 20));
        await new Promise(done => setTimeout(done, 200));
        return [...document.querySelectorAll(".plane")].map(plane => {
          const numbers = [...Array(Number(plane.querySelector("input").max) + 1).keys()];
          const [slider, canvas] = [plane.querySelector("input"), plane.querySelector("canvas")];
          const mean = (i) => {
            slider.value = i;
            slider.dispatchEvent(new Event("input"));
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const isLeft = (k) => (k / 4) % canvas.width < canvas.width / 2;
            const half = (left) => pixels.filter((_, k) => k % 4 == 0 && isLeft(k) == left)
              .reduce((a, b) => a + b) / pixels.length * 8;
            return [half(true), half(false)];
          };
          const first = mean(0), label = slider.getAttribute("aria-valuetext");
          const all = numbers.map(i => mean(i).reduce((a, b) => a + b));
          return {all, first, label, max: Number(slider.max), text: plane.innerText.replaceAll("\\n", " "),
                  alt: canvas.getAttribute("aria-label"), plain: document.querySelector("figure img").hidden};
        });
        """,
    )
    axial, coronal, sagittal = result
    assert [plane["max"] for plane in result] == [29, 23, 19]  # every slice
    assert (axial["label"], axial["alt"]) == ("axial 1 of 30", "axial 30 of 30: sub-1")
    assert axial["text"].startswith("A R L P")
    assert "I to S" in axial["text"]
    for plane in (axial, coronal):
        assert plane["first"][1] > plane["first"][0] + 40  # the patient's left is at the right
        assert (np.diff(plane["all"]) > -1).all()  # towards top and front; JPEG rounds
        assert plane["all"][-1] > plane["all"][0] + 15
    assert (np.diff(sagittal["all"]) < -10).all()  # from left to right
    assert all(plane["plain"] for plane in result)


def test_long_axes_are_shown_at_even_distances() -> None:
    stacks = stack_slices(np.zeros((5, 6, 300)), None, None)
    mosaics = slice_viewer("a", np.zeros((5, 6, 300)), None, None).mosaics
    assert [stack.name for stack in stacks] == [mosaic.name for mosaic in mosaics]
    numbers = mosaics[0].numbers
    assert len(numbers) == MOST_SLICES
    assert (numbers[0], numbers[-1], mosaics[0].length) == (0, 299, 300)
    assert set(np.diff(numbers)) == {2, 3}


def test_histograms_have_axes_and_numbers(write: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    values = {"train": rng.normal(500, 80, 300), HOSTILE: [*rng.normal(500, 80, 20), np.nan]}
    plot = histogram_of("mean intensity", values, axis="intensity (a.u.)", counted="volumes")
    assert plot is not None
    assert plot.counts.totals == (300, 20)
    assert len(plot.counts.rows) == 20
    assert plot.x_ticks[0][0] >= plot.left
    heights = [bar.height for bar in plot.bars if bar.set_index == 1]
    counts = [row[1] for _, row in plot.counts.rows if row[1]]
    np.testing.assert_allclose(np.divide(heights, counts), heights[0] / counts[0])
    page = write(
        plots=[plot], counts=count_table("answers", {"a": {HOSTILE: 3}, "b": {}}, axis="answer", counted="rows")
    )
    text = browser.dump(page)
    assert "intensity (a.u.)</text>" in text
    assert "% of volumes</text>" in text
    assert text.count("<rect") == len(plot.bars) + 2 * 20 + 2  # and those in the tables of both
    assert browser.measure(page, 400)["out"] == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 2.0, 2.2, 2.0], [("2", (3,)), ("2.2", (1,))]),
        ([0.5, 40.5], ["0.5 to 2.5", "38.5 to 40.5"]),  # measured numbers seldom repeat
        ([np.nan, np.inf], None),
        (range(100, 120), [(str(n), (1,)) for n in range(100, 120)]),
        ([*range(1, 101), 1000, 40], ["1 to 1.413", "707.9 to 1000"]),  # logarithmic: 1000 / 1 >= 100
    ],
)
def test_bins_fit_the_numbers(values: list[float], expected: list[tuple[str, tuple[int]]] | list[str] | None) -> None:
    plot = histogram_of("a", {"train": np.array(values, float)}, axis="a", counted="rows")
    if expected is None or plot is None:
        assert plot is expected
    elif isinstance(expected[0], str):
        assert [plot.counts.rows[0][0], plot.counts.rows[-1][0]] == expected
        assert plot.counts.totals == (len(values),)
        assert [text for _, text in plot.x_ticks] == (
            ["1", "10", "100", "1,000"] if len(values) > 100 else ["10", "20", "30", "40"]
        )
    else:
        assert list(plot.counts.rows) == expected


def test_pages_without_a_script_allow_none(tmp_path: Path) -> None:
    (tmp_path / "template.html").write_text('{% extends "pages.html" %}{% block body %}a{% endblock %}')
    render_page(tmp_path / "template.html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert not re.search("script-src|<script", text)
    assert "default-src 'none'" in text
