"""A checkpoint restores every bit, on any devices, and the newest intact one is found."""

import dataclasses
import gc
import itertools
import shutil
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.helpers.training_case import as_bytes, small_case, to_numpy, total_bytes
from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.errors import CheckpointError
from umbrella_jax.run import resumption
from umbrella_jax.training.checkpoint import Checkpoints, checksums, param_shapes, restore_params, save_params
from umbrella_jax.training.step import TrainState

META = {"config": {"train": {"groups": {"patch_embed": {"weight_decay": 0.01}}}}, "note": "µ", "none": None}
ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
EVERYWHERE = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())


@pytest.fixture(scope="module")
def empty():
    """Return a state before the first step, as the structure to restore into."""
    return small_case().state()


@pytest.fixture
def filled(empty):
    """`filled(step)` returns a state with random leaves, moments and counts included."""

    def fill(step):
        rng = np.random.default_rng(step)
        random = lambda leaf: jnp.asarray(rng.normal(scale=100, size=leaf.shape), leaf.dtype)  # noqa: E731
        return replace(jax.tree.map(random, empty), step=jnp.int32(step))

    return fill


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]
    assert as_bytes(state) == as_bytes(expected)


def test_round_trip_is_bit_for_bit(tmp_path, empty, filled):
    """Even if the buffers are donated as soon as `save` returns, as the next step does."""
    expected = to_numpy(filled(7))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        state = filled(7)
        checkpoints.save(state, META)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    assert len(jax.tree.leaves(expected.opt_state)) == 2 + 2 * 3, "counts and moments"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 7
        assert checkpoints.meta(7) == META
        assert_same(checkpoints.restore(7, empty), expected)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 7
        assert_same(checkpoints.restore_trainable(7, lambda path, shape: ONE_DEVICE), expected.trainable)


def test_every_reader_finds_the_same_damage(tmp_path, empty, filled):
    """Each file of a checkpoint is removed, emptied or overwritten: resuming and answering both work or both refuse.

    The exception is a data file of only moments, which answering does not read.
    """
    with Checkpoints(tmp_path / "good") as checkpoints:
        checkpoints.save(filled(1), META)
    files = [file.relative_to(tmp_path / "good") for file in (tmp_path / "good").rglob("*") if file.is_file()]
    readers = (
        lambda c: c.restore(1, empty),
        lambda c: c.restore_trainable(1, lambda path, shape: ONE_DEVICE),
    )
    refusing = set()
    for file in files:
        for number, damage in enumerate((lambda _: None, lambda _: b"", lambda content: b"\0" * len(content))):
            copy = shutil.copytree(
                tmp_path / "good", tmp_path / f"{len(refusing)}-{number}-{file.name}-{file.parent.name}"
            )
            content = damage((copy / file).read_bytes())
            (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
            refused = []
            with Checkpoints(copy, read_only=True) as checkpoints:
                for read in readers:
                    try:
                        read(checkpoints)
                    except CheckpointError:
                        refused.append(read)
            going_on, answering = (read in refused for read in readers)
            assert going_on == answering or (going_on and file.parent.name == "d"), (file, number)
            if refused:
                refusing.add(file.name)
    assert {"_sharding", "_METADATA", "metadata", "manifest.ocdbt"} <= refusing


def test_a_clock_that_is_set_forward(tmp_path, empty, filled, monkeypatch):
    """The clock advances two hours at every call, and nothing times out."""
    hours = itertools.count(step=7200)
    monkeypatch.setattr(time, "time", lambda: 1e9 + next(hours))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(filled(1), META)
        checkpoints.save(filled(2), META)
        checkpoints.check()
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(2, empty), filled(2))


def test_saves_keep_no_objects(tmp_path, filled):
    """Tensorstore never frees objects that it converts from JSON: more than 300 a save, without our patch of orbax."""

    def objects_after(steps):
        with Checkpoints(tmp_path) as checkpoints:
            for step in steps:
                checkpoints.save(filled(step), META)
        gc.collect()
        return sys.getallocatedblocks()

    before = objects_after(range(1, 4))
    assert objects_after(range(4, 14)) - before < 10 * 100


def test_newest_three_stay(tmp_path, empty, filled):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 4, 8, 16):
            checkpoints.save(filled(step), {"step": step})
    assert {path.name for path in tmp_path.iterdir()} == {"4", "8", "16"}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (4, 8, 16):
            assert_same(checkpoints.restore(step, empty), filled(step))
            assert checkpoints.meta(step) == {"step": step}


