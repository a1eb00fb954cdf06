"""A training run, from a config to a run directory; what lies there, umbrella_jax/rundir.py says.

`train` and `rehearse` (`umbrella-jax train --dry-run`) share all up to the first step: `_prepare`.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from convert.tensor import Tensor, place
from umbrella_jax.api import Checkpoint, describe, open_base
from umbrella_jax.config import AugmentConfig, RunConfig, dump_config, flat, parse_config, to_dict
from umbrella_jax.data.cache import VolumeCache
from umbrella_jax.data.inputs import Inputs, changed, digest_of, dump_inputs, read_inputs
from umbrella_jax.data.loader import (
    Dataset,
    empty_batch,
    eval_batches,
    eval_shapes,
    eval_subset,
    make_plan,
    task_ids,
    train_batches,
)
from umbrella_jax.data.plan import BatchShape, Plan
from umbrella_jax.distributed import agree, gather, together
from umbrella_jax.errors import LESS, CheckpointError, ConfigError
from umbrella_jax.evaluation.metrics import Task, metric_names, score, task_of, tasks_of
from umbrella_jax.files import locked, write_whole
from umbrella_jax.loggers import loggers, missing
from umbrella_jax.models import LlavaConfig, Params, abstract_params, lora, native_backend, quantize
from umbrella_jax.plan import at_shape, batch_flops, sheet_of
from umbrella_jax.prediction import Choices, Row, answers, blank_rows, compile_answers, with_answer
from umbrella_jax.processor import Processor
from umbrella_jax.progress import Progress, Work
from umbrella_jax.reading import LISTING, read_json
from umbrella_jax.rundir import (
    CHECKPOINTS,
    CONFIG,
    INPUTS,
    LOG,
    METRICS,
    MODEL,
    PREDICTIONS,
    Line,
    RunLog,
    Say,
    read_metrics,
)
from umbrella_jax.sharding import MeshShape, abstract_batch, make_mesh, param_sharding, parts, put_batch, shardings
from umbrella_jax.signals import Signals
from umbrella_jax.training import freeze
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import TrainState, init_state, jit_eval_step, jit_train_step
from umbrella_jax.training.trainer import fit

T = TypeVar("T")
# What may differ when a run goes on: where it reads from and how often it looks, not what it computes.
# (Whether the base is the same one, its fingerprint says.)
_MAY_CHANGE = (
    "output_dir",
    "model.base",
    "data.image_root",
    "data.allow_outside_root",
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
    "train.best_mode",
    "train.on_nonfinite",
    "train.max_skipped",
    "train.tensorboard",
    "train.wandb",
    "evaluation",
)


def inspect(config: RunConfig) -> str:
    """What `train` says before it starts: per component how many parameters train and are frozen, and their names.

    Needs config.json of the base alone; a checkpoint that lies there too is checked.
    """
    base = open_base(config, weights=False)
    bare = base.kind == "hf" and not any(base.path.glob("*.safetensors*"))
    found = (
        [f"{base.path}: no weights there; from config.json alone"] if bare else base.check(config.model.frozen_dtype)
    )
    _, shapes = abstract_params(replace(base.config, lora=config.model.lora))
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    return "\n".join([*_said_of(base), *found, freeze.summary(shapes, labels)])


def _said_of(base: Checkpoint) -> list[str]:
    """What is to be said of a base, for people."""
    return [f"{base.path}: a run, as of step {base.step}"] if base.kind == "run" else list(base.notes)


def train(config: RunConfig, *, resume: bool = False, say: Say = tqdm.write) -> Line:
    """Trains what `config.train.groups` names and returns the last line of metrics.

    Everything that can be wrong with config, data and weights is refused before anything is compiled. All processes
    of a run (`umbrella_jax.distributed.start`) call this alike and see one `output_dir`; the first alone says and
    writes something, checkpoints apart, which each writes its part of.

    Args:
        resume: go on from the newest checkpoint in `output_dir` that is not damaged.
        say: takes the lines for people, which `log.txt` has too.

    Raises:
        ConfigError, DataError, CheckpointError: with every fault found.
        UmbrellaError: loss or gradient are not finite.
        Interrupted: by SIGTERM or SIGINT, at the end of a step, which was saved; `resume` goes on.
    """
    first = jax.process_index() == 0
    with ExitStack() as held:
        _meet()
        with together():
            out, mesh = _check(config)
            out.mkdir(parents=True, exist_ok=True)
            if first:
                held.enter_context(locked(out))
            _check_unused(out, resume)
            log = held.enter_context(RunLog(out / LOG, say, _about(mesh))) if first else None
        prepared = _prepare(config, out, mesh, log.say if log else _nothing)
        return _run(prepared, resume, log)


def rehearse(config: RunConfig, *, resume: bool = False, say: Say = tqdm.write) -> None:
    """All that `train` does but the steps: checks config, data and weights, says what would train and in which batches,
    and compiles every program, for its memory and its time. Nothing is written to `output_dir`, and it is not locked;
    what `data.cache` lacks is put there.

    Raises:
        ConfigError, DataError, CheckpointError: as `train`; and where the devices have too little memory.
    """
    say = say if jax.process_index() == 0 else _nothing
    _meet()
    with together():
        out, mesh = _check(config)
        _check_unused(out, resume)
        _check_writable(out)
    prepared = _prepare(config, out, mesh, say)
    if resume and (out / CHECKPOINTS).exists():
        assert prepared.state is not None
        with Checkpoints(out / CHECKPOINTS, read_only=True) as checkpoints:
            _newest(checkpoints, prepared.state, prepared.meta, prepared.inputs, say)
    with together():
        _compile(prepared, say)
    say(f"nothing was written to {out}")


@dataclass
class Prepared:
    """A run before its first step."""

    config: RunConfig
    out: Path
    mesh: Mesh
    base: Checkpoint
    processor: Processor
    lines: list[Line]
    """Of metrics, that are there."""
    train_set: Dataset
    evaluated: "Evaluated | None"
    model: LlavaConfig
    graphdef: nnx.GraphDef
    frozen: Params
    state: TrainState | None
    """Before the first step; None as soon as a loop has it, so that it is not kept beside what the loop makes of it."""
    plan: Plan
    steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformationExtraArgs
    meta: dict[str, Any]
    inputs: Inputs


def _prepare(config: RunConfig, out: Path, mesh: Mesh, say: Say) -> Prepared:
    """Reads and checks all that a run takes, puts the weights on their devices, and says what will be done."""
    first = jax.process_index() == 0
    with together():
        lines = read_metrics(out / METRICS)
        base = open_base(config)
        if faults := MeshShape(**mesh.shape).undivided(base.config):
            raise ConfigError(faults)
        found = base.check(config.model.frozen_dtype)
        model = base.config.with_attention(config.model.attention, native_backend(mesh.devices.flat[0]))
        model = replace(model, lora=config.model.lora)
        graphdef, shapes = abstract_params(model)
        labels = freeze.label_params(list(shapes), list(config.train.groups))
        options: dict[str, Any] = {"template": config.data.template, "max_length": config.data.max_length}
        processor = Processor(base.tokenizer(), base.config.modalities, **options)
        volumes = VolumeCache.of(config.data)
        train_set, eval_set = (_dataset(config, processor, split, volumes) for split in ("train", "eval"))
        evaluated = _evaluated(config, eval_set, processor)
        assert train_set is not None
        datasets = {"train": train_set} | ({} if eval_set is None else {"eval": eval_set})
        # by the first alone, since they read the whole base, and all volumes; but for a run orbax lets all meet
        identity = base.identity if first or base.kind == "run" else None
        mine = (identity, read_inputs(config.data, datasets)) if first else None
    for line in [*_said_of(base), *found, freeze.summary(shapes, labels)]:
        say(line)

    where = partial(param_sharding, mesh)
    adapters = lora.start(shapes, config.seed)
    own = [path for path, label in labels.items() if label != freeze.FROZEN and path not in adapters]
    params = base.params(config.model.frozen_dtype, where=where, in_float32=own)
    params |= place({path: Tensor.of(array) for path, array in adapters.items()}, where)
    trainable, frozen = freeze.partition(params, labels)
    del params
    if config.model.quantize:
        frozen = quantize(frozen, config.model.quantize)
    plan = make_plan(
        train_set,
        batch_size=config.train.batch_size,
        accumulate_steps=config.train.accumulate_steps,
        seed=config.seed,
        parts=parts(mesh).of,
    )
    steps = plan.num_steps(config.train.epochs)
    schedule = make_schedule(config.train, steps)
    optimizer = make_optimizer(config.train, schedule, labels)
    state = init_state(freeze.as_trainable(trainable), optimizer)
    state = jax.device_put(state, shardings(state, mesh))
    fingerprint, inputs = gather(mine)[0]
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say(f"{len(train_set)} conversations, {steps} steps on {mesh.size} device(s) ({sizes}), into {out}")
    say(f"plan: {plan.report}")
    say(f"attention: {model.attention}")
    return Prepared(
        config=config,
        out=out,
        mesh=mesh,
        base=base,
        processor=processor,
        lines=lines,
        train_set=train_set,
        evaluated=evaluated,
        model=model,
        graphdef=graphdef,
        frozen=frozen,
        state=state,
        plan=plan,
        steps=steps,
        schedule=schedule,
        optimizer=optimizer,
        meta={
            "config": to_dict(config),
            "base_fingerprint": fingerprint,
            "architecture": {"vision": asdict(base.config.vision), "text": asdict(base.config.text)},
            "inputs": digest_of(inputs),
            "frozen_types": sorted({leaf.dtype.name for leaf in frozen.values()}),
            "versions": _versions(),
        },
        inputs=inputs,
    )


def _run(run: Prepared, resume: bool, log: RunLog | None) -> Line:
    """The steps. `log`: of the first process."""
    config, out, mesh, metrics = run.config, run.out, run.mesh, run.out / METRICS
    say, note = (log.say, log.note) if log else (_nothing, _nothing)
    state, run.state = run.state, None
    assert state is not None
    with (
        Checkpoints(out / CHECKPOINTS, config.train, run.lines) as checkpoints,
        Signals(say) as signals,
        ExitStack() as opened,
    ):
        state, pending = _resume(checkpoints, state, run.meta, run.inputs, say) if resume else (state, None)
        if log:
            if not resume or not (out / MODEL).exists():
                describe(run.base, out / MODEL)
            write_whole(out / CONFIG, dump_config(_absolute(config, run.base)))
            write_whole(out / INPUTS, dump_inputs(run.inputs))

        def interrupted() -> int:
            return agree(signals.received)

        start = int(state.step)
        lines = opened.enter_context(loggers(config, out, start - bool(pending))) if log else None
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
            evaluate=None if run.evaluated is None else partial(_evaluate, run, run.evaluated, interrupted, options),
            log=lines,
            interrupted=interrupted,
            pending=pending,
            say=say,
            progress=told,
        )
    for step, value in checkpoints.best():
        say(f"best: {config.train.best_metric} {value:.4g} at step {step}: {checkpoints.directory / str(step)}")
    last: Line = gather(read_metrics(metrics)[-1] if log else None)[0]
    numbers = [f"{name} {math.nan if value is None else value:.4g}" for name, value in last.items() if name != "steps"]
    say("  ".join(number for number in numbers if not number.startswith("eval_")))
    for number in numbers:
        if number.startswith("eval_"):
            say(number)  # of each task many: a line each
    return last


def _meet() -> None:
    with together():
        pass  # the first meeting, for which jax waits half a minute at most, before some read longer than others


def _about(mesh: Mesh) -> str:
    kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
    return f"umbrella-jax {_versions()['umbrella-jax']}, jax {jax.__version__}, {mesh.size} × {kinds}"


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


def _work(plan: Plan, step: int, flops: Callable[[BatchShape], float]) -> Work:
    update = plan.update(step)
    rows = [row for micro in update.rows for row in micro]
    return Work(samples=len(rows), tokens=int(plan.facts.lengths[rows].sum()), flops=flops(update.shape))


def _nothing(line: str) -> None:
    """Says nothing."""


def _check(config: RunConfig) -> tuple[Path, Mesh]:
    """Checks what can be known before any file is read, of the mesh all that does not depend on the model."""
    faults = [
        f"{field}: expected a path ({flag})"
        for field, flag, value in [
            ("model.base", "--base HF_DIR", config.model.base),
            ("data.train", "--train-data P", config.data.train),
            ("output_dir", "--out D", config.output_dir),
        ]
        if value is None
    ]
    try:
        mesh = make_mesh(config.mesh, batch_size=config.train.batch_size)
    except ConfigError as error:
        faults += error.faults
    if config.train.eval_steps and config.data.eval is None:
        faults.append("train.eval_steps: nothing to evaluate on; name data.eval (--eval-data P)")
    faults += missing(config)
    if config.model.quantize and importlib.util.find_spec("qwix") is None:
        faults.append("model.quantize: qwix is not installed; pip install 'umbrella-jax[quantize]', or leave it out")
    if faults:
        raise ConfigError(faults)
    return Path(str(config.output_dir)), mesh


def _check_unused(out: Path, resume: bool) -> None:
    if (out / CHECKPOINTS).exists() and not resume:
        raise ConfigError(f"{out}: holds a run; go on with --resume, or name another output_dir (--out DIR)")


def _check_writable(out: Path) -> None:
    """Raises ConfigError where the directory could not be made, or written to."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{out}: cannot be written, because of {there}; name another output_dir (--out DIR)")


