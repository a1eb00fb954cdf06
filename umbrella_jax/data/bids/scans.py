"""Find the scans of a BIDS data set by their file names."""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from umbrella_jax.console import plural
from umbrella_jax.data.ignore_file import IgnoreFile
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.io.reading import read_text

MODALITIES = {"sMRI": ("anat", "T1w", "t1_0.5b"), "fMRI": ("func", "bold", "rsfmri_0.5b")}
"""{modality: (folder, suffix of its files, config to train it with)}."""
_REPEATS = ("sub", "ses", "run", "task", "dir")
"""Entities that distinguish repeated measurements, all of which are used. Others distinguish variants of one."""
_NONE = "none"
"""The value by which `--entity` selects scans without the entity."""
_NAMES_SHOWN = 20
_LABEL = re.compile("([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)_")
_LABELS = re.compile(f"({_LABEL.pattern})+")


@dataclass(frozen=True)
class BidsScan:
    """One image file of a subject."""

    path: str
    """Relative to the data set, as conversations give it."""
    entities: Mapping[str, str]
    """{key: label} from the file name, such as {"sub": "01", "run": "2"}."""

    @property
    def subject(self) -> str:
        """The subject's id, such as `sub-01`."""
        return f"sub-{self.entities['sub']}"

    @property
    def visit(self) -> str:
        """The subject and, if the name has one, the session: `sub-01 ses-2`."""
        return " ".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)


@dataclass(frozen=True)
class BidsFiles:
    """Files with the name of a scan, except those that .bidsignore excludes."""

    base: Path
    """The data set, or the derivatives in it."""
    names: Mapping[str, Sequence[str]]
    """{modality: paths in `base`, sorted}."""
    modalities: Mapping[str, frozenset[str]]
    """{sub-LABEL: modalities for which the data set itself has files}; empty sets for subjects in derivatives only."""


# Why not pybids: it indexes the whole tree into an SQL database and brings a dozen packages. Only the entities in file
# names are needed here.
def find_files(root: Path, derivatives: str | None, notes: list[str]) -> BidsFiles:
    """Find the files of every modality and the subjects of all derivatives.

    Files and subjects that the user did not ask for are included, because the split must not depend on the request.

    Args:
        root: the data set.
        derivatives: folder in `root`/derivatives whose files to list instead.
        notes: receives a line about excluded files.

    Raises:
        DataError: there is no such folder, or a .bidsignore has a faulty pattern.
    """
    base = root / "derivatives" / derivatives if derivatives else root
    if not base.is_relative_to(root) or ".." in base.relative_to(root).parts:
        raise DataError(f"derivatives {derivatives}: expected the name of a directory in {root / 'derivatives'}")
    if not base.is_dir():
        there = sorted(path.name for path in base.parent.glob("*") if path.is_dir()) if derivatives else []
        raise DataError(f"{base}: not found; expected a directory{', such as ' + ', '.join(there) if there else ''}")
    names: dict[str, list[str]] = {}
    modalities: dict[str, set[str]] = defaultdict(set)
    excluded: list[str] = []
    for folder in dict.fromkeys((base, root)):
        ignored = IgnoredFiles(folder, root)
        for modality, (kind, suffix, _) in MODALITIES.items():
            for name in list_images(folder, kind, suffix):
                if ignored.has(name):
                    excluded += [name] if folder == base else []
                    continue
                if folder == root:
                    modalities[name.partition("/")[0]].add(modality)
                if folder == base:
                    names.setdefault(modality, []).append(name)
    derived = (*root.glob("derivatives/*/sub-*"), *(base.glob("sub-*") if derivatives else ()))
    modalities |= {name: set() for name in sorted({path.name for path in derived} - modalities.keys())}
    if excluded:
        notes.append(left_out("files that .bidsignore excludes", excluded))
    return BidsFiles(base, names, {subject: frozenset(own) for subject, own in modalities.items()})