def test_newest_and_best_stay_together(tmp_path, empty, filled):
    """A value that is not finite is never the best. A resumed run knows earlier values from `metrics.jsonl`."""
    keep = TrainConfig(keep_latest=2, keep_best=2, best_metric="eval_accuracy/sex")
    values = {1: 0.5, 2: 0.9, 3: np.nan, 4: 0.7, 5: np.inf, 6: None, 7: 0.1}
    lines = [{"step": step, "eval_accuracy/sex": value, "eval_loss": 1.0 * step} for step, value in values.items()]
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        with Checkpoints(tmp_path, keep, lines[: steps[0] - 1]) as checkpoints:
            for step in steps:
                checkpoints.save(filled(step), META, lines[step - 1])
    assert checkpoints.best() == [(2, 0.9), (4, 0.7)]
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4", "6", "7"}
    lowest = dataclasses.replace(keep, keep_best=1, best_metric="eval_loss")
    with Checkpoints(tmp_path, lowest, lines) as checkpoints:
        assert checkpoints.best() == [(2, 2.0)]
        checkpoints.save(filled(8), META, {"eval_loss": 3.0})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "7", "8"}


@pytest.mark.parametrize("part", ["state", "meta", "all", "flipped bit", "json"])
def test_damage_is_named(tmp_path, empty, filled, part):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(filled(2), META)
        checkpoints.save(filled(3), META)
    if part == "flipped bit":
        flip_bits(tmp_path / "3")
        expected = r"3: damaged: (trainable|opt_state)\.\S+: its checksum does not match|3: damaged: state: \w+: "
    elif part == "json":
        file = tmp_path / "3" / "meta" / "metadata"
        file.write_text(file.read_text().replace("0.01", "0.02"))
        expected = "3: damaged: meta: its checksum does not match"
    else:
        for path in [tmp_path / "3"] if part == "all" else [tmp_path / "3" / part]:
            shutil.rmtree(path)
        (tmp_path / "3").mkdir(exist_ok=True)  # orbax takes any directory named by a number for a step
        expected = "3: damaged: (meta|state)"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3, 2]
        with pytest.raises(CheckpointError, match=expected):
            checkpoints.meta(3), checkpoints.restore(3, empty)
        checkpoints.set_aside(3)
        checkpoints.reload()
        assert checkpoints.latest_step() == 2
        assert_same(checkpoints.restore(2, empty), filled(2))
        checkpoints.save(filled(3), META)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_same(checkpoints.restore_trainable(3, lambda path, shape: ONE_DEVICE), filled(3).trainable)
    if part == "flipped bit":
        flip_bits(tmp_path / "3")
        with (
            Checkpoints(tmp_path, read_only=True) as checkpoints,
            pytest.raises(CheckpointError, match="3: damaged: "),
        ):
            checkpoints.restore_trainable(3, lambda path, shape: ONE_DEVICE)


def flip_bits(step):
    """Flip bits in every data file, in each of its arrays."""
    files = [file for file in step.glob("state/ocdbt.process_*/d/*") if file.stat().st_size > 1000]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        for place in range(50, len(content), 400):
            content[place] ^= 16
        file.write_bytes(content)


def test_every_number_counts_in_a_checksum():
    """Every bit, at every position, for every rank; and the sum does not depend on sharding."""
    x = np.random.default_rng(0).normal(size=(8, 3, 5)).astype(np.float32)
    (expected,) = checksums([jnp.asarray(x)]).values()
    seen = {int(expected)}
    for place in ((0, 0, 0), (7, 2, 4), (3, 1, 2)):
        for bit in range(32):
            other = x.copy()
            other.view(np.uint32)[place] ^= np.uint32(1 << bit)
            seen.add(int(checksums([jnp.asarray(other)])["0"]))
    for other in (x[::-1], x[:, ::-1], x[:, :, ::-1], x.swapaxes(0, 1)):
        seen.add(int(checksums([jnp.asarray(other)])["0"]))
    assert len(seen) == 1 + 3 * 32 + 4
    for where in (EVERYWHERE, NamedSharding(EVERYWHERE.mesh, PartitionSpec("data"))):
        assert checksums([jax.device_put(x, where)])["0"] == expected
    assert checksums({"step": jnp.int32(3)}).keys() == {"step"}