def _dataset(config: RunConfig, processor: Processor, split: str, cache: VolumeCache | None) -> Dataset | None:
    path = getattr(config.data, split)
    if path is None:
        return None
    return Dataset.load(
        path,
        processor.tokenizer,
        processor.modalities,
        image_root=config.data.image_root,
        modality=config.data.modality,
        task_filter=config.data.task_filter,
        allow_outside_root=config.data.allow_outside_root,
        template=config.data.template,
        max_length=config.data.max_length,
        threads=config.data.threads,
        evaluation=split == "eval",
        cache=cache,
        augment=config.data.augment if split == "train" else AugmentConfig(),
    )


@dataclass(frozen=True)
class Evaluated:
    """What a run evaluates on."""

    dataset: Dataset
    rows: list[Row]
    tasks: dict[str, Task]
    choices: Choices | None
    """Answers whose likelihoods are wanted."""


def _evaluated(config: RunConfig, dataset: Dataset | None, processor: Processor) -> Evaluated | None:
    """Raises DataError and ConfigError, also for a `train.best_metric` that no evaluation gives."""
    found, known = None, list[str]()
    if dataset is not None:
        rows = blank_rows(dataset)
        tasks = tasks_of(rows, config.evaluation.tasks)
        choices = Choices.of(dataset, processor, rows, tasks) if config.evaluation.likelihoods else None
        found = Evaluated(dataset, rows, tasks, choices)
        known = sorted(f"eval_{name}" for name in ("loss", *metric_names(tasks, likelihoods=bool(choices))))
    wanted = config.train.best_metric
    if wanted is not None and wanted not in known:
        given = f"one of {', '.join(known)}" if known else "data.eval too (--eval-data P)"
        raise ConfigError(f"train.best_metric: no evaluation gives {wanted}; expected {given}")
    return found


