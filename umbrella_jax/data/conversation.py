"""Read conversation files: JSON becomes conversations of texts and image references. Opens no image."""

import os.path
import re
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from umbrella_jax.config.schema import DataConfig, modality_names, resolve_modality, unknown_modality
from umbrella_jax.data.schema import IMAGE_MARKER, OLD_KEYS, to_current
from umbrella_jax.data.subject_split import SPLITS
from umbrella_jax.errors import DataError, visible
from umbrella_jax.io.reading import JSON_KINDS, kind, parse_json, quoted, read_items, read_lines

if TYPE_CHECKING:
    from umbrella_jax.data.ragged import Ragged

ROLES = ("system", "user", "assistant")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
LOCK_FILE = "study.lock.json"
"""Record of a built study, beside its conversations."""
MAX_FAULTS = 10_000
"""Number of faults after which reading stops: in a file that holds something else, every value may be a fault."""
T = TypeVar("T")
_KNOWN_MESSAGES = 10_000
"""Number of messages of a single text that the parser recognises; files with more have few that are equal."""
_SUFFIXES = (".json", ".jsonl")
_TOKEN = re.compile("|".join(map(re.escape, (IMAGE_MARKER, TURN_START, TURN_END))))
"""Texts with one of these are read by `_Parser` alone: it puts images at markers and refuses forged turns."""
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
    """One input of the vision tower: a file, the configured modality to read it as, and the window of a 4D run."""

    path: Path
    modality: str
    window: int = 0
    changed: tuple[int, int, int, int] | None = None
    """Seed, epoch, conversation and number of the image in it, from which augmentation draws; None if unchanged."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: its role, and its texts and images in reading order."""

    role: str
    parts: tuple[str | Image, ...]
    inline: bool = False
    """Whether the turn is one string in the file, with its images at `<image>` markers."""

    @property
    def text(self) -> str:
        """The turn's texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation."""

    task_id: str
    task_type: str | None
    messages: tuple[Message, ...]
    metadata: Mapping[str, Any]
    source: str
    """Its place: `file.json[3]` or `file.jsonl:12`."""
    subjects: frozenset[str] = frozenset()
    """Ids without BIDS' `sub-`: `subject_ids`; `subject_id`, `reference_id` and `reference_ids` of `metadata`; and the
    last `sub-LABEL` in each image path of the file. Empty if none of these is there."""

    @property
    def images(self) -> tuple[Image, ...]:
        """Images in the order in which the text shows them, repeated if it shows one twice."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Image))

    @property
    def references(self) -> frozenset[str]:
        """The `subjects` that are shown only as references: those that `metadata` names as such."""
        listed = self.metadata.get("reference_ids")
        named = [self.metadata.get("reference_id"), *(listed if isinstance(listed, list) else ())]
        return frozenset(_subject_names(named)) - frozenset(_subject_names([self.metadata.get("subject_id")]))

    @property
    def queried_images(self) -> tuple[Image, ...]:
        """`images` without those of `references`: shown before the last turn of the user that shows one.

        An image whose path names a BIDS subject belongs to that one.
        """
        if not (references := self.references):
            return self.images
        last = max((i for i, m in enumerate(self.messages) if any(isinstance(p, Image) for p in m.parts)), default=0)
        queried = []
        for turn, message in enumerate(self.messages):
            for image in (part for part in message.parts if isinstance(part, Image)):
                subject = _subject_in(image.path.parts)
                if (turn == last) if subject is None else (subject not in references):
                    queried.append(image)
        return tuple(queried)

    @property
    def image_subjects(self) -> tuple[str | None, ...]:
        """The subject of each of `images`, from its path or from `metadata`; None if neither names it."""
        names = [name if (name := _subject_in(i.path.parts)) in self.subjects else None for i in self.images]
        if len(self.subjects) == 1:
            return tuple(name or next(iter(self.subjects)) for name in names)
        queried = frozenset(self.queried_images)
        own = _subject_names([self.metadata.get("subject_id")])
        listed = self.metadata.get("reference_ids")
        others = _subject_names(listed if isinstance(listed, list) else [self.metadata.get("reference_id")])
        references = [i for i, image in enumerate(self.images) if image not in queried]
        known = dict.fromkeys(range(len(names)), own[0] if self.references and own else None)
        known |= dict(zip(references, others if len(others) == len(references) else [None] * len(names), strict=False))
        return tuple(name or known[i] for i, name in enumerate(names))

    @property
    def label(self) -> str:
        """The name used in messages; `task_id` is not unique in real files."""
        return f"{self.source} ({visible(self.task_id, kept='')})"


_ANY_IMAGE = Image(Path(), "")
"""Stands for the next image of a conversation in a message that `Conversations` stores once."""


class Conversations(Sequence[Conversation]):
    """Conversations in columns, millions in little memory; each `Conversation` is built on access.

    Equal images, equal names and messages that differ only in their images are stored once.

    Args:
        conversations: are read one after the other and not kept.
    """

    images: list[Image]
    """The distinct images, in the order of first appearance."""
    messages: list[Message]
    """The distinct messages, each with the same image in every place of one."""
    message_rows: "Ragged"
    """Indices of each conversation's messages in `messages`."""
    image_rows: "Ragged"
    """Indices of each conversation's `Conversation.images` in `images`."""
    subjects: list[str]
    """The distinct `Conversation.subjects`, in the order of first appearance."""

    def __init__(self, conversations: Iterable[Conversation]):
        columns = _Columns()
        for conversation in conversations:
            columns.add(conversation)
        self._set(columns)

    @classmethod
    def _from_columns(cls, columns: "_Columns") -> "Conversations":
        conversations = cls.__new__(cls)
        conversations._set(columns)
        return conversations

    def _set(self, columns: "_Columns") -> None:
        self.images, self.subjects, self._sources = list(columns.images), list(columns.subjects), list(columns.sources)
        self.messages = [
            Message(role, tuple([_ANY_IMAGE if part is None else part for part in parts]), inline)
            for role, parts, inline in columns.messages
        ]
        self.message_rows, self.image_rows = columns.message_rows.rows(), columns.image_rows.rows()
        self._subject_rows = columns.subject_rows.rows()
        self._task_ids, self._task_types = columns.task_ids, columns.task_types
        self._keys, self._values, self._value_ends = columns.keys, columns.values, columns.value_ends
        self._source_codes, self._numbers = columns.source_codes, columns.numbers

    def metadata_values(self, key: str) -> Iterator[Any]:
        """Yield the value of a key for each conversation whose `metadata` has it."""
        for keys, start in zip(self._keys, self._value_ends, strict=False):
            if key in keys:
                yield self._values[start + keys.index(key)]

    def __len__(self) -> int:
        return len(self._task_ids)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # raises IndexError
        images = map(self.images.__getitem__, self.image_rows[index].tolist())
        messages = [self.messages[code] for code in self.message_rows[index].tolist()]
        head, tail = self._sources[self._source_codes[index]]
        number = self._numbers[index]
        values = self._values[self._value_ends[index] : self._value_ends[index + 1]]
        return Conversation(
            task_id=self._task_ids[index],
            task_type=self._task_types[index],
            messages=tuple([_with_images(message, images) for message in messages]),
            metadata=dict(zip(self._keys[index], values, strict=True)),
            source=_join_source(head, number, tail),
            subjects=frozenset([self.subjects[code] for code in self._subject_rows[index].tolist()]),
        )


