"""Everything before the first step of a run, shared by `train` and `rehearse`."""

import importlib.metadata
import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from convert.lazy_tensor import Tensor, place
from umbrella_jax.checkpoints.checkpoint import Checkpoint
from umbrella_jax.checkpoints.load import open_base
from umbrella_jax.config.load import flat
from umbrella_jax.config.schema import LayerLoop, RunConfig, to_dict
from umbrella_jax.console import wrapped
from umbrella_jax.data.conversation import not_found
from umbrella_jax.data.epoch_plan import EpochPlan
from umbrella_jax.data.inputs import Inputs, digest_of, read_inputs
from umbrella_jax.data.loader import Dataset, make_epoch_plan
from umbrella_jax.data.validation.checks import check_overlap
from umbrella_jax.distributed import SHA256, broadcast, check_same, raise_together
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.inference.answers import Choices, check_lengths
from umbrella_jax.inference.constrained import Constraints
from umbrella_jax.inference.controls import ControlledDataset, applicable_controls, make_controls
from umbrella_jax.inference.processor import Processor
from umbrella_jax.inference.windows import ExpandedDataset, expand
from umbrella_jax.io.files import check_output, check_run_name
from umbrella_jax.models import LlavaConfig, abstract_params, lora, native_backend, quantize, unstack
from umbrella_jax.models.eight_bit import has_eight_bit_products
from umbrella_jax.models.paths import describe_part, is_component
from umbrella_jax.run.loggers import missing_loggers
from umbrella_jax.run.number_targets import find_number_targets
from umbrella_jax.run.summary import RunSummary, summarize, summarize_parameters
from umbrella_jax.rundir import METRICS, Line, Say, read_metrics
from umbrella_jax.scoring.metrics import Task, metric_names, tasks_of
from umbrella_jax.scoring.rows import Row, blank_rows
from umbrella_jax.sharding import MeshShape, make_mesh, param_sharding, parts, shardings
from umbrella_jax.training import freeze
from umbrella_jax.training.compiler import choose_loop
from umbrella_jax.training.optimizer import make_optimizer, make_schedule, warmup_updates
from umbrella_jax.training.step import TrainState, init_state
from umbrella_jax.training.trainer import TrainingRun

MAX_UPDATES = 10_000_000
_NOT_FOUND = {
    "train": "expected a file or a directory of conversations (--train-data PATH)",
    "eval": "expected conversations (--eval-data PATH), or no evaluation (--set data.eval=null)",
}
"""Remedies if the data do not exist."""


@dataclass(frozen=True)
class EvaluationData:
    """The evaluation data of a run."""

    dataset: Dataset
    expanded: ExpandedDataset
    """What the model answers: the data set with the windows of `evaluation.windows`."""
    rows: list[Row]
    """A row without answer for each conversation."""
    tasks: dict[str, Task]
    choices: Choices | None
    """The answers whose likelihoods are computed; None if the run asks for none."""
    controls: Mapping[str, Sequence[ControlledDataset]]
    """The data under each control of `evaluation.controls`, as from `make_controls`."""
    constraints: Constraints | None = None
    """JSON schemas that answers must follow; None if no task has one."""


@dataclass(frozen=True)
class RunData:
    """The data that a run reads."""

    train_set: Dataset
    evaluation: EvaluationData | None
    plan: EpochPlan
    """Which conversations make which update."""
    inputs: Inputs
    """A digest of every file."""


@dataclass(frozen=True)
class RunModel:
    """The model that a run trains; `Prepared.training` holds its weights."""

    base: Checkpoint
    """The checkpoint that it starts from."""
    processor: Processor
    config: LlavaConfig
    """With the run's attention and adapters."""


@dataclass(frozen=True)
class Shared:
    """What runs that differ only in seed or data have in common: data that were checked, and an optimizer.

    The optimizer is a static argument of the step, so only runs with the same one share the steps that are compiled.
    """

    datasets: dict[str, Dataset]
    """Empty if the data differ, and so are `inputs`."""
    inputs: Inputs
    optimizer: optax.GradientTransformationExtraArgs
    loop: LayerLoop
    compiled_shapes: set[Any]
    """For steps with this loop."""


@dataclass(frozen=True)
class Prepared:
    """A run before its first step, all but the state that training changes."""

    config: RunConfig
    out: Path
    model: RunModel
    data: RunData
    training: TrainingRun
    summary: RunSummary
    meta: dict[str, Any]
    """Saved in every checkpoint, to compare with a run that resumes from it."""
    earlier_lines: list[Line]
    """Lines of `metrics.jsonl` that are there already."""

    @property
    def shared(self) -> Shared:
        """What a run with another seed can use again."""
        evaluation = self.data.evaluation
        datasets = {"train": self.data.train_set} | ({"eval": evaluation.dataset} if evaluation else {})
        training, loop = self.training, self.model.config.layers
        return Shared(datasets, self.data.inputs, training.optimizer, loop, training.compiled_shapes)


