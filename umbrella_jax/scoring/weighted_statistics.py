"""Statistics of n answers under R weightings at once: w float [n, R] says how often each counts, the result is [R].

With a resample's counts as w they are what the repeated answers would give, with ones the plain statistics: those of
scikit-learn and scipy, to which tests/evaluation hold them. Not theirs here, since they take one weighting at a time
(ranks: none), a thousand times too slow for intervals. NaN stands where a statistic is not defined. R comes last, so
that what is sorted or gathered are whole rows.
"""

import numpy as np

Array = np.ndarray


def mean(w: Array, values: Array) -> Array:
    """Of values [n]: of whether answers are right the accuracy, of absolute errors the MAE."""
    return values.astype(float) @ w / w.sum(0)


def balanced_accuracy(w: Array, truth: Array, answer: Array) -> Array:
    """Mean over the classes that occur of the share of each that was recognised. One-hot [n, K]; an answer that is none
    of the classes is a row of zeros."""
    support = truth.T @ w
    return _over_classes((truth * answer).T @ w / support, support > 0)


def macro_f1(w: Array, truth: Array, answer: Array) -> Array:
    """Mean of 2 hits / (occurrences + answers), over the classes that occur or are answered. Arguments as above."""
    either = (truth + answer).T @ w
    return _over_classes(2 * ((truth * answer).T @ w) / either, either > 0)


def macro_auroc(w: Array, truth: Array, probability: Array) -> Array:
    """Mean over the classes that occur of the AUROC of each against all others; ties count one half.

    One-hot [n, K], probabilities [n, K]. Of two classes whose probabilities sum to 1 it is the AUROC of either.
    """
    classes = range(truth.shape[1]) if truth.shape[1] != 2 else (1,)
    each = np.stack([_auroc(w, truth[:, k], probability[:, k]) for k in classes])
    return _over_classes(each, np.isfinite(each))


def _auroc(w: Array, positive: Array, score: Array) -> Array:
    """Mann and Whitney's statistic / (positives · negatives)."""
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(positive == 0)
    negatives = negatives[score[negatives].argsort()]
    below = np.pad(w[negatives].cumsum(0), ((1, 0), (0, 0)))  # weight of the first so many negatives
    low, high = (below[np.searchsorted(score[negatives], score[positives], side)] for side in ("left", "right"))
    w = w[positives]
    return _sum(w, low + high) / 2 / (w.sum(0) * below[-1])


def calibration_error(w: Array, right: Array, confidence: Array, bins: int = 10) -> Array:
    """Expected calibration error (Guo et al. 2017): |accuracy − mean confidence| in bins of equal width, weighed by
    what is in them. [n] each; the last bin holds 1 too."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.abs((np.eye(bins)[place] * (right - confidence)[:, None]).T @ w).sum(0) / w.sum(0)


def rmse(w: Array, error: Array) -> Array:
    """Root of the mean squared error [n]."""
    return np.sqrt(mean(w, error**2))


def r2(w: Array, truth: Array, answer: Array) -> Array:
    """1 − squared errors / squared deviations from the mean. [n] each."""
    deviation = _centred(w, truth[:, None])
    squares = _sum(w * deviation, deviation)
    return np.where(_varies(w, truth[:, None]), 1 - (answer - truth) ** 2 @ w / squares, np.nan)


def pearson(w: Array, x: Array, y: Array) -> Array:
    """Correlation of x and y, [n] each."""
    return _correlation(w, x[:, None], y[:, None])


def spearman(w: Array, x: Array, y: Array) -> Array:
    """Pearson's of the ranks, tied ones at their mean. [n] each."""
    return _correlation(w, _ranks(w, x), _ranks(w, y))


def _correlation(w: Array, x: Array, y: Array) -> Array:
    """Of columns, one for all weightings or one for each; of two pairs it would always be 1 or -1."""
    if len(w) < 3:
        return np.full(w.shape[1], np.nan)
    varies = _varies(w, x) & _varies(w, y)
    x, y = _centred(w, x), _centred(w, y)
    wx = w * x
    return np.where(varies, _sum(wx, y) / np.sqrt(_sum(wx, x) * _sum(w * y, y)), np.nan)


def _ranks(w: Array, values: Array) -> Array:
    """Of each value among all of them, repeated w times, from 1: [n, R]."""
    order, starts, place = _ties(values)
    of_value = np.add.reduceat(w[order], starts)
    return (of_value.cumsum(0) - (of_value - 1) / 2)[place]


def _ties(values: Array) -> tuple[Array, Array, Array]:
    """Their order, where in it each distinct value begins, and which distinct value each of them is."""
    order = values.argsort(kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    back = np.empty_like(place)
    back[order] = place
    return order, starts, back


def _centred(w: Array, x: Array) -> Array:
    """Columns, one for all weightings or one for each, less their means: [n, R]."""
    return x - (w * x).sum(0) / w.sum(0)


def _sum(one: Array, other: Array) -> Array:
    """Of products, down each column."""
    return np.einsum("nr,nr->r", one, other)


def _varies(w: Array, x: Array) -> Array:
    """Whether those that count are not all the same; exact, where a variance would round."""
    counts = w > 0
    return np.where(counts, x, -np.inf).max(0) > np.where(counts, x, np.inf).min(0)


def _over_classes(values: Array, which: Array) -> Array:
    """Mean of each column [K, R] over some of its classes."""
    return np.where(which, values, 0).sum(0) / which.sum(0)
