"""The threads that read scans for requests, within limits of time and memory.

A thread cannot be interrupted, so nothing may begin that does not end: a `Deadline` stops reading between two frames
or pieces of a file, also when the client goes away, and the memory that a scan takes is known from its header before
any voxel is read.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from umbrella_jax.data.deadline import Deadline, ReadingTimeoutError
from umbrella_jax.errors import DataError
from umbrella_jax.serve.budget import Budget

T = TypeVar("T")

READING_BYTES = 6 << 30
"""Memory that all scans that are read at a time may take: one head at 0.43 mm, or a dozen at 1 mm."""
_THREADS = 4
_GRACE_SECONDS = 10.0
"""Time after which a thread is not waited for that does not stop, such as one that waits for a network drive."""


class Readers:
    """Threads that read scans. `run` belongs to one event loop."""

    def __init__(self, memory: int = READING_BYTES):
        """Start no thread yet.

        Args:
            memory: bytes that all functions that run at a time may take.
        """
        self._memory, self._free = Budget(memory), Budget(_THREADS)
        self._threads = ThreadPoolExecutor(_THREADS, "read")

    def check(self, memory: int, name: str) -> None:
        """Raise DataError if a function that takes so many bytes could never run."""
        if memory > (total := self._memory.total):
            raise DataError(
                f"{name}: too many voxels: up to {memory / 2**30:.1f} GB of memory, and this server has "
                f"{total / 2**30:.3g} GB for scans; resample it, or use umbrella-jax generate or explain"
            )

    async def run(self, function: Callable[[], T], *, seconds: float, memory: int = 0, name: str = "the scan") -> T:
        """Run a function in a thread, as soon as a thread and the memory are free.

        If the caller is cancelled, the function stops at the next `check_deadline`.

        Args:
            seconds: time for the function, from its beginning.
            memory: bytes that it takes, at most.
            name: what it reads, for messages.

        Raises:
            DataError: it needs more memory than there is for all.
            ReadingTimeoutError: it takes too long.
        """
        self.check(memory, name)
        deadline = Deadline(seconds)

        def work() -> T:
            with deadline:
                return function()

        def ended(future: asyncio.Future[T]) -> None:
            self._free.give_back(1)
            self._memory.give_back(memory)
            if not future.cancelled():
                future.exception()  # else asyncio would log it, if nobody waits any more

        await self._memory.take(memory)
        try:
            await self._free.take(1)
        except BaseException:
            self._memory.give_back(memory)
            raise
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(ended)  # when the thread ends, not when the caller leaves
        try:
            return await asyncio.wait_for(asyncio.shield(future), seconds + _GRACE_SECONDS)
        except TimeoutError:
            raise ReadingTimeoutError(f"{name}: not read within {seconds:g} s, the limit") from None
        finally:
            deadline.stop()

    def close(self) -> None:
        """Start no function any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
