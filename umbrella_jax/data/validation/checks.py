"""Check everything that a run would read, and report all faults and oddities at once. Changes nothing."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from umbrella_jax.config.schema import LORA, MAX_CLASSES, RunConfig
from umbrella_jax.console import Progress, plural
from umbrella_jax.data.augment import check_axes
from umbrella_jax.data.background import (
    Remark,
    describe_choice,
    describe_conflict,
    describe_mixed_windows,
    describe_mixture,
    group_by_modality,
)
from umbrella_jax.data.bids.sidecars import find_sidecars
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.cache import check_float16
from umbrella_jax.data.conversation import Conversation, Conversations, Image, scan_conversations
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.repetition_time import read_repetition_time
from umbrella_jax.data.threads import map_in_threads
from umbrella_jax.data.tokenize import CachingTokenizer, encode, encode_prompt, reference_answer
from umbrella_jax.data.validation.contents import ContentsReader
from umbrella_jax.data.validation.findings import (
    PROPERTIES,
    SETS,
    ConversationSet,
    Finding,
    Severity,
    ShownVolume,
    ValidationReport,
    VolumeContents,
    task_name,
)
from umbrella_jax.data.validation.leaks import Exchange, LeakSearch, simplify
from umbrella_jax.data.volume import check_opened, fit_voxels
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.rundir import Say, say_nothing

T = TypeVar("T")
_ALMOST_EMPTY = 0.01  # fraction of voxels that are not 0
_NEARLY_CONSTANT = 1e-4  # range of the voxels, as a fraction of the largest
_RARE = 20  # a value is an outlier if at most one volume in so many has it, or only one at all
_NAMES_SHOWN = 5  # answers of a contradiction, usual values of a property, shared subjects and scans


def validate(
    config: RunConfig,
    load_tokenizer: Callable[[], Any | None] = lambda: None,
    check_answers: Callable[[Sequence[Conversation]], object] = lambda conversations: None,
    say: Say = say_nothing,
) -> ValidationReport:
    """Read all conversations and volumes of a run, train and eval, and continue after every fault.

    Args:
        config: of the run.
        load_tokenizer: returns the base's tokenizer, or None if it is not on this machine. An UmbrellaError becomes a
            fault.
        check_answers: checks the evaluation conversations if they have no other fault. An UmbrellaError lists the
            answers that cannot be scored.
        say: receives a line about the progress every half minute, unless a bar on the terminal shows it.

    Raises:
        ConfigError: neither data.train nor data.eval is given.
    """
    paths = {name: path for name in SETS if (path := getattr(config.data, name)) is not None}
    if not paths:
        raise ConfigError("data.train, data.eval: expected a path (--train-data PATH, --eval-data PATH)")
    findings: list[Finding] = []

    def collect(check: Callable[[], T], kind: str, *sets: str) -> T | None:
        faults = Faults()
        value = faults.check(check)
        findings.extend(_as_findings(kind, sets, faults))
        return value

    def unchecked(place: str, reason: str, *sets: str) -> None:
        findings.append(Finding("warning", "unchecked", sets, place, reason))

    base_tokenizer = collect(load_tokenizer, "base")
    if base_tokenizer is None:
        unchecked(
            "text",
            "no tokenizer on this machine, so lengths and supervised tokens were not checked; expected --base HF_DIR",
            *paths,
        )
    sets: dict[str, ConversationSet] = {}
    for name, path in paths.items():
        scanned = collect(partial(_read_conversations, config, path), "conversation", name)
        conversations, faults = scanned or ([], [])
        findings += _as_findings("conversation", (name,), faults)
        lengths, faults = _encode_texts(config, conversations, base_tokenizer, evaluation=name == "eval")
        findings += _as_findings("text", (name,), faults)
        sets[name] = ConversationSet(str(path), conversations, lengths)
    if "eval" in sets and not any(f.severity == "fault" and "eval" in f.sets for f in findings):
        collect(partial(check_answers, sets["eval"].conversations), "answers", "eval")
    volumes, faults_of, remarks = _read_volumes(config, sets, say)
    for volume in volumes:
        findings += _as_findings("volume", volume.sets, faults_of.get(volume, ()), str(volume.path))

    faulty = {name for f in findings if f.kind == "conversation" for name in f.sets}
    findings += _missing_images(config, {name: s for name, s in sets.items() if name not in faulty})
    if len(sets) == 1:
        unchecked("train and eval", "only one is given, so shared subjects and scans were not looked for", *sets)
    for name, s in sets.items():
        if unnamed := sum(not c.subjects for c in s.conversations):
            unchecked(s.path, f"{unnamed} of {len(s.conversations)} conversations name no subject", name)
    severity: Severity = "warning" if config.data.allow_overlap else "fault"
    findings += overlaps(sets, volumes, severity)
    findings += _duplicates(volumes, {f.place for f in findings if f.kind == "overlap"}, severity)
    findings += _leaks(sets)
    findings += _contradictions(sets, volumes)
    findings += _answer_findings(sets)
    findings += _repeated_ids(sets)
    findings += _headers(volumes)
    findings += _repetition_times(config, volumes)
    findings += _empty(volumes)
    findings += _backgrounds(config, volumes, remarks)
    for modality, settings in config.model.modalities.items():
        compared = [name for name in PROPERTIES if name != "TR (s)" or settings.tr is None]
        findings += _outliers([v for v in volumes if v.modality == modality], compared)
    return ValidationReport(sets, tuple(volumes), tuple(findings))


def _as_findings(kind: str, sets: Iterable[str], faults: Iterable[str], place: str | None = None) -> Iterator[Finding]:
    """Yield findings for messages `place: reason`.

    Args:
        kind: of the findings.
        sets: that they concern.
        faults: the messages.
        place: of all findings; None splits each message at its first colon.
    """
    for fault in faults:
        if place is not None and fault.startswith(f"{place}: "):
            yield Finding("fault", kind, tuple(sets), place, fault.removeprefix(f"{place}: "))
        else:
            where, _, reason = fault.partition(": ")
            yield Finding("fault", kind, tuple(sets), *((place, fault) if place is not None else (where, reason)))


def _read_conversations(config: RunConfig, path: str) -> tuple[Conversations, list[str]]:
    data = config.data
    return scan_conversations(
        path,
        config.model.modalities,
        data.image_root,
        modality=data.modality,
        task_filter=data.task_filter,
        allow_outside_root=data.allow_outside_root,
    )


def _encode_texts(
    config: RunConfig, conversations: Sequence[Conversation], tokenizer: Any | None, evaluation: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Encode conversations as a run would.

    Returns:
        Lengths as in `ConversationSet.lengths`, conversations that are too long included; and the faults that a run
        would raise. Without a tokenizer the lengths are empty.
    """
    faults = Faults()
    rows: list[tuple[int, int, int, int]] = []
    modalities, max_length = config.model.modalities, config.data.max_length
    caching = tokenizer and CachingTokenizer(tokenizer)
    common: dict[str, Any] = {"tokenizer": caching, "modalities": modalities, "template": config.data.template}
    encode_whole, encode_question = partial(encode, **common), partial(encode_prompt, **common)
    for c in conversations:
        if tokenizer is None:
            if evaluation:
                faults.check(partial(reference_answer, c))  # checks that there is an answer to compare with
            continue
        if evaluation:
            faults.check(partial(encode_question, c, max_length=max_length))
        whole = faults.check(partial(encode_whole, c, max_length=max_length, needs_answer=not evaluation))
        if whole is None:  # encode it without a limit, for the statistics of lengths
            whole = faults.check(partial(encode_whole, c, max_length=sys.maxsize, needs_answer=False))
        if whole is None:  # it has another fault than its length
            continue
        patches = sum(modalities[image.modality].num_patches for image in whole.images)
        rows.append((len(whole), patches, len(whole) - patches, int(whole.supervised.sum())))
    names = ("positions", "patches", "text", "supervised")
    columns = np.array(rows, np.int64).reshape(-1, len(names)).T
    return {} if tokenizer is None else dict(zip(names, columns, strict=True)), list(dict.fromkeys(faults))


