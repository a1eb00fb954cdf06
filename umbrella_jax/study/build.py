"""Build a study: read its tables and scans, split its subjects, and write conversations, a record and a page."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from umbrella_jax.config.schema import OPEN_KINDS, resolve_modality
from umbrella_jax.console import command_lines, plural, wrapped
from umbrella_jax.data.bids.scans import MODALITIES, left_out
from umbrella_jax.data.conversation import LOCK_FILE
from umbrella_jax.data.subject_split import SPLITS
from umbrella_jax.errors import DataError, Faults, why_not_a_directory
from umbrella_jax.io.files import PRIVATE, check_new_folder, naming, new_folder, open_private, strict_json, write_whole
from umbrella_jax.study.built import BuiltStudy, SplitCounts, visits_by_split
from umbrella_jax.study.cohort import Cohort, read_cohort
from umbrella_jax.study.leaks import scan_faults, split_leaks
from umbrella_jax.study.lock import describe_study
from umbrella_jax.study.page import PAGE, write_page
from umbrella_jax.study.records import TaskRecords, make_records
from umbrella_jax.study.schema import STUDY, ExternalConfig, StudyConfig, load_study
from umbrella_jax.study.split import Partition, split_cohort
from umbrella_jax.study.visits import Visit

LONG = 100_000
"""Conversations in all splits (90 MB) up to which the files are JSON lists. Most programs can only read a list as a
whole, so more are written as JSON Lines."""
_FOLD_NOTES = 10
"""Notes about single folds that are printed."""
_LABELS_SHOWN = 20
"""Labels of a task that are printed, the most frequent ones."""


def build_study(path: str | Path, out: str | Path) -> list[str]:
    """Build a study file into `out`, an empty or new directory that appears when it is complete.

    `out` gets what `write_study` writes.

    Returns:
        Lines about what was written, what was left out and why.

    Raises:
        ConfigError, DataError: every fault of the study file, tables and scans, before anything is written.
    """
    path = Path(path)
    config = load_study(path)
    return build_config(config, path.read_text(encoding="utf-8"), path.parent / config.root, Path(out), str(path))


def build_config(config: StudyConfig, text: str, root: Path, out: Path, source: str) -> list[str]:
    """Read the tables and scans of a study and write it, as `build_study` does.

    Args:
        config: the study.
        text: the same, as a file.
        root: folder that paths start at.
        out: an empty or new directory.
        source: name of the study in messages.
    """
    faults, notes = Faults(), list[str]()
    with faults:
        check_new_folder(out)
    if not root.is_dir():
        faults.append(f"{source}: root: {root}: {why_not_a_directory(root)}; expected the folder that paths start at")
        faults.raise_as(DataError)
    cohorts = _read_cohorts(config, root, faults, notes)
    partitions = split_cohort(config.split, cohorts[STUDY].visits, root, faults, notes)
    splits = {split for partition in partitions for split in partition.split_of.values()}
    faults += [
        f"external.{name}: {config.split.file} lists subjects in a split of this name; choose another"
        for name in config.external
        if name in splits
    ]
    faults.raise_as(DataError)
    built = BuiltStudy(config, text, root, cohorts, partitions, notes)
    suffix = write_study(built, out)
    return summary_lines(built, out, suffix)


def write_study(built: BuiltStudy, out: Path, *, short_form: bool = False) -> str:
    """Write conversations, splits and page of a study whose tables and scans are read.

    `out` gets SPLIT.json per split (or fold-K/SPLIT.json per fold and split), each a list with one conversation per
    line, or SPLIT.jsonl for more than LONG conversations; splits.tsv with the split (or fold) of every subject;
    study.yaml, the study's text; study.html, a page to look at; and study.lock.json, see `describe_study`.

    Args:
        built: the study, without counts; gets these, and notes about what the tasks leave out.
        out: an empty or new directory.
        short_form: for `data from-bids`, whose split never depends on the labels: labels that are rare or that a split
            lacks are notes, not faults; and there is no record, which would be a .json beside the conversations.

    Returns:
        The suffix of the conversation files.

    Raises:
        DataError: every fault of the tasks; nothing is written then.
    """
    faults = Faults()
    faults += scan_faults((visit for cohort in built.cohorts.values() for visit in cohort.visits), built.root)
    task_notes: dict[str, list[str]] = {}
    with new_folder(out, 0o700) as folder:
        for partition in built.partitions:
            notes = task_notes.setdefault(partition.name or STUDY, [])
            splits, tasks = _make_partition(built, partition, faults, notes, refuse_rare_labels=not short_form)
            place = folder / (partition.name or "")
            place.mkdir(mode=0o700, exist_ok=True)
            built.counts[partition.name or STUDY] = {
                split: _write_lines(place / f"{split}.jsonl", chain.from_iterable([task[split] for task in tasks]))
                for split in splits
            }
        faults.raise_as(DataError)
        built.notes.extend(_join_notes(task_notes))
        suffix = ".jsonl"
        if sum(c.conversations for of_splits in built.counts.values() for c in of_splits.values()) <= LONG:
            suffix = ".json"
            for file in sorted(folder.rglob("*.jsonl")):
                _make_list(file)
        column = "fold" if built.has_folds else "split"
        rows = "".join(f"{subject}\t{group}\n" for subject, group in built.group_of.items())
        write_whole(folder / SPLITS, f"participant_id\t{column}\n{rows}", PRIVATE)
        write_whole(folder / "study.yaml", built.text, PRIVATE)
        write_page(built, folder / PAGE)
        if not short_form:
            record = strict_json(describe_study(built, out, suffix), indent=1)
            write_whole(folder / LOCK_FILE, record + "\n", PRIVATE)
    return suffix


def _read_cohorts(config: StudyConfig, root: Path, faults: Faults, notes: list[str]) -> dict[str, Cohort]:
    """Read the study's cohort and the external ones. Raise DataError with the faults of all."""
    cohorts = {}
    for name, cohort_config in {STUDY: config, **config.external}.items():
        own_notes = list[str]()
        with faults:
            cohorts[name] = read_cohort(cohort_config, config, root, faults, own_notes)
            if isinstance(cohort_config, ExternalConfig):
                cohorts[name] = cohorts[name].with_prefix(cohort_config.prefix, config.split.by)
        notes += own_notes if name == STUDY else [f"external.{name}: {note}" for note in own_notes]
    faults.raise_as(DataError)
    return cohorts


