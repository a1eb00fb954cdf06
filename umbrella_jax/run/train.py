"""A training run, from a config to a run directory; what lies there, umbrella_jax/rundir.py says.

`train` and `rehearse` (`umbrella-jax train --dry-run`) share all up to the first step: preparation.py.
"""

import math
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import describe
from umbrella_jax.checkpoints.load import open_base
from umbrella_jax.config.load import dump_config
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.console import Progress, Work
from umbrella_jax.data.epoch_plan import BatchShape, EpochPlan
from umbrella_jax.data.inputs import dump_inputs
from umbrella_jax.data.loader import eval_subset, task_ids, train_batches
from umbrella_jax.distributed import broadcast, max_over_processes, raise_together
from umbrella_jax.errors import Interrupted
from umbrella_jax.io.files import PRIVATE, locked, rewrite_folder, write_whole
from umbrella_jax.models import abstract_params
from umbrella_jax.plan import batch_flops, sheet_of
from umbrella_jax.run.evaluation import evaluate
from umbrella_jax.run.loggers import loggers
from umbrella_jax.run.preparation import Evaluated, Prepared, check, meet, prepare, versions
from umbrella_jax.run.rehearsal import rehearse
from umbrella_jax.run.resumption import check_out, resume_from
from umbrella_jax.run.signals import Signals
from umbrella_jax.rundir import (
    CHECKPOINTS,
    CONFIG,
    INPUTS,
    LOG,
    METRICS,
    MODEL,
    Line,
    RunLog,
    Say,
    add_figures,
    evaluations,
    nothing,
    read_metrics,
    with_final,
)
from umbrella_jax.sharding import param_sharding, parts
from umbrella_jax.training import freeze
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.trainer import fit

__all__ = ["inspect", "rehearse", "train"]


def inspect(config: RunConfig) -> str:
    """What `train` says before it starts: per component how many parameters train and are frozen, and their names.

    Needs config.json of the base alone; a checkpoint that lies there too is checked.
    """
    base = open_base(config, weights=False)
    found = (
        base.check(config.model.frozen_dtype)
        if base.has_weights
        else [f"{base.path}: no weights there; from config.json alone"]
    )
    _, shapes = abstract_params(replace(base.config, lora=config.model.lora))
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    return "\n".join([*base.summary_lines, *found, freeze.summary(shapes, labels)])


def train(config: RunConfig, *, resume: bool = False, say: Say = tqdm.write) -> Line:
    """Trains what `config.train.groups` names.

    Everything that can be wrong with config, data and weights is refused before anything is compiled. All processes
    of a run (`umbrella_jax.distributed.start`) call this alike and see one `output_dir`; the first alone says and
    writes something, checkpoints apart, which each writes its part of.

    Args:
        resume: go on from the newest checkpoint in `output_dir` that is not damaged.
        say: takes the lines for people, which `log.txt` has too.

    Returns:
        The line of `metrics.jsonl` of the step that answers, the best of a run that keeps its best, else the last:
        `step`, `loss` (mean over its supervised tokens, in nats), `grad_norm`, `learning_rate`, ..., and `eval_NAME`
        of its evaluation on all evaluation data; None where a figure is not defined.

    Raises:
        ConfigError, DataError, CheckpointError: with every fault found.
        RunError: loss or gradient are not finite.
        Interrupted: by SIGTERM or SIGINT, at the end of a step, which was saved; `resume` goes on.
    """
    first = jax.process_index() == 0
    with ExitStack() as held:
        meet(config, resume=resume)
        with raise_together():
            out, mesh = check(config)
            out.mkdir(parents=True, exist_ok=True)
            if first:
                held.enter_context(locked(out))
            check_out(config, out, resume)
            log = held.enter_context(RunLog(out / LOG, say, _about(mesh))) if first else None
        prepared = prepare(config, out, mesh, log.say if log else nothing)
        return _run(prepared, resume, log)


