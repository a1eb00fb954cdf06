"""Decide which voxels of a volume are background, by the configuration or from the voxels themselves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.console import plural
from umbrella_jax.errors import DataError

BELOW = 0.05
"""Fraction of the intensity below 0 up to which `auto` takes voxels at 0 or below as background. Resampling leaves far
less (ringing at the edge of the head), a volume without its mean half."""
SHARED = 0.05
"""Fraction of the voxels that must share a value for `auto` to take it as the background."""


@dataclass(frozen=True)
class Background:
    """The background of one volume, or of one window of a run."""

    rule: Literal["nonpositive", "lowest"] | float
    """As `background` of the modality, but decided."""
    value: float
    """In the file."""
    below: float
    """Fraction of the intensity that is below 0: Σ|x < 0| / Σ|x|."""
    shared: float
    """Fraction of the voxels that have `value`; in a run, in every frame."""
    level: float | None = None
    """In the preprocessed array; None: its lowest value."""

    @property
    def remarkable(self) -> bool:
        """Whether it differs from the usual case: few voxels or none are below 0, and those are background."""
        return self.rule != "nonpositive" or self.below > BELOW

    @property
    def name(self) -> str:
        """The rule, for messages."""
        if self.rule == "nonpositive":
            return "voxels at 0 or below"
        return "the lowest value" if self.rule == "lowest" else f"the value {self.rule:g}"

    def mask(self, data: np.ndarray) -> np.ndarray:
        """Return which voxels of (D, H, W) or (D, H, W, T) are background.

        With `nonpositive` each voxel of a frame counts for itself, as in the original. A value must be there in every
        frame, since a signal without its mean passes through any value.
        """
        if self.rule == "nonpositive":
            return data <= 0
        return _has(data, self.value)


Remark = tuple[Path, ModalityConfig, int, Background]
"""File, modality, window, and a background that is `remarkable`."""
Note = Callable[[Path, ModalityConfig, int, Background], object]
"""Is given each `Remark` about what is preprocessed."""


def ignore(path: Path, config: ModalityConfig, window: int, background: Background) -> None:
    """A `Note` that drops everything."""


def find_background(data: np.ndarray, config: ModalityConfig) -> Background | None:
    """Return the background of `data`, (D, H, W) or (D, H, W, T) as stored; None if `auto` cannot decide."""
    lowest = float(data.min())
    below = _below(data) if lowest < 0 else 0.0
    rule = config.background
    if rule == "nonpositive" or (rule == "auto" and below <= BELOW):
        return Background("nonpositive", 0.0, below, 0.0)
    if rule == "lowest":
        return Background("lowest", lowest, below, _share(data, lowest))
    if rule != "auto":
        return Background(rule, rule, below, _share(data, rule))
    zero, last = (
        Background(0.0, 0.0, below, _share(data, 0.0)),
        Background("lowest", lowest, below, _share(data, lowest)),
    )
    found = max(zero, last, key=lambda background: background.shared)
    return found if found.shared >= SHARED else None


def level_of(background: Background | None, config: ModalityConfig) -> float | None:
    """Return the background's value in a preprocessed volume, None for its lowest; `background` None: the usual one."""
    if background is not None and background.rule != "nonpositive":
        return background.level
    return 0.0 if config.scaling == "znorm_zeroback" else None


def undecided(path: str | Path, data: np.ndarray) -> DataError:
    """Return the error about a volume whose background `auto` cannot find."""
    return DataError(
        f"{path}: {_below(data):.0%} of its intensity is below 0, and few voxels share the value 0 or the lowest one, "
        f"{data.min():.4g}, so its background is unknown; set background of the modality to nonpositive, lowest or a "
        "number, or mask the volume with 0"
    )


def _below(data: np.ndarray) -> float:
    negative, positive = (-data.sum(where=data < 0, dtype=np.float64), data.sum(where=data > 0, dtype=np.float64))
    return float(negative / (negative + positive))


def _has(data: np.ndarray, value: float) -> np.ndarray:
    equal = data == value
    return equal.all(axis=-1) if data.ndim == 4 else equal


def _share(data: np.ndarray, value: float) -> float:
    return float(_has(data, value).mean())


def contradiction(background: Background) -> str | None:
    """Return why the rule in force does not fit the volume; None if it does."""
    if background.rule == "nonpositive" and background.below > BELOW:
        return (
            f"{background.below:.0%} of its intensity is below 0 and becomes background, as background: nonpositive "
            "says; expected auto, lowest or a number"
        )
    if background.rule != "nonpositive" and not background.shared:
        return f"no voxel has the value {background.value:.6g}, which background says; expected auto or another number"
    return None


def decision(background: Background) -> str:
    """Return what was taken as the background of one volume, and why."""
    value = f"{background.value:.4g}, " if background.rule == "lowest" else ""
    return (
        f"{background.below:.0%} of its intensity is below 0: background is {background.name} "
        f"({value}{background.shared:.0%} of its voxels)"
    )


def mixture(modality: str, found: Mapping[Path, Background], total: int) -> str | None:
    """Return that the volumes of a modality are read by different rules; None if they are not.

    Args:
        found: the remarkable ones of `total` volumes.
    """
    rules: dict[str, list[Path]] = {}
    for path, background in found.items():
        rules.setdefault(background.name, []).append(path)
    counts = {name: f"{name} in {len(paths)} (such as {paths[0]})" for name, paths in rules.items()}
    usual = total - len(found)
    if usual and "voxels at 0 or below" not in counts:
        counts["voxels at 0 or below"] = f"voxels at 0 or below in {usual}"
    if len(counts) < 2:
        return None
    return (
        f"background differs between the {modality} volumes: {', '.join(counts.values())}; expected volumes prepared "
        f"alike, or one rule, model.modalities.{modality}.background"
    )


def uneven(remarks: Iterable[Remark], windows: Mapping[tuple[Path, ModalityConfig], int]) -> dict[Path, str]:
    """Return {run: message} for runs whose windows `auto` reads by different rules.

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


def summary(modality: str, found: Mapping[Path, Background], total: int) -> list[str]:
    """Return what to say about the backgrounds of a modality's volumes, in a few lines; arguments as of `mixture`."""
    lines = []
    for describe in (contradiction, lambda background: None if contradiction(background) else decision(background)):
        texts = {path: text for path, background in found.items() if (text := describe(background))}
        lines += [
            f"{modality}: {path}: {text}"
            + (f"; {plural(len(texts) - 1, 'more volume')} like it" if len(texts) > 1 else "")
            for path, text in list(texts.items())[:1]
        ]
    mixed = mixture(modality, found, total)
    return lines + ([mixed] if mixed else [])


def by_modality(
    remarks: Iterable[Remark], modalities: Mapping[str, ModalityConfig]
) -> dict[str, dict[Path, Background]]:
    """Return {modality: {file: background of its first remarkable window}} of what a `Note` was given.

    Without those that are resized: their background only matters to augmentation and to maps.
    """
    found: dict[str, dict[Path, Background]] = {}
    for path, config, _, background in sorted(remarks, key=lambda remark: (remark[0], remark[2])):  # threads made them
        for name, other in modalities.items():
            if config == other and config.mode != "resize":
                found.setdefault(name, {}).setdefault(path, background)
    return found
