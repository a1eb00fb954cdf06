"""Commands for results: `runs`, `score`, `report`, `baseline`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from umbrella_jax.cli.ask import METHODS
from umbrella_jax.cli.options import (
    DATA_FLAGS,
    add_baseline,
    add_command,
    add_config,
    add_groups,
    add_json,
    add_out,
    add_overlap,
    add_step,
    config_of,
    number,
    settings_of,
)
from umbrella_jax.config.schema import EvaluationConfig
from umbrella_jax.console import plural, wrapped
from umbrella_jax.errors import ConfigError, DataError, visible
from umbrella_jax.io.files import strict_json
from umbrella_jax.rundir import CONTROL_NAMES, Step

BASELINES = ("cnn", "probe", "connectivity", "intensity", "covariates")
"""Names of `umbrella_jax.baselines.compare.BASELINES`, which is slow to import."""


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
    score.add_argument(
        "predictions",
        nargs="+",
        metavar="FILE",
        help="predictions or runs, scored as one set; or runs of several seeds or folds",
    )
    add_step(score, "evaluation of a run")
    score.add_argument(
        "--control",
        action="append",
        choices=CONTROL_NAMES,
        metavar="NAME",
        help="compare with these controls, such as blank; repeatable; default all that are found",
    )
    add_groups(score)
    add_baseline(score)
    score.add_argument(
        "--table",
        metavar="FILE",
        help="new .md, .csv or .tex with a table for a paper; or md, csv or tex to print it",
    )
    score.add_argument(
        "--reports", metavar="FILE", help="new .jsonl with reports and references, for RadEval and GREEN"
    )
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
    add_baseline(report)
    add_groups(report)
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
        "Train simple models on the same split, to compare.",
        "umbrella-jax baseline runs/sex --only probe intensity covariates",
    )
    baseline.add_argument("own", nargs="?", metavar="RUN", help="run to compare with; gives config and data")
    add_config(baseline, ["--base", *DATA_FLAGS, "--cache"], required=False)
    add_out(baseline, "folder for baseline/NAME.jsonl; default RUN")
    add_step(baseline, "checkpoint of the run")
    model = baseline.add_mutually_exclusive_group()
    model.add_argument("--run", metavar="RUN", help="compare with this run, with another --config")
    model.add_argument("--predictions", metavar="FILE", help="compare with these answers to the eval data")
    baseline.add_argument(
        "--only",
        nargs="+",
        choices=BASELINES,
        default=(),
        metavar="NAME",
        help=f"some of {', '.join(BASELINES)}; default all that apply",
    )
    baseline.add_argument("--cnn-epochs", type=int, default=50, metavar="N", help="epochs of the CNN; default 50")
    baseline.add_argument(
        "--cnn-width", type=float, default=1.0, metavar="FACTOR", help="factor of the CNN's channels; default 1"
    )
    baseline.add_argument("--atlas", metavar="FILE", help="label image for connectivity, or an atlas of nilearn")
    baseline.add_argument(
        "--connectivity",
        choices=["correlation", "partial", "tangent"],
        default="correlation",
        metavar="KIND",
        help="correlation (default), partial or tangent",
    )
    baseline.add_argument(
        "--covariates", nargs="+", default=(), metavar="NAME", help="columns of metadata; default age, sex, site, …"
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
    from umbrella_jax.report.compare_folds import read_folds
    from umbrella_jax.report.predictors import lacking_controls, own_baselines, read_controls
    from umbrella_jax.rundir import fold_runs, seed_runs
    from umbrella_jax.scoring.adjustment import adjust_scores
    from umbrella_jax.scoring.folds import NOTE, score_folds
    from umbrella_jax.scoring.groups import score_groups
    from umbrella_jax.scoring.metrics import cut_faults, pool_predictions, read_predictions, score, tasks_of
    from umbrella_jax.scoring.number_calibration import calibrate_numbers
    from umbrella_jax.scoring.paper_table import check_table
    from umbrella_jax.scoring.reliance import score_controls
    from umbrella_jax.scoring.text import write_reports

    _check_adjust_from(arguments)
    if arguments.table:
        check_table(arguments.table, prints_json=arguments.json)
    paths = [Path(path) for path in arguments.predictions]
    if len(paths) == 1 and (runs := seed_runs(paths[0])):
        if arguments.by or arguments.adjust or arguments.reports:
            names = ", ".join(map(str, runs.values()))
            flags = "--by, --adjust and --reports are"
            raise ConfigError(f"{paths[0]}: {flags} for one model, not for several seeds; name one of {names}")
        _score_seeds(arguments, runs)
        return
    settings = settings_of(arguments)
    folds = None
    is_default = len(paths) == 1 and arguments.baseline is None
    if is_default:
        arguments.baseline = own_baselines(paths[0])
    if len(paths) == 1 and (runs_of_folds := fold_runs(paths[0])):
        if arguments.step is not None:
            raise ConfigError(f"--step {arguments.step}: {paths[0]} has one step per fold; leave --step out")
        folds = read_folds(runs_of_folds, settings.evaluation if settings else None)
        rows, titles, config, files = folds.pooled, folds.lines, folds.evaluation, [*folds.files.values()]
    else:
        files, titles, config = _predictions_of(paths, arguments.step, settings.evaluation if settings else None)
        rows = pool_predictions(files)
        titles += [_default_baselines(arguments.baseline)] if is_default and arguments.baseline else []
    tasks = tasks_of(rows, config.tasks)
    if faults := cut_faults(rows, tasks):
        raise DataError(faults)
    if arguments.reports:
        count = write_reports(rows, tasks, arguments.reports)
        print(f"{arguments.reports}: {count} reports", file=sys.stderr)
    more: dict[str, Any] = {}
    if calibration := calibrate_numbers(rows, tasks, resamples=config.resamples):
        more["numbers"] = calibration
    _print_lacking(lacking_controls(files, arguments.control))
    controls = {name: _joined(own) for name, own in read_controls(files, arguments.control).items()}
    if controls:
        more["controls"] = score_controls(rows, controls, tasks, resamples=config.resamples)
    if arguments.by:
        more["by"] = score_groups(rows, tasks, arguments.by, resamples=config.resamples)
    if arguments.adjust:
        others = read_predictions(arguments.adjust_from) if arguments.adjust_from else None
        more["adjust"] = adjust_scores(rows, tasks, arguments.adjust, fit_rows=others, resamples=config.resamples)
    scores = (
        score_folds(folds.rows, tasks, resamples=config.resamples)
        if folds
        else score(rows, tasks, resamples=config.resamples)
    )
    compared = None
    if arguments.baseline or arguments.table:
        beside = {name: [own] for name, own in controls.items()}
        compared = _compare(arguments, [rows], beside, tasks, config.resamples, (NOTE,) if folds else ())
    _print_scores(arguments, titles, scores, more, compared, {})


def _print_lacking(lines: Sequence[str]) -> None:
    for line in lines:
        print("\n".join(wrapped(line)), file=sys.stderr)


def _default_baselines(run: str) -> str:
    """Return a sentence about the baselines that are shown without --baseline."""
    return f"baselines: those in {Path(run) / 'baseline'}; --baseline DIR takes others"


def _joined(parts: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of several files as one set."""
    return [row for part in parts for row in part]


