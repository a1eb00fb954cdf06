"""Count categories and numbers per set, as tables with bars and as histograms, which macros of `parts.html` draw.

Sets differ in size, so bars are percentages of their set. Every histogram comes with a table of its counts, for people
who do not see it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from umbrella_jax.html.axes import FRAME, Axis, PlotFrame, logarithmic_numbers, round_numbers, uncrowded

_LARGEST = 1e150
"""Size of the largest number of a histogram: the range of larger ones may be infinite."""
_WIDEST = 40
"""Most pixels across a bar."""
_DISTINCT = 12
"""Distinct numbers up to which each has a bar of its own, if they are whole or each occurs twice on average."""
_LOGARITHMIC = 100
"""Ratio of the largest to the smallest number from which the axis is logarithmic."""


@dataclass(frozen=True)
class CountTable:
    """How often each category occurs in each set."""

    title: str
    axis: str
    """Name of the categories, with a unit: `answer`, `voxel size (mm)`."""
    counted: str
    """Noun in the plural: `volumes`."""
    sets: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    """A category and its count in each set."""

    @property
    def totals(self) -> tuple[int, ...]:
        """Sum of the counts of each set."""
        return tuple(sum(counts[i] for _, counts in self.rows) for i in range(len(self.sets)))

    @property
    def percentages(self) -> list[tuple[float, ...]]:
        """Counts of each row as percentages of their set, 0 in an empty set."""
        return [
            tuple(100 * n / max(total, 1) for n, total in zip(counts, self.totals, strict=True))
            for _, counts in self.rows
        ]


@dataclass(frozen=True)
class HistogramBar:
    """A bar, in pixels."""

    x: float
    y: float
    width: float
    height: float
    set_index: int
    """Index of its set, which decides the colour."""
    text: str
    """Set, interval and count in words, for a tooltip."""


@dataclass(frozen=True)
class Histogram:
    """A histogram, ready to draw."""

    counts: CountTable
    bars: tuple[HistogramBar, ...]
    x_ticks: tuple[tuple[float, str], ...]
    """Pixels from the left, and the number there."""
    y_ticks: tuple[tuple[float, str], ...]
    """Pixels from the top, and the percentage there."""
    logarithmic: bool
    """Whether the horizontal axis is logarithmic."""
    frame: PlotFrame = FRAME


def count_table(title: str, counts: Mapping[str, Mapping[str, int]], *, axis: str, counted: str) -> CountTable:
    """Return the table of {set: {category: count}}; categories are in the order in which they first appear."""
    names = dict.fromkeys(category for of_set in counts.values() for category in of_set)
    rows = tuple((name, tuple(of_set.get(name, 0) for of_set in counts.values())) for name in names)
    return CountTable(title, axis, counted, tuple(counts), rows)


def histogram_of(
    title: str, values: Mapping[str, Sequence[float] | np.ndarray], *, axis: str, counted: str, bins: int = 20
) -> Histogram | None:
    """Lay out a histogram that compares sets, with a bar for each number if there are few different ones.

    The axis is logarithmic if all numbers are above 0 and the largest is at least 100 times the smallest.

    Args:
        title: of the histogram.
        values: {set: numbers}. Those that are not finite, or beyond ±1e150, are left out.
        axis: name of the numbers and their unit, such as `TR (s)`.
        counted: noun in the plural, such as `volumes`.
        bins: number of intervals; fewer for whole numbers with a smaller range.

    Returns:
        The histogram, None if no number is finite.
    """
    arrays = {name: np.asarray(row, np.float64) for name, row in values.items()}
    arrays = {name: row[np.abs(row) < _LARGEST] for name, row in arrays.items()}
    pooled = np.concatenate([*arrays.values(), []])
    distinct = np.unique(pooled)
    if not len(distinct):
        return None
    low, high = float(distinct[0]), float(distinct[-1])
    integers = bool((distinct == distinct.round()).all())
    if len(distinct) <= _DISTINCT and (integers or len(pooled) >= 2 * len(distinct) or len(distinct) == 1):
        counts = {name: [int(np.sum(row == value)) for value in distinct] for name, row in arrays.items()}
        names = [f"{value:.0f}" if integers else f"{value:.4g}" for value in distinct]
        ticks, logarithmic = [(i + 0.5, name) for i, name in enumerate(names)], False
    else:
        logarithmic = low > 0 and high / low >= _LOGARITHMIC
        whole = integers and not logarithmic
        edges = np.geomspace(low, high, bins + 1) if logarithmic else np.linspace(low, high, bins + 1)
        edges[0], edges[-1] = low, high  # geomspace rounds
        if whole:  # as many numbers in each bin, since a bin of four would stand out beside one of three
            span = int(high - low) + 1
            in_a_bin = -(-span // bins)
            edges = low + float(in_a_bin) * np.arange(-(-span // in_a_bin) + 1, dtype=np.float64)
            edges[-1] = max(edges[-1], high)  # numbers beyond 2**53 are rounded
        counts = {name: np.histogram(row, edges)[0].tolist() for name, row in arrays.items()}
        names = [f"{a:g}" if whole and b - a == 1 else f"{a:.4g} to {b - whole:.4g}" for a, b in pairwise(edges)]
        scale: Callable[[np.ndarray], np.ndarray] = np.log if logarithmic else np.asarray
        marks = (logarithmic_numbers if logarithmic else round_numbers)(low, high)
        marks = [mark for mark in marks if low <= mark <= high]
        places = np.interp(scale(np.array(marks)), scale(edges), np.arange(len(edges)))
        ticks = [(float(place), f"{mark:,g}") for place, mark in zip(places, marks, strict=True)]
    rows = tuple((name, tuple(row[i] for row in counts.values())) for i, name in enumerate(names))
    table = CountTable(title, axis, counted, tuple(arrays), rows)
    return _lay_out(table, ticks, logarithmic)


def _lay_out(table: CountTable, ticks: Sequence[tuple[float, str]], logarithmic: bool) -> Histogram:
    """Place bars and ticks; `ticks` are (position, text), with 0 at the left of the first bar and 1 at its right."""
    frame, percentages = FRAME, table.percentages
    axis = Axis.linear(0, max(map(max, percentages)))
    slot = (frame.right - frame.left) / len(table.rows)
    width = min(0.9 * slot / len(table.sets), _WIDEST)
    bars = [
        HistogramBar(
            x=frame.left + slot * (i + 0.5) + width * (j - len(table.sets) / 2),
            y=axis.y(percentages[i][j], frame),
            width=width,
            height=frame.bottom - axis.y(percentages[i][j], frame),
            set_index=j,
            text=f"{of_set}, {name}: {count:,} of {table.totals[j]:,} {table.counted}",
        )
        for i, (name, counts) in enumerate(table.rows)
        for j, (of_set, count) in enumerate(zip(table.sets, counts, strict=True))
        if count
    ]
    x_ticks = uncrowded([(frame.left + slot * place, text) for place, text in ticks])
    y_ticks = tuple((axis.y(mark, frame), text) for mark, text in axis.ticks)
    return Histogram(table, tuple(bars), x_ticks, y_ticks, logarithmic)