class _RaggedBuilder:
    """Collects a `Ragged` row by row."""

    def __init__(self) -> None:
        self._values, self._ends = array("i"), array("q", [0])

    def add_row(self, values: Iterable[int]) -> None:
        self._values.extend(values)
        self._ends.append(len(self._values))

    def rows(self) -> "Ragged":
        from umbrella_jax.data.ragged import Ragged  # imported here: the command line must not wait for NumPy

        return Ragged.from_arrays(self._values, self._ends)


_MessageKey = tuple[str, tuple[str | None, ...], bool]
"""Role, parts with None for each image, and `Message.inline`."""


class _Columns:
    """Collects the columns of `Conversations`, each distinct value once: dictionaries are {value: index}."""

    def __init__(self) -> None:
        self.images, self.subjects, self.sources = dict[Image, int](), dict[str, int](), dict[tuple[str, str], int]()
        self.messages: dict[_MessageKey, int] = {}
        self.message_rows, self.image_rows, self.subject_rows = _RaggedBuilder(), _RaggedBuilder(), _RaggedBuilder()
        self.value_ends, self.source_codes, self.numbers = array("q", [0]), array("i"), array("q")
        self.task_ids, self.task_types = list[str](), list[str | None]()
        self.keys, self.values = list[tuple[str, ...]](), list[Any]()
        self._distinct_keys: dict[tuple[str, ...], tuple[str, ...]] = {}

    def add(self, conversation: Conversation) -> None:
        messages = [
            (m.role, tuple([part if isinstance(part, str) else None for part in m.parts]), m.inline)
            for m in conversation.messages
        ]
        images = [self.images.setdefault(image, len(self.images)) for image in conversation.images]
        self.add_row(
            conversation.task_id,
            conversation.task_type,
            messages,
            images,
            conversation.metadata,
            conversation.subjects,
            _split_source(conversation.source),
        )

    def add_row(
        self,
        task_id: str,
        task_type: str | None,
        messages: Iterable[_MessageKey],
        images: Iterable[int],
        metadata: Mapping[str, Any],
        subjects: Iterable[str],
        source: tuple[str, int, str],
    ) -> None:
        """Add a conversation of these messages, with these indices in `images`; source as from `_split_source`."""
        self.task_ids.append(task_id)
        self.task_types.append(task_type)
        codes = self.messages
        self.message_rows.add_row([codes.setdefault(message, len(codes)) for message in messages])
        self.image_rows.add_row(images)
        keys = tuple(metadata)
        self.keys.append(self._distinct_keys.setdefault(keys, keys))
        self.values.extend(metadata.values())
        self.value_ends.append(len(self.values))
        self.subject_rows.add_row([self.subjects.setdefault(name, len(self.subjects)) for name in subjects])
        head, number, tail = source
        self.source_codes.append(self.sources.setdefault((head, tail), len(self.sources)))
        self.numbers.append(number)