def _resume(
    checkpoints: Checkpoints, state: TrainState, meta: dict[str, Any], inputs: Inputs, say: Say
) -> tuple[TrainState, Line | None]:
    """The state of the newest checkpoint that is not damaged, if it belongs to the same run, and its pending line."""
    found, saved, damaged = _newest(checkpoints, state, meta, inputs, say)
    for bad in damaged:
        if jax.process_index() == 0:
            checkpoints.set_aside(bad)
        say(f"renamed to {bad}.damaged, no longer looked at")
    if damaged:
        gather(None)  # renamed
        checkpoints.reload()
    return (state, None) if found is None else (found, saved.get("pending"))


def _newest(
    checkpoints: Checkpoints, state: TrainState, meta: dict[str, Any], inputs: Inputs, say: Say
) -> tuple[TrainState | None, dict[str, Any], list[int]]:
    """The state of the newest checkpoint that is not damaged, None where there is none yet; what stands beside it; and
    the steps that are damaged. Says which it is. Raises ConfigError where it is another run's."""
    damaged: dict[int, list[str]] = {}
    found = saved = None
    for step in checkpoints.steps():
        saved, faults = _attempt(checkpoints.meta, step)
        if saved is not None:
            with together():
                _same_run(checkpoints.directory, saved, meta, inputs)
            found, faults = _attempt(checkpoints.restore, step, state)
        if found is not None:
            break
        damaged[step] = faults
    if damaged and found is None:
        with together():
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


