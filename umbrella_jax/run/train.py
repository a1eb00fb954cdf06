"""A training run, from a config to a run directory, whose files umbrella_jax/rundir.py lists.

`train` and `rehearse` (`umbrella-jax train --dry-run`) share everything before the first step: preparation.py.
"""

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.export import write_description
from umbrella_jax.checkpoints.load import open_base
from umbrella_jax.config.load import dump_config
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.console import Progress, Work, wrapped
from umbrella_jax.data.epoch_plan import BatchShape, EpochPlan
from umbrella_jax.data.inputs import dump_inputs
from umbrella_jax.data.loader import eval_subset, task_ids, train_batches
from umbrella_jax.distributed import broadcast, max_over_processes, raise_together
from umbrella_jax.errors import Interrupted
from umbrella_jax.inference.controls import inapplicable_lines
from umbrella_jax.io.files import PRIVATE, locked, rewrite_folder, strict_json, write_whole
from umbrella_jax.plan import batch_flops, sheet_of
from umbrella_jax.run.controls import answer_controls, unanswered_controls
from umbrella_jax.run.evaluation import evaluate, evaluation_lines, headline_of
from umbrella_jax.run.loggers import open_loggers
from umbrella_jax.run.preparation import (
    EvaluationData,
    Prepared,
    Shared,
    check,
    check_processes,
    prepare,
    versions,
)
from umbrella_jax.run.rehearsal import rehearse
from umbrella_jax.run.resumption import check_out, resume_from
from umbrella_jax.run.signals import Signals
from umbrella_jax.run.summary import summarize_parameters
from umbrella_jax.rundir import (
    CHECKPOINTS,
    CONFIG,
    COUNTS,
    INPUTS,
    LOG,
    METRICS,
    MODEL,
    SUMMARY,
    Line,
    RunLog,
    Say,
    add_final_metrics,
    evaluations,
    predictions_by_step,
    read_metrics,
    say_nothing,
    with_final,
)
from umbrella_jax.scoring.counts import count_conversations
from umbrella_jax.sharding import param_sharding, parts
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.step import TrainState
from umbrella_jax.training.trainer import (
    EvaluateRegularly,
    Hook,
    Metrics,
    ReadSignal,
    SaveCheckpoint,
    StopEarly,
    StopOnNonfinite,
    Update,
    WriteMetrics,
    fit,
    report_failed_save,
    stop_on_signal,
)

__all__ = ["inspect", "rehearse", "train"]


def inspect(config: RunConfig) -> str:
    """Return the base, the modalities and the parameters of a run, and what would train.

    Needs only the base's config.json. If its weights are there too, they are checked.
    """
    base = open_base(config, weights=False)
    findings = (
        base.check(config.model.frozen_dtype)
        if base.has_weights
        else [f"{base.path}: no weights there; based on config.json only"]
    )
    model = replace(base.config, lora=config.model.lora)
    return "\n".join(summarize_parameters(config, base, findings, model).lines())


def train(config: RunConfig, *, resume: bool = False, notes: Sequence[str] = (), say: Say = tqdm.write) -> Line:
    """Train the parameters that `config.train.groups` names.

    Config, data and weights are checked completely before anything is compiled. All processes of a run
    (`umbrella_jax.distributed.start`) call this with the same config and see the same `output_dir`. Only the first
    prints and writes; checkpoints are the exception, of which each process writes its part.

    Args:
        resume: continue from the newest checkpoint in `output_dir` that is not damaged.
        notes: what was printed about the config, for `log.txt`.
        say: takes lines to print. They are written to `log.txt` too.

    Returns:
        The line of `metrics.jsonl` of the step that later commands use: the best, if the run keeps its best, else the
        last. It has `step`, `loss` (mean over the step's supervised tokens, in nats), `grad_norm`, `learning_rate`,
        ..., and `eval_NAME` of its evaluation on all evaluation data. A metric that is not defined is None.

    Raises:
        ConfigError, DataError, CheckpointError: with every fault found.
        RunError: loss or gradient are not finite.
        Interrupted: SIGTERM or SIGINT came. The step under way was finished and saved; `resume` continues from there.
    """
    line, _ = train_sharing(config, None, resume=resume, notes=notes, say=say)
    return line


def train_sharing(
    config: RunConfig, shared: Shared | None, *, resume: bool, notes: Sequence[str], say: Say
) -> tuple[Line, Shared]:
    """Train as `train` does, with what an earlier run of this process shares; arguments and errors are its own.

    Args:
        shared: as of `prepare`; None for the first run. The start is then only written to `log.txt`, since the first
            run has printed it.

    Returns:
        The line that `train` returns, and what the next run can use again.
    """
    first = jax.process_index() == 0
    with ExitStack() as stack:
        check_processes(config, resume=resume)
        with raise_together():
            out, mesh = check(config)
            out.mkdir(parents=True, exist_ok=True)
            if first:
                stack.enter_context(locked(out))
            check_out(config, out, resume)
            log = stack.enter_context(RunLog(out / LOG, say, _about(mesh))) if first else None
        if log:
            for note in notes:
                log.note(note)
        say_start = (log.note if shared else log.say) if log else say_nothing
        run, state = prepare(config, out, mesh, say_start, shared)
        return _train(run, state, resume, log), run.shared


