"""Reading for requests ends in time and stays within its memory, whatever the scans are and whoever leaves."""

import asyncio
import threading
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from umbrella_jax.data.deadline import ReadingTimeoutError, check_deadline
from umbrella_jax.errors import DataError
from umbrella_jax.serve import readers as module
from umbrella_jax.serve.budget import Budget
from umbrella_jax.serve.readers import Readers


def test_a_budget_is_taken_in_turn_and_a_part_that_nobody_waits_for_is_passed_on() -> None:
    budget, got = Budget(10), list[str]()

    async def take(name: str, amount: int) -> None:
        async with budget.held(amount):
            got.append(name)
            await asyncio.sleep(0)

    async def use() -> None:
        await budget.take(6)
        tasks = [asyncio.create_task(take(*own)) for own in (("large", 9), ("gone", 2), ("small", 4), ("none", 0))]
        await asyncio.sleep(0)
        assert got == ["none"]  # the small one does not overtake the large one
        tasks[1].cancel()
        await asyncio.sleep(0)
        budget.give_back(6)
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(use())
    assert got == ["none", "large", "small"]
    assert budget.taken == 0


def read_forever(began: Callable[[], object] = lambda: None) -> None:
    began()
    while True:
        check_deadline("scan.nii")
        time.sleep(0.005)


def test_reading_without_end_stops_and_gives_its_thread_back() -> None:
    async def use(readers: Readers) -> float:
        endless = (readers.run(read_forever, seconds=0.05) for _ in range(12))
        for error in await asyncio.gather(*endless, return_exceptions=True):
            assert isinstance(error, ReadingTimeoutError)
            assert "scan.nii: not read within 0.05 s" in str(error)
        started = asyncio.Event()
        leaving = [
            asyncio.create_task(readers.run(partial(read_forever, loop_set(started)), seconds=60)) for _ in range(8)
        ]
        await started.wait()
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        begun = time.monotonic()
        assert await readers.run(lambda: 7, seconds=60) == 7
        return time.monotonic() - begun

    def loop_set(event: asyncio.Event) -> Callable[[], object]:
        return partial(asyncio.get_running_loop().call_soon_threadsafe, event.set)

    readers = Readers()
    assert asyncio.run(use(readers)) < 5
    readers.close()


def test_a_thread_that_does_not_stop_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(module, "_THREADS", 2)
    end = threading.Event()

    async def use(readers: Readers) -> None:
        with pytest.raises(ReadingTimeoutError, match="hung: not read within"):
            await readers.run(end.wait, seconds=0.05, name="hung")
        assert await readers.run(lambda: 7, seconds=60) == 7  # another thread
        end.set()

    readers = Readers()
    asyncio.run(use(readers))
    readers.close()


def test_memory_of_many_readers_at_once_is_that_of_a_few() -> None:
    size = 4 << 20

    def read() -> int:
        voxels = np.ones(size, np.uint8)
        time.sleep(0.01)
        return int(voxels[0])

    async def use(readers: Readers) -> None:
        runs = (readers.run(read, seconds=60, memory=size) for _ in range(32))
        assert await asyncio.gather(*runs) == [1] * 32
        with pytest.raises(DataError, match=r"big.nii: too many voxels: up to \d"):
            await readers.run(read, seconds=60, memory=3 * size, name="big.nii")

    readers = Readers(2 * size)
    tracemalloc.start()
    asyncio.run(use(readers))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    readers.close()
    assert 2 * size <= peak < 2.5 * size


def test_a_function_that_fails_gives_everything_back(caplog: Any) -> None:
    def fail() -> None:
        raise DataError("damaged")

    async def use(readers: Readers) -> None:
        for _ in range(8):
            with pytest.raises(DataError, match="damaged"):
                await readers.run(fail, seconds=60, memory=readers._memory.total)
        assert readers._memory.taken == readers._free.taken == 0

    readers = Readers()
    asyncio.run(use(readers))
    readers.close()
    assert caplog.text == ""
