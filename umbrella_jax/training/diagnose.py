"""Where a number that is not finite came from: a forward pass again, looked at part by part."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from umbrella_jax.batch import Batch
from umbrella_jax.models import Params, merge
from umbrella_jax.training.loss import loss_sum

Array = jax.Array


@partial(jax.jit, static_argnames=("graphdef",))
def _finite(params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> tuple[list[Array], Array]:
    """Of each of `_parts` bool [A], and bool [A, B] of each conversation's logits: whether all of it is finite."""

    def micro_batch(micro: Batch) -> tuple[list[Array], Array]:
        model = merge(graphdef, params)
        volumes = {name: x.astype(model.config.compute_dtype) for name, x in sorted(micro.volumes.items())}
        embedded = [model.vision_tower.vision_model.embeddings(name, x) for name, x in volumes.items()]
        encoded = [model.vision_tower(name, x) for name, x in volumes.items()]
        projected = [model.image_features(name, x) for name, x in volumes.items()]
        logits = jnp.where(micro.target_mask[..., None], model.target_logits(micro), 0)  # no others reach the loss
        outputs = [*embedded, *encoded, *projected, logits, loss_sum(model, micro)[0]]
        return [jnp.isfinite(x).all() for x in outputs], jnp.isfinite(logits).all((1, 2))

    return jax.lax.map(micro_batch, batch)


def _parts(batch: Batch) -> list[str]:
    names = sorted(batch.volumes)
    vision = [f"{part} ({name})" for part in ("patch_embed", "vision_tower", "projector") for name in names]
    return [*vision, "language_model", "loss"]


def first_nonfinite(params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> tuple[str, np.ndarray]:
    """The first part of the model whose output is not finite, on a training step's batch (fields [A, B, ...]).

    Returns its name, `gradient` where all outputs are finite; and bool [A, B], the conversations whose logits are not.
    All processes call it.
    """
    found = _finite(params, batch, graphdef=graphdef)
    finite, rows = multihost_utils.process_allgather(found, tiled=True)
    return next((part for part, ok in zip(_parts(batch), finite, strict=True) if not ok.all()), "gradient"), ~rows
