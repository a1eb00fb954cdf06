"""Answer a data set on all devices of all processes, for a run's evaluations and `umbrella-jax predict`."""

import hashlib
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool
from tqdm import tqdm

from umbrella_jax.batch import AnswerTree, Batch
from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.config.load import flat, load_stored_config
from umbrella_jax.config.schema import (
    ControlName,
    DataConfig,
    EvaluationWindows,
    MeshConfig,
    ModalityConfig,
    TaskConfig,
    Template,
    to_dict,
)
from umbrella_jax.console import Progress, Work
from umbrella_jax.data.answer_trees import AnswerEncoder, Answers, answer_trees, tree_shape
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.epoch_plan import BatchShape
from umbrella_jax.data.inputs import digest_of, read_inputs
from umbrella_jax.data.loader import Dataset, empty_batch, eval_batches, eval_shapes
from umbrella_jax.data.tokenize import length_faults
from umbrella_jax.distributed import SHA256, broadcast, check_same, gather, raise_together
from umbrella_jax.errors import ConfigError, DataError, Faults
from umbrella_jax.inference.constrained import Constraints
from umbrella_jax.inference.controls import ControlledDataset, left_out_lines, make_controls
from umbrella_jax.inference.generate import (
    GREEDY,
    NONE,
    Decoding,
    Sampling,
    decode,
    decode_masked,
    prefill,
    score_answers,
)
from umbrella_jax.inference.processor import Processor
from umbrella_jax.inference.windows import ExpandedDataset, expand
from umbrella_jax.io.files import PRIVATE, append_line, check_output, naming, strict_json, take_lock, write_whole
from umbrella_jax.io.reading import parse_json
from umbrella_jax.models import Params, abstract_params, native_backend
from umbrella_jax.rundir import CONFIG, CONTROL_NAMES, Say, Step, control_beside, say_nothing
from umbrella_jax.scoring.metrics import Task, task_of, tasks_of
from umbrella_jax.scoring.rows import Answer, Row, blank_rows, with_answer
from umbrella_jax.scoring.tasks import number_tasks
from umbrella_jax.sharding import MeshShape, abstract_batch, make_mesh, param_sharding, parts, put_batch
from umbrella_jax.training.checkpoint import checksums
from umbrella_jax.training.diagnose import nonfinite_error


def check_lengths(
    conversations: Sequence[Conversation],
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    tokenizer: Any,
    template: Template,
    max_new_tokens: int,
    setting: str,
) -> None:
    """Raise DataError if a right or a possible answer takes more than `max_new_tokens` tokens.

    Args:
        tasks: the known tasks; a row with a blank reference is not checked if its task is unknown.
        setting: name of the limit for messages.
    """

    def answers(row: Row) -> Iterator[str]:
        task = tasks.get(task_of(row))
        if row["reference"]:
            yield row["reference"]
        elif task and task.numbers is None:
            yield task.truth(row)
        yield from task.choices if task else ()

    asked = zip(conversations, map(answers, rows), strict=True)
    if faults := length_faults(asked, tokenizer, max_new_tokens, setting, template=template):
        raise DataError(faults)


