"""Make README's picture from a report of the demo: its first screen, and a scan with its map in a panel.

umbrella-jax report runs/demo/run --samples 10 --explain integrated --out report.html
python scripts/readme_picture.py report.html
"""

import argparse
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from tests.helpers.devtools import Browser

OUT = Path(__file__).parents[1] / "docs" / "images" / "report.webp"
WIDTH = 1000
"""Pixels of the window, in which the page has the layout of a desktop."""
GAP = 12
"""Pixels between the parts."""
_SCAN = "[...document.querySelectorAll('article:not(.failed)')].find(e => e.innerText.includes('lesion_side ·'))"
"""The first conversation about a lesion with the right answer."""


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report of the demo's run, with a right answer about a lesion")
    parser.add_argument("--out", type=Path, default=OUT, help="picture to write")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder, Browser() as browser:
        file = Path(folder) / "window.png"
        with browser.open(arguments.report.resolve().as_uri(), width=WIDTH, height=1000) as tab:
            height = tab.evaluate("document.querySelector('.result').getBoundingClientRect().bottom + 16")
            first = Image.open(BytesIO(tab.screenshot(file).read_bytes())).crop((0, 0, WIDTH, int(height)))
            tab.evaluate(f"{_SCAN}.scrollIntoView({{behavior: 'instant'}})")
            tab.wait(f"{_SCAN}.querySelector('.scan.is-open')")
            tab.evaluate(
                f"document.querySelector('nav').remove(), {_SCAN}.querySelector('.facts').remove()"
            )  # its path
            tab.evaluate(f"{_SCAN}.scrollIntoView({{behavior: 'instant'}})")
            tab.evaluate("new Promise((done) => setTimeout(done, 1000))")  # the panel draws in the next frames
            top, bottom = tab.evaluate(f"(b => [b.top, b.bottom])({_SCAN}.getBoundingClientRect())")
            scan = Image.open(BytesIO(tab.screenshot(file).read_bytes()))
            scan = scan.crop((0, max(int(top), 0), WIDTH, min(int(bottom), scan.height)))
    picture = Image.new("RGB", (WIDTH, first.height + GAP + scan.height), "white")
    picture.paste(first, (0, 0))
    picture.paste(scan, (0, first.height + GAP))
    picture.save(arguments.out, quality=85, method=6)


if __name__ == "__main__":
    main()
