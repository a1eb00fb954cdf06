"""Checks of every request before any handler sees it, and headers of every answer.

A page on another site must reach nothing here, whatever it does: by a name that resolves to this machine (DNS
rebinding: `Host`), by a form or a script (`Origin`, `Sec-Fetch-Site`; there are no CORS headers), or by a frame. On any
address but the loopback, a token is needed. Bodies are limited in bytes and in time.

Nothing of a request is logged, unless asked for: no path, name or question. Of an error, kind and place are.
"""

import asyncio
import hmac
import html
import ipaddress
import secrets
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umbrella_jax.errors import UmbrellaError, visible
from umbrella_jax.serve.metrics import ServerMetrics
from umbrella_jax.serve.responses import ApiError, request_too_large, upload_too_large

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of every answer: no inline script or style, nothing from other hosts."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FORWARD = '<!doctype html><title>umbrella-jax</title><meta http-equiv="refresh" content="0;url=/">'
"""Page that takes a visitor whose address had the token to one without it. A redirect would not do: a browser that came
from another site, by a link in a mail, would follow it without the cookie."""
_REFUSAL = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>umbrella-jax</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<link rel="stylesheet" href="/static/style.css"></head>
<body><main><h1>umbrella-jax</h1><p role="alert">{message}</p>{form}</main></body></html>"""
"""Page for a visitor whose request is refused."""
_TOKEN_FORM = """<form action="/"><label>Token
<input name="token" type="password" autocomplete="off" autofocus required></label> <button>Open</button></form>"""
_OPEN_PATHS = ("/healthz", "/static/style.css")
"""Paths that need no token: of probes, and what the page that asks for the token looks like."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that need no token."""
UPLOADS = "/api/scans"
"""Path whose requests may have the bytes of an upload."""
JSON_BYTES = 64 << 20
"""Bytes of any other request."""
_FORM_BYTES = 64 << 10
"""Bytes of a form around its file."""
_IDLE_SECONDS = 20.0
"""Time to wait for the next bytes of a request."""
_BODY_SECONDS = 600.0
"""Time for a whole request to arrive."""
_DRAINED_SECONDS = 5.0
"""Time for which the rest of a refused request is read, because a browser shows no answer before it has sent all."""
_TOKEN = 16
"""Least number of characters of a token."""


