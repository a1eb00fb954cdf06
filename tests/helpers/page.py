"""What stands in the page of a run."""

import base64
import html
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Page(HTMLParser):
    """Its elements, its embedded numbers, and those in its cells."""

    def __init__(self, file: Path):
        super().__init__()
        self.text = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(self.text)
        self.numbers: Any = json.loads(re.findall(r'id="numbers">(.*?)</script>', self.text)[0])
        self.titles = [html.unescape(re.sub("<.*?>", "", title)) for title in re.findall("<h3>(.*?)</h3>", self.text)]
        self.cells: dict[tuple[str, str, str], tuple[float, str]] = {}
        """{(task, figure, whose): value and text}"""
        self.counts: dict[str, list[int]] = {}
        """{task: its confusion, row by row}"""
        for section in re.findall("<section>(.*?)</section>", self.text, re.DOTALL):
            task = re.findall("<h3.*?>(.*?)(?: [(].*)?</h3>", section)[0]
            self.counts[task] = [int(count) for count in re.findall('data-count="(.*?)"', section)]
            cell = '<td data-figure="(.*?)" data-of="(.*?)" data-value="(.*?)".*?>(.*?)</td>'
            for figure, of, value, text in re.findall(cell, section, re.DOTALL):
                self.cells[task, figure, of] = (float(value or "nan"), re.sub("<.*?>", "", text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def read_picture(url: str) -> np.ndarray:
    """Return the pixels of a `data:` URL, uint8 [height, width, 3]."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))
