"""Parse answers: normalise labels, and read numbers and their units."""

import math
import re
import unicodedata

_NUMBER = re.compile(r"(?<![\w.,])[+-]?(?:\d[\d.,]*\d|\d|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
"""A number in a text. Digits after a letter are none: T1."""
_PLAIN = re.compile(r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))")
_WORD = re.compile(r"[\s-]*([^\W\d_]+|%|°\w*)")


def normalise(answer: str) -> str:
    """Remove case, surrounding white space and a final full stop; convert to Unicode's NFC, as tokenizers write."""
    return unicodedata.normalize("NFC", answer.strip().casefold()).removesuffix(".").strip()


def parse_number(text: str, unit: str | None = None) -> float | None:
    """Return the only number in a text; None if it has none, several, or an ambiguous one.

    - `27`, `-3.5`, `1e-3`, `The age is 27.5 years.`, `27-year-old`, `27 or 27`: that number. A minus may be U+2212.
    - `3,5` is 3.5. A text with `1,234` (1234 or 1.234?), `1,234.5` or `1.2.3` has no number.
    - Different numbers are none: `27 or 28`, `20-30`, `27 ± 3`, `27 years and 3 months`.
    - Digits that touch letters are ignored: `T1`, `3T`, `2nd`; unless the letters are the unit: `27years`. Words are no
      numbers: `twenty-seven`.

    Args:
        unit: the word that may follow the number, with or without a final s. Any other word there, as in `324 months`,
            makes the result None. If `unit` is None, whatever follows is ignored.
    """
    text = text.replace("\N{MINUS SIGN}", "-").strip()
    values: set[float] = set()
    at = 0
    while number := _NUMBER.search(text, at):
        at = number.end()
        word = _WORD.match(text, at)
        if unit is not None and (stated := _unit(unit).match(text, at)):
            at = stated.end()
        elif word and word.start(1) == at and word[1][0].isalnum():
            continue
        elif unit is not None and word:
            return None
        written = number[0]
        if _DECIMAL_COMMA.fullmatch(written):
            written = written.replace(",", ".")
        elif not _PLAIN.fullmatch(written):
            return None
        values.add(float(written))
    return value if len(values) == 1 and math.isfinite(value := values.pop()) else None


def stated_unit(text: str) -> str | None:
    """Return the word right after the first number of a text."""
    number = _NUMBER.search(text)
    word = number and _WORD.match(text, number.end())
    return word[1] if word else None


def same_unit(one: str, other: str) -> bool:
    """Return whether two units are the same but for case and a final s."""
    return _unit(one).fullmatch(other) is not None


def _unit(unit: str) -> re.Pattern[str]:
    """Return a pattern for the unit after a number, in singular or plural."""
    word = unit.strip()
    stem = word[:-1] if len(word) > 2 and word.casefold().endswith("s") else word
    return re.compile(rf"[\s-]*{re.escape(stem)}(?:s)?(?!\w)", re.IGNORECASE)


def is_number(text: str) -> bool:
    """Return whether a text is only a number, with or without a word after it."""
    number = _NUMBER.match(text)
    word = number and _WORD.match(text, number.end())
    end = word or number
    return end is not None and end.end() == len(text) and parse_number(text, stated_unit(text)) is not None
