"""Runs side by side: how far each is, its figures, and what differs between their configs. Reads without jax."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

from umbrella_jax.config.load import flat, load_stored_config
from umbrella_jax.config.schema import Metric, to_dict
from umbrella_jax.console import table_lines
from umbrella_jax.errors import ConfigError, UmbrellaError, visible, why_not_a_directory
from umbrella_jax.html.page import page_faults
from umbrella_jax.io.files import is_locked, write_whole
from umbrella_jax.rundir import (
    CHECKPOINTS,
    CONFIG,
    LOG,
    METRICS,
    Line,
    choose_step,
    how_it_ended,
    read_metrics,
    with_final,
)
from umbrella_jax.scoring.tasks import headline

State = Literal["finished", "running", "stopped", "damaged"]
_OWN = ("output_dir",)
"""Of a config: what differs between any two runs."""
_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Run:
    """What a run's directory says of it."""

    name: str
    """Its path below the directory that was looked through."""
    path: Path
    state: State
    why: str
    """Of a run that stopped or is damaged, in words."""
    lines: tuple[Line, ...]
    """Of `metrics.jsonl`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """{dotted key: value}; empty where it cannot be read."""
    evaluated_step: int | None = None
    """The step whose evaluation is shown, as `score` chooses it; None before the first."""

    @property
    def step(self) -> int:
        """The last one."""
        return int(self.lines[-1]["step"] or 0) if self.lines else 0

    @property
    def steps(self) -> int | None:
        """Of the whole run; None where no line says it."""
        steps = self.lines[-1].get("steps") if self.lines else None
        return None if steps is None else int(steps)

    @property
    def evaluated(self) -> list[str]:
        """Names of the figures of its evaluations, in order."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name.startswith("eval_")))

    def value(self, name: str) -> float | None:
        """Return a figure of `evaluated_step`, or the newest of one that every update has; None where there is none, or
        it was not finite."""
        if name.startswith("eval_"):
            return with_final(self._evaluations.get(self.evaluated_step or 0, {})).get(name)
        return self.lines[-1].get(name) if self.lines else None

    @cached_property
    def _evaluations(self) -> dict[int, Line]:
        return _evaluations(self.lines)


def find_runs(directory: str | Path) -> list[Run]:
    """The directory, if it is a run, or all runs below it, by name. Raises ConfigError where there is none."""
    directory = Path(directory)
    found = sorted(_directories(directory))
    if not found:
        problem = "no run in it" if directory.is_dir() else why_not_a_directory(directory)
        raise ConfigError(f"{directory}: {problem}; expected the --out of umbrella-jax train, or a folder of them")
    return [_read(path, path.name if path == directory else str(path.relative_to(directory))) for path in found]


