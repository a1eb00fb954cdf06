"""BIDS data sets for the tests of `umbrella_jax.study`."""

import json
from zlib import crc32

import numpy as np
import pytest

from tests.helpers.small_run import write_volume


@pytest.fixture
def bids(tmp_path):
    """`bids({"01": {"sex": "F"}}, {"01": ["anat/sub-01_T1w.nii.gz"]})` makes a data set; default: a T1w per subject."""

    def make(participants, scans=None, sidecar=None, root="ds", encoding="utf-8"):
        folder = tmp_path / root
        folder.mkdir()
        columns = list(dict.fromkeys(column for row in participants.values() for column in row))
        rows = [[f"sub-{name}", *(row.get(c, "n/a") for c in columns)] for name, row in participants.items()]
        lines = ["\t".join(row) for row in [["participant_id", *columns], *rows]]
        (folder / "participants.tsv").write_text("\n".join(lines) + "\n", encoding=encoding)
        if sidecar is not None:
            (folder / "participants.json").write_text(json.dumps(sidecar))
        for name, files in (scans or {name: [f"anat/sub-{name}_T1w.nii.gz"] for name in participants}).items():
            for file in files:
                values = np.random.default_rng(crc32(f"{name}/{file}".encode())).uniform(
                    1, 9, (4, 3, 5, 10) if "_bold" in file else (6, 7, 5)
                )
                write_volume(folder / f"sub-{name}" / file, (), values=values)
        return folder

    return make


@pytest.fixture
def visits(bids):
    """`visits()` makes 6 subjects with two sessions, 20 years apart in age."""

    def make(sessions=("ses-1", "ses-2"), **people):
        people = people or {f"{i:02}": {"age": str(20 + i)} for i in range(6)}
        root = bids(people, {n: [f"ses-{k}/anat/sub-{n}_ses-{k}_T1w.nii" for k in (1, 2)] for n in people})
        for i, name in enumerate(people):
            rows = "".join(f"{ses}\t{20 + i + 20 * k}\n" for k, ses in enumerate(sessions))
            (root / f"sub-{name}/sub-{name}_sessions.tsv").write_text(f"session_id\tage\n{rows}")
        return root

    return make
