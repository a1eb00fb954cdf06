"""Equal to the installed transformers, every leaf random: each base of tests/helpers/checkpoints.py."""

import copy
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from convert.config_json import read_config
from convert.from_hf import load_params
from convert.to_hf import hub_tensors
from convert.torch_model import load_umbrella
from convert.verify import compare_reading
from tests.helpers.checkpoints import EACH_BASE, IMAGE_ID, MODALITIES, write_umbrella
from tests.helpers.golden_case import relative
from tests.helpers.training_case import QUICK, first_moments, make_case, quick_step
from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import GroupConfig, TrainConfig
from umbrella_jax.inference.generate import generate
from umbrella_jax.models import abstract_params, merge

NEW = 8  # tokens of an answer
EMBEDDINGS = "vision_tower.vision_model.embeddings."
VOLUMES = {"T1": 3, "rsfMRI": 2}
# Row by row: text and the volumes in it, then the number of its last tokens that are supervised.
ROWS = [
    ([5, ("T1", 0), 7, ("T1", 1), 4], 6),
    ([9, ("rsfMRI", 1), 3], 2),
    ([17], 9),
    ([2, ("rsfMRI", 0), ("T1", 2), 6, ("T1", 0), 8], 7),  # a volume that the first row shows too
]


def torch_features(model, volumes):
    """Hidden states of the tower and features of the projector, by the stock modules."""
    states = model.model.vision_tower(volumes[:, None], output_hidden_states=True).hidden_states
    hidden = states[model.config.vision_feature_layer]
    return hidden, model.model.multi_modal_projector(hidden)


def make_rows(rng):
    """Token ids of each row, and where each of its volumes starts."""
    rows = []
    for parts, supervised in ROWS:
        ids, images = [], []
        for part in parts:
            if isinstance(part, int):
                ids += rng.integers(0, IMAGE_ID, part).tolist()
            else:
                images.append((*part, len(ids)))
                ids += [IMAGE_ID] * MODALITIES[part[0]].num_patches
        rows.append(SimpleNamespace(ids=np.array(ids, np.int32), images=images, supervised=supervised))
    return rows


def make_batch(rows, volumes):
    """The rows as the model takes them, longer than the longest and with room for one more target."""
    length, targets = max(len(row.ids) for row in rows) + 3, max(row.supervised for row in rows) + 1
    input_ids, feature_idx = np.full((len(rows), length), 1, np.int32), np.full((len(rows), length), -1, np.int32)
    target_pos, target_ids = (np.zeros((len(rows), targets), np.int32) for _ in range(2))
    first = {"T1": 0, "rsfMRI": VOLUMES["T1"] * MODALITIES["T1"].num_patches}
    for b, row in enumerate(rows):
        input_ids[b, : len(row.ids)] = row.ids
        for name, volume, start in row.images:
            patches = np.arange(MODALITIES[name].num_patches)
            feature_idx[b, start + patches] = first[name] + volume * len(patches) + patches
        where = np.arange(len(row.ids) - row.supervised, len(row.ids))
        target_pos[b, : len(where)], target_ids[b, : len(where)] = where - 1, row.ids[where]
    return Batch(
        input_ids=input_ids,
        positions=np.tile(np.arange(length, dtype=np.int32), (len(rows), 1)),
        feature_idx=feature_idx,
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        target_pos=target_pos,
        target_ids=target_ids,
        target_mask=np.arange(targets) < np.array([[row.supervised] for row in rows]),
        volumes=volumes,
    )


