"""Controls: the same questions with the scans, or the words, replaced. docs/evidence.md says how to read them.

`blank`           every volume of a modality is one and the same: the background everywhere
`noise`           every volume has its own voxels in random order
`shuffled`        the scan in question is another subject's of the same modality; in comparisons, the reference scans
                  stay, and `shuffled-reference` replaces these instead
`other-modality`  the scan in question is the same subject's of another modality
`paraphrase`      the question is put in other words

A control changes conversations before they are encoded, so an image token takes the patches of the modality that is
shown. Draws depend on the seed and on the scans of the data set, never on batches, devices or the model.
"""

import itertools
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_jax.config.schema import ControlName
from umbrella_jax.console import plural
from umbrella_jax.data.conversation import Conversation, Conversations, Image
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.tokenize import encode_all
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.inference.processor import Processor
from umbrella_jax.scoring.rows import Row, blank_rows
from umbrella_jax.scoring.tasks import task_of

_BLANK = Path("blank")
"""Path of the image that `blank` shows."""
_MEASURED = 8
"""Number of scans whose background decides the value of a blank volume; one unusual scan then does not."""


@dataclass(frozen=True)
class Changed:
    """The conversations of a data set under a control, before they are encoded."""

    conversations: Sequence[Conversation]
    """All, in the order of the data set; those that the control does not change are as before."""
    rows: Mapping[int, Row]
    """{number of a conversation: its row without an answer}, of those in the control's file. A row without this
    control has the reason as `left_out`."""

    @property
    def asked(self) -> list[int]:
        """Numbers of the conversations to answer."""
        return [number for number, row in self.rows.items() if "left_out" not in row]


@dataclass(frozen=True)
class ControlledDataset:
    """A data set under a control."""

    changed: Changed
    dataset: Dataset
    """Has the prompts of all conversations."""


def change_conversations(
    conversations: Sequence[Conversation],
    modalities: Sequence[str],
    controls: Sequence[ControlName],
    paraphrases: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
) -> dict[str, list[Changed]]:
    """Return {control: changed conversations}, for `paraphrase` once per wording.

    `shuffled` also gives `shuffled-reference` if a conversation shows a reference scan.

    Args:
        modalities: the model's, in its order.
        controls: names of the controls to make.
        paraphrases: {task: other wordings of its question}.
        seed: of the order in which subjects take each other's scans.

    Raises:
        DataError: a control can be made for no conversation; a modality has scans of one subject only, so none can be
            shuffled; `paraphrase` has no wordings, or for a task that the data lack; a question to paraphrase is in
            several pieces.
    """
    made, faults = dict[str, list[Changed]](), Faults()
    scans = _Scans(conversations, modalities, seed)
    for name in controls:
        with faults:
            if name == "paraphrase":
                made[name] = _paraphrase(conversations, paraphrases)
            elif name == "shuffled":
                made |= _shuffle(conversations, scans)
            else:
                replaced = map(partial(_REPLACE[name], scans), conversations)
                made[name] = [_change(name, conversations, replaced)]
    faults.raise_as(DataError)
    return made


def applicable_controls(names: Sequence[ControlName], conversations: Sequence[Conversation]) -> list[ControlName]:
    """Return the names without those that replace scans if no conversation shows one."""
    shown = any(conversation.images for conversation in conversations)
    return [name for name in names if shown or name == "paraphrase"]


def inapplicable_lines(names: Sequence[ControlName], conversations: Sequence[Conversation]) -> list[str]:
    """Return a line about the names that `applicable_controls` leaves out, if there are any."""
    kept = applicable_controls(names, conversations)
    left_out = [name for name in names if name not in kept]
    return [f"{', '.join(left_out)}: left out: no conversation of the data shows a scan"] if left_out else []


_Replaced = Mapping[int, Image] | str
"""{number of an image of a conversation: image shown instead}, or why there is none."""


def _change(name: str, conversations: Sequence[Conversation], replaced: Iterator[_Replaced]) -> Changed:
    """Replace images of conversations. Raises DataError if no conversation can be changed."""
    changed, rows = list(conversations), dict[int, Row]()
    for number, (row, images) in enumerate(zip(blank_rows(conversations), replaced, strict=True)):
        rows[number] = row | {"control": name}
        if isinstance(images, str):
            rows[number]["left_out"] = images
        else:
            changed[number] = _with_images(conversations[number], images)
    own = Changed(changed, rows)
    if not own.asked:
        raise DataError(f"{name}: cannot be made for any conversation: {rows[0]['left_out']}")
    return own


