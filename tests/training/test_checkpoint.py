"""A checkpoint gives back every bit, on whatever devices, and the newest whole one is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from training_case import as_bytes, small_case, to_numpy

from umbrella_jax.errors import CheckpointError
from umbrella_jax.training.checkpoint import Checkpoints, load_params, param_shapes, save_params

META = {"config": {"train": {"groups": {"patch_embed": {"weight_decay": 0.01}}}}, "note": "µ", "none": None}
ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
EVERYWHERE = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())


@pytest.fixture(scope="module")
def empty():
    """A state before the first step: the structure to restore into."""
    return small_case().state()


@pytest.fixture
def filled(empty):
    """`filled(step)`: a state whose every leaf is random, moments and counts too."""

    def fill(step):
        rng = np.random.default_rng(step)
        random = lambda leaf: jnp.asarray(rng.normal(scale=100, size=leaf.shape), leaf.dtype)  # noqa: E731
        return jax.tree.map(random, empty).replace(step=jnp.int32(step))

    return fill


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]
    assert as_bytes(state) == as_bytes(expected)


def test_round_trip_is_bit_for_bit(tmp_path, empty, filled):
    """Also where the buffers are given away as soon as `save` returns, as the next step does."""
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


def test_newest_three_stay(tmp_path, empty, filled):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 4, 8, 16):
            checkpoints.save(filled(step), {"step": step})
    assert {path.name for path in tmp_path.iterdir()} == {"4", "8", "16"}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (4, 8, 16):
            assert_same(checkpoints.restore(step, empty), filled(step))
            assert checkpoints.meta(step) == {"step": step}


def test_a_step_is_written_once(tmp_path, empty, filled):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(filled(5), META)
        checkpoints.save(filled(6).replace(step=jnp.int32(5)), {"other": True})
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


def test_what_a_killed_save_leaves_is_not_seen(tmp_path, empty, filled):
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whole_model_round_trip(tmp_path, dtype):
    params = small_case(dtype=dtype).params
    save_params(tmp_path / "native", params)
    for where in (ONE_DEVICE, EVERYWHERE):
        shapes = param_shapes(tmp_path / "native")
        like = {path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for path, s in shapes.items()}
        loaded = load_params(tmp_path / "native", like)
        assert_same(loaded, params)
        assert {leaf.sharding for leaf in loaded.values()} == {where}
    assert {str(leaf.dtype) for leaf in params.values()} == {dtype}
