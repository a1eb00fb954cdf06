"""Map a function over many items in threads, with few calls under way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 16
"""Calls per thread that are under way, or whose results wait for an earlier one."""


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int, *, chunk: int = 1) -> Iterator[R]:
    """Yield the result of `function` for each item, in order.

    At most `AHEAD` calls per thread are submitted at a time: `Executor.map` submits all at once, which takes 1.3 GB for
    a million items. After an error, no further call begins.

    Args:
        chunk: items that a thread takes at a time; more than one if `function` takes less time than handing it over.
    """
    calls: deque[Future[list[R]]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while some := list(islice(remaining, chunk)):
                calls.append(pool.submit(lambda some: [function(item) for item in some], some))
                if len(calls) >= AHEAD * threads:
                    yield from calls.popleft().result()
            while calls:
                yield from calls.popleft().result()
        finally:
            for call in calls:
                call.cancel()
