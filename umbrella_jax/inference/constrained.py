"""Answers that follow a JSON schema: llguidance says which tokens may come next, and only those are chosen from.

The masks are made on the host, token by token, so an answer costs a program call per token instead of one for all.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt32

from umbrella_jax.errors import ConfigError, DataError, RunError
from umbrella_jax.inference.generate import NONE
from umbrella_jax.inference.processor import Processor
from umbrella_jax.scoring.rows import Row
from umbrella_jax.scoring.structured import AnswerSchema, parse_answer_object, read_schema
from umbrella_jax.scoring.tasks import task_of

_WHITESPACE = r" |\n {0,12}"
"""White space between the parts of an answer, as `json.dumps` writes it with and without `indent`."""
_SHOWN = 30
"""Number of characters of a reference that a fault shows."""
_ALL = np.uint32(2**32 - 1)
_INNER = ("properties", "$defs", "definitions", "items", "prefixItems", "anyOf", "oneOf", "allOf")
"""Keywords whose values are schemas, or lists or mappings of schemas."""


class JsonConstraint:
    """Limits answers to the JSON of a schema, in the tokens of a model."""

    def __init__(self, schema: AnswerSchema, vocabulary: Any):
        """Compile a schema.

        Args:
            vocabulary: the result of `grammar_vocabulary`.

        Raises ConfigError naming the place of what is no JSON schema, or has no value, or is not supported by
        llguidance.
        """
        if fault := _fault(schema.content, schema.content, vocabulary):
            place, reason = fault
            raise ConfigError(f"{schema.file}: {place or 'schema'}: {reason}; correct it, or express it differently")
        self.schema, self._vocabulary = schema, vocabulary
        self._grammar = _grammar(schema.content)

    @classmethod
    def load(cls, path: str | Path, processor: Processor, vocab_size: int) -> "JsonConstraint":
        """Read a schema file for a model.

        Args:
            vocab_size: number of the model's logits, `model.config.text.vocab_size`.

        Raises ConfigError: as `read_schema`, `grammar_vocabulary` and `JsonConstraint`.
        """
        return cls(read_schema(path), grammar_vocabulary(processor, vocab_size))

    def matcher(self) -> Any:
        """Return llguidance's state of an answer without tokens."""
        from llguidance import LLMatcher

        return LLMatcher(self._vocabulary, self._grammar)

    def refused_end(self, text: str, tokenizer: Any) -> str | None:
        """Return the end of a text from which on it does not follow the schema; None if it follows it."""
        ids, matcher = tokenizer.encode(text, add_special_tokens=False), self.matcher()
        follows = matcher.validate_tokens(ids)
        if follows < len(ids):
            return str(tokenizer.decode(ids[follows:]))
        matcher.consume_tokens(ids)
        return None if matcher.is_accepting() else ""

    def masks(self, rows: int) -> "JsonMasks":
        """Return the masks of so many new answers, for `generate` and `stream`."""
        return JsonMasks([self.matcher() for _ in range(rows)], self._vocabulary.vocab_size)


