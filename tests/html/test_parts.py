"""Shared parts of pages, used in a real browser: tables, charts, scans to scroll through."""

import base64
import gzip
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from tests.helpers.devtools import DISPLAY_RULES, Browser, Tab
from umbrella_jax.html.axes import Axis, round_numbers
from umbrella_jax.html.charts import count_table, histogram_of
from umbrella_jax.html.curves import line_chart
from umbrella_jax.html.mosaics import MOST_SLICES, draw_mosaics
from umbrella_jax.html.page import render_page
from umbrella_jax.html.points import Point, point_chart
from umbrella_jax.html.scan_panels import EmbeddedScan, PageScans, crosshair, embed_map, embed_scan
from umbrella_jax.html.slices import grey_range, stack_slices
from umbrella_jax.html.tables import DataTable, TableCell, TableColumn

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\""
COLUMNS = (TableColumn("file"), TableColumn("set", "choice"), TableColumn("largest voxel", "number"))
ROWS = (
    ("sub-10", "train", 1234.5),
    (TableCell("sub-2", link="volume"), "eval", 99.0),
    ("sub-9", "train", None),
    (HOSTILE, HOSTILE, TableCell("many", key=1e6, severity="warning")),
)
TEMPLATE = """{% extends "pages.html" %}
{% from "parts.html" import data_table, count_table, histogram, line_chart, point_chart, scan_panel %}
{% block title %}parts{% endblock %}
{% block body %}<main><h1>Parts</h1>
{% if table %}{{ data_table(table) }}{% endif %}
{% for plot in plots %}{{ histogram(plot) }}{% endfor %}
{% if counts %}{{ count_table(counts) }}{% endif %}
{% for chart in curves %}{{ line_chart(chart) }}{% endfor %}
{% if points %}{{ point_chart(points) }}{% endif %}
{% for panel in panels %}{% call scan_panel(panel) %}<p>picture</p>{% endcall %}{% endfor %}
</main>{% endblock %}"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(table=…, plots=…, counts=…, curves=…, points=…, panels=…, scans=…)` writes a page with a script."""

    def make(**parts: object) -> Path:
        (tmp_path / "template.html").write_text(TEMPLATE)
        values = {"table": None, "counts": None, "points": None, "scans": None, "plots": [], "curves": [], "panels": []}
        values |= parts
        render_page(tmp_path / "template.html", tmp_path / "page.html", script=True, **values)  # type: ignore[arg-type]
        return tmp_path / "page.html"

    return make


def run_script(browser: Browser, page: Path, body: str) -> Any:
    """Return what the body of an async function returns in the page."""
    with browser.open(page.as_uri(), webgl=False) as tab:
        result = tab.run(body)
        assert tab.errors == []
        return result


