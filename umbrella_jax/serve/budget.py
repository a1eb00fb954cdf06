"""Share what is limited, such as memory, between the requests of a server."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Budget:
    """An amount that the tasks of one event loop share; they take parts in the order in which they ask."""

    def __init__(self, total: int):
        """Initialise a full budget."""
        self.total = self._left = total
        self._waiting = deque[tuple[int, asyncio.Future[None]]]()

    @property
    def taken(self) -> int:
        """The amount that is taken now."""
        return self.total - self._left

    async def take(self, amount: int) -> None:
        """Take a part as soon as it is left; `give_back` it at the end. It may not exceed the total."""
        assert amount <= self.total
        if not amount:
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove((amount, turn))
                self._serve()
            else:
                self.give_back(amount)
            raise

    def give_back(self, amount: int) -> None:
        """Give a part back."""
        self._left += amount
        self._serve()

    @asynccontextmanager
    async def held(self, amount: int) -> AsyncIterator[None]:
        """Hold a part during the block."""
        await self.take(amount)
        try:
            yield
        finally:
            self.give_back(amount)

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._left:
            amount, turn = self._waiting.popleft()
            self._left -= amount
            turn.set_result(None)