@pytest.fixture(scope="module", params=EACH_BASE)
def both(request, tmp_path_factory):
    """One checkpoint in either framework, with the batch and what PyTorch says to it, row by row and unpadded."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_umbrella(directory, request.param, seed=11)
    model, config = load_umbrella(directory), read_config(directory, MODALITIES, remat="full")
    assert compare_reading(directory, config, grown=False) == []

    rng = np.random.default_rng(3)
    volumes = {m: rng.normal(size=(n, *MODALITIES[m].size)).astype(np.float32) for m, n in VOLUMES.items()}
    rows = make_rows(rng)
    made, logits = torch_forward(model, rows, volumes)
    params, batch = load_params(directory, config)[0], make_batch(rows, volumes)
    graphdef = abstract_params(config)[0]
    return SimpleNamespace(
        config=config,
        torch=model,
        made=made,
        logits=[x.detach().numpy() for x in logits],
        params=params,
        rows=rows,
        batch=batch,
        graphdef=graphdef,
        jax=compute(graphdef, params, batch),
    )


def torch_forward(model, rows, volumes):
    """Hidden states and features of all volumes, and the logits of each row."""
    made = {m: torch_features(model, torch.from_numpy(x)) for m, x in volumes.items()}
    logits = []
    for row in rows:
        embeds = model.get_input_embeddings()(torch.from_numpy(row.ids).long()).clone()
        for name, volume, start in row.images:
            embeds[start : start + MODALITIES[name].num_patches] = made[name][1][volume]
        logits.append(model(inputs_embeds=embeds[None]).logits[0])
    return made, logits


def torch_loss(rows, logits):
    """Mean cross entropy of the supervised tokens."""
    kept = torch.cat([x[-row.supervised - 1 : -1] for row, x in zip(rows, logits, strict=True)])
    targets = np.concatenate([row.ids[-row.supervised :] for row in rows])
    return torch.nn.functional.cross_entropy(kept, torch.from_numpy(targets).long())


def compute(graphdef, params, batch):
    """The same by JAX, in one program."""

    def everything(params, batch):
        model = merge(graphdef, params)
        return {
            "hidden": {name: model.vision_tower(name, x) for name, x in batch.volumes.items()},
            "features": {name: model.image_features(name, x) for name, x in batch.volumes.items()},
            "logits": model(batch),
            "target_logits": model.target_logits(batch),
        }

    values = jax.jit(everything, compiler_options=QUICK)(params, batch)
    return SimpleNamespace(**jax.tree.map(np.asarray, values))


def test_every_leaf_is_random(both):
    """A zero bias or a norm of ones would hide one that is swapped or forgotten."""
    for path, leaf in both.params.items():
        assert np.unique(leaf).size > 0.9 * leaf.size, path


def test_tower_and_features(both):
    for name in VOLUMES:
        hidden, features = (x.detach().numpy() for x in both.made[name])
        assert relative(both.jax.hidden[name], hidden) <= 1e-5
        assert relative(both.jax.features[name].reshape(features.shape), features) <= 1e-5


def test_logits(both):
    """Logits agree at every position in use, and at the supervised positions."""
    for b, (row, expected) in enumerate(zip(both.rows, both.logits, strict=True)):
        assert relative(both.jax.logits[b, : len(row.ids)], expected) <= 1e-5
        assert relative(both.jax.target_logits[b, : row.supervised], expected[-row.supervised - 1 : -1]) <= 1e-5


def test_stock_call_gives_the_same(both):
    """PyTorch's own way from ids and volumes to logits, for a row of one modality: what `both` put together by hand."""
    for b, name in ((0, "T1"), (1, "rsfMRI")):
        volumes = torch.from_numpy(both.batch.volumes[name][[image[1] for image in both.rows[b].images], None])
        with torch.no_grad():
            logits = both.torch(input_ids=torch.from_numpy(both.rows[b].ids[None]).long(), pixel_values=volumes).logits
        assert relative(logits[0], both.logits[b]) <= 1e-5


