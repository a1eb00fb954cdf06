"""Find the checkpoint that a run resumes from, and check that it belongs to the same run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from umbrella_jax.config.load import flat, load_stored_config, parse_stored_config
from umbrella_jax.config.schema import RunConfig, to_dict
from umbrella_jax.console import wrapped
from umbrella_jax.data.inputs import Inputs, changed_inputs, load_stored_inputs
from umbrella_jax.distributed import gather, raise_together
from umbrella_jax.errors import CheckpointError, ConfigError, Faults
from umbrella_jax.rundir import CHECKPOINTS, CONFIG, INPUTS, LOG, Line, Say, fold_runs, how_it_ended, seed_runs
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.optimizer import make_schedule, warmup_updates
from umbrella_jax.training.step import TrainState

T = TypeVar("T")


MAY_CHANGE = (
    "output_dir",
    "model.base",
    "model.adapter",
    "model.remat",
    "model.attention",
    "model.layers",
    "data.image_root",
    "data.allow_outside_root",
    "data.allow_overlap",
    "data.threads",
    "data.cache",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "train.epochs",
    "train.eval_samples",
    "train.eval_steps",
    "train.save_steps",
    "train.keep_latest",
    "train.keep_best",
    "train.best_metric",
    "train.early_stopping",
    "train.on_nonfinite",
    "train.max_skipped",
    "train.tensorboard",
    "train.wandb",
    "evaluation",
)
"""Settings that may differ when a run resumes, sections or fields. They change where it reads from, how often it
evaluates and saves, when it stops early, how the devices share the work, what happens if a loss or gradient is not
finite, and how long it trains. Of these, only the last two can change an update by more than rounding, the length
through the learning rate (`_describe_new_length`). The fingerprint of base and adapter is compared instead of their
paths."""


def check_out(config: RunConfig, out: Path, resume: bool) -> None:
    """Raise ConfigError if `out` holds several runs, or one and `resume` is not set, or one with other settings.

    This comes before anything large is read. `check_same_run` compares the settings again, with those in the
    checkpoint, and compares weights and data too.
    """
    if seeds := seed_runs(out):
        raise ConfigError(
            f"{out}: holds the runs of several seeds; continue them with --seeds {','.join(map(str, seeds))} --resume, "
            "or choose another directory (--out DIR)"
        )
    if fold_runs(out):
        raise ConfigError(
            f"{out}: holds the runs of several folds; continue them with umbrella-jax cv, or choose another directory "
            "(--out DIR)"
        )
    if not resume and (out / CHECKPOINTS).exists():
        raise ConfigError(f"{out}: holds a run; continue it with --resume, or choose another directory (--out DIR)")
    if resume and (out / CONFIG).exists():
        faults = _changed_settings(to_dict(load_stored_config(out / CONFIG)), to_dict(config))
        if faults:
            raise ConfigError([f"{out}: cannot resume: {fault}" for fault in faults])


def directory_of_runs(config: RunConfig, what: str) -> Path:
    """Return `output_dir` for `what`, several runs. Raise ConfigError if there is none, or if it is a run itself."""
    if config.output_dir is None:
        raise ConfigError("output_dir: expected a path (--out DIR)")
    out = Path(config.output_dir)
    if (out / CONFIG).exists() or (out / CHECKPOINTS).exists():
        raise ConfigError(f"{out}: holds a run; {what} need a directory of their own (--out DIR)")
    return out


def check_outs(configs: Iterable[RunConfig], resume: bool) -> None:
    """Raise ConfigError as `check_out` does, with the faults of all runs."""
    faults = Faults()
    for config in configs:
        with faults:
            check_out(config, Path(str(config.output_dir)), resume)
    faults.raise_as(ConfigError)


def is_finished(config: RunConfig) -> bool:
    """Return whether `output_dir` holds a run that ended without an error, and would end there again."""
    out = Path(str(config.output_dir))
    if how_it_ended(out / LOG) != "":
        return False
    train = load_stored_config(out / CONFIG).train
    return (train.epochs, train.early_stopping) == (config.train.epochs, config.train.early_stopping)


def _changed_settings(stored: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return a fault for each setting that differs from the stored run's and may not."""
    before, now = flat(stored), flat(config)
    has_number_loss = config["train"]["number_loss"] is not None

    def may_change(key: str) -> bool:
        is_learnt = has_number_loss and ".numbers." in key
        return not is_learnt and any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE)

    return [
        f"{key}: {now.get(key)} now, {before.get(key)} in the run; keep that, or choose another directory (--out DIR)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not may_change(key)
    ]


