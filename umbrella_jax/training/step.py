"""One update and one evaluation step, as pure functions of parameters and a batch.

Only trainable parameters are differentiated, so no weight gradient of a frozen layer is ever computed.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32, Num

from umbrella_jax.batch import Batch
from umbrella_jax.config.schema import NumberLossConfig
from umbrella_jax.models import Params, merge
from umbrella_jax.sharding import constrain
from umbrella_jax.training.compiler import compiler_options
from umbrella_jax.training.loss import LossSums, loss_sum, loss_sums
from umbrella_jax.training.optimizer import Schedule


@no_type_check  # jax also builds it with shapes, shardings or None as fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The arrays that training changes, and that a checkpoint holds."""

    step: Int32[Array, ""]
    """Number of updates, including skipped ones."""
    skipped: Int32[Array, ""]
    """Number of updates that were skipped because a loss or the gradient were not finite."""
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
    schedule: Schedule,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    number_loss: NumberLossConfig | None = None,
) -> tuple[TrainState, dict[str, Num[Array, ""]]]:
    """Make one update from A micro-batches (fields [A, B, ...]).

    The gradient is the sum of the micro-batches' gradients of their summed loss, divided by the number of supervised
    tokens in all of them; with `number_loss`, the mean over their numbers is added with its weight. If a loss or the
    gradient norm are not finite, parameters and optimiser state stay as they are, and the update counts as skipped.
    The learning rate follows the count of the optimiser, which skipped updates do not advance.

    Returns:
        The new state, and {loss (cross entropy), grad_norm (before clipping), supervised_tokens}; with `number_loss`
        `number_loss` too, its mean without weight, NaN if no conversation has a number.
    """
    factor = jnp.zeros(())
    if number_loss is not None and batch.numbers is not None:
        # the sum over numbers is divided by the number of tokens below, as the sum over tokens is
        tokens, numbers = batch.target_mask.sum(), batch.numbers.mask.any(-1).sum()
        factor = number_loss.weight * tokens.astype(jnp.float32) / jnp.maximum(numbers, 1).astype(jnp.float32)

    def micro_loss(trainable: Params, micro: Batch) -> tuple[Float32[Array, ""], LossSums]:
        sums = loss_sums(merge(graphdef, trainable | frozen), micro, number_loss)
        if sums.number_errors is None:
            return sums.cross_entropy, sums
        return sums.cross_entropy + factor * sums.number_errors, sums

    def accumulate(carry: tuple[Any, LossSums], micro: Batch) -> tuple[tuple[Any, LossSums], None]:
        grads, sums = carry
        micro_grads, micro_sums = jax.grad(micro_loss, has_aux=True)(state.trainable, micro)
        return (optax.tree.add(grads, constrain(micro_grads)), jax.tree.map(jnp.add, sums, micro_sums)), None

    zero = LossSums(jnp.zeros(()), jnp.zeros((), jnp.int32))
    if number_loss is not None and batch.numbers is not None:
        zero = replace(zero, number_errors=jnp.zeros(()), numbers=jnp.zeros((), jnp.int32))
    (grads, sums), _ = jax.lax.scan(accumulate, (optax.tree.zeros_like(state.trainable), zero), batch)
    grads = optax.tree.scale(1 / sums.tokens, grads)
    # A batch may have volumes of a modality that none of its conversations shows: they are padding.
    present = merge(graphdef, state.trainable | frozen).shown(batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, present=present, schedule=schedule)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums.cross_entropy) & jnp.isfinite(norm)
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
    values = {
        "loss": sums.cross_entropy / sums.tokens.astype(jnp.float32),
        "grad_norm": norm,
        "supervised_tokens": sums.tokens,
    }
    if sums.number_errors is not None and sums.numbers is not None:
        values["number_loss"] = sums.number_errors / sums.numbers.astype(jnp.float32)
    return constrain(new), values


def eval_step(
    trainable: Params, frozen: Params, batch: Batch, *, graphdef: nnx.GraphDef
) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
    """Return loss sum and number of supervised tokens of one batch (fields [B, ...])."""
    return loss_sum(merge(graphdef, trainable | frozen), batch)


@cache
def jit_train_step(device: jax.Device | None = None) -> Any:
    """Return `train_step`, jitted for devices such as this one, by default for those of this process.

    The old state is donated: the new one reuses its memory. Frozen weights are only read.
    """
    static = ("graphdef", "optimizer", "number_loss")
    options = compiler_options(device)
    return jax.jit(train_step, static_argnames=static, donate_argnames="state", compiler_options=options)


@cache
def jit_eval_step(device: jax.Device | None = None) -> Any:
    """Return `eval_step`, jitted as `jit_train_step`."""
    return jax.jit(eval_step, static_argnames="graphdef", compiler_options=compiler_options(device))