def _train(run: Prepared, state: TrainState, resume: bool, log: RunLog | None) -> Line:
    """Make the updates, evaluate the best step, and print how the run ended.

    Args:
        state: before the first step; is used up.
        log: None on all processes but the first.
    """
    config, out, mesh, num_steps = run.config, run.out, run.training.mesh, run.training.num_steps
    say = log.say if log else say_nothing
    with (
        Checkpoints(out / CHECKPOINTS, config.train, run.earlier_lines) as checkpoints,
        Signals(say) as signals,
        ExitStack() as stack,
    ):
        state, pending = resume_from(checkpoints, state, run.meta, run.data.inputs, say) if resume else (state, None)
        if log:
            # in a resumed run too: a kill or a full disk may have left incomplete files
            untrained = run.model.base.untrained_after(state.trainable)
            options: dict[str, Any] = {"untrained": untrained, "first_steps": run.data.plan.first_steps()}
            rewrite_folder(out / MODEL, partial(write_description, run.model.base, **options))
            write_whole(out / CONFIG, dump_config(_with_absolute_base(config, run.model.base)))
            write_whole(out / INPUTS, dump_inputs(run.data.inputs), PRIVATE)
            write_whole(out / COUNTS, strict_json(_counts(run), indent=1) + "\n", PRIVATE)
            summary = replace(run.summary, resumed_from=int(state.step) or None)
            write_whole(out / SUMMARY, strict_json(summary.to_json(), indent=2) + "\n")

        def interrupted() -> int:
            return max_over_processes(signals.received)

        start = int(state.step)
        written = start - bool(pending)  # the number of lines in metrics.jsonl
        earlier = [line for line in run.earlier_lines if int(line["step"] or 0) <= written]
        stop_early = StopEarly(config.train.early_stopping, earlier, say)
        send = stack.enter_context(open_loggers(config, out, written)) if log else None
        options = {"say": say, "log": log.note if log else say_nothing, "quiet": log is None}
        options["memory"] = jax.local_devices()[0].memory_stats
        progress = stack.enter_context(Progress("step", num_steps, done=start, always=True, peak=_peak(run), **options))
        if evaluated := evaluations(earlier):
            progress.latest = headline_of(evaluated[max(evaluated)], config.train.best_metric)
        with Metrics(out / METRICS, written) if log else nullcontext() as metrics:
            hooks = _hooks(run, checkpoints, metrics, send, progress, interrupted, stop_early, options)
            batches = train_batches(
                run.data.train_set,
                run.data.plan,
                start_step=start,
                num_steps=num_steps,
                threads=config.data.threads,
                parts=parts(mesh),
            )
            if not pending and start < num_steps and (reason := stop_early.reason()):
                remedy = "to train on, resume with a larger train.early_stopping.patience or with null for the section"
                say("\n".join(wrapped(f"{reason}; {remedy}")))
            else:
                state = fit(run.training, state, batches, hooks, pending=pending, say=say)
        last_step = int(state.step)
        best = checkpoints.best()
        best_step = best[0][0] if best else last_step
        is_printed = best_step == last_step and (last_step > start or bool(pending))
        data = run.data.evaluation
        is_evaluated, is_controlled = broadcast(_finished_parts(run, best_step) if log else None)
        for text in inapplicable_lines(config.evaluation.controls, data.dataset.conversations) if data else []:
            say("\n".join(wrapped(text)))
        if data and not (is_evaluated and is_controlled):
            trainable = state.trainable
            del state  # large moments leave no room for another step's parameters
            if best_step != last_step:
                with raise_together():
                    trainable = checkpoints.restore_trainable(best_step, partial(param_sharding, mesh))
            with jax.set_mesh(mesh):
                if not is_evaluated:
                    evaluation = evaluate(run, data, interrupted, options, best_step, trainable, final=True)
                    is_evaluated = is_printed = evaluation is not None
                    if evaluation is not None and log:
                        add_final_metrics(out / METRICS, best_step, evaluation)
                if is_evaluated:
                    is_controlled = answer_controls(run, data, interrupted, options, best_step, trainable)
            if not (is_evaluated and is_controlled):
                number = interrupted()
                name = signal.Signals(number).name
                raise Interrupted(number, f"{name}: all {last_step} steps are saved; --resume evaluates the result")
    for step, value in best:
        say(f"best: {config.train.best_metric} {value:.4g} at step {step}: {checkpoints.directory / str(step)}")
    if best:
        say("answers, scores, exports and reports use the best step; choose another with --step latest or --step N")
    lines = {line["step"]: line for line in read_metrics(out / METRICS)} if log else {}
    last, line = broadcast([lines[last_step], with_final(lines[best_step])] if log else None)
    shown = (name for name in ("loss", "grad_norm", "learning_rate") if name in last)
    say("  ".join([f"step {last_step:,}", *(_number(name, last[name]) for name in shown)]))
    if run.data.evaluation and not is_printed:
        say("\n".join(evaluation_lines(best_step, line, run.data.evaluation.rows, run.data.evaluation.tasks)))
    return line


