"""What an answer says: a label, or a number with a unit."""

import math
import re
import unicodedata

_NUMBER = re.compile(r"(?<![\w.,])[+-]?(?:\d[\d.,]*\d|\d|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
"""Behind a letter it is none: T1."""
_PLAIN = re.compile(r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))")
_WORD = re.compile(r"[\s-]*([^\W\d_]+|%|°\w*)")


def normalise(answer: str) -> str:
    """An answer without case, surrounding white space and final full stop, in Unicode's NFC as tokenizers write it."""
    return unicodedata.normalize("NFC", answer.strip().casefold()).removesuffix(".").strip()


def parse_number(text: str, unit: str | None = None) -> float | None:
    """The one number that a text says; None where it says none, several, or one that can be read in two ways.

    - `27`, `-3.5`, `1e-3`, `The age is 27.5 years.`, `27-year-old`, `27 or 27`: that number. A minus may be U+2212.
    - `3,5` is 3.5; `1,234` (1234 or 1.234?), `1,234.5`, `1.2.3` are none, and with them the whole text.
    - Different numbers are none: `27 or 28`, `20-30`, `27 ± 3`, `27 years and 3 months`.
    - With letters against it a figure is no number, and is passed over: `T1`, `3T`, `2nd`; but not where they are the
      unit: `27years`. Words are none: `twenty-seven`.

    Args:
        unit: what may stand behind the number, with or without a final s; another word there, as in `324 months`, makes
            the text say none. Where it is None, whatever stands there is passed over.
    """
    text = text.replace("\N{MINUS SIGN}", "-").strip()
    values: set[float] = set()
    at = 0
    while found := _NUMBER.search(text, at):
        at = found.end()
        behind = _WORD.match(text, at)
        if unit is not None and (stated := _unit(unit).match(text, at)):
            at = stated.end()
        elif behind and behind.start(1) == at and behind[1][0].isalnum():
            continue
        elif unit is not None and behind:
            return None
        written = found[0]
        if _DECIMAL_COMMA.fullmatch(written):
            written = written.replace(",", ".")
        elif not _PLAIN.fullmatch(written):
            return None
        values.add(float(written))
    return value if len(values) == 1 and math.isfinite(value := values.pop()) else None


def stated_unit(text: str) -> str | None:
    """The word right behind the number of a text that holds one."""
    found = _NUMBER.search(text)
    behind = found and _WORD.match(text, found.end())
    return behind[1] if behind else None


def same_unit(one: str, other: str) -> bool:
    """Whether one unit may stand for the other."""
    return _unit(one).fullmatch(other) is not None


def _unit(unit: str) -> re.Pattern[str]:
    """Matches it behind a number, singular or plural."""
    word = unit.strip()
    stem = word[:-1] if len(word) > 2 and word.casefold().endswith("s") else word
    return re.compile(rf"[\s-]*{re.escape(stem)}(?:s)?(?!\w)", re.IGNORECASE)


def is_number(text: str) -> bool:
    """Whether a text is a number, with or without a word behind it, and nothing else."""
    found = _NUMBER.match(text)
    behind = found and _WORD.match(text, found.end())
    end = behind or found
    return end is not None and end.end() == len(text) and parse_number(text, stated_unit(text)) is not None
