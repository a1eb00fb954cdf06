"""Decide which voxels of a volume are background, by the configuration or from the voxels themselves.

`preprocess` in `umbrella_jax.data.volume` asks for the background of each volume. Unusual backgrounds are collected as
`Remark`s, and the functions at the end of this file describe them to the user.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.console import plural
from umbrella_jax.errors import DataError

BELOW = 0.05
"""Largest fraction of the intensity below 0 for which `auto` takes voxels at 0 or below as background. Ringing from
resampling, at the edge of the head, makes far less; a volume without its mean has half."""
SHARED = 0.05
"""Smallest fraction of the voxels with one value for which `auto` takes this value as the background."""


@dataclass(frozen=True)
class Background:
    """The background of one volume, or of one window of a run."""

    rule: Literal["nonpositive", "lowest"] | float
    """`background` of the modality, with `auto` decided."""
    value: float
    """Its value in the file."""
    below: float
    """Fraction of the intensity below 0: Σ|x < 0| / Σ|x|."""
    shared: float
    """Fraction of the voxels that have `value`; in a run, those that have it in every frame."""
    level: float | None = None
    """Its value in the preprocessed array; None means the lowest one."""

    @property
    def is_unusual(self) -> bool:
        """Whether it differs from the usual case: voxels at 0 or below, with at most BELOW of the intensity below 0."""
        return self.rule != "nonpositive" or self.below > BELOW

    @property
    def name(self) -> str:
        """The rule in words, for messages."""
        if self.rule == "nonpositive":
            return "voxels at 0 or below"
        return "the lowest value" if self.rule == "lowest" else f"the value {self.rule:g}"

    def mask(self, data: np.ndarray) -> np.ndarray:
        """Return the mask of the background: bool, of the shape of `data`, or (D, H, W) of a run with one value.

        With `nonpositive`, the frames of a run are independent, as in the original. Otherwise a voxel is background
        only if it has the value in every frame, because a demeaned time course can equal any value in a single frame.
        """
        if self.rule == "nonpositive":
            return data <= 0
        return _has(data, self.value)


Remark = tuple[Path, ModalityConfig, int, Background]
"""(file, modality, window, background): a background that `is_unusual`."""
Note = Callable[[Path, ModalityConfig, int, Background], object]
"""A callback that receives each `Remark` about a preprocessed volume."""


def ignore(path: Path, config: ModalityConfig, window: int, background: Background) -> None:
    """Drop a remark: the default `Note`."""


def find_background(data: np.ndarray, config: ModalityConfig) -> Background | None:
    """Find the background of stored voxels, (D, H, W) or (D, H, W, T). Return None if `auto` cannot decide."""
    lowest = float(data.min())
    below = _below(data) if lowest < 0 else 0.0
    rule = config.background
    if rule == "nonpositive" or (rule == "auto" and below <= BELOW):
        return Background("nonpositive", 0.0, below, 0.0)
    if rule == "lowest":
        return Background("lowest", lowest, below, _share(data, lowest))
    if rule != "auto":
        return Background(rule, rule, below, _share(data, rule))
    candidates = (
        Background(0.0, 0.0, below, _share(data, 0.0)),
        Background("lowest", lowest, below, _share(data, lowest)),
    )
    best = max(candidates, key=lambda background: background.shared)
    return best if best.shared >= SHARED else None


def background_level(background: Background | None, config: ModalityConfig) -> float | None:
    """Return the background's value in a preprocessed volume; None means the lowest value.

    Args:
        background: None for the usual one.
    """
    if background is not None and background.rule != "nonpositive":
        return background.level
    return 0.0 if config.scaling == "znorm_zeroback" else None


def unknown_background(path: str | Path, data: np.ndarray) -> DataError:
    """Return the error for a volume whose background `auto` cannot find."""
    return DataError(
        f"{path}: {_below(data):.0%} of its intensity is below 0, and few voxels share the value 0 or the lowest one, "
        f"{data.min():.4g}, so its background is unknown; set background of the modality to nonpositive, lowest or a "
        "number, or mask the volume with 0"
    )


def _below(data: np.ndarray) -> float:
    """Return the fraction of the intensity below 0."""
    negative, positive = (-data.sum(where=data < 0, dtype=np.float64), data.sum(where=data > 0, dtype=np.float64))
    return float(negative / (negative + positive))


def _has(data: np.ndarray, value: float) -> np.ndarray:
    """Return the mask of voxels that have a value; in a run, in every frame."""
    equal = data == value
    return equal.all(axis=-1) if data.ndim == 4 else equal


def _share(data: np.ndarray, value: float) -> float:
    return float(_has(data, value).mean())


def describe_conflict(background: Background) -> str | None:
    """Return why the configured rule does not fit the volume; None if it fits."""
    if background.rule == "nonpositive" and background.below > BELOW:
        return (
            f"{background.below:.0%} of its intensity is below 0 and becomes background, as background: nonpositive "
            "says; expected auto, lowest or a number"
        )
    if background.rule != "nonpositive" and not background.shared:
        return f"no voxel has the value {background.value:.6g}, which background says; expected auto or another number"
    return None


def describe_choice(background: Background) -> str:
    """Return which background of a volume was chosen, and why."""
    value = f"{background.value:.4g}, " if background.rule == "lowest" else ""
    return (
        f"{background.below:.0%} of its intensity is below 0: background is {background.name} "
        f"({value}{background.shared:.0%} of its voxels)"
    )


def describe_mixture(modality: str, unusual: Mapping[Path, Background], total: int) -> str | None:
    """Return the message for a modality whose volumes are read by different rules; None if all have the same rule.

    Args:
        unusual: {file: its background}, for those that are unusual.
        total: number of all volumes.
    """
    rules: dict[str, list[Path]] = {}
    for path, background in unusual.items():
        rules.setdefault(background.name, []).append(path)
    counts = {name: f"{name} in {len(paths)} (such as {paths[0]})" for name, paths in rules.items()}
    usual = total - len(unusual)
    if usual and "voxels at 0 or below" not in counts:
        counts["voxels at 0 or below"] = f"voxels at 0 or below in {usual}"
    if len(counts) < 2:
        return None
    return (
        f"background differs between the {modality} volumes: {', '.join(counts.values())}; expected volumes prepared "
        f"alike, or one rule, model.modalities.{modality}.background"
    )


def describe_mixed_windows(
    remarks: Iterable[Remark], windows: Mapping[tuple[Path, ModalityConfig], int]
) -> dict[Path, str]:
    """Return {run: message} for the runs in which `auto` chose different rules for different windows.

    Args:
        windows: {(file, modality): number of its windows}.
    """
    rules: dict[tuple[Path, ModalityConfig], list[str]] = {}
    for path, config, _, background in remarks:
        rules.setdefault((path, config), []).append(background.name)
    return {
        path: f"background is {' or '.join(sorted({*names}))} in {len(names)} of its {windows[path, config]} windows, "
        "and voxels at 0 or below in the others; set background of the modality to one rule"
        for (path, config), names in sorted(rules.items(), key=lambda item: item[0][0])
        if config.background == "auto" and len(names) < windows.get((path, config), 0)
    }


def summarize_backgrounds(modality: str, unusual: Mapping[Path, Background], total: int) -> list[str]:
    """Return a few lines about the unusual backgrounds of a modality. Arguments as for `describe_mixture`."""
    lines = []
    conflicts = {path: text for path, background in unusual.items() if (text := describe_conflict(background))}
    choices = {path: describe_choice(background) for path, background in unusual.items() if path not in conflicts}
    for texts in (conflicts, choices):
        lines += [
            f"{modality}: {path}: {text}"
            + (f"; {plural(len(texts) - 1, 'more volume')} like it" if len(texts) > 1 else "")
            for path, text in list(texts.items())[:1]
        ]
    mixture = describe_mixture(modality, unusual, total)
    return lines + ([mixture] if mixture else [])


def group_by_modality(
    remarks: Iterable[Remark], modalities: Mapping[str, ModalityConfig]
) -> dict[str, dict[Path, Background]]:
    """Group remarks: {modality: {file: background of its first unusual window}}.

    Modalities with mode `resize` are left out: there the background only matters for augmentation and maps.
    """
    groups: dict[str, dict[Path, Background]] = {}
    for path, config, _, background in sorted(remarks, key=lambda remark: (remark[0], remark[2])):  # from many threads
        for name, other in modalities.items():
            if config == other and config.mode != "resize":
                groups.setdefault(name, {}).setdefault(path, background)
    return groups
