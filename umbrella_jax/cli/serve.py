"""The command `serve`."""

import argparse
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from umbrella_jax.cli.options import add_command, add_flags, add_model, open_checkpoint, settings_of
from umbrella_jax.console import wrapped
from umbrella_jax.errors import ConfigError

_PORT = 8765


def add(commands: Any) -> None:
    """Add the command."""
    serve = add_command(
        commands,
        "serve",
        _serve,
        "Open a local page to ask a model and look at scans.",
        "umbrella-jax serve runs/sex --data test.json",
    )
    add_model(serve)
    serve.add_argument("--data", metavar="PATH", help="conversations whose scans the page lists")
    add_flags(serve, ["--image-root"])
    group = serve.add_argument_group("server")
    text = "address to listen on; default 127.0.0.1, which only this machine reaches"
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    group.add_argument(
        "--port", type=_port, default=_PORT, metavar="N", help=f"port; default {_PORT}, 0 takes a free one"
    )
    text = "what requests must bring; default a random one, and none on 127.0.0.1"
    group.add_argument("--token", metavar="TEXT", help=text)
    group.add_argument(
        "--max-upload", type=_positive, default=512, metavar="N", help="largest upload in MB; default 512"
    )
    text = "longest answer, in tokens, that a request may ask for; default 256"
    group.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help=text)
    text = "questions that are answered together; default 8"
    group.add_argument("--batch-size", type=_positive, default=8, metavar="N", help=text)
    text = "log requests with names and questions, which are participants' data"
    group.add_argument("--log-requests", action="store_true", help=text)
    group.add_argument("--open", action="store_true", help="open the page in the browser")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1 << 16:
        raise argparse.ArgumentTypeError(f"expected 1 to {1 << 16}, got {text}")
    return int(text)


def _serve(arguments: argparse.Namespace) -> None:
    from umbrella_jax.serve import why_unavailable

    if reason := why_unavailable():
        raise ConfigError(f"serve: {reason}")
    from umbrella_jax.serve.guard import Access, check_token, is_loopback
    from umbrella_jax.serve.listen import bind, ended_by_signals

    token = arguments.token or (None if is_loopback(arguments.host) else secrets.token_urlsafe(24))
    if token and (fault := check_token(token)):
        raise ConfigError(f"token: {fault}")
    with ended_by_signals(), bind(arguments.host, arguments.port) as bound:
        _run(arguments, Access(arguments.host, token), bound)


def _run(arguments: argparse.Namespace, access: Any, bound: socket.socket) -> None:
    from umbrella_jax.checkpoints.load import load_opened
    from umbrella_jax.config.schema import DataConfig
    from umbrella_jax.data.conversation import read_with_config
    from umbrella_jax.inference.processor import Processor
    from umbrella_jax.run.record import read_training_records
    from umbrella_jax.serve.app import make_app
    from umbrella_jax.serve.description import describe_model
    from umbrella_jax.serve.engine import Engine
    from umbrella_jax.serve.listen import Server
    from umbrella_jax.serve.metrics import ServerMetrics
    from umbrella_jax.serve.openai_api import model_routes
    from umbrella_jax.serve.readers import Readers
    from umbrella_jax.serve.scans import UploadLimits, open_scans

    settings = settings_of(arguments)
    checkpoint = open_checkpoint(arguments, settings)
    config = settings.data if settings else DataConfig()
    config = replace(config, image_root=getattr(arguments, "data.image_root") or config.image_root)
    data = read_with_config(arguments.data, checkpoint.config.modalities, config) if arguments.data else None
    description = describe_model(checkpoint, read_training_records(checkpoint), arguments.data)
    for gap in description.gaps:
        print("\n".join(wrapped(f"missing on the page: {gap.effect}: {gap.reason}")), file=sys.stderr)
    processor = Processor.from_checkpoint(checkpoint, max_length=config.max_length)
    lanes, longest = arguments.batch_size, arguments.max_new_tokens
    readers = Readers()
    engine = Engine(load_opened(checkpoint), processor, lanes=lanes, max_new_tokens=longest, readers=readers)
    size = arguments.max_upload << 20
    limits = UploadLimits(file_bytes=size, total_bytes=max(UploadLimits.total_bytes, 4 * size))
    print("compiling for the shapes of its tasks", flush=True)
    with open_scans(processor.modalities, limits, data, readers) as scans, engine.running(description.warm_up()):
        metrics = ServerMetrics()
        metrics.watch("umbrella_questions_waiting", "Questions that wait", lambda: engine.waiting)
        metrics.watch("umbrella_questions_answered", "Questions that are being answered", lambda: engine.answering)
        routes = model_routes(engine, scans, description)
        app = make_app(scans, access, routes=routes, metrics=metrics, log_requests=arguments.log_requests)
        host = socket.gethostname() if arguments.host in ("0.0.0.0", "::") else arguments.host
        host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{bound.getsockname()[1]}/" + (f"?token={access.token}" if access.token else "")
        server = Server(app, partial(_announce, url, open_page=arguments.open))
        # messages of libraries may quote a name; Ctrl+C is the usual end
        with nullcontext() if arguments.log_requests else _silent_loggers(), suppress(KeyboardInterrupt):
            server.run([bound])


@contextmanager
def _silent_loggers() -> Iterator[None]:
    """Let the loggers that know of scans and requests print nothing."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "python_multipart", "umbrella_jax")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _announce(url: str, *, open_page: bool) -> None:
    """Print the address, and open it in a browser with a window; a text browser would take over the terminal."""
    import webbrowser

    print(f"{url}\n  not a medical device; Ctrl+C stops the server and removes all uploads", flush=True)
    if open_page and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
