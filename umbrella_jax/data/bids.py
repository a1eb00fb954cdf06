"""A BIDS data set to conversations: participants.tsv says what is asked, file names about which scans."""

import csv
import math
import random
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import StringIO
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from umbrella_jax.columns import plural, wrapped
from umbrella_jax.config import MAX_CLASSES
from umbrella_jax.data.conversation import IMAGE_MARKER, TURN_END, TURN_START
from umbrella_jax.errors import ConfigError, DataError, UmbrellaError
from umbrella_jax.files import PRIVATE, strict_json, write_whole
from umbrella_jax.reading import LISTING, read_json, read_text, read_yaml

T = TypeVar("T")
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
_MISSING = ("", "n/a")
_ELSEWHERE_MISSING = ("na", "nan", "null")
"""What R, Python and databases write for it, which BIDS does not."""


@dataclass(frozen=True)
class _Scan:
    path: Path
    entities: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.path.name.split(".")[0]


@dataclass(frozen=True)
class _Subject:
    name: str
    value: str  # as in participants.tsv
    label: str  # as it is said
    scans: tuple[_Scan, ...]


def from_bids(
    root: str | Path,
    out: str | Path,
    target: str,
    *,
    kind: str | None = None,
    modality: str = "sMRI",
    template: str | Path | None = None,
    split: str = "train=0.8,eval=0.2",
    seed: int = 1234,
    entities: Sequence[str] = (),
    derivatives: str | None = None,
    pairs_per_subject: int | None = None,
) -> list[str]:
    """Writes `out`/SPLIT.json for each split: conversations about `target`, image paths relative to `root`.

    A subject's scans are all taken, and are all in one split. Splits are stratified by label, of numbers by quantile;
    they and the pairs are a function of the data set and `seed`.

    Args:
        root: the data set, with participants.tsv.
        target: column of participants.tsv; `Levels` of participants.json spell its values where they are given.
        kind: classification, regression, or comparison: a reference subject of the same split, then the query.
            Default: regression where all values are numbers, more than MAX_CLASSES distinct ones; else classification.
        modality: sMRI (anat/*_T1w) or fMRI (func/*_task-rest*_bold).
        template: YAML or JSON with sections like those of TEMPLATES, and `labels`, which spells values.
        split: NAME=SHARE,...; the shares sum to 1.
        entities: KEY=VALUE of the file names to take, such as ses=1; a key that comes twice may have either value.
        derivatives: take the scans of `root`/derivatives/THIS instead.
        pairs_per_subject: references for each scan of a query subject, half of them of its label where there are
            enough; default 4. For comparison only.

    Returns:
        Lines that say what was written, what was left out and why, and how to train on it.

    Raises:
        DataError: with every fault of the data set and the arguments, before anything is written.
    """
    root, out = Path(root), Path(out)
    if not root.is_dir():
        raise DataError(f"{root}: not found; expected a directory with a BIDS data set")
    faults: list[str] = []
    notes: list[str] = []

    def collect(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UmbrellaError as error:
            faults.extend(error.faults)
            return None

    collect(lambda: _check_arguments(out, kind, modality, pairs_per_subject))
    shares = collect(lambda: _shares(split))
    texts = collect(lambda: _template(template))
    levels = collect(lambda: _levels(root / "participants.json", target))
    values = collect(lambda: _participants(root / "participants.tsv", target))
    scans = collect(lambda: _scans(root, modality, derivatives, entities, notes)) if modality in MODALITIES else None
    if values is None or scans is None or texts is None or levels is None:
        raise DataError(faults)
    used = _with_both(values, scans, target, notes)
    kind = collect(lambda: _kind(root / "participants.tsv", target, {s: values[s] for s in used}, kind))
    if kind is None or shares is None:
        raise DataError(faults)
    spelled = {} if kind == "regression" else {**levels, **texts.pop("labels", {})}
    if spelled and (unspelled := sorted({values[s] for s in used} - spelled.keys())):
        notes.append(f"said as in participants.tsv, since neither Levels nor labels spell them: {', '.join(unspelled)}")
    subjects = [_Subject(s, values[s], spelled.get(values[s], values[s]), tuple(scans[s])) for s in used]
    splits = _deal(subjects, shares, kind, seed)
    collect(lambda: _check_subjects(root, target, kind, subjects, splits))
    if pairs_per_subject is not None and kind != "comparison":
        faults.append(f"pairs_per_subject: of kind comparison only; this is a {kind}, leave it out")
    if faults:
        raise DataError(faults)

    writer = _Writer(root, target, kind, modality, texts[kind])
    lines = [f"{root}: {target}, {kind}, {modality}, {len(used)} of {len(values)} subjects"]
    out.mkdir(parents=True, exist_ok=True)
    for name, members in splits.items():
        if kind == "comparison":
            number = pairs_per_subject or 4
            records = [writer.two(*pair) for pair in _pairs(members, number, random.Random(f"{seed} {name}"))]
            if short := number * sum(len(subject.scans) for subject in members) - len(records):
                notes.append(f"{name}: {short} pairs fewer than {number} a scan, for want of other subjects")
        else:
            records = [writer.one(subject, scan) for subject in members for scan in subject.scans]
        file = out / f"{name}.json"
        body = ",\n".join(strict_json(record, ensure_ascii=False) for record in records)  # a line each, for grep
        write_whole(file, f"[\n{body}\n]\n", PRIVATE)
        counts = f"{plural(len(members), 'subject')}, {plural(len(records), 'conversation')}"
        lines.append(f"{file}: {counts}: {_counted(kind, subjects, members)}")
        if kind == "comparison":
            pairs = Counter(record["metadata"]["comparison_type"] for record in records)
            lines.append(f"  pairs: same {pairs['same']}, different {pairs['different']}")
    told = [line for note in notes for line in wrapped(note)]
    return [*lines, *told, *_next_command(root, out, target, modality, splits)]


def _next_command(root: Path, out: Path, target: str, modality: str, splits: Collection[str]) -> list[str]:
    if "train" not in splits:
        return []
    flags = {"config": MODALITIES[modality][2], "base": "LLAVA_DIR"}
    flags |= {f"{name}-data": str(out / f"{name}.json") for name in ("train", "eval") if name in splits}
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
    faults = []
    if kind is not None and kind not in TEMPLATES:
        faults.append(f"kind: expected one of {', '.join(TEMPLATES)}, got {kind!r}")
    if modality not in MODALITIES:
        faults.append(f"modality: expected one of {', '.join(MODALITIES)}, got {modality!r}")
    if pairs is not None and pairs < 1:
        faults.append(f"pairs_per_subject: expected at least 1, got {pairs}")
    # A split of another call has other subjects; side by side, and read as one directory, they would leak.
    if found := sorted(file.name for file in (*out.glob("*.json"), *out.glob("*.jsonl"))):
        faults.append(f"{out}: holds {', '.join(found)} already; name an empty directory")
    if faults:
        raise DataError(faults)


def _shares(split: str) -> dict[str, Fraction]:
    """Exact, so that 0.8 and 0.2 sum to 1."""
    shares: dict[str, Fraction] = {}
    for part in split.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d*\.?\d+|\d+/[1-9]\d*)\s*", part)
        if not match or match[1] in shares or not Fraction(match[2]):
            raise ConfigError(
                f"split {split}: {part!r}: expected NAME=SHARE, each name once and its share above 0, "
                "such as train=0.8,eval=0.2"
            )
        shares[match[1]] = Fraction(match[2])
    if sum(shares.values()) != 1:
        raise ConfigError(f"split {split}: the shares sum to {float(sum(shares.values())):g}; expected 1")
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


