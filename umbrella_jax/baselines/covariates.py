"""A baseline that sees no scan: regression on columns of the metadata, such as age, sex, site and motion.

A column that is the answer itself is never used. A column that only fixes the answer, such as age for an age group, is
left out too, unless the user names it: a site whose subjects all have one diagnosis looks just the same.

Axes: n questions, C columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from umbrella_jax.baselines.baseline import LinearBaseline, ProblemFeatures
from umbrella_jax.baselines.problems import LearningProblem
from umbrella_jax.console import plural
from umbrella_jax.data.tables import doubtful_values, is_missing, parse_cell_number
from umbrella_jax.data.validation.leaks import may_be_accident
from umbrella_jax.scoring.groups import value_name
from umbrella_jax.scoring.parse_answer import normalise
from umbrella_jax.scoring.rows import Row
from umbrella_jax.scoring.tasks import label_of
from umbrella_jax.study.leaks import describe_order

COVARIATES = ("age", "sex", "gender", "site", "scanner", "mean_fd")
"""Columns that are used unless the user names others; upper and lower case are the same."""
_NAMES = {"sex", "gender", "site", "scanner"}
"""Columns whose numbers are codes."""
_LARGEST = 1e100
"""Largest number of a column; the squares of larger ones may overflow."""


class CovariatesBaseline(LinearBaseline):
    """Regression on columns: numbers standardised, each text a column of 0 and 1.

    A missing number becomes the mean, with a column that marks it; a missing text is a text of its own. Texts that
    train lacks count as none. In a column of numbers, words such as `unknown` and codes such as -999 are missing too.
    """

    name: ClassVar[str] = "covariates"
    title: ClassVar[str] = "covariates"
    flags: ClassVar[Mapping[str, str]] = {"covariates": "--covariates"}

    def why_not(self, problem: LearningProblem) -> str | None:
        """Return a reason if no column is left."""
        columns, left_out = self._columns(problem)
        if columns:
            return None
        if left_out:
            return f"its metadata has no other column than {', '.join(left_out)}"
        names = ", ".join(self.inputs.options.covariates or COVARIATES)
        return f"no metadata of train has {names} with several values; a study keeps columns by `keep`"

    def check(self, problems: Sequence[LearningProblem]) -> list[str]:
        """Return a fault for each column that the user names and train lacks, and for each number beyond 1e100."""
        rows = [row for problem in problems for row in self._train_rows(problem)]
        known = sorted({key for row in rows for key in row["metadata"] if _value(row, key) is not None})
        faults = [
            f"covariates: {name}: no conversation of train has it in its metadata; expected some of {', '.join(known)}"
            for name in self.inputs.options.covariates
            if name not in known
        ]
        for name in dict.fromkeys(name for problem in problems for name in self._columns(problem)[0]):
            asked = (self.inputs.eval_rows[i] for problem in problems for i in problem.asked)
            for row in (*rows, *asked) if _is_numeric(name, rows) else ():
                number = parse_cell_number("" if (value := _value(row, name)) is None else _text(value))
                if number is not None and abs(number) > _LARGEST:
                    faults.append(
                        f"{row['task_id']}: metadata: {name}: {number:g}; expected numbers up to {_LARGEST:g}, or null"
                    )
        return list(dict.fromkeys(faults))

    def features(self, problem: LearningProblem) -> ProblemFeatures:
        """Return the columns as they are, and the transformer that encodes them."""
        columns, left_out = self._columns(problem)
        train_rows = self._train_rows(problem)
        asked_rows = [self.inputs.eval_rows[i] for i in problem.asked]
        numeric = [name for name in columns if _is_numeric(name, train_rows)]
        about = ", ".join(_described(name, train_rows) for name in columns)
        for name, reason in left_out.items():
            about += f"; without {name}, which {reason}"
        doubtful = {name: doubtful_values(_texts(name, train_rows)) for name in numeric}
        return ProblemFeatures(
            _table(train_rows, columns, doubtful),
            _table(asked_rows, columns, doubtful),
            make_transformer(
                [columns.index(n) for n in numeric], [columns.index(n) for n in columns if n not in numeric]
            ),
            about,
        )

    def _train_rows(self, problem: LearningProblem) -> list[Row]:
        return [self.inputs.train_rows[sample.conversation] for sample in problem.samples]

    def _columns(self, problem: LearningProblem) -> tuple[list[str], dict[str, str]]:
        """Return the columns to use, and {column left out: why}, a clause such as `is the answer`."""
        rows, asked_for = self._train_rows(problem), self.inputs.options.covariates
        known = dict.fromkeys(key for row in rows for key in row["metadata"])
        columns, left_out = list[str](), dict[str, str]()
        for name in dict.fromkeys(asked_for) or sorted(key for key in known if key.casefold() in COVARIATES):
            if len({_text(value) for row in rows if (value := _value(row, name)) is not None}) < 2:
                continue
            if is_answer(name, problem, rows):
                left_out[name] = "is the answer"
            elif not asked_for and (how := fixes_answer(name, problem, rows)):
                left_out[name] = f"fixes the answer ({how}); --covariates {name} uses it"
            else:
                columns.append(name)
        return columns, left_out


def is_answer(name: str, problem: LearningProblem, rows: Sequence[Row]) -> bool:
    """Return whether a column is the answer: the task has its name, or all values are equal to the answers.

    Args:
        rows: of the problem's samples, in order.
    """
    if name.casefold() in (problem.name.casefold(), problem.name.casefold().removesuffix(f"_{problem.task.kind}")):
        return True
    pairs = [
        (value, s.target)
        for row, s in zip(rows, problem.samples, strict=True)
        if (value := _value(row, name)) is not None
    ]
    return bool(pairs) and all(_is_equal(value, target) for value, target in pairs)


def _is_equal(value: Any, target: str | float) -> bool:
    if isinstance(target, str):
        return normalise(_text(value)) in (target, target[:1])
    number = parse_cell_number(_text(value))
    return number is not None and bool(np.isclose(number, target, rtol=1e-6))


def fixes_answer(name: str, problem: LearningProblem, rows: Sequence[Row]) -> str | None:
    """Return how each value of a column fixes the answer, beyond accident; None if it does not.

    Numbers fix a label if they fall apart into one range for each, and a quantity if it rises or falls with them. Texts
    fix a label if each goes with one label and each label with one text: a column with more texts than there are labels
    is a cause, as a site is, not another spelling of the answer.
    """
    effect_of: dict[str, str | float] = {}
    subjects = dict[str, set[str]]()
    for row, sample in zip(rows, problem.samples, strict=True):
        if (value := _value(row, name)) is not None:
            if effect_of.setdefault(_text(value), sample.target) != sample.target:
                return None
            subjects.setdefault(_text(value), set()).add(sample.subject)
    if _is_numeric(name, rows):
        ordered = sorted((value for value in effect_of if parse_cell_number(value) is not None), key=float)
        if how := describe_order([str(effect_of[value]) for value in ordered], not problem.classes):
            return how
    if not problem.classes or len(effect_of) != len(set(effect_of.values())):
        return None
    if may_be_accident({(value, str(effect_of[value])): len(of) for value, of in subjects.items()}):
        return None
    return ", ".join(f"{value} → {effect}" for value, effect in sorted(effect_of.items()))


def make_transformer(numbers: Sequence[int], texts: Sequence[int]) -> Any:
    """Return scikit-learn's transformer of a table [n, C] of objects, given the positions of its columns."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    return ColumnTransformer(
        [
            ("numbers", make_pipeline(imputer, StandardScaler()), list(numbers)),
            ("texts", OneHotEncoder(handle_unknown="ignore", sparse_output=False), list(texts)),
        ]
    )