def test_tables_sort_and_filter(write: Callable[..., Path], chromium: Browser) -> None:
    page = write(table=DataTable("volumes", "All volumes", COLUMNS, ROWS))
    result = run_script(
        chromium,
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


def test_long_tables_show_their_first_rows(write: Callable[..., Path], chromium: Browser) -> None:
    rows = [(f"sub-{i:03d}", "eval" if i % 2 else "train", i) for i in range(450)]
    result = run_script(
        chromium,
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


def test_columns_filter_by_their_kind_and_rows_can_be_saved(write: Callable[..., Path], chromium: Browser) -> None:
    columns = (TableColumn("file"), TableColumn("subject", "name"), TableColumn("confidence", "range"))
    rows = [("a", "S1", 0.25), ("b", "S2", 0.75), ("c", "S11", None), ("S1", "S3", math.inf), ("d", "S4", math.nan)]
    result = run_script(
        chromium,
        write(table=DataTable("answers", "All answers", columns, rows)),
        """
        const rows = () => [...document.querySelectorAll("tbody th")].map(cell => cell.innerText);
        const [from, to] = document.querySelectorAll("input[type=number]");
        const fire = (field, value) => { field.value = value; field.dispatchEvent(new Event("input")); return rows(); };
        const state = () => rows().join("");
        const reset = document.querySelector(".controls > button");
        const states = [state(), reset.hidden];
        fire(from, "0.5"); states.push(state());
        fire(from, ""); fire(to, "0.25"); states.push(state(), from.getAttribute("aria-label"));
        fire(to, "");
        const subject = document.querySelectorAll("input[type=search]")[1];
        fire(subject, "s1"); states.push(state(), subject.labels[0].innerText.trim());
        const heading = document.querySelectorAll("thead button")[2];
        fire(subject, ""); heading.click(); states.push(state()); heading.click(); states.push(state());
        const saved = [];
        URL.createObjectURL = (content) => saved.push(content) && "data:,";
        HTMLAnchorElement.prototype.click = function () { saved.push(this.download); };
        fire(subject, "S2"); document.querySelector(".controls > button + button").click();
        states.push(await saved[0].text(), saved[1]);
        reset.click(); states.push(state(), subject.value, reset.hidden, document.activeElement.type);
        return states;
        """,
    )
    assert result[:2] == ["abcS1d", True]
    assert result[2:4] == ["bS1", "a"]
    assert result[4:7] == ["confidence from", "ac", "subject"]  # `S1` is the file of another subject
    assert result[7:9] == ["abS1cd", "S1bacd"]  # infinity is a number; NaN and nothing are unknown, and last
    assert result[9:11] == ["file,subject,confidence\r\nb,S2,0.75\r\n", "answers.csv"]
    assert result[11:] == ["abcS1d", "", True, "search"]


def brightening(frames: int = 0) -> np.ndarray:
    """A volume that gets brighter towards the patient's left, front and top, and from frame to frame."""
    x, y, z = np.indices((20, 24, 30))
    volume = (x / 19 + y / 2.3 + 10 * z).astype(np.float32)
    return volume if not frames else volume[..., None] + 1000 * np.arange(frames, dtype=np.float32)


def names_of(tab: Tab, selector: str) -> list[str]:
    """Return the texts of all elements that match."""
    texts: list[str] = tab.evaluate(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")
    return texts


def check_saved_picture(tab: Tab, file: Path) -> None:
    """Save the first panel's picture, and assert that it has the colour bar, grey where the map is hidden, and its
    texts."""
    tab.evaluate(
        """HTMLCanvasElement.prototype.toBlob = function () { window.saved = this.toDataURL(); };
        const plain = CanvasRenderingContext2D.prototype.fillText; window.written = [];
        CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
          window.written.push(text); plain.call(this, text, ...at); }; 0"""
    )
    height, width = tab.evaluate("(({height, width}) => [height, width])(document.querySelector('.panel canvas'))")
    tab.click(".panel-buttons button:last-child")
    file.write_bytes(base64.b64decode(tab.wait("window.saved").split(",")[1]))
    written = " · ".join(tab.evaluate("window.written"))
    for text in ("−1 or less", "+1 or more", "no colour within ±0.6", tab.text(".panel-readout")):
        assert text in written
    picture = np.asarray(PIL.Image.open(file).convert("RGB"), int)
    assert picture.shape[1] == width
    left, right = 12, 12 + min(width - 24, 480)
    row = picture[height + 18, left:right]
    is_grey = np.ptp(row, axis=1) < 20
    assert is_grey.mean() == pytest.approx(0.6, abs=0.02)
    assert row[2, 2] > row[2, 0] + 50, "blue at the left"
    assert row[-2, 0] > row[-2, 2] + 50, "red at the right"


def test_scans_open_in_panels(write: Callable[..., Path], chromium: Browser, tmp_path: Path) -> None:
    scans, volume = PageScans(), brightening(3)
    over = embed_map(np.where(volume[..., 0] > 150, 1.0, -0.5), "LAS", (1, 1, 2), limit=1.0, unit="nats")
    panels = [
        scans.panel(HOSTILE, embed_scan(volume, "LAS", (1, 1, 2)), over, crosshair((2, 4, 6), volume.shape, "LAS")),
        scans.panel("no header", embed_scan(brightening(), None, None)),
    ]
    page = write(panels=panels, scans=scans)
    with chromium.open(page.as_uri(), height=1800) as tab:
        tab.wait("document.querySelectorAll('.scan.is-open').length == 2")
        for width, dark in ((400, True), (1280, False)):
            assert tab.measure(width, dark=dark)["whole"] == width
            assert tab.accessibility(DISPLAY_RULES if dark else ()) == []
            assert tab.evaluate("getComputedStyle(document.querySelector('.pictures')).display") == "none"
            assert (tab.errors, tab.outside) == ([], [])
        readout = ".panel-readout"
        place, value, over_it = tab.text(readout).split(" · ")
        assert (place, over_it) == ("x, y, z: 7.5, -7.5, -17.0 mm from the centre", "map -0.5 nats")
        assert abs(float(value.removeprefix("value ")) - volume[2, 4, 6, 0]) < np.ptp(volume[..., 0]) / 255
        names = tab.evaluate("[...document.querySelector('.panel').querySelectorAll('.slider')].map(e => e.innerText)")
        assert names[:4] == [
            "sagittal, R to L\n3 of 20",
            "coronal, P to A\n5 of 24",
            "axial, I to S\n7 of 30",
            "frame\n1 of 3",
        ]
        tab.evaluate("document.querySelector('.panel canvas').focus()")
        for key in ("ArrowRight", "ArrowUp", "]"):
            tab.press(key)
        assert tab.text(readout).startswith("x, y, z: 6.5, -7.5, -15.0 mm from the centre · value 107")
        tab.press("r")
        assert value in tab.text(readout)
        tab.choose(".panel .slider:nth-child(3) input", "20")
        assert "map 1 nats" in tab.text(readout)
        pixels = "const c = document.querySelector('.panel canvas'), n = c.width * c.height * 4; "
        count = f"""new Promise((done) => requestAnimationFrame(() => {{
          const panel = openPanels.get(document.querySelector('.scan')); panel.nv.drawScene(); {pixels}
          const gl = c.getContext('webgl2'), all = new Uint8Array(n);
          gl.readPixels(0, 0, c.width, c.height, gl.RGBA, gl.UNSIGNED_BYTE, all);
          let [red, blue] = [0, 0];
          for (let i = 0; i < n; i += 4) {{
            red += all[i] > all[i + 2] + 40;
            blue += all[i + 2] > all[i] + 40 && all[i] < 90;
          }}
          done([red, blue]);
        }}))"""
        red, blue = tab.evaluate(count)
        assert min(red, blue) > 2000
        assert names_of(tab, ".panel-ends span") == ["−1 or less", "0", "+1 or more"]
        assert tab.text(".panel-scale") == "nats · no colour within ±0.2"
        tab.choose(".panel .slider:nth-child(7) input", "60")  # the map is -0.5 where it is below 0
        assert tab.evaluate(count)[0] > 2000 > 20 * tab.evaluate(count)[1]
        assert tab.text(".panel-scale") == "nats · no colour within ±0.6"
        check_saved_picture(tab, tmp_path / "saved.png")
        for width in (1280, 400):  # the crosshair's lines are as wide as on any screen, and little is left black
            tab.resize(width, 1800)
            tab.wait(f"innerWidth === {width} && new Promise((done) => setTimeout(() => done(true), 300))")
            stage, line = tab.evaluate(
                "(({nv}, {clientWidth: w, clientHeight: h}) => [[w, h], nv.opts.crosshairWidth * "
                "Math.abs(nv.screenSlices[0].leftTopWidthHeight[2] / nv.screenSlices[0].fovMM[0])])"
                "([...openPanels.values()][0], document.querySelector('.panel-stage'))"
            )
            assert line == pytest.approx(2, rel=0.05)
            row = (stage[0] - 8) * 60 / 64  # height of three planes side by side that fill the width
            assert stage[1] == pytest.approx(min(480, row), abs=2)
        for display in ("none", ""):  # as in a page that hides its panels
            tab.evaluate(f"document.querySelector('.panel-stage').style.display = '{display}'")
            tab.evaluate("new Promise((done) => setTimeout(done, 200))")
        assert [error for error in tab.errors if "INVALID" in error] == []
        assert "orientation unknown" in tab.evaluate("document.querySelectorAll('.panel-readout')[1].textContent")


def test_pages_open_the_scans_that_are_in_view(write: Callable[..., Path], chromium: Browser) -> None:
    """More scans than a browser draws at a time open one after the other, and none is lost."""
    scans = PageScans()
    panels = [scans.panel(f"scan {i}", embed_scan(brightening() + i, "LAS", None)) for i in range(9)]
    page = write(panels=panels, scans=scans)
    with chromium.open(page.as_uri(), width=500, height=300) as tab:
        boxes, is_open = "[...document.querySelectorAll('.scan')]", "e.classList.contains('is-open')"
        tab.wait(f"{boxes}[0].classList.contains('is-open')")
        tab.evaluate("document.querySelector('.panel input').focus()")
        for i in range(len(panels)):
            tab.evaluate(f"{boxes}[{i}].scrollIntoView({{behavior: 'instant'}})")
            tab.wait(f"{boxes}[{i}].classList.contains('is-open')")
        assert tab.evaluate(f"{boxes}.filter(e => {is_open}).length") == tab.evaluate("MOST_PANELS") < len(panels)
        assert tab.evaluate(f"{boxes}.map(e => Number({is_open}))")[:2] == [1, 0], "the panel with the focus stays"
        last = f"{boxes}[{len(panels) - 1}]"
        tab.evaluate(
            f"{last}.querySelector('canvas').getContext('webgl2').getExtension('WEBGL_lose_context').loseContext()"
        )
        tab.wait(f"{last}.innerText.includes('stopped drawing this scan') && !{last}.classList.contains('is-open')")
        assert tab.evaluate(f"{last}.querySelector('.pictures').checkVisibility()")
        tab.run("await openThoseInView()")  # as when another scan comes into view
        assert not tab.evaluate(f"{last}.classList.contains('is-open')"), "it opens when it comes into view again"
        tab.evaluate(f"{boxes}[0].scrollIntoView({{behavior: 'instant'}})")
        tab.wait(f"inView.has({boxes}[0])")
        tab.evaluate(f"{last}.scrollIntoView({{behavior: 'instant'}})")
        tab.wait(f"{last}.classList.contains('is-open') && !{last}.innerText.includes('stopped drawing')")
        assert tab.errors == []


def test_pages_without_webgl_keep_their_pictures(write: Callable[..., Path], chromium: Browser) -> None:
    scans = PageScans()
    page = write(panels=[scans.panel(HOSTILE, embed_scan(brightening(), "LAS", None))], scans=scans)
    with chromium.open(page.as_uri(), webgl=False) as tab:
        tab.wait("document.body.innerText.includes('Pictures only: this browser has no WebGL 2')")
        assert tab.evaluate("document.querySelector('.pictures').checkVisibility()")
        assert tab.evaluate("document.querySelector('.panel')") is None
    plain = page.with_name("plain.html")
    plain.write_text(page.read_text().split("<script>")[0])
    with chromium.open(plain.as_uri()) as tab:
        assert tab.evaluate("document.querySelector('.pictures').checkVisibility()")
        assert tab.text(".pictures") == "picture"


def test_the_policy_allows_the_scripts_of_the_page_and_no_other(write: Callable[..., Path], chromium: Browser) -> None:
    page = write(table=DataTable("volumes", HOSTILE, COLUMNS, ROWS))
    with chromium.open(page.as_uri()) as tab:
        assert tab.evaluate("document.querySelector('.controls') !== null")
        assert tab.errors == []
    assert page.read_text().count("<script") == 1
    assert "niivue" not in page.read_text().split("<script>")[0], "only pages that show scans contain NiiVue"
    intruder = page.with_name("intruder.html")
    intruder.write_text(page.read_text().replace("</body>", "<script>document.title = 'intruder'</script></body>"))
    with chromium.open(intruder.as_uri()) as tab:
        assert tab.evaluate("document.title") != "intruder"
        (error,) = tab.errors
        assert "violates the following Content Security Policy directive" in error
    assert "'unsafe-inline'" not in page.read_text()


@pytest.mark.parametrize("codes", ["LAS", "SPR", None])
def test_embedded_scans_keep_voxels_and_sides(codes: str | None) -> None:
    volume = brightening(2)
    content = base64.b64decode(embed_scan(volume, codes, (1, 2, 3), 2.5).content)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    low, high = np.percentile(volume[..., 0], (0.5, 99.5))
    np.testing.assert_allclose(image.get_fdata(), volume, atol=(high - low) / 255)
    assert image.header.get_zooms() == (1, 2, 3, 2.5)
    if codes is None:
        assert (image.header["sform_code"], image.header["qform_code"]) == (0, 0)
    else:
        assert "".join(nib.aff2axcodes(image.affine)) == codes
        np.testing.assert_allclose(nib.affines.apply_affine(image.affine, [9.5, 11.5, 14.5]), 0)


def test_embedded_scans_of_files_count_mm_from_their_origin() -> None:
    affine = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    scan = embed_scan(brightening(), "LAS", (2, 2, 2), affine=affine)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(scan.content)))
    np.testing.assert_array_equal(image.affine, affine)
    assert (scan.origin, PageScans().panel("a", scan).origin) == ("", "")


def test_outliers_and_small_masks_keep_their_values() -> None:
    volume = brightening()
    volume[3, 4, 5] = 1e6  # more than 128 times the range from black to white
    image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(embed_scan(volume, "LAS", None).content)))
    np.testing.assert_allclose(image.get_fdata(), volume, rtol=1e-6, atol=2)
    mask = np.zeros((20, 24, 30), np.float32)
    mask[9, 9, 9:12] = 0.5
    assert grey_range(mask) == (0, 0.5)