def _read_volumes(
    config: RunConfig, sets: Mapping[str, ConversationSet], say: Say
) -> tuple[list[ShownVolume], dict[ShownVolume, tuple[str, ...]], list[Remark]]:
    """Read every distinct volume that conversations show.

    Returns:
        The volumes, {volume: its faults} for faulty ones, and remarks about backgrounds.
    """
    remarks: list[Remark] = []
    shown: dict[Image, dict[str, None]] = defaultdict(dict)
    for name, s in sets.items():
        for image in (image for c in s.conversations for image in c.images):
            shown[image][name] = None

    def range_check(path: Path) -> Callable[[np.ndarray], object]:
        return partial(check_float16, path) if config.data.cache_dtype == "float16" else lambda volume: None

    def read(image: Image) -> tuple[ShownVolume, tuple[str, ...]]:
        path, modality = image.path, config.model.modalities[image.modality]
        windows, contents = 0, None
        faults: tuple[str, ...] = ()
        try:
            reader = ContentsReader(open_voxels(path))
        except DataError as error:
            return ShownVolume(path, image.modality, tuple(shown[image]), windows, contents), error.faults
        try:
            run = fit_voxels(path, reader, modality)
            windows = check_opened(path, run, modality, range_check(path), note=lambda *remark: remarks.append(remark))
        except DataError as error:
            faults = error.faults
        try:
            contents = reader.contents()
        except DataError as error:
            windows, faults = 0, faults or error.faults  # for example, a file that is cut off after its last window
        if contents is not None and contents.frames > 1:
            contents = _with_repetition_time(path, reader, contents)
        if contents and "train" in shown[image]:
            try:
                check_axes(config.data.augment, {path: contents.orientation})
            except DataError as error:
                faults += error.faults
        return ShownVolume(path, image.modality, tuple(shown[image]), windows, contents), faults

    pairs = []
    with (
        one_blas_thread(),
        Progress("volume", len(shown), say=say, log=say_nothing) as progress,
    ):
        for pair in map_in_threads(read, shown, config.data.threads):
            pairs.append(pair)
            progress.count()
    return [volume for volume, _ in pairs], {volume: faults for volume, faults in pairs if faults}, remarks


