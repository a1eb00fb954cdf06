"""Conversation files: from JSON to conversations of text and image references. Opens no image."""

import os.path
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from umbrella_jax.config.schema import modality_names, resolve_modality, unknown_modality
from umbrella_jax.data.schema import IMAGE_MARKER, to_current
from umbrella_jax.data.subject_split import SPLITS
from umbrella_jax.errors import DataError, visible
from umbrella_jax.io.reading import KINDS, kind, parse_json, quoted, read_items, read_lines

ROLES = ("system", "user", "assistant")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
MAX_FAULTS = 10_000
"""After so many faults no more are looked for: of a file that is no conversations at all each number may be one."""
T = TypeVar("T")
_SUFFIXES = (".json", ".jsonl")
_EACH = "expected a conversation, an object, in each line"
_LIST = "expected a conversation, an object, or a list of them"
_SPLIT = re.compile(
    r"(?<![a-z])(train|eval|val|dev|test|hold-?_?out|held-?_?out)(?:ing|uation|id|idation)?(?:set|data)?(?![a-z])"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_WINDOWS = re.compile(r"\\|^[A-Za-z]:/")
_SUBJECT = re.compile(r"sub-([0-9A-Za-z+]+)(?=[_.]|$)")


@dataclass(frozen=True, slots=True)
class Image:
    """One input of the vision tower: a file, the configured modality it is read as and, of a 4D run, the window."""

    path: Path
    modality: str
    window: int = 0
    changed: tuple[int, int, int, int] | None = None
    """Whom augmentation changed it for: seed, epoch, conversation, and which of its images it is; None as it is."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: its role and, in reading order, its texts and images."""

    role: str
    parts: tuple[str | Image, ...]
    inline: bool = False
    """Whether the file has the turn as one string, its images at `<image>` markers."""

    @property
    def text(self) -> str:
        """The turn's texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation and where it was read: `file.json[3]` or `file.jsonl:12`."""

    task_id: str
    task_type: str | None
    messages: tuple[Message, ...]
    metadata: Mapping[str, Any]
    source: str
    subjects: frozenset[str] = frozenset()
    """Whom it is about, without BIDS' `sub-`: `subject_ids`, `subject_id` and `reference_id` of `metadata`, and the
    last `sub-LABEL` of each image's path as the file gives it. Empty where nothing says so."""

    @property
    def images(self) -> tuple[Image, ...]:
        """Images in the order in which the text shows them; one that is shown twice stands twice."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Image))

    @property
    def label(self) -> str:
        """How messages name it; `task_id` alone is not unique in real files."""
        return f"{self.source} ({visible(self.task_id, kept='')})"


def read_conversations(
    path: str | Path,
    modalities: Collection[str],
    image_root: str | Path | None = None,
    *,
    modality: str | None = None,
    task_filter: str | None = None,
    allow_outside_root: bool = False,
) -> list[Conversation]:
    """Reads a .json file (an object or a list), a .jsonl file (one object a line), or all such files below a directory.

    Args:
        path: file or directory; the files of a directory are read in sorted order.
        modalities: configured modality names; an image may use any alias of one of them.
        image_root: where relative image paths start; default the folder of the file that names them.
        modality: keep conversations whose images are all of it; one without images is of every modality.
        task_filter: keep conversations whose `task_type` or `metadata.task` is this.
        allow_outside_root: take relative image paths that lead out of where they start, by `..`. Without it they are
            refused. Absolute paths are always taken, and so is a symbolic link inside, wherever it leads.

    Older schemas are read too, see `umbrella_jax.data.schema`. What a filter leaves out is not looked at: its images
    may be elsewhere, its modality not configured.

    Raises:
        DataError: with every fault of every file, and when there is no conversation, or the filters keep none.
    """
    conversations, faults = scan_conversations(
        path,
        modalities,
        image_root,
        modality=modality,
        task_filter=task_filter,
        allow_outside_root=allow_outside_root,
    )
    if faults:
        raise DataError(faults)
    return conversations


def scan_conversations(
    path: str | Path,
    modalities: Collection[str],
    image_root: str | Path | None = None,
    *,
    modality: str | None = None,
    task_filter: str | None = None,
    allow_outside_root: bool = False,
) -> tuple[list[Conversation], list[str]]:
    """The conversations that are good, and the faults of the others; arguments as of `read_conversations`.

    Behind MAX_FAULTS it stops, and says so in the last of them.

    Raises:
        DataError: there is no such path or `image_root`, or `modality` is not configured.
    """
    if modality is not None and resolve_modality(modality, modalities) is None:
        raise DataError(f"data.modality: {unknown_modality(modality, modalities)}")
    if image_root is not None and not Path(image_root).is_dir():
        what = "not a directory" if Path(image_root).exists() else "not found"
        raise DataError(
            f"data.image_root: {image_root}: {what}; expected the directory where relative image paths start "
            "(--image-root DIR)"
        )
    conversations: list[Conversation] = []
    faults: list[str] = []
    found, shown, tasks = 0, set[str](), set[str]()
    known = _Known(modalities)
    for file in conversation_files(Path(path)):
        root = (file.parent if image_root is None else Path(image_root)).absolute()
        for source, record in _records(file, faults):
            found += 1
            record, wrong = to_current(record, Path(source).name) if isinstance(record, dict) else (record, [])
            of_images, of_task = _shown_modalities(record), _tasks(record)
            shown |= of_images
            tasks |= of_task
            if task_filter is not None and task_filter not in of_task:
                continue
            if modality is not None and any(known.resolve(modality) != known.resolve(name) for name in of_images):
                continue
            try:
                conversations.append(_Parser(record, source, root, known, allow_outside_root).conversation(wrong))
            except DataError as error:
                faults.extend(error.faults)
            if len(faults) > MAX_FAULTS:
                break
        if len(faults) > MAX_FAULTS:
            faults.append(f"{file}: stopped here: too many errors; fix these first")
            break
    if not conversations and not faults:
        given = {"modality": modality, "task_filter": task_filter}
        filters = [f"{name} {value}" for name, value in given.items() if value is not None]
        faults.append(
            f"{path}: none of {found} conversations is of {' and '.join(filters)}; "
            f"their modalities are {_names(shown)}, their tasks {_names(tasks)}"
            if found
            else f"{path}: holds no conversation; expected .json or .jsonl files with at least one"
        )
    return conversations, faults


def _shown_modalities(record: Any) -> set[str]:
    """Modality names in a record that may be faulty."""
    entries: list[Any] = []
    if isinstance(record, dict):
        entries += record["images"] if isinstance(record.get("images"), list) else []
        for turn in record["conversations"] if isinstance(record.get("conversations"), list) else []:
            content = turn.get("content") if isinstance(turn, dict) else None
            entries += content if isinstance(content, list) else []
    return {e["modality"] for e in entries if isinstance(e, dict) and isinstance(e.get("modality"), str)}


def _tasks(record: Any) -> set[str]:
    """`task_type` and `metadata.task` of a record that may be faulty."""
    if not isinstance(record, dict):
        return set()
    metadata = record.get("metadata")
    values = [record.get("task_type"), metadata.get("task") if isinstance(metadata, dict) else None]
    return {value for value in values if isinstance(value, str)}


def _names(values: Collection[str]) -> str:
    return ", ".join(sorted(values)) or "none"


def conversation_files(path: Path) -> list[Path]:
    """Return the file itself, or the files below a directory, sorted. Hidden ones are left out, such as what editors
    keep in `.ipynb_checkpoints`, and so is what links to directories lead to.

    Raises DataError if the path is neither, or a directory that holds several splits (read as one set, a run would
    train on what it is evaluated on), or `X.json` beside `X.jsonl` (it would train on both).
    """
    if path.is_dir():
        if (path / "dataset_description.json").exists() or (path / "participants.tsv").exists():
            command = f"umbrella-jax data from-bids {shlex.quote(str(path))} OUT --target COLUMN"
            raise DataError(f"{path}: a BIDS data set, not conversations; make them with `{command}`")
        below = (file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        files = sorted(f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts))
        names_of = Counter(file.with_suffix("") for file in files)
        if twins := [file for file in files if names_of[file.with_suffix("")] > 1]:
            pair = " and ".join(file.name for file in twins[:2])
            raise DataError(f"{twins[0].parent}: {pair}: one set in two formats, or two sets? Name one of the files")
        if splits := _splits(path, files):
            names = ", ".join(str(file.relative_to(path)) for file in splits[:4])
            more = f" and {len(splits) - 4} more" if len(splits) > 4 else ""
            raise DataError(f"{path}: holds several splits: {names}{more}; name one file, or a directory of one split")
        return files
    if not path.is_file():
        fault = "a pipe or device" if path.exists() else not_found(path)
        raise DataError(f"{path}: {fault}; expected a conversation file or a directory of them")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: expected a .json or .jsonl file, or a directory of them")
    return [path]


def not_found(path: Path) -> str:
    """Return "not found", and the name of the set's file in the other format if there is one."""
    others = [path.with_suffix(suffix) for suffix in _SUFFIXES if path.suffix in _SUFFIXES and suffix != path.suffix]
    return "; ".join(["not found", *(f"there is {other.name}" for other in others if other.is_file())])


def _splits(root: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files of several splits, if there are several: beside a splits.tsv of `data from-bids`, or with other
    words for a split in their paths below `root`."""
    places = Counter(file.parent for file in files if (file.parent / SPLITS).is_file())
    if listed := [file for file in files if places[file.parent] > 1]:
        return listed
    names = {file: _CAMEL.sub("_", file.relative_to(root).as_posix()).lower() for file in files}
    words = {file: _SPLIT.findall(name) for file, name in names.items()}
    named = [file for file in files if words[file]]
    return named if len({tuple(sorted(set(words[file]))) for file in named}) > 1 else []


def _records(file: Path, faults: list[str]) -> Iterator[tuple[str, Any]]:
    """Every JSON value of a file that should be a conversation, with its source; what is no JSON goes to `faults`."""
    try:
        if file.suffix == ".json":
            for index, value in read_items(file, DataError, _LIST, nan_is_null=True):
                yield str(file) if index is None else f"{file}[{index}]", value
            return
        for number, line in read_lines(file, DataError, _EACH):
            if line.lstrip().startswith("["):
                raise DataError(f"{file}:{number}: a JSON list, not JSON Lines; rename the file to {file.stem}.json")
            if line.strip():
                try:
                    value = parse_json(line, file, DataError, _EACH, number, nan_is_null=True)
                except DataError as error:
                    faults.extend(error.faults)
                    if len(faults) > MAX_FAULTS:
                        return
                else:
                    yield f"{file}:{number}", value
    except DataError as error:
        faults.extend(error.faults)


class _Known:
    """What was read already: the same paths, texts and modalities are in thousands of conversations, and kept once."""

    def __init__(self, modalities: Collection[str]):
        self.modalities = modalities
        self.resolve: Callable[[str], str | None] = cache(lambda name: resolve_modality(name, modalities))
        self.join: Callable[[Path, str], Path] = cache(Path.joinpath)
        self.image: Callable[[Path, str], Image] = cache(Image)
        self.text: Callable[[str], str] = cache(str)
        self.message: Callable[[str, tuple[str | Image, ...], bool], Message] = cache(Message)


class _Parser:
    """Turns one record into a conversation, going on after a fault so that all are found."""

    def __init__(self, record: Any, source: str, root: Path, known: _Known, allow_outside_root: bool):
        self.record, self.source, self.root, self.known = record, source, root, known
        self.allow_outside_root = allow_outside_root
        self.place = source
        self.faults: list[str] = []
        self.listed: list[Any] | None = None  # the record's `images`
        self.shown = 0  # images met so far
        self.paths: list[str] = []  # theirs, as the record has them

    def conversation(self, faults: Collection[str] = ()) -> Conversation:
        """Raises DataError with every fault of the record; those of its schema, if it has any, are handed in."""
        if not isinstance(self.record, dict):
            raise DataError(f"{self.source}: expected a conversation, an object, got {kind(self.record)}")
        task_id = self.field(self.record, "task_id", str, self.place)
        self.place = self.source if task_id is None else f"{self.source} ({visible(task_id, kept='')})"
        if faults:  # what was meant by the rest is then not known
            raise DataError([*self.faults, *(f"{self.place}: {fault}" for fault in faults)])
        task_type = self.field(self.record, "task_type", str, self.place, required=False)
        metadata = self.field(self.record, "metadata", dict, self.place, required=False)
        self.listed = self.field(self.record, "images", list, self.place, required=False)
        turns = self.field(self.record, "conversations", list, self.place)
        if turns is None and self.record.get("conversations") is None:
            keys = ", ".join(list(self.record)[:20]) or "none"
            self.faults[-1] += f"; the keys there are {keys}; expected turns in `conversations` or `messages`"
        if turns == []:
            self.fault(self.place, "conversations: expected at least one message, got none")
        messages = [self.message(turn, f"{self.place}: conversations[{i}]") for i, turn in enumerate(turns or [])]
        if self.listed is not None and len(self.listed) != self.shown:
            shown = f"images: {len(self.listed)} listed, {self.shown} shown"
            self.fault(
                self.place,
                f"{shown}; expected each, in order: an image part, or {IMAGE_MARKER} in the text, for each one",
            )
        if self.faults:
            raise DataError(self.faults)
        text = self.known.text
        metadata = {text(k): text(v) if isinstance(v, str) else v for k, v in (metadata or {}).items()}
        task_type = task_type and text(task_type)
        return Conversation(task_id, task_type, tuple(messages), metadata, self.source, self.subjects(metadata))

    def subjects(self, metadata: Mapping[str, Any]) -> frozenset[str]:
        listed = self.record.get("subject_ids")
        named = [
            *(listed if isinstance(listed, list) else ()),
            metadata.get("subject_id"),
            metadata.get("reference_id"),
        ]
        # pandas makes floats of numbers in a column that lacks some, and NaN of those
        named = [int(name) if isinstance(name, float) and name.is_integer() else name for name in named]
        of_paths = (next(filter(None, map(_SUBJECT.match, reversed(path.split("/")))), None) for path in self.paths)
        return frozenset(
            map(
                self.known.text,
                [str(name).removeprefix("sub-") for name in named if isinstance(name, str | int) and str(name)]
                + [match[1] for match in of_paths if match],
            )
        )

    def fault(self, place: str, message: str) -> None:
        self.faults.append(f"{place}: {message}")

    def field(self, record: dict[str, Any], name: str, type_: type, place: str, required: bool = True) -> Any:
        """The field, or None where it is absent or of another type, which is a fault."""
        value = record.get(name)
        if isinstance(value, type_):
            return value
        if value is not None or required:
            self.fault(place, f"{name}: expected {KINDS[type_]}, got {kind(value)}")
        return None

    def message(self, turn: Any, place: str) -> Message:
        if not isinstance(turn, dict):
            self.fault(place, f"expected an object with role and content, got {kind(turn)}")
            return Message("", ())
        role = turn.get("role")
        if role not in ROLES:
            self.fault(place, f"role: expected one of {', '.join(ROLES)}, got {quoted(role)}")
        content = turn.get("content")
        inline = isinstance(content, str)
        if isinstance(content, str):  # its markers are its images; `images` says which
            content = [{"type": "image"}] * content.count(IMAGE_MARKER) + [{"type": "text", "text": content}]
        if not isinstance(content, list):
            self.fault(place, f"content: expected a string or a list of parts, got {kind(content)}")
            return Message(str(role), ())
        parts = [self.part(part, f"{place}.content[{i}]") for i, part in enumerate(content)]
        if role == "assistant" and any(isinstance(part, Image) for part in parts):
            self.fault(place, "an image in an assistant turn; expected text, images belong to the user's turns")
        return self.known.message(self.known.text(str(role)), self.placed(parts, place), inline)

    def part(self, part: Any, place: str) -> str | Image:
        form = part.get("type") if isinstance(part, dict) else None
        if form == "image":
            return self.image(part, place)
        if form != "text":
            self.fault(place, f"expected an object of type text or image, got {quoted(form)}")
            return ""
        text = self.field(part, "text", str, place) or ""
        if forged := [token for token in (TURN_START, TURN_END) if token in text]:
            self.fault(place, f"text: holds {' and '.join(forged)}, which would forge a turn; take it out")
        return self.known.text(text)

    def image(self, part: dict[str, Any], place: str) -> Image:
        listed = self.listed[self.shown] if self.listed is not None and self.shown < len(self.listed) else {}
        if not isinstance(listed, dict):
            self.fault(f"{self.place}: images[{self.shown}]", f"expected an object, got {kind(listed)}")
            listed = {}
        self.shown += 1
        names = [part.get("modality"), listed.get("modality")]
        if names == [None, None] and len(self.known.modalities) == 1:
            names = list(self.known.modalities)  # the only one that can be meant
        paths = [self.posix(value, place) for value in (part.get("image_path"), listed.get("path"))]
        path = self.agreed("image_path", paths, partial(self.known.join, self.root), place)
        if path and not self.allow_outside_root and (away := [p for p in paths if p and self.leads_out(p)]):
            remedy = "expected a path inside it, an absolute one, or data.allow_outside_root: true"
            self.fault(place, f"image_path: {away[0]} leads out of {self.root}; {remedy}")
        modality = self.agreed("modality", names, self.known.resolve, place)
        self.paths += [path for path in paths if isinstance(path, str)]
        return self.known.image(path or self.root, modality or "")

    def posix(self, path: Any, place: str) -> Any:
        r"""Return a relative path that was written on Windows (`sub-01\anat`) with slashes; a file whose name really
        has a backslash stays. Drives and shares of Windows are a fault."""
        if not isinstance(path, str) or not _WINDOWS.search(path) or os.path.lexists(self.root / path):
            return path
        if _DRIVE.match(path):
            remedy = f"expected one of this machine, relative to {self.root} with / between folders, or absolute"
            self.fault(place, f"image_path: {path} is a path of Windows; {remedy}")
        return path.replace("\\", "/")

    def leads_out(self, path: str) -> bool:
        """Whether a relative path ends outside the root, going by its words: links are not followed."""
        if ".." not in path:  # as of nearly all, and much faster
            return False
        root, whole = os.path.normpath(self.root), os.path.normpath(self.root / path)
        return not os.path.isabs(path) and not Path(whole).is_relative_to(root)

    def agreed(self, key: str, values: list[Any], meaning: Callable[[str], T | None], place: str) -> T | None:
        """The meaning of what an image part and its entry in `images` say; either may be silent, both must agree."""
        given = [value for value in values if value is not None]
        meanings = [meaning(value) if isinstance(value, str) and value else None for value in given]
        if not given:
            self.fault(place, f"{key}: missing here and in `images`; expected {self.expected(key)}")
            return None
        if None in meanings:
            value = given[meanings.index(None)]
            if key == "modality" and isinstance(value, str) and value:
                self.fault(place, f"{key}: {unknown_modality(value, self.known.modalities)}")
            else:
                self.fault(place, f"{key}: expected {self.expected(key)}, got {quoted(value)}")
            return None
        if meanings[0] != meanings[-1]:
            self.fault(place, f"{key}: {given[0]} here, {given[1]} in `images`; expected the same")
        return meanings[0]

    def expected(self, key: str) -> str:
        return modality_names(self.known.modalities) if key == "modality" else "a path"

    def placed(self, parts: list[str | Image], place: str) -> tuple[str | Image, ...]:
        """The parts with images at the `<image>` markers of the text, if it has any; else where they stand."""
        images = [part for part in parts if isinstance(part, Image)]
        markers = sum(part.count(IMAGE_MARKER) for part in parts if isinstance(part, str))
        if not markers:
            return tuple(parts)
        if markers != len(images):
            self.fault(
                place, f"{markers} {IMAGE_MARKER} markers, {len(images)} images; expected a marker for each, or none"
            )
            return ()
        waiting = iter(images)
        out: list[str | Image] = []
        for text in (part for part in parts if isinstance(part, str)):
            first, *rest = text.split(IMAGE_MARKER)
            out.append(first)
            for piece in rest:
                out += [next(waiting), piece]
        return tuple(out)
