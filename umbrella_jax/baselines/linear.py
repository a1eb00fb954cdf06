"""A linear model of features: scikit-learn's logistic regression or ridge regression.

Cross-validation, with all scans of a subject in one part, chooses its regularisation.

Axes: n questions, F features, K classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbrella_jax.errors import DataError

FOLDS = 5
"""Number of parts for cross-validation; fewer if a class has fewer subjects."""
NEVER = float(np.log(np.finfo(np.float64).tiny))
"""Log-probability used instead of log 0, since scores must be finite: the log of the smallest normal float64."""
_STRENGTHS = {"C": np.logspace(-5, 2, 8).tolist(), "alpha": np.logspace(-2, 5, 8).tolist()}
"""Candidate regularisations of logistic regression (C) and ridge regression (alpha)."""


def folds(targets: np.ndarray, subjects: Sequence[str], *, classes: bool) -> list[np.ndarray]:
    """Split questions into at most FOLDS parts that share no subject, and return the question numbers of each part.

    Parts have similar shares of each class. The result depends only on the arguments.

    Args:
        targets: [n], classes as whole numbers, or quantities.

    Raises:
        DataError: too few subjects: with any part held out, the rest must still have two classes (for quantities, two
            subjects).
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    groups = np.unique(np.asarray(subjects), return_inverse=True)[1]
    if classes:
        counts = sorted(len(np.unique(groups[targets == k])) for k in np.unique(targets))
        room, needed = (counts[-2] if len(counts) > 1 else 0), "two subjects of each of two answers"
        split: Any = StratifiedGroupKFold
    else:
        room, needed, split = len(np.unique(groups)), "three subjects", GroupKFold
    if room < (2 if classes else 3):
        raise DataError(f"too few subjects to hold some out; expected at least {needed}")
    with warnings.catch_warnings():  # about classes with fewer members than parts, which is fine here
        warnings.simplefilter("ignore", UserWarning)
        pairs = list(split(min(FOLDS, room)).split(np.zeros(len(targets)), targets, groups))
    if classes and any(len(np.unique(targets[rest])) < 2 for rest, _ in pairs):
        raise DataError("subjects cannot be held out so that two answers are left; expected more subjects of each")
    return [part for _, part in pairs]


@dataclass(frozen=True)
class LinearModel:
    """A fitted linear model."""

    model: Any
    """scikit-learn's pipeline."""
    chosen: str
    """The chosen regularisation, such as `C = 0.01`."""
    classes: int | None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Answer from features [n, F], float64: log-probabilities of classes [n, K], or quantities [n]."""
        if self.classes is None:
            return self.model.predict(features)
        probability = np.zeros((len(features), self.classes))
        probability[:, self.model.classes_] = self.model.predict_proba(features)
        return _log(probability)


def fit_linear(
    features: np.ndarray,
    targets: np.ndarray,
    parts: Sequence[np.ndarray],
    *,
    classes: int | None,
    transformer: Any | None = None,
) -> LinearModel:
    """Fit a model to all questions, with the regularisation that scores best in cross-validation over `parts`.

    Args:
        features: [n, F], floats unless a `transformer` takes something else.
        targets: int [n], each below `classes`; or float [n], quantities, if `classes` is None.
        parts: the result of `folds`.
        transformer: scikit-learn's step before the model, fitted in each part of the cross-validation. Default: a
            StandardScaler.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, scoring, name = (
        (LogisticRegression(max_iter=10_000), _log_likelihood, "C")
        if classes
        else (Ridge(), "neg_mean_squared_error", "alpha")
    )
    key = f"{type(model).__name__.lower()}__{name}"
    pairs = [(np.setdiff1d(np.arange(len(targets)), part), part) for part in parts]
    search = GridSearchCV(
        make_pipeline(StandardScaler() if transformer is None else transformer, model),
        {key: _STRENGTHS[name]},
        scoring=scoring,
        cv=pairs,
        error_score="raise",
    )
    search.fit(features, targets)
    return LinearModel(search.best_estimator_, f"{name} = {search.best_params_[key]:g}", classes)


def _log_likelihood(model: Any, features: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean log-probability of the right classes, including classes that the model has not seen."""
    probability = np.zeros((len(features), max(*model.classes_, *targets) + 1))
    probability[:, model.classes_] = model.predict_proba(features)
    return float(_log(probability[np.arange(len(targets)), targets]).mean())


def _log(probability: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(probability), NEVER)
