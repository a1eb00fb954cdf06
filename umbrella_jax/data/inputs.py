"""What a run reads, by content: a run that goes on goes on with the same.

Every file is read to the end for it, in a fraction of the time that decompressing takes: sizes and times of change say
too little, since copies, checkouts and network file systems do not keep them. A volume's SHA-256 is that of the file as
it was checked (`Sources`); with a cache, which knows its sources, it is computed once.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from umbrella_jax.config.schema import DataConfig
from umbrella_jax.data.conversation import conversation_files
from umbrella_jax.data.loader import Dataset
from umbrella_jax.io.files import strict_json
from umbrella_jax.io.reading import sha256

Inputs = dict[str, list[tuple[str, str]]]
"""(name, SHA-256) of each file, by kind: `conversations`, `tokens` (the tokenizer's work), `volumes`; each kind in the
order in which the run meets them. What differs in one kind makes the next differ."""


def read_inputs(data: DataConfig, datasets: Mapping[str, Dataset]) -> Inputs:
    """Of the `datasets`, by the field of `data` that names them. Raises DataError for a volume that is gone."""
    found: Inputs = {"conversations": [], "tokens": [], "volumes": []}
    volumes: dict[Path, Dataset] = {}
    for split, dataset in datasets.items():
        for file in conversation_files(Path(getattr(data, split))):
            found["conversations"].append((str(file), sha256(file)))
        tokens = hashlib.sha256()
        for row in chain(dataset.encoded, dataset.prompts):  # each is made on demand
            tokens.update(row.input_ids.tobytes() + row.supervised.tobytes())
        found["tokens"].append((f"the tokenizer's ids of data.{split}", tokens.hexdigest()))
        volumes |= {image.path: dataset for image in dataset.windows}

    def digest(path: Path) -> str:
        return volumes[path].sources.digest(path)

    with ThreadPoolExecutor(data.threads) as pool:
        found["volumes"] += zip(map(str, volumes), pool.map(digest, volumes), strict=True)
    return found


def dump_inputs(inputs: Inputs) -> str:
    """As JSON, for people and for `changed`."""
    return strict_json(inputs, indent=1) + "\n"


def digest_of(inputs: Inputs) -> str:
    """One for all. Names do not count: `data.image_root` may be another place."""
    digests = [[digest for _, digest in each] for each in inputs.values()]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def changed(before: Inputs, now: Inputs) -> list[str]:
    """Names of what is other `now`, of the first kind in which something is."""
    for kind in now:
        # pairs are lists where JSON held them, on disk or on the way from process 0
        was, found = ([(name, digest) for name, digest in each[kind]] for each in (before, now))
        if len(was) == len(found):
            names = [name for (name, digest), (_, old) in zip(found, was, strict=True) if digest != old]
        else:
            names = sorted(name for name, _ in set(was) ^ set(found))
        if names:
            return names
    return []
