"""Tables, sentences and progress lines for a terminal."""

import shlex
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from umbrella_jax.errors import visible

WIDTH = 80
"""Columns of a terminal."""
_LABEL = 40
"""Widest first column, unless the caller says otherwise."""


def table_lines(
    rows: Iterable[str | Sequence[str]], min_widths: Sequence[int] = (), *, width: int = WIDTH
) -> list[str]:
    """Return the lines of a table: its first column aligned left, the others right.

    A row that is a string is a line of its own, as is a first cell that is longer than its column. Columns that do not
    fit into `width` follow in further blocks, each with the first column. Control characters are escaped.

    Args:
        min_widths: smallest width of each column, including the space before it. The first column is never wider,
            and narrower if the others need the room. Default: as wide as the cells, with two spaces between
            columns.
    """
    shown = [visible(row, kept="") if isinstance(row, str) else [visible(c, kept="") for c in row] for row in rows]
    cells = [row for row in shown if not isinstance(row, str)]
    label, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if min_widths:
        widths = [max(wanted, longest + 1) for wanted, longest in zip(min_widths[1:], widths, strict=True)]
        label = max(min(min_widths[0], width - sum(widths)), 0)
    else:
        widths, label = [longest + 2 for longest in widths], min(label, _LABEL)
    blocks: list[list[int]] = [[]]
    for i, own in enumerate(widths):
        if blocks[-1] and label + sum(widths[j] for j in blocks[-1]) + own > width:
            blocks.append([])
        blocks[-1].append(i)
    lines = list[str]()
    for number, block in enumerate(blocks):
        lines += [""] if number else []
        for row in shown:
            if isinstance(row, str):
                lines += wrapped(row)
                continue
            *above, first = wrapped(row[0])
            if len(first) > label:
                above, first = [*above, first], ""
            numbers = "".join(row[1 + i].rjust(widths[i]) for i in block)
            lines += [*above, f"{first:<{label}}{numbers}".rstrip()]
    return lines


def wrapped(line: str) -> list[str]:
    """Wrap a line at `WIDTH` and indent its continuation; a word without spaces, such as a path, stays whole.

    An empty line stays one line.
    """
    indent = " " * (len(line) - len(line.lstrip()))
    options: dict[str, Any] = {"initial_indent": indent, "subsequent_indent": f"{indent}  "}
    return textwrap.wrap(line.lstrip(), WIDTH, break_long_words=False, break_on_hyphens=False, **options) or [""]


def command_lines(command: str, flags: Mapping[str, str | Path]) -> list[str]:
    """Return a command over several lines that a person can paste into a shell.

    Args:
        command: its words without flags, quoted.
        flags: {flag without `--`: value}.
    """
    lines = [command]
    for flag in (f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()):
        if len(lines[-1]) + len(flag) < WIDTH - 4:  # the caller indents it, and ` \\` follows
            lines[-1] += f" {flag}"
        else:
            lines[-1] += " \\"
            lines.append(f"  {flag}")
    return lines


def plural(number: int, noun: str) -> str:
    """Return `1 subject` or `2 subjects`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


INTERVAL = 30.0
"""Seconds between progress lines in a log, or on stderr if that is not a terminal, which would show a bar."""
_RECENT = 50
"""Number of newest steps or batches over which rates are averaged."""


@dataclass(frozen=True)
class Work:
    """The work of one step or batch."""

    samples: int
    """Number of conversations, without empty rows."""
    tokens: int
    """Number of positions without padding, plus generated tokens."""
    flops: float = 0.0
    """FLOP of the whole shape, padding included; 0 if they are not counted."""


class Progress:
    """A progress bar on a terminal, and progress lines elsewhere.

    Rates leave out steps that compiled; the remaining time is measured by the clock.

    Args:
        unit: name of what is counted, such as `step`; it starts the line.
        done: how much of the total is done already.
        say: receives a line every `INTERVAL` seconds if there is no bar; it should print and log the line.
        log: receives the same lines if there is a bar; it should only log them.
        always: also send a line at the first and at the last count, whatever the time.
        peak: FLOP/s of all devices together.
        memory: returns a device's `memory_stats`, or None if its backend has none.
        quiet: show no bar, as in all processes but the first.
    """

    def __init__(
        self,
        unit: str,
        total: int,
        *,
        done: int = 0,
        say: Callable[[str], None],
        log: Callable[[str], None],
        always: bool = False,
        peak: float | None = None,
        memory: Callable[[], Mapping[str, Any] | None] = lambda: None,
        quiet: bool = False,
    ):
        from tqdm import tqdm  # slow to import; commands that only print need no progress bar

        self._unit, self._total, self._done, self._always = unit, total, done, always
        self._peak, self._memory = peak, memory
        self.latest = ""
        """Latest result, such as an evaluation's; part of the line."""
        self._recent: deque[tuple[Work, float]] = deque(maxlen=_RECENT)
        self._began, self._counted, self._elapsed = done, 0, 0.0
        self._last = self._printed = time.perf_counter()
        # the bar has a fixed width; the rest is its description, which tqdm cuts to the terminal's width
        options: dict[str, Any] = {"bar_format": "{bar:10} {desc}", "dynamic_ncols": True, "leave": always}
        self._bar = tqdm(total=total, initial=done, disable=True if quiet else None, **options)
        self._line = say if self._bar.disable else log

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int, work: Work, seconds: float, *, compiled: bool, loss: float | None = None) -> None:
        """Advance by `count`. Their `work` took this many `seconds`; if that includes compiling, rates leave it out."""
        now = time.perf_counter()
        first = self._done == self._began
        self._done += count
        if not compiled:
            self._recent.append((work, seconds))
            self._counted += count
            self._elapsed += now - self._last
        self._last = now
        ends = self._always and (first or self._done >= self._total)
        due = ends or now - self._printed >= INTERVAL
        if due or not self._bar.disable:
            text = self.text(loss)
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(count)
            if due:
                self._line(text)
                self._printed = now

    def count(self) -> None:
        """Advance by one file or picture, which has neither samples nor tokens."""
        self.advance(1, Work(samples=0, tokens=0), 0.0, compiled=False)

    def text(self, loss: float | None = None) -> str:
        """Return the progress line, without the parts that are not known."""
        parts = [f"{self._unit} {self._done:,} of {self._total:,}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if self._counted and self._done < self._total:  # before the rates: a narrow terminal cuts the line
            left = self._elapsed / self._counted * (self._total - self._done)
            parts.append(f"{timedelta(seconds=round(left))} left")
        if self.latest:
            parts.append(self.latest)
        seconds = sum(seconds for _, seconds in self._recent)
        if seconds > 0:
            work = [work for work, _ in self._recent]
            for name in ("samples", "tokens"):
                rate = sum(getattr(w, name) for w in work) / seconds
                parts.append(f"{rate:,.0f} {name}/s" if rate >= 100 else f"{rate:.3g} {name}/s")
            flops = sum(w.flops for w in work)
            if self._peak and flops:
                parts.append(f"{flops / seconds / self._peak:.0%} of peak")
        if stats := self._memory():
            parts.append(_memory_text(stats))
        return "  ".join(parts)


def _memory_text(stats: Mapping[str, Any]) -> str:
    """Return a device's memory: in use between two steps, the peak so far, and the total."""
    used, most, limit = (stats.get(name) for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit"))
    text = f"memory {(used or 0) / 1e9:.1f}"
    text += "" if most is None else f", at most {most / 1e9:.1f}"
    return text + ("" if limit is None else f" of {limit / 1e9:.1f}") + " GB"
