"""The files of a run directory, and functions that read them without JAX. docs/runs.md describes them for users.

config.yaml      the config with all defaults
inputs.json      a digest of every file that the run reads
counts.json      numbers of conversations, subjects and answers of the data
summary.json     what the run trains, how and where: the tables that its start prints
model/           config.json, tokenizer, modalities: the model without its weights
metrics.jsonl    one line per update, with eval_NAME of its evaluation if there was one; the best step also has
                 final_NAME if train.eval_samples limited its first evaluation
predictions/     answers of each evaluation
baseline/        answers of baselines, of `umbrella-jax baseline RUN`
controls/        answers of the last evaluation under each control, such as blank volumes
checkpoints/     trained parameters, moments and step, in orbax format
log.txt          everything printed, and how the run ended; a resumed run appends to it
report.html      the page of `umbrella-jax report`
test/            answers to the test set of a fold, of a run of `umbrella-jax cv`
.lock            held by the process that is training
"""

import logging
import math
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from umbrella_jax.config.load import load_stored_config
from umbrella_jax.config.schema import EarlyStoppingConfig, RunConfig, TrainConfig, lower_is_better
from umbrella_jax.errors import ConfigError, DataError, Interrupted, UmbrellaError, known_cause, visible
from umbrella_jax.io.files import open_private, strict_json, write_whole
from umbrella_jax.io.reading import parse_json

CONFIG, INPUTS, COUNTS, SUMMARY, MODEL = "config.yaml", "inputs.json", "counts.json", "summary.json", "model"
METRICS, PREDICTIONS, CHECKPOINTS = "metrics.jsonl", "predictions", "checkpoints"
LOG, REPORT = "log.txt", "report.html"
TEST, CONTROLS = "test", "controls"
CONTROL_NAMES = ("blank", "noise", "shuffled", "shuffled-reference", "other-modality", "paraphrase")
"""Names of controls and of their files, in the order of tables; umbrella_jax/inference/controls.py defines them."""
FOLDS = "folds.json"
"""The file of a cross-validation, beside the runs of its folds."""
Say = Callable[[str], None]
"""Prints or logs a text for people, of one or more lines."""
Step = int | Literal["best", "latest"]
"""Selects one of a run's checkpoints or evaluations: by number, or the best or latest."""
Line = dict[str, float | None]
"""{name: value} of an update, a line of `metrics.jsonl`. None replaces a value that is not finite, which JSON lacks."""
_MARKS = _STARTED, _FINISHED, _ENDED = "started:", "finished:", "ended:"
_EVAL, _FINAL = "eval_", "final_"
_TAIL = 1 << 18
"""Number of bytes at the end of a log that are searched for how the run ended."""


def say_nothing(text: str) -> None:
    """Print nothing: the `Say` of all processes but the first."""


def load_run_config(run: Path) -> RunConfig:
    """Read the config of a run, with paths that can be opened from here.

    A run records the paths of its data as they were given, and a relative one starts where the run was started. That
    folder follows from the recorded `output_dir` if it is relative too, because the run's path ends with it. A path
    that is not found from there is returned as it is recorded.

    Raises ConfigError as `load_stored_config` does.
    """
    config = load_stored_config(run / CONFIG)
    out, path = Path(config.output_dir or ""), run.absolute()
    start = Path(*path.parts[: len(path.parts) - len(out.parts)])
    if out.is_absolute() or not out.parts or start / out != path or start == Path.cwd():
        return config

    def reachable(recorded: str | None) -> str | None:
        return str(start / recorded) if recorded and (start / recorded).exists() else recorded

    data, tasks = config.data, config.evaluation.tasks
    tasks = {name: replace(t, findings=reachable(t.findings), schema=reachable(t.schema)) for name, t in tasks.items()}
    return replace(
        config,
        data=replace(
            data,
            train=reachable(data.train),
            eval=reachable(data.eval),
            image_root=reachable(data.image_root),
            cache=reachable(data.cache),
        ),
        model=replace(config.model, adapter=reachable(config.model.adapter)),
        evaluation=replace(config.evaluation, tasks=tasks),
    )


