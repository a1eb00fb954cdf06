"""The order of a run: every conversation once an epoch, the same after a resume; faults reach the caller."""

from collections import Counter
from itertools import islice

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.data.loader import Dataset, eval_batches, num_steps, train_batches
from umbrella_jax.errors import DataError

NUM = 7


@pytest.fixture
def make_dataset(nifti, record, write_json, tokenizer, modalities):
    """`make_dataset(evaluation=...)`: 7 conversations, told apart by the length of their answers."""

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


def seen(batch):
    """Indices of the conversations of a batch with leading axis A, row by row: answers have i + 2 tokens."""
    return [[int(mask.sum()) - 2 for mask in micro] for micro in batch.target_mask]


def test_load(make_dataset, tmp_path):
    dataset = make_dataset()
    assert len(dataset) == len(dataset.encoded) == NUM
    assert dataset.prompts == ()
    counts = {image.path.name: count for image, count in dataset.windows.items()}
    assert counts == {**{f"{i}.nii": 1 for i in range(NUM)}, "shared.nii": 1, "run.nii.gz": 10}


def test_each_conversation_once_an_epoch(make_dataset):
    options = {"batch_size": 2, "accumulate_steps": 1, "seed": 5, "start_step": 0, "num_steps": 14, "threads": 2}
    batches = list(train_batches(make_dataset(), **options))
    assert len(batches) == 14
    order = [i for batch in batches for row in seen(batch) for i in row]
    epochs = [order[k : k + NUM] for k in range(0, len(order), NUM)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # each in its own order
    other = list(train_batches(make_dataset(), **{**options, "seed": 6}))
    assert [seen(b) for b in other] != [seen(b) for b in batches]


def assert_equal(left, right):
    for name in ("input_ids", "positions", "feature_idx", "lengths", "target_pos", "target_ids", "target_mask"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.volumes.keys() == right.volumes.keys()
    for name in left.volumes:
        np.testing.assert_array_equal(left.volumes[name], right.volumes[name])


@pytest.mark.parametrize("threads", [1, 3])
def test_resumed_is_continued(make_dataset, threads):
    dataset = make_dataset()
    options = {"batch_size": 2, "accumulate_steps": 2, "seed": 5, "num_steps": 9}
    whole = list(train_batches(dataset, **options, start_step=0, threads=2))
    resumed = list(train_batches(dataset, **options, start_step=4, threads=threads))
    assert len(resumed) == 5
    for left, right in zip(whole[4:], resumed, strict=True):
        assert_equal(left, right)


def test_accumulated_micro_batches(make_dataset, modalities):
    options = {"batch_size": 2, "seed": 5, "start_step": 0, "threads": 1}
    dataset = make_dataset()
    one = list(train_batches(dataset, **options, accumulate_steps=1, num_steps=6))
    three = list(train_batches(dataset, **options, accumulate_steps=3, num_steps=2, divisor=3))
    for step, batch in enumerate(three):
        assert batch.input_ids.shape == (3, 2, 64)
        assert batch.lengths.shape == (3, 2)
        assert batch.target_pos.shape == (3, 2, batch.target_ids.shape[2])
        for a in range(3):
            single = one[3 * step + a]
            np.testing.assert_array_equal(batch.input_ids[a], single.input_ids[0])
            for modality, volumes in single.volumes.items():
                used = [v for v in volumes[0] if v.any()]
                assert batch.volumes[modality].shape == (
                    3,
                    batch.volumes[modality].shape[1],
                    *modalities[modality].size,
                )
                assert batch.volumes[modality].shape[1] % 3 == 0
                np.testing.assert_array_equal(batch.volumes[modality][a][: len(used)], used)


def test_a_step_without_a_modality_has_no_entry_for_it(make_dataset):
    options = {"batch_size": 1, "accumulate_steps": 1, "seed": 5, "start_step": 0, "num_steps": NUM, "threads": 1}
    for batch in train_batches(make_dataset(), **options):
        assert set(batch.volumes) == ({"T1", "rsfMRI"} if seen(batch)[0][0] in (1, 2, 5) else {"T1"})


def test_an_epoch_draws_one_window_of_a_run(make_dataset):
    dataset = make_dataset()
    options = {"batch_size": 1, "accumulate_steps": 1, "start_step": 0, "num_steps": 8 * NUM, "threads": 2}
    windows = []
    epoch = Counter()
    for step, batch in enumerate(train_batches(dataset, **options, seed=5)):
        if "rsfMRI" in batch.volumes:
            epoch[batch.volumes["rsfMRI"].tobytes()] += 1
        if step % NUM == NUM - 1:
            ((window, count),) = epoch.items()  # one window, shown by three conversations
            assert count == 3
            windows.append(window)
            epoch.clear()
    assert len(set(windows)) > 2  # and another one in another epoch


def test_eval_batches_in_order_and_of_one_shape(make_dataset):
    dataset = make_dataset(evaluation=True)
    for prompts in (False, True):
        found = list(eval_batches(dataset, 3, prompts=prompts, divisor=2))
        assert [indices for indices, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
        assert len({tuple(v.shape for v in (b.input_ids, b.target_pos, *b.volumes.values())) for _, b in found}) == 1
        assert all(set(batch.volumes) == {"T1", "rsfMRI"} for _, batch in found)
        rows = dataset.prompts if prompts else dataset.encoded
        for indices, batch in found:
            for b, i in enumerate(indices):
                assert batch.lengths[b] == len(rows[i])
                np.testing.assert_array_equal(batch.input_ids[b, : len(rows[i])], rows[i].input_ids)
        assert found[-1][1].lengths[1:].tolist() == [1, 1]


def test_eval_takes_the_first_window(make_dataset, modalities):
    from umbrella_jax.data.volume import load_volume

    dataset = make_dataset(evaluation=True)
    (image,) = (i for i in dataset.windows if i.modality == "rsfMRI")
    _, batch = next(eval_batches(dataset, 2, prompts=True))
    np.testing.assert_array_equal(batch.volumes["rsfMRI"][0], load_volume(image.path, modalities["rsfMRI"], 0))


def test_answers_may_be_empty_at_evaluation_only(make_dataset):
    answers = ["x"] * (NUM - 1) + [""]
    assert len(make_dataset(answers, evaluation=True).prompts) == NUM
    with pytest.raises(DataError, match=r"data\.jsonl:7"):
        make_dataset(answers)


def test_prompts_of_training_data_are_refused(make_dataset):
    with pytest.raises(DataError, match="evaluation=True"):
        eval_batches(make_dataset(), 2, prompts=True)


def test_texts_and_volumes_are_refused_together(nifti, record, write_json, tokenizer, modalities, tmp_path):
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


def test_options_of_load_reach_their_place(nifti, record, write_json, tokenizer, modalities, tmp_path):
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
    (tmp_path / "images/r.nii").unlink()  # no conversation that is kept shows it
    (kept,) = Dataset.load(path, tokenizer, modalities, **common, modality="sMRI", task_filter="T1").conversations
    assert kept.source.endswith("data.json[0]")


def test_a_volume_that_breaks_during_the_run_reaches_the_caller(make_dataset, tmp_path):
    dataset = make_dataset()
    (tmp_path / "3.nii").write_bytes(b"")
    options = {"batch_size": 1, "accumulate_steps": 1, "seed": 5, "start_step": 0, "num_steps": NUM, "threads": 3}
    with pytest.raises(DataError, match=r"3\.nii: cannot be read"):
        list(train_batches(dataset, **options))
    dataset = make_dataset(evaluation=True)
    nib.save(nib.Nifti1Image(np.ones((6, 7), np.float32), np.eye(4)), tmp_path / "3.nii")
    batches = eval_batches(dataset, 3, prompts=False)
    assert next(batches)[0] == [0, 1, 2]  # those before it are fine
    with pytest.raises(DataError, match=r"3\.nii: shape \(6, 7\)"):
        next(batches)


def test_a_run_may_be_left_early(make_dataset):
    options = {"batch_size": 2, "accumulate_steps": 1, "seed": 5, "start_step": 0, "num_steps": 10**9, "threads": 2}
    assert len(list(islice(train_batches(make_dataset(), **options), 3))) == 3


@pytest.mark.parametrize(
    ("conversations", "epochs", "batch", "accumulate", "expected"),
    [(10, 1, 2, 1, 5), (11, 1, 2, 1, 6), (11, 2, 2, 1, 11), (11, 3, 2, 4, 5), (100, 0.07, 1, 1, 7), (3, 0.5, 8, 1, 1)],
)
def test_num_steps(conversations, epochs, batch, accumulate, expected):
    assert num_steps(conversations, epochs, batch, accumulate) == expected
