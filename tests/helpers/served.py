"""A server with a tiny model, in a thread of this process."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai

from tests.helpers.small_run import World, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import load_opened
from umbrella_jax.inference.processor import Processor
from umbrella_jax.run.record import read_training_records
from umbrella_jax.scoring.number_grid import NumberGrid
from umbrella_jax.scoring.tasks import Task
from umbrella_jax.serve.app import make_app
from umbrella_jax.serve.description import ServedTask, describe_model
from umbrella_jax.serve.engine import Engine
from umbrella_jax.serve.guard import Access
from umbrella_jax.serve.listen import Server, bind
from umbrella_jax.serve.openai_api import model_routes
from umbrella_jax.serve.scans import UploadLimits, open_scans

_AGES = tuple(map(str, range(20, 90)))
AGE = Task(
    "regression",
    (),
    unit="years",
    numbers=NumberGrid(tuple(map(float, _AGES)), tuple(f"{age}." for age in _AGES), _AGES),
)
"""A task of numbers that the server offers beside those of the run."""


class Served:
    """A server with a model, in a thread of this process."""

    def __init__(self, world: World, stack: ExitStack):
        umbrella(*world.train_flags(world.root / "run", "--epochs", 1, "--set", "train.save_steps=1000"))
        self.run, self.scan = world.root / "run", world.root / "scans" / "0.nii.gz"
        checkpoint = Checkpoint.open(self.run).answering()
        description = describe_model(checkpoint, read_training_records(checkpoint))
        description = replace(description, tasks=(*description.tasks, ServedTask("age", AGE, ("How old?",))))
        processor = Processor.from_checkpoint(checkpoint)
        self.engine = Engine(load_opened(checkpoint), processor, lanes=4, max_new_tokens=8)
        stack.enter_context(self.engine.running(description.warm_up()))
        self.scans = stack.enter_context(open_scans(checkpoint.config.modalities, UploadLimits()))
        self._routes = model_routes(self.engine, self.scans, description)
        self.url = stack.enter_context(self.listening(Access("127.0.0.1")))
        self.client = stack.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0))
        self.model = description.id

    @contextmanager
    def listening(self, access: Access) -> Iterator[str]:
        """Serve the same model and scans at an address of their own, in a thread; yield the address."""
        socket, ready = bind("127.0.0.1", 0), threading.Event()
        server = Server(make_app(self.scans, access, routes=self._routes), ready.set)
        thread = threading.Thread(target=server.run, args=[[socket]])
        thread.start()
        try:
            assert ready.wait(60)
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    def image(self, scan: Path | None = None, **more: Any) -> dict[str, Any]:
        url = "data:application/gzip;base64," + base64.b64encode((scan or self.scan).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": url}, "modality": "T1", **more}

    def ask(self, text: str = "Which sex?", *parts: Any, **options: Any) -> Any:
        content = [*(parts or [self.image()]), {"type": "text", "text": text}]
        common = {"model": self.model, "max_tokens": 6}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": content}], **common | options)

    def open(self, path: str, body: dict[str, Any] | None = None, seconds: float = 300) -> Any:
        """Return the server's answer, unread."""
        content = None if body is None else json.dumps(body).encode()
        return urlopen(Request(self.url + path, content), timeout=seconds)

    def fetch(self, path: str, body: dict[str, Any] | None = None, seconds: float = 300) -> bytes:
        """Return what the server answers; raise TimeoutError, and close the connection, if it takes longer."""
        with self.open(path, body, seconds) as response:
            return bytes(response.read())

    def is_idle(self) -> bool:
        """Return whether all questions end within ten seconds."""
        deadline = time.monotonic() + 10
        while self.engine.waiting or self.engine.answering or list(self.scans.folder.glob("*.nii*")):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True
