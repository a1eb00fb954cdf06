"""Lay out the charts of a run: curves, calibration, and answers over truths."""

import math
from collections.abc import Iterator, Mapping, Sequence

from umbrella_jax.console import plural
from umbrella_jax.html.axes import Axis
from umbrella_jax.html.curves import LineChart, line_chart
from umbrella_jax.html.points import Point, PointChart, point_chart
from umbrella_jax.report.facts import Bin, Facts
from umbrella_jax.rundir import points
from umbrella_jax.scoring.metrics import short
from umbrella_jax.scoring.number_calibration import CalibratedLevel
from umbrella_jax.scoring.tasks import headline, with_unit

Points = list[tuple[int, float]]
"""(step, value)"""
GRADIENT_NORM = "gradient norm"
_SHARES = Axis.linear(0, 1)


def curves(facts: Facts) -> Iterator[tuple[str, dict[str, Points]]]:
    """Yield (title, {label: points}) of each diagram over the steps."""
    loss = {"training": points(facts.lines, "loss"), "evaluation": points(facts.lines, "eval_loss")}
    yield "loss", {name: values for name, values in loss.items() if values}
    yield GRADIENT_NORM, {"": points(facts.lines, "grad_norm")}
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


def curve_charts(facts: Facts) -> list[LineChart]:
    """Return a chart for each diagram over the steps that has points."""
    last, chance = max((int(line["step"] or 0) for line in facts.lines), default=0), chances(facts)
    return [_curve_chart(title, lines, last, chance) for title, lines in curves(facts) if any(lines.values())]


def _curve_chart(title: str, lines: Mapping[str, Points], last: int, chance: Mapping[str, float]) -> LineChart:
    is_evaluation = title.startswith("evaluation")
    levels = chance if is_evaluation else {}
    return line_chart(
        title,
        lines,
        text=_in_words(lines, levels),
        last=last,
        chance=levels,
        ends=(0.0, 1.0) if title.endswith("accuracy") else None,
        few=is_evaluation,
        starts_logarithmic=title == GRADIENT_NORM,
    )


def _in_words(lines: Mapping[str, Points], chance: Mapping[str, float]) -> str:
    """Return the ends of curves as text, for readers who cannot see them or want the numbers."""

    def ends(values: Points) -> str:
        both = dict([values[0], values[-1]])
        return ", ".join(f"{short(value)} at step {step}" for step, value in both.items())

    texts = [f"{name} {ends(values)}".strip() for name, values in lines.items() if values]
    if known := [f"{name} {short(chance[name])}" for name in lines if name in chance]:
        texts.append(f"chance (dotted): {', '.join(known)}")
    return "; ".join(texts)


def calibration_chart(bins: Sequence[Bin]) -> PointChart:
    """Chart accuracy over confidence; a calibrated model is on the diagonal. The area of a mark counts its answers."""
    total = sum(b.count for b in bins)
    return point_chart(
        "Calibration",
        [
            Point(
                b.confidence,
                b.accuracy,
                f"probability {short(b.confidence)}, correct {short(b.accuracy)} of {b.count:,} answers",
                label=f"{b.count:,}",
                radius=3 + 7 * math.sqrt(b.count / total),
            )
            for b in bins
        ],
        text="Fraction of correct answers over their probability. Numbers and areas count the answers. Below the "
        "dashed line, the model is too sure.",
        x_name="probability of the answer",
        y_name="fraction correct",
        axis=_SHARES,
        headings=("probability", "fraction correct", "answers"),
        rows=[(short(b.confidence), short(b.accuracy), f"{b.count:,}") for b in bins],
    )


def coverage_chart(levels: Sequence[CalibratedLevel]) -> PointChart | None:
    """Chart the fraction of truths in a model's intervals over the probability that the model gives to them, with 95 %
    intervals; a calibrated model is on the diagonal. Return None if no fraction is known."""
    known = [(one, f) for one in levels if (f := one.coverage).value is not None]
    if not known:
        return None
    rows = [
        (short(one.mass), short(f.value), "" if f.low is None else f"{short(f.low)} to {short(f.high)}")
        for one, f in known
    ]
    marks = [
        Point(one.mass, f.value, f"probability {mass}, truths inside {inside} ({interval})", low=f.low, high=f.high)
        for (one, f), (mass, inside, interval) in zip(known, rows, strict=True)
    ]
    return point_chart(
        "Calibration of the intervals",
        marks,
        text="Fraction of truths inside the model's intervals at 10 % to 95 %, with 95 % intervals over subjects. "
        "Below the dashed line, the model's intervals are too narrow.",
        x_name="probability of the interval",
        y_name="fraction of truths inside",
        axis=_SHARES,
        headings=("probability", "truths inside", "95 % interval"),
        rows=rows,
    )


def number_chart(pairs: Sequence[tuple[float, float | None]], unit: str | None) -> PointChart:
    """Chart answers over truths with the diagonal, and answers without a number as crosses in a row of their own.

    An answer that is farther from all truths than they are from each other is at the edge: it would leave no room for
    the others.
    """
    in_unit = f" ({unit})" if unit else ""
    truths, answers = [truth for truth, _ in pairs], [answer for _, answer in pairs if answer is not None]
    low, high = min(truths), max(truths)
    span = (high - low) or abs(low) or 1.0
    near = [answer for answer in answers if low - span <= answer <= high + span]
    axis = Axis.linear(min([low, *near]), max([high, *near]))
    notes = ["An answer on the dashed line is right; the table of answers has each."]
    if far := sum(not axis.low <= answer <= axis.high for answer in answers):
        notes.append(f"Hollow at the edge: {plural(far, 'answer')} beyond the axis.")
    if len(answers) < len(pairs):
        notes.append("Crosses in the lowest row: answers without a number.")
    return point_chart(
        "Answered against true",
        [
            Point(truth, answer, f"true {truth:g}, answered {'no number' if answer is None else f'{answer:g}'}")
            for truth, answer in pairs
        ],
        text=" ".join(notes),
        x_name=f"true{in_unit}",
        y_name=f"answered{in_unit}",
        axis=axis,
        missing="no number",
    )
