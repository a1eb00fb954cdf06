"""The one rule of what trains: it feeds gradients, optimiser labels, dtypes, checkpoints and the log.

Every parameter gets a label: `FROZEN`, or the name of the group in the config that trains it. Parameters of a
patch embedding are labelled `group/modality`, since a modality that is absent from a step is left untouched.
"""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

import jax
import jax.numpy as jnp

from umbrella_jax.config.schema import LORA
from umbrella_jax.errors import ConfigError
from umbrella_jax.models.paths import COMPONENTS, FROZEN, UNUSED, adapted_weight, component_of, modality_of

T = TypeVar("T")


def is_reached(path: str, shown: Collection[str]) -> bool:
    """Return whether a parameter gets a gradient from conversations that show volumes of the modalities `shown`."""
    modality = modality_of(path)
    return modality in shown if modality else bool(shown) or component_of(path) == "language_model"


def _covers(group: str, path: str) -> bool:
    """Whether a group of the config means a parameter; adapters are meant by `lora`, and by patterns that say so."""
    if adapted_weight(path) is not None:
        return group == LORA or ("lora_" in group and fnmatchcase(path, group))
    return fnmatchcase(path, COMPONENTS.get(group, group))


def label_params(paths: Collection[str], groups: Collection[str]) -> dict[str, str]:
    """The label of every parameter, for the groups that the config names: of `COMPONENTS`, `lora`, or path patterns.

    Raises ConfigError when nothing trains, when a group covers no parameter, when two cover the same one, when one
    covers a parameter that cannot reach the loss, and for an adapter that is frozen or beside a weight that is not.
    """
    labels, faults = {}, []
    for path in paths:
        covering = [group for group in groups if _covers(group, path)]
        if len(covering) > 1:
            faults.append(f"train.groups: {path} is covered by {' and '.join(covering)}; let one of them cover it")
        if covering and component_of(path) == UNUSED:
            faults.append(f"train.groups: {covering[0]} covers {path}, which LLaVA does not use: it cannot train")
        modality = modality_of(path)
        labels[path] = FROZEN if not covering else f"{covering[0]}/{modality}" if modality else covering[0]
    for path, label in labels.items():
        weight = adapted_weight(path)
        if weight is None:
            continue
        if label == FROZEN:
            faults.append(f"model.lora: {path} does not train; let a group cover it (lora all), or name fewer targets")
        if labels[weight] != FROZEN and path.endswith("lora_A.weight"):
            faults.append(f"model.lora: {weight} trains as a whole ({labels[weight]}); let it, or an adapter beside it")
    for group in groups:
        if not any(_covers(group, path) for path in paths):
            names = ", ".join([*COMPONENTS, LORA])
            faults.append(
                f"train.groups: {group} covers no parameter; expected {names} or a pattern of parameter paths"
            )
    if not groups:
        faults.append("train.groups: nothing trains; name a group, such as patch_embed")
    if faults:
        raise ConfigError(faults)
    return labels


def partition(params: Mapping[str, T], labels: Mapping[str, str]) -> tuple[dict[str, T], dict[str, T]]:
    """Splits parameters into those that train and those that are frozen."""
    trainable = {path: leaf for path, leaf in params.items() if labels[path] != FROZEN}
    frozen = {path: leaf for path, leaf in params.items() if labels[path] == FROZEN}
    return trainable, frozen


def as_trainable(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Float32 copies: updates of 1e-5 round away in bfloat16. Copies, since the step gives their buffers away."""
    return {path: jnp.array(leaf, jnp.float32, copy=True) for path, leaf in params.items()}


def counts(
    params: Mapping[str, jax.ShapeDtypeStruct | jax.Array], labels: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """{component, `lora` where there are adapters, and at last `total`: how many numbers of it train, and how many are
    frozen}."""
    found = {name: [0, 0] for name in [*COMPONENTS, *([LORA] if any(map(adapted_weight, params)) else []), UNUSED]}
    for path, leaf in params.items():
        part = LORA if adapted_weight(path) else component_of(path)
        found[part][labels[path] == FROZEN] += math.prod(leaf.shape)
    found["total"] = [sum(column) for column in zip(*found.values(), strict=True)]
    return {name: (trains, frozen) for name, (trains, frozen) in found.items()}


def summary(params: Mapping[str, jax.ShapeDtypeStruct | jax.Array], labels: Mapping[str, str]) -> str:
    """The freezing summary: per component how many numbers train and are frozen, and the names of those that train."""
    lines = [f"{'component':<16}{'trainable':>16}{'frozen':>16}"]
    lines += [f"{name:<16}{trains:>16,}{frozen:>16,}" for name, (trains, frozen) in counts(params, labels).items()]
    for group in dict.fromkeys(label for label in labels.values() if label != FROZEN):
        lines.append(f"trains, {group}:")
        lines += [f"  {path}  {_times(leaf.shape)}" for path, leaf in params.items() if labels[path] == group]
    return "\n".join(lines)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