def _counts(run: Prepared) -> dict[str, Any]:
    """Return {train, eval: numbers about the data}."""
    data = {"train": run.data.train_set, "eval": run.data.evaluation and run.data.evaluation.dataset}
    tasks = run.config.evaluation.tasks
    return {split: count_conversations(held.conversations, tasks) for split, held in data.items() if held}


def _hooks(
    run: Prepared,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
    send: Callable[[Line], None] | None,
    progress: Progress,
    interrupted: Callable[[], int],
    stop_early: StopEarly,
    options: Mapping[str, Any],
) -> list[Hook]:
    """Return the hooks of a run in the order that trainer.py states.

    Args:
        metrics: None on all processes but the first.
        send: passes lines to the loggers.
        options: arguments of `Progress` for evaluations.
    """
    ids = partial(task_ids, run.data.train_set, run.data.plan)
    save = SaveCheckpoint(run.config.train, checkpoints, run.meta, metrics)
    evaluate_hooks = list[Hook]()
    if run.data.evaluation:
        evaluate_run = partial(evaluate, run, run.data.evaluation, interrupted, options)
        evaluate_hooks.append(EvaluateRegularly(evaluate_run, run.config.train, save, interrupted))
    return [
        StopOnNonfinite(run.training, checkpoints, ids, options["say"]),
        _show(progress, run),
        report_failed_save(checkpoints),
        ReadSignal(interrupted),
        *evaluate_hooks,
        _show_evaluation(progress, run),
        stop_early,
        *([WriteMetrics(metrics, send)] if metrics else []),
        save,
        stop_on_signal,
    ]


def _show(progress: Progress, run: Prepared) -> Hook:
    """Return the hook that advances the progress line."""
    flops = cache(partial(_flops, run))

    def show(update: Update) -> None:
        if update.batch is not None:
            work = _work(run.data.plan, update.step - 1, flops)
            progress.advance(1, work, update.seconds, compiled=update.compiled, loss=update.line["loss"])

    return show


def _show_evaluation(progress: Progress, run: Prepared) -> Hook:
    """Return the hook that adds the latest evaluation to the progress line."""

    def show(update: Update) -> None:
        if update.evaluation:
            progress.latest = headline_of(update.evaluation, run.config.train.best_metric)

    return show


def _number(name: str, value: float | None) -> str:
    return f"{name} {math.nan if value is None else value:.4g}"


def _finished_parts(run: Prepared, step: int) -> tuple[bool, bool]:
    """Return whether a step was evaluated on all evaluation data, and whether its controls were answered."""
    data = run.data.evaluation
    if data is None:
        return True, True
    return not run.config.train.keep_best or _is_evaluated(run, data, step), not unanswered_controls(run, data, step)


def _is_evaluated(run: Prepared, data: EvaluationData, step: int) -> bool:
    """Return whether a step was evaluated on all evaluation data, not only on `train.eval_samples` conversations."""
    line = next((line for line in read_metrics(run.out / METRICS) if line["step"] == step), {})
    if line != with_final(line):
        return True
    total, size = len(data.dataset), run.config.train.eval_samples
    predictions = predictions_by_step(run.out).get(step)
    is_whole = predictions is not None and predictions.read_bytes().count(b"\n") == total
    subset = partial(eval_subset, data.dataset, run.config.train.batch_size)
    return is_whole and (size is None or len(subset(size, parts(run.training.mesh))) == total)


def _about(mesh: Mesh) -> str:
    kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
    return f"umbrella-jax {versions()['umbrella-jax']}, jax {jax.__version__}, {mesh.size} × {kinds}"


def _peak(run: Prepared) -> float | None:
    """Return the peak FLOP/s of all devices together, or None if it is not known for the run's compute dtype."""
    mesh = run.training.mesh
    sheet = sheet_of(mesh.devices.flat[0].device_kind)
    return sheet.flops * mesh.size if sheet and run.model.config.compute_dtype == sheet.dtype else None


def _flops(run: Prepared, shape: BatchShape) -> float:
    """Return the FLOPs of an update, or 0 if the devices' peak is not known."""
    if _peak(run) is None:
        return 0.0
    per_micro_batch = batch_flops(
        run.config,
        run.model.config,
        conversations=shape.conversations,
        positions=shape.positions,
        targets=shape.targets,
        volumes=dict(shape.volumes),
    )
    return per_micro_batch * run.config.train.accumulate_steps


def _work(plan: EpochPlan, step: int, flops: Callable[[BatchShape], float]) -> Work:
    update = plan.update(step)
    rows = [row for micro in update.rows for row in micro]
    return Work(samples=len(rows), tokens=int(plan.sizes.lengths[rows].sum()), flops=flops(update.shape))


def _with_absolute_base(config: RunConfig, base: Checkpoint) -> RunConfig:
    """Make the base an absolute path, so that the run can be loaded from any directory; add the step of a run."""
    path = base.step_directory or Path(str(config.model.base))
    return replace(config, model=replace(config.model, base=str(path.absolute()))) if path.is_dir() else config
