"""Turn a BIDS data set into conversations about one column: write a study of it, and build it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from umbrella_jax.config.schema import TaskKind, modality_names, resolve_modality
from umbrella_jax.console import command_lines, plural, wrapped
from umbrella_jax.data.bids.participants import PARTICIPANTS, Participants, read_levels
from umbrella_jax.data.bids.scans import MODALITIES, BidsFiles, BidsScan, find_files, find_scans, left_out
from umbrella_jax.data.bids.templates import TEMPLATES, read_template
from umbrella_jax.data.placeholders import control_token_faults
from umbrella_jax.data.subject_split import SPLITS, balanced_levels, read_splits, split_names, split_subjects
from umbrella_jax.errors import ConfigError, DataError, Faults, why_not_a_directory
from umbrella_jax.io.files import check_new_folder, relative_path
from umbrella_jax.study.bids_values import (
    LabelledSubject,
    ValuedScan,
    choose_kind,
    count_people,
    group_by_label,
    labels_of,
    scans_with_values,
)
from umbrella_jax.study.build import write_study
from umbrella_jax.study.built import BuiltStudy
from umbrella_jax.study.cohort import Cohort
from umbrella_jax.study.motion import MEAN_FD, mean_over_runs, missing_note, with_motion
from umbrella_jax.study.schema import (
    DEFAULT_SEED,
    STUDY,
    TRAIN,
    ReferencesConfig,
    ScansConfig,
    SplitConfig,
    StudyConfig,
    TableConfig,
    TaskStudyConfig,
    dump_study,
)
from umbrella_jax.study.split import Partition
from umbrella_jax.study.visits import Flow, Scan, Visit


def from_bids(
    root: str | Path,
    out: str | Path,
    target: str,
    *,
    kind: TaskKind | None = None,
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
    """Write conversations about `target` to `out`/SPLIT.json, one file per split.

    Image paths are relative to `root`. A file is a list with one conversation per line; if all splits together have
    more than LONG conversations, it is `out`/SPLIT.jsonl instead, in JSON Lines. The folder appears when it is
    complete.

    `out`/splits.tsv lists every subject's split. The split depends on participants.tsv, on which subjects have a scan
    and on `seed`, never on the target (see `split_subjects`). All scans of a subject are in one split.

    With fMRIPrep's tables of confounds beside the runs, `metadata` has `mean_fd`, the mean framewise displacement.

    Args:
        root: the data set, with participants.tsv.
        out: an empty or new directory.
        target: column of participants.tsv, of sub-*_sessions.tsv, or of a table in phenotype/ with `session_id`. A
            value per session applies to the scans of that session. `Levels` in participants.json and sessions.json
            replace values by texts.
        kind: classification, regression, or comparison (a reference subject of the same split, then the query).
            Default: regression if all values are numbers and more than MAX_CLASSES are distinct; else classification.
        modality: sMRI or T1 (anat/*_T1w), fMRI or rsfMRI (func/*_task-rest*_bold).
        template: YAML or JSON with the sections of TEMPLATES, and `labels` that replace values by texts.
        split: NAME=SHARE,...; the shares sum to 1. Default train=0.8,eval=0.2.
        split_from: directory of an earlier call whose splits.tsv is used instead of `split` and `seed`.
        seed: for the split and the pairs; default 1234.
        entities: KEY=VALUE that file names must have, such as ses=1, or KEY=none for names without the key; if a
            key is given twice, either value is accepted.
        derivatives: use the scans in `root`/derivatives/THIS instead.
        missing: values that mean a missing one, besides those of `is_missing`. If given, no other value is doubted.
        pairs_per_subject: references for each scan of a query subject; default 4. Half have its label if there are
            enough. Only for kind comparison.

    Returns:
        Lines about what was written, what was left out and why, and the command that trains on it.

    Raises:
        DataError: with every fault of the data set and the arguments, before anything is written.
    """
    root, out, modality = Path(root), Path(out), resolve_modality(modality, MODALITIES) or modality
    if not root.is_dir():
        raise DataError(f"{root}: {why_not_a_directory(root)}; expected a directory with a BIDS data set")
    faults, notes = Faults(), list[str]()
    faults.check(lambda: _check_arguments(out, kind, modality, pairs_per_subject))
    if split_from is not None and not (split is None and seed is None):
        faults.append("split_from: the split comes from another directory; leave out split and seed")
    seed = DEFAULT_SEED if seed is None else seed
    shares = faults.check(lambda: _parse_shares(split or "train=0.8,eval=0.2"))
    earlier_split = faults.check(lambda: read_splits(Path(split_from) / SPLITS)) if split_from is not None else None
    sections = faults.check(lambda: read_template(template))
    levels = faults.check(lambda: read_levels(root, target))
    table = faults.check(lambda: Participants.read(root, target))
    files = faults.check(lambda: find_files(root, derivatives, notes))
    scans = None
    if files is not None and modality in MODALITIES:
        scans = faults.check(lambda: find_scans(root, files, modality, entities, notes))
    if table is None or files is None or scans is None or sections is None or levels is None:
        raise DataError(faults)

    texts = {**levels, **sections.pop("labels", {})}
    valued_scans = faults.check(
        lambda: scans_with_values(table, files, scans, target, missing=missing, labels=texts, notes=notes)
    )
    if valued_scans is None:
        raise DataError(faults)
    kind = faults.check(lambda: choose_kind(table, target, valued_scans, kind, texts=texts, notes=notes))
    if kind is None or shares is None or faults:
        raise DataError(faults)
    if kind == "regression":
        texts = {}
    notes += _value_notes(table, target, kind, valued_scans, texts)
    subjects = group_by_label(valued_scans, texts)
    if earlier_split is None:
        split_of = split_subjects(balanced_levels(_balanced_columns(table, files)), shares, seed)
    else:
        split_of = earlier_split
    names = list(shares) if earlier_split is None else split_names(split_of)
    splits = {name: [s for s in subjects if split_of.get(s.name) == name] for name in names}
    if unassigned := list(dict.fromkeys(s.name for s in subjects if s.name not in split_of)):
        notes.append(left_out(f"subjects that are not in {split_from}/{SPLITS}", unassigned))
    faults += _split_faults(root, target, kind, subjects, splits, notes)
    if pairs_per_subject is not None and kind != "comparison":
        faults.append(f"pairs_per_subject: only for kind comparison, and this is a {kind}; leave it out")
    if faults:
        raise DataError(faults)

    task = f"{target}_classification_via_comparison" if kind == "comparison" else f"{target}_{kind}"
    texts_of_parts = {part: (text,) for part, text in sections[kind].items()}
    cohort = _cohort(table, modality, scans, valued_scans, target)
    if modality == "fMRI" and target != MEAN_FD:
        cohort = _with_motion(cohort, root, notes)
    references = ReferencesConfig(per_query=pairs_per_subject or ReferencesConfig().per_query, split="same")
    config = StudyConfig(
        root=relative_path(root, out),
        subjects=(TableConfig(file=PARTICIPANTS),),
        sessions=tuple(
            TableConfig(file=name, columns={} if name.startswith("sub-") else {target: target})
            for name in table.session_files
        ),
        scans={modality: _scans_config(derivatives, entities)},
        missing={target: tuple(missing)},
        keep=tuple(column for column in cohort.columns if column == MEAN_FD and column != target),
        tasks={
            re.sub(r"\W", "_", task): TaskStudyConfig(
                kind=kind,
                column=target,
                labels=texts,
                question=texts_of_parts["question"],
                answer=texts_of_parts["answer"],
                reference_question=texts_of_parts.get("reference_question"),
                reference_answer=texts_of_parts.get("reference_answer"),
                references=references if kind == "comparison" else None,
            )
        },
        split=SplitConfig(file=relative_path(out / SPLITS, root), seed=seed),
    )
    partition = Partition(None, None, split_of)
    built = BuiltStudy(config, dump_study(config), root, {STUDY: cohort}, [partition], notes)
    suffix = write_study(built, out, short_form=True)
    lines = [f"{root}: {target}, {kind}, {modality}, {count_people(subjects)} of {len(table.rows)} subjects"]
    for name, counts in built.counts[STUDY].items():
        size = f"{plural(len(counts.subjects), 'subject')}, {plural(counts.conversations, 'conversation')}"
        lines.append(f"{out / f'{name}{suffix}'}: {size}: {_label_summary(kind, subjects, splits[name])}")
        for types in counts.comparison_types.values():
            lines.append(f"  pairs: same {types['same']}, different {types['different']}")
    lines += [line for note in notes for line in wrapped(note)]
    return [*lines, *_next_command(root, out, target, modality, splits, suffix)]


def _scans_config(derivatives: str | None, entities: Sequence[str]) -> ScansConfig:
    selected: dict[str, list[str]] = defaultdict(list)
    for entity in entities:
        key, _, value = entity.partition("=")
        selected[key].append(value)
    folder = f"derivatives/{derivatives}" if derivatives else "."
    return ScansConfig(bids=folder, entities={key: tuple(values) for key, values in selected.items()})


def _cohort(
    table: Participants,
    modality: str,
    scans: Mapping[str, Sequence[BidsScan]],
    valued_scans: Sequence[ValuedScan],
    target: str,
) -> Cohort:
    """Return the visits with a value, and everybody who has none."""
    groups: dict[tuple[str, str | None], list[ValuedScan]] = defaultdict(list)
    for scan, value in valued_scans:
        groups[scan.subject, scan.entities.get("ses")].append((scan, value))
    visits = tuple(
        Visit(
            subject,
            session,
            {target: group[0][1]},
            {modality: tuple(Scan(s.path, modality, s.entities) for s, _ in group)},
        )
        for (subject, session), group in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    )
    flow = Flow(included=list(dict.fromkeys(visit.subject for visit in visits)))
    included = set(flow.included)
    flow.leave_out(f"in {PARTICIPANTS}, but without a scan", [s for s in table.rows if s not in scans])
    flow.leave_out(f"with a scan, but without a row in {PARTICIPANTS}", [s for s in scans if s not in table.rows])
    flow.leave_out(f"no value of {target}", [s for s in scans if s in table.rows and s not in included])
    return Cohort(visits, flow, (target,), (table.path,))


def _with_motion(cohort: Cohort, root: Path, notes: list[str]) -> Cohort:
    """Return the cohort with the column of mean framewise displacement, if some run has a table of confounds."""
    missing, faults, visits = list[str](), Faults(), list[Visit]()
    for visit in cohort.visits:
        with faults:
            scans = with_motion(visit.scans, root, missing)
            cell = mean_over_runs(scan for group in scans.values() for scan in group)
            visits.append(replace(visit, scans=scans, values={**visit.values, **({MEAN_FD: cell} if cell else {})}))
    faults.raise_as(DataError)
    if missing:
        notes.append(missing_note(missing))
    if not any(MEAN_FD in visit.values for visit in visits):
        return cohort
    return replace(cohort, visits=tuple(visits), columns=(*cohort.columns, MEAN_FD))


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


def _parse_shares(split: str) -> dict[str, Fraction]:
    """Parse NAME=SHARE,... to exact fractions, so that 0.8 and 0.2 sum to 1."""
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


def _value_notes(
    table: Participants, target: str, kind: str, valued_scans: Sequence[ValuedScan], texts: Mapping[str, str]
) -> list[str]:
    """Return lines about values that no text replaces, and about sessions that share one number."""
    notes = []
    if texts and (unspelled := sorted({value for _, value in valued_scans} - texts.keys())):
        notes.append(
            f"used as in {PARTICIPANTS}, since neither Levels nor labels describe them: {', '.join(unspelled)}"
        )
    visits = {(scan.subject, scan.entities.get("ses")) for scan, _ in valued_scans}
    several = sum(number > 1 for number in Counter(subject for subject, _ in visits).values())
    if kind == "regression" and several and not table.sessions:
        notes.append(
            f"{plural(several, 'subject')} with several sessions: every session has the {target} in {PARTICIPANTS}, "
            "because no sub-*_sessions.tsv has one"
        )
    return notes


def _balanced_columns(table: Participants, files: BidsFiles) -> dict[str, dict[str, str]]:
    """Return {subject: {column: cell}} for the split to balance: all columns, and which modalities have scans.

    The subjects are those with a row and with a scan of any modality or a folder in any derivatives, so the split does
    not depend on the request.
    """
    return {
        subject: {column: cell for column, cell in cells.items() if column != "participant_id"}
        | {f"scan {modality}": str(modality in files.modalities[subject]) for modality in MODALITIES}
        for subject, cells in table.rows.items()
        if subject in files.modalities
    }


def _split_faults(
    root: Path,
    target: str,
    kind: str,
    subjects: Sequence[LabelledSubject],
    splits: Mapping[str, Sequence[LabelledSubject]],
    notes: Sequence[str],
) -> list[str]:
    """Return faults for labels that cannot be taught, and for splits with too few subjects."""
    labels = labels_of(subjects)
    faults = [f"{root}: {target}: label {label!r}: {f}" for label in labels for f in control_token_faults(label)]
    if len(labels) == 1:
        faults.append(f"{root}: {target}: every subject is {labels[0]}; expected at least two values")
    needed = 2 if kind == "comparison" else 1
    small = [
        f"--split {name}: gets {count_people(members)} of {count_people(subjects)} subjects, a {kind} needs at least "
        f"{needed}; give it a larger share, another --seed, or leave it out"
        for name, members in splits.items()
        if count_people(members) < needed
    ]
    return faults + ["; ".join([fault, *notes]) for fault in small[:1]] + small[1:]


def _label_summary(kind: str, subjects: Collection[LabelledSubject], members: Iterable[LabelledSubject]) -> str:
    """Return the subjects per label in a split, labels of no member included, or the range of its numbers."""
    if kind == "regression":
        numbers = [float(subject.value) for subject in members]
        return f"{min(numbers):g} to {max(numbers):g}, mean {math.fsum(numbers) / len(numbers):.4g}"
    counts = Counter(subject.label for subject in members)
    return ", ".join(f"{label} {counts[label]}" for label in labels_of(subjects))


def _next_command(root: Path, out: Path, target: str, modality: str, splits: Collection[str], suffix: str) -> list[str]:
    """Return the lines of the command that trains on the conversations."""
    if TRAIN not in splits:
        return []
    flags = {"config": MODALITIES[modality][2], "base": "LLAVA_DIR"}
    flags |= {f"{name}-data": str(out / f"{name}{suffix}") for name in (TRAIN, "eval") if name in splits}
    flags |= {"image-root": str(root), "out": f"runs/{target}"}
    return ["next:", *(f"  {line}" for line in command_lines("umbrella-jax train", flags))]
