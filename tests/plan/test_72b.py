"""LLaVA-OneVision 72b at its real sizes, as shapes only: it fits on 16 H100s and on a v5p-128."""

import json
import math
from pathlib import Path

import jax
import pytest

from tests.config.test_configs import CONFIGS, expected_counts, write_hub_config
from tests.helpers.full_size import abstract_step
from tests.helpers.small_run import umbrella
from umbrella_jax.checkpoints.load import open_base
from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import MeshConfig
from umbrella_jax.sharding import make_mesh, param_sharding

CONFIG = CONFIGS / "t1_ov_7b.yaml"
FROZEN = sum(count for part, count in expected_counts("ov_72b", ["T1"]).items() if part != "patch_embed")


@pytest.mark.parametrize(("devices", "mesh"), [("h100x16", "data=2,fsdp=8"), ("v5p-128", "data=8,fsdp=8")])
def test_plan_finds_room_for_it(devices: str, mesh: str, tmp_path: Path) -> None:
    base = write_hub_config(tmp_path / "base", "ov_72b")
    flags = ["--config", CONFIG, "--base", base, "--devices", devices, "--mesh", mesh, "--batch-size", 64]
    (found,) = json.loads(umbrella("plan", *flags, "--json"))["configured"]
    assert found["fits"]
    # `fsdp` does not split vectors of the residual stream's width
    assert found["bytes"]["frozen weights"] == pytest.approx(2 * FROZEN / 8, rel=1e-3)


def test_its_step_has_shapes_on_a_mesh(tmp_path: Path) -> None:
    """The mesh is that of a node with 8 devices; each holds an eighth of the weights."""
    run = load_config(CONFIG, {"model.base": str(write_hub_config(tmp_path / "base", "ov_72b"))})
    step, (state, frozen, batch) = abstract_step(run, open_base(run).config, 16, "bfloat16")
    assert sum(math.prod(leaf.shape) for leaf in frozen.values()) == FROZEN
    mesh = make_mesh(MeshConfig(fsdp=8))
    with jax.set_mesh(mesh):
        after, metrics = jax.eval_shape(step, state, frozen, batch)
    shards = [param_sharding(mesh, path).shard_shape(leaf.shape) for path, leaf in frozen.items()]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    assert sum(map(math.prod, shards)) == pytest.approx(FROZEN / 8, rel=1e-3)
