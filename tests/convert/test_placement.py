"""Each process reads only the regions of its own devices, once, and arrays share no memory that one may change."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.config_json import read_config
from convert.from_hf import LoadPlan, load_params, plan_loading
from convert.lazy_tensor import Index, Tensor, add_product, place, stack_tensors
from umbrella_jax.models.paths import modality_of

ROOT = Path(__file__).parents[2]
if __name__ != "__main__":
    from tests.helpers.checkpoints import write_umbrella  # imports PyTorch, which takes the child processes seconds

Region = tuple[tuple[int, int], ...]


def counted(array: np.ndarray, read: list[Region]) -> Tensor:
    """Return the array as an unread tensor; `read` collects the regions that are read."""

    def fill(out: np.ndarray, index: Index) -> None:
        assert out.shape == tuple(i.stop - i.start for i in index)
        read.append(tuple((i.start, i.stop) for i in index))
        np.copyto(out, array[index], casting="unsafe")

    return Tensor(array.shape, array.dtype.name, fill, "counted")


def times(shape: Sequence[int], read: list[Region]) -> np.ndarray:
    """Return how often each element was read."""
    count = np.zeros(shape, int)
    for region in read:
        count[tuple(slice(*bounds) for bounds in region)] += 1
    return count


def random(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


SPECS = {
    "axis 0": PartitionSpec("x"),
    "axis 0 over all": PartitionSpec(("x", "y")),
    "axis 1": PartitionSpec(None, "y"),
    "both": PartitionSpec("x", "y"),
    "both the other way": PartitionSpec("y", "x"),
    "replicated": PartitionSpec(),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_sharded(mesh: Mesh, spec: PartitionSpec, dtype: str) -> None:
    """Values are as `device_put` places them; each number is read once, however many devices hold it."""
    array, read = random((8, 24)), []
    sharding = NamedSharding(mesh, spec)
    placed = place({"a": counted(array, read).astype(dtype)}, lambda path, shape: sharding)["a"]
    expected = array if dtype == "auto" else array.astype(np.dtype(dtype))
    assert placed.sharding == sharding
    assert placed.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(placed), expected)
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    assert (times(array.shape, read) == 1).all()
    assert len(read) == len({str(shard.index) for shard in placed.addressable_shards})


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec("y"), PartitionSpec(None, "x"), PartitionSpec(None, None, "x"), PartitionSpec("y", None, "x")],
)
def test_stacked(mesh: Mesh, spec: PartitionSpec) -> None:
    """Layers are on axis 0: a device reads only its part of its own layers."""
    layers = [random((4, 12)) + i for i in range(6)]
    read: list[list[Region]] = [[] for _ in layers]
    tensor = stack_tensors([counted(layer, r) for layer, r in zip(layers, read, strict=True)]).astype("bfloat16")
    found = place({"a": tensor}, lambda path, shape: NamedSharding(mesh, spec))["a"]
    expected = np.stack(layers).astype(ml_dtypes.bfloat16)
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    for regions in read:
        assert (times((4, 12), regions) == 1).all()


def test_adapters_are_added_a_layer_at_a_time(mesh: Mesh) -> None:
    """Float32 copies of a whole stack would take several times the memory of the stack."""
    read = list[Region]()
    w, a, b = random((4, 8, 6), ml_dtypes.bfloat16), random((4, 3, 6)), random((4, 8, 3))
    tensor = add_product(counted(w, read), Tensor.from_array(a), Tensor.from_array(b), 2.0)
    found = place({"a": tensor}, lambda path, shape: NamedSharding(mesh, PartitionSpec(None, "x", "y")))["a"]
    np.testing.assert_array_equal(found, (w.astype(np.float32) + 2 * (b @ a)).astype(w.dtype))
    assert (times(w.shape, read) == 1).all()
    assert {stop - start for (start, stop), *_ in read} == {1}


def test_some_devices_alone(mesh: Mesh) -> None:
    """One call places tensors on a mesh of half of the devices and on a single device."""
    arrays = {"half": random((4, 6)), "one": random((3, 5)), "scalar": random(()), "empty": random((0, 3))}
    read: dict[str, list[Region]] = {name: [] for name in arrays}
    half = NamedSharding(Mesh(np.array(jax.devices()[4:]), ("x",)), PartitionSpec("x"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    asked = []

    def where(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        asked.append((path, shape))
        return half if path == "half" else one

    placed = place({name: counted(array, read[name]) for name, array in arrays.items()}, where)
    assert sorted(asked) == sorted((name, array.shape) for name, array in arrays.items())
    assert list(placed) == list(arrays)
    for name, array in arrays.items():
        assert placed[name].devices() == (set(jax.devices()[4:]) if name == "half" else {jax.devices()[5]})
        np.testing.assert_array_equal(np.asarray(placed[name]), array)
        assert (times(array.shape, read[name]) == 1).all()


def test_axis_that_the_devices_do_not_divide(mesh: Mesh) -> None:
    array, read = random((6, 5)), []
    with pytest.raises(ValueError, match="evenly divide"):
        place({"a": counted(array, read)}, lambda path, shape: NamedSharding(mesh, PartitionSpec("x")))
    assert read == []


# Donation.


def _write(x: jax.Array, value: jax.Array) -> jax.Array:
    return x.at[:].set(value)


def test_a_replica_may_be_given_away(mesh: Mesh) -> None:
    """Devices may share one NumPy buffer, so a step that donates its argument must not write there."""
    array = random((512, 256))  # aligned and large, which XLA's CPU backend uses without a copy
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = place(
        {"a": Tensor.from_array(array.copy()), "b": Tensor.from_array(array.copy())}, lambda path, shape: replicated
    )
    write = jax.jit(_write, donate_argnums=0)
    shards = [shard.data for shard in placed["a"].addressable_shards]
    assert len({shard.unsafe_buffer_pointer() for shard in shards}) == 1, "else there is nothing to be seen here"
    given, *kept = shards
    jax.block_until_ready(write(given, jnp.zeros((), given.dtype)))
    assert given.is_deleted()
    for shard in kept:
        np.testing.assert_array_equal(np.asarray(shard), array)

    whole = jax.jit(_write, donate_argnums=0, out_shardings=replicated)(placed["b"], jnp.ones(()))
    for shard in whole.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.ones_like(array))


def test_a_tensor_in_memory_is_not_given_away_with_its_copy() -> None:
    """Donating a placed tensor does not change the JAX or NumPy array that it came from."""
    array = random((512, 256))
    kept = jax.device_put(array, jax.devices()[0])
    for source in (array, kept):
        before = np.array(source)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        found = place({"a": Tensor.from_array(source)}, lambda path, shape, one=one: one)["a"]
        jax.block_until_ready(jax.jit(_write, donate_argnums=0)(found, jnp.zeros(())))
        np.testing.assert_array_equal(np.asarray(source), before)


def test_parameters_may_be_given_away_over_and_over(tmp_path: Path, mesh: Mesh) -> None:
    """A training step donates all parameters; other parameters and the files stay unchanged."""
    write_umbrella(tmp_path)
    config = read_config(tmp_path)
    replicated = NamedSharding(mesh, PartitionSpec())
    expected = {path: np.asarray(leaf) for path, leaf in load_params(tmp_path, config)[0].items()}
    params, _ = load_params(tmp_path, config, sharding_for=lambda path, shape: replicated)
    double = jax.jit(lambda part: {path: leaf * 2 for path, leaf in part.items()}, donate_argnums=0)
    part = {path: params.pop(path) for path in list(params)[::2]}
    for _ in range(3):
        part = double(part)
    for path, leaf in (part | params).items():
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[path] * (8 if path in part else 1))
    again, _ = load_params(tmp_path, config)
    for path, leaf in again.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path])


# Two processes: each runs this file as a program.


def axis_of(shape: Sequence[int]) -> int | None:
    """Return the axis that two devices split: the last one that 2 divides, if there are two or more axes."""
    return next((i for i in reversed(range(len(shape))) if shape[i] % 2 == 0), None) if len(shape) > 1 else None


def child(directory: str, port: str, process: str, out: str) -> None:
    """Load with every matrix split over two processes; write the regions read, and the parameters that both hold."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    assert (len(jax.local_devices()), len(jax.devices())) == (1, 2)
    read: dict[str, int] = {}
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def where(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axis = axis_of(shape)
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "x"))

    def watched(path: str, tensor: Tensor) -> Tensor:
        def fill(into: np.ndarray, index: Index) -> None:
            read[path] = read.get(path, 0) + into.size
            tensor.fill(into, index)

        return Tensor(tensor.shape, tensor.dtype, fill, tensor.file)

    plan = plan_loading(directory, read_config(directory))
    leaves = {path: [(e, watched(path, t)) for e, t in sources] for path, sources in plan.leaves.items()}
    params = place(LoadPlan(leaves, plan.initial_weights, plan.tied_copy, plan.summary).params(), where)
    for path, leaf in params.items():
        own = leaf.addressable_shards[0].data
        assert own.size * (1 if axis_of(leaf.shape) is None else 2) == leaf.size, path
    whole = jax.jit(lambda params: params, out_shardings=NamedSharding(mesh, PartitionSpec()))(params)
    np.savez(out, **{path: np.asarray(leaf) for path, leaf in whole.items()})
    Path(f"{out}.json").write_text(json.dumps(read))


@pytest.mark.slow
def test_two_processes_read_half_each(tmp_path: Path) -> None:
    write_umbrella(tmp_path / "base", shards=2)
    expected = {
        path: np.asarray(a) for path, a in load_params(tmp_path / "base", read_config(tmp_path / "base"))[0].items()
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
    }
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.convert.test_placement", tmp_path / "base", str(port), str(i), out],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, out in enumerate(outs)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    for out in outs:
        arrays = dict(np.load(out))
        assert arrays.keys() == expected.keys()
        for path, array in expected.items():
            assert arrays[path].dtype == array.dtype
            np.testing.assert_array_equal(arrays[path], array)
        read = json.loads(Path(f"{out}.json").read_text())
        assert read.keys() == expected.keys()
        split = 0
        for path, array in expected.items():
            # a patch kernel has another shape in the file, so any region needs all of it
            whole = axis_of(array.shape) is None or (modality_of(path) is not None and path.endswith("T1_proj.weight"))
            assert read[path] == (array.size if whole else array.size // 2), path
            split += not whole
        assert split > 20


if __name__ == "__main__":
    child(*sys.argv[1:])