def test_scans_beyond_the_limit_stay_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = embed_scan(brightening(), "LAS", None)
    size = len(scan.content)
    scans = PageScans(limit=size + 10)
    assert scans.panel("a", scan).volume == scans.panel("a again", scan).volume == "scan-1"
    assert scans.panel("b", embed_scan(brightening() ** 2, "LAS", None)).volume == ""
    assert scans.panel("c", EmbeddedScan("")).volume == ""
    assert scans.summary().endswith("2 scans more did not fit: pictures only.")
    monkeypatch.setattr("umbrella_jax.html.scan_panels.SCAN_LIMIT", 2 * size)
    assert embed_scan(brightening(40), "LAS", None).note == "the first 2 of 40 frames"
    growing = np.random.default_rng(0).normal(size=(20, 24, 30, 9)).astype(np.float32)
    growing[..., 0] = 0  # compresses to next to nothing
    limited = embed_scan(growing, "LAS", None)
    assert 0 < len(limited.content) <= 2 * size
    assert limited.note


def test_long_axes_are_shown_at_even_distances() -> None:
    stacks = stack_slices(np.zeros((5, 6, 300)), None, None)
    mosaics = draw_mosaics(np.zeros((5, 6, 300)), None, None)
    assert [stack.name for stack in stacks] == [mosaic.name for mosaic in mosaics]
    numbers = mosaics[0].numbers
    assert len(numbers) == MOST_SLICES
    assert (numbers[0], numbers[-1], mosaics[0].length) == (0, 299, 300)
    assert set(np.diff(numbers)) == {2, 3}


