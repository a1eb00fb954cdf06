"""The API of `serve`, asked by OpenAI's own client over a socket."""

import asyncio
import base64
import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import nibabel as nib
import openai
import pytest

from tests.helpers.small_run import World, make_world, umbrella
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import load, load_opened
from umbrella_jax.errors import visible
from umbrella_jax.inference.generate import Sampling, encode, generate, prefill
from umbrella_jax.inference.lanes import advance, enter, first_token
from umbrella_jax.inference.processor import Processor
from umbrella_jax.run.record import read_training_records
from umbrella_jax.serve.app import make_app
from umbrella_jax.serve.description import describe_model
from umbrella_jax.serve.engine import Engine
from umbrella_jax.serve.guard import Access
from umbrella_jax.serve.listen import Server, bind
from umbrella_jax.serve.openai_api import model_routes
from umbrella_jax.serve.scans import UploadLimits, open_scans


class Served:
    """A server with a model, in a thread of this process."""

    def __init__(self, world: World, stack: ExitStack):
        umbrella(*world.train_flags(world.root / "run", "--epochs", 1, "--set", "train.save_steps=1000"))
        self.run, self.scan = world.root / "run", world.root / "scans" / "0.nii.gz"
        checkpoint = Checkpoint.open(self.run).answering()
        description = describe_model(checkpoint, read_training_records(checkpoint))
        processor = Processor.from_checkpoint(checkpoint)
        self.engine = Engine(load_opened(checkpoint), processor, lanes=4, max_new_tokens=8)
        stack.enter_context(self.engine.running(description.warm_up()))
        self.scans = stack.enter_context(open_scans(checkpoint.config.modalities, UploadLimits()))
        routes = model_routes(self.engine, self.scans, description)
        socket, ready = bind("127.0.0.1", 0), threading.Event()
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        server = Server(make_app(self.scans, Access("127.0.0.1"), routes=routes), ready.set)
        thread = threading.Thread(target=server.run, args=[[socket]])
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        assert ready.wait(60)
        self.client = stack.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0))
        self.model = description.id

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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(make_world(tmp_path_factory.mktemp("api")), stack)


def test_answers_equal_those_of_generate_streamed_or_not(served: Served) -> None:
    flags = ["--image", f"T1={served.scan}", "--max-new-tokens", 6]
    printed = umbrella("generate", served.run, "Which sex?", *flags).removesuffix("\n")
    answers = ["left.", "right."]
    whole = served.ask(extra_body={"umbrella": {"answers": answers}})
    assert visible(whole.choices[0].message.content) == printed
    chunks = list(
        served.ask(stream=True, stream_options={"include_usage": True}, extra_body={"umbrella": {"answers": answers}})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].umbrella == whole.umbrella
    lines = umbrella("generate", served.run, "Which sex?", *flags[:2], "--answers", *answers).splitlines()
    shown = [f"{own['probability']:7.2%}  {own['answer']}" for own in whole.umbrella["likelihoods"]]
    assert shown == lines
    assert served.is_idle()


def test_32_questions_at_once_equal_one_at_a_time_and_compile_nothing(served: Served) -> None:
    runs = [served.scan.with_name(f"run-{number}.nii") for number in range(4)]
    asked = [(f"Is it {n}?", served.image(), {}) for n in range(8)]
    asked += [(f"Is it {n}?", served.image(runs[n % 4], modality="rsfMRI"), {}) for n in range(8)]
    asked += [(text, image, {"temperature": 2.0, "top_p": 0.9, "seed": 3}) for text, image, _ in asked]

    async def ask(client: openai.AsyncOpenAI, text: str, image: Any, options: Any) -> str:
        messages: Any = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
        answer = await client.chat.completions.create(messages=messages, model=served.model, max_tokens=6, **options)
        return str(answer.choices[0].message.content)

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *own) for own in asked))

    programs = (encode, prefill, first_token, enter, advance)
    compiled = [program._cache_size() for program in programs]
    answers = asyncio.run(together())
    assert [program._cache_size() for program in programs] == compiled
    assert answers == [served.ask(text, image, **more).choices[0].message.content for text, image, more in asked]
    assert len(set(answers)) > 8
    assert served.is_idle()

    batch = served.engine.processor.prompt("Is it 2?", [("rsfMRI", runs[2])])  # a draw is that of `generate`
    options: dict[str, Any] = {"stop_ids": served.engine.processor.stop_ids, "max_new_tokens": 6, "seeds": [3]}
    tokens = generate(load(served.run), batch, sampling=Sampling(temperature=2.0, top_p=0.9), **options)
    assert served.engine.processor.decode(tokens) == [answers[16 + 8 + 2]]


def test_an_explanation_reports_progress_and_leaves_a_map(served: Served) -> None:
    content = [served.image(), {"type": "text", "text": "Which sex?"}]
    body = {"model": served.model, "messages": [{"role": "user", "content": content}], "method": "gradient"}
    events = served.fetch("/v1/explain", body).decode().strip().split("\n\n")
    kinds, data = zip(*(event.split("\ndata: ") for event in events), strict=True)
    assert kinds == ("event: progress",) * 4 + ("event: result",)
    assert [json.loads(own) for own in data[:-1]] == [{"done": n, "total": 3} for n in range(4)]
    (own,) = json.loads(data[-1])["maps"]
    image = nib.Nifti1Image.from_bytes(gzip.decompress(served.fetch(f"/api/maps/{own['id']}")))
    assert image.shape == nib.load(served.scan).shape
    assert served.is_idle()


def test_a_client_that_goes_away_ends_its_questions(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, advance = 0, served.engine._advance

    def slow() -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.2)
        advance()

    monkeypatch.setattr(served.engine, "_advance", slow)
    content = [served.image(), {"type": "text", "text": "Which sex?"}]
    body: dict[str, Any] = {"model": served.model, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    with pytest.raises(TimeoutError):
        served.fetch("/v1/chat/completions", body, 0.3)
    with served.open("/v1/chat/completions", body | {"stream": True}) as response:
        response.read(20)
    assert served.is_idle()
    assert steps < 7  # of 14


def test_refuses_more_questions_than_may_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "_max_waiting", 0)
    with pytest.raises(openai.RateLimitError) as caught:
        served.ask()
    assert caught.value.response.headers["Retry-After"] == "5"


def test_a_blank_control_and_numbers_are_in_the_extra_field(served: Served) -> None:
    numbers = {"low": 20, "high": 26, "step": 2, "text": "{} years."}
    control = served.ask(extra_body={"umbrella": {"numbers": numbers, "control": "blank"}}).umbrella
    scan = served.ask(extra_body={"umbrella": {"numbers": numbers}}).umbrella
    assert control.pop("control") == "blank"
    assert control.keys() == scan.keys()
    assert scan["numbers"]["values"] == [20, 22, 24, 26]
    assert sum(scan["numbers"]["probabilities"]) == pytest.approx(1)
    assert control != scan


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 2}, "n"),
        ({"stop": ["."]}, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"extra_body": {"umbrella": {"control": "noise"}}}, "umbrella.control"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 9}, "max_tokens"),
        ({"model": "gpt-4"}, "model"),
    ],
)
def test_refuses_by_name(served: Served, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        served.ask(**options)
    assert caught.value.param == param
    assert caught.value.status_code == (404 if param == "model" else 400)


def test_refuses_a_scan_without_modality(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="expected one of T1"):
        served.ask("Which sex?", served.image(modality=None))