def _with_images(message: Message, images: Iterator[Image]) -> Message:
    """Return a message of `Conversations` with the next images in their places."""
    if _ANY_IMAGE not in message.parts:
        return message
    parts = tuple([part if isinstance(part, str) else next(images) for part in message.parts])
    return Message(message.role, parts, message.inline)


def _split_source(source: str) -> tuple[str, int, str]:
    """Split the place of a conversation into the texts around its number, and the number; it is -1 if there is none."""
    opening, tail = ("[", "]") if source.endswith("]") else (":", "")
    head, separator, number = source.removesuffix(tail).rpartition(opening)
    if number.isdecimal() and str(int(number)) == number:
        return head + separator, int(number), tail
    return source, -1, ""


def _join_source(head: str, number: int, tail: str) -> str:
    """Undo `_split_source`."""
    return head if number < 0 else f"{head}{number}{tail}"


def _subject_names(ids: Iterable[Any]) -> list[str]:
    """Return ids as texts without `sub-`, without those that are missing."""
    # pandas turns whole numbers into floats, and missing ones into NaN, if a column has missing values
    whole = [int(name) if isinstance(name, float) and name.is_integer() else name for name in ids]
    return [str(name).removeprefix("sub-") for name in whole if isinstance(name, str | int) and str(name)]


def _subject_in(parts: Sequence[str]) -> str | None:
    """Return the label of the last part of a path that begins with `sub-LABEL`."""
    match = next(filter(None, map(_SUBJECT.match, reversed(parts))), None)
    return match[1] if match else None


def read_with_config(path: str | Path, modalities: Collection[str], data: DataConfig) -> Conversations:
    """Read conversations, as `read_conversations` does, with the image root and the filters of a configuration."""
    return read_conversations(
        path,
        modalities,
        data.image_root,
        modality=data.modality,
        task_filter=data.task_filter,
        allow_outside_root=data.allow_outside_root,
    )