class Choices:
    """The answers to each conversation whose likelihoods are computed, as trees of one shape for the whole data set."""

    def __init__(self, dataset: Dataset, processor: Processor, rows: Sequence[Row], tasks: Mapping[str, Task]):
        """Encode the closed sets and candidate numbers of `tasks`; rows of other tasks have none.

        Raises DataError if the tokens of prompt and answer do not start with the prompt's.
        """
        asked = [tasks.get(task_of(row)) for row in rows]
        self.texts = [task.choices if task else () for task in asked]
        encode, faults = AnswerEncoder(processor.tokenizer, processor.template), Faults()
        self._encoded = list[Answers]()
        for conversation, task in zip(dataset.conversations, asked, strict=True):
            with faults:
                stems = task.numbers.stems if task and task.numbers else None
                self._encoded.append(encode(conversation, task.choices, stems) if task else ())
        faults.raise_as(DataError)
        starts = range(0, max(map(len, self.texts)), _CHUNK)
        self._chunks = {start: tree_shape([_chunk(answers, start) for answers in self._encoded]) for start in starts}

    @classmethod
    def for_tasks(
        cls,
        dataset: Dataset,
        processor: Processor,
        rows: Sequence[Row],
        tasks: Mapping[str, Task],
        *,
        closed_sets: bool,
    ) -> "Choices | None":
        """Return the choices: all candidate numbers and, if `closed_sets`, all closed sets; None if there are none."""
        having = {n: task for n, task in tasks.items() if task.numbers is not None or (closed_sets and task.answers)}
        return cls(dataset, processor, rows, having) if having else None

    def repeated(self, conversations: Sequence[int]) -> "Choices":
        """Return the choices of a data set that has these conversations, in this order and possibly repeated."""
        if list(conversations) == list(range(len(self.texts))):
            return self
        repeated = copy(self)
        repeated.texts = [self.texts[number] for number in conversations]
        repeated._encoded = [self._encoded[number] for number in conversations]
        return repeated

    def trees(self, indices: Sequence[int], rows: int) -> Iterator[AnswerTree]:
        """Yield the answers to the conversations `indices`, a chunk at a time, each padded to `rows` rows."""
        for start, shape in self._chunks.items():
            answers = [_chunk(self._encoded[index], start) for index in indices]
            yield answer_trees([*answers, *[()] * (rows - len(answers))], shape)


_CHUNK = 256
"""Largest number of answers whose likelihoods are computed at a time, which bounds the memory."""


def _chunk(answers: Answers, start: int) -> Answers:
    return answers if start == 0 and len(answers) <= _CHUNK else answers[start : start + _CHUNK]


def generate_answers(
    params: Params,
    graphdef: nnx.GraphDef,
    dataset: Dataset,
    processor: Processor,
    mesh: Mesh,
    *,
    batch_size: int,
    threads: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    choices: Choices | None = None,
    constraints: Constraints | None = None,
    only: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[int, Answer]]:
    """Yield {number of a conversation: answer} batch by batch; every process gets all answers.

    Random draws for a conversation depend only on `seed` and its number.

    Args:
        dataset: loaded with `evaluation=True`.
        choices: answers whose likelihoods to compute too.
        constraints: JSON schemas that answers must follow.
        only: numbers of the conversations to answer; by default all.
        progress: counts conversations.

    Raises:
        DataError: a volume can no longer be read.
        CheckpointError, RunError: weights, or logits for some conversations, are not finite; on all processes alike.
        RunError: a JSON schema is too complex.
    """
    stop = np.array(processor.stop_ids, np.int32)
    batches = eval_batches(dataset, batch_size, prompts=True, threads=threads, parts=parts(mesh), only=only)
    shapes: set[Any] = set()
    started = time.perf_counter()
    for indices, own in batches:
        batch: Batch = put_batch(own, mesh, axis=0)
        rows = len(batch.lengths)
        shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        compiled = shape not in shapes
        shapes.add(shape)
        require = partial(_require_finite, dataset, indices, params, batch, graphdef)
        state = prefill(params, batch, graphdef=graphdef, max_new_tokens=max_new_tokens)
        scores = None
        if choices is not None:
            trees = choices.trees(indices, rows)
            scored = [score_answers(params, state, tree, graphdef=graphdef) for tree in trees]
            scores = np.concatenate(_gathered(scored), axis=1)
            require("likelihoods", np.isfinite(scores[: len(indices)]).all(-1))
        seeds = np.zeros(rows, np.uint32)
        seeds[: len(indices)] = [np.random.SeedSequence([seed, i]).generate_state(1)[0] for i in indices]
        options: dict[str, Any] = {"graphdef": graphdef, "sampling": sampling}

        def decode_to(
            state: Decoding, count: int, allowed: Any = None, seeds: Any = seeds, options: Any = options
        ) -> Decoding:
            return decode(params, state, stop, seeds, jnp.int32(count), allowed, **options)

        masks = constraints.masks(indices, rows) if constraints else None
        state = decode_masked(state, masks, decode_to, _gathered) if masks else decode_to(state, max_new_tokens)
        tokens, finite = (rows[: len(indices)] for rows in _gathered((state.tokens, state.finite)))
        require("logits", finite)
        texts = processor.decode(tokens)
        answered = {}
        for row, (index, text) in enumerate(zip(indices, texts, strict=True)):
            known = choices.texts[index] if choices else ()
            likelihoods = dict(zip(known, map(float, scores[row]), strict=False)) if scores is not None else {}
            cut = bool((tokens[row] != NONE).all()) and tokens[row, -1] not in stop
            answered[index] = Answer(text, cut, likelihoods or None)
        if progress:
            prompt_tokens = sum(len(dataset.prompts[index]) for index in indices)
            work = Work(samples=len(indices), tokens=prompt_tokens + int((tokens != NONE).sum()))
            progress.advance(len(indices), work, time.perf_counter() - started, compiled=compiled)
        yield answered
        started = time.perf_counter()


