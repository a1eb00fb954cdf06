"""Compare answers under a control, such as blank volumes, with the true ones: how much do they depend on the scan?

Reliance is the part of what a model achieves beyond chance that a control takes away:

    reliance = (A_true − A_control) / (A_true − E),    E = Σ_c p_control(c) · p_truth(c)

A is the accuracy. E is the accuracy of the control's answers if they were independent of the truths, Cohen's (1960)
expected agreement, https://doi.org/10.1177/001316446002000104. The figure is 0 if the control answers as well, and 1 if
only chance agreement is left. Its numerator is the perceptual score of Gat et al. (2021),
https://arxiv.org/abs/2110.14375, which divides by A_true, so a model that answers by chance would seem to rely on text.
In a regression A is the negative mean absolute error, and −E that of randomly paired answers and truths.
An answer that is none of the closed set, or no number, counts in all three as a guess drawn from the truths: otherwise
a model at chance that talks nonsense without the scan would seem to rely on it.

If rows have likelihoods, the mean loss of log p(right answer), in nats, needs no threshold. With blank volumes it
estimates the information that the model uses in the scan (Ethayarajh et al. 2022, https://arxiv.org/abs/2110.08420).
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from umbrella_jax.config.schema import Metric
from umbrella_jax.console import plural, table_lines, wrapped
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.scoring import weighted_statistics
from umbrella_jax.scoring.bootstrap import (
    Figure,
    Resampled,
    Statistic,
    number_subjects,
    resample_statistics,
    subject_of,
)
from umbrella_jax.scoring.metrics import (
    COLUMNS,
    answer_values,
    check_answers,
    figure_rows,
    numbers_of,
    short,
    subject_keys,
)
from umbrella_jax.scoring.parse_answer import normalise
from umbrella_jax.scoring.seeds import drawn_seeds, interval_note, mean_over_seeds
from umbrella_jax.scoring.tasks import METRICS, Prediction, Task, by_task, task_of

PARAPHRASE = "paraphrase"
"""The control that changes the words of the question and not the scan."""
_WITH = {
    "blank": ("the scan", "with blank volumes"),
    "noise": ("the scan", "with noise for the volumes"),
    "shuffled": ("the scan", "with another subject's scan"),
    "shuffled-reference": ("the reference scan", "with another subject's reference scan"),
    "other-modality": ("the modality of the scan", "with the subject's scan of another modality"),
}
"""{control: (the evidence that it takes away, how the model answered)}, in words."""
_LITTLE, _MOST = 0.2, 0.8
"""Reliance, or share of changed answers, that counts as little and as most."""
_NAMED = 3
"""Number of conversations that a fault names."""


_Control = tuple[str, str]
"""A control, and the phrasing of a paraphrase."""
_Pair = tuple[Prediction, Prediction]
"""The true answer and the control's."""


