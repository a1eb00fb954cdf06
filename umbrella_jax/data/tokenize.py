"""Encode conversations as token ids and a loss mask, in one of three templates.

`umbrella`: ChatML, encoded piece by piece, with each image where the content shows it. Every answer that is not blank
    is supervised, with its `<|im_end|>` but without its header and the newline after it.
`original`: as the PyTorch system writes it; ids and labels are equal. ChatML, with a turn's images before its text, or
    at the `<image>` markers if the file has the turn as one string. The text is tokenized as a whole, so an answer's
    leading newline may merge with the header's. Every token of assistant and system turns is supervised, from
    `<|im_start|>` to the newline after `<|im_end|>`, blank turns included, except images. Three things differ from
    the PyTorch system. Nothing is cut. Nothing is padded, while the PyTorch system pads on the left to 2048: its
    positions count from the first pad and ours from the first token, but rope sees only distances, so logits are equal
    up to rounding. The first token is never supervised, because no token precedes it; in the PyTorch system a pad does.
`chat`: the tokenizer's own template (`apply_chat_template`), with its default system prompt. Every answer that is not
    blank is supervised, from the end of its prompt to the token that ends it, inclusive. If the template marks answers
    with `{% generation %}`, the marked tokens are supervised instead.
"""

import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, overload
from unicodedata import normalize

import numpy as np

from umbrella_jax.config.schema import ModalityConfig, Template
from umbrella_jax.data.conversation import (
    IMAGE_MARKER,
    TURN_END,
    TURN_START,
    Conversation,
    Conversations,
    Image,
    Message,
)
from umbrella_jax.data.ragged import Ragged
from umbrella_jax.errors import DataError, Faults, is_out_of_memory
from umbrella_jax.io.reading import LISTING, read_json

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not needed

_TOKENIZER_FILES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
_TOO_LARGE = f"larger than {LISTING >> 20} MB, eight times the largest known tokenizer; expected a tokenizer's file"

