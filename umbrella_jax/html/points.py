"""Lay out marks over two axes, which the macro `point_chart` of `parts.html` draws as SVG: calibration, and answers
over truths.

Every chart has its numbers in a table to unfold, for people who do not see it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from umbrella_jax.html.axes import Axis, PlotFrame, uncrowded

_FRAME = PlotFrame(height=330, left=72, top=28)
_BELOW = 22
"""Pixels from the horizontal axis up to the row of marks without a value."""


@dataclass(frozen=True)
class Point:
    """A mark, in the units of the axes."""

    x: float
    y: float | None
    """None if there is no value: the mark is a cross in a row of its own."""
    text: str
    """Its numbers in words, for a tooltip."""
    label: str = ""
    """Written beside the mark."""
    radius: float = 4.0
    """In pixels."""
    low: float | None = None
    high: float | None = None
    """Ends of a vertical interval; None without one."""


Shape = Literal["dot", "cross", "edge"]
"""A value, no value, or one beyond the ends of the axis, where its mark is."""


@dataclass(frozen=True)
class PlacedPoint:
    """A mark, in pixels."""

    x: float
    y: float
    text: str
    label: str
    radius: float
    low: float | None
    high: float | None
    shape: Shape


@dataclass(frozen=True)
class PointChart:
    """Marks over two axes with a diagonal, ready to draw."""

    title: str
    text: str
    """What the chart shows, below it."""
    x_name: str
    y_name: str
    """With their units."""
    points: tuple[PlacedPoint, ...]
    x_ticks: tuple[tuple[float, str], ...]
    """Pixels from the left, and the number there."""
    y_ticks: tuple[tuple[float, str], ...]
    """Pixels from the top, and the number there."""
    diagonal: tuple[float, float, float, float]
    """x and y in pixels of both ends of the line on which both axes have the same number."""
    missing_above: float | None
    """Pixels from the top of the line that divides the row of crosses from the rest; None without crosses."""
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The numbers as a table; none if the page has them elsewhere."""
    frame: PlotFrame = _FRAME


def point_chart(
    title: str,
    points: Sequence[Point],
    *,
    text: str,
    x_name: str,
    y_name: str,
    axis: Axis,
    missing: str = "",
    headings: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
) -> PointChart:
    """Lay out a chart whose axes have the same unit.

    Points that would cover each other are one mark, whose tooltip counts them.

    Args:
        title: of the chart.
        points: the marks.
        text: what the chart shows.
        x_name, y_name: names of the axes, with units.
        axis: of both numbers. The marks of numbers beyond its ends are at the edge.
        missing: name of the row of points without a value.
        headings, rows: the numbers as a table.
    """
    frame, has_missing = _FRAME, any(point.y is None for point in points)
    upper = replace(frame, height=frame.height - 2 * _BELOW) if has_missing else frame

    def place(point: Point) -> PlacedPoint:
        y = frame.bottom - _BELOW / 2 if point.y is None else axis.y(point.y, upper)
        low, high = (None if end is None else axis.y(end, upper) for end in (point.low, point.high))
        x = axis.x(point.x, frame)
        shape: Shape = "cross" if point.y is None else "dot" if axis.low <= point.y <= axis.high else "edge"
        return PlacedPoint(x, y, point.text, point.label, point.radius, low, high, shape)

    placed: dict[tuple[int, int, Shape], PlacedPoint] = {}
    counts: Counter[tuple[int, int, Shape]] = Counter()
    for point in map(place, points):
        key = round(point.x), round(point.y), point.shape
        placed.setdefault(key, point)
        counts[key] += 1
    marks = [_counted(point, counts[key]) for key, point in placed.items()]
    x_ticks = uncrowded([(axis.x(number, frame), name) for number, name in axis.ticks])
    y_ticks = [(axis.y(number, upper), name) for number, name in axis.ticks]
    if has_missing:
        y_ticks.append((frame.bottom - _BELOW / 2, missing))
    ends_of_diagonal = frame.left, axis.y(axis.low, upper), frame.right, axis.y(axis.high, upper)
    return PointChart(
        title,
        text,
        x_name,
        y_name,
        tuple(marks),
        x_ticks,
        tuple(y_ticks),
        ends_of_diagonal,
        frame.bottom - _BELOW if has_missing else None,
        tuple(headings),
        tuple(tuple(row) for row in rows),
        frame,
    )


def _counted(point: PlacedPoint, count: int) -> PlacedPoint:
    if count == 1:
        return point
    return replace(point, text=f"{point.text}; {count - 1:,} more in the same place")