def _with_images(conversation: Conversation, images: Mapping[int, Image]) -> Conversation:
    numbers = iter(range(len(conversation.images)))
    messages = tuple(
        replace(
            message,
            parts=tuple(p if isinstance(p, str) else images.get(next(numbers), p) for p in message.parts),
        )
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)


_NO_IMAGE = "it shows no scan"


class _Scans:
    """The scans of a data set, by modality and subject, and the order in which subjects take each other's."""

    def __init__(self, conversations: Sequence[Conversation], modalities: Sequence[str], seed: int):
        self.modalities = modalities
        self._subject: dict[Path, str] = {}
        for conversation in conversations:
            for image, subject in zip(conversation.images, conversation.image_subjects, strict=True):
                if subject is not None:
                    self._subject.setdefault(image.path, subject)
        images = sorted({i for c in conversations for i in c.images}, key=lambda i: (str(i.path), i.modality))
        self._of: dict[str, dict[str, list[Image]]] = {name: defaultdict(list) for name in modalities}
        for image in images:
            self._of[image.modality][self.subject(image)].append(image)
        subjects = sorted({self.subject(image) for image in images})
        order = np.random.default_rng([seed, 1]).permutation(len(subjects))
        rank = {subjects[number]: place for place, number in enumerate(order)}
        self._order = {name: sorted(own, key=rank.__getitem__) for name, own in self._of.items()}
        self._ranks = {name: [rank[subject] for subject in own] for name, own in self._order.items()}
        self._rank = rank

    def subject(self, image: Image) -> str:
        """Return the subject of a scan; a scan of an unknown one is a subject of its own."""
        return self._subject.get(image.path, str(image.path))

    def queried(self, conversation: Conversation) -> list[bool]:
        """Return whether each image is in question, and not a reference.

        If `metadata` names no references, the images in question are those of the subject that is shown last; if that
        is unknown too, those of the last turn with an image.
        """
        if conversation.references:
            own = frozenset(conversation.queried_images)
            return [image in own for image in conversation.images]
        turns = [t for t, m in enumerate(conversation.messages) for p in m.parts if isinstance(p, Image)]
        last = conversation.images[-1:]
        if last and last[0].path not in self._subject:
            return [turn == turns[-1] for turn in turns]
        return [self.subject(image) == self.subject(last[0]) for image in conversation.images]

    def of_another_subject(self, image: Image, excluded: frozenset[str]) -> Image | None:
        """Return the scan that a cyclic order of the subjects gives: the next subject's who is not `excluded`."""
        order, own = self._order[image.modality], self.subject(image)
        first = bisect(self._ranks[image.modality], self._rank[own])
        for subject in (*order[first:], *order[:first]):
            if subject != own and subject not in excluded:
                return self._same_place(image, self._of[image.modality][subject])
        return None

    def of_another_modality(self, image: Image, shown: frozenset[str]) -> Image | None:
        """Return the same subject's scan of the model's next modality that is not `shown` and that the subject has."""
        first = self.modalities.index(image.modality) + 1
        for name in (*self.modalities[first:], *self.modalities[: first - 1]):
            if name not in shown and (scans := self._of[name].get(self.subject(image))):
                return self._same_place(image, scans)
        return None

    def check_shuffled(self, conversations: Sequence[Conversation]) -> None:
        """Raise DataError for each modality whose scans are all of one subject."""
        shown = {image.modality for conversation in conversations for image in conversation.images}
        if faults := [
            f"shuffled: {name}: all scans of the data are of one subject; expected at least two"
            for name in self.modalities
            if name in shown and len(self._order[name]) < 2
        ]:
            raise DataError(faults)

    def _same_place(self, image: Image, others: Sequence[Image]) -> Image:
        """Return the scan of `others` that has the same place among them as `image` among its subject's."""
        return others[self._of[image.modality][self.subject(image)].index(image) % len(others)]


