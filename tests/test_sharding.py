"""Eight devices give the numbers of one on every mesh, each doing and holding its share. Simulated: see conftest.py."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests.helpers.golden_case import relative
from tests.helpers.mesh_case import (
    DH,
    HEADS,
    KV_HEADS,
    MODEL,
    PATCHES,
    B,
    D,
    E,
    F,
    G,
    K,
    T,
    V,
    mesh_batch,
    mesh_case,
    micro_batch,
)
from tests.helpers.training_case import QUICK, stack, to_numpy
from umbrella_jax.batch import Batch, NumberTargets
from umbrella_jax.config.schema import MeshConfig, NumberLossConfig
from umbrella_jax.data.answer_trees import answer_trees
from umbrella_jax.errors import ConfigError
from umbrella_jax.inference.generate import decode, prefill, score_answers
from umbrella_jax.models import Params, abstract_params, merge
from umbrella_jax.models.paths import UNUSED, component_of
from umbrella_jax.sharding import (
    RULES,
    MeshShape,
    device_grid,
    make_mesh,
    mesh_shape,
    mesh_shapes,
    parts,
    put_batch,
    shardings,
    spec_of,
)
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.loss import LossSums, loss_sums
from umbrella_jax.training.step import TrainState, jit_train_step

ONE, DATA, FSDP, TENSOR, ALL = (1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)
slow = pytest.mark.slow  # for meshes of one axis, each a program of its own; ALL has the three axes
MESHES = [*(pytest.param(sizes, marks=slow) for sizes in (DATA, FSDP, TENSOR)), ALL]
EMBEDDINGS = "vision_tower.vision_model.embeddings."


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    data, fsdp, tensor = sizes
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices=jax.devices()[: math.prod(sizes)])


@dataclass
class Run:
    """Three steps on a mesh."""

    history: list[dict[str, np.ndarray]]
    first: TrainState
    """After one step, whose moments are the gradient."""
    state: TrainState
    frozen: dict[str, jax.Array]
    compiled: jax.stages.Compiled


def placed(sizes: tuple[int, ...]) -> tuple[TrainState, dict[str, jax.Array]]:
    """Return state and frozen parameters, placed on a mesh as a run places them."""
    case, mesh = mesh_case(), mesh_of(sizes)
    tree = case.state(), case.frozen
    result: tuple[TrainState, dict[str, jax.Array]] = jax.device_put(tree, shardings(tree, mesh))
    return result


Runs = Callable[[tuple[int, ...]], Run]


@pytest.fixture(scope="module")
def run_on() -> Runs:
    """Return `run_on(sizes)`, which runs once on each mesh."""

    @cache
    def make(sizes: tuple[int, ...]) -> Run:
        (state, frozen), mesh = placed(sizes), mesh_of(sizes)
        with jax.set_mesh(mesh):
            batch = put_batch(mesh_batch(), mesh, axis=1)
            # A compiled step accepts only one sharding: the second step's state has the same as the first's.
            step = jit_train_step().lower(state, frozen, batch, **mesh_case().options).compile(QUICK)
            history, states = [], []
            for _ in range(3):
                state, metrics = step(state, frozen, batch, schedule=mesh_case().schedule)
                history.append(to_numpy(metrics))
                states.append(to_numpy(state))
        return Run(history, states[0], state, frozen, step)

    return make


@pytest.mark.parametrize("sizes", MESHES)
def test_any_mesh_is_one_device(run_on: Runs, sizes: tuple[int, ...]) -> None:
    """Loss, gradient, and three steps."""
    one, run = run_on(ONE), run_on(sizes)
    for expected, metrics in zip(one.history, run.history, strict=True):
        assert metrics["supervised_tokens"] == expected["supervised_tokens"]
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    before = to_numpy(mesh_case().state())
    for ours, theirs in ((run.first, one.first), (run.state, one.state)):
        leaves = zip(*map(jax.tree.leaves_with_path, (ours, theirs, before)), strict=True)
        for (path, leaf), (_, expected), (_, start) in leaves:
            name = jax.tree_util.keystr(path)
            if "rsfMRI" in name:  # which no conversation shows
                np.testing.assert_array_equal(leaf, start, err_msg=name)
            elif name == ".skipped":
                assert int(leaf) == int(expected) == 0
            else:
                assert relative(leaf, np.asarray(expected)) <= 1e-5, name
                assert relative(start, np.asarray(expected)) > 5e-3, f"{name} moved by more than that"


# Memory and work per device.


def sharded_numbers(fsdp: int, tensor: int) -> tuple[int, int]:
    """(frozen, trained) numbers on each device, counted by hand."""
    q, kv = HEADS * DH, KV_HEADS * DH
    matrices = 3 * (4 * E * E + 2 * E * F) + 3 * (2 * D * q + 2 * D * kv + 3 * D * G) + E * D + D * D + V * D
    into_heads = 3 * (3 * E + F) + 3 * (q + 2 * kv) + D  # biases
    stream = 3 * (4 * E + 2 * E) + 2 * E + D + 3 * 2 * D + D  # biases and norms of the residual stream
    norms = 3 * 2 * DH  # of queries and keys
    patch_embed = (30 + 1 + 10) * E + (48 + 1 + 4) * E
    return matrices // (fsdp * tensor) + into_heads // tensor + stream + norms, patch_embed // fsdp


@pytest.mark.parametrize("sizes", [ONE, *MESHES])
def test_bytes_of_each_device(run_on: Runs, sizes: tuple[int, ...]) -> None:
    run, (frozen, trained) = run_on(sizes), sharded_numbers(*sizes[1:])

    def held(tree: Any) -> dict[jax.Device, int]:
        bytes_of = dict.fromkeys(mesh_of(sizes).devices.flat, 0)
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                bytes_of[shard.device] += shard.data.nbytes
        return bytes_of

    assert set(held(run.frozen).values()) == {4 * frozen}
    assert set(held(run.state.trainable).values()) == {4 * trained}
    moments = [leaf for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim]
    assert set(held(moments).values()) == {2 * 4 * trained}


@pytest.mark.parametrize(
    ("sizes", "room"),
    [*(pytest.param(*case, marks=slow) for case in ((DATA, 1.1), (FSDP, 1.1), (TENSOR, 1.6))), (ALL, 1.2)],
)
def test_each_device_computes_an_eighth(run_on: Runs, sizes: tuple[int, ...], room: float) -> None:
    """And some more, of norms, rope and the ends, at widths as small as here."""
    flops = {s: run_on(s).compiled.cost_analysis()["flops"] for s in (ONE, sizes)}
    assert flops[sizes] <= room * flops[ONE] / 8


# Collectives between devices.


@dataclass(frozen=True)
class Collective:
    kind: str
    axes: str
    """Mesh axes of the collective; empty if it stays on one device."""
    shape: tuple[int, ...]
    """Of the result on each device, without axes of 1."""


def collectives(compiled: jax.stages.Compiled, sizes: tuple[int, ...]) -> set[Collective]:
    """All of a compiled program; several in one, each for itself."""
    grid, axes = np.arange(math.prod(sizes)).reshape(sizes), {}
    for mask in range(8):
        along = [i for i in range(3) if mask >> i & 1]
        name = " ".join(name for i, name in enumerate(("data", "fsdp", "tensor")) if i in along and sizes[i] > 1)
        axes.setdefault(groups_along(grid, along), name)
    call = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*"
    exchanges = set()
    for match in re.finditer(call, compiled.as_text()):
        line, result, kind = match[0], match[1], match[2]
        along = "pairs" if kind == "collective-permute" else axes.get(devices_of(line, grid.size), "others")
        for dims in re.findall(r"\w+\[([\d,]*)\]", result):
            exchanges.add(Collective(kind, along, tuple(int(n) for n in dims.split(",") if n not in ("", "1"))))
    return {c for c in exchanges if c.axes}


def groups_along(grid: np.ndarray, axes: list[int]) -> frozenset[frozenset[int]]:
    """Group the device numbers that differ only along `axes`."""
    rows = np.moveaxis(grid, axes, range(grid.ndim - len(axes), grid.ndim))
    rows = rows.reshape(-1, math.prod(grid.shape[i] for i in axes))
    return frozenset(map(frozenset, rows.tolist()))


def devices_of(line: str, count: int) -> frozenset[frozenset[int]]:
    """What replica_groups means: {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), or mesh['a'=2,'b'=4] {'b'}, where device_ids may
    stand between, as in the second form."""
    text = line[line.index("replica_groups=") + len("replica_groups=") :]
    if listed := re.match(r"\{(\{.*?\})\}", text):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return frozenset(frozenset(map(int, group.split(","))) for group in groups)
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return frozenset(map(frozenset, counted(iota[2], count).reshape(numbers(iota[1])).tolist()))
    mesh = re.match(r"mesh\[(.*?)\](?:, device_ids=\((\S+)\))? \{(.*?)\}", text)
    assert mesh, text[:200]
    sizes = dict(re.findall(r"('\w+')=(\d+)", mesh[1]))
    grid = counted(mesh[2] or f"[{count}]", count).reshape([int(n) for n in sizes.values()])
    return groups_along(grid, [list(sizes).index(axis) for axis in mesh[3].split(",")])


def counted(text: str, count: int) -> np.ndarray:
    """0 to count − 1 as [4,2] or [4,2]T(1,0)."""
    dims, _, order = text.partition("T")
    found = np.arange(count).reshape(numbers(dims))
    return found.transpose(numbers(order)) if order else found


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def matrices(tensor: int) -> set[tuple[int, ...]]:
    """Frozen ones of a layer and of the ends, of which each device has every row and column but those of `tensor`."""
    t, q, kv = tensor, HEADS * DH, KV_HEADS * DH
    vision = {(E // t, E), (E, E // t), (F // t, E), (E, F // t)}
    text = {(q // t, D), (kv // t, D), (D, q // t), (G // t, D), (D, G // t)}
    return vision | text | {(D // t, E), (D, D // t), (V // t, D)}


N = PATCHES["T1"]
TRAINED = {(E, 30), (E,), (N, E)}
SCALAR: set[tuple[int, ...]] = {()}


def stream(rows: int) -> set[tuple[int, ...]]:
    """What layers and the ends add to the residual stream, and the loss over words; of so many rows on each device."""
    return {(rows, N, E), (rows, N, D), (rows, T, D), (rows, K, D), (rows, K)}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # of all the weights, the trained part's gradient
        pytest.param(DATA, {"all-reduce data": TRAINED | SCALAR}, marks=slow),
        # the weights of a layer at a time, never a stack of them; ids, and for them what the table of words has
        pytest.param(
            FSDP,
            {
                "all-gather fsdp": matrices(1) | TRAINED | {(B, T)},
                "all-to-all fsdp": {(T, D // 8)},
                "all-reduce fsdp": TRAINED | SCALAR,
            },
            marks=slow,
        ),
        # no weights
        pytest.param(TENSOR, {"all-reduce tensor": stream(B)}, marks=slow),
        (
            ALL,
            {
                "all-gather fsdp": matrices(2) | {(E,), (N, E), (B // 2, T)},
                "all-to-all fsdp": {(B // 4, T, D // 2)},
                "all-reduce data fsdp": {(E,), (N, E)} | SCALAR,
                "all-reduce fsdp": SCALAR,
                "all-reduce tensor": stream(B // 4),
            },
        ),
    ],
    ids=["data", "fsdp", "tensor", "all"],
)
def test_devices_exchange_only_these_shapes(
    run_on: Runs, sizes: tuple[int, ...], expected: dict[str, set[tuple[int, ...]]]
) -> None:
    found: dict[str, set[tuple[int, ...]]] = {}
    for c in collectives(run_on(sizes).compiled, sizes):
        # fewer kv heads than parts: keys and values are gathered before they are turned, their gradients added up
        few = sizes == TENSOR and math.prod(c.shape) <= B * T * KV_HEADS * DH and c.axes in ("tensor", "others")
        # XLA shares the patch embedding's weight gradient out over `tensor` too
        shared = sizes == ALL and c.shape in ((E, 30), (E // 2, 30))
        if not shared and not (few and c.shape not in stream(B)):
            found.setdefault(f"{c.kind} {c.axes}", set()).add(c.shape)
    assert found == expected


# Shardings of parameters, state and batches.


@pytest.mark.parametrize("tied", [True, False])
def test_one_rule_covers_each_parameter(tied: bool) -> None:
    model = replace(MODEL, text=replace(MODEL.text, tie_word_embeddings=tied))
    for path, leaf in abstract_params(model)[1].items():
        assert [pattern for pattern in RULES if fnmatchcase(path, pattern)] != []
        assert sum(fnmatchcase(path, pattern) for pattern in RULES) == 1, path
        assert len(spec_of(path)) <= leaf.ndim
        if ".layers." in path:
            assert not any(spec_of(path)[:1]), "the axis of layers"
    with pytest.raises(KeyError, match=r"vision_tower\.new\.weight: .* has no rule"):
        spec_of("vision_tower.new.weight")


def test_an_accepted_mesh_divides_every_parameter() -> None:
    shapes = abstract_params(MODEL)[1]
    found = mesh_shapes(16, MODEL, island_size=16)
    assert len(found) > 5
    for mesh in found:
        for path, leaf in shapes.items():
            for size, axis in zip(leaf.shape, spec_of(path), strict=False):
                assert axis is None or size % getattr(mesh, axis) == 0, (mesh, path)


@pytest.mark.parametrize(
    ("axis", "size", "fault"),
    [
        ("fsdp", 5, "mesh.fsdp: 5 does not divide vision width 48; the nearest that does: 4"),
        ("tensor", 16, "mesh.tensor: 16 does not divide vision heads 8, vision MLP 56, text width 40, text heads 8, "),
    ],
)
def test_names_dimensions_that_an_axis_does_not_divide(axis: str, size: int, fault: str) -> None:
    (message,) = MeshShape(**{axis: size}).undivided(MODEL)
    assert message.startswith(fault)
    for what, model in {
        "vision width 52": replace(MODEL, vision=replace(MODEL.vision, hidden_size=52)),
        "text width 44": replace(MODEL, text=replace(MODEL.text, hidden_size=44)),
        "text heads 6": replace(MODEL, text=replace(MODEL.text, num_attention_heads=6)),
        "text keys' width 12": replace(MODEL, text=replace(MODEL.text, num_key_value_heads=3)),
        "vocabulary 105": replace(MODEL, text=replace(MODEL.text, vocab_size=105)),
        "vision MLP 57": replace(MODEL, vision=replace(MODEL.vision, intermediate_size=57)),
        "text MLP 90": replace(MODEL, text=replace(MODEL.text, intermediate_size=90)),
        "vision heads 6": replace(MODEL, vision=replace(MODEL.vision, num_attention_heads=6)),
    }.items():
        assert what in " ".join(MeshShape(fsdp=8, tensor=8).undivided(model))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sizes", [FSDP, ALL])
def test_batch_is_split(sizes: tuple[int, ...], axis: int) -> None:
    """Into a part for each device but those of `tensor`; behind the micro-batch axis for a training step."""
    batch, mesh = mesh_batch() if axis else micro_batch(0, "T1", "rsfMRI"), mesh_of(sizes)
    on_devices, of = put_batch(batch, mesh, axis=axis), sizes[0] * sizes[1]
    where = {device: part for part, group in enumerate(mesh.devices.reshape(of, -1)) for device in group}
    for leaf, expected in zip(jax.tree.leaves(on_devices), jax.tree.leaves(batch), strict=True):
        assert leaf.sharding.spec == PartitionSpec(*[None] * axis, ("data", "fsdp"))
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.split(expected, of, axis)[where[shard.device]])


def test_indivisible_sizes_are_refused() -> None:
    """Volumes too: XLA would otherwise be handed uneven parts."""
    batch = micro_batch(0, "T1")
    batch = replace(batch, volumes={"T1": np.concatenate([batch.volumes["T1"]] * 2)[:12]})
    with pytest.raises(ConfigError, match="12 rows cannot be split over 8 devices; expected a multiple of 8"):
        put_batch(stack(batch), mesh_of(DATA), axis=1)


# Which mesh.


def test_data_takes_the_devices_that_are_left() -> None:
    assert make_mesh(MeshConfig()).shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_shape(MeshConfig(fsdp=4), 64, island_size=16) == MeshShape(data=16, fsdp=4)


@pytest.mark.parametrize(
    ("mesh", "batch_size", "faults"),
    [
        (
            {"data": 4},
            8,
            ["are 4 devices; expected sizes whose product is 16, the nearest: data=16 with fsdp × tensor = 1"],
        ),
        ({"tensor": 3}, 5, ["tensor=3 are 15 devices; expected sizes whose product is 16, the nearest: data=8 with"]),
        (
            {"fsdp": 16},
            16,
            ["are 16 devices, which have to be together; expected a divisor of the 8 of a slice"],
        ),
        ({"fsdp": 2, "tensor": 2}, 9, ["9 rows cannot be split over data × fsdp = 8 devices; the nearest that can: 8"]),
        ({"data": 4}, 6, ["are 4 devices", "6 rows cannot be split over data × fsdp = 4 devices"]),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh: dict[str, int], batch_size: int, faults: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        mesh_shape(MeshConfig(**mesh), 16, island_size=8, batch_size=batch_size)
    assert len(error.value.faults) == len(faults)
    for found, expected in zip(error.value.faults, faults, strict=True):
        assert expected in found


def tpus(slices: int) -> list[Any]:
    """Stand-ins for slices of v5e-16: hosts of 2×2 chips in a torus of 4×4."""
    return [
        SimpleNamespace(
            id=100 * s + 4 * y + x,
            platform="tpu",
            device_kind="TPU v5 lite",
            coords=(x, y, 0),
            core_on_chip=0,
            slice_index=s,
            process_index=4 * s + y // 2 * 2 + x // 2,
        )
        for s in range(slices)
        for y in range(4)
        for x in range(4)
    ]


def test_data_crosses_slices() -> None:
    grid = device_grid(MeshShape(data=4, fsdp=4, tensor=2), tpus(2))
    assert grid.shape == (4, 4, 2)
    assert [{device.slice_index for device in part.flat} for part in grid] == [{0}, {0}, {1}, {1}]
    assert len({device.id for device in grid.flat}) == 32
    with pytest.raises(ConfigError, match=r"tensor=1 are 32 devices, which have to be together; .* the 16 of"):
        make_mesh(MeshConfig(fsdp=32), devices=tpus(2))


@pytest.mark.parametrize("shape", [MeshShape(fsdp=16), MeshShape(fsdp=4, tensor=4)])
def test_neighbours_in_the_mesh_are_near(shape: MeshShape) -> None:
    """Along the inner axes one step of the torus; the order in which jax counts devices is not."""
    grid = device_grid(shape, tpus(1))
    for axis in (1, 2):
        along = np.moveaxis(grid, axis, 0)
        for one, other in zip(along[:-1].flat, along[1:].flat, strict=True):
            steps = [min((a - b) % 4, (b - a) % 4) for a, b in zip(one.coords[:2], other.coords[:2], strict=True)]
            assert sum(steps) == 1


def test_a_process_makes_the_rows_of_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's devices need not be adjacent; if `tensor` spans two processes, both make the same part."""
    for shape, own in {(16, 1, 1): {(0, 1, 6, 15)}, (1, 4, 4): {(0, 1), (2, 3)}}.items():
        grid = device_grid(MeshShape(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))), tpus(1))
        mesh: Any = SimpleNamespace(devices=grid, shape=dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
        processes = []
        for process in range(4):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            processes.append(parts(mesh))
        assert {p.total for p in processes} == {shape[0] * shape[1]}
        assert {part for p in processes for part in p.own} == set(range(shape[0] * shape[1]))
        assert own <= {p.own for p in processes}


# Beyond the training step.


@pytest.mark.parametrize("differentiated", [False, pytest.param(True, marks=slow)])
def test_evaluation_on_a_mesh_is_one_devices(differentiated: bool) -> None:
    """Losses (over numbers too), their gradient by every parameter, and answers, with both modalities in a batch."""
    case, batch = mesh_case(), micro_batch(2, "T1", "rsfMRI")
    candidates = [((7, 5), (9, 3, 5), (9, 4, 5))] * (B - 1) + [()]  # the last row has no number
    numbers = NumberTargets(
        tree=answer_trees(candidates),
        prompt_lengths=np.arange(3, 3 + B, dtype=np.int32),
        errors=np.tile(np.float32([-2, 0.5, 1]), (B, 1)),
        mask=np.tile(np.arange(B)[:, None] < B - 1, (1, 3)),
    )
    batch = replace(batch, numbers=numbers)
    others = replace(batch, feature_idx=np.roll(batch.feature_idx, 1, axis=0))  # each the features of the row before

    def losses(params: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        sums = loss_sums(merge(case.graphdef, params), batch, NumberLossConfig())
        return sums.cross_entropy + 10 * sums.number_errors, sums

    def evaluate(params: Params, batch: Batch) -> tuple[tuple[jax.Array, LossSums], Params]:
        return (
            jax.value_and_grad(losses, has_aux=True)(params, batch) if differentiated else (losses(params, batch), {})
        )

    def answer(params: Params, batch: Batch, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens, and the likelihoods of two answers."""
        static = {"graphdef": case.graphdef}
        state = prefill.__wrapped__(params, batch, max_new_tokens=4, **static)
        scores = score_answers.__wrapped__(params, state, answer_trees([((7, 5), (9, 5))] * B), **static)
        seeds = jnp.zeros(B, jnp.uint32)
        return decode.__wrapped__(params, state, stop, seeds, jnp.int32(4), **static).tokens, scores

    evaluate, answer = (jax.jit(function, compiler_options=QUICK) for function in (evaluate, answer))
    stop, results = np.array([5], np.int32), []
    for sizes in (ONE, ALL):
        mesh = mesh_of(sizes)
        with jax.set_mesh(mesh):
            params = jax.device_put(case.params, shardings(case.params, mesh))
            (loss, sums), grads = evaluate(params, put_batch(batch, mesh, axis=0))
            (nowhere, _), _ = evaluate(params, put_batch(others, mesh, axis=0))
            tokens, scores = answer(params, put_batch(replace(batch, numbers=None), mesh, axis=0), stop)
        count = int(sums.tokens), int(sums.numbers)
        results.append((float(loss), count, to_numpy(grads), np.asarray(tokens), np.asarray(scores)))
        assert np.isnan(nowhere) == (sizes == ALL), "another device's volume must not pass for text"
    (loss, count, grads, tokens, scores), (ours, counted, slopes, answers, scored) = results
    assert counted == count
    assert ours == pytest.approx(loss, rel=1e-5)
    for path, leaf in grads.items():
        if component_of(path) == UNUSED or fnmatchcase(path, "vision_tower.*.k_proj.bias"):
            # which nothing takes, or which moves all scores of a query alike: zero but for rounding
            assert max(np.abs(leaf).max(), np.abs(slopes[path]).max()) < 1e-6, path
        else:
            assert relative(slopes[path], leaf) <= 1e-5, path
    np.testing.assert_array_equal(answers, tokens)
    np.testing.assert_allclose(scored, scores, rtol=1e-5)
    assert len(np.unique(tokens)) > 3


def test_a_checkpoint_continues_on_another_mesh(run_on: Runs, tmp_path: Any) -> None:
    """Bit for bit what was saved, as the new mesh holds it."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run_on(ALL).state, {})
    for sizes in (FSDP, ONE):
        there, _ = placed(sizes)
        with Checkpoints(tmp_path) as checkpoints:
            state = checkpoints.restore(3, there)
        for leaf, like, saved in zip(*map(jax.tree.leaves, (state, there, run_on(ALL).state)), strict=True):
            assert leaf.sharding == like.sharding
            np.testing.assert_array_equal(leaf, saved)
