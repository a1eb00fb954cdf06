"""The errors that a user can meet. Each names the file, the field and the remedy.

    UmbrellaError
      ConfigError, DataError, CheckpointError    the input cannot be used
      RunError                                   the input is good, but the work failed
    Interrupted                                  a signal ended a run that --resume continues

Checks collect every fault first and raise once, so nobody mends a thousand files one error at a time.
"""

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

LESS = (
    "lower train.batch_size, set model.remat: full or model.frozen_dtype: bfloat16, or split the weights "
    "(--mesh fsdp=N); `umbrella-jax plan` says what fits"
)
"""The remedy for a full device."""
_SHOWN = 50
_ALIKE = 4
"""So many faults with the same reason are printed as one."""
_PLACE = re.compile(r"((?:\([^()]*\)|[^():]|:(?! ))*): ")
_LONGEST = 2000  # characters of one fault: what it quotes may be a text of megabytes


def out_of_memory(error: BaseException) -> str | None:
    """Return the message for an error of JAX about a full device; None for any other error."""
    if not isinstance(error, RuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return f"{str(error).splitlines()[0]}; the device's memory is full: {LESS}"


def visible(text: str, kept: str = "\n\t") -> str:
    """Escape all characters that are neither printable nor `kept`: names and texts from files may contain sequences
    that move a terminal's cursor, colour its lines or reverse their direction."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _split(fault: str) -> tuple[str, str]:
    """Split `PLACE: REASON` at the first colon outside brackets; without one there is no reason."""
    found = _PLACE.match(fault)
    return (found[1], fault[found.end() :]) if found else (fault, "")


def _grouped(faults: Sequence[str]) -> Iterator[str]:
    """Yield lines in order; a reason that many faults share (paths without --image-root) once, above its places."""
    places: dict[str, list[str]] = {}
    for fault in faults:
        place, reason = _split(fault)
        places.setdefault(reason, []).append(place)
    for fault in faults:
        reason = _split(fault)[1]
        alike = places.get(reason, [])
        if not reason or 0 < len(alike) < _ALIKE:
            yield f"  - {fault}"
        elif alike:
            yield f"  - {len(alike)} × {reason}"
            yield from (f"      {place}" for place in places.pop(reason))


class UmbrellaError(ValueError):
    """One or more faults, all of them in `faults`; `exit_code` is that of the command line."""

    exit_code: ClassVar[int] = 2

    def __init__(self, faults: str | Sequence[str]):
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(dict.fromkeys(faults))
        super().__init__(self.faults)

    def __str__(self) -> str:
        """Return the text for people: at most fifty faults, each cut to a length, control characters escaped."""
        shown = [f if len(f) <= _LONGEST else f"{f[:_LONGEST]} …" for f in self.faults[:_SHOWN]]
        shown = [visible(f) for f in shown]
        if len(self.faults) == 1:
            return shown[0]
        lines = [f"{len(self.faults)} faults:", *_grouped(shown)]
        if len(self.faults) > _SHOWN:
            lines.append(f"  ... and {len(self.faults) - _SHOWN} more")
        return "\n".join(lines)


class ConfigError(UmbrellaError):
    """A configuration that cannot be run."""


class DataError(UmbrellaError):
    """A conversation, an image or a tokenizer that cannot be used."""


class CheckpointError(UmbrellaError):
    """A checkpoint that lacks a part or has an unusable one."""


class RunError(UmbrellaError):
    """A failure during work: a loss that is not finite, a directory that was deleted."""

    exit_code = 1


class Interrupted(Exception):
    """A signal ended a run between two steps, after it had saved; no error, and `--resume` continues the run."""

    def __init__(self, signum: int, message: str):
        self.signum = signum
        super().__init__(message)
