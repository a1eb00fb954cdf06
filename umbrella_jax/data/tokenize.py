"""Conversations to token ids and loss mask, both made in the same breath: ChatML, piece by piece."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_jax.config import ModalityConfig
from umbrella_jax.data.conversation import IMAGE_MARKER, TURN_END, TURN_START, Conversation, Image, Message
from umbrella_jax.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """A conversation of T positions as the model reads it."""

    input_ids: np.ndarray
    """int32 [T]; an image is as many placeholders as it has patches."""
    supervised: np.ndarray
    """bool [T]; whether the token at this position is to be predicted."""
    images: tuple[Image, ...]
    """Images in the order of their placeholders."""
    image_starts: np.ndarray
    """int32 [len(images)]; position of the first placeholder of each."""

    def __len__(self) -> int:
        return len(self.input_ids)


def load_tokenizer(directory: str | Path, image_token_id: int | None) -> tuple[Any, list[str]]:
    """The tokenizer of a local Hugging Face directory, with `<|im_start|>`, `<|im_end|>` and `<image>`.

    Those that it lacks are added as special tokens, at the end of the vocabulary; the caller then takes the id of an
    added `<image>` for the model's and makes sure that the embeddings have a row for each.

    Args:
        directory: holds tokenizer.json and its companions; nothing is downloaded.
        image_token_id: the model's, from its config.json; None where it has none yet.

    Returns:
        The tokenizer and the tokens that were added.

    Raises:
        DataError: no tokenizer there, or its `<image>` has another id than the model's.
    """
    from transformers import AutoTokenizer  # here: reading conversations and volumes needs no transformers

    if not Path(directory).is_dir():
        raise DataError(f"{directory}: not found; expected a directory with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # a missing or damaged file makes transformers raise nearly anything
        raise DataError(f"{directory}: holds no tokenizer that can be read: {type(error).__name__}: {error}") from None
    vocabulary = tokenizer.get_vocab()
    added = [token for token in (TURN_START, TURN_END, IMAGE_MARKER) if token not in vocabulary]
    if IMAGE_MARKER not in added and image_token_id not in (None, vocabulary[IMAGE_MARKER]):
        raise DataError(
            f"{directory}: {IMAGE_MARKER} is token {vocabulary[IMAGE_MARKER]} of the tokenizer, but image_token_id is "
            f"{image_token_id} in config.json; use the tokenizer that belongs to the model, or mend config.json"
        )
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer, added


def encode(
    conversation: Conversation,
    tokenizer: Any,
    modalities: Mapping[str, ModalityConfig],
    max_length: int,
    *,
    needs_answer: bool = True,
) -> Encoded:
    """A whole conversation.

    Supervised is every answer that is not blank, with its `<|im_end|>`; not its header, nor the newline behind it.

    Args:
        max_length: positions, patches included.
        needs_answer: refuse a conversation in which nothing is supervised.

    Raises:
        DataError: longer than `max_length` (never cut), or nothing supervised.
    """
    writer = _Writer(tokenizer, modalities)
    for message in conversation.messages:
        writer.turn(message)
    faults = _too_long(conversation, writer, max_length)
    if needs_answer and not any(writer.supervised):
        faults.append(f"{conversation.label}: no assistant turn has text; expected at least one answer to learn from")
    if faults:
        raise DataError(faults)
    return writer.encoded()


def encode_prompt(
    conversation: Conversation, tokenizer: Any, modalities: Mapping[str, ModalityConfig], max_length: int
) -> Encoded:
    """What an answer is generated from: the last assistant turn is dropped but for its header. Nothing is supervised.

    Raises:
        DataError: the last turn is not the assistant's, or the prompt is longer than `max_length`.
    """
    faults = [] if _ends_with_answer(conversation) else [_no_answer(conversation)]
    writer = _Writer(tokenizer, modalities)
    for message in conversation.messages[:-1]:
        writer.turn(message)
    writer.header("assistant")
    faults += _too_long(conversation, writer, max_length)
    if faults:
        raise DataError(faults)
    writer.supervised = [False] * len(writer.ids)
    return writer.encoded()


def encode_all(conversations: Iterable[Conversation], encoder: Callable[[Conversation], Encoded]) -> list[Encoded]:
    """`encoder` of each. Raises DataError with the faults of all."""
    encoded: list[Encoded] = []
    faults: list[str] = []
    for conversation in conversations:
        try:
            encoded.append(encoder(conversation))
        except DataError as error:
            faults.extend(error.faults)
    if faults:
        raise DataError(faults)
    return encoded


def reference_answer(conversation: Conversation) -> str:
    """Text of the last assistant turn, stripped; "" where the file keeps the truth in `metadata` only.

    Raises:
        DataError: the last turn is not the assistant's.
    """
    if not _ends_with_answer(conversation):
        raise DataError(_no_answer(conversation))
    return conversation.messages[-1].text.strip()


def _ends_with_answer(conversation: Conversation) -> bool:
    return bool(conversation.messages) and conversation.messages[-1].role == "assistant"


def _no_answer(conversation: Conversation) -> str:
    return f'{conversation.label}: the last turn is not the assistant\'s; expected one to evaluate, its text may be ""'


def _too_long(conversation: Conversation, writer: "_Writer", max_length: int) -> list[str]:
    if len(writer.ids) <= max_length:
        return []
    patches = sum(writer.modalities[image.modality].num_patches for image in writer.images)
    return [
        f"{conversation.label}: {len(writer.ids)} positions, {patches} of them patches; expected at most {max_length}: "
        "raise max_length or the patch size, or shorten the conversation"
    ]


class _Writer:
    """Writes turns one behind the other; ids and mask grow together, so they cannot disagree."""

    def __init__(self, tokenizer: Any, modalities: Mapping[str, ModalityConfig]):
        self.tokenizer, self.modalities = tokenizer, modalities
        tokens: Sequence[int] = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END, IMAGE_MARKER])
        self.turn_start, self.turn_end, self.placeholder = tokens
        self.ids: list[int] = []
        self.supervised: list[bool] = []
        self.images: list[Image] = []
        self.image_starts: list[int] = []

    def add(self, ids: Sequence[int], supervised: bool = False) -> None:
        self.ids.extend(ids)
        self.supervised.extend([supervised] * len(ids))

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def header(self, role: str) -> None:
        self.add([self.turn_start, *self.tokens(f"{role}\n")])

    def turn(self, message: Message) -> None:
        answer = message.role == "assistant" and bool(message.text.strip())  # a blank one would teach silence
        self.header(message.role)
        for is_text, parts in groupby(message.parts, key=lambda part: isinstance(part, str)):
            if is_text:
                self.add(self.tokens("".join(str(part) for part in parts)), supervised=answer)
            else:
                for image in parts:
                    assert isinstance(image, Image)
                    self.image_starts.append(len(self.ids))
                    self.images.append(image)
                    self.add([self.placeholder] * self.modalities[image.modality].num_patches)
        self.add([self.turn_end], supervised=answer)
        self.add(self.tokens("\n"))

    def encoded(self) -> Encoded:
        return Encoded(
            input_ids=np.array(self.ids, np.int32),
            supervised=np.array(self.supervised, bool),
            images=tuple(self.images),
            image_starts=np.array(self.image_starts, np.int32),
        )