def _run(run: Prepared, resume: bool, log: RunLog | None) -> Line:
    """The steps. `log`: of the first process."""
    config, out, mesh, metrics = run.config, run.out, run.mesh, run.out / METRICS
    say, note = (log.say, log.note) if log else (nothing, nothing)
    state, run.state = run.state, None
    assert state is not None
    with (
        Checkpoints(out / CHECKPOINTS, config.train, run.lines) as checkpoints,
        Signals(say) as signals,
        ExitStack() as opened,
    ):
        state, pending = resume_from(checkpoints, state, run.meta, run.inputs, say) if resume else (state, None)
        if log:
            # also of a run that goes on: what a kill or a full disk left of them would show when it has ended
            rewrite_folder(out / MODEL, partial(describe, run.base, first_steps=run.plan.first_steps()))
            write_whole(out / CONFIG, dump_config(_absolute(config, run.base)))
            write_whole(out / INPUTS, dump_inputs(run.inputs), PRIVATE)

        def interrupted() -> int:
            return max_over_processes(signals.received)

        start = int(state.step)
        logged = opened.enter_context(loggers(config, out, start - bool(pending))) if log else None
        options: dict[str, Any] = {"say": say, "note": note, "quiet": log is None}
        options["memory"] = jax.local_devices()[0].memory_stats
        progress = opened.enter_context(
            Progress("step", run.steps, done=start, always=True, peak=_peak(run), **options)
        )
        flops = cache(partial(_flops, run))

        def told(step: int, seconds: float, compiled: bool, loss: float | None) -> None:
            progress.advance(1, _work(run.plan, step - 1, flops), seconds, compiled=compiled, loss=loss)

        state = fit(
            state,
            run.frozen,
            train_batches(
                run.train_set,
                run.plan,
                start_step=start,
                num_steps=run.steps,
                threads=config.data.threads,
                parts=parts(mesh),
            ),
            graphdef=run.graphdef,
            optimizer=run.optimizer,
            schedule=run.schedule,
            config=config.train,
            num_steps=run.steps,
            mesh=mesh,
            checkpoints=checkpoints,
            meta=run.meta,
            metrics_path=metrics,
            task_ids=partial(task_ids, run.train_set, run.plan),
            evaluate=None if run.evaluated is None else partial(evaluate, run, run.evaluated, interrupted, options),
            log=logged,
            interrupted=interrupted,
            pending=pending,
            say=say,
            progress=told,
        )
        best = checkpoints.best()
        answering = best[0][0] if best else run.steps
        kept = run.evaluated if config.train.keep_best else None
        if kept and not broadcast(_is_evaluated(run, kept, answering) if log else None):
            trainable = state.trainable
            del state  # of a large part that trains, devices may not hold two with moments
            if answering != run.steps:
                with raise_together():
                    trainable = checkpoints.restore_trainable(answering, partial(param_sharding, mesh))
            with jax.set_mesh(mesh):
                found = evaluate(run, kept, interrupted, options, answering, trainable, final=True)
            if found is None:
                number = interrupted()
                name = signal.Signals(number).name
                raise Interrupted(number, f"{name}: all {run.steps} steps are saved; --resume evaluates the end")
            if log:
                add_figures(metrics, answering, found)
    for step, value in best:
        say(f"best: {config.train.best_metric} {value:.4g} at step {step}: {checkpoints.directory / str(step)}")
    if best:
        say("answers, scores, exports and reports of the run take the best; others with --step latest or a number")
    lines_by_step = {line["step"]: line for line in read_metrics(metrics)} if log else {}
    last, line = broadcast([lines_by_step[run.steps], with_final(lines_by_step[answering])] if log else None)
    shown = (name for name in ("step", "loss", "grad_norm", "learning_rate") if name in last)
    say("  ".join(_number(name, last[name]) for name in shown))
    if best:
        say(f"evaluation of the best, step {answering}:")
    for name, value in line.items():
        if name.startswith("eval_"):
            say(_number(name, value))  # of each task many: a line each
    return line


def _number(name: str, value: float | None) -> str:
    return f"{name} {math.nan if value is None else value:.4g}"


def _is_evaluated(run: Prepared, evaluated: Evaluated, step: int) -> bool:
    """Whether the evaluation of a step was on all evaluation data, not on `train.eval_samples` of them."""
    line = next((line for line in read_metrics(run.out / METRICS) if line["step"] == step), {})
    if line != with_final(line):
        return True
    total, size = len(evaluated.dataset), run.config.train.eval_samples
    shown = evaluations(run.out).get(step)
    whole = shown is not None and shown.read_bytes().count(b"\n") == total
    subset = partial(eval_subset, evaluated.dataset, run.config.train.batch_size)
    return whole and (size is None or len(subset(size, parts(run.mesh))) == total)


def _about(mesh: Mesh) -> str:
    kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
    return f"umbrella-jax {versions()['umbrella-jax']}, jax {jax.__version__}, {mesh.size} × {kinds}"


def _peak(run: Prepared) -> float | None:
    """FLOP/s of all devices, where their data sheet says it of what is computed in."""
    sheet = sheet_of(run.mesh.devices.flat[0].device_kind)
    return sheet.flops * run.mesh.size if sheet and run.model.compute_dtype == "bfloat16" else None


def _flops(run: Prepared, shape: BatchShape) -> float:
    """Of an update, where their share of a peak is known."""
    if _peak(run) is None:
        return 0.0
    of_micro = batch_flops(
        run.config,
        run.model,
        conversations=shape.conversations,
        positions=shape.positions,
        targets=shape.targets,
        volumes=dict(shape.volumes),
    )
    return of_micro * run.config.train.accumulate_steps


def _work(plan: EpochPlan, step: int, flops: Callable[[BatchShape], float]) -> Work:
    update = plan.update(step)
    rows = [row for micro in update.rows for row in micro]
    return Work(samples=len(rows), tokens=int(plan.sizes.lengths[rows].sum()), flops=flops(update.shape))


def _absolute(config: RunConfig, base: Checkpoint) -> RunConfig:
    """With the base as an absolute path, a run with its step: what is trained is loaded from anywhere, later."""
    path = base.step_directory or Path(str(config.model.base))
    return replace(config, model=replace(config.model, base=str(path.absolute()))) if path.is_dir() else config
