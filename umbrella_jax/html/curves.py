"""Lay out curves over steps, which the macro `line_chart` of `parts.html` draws as SVG.

Without the page's script a chart is a picture with its numbers in words. The script adds a slider that reads the values
at a step, smoothing, and a logarithmic axis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from umbrella_jax.html.charts import powers_of_ten, round_numbers
from umbrella_jax.io.files import strict_json

WIDTH, HEIGHT = 376, 230
"""Size of a chart in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40
_MOST_POINTS = 1500
"""Points of a line. Of more, the lowest and the highest of each stretch are drawn, which looks the same."""
_LOGARITHMIC = 20
"""Ratio of the largest to the smallest number from which a chart offers a logarithmic axis."""


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(step, value)"""
    level: float | None
    """A value to compare with, drawn as a dotted line: chance."""


@dataclass(frozen=True)
class AxisScale:
    """One way to draw the values: linear or logarithmic."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class LineChart:
    """Curves over steps, ready to draw."""

    title: str
    text: str
    """The ends of the curves in words."""
    lines: tuple[ChartLine, ...]
    has_marks: bool
    """Whether each point has a mark, because there are few."""
    last: float
    """Step at the right end."""
    x_ticks: tuple[float, ...]
    linear: AxisScale
    logarithmic: AxisScale | None
    """None if the values do not need it or are not above 0."""
    starts_logarithmic: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM

    @property
    def scale(self) -> AxisScale:
        """The scale that is drawn at first."""
        return self.logarithmic if self.logarithmic and self.starts_logarithmic else self.linear

    def x(self, step: float) -> float:
        """Return a step's distance from the left in pixels."""
        return self.left + (self.right - self.left) * step / self.last

    def y(self, value: float) -> float:
        """Return a value's distance from the top in pixels, within the chart."""
        low, high, at = self.scale.low, self.scale.high, value
        if self.scale is self.logarithmic:
            low, high, at = np.log((low, high, max(value, low)))
        share = (at - low) / (high - low)
        return self.bottom - (self.bottom - self.top) * min(max(share, 0), 1)

    def path(self, line: ChartLine) -> str:
        """Return the SVG path of a line."""
        return "M" + "L".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in line.points)

    def to_json(self) -> str:
        """Return what the page's script needs to draw it again."""
        scales = {"linear": self.linear, "logarithmic": self.logarithmic}
        return strict_json(
            {
                "box": [self.left, self.right, self.top, self.bottom],
                "last": self.last,
                "marks": self.has_marks,
                "start": "logarithmic" if self.scale is self.logarithmic else "linear",
                "scales": {
                    name: {"low": scale.low, "high": scale.high, "ticks": scale.ticks}
                    for name, scale in scales.items()
                    if scale
                },
                "lines": [{"name": line.name, "points": line.points, "level": line.level} for line in self.lines],
            }
        )


def line_chart(
    title: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    text: str,
    last: int,
    chance: Mapping[str, float],
    few: bool,
) -> LineChart:
    """Lay out a chart with a line per label.

    Args:
        title: of the chart. The axis of an accuracy is 0 to 1, that of other evaluations starts at 0.
        curves: {label: (step, value)}; finite numbers.
        text: the ends of the curves in words.
        last: last step of the run, so that all charts have the same axis.
        chance: {label: value to compare with}.
        few: mark each point.
    """
    lines = tuple(ChartLine(name, _thinned(points), chance.get(name)) for name, points in curves.items() if points)
    values = [value for line in lines for _, value in line.points] + [v for line in lines if (v := line.level)]
    low, high = min(values), max(values)
    if title.endswith("accuracy"):
        low, high = 0.0, 1.0
    elif few and low > 0:
        low = 0.0  # otherwise an axis around a single evaluation shows next to nothing
    marks = round_numbers(low, high)
    linear = AxisScale(marks[0], marks[-1], tuple((mark, f"{mark:,g}") for mark in marks))
    positive = [value for value in values if value > 0]
    logarithmic = None
    if len(positive) == len(values) and max(values) >= _LOGARITHMIC * min(values):
        ends = min(values) / 1.1, max(values) * 1.1
        logarithmic = AxisScale(*ends, tuple((mark, f"{mark:g}") for mark in powers_of_ten(*ends)))
    steps = tuple(step for step in round_numbers(0, max(last, 1)) if step <= max(last, 1) and step == int(step))
    starts = title == "gradient norm"
    return LineChart(title, text, lines, few, max(last, 1), steps, linear, logarithmic, starts)


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
    """Return all points, or the lowest and highest of each of many stretches."""
    if len(points) <= _MOST_POINTS:
        return tuple(points)
    kept: list[tuple[float, float]] = [points[0]]
    for part in np.array_split(np.arange(len(points)), _MOST_POINTS // 2):
        stretch = [points[i] for i in part]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return (*kept, points[-1])
