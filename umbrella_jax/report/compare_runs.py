"""Compare runs: their progress, their metrics and the differences between their configs. Needs no jax."""

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
from umbrella_jax.console import table_lines, wrapped
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
    evaluations,
    how_it_ended,
    points,
    read_metrics,
    stopped_early,
    with_final,
)
from umbrella_jax.scoring.tasks import headline

State = Literal["finished", "running", "stopped", "damaged"]
_OWN = ("output_dir",)
"""Keys that differ between any two runs, so they are left out."""
_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Run:
    """A run, as read from its directory."""

    name: str
    """The run's path below the searched directory."""
    path: Path
    state: State
    stop_reason: str
    """Why the run stopped, early or not, or is damaged, in words."""
    lines: tuple[Line, ...]
    """Lines of `metrics.jsonl`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """{dotted key: value}; empty if the config cannot be read."""
    evaluated_step: int | None = None
    """Step whose evaluation is shown, chosen as by `umbrella-jax score`; None before the first evaluation."""

    @property
    def step(self) -> int:
        """The last step."""
        return int(self.lines[-1]["step"] or 0) if self.lines else 0

    @property
    def steps(self) -> int | None:
        """Number of steps of the whole run; None if no line records it."""
        steps = self.lines[-1].get("steps") if self.lines else None
        return None if steps is None else int(steps)

    @property
    def evaluated(self) -> list[str]:
        """Names of the evaluations' metrics, in order."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name.startswith("eval_")))

    def value(self, name: str) -> float | None:
        """Return a metric at `evaluated_step`, or the newest value of one that every update has.

        Returns None if there is no such value or it was not finite.
        """
        if name.startswith("eval_"):
            return with_final(self._evaluations.get(self.evaluated_step or 0, {})).get(name)
        return self.lines[-1].get(name) if self.lines else None

    @cached_property
    def _evaluations(self) -> dict[int, Line]:
        return evaluations(self.lines)


def find_runs(directory: str | Path) -> list[Run]:
    """Return the directory's run, or all runs below it, by name. Raises ConfigError if there is none."""
    directory = Path(directory)
    paths = sorted(_directories(directory))
    if not paths:
        problem = "no run in it" if directory.is_dir() else why_not_a_directory(directory)
        raise ConfigError(f"{directory}: {problem}; expected the --out of umbrella-jax train, or a folder of runs")
    return [_read(path, path.name if path == directory else str(path.relative_to(directory))) for path in paths]


