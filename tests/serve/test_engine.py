"""The engine: whoever comes and goes, each question has the answer of `generate`; a failure stays in its lane."""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import umbrella_jax
from tests.helpers.served import Served
from umbrella_jax.checkpoints.load import load
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.loader import whole_batch
from umbrella_jax.errors import ConfigError, RunError
from umbrella_jax.inference.attribution import value_and_slope
from umbrella_jax.inference.generate import GREEDY, Sampling, generate
from umbrella_jax.models import Llava
from umbrella_jax.serve import engine as module
from umbrella_jax.serve.engine import CompleteAnswer, Engine, Explanation, Question, _chunks, _Job, _round_length

DRAWING = Sampling(temperature=2.0, top_p=0.9)
NARROW = Sampling(temperature=5.0, top_k=7)


@pytest.fixture(scope="module")
def model(served: Served) -> Llava:
    return load(served.run)


@pytest.fixture
def idle(served: Served, model: Llava) -> Iterator[Engine]:
    """An engine that does only what a test tells it to."""
    engine = Engine(model, served.engine.processor, lanes=4, max_new_tokens=8)
    yield engine
    engine.close()


def conversation(served: Served, text: str, scan: str, modality: str) -> Conversation:
    return served.engine.processor.question(text, [(modality, served.scan.with_name(scan))])


def questions(served: Served) -> list[Question]:
    """Questions of two modalities and two padded lengths, each greedy and drawn in two ways."""
    shown = [("1.nii.gz", "T1"), ("run-1.nii", "rsfMRI"), ("2.nii.gz", "T1")]
    texts = ["Is it 1?", "Is it 2?", "Is it " + "very " * 40 + "big?"]
    asked = [conversation(served, text, *own) for text, own in zip(texts, shown, strict=True)]
    samplings = [(GREEDY, 0), (DRAWING, 3), (DRAWING, 4), (NARROW, 3)]
    return [
        Question(own, tokens, *sampling) for own, tokens in zip(asked, (8, 5, 8), strict=True) for sampling in samplings
    ]


def job_of(engine: Engine, question: Question, events: list[Any]) -> _Job:
    prompt, trees = engine._encode(question)
    volumes = asyncio.run(engine._volumes.read(question.conversation, prompt, question.control))
    return _Job(question, prompt, volumes, trees, events.append)


def answer_of(events: list[Any]) -> str:
    (answer,) = (event for event in events if isinstance(event, CompleteAnswer))
    return answer.text


@pytest.fixture(scope="module")
def expected(served: Served, model: Llava) -> list[str]:
    """What `generate` answers to `questions`."""
    processor, answers = served.engine.processor, list[str]()
    for own in questions(served):
        batch = whole_batch(processor.asked(own.conversation), prompts=True)
        options: dict[str, Any] = {"max_new_tokens": own.max_new_tokens, "sampling": own.sampling}
        tokens = generate(model, batch, stop_ids=processor.stop_ids, seeds=[own.seed], **options)
        answers += processor.decode(tokens)
    return answers


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_coming_and_going_gives_the_answers_of_generate(
    served: Served, idle: Engine, expected: list[str], seed: int
) -> None:
    rng, asked = np.random.default_rng(seed), questions(served)
    order = [*rng.permutation(len(asked)), *rng.permutation(len(asked))]
    jobs = list[tuple[int, _Job, list[Any]]]()
    while order or idle._queue or any(idle._busy):
        for _ in range(min(int(rng.integers(0, 4)), len(order))):
            number, events = int(order.pop()), list[Any]()
            jobs.append((number, job_of(idle, asked[number], events), events))
            idle._queue.append(jobs[-1][1])
        for _, job, _ in jobs:
            job.is_gone |= rng.random() < 0.01
        idle._admit()
        idle._advance()
    stayed = [(number, answer_of(events)) for number, job, events in jobs if not job.is_gone]
    assert len(stayed) > 8
    assert stayed == [(number, expected[number]) for number, _ in stayed]
    assert len({answer for _, answer in stayed}) > 5


def test_nan_in_a_lane_ends_its_question_and_touches_neither_others_nor_the_next(
    served: Served, idle: Engine, expected: list[str]
) -> None:
    asked = questions(served)

    def begin(*numbers: int) -> list[list[Any]]:
        events: list[list[Any]] = [[] for _ in numbers]
        idle._queue.extend(job_of(idle, asked[n], own) for n, own in zip(numbers, events, strict=True))
        idle._admit()
        return events

    hit, other = begin(8, 0)  # a long prompt, and a shorter one that takes its lane afterwards
    assert idle._lanes is not None
    cache = idle._lanes.cache
    poisoned = cache.v.at[:, 0, :, 60:].set(jnp.nan)
    idle._lanes = replace(idle._lanes, cache=replace(cache, v=poisoned))
    idle._advance()
    assert isinstance(hit[-1], RunError)
    assert "not finite" in str(hit[-1])
    (following,) = begin(1)
    assert idle._busy[0] is not None
    while any(idle._busy):
        idle._advance()
    assert (answer_of(other), answer_of(following)) == (expected[0], expected[1])


