"""Map a function over many items in threads, with few calls under way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 16
"""Calls per thread that are under way, or whose results wait for an earlier one."""


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield the result of `function` for each item, in order.

    At most `AHEAD` calls per thread are submitted at a time: `Executor.map` submits all at once, which takes 1.3 GB for
    a million items. After an error, no further call begins.
    """
    calls: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                calls.append(pool.submit(function, item))
                if len(calls) >= AHEAD * threads:
                    yield calls.popleft().result()
            while calls:
                yield calls.popleft().result()
        finally:
            for call in calls:
                call.cancel()
