"""One update and one evaluation step, as pure functions of parameters and a batch.

Only trainable parameters are differentiated, so no weight gradient of a frozen layer is ever computed.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32, Num

from umbrella_jax.batch import Batch
from umbrella_jax.models import Params, merge
from umbrella_jax.sharding import constrain
from umbrella_jax.training.compiler import compiler_options
from umbrella_jax.training.loss import loss_sum


@no_type_check  # jax also builds it with shapes, shardings or None as fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The arrays that training changes, and that a checkpoint holds."""

    step: Int32[Array, ""]
    """Number of updates, including skipped ones."""
    skipped: Int32[Array, ""]
    """Number of updates that were skipped because loss or gradient were not finite."""
    trainable: Params
    """float32 trainable parameters, by path."""
    opt_state: Any


def init_state(trainable: Params, optimizer: optax.GradientTransformationExtraArgs) -> TrainState:
    """Return the state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
    )


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[TrainState, dict[str, Num[Array, ""]]]:
    """Make one update from A micro-batches (fields [A, B, ...]).

    The gradient is the sum of the micro-batches' gradients of their summed loss, divided by the number of supervised
    tokens in all of them. If loss or gradient norm are not finite, parameters and optimiser state stay as they are, and
    the update counts as skipped.

    Returns:
        The new state, and {loss, grad_norm (before clipping), supervised_tokens}.
    """

    def micro_loss(trainable: Params, micro: Batch) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
        return loss_sum(merge(graphdef, trainable | frozen), micro)

    def accumulate(carry: tuple[Any, Array, Array], micro: Batch) -> tuple[tuple[Any, Array, Array], None]:
        grads, loss, count = carry
        (micro_sum, micro_count), micro_grads = jax.value_and_grad(micro_loss, has_aux=True)(state.trainable, micro)
        return (optax.tree.add(grads, constrain(micro_grads)), loss + micro_sum, count + micro_count), None

    zero = (optax.tree.zeros_like(state.trainable), jnp.zeros(()), jnp.zeros((), jnp.int32))
    (grads, loss, count), _ = jax.lax.scan(accumulate, zero, batch)
    grads = optax.tree.scale(1 / count, grads)
    # A batch may have volumes of a modality that none of its conversations shows: they are padding.
    present = merge(graphdef, state.trainable | frozen).shown(batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, present=present)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    trainable, opt_state = jax.tree.map(
        partial(jnp.where, finite),
        (optax.apply_updates(state.trainable, updates), opt_state),
        (state.trainable, state.opt_state),
    )
    new = TrainState(
        step=state.step + 1,
        skipped=state.skipped + (~finite).astype(jnp.int32),
        trainable=trainable,
        opt_state=opt_state,
    )
    return constrain(new), {"loss": loss / count.astype(jnp.float32), "grad_norm": norm, "supervised_tokens": count}


def eval_step(
    trainable: Params, frozen: Params, batch: Batch, *, graphdef: nnx.GraphDef
) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
    """Return loss sum and number of supervised tokens of one batch (fields [B, ...])."""
    return loss_sum(merge(graphdef, trainable | frozen), batch)


@cache
def jit_train_step() -> Any:
    """Return `train_step`, jitted for the devices of this process.

    The old state is donated: the new one reuses its memory. Frozen weights are only read.
    """
    static = ("graphdef", "optimizer")
    options = compiler_options()
    return jax.jit(train_step, static_argnames=static, donate_argnames="state", compiler_options=options)


@cache
def jit_eval_step() -> Any:
    """Return `eval_step`, jitted for the devices of this process."""
    return jax.jit(eval_step, static_argnames="graphdef", compiler_options=compiler_options())
