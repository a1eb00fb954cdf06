"""Candidate numbers of a regression, written as its references are written."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

from umbrella_jax.config.schema import NUMBER_PLACE, NumbersConfig
from umbrella_jax.errors import ConfigError

_NUMBER = re.compile(r"(?<![\w.,])-?(?:\d[\d.,]*\d|\d)(?![\w.,]*\d)")
_DIGITS = 700
"""Digits of exact sums: floats have up to 309 before the point and 324 zeros after it."""
_PLAIN = re.compile(r"-?\d+(?:\.(\d+))?")


@dataclass(frozen=True)
class NumberTemplate:
    """How the answers of a task write a number."""

    before: str
    """Text before the number."""
    after: str
    """Text after it."""
    decimals: int | None
    """Number of decimals; None for as many as the number needs."""

    @classmethod
    def parse(cls, pattern: str) -> "NumberTemplate":
        """Return the template of `NumbersConfig.text`, such as `{} years.`."""
        before, decimals, after = re.split(NUMBER_PLACE, pattern)
        return cls(before, after, None if decimals is None else int(decimals))

    @classmethod
    def infer(cls, place: str, references: Iterable[str], remedy: str = "") -> "NumberTemplate":
        """Return the template that all references share.

        Args:
            place: key of the candidates in messages, such as `evaluation.tasks.age.numbers`.
            references: right answers as they are written.
            remedy: what to do if they do not; by default, to set `PLACE.text`.

        Raises:
            ConfigError: a reference has no number or several, or two are written differently.
        """
        remedy = remedy or f"set {place}.text, such as '{{}} years.'"
        first: dict[tuple[str, str], str] = {}
        fractions: list[str] = []
        for text in references:
            numbers = list(_NUMBER.finditer(text))
            plain = _PLAIN.fullmatch(numbers[0][0]) if len(numbers) == 1 else None
            if plain is None:
                raise ConfigError(f"{place}: reference {text!r}: expected exactly one number, as in '27.5'; {remedy}")
            first.setdefault((text[: numbers[0].start()], text[numbers[0].end() :]), text)
            fractions.append(plain[1] or "")
        if len(first) != 1:
            texts = list(first.values())
            written = f"are written differently: {texts[0]!r} and {texts[1]!r}" if texts else "are missing"
            raise ConfigError(f"{place}: references {written}; {remedy}")
        ((before, after),) = first
        lengths = {len(fraction) for fraction in fractions}
        if len(lengths) > 1 and any(fraction.endswith("0") for fraction in fractions):
            raise ConfigError(
                f"{place}: some references end in a 0 after the decimal point and others have fewer decimals; {remedy}"
            )
        return cls(before, after, lengths.pop() if len(lengths) == 1 else None)

    def write(self, number: Decimal) -> str:
        """Return a number up to its end, without the text after it."""
        digits = f"{number:f}" if self.decimals is None else f"{number:.{self.decimals}f}"
        return self.before + (digits.rstrip("0").rstrip(".") if self.decimals is None and "." in digits else digits)


@dataclass(frozen=True)
class NumberGrid:
    """The A candidate numbers of a task, ascending."""

    values: tuple[float, ...]
    """The numbers."""
    texts: tuple[str, ...]
    """Each as a whole answer."""
    stems: tuple[str, ...]
    """Each answer up to the end of its number."""

    @classmethod
    def make(cls, candidates: NumbersConfig, references: Sequence[str], place: str) -> "NumberGrid":
        """Return the candidates that a task is configured with.

        Args:
            candidates: which numbers.
            references: right answers as they are written; the template comes from them unless `candidates.text` is set.
            place: key of the candidates in messages, such as `evaluation.tasks.age.numbers`.

        Raises:
            ConfigError: the references do not share a template, or it has too few decimals for the candidates.
        """
        template = (
            NumberTemplate.infer(place, references)
            if candidates.text is None
            else NumberTemplate.parse(candidates.text)
        )
        return cls.write(candidates, template, place)

    @classmethod
    def write(cls, candidates: NumbersConfig, template: NumberTemplate, place: str) -> "NumberGrid":
        """Return the candidates in a template. Raises ConfigError if it has too few decimals for them."""
        low, high, step = (Decimal(str(number)) for number in (candidates.low, candidates.high, candidates.step))
        with localcontext(prec=_DIGITS):
            numbers = [low + n * step for n in range(int((high - low) / step) + 1)]
        if template.decimals is not None:
            unit = Decimal(1).scaleb(-template.decimals)
            with localcontext(prec=_DIGITS):
                inexact = [number for number in numbers if number % unit]
            if inexact:
                raise ConfigError(
                    f"{place}: {inexact[0]:f} cannot be written with {template.decimals} decimals, as the answers are; "
                    f"expected low and step in multiples of {unit:f}"
                )
        stems = tuple(map(template.write, numbers))
        return cls(tuple(map(float, numbers)), tuple(stem + template.after for stem in stems), stems)
