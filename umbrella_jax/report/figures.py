"""Collect the curves of a run, and draw calibration and predicted against true as SVG."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

from umbrella_jax.html.page import data_url
from umbrella_jax.report.facts import BINS, Bin, Facts
from umbrella_jax.rundir import points
from umbrella_jax.scoring.number_calibration import CalibratedLevel
from umbrella_jax.scoring.tasks import headline, with_unit

_SIZE = (4.3, 2.9)  # inches; as wide as a phone, so a diagram is never scaled down much
Points = list[tuple[int, float]]
"""(step, value)"""


def curves(facts: Facts) -> Iterator[tuple[str, dict[str, Points]]]:
    """Yield (title, {label: points}) of each diagram over the steps."""
    loss = {"training": points(facts.lines, "loss"), "evaluation": points(facts.lines, "eval_loss")}
    yield "loss", {name: values for name, values in loss.items() if values}
    yield "gradient norm", {"": points(facts.lines, "grad_norm")}
    yield "learning rate", {"": points(facts.lines, "learning_rate")}
    by_metric: dict[str, dict[str, Points]] = {}
    for name, task in facts.scores.tasks.items():
        metric = headline(task.metrics)
        by_metric.setdefault(with_unit(task, metric), {})[name] = points(facts.lines, f"eval_{metric}/{name}")
    for title, by_task in by_metric.items():
        if any(by_task.values()):
            yield f"evaluation: {title}", by_task


def chances(facts: Facts) -> dict[str, float]:
    """Return {task: chance of its headline metric} for the tasks that have one."""
    figures = {
        name: facts.scores.task_figures(name).get(headline(task.metrics)) for name, task in facts.scores.tasks.items()
    }
    return {name: figure.chance for name, figure in figures.items() if figure and figure.chance is not None}


def draw_calibration(bins: Sequence[Bin]) -> str:
    """Draw accuracy over confidence; a calibrated model is on the diagonal. The area of a mark counts its answers."""
    figure, axes = _axes("probability of the answer", "fraction correct")
    axes.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="--")
    total = sum(b.count for b in bins)
    sizes = [20 + 300 * b.count / total for b in bins]
    axes.scatter([b.confidence for b in bins], [b.accuracy for b in bins], s=sizes, alpha=0.8, clip_on=False)
    for b in bins:
        axes.annotate(str(b.count), (b.confidence, b.accuracy), (0, 9), textcoords="offset points", fontsize=8)
    axes.set_xticks([i / BINS for i in range(0, BINS + 1, 2)])
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.12))
    return _svg(figure)


def draw_coverage(levels: Sequence[CalibratedLevel]) -> str:
    """Draw the share of truths in a model's intervals over the probability that the model gives to them, with 95 %
    intervals; a calibrated model is on the diagonal."""
    figure, axes = _axes("probability of the interval", "fraction of truths inside")
    axes.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="--")
    points_of = [(one.mass, one.coverage) for one in levels if one.coverage.value is not None]
    ends = [(x, f.value if f.low is None else f.low, f.value if f.high is None else f.high) for x, f in points_of]
    axes.vlines([x for x, *_ in ends], [low for _, low, _ in ends], [high for *_, high in ends], alpha=0.5)
    axes.scatter([x for x, _ in points_of], [f.value for _, f in points_of], s=20, clip_on=False)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return _svg(figure)


def draw_numbers(pairs: Sequence[tuple[float, float | None]], unit: str | None) -> str:
    """Draw answers over truths, the diagonal, and answers without a number as crosses in a row of their own below."""
    figure, axes = _axes(f"true ({unit})" if unit else "true", f"answered ({unit})" if unit else "answered")
    known = [(truth, answer) for truth, answer in pairs if answer is not None]
    values = [truth for truth, _ in pairs] + [answer for _, answer in known]
    ends = [min(values), max(values)]
    below = ends[0] - 0.15 * ((ends[1] - ends[0]) or 1)
    axes.plot(ends, ends, color="#999", linewidth=1, linestyle="--")
    axes.scatter([truth for truth, _ in known], [answer for _, answer in known], s=16, alpha=0.7)
    if none := [truth for truth, answer in pairs if answer is None]:
        axes.scatter(none, [below] * len(none), s=24, marker="x", color="#b00020")
        axes.axhline((ends[0] + below) / 2, color="#bbb", linewidth=0.8)
        ticks = [tick for tick in axes.get_yticks() if ends[0] <= tick <= ends[1]]
        axes.set_yticks([*ticks, below], [*(f"{tick:g}" for tick in ticks), "no number"])
    return _svg(figure)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any) -> str:
    """Return the figure as a data URL; equal numbers give equal bytes."""
    import matplotlib

    out = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "umbrella-jax"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return data_url("image/svg+xml", out.getvalue())