@dataclass(frozen=True)
class ControlFigures:
    """One task's answers under one control, beside the true ones to the same conversations."""

    metric: Metric | None
    """`accuracy`, or `mae` of a regression; None if the task has neither, and then only `changed` is computed."""
    true: Figure | None
    """The metric with the scans. Its `chance`, and that of `control`, is E: the metric of the control's answers if they
    were independent of the truths."""
    control: Figure | None
    """The metric under the control."""
    changed: Figure
    """Share of answers that differ from the true run's."""
    reliance: Figure | None
    """Its value is None if the true metric does not exceed E. It has no interval if the two may be equal, because a
    ratio has none if its denominator may be 0 (Fieller 1954)."""
    nats: Figure | None
    """Mean loss of log p(right answer) among the closed set, in nats; None without likelihoods."""
    left_out: Mapping[str, int]
    """{reason: number of conversations without this control}."""
    verdict: str
    """A sentence that claims no more than the figures support."""

    def figures(self) -> dict[str, Figure]:
        """Return the figures by name, in the order of a table."""
        named = {
            f"{self.metric} with the scans": self.true,
            f"{self.metric} under control": self.control,
            "changed answers": self.changed,
            "reliance": self.reliance,
            "nats lost": self.nats,
        }
        return {name: figure for name, figure in named.items() if figure is not None}

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ParaphraseFigures:
    """One task's answers to the same question in several phrasings."""

    metric: str | None
    agreement: Figure
    """Share of equal answers over all pairs of phrasings, the original question included."""
    difference: Figure | None
    """In a regression, the mean absolute difference of the two numbers over the same pairs, without answers that are no
    number."""
    original: Figure | None
    """The metric of the true run's answers."""
    phrasings: Mapping[str, Figure | None]
    """{phrasing: metric}."""
    verdict: str

    def figures(self) -> dict[str, Figure]:
        """Return the figures by name, in the order of a table."""
        named = {"agreement": self.agreement, "mean difference": self.difference}
        named |= {f"{self.metric}, as in the data": self.original}
        named |= {f'{self.metric}, "{text}"': figure for text, figure in self.phrasings.items()}
        return {name: figure for name, figure in named.items() if figure is not None}

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ControlScores:
    """The figures of all controls, as returned by `score_controls`."""

    tasks: Mapping[str, Task]
    controls: Mapping[str, Mapping[str, ControlFigures]]
    """{task: {control: figures}}."""
    paraphrases: Mapping[str, ParaphraseFigures]
    """{task: figures}."""
    notes: tuple[str, ...]
    resamples: int

    def verdicts(self) -> list[str]:
        """Return a sentence per task and control, with the name of the task before it."""
        texts = [(task, own.verdict) for task, controls in self.controls.items() for own in controls.values()]
        texts += [(task, own.verdict) for task, own in self.paraphrases.items()]
        return [f"{task}: {text}" for task, text in texts]

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; docs/evidence.md documents the keys."""
        return {
            "resamples": self.resamples,
            "notes": list(self.notes),
            "tasks": {
                task: {control: figures.to_json() for control, figures in own.items()}
                for task, own in self.controls.items()
            },
            "paraphrases": {task: figures.to_json() for task, figures in self.paraphrases.items()},
        }

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        rows: list[str | tuple[str, ...]] = [("controls", "", "95 % interval", "n", "subjects", "chance")]
        for name, task in self.tasks.items():
            own: dict[str, ControlFigures | ParaphraseFigures] = {**self.controls.get(name, {})}
            own |= {PARAPHRASE: self.paraphrases[name]} if name in self.paraphrases else {}
            if own:
                rows.append(f"{name} ({task.title})")
            for control, figures in own.items():
                rows += [f"  {control}", *figure_rows(figures.figures(), "    "), f"    {figures.verdict}"]
            rows += [""] if own else []
        lines = table_lines(rows, COLUMNS)
        return "\n".join([*lines, *(line for note in self.notes for line in wrapped(note))])


def score_controls(
    rows: Sequence[Prediction],
    controls: Mapping[str, Sequence[Prediction]],
    tasks: Mapping[str, Task],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> ControlScores:
    """Compare the answers under each control with the true ones, with 95 % intervals over subjects.

    A task's figures under a control leave out conversations without this control. Intervals are those
    of `score`, and true and controlled answers are resampled together, so that their differences are paired. If no
    answer of a closed set changes, the interval of reliance follows from the exact binomial one of `changed`.

    Args:
        rows: the true answers.
        controls: {control: its answers}, in the order in which they were written. Rows with `left_out` have no answer.
        tasks: the result of `tasks_of` for `rows`.
        resamples: 0 for no intervals.

    Raises:
        DataError: a control's rows are not of the same conversations as `rows`; answers cannot be scored.
    """
    matched, left_out = _match(rows, controls, tasks)
    resampled = _resample(rows, matched, tasks, resamples, seed)
    intervals = f"95 % intervals: {resamples} resamples of subjects" if resamples else "No intervals: no resamples"
    note = f"{intervals}; {subject_keys(by_task(rows))}."
    return _scores(tasks, matched, left_out, resampled, (note, *_unparsed_notes(tasks, matched)), resamples)


def score_control_seeds(
    rows: Mapping[int, Sequence[Prediction]],
    controls: Mapping[str, Sequence[Sequence[Prediction]]],
    tasks: Mapping[str, Task],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> ControlScores:
    """Compare the answers of several seeds of one run under each control with the true ones.

    Figures are means over seeds, with the intervals over seeds and subjects of `score_seeds`. Reliance is the ratio of
    the means. Other arguments and errors are those of `score_controls`; an error names the seed.

    Args:
        rows: {seed: its true answers}, to the same conversations.
        controls: {control: answers of each seed}, in the order of `rows`.
    """
    each, faults = list[dict[tuple[str, _Control, str], Resampled]](), Faults()
    for place, (number, own) in enumerate(rows.items()):
        try:
            matched, left_out = _match(own, {name: answers[place] for name, answers in controls.items()}, tasks)
            each.append(_resample(own, matched, tasks, resamples, seed))
        except DataError as error:
            faults += [f"seed {number}: {fault}" for fault in error.faults]
    faults.raise_as(DataError)
    drawn = drawn_seeds(len(rows), resamples, seed)
    means = {key: mean_over_seeds([own[key] for own in each], drawn) for key in each[0]}
    note = interval_note(len(rows), resamples, by_task(next(iter(rows.values()))))
    return _scores(tasks, matched, left_out, means, (f"Means over {plural(len(rows), 'seed')}. {note}",), resamples)


def _scores(
    tasks: Mapping[str, Task],
    matched: Mapping[tuple[str, _Control], Sequence[_Pair]],
    left_out: Mapping[tuple[str, str], Mapping[str, int]],
    resampled: Mapping[tuple[str, _Control, str], Resampled],
    notes: tuple[str, ...],
    resamples: int,
) -> ControlScores:
    figures: dict[str, dict[str, ControlFigures]] = defaultdict(dict)
    for task, control in matched:
        if control[0] != PARAPHRASE:
            own = {name: values for (t, c, name), values in resampled.items() if (t, c) == (task, control)}
            reasons = left_out.get((task, control[0]), {})
            figures[task][control[0]] = _control_figures(tasks[task], control[0], own, reasons)
    by_task_asked = {task: _paraphrase_figures(how, task, matched, resampled) for task, how in tasks.items()}
    return ControlScores(
        tasks=dict(tasks),
        controls=dict(figures),
        paraphrases={task: own for task, own in by_task_asked.items() if own is not None},
        notes=(*notes, *_left_out_notes(left_out)),
        resamples=resamples,
    )


# Matching.


def _match(
    rows: Sequence[Prediction], controls: Mapping[str, Sequence[Prediction]], tasks: Mapping[str, Task]
) -> tuple[dict[tuple[str, _Control], list[_Pair]], dict[tuple[str, str], Counter[str]]]:
    """Return {(task, control): pairs of rows} and {(task, control): {reason: conversations that were left out}}.

    Conversations are known by `task_id`, task and subject; equal ones are paired in order.
    """
    faults = Faults()
    matched: dict[tuple[str, _Control], list[_Pair]] = defaultdict(list)
    left_out: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for name, own in controls.items():
        if not own:
            faults.append(f"{name}: no answers; leave this control out, or answer under it")
        parts: dict[str, list[Prediction]] = defaultdict(list)
        for row in own:
            if row.get("control") != name:
                faults.append(f"{name}: {row['task_id']}: not an answer under this control; expected control: {name}")
            parts[str(row.get("question", "")) if name == PARAPHRASE else ""].append(row)
        for phrasing, members in parts.items():
            asked = {task_of(row) for row in members} if name == PARAPHRASE else set(tasks)
            true_rows = [row for row in rows if task_of(row) in asked]
            true, other = _numbered(true_rows), _numbered(members)
            place = f"{name}: {phrasing}" if phrasing else name
            faults += _mismatch(place, true, other)
            for key in filter(other.__contains__, true):
                pair = true[key], other[key]
                if pair[0]["reference"] != pair[1]["reference"]:
                    faults.append(f"{place}: {key[0]}: its reference differs from that of the true answer")
                if reason := pair[1].get("left_out"):
                    left_out[key[1], name][str(reason)] += 1
                else:
                    matched[key[1], (name, phrasing)].append(pair)
    faults.raise_as(DataError)
    for (task, (name, _)), pairs in matched.items():
        try:
            check_answers({task: [other for _, other in pairs]}, {task: tasks[task]})
        except DataError as error:
            faults += [f"{name}: {fault}" for fault in error.faults]
    faults.raise_as(DataError)
    return dict(matched), left_out


_Key = tuple[str, str, tuple[str, str], int]


def _numbered(rows: Sequence[Prediction]) -> dict[_Key, Prediction]:
    """Return {(task_id, task, subject, number among equal ones): row}."""
    seen, numbered = Counter[tuple[Any, ...]](), dict[_Key, Prediction]()
    for row in rows:
        key = str(row["task_id"]), task_of(row), subject_of(row)
        numbered[*key, seen[key]] = row
        seen[key] += 1
    return numbered


def _mismatch(place: str, true: Mapping[_Key, Any], other: Mapping[_Key, Any]) -> list[str]:
    """Return a fault if a control's answers are not to the conversations of the true ones."""
    if true.keys() == other.keys():
        return []
    names = sorted({key[0] for key in true.keys() ^ other.keys()})
    shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return [
        f"{place}: {plural(len(other), 'answer')}, not to the same conversations as the {len(true)} true ones; they "
        f"differ in {shown}"
    ]


