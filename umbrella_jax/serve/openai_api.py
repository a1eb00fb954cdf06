"""Requests and answers in OpenAI's form, for its clients: chat completions and models; and explanations.

A parameter of OpenAI's that this server does not have is refused by its name, never ignored.
"""

import asyncio
import base64
import binascii
import gzip
import io
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from umbrella_jax.config.schema import NumbersConfig, modality_names, resolve_modality
from umbrella_jax.data.conversation import ROLES, Conversation, Image, Message
from umbrella_jax.data.deadline import ReadingTimeoutError
from umbrella_jax.data.volume import restoring_memory
from umbrella_jax.errors import CheckpointError, ConfigError, DataError, UmbrellaError
from umbrella_jax.inference.attribution import Method
from umbrella_jax.inference.explain import Explanation
from umbrella_jax.inference.generate import Sampling
from umbrella_jax.io.files import strict_json
from umbrella_jax.io.reading import parse_json
from umbrella_jax.scoring.number_grid import NumberGrid, NumberTemplate
from umbrella_jax.serve.budget import Budget
from umbrella_jax.serve.description import ModelDescription
from umbrella_jax.serve.engine import Busy, CompleteAnswer, Engine, ExplainProgress, Question, Text
from umbrella_jax.serve.guard import JSON_BYTES
from umbrella_jax.serve.responses import ApiError, HoldingResponse, json_response, octets
from umbrella_jax.serve.scans import ScanHeader, Scans, ServedScan
from umbrella_jax.serve.volumes import READ_SECONDS

T = TypeVar("T")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "store": (False,),
}
"""{parameter of OpenAI's that this server does not have: values that ask for nothing}."""
_KNOWN = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stream"),
    *("stream_options", "umbrella"),
)
_EXPLAIN = ("model", "messages", "answer", "method")
_MAX_ANSWERS = 1000
"""Largest number of answers or candidate numbers of a question."""
_MAX_PARTS = 1000
"""Largest number of messages, and of parts of a message."""
_MAX_TEXT = 1 << 18
"""Characters of all texts of a conversation, and of all answers or candidate numbers: tokenizing these takes a second.
"""
_SMALL_BODY, _BODY_COPIES, _BODY_BYTES = 1 << 20, 8, 1 << 30
"""Bytes of requests that are read at once; memory that a larger one takes, per byte; and that all of these take."""
_DEFAULT_TOKENS = 32
_MAP_BYTES, _MAP_SECONDS = 1 << 28, 3600.0
"""Size of all maps that are kept, and for how long."""


@dataclass(frozen=True)
class _Asked:
    """A request that was understood."""

    question: Question
    scans: Mapping[Path, ServedScan]
    """{path: scan that the request shows}."""


