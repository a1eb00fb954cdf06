"""The rules cover the model exactly, and names of every layout become the hub's."""

import numpy as np
import pytest

from convert.config_json import read_config
from convert.rules import REPLACED, hub_name, map_tensors
from tests.helpers.checkpoints import make_model, write_umbrella
from umbrella_jax.models.llava import abstract_params
from umbrella_jax.models.paths import modality_of


@pytest.mark.parametrize("tied", [True, False])
def test_table_covers_parameters_and_file_exactly(tmp_path, tied):
    model = write_umbrella(tmp_path, tied=tied)
    config = read_config(tmp_path)
    table = map_tensors(config)
    abstract = abstract_params(config)[1]
    assert {e.path for e in table} == set(abstract)
    rows = {path: [e for e in table if e.path == path] for path in abstract}
    for path, leaf in abstract.items():  # every element of every parameter, once
        assert sum(int(np.prod(e.shape)) for e in rows[path]) == leaf.size
        assert [e.layer for e in rows[path]] in ([None], list(range(leaf.shape[0])))
    expected = {hub_name(name): tuple(t.shape) for name, t in model.state_dict().items()}
    if tied:
        del expected["language_model.lm_head.weight"]
    assert {e.name: e.file_shape for e in table} == expected
    assert len({e.name for e in table}) == len(table)


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("model.vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("vision_tower.embeddings.T1_proj.bias", "vision_tower.vision_model.embeddings.T1_proj.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("something.else", "something.else"),
    ],
)
def test_hub_name(name, hub):
    assert hub_name(name) == hub
    assert hub_name(hub) == hub


def test_modality_of():
    assert modality_of("vision_tower.vision_model.embeddings.dMRI_x_positional_embeddings") == "dMRI_x"
    assert modality_of("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight") is None
    assert modality_of("vision_tower.vision_model.embeddings.patch_embedding.weight") is None


def test_tensors_of_the_stock_embeddings_are_replaced():
    stock = {hub_name(name) for name in make_model().state_dict() if ".embeddings." in name}
    assert stock == {name for name in REPLACED if not name.endswith("position_ids")}  # older versions saved the ids
