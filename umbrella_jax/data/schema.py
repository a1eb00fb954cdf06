"""Convert records of other schemas to the current one, the only one that is parsed.

Current: turns `{role, content}` in `conversations`; `images`, if given, lists `{path, modality}` in the order shown.
Older: `conversation`, `brain_scans`, `modality_paths`, and turns `{from, value}`. LLaVA's: `id`, `image`. TRL's and
OpenAI's: `messages`, `images` as plain paths, and parts `{type: image, image: PATH}` or `{type: image_url}`.
"""

import os.path
import re
from typing import Any

from umbrella_jax.io.reading import JSON_KINDS, kind, quoted

IMAGE_MARKER = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_TURNS = ("conversations", "conversation", "messages")
_IMAGES = ("images", "brain_scans", "modality_paths", "image")
OLD_KEYS = frozenset((*_TURNS[1:], *_IMAGES[1:]))
"""Keys of a record by which its turns and images are those of another schema."""
_READ = (
    "expected turns in one of `conversations`, `conversation` and `messages`, all {role, content} or all {from, "
    "value}, and images in one of `images`, `brain_scans`, `modality_paths` and `image`, or in the turns only"
)
_PATH_KEYS = ("image", "path", "url", "image_url")
"""Keys of other schemas for the path of an image part, which is `image_path` here."""
_URL = re.compile(r"(https?|s3|gs|data):", re.IGNORECASE)


def to_current(record: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Convert a record of any schema to the current one.

    A field that is null counts as absent. Faulty fields are kept as far as possible, so that filters can read them.

    Args:
        record: a JSON object.
        source: its place; the name of the file in it is the task_id of a record with `messages` that has neither
            `task_id` nor `id`.

    Returns:
        The record, and faults of its schema without the name of the record.
    """
    if _is_current(record):
        return record, []
    record = dict(record)
    faults: list[str] = []
    if record.get("task_id") is None:
        number = record.get("id", os.path.basename(source) if "messages" in record else None)
        if type(number) in (int, str):
            record["task_id"] = str(number)
    for names in (_TURNS, _IMAGES):
        if record.keys().isdisjoint(names[1:]):
            continue
        given = [name for name in names if record.get(name) is not None]
        if len(given) > 1:
            faults.append(f"{' and '.join(given)}: given together; {_READ}")
        elif given and given[0] != names[0]:
            value: Any = record.pop(given[0])
            if given[0] == "image":  # one path, or a list
                value = [value] if isinstance(value, str | dict) else value
            expected: type = dict if given[0] == "modality_paths" else list
            if not isinstance(value, expected):
                faults.append(f"{given[0]}: expected {JSON_KINDS[expected]}, got {kind(value)}")
            else:
                record[names[0]] = _list_images(value, faults) if expected is dict else value
    turns, images = record.get("conversations"), record.get("images")
    if isinstance(images, list):
        record["images"] = [{"path": image} if isinstance(image, str) else image for image in images]
    if isinstance(turns, list) and not faults:
        turns = _convert_turns(turns, record.get("images"), faults)
        record["conversations"] = [_with_paths(turn, i, faults) for i, turn in enumerate(turns)]
    return record, faults


def _is_current(record: dict[str, Any]) -> bool:
    """Return whether nothing has to be converted, as in almost all of a million records."""
    turns = record.get("conversations")
    if record.get("task_id") is None or not record.keys().isdisjoint(OLD_KEYS) or not isinstance(turns, list):
        return False
    for turn in turns:
        if not isinstance(turn, dict) or "from" in turn or "value" in turn:
            return False
        content = turn.get("content")
        if isinstance(content, list) and any(map(_lacks_path, content)):
            return False
    images = record.get("images")
    return not (isinstance(images, list) and any(isinstance(image, str) for image in images))


def _with_paths(turn: Any, number: int, faults: list[str]) -> Any:
    """Return the turn with the path of every image part in `image_path`."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list) or not any(map(_lacks_path, content)):
        return turn
    parts: list[Any] = []
    for i, part in enumerate(content):
        if _lacks_path(part):
            path = next((part[key] for key in _PATH_KEYS if part.get(key) is not None), None)
            path = path.get("url", path.get("path")) if isinstance(path, dict) else path
            if isinstance(path, str) and _URL.match(path):
                place = f"conversations[{number}].content[{i}]"
                faults.append(f"{place}: an image by its URL; expected the path of a file")
            if isinstance(path, str):
                path = path.removeprefix("file://")
            part = {**part, "type": "image", "image_path": path}
        parts.append(part)
    return {**turn, "content": parts}


def _lacks_path(part: Any) -> bool:
    """Return whether a part is an image without `image_path`."""
    return isinstance(part, dict) and part.get("type") in ("image", "image_url") and part.get("image_path") is None


def _list_images(paths: Any, faults: list[str]) -> list[dict[str, Any]]:
    """Convert `modality_paths`, {modality: path or list of paths}, to `images` in the same order."""
    if len(paths) > 1 and any(isinstance(value, list) and len(value) > 1 for value in paths.values()):
        faults.append(  # modality by modality or subject by subject?
            f"modality_paths: several paths beside another modality ({', '.join(paths)}), so their order is unknown; "
            "expected one modality or a single path for each; else `images`, in the order in which they are shown"
        )
    each = ((modality, path) for modality, v in paths.items() for path in (v if isinstance(v, list) else [v]))
    return [{"modality": modality, "path": path} for modality, path in each]


def _convert_turns(turns: list[Any], images: Any, faults: list[str]) -> list[Any]:
    """Convert turns {from, value} to {role, content}; leave other turns as they are.

    Images go to the markers in the text. If there is no marker, they go before the text of the user's turn, which must
    be the only one.
    """
    if not any("from" in turn or "value" in turn for turn in turns if isinstance(turn, dict)):
        return turns
    keys = {key for turn in turns if isinstance(turn, dict) for key in turn}
    if mixed := sorted(keys & {"role", "content"}):
        faults.append(f"conversations: {', '.join(mixed)} beside from, value; {_READ}")
        return turns
    converted: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        role, text = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in _ROLES:
            faults.append(f"conversations[{i}]: from: expected one of {', '.join(_ROLES)}, got {quoted(role)}")
        elif not isinstance(text, str):
            faults.append(f"conversations[{i}]: value: expected a string, got {kind(text)}")
        else:
            converted.append({"role": _ROLES[role], "content": text})
    asked = [turn for turn in converted if turn["role"] == "user"]
    if (
        faults
        or not isinstance(images, list)
        or not images
        or any(IMAGE_MARKER in turn["content"] for turn in converted)
    ):
        return converted
    if len(asked) == 1:
        asked[0]["content"] = [{"type": "image"}] * len(images) + [{"type": "text", "text": asked[0]["content"]}]
    else:
        faults.append(
            f"{len(images)} images, {len(asked)} human turns, no {IMAGE_MARKER} marker, so their turns are unknown; "
            f"expected one human turn, or a marker in its `value` for each image"
        )
    return converted