def check(config: RunConfig) -> tuple[Path, Mesh]:
    """Check everything that can be checked before a file is read, and return the output directory and the mesh.

    Raises ConfigError with every fault. `prepare` checks the mesh against the model.
    """
    faults = [
        f"{field}: expected a path ({flag})"
        for field, flag, value in [
            ("model.base", "--base HF_DIR", config.model.base),
            ("data.train", "--train-data PATH", config.data.train),
            ("output_dir", "--out DIR", config.output_dir),
        ]
        if value is None
    ]
    faults += [
        f"data.{name}: {path}: {not_found(Path(path))}; {_NOT_FOUND[name]}"
        for name, path in (("train", config.data.train), ("eval", config.data.eval))
        if path is not None and not Path(path).exists()
    ]
    try:
        mesh = make_mesh(config.mesh, batch_size=config.train.batch_size)
    except ConfigError as error:
        faults += error.faults
    if config.train.eval_steps and config.data.eval is None:
        faults.append("train.eval_steps: nothing to evaluate on; name data.eval (--eval-data PATH)")
    faults += missing_loggers(config)
    if config.model.quantize and importlib.util.find_spec("qwix") is None:
        faults.append("model.quantize: qwix is not installed; pip install 'umbrella-jax[quantize]', or leave it out")
    if faults:
        raise ConfigError(faults)
    out = Path(str(config.output_dir))
    remedy = "choose another output_dir (--out DIR)"
    check_output(out, remedy, folder=True)
    check_run_name(out, remedy)
    return out, mesh


def prepare(
    config: RunConfig, out: Path, mesh: Mesh, say: Say, shared: Shared | None = None
) -> tuple[Prepared, TrainState]:
    """Read and check everything that a run needs, put the weights on their devices, and print what will be trained.

    Args:
        shared: of an earlier run of this process, whose config differs only in seed, `output_dir` and, if its data
            are empty, in data.

    Returns:
        The run, and the state before its first step. Only the caller holds that state: `fit` and `resume_from` use it
        up, since the devices may not have room for two.
    """
    with raise_together():
        earlier_lines = read_metrics(out / METRICS)
        base = open_base(config)
        if faults := MeshShape(**mesh.shape).undivided(base.config):
            raise ConfigError(faults)
        findings = base.check(config.model.frozen_dtype)
        model = base.config.with_attention(config.model.attention, native_backend(mesh.devices.flat[0]))
        model = replace(model, lora=config.model.lora, product_dtype=config.model.product_dtype)
        shapes = abstract_params(model)[1]
        adapters = base.initial_factors(config.model.lora, lora.init_adapters(shapes, config.seed))
        parameters = summarize_parameters(config, base, findings, model)
        labels = parameters.labels
        options: dict[str, Any] = {"template": config.data.template, "max_length": config.data.max_length}
        processor = Processor(base.tokenizer(), base.config.modalities, **options)
        datasets = (shared and shared.datasets) or processor.datasets(config.data, augment=True)
        train_set = datasets["train"]
        overlap = check_overlap(datasets, allowed=config.data.allow_overlap)
        if config.train.number_loss and not train_set.number_targets:
            targets = find_number_targets(train_set, processor, config.evaluation.tasks)
            train_set = replace(train_set, number_targets=targets)
        _check_length(config, len(train_set))
        shown = {image.modality for image in train_set.windows}
        _check_shown(config, labels, shown, len(train_set))
        evaluation = _evaluation_data(config, datasets.get("eval"), processor, model.text.vocab_size)
    base.share_fingerprint()
    with raise_together():
        # Separate from the block above: orbax synchronises all processes when it reads a run's identity, and would wait
        # forever for a process that had already failed.
        fingerprint, inputs = base.identity, (shared and shared.inputs) or read_inputs(config.data, datasets)
    facts = [(f"{base.path}: config.json: {key}", value) for key, value in flat(base.config.architecture).items()]
    facts.append((f"{base.path}: weights", SHA256 + fingerprint))
    facts += [(name, SHA256 + digest) for files in inputs.values() for name, digest in files]
    check_same(facts, "copy it again: every host must read the same")
    if overlap:
        _warn(overlap, say)

    trained = [path for path, label in labels.items() if label != freeze.FROZEN and path not in adapters]
    _warn_of_untrained(config, base, trained, shown, say)
    if (dtype := config.model.product_dtype) and not has_eight_bit_products(mesh.devices.flat[0], dtype):
        kind = mesh.devices.flat[0].device_kind
        _warn(
            f"model.quantize_activations: {kind} is not known to have {dtype} products; XLA emulates them, which is "
            "slower than without; see docs/recipes.md",
            say,
        )
    params = base.params(config.model.frozen_dtype, sharding_for=partial(param_sharding, mesh), in_float32=trained)
    params |= place({path: Tensor.from_array(array) for path, array in adapters.items()}, partial(param_sharding, mesh))
    trainable, frozen = freeze.partition(params, labels)
    del params
    if config.model.quantize:
        frozen = quantize(frozen, config.model.quantize)
    plan = make_epoch_plan(
        train_set,
        batch_size=config.train.batch_size,
        accumulate_steps=config.train.accumulate_steps,
        seed=config.seed,
        parts=parts(mesh).total,
    )
    num_steps = plan.num_steps(config.train.epochs)
    loop, loop_reason = _choose_loop(config, mesh, plan, num_steps)
    model = replace(model, layers=loop)
    optimizer = shared.optimizer if shared else make_optimizer(config.train, labels)
    state = init_state(freeze.as_trainable(trainable), optimizer)
    state = jax.device_put(state, shardings(state, mesh))
    with raise_together():
        summary = summarize(config, parameters, state, frozen, mesh, loop, loop_reason)
    frozen_types = sorted({leaf.dtype.name for leaf in frozen.values()})
    if loop == "unrolled":
        frozen = unstack(frozen)
    prepared = Prepared(
        config=config,
        out=out,
        model=RunModel(base, processor, model),
        data=RunData(train_set, evaluation, plan, inputs),
        training=TrainingRun(
            config=config.train,
            num_steps=num_steps,
            graphdef=abstract_params(model)[0],
            frozen=frozen,
            optimizer=optimizer,
            schedule=make_schedule(config.train, num_steps),
            mesh=mesh,
            compiled_shapes=shared.compiled_shapes if shared and shared.loop == loop else set(),
        ),
        summary=summary,
        meta={
            "config": to_dict(config),
            "num_steps": num_steps,
            "base_fingerprint": fingerprint,
            "architecture": base.config.architecture,
            "inputs": digest_of(inputs),
            "frozen_types": frozen_types,
            "versions": versions(),
        },
        earlier_lines=earlier_lines,
    )
    for line in [*summary.lines(), *_plan_lines(prepared)]:
        say(line)
    return prepared, state


