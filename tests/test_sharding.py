"""Eight devices give the numbers of one, each doing its share. They are simulated: see conftest.py."""

import jax
import numpy as np
import pytest
from golden_case import golden_batch, relative
from jax.sharding import Mesh, PartitionSpec
from training_case import QUICK, arrange_volumes, as_bytes, golden_case, rows_of, stack, to_numpy

from umbrella_jax.errors import ConfigError
from umbrella_jax.sharding import make_mesh, put_batch, replicated
from umbrella_jax.training.step import jit_train_step


@pytest.fixture(scope="module")
def batch():
    """Each golden row twice, 8 in all, and its volumes here and there among 8 slots: rows and the volumes that they
    name are on different devices."""
    rows = rows_of(golden_batch(), [0, 1, 2, 3, 3, 2, 1, 0])
    slots = {"T1": [0, None, 1, None, None, 2, None, None], "rsfMRI": [None, None, None, 1, None, 0, None, None]}
    return stack(arrange_volumes(rows, slots))


@pytest.fixture(scope="module")
def runs(batch):
    """{devices: (metrics of three steps, state after them, floating point operations per device and step)}."""
    case, result = golden_case(), {}
    for count in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        state, frozen = jax.device_put((case.state(), case.frozen), replicated(mesh))  # as a run places them
        placed = put_batch(batch, mesh, axis=1)
        # A compiled step takes what it was compiled for alone: the second step's state lies as the first one's did.
        step = jit_train_step.lower(state, frozen, placed, **case.static).compile(QUICK)
        history = []
        for _ in range(3):
            state, metrics = step(state, frozen, placed)
            history.append(to_numpy(metrics))
        result[count] = history, state, step.cost_analysis()["flops"]
    return result


def test_eight_devices_are_one(runs):
    (one_history, one, _), (history, state, _) = runs[1], runs[8]
    for expected, metrics in zip(one_history, history, strict=True):
        assert metrics["supervised_tokens"] == expected["supervised_tokens"] == 40
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    before = golden_case().state().trainable
    for path, leaf in one.trainable.items():
        assert relative(state.trainable[path], np.asarray(leaf)) <= 1e-5, path
        assert relative(leaf, np.asarray(before[path])) > 1e-2, f"{path} moved by more than that"


def test_parameters_are_on_every_device(runs):
    _, state, _ = runs[8]
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_fully_replicated
        shards = as_bytes([shard.data for shard in leaf.addressable_shards])
        assert len(shards) == 8
        assert len(set(shards)) == 1, "every device made the same update"


def test_each_device_computes_an_eighth(runs):
    """10 % more at most: the vision tower and the language model are both split, and nothing is made eight times."""
    assert runs[8][2] <= 1.1 * runs[1][2] / 8


def test_mesh_has_all_devices():
    assert make_mesh().size == jax.device_count() == 8


@pytest.mark.parametrize("axis", [0, 1])
def test_batch_is_split(batch, axis):
    """Eight different parts on eight devices, of every array; behind the micro-batch axis for a training step."""
    batch = batch if axis else jax.tree.map(lambda leaf: leaf[0], batch)
    on_devices = put_batch(batch, make_mesh(), axis=axis)
    leaves = list(zip(jax.tree.leaves(on_devices), jax.tree.leaves(batch), strict=True))
    assert len(leaves) == 7 + 2
    for leaf, expected in leaves:
        assert leaf.sharding.spec == PartitionSpec(*[None] * axis, "data")
        assert {shard.device for shard in leaf.addressable_shards} == set(jax.devices())
        for shard in leaf.addressable_shards:
            part = np.split(expected, 8, axis)[shard.device.id]
            np.testing.assert_array_equal(shard.data, part)


@pytest.mark.parametrize(("leaf", "size"), [("rows", 6), ("volumes", 12)])
def test_what_cannot_be_split_is_refused(batch, leaf, size):
    """Rows and volumes alike: XLA would otherwise be handed uneven parts."""
    if leaf == "rows":
        batch = rows_of(jax.tree.map(lambda x: x[0], batch), range(6))
    else:
        batch = jax.tree.map(lambda x: x[0], batch)
        batch = batch.replace(volumes={"T1": np.concatenate([batch.volumes["T1"]] * 2)[:12]})
    with pytest.raises(ConfigError, match=f"{size} rows cannot be split over 8 devices"):
        put_batch(stack(batch), make_mesh(), axis=1)
