"""Find the scans of each modality of a study, by BIDS names or by a pattern."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from umbrella_jax.config.schema import resolve_modality
from umbrella_jax.data.bids.scans import (
    MODALITIES,
    EntitySelection,
    IgnoredFiles,
    choose_scans,
    left_out,
    list_images,
    readable_images,
)
from umbrella_jax.errors import ConfigError, DataError, why_not_a_directory
from umbrella_jax.study.patterns import find_matches, names_in
from umbrella_jax.study.schema import ScansConfig
from umbrella_jax.study.tables import SUBJECT, VISIT
from umbrella_jax.study.visits import Scan

_PLACES = {name: (folder, suffix) for name, (folder, suffix, _) in MODALITIES.items()} | {
    "dMRI": ("dwi", "dwi"),
    "T2": ("anat", "T2w"),
    "FLAIR": ("anat", "FLAIR"),
}
"""{modality: (BIDS folder, suffix)}, unless a study names them as the entities datatype and suffix."""
_IMAGES = (".nii", ".nii.gz", ".mgz", ".mgh", ".npy", ".pt", ".img", ".hdr")


@dataclass(frozen=True, slots=True)
class FoundScan:
    """A scan, and whose it is."""

    subject: str
    """Label without `sub-`."""
    visit: str | None
    """Label without `ses-`; None if the path has none."""
    scan: Scan


def find_modality(
    modality: str, config: ScansConfig, root: Path, notes: list[str], *, key: str, subjects: Collection[str]
) -> list[FoundScan]:
    """Return the scans of one modality, sorted by path.

    Args:
        modality: as the study names it.
        config: where its scans are.
        root: the study's root.
        notes: receives a line about every reason to leave files out, each starting with the modality.
        key: another name for the subject's placeholder: the key of the first table.
        subjects: its labels, without `sub-`, which decide if a pattern can match a path in several ways.

    Raises:
        ConfigError, DataError: a faulty choice, or no scan; the message begins with `scans.MODALITY`.
    """
    own_notes = list[str]()
    try:
        if config.bids is not None:
            scans = _find_bids(modality, config, config.bids, root, own_notes)
        else:
            scans = _find_pattern(modality, str(config.pattern), root, own_notes, key=key, subjects=subjects)
    except (ConfigError, DataError) as error:
        place = f"scans.{modality}"
        raise DataError([f"{place}: {fault.removeprefix(f'{place}.')}" for fault in error.faults]) from None
    notes += [f"{modality}: {note}" for note in own_notes]
    return scans


def _find_bids(modality: str, config: ScansConfig, folder: str, root: Path, notes: list[str]) -> list[FoundScan]:
    base = root / folder
    if not base.is_dir():
        raise DataError(
            f"bids: {base}: {why_not_a_directory(base)}; expected a BIDS data set, or a derivative's folder"
        )
    kind, suffix = _PLACES.get(resolve_modality(modality, MODALITIES) or modality, ("*", None))
    selected: dict[str, Collection[str]] = dict(config.entities)
    if own_suffix := selected.pop("suffix", None):
        kind, suffix = "*", "".join(own_suffix) if len(own_suffix) == 1 else None
    if own_kind := selected.pop("datatype", None):
        kind = "".join(own_kind) if len(own_kind) == 1 else "*"
    if suffix is None:
        raise ConfigError(f"entities.suffix: expected one, such as T2w; {modality} is none of {', '.join(_PLACES)}")
    ignored = IgnoredFiles(base, _data_set(base))
    names = list_images(base, kind, suffix)
    if excluded := [name for name in names if ignored.has(name)]:
        notes.append(left_out("files that .bidsignore excludes", excluded))
        names = sorted(set(names) - set(excluded))
    option = f"scans.{modality}.entities: {{{{{{}}: {{}}}}}}"
    selection = EntitySelection(selected, config.exclude, option, "a list keeps several")
    scans = choose_scans(names, base, (kind, suffix), selection, notes)
    prefix = _study_path(str(base), root)
    prefix += "/" if prefix else ""
    return [
        FoundScan(s.entities["sub"], s.entities.get("ses"), Scan(f"{prefix}{s.path}", modality, s.entities))
        for s in scans
    ]


def _data_set(base: Path) -> Path:
    """Return the data set that a derivative's folder belongs to, and otherwise the folder itself."""
    return next((folder.parent for folder in base.parents if folder.name == "derivatives"), base)


def _find_pattern(
    modality: str, pattern: str, root: Path, notes: list[str], *, key: str, subjects: Collection[str]
) -> list[FoundScan]:
    subject_names = [name for name in names_in(pattern) if name in (SUBJECT, key)]
    if len(subject_names) != 1:
        either = SUBJECT if key == SUBJECT else f"{SUBJECT}}} or {{{key}"
        raise ConfigError(f"pattern: {pattern}: expected {{{either}}} for the subject, once or repeated")
    try:
        matches = find_matches(pattern, root, lambda names: names[subject_names[0]].removeprefix("sub-") in subjects)
    except (ConfigError, DataError) as error:
        raise DataError([f"pattern: {fault}" for fault in error.faults]) from None
    names_of = {_study_path(path, root): names for path, names in matches.items()}
    images = [p for p in names_of if p.lower().endswith(_IMAGES) or os.path.isdir(os.path.join(root, p))]
    if len(images) < len(names_of):
        notes.append(left_out("files that are no images", sorted(names_of.keys() - set(images))))
    kept = readable_images(images, root, notes)
    if not kept:
        raise DataError("; ".join([f"pattern: {pattern}: no scan", *notes]))
    scans = []
    for path in sorted(kept):
        labels = dict(names_of[path])
        subject, visit = labels.pop(subject_names[0]), labels.pop(VISIT, None)
        visit = None if visit is None else visit.removeprefix("ses-")
        scans.append(FoundScan(subject.removeprefix("sub-"), visit, Scan(path, modality, labels)))
    return scans


def _study_path(path: str, root: Path) -> str:
    """Return a path relative to the study's root if it is inside, empty for the root itself, else absolute."""
    if ".." in path.removeprefix(str(root)).split("/"):  # the parent of where a linked folder really is
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        folder = os.path.realpath(root)
    else:
        path, folder = os.path.abspath(path), os.path.abspath(root)
    return path[len(folder) + 1 :] if f"{path}/".startswith(f"{folder}/") else path
