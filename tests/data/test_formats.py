"""Formats of volumes: exact voxels, orientation, and rejected files. Random data."""

import gzip
import pickle
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import umbrella_jax.data.voxels
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.loader import Dataset
from umbrella_jax.data.volume import check_volumes, load_volume, open_volume, preprocess
from umbrella_jax.errors import DataError

SIZE, FRAMES = (6, 7, 5), 11
LPS = np.array([[-2.0, 0, 0, 9], [0, -2, 0, 4], [0, 0, 3, 1], [0, 0, 0, 1]])


def t1(**fields):
    return ModalityConfig(size=SIZE, patch=(1, 1, 1), scaling="none", **fields)


def fmri(**fields):
    return ModalityConfig(size=(*SIZE, 4), patch=(1, 1, 1, 1), scaling="none", **fields)


def numbers(shape, dtype=np.int16):
    """Return positive random numbers that every type here holds exactly."""
    return np.random.default_rng(len(shape)).integers(1, 120, shape).astype(dtype)


def faults(path, config):
    with pytest.raises(DataError) as caught:
        load_volume(path, config)
    return caught.value.faults


# What nibabel reads


def nifti_bytes(data, dtype, slope=1.0, inter=0.0, header_class=nib.Nifti1Header):
    """Return the bytes of a NIfTI file with exactly this type and scale, which nibabel would choose itself."""
    dtype = np.dtype(dtype)
    header = header_class(endianness=">" if dtype.str[0] == ">" else "<")
    header.set_data_dtype(dtype)
    header.set_data_shape(data.shape)
    header.set_sform(LPS, "scanner")
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["vox_offset"] = offset = header.sizeof_hdr + 4
    content = header.binaryblock + bytes(4) + data.astype(dtype).tobytes(order="F")
    assert len(content) == offset + data.size * dtype.itemsize
    return content


@pytest.mark.parametrize("header_class", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u1", "<i4", ">u2", "<i8", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize(("slope", "inter"), [(1, 0), (0.5, 3), (0, 7)])  # a slope of 0 means no scaling
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti(tmp_path, header_class, dtype, slope, inter, name):
    data = numbers(SIZE)
    content = nifti_bytes(data, dtype, slope, inter, header_class)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    expected = data * (slope or 1) + (inter if slope else 0)
    found = load_volume(tmp_path / name, t1(orientation="as_stored"))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(load_volume(tmp_path / name, t1()), expected[::-1, ::-1])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.npy"])
def test_pointer_files_are_rejected_with_a_remedy(tmp_path, name):
    """A clone without git-lfs, or a DataLad data set without `datalad get`, holds pointers in place of files."""
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert faults(path, t1()) == (
        f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository",
    )
    fault = f"{path}: a git-annex pointer, not the file itself; run `datalad get` (or `git annex get`) on it"
    path.write_text("/annex/objects/SHA256E-s9--0.nii.gz\n")
    assert faults(path, t1()) == (fault,)
    path.unlink()
    path.symlink_to(f"../.git/annex/objects/x/y/{name}")
    assert faults(path, t1()) == (fault,)


@pytest.mark.parametrize("named", ["a.hdr", "a.img"])
def test_nifti_pairs(tmp_path, named):
    nib.save(nib.Nifti1Pair(numbers(SIZE), LPS), tmp_path / "a.img")
    np.testing.assert_array_equal(load_volume(tmp_path / named, t1()), numbers(SIZE)[::-1, ::-1])
    (tmp_path / "a.img").unlink()
    (fault,) = faults(tmp_path / named, t1())
    missing = "" if named == "a.img" else f"{tmp_path / 'a.img'} "
    assert fault.startswith(f"{tmp_path / named}: {missing}not found; expected a volume or a directory of frames")


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_freesurfer(tmp_path, name, dtype):
    data = numbers(SIZE, dtype)
    nib.save(nib.MGHImage(data, LPS), tmp_path / name)
    np.testing.assert_array_equal(load_volume(tmp_path / name, t1(orientation="as_stored")), data)
    np.testing.assert_array_equal(load_volume(tmp_path / name, t1()), data[::-1, ::-1])


def test_cut_mgz(tmp_path):
    nib.save(nib.MGHImage(numbers(SIZE), LPS), tmp_path / "a.mgz")
    (tmp_path / "a.mgz").write_bytes((tmp_path / "a.mgz").read_bytes()[:300])
    (fault,) = faults(tmp_path / "a.mgz", t1())
    assert fault.startswith(f"{tmp_path / 'a.mgz'}: cannot be read: ")
    assert fault.endswith("; expected a whole volume, copy it again")


@pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.Spm99AnalyzeImage, nib.Spm2AnalyzeImage])
@pytest.mark.parametrize("named", ["a.hdr", "a.img"])
def test_analyze_has_no_orientation(tmp_path, kind, named):
    for shape, config in [(SIZE, t1), ((*SIZE, FRAMES), fmri)]:
        data = numbers(shape)
        nib.save(kind(data, LPS), tmp_path / "a.img")
        found = load_volume(tmp_path / named, config(orientation="as_stored"))
        np.testing.assert_array_equal(found, data[..., :4] if data.ndim == 4 else data)
        assert faults(tmp_path / named, config()) == (
            f"{tmp_path / named}: no orientation: Analyze headers do not hold one; use NIfTI with a valid qform or "
            "sform, or set orientation: as_stored for the modality",
        )