def _with_repetition_time(path: Path, reader: ContentsReader, contents: VolumeContents) -> VolumeContents:
    """Return the contents of a run with its sidecar's repetition time, or with a remark if header and sidecar differ.

    Without any statement of it, `contents` stay as they are.
    """
    try:
        return replace(contents, tr=read_repetition_time(path, reader))
    except DataError as error:
        remarks = tuple(fault.removeprefix(f"{path}: ") for fault in error.faults)
    return replace(contents, remarks=contents.remarks + remarks) if find_sidecars(path) else contents


def overlaps(
    sets: Mapping[str, ConversationSet], volumes: Iterable[ShownVolume], severity: Severity
) -> Iterator[Finding]:
    """Yield findings for subjects, groups and scans that train and eval share: the model may be memorising them.

    A subject of train may be a reference in eval.
    """
    expected = "expected other subjects to evaluate on than to train on, or --allow-overlap"
    for place, *labels in _shared_people(sets):
        where = [first + (f" and {len(others)} more" if others else "") for first, *others in labels]
        reason = f"in train ({where[0]}) and in eval ({where[1]}); {expected}"
        yield Finding(severity, "overlap", SETS, place, reason)
    only_references = _only_references(sets["eval"].conversations) if "eval" in sets else set()
    for first, *others in _shared_scans(_by_voxels(volumes), only_references):
        names = f", also as {', '.join(others)}" if others else ""
        yield Finding(severity, "overlap", SETS, first, f"in train and in eval{names}; {expected}")