def _same_run(directory: Path, saved: dict[str, Any], meta: dict[str, Any], inputs: Inputs) -> None:
    """Raises ConfigError with everything in which the run of a checkpoint is another one."""
    stored = to_dict(parse_config(saved["config"], str(directory)))  # with fields that it did not know yet
    before, now = flat(stored), flat(meta["config"])
    faults = [
        f"{key}: {now.get(key)} now, {before.get(key)} in the checkpoint"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in _MAY_CHANGE)
    ]
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


def _absolute(config: RunConfig, base: Checkpoint) -> RunConfig:
    """With the base as an absolute path, a run with its step: what is trained is loaded from anywhere, later."""
    path = Path(str(config.model.base))
    if base.kind == "run":
        path = base.path / CHECKPOINTS / str(base.step)
    return replace(config, model=replace(config.model, base=str(path.absolute()))) if path.is_dir() else config


def _versions() -> dict[str, str]:
    names = ("umbrella-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _evaluate(
    run: Prepared,
    evaluated: Evaluated,
    interrupted: Callable[[], int],
    options: Mapping[str, Any],
    step: int,
    trainable: Params,
) -> Line | None:
    """Loss over the answers, and how right greedy ones are; these go to predictions/step_N.jsonl.

    None, and no answers, where a signal comes meanwhile.

    Args:
        options: of the `Progress` of both.
    """
    config, mesh, dataset = run.config, run.mesh, evaluated.dataset
    common: dict[str, Any] = {"threads": config.data.threads, "only": None}
    if step < run.steps and config.train.eval_samples is not None:
        common["only"] = eval_subset(dataset, config.train.batch_size, config.train.eval_samples, parts(mesh))
    total = len(dataset if common["only"] is None else common["only"])
    loss, supervised = 0.0, 0
    with Progress(f"evaluation at step {step}: loss of", total, **options) as progress:
        batches = eval_batches(dataset, config.train.batch_size, prompts=False, parts=parts(mesh), **common)
        shapes: set[Any] = set()
        begun = time.perf_counter()
        for indices, batch in batches:
            if interrupted():
                return None
            shape = batch.input_ids.shape, tuple((name, len(x)) for name, x in batch.volumes.items())
            batch_loss, count = jit_eval_step(
                trainable, run.frozen, put_batch(batch, mesh, axis=0), graphdef=run.graphdef
            )
            loss, supervised = loss + float(batch_loss), supervised + int(count)
            work = Work(samples=len(indices), tokens=sum(len(dataset.encoded[i]) for i in indices))
            progress.advance(len(indices), work, time.perf_counter() - begun, compiled=shape not in shapes)
            shapes.add(shape)
            begun = time.perf_counter()
    rows: dict[int, Row] = {}
    with Progress(f"evaluation at step {step}: answer", total, **options) as progress:
        for found in answers(
            trainable | run.frozen,
            run.graphdef,
            dataset,
            run.processor,
            mesh,
            batch_size=config.train.batch_size,
            max_new_tokens=config.train.max_new_tokens,
            choices=evaluated.choices,
            progress=progress,
            **common,
        ):
            if interrupted():
                return None
            rows |= {index: with_answer(evaluated.rows[index], answer) for index, answer in found.items()}
    answered = [rows[index] for index in sorted(rows)]
    if jax.process_index() == 0:
        folder = run.out / PREDICTIONS
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"step_{step}.jsonl", "".join(json.dumps(row) + "\n" for row in answered))
    mean = loss / supervised if supervised else None  # none: the truth is in metadata alone
    metrics: Line = {} if mean is None else {"loss": mean if math.isfinite(mean) else None}
    there = {task_of(row) for row in answered}
    tasks = {name: task for name, task in evaluated.tasks.items() if name in there}
    return {f"eval_{name}": value for name, value in (metrics | score(answered, tasks, resamples=0).flat()).items()}


