"""Upload an export to the Hugging Face hub, after checks that it contains a model and nothing else.

Every check is local: an export that is refused has caused no request.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.checksum import KEY
from convert.config_json import UMBRELLA_CONFIG, changed_files, read_checkpoint_json
from convert.export_config import (
    CARD,
    LOCAL_PATH,
    adapter_files,
    code_faults,
    export_files,
    is_replaced,
    link_faults,
)
from convert.foreign import ADAPTER
from convert.lazy_tensor import check_finite
from convert.peft_adapter import open_adapter
from convert.safetensors_files import open_safetensors
from convert.trainable import FILE as TRAINABLE
from umbrella_jax.checkpoints.checkpoint import PARAMS, Checkpoint
from umbrella_jax.console import plural, table_lines, wrapped
from umbrella_jax.errors import CheckpointError, ConfigError, Faults, RunError, why_not_a_directory
from umbrella_jax.io.reading import parse_yaml
from umbrella_jax.models.paths import is_component
from umbrella_jax.rundir import MODEL

_SUBJECT = re.compile(r"(?<![\w-])sub-(?=[A-Za-z]*\d)[A-Za-z0-9]+\b")
"""A subject's label as BIDS writes it, with at least one digit."""
_CONTENTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("*.nii", "*.nii.gz", "*.mgh", "*.mgz", "*.hdr", "*.img", "*.dcm"), "a scan or a map of one"),
    (("*.jsonl",), "conversations or predictions"),
    (("*.html", "*.pdf"), "a page with scans and answers"),
    (("*.png", "*.jpg", "*.jpeg", "*.webp", "*.svg", "*.gif"), "a picture"),
    (("*.tsv", "*.csv", "*.xlsx", "*.xls", "*.parquet"), "a table"),
    (("*.yaml", "*.yml", "*.txt", "*.log"), "settings or notes, with paths of this machine"),
    (("*.npy", "*.npz", "*.pt", "*.pth", "*.bin"), "arrays"),
)
"""Likely contents of a file that is not part of an export: (patterns of its name, contents)."""
_VOCABULARY = ("tokenizer.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model")
"""Files with the pieces of a tokenizer, which may look like paths."""
_MAIN = "main"


@dataclass(frozen=True)
class Upload:
    """An export that passed every check, and where to upload it."""

    directory: Path
    repo: str
    """OWNER/NAME on the hub."""
    branch: str
    is_private: bool
    files: Mapping[str, int]
    """{path below `directory`: size in bytes}."""
    notes: tuple[str, ...]
    """Remarks for the owner, printed before the upload."""

    def lines(self) -> list[str]:
        """Return a table of the files that would be uploaded, and where."""
        rows: list[str | tuple[str, str]] = [
            f"{self.directory} → {self.repo} ({_visibility(self.is_private)}, branch {self.branch})"
        ]
        rows += [(f"  {name}", _size(size)) for name, size in self.files.items()]
        rows.append((f"  {plural(len(self.files), 'file')}", _size(sum(self.files.values()))))
        lines = table_lines(rows, (60, 16))
        return [*lines, *(line for note in self.notes for line in wrapped(note))]


@dataclass(frozen=True)
class Uploaded:
    """Result of `upload`."""

    url: str
    commit: str
    is_new_repo: bool
    is_new_commit: bool
    """False if the branch had the same files already."""
    replaced: tuple[str, ...]
    """Files of the branch that were replaced if their content differed."""
    deleted: tuple[str, ...]
    """Files of earlier exports that were deleted from the branch."""
    remarks: tuple[str, ...]
    """The hub's remarks, such as about fields of the model card."""


def check_upload(
    directory: str | Path,
    repo: str,
    *,
    branch: str | None = None,
    is_private: bool = True,
    allow_untrained: bool = False,
) -> Upload:
    """Check that an export or an adapter may be uploaded: whole, unchanged, trained, and without participants' data.

    Args:
        repo: OWNER/NAME on the hub.
        branch: by default `main`.
        allow_untrained: whether to accept a model without a trained modality.

    Raises:
        ConfigError: `repo` or `branch` is not a valid name.
        CheckpointError: with every file and field that must not be uploaded, and as `Checkpoint.check`.
    """
    directory = Path(directory)
    _check_names(repo, branch)
    is_adapter = (directory / ADAPTER).is_file()
    if not is_adapter:
        _check_is_export(directory)
    files, others = adapter_files(directory) if is_adapter else export_files(directory)
    names = {path: path.relative_to(directory).parts for path in others}
    hidden = {path: parts[0] for path, parts in names.items() if any(part.startswith(".") for part in parts)}
    faults = Faults(f"{path}: {_describe(path)}" for path in others if path not in hidden)
    faults += link_faults(directory, files)
    faults += code_faults(directory)
    with faults:
        faults += changed_files(directory)
    for path in files:
        with faults:
            faults += _private_text(path)
    card = faults.check(partial(_read_card, directory / CARD))
    faults.raise_as(CheckpointError)
    check_model = _check_adapter if is_adapter else _check_weights
    untrained = check_model(directory, allow_untrained=allow_untrained)
    return Upload(
        directory=directory,
        repo=repo,
        branch=branch or _MAIN,
        is_private=is_private,
        files={path.relative_to(directory).as_posix(): path.stat().st_size for path in files},
        notes=(*_hidden_note(hidden.values()), *_notes(untrained, card or {}, is_private=is_private)),
    )