def test_curves_are_read_smoothed_and_logarithmic(write: Callable[..., Path], chromium: Browser) -> None:
    loss = [(step, 100.0 if step % 2 else 1.0) for step in range(1, 101)]
    curves = {HOSTILE: loss, "evaluation": [(50, 3.0), (100, 2.0)]}
    chart = line_chart("loss", curves, text="ends", last=100, chance={"evaluation": 5.0})
    assert (chart.x(0), chart.x(100)) == (chart.frame.left, chart.frame.right)
    assert (chart.y(chart.linear.low), chart.y(chart.linear.high)) == (chart.frame.bottom, chart.frame.top)
    page = write(curves=[chart, line_chart("rate", {"": loss}, text="", last=100)])
    assert page.read_text().count('class="stroke-1 level"') == 1, "chance, also without the script"
    with chromium.open(page.as_uri()) as tab:
        assert tab.text(".chart-values") == f"step 100: {HOSTILE} 1.000, evaluation 2.000"
        tab.choose(".curves .controls input", "48")
        assert tab.text(".chart-values") == f"step 49: {HOSTILE} 100.0, evaluation 3.000 (step 50)"
        before = tab.evaluate("document.querySelector('.lines').innerHTML")
        tab.click("input[type=checkbox]")
        logarithmic = tab.evaluate("document.querySelector('.lines').innerHTML")
        tab.choose(".curves label input[type=range]", "0.98")
        smooth = float(tab.text(".chart-values").split(HOSTILE)[1].split(",")[0])
        assert 45 < smooth < 60, "the mean of 1 and 100"
        assert len({before, logarithmic, tab.evaluate("document.querySelector('.lines').innerHTML")}) == 3
        last = "document.querySelectorAll('.chart-values')[1].textContent"
        assert tab.evaluate(last) == "step 49: 100.0", "charts are read together"
        tab.click("button.key")
        assert HOSTILE not in tab.text(".chart-values")
        assert tab.evaluate("document.querySelectorAll('.curves .lines')[0].querySelectorAll('path').length") == 3
        tab.click("button.key")
        assert HOSTILE in tab.text(".chart-values")
        svg = tab.evaluate("svgFile(document.querySelector('.curves svg'))")
        drawn = ElementTree.fromstring(svg)
        assert 'stroke="rgb(47, 111, 174)"' in svg, "the style of the page is in the file"
        assert not any("class" in part.attrib for part in drawn.iter() if part is not drawn)
        assert (tab.accessibility(), tab.errors) == ([], [])


