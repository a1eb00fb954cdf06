"""Score a model beside its controls and baselines, with paired differences."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from umbrella_jax.config.schema import Metric, lower_is_better
from umbrella_jax.console import plural, table_lines, wrapped
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.scoring.bootstrap import Figure, Resampled, subject_of
from umbrella_jax.scoring.metrics import check_answers, headline_of, resample_parts, short, span, subject_keys
from umbrella_jax.scoring.paired import MCNEMAR, PERMUTATIONS, correct_holm, paired_test
from umbrella_jax.scoring.parse_answer import normalise
from umbrella_jax.scoring.reliance import PARAPHRASE
from umbrella_jax.scoring.seeds import drawn_seeds, mean_over_seeds, sd_over_seeds
from umbrella_jax.scoring.tasks import Prediction, Task, by_task, name_of, with_unit

Answers = Sequence[Sequence[Prediction]]
"""The rows of each seed; one set if there is one seed."""
Role = Literal["model", "control", "baseline"]
BEST = "*"
"""Mark of the best baseline in tables."""
_Key = tuple[Role, str]
_MODEL: _Key = ("model", "model")
_COLUMNS = {False: (22, 8, 16, 9, 18, 7), True: (16, 15, 16, 8, 18, 7)}
"""Widths of a table's columns, without and with several seeds: name, value, interval, difference, interval and p."""
_NAMED = 3
"""Number of conversations that a fault names."""


@dataclass(frozen=True)
class PairedDifference:
    """The model's main figure minus that of another predictor, on the same questions."""

    figure: Figure
    p: float | None
    """Probability of a difference at least as large if there were none; None if the difference is undefined."""
    test: str
    p_holm: float | None
    """p corrected for the number of tasks; None for a baseline that is not the task's best."""


@dataclass(frozen=True)
class PredictorScore:
    """The main figure of one predictor in one task."""

    name: str
    role: Role
    figure: Figure
    sd: float | None
    """Standard deviation over seeds; None for a single seed."""
    difference: PairedDifference | None
    """None for the model itself."""
    is_best: bool
    """Whether it is the baseline with the best figure."""