def read_conversations(
    path: str | Path,
    modalities: Collection[str],
    image_root: str | Path | None = None,
    *,
    modality: str | None = None,
    task_filter: str | None = None,
    allow_outside_root: bool = False,
) -> Conversations:
    """Read a .json file (an object or a list), a .jsonl file (one object per line), or all such files in a directory.

    Older schemas are read too, see `umbrella_jax.data.schema`. Conversations that a filter leaves out are not checked:
    their images may be missing, their modalities not configured.

    Args:
        path: file or directory; the files of a directory are read in sorted order.
        modalities: configured modality names; an image may use any alias.
        image_root: where relative image paths start; default: the folder of the file that contains them.
        modality: keep conversations whose images all have it; one without images has every modality.
        task_filter: keep conversations whose `task_type` or `metadata.task` is this.
        allow_outside_root: accept relative image paths that leave the root through `..`, which are refused otherwise.
            Absolute paths, and symbolic links wherever they lead, are always accepted.

    Raises:
        DataError: with every fault of every file, and if there is no conversation or the filters keep none.
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
) -> tuple[Conversations, list[str]]:
    """Return the good conversations and the faults of the others; arguments as in `read_conversations`.

    After MAX_FAULTS faults reading stops, and one more fault reports that.

    Raises:
        DataError: `path` or `image_root` does not exist, or `modality` is not configured.
    """
    if modality is not None and resolve_modality(modality, modalities) is None:
        raise DataError(f"data.modality: {unknown_modality(modality, modalities)}")
    if image_root is not None and not Path(image_root).is_dir():
        reason = "not a directory" if Path(image_root).exists() else "not found"
        raise DataError(
            f"data.image_root: {image_root}: {reason}; expected the directory where relative image paths start "
            "(--image-root DIR)"
        )
    faults: list[str] = []
    number, shown, tasks = 0, set[str](), set[str]()
    is_filtered = modality is not None or task_filter is not None
    interned, columns = _Interned(modalities), _Columns()
    files = conversation_files(Path(path))

    def parse_all() -> None:
        nonlocal number, shown, tasks
        for file in files:
            root = (file.parent if image_root is None else Path(image_root)).absolute()
            plain = _PlainParser(columns, root, interned, allow_outside_root)
            for place, record in _records(file, faults):
                number += 1
                if not is_filtered and plain.add(record, place):
                    continue
                source, schema_faults = _join_source(*place), list[str]()
                if isinstance(record, dict):
                    record, schema_faults = to_current(record, source)
                if is_filtered:
                    record_modalities, record_tasks = _shown_modalities(record), _tasks(record)
                    shown |= record_modalities
                    tasks |= record_tasks
                    if task_filter is not None and task_filter not in record_tasks:
                        continue
                    resolve = interned.resolve
                    if modality is not None and any(resolve(modality) != resolve(name) for name in record_modalities):
                        continue
                    if not schema_faults and plain.add(record, place):
                        continue
                try:
                    columns.add(_Parser(record, source, root, interned, allow_outside_root).parse(schema_faults))
                except DataError as error:
                    faults.extend(error.faults)
                if len(faults) > MAX_FAULTS:
                    break
            if len(faults) > MAX_FAULTS:
                faults.append(f"{file}: stopped here: too many errors; fix these first")
                return

    parse_all()
    conversations = Conversations._from_columns(columns)
    if not conversations and not faults:
        given = {"modality": modality, "task_filter": task_filter}
        filters = [f"{name} {value}" for name, value in given.items() if value is not None]
        faults.append(
            f"{path}: none of {number} conversations matches {' and '.join(filters)}; "
            f"their modalities are {_names(shown)}, their tasks {_names(tasks)}"
            if number
            else f"{path}: contains no conversation; expected .json or .jsonl files with at least one"
        )
    return conversations, faults


def _shown_modalities(record: Any) -> set[str]:
    """Return the modality names in a record that may be faulty."""
    entries: list[Any] = []
    if isinstance(record, dict):
        entries += record["images"] if isinstance(record.get("images"), list) else []
        for turn in record["conversations"] if isinstance(record.get("conversations"), list) else []:
            content = turn.get("content") if isinstance(turn, dict) else None
            entries += content if isinstance(content, list) else []
    return {e["modality"] for e in entries if isinstance(e, dict) and isinstance(e.get("modality"), str)}


def _tasks(record: Any) -> set[str]:
    """Return `task_type` and `metadata.task` of a record that may be faulty."""
    if not isinstance(record, dict):
        return set()
    metadata = record.get("metadata")
    values = [record.get("task_type"), metadata.get("task") if isinstance(metadata, dict) else None]
    return {value for value in values if isinstance(value, str)}


def _names(values: Collection[str]) -> str:
    return ", ".join(sorted(values)) or "none"


def conversation_files(path: Path) -> list[Path]:
    """Return the file itself, or the files below a directory, sorted.

    Hidden files and folders, such as an editor's `.ipynb_checkpoints`, links to directories, and the record of a built
    study are skipped.

    Raises:
        DataError: the path is neither; or the directory contains several splits (as one set, a run would train on its
            evaluation data), or `X.json` beside `X.jsonl` (a run would train on both).
    """
    if path.is_dir():
        if (path / "dataset_description.json").exists() or (path / "participants.tsv").exists():
            command = f"umbrella-jax data from-bids {shlex.quote(str(path))} OUT --target COLUMN"
            raise DataError(f"{path}: a BIDS data set, not conversations; make them with `{command}`")
        below = (f for f in path.rglob("*") if f.suffix in _SUFFIXES and f.name != LOCK_FILE and f.is_file())
        files = sorted(f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts))
        names_of = Counter(file.with_suffix("") for file in files)
        if twins := [file for file in files if names_of[file.with_suffix("")] > 1]:
            pair = " and ".join(file.name for file in twins[:2])
            raise DataError(f"{twins[0].parent}: {pair}: one set in two formats, or two sets? Name one of the files")
        if splits := _splits(path, files):
            entries = {path / file.relative_to(path).parts[0]: None for file in splits}
            words = {entry: _SPLIT.findall(_CAMEL.sub("_", entry.stem).lower()) for entry in entries}
            shown = list(entries) if all(words.values()) else splits  # train/ and test/, or sex/train.json
            names = ", ".join(f"{entry.relative_to(path)}{'/' if entry.is_dir() else ''}" for entry in shown[:4])
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            raise DataError(
                f"{path}: contains several splits: {names}{more}; name one file, or a directory of one split"
                f"{_split_flags(words)}"
            )
        return files
    if not path.is_file():
        fault = "a pipe or device" if path.exists() else not_found(path)
        raise DataError(f"{path}: {fault}; expected a conversation file or a directory of them")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: expected a .json or .jsonl file, or a directory of them")
    return [path]


def not_found(path: Path) -> str:
    """Return "not found", with the name of the same file in the other format if that exists."""
    others = [path.with_suffix(suffix) for suffix in _SUFFIXES if path.suffix in _SUFFIXES and suffix != path.suffix]
    return "; ".join(["not found", *(f"there is {other.name}" for other in others if other.is_file())])


def _splits(root: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files that belong to several splits, none if there is one split only.

    Files belong to different splits if they are beside a splits.tsv of `data from-bids`, or if their paths below `root`
    contain different words for a split.
    """
    folders = Counter(file.parent for file in files if (file.parent / SPLITS).is_file())
    if listed := [file for file in files if folders[file.parent] > 1]:
        return listed
    names = {file: _CAMEL.sub("_", file.relative_to(root).as_posix()).lower() for file in files}
    words = {file: _SPLIT.findall(name) for file, name in names.items()}
    named = [file for file in files if words[file]]
    return named if len({tuple(sorted(set(words[file]))) for file in named}) > 1 else []


