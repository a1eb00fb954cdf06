"""Turn conversations into a model's batches, and its tokens into text."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int32

from umbrella_jax.batch import AnyArray, Batch
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import same_template
from umbrella_jax.config.schema import (
    AugmentConfig,
    DataConfig,
    ModalityConfig,
    Template,
    modality_names,
    resolve_modality,
)
from umbrella_jax.data.answer_trees import AnswerEncoder
from umbrella_jax.data.cache import Sources, VolumeCache
from umbrella_jax.data.confounds import check_confounds
from umbrella_jax.data.conversation import Conversation, Conversations, Image, Message, read_with_config
from umbrella_jax.data.loader import Dataset, whole_batch
from umbrella_jax.data.tokenize import check_template, decode_ids, encode_prompt, stop_ids
from umbrella_jax.distributed import raise_together
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.scoring.number_grid import NumberGrid

_log = logging.getLogger(__name__)
_REMARKS = 10
"""Largest number of contradictions in headers that are printed."""


class Processor:
    """The tokenizer, modalities and template that connect a data set with a model."""

    def __init__(
        self,
        tokenizer: Any,
        modalities: Mapping[str, ModalityConfig],
        *,
        template: Template = "umbrella",
        max_length: int = 8192,
    ):
        """Initialise a processor from its parts; `load` takes them from a checkpoint.

        Args:
            tokenizer: a Hugging Face tokenizer with the model's special tokens.
            modalities: the model's modalities by name.
            template: how conversations are written.
            max_length: longest conversation in positions, patches included; a longer one is refused.

        Raises:
            DataError: `template` is `chat` and the tokenizer has none.
        """
        check_template(tokenizer, template)
        self.tokenizer, self.modalities, self.template, self.max_length = tokenizer, modalities, template, max_length

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        modalities: Mapping[str, ModalityConfig] | None = None,
        patch_embed: str | Path | None = None,
        template: Template | None = None,
        max_length: int = 8192,
    ) -> "Processor":
        """Load the processor of anything that `umbrella_jax.load` takes.

        Args:
            modalities, patch_embed: as for `umbrella_jax.load`.
            template: how conversations are written. Default: the one the checkpoint was trained with, or `umbrella` if
                it does not record one.

        Raises:
            ConfigError: `template` is not the one the checkpoint was trained with.
        """
        checkpoint = Checkpoint.open(path, modalities, patch_embed=patch_embed)
        return cls.from_checkpoint(checkpoint, template=template, max_length=max_length)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, template: Template | None = None, max_length: int = 8192
    ) -> "Processor":
        """Return the processor of an opened checkpoint; arguments as for `load`."""
        template = same_template("template", template or checkpoint.template or "umbrella", checkpoint)
        tokenizer = checkpoint.tokenizer()
        return cls(tokenizer, checkpoint.config.modalities, template=template, max_length=max_length)

    def dataset(
        self,
        conversations: str | Path,
        *,
        threads: int = 4,
        **options: Any,
    ) -> Dataset:
        """Read and check a conversation file or a directory of such files, and every volume; see `Dataset.load`."""
        return Dataset.load(
            conversations,
            self.tokenizer,
            self.modalities,
            template=self.template,
            max_length=self.max_length,
            threads=threads,
            **options,
        )

    def datasets(
        self, data: DataConfig, splits: Sequence[str] = ("train", "eval"), *, augment: bool = False
    ) -> dict[str, Dataset]:
        """Load the `splits` that a configuration has; with `augment`, the training split is augmented.

        All processes of a run must call it at the same point: they divide the volumes between them, and each raises the
        faults of all.

        Raises DataError with every fault of the conversation files; if these are good, with every fault of texts and
        volumes. Raises ConfigError as `check_confounds`.
        """
        conversations, datasets = dict[str, Conversations](), dict[str, Dataset]()
        faults, sources = Faults(), VolumeCache.from_config(data)
        with raise_together():  # first, since the processes then divide the volumes
            check_confounds(self.modalities, data.cache)
            for split in splits:
                with faults:
                    if (path := getattr(data, split)) is not None:
                        conversations[split] = read_with_config(path, self.modalities, data)
            faults.raise_as(DataError)
        images = chain.from_iterable(each.images for each in conversations.values())
        with suppress(DataError):  # raised again below, with the faults of the texts
            sources.check_all(images, self.modalities, data.threads, share=True)
        for split in list(conversations):
            with faults:
                datasets[split] = Dataset.from_conversations(
                    conversations.pop(split),
                    self.tokenizer,
                    self.modalities,
                    template=self.template,
                    max_length=self.max_length,
                    threads=data.threads,
                    evaluation=split == "eval",
                    sources=sources,
                    augment=data.augment if augment and split == "train" else AugmentConfig(),
                )
        faults.raise_as(DataError)
        _warn(sources, self.modalities)
        return datasets

    def question(self, text: str, images: Sequence[tuple[str, str | Path]] = ()) -> Conversation:
        """Return a conversation with one question, preceded by its images.

        Args:
            images: (modality, file) of each image, in order; a modality's configured name or an alias.

        Raises:
            ConfigError: the model lacks a modality, or `images` are no such pairs.
            DataError: there is no such file.
        """
        if isinstance(images, str | Path) or not all(isinstance(i, tuple | list) and len(i) == 2 for i in images):
            raise ConfigError(
                f"images: expected pairs, such as [('{next(iter(self.modalities))}', FILE)], got {images!r}"
            )
        faults, parts = [], list[str | Image]()
        for name, path in images:
            modality = resolve_modality(name, self.modalities)
            if modality is None:
                faults.append(f"{path}: modality {name}: the model has {modality_names(self.modalities)}")
            else:
                parts.append(Image(Path(path), modality))
        if faults:
            raise ConfigError(faults)
        absent = [part.path for part in parts if isinstance(part, Image) and not os.path.lexists(part.path)]
        if absent:
            raise DataError([f"{path}: not found; expected a volume or a directory of frames" for path in absent])
        messages = (Message("user", (*parts, text)), Message("assistant", ("",)))
        return Conversation("question", None, messages, {}, "the prompt")

    def prompt(self, text: str, images: Sequence[tuple[str, str | Path]] = ()) -> Batch:
        """Return `question` as a Batch of one row to generate from, in NumPy arrays on the host.

        Raises:
            ConfigError: as `question`.
            DataError: a file cannot be read as its modality; the text is longer than `max_length`.
        """
        return whole_batch(self.asked(self.question(text, images)), prompts=True)

    def asked(self, conversation: Conversation) -> Dataset:
        """Return a data set with the prompt for the last answer of one conversation; check its volumes."""
        common: dict[str, Any] = {"template": self.template, "max_length": self.max_length}
        prompt = encode_prompt(conversation, self.tokenizer, self.modalities, **common)
        sources = Sources()
        windows = sources.check_all(conversation.images, self.modalities, 4)
        _warn(sources, self.modalities)
        return Dataset((conversation,), (), (prompt,), windows, self.modalities, sources)

    def batch(
        self,
        conversations: str | Path,
        *,
        image_root: str | Path | None = None,
        allow_outside_root: bool = False,
        prompts: bool = False,
    ) -> Batch:
        """Return all conversations of a file as one Batch of NumPy arrays, in the file's order.

        Args:
            image_root, allow_outside_root: as `data.image_root` and `data.allow_outside_root` of a configuration.
            prompts: leave out each last answer, to generate it; otherwise conversations are whole.

        Raises:
            DataError: every fault of the file and its volumes.
        """
        dataset = self.dataset(
            conversations, image_root=image_root, allow_outside_root=allow_outside_root, evaluation=prompts
        )
        return whole_batch(dataset, prompts=prompts)

    def answers(self, texts: Sequence[str]) -> Int32[np.ndarray, "A N"]:
        """Return several answers to one question as tokens, with the ending token and padded with -1.

        Raises DataError if the tokens of prompt and answer do not start with the prompt's tokens.
        """
        return self._answers(texts, None)

    def numbers(self, grid: NumberGrid) -> Int32[np.ndarray, "A N"]:
        """Return candidate numbers as tokens, each up to the token after the number and padded with -1.

        Raises DataError as `answers`.
        """
        return self._answers(grid.texts, grid.stems)

    def _answers(self, texts: Sequence[str], stems: Sequence[str] | None) -> Int32[np.ndarray, "A N"]:
        conversation = Conversation(
            "prompt", None, (Message("user", ("",)), Message("assistant", ("",))), {}, "answers"
        )
        encoded = AnswerEncoder(self.tokenizer, self.template)(conversation, texts, stems)
        out = np.full((len(encoded), max(map(len, encoded))), -1, np.int32)
        for row, ids in zip(out, encoded, strict=True):
            row[: len(ids)] = ids
        return out

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_ids(self.tokenizer)

    def decode(self, tokens: Int[AnyArray, "B L"] | Sequence[Sequence[int]]) -> list[str]:
        """Return the text of generated tokens, without special tokens and what follows the end."""
        rows = map(np.asarray, tokens) if isinstance(tokens, Sequence) else np.asarray(tokens)
        return [decode_ids(self.tokenizer, row[row >= 0]).strip() for row in rows]


def _warn(sources: Sources, modalities: Mapping[str, ModalityConfig]) -> None:
    """Log contradictions in the headers of scans, and unusual backgrounds, once for all processes."""
    if jax.process_index() > 0:
        return
    for line in sources.background_remarks(modalities):
        _log.warning("%s", line)
    remarks = sources.remarks()
    for remark in remarks[:_REMARKS]:
        _log.warning("%s", remark)
    if len(remarks) > _REMARKS:
        _log.warning(
            "%d more contradictions in headers; `umbrella-jax data validate` lists them", len(remarks) - _REMARKS
        )