def _compare(
    arguments: argparse.Namespace,
    model: Sequence[Sequence[dict[str, Any]]],
    controls: Mapping[str, Sequence[Sequence[dict[str, Any]]]],
    tasks: Mapping[str, Any],
    resamples: int,
    notes: Sequence[str] = (),
) -> Any:
    """Return the model's scores beside its controls and the baselines of --baseline, with these further notes."""
    from umbrella_jax.report.predictors import read_baselines
    from umbrella_jax.scoring.paired_scores import compare_predictors

    baselines = read_baselines(arguments.baseline) if arguments.baseline else {}
    compared = compare_predictors(model, tasks, controls=controls, baselines=baselines, resamples=resamples)
    return replace(compared, notes=(*compared.notes, *notes))


def _print_scores(
    arguments: argparse.Namespace,
    titles: Sequence[str],
    scores: Any,
    more: Mapping[str, Any],
    compared: Any,
    numbers: Mapping[str, Any],
) -> None:
    """Print scores as --json and --table ask.

    Args:
        more: {key in the JSON: further scores}.
        compared: the scores beside controls and baselines; None if not asked for.
        numbers: more keys of the JSON.
    """
    from umbrella_jax.scoring.paper_table import FORMATS, write_table

    if arguments.table in FORMATS:
        print(visible(FORMATS[arguments.table](compared)), end="")
        return
    if arguments.baseline:
        more = {**more, "compared": compared}
    if arguments.json:
        named = {name: part.to_json() for name, part in more.items()}
        print(strict_json({**scores.to_json(), **named, **numbers}, indent=1))
    else:
        title = ["\n".join(titles)] if titles else []
        print("\n\n".join([*title, scores.table(), *(part.table() for part in more.values())]))
    if arguments.table:
        write_table(arguments.table, compared)
        print(f"{arguments.table}: table of {plural(len(compared.predictors), 'task')}", file=sys.stderr)