# Statistics.


def _resample(
    rows: Sequence[Prediction],
    matched: Mapping[tuple[str, _Control], Sequence[_Pair]],
    tasks: Mapping[str, Task],
    resamples: int,
    seed: int,
) -> dict[tuple[str, _Control, str], Resampled]:
    """Return {(task, control, name of the figure): values}; subjects are drawn as by `score` of `rows`."""
    numbers = number_subjects(rows)
    statistics: dict[tuple[str, _Control, str], Statistic] = {}
    for (task, control), pairs in matched.items():
        subject = np.array([numbers[subject_of(true)] for true, _ in pairs])
        own = _statistics(tasks[task], [p[0] for p in pairs], [p[1] for p in pairs], subject)
        statistics |= {(task, control, name): statistic for name, statistic in own.items()}
    for task, how in tasks.items():
        phrasings = [pairs for (t, (name, _)), pairs in matched.items() if (t, name) == (task, PARAPHRASE)]
        if phrasings:
            answers = [[true for true, _ in phrasings[0]], *([other for _, other in pairs] for pairs in phrasings)]
            subject = np.array([numbers[subject_of(row)] for row in answers[0]])
            equal = [~_changed(how, one, other) for one, other in itertools.combinations(answers, 2)]
            statistics[task, (PARAPHRASE, ""), "agreement"] = Statistic.mean(
                np.mean(equal, axis=0), subject, is_share=True
            )
            if how.kind == "regression":
                values = [numbers_of(how, own)[1] for own in answers]
                difference = np.array([np.abs(one - other) for one, other in itertools.combinations(values, 2)])
                parsed = ~np.isnan(difference)
                mean = partial(
                    weighted_statistics.ratio, part=np.where(parsed, difference, 0).sum(0), whole=parsed.sum(0)
                )
                statistics[task, (PARAPHRASE, ""), "difference"] = Statistic(mean, subject, None)
    most = max((len(statistic.subject) for statistic in statistics.values()), default=1)
    return resample_statistics(statistics, len(numbers), most, resamples=resamples, seed=seed)


