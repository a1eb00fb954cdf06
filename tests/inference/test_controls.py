"""Controls: which scan or question replaces which, and what is refused. No model answers here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import small_run
from tests.helpers.small_run import modalities
from umbrella_jax.data.conversation import Conversation, Image, Message
from umbrella_jax.errors import DataError
from umbrella_jax.inference.controls import (
    Changed,
    change_conversations,
    control_dataset,
    inapplicable_lines,
    left_out_lines,
    make_controls,
)
from umbrella_jax.inference.processor import Processor

SUBJECTS = ("a", "b", "c", "d")


def scan(subject: str, modality: str = "T1", number: int = 1) -> Image:
    return Image(Path(f"/scans/sub-{subject}/{modality}-{number}.nii"), modality)


def ask(*images: Image, before: str = "", references: Sequence[Image] = (), **metadata: Any) -> Conversation:
    """Return a question about images, with a text `before` them, after one turn with each reference."""
    messages = [m for image in references for m in (Message("user", (image, "See.")), Message("assistant", ("Yes.",)))]
    messages += [Message("user", (before, *images, "\nWhich sex?")), Message("assistant", ("male",))]
    subjects = frozenset(image.path.parts[2].removeprefix("sub-") for image in (*images, *references))
    return Conversation("id", "sex", tuple(messages), metadata, "file", subjects)


def change(conversations: Sequence[Conversation], *controls: Any, **options: Any) -> dict[str, list[Changed]]:
    paraphrases = options.pop("paraphrases", {})
    return change_conversations(conversations, ["T1", "rsfMRI"], controls, paraphrases, **options)


def shown(made: Changed) -> list[list[str]]:
    return [[str(image.path) for image in made.conversations[number].images] for number in made.asked]


def test_blank_volumes_are_one_per_modality() -> None:
    (made,) = change([ask(scan("a"), scan("a", "rsfMRI")), ask(scan("b"))], "blank")["blank"]
    assert len({image for conversation in made.conversations for image in conversation.images}) == 2
    assert [[i.modality for i in c.images] for c in made.conversations] == [["T1", "rsfMRI"], ["T1"]]


def test_shuffled_scans_are_another_subjects() -> None:
    asked = [ask(scan(s, number=n)) for s in SUBJECTS for n in (1, 2)]
    made = change(asked, "shuffled")
    assert list(made) == ["shuffled"]
    paths = [path for (path,) in shown(made["shuffled"][0])]
    assert sorted(paths) == sorted(str(c.images[0].path) for c in asked)  # each once
    for before, after in zip(asked, paths, strict=True):
        assert before.images[0].path.parent != Path(after).parent
        assert before.images[0].path.name == Path(after).name
    reordered = change(asked[::-1], "shuffled")["shuffled"][0]
    assert [path for (path,) in shown(reordered)] == paths[::-1]
    assert any(shown(change(asked, "shuffled", seed=seed)["shuffled"][0]) != [[p] for p in paths] for seed in (1, 2, 3))


@pytest.mark.parametrize("metadata", [{}, {"subject_id": "sub-b", "reference_id": "a"}])
def test_query_and_reference_are_shuffled_apart(metadata: dict[str, str]) -> None:
    pair = ask(scan("b"), references=[scan("a")], **metadata)
    made = change([pair, *(ask(scan(s)) for s in SUBJECTS)], "shuffled")
    (reference, query), *_ = shown(made["shuffled"][0])
    assert reference == str(scan("a").path)
    assert query in {str(scan(s).path) for s in "cd"}
    ((reference, query),) = shown(made["shuffled-reference"][0])
    assert reference in {str(scan(s).path) for s in "cd"}
    assert query == str(scan("b").path)
    assert made["shuffled-reference"][0].rows[1]["left_out"] == "it shows no reference scan"


def test_another_modality_is_the_same_subjects() -> None:
    asked = [ask(scan("a")), ask(scan("a", "rsfMRI")), ask(scan("b"))]
    (made,) = change(asked, "other-modality")["other-modality"]
    assert shown(made) == [[str(scan("a", "rsfMRI").path)], [str(scan("a").path)]]
    assert made.rows[2]["left_out"] == "its subject has no scan of another modality in the data"
    assert made.conversations[2] == asked[2]


def test_another_modality_is_not_one_that_is_shown_anyway() -> None:
    asked = [ask(scan("a"), scan("a", "rsfMRI")), ask(scan("a"))]
    (made,) = change(asked, "other-modality")["other-modality"]
    assert made.asked == [1]
    assert made.rows[0]["left_out"] == "its subject has no scan of another modality that it does not show in the data"


def test_controls_of_questions_without_scans_are_left_out_with_a_line() -> None:
    assert inapplicable_lines(["blank", "paraphrase"], [ask(scan("a")), ask()]) == []
    assert inapplicable_lines(["blank", "noise", "paraphrase"], [ask()]) == [
        "blank, noise: left out: no conversation of the data shows a scan"
    ]


def test_a_question_is_put_in_other_words() -> None:
    asked = [ask(scan("a")), ask(scan("b"))]
    one, other = change(asked, "paraphrase", paraphrases={"sex": ["Man or woman?", "Sex?"]})["paraphrase"]
    assert one.conversations[0].messages[0].parts == ("", scan("a"), "\nMan or woman?")
    assert [row["question"] for row in other.rows.values()] == ["Sex?", "Sex?"]


@pytest.mark.parametrize(
    ("conversations", "control", "fault"),
    [
        ([ask(scan("a")), ask(scan("a", number=2))], "shuffled", "shuffled: T1: all scans of the data are of one sub"),
        ([ask(scan("a")), ask(scan("b"))], "other-modality", "cannot be made for any conversation: its subject has no"),
        ([ask()], "blank", "blank: cannot be made for any conversation: it shows no scan"),
        ([ask(scan("a"))], "paraphrase", "evaluation.paraphrases.age: no such task here; expected some of sex"),
        ([ask(scan("a"), before="See.")], "paraphrase", "the text of its last question is in 2 pieces"),
    ],
)
def test_refuses_controls_that_cannot_be_made(conversations: list[Conversation], control: str, fault: str) -> None:
    tasks = {"age": ["How old?"]} if "age" in fault else {"sex": ["Sex?"]}
    with pytest.raises(DataError, match=fault):
        change(conversations, control, paraphrases=tasks)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Processor, small_run.World]:
    world = small_run.make_world(tmp_path_factory.mktemp("world"))
    return Processor.load(world.base, modalities=modalities()), world


def test_volumes_under_controls(processor: tuple[Processor, small_run.World]) -> None:
    made, world = processor
    data = made.dataset(world.train, image_root=world.root / "scans", evaluation=True)
    controls = make_controls(data, made, ["blank", "noise", "shuffled"], {})
    (blank,), (noise,) = controls["blank"], controls["noise"]
    assert len(blank.dataset.windows) == 2
    for image in blank.dataset.windows:
        volume = blank.dataset.volume(image)
        of_modality = [i for i in data.windows if i.modality == image.modality]
        assert volume.shape == modalities()[image.modality].size
        assert {*volume.ravel()} == {np.float32(np.median([data.volume(i).min() for i in of_modality]))}
    orders = []
    for image in noise.dataset.windows:
        before, volume = data.volume(image), noise.dataset.volume(image)
        assert (np.sort(volume, axis=None) == np.sort(before, axis=None)).all()
        assert (volume == noise.dataset.volume(image)).all()
        orders.append(tuple(np.argsort(volume, axis=None)))
    assert len({*orders}) == len(orders)
    assert left_out_lines({"blank": controls["blank"]}) == ["blank: 1 conversation left out: it shows no scan"]


def test_an_image_takes_the_patches_of_the_modality_that_is_shown(
    processor: tuple[Processor, small_run.World],
) -> None:
    made, world = processor
    data = made.dataset(world.train, image_root=world.root / "scans", evaluation=True)
    first = next(i for i, c in enumerate(data.conversations) if c.task_id == "one-0")
    image = next(i for i in data.windows if i.modality == "rsfMRI")
    conversation = data.conversations[first]
    message = Message("user", (image, *conversation.messages[0].parts[1:]))
    changed = list(data.conversations)
    changed[first] = Conversation("one-0", None, (message, *conversation.messages[1:]), {}, "file")
    prompt = control_dataset("other-modality", Changed(changed, {}), data, made).dataset.prompts[first]
    assert len(prompt) - len(data.prompts[first]) == 4 - 6  # patches
