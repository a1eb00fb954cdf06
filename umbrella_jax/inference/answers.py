"""Answer a data set on all devices of all processes: tokens, likelihoods of possible answers, rows of predictions."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool

from umbrella_jax.batch import AnswerTree, Batch
from umbrella_jax.config.schema import (
    Template,
)
from umbrella_jax.console import Progress, Work
from umbrella_jax.data.answer_trees import AnswerEncoder, Answers, answer_trees, tree_shape
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.epoch_plan import BatchShape
from umbrella_jax.data.loader import Dataset, empty_batch, eval_batches, eval_shapes
from umbrella_jax.data.tokenize import length_faults
from umbrella_jax.errors import DataError, Faults
from umbrella_jax.inference.constrained import Constraints
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
from umbrella_jax.inference.windows import ExpandedDataset
from umbrella_jax.models import Params
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
    """Yield {number of a version: answered row} batch by batch; every process gets all rows.

    Random draws for a version depend only on `seed` and its number. `ExpandedDataset.merge` merges the rows of a
    conversation's versions.

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
    batches = eval_batches(dataset, batch_size, prompts=True, threads=threads, parts=parts(mesh), only=only)
    shapes: set[Any] = set()
    started = time.perf_counter()
    for indices, own in batches:
        batch: Batch = put_batch(own, mesh, axis=0)
        size = len(batch.lengths)
        shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        compiled = shape not in shapes
        shapes.add(shape)
        require = partial(_require_finite, dataset, indices, params, batch, graphdef)
        state = prefill(params, batch, graphdef=graphdef, max_new_tokens=max_new_tokens)
        scores = None
        if choices is not None:
            trees = choices.trees(indices, size)
            scored = [score_answers(params, state, tree, graphdef=graphdef) for tree in trees]
            scores = np.concatenate(_gathered(scored), axis=1)
            require("likelihoods", np.isfinite(scores[: len(indices)]).all(-1))
        seeds = np.zeros(size, np.uint32)
        seeds[: len(indices)] = [np.random.SeedSequence([seed, i]).generate_state(1)[0] for i in indices]
        options: dict[str, Any] = {"graphdef": graphdef, "sampling": sampling}

        def decode_to(
            state: Decoding, count: int, allowed: Any = None, seeds: Any = seeds, options: Any = options
        ) -> Decoding:
            return decode(params, state, stop, seeds, jnp.int32(count), allowed, **options)

        masks = constraints.masks(indices, size) if constraints else None
        state = decode_masked(state, masks, decode_to, _gathered) if masks else decode_to(state, max_new_tokens)
        tokens, finite = (array[: len(indices)] for array in _gathered((state.tokens, state.finite)))
        require("logits", finite)
        texts = processor.decode(tokens)
        answered = dict[int, Row]()
        for place, (index, text) in enumerate(zip(indices, texts, strict=True)):
            known = choices.texts[index] if choices else ()
            likelihoods = dict(zip(known, map(float, scores[place]), strict=False)) if scores is not None else {}
            cut = bool((tokens[place] != NONE).all()) and tokens[place, -1] not in stop
            row = rows[owners[index]]
            answered[index] = with_answer(row, Answer(text, cut, likelihoods or None), tasks.get(task_of(row)))
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
