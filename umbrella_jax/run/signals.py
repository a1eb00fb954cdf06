"""Note SIGTERM and SIGINT, so that a loop can end after its current step."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_HANDLED = (signal.SIGTERM, signal.SIGINT)
_ECHO = 1.0
"""Seconds within which a second SIGTERM is ignored: SLURM and its scripts may both forward the same one."""


class Signals:
    """Context manager that notes the first SIGTERM or SIGINT in `received`; a second one ends the process at once.

    The process then ends with exit code 128 + the signal's number, whatever it is doing. A thread listens for signals,
    because Python runs its handlers only after a compilation or a device call has finished. A signal that was ignored
    before, such as SIGINT in a background job, is still ignored. Python delivers signals only to the main thread: if
    this is used in another thread, `received` stays 0.
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
        while data := os.read(self._ends[0], 1):  # one byte per signal, its number, until the other end is closed
            number, now = data[0], time.monotonic()
            if number not in _HANDLED:
                continue
            if not self.received:
                self.received, first = number, now
                name = signal.Signals(number).name
                self._say(f"{name}: saving after this step, then exiting; send again to exit now")
            elif number == signal.SIGINT or now - first > _ECHO:
                os._exit(128 + number)