def test_points_have_axes_and_a_row_without_values(write: Callable[..., Path], chromium: Browser) -> None:
    points = [
        Point(0.0, 0.0, "one", label="7", radius=9),
        Point(1.0, 0.5, HOSTILE, low=0.25, high=0.75),
        Point(1.0, 0.5, "covered"),
        Point(0.5, None, "no value"),
        Point(0.5, 1e9, "far"),
    ]
    chart = point_chart(
        "calibration", points, text="", x_name="x", y_name="y", axis=Axis.linear(0, 1), missing="none",
        headings=("x", "y"), rows=[("0", HOSTILE)],
    )  # fmt: skip
    (zero, half, missing, far), frame = chart.points, chart.frame
    assert half.text == f"{HOSTILE}; 1 more in the same place"
    assert chart.diagonal == (frame.left, zero.y, frame.right, far.y), "from 0 to 1 on both axes"
    assert far.y == frame.top < half.high < half.y < half.low < zero.y < chart.missing_above < missing.y < frame.bottom
    assert [point.shape for point in chart.points] == ["dot", "dot", "cross", "edge"]
    assert chart.y_ticks[-1] == (missing.y, "none")
    page = write(points=chart)
    with chromium.open(page.as_uri(), width=400, dark=True) as tab:
        assert tab.evaluate("[...document.querySelectorAll('.chart circle')].map(e => e.textContent)")[1] == half.text
        assert (tab.accessibility(), tab.errors) == ([], [])
        assert tab.measure(400)["out"] == []


