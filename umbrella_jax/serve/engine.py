"""Answer the questions of many clients with one model: they queue, are read one by one, and answered together.

One thread owns the model. It reads prompts one by one, padded to one of a few lengths, and then generates the answers
of up to `lanes` questions together (`umbrella_jax.inference.lanes`): a question joins the others at any token and
leaves after its last one. Volumes are read by other threads beforehand, and the features of the latest ones are kept
(`umbrella_jax.serve.volumes`), so a second question about a scan neither reads nor encodes it again. Explanations run
in a thread of their own.
"""

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from umbrella_jax.batch import AnswerTree
from umbrella_jax.data.answer_trees import Answers, answer_trees, tree_shape
from umbrella_jax.data.conversation import Conversation
from umbrella_jax.data.tokenize import CachingTokenizer, Encoded, encode_answers, encode_numbers
from umbrella_jax.errors import ConfigError, RunError, UmbrellaError
from umbrella_jax.inference.attribution import Method
from umbrella_jax.inference.explain import Explanation, explain_dataset
from umbrella_jax.inference.generate import GREEDY, Decoding, Sampling, prefill, score_answers
from umbrella_jax.inference.lanes import Lanes, advance, draws_of, empty_lanes, enter, first_token
from umbrella_jax.inference.processor import Processor
from umbrella_jax.inference.question_batches import text_batch
from umbrella_jax.models import Llava, split
from umbrella_jax.scoring.number_grid import NumberGrid
from umbrella_jax.scoring.numeric import NumberDistributions
from umbrella_jax.serve.budget import Budget
from umbrella_jax.serve.readers import Readers
from umbrella_jax.serve.volumes import Control, VolumeFeatures, Volumes, VolumeStore

_SHORTEST = 64
"""Shortest length to which prompts are padded."""
_SCORED, _SCORED_NODES = 256, 512
"""Answers that are scored at a time, and nodes of their tree, which bound the memory."""
_ALL_NODES = 8192
"""Nodes of all trees of a question, which bound its time: as many positions as the longest prompt."""
_PREPARED_BYTES = 2 << 30
"""Memory of the volumes of questions that are read and not answered yet."""


@dataclass(frozen=True)
class Question:
    """A question to the model."""

    conversation: Conversation
    """Its last turn is the assistant's and empty."""
    max_new_tokens: int = 32
    sampling: Sampling = GREEDY
    seed: int = 0
    answers: tuple[str, ...] = ()
    """Answers whose probabilities to return as well."""
    numbers: NumberGrid | None = None
    """Candidate numbers whose probabilities to return as well."""
    control: Control = None


@dataclass(frozen=True)
class Text:
    """The next piece of an answer."""

    delta: str


@dataclass(frozen=True)
class CompleteAnswer:
    """A whole answer."""

    text: str
    finish_reason: Literal["stop", "length"]
    """`length` if `max_new_tokens` ended it."""
    prompt_tokens: int
    """Positions of the prompt, patches included."""
    completion_tokens: int
    likelihoods: Mapping[str, float]
    """{answer of `Question.answers`: its probability among these}."""
    numbers: NumberDistributions | None
    """The distribution over `Question.numbers`."""


@dataclass(frozen=True)
class ExplainProgress:
    """How much of an explanation is done."""

    done: int
    total: int


class Busy(Exception):
    """The queue is full."""

    retry_after = 5
    """Seconds after which to ask again."""


@dataclass
class _Job:
    """A question on its way through the engine."""

    question: Question
    prompt: Encoded
    volumes: Volumes
    trees: Sequence[tuple[AnswerTree, int]]
    """Answers and candidate numbers to score, a chunk at a time, and how many."""
    send: Callable[[Any], None]
    """Gives an event or an error to the client; returns at once."""
    is_gone: bool = False
    """Whether the client has gone away."""
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    scores: np.ndarray | None = None