def _split_flags(words: Mapping[Path, list[str]]) -> str:
    """Return the flags that name the splits to train and to evaluate on, if it is clear which these are.

    Args:
        words: {file or directory: words for a split in its name}.
    """
    named = {word: [path for path in words if words[path] == [word]] for word in ("train", "val", "eval", "dev")}
    training, evaluation = (named.pop("train"), next(filter(None, named.values()), []))
    if len(training) != 1 or len(evaluation) != 1:
        return ""
    train_flag, eval_flag = (shlex.quote(str(path)) for path in (*training, *evaluation))
    return f": --train-data {train_flag} --eval-data {eval_flag}"


def _records(file: Path, faults: list[str]) -> Iterator[tuple[tuple[str, int, str], Any]]:
    """Yield (source as from `_split_source`, JSON value) for everything that should be a conversation.

    Faulty JSON goes to `faults`.
    """
    try:
        if file.suffix == ".json":
            for index, value in read_items(file, DataError, _LIST, nan_is_null=True):
                yield (str(file), -1, "") if index is None else (f"{file}[", index, "]"), value
            return
        head = f"{file}:"
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
                    yield (head, number, ""), value
    except DataError as error:
        faults.extend(error.faults)


class _Interned:
    """Keeps equal paths, texts and modalities once; thousands of conversations share them."""

    def __init__(self, modalities: Collection[str]):
        self.modalities = modalities
        self.resolve: Callable[[str], str | None] = cache(lambda name: resolve_modality(name, modalities))
        self.join: Callable[[Path, str], Path] = cache(Path.joinpath)
        self.image: Callable[[Path, str], Image] = cache(Image)
        self.text: Callable[[str], str] = cache(str)
        self.subject: Callable[[str], str | None] = cache(lambda path: _subject_in(path.split("/")))
        self.images: dict[tuple[Any, ...], Image] = {}
        """{values that name a path and a modality: the image}, without faulty ones."""
        self.messages: dict[tuple[str, str], Message] = {}
        """{role and text: the message with this text as its only part}, without faulty ones."""

    def collect_subjects(self, ids: Any, metadata: Mapping[str, Any], paths: Iterable[str]) -> frozenset[str]:
        """Return the ids of `Conversation.subjects`.

        Args:
            ids: the record's `subject_ids`, whatever it holds.
            metadata: that of the record.
            paths: image paths as in the record.
        """
        named = [name for names in (ids, metadata.get("reference_ids")) if isinstance(names, list) for name in names]
        named += [metadata.get("subject_id"), metadata.get("reference_id")]
        in_paths = filter(None, map(self.subject, paths))
        return frozenset(map(self.text, [*_subject_names(named), *in_paths]))


