"""Put the evidence about a run into words: how sure it is, whether it needs the scan, and its limitations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from umbrella_jax.config.schema import lower_is_better
from umbrella_jax.console import plural
from umbrella_jax.report.facts import Facts
from umbrella_jax.scoring.bootstrap import Figure
from umbrella_jax.scoring.metrics import short
from umbrella_jax.scoring.paired_scores import PredictorScore, format_difference, format_p
from umbrella_jax.scoring.reliance import ControlFigures
from umbrella_jax.scoring.tasks import with_unit

FEW = 30
"""Number of subjects below which bootstrap intervals are too narrow."""
WIDE = 0.2
"""Width of an interval of a share of answers that leaves much open."""
_ALPHA = 0.05
"""Largest p, corrected, that counts as a difference."""
_WITHOUT_SCAN = ("blank", "noise", "shuffled")
"""Controls that take the scan away, the first one first on the page."""


@dataclass(frozen=True)
class TaskSummary:
    """The main figure of a task, in the words of the page's first screen."""

    name: str
    metric: str
    """With its unit."""
    figure: Figure
    certainty: str
    scan: str
    """Whether the answers need the scan."""
    baseline: str
    """Whether simple models do as well."""
    is_share: bool
    """Whether the figure is a share of answers."""
    needs_scan: bool | None
    """Whether the figure is worse without the scan; None if no such control was run."""
    verdict: str
    """What a control shows under which the figure is not worse; empty if there is none."""


def task_summaries(facts: Facts) -> list[TaskSummary]:
    """Return a summary of each task that has a main figure."""
    return [_task_summary(facts, task) for task in facts.compared.predictors]


def abstract(facts: Facts) -> str:
    """Return sentences about the training data and the questions."""
    train = facts.data.get("train", {})
    learnt = ""
    if "conversations" in train:
        people = f" about {plural(train['subjects'], 'subject')}" if train["subjects"] else ""
        learnt = f"The model was trained on {plural(train['conversations'], 'conversation')}{people}. "
    where = f"after step {facts.step} ({facts.step_reason})" if facts.step is not None else "from a file of predictions"
    asked = f"{plural(len(facts.rows), 'question')} of {plural(len(facts.scores.tasks), 'task')}"
    return f"{learnt}It was asked {asked} about {plural(facts.num_subjects, 'subject')}; the answers are those {where}."


def limitations(facts: Facts) -> Iterator[str]:
    """Yield a sentence for each thing that the evidence lacks."""
    summaries = task_summaries(facts)
    for component, why in facts.untrained.items():
        yield f"The {component} is untrained ({why}): the answers mean nothing."
    if not any(facts.controls.controls.values()):
        yield (
            "No control without the scan was run, so nothing shows that the answers come from the images "
            "(evaluation.controls, or predict --control)."
        )
    elif all(controls.keys() == {"blank"} for controls in facts.controls.controls.values()):
        yield "The only control is blank volumes, which no scan resembles; shuffled shows another subject's."
    if not facts.baselines:
        yield "No baseline was given, so a small model may do as well (umbrella-jax baseline RUN)."
    if few := {one.name: one.figure.subjects for one in summaries if one.figure.subjects < FEW}:
        counts = ", ".join(f"{name} {count}" for name, count in few.items())
        yield f"Few subjects ({counts}): with fewer than {FEW}, the intervals are too narrow."
    if none := [one.name for one in summaries if one.figure.low is None]:
        yield f"No interval: {', '.join(none)}."
    if guessing := [one.name for one in summaries if _may_be_chance(one.figure)]:
        yield f"The interval contains chance, so the model may be guessing: {', '.join(guessing)}."
    if wide := {one.name: width for one in summaries if (width := _width(one.figure)) > WIDE and one.is_share}:
        yield f"Wide intervals: {', '.join(f'{name} {short(width)}' for name, width in wide.items())}."
    asked = facts.data.get("eval", {}).get("conversations")
    if facts.step is not None and asked and len(facts.rows) < asked:
        yield f"Only {len(facts.rows):,} of {asked:,} evaluation conversations were asked (train.eval_samples)."
    if facts.step_reason.startswith("best "):
        yield "The step was chosen as the best on these same answers, so its figures are optimistic."
    if facts.config.data.allow_overlap:
        yield "Subjects or scans may be in both training and evaluation data (data.allow_overlap)."
    yield "This is one training run; the intervals do not contain the variance between runs (train --seeds)."