def upload(job: Upload, message: str | None = None) -> Uploaded:
    """Upload the files as one commit. Create the repository and the branch if they do not exist.

    Weights that an interrupted upload has sent are not sent again. Files of earlier exports that this one lacks, such
    as further shards, are deleted in the same commit; all other files of the repository are kept.

    Args:
        message: commit message; by default the name and version of this package.

    Raises:
        ConfigError: no token, or one that may not write; `HF_HUB_OFFLINE` is set; the repository exists and its
            visibility is not `job.is_private`.
        RunError: the hub cannot be reached or refuses a request.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE: the hub cannot be reached with it; unset it to push")
    with _hub_errors(job.repo):
        token = get_token()
    if token is None:
        raise ConfigError("no token of the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token, library_name="umbrella-jax", library_version=version("umbrella-jax"))
    with _hub_errors(job.repo):
        api.whoami()
        try:
            info = api.model_info(job.repo)
            is_new_repo = False
        except RepositoryNotFoundError:
            api.create_repo(job.repo, private=job.is_private)
            info, is_new_repo = api.model_info(job.repo), True
    if bool(info.private) != job.is_private:
        now, wanted = _visibility(bool(info.private)), _visibility(job.is_private)
        remedy = "add --public" if job.is_private else "leave --public out"
        raise ConfigError(
            f"{job.repo}: exists and is {now}, not {wanted}; {remedy}, or change it in the settings of the repository "
            "on the hub"
        )
    with _hub_errors(job.repo):
        try:
            info = api.model_info(job.repo, revision=job.branch)
        except RevisionNotFoundError:
            api.create_branch(job.repo, branch=job.branch)
            info = api.model_info(job.repo, revision=job.branch)
        present = {file.rfilename for file in info.siblings or ()}
        deleted = sorted(name for name in present - job.files.keys() if is_replaced(name))
        operations: list[Any] = [CommitOperationDelete(name) for name in deleted]
        operations += [CommitOperationAdd(name, str(job.directory / name)) for name in job.files]
        with warnings.catch_warnings(record=True) as caught:  # the hub's remarks about the model card
            warnings.simplefilter("always")
            commit = api.create_commit(
                job.repo,
                operations,
                commit_message=message or f"Upload with umbrella-jax {version('umbrella-jax')}",
                revision=job.branch,
                parent_commit=info.sha,
            )
    return Uploaded(
        url=str(commit.commit_url),
        commit=commit.oid,
        is_new_repo=is_new_repo,
        is_new_commit=commit.oid != info.sha,
        replaced=tuple(sorted(present & job.files.keys())),
        deleted=tuple(deleted),
        remarks=tuple(str(warning.message) for warning in caught),
    )


def _visibility(is_private: bool) -> str:
    return "private" if is_private else "public"


def _size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _check_names(repo: str, branch: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    expected = "expected OWNER/NAME on the hub, such as my-lab/sex-t1"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo}: {str(error).splitlines()[0]}; {expected}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"{repo}: names no owner; {expected}")
    if branch is not None and (not re.fullmatch(r"[\w.][\w./-]*", branch) or branch.startswith("refs/")):
        raise ConfigError(f"revision: {branch}: not the name of a branch; expected one such as v2")


def _check_is_export(directory: Path) -> None:
    """Raise CheckpointError for anything but a folder that `convert to-hf` wrote, with the command that makes one."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: {why_not_a_directory(directory)}; expected the OUT of convert to-hf")
    if (directory / TRAINABLE).exists():
        raise CheckpointError(
            f"{directory / TRAINABLE}: only the trained part, which needs its base; export the whole model, without "
            "--trainable-only"
        )
    how = f"export it first:\numbrella-jax convert to-hf {directory} exports/{directory.resolve().name}"
    if (directory / MODEL).is_dir():
        raise CheckpointError(f"{directory}: a run; {how}")
    if (directory / PARAMS).is_dir():
        raise CheckpointError(f"{directory}: a native checkpoint; {how}")
    record = directory / UMBRELLA_CONFIG
    if not record.exists() or KEY not in read_checkpoint_json(record):
        raise CheckpointError(
            f"{directory}: not an export: no {UMBRELLA_CONFIG} with checksums; expected the OUT of convert to-hf"
        )