def read_metrics(path: Path) -> list[Line]:
    """Return the lines of a `metrics.jsonl`, none if there is no file.

    An incomplete last line, as a kill leaves it, is ignored. Raises DataError for any other line that is invalid.
    """
    if not path.exists():
        return []
    rows, lines = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for number, row in enumerate(rows, 1):
        try:
            lines.append(parse_json(row, path, DataError, "remove it", number))
            int(lines[-1]["step"])
        except (ValueError, TypeError, KeyError):
            if number < len(rows):
                raise DataError(f"{path}:{number}: not a line of metrics; remove it, or restore the file") from None
            del lines[number - 1 :]
    return lines


def rank(values: Mapping[int, float], metric: str) -> list[tuple[int, float]]:
    """Return (step, value of `metric`) from best to worst, and by step if equal."""
    sign = 1 if lower_is_better(metric) else -1
    return sorted(values.items(), key=lambda item: (sign * item[1], item[0]))


def add_final_metrics(path: Path, step: int, metrics: Line) -> None:
    """Add a step's evaluation on all evaluation data to its line.

    Args:
        path: the `metrics.jsonl`.
        metrics: {`eval_NAME`: value}. They are written as `final_NAME`, because the line's own `eval_NAME` rank the
            steps.
    """
    final = {_FINAL + name.removeprefix(_EVAL): value for name, value in metrics.items()}
    lines = [line | final if line["step"] == step else line for line in read_metrics(path)]
    write_whole(path, "".join(strict_json(line) + "\n" for line in lines))


def with_final(line: Line) -> Line:
    """Return a line with its `final_NAME`, if it has any, in place of its `eval_NAME`."""
    final = {_EVAL + name.removeprefix(_FINAL): value for name, value in line.items() if name.startswith(_FINAL)}
    return {name: value for name, value in line.items() if not (final and name.startswith((_FINAL, _EVAL)))} | final


def evaluations(lines: Iterable[Line]) -> dict[int, Line]:
    """Return {step: line} of the evaluated steps."""
    return {int(line["step"] or 0): line for line in lines if any(name.startswith(_EVAL) for name in line)}