@pytest.mark.slow  # of qwen2, tests/models/test_golden.py has them
def test_ten_adamw_steps(both):
    """Losses, gradient norms, the first step's gradients, and the patch embedding that the steps end with."""
    train = TrainConfig(learning_rate=1e-2, decay_bias=True, eps=1e-4)  # else rounding decides an update
    case = make_case(both.config, both.params, train)
    state, stacked = case.state(), jax.tree.map(lambda leaf: leaf[None], both.batch)
    model = copy.deepcopy(both.torch).requires_grad_(False)
    embeddings = dict(model.model.vision_tower.embeddings.requires_grad_().named_parameters())
    assert {path.removeprefix(EMBEDDINGS) for path in state.trainable} == embeddings.keys()
    options = {"lr": train.learning_rate, "eps": train.eps, "weight_decay": GroupConfig().weight_decay}
    theirs = torch.optim.AdamW(embeddings.values(), **options)
    for step in range(10):
        loss = torch_loss(both.rows, torch_forward(model, both.rows, both.batch.volumes)[1])
        theirs.zero_grad()
        loss.backward()
        gradients = {name: p.grad.numpy().copy() for name, p in embeddings.items()}
        norm = torch.nn.utils.clip_grad_norm_(embeddings.values(), train.clip_norm).item()
        theirs.step()
        state, metrics = quick_step(state, case.frozen, stacked, **case.options)
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        if not step:  # the first moments are a tenth of the clipped gradients
            moments = first_moments(state.opt_state)
            assert {path.removeprefix(EMBEDDINGS) for path in moments} == gradients.keys()
            for path, moment in moments.items():
                expected = gradients[path.removeprefix(EMBEDDINGS)]
                assert relative(moment.reshape(expected.shape) / 0.1 * max(1, norm), expected) <= 1e-4, path
    for name, tensor in embeddings.items():
        expected = tensor.detach().numpy()
        assert relative(state.trainable[EMBEDDINGS + name].reshape(expected.shape), expected) <= 1e-4, name


@pytest.mark.slow
def test_a_step_of_the_tower_is_pytorchs(both):
    """Weights of the layers that run; those above keep every bit, with weight decay on."""
    train = TrainConfig(learning_rate=1e-2, decay_bias=True, eps=1e-4, groups={"vision_tower": GroupConfig()})
    case = make_case(both.config, both.params, train)
    state, _ = quick_step(case.state(), case.frozen, jax.tree.map(lambda leaf: leaf[None], both.batch), **case.options)
    model = copy.deepcopy(both.torch).requires_grad_(False)
    encoder = model.model.vision_tower.encoder.requires_grad_()
    options = {"lr": train.learning_rate, "eps": train.eps, "weight_decay": GroupConfig().weight_decay}
    theirs = torch.optim.AdamW(encoder.parameters(), **options)
    torch_loss(both.rows, torch_forward(model, both.rows, both.batch.volumes)[1]).backward()
    torch.nn.utils.clip_grad_norm_(encoder.parameters(), train.clip_norm)
    theirs.step()
    before, after = (hub_tensors(params, both.config) for params in (both.params, both.params | state.trainable))
    for name, tensor in encoder.named_parameters():
        expected, hub = tensor.detach().numpy(), f"vision_tower.vision_model.encoder.{name}"
        assert relative(after[hub].read(), expected) <= 1e-4, name
        runs = int(name.split(".")[1]) < both.config.vision.num_used_layers
        assert [np.array_equal(t, before[hub].read()) for t in (after[hub].read(), expected)] == [not runs] * 2, name


def test_greedy_answers_are_generates(both):
    """Token by token what `model.generate` gives each row, from the row alone and unpadded."""
    louder = ("o_proj.weight", "down_proj.weight")  # else the residual stream repeats the last token for ever
    model = copy.deepcopy(both.torch)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            weight *= 9 if name.endswith(louder) else 1
    params = {
        p: leaf * 9 if p.startswith("language_model") and p.endswith(louder) else leaf
        for p, leaf in both.params.items()
    }
    plain = GenerationConfig(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    expected = []
    for row in both.rows:
        embeds = model.get_input_embeddings()(torch.from_numpy(row.ids).long()).detach().clone()
        for name, volume, start in row.images:
            embeds[start : start + MODALITIES[name].num_patches] = both.made[name][1][volume].detach()
        with torch.no_grad():
            expected.append(model.generate(inputs_embeds=embeds[None], generation_config=plain)[0].numpy())
    tokens = np.asarray(generate(merge(both.graphdef, params), both.batch, max_new_tokens=NEW))
    np.testing.assert_array_equal(tokens, np.stack(expected))
    assert (tokens[:, 1:] != tokens[:, :-1]).sum() > NEW / 2, tokens
