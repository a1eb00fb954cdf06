"""Write HTML pages: single files without scripts that contain everything they show, and open anywhere, also offline."""

import base64
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


def render_page(template: Path, file: Path, **values: Any) -> None:
    """Render a template that extends `pages.html` and write the page. All `values` are text, never markup."""
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.get_template(template.name).render(privacy=PRIVACY, **values)
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