def resume_from(
    checkpoints: Checkpoints, state: TrainState, meta: dict[str, Any], inputs: Inputs, say: Say
) -> tuple[TrainState, Line | None]:
    """Return the state of the newest undamaged checkpoint and its pending line; the given state if there is none yet.

    Damaged checkpoints are renamed.

    Args:
        state: before the first step. If there is a checkpoint, its memory is freed, since the devices may not have
            room for two.
        meta: of this run, compared with the checkpoint's.

    Raises:
        CheckpointError: every checkpoint is damaged.
        ConfigError: the checkpoint belongs to another run.
    """
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    if checkpoints.steps():
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    restored, saved_meta, damaged_steps = newest(checkpoints, like, meta, inputs, say)
    for step in damaged_steps:
        if jax.process_index() == 0:
            checkpoints.set_aside(step)
        say(f"renamed to {step}.damaged; ignored from now on")
    if damaged_steps:
        gather(None)  # wait until process 0 has renamed them
        checkpoints.reload()
    return (state, None) if restored is None else (restored, saved_meta.get("pending"))


def newest(
    checkpoints: Checkpoints, like: TrainState, meta: dict[str, Any], inputs: Inputs, say: Say
) -> tuple[TrainState | None, dict[str, Any], list[int]]:
    """Find the newest undamaged checkpoint, and report it.

    Args:
        like: has the shapes, types and devices of the state to restore.

    Returns:
        Its state and its meta (None and {} if there is no checkpoint yet), and the newer steps, which are damaged.

    Raises:
        CheckpointError: every checkpoint is damaged.
        ConfigError: the checkpoint belongs to another run, or the run is to end before it.
    """
    damaged: dict[int, list[str]] = {}
    state = saved = None
    for step in checkpoints.steps():
        saved, faults = _attempt(checkpoints.meta, step)
        if saved is not None:
            with raise_together():
                check_same_run(checkpoints.directory, saved, meta, inputs)
            state, faults = _attempt(checkpoints.restore, step, like)
        if state is not None:
            break
        damaged[step] = faults
    if damaged and state is None:
        with raise_together():
            faults = [fault for each in damaged.values() for fault in each]
            raise CheckpointError([*faults, f"{checkpoints.directory}: no intact checkpoint: cannot resume"])
    for faults in damaged.values():
        say("\n".join(["WARNING: a damaged checkpoint:", *faults]))
    if saved is None or state is None:
        say("resume: no checkpoint yet, starting at step 0")
        return None, {}, []
    say(f"resume: from step {step}")
    with raise_together():
        if line := _describe_new_length(checkpoints.directory, saved, meta, step, int(state.skipped)):
            say("\n".join(wrapped(line)))
    for name, version in meta["versions"].items():
        if (before := saved["versions"].get(name)) != version:
            say(f"resume: {name} is {version} now, {before} before: numbers may differ in their last digits")
    return state, saved, list(damaged)


