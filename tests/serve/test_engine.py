"""The engine of `serve`: answers equal `generate`'s however many are asked together, and clients may leave."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.small_run import MODALITIES, VOLUME_SHAPES, write_volume
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import load_opened
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.loader import whole_batch
from umbrella_jax.demo import make_base
from umbrella_jax.inference.generate import Sampling, generate
from umbrella_jax.inference.processor import Processor
from umbrella_jax.serve.engine import CompleteAnswer, Engine, Question, Text

LONGEST = 6


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    modalities = {
        name: ModalityConfig(**{**own, "size": tuple(own["size"]), "patch": tuple(own["patch"])})
        for name, own in MODALITIES.items()
    }
    checkpoint = Checkpoint.open(make_base(folder / "base"), modalities).answering()
    for number in range(3):
        write_volume(folder / f"{number}.nii.gz", VOLUME_SHAPES["T1"], seed=number)
        write_volume(folder / f"run-{number}.nii.gz", VOLUME_SHAPES["rsfMRI"], seed=number)
    own = Engine(load_opened(checkpoint), Processor.from_checkpoint(checkpoint), lanes=3, max_new_tokens=LONGEST)
    own.folder = folder  # type: ignore[attr-defined]
    own.start([question(own, "Which sex?", T1=0), question(own, "Awake?", rsfMRI=0)])
    yield own
    own.close()


def question(engine: Engine, text: str, **shown: int) -> Question:
    """Return a question about the scans {modality: number of the file}."""
    prefix = {"T1": "", "rsfMRI": "run-"}
    folder: Path = engine.folder  # type: ignore[attr-defined]
    images = [(name, folder / f"{prefix[name]}{number}.nii.gz") for name, number in shown.items()]
    return Question(engine.processor.question(text, images), max_new_tokens=LONGEST)


async def answer(engine: Engine, asked: Question) -> CompleteAnswer:
    """Return the whole answer, which the pieces must make up."""
    text = ""
    async for event in engine.ask(asked):
        if isinstance(event, Text):
            text += event.delta
        else:
            assert event.text == text
            return event
    raise AssertionError("no answer")


def test_answers_equal_those_of_generate_and_of_one_at_a_time(engine: Engine) -> None:
    asked = [question(engine, f"Is this number {n}?", **{name: n % 3}) for n in range(6) for name in ("T1", "rsfMRI")]
    asked += [replace(own, sampling=Sampling(temperature=1.5, top_p=0.9, top_k=40), seed=7) for own in asked[:4]]
    asked[1] = replace(asked[1], max_new_tokens=2)

    async def together() -> list[CompleteAnswer]:
        return await asyncio.gather(*(answer(engine, own) for own in asked))

    async def in_turn() -> list[CompleteAnswer]:
        return [await answer(engine, own) for own in asked]

    answers = asyncio.run(together())
    assert answers == asyncio.run(in_turn())
    assert engine.waiting == engine.answering == 0
    for own, given in zip(asked, answers, strict=True):
        batch = whole_batch(engine.processor.asked(own.conversation), prompts=True)
        options: dict[str, Any] = {"stop_ids": engine.processor.stop_ids, "max_new_tokens": own.max_new_tokens}
        tokens = generate(engine._model, batch, sampling=own.sampling, seeds=[own.seed], **options)
        assert [given.text] == engine.processor.decode(tokens)
        assert given.completion_tokens == int((np.asarray(tokens) >= 0).sum())
        assert given.prompt_tokens == int(batch.lengths[0])
    assert len({given.text for given in answers}) > 3
