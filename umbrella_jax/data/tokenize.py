"""Conversations to token ids and loss mask, both made in the same breath, in one of three templates.

`umbrella`: ChatML, piece by piece, each image where the content shows it. Supervised is every answer that is not
    blank, with its `<|im_end|>`; not its header, nor the newline behind it.
`original`: as the PyTorch system writes it (ids and labels are equal). ChatML, a turn's images before its text, or at
    the `<image>` markers of a turn that the file has as one string. The text is tokenized as a whole, so an answer's
    leading newline may join the header's. Supervised is every token of assistant and system turns, from `<|im_start|>`
    to the newline after `<|im_end|>`, blank ones too, but for images. Not as there:
    nothing is padded, there to 2048 on the left, or cut; so positions count from the first token, not from the first
    pad, which rope, seeing distances alone, turns into the same logits up to rounding; and a first token is never
    supervised, since nothing stands before it to predict it from (there a pad did, where an assistant begins).
`chat`: the tokenizer's own (`apply_chat_template`), default system prompt and all. Supervised is what stands between
    the prompt for an answer that is not blank and the token that ends it, that included; or, where the template marks
    answers by `{% generation %}`, what it marks.
"""

import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload
from unicodedata import normalize

import numpy as np

from umbrella_jax.config.schema import ModalityConfig, Template
from umbrella_jax.data.conversation import IMAGE_MARKER, TURN_END, TURN_START, Conversation, Image, Message
from umbrella_jax.errors import DataError, Faults, is_out_of_memory
from umbrella_jax.io.reading import LISTING, read_json

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of missing PyTorch, which is not needed

_TOKENIZER = (".json", ".txt", ".model", ".tiktoken", ".jinja")
_LARGE = f"larger than {LISTING >> 20} MB, eight times the largest tokenizer known; expected the file of one"

# Ids, an image being one placeholder, and which of them are supervised.
_Text = tuple[list[int], list[bool]]


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


