"""Answer a data set on all devices of all processes: tokens, likelihoods of possible answers, rows of predictions."""

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umbrella_jax.batch import AnswerTree
from umbrella_jax.config.schema import Template
from umbrella_jax.console import Progress, Work
from umbrella_jax.data.answer_trees import AnswerEncoder, Answers, answer_trees, tree_shape
from umbrella_jax.data.collate import collate
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.epoch_plan import exact_shape
from umbrella_jax.data.loader import Dataset, measure_conversations
from umbrella_jax.data.tokenize import length_faults
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.inference.constrained import Constraints
from umbrella_jax.inference.generate import (
    GREEDY,
    NONE,
    Decoding,
    Sampling,
    ask,
    decode,
    decode_masked,
    encode,
    prefill,
    score_answers,
)
from umbrella_jax.inference.processor import Processor
from umbrella_jax.inference.question_batches import QuestionBatches, VolumesToEncode
from umbrella_jax.inference.windows import ExpandedDataset
from umbrella_jax.models import Params, merge
from umbrella_jax.models.parallel import ROWS
from umbrella_jax.scoring.metrics import Task, task_of
from umbrella_jax.scoring.rows import Answer, Row, with_answer
from umbrella_jax.sharding import abstract_batch, parts, put_batch
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

    def trees(self, conversations: Sequence[int | None]) -> Iterator[AnswerTree]:
        """Yield the answers to the conversation of each row, a chunk at a time; a row that is None has none."""
        for start, shape in self._chunks.items():
            encoded = [() if number is None else self._encoded[number] for number in conversations]
            yield answer_trees([_chunk(answers, start) for answers in encoded], shape)


_CHUNK = 256
"""Largest number of answers whose likelihoods are computed at a time, which bounds the memory."""


def _chunk(answers: Answers, start: int) -> Answers:
    return answers if start == 0 and len(answers) <= _CHUNK else answers[start : start + _CHUNK]


