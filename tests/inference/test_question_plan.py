"""Plans of answers: shared beginnings are read once, each volume is encoded once, and no prompt is lost."""

from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.tokenize import Encoded
from umbrella_jax.inference import question_plan as module
from umbrella_jax.inference.question_plan import FeaturePlan, QuestionPlan

MODALITIES = {
    "T1": ModalityConfig(size=(8, 8, 8), patch=(4, 4, 4)),
    "rsfMRI": ModalityConfig(size=(4, 4, 4, 4), patch=(2, 4, 4, 4)),
}
PATCHES = {"T1": 8, "rsfMRI": 2}


def prompt(question: list[int], *images: Image) -> Encoded:
    """Return a prompt that shows images after its first token, then asks."""
    ids, starts = [5], []
    for image in images:
        starts.append(len(ids))
        ids += [1] * PATCHES[image.modality]
    ids += question
    return Encoded(np.array(ids, np.int32), np.zeros(len(ids), bool), images, np.array(starts, np.int32))


def scan(number: int, modality: str = "T1") -> Image:
    return Image(Path(f"{modality}-{number}"), modality)


def prompts(rng: np.random.Generator) -> list[Encoded]:
    """Return shuffled prompts: 0 to 5 about each of 30 scans, two about each of 15 pairs, and 3 without a scan."""

    def question() -> list[int]:
        return [7, *rng.integers(10, 99, rng.integers(1, 30)).tolist()]

    made = [prompt(question(), scan(i)) for i in range(30) for _ in range(i % 6)]
    made += [prompt(question(), scan(i), scan(i + 15), scan(i % 2, "rsfMRI")) for i in range(15) for _ in range(2)]
    made += [prompt(question()) for _ in range(3)]
    return [made[i] for i in rng.permutation(len(made))]


def plan_of(given: list[Encoded], parts: int = 1, batch_size: int = 4) -> QuestionPlan:
    return QuestionPlan.of(given, MODALITIES, batch_size=batch_size, max_new_tokens=4, parts=parts)


@pytest.mark.parametrize("parts", [1, 2])
def test_asks_each_prompt_once_after_its_own_context(parts: int) -> None:
    given = prompts(np.random.default_rng(0))
    plan = plan_of(given, parts)
    asked = list[int]()
    for batch in plan.batches:
        assert len(batch.contexts) <= 4
        for context in batch.contexts:
            asked += context.questions
            assert context.length <= batch.positions
            for number in context.questions:
                own, first = given[number], given[context.prompt]
                assert own.images == first.images
                assert (own.input_ids[: context.length] == first.input_ids[: context.length]).all()
                assert 0 < len(own) - context.length <= batch.question_positions
    assert sorted(asked) == list(range(len(given)))
    read = sum(context.length for batch in plan.batches for context in batch.contexts)
    assert read < 0.6 * sum(map(len, given))


def test_reads_prompts_whole_if_they_share_nothing() -> None:
    given = [prompt([7, 8, 9], scan(i)) for i in range(6)]
    plan = plan_of(given)
    assert [batch.question_positions for batch in plan.batches] == [0, 0]
    assert {context.length for batch in plan.batches for context in batch.contexts} == {len(given[0])}


def test_no_image_is_cut_if_a_prompt_ends_with_one() -> None:
    plan = plan_of([prompt([7, 8, 9], scan(0))] * 4 + [prompt([], scan(1))] * 2)
    assert {batch.question_positions for batch in plan.batches} == {0}


def test_some_prompts_fill_batches_of_the_same_shapes() -> None:
    given = [prompt([7, i, 9], scan(i % 10)) for i in range(40)]
    plan = plan_of(given)
    numbers = list(range(0, 40, 3))
    some = plan.only(numbers)
    assert sorted(i for batch in some.batches for c in batch.contexts for i in c.questions) == numbers
    assert set(some.shapes()) <= set(plan.shapes())
    assert [len(batch.contexts) for batch in some.batches] == [4, 4, 2]


def test_one_scan_with_many_questions_fills_the_rows() -> None:
    plan = plan_of([prompt([7, i, 9], scan(0)) for i in range(40)])
    (batch,) = plan.batches
    assert [len(context.questions) for context in batch.contexts] == [10, 10, 10, 10]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("most_bytes", [2**28, 1])
def test_features_are_in_their_slots_when_a_batch_needs_them(parts: int, most_bytes: int) -> None:
    given = prompts(np.random.default_rng(1))
    whole = plan_of(given, parts)
    for plan in (whole, whole.only(range(0, len(given), 2))):
        with mock.patch.object(module, "_MOST_BYTES", most_bytes):
            features = FeaturePlan.of(plan, whole, bytes_per_patch=4)
        held: dict[tuple[str, int, int], Image] = {}
        encoded = Counter[tuple[int, Image]]()
        for number in range(len(plan.batches)):
            for load in features.loads[number]:
                for part, slots in enumerate(load.slots):
                    assert len(slots) <= features.rows[load.modality] // parts
                    for image, slot in slots.items():
                        assert 0 <= slot < features.slots[load.modality] // parts
                        held[load.modality, part, slot] = image
                        encoded[part, image] += 1
            for name in ("T1", "rsfMRI"):
                for part, images in enumerate(plan.images(name)[number]):
                    for image in images:
                        assert held[name, part, features.places[number][part][image]] == image
        if most_bytes > 1:
            assert set(encoded.values()) == {1}, "each volume once, by each part that shows it"
        elif parts == 1 and plan is whole:
            assert max(encoded.values()) > 1, "with few slots some are encoded again"
