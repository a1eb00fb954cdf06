"""Axes of charts: where a number is in pixels, and the round numbers beside it. Every chart of a page uses them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

_LETTER = 6.5
"""Pixels across a digit at an axis."""


@dataclass(frozen=True)
class PlotFrame:
    """Size of a chart in pixels, as wide as a phone, and the rectangle between its axes, from the left and the top."""

    width: int = 376
    height: int = 220
    left: int = 62
    top: int = 12

    @property
    def right(self) -> int:
        """Right end of the horizontal axis."""
        return self.width - 14

    @property
    def bottom(self) -> int:
        """Lower end of the vertical axis; its ticks and name are below."""
        return self.height - 44


FRAME = PlotFrame()
"""The frame of most charts."""


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis."""

    low: float
    """Number at the left or bottom end."""
    high: float
    """Number at the other end, above `low`."""
    ticks: tuple[tuple[float, str], ...]
    """(number, text)"""
    is_logarithmic: bool = False

    @classmethod
    def linear(cls, low: float, high: float) -> Self:
        """Return an axis that starts and ends at round numbers around `low` and `high`."""
        marks = round_numbers(low, high)
        return cls(marks[0], marks[-1], tuple((mark, _tick_text(mark)) for mark in marks))

    @classmethod
    def logarithmic(cls, low: float, high: float) -> Self:
        """Return a logarithmic axis from `low`, above 0, to `high`."""
        return cls(low, high, tuple((mark, _tick_text(mark)) for mark in logarithmic_numbers(low, high)), True)

    def share(self, value: float) -> float:
        """Return how far a number is from the low end: 0 there, 1 at the high end, and within both if it is beyond."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low)

    def x(self, value: float, frame: PlotFrame) -> float:
        """Return the pixels from the left at which a horizontal axis has a number."""
        return frame.left + (frame.right - frame.left) * self.share(value)

    def y(self, value: float, frame: PlotFrame) -> float:
        """Return the pixels from the top at which a vertical axis has a number."""
        return frame.bottom - (frame.bottom - frame.top) * self.share(value)


def _tick_text(value: float) -> str:
    return f"{value:,g}"


def round_numbers(low: float, high: float) -> list[float]:
    """Return 2 to 8 multiples of 1, 2 or 5 times a power of ten, which enclose `low` and `high`.

    Numbers that differ by less than a millionth of their size count as equal: no axis could name its ends.
    """
    span = high - low
    if span <= 1e-6 * max(abs(low), abs(high)):
        span = max(abs(low), abs(high)) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= span)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def logarithmic_numbers(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`, at most 7; if they are fewer than three, also 2 and 5 times each."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last - first >= 2:
        return [10.0**i for i in range(first, last + 1, (last - first) // 7 + 1)]
    numbers = (float(f"{factor}e{i}") for i in range(first - 1, last + 1) for factor in (1, 2, 5))
    return [number for number in numbers if low <= number <= high]


def uncrowded(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Return the ticks whose texts do not touch the one before them.

    Args:
        ticks: (pixels from the left, text), from left to right.
    """
    kept: list[tuple[float, str]] = []
    end = -math.inf
    for x, text in ticks:
        half = _LETTER * (len(text) + 1) / 2
        if x - half >= end:
            kept.append((x, text))
            end = x + half
    return tuple(kept)
