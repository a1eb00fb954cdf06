"""BLAS beside threads that each prepare a volume."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread in the whole process, for work that runs in many threads already.

    BLAS threads within each of them would spin while they wait for one another: on two cores with a busy neighbour, a
    volume took 40 times the processor time. Enter it in the thread that starts the others, which may not set the limit.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
