"""Lay out curves over steps, which the macro `line_chart` of `parts.html` draws as SVG.

Without the page's script a chart is a picture with its numbers in words. The script adds a slider that reads the values
at a step, smoothing, a logarithmic axis, and buttons that hide curves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbrella_jax.html.axes import FRAME, Axis, PlotFrame, round_numbers, uncrowded
from umbrella_jax.io.files import strict_json

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
class LineChart:
    """Curves over steps, ready to draw."""

    title: str
    text: str
    """The ends of the curves in words."""
    lines: tuple[ChartLine, ...]
    has_marks: bool
    """Whether each point has a mark, because there are few."""
    steps: Axis
    """The horizontal axis."""
    linear: Axis
    logarithmic: Axis | None
    """None if the values do not need it or are not above 0."""
    starts_logarithmic: bool
    frame: PlotFrame = FRAME

    @property
    def values(self) -> Axis:
        """The vertical axis that is drawn at first."""
        return self.logarithmic if self.logarithmic and self.starts_logarithmic else self.linear

    def x(self, step: float) -> float:
        """Return a step's distance from the left in pixels."""
        return self.steps.x(step, self.frame)

    def y(self, value: float) -> float:
        """Return a value's distance from the top in pixels, within the chart."""
        return self.values.y(value, self.frame)

    @property
    def x_ticks(self) -> tuple[tuple[float, str], ...]:
        """(pixels from the left, step)"""
        return uncrowded([(self.x(step), text) for step, text in self.steps.ticks])

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """(pixels from the top, value)"""
        return [(self.y(value), text) for value, text in self.values.ticks]

    def path(self, line: ChartLine) -> str:
        """Return the SVG path of a line."""
        return "M" + "L".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in line.points)

    def to_json(self) -> str:
        """Return what the page's script needs to draw it again."""
        frame, scales = self.frame, {"linear": self.linear, "logarithmic": self.logarithmic}
        return strict_json(
            {
                "box": [frame.left, frame.right, frame.top, frame.bottom],
                "last": self.steps.high,
                "marks": self.has_marks,
                "start": "logarithmic" if self.values.is_logarithmic else "linear",
                "scales": {name: _scale(axis) for name, axis in scales.items() if axis},
                "lines": [{"name": line.name, "points": line.points, "level": line.level} for line in self.lines],
            }
        )


def line_chart(
    title: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    text: str,
    last: int,
    chance: Mapping[str, float] | None = None,
    ends: tuple[float, float] | None = None,
    few: bool = False,
    starts_logarithmic: bool = False,
) -> LineChart:
    """Lay out a chart with a line per label.

    Args:
        title: of the chart.
        curves: {label: (step, value)}; finite numbers.
        text: the ends of the curves in words.
        last: last step of the run, so that all charts have the same axis.
        chance: {label: value to compare with}.
        ends: of the vertical axis; default around the values, and from 0 if there are few above it.
        few: mark each point.
        starts_logarithmic: draw the logarithmic axis at first, if there is one.
    """
    chance, last = chance or {}, max(last, 1)
    lines = tuple(ChartLine(name, _thinned(points), chance.get(name)) for name, points in curves.items() if points)
    values = [value for line in lines for _, value in line.points]
    values += [line.level for line in lines if line.level is not None]
    low, high = ends or (min(values), max(values))
    if few and low > 0:
        low = 0.0  # otherwise an axis around a single evaluation shows next to nothing
    logarithmic = None
    if min(values) > 0 and max(values) >= _LOGARITHMIC * min(values):
        logarithmic = Axis.logarithmic(min(values) / 1.1, max(values) * 1.1)
    marks = [step for step in round_numbers(0, last) if step <= last and step == int(step)]
    steps = Axis(0, last, tuple((step, f"{int(step):,}") for step in marks))
    return LineChart(title, text, lines, few, steps, Axis.linear(low, high), logarithmic, starts_logarithmic)


def _scale(axis: Axis) -> dict[str, Any]:
    return {"low": axis.low, "high": axis.high, "ticks": axis.ticks}


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
    """Return all points, or the lowest and highest of each of many stretches."""
    if len(points) <= _MOST_POINTS:
        return tuple(points)
    kept: list[tuple[float, float]] = [points[0]]
    for part in np.array_split(np.arange(len(points)), _MOST_POINTS // 2):
        stretch = [points[i] for i in part]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return (*kept, points[-1])
