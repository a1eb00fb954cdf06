"""SIGTERM and SIGINT as a wish that a loop looks at between two steps."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_HANDLED = (signal.SIGTERM, signal.SIGINT)
_ECHO = 1.0
"""Seconds within which another SIGTERM is the same one: SLURM and its scripts both hand it on."""


class Signals:
    """While it is entered, the first SIGTERM or SIGINT is noted in `received`; a second ends the process at once.

    At once means with exit code 128 + its number, whatever the process is doing: a thread of its own listens, since
    Python's handlers wait until a compilation or a device is done. A signal that was ignored before (SIGINT of a
    background job) stays so. Off the main thread, where Python takes no signals, nothing is ever received.
    """

    def __init__(self, say: Callable[[str], None]):
        self.received: int = 0
        self._say = say
        self._before: dict[int, Any] = {}
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Signals":
        if self._main:
            self._ends = os.pipe()
            os.set_blocking(self._ends[1], False)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
            self._wakeup = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
            for number in _HANDLED:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, lambda *_: None) or signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._ends[1])
            self._thread.join()
            os.close(self._ends[0])

    def _listen(self) -> None:
        first = 0.0
        while data := os.read(self._ends[0], 1):  # the number of each signal, until the other end is closed
            number, now = data[0], time.monotonic()
            if number not in _HANDLED:
                continue
            if not self.received:
                self.received, first = number, now
                name = signal.Signals(number).name
                self._say(f"{name}: saving after this step, then exiting; send again to exit now")
            elif number == signal.SIGINT or now - first > _ECHO:
                os._exit(128 + number)
