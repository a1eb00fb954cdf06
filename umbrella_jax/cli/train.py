"""Commands for training: `train`, `cv`, `inspect`, `plan`."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from umbrella_jax.cli.options import (
    DATA_FLAGS,
    add_cluster,
    add_command,
    add_config,
    add_json,
    add_overlap,
    config_of,
    say_once,
    start_processes,
)
from umbrella_jax.config.schema import RunConfig
from umbrella_jax.errors import ConfigError
from umbrella_jax.io.files import strict_json


def add(commands: Any) -> None:
    """Add the commands."""
    train = add_command(
        commands,
        "train",
        _train,
        "Train a model; by default only its patch embedding.",
        "umbrella-jax train --config run.yaml --base llava --train-data train.json \\\n"
        "    --eval-data eval.json --out runs/sex",
    )
    run = _add_training(train, DATA_FLAGS)
    run.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    run.add_argument("--devices", metavar="NAME", help="with --dry-run: compile for v5e-16, v5p-64, …")
    run.add_argument("--seeds", type=_seeds, metavar="SEEDS", help="train once per seed: 1,2,3, into --out/seed-N")

    cv = add_command(
        commands,
        "cv",
        _cv,
        "Train, test and score the folds of a study.",
        "umbrella-jax cv --config run.yaml --base llava study --out runs/cv",
    )
    cv.add_argument("study", metavar="DIR", help="folds of `data build`: conversations of train, eval, test")
    run = _add_training(cv, ("--modality", "--task-filter"))
    run.add_argument("--fold", type=int, metavar="N", help="only fold N, from 1, as for a cluster's job array")

    inspect = add_command(
        commands,
        "inspect",
        _inspect,
        "List trainable and frozen parameters without training.",
        "umbrella-jax inspect --config run.yaml --base llava",
    )
    add_config(inspect, ["--base", "--adapter"])

    plan = add_command(
        commands,
        "plan",
        _plan,
        "Estimate memory, time and the best mesh for other devices.",
        "umbrella-jax plan --config run.yaml --base llava --devices h100x8",
    )
    add_config(plan, ["--base", "--modality", "--batch-size", "--mesh"])
    plan.add_argument(
        "--devices", required=True, metavar="NAME", help="v5e-16, a100x8, rtx4090, …; here measures this machine"
    )
    plan.add_argument("--subjects", type=int, metavar="N", help="conversations per epoch, to estimate time")
    plan.add_argument(
        "--text-tokens", type=int, default=64, metavar="N", help="text tokens per conversation; default 64"
    )
    plan.add_argument("--flops", type=float, metavar="N", help="matrix-product FLOP/s measured on a device")
    plan.add_argument(
        "--efficiency",
        type=float,
        metavar="FRACTION",
        help="fraction of peak reached; default 0.75 (cpu 0.8; 1 with --flops)",
    )
    plan.add_argument("--compile", action="store_true", help="also compile the step for these devices (minutes)")
    add_json(plan)


def _add_training(parser: argparse.ArgumentParser, data_flags: Sequence[str]) -> Any:
    """Add the flags that commands which train share; return the group of those about the run."""
    steps = ("--batch-size", "--accumulate-steps", "--mesh", "--learning-rate", "--epochs", "--on-nonfinite")
    groups = add_config(parser, ["--base", "--adapter", *data_flags, "--cache", "--output-dir", *steps])
    add_overlap(groups["model and data"])
    run = groups["run"]
    run.add_argument("--dry-run", action="store_true", help="check, compile and report memory; do not train")
    run.add_argument("--no-wandb", action="store_true", help="disable Weights & Biases [train.wandb]")
    add_cluster(parser)
    return run


def _start(arguments: argparse.Namespace, faults: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Start the processes, and return the config and the lines that reading it printed.

    Raises:
        ConfigError: on every process: those of the config, else `faults`, which are contradictions between flags.
    """
    from umbrella_jax.distributed import raise_together

    start_processes(arguments)
    notes = list[str]()

    def say(text: str) -> None:
        say_once(text)
        notes.append(text)

    with raise_together():
        config = config_of(arguments, say)
        if faults:
            raise ConfigError(faults)
    return config, notes


