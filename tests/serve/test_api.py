"""The API of `serve`, asked by OpenAI's own client over a socket."""

import asyncio
import gzip
import json
import re
import time
from typing import Any
from unittest import mock

import nibabel as nib
import openai
import pytest
from starlette.testclient import TestClient

from tests.helpers import docs_world
from tests.helpers.served import Served
from tests.helpers.small_run import said, umbrella
from umbrella_jax.checkpoints.load import load
from umbrella_jax.errors import visible
from umbrella_jax.inference.generate import Sampling, encode, generate, prefill
from umbrella_jax.inference.lanes import advance, enter, first_token
from umbrella_jax.serve import engine, volumes
from umbrella_jax.serve.listen import Server


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


NUMBERS = {"low": 20, "high": 26, "step": 2, "text": "{} years."}


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
        ({"extra_body": {"temperature": 10**400}}, "temperature"),
        ({"extra_body": {"umbrella": {"answers": ["yes " * 99999]}}}, "umbrella.answers"),
        (
            {"extra_body": {"umbrella": {"numbers": NUMBERS | {"text": "{} years." + " " * 99999}}}},
            "umbrella.numbers.text",
        ),
        ({"extra_body": {"x" * 99999: 1}}, "x" * 2000),
        ({"max_tokens": 9}, "max_tokens"),
        ({"model": "gpt-4"}, "model"),
    ],
)
def test_refuses_by_name(served: Served, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        served.ask(**options)
    assert caught.value.param == param
    assert caught.value.status_code == (404 if param == "model" else 400)
    assert len(caught.value.response.content) < 10_000


def test_refuses_what_would_take_too_long(served: Served) -> None:
    """More text than any prompt has, and numbers that no answer can be; a control of explanations does nothing."""
    with pytest.raises(openai.BadRequestError, match="messages: expected at most 262144 characters"):
        served.ask("word " * 60_000)
    with pytest.raises(openai.BadRequestError, match=r"an answer has \d+ tokens"):
        served.ask(extra_body={"umbrella": {"numbers": {"low": 0, "high": 1e31, "step": 1e30, "text": "{:.1f}"}}})
    with pytest.raises(openai.BadRequestError, match="expected a text, or a list of at most 1000"):
        served.ask("Which sex?", *[{"type": "text", "text": ""}] * 1000)
    assert served.is_idle()


def test_refuses_a_scan_without_modality(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="expected one of T1"):
        served.ask("Which sex?", served.image(modality=None))


def test_the_command_serves_a_run_and_the_scans_of_its_data(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    world, results = served.run.parent, dict[str, Any]()

    def run(server: Server, sockets: list[Any]) -> None:
        with TestClient(server.config.app, base_url=f"http://127.0.0.1:{sockets[0].getsockname()[1]}") as client:
            results["model"] = client.get("/api/model").json()
            results["scans"] = client.get("/api/scans").json()
            image = {"type": "image_url", "image_url": {"url": f"scan:{results['scans'][0]['id']}"}}
            content = [image, {"type": "text", "text": "Which sex?"}]
            body = {"model": served.model, "max_tokens": 6, "messages": [{"role": "user", "content": content}]}
            results["answer"] = client.post("/v1/chat/completions", json=body).json()
            results["metrics"] = client.get("/metrics").text
        server._on_start()
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "run", run)
    flags = ["--image-root", world / "scans", "--port", 0, "--batch-size", 4, "--max-new-tokens", 8]
    printed, missing = said("serve", served.run, "--data", world / "eval.json", *flags)
    lines = printed.splitlines()
    assert "missing on the page: measured accuracies:" in missing
    assert [gap["effect"] for gap in results["model"]["gaps"]] == [
        "measured accuracies",
        "the number of subjects",
    ]
    assert lines[-2].startswith("http://127.0.0.1:")
    assert results["model"]["id"] == served.model
    first = results["scans"][0]
    assert (first["modality"], first["uploaded"], first["warnings"]) == ("T1", False, [])
    expected = served.ask("Which sex?", served.image(world / "scans" / first["name"]))
    assert results["answer"]["choices"][0]["message"]["content"] == expected.choices[0].message.content
    assert "umbrella_questions_waiting 0.0" in results["metrics"]
    assert "--token: expected 16 or more letters" in umbrella("serve", served.run, "--token", "short", code=2)


def test_the_program_in_the_docs_runs(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = (block.text for block in docs_world.blocks("docs/serve.md") if block.first.startswith("import"))
    for here, there in {"http://127.0.0.1:8765": served.url, "sub-01_T1w.nii.gz": str(served.scan)}.items():
        assert here in program
        program = program.replace(here, there)
    names: dict[str, Any] = {}
    exec(program, names)
    names["client"].close()
    shares = re.findall(r"^ *([\d.]+)%  (?:Female|Male)\.$", capsys.readouterr().out, re.MULTILINE)
    assert sum(map(float, shares)) == pytest.approx(100)


def test_a_failure_of_the_device_ends_its_questions_and_no_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = served.ask().choices[0].message.content
    for module, name in ((volumes, "encode"), (engine, "enter"), (engine, "advance")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, mock.Mock(side_effect=RuntimeError("RESOURCE_EXHAUSTED")))
            with pytest.raises(openai.InternalServerError):
                served.ask("Which sex?", served.image(served.scan.with_name("3.nii.gz")))
    assert served.ask().choices[0].message.content == before
    assert served.is_idle()
