"""Limit BLAS while many threads each prepare a volume."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread in the whole process while a block runs its work in many threads.

    Otherwise every thread starts BLAS threads that spin while they wait for one another. On two cores with a busy
    neighbour, a volume then took 40 times the processor time. Enter the block in the thread that starts the others:
    those may not set the limit.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
