"""What lies in a run's directory, and what of it is read without jax. docs/runs.md tells it to people.

config.yaml      the resolved config
inputs.json      what the run reads, by content
model/           config.json, tokenizer, modalities: all of the model but its weights
metrics.jsonl    one line per update, with the figures of its evaluation where there was one, and final_... of the
                 best step, which train.eval_samples limited at first
predictions/     answers of each evaluation
checkpoints/     orbax: what was trained, moments, step
log.txt          all that was said, and how it ended; a run that goes on writes behind it
report.html      where `umbrella-jax report` puts its page
.lock            held by the process that is training
"""

import logging
import math
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from umbrella_jax.config.schema import TrainConfig, lower_is_better
from umbrella_jax.errors import ConfigError, DataError, Interrupted, UmbrellaError, known_cause, visible
from umbrella_jax.io.files import private, strict_json, write_whole
from umbrella_jax.io.reading import parse_json

CONFIG, INPUTS, MODEL, METRICS, PREDICTIONS, CHECKPOINTS, LOG, REPORT = (
    *("config.yaml", "inputs.json", "model", "metrics.jsonl", "predictions", "checkpoints", "log.txt", "report.html"),
)
Say = Callable[[str], None]
"""Takes lines for people."""
Step = int | Literal["best", "latest"]
"""Which of a run's checkpoints or evaluations."""
Line = dict[str, float | None]
"""A line of `metrics.jsonl`; None stands for what is not finite, which JSON does not know."""
_MARKS = _STARTED, _FINISHED, _ENDED = "started:", "finished:", "ended:"
_EVAL, _FINAL = "eval_", "final_"
_TAIL = 1 << 18
"""Bytes of a log's end in which it is looked for how the run ended."""


def nothing(line: str) -> None:
    """Says nothing: of all processes but the first."""


def read_metrics(path: Path) -> list[Line]:
    """The lines of a `metrics.jsonl`, none where there is no file. A last one that a kill tore apart is left out.

    Raises DataError for any other line that is none.
    """
    if not path.exists():
        return []
    rows, lines = path.read_text(encoding="utf-8").splitlines(), []
    for number, row in enumerate(rows, 1):
        try:
            lines.append(parse_json(row, path, DataError, "take it out", number))
            int(lines[-1]["step"])
        except (ValueError, TypeError, KeyError):
            if number < len(rows):
                raise DataError(f"{path}:{number}: no line of metrics; take it out, or bring the file back") from None
            del lines[number - 1 :]
    return lines


def rank(values: Mapping[int, float], metric: str) -> list[tuple[int, float]]:
    """Sort (step, value of `metric`) from best to worst, equal ones by step."""
    sign = 1 if lower_is_better(metric) else -1
    return sorted(values.items(), key=lambda item: (sign * item[1], item[0]))


def add_figures(path: Path, step: int, figures: Line) -> None:
    """Add the `eval_NAME` of a step's evaluation on all evaluation data to its line, as `final_NAME`: those that the
    line has rank the steps."""
    final = {_FINAL + name.removeprefix(_EVAL): value for name, value in figures.items()}
    lines = [line | final if line["step"] == step else line for line in read_metrics(path)]
    write_whole(path, "".join(strict_json(line) + "\n" for line in lines))


def with_final(line: Line) -> Line:
    """Return a line with its `final_NAME`, if it has any, in place of its `eval_NAME`."""
    final = {_EVAL + name.removeprefix(_FINAL): value for name, value in line.items() if name.startswith(_FINAL)}
    return {name: value for name, value in line.items() if not (final and name.startswith((_FINAL, _EVAL)))} | final


NEWEST = "the newest"


