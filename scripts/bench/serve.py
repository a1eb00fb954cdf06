"""Questions per second of `umbrella-jax serve`, asked together and one by one, by OpenAI's client."""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

from bench.answers import Setting, load_config, load_tokenizer, random_parameters, write_data
from bench.measure import figure, measure, resident
from bench.workload import VolumeSpec

SETTING = Setting("0.5b", 4, 32000, VolumeSpec("T1", (96, 96, 96), (16, 16, 16), "t1_0.5b"), "float32", 8, 4, 8)
QUESTIONS, NEW, LANES = 32, 16, 8


def serve(work_dir: Path) -> None:
    """Time 32 questions about four scans to a server, asked together and one by one."""
    write_data(work_dir, SETTING)
    one_by_one, at_once, processor_ratio, same, added, first = measure(_times, work_dir)["value"]
    figure("serve_one_by_one", QUESTIONS / one_by_one, "questions/s", first_piece_seconds=round(first, 3))
    more = {"same_answers": same, "memory_added_gb": round(added, 3)}
    figure("serve_at_once", QUESTIONS / at_once, "questions/s", together=LANES, **more)
    figure("serve_ratio", one_by_one / at_once, "", of_processor_time=round(processor_ratio, 3))


def _times(folder: Path) -> list[float]:
    """Return [seconds one by one, seconds at once, ratio of their processor time, share of equal answers, GB that
    asking at once adds, seconds to the first piece of a streamed answer]."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import openai

    from umbrella_jax.data.conversation import read_conversations
    from umbrella_jax.inference.processor import Processor
    from umbrella_jax.models import abstract_params, merge, native_backend
    from umbrella_jax.serve.app import make_app
    from umbrella_jax.serve.description import ModelDescription
    from umbrella_jax.serve.engine import Engine
    from umbrella_jax.serve.guard import Access
    from umbrella_jax.serve.listen import Server, bind
    from umbrella_jax.serve.openai_api import model_routes
    from umbrella_jax.serve.scans import UploadLimits, open_scans

    config = load_config(folder, SETTING).with_attention("auto", native_backend(jax.devices()[0]))
    device = jax.devices()[0]
    params = {path: jax.device_put(value, device) for path, value in random_parameters(folder, SETTING).items()}
    model, processor = merge(abstract_params(config)[0], params), Processor(load_tokenizer(folder), config.modalities)
    about = ModelDescription("bench", "random", (), None, None, config.modalities, frozenset(), ())
    engine = Engine(model, processor, lanes=LANES, max_new_tokens=NEW)
    data = read_conversations(folder / "data.json", config.modalities)
    with open_scans(config.modalities, UploadLimits(), data) as scans, engine.running(about.warm_up()):
        scans.read_data()
        ids = {scan.path: scan.id for scan in scans.listed()}
        asked = [
            [
                {"type": "image_url", "image_url": {"url": f"scan:{ids[own.images[0].path]}"}, "modality": "T1"},
                {"type": "text", "text": own.messages[0].text},
            ]
            for own in data
        ]
        socket, ready = bind("127.0.0.1", 0), threading.Event()
        server = Server(make_app(scans, Access("127.0.0.1"), routes=model_routes(engine, scans, about)), ready.set)
        thread = threading.Thread(target=server.run, args=[[socket]])
        thread.start()
        ready.wait()
        url = f"http://127.0.0.1:{socket.getsockname()[1]}/v1"

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

        times = asyncio.run(work())
        server.should_exit = True
        thread.join()
    return times