def _choose_loop(config: RunConfig, mesh: Mesh, plan: EpochPlan, num_steps: int) -> tuple[LayerLoop, str]:
    """Resolve `model.layers` as `choose_loop` does, the same on every process and if the run is resumed."""
    programs = len({shape for shapes in plan.shapes for shape in shapes})
    passes = num_steps * config.train.accumulate_steps / programs
    cached = broadcast(bool(jax.config.jax_compilation_cache_dir))  # type: ignore[attr-defined]
    return choose_loop(config.model.layers, mesh.devices.flat[0].platform, passes, cached=cached)


def _warn(text: str, say: Say) -> None:
    say("\n".join(wrapped(f"WARNING: {text}")))


def _warn_of_untrained(
    config: RunConfig, base: Checkpoint, trained: Collection[str], shown: Collection[str], say: Say
) -> None:
    """Warn about parts that will be untrained after the run, and about patch embeddings that no conversation shows.

    Args:
        trained: the parameters of the base that train.
        shown: the modalities that conversations show.
    """
    left = base.untrained_after(trained)
    for name, why in left.items():
        whole = f" as a whole: add the group {name}, or" if is_component(name) else ":"
        _warn(f"{describe_part(name)} {why}, and train.groups does not train it{whole} answers would mean nothing", say)
    for name in () if shown else filter(is_component, sorted(base.untrained.keys() - left.keys())):
        _warn(f"{name}: no conversation in {config.data.train} shows a volume: it stays {base.untrained[name]}", say)
    for name in sorted({modality for modality in map(freeze.modality_of, trained) if modality} - set(shown)):
        start = f"untrained ({base.untrained[name]})" if name in base.untrained else "as it is in the base"
        _warn(f"{name}: no conversation in {config.data.train} shows it: its patch embedding stays {start}", say)