def choose_step(run: Path, train: TrainConfig, steps: Collection[int], asked: Step | None) -> tuple[int, str]:
    """Return which of a run's `steps`, at least one, to use, and why: the best if the run keeps its best, else the
    newest, unless another is asked for.

    Raises ConfigError if `asked` is none of them, or the best of a run that keeps none or was not evaluated.
    """
    there = f"expected latest or one of {', '.join(map(str, sorted(steps)))}"
    if isinstance(asked, int):
        if asked not in steps:
            raise ConfigError(f"--step {asked}: {run} has no such step; {there}")
        return asked, "as asked"
    newest = max(steps)
    if asked == "latest" or (asked is None and not train.keep_best):
        return newest, NEWEST
    if not train.keep_best:
        raise ConfigError(f"--step best: {run} keeps no best (train.keep_best is 0); {there}")
    metric = str(train.best_metric)
    found = {int(line["step"] or 0): line.get(metric) for line in read_metrics(run / METRICS)}
    values = {step: value for step in steps if (value := found.get(step)) is not None and math.isfinite(value)}
    if not values:
        if asked == "best":
            raise ConfigError(f"--step best: no step of {run} has a finite {metric} yet; {there}")
        return newest, f"the newest; none has a finite {metric} yet"
    (step, value), *_ = rank(values, metric)
    return step, f"best {metric}, {value:.4g}" + ("" if step == newest else f"; the newest is {newest}")


def evaluations(run: Path) -> dict[int, Path]:
    """{step: the predictions of a run's evaluation behind it}, the first step first."""
    found = {file.stem.removeprefix("step_"): file for file in (run / PREDICTIONS).glob("step_*.jsonl")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


class RunLog:
    """`log.txt` while it is entered: what is said, warnings, what other packages log, and the error that ends it.

    Every line begins with its time. Control characters are escaped, and only the lines that say how the run began and
    ended can begin as they do: names and answers may contain line breaks. If the file can no longer be written, that is
    said once, and the run goes on without it.
    """

    def __init__(self, path: Path, say: Say, about: str):
        """`say`: where lines go too; `about`: of the first line, beside process and host."""
        self.path, self._say, self._about = path, say, about
        self._handlers: list[logging.Handler] = []
        self._file: TextIO | None = None

    def say(self, text: str) -> None:
        """Into the log and to people."""
        self._say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Add lines to the log only."""
        first, *more = text.split("\n")
        self._write([f"  {first}" if first.startswith(_MARKS) else first, *more])

    def _write(self, lines: Sequence[str]) -> None:
        """Add a line, and those that continue it, indented so that none can pass for one of _MARKS."""
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        try:
            self._file.write("".join(f"{now} {visible(line)}\n" for line in [lines[0], *(f"  {m}" for m in lines[1:])]))
            self._file.flush()
        except OSError as error:
            self._file = None
            self._say(f"WARNING: {self.path}: no longer written: {error.strerror}")

    def __enter__(self) -> "RunLog":
        # a path may be no Unicode
        self._file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", opener=private)
        self._write([f"{_STARTED} {self._about}, process {os.getpid()} on {socket.gethostname()}"])
        self._showwarning, warnings.showwarning = warnings.showwarning, self._warned
        root = logging.getLogger()
        self._handlers = [_Handler(self.note)]
        if not root.handlers and logging.lastResort:  # which is asked no more where there is a handler
            self._handlers.append(logging.lastResort)
        for handler in self._handlers:
            root.addHandler(handler)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
        warnings.showwarning = self._showwarning
        self._write([_FINISHED] if error is None else f"{_ENDED} {_said(error)}".split("\n"))
        if self._file:
            self._file.close()

    def _warned(
        self, message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        self._showwarning(message, category, filename, lineno, file, line)
        self.note(f"{category.__name__}: {message} ({filename}:{lineno})")


class _Handler(logging.Handler):
    """Of warnings and worse."""

    def __init__(self, note: Say):
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(f"{record.levelname}: {record.name}: {self.format(record)}")


def _said(error: BaseException) -> str:
    if isinstance(error, Interrupted | UmbrellaError):
        return str(error)
    if line := known_cause(error):
        return line
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT: stopped before there was anything to save"
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error)).rstrip()}"


def how_it_ended(path: Path) -> str | None:
    """What a log says last of an end: the error's first line, "" of a run that finished, None where it says none, as
    of a process that was killed, or that is running."""
    for text in _from_the_end(path):
        if text.startswith(_STARTED):
            return None
        if text.startswith(_MARKS):
            return text.removeprefix(_FINISHED).removeprefix(_ENDED).strip()
    return None


def _from_the_end(path: Path) -> Iterator[str]:
    """Lines without their time, the last first."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
        lines = file.read().decode("utf-8", "replace").split("\n")
    for line in reversed(lines):
        yield line.partition(" ")[2].partition(" ")[2]