def _levels(file: Path, target: str) -> dict[str, str]:
    """`Levels` of the column: a description each, or an object that holds one; none where there is no such file."""
    if not file.exists() and not file.is_symlink():  # a link to nothing is one that datalad has yet to get
        return {}
    found = read_json(file, DataError, "expected an object of columns")
    column = found.get(target, {}) if isinstance(found, dict) else None
    levels = column.get("Levels", {}) if isinstance(column, dict) else None
    if not isinstance(levels, dict):
        raise DataError(f"{file}: {target}: expected an object, and an object under its Levels")
    texts = {value: text.get("Description") if isinstance(text, dict) else text for value, text in levels.items()}
    spelled = {value: text.strip() for value, text in texts.items() if isinstance(text, str) and text.strip()}
    if faulty := texts.keys() - spelled.keys():
        raise DataError([f"{file}: {target}.Levels.{value}: expected a description" for value in sorted(faulty)])
    return spelled


def _participants(file: Path, target: str) -> dict[str, str]:
    """{sub-LABEL: value}, in sorted order."""
    text = read_text(file, DataError, LISTING, "expected a table of tab-separated rows")
    reader = csv.reader(StringIO(text, newline=""), delimiter="\t", strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        rows += ((reader.line_num, [cell.strip() for cell in row]) for row in reader if row)
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not a tab-separated row: {error}") from None
    header = rows[0][1] if rows else []
    columns = ", ".join(header) or "none"
    if len(header) == 1 and re.search(r"[,;]", columns):
        columns += "; its columns have to be parted by tabs"
    faults = [
        f"{file}: {name}: expected one such column, got {columns}"
        for name in dict.fromkeys(("participant_id", target))
        if header.count(name) != 1
    ]
    if faults:
        raise DataError(faults)
    found: dict[str, str] = {}
    for line, row in rows[1:]:
        if len(row) != len(header):
            faults.append(f"{file}:{line}: expected {len(header)} tab-separated cells, got {len(row)}")
            continue
        cells = dict(zip(header, row, strict=True))
        name = f"sub-{cells['participant_id'].removeprefix('sub-')}"
        if name == "sub-":
            faults.append(f"{file}:{line}: participant_id: expected sub-LABEL, got {cells['participant_id']!r}")
        elif name in found:
            faults.append(f"{file}:{line}: participant_id: {name} stands there twice; expected one row a subject")
        found[name] = cells[target]
    if not faults and not found:
        faults.append(f"{file}: holds no subject; expected a row each below the header")
    if faults:
        raise DataError(faults)
    return dict(sorted(found.items()))


# Not pybids: it indexes the whole tree into an SQL database, and brings a dozen packages. Of BIDS, this needs the
# entities in a file's name.
def _scans(
    root: Path, modality: str, derivatives: str | None, narrowed: Sequence[str], notes: list[str]
) -> dict[str, list[_Scan]]:
    """{sub-LABEL: its scans}, in sorted order; what is not taken goes to `notes`."""
    folder, suffix, _ = MODALITIES[modality]
    base = root / "derivatives" / derivatives if derivatives else root
    if not base.is_relative_to(root):
        raise DataError(f"derivatives {derivatives}: expected the name of a directory in {root / 'derivatives'}")
    if not base.is_dir():
        there = sorted(path.name for path in base.parent.glob("*") if path.is_dir()) if derivatives else []
        raise DataError(f"{base}: not found; expected a directory{', such as ' + ', '.join(there) if there else ''}")
    scans: list[_Scan] = []
    misnamed, absent = [], []
    for path in sorted(p for ses in ("", "ses-*/") for p in base.glob(f"sub-*/{ses}{folder}/*_{suffix}.nii*")):
        entities = _entities(path.name, suffix)
        folders = zip(("sub", "ses"), path.relative_to(base).parts[:-2], strict=False)
        # A scan in another subject's folder could end up in two splits.
        if entities is None or any(folder != f"{key}-{entities.get(key)}" for key, folder in folders):
            misnamed.append(str(path.relative_to(base)))
        elif not path.exists():
            absent.append(str(path.relative_to(base)))
        else:
            scans.append(_Scan(path, entities))
    _note(notes, misnamed, "files with another name than BIDS gives them there")
    _note(notes, absent, "files that are links to nothing; `datalad get` them")
    scans = _narrowed(scans, modality, narrowed, notes) if scans else scans
    if not scans:
        raise DataError("; ".join([f"{base}: no scan; expected sub-*/[ses-*/]{folder}/*_{suffix}.nii[.gz]", *notes]))
    found = defaultdict(list)
    for scan in scans:
        found[f"sub-{scan.entities['sub']}"].append(scan)
    several = [of_one for of_one in found.values() if len(of_one) > 1]
    if several:
        differ = {k for s in several for k in _keys(s) if len({scan.entities.get(k) for scan in s}) > 1}
        how = "; ".join(f"{k} {', '.join(_values(scans, k))}" for k in sorted(differ))
        notes.append(
            f"subjects with several scans, all of them taken ({len(several)}); --entity KEY=VALUE narrows: {how}"
        )
    return dict(sorted(found.items()))


def _entities(name: str, suffix: str) -> dict[str, str] | None:
    """{"sub": "01", "run": "2"} of sub-01_run-2_T1w.nii.gz, None for a name that BIDS does not know."""
    label = "([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)_"
    return dict(re.findall(label, name)) if re.fullmatch(rf"({label})+{suffix}\.nii(\.gz)?", name) else None


def _keys(scans: Iterable[_Scan]) -> set[str]:
    return {key for scan in scans for key in scan.entities}


def _values(scans: Iterable[_Scan], key: str) -> list[str]:
    return sorted({scan.entities.get(key, "(none)") for scan in scans})


def _narrowed(scans: list[_Scan], modality: str, narrowed: Sequence[str], notes: list[str]) -> list[_Scan]:
    """The scans that have one of the asked values of every key; a run of rest where no task is asked for."""
    asked = defaultdict(set)
    faults = []
    for text in narrowed:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            faults.append(f"entity {text}: expected KEY=VALUE, such as ses=1 or acq=mprage")
        elif all(scan.entities.get(key) != value for scan in scans):
            there = f"{key} is {' or '.join(_values(scans, key))}" if key in _keys(scans) else f"names have no {key}"
            faults.append(f"entity {text}: no scan has it; {there}")
        asked[key].add(value)
    if faults:
        raise ConfigError(faults)
    kept = [scan for scan in scans if all(scan.entities.get(key) in values for key, values in asked.items())]
    if len(kept) < len(scans):
        notes.append(f"left out: scans that are not {' '.join(narrowed)} ({len(scans) - len(kept)})")
    if modality == "fMRI" and "task" not in asked:
        others = [scan for scan in kept if not scan.entities.get("task", "").startswith("rest")]
        kept = [scan for scan in kept if scan.entities.get("task", "").startswith("rest")]
        if others:
            tasks = ", ".join(_values(others, "task"))
            notes.append(f"left out: runs of other tasks ({len(others)}), which --entity task=VALUE takes: {tasks}")
    return kept


def _note(notes: list[str], names: Sequence[str], what: str) -> None:
    if names:
        notes.append(f"left out: {what} ({len(names)}): {', '.join(names)}")


def _with_both(
    values: Mapping[str, str], scans: Mapping[str, Sequence[_Scan]], target: str, notes: list[str]
) -> list[str]:
    """The subjects with a value and a scan."""
    valued = {s: value for s, value in values.items() if value.lower() not in _MISSING}
    _note(notes, [s for s in values if s not in scans], "subjects without a scan")
    _note(notes, [s for s in scans if s in values and s not in valued], f"subjects whose {target} is n/a or empty")
    _note(notes, [s for s in scans if s not in values], "subjects without a row in participants.tsv")
    used = [s for s in valued if s in scans]
    if odd := Counter(valued[s] for s in used if valued[s].lower() in _ELSEWHERE_MISSING):
        told = ", ".join(f"{value} ({n})" for value, n in odd.items())
        notes.append(f"taken as values of {target}, though elsewhere they mean a missing one, in BIDS n/a: {told}")
    return used


def _kind(file: Path, target: str, used: Mapping[str, str], kind: str | None) -> str:
    """The kind asked for, or the one that the values of {subject: value} suggest."""
    words = [f"{value} ({subject})" for subject, value in used.items() if _number(value) is None]
    many = len(set(used.values())) > MAX_CLASSES
    if not used:
        raise DataError(f"{file}: {target}: no subject has both a value and a scan")
    if kind is None and many and 0 < len(words) < len(used):
        raise DataError(
            f"{file}: {target}: numbers and words mixed; write numbers or n/a instead of {', '.join(words)}, "
            "or ask for kind classification"
        )
    if kind == "regression" and words:
        raise DataError([f"{file}: {target}: expected a number or n/a, got {word}" for word in words])
    if kind == "comparison" and many and not words:
        raise DataError(
            f"{file}: {target}: {len(set(used.values()))} distinct numbers, of which hardly two are the same; "
            "compare a column of labels, such as groups of them"
        )
    return kind or ("regression" if many and not words else "classification")


def _number(value: str) -> float | None:
    """As people write numbers: not Python's 1_000, inf and nan."""
    return float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value, re.ASCII) else None