class _PlainParser:
    """Adds plain records to columns with half as many calls as `_Parser`, to which it leaves all others.

    Plain is what this project writes: the current schema, turns of parts, each image with its modality and path, which
    `images` may repeat, and no marker in a text. What a new image means, and which are the subjects, is said by the
    same code as for other records.
    """

    def __init__(self, columns: _Columns, root: Path, interned: _Interned, allow_outside_root: bool):
        self.columns, self.root, self.interned = columns, root, interned
        self.allow_outside_root = allow_outside_root
        self.images: dict[str, dict[str, int]] = {}
        """{modality: {path: index in the columns' images}}, as in the records, without faulty ones."""
        self.named: tuple[Any, ...] = ()
        """What named the subjects of the last record; the next one is often about the same."""
        self.subjects: frozenset[str] = frozenset()

    def add(self, record: Any, source: tuple[str, int, str]) -> bool:
        """Add a record if it is plain, and return whether it is. If not, nothing is added."""
        if type(record) is not dict or not OLD_KEYS.isdisjoint(record):
            return False
        task_id, task_type, turns = record.get("task_id"), record.get("task_type"), record.get("conversations")
        metadata, listed = record.get("metadata"), record.get("images")
        if metadata is None:
            metadata = {}
        if type(task_id) is not str or type(turns) is not list or not turns or type(metadata) is not dict:
            return False
        if task_type is not None and type(task_type) is not str:
            return False
        messages, image_parts, known = list[_MessageKey](), list[dict[str, Any]](), self.columns.messages
        for turn in turns:
            if type(turn) is not dict or len(turn) != 2:
                return False
            role, content = turn.get("role"), turn.get("content")
            if role not in ROLES or type(content) is not list:
                return False
            texts = list[str | None]()
            for part in content:
                part_type = part.get("type") if type(part) is dict else None
                if part_type == "text":
                    text = part.get("text")
                    if type(text) is not str:
                        return False
                    texts.append(text)
                elif part_type == "image" and role != "assistant":
                    image_parts.append(part)
                    texts.append(None)
                else:
                    return False
            message = (role, tuple(texts), False)
            if message not in known and any(text is not None and _TOKEN.search(text) for text in texts):
                return False
            messages.append(message)
        if listed is not None and not self.are_listed(image_parts, listed):
            return False
        images = self.image_codes(image_parts, source)
        if images is None:
            return False
        paths = [part["image_path"] for part in image_parts]
        text_of = self.interned.text
        values = {key: text_of(value) if type(value) is str else value for key, value in metadata.items()}
        self.columns.add_row(
            task_id,
            task_type and text_of(task_type),
            messages,
            images,
            values,
            self.subjects_of(record.get("subject_ids"), values, paths),
            source,
        )
        return True

    def are_listed(self, parts: list[dict[str, Any]], listed: Any) -> bool:
        """Return whether a record's `images` say the same as its image parts."""
        return (
            type(listed) is list
            and len(listed) == len(parts)
            and all(
                type(entry) is dict
                and entry.get("path") == part.get("image_path")
                and entry.get("modality") == part.get("modality")
                for entry, part in zip(listed, parts, strict=True)
            )
        )

    def image_codes(self, parts: list[dict[str, Any]], source: tuple[str, int, str]) -> list[int] | None:
        """Return the indices of image parts in the columns; None, with nothing added, if one is not plain."""
        codes, new = list[int](), list[tuple[str, str, Image]]()
        for part in parts:
            modality, path = part.get("modality"), part.get("image_path")
            if type(modality) is not str or type(path) is not str:
                return None
            code = self.images[modality].get(path) if modality in self.images else None
            if code is None:
                parser = _Parser({}, _join_source(*source), self.root, self.interned, self.allow_outside_root)
                image = parser.parse_image(part, 0, 0)
                if parser.faults or parser.paths != [path]:  # with backslashes, say
                    return None
                new.append((modality, path, image))
            else:
                codes.append(code)
        if not new:
            return codes
        indices = self.columns.images
        for modality, path, image in new:
            self.images.setdefault(modality, {})[path] = indices.setdefault(image, len(indices))
        return [self.images[part["modality"]][part["image_path"]] for part in parts]

    def subjects_of(self, ids: Any, metadata: dict[str, Any], paths: list[str]) -> frozenset[str]:
        """Return the ids of `Conversation.subjects`."""
        named = (ids, metadata.get("subject_id"), paths)
        is_text = ids is None or (type(ids) is list and all(type(one) is str for one in ids))
        is_text = is_text and type(named[1]) is str  # 1, 1.0 and true are equal, but not the same id
        if not is_text or "reference_id" in metadata or "reference_ids" in metadata:
            return self.interned.collect_subjects(ids, metadata, paths)
        if named != self.named:
            self.named, self.subjects = named, self.interned.collect_subjects(ids, metadata, paths)
        return self.subjects


