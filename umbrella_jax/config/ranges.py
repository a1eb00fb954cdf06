"""Ranges of numbers, declared on the fields of a configuration: `Annotated[int, Range(ge=1)]`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from umbrella_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Range:
    """The finite numbers that a field may hold; of a list, each of its numbers.

    Named as in annotated-types, but not its classes: pydantic would enforce those before `__post_init__`, and one bad
    number would hide the section's other faults.
    """

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    unit: str = ""

    def __contains__(self, number: float) -> bool:
        try:
            is_finite = math.isfinite(number)
        except OverflowError:  # a whole number too large for a float
            return False
        return is_finite and self.gt < number < self.lt and self.ge <= number <= self.le

    def __str__(self) -> str:
        """Return the range in words, such as `0 or more`, `0 to 90 degrees` or `a positive number`."""
        if self.ge > -math.inf and self.le < math.inf:
            parts = [f"{_text(self.ge)} to {_text(self.le)}"]
        else:
            parts = [f"{_text(self.ge)} or more"] if self.ge > -math.inf else []
            parts += ["a positive number"] if self.gt == 0 else []
            parts += [f"at most {_text(self.le)}"] if self.le < math.inf else []
            parts += [f"less than {_text(self.lt)}"] if self.lt < math.inf else []
        return f"{', '.join(parts) or 'a finite number'} {self.unit}".rstrip()


def _text(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


Count = Annotated[int, Range(ge=1)]
CountOrZero = Annotated[int, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]
"""Seed of random numbers. JAX takes 32 bits: it would draw the same for a larger one as for its last bits."""
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Probability = Annotated[float, Range(ge=0, le=1)]


def range_of(hint: Any) -> Range | None:
    """Return the `Range` of a field's type, which may be optional."""
    notes = [note for part in (hint, *get_args(hint)) for note in getattr(part, "__metadata__", ())]
    return next((note for note in notes if isinstance(note, Range)), None)


class Section:
    """Base of a configuration's dataclasses: rejects unknown keys, numbers out of range and contradictions.

    Raises ConfigError with every fault of the section, whether it is read from YAML or made in Python.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if faults := [*_range_faults(self), *self.contradictions()]:
            raise ConfigError(faults)

    def contradictions(self) -> Iterator[str]:
        """Yield every fault that a field's type and range do not show, such as fields that exclude each other."""
        yield from ()


def _range_faults(section: Section) -> Iterator[str]:
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        yield from range_faults(name, hint, getattr(section, name))


def range_faults(name: str, hint: Any, value: Any) -> Iterator[str]:
    """Yield a fault if a field's number, or one of its list, is out of the range of the field's type."""
    allowed = range_of(hint)
    numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, Real)]
    if allowed is not None and any((n if isinstance(n, int) else float(n)) not in allowed for n in numbers):
        yield f"{name}: expected {allowed}, got {value}"
