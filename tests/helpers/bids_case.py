"""BIDS data sets for tests, and what `from_bids` made of them."""

import json
from pathlib import Path

import pytest

from umbrella_jax.errors import DataError
from umbrella_jax.study.from_bids import from_bids


def sexes(num):
    return {f"{i:02}": {"sex": "FM"[i % 2]} for i in range(num)}


def written(folder, *names):
    """Return the records of each split."""
    return [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names or ("train", "eval")]


def subjects(records):
    return {subject for record in records for subject in record["subject_ids"]}


def turns(record):
    """Return (role, image path if the turn shows one, text) of each turn."""
    return [
        (turn["role"], *(part.get("image_path", part.get("text")) for part in turn["content"]))
        for turn in record["conversations"]
    ]


def faults(*args, **options):
    with pytest.raises(DataError) as caught:
        from_bids(*args, **options)
    assert not Path(args[1]).exists() or not Path(args[1], "train.json").exists()
    return caught.value.faults


def taken(root, out, *args, **options):
    """Return the paths that conversations show, and the printed lines joined into one."""
    lines = from_bids(root, out, *args, split="all=1", **options)
    (records,) = written(out, "all")
    assert all(len(record["images"]) == 1 for record in records)
    return [record["images"][0]["path"] for record in records], " ".join(" ".join(lines).split())
