"""The errors that users can see. Each names the file, the field and the remedy.

    UmbrellaError
      ConfigError, DataError, CheckpointError    the input cannot be used
      RunError                                   the input is good, but the work failed
    Interrupted                                  a signal ended a run; --resume continues it

Checks collect all faults in a `Faults` and raise them together, so that nobody has to fix a thousand files one error at
a time.
"""

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

T = TypeVar("T")

MEMORY_REMEDY = (
    "lower the batch size (--batch-size), or split the weights (--mesh fsdp=N); to train, also set model.remat: full "
    "or model.frozen_dtype: bfloat16, and ask `umbrella-jax plan` what fits"
)
"""The remedy for a full device."""
_SHOWN = 50
"""Faults of one error to print."""
_ALIKE = 4
"""Number of faults with the same reason from which they are printed as one."""
_PLACE = re.compile(r"((?:\([^()]*\)|[^():]|:(?! ))*): ")
_LONGEST = 2000
"""Characters of one fault to print, because a fault may quote a text of megabytes."""


_ELSEWHERE = "free some space, or write elsewhere"
_REMEDIES = {
    errno.ENOSPC: f"the disk is full; {_ELSEWHERE}",
    errno.EDQUOT: f"your quota on this disk is used up; {_ELSEWHERE}",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "ask its owner for access, or use another path",
    errno.EPERM: "ask its owner for access, or use another path",
    errno.EMFILE: "raise the limit (ulimit -n), or lower data.threads",
}
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the process ran out of memory, not that its input is bad."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def known_cause(error: BaseException) -> str | None:
    """Return a message for an error of memory, devices or the file system; None for any other error.

    Any other error is a bug and keeps its traceback.
    """
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"{first}; the device's memory is full: {MEMORY_REMEDY}"
    if is_out_of_memory(error):
        reason = f" ({first})" if first else ""
        return f"out of memory{reason}; give the process more, or lower data.threads and train.batch_size"
    frames = traceback.extract_tb(error.__traceback__)
    jax_failed = isinstance(error, AssertionError) and frames and frames[-1].filename.endswith("xla_bridge.py")
    if jax_failed or (isinstance(error, RuntimeError) and "Unable to initialize backend" in first):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        setting = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        reason = first.partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "no plugin for it is installed"
        return (
            f"{setting}jax finds no such device: {reason}; unset JAX_PLATFORMS, or install the extra for the device "
            "(cuda12, cuda13, tpu): `umbrella-jax doctor` checks both"
        )
    if isinstance(error, OSError):
        if error.strerror is None:
            return str(error)
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{place}{error.strerror}" + (f": {remedy}" if remedy else "")
    return None


def why_not_a_directory(path: str | Path) -> str:
    """Return the reason that a path is not a directory."""
    return "a file, not a directory" if os.path.exists(path) else "not found"


def visible(text: str, kept: str = "\n\t") -> str:
    """Escape all characters that are neither printable nor in `kept`.

    Names and texts from files may contain sequences that move a terminal's cursor, colour its lines or reverse their
    direction. Use `kept=""` for a value inside a line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _split(fault: str) -> tuple[str, str]:
    """Split `PLACE: REASON` at the first colon outside brackets; without such a colon, the reason is empty."""
    match = _PLACE.match(fault)
    return (match[1], fault[match.end() :]) if match else (fault, "")


def _grouped(faults: Sequence[str]) -> Iterator[str]:
    """Yield the lines of faults in order. Print a reason that many faults share only once, above their places."""
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
    """An error with one or more faults, listed in `faults`."""

    exit_code: ClassVar[int] = 2
    """Exit code of the command line."""

    def __init__(self, faults: str | Sequence[str]):
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(dict.fromkeys(faults))
        super().__init__(self.faults)

    def __str__(self) -> str:
        """Return the text to print: at most 50 faults, each cut to a length, with control characters escaped.

        Further lines of a fault are indented, so that a name with a line break cannot look like a line of ours.
        """
        shown = [f if len(f) <= _LONGEST else f"{f[:_LONGEST]} …" for f in self.faults[:_SHOWN]]
        shown = [visible(f).replace("\n", "\n    ") for f in shown]
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
    """A failure during the work, such as a loss that is not finite or a directory that was deleted."""

    exit_code = 1


class Faults(list[str]):
    """Faults of several checks, collected to be raised as one error.

    `with faults:` runs a check. An UmbrellaError ends only that block, and its faults are collected. Other faults can
    be appended as to any list.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, UmbrellaError):
            return False
        self.extend(error.faults)
        return True

    def check(self, function: Callable[[], T]) -> T | None:
        """Return `function()`. If it raises an UmbrellaError, collect its faults and return None."""
        with self:
            return function()
        return None

    def raise_as(self, error_class: type[UmbrellaError]) -> None:
        """Raise one `error_class` with all collected faults. Do nothing if there are none."""
        if self:
            raise error_class(self)


class Interrupted(Exception):
    """A signal ended a run between two steps, after it had saved. Not an error: `--resume` continues the run."""

    def __init__(self, signum: int, message: str):
        self.signum = signum
        super().__init__(message)