class JsonMasks:
    """The masks of a batch's answers (`TokenMasks`); some rows may be free."""

    def __init__(self, matchers: Sequence[Any | None], vocab_size: int):
        """Begin the answers.

        Args:
            matchers: llguidance's state of each row; None for a row without a schema.
        """
        self._matchers = [*matchers]
        self._mask = np.full((len(matchers), -(-vocab_size // 32)), _ALL)

    def allowed(self) -> UInt32[np.ndarray, "B W"]:
        """Return the tokens that may come next, as for `decode`."""
        for row, matcher in enumerate(self._matchers):
            if matcher is not None:
                self._mask[row] = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._mask.shape[1]]
        return self._mask.copy()

    def accept(self, tokens: Int32[np.ndarray, "B"]) -> None:
        """Append a token to each row. Raises RunError if llguidance gives up on a schema."""
        for row, matcher in enumerate(self._matchers):
            if matcher is None:
                continue
            if tokens[row] == NONE or matcher.is_stopped():
                self._matchers[row] = None
            elif not matcher.consume_token(int(tokens[row])):
                raise RunError(f"the answer's JSON schema is too complex for llguidance: {matcher.get_error()}")


class Constraints:
    """The schema that the answer to each conversation of a data set must follow, if it has one."""

    def __init__(self, constraints: Sequence[JsonConstraint | None], vocab_size: int):
        self._constraints, self._vocab_size = constraints, vocab_size

    @classmethod
    def for_tasks(
        cls, rows: Sequence[Row], files: Mapping[str, str | Path | None], processor: Processor, vocab_size: int
    ) -> "Constraints | None":
        """Return the constraints of rows; None if no row has any.

        Args:
            files: {task: its schema}.
            vocab_size: number of the model's logits.

        Raises:
            ConfigError: as `JsonConstraint.load`, for every schema.
            DataError: a reference is a JSON object that does not follow its schema, so no answer could equal it.
        """
        used = {name: file for name in sorted(set(map(task_of, rows))) if (file := files.get(name)) is not None}
        if not used:
            return None
        vocabulary = grammar_vocabulary(processor, vocab_size)
        by_task = {name: JsonConstraint(read_schema(file), vocabulary) for name, file in used.items()}
        own = [by_task.get(task_of(row)) for row in rows]
        faults = list[str]()
        for row, constraint in zip(rows, own, strict=True):
            if constraint is None or parse_answer_object(text := row["reference"].strip()) is None:
                continue
            if (end := constraint.refused_end(text, processor.tokenizer)) is not None:
                place = f"from {end[:_SHOWN]!r} on" if end else "at its end"
                faults.append(
                    f"{row['task_id']}: its reference does not follow {constraint.schema.file} {place}; check values, "
                    "order of the fields and white space, and write letters as they are (docs/answers.md)"
                )
        if faults:
            raise DataError(faults)
        return cls(own, vocab_size)

    @property
    def texts(self) -> list[str]:
        """The distinct schemas, as JSON."""
        return sorted({constraint.schema.text for constraint in self._constraints if constraint is not None})

    def repeated(self, conversations: Sequence[int]) -> "Constraints":
        """Return the constraints of a data set that has these conversations, in this order and possibly repeated."""
        own = [self._constraints[number] for number in conversations]
        return Constraints(own, self._vocab_size)

    def allow_all(self, rows: int) -> UInt32[np.ndarray, "{rows} W"]:
        """Return masks of a batch that allow every token."""
        return JsonMasks([None] * rows, self._vocab_size).allowed()

    def masks(self, conversations: Sequence[int | None]) -> JsonMasks | None:
        """Return the masks of a batch; None if all of its answers are free.

        Args:
            conversations: number of each row's conversation; None for a row without an answer.
        """
        own = [None if number is None else self._constraints[number] for number in conversations]
        if not any(own):
            return None
        return JsonMasks([None if one is None else one.matcher() for one in own], self._vocab_size)


def grammar_vocabulary(processor: Processor, vocab_size: int) -> Any:
    """Return the tokens of a model as llguidance reads them, which takes seconds for a large vocabulary.

    Raises ConfigError if llguidance is not installed, or the tokenizer is not one of the tokenizers library.
    """
    if find_spec("llguidance") is None:
        raise ConfigError(
            "an answer that follows a JSON schema needs llguidance, which is not installed: "
            'pip install "umbrella-jax[text]"'
        )
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: {type(tokenizer).__name__} cannot be limited to a JSON "
            "schema; expected a fast tokenizer, one with a tokenizer.json"
        )
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=processor.stop_ids)


def _grammar(schema: Mapping[str, Any]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _WHITESPACE})


def _fault(schema: Any, root: Mapping[str, Any], vocabulary: Any) -> tuple[str, str] | None:
    """Return (place, reason) of the innermost faulty part of a schema; None if it has no fault."""
    from llguidance import LLMatcher

    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return "", "expected a schema, an object"
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    reason = LLMatcher.validate_grammar(_grammar(shared | schema), vocabulary)
    if not reason:
        return None
    for key in _INNER:
        inner = schema.get(key)
        parts: Sequence[tuple[str, Any]] = ()
        if key == "items":
            parts = [("", inner)] if key in schema else []
        elif isinstance(inner, dict):
            parts = [(f".{name}", part) for name, part in inner.items()]
        elif isinstance(inner, list):
            parts = [(f"[{number}]", part) for number, part in enumerate(inner)]
        for name, part in parts:
            if fault := _fault(part, root, vocabulary):
                place, why = fault
                return f"{key}{name}" + (f".{place}" if place else ""), why
    return "", " ".join(reason.split())