def print_folds(directory: Path) -> None:
    """Print the scores of a cross-validation, as `score` does; if a fold is not finished, which ones instead."""
    from umbrella_jax.report.compare_folds import read_folds, unfinished_folds
    from umbrella_jax.report.predictors import lacking_controls, read_controls
    from umbrella_jax.rundir import fold_runs
    from umbrella_jax.scoring.folds import score_folds
    from umbrella_jax.scoring.metrics import cut_faults, tasks_of
    from umbrella_jax.scoring.reliance import score_controls

    runs = fold_runs(directory)
    if unfinished := unfinished_folds(runs):
        print("\n".join(f"{run}: {lacking}" for run, lacking in unfinished.items()))
        print(f"no scores yet: {len(unfinished)} of {len(runs)} folds are not finished")
        return
    folds = read_folds(runs, None)
    tasks = tasks_of(folds.pooled, folds.evaluation.tasks)
    if faults := cut_faults(folds.pooled, tasks):
        raise DataError(faults)
    scores: list[Any] = [score_folds(folds.rows, tasks, resamples=folds.evaluation.resamples)]
    _print_lacking(lacking_controls(list(folds.files.values())))
    controls = {name: _joined(own) for name, own in read_controls(list(folds.files.values())).items()}
    if controls:
        scores.append(score_controls(folds.pooled, controls, tasks, resamples=folds.evaluation.resamples))
    print("\n".join(folds.lines) + "\n\n" + "\n\n".join(part.table() for part in scores))


def _check_adjust_from(arguments: argparse.Namespace) -> None:
    if arguments.adjust_from and not arguments.adjust:
        raise ConfigError("adjust_from: nothing to correct for; name it with --adjust, such as --adjust age")


def _predictions_of(
    paths: Sequence[Path], asked: Step | None, config: EvaluationConfig | None
) -> tuple[list[Path], list[str], EvaluationConfig]:
    """Return the predictions files, titles to print, and how to score.

    Args:
        asked: the step of runs, chosen in each by `choose_step`.
        config: how to score; by default as the runs among the paths do.
    """
    from umbrella_jax.rundir import check_one_run, choose_step, load_run_config, predictions_by_step

    files, titles, stored = list[Path](), list[str](), dict[Path, EvaluationConfig]()
    for path in paths:
        if path.is_dir():
            check_one_run(path)
            by_step = predictions_by_step(path)
            if not by_step:
                raise ConfigError(f"{path}: no predictions; expected an evaluated run or a predictions file")
            run_config = load_run_config(path)
            step, why = choose_step(path, run_config.train, by_step, asked)
            files.append(by_step[step])
            titles.append(f"{by_step[step]} ({why})")
            stored[path] = run_config.evaluation
        elif asked is not None:
            raise ConfigError(f"--step {asked}: {path} is not a run; leave --step out, or name the run")
        else:
            files.append(path)
            titles += [str(path)] if len(paths) > 1 else []
    if config is not None:
        return files, titles, config
    first, config = next(iter(stored.items()), (None, EvaluationConfig()))
    if differing := [path for path, evaluation in stored.items() if evaluation != config]:
        raise ConfigError(
            [
                f"{path}: other settings of evaluation than in {first}; give those to use (--config)"
                for path in differing
            ]
        )
    return files, titles, config


