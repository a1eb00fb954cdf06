"""Batches of a run: every conversation once per epoch, the same after a resume; errors reach the caller."""

from collections import Counter
from functools import partial
from itertools import islice

import jax
import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.batch import WHOLE, Parts
from umbrella_jax.config.schema import AugmentConfig, ModalityConfig
from umbrella_jax.data.cache import VolumeCache
from umbrella_jax.data.loader import Dataset, eval_batches, eval_subset, make_epoch_plan, train_batches, whole_batch
from umbrella_jax.data.volume import load_volume
from umbrella_jax.errors import DataError

NUM = 7


@pytest.fixture
def make_dataset(nifti, record, write_json, tokenizer, modalities):
    """Return `make_dataset(evaluation=...)`: 7 conversations with answers of different lengths."""

    def make(answers=None, **options):
        run = np.ones((4, 3, 5, 1)) + np.random.default_rng(0).uniform(0, 1, (4, 3, 5, 40))
        nifti("run.nii.gz", run.astype(np.float32))
        nifti("shared.nii", (6, 7, 5))
        for i in range(NUM):
            nifti(f"{i}.nii", (6, 7, 5))
        answers = answers or ["x" * (i + 1) for i in range(NUM)]
        turns = [[("user", [f"T1:{i}.nii", "T1:shared.nii", "?"]), ("assistant", [answers[i]])] for i in range(NUM)]
        for i in (1, 2, 5):  # these show the run too
            turns[i][0][1].append("fMRI:run.nii.gz")
        path = write_json("data.jsonl", [record(t) for t in turns])
        return Dataset.load(path, tokenizer, modalities, max_length=200, threads=2, **options)

    return make


def batches_of(dataset, *, batch_size, accumulate_steps=1, seed=5, parts=WHOLE, start_step=0, **options):
    """Return training batches as a run makes them; by default those of one epoch."""
    plan = make_epoch_plan(
        dataset, batch_size=batch_size, accumulate_steps=accumulate_steps, seed=seed, parts=parts.total
    )
    options = {"num_steps": plan.updates_per_epoch, "threads": 2} | options
    return train_batches(dataset, plan, start_step=start_step, parts=parts, **options)


def conversations_of(batch):
    """Return the indices of the conversations in each micro-batch: the answer of conversation i has i + 2 tokens."""
    return [[int(mask.sum()) - 2 for mask in micro if mask.any()] for micro in batch.target_mask]


def test_load(make_dataset, tmp_path):
    dataset = make_dataset()
    assert len(dataset) == len(dataset.encoded) == NUM
    assert not len(dataset.prompts)
    counts = {image.path.name: count for image, count in dataset.windows.items()}
    assert counts == {**{f"{i}.nii": 1 for i in range(NUM)}, "shared.nii": 1, "run.nii.gz": 10}


def test_each_conversation_once_an_epoch(make_dataset):
    """Three conversations show the run, four do not. In batches of 2, each kind takes two updates."""
    dataset = make_dataset()
    batches = list(batches_of(dataset, batch_size=2, num_steps=8))
    assert len(batches) == 8
    orders = [[i for batch in batches[k : k + 4] for row in conversations_of(batch) for i in row] for k in (0, 4)]
    assert all(sorted(order) == list(range(NUM)) for order in orders)
    assert orders[0] != orders[1]  # each epoch has its own order
    assert [conversations_of(b) for b in batches_of(dataset, batch_size=2, num_steps=8, seed=6)] != [
        conversations_of(b) for b in batches
    ]


def test_a_batch_holds_the_volumes_and_tokens_of_its_conversations(make_dataset, modalities, tmp_path):
    dataset = make_dataset()
    t1 = modalities["T1"]
    for batch in batches_of(dataset, batch_size=2, accumulate_steps=2):
        for a, micro in enumerate(conversations_of(batch)):
            used = {volume.tobytes() for volume in batch.volumes["T1"][a] if volume.any()}
            files = [*(f"{i}.nii" for i in micro), *(["shared.nii"] if micro else [])]
            assert used == {load_volume(tmp_path / name, t1).tobytes() for name in files}
            for b, i in enumerate(micro):
                row = dataset.encoded[i]
                assert batch.lengths[a, b] == len(row)
                np.testing.assert_array_equal(batch.input_ids[a, b, : len(row)], row.input_ids)


def assert_equal(left, right):
    for name in ("input_ids", "positions", "feature_idx", "lengths", "target_pos", "target_ids", "target_mask"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.volumes.keys() == right.volumes.keys()
    for name in left.volumes:
        np.testing.assert_array_equal(left.volumes[name], right.volumes[name])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 4, 8])
