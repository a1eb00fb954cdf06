"""Arrange possible answers as trees of tokens, so that what several begin with is computed once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from umbrella_jax.batch import NONE, AnswerTree
from umbrella_jax.config.schema import Template
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.tokenize import CachingTokenizer, encode_answers, encode_numbers

Answers = Sequence[Sequence[int]]
"""Tokens of each answer to one prompt, which `NONE` may follow."""


class AnswerEncoder:
    """Encodes the possible answers to conversations, once for all conversations that differ only in their images."""

    def __init__(self, tokenizer: Any, template: Template):
        self._tokenizer, self._template = CachingTokenizer(tokenizer), template
        self._encoded: dict[Any, Answers] = {}

    def __call__(self, conversation: Conversation, texts: Sequence[str], stems: Sequence[str] | None) -> Answers:
        """Return the tokens of each answer, by `encode_numbers` if there are `stems`, else by `encode_answers`.

        Conversations with equal texts get the same object. Raises DataError as these functions do.
        """
        turns = (
            (m.role, m.inline, tuple(part if isinstance(part, str) else None for part in m.parts))
            for m in conversation.messages[:-1]
        )
        key = (tuple(turns), tuple(texts))
        if key not in self._encoded:
            if stems is None:
                found = encode_answers(conversation, texts, self._tokenizer, template=self._template)
            else:
                found = encode_numbers(conversation, texts, stems, self._tokenizer, template=self._template)
            self._encoded[key] = found
        return self._encoded[key]


def answer_trees(rows: Sequence[Answers], shape: tuple[int, int] | None = None) -> AnswerTree:
    """Return the trees of the answers to each of B prompts, as NumPy arrays.

    Args:
        rows: [B]; rows with equal answers should hold the same object, which is then arranged once.
        shape: (N, A), with room for every row; by default as small as possible.
    """
    trees = {id(answers): _arrange(answers) for answers in rows}
    n, a = shape or tree_shape(rows)
    tokens, depths = np.zeros((2, len(rows), n), np.int32)
    next_tokens = np.full((len(rows), n, a), NONE, np.int32)
    for row, answers in enumerate(rows):
        nodes, following = trees[id(answers)]
        tokens[row, : len(nodes)] = [start[-1] if start else 0 for start in nodes]
        depths[row, : len(nodes)] = [*map(len, nodes)]
        next_tokens[row, : len(nodes), : len(answers)] = following
    return AnswerTree(tokens=tokens, depths=depths, next_tokens=next_tokens)


def tree_shape(rows: Sequence[Answers]) -> tuple[int, int]:
    """Return (N, A): the nodes of the largest tree, two or more, and the most answers."""
    trees = {id(answers): _arrange(answers)[0] for answers in rows}
    return max(2, *map(len, trees.values())), max(map(len, rows))


def _arrange(answers: Answers) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Return the tokens up to each node, and the token that follows it in each answer, int32 [N, A]."""
    whole = [tuple(token for token in answer if token != NONE) for answer in answers]
    number: dict[tuple[int, ...], int] = {(): 0}
    for answer in whole:
        for end in range(1, len(answer)):
            number.setdefault(answer[:end], len(number))
    following = np.full((len(number), len(whole)), NONE, np.int32)
    for a, answer in enumerate(whole):
        for end, token in enumerate(answer):
            following[number[answer[:end]], a] = token
    return list(number), following