def _metric(task: Task) -> Metric | None:
    if task.kind == "regression":
        return "mae"
    return "accuracy" if "accuracy" in METRICS[task.kind] or task.schema is not None else None


def _statistics(
    task: Task, true: Sequence[Prediction], other: Sequence[Prediction], subject: np.ndarray
) -> dict[str, Statistic]:
    """Return the statistics of one task under one control."""
    statistics = {"changed": Statistic.mean(_changed(task, true, other), subject, is_share=True)}
    if task.answers is not None and all(row.get("likelihoods") for row in (*true, *other)):
        statistics["nats"] = Statistic.mean(_log_p(task, true) - _log_p(task, other), subject)
    if (metric := _metric(task)) is None:
        return statistics
    true_value, value = (answer_values(task, metric, rows) for rows in (true, other))
    assert true_value is not None
    assert value is not None
    if metric == "mae":
        truth, answer = numbers_of(task, other)
        parsed = [~np.isnan(numbers_of(task, rows)[1]) for rows in (true, other)]
        chance, guess = (partial(_paired_error, truth=truth, answer=own) for own in (answer, truth))
        sign = -1
    else:
        truths = np.array([task.truth(row) for row in true])
        texts = [np.array([task.answer_of(row) for row in rows]) for rows in (true, other)]
        parsed = [np.full(len(own), task.answers is None) | np.isin(own, task.classes) for own in texts]
        chance = partial(_agreement, truth=truths, answer=texts[1], parsed=parsed[1])
        guess = partial(_agreement, truth=truths, answer=truths, parsed=np.ones(len(truths), bool))
        sign = 1

    def achieved(w: np.ndarray, values: np.ndarray, is_parsed: np.ndarray) -> np.ndarray:
        """Return the metric if answers that cannot be parsed are guesses, [R]."""
        mean_of = partial(weighted_statistics.mean, w)
        return mean_of(np.where(is_parsed, values, 0)) + mean_of(~is_parsed) * guess(w)

    def margin(w: np.ndarray) -> np.ndarray:
        return sign * (achieved(w, true_value, parsed[0]) - chance(w))

    def lost(w: np.ndarray) -> np.ndarray:
        return sign * (achieved(w, true_value, parsed[0]) - achieved(w, value, parsed[1]))

    share = metric == "accuracy"
    return statistics | {
        "true": Statistic.mean(true_value, subject, is_share=share),
        "control": Statistic.mean(value, subject, is_share=share),
        "chance": Statistic(chance, subject, None),
        "margin": Statistic(margin, subject, None),
        "lost": Statistic(lost, subject, None),
    }