# Token ids, with one placeholder per image, and whether each is supervised.
_Tokens = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class NumberTarget:
    """The number that a training conversation ends with, and the candidates beside it."""

    answers: Sequence[Sequence[int]]
    """Tokens of each candidate."""
    values: np.ndarray
    """float32 [A]; the candidates, in standard deviations of the task's training references."""
    truth: float
    """The number, in the same unit."""
    prompt_length: int
    """Positions before the answer."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as T positions of the model's input."""

    input_ids: np.ndarray
    """int32 [T]; an image has one placeholder per patch."""
    supervised: np.ndarray
    """bool [T]; whether the model learns to predict the token at this position."""
    images: tuple[Image, ...]
    """Images in the order of their placeholders."""
    image_starts: np.ndarray
    """int32 [len(images)]; position of the first placeholder of each image."""
    number: NumberTarget | None = None
    """Set in training with a loss over numbers, if the conversation has one."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class _Pieces:
    """The tokens of distinct pieces of conversations, one after the other: whole conversations, or their messages."""

    ids: Ragged
    """Token ids with one placeholder per image."""
    supervised: np.ndarray
    """bool [total]."""
    is_image: np.ndarray
    """bool [total]; which ids are placeholders."""


_BLOCK = 1000
"""Conversations whose tokens are made at a time."""


class EncodedConversations(Sequence[Encoded]):
    """Encoded conversations in little memory; each `Encoded` is built on access.

    Each distinct piece of text is stored once, with one placeholder per image. For a conversation whose texts occur
    elsewhere that is some 30 bytes, while an `Encoded` has 5 bytes per position.
    """

    def __init__(
        self,
        pieces: _Pieces,
        piece_rows: Ragged,
        image_rows: Ragged,
        images: Sequence[Image],
        modalities: Mapping[str, ModalityConfig],
        *,
        supervised: bool,
    ):
        """Initialise from the pieces and the images, with the indices of those of each conversation."""
        self._pieces, self._piece_rows, self._supervised = pieces, piece_rows, supervised
        self.images, self.image_rows = images, image_rows
        self._patches = np.array([modalities[image.modality].num_patches for image in images], np.int64)

    def __len__(self) -> int:
        return len(self._piece_rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # raises IndexError
        ends = self._pieces.ids.ends
        spans = [slice(ends[piece], ends[piece + 1]) for piece in self._piece_rows[index]]
        ids, supervised, is_image = (
            np.concatenate([column[span] for span in spans])
            for column in (self._pieces.ids.values, self._pieces.supervised, self._pieces.is_image)
        )
        shown = self.image_rows[index]
        images = tuple([self.images[image] for image in shown.tolist()])
        return _expand(ids, supervised & self._supervised, images, np.flatnonzero(is_image), self._patches[shown])

    def tokens(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `input_ids` and `supervised` of each conversation, several times as fast as conversations."""
        pieces = self._pieces
        all_places = Ragged(np.arange(len(pieces.supervised)), pieces.ids.ends)
        for start in range(0, len(self), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(self)))
            places = all_places.take(self._piece_rows.take(rows).values).values
            repeats = np.ones(len(places), np.int64)
            repeats[pieces.is_image[places]] = self._patches[self.image_rows.take(rows).values]
            ids = np.repeat(pieces.ids.values[places], repeats)
            supervised = np.repeat(pieces.supervised[places] & self._supervised, repeats)
            ends = [0, *np.cumsum(self.lengths[rows]).tolist()]
            for begin, end in pairwise(ends):
                yield ids[begin:end], supervised[begin:end]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]; the positions of each conversation."""
        texts = self._piece_rows.sums(self._pieces.ids.lengths)
        return texts + self.image_rows.sums(self._patches - 1)

    @property
    def targets(self) -> np.ndarray:
        """int64 [n]; the supervised positions of each conversation."""
        return self._piece_rows.sums(self._in_pieces(self._pieces.supervised)) * self._supervised

    @property
    def placeholders(self) -> np.ndarray:
        """int64 [n]; the images in the tokens of each conversation."""
        return self._piece_rows.sums(self._in_pieces(self._pieces.is_image))

    def _in_pieces(self, marked: np.ndarray) -> np.ndarray:
        """Return int64 [pieces]: how many of the tokens of each piece are `marked` (bool [total])."""
        return Ragged(np.arange(len(marked)), self._pieces.ids.ends).sums(marked)


def _expand(
    ids: np.ndarray,
    supervised: np.ndarray,
    images: tuple[Image, ...],
    places: np.ndarray,
    patches: Sequence[int] | np.ndarray,
) -> Encoded:
    """Repeat the placeholder at each of `places` (int32 [images]) as often as its image has `patches`."""
    repeats = np.ones(len(ids), np.int32)
    repeats[places] = patches
    return Encoded(
        input_ids=np.repeat(ids, repeats),
        supervised=np.repeat(supervised, repeats),
        images=images,
        image_starts=(np.cumsum(repeats, dtype=np.int32) - repeats)[places],
    )


_CACHE_SIZE = 10_000
"""Texts that each cache of a `CachingTokenizer` keeps."""


class CachingTokenizer:
    """A tokenizer that caches its recent results.

    Most conversations share questions and answers, and all share the headers of turns. The tokenizer must not change
    while this is used.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ahead: dict[str, list[int]] = {}
        self._encode = lru_cache(_CACHE_SIZE)(tokenizer.encode)
        self.convert_tokens_to_ids = lru_cache(_CACHE_SIZE)(tokenizer.convert_tokens_to_ids)
        self.all_special_tokens = tokenizer.all_special_tokens
        self._cached_template = lru_cache(_CACHE_SIZE)(self._apply_template)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_ahead(self, texts: Iterable[str]) -> None:
        """Encode texts without special tokens in one call, several times as fast as one by one.

        Their ids are kept until the next call.
        """
        distinct = list(dict.fromkeys(texts))
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids = self._tokenizer(distinct, **options)["input_ids"] if distinct else []
        self._ahead = dict(zip(distinct, ids, strict=True))

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        """Return the token ids of a text."""
        if not add_special_tokens and (ids := self._ahead.get(text)) is not None:
            return ids
        return self._encode(text, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Apply the tokenizer's chat template, through a cache."""
        return self._cached_template(json.dumps([chat, options]))

    def _apply_template(self, arguments: str) -> Any:
        chat, options = json.loads(arguments)
        return self._tokenizer.apply_chat_template(chat, **options)


def load_tokenizer(directory: str | Path, image_token_id: int | None) -> tuple[Any, list[str]]:
    """Load the tokenizer of a local Hugging Face directory, with `<|im_start|>`, `<|im_end|>` and `<image>`.

    Missing ones of these are added as special tokens at the end of the vocabulary. The caller then uses the id of an
    added `<image>` as the model's, and ensures that the embeddings have a row for each token.

    Args:
        directory: contains tokenizer.json and its companions. Nothing is downloaded, and no code in or named by the
            directory is run.
        image_token_id: from the model's config.json; None if the model has none yet.

    Returns:
        The tokenizer and the added tokens. Its `chat_template` is the processor's if the directory has one, as in
        transformers. `stop_ids` includes the ends of an answer that the directory names.

    Raises:
        DataError: there is no tokenizer, or it is too large or needs code; its `<image>` has another id than the
            model's; the chat template or an `eos_token_id` is faulty.
    """
    # imported here: reading conversations and volumes needs neither
    from transformers import AutoConfig, AutoTokenizer

    from convert.config_json import translated_config

    if not Path(directory).is_dir():
        raise DataError(f"{directory}: not found; expected a directory with a tokenizer")
    files = [file for file in sorted(Path(directory).iterdir()) if file.suffix in _TOKENIZER_FILES and file.is_file()]
    if faults := [f"{file}: {_TOO_LARGE}" for file in files if file.stat().st_size > LISTING]:
        raise DataError(faults)
    try:
        # False, since the default None asks on the terminal whether the directory's code may run
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if config := translated_config(directory):  # transformers cannot read the file itself
            options["config"] = AutoConfig.for_model(**config)
        tokenizer = AutoTokenizer.from_pretrained(str(directory), **options)
    except Exception as error:  # a missing or damaged file makes transformers raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "copy the base's tokenizer.json and tokenizer_config.json into it"
        raise DataError(f"{directory}: no readable tokenizer: {reason}; {remedy}") from None
    vocabulary = tokenizer.get_vocab()
    added = [token for token in (TURN_START, TURN_END, IMAGE_MARKER) if token not in vocabulary]
    if IMAGE_MARKER not in added and image_token_id not in (None, vocabulary[IMAGE_MARKER]):
        raise DataError(
            f"{directory}: {IMAGE_MARKER} is token {vocabulary[IMAGE_MARKER]} of the tokenizer, but image_token_id is "
            f"{image_token_id} in config.json; use the model's own tokenizer, or correct config.json"
        )
    tokenizer.add_tokens(added, special_tokens=True)
    setattr(tokenizer, _STATED_ENDS, _stated_ends(Path(directory)))
    tokenizer.chat_template = _processor_template(Path(directory)) or tokenizer.chat_template
    return tokenizer, added


_STATED_ENDS = "stated_ends"
"""Name of the attribute that stores the result of `_stated_ends` on a loaded tokenizer."""


def _stated_ends(directory: Path) -> list[int]:
    """Return the ids that end an answer according to `generation_config.json`, or to config.json if that is missing.

    The value is a number or a list. As in transformers' `generate`, the language model's value in config.json counts
    only if the whole model has none.
    """
    file = directory / "generation_config.json"
    field, stated = "eos_token_id", None
    if file.exists():
        stated = _read_object(file).get(field)
    elif (file := directory / "config.json").exists():
        config = _read_object(file)
        stated = config.get(field)
        if stated is None and isinstance(text := config.get("text_config"), dict):
            field, stated = f"text_config.{field}", text.get(field)
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise DataError(f"{file}: {field}: expected a token id or a list of them, got {stated!r}; correct the file")
    return ids


def _processor_template(directory: Path) -> str | dict[str, str] | None:
    """Return the processor's own chat template, None if it has none.

    As in transformers, `processor_config.json` comes before `chat_template.json`. (`chat_template.jinja` is read with
    the tokenizer.)
    """
    for name in ("processor_config.json", "chat_template.json"):
        if not (file := directory / name).exists():
            continue
        value = _read_object(file).get("chat_template")
        if isinstance(value, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in value):
            value = {template["name"]: template["template"] for template in value}
        texts = list(value.values()) if isinstance(value, dict) else [value]
        if value is not None and not all(isinstance(text, str) for text in texts):
            raise DataError(f"{file}: chat_template: expected a template or several by name; correct the file")
        if value:
            template: str | dict[str, str] = value
            return template
    return None


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a tokenizer. Raise DataError if the file has anything else."""
    remedy = "copy the base's file again"
    value = read_json(file, DataError, remedy)
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected an object, got {type(value).__name__}; {remedy}")
    return value


def save_tokenizer(tokenizer: Any, directory: str | Path) -> None:
    """Write a tokenizer that transformers 4 and 5 both read.

    Transformers 5 names a class that 4 does not know, and stores further special tokens under a key that has another
    meaning in 4.
    """
    tokenizer.save_pretrained(directory)
    file = Path(directory) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(further := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = further
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_template(tokenizer: Any, template: Template) -> None:
    """Raise DataError if the template is `chat` and the tokenizer has no chat template."""
    if template == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"data.template: chat, but {tokenizer.name_or_path or 'the tokenizer'} has no chat template; add "
            "chat_template.jinja beside tokenizer.json, or set data.template: umbrella"
        )


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that end an answer, sorted.

    They are `<|im_end|>`, the tokenizer's end of text, and every `eos_token_id` of the model's
    `generation_config.json`.
    """
    ids = [tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id, *getattr(tokenizer, _STATED_ENDS, ())]
    return sorted({i for i in ids if i is not None})


def decode_ids(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids without special tokens.

    Spaces are never cleaned up; transformers 4.46 to 5.6 would do so if `clean_up_tokenization_spaces` is set.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def encode(
    conversation: Conversation,
    tokenizer: Any,
    modalities: Mapping[str, ModalityConfig],
    max_length: int,
    *,
    template: Template = "umbrella",
    needs_answer: bool = True,
) -> Encoded:
    """Encode a whole conversation.

    Args:
        conversation: to encode.
        tokenizer: from `load_tokenizer`.
        modalities: configured modalities by name.
        max_length: maximum number of positions, patches included.
        template: see the module's docstring, also for what is supervised.
        needs_answer: refuse a conversation in which no assistant turn has text.

    Raises:
        DataError: the conversation is longer than `max_length` (it is never cut), has no answer or a control token in
            a text, or the tokenizer's chat template renders it so that its answers cannot be found.
    """
    faults = []
    if needs_answer and not any(map(_is_answer, conversation.messages)):
        faults.append(f"{conversation.label}: no assistant turn has text; expected at least one answer to learn from")
    return _encode(conversation, conversation.messages, False, tokenizer, modalities, max_length, template, faults)


def encode_prompt(
    conversation: Conversation,
    tokenizer: Any,
    modalities: Mapping[str, ModalityConfig],
    max_length: int,
    *,
    template: Template = "umbrella",
) -> Encoded:
    """Encode what an answer is generated from: all turns but the last, and the header of the answer.

    Nothing is supervised. Arguments are those of `encode`.

    Raises:
        DataError: the last turn is not the assistant's, or as in `encode`.
    """
    faults = [] if _ends_with_answer(conversation) else [_no_answer(conversation)]
    return _encode(conversation, conversation.messages[:-1], True, tokenizer, modalities, max_length, template, faults)


def encode_answers(
    conversation: Conversation, answers: Sequence[str], tokenizer: Any, *, template: Template = "umbrella"
) -> list[list[int]]:
    """Return the tokens of each answer after `encode_prompt`, up to the token that ends it, inclusive.

    Raises:
        DataError: an answer contains a control token, or the template does not continue the prompt with it.
    """
    write, messages = _TEMPLATES[template], conversation.messages[:-1]
    prompt, _ = write(messages, tokenizer, True)
    ends, encoded, faults = stop_ids(tokenizer), [], []
    for answer in answers:
        message = Message("assistant", (answer,))
        ids, _ = write([*messages, message], tokenizer, False)
        rest = ids[len(prompt) :]
        end = next((place for place, token in enumerate(rest) if token in ends), None)
        if _control_tokens([message], tokenizer) or ids[: len(prompt)] != prompt or not end:
            faults.append(f"{conversation.label}: the answer {answer!r} cannot follow its prompt; {_REMEDY}")
        else:
            encoded.append(rest[: end + 1])
    if faults:
        raise DataError(faults)
    return encoded


def encode_numbers(
    conversation: Conversation,
    numbers: Sequence[str],
    stems: Sequence[str],
    tokenizer: Any,
    *,
    template: Template = "umbrella",
) -> list[list[int]]:
    """Return the tokens of each number after `encode_prompt`, up to the one after the number, inclusive.

    What follows is the same for all numbers, and a model that has learnt the task writes it with probability 1. If a
    token spans the end of a number, all are encoded as by `encode_answers`.

    Args:
        numbers: answers with one number each.
        stems: each answer up to the end of its number.

    Raises:
        DataError: as `encode_answers`.
    """
    whole = encode_answers(conversation, numbers, tokenizer, template=template)
    starts = [ids[:-1] for ids in encode_answers(conversation, stems, tokenizer, template=template)]
    if any(ids[: len(start)] != start for ids, start in zip(whole, starts, strict=True)):
        return whole
    return [ids[: len(start) + 1] for ids, start in zip(whole, starts, strict=True)]


def length_faults(
    questions: Iterable[tuple[Conversation, Iterable[str]]],
    tokenizer: Any,
    limit: int,
    setting: str,
    *,
    template: Template = "umbrella",
) -> list[str]:
    """Return a fault for each distinct answer that takes more than `limit` tokens, so no model could give it.

    Args:
        questions: conversations, each with its possible answers.
        tokenizer: from `load_tokenizer`.
        limit: maximum number of tokens, without the one that ends the answer.
        setting: name of the limit in messages.
        template: see `encode`.
    """
    seen, faults = set[str](), list[str]()
    for conversation, answers in questions:
        for answer in answers:
            # a token has at least one byte, except what a chat template may put before an answer
            if answer in seen or (template != "chat" and len(answer.encode()) < limit):
                continue
            seen.add(answer)
            try:
                (ids,) = encode_answers(conversation, [answer], tokenizer, template=template)
            except DataError as error:
                faults += error.faults
                continue
            if (needed := len(ids) - 1) > limit:  # without the token that ends it
                faults.append(
                    f"{conversation.label}: the answer {answer!r} takes {needed} tokens, and {setting} is {limit}: no "
                    f"model could give it; set it to {needed} or more"
                )
    return faults


def encode_all(
    conversations: Conversations,
    tokenizer: Any,
    modalities: Mapping[str, ModalityConfig],
    max_length: int,
    *,
    template: Template = "umbrella",
    needs_answer: bool = True,
    prompts: bool = False,
) -> EncodedConversations:
    """Encode conversations, and each distinct text once.

    Args:
        conversations: as read from files, so each has a message, and no answer has an image.
        tokenizer, modalities, max_length, template, needs_answer: see `encode`.
        prompts: encode what answers are generated from, as `encode_prompt` does, in place of whole conversations.

    Raises:
        DataError: with the faults of every conversation that `encode` or `encode_prompt` refuses.
    """
    tokenizer = CachingTokenizer(tokenizer)
    messages, message_rows = conversations.messages, conversations.message_rows
    last = message_rows.ends[1:] - 1
    pieces: Iterable[Sequence[Message]]
    if template == "umbrella":  # which writes each message as if it were the only one
        pieces, piece_rows = ([message] for message in messages), message_rows
        if prompts:
            pieces = chain(pieces, [()])
            piece_rows = Ragged(message_rows.values.copy(), message_rows.ends)
            piece_rows.values[last] = len(messages)
    else:
        codes = dict[bytes, int]()
        rows = (row[:-1] if prompts else row for row in message_rows)
        numbers = np.array([codes.setdefault(row.tobytes(), len(codes)) for row in rows], np.int32)
        pieces = ([messages[i] for i in np.frombuffer(code, np.int32).tolist()] for code in codes)
        piece_rows = Ragged(numbers, np.arange(len(numbers) + 1))
    columns, is_faulty = _encode_pieces(pieces, tokenizer, template, prompts)
    encoded = EncodedConversations(
        columns, piece_rows, conversations.image_rows, conversations.images, modalities, supervised=not prompts
    )

    control = re.compile("|".join(map(re.escape, sorted(_all_control_tokens(tokenizer)))))
    is_forged = np.array([control.search(message.text) is not None for message in messages], bool)
    refused = piece_rows.sums(is_faulty) > 0
    refused |= message_rows.sums(is_forged) - prompts * is_forged[message_rows.values[last]] > 0
    refused |= encoded.placeholders != encoded.image_rows.lengths
    refused |= encoded.lengths > max_length
    if prompts:
        refused |= ~np.array([message.role == "assistant" for message in messages], bool)[message_rows.values[last]]
    elif needs_answer:
        refused |= message_rows.sums(np.array([_is_answer(message) for message in messages], bool)) == 0
    if refused.any():
        common: dict[str, Any] = {"modalities": modalities, "max_length": max_length, "template": template}
        encoder = encode_prompt if prompts else partial(encode, needs_answer=needs_answer)
        faults = Faults()
        for index in np.flatnonzero(refused).tolist():
            with faults:
                encoder(conversations[index], tokenizer, **common)
        raise DataError(faults)
    return encoded


_ENCODED_AHEAD = 10_000
"""Pieces of conversations whose texts the tokenizer gets in one call."""


def _encode_pieces(
    pieces: Iterable[Sequence[Message]], tokenizer: CachingTokenizer, template: Template, prompts: bool
) -> tuple[_Pieces, np.ndarray]:
    """Return the tokens of pieces, and bool [pieces]: which the template refuses.

    Args:
        prompts: write the header of an answer after a piece: after each one, but in `umbrella` only after an empty one.
    """
    ids, ends, supervised, is_faulty = array("i"), array("q", [0]), bytearray(), list[bool]()
    remaining = iter(pieces)
    while chunk := list(islice(remaining, _ENCODED_AHEAD)):
        headers = [prompts and not (piece and template == "umbrella") for piece in chunk]
        if template == "umbrella":
            tokenizer.encode_ahead(
                part for piece in chunk for message in piece for part in _joined(message) if isinstance(part, str)
            )
        elif template == "original":
            tokenizer.encode_ahead(map(_original_text, chunk, headers))
        for piece, header in zip(chunk, headers, strict=True):
            own: _Tokens = [], []
            with (faults := Faults()):
                own = _TEMPLATES[template](piece, tokenizer, header)
            ids.extend(own[0])
            supervised.extend(own[1])
            ends.append(len(ids))
            is_faulty.append(bool(faults))
    values = np.array(ids, np.int32)
    return _Pieces(
        ids=Ragged(values, np.array(ends, np.int64)),
        supervised=np.array(supervised, np.uint8).astype(bool),
        is_image=values == tokenizer.convert_tokens_to_ids(IMAGE_MARKER),
    ), np.array(is_faulty, bool)


def reference_answer(conversation: Conversation) -> str:
    """Return the stripped text of the last assistant turn; "" if the file has the true answer in `metadata` only.

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


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and bool(message.text.strip())  # learning a blank answer would teach silence


def _encode(
    conversation: Conversation,
    messages: Sequence[Message],
    prompt: bool,
    tokenizer: Any,
    modalities: Mapping[str, ModalityConfig],
    max_length: int,
    template: Template,
    faults: list[str],
) -> Encoded:
    """Encode `messages` and, if `prompt`, the header of an answer. Raise DataError with `faults` and new ones."""
    label = conversation.label
    if forged := _control_tokens(messages, tokenizer):
        tokens = " and ".join(forged)
        raise DataError([*faults, f"{label}: text contains {tokens}, a control token of the tokenizer; take it out"])
    try:
        ids, supervised = _TEMPLATES[template](messages, tokenizer, prompt)
    except DataError as error:
        raise DataError([*faults, *(f"{label}: {fault}" for fault in error.faults)]) from None

    images = tuple(part for message in messages for part in message.parts if isinstance(part, Image))
    input_ids = np.array(ids, np.int32)
    shown = input_ids == tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    if shown.sum() != len(images):
        raise DataError(
            [*faults, f"{label}: {shown.sum()} {IMAGE_MARKER} in the text, {len(images)} images; {_REMEDY}"]
        )
    patches = [modalities[image.modality].num_patches for image in images]
    if (length := len(ids) - len(patches) + sum(patches)) > max_length:
        faults.append(
            f"{label}: {length} positions, with {sum(patches)} patches; expected at most {max_length}: "
            "raise max_length or the patch size, or shorten the conversation"
        )
    if faults:
        raise DataError(faults)
    return _expand(input_ids, np.array(supervised, bool) & (not prompt), images, np.flatnonzero(shown), patches)


def _control_tokens(messages: Sequence[Message], tokenizer: Any) -> list[str]:
    """Return the control tokens in the texts, which would forge an image, a turn or the end of one."""
    texts = [message.text for message in messages]
    return sorted(token for token in _all_control_tokens(tokenizer) if any(token in text for text in texts))


def _all_control_tokens(tokenizer: Any) -> set[str]:
    return {TURN_START, TURN_END, IMAGE_MARKER, *tokenizer.all_special_tokens}


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _joined(message: Message) -> list[str | Image]:
    """Return the turn's parts with adjacent texts joined."""
    joined: list[str | Image] = []
    for part in message.parts:
        if joined and isinstance(part, str) and isinstance(last := joined[-1], str):
            joined[-1] = last + part
        else:
            joined.append(part)
    return joined


def _umbrella(messages: Sequence[Message], tokenizer: Any, prompt: bool) -> _Tokens:
    start, end, image = tokenizer.convert_tokens_to_ids((TURN_START, TURN_END, IMAGE_MARKER))
    pieces: list[tuple[list[int], bool]] = []  # one list for ids and mask, so that they cannot disagree
    for message in messages:
        supervised = _is_answer(message)
        pieces.append(([start, *_text_ids(tokenizer, f"{message.role}\n")], False))
        for part in _joined(message):
            pieces.append((_text_ids(tokenizer, part), supervised) if isinstance(part, str) else ([image], False))
        pieces += [([end], supervised), (_text_ids(tokenizer, "\n"), False)]
    if prompt:
        pieces.append(([start, *_text_ids(tokenizer, "assistant\n")], False))
    return [i for ids, _ in pieces for i in ids], [supervised for ids, supervised in pieces for _ in ids]


def _original_text(messages: Sequence[Message], prompt: bool) -> str:
    text = ""
    for message in messages:
        images = IMAGE_MARKER * sum(isinstance(part, Image) for part in message.parts)
        inline = "".join(part if isinstance(part, str) else IMAGE_MARKER for part in message.parts)
        text += f"{TURN_START}{message.role}\n{inline if message.inline else images + message.text}{TURN_END}\n"
    return text + (f"{TURN_START}assistant\n" if prompt else "")


def _original(messages: Sequence[Message], tokenizer: Any, prompt: bool) -> _Tokens:
    ids = _text_ids(tokenizer, _original_text(messages, prompt))
    # a turn starts at its control token, and no other token spans that
    start, image = tokenizer.convert_tokens_to_ids((TURN_START, IMAGE_MARKER))
    turn = np.cumsum(np.array(ids) == start) - 1
    supervised = [*(message.role != "user" for message in messages), False]
    return ids, [i > 0 and supervised[t] and ids[i] != image for i, t in enumerate(turn)]


_REMEDY = "correct the tokenizer's chat template, or set data.template: umbrella"


def _chat(messages: Sequence[Message], tokenizer: Any, prompt: bool) -> _Tokens:
    chat = _chat_messages(messages, tokenizer)

    def encode_first(count: int, **options: bool) -> list[int]:
        ids: list[int] = _render(tokenizer, chat[:count], tokenize=True, return_dict=True, **options)["input_ids"]
        return ids

    rest = _render(tokenizer, chat, tokenize=False, add_generation_prompt=prompt)
    for i, message in enumerate(messages):
        for text in (part.strip() for part in _joined(message) if isinstance(part, str)):
            if text not in rest:
                raise DataError(f"conversations[{i}]: the chat template leaves out or rewrites its text; {_REMEDY}")
            rest = rest[rest.index(text) + len(text) :]
    ids = encode_first(len(chat), add_generation_prompt=prompt)
    if prompt:
        return ids, [False] * len(ids)

    marked = None
    if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        marked = np.array(_render(tokenizer, chat, **options)["assistant_masks"], bool)
    supervised, outside = np.zeros(len(ids), bool), np.ones(len(ids), bool)
    ends = np.isin(ids, stop_ids(tokenizer))
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before, until = encode_first(i, add_generation_prompt=True), encode_first(i + 1)
        if ids[: len(before)] != before or ids[: len(until)] != until:
            raise DataError(
                f"conversations[{i}]: the chat template starts the answer differently after its prompt, or changes it "
                f"when the conversation continues, so training would not match generation; {_REMEDY}"
            )
        answer = slice(len(before), len(until))
        outside[answer] = False
        # up to the first token that ends it; a newline after that belongs to the next turn
        learned = np.cumsum(ends[answer]) - ends[answer] == 0 if marked is None else marked[answer]
        if not (learned & ends[answer]).any():
            within = "" if marked is None else " within {% generation %}"
            raise DataError(
                f"conversations[{i}]: the chat template ends the answer without {TURN_END} or the end of text{within}, "
                f"so the model would not learn to end it; {_REMEDY}"
            )
        text = decode_ids(tokenizer, np.array(ids)[answer][learned])
        if normalize("NFC", text.strip()) != normalize("NFC", message.text.strip()):  # Qwen's tokenizers normalise
            raise DataError(
                f"conversations[{i}]: the chat template turns the answer {message.text!r} into {text!r}; {_REMEDY}"
            )
        supervised[answer] = learned & _is_answer(message)
    if marked is not None and (marked & outside).any():
        raise DataError(f"the chat template marks more than the answers with {{% generation %}}; {_REMEDY}")
    return ids, supervised.tolist()


def _chat_messages(messages: Sequence[Message], tokenizer: Any) -> list[dict[str, Any]]:
    """Return messages as the chat template reads them.

    The content is a list of parts if the template writes a marker for an image part, else a text with markers.
    """
    try:
        probe = _render(tokenizer, [{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    except DataError:
        probe = ""
    chat: list[dict[str, Any]] = []
    for message in messages:
        parts = _joined(message) or [""]
        content: Any = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
        if IMAGE_MARKER not in probe:
            content = "".join(p if isinstance(p, str) else IMAGE_MARKER for p in parts)
        chat.append({"role": message.role, "content": content})
    return chat


def _render(tokenizer: Any, chat: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, **options)
    except Exception as error:  # a template is a program, which may raise anything
        if is_out_of_memory(error):
            raise
        raise DataError(f"the chat template cannot render it: {type(error).__name__}: {error}; {_REMEDY}") from None


_TEMPLATES: Mapping[Template, Callable[[Sequence[Message], Any, bool], _Tokens]] = {
    "umbrella": _umbrella,
    "original": _original,
    "chat": _chat,
}