def generate_answers(
    params: Params,
    graphdef: nnx.GraphDef,
    expanded: ExpandedDataset,
    rows: Mapping[int, Row],
    tasks: Mapping[str, Task],
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
) -> Iterator[dict[int, Row]]:
    """Yield {number of a version: answered row}, a batch at a time; every process gets all rows.

    Random draws for a version depend only on `seed` and its number. `ExpandedDataset.merge` merges the rows of a
    conversation's versions. The next batch is started before the results of one are fetched.

    Args:
        expanded: the conversations, each with its versions; loaded with `evaluation=True`.
        rows: {number of a conversation: its row without an answer}.
        tasks: those whose candidate numbers are summarised in the row.
        choices: answers to each conversation whose likelihoods to compute too.
        constraints: JSON schemas that answers to each conversation must follow.
        only: numbers of the versions to answer; by default all.
        progress: counts versions.

    Raises:
        DataError: a volume can no longer be read.
        CheckpointError, RunError: weights, or logits for some conversations, are not finite; on all processes alike.
        RunError: a JSON schema is too complex.
    """
    dataset, owners = expanded.dataset, expanded.owners
    choices = choices and choices.repeated(owners)
    constraints = constraints and constraints.repeated(owners)
    stop = np.array(processor.stop_ids, np.int32)
    batches = _plan(params, graphdef, dataset, mesh, batch_size, max_new_tokens, only)
    features = {  # NaN, so that a volume that was not encoded fails loudly
        name: jnp.full(kept.shape, jnp.nan, kept.dtype, device=kept.sharding)
        for name, kept in _features(params, graphdef, batches, mesh).items()
    }
    shapes = set[tuple[int, int]]()
    static: dict[str, Any] = {"graphdef": graphdef}
    require = partial(_require_finite, dataset, params, graphdef, mesh, batch_size)
    compiled, begun = False, time.perf_counter()

    def start(state: Decoding, numbers: Sequence[int | None]) -> tuple[Decoding, _Answering]:
        """Start the answers to what the rows of `state` have read."""
        trees = choices.trees(numbers) if choices is not None else ()
        scores = [score_answers(params, state, tree, graphdef=graphdef) for tree in trees]
        seeds = [0 if i is None else np.random.SeedSequence([seed, i]).generate_state(1)[0] for i in numbers]

        def decode_to(state: Decoding, count: int, allowed: Any = None) -> Decoding:
            keys, until = np.array(seeds, np.uint32), np.int32(count)
            return decode(params, state, stop, keys, until, allowed, sampling=sampling, **static)

        masks = constraints.masks(numbers) if constraints else None
        state = decode_masked(state, masks, decode_to, _gathered) if masks else decode_to(state, max_new_tokens)
        return state, _Answering(numbers, state.tokens, state.finite, scores)

    def finish(started: _Answering) -> dict[int, Row]:
        """Wait for answers, and return their rows."""
        nonlocal compiled
        places = {number: place for place, number in enumerate(started.numbers) if number is not None}
        tokens, finite, scored = _gathered((started.tokens, started.finite, started.scores))
        scores = np.concatenate(scored, axis=1) if scored else None
        if scores is not None:
            require("likelihoods", {number: bool(np.isfinite(scores[row]).all()) for number, row in places.items()})
        require("logits", {number: bool(finite[row]) for number, row in places.items()})
        own_tokens = tokens[[*places.values()]]
        answered = dict[int, Row]()
        for (number, place), text in zip(places.items(), processor.decode(own_tokens), strict=True):
            known = choices.texts[number] if choices else ()
            likelihoods = dict(zip(known, map(float, scores[place]), strict=False)) if scores is not None else {}
            cut = bool((tokens[place] != NONE).all()) and tokens[place, -1] not in stop
            row = rows[owners[number]]
            answered[number] = with_answer(row, Answer(text, cut, likelihoods or None), tasks.get(task_of(row)))
        if progress:
            prompt_tokens = sum(len(dataset.prompts[number]) for number in places)
            work = Work(samples=len(places), tokens=prompt_tokens + int((own_tokens != NONE).sum()))
            progress.advance(len(places), work, time.perf_counter() - begun, compiled=compiled)
        compiled = False
        return answered

    started: _Answering | None = None
    for made in batches(threads):
        if isinstance(made, VolumesToEncode):
            name, placed = made.modality, put_batch((made.volumes, made.slots), mesh, axis=0)
            features[name] = encode(params, *placed, features[name], name=name, **static)
            continue
        compiled |= made.shape not in shapes
        shapes.add(made.shape)
        contexts, is_asked, questions = put_batch((made.contexts, made.is_asked, made.questions), mesh, axis=0)
        sizes = static | {"max_new_tokens": max_new_tokens}
        state = prefill(params, contexts, features, is_asked, question_slots=made.shape[1], **sizes)
        for number, numbers in enumerate(made.numbers):
            if questions:
                state = ask(params, state.cache, contexts.lengths, *questions[number], **sizes)
            state, starting = start(state, numbers)
            if started is not None:
                yield finish(started)
                begun = time.perf_counter()
            started = starting
        del state  # so that its memory is free for the next batch
    if started is not None:
        yield finish(started)