def check_overlap(datasets: Mapping[str, Dataset], *, allowed: bool) -> str | None:
    """Find subjects that are in train and in eval by name, and scans by name or by the bytes of their files.

    A subject of train may be a reference in eval. Groups, such as families, are those of `metadata.group_id`.
    `validate` goes further: it compares voxels, which may be equal in files with other bytes.

    Returns:
        A warning that counts and names them, None if there are none.

    Raises:
        DataError: there are some, and they are not `allowed`.
    """
    sets_of: dict[tuple[Path, str], list[str]] = defaultdict(list)
    for name, dataset in datasets.items():
        for image in dataset.windows:
            sets_of[image.path, image.modality].append(name)
    scans: dict[str, list[ShownVolume]] = defaultdict(list)
    for (path, modality), names in sets_of.items():
        dataset = datasets[names[0]]
        digest = dataset.sources.digest(path, dataset.modalities[modality])
        scans[digest].append(ShownVolume(path, modality, tuple(names), 1, None))
    people = _shared_names(*(datasets[name].conversations for name in SETS)) if set(datasets) == set(SETS) else []
    only_references = _only_references(datasets["eval"].conversations) if "eval" in datasets else set()
    shared = [" = ".join(paths) for paths in _shared_scans(scans.values(), only_references)]
    if not people and not shared:
        return None
    subjects = sum(place.startswith("subject ") for place in people)
    numbers = {"group": len(people) - subjects, "subject": subjects, "scan": len(shared)}
    *first, last = (plural(number, noun) for noun, number in numbers.items() if number)
    counts = f"{', '.join(first)} and {last}" if first else last
    places = [*people, *shared]
    more = f" and {len(places) - _NAMES_SHOWN} more" if len(places) > _NAMES_SHOWN else ""
    overlap = (
        f"{counts} {'is' if len(places) == 1 else 'are'} in train and in eval: {', '.join(places[:_NAMES_SHOWN])}{more}"
    )
    if allowed:
        return f"{overlap}; the model may be memorising them (data.allow_overlap)"
    raise DataError(
        f"data.train, data.eval: {overlap}; evaluate on other subjects, or allow it: data.allow_overlap: true "
        "(--allow-overlap)"
    )


def _shared_names(train: Sequence[Conversation], evaluation: Sequence[Conversation]) -> list[str]:
    """Return what `_shared_people` calls each one in both, without building the conversations of train."""
    both = [c if isinstance(c, Conversations) else Conversations(c) for c in (train, evaluation)]
    subjects = set.intersection(*(set(own.subjects) for own in both))
    if subjects:
        subjects &= {name for conversation in evaluation for name in conversation.subjects - conversation.references}
    groups = [{str(group) for group in own.metadata_values("group_id") if group is not None} for own in both]
    return [f"subject {name}" for name in sorted(subjects)] + [
        f"group {name}" for name in sorted(groups[0] & groups[1])
    ]


