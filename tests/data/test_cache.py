"""The cache: the same batches without opening a source, despite crashes, full disks, changed sources and damage."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from umbrella_jax.cli import main
from umbrella_jax.config.schema import DataConfig, ModalityConfig
from umbrella_jax.data import cache as cache_module
from umbrella_jax.data import checked as checked_module
from umbrella_jax.data import volume as volume_module
from umbrella_jax.data import voxels as voxels_module
from umbrella_jax.data.cache import Sources, VolumeCache
from umbrella_jax.data.checked import CheckedFiles
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import Dataset, eval_batches, make_epoch_plan, train_batches
from umbrella_jax.data.volume import PREPROCESSING_VERSION, check_volumes, load_volume
from umbrella_jax.errors import ConfigError, DataError

T1 = ModalityConfig(size=(6, 7, 5), patch=(3, 2, 4))
RUN = ModalityConfig(size=(4, 3, 5, 4), patch=(2, 3, 4, 2))


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Treat new files as settled, so that their digests are recorded."""
    monkeypatch.setattr(checked_module, "SETTLED", -1.0)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def sealed(monkeypatch):
    """Return `sealed()`: after the call, opening or hashing a source fails."""

    def seal():
        def refuse(*_):
            raise AssertionError("a source was opened")

        for module, name in [(volume_module, "open_voxels"), (cache_module, "source_digest"), (voxels_module, "_kind")]:
            monkeypatch.setattr(module, name, refuse)

    return seal


def entries(directory: Path) -> list[Path]:
    return sorted((directory / "volumes").rglob("*.*"))


def index_files(directory: Path) -> list[Path]:
    return sorted((directory / "checked").glob("*"))


def made(directory, path, config, **options) -> int:
    """Return how many volumes a new cache over the directory has to make."""
    cache = VolumeCache(directory, **options)
    cache.check(path, config)
    return cache.num_made


# The same numbers, without the sources


@pytest.fixture
def load_dataset(nifti, record, write_json, tokenizer, modalities):
    """Return `load_dataset(cache)`: four conversations over three volumes and a run of five windows."""
    nifti("run.nii.gz", (5, 3, 4, 20), np.diag([-2, 2, 3, 1]))
    for i in range(3):
        nifti(f"{i}.nii", (9, 8, 7))
    shown = [["T1:0.nii"], ["T1:1.nii", "T1:0.nii"], ["fMRI:run.nii.gz"], ["fMRI:run.nii.gz", "T1:2.nii"]]
    path = write_json("data.json", [record([("user", images), ("assistant", ["x"])]) for images in shown])
    return lambda cache, **more: Dataset.load(
        path, tokenizer, modalities, max_length=200, threads=2, sources=cache, **more
    )


def volumes_of(dataset):
    """Return all volumes of training and evaluation batches, in their order."""
    plan = make_epoch_plan(dataset, batch_size=2, accumulate_steps=2, seed=5)
    training = train_batches(dataset, plan, start_step=0, num_steps=6, threads=2)
    batches = [*training, *(b for _, b in eval_batches(dataset, 3, prompts=True))]
    return [(name, volume) for batch in batches for name, volume in sorted(batch.volumes.items())]


def test_batches_are_bit_identical_and_no_source_is_opened(load_dataset, directory, sealed):
    expected = volumes_of(load_dataset(None, evaluation=True))
    filling = load_dataset(VolumeCache(directory), evaluation=True)
    windows = dict(filling.windows)
    assert sorted(windows.values()) == [1, 1, 1, 5]
    assert len(entries(directory)) == 8
    sealed()
    full = load_dataset(VolumeCache(directory), evaluation=True)
    assert dict(full.windows) == windows
    for dataset in (filling, full):
        for (name, cached), (other, volume) in zip(volumes_of(dataset), expected, strict=True):
            assert name == other
            assert cached.dtype == np.float32
            assert cached.tobytes() == volume.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_loaded_volume_has_the_numbers_of_its_type(nifti, directory, dtype):
    path = nifti("a.nii", np.geomspace(1e-7, 6e4, 210).reshape(T1.size).astype(np.float32))
    config = ModalityConfig(size=T1.size, patch=(1, 1, 1), scaling="none")
    expected = load_volume(path, config).astype(dtype).astype(np.float32)
    assert (expected < 6e-5).any()  # subnormal in float16
    cache = VolumeCache(directory, dtype)
    for _ in range(2):  # make the entry, then read it
        volume = cache.load(path, config)
        assert volume.dtype == np.float32
        assert volume.flags.c_contiguous
        assert volume.flags.writeable
        np.testing.assert_array_equal(volume, expected)
    assert cache.num_made == 1
    (entry,) = entries(directory)
    assert load_file(entry)["volume"].dtype == dtype
    np.testing.assert_array_equal(load_file(entry)["volume"], expected)


