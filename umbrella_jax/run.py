"""A training run, from a config to a run directory:

config.yaml      the resolved config
model/           config.json, tokenizer, modalities: all of the model but its weights
checkpoints/     orbax: what was trained, moments, step
metrics.jsonl    one line per update
inputs.json      what the run reads, by content
predictions/     answers of each evaluation
"""

import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from umbrella_jax.api import CHECKPOINTS, CONFIG, MODEL, describe, open_base
from umbrella_jax.config import AugmentConfig, RunConfig, dump_config, parse_config, to_dict
from umbrella_jax.data.cache import VolumeCache
from umbrella_jax.data.inputs import Inputs, changed, digest_of, dump_inputs, read_inputs
from umbrella_jax.data.loader import Dataset, eval_batches, eval_subset, make_plan, task_ids, train_batches
from umbrella_jax.distributed import agree, gather, together
from umbrella_jax.errors import CheckpointError, ConfigError
from umbrella_jax.evaluation.metrics import Task, metric_names, score, task_of, tasks_of
from umbrella_jax.files import locked, write_whole
from umbrella_jax.loggers import loggers, missing
from umbrella_jax.models import Params, abstract_params, native_backend, quantize
from umbrella_jax.prediction import Choices, Row, answers, blank_rows, with_answer
from umbrella_jax.processor import Processor
from umbrella_jax.reading import LISTING, read_json
from umbrella_jax.sharding import MeshShape, make_mesh, param_sharding, parts, put_batch, shardings
from umbrella_jax.signals import Signals
from umbrella_jax.training import freeze
from umbrella_jax.training.checkpoint import Checkpoints
from umbrella_jax.training.optimizer import make_optimizer, make_schedule
from umbrella_jax.training.step import TrainState, init_state, jit_eval_step
from umbrella_jax.training.trainer import Line, fit, read_metrics

Say = Callable[[str], None]
T = TypeVar("T")
INPUTS, PREDICTIONS = "inputs.json", "predictions"
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
    _, shapes = abstract_params(base.config)
    labels = freeze.label_params(list(shapes), list(config.train.groups))
    return "\n".join([*base.notes, *found, freeze.summary(shapes, labels)])


def train(config: RunConfig, *, resume: bool = False, say: Say = print) -> Line:
    """Trains what `config.train.groups` names and returns the last line of metrics.

    Everything that can be wrong with config, data and weights is refused before anything is compiled. All processes
    of a run (`umbrella_jax.distributed.start`) call this alike and see one `output_dir`; the first alone says and
    writes something, checkpoints apart, which each writes its part of.

    Args:
        resume: go on from the newest checkpoint in `output_dir` that is not damaged.
        say: takes the lines for people.

    Raises:
        ConfigError, DataError, CheckpointError: with every fault found.
        UmbrellaError: loss or gradient are not finite.
        Interrupted: by SIGTERM or SIGINT, at the end of a step, which was saved; `resume` goes on.
    """
    first = jax.process_index() == 0
    say = say if first else _nothing
    with together():
        pass  # the first meeting, for which jax waits half a minute at most, before some read longer than others
    with ExitStack() as held:
        with together():
            out, mesh = _output_dir(config)
            if first:
                held.enter_context(locked(out))
            if (out / CHECKPOINTS).exists() and not resume:
                raise ConfigError(f"{out}: holds a run; go on with --resume, or name another output_dir")
        return _train(config, out, mesh, resume, say)


def _train(config: RunConfig, out: Path, mesh: Mesh, resume: bool, say: Say) -> Line:
    first, metrics = jax.process_index() == 0, out / "metrics.jsonl"
    with together():
        lines = read_metrics(metrics)
        base = open_base(config)
        if faults := MeshShape(**mesh.shape).undivided(base.config):
            raise ConfigError(faults)
        found = base.check(config.model.frozen_dtype)
        model = base.config.with_attention(config.model.attention, native_backend(mesh.devices.flat[0]))
        graphdef, shapes = abstract_params(model)
        labels = freeze.label_params(list(shapes), list(config.train.groups))
        options: dict[str, Any] = {"template": config.data.template, "max_length": config.data.max_length}
        processor = Processor(base.tokenizer(), base.config.modalities, **options)
        cache = VolumeCache.of(config.data)
        train_set, eval_set = (_dataset(config, processor, split, cache) for split in ("train", "eval"))
        evaluated = _evaluated(config, eval_set, processor)
        assert train_set is not None
        datasets = {"train": train_set} | ({} if eval_set is None else {"eval": eval_set})
        # by the first alone: they read the whole base, and all volumes
        mine = (base.fingerprint, read_inputs(config.data, datasets)) if first else None
    for line in [*base.notes, *found, freeze.summary(shapes, labels)]:
        say(line)

    params = base.params(config.model.frozen_dtype, where=partial(param_sharding, mesh))
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
    del trainable
    fingerprint, inputs = gather(mine)[0]
    meta = {
        "config": to_dict(config),
        "base_fingerprint": fingerprint,
        "architecture": {"vision": asdict(base.config.vision), "text": asdict(base.config.text)},
        "inputs": digest_of(inputs),
        "frozen_types": sorted({leaf.dtype.name for leaf in frozen.values()}),
        "versions": _versions(),
    }

    with (
        Checkpoints(out / CHECKPOINTS, config.train, lines) as checkpoints,
        Signals(say) as signals,
        ExitStack() as opened,
    ):
        state, pending = _resume(checkpoints, state, meta, inputs, say) if resume else (state, None)
        if first:
            if not resume or not (out / MODEL).exists():
                describe(base, out / MODEL)
            write_whole(out / CONFIG, dump_config(_absolute(config)))
            write_whole(out / INPUTS, dump_inputs(inputs))

        def interrupted() -> int:
            return agree(signals.received)

        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        say(f"{len(train_set)} conversations, {steps} steps on {mesh.size} device(s) ({sizes}), into {out}")
        say(f"plan: {plan.report}")
        say(f"attention: {model.attention}")
        start = int(state.step)
        log = opened.enter_context(loggers(config, out, start - bool(pending))) if first else None
        state = fit(
            state,
            frozen,
            train_batches(
                train_set,
                plan,
                start_step=start,
                num_steps=steps,
                threads=config.data.threads,
                parts=parts(mesh),
            ),
            graphdef=graphdef,
            optimizer=optimizer,
            schedule=schedule,
            config=config.train,
            num_steps=steps,
            mesh=mesh,
            checkpoints=checkpoints,
            meta=meta,
            metrics_path=metrics,
            task_ids=partial(task_ids, train_set, plan),
            evaluate=None
            if evaluated is None
            else partial(_evaluate, config, out, evaluated, processor, graphdef, frozen, mesh, interrupted, steps),
            log=log,
            interrupted=interrupted,
            pending=pending,
        )
    for step, value in checkpoints.best():
        say(f"best: {config.train.best_metric} {value:.4g} at step {step}: {checkpoints.directory / str(step)}")
    return gather(read_metrics(metrics)[-1] if first else None)[0]


