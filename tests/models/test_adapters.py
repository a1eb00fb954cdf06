"""Adapters: PyTorch's numbers, a start that changes nothing, and the same on any mesh and beside quantized weights."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import qwix
import torch

from convert.rules import hub_name, map_tensors
from convert.torch_model import load_umbrella
from tests.helpers.golden_case import GOLDEN, MODALITIES, golden_batch, golden_model, relative
from tests.helpers.mesh_case import MODEL, mesh_batch
from tests.helpers.training_case import QUICK, loss_and_logits, make_case, to_numpy
from umbrella_jax.config.schema import LORA_TARGETS, GroupConfig, LoraConfig, MeshConfig, TrainConfig
from umbrella_jax.errors import ConfigError
from umbrella_jax.models import abstract_params, lora, merge, quantize
from umbrella_jax.models.paths import adapted_weight, adapter_paths
from umbrella_jax.models.quantize import quantizable
from umbrella_jax.sharding import RULES, make_mesh, mesh_shapes, put_batch, shardings, spec_of
from umbrella_jax.training.freeze import counts, label_params, partition
from umbrella_jax.training.step import jit_train_step

ALL = LoraConfig(rank=3, alpha=6, targets=tuple(LORA_TARGETS))
ROWS = [0, 1]  # two volumes of T1; one of rsfMRI


class Adapted(torch.nn.Module):
    """A Linear with an adapter, as PEFT's `lora.Linear` computes it."""

    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = (torch.nn.Parameter(torch.from_numpy(x)) for x in (a, b))

    def forward(self, x):
        linear = torch.nn.functional.linear
        return self.base(x) + linear(linear(x, self.a), self.b) * self.scale


@pytest.fixture(scope="module")
def case():
    """Return the golden model with a random adapter on every product."""
    config, params = golden_model(remat="none")
    graphdef, shapes = abstract_params(replace(config, lora=ALL))
    rng = np.random.default_rng(0)
    adapters = {
        path: rng.normal(size=leaf.shape, scale=0.1).astype(np.float32)
        for path, leaf in shapes.items()
        if adapted_weight(path)
    }
    assert len(adapters) == 2 * (6 + 2 + 7)
    assert shapes.keys() == params.keys() | adapters.keys()

    @jax.jit
    def run(trainable, frozen):
        def loss(trainable):
            return loss_and_logits(merge(graphdef, trainable | frozen), golden_batch(ROWS))

        grads, logits = jax.grad(loss, has_aux=True)(trainable)
        return logits, grads

    logits, grads = run(adapters, params)
    return SimpleNamespace(
        config=config,
        graphdef=graphdef,
        params=params,
        shapes=shapes,
        adapters=adapters,
        run=run,
        logits=logits,
        grads=grads,
    )


def test_logits_and_gradients_are_pytorchs(case):
    """In float64 there, each row on its own."""
    model = load_umbrella(GOLDEN / "umbrella_T1_rsfMRI", modalities=MODALITIES)
    keys = {hub_name(key): key for key in model.state_dict()}
    modules = {}
    for entry in map_tensors(case.config):
        a, b = (case.adapters.get(path) for path in adapter_paths(entry.path))
        if a is not None and entry.path.endswith("weight"):
            a, b = (x if entry.layer is None else x[entry.layer] for x in (a, b))
            parent, _, name = keys[entry.name].removesuffix(".weight").rpartition(".")
            parent = model.get_submodule(parent)
            modules[entry.path, entry.layer] = Adapted(getattr(parent, name), a, b, 2.0)
            setattr(parent, name, modules[entry.path, entry.layer])
    model = model.double().requires_grad_(False)
    for module in modules.values():
        module.a.requires_grad_(True)
        module.b.requires_grad_(True)

    batch = golden_batch(ROWS)
    for b, name in enumerate(("T1", "rsfMRI")):
        length = batch.lengths[b]
        ids = torch.from_numpy(batch.input_ids[b, :length]).long()[None]
        logits = model(input_ids=ids, pixel_values=torch.from_numpy(batch.volumes[name][:, None]).double()).logits[0]
        assert relative(case.logits[b, :length], logits.detach().numpy()) <= 1e-5
        mask = batch.target_mask[b]
        at, target = (torch.from_numpy(x[b][mask]).long() for x in (batch.target_pos, batch.target_ids))
        torch.nn.functional.cross_entropy(logits[at], target, reduction="sum").backward()
    for path, grad in case.grads.items():
        weight, which = adapted_weight(path), "a" if "lora_A" in path else "b"
        layers = [i for p, i in modules if p == weight]
        expected = [getattr(modules[weight, i], which).grad.numpy() for i in layers]
        assert relative(grad, np.stack(expected) if layers != [None] else expected[0]) <= 1e-5, path


def test_it_starts_as_the_base(case):
    """Bit for bit; A as PEFT's, Kaiming's uniform of ±1/√inputs; and B moves at once, A only after it."""
    start = lora.init_adapters(case.shapes, 7)
    assert start.keys() == case.adapters.keys()
    for path, leaf in start.items():
        assert (leaf.dtype, leaf.shape) == (np.float32, case.shapes[path].shape)
        if "lora_B" in path:
            assert not leaf.any()
        else:
            bound = leaf.shape[-1] ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            assert abs(leaf.std() / bound - 3**-0.5) < 0.1
    forward = jax.jit(lambda params, graphdef: merge(graphdef, params)(golden_batch(ROWS)), static_argnames="graphdef")
    logits = forward(case.params | start, case.graphdef)
    np.testing.assert_array_equal(logits, forward(case.params, abstract_params(case.config)[0]))
    grads = case.run(start, case.params)[1]
    assert {path: bool(grad.any()) for path, grad in grads.items()} == {path: "lora_B" in path for path in grads}