@pytest.mark.parametrize("ends", [(0, 0), (5, 5), (-1e-5, -1e-5), (0.6931471805599453, 0.6931471805599454), (0, 3e38)])
def test_axes_have_two_ends(ends: tuple[float, float]) -> None:
    numbers = round_numbers(*ends)
    assert numbers[0] <= ends[0] <= ends[1] <= numbers[-1]
    assert numbers[0] < numbers[-1]
    assert 2 <= len(numbers) <= 8


def test_few_points_start_at_zero_and_few_points_have_marks() -> None:
    chart = line_chart("evaluation: mae", {"age": [(960, 7.5)], "sex": []}, text="", last=1000, few=True)
    assert (chart.linear.low, chart.has_marks, [line.name for line in chart.lines]) == (0, True, ["age"])
    chart = line_chart("accuracy", {"sex": [(9, 0.75)]}, text="", last=9, chance={"sex": 0.5}, ends=(0, 1), few=True)
    assert (chart.linear.low, chart.linear.high, chart.lines[0].level) == (0, 1, 0.5)
    noise = [(step, float(step % 7 == 0) * step) for step in range(100_000)]
    (line,) = line_chart("loss", {"": noise}, text="", last=100_000).lines
    assert len(line.points) < 2000
    assert max(value for _, value in line.points) == max(value for _, value in noise)


