"""The volumes of questions: read by other threads, the latest ones kept in memory, and their features on the device."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.cache import Sources
from umbrella_jax.data.conversation import Conversation, Image
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.tokenize import Encoded, encode_prompt
from umbrella_jax.data.volume import companion_files, open_volume, reading_memory
from umbrella_jax.errors import ConfigError, UmbrellaError
from umbrella_jax.inference.controls import make_controls
from umbrella_jax.inference.generate import encode
from umbrella_jax.inference.processor import Processor
from umbrella_jax.models import Llava, split
from umbrella_jax.serve.readers import Readers

T = TypeVar("T")
Control = Literal["blank"] | None
"""`blank` shows background instead of each scan, see `umbrella_jax.inference.controls`."""
Volumes = Mapping[Image, tuple[Any, np.ndarray]]
"""{distinct image: key under which its features are kept, and the volume}. Equal volumes have equal keys."""

READ_SECONDS = 120.0
"""Longest time to read the scans of a question, or to bring a map into the space of a scan."""
_KEPT_BYTES = 1 << 29
"""Size of the preprocessed volumes that are kept in memory."""


class _HeldSources(Sources):
    """Sources that hold the volumes that they have read."""

    def __init__(self) -> None:
        super().__init__()
        self._volumes = dict[Any, np.ndarray]()

    def load(self, path: str | Path, config: ModalityConfig, window: int = 0) -> np.ndarray:
        """Return a volume, which is read once."""
        place = Path(path), config, window
        if place not in self._volumes:
            self._volumes[place] = super().load(path, config, window)
        return self._volumes[place]


class VolumeStore:
    """Reads the volumes of questions, and keeps the latest ones.

    Methods that are coroutines belong to one event loop.
    """

    def __init__(self, processor: Processor, readers: Readers):
        """Initialise an empty store.

        Args:
            processor: of the model.
            readers: threads that read scans.
        """
        self._processor, self._readers = processor, readers
        self._kept: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    async def in_thread(self, function: Callable[[], T], memory: int = 0) -> T:
        """Run a function in a thread that reads. Raises as `Readers.run`."""
        return await self._readers.run(function, seconds=READ_SECONDS, memory=memory, name="the scans")

    async def read(self, conversation: Conversation, prompt: Encoded, control: Control) -> Volumes:
        """Return the volumes of a conversation's prompt.

        Raises as `dataset`.
        """
        if control is None and (kept := await self.in_thread(partial(self._all_kept, prompt))) is not None:
            return kept
        memory = await self.in_thread(partial(self._memory, conversation))
        return await self.in_thread(partial(self._read, conversation, prompt, control), memory)

    async def dataset(self, conversation: Conversation, prompt: Encoded, control: Control) -> Dataset:
        """Return a data set with the prompt of a conversation, whose volumes have been read.

        Raises DataError for a scan that cannot be read or that its modality cannot use, ReadingTimeoutError if it takes
        too long.
        """
        memory = await self.in_thread(partial(self._memory, conversation))
        return await self.in_thread(partial(self._dataset, conversation, prompt, control), memory)

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the prompt of a conversation; opens no file."""
        processor = self._processor
        arguments = processor.tokenizer, processor.modalities, processor.max_length
        return encode_prompt(conversation, *arguments, template=processor.template)

    def _all_kept(self, prompt: Encoded) -> Volumes | None:
        """Return the volumes of a prompt if all are in memory, else None. Opens no file."""
        keys = {image: self._key(image) for image in prompt.images}
        with self._lock:
            known = {i: (key, self._kept[key]) for i, key in keys.items() if key in self._kept}
        return known if len(known) == len(keys) else None

    def _memory(self, conversation: Conversation) -> int:
        """Return the memory that reading the scans of a conversation takes, in bytes, from their headers."""
        modalities = self._processor.modalities
        configs = {image: modalities[image.modality] for image in conversation.images}
        opened = ((open_volume(image.path, config), config) for image, config in configs.items())
        return max((reading_memory(*own) for own in opened), default=0)

    def _dataset(self, conversation: Conversation, prompt: Encoded, control: Control) -> Dataset:
        processor, sources = self._processor, _HeldSources()
        with one_blas_thread():
            windows = {i: sources.check(i.path, processor.modalities[i.modality]) for i in conversation.images}
            dataset = Dataset((conversation,), (), (prompt,), windows, processor.modalities, sources)
            if control is not None:
                (blank,) = make_controls(dataset, processor, [control], {})[control]
                dataset = blank.dataset
            for image in dict.fromkeys(dataset.prompts[0].images):
                dataset.volume(image)
        return dataset

    def _read(self, conversation: Conversation, prompt: Encoded, control: Control) -> Volumes:
        keys = {image: self._key(image) for image in prompt.images}  # before reading: a later change is another key
        dataset = self._dataset(conversation, prompt, control)
        volumes = {}
        for shown, image in zip(dataset.prompts[0].images, prompt.images, strict=True):
            volume, key = dataset.volume(shown), keys[image] if control is None else None
            if key is None:
                key = image.modality, blake2b(volume.tobytes(), digest_size=16).digest()
            else:
                self._keep(key, volume)
            volumes[image] = key, volume
        return volumes

    def _key(self, image: Image) -> Any:
        """Return what identifies a file as it is now; None for a directory of frames, whose files may change."""
        try:
            files = [image.path, *companion_files(image.path, self._processor.modalities[image.modality])]
            stats = [(str(file), file.stat()) for file in files]
        except (OSError, UmbrellaError):  # reading reports it
            return None
        if image.path.is_dir():
            return None
        return image.modality, *((file, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats)

    def _keep(self, key: Any, volume: np.ndarray) -> None:
        with self._lock:
            self._kept[key] = volume
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(own.nbytes for own in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)


class VolumeFeatures:
    """The features of the latest volumes, in a fixed number of slots per modality."""

    def __init__(self, model: Llava, slots: int):
        config = model.config
        width, dtype = config.text.hidden_size, jnp.dtype(config.compute_dtype)
        device = next(iter(split(model)[1].values())).sharding  # arrays without one would be compiled for once more
        self._empty = {
            name: partial(jnp.zeros, (slots, modality.num_patches, width), dtype, device=device)
            for name, modality in config.modalities.items()
        }
        self.arrays = {name: empty() for name, empty in self._empty.items()}
        """{modality: [slots, patches, width]}, for `prefill`."""
        self._slots = slots
        self._kept: dict[str, OrderedDict[Any, int]] = {name: OrderedDict() for name in self.arrays}
        patches = [slots * self.arrays[name].shape[1] for name in sorted(self.arrays)]
        starts = [0, *itertools.accumulate(patches)]
        self._first = dict(zip(sorted(self.arrays), starts, strict=False))  # `Batch.feature_idx`

    def check(self, volumes: Mapping[Image, Any]) -> None:
        """Raise ConfigError if a question shows more scans of a modality than there are slots."""
        for name in self.arrays:
            if (count := sum(image.modality == name for image in volumes)) > self._slots:
                raise ConfigError(f"{count} {name} scans: this server takes at most {self._slots} in one conversation")

    def put(self, params: Any, graphdef: Any, volumes: Volumes) -> dict[Image, int]:
        """Encode volumes that have no slot. Returns the row of `Batch.feature_idx` of each one's first feature."""
        first = dict[Image, int]()
        needed = {key for key, _ in volumes.values()}
        for image, (key, volume) in volumes.items():
            name, kept = image.modality, self._kept[image.modality]
            if key not in kept:
                slot = len(kept)
                if slot == self._slots:
                    slot = kept.pop(next(own for own in kept if own not in needed))
                slots = np.array([slot], np.int32)
                try:
                    static: dict[str, Any] = {"graphdef": graphdef, "name": name}
                    self.arrays[name] = encode(params, volume[None], slots, self.arrays[name], **static)
                except BaseException:  # the features were donated
                    self.arrays[name] = self._empty[name]()
                    kept.clear()
                    raise
                kept[key] = slot
            kept.move_to_end(key)
            first[image] = self._first[name] + kept[key] * self.arrays[name].shape[1]
        return first
