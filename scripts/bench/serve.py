"""Questions per second of `umbrella-jax serve`, asked together and one by one, by OpenAI's client; and its memory."""

import asyncio
import base64
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bench.answers import Setting, load_config, load_tokenizer, random_parameters, write_data
from bench.measure import figure, measure, resident
from bench.workload import VolumeSpec

SETTING = Setting("0.5b", 4, 32000, VolumeSpec("T1", (96, 96, 96), (16, 16, 16), "t1_0.5b"), "float32", 8, 4, 8)
QUESTIONS, NEW, LANES = 32, 16, 8
SCAN, LIMIT_GB = (256, 256, 256), 2.0
SCRIPTS = Path(__file__).parents[1]


def serve(work_dir: Path) -> None:
    """Time 32 questions about four scans to a server, together and one by one; measure memory with 32 whole scans."""
    write_data(work_dir, SETTING)
    one_by_one, at_once, processor_ratio, same, added, first = measure(_times, work_dir)["value"]
    figure("serve_one_by_one", QUESTIONS / one_by_one, "questions/s", first_piece_seconds=round(first, 3))
    more = {"same_answers": same, "memory_added_gb": round(added, 3)}
    figure("serve_at_once", QUESTIONS / at_once, "questions/s", together=LANES, **more)
    figure("serve_ratio", one_by_one / at_once, "", of_processor_time=round(processor_ratio, 3))
    peak, idle, request, seconds, answered = measure(_memory, work_dir)["value"]
    more = {"idle_gb": round(idle, 3), "request_mb": round(request, 1), "seconds": round(seconds), "answered": answered}
    figure("serve_memory_added", peak - idle, "GB", limit=LIMIT_GB, peak_gb=round(peak, 3), questions=QUESTIONS, **more)