def test_scaled_analyze(tmp_path):
    header = nib.Spm99AnalyzeImage.header_class()
    header.set_data_dtype(np.int16)
    header.set_data_shape(SIZE)
    header["scl_slope"] = 0.5
    (tmp_path / "a.hdr").write_bytes(header.binaryblock)
    (tmp_path / "a.img").write_bytes(numbers(SIZE).tobytes(order="F"))
    found = load_volume(tmp_path / "a.hdr", t1(orientation="as_stored"))
    np.testing.assert_array_equal(found, numbers(SIZE) / 2)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.mgh", "a.img"])
def test_runs(tmp_path, name):
    data = numbers((*SIZE, FRAMES))
    kind = {".mgz": nib.MGHImage, ".mgh": nib.MGHImage, ".img": nib.Nifti1Pair}
    nib.save(kind.get(Path(name).suffix, nib.Nifti2Image)(data, LPS), tmp_path / name)
    for window, frames in [(0, slice(0, 8, 2)), (1, slice(2, 10, 2))]:
        config = {"stride_within_seq": 2, "stride_between_seq": 0.25}
        found = load_volume(tmp_path / name, fmri(**config), window)
        np.testing.assert_array_equal(found, data[::-1, ::-1, :, frames])


# Arrays


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save(array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array)), path)
    else:
        np.save(path, array)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("layout", [(...,), (None, ...), (..., None)], ids=["DHW", "1DHW", "DHW1"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64])
def test_an_array_is_a_volume(tmp_path, suffix, layout, dtype):
    path = write(tmp_path / f"a{suffix}", numbers(SIZE, dtype)[layout])
    found = load_volume(path, t1(orientation="as_stored"))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, numbers(SIZE))


def test_arrays_of_other_layouts_in_memory(tmp_path):
    torch = pytest.importorskip("torch")
    data = numbers(SIZE)
    tensor = torch.from_numpy(data)
    for array in (data.astype(">i2"), np.asfortranarray(data)):
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(load_volume(tmp_path / "a.npy", t1(orientation="as_stored")), data)
    turned = tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for array in (tensor.bfloat16(), tensor.float().requires_grad_(), turned):
        torch.save(array, tmp_path / "a.pt")
        np.testing.assert_array_equal(load_volume(tmp_path / "a.pt", t1(orientation="as_stored")), data)


@pytest.fixture
def run(tmp_path):
    """Return `run(suffix)`, which writes 11 frames, too many for alphabetical order, and returns (folder, numbers)."""

    def make(suffix=".npy", layout=(...,)):
        data = numbers((*SIZE, FRAMES))
        for n in range(FRAMES):
            write(tmp_path / "S01" / f"frame_{n}{suffix}", data[..., n][layout])
        return tmp_path / "S01", data

    return make


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("layout", [(...,), (None, ...), (..., None)], ids=["DHW", "1DHW", "DHW1"])
@pytest.mark.parametrize(("within", "starts"), [(1, [0, 4]), (2, [0])])
def test_a_directory_of_frames_is_a_run(run, suffix, layout, within, starts):
    path, data = run(suffix, layout)
    (path / "global_stats.pt").write_text("not looked at")
    config = fmri(orientation="as_stored", stride_within_seq=within)
    for window, start in enumerate(starts):
        found = load_volume(path, config, window)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, data[..., start : start + 4 * within : within])
    image = Image(path, "fMRI")
    assert check_volumes([image], {"fMRI": config}, 1) == {image: len(starts)}