@dataclass(frozen=True)
class PairedScores:
    """A model beside its controls and baselines, as returned by `compare_predictors`."""

    tasks: Mapping[str, Task]
    metrics: Mapping[str, Metric]
    """{task: its main metric}; without tasks that have none."""
    predictors: Mapping[str, Sequence[PredictorScore]]
    """{task: the model, its controls and its baselines}."""
    notes: tuple[str, ...]
    seeds: int
    """Number of the model's seeds."""
    resamples: int

    def best_baseline(self, task: str) -> PredictorScore | None:
        """Return the baseline with the best figure in a task; None if no baseline answers it."""
        return next((one for one in self.predictors.get(task, ()) if one.is_best), None)

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        columns = _COLUMNS[self.seeds > 1]
        rows: list[str | tuple[str, ...]] = [("", "", "95 % interval", "model −", "95 % interval", "p")]
        for name, predictors in self.predictors.items():
            first = predictors[0].figure
            counts = f"{plural(first.n, 'answer')}, {plural(first.subjects, 'subject')}"
            chance = "" if first.chance is None else f", chance {short(first.chance)}"
            rows.append(f"{name}: {with_unit(self.tasks[name], self.metrics[name])}; {counts}{chance}")
            rows += [_row(one, columns) for one in predictors]
            rows.append("")
        lines = table_lines(rows, columns)
        return "\n".join([*lines, *(line for note in self.notes for line in wrapped(note))])

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; docs/metrics.md documents the keys."""
        return {
            "version": 1,
            "resamples": self.resamples,
            "seeds": self.seeds,
            "notes": list(self.notes),
            "tasks": {
                name: {"metric": self.metrics[name], "predictors": [asdict(one) for one in predictors]}
                for name, predictors in self.predictors.items()
            },
        }


def compare_predictors(
    model: Answers,
    tasks: Mapping[str, Task],
    *,
    controls: Mapping[str, Answers] | None = None,
    baselines: Mapping[str, Sequence[Prediction]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> PairedScores:
    """Compare the main figure of a model in each task with its controls and with baselines.

    A difference is the model's figure minus the other's, on the same questions. Its interval is that of `score`, from
    the same resamples of subjects (and of seeds) for both. `paired_test` gives p. Holm's correction is over the tasks:
    once for the best baseline of each, and once for each control.

    Args:
        model: the model's rows; with several seeds, all to the same questions.
        tasks: the result of `tasks_of`.
        controls: {name: rows under this control}, of one seed or of as many as `model`. Paraphrases, which are several
            questions instead of one, are left out.
        baselines: {name: rows}. A predictor may lack tasks; in a task it has a row for every question of the model.
            Rows with `left_out` have no answer: then the difference is on the other questions.
        resamples: 0 for no intervals.

    Raises:
        DataError: a predictor answers other questions than the model, or as `score`.
    """
    answers: dict[_Key, Answers] = {_MODEL: model}
    answers |= {("control", name): rows for name, rows in (controls or {}).items() if name != PARAPHRASE}
    answers |= {("baseline", name): [rows] for name, rows in (baselines or {}).items()}
    groups = by_task(model[0])
    check_answers(groups, tasks)
    metrics = {name: metric for name, task in tasks.items() if (metric := headline_of(task, groups[name]))}
    narrow = {name: replace(tasks[name], metrics=(metric,)) for name, metric in metrics.items()}
    faults, questions = Faults(), dict[_Key, dict[str, list[int]]]()
    parts: dict[tuple[_Key, _Key, int], dict[str, list[Prediction]]] = {}  # a predictor, on whose questions, its seed
    for key, sets in answers.items():
        for number, rows in enumerate(sets):
            with faults:
                questions[key], parts[key, key, number] = _aligned(rows, groups, narrow, " ".join(dict.fromkeys(key)))
    faults.raise_as(DataError)
    for key, places in questions.items():
        if any(len(which) < len(groups[task]) for task, which in places.items()):
            for number in range(len(model)):
                own = parts[_MODEL, _MODEL, number]
                parts[_MODEL, key, number] = {task: [own[task][i] for i in which] for task, which in places.items()}
    values = resample_parts(parts, groups, narrow, resamples=resamples, seed=seed)
    drawn = drawn_seeds(len(model), resamples, seed)
    predictors: dict[str, list[PredictorScore]] = {}
    for task, metric in metrics.items():
        figure, scores = name_of(task, metric), list[PredictorScore]()
        for key in answers:
            own_parts = [(key, key, i) for i in range(len(answers[key]))]
            if any((part, figure) not in values for part in own_parts):
                continue  # it does not answer this task, or has no likelihoods
            on = key if (_MODEL, key, 0) in parts else _MODEL
            model_parts = [(_MODEL, on, i) for i in range(len(model))]
            each = [values[part, figure] for part in own_parts]
            mean = _mean(each, drawn)
            difference = None
            if key != _MODEL:
                model_mean = _mean([values[part, figure] for part in model_parts], drawn)
                apart = Resampled(model_mean.values - mean.values, mean.subject, None).figure()
                ones, others = ([parts[part][task] for part in some] for some in (model_parts, own_parts))
                test = paired_test(tasks[task], metric, ones, others, seed)
                difference = PairedDifference(apart, test.p, test.name, None)
            role, name = key
            scores.append(PredictorScore(name, role, mean.figure(), sd_over_seeds(each), difference, False))
        predictors[task] = _with_best(scores, metric)
    corrected = _corrected(predictors)
    return PairedScores(
        tasks=dict(tasks),
        metrics=metrics,
        predictors=corrected,
        notes=tuple(_notes(metrics, corrected, groups, len(model), resamples)),
        seeds=len(model),
        resamples=resamples,
    )


def _mean(each: Sequence[Resampled], drawn: np.ndarray) -> Resampled:
    return each[0] if len(each) == 1 else mean_over_seeds(each, drawn)


def _aligned(
    rows: Sequence[Prediction], expected: Mapping[str, Sequence[Prediction]], tasks: Mapping[str, Task], name: str
) -> tuple[dict[str, list[int]], dict[str, list[Prediction]]]:
    """Return {task: numbers of the expected rows that are answered} and {task: the answers, in their order}.

    Rows with `left_out`, as some controls have, are no answers. Raises DataError if `rows` are to other questions.

    Args:
        expected: {task: the model's rows}.
        tasks: those to return if `rows` has them.
    """
    faults, groups = list[str](), by_task(rows)
    faults += [f"{name}: task {task}: not one of the run's, {', '.join(expected)}" for task in groups.keys() - expected]
    places, aligned = dict[str, list[int]](), dict[str, list[Prediction]]()
    for task in filter(groups.__contains__, tasks):
        asked, given = (Counter(map(_question, some[task])) for some in (expected, groups))
        if asked != given:
            names = sorted({key[0] for key in asked | given if asked[key] != given[key]})
            shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
            faults.append(f"{name}: task {task}: other conversations than the run's: {shown}")
            continue
        queues: dict[tuple[str, ...], deque[Prediction]] = defaultdict(deque)
        for row in groups[task]:
            queues[_question(row)].append(row)
        pairs = [(i, queues[_question(row)].popleft()) for i, row in enumerate(expected[task])]
        answered = [(i, row) for i, row in pairs if not row.get("left_out")]
        if answered:
            places[task], aligned[task] = [i for i, _ in answered], [row for _, row in answered]
    if faults:
        raise DataError(faults)
    check_answers(aligned, {task: tasks[task] for task in aligned})
    return places, aligned


def _question(row: Prediction) -> tuple[str, ...]:
    return str(row["task_id"]), *subject_of(row), normalise(row["reference"])


def _with_best(scores: Sequence[PredictorScore], metric: Metric) -> list[PredictorScore]:
    """Mark the best baseline, the first of equal ones."""
    lower = lower_is_better(metric)
    ranked = [one for one in scores if one.role == "baseline" and one.figure.value is not None]
    if lower is None or not ranked:
        return list(scores)
    best = min(ranked, key=lambda one: (1 if lower else -1) * (one.figure.value or 0))
    return [replace(one, is_best=one is best) for one in scores]


def _corrected(predictors: Mapping[str, Sequence[PredictorScore]]) -> dict[str, list[PredictorScore]]:
    """Correct p of the best baselines over the tasks, and p of each control."""
    families: dict[str, dict[str, float]] = defaultdict(dict)
    for task, scores in predictors.items():
        for one in scores:
            if (family := _family(one)) and one.difference and one.difference.p is not None:
                families[family][task] = one.difference.p
    corrected = {
        (family, task): p
        for family, own in families.items()
        for task, p in zip(own, correct_holm(list(own.values())), strict=True)
    }
    return {
        task: [
            replace(one, difference=replace(one.difference, p_holm=corrected.get((_family(one) or "", task))))
            if one.difference
            else one
            for one in scores
        ]
        for task, scores in predictors.items()
    }


def _family(score: PredictorScore) -> str | None:
    """Return the family of tests that a predictor's p belongs to; None if it is not tested."""
    return f"control {score.name}" if score.role == "control" else "best baseline" if score.is_best else None


def _notes(
    metrics: Mapping[str, Metric],
    predictors: Mapping[str, Sequence[PredictorScore]],
    groups: Mapping[str, Sequence[Prediction]],
    seeds: int,
    resamples: int,
) -> Iterator[str]:
    drawn = f"{resamples} resamples of subjects" + (f" and of the {seeds} seeds" if seeds > 1 else "")
    yield (f"95 % intervals: {drawn}" if resamples else "No intervals: no resamples") + f"; {subject_keys(groups)}."
    if seeds > 1:
        yield f"Mean ± standard deviation over {seeds} seeds."
    others = [one for scores in predictors.values() for one in scores if one.difference]
    if not others:
        return
    lower = list(dict.fromkeys(metric for metric in metrics.values() if lower_is_better(metric)))
    sign = f" For {', '.join(lower)}, a negative difference is in the model's favour." if lower else ""
    yield (
        "Differences: the model minus the row, on the same questions, with an interval from the same resamples." + sign
    )
    tests = {
        task: "exact McNemar test"
        if any(one.difference and one.difference.test == MCNEMAR for one in scores)
        else f"paired permutation test over subjects (exact, or {PERMUTATIONS:,} draws)"
        for task, scores in predictors.items()
    }
    distinct = list(dict.fromkeys(tests.values()))
    named = [f"{test}{_of(tests, test) if len(distinct) > 1 else ''}" for test in distinct]
    yield f"p, two-sided: {'; '.join(named)}."
    if len(predictors) > 1:
        yield (
            f"p is corrected for the {len(predictors)} tasks (Holm 1979), separately for the best baseline and "
            "for each control."
        )
    if any(one.role == "baseline" for one in others):
        yield (
            f"{BEST} best baseline on these answers, the only one tested. The choice favours the baseline: p "
            "is cautious about a model that is better, and too small for a baseline that is."
        )


def _of(tests: Mapping[str, str], test: str) -> str:
    return f" ({', '.join(task for task, own in tests.items() if own == test)})"


def format_p(p: float | None) -> str:
    """Format a p value with three decimals; a smaller one as `<0.001`."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def format_difference(value: float | None) -> str:
    """Format a difference as `short` does, with its sign."""
    return f"+{short(value)}" if value is not None and value > 0 else short(value)


def format_value(one: PredictorScore) -> str:
    """Format a predictor's figure, over several seeds as mean ± standard deviation."""
    return short(one.figure.value) + ("" if one.sd is None else f" ± {short(one.sd)}")


def _row(one: PredictorScore, columns: Sequence[int]) -> tuple[str, ...]:
    name = f"  {one.name}{f' {BEST}' if one.is_best else ''}"
    cells = name, format_value(one), span(one.figure, columns[2]) or "–"
    if one.difference is None:
        return *cells, "", "", ""
    interval = span(one.difference.figure, columns[4]) or "–"
    p = "" if one.difference.p_holm is None else format_p(one.difference.p_holm)
    return *cells, format_difference(one.difference.figure.value), interval, p
