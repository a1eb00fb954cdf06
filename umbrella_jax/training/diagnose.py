"""Find the origin of a number that is not finite: the weights, or a part of the forward pass."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float

from umbrella_jax.batch import Batch
from umbrella_jax.errors import CheckpointError, RunError, UmbrellaError
from umbrella_jax.models import Params, merge
from umbrella_jax.training.loss import loss_sum


@partial(jax.jit, static_argnames=("graphdef",))
def _finite(
    params: Params, batch: Batch, *, graphdef: nnx.GraphDef
) -> tuple[list[Bool[Array, "A"]], Bool[Array, "A B"]]:
    """Return whether each of `_parts` is finite, and whether the logits of each conversation are."""

    def micro_batch(micro: Batch) -> tuple[list[Bool[Array, ""]], Bool[Array, "B"]]:
        model = merge(graphdef, params)
        volumes = {name: x.astype(model.config.compute_dtype) for name, x in sorted(micro.volumes.items())}
        embedded = [model.vision_tower.vision_model.embeddings(name, x) for name, x in volumes.items()]
        encoded = [model.vision_tower(name, x) for name, x in volumes.items()]
        projected = [model.image_features(name, x) for name, x in volumes.items()]
        logits = jnp.where(micro.target_mask[..., None], model.target_logits(micro), 0)  # only these reach the loss
        outputs = [*embedded, *encoded, *projected, logits, loss_sum(model, micro)[0]]
        return [jnp.isfinite(x).all() for x in outputs], jnp.isfinite(logits).all((1, 2))

    return jax.lax.map(micro_batch, batch)


def _parts(batch: Batch) -> list[str]:
    names = sorted(batch.volumes)
    vision = [f"{part} ({name})" for part in ("patch_embed", "vision_tower", "projector") for name in names]
    return [*vision, "language_model", "loss"]


def first_nonfinite(params: Params, batch: Batch, *, graphdef: nnx.GraphDef) -> tuple[str, Bool[np.ndarray, "A B"]]:
    """Find the first part of the model whose output is not finite, for a training batch (fields [A, B, ...]).

    All processes must call this.

    Returns:
        Its name, or `gradient` if all outputs are finite; and True for conversations whose logits are not finite.
    """
    finite, rows = multihost_utils.process_allgather(_finite(params, batch, graphdef=graphdef), tiled=True)
    return next((part for part, ok in zip(_parts(batch), finite, strict=True) if not ok.all()), "gradient"), ~rows


@jax.jit
def _finite_leaves(leaves: list[Float[Array, "..."]]) -> list[Bool[Array, ""]]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def nonfinite_params(params: Params) -> list[str]:
    """Return the paths of the parameters that contain a NaN or an infinity. All processes must call this."""
    floats = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    is_finite = jax.device_get(_finite_leaves([leaf for _, leaf in floats]))
    return [path for (path, _), finite in zip(floats, is_finite, strict=True) if not finite]


def weights_error(params: Params) -> CheckpointError | None:
    """Return the error that names weights with a NaN or an infinity, if there are any. All processes must call this."""
    paths = nonfinite_params(params)
    if not paths:
        return None
    shown = ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
    return CheckpointError(
        f"weights: NaN or infinity in {shown}: nothing can be computed from them; choose another checkpoint, or "
        "convert the base again (convert from-hf --check-finite)"
    )


def nonfinite_error(
    what: str, names: Mapping[int, str], params: Params, batch: Batch, *, graphdef: nnx.GraphDef
) -> UmbrellaError:
    """Return the error for an evaluation batch (fields [B, ...]) that led to numbers that are not finite.

    All processes must call this.

    Args:
        what: name of these numbers, in the plural, such as `logits`.
        names: {row: name of its conversation}.

    Returns:
        CheckpointError naming the weights, if they contain such numbers. Otherwise RunError, naming the conversations
        and the first part of the model that is not finite.
    """
    if error := weights_error(params):
        return error
    if not jax.device_get(batch.target_mask.any()):  # prompts: check the logits of the next token
        last = (batch.lengths - 1)[:, None]
        batch = replace(batch, target_pos=last, target_ids=jnp.zeros_like(last), target_mask=jnp.ones_like(last, bool))
    part, (rows,) = first_nonfinite(params, jax.tree.map(lambda x: x[None], batch), graphdef=graphdef)
    hit = [name for row, name in names.items() if rows[row]] or list(names.values())
    return RunError(
        f"{', '.join(hit)}: {what} are not finite, first in {part}; look at the scans (umbrella-jax data validate), or "
        "compute in float32"
    )


_SHOWN = 5
"""Parameters that a message names."""