def _plan_lines(run: Prepared) -> list[str]:
    """Return the lines that describe steps and batches of a run."""
    train, num_steps = run.config.train, run.training.num_steps
    lines = [f"{len(run.data.train_set)} conversations, {num_steps} steps, into {run.out}"]
    if (warmup := warmup_updates(train, num_steps)) >= num_steps:
        field, peak = "warmup_steps" if train.warmup_steps else "warmup_ratio", train.learning_rate
        lines.append(f"WARNING: train.{field}: {warmup} of {num_steps} steps: the rate never reaches {peak:g}")
    return [*lines, f"plan: {run.data.plan.cost}"]


def _check_length(config: RunConfig, conversations: int) -> None:
    """Raise ConfigError for more than MAX_UPDATES updates, which must be a typing mistake."""
    updates = conversations * config.train.epochs / (config.train.batch_size * config.train.accumulate_steps)
    if updates > MAX_UPDATES:
        raise ConfigError(
            f"train.epochs: {config.train.epochs:,.0f} epochs of {conversations:,} conversations are {updates:,.0f} "
            f"updates, {updates / 24 / 3600:,.0f} days at one per second; expected at most {MAX_UPDATES:,}"
        )


def _check_shown(config: RunConfig, labels: Mapping[str, str], shown: Collection[str], conversations: int) -> None:
    """Raise DataError if no trainable parameter would get a gradient from these conversations."""
    if not any(label != freeze.FROZEN and freeze.is_reached(path, shown) for path, label in labels.items()):
        groups = ", ".join(config.train.groups)
        seen = f"only show {', '.join(sorted(shown))}" if shown else "show no image"
        raise DataError(
            f"{config.data.train}: its {conversations} conversations {seen}, so train.groups ({groups}) would train "
            "nothing; name the scans in the content of the user's turns, or train what they reach"
        )


def _evaluation_data(
    config: RunConfig, dataset: Dataset | None, processor: Processor, vocab_size: int
) -> EvaluationData | None:
    """Return the evaluation data, or None if the run has none.

    Args:
        vocab_size: number of the model's logits.

    Raises:
        DataError: an expected answer is longer than `train.max_new_tokens`, or a control cannot be made.
        ConfigError: no evaluation gives `train.best_metric` or the metric of `train.early_stopping`, or
            `evaluation.tasks` does not fit the data.
    """
    data, known = None, list[str]()
    if dataset is not None:
        rows = blank_rows(dataset.conversations)
        tasks = tasks_of(rows, config.evaluation.tasks)
        limit = (processor.tokenizer, processor.template, config.train.max_new_tokens, "train.max_new_tokens")
        check_lengths(dataset.conversations, rows, tasks, *limit)
        expanded, likelihoods = expand(dataset, config.evaluation.windows), config.evaluation.likelihoods
        choices = Choices.for_tasks(dataset, processor, rows, tasks, closed_sets=likelihoods)
        names = applicable_controls(config.evaluation.controls, dataset.conversations)
        try:
            controls = make_controls(dataset, processor, names, config.evaluation.paraphrases)
        except DataError as error:
            raise DataError([f"evaluation.controls: {fault}" for fault in error.faults]) from None
        schemas = {name: task.schema for name, task in config.evaluation.tasks.items()}
        constraints = Constraints.for_tasks(rows, schemas, processor, vocab_size)
        data = EvaluationData(dataset, expanded, rows, tasks, choices, controls, constraints)
        known = sorted(f"eval_{name}" for name in ("loss", *metric_names(tasks, likelihoods=likelihoods)))
    asked = {"train.best_metric": config.train.best_metric}
    if config.train.early_stopping:
        asked["train.early_stopping.metric"] = config.train.early_stopping.metric
    expected = f"one of {', '.join(known)}" if known else "data.eval too (--eval-data PATH)"
    faults = [
        f"{field}: no evaluation gives {metric}; expected {expected}"
        for field, metric in asked.items()
        if metric is not None and metric not in known
    ]
    if faults:
        raise ConfigError(faults)
    return data


MAY_DIFFER = ("model.base", "model.adapter", "data.image_root", "data.cache", "data.threads")
"""Settings that may differ between hosts: where each reads from, not what it reads."""


def check_processes(config: RunConfig, *, resume: bool) -> None:
    """Check that all processes were started with the same settings and versions.

    This comes before anything that takes some processes longer than others: at their first exchange, JAX waits only
    half a minute for the last. Raises ConfigError as `check_same` does.
    """
    facts: list[tuple[str, Any]] = [*flat(to_dict(config)).items(), ("--resume", resume), *versions().items()]
    check_same([fact for fact in facts if fact[0] not in MAY_DIFFER], "start every process with the same")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers depend on."""
    names = ("umbrella-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
