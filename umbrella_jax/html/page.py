"""Write HTML pages: single files that contain everything they show, and open anywhere, also offline.

A page makes no request. Its policy (`Content-Security-Policy` in `pages.html`) allows its styles and scripts by their
hashes, and nothing else; everything is legible without the scripts. The parts that pages share:

    parts.html      macros: data_table, count_table, histogram, line_chart, point_chart, mosaics, scan_panel
    tables.py       the values of `data_table`: a table to sort and filter
    axes.py         axes of all charts
    charts.py       the values of `count_table` and `histogram`, which compare sets
    curves.py       the values of `line_chart`: curves over steps
    points.py       the values of `point_chart`: marks over two axes
    mosaics.py      the values of `mosaics`: pictures of all slices, for readers without the script
    scan_panels.py  the values of `scan_panel`: scans to scroll through
    page.js         tables, charts, and scans: unpacks NiiVue when the first scan comes into view
    style.css       sizes, spaces and colours of every page, light and dark, also of `serve`
    viewer.js       `openPanel`: a scan with its overlay in NiiVue (vendor/), with controls
"""

import base64
import gzip
import hashlib
import importlib.util
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from umbrella_jax.errors import Faults
from umbrella_jax.html.scan_panels import PageScans
from umbrella_jax.io.files import PRIVATE, check_output, write_whole

PRIVACY = "contains participant data (pictures, names, answers): handle it like the scans"
PACKAGES = ("pillow",)
"""Packages of the extra `report`."""
_MODULES = {"pillow": "PIL"}
"""{package: its module}, if they have different names."""
_NIIVUE = Path(__file__).parent / "vendor" / "niivue.umd.js"


def page_faults(flag: str, file: Path, packages: Sequence[str], *, rewrite: bool = False) -> list[str]:
    """Return why a page cannot be written, so that a command can check before it does any work.

    Args:
        flag: the command-line option that names `file`.
        packages: packages that the page needs.
        rewrite: whether `file` may exist already.
    """
    faults = Faults()
    if missing := [name for name in packages if not _installed(_MODULES.get(name, name))]:
        faults.append(f"{flag}: {' and '.join(missing)} not installed; pip install 'umbrella-jax[report]'")
    if file.is_dir() or not file.parent.is_dir():
        faults.append(f"{flag} {file}: expected the name of a file in a directory that exists")
    elif file.is_file() and not rewrite:
        faults.append(f"{flag} {file}: already exists; choose another file, or remove it")
    else:
        with faults:
            check_output(file, f"choose another file ({flag} FILE)", folder=False)
    return faults


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def render_page(
    template: Path, file: Path, *, script: bool = False, scans: PageScans | None = None, **values: Any
) -> None:
    """Render a template that extends `pages.html` and write the page.

    Args:
        template: file of the template. It may import macros from `parts.html`.
        file: where to write.
        script: whether the page has tables to sort, charts or scans, which need `page.js`.
        scans: the scans that the page contains; if there are any, it also contains NiiVue, once.
        values: of the template; texts, never markup.
    """
    import jinja2

    folder = Path(__file__).parent
    loader = jinja2.FileSystemLoader([template.parent, folder])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page, scripts, niivue = environment.get_template(template.name), [], ""
    if scans is not None and scans.contents:
        build = _NIIVUE.read_bytes()
        niivue = base64.b64encode(gzip.compress(build, mtime=0)).decode()
        scripts = [(folder / "viewer.js").read_text(encoding="utf-8")]
    if script:
        scripts.append((folder / "page.js").read_text(encoding="utf-8"))
    program = "\n".join(["", *scripts]) if scripts else ""
    style = f"\n{(folder / 'style.css').read_text(encoding='utf-8')}"
    values |= {
        "privacy": PRIVACY,
        "scans": scans,
        "niivue": niivue,
        "program": program,
        "style": style,
        "style_hash": _digest(style.encode()),
        "script_hashes": [_digest(program.encode()), *([_digest(build)] if niivue else [])] if program else [],
    }
    text = page.render(values)
    # a text from JSON may hold half a surrogate pair, which UTF-8 cannot encode
    write_whole(file, text.encode("utf-8", errors="xmlcharrefreplace"), PRIVATE)


def _digest(content: bytes) -> str:
    """Return a hash as a page's policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"


def png(image: Any) -> str:
    """Return a data URL with a PIL image."""
    out = BytesIO()
    image.save(out, "PNG", optimize=True)
    return data_url("image/png", out.getvalue())


def data_url(kind: str, content: bytes) -> str:
    """Return a data URL with `content` of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
