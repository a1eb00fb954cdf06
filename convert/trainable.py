"""Read and write the trained parameters of a run: one small safetensors file to apply to the base of the run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.lazy_tensor import Tensor
from convert.rules import hub_name
from convert.safetensors_files import open_safetensors, write_safetensors
from umbrella_jax.config.load import parse_config
from umbrella_jax.config.origins import Origins
from umbrella_jax.config.schema import ModalityConfig, Template, to_dict
from umbrella_jax.errors import CheckpointError
from umbrella_jax.io.reading import parse_json

FILE = "trainable.safetensors"
_STATED = ("modalities", "base_fingerprint")


@dataclass(frozen=True)
class Trainable:
    """Contents of the file."""

    tensors: Mapping[str, Tensor]
    """{name on the hub: tensor}."""
    modalities: dict[str, ModalityConfig]
    """{modality: its patch embedding and preprocessing}."""
    base_fingerprint: str | None
    """SHA-256 of the weights that the run was trained on; None in an adapter from elsewhere, which does not say it."""
    template: Template | None = None
    """Conversation template of the training data."""
    untrained: Mapping[str, str] = field(default_factory=dict)
    """{modality or component: reason} for those whose weights are untrained."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """{weight: factor of the product B·A of its adapter}, 1 for others."""
    unties: bool = False
    """Whether embeddings are replaced, but not the head that was tied to them."""


def open_trainable(path: Path) -> Trainable:
    """Read the header of a file. Raises CheckpointError if it is damaged or another kind of safetensors file."""
    tensors, metadata = open_safetensors(path)
    return parse_header(path, {hub_name(name): tensor for name, tensor in tensors.items()}, metadata)


def parse_header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Trainable:
    """Return the contents of a file from its tensors, by their names on the hub, and what its header states.

    Raises CheckpointError if the header lacks a field or is damaged.
    """
    remedy = "expected a file of `umbrella-jax convert to-hf --trainable-only` or `--adapter`"
    if missing := [key for key in _STATED if key not in metadata]:
        raise CheckpointError(f"{path}: its header does not say {' and '.join(missing)}; {remedy}")
    stated, fingerprint = (metadata[key] for key in _STATED)
    modalities = parse_json(stated, f"{path}: modalities", CheckpointError, remedy)
    config = parse_config({"model": {"modalities": modalities}}, Origins(str(path))).model.modalities
    template: Any = metadata.get("template")  # checked by `config_json.stored_template`
    random: Any = parse_json(metadata.get("untrained", "{}"), f"{path}: untrained", CheckpointError, remedy)
    # `untrained` is checked by `config_json.stored_untrained`
    return Trainable(tensors, config, fingerprint, template, random)


def write_trainable(path: Path, trainable: Trainable) -> None:
    """Write a file for `open_trainable`."""
    write_safetensors(path, trainable.tensors, make_header(trainable), record=True)


def make_header(trainable: Trainable) -> dict[str, str]:
    """Return what the header of a file states, for `parse_header`."""
    modalities = {name: to_dict(modality) for name, modality in trainable.modalities.items()}
    header = {"modalities": json.dumps(modalities), "base_fingerprint": str(trainable.base_fingerprint)}
    if trainable.template is not None:
        header["template"] = trainable.template
    if trainable.untrained:
        header["untrained"] = json.dumps(dict(trainable.untrained))
    return header
