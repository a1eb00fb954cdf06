"""Learning-rate schedule and optimiser: AdamW for each label, combined by `optax.multi_transform`."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from umbrella_jax.config.schema import ScheduleName, TrainConfig
from umbrella_jax.models.paths import FROZEN, modality_of


def warmup_updates(config: TrainConfig, num_steps: int) -> int:
    """Return the length of the warm-up in updates. A share of `num_steps` is rounded up, as Hugging Face does."""
    return config.warmup_steps or math.ceil(num_steps * config.warmup_ratio)


def make_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate by the number of updates before: a linear warm-up from 0, then `config.schedule`.

    These are Hugging Face's `linear`, `cosine` and `constant_with_warmup`. The first update has count 0, so a warm-up
    starts with a rate of 0, as theirs does.

    Args:
        num_steps: the planned updates, of which the last has count `num_steps` - 1.
    """
    warmup, peak = warmup_updates(config, num_steps), config.learning_rate
    rest = max(num_steps - warmup, 1)
    cosine = optax.cosine_decay_schedule(peak, rest)
    after: dict[ScheduleName, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda count: cosine(jnp.asarray(count, jnp.float32)),  # optax mixes the types
        "constant": optax.constant_schedule(peak),
    }
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after[config.schedule]], [warmup])


def only_when_present(inner: optax.GradientTransformation, modality: str) -> optax.GradientTransformationExtraArgs:
    """Apply `inner` only in steps whose conversations show `modality`; leave parameters and state unchanged in others.

    Otherwise, Adam's momentum and weight decay would move the patch embedding of a modality that no volume showed.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, present: Mapping[str, Bool[Array, ""]], **_: Any
    ) -> tuple[Any, Any]:
        none = jax.tree.map(jnp.zeros_like, updates)
        if modality not in present:  # known when tracing: the batch has no such volumes
            return none, state
        shown = inner.update(updates, state, params)
        result: tuple[Any, Any] = jax.tree.map(partial(jnp.where, present[modality]), shown, (none, state))
        return result

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _decays(path: str) -> bool:
    """Return whether weight decay applies: to all parameters but biases and norms, as in Hugging Face's Trainer."""
    is_norm = "norm" in path and modality_of(path) is None  # a modality, too, may be called norm
    return not path.endswith("bias") and not is_norm


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule, labels: Mapping[str, str]
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW (Loshchilov & Hutter 2019) with a rate factor and weight decay for each group.

    Its `update` takes `present`, {modality: bool []}: whether a conversation of the step shows the modality. A modality
    without an entry is not shown. Gradients may be those of the trainable parameters, as in the step, or of all
    parameters; updates of frozen ones are then zero.

    Args:
        labels: the label of every parameter (`freeze.label_params`).
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

    groups = sorted(set(labels.values()) - {FROZEN})
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.multi_transform(
            {FROZEN: optax.set_to_zero(), **{label: adamw(label) for label in groups}},
            lambda params: {path: labels[path] for path in params},
        ),
        # outside the groups, so that the schedule counts the run's updates, not those that show a modality
        optax.scale_by_learning_rate(schedule),
    )
