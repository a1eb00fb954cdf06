"""What a check established is known at the next start, by every process, until the file changes."""

import gzip
import json
import os
import time
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data import cache as cache_module
from umbrella_jax.data import checked, shares
from umbrella_jax.data.cache import Sources
from umbrella_jax.data.checked import CheckedFiles
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.threads import AHEAD, map_in_threads
from umbrella_jax.data.volume import load_volume
from umbrella_jax.errors import DataError

T1 = ModalityConfig(size=(6, 7, 5), patch=(3, 2, 4))
RUN = ModalityConfig(size=(4, 3, 5, 4), patch=(2, 3, 4, 2))
MODALITIES = {"T1": T1, "rsfMRI": RUN}


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Treat new files as settled, so that their checks are remembered."""
    monkeypatch.setattr(checked, "SETTLED", -1.0)


@pytest.fixture
def images(nifti):
    """A volume whose header contradicts itself, a demeaned run, and a run with NaN."""
    odd = nifti("odd.nii.gz", (6, 7, 5))
    scan = nib.load(odd)
    scan.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj), None, scan.header), odd)
    run = np.random.default_rng(0).normal(0, 1, (4, 3, 5, 9)).astype(np.float32)
    run[0] = 0
    bad = run.copy()
    bad[1, 1, 1, 7] = np.nan
    paths = [nifti("demeaned.nii", run), nifti("bad.nii.gz", bad)]
    return [Image(odd, "T1"), *(Image(path, "rsfMRI") for path in paths)]


def check(images: list[Image], directory: Path) -> tuple[Sources, dict[Image, int], tuple[str, ...]]:
    """Check images as a new process does; return the sources, the windows of the good images, and the faults."""
    sources, faults = Sources(CheckedFiles(directory)), ()
    try:
        sources.check_all(images, MODALITIES, 2)
    except DataError as error:
        faults = error.faults
    return sources, {i: n for i in images if (n := sources._checked.get((i.path, MODALITIES[i.modality])))}, faults


def test_a_warm_start_gives_the_same_messages_and_reads_only_faulty_files(images, tmp_path, monkeypatch):
    cold, windows, faults = check(images, tmp_path)
    assert cold.num_checked == 2
    assert windows == {images[0]: 1, images[1]: 2}
    assert cold.remarks()
    assert cold.background_remarks(MODALITIES)
    opened = []
    original = cache_module.open_volume
    monkeypatch.setattr(cache_module, "open_volume", lambda path, *more: opened.append(path) or original(path, *more))
    warm, *again = check(images, tmp_path)
    assert again == [windows, faults]
    assert [path.name for path in opened] == ["bad.nii.gz"]
    assert warm.remarks() == cold.remarks()
    assert warm.background_remarks(MODALITIES) == cold.background_remarks(MODALITIES)
    for image in images[:2]:
        config = MODALITIES[image.modality]
        assert warm.digest(image.path, config) == cold.digest(image.path, config)
        assert warm.axes(image.path, config) == cold.axes(image.path, config)
        np.testing.assert_array_equal(warm.load(image.path, config), cold.load(image.path, config))


@pytest.mark.parametrize("change", ["content", "time", "link", "modality", "version"])
def test_a_change_is_read_again(nifti, tmp_path, monkeypatch, change):
    image = Image(nifti("a.nii", (6, 7, 5)), "T1")
    if change == "link":  # to a file of the same size and times
        stat, same = Path.stat, image.path.stat()
        monkeypatch.setattr(Path, "stat", lambda path, **more: same if path == image.path else stat(path, **more))
        target = image.path.rename(tmp_path / "b.nii")
        image.path.symlink_to(target)
    check([image], tmp_path)
    assert check([image], tmp_path)[0].num_checked == 0
    modalities = MODALITIES
    if change == "content":
        before = image.path.stat()
        nifti("a.nii", np.ones((6, 7, 5), np.float32))
        os.utime(image.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # only `ctime` differs
    elif change == "time":
        os.utime(image.path, (1, 1))
    elif change == "link":
        image.path.unlink()
        image.path.symlink_to(target.rename(tmp_path / "c.nii"))
    elif change == "modality":
        modalities = {"T1": ModalityConfig(size=T1.size, patch=T1.patch, scaling="minmax")}
    else:
        monkeypatch.setattr(cache_module, "PREPROCESSING_VERSION", 1000)
    sources = Sources(CheckedFiles(tmp_path))
    sources.check_all([image], modalities, 1)
    assert sources.num_checked == 1


def test_a_file_that_just_changed_is_not_remembered(nifti, tmp_path, monkeypatch):
    """A further change within a tick of the clock would be invisible."""
    monkeypatch.setattr(checked, "SETTLED", 60.0)
    image = Image(nifti("a.nii", (6, 7, 5)), "T1")
    assert [check([image], tmp_path)[0].num_checked for _ in range(2)] == [1, 1]


def names(directory: Path) -> list[str]:
    index = CheckedFiles(directory)
    index.read()
    return sorted(path for path, _ in index._entries)


def test_processes_write_files_of_their_own_which_are_merged(tmp_path, monkeypatch):
    """Neither a killed process, whose file is cut off, nor one that merges at the same time loses an entry."""
    for i in range(checked._MANY):
        own = CheckedFiles(tmp_path, private=True)
        own.add(f"/{i}", "c", "s", {"sha256": f"{i}"})
        own.write(final=True)
    folder = tmp_path / "checked"
    assert len(list(folder.iterdir())) == checked._MANY
    assert (folder.stat().st_mode & 0o777, next(folder.iterdir()).stat().st_mode & 0o777) == (0o700, 0o600)
    left = folder / "0-killed.part"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    last = CheckedFiles(tmp_path)
    for i in (5, 99):
        last.add(f"/{i}", "c", "s", {"sha256": "new"})
        last.write()
    reader = CheckedFiles(tmp_path)
    parsed = checked._parsed

    def merge_first(file):  # another process merges after this one has listed the files
        monkeypatch.setattr(checked, "_parsed", parsed)
        last.write(final=True)
        return parsed(file)

    monkeypatch.setattr(checked, "_parsed", merge_first)
    reader.read()
    assert len(list(folder.iterdir())) == 1
    assert sorted(reader._entries) == sorted((f"/{i}", "c") for i in [*range(checked._MANY), 99])
    assert reader.find("/5", "c", "s")["sha256"] == "new"
    assert reader.find("/5", "c", "other") is None


def test_a_damaged_index_is_removed_and_the_rest_is_used(tmp_path, caplog):
    lines = (b"no json", b'{"path": "/a"}', b'{"path": [], "check": ""}', b"[" * 100_000)
    for content in (b"no gzip", *map(gzip.compress, lines)):
        index = CheckedFiles(tmp_path)
        index.add("/good", "c", "s", {})
        index.write(final=True)
        damaged = index.directory / "1.jsonl.gz"
        damaged.write_bytes(content)
        caplog.clear()
        assert names(tmp_path) == ["/good"]
        assert f"{damaged}: damaged" in caplog.text
        assert not damaged.exists()


def test_a_file_read_from_memory_is_named_in_its_faults(nifti, tmp_path):
    path = nifti("a.nii.gz", (6, 7, 5))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-4]))
    with pytest.raises(DataError) as expected:
        load_volume(path, T1)
    assert check([Image(path, "T1")], tmp_path)[2] == expected.value.faults


def test_what_another_program_wrote_is_checked_again(nifti, tmp_path):
    image = Image(nifti("a.nii", (6, 7, 5)), "T1")
    check([image], tmp_path)
    (file,) = (tmp_path / "checked").iterdir()
    for field, value in (("windows", "1"), ("windows", -1), ("sha256", None), ("backgrounds", "ab")):
        fields = json.loads(gzip.decompress(file.read_bytes())) | {field: value}
        index = CheckedFiles(tmp_path / field)
        index.add(fields.pop("path"), fields.pop("check"), fields.pop("stat"), fields)
        index.write()
        assert check([image], tmp_path / field)[0].num_checked == 1


def test_files_of_another_user_that_cannot_be_removed_do_not_multiply(tmp_path, monkeypatch, caplog):
    unlink = Path.unlink
    foreign = set[str]()

    def refuse(path: Path, *options: object, **more: bool) -> None:
        if path.name in foreign:
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, *options, **more)

    monkeypatch.setattr(Path, "unlink", refuse)
    for start in range(checked._MANY + 3):
        own = CheckedFiles(tmp_path)
        own.add(f"/{start}", "c", "s", {})
        own.write(final=True)
        if start < checked._MANY:
            foreign |= {file.name for file in own.directory.iterdir()}
    assert len(list(own.directory.iterdir())) == checked._MANY + 1
    assert len(names(tmp_path)) == checked._MANY + 3
    assert not caplog.records


def test_the_index_of_a_user_is_in_an_absolute_folder_or_at_home(monkeypatch):
    for cache, folder in (("/c", "/c"), ("c", "/h/.cache"), ("", "/h/.cache")):
        monkeypatch.setenv("HOME", "/h")
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert CheckedFiles.of_user().directory == Path(folder, "umbrella-jax", "checked")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError))
    assert CheckedFiles.of_user() is None


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "checked").write_text("a file")
    index = CheckedFiles(tmp_path)
    for i in range(2):
        index.add(f"/{i}", "c", "s", {})
        index.write()
    (record,) = caplog.records
    assert "cannot remember which volumes were checked" in record.getMessage()


def test_few_calls_are_under_way_at_a_time():
    taken = 0

    def take(i: int) -> int:
        nonlocal taken
        taken = i
        return i

    results = map_in_threads(lambda i: 2 * i, map(take, range(1, 1001)), 2)
    for i, result in enumerate(results, start=1):
        assert result == 2 * i
        assert taken <= i + 2 * AHEAD
    assert taken == 1000
    started = []
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda i: started.append(i) or 1 / (i - 3), range(1000), 2))
    assert len(started) <= 2 * AHEAD + 3


def test_threads_that_take_several_items_at_a_time_return_them_in_order():
    assert list(map_in_threads(str, range(10), 2, chunk=4)) == [str(i) for i in range(10)]


@pytest.mark.parametrize("copies", [False, True])
def test_each_file_is_checked_by_one_process_unless_hosts_have_copies(monkeypatch, copies):
    """Process 1 of three; of ten files, process 0 knows the first two, process 1 the second and third."""
    known = np.zeros((3, 10), bool)
    known[0, :2] = known[1, 1:3] = True
    said = []

    def divide(index: int, answers):
        monkeypatch.setattr(shares, "is_single_process", lambda: False)
        monkeypatch.setattr(shares, "process_index", lambda: index)
        monkeypatch.setattr(shares, "gather", lambda value: said.append(value) or answers)
        files = [f"{i} {index if copies and i == 7 else ''}" for i in range(10)]
        return shares.divide(files, known[index].tolist())

    for index in range(3):
        divide(index, [["", ""]])
    parts = [divide(index, said[:3]) for index in range(3)]
    checks = [i for part in parts for i in part.checks]
    if copies:
        assert [part.checks for part in parts] == [np.flatnonzero(~own).tolist() for own in known]
        assert not any(part.sends for part in parts)
    else:
        assert sorted(checks) == list(range(3, 10))
        assert sorted(i for part in parts for i in part.sends) == list(range(10))
        assert max(len(part.checks) for part in parts) == 3
