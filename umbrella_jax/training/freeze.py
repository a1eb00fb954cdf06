"""Decide which parameters train. Gradients, optimiser labels, dtypes, checkpoints and the log all follow this.

Every parameter gets a label: `FROZEN`, or the name of the group in the config that trains it. Parameters of a patch
embedding get the label `group/modality`, because a step leaves the modalities that it does not show untouched.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

from umbrella_jax.config.schema import LORA
from umbrella_jax.console import plural
from umbrella_jax.errors import ConfigError, RunError
from umbrella_jax.models.paths import COMPONENTS, FROZEN, UNUSED, adapted_weight, component_of, modality_of

TOTAL = "total"
"""The sums in `counts`."""
T = TypeVar("T")


def is_reached(path: str, shown: Collection[str]) -> bool:
    """Return whether a parameter gets a gradient from conversations that show volumes of the modalities `shown`."""
    modality = modality_of(path)
    return modality in shown if modality else bool(shown) or component_of(path) == "language_model"


def _covers(group: str, path: str) -> bool:
    """Return whether a group of the config covers a parameter.

    Adapters are covered only by `lora` and by patterns that contain `lora_`.
    """
    if adapted_weight(path) is not None:
        return group == LORA or ("lora_" in group and fnmatchcase(path, group))
    return fnmatchcase(path, COMPONENTS.get(group, group))


def label_params(paths: Collection[str], groups: Collection[str]) -> dict[str, str]:
    """Return the label of every parameter.

    Args:
        groups: names from `COMPONENTS`, `lora`, or patterns of parameter paths.

    Raises:
        ConfigError: there is no group; a group covers no parameter; two groups cover the same one; a group covers a
            parameter that cannot reach the loss; an adapter is frozen; or an adapter and its weight both train.
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
            faults.append(f"model.lora: {weight} trains as a whole ({labels[weight]}); train either it or its adapter")
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
    """Split parameters into trainable and frozen ones."""
    trainable = {path: leaf for path, leaf in params.items() if labels[path] != FROZEN}
    frozen = {path: leaf for path, leaf in params.items() if labels[path] == FROZEN}
    return trainable, frozen


def as_trainable(params: Mapping[str, Shaped[Array, "..."]]) -> dict[str, Float32[Array, "..."]]:
    """Return float32 copies of parameters.

    Updates of 1e-5 would round to nothing in bfloat16. They are always copies, because the step reuses their memory.
    """
    return {path: jnp.array(leaf, jnp.float32, copy=True) for path, leaf in params.items()}


def counts(
    params: Mapping[str, jax.ShapeDtypeStruct | jax.Array], labels: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Return {component: (number of trainable values, number of frozen values)}.

    `lora` is a component of its own if there are adapters; the last entry is `TOTAL`.
    """
    sizes = {name: [0, 0] for name in [*COMPONENTS, *([LORA] if any(map(adapted_weight, params)) else []), UNUSED]}
    for path, leaf in params.items():
        part = LORA if adapted_weight(path) else component_of(path)
        sizes[part][labels[path] == FROZEN] += math.prod(leaf.shape)
    sizes[TOTAL] = [sum(column) for column in zip(*sizes.values(), strict=True)]
    return {name: (trains, frozen) for name, (trains, frozen) in sizes.items()}


@dataclass(frozen=True, kw_only=True)
class FreezeCheck:
    """One check of a run's trainable and frozen parameters."""

    name: str
    result: str
    """`passed`. For the patch embedding also `in part` and `not requested`, if `train.groups` leaves modalities out."""
    detail: str


def check_state(
    groups: Collection[str],
    paths: Collection[str],
    *,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    opt_state: Any,
    frozen_dtype: str = "auto",
) -> list[FreezeCheck]:
    """Check that the parameters that `groups` cover train, and no others. Arrays may be abstract (`jax.eval_shape`).

    Args:
        groups: as in `label_params`.
        paths: all parameters of the model.
        trainable: {path: array} that the step differentiates.
        frozen: {path: array} that it only reads.
        opt_state: the optimiser's state, whose moments are dicts by path.
        frozen_dtype: type that frozen arrays must have; `auto` for any. Quantized weights have their own, and so have
            patch embeddings, which may be newly initialised.

    Raises:
        RunError: naming each parameter that fails.
    """
    covered = {path for path in paths if any(_covers(group, path) for group in groups)}
    moments: dict[str, list[Any]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        if isinstance(keys[-1], jax.tree_util.DictKey):
            moments.setdefault(keys[-1].key, []).append(leaf)
    faults = []
    for path in dict.fromkeys([*paths, *trainable, *frozen, *moments]):
        trains, own_moments = path in covered, moments.get(path, [])
        if (path in trainable) != trains or (path in frozen) == trains:
            faults.append(
                f"{path}: train.groups {'covers' if trains else 'does not cover'} it, against the run's state"
            )
        if len(own_moments) != 2 * trains:
            faults.append(f"{path}: the optimiser keeps {len(own_moments)} moments, expected {2 * trains}")
        for leaf in [*own_moments, *([trainable[path]] if path in trainable else [])]:
            if leaf.dtype != jnp.float32:
                faults.append(f"{path}: trains in {leaf.dtype.name}, expected float32")
        has_own_type = path not in frozen or modality_of(path) or hasattr(frozen[path], "qvalue")
        if not has_own_type and frozen_dtype not in ("auto", frozen[path].dtype.name):
            faults.append(f"{path}: is frozen in {frozen[path].dtype.name}, expected {frozen_dtype}")
    if faults:
        raise RunError([f"{fault}; this is a bug in umbrella-jax, and nothing was trained" for fault in faults])
    return [
        _check_patch_embed(paths, covered),
        FreezeCheck(
            name="trainable parameters match train.groups",
            result="passed",
            detail=f"{plural(len(trainable), 'tensor')}, in float32",
        ),
        FreezeCheck(
            name="everything else is frozen", result="passed", detail=f"{plural(len(frozen), 'tensor')}, no moments"
        ),
    ]


def _check_patch_embed(paths: Collection[str], covered: Collection[str]) -> FreezeCheck:
    sizes: dict[str, list[bool]] = {}
    for path in paths:
        if modality := modality_of(path):
            sizes.setdefault(modality, []).append(path in covered)
    named = [
        modality if all(trains) else f"{modality} ({sum(trains)} of {len(trains)} tensors)"
        for modality, trains in sizes.items()
        if any(trains)
    ]
    others = [modality for modality, trains in sizes.items() if not any(trains)]
    result = "passed" if all(map(all, sizes.values())) else "in part" if named else "not requested"
    detail = "; ".join([*([", ".join(named)] if named else []), *([f"frozen: {', '.join(others)}"] if others else [])])
    return FreezeCheck(name="the patch embedding is trainable", result=result, detail=detail)
