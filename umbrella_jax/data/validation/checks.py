"""What is wrong with, or worth a look in, everything that a run would read: all of it at once, and nothing changed."""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from tqdm import tqdm

from umbrella_jax.config.schema import LORA, MAX_CLASSES, RunConfig
from umbrella_jax.console import plural
from umbrella_jax.data.augment import check_axes
from umbrella_jax.data.background import Remark, by_modality, contradiction, decision, mixture, uneven
from umbrella_jax.data.blas import one_blas_thread
from umbrella_jax.data.cache import check_float16
from umbrella_jax.data.conversation import Conversation, Image, scan_conversations
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.tokenize import Remembering, encode, encode_prompt, reference_answer
from umbrella_jax.data.validation.findings import PROPERTIES, SETS, Contents, Finding, Report, Set, Severity, Volume
from umbrella_jax.data.volume import check_volume
from umbrella_jax.data.voxels import open_voxels
from umbrella_jax.errors import ConfigError, DataError, Faults

T = TypeVar("T")
_ALMOST_EMPTY = 0.01  # share of voxels that are not 0
_NEARLY_CONSTANT = 1e-4  # range of the voxels, as a share of the largest
_RARE = 20  # an outlier's value is that of one volume in so many, or of one alone
_TOLD = 5  # answers of a contradiction, usual values beside an outlier's


def validate(
    config: RunConfig,
    tokenizer: Callable[[], Any | None] = lambda: None,
    scored: Callable[[Sequence[Conversation]], object] = lambda conversations: None,
) -> Report:
    """Reads all conversations and volumes of a run, train and eval, and goes on after every fault.

    Args:
        tokenizer: makes the base's; None where there is none at hand, and an UmbrellaError is a fault like others.
        scored: is shown the evaluation data, if they have no other fault; an UmbrellaError of it says which answers
            cannot be scored.

    Raises:
        ConfigError: neither data.train nor data.eval is named.
    """
    paths = {name: path for name in SETS if (path := getattr(config.data, name)) is not None}
    if not paths:
        raise ConfigError("data.train, data.eval: expected a path (--train-data PATH, --eval-data PATH)")
    findings: list[Finding] = []

    def collect(check: Callable[[], T], kind: str, *sets: str) -> T | None:
        faults = Faults()
        value = faults.check(check)
        findings.extend(_faults(kind, sets, faults))
        return value

    def unchecked(place: str, reason: str, *sets: str) -> None:
        findings.append(Finding("warning", "unchecked", sets, place, reason))

    words = collect(tokenizer, "base")
    if words is None:
        unchecked(
            "text",
            "no tokenizer at hand, so neither lengths nor what is supervised were looked at; expected --base HF_DIR",
            *paths,
        )
    sets: dict[str, Set] = {}
    for name, path in paths.items():
        scanned = collect(partial(_scan, config, path), "conversation", name)
        conversations, faults = scanned or ([], [])
        findings += _faults("conversation", (name,), faults)
        lengths, faults = _texts(config, conversations, words, evaluation=name == "eval")
        findings += _faults("text", (name,), faults)
        sets[name] = Set(str(path), tuple(conversations), lengths)
    if "eval" in sets and not any(f.severity == "fault" and "eval" in f.sets for f in findings):
        collect(partial(scored, sets["eval"].conversations), "answers", "eval")
    volumes, faults_of, remarks = _volumes(config, sets)
    for volume in volumes:
        findings += _faults("volume", volume.sets, faults_of.get(volume, ()), str(volume.path))

    faulty = {name for f in findings if f.kind == "conversation" for name in f.sets}
    findings += _shown(config, {name: s for name, s in sets.items() if name not in faulty})
    if len(sets) == 1:
        unchecked("train and eval", "only one of them is named, so what both hold was not looked for", *sets)
    for name, s in sets.items():
        if nameless := sum(not c.subjects for c in s.conversations):
            unchecked(s.path, f"{nameless} of {len(s.conversations)} conversations name no subject", name)
    findings += overlaps(sets, volumes, "warning" if config.data.allow_overlap else "fault")
    findings += _duplicates(volumes)
    findings += _contradictions(sets, volumes)
    findings += _answer_findings(sets)
    findings += _repeated_ids(sets)
    findings += _headers(volumes)
    findings += _empty(volumes)
    findings += _backgrounds(config, volumes, remarks)
    for modality in config.model.modalities:
        findings += _outliers([v for v in volumes if v.modality == modality])
    return Report(sets, tuple(volumes), tuple(findings))


