"""Answers in JSON by hand: exact match, right fields, errors of numbers, and schemas that cannot be scored."""

import json
from pathlib import Path
from typing import Any

import pytest

from umbrella_jax.config.schema import TaskConfig
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.scoring.fields import compare_fields
from umbrella_jax.scoring.metrics import metric_names, score, tasks_of
from umbrella_jax.scoring.structured import read_schema

SCHEMA = {
    "type": "object",
    "properties": {
        "finding": {"enum": ["tumour", "none"]},
        "size": {"$ref": "#/$defs/size"},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "grade": {"enum": [1, 2]},
    },
    "$defs": {"size": {"type": "object", "properties": {"mm": {"type": "number"}, "sure": {"type": "boolean"}}}},
}
REFERENCES = [
    {"finding": "tumour", "size": {"mm": 10, "sure": True}, "age": 30, "grade": 1},
    {"finding": "tumour", "size": {"mm": 20, "sure": True}, "age": None, "grade": 2},
    {"finding": "none", "size": {}, "age": 50, "grade": 2},
]
ANSWERS = [
    '{"grade": 1.0, "age": 30,\n "size": {"sure": true, "mm": 10.0}, "finding": "tumour"}',  # written otherwise
    '{"finding": "none", "size": {"mm": 14.5, "sure": true}, "age": 40}',  # an age too many, no grade
    "no idea",
]


def scored(schema: Path, answers: list[str], references: list[Any], **configured: Any) -> Any:
    rows = [
        {"task_id": f"{i}", "prediction": a, "reference": r, "metadata": {"task": "t", "subject_id": f"s{i}"}}
        for i, (a, r) in enumerate(zip(answers, references, strict=True))
    ]
    return score(rows, tasks_of(rows, {"t": TaskConfig(schema=str(schema), **configured)}), resamples=50)


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    return file


def test_fields_by_hand(schema: Path) -> None:
    scores = scored(schema, ANSWERS, [json.dumps(reference, indent=2) for reference in REFERENCES])
    figures = scores.task_figures("t")
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {
            "accuracy": 1 / 3,
            "field_accuracy": 4 / 8,  # right are all three of the first answer, and `sure` of the second
            "field_accuracy/finding": 1 / 3,
            "field_mae/size.mm": 5.5 / 2,
            "field_accuracy/size.sure": 2 / 2,
            "field_mae/age": (0 + 20) / 2,  # no number counts as 30, the end farther from 50
            "field_accuracy/grade": 1 / 3,
            "unparsable": 1 / 3,
        }
    )
    assert {name: figure.chance for name, figure in figures.items()} == pytest.approx(
        {
            "accuracy": 1 / 3,
            "field_accuracy": (2 + 2 + 2) / 8,
            "field_accuracy/finding": 2 / 3,
            "field_mae/size.mm": 5,
            "field_accuracy/size.sure": 1,
            "field_mae/age": 10,
            "field_accuracy/grade": 2 / 3,
            "unparsable": None,
        }
    )
    assert figures["field_mae/age"].n == 2
    second = {"reference": json.dumps(REFERENCES[1]), "prediction": ANSWERS[1]}
    assert compare_fields(scores.tasks["t"], second) == [
        ("finding", '"tumour"', '"none"'),
        ("size.mm", "20", "14.5"),
        ("size.sure", "true", "true"),
        ("age", "null", "40"),
        ("grade", "2", None),
    ]
    assert scores.flat()["accuracy"] == pytest.approx(1 / 3)
    assert {*metric_names(scores.tasks)} == {*scores.figures}
    assert "t: 1 of 3 answers are no JSON object; each counts as wrong in every field." in scores.notes


def test_a_schema_leaves_the_metrics_of_text_to_the_config(schema: Path) -> None:
    references = list(map(json.dumps, REFERENCES))
    scores = scored(schema, references, references, metrics=("field_accuracy", "chrf"))
    assert (scores.flat()["chrf/t"], scores.flat()["field_accuracy/t"]) == pytest.approx((100, 1))
    assert "accuracy/t" not in scores.figures


def test_refuses_references_and_schemas_that_cannot_be_scored(schema: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task t: 1: reference 'no': expected a JSON object"):
        scored(schema, ["", ""], ["{}", "no"])
    with pytest.raises(ConfigError, match="metrics: field_accuracy: a report has none"):
        tasks_of(
            [{"task_id": "0", "reference": "a"}], {"unnamed": TaskConfig(kind="report", metrics=("field_accuracy",))}
        )
    schema.write_text('{"type": "object",\n "properties": {}')
    with pytest.raises(ConfigError, match=r"schema.json:2: not valid JSON"):
        read_schema(schema)
    with pytest.raises(ConfigError, match=r"none.json: .*docs/answers.md"):
        read_schema(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="schema: a regression has none"):
        TaskConfig(kind="regression", schema="schema.json")
