"""Correlate the errors of regressions with covariates, and score answers after the usual correction for age bias."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from umbrella_jax.console import plural, table_lines, wrapped
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.io.reading import kind
from umbrella_jax.scoring import weighted_statistics
from umbrella_jax.scoring.bootstrap import Figure, Statistic, number_subjects, resample_statistics, subject_of
from umbrella_jax.scoring.groups import value_name
from umbrella_jax.scoring.metrics import COLUMNS, check_answers, figure_rows, numbers_of, short
from umbrella_jax.scoring.tasks import Prediction, Task, by_task, label_of

SOURCES = "Beheshti et al. 2019; de Lange & Cole 2020; Smith et al. 2019"
"""Publications of the correction; docs/metrics.md has their addresses."""
_TOO_LARGE = 1e100
"""Size of numbers whose squares could overflow."""
_ErrorOf = Callable[[np.ndarray], np.ndarray]
"""Maps weights [n, R] to errors [n], or to [n, R] if they depend on the weights."""


@dataclass(frozen=True)
class AdjustedFigure:
    """A figure without and with the correction."""

    uncorrected: Figure
    corrected: Figure


@dataclass(frozen=True)
class TaskAdjustment:
    """The correction of one regression, and its figures."""

    intercept: float
    slopes: Mapping[str, float]
    """{covariate: slope of the error}."""
    fitted_on: int
    """Number of answers to which the error was fitted."""
    left_out: int
    """Number of scored answers without a number or without a covariate."""
    figures: Mapping[str, AdjustedFigure]
    """{`error_correlation/COVARIATE`, `mae`, `rmse`, `r2`, `pearson`: figure}."""


@dataclass(frozen=True)
class AdjustedScores:
    """The figures of all regressions, as returned by `adjust_scores`."""

    tasks: Mapping[str, Task]
    """The regressions."""
    coding: Mapping[str, tuple[str, str] | None]
    """{covariate: its values that count as 0 and as 1; None for numbers}."""
    fitted_elsewhere: bool
    """Whether the correction was fitted on other answers than the scored ones."""
    adjustments: Mapping[str, TaskAdjustment]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; docs/metrics.md documents the keys."""
        return {
            "notes": list(self.notes),
            "coding": dict(self.coding),
            "fitted_elsewhere": self.fitted_elsewhere,
            "tasks": {name: asdict(adjustment) for name, adjustment in self.adjustments.items()},
        }

    def table(self) -> str:
        """Return the text for a terminal of 80 columns."""
        rows: list[str | tuple[str, ...]] = [("", "", "95 % interval", "n", "subjects", "chance")]
        for name, adjustment in self.adjustments.items():
            unit = self.tasks[name].unit
            rows.append(f"{name}{f' ({unit})' if unit else ''}: error = answer − truth")
            for figure, both in adjustment.figures.items():
                rows += [f"  {figure}", *figure_rows(both.__dict__, "    ")]
            rows.append("")
        lines = table_lines(rows, COLUMNS)
        return "\n".join([*lines, *(line for note in self.notes for line in wrapped(note))])


