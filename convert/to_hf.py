"""Parameters → a Hugging Face checkpoint in the hub's layout; the inverse of `from_hf`, from the same rules."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.hf_config import export_names, write_config
from convert.rules import EMBED, Entry, entries
from convert.safetensors_io import Tensor, write_checkpoint
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.llava import LlavaConfig, Params, abstract_params


def export(
    out: str | Path,
    params: Params,
    config: LlavaConfig,
    source_dir: str | Path,
    *,
    names: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    fingerprint: str | None = None,
) -> None:
    """Writes weights, configuration and what else `source_dir` holds (tokenizer, templates) to the new folder `out`.

    Parameters keep their types. `names` is the family of modality names, ("T1", "rsfMRI") or ("sMRI", "fMRI"), default
    the configured ones; `fingerprint` that of the checkpoint that training began from. Raises CheckpointError for a
    folder that is not empty, and for parameters that are not those of `config`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: not an empty folder; an export overwrites nothing, give a new one")
    abstract = abstract_params(config)[1]
    faults = [f"{out}: {path}: not a parameter of this model" for path in sorted(params.keys() - abstract.keys())]
    for path, leaf in abstract.items():
        if path not in params:
            faults.append(f"{out}: {path}: missing, expected shape {list(leaf.shape)}")
        elif params[path].shape != leaf.shape:
            faults.append(f"{out}: {path}: expected shape {list(leaf.shape)}, found {list(params[path].shape)}")
    if faults:
        raise CheckpointError(faults)

    def tensor(entry: Entry) -> Tensor:
        leaf = params[entry.path]

        def read() -> np.ndarray:
            return entry.to_torch(np.asarray(leaf if entry.layer is None else leaf[entry.layer]))

        return Tensor(entry.file_shape, leaf.dtype.name, read)

    tensors = {entry.name: tensor(entry) for entry in entries(config, export_names(config.modalities, names))}
    write_checkpoint(out, tensors, max_shard_size)
    # config.json comes last: without it, nobody takes what a killed export left for a checkpoint
    dtype = params[EMBED].dtype.name
    write_config(source_dir, out, config, names, dtype=dtype, base_fingerprint=fingerprint)