def test_every_finite_float16_is_widened_exactly():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found = cache_module._widen(finite)
    assert found.dtype == np.float32
    assert found.tobytes() == finite.astype(np.float32).tobytes()  # the sign of 0 too
    relative = np.abs(np.float32(1.0004) - np.float16(1.0004)) / 1.0004
    assert relative <= 2**-11


@pytest.mark.parametrize("value", [65505.0, -65505.0])
def test_values_beyond_float16_are_rejected(nifti, directory, value):
    data = np.ones(T1.size, np.float32)
    data[1, 2, 3] = value
    path, config = nifti("a.nii", data), ModalityConfig(size=T1.size, patch=(1, 1, 1), scaling="none")
    for call in (VolumeCache(directory, "float16").check, VolumeCache(directory, "float16").load):
        with pytest.raises(
            DataError, match=r"a\.nii: values up to 65505, float16 ends at 65504; expected data.cache_dtype: float32"
        ):
            call(path, config)
    assert entries(directory) == []
    VolumeCache(directory, "float32").check(path, config)


def test_new_numbers_need_a_new_version(nifti):
    """If this fails, preprocessing gives new numbers: increase PREPROCESSING_VERSION, so that no run reads old cache
    entries, and put the new numbers here."""
    expected = {
        1: (
            [1.1541852, -0.6955972, -1.7535143, -0.376967, -0.9412419, 0.6511261, -0.4067903, 1.4108162, 1.4955751],
            [-1.7171421, -1.6280195, -1.7171421, 0.3361076, 0.8057156, -0.3220292, -0.6888034, -1.7171421, -1.3469402],
        )
    }[PREPROCESSING_VERSION]
    data = (np.arange(5 * 6 * 7 * 9).reshape(5, 6, 7, 9) * 7919 % 1009).astype(np.float32)
    affine = np.array([[0, -2, 0, 0], [1.5, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])
    three = load_volume(nifti("3.nii", data[..., 0], affine), ModalityConfig(size=(4, 3, 5), patch=(1, 1, 1)))
    four = load_volume(nifti("4.nii", data, affine), ModalityConfig(size=(4, 7, 5, 4), patch=(1, 1, 1, 1)), 1)
    np.testing.assert_allclose(three.ravel()[::7], expected[0], atol=5e-6)  # the order of summation changes 1e-6
    np.testing.assert_allclose(four.ravel()[:549:61], expected[1], atol=5e-6)


# Reasons for another entry


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (T1, {"size": (6, 7, 4)}),
        (T1, {"orientation": "as_stored"}),
        (T1, {"scaling": "minmax"}),
        (RUN, {"stride_within_seq": 2}),
        (RUN, {"stride_between_seq": 0.5}),
    ],
)
def test_a_parameter_makes_another_entry(nifti, directory, config, change):
    path = nifti("a.nii", (6, 7, 5, 9)[: len(config.size)])
    fields = {name: getattr(config, name) for name in ("size", "patch", "orientation", "stride_within_seq")}
    assert made(directory, path, config) == load_windows(path, config)
    assert made(directory, path, config) == 0
    other = ModalityConfig(**{**fields, **change})
    assert made(directory, path, other) == load_windows(path, other)
    np.testing.assert_array_equal(VolumeCache(directory).load(path, other), load_volume(path, other))


