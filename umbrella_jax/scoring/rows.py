"""Rows of predictions.jsonl."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.tokenize import reference_answer
from umbrella_jax.scoring.numeric import read_number
from umbrella_jax.scoring.tasks import Task, label_of

Row = dict[str, Any]
"""A row of predictions.jsonl: `task_id`, `task_type`, `prediction`, `reference`, `metadata`; `cut` if `max_new_tokens`
ended the answer; `likelihoods` if requested; `number` if these are of candidate numbers (`read_number`)."""


@dataclass(frozen=True)
class Answer:
    """The model's answer to one conversation."""

    text: str
    cut: bool = False
    """Whether `max_new_tokens` ended the answer."""
    log_likelihoods: Mapping[str, float] | None = None
    """{answer of the closed set: log p(answer | prompt)}, summed over its tokens, the ending one included; or
    {candidate number: the same up to the token after the number}."""


def blank_rows(conversations: Iterable[Conversation]) -> list[Row]:
    """Return a row per conversation, in order, with a blank prediction.

    If `metadata` lacks `subject_id` and the conversation is about one subject, the row has that one.
    """
    return [
        {
            "task_id": conversation.task_id,
            "task_type": conversation.task_type,
            "prediction": "",
            "reference": reference_answer(conversation),
            "metadata": dict(conversation.metadata) | _subject(conversation),
        }
        for conversation in conversations
    ]


def _subject(conversation: Conversation) -> dict[str, str]:
    known = label_of({"metadata": conversation.metadata}, "subject_id") is not None
    return {} if known or len(conversation.subjects) != 1 else {"subject_id": next(iter(conversation.subjects))}


def with_answer(row: Row, answer: Answer, task: Task | None = None) -> Row:
    """Return the row with the answer as its prediction.

    Args:
        task: if it has candidate numbers, the row gets `number` too.
    """
    cut = {"cut": True} if answer.cut else {}
    if answer.log_likelihoods is None:
        return row | {"prediction": answer.text} | cut
    number = {"number": read_number(task.numbers, answer.log_likelihoods)} if task and task.numbers else {}
    return row | {"prediction": answer.text} | cut | number | {"likelihoods": dict(answer.log_likelihoods)}