def test_numbers_may_be_padded(run):
    path, data = run()
    for file in path.iterdir():
        file.rename(path / f"frame_{int(file.stem[6:]):03}.npy")
    np.testing.assert_array_equal(load_volume(path, fmri(orientation="as_stored"), 1), data[..., 4:8])


def test_a_window_reads_only_its_own_frames(run, monkeypatch):
    """It also reads the first frame, for the shape."""
    path, _ = run()
    read = []
    original = umbrella_jax.data.voxels._array
    monkeypatch.setattr(umbrella_jax.data.voxels, "_array", lambda file: read.append(file.name) or original(file))
    for window, frames in [(0, (0, 1, 2, 3)), (1, (0, 4, 5, 6, 7))]:
        read.clear()
        config = fmri(orientation="as_stored")
        preprocess(path, open_volume(path, config), config, window)
        assert read == [f"frame_{n}.npy" for n in frames]


def test_a_directory_of_one_frame_is_a_volume_too(tmp_path):
    write(tmp_path / "S01/frame_0.npy", numbers(SIZE))
    np.testing.assert_array_equal(load_volume(tmp_path / "S01", t1(orientation="as_stored")), numbers(SIZE))


# Arrays that are refused


def test_arrays_and_frames_have_no_orientation(run, tmp_path):
    write(tmp_path / "a.npy", numbers(SIZE))
    for path, config in [(run()[0], fmri()), (tmp_path / "a.npy", t1())]:
        (fault,) = faults(path, config)
        assert fault.startswith(f"{path}: no orientation: .npy and .pt arrays do not hold one; ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda d: [(d / f"frame_{n}.npy").unlink() for n in (3, 7)],
            ["{d}: no frame_3; expected all from frame_0 to frame_10, 2 missing"],
        ),
        (
            lambda d: (d / "frame_0.npy").unlink(),
            ["{d}: no frame_0; expected all from frame_0 to frame_10, 1 missing"],
        ),
        (
            lambda d: (d / "frame_03.npy").touch(),
            ["{d}: frame_03.npy, frame_3.npy are all frame 3; expected one file for each frame"],
        ),
        (
            lambda d: (d / "frame_10.pt").touch(),
            ["{d}: frame_10.npy, frame_10.pt are all frame 10; expected one file for each frame"],
        ),
        (
            lambda d: [(d / name).touch() for name in ("frame_-1.npy", "frame_2.nii")],
            [
                "{d}/frame_-1.npy: expected frame_N.pt or frame_N.npy with a number N",
                "{d}/frame_2.nii: expected frame_N.pt or frame_N.npy with a number N",
            ],
        ),
        (
            lambda d: [file.unlink() for file in d.iterdir()],
            ["{d}: a directory without frames; expected frame_0.pt, frame_1.pt, … or .npy"],
        ),
        (
            lambda d: [(d / f"frame_{n}.npy").unlink() for n in range(3, FRAMES)],
            ["{d}: 3 frames; expected at least a window of 4, 1 apart"],
        ),
        (
            lambda d: write(d / "frame_2.npy", numbers((6, 5, 7))),
            ["{d}/frame_2.npy: shape (6, 5, 7); expected (6, 7, 5), as frame_0.npy has it"],
        ),
        (
            lambda d: write(d / "frame_2.npy", numbers((2, 6, 7, 5))),
            [
                "{d}/frame_2.npy: shape (2, 6, 7, 5); expected one volume, (D, H, W), (1, D, H, W) or (D, H, W, 1); "
                "a run is a directory of frames"
            ],
        ),
        (
            lambda d: write(d / "frame_2.npy", np.full(SIZE, np.nan)),
            ["{d}: 210 voxels are NaN or infinite; expected finite numbers, preprocess the file again"],
        ),
        (
            lambda d: write(d / "frame_2.npy", np.ones(SIZE, complex)),
            ["{d}/frame_2.npy: voxels of type complex128; expected real numbers"],
        ),
        (
            lambda d: write(d / "frame_2.npy", np.ones(SIZE, bool)),
            ["{d}/frame_2.npy: voxels of type bool; expected real numbers"],
        ),
    ],
)
def test_frames_that_are_rejected(run, change, expected):
    path, _ = run()
    change(path)
    assert faults(path, fmri(orientation="as_stored")) == tuple(text.format(d=path) for text in expected)