def _directories(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        begun = METRICS in files or (CONFIG in files and CHECKPOINTS in folders)
        if begun or (LOG in files and is_locked(Path(folder))):  # a log alone: what was refused before it was a run
            folders.clear()  # what lies within is the run's own
            yield Path(folder)


def _read(path: Path, name: str) -> Run:
    faults, lines, config = list[str](), list[Line](), {}
    try:
        lines = read_metrics(path / METRICS)
    except (UmbrellaError, OSError, UnicodeDecodeError) as error:
        faults.append(str(error))
    running = is_locked(path)
    try:
        if (path / CONFIG).exists() or lines:  # which a run writes before its first step
            settings = load_stored_config(path / CONFIG)
            config = {key: value for key, value in flat(to_dict(settings)).items() if key not in _OWN}
    except UmbrellaError as error:
        faults += error.faults
    at = None
    if (evaluated := _evaluations(lines)) and not faults:
        at, _ = choose_step(path, settings.train, evaluated, None)
    ended = how_it_ended(path / LOG)
    done = bool(lines) and lines[-1].get("step") == lines[-1].get("steps")
    state: State = "running" if running else "finished" if done or ended == "" else "stopped"
    why = {"stopped": ended or "without a word in log.txt, as a process that was killed"}.get(state, "")
    if faults:
        state, why = "damaged", "; ".join([*(["running"] if running else []), *faults])
    return Run(name, path, state, why, tuple(lines), config, at)


def _evaluations(lines: Iterable[Line]) -> dict[int, Line]:
    """{step: line} of the evaluated steps."""
    return {int(line["step"] or 0): line for line in lines if any(name.startswith("eval_") for name in line)}


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other."""

    runs: tuple[Run, ...]
    metrics: tuple[str, ...]
    """Names of figures, as in `metrics.jsonl`."""

    @cached_property
    def differ(self) -> tuple[str, ...]:
        """Keys of the configs whose values are not the same in all."""
        configs = [run.config for run in self.runs if run.config]
        keys = dict.fromkeys(key for config in configs for key in config)
        return tuple(key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs))

    def table(self) -> str:
        """For a terminal."""
        parts = [name.rpartition("/") for name in self.metrics]  # above each other, for a narrow column
        evaluated = any(run.evaluated_step is not None for run in self.runs)  # at which step, beside the metrics
        lead = ["", "", "", "", *["evaluated"] * evaluated]
        rows = [lead + [before + slash for before, slash, _ in parts]] if evaluated else []
        rows.append(["run", "state", "step", "loss", *["at step"] * evaluated, *(last for *_, last in parts)])
        for run in self.runs:
            steps = f"{run.step:,}" + ("" if run.steps is None else f" of {run.steps:,}")
            loss, *others = map(_short, self._values(run).values())
            at = "–" if run.evaluated_step is None else f"{run.evaluated_step:,}"
            rows.append([run.name, run.state, steps, loss, *[at] * evaluated, *others])
        lines = table_lines(rows)
        if why := [f"{visible(run.name, kept='')}: {run.state}: {visible(run.why)}" for run in self.runs if run.why]:
            lines += ["", *why]
        if self.differ:
            lines += ["", "configs differ in"]
            names = [["", *(run.name for run in self.runs if run.config)]]
            lines += table_lines(
                names + [[key, *(str(run.config.get(key)) for run in self.runs if run.config)] for key in self.differ]
            )
        return "\n".join(lines)

    def _values(self, run: Run) -> dict[str, float | None]:
        return {name: run.value(name) for name in ("loss", *self.metrics)}

    def to_json(self) -> dict[str, Any]:
        """For programs; `config` holds what differs."""
        return {
            "version": 1,
            "runs": [
                {
                    "run": run.name,
                    "path": str(run.path),
                    "state": run.state,
                    "why": run.why,
                    "step": run.step,
                    "steps": run.steps,
                    "evaluated_step": run.evaluated_step,
                    "metrics": self._values(run),
                    "config": {key: run.config.get(key) for key in self.differ} if run.config else None,
                }
                for run in self.runs
            ],
        }

    def plot(self, file: Path) -> None:
        """Draws the curves of all into an SVG or PNG; `plot_faults` says beforehand why it could not."""
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no window, no state

        others = [name for name in self.metrics if name != "eval_loss"]
        figure = Figure(figsize=(7, 3.2 * (1 + len(others))), layout="constrained")
        axes = figure.subplots(1 + len(others), squeeze=False)[:, 0]
        for number, run in enumerate(self.runs):
            style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1.2}
            axes[0].plot(*_points(run, "loss"), **style, label=run.name)
            axes[0].plot(*_points(run, "eval_loss"), **style, marker="o", markersize=4, linestyle="--")
            for where, name in zip(axes[1:], others, strict=True):
                where.plot(*_points(run, name), **style, marker="o", markersize=4, label=run.name)
        axes[0].set_ylabel("loss; of evaluation with marks")
        for where, name in zip(axes[1:], others, strict=True):
            where.set_ylabel(name.removeprefix("eval_"))
        for where in axes:
            where.set_xlabel("step")
            where.legend(frameon=False, fontsize=8)
            where.grid(alpha=0.25)
            where.spines[["top", "right"]].set_visible(False)
        with matplotlib.rc_context({"svg.hashsalt": "umbrella-jax"}):
            drawn = BytesIO()
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(drawn, format=file.suffix[1:], metadata=metadata)
        write_whole(file, drawn.getvalue())


def compare(runs: Sequence[Run], metrics: Sequence[str] = ()) -> Comparison:
    """Of the named figures, or of those that all evaluated runs share: the loss, and of each task the headline.

    Raises ConfigError for a figure that none of the runs has.
    """
    known = dict.fromkeys(name for run in runs for name in run.evaluated)
    if missing := [name for name in metrics if name not in known]:
        given = f"expected one of {', '.join(known)}" if known else "none of the runs was evaluated"
        raise ConfigError([f"--metric {name}: no run has it; {given}" for name in missing])
    return Comparison(tuple(runs), tuple(metrics or _shared([run.evaluated for run in runs if run.evaluated])))


def _shared(evaluated: Sequence[Sequence[str]]) -> Iterable[str]:
    """`eval_loss` and the headline of each task, of those that are in all."""
    if not evaluated:
        return
    names = [name for name in evaluated[0] if all(name in others for others in evaluated)]
    of_task: dict[str, list[str]] = defaultdict(list)
    for name in names:
        metric, _, task = name.removeprefix("eval_").partition("/")
        if metric in get_args(Metric) and task and task.rpartition("/")[0] not in of_task:  # else a part of one
            of_task[task].append(metric)
    yield from [name for name in names if name == "eval_loss"]
    yield from (f"eval_{headline(of)}/{task}" for task, of in of_task.items())


def plot_faults(file: Path) -> list[str]:
    """Why curves could not be drawn into a file."""
    faults = page_faults("--plot", file, ["matplotlib"])
    if file.suffix not in _SUFFIXES:
        faults.append(f"--plot {file}: expected a name that ends with {' or '.join(_SUFFIXES)}")
    return faults


def _points(run: Run, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, where it is there and finite."""
    found = [(int(line["step"] or 0), value) for line in run.lines if (value := line.get(name)) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