def _compile(run: Prepared, say: Say) -> None:
    """Compiles all that a run calls, and says of each program how long that took and what it takes of a device, beside
    what `umbrella-jax plan` counts and what the device has.

    Raises ConfigError naming each program that the device has too little memory for.
    """
    device = jax.local_devices()[0]
    has = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes, planned, faults = list[int](), list[float](), list[str]()
    began = last = time.perf_counter()
    for what, shape, program in _programs(run):
        took, last = time.perf_counter() - last, time.perf_counter()
        size = _memory(program)
        say(f"compiled in {took:.1f} s: {what} of {shape}" + ("" if size is None else f"; takes {_bytes(size)}"))
        sizes.append(size or 0)
        if what == "step":
            planned.append(_planned(run, shape))
        if has is not None and (size or 0) > has:
            faults.append(f"{what} of {shape}: takes {_bytes(size or 0)} of a device that has {_bytes(has)}; {LESS}")
    say(f"{len(sizes)} programs compiled in {time.perf_counter() - began:.1f} s")
    compiled = _bytes(max(sizes)) if any(sizes) else "not known"
    say(
        f"memory of a device: {compiled} as compiled, {_bytes(max(planned))} as umbrella-jax plan counts; it has "
        + ("an unknown size" if has is None else _bytes(has))
    )
    if faults:
        raise ConfigError(faults)