def test_a_run_is_no_volume_and_an_array_no_run(run, tmp_path):
    path, data = run()
    assert faults(path, t1(orientation="as_stored")) == (
        f"{path}: shape (6, 7, 5, 11); expected 3 axes, as the modality's size (6, 7, 5) has",
    )
    write(tmp_path / "a.npy", data)
    assert "a run is a directory of frames" in faults(tmp_path / "a.npy", fmri(orientation="as_stored"))[0]
    write(tmp_path / "a.npy", np.ones((1, 7, 5, 1)))  # either axis of length 1 could be the channel
    assert "shape (1, 7, 5, 1); expected one volume" in faults(tmp_path / "a.npy", t1(orientation="as_stored"))[0]


class Bomb:
    def __reduce__(self):
        return (exec, ("import sys; sys.exploded = True",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch warns of what the test wrote
@pytest.mark.parametrize("name", ["a.npy", "a.pt"])
def test_pickles_are_not_executed(tmp_path, name):
    path = tmp_path / name
    if name == "a.pt":
        pytest.importorskip("torch").save(Bomb(), path)
    else:
        np.save(path, np.array([Bomb()], object), allow_pickle=True)
    (fault,) = faults(path, t1(orientation="as_stored"))
    assert fault.startswith(f"{path}: cannot be read: ")
    assert fault.endswith("; expected one array of numbers, nothing pickled with it; save it again")
    path.write_bytes(pickle.dumps(Bomb()))
    assert "cannot be read" in faults(path, t1(orientation="as_stored"))[0]
    assert not hasattr(sys, "exploded")


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.npy", "a.pt"])
def test_arrays_that_are_cut_short(tmp_path, name, share):
    path = write(tmp_path / name, numbers(SIZE))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    (fault,) = faults(path, t1(orientation="as_stored"))
    known = "its header promises 6 × 7 × 5 voxels of int16, " if name == "a.npy" and share else "cannot be read: "
    assert fault.startswith(f"{path}: {known}")


def test_files_with_other_content(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"frame": torch.ones(SIZE)}, tmp_path / "a.pt")
    (fault,) = faults(tmp_path / "a.pt", t1(orientation="as_stored"))
    assert "cannot be read: TypeError: holds dict, not a tensor; expected one array of numbers" in fault
    torch.save(torch.ones(SIZE).to_sparse(), tmp_path / "a.pt")
    assert "cannot be read: TypeError" in faults(tmp_path / "a.pt", t1(orientation="as_stored"))[0]
    np.savez(tmp_path / "a.npz", a=numbers(SIZE))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    (fault,) = faults(tmp_path / "a.npy", t1(orientation="as_stored"))
    assert fault == f"{tmp_path / 'a.npy'}: holds NpzFile; expected one array of numbers"
    missing = tmp_path / "none.npy"
    assert faults(missing, t1(orientation="as_stored"))[0].startswith(f"{missing}: not found; expected a volume or a")


def test_without_torch(tmp_path, monkeypatch):
    (tmp_path / "a.pt").touch()
    monkeypatch.delitem(sys.modules, "umbrella_jax.io.torch_files", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert faults(tmp_path / "a.pt", t1(orientation="as_stored")) == (
        f"{tmp_path / 'a.pt'}: needs PyTorch to be read; pip install 'umbrella-jax[torch]', or save it as .npy",
    )


# All the way


def test_dataset_of_an_older_schema_and_frames(run, write_json, tokenizer):
    path, _ = run()
    turns = [{"from": "human", "value": "<image> Asleep?"}, {"from": "gpt", "value": "no"}]
    file = write_json("a.json", {"task_id": "a", "conversation": turns, "modality_paths": {"rsfMRI": "S01"}})
    modalities = {"rsfMRI": fmri(orientation="as_stored")}
    dataset = Dataset.load(file, tokenizer, modalities, max_length=4000, threads=2)
    assert dict(dataset.windows) == {Image(path, "rsfMRI"): 2}
