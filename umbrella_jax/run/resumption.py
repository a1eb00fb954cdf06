"""Which checkpoint a run goes on from, and whether it is the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from umbrella_jax.config.load import flat, load_stored_config, parse_stored_config
from umbrella_jax.config.schema import RunConfig, to_dict
from umbrella_jax.data.inputs import Inputs, changed
from umbrella_jax.distributed import gather, raise_together
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.io.reading import LISTING, read_json
from umbrella_jax.rundir import CHECKPOINTS, CONFIG, INPUTS, Line, Say
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.step import TrainState

T = TypeVar("T")


# What may differ when a run goes on: where it reads from, how often it looks and how its devices share the work, not
# what it computes.
# (Whether the base is the same one, its fingerprint says.)
MAY_CHANGE = (
    "output_dir",
    "model.base",
    "model.remat",
    "model.attention",
    "data.image_root",
    "data.allow_outside_root",
    "data.allow_overlap",
    "data.threads",
    "data.cache",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "train.eval_samples",
    "train.eval_steps",
    "train.save_steps",
    "train.keep_latest",
    "train.keep_best",
    "train.best_metric",
    "train.on_nonfinite",
    "train.max_skipped",
    "train.tensorboard",
    "train.wandb",
    "evaluation",
)


def check_out(config: RunConfig, out: Path, resume: bool) -> None:
    """Raise ConfigError if `out` holds a run and `resume` is not set, or a run with other settings.

    `same_run` checks the same later, with weights and data.
    """
    if not resume and (out / CHECKPOINTS).exists():
        raise ConfigError(f"{out}: holds a run; continue it with --resume, or choose another directory (--out DIR)")
    if resume and (out / CONFIG).exists():
        faults = _other_settings(to_dict(load_stored_config(out / CONFIG)), to_dict(config))
        if faults:
            raise ConfigError([f"{out}: cannot resume: {fault}" for fault in faults])


def _other_settings(stored: dict[str, Any], config: dict[str, Any]) -> list[str]:
    before, now = flat(stored), flat(config)
    longer = "keep that, or train longer in a new run that starts from this one (--base RUN --out DIR)"
    remedies = {"train.epochs": longer}  # the learning rate of every step depends on the number of steps
    return [
        f"{key}: {now.get(key)} now, {before.get(key)} in the run; "
        + remedies.get(key, "keep that, or choose another directory (--out DIR)")
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE)
    ]


def resume_from(
    checkpoints: Checkpoints, state: TrainState, meta: dict[str, Any], inputs: Inputs, say: Say
) -> tuple[TrainState, Line | None]:
    """The state of the newest checkpoint that is not damaged, if it belongs to the same run, and its pending line.

    Where there is a checkpoint, `state` is used up: of a large part that trains, devices may not hold two."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    if checkpoints.steps():
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    found, saved, damaged = newest(checkpoints, like, meta, inputs, say)
    for bad in damaged:
        if jax.process_index() == 0:
            checkpoints.set_aside(bad)
        say(f"renamed to {bad}.damaged, no longer looked at")
    if damaged:
        gather(None)  # renamed
        checkpoints.reload()
    return (state, None) if found is None else (found, saved.get("pending"))


def newest(
    checkpoints: Checkpoints, state: TrainState, meta: dict[str, Any], inputs: Inputs, say: Say
) -> tuple[TrainState | None, dict[str, Any], list[int]]:
    """The state of the newest checkpoint that is not damaged, None where there is none yet; what stands beside it; and
    the steps that are damaged. Of `state` only shapes and devices are looked at. Says which it is. Raises ConfigError
    where it is another run's."""
    damaged: dict[int, list[str]] = {}
    found = saved = None
    for step in checkpoints.steps():
        saved, faults = _attempt(checkpoints.meta, step)
        if saved is not None:
            with raise_together():
                same_run(checkpoints.directory, saved, meta, inputs)
            found, faults = _attempt(checkpoints.restore, step, state)
        if found is not None:
            break
        damaged[step] = faults
    if damaged and found is None:
        with raise_together():
            faults = [fault for each in damaged.values() for fault in each]
            raise CheckpointError([*faults, f"{checkpoints.directory}: none is good: cannot resume"])
    for faults in damaged.values():
        say("\n".join(["WARNING: a damaged checkpoint:", *faults]))
    if saved is None or found is None:
        say("resume: no checkpoint yet, starting at step 0")
        return None, {}, []
    say(f"resume: from step {step}")
    for name, version in meta["versions"].items():
        if (before := saved["versions"].get(name)) != version:
            say(f"resume: {name} is {version} now, {before} before: numbers may differ in their last digits")
    return found, saved, list(damaged)


def _attempt(read: Callable[..., T], *args: Any) -> tuple[T | None, list[str]]:
    """What `read` returns; or None, on every process, and what is damaged as one or more of them found it."""
    found, own = None, []
    try:
        found = read(*args)
    except CheckpointError as error:
        own = list(error.faults)
    faults = list(dict.fromkeys(fault for each in gather(own) for fault in each))
    return (None if faults else found), faults


def same_run(directory: Path, saved: dict[str, Any], meta: dict[str, Any], inputs: Inputs) -> None:
    """Raises ConfigError with everything in which the run of a checkpoint is another one."""
    stored = to_dict(parse_stored_config(saved["config"], str(directory)))  # with fields that it did not know yet
    faults = _other_settings(stored, meta["config"])
    if saved["base_fingerprint"] != meta["base_fingerprint"]:
        faults.append("model.base: other weights than those that the run started from")
    if saved["frozen_types"] != meta["frozen_types"]:  # a native checkpoint may be the same base in another type
        before_, now_ = (", ".join(m["frozen_types"]) for m in (saved, meta))
        faults.append(f"model.base: frozen weights are {now_} now, {before_} in the checkpoint; set model.frozen_dtype")
    before, now = flat(saved["architecture"]), flat(meta["architecture"])
    faults += [
        f"model.base: config.json: {key}: {now.get(key)} now, {before.get(key)} in the checkpoint"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if saved["inputs"] != meta["inputs"] and not faults:  # other settings may well read other files
        record = directory.parent / INPUTS
        names = []
        if record.exists():
            names = changed(read_json(record, ConfigError, f"remove {record}", LISTING), inputs)
        faults = [f"{name}: other content than when the run began" for name in names] or [
            f"conversations, tokenizer or volumes are other ones than when the run began; {record} does not say which"
        ]
    if faults:
        raise ConfigError([f"{directory}: cannot resume: {fault}" for fault in faults])
