"""Batches: every placeholder points to its own image's features, and padding has no effect."""

from pathlib import Path

import jax
import numpy as np
import pytest

from umbrella_jax.batch import Parts
from umbrella_jax.data.collate import collate
from umbrella_jax.data.conversation import Image
from umbrella_jax.data.epoch_plan import BatchShape
from umbrella_jax.data.tokenize import Encoded

A, B, C = (Image(Path(f"/{name}.nii"), "T1") for name in "abc")
F, G = Image(Path("/f.nii"), "rsfMRI"), Image(Path("/f.nii"), "rsfMRI", window=1)
PATCHES = {"T1": 6, "rsfMRI": 4}


def row(*parts):
    """Make a conversation from numbers of text positions, images and `("answer", n)`. Its ids count up from 100."""
    supervised, images, starts = [], [], []
    for part in parts:
        if isinstance(part, Image):
            images.append(part)
            starts.append(len(supervised))
            supervised += [False] * PATCHES[part.modality]
        else:
            supervised += [False] * part if isinstance(part, int) else [True] * part[1]
    length = len(supervised)
    ids = np.arange(100, 100 + length, dtype=np.int32)
    return Encoded(ids, np.array(supervised, bool), tuple(images), np.array(starts, np.int32))


@pytest.fixture
def volumes(modalities):
    """Return a constant volume per image: 1, 2, 3, ..."""
    return {
        image: np.full(modalities[image.modality].size, value, np.float32)
        for value, image in enumerate([A, B, C, F, G], start=1)
    }


def one(rows, volumes, modalities, conversations, positions, targets, **counts):
    """Collate a single micro-batch and drop its axis."""
    shape = BatchShape(conversations, positions, targets, tuple(counts.items()))
    batch = collate([rows], volumes.__getitem__, modalities, shape)
    return jax.tree.map(lambda leaf: leaf[0], batch)


def source_of_each_position(batch, modalities):
    """Return (value of the volume, patch) per position, concatenating features as the model does; None for text."""
    features = []
    for modality in sorted(batch.volumes):
        for volume in batch.volumes[modality]:
            features += [(float(volume.flat[0]), patch) for patch in range(modalities[modality].num_patches)]
    return [[features[i] if i >= 0 else None for i in row] for row in batch.feature_idx]


def test_every_placeholder_takes_its_own_patch(modalities, volumes):
    """Rows have different numbers of images of both modalities, share a volume, repeat one, and begin with one."""
    rows = [row(2, A, 1, F, 3, B), row(5), row(G, A, ("answer", 2)), row(1, B, B)]
    batch = one(rows, volumes, modalities, 4, 24, 8, T1=3, rsfMRI=2)
    sources_of_rows = source_of_each_position(batch, modalities)
    value = {A: 1.0, B: 2.0, F: 4.0, G: 5.0}
    for encoded, sources in zip(rows, sources_of_rows, strict=True):
        expected = [None] * batch.input_ids.shape[1]
        for image, start in zip(encoded.images, encoded.image_starts, strict=True):
            for patch in range(PATCHES[image.modality]):
                expected[start + patch] = (value[image], patch)
        assert sources == expected
    # each distinct volume occurs once; two windows of one run are two volumes
    assert batch.volumes["T1"][:, 0, 0, 0].tolist() == [1, 2, 0]
    assert batch.volumes["rsfMRI"][:, 0, 0, 0, 0].tolist() == [4, 5]


def test_targets_are_the_next_tokens(modalities, volumes):
    rows = [row(3, ("answer", 2), 1, ("answer", 1)), row(2, A, ("answer", 3))]
    batch = one(rows, volumes, modalities, 2, 16, 8, T1=1)
    for b, encoded in enumerate(rows):
        pos, ids = batch.target_pos[b][batch.target_mask[b]], batch.target_ids[b][batch.target_mask[b]]
        assert ids.tolist() == encoded.input_ids[encoded.supervised].tolist()
        assert batch.input_ids[b, pos + 1].tolist() == ids.tolist()
    assert batch.target_pos[0, :3].tolist() == [2, 3, 5]
    assert not batch.target_pos[~batch.target_mask].any()
    assert not batch.target_ids[~batch.target_mask].any()


