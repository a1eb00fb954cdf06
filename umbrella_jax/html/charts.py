"""Count categories and numbers per set, as tables with bars and as histograms, which macros of `parts.html` draw.

Sets differ in size, so bars are percentages of their set. Every histogram comes with a table of its counts, for people
who do not see it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 376, 190
"""Size of a histogram in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 44
"""Pixels between its edges and the plot, for ticks and names of the axes."""
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
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


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
        values: {set: numbers}. Those that are not finite are left out.
        axis: name of the numbers and their unit, such as `TR (s)`.
        counted: noun in the plural, such as `volumes`.
        bins: number of intervals; fewer for whole numbers with a smaller range.

    Returns:
        The histogram, None if no number is finite.
    """
    arrays = {name: np.asarray(row, np.float64) for name, row in values.items()}
    arrays = {name: row[np.isfinite(row)] for name, row in arrays.items()}
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
        if whole:
            edges = np.unique(np.linspace(low, high + 1, min(bins, int(high - low) + 1) + 1).round())
        edges[0], edges[-1] = low, high + whole  # geomspace rounds
        counts = {name: np.histogram(row, edges)[0].tolist() for name, row in arrays.items()}
        names = [f"{a:g}" if whole and b - a == 1 else f"{a:.4g} to {b - whole:.4g}" for a, b in pairwise(edges)]
        scale: Callable[[np.ndarray], np.ndarray] = np.log if logarithmic else np.asarray
        marks = [mark for mark in (powers_of_ten if logarithmic else round_numbers)(low, high) if low <= mark <= high]
        places = np.interp(scale(np.array(marks)), scale(edges), np.arange(len(edges)))
        ticks = [(float(place), f"{mark:,g}") for place, mark in zip(places, marks, strict=True)]
    rows = tuple((name, tuple(row[i] for row in counts.values())) for i, name in enumerate(names))
    table = CountTable(title, axis, counted, tuple(arrays), rows)
    return _lay_out(table, ticks, logarithmic)


def _lay_out(table: CountTable, ticks: Sequence[tuple[float, str]], logarithmic: bool) -> Histogram:
    """Place bars and ticks; `ticks` are (position, text), with 0 at the left of the first bar and 1 at its right."""
    percentages = table.percentages
    marks = round_numbers(0, max(map(max, percentages)))
    slot, per_percent = (WIDTH - _RIGHT - _LEFT) / len(table.rows), (HEIGHT - _TOP - _BOTTOM) / marks[-1]
    width, bottom = min(0.9 * slot / len(table.sets), _WIDEST), HEIGHT - _BOTTOM
    bars = [
        HistogramBar(
            x=_LEFT + slot * (i + 0.5) + width * (j - len(table.sets) / 2),
            y=bottom - percentages[i][j] * per_percent,
            width=width,
            height=percentages[i][j] * per_percent,
            set_index=j,
            text=f"{of_set}, {name}: {count:,} of {table.totals[j]:,} {table.counted}",
        )
        for i, (name, counts) in enumerate(table.rows)
        for j, (of_set, count) in enumerate(zip(table.sets, counts, strict=True))
        if count
    ]
    x_ticks = tuple((_LEFT + slot * place, text) for place, text in ticks)
    y_ticks = tuple((bottom - mark * per_percent, f"{mark:g}") for mark in marks)
    return Histogram(table, tuple(bars), x_ticks, y_ticks, logarithmic)


def round_numbers(low: float, high: float) -> list[float]:
    """Return 3 to 8 multiples of 1, 2 or 5 times a power of ten, which enclose `low` and `high`."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= span)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def powers_of_ten(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`, thinned to at most 7."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [10.0**i for i in range(first, last + 1, (last - first) // 7 + 1)]