class AttributionMaps:
    """The maps of recent explanations, in memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def add(self, content: bytes) -> str:
        """Keep a map for an hour, or until newer ones need the room. Returns its id."""
        id = secrets.token_urlsafe(16)
        self._kept[id] = time.monotonic(), content
        while len(self._kept) > 1 and sum(len(own) for _, own in self._kept.values()) > _MAP_BYTES:
            self._kept.popitem(last=False)
        self._expire()
        return id

    def __getitem__(self, id: str) -> bytes:
        """Return a map, a .nii.gz file. Raise ApiError (404) if there is none."""
        self._expire()
        if id not in self._kept:
            raise ApiError(404, "no such map; explain the answer again", code="no_such_map")
        return self._kept[id][1]

    def _expire(self) -> None:
        for id, (added, _) in list(self._kept.items()):
            if time.monotonic() - added > _MAP_SECONDS:
                del self._kept[id]


def model_routes(engine: Engine, scans: Scans, description: ModelDescription) -> list[Route]:
    """Return the routes that need the model."""
    api = _Api(engine, scans, description)
    return [
        Route("/api/model", api.model),
        Route("/api/maps/{id}", api.map),
        Route("/v1/models", api.models),
        Route("/v1/models/{id:path}", api.one_model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/explain", api.explain, methods=["POST"]),
    ]


class _Api:
    """The handlers."""

    def __init__(self, engine: Engine, scans: Scans, description: ModelDescription):
        self._engine, self._scans, self._description = engine, scans, description
        self._maps, self._created = AttributionMaps(), int(time.time())
        self._bodies = Budget(_BODY_BYTES)

    async def model(self, request: Request) -> Response:
        """Return the description of the model."""
        return json_response(self._description.to_json())

    async def map(self, request: Request) -> Response:
        """Return a map of an explanation."""
        return octets(self._maps[request.path_params["id"]], "application/gzip")

    async def models(self, request: Request) -> Response:
        """Return the list with the only model."""
        return json_response({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        """Return the model by its id."""
        self._check_model(request.path_params["id"])
        return json_response(self._model())

    async def chat(self, request: Request) -> ASGIApp:
        """Answer a conversation, whole or piece by piece."""
        async with AsyncExitStack() as stack:
            fields, asked = await self._read(request, _KNOWN, stack)
            stream = _typed(fields, "stream", bool, False)
            options = _typed(fields, "stream_options", dict, {})
            if options and not stream:
                raise _bad("stream_options", "only with stream: true")
            _check_fields(options, ("include_usage",), "stream_options.")
            usage = _typed(options, "include_usage", bool, False, "stream_options.")
            head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
            head |= {"model": self._description.id}
            events = await stack.enter_async_context(aclosing(self._engine.ask(asked.question)))
            if not stream:
                answer = await _unless_gone(request, _last(events), self._scans.public)
                return json_response(head | _completion(asked.question, answer))
            first = await _unless_gone(request, anext(events), self._scans.public)
            return await self._streamed(self._chunks(head, asked.question, first, events, usage=usage), stack)

    async def explain(self, request: Request) -> ASGIApp:
        """Explain an answer, and send the progress meanwhile."""
        async with AsyncExitStack() as stack:
            fields, asked = await self._read(request, _EXPLAIN, stack)
            answer = _typed(fields, "answer", str, None)
            if answer is not None:
                _check_text(len(answer), "answer")
            method = _typed(fields, "method", str, "integrated")
            if method not in get_args(Method):
                raise _bad("method", f"expected one of {', '.join(get_args(Method))}")
            for image in asked.question.conversation.images:  # before the work, not after it
                scan = asked.scans[image.path]
                self._engine.readers.check(self._map_memory(scan.header, image), scan.name)
            explaining = self._engine.explain(asked.question, answer, method)
            events = await stack.enter_async_context(aclosing(explaining))
            first = await _unless_gone(request, anext(events), self._scans.public)
            return await self._streamed(self._explained(asked, first, events), stack)

    async def _streamed(self, pieces: AsyncGenerator[bytes], stack: AsyncExitStack) -> ASGIApp:
        """Return a response of server-sent events. At their end, or if the client goes away, the work on them ends."""
        await stack.enter_async_context(aclosing(pieces))
        events = _with_error(pieces, self._scans.public)
        return HoldingResponse(StreamingResponse(events, media_type="text/event-stream"), stack.pop_all())

    async def _read(
        self, request: Request, known: tuple[str, ...], stack: AsyncExitStack
    ) -> tuple[dict[str, Any], _Asked]:
        """Read a request. Return its fields without the messages, which may be large, and the question.

        Scans that it contains are stored until `stack` closes.
        """
        length = int(request.headers.get("content-length", JSON_BYTES))
        async with self._bodies.held(0 if length <= _SMALL_BODY else min(_BODY_COPIES * length, _BODY_BYTES)):
            body = await _json_body(request)
            _check_fields(body, known)
            asked = await self._asked(body, stack)
            del body["messages"]
        request.state.note = asked.question.conversation.messages[-2].text
        return body, asked

    def _map_memory(self, header: ScanHeader, image: Image) -> int:
        """Return the memory that the map of an image takes, in bytes."""
        return restoring_memory(header.shape or (), self._description.modalities[image.modality])

    def _model(self) -> dict[str, Any]:
        return {"id": self._description.id, "object": "model", "created": self._created, "owned_by": "umbrella-jax"}

    def _check_model(self, name: object) -> None:
        if name != self._description.id:
            message = f"model: this server has {self._description.id}"
            raise ApiError(404, message, code="model_not_found", param="model")

    async def _asked(self, body: Mapping[str, Any], stack: AsyncExitStack) -> _Asked:
        """Return the question of a request. Scans that it contains are stored until `stack` closes."""
        if "model" not in body:
            raise _bad("model", f"missing; expected {self._description.id}")
        self._check_model(body["model"])
        scans = dict[Path, ServedScan]()
        conversation = await self._conversation(body.get("messages"), stack, scans)
        longest = self._engine.max_new_tokens
        if "max_tokens" in body and "max_completion_tokens" in body:
            raise _bad("max_tokens", "the same as max_completion_tokens; give one of them")
        name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        tokens = _typed(body, name, int, min(_DEFAULT_TOKENS, longest))
        if not 1 <= tokens <= longest:
            raise _bad(name, f"expected 1 to {longest}, got {tokens}")
        seed = _typed(body, "seed", int, 0)
        if not 0 <= seed < 2**32:
            raise _bad("seed", f"expected 0 to {2**32 - 1}, got {seed}")
        temperature, top_p = _typed(body, "temperature", float, 0.0), _typed(body, "top_p", float, 1.0)
        try:
            sampling = Sampling(temperature=temperature, top_p=top_p)
        except ConfigError as error:
            raise _bad(error.faults[0].partition(":")[0], error.faults[0].partition(": ")[2]) from None
        return _Asked(Question(conversation, tokens, sampling, seed, **self._extras(body)), scans)

    def _extras(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a question that the extra field `umbrella` sets."""
        extra = _typed(body, "umbrella", dict, {})
        _check_fields(extra, ("answers", "task", "numbers", "control"), "umbrella.")
        control = _typed(extra, "control", str, None, "umbrella.")
        if control not in (None, "blank"):
            raise _bad("umbrella.control", "expected blank")
        answers, numbers = _typed(extra, "answers", list, [], "umbrella."), None
        if not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise _bad("umbrella.answers", "expected texts")
        if len(answers) > _MAX_ANSWERS or len(set(answers)) < len(answers):
            raise _bad("umbrella.answers", f"expected at most {_MAX_ANSWERS} different ones")
        _check_text(sum(map(len, answers)), "umbrella.answers")
        if grid := _typed(extra, "numbers", dict, None, "umbrella."):
            numbers = _number_grid(grid)
        if (name := _typed(extra, "task", str, None, "umbrella.")) is not None:
            if answers or numbers:
                raise _bad("umbrella.task", "give either a task, or answers and numbers")
            known = {own.name: own.task for own in self._description.tasks if own.task}
            if name not in known:
                raise _bad(
                    "umbrella.task", f"expected one of {', '.join(known) or 'none: the answers of no task are known'}"
                )
            answers, numbers = list(known[name].answers or ()), known[name].numbers
        return {"answers": tuple(answers), "numbers": numbers, "control": control}

    async def _conversation(self, messages: Any, stack: AsyncExitStack, scans: dict[Path, ServedScan]) -> Conversation:
        """Return the messages of a request as a conversation that ends with an empty answer."""
        if not isinstance(messages, list) or not 0 < len(messages) <= _MAX_PARTS:
            raise _bad("messages", f"expected a list of 1 to {_MAX_PARTS} messages")
        turns = []
        for number, message in enumerate(messages):
            place = f"messages.{number}"
            if not isinstance(message, dict):
                raise _bad(place, "expected an object")
            _check_fields(message, ("role", "content"), f"{place}.")
            if message.get("role") not in ROLES:
                raise _bad(f"{place}.role", f"expected one of {', '.join(ROLES)}")
            parts = await self._parts(message.get("content"), place, stack, scans)
            turns.append(Message(message["role"], tuple(parts)))
        if turns[-1].role != "user":
            raise _bad("messages", "expected the user's message at the end")
        _check_text(sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str)), "messages")
        return Conversation("request", None, (*turns, Message("assistant", ("",))), {}, "the request")

    async def _parts(
        self, content: Any, place: str, stack: AsyncExitStack, scans: dict[Path, ServedScan]
    ) -> list[str | Image]:
        """Return the texts and images of a message."""
        if isinstance(content, str):
            return [content]
        if not isinstance(content, list) or len(content) > _MAX_PARTS:
            raise _bad(f"{place}.content", f"expected a text, or a list of at most {_MAX_PARTS} parts")
        parts = list[str | Image]()
        for number, part in enumerate(content):
            here = f"{place}.content.{number}"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                _check_fields(part, ("type", "text"), f"{here}.")
                parts.append(part["text"])
            elif kind == "image_url" and isinstance(part.get("image_url"), dict):
                _check_fields(part, ("type", "image_url", "modality"), f"{here}.")
                parts.append(await self._image(part, here, stack, scans))
            else:
                raise _bad(here, 'expected {"type": "text", "text": …} or {"type": "image_url", "image_url": {…}}')
        return parts

    async def _image(
        self, part: Mapping[str, Any], place: str, stack: AsyncExitStack, scans: dict[Path, ServedScan]
    ) -> Image:
        """Return the scan that a part shows."""
        url = part["image_url"]
        _check_fields(url, ("url", "detail"), f"{place}.image_url.")
        if url.get("detail", "auto") not in (None, "auto"):
            raise _bad(f"{place}.image_url.detail", "not supported: a modality has one resolution")
        address = url.get("url")
        if not isinstance(address, str):
            raise _bad(f"{place}.image_url.url", "expected a text")
        kind, _, rest = address.partition(":")
        if kind == "scan":
            scan = stack.enter_context(self._scans.in_use(rest))
        elif kind == "data":
            head, comma, encoded = rest.partition(",")
            if not comma or not head.endswith(";base64"):
                raise _bad(f"{place}.image_url.url", "expected data:…;base64,…")
            try:
                content = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError):
                raise _bad(f"{place}.image_url.url", "not base64") from None
            scan = await stack.enter_async_context(self._scans.temporary("scan in the request", content))
        else:
            message = "expected data:…;base64,… or scan:ID; this server fetches nothing from elsewhere"
            raise _bad(f"{place}.image_url.url", message)
        scans[scan.path] = scan
        modalities = self._description.modalities
        name = _typed(part, "modality", str, scan.modality, f"{place}.")
        if name is None and len(modalities) == 1:
            name = next(iter(modalities))
        if name is None:
            raise _bad(f"{place}.modality", f"missing; expected one of {modality_names(modalities)}")
        if (resolved := resolve_modality(name, modalities)) is None:
            raise _bad(f"{place}.modality", f"expected one of {modality_names(modalities)}")
        return Image(scan.path, resolved)

    async def _chunks(
        self, head: dict[str, Any], question: Question, first: Any, events: AsyncIterator[Any], *, usage: bool
    ) -> AsyncGenerator[bytes]:
        """Yield an answer as server-sent events."""

        def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            return _event(head | {"object": "chat.completion.chunk", "choices": [choice]} | more)

        yield chunk({"role": "assistant", "content": ""})
        event = first
        while True:
            if isinstance(event, Text):
                yield chunk({"content": event.delta})
            else:
                yield chunk({}, event.finish_reason, **_extra(question, event))
                if usage:
                    yield _event(head | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(event)})
                yield b"data: [DONE]\n\n"
                return
            event = await anext(events)

    async def _explained(self, asked: _Asked, first: Any, events: AsyncIterator[Any]) -> AsyncGenerator[bytes]:
        """Yield the progress and the result of an explanation as server-sent events."""
        event = first
        while isinstance(event, ExplainProgress):
            yield _event({"done": event.done, "total": event.total}, "progress")
            event = await anext(events)
        maps = []
        for number, image in enumerate(event.scans):
            scan = asked.scans[image.path]
            make, memory = partial(_nifti, event, self._engine.processor, image), self._map_memory(scan.header, image)
            content = await self._engine.readers.run(make, seconds=READ_SECONDS, memory=memory, name=scan.name)
            own = {"id": self._maps.add(content), "scan": scan.id if scan.listed else None}
            maps.append(own | {"image": number, "modality": image.modality})
        result = {"answer": event.answer, "log_probability": event.log_probability, "without": event.without}
        yield _event(result | {"maps": maps}, "result")