def test_a_resumed_run_continues_with_the_same_batches(make_dataset, start, threads):
    dataset = make_dataset()
    options = {"batch_size": 1, "accumulate_steps": 2, "num_steps": 9}
    whole = list(batches_of(dataset, **options))
    resumed = list(batches_of(dataset, **options, start_step=start, threads=threads))
    assert len(resumed) == 9 - start
    for left, right in zip(whole[start:], resumed, strict=True):
        assert_equal(left, right)


def interleave(*leaves, own):
    """Join the leaves [A, own · rows, ...] of processes that take parts in turn to [A, all rows, ...]."""
    cut = [leaf.reshape(leaf.shape[0], own, -1, *leaf.shape[2:]) for leaf in leaves]
    return np.stack(cut, axis=2).reshape(leaves[0].shape[0], -1, *leaves[0].shape[2:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_a_batch(make_dataset, count, monkeypatch):
    """The joined parts equal the batch of one process. Each process opens only the volumes of its own parts."""
    dataset = make_dataset()
    options = {"batch_size": 4, "accumulate_steps": 2, "threads": 1}
    whole = list(batches_of(dataset, **options, parts=Parts(4, (0, 1, 2, 3))))
    opened = []
    monkeypatch.setattr(dataset.sources, "load", lambda *a: opened.append(a) or load_volume(*a))
    parts = []
    for p in range(count):
        own = tuple(range(p, 4, count))  # as on a torus, whose neighbouring devices may belong to different processes
        parts.append(list(batches_of(dataset, **options, parts=Parts(4, own))))
        held = {v.tobytes() for b in parts[-1] for vs in b.volumes.values() for m in vs for v in m if v.any()}
        assert {load_volume(*arguments).tobytes() for arguments in opened} == held
        opened.clear()
    for expected, *shares in zip(whole, *parts, strict=True):
        assert_equal(jax.tree.map(partial(interleave, own=4 // count), *shares), expected)


def test_a_step_without_a_modality_has_no_entry_for_it(make_dataset):
    for batch in batches_of(make_dataset(), batch_size=1):
        assert set(batch.volumes) == ({"T1", "rsfMRI"} if conversations_of(batch)[0][0] in (1, 2, 5) else {"T1"})


def test_an_epoch_draws_one_window_of_a_run(make_dataset):
    dataset = make_dataset()
    windows = []
    epoch = Counter()
    for step, batch in enumerate(batches_of(dataset, batch_size=1, num_steps=8 * NUM)):
        if "rsfMRI" in batch.volumes:
            epoch[batch.volumes["rsfMRI"].tobytes()] += 1
        if step % NUM == NUM - 1:
            ((window, count),) = epoch.items()  # one window, shown by three conversations
            assert count == 3
            windows.append(window)
            epoch.clear()
    assert len(set(windows)) > 2  # other epochs draw other windows


def test_evaluation_takes_every_conversation_once(make_dataset):
    """One shape is enough, because 7 conversations do not repay compiling a second."""
    dataset = make_dataset(evaluation=True)
    for prompts in (False, True):
        parts = Parts(2, (0, 1))
        batches = list(eval_batches(dataset, 4, prompts=prompts, parts=parts))
        assert sorted(i for indices, _ in batches for i in indices) == list(range(NUM))
        assert len({tuple(v.shape for v in (b.input_ids, b.target_pos, *b.volumes.values())) for _, b in batches}) == 1
        rows = dataset.prompts if prompts else dataset.encoded
        for indices, batch in batches:
            assert all(len(volumes) % 2 == 0 for volumes in batch.volumes.values())
            assert batch.lengths.tolist() == [len(rows[i]) for i in indices] + [1] * (4 - len(indices))
            for b, i in enumerate(indices):
                np.testing.assert_array_equal(batch.input_ids[b, : len(rows[i])], rows[i].input_ids)
        again = list(eval_batches(dataset, 4, prompts=prompts, parts=parts, threads=1))
        assert [indices for indices, _ in again] == [indices for indices, _ in batches]


def test_the_whole_batch_is_in_order(make_dataset):
    dataset = make_dataset(evaluation=True)
    batch = whole_batch(dataset, prompts=True)
    assert batch.lengths.tolist() == [len(row) for row in dataset.prompts]
    assert batch.volumes["T1"].shape[0] == NUM + 1
    for b, row in enumerate(dataset.prompts):
        np.testing.assert_array_equal(batch.input_ids[b, : len(row)], row.input_ids)


def test_eval_takes_the_first_window(make_dataset, modalities):
    dataset = make_dataset(evaluation=True)
    (image,) = (i for i in dataset.windows if i.modality == "rsfMRI")
    batches = [whole_batch(dataset, prompts=True), *(b for _, b in eval_batches(dataset, 2, prompts=True))]
    expected = load_volume(image.path, modalities["rsfMRI"], 0)
    found = [batch.volumes["rsfMRI"][0] for batch in batches if "rsfMRI" in batch.volumes]
    shown = [volume for volume in found if volume.any()]
    assert len(shown) >= 2
    for volume in shown:
        np.testing.assert_array_equal(volume, expected)


def test_answers_may_be_empty_only_in_evaluation(make_dataset):
    answers = ["x"] * (NUM - 1) + [""]
    assert len(make_dataset(answers, evaluation=True).prompts) == NUM
    with pytest.raises(DataError, match=r"data\.jsonl:7"):
        make_dataset(answers)


def test_prompts_of_training_data_are_rejected(make_dataset):
    with pytest.raises(DataError, match="evaluation=True"):
        eval_batches(make_dataset(), 2, prompts=True)
    with pytest.raises(DataError, match="evaluation=True"):
        whole_batch(make_dataset(), prompts=True)


def test_faults_of_texts_and_volumes_are_raised_together(nifti, record, write_json, tokenizer, modalities, tmp_path):
    truncated = nifti("cut.nii.gz", (20, 20, 20))
    truncated.write_bytes(truncated.read_bytes()[:500])
    answer = ("assistant", ["x"])
    path = write_json(
        "data.json",
        [
            record([("user", ["T1:none.nii"]), answer]),
            record([("user", ["T1:cut.nii.gz"]), answer]),
            record([("user", ["long" * 100]), answer]),
            record([("user", ["mute"])]),
        ],
    )
    with pytest.raises(DataError) as caught:
        Dataset.load(path, tokenizer, modalities, max_length=200, threads=2)
    expected = ["data.json[2] (S01): ", "data.json[3] (S01): no assistant", "none.nii: not found", "cut.nii.gz: cannot"]
    assert len(caught.value.faults) == 4
    assert all(e in f for e, f in zip(expected, caught.value.faults, strict=True))


def test_options_of_load_take_effect(nifti, record, write_json, tokenizer, modalities, tmp_path):
    nifti("images/a.nii", (6, 7, 5))
    nifti("images/r.nii", (4, 3, 5, 4))
    answer = ("assistant", ["x"])
    path = write_json(
        "data.json",
        [
            record([("user", ["T1:a.nii"]), answer], task_type="T1"),
            record([("user", ["fMRI:r.nii"]), answer], task_type="T1"),
            record([("user", ["T1:a.nii", "T1:a.nii"]), answer], task_type="T3"),
        ],
    )
    common = {"max_length": 200, "threads": 1, "image_root": tmp_path / "images"}
    assert len(Dataset.load(path, tokenizer, modalities, **common)) == 3
    (tmp_path / "images/r.nii").unlink()  # shown only by a conversation that the filter drops
    (kept,) = Dataset.load(path, tokenizer, modalities, **common, modality="sMRI", task_filter="T1").conversations
    assert kept.source.endswith("data.json[0]")


def test_a_volume_that_breaks_during_the_run_reaches_the_caller(make_dataset, tmp_path):
    dataset = make_dataset()
    (tmp_path / "3.nii").write_bytes(b"")
    with pytest.raises(DataError, match=r"3\.nii: cannot be read"):
        list(batches_of(dataset, batch_size=1, threads=3))
    dataset = make_dataset(evaluation=True)
    nib.save(nib.Nifti1Image(np.ones((6, 7), np.float32), np.eye(4)), tmp_path / "3.nii")
    batches, loaded = eval_batches(dataset, 1, prompts=False), []
    with pytest.raises(DataError, match=r"3\.nii: shape \(6, 7\)"):
        loaded.extend(indices for indices, _ in batches)
    assert [3] not in loaded
    assert loaded[:1] == [[0]]  # earlier batches are good


def test_a_run_may_be_left_early(make_dataset):
    assert len(list(islice(batches_of(make_dataset(), batch_size=2, num_steps=10**9), 3))) == 3


AUGMENT = AugmentConfig(flip_any_axis=0.5, noise=0.1)


def test_augmentation_depends_on_conversation_and_epoch(make_dataset, modalities, tmp_path):
    """Each conversation has its own change, so none share a volume. It is the same after a resume and another in the
    next epoch. Evaluation has none."""
    dataset = make_dataset(augment=AUGMENT)
    plain = {
        name: load_volume(tmp_path / f"{name}.nii", modalities["T1"]) for name in [*map(str, range(NUM)), "shared"]
    }
    batches = list(batches_of(dataset, batch_size=2, num_steps=8))
    for left, right in zip(batches[3:], batches_of(dataset, batch_size=2, num_steps=8, start_step=3), strict=True):
        assert_equal(left, right)
    epochs = [{}, {}]
    for step, batch in enumerate(batches):
        for b, i in enumerate(conversations_of(batch)[0]):
            row = dataset.encoded[i]
            for start, image in zip(row.image_starts, row.images, strict=True):
                if image.modality == "T1":  # sorts before rsfMRI, so its features come first
                    slot = batch.feature_idx[0, b, start] // modalities["T1"].num_patches
                    epochs[step // 4][i, image.path.stem] = batch.volumes["T1"][0, slot]
    for changed in epochs:
        assert len({volume.tobytes() for volume in changed.values()}) == 2 * NUM
        assert not any(np.array_equal(volume, plain[name]) for (_, name), volume in changed.items())
    assert not any(np.array_equal(volume, epochs[1][key]) for key, volume in epochs[0].items())
    evaluated = make_dataset(evaluation=True)
    for _, batch in eval_batches(evaluated, 2, prompts=False):
        assert {v.tobytes() for v in batch.volumes["T1"] if v.any()} <= {v.tobytes() for v in plain.values()}


def test_augmentation_on_cached_volumes(make_dataset, tmp_path):
    plain = list(batches_of(make_dataset(augment=AUGMENT), batch_size=2))
    for _ in range(2):  # fill the cache, then read it
        cached = make_dataset(augment=AUGMENT, sources=VolumeCache(tmp_path / "cache"))
        for left, right in zip(plain, batches_of(cached, batch_size=2), strict=True):
            assert_equal(left, right)


def test_a_flip_of_a_volume_without_orientation_is_rejected(record, write_json, tokenizer, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((6, 7, 5), np.float32))
    path = write_json("data.json", [record([("user", ["T1:a.npy"]), ("assistant", ["yes"])])])
    modalities = {"T1": ModalityConfig(size=(6, 7, 5), patch=(3, 2, 4), orientation="as_stored")}
    options = {"max_length": 200, "threads": 1}
    Dataset.load(path, tokenizer, modalities, **options)
    with pytest.raises(DataError, match=r"a\.npy: left_right_flip: its orientation is unknown"):
        Dataset.load(path, tokenizer, modalities, augment=AugmentConfig(left_right_flip=0.5), **options)


def test_a_file_of_two_modalities_has_the_axes_of_each(record, write_json, tokenizer, tmp_path):
    nib.save(nib.Nifti1Image(np.ones((6, 7, 5), np.float32), np.diag([-1, 1, 1, 1])), tmp_path / "a.nii")
    path = write_json("data.json", [record([("user", ["T1:a.nii", "fMRI:a.nii"]), ("assistant", ["yes"])])])
    geometry = {"size": (6, 7, 5), "patch": (3, 2, 4)}
    modalities = {
        "T1": ModalityConfig(**geometry, orientation="as_stored"),
        "rsfMRI": ModalityConfig(**geometry),
    }
    augment = AugmentConfig(left_right_flip=0.5)
    dataset = Dataset.load(path, tokenizer, modalities, max_length=200, threads=1, augment=augment)
    assert dataset.axes == {(tmp_path / "a.nii", "T1"): "LAS", (tmp_path / "a.nii", "rsfMRI"): "RAS"}


@pytest.mark.parametrize("prompts", [False, True])
def test_a_partial_evaluation_has_the_shapes_of_the_whole(make_dataset, prompts):
    """Every requested conversation comes once, and no shape is new."""
    dataset = make_dataset(evaluation=True)
    whole = {batch.input_ids.shape for _, batch in eval_batches(dataset, 2, prompts=prompts)}
    for only in ([3], [0, 5, 6], range(NUM), []):
        found = list(eval_batches(dataset, 2, prompts=prompts, only=only))
        assert sorted(index for indices, _ in found for index in indices) == sorted(only)
        assert {batch.input_ids.shape for _, batch in found} <= whole
        rows = dataset.rows(prompts=prompts)
        for indices, batch in found:
            assert batch.lengths.tolist()[: len(indices)] == [len(rows[i]) for i in indices]


def test_a_subset_has_whole_batches_of_each_shape(make_dataset):
    dataset = make_dataset(evaluation=True)
    batches = list(eval_batches(dataset, 2, prompts=True))
    shapes = {str(jax.tree.map(np.shape, batch)) for _, batch in batches}
    sizes = []
    for count in range(1, NUM + 2):
        chosen = eval_subset(dataset, 2, count)
        assert chosen == sorted(set(chosen)) == eval_subset(dataset, 2, count)
        taken = [(set(indices), batch) for indices, batch in batches if set(indices) & set(chosen)]
        assert set().union(*(indices for indices, _ in taken)) == set(chosen), "whole batches"
        assert {str(jax.tree.map(np.shape, batch)) for _, batch in taken} == shapes
        assert len(chosen) >= min(count, NUM)
        sizes.append(len(chosen))
    assert sizes == sorted(sizes)
    assert sizes[0] < NUM
    assert sizes[-1] == NUM