def test_histograms_have_axes_and_numbers(write: Callable[..., Path], chromium: Browser) -> None:
    rng = np.random.default_rng(0)
    values = {"train": rng.normal(500, 80, 300), HOSTILE: [*rng.normal(500, 80, 20), np.nan]}
    plot = histogram_of("mean intensity", values, axis="intensity (a.u.)", counted="volumes")
    assert plot is not None
    assert plot.counts.totals == (300, 20)
    assert len(plot.counts.rows) == 20
    assert plot.x_ticks[0][0] >= plot.frame.left
    heights = [bar.height for bar in plot.bars if bar.set_index == 1]
    counts = [row[1] for _, row in plot.counts.rows if row[1]]
    np.testing.assert_allclose(np.divide(heights, counts), heights[0] / counts[0])
    page = write(
        plots=[plot], counts=count_table("answers", {"a": {HOSTILE: 3}, "b": {}}, axis="answer", counted="rows")
    )
    with chromium.open(page.as_uri(), width=400) as tab:
        text = tab.evaluate("document.documentElement.outerHTML")
        assert tab.measure(400)["out"] == []
    assert "intensity (a.u.)</text>" in text
    assert "% of volumes</text>" in text
    assert text.count("<rect") == len(plot.bars) + 2 * 20 + 2  # and those in the tables of both


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 2.0, 2.2, 2.0], [("2", (3,)), ("2.2", (1,))]),
        ([0.5, 40.5], ["0.5 to 2.5", "38.5 to 40.5"]),  # measured numbers seldom repeat
        ([np.nan, np.inf, 1e308, -1e308], None),
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


def test_bins_of_whole_numbers_hold_as_many_numbers_each() -> None:
    plot = histogram_of("age", {"train": np.arange(20.0, 92)}, axis="age", counted="subjects")
    assert plot is not None
    assert [name for name, _ in plot.counts.rows][::17] == ["20 to 23", "88 to 91"]
    assert {counts for _, counts in plot.counts.rows} == {(4,)}
    plot = histogram_of("large", {"train": np.array([-8e149, *range(20), 9e149])}, axis="a", counted="b")
    assert plot is not None
    assert sum(counts[0] for _, counts in plot.counts.rows) == 22


def test_the_navigation_stays_on_a_phone_in_one_line_that_follows_the_reader(tmp_path: Path, chromium: Browser) -> None:
    names = [f"a section with number {i}" for i in range(9)]
    links = "".join(f'<a href="#s{i}">{name}</a>' for i, name in enumerate(names))
    text = "line\n" * 60
    parts = "".join(f'<h2 id="s{i}">{name}</h2><pre>{text}</pre>' for i, name in enumerate(names))
    body = f'<main><h1>Long</h1><nav aria-label="sections">{links}</nav>{parts}</main>'
    (tmp_path / "template.html").write_text(
        TEMPLATE.split("{% block body %}")[0] + f"{{% block body %}}{body}{{% endblock %}}"
    )
    render_page(tmp_path / "template.html", tmp_path / "page.html", script=True, scans=None)
    with chromium.open((tmp_path / "page.html").as_uri(), width=400) as tab:
        for number in (4, 7):  # into the middle of a section, as by a long jump
            tab.evaluate(
                f"document.querySelector('#s{number} + pre').scrollIntoView({{block: 'center', behavior: 'instant'}})"
            )
            tab.wait(f"document.querySelector('nav [aria-current]')?.hash === '#s{number}'", 10)
        nav, link = (
            tab.evaluate(
                f"(({{left, right, top, height}}) => [left, right, top, height])({found}.getBoundingClientRect())"
            )
            for found in ("document.querySelector('nav')", "document.querySelector('nav [aria-current]')")
        )
        assert nav[2] == 0, "it stays at the top"
        assert nav[3] < 50, "one line"
        assert nav[0] <= link[0] < link[1] <= nav[1], "the name of the section is in view"
        assert tab.evaluate("document.documentElement.scrollWidth") == 400
        assert tab.accessibility() == []


def test_pages_without_a_script_allow_none(tmp_path: Path) -> None:
    (tmp_path / "template.html").write_text('{% extends "pages.html" %}{% block body %}a{% endblock %}')
    render_page(tmp_path / "template.html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert not re.search("script-src|<script", text)
    assert "default-src 'none'" in text