def adjust_scores(
    rows: Iterable[Prediction],
    tasks: Mapping[str, Task],
    covariates: Sequence[str],
    *,
    fit_rows: Iterable[Prediction] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> AdjustedScores:
    """Correlate the error of each regression with covariates, and score its answers before and after a correction.

    The error, answer − truth, is fitted by least squares: error ≈ b0 + Σ b_k covariate_k. The corrected answer is
    answer − (b0 + Σ b_k covariate_k). For age as the only covariate of an age task this is the offset of Beheshti et
    al. 2019 (https://doi.org/10.1016/j.nicl.2019.102063) and, with a = 1 + b_1, the correction answer + truth − (b0 +
    a truth) of de Lange & Cole 2020 (https://doi.org/10.1016/j.nicl.2020.102229); several covariates are removed as in
    Smith et al. 2019 (https://doi.org/10.1016/j.neuroimage.2019.06.017).

    It is fitted on `fit_rows`, or on the scored answers themselves. These contain the truth, and so does age as a
    covariate of age: the corrected answers are then no predictions, and their figures no accuracies (Butler et al.
    2021, https://doi.org/10.1002/hbm.25533). The `chance` of a corrected figure shows by how much: it is that of always
    answering one number, corrected in the same way.

    Answers without a number, and those that lack a covariate, are left out of all figures here, also uncorrected ones.
    A resample draws subjects as `score` does. A correction fitted on the scored answers is fitted in each resample
    again; one fitted on `fit_rows` is fixed.

    Args:
        tasks: the result of `tasks_of`.
        covariates: keys of `metadata` with numbers, or with two values, which count as 0 and 1 in alphabetical order.
        fit_rows: answers about other subjects to the same tasks.
        resamples: 0 for no intervals.

    Raises:
        DataError: no task is a regression; a covariate is unknown, neither numbers nor two values, constant, or a
            linear function of the others; too few answers have all of them; `fit_rows` are about scored subjects, or
            lack a task; or as `score`.
    """
    rows = list(rows)
    groups, covariates = by_task(rows), list(dict.fromkeys(covariates))
    check_answers(groups, tasks)
    chosen = {name: task for name, task in tasks.items() if task.kind == "regression"}
    if not chosen:
        raise DataError(f"adjust: none of {', '.join(tasks)} is a regression; leave it out, or name the groups with by")
    fit_groups = groups if fit_rows is None else by_task(fit_rows)
    if fit_rows is not None:
        _check_fit_rows(fit_groups, groups, chosen)
    collected, coding = Faults(), dict[str, tuple[str, str] | None]()
    own = [row for name in chosen for row in (*groups[name], *(fit_groups[name] if fit_rows is not None else ()))]
    for covariate in covariates:
        with collected:
            coding[covariate] = _coding(covariate, own)
    collected.raise_as(DataError)
    numbers = number_subjects(rows)
    statistics: dict[tuple[str, str, str], Statistic] = {}
    fits: dict[str, tuple[np.ndarray, int, int]] = {}
    for name, task in chosen.items():
        with collected:
            used = _Answers.select(task, groups[name], coding)
            fitted = used if fit_rows is None else _Answers.select(task, fit_groups[name], coding)
            fitted.check_design(name)
            fits[name] = fitted.fit(), len(fitted.truth), len(groups[name]) - len(used.truth)
            subject = np.array([numbers[subject_of(row)] for row in used.rows], int)
            for which, error_of, chance_of in _errors(used, None if fit_rows is None else fitted):
                chances = _chances(used, chance_of)
                for figure, compute in _figures(used, error_of).items():
                    statistics[name, figure, which] = Statistic(compute, subject, chances.get(figure))
    collected.raise_as(DataError)
    resampled = resample_statistics(statistics, len(numbers), len(rows), resamples=resamples, seed=seed)
    adjustments = {
        name: TaskAdjustment(
            float(coefficients[0]),
            dict(zip(covariates, map(float, coefficients[1:]), strict=True)),
            fitted_on,
            left_out,
            {
                figure: AdjustedFigure(
                    resampled[name, figure, "uncorrected"].figure(), resampled[name, figure, "corrected"].figure()
                )
                for task_name, figure, which in statistics
                if (task_name, which) == (name, "corrected")
            },
        )
        for name, (coefficients, fitted_on, left_out) in fits.items()
    }
    notes = tuple(_notes(adjustments, coding, elsewhere=fit_rows is not None))
    return AdjustedScores(chosen, coding, fit_rows is not None, adjustments, notes)


def _check_fit_rows(
    fit_groups: Mapping[str, Sequence[Prediction]],
    groups: Mapping[str, Sequence[Prediction]],
    tasks: Mapping[str, Task],
) -> None:
    faults = [f"adjust_from: task {name}: no answers in it; expected some" for name in tasks if name not in fit_groups]
    known = {name: members for name, members in fit_groups.items() if name in tasks}
    scored = {subject_of(row) for members in groups.values() for row in members}
    shared = {subject_of(row)[1] for members in known.values() for row in members if subject_of(row) in scored}
    if shared:
        names = ", ".join(sorted(shared)[:3]) + (", …" if len(shared) > 3 else "")
        faults.append(f"adjust_from: {plural(len(shared), 'subject')} scored too ({names}); expected other subjects")
    if faults:
        raise DataError(faults)
    check_answers(known, {name: tasks[name] for name in known})


def _coding(covariate: str, rows: Sequence[Prediction]) -> tuple[str, str] | None:
    """Return the values of a covariate that count as 0 and as 1; None for numbers."""
    values = [(row, value) for row in rows if (value := label_of(row, covariate)) is not None]
    if not values:
        known = sorted({key for row in rows for key in row.get("metadata") or () if label_of(row, key) is not None})
        expected = f"expected some of {', '.join(known)}" if known else "it is empty"
        raise DataError(f"adjust: {covariate}: no answer to a regression has it in its metadata; {expected}")
    for row, value in values:
        if not isinstance(value, str | int | float):
            raise DataError(f"adjust: {covariate}: expected numbers or texts, got {kind(value)} in {row['task_id']}")
        if not isinstance(value, str) and not abs(value) < _TOO_LARGE:
            raise DataError(f"adjust: {covariate}: expected numbers below {_TOO_LARGE:g} in size in {row['task_id']}")
    names = sorted({value_name(value) for _, value in values})
    if len(names) == 1:
        raise DataError(f"adjust: {covariate}: all answers have the same value; leave it out")
    if all(not isinstance(value, str | bool) for _, value in values):
        return None
    if len(names) > 2:
        raise DataError(
            f"adjust: {covariate}: {len(names)} different values, some of them texts; expected numbers or two values "
            f"(--by {covariate} scores each)"
        )
    return names[0], names[1]


@dataclass(frozen=True)
class _Answers:
    """The n answers to a regression that have a number and all covariates."""

    rows: list[Prediction]
    truth: np.ndarray
    """float [n]."""
    error: np.ndarray
    """answer − truth, float [n]."""
    covariates: dict[str, np.ndarray]
    """{covariate: float [n]}."""

    @classmethod
    def select(cls, task: Task, rows: Sequence[Prediction], coding: Mapping[str, tuple[str, str] | None]) -> "_Answers":
        """Select the answers."""
        complete = [row for row in rows if all(label_of(row, name) is not None for name in coding)]
        truth, answer = numbers_of(task, complete)
        used = np.isfinite(answer)
        chosen = [row for row, is_used in zip(complete, used, strict=True) if is_used]
        values = {
            name: np.array([_number(label_of(row, name), codes) for row in chosen], float)
            for name, codes in coding.items()
        }
        return cls(chosen, truth[used], (answer - truth)[used], values)

    def check_design(self, task: str) -> None:
        """Raise DataError if the correction cannot be fitted to these answers."""
        names, least = ", ".join(self.covariates), len(self.covariates) + 2
        if len(self.truth) < least:
            raise DataError(
                f"adjust: task {task}: {plural(len(self.truth), 'answer')} with a number and {names}; expected at "
                f"least {least}"
            )
        if np.linalg.matrix_rank(self.design(self)) < len(self.covariates) + 1:
            raise DataError(
                f"adjust: task {task}: {names}: one is constant or a linear function of the others; leave it out"
            )

    def design(self, fitted: "_Answers") -> np.ndarray:
        """Return a column of ones and the covariates, standardised as those of `fitted`: [n, 1 + K]."""
        pairs = zip(self.covariates.values(), fitted.covariates.values(), strict=True)
        columns = [(own - theirs.mean()) / (theirs.std() or 1) for own, theirs in pairs]
        return np.stack([np.ones(len(self.truth)), *columns], 1)

    def fit(self) -> np.ndarray:
        """Return intercept and slopes of the error, in the covariates' own units: [1 + K]."""
        w = np.ones((len(self.truth), 1))
        intercept, *slopes = weighted_statistics.least_squares(w, self.design(self), self.error)[:, 0]
        values = list(self.covariates.values())
        own = [slope / (x.std() or 1) for slope, x in zip(slopes, values, strict=True)]
        return np.array([intercept - sum(b * x.mean() for b, x in zip(own, values, strict=True)), *own])


def _number(value: Any, codes: tuple[str, str] | None) -> float:
    return float(value) if codes is None else float(codes.index(value_name(value)))


def _errors(used: _Answers, fitted: _Answers | None) -> Iterator[tuple[str, _ErrorOf, _ErrorOf]]:
    """Yield (name, errors, errors of always answering one number), first uncorrected, then corrected.

    Args:
        fitted: the answers to fit on; None for `used` itself, in each resample anew.
    """
    mean = used.truth.mean()
    constant = mean - used.truth
    yield "uncorrected", lambda _: used.error, lambda _: constant
    design = used.design(fitted or used)
    if fitted is None:
        refit = partial(_refitted, design=design)
        yield "corrected", partial(refit, error=used.error), partial(refit, error=constant)
        return
    ones, theirs = np.ones((len(fitted.truth), 1)), fitted.design(fitted)
    both = []
    for error, known in ((used.error, fitted.error), (constant, mean - fitted.truth)):
        bias = design @ weighted_statistics.least_squares(ones, theirs, known)[:, 0]
        both.append(_without_rounding(error - bias, error))
    yield "corrected", lambda _: both[0], lambda _: both[1]


def _refitted(w: np.ndarray, *, error: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Return the errors [n, R] that are left by a fit with each weighting."""
    fitted = design @ weighted_statistics.least_squares(w, design, error)
    return _without_rounding(error[:, None] - fitted, error)


def _without_rounding(rest: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Set errors to 0 that are only rounding of the `error` from which they come."""
    return np.where(np.abs(rest) <= 1e-9 * np.abs(error).max(), 0, rest)


def _figures(used: _Answers, error_of: _ErrorOf) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    def answer(w: np.ndarray) -> np.ndarray:
        error = error_of(w)
        return error + (used.truth if error.ndim == 1 else used.truth[:, None])

    def correlation(w: np.ndarray, *, covariate: np.ndarray) -> np.ndarray:
        # after a fit it is 0, but for rounding; adding 0 turns -0 into 0
        return np.round(weighted_statistics.pearson(w, covariate, error_of(w)), 9) + 0

    return {
        **{f"error_correlation/{name}": partial(correlation, covariate=x) for name, x in used.covariates.items()},
        "mae": lambda w: weighted_statistics.mean(w, np.abs(error_of(w))),
        "rmse": lambda w: weighted_statistics.rmse(w, error_of(w)),
        "r2": lambda w: weighted_statistics.r2(w, used.truth, answer(w)),
        "pearson": lambda w: weighted_statistics.pearson(w, used.truth, answer(w)),
    }


def _chances(used: _Answers, error_of: _ErrorOf) -> dict[str, float]:
    """Return {figure: value of always answering one number}, without correlations with covariates."""
    one = np.ones((len(used.truth), 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {name: float(np.round(compute(one)[0], 9)) + 0 for name, compute in _figures(used, error_of).items()}
    return {name: value for name, value in values.items() if np.isfinite(value) and "/" not in name}


def _notes(
    adjustments: Mapping[str, TaskAdjustment], coding: Mapping[str, tuple[str, str] | None], *, elsewhere: bool
) -> Iterator[str]:
    where = "other answers" if elsewhere else "these answers"
    for name, adjustment in adjustments.items():
        terms = "".join(
            f" {'−' if slope < 0 else '+'} {short(abs(slope))} × "
            + (covariate if (codes := coding[covariate]) is None else f"({covariate} is {codes[1]})")
            for covariate, slope in adjustment.slopes.items()
        )
        yield (
            f"{name}: corrected = answer − ({short(adjustment.intercept)}{terms}), the error's least-squares fit on "
            f"{adjustment.fitted_on} of {where} ({SOURCES})."
        )
        if adjustment.left_out:
            yield (
                f"{name}: {plural(adjustment.left_out, 'answer')} without a number or a covariate left out here, also "
                "of the uncorrected figures."
            )
    if elsewhere:
        why = (
            f"The correction still knows {', '.join(coding)} of each scored subject. If that tells the truth, as age "
            "does of age,"
        )
    else:
        why = "The correction was fitted on the true values of the scored answers (--adjust-from fits on others), so"
    yield (
        f"{why} corrected figures do not measure accuracy: report the uncorrected ones (Butler et al. 2021). Chance is "
        "that of always answering the mean, corrected in the same way."
    )
