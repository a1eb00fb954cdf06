"""Metrics of reports against sacrebleu and rouge-score themselves, and by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tests.helpers.small_run import MODALITIES, read_lines, said, umbrella, write_config
from umbrella_jax.config.schema import TaskConfig
from umbrella_jax.errors import ConfigError
from umbrella_jax.scoring import tasks as tasks_module
from umbrella_jax.scoring.bootstrap import Figure
from umbrella_jax.scoring.metrics import score, tasks_of
from umbrella_jax.scoring.text import report_statistics, write_reports

Rows = list[dict[str, Any]]
SENTENCES = (
    "Left frontal infarct.",
    "No mass.",
    "The ventricles are normal.",
    "Mild atrophy, no acute infarct.",
    "Yes",
)
TASKS = {"tasks": {"report": {"kind": "report"}, "sex": {"answers": ["a", "b"]}}}
REPORT = {"report": TaskConfig(kind="report")}


def row(prediction: str, reference: str, subject: int) -> dict[str, Any]:
    metadata = {"task": "report", "subject_id": f"s{subject}"}
    return {"task_id": f"{subject}", "prediction": prediction, "reference": reference, "metadata": metadata}


def random_rows(seed: int, count: int) -> Rows:
    """Make reports of zero to three sentences; some answers are empty, equal to the reference or unlike it."""
    rng = np.random.default_rng(seed)

    def text(least: int) -> str:
        return " ".join(rng.choice(SENTENCES, rng.integers(least, 4)))

    references = [text(1) for _ in range(count)]
    return [row(r if rng.random() < 0.3 else text(0), r, i // 2) for i, r in enumerate(references)]


def figures(rows: Rows, **options: Any) -> dict[str, Figure]:
    return score(rows, tasks_of(rows, REPORT), **options).task_figures("report")


@pytest.mark.parametrize("count", [1, 2, 12])
def test_overlap_is_that_of_sacrebleu_and_rouge_score_in_every_resample(count: int) -> None:
    rng = np.random.default_rng(count)
    rouge = RougeScorer(["rougeL"])
    for seed in range(8):
        rows = random_rows(seed, count)
        (task,) = tasks_of(rows, REPORT).values()
        statistics = report_statistics(task, rows, np.arange(count))
        weights = rng.multinomial(count, np.full(count, 1 / count), 3).T
        for w in weights.T:
            drawn = [r for r, times in zip(rows, w, strict=True) for _ in range(times)]
            answers, references = [r["prediction"] for r in drawn], [r["reference"] for r in drawn]
            expected = {
                "bleu": sacrebleu.corpus_bleu(answers, [references]).score,
                "chrf": sacrebleu.corpus_chrf(answers, [references]).score,
                "rouge_l": np.mean([rouge.score(r["reference"], r["prediction"])["rougeL"].fmeasure for r in drawn]),
            }
            with np.errstate(invalid="ignore", divide="ignore"):
                found = {name: statistics[name].compute(w[:, None].astype(float))[0] for name in expected}
            assert found == pytest.approx(expected, abs=1e-9)


def test_statements_by_hand() -> None:
    rows = [
        # 2 of 2 findings; both sides against one: 1 common of 2 and 1
        row("Bilateral hippocampal atrophy. No infarct.", "Left hippocampal atrophy without infarct.", 0),
        # the reference says that it is there, the answer that it is not: 0 of 1 and 1, and so for region and side
        row("No lesion of the right thalamus.", "Lesion of the right thalamus.", 1),
        row("Unsure.", "Hydrocephalus.", 2),
    ]
    found = {name: figure.value for name, figure in figures(rows, resamples=0).items()}
    assert found["finding_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert (found["finding_f1/infarct"], found["finding_f1/lesion"], found["finding_f1/hydrocephalus"]) == (1, 0, 0)
    assert (found["region_f1"], found["region_f1/hippocampus"], found["region_f1/thalamus"]) == (0.5, 1, 0)
    assert found["laterality_f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert (found["laterality_f1/left"], found["laterality_f1/right"]) == (1, 0)
    assert "finding_f1/tumour" not in found


def test_chance_is_a_random_report_of_another_subject() -> None:
    mean = np.mean
    texts = ("Left frontal infarct.", "No mass.", "No mass.")
    rows = [row("", text, i) for i, text in enumerate(texts)]
    chance = figures(rows, resamples=0)["finding_f1"].chance
    assert chance == pytest.approx(mean([0, 1 / 2, 1 / 2]), abs=0.06)  # the two reports without a mass agree
    assert figures([row("", "No mass.", 0)], resamples=0)["finding_f1"].chance is None
    assert score(rows, tasks_of(rows, REPORT), resamples=0).notes[1] == (
        f"bleu: sacrebleu, nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}; 0 to 100."
    )


def test_refuses_reports_without_the_extra_that_their_metrics_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "find_spec", lambda name: None)
    rows = random_rows(0, 4)
    with pytest.raises(ConfigError, match=r'sacrebleu and rouge_score.*pip install "umbrella-jax\[text\]"'):
        tasks_of(rows, REPORT)
    assert tasks_of(rows, {"report": TaskConfig(kind="report", metrics=("finding_f1",))})


def test_reports_are_written_for_other_programs(tmp_path: Path) -> None:
    rows = [*random_rows(0, 3), row("b", "a", 9) | {"metadata": {"task": "sex"}}]
    predictions, out, config = tmp_path / "p.jsonl", tmp_path / "reports.jsonl", tmp_path / "c.yaml"
    predictions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_config(config, {"model": {"modalities": MODALITIES}, "evaluation": {"resamples": 0, **TASKS}})
    words = ["score", predictions, "--config", config, "--reports", out]
    _, error_text = said(*words)
    assert f"{out}: 3 reports" in error_text
    assert read_lines(out) == [
        {
            "task_id": r["task_id"],
            "task": "report",
            "subject": r["metadata"]["subject_id"],
            "ref": r["reference"],
            "hyp": r["prediction"],
        }
        for r in rows[:3]
    ]
    assert "already exists; choose another file" in umbrella(*words, code=2)
    with pytest.raises(ConfigError, match=r"no task with sentences as answers.*sex \(classification\)"):
        write_reports([rows[3]], tasks_of([rows[3]], {"sex": TaskConfig(answers=("a", "b"))}), tmp_path / "none.jsonl")