def _nifti(explanation: Explanation, processor: Any, image: Image) -> bytes:
    """Return the map over a scan as a .nii.gz, without another copy of its voxels."""
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1, mtime=0) as file:
        explanation.overlay(processor, image).to_stream(file)
    return content.getvalue()


async def _with_error(pieces: AsyncIterator[bytes], public: Callable[[str], str]) -> AsyncIterator[bytes]:
    """Yield server-sent events; an error becomes the last one.

    Args:
        pieces: the events.
        public: takes the server's paths out of a message.
    """
    try:
        async for piece in pieces:
            yield piece
    except Exception as error:
        yield _event(_api_error(error, public).to_json())
        if not isinstance(error, UmbrellaError | Busy | ApiError):
            raise  # to be logged


async def _last(events: AsyncIterator[Any]) -> CompleteAnswer:
    """Return the whole answer."""
    while True:
        if isinstance(event := await anext(events), CompleteAnswer):
            return event


async def _unless_gone(request: Request, work: Awaitable[T], public: Callable[[str], str]) -> T:
    """Return what `work` returns; cancel it if the client goes away. Errors of the engine become answers.

    Raises ClientDisconnect if the client went away, ApiError for a question that cannot be answered.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    except (UmbrellaError, Busy) as error:
        raise _api_error(error, public) from None
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(BaseException):
                await task


def _api_error(error: BaseException, public: Callable[[str], str]) -> ApiError:
    """Return the answer to a request whose work failed, without the server's paths."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        message = "too many questions wait; ask again in a few seconds"
        return ApiError(429, message, code="busy", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, UmbrellaError):
        statuses = {
            ConfigError: (400, "invalid_value"),
            DataError: (422, "unusable"),
            CheckpointError: (422, "unusable"),
            ReadingTimeoutError: (504, "too_slow"),
        }
        status, code = statuses.get(type(error), (500, "failed"))
        return ApiError(status, public("; ".join(error.faults)), code=code)
    return ApiError(500, "the server failed; its log says where", code="failed")


