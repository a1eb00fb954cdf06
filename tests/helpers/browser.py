"""Headless Chromium as a reader's browser: pictures of a page, and how it is laid out."""

import base64
import html
import json
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# What sticks out at the right, but for what scrolls within its own box, and pictures that did not load.
_MEASURE = """
  const out = [...document.querySelectorAll("body *")].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre"));
  const boxes = [...document.querySelectorAll(".scroll, pre")];
  return {
    width: innerWidth, whole: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    out: out.map(e => e.outerHTML.slice(0, 90)),
    boxes: boxes.filter(e => e.scrollWidth > e.clientWidth + 1).length,
    cut: boxes.filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == "visible").length,
    pictures: [...document.images].map(e => [e.naturalWidth, e.clientWidth]),
    tallest: Math.max(0, ...[...document.querySelectorAll("tr")].map(e => e.clientHeight)),
    smallest: Math.min(...[...document.querySelectorAll("p, td, th, dd, figcaption")].map(e =>
      parseFloat(getComputedStyle(e).fontSize))),
  };
"""


def _chromium(page: Path, *flags: str) -> str:
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    assert program, "no Chromium to look at the page with; apt-get install chromium-headless-shell"
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]  # CI is root, which has no sandbox
    words = [program, *common, "--host-resolver-rules=MAP * ~NOTFOUND", *flags, page.as_uri()]
    run = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def dump(page: Path, *flags: str, until: str = "") -> str:
    """The page's elements after its own scripts ran, as the browser writes them; tried again until they contain a text.

    Images are decoded beside the virtual time, which may end before a busy machine is done.
    """
    dumped = ""
    for _ in range(5):
        dumped = _chromium(page, *flags, "--virtual-time-budget=10000", "--dump-dom")
        if until in dumped:
            break
    return dumped


def evaluate(page: Path, script: str, width: int = 1280, *, paper: bool = False) -> Any:
    """What the body of an async function returns in the loaded page, in a window of this many pixels or as on paper.

    The page's policy would forbid the script, so a copy without it is opened.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    call = f"""<script>addEventListener("load", async () => {{
      const result = await (async () => {{ {script} }})().catch(error => ({{error: String(error)}}));
      const note = document.createElement("pre");
      note.id = "result";
      note.textContent = JSON.stringify(result);
      document.body.append(note);
    }})</script>"""
    copy = page.with_name(f"evaluated_{page.name}")
    copy.write_text(
        (text.replace("@media print", "@media all") if paper else text).replace("</body>", f"{call}</body>")
    )
    dumped = dump(copy, f"--window-size={width},900", until='<pre id="result">')
    found = re.search(r'<pre id="result">(.*?)</pre>', dumped)
    assert found, dumped[-500:]
    return json.loads(html.unescape(found[1]))


def measure(page: Path, width: int, *, paper: bool = False) -> dict[str, Any]:
    """How a page is laid out in a window of this many pixels, or on paper of this width."""
    result: dict[str, Any] = evaluate(page, _MEASURE, width, paper=paper)
    assert result["width"] == width, result
    return result


def screenshot(page: Path, out: Path, width: int, height: int) -> np.ndarray:
    """The page's first so many pixels, uint8 [height, width, 3]."""
    _chromium(page, f"--window-size={width},{height}", f"--screenshot={out}")
    return np.asarray(Image.open(out).convert("RGB"))


def paper(page: Path, out: Path) -> int:
    """Prints the page as PDF; returns the number of its sheets."""
    _chromium(page, f"--print-to-pdf={out}", "--no-pdf-header-footer")
    return len(re.findall(rb"/Type /Page\b(?!s)", out.read_bytes()))


def picture(url: str) -> np.ndarray:
    """The pixels of a `data:` URL, uint8 [height, width, 3]."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))
