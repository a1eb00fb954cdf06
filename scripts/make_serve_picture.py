#!/usr/bin/env python
"""Make README's picture of the page of `umbrella-jax serve`, from the demo.

    umbrella-jax demo && python scripts/make_serve_picture.py

Serves the demo's run, opens a held-out scan in Chromium, asks where the lesion
is, with and without the scan, and lays the explanation over the scan. Needs the
extra `dev`. Run it after each change to how the page looks.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.helpers.devtools import Browser, Tab

OUT = Path(__file__).parents[1] / "docs" / "images" / "serve.webp"
SCAN, TASK = "sub-321 anat", "lesion_side"
WIDTH, HEIGHT = 1280, 880


def main() -> None:
    """Read the arguments and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default docs/images/serve.webp")
    arguments = parser.parse_args()
    words = ["serve", arguments.demo / "run", "--data", arguments.demo / "data" / "eval.json", "--port", 0]
    program = [sys.executable, "-m", "umbrella_jax.cli", *map(str, words)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = next(line.strip() for line in server.stdout if line.startswith("http://"))
            with Browser() as browser, browser.open(url, width=WIDTH, height=HEIGHT) as tab:
                _use(tab)
                with tempfile.TemporaryDirectory() as folder:
                    picture = tab.screenshot(Path(folder) / "page.png")
                    Image.open(picture).convert("RGB").save(arguments.out, quality=88, method=6)
        finally:
            server.terminate()


def _use(tab: Tab) -> None:
    """Open a scan, ask about it, and explain the answer."""
    tab.wait("document.querySelector('#known option')")
    assert tab.evaluate("document.querySelector('#gaps').hidden"), tab.text("#gaps")
    tab.type("#search", SCAN)
    tab.choose("#known", tab.wait("document.querySelector('#known option').value"))
    tab.click("#show-known")
    tab.wait("document.querySelector('.panel-readout')?.textContent")
    tab.choose("#task", TASK)
    tab.click("#send")
    tab.wait("document.querySelector('.actions:not([hidden])')")
    tab.click(".actions button")  # without the scan
    tab.wait("document.querySelector('.likelihoods thead tr').cells.length === 4")
    tab.click(".actions .row button")  # why
    tab.wait("document.querySelector('.panel-bar:not([hidden])')")
    tab.choose('.panel input[aria-label="map from"]', "60")
    tab.evaluate("document.querySelector('.open-scan').scrollIntoView(), document.activeElement.blur()")
    tab.evaluate("document.querySelector('.turns').scrollTo(0, 0)")
    tab.evaluate("new Promise((drawn) => setTimeout(drawn, 500))")


if __name__ == "__main__":
    main()