def _nothing(line: str) -> None:
    """Says nothing."""


def _output_dir(config: RunConfig) -> tuple[Path, Mesh]:
    """Checks what can be known before any file is read, of the mesh all that does not depend on the model; makes the
    directory."""
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
    out = Path(str(config.output_dir))
    out.mkdir(parents=True, exist_ok=True)
    return out, mesh


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
    damaged: dict[int, list[str]] = {}
    saved = found = None
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
    for bad, faults in damaged.items():
        if jax.process_index() == 0:
            checkpoints.set_aside(bad)
        say("\n".join(["WARNING: a damaged checkpoint:", *faults, f"renamed to {bad}.damaged, no longer looked at"]))
    if damaged:
        gather(None)  # renamed
        checkpoints.reload()
    if saved is None or found is None:
        say("resume: no checkpoint yet, starting at step 0")
        return state, None
    say(f"resume: from step {step}")
    for name, version in meta["versions"].items():
        if (before := saved["versions"].get(name)) != version:
            say(f"resume: {name} is {version} now, {before} before: numbers may differ in their last digits")
    return found, saved.get("pending")


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
    before, now = _flat(stored), _flat(meta["config"])
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
    before, now = _flat(saved["architecture"]), _flat(meta["architecture"])
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


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _absolute(config: RunConfig) -> RunConfig:
    """With the base as an absolute path: a run is loaded from anywhere."""
    base = Path(str(config.model.base))
    return replace(config, model=replace(config.model, base=str(base.absolute()))) if base.is_dir() else config


def _versions() -> dict[str, str]:
    names = ("umbrella-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _evaluate(
    config: RunConfig,
    out: Path,
    evaluated: Evaluated,
    processor: Processor,
    graphdef: nnx.GraphDef,
    frozen: Params,
    mesh: Mesh,
    interrupted: Callable[[], int],
    num_steps: int,
    step: int,
    trainable: Params,
) -> Line | None:
    """Loss over the answers, and how right greedy ones are; these go to predictions/step_N.jsonl.

    None, and no answers, where a signal comes meanwhile.
    """
    dataset = evaluated.dataset
    common: dict[str, Any] = {"threads": config.data.threads, "only": None}
    if step < num_steps and config.train.eval_samples is not None:
        common["only"] = eval_subset(dataset, config.train.batch_size, config.train.eval_samples, parts(mesh))
    loss, supervised = 0.0, 0
    for _, batch in eval_batches(dataset, config.train.batch_size, prompts=False, parts=parts(mesh), **common):
        if interrupted():
            return None
        batch_loss, count = jit_eval_step(trainable, frozen, put_batch(batch, mesh, axis=0), graphdef=graphdef)
        loss, supervised = loss + float(batch_loss), supervised + int(count)
    rows: dict[int, Row] = {}
    for found in answers(
        trainable | frozen,
        graphdef,
        dataset,
        processor,
        mesh,
        batch_size=config.train.batch_size,
        max_new_tokens=config.train.max_new_tokens,
        choices=evaluated.choices,
        **common,
    ):
        if interrupted():
            return None
        rows |= {index: with_answer(evaluated.rows[index], answer) for index, answer in found.items()}
    answered = [rows[index] for index in sorted(rows)]
    if jax.process_index() == 0:
        folder = out / PREDICTIONS
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"step_{step}.jsonl", "".join(json.dumps(row) + "\n" for row in answered))
    mean = loss / supervised if supervised else None  # none: the truth is in metadata alone
    metrics: Line = {} if mean is None else {"loss": mean if math.isfinite(mean) else None}
    there = {task_of(row) for row in answered}
    tasks = {name: task for name, task in evaluated.tasks.items() if name in there}
    return {f"eval_{name}": value for name, value in (metrics | score(answered, tasks, resamples=0).flat()).items()}
