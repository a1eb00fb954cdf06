"""Pages for people: one HTML file each that holds all it shows, without scripts. It opens anywhere, offline too."""

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
"""Of the extra `report`."""
_MODULES = {"pillow": "PIL"}  # that are not called as their package


def page_faults(flag: str, file: Path, packages: Sequence[str], *, rewrite: bool = False) -> list[str]:
    """Return why a page cannot be written, before any work is done for it; `flag` is what names `file`, and `rewrite`
    whether it may be there already."""
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
    """Renders a template, which extends `pages.html`. Whatever `values` hold is text, never markup."""
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.get_template(template.name).render(privacy=PRIVACY, **values)
    # JSON may hold half a surrogate pair
    write_whole(file, text.encode("utf-8", errors="xmlcharrefreplace"), PRIVATE)


def png(image: Any) -> str:
    """A PIL image as a URL that holds it."""
    out = BytesIO()
    image.save(out, "PNG", optimize=True)
    return data_url("image/png", out.getvalue())


def data_url(kind: str, content: bytes) -> str:
    """A URL that holds `content`, of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