@pytest.mark.parametrize("token", [0, 2])
def test_an_error_of_one_question_reaches_its_client_and_no_other(
    served: Served, idle: Engine, expected: list[str], monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    """As it enters its lane, and later."""
    asked, events = questions(served), ([], [], [])
    jobs = [job_of(idle, asked[n], own) for n, own in zip((0, 1, 4), events, strict=True)]
    append = idle._append

    def fail_for_one(job: _Job, own: int) -> Any:
        if job is jobs[1] and len(job.tokens) == token:
            raise UnicodeError
        return append(job, own)

    monkeypatch.setattr(idle, "_append", fail_for_one)
    idle._queue.extend(jobs)
    idle._admit()
    while any(idle._busy):
        idle._advance()
    assert isinstance(events[1][-1], UnicodeError)
    assert (answer_of(events[0]), answer_of(events[2])) == (expected[0], expected[4])


def test_many_long_answers_are_scored_in_pieces_while_others_go_on(
    served: Served, idle: Engine, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tuple(f"It is {n}." for n in range(40))
    asked = replace(questions(served)[0], answers=answers)
    whole, parts, other = list[Any](), list[Any](), list[Any]()

    def score(events: list[Any]) -> dict[str, float]:
        idle._queue.append(job_of(idle, asked, events))
        idle._admit()
        while any(idle._busy):
            idle._advance()
        return dict(events[-1].likelihoods)

    at_once = score(whole)
    monkeypatch.setattr(module, "_SCORED", 7)
    idle._queue.append(job_of(idle, questions(served)[1], other))
    idle._admit()
    before = len(other)
    pieces = score(parts)
    assert answer_of(other) == expected[1]
    assert len(other) > before
    assert pieces == pytest.approx(at_once, rel=1e-3)
    assert math.fsum(pieces.values()) == pytest.approx(1)


def test_answers_to_compare_are_bounded(served: Served, idle: Engine) -> None:
    asked = questions(served)[0]
    with pytest.raises(ConfigError, match=r"an answer has \d+ tokens; this server's answers have at most 8"):
        idle._encode(replace(asked, answers=("one", "word " * 20)))
    many = [(1, *map(int, f"{n * 7919 % 10**8:08}")) for n in range(1000)]
    chunks = list(_chunks(many))
    assert [answer for chunk in chunks for answer in chunk] == many
    shapes = [module.tree_shape([chunk]) for chunk in chunks]
    assert max(nodes for nodes, _ in shapes) <= 512
    assert max(count for _, count in shapes) <= 256
    assert len({module._round_tree(*shape) for shape in shapes}) <= 3
    idle.max_new_tokens = 64
    words = [" ".join(str(n) for n in np.random.default_rng(row).integers(0, 1000, 16)) for row in range(900)]
    with pytest.raises(ConfigError, match="tokens of answers to compare; expected at most 8192"):
        idle._encode(replace(asked, answers=tuple(words)))


def test_explanations_of_two_lengths_compile_once_and_are_those_of_explain(served: Served, model: Llava) -> None:
    texts = ("Which sex?", "Which sex does this scan show?")
    asked = [Question(conversation(served, text, "1.nii.gz", "T1"), 4) for text in texts]
    lengths = [len(served.engine._encode(own)[0]) for own in asked]
    assert lengths[0] + 8 < lengths[1]  # `umbrella_jax.explain` pads them to two lengths
    assert len({_round_length(length + 3) for length in lengths}) == 1

    async def explain(question: Question) -> Explanation:
        async for event in served.engine.explain(question, "left.", "gradient"):
            if isinstance(event, Explanation):
                return event
        raise AssertionError

    compiled = value_and_slope._cache_size()
    ours = [asyncio.run(explain(own)) for own in asked]
    assert value_and_slope._cache_size() <= compiled + 1
    theirs = umbrella_jax.explain(
        model, served.engine.processor, asked[0].conversation, answer="left.", method="gradient"
    )
    same = pytest.approx((theirs.log_probability, theirs.without), rel=1e-5)
    assert (ours[0].log_probability, ours[0].without) == same
    for image, values in theirs.maps.items():
        np.testing.assert_allclose(ours[0].maps[image], values, rtol=1e-3, atol=1e-4 * np.abs(values).max())