_ROUNDING = 1e-9
"""Largest difference between two equal metrics."""


def _changed(task: Task, one: Sequence[Prediction], other: Sequence[Prediction]) -> np.ndarray:
    """Return whether each answer differs, bool [n]; equal numbers of a regression may be written differently."""
    texts = [np.array([task.answer_of(row) for row in rows]) for rows in (one, other)]
    differs: np.ndarray = texts[0] != texts[1]
    if task.kind == "regression":
        first, second = (numbers_of(task, rows)[1] for rows in (one, other))
        differs &= ~(first == second)
    return differs


def _log_p(task: Task, rows: Sequence[Prediction]) -> np.ndarray:
    """Return log p(right answer) among the closed set, float [n]. All rows have likelihoods."""
    from scipy.special import log_softmax

    by_class = [{normalise(answer): value for answer, value in row["likelihoods"].items()} for row in rows]
    log_p = log_softmax(np.array([[own[name] for name in task.classes] for own in by_class]), axis=1)
    return np.array([own[task.classes.index(task.truth(row))] for own, row in zip(log_p, rows, strict=True)])


def _agreement(w: np.ndarray, truth: np.ndarray, answer: np.ndarray, parsed: np.ndarray) -> np.ndarray:
    """Return Σ_c p_answer(c) · p_truth(c), [R].

    Args:
        w: weights [n, R].
        truth, answer: texts [n].
        parsed: whether an answer is of the closed set, bool [n]; others count as drawn from the truths.
    """
    names, codes = np.unique(np.concatenate([truth, answer]), return_inverse=True)
    of_truths, of_answers = np.zeros((2, len(names), w.shape[1]))
    np.add.at(of_truths, codes[: len(truth)], w)
    np.add.at(of_answers, codes[len(truth) :][parsed], w[parsed])
    of_answers += of_truths * weighted_statistics.mean(w, ~parsed)
    return (of_truths * of_answers).sum(0) / w.sum(0) ** 2


