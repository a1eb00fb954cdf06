"""Reading of every kind stops at its deadline, between two frames or pieces of a file."""

import gzip
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.data.cache import Sources
from umbrella_jax.data.deadline import Deadline, ReadingTimeoutError, check_deadline
from umbrella_jax.data.voxels import open_voxels

RUN = ModalityConfig(size=(4, 3, 5, 4), patch=(1, 1, 1, 1), stride_between_seq=0.25, orientation="as_stored")


def write(folder: Path, name: str) -> Path:
    voxels = np.random.default_rng(0).normal(100, 20, (4, 3, 5, 12)).astype(np.float32)
    path = folder / name
    if name == "frames":
        path.mkdir()
        for frame in range(12):
            np.save(path / f"frame_{frame}.npy", voxels[..., frame])
    else:
        content = bytes(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])).to_bytes())
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["run.nii", "run.nii.gz", "frames"])
def test_a_check_stops_at_the_next_window(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, deadline, reads = write(tmp_path, name), Deadline(3600), list[Any]()
    kind: Any = type(open_voxels(path))
    read = kind.read

    def stop_after_two(self: Any, frames: Any) -> Any:
        reads.append(frames)
        if len(reads) == 2:
            deadline.stop()
        return read(self, frames)

    assert Sources().check(path, RUN) == 9
    monkeypatch.setattr(kind, "read", stop_after_two)
    with deadline, pytest.raises(ReadingTimeoutError, match=f"{name}.*: not read within 3600 s"):
        Sources().check(path, RUN)
    assert len(reads) == 2
    check_deadline(path)  # outside, there is none


def test_the_time_begins_with_the_reading() -> None:
    deadline, stopped = Deadline(0.0), Deadline(3600)
    assert not deadline.is_over
    stopped.stop()  # before it begins, because its client went away
    for own in (deadline, stopped):
        with own:
            time.sleep(0.001)
            with pytest.raises(ReadingTimeoutError):
                check_deadline("scan.nii")
