"""Models of real size, as shapes only: configs/t1_SIZE.yaml, its base's model, and a training step to lower."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tests.config.test_configs import CONFIGS, write_hub_config
from umbrella_jax.batch import Batch
from umbrella_jax.checkpoints.load import open_base
from umbrella_jax.config.load import load_config
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.models import LlavaConfig, abstract_params
from umbrella_jax.training import freeze
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import init_state, train_step

TEXT_TOKENS, SUPERVISED = 64, 8


def full_size(tmp_path: Path, size: str, dtype: str, **changes: Any) -> tuple[RunConfig, LlavaConfig]:
    """Return configs/t1_SIZE.yaml and the model of its base's config.json."""
    base = write_hub_config(tmp_path / size, size)
    run = load_config(CONFIGS / f"t1_{size}.yaml", {"model.base": str(base), "model.compute_dtype": dtype})
    model = open_base(run).config
    text = replace(model.text, num_hidden_layers=changes.pop("layers", model.text.num_hidden_layers))
    vision = replace(model.vision, num_hidden_layers=changes.pop("vision_layers", model.vision.num_hidden_layers))
    return run, replace(model, vision=vision, text=text, **changes)


def abstract_step(run: RunConfig, model: LlavaConfig, batch_size: int, frozen_dtype: str) -> tuple[Any, Any]:
    """Return the jitted training step and its arguments: per conversation one T1 and 64 text tokens, 8 supervised."""
    graphdef, shapes = abstract_params(model)
    labels = freeze.label_params(list(shapes), list(run.train.groups))
    trainable, frozen = freeze.partition(shapes, labels)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, frozen_dtype) for path, leaf in frozen.items()}
    optimizer = make_optimizer(run.train, labels)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), trainable)
    positions = 9 * 9 * 9 + TEXT_TOKENS

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, batch_size, *shape), dtype)

    batch = Batch(
        input_ids=array(positions),
        positions=array(positions),
        feature_idx=array(positions),
        lengths=array(),
        target_pos=array(SUPERVISED),
        target_ids=array(SUPERVISED),
        target_mask=array(SUPERVISED, dtype=bool),
        volumes={"T1": array(96, 96, 96, dtype=jnp.float32)},
    )
    schedule = make_schedule(run.train, 1000)
    step = jax.jit(partial(train_step, schedule=schedule, graphdef=graphdef, optimizer=optimizer), donate_argnums=0)
    return step, (state, frozen, batch)