def _directories(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        started = METRICS in files or (CONFIG in files and CHECKPOINTS in folders)
        # a directory with only a log is a run if it is locked; otherwise the run was refused at its start
        if started or (LOG in files and is_locked(Path(folder))):
            folders.clear()  # a run contains no other runs
            yield Path(folder)


def _read(path: Path, name: str) -> Run:
    faults, lines, config, early = list[str](), list[Line](), {}, None
    try:
        lines = read_metrics(path / METRICS)
    except (UmbrellaError, OSError) as error:
        faults.append(str(error))
    running = is_locked(path)
    try:
        if (path / CONFIG).exists() or lines:  # a run writes its config before its first step
            settings = load_stored_config(path / CONFIG)
            config = {key: value for key, value in flat(to_dict(settings)).items() if key not in _OWN}
            early = stopped_early(lines, settings.train.early_stopping)
    except UmbrellaError as error:
        faults += error.faults
    at = None
    if (evaluated := evaluations(lines)) and not faults:
        at, _ = choose_step(path, settings.train, evaluated, None)
    ended = how_it_ended(path / LOG)
    done = bool(lines) and lines[-1].get("step") == lines[-1].get("steps")
    state: State = "running" if running else "finished" if done or early or ended == "" else "stopped"
    killed = "no end in log.txt, as if the process was killed"
    stop_reason = {"stopped": ended or killed, "finished": "" if done else early or ""}.get(state, "")
    if faults:
        state, stop_reason = "damaged", "; ".join([*(["running"] if running else []), *faults])
    return Run(name, path, state, stop_reason, tuple(lines), config, at)


@dataclass(frozen=True)
class RunComparison:
    """Several runs and the metrics to compare."""

    runs: tuple[Run, ...]
    metrics: tuple[str, ...]
    """Names of metrics, as in `metrics.jsonl`."""

    @cached_property
    def differ(self) -> tuple[str, ...]:
        """Keys of the configs whose values differ between runs."""
        configs = [run.config for run in self.runs if run.config]
        keys = dict.fromkeys(key for config in configs for key in config)
        return tuple(key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs))

    def table(self) -> str:
        """Return the text for a terminal."""
        parts = [name.rpartition("/") for name in self.metrics]  # stacked in two lines, for a narrow column
        evaluated = any(run.evaluated_step is not None for run in self.runs)  # then a column shows the step
        lead = ["", "", "", "", *["evaluated"] * evaluated]
        rows = [lead + [before + slash for before, slash, _ in parts]] if evaluated else []
        rows.append(["run", "state", "step", "loss", *["at step"] * evaluated, *(last for *_, last in parts)])
        for run in self.runs:
            steps = f"{run.step:,}" + ("" if run.steps is None else f" of {run.steps:,}")
            loss, *others = map(_short, self._values(run).values())
            at = "–" if run.evaluated_step is None else f"{run.evaluated_step:,}"
            rows.append([run.name, run.state, steps, loss, *[at] * evaluated, *others])
        lines = table_lines(rows)
        if reasons := [f"{run.name}: {run.state}: {run.stop_reason}" for run in self.runs if run.stop_reason]:
            lines += ["", *(part for reason in reasons for part in wrapped(visible(reason, kept="")))]
        if self.differ:
            lines += ["", "configs differ in", *self._differences()]
        return "\n".join(lines)

    def _differences(self) -> list[str]:
        """Return a table of the keys that differ; if its columns do not fit, each key's values and the runs with it."""
        runs = [run for run in self.runs if run.config]
        rows = [["", *(run.name for run in runs)]]
        lines = table_lines(rows + [[key, *(str(run.config.get(key)) for run in runs)] for key in self.differ])
        if "" not in lines:
            return lines
        lines = []
        for key in self.differ:
            names: dict[str, list[str]] = {}
            for run in runs:
                names.setdefault(str(run.config.get(key)), []).append(run.name)
            lines.append(visible(key, kept=""))
            for value, same in names.items():
                lines += wrapped(visible(f"  {value}: {', '.join(same)}", kept=""))
        return lines

    def _values(self, run: Run) -> dict[str, float | None]:
        return {name: run.value(name) for name in ("loss", *self.metrics)}

    def to_json(self) -> dict[str, Any]:
        """Return a mapping for JSON; `config` holds the keys that differ."""
        return {
            "version": 1,
            "runs": [
                {
                    "run": run.name,
                    "path": str(run.path),
                    "state": run.state,
                    "why": run.stop_reason,
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
        """Draw the curves of all runs into an SVG or PNG; call `plot_faults` first to check the file."""
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no window, no state

        others = [name for name in self.metrics if name != "eval_loss"]
        figure = Figure(figsize=(7, 3.2 * (1 + len(others))), layout="constrained")
        axes = figure.subplots(1 + len(others), squeeze=False)[:, 0]
        for number, run in enumerate(self.runs):
            style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1.2}
            axes[0].plot(*_curve(run, "loss"), **style, label=run.name)
            axes[0].plot(*_curve(run, "eval_loss"), **style, marker="o", markersize=4, linestyle="--")
            for panel, name in zip(axes[1:], others, strict=True):
                panel.plot(*_curve(run, name), **style, marker="o", markersize=4, label=run.name)
        axes[0].set_ylabel("loss; evaluations have marks")
        for panel, name in zip(axes[1:], others, strict=True):
            panel.set_ylabel(name.removeprefix("eval_"))
        for panel in axes:
            panel.set_xlabel("step")
            panel.legend(frameon=False, fontsize=8)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        with matplotlib.rc_context({"svg.hashsalt": "umbrella-jax"}):
            drawn = BytesIO()
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(drawn, format=file.suffix[1:], metadata=metadata)
        write_whole(file, drawn.getvalue())


def compare(runs: Sequence[Run], metrics: Sequence[str] = ()) -> RunComparison:
    """Compare runs by the named metrics, or by those that all evaluated runs share.

    The shared ones are the evaluation loss and each task's headline metric. Raises ConfigError for a metric that no run
    has.
    """
    known = dict.fromkeys(name for run in runs for name in run.evaluated)
    if missing := [name for name in metrics if name not in known]:
        expected = f"expected one of {', '.join(known)}" if known else "none of the runs was evaluated"
        raise ConfigError([f"--metric {name}: no run has it; {expected}" for name in missing])
    return RunComparison(tuple(runs), tuple(metrics or _shared([run.evaluated for run in runs if run.evaluated])))


def _shared(evaluated: Sequence[Sequence[str]]) -> Iterable[str]:
    """Yield the names that all runs share: `eval_loss` and each task's headline metric."""
    if not evaluated:
        return
    names = [name for name in evaluated[0] if all(name in others for others in evaluated)]
    by_task: dict[str, list[str]] = defaultdict(list)
    for name in names:
        metric, _, task = name.removeprefix("eval_").partition("/")
        if (
            metric in get_args(Metric) and task and task.rpartition("/")[0] not in by_task
        ):  # skips parts, METRIC/TASK/PART
            by_task[task].append(metric)
    yield from [name for name in names if name == "eval_loss"]
    yield from (f"eval_{headline(metrics)}/{task}" for task, metrics in by_task.items())


def plot_faults(file: Path) -> list[str]:
    """Return the reasons why curves cannot be drawn into a file."""
    faults = page_faults("--plot", file, ["matplotlib"])
    if file.suffix not in _SUFFIXES:
        faults.append(f"--plot {file}: expected a name that ends with {' or '.join(_SUFFIXES)}")
    return faults


def _curve(run: Run, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values at which a metric is finite."""
    found = points(run.lines, name)
    return [step for step, _ in found], [value for _, value in found]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