def _blank(_: _Scans, conversation: Conversation) -> _Replaced:
    return {n: Image(_BLANK, image.modality) for n, image in enumerate(conversation.images)} or _NO_IMAGE


def _noise(_: _Scans, conversation: Conversation) -> _Replaced:
    return dict(enumerate(conversation.images)) or _NO_IMAGE  # `_Noise` changes their voxels


def _other_modality(scans: _Scans, conversation: Conversation) -> _Replaced:
    replaced, in_question = dict[int, Image](), scans.queried(conversation)
    shown = frozenset(itertools.compress((image.modality for image in conversation.images), in_question))
    for number, (image, queried) in enumerate(zip(conversation.images, in_question, strict=True)):
        if queried:
            if (other := scans.of_another_modality(image, shown)) is None:
                several = " that it does not show" if len(shown) > 1 else ""
                return f"its subject has no scan of another modality{several} in the data"
            replaced[number] = other
    return replaced or _NO_IMAGE


_REPLACE = {"blank": _blank, "noise": _noise, "other-modality": _other_modality}


def _shuffle(conversations: Sequence[Conversation], scans: _Scans) -> dict[str, list[Changed]]:
    """Return `shuffled`, and `shuffled-reference` if a conversation has references."""
    scans.check_shuffled(conversations)

    def shuffle(conversation: Conversation, *, references: bool) -> _Replaced:
        excluded = frozenset(map(scans.subject, conversation.images))
        replaced = dict[int, Image]()
        for number, (image, queried) in enumerate(zip(conversation.images, scans.queried(conversation), strict=True)):
            if queried != references:
                if (other := scans.of_another_subject(image, excluded)) is None:
                    return "the data have no scan of a subject that it does not show"
                replaced[number] = other
        return replaced or ("it shows no reference scan" if references else _NO_IMAGE)

    names = {"shuffled": False}
    if not all(all(scans.queried(conversation)) for conversation in conversations):
        names["shuffled-reference"] = True
    return {
        name: [_change(name, conversations, map(partial(shuffle, references=references), conversations))]
        for name, references in names.items()
    }


def _paraphrase(conversations: Sequence[Conversation], paraphrases: Mapping[str, Sequence[str]]) -> list[Changed]:
    """Return the conversations with each wording in turn; tasks with fewer wordings are not in the last ones."""
    rows = blank_rows(conversations)
    tasks = list(map(task_of, rows))
    if not paraphrases:
        raise DataError("paraphrase: no wordings of a question; list them in evaluation.paraphrases (--config FILE)")
    if unknown := sorted(paraphrases.keys() - set(tasks)):
        raise DataError(
            [
                f"evaluation.paraphrases.{name}: no such task here; expected some of {', '.join(sorted({*tasks}))}"
                for name in unknown
            ]
        )
    faults, made = Faults(), list[Changed]()
    for place in range(max(map(len, paraphrases.values()))):
        changed, own = list(conversations), dict[int, Row]()
        for number, task in enumerate(tasks):
            if place < len(questions := paraphrases.get(task, ())):
                with faults:
                    changed[number] = _ask(conversations[number], questions[place])
                own[number] = rows[number] | {"control": "paraphrase", "question": questions[place]}
        made.append(Changed(changed, own))
    faults.raise_as(DataError)
    return made


def _ask(conversation: Conversation, question: str) -> Conversation:
    """Return the conversation with another text of the last turn of the user, with the same space around it."""
    turn = max(i for i, message in enumerate(conversation.messages) if message.role == "user")
    parts = conversation.messages[turn].parts
    texts = [i for i, part in enumerate(parts) if isinstance(part, str) and part.strip()]
    if len(texts) != 1:
        raise DataError(
            f"{conversation.label}: paraphrase: the text of its last question is in {plural(len(texts), 'piece')}; "
            "expected one, before or after the images"
        )
    before = str(parts[texts[0]])
    start = before[: len(before) - len(before.lstrip())]
    end = before[len(before.rstrip()) :]
    message = replace(
        conversation.messages[turn],
        parts=(*parts[: texts[0]], f"{start}{question.strip()}{end}", *parts[texts[0] + 1 :]),
    )
    messages = (*conversation.messages[:turn], message, *conversation.messages[turn + 1 :])
    return replace(conversation, messages=messages)