def compile_answers(
    params: Params,
    graphdef: nnx.GraphDef,
    dataset: Dataset,
    processor: Processor,
    mesh: Mesh,
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    choices: Choices | None = None,
    constraints: Constraints | None = None,
    skip: Collection[BatchShape] = (),
) -> Iterator[tuple[str, BatchShape, jax.stages.Compiled]]:
    """Yield (name, batch shape, compiled program) of everything that `generate_answers` would compile; run nothing.

    Shapes in `skip` are left out.
    """
    stop = np.array(processor.stop_ids, np.int32)
    shapes = eval_shapes(dataset, batch_size, prompts=True, parts=parts(mesh))
    for shape in (shape for shape in shapes if shape not in skip):
        batch = abstract_batch(empty_batch(dataset, shape), mesh, axis=0)
        rows = len(batch.lengths)
        lowered = prefill.lower(params, batch, graphdef=graphdef, max_new_tokens=max_new_tokens)
        compiled = lowered.compile()
        yield "prompts", shape, compiled
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            lowered.out_info,
            compiled.output_shardings,
        )
        if choices is not None:
            for tree in choices.trees((), rows):
                yield "likelihoods", shape, score_answers.lower(params, state, tree, graphdef=graphdef).compile()
        seeds, until = np.zeros(rows, np.uint32), jnp.int32(max_new_tokens)
        options: dict[str, Any] = {"graphdef": graphdef, "sampling": sampling}
        yield "answers", shape, decode.lower(params, state, stop, seeds, until, **options).compile()
        if constraints is not None:
            allowed = constraints.allow_all(rows)
            program = decode.lower(params, state, stop, seeds, until, allowed, **options)
            yield "answers in JSON", shape, program.compile()


