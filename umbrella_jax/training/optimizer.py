"""Schedule and optimiser: AdamW per label through `optax.multi_transform`, the frozen set to zero."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from umbrella_jax.config.schema import TrainConfig
from umbrella_jax.models.paths import FROZEN, modality_of

Array = jax.Array


def make_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Linear to the learning rate over `warmup_steps`, then linear to 0 at `num_steps` (Hugging Face's `linear`).

    The first update has count 0, so a run that warms up starts with a rate of 0, as it does there.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    rise = optax.linear_schedule(0.0, peak, warmup)
    fall = optax.linear_schedule(peak, 0.0, max(num_steps - warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])


def only_when_present(inner: optax.GradientTransformation, modality: str) -> optax.GradientTransformationExtraArgs:
    """`inner` where a conversation of the step shows `modality`; elsewhere no update and an untouched state.

    Without it Adam's momentum and weight decay move the patch embedding of a modality that no volume showed.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, present: Mapping[str, Array], **_: Any
    ) -> tuple[Any, Any]:
        none = jax.tree.map(jnp.zeros_like, updates)
        if modality not in present:  # the batch has no entry for it: known when tracing
            return none, state
        shown = inner.update(updates, state, params)
        result: tuple[Any, Any] = jax.tree.map(partial(jnp.where, present[modality]), shown, (none, state))
        return result

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _decays(path: str) -> bool:
    """Whether decoupled weight decay acts on it: on all but biases and norms, as in Hugging Face's Trainer."""
    return not path.endswith("bias") and ("norm" not in path or modality_of(path) is not None)  # of norm.mgz, say


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule, labels: Mapping[str, str]
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter 2019) whose groups have their own rate factors and decays.

    `labels` covers every parameter; gradients may be of the trainable part alone (what the step makes) or of all of
    them, the frozen ones' updates then being zero. `update` takes `present`, bool [] by modality: whether a
    conversation of the step shows it; a modality without an entry is not shown.
    """

    def adamw(label: str) -> optax.GradientTransformation:
        group, _, modality = label.partition("/")
        options = config.groups[group]
        mask = None if config.decay_bias else lambda params: {path: _decays(path) for path in params}
        transform = optax.chain(
            optax.scale_by_adam(*config.betas, eps=config.eps),
            optax.add_decayed_weights(options.weight_decay, mask=mask),
            optax.scale(options.learning_rate_factor),
        )
        return only_when_present(transform, modality) if modality else transform

    trained = sorted(set(labels.values()) - {FROZEN})
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.multi_transform(
            {FROZEN: optax.set_to_zero(), **{label: adamw(label) for label in trained}},
            lambda params: {path: labels[path] for path in params},
        ),
        # After the groups: the schedule counts updates of the run, not of a modality.
        optax.scale_by_learning_rate(schedule),
    )
