"""The errors that a user can meet. Each names the file, the field and the remedy.

    UmbrellaError
      ConfigError, DataError, CheckpointError    what the user handed in cannot be used
      RunError                                   what was handed in is good, and it went wrong nevertheless
    Interrupted                                  a signal ended a run that goes on with --resume

Whoever checks something collects every fault first and raises once, so that nobody mends
a thousand files one error at a time.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

LESS = (
    "lower train.batch_size, set model.remat: full or model.frozen_dtype: bfloat16, or split the weights "
    "(--mesh fsdp=N); `umbrella-jax plan` says what fits"
)
"""The remedy, where a device's memory is full."""
_SHOWN = 50
_ALIKE = 4
"""So many faults that say the same of several places are told as one."""
_LONGEST = 2000  # characters of one fault: what it quotes may be a text of megabytes


def out_of_memory(error: BaseException) -> str | None:
    """What is to be said where jax found a device's memory full; None of any other error."""
    if not isinstance(error, RuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return f"{str(error).splitlines()[0]}; the device's memory is full: {LESS}"


def visible(text: str, kept: str = "\n\t") -> str:
    """The text with all but letters, signs, spaces and what is `kept` written out: a file's names and texts may hold
    what moves a terminal's cursor, colours its lines or turns their direction round."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _told(faults: Sequence[str]) -> Iterator[str]:
    """Lines, in order; a reason that many of them have (paths without --image-root) once, above its places."""
    places: dict[str, list[str]] = {}
    for fault in faults:
        place, _, reason = fault.partition(": ")
        places.setdefault(reason, []).append(place)
    for fault in faults:
        reason = fault.partition(": ")[2]
        alike = places.get(reason, [])
        if not reason or 0 < len(alike) < _ALIKE:
            yield f"  - {fault}"
        elif alike:
            yield f"  - {len(alike)} × {reason}"
            yield from (f"      {place}" for place in places.pop(reason))


class UmbrellaError(ValueError):
    """One or more faults; `faults` holds every one of them, `exit_code` what the command line ends with."""

    exit_code: ClassVar[int] = 2

    def __init__(self, faults: str | Sequence[str]):
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        """As people read them: fifty, of each its beginning, control characters written out."""
        shown = [f if len(f) <= _LONGEST else f"{f[:_LONGEST]} …" for f in self.faults[:_SHOWN]]
        shown = [visible(f) for f in shown]
        if len(self.faults) == 1:
            return shown[0]
        lines = [f"{len(self.faults)} faults:", *_told(shown)]
        if len(self.faults) > _SHOWN:
            lines.append(f"  ... and {len(self.faults) - _SHOWN} more")
        return "\n".join(lines)


class ConfigError(UmbrellaError):
    """A configuration that cannot be run."""


class DataError(UmbrellaError):
    """A conversation, an image or a tokenizer that cannot be used."""


class CheckpointError(UmbrellaError):
    """A checkpoint that does not hold what it should."""


class RunError(UmbrellaError):
    """Something that went wrong while it ran: a loss that is not finite, a directory that was deleted."""

    exit_code = 1


class Interrupted(Exception):
    """A run that a signal ended between two steps, after it had saved: no error, and not the end of the run."""

    def __init__(self, signum: int, message: str):
        self.signum = signum
        super().__init__(message)
