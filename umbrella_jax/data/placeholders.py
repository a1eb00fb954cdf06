"""Texts with placeholders in braces, and their faults."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter

from umbrella_jax.data.conversation import IMAGE_MARKER, TURN_END, TURN_START

_LISTED = 8
"""Placeholders that a message lists; of more, only the nearest is named."""


@dataclass(frozen=True)
class TextTemplate:
    """A text in which each {NAME} is replaced by a value; {{ and }} are braces.

    A name may be any column of a table, with spaces, dots or brackets.
    """

    pieces: tuple[tuple[str, str | None], ...]
    """(literal text, name of the placeholder after it)."""

    @classmethod
    def parse(cls, text: str) -> "TextTemplate":
        """Parse a text in which `text_faults` finds no fault."""
        return cls(tuple((literal, name) for literal, name, _, _ in Formatter().parse(text)))

    @property
    def names(self) -> list[str]:
        """The placeholders, in order."""
        return [name for _, name in self.pieces if name is not None]

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with each placeholder replaced. Raise KeyError for a name without a value."""
        return "".join([literal if name is None else literal + values[name] for literal, name in self.pieces])

    def replace(self, name: str, text: str) -> "TextTemplate":
        """Return a template with one placeholder replaced."""
        return TextTemplate(tuple((p + text, None) if n == name else (p, n) for p, n in self.pieces))


def text_faults(text: str, allowed: Collection[str], needed: str | None = None) -> list[str]:
    """Return the faults of a text.

    Args:
        text: with placeholders.
        allowed: names that a placeholder may have.
        needed: name of a placeholder that the text must have.
    """
    try:
        fields = [(name, spec or conversion) for _, name, spec, conversion in Formatter().parse(text)]
    except ValueError as error:
        return [f"{error}; write {{{{ or }}}} for a brace"]
    faults = [
        f"placeholder {name!r}: expected {_expected(name, allowed)}"
        for name, format_spec in fields
        if name is not None and (name not in allowed or format_spec)
    ]
    if needed is not None and not faults and all(name != needed for name, _ in fields):
        faults.append(f"expected {{{needed}}} in it; without it every subject has the same answer")
    return faults + control_token_faults(text)


def _expected(name: str, allowed: Collection[str]) -> str:
    if len(allowed) <= _LISTED:
        return " or ".join(f"{{{other}}}" for other in allowed)
    near = get_close_matches(name, allowed, n=1, cutoff=0.5)
    return "the name of a column" + (f"; the nearest is {{{near[0]}}}" if near else "")


def control_token_faults(text: str) -> list[str]:
    """Return a fault if a text contains a token that marks a turn or an image."""
    forged = [token for token in (TURN_START, TURN_END, IMAGE_MARKER) if token in text]
    return [f"contains {' and '.join(forged)}, which only the tokenizer may add; take it out"] if forged else []
