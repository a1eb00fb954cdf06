"""A BIDS data set to conversations: tables say what is asked, file names about which scans."""

import math
import random
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from string import Formatter
from typing import Any

from umbrella_jax.config.schema import MAX_CLASSES, modality_names, resolve_modality
from umbrella_jax.console import plural, wrapped
from umbrella_jax.data.conversation import IMAGE_MARKER, TURN_END, TURN_START
from umbrella_jax.data.ignore_file import IgnoreFile
from umbrella_jax.data.subject_split import SPLITS, read_splits, split_names, split_subjects, write_splits
from umbrella_jax.data.tables import (
    alike,
    check_columns,
    doubtful,
    is_missing,
    lost_zeros,
    number_in,
    read_table,
    subject_rows,
    with_prefix,
)
from umbrella_jax.errors import ConfigError, DataError, Faults, no_directory
from umbrella_jax.io.files import check_new_folder, naming, new_folder, private, strict_json
from umbrella_jax.io.reading import read_json, read_text, read_yaml

TEMPLATES: dict[str, dict[str, str]] = {
    "classification": {"question": "What is the {target} of this subject?", "answer": "{label}."},
    "regression": {"question": "What is the {target} of this subject?", "answer": "{label}"},
    "comparison": {
        "reference_question": "This is a reference. What is the {target} of this subject?",
        "reference_answer": "{label}.",
        "question": "Compared with the reference, what is the {target} of this subject?",
        "answer": "{label}.",
    },
}
"""What is said where a template file says nothing else; its kinds are the kinds of conversation."""
MODALITIES = {"sMRI": ("anat", "T1w", "t1_0.5b"), "fMRI": ("func", "bold", "rsfmri_0.5b")}
"""Folder and suffix of a modality's files, and a config to train it with."""
PARTICIPANTS = "participants.tsv"
_REPEATS = ("sub", "ses", "run", "task", "dir")
"""Entities of scans that repeat a measurement, all of which are taken. Any other entity makes variants of one."""
_NONE = "none"
"""How `--entity` names the scans without an entity."""
_NAMES_SHOWN = 20
LONG = 100_000
"""Conversations (90 MB) that `from_bids` writes as JSON lists; most programs can only read a list as a whole, so more
than these are written as JSON Lines."""


@dataclass(frozen=True)
class _Scan:
    path: str
    """As conversations give it: from the data set on."""
    entities: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2].partition(".")[0]

    @property
    def subject(self) -> str:
        return f"sub-{self.entities['sub']}"

    @property
    def visit(self) -> str:
        """The subject and, if the name has one, the session: `sub-01 ses-2`."""
        return " ".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)


@dataclass(frozen=True)
class _Subject:
    """Scans of one subject that share a label; a subject whose label changes between sessions is several of these."""

    name: str
    value: str
    """As in the table."""
    label: str
    """As in the conversation."""
    scans: tuple[_Scan, ...]