def _programs(run: Prepared) -> Iterator[tuple[str, BatchShape, jax.stages.Compiled]]:
    """As `fit` and `_evaluate` call them; nothing is computed."""
    config, mesh, state = run.config, run.mesh, run.state
    assert state is not None
    with jax.set_mesh(mesh):
        for shape in dict.fromkeys(shape for shapes in run.plan.shapes for shape in shapes):
            batch = empty_batch(run.train_set, shape, accumulate_steps=config.train.accumulate_steps)
            given = state, run.frozen, abstract_batch(batch, mesh, axis=1)
            yield "step", shape, jit_train_step.lower(*given, graphdef=run.graphdef, optimizer=run.optimizer).compile()
        if run.evaluated is None:
            return
        dataset, batch_size = run.evaluated.dataset, config.train.batch_size
        for shape in eval_shapes(dataset, batch_size, prompts=False, parts=parts(mesh)):
            evaluating = abstract_batch(empty_batch(dataset, shape), mesh, axis=0)
            lowered = jit_eval_step.lower(state.trainable, run.frozen, evaluating, graphdef=run.graphdef)
            yield "evaluation", shape, lowered.compile()
        yield from compile_answers(
            state.trainable | run.frozen,
            run.graphdef,
            dataset,
            run.processor,
            mesh,
            batch_size=batch_size,
            max_new_tokens=config.train.max_new_tokens,
            choices=run.evaluated.choices,
        )


def _memory(program: jax.stages.Compiled) -> int | None:
    """Bytes of a device that it takes, its arguments among them; None where the backend does not say."""
    if (found := program.memory_analysis()) is None:
        return None
    size = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(size + found.temp_size_in_bytes + found.generated_code_size_in_bytes)


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _planned(run: Prepared, shape: BatchShape) -> float:
    """Bytes of a device in a step."""
    name = max(dict(shape.volumes) or run.model.modalities, key=lambda m: run.model.modalities[m].num_patches)
    held = next((leaf.dtype.name for leaf in run.frozen.values()), "float32")
    held = held if held in ("float32", "bfloat16", "float16") else "bfloat16"
    model = at_shape(run.config, run.model, name, positions=shape.positions, targets=shape.targets, frozen_dtype=held)
    return sum(model.device_bytes(MeshShape(**run.mesh.shape), shape.conversations, run.config.model.remat).values())