class Engine:
    """A model that answers questions, with its queue.

    `ask` and `explain` belong to one event loop; `start` and `close` may be called from anywhere.
    """

    def __init__(
        self,
        model: Llava,
        processor: Processor,
        *,
        lanes: int = 8,
        max_new_tokens: int = 256,
        max_waiting: int = 64,
        scans_kept: int = 16,
        readers: Readers | None = None,
    ):
        """Initialise an engine; `start` makes it answer.

        Args:
            lanes: questions that are answered together.
            max_new_tokens: largest number of tokens of an answer.
            max_waiting: questions and explanations, each, that may be under way; a further one is refused (`Busy`).
            scans_kept: scans of each modality whose features are kept, and the most that one question may show.
            readers: threads that read scans; by default, new ones.
        """
        self.processor, self.config, self.max_new_tokens = processor, model.config, max_new_tokens
        self._model = model
        self._graphdef, self._params = split(model)
        self._max_waiting = max_waiting
        self.readers = Readers() if readers is None else readers
        self._volumes = VolumeStore(processor, self.readers)
        self._features = VolumeFeatures(model, scans_kept)
        self._lanes: Lanes | None = None
        self._slots_of_lanes = 0  # of a prompt; each lane has room for an answer besides
        self._busy: list[_Job | None] = [None] * lanes
        self._queue: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._asked = self._explained = 0
        self._prepared = Budget(_PREPARED_BYTES)
        self._share = _PREPARED_BYTES // (2 * lanes)  # least part of a question: others wait without their volumes
        self._explaining = asyncio.Semaphore(1)
        self._explainer = ThreadPoolExecutor(1, "explain")
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def waiting(self) -> int:
        """Number of questions that are under way and not being answered yet."""
        return max(self._asked - self.answering, 0)

    @property
    def answering(self) -> int:
        """Number of questions whose answers are being generated."""
        return sum(job is not None for job in self._busy)

    def start(self, questions: Sequence[Question] = ()) -> None:
        """Compile the programs for questions like these, and begin to answer.

        Args:
            questions: their scans need not exist and are not read. One that cannot be asked is left out.
        """
        self._warm_up(questions)
        self._thread.start()

    @contextmanager
    def running(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        """Start with these questions, and close at the end of the block."""
        self.start(questions)
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Stop answering; questions that are under way get an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.readers.close()
        self._explainer.shutdown(cancel_futures=True)

    async def ask(self, question: Question) -> AsyncGenerator[Text | CompleteAnswer]:
        """Yield the answer piece by piece, and at the end as a whole.

        A caller that stops iterating, or is cancelled, ends the work on its question.

        Raises:
            Busy: too many questions are under way.
            ConfigError, DataError, CheckpointError: the question cannot be asked, or a scan cannot be read.
            RunError: the model's numbers are not finite, or the engine was closed.
        """
        if self._asked >= self._max_waiting:
            raise Busy
        self._asked += 1
        job: _Job | None = None
        try:
            prompt, trees = await self._volumes.in_thread(partial(self._encode, question))
            async with self._prepared.held(self._volume_bytes(prompt)):
                volumes = await self._volumes.read(question.conversation, prompt, question.control)
                events: asyncio.Queue[Any] = asyncio.Queue()
                loop = asyncio.get_running_loop()
                job = _Job(question, prompt, volumes, trees, partial(_send, loop, events))
                with self._changed:
                    self._queue.append(job)
                    self._changed.notify()
                async for event in _events_to(events, CompleteAnswer):
                    yield event
        finally:
            self._asked -= 1
            if job is not None:
                job.is_gone = True

    async def explain(
        self, question: Question, answer: str | None = None, method: Method = "integrated"
    ) -> AsyncGenerator[ExplainProgress | Explanation]:
        """Yield the progress of an explanation, and at the end the explanation.

        Args:
            answer: the text to explain; by default the answer to the question.

        Raises:
            Busy: too many explanations are under way.
            ConfigError, DataError, CheckpointError, RunError: as `ask` and `umbrella_jax.explain`.
        """
        if self._explained >= self._max_waiting:
            raise Busy
        self._explained += 1
        gone = threading.Event()
        try:
            if answer is None:
                async for event in self.ask(replace(question, answers=(), numbers=None)):
                    if isinstance(event, CompleteAnswer):
                        answer = event.text
            if answer is None or not answer.strip():
                raise ConfigError("answer: empty, so there is nothing to explain")
            async with self._explaining:
                events: asyncio.Queue[Any] = asyncio.Queue()
                send = partial(_send, asyncio.get_running_loop(), events)
                prompt = await self._volumes.in_thread(partial(self._encode_explained, question, answer))
                dataset = await self._volumes.dataset(question.conversation, prompt, question.control)

                def progress(done: int, total: int) -> None:
                    if gone.is_set():
                        raise _GoneError
                    send(ExplainProgress(done, total))

                options: dict[str, Any] = {"answer": answer, "method": method, "progress": progress}
                options["round_length"] = _round_length

                def work() -> None:
                    try:
                        if not gone.is_set():
                            send(explain_dataset(self._model, self.processor, dataset, **options))
                    except BaseException as error:
                        send(error)

                self._explainer.submit(work)
                async for event in _events_to(events, Explanation):
                    yield event
        finally:
            gone.set()
            self._explained -= 1

    def _volume_bytes(self, prompt: Encoded) -> int:
        """Return the part of the memory for volumes that a question takes."""
        sizes = (4 * math.prod(self.config.modalities[image.modality].size) for image in set(prompt.images))
        return min(max(self._share, sum(sizes)), self._prepared.total)

    def _encode(self, question: Question) -> tuple[Encoded, list[tuple[AnswerTree, int]]]:
        """Check a question, and return its prompt and the answers to score; opens no scan."""
        if not 1 <= question.max_new_tokens <= self.max_new_tokens:
            raise ConfigError(f"max_tokens: expected 1 to {self.max_new_tokens}, got {question.max_new_tokens}")
        if not 0 <= question.seed < 2**32:
            raise ConfigError(f"seed: expected 0 to {2**32 - 1}, got {question.seed}")
        self.config.check_trained(image.modality for image in question.conversation.images)
        prompt = self._volumes.encode(question.conversation)
        self._features.check(dict.fromkeys(prompt.images))
        return prompt, self._trees(question)

    def _encode_explained(self, question: Question, answer: str) -> Encoded:
        """Check a question and an answer to explain, and return the prompt; opens no scan."""
        prompt, _ = self._encode(replace(question, answers=(), numbers=None))
        tokenizer, template = self.processor.tokenizer, self.processor.template
        (ids,) = encode_answers(question.conversation, [answer], tokenizer, template=template)
        if (length := len(prompt) + len(ids)) > (limit := self.processor.max_length):
            raise ConfigError(f"answer: with its prompt, {length} positions; expected at most {limit}")
        return prompt

    def _trees(self, question: Question) -> list[tuple[AnswerTree, int]]:
        """Return the answers and candidate numbers of a question, padded to few shapes."""
        tokenizer = CachingTokenizer(self.processor.tokenizer)  # every answer is encoded with the whole prompt
        common: dict[str, Any] = {"tokenizer": tokenizer, "template": self.processor.template}
        encoded: list[Answers] = []
        if question.answers:
            encoded.append(encode_answers(question.conversation, question.answers, **common))
        if question.numbers:
            grid = question.numbers
            encoded.append(encode_numbers(question.conversation, grid.texts, grid.stems, **common))
        longest = max((len(answer) - 1 for own in encoded for answer in own), default=0)  # without the end
        if longest > self.max_new_tokens:
            raise ConfigError(
                f"an answer has {longest} tokens; this server's answers have at most {self.max_new_tokens}"
            )
        chunks = [chunk for own in encoded for chunk in _chunks(own)]
        shapes = [tree_shape([chunk]) for chunk in chunks]
        if (nodes := sum(nodes for nodes, _ in shapes)) > _ALL_NODES:
            raise ConfigError(
                f"{nodes} tokens of answers to compare; expected at most {_ALL_NODES}, send fewer or shorter"
            )
        return [
            (answer_trees([chunk], _round_tree(*shape)), len(chunk))
            for chunk, shape in zip(chunks, shapes, strict=True)
        ]

    # The methods below run in the thread that owns the model.

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and not self._queue and not any(self._busy):
                    self._changed.wait()
                if self._is_closed:
                    for job in (*self._queue, *filter(None, self._busy)):
                        job.send(RunError("the server is shutting down"))
                    return
            try:
                self._admit()
                self._advance()
            except Exception as error:  # the thread goes on, whatever happens to a question
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Send an error to the questions in the lanes, whose state is lost because it was donated."""
        for failed in filter(None, self._busy):
            failed.send(error)
        self._busy = [None] * len(self._busy)
        self._lanes = None

    def _admit(self) -> None:
        """Give free lanes to the questions that wait longest.

        A question that needs longer lanes than there are waits until all are free.
        """
        while self._queue and None in self._busy:
            job = self._queue[0]
            slots = _round_length(len(job.prompt))
            if slots > self._slots_of_lanes and any(self._busy):
                return
            self._queue.popleft()
            if job.is_gone:
                continue
            try:
                state = self._read_prompt(job, slots)
                token = self._first_token(job, state)
                complete = self._append(job, token)
            except Exception as error:
                job.send(error)
                continue
            if complete:
                job.send(complete)
                continue
            if not any(self._busy) and slots != self._slots_of_lanes:
                self._lanes, self._slots_of_lanes = None, slots
            lane = self._busy.index(None)
            self._busy[lane] = job
            try:
                if self._lanes is None:
                    self._lanes = empty_lanes(state, len(self._busy), self._slots_of_lanes + self.max_new_tokens - 1)
                self._lanes = enter(self._lanes, state, np.int32(lane), np.int32(token))
            except Exception as error:
                self._fail(error)

    def _read_prompt(self, job: _Job, slots: int) -> Decoding:
        """Read a prompt, and score its answers, while the lanes go on."""
        first_rows = self._features.put(self._params, self._graphdef, job.volumes)
        batch, length = text_batch(1, slots), len(job.prompt)
        batch.lengths[0], batch.input_ids[0, :length] = length, job.prompt.input_ids
        for image, start in zip(job.prompt.images, job.prompt.image_starts, strict=True):
            offsets = np.arange(self.config.modalities[image.modality].num_patches)
            batch.feature_idx[0, start + offsets] = first_rows[image] + offsets
        state = prefill(self._params, batch, self._features.arrays, graphdef=self._graphdef, max_new_tokens=1)
        if job.trees:
            parts = list[np.ndarray]()
            for tree, count in job.trees:
                if parts:
                    self._advance()
                scores = score_answers(self._params, state, tree, graphdef=self._graphdef)
                parts.append(np.asarray(scores[0], np.float64)[:count])
            job.scores = np.concatenate(parts)
            if not np.isfinite(job.scores).all():
                raise RunError("likelihoods are not finite; look for NaN in the model's weights")
        return state

    def _first_token(self, job: _Job, state: Decoding) -> int:
        token, finite = first_token(self._params, state.hidden, self._draws([job]), graphdef=self._graphdef)
        if not finite[0]:
            raise _not_finite()
        return int(token[0])

    def _advance(self) -> None:
        """Generate a token in each busy lane."""
        for lane, job in enumerate(self._busy):
            if job is not None and job.is_gone:
                self._busy[lane] = None
        if not any(self._busy):
            return
        try:
            assert self._lanes is not None
            is_busy = np.array([job is not None for job in self._busy])
            draws = self._draws(self._busy)
            self._lanes, finite = advance(self._params, self._lanes, is_busy, draws, graphdef=self._graphdef)
            tokens, finite = jax.device_get((self._lanes.tokens, finite))
        except Exception as error:
            self._fail(error)
            return
        for lane, job in enumerate(self._busy):
            if job is None:
                continue
            try:
                if not finite[lane]:
                    raise _not_finite()
                complete = self._append(job, int(tokens[lane]))
            except Exception as error:
                self._busy[lane] = None
                job.send(error)
                continue
            if complete:
                self._busy[lane] = None
                job.send(complete)

    def _append(self, job: _Job, token: int) -> CompleteAnswer | None:
        """Append a token to an answer, and send the text that it adds. Returns the answer if it is complete."""
        job.tokens.append(token)
        has_stopped = token in self.processor.stop_ids
        is_complete = has_stopped or len(job.tokens) == job.question.max_new_tokens
        (text,) = self.processor.decode([job.tokens])
        if is_complete or not text.endswith("\N{REPLACEMENT CHARACTER}"):  # its other tokens are still to come
            if delta := text.removeprefix(job.shown):
                job.send(Text(delta))
            job.shown = text
        return self._answer(job, text, "stop" if has_stopped else "length") if is_complete else None

    def _answer(self, job: _Job, text: str, finish_reason: Literal["stop", "length"]) -> CompleteAnswer:
        question, scores = job.question, job.scores
        likelihoods, numbers = dict[str, float](), None
        if scores is not None:
            count = len(question.answers)
            likelihoods = dict(zip(question.answers, map(float, _softmax(scores[:count])), strict=True))
            if question.numbers:
                values = np.array(question.numbers.values, np.float64)
                numbers = NumberDistributions(values, _softmax(scores[count:])[None])
        return CompleteAnswer(text, finish_reason, len(job.prompt), len(job.tokens), likelihoods, numbers)

    def _draws(self, jobs: Sequence[_Job | None]) -> Any:
        """Return how the rows of `jobs` choose their next tokens; None if all take the likeliest."""
        sampling = [job.question.sampling if job else GREEDY for job in jobs]
        return draws_of(
            np.array([own.temperature for own in sampling], np.float32),
            np.array([own.top_k or 2**31 - 1 for own in sampling], np.int32),
            np.array([own.top_p for own in sampling], np.float32),
            np.array([job.question.seed if job else 0 for job in jobs], np.uint32),
            np.array([len(job.tokens) if job else 0 for job in jobs], np.int32),
        )

    def _warm_up(self, questions: Sequence[Question]) -> None:
        """Run every program that questions like these need."""
        common: dict[str, Any] = {"graphdef": self._graphdef}
        states: dict[int, Decoding] = {}
        drawing = replace(GREEDY, temperature=1.0)
        for question in questions:
            try:
                prompt, trees = self._volumes.encode(question.conversation), self._trees(question)
                self._features.check(dict.fromkeys(prompt.images))
            except UmbrellaError:
                continue
            shown = {
                image: (None, np.zeros(self.config.modalities[image.modality].size, np.float32))
                for image in prompt.images
            }
            for own in (question, replace(question, sampling=drawing)):
                job = _Job(own, prompt, shown, trees, _ignore)
                slots = _round_length(len(prompt))
                states[slots] = self._read_prompt(job, slots)
                first_token(self._params, states[slots].hidden, self._draws([job]), **common)
                drawn = self._draws([job, *self._busy[1:]])
                lanes = empty_lanes(states[slots], len(self._busy), slots + self.max_new_tokens - 1)
                for shorter in sorted(states):
                    if shorter <= slots:
                        lanes = enter(lanes, states[shorter], np.int32(0), np.int32(0))
                jax.block_until_ready(advance(self._params, lanes, np.ones(len(self._busy), bool), drawn, **common))


class _GoneError(Exception):
    """The client of an explanation has gone away."""


def _round_length(length: int) -> int:
    """Round a prompt's length up to 64, 128, 192, 256, 384, 512, 768 and so on: at most a third is padding."""
    size = _SHORTEST
    while size < length:
        size *= 2
    shorter = size // 4 * 3
    return shorter if size > 2 * _SHORTEST and length <= shorter else size


def _chunks(answers: Answers) -> Iterator[Answers]:
    """Divide answers into chunks that are scored at a time."""
    chunk, nodes = list[Sequence[int]](), set[tuple[int, ...]]()
    for answer in answers:
        own = {tuple(answer[:end]) for end in range(len(answer))}
        if chunk and (len(chunk) == _SCORED or len(nodes | own) > _SCORED_NODES):
            yield chunk
            chunk, nodes = [], set()
        chunk.append(answer)
        nodes |= own
    if chunk:
        yield chunk


def _round_tree(nodes: int, answers: int) -> tuple[int, int]:
    """Round the shape of an `AnswerTree` up, each number to one of few, because each shape is compiled."""
    return _round_up(nodes, 8), _round_up(answers, 4)


def _round_up(number: int, size: int) -> int:
    """Round up to `size`, 4 · `size`, 16 · `size` and so on."""
    while size < number:
        size *= 4
    return size


def _softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max(initial=-np.inf))
    return shares / shares.sum()


def _not_finite() -> RunError:
    return RunError("logits are not finite; look for NaN in the model's weights and in the scan")


def _ignore(event: Any) -> None:
    """Send nothing: the `send` of questions that only warm up."""


async def _events_to(events: asyncio.Queue[Any], last: type) -> AsyncGenerator[Any]:
    """Yield the events of a queue up to one of type `last`. Raise one that is an error."""
    event: Any = None
    while not isinstance(event, last):
        event = await events.get()
        if isinstance(event, BaseException):
            raise event
        yield event


def _send(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: Any) -> None:
    """Put an event into a queue of the event loop, from any thread."""
    with suppress(RuntimeError):  # the loop has ended, and with it the client
        loop.call_soon_threadsafe(events.put_nowait, event)