def test_padding_is_inert(modalities, volumes):
    rows = [row(2, A, ("answer", 2)), row(3, B, ("answer", 1))]
    batch = one(rows, volumes, modalities, 5, 16, 8, T1=4)
    assert batch.lengths.tolist() == [10, 10, 1, 1, 1]
    assert not batch.input_ids[:, 10:].any()
    assert not batch.input_ids[2:].any()
    assert (batch.feature_idx[:, 10:] == -1).all()
    assert (batch.feature_idx[2:] == -1).all()
    assert batch.target_mask.sum(axis=1).tolist() == [2, 1, 0, 0, 0]
    assert batch.volumes["T1"].shape == (4, 6, 7, 5)
    assert not batch.volumes["T1"][2:].any()
    assert set(batch.volumes) == {"T1"}  # the other modality is not in the batch


def test_types(modalities, volumes):
    rows = [row(2, A, F, ("answer", 2))]
    batch = one(rows, volumes, modalities, 1, 64, 8, T1=1, rsfMRI=1)
    integers = ("input_ids", "positions", "feature_idx", "lengths", "target_pos", "target_ids")
    assert {getattr(batch, name).dtype for name in integers} == {np.dtype(np.int32)}
    assert batch.target_mask.dtype == bool
    assert {v.dtype for v in batch.volumes.values()} == {np.dtype(np.float32)}
    assert batch.positions.tolist() == [list(range(64))]


def test_an_absent_modality_of_the_shape_gets_zero_volumes(modalities, volumes):
    """Micro-batches of a step share a shape, so features of the absent modality still take up their rows."""
    shape = BatchShape(1, 16, 8, (("T1", 1), ("rsfMRI", 1)))
    batch = collate([[row(A)], [row(F)], []], volumes.__getitem__, modalities, shape)
    assert not batch.volumes["rsfMRI"][0].any()
    assert batch.feature_idx[0, 0, :6].tolist() == [0, 1, 2, 3, 4, 5]  # T1 sorts before rsfMRI
    assert not batch.volumes["T1"][1].any()
    assert batch.feature_idx[1, 0, :4].tolist() == [6, 7, 8, 9]
    assert batch.lengths.tolist() == [[6], [4], [1]]
    assert not any(leaf[2].any() for leaf in (batch.input_ids, batch.target_mask, *batch.volumes.values()))


def test_an_image_of_two_micro_batches_is_loaded_once(modalities, volumes):
    loaded = []

    def volume(image):
        loaded.append(image)
        return volumes[image]

    shape = BatchShape(2, 16, 8, (("T1", 2), ("rsfMRI", 1)))
    batch = collate([[row(A), row(B)], [row(F), row(B)]], volume, modalities, shape)
    assert loaded == [A, B, F]
    assert batch.volumes["T1"][:, :, 0, 0, 0].tolist() == [[1, 2], [2, 0]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_part_has_its_own_rows_volumes(modalities, volumes, count):
    """Making a part loads only its own volumes. The joined parts equal the whole batch."""
    batches = [[row(2, A, B), row(3, ("answer", 2)), row(C, F), row(G, B)], [row(F), row(C, ("answer", 1)), row(A)]]
    shape = BatchShape(4, 24, 8, (("T1", 8), ("rsfMRI", 8)))
    whole = collate(batches, volumes.__getitem__, modalities, shape, Parts(count, tuple(range(count))))
    made, asked = [], []
    for part in range(count):
        mine = set()

        def volume(image, mine=mine):
            mine.add(image)
            return volumes[image]

        made.append(collate(batches, volume, modalities, shape, Parts(count, (part,))))
        asked.append(mine)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *made)
    for leaf, expected in zip(jax.tree.leaves(joined), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(leaf, expected, strict=True)
    assert (
        asked
        == {
            1: [{A, B, C, F, G}],
            2: [{A, B, C, F}, {A, B, C, F, G}],
            4: [{A, B, F}, {C}, {A, C, F}, {B, G}],
        }[count]
    )
    value = {A: 1.0, B: 2.0, C: 3.0, F: 4.0, G: 5.0}
    for a, rows in enumerate(batches):
        sources = source_of_each_position(jax.tree.map(lambda leaf, a=a: leaf[a], whole), modalities)
        for b, encoded in enumerate(rows):
            shown = [sources[b][start] for start in encoded.image_starts]
            assert shown == [(value[image], 0) for image in encoded.images]
        for b in range(4):
            part = b * count // 4
            for name, first in (("T1", 0), ("rsfMRI", 8 * PATCHES["T1"])):
                size = 8 * PATCHES[name] // count
                indices = whole.feature_idx[a, b]
                inside = (indices >= first) & (indices < first + 8 * PATCHES[name])
                assert ((indices[inside] - first) // size == part).all(), "in the part of the row"