def test_initial_adapters_depend_only_on_seed_and_path(case):
    few = lora.init_adapters({path: leaf for path, leaf in case.shapes.items() if "q_proj" in path}, 7)
    all_ = lora.init_adapters(case.shapes, 7)
    assert len(few) == 4
    for path, leaf in few.items():
        np.testing.assert_array_equal(leaf, all_[path])
    other = lora.init_adapters(case.shapes, 8)
    firsts = [path for path in all_ if "lora_A" in path]
    assert all((all_[path] != other[path]).any() for path in firsts)
    assert len({all_[path].flat[0] * all_[path].shape[-1] ** 0.5 for path in firsts}) == len(firsts)


@pytest.mark.slow
def test_beside_quantized_weights(case):
    """Adapters give the same numbers on quantised weights as on the dequantised ones; they are not quantised."""
    rounded = quantize(dict(case.params | case.adapters), "int8")
    assert {path for path, leaf in rounded.items() if not isinstance(leaf, jax.Array | np.ndarray)} == {
        path for path in case.params if quantizable(path)
    }
    frozen = {path: rounded[path] for path in case.params}
    whole = {p: x if isinstance(x, jax.Array) else qwix.dequantize(x) for p, x in frozen.items()}
    (logits, grads), (same, slopes) = case.run(case.adapters, frozen), case.run(case.adapters, whole)
    assert relative(logits, np.asarray(same)) <= 1e-6
    assert relative(logits, np.asarray(case.logits)) > 1e-4
    assert all(relative(grads[path], np.asarray(slope)) <= 1e-5 for path, slope in slopes.items())


@pytest.mark.slow
def test_on_a_mesh_it_is_one_devices():
    """A step of patch embedding and adapters, whose inputs and outputs are split as those of the weights are."""
    model = replace(MODEL, lora=ALL)
    shapes = abstract_params(model)[1]
    rng = np.random.default_rng(0)
    params = {path: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    train = TrainConfig(groups={"patch_embed": GroupConfig(), "lora": GroupConfig()}, eps=1e-3)
    step = make_case(model, params, train)
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(
            MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
            devices=jax.devices()[: int(np.prod(sizes))],
        )
        with jax.set_mesh(mesh):
            state = step.state()
            state, frozen = jax.device_put((state, step.frozen), shardings((state, step.frozen), mesh))
            batch = put_batch(mesh_batch(), mesh, axis=1)
            lowered = jit_train_step().lower(state, frozen, batch, **step.options)
            state, metrics = lowered.compile(QUICK)(state, frozen, batch, schedule=step.schedule)
            for path, leaf in state.trainable.items():
                held = {shard.data.size for shard in leaf.addressable_shards}
                split = 1 if sizes[1] == 1 else 2
                assert held == {leaf.size // split}, path
            results.append(to_numpy((state.trainable, metrics)))
    (ours, numbers), (theirs, expected) = results[1], results[0]
    np.testing.assert_allclose(numbers["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(numbers["grad_norm"], expected["grad_norm"], rtol=1e-5)
    for path, leaf in theirs.items():
        assert relative(ours[path], leaf) <= 1e-5, path
        assert "rsfMRI" in path or relative(params[path], leaf) > 1e-3, path


def test_an_accepted_mesh_divides_adapters():
    shapes = abstract_params(replace(MODEL, lora=ALL))[1]
    adapters = {path: leaf for path, leaf in shapes.items() if adapted_weight(path)}
    for mesh in mesh_shapes(16, MODEL, island_size=16):
        for path, leaf in adapters.items():
            assert path not in RULES
            for size, axis in zip(leaf.shape, spec_of(path), strict=True):
                assert axis is None or size % getattr(mesh, axis) == 0, (mesh, path)


# Trained groups.


def test_the_group_is_all_adapters_and_no_other_covers_them(case):
    labels = label_params(list(case.shapes), ["patch_embed", "lora"])
    trainable, frozen = partition(case.shapes, labels)
    assert frozen.keys() >= {adapted_weight(path) for path in case.adapters}
    assert {path for path in trainable if labels[path] == "lora"} == case.adapters.keys()
    numbers = counts(case.shapes, labels)
    assert numbers["lora"] == (sum(leaf.size for leaf in case.adapters.values()), 0)
    assert numbers["language_model"][0] == 0
    assert "lora" not in counts(case.params, label_params(list(case.params), ["patch_embed"]))
    split = ["vision_tower.*.lora_?.*", "*projector.*.lora_*", "language_model.*.lora_*"]
    assert set(label_params(list(case.shapes), split).values()) == {"frozen", *split}


@pytest.mark.parametrize(
    ("groups", "fault"),
    [
        (["patch_embed", "language_model.*.lora_*", "*projector.*.lora_*"], "fc1.lora_A.weight does not train; let a"),
        (["lora", "language_model.*.lora_*"], "lora_A.weight is covered by lora and language_model.*.lora_*"),
        (["lora", "projector"], "multi_modal_projector.linear_1.weight trains as a whole (projector); train either it"),
        (["projector"], "multi_modal_projector.linear_1.lora_B.weight does not train"),
    ],
)
def test_groups_that_make_no_sense_are_refused(case, groups, fault):
    with pytest.raises(ConfigError) as error:
        label_params(list(case.shapes), groups)
    assert any(fault in line for line in error.value.faults)


def test_without_adapters_the_group_covers_nothing(case):
    with pytest.raises(ConfigError, match=r"lora covers no parameter; expected patch_embed, .*, language_model, lora"):
        label_params(list(case.params), ["lora"])