class _Parser:
    """Turns one record into a conversation, and continues after a fault to find all others."""

    def __init__(self, record: Any, source: str, root: Path, interned: _Interned, allow_outside_root: bool):
        self.record, self.source, self.root, self.interned = record, source, root, interned
        self.allow_outside_root = allow_outside_root
        self.task_id: str | None = None
        self.faults: list[str] = []
        self.listed: list[Any] | None = None  # the record's `images`
        self.shown = 0  # number of images so far
        self.paths: list[str] = []  # image paths so far, as in the record

    @property
    def place(self) -> str:
        """The record's name in messages."""
        return self.source if self.task_id is None else f"{self.source} ({visible(self.task_id, kept='')})"

    def place_in(self, turn: int, part: int | None = None) -> str:
        """Return the name of a turn or one of its parts in messages."""
        return f"{self.place}: conversations[{turn}]" + ("" if part is None else f".content[{part}]")

    def parse(self, schema_faults: Collection[str] = ()) -> Conversation:
        """Return the conversation. Raise DataError with `schema_faults` and every fault of the record."""
        if not isinstance(self.record, dict):
            raise DataError(f"{self.source}: expected a conversation, an object, got {kind(self.record)}")
        self.task_id = task_id = self.get_field("task_id", str)
        if schema_faults:  # the meaning of the other fields is then unclear
            raise DataError([*self.faults, *(f"{self.place}: {fault}" for fault in schema_faults)])
        task_type = self.get_field("task_type", str, required=False)
        metadata = self.get_field("metadata", dict, required=False)
        self.listed = self.get_field("images", list, required=False)
        turns = self.get_field("conversations", list)
        if turns is None and self.record.get("conversations") is None:
            keys = ", ".join(list(self.record)[:20]) or "none"
            self.faults[-1] += f"; its keys are {keys}; expected turns in `conversations` or `messages`"
        if turns == []:
            self.add_fault(self.place, "conversations: expected at least one message, got none")
        messages = [self.parse_message(turn, i) for i, turn in enumerate(turns or ())]
        if self.listed is not None and len(self.listed) != self.shown:
            shown = f"images: {len(self.listed)} listed, {self.shown} shown"
            self.add_fault(
                self.place,
                f"{shown}; expected an image part, or {IMAGE_MARKER} in the text, for each image, in order",
            )
        if self.faults:
            raise DataError(self.faults)
        text = self.interned.text
        metadata = {text(k): text(v) if isinstance(v, str) else v for k, v in (metadata or {}).items()}
        task_type = task_type and text(task_type)
        subjects = self.interned.collect_subjects(self.record.get("subject_ids"), metadata, self.paths)
        return Conversation(task_id, task_type, tuple(messages), metadata, self.source, subjects)

    def add_fault(self, place: str, message: str) -> None:
        self.faults.append(f"{place}: {message}")

    def get_field(self, name: str, type_: type, required: bool = True) -> Any:
        """Return a field, None if it is absent or has another type; collect a fault unless it may be absent."""
        value = self.record.get(name)
        if isinstance(value, type_):
            return value
        if value is not None or required:
            self.add_fault(self.place, f"{name}: expected {JSON_KINDS[type_]}, got {kind(value)}")
        return None

    def parse_message(self, turn: Any, number: int) -> Message:
        """Return the turn with this number as a message."""
        if not isinstance(turn, dict):
            self.add_fault(self.place_in(number), f"expected an object with role and content, got {kind(turn)}")
            return Message("", ())
        role = turn.get("role")
        if role not in ROLES:
            self.add_fault(self.place_in(number), f"role: expected one of {', '.join(ROLES)}, got {quoted(role)}")
        content = turn.get("content")
        if earlier := self.known_message(role, content):
            return earlier
        inline, faults = isinstance(content, str), len(self.faults)
        if isinstance(content, str):  # its markers are its images, listed in `images`
            content = [{"type": "image"}] * content.count(IMAGE_MARKER) + [{"type": "text", "text": content}]
        if not isinstance(content, list):
            place = self.place_in(number)
            self.add_fault(place, f"content: expected a string or a list of parts, got {kind(content)}")
            return Message(str(role), ())
        parts = [self.parse_part(part, number, i) for i, part in enumerate(content)]
        if role == "assistant" and any(isinstance(part, Image) for part in parts):
            place = self.place_in(number)
            self.add_fault(place, "an image in an assistant turn; expected text, images belong to the user's turns")
        message = Message(str(role), self.images_at_markers(parts, number), inline)
        known = self.interned.messages
        is_text = len(parts) == 1 and isinstance(parts[0], str) and message.parts == (parts[0],) and not inline
        if is_text and len(self.faults) == faults and len(known) < _KNOWN_MESSAGES:
            known[message.role, message.text] = message
        return message

    def known_message(self, role: Any, content: Any) -> Message | None:
        """Return the message of an earlier turn that had the same role and the same text, as answers often are."""
        if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
            return None
        text = content[0].get("text")
        if not isinstance(role, str) or not isinstance(text, str) or content[0].get("type") != "text":
            return None
        return self.interned.messages.get((role, text))

    def parse_part(self, part: Any, turn: int, number: int) -> str | Image:
        """Return a part of a turn: its text or its image."""
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "image":
            return self.parse_image(part, turn, number)
        if part_type != "text":
            place = self.place_in(turn, number)
            self.add_fault(place, f"expected an object of type text or image, got {quoted(part_type)}")
            return ""
        text = part.get("text")
        if not isinstance(text, str):
            self.add_fault(self.place_in(turn, number), f"text: expected {JSON_KINDS[str]}, got {kind(text)}")
            return ""
        if forged := [token for token in (TURN_START, TURN_END) if token in text]:
            place = self.place_in(turn, number)
            self.add_fault(place, f"text: contains {' and '.join(forged)}, which would forge a turn; take it out")
        return text

    def parse_image(self, part: dict[str, Any], turn: int, number: int) -> Image:
        """Return an image part, completed by the next entry of the record's `images`."""
        listed = self.listed[self.shown] if self.listed is not None and self.shown < len(self.listed) else {}
        if not isinstance(listed, dict):
            self.add_fault(f"{self.place}: images[{self.shown}]", f"expected an object, got {kind(listed)}")
            listed = {}
        self.shown += 1
        names = [part.get("modality"), listed.get("modality")]
        values = [part.get("image_path"), listed.get("path")]
        key = (self.root, *names, *values)
        is_plain = all(value is None or isinstance(value, str) for value in key[1:])
        if is_plain and (known := self.interned.images.get(key)):
            self.paths += [value for value in values if value]
            return known
        place, faults = self.place_in(turn, number), len(self.faults)
        if names == [None, None] and len(self.interned.modalities) == 1:
            names = list(self.interned.modalities)  # no other is possible
        paths = [self.with_slashes(value, place) for value in values]
        path = self.resolve_value("image_path", paths, partial(self.interned.join, self.root), place)
        if path and not self.allow_outside_root and (outside := [p for p in paths if p and self.is_outside(p)]):
            remedy = "expected a path inside it, an absolute one, or data.allow_outside_root: true"
            self.add_fault(place, f"image_path: {outside[0]} leads out of {self.root}; {remedy}")
        modality = self.resolve_value("modality", names, self.interned.resolve, place)
        self.paths += [path for path in paths if isinstance(path, str)]
        image = self.interned.image(path or self.root, modality or "")
        if is_plain and paths == values and len(self.faults) == faults:
            self.interned.images[key] = image
        return image

    def with_slashes(self, path: Any, place: str) -> Any:
        r"""Return a relative path from Windows (`sub-01\anat`) with slashes, any other value unchanged.

        The name of an existing file with a backslash stays. Drives and shares of Windows are a fault.
        """
        if not isinstance(path, str) or not _WINDOWS.search(path) or os.path.lexists(self.root / path):
            return path
        if _DRIVE.match(path):
            remedy = f"expected one of this machine, relative to {self.root} with / between folders, or absolute"
            self.add_fault(place, f"image_path: {path} is a Windows path; {remedy}")
        return path.replace("\\", "/")

    def is_outside(self, path: str) -> bool:
        """Return whether a relative path ends outside the root by its `..`; links are not followed."""
        if ".." not in path:  # the usual case, and much faster
            return False
        root, target = os.path.normpath(self.root), os.path.normpath(self.root / path)
        return not os.path.isabs(path) and not Path(target).is_relative_to(root)

    def resolve_value(self, key: str, values: list[Any], meaning: Callable[[str], T | None], place: str) -> T | None:
        """Return the meaning of the values in an image part and in its entry in `images`.

        Either value may be None. If both are given, their meanings must agree.
        """
        given = [value for value in values if value is not None]
        meanings = [meaning(value) if isinstance(value, str) and value else None for value in given]
        if not given:
            self.add_fault(place, f"{key}: missing here and in `images`; expected {self.expected_value(key)}")
            return None
        if None in meanings:
            value = given[meanings.index(None)]
            if key == "modality" and isinstance(value, str) and value:
                self.add_fault(place, f"{key}: {unknown_modality(value, self.interned.modalities)}")
            else:
                self.add_fault(place, f"{key}: expected {self.expected_value(key)}, got {quoted(value)}")
            return None
        if meanings[0] != meanings[-1]:
            self.add_fault(place, f"{key}: {given[0]} here, {given[1]} in `images`; expected the same")
        return meanings[0]

    def expected_value(self, key: str) -> str:
        return modality_names(self.interned.modalities) if key == "modality" else "a path"

    def images_at_markers(self, parts: list[str | Image], turn: int) -> tuple[str | Image, ...]:
        """Return the parts with the images moved to the `<image>` markers of the text, if it has any."""
        markers = sum([part.count(IMAGE_MARKER) for part in parts if isinstance(part, str)])
        if not markers:
            return tuple(parts)
        images = [part for part in parts if isinstance(part, Image)]
        place = self.place_in(turn)
        if markers != len(images):
            self.add_fault(
                place, f"{markers} {IMAGE_MARKER} markers, {len(images)} images; expected a marker for each, or none"
            )
            return ()
        remaining = iter(images)
        placed: list[str | Image] = []
        for text in (part for part in parts if isinstance(part, str)):
            first, *rest = text.split(IMAGE_MARKER)
            placed.append(first)
            for piece in rest:
                placed += [next(remaining), piece]
        return tuple(placed)