class Rows(Sequence[Encoded]):
    """Encoded conversations, made anew whenever one is asked for.

    Kept are an image's placeholders as one, each distinct text once, and the images of each conversation: some 30 bytes
    for each conversation whose text others have too, where an `Encoded` has 5 bytes for each position.
    """

    def __init__(self, modalities: Mapping[str, ModalityConfig]):
        self._patches = {name: config.num_patches for name, config in modalities.items()}
        self._texts: list[tuple[bytes, bytes, bytes]] = []
        """Ids (int32) and what is supervised (bool) of each distinct text, and where its images are (int32)."""
        self._number: dict[tuple[bytes, bytes, bytes], int] = {}
        self._text = array("l")  # of each conversation, by number
        self._images: list[Image] = []
        self._ends = array("l", [0])  # in `_images`, of those of each conversation

    def append(self, row: Encoded) -> None:
        """Add one behind the others."""
        kept = np.ones(len(row), bool)
        for image, start in zip(row.images, row.image_starts, strict=True):
            kept[start + 1 : start + self._patches[image.modality]] = False
        places = (np.cumsum(kept, dtype=np.int32) - 1)[row.image_starts]
        text = row.input_ids[kept].tobytes(), row.supervised[kept].tobytes(), places.tobytes()
        number = self._number.setdefault(text, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
        self._text.append(number)
        self._images += row.images
        self._ends.append(len(self._images))

    def __len__(self) -> int:
        return len(self._text)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # raises IndexError
        ids, supervised, places = self._texts[self._text[index]]
        images = tuple(self._images[self._ends[index] : self._ends[index + 1]])
        return _expanded(
            np.frombuffer(ids, np.int32),
            np.frombuffer(supervised, bool),
            images,
            np.frombuffer(places, np.int32),
            [self._patches[image.modality] for image in images],
        )


def _expanded(
    ids: np.ndarray, supervised: np.ndarray, images: tuple[Image, ...], places: np.ndarray, patches: Sequence[int]
) -> Encoded:
    """Repeat each image's placeholder, of which there is one at each of `places`, as often as it has patches."""
    repeats = np.ones(len(ids), np.int32)
    repeats[places] = patches
    return Encoded(
        input_ids=np.repeat(ids, repeats),
        supervised=np.repeat(supervised, repeats),
        images=images,
        image_starts=(np.cumsum(repeats, dtype=np.int32) - repeats)[places],
    )


_REMEMBERED = 10_000
"""Texts that a `Remembering` keeps of each kind."""


class Remembering:
    """A tokenizer that remembers what it wrote lately: most conversations share their questions and answers, and all
    of them the headers of their turns. The tokenizer must not change meanwhile."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.encode = lru_cache(_REMEMBERED)(tokenizer.encode)
        self.convert_tokens_to_ids = lru_cache(_REMEMBERED)(tokenizer.convert_tokens_to_ids)
        self.all_special_tokens = tokenizer.all_special_tokens
        self._render = lru_cache(_REMEMBERED)(self._rendered)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, chat: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """As the tokenizer does."""
        return self._render(json.dumps([chat, options]))

    def _rendered(self, asked: str) -> Any:
        chat, options = json.loads(asked)
        return self._tokenizer.apply_chat_template(chat, **options)


def load_tokenizer(directory: str | Path, image_token_id: int | None) -> tuple[Any, list[str]]:
    """The tokenizer of a local Hugging Face directory, with `<|im_start|>`, `<|im_end|>` and `<image>`.

    Those that it lacks are added as special tokens, at the end of the vocabulary; the caller then takes the id of an
    added `<image>` for the model's and makes sure that the embeddings have a row for each.

    Args:
        directory: holds tokenizer.json and its companions; nothing is downloaded, and no code that it holds or names is
            run.
        image_token_id: the model's, from its config.json; None where it has none yet.

    Returns:
        The tokenizer and the tokens that were added. Its `chat_template` is the processor's if the directory has one,
        as in transformers; `stop_ids` knows the ends of an answer that the directory names.

    Raises:
        DataError: no tokenizer there, one that is larger than any, or that is code; its `<image>` has another id than
            the model's; a chat template or `eos_token_id` that is none.
    """
    from transformers import AutoTokenizer  # here: reading conversations and volumes needs no transformers

    if not Path(directory).is_dir():
        raise DataError(f"{directory}: not found; expected a directory with a tokenizer")
    files = [file for file in sorted(Path(directory).iterdir()) if file.suffix in _TOKENIZER and file.is_file()]
    if faults := [f"{file}: {_LARGE}" for file in files if file.stat().st_size > LISTING]:
        raise DataError(faults)
    try:
        # False, not the default None: that asks on the terminal whether the directory's code may run
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a missing or damaged file makes transformers raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "copy the base's tokenizer.json and tokenizer_config.json into it"
        raise DataError(f"{directory}: holds no tokenizer that can be read: {reason}; {remedy}") from None
    vocabulary = tokenizer.get_vocab()
    added = [token for token in (TURN_START, TURN_END, IMAGE_MARKER) if token not in vocabulary]
    if IMAGE_MARKER not in added and image_token_id not in (None, vocabulary[IMAGE_MARKER]):
        raise DataError(
            f"{directory}: {IMAGE_MARKER} is token {vocabulary[IMAGE_MARKER]} of the tokenizer, but image_token_id is "
            f"{image_token_id} in config.json; use the tokenizer that belongs to the model, or mend config.json"
        )
    tokenizer.add_tokens(added, special_tokens=True)
    setattr(tokenizer, _STATED_ENDS, _stated_ends(Path(directory)))
    tokenizer.chat_template = _processor_template(Path(directory)) or tokenizer.chat_template
    return tokenizer, added


_STATED_ENDS = "stated_ends"
"""Attribute of a loaded tokenizer: what `_stated_ends` found beside it."""


def _stated_ends(directory: Path) -> list[int]:
    """Return the ids that end an answer according to `generation_config.json`, or without one to config.json.

    As transformers' `generate` reads them: a number or a list; the language model's only if the whole model has none.
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
    """Return the chat template of the processor if it has one of its own, by transformers' precedence:
    `processor_config.json`, then `chat_template.json`. (`chat_template.jinja` is the tokenizer's too.)"""
    for name in ("processor_config.json", "chat_template.json"):
        if not (file := directory / name).exists():
            continue
        found = _read_object(file).get("chat_template")
        if isinstance(found, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in found):
            found = {template["name"]: template["template"] for template in found}
        texts = list(found.values()) if isinstance(found, dict) else [found]
        if found is not None and not all(isinstance(text, str) for text in texts):
            raise DataError(f"{file}: chat_template: expected a template or several by name; correct the file")
        if found:
            template: str | dict[str, str] = found
            return template
    return None


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a tokenizer. Raises DataError if it is none."""
    remedy = "copy the base's file again"
    found = read_json(file, DataError, remedy)
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected an object, got {type(found).__name__}; {remedy}")
    return found


def save_tokenizer(tokenizer: Any, directory: str | Path) -> None:
    """Writes a tokenizer as transformers 4 and 5 both read it: 5 by itself names a class that 4 does not know, and
    holds further special tokens under a key that 4 takes for something else."""
    tokenizer.save_pretrained(directory)
    file = Path(directory) / "tokenizer_config.json"
    stated = json.loads(file.read_text(encoding="utf-8"))
    if stated.get("tokenizer_class") == "TokenizersBackend":
        stated["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(further := stated.get("extra_special_tokens"), list):
        del stated["extra_special_tokens"]
        stated["additional_special_tokens"] = further
    file.write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_template(tokenizer: Any, template: Template) -> None:
    """Raises DataError where the template is the tokenizer's own and it has none."""
    if template == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"data.template: chat, but {tokenizer.name_or_path or 'the tokenizer'} has no chat template; add "
            "chat_template.jinja beside tokenizer.json, or set data.template: umbrella"
        )


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: `<|im_end|>`, the tokenizer's end of text, and every `eos_token_id` of the
    model's `generation_config.json`."""
    ids = [tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id, *getattr(tokenizer, _STATED_ENDS, ())]
    return sorted({i for i in ids if i is not None})