def _join_notes(notes_of: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the notes of all folds' tasks: those about who is in which split name their fold, others come once."""
    first = next(iter(notes_of.values()))
    # what a task leaves out does not depend on the fold, but the order in which its rows are named does
    common = [n for n in first if ": left out: " in n or all(n in notes for notes in notes_of.values())]
    own = [f"{f}: {n}" for f, notes in notes_of.items() for n in notes if n not in common and ": left out: " not in n]
    more = [f"and {len(own) - _FOLD_NOTES:,} more notes about folds"] if len(own) > _FOLD_NOTES else []
    return [*common, *own[:_FOLD_NOTES], *more]


def _make_partition(
    built: BuiltStudy, partition: Partition, faults: Faults, notes: list[str], *, refuse_rare_labels: bool
) -> tuple[list[str], list[TaskRecords]]:
    """Return the splits and each task's records, made as they are read. Raise DataError with every fault so far."""
    visits_of: dict[str, Sequence[Visit]] = {**visits_by_split(partition, built.cohorts[STUDY].visits)}
    visits_of |= {name: cohort.visits for name, cohort in built.cohorts.items() if name != STUDY}
    faults += split_leaks(built.config, visits_of)
    tasks = [
        make_records(name, built.config, visits_of, faults, notes, refuse_rare_labels=refuse_rare_labels)
        for name in built.config.tasks
    ]
    faults.raise_as(DataError)
    return list(visits_of), tasks


def _write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> SplitCounts:
    """Write JSON Lines and return what they contain; only one record is in memory at a time."""
    counts = SplitCounts()
    with naming(file), open(file, "w", encoding="utf-8", opener=open_private) as lines:
        for record in records:
            lines.write(strict_json(record, ensure_ascii=False) + "\n")
            counts.add(record)
    return counts


def _make_list(lines_file: Path) -> None:
    """Replace a file of JSON Lines by one with a JSON list, an item per line."""
    file = lines_file.with_suffix(".json")
    with (
        naming(file),
        open(lines_file, encoding="utf-8", newline="\n") as lines,
        open(file, "w", encoding="utf-8", opener=open_private) as out,
    ):
        out.write("[\n" + "".join(f"{',' + chr(10) if n else ''}{line[:-1]}" for n, line in enumerate(lines)) + "\n]\n")
    lines_file.unlink()


def summary_lines(built: BuiltStudy, out: Path, suffix: str) -> list[str]:
    """Return what `data build` prints: the flow, each file or fold, the tasks, every note, and the next commands."""
    lines = []
    for name, cohort in built.cohorts.items():
        flow = cohort.flow
        lines.append(f"{name}: {plural(flow.total, 'subject')}, {len(flow.included):,} included")
        lines += [f"  {left_out(reason, subjects)}" for reason, subjects in flow.left_out.items()]
    if built.has_folds:
        for partition in built.partitions:
            sizes = [f"{s} {len(counts.subjects):,}" for s, counts in built.counts[str(partition.name)].items()]
            without = f" without {partition.left_out}" if partition.left_out is not None else ""
            lines.append(f"{out / str(partition.name)}{without}: subjects: {', '.join(sizes)}")
        lines += ["test sets of all folds together:", *_task_lines(built, built.tested_labels)]
    else:
        for split, counts in built.counts[STUDY].items():
            size = f"{plural(len(counts.subjects), 'subject')}, {plural(counts.conversations, 'conversation')}"
            lines += [f"{out / f'{split}{suffix}'}: {size}", *_task_lines(built, counts.labels)]
    return [*(line for text in (*lines, *built.notes) for line in wrapped(text)), *_next_commands(built, out, suffix)]


def _task_lines(built: BuiltStudy, labels_of: Mapping[str, Counter[str]]) -> list[str]:
    """Return a line per task with its conversations, and its labels or the range of its numbers."""
    lines = []
    for task, labels in labels_of.items():
        size, kind = f"  {task}: {plural(labels.total(), 'conversation')}", built.config.tasks[task].kind
        if kind == "regression":
            numbers = [float(label) for label in labels]
            size += f", {min(numbers):g} to {max(numbers):g}"
        elif kind not in OPEN_KINDS:
            shown = labels.most_common(_LABELS_SHOWN)
            size += f": {', '.join(f'{label} ({number:,})' for label, number in sorted(shown))}"
            size += f", and {len(labels) - len(shown):,} more labels" if len(labels) > len(shown) else ""
        lines.append(size)
    return lines


def _next_commands(built: BuiltStudy, out: Path, suffix: str) -> list[str]:
    """Return the lines of the commands that check the scans and train."""
    shown = [resolve_modality(name, MODALITIES) for name in built.config.scans]
    shipped = MODALITIES[shown[0]][2] if len(shown) == 1 and shown[0] else "joint_0.5b"
    model: dict[str, str | Path] = {"config": shipped if all(shown) else "CONFIG.yaml", "base": "LLAVA_DIR"}
    folds, splits = built.has_folds, next(iter(built.counts.values()))
    if "train" not in splits:
        return []
    folder = out / str(built.partitions[0].name) if folds else out
    # the test set of a fold: its scans and those of train are all scans, unless there is an eval split
    other = next((s for s in (("test", "eval") if folds else ("eval", "test")) if s in splits), None)
    data: dict[str, str | Path] = {"image-root": built.root, "train-data": folder / f"train{suffix}"}
    data |= {"eval-data": folder / f"{other}{suffix}"} if other else {}
    lines = command_lines("umbrella-jax data validate", {**model, **data})
    if folds:
        lines += command_lines(f"umbrella-jax cv {shlex.quote(str(out))}", {**model, "out": "runs/cv"})
    else:
        lines += command_lines("umbrella-jax train", {**model, **data, "out": f"runs/{out.name}"})
    return [f"look at {out / PAGE}", "next:", *(f"  {line}" for line in lines)]
