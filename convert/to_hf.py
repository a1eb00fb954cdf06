"""Write parameters as a Hugging Face checkpoint in the hub's layout: the inverse of `from_hf`, by the same rules."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.config_json import read_titles, stored_parts
from convert.export_config import CARD, carried_files, export_names, write_config
from convert.lazy_tensor import Tensor
from convert.model_card import TrainingRecord, model_card, training_facts
from convert.rules import EMBED, map_tensors
from convert.safetensors_files import write_checkpoint
from umbrella_jax.config.schema import Template
from umbrella_jax.errors import CheckpointError
from umbrella_jax.io.files import check_new_folder, new_folder
from umbrella_jax.models.llava import LlavaConfig, abstract_params
from umbrella_jax.models.paths import adapter_paths


def export(
    out: str | Path,
    params: Mapping[str, Tensor | jax.Array],
    config: LlavaConfig,
    source_dir: str | Path,
    *,
    names: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    base: str | None = None,
    fingerprint: str | None = None,
    adapter: str | None = None,
    template: Template | None = None,
    untrained: Mapping[str, str] | None = None,
    records: Sequence[TrainingRecord] = (),
    license: Mapping[str, str] | None = None,
    with_code: bool = False,
    finish: Callable[[Path], None] = lambda part: None,
) -> None:
    """Write weights, configuration, tokenizer and a model card to the new folder `out`, atomically.

    Args:
        params: {path: parameter}, in memory or not read yet; they keep their types and are written one by one.
        source_dir: folder from which config.json, tokenizer and the other small files are copied.
        names: modality names to export under: ("T1", "rsfMRI"), ("sMRI", "fMRI"), or by default the configured ones.
        max_shard_size: size of one file in bytes, or such as `5GB`.
        base: name of the model that training began from.
        fingerprint: SHA-256 of that model's weights.
        adapter: name of the adapter that was put onto that model before training.
        template: conversation template of the training data.
        untrained: {modality or component: reason} for those whose weights are untrained.
        records: facts about the runs that made the parameters, for the model card and umbrella_config.json.
        license: of the base, as in `model_card`.
        with_code: whether to add what PyTorch users need to load the export without this package.
        finish: called with the folder to change small files before their checksums are recorded.

    Raises:
        ConfigError: if `out` is not empty.
        CheckpointError: if the parameters are not those of `config`, and as `carried_files`.
    """
    out = Path(out)
    check_new_folder(out)
    carried_files(Path(source_dir))  # raises before anything is written
    abstract = abstract_params(config)[1]
    faults = [f"{out}: {path}: not a parameter of this model" for path in sorted(params.keys() - abstract.keys())]
    for path, leaf in abstract.items():
        if path not in params:
            faults.append(f"{out}: {path}: missing, expected shape {list(leaf.shape)}")
        elif params[path].shape != leaf.shape:
            faults.append(f"{out}: {path}: expected shape {list(leaf.shape)}, found {list(params[path].shape)}")
    if faults:
        raise CheckpointError(faults)
    renamed = export_names(config.modalities, names)
    modalities = {renamed[m]: modality for m, modality in config.modalities.items()}
    dtype = np.dtype(params[EMBED].dtype).name
    stated: dict[str, Any] = {"base": base, "base_fingerprint": fingerprint, "template": template}
    stated |= {"untrained": untrained, "adapter": adapter}
    with new_folder(out) as part:
        checksums = write_checkpoint(part, hub_tensors(params, config, renamed), max_shard_size)
        without_training = [renamed.get(name, name) for name in untrained or ()]
        card = model_card(
            config,
            modalities,
            out.name,
            base,
            fingerprint,
            template,
            without_training,
            records,
            license,
            titles=read_titles(source_dir),
            parts=stored_parts(source_dir),
            adapter=adapter,
            form="code" if with_code else "whole",
        )
        (part / CARD).write_text(card, encoding="utf-8")
        stated |= {"dtype": dtype, "checksums": checksums, "with_code": with_code}
        stated["training"] = training_facts(records)
        write_config(source_dir, part, config, names, finish=finish, **stated)


def hub_tensors(
    params: Mapping[str, Tensor | jax.Array], config: LlavaConfig, names: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Return {name on the hub: tensor} for all or some parameters and their adapters.

    `names` maps configured modality names to exported ones.
    """
    lazy = {path: leaf if isinstance(leaf, Tensor) else Tensor.from_array(leaf) for path, leaf in params.items()}
    tensors = {}
    for entry in map_tensors(config, names):
        factors = zip(adapter_paths(entry.path), adapter_paths(entry.name), strict=True)
        for path, name in ((entry.path, entry.name), *factors):
            if path in lazy:
                tensor = lazy[path] if entry.layer is None else lazy[path].layer(entry.layer)
                tensors[name] = tensor.reshape(entry.file_shape) if path == entry.path else tensor
    return tensors