def _train(arguments: argparse.Namespace) -> None:
    from umbrella_jax.plan import parse_devices
    from umbrella_jax.run.seeds import rehearse_seeds, train_seeds
    from umbrella_jax.run.train import rehearse, train

    has_two = arguments.seeds and any(text.partition("=")[0] == "seed" for text in arguments.set)
    faults = ["--set seed: already given by --seeds; give one of them"] if has_two else []
    if arguments.devices and (arguments.seeds or not arguments.dry_run):
        faults.append("--devices: expected --dry-run too, without --seeds")
    config, notes = _start(arguments, faults)
    if arguments.dry_run and arguments.seeds:
        rehearse_seeds(config, arguments.seeds, resume=arguments.resume)
    elif arguments.dry_run:
        dtype = config.model.compute_dtype
        devices = parse_devices(arguments.devices, flops=1.0, dtype=dtype) if arguments.devices else None
        rehearse(config, resume=arguments.resume, devices=devices)
    elif arguments.seeds:
        train_seeds(config, arguments.seeds, resume=arguments.resume, notes=notes)
    else:
        train(config, resume=arguments.resume, notes=notes)


def _cv(arguments: argparse.Namespace) -> None:
    import jax

    from umbrella_jax.cli.results import print_folds
    from umbrella_jax.run.cross_validation import cross_validate, rehearse_folds

    keys = {text.partition("=")[0] for text in arguments.set}
    taken = sorted(keys & {"data.train", "data.eval", "data.image_root"})
    faults = [f"--set {key}: cv takes the data from {arguments.study}; leave it out" for key in taken]
    config, notes = _start(arguments, faults)
    if arguments.dry_run:
        rehearse_folds(config, arguments.study, only=arguments.fold)
        return
    cross_validate(config, arguments.study, only=arguments.fold, notes=notes)
    if jax.process_index() == 0:
        print_folds(Path(str(config.output_dir)))


def _seeds(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(map(str.isdecimal, words)):
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, such as 1,2,3, got {text}")
    seeds = tuple(map(int, words))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"a seed is given twice: {text}")
    return seeds


def _inspect(arguments: argparse.Namespace) -> None:
    from umbrella_jax.run.train import inspect

    print(inspect(config_of(arguments)))


def _plan(arguments: argparse.Namespace) -> None:
    from umbrella_jax.checkpoints.load import open_base
    from umbrella_jax.plan import parse_devices, plan_hardware, stored_dtype
    from umbrella_jax.plan.compile_step import check_compiler, compile_step

    config = config_of(arguments)
    devices = parse_devices(
        arguments.devices, flops=arguments.flops, efficiency=arguments.efficiency, dtype=config.model.compute_dtype
    )
    if arguments.compile:
        check_compiler(devices)
    base = open_base(config, weights=False)
    frozen_dtype = stored_dtype(config.model, base.description / "config.json")
    plan = plan_hardware(
        config,
        base.config,
        devices,
        frozen_dtype=frozen_dtype,
        text_tokens=arguments.text_tokens,
        subjects=arguments.subjects,
    )
    report, lines = plan.to_json(), [plan.table()]
    if arguments.compile and (step := plan.recommended):
        model = replace(base.config, remat=config.model.remat)
        program = compile_step(
            *(config, model, devices, step.mesh, step.batch_size, plan.model.workload), frozen_dtype=frozen_dtype
        )
        report["compiled"] = {"batch_size": step.batch_size, "mesh": asdict(step.mesh), **program.to_json()}
        title = f"batch {step.batch_size}, {step.mesh}, remat {step.remat}:"
        lines += ["", title, *program.lines(step.total_bytes)]
    print(strict_json(report, indent=2) if arguments.json else "\n".join(lines))