def _task_summary(facts: Facts, task: str) -> TaskSummary:
    predictors = facts.compared.predictors[task]
    metric, figure = facts.compared.metrics[task], predictors[0].figure
    controls = facts.controls.controls.get(task, {})
    removing = [one for one in predictors if one.role == "control" and one.name in _WITHOUT_SCAN]
    useless = next((one for one in removing if not _is_worse(one, metric)), None)
    verdict = controls[useless.name].verdict if useless else ""
    if useless and controls[useless.name].metric is None:
        values = f"{short(useless.figure.value)} under {useless.name} and {short(figure.value)} with the scans"
        verdict = f"{metric} is {values}; {verdict}"
    return TaskSummary(
        name=task,
        metric=with_unit(facts.scores.tasks[task], metric),
        figure=figure,
        certainty=_certainty(figure),
        scan=_reliance(controls),
        baseline=_baseline(facts.compared.best_baseline(task), metric, any_given=bool(facts.baselines)),
        is_share=metric == "accuracy",
        needs_scan=useless is None if removing else None,
        verdict=verdict,
    )


def _may_be_chance(figure: Figure) -> bool:
    if figure.chance is None or figure.low is None or figure.high is None:
        return False
    return figure.low <= figure.chance <= figure.high


def _width(figure: Figure) -> float:
    return 0.0 if figure.low is None or figure.high is None else figure.high - figure.low


def _certainty(figure: Figure) -> str:
    parts = []
    if figure.low is not None and figure.high is not None:
        parts.append(f"95 % interval {short(figure.low)} to {short(figure.high)}, {short(_width(figure))} wide")
    if figure.chance is not None:
        parts.append(f"chance {short(figure.chance)}")
    parts.append(f"{plural(figure.n, 'answer')} about {plural(figure.subjects, 'subject')}")
    return "; ".join(parts)


def _reliance(controls: Mapping[str, ControlFigures]) -> str:
    """Return the reliance under the first control that has an interval, otherwise under the first."""
    reliances = {name: controls[name].reliance for name in (*_WITHOUT_SCAN, *controls) if name in controls}
    if not reliances:
        return "no control without the scan was run"
    sure = (name for name, reliance in reliances.items() if reliance is not None and reliance.low is not None)
    control = next(sure, next(iter(reliances)))
    own, reliance = controls[control], reliances[control]
    if own.metric is None:
        return f"{short(own.changed.value)} of the answers change ({control}); reliance is of accuracy and mae only"
    if own.true is not None and _may_be_chance(own.true):
        return f"reliance on the scan unknown: the figure may be chance ({control})"
    if reliance is None or reliance.value is None:
        return f"reliance on the scan undefined ({control})"
    interval = "" if reliance.low is None else f", 95 % interval {short(reliance.low)} to {short(reliance.high)}"
    return f"reliance on the scan {short(reliance.value)}{interval} ({control})"


def _baseline(best: PredictorScore | None, metric: str, *, any_given: bool) -> str:
    if best is None or best.difference is None:
        return "no baseline answers this task" if any_given else "no baseline was given"
    apart, p = best.difference.figure, best.difference.p_holm
    relation = "not clearly different from"
    if p is not None and p < _ALPHA and apart.value is not None:
        relation = "better than" if (apart.value < 0) == bool(lower_is_better(metric)) else "worse than"
    interval = "" if apart.low is None else f" ({short(apart.low)} to {short(apart.high)})"
    difference = f"difference {format_difference(apart.value)}{interval}, p {format_p(p)}"
    return f"{relation} the best baseline, {best.name} {short(best.figure.value)}; {difference}"


def _is_worse(control: PredictorScore, metric: str) -> bool:
    """Return whether a figure is worse under a control, by the interval of the difference if there is one."""
    if control.difference is None:
        return False
    apart, lower = control.difference.figure, lower_is_better(metric)
    end = apart.high if lower else apart.low
    farthest = apart.value if end is None else end
    return farthest is not None and (farthest < 0 if lower else farthest > 0)
