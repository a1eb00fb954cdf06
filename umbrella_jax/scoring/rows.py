"""Rows of predictions.jsonl."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.tokenize import reference_answer
from umbrella_jax.scoring.tasks import label_of

Row = dict[str, Any]
"""`task_id`, `task_type`, `prediction`, `reference`, `metadata`; `cut`, if `max_new_tokens` ended the answer; and
`likelihoods`, if they were asked for."""


@dataclass(frozen=True)
class Answer:
    """To one conversation."""

    text: str
    cut: bool = False
    """Whether `max_new_tokens` ended it."""
    log_likelihoods: Mapping[str, float] | None = None
    """Of each answer that the task knows: log p(answer | prompt), summed over its tokens, with the one that ends it."""


def blank_rows(conversations: Iterable[Conversation]) -> list[Row]:
    """A row for each conversation, in order, that says all but its prediction.

    `metadata.subject_id` is there also where only the conversation itself says whom it is about, and that is one.
    """
    return [
        {
            "task_id": conversation.task_id,
            "task_type": conversation.task_type,
            "prediction": "",
            "reference": reference_answer(conversation),
            "metadata": dict(conversation.metadata) | _about(conversation),
        }
        for conversation in conversations
    ]


def _about(conversation: Conversation) -> dict[str, str]:
    said = label_of({"metadata": conversation.metadata}, "subject_id") is not None
    return {} if said or len(conversation.subjects) != 1 else {"subject_id": next(iter(conversation.subjects))}


def with_answer(row: Row, answer: Answer) -> Row:
    """Return the row with what was predicted, `cut` if it did not end by itself."""
    cut = {"cut": True} if answer.cut else {}
    more = {} if answer.log_likelihoods is None else {"likelihoods": dict(answer.log_likelihoods)}
    return row | {"prediction": answer.text} | cut | more