@contextmanager
def _served(folder: Path) -> Iterator[tuple[str, Any, Any]]:
    """Serve a model with random weights. Yields (address of its API, scans, conversations of its data)."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.inference.processor import Processor
    from umbrella_jax.models import abstract_params, merge, native_backend
    from umbrella_jax.serve.app import make_app
    from umbrella_jax.serve.description import ModelDescription
    from umbrella_jax.serve.engine import Engine
    from umbrella_jax.serve.guard import Access
    from umbrella_jax.serve.listen import Server, bind
    from umbrella_jax.serve.openai_api import model_routes
    from umbrella_jax.serve.readers import Readers
    from umbrella_jax.serve.scans import UploadLimits, open_scans

    config = load_config(folder, SETTING).with_attention("auto", native_backend(jax.devices()[0]))
    device = jax.devices()[0]
    params = {path: jax.device_put(value, device) for path, value in random_parameters(folder, SETTING).items()}
    model, processor = merge(abstract_params(config)[0], params), Processor(load_tokenizer(folder), config.modalities)
    about = ModelDescription(
        id="bench",
        step=None,
        base="random",
        trained=(),
        subjects=None,
        conversations=None,
        modalities=config.modalities,
        untrained=frozenset(),
        tasks=(),
    )
    readers = Readers()
    engine = Engine(model, processor, lanes=LANES, max_new_tokens=NEW, readers=readers)
    data = read_conversations(folder / "data.json", config.modalities)
    with open_scans(config.modalities, UploadLimits(), data, readers) as scans, engine.running(about.warm_up()):
        scans.read_data()
        socket, ready = bind("127.0.0.1", 0), threading.Event()
        server = Server(make_app(scans, Access("127.0.0.1"), routes=model_routes(engine, scans, about)), ready.set)
        thread = threading.Thread(target=server.run, args=[[socket]])
        thread.start()
        ready.wait()
        yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1", scans, data
        server.should_exit = True
        thread.join()


def _times(folder: Path) -> list[float]:
    """Return [seconds one by one, seconds at once, ratio of their processor time, share of equal answers, GB that
    asking at once adds, seconds to the first piece of a streamed answer]."""
    import openai

    with _served(folder) as (url, scans, data):
        ids = {scan.path: scan.id for scan in scans.listed()}
        asked = [
            [
                {"type": "image_url", "image_url": {"url": f"scan:{ids[own.images[0].path]}"}, "modality": "T1"},
                {"type": "text", "text": own.messages[0].text},
            ]
            for own in data
        ]

        async def ask(client: openai.AsyncOpenAI, content: Any) -> str:
            messages: Any = [{"role": "user", "content": content}]
            answer = await client.chat.completions.create(model="bench", messages=messages, max_tokens=NEW)
            return str(answer.choices[0].message.content)

        async def work() -> list[float]:
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:
                for content in asked[:: SETTING.questions]:  # so that no scan is read in what is timed
                    await ask(client, content)
                before, begun, busy = resident(), time.perf_counter(), time.process_time()
                together = await asyncio.gather(*(ask(client, content) for content in asked))
                at_once, added = time.perf_counter() - begun, resident() - before
                busy_at_once = time.process_time() - busy
                begun, busy = time.perf_counter(), time.process_time()
                in_turn = [await ask(client, content) for content in asked]
                one_by_one, busy = time.perf_counter() - begun, time.process_time() - busy
                begun = time.perf_counter()
                messages: Any = [{"role": "user", "content": asked[0]}]
                pieces = await client.chat.completions.create(
                    model="bench", messages=messages, max_tokens=NEW, stream=True
                )
                async with pieces:
                    await anext(pieces.__aiter__())
                first = time.perf_counter() - begun
            same = sum(own == other for own, other in zip(together, in_turn, strict=True)) / len(asked)
            return [one_by_one, at_once, busy / busy_at_once, same, added, first]

        return asyncio.run(work())


def _memory(folder: Path) -> list[float]:
    """Return [GB at the peak of 32 questions at once, each with a scan of its own inside; GB before; MB of a request;
    seconds; questions that got an answer]."""
    scan = folder / "scan.nii.gz"
    scan.write_bytes(gzip.compress(_head(SCAN), 1))
    with _served(folder) as (url, _, _):
        size = _send(url, scan, 1)[0] / 1e6  # compiles
        idle, peak, done = resident(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.perf_counter()
        client = [sys.executable, "-m", "bench.serve", url, str(scan), str(QUESTIONS)]  # its memory is not the server's
        answered = int(subprocess.run(client, cwd=SCRIPTS, check=True, stdout=subprocess.PIPE).stdout)
        seconds = time.perf_counter() - begun
        done.set()
        watcher.join()
    return [peak, idle, size, seconds, answered]


def _head(shape: tuple[int, ...]) -> bytes:
    """Return a scan of noise inside a ball, which compresses as scans do."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    inside = sum(np.square(x) for x in np.meshgrid(*axes, indexing="ij", sparse=True)) < 0.7
    values = np.random.default_rng(0).integers(100, 900, shape, np.int16) * inside
    return bytes(nib.Nifti1Image(values.astype(np.int16), np.eye(4)).to_bytes())


def _send(url: str, scan: Path, count: int) -> tuple[int, int]:
    """Ask `count` questions at once, each with a scan inside. Returns (bytes of a request, questions answered)."""
    from concurrent.futures import ThreadPoolExecutor
    from urllib.request import Request, urlopen

    encoded = base64.b64encode(scan.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:;base64,{encoded}"}, "modality": "T1"}
    content = [image, {"type": "text", "text": "Which side?"}]
    body = {"model": "bench", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
    request = json.dumps(body).encode()

    def ask(_: int) -> bool:
        with urlopen(Request(f"{url}/chat/completions", request), timeout=3600) as answer:
            return "choices" in json.load(answer)

    with ThreadPoolExecutor(count) as pool:
        return len(request), sum(pool.map(ask, range(count)))


if __name__ == "__main__":
    print(_send(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))[1])
