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
class _RowSpace:
    """An orthonormal basis of the space that n rows of F features span, if F is larger than n.

    The penalty of a linear model is the squared length of its weights, which a rotation does not change, and the best
    weights lie in that space. So the predictions are the same, at a cost that depends on n and not on F.
    """

    rows: np.ndarray
    """[n, F]."""
    weights: np.ndarray | None
    """[n, r]: the basis is rows.T @ weights; None for the identity."""

    @classmethod
    def span(cls, rows: np.ndarray) -> "_RowSpace":
        """Return the space of these rows."""
        if rows.shape[1] <= rows.shape[0]:
            return cls(rows[:0], None)
        squares, vectors = np.linalg.eigh(rows @ rows.T)  # a QR decomposition takes 30 times as long
        kept = squares > squares[-1] * len(rows) * np.finfo(np.float64).eps
        return cls(rows, vectors[:, kept] / np.sqrt(squares[kept]))

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Return the coordinates of rows [m, F] in the basis, [m, r]."""
        return rows if self.weights is None else rows @ self.rows.T @ self.weights


@dataclass(frozen=True)
class LinearModel:
    """A fitted linear model."""

    transformer: Any
    """scikit-learn's transformer of the features."""
    space: "_RowSpace"
    model: Any
    """scikit-learn's model of the transformed features in `space`."""
    chosen: str
    """The chosen regularisation, such as `C = 0.01`."""
    classes: int | None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Answer from features [n, F], float64: log-probabilities of classes [n, K], or quantities [n]."""
        rows = self.space.project(self.transformer.transform(features))
        if self.classes is None:
            return self.model.predict(rows)
        probability = np.zeros((len(rows), self.classes))
        probability[:, self.model.classes_] = self.model.predict_proba(rows)
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

    The score is the mean over parts of the log-likelihood, or of the negative squared error.

    Args:
        features: [n, F], floats unless a `transformer` takes something else.
        targets: int [n], each below `classes`; or float [n], quantities, if `classes` is None.
        parts: the result of `folds`.
        transformer: scikit-learn's step before the model, fitted in each part of the cross-validation. Default: a
            StandardScaler.
    """
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    transformer = StandardScaler() if transformer is None else transformer
    name = "C" if classes else "alpha"

    def fit_model(rows: np.ndarray, strength: float, own_targets: np.ndarray) -> Any:
        model = LogisticRegression(C=strength, max_iter=10_000) if classes else Ridge(strength)
        return model.fit(rows, own_targets)

    scores = np.zeros(len(_STRENGTHS[name]))
    for part in parts:
        rest = np.setdiff1d(np.arange(len(targets)), part)
        own = clone(transformer).fit(features[rest])
        space = _RowSpace.span(own.transform(features[rest]))
        train, held_out = (space.project(own.transform(features[some])) for some in (rest, part))
        for number, strength in enumerate(_STRENGTHS[name]):
            model = fit_model(train, strength, targets[rest])
            error = np.square(targets[part] - model.predict(held_out)).mean() if classes is None else None
            scores[number] += _log_likelihood(model, held_out, targets[part]) if error is None else -error
    chosen = _STRENGTHS[name][int(scores.argmax())]
    own = clone(transformer).fit(features)
    space = _RowSpace.span(own.transform(features))
    model = fit_model(space.project(own.transform(features)), chosen, targets)
    return LinearModel(own, space, model, f"{name} = {chosen:g}", classes)


def _log_likelihood(model: Any, features: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean log-probability of the right classes, including classes that the model has not seen."""
    probability = np.zeros((len(features), max(*model.classes_, *targets) + 1))
    probability[:, model.classes_] = model.predict_proba(features)
    return float(_log(probability[np.arange(len(targets)), targets]).mean())


def _log(probability: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(probability), NEVER)
