"""Models on the Hugging Face hub: their names, and local copies of them."""

from pathlib import Path

from umbrella_jax.errors import CheckpointError, why_not_a_directory


def parse_hub_name(model: str) -> tuple[str, str | None] | None:
    """Return (OWNER/NAME, revision) of the hub's `OWNER/NAME` or `OWNER/NAME@REVISION`; None for any other text.

    The revision is a branch, a tag or a commit; None without one.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, _, revision = model.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return (name, revision or None) if name.count("/") == 1 else None


def fetch(model: str | Path, *, weights: bool = True) -> Path:
    """Return `model` if it is a local directory, else download the model of that name from the Hugging Face hub.

    Downloads are cached by huggingface_hub. Without `weights`, only the small files are downloaded.

    Args:
        model: directory, or a name as in `parse_hub_name`.

    Raises CheckpointError if there is no such directory and the hub has no such model.
    """
    if Path(model).is_dir():
        return Path(model)
    parsed = parse_hub_name(str(model))
    expected = "expected a directory in Hugging Face format, a native checkpoint or a run"
    if parsed is None:
        raise CheckpointError(f"{model}: {why_not_a_directory(model)}; {expected}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, revision = parsed
    try:
        patterns = ["*.json", "*.jinja", "*.txt", "README.md", *["*.safetensors"] * weights]
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if weights and not any(directory.glob("*.safetensors")):  # an older model, in PyTorch's own format
            patterns.append("pytorch_model*.bin")
            directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        return directory
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).removeprefix("Got: ")
        raise CheckpointError(
            f"{model}: no such directory, and the hub does not give it: {reason}; {expected}, or OWNER/NAME on the hub"
        ) from None