def list_images(folder: Path, kind: str, suffix: str) -> list[str]:
    """Return the paths `sub-*/[ses-*/]kind/*_suffix.nii*` in a folder, sorted; `kind` may be `*`.

    `Path.glob` would take minutes for 100,000 files.
    """
    name = re.compile(rf"[^/]*_{re.escape(suffix)}\.nii[^/]*")
    paths = []
    for subject in _list_folder(str(folder), "sub-"):
        own = [subject, *(f"{subject}/{ses}" for ses in _list_folder(f"{folder}/{subject}", "ses-"))]
        for parent in own:
            for kind_folder in [kind] if kind != "*" else _list_folder(f"{folder}/{parent}"):
                if kind != "*" or not kind_folder.startswith("ses-"):
                    path = f"{parent}/{kind_folder}"
                    paths += [f"{path}/{file}" for file in _list_folder(f"{folder}/{path}") if name.fullmatch(file)]
    return sorted(paths)


def _list_folder(path: str, prefix: str = "") -> list[str]:
    """Return the names in a folder that begin with `prefix`; none if it is not a folder that can be read."""
    try:
        return [name for name in os.listdir(path) if name.startswith(prefix)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


class IgnoredFiles:
    """The files that .bidsignore excludes: the one in a folder, and the one of the data set that the folder is in.

    Raises:
        DataError: a faulty pattern.
    """

    def __init__(self, folder: Path, root: Path):
        self._files = [_read_ignore_file(place / ".bidsignore") for place in dict.fromkeys((root, folder))]

    def has(self, name: str) -> bool:
        """Return whether a file is excluded; `name` is its path in the folder."""
        return any(file.excludes(name) for file in self._files)


def _read_ignore_file(file: Path) -> IgnoreFile:
    if not file.is_file():
        return IgnoreFile(())
    text = read_text(file, DataError, 1 << 20, "expected patterns, one in each line")
    try:
        return IgnoreFile(text.splitlines())
    except ValueError as error:
        raise DataError(f"{file}: {error}; expected patterns as in .gitignore") from None


def find_scans(
    root: Path, files: BidsFiles, modality: str, selection: Sequence[str], notes: list[str]
) -> dict[str, list[BidsScan]]:
    """Select the scans of one modality.

    Args:
        root: the data set.
        files: from `find_files`.
        modality: a key of MODALITIES.
        selection: `KEY=VALUE` of the `--entity` flags.
        notes: receives a line about every reason to leave files out, and about subjects with several scans.

    Returns:
        {sub-LABEL: its scans}, both sorted.

    Raises:
        DataError: no scan is left.
        ConfigError: a flag that is not KEY=VALUE; or as `choose_scans`.
    """
    base = files.base
    folder, suffix, _ = MODALITIES[modality]
    named = _parse_selection(selection)
    scans = choose_scans(files.names.get(modality, ()), base, (folder, suffix), named, notes)
    prefix = "" if base == root else f"{base.relative_to(root).as_posix()}/"
    scans = [BidsScan(f"{prefix}{scan.path}", scan.entities) for scan in scans]
    by_subject = defaultdict(list)
    for scan in scans:
        by_subject[scan.subject].append(scan)
    several = [group for group in by_subject.values() if len(group) > 1]
    if several:
        differing = {key for group in several for key in _keys(group) if len(_labels(group, key)) > 1}
        choices = "; ".join(f"{key} {', '.join(_values(scans, key))}" for key in sorted(differing))
        notes.append(
            f"{plural(len(several), 'subject')} with several scans, all used; narrow with --entity KEY=VALUE: {choices}"
        )
    return dict(sorted(by_subject.items()))


def choose_scans(
    names: Iterable[str], base: Path, place: tuple[str, str], selection: "EntitySelection", notes: list[str]
) -> list[BidsScan]:
    """Return the files that have a BIDS name for their folder, can be read, and are selected.

    Without a selection of `part` only magnitudes are kept; without one of `task`, only resting-state runs.

    Args:
        names: paths in `base`.
        base: the data set, or the derivatives in it.
        place: (folder, suffix) of their names, such as (anat, T1w).
        selection: which entities to use.
        notes: receives a line about every reason to leave files out.

    Returns:
        Scans with their paths in `base`.

    Raises:
        DataError: no scan is left.
        ConfigError: an entity or value that no scan has, or several variants of one scan and no choice between them.
    """
    folder, suffix = place
    scans = _usable_scans(names, base, suffix, notes)
    scans = _select_scans(scans, base, folder == "func", selection, notes) if scans else scans
    if not scans:
        raise DataError("; ".join([f"{base}: no scan; expected sub-*/[ses-*/]{folder}/*_{suffix}.nii[.gz]", *notes]))
    return scans


def _usable_scans(names: Iterable[str], base: Path, suffix: str, notes: list[str]) -> list[BidsScan]:
    """Return the files with a BIDS name for their folder that are scans; `notes` receives a line about the others."""
    entities_of: dict[str, dict[str, str]] = {}
    misnamed: list[str] = []
    for name in names:
        *folders, file = name.split("/")
        entities = _entities(file, suffix)
        # A scan in another subject's folder could end up in two splits.
        owners = zip(("sub", "ses"), folders[:-1], strict=False)
        misplaced = entities is None or any(folder != f"{key}-{entities.get(key)}" for key, folder in owners)
        if misplaced and not file.startswith("."):
            misnamed.append(name)
        else:
            entities_of[name] = entities or {}
    if misnamed:
        notes.append(left_out("files without a BIDS name for their folder", misnamed))
    return [BidsScan(name, entities_of[name]) for name in readable_images(entities_of, base, notes)]


def readable_images(names: Iterable[str], base: Path, notes: list[str]) -> list[str]:
    """Return the files whose content is there; `notes` receives a line about the others.

    Args:
        names: paths in `base`, or absolute ones.
        base: folder.
    """
    rejected: dict[str, list[str]] = {
        "broken links; `datalad get` them": [],
        "pointers to files that were not downloaded; `datalad get` or `git lfs pull` them": [],
        "empty files": [],
        "hidden files": [],
        "X.nii beside X.nii.gz": [],
    }
    broken, pointers, empty, hidden, twins = rejected.values()
    names = list(names)
    kept: list[str] = []
    compressed = {name for name in names if name.endswith(".gz")}
    for name in names:
        path = os.path.join(base, name)
        if os.path.basename(name).startswith("."):  # such as macOS' ._sub-01_T1w.nii.gz
            hidden.append(name)
        elif (status := _status(path)) is None:
            broken.append(name)
        elif f"{name}.gz" in compressed:
            twins.append(name)
        elif not status.st_size:
            empty.append(name)
        elif status.st_size < 1024 and stat.S_ISREG(status.st_mode) and _is_pointer(path):
            pointers.append(name)
        else:
            kept.append(name)
    notes += [left_out(reason, own) for reason, own in rejected.items() if own]
    return kept


def _status(path: str) -> os.stat_result | None:
    """Return the status of a file, or None if its path or link leads nowhere."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_pointer(path: str) -> bool:
    """Return whether git-annex or git-lfs left a note in place of the file."""
    with open(path, "rb") as file:
        return file.read(64).startswith((b"/annex/objects/", b"version https://git-lfs"))


def _entities(name: str, suffix: str) -> dict[str, str] | None:
    """Return {"sub": "01", "run": "2"} for sub-01_run-2_T1w.nii.gz, None for a name that is not BIDS."""
    end = re.fullmatch(rf"(.*_){suffix}\.nii(\.gz)?", name)
    return dict(_LABEL.findall(end[1])) if end and _LABELS.fullmatch(end[1]) else None


def _keys(scans: Iterable[BidsScan]) -> set[str]:
    return {key for scan in scans for key in scan.entities}


def _labels(scans: Iterable[BidsScan], key: str) -> set[str | None]:
    return {scan.entities.get(key) for scan in scans}


def _values(scans: Iterable[BidsScan], key: str) -> list[str]:
    """Return the values that `--entity` may select a key by, sorted."""
    return sorted({scan.entities.get(key, _NONE) for scan in scans})


@dataclass(frozen=True)
class EntitySelection:
    """The requested values of BIDS entities, and how a user requests others."""

    values: Mapping[str, Collection[str]]
    """{entity: its value, or several}; `none` for names without it."""
    excluded: Mapping[str, Collection[str]] = field(default_factory=dict)
    """{entity: values that are left out}."""
    option: str = "--entity {}={}"
    """Text that chooses a value, with the entity and the value in braces."""
    repeat: str = "repeat the flag to keep several"

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, values in self.values.items() for value in values)


def _parse_selection(selection: Sequence[str]) -> EntitySelection:
    """Parse the KEY=VALUE of the `--entity` flags. Raise ConfigError for any other text."""
    values: dict[str, list[str]] = defaultdict(list)
    faults = []
    for text in selection:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            faults.append(f"--entity {text}: expected KEY=VALUE, such as ses=1 or acq=mprage")
        values[key].append(value)
    if faults:
        raise ConfigError(faults)
    return EntitySelection(values)


def _select_scans(
    scans: list[BidsScan], base: Path, functional: bool, selection: EntitySelection, notes: list[str]
) -> list[BidsScan]:
    """Keep the scans that have a selected value of every selected entity, and no excluded one, as `choose_scans`."""
    faults = []
    for values_of in (selection.values, selection.excluded):
        for key, value in ((key, value) for key, values in values_of.items() for value in values):
            if value not in _values(scans, key):
                there = (
                    f"{key} is {' or '.join(_values(scans, key))}" if key in _keys(scans) else f"names have no {key}"
                )
                faults.append(f"{selection.option.format(key, value)}: no scan has it; {there}")
    if faults:
        raise ConfigError(faults)
    decided = selection.values.keys() | selection.excluded.keys()
    kept = [s for s in scans if all(s.entities.get(key, _NONE) in values for key, values in selection.values.items())]
    if len(kept) < len(scans):
        notes.append(f"left out: scans that are not {selection} ({len(scans) - len(kept)})")
    if selection.excluded:
        number = len(kept)
        kept = [s for s in kept if not any(s.entities.get(k, _NONE) in vs for k, vs in selection.excluded.items())]
        names = " ".join(f"{key}={value}" for key, values in selection.excluded.items() for value in values)
        notes.append(f"left out: scans that are {names} ({number - len(kept)})")
    if "part" not in decided:
        others = [scan for scan in kept if scan.entities.get("part", "mag") != "mag"]
        kept = [scan for scan in kept if scan.entities.get("part", "mag") == "mag"]
        if others:
            parts = ", ".join(_values(others, "part"))
            notes.append(f"left out: parts of complex images other than the magnitude ({len(others)}): {parts}")
    if functional and "task" not in decided:
        others = [scan for scan in kept if not scan.entities.get("task", "").startswith("rest")]
        kept = [scan for scan in kept if scan.entities.get("task", "").startswith("rest")]
        if others:
            tasks, option = ", ".join(_values(others, "task")), selection.option.format("task", "VALUE")
            notes.append(f"left out: runs of other tasks ({len(others)}); {option} selects one: {tasks}")
    if faults := _variant_faults(kept, base, selection):
        raise ConfigError(faults)
    return kept


def _variant_faults(scans: Iterable[BidsScan], base: Path, selection: EntitySelection) -> list[str]:
    """Return a fault for every undecided entity in which variants of one scan differ: echo, reconstruction, space, ...

    If all variants were used, one measurement would count several times.
    """
    acquisitions = defaultdict(list)
    for scan in scans:
        acquisitions[tuple(scan.entities.get(key) for key in _REPEATS)].append(scan)
    variants: dict[str, list[BidsScan]] = defaultdict(list)
    for group in (group for group in acquisitions.values() if len(group) > 1):
        for key in _keys(group) - {*_REPEATS, *selection.values}:
            if len(_labels(group, key)) > 1:
                variants[key] += group
    faults = []
    for key, group in sorted(variants.items()):
        values = _values(group, key)
        subjects = plural(len({scan.subject for scan in group}), "subject")
        faults.append(
            f"{base}: {subjects} with several variants of one scan, which differ in {key} ({', '.join(values)}); "
            f"choose with {selection.option.format(key, values[0])} ({selection.repeat})"
        )
    return faults


def left_out(reason: str, names: Sequence[str]) -> str:
    """Return the note `left out: REASON (COUNT): NAMES`, with the first names only."""
    more = f", and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return f"left out: {reason} ({len(names):,}): {', '.join(names[:_NAMES_SHOWN])}{more}"