def _table(rows: Sequence[Row], columns: Sequence[str], numeric: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Return the columns as objects [n, C]: floats with NaN, or texts with a blank one if the value is missing.

    Args:
        numeric: {column of numbers: its values that count as missing}.
    """
    table = np.empty((len(rows), len(columns)), object)
    for i, row in enumerate(rows):
        for j, name in enumerate(columns):
            value = _value(row, name)
            text = "" if value is None else _text(value)
            if name in numeric:
                number = None if text in numeric[name] else parse_cell_number(text)
                table[i, j] = np.nan if number is None else number
            else:
                table[i, j] = text
    return table


def _texts(name: str, rows: Sequence[Row]) -> list[str]:
    return [_text(value) for row in rows if (value := _value(row, name)) is not None]


def _is_numeric(name: str, rows: Sequence[Row]) -> bool:
    """Return whether a column of train has numbers, apart from doubtful values."""
    texts = _texts(name, rows)
    return name.casefold() not in _NAMES and all(
        parse_cell_number(text) is not None for text in {*texts}.difference(doubtful_values(texts))
    )


def _described(name: str, rows: Sequence[Row]) -> str:
    """Return a column's name for the note, and how it was read unless that is plain."""
    texts = _texts(name, rows)
    if name.casefold() in _NAMES:
        return name
    if not _is_numeric(name, rows):
        example = next(text for text in texts if parse_cell_number(text) is None)
        return f"{name} (as {plural(len({*texts}), 'text')}, such as {example})"
    if doubtful := doubtful_values(texts):
        count = sum(text in doubtful for text in texts)
        return f"{name} ({', '.join(doubtful)} counts as missing, {plural(count, 'question')})"
    return name


def _value(row: Row, name: str) -> Any:
    value = label_of(row, name)
    return None if not isinstance(value, str | int | float) or is_missing(str(value)) else value


def _text(value: str | float) -> str:
    return value_name(value)