def test_a_checkpoint_is_as_large_as_its_arrays(tmp_path):
    state = TrainState(
        step=jnp.int32(1),
        skipped=jnp.int32(0),
        trainable={"a": jax.random.normal(jax.random.key(0), (1024, 512))},
        opt_state=[jax.random.normal(jax.random.key(i), (1024, 512)) for i in (1, 2)],
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, META)
    files = [file for file in (tmp_path / "1").rglob("*") if file.is_file()]
    assert 0.9 * total_bytes(state) < sum(file.stat().st_size for file in files) < 1.1 * total_bytes(state)


def test_a_step_is_written_once(tmp_path, empty, filled):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(filled(5), META)
        checkpoints.save(replace(filled(6), step=jnp.int32(5)), {"other": True})
        with pytest.raises(CheckpointError, match="step 3 was not saved"):
            checkpoints.save(filled(3), META)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(5, empty), filled(5))
        assert checkpoints.meta(5) == META


def test_one_device_to_eight_and_back(tmp_path, empty, filled):
    assert EVERYWHERE.num_devices == jax.device_count() == 8
    where = EVERYWHERE
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(filled(1), META)
    with Checkpoints(tmp_path / "one") as checkpoints:
        state = checkpoints.restore(1, jax.device_put(empty, where))
    assert_same(state, filled(1))
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding == where
        assert len(leaf.addressable_shards) == 8

    with Checkpoints(tmp_path / "eight") as checkpoints:
        checkpoints.save(state, META)
    with Checkpoints(tmp_path / "eight", read_only=True) as checkpoints:
        trainable = checkpoints.restore_trainable(1, lambda path, shape: ONE_DEVICE)
    assert_same(trainable, filled(1).trainable)
    assert {leaf.sharding for leaf in trainable.values()} == {ONE_DEVICE}


def test_resuming_holds_one_state(tmp_path, empty, filled, monkeypatch):
    """The initial state is freed before the checkpoint is read. Without a checkpoint, it is kept."""
    for check in ("check_same_run", "_describe_new_length"):
        monkeypatch.setattr(resumption, check, lambda *_: None)
    meta, state = {"versions": {}}, jax.tree.map(jnp.copy, empty)
    restore = Checkpoints.restore

    def alone(checkpoints, step, like):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        return restore(checkpoints, step, like)

    monkeypatch.setattr(Checkpoints, "restore", alone)
    with Checkpoints(tmp_path) as checkpoints:
        assert resumption.resume_from(checkpoints, state, meta, {}, print) == (state, None)
        checkpoints.save(filled(3), meta)
    with Checkpoints(tmp_path) as checkpoints:
        restored, pending = resumption.resume_from(checkpoints, state, meta, {}, print)
    assert_same(restored, filled(3))
    assert pending is None


def test_files_left_by_a_killed_save_are_ignored(tmp_path, empty, filled):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(filled(2), META)
    torn = tmp_path / "3.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "_METADATA").write_text("{")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
        assert_same(checkpoints.restore(2, empty), filled(2))
        checkpoints.save(filled(3), META)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        assert_same(checkpoints.restore(3, empty), filled(3))


def test_reading_logs_no_warning(tmp_path, caplog):
    """Of orbax, which announces that a directory is opened read-only; notebooks print it."""
    with Checkpoints(tmp_path, read_only=True):
        assert caplog.messages == []


def test_moments_are_read_only_when_needed(tmp_path, filled, monkeypatch):
    """The moments of a fully trained language model would not fit on one device."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(filled(1), META)
    read, handler = [], ocp.type_handlers.ArrayHandler
    deserialize = handler.deserialize

    def recorded(self, infos, args=None):
        read.extend(info.name for info in infos)
        return deserialize(self, infos, args)

    monkeypatch.setattr(handler, "deserialize", recorded)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        trainable = checkpoints.restore_trainable(1, lambda path, shape: ONE_DEVICE)
    assert sorted(read) == sorted(f"trainable.{path}" for path in trainable)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whole_model_round_trip(tmp_path, dtype):
    params = small_case(dtype=dtype).params
    save_params(tmp_path / "native", params)
    for where in (ONE_DEVICE, EVERYWHERE):
        shapes = param_shapes(tmp_path / "native")
        like = {path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for path, s in shapes.items()}
        loaded = restore_params(tmp_path / "native", like)
        assert_same(loaded, params)
        assert {leaf.sharding for leaf in loaded.values()} == {where}
    assert {str(leaf.dtype) for leaf in params.values()} == {dtype}
