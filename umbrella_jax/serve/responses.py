"""Answers in JSON, and errors in OpenAI's form."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from umbrella_jax.errors import visible
from umbrella_jax.io.files import strict_json

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""{status: the error's `type`}; of other statuses, `invalid_request_error` below 500 and `server_error` from there."""

_PIECE = 256 << 10
"""Bytes that are sent at once."""
_MESSAGE = 2000
"""Characters of a message, which may quote a request."""


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return `value` as JSON; NaN and infinity become null."""
    return Response(strict_json(value), status, headers, "application/json")


class HoldingResponse:
    """A response that holds what it needs until it has been sent, or the client has gone away."""

    def __init__(self, response: ASGIApp, stack: AsyncExitStack):
        """Initialise it.

        Args:
            response: to be sent.
            stack: closed afterwards.
        """
        self._response, self._stack = response, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        async with self._stack:
            await self._response(scope, receive, send)


def octets(content: bytes, media_type: str = "application/octet-stream") -> Response:
    """Return a response that sends this content piece by piece: no more than that waits for a slow client."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]

    return StreamingResponse(pieces(), headers={"Content-Length": str(len(content))}, media_type=media_type)


class ApiError(Exception):
    """A request that cannot be answered. Raised anywhere in a handler, it becomes the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """Initialise an error.

        Args:
            status: of HTTP, from 400.
            message: what is wrong and what to do; names no path of the server.
            code: a word by which programs tell errors apart.
            param: the field of the request that is wrong.
            headers: further ones, such as `Retry-After`.
        """
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers
        super().__init__(message)

    def to_json(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message if len(self.message) <= _MESSAGE else f"{self.message[:_MESSAGE]} …"
        error = {
            "message": visible(message),
            "type": kind,
            "param": self.param and self.param[:_MESSAGE],
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """Return the answer."""
        return json_response(self.to_json(), self.status, self.headers)


def request_too_large(limit: int) -> ApiError:
    """Return the error for a request of more bytes than the limit."""
    remedy = "upload each scan to /api/scans, and name its id in the request"
    return ApiError(413, f"the request is larger than {limit / 2**20:.4g} MB, the limit; {remedy}", code="too_large")


def upload_too_large(name: str, limit: int) -> ApiError:
    """Return the error for an upload of more bytes than the limit."""
    remedy = "start the server with a larger --max-upload, or name the file in --data"
    message = f"{name}: larger than {limit / 2**20:.4g} MB, the limit of an upload; {remedy}"
    return ApiError(413, message, code="too_large", param="file")
