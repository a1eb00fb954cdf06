"""The printed lines about an evaluation."""

from typing import Any

import pytest

from umbrella_jax.run.evaluation import evaluation_lines, headline_of
from umbrella_jax.scoring.metrics import score, tasks_of


def rows(task: str, references: list[str], answers: list[str] | None = None) -> list[dict[str, Any]]:
    """Return a row for each reference, with blank answers by default."""
    return [
        {"task_id": f"{task}-{i}", "task_type": task, "prediction": answer, "reference": reference, "metadata": {}}
        for i, (reference, answer) in enumerate(zip(references, answers or [""] * len(references), strict=True))
    ]


@pytest.mark.filterwarnings("error")
def test_one_line_per_task_breaks_between_metrics() -> None:
    sexes, ages, words = ["male"] * 6 + ["female"] * 2, [f"{20 + i} years" for i in range(12)], ["Yes it is.", "No."]
    blank = [*rows("sex", sexes), *rows("age", ages), *rows("words", words)]
    answered = [
        *rows("sex", sexes, ["male"] * 4 + ["female", "?"] + ["female"] * 2),
        *rows("age", ages, ["21 years", *ages[1:11], "none"]),
        *rows("words", words, ["Yes it is.", "Yes."]),
    ]
    tasks = tasks_of(blank)
    metrics = {f"eval_{name}": value for name, value in score(answered, tasks, resamples=0).flat().items()}
    metrics |= {"eval_loss": 0.43216, "eval_auroc/sex": None}
    assert evaluation_lines(1200, metrics, blank, tasks) == [
        "step 1,200  evaluation: loss 0.4322",
        "step 1,200  age: mae 1.000 (chance 3.000), pearson 0.997 (12 conversations,",
        "  1 unparsable)",
        "step 1,200  sex: accuracy 0.750 (chance 0.750), balanced_accuracy 0.833, auroc –",
        "  (8 conversations, 1 unparsable)",
        "step 1,200  words: accuracy 0.500 (chance 0.500) (2 conversations)",
    ]
    assert headline_of(metrics, None) == "eval_accuracy 0.700"
    assert headline_of(metrics, "eval_mae/age") == "eval_mae/age 1.000"
    assert headline_of({"step": 3.0, "eval_loss": 0.5}, None) == "eval_loss 0.500"