def _shared_people(sets: Mapping[str, ConversationSet]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (`subject NAME` or `group NAME`, its labels in train, its labels in eval) for each one in both."""
    if set(sets) == set(SETS):
        train, evaluation = (sets[name] for name in SETS)
        pairs = {"subject": (train.subjects, evaluation.queried), "group": (train.groups, evaluation.groups)}
        for kind, (shown, asked) in pairs.items():
            for name in sorted(shown.keys() & asked.keys()):
                yield f"{kind} {name}", shown[name], asked[name]


def _only_references(conversations: Iterable[Conversation]) -> set[tuple[Path, str]]:
    """Return (path, modality) of the images that conversations show only as references."""
    shown, queried = set[tuple[Path, str]](), set[tuple[Path, str]]()
    for conversation in conversations:
        shown.update((image.path, image.modality) for image in conversation.images)
        queried.update((image.path, image.modality) for image in conversation.queried_images)
    return shown - queried


def _shared_scans(
    scans: Iterable[Iterable[ShownVolume]], only_references: Container[tuple[Path, str]]
) -> Iterator[list[str]]:
    """Yield the paths of each scan that is in train and in eval.

    Args:
        scans: groups of volumes with equal content.
        only_references: (path, modality) of the volumes that eval shows only as references.
    """
    for group in scans:
        train = any("train" in volume.sets for volume in group)
        if train and any("eval" in v.sets and (v.path, v.modality) not in only_references for v in group):
            yield list(dict.fromkeys(str(volume.path) for volume in group))


def _by_voxels(volumes: Iterable[ShownVolume]) -> Iterable[list[ShownVolume]]:
    """Group volumes with equal voxels."""
    groups: dict[str, list[ShownVolume]] = defaultdict(list)
    for volume in volumes:
        groups[volume.key].append(volume)
    return groups.values()


def _duplicates(volumes: Sequence[ShownVolume], overlapping: Container[str], severity: Severity) -> Iterator[Finding]:
    """Yield findings for volumes with the same voxels, except those that `overlaps` reports."""
    for group in _by_voxels(volumes):
        first, *others = dict.fromkeys(str(volume.path) for volume in group)
        names = tuple(name for name in SETS if any(name in volume.sets for volume in group))
        if others and first not in overlapping:
            reason = f"the same voxels as {', '.join(others)}; expected one name for each scan, or --allow-overlap"
            yield Finding(severity, "duplicate", names, first, reason)


def _leaks(sets: Mapping[str, ConversationSet]) -> Iterator[Finding]:
    """Yield a fault for each way in which texts or references give a task's answers away."""
    searches: dict[str, LeakSearch] = defaultdict(LeakSearch)
    for name, conversation in ((name, c) for name, s in sets.items() for c in s.conversations):
        if conversation.images:
            searches[task_name(conversation)].add(name, _exchange(conversation))
    for task, search in searches.items():
        for leak in search.leaks():
            yield Finding("fault", "leak", leak.splits, f"task {task}", leak.reason)


def _exchange(conversation: Conversation) -> Exchange:
    metadata = conversation.metadata
    label, reference, several = (metadata.get(key) for key in ("subject_label", "reference_label", "reference_labels"))
    references = several if isinstance(several, list) else [] if reference is None else [reference]
    is_same: bool | None = {"same": True, "different": False}.get(str(metadata.get("comparison_type")))
    if label is not None and references:
        is_same = simplify(str(references[-1])) == simplify(str(label))
    last = conversation.messages[-1]
    answer = last.text if last.role == "assistant" else ""
    return Exchange(
        conversation.label,
        " ".join(sorted(conversation.subjects - conversation.references)) or conversation.label,
        "\n".join(message.text for message in conversation.messages if message.role != "assistant"),
        answer if answer.strip() or label is None else str(label),
        tuple(simplify(str(reference)) for reference in references),
        is_same,
    )


def _contradictions(sets: Mapping[str, ConversationSet], volumes: Iterable[ShownVolume]) -> Iterator[Finding]:
    """Yield a warning for conversations that are equal up to an answer and then differ; images compare by voxels."""
    keys = {(volume.path, volume.modality): volume.key for volume in volumes}
    answers_after: dict[Hashable, dict[str, tuple[str, str]]] = defaultdict(dict)
    for name, conversation in ((name, c) for name, s in sets.items() for c in s.conversations):
        before: list[Hashable] = []
        for message in conversation.messages:
            answer = message.text.strip()
            if message.role == "assistant" and answer:
                answers_after[tuple(before)].setdefault(answer, (name, conversation.label))
            parts = (part if isinstance(part, str) else keys[part.path, part.modality] for part in message.parts)
            before.append((message.role, *parts))
    for answers in answers_after.values():
        if len(answers) > 1:
            (first, (_, place)), *others = answers.items()
            names = tuple(name for name in SETS if name in {name for name, _ in answers.values()})
            listed = ", ".join(f"{answer!r} in {label}" for answer, (_, label) in others[:_NAMES_SHOWN])
            more = f", and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
            yield Finding("warning", "contradiction", names, place, f"answers {first!r} here, {listed}{more}")


def _answer_findings(sets: Mapping[str, ConversationSet]) -> Iterator[Finding]:
    """Yield a warning for tasks with a single answer, and for answers that only eval has."""
    train, evaluation = (sets[name].answers if name in sets else {} for name in SETS)
    for task, answers in train.items():
        known = {answer for answer in answers if answer}
        if len(known) == 1 and answers.total() > 1:
            yield Finding("warning", "answers", ("train",), f"task {task}", f"every answer is {known.pop()!r}")
        elif 0 < len(known) <= MAX_CLASSES and (new := sorted(evaluation.get(task, {}).keys() - known - {""})):
            reason = f"{', '.join(map(repr, new))} only in eval; train answers {', '.join(map(repr, sorted(known)))}"
            yield Finding("warning", "answers", SETS, f"task {task}", reason)


def _repeated_ids(sets: Mapping[str, ConversationSet]) -> Iterator[Finding]:
    for name, s in sets.items():
        counts = Counter(c.task_id for c in s.conversations)
        if repeated := {task: n for task, n in counts.items() if n > 1}:
            most = max(repeated, key=lambda task: repeated[task])
            reason = f"{len(repeated)} task ids repeat, {most!r} {repeated[most]} times; nothing depends on them"
            yield Finding("note", "task_id", (name,), s.path, reason)


def _headers(volumes: Iterable[ShownVolume]) -> Iterator[Finding]:
    for volume in volumes:
        for remark in volume.contents.remarks if volume.contents else ():
            yield Finding("warning", "header", volume.sets, str(volume.path), remark)


def _repetition_times(config: RunConfig, volumes: Sequence[ShownVolume]) -> Iterator[Finding]:
    """Yield a line about the repetition times of each 4D modality: a warning if they differ and `tr` is not set."""
    for modality, settings in config.model.modalities.items():
        runs_at: dict[str, list[ShownVolume]] = defaultdict(list)
        for volume in volumes:
            if len(settings.size) == 4 and volume.modality == modality and volume.contents is not None:
                runs_at[PROPERTIES["TR (s)"](volume.contents)].append(volume)
        if len(runs_at) < 2:
            continue
        counts = ", ".join(
            f"{f'{time} s' if time != 'unknown' else time} in {plural(len(runs), 'run')} (such as {runs[0].path})"
            for time, runs in sorted(runs_at.items())
        )
        sets = tuple(name for name in SETS if any(name in v.sets for runs in runs_at.values() for v in runs))
        if settings.tr is None:
            remedy = f"a frame means another time in each; set model.modalities.{modality}.tr to resample them to one"
            yield Finding("warning", "repetition_time", sets, modality, f"{counts}: {remedy}")
        else:
            yield Finding("note", "repetition_time", sets, modality, f"{counts}: resampled to {settings.tr:g} s")


def _empty(volumes: Iterable[ShownVolume]) -> Iterator[Finding]:
    """Yield a warning for constant, nearly constant and nearly empty volumes, and for runs with equal frames."""
    for volume in volumes:
        contents = volume.contents
        if contents is None or not volume.windows:
            continue
        low, high = contents.minimum or 0.0, contents.maximum or 0.0
        if low == high:
            reason = f"every voxel is {low:g}"
        elif high - low < _NEARLY_CONSTANT * max(abs(low), abs(high)):
            reason = f"nearly constant: its voxels are from {low:.9g} to {high:.9g}"
        elif contents.nonzero < _ALMOST_EMPTY:
            reason = f"{contents.nonzero:.2%} of its voxels are not 0"
        elif contents.still:
            reason = f"all of its {contents.frames} frames are the same"
        else:
            continue
        yield Finding("warning", "empty", volume.sets, str(volume.path), reason)


def _missing_images(config: RunConfig, sets: Mapping[str, ConversationSet]) -> Iterator[Finding]:
    """Yield findings for sets that show no image, and for configured modalities that train does not show.

    `sets` holds only sets whose conversation files have no fault.
    """
    for name, s in sets.items():
        shown = {image.modality for c in s.conversations for image in c.images}
        number = len(s.conversations)
        if number and not shown:
            text_trains = any(
                group == LORA or group.startswith(("language_model", "*")) for group in config.train.groups
            )
            severity: Severity = "warning" if name == "eval" or text_trains else "fault"
            effect = "answers would not be about scans" if name == "eval" else "no patch embedding would be trained"
            remedy = "name the scans in the content of the user's turns"
            reason = f"none of its {number} conversations shows an image, so {effect}; {remedy}"
            yield Finding(severity, "images", (name,), s.path, reason)
        for modality in config.model.modalities if name == "train" and shown else ():
            if modality not in shown:
                reason = "configured, but no conversation of train shows one: its patch embedding would not be trained"
                yield Finding("note", "images", (name,), f"modality {modality}", reason)


def _backgrounds(config: RunConfig, volumes: Sequence[ShownVolume], remarks: Sequence[Remark]) -> Iterator[Finding]:
    """Yield a note for each volume with an unusual background, and a warning if the background rule does not fit."""
    windows = {(volume.path, config.model.modalities[volume.modality]): volume.windows for volume in volumes}
    shown = {volume.path: volume.sets for volume in volumes}
    for path, reason in describe_mixed_windows(remarks, windows).items():
        yield Finding("warning", "background", shown[path], str(path), reason)
    for modality, backgrounds in group_by_modality(remarks, config.model.modalities).items():
        read = [volume for volume in volumes if volume.modality == modality and volume.windows]
        for volume in read:
            if (background := backgrounds.get(volume.path)) is not None:
                conflict = describe_conflict(background)
                reason = conflict or describe_choice(background)
                severity: Severity = "warning" if conflict else "note"
                yield Finding(severity, "background", volume.sets, str(volume.path), reason)
        if mixed := describe_mixture(modality, backgrounds, len(read)):
            sets = tuple(name for name in SETS if any(name in volume.sets for volume in read))
            yield Finding("warning", "background", sets, modality, mixed)


def _outliers(volumes: Sequence[ShownVolume], compared: Sequence[str]) -> Iterator[Finding]:
    """Yield a warning for rare values of properties that most volumes share, and for maxima 10 times off the median.

    Args:
        volumes: of one modality.
        compared: names of PROPERTIES.
    """
    readable = [(volume, volume.contents) for volume in volumes if volume.contents is not None]
    for name in compared:
        property_of = PROPERTIES[name]
        counts = Counter(property_of(contents) for _, contents in readable)
        usual = {value: n for value, n in counts.most_common() if n > max(len(readable) // _RARE, 1)}
        if sum(usual.values()) <= len(readable) / 2:  # no value is typical
            continue
        for volume, contents in readable:
            if (value := property_of(contents)) and value not in usual:
                typical = ", ".join(f"{value} ({n})" for value, n in [*usual.items()][:_NAMES_SHOWN])
                share = f"{counts[value]} of {len(readable)} {volume.modality} volumes"
                reason = f"{name} {value}, {share}; usual is {typical}"
                yield Finding("warning", "outlier", volume.sets, str(volume.path), reason)
    maxima = [(volume, contents.maximum) for volume, contents in readable if contents.maximum is not None]
    median = float(np.median([maximum for _, maximum in maxima])) if maxima else 0.0
    for volume, maximum in maxima:
        if median > 0 and not median / 10 <= maximum <= median * 10:
            reason = f"its largest voxel is {maximum:.4g}; the median of {volume.modality} volumes is {median:.4g}"
            yield Finding("warning", "outlier", volume.sets, str(volume.path), reason)