def points(lines: Iterable[Line], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of the lines whose value of a metric is finite."""
    return [(int(line["step"] or 0), value) for line in lines if (value := line.get(name)) is not None]


def stopped_early(lines: Iterable[Line], rule: EarlyStoppingConfig | None) -> str | None:
    """Return why early stopping ends a run after these lines of `metrics.jsonl`; None if the run goes on.

    Args:
        lines: by increasing step.
        rule: `EarlyStoppingConfig` defines it; None never stops a run.
    """
    if rule is None:
        return None
    metric, failed, step = rule.metric, 0, 0
    sign = 1 if lower_is_better(metric) else -1
    best: tuple[float, int] | None = None  # (sign · value, step)
    for step, line in evaluations(lines).items():
        value = line.get(metric)
        failed += 1
        if value is None or not math.isfinite(value):
            continue
        if best is None or best[0] - sign * value > rule.min_delta:
            failed = 0
        best = min(best or (math.inf, 0), (sign * value, step))
    if failed < rule.patience:
        return None
    count = f"{failed} evaluation{'' if failed == 1 else 's'}"
    if best is None:
        return f"stopped early at step {step}: {metric} was not finite in {count}"
    by = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
    return (
        f"stopped early at step {step}: {metric} did not improve{by} in {count} "
        f"(best {sign * best[0]:.4g} at step {best[1]})"
    )


NEWEST = "the newest"


def choose_step(run: Path, train: TrainConfig, steps: Collection[int], asked: Step | None) -> tuple[int, str]:
    """Return which of a run's steps to use, and why.

    Args:
        train: the run's settings.
        steps: to choose from; at least one.
        asked: the user's choice. Without one, it is the best step if the run keeps its best, else the newest.

    Raises:
        ConfigError: `asked` is not one of the steps, or is the best of a run that keeps no best or has no finite value.
    """
    words = "best, latest" if train.keep_best and asked != "best" else "latest"
    expected = f"expected {words} or one of {', '.join(map(str, sorted(steps)))}"
    if isinstance(asked, int):
        if asked not in steps:
            raise ConfigError(f"--step {asked}: {run} has no such step; {expected}")
        return asked, "as asked"
    newest = max(steps)
    if asked == "latest" or (asked is None and not train.keep_best):
        return newest, NEWEST
    if not train.keep_best:
        raise ConfigError(f"--step best: {run} keeps no best (train.keep_best is 0); {expected}")
    metric = str(train.best_metric)
    all_values = {int(line["step"] or 0): line.get(metric) for line in read_metrics(run / METRICS)}
    values = {step: value for step in steps if (value := all_values.get(step)) is not None and math.isfinite(value)}
    if not values:
        if asked == "best":
            raise ConfigError(f"--step best: no step of {run} has a finite {metric} yet; {expected}")
        return newest, f"the newest; none has a finite {metric} yet"
    (step, value), *_ = rank(values, metric)
    return step, f"best {metric}, {value:.4g}" + ("" if step == newest else f"; the newest is {newest}")


def predictions_by_step(run: Path) -> dict[int, Path]:
    """Return {step: predictions file of the evaluation after it} of a run, by increasing step."""
    files = {file.stem.removeprefix("step_"): file for file in (run / PREDICTIONS).glob("step_*.jsonl")}
    return {int(step): files[step] for step in sorted(filter(str.isdecimal, files), key=int)}


def run_control(run: Path, step: int, name: str) -> Path:
    """Return the file of a step's answers under a control."""
    return run / CONTROLS / f"step_{step}" / f"{name}.jsonl"


def control_beside(predictions: Path, name: str) -> Path:
    """Return the file in which `umbrella-jax predict` writes the answers under a control: X.NAME.jsonl of X.jsonl."""
    return predictions.with_name(f"{predictions.stem}.{name}{predictions.suffix}")


def controls_of(predictions: Path) -> dict[str, Path]:
    """Return {control: its file} of a file of true answers: those beside it, or in a run those of the same step."""
    step = predictions.stem.removeprefix("step_")
    if predictions.parent.name == PREDICTIONS and step.isdecimal():
        files = {name: run_control(predictions.parents[1], int(step), name) for name in CONTROL_NAMES}
    else:
        files = {name: control_beside(predictions, name) for name in CONTROL_NAMES}
    return {name: file for name, file in files.items() if file.is_file()}


def seed_run(directory: Path, seed: int) -> Path:
    """Return the directory of one seed's run below that of `umbrella-jax train --seeds`."""
    return directory / f"seed-{seed}"


def seed_runs(directory: Path) -> dict[int, Path]:
    """Return {seed: directory of its run} of a directory of `umbrella-jax train --seeds`, by increasing seed.

    Empty for any other directory.
    """
    folders = {path.name.removeprefix("seed-"): path for path in directory.glob("seed-*") if path.is_dir()}
    return {int(seed): folders[seed] for seed in sorted(filter(str.isdecimal, folders), key=int)}


def check_one_run(directory: Path) -> None:
    """Raise ConfigError if a directory holds the runs of several seeds or folds, naming them."""
    if runs := seed_runs(directory):
        raise ConfigError(
            f"{directory}: holds the runs of several seeds; name one: {', '.join(map(str, runs.values()))}"
        )
    if folds := fold_runs(directory):
        names = ", ".join(str(fold.run) for fold in folds)
        raise ConfigError(f"{directory}: holds the runs of several folds; name one: {names}")


@dataclass(frozen=True)
class FoldRun:
    """The run of one fold of a cross-validation."""

    run: Path
    """Its directory, which has the fold's name."""
    left_out: str | None
    """The value of the column whose subjects are the test set; None for folds that are drawn."""

    @property
    def title(self) -> str:
        """The fold in messages and tables, such as `fold-1` or `fold-1 without Oslo`."""
        return self.run.name if self.left_out is None else f"{self.run.name} without {self.left_out}"


def fold_runs(directory: Path) -> list[FoldRun]:
    """Return the folds of a directory of `umbrella-jax cv`, whether they were trained or not.

    Empty for any other directory. Raises ConfigError if its list of folds is damaged.
    """
    file = directory / FOLDS
    if not file.is_file():
        return []
    try:
        folds = parse_json(file.read_text(encoding="utf-8"), file, ConfigError, "restore it")["folds"]
        return [FoldRun(directory / fold["name"], fold["left_out"]) for fold in folds]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{file}: not a list of folds; restore it, or choose another directory") from None


def step_to_test(run: Path, train: TrainConfig) -> tuple[int, str]:
    """Return the step of a fold's run that answers its test set, and why; the run has made at least one step.

    It is the best step on the fold's eval split if the run keeps its best, else the newest, never one that was chosen
    on the test set.
    """
    lines = read_metrics(run / METRICS)
    return choose_step(run, train, {*evaluations(lines), int(lines[-1]["step"] or 0)}, None)


def test_answers(run: Path, step: int) -> Path:
    """Return the file of a step's answers to the test set of a fold."""
    return run / TEST / f"step_{step}.jsonl"


class RunLog:
    """Context manager that writes `log.txt`: printed lines, warnings, other packages' logs, and the error at the end.

    Every line begins with its time. Control characters are escaped. Names and answers may contain line breaks, so lines
    are indented if they could be mistaken for those that record how the run began or ended. If the file can no longer
    be written, one warning is printed, and the run continues without it.

    Args:
        say: prints the lines too.
        about: text of the first line, which also has process and host.
    """

    def __init__(self, path: Path, say: Say, about: str):
        self.path, self._say, self._about = path, say, about
        self._handlers: list[logging.Handler] = []
        self._file: TextIO | None = None

    def say(self, text: str) -> None:
        """Print a text and write it to the log."""
        self._say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a text to the log only."""
        first, *more = text.split("\n")
        self._write([f"  {first}" if first.startswith(_MARKS) else first, *more])

    def _write(self, lines: Sequence[str]) -> None:
        """Write a line, and its continuation lines indented, so that none begins like one of _MARKS."""
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        try:
            self._file.write("".join(f"{now} {visible(line)}\n" for line in [lines[0], *(f"  {m}" for m in lines[1:])]))
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # closing writes what is left, and fails again
                self._file.close()
            self._file = None
            self._say(f"WARNING: {self.path}: no longer written: {error.strerror}")

    def __enter__(self) -> "RunLog":
        # a text may contain a path that is not valid Unicode
        self._file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", opener=open_private)
        self._write([f"{_STARTED} {self._about}, process {os.getpid()} on {socket.gethostname()}"])
        self._showwarning, warnings.showwarning = warnings.showwarning, self._warned
        root = logging.getLogger()
        self._handlers = [_Handler(self.note)]
        if not root.handlers and logging.lastResort:  # logging uses it only while there is no other handler
            self._handlers.append(logging.lastResort)
        for handler in self._handlers:
            root.addHandler(handler)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
        warnings.showwarning = self._showwarning
        self._write([_FINISHED] if error is None else f"{_ENDED} {_ending(error)}".split("\n"))
        if self._file:
            self._file.close()

    def _warned(
        self, message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        self._showwarning(message, category, filename, lineno, file, line)
        self.note(f"{category.__name__}: {message} ({filename}:{lineno})")


class _Handler(logging.Handler):
    """Writes warnings and errors of other packages to the log."""

    def __init__(self, note: Say):
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(f"{record.levelname}: {record.name}: {self.format(record)}")


def _ending(error: BaseException) -> str:
    if isinstance(error, Interrupted | UmbrellaError):
        return str(error)
    if line := known_cause(error):
        return line
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT: stopped before there was anything to save"
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error)).rstrip()}"


def how_it_ended(path: Path) -> str | None:
    """Return how the last run in a log ended: the first line of its error, or "" if it finished.

    None if the log does not say, because the process was killed or is still running.
    """
    for text in _from_the_end(path):
        if text.startswith(_STARTED):
            return None
        if text.startswith(_MARKS):
            return text.removeprefix(_FINISHED).removeprefix(_ENDED).strip()
    return None


def _from_the_end(path: Path) -> Iterator[str]:
    """Yield the lines of a log without their time, the last first."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
        lines = file.read().decode("utf-8", "replace").split("\n")
    for line in reversed(lines):
        yield line.partition(" ")[2].partition(" ")[2]
