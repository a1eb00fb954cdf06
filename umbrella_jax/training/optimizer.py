"""Learning-rate schedule and optimiser: AdamW for each label, combined by `optax.multi_transform`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float32

from umbrella_jax.config.schema import ScheduleName, TrainConfig
from umbrella_jax.models.paths import FROZEN, modality_of


def warmup_updates(config: TrainConfig, num_steps: int) -> int:
    """Return the length of the warm-up in updates. A share of `num_steps` is rounded up, as Hugging Face does."""
    return config.warmup_steps or math.ceil(num_steps * config.warmup_ratio)


@no_type_check  # jax also builds it with shapes or tracers as fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate by the number of updates before: a linear warm-up from 0, then `name`.

    These are Hugging Face's `linear`, `cosine` and `constant_with_warmup`. The first update has count 0, so a warm-up
    starts with a rate of 0, as theirs does. The numbers are arguments of the compiled step, which therefore serves
    every learning rate and every number of updates.
    """

    name: ScheduleName = field(metadata={"static": True})
    peak: Float32[np.ndarray, ""]
    """Learning rate after the warm-up."""
    warmup: Float32[np.ndarray, ""]
    """Updates of the warm-up."""
    num_steps: Float32[np.ndarray, ""]
    """Planned updates, of which the last has count `num_steps` - 1."""

    def __call__(self, count: ArrayLike) -> Float32[Array, "..."]:
        """Return the learning rate of each count."""
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count - self.warmup) / jnp.maximum(self.num_steps - self.warmup, 1), 0, 1)
        after = {
            "linear": 1 - progress,
            "cosine": (1 + jnp.cos(jnp.pi * progress)) / 2,
            "constant": jnp.ones_like(progress),
        }
        return jnp.where(count < self.warmup, count / jnp.maximum(self.warmup, 1), after[self.name]) * self.peak


def make_schedule(config: TrainConfig, num_steps: int) -> Schedule:
    """Return the schedule of a run of `num_steps` planned updates."""
    warmup = warmup_updates(config, num_steps)
    numbers = {"peak": config.learning_rate, "warmup": warmup, "num_steps": num_steps}
    return Schedule(name=config.schedule, **{name: np.array(number, np.float32) for name, number in numbers.items()})


def _scale_by_schedule() -> optax.GradientTransformationExtraArgs:
    """Return `optax.scale_by_learning_rate` of the schedule that is an argument of `update`."""

    def update(updates: Any, state: Any, params: Any = None, *, schedule: optax.Schedule, **_: Any) -> tuple[Any, Any]:
        result: tuple[Any, Any] = optax.scale_by_learning_rate(schedule).update(updates, state, params)
        return result

    return optax.GradientTransformationExtraArgs(optax.scale_by_learning_rate(lambda count: count).init, update)


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


def make_optimizer(config: TrainConfig, labels: Mapping[str, str]) -> optax.GradientTransformationExtraArgs:
    """Return AdamW (Loshchilov & Hutter 2019) with a rate factor and weight decay for each group.

    Its `update` takes two more arguments: `schedule`, and `present`, {modality: bool []}: whether a conversation of the
    step shows the modality. A modality without an entry is not shown. Gradients may be those of the trainable
    parameters, as in the step, or of all parameters; updates of frozen ones are then zero.

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
        _scale_by_schedule(),
    )