@dataclass(frozen=True)
class _Blank(Dataset):
    """A data set that shows blank volumes."""

    true: Dataset | None = None
    """The data set whose scans are replaced."""

    def volume(self, image: Image) -> np.ndarray:
        """Return a volume of background, or an image that the control does not replace."""
        if image.path != _BLANK:
            return super().volume(image)
        return np.full(self.modalities[image.modality].size, self._levels[image.modality], np.float32)

    @cached_property
    def _levels(self) -> dict[str, float]:
        """The background's value in a blank volume of each modality: the median of the first `_MEASURED` scans'."""
        assert self.true is not None
        values: dict[str, list[float]] = defaultdict(list)
        for image in self.true.windows:
            if len(values[image.modality]) < _MEASURED:
                level = self.true.background(image)
                values[image.modality].append(float(self.true.volume(image).min()) if level is None else level)
        return {name: float(np.median(own)) for name, own in values.items()}


@dataclass(frozen=True)
class _Noise(Dataset):
    """A data set that shows every volume with its voxels in random order."""

    seed: int = 0
    numbers: Mapping[tuple[Path, str], int] = field(default_factory=dict)
    """{(file, modality): number of the scan}."""

    def volume(self, image: Image) -> np.ndarray:
        """Return an image with all of its voxels, of all frames, in an order that depends on the scan and window."""
        volume = super().volume(image)
        # Numbers start at 1: NumPy ignores trailing zeros of a seed.
        numbers = [self.seed, 2, 1 + self.numbers[image.path, image.modality], 1 + image.window]
        return np.random.default_rng(numbers).permutation(volume.ravel()).reshape(volume.shape)


def control_dataset(
    name: str, changed: Changed, dataset: Dataset, processor: Processor, *, seed: int = 0
) -> ControlledDataset:
    """Encode the conversations of a control.

    Args:
        changed: from `change_conversations` of the conversations of `dataset`.
        seed: of the order of the voxels in `noise`.

    Raises:
        DataError: a prompt is longer than the processor's limit, or a question contains a control token.
    """
    conversations = Conversations(changed.conversations)
    try:
        prompts = encode_all(
            conversations,
            processor.tokenizer,
            processor.modalities,
            processor.max_length,
            template=processor.template,
            prompts=True,
        )
    except DataError as error:
        raise DataError([f"{name}: {fault}" for fault in error.faults]) from None
    images = conversations.images
    parts: dict[str, Any] = {
        "conversations": conversations,
        "encoded": (),
        "prompts": prompts,
        "windows": {image: dataset.windows.get(image, 1) for image in images},
        "modalities": dataset.modalities,
        "sources": dataset.sources,
    }
    if name == "blank":
        return ControlledDataset(changed, _Blank(**parts, true=dataset))
    if name == "noise":
        order = sorted({(image.path, image.modality) for image in images}, key=lambda key: (str(key[0]), key[1]))
        numbers = {key: number for number, key in enumerate(order)}
        return ControlledDataset(changed, _Noise(**parts, seed=seed, numbers=numbers))
    return ControlledDataset(changed, Dataset(**parts))


def make_controls(
    dataset: Dataset,
    processor: Processor,
    controls: Sequence[ControlName],
    paraphrases: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
) -> dict[str, list[ControlledDataset]]:
    """Return {control: the data set under it}, for `paraphrase` one per wording.

    Arguments and errors are those of `change_conversations` and `control_dataset`.
    """
    modalities = list(processor.modalities)
    changed = change_conversations(dataset.conversations, modalities, controls, paraphrases, seed=seed)
    return {
        name: [control_dataset(name, one, dataset, processor, seed=seed) for one in own]
        for name, own in changed.items()
    }


def left_out_lines(controls: Mapping[str, Sequence[ControlledDataset]]) -> list[str]:
    """Return a line per control and reason, with the number of conversations that are left out."""
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for name, own in controls.items():
        for row in own[0].changed.rows.values():
            if reason := row.get("left_out"):
                reasons[name, str(reason)] += 1
    return [f"{name}: {plural(n, 'conversation')} left out: {reason}" for (name, reason), n in reasons.items()]