def from_bids(
    root: str | Path,
    out: str | Path,
    target: str,
    *,
    kind: str | None = None,
    modality: str = "sMRI",
    template: str | Path | None = None,
    split: str | None = None,
    split_from: str | Path | None = None,
    seed: int | None = None,
    entities: Sequence[str] = (),
    derivatives: str | None = None,
    missing: Sequence[str] = (),
    pairs_per_subject: int | None = None,
) -> list[str]:
    """Write `out`/SPLIT.json for each split: conversations about `target`, image paths relative to `root`.

    A list has a conversation per line. If the splits have more than LONG conversations together, `out`/SPLIT.jsonl is
    written instead, JSON Lines. The folder appears when it is complete. `out`/splits.tsv says which subject is in which
    split. That is a function of participants.tsv, of who has a scan and of `seed`, never of the target (see
    `split_subjects`). All scans of a subject are in one split.

    Args:
        root: the data set, with participants.tsv.
        out: an empty or new directory.
        target: column of participants.tsv, or of sub-*_sessions.tsv or a table in phenotype/ with `session_id`: a
            value per session is that of the session's scans. `Levels` of participants.json and sessions.json spell
            values.
        kind: classification, regression, or comparison: a reference subject of the same split, then the query.
            Default: regression if all values are numbers, more than MAX_CLASSES distinct ones; else classification.
        modality: sMRI or T1 (anat/*_T1w), fMRI or rsfMRI (func/*_task-rest*_bold).
        template: YAML or JSON with sections like those of TEMPLATES, and `labels`, which spells values.
        split: NAME=SHARE,...; the shares sum to 1. Default train=0.8,eval=0.2.
        split_from: directory that an earlier call wrote; its splits.tsv is used in place of `split` and `seed`.
        seed: of the split (default 1234) and of the pairs.
        entities: KEY=VALUE of the file names to take, such as ses=1, or KEY=none for those without the key; a key
            that is given twice may have either value.
        derivatives: take the scans of `root`/derivatives/THIS instead.
        missing: values that mean a missing one, besides `is_missing`. With any, no other value is doubtful.
        pairs_per_subject: references for each scan of a query subject, half of them of its label if there are
            enough; default 4. Only for kind comparison.

    Returns:
        Lines that say what was written, what was left out and why, and how to train on it.

    Raises:
        DataError: with every fault of the data set and the arguments, before anything is written.
    """
    root, out, modality = Path(root), Path(out), resolve_modality(modality, MODALITIES) or modality
    if not root.is_dir():
        raise DataError(f"{root}: {no_directory(root)}; expected a directory with a BIDS data set")
    faults, notes = Faults(), list[str]()
    faults.check(lambda: _check_arguments(out, kind, modality, pairs_per_subject))
    if split_from is not None and not (split is None and seed is None):
        faults.append("split_from: the split is that of another directory; leave out split and seed")
    shares = faults.check(lambda: _shares(split or "train=0.8,eval=0.2"))
    given = faults.check(lambda: read_splits(Path(split_from) / SPLITS)) if split_from is not None else None
    texts = faults.check(lambda: _template(template))
    levels = faults.check(lambda: _levels(root, target))
    table = faults.check(lambda: _Participants.read(root, target))
    files = faults.check(lambda: _files(root, derivatives, notes))
    scans = None
    if files is not None and modality in MODALITIES:
        scans = faults.check(lambda: _scans(root, files, modality, entities, notes))
    if table is None or files is None or scans is None or texts is None or levels is None:
        raise DataError(faults)
    spelled = {**levels, **texts.pop("labels", {})}
    kept = faults.check(lambda: _with_values(table, files, scans, target, missing, spelled, notes))
    if kept is None:
        raise DataError(faults)
    kind = faults.check(lambda: _kind(table.path, target, kept, kind, spelled, notes))
    if kind is None or shares is None or faults:
        raise DataError(faults)
    if kind == "regression":
        spelled = {}
    elif spelled and (unspelled := sorted({value for _, value in kept} - spelled.keys())):
        notes.append(f"said as in {PARTICIPANTS}, since neither Levels nor labels spell them: {', '.join(unspelled)}")
    visits = {(scan.subject, scan.entities.get("ses")) for scan, _ in kept}
    several = sum(number > 1 for number in Counter(subject for subject, _ in visits).values())
    if kind == "regression" and several and not table.sessions:
        notes.append(
            f"every session of a subject ({several} have several) has its {target} of {PARTICIPANTS}: "
            "no sub-*_sessions.tsv has one"
        )
    subjects = _subjects(kept, spelled)
    split_of = given if given is not None else split_subjects(_balanced(table, files), shares, seed_of(seed))
    splits, kept_out = _divide(subjects, split_of, list(shares) if given is None else split_names(split_of))
    if kept_out:
        notes.append(_left_out(f"subjects that {split_from}/{SPLITS} does not have", kept_out))
    faults.check(lambda: _check_subjects(root, target, kind, subjects, splits, notes))
    if pairs_per_subject is not None and kind != "comparison":
        faults.append(f"pairs_per_subject: of kind comparison only; this is a {kind}, leave it out")
    if faults:
        raise DataError(faults)

    writer = _Writer(target, kind, modality, texts[kind])
    pairs = pairs_per_subject or 4
    scans_used = sum(len(subject.scans) for members in splits.values() for subject in members)
    suffix = ".jsonl" if scans_used * (pairs if kind == "comparison" else 1) > LONG else ".json"
    people = len({subject.name for subject in subjects})
    lines = [f"{root}: {target}, {kind}, {modality}, {people} of {len(table.rows)} subjects"]
    with new_folder(out, 0o700) as folder:
        for name, members in splits.items():
            if kind == "comparison":
                rng = random.Random(f"{seed_of(seed)} {name}")
                records = (writer.two(*pair) for pair in _pairs(members, pairs, rng))
            else:
                records = (writer.one(subject, scan) for subject in members for scan in subject.scans)
            counts = _write_set(folder / f"{name}{suffix}", records)
            told = f"{plural(len({m.name for m in members}), 'subject')}, {plural(counts.total(), 'conversation')}"
            lines.append(f"{out / f'{name}{suffix}'}: {told}: {_counted(kind, subjects, members)}")
            if kind == "comparison":
                lines.append(f"  pairs: same {counts['same']}, different {counts['different']}")
                if short := pairs * sum(len(subject.scans) for subject in members) - counts.total():
                    notes.append(f"{name}: {short} pairs fewer than {pairs} a scan: not enough other subjects")
        write_splits(folder / SPLITS, split_of)
    told_notes = [line for note in notes for line in wrapped(note)]
    return [*lines, *told_notes, *_next_command(root, out, target, modality, splits, suffix)]


def seed_of(seed: int | None) -> int:
    """Return the seed, by default 1234."""
    return 1234 if seed is None else seed


