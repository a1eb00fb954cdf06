"""Statistics of n answers under R weightings at once: w float [n, R] is how often each answer counts; results are [R].

With w = 1 a statistic equals that of scikit-learn or scipy, as tests/scoring checks. With a resample's counts it equals
that of the repeated answers. Those libraries are not used here because they take one weighting at a time (and none for
ranks), a thousand times too slow for intervals. An undefined statistic is NaN. R is the last axis, so that sorting and
gathering move whole rows.
"""

import numpy as np


def mean(w: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean of values: the accuracy if they are whether answers are right, the MAE if absolute errors.

    Args:
        values: [n], or [n, R] with other values for each weighting.
    """
    return (values.astype(float) @ w if values.ndim == 1 else _sum(w, values)) / w.sum(0)


def ratio(w: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return the sum of parts [n] over the sum of wholes [n], such as micro F1: 2 hits over statements of both."""
    return (part.astype(float) @ w) / (whole.astype(float) @ w)


def bleu(w: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sacrebleu's BLEU (Papineni et al. 2002) with its defaults: orders 1 to 4, smoothing `exp`; 0 to 100.

    Args:
        counts: [n, 10], as sacrebleu counts an answer: its length and the reference's, then matching n-grams and all
            n-grams of the answer, each by order.
    """
    sums = counts.T.astype(float) @ w
    length, expected, matching, total = sums[0], sums[1], sums[2:6], sums[6:]
    unmatched = (matching == 0).cumsum(0)  # each order without a match halves the precision once more
    precision = np.where(matching > 0, matching, 0.5**unmatched) / total
    log_mean = np.log(precision).mean(0)
    penalty = np.minimum(1 - expected / length, 0)
    return np.where((matching > 0).any(0) & (total > 0).all(0), 100 * np.exp(penalty + log_mean), 0.0)


def chrf(w: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sacrebleu's chrF2 (Popović 2015) with its defaults: characters 1 to 6, effective order; 0 to 100.

    Args:
        counts: [n, 18], as sacrebleu counts an answer: for each order the n-grams of the answer, those of the reference
            and those in both.
    """
    answer, expected, both = np.moveaxis((counts.T.astype(float) @ w).reshape(6, 3, -1), 1, 0)
    known = (answer > 0) & (expected > 0)
    precision, recall = (_over_classes(both / all_grams, known) for all_grams in (answer, expected))
    score = 5 * precision * recall / (4 * precision + recall)
    return np.where(precision + recall > 0, 100 * score, 0.0)


def balanced_accuracy(w: np.ndarray, truth: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Return the mean recall over the classes that occur.

    Args:
        truth, answer: one-hot [n, K]; an answer outside the classes is a row of zeros.
    """
    support = truth.T @ w
    return _over_classes((truth * answer).T @ w / support, support > 0)


def macro_f1(w: np.ndarray, truth: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Return the mean of 2 hits / (occurrences + answers) over the classes that occur or are answered.

    Args:
        truth, answer: one-hot [n, K]; an answer outside the classes is a row of zeros.
    """
    either = (truth + answer).T @ w
    return _over_classes(2 * ((truth * answer).T @ w) / either, either > 0)


def macro_auroc(w: np.ndarray, truth: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Return the mean one-vs-rest AUROC over the classes that occur; ties count one half.

    Two classes whose probabilities sum to 1 have the same AUROC, so only one is computed.

    Args:
        truth: one-hot [n, K].
        probability: [n, K].
    """
    classes = range(truth.shape[1]) if truth.shape[1] != 2 else (1,)
    each = np.stack([_auroc(w, truth[:, k], probability[:, k]) for k in classes])
    return _over_classes(each, np.isfinite(each))


def _auroc(w: np.ndarray, positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return Mann and Whitney's statistic / (positives · negatives)."""
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(positive == 0)
    negatives = negatives[score[negatives].argsort()]
    below = np.pad(w[negatives].cumsum(0), ((1, 0), (0, 0)))  # below[i]: weight of the i lowest negatives
    low, high = (below[np.searchsorted(score[negatives], score[positives], side)] for side in ("left", "right"))
    w = w[positives]
    return _sum(w, low + high) / 2 / (w.sum(0) * below[-1])


def calibration_error(w: np.ndarray, right: np.ndarray, confidence: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return the expected calibration error (Guo et al. 2017).

    It is the mean of |accuracy − mean confidence| over bins of equal width, weighted by their answers. `right` and
    `confidence` are [n]; the last bin includes 1.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.abs((np.eye(bins)[place] * (right - confidence)[:, None]).T @ w).sum(0) / w.sum(0)


def rmse(w: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the root of the mean of squared errors, [n] or [n, R]."""
    return np.sqrt(mean(w, error**2))


def r2(w: np.ndarray, truth: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Return 1 − squared errors / squared deviations from the mean. `truth` is [n], `answer` [n] or [n, R]."""
    truth = truth[:, None]
    deviation = _centred(w, truth)
    error = answer - (truth if answer.ndim == 2 else truth[:, 0])
    squares = mean(w, error**2) * w.sum(0)
    return np.where(_varies(w, truth), 1 - squares / _sum(w * deviation, deviation), np.nan)


def pearson(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of x, [n], and y, [n] or [n, R]."""
    return _correlation(w, x[:, None], y if y.ndim == 2 else y[:, None])


def least_squares(w: np.ndarray, design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the coefficients [K, R] of the linear least-squares fit to `target` [n].

    Args:
        design: [n, K], with columns of similar size. If some depend linearly, the smallest coefficients are returned.
    """
    count = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    squares = (products.T @ w).T.reshape(-1, count, count)
    inverse = np.linalg.pinv(squares, rcond=1e-10, hermitian=True)
    return np.einsum("rkl,lr->kr", inverse, (design * target[:, None]).T @ w)


def spearman(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of the ranks of x and y, [n] each; ties have their mean rank."""
    return _correlation(w, _ranks(w, x), _ranks(w, y))


def _correlation(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlate columns [n, 1], shared by all weightings, or [n, R], one per weighting."""
    if len(w) < 3:  # two pairs always correlate to 1 or -1
        return np.full(w.shape[1], np.nan)
    varies = _varies(w, x) & _varies(w, y)
    x, y = _centred(w, x), _centred(w, y)
    wx = w * x
    return np.where(varies, _sum(wx, y) / np.sqrt(_sum(wx, x) * _sum(w * y, y)), np.nan)


def _ranks(w: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return each value's rank, from 1, among all values repeated w times: [n, R]."""
    order, starts, place = _ties(values)
    of_value = np.add.reduceat(w[order], starts)
    return (of_value.cumsum(0) - (of_value - 1) / 2)[place]


def _ties(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorting order, the start of each distinct value in it, and each value's number among the distinct."""
    order = values.argsort(kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    back = np.empty_like(place)
    back[order] = place
    return order, starts, back


def _centred(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Subtract the means from columns [n, 1] or [n, R]: [n, R]."""
    return x - (w * x).sum(0) / w.sum(0)


def _sum(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the sums of products down each column: [R]."""
    return np.einsum("nr,nr->r", one, other)


def _varies(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return whether the values with weight differ, [R]. It is exact, while a variance would be rounded."""
    counts = w > 0
    return np.where(counts, x, -np.inf).max(0) > np.where(counts, x, np.inf).min(0)


def _over_classes(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Return the mean of each column of [K, R] over the classes in `which`."""
    return np.where(which, values, 0).sum(0) / which.sum(0)