def _score_seeds(arguments: argparse.Namespace, runs: Mapping[int, Path]) -> None:
    from umbrella_jax.report.compare_seeds import read_seeds
    from umbrella_jax.report.predictors import lacking_controls, read_controls
    from umbrella_jax.scoring.metrics import tasks_of
    from umbrella_jax.scoring.reliance import score_control_seeds
    from umbrella_jax.scoring.seeds import score_seeds

    answers = read_seeds(runs, arguments.step)
    settings = settings_of(arguments)
    config = settings.evaluation if settings else answers.evaluation
    tasks = tasks_of(next(iter(answers.rows.values())), config.tasks)
    scores = score_seeds(answers.rows, tasks, resamples=config.resamples)
    _print_lacking(lacking_controls(list(answers.files.values()), arguments.control))
    controls = read_controls(list(answers.files.values()), arguments.control)
    more: dict[str, Any] = {}
    if controls:
        more["controls"] = score_control_seeds(answers.rows, controls, tasks, resamples=config.resamples)
    compared = None
    if arguments.baseline or arguments.table:
        compared = _compare(arguments, list(answers.rows.values()), controls, tasks, config.resamples)
    titles = [f"seed {seed}: {file} ({answers.reasons[seed]})" for seed, file in answers.files.items()]
    files = {seed: str(file) for seed, file in answers.files.items()}
    _print_scores(arguments, titles, scores, more, compared, {"predictions": files})


def _report(arguments: argparse.Namespace) -> None:
    from umbrella_jax.html.page import PRIVACY
    from umbrella_jax.report import write_report
    from umbrella_jax.report.predictors import own_baselines
    from umbrella_jax.rundir import NEWEST, REPORT

    _check_adjust_from(arguments)
    default = own_baselines(arguments.run) if arguments.baseline is None else None
    out = Path(arguments.out) if arguments.out else Path(arguments.run) / REPORT
    facts = write_report(
        arguments.run,
        out,
        step=arguments.step,
        predictions=arguments.predictions,
        baseline=arguments.baseline or default,
        by=arguments.by,
        adjust=arguments.adjust,
        adjust_from=arguments.adjust_from,
        samples=arguments.samples,
        explain=arguments.explain,
    )
    chosen = f" step {facts.step} ({facts.step_reason})" if facts.step_reason not in ("", NEWEST) else ""
    lines = [f"{out}:{chosen}", *([f"  {_default_baselines(default)}"] if default else []), f"  {PRIVACY}"]
    print("\n".join(lines))


def _baseline(arguments: argparse.Namespace) -> None:
    from umbrella_jax.distributed import is_single_process, raise_together, start

    start()
    with raise_together():
        if not is_single_process():
            raise ConfigError("baseline: runs in one process; start only one")
    _use_own_run(arguments)
    from umbrella_jax.baselines.baseline import BaselineOptions
    from umbrella_jax.baselines.compare import baseline

    comparison = baseline(
        config_of(arguments),
        arguments.out,
        run=arguments.run,
        predictions=arguments.predictions,
        step=arguments.step,
        only=arguments.only,
        options=BaselineOptions(
            atlas=arguments.atlas,
            connectivity=arguments.connectivity,
            epochs=arguments.cnn_epochs,
            width=arguments.cnn_width,
            covariates=arguments.covariates,
        ),
    )
    print(comparison.table())


def _use_own_run(arguments: argparse.Namespace) -> None:
    """Use the config, answers and output directory of RUN. Raises ConfigError if other flags contradict it."""
    from umbrella_jax.report.facts import check_run
    from umbrella_jax.rundir import CONFIG

    own = arguments.own
    if own is None:
        flags = {"--config FILE": arguments.config, "--out DIR": arguments.out}
        if missing := [flag for flag, value in flags.items() if value is None]:
            raise ConfigError(f"baseline: expected RUN, or {' and '.join(missing)}")
        return
    given = {"--config": arguments.config, "--run": arguments.run, "--predictions": arguments.predictions}
    if faults := [
        f"{flag}: is of no use with RUN; leave one out" for flag, value in given.items() if value is not None
    ]:
        raise ConfigError(faults)
    check_run(own)
    arguments.run, arguments.config = own, str(Path(own) / CONFIG)
    arguments.out = arguments.out or own