def _gathered(arrays: Any) -> Any:
    """Gather a tree of arrays onto every process, as NumPy arrays."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(arrays, tiled=True))


def _require_finite(
    dataset: Dataset,
    indices: Sequence[int],
    params: Params,
    batch: Batch,
    graphdef: nnx.GraphDef,
    what: str,
    finite: Bool[np.ndarray, "B"],
) -> None:
    """Raise an error that names the conversations of a batch with numbers that are not `finite`."""
    if not finite.all():
        rows = np.flatnonzero(~finite).tolist()
        names = {row: dataset.conversations[indices[row]].label for row in rows}
        raise nonfinite_error(what, names, params, batch, graphdef=graphdef)


@dataclass(frozen=True)
class _Questions:
    """The questions of the data, or those of a control, and the file for the answers."""

    out: Path
    unit: str
    """Start of the progress line."""
    expanded: ExpandedDataset
    rows: Mapping[int, Row]
    """{number of a conversation: its row}, in the order of the file."""
    asked: Sequence[int]
    """Numbers of the conversations to answer."""

    @classmethod
    def of_controls(
        cls, out: Path, controls: Mapping[str, Sequence[ControlledDataset]], windows: EvaluationWindows
    ) -> "Iterator[_Questions]":
        """Yield the questions of each control, whose answers belong beside `out`."""
        for name, own in controls.items():
            for one in own:
                file, changed = control_beside(out, name), one.changed
                yield cls(file, f"{name}: answer", expand(one.dataset, windows), changed.rows, changed.asked)


def predict(
    source: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    likelihoods: bool = False,
    schema: str | Path | None = None,
    controls: Sequence[ControlName] = (),
    paraphrases: Mapping[str, Sequence[str]] | None = None,
    windows: EvaluationWindows | None = None,
    tasks: Mapping[str, TaskConfig] | None = None,
    modalities: Mapping[str, ModalityConfig] | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  # frozen
    compute_dtype: str = "float32",
    allow_untrained: bool = False,
    step: Step | None = None,
    resume: bool = False,
    say: Say = tqdm.write,
) -> list[Row]:
    """Answer every conversation of `data.eval` and write the rows to `out`, a .jsonl file, in the data's order.

    All processes of a cluster call this with the same arguments and share `out`. Rows are first collected in a file
    with `.part` added to the name, which becomes `out` at the end. So do the answers under `controls`, which then are
    in files of their own: X.NAME.jsonl beside X.jsonl.

    Args:
        source: a run, an export, a native checkpoint, or anything else that `umbrella_jax.load` takes.
        data: the settings of the data; `eval` names the conversations.
        likelihoods: also compute the likelihood of every answer of a closed set.
            Those of candidate numbers are always computed.
        schema: JSON schema that every answer follows, instead of those of `tasks`.
        controls: also answer under these, as in `evaluation.controls` of a configuration.
        paraphrases: as `evaluation.paraphrases` of a configuration, for the control `paraphrase`; by default those of
            the run.
        windows, tasks: as `evaluation.windows` and `evaluation.tasks` of a configuration; by default those of the run.
        modalities: modalities for a stock LLaVA.
        allow_untrained, step: as for `umbrella_jax.load`.
        resume: continue from the `.part` file of an earlier call.
        say: receives a progress line now and then if stderr is not a terminal.

    Returns:
        The rows (`Row`) of the true answers, as in `out`; `likelihoods` are natural logarithms. With candidate numbers,
        a row has `number` too: `expectation`, `median`, `interval_80` and `interval_95`.

    Raises:
        ConfigError: `out` or the file of a control exists, or their directory does not; an earlier call left a `.part`
            file without `resume`, or with other settings; the model lacks a modality of the data.
        DataError, CheckpointError: as for training; DataError if a control cannot be made (`change_conversations`).
    """
    out, first = Path(out), jax.process_index() == 0
    with raise_together():
        numbers = [("batch_size", batch_size, 1), ("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)]
        if faults := [f"{name}: expected {least} or more, got {n}" for name, n, least in numbers if n < least]:
            raise ConfigError(faults)
        if data.eval is None:
            raise ConfigError("data.eval: expected conversations to answer (--data PATH)")
        if first:
            check_output(out, "choose another file", folder=False)
        unfinished = out.with_name(f"{out.name}.part")
        finished = [file for file in (out, *(control_beside(out, name) for name in CONTROL_NAMES)) if file.exists()]
        if finished and not (resume and unfinished.exists()):
            raise ConfigError([f"{file}: already exists; choose another file, or remove it" for file in finished])
        if unfinished.exists() and not resume:
            raise ConfigError(f"{unfinished}: left by an earlier call; continue with --resume, or remove it")
        if not out.parent.is_dir():
            raise ConfigError(f"{out}: expected the name of a file in a directory that exists")
        devices = make_mesh(mesh, batch_size=batch_size)
        checkpoint = Checkpoint.open(source, modalities, compute_dtype=compute_dtype, step=step)
        if faults := MeshShape(**devices.shape).undivided(checkpoint.config):
            raise ConfigError(faults)
        checkpoint.check()
        if first:
            checkpoint.warn_doubtful()
        if not allow_untrained:
            checkpoint = checkpoint.answering()
        processor = Processor.from_checkpoint(checkpoint, max_length=data.max_length)
        dataset = processor.datasets(data, ("eval",))["eval"]
        rows = blank_rows(dataset.conversations)
        choices = None
        limit = (processor.tokenizer, processor.template, max_new_tokens, "max_new_tokens (--max-new-tokens)")
        if isinstance(checkpoint, RunCheckpoint):
            of_run = load_stored_config(checkpoint.path / CONFIG).evaluation
            windows, tasks = windows or of_run.windows, of_run.tasks if tasks is None else tasks
            if paraphrases is None:
                asked = set(map(task_of, rows))
                paraphrases = {task: texts for task, texts in of_run.paraphrases.items() if task in asked}
        expanded = expand(dataset, windows or "first")
        configured = {name: task for name, task in (tasks or {}).items() if name in set(map(task_of, rows))}
        # how the answers of several windows are merged depends on the task
        need_tasks = likelihoods or len(expanded.dataset) > len(rows)
        known = tasks_of(rows, configured) if need_tasks else number_tasks(rows, configured)
        if known:
            choices = Choices.for_tasks(dataset, processor, rows, known, closed_sets=likelihoods)
        if likelihoods and choices is None:
            raise ConfigError(
                "likelihoods: no task of the data has a closed set of answers or candidate numbers; name them in "
                "evaluation.tasks"
            )
        check_lengths(dataset.conversations, rows, known, *limit)
        schemas = {name: schema or (tasks or {}).get(name, TaskConfig()).schema for name in map(task_of, rows)}
        constraints = Constraints.for_tasks(rows, schemas, processor, checkpoint.config.text.vocab_size)
        made = make_controls(dataset, processor, controls, paraphrases or {})
        questions = [
            _Questions(out, "answer", expanded, dict(enumerate(rows)), range(len(rows))),
            *_Questions.of_controls(out, made, windows or "first"),
        ]
        # number of the first row of each in the `.part` file
        starts = list(accumulate((len(own.expanded.dataset) for own in questions[:-1]), initial=0))
        checkpoint.config.check_trained(image.modality for own in questions for image in own.expanded.dataset.windows)
        inputs = read_inputs(data, {"eval": dataset})
    params = checkpoint.params(sharding_for=partial(param_sharding, devices))
    weights = {path: int(value) for path, value in checksums(params).items()}
    architecture = {"vision": asdict(checkpoint.config.vision), "text": asdict(checkpoint.config.text)}
    settings = {
        "weights": _digest(weights),
        "inputs": digest_of(inputs),
        "tokenizer": _digest(processor.tokenizer.get_vocab()),
        "template": processor.template,
        "stop_ids": processor.stop_ids,
        "modalities": {name: to_dict(modality) for name, modality in processor.modalities.items()},
        "conversations": len(rows),
        **({"windows": windows} if len(expanded.dataset) > len(rows) else {}),
        "max_new_tokens": max_new_tokens,
        "sampling": asdict(sampling) | ({"seed": seed} if sampling.temperature else {}),
        "likelihoods": {name: list(task.choices) for name, task in known.items() if task.choices},
        "controls": list(made),
        "paraphrases": {task: list(texts) for task, texts in (paraphrases or {}).items()}
        if "paraphrase" in made
        else {},
        "schemas": constraints.texts if constraints else [],
        "cache_dtype": data.cache_dtype,
        "compute_dtype": compute_dtype,
        **{f"config.json: {key}": value for key, value in flat(architecture).items()},
    }
    facts = [(name, SHA256 + digest) for files in inputs.values() for name, digest in files]
    check_same([*facts, *settings.items()], "every host must read the same")
    part = None
    with raise_together():
        if first:
            part = _Part(unfinished, settings)
    model = checkpoint.config.with_attention("auto", native_backend(devices.devices.flat[0]))
    done = {int(index): row for index, row in broadcast(part.done if part else None).items()}
    say = say if first else say_nothing
    for line in [*([checkpoint.step_message] if checkpoint.step_message else []), *left_out_lines(made)]:
        say(line)
    options: dict[str, Any] = {"say": say, "log": say_nothing, "quiet": not first}
    options["memory"] = jax.local_devices()[0].memory_stats
    with jax.set_mesh(devices), part or nullcontext():
        for start, own in zip(starts, questions, strict=True):
            versions = own.expanded.numbers(own.asked)
            left = [number for number in versions if start + number not in done]
            total = len(versions)
            with Progress(own.unit, total, done=total - len(left), **options) as progress:
                for batch_answers in generate_answers(
                    params,
                    abstract_params(model)[0],
                    own.expanded.dataset,
                    processor,
                    devices,
                    batch_size=batch_size,
                    threads=data.threads,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    seed=seed,
                    choices=choices and choices.repeated(own.expanded.owners),
                    constraints=constraints and constraints.repeated(own.expanded.owners),
                    only=left,
                    progress=progress,
                ):
                    fresh = {
                        start + number: with_answer(
                            row := own.rows[own.expanded.owners[number]], answer, known.get(task_of(row))
                        )
                        for number, answer in batch_answers.items()
                    }
                    done |= fresh
                    if part:
                        part.write(fresh)
    files: dict[Path, list[Row]] = {}
    for start, own in zip(starts, questions, strict=True):
        merged = own.expanded.merge({number: done[start + number] for number in own.expanded.numbers(own.asked)}, known)
        files.setdefault(own.out, []).extend(merged.get(index, row) for index, row in own.rows.items())
    if part:
        for file, answered in reversed(files.items()):  # `out` is the last
            write_whole(file, "".join(strict_json(row) + "\n" for row in answered), PRIVATE)
        part.path.unlink()
    gather(None)  # wait until the files are written
    return files[out]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json(dict(sorted(content.items()))).encode()).hexdigest()[:16]


class _Part:
    """The file of rows so far: a line with the settings, then a line `[number, row]` each. One process writes it."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Open or create the file. Raises ConfigError if it has other settings, or if another process holds it."""
        self.path, self.done = path, dict[int, Row]()
        with naming(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE)
        try:
            take_lock(self._file, path, "wait until that has ended, or choose another file")
            self._continue(dict(settings))
        except BaseException:
            os.close(self._file)
            raise

    def _continue(self, settings: dict[str, Any]) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # drop a torn last line; its row is computed again
        os.ftruncate(self._file, len(whole))
        if not whole:
            append_line(self._file, self.path, (strict_json(settings) + "\n").encode())
            return
        try:
            lines = whole.decode().splitlines()
            before, *rows = (parse_json(line, self.path, ConfigError, "", n) for n, line in enumerate(lines, 1))
            self.done = {int(index): row for index, row in rows}
            other = [key for key in settings if before[key] != settings[key]]
        except (ValueError, TypeError, KeyError):  # ConfigError is a ValueError
            raise ConfigError(f"{self.path}: not from an earlier call; remove it, or choose another file") from None
        if other:
            raise ConfigError(
                [
                    f"{self.path}: cannot continue: {key}: {settings[key]} now, {before[key]} when it began; remove it "
                    "to start anew"
                    for key in other
                ]
            )

    def write(self, rows: Mapping[int, Row]) -> None:
        """Append rows, given by their numbers."""
        lines = "".join(strict_json([index, row]) + "\n" for index, row in rows.items())
        append_line(self._file, self.path, lines.encode())

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
