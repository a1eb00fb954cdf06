"""Statistics of n answers under R weightings at once: w float [R, n] says how often each counts, the result is [R].

With a resample's counts as w they are what the repeated answers would give, with ones the plain statistics: those of
scikit-learn and scipy, to which tests/evaluation hold them. Not theirs here, since they take one weighting at a time
(ranks: none), a thousand times too slow for intervals. NaN stands where a statistic is not defined.
"""

import numpy as np

Array = np.ndarray


def mean(w: Array, values: Array) -> Array:
    """Of values [n]: of whether answers are right the accuracy, of absolute errors the MAE."""
    return w @ values.astype(float) / w.sum(1)


def balanced_accuracy(w: Array, truth: Array, answer: Array) -> Array:
    """Mean over the classes that occur of the share of each that was recognised. One-hot [n, K]; an answer that is none
    of the classes is a row of zeros."""
    support = w @ truth
    return _over_classes(w @ (truth * answer) / support, support > 0)


def macro_f1(w: Array, truth: Array, answer: Array) -> Array:
    """Mean of 2 hits / (occurrences + answers), over the classes that occur or are answered. Arguments as above."""
    either = w @ truth + w @ answer
    return _over_classes(2 * (w @ (truth * answer)) / either, either > 0)


def macro_auroc(w: Array, truth: Array, probability: Array) -> Array:
    """Mean over the classes that occur of the AUROC of each against all others; ties count one half.

    One-hot [n, K], probabilities [n, K]. Of two classes whose probabilities sum to 1 it is the AUROC of either.
    """
    classes = range(truth.shape[1]) if truth.shape[1] != 2 else (1,)
    each = np.stack([_auroc(w, truth[:, k], probability[:, k]) for k in classes], axis=1)
    return _over_classes(each, np.isfinite(each))


def _auroc(w: Array, positive: Array, score: Array) -> Array:
    """Mann and Whitney's statistic / (positives · negatives)."""
    order, starts, _ = _ties(score)
    w, positive = w[:, order], positive[order]
    positives, negatives = (np.add.reduceat(part, starts, axis=1) for part in (w * positive, w * (1 - positive)))
    below = negatives.cumsum(1) - negatives
    return (positives * (below + negatives / 2)).sum(1) / (positives.sum(1) * negatives.sum(1))


def calibration_error(w: Array, right: Array, confidence: Array, bins: int = 10) -> Array:
    """Expected calibration error (Guo et al. 2017): |accuracy − mean confidence| in bins of equal width, weighed by
    what is in them. [n] each; the last bin holds 1 too."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.abs(w @ (np.eye(bins)[place] * (right - confidence)[:, None])).sum(1) / w.sum(1)


def rmse(w: Array, error: Array) -> Array:
    """Root of the mean squared error [n]."""
    return np.sqrt(mean(w, error**2))


def r2(w: Array, truth: Array, answer: Array) -> Array:
    """1 − squared errors / squared deviations from the mean. [n] each."""
    return np.where(_varies(w, truth), 1 - mean(w, (answer - truth) ** 2) / _moments(w, truth, truth), np.nan)


def pearson(w: Array, x: Array, y: Array) -> Array:
    """Correlation of x and y, [n] or a row for each weighting."""
    variances = _moments(w, x, x) * _moments(w, y, y)
    return np.where(_varies(w, x) & _varies(w, y), _moments(w, x, y) / np.sqrt(variances), np.nan)


def spearman(w: Array, x: Array, y: Array) -> Array:
    """Pearson's of the ranks, tied ones at their mean. [n] each."""
    return pearson(w, _ranks(w, x), _ranks(w, y))


def _ranks(w: Array, values: Array) -> Array:
    """Of each value among all of them, repeated w times, from 1: [R, n]."""
    order, starts, place = _ties(values)
    of_value = np.add.reduceat(w[:, order], starts, axis=1)
    return (of_value.cumsum(1) - (of_value - 1) / 2)[:, place]


def _ties(values: Array) -> tuple[Array, Array, Array]:
    """Their order, where in it each distinct value begins, and which distinct value each of them is."""
    order = values.argsort(kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    back = np.empty_like(place)
    back[order] = place
    return order, starts, back


def _moments(w: Array, x: Array, y: Array) -> Array:
    """Their covariance under w."""
    total = w.sum(1, keepdims=True)
    x, y = (v - (w * v).sum(1, keepdims=True) / total for v in (x, y))
    return (w * x * y).sum(1) / total[:, 0]


def _varies(w: Array, x: Array) -> Array:
    """Whether those that count are not all the same; exact, where a variance would round."""
    counts = w > 0
    return np.where(counts, x, -np.inf).max(1) > np.where(counts, x, np.inf).min(1)


def _over_classes(values: Array, which: Array) -> Array:
    """Mean of each row [R, K] over some of its classes."""
    return np.where(which, values, 0).sum(1) / which.sum(1)
