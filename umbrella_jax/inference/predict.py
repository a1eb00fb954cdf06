"""Answer a data set and its controls into files, as `umbrella-jax predict` does; an interrupted call continues."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from umbrella_jax.checkpoints.checkpoint import Checkpoint, RunCheckpoint
from umbrella_jax.config.load import flat
from umbrella_jax.config.schema import (
    ControlName,
    DataConfig,
    EvaluationWindows,
    MeshConfig,
    ModalityConfig,
    TaskConfig,
    to_dict,
)
from umbrella_jax.console import Progress
from umbrella_jax.data.inputs import digest_of, read_inputs
from umbrella_jax.distributed import SHA256, broadcast, check_same, gather, raise_together
from umbrella_jax.errors import ConfigError
from umbrella_jax.inference.answers import Choices, check_lengths, generate_answers
from umbrella_jax.inference.constrained import Constraints
from umbrella_jax.inference.controls import ControlledDataset, left_out_lines, make_controls
from umbrella_jax.inference.generate import GREEDY, Sampling
from umbrella_jax.inference.processor import Processor
from umbrella_jax.inference.windows import ExpandedDataset, expand
from umbrella_jax.io.files import PRIVATE, append_line, check_output, naming, strict_json, take_lock, write_whole
from umbrella_jax.io.reading import parse_json
from umbrella_jax.models import abstract_params, native_backend
from umbrella_jax.rundir import CONTROL_NAMES, Say, Step, control_beside, load_run_config, say_nothing
from umbrella_jax.scoring.metrics import task_of, tasks_of
from umbrella_jax.scoring.rows import Row, blank_rows
from umbrella_jax.scoring.tasks import number_tasks
from umbrella_jax.sharding import MeshShape, make_mesh, param_sharding
from umbrella_jax.training.checkpoint import checksums


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
            of_run = load_run_config(checkpoint.path).evaluation
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
        **{f"config.json: {key}": value for key, value in flat(checkpoint.config.architecture).items()},
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
                for answered_rows in generate_answers(
                    params,
                    abstract_params(model)[0],
                    own.expanded,
                    own.rows,
                    known,
                    processor,
                    devices,
                    batch_size=batch_size,
                    threads=data.threads,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    seed=seed,
                    choices=choices,
                    constraints=constraints,
                    only=left,
                    progress=progress,
                ):
                    fresh = {start + number: row for number, row in answered_rows.items()}
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
