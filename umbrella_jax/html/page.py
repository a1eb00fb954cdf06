"""Write HTML pages: single files that contain everything they show, and open anywhere, also offline.

A page makes no request. Its policy (`Content-Security-Policy` in `pages.html`) allows no script but `page.js`, by its
hash, and only in pages that ask for it; everything is legible without it. The parts that pages share:

    parts.html   macros: data_table, count_table, histogram, slice_viewer
    tables.py    the values of `data_table`: a table to sort and filter
    charts.py    the values of `count_table` and `histogram`, which compare sets
    viewer.py    the values of `slice_viewer`: a volume to scroll through
    page.js      sorts and filters tables, and scrolls through volumes
    style.css    sizes, spaces and colours of every page, light and dark, also of `serve`
    viewer.js    `openPanel`: a scan with its overlay in NiiVue (vendor/), with controls
"""

import base64
import hashlib
import importlib.util
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from umbrella_jax.errors import Faults
from umbrella_jax.io.files import PRIVATE, check_output, write_whole

PRIVACY = "contains participant data (pictures, names, answers): handle it like the scans"
PACKAGES = ("matplotlib", "pillow")
"""Packages of the extra `report`."""
_MODULES = {"pillow": "PIL"}
"""{package: its module}, if they have different names."""


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


def render_page(template: Path, file: Path, *, script: bool = False, **values: Any) -> None:
    """Render a template that extends `pages.html` and write the page.

    Args:
        template: file of the template. It may import macros from `parts.html`.
        file: where to write.
        script: whether the page has tables to sort or volumes to scroll through, which need `page.js`.
        values: of the template; texts, never markup.
    """
    import jinja2

    folder = Path(__file__).parent
    loader = jinja2.FileSystemLoader([template.parent, folder])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    program = f"\n{(folder / 'page.js').read_text()}" if script else ""
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    values |= {"privacy": PRIVACY, "program": program, "program_hash": f"sha256-{digest}"}
    text = environment.get_template(template.name).render(values)
    # a text from JSON may hold half a surrogate pair, which UTF-8 cannot encode
    write_whole(file, text.encode("utf-8", errors="xmlcharrefreplace"), PRIVATE)


def png(image: Any) -> str:
    """Return a data URL with a PIL image."""
    out = BytesIO()
    image.save(out, "PNG", optimize=True)
    return data_url("image/png", out.getvalue())


def data_url(kind: str, content: bytes) -> str:
    """Return a data URL with `content` of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
