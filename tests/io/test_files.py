"""Atomic writes of files and directories, and paths that cannot be written."""

import errno
import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import (
    check_output,
    check_run_name,
    disk_full_errno,
    locked,
    new_folder,
    rewrite_folder,
    write_whole,
)
from umbrella_jax.training.checkpoint import param_shapes, restore_params, save_params


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    """It may replace an empty one and leftovers of a killed process. Nothing else is touched."""
    out, part = tmp_path / "out", tmp_path / ".out.part"
    part.mkdir()
    (part / "left").touch()
    (part / ".lock").touch()
    (tmp_path / ".other.part").mkdir()
    out.mkdir()

    def fail(folder: Path) -> None:
        assert names(folder) == [".lock"]
        (folder / "half").touch()
        raise RuntimeError("in the midst")

    with pytest.raises(RuntimeError, match="in the midst"), new_folder(out) as folder:
        fail(folder)
    assert names(tmp_path) == [".other.part", "out"]
    assert names(out) == []
    with new_folder(out, 0o700) as folder:
        (folder / "file").write_text("whole")
        with pytest.raises(ConfigError, match=r"out: process \d+ on .* is writing to it; wait"), new_folder(out):
            pass
    assert names(out) == ["file"]
    assert out.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="out: "), new_folder(out):
        pass
    with pytest.raises(OSError, match="new/file"), new_folder(tmp_path / "new") as folder:
        raise OSError(errno.ENOSPC, "full", str(folder / "file"))
    with locked(tmp_path):
        pass


def test_a_folder_is_rewritten_only_if_it_differs(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def write(text: str) -> None:
        rewrite_folder(folder, lambda part: write_whole(part / "config.json", text))

    write("one")
    first = folder.stat().st_ino
    write("one")
    assert folder.stat().st_ino == first
    (tmp_path / ".model.part").mkdir()  # left by a killed process
    (folder / "config.json").write_text("o")
    write("one")
    assert (folder / "config.json").read_text() == "one"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("path", "folder", "cause"),
    [
        ("file", True, "file: a file, not a directory; choose another"),
        ("file/run", True, "file/run: {}/file is a file, not a directory; choose another"),
        ("folder", False, "folder: a directory, not a file; choose another"),
        ("/dev/null", False, "/dev/null: a device or a pipe, not a regular file; choose another"),
        ("link/run", True, "link/run: {}/link is a broken link; choose another"),
        ("n" * 250, True, "name too long, expected at most 240 bytes"),
        ("/proc/run", True, "/proc/run: /proc cannot be written to: it takes no new files; choose another"),
        ("/sys/page.html", False, "/sys cannot be written to: "),
    ],
)
def test_a_path_that_cannot_be_written(tmp_path: Path, path: str, folder: bool, cause: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = names(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_output(tmp_path / path, "choose another", folder=folder)
    assert cause.format(tmp_path) in str(error.value)
    check_output(tmp_path / "folder" / "new" / "one", "choose another", folder=folder)
    assert names(tmp_path) == before
    assert names(tmp_path / "folder") == []


@pytest.mark.parametrize("name", ["[1,2]", "*", "?", "a b", "#%41", "{x}", "~", "ü", "new\nline", "'\"", "n" * 240])
def test_checkpoints_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    """Orbax finds its files with glob. A sibling that matches the name as a pattern must not be read instead."""
    place = tmp_path / name
    check_run_name(place, "choose another")
    for folder, value in ((tmp_path / "1", 2.0), (place, 1.0)):
        save_params(folder / "params", {"a": jnp.full(3, value)})
    params = restore_params(place / "params", param_shapes(place / "params"))
    assert params["a"].tolist() == [1.0] * 3


@pytest.mark.parametrize("name", ["a\\b", "gs:", os.fsdecode(b"\xff")])
def test_names_that_checkpoints_cannot_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="choose another"):
        check_run_name(tmp_path / name / "run", "choose another")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (ValueError("RESOURCE_EXHAUSTED: Error writing [OS error 122: EDQUOT Disk quota exceeded]"), errno.EDQUOT),
        (OSError(errno.EACCES, "x"), None),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), None),
    ],
)
def test_a_full_disk_is_distinguished_from_a_full_device(error: Exception, number: int | None) -> None:
    assert disk_full_errno(error) == number
