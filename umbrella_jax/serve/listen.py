"""Listen on an address and run the server there, until a signal ends it."""

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from umbrella_jax.errors import ConfigError

_CONNECTIONS = 256
"""Largest number of connections at a time; more are answered with status 503."""
_ACCEPTED = 2 * _CONNECTIONS
"""Largest number of connections at a time that get an answer at all; each takes a file descriptor."""
_HEADER_SECONDS = 20.0
"""Time in which a connection must send the headers of a request, its first or a further one."""
_SEND_SECONDS = 120.0
"""Time in which a client must read what was sent: a piece of at most 256 KB."""
_GRACE_SECONDS = 3
"""Time for answers under way when the server ends."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0 takes a free one.

    Raises ConfigError for an address that does not exist here or is in use.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"host: {host!r}: {error.strerror}; use 127.0.0.1, or 0.0.0.0 for all") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(f"port: {port} on {host}: {error.strerror}; choose another, or 0 for a free one") from None
    return bound


class _Protocol(H11Protocol):
    """Drop a connection that sends no request, or does not read its answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._unread: asyncio.TimerHandle | None = None
        self._last_cycle, self._idle_since = self.cycle, self.loop.time()
        self._watching = self.loop.call_later(_HEADER_SECONDS / 4, self._watch)
        if len(self.connections) > _ACCEPTED:
            transport.abort()

    def _watch(self) -> None:
        """Drop the connection if it has been between two requests for too long; uvicorn lets it send half of one."""
        now, cycle = self.loop.time(), self.cycle
        if cycle is not self._last_cycle or not (cycle is None or cycle.response_complete):
            self._last_cycle, self._idle_since = cycle, now
        elif now - self._idle_since > (_SEND_SECONDS if self.transport.get_write_buffer_size() else _HEADER_SECONDS):
            self.transport.abort()
            return
        self._watching = self.loop.call_later(_HEADER_SECONDS / 4, self._watch)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(_SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._watching.cancel()
        if self._unread:
            self._unread.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """A server for one application."""

    def __init__(self, app: ASGIApp, on_start: Callable[[], object] = lambda: None):
        """Initialise the server.

        Args:
            app: the application.
            on_start: called once it accepts connections.
        """
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            backlog=_CONNECTIONS,  # so many are accepted before one can be refused
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and call `on_start`."""
        await super().startup(sockets)
        if self.started:
            self._on_start()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave the block as an exception, so that its files are removed.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored. Does nothing outside the main thread.
    """

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = dict[int, Any]()
    if threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGTERM), int(signal.SIGHUP)):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
