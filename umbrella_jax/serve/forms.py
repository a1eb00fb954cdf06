"""Read the file of an upload form as it arrives, without storing the form."""

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from umbrella_jax.serve.responses import ApiError

FIELD = "file"
"""Name of the form's only field."""
_HEADERS = 8 << 10
"""Bytes of a part's headers."""


async def uploaded_file(request: Request) -> tuple[str, AsyncIterator[bytes]]:
    """Return (name, content) of the only file of a form; reading the content reads the request.

    Raises ApiError, also while the content is read, for anything but a form with one file in the field `file`.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _malformed(f"expected multipart/form-data with one file in the field {FIELD!r}")
    form, stream = _Form(options[b"boundary"]), request.stream()
    async for piece in stream:
        form.feed(piece)
        if form.name is not None:
            break
    else:
        raise _malformed(f"no file in the field {FIELD!r}")

    async def content() -> AsyncIterator[bytes]:
        yield form.take()
        async for piece in stream:
            form.feed(piece)
            if data := form.take():
                yield data
        if not form.is_complete:
            raise _malformed("the form ends before its file does")

    return form.name, content()


def _malformed(message: str) -> ApiError:
    return ApiError(400, f"{FIELD}: {message}", code="malformed_form", param=FIELD)


class _Form:
    """A form under way."""

    def __init__(self, boundary: bytes):
        self.name: str | None = None
        """Name of the file, once its headers have arrived."""
        self.is_complete = False
        """Whether the form has ended."""
        self._parts, self._field, self._value, self._disposition = 0, bytearray(), bytearray(), b""
        self._data = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header(self._field, data[start:end]),
                    "on_header_value": lambda data, start, end: self._header(self._value, data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._keep,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def feed(self, piece: bytes) -> None:
        """Parse more of the form."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def take(self) -> bytes:
        """Return the content that arrived since the last call."""
        data = bytes(self._data)
        self._data.clear()
        return data

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > 1:
            raise _malformed("several parts; send one file per request")

    def _header(self, text: bytearray, data: bytes) -> None:
        text += data
        if len(text) > _HEADERS:
            raise _malformed(f"headers of more than {_HEADERS} bytes")

    def _end_header(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != FIELD.encode() or b"filename" not in options:
            raise _malformed(f"expected a file in the field {FIELD!r}")
        self.name = options[b"filename"].decode("utf-8", "replace")

    def _keep(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _end(self) -> None:
        self.is_complete = True