@dataclass(frozen=True)
class Access:
    """Who may send requests."""

    host: str
    """Address that the server listens on."""
    token: str | None = None
    """What requests must bring; None on the loopback."""
    cookie: str = field(default_factory=lambda: f"umbrella_{secrets.token_hex(4)}")
    """Name of the cookie with the token; its own for each server, because cookies are shared between ports."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)

    def admits_host(self, header: str) -> bool:
        """Return whether a request's `Host` is one of this server.

        A server that other machines reach takes any address, which no other site can have as its name, and the name
        of this machine.
        """
        name = host_of(header)
        if name is None:
            return False
        if name in LOOPBACK or name == self.host.lower():
            return True
        return not self.is_loopback and (_is_address(name) or name == socket.gethostname().lower())

    def admits_token(self, headers: Headers) -> bool:
        """Return whether a request brings the token, as `Authorization: Bearer` or in the cookie."""
        if self.token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return cookie is not None and self.is_token(cookie.value)

    def is_token(self, given: str) -> bool:
        """Return whether a text is the token, in a time that does not depend on where it differs."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def host_of(header: str) -> str | None:
    """Return the host of a `Host` header, without port and brackets, in lower case; None if it is malformed."""
    if header.startswith("["):
        name, bracket, port = header[1:].partition("]")
        port = port.removeprefix(":") if port.startswith(":") or not port else "?"
        if not bracket:
            return None
    else:
        name, _, port = header.partition(":")
    if port and not port.isdecimal():
        return None
    return name.lower().rstrip(".") or None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Body:
    """The body of a request: limited in bytes and in time."""

    def __init__(self, receive: Receive, limit: int, too_large: ApiError):
        self._receive, self._limit, self._too_large = receive, limit, too_large
        self._bytes, self._deadline, self.complete = 0, time.monotonic() + _BODY_SECONDS, False

    async def receive(self) -> Message:
        """Return the next message. Raise ApiError: 413 beyond the bytes, 408 beyond the time."""
        if self.complete:  # what follows is only that the client goes away
            return await self._receive()
        wait = min(_IDLE_SECONDS, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(wait):
                message = await self._receive()
        except TimeoutError:
            limits = f"{_IDLE_SECONDS:g} s for the next bytes, {_BODY_SECONDS:g} s for the whole body"
            raise ApiError(408, f"the request came too slowly; the limits are {limits}", code="too_slow") from None
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limit:
            raise self._too_large
        return message

    async def drain(self) -> None:
        """Read and drop the rest, for a short time."""
        try:
            async with asyncio.timeout(_DRAINED_SECONDS):
                while not self.complete:
                    message = await self._receive()
                    self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        except TimeoutError:
            pass


class Guard:
    """ASGI middleware around all routes; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        upload_bytes: int,
        metrics: ServerMetrics,
        public: Callable[[str], str],
        say: Callable[[str], object],
        log_requests: bool,
    ):
        """Initialise the middleware.

        Args:
            app: the routes.
            access: who may send requests.
            upload_bytes: limit of an upload.
            metrics: counts requests.
            public: takes the server's paths out of a message.
            say: prints a line of the log.
            log_requests: whether to log each request, with what handlers note in `request.state.note`.
        """
        self._app, self._access, self._metrics, self._public, self._say = app, access, metrics, public, say
        self._upload_bytes, self._log_requests = upload_bytes, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        began, status, started = time.perf_counter(), 499, False
        is_upload = scope["path"] == UPLOADS and scope["method"] == "POST"
        limit, large = JSON_BYTES, request_too_large(JSON_BYTES)
        if is_upload:
            limit, large = self._upload_bytes + _FORM_BYTES, upload_too_large("the file", self._upload_bytes)
        body = _Body(receive, limit, large)

        async def send_with_headers(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        async def answer(response: Response) -> None:
            if not started:
                if "expect" not in Headers(scope=scope):  # such a client waits for our consent to send its body
                    await body.drain()
                await response(scope, receive, send_with_headers)

        try:
            if int(Headers(scope=scope).get("content-length", 0)) > limit:
                raise large
            if response := self._check(scope):
                await answer(response)
            else:
                await self._app(scope, body.receive, send_with_headers)
        except ApiError as error:
            await answer(_refusal_page(error) if _is_visit(scope) else error.response())
        except ClientDisconnect:
            pass
        except UmbrellaError as error:
            await answer(ApiError(422, self._public("; ".join(error.faults)), code="unusable").response())
        except Exception as error:
            self._log_error(error)
            await answer(ApiError(500, "the server failed; its log says where", code="failed").response())
        finally:
            seconds = time.perf_counter() - began
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            self._metrics.count(endpoint, scope["method"], status, seconds)
            if self._log_requests:
                note = scope["state"].get("note")
                line = f"{scope['method']} {scope['path']} {status} {seconds:.3f} s" + (f" {note}" if note else "")
                self._say(visible(line, kept=""))

    def _check(self, scope: Scope) -> Response | None:
        """Return None for a request that may pass, or an answer that replaces that of the routes.

        Raises ApiError: 421 for a foreign host, 403 for a request that another site caused, 401 without the token.
        """
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.admits_host(hosts[0]):
            raise ApiError(421, "Host: not a name of this server; open it by the address that it printed", code="host")
        own = {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}
        is_visit = _is_visit(scope)  # a link to the page may be anywhere
        site = headers.get("sec-fetch-site", "none")
        if any(origin.lower() not in own for origin in headers.getlist("origin")) or (
            site not in ("same-origin", "none") and not (is_visit and headers.get("sec-fetch-mode") == "navigate")
        ):
            raise ApiError(403, "Origin: a page of another site asks; only the server's own page may", code="origin")
        given = QueryParams(scope["query_string"]).get("token", "") if is_visit else ""
        if given and self._access.is_token(given):
            cookie = f"{self._access.cookie}={self._access.token}; Path=/; HttpOnly; SameSite=Strict"
            return Response(_FORWARD, headers={"Set-Cookie": cookie}, media_type="text/html")
        if scope["path"] not in _OPEN_PATHS and not self._access.admits_token(headers):
            fault = "this is not the server's token" if given else "a token is needed"
            remedy = "open the address with ?token= that the server printed, or send Authorization: Bearer TOKEN"
            raise ApiError(401, f"{fault}; {remedy}", code="token", headers={"WWW-Authenticate": "Bearer"})
        return None

    def _log_error(self, error: Exception) -> None:
        """Log where an error arose. Its message may quote a name or a question, so only `log_requests` shows it."""
        if self._log_requests:
            self._say("".join(traceback.format_exception(error)).rstrip())
            return
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-4:]]
        self._say(f"error: {type(error).__name__} in {' > '.join(places)}; --log-requests shows its message")


def _is_visit(scope: Scope) -> bool:
    """Return whether a browser opens the page."""
    return bool(scope["path"] == "/" and scope["method"] == "GET")


def _refusal_page(error: ApiError) -> Response:
    """Return an error as a page, with a form for the token if that is missing."""
    needs_token = error.status == 401
    content = _REFUSAL.format(message=html.escape(error.message), form=_TOKEN_FORM if needs_token else "")
    policy = {"Content-Security-Policy": POLICY.replace("form-action 'none'", "form-action 'self'")}
    headers = {**(error.headers or {}), **(policy if needs_token else {})}
    return Response(content, error.status, headers, media_type="text/html")


def check_token(token: str) -> str | None:
    """Return what is wrong with a token, or None."""
    if len(token) < _TOKEN or not all(c.isascii() and (c.isalnum() or c in "-_.~") for c in token):
        return f"expected {_TOKEN} or more letters, digits and -_.~"
    return None


def error_to_json(_: Any, error: Any) -> Response:
    """Return the answer for an error of Starlette, such as an unknown path, in OpenAI's form."""
    return ApiError(error.status_code, str(error.detail), headers=getattr(error, "headers", None)).response()
