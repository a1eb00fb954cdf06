"""Metrics of answers in JSON: the share of right fields, and the error of numbers."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from umbrella_jax.scoring import weighted_statistics
from umbrella_jax.scoring.bootstrap import Statistic
from umbrella_jax.scoring.structured import field_number, field_text, parse_answer_object
from umbrella_jax.scoring.tasks import Prediction, Task


def field_statistics(task: Task, rows: Sequence[Prediction], subject: np.ndarray) -> dict[str, Statistic]:
    """Return the statistics of the fields of a task with a schema.

    A field counts in the rows whose reference has it. Chance is always giving a field's most frequent value, or its
    median. An answer without a number has the end of the references' range that is farther from the truth.

    Args:
        subject: number of each row's subject, int [n].
    """
    assert task.schema is not None
    answers = [parse_answer_object(str(row["prediction"])) for row in rows]
    references = [parse_answer_object(task.reference_text(row)) for row in rows]
    exact = np.array([task.answer_of(row) == task.truth(row) for row in rows])
    most = max(Counter(map(task.truth, rows)).values()) / len(rows) if rows else None
    statistics = {
        "accuracy": Statistic.mean(exact, subject, most, is_share=True),
        "unparsable": Statistic.mean(np.array([answer is None for answer in answers]), subject, is_share=True),
    }
    all_right, all_known, by_chance = np.zeros(len(rows)), np.zeros(len(rows)), 0
    for field, is_number in task.schema.fields.items():
        if is_number:
            truths = np.array([field_number(reference, field) for reference in references], float)
            numbers = np.array([field_number(answer, field) for answer in answers], float)
            known = ~np.isnan(truths)
            low, high = task.ranges.get(field, (np.nan, np.nan))
            worst = np.maximum(truths - low, high - truths)
            error = np.where(np.isnan(numbers), worst, np.abs(numbers - truths))[known]
            spread = float(np.abs(truths[known] - np.median(truths[known])).mean()) if known.any() else None
            statistics[f"field_mae/{field}"] = Statistic.mean(error, subject[known], spread)
            continue
        texts = [field_text(reference, field) for reference in references]
        known = np.array([text is not None for text in texts], bool)
        right = known & np.array(
            [field_text(answer, field) == text for answer, text in zip(answers, texts, strict=True)]
        )
        frequent = max(Counter(text for text in texts if text is not None).values(), default=0)
        chance = float(frequent / known.sum()) if known.any() else None
        statistics[f"field_accuracy/{field}"] = Statistic.mean(right[known], subject[known], chance, is_share=True)
        all_right, all_known, by_chance = all_right + right, all_known + known, by_chance + frequent
    chance = by_chance / all_known.sum() if all_known.any() else None
    ratio = partial(weighted_statistics.ratio, part=all_right, whole=all_known)
    return statistics | {"field_accuracy": Statistic(ratio, subject, chance)}


def compare_fields(task: Task, row: Prediction) -> list[tuple[str, str | None, str | None]]:
    """Return (field, value in the reference, value in the answer) of each field as JSON; None if it is missing."""
    assert task.schema is not None
    reference, answer = map(parse_answer_object, (task.reference_text(row), str(row["prediction"])))
    return [(name, field_text(reference, name), field_text(answer, name)) for name in task.schema.fields]