def decode(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids without special tokens.

    Spaces stay as they are whatever `clean_up_tokenization_spaces` says: transformers 4.46 to 5.6 would obey it.
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
    """A whole conversation.

    Args:
        max_length: positions, patches included.
        template: see above, also for what is supervised.
        needs_answer: refuse a conversation in which no assistant turn has text.

    Raises:
        DataError: longer than `max_length` (never cut), no answer, a control token within a text, or a conversation
            that the tokenizer's chat template cannot render so that its answers are found.
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
    """What an answer is generated from: the last assistant turn is dropped but for its header. Nothing is supervised.

    Raises:
        DataError: the last turn is not the assistant's, and as `encode`.
    """
    faults = [] if _ends_with_answer(conversation) else [_no_answer(conversation)]
    return _encode(conversation, conversation.messages[:-1], True, tokenizer, modalities, max_length, template, faults)


def encode_answers(
    conversation: Conversation, answers: Sequence[str], tokenizer: Any, *, template: Template = "umbrella"
) -> list[list[int]]:
    """What each of `answers` would be behind `encode_prompt`: its tokens up to the one that ends it, that included.

    Raises:
        DataError: one holds a control token, or the template does not go on from the prompt with it.
    """
    write, messages = _TEMPLATES[template], conversation.messages[:-1]
    prompt, _ = write(messages, tokenizer, True)
    ends, encoded, faults = stop_ids(tokenizer), [], []
    for answer in answers:
        said = Message("assistant", (answer,))
        ids, _ = write([*messages, said], tokenizer, False)
        rest = ids[len(prompt) :]
        end = next((place for place, token in enumerate(rest) if token in ends), None)
        if _control_tokens([said], tokenizer) or ids[: len(prompt)] != prompt or not end:
            faults.append(f"{conversation.label}: the answer {answer!r} cannot be written behind its prompt; {_MEND}")
        else:
            encoded.append(rest[: end + 1])
    if faults:
        raise DataError(faults)
    return encoded


def length_faults(
    asked: Iterable[tuple[Conversation, Iterable[str]]],
    tokenizer: Any,
    limit: int,
    setting: str,
    *,
    template: Template = "umbrella",
) -> list[str]:
    """Return a fault for each distinct answer whose text takes more than `limit` tokens: no model could give it.

    Args:
        asked: conversations, each with the answers that it may have.
        setting: name of the limit, for people.
    """
    seen, faults = set[str](), list[str]()
    for conversation, answers in asked:
        for answer in answers:
            # a token is a byte at least, but for what a chat template may put before an answer
            if answer in seen or (template != "chat" and len(answer.encode()) < limit):
                continue
            seen.add(answer)
            try:
                (ids,) = encode_answers(conversation, [answer], tokenizer, template=template)
            except DataError as error:
                faults += error.faults
                continue
            if (needed := len(ids) - 1) > limit:  # the token that ends it is not of its text
                faults.append(
                    f"{conversation.label}: the answer {answer!r} takes {needed} tokens, and {setting} is {limit}: no "
                    f"model could give it; set it to {needed} or more"
                )
    return faults


def encode_all(
    conversations: Iterable[Conversation],
    encoder: Callable[[Conversation], Encoded],
    modalities: Mapping[str, ModalityConfig],
) -> Rows:
    """`encoder`, which knows the `modalities`, of each. Raises DataError with the faults of all."""
    encoded = Rows(modalities)
    faults = Faults()
    for conversation in conversations:
        with faults:
            encoded.append(encoder(conversation))
    faults.raise_as(DataError)
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


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and bool(message.text.strip())  # a blank one would teach silence


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
    """`messages` and, where it is a `prompt`, the header of an answer. Raises DataError with `faults` and its own."""
    label = conversation.label
    if forged := _control_tokens(messages, tokenizer):
        found = " and ".join(forged)
        raise DataError([*faults, f"{label}: text holds {found}, which the tokenizer takes for control; take it out"])
    try:
        ids, supervised = _TEMPLATES[template](messages, tokenizer, prompt)
    except DataError as error:
        raise DataError([*faults, *(f"{label}: {fault}" for fault in error.faults)]) from None

    images = tuple(part for message in messages for part in message.parts if isinstance(part, Image))
    tokens = np.array(ids, np.int32)
    shown = tokens == tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    if shown.sum() != len(images):
        raise DataError([*faults, f"{label}: {shown.sum()} {IMAGE_MARKER} in the text, {len(images)} images; {_MEND}"])
    patches = [modalities[image.modality].num_patches for image in images]
    if (length := len(ids) - len(patches) + sum(patches)) > max_length:
        faults.append(
            f"{label}: {length} positions, {sum(patches)} of them patches; expected at most {max_length}: "
            "raise max_length or the patch size, or shorten the conversation"
        )
    if faults:
        raise DataError(faults)
    learnt = np.array(supervised, bool) & (not prompt)
    return _expanded(tokens, learnt, images, np.flatnonzero(shown), patches)


def _control_tokens(messages: Sequence[Message], tokenizer: Any) -> list[str]:
    """Those that stand in a turn's text, where they would forge an image, a turn or the end of one."""
    control = {TURN_START, TURN_END, IMAGE_MARKER, *tokenizer.all_special_tokens}
    texts = [message.text for message in messages]
    return sorted(token for token in control if any(token in text for text in texts))


def _words(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _joined(message: Message) -> list[str | Image]:
    """The turn's parts, adjacent texts as one."""
    out: list[str | Image] = []
    for part in message.parts:
        if out and isinstance(part, str) and isinstance(last := out[-1], str):
            out[-1] = last + part
        else:
            out.append(part)
    return out


def _umbrella(messages: Sequence[Message], tokenizer: Any, prompt: bool) -> _Text:
    start, end, image = tokenizer.convert_tokens_to_ids((TURN_START, TURN_END, IMAGE_MARKER))
    pieces: list[tuple[list[int], bool]] = []  # ids and mask grow together, so they cannot disagree
    for message in messages:
        learnt = _is_answer(message)
        pieces.append(([start, *_words(tokenizer, f"{message.role}\n")], False))
        for part in _joined(message):
            pieces.append((_words(tokenizer, part), learnt) if isinstance(part, str) else ([image], False))
        pieces += [([end], learnt), (_words(tokenizer, "\n"), False)]
    if prompt:
        pieces.append(([start, *_words(tokenizer, "assistant\n")], False))
    return [i for ids, _ in pieces for i in ids], [learnt for ids, learnt in pieces for _ in ids]


def _original(messages: Sequence[Message], tokenizer: Any, prompt: bool) -> _Text:
    text = ""
    for message in messages:
        images = IMAGE_MARKER * sum(isinstance(part, Image) for part in message.parts)
        inline = "".join(part if isinstance(part, str) else IMAGE_MARKER for part in message.parts)
        text += f"{TURN_START}{message.role}\n{inline if message.inline else images + message.text}{TURN_END}\n"
    ids = _words(tokenizer, text + (f"{TURN_START}assistant\n" if prompt else ""))
    # a turn starts at its control token, and no token reaches over one
    start, image = tokenizer.convert_tokens_to_ids((TURN_START, IMAGE_MARKER))
    turn = np.cumsum(np.array(ids) == start) - 1
    learnt = [*(message.role != "user" for message in messages), False]
    return ids, [i > 0 and learnt[t] and ids[i] != image for i, t in enumerate(turn)]


_MEND = "mend the tokenizer's chat template, or set data.template: umbrella"


def _chat(messages: Sequence[Message], tokenizer: Any, prompt: bool) -> _Text:
    chat = _chat_messages(messages, tokenizer)

    def words(count: int, **options: bool) -> list[int]:
        ids: list[int] = _render(tokenizer, chat[:count], tokenize=True, return_dict=True, **options)["input_ids"]
        return ids

    rest = _render(tokenizer, chat, tokenize=False, add_generation_prompt=prompt)
    for i, message in enumerate(messages):
        for text in (part.strip() for part in _joined(message) if isinstance(part, str)):
            if text not in rest:
                raise DataError(f"conversations[{i}]: the chat template leaves out or rewrites its text; {_MEND}")
            rest = rest[rest.index(text) + len(text) :]
    ids = words(len(chat), add_generation_prompt=prompt)
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
        before, until = words(i, add_generation_prompt=True), words(i + 1)
        if ids[: len(before)] != before or ids[: len(until)] != until:
            raise DataError(
                f"conversations[{i}]: the chat template does not begin it as it prompts for it, or writes it otherwise "
                f"when the conversation goes on, so what is learnt would not be what is asked; {_MEND}"
            )
        answer = slice(len(before), len(until))
        outside[answer] = False
        # up to the first token that ends it: a newline behind it is the next turn's
        learnt = np.cumsum(ends[answer]) - ends[answer] == 0 if marked is None else marked[answer]
        if not (learnt & ends[answer]).any():
            raise DataError(
                f"conversations[{i}]: the chat template ends the answer without {TURN_END} or the end of text"
                f"{'' if marked is None else ' within {% generation %}'}, so its end would not be learnt; {_MEND}"
            )
        said = decode(tokenizer, np.array(ids)[answer][learnt])
        if normalize("NFC", said.strip()) != normalize("NFC", message.text.strip()):  # as Qwen's tokenizers do
            raise DataError(
                f"conversations[{i}]: the chat template makes {said!r} of the answer {message.text!r}; {_MEND}"
            )
        supervised[answer] = learnt & _is_answer(message)
    if marked is not None and (marked & outside).any():
        raise DataError(f"the chat template marks more than the answers by {{% generation %}}; {_MEND}")
    return ids, supervised.tolist()


def _chat_messages(messages: Sequence[Message], tokenizer: Any) -> list[dict[str, Any]]:
    """As the chat template takes them: in parts where it shows an image part as a marker; else with markers in text."""
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
        raise DataError(f"the chat template cannot render it: {type(error).__name__}: {error}; {_MEND}") from None


_TEMPLATES: Mapping[Template, Callable[[Sequence[Message], Any, bool], _Text]] = {
    "umbrella": _umbrella,
    "original": _original,
    "chat": _chat,
}