async def _json_body(request: Request) -> dict[str, Any]:
    """Return the body of a request, an object."""
    content = bytearray()
    async for piece in request.stream():  # unlike `body`, keeps nothing
        content += piece
    try:
        body = parse_json(content.decode(), "the request", ConfigError, "send JSON")
    except ConfigError as error:
        raise ApiError(400, error.faults[0], code="invalid_json") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the request: not UTF-8", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "expected a JSON object", code="invalid_json")
    return body


def _check_fields(given: Mapping[str, Any], known: tuple[str, ...], place: str = "") -> None:
    """Raise ApiError for a field that this server does not have, unless it asks for nothing."""
    for name, value in given.items():
        if name in known or value is None or (not place and value in _NEUTRAL.get(name, ())):
            continue
        message = "not supported by this server" if name in _NEUTRAL else "unknown; this server does not have it"
        raise ApiError(
            400, f"{place}{name}: {message}; leave it out", code="unsupported_parameter", param=f"{place}{name}"
        )


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any, place: str = "") -> Any:
    """Return a field of a request, the default if it is missing or null. Raise ApiError if it has another type."""
    value = given.get(name)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1000:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object"}
        raise _bad(f"{place}{name}", f"expected {words.get(kind, 'a list')}")
    return value


def _number_grid(given: Mapping[str, Any]) -> NumberGrid:
    """Return the candidate numbers of `umbrella.numbers`: `low`, `high`, `step` and `text`."""
    place = "umbrella.numbers"
    _check_fields(given, ("low", "high", "step", "text"), f"{place}.")
    if missing := [name for name in ("low", "high", "step", "text") if given.get(name) is None]:
        raise _bad(f"{place}.{missing[0]}", "missing; expected low, high, step, and a text such as '{} years.'")
    ends = {name: _typed(given, name, float, None, f"{place}.") for name in ("low", "high", "step")}
    try:
        candidates = NumbersConfig(**ends, text=_typed(given, "text", str, None, f"{place}."))
        steps = (candidates.high - candidates.low) / candidates.step
        if steps >= _MAX_ANSWERS:
            raise _bad(place, f"expected at most {_MAX_ANSWERS} candidates")
        _check_text(math.ceil(steps) * len(str(candidates.text)), f"{place}.text")
        return NumberGrid.write(candidates, NumberTemplate.parse(str(candidates.text)), place)
    except (UmbrellaError, ValueError) as error:
        message = error.faults[0] if isinstance(error, UmbrellaError) else "expected low < high, step > 0 and one {}"
        raise _bad(place, message.removeprefix(f"{place}: ")) from None