def _faults(kind: str, sets: Iterable[str], faults: Iterable[str], place: str | None = None) -> Iterator[Finding]:
    """Messages `place: reason` as findings."""
    for fault in faults:
        if place is not None and fault.startswith(f"{place}: "):
            yield Finding("fault", kind, tuple(sets), place, fault.removeprefix(f"{place}: "))
        else:
            where, _, reason = fault.partition(": ")
            yield Finding("fault", kind, tuple(sets), *((place, fault) if place is not None else (where, reason)))


def _scan(config: RunConfig, path: str) -> tuple[list[Conversation], list[str]]:
    data = config.data
    return scan_conversations(
        path,
        config.model.modalities,
        data.image_root,
        modality=data.modality,
        task_filter=data.task_filter,
        allow_outside_root=data.allow_outside_root,
    )


def _texts(
    config: RunConfig, conversations: Sequence[Conversation], tokenizer: Any | None, evaluation: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Lengths of each conversation, those that are too long included, and what a run refuses of the text."""
    faults = Faults()
    rows: list[tuple[int, int, int, int]] = []
    modalities = config.model.modalities

    words = tokenizer and Remembering(tokenizer)
    common: dict[str, Any] = {"tokenizer": words, "modalities": modalities, "template": config.data.template}
    write, prompt = partial(encode, **common), partial(encode_prompt, **common)
    for c in conversations:
        if tokenizer is None:
            if evaluation:
                faults.check(partial(reference_answer, c))  # whether there is one to compare with
            continue
        if evaluation:
            faults.check(partial(prompt, c, max_length=config.data.max_length))
        whole = faults.check(partial(write, c, max_length=config.data.max_length, needs_answer=not evaluation))
        if whole is None:
            whole = faults.check(partial(write, c, max_length=sys.maxsize, needs_answer=False))  # how long is too long?
        if whole is None:  # no template writes it
            continue
        patches = sum(modalities[image.modality].num_patches for image in whole.images)
        rows.append((len(whole), patches, len(whole) - patches, int(whole.supervised.sum())))
    names = ("positions", "patches", "text", "supervised")
    columns = np.array(rows, np.int64).reshape(-1, len(names)).T
    return {} if tokenizer is None else dict(zip(names, columns, strict=True)), list(dict.fromkeys(faults))


def _volumes(
    config: RunConfig, sets: Mapping[str, Set]
) -> tuple[list[Volume], dict[Volume, tuple[str, ...]], list[Remark]]:
    """Return every distinct volume that is shown, the faults of those that have any, and remarkable backgrounds."""
    remarks: list[Remark] = []
    shown: dict[Image, dict[str, None]] = defaultdict(dict)
    for name, s in sets.items():
        for image in (image for c in s.conversations for image in c.images):
            shown[image][name] = None

    def look_at(path: Path) -> Callable[[np.ndarray], object]:
        return partial(check_float16, path) if config.data.cache_dtype == "float16" else lambda volume: None

    def look(image: Image) -> tuple[Volume, tuple[str, ...]]:
        windows, contents = 0, None
        faults: tuple[str, ...] = ()
        try:
            windows = check_volume(
                image.path,
                config.model.modalities[image.modality],
                look_at(image.path),
                note=lambda *remark: remarks.append(remark),
            )
        except DataError as error:
            faults = error.faults
        try:
            contents = read_contents(image.path)
        except DataError as error:
            windows, faults = 0, faults or error.faults  # a run that is cut off behind its last window, say
        if contents and "train" in shown[image]:
            try:
                check_axes(config.data.augment, {image.path: contents.orientation})
            except DataError as error:
                faults += error.faults
        return Volume(image.path, image.modality, tuple(shown[image]), windows, contents), faults

    with one_blas_thread(), ThreadPoolExecutor(config.data.threads) as pool:
        found = list(tqdm(pool.map(look, shown), total=len(shown), desc="volumes", disable=None))
    return [volume for volume, _ in found], {volume: faults for volume, faults in found if faults}, remarks


def read_contents(path: Path) -> Contents:
    """Reads all voxels of a file or a directory of frames, frame by frame, to its end.

    Raises DataError naming it, where it cannot be read; voxels that are not finite are no fault here.
    """
    image = open_voxels(path)
    rank = max((axis for axis, length in enumerate(image.shape, 1) if axis <= 3 or length != 1), default=0)
    digest = hashlib.blake2b(repr(image.shape[:rank]).encode(), digest_size=16)
    low, high, total, nonzero, count, voxels = np.inf, -np.inf, 0.0, 0, 0, 0
    frames = image.shape[3] if len(image.shape) > 3 else 1
    first, still = None, frames > 1
    for frame in range(frames):
        data = np.asarray(image.read(frame), np.float32)
        digest.update(np.ascontiguousarray(data.T).data)  # no copy: nibabel's arrays lie in Fortran order
        first = data if first is None else first
        still = still and np.array_equal(data, first)
        finite = np.isfinite(data)
        low, high = min(low, data.min(where=finite, initial=np.inf)), max(high, data.max(where=finite, initial=-np.inf))
        total += float(data.sum(where=finite, dtype=np.float64))
        voxels += data.size
        count += int(np.count_nonzero(finite))
        nonzero += int(np.count_nonzero(data))
    image.check_end()
    return Contents(
        shape=tuple(int(n) for n in image.shape),
        dtype=image.dtype.name,
        orientation=None if image.affine is None else "".join(nib.aff2axcodes(image.affine)),
        voxel_size=None if image.zooms is None else tuple(round(float(length), 3) for length in image.zooms),
        minimum=float(low) if count else None,
        maximum=float(high) if count else None,
        mean=total / count if count else None,
        nonzero=nonzero / max(voxels, 1),
        still=still,
        digest=digest.hexdigest(),
        remarks=tuple(image.remarks),
    )


def overlaps(sets: Mapping[str, Set], volumes: Iterable[Volume], severity: Severity) -> Iterator[Finding]:
    """Find what train and eval share: the model may be memorising it."""
    expected = "expected other subjects to evaluate on than to train on, or --allow-overlap"
    for subject, *labels in _shared_subjects(sets):
        where = [first + (f" and {len(others)} more" if others else "") for first, *others in labels]
        reason = f"in train ({where[0]}) and in eval ({where[1]}); {expected}"
        yield Finding(severity, "overlap", SETS, f"subject {subject}", reason)
    for first, *others in _shared_scans(_same(volumes)):
        known = f", also as {', '.join(others)}" if others else ""
        yield Finding(severity, "overlap", SETS, first, f"in train and in eval{known}; {expected}")


def check_overlap(datasets: Mapping[str, Dataset], *, allowed: bool) -> str | None:
    """Look for subjects that are in train and in eval by name, and for scans by name or by the bytes of their files.

    `validate` compares the voxels of scans, which may be the same in other bytes.

    Returns:
        A warning that counts and names them, None if there are none.

    Raises:
        DataError: there are some, and they are not `allowed`.
    """
    sets = {name: Set("", of.conversations, {}) for name, of in datasets.items()}
    within: dict[tuple[Path, str], list[str]] = defaultdict(list)
    for name, of in datasets.items():
        for image in of.windows:
            within[image.path, image.modality].append(name)
    scans: dict[str, list[Volume]] = defaultdict(list)
    for (path, modality), names in within.items():
        scans[datasets[names[0]].sources.digest(path)].append(Volume(path, modality, tuple(names), 1, None))
    subjects = [f"subject {subject}" for subject, *_ in _shared_subjects(sets)]
    shared = [" = ".join(paths) for paths in _shared_scans(scans.values())]
    if not subjects and not shared:
        return None
    counts = f"{plural(len(subjects), 'subject')} and {plural(len(shared), 'scan')}"
    places = [*subjects, *shared]
    more = f" and {len(places) - _TOLD} more" if len(places) > _TOLD else ""
    found = f"{counts} are in train and in eval: {', '.join(places[:_TOLD])}{more}"
    if allowed:
        return f"{found}; the model may be memorising them (data.allow_overlap)"
    raise DataError(
        f"data.train, data.eval: {found}; evaluate on other subjects, or allow it: data.allow_overlap: true "
        "(--allow-overlap)"
    )


def _shared_subjects(sets: Mapping[str, Set]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each subject of train that is in eval too, with the labels of its conversations in both."""
    if set(sets) == set(SETS):
        train, evaluation = (sets[name].subjects for name in SETS)
        for subject in sorted(train.keys() & evaluation.keys()):
            yield subject, train[subject], evaluation[subject]


def _shared_scans(scans: Iterable[Iterable[Volume]]) -> Iterator[list[str]]:
    """Yield the paths of each scan that is in train and in eval; `scans` are groups of the same content."""
    for same in scans:
        if {name for volume in same for name in volume.sets} == set(SETS):
            yield list(dict.fromkeys(str(volume.path) for volume in same))


def _same(volumes: Iterable[Volume]) -> Iterable[list[Volume]]:
    """Volumes by their voxels."""
    found: dict[str, list[Volume]] = defaultdict(list)
    for volume in volumes:
        found[volume.key].append(volume)
    return found.values()


def _duplicates(volumes: Sequence[Volume]) -> Iterator[Finding]:
    for same in _same(volumes):
        first, *others = dict.fromkeys(str(volume.path) for volume in same)
        names = tuple(name for name in SETS if any(name in volume.sets for volume in same))
        if others and names != SETS:  # else it is told as what both hold
            yield Finding("warning", "duplicate", names, first, f"the same voxels as {', '.join(others)}")


def _contradictions(sets: Mapping[str, Set], volumes: Iterable[Volume]) -> Iterator[Finding]:
    """Conversations that are the same up to an answer, whatever the names of their volumes."""
    keys = {(volume.path, volume.modality): volume.key for volume in volumes}
    found: dict[Hashable, dict[str, tuple[str, str]]] = defaultdict(dict)
    for name, conversation in ((name, c) for name, s in sets.items() for c in s.conversations):
        before: list[Hashable] = []
        for message in conversation.messages:
            answer = message.text.strip()
            if message.role == "assistant" and answer:
                found[tuple(before)].setdefault(answer, (name, conversation.label))
            parts = (part if isinstance(part, str) else keys[part.path, part.modality] for part in message.parts)
            before.append((message.role, *parts))
    for answers in found.values():
        if len(answers) > 1:
            (said, (_, place)), *others = answers.items()
            named = tuple(name for name in SETS if name in {name for name, _ in answers.values()})
            told = ", ".join(f"{answer!r} in {label}" for answer, (_, label) in others[:_TOLD])
            more = f", and {len(others) - _TOLD} more" if len(others) > _TOLD else ""
            yield Finding("warning", "contradiction", named, place, f"answers {said!r} here, {told}{more}")


def _answer_findings(sets: Mapping[str, Set]) -> Iterator[Finding]:
    train, evaluation = (sets[name].answers if name in sets else {} for name in SETS)
    for task, answers in train.items():
        known = {answer for answer in answers if answer}
        if len(known) == 1 and answers.total() > 1:
            yield Finding("warning", "answers", ("train",), f"task {task}", f"every answer is {known.pop()!r}")
        elif 0 < len(known) <= MAX_CLASSES and (new := sorted(evaluation.get(task, {}).keys() - known - {""})):
            told = f"{', '.join(map(repr, new))} only in eval; train answers {', '.join(map(repr, sorted(known)))}"
            yield Finding("warning", "answers", SETS, f"task {task}", told)


def _repeated_ids(sets: Mapping[str, Set]) -> Iterator[Finding]:
    for name, s in sets.items():
        counts = Counter(c.task_id for c in s.conversations)
        if repeated := {task: n for task, n in counts.items() if n > 1}:
            most = max(repeated, key=lambda task: repeated[task])
            reason = (
                f"{len(repeated)} task ids come more than once, {most!r} {repeated[most]} times; nothing goes by them"
            )
            yield Finding("note", "task_id", (name,), s.path, reason)


def _headers(volumes: Iterable[Volume]) -> Iterator[Finding]:
    for volume in volumes:
        for remark in volume.contents.remarks if volume.contents else ():
            yield Finding("warning", "header", volume.sets, str(volume.path), remark)


def _empty(volumes: Iterable[Volume]) -> Iterator[Finding]:
    for volume in volumes:
        found = volume.contents
        if found is None or not volume.windows:
            continue
        low, high = found.minimum or 0.0, found.maximum or 0.0
        if low == high:
            reason = f"every voxel is {low:g}"
        elif high - low < _NEARLY_CONSTANT * max(abs(low), abs(high)):
            reason = f"nearly constant: its voxels are from {low:.9g} to {high:.9g}"
        elif found.nonzero < _ALMOST_EMPTY:
            reason = f"{found.nonzero:.2%} of its voxels are not 0"
        elif found.still:
            reason = f"all of its {found.frames} frames are the same"
        else:
            continue
        yield Finding("warning", "empty", volume.sets, str(volume.path), reason)


def _shown(config: RunConfig, sets: Mapping[str, Set]) -> Iterator[Finding]:
    """Sets without any image, and modalities that are configured and not shown; `sets`: those whose files are good."""
    for name, s in sets.items():
        shown = {image.modality for c in s.conversations for image in c.images}
        number = len(s.conversations)
        if number and not shown:
            text_trains = any(
                group == LORA or group.startswith(("language_model", "*")) for group in config.train.groups
            )
            severity: Severity = "warning" if name == "eval" or text_trains else "fault"
            wrong = "answers would not be about scans" if name == "eval" else "no patch embedding would be trained"
            remedy = "name the scans in the content of the user's turns"
            reason = f"none of its {number} conversations shows an image, so {wrong}; {remedy}"
            yield Finding(severity, "images", (name,), s.path, reason)
        for modality in config.model.modalities if name == "train" and shown else ():
            if modality not in shown:
                reason = "configured, but no conversation of train shows one: its patch embedding would not be trained"
                yield Finding("note", "images", (name,), f"modality {modality}", reason)


def _backgrounds(config: RunConfig, volumes: Sequence[Volume], remarks: Sequence[Remark]) -> Iterator[Finding]:
    """What was taken as background where that is not the usual case, and where it does not fit."""
    windows = {(volume.path, config.model.modalities[volume.modality]): volume.windows for volume in volumes}
    shown = {volume.path: volume.sets for volume in volumes}
    for path, reason in uneven(remarks, windows).items():
        yield Finding("warning", "background", shown[path], str(path), reason)
    for modality, found in by_modality(remarks, config.model.modalities).items():
        read = [volume for volume in volumes if volume.modality == modality and volume.windows]
        for volume in read:
            if (background := found.get(volume.path)) is not None:
                wrong = contradiction(background)
                reason = wrong or decision(background)
                severity: Severity = "warning" if wrong else "note"
                yield Finding(severity, "background", volume.sets, str(volume.path), reason)
        if mixed := mixture(modality, found, len(read)):
            sets = tuple(name for name in SETS if any(name in volume.sets for volume in read))
            yield Finding("warning", "background", sets, modality, mixed)


def _outliers(volumes: Sequence[Volume]) -> Iterator[Finding]:
    """Volumes with a rare value of a property that most have alike, or an intensity of another order."""
    known = [(volume, volume.contents) for volume in volumes if volume.contents is not None]
    for name, of in PROPERTIES.items():
        counts = Counter(of(contents) for _, contents in known)
        usual = {value: n for value, n in counts.most_common() if n > max(len(known) // _RARE, 1)}
        if sum(usual.values()) <= len(known) / 2:  # each has its own
            continue
        for volume, contents in known:
            if (value := of(contents)) not in usual:
                told = ", ".join(f"{value} ({n})" for value, n in [*usual.items()][:_TOLD])
                reason = f"{name} {value}, {counts[value]} of {len(known)} {volume.modality} volumes; usual is {told}"
                yield Finding("warning", "outlier", volume.sets, str(volume.path), reason)
    maxima = [(volume, contents.maximum) for volume, contents in known if contents.maximum is not None]
    middle = float(np.median([maximum for _, maximum in maxima])) if maxima else 0.0
    for volume, maximum in maxima:
        if middle > 0 and not middle / 10 <= maximum <= middle * 10:
            reason = f"its largest voxel is {maximum:.4g}; of the {volume.modality} volumes it is {middle:.4g} (median)"
            yield Finding("warning", "outlier", volume.sets, str(volume.path), reason)
