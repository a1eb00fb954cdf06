"""The routes of the server: the page and its files, scans, health and figures; those of the model are passed in."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from umbrella_jax.serve.budget import Budget
from umbrella_jax.serve.forms import uploaded_file
from umbrella_jax.serve.guard import UPLOADS, Access, Guard, error_to_json
from umbrella_jax.serve.metrics import CONTENT_TYPE, ServerMetrics
from umbrella_jax.serve.responses import ApiError, HoldingResponse, json_response, octets
from umbrella_jax.serve.scans import Scans

_PAGE = Path(__file__).parent / "page"
_HTML = Path(__file__).parents[1] / "html"
_FILES = [*_PAGE.glob("*.js"), *_PAGE.glob("*.css"), *(_HTML / name for name in ("viewer.js", "style.css"))]
STATIC = {file.name: file for file in (*_FILES, _HTML / "vendor" / "niivue.umd.js")}
"""{name: file} of the files under /static/; no other file is served."""
_VOXEL_BYTES = 4 << 30
"""Memory of the voxels that are being made for clients, or wait for them to read."""
IS_CUT = "Umbrella-List-Is-Cut"
"""Header of the list of scans: whether --data has more of them."""
_SWEEP_SECONDS = 30.0
"""Time between two searches for expired uploads."""


def make_app(
    scans: Scans,
    access: Access,
    *,
    routes: Sequence[BaseRoute] = (),
    metrics: ServerMetrics | None = None,
    say: Callable[[str], object] = print,
    log_requests: bool = False,
) -> Starlette:
    """Return the server's application.

    Args:
        scans: those that requests may name.
        access: who may send requests.
        routes: those that need the model. Handlers raise `ApiError`; an `UmbrellaError` becomes an answer with status
            422, and any other error one with 500.
        metrics: figures of /metrics; default new ones.
        say: prints a line of the log.
        log_requests: whether each request is logged, and the messages of errors. `request.state.note` of a handler
            follows the line.
    """
    metrics = metrics or ServerMetrics()
    voxels = Budget(_VOXEL_BYTES)
    largest = max((4 * math.prod(own.size) for own in scans.modalities.values()), default=0)

    async def page(_: Request) -> Response:
        return FileResponse(_PAGE / "index.html")

    async def static(request: Request) -> Response:
        file = STATIC.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404)
        return FileResponse(file)

    async def list_scans(request: Request) -> Response:
        await request.app.state.data_read
        headers = {IS_CUT: "true" if scans.is_cut else "false"}
        return json_response([scan.to_json() for scan in scans.listed()], headers=headers)

    async def upload(request: Request) -> Response:
        name, content = await uploaded_file(request)
        scan = await scans.add(name, content)
        request.state.note = f"{scan.name}: {scan.bytes} bytes"
        return json_response(scan.to_json(), 201)

    async def delete_scan(request: Request) -> Response:
        scans.remove(request.path_params["id"])
        return Response(status_code=204)

    async def scan_file(request: Request) -> ASGIApp:
        async with AsyncExitStack() as stack:
            scan = stack.enter_context(scans.in_use(request.path_params["id"]))
            converted = 0 if scan.is_nifti else 4 * math.prod(scan.header.shape or ())
            await stack.enter_async_context(voxels.held(min(converted, voxels.total)))
            content = await scans.viewable(scan)
            response = octets(content) if isinstance(content, bytes) else _download(content, scan.name)
            return HoldingResponse(response, stack.pop_all())

    async def seen(request: Request) -> ASGIApp:
        window = request.query_params.get("window", "0")
        if not window.isdecimal() or len(window) > 9:
            raise ApiError(400, "window: expected a whole number from 0", param="window")
        modality = request.query_params.get("modality")
        async with AsyncExitStack() as stack:
            scan = stack.enter_context(scans.in_use(request.path_params["id"]))
            await stack.enter_async_context(voxels.held(min(largest, voxels.total)))
            content = await scans.seen(scan, modality, int(window))
            return HoldingResponse(octets(content), stack.pop_all())

    async def healthz(_: Request) -> Response:
        return json_response({"status": "ok"})

    async def figures(_: Request) -> Response:
        return Response(metrics.text(scans.usage()), headers={"Content-Type": CONTENT_TYPE})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.data_read = asyncio.ensure_future(asyncio.to_thread(scans.read_data))
        sweeping = asyncio.create_task(_sweep(scans))
        try:
            yield
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping

    return Starlette(
        routes=[
            Route("/", page),
            Route("/static/{name}", static),
            Route(UPLOADS, list_scans, methods=["GET"]),
            Route(UPLOADS, upload, methods=["POST"]),
            Route(f"{UPLOADS}/{{id}}", delete_scan, methods=["DELETE"]),
            Route(f"{UPLOADS}/{{id}}/file", scan_file),
            Route(f"{UPLOADS}/{{id}}/seen", seen),
            Route("/healthz", healthz),
            Route("/metrics", figures),
            *routes,
        ],
        middleware=[
            Middleware(
                Guard,
                access=access,
                upload_bytes=scans.limits.file_bytes,
                metrics=metrics,
                public=scans.public,
                say=say,
                log_requests=log_requests,
            )
        ],
        exception_handlers={HTTPException: error_to_json},
        lifespan=lifespan,
    )


def _download(file: Path, name: str) -> Response:
    return FileResponse(file, media_type="application/octet-stream", filename=name.rpartition("/")[2])


async def _sweep(scans: Scans) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        scans.remove_expired()
