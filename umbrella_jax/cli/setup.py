"""To begin with: `demo`, `config from-original`."""

import argparse
from pathlib import Path
from typing import Any

from umbrella_jax.cli.options import add_command, add_group


def add(commands: Any) -> None:
    """Adds the commands."""
    demo = add_command(
        commands,
        "demo",
        _demo,
        "The whole path on small real scans, from base to export.",
        "umbrella-jax demo --out runs/demo",
    )
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="default runs/demo")

    config = add_group(commands, "config", "Make configs.", "umbrella-jax config from-original old.yaml > run.yaml")
    original = add_command(
        config,
        "from-original",
        _from_original,
        "Print a YAML of the PyTorch system as one of ours.",
        "umbrella-jax config from-original old.yaml > run.yaml",
    )
    original.add_argument("file", metavar="FILE", help="of the PyTorch system")


def _demo(arguments: argparse.Namespace) -> None:
    from umbrella_jax.demo import run_demo

    run_demo(Path(arguments.output_dir))


def _from_original(arguments: argparse.Namespace) -> None:
    from umbrella_jax.original import from_original, render

    print(render(*from_original(arguments.file)), end="")