@dataclass(frozen=True)
class _Answering:
    """Answers to a batch that the devices may still be working on."""

    numbers: Sequence[int | None]
    """Number of each row's version; None for a row without one."""
    tokens: jax.Array
    finite: jax.Array
    scores: Sequence[jax.Array]


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
    seen: set[Any],
) -> Iterator[tuple[str, str, jax.stages.Compiled]]:
    """Yield (name, shape, compiled program) of everything that `generate_answers` would compile; run nothing.

    Args:
        seen: programs to leave out; those that are compiled are added.
    """
    stop = np.array(processor.stop_ids, np.int32)
    batches = _plan(params, graphdef, dataset, mesh, batch_size, max_new_tokens)
    features = _features(params, graphdef, batches, mesh)
    for name, kept in features.items():
        volumes = batches.empty_volumes(name)
        key = name, len(volumes.slots), kept.shape
        if key not in seen:
            seen.add(key)
            placed = abstract_batch((volumes.volumes, volumes.slots), mesh, axis=0)
            program = encode.lower(params, *placed, kept, graphdef=graphdef, name=name)
            yield "volumes", f"{len(volumes.slots)} × {name}", program.compile()
    kept_shapes = tuple((name, kept.shape) for name, kept in features.items())
    for shape in batches.whole.shapes():
        if (shape, kept_shapes) in seen:
            continue
        seen.add((shape, kept_shapes))
        empty = batches.empty_prompts(shape)
        contexts, is_asked, questions = abstract_batch((empty.contexts, empty.is_asked, empty.questions), mesh, axis=0)
        sizes: dict[str, Any] = {"graphdef": graphdef, "max_new_tokens": max_new_tokens}
        text = f"{batch_size} × {shape[0]} positions"
        state, compiled = _compile(prefill, params, contexts, features, is_asked, question_slots=shape[1], **sizes)
        yield "prompts", text, compiled
        if questions:
            state, compiled = _compile(ask, params, state.cache, contexts.lengths, *questions[0], **sizes)
            yield "questions", f"{batch_size} × {shape[1]} positions after {shape[0]}", compiled
        if choices is not None:
            for tree in choices.trees([None] * batch_size):
                yield "likelihoods", text, score_answers.lower(params, state, tree, graphdef=graphdef).compile()
        arguments = params, state, stop, np.zeros(batch_size, np.uint32), np.int32(max_new_tokens)
        options: dict[str, Any] = {"graphdef": graphdef, "sampling": sampling}
        yield "answers", text, decode.lower(*arguments, None, **options).compile()
        if constraints is not None:
            allowed = constraints.allow_all(batch_size)
            yield "answers in JSON", text, decode.lower(*arguments, allowed, **options).compile()


def _compile(function: Any, *args: Any, **options: Any) -> tuple[Any, jax.stages.Compiled]:
    """Compile a program; return the shapes and shardings of its results too."""
    lowered = function.lower(*args, **options)
    compiled = lowered.compile()
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    return shapes, compiled


def _plan(
    params: Params,
    graphdef: nnx.GraphDef,
    dataset: Dataset,
    mesh: Mesh,
    batch_size: int,
    max_new_tokens: int,
    only: Sequence[int] | None = None,
) -> QuestionBatches:
    """Plan the batches of the prompts `only`, by default of all."""
    config = merge(graphdef, params).config
    size = config.text.hidden_size * jnp.dtype(config.compute_dtype).itemsize
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "bytes_per_patch": size}
    return QuestionBatches(dataset, parts(mesh), **sizes, only=only)


def _features(
    params: Params, graphdef: nnx.GraphDef, batches: QuestionBatches, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {modality: shape of the features that are kept, split over the mesh by volumes}."""
    config, sharding = merge(graphdef, params).config, NamedSharding(mesh, PartitionSpec(ROWS))
    width, dtype = config.text.hidden_size, jnp.dtype(config.compute_dtype)
    return {
        name: jax.ShapeDtypeStruct((slots, config.modalities[name].num_patches, width), dtype, sharding=sharding)
        for name, slots in batches.features.slots.items()
    }


def _gathered(arrays: Any) -> Any:
    """Gather a tree of arrays onto every process, as NumPy arrays."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(arrays, tiled=True))


def _require_finite(
    dataset: Dataset,
    params: Params,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    batch_size: int,
    what: str,
    finite: Mapping[int, bool],
) -> None:
    """Raise an error that names the conversations whose numbers are not finite.

    Args:
        finite: {number of a conversation: whether its numbers are finite}.
    """
    if all(finite.values()):
        return
    numbers = [number for number, is_finite in finite.items() if not is_finite]
    prompts, own = [dataset.prompts[number] for number in numbers], parts(mesh)
    shape = exact_shape(measure_conversations(prompts, dataset.modalities))
    volumes = tuple((name, count * own.total) for name, count in shape.volumes)
    shape = replace(shape, conversations=batch_size, volumes=volumes)
    batch = jax.tree.map(lambda leaf: leaf[0], collate([prompts], dataset.volume, dataset.modalities, shape, own))
    names = {row: dataset.conversations[number].label for row, number in enumerate(numbers)}
    raise nonfinite_error(what, names, params, put_batch(batch, mesh, axis=0), graphdef=graphdef)
