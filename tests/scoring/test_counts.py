"""The record of a run's data has numbers, and no name."""

from typing import Any

import pytest

from umbrella_jax.config.schema import TaskConfig
from umbrella_jax.data.conversation import Conversation, Message
from umbrella_jax.scoring.counts import count_conversations


def conversation(i: int, task: str, answer: str, *subjects: str, **metadata: Any) -> Conversation:
    messages = (Message("user", ("Which?",)), Message("assistant", (answer,)))
    return Conversation(f"c{i}", "T1", messages, {"task": task, **metadata}, "x.json", frozenset(subjects))


def test_counts_subjects_of_each_answer_once() -> None:
    rows = [conversation(i, "sex", "female." if i % 3 else "male.", f"P{i % 6}") for i in range(12)]
    counts = count_conversations(rows)
    assert (counts["conversations"], counts["subjects"], counts["volumes"]) == (12, 6, {})
    expected = {"kind": "classification", "conversations": 12, "subjects": 6, "answers": {"female": 4, "male": 2}}
    assert counts["tasks"] == {"sex": expected}
    assert "P1" not in str(counts)


def test_counts_kinds_without_listing_their_answers() -> None:
    ages = [conversation(i, "age", f"{50 + i} years", f"P{i}") for i in range(30)]
    notes = [conversation(i, "note", "" if i else "A long report.", f"P{i}") for i in range(3)]
    tasks = count_conversations([*ages, *notes], {"age": TaskConfig(kind="regression")})["tasks"]
    ages_recorded = {"kind": "regression", "conversations": 30, "subjects": 30, "mean": 64.5, "unit": "years"}
    assert tasks["age"] == ages_recorded | {"sd": pytest.approx(8.8034, abs=1e-4)}
    assert tasks["note"] == {"kind": "text", "conversations": 3, "subjects": 3}
