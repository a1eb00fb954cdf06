"""Ids and loss mask, written out by hand: which tokens there are, which of them are learnt."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from umbrella_jax.data.conversation import Conversation, Image, Message
from umbrella_jax.data.tokenize import encode, encode_all, encode_prompt, load_tokenizer, reference_answer
from umbrella_jax.errors import DataError

T1, FMRI = Image(Path("/a.nii"), "T1"), Image(Path("/b.nii"), "rsfMRI")  # 6 and 4 patches
LIMIT = 1000


def talk(*turns):
    """("user", part, ...), ... as a conversation."""
    return Conversation("S01", None, tuple(Message(role, tuple(parts)) for role, *parts in turns), {}, "a.json[0]")


@pytest.fixture
def ids(tokenizer):
    """`ids("text", 7, ...)`: texts tokenized, special tokens by name, all joined."""
    special = {"<s>": "<|im_start|>", "</s>": "<|im_end|>", "I": "<image>"}

    def join(*pieces):
        out = []
        for piece in pieces:
            if piece in special:
                out.append(tokenizer.convert_tokens_to_ids(special[piece]))
            else:
                out += tokenizer.encode(piece, add_special_tokens=False)
        return out

    return join


# Each case: conversation, its pieces, and of them those that are supervised.
CASES = {
    "two turns": (
        talk(("user", "Sex?", T1), ("assistant", "male."), ("user", "Age?"), ("assistant", "old")),
        ["<s>", "user\n", "Sex?", *"IIIIII", "</s>", "\n", "<s>", "assistant\n", "male.", "</s>", "\n",
         "<s>", "user\n", "Age?", "</s>", "\n", "<s>", "assistant\n", "old", "</s>", "\n"],
        [13, 14, 23, 24],
    ),
    "two images in one turn": (
        talk(("user", T1, "and", FMRI, "?"), ("assistant", "male")),
        ["<s>", "user\n", *"IIIIII", "and", *"IIII", "?", "</s>", "\n", "<s>", "assistant\n", "male", "</s>", "\n"],
        [18, 19],
    ),
    "text only, parts joined": (
        talk(("system", "Be", " brief."), ("user", "male?"), ("assistant", "fem", "ale")),
        ["<s>", "system\n", "Be brief.", "</s>", "\n", "<s>", "user\n", "male?", "</s>", "\n",
         "<s>", "assistant\n", "female", "</s>", "\n"],
        [12, 13],
    ),
    "empty last answer": (
        talk(("user", "a"), ("assistant", "b"), ("user", FMRI), ("assistant", "")),
        ["<s>", "user\n", "a", "</s>", "\n", "<s>", "assistant\n", "b", "</s>", "\n",
         "<s>", "user\n", *"IIII", "</s>", "\n", "<s>", "assistant\n", "</s>", "\n"],
        [7, 8],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ids_and_mask(name, tokenizer, modalities, ids):
    conversation, pieces, supervised = CASES[name]
    found = encode(conversation, tokenizer, modalities, LIMIT)
    assert found.input_ids.tolist() == ids(*pieces)
    expected = [i in supervised for i, piece in enumerate(pieces) for _ in ids(piece)]
    assert found.supervised.tolist() == expected
    assert found.images == conversation.images
    assert (found.input_ids.dtype, found.supervised.dtype, found.image_starts.dtype) == (np.int32, bool, np.int32)


def test_image_starts(tokenizer, modalities, ids):
    found = encode(CASES["two images in one turn"][0], tokenizer, modalities, LIMIT)
    first = len(ids("<s>", "user\n"))
    assert found.image_starts.tolist() == [first, first + 6 + len(ids("and"))]


def test_an_image_at_position_zero_of_the_content(tokenizer, modalities, ids):
    found = encode(talk(("user", FMRI, "x"), ("assistant", "y")), tokenizer, modalities, LIMIT)
    start = found.image_starts[0]
    assert found.input_ids[: start + 5].tolist() == ids("<s>", "user\n", *"IIII", "x")


def test_supervised_text_is_the_answers(tokenizer, modalities):
    conversation = talk(("user", "a", T1), ("assistant", " Männlich.\n"), ("user", "b"), ("assistant", "脑 female"))
    found = encode(conversation, tokenizer, modalities, LIMIT)
    assert tokenizer.decode(found.input_ids[found.supervised]) == " Männlich.\n<|im_end|>脑 female<|im_end|>"


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_is_the_conversation_up_to_its_last_answer(name, tokenizer, modalities, ids):
    conversation, pieces, _ = CASES[name]
    header = len(pieces) - 1 - pieces[::-1].index("assistant\n")
    prompt = encode_prompt(conversation, tokenizer, modalities, LIMIT)
    assert prompt.input_ids.tolist() == ids(*pieces[: header + 1])
    assert not prompt.supervised.any()
    assert prompt.images == conversation.images


@pytest.mark.parametrize("answer", ["", " \n"])
def test_nothing_to_learn_is_refused(tokenizer, modalities, answer):
    conversation = talk(("user", "a"), ("assistant", answer))
    with pytest.raises(DataError, match=r"a.json\[0\] \(S01\): no assistant turn has text"):
        encode(conversation, tokenizer, modalities, LIMIT)
    assert not encode(conversation, tokenizer, modalities, LIMIT, needs_answer=False).supervised.any()


def test_too_long_is_refused_not_cut(tokenizer, modalities):
    conversation = CASES["two turns"][0]
    length = len(encode(conversation, tokenizer, modalities, LIMIT))
    assert len(encode(conversation, tokenizer, modalities, length)) == length
    match = rf"a.json\[0\] \(S01\): {length} positions, 6 of them patches; expected at most {length - 1}"
    with pytest.raises(DataError, match=match):
        encode(conversation, tokenizer, modalities, length - 1)
    with pytest.raises(DataError, match="expected at most 5"):
        encode_prompt(conversation, tokenizer, modalities, 5)


def test_a_prompt_needs_an_answer_to_drop(tokenizer, modalities):
    conversation = talk(("user", "a"), ("assistant", "b"), ("user", "c"))
    with pytest.raises(DataError, match="the last turn is not the assistant's"):
        encode_prompt(conversation, tokenizer, modalities, LIMIT)
    with pytest.raises(DataError, match="the last turn is not the assistant's"):
        reference_answer(conversation)


def test_reference_answer():
    assert reference_answer(talk(("user", "a"), ("assistant", " male", ".\n"))) == "male."
    assert reference_answer(talk(("user", "a"), ("assistant", ""))) == ""


def test_encode_all_lists_every_fault(tokenizer, modalities):
    good, long, mute = talk(("assistant", "b")), talk(("assistant", "b" * 99)), talk(("user", "a"))
    encoder = partial(encode, tokenizer=tokenizer, modalities=modalities, max_length=40)
    assert len(encode_all([good, good], encoder)) == 2
    with pytest.raises(DataError) as caught:
        encode_all([long, good, mute], encoder)
    assert ["expected at most 40" in caught.value.faults[0], "no assistant turn" in caught.value.faults[1]] == [
        True
    ] * 2
    assert len(caught.value.faults) == 2


# The tokenizer


def test_a_complete_tokenizer_is_left_as_it_is(tokenizer_directory):
    tokenizer, added = load_tokenizer(tokenizer_directory, None)
    assert added == []
    number = tokenizer.convert_tokens_to_ids("<image>")
    assert load_tokenizer(tokenizer_directory, number)[1] == []


def test_missing_special_tokens_are_added(tmp_path, tiny_tokenizer):
    directory = tiny_tokenizer(tmp_path, special_tokens=("<|endoftext|>", "<|im_end|>"))
    tokenizer, added = load_tokenizer(directory, 151646)  # a missing <image> gets an id of its own
    assert added == ["<|im_start|>", "<image>"]
    for token in ("<|im_start|>", "<|im_end|>", "<image>"):
        assert tokenizer.encode(f"a{token}b", add_special_tokens=False)[1] == tokenizer.convert_tokens_to_ids(token)
    assert tokenizer.decode(tokenizer.encode("a<image>b<|im_end|>"), skip_special_tokens=True) == "ab"


def test_another_image_id_than_the_models_is_refused(tokenizer_directory):
    number = load_tokenizer(tokenizer_directory, None)[0].convert_tokens_to_ids("<image>")
    with pytest.raises(DataError, match=rf"<image> is token {number} .* image_token_id is 7 in config.json; use the"):
        load_tokenizer(tokenizer_directory, 7)


def test_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        load_tokenizer(tmp_path, None)
    with pytest.raises(DataError, match="not found"):
        load_tokenizer(tmp_path / "none", None)