def _write_set(path: Path, records: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Write JSON Lines (.jsonl) or a JSON list, a record per line, and count the records by `comparison_type`.

    One record is in memory at a time.
    """
    start, between, end = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    counts: Counter[str] = Counter()
    with naming(path), open(path, "w", encoding="utf-8", opener=private) as file:
        file.write(start)
        for record in records:
            file.write((between if counts else "") + strict_json(record, ensure_ascii=False))
            counts[record["metadata"].get("comparison_type", "")] += 1
        file.write(end)
    return counts


def _next_command(root: Path, out: Path, target: str, modality: str, splits: Collection[str], suffix: str) -> list[str]:
    """Return the command that trains on what was written."""
    if "train" not in splits:
        return []
    flags = {"config": MODALITIES[modality][2], "base": "LLAVA_DIR"}
    flags |= {f"{name}-data": str(out / f"{name}{suffix}") for name in ("train", "eval") if name in splits}
    flags |= {"image-root": str(root), "out": f"runs/{target}"}
    lines = ["umbrella-jax train"]
    for flag in (f"--{name} {shlex.quote(value)}" for name, value in flags.items()):
        if len(lines[-1]) + len(flag) < 76:
            lines[-1] += f" {flag}"
        else:  # to be pasted as it is
            lines[-1] += " \\"
            lines.append(f"  {flag}")
    return ["next:", *(f"  {line}" for line in lines)]


def _check_arguments(out: Path, kind: str | None, modality: str, pairs: int | None) -> None:
    faults = Faults()
    if kind is not None and kind not in TEMPLATES:
        faults.append(f"kind: expected one of {', '.join(TEMPLATES)}, got {kind!r}")
    if modality not in MODALITIES:
        faults.append(f"modality: expected one of {modality_names(MODALITIES)}, got {modality!r}")
    if pairs is not None and pairs < 1:
        faults.append(f"pairs_per_subject: expected at least 1, got {pairs}")
    with faults:
        check_new_folder(out)
    faults.raise_as(DataError)


def _shares(split: str) -> dict[str, Fraction]:
    """Exact, so that 0.8 and 0.2 sum to 1."""
    shares: dict[str, Fraction] = {}
    for part in split.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d*\.?\d+|\d+/[1-9]\d*)\s*", part)
        if not match or match[1] in shares or not Fraction(match[2]):
            raise ConfigError(
                f"--split {split}: {part!r}: expected NAME=SHARE, each name once and its share above 0, "
                "such as train=0.8,eval=0.2"
            )
        shares[match[1]] = Fraction(match[2])
    if sum(shares.values()) != 1:
        raise ConfigError(f"--split {split}: the shares sum to {float(sum(shares.values())):g}; expected 1")
    return shares


def _template(file: str | Path | None) -> dict[str, dict[str, str]]:
    """TEMPLATES with what the file says laid over them, and its `labels`."""
    texts = {kind: dict(section) for kind, section in TEMPLATES.items()}
    if file is None:
        return texts
    found, faults = read_yaml(file), []
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected sections {', '.join(TEMPLATES)}, labels")
    for kind, section in found.items():
        if kind not in (*TEMPLATES, "labels") or not isinstance(section, dict):
            faults.append(f"{file}: {kind}: expected a section, one of {', '.join(TEMPLATES)}, labels")
            continue
        for key, text in section.items():
            if not isinstance(text, str):
                faults.append(f"{file}: {kind}.{key}: expected a string, got {text!r}")
            elif kind != "labels":
                faults += [f"{file}: {kind}.{key}: {fault}" for fault in _text_faults(kind, key, text)]
            texts.setdefault(kind, {})[str(key)] = text
    if faults:
        raise ConfigError(faults)
    return texts


def _text_faults(kind: str, key: str, text: str) -> list[str]:
    if key not in TEMPLATES[kind]:
        return [f"no such text; expected one of {', '.join(TEMPLATES[kind])}"]
    known = ["target", "label"] if key.endswith("answer") else ["target"]  # a question must not tell the answer
    try:
        fields = [(field, spec or conversion) for _, field, spec, conversion in Formatter().parse(text)]
    except ValueError as error:
        return [f"{error}; write {{{{ or }}}} for a brace"]
    faults = [
        f"placeholder {name!r}: expected {' or '.join(f'{{{k}}}' for k in known)}"
        for name, more in fields
        if name is not None and (name not in known or more)
    ]
    if "label" in known and not faults and all(name != "label" for name, _ in fields):
        faults.append("expected {label} in it, else every subject has one answer")
    return faults + _forged(text)


def _forged(text: str) -> list[str]:
    held = [token for token in (TURN_START, TURN_END, IMAGE_MARKER) if token in text]
    return [f"holds {' and '.join(held)}, which the tokenizer puts in; take it out"] if held else []


def _levels(root: Path, target: str) -> dict[str, str]:
    """Return {value: text} of the column's `Levels` in participants.json and sessions.json: a description each, or an
    object that holds one."""
    spelled: dict[str, str] = {}
    for file in (root / "participants.json", root / "sessions.json"):
        if not file.exists() and not file.is_symlink():  # a link to nothing is one that datalad has yet to get
            continue
        columns = read_json(file, DataError, "expected an object of columns")
        column = columns.get(target, {}) if isinstance(columns, dict) else None
        levels = column.get("Levels", {}) if isinstance(column, dict) else None
        if not isinstance(levels, dict):
            raise DataError(f"{file}: {target}: expected an object, and an object under its Levels")
        texts = {value: text.get("Description") if isinstance(text, dict) else text for value, text in levels.items()}
        described = {value: text.strip() for value, text in texts.items() if isinstance(text, str) and text.strip()}
        if faulty := texts.keys() - described.keys():
            raise DataError([f"{file}: {target}.Levels.{value}: expected a description" for value in sorted(faulty)])
        spelled |= described
    return spelled


@dataclass(frozen=True)
class _Participants:
    """Rows of participants.tsv, and the target's values per session if other tables have them."""

    path: Path
    rows: Mapping[str, Mapping[str, str]]
    """{sub-LABEL: {column: cell}}, sorted."""
    sessions: Mapping[tuple[str, str], str]
    """{(sub-LABEL, ses-LABEL): value}; empty if no table has the target per session."""
    sources: str
    """Which tables `sessions` come from."""

    @classmethod
    def read(cls, root: Path, target: str) -> "_Participants":
        """Read all tables of a data set. Raise DataError with every fault."""
        table = read_table(root / PARTICIPANTS)
        tables = _session_tables(root, target)
        needed = ["participant_id", *([] if tables and target not in table.columns else [target])]
        try:
            check_columns(table, needed)
        except DataError as error:
            hints = [
                f"; {file.relative_to(root)} has it: copy it to {PARTICIPANTS}, and give --split-from if there are "
                "conversations already, since the split depends on the columns"
                for file in sorted(root.glob("phenotype/*.tsv"))
                if target not in table.columns and target in _header(file)
            ]
            raise DataError([f + (hints[0] if hints and f": {target}: " in f else "") for f in error.faults]) from None
        found: dict[tuple[str, str], tuple[str, str]] = {}
        faults = []
        for name, subject, session, value in tables:
            place, before = f"{subject} {session}", found.setdefault((subject, session), (value, name))
            if before[0] != value:
                faults.append(f"{root / name}: {target}: {value} for {place}, but {before[0]} in {before[1]}")
        if faults:
            raise DataError(faults)
        kinds = dict.fromkeys("sub-*_sessions.tsv" if name.startswith("sub-") else name for name, *_ in tables)
        values = {key: value for key, (value, _) in found.items()}
        return cls(table.path, subject_rows(table), values, ", ".join(kinds))


def _session_tables(root: Path, target: str) -> list[tuple[str, str, str, str]]:
    """Return (file, sub-LABEL, ses-LABEL, value) of every row of tables that have the target per session."""
    faults: list[str] = []
    found: list[tuple[str, str, str, str]] = []
    for file in (*sorted(root.glob("sub-*/sub-*_sessions.tsv")), *sorted(root.glob("phenotype/*.tsv"))):
        of_one = file.parent.name != "phenotype"
        needed = ["session_id", *([] if of_one else ["participant_id"])]
        try:
            header = _header(file)
            if target not in header or (not of_one and "session_id" not in header):
                continue
            table = read_table(file)
            check_columns(table, [*needed, target])
            faults += table.faults
        except DataError as error:
            faults.extend(error.faults)
            continue
        for _, cells in table.rows:
            subject = file.parent.name if of_one else with_prefix("sub", cells["participant_id"])
            session = with_prefix("ses", cells["session_id"])
            found.append((file.relative_to(root).as_posix(), subject, session, cells[target]))
    if faults:
        raise DataError(faults)
    return found


def _header(file: Path) -> list[str]:
    """Return the columns of a table, of which only the first line is read."""
    try:
        with file.open("rb") as lines:
            return [cell.strip(' "') for cell in lines.readline(1 << 20).decode("utf-8-sig").strip().split("\t")]
    except UnicodeDecodeError:
        return list(read_table(file).columns)  # which names the encoding
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class _Files:
    """Files of a data set that have the name of a scan, without those that .bidsignore excludes."""

    base: Path
    """The data set, or the derivatives in it."""
    paths: Mapping[str, Sequence[Path]]
    """{modality: files below `base`, sorted}."""
    modalities: Mapping[str, frozenset[str]]
    """{sub-LABEL: modalities that the data set itself has files of}, also of subjects that only derivatives have."""


# Not pybids: it indexes the whole tree into an SQL database, and brings a dozen packages. Of BIDS, this needs the
# entities in a file's name.
def _files(root: Path, derivatives: str | None, notes: list[str]) -> _Files:
    """Find the files of every modality and the subjects of all derivatives, also those that nobody asked for: the split
    must not depend on that."""
    base = root / "derivatives" / derivatives if derivatives else root
    if not base.is_relative_to(root) or ".." in base.relative_to(root).parts:
        raise DataError(f"derivatives {derivatives}: expected the name of a directory in {root / 'derivatives'}")
    if not base.is_dir():
        there = sorted(path.name for path in base.parent.glob("*") if path.is_dir()) if derivatives else []
        raise DataError(f"{base}: not found; expected a directory{', such as ' + ', '.join(there) if there else ''}")
    paths: dict[str, list[Path]] = {}
    modalities: dict[str, set[str]] = defaultdict(set)
    excluded: list[str] = []
    for folder in dict.fromkeys((base, root)):
        ignore = [_ignore_file(place / ".bidsignore") for place in dict.fromkeys((root, folder))]
        for modality, (kind, suffix, _) in MODALITIES.items():
            for path in sorted(p for ses in ("", "ses-*/") for p in folder.glob(f"sub-*/{ses}{kind}/*_{suffix}.nii*")):
                name = path.relative_to(folder).as_posix()
                if any(file.excludes(name) for file in ignore):
                    excluded += [name] if folder == base else []
                    continue
                if folder == root:
                    modalities[name.partition("/")[0]].add(modality)
                if folder == base:
                    paths.setdefault(modality, []).append(path)
    derived = (*root.glob("derivatives/*/sub-*"), *(base.glob("sub-*") if derivatives else ()))
    modalities |= {name: set() for name in sorted({path.name for path in derived} - modalities.keys())}
    if excluded:
        notes.append(_left_out("files that .bidsignore excludes", excluded))
    return _Files(base, paths, {subject: frozenset(of) for subject, of in modalities.items()})


def _ignore_file(file: Path) -> IgnoreFile:
    if not file.is_file():
        return IgnoreFile(())
    text = read_text(file, DataError, 1 << 20, "expected patterns, one in each line")
    try:
        return IgnoreFile(text.splitlines())
    except ValueError as error:
        raise DataError(f"{file}: {error}; expected patterns as in .gitignore") from None


def _scans(
    root: Path, files: _Files, modality: str, narrowed: Sequence[str], notes: list[str]
) -> dict[str, list[_Scan]]:
    """Return {sub-LABEL: its scans}, both sorted; what is not taken goes to `notes`."""
    base = files.base
    folder, suffix, _ = MODALITIES[modality]
    scans: list[_Scan] = []
    left: dict[str, list[str]] = {
        "files with another name than BIDS gives them there": [],
        "files that are links to nothing; `datalad get` them": [],
        "pointers to files that were not downloaded; `datalad get` or `git lfs pull` them": [],
        "empty files": [],
        "hidden files": [],
        "X.nii beside X.nii.gz": [],
    }
    misnamed, absent, pointers, empty, hidden, twins = left.values()
    paths = files.paths.get(modality, ())
    compressed = {str(path) for path in paths if path.suffix == ".gz"}
    for path in paths:
        name = path.relative_to(base).as_posix()
        entities = _entities(path.name, suffix)
        folders = zip(("sub", "ses"), path.relative_to(base).parts[:-2], strict=False)
        if path.name.startswith("."):  # such as macOS' ._sub-01_T1w.nii.gz
            hidden.append(name)
        # A scan in another subject's folder could end up in two splits.
        elif entities is None or any(folder != f"{key}-{entities.get(key)}" for key, folder in folders):
            misnamed.append(name)
        elif not path.exists():
            absent.append(name)
        elif f"{path}.gz" in compressed:
            twins.append(name)
        elif not (size := path.stat().st_size):
            empty.append(name)
        elif size < 1024 and _is_pointer(path):
            pointers.append(name)
        else:
            scans.append(_Scan(path.relative_to(root).as_posix(), entities))
    notes += [_left_out(what, names) for what, names in left.items() if names]
    scans = _narrowed(scans, base, modality, narrowed, notes) if scans else scans
    if not scans:
        raise DataError("; ".join([f"{base}: no scan; expected sub-*/[ses-*/]{folder}/*_{suffix}.nii[.gz]", *notes]))
    found = defaultdict(list)
    for scan in scans:
        found[scan.subject].append(scan)
    several = [of_one for of_one in found.values() if len(of_one) > 1]
    if several:
        differ = {k for s in several for k in _keys(s) if len({scan.entities.get(k) for scan in s}) > 1}
        how = "; ".join(f"{k} {', '.join(_values(scans, k))}" for k in sorted(differ))
        notes.append(
            f"subjects with several scans, all of them taken ({len(several)}); --entity KEY=VALUE narrows: {how}"
        )
    return dict(sorted(found.items()))


def _is_pointer(path: Path) -> bool:
    """Return whether git-annex or git-lfs left a note in place of the file."""
    with path.open("rb") as file:
        return file.read(64).startswith((b"/annex/objects/", b"version https://git-lfs"))


def _entities(name: str, suffix: str) -> dict[str, str] | None:
    """Return {"sub": "01", "run": "2"} of sub-01_run-2_T1w.nii.gz, None for a name that BIDS does not know."""
    label = "([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)_"
    return dict(re.findall(label, name)) if re.fullmatch(rf"({label})+{suffix}\.nii(\.gz)?", name) else None


def _keys(scans: Iterable[_Scan]) -> set[str]:
    return {key for scan in scans for key in scan.entities}


def _values(scans: Iterable[_Scan], key: str) -> list[str]:
    return sorted({scan.entities.get(key, _NONE) for scan in scans})


def _narrowed(scans: list[_Scan], base: Path, modality: str, narrowed: Sequence[str], notes: list[str]) -> list[_Scan]:
    """Return the scans that have one of the asked values of every key: magnitudes, and runs of rest, unless others are
    asked for.

    Raises:
        ConfigError: a key or value that no scan has; variants of one acquisition between which nothing decides.
    """
    asked = defaultdict(set)
    faults = []
    for text in narrowed:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            faults.append(f"--entity {text}: expected KEY=VALUE, such as ses=1 or acq=mprage")
        elif value not in _values(scans, key):
            there = f"{key} is {' or '.join(_values(scans, key))}" if key in _keys(scans) else f"names have no {key}"
            faults.append(f"--entity {text}: no scan has it; {there}")
        asked[key].add(value)
    if faults:
        raise ConfigError(faults)
    kept = [scan for scan in scans if all(scan.entities.get(key, _NONE) in values for key, values in asked.items())]
    if len(kept) < len(scans):
        notes.append(f"left out: scans that are not {' '.join(narrowed)} ({len(scans) - len(kept)})")
    if "part" not in asked:
        others = [scan for scan in kept if scan.entities.get("part", "mag") != "mag"]
        kept = [scan for scan in kept if scan.entities.get("part", "mag") == "mag"]
        if others:
            parts = ", ".join(_values(others, "part"))
            notes.append(f"left out: parts of complex images other than the magnitude ({len(others)}): {parts}")
    if modality == "fMRI" and "task" not in asked:
        others = [scan for scan in kept if not scan.entities.get("task", "").startswith("rest")]
        kept = [scan for scan in kept if scan.entities.get("task", "").startswith("rest")]
        if others:
            tasks = ", ".join(_values(others, "task"))
            notes.append(f"left out: runs of other tasks ({len(others)}), which --entity task=VALUE takes: {tasks}")
    if faults := _undecided(kept, base, asked.keys()):
        raise ConfigError(faults)
    return kept


def _undecided(scans: Iterable[_Scan], base: Path, decided: Collection[str]) -> list[str]:
    """Return a fault for every entity that makes variants of one acquisition (echoes, reconstructions, spaces), unless
    the user has decided: as scans of their own they would count a measurement several times."""
    acquisitions = defaultdict(list)
    for scan in scans:
        acquisitions[tuple(scan.entities.get(key) for key in _REPEATS)].append(scan)
    variants: dict[str, list[_Scan]] = defaultdict(list)
    for group in (group for group in acquisitions.values() if len(group) > 1):
        for key in _keys(group) - {*_REPEATS, *decided}:
            if len({scan.entities.get(key) for scan in group}) > 1:
                variants[key] += group
    faults = []
    for key, of in sorted(variants.items()):
        values = _values(of, key)
        people = plural(len({scan.subject for scan in of}), "subject")
        faults.append(
            f"{base}: {people} with several variants of one scan, which differ in {key} ({', '.join(values)}); choose "
            f"with --entity {key}={values[0]} (again for more of them)"
        )
    return faults


def _left_out(what: str, names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return f"left out: {what} ({len(names)}): {', '.join(names[:_NAMES_SHOWN])}{more}"


def _with_values(
    table: _Participants,
    files: _Files,
    scans: Mapping[str, Sequence[_Scan]],
    target: str,
    missing: Sequence[str],
    labels: Mapping[str, str],
    notes: list[str],
) -> list[tuple[_Scan, str]]:
    """Return the scans that have a value, and the value; the others go to `notes`.

    Raises DataError for ids that differ only in spelling, values of which it is doubtful whether they mean a missing
    one, and if nothing is left.
    """
    faults = _misspelled(table, files, scans)
    rows, visits = table.rows, {scan.visit: None for of in scans.values() for scan in of}
    valued: list[tuple[_Scan, str]] = []
    without: list[str] = []
    for scan in (scan for subject, of in scans.items() if subject in rows for scan in of):
        session = scan.entities.get("ses")
        if table.sessions and session is not None:
            value = table.sessions.get((scan.subject, f"ses-{session}"))
        else:
            value = rows[scan.subject].get(target)
        if value is None:
            without.append(scan.visit)
        else:
            valued.append((scan, value))
    name: Callable[[_Scan], str] = (lambda scan: scan.visit) if table.sessions else (lambda scan: scan.subject)
    whom = "sessions" if table.sessions and any(" " in visit for visit in visits) else "subjects"
    empty = dict.fromkeys(name(scan) for scan, value in valued if value.lower() in ("", "n/a"))
    written = {
        name(scan): value
        for scan, value in valued
        if name(scan) not in empty and is_missing(value, declared=missing, labels=labels)
    }
    kept = [(scan, value) for scan, value in valued if name(scan) not in empty and name(scan) not in written]
    if absent := [subject for subject in rows if subject not in scans]:
        notes.append(_left_out("subjects without a scan", absent))
    if unknown := [visit for visit in dict.fromkeys(without) if " " not in visit]:
        notes.append(_left_out(f"scans without ses- in their names, when only {table.sources} has {target}", unknown))
    if others := [visit for visit in dict.fromkeys(without) if " " in visit]:
        notes.append(_left_out(f"sessions without a value in {table.sources}", others))
    if empty:
        notes.append(_left_out(f"{whom} whose {target} is n/a or empty", list(empty)))
    if written:
        counts = ", ".join(f"{value} {n}" for value, n in Counter(written.values()).items())
        notes.append(_left_out(f"{whom} whose {target} is missing, by other words ({counts})", list(written)))
    if nameless := [subject for subject in scans if subject not in rows]:
        notes.append(_left_out(f"subjects without a row in {PARTICIPANTS}", nameless))
    for value in missing:
        if (
            value.lower() != "n/a"
            and value not in written.values()
            and not any(is_missing(cell, declared=[value]) for cell in written.values())
        ):
            notes.append(f"--missing {value}: no {target} is that")
    if table.sessions:
        own = sum(scan.entities.get("ses") is not None for scan, _ in kept)
        other = sum(rows[scan.subject].get(target, value) != value for scan, value in kept)
        notes.append(f"values per session, of {table.sources}: {plural(own, 'scan')}, {other} unlike {PARTICIPANTS}")
    counts_of = Counter(value for _, value in dict.fromkeys((name(scan), value) for scan, value in kept))
    if not missing and (odd := doubtful(counts_of.keys(), labels)):
        told = ", ".join(f"{value!r} ({counts_of[value]})" for value in odd)
        flags = " ".join(f"--missing {shlex.quote(value)}" for value in odd)
        faults.append(
            f"{table.path}: {target}: missing values or not? {told}; {flags} leaves them out, --missing n/a takes "
            "every value as it is"
        )
    if not kept and not faults:
        faults.append("; ".join([f"{table.path}: {target}: no subject has both a value and a scan", *notes]))
    if faults:
        raise DataError(faults)
    return kept


def _misspelled(table: _Participants, files: _Files, scans: Mapping[str, Sequence[_Scan]]) -> list[str]:
    """Return faults for ids that tables and folders spell differently."""
    faults = []
    pairs = alike(table.rows, [*files.modalities, *scans])
    if pairs:
        faults.append(_spelling_fault(f"{table.path}: participant_id", pairs, ""))
    on_disk = defaultdict(set)
    for scan in (scan for of in scans.values() for scan in of if "ses" in scan.entities):
        on_disk[scan.subject].add(f"ses-{scan.entities['ses']}")
    in_tables = defaultdict(set)
    for subject, session in table.sessions:
        in_tables[subject].add(session)
    sessions = {subject: alike(in_tables[subject], of) for subject, of in on_disk.items()}
    if first := next((subject for subject, of in sessions.items() if of), None):
        faults.append(_spelling_fault(f"{table.sources}: session_id", sessions[first], f" of {first}"))
    return faults


def _spelling_fault(place: str, pairs: Mapping[str, str], whose: str) -> str:
    (name, other), *more = pairs.items()
    others = f" and {plural(len(more), 'other')}" if more else ""
    if all(lost_zeros(name, other) for name, other in pairs.items()):
        why = "the table has lost leading zeros, as in a spreadsheet; write the ids as the folders have them, as text"
    else:
        why = "they differ only in spelling; write the ids as the folders have them"
    return f"{place}: {name} in the table, {other} on disk{whose}{others}; {why}"


def _kind(
    file: Path,
    target: str,
    kept: Sequence[tuple[_Scan, str]],
    kind: str | None,
    spelled: Mapping[str, str],
    notes: list[str],
) -> str:
    """Return the kind asked for, or the one that the values suggest. Raise DataError if the values do not fit it."""
    used = {scan.subject: value for scan, value in kept}
    values = Counter(value for _, value in kept)
    words = [f"{value} ({subject})" for subject, value in used.items() if number_in(value) is None]
    words = words or [value for value in values if number_in(value) is None]
    many = len(values) > MAX_CLASSES
    commas = [word for word in words if re.match(r"[+-]?\d+(,\d+)+(\.\d+)?( |$)", word)]
    if commas and kind in (None, "regression") and not spelled.keys() & values.keys():
        raise DataError(
            f"{file}: {target}: numbers with a comma: {', '.join(commas[:5])} ({len(commas)}); write a decimal point, "
            "no separator of thousands"
        )
    if kind is None and many and 0 < len(words) < len(used):
        raise DataError(
            f"{file}: {target}: numbers and words mixed; write numbers or n/a instead of {', '.join(words)}, "
            "or ask for kind classification"
        )
    if kind == "regression" and words:
        raise DataError([f"{file}: {target}: expected a number or n/a, got {word}" for word in words])
    if kind == "comparison" and many and not words:
        raise DataError(
            f"{file}: {target}: {len(values)} distinct numbers, of which hardly two are the same; "
            "compare a column of labels, such as groups of them"
        )
    kind = kind or ("regression" if many and not words else "classification")
    if kind != "regression":
        _check_labels(file, target, values, spelled, notes)
    return kind


def _check_labels(file: Path, target: str, values: Counter[str], spelled: Mapping[str, str], notes: list[str]) -> None:
    """Raise DataError for labels that differ only in case, spaces or the spelling of a number."""
    alike_labels: dict[str, Counter[str]] = defaultdict(Counter)
    for value, count in values.items():
        label = spelled.get(value, value)
        number = number_in(label)
        alike_labels[" ".join(label.casefold().split()) if number is None else f"{number:g}"][label] += count
    faults = [
        f"{file}: {target}: one label or several? {', '.join(f'{label!r} ({n})' for label, n in labels.items())}; "
        "write them alike, or spell them with `labels` of --template"
        for labels in alike_labels.values()
        if len(labels) > 1
    ]
    if faults:
        raise DataError(faults)
    initials = [label for label in alike_labels if len(label) == 1 and label.isalpha()]
    for label, other in ((i, o) for i in initials for o in alike_labels if o.startswith(i) and o != i):
        notes.append(f"taken as two labels of {target}: {', '.join([*alike_labels[label], *alike_labels[other]])}")
    if unused := sorted(spelled.keys() - values.keys()):
        notes.append(f"values that Levels or labels spell and no scan has: {', '.join(unused)}")


def _subjects(kept: Iterable[tuple[_Scan, str]], spelled: Mapping[str, str]) -> list[_Subject]:
    """Group scans by subject and label, in order."""
    groups: dict[tuple[str, str], list[tuple[_Scan, str]]] = defaultdict(list)
    for scan, value in kept:
        groups[scan.subject, spelled.get(value, value)].append((scan, value))
    return [_Subject(name, of[0][1], label, tuple(scan for scan, _ in of)) for (name, label), of in groups.items()]


def _balanced(table: _Participants, files: _Files) -> dict[str, dict[str, str]]:
    """Return {subject: {column: cell}} that the split balances: all columns, and of which modalities there are scans.

    These are the subjects with a row and a scan of any modality or a folder in any derivatives, so the split depends
    on nothing that was asked for.
    """
    return {
        subject: {column: cell for column, cell in cells.items() if column != "participant_id"}
        | {f"scan {modality}": str(modality in files.modalities[subject]) for modality in MODALITIES}
        for subject, cells in table.rows.items()
        if subject in files.modalities
    }


def _divide(
    subjects: Iterable[_Subject], split_of: Mapping[str, str], names: Iterable[str]
) -> tuple[dict[str, list[_Subject]], list[str]]:
    """Return {split: its subjects}, and the names of subjects that are in no split."""
    splits: dict[str, list[_Subject]] = {name: [] for name in names}
    others: dict[str, None] = {}
    for subject in subjects:
        if subject.name in split_of:
            splits[split_of[subject.name]].append(subject)
        else:
            others[subject.name] = None
    return splits, list(others)


def _check_subjects(
    root: Path,
    target: str,
    kind: str,
    subjects: Sequence[_Subject],
    splits: Mapping[str, Sequence[_Subject]],
    notes: Sequence[str],
) -> None:
    """Raise DataError for labels that cannot be taught, and splits without enough subjects."""
    labels = sorted({subject.label for subject in subjects})
    faults = [f"{root}: {target}: label {label!r}: {fault}" for label in labels for fault in _forged(label)]
    if len(labels) == 1:
        faults.append(f"{root}: {target}: every subject is {labels[0]}; expected at least two values")
    needed = 2 if kind == "comparison" else 1
    people = len({subject.name for subject in subjects})
    sizes = {name: len({subject.name for subject in members}) for name, members in splits.items()}
    small = [
        f"--split {name}: gets {size} of {people} subjects, a {kind} needs at least {needed}; "
        "give it a larger share, another --seed, or leave it out"
        for name, size in sizes.items()
        if size < needed
    ]
    faults += ["; ".join([fault, *notes]) for fault in small[:1]] + small[1:]
    if faults:
        raise DataError(faults)


Side = tuple[_Subject, _Scan]


def _pairs(members: Sequence[_Subject], number: int, rng: random.Random) -> Iterator[tuple[Side, Side]]:
    """Yield, for each scan of each member as query, `number` references among the other subjects: half of its label if
    there are enough, the odd one in turn; fewer if there are no more."""
    labels = dict.fromkeys(subject.label for subject in members)
    same = {label: [s for s in members if s.label == label] for label in labels}
    different = {label: [s for s in members if s.label != label] for label in labels}
    place = {(s.name, label): i for label, of_label in same.items() for i, s in enumerate(of_label)}
    entries = Counter(subject.name for subject in members)
    queries = [(subject, scan) for subject in members for scan in subject.scans]
    for turn, (query, scan) in enumerate(queries):
        alike_ones, others = same[query.label], different[query.label]
        if entries[query.name] > 1:  # another label in another session
            others = [subject for subject in others if subject.name != query.name]
        num_alike = min(len(alike_ones) - 1, max((number + turn % 2) // 2, number - len(others)))
        num_others = min(len(others), number - num_alike)
        own = place[query.name, query.label]
        drawn = rng.sample(range(len(alike_ones) - 1), num_alike)  # places of those but the query's own
        references = [alike_ones[i + (i >= own)] for i in drawn]
        references += rng.sample(others, num_others)
        for reference in references:
            yield (reference, rng.choice(reference.scans)), (query, scan)


def _counted(kind: str, subjects: Sequence[_Subject], members: Sequence[_Subject]) -> str:
    """Return what a split holds: subjects per label, or the range of the numbers."""
    if kind == "regression":
        numbers = [float(subject.value) for subject in members]
        return f"{min(numbers):g} to {max(numbers):g}, mean {math.fsum(numbers) / len(numbers):.4g}"
    labels = Counter(subject.label for subject in members)
    return ", ".join(f"{label} {labels[label]}" for label in sorted({s.label for s in subjects}))  # zeros too


@dataclass(frozen=True)
class _Writer:
    """Records of the schema that `read_conversations` reads."""

    target: str
    kind: str
    modality: str
    texts: Mapping[str, str]

    def one(self, subject: _Subject, scan: _Scan) -> dict[str, Any]:
        """T1: one subject, one scan."""
        turns = self.turns("question", "answer", subject, scan)
        task = f"{self.target}_{self.kind}"
        return self.record(f"{scan.name}_{task}", "T1", [(subject, scan)], turns, {"task": task})

    def two(self, reference: Side, query: Side) -> dict[str, Any]:
        """T3: a reference, then the query."""
        turns = self.turns("reference_question", "reference_answer", *reference)
        turns += self.turns("question", "answer", *query)
        metadata = {
            "reference_id": reference[0].name,
            "reference_label": reference[0].label,
            "comparison_type": "same" if reference[0].label == query[0].label else "different",
            "task": f"{self.target}_classification_via_comparison",
        }
        task_id = f"{query[1].name}_vs_{reference[1].name}_{self.target}"
        return self.record(task_id, "T3", [reference, query], turns, metadata)

    def turns(self, question: str, answer: str, subject: _Subject, scan: _Scan) -> list[dict[str, Any]]:
        image = {"type": "image", "modality": self.modality, "image_path": scan.path}
        asked, said = ({"type": "text", "text": self.text(key, subject)} for key in (question, answer))
        return [{"role": "user", "content": [image, asked]}, {"role": "assistant", "content": [said]}]

    def text(self, key: str, subject: _Subject) -> str:
        return self.texts[key].format(target=self.target.replace("_", " "), label=subject.label)

    def record(
        self, task_id: str, task_type: str, sides: Sequence[Side], turns: list[dict[str, Any]], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        subject = sides[-1][0]
        label = _plain_number(subject.value) if self.kind == "regression" else subject.label
        return {
            "task_id": task_id,
            "task_type": task_type,
            "subject_ids": [side.name for side, _ in sides],
            "modalities": [self.modality] * len(sides),
            "images": [{"path": scan.path, "token": IMAGE_MARKER, "modality": self.modality} for _, scan in sides],
            "conversations": turns,
            "metadata": {"subject_id": subject.name, "subject_label": label, **metadata, "kind": self.kind},
        }


def _plain_number(value: str) -> int | float:
    return int(value) if value.lstrip("+-").isdigit() else float(value)