def _check_text(characters: int, param: str) -> None:
    """Raise ApiError for more text than one request may have."""
    if characters > _MAX_TEXT:
        raise _bad(param, f"expected at most {_MAX_TEXT} characters in all")


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", code="invalid_value", param=param)


def _event(value: Any, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    return ((f"event: {name}\n" if name else "") + f"data: {strict_json(value)}\n\n").encode()


def _usage(answer: CompleteAnswer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _extra(question: Question, answer: CompleteAnswer) -> dict[str, Any]:
    """Return the extra field of an answer; none if nothing was asked for."""
    extra: dict[str, Any] = {}
    if question.answers:
        extra["likelihoods"] = [{"answer": text, "probability": p} for text, p in answer.likelihoods.items()]
    if answer.numbers is not None:
        (summary,) = answer.numbers.summaries()
        values, (probabilities,) = answer.numbers.values.tolist(), answer.numbers.probabilities.tolist()
        extra["numbers"] = summary | {"values": values, "probabilities": probabilities}
    if question.control:
        extra["control"] = question.control
    return {"umbrella": extra} if extra else {}


def _completion(question: Question, answer: CompleteAnswer) -> dict[str, Any]:
    """Return an answer that is not streamed, without its head."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    made = {"object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
    return made | _extra(question, answer)