def load_windows(path, config):
    return check_volumes([Image(path, "M")], {"M": config}, 1)[Image(path, "M")]


def test_type_and_version_make_another_entry_but_the_patch_does_not(nifti, directory, monkeypatch):
    path = nifti("a.nii", (6, 7, 5))
    assert made(directory, path, T1) == 1
    assert made(directory, path, ModalityConfig(size=T1.size, patch=(1, 1, 1))) == 0
    assert made(directory, path, T1, dtype="float16") == 1
    monkeypatch.setattr(cache_module, "PREPROCESSING_VERSION", PREPROCESSING_VERSION + 1)
    assert made(directory, path, T1) == 1


def test_a_changed_source_is_noticed(nifti, directory):
    path = nifti("a.nii", np.ones(T1.size, np.float32))
    assert made(directory, path, T1) == 1
    before = path.stat()
    data = np.random.default_rng(0).uniform(1, 9, T1.size).astype(np.float32)
    content = path.read_bytes()
    nifti("a.nii", data)
    assert len(content) == path.stat().st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` and rsync do
    cache = VolumeCache(directory)
    assert cache.check(path, T1) == cache.num_made == 1
    np.testing.assert_array_equal(cache.load(path, T1), load_volume(path, T1))
    path.write_bytes(content)
    assert made(directory, path, T1) == 0  # back again: its entry is still there


def test_two_modalities_of_a_run_depend_on_their_own_sidecars(nifti, directory, tmp_path):
    """The second one does not read the sidecar."""
    run = nifti("run_bold.nii", (4, 3, 5, 20))
    sidecar, resampled, plain = tmp_path / "run_bold.json", replace(RUN, tr=1.0), RUN
    images = [Image(run, "resampled"), Image(run, "plain")]
    for seconds in (2.0, 1.0):
        sidecar.write_text(json.dumps({"RepetitionTime": seconds}))
        cache = VolumeCache(directory)
        cache.check_all(images, {"resampled": resampled, "plain": plain}, 1)
        assert [file for file, _ in cache.companions(run, resampled)] == [sidecar]
        np.testing.assert_array_equal(cache.load(run, resampled), load_volume(run, resampled))


def test_a_change_without_a_trace_is_noticed_by_verify(nifti, directory, monkeypatch):
    monkeypatch.setattr(cache_module, "_stat", lambda path: (np.zeros(1, np.int64), "same", 0.0))
    path = nifti("a.nii", (6, 7, 5))
    VolumeCache(directory).check(path, T1)
    other = nifti("b.nii", (6, 7, 5))
    VolumeCache(directory).check(other, T1)  # whose entry is there
    other.replace(path)
    cache = VolumeCache(directory, verify=True)
    cache.check(path, T1)
    np.testing.assert_array_equal(cache.load(path, T1), load_volume(path, T1))


def test_equal_content_is_kept_once(nifti, directory, tmp_path):
    path = nifti("a.nii", (6, 7, 5))
    assert made(directory, path, T1) == 1
    shutil.copy(path, tmp_path / "b.nii")
    assert made(directory, tmp_path / "b.nii", T1) == 0
    path.touch()
    assert made(directory, path, T1) == 0
    assert len(entries(directory)) == 1


@pytest.mark.parametrize("change", [0, 1])
def test_a_change_of_either_half_of_a_pair_is_noticed(directory, tmp_path, change):
    data = np.random.default_rng(0).uniform(1, 9, T1.size).astype(np.float32)
    for affine in (np.eye(4), np.diag([-1.0, 1, 1, 1])):
        nib.save(nib.Nifti1Pair(data * affine[0, 0] * 2, affine), tmp_path / f"{affine[0, 0]:.0f}.hdr")
    for suffix in (".hdr", ".img"):
        shutil.copy(tmp_path / f"1{suffix}", tmp_path / f"a{suffix}")
    path = tmp_path / "a.hdr"
    assert made(directory, path, T1) == 1
    suffix = (".hdr", ".img")[change]
    shutil.copy(tmp_path / f"-1{suffix}", tmp_path / f"a{suffix}")
    cache = VolumeCache(directory)
    assert cache.check(path, T1) == cache.num_made == 1
    np.testing.assert_array_equal(cache.load(path, T1), load_volume(path, T1))
    assert made(directory, tmp_path / "a.img", T1) == 0  # the same pair


def test_a_changed_frame_is_noticed(directory, tmp_path):
    config = ModalityConfig(size=RUN.size, patch=RUN.patch, orientation="as_stored")
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        np.save(folder / f"frame_{i}.npy", rng.uniform(1, 9, (4, 3, 5)).astype(np.float32))
    assert made(directory, folder, config) == 2
    assert made(directory, folder, config) == 0
    one, two = folder / "frame_1.npy", folder / "frame_2.npy"
    shutil.move(one, tmp_path / "one.npy")
    shutil.move(two, one)
    shutil.move(tmp_path / "one.npy", two)  # the same frames in another order
    cache = VolumeCache(directory)
    cache.check(folder, config)
    assert cache.num_made == 2
    np.testing.assert_array_equal(cache.load(folder, config, 0), load_volume(folder, config, 0))


def test_only_the_check_of_a_settled_file_is_remembered(nifti, directory, monkeypatch, caplog):
    hashed = []
    original = cache_module.source_digest
    monkeypatch.setattr(cache_module, "source_digest", lambda path, *_: hashed.append(path) or original(path, *_))
    path = nifti("a.nii", (6, 7, 5))
    monkeypatch.setattr(checked_module, "SETTLED", 60.0)
    assert [made(directory, path, T1) for _ in range(2)] == [1, 0]
    assert len(hashed) == 2  # a further change within a tick of the clock would be invisible
    monkeypatch.setattr(checked_module, "SETTLED", -1.0)
    assert [made(directory, path, T1) for _ in range(3)] == [0, 0, 0]
    assert len(hashed) == 3
    (index,) = index_files(directory)
    index.write_bytes(index.read_bytes()[:-9])
    assert made(directory, path, T1) == 0
    assert len(hashed) == 4
    assert f"{index}: damaged" in caplog.text
    assert index not in index_files(directory)


@pytest.mark.parametrize("call", ["check", "load"])
def test_a_source_that_changes_while_it_is_read_is_not_kept(nifti, directory, monkeypatch, call):
    path = nifti("a.nii", (6, 7, 5))
    original = cache_module.preprocess

    def slow(*arguments, **options):
        nifti("a.nii", np.ones(T1.size, np.float32))
        return original(*arguments, **options)

    monkeypatch.setattr(cache_module, "preprocess", slow)
    with pytest.raises(DataError, match=r"a\.nii: changed since the run began"):
        getattr(VolumeCache(directory), call)(path, T1)
    assert entries(directory) == []


def test_a_source_that_was_only_touched_counts_as_unchanged(nifti, directory):
    """A copy over the file itself, or a change of its owner, has the same effect."""
    path = nifti("a.nii", (6, 7, 5))
    cache = VolumeCache(directory)
    cache.check(path, T1)
    for entry in entries(directory):
        entry.unlink()
    os.utime(path, (1, 1))
    np.testing.assert_array_equal(cache.load(path, T1), load_volume(path, T1))
    assert len(entries(directory)) == 1


def test_after_the_check_a_source_is_not_needed(nifti, directory):
    path = nifti("a.nii", (6, 7, 5))
    cache = VolumeCache(directory)
    cache.check(path, T1)
    expected = load_volume(path, T1)
    path.unlink()
    np.testing.assert_array_equal(cache.load(path, T1), expected)
    with pytest.raises(DataError, match="not found"):
        cache.check(path, T1)


def test_a_source_is_checked_to_its_end_once(nifti, directory, monkeypatch):
    """If the index is lost, a source is checked again even if it has all its entries."""
    path = nifti("a.nii.gz", (6, 7, 5))
    checks = []
    original = voxels_module._Nibabel.check_end
    monkeypatch.setattr(voxels_module._Nibabel, "check_end", lambda image: checks.append(image) or original(image))
    for _ in range(3):
        VolumeCache(directory).check(path, T1)
    assert len(checks) == 1
    for index in index_files(directory):
        index.unlink()
    VolumeCache(directory).check(path, T1)
    assert len(checks) == 2


def test_a_damaged_source_is_not_recorded(nifti, directory):
    path = nifti("a.nii.gz", (4, 3, 5, 7))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError, match="CRC check failed"):
            VolumeCache(directory).check(path, RUN)
    assert index_files(directory) == []


def test_contradictions_of_headers_are_recorded(nifti, directory, sealed):
    """All files with the same contradiction share a line."""
    paths = [nifti(f"{name}.nii", (6, 7, 5)) for name in "cab"]
    for path in paths[:2]:
        scan = nib.load(path)
        scan.set_qform(np.diag([-1, 1, 1, 1]), 1)
        nib.save(nib.Nifti1Image(np.asarray(scan.dataobj), None, scan.header), path)
    line = f"{paths[1]} and 1 more file: its qform (code 1) says LAS, its sform (code 2) says RAS: they disagree about "
    for sources in (Sources(), VolumeCache(directory), VolumeCache(directory)):
        for path in paths:
            sources.check(path, T1)
        (remark,) = sources.remarks()
        assert remark == f"{line}left and right; the sform is used"
        if index_files(directory):  # the next cache must use only the index
            sealed()


# Without a cache


@pytest.mark.parametrize("change", ["content", "deleted", "while read"])
def test_a_file_that_changes_after_the_check_is_rejected(nifti, monkeypatch, change):
    path, sources = nifti("a.nii.gz", (6, 7, 5)), Sources()
    assert sources.check(path, T1) == 1
    expected = load_volume(path, T1)
    os.utime(path, (1, 1))  # the same content
    np.testing.assert_array_equal(sources.load(path, T1), expected)
    other = nifti("b.nii.gz", (6, 7, 5))
    if change == "content":
        shutil.copy(other, path)
    elif change == "deleted":
        path.unlink()
    else:
        original = cache_module.preprocess
        monkeypatch.setattr(cache_module, "preprocess", lambda *a: (original(*a), shutil.copy(other, path))[0])
    with pytest.raises(
        DataError, match=r"a\.nii\.gz: (changed since the run began; leave volumes as they are|not found)"
    ):
        sources.load(path, T1)


def test_a_changed_frame_is_rejected_only_by_windows_that_read_it(tmp_path):
    config = ModalityConfig(size=RUN.size, patch=RUN.patch, orientation="as_stored")
    for i in range(8):
        np.save(tmp_path / f"frame_{i}.npy", np.full((4, 3, 5), i + 1.0))
    sources = Sources()
    assert sources.check(tmp_path, config) == 2
    np.save(tmp_path / "frame_6.npy", np.full((4, 3, 5), 9.0))
    sources.load(tmp_path, config, 0)
    with pytest.raises(DataError, match="changed since the run began"):
        sources.load(tmp_path, config, 1)


# Runs


def test_only_missing_windows_are_made(nifti, directory, sealed):
    path = nifti("a.nii.gz", (4, 3, 5, 21))
    assert made(directory, path, RUN) == 5
    for entry in entries(directory):
        with safe_open(entry, "np") as file:
            if '"window": 3' in file.metadata()["key"]:
                entry.unlink()
    assert len(entries(directory)) == 4
    cache = VolumeCache(directory)
    assert cache.check(path, RUN) == 5
    assert (cache.num_made, cache.num_found) == (1, 4)
    sealed()
    assert VolumeCache(directory).check(path, RUN) == 5
    with pytest.raises(AssertionError, match="opened"):
        VolumeCache(directory).load(path, RUN, 5)


def test_orientation_from_cache_and_source(nifti, directory, sealed):
    stored = ModalityConfig(size=T1.size, patch=T1.patch, orientation="as_stored")
    turned = np.array([[0, 0, -2.0, 0], [-1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]])  # axes to P, S, L
    path = nifti("a.nii", (6, 7, 5), turned)
    np.save(path.with_suffix(".npy"), np.ones(T1.size))
    expected = [(path, stored, "PSL"), (path, T1, "RAS"), (path.with_suffix(".npy"), stored, None)]
    for cached in (False, True):
        if cached:
            for file, config, _ in expected:
                VolumeCache(directory).check(file, config)
            sealed()
        for file, config, axes in expected:
            assert VolumeCache(directory).axes(file, config) == axes


# Faults


def test_faults_are_those_without_a_cache_and_are_not_kept(nifti, directory, tmp_path):
    late = np.ones((4, 3, 5, 8), np.float32)
    late[0, 0, 0, 7] = np.nan
    cut = nifti("cut.nii.gz", (20, 20, 20))
    cut.write_bytes(cut.read_bytes()[:500])
    nib.save(nib.Nifti1Pair(np.ones(T1.size, np.float32), np.eye(4)), tmp_path / "half.hdr")
    (tmp_path / "half.img").unlink()
    (tmp_path / "frames").mkdir()
    (tmp_path / "gap").mkdir()
    np.save(tmp_path / "gap" / "frame_1.npy", np.ones((4, 3, 5)))
    (tmp_path / "none.npy").write_bytes(b"no array")
    images = [
        *(Image(tmp_path / name, "T1") for name in ("missing.nii.gz", "cut.nii.gz", "half.hdr", "none.npy")),
        *(Image(tmp_path / name, "rsfMRI") for name in ("frames", "gap", "missing")),
        Image(nifti("late.nii.gz", late), "rsfMRI"),
        Image(nifti("zeros.nii", np.zeros((4, 3, 5, 4), np.float32)), "rsfMRI"),
        Image(nifti("rank.nii", (4, 3, 5)), "rsfMRI"),
        Image(nifti("short.nii", (4, 3, 5, 2)), "rsfMRI"),
    ]
    modalities = {"T1": T1, "rsfMRI": RUN}
    with pytest.raises(DataError) as expected:
        check_volumes(images, modalities, 2)
    for _ in range(2):
        with pytest.raises(DataError) as raised:
            check_volumes(images, modalities, 2, VolumeCache(directory).check)
        assert raised.value.faults == expected.value.faults
    assert len(expected.value.faults) == len(images)
    assert len(entries(directory)) == 1  # the first window of late.nii.gz is good
    for image in images:
        with pytest.raises(DataError):
            VolumeCache(directory).load(image.path, modalities[image.modality], window=int(image is images[7]))


# Damage


def damage(entry: Path, kind: str) -> None:
    content = bytearray(entry.read_bytes())
    if kind == "cut":
        content = content[:-1]
    elif kind == "empty":
        content = bytearray()
    elif kind == "longer":
        content += b"\0"
    elif kind == "header":
        content[:8] = b"\xff" * 8
    elif kind == "metadata":
        content[20] ^= 255
    elif kind == "payload":
        content[-200] ^= 1
    else:
        content = bytearray(content.replace(b'\\"window\\": 0', b'\\"window\\": 1'))
        assert content != entry.read_bytes()
    entry.write_bytes(content)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["cut", "empty", "longer", "header", "metadata", "key", "payload"])
def test_a_damaged_entry_is_noticed_and_made_again(nifti, directory, caplog, kind, dtype):
    path = nifti("a.nii", (6, 7, 5))
    cache = VolumeCache(directory, dtype)
    expected = cache.load(path, T1)
    (entry,) = entries(directory)
    calls = [lambda: cache.load(path, T1), lambda: VolumeCache(directory, dtype, verify=True).check(path, T1)]
    if kind == "empty":  # without `verify`, a start looks at the size only
        calls.append(lambda: VolumeCache(directory, dtype).check(path, T1))
    for call in calls:
        caplog.clear()
        damage(entry, kind)
        call()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"{entry}: a damaged volume" in caplog.text
        np.testing.assert_array_equal(cache.load(path, T1), expected)
        assert made(directory, path, T1, dtype=dtype, verify=True) == 0
        assert len(caplog.records) == 1


# A full disk

SMALL = 600


@pytest.fixture
def full_disk():
    """Limit the files of this process to 600 bytes: a small index fits, a volume does not. Yield a function that
    lifts the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_continues_when_the_disk_is_full(nifti, directory, caplog, full_disk):
    full_disk()  # lift the limit while the files are written
    paths = [nifti(f"{i}.nii", (6, 7, 5)) for i in range(4)]
    expected = [load_volume(path, T1).astype(np.float16) for path in paths]
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    cache = VolumeCache(directory, "float16")
    check_volumes([Image(path, "T1") for path in paths], {"T1": T1}, 3, cache.check)
    volumes = [cache.load(path, T1) for path in paths]
    full_disk()
    np.testing.assert_array_equal(volumes, expected)  # rounded as if they had been written
    assert cache.num_made == 0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no more volumes are kept" in record.getMessage()
    assert [path for path in directory.rglob("*") if path.is_file() and path.parent.name != "checked"] == []
    assert made(directory, paths[0], T1, dtype="float16") == 1


@pytest.fixture
def config_file(nifti, record, write_json):
    """Write a configuration with three volumes: one in training data, one in evaluation data, one in both."""
    for name in ("a", "b", "c"):
        nifti(f"{name}.nii", (6, 7, 5))
    for split, names in (("train", "ab"), ("eval", "bc")):
        rows = [record([("user", [f"T1:{name}.nii"]), ("assistant", ["x"])]) for name in names]
        write_json(f"{split}.json", rows)
    modalities = {"T1": {"size": [6, 7, 5], "patch": [3, 2, 4]}}
    return write_json("config.yaml", {"model": {"modalities": modalities}})


def command(config_file, *flags, data=("train", "eval")):
    splits = [word for split in data for word in (f"--{split}-data", str(config_file.parent / f"{split}.json"))]
    return ["data", "cache", "--config", str(config_file), *splits, *map(str, flags)]


def test_data_cache(config_file, directory, capsys):
    assert main(command(config_file, "--cache", directory)) == 0
    size = sum(entry.stat().st_size for entry in entries(directory)) / 1e6
    assert f"{directory}: 3 files, 3 volumes in float32: 3 made, 0 found; {size:.1f} MB" in capsys.readouterr().out
    assert main(command(config_file, "--cache", directory)) == 0
    assert "0 made, 3 found" in capsys.readouterr().out
    damage(entries(directory)[1], "payload")
    assert main(command(config_file, "--cache", directory)) == 0
    assert "0 made, 3 found" in capsys.readouterr().out
    assert main(command(config_file, "--cache", directory, "--verify")) == 0
    assert "1 made, 2 found" in capsys.readouterr().out
    assert main(command(config_file, "--cache", directory, "--set", "data.cache_dtype=float16")) == 0
    assert "3 volumes in float16: 3 made" in capsys.readouterr().out


def test_parts_of_a_cache_make_it_whole(config_file, directory, capsys):
    """The three files are divided over two parts; a part that is missing is named, one that is there is skipped."""
    assert main(command(config_file, "--cache", directory, "--shard", "1/2")) == 0
    printed = capsys.readouterr().out
    assert "2 files, 2 volumes in float32: 2 made" in printed
    assert "part 1 of 2 is complete; missing: 2/2 (1 of 1 file)" in printed
    for made_now in (1, 0):
        assert main(command(config_file, "--cache", directory, "--shard", "2/2")) == 0
        printed = capsys.readouterr().out
        assert f"1 files, 1 volumes in float32: {made_now} made" in printed
        assert "part 2 of 2 is complete; all are there" in printed
    os.utime(directory.parent / "a.nii", (1, 1))
    assert main(command(config_file, "--cache", directory, "--shard", "2/2", "--verify")) == 0
    assert "part 2 of 2 is complete; missing: 1/2 (1 of 2 files)" in capsys.readouterr().out
    assert main(command(config_file, "--cache", directory)) == 0
    assert "0 made, 3 found" in capsys.readouterr().out
    for wrong in ("0/2", "3/2", "2"):
        assert main(command(config_file, "--cache", directory, "--shard", wrong)) == 2
        assert f"--shard {wrong}: expected I/N" in capsys.readouterr().err


def test_data_cache_on_a_full_disk_fails(config_file, directory, capsys, full_disk):
    code = main(command(config_file, "--cache", directory))
    full_disk()
    assert code == 1
    assert f"{directory}: File too large" in capsys.readouterr().err
    assert entries(directory) == []
    assert main(command(config_file, "--cache", directory)) == 0
    assert "3 made, 0 found" in capsys.readouterr().out


def test_data_cache_reports_every_fault(config_file, directory, capsys):
    assert main(command(config_file, data=())) == 2
    message = capsys.readouterr().err
    assert "data.cache: expected a directory (--cache D)" in message
    assert "data.train: expected a path" in message
    (config_file.parent / "a.nii").unlink()
    (config_file.parent / "c.nii").write_bytes(b"")
    assert main(command(config_file, "--cache", directory)) == 2
    message = capsys.readouterr().err
    assert "2 faults" in message
    assert "a.nii: not found" in message
    assert len(entries(directory)) == 1  # the good one


def test_float16_without_a_cache_is_rejected():
    with pytest.raises(ConfigError, match=r"cache_dtype: float16 without data\.cache"):
        DataConfig(cache_dtype="float16")
    assert type(VolumeCache.from_config(DataConfig())) is Sources
    cache = VolumeCache.from_config(DataConfig(cache="somewhere", cache_dtype="float16"))
    assert (cache.directory, cache.dtype) == (Path("somewhere"), np.float16)


# Several processes, and crashes


FILL = """
import sys
from umbrella_jax.cli import main
from umbrella_jax.data import checked
checked.SETTLED = -1.0  # the volumes were written just now, so a fast start would not remember them
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def large_config(nifti, record, write_json):
    """Write a configuration with forty volumes of 40³, which take 256 kB each in the cache."""
    rng = np.random.default_rng(0)
    for i in range(40):
        nifti(f"{i}.nii", rng.uniform(1, 9, (40, 40, 40)).astype(np.float32))
    rows = [record([("user", [f"T1:{i}.nii"]), ("assistant", ["x"])]) for i in range(40)]
    write_json("train.json", rows)
    modalities = {"T1": {"size": [40, 40, 40], "patch": [10, 10, 10]}}
    return write_json("config.yaml", {"model": {"modalities": modalities}, "data": {"threads": 2}})


def start(config, directory):
    words = [sys.executable, "-c", FILL, *command(config, "--cache", directory, data=("train",))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_valid(config, directory, capsys, found):
    assert main(command(config, "--cache", directory, "--verify", data=("train",))) == 0
    printed = capsys.readouterr()
    assert f"{40 - found} made, {found} found" in printed.out
    modality = ModalityConfig(size=(40, 40, 40), patch=(10, 10, 10))
    for i in (0, 17, 39):
        path = config.parent / f"{i}.nii"
        np.testing.assert_array_equal(VolumeCache(directory).load(path, modality), load_volume(path, modality))


def test_processes_fill_one_directory_together(large_config, directory, capsys):
    processes = [start(large_config, directory) for _ in range(3)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all("40 volumes in float32" in text for text in printed)
    assert len(entries(directory)) == 40
    assert list((directory / "tmp").iterdir()) == []
    index = CheckedFiles(directory)
    index.read()
    assert len(index._entries) == 40
    assert_valid(large_config, directory, capsys, found=40)


def test_a_kill_leaves_a_valid_cache(large_config, directory, capsys, caplog):
    process = start(large_config, directory)
    while len(entries(directory)) < 5 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    whole = len(entries(directory))
    assert whole >= 5
    assert_valid(large_config, directory, capsys, found=whole)
    assert caplog.records == []  # nothing was damaged


def test_old_leftovers_of_a_crash_are_removed(directory):
    (directory / "tmp").mkdir(parents=True)
    for name, age in (("old", 7200), ("new", 60)):
        (directory / "tmp" / name).write_bytes(b"half")
        os.utime(directory / "tmp" / name, (time.time() - age,) * 2)
    VolumeCache(directory)
    assert [file.name for file in (directory / "tmp").iterdir()] == ["new"]
