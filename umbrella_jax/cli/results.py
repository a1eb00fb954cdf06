"""Commands for results: `runs`, `score`, `report`, `baseline`."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umbrella_jax.cli.ask import METHODS
from umbrella_jax.cli.options import (
    DATA_FLAGS,
    add_command,
    add_config,
    add_json,
    add_out,
    add_overlap,
    add_step,
    config_of,
    number,
    settings_of,
)
from umbrella_jax.config.load import load_stored_config
from umbrella_jax.config.schema import EvaluationConfig
from umbrella_jax.errors import ConfigError, DataError
from umbrella_jax.io.files import strict_json


def add(commands: Any) -> None:
    """Add the commands."""
    runs = add_command(
        commands,
        "runs",
        _runs,
        "Compare runs: state, steps, metrics, config differences.",
        "umbrella-jax runs runs --metric eval_loss --plot runs.svg",
    )
    runs.add_argument("dir", metavar="DIR", help="folder to search recursively for runs")
    runs.add_argument("--metric", action="append", metavar="NAME", help="name in metrics.jsonl; repeatable")
    runs.add_argument("--plot", metavar="FILE", help="plot the curves into a new .svg or .png (extra `report`)")
    add_json(runs)

    score = add_command(
        commands,
        "score",
        _score,
        "Score predictions per task, with confidence intervals.",
        "umbrella-jax score runs/sex",
    )
    score.add_argument("predictions", metavar="FILE", help="predictions (.jsonl), a run, or runs of several seeds")
    add_step(score, "evaluation of a run")
    score.add_argument("--config", metavar="FILE", help="YAML with an evaluation section; default the run's")
    add_json(score)

    report = add_command(
        commands,
        "report",
        _report,
        "Write one HTML page about a run: settings, curves, answers.",
        "umbrella-jax report runs/sex --samples 12 --explain gradient",
    )
    report.add_argument("run", metavar="RUN", help="directory of the run")
    report.add_argument("--out", metavar="FILE", help="new page; default RUN/report.html, which is rewritten")
    which = report.add_mutually_exclusive_group()
    add_step(which, "evaluation to show")
    which.add_argument("--predictions", metavar="FILE", help="show these `predict` answers to the run's data.eval")
    report.add_argument("--baseline", metavar="DIR", help="compare with the output of `baseline --out DIR`")
    report.add_argument(
        "--samples", type=number, default=8, metavar="N", help="conversations shown with volumes; default 8"
    )
    report.add_argument(
        "--explain",
        choices=METHODS,
        metavar="METHOD",
        help="overlay the maps of `explain`: gradient, integrated or occlusion",
    )

    baseline = add_command(
        commands,
        "baseline",
        _baseline,
        "Train a 3D CNN and a linear probe on the same split.",
        "umbrella-jax baseline --config runs/sex/config.yaml --run runs/sex --out base",
    )
    add_config(baseline, ["--base", *DATA_FLAGS, "--cache"])
    add_out(baseline, "folder for baseline/cnn.jsonl and baseline/probe.jsonl", required=True)
    add_step(baseline, "checkpoint of --run")
    model = baseline.add_mutually_exclusive_group()
    model.add_argument("--run", metavar="RUN", help="compare with this run; probe its vision tower")
    model.add_argument("--predictions", metavar="FILE", help="compare with these answers to the eval data")
    baseline.add_argument("--only", choices=["cnn", "probe"], metavar="NAME", help="cnn or probe; default both")
    baseline.add_argument("--cnn-epochs", type=int, default=50, metavar="N", help="epochs of the CNN; default 50")
    baseline.add_argument(
        "--cnn-width", type=float, default=1.0, metavar="FACTOR", help="factor of the CNN's channels; default 1"
    )
    add_overlap(baseline)


def _runs(arguments: argparse.Namespace) -> None:
    from umbrella_jax.report.compare_runs import compare, find_runs, plot_faults

    file = Path(arguments.plot) if arguments.plot else None
    if file and (faults := plot_faults(file)):
        raise ConfigError(faults)
    comparison = compare(find_runs(arguments.dir), arguments.metric or ())
    print(strict_json(comparison.to_json(), indent=1) if arguments.json else comparison.table())
    if file:
        comparison.plot(file)
        print(f"{file}: curves of {len(comparison.runs)} runs", file=sys.stderr)


def _score(arguments: argparse.Namespace) -> None:
    from umbrella_jax.rundir import CONFIG, choose_step, predictions_by_step, seed_runs
    from umbrella_jax.scoring.metrics import cut_faults, read_predictions, score, tasks_of

    file, stored, title = Path(arguments.predictions), None, ""
    if runs := seed_runs(file):
        _score_seeds(arguments, runs)
        return
    if file.is_dir():
        run, by_step = file, predictions_by_step(file)
        if not by_step:
            raise ConfigError(f"{file}: no predictions; expected an evaluated run or a predictions file")
        stored = load_stored_config(run / CONFIG)
        step, why = choose_step(run, stored.train, by_step, arguments.step)
        file = by_step[step]
        title = f"{file} ({why})\n\n"
    elif arguments.step is not None:
        raise ConfigError(f"--step {arguments.step}: {file} is not a run; leave --step out, or name the run")
    settings = settings_of(arguments) or stored
    config = settings.evaluation if settings else EvaluationConfig()
    rows = read_predictions(file)
    tasks = tasks_of(rows, config.tasks)
    if faults := cut_faults(rows, tasks):
        raise DataError(faults)
    scores = score(rows, tasks, resamples=config.resamples)
    if arguments.json:
        print(strict_json(scores.to_json(), indent=1))
    else:
        print(f"{title}{scores.table()}")


def _score_seeds(arguments: argparse.Namespace, runs: Mapping[int, Path]) -> None:
    from umbrella_jax.report.compare_seeds import read_seeds
    from umbrella_jax.scoring.metrics import tasks_of
    from umbrella_jax.scoring.seeds import score_seeds

    found = read_seeds(runs, arguments.step)
    settings = settings_of(arguments)
    config = settings.evaluation if settings else found.evaluation
    tasks = tasks_of(next(iter(found.rows.values())), config.tasks)
    scores = score_seeds(found.rows, tasks, resamples=config.resamples)
    if arguments.json:
        files = {seed: str(file) for seed, file in found.files.items()}
        print(strict_json({**scores.to_json(), "predictions": files}, indent=1))
    else:
        print("\n".join(f"seed {seed}: {file} ({found.reasons[seed]})" for seed, file in found.files.items()))
        print(f"\n{scores.table()}")


def _report(arguments: argparse.Namespace) -> None:
    from umbrella_jax.html.page import PRIVACY
    from umbrella_jax.report import write_report
    from umbrella_jax.rundir import NEWEST, REPORT

    out = Path(arguments.out) if arguments.out else Path(arguments.run) / REPORT
    facts = write_report(
        arguments.run,
        out,
        step=arguments.step,
        predictions=arguments.predictions,
        baseline=arguments.baseline,
        samples=arguments.samples,
        explain=arguments.explain,
    )
    chosen = f" step {facts.step} ({facts.step_reason})" if facts.step_reason not in ("", NEWEST) else ""
    print(f"{out}:{chosen}\n  {PRIVACY}")


def _baseline(arguments: argparse.Namespace) -> None:
    from umbrella_jax.distributed import is_single_process, raise_together, start

    start()
    with raise_together():
        if not is_single_process():
            raise ConfigError("baseline: runs in one process; start only one")
    from umbrella_jax.baselines.compare import baseline

    comparison = baseline(
        config_of(arguments),
        arguments.out,
        run=arguments.run,
        predictions=arguments.predictions,
        step=arguments.step,
        only=arguments.only,
        epochs=arguments.cnn_epochs,
        width=arguments.cnn_width,
    )
    print(comparison.table())
