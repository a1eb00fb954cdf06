"""Digests of everything that a run reads, so that a resumed run continues with the same data.

Every file is read to the end, in a fraction of the time that decompressing takes. Sizes and modification times are not
enough: copies, checkouts and network file systems do not keep them. A volume's SHA-256 is of the file as it was checked
(`Sources`); a cache stores it, so it is computed once.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path

from umbrella_jax.config.schema import DataConfig, ModalityConfig
from umbrella_jax.data.conversation import conversation_files
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.tokenize import EncodedConversations
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import strict_json
from umbrella_jax.io.reading import LISTING, read_json, sha256

KINDS = ("conversations", "tokens", "volumes")
Inputs = dict[str, list[tuple[str, str]]]
"""{kind: (name, SHA-256) of each input, in the order in which the run reads them}.

The kinds are `KINDS`; `tokens` are the encoded conversations; `volumes` include the files beside them that their voxels
depend on, such as sidecars. A change in one kind usually changes the next ones too.
"""


def read_inputs(data: DataConfig, datasets: Mapping[str, Dataset]) -> Inputs:
    """Return the digests of all inputs.

    Args:
        data: configuration that names the conversation files.
        datasets: {field of `data`: its loaded data set}.

    Raises:
        DataError: a volume no longer exists.
    """
    inputs: Inputs = {kind: [] for kind in KINDS}
    volumes: dict[Path, tuple[Dataset, ModalityConfig]] = {}
    companions: dict[Path, str] = {}
    for split, dataset in datasets.items():
        for file in conversation_files(Path(getattr(data, split))):
            inputs["conversations"].append((str(file), sha256(file)))
        tokens = hashlib.sha256()
        for rows in (dataset.encoded, dataset.prompts):
            columns = attrgetter("input_ids", "supervised")
            for ids, supervised in rows.tokens() if isinstance(rows, EncodedConversations) else map(columns, rows):
                tokens.update(ids.tobytes() + supervised.tobytes())
        inputs["tokens"].append((f"token ids of data.{split}", tokens.hexdigest()))
        for image in dataset.windows:
            config = dataset.modalities[image.modality]
            volumes.setdefault(image.path, (dataset, config))
            companions |= dataset.sources.companions(image.path, config)

    def digest(path: Path) -> str:
        dataset, config = volumes[path]
        return dataset.sources.digest(path, config)

    with ThreadPoolExecutor(data.threads) as pool:
        inputs["volumes"] += zip(map(str, volumes), pool.map(digest, volumes), strict=True)
    inputs["volumes"] += [(str(path), own) for path, own in companions.items()]
    return inputs


def dump_inputs(inputs: Inputs) -> str:
    """Return the digests as JSON, for people and for `changed_inputs`."""
    return strict_json(inputs, indent=1) + "\n"


def load_stored_inputs(path: Path, remedy: str) -> Inputs:
    """Read what `dump_inputs` wrote. Raises ConfigError, with the `remedy`, for any other file."""
    recorded = read_json(path, ConfigError, remedy, LISTING)
    try:
        return {kind: [(str(name), str(digest)) for name, digest in recorded[kind]] for kind in KINDS}
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: not the digests that a run writes as it starts; {remedy}") from None


def digest_of(inputs: Inputs) -> str:
    """Return one digest of all inputs. It ignores names, since `data.image_root` may move."""
    digests = [[digest for _, digest in entries] for entries in inputs.values()]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def changed_inputs(before: Inputs, now: Inputs) -> list[str]:
    """Return the names of changed inputs, all of the first kind that has any."""
    for kind in now:
        # JSON turns pairs into lists, on disk and on the way from process 0
        old, new = ([(name, digest) for name, digest in inputs[kind]] for inputs in (before, now))
        if len(old) == len(new):
            names = [name for (name, digest), (_, earlier) in zip(new, old, strict=True) if digest != earlier]
        else:
            names = sorted(name for name, _ in set(old) ^ set(new))
        if names:
            return names
    return []
