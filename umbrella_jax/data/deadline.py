"""Stop reading scans when the time for it is over, or when nobody waits for them any more.

A thread cannot be interrupted from outside. So whoever reads a scan for a request enters a `Deadline` in its thread,
and the readers call `check_deadline` before each frame and each piece of a file. Without a deadline, as in a run, they
read for as long as it takes.
"""

import math
import time
from contextvars import ContextVar, Token
from pathlib import Path

from umbrella_jax.errors import DataError


class ReadingTimeoutError(DataError):
    """A scan was not read in time."""


class Deadline:
    """The time within which a thread may read scans; it begins when the thread enters this context manager."""

    def __init__(self, seconds: float):
        """Initialise a deadline of so many seconds."""
        self.seconds = seconds
        self._end = math.inf
        self._token: Token[Deadline | None] | None = None

    def __enter__(self) -> None:
        self._end = min(self._end, time.monotonic() + self.seconds)
        self._token = _current.set(self)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _current.reset(self._token)

    def stop(self) -> None:
        """Let the time be over now; may be called in any thread."""
        self._end = -math.inf

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._end


_current: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def check_deadline(path: str | Path) -> None:
    """Raise ReadingTimeoutError if this thread has a deadline, and it is over."""
    deadline = _current.get()
    if deadline is not None and deadline.is_over:
        raise ReadingTimeoutError(f"{path}: not read within {deadline.seconds:g} s, the limit; send a smaller file")
