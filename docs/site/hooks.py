"""Add to the site the pages that are not files of docs/, and turn links for GitHub into links within the site.

`mkdocs.yml` names this module under `hooks`; MkDocs calls the functions by their names.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside docs/, by their place in the site."""
LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:)(?P<path>[^()\s#]+)(?P<anchor>#[^()\s]+)?\)")


def modules() -> dict[str, str]:
    """Return {source file: page in the site} for every public module, relative to the project and to the site."""
    found = {}
    for package in ("umbrella_jax", "convert"):
        for file in sorted((ROOT / package).rglob("*.py")):
            path = file.relative_to(ROOT)
            parts = path.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not any(part.startswith("_") for part in name.split(".")):
                found[str(path)] = f"reference/{name}.md"
    return found


def on_config(config: Any, **_: Any) -> Any:
    """List the modules in the navigation, folded by package."""
    tree: dict[str, Any] = {}
    for page in modules().values():
        name = page.removeprefix("reference/").removesuffix(".md")
        folder = ".".join(name.split(".")[:2]) if name.startswith("umbrella_jax.") else name.split(".")[0]
        tree.setdefault(folder, []).append({name.removeprefix(f"{folder}."): page})
    entries = [pages[0] if len(pages) == 1 else {folder: pages} for folder, pages in tree.items()]
    config["nav"].append({"Reference": entries})
    return config


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add README, the changelog, one page per module, and the files that pages link to."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page in modules().values():
        name = page.removeprefix("reference/").removesuffix(".md")
        files.append(File.generated(config, page, content=f"::: {name}\n"))
    linked = set[Path]()
    for page in [*(ROOT / name for name in ELSEWHERE), *(ROOT / "docs").glob("*.md")]:
        linked |= {(page.parent / link["path"]).resolve() for link in LINK.finditer(page.read_text())}
    for file in sorted(linked):
        path = str(file.relative_to(ROOT))
        if file.is_file() and place(path) == f"files/{path}":
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(file)))
    return files


def place(path: str) -> str:
    """Return where the site has a file of the project; both paths are relative."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return ELSEWHERE.get(path) or modules().get(path) or f"files/{path}"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links of README and docs/ to their places in the site."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    folder = ROOT if here in ELSEWHERE.values() else ROOT / "docs"

    def moved(link: re.Match[str]) -> str:
        target = (folder / link["path"]).resolve()
        if target.is_dir():  # the site has none
            return link["text"]
        return f"[{link['text']}]({place(str(target.relative_to(ROOT)))}{link['anchor'] or ''})"

    return LINK.sub(moved, markdown)
