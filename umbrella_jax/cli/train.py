"""`train`, and what looks ahead of it: `inspect`, `plan`."""

import argparse
import json
from typing import Any

from umbrella_jax.cli.options import (
    DATA_FLAGS,
    add_cluster,
    add_command,
    add_config,
    add_json,
    config_of,
    start_processes,
)


def add(commands: Any) -> None:
    """Adds the commands."""
    train = add_command(
        commands,
        "train",
        _train,
        "Train what the config names; by default the patch embedding.",
        "umbrella-jax train --config run.yaml --base llava --train-data train.json \\\n"
        "    --eval-data eval.json --out runs/sex",
    )
    of_run = ("--out", "--batch-size", "--mesh", "--learning-rate", "--epochs", "--on-nonfinite")
    run = add_config(train, ["--base", *DATA_FLAGS, "--cache", *of_run])["run"]
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint there")
    run.add_argument("--dry-run", action="store_true", help="check, compile, say what memory it takes; no step")
    run.add_argument("--no-wandb", action="store_true", help="not to Weights & Biases [train.wandb]")
    add_cluster(train)

    inspect = add_command(
        commands,
        "inspect",
        _inspect,
        "Print what would train and what is frozen, without training.",
        "umbrella-jax inspect --config run.yaml --base llava",
    )
    add_config(inspect, ["--base"])

    plan = add_command(
        commands,
        "plan",
        _plan,
        "Memory, time and the best mesh, on devices not at hand.",
        "umbrella-jax plan --config run.yaml --base llava --devices h100x8",
    )
    add_config(plan, ["--base", "--modality", "--batch-size", "--mesh"])
    plan.add_argument("--devices", required=True, metavar="NAME", help="v5e-16, v5p-64, v6e-8, a100x8, h200x1, cpu")
    plan.add_argument("--subjects", type=int, metavar="N", help="conversations of an epoch, for its hours")
    plan.add_argument("--text-tokens", type=int, default=64, metavar="N", help="of a conversation; default 64")
    plan.add_argument("--flops", type=float, metavar="X", help="FLOP/s of products, measured on a device")
    plan.add_argument(
        "--efficiency", type=float, metavar="X", help="share of the peak; default 0.75 (--flops 1, cpu 0.8)"
    )
    add_json(plan)


def _train(arguments: argparse.Namespace) -> None:
    from umbrella_jax.distributed import bound, together
    from umbrella_jax.run import rehearse, train

    start_processes(arguments)
    with bound():
        with together():
            config = config_of(arguments)
        (rehearse if arguments.dry_run else train)(config, resume=arguments.resume)


def _inspect(arguments: argparse.Namespace) -> None:
    from umbrella_jax.run import inspect

    print(inspect(config_of(arguments)))


def _plan(arguments: argparse.Namespace) -> None:
    from umbrella_jax.api import open_base
    from umbrella_jax.plan import make_plan, parse_devices, stored_dtype

    config = config_of(arguments)
    devices = parse_devices(
        arguments.devices, flops=arguments.flops, efficiency=arguments.efficiency, dtype=config.model.compute_dtype
    )
    base = open_base(config, weights=False)
    found = make_plan(
        config,
        base.config,
        devices,
        frozen_dtype=stored_dtype(config.model, base.description / "config.json"),
        text_tokens=arguments.text_tokens,
        subjects=arguments.subjects,
    )
    print(json.dumps(found.to_json(), indent=2) if arguments.json else found.table())