def _describe_new_length(
    directory: Path, saved: dict[str, Any], meta: dict[str, Any], step: int, skipped: int
) -> str | None:
    """Return a line about the new length of a run whose `train.epochs` changed; None if it is the same.

    The epochs are those of the same plan, and the learning rate continues on the schedule of the new length. So with
    a constant rate, the result is that of a run of the new length; else it is not, since the rates so far were others.

    Args:
        directory: of the checkpoints, for the message.
        saved: the checkpoint's meta.
        meta: this run's.
        step: number of updates so far, of which `skipped` left the schedule where it was.

    Raises ConfigError if no update would be left to make.
    """
    (old, before), (new, now) = (
        (parse_stored_config(each["config"], str(directory)).train, each["num_steps"]) for each in (saved, meta)
    )
    if new.epochs == old.epochs:
        return None
    if now <= step:
        raise ConfigError(
            f"{directory}: cannot resume: train.epochs: {new.epochs:g} epochs are {now:,} updates, and {step:,} are "
            f"made; expected more, or the {old.epochs:g} epochs of the run"
        )
    rate_before, rate = (float(make_schedule(*each)(step - skipped)) for each in ((old, before), (new, now)))
    if rate == rate_before:
        change = f"stays {rate:.4g}"
    else:
        change = f"{'rises' if rate > rate_before else 'falls'} from {rate_before:.4g} to {rate:.4g}"
    warmup_before, warmup = warmup_updates(old, before), warmup_updates(new, now)
    return (
        f"resume: {new.epochs:g} epochs instead of {old.epochs:g}: {now:,} updates instead of {before:,}; "
        f"the learning rate at step {step:,} {change}"
        + ("" if warmup == warmup_before else f"; the warm-up lasts {warmup:,} updates instead of {warmup_before:,}")
    )


def _attempt(read: Callable[..., T], *args: Any) -> tuple[T | None, list[str]]:
    """Call `read` on every process. Return its result, or None if any raised CheckpointError.

    The faults of all processes are returned too.
    """
    result, own = None, []
    try:
        result = read(*args)
    except CheckpointError as error:
        own = list(error.faults)
    faults = list(dict.fromkeys(fault for each in gather(own) for fault in each))
    return (None if faults else result), faults


def check_same_run(directory: Path, saved: dict[str, Any], meta: dict[str, Any], inputs: Inputs) -> None:
    """Raise ConfigError if a checkpoint belongs to another run, naming every difference.

    Args:
        directory: of the checkpoints, for the message.
        saved: the checkpoint's meta.
        meta: this run's.
        inputs: the files that this run reads.
    """
    if missing := sorted(meta.keys() - saved.keys()):
        missing_names = ", ".join(missing)
        remedy = "resume it with that version, or start a new run from this one (--base RUN --out DIR)"
        raise ConfigError(f"{directory}: cannot resume: another version wrote it, without {missing_names}; {remedy}")
    # Parsing adds the fields that did not exist when the run began.
    stored = to_dict(parse_stored_config(saved["config"], str(directory)))
    faults = _changed_settings(stored, meta["config"])
    if saved["base_fingerprint"] != meta["base_fingerprint"]:
        faults.append("model.base: not the weights that the run started from")
    if saved["frozen_types"] != meta["frozen_types"]:  # a native checkpoint may be the same base in another type
        before_, now_ = (", ".join(m["frozen_types"]) for m in (saved, meta))
        faults.append(f"model.base: frozen weights are {now_} now, {before_} in the checkpoint; set model.frozen_dtype")
    before, now = flat(saved["architecture"]), flat(meta["architecture"])
    faults += [
        f"model.base: config.json: {key}: {now.get(key)} now, {before.get(key)} in the checkpoint"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if saved["inputs"] != meta["inputs"] and not faults:  # other settings would explain other inputs
        record = directory.parent / INPUTS
        names = []
        if record.exists():
            names = changed_inputs(load_stored_inputs(record, "remove it"), inputs)
        faults = [f"{name}: changed since the run began" for name in names] or [
            f"conversations, tokenizer or volumes have changed since the run began; {record} does not say which"
        ]
    if faults:
        raise ConfigError([f"{directory}: cannot resume: {fault}" for fault in faults])