def _check_weights(directory: Path, *, allow_untrained: bool) -> Mapping[str, str]:
    """Check the numbers of a whole model, and return {part: reason} for its untrained parts."""
    checkpoint = Checkpoint.open(directory)
    if not allow_untrained:
        checkpoint.answering()
    checkpoint.check()
    checkpoint.check_finite()  # reads every number, and compares it with its checksum
    return checkpoint.untrained


def _check_adapter(directory: Path, *, allow_untrained: bool) -> Mapping[str, str]:
    """Check the numbers of an adapter, and return {part: reason} for its untrained parts."""
    adapter = open_adapter(directory)
    if adapter.base_fingerprint is None:
        raise CheckpointError(f"{directory}: not an adapter that `umbrella-jax convert to-hf --adapter` wrote")
    untrained = adapter.untrained
    if not allow_untrained and (any(map(is_component, untrained)) or untrained.keys() >= adapter.modalities.keys()):
        reasons = ", ".join(f"{name} {why}" for name, why in untrained.items())
        raise CheckpointError(f"{directory}: {reasons}; train it, or allow untrained weights (--allow-untrained)")
    check_finite(adapter.tensors.values())
    return untrained


def _describe(path: Path) -> str:
    for patterns, contents in _CONTENTS:
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in patterns):
            return f"not part of an export, and may contain participant data ({contents}); move it out of the folder"
    return "not part of an export; move it out of the folder"


def _private_text(path: Path) -> Iterator[str]:
    """Yield a fault for each path of a machine and each subject's label in a file of an export."""
    if path.suffix == ".safetensors":
        texts = [(f"metadata: {key}", value) for key, value in open_safetensors(path)[1].items()]
    elif any(fnmatchcase(path.name, pattern) for pattern in _VOCABULARY):
        return
    elif path.suffix == ".json":
        texts = list(_strings(read_checkpoint_json(path)))
    else:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        texts = [(f"line {number}", line) for number, line in enumerate(lines, 1)]
    for place, text in texts:
        for pattern, what in ((LOCAL_PATH, "a path of a machine"), (_SUBJECT, "a subject's label")):
            if found := pattern.search(text):
                yield f"{path}: {place}: {found[0]!r} is {what}; remove it, or export again"


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every text of a JSON value, its keys included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            place = f"{key}.{name}" if key else str(name)
            yield place, str(name)
            yield from _strings(inner, place)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _strings(inner, f"{key}[{number}]")
    elif isinstance(value, str):
        yield key, value


def _read_card(path: Path) -> dict[str, Any]:
    """Return the front matter of a model card.

    Raises CheckpointError if there is no card, or none that the hub can read.
    """
    from huggingface_hub import ModelCard

    if not path.is_file():
        raise CheckpointError(f"{path}: no model card; export again")
    text = path.read_text(encoding="utf-8")
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    settings = parse_yaml(front[1], f"{path}: front matter") if front else None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: no front matter between two lines of ---; write it, or export again")
    try:
        return dict(ModelCard(text).data.to_dict())
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: front matter: {reason}; mend it, or export again") from None


def _hidden_note(names: Iterable[str]) -> list[str]:
    listed = ", ".join(sorted(set(names)))
    return [f"hidden, not uploaded: {listed}"] if listed else []


def _notes(untrained: Mapping[str, str], card: Mapping[str, Any], *, is_private: bool) -> Iterator[str]:
    """Yield remarks about a model for its owner."""
    for name, why in untrained.items():
        yield f"{name}: {why}" if is_component(name) else f"{name}: its patch embedding is {why}"
    if not is_private:
        yield "public: everyone can download it; check that the agreements about your data allow that"
        if "license" not in card:
            yield f"{CARD}: no license; add one to its front matter, or nobody knows how the model may be used"


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn the errors of requests to the hub into ours: ConfigError for a token, RunError for everything else."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # the HTTP library differs between versions of huggingface_hub: its general error is a base of the hub's
    failures = (HfHubHTTPError.__bases__[0], OSError, RuntimeError, ValueError)
    try:
        yield
    except failures as error:
        while isinstance(error, RuntimeError) and isinstance(error.__cause__, failures):  # the upload wraps its errors
            error = error.__cause__
        message = getattr(error, "server_message", None) or str(error) or type(error).__name__
        reason = ": ".join(message.splitlines()[:2])
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ConfigError(
                f"{repo}: the hub refuses the token: {reason}; log in with one that may write there (`hf auth login`, "
                "or HF_TOKEN)"
            ) from error
        if status in (409, 412):
            raise RunError(f"{repo}: somebody else has just changed it: {reason}; push again") from error
        raise RunError(
            f"{repo}: not uploaded to {constants.ENDPOINT}: {reason}; push again, and only what is missing is sent"
        ) from error