def _deal(
    subjects: Sequence[_Subject], shares: Mapping[str, Fraction], kind: str, seed: int
) -> dict[str, list[_Subject]]:
    """Subjects to splits. Shuffled, then sorted by stratum, each goes to the split that lags its share most: so every
    stratum, and the whole, is divided by the shares up to a subject."""
    order = sorted(subjects, key=lambda subject: subject.name)
    if kind == "regression":  # at most ten bins of at least five: finer ones would leave nothing to chance
        order.sort(key=lambda subject: float(subject.value))
        bins = max(min(10, len(order) // 5), 1)
        strata = {subject.name: str(rank * bins // len(order)) for rank, subject in enumerate(order)}
    else:
        strata = {subject.name: subject.label for subject in order}
    random.Random(seed).shuffle(order)
    order.sort(key=lambda subject: strata[subject.name])
    splits: dict[str, list[_Subject]] = {name: [] for name in shares}
    for dealt, subject in enumerate(order, start=1):
        lags = {name: shares[name] * dealt - len(splits[name]) for name in shares}
        splits[max(lags, key=lambda name: lags[name])].append(subject)
    return {name: sorted(members, key=lambda subject: subject.name) for name, members in splits.items()}


def _check_subjects(
    root: Path, target: str, kind: str, subjects: Sequence[_Subject], splits: Mapping[str, Sequence[_Subject]]
) -> None:
    labels = sorted({subject.label for subject in subjects})
    faults = [f"{root}: {target}: label {label!r}: {fault}" for label in labels for fault in _forged(label)]
    if len(labels) == 1:
        faults.append(f"{root}: {target}: every subject is {labels[0]}; expected at least two values")
    needed = 2 if kind == "comparison" else 1
    faults += [
        f"split {name}: gets {len(members)} of {len(subjects)} subjects, a {kind} needs at least {needed}; "
        "give it a larger share or leave it out"
        for name, members in splits.items()
        if len(members) < needed
    ]
    if faults:
        raise DataError(faults)


Side = tuple[_Subject, _Scan]


def _pairs(members: Sequence[_Subject], number: int, rng: random.Random) -> list[tuple[Side, Side]]:
    """For each scan of each member, as query, `number` references among the others: half of its label where there are
    enough, the odd one in turn; fewer where there are no more."""
    labels = dict.fromkeys(subject.label for subject in members)
    same = {label: [s for s in members if s.label == label] for label in labels}
    different = {label: [s for s in members if s.label != label] for label in labels}
    place = {subject.name: i for of_label in same.values() for i, subject in enumerate(of_label)}
    pairs: list[tuple[Side, Side]] = []
    queries = [(subject, scan) for subject in members for scan in subject.scans]
    for turn, (query, scan) in enumerate(queries):
        alike, others = range(len(same[query.label]) - 1), different[query.label]  # places of those but the query's own
        num_alike = min(len(alike), max((number + turn % 2) // 2, number - len(others)))
        num_others = min(len(others), number - num_alike)
        references = [same[query.label][i + (i >= place[query.name])] for i in rng.sample(alike, num_alike)]
        references += rng.sample(others, num_others)
        pairs += [((reference, rng.choice(reference.scans)), (query, scan)) for reference in references]
    return pairs


def _counted(kind: str, subjects: Sequence[_Subject], members: Sequence[_Subject]) -> str:
    """What a split holds: subjects per label, or the range of the numbers."""
    if kind == "regression":
        numbers = [float(subject.value) for subject in members]
        return f"{min(numbers):g} to {max(numbers):g}, mean {math.fsum(numbers) / len(numbers):.4g}"
    labels = Counter(subject.label for subject in members)
    return ", ".join(f"{label} {labels[label]}" for label in sorted({s.label for s in subjects}))  # zeros too


@dataclass(frozen=True)
class _Writer:
    """Records of the schema that `read_conversations` reads."""

    root: Path
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
        image = {"type": "image", "modality": self.modality, "image_path": self.path(scan)}
        asked, said = ({"type": "text", "text": self.text(key, subject)} for key in (question, answer))
        return [{"role": "user", "content": [image, asked]}, {"role": "assistant", "content": [said]}]

    def text(self, key: str, subject: _Subject) -> str:
        return self.texts[key].format(target=self.target.replace("_", " "), label=subject.label)

    def path(self, scan: _Scan) -> str:
        return scan.path.relative_to(self.root).as_posix()

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
            "images": [
                {"path": self.path(scan), "token": IMAGE_MARKER, "modality": self.modality} for _, scan in sides
            ],
            "conversations": turns,
            "metadata": {"subject_id": subject.name, "subject_label": label, **metadata, "kind": self.kind},
        }


def _plain_number(value: str) -> int | float:
    return int(value) if value.lstrip("+-").isdigit() else float(value)