def _paired_error(w: np.ndarray, truth: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Return the mean absolute error of answers and truths that are paired at random, [R].

    E|a − t| = ∫ F_a(x) (1 − F_t(x)) + F_t(x) (1 − F_a(x)) dx for independent a and t with distribution functions F.

    Args:
        w: weights [n, R].
        truth, answer: numbers [n]; NaN for an answer that is none, which counts as drawn from the truths.
    """
    parsed = ~np.isnan(answer)
    x = np.unique(np.concatenate([truth, answer[parsed]]))
    of_truths, of_answers = np.zeros((2, len(x), w.shape[1]))
    np.add.at(of_truths, np.searchsorted(x, truth), w)
    np.add.at(of_answers, np.searchsorted(x, answer[parsed]), w[parsed])
    of_answers += of_truths * weighted_statistics.mean(w, ~parsed)
    f_truth, f_answer = (counts.cumsum(0)[:-1] / w.sum(0) for counts in (of_truths, of_answers))
    error: np.ndarray = np.diff(x) @ (f_answer * (1 - f_truth) + f_truth * (1 - f_answer))
    return error


# Figures and words.


def _control_figures(
    task: Task, control: str, resampled: Mapping[str, Resampled], left_out: Mapping[str, int]
) -> ControlFigures:
    figures = {name: values.figure() for name, values in resampled.items()}
    metric, margin, reliance = _metric(task), figures.get("margin"), _reliance(resampled)
    changed, chance = figures["changed"], figures["chance"].value if "chance" in figures else None
    if reliance is not None and margin is not None:
        if margin.value is None or margin.value <= _ROUNDING:
            reliance = replace(reliance, value=None, low=None, high=None)
        elif changed.value == 0 and changed.high is not None and metric == "accuracy":
            bound = changed.high / margin.value  # each changed answer moves the accuracy by at most one answer
            reliance = replace(reliance, low=-bound, high=bound)
        elif margin.low is None or margin.low <= 0:
            reliance = replace(reliance, low=None, high=None)
    own = ControlFigures(
        metric=metric,
        true=replace(figures["true"], chance=chance) if "true" in figures else None,
        control=replace(figures["control"], chance=chance) if "control" in figures else None,
        changed=changed,
        reliance=reliance,
        nats=figures.get("nats"),
        left_out=dict(left_out),
        verdict="",
    )
    return replace(own, verdict=_verdict(own, control, margin))


def _reliance(resampled: Mapping[str, Resampled]) -> Figure | None:
    """Return the ratio of the loss to the margin over chance; None without these."""
    if "margin" not in resampled:
        return None
    lost, margin = resampled["lost"], resampled["margin"].values
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(margin > _ROUNDING, lost.values / margin + 0.0, np.nan)  # + 0.0 turns -0.0 into 0.0
    return Resampled(ratio, lost.subject, None).figure()


def _percent(value: float | None) -> str:
    """Return a share in words; reliance may be below 0 or above 1 by chance."""
    return f"{100 * min(max(value or 0, 0), 1):.0f} %"


def _verdict(own: ControlFigures, control: str, margin: Figure | None) -> str:
    """Return in words what the figures of a control support, and no more."""
    what, how = _WITH.get(control, ("the scan", f"under {control}"))
    changed, reliance = own.changed, own.reliance
    if not changed.value:
        none = f"none of {changed.n} answers changes {how}"
        if changed.high is None:
            return f"{none}."
        if changed.high <= _LITTLE:
            fall = ""
            if own.nats is not None and own.nats.low is not None and own.nats.low > 0:
                fall = f", though log p(right answer) falls by {short(own.nats.value)} nats"
            most = f"95 % interval: at most {_percent(changed.high)} do"
            return f"the answers hardly depend on {what}: {none} ({most}){fall}."
        return f"{none}; of so few subjects that up to {_percent(changed.high)} may."
    share = f"{_percent(changed.value)} of the answers change {how}"
    if own.true is None or own.control is None or reliance is None or margin is None:
        return f"{share}."
    values = f"{own.metric} is {short(own.control.value)} {how} and {short(own.true.value)} with the scans"
    if reliance.value is None:
        reached = f"{own.metric} {short(own.true.value)} is not better than chance agreement"
        return f"reliance is undefined: {reached}, {short(own.control.chance)}; {share}."
    part = "the part beyond chance agreement"
    if reliance.low is None or reliance.high is None:
        if margin.low is not None and margin.low <= 0:
            return f"{values}, which may be chance: too little to tell how much depends on {what}."
        if abs(reliance.value - 1) <= _ROUNDING and changed.high is not None:
            return f"{values}: nothing but chance agreement is left without {what}."
        return f"{values}; reliance has no interval."
    span = f"{_percent(reliance.low)} to {_percent(reliance.high)}"
    if reliance.high < 0:
        return f"{values}: the model answers better without {what}."
    if reliance.high <= _LITTLE:
        return f"the answers hardly depend on {what}: {values}; of {part}, at most {_percent(reliance.high)} is lost."
    if reliance.low <= 0:
        return f"{values}: no dependence on {what} is shown; of {part}, {span} may be lost."
    if reliance.low >= _MOST:
        return f"the answers depend on {what}: {values}; of {part}, at least {_percent(reliance.low)} is lost."
    extent = "in part" if reliance.high < 1 else "in part or entirely"
    return f"{values}: the answers depend on {what} {extent}; of {part}, {span} is lost."


def _paraphrase_figures(
    task: Task,
    name: str,
    matched: Mapping[tuple[str, _Control], Sequence[_Pair]],
    resampled: Mapping[tuple[str, _Control, str], Resampled],
) -> ParaphraseFigures | None:
    """Return the figures of a task's phrasings; None if it has none."""
    phrasings = [control for own, control in matched if (own, control[0]) == (name, PARAPHRASE)]
    if not phrasings:
        return None

    def figure(control: _Control, key: str) -> Figure | None:
        values = resampled.get((name, control, key))
        return None if values is None else values.figure()

    agreement = resampled[name, (PARAPHRASE, ""), "agreement"].figure()
    span = (
        f" (95 % interval: {_percent(agreement.low)} to {_percent(agreement.high)})"
        if agreement.high is not None
        else ""
    )
    return ParaphraseFigures(
        metric=_metric(task),
        agreement=agreement,
        difference=figure((PARAPHRASE, ""), "difference"),
        original=figure(phrasings[0], "true"),
        phrasings={control[1]: figure(control, "control") for control in phrasings},
        verdict=f"two phrasings get the same answer in {_percent(agreement.value)} of the pairs{span}.",
    )


def _unparsed_notes(
    tasks: Mapping[str, Task], matched: Mapping[tuple[str, _Control], Sequence[_Pair]]
) -> Iterator[str]:
    """Yield a sentence per task and control that changes the scan about answers that cannot be parsed."""
    for (task, (control, _)), pairs in matched.items():
        how, others = tasks[task], [other for _, other in pairs]
        if control == PARAPHRASE:
            continue
        if how.kind == "regression":
            count, what = int(np.isnan(numbers_of(how, others)[1]).sum()), "not a number"
        elif how.answers is not None:
            count = sum(how.answer_of(row) not in how.classes for row in others)
            what = f"none of {', '.join(how.classes)}"
        else:
            continue
        if count:
            yield f"{task}, {control}: {count} of {len(others)} answers are {what}; reliance counts each as a guess."


def _left_out_notes(left_out: Mapping[tuple[str, str], Mapping[str, int]]) -> Iterator[str]:
    """Yield a sentence per task, control and reason about conversations that have no controlled answer."""
    for (task, control), reasons in left_out.items():
        for reason, number in reasons.items():
            yield f"{task}, {control}: {plural(number, 'conversation')} left out: {reason}."
